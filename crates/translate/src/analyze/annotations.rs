//! Annotations of Istio's names: known, on the right kind, with an allowed value.

use super::input::{Input, Resource, strings};
use super::{Report, table};
use crate::inject::annotation_problem;

/// How finished the feature behind an annotation is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Stable,
    Alpha,
    Deprecated(&'static str),
}
use Stage::{Alpha, Deprecated, Stable};

const POD: &[&str] = &["Pod"];
const SERVICE: &[&str] = &["Service"];
const ANY: &[&str] = &["Any"];
const INGRESS: &[&str] = &["Ingress"];
const NETWORKED: &[&str] = &["Service", "Gateway"];

/// Name, kinds that read it, stage. Names are Istio's API; kinds below `Pod` include templates of pods.
const KNOWN: &[(&str, &[&str], Stage)] = &[
    ("alpha.istio.io/canonical-serviceaccounts", SERVICE, Alpha),
    ("alpha.istio.io/identity", POD, Alpha),
    ("alpha.istio.io/kubernetes-serviceaccounts", SERVICE, Alpha),
    ("ambient.istio.io/dns-capture", POD, Alpha),
    ("ambient.istio.io/redirection", POD, Alpha),
    (
        "ambient.istio.io/waypoint-inbound-binding",
        &["Gateway", "GatewayClass"],
        Alpha,
    ),
    ("galley.istio.io/analyze-suppress", ANY, Stable),
    ("gateway.istio.io/controller-version", &["Gateway"], Alpha),
    ("gateway.istio.io/name-override", &["Gateway"], Alpha),
    ("gateway.istio.io/service-account", &["Gateway"], Alpha),
    ("inject.istio.io/templates", POD, Stable),
    ("install.operator.istio.io/chart-owner", ANY, Alpha),
    ("install.operator.istio.io/owner-generation", ANY, Alpha),
    ("install.operator.istio.io/version", ANY, Alpha),
    ("internal.istio.io/parents", ANY, Alpha),
    ("istio.io/autoregister-locality", POD, Alpha),
    ("istio.io/autoRegistrationGroup", &["WorkloadEntry"], Alpha),
    ("istio.io/connectedAt", &["WorkloadEntry"], Alpha),
    ("istio.io/disconnectedAt", &["WorkloadEntry"], Alpha),
    ("istio.io/dry-run", &["AuthorizationPolicy"], Stable),
    ("istio.io/reroute-virtual-interfaces", POD, Alpha),
    ("istio.io/rev", POD, Stable),
    ("istio.io/workloadController", &["WorkloadEntry"], Alpha),
    ("kubernetes.io/ingress.class", INGRESS, Stable),
    ("networking.istio.io/address-type", &["Gateway"], Alpha),
    ("networking.istio.io/exportTo", SERVICE, Stable),
    ("networking.istio.io/service-type", NETWORKED, Alpha),
    (
        "networking.istio.io/traffic-distribution",
        &["Service", "Namespace", "ServiceEntry"],
        Alpha,
    ),
    ("policy.istio.io/check", POD, Deprecated("")),
    ("policy.istio.io/checkBaseRetryWaitTime", POD, Deprecated("")),
    ("policy.istio.io/checkMaxRetryWaitTime", POD, Deprecated("")),
    ("policy.istio.io/checkRetries", POD, Deprecated("")),
    ("policy.istio.io/lang", POD, Deprecated("")),
    ("prometheus.istio.io/merge-metrics", POD, Stable),
    ("proxy.istio.io/config", POD, Stable),
    ("proxy.istio.io/overrides", POD, Alpha),
    ("readiness.status.sidecar.istio.io/applicationPorts", POD, Alpha),
    ("readiness.status.sidecar.istio.io/failureThreshold", POD, Alpha),
    ("readiness.status.sidecar.istio.io/initialDelaySeconds", POD, Alpha),
    ("readiness.status.sidecar.istio.io/periodSeconds", POD, Alpha),
    ("sidecar.istio.io/agentLogLevel", POD, Alpha),
    ("sidecar.istio.io/bootstrapOverride", POD, Alpha),
    ("sidecar.istio.io/componentLogLevel", POD, Alpha),
    ("sidecar.istio.io/controlPlaneAuthPolicy", POD, Deprecated("")),
    ("sidecar.istio.io/discoveryAddress", POD, Deprecated("")),
    ("sidecar.istio.io/enableCoreDump", POD, Alpha),
    ("sidecar.istio.io/extraStatTags", POD, Alpha),
    (
        "sidecar.istio.io/inject",
        POD,
        Deprecated(" in favor of the sidecar.istio.io/inject label"),
    ),
    ("sidecar.istio.io/interceptionMode", POD, Alpha),
    ("sidecar.istio.io/logLevel", POD, Alpha),
    ("sidecar.istio.io/nativeSidecar", POD, Alpha),
    ("sidecar.istio.io/proxyCPU", POD, Alpha),
    ("sidecar.istio.io/proxyCPULimit", POD, Alpha),
    ("sidecar.istio.io/proxyImage", POD, Alpha),
    ("sidecar.istio.io/proxyImageType", POD, Alpha),
    ("sidecar.istio.io/proxyMemory", POD, Alpha),
    ("sidecar.istio.io/proxyMemoryLimit", POD, Alpha),
    ("sidecar.istio.io/rewriteAppHTTPProbers", POD, Alpha),
    ("sidecar.istio.io/statsCompression", POD, Alpha),
    ("sidecar.istio.io/statsHistogramBuckets", POD, Alpha),
    ("sidecar.istio.io/statsInclusionPrefixes", POD, Deprecated("")),
    ("sidecar.istio.io/statsInclusionRegexps", POD, Deprecated("")),
    ("sidecar.istio.io/statsInclusionSuffixes", POD, Deprecated("")),
    ("sidecar.istio.io/status", POD, Alpha),
    ("sidecar.istio.io/userVolume", POD, Alpha),
    ("sidecar.istio.io/userVolumeMount", POD, Alpha),
    ("status.sidecar.istio.io/port", POD, Alpha),
    ("topology.istio.io/controlPlaneClusters", &["Namespace"], Alpha),
    ("traffic.istio.io/nodeSelector", SERVICE, Stable),
    ("traffic.sidecar.istio.io/excludeInboundPorts", POD, Stable),
    ("traffic.sidecar.istio.io/excludeInterfaces", POD, Alpha),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", POD, Stable),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", POD, Stable),
    ("traffic.sidecar.istio.io/includeInboundPorts", POD, Stable),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", POD, Stable),
    ("traffic.sidecar.istio.io/includeOutboundPorts", POD, Alpha),
    (
        "traffic.sidecar.istio.io/kubevirtInterfaces",
        POD,
        Deprecated(" in favor of istio.io/reroute-virtual-interfaces"),
    ),
];

