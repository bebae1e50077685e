//! What of an object is not in force as written, in words for its status and for the log.
//!
//! Called by `control` for every object that it sees. An empty list means: in force exactly as written.

mod unread;

use mantlet_api::DestinationRule;
use mantlet_api::destination_rule::{ClientTlsMode, TrafficPolicy};

use crate::world::{Config, Kind, World};
use crate::{authz, legacy, request_authentication, virtual_service};

pub use unread::{UNREAD, service_entry, unread};

/// The problems of an object; `None` when it is not known.
pub fn problems(world: &World, kind: Kind, namespace: &str, name: &str) -> Option<Vec<String>> {
    match kind {
        Kind::AuthorizationPolicy => {
            let policy = find(world.authorization_policies(namespace), name)?;
            Some(authz::problems(world, policy).into_iter().map(|p| p.message).collect())
        }
        Kind::PeerAuthentication => {
            let policy = find(world.peer_authentications(namespace), name)?;
            let mut out = broken(policy, "STRICT applies to what it selects");
            if policy.spec.has_selector() && namespace == world.mesh().root_namespace {
                out.push(
                    "a selector in the root namespace selects nothing; put the policy into the workload's namespace"
                        .into(),
                );
            }
            if !policy.spec.has_selector() && !policy.spec.port_level_mtls.is_empty() {
                out.push("portLevelMtls needs a selector and is ignored".into());
            }
            Some(out)
        }
        Kind::RequestAuthentication => {
            let config = find(world.request_authentications(namespace), name)?;
            Some(request_authentication::problems(world, config))
        }
        Kind::DestinationRule => {
            let rule = find(world.destination_rules(namespace), name)?;
            Some(destination_rule(rule))
        }
        Kind::VirtualService => {
            let all = world.virtual_services();
            let config = all
                .iter()
                .find(|c| c.meta.namespace == namespace && c.meta.name == name)?;
            let mut out = virtual_service::problems(config);
            out.extend(unread::virtual_service(&config.spec));
            Some(out)
        }
        Kind::Gateway => {
            let all = world.gateways();
            let config = all
                .iter()
                .find(|c| c.meta.namespace == namespace && c.meta.name == name)?;
            let mut out = broken(config, "it is ignored");
            for (index, server) in config.spec.servers.iter().enumerate() {
                let protocol = server
                    .port
                    .as_ref()
                    .map(|p| p.protocol.to_ascii_uppercase())
                    .unwrap_or_default();
                if matches!(protocol.as_str(), "TCP" | "MONGO" | "MYSQL" | "REDIS") {
                    out.push(format!(
                        "servers[{index}]: protocol {protocol} is not supported yet, nothing listens"
                    ));
                }
            }
            Some(out)
        }
        Kind::Sidecar => {
            let config = find(world.sidecars(namespace), name)?;
            let mut out = broken(config, "it is ignored");
            out.push("Sidecar is not supported yet and is ignored: proxies see all services".into());
            Some(out)
        }
        Kind::MeshPolicy
        | Kind::Policy
        | Kind::ServiceRole
        | Kind::ServiceRoleBinding
        | Kind::ClusterRbacConfig
        | Kind::RbacConfig => {
            let origin = legacy::Origin {
                kind,
                namespace: if kind.cluster_scoped() { "" } else { namespace }.to_string(),
                name: name.to_string(),
            };
            legacy::problems(world).remove(&origin)
        }
        Kind::ServiceEntry => world.entry_problems(namespace, name).map(<[String]>::to_vec),
    }
}

fn find<'a, T>(configs: &'a [std::sync::Arc<Config<T>>], name: &str) -> Option<&'a Config<T>> {
    configs.iter().map(|c| &**c).find(|c| c.meta.name == name)
}

fn broken<T>(config: &Config<T>, consequence: &str) -> Vec<String> {
    config
        .broken
        .iter()
        .map(|error| format!("cannot be read ({error}); {consequence}"))
        .collect()
}

fn destination_rule(rule: &Config<DestinationRule>) -> Vec<String> {
    let mut out = broken(rule, "it is ignored");
    let mut look = |place: &str, policy: &TrafficPolicy| {
        let balancers = std::iter::once(policy.load_balancer.as_ref())
            .chain(policy.port_level_settings.iter().map(|p| p.load_balancer.as_ref()))
            .flatten();
        if balancers.into_iter().any(|lb| lb.consistent_hash.is_some()) {
            out.push(format!(
                "{place}: consistentHash is not supported yet, requests are balanced by load"
            ));
        }
        let tls = std::iter::once(policy.tls.as_ref())
            .chain(policy.port_level_settings.iter().map(|p| p.tls.as_ref()))
            .flatten();
        for tls in tls {
            let files = !tls.client_certificate.is_empty() && !tls.private_key.is_empty();
            if tls.mode == ClientTlsMode::Mutual && !files && tls.credential_name.is_empty() {
                out.push(format!(
                    "{place}: MUTUAL needs clientCertificate and privateKey, or credentialName; nothing is sent to the host"
                ));
            }
            if !tls.credential_name.is_empty() && rule.spec.workload_selector.is_none() {
                out.push(format!(
                    "{place}: credentialName without workloadSelector works on gateways only; sidecars send nothing to the host"
                ));
            }
            if !tls.ca_crl.is_empty() {
                out.push(format!(
                    "{place}: caCrl is not supported yet; nothing is sent to the host"
                ));
            }
        }
        out.extend(ignored_settings(place, policy));
        if policy.tunnel.is_some() || policy.proxy_protocol.is_some() {
            out.push(format!(
                "{place}: tunnel and proxyProtocol are not supported yet and are ignored"
            ));
        }
    };
    if let Some(policy) = &rule.spec.traffic_policy {
        look("trafficPolicy", policy);
    }
    for subset in &rule.spec.subsets {
        if let Some(policy) = &subset.traffic_policy {
            look(&format!("subset {}", subset.name), policy);
        }
    }
    out
}

