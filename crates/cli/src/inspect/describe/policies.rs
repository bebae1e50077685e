//! Policies in force for a workload: mutual TLS, tokens, authorization.

use mantlet_model::authz::Action;
use mantlet_translate::authz::{self, Form, Target};
use mantlet_translate::peer_authentication;
use mantlet_translate::request_authentication;
use mantlet_translate::world::World;
use mantlet_translate::world::workload::Workload;

use super::rules::mode_text;
use super::{RULE, line};

pub(super) fn describe(world: &World, pod: &Workload, meshed: bool, out: &mut String) {
    let target = Target {
        namespace: &pod.namespace,
        labels: &pod.labels,
        gateway: pod.labels.contains_key("gateway.networking.k8s.io/gateway-name"),
    };
    rules(world, target, out);
    line(out, format_args!("{RULE}"));
    if !meshed {
        line(
            out,
            format_args!("Without a sidecar no policy is enforced at this pod; it accepts plaintext only"),
        );
        return;
    }
    mutual_tls(world, pod, out);
    tokens(world, target, out);
    authorization(world, target, out);
}

/// Ids of the rules that proxies enforce, as access logs show them.
fn rules(world: &World, target: Target<'_>, out: &mut String) {
    let ids: Vec<String> = authz::filters(world, target, Form::Http)
        .into_iter()
        .filter(|f| f.action != Action::Log)
        .flat_map(|f| f.rules)
        .map(|r| r.id)
        .collect();
    if !ids.is_empty() {
        line(out, format_args!("RBAC policies: {}", ids.join(", ")));
    }
}

fn mutual_tls(world: &World, pod: &Workload, out: &mut String) {
    let effective = peer_authentication::effective(world, &pod.namespace, &pod.labels);
    line(
        out,
        format_args!(
            "Effective PeerAuthentication:\n   Workload mTLS mode: {}",
            mode_text(effective.workload)
        ),
    );
    if !effective.ports.is_empty() {
        line(out, format_args!("   Port Level mTLS mode:"));
        for (port, mode) in &effective.ports {
            line(out, format_args!("      {port}: {}", mode_text(*mode)));
        }
    }
    let root = world.mesh().root_namespace.as_str();
    let applied: Vec<String> = [Some(root), (pod.namespace != root).then_some(pod.namespace.as_str())]
        .into_iter()
        .flatten()
        .flat_map(|namespace| world.peer_authentications(namespace))
        // A selector in the root namespace selects nothing (S1.10).
        .filter(|p| {
            !p.spec.has_selector()
                || (p.meta.namespace != root && p.spec.selector.as_ref().is_some_and(|s| s.matches(&pod.labels)))
        })
        .map(|p| format!("{}.{}", p.meta.name, p.meta.namespace))
        .collect();
    if !applied.is_empty() {
        line(
            out,
            format_args!("Applied PeerAuthentication:\n   {}", applied.join(", ")),
        );
    }
}

fn tokens(world: &World, target: Target<'_>, out: &mut String) {
    let bound: Vec<_> = request_authentication::bound(world, target).collect();
    if bound.is_empty() {
        return;
    }
    line(out, format_args!("Applied RequestAuthentication:"));
    for policy in bound {
        let issuers: Vec<&str> = policy.spec.jwt_rules.iter().map(|r| r.issuer.as_str()).collect();
        let issuers = if issuers.is_empty() {
            "no issuer".to_string()
        } else {
            format!("issuers {}", issuers.join(", "))
        };
        line(
            out,
            format_args!("   {}.{} ({issuers})", policy.meta.name, policy.meta.namespace),
        );
        if let Some(error) = &policy.broken {
            line(out, format_args!("      WARNING: cannot be read: {error}"));
        }
    }
}

fn authorization(world: &World, target: Target<'_>, out: &mut String) {
    let bound: Vec<_> = authz::bound(world, target).collect();
    if !bound.is_empty() {
        line(out, format_args!("Applied AuthorizationPolicy:"));
    }
    for policy in bound {
        let action = format!("{:?}", policy.spec.action).to_uppercase();
        let dry = if policy
            .meta
            .annotations
            .get("istio.io/dry-run")
            .is_some_and(|v| v == "true")
        {
            ", dry run"
        } else {
            ""
        };
        line(
            out,
            format_args!(
                "   {}.{} ({action}, {} rule(s){dry})",
                policy.meta.name,
                policy.meta.namespace,
                policy.spec.rules.len()
            ),
        );
        for problem in authz::problems(world, policy) {
            line(out, format_args!("      WARNING: {}", problem.message));
        }
    }
}
