//! The process's own servers: readiness (15021), agent status and probes (15020), metrics (15090), admin (15000, loopback).

mod admin;
mod probe;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use http::StatusCode;
use mantlet_runtime::admin::text;
use mantlet_runtime::{Admin, AdminResponse, DrainWatch, LogHandle, Readiness};
use tokio::net::TcpListener;

use crate::settings::Settings;
use crate::worker::{Phase, Shared};

/// Opens the sockets and starts the servers.
///
/// # Errors
/// When a port is taken.
pub async fn start(
    settings: &Arc<Settings>,
    shared: &Arc<Shared>,
    readiness: &Readiness,
    log: &LogHandle,
    drain: &DrainWatch,
) -> std::io::Result<()> {
    let ports = settings.ports;
    let registry = shared.telemetry.registry.clone();
    let everywhere = |port: u16| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));

    let health = Admin::new().route("/healthz/ready", ready(shared, readiness));
    let prometheus = Admin::new().metrics("/stats/prometheus", registry.clone());
    let probes = probe::Probers::new(settings);
    let status = Admin::new()
        .route("/healthz/ready", ready(shared, readiness))
        .metrics("/stats/prometheus", registry)
        .prefix("/app-health/", move |request| {
            let probes = probes.clone();
            async move { probes.answer(&request.path).await }
        });
    let admin = admin::routes(settings, shared, readiness, log);
    for (address, server) in [
        (everywhere(ports.health), health),
        (everywhere(ports.prometheus), prometheus),
        (everywhere(ports.status), status),
        (SocketAddr::from((Ipv4Addr::LOCALHOST, ports.admin)), admin),
    ] {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|e| std::io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))?;
        tokio::spawn(server.serve(listener, drain.clone()));
    }
    Ok(())
}

fn ready(
    shared: &Arc<Shared>,
    readiness: &Readiness,
) -> impl Fn(mantlet_runtime::AdminRequest) -> std::future::Ready<AdminResponse> + Send + Sync + 'static {
    let (shared, readiness) = (shared.clone(), readiness.clone());
    move |_| std::future::ready(readiness_answer(&shared, &readiness))
}

fn readiness_answer(shared: &Shared, readiness: &Readiness) -> AdminResponse {
    if shared.phase() >= Phase::Draining {
        return text(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
    }
    if readiness.is_ready() {
        return text(StatusCode::OK, "");
    }
    let missing = readiness.pending().join(", ");
    text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n"))
}
