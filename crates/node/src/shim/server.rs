//! The shim's process: namespaces first, then one poll loop over requests, child states and outputs.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use mantlet_net::fdpass::{self, FrameReader, Read};
use mantlet_net::process::{self, Exit, Fork};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::container::{self, Status, Streams};
use super::logs::{LineWriter, LogFile, Stream};
use super::proto::{Call, ContainerSpec, ExecSpec, Message, Request, StartError};
use crate::podnet;
use crate::sandbox::{self, SandboxError, Step};

/// Containers and sessions of one pod at a time; above, starting is refused.
const MAX_PROCESSES: usize = 1024;

/// Entry point of the re-executed shim. `args`: the pod's host name. Standard input is the socket to the agent, standard
/// error the shim's own log. Must be called from a process with a single thread.
pub fn shim_main(args: &[String]) -> ExitCode {
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "shim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &[String]) -> Result<(), SandboxError> {
    let [hostname] = args else {
        return Err(SandboxError::Arguments(format!(
            "shim: expected the host name, got {args:?}"
        )));
    };
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).step("duplicating the control socket")?;
    let null: OwnedFd = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .step("opening /dev/null")?
        .into();
    rustix::stdio::dup2_stdin(&null).step("closing standard input")?;
    rustix::stdio::dup2_stdout(&null).step("closing standard output")?;
    process::close_on_exec_from(3).step("marking descriptors")?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().step("blocking signals")?;
    nix::sched::unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS,
    )
    .step("making the pod's namespaces")?;
    match process::fork().step("fork")? {
        Fork::Parent(pid) => send(&control, &Message::Ready { pid }, None).step("telling the agent"),
        Fork::Child => {
            set_up_namespaces(hostname)?;
            let signals =
                SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).step("signalfd")?;
            rustix::io::ioctl_fionbio(&control, true).step("making the socket non-blocking")?;
            Server {
                control,
                signals,
                reader: FrameReader::default(),
                tasks: BTreeMap::new(),
            }
            .run()
        }
    }
}

fn set_up_namespaces(hostname: &str) -> Result<(), SandboxError> {
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .step("making mounts private")?;
    sandbox::mount(
        "proc",
        Path::new("/proc"),
        "proc",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        "",
    )?;
    nix::unistd::sethostname(hostname).step("setting the host name")?;
    for (name, value) in [
        // Until IPv6 is captured like IPv4, it must not exist in a pod: it would be a way around the mesh.
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
        ("net/ipv4/ip_unprivileged_port_start", "0"),
        ("net/ipv4/ping_group_range", "0 65535"),
    ] {
        let path = format!("/proc/sys/{name}");
        match std::fs::write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.step(format!("writing {path}"))?,
        }
    }
    Ok(())
}

fn send(control: &OwnedFd, message: &Message, fd: Option<&OwnedFd>) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
    fdpass::send_frame(control, &body, &fds)
}

/// One output of a container on its way to the log.
struct Output {
    fd: OwnedFd,
    lines: LineWriter,
    /// A prompt has no newline and must be seen at once.
    terminal: bool,
}

/// What a container has beyond a plain command.
struct ContainerPart {
    spec: ContainerSpec,
    namespace: Option<OwnedFd>,
    log: LogFile,
    outputs: Vec<Output>,
}

/// A container or an exec session.
struct Task {
    pid: i32,
    /// Until the program runs: the request to answer, the socket of its state, the terminal.
    starting: Option<Starting>,
    container: Option<ContainerPart>,
}

struct Starting {
    request: u64,
    socket: OwnedFd,
    reader: FrameReader,
    terminal: Option<OwnedFd>,
    failure: Option<StartError>,
}

struct Server {
    control: OwnedFd,
    signals: SignalFd,
    reader: FrameReader,
    tasks: BTreeMap<String, Task>,
}

/// What a polled descriptor belongs to.
enum Source {
    Control,
    Signals,
    Status(String),
    Output(String, usize),
}

