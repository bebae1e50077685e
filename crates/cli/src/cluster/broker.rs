//! The broker: stays in the host's network namespace, starts the cluster's sandbox and opens what the host must reach.
//!
//! Re-executed by `up` as `mantlet cluster-broker JSON`, with the API's listener as standard input and a pipe to `up` as
//! standard output. It ends with the cluster, and the cluster ends with it. Blocking code in a few threads; it knows
//! nothing of Kubernetes.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mantlet_net::fdpass::{FrameReader, Read as FrameRead, send_frame};
use mantlet_net::sockopt::{ListenOptions, listen_tcp};
use mantlet_node::sandbox::{self, SandboxConfig};

use super::paths::Paths;
use super::protocol::{FromBroker, Progress, Request, Start, Status, ToBroker};

/// The hidden word that leads here.
pub const SUBCOMMAND: &str = "cluster-broker";
/// How long the cluster process may take to end by itself.
const GRACE: Duration = Duration::from_secs(20);
/// Listeners that one cluster may hold on the host.
const MAX_LISTENERS: usize = 1024;

struct Broker {
    start: Start,
    sandbox_pid: u32,
    channel: OwnedFd,
    sending: Mutex<()>,
    ready: AtomicBool,
    stopping: AtomicBool,
    failure: Mutex<Option<String>>,
    begin: Instant,
}

