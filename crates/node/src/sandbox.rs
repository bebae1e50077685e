//! The cluster's own user, mount, network, PID, IPC and UTS namespaces.
//!
//! The `cluster` command starts [`command`] from the host side; that re-executes the binary, which must call
//! [`sandbox_main`] before any runtime or thread exists. Nothing of the host is changed: no sysctl, route, firewall rule
//! or mount outside the new namespaces. Inside, a small init (pid 1) runs the cluster's program, reaps what is left to it
//! and ends with it, whereupon the kernel ends every pod.
//!
//! ```text
//! launcher (host namespaces, writes the id maps) ─► init (pid 1 inside) ─► program (the cluster process)
//! ```
//!
//! Ids are mapped away from the host's: root inside is no root outside, also when root starts the cluster, so a file that
//! only the host's root may read stays closed even to a pod that breaks out of its root directory. (Root of a container that has
//! but one range of ids is an exception: it is root inside too, and no more on the host than it was.)

mod init;

pub(crate) use init::{DEVICES, SYSTEM_DIRS, bind_system_dir, make_dir, mount, mount_tmpfs, pivot, run_with_input};
pub use init::{HAIRPIN_TABLE, NODE_ADDRESS, SERVICE_RANGE};

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use mantlet_net::process::{self, Fork};
use mantlet_net::userns::{IdMap, MapError};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::{Deserialize, Serialize};

/// The word after the program name that leads to [`sandbox_main`].
pub const SUBCOMMAND: &str = "sandbox";

/// What the sandbox holds and runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// The cluster's state, the only writable directory of the host inside; the same path inside and outside.
    pub state_dir: PathBuf,
    /// The program to run inside, absolute.
    pub program: PathBuf,
    /// Its arguments without the program's name.
    pub args: Vec<String>,
    /// Directories visible read-only inside at the same path (where Mantlet's binaries are).
    pub read_only_dirs: Vec<PathBuf>,
}

/// Why the sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The arguments of the subcommand are wrong: a fault of the caller in this repository.
    #[error("sandbox: bad arguments: {0}")]
    Arguments(String),
    /// The user may not have a user namespace with enough ids.
    #[error(transparent)]
    IdMap(#[from] MapError),
    /// The kernel or a program refused a step.
    #[error("sandbox: {step}: {source}")]
    Step {
        /// What was being done.
        step: String,
        /// The error.
        source: std::io::Error,
    },
    /// A helper program failed.
    #[error("sandbox: {program} failed: {message}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Its output.
        message: String,
    },
}

/// Adds the step to an error.
pub(crate) trait Step<T> {
    /// Names what was being done.
    fn step(self, step: impl Into<String>) -> Result<T, SandboxError>;
}

impl<T, E: Into<std::io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, SandboxError> {
        self.map_err(|error| SandboxError::Step {
            step: step.into(),
            source: error.into(),
        })
    }
}

/// The command that starts the sandbox; the caller sets its standard streams (which the program inside inherits) and
/// spawns it. SIGTERM to it is passed on to the program; its exit code is the program's; when it is killed, everything
/// inside ends.
///
/// `launcher` is a binary that calls [`sandbox_main`] for `SUBCOMMAND`, normally the running one.
///
/// # Errors
/// [`SandboxError::Arguments`] when a path is not absolute or not UTF-8.
pub fn command(launcher: &Path, config: &SandboxConfig) -> Result<Command, SandboxError> {
    for path in [&config.state_dir, &config.program]
        .into_iter()
        .chain(&config.read_only_dirs)
    {
        if !path.is_absolute() {
            return Err(SandboxError::Arguments(format!(
                "{} is not an absolute path",
                path.display()
            )));
        }
    }
    let json = serde_json::to_string(config).map_err(|error| SandboxError::Arguments(error.to_string()))?;
    let mut command = Command::new(launcher);
    command.arg(SUBCOMMAND).arg(json);
    Ok(command)
}

/// Entry point of the re-executed launcher: `args` are those behind [`SUBCOMMAND`]. Must be called from a process with a
/// single thread.
pub fn sandbox_main(args: &[String]) -> ExitCode {
    match launch(args) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "mantlet: {error}");
            ExitCode::from(125)
        }
    }
}

