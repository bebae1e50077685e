//! The admin pages on loopback: what the proxy holds and does, for `istioctl proxy-config` and people.

use std::sync::Arc;

use http::{Method, StatusCode};
use mantlet_model::query::{ConfigDump, SecretStatus};
use mantlet_runtime::admin::{json, respond, text};
use mantlet_runtime::{Admin, LogHandle, Readiness};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::secrets::SecretSet;
use crate::settings::{ISTIO_VERSION, Settings};
use crate::worker::{Phase, Shared};

/// The routes.
pub(super) fn routes(settings: &Arc<Settings>, shared: &Arc<Shared>, readiness: &Readiness, log: &LogHandle) -> Admin {
    let registry = shared.telemetry.registry.clone();
    let page = |build: fn(&Shared, &Settings) -> Value| {
        let (shared, settings) = (shared.clone(), settings.clone());
        move |_| {
            let answer = json(&build(&shared, &settings));
            async move { answer }
        }
    };
    let clusters = shared.clone();
    let ready_shared = shared.clone();
    let readiness = readiness.clone();
    let quit = shared.clone();
    Admin::new()
        .route("/config_dump", page(config_dump))
        .route(
            "/certs",
            page(|shared, _| json!({ "certificates": secrets(&shared.secrets.load()) })),
        )
        .route("/listeners", page(listeners))
        .route("/server_info", page(server_info))
        .route("/mantlet/denials", page(|shared, _| json!(shared.telemetry.denials())))
        .route("/mantlet/plaintext", page(|shared, _| shared.telemetry.plaintext.all()))
        .route("/clusters", move |_| {
            let body = cluster_lines(&clusters);
            async move { respond(StatusCode::OK, "text/plain; charset=utf-8", body) }
        })
        .metrics("/stats/prometheus", registry.clone())
        .metrics("/stats", registry)
        .log_levels("/logging", log.clone())
        .route("/ready", move |_| {
            let live = readiness.is_ready() && ready_shared.phase() == Phase::Running;
            async move {
                if live {
                    text(StatusCode::OK, "LIVE\n")
                } else {
                    text(StatusCode::SERVICE_UNAVAILABLE, "PRE_INITIALIZING\n")
                }
            }
        })
        .route("/quitquitquit", move |request| {
            let quit = quit.clone();
            async move {
                if request.method != Method::POST {
                    return text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n");
                }
                quit.request_quit();
                text(StatusCode::OK, "OK\n")
            }
        })
}

fn config_dump(shared: &Shared, settings: &Settings) -> Value {
    let mut snapshot = (*shared.config.load().snapshot).clone();
    // As requests see them: with the virtual hosts that were asked for.
    let filled = |(name, table): (&String, _)| (name.clone(), snapshot.filled(table));
    snapshot.routes = snapshot.routes.iter().map(filled).collect();
    json!(ConfigDump {
        version: ISTIO_VERSION.to_string(),
        node: settings.node_id.clone(),
        metadata: json!(settings.metadata),
        snapshot,
        secrets: secrets(&shared.secrets.load()),
    })
}

fn listeners(shared: &Shared, _: &Settings) -> Value {
    let config = shared.config.load();
    let all: Vec<Value> = config
        .snapshot
        .listeners
        .values()
        .map(|l| json!({ "name": l.name, "local_address": l.address.to_string(), "bound": l.bind_to_port }))
        .collect();
    json!({ "listener_statuses": all })
}

fn server_info(shared: &Shared, settings: &Settings) -> Value {
    let state = match shared.phase() {
        Phase::Running => "LIVE",
        Phase::Draining | Phase::Stopping => "DRAINING",
    };
    json!({
        "version": ISTIO_VERSION,
        "state": state,
        "node": { "id": settings.node_id },
        "workers": settings.workers,
        "connections": shared.active_connections(),
        "access_log_batches_dropped": shared.telemetry.log.dropped(),
    })
}

/// Certificates and bundles, without a byte of a key.
fn secrets(set: &SecretSet) -> Vec<SecretStatus> {
    let time = |at: OffsetDateTime| at.format(&Rfc3339).unwrap_or_default();
    let now = OffsetDateTime::now_utc();
    let mut out = Vec::new();
    for (name, identity) in set.entries() {
        if let Some(leaf) = identity.leaf() {
            out.push(SecretStatus {
                name,
                kind: "Cert Chain".to_string(),
                state: "ACTIVE".to_string(),
                valid: leaf.check_validity(now).is_ok(),
                serial: leaf.serial.clone(),
                not_after: time(leaf.not_after),
                not_before: time(leaf.not_before),
                subject_alt_names: leaf.uris.iter().chain(&leaf.dns_names).cloned().collect(),
            });
        }
    }
    if let Some(roots) = set.mesh_roots() {
        for root in roots.certificates() {
            let Ok(parsed) = mantlet_identity::PeerCertificate::parse(root) else {
                continue;
            };
            out.push(SecretStatus {
                name: mantlet_model::names::SECRET_ROOT.to_string(),
                kind: "CA".to_string(),
                state: "ACTIVE".to_string(),
                valid: parsed.check_validity(now).is_ok(),
                serial: parsed.serial,
                not_after: time(parsed.not_after),
                not_before: time(parsed.not_before),
                subject_alt_names: parsed.uris,
            });
        }
    }
    out
}

/// Envoy's text form, as far as the endpoints go.
fn cluster_lines(shared: &Shared) -> String {
    let config = shared.config.load();
    let mut names: Vec<&String> = config.clusters.keys().collect();
    names.sort();
    let mut out = String::new();
    for name in names {
        let Some(cluster) = config.clusters.get(name) else {
            continue;
        };
        for (address, endpoint) in &cluster.endpoints {
            let health = format!("{:?}", endpoint.health).to_lowercase();
            out.push_str(&format!("{name}::{address}::health_flags::{health}\n"));
            out.push_str(&format!("{name}::{address}::weight::{}\n", endpoint.weight));
            out.push_str(&format!(
                "{name}::{address}::tls_mode::{}\n",
                if endpoint.mtls { "istio" } else { "disabled" }
            ));
        }
    }
    out
}
