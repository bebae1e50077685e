//! `mantlet cluster`: the embedded single-machine cluster, started, stopped and looked at.
//!
//! ```text
//! up ─► broker (host's network namespace) ─► sandbox ─► cluster process (own namespaces)
//!        opens listeners on the host           │          API server, controllers, DNS, services, node agent
//!        answers status and stop               └ pods, shims
//! ```
//!
//! `main` calls [`run`]; the hidden re-executions `cluster-broker` and `cluster-process` lead to [`broker::main`] and
//! [`process::main`]. The broker must know nothing of Kubernetes, the cluster process nothing of kubeconfig files.

pub mod broker;
mod control;
pub mod kubeconfig;
mod node_agent;
mod paths;
mod pki;
pub mod ports;
mod preflight;
pub mod process;
mod protocol;
mod up;

use std::path::PathBuf;

use anyhow::{Context, Result};

pub use paths::{DEFAULT_NAME, Paths};

/// `mantlet cluster …`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

/// Which cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// Name of the cluster; its context is `mantlet` or `mantlet-NAME`
    #[arg(long, default_value = DEFAULT_NAME, global = true)]
    pub name: String,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Start a cluster in the background and make its context current
    Up {
        #[command(flatten)]
        which: Which,
        /// Kubeconfig file to write [default: $KUBECONFIG or ~/.kube/config]
        #[arg(long)]
        kubeconfig: Option<PathBuf>,
        /// Port of the API on 127.0.0.1 [default: the last one, or 6443 if it is free]
        #[arg(long)]
        port: Option<u16>,
    },
    /// Stop a cluster and restore the former context; its objects are kept for the next `up`
    Down {
        #[command(flatten)]
        which: Which,
        /// Delete the cluster's objects, keys and logs too
        #[arg(long)]
        purge: bool,
    },
    /// Show whether a cluster runs, and where
    Status {
        #[command(flatten)]
        which: Which,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where the host reaches the cluster's LoadBalancers and NodePorts
    Ports {
        #[command(flatten)]
        which: Which,
        /// Print lines for ~/.curlrc that lead curl from ports below 1024 to their stand-ins
        #[arg(long)]
        curl: bool,
    },
    /// Print a cluster's log
    Logs {
        #[command(flatten)]
        which: Which,
        /// Go on as the log grows
        #[arg(short, long)]
        follow: bool,
        /// Only the last lines
        #[arg(long)]
        tail: Option<usize>,
    },
}

/// What a command has to say.
#[derive(Debug)]
pub struct Answer {
    /// Text for standard output.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

impl Answer {
    fn ok(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: 0,
        }
    }
}

/// Runs one subcommand.
///
/// # Errors
/// What failed, with what to do about it.
pub fn run(args: Args) -> Result<Answer> {
    match args.command {
        Command::Up {
            which,
            kubeconfig,
            port,
        } => up::up(&Paths::of(&which.name)?, kubeconfig, port),
        Command::Down { which, purge } => up::down(&Paths::of(&which.name)?, purge),
        Command::Status { which, json } => up::status(&Paths::of(&which.name)?, json),
        Command::Ports { which, curl } => ports::run(&Paths::of(&which.name)?, curl),
        Command::Logs { which, follow, tail } => up::logs(&Paths::of(&which.name)?, follow, tail),
    }
}

/// Process id of the sandbox of the running cluster behind a kubeconfig context.
///
/// # Errors
/// The context is not one of ours, or its cluster does not run.
pub fn sandbox_pid(context: &str) -> Result<u32> {
    let name = if context == DEFAULT_NAME {
        Some(DEFAULT_NAME)
    } else {
        context.strip_prefix("mantlet-")
    };
    let name = name.with_context(|| format!("context {context:?} is not an embedded cluster"))?;
    let status = control::status(&Paths::of(name)?)?;
    Ok(status
        .with_context(|| format!("cluster {name:?} does not run"))?
        .sandbox_pid)
}