/// Entry point of the re-execution.
pub fn main(args: &[String]) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mantlet: broker: {error:#}");
            report(&Progress::Failed(format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn report(progress: &Progress) {
    if let Ok(mut line) = serde_json::to_string(progress) {
        line.push('\n');
        let mut stdout = std::io::stdout().lock();
        // `up` may have been interrupted; the cluster does not depend on it.
        let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
    }
}

fn serve(args: &[String]) -> Result<()> {
    let [json] = args else { bail!("expected one argument") };
    let start: Start = serde_json::from_str(json).context("bad argument")?;
    let paths = Paths {
        name: start.name.clone(),
        dir: start.dir.clone(),
    };
    // Away from the terminal: closing it or pressing Ctrl-C there must not end the cluster.
    nix::unistd::setsid().context("setsid")?;
    let _lock = take_lock(&paths)?;
    let api = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("the API's listener")?;
    let socket = paths.broker_socket();
    // Holding the lock, a socket that is there is a leftover.
    let _ = std::fs::remove_file(&socket);
    let control = UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    restrict(&socket)?;

    let (ours, theirs) = mantlet_net::fdpass::socket_pair().context("socket pair")?;
    let program = std::env::current_exe().context("the running program")?;
    let bin_dir = program.parent().context("the running program's directory")?.to_owned();
    let config = SandboxConfig {
        state_dir: start.dir.clone(),
        program: program.clone(),
        args: vec![super::process::SUBCOMMAND.to_owned(), json.clone()],
        read_only_dirs: vec![bin_dir],
    };
    let log = std::io::stderr().as_fd().try_clone_to_owned().context("the log")?;
    let mut child = sandbox::command(&program, &config)?
        .env("PATH", super::preflight::search_path())
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::from(log))
        .spawn()
        .context("starting the sandbox")?;
    send_frame(&ours, &serde_json::to_vec(&FromBroker::Api)?, &[api.as_fd()]).context("passing the API's listener")?;
    drop(api);

    let broker = Arc::new(Broker {
        start,
        sandbox_pid: child.id(),
        channel: ours,
        sending: Mutex::new(()),
        ready: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        failure: Mutex::new(None),
        begin: Instant::now(),
    });
    let requests = std::thread::spawn({
        let broker = broker.clone();
        move || {
            if let Err(error) = broker.serve_cluster() {
                eprintln!("mantlet: broker: {error:#}");
            }
        }
    });
    std::thread::spawn({
        let broker = broker.clone();
        move || broker.serve_control(&control)
    });
    let exit = child.wait().context("waiting for the sandbox")?;
    // What the cluster process has said before its end is read to the end.
    let _ = requests.join();
    let _ = std::fs::remove_file(&socket);
    if broker.stopping.load(Ordering::SeqCst) {
        return Ok(());
    }
    let failure = broker.failure.lock().ok().and_then(|mut failure| failure.take());
    match failure {
        Some(reason) => bail!(reason),
        None => bail!(
            "the cluster process ended unexpectedly ({exit}); see {}",
            paths.log().display()
        ),
    }
}

fn take_lock(paths: &Paths) -> Result<OwnedFd> {
    let path = paths.lock();
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!("cluster {:?} is running or just starting", paths.name),
        Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

fn restrict(path: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("{}", path.display()))
}

impl Broker {
    /// Reads the cluster process's messages until it ends.
    fn serve_cluster(&self) -> Result<()> {
        let mut reader = FrameReader::default();
        let mut opened: HashSet<SocketAddrV4> = HashSet::new();
        loop {
            let frame = match reader.read(&self.channel).context("reading from the cluster process")? {
                FrameRead::Frame(frame) => frame,
                FrameRead::Pending => continue,
                FrameRead::Closed => return Ok(()),
            };
            match serde_json::from_slice(&frame.body).context("a message of the cluster process")? {
                ToBroker::Listen { id, address } => {
                    let listener = if opened.len() >= MAX_LISTENERS && !opened.contains(&address) {
                        Err(std::io::Error::from_raw_os_error(
                            rustix::io::Errno::MFILE.raw_os_error(),
                        ))
                    } else {
                        listen(address)
                    };
                    match listener {
                        Ok(listener) => {
                            opened.insert(address);
                            self.send(&FromBroker::Listening { id, error: None }, Some(&listener))?;
                        }
                        Err(error) => {
                            let code = error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error());
                            self.send(&FromBroker::Listening { id, error: Some(code) }, None)?;
                        }
                    }
                }
                ToBroker::Ready => {
                    self.ready.store(true, Ordering::SeqCst);
                    report(&Progress::Ready);
                }
                ToBroker::Failed { reason } => {
                    if let Ok(mut failure) = self.failure.lock() {
                        *failure = Some(reason);
                    }
                }
            }
        }
    }

    fn send(&self, message: &FromBroker, listener: Option<&TcpListener>) -> Result<()> {
        let body = serde_json::to_vec(message)?;
        let fds: Vec<_> = listener.iter().map(|listener| listener.as_fd()).collect();
        let _guard = self.sending.lock();
        send_frame(&self.channel, &body, &fds).context("writing to the cluster process")
    }

    fn serve_control(&self, control: &UnixListener) {
        for stream in control.incoming() {
            // One at a time: callers are commands of this user, each asks one thing.
            match stream {
                Ok(stream) => {
                    if let Err(error) = self.answer(&stream) {
                        eprintln!("mantlet: broker: control: {error:#}");
                    }
                }
                Err(error) => {
                    eprintln!("mantlet: broker: control: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn answer(&self, stream: &UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut line = String::new();
        BufReader::new(stream.take(1 << 12)).read_line(&mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        match serde_json::from_str(&line)? {
            Request::Status => {
                let status = Status {
                    name: self.start.name.clone(),
                    port: self.start.port,
                    broker_pid: std::process::id(),
                    sandbox_pid: self.sandbox_pid,
                    ready: self.ready.load(Ordering::SeqCst),
                    uptime_seconds: self.begin.elapsed().as_secs(),
                };
                let mut text = serde_json::to_string(&status)?;
                text.push('\n');
                let mut writer = stream;
                writer.write_all(text.as_bytes())?;
                Ok(())
            }
            Request::Stop => {
                self.stopping.store(true, Ordering::SeqCst);
                self.send(&FromBroker::Stop, None)?;
                // The main thread ends the process with the sandbox, which closes this connection; here only for the case
                // that the sandbox does not end.
                std::thread::sleep(GRACE);
                let pid = i32::try_from(self.sandbox_pid)
                    .ok()
                    .and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
                }
                Ok(())
            }
        }
    }
}

/// A listening socket, on loopback addresses only: a cluster must not open the host to the network.
fn listen(address: SocketAddrV4) -> std::io::Result<TcpListener> {
    if !address.ip().is_loopback() {
        return Err(std::io::Error::from_raw_os_error(
            rustix::io::Errno::ADDRNOTAVAIL.raw_os_error(),
        ));
    }
    listen_tcp(SocketAddr::V4(address), ListenOptions::default())
}
