//! `mantletd`: the control plane's program. `pilot-discovery` is another name of it.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mantlet_control::{options::Options, server};
use mantlet_net::memory::Wiping;
use mantlet_net::sandbox::{self, Policy, SandboxError};
use mantlet_net::seccomp::Filter;
use mantlet_runtime::{LogOptions, Registry, log, shutdown_signal};

/// The CA's key and secrets of gateways pass through buffers of many libraries, on all threads: what is freed is wiped. Lists and pushes
/// make and drop many small values on many threads; the C library's arenas would keep what is free for good.
#[global_allocator]
static ALLOCATOR: Wiping<mimalloc::MiMalloc> = Wiping::always(mimalloc::MiMalloc);

/// How long open streams may take to end.
const SHUTDOWN: Duration = Duration::from_secs(5);
/// How long an answer of the running control plane may take.
const REQUEST: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(name = "mantletd", version, about = "Control plane of the Mantlet service mesh")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the control plane.
    Discovery(Box<Options>),
    /// Ask the control plane that runs in this container.
    Request {
        /// HTTP method.
        method: String,
        /// Path, such as /debug/syncz.
        path: String,
        /// Where it listens.
        #[arg(long, default_value = "127.0.0.1:15014")]
        address: String,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let confined = match &cli.command {
        Command::Discovery(_) => confine(),
        Command::Request { .. } | Command::Version => Ok(()),
    };
    if let Err(error) = confined {
        eprintln!("the process cannot give up its rights ({error}); MANTLET_SANDBOX=off starts it with all of them");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Discovery(options) => discovery(*options).await,
            Command::Request { method, path, address } => request(&method, &path, &address).await,
            Command::Version => {
                println!("{}", mantlet_api::VERSION);
                Ok(())
            }
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gives up capabilities, other programs, other processes and what can harm the kernel; before there are threads. Files stay
/// as users and modes have them: credentials of the API server may be anywhere.
fn confine() -> Result<(), SandboxError> {
    if std::env::var("MANTLET_SANDBOX").is_ok_and(|value| value == "off") {
        return Ok(());
    }
    let policy = Policy {
        filter: Filter::Daemon,
        files: None,
    };
    sandbox::enter(&policy).map(|_| ())
}

async fn discovery(options: Options) -> anyhow::Result<()> {
    let handle = log::init(&LogOptions {
        levels: options.log_output_level.clone(),
        json: options.log_as_json,
    })?;
    let registry = Registry::new();
    mantlet_runtime::metrics::register_process_metrics(&registry);
    let client = kube::Client::try_default().await?;
    let mut running = server::start(options, client, registry, Some(handle)).await?;
    tracing::info!(
        target: "server",
        "xDS on {} and {}, webhooks on {}, monitoring on {}, debug on {}",
        running.grpc, running.secure_grpc, running.https, running.monitoring, running.http
    );
    let signal = tokio::select! {
        signal = shutdown_signal() => signal?,
        () = running.failed() => anyhow::bail!("a part of the control plane ended by itself"),
    };
    tracing::info!(target: "server", "{signal}: shutting down");
    running.stop(SHUTDOWN).await;
    Ok(())
}

/// One HTTP request to the running control plane; the body goes to standard output.
async fn request(method: &str, path: &str, address: &str) -> anyhow::Result<()> {
    use http_body_util::{BodyExt, Full};
    let stream = tokio::net::TcpStream::connect(address).await?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(connection);
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, address)
        .body(Full::new(bytes::Bytes::new()))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        anyhow::Ok((status, body))
    };
    let (status, body) = tokio::time::timeout(REQUEST, answer).await??;
    std::io::stdout().write_all(&body)?;
    anyhow::ensure!(status.is_success(), "the control plane answered {status}");
    Ok(())
}
