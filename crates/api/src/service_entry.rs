//! `ServiceEntry` (networking.istio.io): a service that Kubernetes does not know.
//!
//! Rules of the kind: S8.56.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::Diagnostic;
use crate::selector::LabelSelector;
use crate::validate;
use crate::workload_entry::WorkloadEntry;

/// Specification of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["hosts"], "x-kubernetes-validations" = [{
    "rule": "(has(self.workloadSelector) ? 1 : 0) + (has(self.endpoints) ? 1 : 0) <= 1",
    "message": "only one of WorkloadSelector or Endpoints can be set"
}]))]
pub struct ServiceEntry {
    /// Hosts of the service.
    #[schemars(length(min = 1, max = 256))]
    pub hosts: Vec<String>,
    /// Virtual addresses or ranges.
    #[schemars(length(max = 256))]
    pub addresses: Vec<String>,
    /// Ports.
    #[schemars(length(max = 256))]
    pub ports: Vec<ServicePort>,
    /// Inside or outside the mesh.
    pub location: Location,
    /// How addresses of endpoints are found.
    pub resolution: Resolution,
    /// Endpoints.
    #[schemars(length(max = 4096))]
    pub endpoints: Vec<WorkloadEntry>,
    /// Pods and WorkloadEntries of the same namespace as endpoints.
    pub workload_selector: Option<LabelSelector>,
    /// Namespaces that see it; `.` own, `*` all, `~` none.
    pub export_to: Vec<String>,
    /// Accepted names of the servers.
    pub subject_alt_names: Vec<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["number", "name"]))]
pub struct ServicePort {
    /// Number.
    pub number: u32,
    /// Protocol.
    pub protocol: String,
    /// Name.
    pub name: String,
    /// Endpoints' port; by default the number.
    pub target_port: u32,
}

/// Inside or outside the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Outside: no mutual TLS.
    #[default]
    MeshExternal,
    /// Inside.
    MeshInternal,
}

/// How addresses of endpoints are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// Not at all: connections go where they were going.
    #[default]
    None,
    /// From the endpoints.
    Static,
    /// By DNS, all answers.
    Dns,
    /// By DNS, one answer at a time.
    DnsRoundRobin,
    /// By DNS at request time.
    DynamicDns,
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &ServiceEntry, namespace: &str, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    if spec.hosts.is_empty() {
        findings.push(Diagnostic::error(
            "spec.hosts",
            "service entry must have at least one host",
        ));
    }
    for (i, host) in spec.hosts.iter().enumerate() {
        let path = format!("spec.hosts[{i}]");
        if host == "*" {
            findings.push(Diagnostic::error(path, "invalid host *"));
        } else {
            validate::wildcard_host(host, &path, &mut findings);
        }
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        findings.push(Diagnostic::error(
            "spec.endpoints",
            "only one of WorkloadSelector or Endpoints is allowed in Service Entry",
        ));
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (i, port) in spec.ports.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        if !(1..=65535).contains(&port.number) {
            findings.push(Diagnostic::error(
                format!("{path}.number"),
                format!("port number {} must be in the range 1..65535", port.number),
            ));
        }
        if !names.insert(&port.name) {
            findings.push(Diagnostic::error(
                format!("{path}.name"),
                format!("service entry port name {:?} already defined", port.name),
            ));
        }
        if !numbers.insert(port.number) {
            findings.push(Diagnostic::error(
                format!("{path}.number"),
                format!("service entry port {} already defined", port.number),
            ));
        }
    }
    for (i, address) in spec.addresses.iter().enumerate() {
        let path = format!("spec.addresses[{i}]");
        let range = address.contains('/');
        let good = if range {
            address.parse::<ipnet::IpNet>().is_ok()
        } else {
            address.parse::<std::net::IpAddr>().is_ok()
        };
        if !good {
            findings.push(Diagnostic::error(
                path,
                format!("{address:?} is not a valid IP address or CIDR range"),
            ));
        } else if range && !matches!(spec.resolution, Resolution::None | Resolution::Static) {
            findings.push(Diagnostic::error(
                path,
                "CIDR addresses are allowed only for NONE/STATIC resolution types",
            ));
        }
    }
    for (i, endpoint) in spec.endpoints.iter().enumerate() {
        let path = format!("spec.endpoints[{i}]");
        let is_ip = endpoint.address.parse::<std::net::IpAddr>().is_ok();
        match spec.resolution {
            Resolution::None => {
                findings.push(Diagnostic::error(
                    &path,
                    "no endpoints should be provided for resolution type none",
                ));
                break;
            }
            Resolution::Static if !is_ip && !endpoint.address.starts_with("unix://") && endpoint.network.is_empty() => {
                findings.push(Diagnostic::error(
                    format!("{path}.address"),
                    format!("{:?} is not a valid IP address", endpoint.address),
                ));
            }
            Resolution::Dns | Resolution::DnsRoundRobin
                if !is_ip && !crate::names::is_dns1123_subdomain(&endpoint.address) =>
            {
                findings.push(Diagnostic::error(
                    format!("{path}.address"),
                    format!(
                        "endpoint address {:?} is not a valid FQDN or an IP address",
                        endpoint.address
                    ),
                ));
            }
            _ => {}
        }
        for (name, number) in &endpoint.ports {
            if !names.contains(name) {
                findings.push(Diagnostic::error(
                    format!("{path}.ports"),
                    format!("endpoint port {name} is not defined by the service entry"),
                ));
            }
            if !(1..=65535).contains(number) {
                findings.push(Diagnostic::error(
                    format!("{path}.ports[{name}]"),
                    format!("port number {number} must be in the range 1..65535"),
                ));
            }
        }
    }
    validate::export_to(&spec.export_to, namespace, true, &mut findings);
    findings
}
