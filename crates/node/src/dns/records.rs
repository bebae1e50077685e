//! The names of `cluster.local`, as the DNS specification of Kubernetes (schema version 1.1.0) lays them down. Pure.
//!
//! | name | answer |
//! |---|---|
//! | `svc.ns.svc.cluster.local` | A: cluster address, or the ready endpoints of a headless Service; CNAME of an ExternalName |
//! | `host.svc.ns.svc.cluster.local` | A: one endpoint, by host name or by its address with dashes |
//! | `_port._proto.svc.ns.svc.cluster.local` | SRV: a named port |
//! | `a-b-c-d.ns.pod.cluster.local` | A: the address in the name, if the namespace exists |
//! | `d.c.b.a.in-addr.arpa` | PTR: the Service or the endpoint that has the address |

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use hickory_proto::rr::rdata::{A, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use super::record;
use crate::controllers::Informers;
use crate::controllers::endpoints::SERVICE_NAME;
use crate::controllers::informer::Key;

/// The cluster's domain.
pub const DOMAIN: &str = "cluster.local";
/// Seconds an answer may be cached, negative ones too: Services come and go.
const TTL: u32 = 5;
/// Addresses in one answer; more would not fit a message anyway.
const MAX_RECORDS: usize = 500;

/// An endpoint as names need it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Address.
    pub address: Ipv4Addr,
    /// Host name, from the pod's spec or its address with dashes.
    pub host: String,
    /// (name, protocol in lower case, number) of each port.
    pub ports: Vec<(String, String, u16)>,
}

/// A Service as names need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// With addresses of its own.
    Cluster {
        /// The addresses.
        addresses: Vec<Ipv4Addr>,
        /// (name, protocol in lower case, number) of each port.
        ports: Vec<(String, String, u16)>,
    },
    /// Its endpoints are its addresses.
    Headless(Vec<Target>),
    /// Another name stands for it.
    External(String),
}

/// What the names are made from.
pub trait Zone: Send + Sync {
    /// A Service.
    fn service(&self, namespace: &str, name: &str) -> Option<Entry>;
    /// The ready endpoints of a Service of any kind.
    fn endpoints(&self, namespace: &str, name: &str) -> Vec<Target>;
    /// Whether a namespace exists.
    fn namespace(&self, name: &str) -> bool;
    /// Host part below `svc.cluster.local` of what has an address (`name.namespace` or `host.name.namespace`).
    fn reverse(&self, address: Ipv4Addr) -> Vec<String>;
}

impl Zone for Informers {
    fn service(&self, namespace: &str, name: &str) -> Option<Entry> {
        let service = self.services.get(&Key::new(namespace, name))?;
        entry(&service, || Zone::endpoints(self, namespace, name))
    }

    fn endpoints(&self, namespace: &str, name: &str) -> Vec<Target> {
        let slices = self.slices.select(namespace, |slice| {
            slice.labels().get(SERVICE_NAME).is_some_and(|service| service == name)
        });
        let targets: BTreeSet<_> = slices.iter().flat_map(|slice| targets(slice)).collect();
        targets.into_iter().collect()
    }

    fn namespace(&self, name: &str) -> bool {
        self.namespaces.get(&Key::new("", name)).is_some()
    }

    fn reverse(&self, address: Ipv4Addr) -> Vec<String> {
        let text = address.to_string();
        for service in self.services.list() {
            if service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some(&text) {
                return vec![format!(
                    "{}.{}",
                    service.name_any(),
                    service.namespace().unwrap_or_default()
                )];
            }
        }
        let mut names = Vec::new();
        for slice in self.slices.list() {
            let Some(service) = slice.labels().get(SERVICE_NAME) else {
                continue;
            };
            for target in targets(&slice) {
                if target.address == address {
                    names.push(format!(
                        "{}.{service}.{}",
                        target.host,
                        slice.namespace().unwrap_or_default()
                    ));
                }
            }
        }
        names.sort();
        names.dedup();
        names
    }
}

