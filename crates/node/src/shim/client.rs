//! The agent's side of a shim: starts it, sends requests, hands out answers and ends.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use mantlet_net::fdpass::{self, FrameReader, Read};
use mantlet_net::process::Exit;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::proto::{Call, ContainerSpec, ExecSpec, Message, Request, StartError};

/// Errors of talking to a shim.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The shim refused or failed.
    #[error(transparent)]
    Refused(#[from] StartError),
    /// The shim is gone, and with it all processes of the pod.
    #[error("the pod's shim has ended")]
    Gone,
    /// It could not be started.
    #[error("starting the pod's shim {program}: {reason}")]
    Start {
        /// The binary.
        program: PathBuf,
        /// Why, with the shim's own message where there is one.
        reason: String,
    },
    /// A system call failed.
    #[error("talking to the pod's shim: {0}")]
    Io(#[from] io::Error),
}

/// News from a shim.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A container or session has ended.
    Exited {
        /// Its id.
        id: String,
        /// How.
        exit: Exit,
    },
    /// The shim itself has ended.
    Gone,
}

type Answer = (Result<(), StartError>, Option<OwnedFd>);

#[derive(Default)]
struct State {
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    sessions: HashMap<String, oneshot::Sender<Exit>>,
    next: u64,
    gone: bool,
}

/// A running shim. Dropping the last clone closes the socket, which ends the pod.
#[derive(Clone)]
pub struct Shim {
    inner: Arc<Inner>,
}

struct Inner {
    pid: i32,
    socket: Arc<UnixStream>,
    state: Arc<Mutex<State>>,
    /// One frame at a time; the socket is written blocking, for a frame fits its buffer in all but odd cases.
    writing: tokio::sync::Mutex<()>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("pid", &self.inner.pid)
            .finish_non_exhaustive()
    }
}

/// The answer to an exec request.
#[derive(Debug)]
pub struct Session {
    /// The terminal's master, when one was asked for.
    pub terminal: Option<OwnedFd>,
    /// Resolves when the command has ended; an error when the shim is gone.
    pub exit: oneshot::Receiver<Exit>,
}

