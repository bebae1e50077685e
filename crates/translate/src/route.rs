//! Virtual hosts and routes of services (SEMANTICS 6a, 6c).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};

use mantlet_model::http::{Codec, ForwardedClientCert};
use mantlet_model::http::{HttpManager, Reporter, RouteSource};
use mantlet_model::names::{self, ClusterName};
use mantlet_model::route::{Forward, Retry, Route, RouteAction, RouteMatch, RouteTable, VirtualHost};

use crate::mesh::Mesh;
use crate::world::service::{Resolution, Service};

/// Conditions on which an outbound request is sent again by default.
const DEFAULT_RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled";

/// Virtual hosts that the tables of several namespaces have in common, each of them once: a mesh has as many tables of a port as it has
/// namespaces, and they differ in the short names of their own services only. It keeps nothing alive.
#[derive(Debug, Default)]
pub struct SharedHosts {
    by_name: HashMap<String, Vec<Weak<VirtualHost>>>,
    /// Number of names at which those that are gone are cleared away.
    limit: usize,
}

impl SharedHosts {
    /// Names below which nothing is cleared away.
    const SLACK: usize = 1024;

    /// The value, shared with whoever holds an equal one.
    pub fn share(&mut self, host: VirtualHost) -> Arc<VirtualHost> {
        if self.by_name.len() >= self.limit {
            self.by_name
                .retain(|_, known| known.iter().any(|host| host.strong_count() > 0));
            self.limit = self.by_name.len() * 2 + SharedHosts::SLACK;
        }
        let known = self.by_name.entry(host.name.clone()).or_default();
        known.retain(|host| host.strong_count() > 0);
        if let Some(found) = known.iter().filter_map(Weak::upgrade).find(|known| **known == host) {
            return found;
        }
        let made = Arc::new(host);
        known.push(Arc::downgrade(&made));
        made
    }
}

/// The default route to a cluster; no timeout, retries of what never reached the server.
pub fn default_route(cluster: String, host: &str, port: u16) -> Route {
    Route {
        name: "default".into(),
        matches: RouteMatch::default(),
        action: RouteAction::Forward(Forward {
            clusters: vec![(cluster, 100)],
            prefix_rewrite: None,
            host_rewrite: None,
            timeout_ms: 0,
            retry: Some(default_retry()),
        }),
        decorator: format!("{host}:{port}/*"),
        request_headers: Vec::new(),
        response_headers: Vec::new(),
    }
}

/// Retries of routes that say nothing about them.
pub fn default_retry() -> Retry {
    Retry {
        on: DEFAULT_RETRY_ON.into(),
        attempts: 2,
        per_try_timeout_ms: 0,
        statuses: Vec::new(),
    }
}

/// The plain virtual host of a service port.
pub fn service_host(service: &Service, port: u16, domains: Vec<String>) -> VirtualHost {
    VirtualHost {
        name: format!("{}:{port}", service.host),
        domains,
        routes: vec![default_route(
            ClusterName::outbound(port, "", &service.host).to_string(),
            &service.host,
            port,
        )],
        attempt_count: true,
    }
}

/// Names by which a client in `namespace` reaches a service (S6.28).
pub fn domains(service: &Service, namespace: &str, domain: &str) -> Vec<String> {
    let mut out = vec![service.host.clone()];
    if service.kubernetes {
        let (name, ns) = (&service.name, &service.namespace);
        out.push(format!("{}.", service.host));
        out.push(format!("{name}.{ns}.svc"));
        out.push(format!("{name}.{ns}"));
        if ns == namespace {
            out.push(name.clone());
        }
        if service.resolution == Resolution::OriginalDestination {
            // Pods of a headless service by their own names (S6.22).
            out.push(format!("*.{name}.{ns}.svc.{domain}"));
        }
    }
    out.extend(service.vips.iter().map(|ip| match ip {
        std::net::IpAddr::V4(ip) => ip.to_string(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
    }));
    out
}

/// Removes the domains that an earlier virtual host of the table has.
pub fn unique(domains: Vec<String>, taken: &mut BTreeSet<String>) -> Vec<String> {
    domains.into_iter().filter(|d| taken.insert(d.clone())).collect()
}

/// The virtual host for unknown names: to the original destination, or refused (S6.4, S6.25).
pub fn fallback_host(mesh: &Mesh) -> VirtualHost {
    let (name, action) = if mesh.allow_any {
        (
            "allow_any",
            RouteAction::Forward(Forward {
                clusters: vec![(names::PASSTHROUGH.into(), 100)],
                prefix_rewrite: None,
                host_rewrite: None,
                timeout_ms: 0,
                retry: None,
            }),
        )
    } else {
        (
            "block_all",
            RouteAction::Respond {
                status: 502,
                body: String::new(),
            },
        )
    };
    VirtualHost {
        name: name.into(),
        domains: vec!["*".into()],
        routes: vec![Route {
            name: name.into(),
            matches: RouteMatch::default(),
            action,
            decorator: String::new(),
            request_headers: Vec::new(),
            response_headers: Vec::new(),
        }],
        attempt_count: true,
    }
}

/// The inline table of an inbound chain: one host, one route to one cluster (S6.15).
pub fn inbound_table(name: String, vhost_port: u16, cluster: String, decorator: String, retry: bool) -> RouteTable {
    RouteTable {
        name,
        hosts: vec![Arc::new(VirtualHost {
            name: format!("inbound|http|{vhost_port}"),
            domains: vec!["*".into()],
            routes: vec![Route {
                name: "default".into(),
                matches: RouteMatch::default(),
                action: RouteAction::Forward(Forward {
                    clusters: vec![(cluster, 100)],
                    prefix_rewrite: None,
                    host_rewrite: None,
                    timeout_ms: 0,
                    retry: retry.then(|| Retry {
                        on: "reset-before-request".into(),
                        attempts: 2,
                        per_try_timeout_ms: 0,
                        statuses: Vec::new(),
                    }),
                }),
                decorator,
                request_headers: Vec::new(),
                response_headers: Vec::new(),
            }],
            attempt_count: false,
        })],
        ignore_port_in_host: false,
        on_demand: false,
    }
}

/// The HTTP manager of an outbound chain.
pub fn outbound_manager(mesh: &Mesh, stat_prefix: String, table: String) -> HttpManager {
    HttpManager {
        stat_prefix,
        codec: Codec::Auto,
        routes: RouteSource::Named(table),
        normalization: mesh.normalization,
        forwarded_client_cert: ForwardedClientCert::Sanitize,
        use_remote_address: false,
        trusted_hops: 0,
        server_name: "envoy".into(),
        generate_request_id: true,
        websocket: true,
        stream_idle_timeout_ms: 0,
        jwt: None,
        custom: Vec::new(),
        authz: Vec::new(),
        istio_alpn: true,
        telemetry: Some(Reporter::Source),
        access_log: mesh.access_log.clone(),
    }
}