/// Settings of connections, balancing and ejection that clusters do not carry yet.
fn ignored_settings(place: &str, policy: &TrafficPolicy) -> Vec<String> {
    let blocks = std::iter::once((
        policy.connection_pool.as_ref(),
        policy.load_balancer.as_ref(),
        policy.outlier_detection.as_ref(),
    ))
    .chain(policy.port_level_settings.iter().map(|p| {
        (
            p.connection_pool.as_ref(),
            p.load_balancer.as_ref(),
            p.outlier_detection.as_ref(),
        )
    }));
    let mut names = std::collections::BTreeSet::new();
    for (pool, balancer, outlier) in blocks {
        let tcp = pool.and_then(|p| p.tcp.as_ref());
        let http = pool.and_then(|p| p.http.as_ref());
        let found = [
            (
                "connectionPool.tcp.tcpKeepalive",
                tcp.is_some_and(|t| t.tcp_keepalive.is_some()),
            ),
            (
                "connectionPool.tcp.maxConnectionDuration",
                tcp.is_some_and(|t| t.max_connection_duration.is_some()),
            ),
            (
                "connectionPool.tcp.idleTimeout",
                tcp.is_some_and(|t| t.idle_timeout.is_some()),
            ),
            (
                "connectionPool.http.maxRequestsPerConnection",
                http.is_some_and(|h| h.max_requests_per_connection != 0),
            ),
            (
                "connectionPool.http.idleTimeout",
                http.is_some_and(|h| h.idle_timeout.is_some()),
            ),
            (
                "connectionPool.http.maxConcurrentStreams",
                http.is_some_and(|h| h.max_concurrent_streams != 0),
            ),
            (
                "loadBalancer.localityLbSetting",
                balancer.is_some_and(|b| b.locality_lb_setting.is_some()),
            ),
            (
                "loadBalancer.warmup",
                balancer.is_some_and(|b| b.warmup.is_some() || b.warmup_duration_secs.is_some()),
            ),
            (
                "outlierDetection.splitExternalLocalOriginErrors",
                outlier.is_some_and(|o| {
                    o.split_external_local_origin_errors || o.consecutive_local_origin_failures.is_some()
                }),
            ),
            (
                "outlierDetection.minHealthPercent",
                outlier.is_some_and(|o| o.min_health_percent != 0),
            ),
        ];
        names.extend(found.into_iter().filter(|(_, is)| *is).map(|(name, _)| name));
    }
    let mut out: Vec<String> = names
        .into_iter()
        .map(|name| format!("{place}: {name} is not supported yet and is ignored"))
        .collect();
    if policy.retry_budget.is_some() {
        out.push(format!("{place}: retryBudget is not supported yet and is ignored"));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::mesh::Mesh;

    fn report(kind: Kind, namespace: &str, spec: Value) -> Vec<String> {
        let mut world = World::new(Mesh::default());
        world.set_config(
            kind,
            &json!({"metadata": {"name": "x", "namespace": namespace}, "spec": spec}),
        );
        problems(&world, kind, namespace, "x").unwrap()
    }

    #[test]
    fn what_is_in_force_has_no_problems() {
        assert!(report(Kind::PeerAuthentication, "a", json!({"mtls": {"mode": "STRICT"}})).is_empty());
        assert!(report(Kind::AuthorizationPolicy, "a", json!({})).is_empty());
        assert!(report(Kind::RequestAuthentication, "a", json!({"jwtRules": [{"issuer": "i"}]})).is_empty());
        assert!(
            report(
                Kind::VirtualService,
                "a",
                json!({"hosts": ["x"], "http": [{"route": []}]})
            )
            .is_empty()
        );
        let rule = json!({"host": "x", "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}});
        assert!(report(Kind::DestinationRule, "a", rule).is_empty());
    }

    #[test]
    fn what_is_not_says_what_happens_instead() {
        let root = json!({"selector": {"matchLabels": {"a": "b"}}, "mtls": {"mode": "STRICT"}});
        assert!(report(Kind::PeerAuthentication, "istio-system", root)[0].contains("selects nothing"));
        assert!(report(Kind::PeerAuthentication, "a", json!({"mtls": {"mode": "X"}}))[0].contains("STRICT applies"));
        let rules = json!({"jwtRules": [{"issuer": "i", "jwks": "{\"keys\": []}"}]});
        assert!(report(Kind::RequestAuthentication, "a", rules)[0].contains("no usable key"));
        assert!(report(Kind::Sidecar, "a", json!({}))[0].contains("not supported"));
        let rule = json!({"host": "x", "trafficPolicy": {"tls": {"mode": "MUTUAL"}}});
        assert!(report(Kind::DestinationRule, "a", rule)[0].contains("nothing is sent"));
        let service = json!({"hosts": ["x"], "http": [{"fault": {}}], "tcp": [{}]});
        assert_eq!(report(Kind::VirtualService, "a", service).len(), 2);
        assert_eq!(problems(&World::default(), Kind::Gateway, "a", "none"), None);
    }
}
