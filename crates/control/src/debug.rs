//! Readiness and debugging over HTTP: `/ready` for everyone, `/debug/…` from this machine only.
//!
//! Debug answers hold the configuration of other people's workloads, and the server does not authenticate; so they are given
//! to loopback peers alone: `kubectl exec` and port-forward arrive there, pods do not.

use std::net::IpAddr;

use http::StatusCode;
use mantlet_runtime::admin::{json, text};
use mantlet_runtime::{Admin, AdminRequest, AdminResponse, LogHandle, Readiness, Registry};
use mantlet_translate::world::World;
use mantlet_translate::{authz, peer_authentication};
use serde_json::{Value, json};

use crate::discovery::board::Board;
use crate::discovery::hub::Hub;
use crate::jwks::Resolver;

/// What the endpoints show.
#[derive(Clone)]
pub struct Debug {
    /// The owner of the world.
    pub hub: Hub,
    /// What proxies were sent.
    pub board: Board,
    /// What readiness waits for.
    pub readiness: Readiness,
    /// Metrics.
    pub registry: Registry,
    /// Key sets of token issuers.
    pub keys: Resolver,
    /// Levels of the log, if they may be changed.
    pub log: Option<LogHandle>,
}

impl Debug {
    /// The routes.
    pub fn routes(&self) -> Admin {
        let readiness = self.readiness.clone();
        let mut admin = Admin::new()
            .route("/ready", move |_| {
                let pending = readiness.pending();
                async move {
                    if pending.is_empty() {
                        text(StatusCode::OK, "")
                    } else {
                        text(
                            StatusCode::SERVICE_UNAVAILABLE,
                            format!("waiting for: {}\n", pending.join(", ")),
                        )
                    }
                }
            })
            .route("/version", |_| async {
                text(
                    StatusCode::OK,
                    format!("{}-mantlet-{}\n", mantlet_api::ISTIO_VERSION, mantlet_api::VERSION),
                )
            })
            .metrics("/metrics", self.registry.clone());
        if let Some(log) = &self.log {
            admin = admin.log_levels("/logging", log.clone());
        }
        for (path, answer) in [
            ("/debug/syncz", Page::Syncz),
            ("/debug/distribution", Page::Distribution),
            ("/debug/config_dump", Page::ConfigDump),
            ("/debug/endpointz", Page::Endpointz),
            ("/debug/authorizationz", Page::Authorizationz),
            ("/debug/jwksz", Page::Jwksz),
        ] {
            let this = self.clone();
            admin = admin.route(path, move |request| {
                let this = this.clone();
                async move {
                    if !is_local(request.peer.ip()) {
                        return text(
                            StatusCode::FORBIDDEN,
                            "debug endpoints answer on loopback only: use kubectl exec or port-forward\n",
                        );
                    }
                    this.page(answer, &request).await
                }
            });
        }
        admin
    }

    async fn page(&self, page: Page, request: &AdminRequest) -> AdminResponse {
        let wanted = request.param("proxyID");
        match page {
            Page::Syncz => json(&self.board.rows()),
            Page::Jwksz => json(&self.keys.rows().await),
            Page::Distribution => {
                // Read first: what the hub was handed before it is asked is part of its answer.
                let seen = self.board.seen();
                let Some(revision) = self.hub.ask(|view| view.revision).await else {
                    return gone();
                };
                json(&json!({"revision": revision, "seen": seen, "proxies": self.board.distribution()}))
            }
            Page::ConfigDump => {
                let Some(wanted) = wanted else {
                    return text(StatusCode::BAD_REQUEST, "name a proxy: ?proxyID=POD.NAMESPACE\n");
                };
                let name = wanted.clone();
                let found = self
                    .hub
                    .ask(move |view| {
                        view.proxies
                            .iter()
                            .find(|(node, _)| node.display_name() == name || node.id == name)
                            .map(|(_, snapshot)| serde_json::to_value(snapshot.to_snapshot()).unwrap_or_default())
                    })
                    .await;
                match found {
                    None => gone(),
                    Some(None) => text(
                        StatusCode::NOT_FOUND,
                        format!("Proxy not connected to this Pilot instance: {wanted}\n"),
                    ),
                    Some(Some(dump)) => json(&dump),
                }
            }
            Page::Endpointz => match self.hub.ask(|view| endpoints(view.world)).await {
                Some(value) => json(&value),
                None => gone(),
            },
            Page::Authorizationz => {
                let found = self
                    .hub
                    .ask(move |view| {
                        view.proxies
                            .iter()
                            .filter(|(node, _)| wanted.as_ref().is_none_or(|w| node.display_name() == *w))
                            .map(|(node, _)| policies(view.world, node))
                            .collect::<Vec<Value>>()
                    })
                    .await;
                match found {
                    Some(value) => json(&value),
                    None => gone(),
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Page {
    Syncz,
    Distribution,
    ConfigDump,
    Endpointz,
    Authorizationz,
    Jwksz,
}

fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    }
}

fn gone() -> AdminResponse {
    text(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n")
}

/// Services with their endpoints, as the registry sees them.
fn endpoints(world: &World) -> Value {
    let services: Vec<Value> = world
        .visible_services("")
        .map(|service| {
            let ports: Vec<Value> = service
                .ports
                .iter()
                .map(|port| {
                    let members: Vec<Value> = mantlet_translate::endpoint::resolve(world, service, port)
                        .iter()
                        .map(|r| serde_json::to_value(&r.endpoint).unwrap_or_default())
                        .collect();
                    json!({"port": port.number, "name": port.name, "endpoints": members})
                })
                .collect();
            json!({"svc": service.host, "ports": ports})
        })
        .collect();
    Value::Array(services)
}

/// What protects a proxy's workload.
fn policies(world: &World, node: &mantlet_translate::node::ProxyNode) -> Value {
    let pod = world.pod(&node.namespace, &node.name);
    let labels = pod.map_or(&node.labels, |p| &p.labels);
    let target = authz::Target {
        namespace: &node.namespace,
        labels,
        gateway: node.kind == mantlet_translate::node::NodeKind::Router,
    };
    let bound: Vec<Value> = authz::bound(world, target)
        .map(|policy| {
            let problems: Vec<String> = authz::problems(world, policy).into_iter().map(|p| p.message).collect();
            json!({
                "name": policy.meta.name,
                "namespace": policy.meta.namespace,
                "spec": policy.spec,
                "problems": problems,
            })
        })
        .collect();
    json!({
        "proxy": node.display_name(),
        "authorization_policies": bound,
        "mtls": peer_authentication::effective(world, &node.namespace, labels),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_sees_debug_pages() {
        for (ip, local) in [
            ("127.0.0.1", true),
            ("127.8.9.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.244.0.7", false),
            ("::ffff:10.244.0.7", false),
            ("fe80::1", false),
        ] {
            assert_eq!(is_local(ip.parse().unwrap()), local, "{ip}");
        }
    }
}
