//! The process: starts workers, agent and servers, and brings them down in order.
//!
//! Shutdown: SIGTERM → not ready → answers say `Connection: close`, HTTP/2 peers get GOAWAY → until no connection is left
//! or the drain time is over → exit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use mantlet_net::memory;
use mantlet_runtime::{Drain, LogHandle, Readiness, Registry, shutdown_signal};
use tokio::net::TcpStream;

use crate::agent::{certs, xds};
use crate::settings::{Role, Settings};
use crate::status;
use crate::telemetry::Telemetry;
use crate::worker::{DestinationOf, Phase, Shared, Tuning};

/// Runs the proxy until it is told to end.
///
/// # Errors
/// When it cannot start.
pub fn run(settings: Settings, log: LogHandle) -> std::io::Result<()> {
    memory::keep_freed();
    // This thread is the agent's: keys come and go here, and on the helpers that read files. Workers start their own runtimes.
    memory::wipe_freed();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .on_thread_start(memory::wipe_freed)
        .enable_all()
        .build()?;
    runtime.block_on(serve(settings, log))
}

async fn serve(settings: Settings, log: LogHandle) -> std::io::Result<()> {
    let settings = Arc::new(settings);
    let registry = Registry::new();
    mantlet_runtime::metrics::register_process_metrics(&registry);
    let telemetry = Telemetry::new(registry, settings.local.clone(), &settings.node_id)?;
    let destination_of: DestinationOf = match settings.role {
        Role::Sidecar => Arc::new(|tcp| mantlet_net::sockopt::original_dst(tcp)),
        Role::Router => Arc::new(TcpStream::local_addr),
    };
    let descriptors = mantlet_net::process::raise_descriptors()?;
    let tuning = Tuning {
        workers: settings.workers,
        ..Tuning::default()
    }
    .within_descriptors(descriptors);
    let shared = Shared::new(tuning, destination_of, telemetry);
    let readiness = Readiness::new();
    let certificate = readiness.register("workload certificate");
    let configuration = readiness.register("first full configuration");
    tokio::spawn(settle(memory::Code::find(), readiness.clone()));
    let threads = shared.start()?;
    let (drain, watch) = Drain::new();
    status::start(&settings, &shared, &readiness, &log, &watch).await?;
    tokio::spawn(certs::watch_roots(settings.clone(), shared.clone()));
    tokio::spawn(certs::keep_fresh(settings.clone(), shared.clone(), certificate));
    tokio::spawn(xds::subscribe(settings.clone(), shared.clone(), configuration));
    tracing::info!(target: "agent", "{} starts with {} workers, control plane {}", settings.node_id, settings.workers, settings.discovery);

    let quit = shared.quit();
    let reason = tokio::select! {
        signal = shutdown_signal() => signal?,
        () = quit => "quitquitquit",
    };
    tracing::info!(target: "agent", "{reason}: draining");
    shared.set_phase(Phase::Draining);
    wait_for_end(&settings, &shared).await;
    shared.set_phase(Phase::Stopping);
    let _ = drain.drain(Duration::from_secs(1)).await;
    for thread in threads {
        // A worker returns as soon as it sees the phase.
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
    shared.telemetry.log.finish(Duration::from_secs(1));
    tracing::info!(target: "agent", "end");
    Ok(())
}

/// Once the proxy is ready, the code that only the start needed goes: parsers, the first configuration, certificates. What
/// requests need comes back with the first of them.
async fn settle(code: std::io::Result<memory::Code>, readiness: Readiness) {
    readiness.ready().await;
    // What readiness set off (the answer to the probe, the acknowledgement) has had its turn.
    tokio::time::sleep(Duration::from_millis(500)).await;
    match code {
        Ok(code) => code.give_back(),
        Err(error) => tracing::debug!(target: "agent", "/proc/self/maps: {error}; code of the start stays mapped"),
    }
}

async fn wait_for_end(settings: &Settings, shared: &Shared) {
    let began = Instant::now();
    if !settings.exit_on_zero {
        tokio::time::sleep(settings.termination_drain).await;
        return;
    }
    // With EXIT_ON_ZERO_ACTIVE_CONNECTIONS the end is the last connection's, whenever that is; the kubelet's grace period
    // is the bound. The minimum covers peers that have not heard yet that this endpoint is going.
    tokio::time::sleep(settings.minimum_drain).await;
    while shared.active_connections() > 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tracing::info!(target: "agent", "no connection is left after {:?}", began.elapsed());
}

/// One HTTP/1.1 request without body, for the command line and the prober of pods; the answer's body is bounded.
///
/// # Errors
/// What failed, in words.
pub async fn simple_request(method: &str, address: &str, path: &str) -> Result<(u16, String), String> {
    let work = async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|e| format!("{address}: {e}"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp))
            .await
            .map_err(|e| e.to_string())?;
        let driver = tokio::spawn(connection);
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", address)
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), 64 << 20)
            .collect()
            .await
            .map_err(|e| e.to_string())?;
        driver.abort();
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    tokio::time::timeout(Duration::from_secs(10), work)
        .await
        .map_err(|_| format!("{address}: no answer within 10 s"))?
}
