//! Which PeerAuthentication wins: tables for S1.1–S1.16.

mod support;

use std::collections::BTreeMap;

use mantlet_translate::peer_authentication::Mode::{self, Disable, Permissive, Strict};
use mantlet_translate::peer_authentication::{effective, namespace_mode};
use mantlet_translate::world::{Kind, World};
use support::world;

fn policy(name: &str, namespace: &str, age: u32, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  \
         creationTimestamp: 2026-01-01T00:00:{age:02}Z\nspec: {spec}\n---\n"
    )
}

fn modes(world: &World, namespace: &str, labels: &[(&str, &str)]) -> (Mode, Vec<(u16, Mode)>) {
    let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let effective = effective(world, namespace, &labels);
    (effective.workload, effective.ports.into_iter().collect())
}

const ROOT: &str = "istio-system";
const WEB: [(&str, &str); 1] = [("app", "web")];

#[test]
fn levels_from_weak_to_strong() {
    let mesh = policy("m", ROOT, 1, "{mtls: {mode: STRICT}}");
    let space = policy("wide", "a", 1, "{mtls: {mode: DISABLE}}");
    let work = policy(
        "w",
        "a",
        1,
        "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}, 9090: {}}}",
    );
    for (yaml, want) in [
        (String::new(), (Permissive, vec![])),
        (mesh.clone(), (Strict, vec![])),
        (format!("{mesh}{space}"), (Disable, vec![])),
        (
            format!("{mesh}{space}{work}"),
            (Permissive, vec![(8080, Strict), (9090, Permissive)]),
        ),
    ] {
        assert_eq!(modes(&world(&yaml), "a", &WEB), want, "{yaml}");
    }
    // Another workload of the namespace, and another namespace.
    let all = world(&format!("{mesh}{space}{work}"));
    assert_eq!(modes(&all, "a", &[("app", "other")]), (Disable, vec![]));
    assert_eq!(modes(&all, "b", &WEB), (Strict, vec![]));
}

#[test]
fn unset_inherits() {
    for unset in ["{}", "{mtls: {}}", "{mtls: {mode: UNSET}}"] {
        let mesh = policy("m", ROOT, 1, unset);
        assert_eq!(namespace_mode(&world(&mesh), "a"), Some(Permissive), "S1.6 {unset}");
        let strict = policy("m", ROOT, 1, "{mtls: {mode: STRICT}}");
        let space = policy("wide", "a", 1, unset);
        assert_eq!(
            namespace_mode(&world(&format!("{strict}{space}")), "a"),
            Some(Strict),
            "S1.7 {unset}"
        );
        assert_eq!(
            namespace_mode(&world(&space), "a"),
            Some(Permissive),
            "S1.7 without mesh {unset}"
        );
    }
    assert_eq!(namespace_mode(&world(""), "a"), None);
    let work = policy(
        "w",
        "a",
        1,
        "{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: UNSET}}}",
    );
    let space = policy("wide", "a", 1, "{mtls: {mode: STRICT}}");
    assert_eq!(
        modes(&world(&format!("{space}{work}")), "a", &WEB),
        (Strict, vec![(80, Strict)]),
        "S1.8"
    );
}

#[test]
fn only_the_oldest_counts_and_deletion_falls_back() {
    let yaml = policy("young", "a", 9, "{mtls: {mode: STRICT}}")
        + &policy("old", "a", 1, "{mtls: {mode: DISABLE}}")
        + &policy("middle", "a", 5, "{mtls: {mode: PERMISSIVE}}");
    let mut all = world(&yaml);
    assert_eq!(namespace_mode(&all, "a"), Some(Disable));
    let effect = all.remove_config(Kind::PeerAuthentication, "a", "old");
    assert!(!effect.is_none());
    assert_eq!(namespace_mode(&all, "a"), Some(Permissive), "S1.16");
    // Equal age: by name.
    let tie = policy("b", "a", 1, "{mtls: {mode: STRICT}}") + &policy("a", "a", 1, "{mtls: {mode: DISABLE}}");
    assert_eq!(namespace_mode(&world(&tie), "a"), Some(Disable), "G1");
}

