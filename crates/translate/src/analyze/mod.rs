//! Analysis of a whole configuration: what is wrong, dangerous or without effect (`istioctl analyze`).
//!
//! Pure: an [`Input`] of objects in, [`Finding`]s out. The command line reads objects from a cluster or from files and prints; nothing
//! here prints or waits. Each analyzer looks at one area; every message is in [`table`], with what to do about it.

mod annotations;
mod authz;
mod destination_rule;
mod extensions;
mod gateway;
mod injection;
mod input;
mod jwt;
mod logic;
mod peer;
mod schema;
mod service;
pub mod table;
mod virtual_service;
mod webhook;

use std::collections::BTreeMap;

use mantlet_api::diagnostic::Severity;

pub use input::{Input, NETWORKING, Origin, Resource, SECURITY, Workload};
pub use table::Message;

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of message it is.
    pub message: &'static Message,
    /// Kind of the object that it is about.
    pub kind: String,
    /// Namespace of the object, empty for cluster-wide ones.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// Where the object was read from.
    pub origin: Option<Origin>,
    /// Field it is about (`spec.rules[0].to[0]`), empty for the object as a whole.
    pub path: String,
    /// The text.
    pub text: String,
}

impl Finding {
    /// `Kind namespace/name`, as messages name objects.
    pub fn object(&self) -> String {
        if self.namespace.is_empty() {
            format!("{} {}", self.kind, self.name)
        } else {
            format!("{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// What analyzers write into.
#[derive(Debug, Default)]
pub(crate) struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn add(
        &mut self,
        message: &'static Message,
        resource: &Resource,
        path: impl Into<String>,
        text: impl Into<String>,
    ) {
        self.findings.push(Finding {
            message,
            kind: resource.kind.clone(),
            namespace: resource.namespace.clone(),
            name: resource.name.clone(),
            origin: resource.origin.clone(),
            path: path.into(),
            text: text.into(),
        });
    }
}

/// One analyzer.
#[derive(Clone, Copy, Debug)]
pub struct Analyzer {
    /// Its name, as `--list-analyzers` prints it.
    pub name: &'static str,
    /// What it checks.
    pub description: &'static str,
    run: fn(&Input, &mut Report),
}

/// All analyzers.
pub const ANALYZERS: &[Analyzer] = &[
    Analyzer {
        name: "annotations.K8sAnalyzer",
        description: "Checks for misplaced and invalid Istio annotations in Kubernetes resources",
        run: annotations::run,
    },
    Analyzer {
        name: "authz.AuthorizationPoliciesAnalyzer",
        description: "Checks the validity of authorization policies",
        run: authz::references,
    },
    Analyzer {
        name: "authz.TrapsAnalyzer",
        description: "Checks authorization rules for values that never match and for conditions that admit too much",
        run: authz::traps,
    },
    Analyzer {
        name: "authz.EffectAnalyzer",
        description: "Checks for rules without effect: contradictory, covered by another rule, or denied before",
        run: logic::run,
    },
    Analyzer {
        name: "deprecation.DeprecationAnalyzer",
        description: "Checks for deprecated Istio types and fields",
        run: schema::deprecated,
    },
    Analyzer {
        name: "destinationrule.Analyzer",
        description: "Checks DestinationRules: TLS without verification, subsets without pods, unknown hosts, conflicts with STRICT",
        run: destination_rule::run,
    },
    Analyzer {
        name: "envoyfilter.EnvoyPatchAnalyzer",
        description: "Checks an envoyFilters operations",
        run: extensions::envoy_filters,
    },
    Analyzer {
        name: "gateway.Analyzer",
        description: "Checks Gateways: credentials, certificates used twice, conflicts, ports without Service",
        run: gateway::run,
    },
    Analyzer {
        name: "injection.Analyzer",
        description: "Checks conditions related to Istio sidecar injection",
        run: injection::run,
    },
    Analyzer {
        name: "jwt.Analyzer",
        description: "Checks RequestAuthentications: key sets, tokens that nothing requires, claims that nothing verifies",
        run: jwt::run,
    },
    Analyzer {
        name: "peerauthentication.Analyzer",
        description: "Checks PeerAuthentications: policies without effect, ports of the Service instead of the workload",
        run: peer::run,
    },
    Analyzer {
        name: "schema.ValidationAnalyzer",
        description: "Runs schema validation on every Istio object, and asks translation what it cannot take as written",
        run: schema::run,
    },
    Analyzer {
        name: "service.PortNameAnalyzer",
        description: "Checks names, protocols and conflicts of Service and ServiceEntry ports",
        run: service::run,
    },
    Analyzer {
        name: "sidecar.SelectorAnalyzer",
        description: "Checks that Sidecar and Telemetry resources select distinct sets of workloads",
        run: extensions::selectors,
    },
    Analyzer {
        name: "virtualservice.Analyzer",
        description: "Checks VirtualServices: hosts, gateways, destinations, subsets, conflicts, unreachable routes",
        run: virtual_service::run,
    },
    Analyzer {
        name: "webhook.Analyzer",
        description: "Checks the validity of Istio webhooks",
        run: webhook::run,
    },
];

/// Annotation by which an object suppresses messages about itself: numbers, comma-separated, or `*` (S8.71).
const SUPPRESS: &str = "galley.istio.io/analyze-suppress";

/// Everything that is found, worst first. Objects may suppress messages about themselves.
pub fn analyze(input: &Input) -> Vec<Finding> {
    let mut report = Report::default();
    for analyzer in ANALYZERS {
        (analyzer.run)(input, &mut report);
    }
    let suppressed: BTreeMap<(&str, &str, &str), &str> = input
        .resources
        .iter()
        .filter_map(|r| {
            let codes = r.annotations.get(SUPPRESS)?;
            Some(((r.kind.as_str(), r.namespace.as_str(), r.name.as_str()), codes.as_str()))
        })
        .collect();
    let mut findings = report.findings;
    findings.retain(|f| {
        let codes = suppressed.get(&(f.kind.as_str(), f.namespace.as_str(), f.name.as_str()));
        !codes.is_some_and(|codes| {
            codes
                .split(',')
                .map(str::trim)
                .any(|code| code == "*" || code == f.message.code)
        })
    });
    fn order(finding: &Finding) -> (std::cmp::Reverse<Severity>, &str, &str, &str, &str, &str, &str) {
        (
            std::cmp::Reverse(finding.message.level),
            finding.message.code,
            &finding.kind,
            &finding.namespace,
            &finding.name,
            &finding.path,
            &finding.text,
        )
    }
    findings.sort_by(|a, b| order(a).cmp(&order(b)));
    findings.dedup();
    findings
}