fn entry(service: &Service, endpoints: impl FnOnce() -> Vec<Target>) -> Option<Entry> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some(Entry::External(spec.external_name.clone()?));
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return Some(Entry::Headless(endpoints()));
    }
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let protocol = port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase();
        Some((
            port.name.clone().unwrap_or_default(),
            protocol,
            u16::try_from(port.port).ok()?,
        ))
    });
    Some(Entry::Cluster {
        addresses: spec
            .cluster_ip
            .iter()
            .filter_map(|address| address.parse().ok())
            .collect(),
        ports: ports.collect(),
    })
}

fn targets(slice: &EndpointSlice) -> Vec<Target> {
    let ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase();
            Some((
                port.name.clone().unwrap_or_default(),
                protocol,
                u16::try_from(port.port?).ok()?,
            ))
        })
        .collect();
    slice
        .endpoints
        .iter()
        .flatten()
        .filter(|endpoint| {
            endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true)
        })
        .flat_map(|endpoint| {
            endpoint.addresses.iter().filter_map(|address| {
                let address: Ipv4Addr = address.parse().ok()?;
                Some(Target {
                    address,
                    host: endpoint.hostname.clone().unwrap_or_else(|| dashed(address)),
                    ports: ports.clone(),
                })
            })
        })
        .collect()
}

fn dashed(address: Ipv4Addr) -> String {
    address.to_string().replace('.', "-")
}

/// What to answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// These records.
    Records(Vec<Record>),
    /// The name exists, but not with that type; the record says for how long that may be remembered.
    Empty(Record),
    /// The name does not exist.
    NoSuchName(Record),
    /// Outside of what this server knows.
    NotOurs,
}

/// Answers one question.
pub fn answer(zone: &dyn Zone, name: &Name, kind: RecordType) -> Answer {
    let lower = name.to_lowercase();
    let labels: Vec<String> = lower
        .iter()
        .map(|label| String::from_utf8_lossy(label).into_owned())
        .collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    if let [rest @ .., "cluster", "local"] = labels.as_slice() {
        return match data(zone, rest, kind) {
            None => Answer::NoSuchName(soa()),
            Some(data) if data.is_empty() => Answer::Empty(soa()),
            Some(data) => Answer::Records(
                data.into_iter()
                    .take(MAX_RECORDS)
                    .map(|data| record(name, TTL, data))
                    .collect(),
            ),
        };
    }
    if let [d, c, b, a, "in-addr", "arpa"] = labels.as_slice() {
        return reverse(zone, name, [a, b, c, d].map(|octet| octet.parse::<u8>().ok()), kind);
    }
    Answer::NotOurs
}

/// The records of a name below the domain; `None` when the name does not exist.
fn data(zone: &dyn Zone, labels: &[&str], kind: RecordType) -> Option<Vec<RData>> {
    match labels {
        [] => Some(apex(kind)),
        ["dns-version"] => Some(if kind == RecordType::TXT {
            vec![RData::TXT(TXT::new(vec!["1.1.0".to_owned()]))]
        } else {
            Vec::new()
        }),
        ["ns", "dns"] | ["svc"] | ["pod"] => Some(Vec::new()),
        [namespace, "svc" | "pod"] => zone.namespace(namespace).then(Vec::new),
        [address, namespace, "pod"] => {
            let address: Ipv4Addr = address.replace('-', ".").parse().ok()?;
            zone.namespace(namespace).then(|| addresses(kind, [address]))
        }
        [service, namespace, "svc"] => Some(match zone.service(namespace, service)? {
            Entry::Cluster { addresses: list, .. } => addresses(kind, list),
            Entry::Headless(targets) => addresses(kind, targets.into_iter().map(|target| target.address)),
            Entry::External(target) => match Name::from_ascii(format!("{}.", target.trim_end_matches('.'))) {
                Ok(target) => vec![RData::CNAME(CNAME(target))],
                Err(_) => Vec::new(),
            },
        }),
        [port, protocol, service, namespace, "svc"] if port.starts_with('_') && protocol.starts_with('_') => {
            let found = ports(zone, namespace, service, &port[1..], &protocol[1..])?;
            Some(if kind == RecordType::SRV { found } else { Vec::new() })
        }
        [protocol, service, namespace, "svc"] if protocol.starts_with('_') => {
            zone.service(namespace, service).map(|_| Vec::new())
        }
        [host, service, namespace, "svc"] => {
            zone.service(namespace, service)?;
            let found: Vec<_> = zone
                .endpoints(namespace, service)
                .into_iter()
                .filter(|target| target.host == *host || dashed(target.address) == *host)
                .map(|target| target.address)
                .collect();
            (!found.is_empty()).then(|| addresses(kind, found))
        }
        _ => None,
    }
}

