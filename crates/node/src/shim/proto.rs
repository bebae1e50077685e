//! Messages between the node agent and a shim: JSON in the frames of `mantlet_net::fdpass`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use mantlet_net::caps::Caps;
use mantlet_net::process::Exit;
use serde::{Deserialize, Serialize};

use crate::rootfs::RootSpec;

/// A numbered request; the answer carries the same number.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the agent, never used twice on a socket.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What the agent can ask for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// Configure `eth0`, which the agent has just put into the pod.
    Network {
        /// The pod's address.
        address: Ipv4Addr,
    },
    /// Start a container. Descriptor 0, when present, becomes its standard input.
    Start(Box<ContainerSpec>),
    /// Run a command in a running container. Descriptors: with `tty` none (the answer brings the terminal), else three
    /// for standard input, output and error.
    Exec(Box<ExecSpec>),
    /// Connect to a port of the pod's loopback address; the answer brings the socket.
    Connect {
        /// TCP port.
        port: u16,
    },
    /// Send a signal.
    Signal {
        /// A container or exec id.
        id: String,
        /// Signal number.
        signal: i32,
        /// To every process of the container, not only its first.
        all: bool,
    },
}

/// A container to start.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Unique within the pod, also over restarts.
    pub id: String,
    /// Its root directory.
    pub root: RootSpec,
    /// Program and arguments; the program is searched in `PATH` of `env`.
    pub argv: Vec<String>,
    /// Whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Who it runs as.
    pub identity: Identity,
    /// Has a terminal.
    pub tty: bool,
    /// Where its output goes.
    pub log: PathBuf,
    /// For the kernel's choice when memory runs out: -1000 to 1000.
    pub oom_score_adj: i32,
}

/// User, groups and privileges.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Bounding set; also permitted and effective for uid 0.
    pub caps: Caps,
    /// Set-user-id programs do not count.
    pub no_new_privs: bool,
    /// With the system call filter.
    pub seccomp: bool,
}

/// A command in a running container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Id of this session.
    pub id: String,
    /// The container's id.
    pub container: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// With a terminal.
    pub tty: bool,
}

/// From the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The pod's namespaces are there. Its pid, in the namespace of the agent.
    Ready {
        /// Pid of the shim's init.
        pid: i32,
    },
    /// The answer to a request. For terminals, the frame brings the master descriptor.
    Reply {
        /// The request's number.
        id: u64,
        /// Done, or why not.
        result: Result<(), StartError>,
    },
    /// A container's first process or a session's command has ended, and all its output is written.
    Exited {
        /// Container or exec id.
        id: String,
        /// How.
        exit: Exit,
    },
}

/// Why something was not done.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum StartError {
    /// The program does not exist in the container.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotFound(String),
    /// The program exists but cannot be run.
    #[error("exec: {0:?}: permission denied")]
    NotExecutable(String),
    /// A step before the program failed.
    #[error("{0}")]
    Setup(String),
    /// No such container, or it has ended.
    #[error("container {0} is not running")]
    NotRunning(String),
}