fn launch(args: &[String]) -> Result<i32, SandboxError> {
    let [json] = args else {
        return Err(SandboxError::Arguments(format!(
            "expected one JSON object, got {} arguments",
            args.len()
        )));
    };
    let config: SandboxConfig =
        serde_json::from_str(json).map_err(|error| SandboxError::Arguments(error.to_string()))?;
    let map = choose_map(&config)?;
    if let IdMap::Shifted { base } = map {
        give_to(&config.state_dir, base).step(format!("handing {} over", config.state_dir.display()))?;
    }
    // Detached here, because inside root's user namespace a directory such as /root cannot be passed through.
    let mut dirs = Vec::new();
    for dir in &config.read_only_dirs {
        dirs.push((dir.clone(), detach(dir)?, true));
    }
    dirs.push((config.state_dir.clone(), detach(&config.state_dir)?, false));
    dirs.sort_by(|a, b| a.0.cmp(&b.0));

    let signals = signal_fd()?;
    let own_pid = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own_pid)).step("becoming a subreaper")?;
    // The init polls one end; the other lives as long as this process, however it ends.
    let (lifeline_inside, lifeline) = mantlet_net::fdpass::socket_pair().step("socket pair")?;
    let (theirs, ours) = mantlet_net::fdpass::socket_pair().step("socket pair")?;

    match process::fork().step("fork")? {
        Fork::Child => {
            drop((ours, lifeline));
            let code = match inside(&config, &dirs, theirs, &lifeline_inside, signals) {
                Ok(code) => code,
                Err(error) => {
                    let _ = writeln!(std::io::stderr(), "mantlet: {error}");
                    125
                }
            };
            process::exit_now(code);
        }
        Fork::Parent(child) => {
            drop((theirs, lifeline_inside, dirs));
            let mut channel = std::fs::File::from(ours);
            let mut byte = [0u8; 1];
            if channel.read(&mut byte).step("waiting for the namespaces")? == 0 {
                return Ok(process::wait(child).step("waiting for the child")?.code);
            }
            map.write(child)?;
            channel
                .write_all(b"m")
                .step("telling the child that its ids are mapped")?;
            // The intermediate process sends the init's pid and ends; the init becomes ours as the nearest subreaper.
            let mut text = String::new();
            channel
                .read_to_string(&mut text)
                .step("reading the init's process id")?;
            let exit = process::wait(child).step("waiting for the child")?;
            let Ok(init) = text.trim().parse::<i32>() else {
                return Ok(if exit.code == 0 { 125 } else { exit.code });
            };
            supervise(init, &signals)
        }
    }
}

/// Passes signals on and waits for the init's end.
fn supervise(init: i32, signals: &SignalFd) -> Result<i32, SandboxError> {
    loop {
        while let Some((pid, exit)) = process::reap().step("waiting for the init")? {
            if pid == init {
                return Ok(exit.code);
            }
        }
        let Some(info) = signals.read_signal().step("reading signals")? else {
            continue;
        };
        if info.ssi_signo != Signal::SIGCHLD as u32 {
            // ESRCH: it has just ended, which the next turn sees.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), Signal::SIGTERM);
        }
    }
}

/// The forked child: makes the namespaces, waits for its maps, then forks the init of the new PID namespace.
fn inside(
    config: &SandboxConfig,
    dirs: &[(PathBuf, Option<OwnedFd>, bool)],
    channel: OwnedFd,
    lifeline: &OwnedFd,
    signals: SignalFd,
) -> Result<i32, SandboxError> {
    nix::sched::unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )
    .step("making namespaces (are user namespaces allowed? see /proc/sys/user/max_user_namespaces)")?;
    let mut channel = std::fs::File::from(channel);
    channel
        .write_all(b"u")
        .step("telling the launcher about the namespaces")?;
    let mut byte = [0u8; 1];
    if channel.read(&mut byte).step("waiting for the id maps")? == 0 {
        // The launcher has said why.
        return Ok(125);
    }
    let (uid, gid) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    nix::unistd::setgroups(&[]).step("setgroups")?;
    nix::unistd::setresgid(gid, gid, gid).step("setresgid")?;
    nix::unistd::setresuid(uid, uid, uid).step("setresuid")?;
    // What is made in here is for pods of any user; what is not says so itself. The caller may have another habit.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    match process::fork().step("fork")? {
        Fork::Parent(pid) => {
            channel
                .write_all(pid.to_string().as_bytes())
                .step("sending the init's process id")?;
            Ok(0)
        }
        Fork::Child => {
            drop(channel);
            init::run(config, dirs, lifeline.as_fd(), signals)
        }
    }
}

fn choose_map(config: &SandboxConfig) -> Result<IdMap, SandboxError> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Ok(IdMap::for_root(&config.state_dir)?);
    }
    let user = nix::unistd::User::from_uid(uid)
        .ok()
        .flatten()
        .map_or_else(|| uid.to_string(), |user| user.name);
    Ok(IdMap::for_user(uid.as_raw(), nix::unistd::getegid().as_raw(), &user)?)
}

/// A copy of the mount tree at `path` that is attached nowhere yet. Only root can make one; an ordinary user, who is root
/// inside the namespace, reaches the path from there.
fn detach(path: &Path) -> Result<Option<OwnedFd>, SandboxError> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    if !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    match open_tree(rustix::fs::CWD, path, flags) {
        // Root of a user namespace that has no mount namespace of its own.
        Err(rustix::io::Errno::PERM) => Ok(None),
        tree => tree.step(format!("opening {}", path.display())).map(Some),
    }
}

fn signal_fd() -> Result<SignalFd, SandboxError> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        mask.add(signal);
    }
    mask.thread_block().step("blocking signals")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC).step("signalfd")
}

/// Gives what the host's root owns below `dir` to the cluster's root. Never follows links, and leaves files of other
/// owners (those of the pods) alone.
fn give_to(dir: &Path, base: u32) -> std::io::Result<()> {
    let metadata = std::fs::symlink_metadata(dir)?;
    if metadata.uid() == 0 {
        std::os::unix::fs::lchown(dir, Some(base), Some(base))?;
    }
    if metadata.is_dir() {
        for entry in std::fs::read_dir(dir)? {
            give_to(&entry?.path(), base)?;
        }
    }
    Ok(())
}