#[test]
fn the_oldest_is_not_completed_by_younger_ones() {
    let yaml = policy("old", "a", 1, "{}") + &policy("young", "a", 2, "{mtls: {mode: STRICT}}");
    assert_eq!(namespace_mode(&world(&yaml), "a"), Some(Permissive), "S1.3");
    let yaml = policy(
        "old",
        "a",
        1,
        "{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: DISABLE}}}",
    ) + &policy(
        "young",
        "a",
        2,
        "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {81: {mode: STRICT}}}",
    );
    assert_eq!(
        modes(&world(&yaml), "a", &WEB),
        (Permissive, vec![(80, Disable)]),
        "S1.4"
    );
}

#[test]
fn a_selector_in_the_root_namespace_counts_nowhere() {
    let yaml = policy(
        "m",
        ROOT,
        1,
        "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}",
    );
    let all = world(&yaml);
    assert_eq!(modes(&all, "a", &WEB).0, Permissive, "S1.10");
    assert_eq!(modes(&all, ROOT, &WEB).0, Permissive, "S1.10");
    // An empty selector is no selector (G2).
    let yaml = policy("m", ROOT, 1, "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}");
    assert_eq!(modes(&world(&yaml), "a", &WEB).0, Strict);
}

#[test]
fn port_modes_of_wide_policies_are_ignored() {
    let yaml = policy(
        "wide",
        "a",
        1,
        "{mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}}",
    );
    assert_eq!(modes(&world(&yaml), "a", &WEB), (Strict, vec![]), "S1.9");
}

#[test]
fn a_policy_that_cannot_be_read_is_strict_on_its_target() {
    let yaml = policy(
        "w",
        "a",
        1,
        "{selector: {matchLabels: {app: web}}, mtls: {mode: SOMETIMES}}",
    );
    let all = world(&yaml);
    assert_eq!(modes(&all, "a", &WEB).0, Strict);
    assert_eq!(modes(&all, "a", &[("app", "other")]).0, Permissive);
}

#[test]
fn a_port_mode_is_of_the_workloads_port_whatever_services_call_it() {
    let services = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: a}\n\
                    spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n---\n";
    let by = |port: u16| {
        let spec = format!(
            "{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: STRICT}}, portLevelMtls: {{{port}: {{mode: DISABLE}}}}}}"
        );
        let world = world(&format!("{services}{}", policy("p", "a", 1, &spec)));
        let node = support::sidecar("web-1", "a", "10.0.0.2", &[("app", "web")]);
        let snapshot = mantlet_translate::translate(&world, &node);
        let listener = &snapshot.listeners["virtualInbound"];
        let plain = |number: u16| {
            let mut chains = listener.all_chains();
            chains.any(|c| c.matches.destination_port == Some(number) && c.tls.is_none())
        };
        (plain(8080), plain(80))
    };
    assert_eq!(by(8080), (true, false), "S1.11: the target port counts");
    assert_eq!(
        by(80),
        (false, true),
        "S1.12: a port of no service has the mode that its key says"
    );
}

#[test]
fn gateways_do_not_look_at_peer_authentication() {
    let gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: istio-system}\n\
                   spec: {selector: {istio: ingress}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n---\n";
    let node = support::router("gw-1", ROOT, "10.0.0.8", &[("istio", "ingress")]);
    let listeners = |yaml: &str| mantlet_translate::translate(&world(yaml), &node).listeners;
    let strict = policy("m", ROOT, 1, "{mtls: {mode: STRICT}}");
    let with = listeners(&format!("{gateway}{strict}"));
    assert!(!with.is_empty());
    assert_eq!(listeners(gateway), with, "S1.15");
}
