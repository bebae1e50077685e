//! Messages between broker and cluster process, and between the command line and the broker.

use std::net::SocketAddrV4;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// From the cluster process to the broker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToBroker {
    /// Open a listening socket on the host; loopback addresses only.
    Listen {
        /// Repeated in the answer.
        id: u64,
        /// Where.
        address: SocketAddrV4,
    },
    /// The cluster is up: API served, node ready.
    Ready,
    /// It cannot come up; the process ends after this.
    Failed {
        /// Why, and what to do.
        reason: String,
    },
}

/// From the broker to the cluster process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromBroker {
    /// The API's listener on the host comes with this message.
    Api,
    /// Answer to [`ToBroker::Listen`]; the listener comes with it unless there is an error.
    Listening {
        /// From the request.
        id: u64,
        /// `errno` of the failure.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<i32>,
    },
    /// End in an orderly way.
    Stop,
}

/// How the broker is started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// The cluster's name.
    pub name: String,
    /// Its state directory.
    pub dir: PathBuf,
    /// Port of the API, whose listener is the broker's standard input.
    pub port: u16,
}

/// One line from the broker to `up`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// The cluster is up.
    Ready,
    /// It is not, and will not be.
    Failed(String),
}

/// One line from the command line to the broker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you?
    Status,
    /// End the cluster; the connection closes when that is done.
    Stop,
}

/// The broker's answer to [`Request::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The cluster's name.
    pub name: String,
    /// Port of the API on 127.0.0.1.
    pub port: u16,
    /// Process id of the broker.
    pub broker_pid: u32,
    /// Process id of the sandbox, whose end ends everything inside.
    pub sandbox_pid: u32,
    /// API served and node ready.
    pub ready: bool,
    /// Seconds since the start.
    pub uptime_seconds: u64,
}
