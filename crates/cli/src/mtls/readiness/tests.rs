//! A server with a client in the mesh, one outside, and rules that turn mutual TLS off.

use mantlet_translate::world::Kind;
use serde_json::{Value, json};

use super::*;

fn object(kind: &str, namespace: &str, name: &str, rest: Value) -> Value {
    let mut object = json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}});
    for (key, value) in rest.as_object().unwrap() {
        if key == "labels" {
            object["metadata"]["labels"] = value.clone();
        } else {
            object[key] = value.clone();
        }
    }
    object
}

/// `server` (port 8080 behind service `server:80`) in the mesh and `legacy` outside.
fn facts() -> Facts {
    let objects = [
        object(
            "Pod",
            "a",
            "server-1",
            json!({"labels": {"app": "server"}, "spec": {"containers": []}}),
        ),
        object(
            "Pod",
            "a",
            "legacy",
            json!({"labels": {"app": "legacy"}, "spec": {"containers": []}}),
        ),
        object(
            "Service",
            "a",
            "server",
            json!({"spec": {"selector": {"app": "server"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}),
        ),
    ];
    let (world, problems) = World::of_objects(&objects, "a");
    assert!(problems.is_empty(), "{problems:?}");
    let pod = |name: &str, meshed: bool| {
        (
            ("a".to_string(), name.to_string()),
            PodFacts {
                meshed,
                ..PodFacts::default()
            },
        )
    };
    Facts {
        world,
        pods: BTreeMap::from([pod("server-1", true), pod("legacy", false)]),
        ..Facts::default()
    }
}

fn flow(source: &str, plaintext: u64, mutual: u64) -> Flow {
    Flow {
        source: source.into(),
        destination: "a/server-1".into(),
        service: "server.a.svc.cluster.local".into(),
        port: None,
        plaintext,
        mutual,
        unit: "requests",
    }
}

fn set(world: &mut World, kind: Kind, name: &str, spec: Value) {
    world.set_config(
        kind,
        &json!({"metadata": {"name": name, "namespace": "a"}, "spec": spec}),
    );
}

#[test]
fn a_port_that_only_speaks_mutual_tls_is_ready() {
    let mut facts = facts();
    facts.flows = vec![flow("a/client", 0, 12)];
    let report = report(&facts, None);
    assert_eq!(
        report.ports,
        [Port {
            workload: "a/server-1".into(),
            port: 8080,
            service: Some("server:80".into()),
            mode: "PERMISSIVE",
            plaintext: 0,
            mutual: 12,
            reasons: Vec::new(),
        }]
    );
    assert!(report.plaintext.is_empty() && report.rules.is_empty() && report.probes.is_empty());
    assert_eq!(report.outside, ["a/legacy"]);
    assert!(super::report(&facts, Some("b")).ports.is_empty());
}

#[test]
fn plaintext_rules_and_probes_are_reasons() {
    let mut facts = facts();
    facts.flows = vec![flow("pod a/legacy (10.0.0.9)", 3, 0), flow("a/client", 0, 1)];
    set(
        &mut facts.world,
        Kind::DestinationRule,
        "off",
        json!({"host": "server", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}),
    );
    facts
        .pods
        .get_mut(&("a".to_string(), "server-1".to_string()))
        .unwrap()
        .probes
        .insert(8080);
    let report = report(&facts, None);
    assert_eq!(report.ports[0].reasons.len(), 3, "{:?}", report.ports[0].reasons);
    assert_eq!(
        report.plaintext[0].to_string(),
        "pod a/legacy (10.0.0.9) -> a/server-1 (server.a.svc.cluster.local): 3 requests"
    );
    assert_eq!(
        report.rules[0].to_string(),
        "DestinationRule a/off: TLS mode DISABLE to server.a.svc.cluster.local:80 (clients in a)"
    );
    assert_eq!(report.probes[0].pod, "a/server-1");
}

#[test]
fn a_rule_that_another_beats_is_no_reason() {
    let mut facts = facts();
    set(
        &mut facts.world,
        Kind::DestinationRule,
        "wide",
        json!({"host": "*.local", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}),
    );
    assert_eq!(report(&facts, None).rules.len(), 1);
    set(
        &mut facts.world,
        Kind::DestinationRule,
        "narrow",
        json!({"host": "server", "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}}),
    );
    assert!(report(&facts, None).rules.is_empty());
}

fn with_strict(mut facts: Facts) -> (World, Facts) {
    let before = facts.world.clone();
    set(
        &mut facts.world,
        Kind::PeerAuthentication,
        "default",
        json!({"mtls": {"mode": "STRICT"}}),
    );
    (before, facts)
}

#[test]
fn strict_breaks_what_sends_plaintext() {
    let mut facts = facts();
    facts.flows = vec![flow("pod a/legacy (10.0.0.9)", 3, 0)];
    let (before, after) = with_strict(facts);
    let changes = changes(&before, &after, None);
    assert_eq!(
        changes.ports,
        [PortChange {
            workload: "a/server-1".into(),
            port: 8080,
            before: "PERMISSIVE",
            after: "STRICT",
        }]
    );
    assert_eq!(
        changes.breaks,
        ["plaintext now: pod a/legacy (10.0.0.9) -> a/server-1 (server.a.svc.cluster.local): 3 requests"]
    );
    assert_eq!(
        changes.risks,
        ["a/legacy has no sidecar; its calls to a/server-1 would be refused"]
    );
}

#[test]
fn strict_breaks_nothing_where_all_is_mutual() {
    let mut facts = facts();
    facts.flows = vec![flow("a/client", 0, 3)];
    facts.pods.remove(&("a".to_string(), "legacy".to_string()));
    let (before, after) = with_strict(facts.clone());
    let found = changes(&before, &after, None);
    assert!(found.breaks.is_empty() && found.risks.is_empty(), "{found:?}");
    // The same policy once more changes nothing.
    let again = changes(&after.world, &after, None);
    assert_eq!(again, Changes::default());
}

#[test]
fn rules_break_even_where_the_mode_stays() {
    let (_, mut after) = with_strict(facts());
    let before = after.world.clone();
    set(
        &mut after.world,
        Kind::DestinationRule,
        "off",
        json!({"host": "server", "trafficPolicy": {"portLevelSettings": [{"port": {"number": 80}, "tls": {"mode": "SIMPLE"}}]}}),
    );
    let found = changes(&before, &after, None);
    assert!(found.ports.is_empty());
    assert!(found.breaks[0].contains("TLS mode SIMPLE"), "{found:?}");
}
