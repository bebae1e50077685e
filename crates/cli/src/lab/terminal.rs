//! A terminal: one persistent `bash` on a pseudo-terminal, typed into as a person would.
//!
//! The shell's prompt carries an unguessable mark and the last exit code, so the end of a command is seen, not guessed.
//! The child that becomes the shell is a re-execution (`mantlet lab-terminal`), because a controlling terminal can only be
//! taken by the process itself.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use regex::Regex;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

/// The hidden word that leads to [`child_main`].
pub const SUBCOMMAND: &str = "lab-terminal";
/// Output that is kept per terminal; a command that writes more keeps its last part.
const MAX_OUTPUT: usize = 8 << 20;

/// Becomes the shell: a session of its own with the standard input as controlling terminal.
pub fn child_main() -> ExitCode {
    let become_shell = || -> Result<()> {
        nix::unistd::setsid()?;
        mantlet_net::process::set_controlling_terminal(std::io::stdin().as_fd())?;
        let error = Command::new("bash")
            .args(["--noprofile", "--norc", "--noediting", "-i"])
            .exec();
        Err(error).context("bash is needed")
    };
    if let Err(error) = become_shell() {
        eprintln!("mantlet: terminal: {error:#}");
    }
    ExitCode::FAILURE
}

#[derive(Default)]
struct Buffer {
    /// What has come since the last command was typed.
    bytes: Vec<u8>,
    closed: bool,
}

/// See the module's documentation.
pub struct Terminal {
    input: std::fs::File,
    shared: Arc<(Mutex<Buffer>, Condvar)>,
    child: Child,
    mark: String,
}

/// How a command ended.
pub enum End {
    /// At the shell's prompt, with this exit code.
    Prompt(i32),
    /// The awaited text has come.
    Seen,
}

enum Mark {
    First(i32),
    More,
}

