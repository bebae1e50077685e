//! Services as the mesh sees them: Kubernetes Services and ServiceEntry hosts in one form.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mantlet_api::service_entry::{Location, Resolution as EntryResolution, ServiceEntry};

use super::{ObjectMeta, seconds};
use crate::protocol::Protocol;

/// A service: a host name with ports.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Fully qualified host, lower case.
    pub host: String,
    /// Short name (the host itself for ServiceEntry).
    pub name: String,
    /// Namespace of its object.
    pub namespace: String,
    /// Creation time, Unix seconds.
    pub created: i64,
    /// Virtual addresses; empty for headless services and entries without addresses.
    pub vips: Vec<IpAddr>,
    /// Ports with a protocol that the mesh carries.
    pub ports: Vec<ServicePort>,
    /// Pods (or workload entries) behind it; empty selects none.
    pub selector: BTreeMap<String, String>,
    /// Where its endpoints come from.
    pub resolution: Resolution,
    /// Outside of the mesh: never automatic mTLS (S6.31).
    pub external: bool,
    /// Whether a Kubernetes Service is behind it.
    pub kubernetes: bool,
    /// Names that its servers may present besides those of its endpoints' accounts (S1.87).
    pub extra_sans: Vec<String>,
    /// Service accounts of its namespace that its servers may run as besides those of its endpoints (S1.87).
    pub extra_accounts: Vec<String>,
    /// Namespaces that see it.
    pub export_to: ExportTo,
    /// Endpoints written down in a ServiceEntry.
    pub endpoints: Vec<StaticEndpoint>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Service port.
    pub number: u16,
    /// Its name, empty for none.
    pub name: String,
    /// What it speaks.
    pub protocol: Protocol,
    /// Port of the workload.
    pub target: TargetPort,
}

/// Port of a workload behind a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container port.
    Name(String),
}

/// Source of endpoints (S6.30).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Known addresses, delivered apart.
    Endpoints,
    /// The address that the client dialled (headless services, `NONE`).
    OriginalDestination,
    /// DNS at the proxy.
    Dns,
}

/// An endpoint of a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticEndpoint {
    /// Address or host name.
    pub address: String,
    /// Ports by name.
    pub ports: BTreeMap<String, u16>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account, empty for none.
    pub service_account: String,
    /// Weight, at least 1.
    pub weight: u32,
}

impl StaticEndpoint {
    /// Whether it terminates mesh mTLS (S1.65).
    pub fn mtls(&self) -> bool {
        match self.labels.get(super::workload::TLS_MODE_LABEL) {
            Some(mode) => mode == "istio",
            None => !self.service_account.is_empty(),
        }
    }
}

/// Visibility of a networking object (S6.55, S1.108).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExportTo {
    /// All namespaces.
    #[default]
    All,
    /// These; `.` was replaced by the object's own.
    Namespaces(Vec<String>),
}

impl ExportTo {
    /// Reads an `exportTo` list; empty is all.
    pub fn parse<'a>(values: impl IntoIterator<Item = &'a str>, own: &str) -> ExportTo {
        let mut names = Vec::new();
        let mut any = false;
        for value in values {
            any = true;
            match value.trim() {
                "*" => return ExportTo::All,
                "." => names.push(own.to_string()),
                "~" | "" => {}
                other => names.push(other.to_string()),
            }
        }
        if !any {
            return ExportTo::All;
        }
        names.sort();
        names.dedup();
        ExportTo::Namespaces(names)
    }

    /// Whether a client in this namespace sees the object.
    pub fn visible_to(&self, namespace: &str) -> bool {
        match self {
            ExportTo::All => true,
            ExportTo::Namespaces(names) => names.iter().any(|n| n == namespace),
        }
    }
}

