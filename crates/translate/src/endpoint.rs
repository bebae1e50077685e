//! Endpoints of a service port, from slices, pods and ServiceEntry.

use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::names::spiffe;

use crate::peer_authentication::{self, Mode};
use crate::world::World;
use crate::world::service::{Service, ServicePort, TargetPort};
use crate::world::workload::Workload;

/// One endpoint with what else clients need to know.
#[derive(Clone, Debug)]
pub struct Resolved<'a> {
    /// The endpoint; `mtls` says whether its registry entry carries the label (before any PeerAuthentication).
    pub endpoint: Endpoint,
    /// Identity that it runs as, without trust domain: namespace, service account.
    pub account: Option<(&'a str, &'a str)>,
    /// Labels, for subsets and policies.
    pub labels: Option<&'a std::collections::BTreeMap<String, String>>,
}

impl Resolved<'_> {
    /// Whether clients should use mTLS by themselves: the label says so and the workload's own policy is not DISABLE (S1.63).
    pub fn auto_mtls(&self, world: &World, namespace: &str) -> bool {
        self.endpoint.mtls
            && self.labels.is_none_or(|labels| {
                peer_authentication::effective(world, namespace, labels).port(self.endpoint.port) != Mode::Disable
            })
    }
}

/// All endpoints behind a port, sorted by address.
pub fn resolve<'a>(world: &'a World, service: &'a Service, port: &ServicePort) -> Vec<Resolved<'a>> {
    let mut out = Vec::new();
    if service.kubernetes {
        for slice in world.slices(&service.namespace, &service.name) {
            let Some((_, number)) = slice.ports.iter().find(|(name, _)| *name == port.name) else {
                continue;
            };
            for entry in &slice.endpoints {
                let health = match (entry.ready, entry.draining) {
                    (true, _) => Health::Healthy,
                    (false, true) => Health::Draining,
                    (false, false) => continue,
                };
                let workload = match &entry.pod {
                    None => None,
                    // A pod that is not known yet, or not any more: without its labels and account it could only be
                    // reached in plaintext, so it waits for them.
                    Some(name) => match world.pod(&service.namespace, name) {
                        Some(workload) => Some(workload),
                        None => continue,
                    },
                };
                out.push(of_workload(
                    entry.address.to_string(),
                    *number,
                    health,
                    workload.map(|w| &**w),
                ));
            }
        }
    } else {
        for endpoint in &service.endpoints {
            let number = endpoint.ports.get(&port.name).copied().unwrap_or(match port.target {
                TargetPort::Number(number) => number,
                TargetPort::Name(_) => port.number,
            });
            out.push(Resolved {
                endpoint: Endpoint {
                    address: endpoint.address.clone(),
                    port: number,
                    weight: endpoint.weight,
                    health: Health::Healthy,
                    mtls: endpoint.mtls(),
                    mantlet: false,
                    workload: None,
                },
                account: (!endpoint.service_account.is_empty())
                    .then_some((service.namespace.as_str(), endpoint.service_account.as_str())),
                labels: Some(&endpoint.labels),
            });
        }
        if !service.selector.is_empty() {
            for workload in world.pods(&service.namespace) {
                let (Some(ip), true) = (
                    workload.ip,
                    mantlet_api::selector::subset(&service.selector, &workload.labels),
                ) else {
                    continue;
                };
                if let Some(number) = target_port(&port.target, workload) {
                    out.push(of_workload(ip.to_string(), number, Health::Healthy, Some(workload)));
                }
            }
        }
    }
    out.sort_by(|a, b| (&a.endpoint.address, a.endpoint.port).cmp(&(&b.endpoint.address, b.endpoint.port)));
    out.dedup_by(|a, b| a.endpoint.address == b.endpoint.address && a.endpoint.port == b.endpoint.port);
    out
}

fn of_workload<'a>(address: String, port: u16, health: Health, workload: Option<&'a Workload>) -> Resolved<'a> {
    Resolved {
        endpoint: Endpoint {
            address,
            port,
            weight: 1,
            health,
            mtls: workload.is_some_and(|w| w.mtls),
            mantlet: workload.is_some_and(|w| w.mantlet && w.mtls),
            workload: workload.map(|w| w.telemetry.clone()),
        },
        account: workload.map(|w| (w.namespace.as_str(), w.service_account.as_str())),
        labels: workload.map(|w| &*w.labels),
    }
}

/// The workload's number of a target port; `None` while a named port is unknown there.
pub fn target_port(target: &TargetPort, workload: &Workload) -> Option<u16> {
    match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload.named_ports.get(name).copied(),
    }
}

/// The SPIFFE URIs that a service's servers may present (S1.86–S1.88): one per service account of its endpoints and per
/// name of the trust domain, sorted. Empty means that only the chain is checked (S1.89).
pub fn server_names(world: &World, service: &Service, endpoints: &[Resolved<'_>]) -> Vec<String> {
    let mesh = world.mesh();
    let mut names: Vec<String> = Vec::new();
    let accounts = endpoints.iter().filter_map(|e| e.account).chain(
        service
            .extra_accounts
            .iter()
            .map(|sa| (service.namespace.as_str(), sa.as_str())),
    );
    for (namespace, account) in accounts {
        for domain in mesh.trust_domains() {
            names.push(spiffe(domain, namespace, account));
        }
    }
    for san in &service.extra_sans {
        names.push(san.clone());
        let Some((domain, rest)) = san.strip_prefix("spiffe://").and_then(|s| s.split_once('/')) else {
            continue;
        };
        if mesh.trust_domains().contains(&domain) {
            names.extend(mesh.trust_domains().iter().map(|d| format!("spiffe://{d}/{rest}")));
        }
    }
    names.sort();
    names.dedup();
    names
}