impl Terminal {
    /// Starts a shell in `dir` with extra environment variables.
    ///
    /// # Errors
    /// No pseudo-terminal, or no shell.
    pub fn open<'a>(dir: &Path, environment: impl IntoIterator<Item = (&'a str, &'a OsStr)>) -> Result<Self> {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("a pseudo-terminal")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave: OwnedFd = rustix::fs::open(name, flags, rustix::fs::Mode::empty())?;
        let mut modes = tcgetattr(&slave)?;
        // What is typed would otherwise come back as if the command had said it.
        modes.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        tcsetwinsize(
            &slave,
            Winsize {
                ws_row: 50,
                ws_col: 250,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )?;
        let mark = format!("lab-{:016x}", rand::random::<u64>());
        let child = Command::new(std::env::current_exe()?)
            .arg(SUBCOMMAND)
            .current_dir(dir)
            .envs(environment)
            .env("PS1", format!("\u{1e}{mark} $?\u{1e}"))
            .env("PS2", format!("\u{1e}{mark} +\u{1e}"))
            .env_remove("PROMPT_COMMAND")
            .env_remove("HISTFILE")
            .env("TERM", "dumb")
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave))
            .spawn()
            .context("starting a shell")?;
        let shared = Arc::new((Mutex::new(Buffer::default()), Condvar::new()));
        let mut output = std::fs::File::from(master.try_clone()?);
        std::thread::spawn({
            let shared = shared.clone();
            move || {
                let mut chunk = [0; 1 << 14];
                loop {
                    // EIO: the last process on the other side has gone.
                    let read = output.read(&mut chunk).unwrap_or(0);
                    let (buffer, changed) = &*shared;
                    let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                    if read == 0 {
                        buffer.closed = true;
                        changed.notify_all();
                        return;
                    }
                    buffer.bytes.extend_from_slice(&chunk[..read]);
                    if buffer.bytes.len() > MAX_OUTPUT {
                        let surplus = buffer.bytes.len() - MAX_OUTPUT / 2;
                        buffer.bytes.drain(..surplus);
                    }
                    changed.notify_all();
                }
            }
        });
        let mut terminal = Self {
            input: std::fs::File::from(master),
            shared,
            child,
            mark,
        };
        let (_, first) = terminal.await_mark(Instant::now() + Duration::from_secs(10), None)?;
        if !matches!(first, Some(Mark::First(_))) {
            bail!("the shell does not show its prompt");
        }
        terminal.forget();
        Ok(terminal)
    }

    /// Types a command, line by line as the shell asks for them; the output is everything that comes.
    ///
    /// # Errors
    /// The command does not end (and `until` does not match) within `limit`, or the shell has ended.
    pub fn command(
        &mut self,
        text: &str,
        until: Option<&Regex>,
        reply: Option<(&str, &str)>,
        limit: Duration,
    ) -> Result<(String, End)> {
        self.forget();
        let deadline = Instant::now() + limit;
        let lines: Vec<&str> = text.lines().collect();
        let mut output = String::new();
        let mut code = 0;
        for (index, line) in lines.iter().enumerate() {
            let last = index + 1 == lines.len();
            self.type_text(&format!("{line}\n"))?;
            if let Some((at, answer)) = reply.filter(|_| last) {
                let question = Regex::new(&regex::escape(at))?;
                let (so_far, end) = self.await_mark(deadline, Some(&question))?;
                if let Some(Mark::First(code)) = end {
                    // It has ended without asking.
                    return Ok((output + &so_far, End::Prompt(code)));
                }
                self.type_text(&format!("{answer}\n"))?;
            }
            let (text, end) = self.await_mark(deadline, until.filter(|_| last))?;
            output.push_str(&text);
            match end {
                Some(Mark::First(exit)) => code = exit,
                Some(Mark::More) if last => bail!("the command is not complete"),
                Some(Mark::More) => {}
                None => return Ok((output, End::Seen)),
            }
            if !last {
                self.forget();
            }
        }
        Ok((output, End::Prompt(code)))
    }

    /// Types text without waiting.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.input
            .write_all(text.as_bytes())
            .context("typing into the terminal")
    }

    /// Presses keys and waits for the prompt, or for `until`.
    ///
    /// # Errors
    /// Neither comes within `limit`, or a key is unknown.
    pub fn keys(&mut self, keys: &[String], until: Option<&Regex>, limit: Duration) -> Result<(String, End)> {
        let deadline = Instant::now() + limit;
        for key in keys {
            match key.as_str() {
                "C-c" => self.type_text("\u{3}")?,
                "C-d" => self.type_text("\u{4}")?,
                "Enter" => self.type_text("\n")?,
                other => bail!("unknown key {other:?}"),
            }
        }
        let (output, end) = self.await_mark(deadline, until)?;
        Ok((
            output,
            match end {
                Some(Mark::First(code)) => End::Prompt(code),
                _ => End::Seen,
            },
        ))
    }

    /// What has come since the last command was typed.
    pub fn output(&self) -> String {
        let buffer = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.clean(&buffer.bytes)
    }

    /// Waits until more output has come or `deadline` has passed.
    pub fn wait_for_more(&self, seen: usize, deadline: Instant) {
        let (buffer, changed) = &*self.shared;
        let buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let _unused = changed.wait_timeout_while(buffer, left, |buffer| buffer.bytes.len() <= seen && !buffer.closed);
    }

    /// Number of bytes that have come since the last command was typed.
    pub fn len(&self) -> usize {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).bytes.len()
    }

    fn forget(&mut self) {
        self.shared
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes
            .clear();
    }

    /// Waits for a prompt (the result's mark) or for `until` (no mark). The output has no prompt in it.
    fn await_mark(&self, deadline: Instant, until: Option<&Regex>) -> Result<(String, Option<Mark>)> {
        let (buffer, changed) = &*self.shared;
        let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(mark) = self.find_mark(&buffer.bytes) {
                return Ok((self.clean(&buffer.bytes), Some(mark)));
            }
            let text = self.clean(&buffer.bytes);
            if until.is_some_and(|until| until.is_match(&text)) {
                return Ok((text, None));
            }
            if buffer.closed {
                bail!("the shell has ended; its last output: {}", tail(&text));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("not done in time; the last output: {}", tail(&text));
            }
            buffer = changed
                .wait_timeout(buffer, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn find_mark(&self, bytes: &[u8]) -> Option<Mark> {
        let text = String::from_utf8_lossy(bytes);
        let start = text.rfind(&format!("\u{1e}{} ", self.mark))?;
        let rest = &text[start + self.mark.len() + 2..];
        let state = rest.strip_suffix('\u{1e}')?;
        if state == "+" {
            Some(Mark::More)
        } else {
            state.parse().ok().map(Mark::First)
        }
    }

    fn clean(&self, bytes: &[u8]) -> String {
        let text = String::from_utf8_lossy(bytes);
        let mut out = String::new();
        let mut rest = text.as_ref();
        while let Some(start) = rest.find(&format!("\u{1e}{}", self.mark)) {
            out.push_str(&rest[..start]);
            let after = &rest[start + '\u{1e}'.len_utf8()..];
            rest = after.split_once('\u{1e}').map_or("", |(_, rest)| rest);
        }
        out.push_str(rest);
        strip_control(&out)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Closing the terminal hangs up its session; the shell and what runs in it get SIGHUP.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}

/// Takes colours and carriage returns out.
pub fn strip_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // CSI: ends with a letter or one of @[\]^_`{|}~
                Some('[') => while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                // OSC: ends with BEL (or ESC \).
                Some(']') => while chars.next().is_some_and(|c| c != '\u{7}' && c != '\\') {},
                _ => {}
            },
            '\r' if chars.peek() == Some(&'\n') => {}
            '\r' => out.push('\n'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go_and_text_stays() {
        assert_eq!(
            strip_control("\u{1b}[1;39m[\u{1b}[0m\r\n\u{1b}]0;title\u{7}x\u{1b}[K"),
            "[\nx"
        );
    }
}