impl Service {
    /// Reads a Kubernetes Service; `None` for services without a name and for ExternalName, whose host is not ours.
    pub fn from_kubernetes(service: &core::Service, domain: &str) -> Option<Service> {
        let name = service.metadata.name.clone()?;
        let namespace = service.metadata.namespace.clone().unwrap_or_default();
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let vips: Vec<IpAddr> = spec
            .cluster_ips
            .as_ref()
            .filter(|ips| !ips.is_empty())
            .cloned()
            .or_else(|| spec.cluster_ip.clone().map(|ip| vec![ip]))
            .unwrap_or_default()
            .iter()
            .filter_map(|ip| ip.parse().ok())
            .collect();
        let headless = spec.cluster_ip.as_deref() == Some("None");
        let ports = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|p| {
                let number = u16::try_from(p.port).ok().filter(|n| *n != 0)?;
                let protocol = Protocol::of_service_port(
                    p.protocol.as_deref(),
                    p.app_protocol.as_deref(),
                    p.name.as_deref(),
                    number,
                );
                let target = match &p.target_port {
                    Some(IntOrString::Int(n)) if *n != 0 => TargetPort::Number(u16::try_from(*n).ok()?),
                    Some(IntOrString::String(name)) if !name.is_empty() => match name.parse() {
                        Ok(number) => TargetPort::Number(number),
                        Err(_) => TargetPort::Name(name.clone()),
                    },
                    _ => TargetPort::Number(number),
                };
                (protocol != Protocol::Udp).then(|| ServicePort {
                    number,
                    name: p.name.clone().unwrap_or_default(),
                    protocol,
                    target,
                })
            })
            .collect();
        let annotations = service.metadata.annotations.as_ref();
        let annotation = |key: &str| {
            annotations
                .and_then(|a| a.get(key))
                .map(String::as_str)
                .unwrap_or_default()
        };
        let list = |text: &str| -> Vec<String> {
            text.split(',')
                .map(str::trim)
                .filter(|s| !s.is_empty())
                .map(str::to_string)
                .collect()
        };
        let extra_sans = list(annotation("alpha.istio.io/canonical-serviceaccounts"));
        let extra_accounts = list(annotation("alpha.istio.io/kubernetes-serviceaccounts"));
        let export_to = match annotations.and_then(|a| a.get("networking.istio.io/exportTo")) {
            Some(text) => ExportTo::parse(text.split(','), &namespace),
            None => ExportTo::All,
        };
        Some(Service {
            host: format!("{name}.{namespace}.svc.{domain}"),
            created: seconds(service.metadata.creation_timestamp.as_ref()),
            vips: if headless { Vec::new() } else { vips },
            ports,
            selector: spec.selector.clone().unwrap_or_default(),
            resolution: if headless {
                Resolution::OriginalDestination
            } else {
                Resolution::Endpoints
            },
            external: false,
            kubernetes: true,
            extra_sans,
            extra_accounts,
            export_to,
            endpoints: Vec::new(),
            name,
            namespace,
        })
    }

    /// Reads a ServiceEntry: one service per host. Wildcard hosts are kept; they get routes and clusters, no listeners
    /// by name.
    pub fn from_entry(meta: &ObjectMeta, entry: &ServiceEntry) -> Vec<Service> {
        let ports: Vec<ServicePort> = entry
            .ports
            .iter()
            .filter_map(|p| {
                let number = u16::try_from(p.number).ok().filter(|n| *n != 0)?;
                let target = u16::try_from(p.target_port).ok().filter(|n| *n != 0).unwrap_or(number);
                let protocol = Protocol::of_declared(&p.protocol, &p.name);
                (protocol != Protocol::Udp).then(|| ServicePort {
                    number,
                    name: p.name.clone(),
                    protocol,
                    target: TargetPort::Number(target),
                })
            })
            .collect();
        let resolution = match entry.resolution {
            EntryResolution::None => Resolution::OriginalDestination,
            EntryResolution::Static => Resolution::Endpoints,
            _ => Resolution::Dns,
        };
        let endpoints: Vec<StaticEndpoint> = entry
            .endpoints
            .iter()
            .filter(|e| !e.address.is_empty() && !e.address.starts_with("unix://"))
            .map(|e| StaticEndpoint {
                address: e.address.clone(),
                ports: e
                    .ports
                    .iter()
                    .filter_map(|(name, port)| Some((name.clone(), u16::try_from(*port).ok()?)))
                    .collect(),
                labels: e.labels.clone(),
                service_account: e.service_account.clone(),
                weight: e.weight.max(1),
            })
            .collect();
        let vips: Vec<IpAddr> = entry.addresses.iter().filter_map(|a| a.parse().ok()).collect();
        entry
            .hosts
            .iter()
            .map(|host| {
                let host = host.to_ascii_lowercase();
                Service {
                    name: host.clone(),
                    namespace: meta.namespace.clone(),
                    created: meta.created,
                    vips: vips.clone(),
                    ports: ports.clone(),
                    selector: entry
                        .workload_selector
                        .as_ref()
                        .map(|s| s.labels.clone())
                        .unwrap_or_default(),
                    resolution,
                    external: matches!(entry.location, Location::MeshExternal),
                    kubernetes: false,
                    extra_sans: entry.subject_alt_names.clone(),
                    extra_accounts: Vec::new(),
                    export_to: ExportTo::parse(entry.export_to.iter().map(String::as_str), &meta.namespace),
                    endpoints: if endpoints.is_empty() && resolution == Resolution::Dns {
                        vec![StaticEndpoint {
                            address: host.clone(),
                            ports: BTreeMap::new(),
                            labels: BTreeMap::new(),
                            service_account: String::new(),
                            weight: 1,
                        }]
                    } else {
                        endpoints.clone()
                    },
                    host,
                }
            })
            .collect()
    }

    /// The port with this number.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.number == number)
    }

    /// Order in which services win a contested name or port: Kubernetes first, then the oldest (S6.52, G1).
    pub fn rank(&self) -> (bool, i64, &str, &str) {
        (!self.kubernetes, self.created, &self.name, &self.namespace)
    }
}