impl Server {
    fn run(mut self) -> Result<(), SandboxError> {
        loop {
            let ready = self.wait().step("poll")?;
            for source in ready {
                match source {
                    Source::Control => {
                        if !self.read_requests().step("reading a request")? {
                            return Ok(());
                        }
                    }
                    Source::Signals => {
                        while self.signals.read_signal().step("reading signals")?.is_some() {}
                        self.reap().step("collecting children")?;
                    }
                    Source::Status(id) => self.read_status(&id).step("answering the agent")?,
                    Source::Output(id, index) => self.read_output(&id, index),
                }
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let mut sources = vec![Source::Control, Source::Signals];
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        for (id, task) in &self.tasks {
            if let Some(starting) = &task.starting {
                sources.push(Source::Status(id.clone()));
                fds.push(PollFd::from_borrowed_fd(starting.socket.as_fd(), PollFlags::IN));
            }
            for (index, output) in task.container.iter().flat_map(|c| c.outputs.iter().enumerate()) {
                sources.push(Source::Output(id.clone(), index));
                fds.push(PollFd::from_borrowed_fd(output.fd.as_fd(), PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let hit: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        // Outputs from the back, so that removing one does not move those still to come.
        let mut ready: Vec<_> = sources
            .into_iter()
            .zip(hit)
            .filter(|(_, hit)| *hit)
            .map(|(source, _)| source)
            .collect();
        ready.reverse();
        Ok(ready)
    }

    /// False when the agent is gone.
    fn read_requests(&mut self) -> io::Result<bool> {
        loop {
            match self.reader.read(&self.control)? {
                Read::Closed => return Ok(false),
                Read::Pending => return Ok(true),
                Read::Frame(frame) => {
                    let request: Request = serde_json::from_slice(&frame.body)?;
                    self.handle(request, frame.fds)?;
                }
            }
        }
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> io::Result<()> {
        let id = request.id;
        let result = match request.call {
            Call::Network { address } => {
                podnet::configure_pod(address).map_err(|error| StartError::Setup(error.to_string()))
            }
            Call::Connect { port } => {
                // Loopback answers at once, so waiting for it does not hold up the loop.
                let address = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                match std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                    Ok(stream) => {
                        let socket = OwnedFd::from(stream);
                        return send(&self.control, &Message::Reply { id, result: Ok(()) }, Some(&socket));
                    }
                    Err(error) => Err(StartError::Setup(format!("dial tcp4 {address}: {error}"))),
                }
            }
            Call::Signal { id, signal, all } => self.signal(&id, signal, all),
            Call::Start(spec) => match self.start_container(id, *spec, fds) {
                // The answer comes when the program runs.
                Ok(()) => return Ok(()),
                Err(error) => Err(StartError::Setup(format!("starting a container: {error}"))),
            },
            Call::Exec(spec) => match self.start_exec(id, &spec, fds) {
                Ok(()) => return Ok(()),
                Err(error) => Err(error),
            },
        };
        send(&self.control, &Message::Reply { id, result }, None)
    }

    fn start_container(&mut self, request: u64, spec: ContainerSpec, mut fds: Vec<OwnedFd>) -> io::Result<()> {
        if self.tasks.len() >= MAX_PROCESSES || self.tasks.contains_key(&spec.id) {
            return Err(io::Error::other("too many processes, or the id is in use"));
        }
        let log = LogFile::open(&spec.log)?;
        let (status, theirs) = fdpass::socket_pair()?;
        rustix::io::ioctl_fionbio(&status, true)?;
        let mut outputs = Vec::new();
        let streams = if spec.tty {
            Streams::Terminal
        } else {
            let mut make = |stream| -> io::Result<OwnedFd> {
                let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
                rustix::io::ioctl_fionbio(&read, true)?;
                outputs.push(Output {
                    fd: read,
                    lines: LineWriter::new(stream),
                    terminal: false,
                });
                Ok(write)
            };
            let (stdout, stderr) = (make(Stream::Stdout)?, make(Stream::Stderr)?);
            let stdin = match fds.pop() {
                Some(fd) => fd,
                None => std::fs::File::open("/dev/null")?.into(),
            };
            Streams::Pipes(stdin, stdout, stderr)
        };
        let pid = match process::fork()? {
            Fork::Child => container::run_container(&spec, streams, &theirs),
            Fork::Parent(pid) => pid,
        };
        let starting = Starting {
            request,
            socket: status,
            reader: FrameReader::default(),
            terminal: None,
            failure: None,
        };
        let container = Some(ContainerPart {
            spec,
            namespace: None,
            log,
            outputs,
        });
        let id = container.as_ref().map(|c| c.spec.id.clone()).unwrap_or_default();
        self.tasks.insert(
            id,
            Task {
                pid,
                starting: Some(starting),
                container,
            },
        );
        Ok(())
    }

    fn start_exec(&mut self, request: u64, spec: &ExecSpec, fds: Vec<OwnedFd>) -> Result<(), StartError> {
        let setup = |error: io::Error| StartError::Setup(format!("starting a command: {error}"));
        let gone = || StartError::NotRunning(spec.container.clone());
        if self.tasks.len() >= MAX_PROCESSES || self.tasks.contains_key(&spec.id) {
            return Err(StartError::Setup("too many commands are running in this pod".into()));
        }
        let task = self
            .tasks
            .get(&spec.container)
            .filter(|task| task.starting.is_none())
            .ok_or_else(gone)?;
        let part = task.container.as_ref().ok_or_else(gone)?;
        let namespace = part.namespace.as_ref().ok_or_else(gone)?;
        let streams = match <[OwnedFd; 3]>::try_from(fds) {
            _ if spec.tty => Streams::Terminal,
            Ok([stdin, stdout, stderr]) => Streams::Pipes(stdin, stdout, stderr),
            Err(_) => return Err(StartError::Setup("an exec request needs three descriptors".into())),
        };
        let (status, theirs) = fdpass::socket_pair().map_err(setup)?;
        rustix::io::ioctl_fionbio(&status, true).map_err(|error| setup(error.into()))?;
        let pid = match process::fork().map_err(setup)? {
            Fork::Child => container::run_command(&part.spec, namespace, &spec.argv, streams, &theirs),
            Fork::Parent(pid) => pid,
        };
        let starting = Starting {
            request,
            socket: status,
            reader: FrameReader::default(),
            terminal: None,
            failure: None,
        };
        self.tasks.insert(
            spec.id.clone(),
            Task {
                pid,
                starting: Some(starting),
                container: None,
            },
        );
        Ok(())
    }

    fn signal(&mut self, id: &str, signal: i32, all: bool) -> Result<(), StartError> {
        let task = self
            .tasks
            .get(id)
            .ok_or_else(|| StartError::NotRunning(id.to_owned()))?;
        let signal = Signal::try_from(signal).map_err(|_| StartError::Setup(format!("no signal {signal}")))?;
        match (&task.container, all) {
            (
                Some(ContainerPart {
                    namespace: Some(namespace),
                    ..
                }),
                true,
            ) => signal_all(namespace, signal),
            _ => {
                // ESRCH: it has ended, which will be reported.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(task.pid), signal);
            }
        }
        Ok(())
    }

    /// Takes in what a starting child says; its silence at the end means that the program runs.
    fn read_status(&mut self, id: &str) -> io::Result<()> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Ok(());
        };
        let Some(starting) = &mut task.starting else {
            return Ok(());
        };
        loop {
            match starting.reader.read(&starting.socket)? {
                Read::Pending => return Ok(()),
                Read::Closed => break,
                Read::Frame(mut frame) => match serde_json::from_slice(&frame.body)? {
                    Status::MountNamespace => {
                        if let Some(part) = &mut task.container {
                            part.namespace = frame.fds.pop();
                        }
                    }
                    Status::Terminal => starting.terminal = frame.fds.pop(),
                    Status::Failed(error) => starting.failure = Some(error),
                },
            }
        }
        let Some(starting) = task.starting.take() else {
            return Ok(());
        };
        let result = starting.failure.map_or(Ok(()), Err);
        let mut terminal = starting.terminal;
        if let (Some(part), Some(master)) = (&mut task.container, &terminal) {
            let copy = master.try_clone()?;
            rustix::io::ioctl_fionbio(&copy, true)?;
            part.outputs.push(Output {
                fd: copy,
                lines: LineWriter::new(Stream::Stdout),
                terminal: true,
            });
        }
        if result.is_err() {
            terminal = None;
        }
        send(
            &self.control,
            &Message::Reply {
                id: starting.request,
                result,
            },
            terminal.as_ref(),
        )
    }

    fn read_output(&mut self, id: &str, index: usize) {
        let Some(part) = self.tasks.get_mut(id).and_then(|task| task.container.as_mut()) else {
            return;
        };
        let Some(output) = part.outputs.get_mut(index) else {
            return;
        };
        if !drain(output, &mut part.log, 1) {
            part.outputs.remove(index);
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        while let Some((pid, exit)) = process::reap()? {
            let found = self
                .tasks
                .iter()
                .find(|(_, task)| task.pid == pid)
                .map(|(id, _)| id.clone());
            if let Some(id) = found {
                self.ended(&id, exit)?;
            }
        }
        Ok(())
    }

    fn ended(&mut self, id: &str, exit: Exit) -> io::Result<()> {
        // An answer that is still due comes before the news of the end.
        self.read_status(id)?;
        let Some(mut task) = self.tasks.remove(id) else {
            return Ok(());
        };
        if let Some(part) = &mut task.container {
            if let Some(namespace) = &part.namespace {
                signal_all(namespace, Signal::SIGKILL);
            }
            for output in &mut part.outputs {
                drain(output, &mut part.log, usize::MAX);
                if let Err(error) = output.lines.finish(&mut part.log) {
                    let _ = writeln!(io::stderr(), "shim: log of {id}: {error}");
                }
            }
        }
        send(
            &self.control,
            &Message::Exited {
                id: id.to_owned(),
                exit,
            },
            None,
        )
    }
}

/// Moves what is there to the log, at most `rounds` buffers; false at the end of the output. An unwritable log loses lines,
/// it does not stop the container.
fn drain(output: &mut Output, log: &mut LogFile, rounds: usize) -> bool {
    let mut buffer = [0u8; 16 << 10];
    for _ in 0..rounds {
        match rustix::io::read(&output.fd, &mut buffer[..]) {
            Ok(0) => {
                let _ = output.lines.finish(log);
                return false;
            }
            Ok(count) => {
                let mut written = output.lines.push(log, &buffer[..count]);
                if output.terminal {
                    written = written.and_then(|()| output.lines.finish(log));
                }
                if let Err(error) = written {
                    let _ = writeln!(io::stderr(), "shim: writing a log: {error}");
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
            // EIO: nobody holds the terminal's other side any more.
            Err(_) => {
                let _ = output.lines.finish(log);
                return false;
            }
        }
    }
    true
}

/// Signals every process in a container's mount namespace; for SIGKILL until none is left, so that none escapes by
/// forking meanwhile.
fn signal_all(namespace: &OwnedFd, signal: Signal) {
    let Ok(wanted) = rustix::fs::fstat(namespace).map(|stat| stat.st_ino) else {
        return;
    };
    let own = rustix::process::getpid().as_raw_nonzero().get();
    for _ in 0..100 {
        let mut found = false;
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let same = std::fs::metadata(format!("/proc/{pid}/ns/mnt")).is_ok_and(|m| m.ino() == wanted);
            if same && pid != own {
                found = true;
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
            }
        }
        if !found || signal != Signal::SIGKILL {
            return;
        }
        std::thread::yield_now();
    }
}