fn addresses(kind: RecordType, list: impl IntoIterator<Item = Ipv4Addr>) -> Vec<RData> {
    if kind != RecordType::A && kind != RecordType::ANY {
        // IPv4 only: the name exists, an AAAA record does not.
        return Vec::new();
    }
    let unique: BTreeSet<_> = list.into_iter().collect();
    unique.into_iter().map(|address| RData::A(A(address))).collect()
}

fn ports(zone: &dyn Zone, namespace: &str, service: &str, port: &str, protocol: &str) -> Option<Vec<RData>> {
    let suffix = format!("{service}.{namespace}.svc.{DOMAIN}.");
    let matches =
        |candidate: &(String, String, u16)| candidate.0 == port && candidate.1 == protocol && !port.is_empty();
    let found: Vec<_> = match zone.service(namespace, service)? {
        Entry::Cluster { ports, .. } => ports
            .iter()
            .filter(|candidate| matches(candidate))
            .map(|(_, _, number)| (*number, suffix.clone()))
            .collect(),
        Entry::Headless(targets) => targets
            .iter()
            .flat_map(|target| {
                let ports = target.ports.iter().filter(|candidate| matches(candidate));
                ports.map(|(_, _, number)| (*number, format!("{}.{suffix}", target.host)))
            })
            .collect(),
        Entry::External(_) => Vec::new(),
    };
    let records: Vec<_> = found
        .into_iter()
        .filter_map(|(number, target)| Some(RData::SRV(SRV::new(0, 100, number, Name::from_ascii(target).ok()?))))
        .collect();
    (!records.is_empty()).then_some(records)
}

fn apex(kind: RecordType) -> Vec<RData> {
    match kind {
        RecordType::SOA => vec![soa().data],
        RecordType::NS => Name::from_ascii(format!("ns.dns.{DOMAIN}."))
            .map(|name| vec![RData::NS(NS(name))])
            .unwrap_or_default(),
        _ => Vec::new(),
    }
}

fn reverse(zone: &dyn Zone, name: &Name, octets: [Option<u8>; 4], kind: RecordType) -> Answer {
    let [Some(a), Some(b), Some(c), Some(d)] = octets else {
        return Answer::NotOurs;
    };
    // The service and the pod range; everybody else's addresses are not ours to answer for.
    if (a, b) != (10, 96) && (a, b) != (10, 244) {
        return Answer::NotOurs;
    }
    let hosts = zone.reverse(Ipv4Addr::new(a, b, c, d));
    if hosts.is_empty() {
        return Answer::NoSuchName(soa());
    }
    if kind != RecordType::PTR {
        return Answer::Empty(soa());
    }
    let names = hosts
        .into_iter()
        .take(MAX_RECORDS)
        .filter_map(|host| Name::from_ascii(format!("{host}.svc.{DOMAIN}.")).ok());
    Answer::Records(names.map(|target| record(name, TTL, RData::PTR(PTR(target)))).collect())
}

/// The authority record of negative answers; its last number bounds how long they are cached (RFC 2308).
fn soa() -> Record {
    let name = |text: String| Name::from_ascii(text).unwrap_or_else(|_| Name::root());
    let data = SOA::new(
        name(format!("ns.dns.{DOMAIN}.")),
        name(format!("hostmaster.{DOMAIN}.")),
        1,
        7200,
        1800,
        86400,
        TTL,
    );
    record(&name(format!("{DOMAIN}.")), TTL, RData::SOA(data))
}