impl Shim {
    /// Starts a shim with `program` (a binary that calls `shim_main`); its own messages go to `log`. News of containers
    /// comes on the returned channel.
    ///
    /// # Errors
    /// [`ShimError::Start`].
    pub async fn start(
        program: &Path,
        hostname: &str,
        log: &Path,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Event>), ShimError> {
        let failed = |reason: String| ShimError::Start {
            program: program.to_owned(),
            reason,
        };
        let (ours, theirs) = fdpass::socket_pair()?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(io::Error::from)?;
        let log_file = std::fs::File::create(log).map_err(|error| failed(format!("{}: {error}", log.display())))?;
        let mut child = tokio::process::Command::new(program)
            .arg(super::SUBCOMMAND)
            .arg(hostname)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log_file))
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        // It ends as soon as its own child, the pod's init, is there.
        let status = child.wait().await?;
        let socket = Arc::new(UnixStream::from_std(std::os::unix::net::UnixStream::from(ours))?);
        let mut frames = FrameReader::default();
        let pid = match next_message(&socket, &mut frames).await? {
            Some((Message::Ready { pid }, _)) if status.success() => pid,
            _ => {
                let text = std::fs::read_to_string(log).unwrap_or_default();
                return Err(failed(format!("{status}: {}", text.trim())));
            }
        };
        let (events, receiver) = mpsc::unbounded_channel();
        let state = Arc::new(Mutex::new(State::default()));
        let reader = tokio::spawn(read_loop(Arc::clone(&socket), frames, Arc::clone(&state), events));
        let inner = Inner {
            pid,
            socket,
            state,
            writing: tokio::sync::Mutex::new(()),
            reader,
        };
        Ok((Self { inner: Arc::new(inner) }, receiver))
    }

    /// Process id of the pod's init, as this process sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.inner.pid
    }

    /// Configures the pod's side of its network.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn network(&self, address: Ipv4Addr) -> Result<(), ShimError> {
        self.call(Call::Network { address }, &[]).await.map(|_| ())
    }

    /// Starts a container; returns when its program runs. For a container with a terminal the master is returned.
    ///
    /// # Errors
    /// [`ShimError::Refused`] when it could not be started.
    pub async fn start_container(
        &self,
        spec: ContainerSpec,
        stdin: Option<OwnedFd>,
    ) -> Result<Option<OwnedFd>, ShimError> {
        let fds: Vec<BorrowedFd<'_>> = stdin.iter().map(|fd| fd.as_fd()).collect();
        self.call(Call::Start(Box::new(spec)), &fds).await
    }

    /// Runs a command in a container; `streams` are its standard input, output and error unless it has a terminal.
    ///
    /// # Errors
    /// [`ShimError::Refused`] when it could not be started.
    pub async fn exec(&self, spec: ExecSpec, streams: Option<[OwnedFd; 3]>) -> Result<Session, ShimError> {
        let (sender, exit) = oneshot::channel();
        let id = spec.id.clone();
        self.lock().sessions.insert(id.clone(), sender);
        let fds: Vec<BorrowedFd<'_>> = streams.iter().flatten().map(|fd| fd.as_fd()).collect();
        match self.call(Call::Exec(Box::new(spec)), &fds).await {
            Ok(terminal) => Ok(Session { terminal, exit }),
            Err(error) => {
                self.lock().sessions.remove(&id);
                Err(error)
            }
        }
    }

    /// A TCP connection to a port on the pod's loopback address.
    ///
    /// # Errors
    /// [`ShimError::Refused`] with the reason when nothing listens there.
    pub async fn connect(&self, port: u16) -> Result<OwnedFd, ShimError> {
        let socket = self.call(Call::Connect { port }, &[]).await?;
        socket.ok_or_else(|| ShimError::Io(io::Error::other("the shim sent no socket")))
    }

    /// Signals a container or session.
    ///
    /// # Errors
    /// [`ShimError::Refused`] when it is not running.
    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), ShimError> {
        self.call(
            Call::Signal {
                id: id.to_owned(),
                signal,
                all,
            },
            &[],
        )
        .await
        .map(|_| ())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Option<OwnedFd>, ShimError> {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut state = self.lock();
            if state.gone {
                return Err(ShimError::Gone);
            }
            state.next += 1;
            let id = state.next;
            state.pending.insert(id, sender);
            id
        };
        let body = serde_json::to_vec(&Request { id, call }).map_err(io::Error::from)?;
        let sent = {
            let _turn = self.inner.writing.lock().await;
            fdpass::send_frame(self.inner.socket.as_ref(), &body, fds)
        };
        if let Err(error) = sent {
            self.lock().pending.remove(&id);
            return Err(if error.kind() == io::ErrorKind::BrokenPipe {
                ShimError::Gone
            } else {
                error.into()
            });
        }
        let (result, fd) = receiver.await.map_err(|_| ShimError::Gone)?;
        result?;
        Ok(fd)
    }
}

async fn next_message(
    socket: &UnixStream,
    frames: &mut FrameReader,
) -> Result<Option<(Message, Option<OwnedFd>)>, ShimError> {
    loop {
        socket.readable().await?;
        let read = socket.try_io(Interest::READABLE, || match frames.read(socket)? {
            Read::Pending => Err(io::ErrorKind::WouldBlock.into()),
            other => Ok(other),
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
            Ok(Read::Closed | Read::Pending) => return Ok(None),
            Ok(Read::Frame(mut frame)) => {
                let message = serde_json::from_slice(&frame.body).map_err(io::Error::from)?;
                return Ok(Some((message, frame.fds.pop())));
            }
        }
    }
}

async fn read_loop(
    socket: Arc<UnixStream>,
    mut frames: FrameReader,
    state: Arc<Mutex<State>>,
    events: mpsc::UnboundedSender<Event>,
) {
    let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match next_message(&socket, &mut frames).await {
            Ok(Some((Message::Reply { id, result }, fd))) => {
                if let Some(waiter) = lock().pending.remove(&id) {
                    let _ = waiter.send((result, fd));
                }
            }
            Ok(Some((Message::Exited { id, exit }, _))) => {
                let session = lock().sessions.remove(&id);
                match session {
                    Some(waiter) => drop(waiter.send(exit)),
                    None => drop(events.send(Event::Exited { id, exit })),
                }
            }
            Ok(Some((Message::Ready { .. }, _))) => {}
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "a pod's shim sends nonsense; its pod is ended");
                break;
            }
        }
    }
    let mut state = lock();
    state.gone = true;
    state.pending.clear();
    state.sessions.clear();
    let _ = events.send(Event::Gone);
}