/// Kinds whose annotations are looked at.
const KINDS: [&str; 8] = [
    "Namespace",
    "Service",
    "Pod",
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "Job",
    "Ingress",
];

pub(super) fn run(input: &Input, out: &mut Report) {
    for resource in &input.resources {
        if !KINDS.contains(&resource.kind.as_str()) || input.is_system(&resource.namespace) {
            continue;
        }
        check(
            resource,
            &resource.kind,
            &resource.annotations,
            "metadata.annotations",
            out,
        );
        let of_template = strings(&resource.value, "/spec/template/metadata/annotations");
        check(resource, "Pod", &of_template, "spec.template.metadata.annotations", out);
    }
}

fn check(
    resource: &Resource,
    kind: &str,
    annotations: &std::collections::BTreeMap<String, String>,
    place: &str,
    out: &mut Report,
) {
    let mesh_pod = kind == "Pod" && annotations.contains_key("sidecar.istio.io/status");
    for (name, value) in annotations {
        let path = format!("{place}[{name}]");
        let Some((_, kinds, stage)) = KNOWN.iter().find(|(known, _, _)| known == name) else {
            if is_istio(name) {
                out.add(
                    &table::UNKNOWN_ANNOTATION,
                    resource,
                    path,
                    format!("Unknown annotation: {name}"),
                );
            }
            continue;
        };
        if *kinds != ANY && !kinds.contains(&kind) {
            out.add(
                &table::MISPLACED_ANNOTATION,
                resource,
                path,
                format!(
                    "Misplaced annotation: {name} can only be applied to {}",
                    kinds.join(" ")
                ),
            );
            continue;
        }
        if let Some(problem) = annotation_problem(name, value) {
            out.add(
                &table::INVALID_ANNOTATION,
                resource,
                path.clone(),
                format!("Invalid annotation {name}: {problem}"),
            );
        }
        match stage {
            Deprecated(extra) => out.add(
                &table::DEPRECATED_ANNOTATION,
                resource,
                path,
                format!("Annotation \"{name}\" has been deprecated{extra} and may not work in future Istio versions."),
            ),
            // What the injector itself writes is not the user's choice.
            Alpha if !mesh_pod && value_is_users(name) => out.add(
                &table::ALPHA_ANNOTATION,
                resource,
                path,
                format!("Annotation \"{name}\" is part of an alpha-phase feature and may be incompletely supported."),
            ),
            Alpha | Stable => {}
        }
    }
}

/// Whether an annotation is of the Istio family; those of operators and gateways' controllers included.
fn is_istio(name: &str) -> bool {
    let Some((prefix, _)) = name.split_once('/') else {
        return false;
    };
    prefix == "istio.io" || prefix.ends_with(".istio.io")
}

fn value_is_users(name: &str) -> bool {
    !matches!(name, "sidecar.istio.io/status" | "proxy.istio.io/overrides") && !name.starts_with("install.operator.")
}
