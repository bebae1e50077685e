//! Proxies share what they see alike, and sharing never changes what one of them sees.

mod support;

use std::sync::Arc;

use mantlet_translate::{Translator, translate};
use serde_json::json;
use support::{add, pod, service, sidecar, world};

const SHOP: &str = "outbound|80||shop.a.svc.cluster.local";

fn two_namespaces() -> mantlet_translate::world::World {
    let mut world = world("");
    for (name, namespace, ip, vip) in [
        ("shop", "a", "10.0.0.1", "10.96.0.1"),
        ("bank", "b", "10.0.0.2", "10.96.0.2"),
    ] {
        add(&mut world, &pod(name, namespace, ip, true));
        for object in service(name, namespace, vip, ("http", 80, 8080), ip) {
            add(&mut world, &object);
        }
    }
    world
}

#[test]
fn equal_values_are_one_value_across_proxies_and_revisions() {
    let mut world = two_namespaces();
    let mut translator = Translator::default();
    let (shop, bank) = (
        sidecar("shop-1", "a", "10.0.0.1", &[]),
        sidecar("bank-1", "b", "10.0.0.2", &[]),
    );
    let first = translator.snapshot(&world, &shop);
    let second = translator.snapshot(&world, &bank);
    assert!(Arc::ptr_eq(&first.clusters[SHOP], &second.clusters[SHOP]));
    assert!(
        first.routes["80"] != second.routes["80"],
        "short names differ by namespace"
    );
    // Another service comes: what it does not touch stays the same value.
    for object in service("new", "c", "10.96.0.3", ("http", 80, 8080), "10.0.0.3") {
        add(&mut world, &object);
    }
    let later = translator.snapshot(&world, &shop);
    assert!(Arc::ptr_eq(&first.clusters[SHOP], &later.clusters[SHOP]));
    assert!(!Arc::ptr_eq(&first.routes["80"], &later.routes["80"]));
}

#[test]
fn a_shared_translation_equals_one_made_alone() {
    // Each of these takes a namespace out of what is shared, or changes what is shared.
    let objects = [
        json!({"kind": "DestinationRule", "metadata": {"name": "own", "namespace": "b"},
            "spec": {"host": "shop.a.svc.cluster.local", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}}),
        json!({"kind": "DestinationRule", "metadata": {"name": "theirs", "namespace": "a", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"host": "shop", "exportTo": ["."], "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}}}),
        json!({"kind": "ServiceEntry", "metadata": {"name": "x", "namespace": "b"},
            "spec": {"hosts": ["shop.a.svc.cluster.local"], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"}}),
        json!({"kind": "VirtualService", "metadata": {"name": "v", "namespace": "a"},
            "spec": {"hosts": ["shop"], "exportTo": ["."], "http": [{"redirect": {"uri": "/x"}}]}}),
        json!({"kind": "DestinationRule", "metadata": {"name": "selecting", "namespace": "a"},
            "spec": {"host": "bank.b.svc.cluster.local", "workloadSelector": {"matchLabels": {"app": "shop"}},
                "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL", "sni": "x"}}}}),
        json!({"kind": "PeerAuthentication", "metadata": {"name": "p", "namespace": "a"}, "spec": {"mtls": {"mode": "DISABLE"}}}),
    ];
    let mut world = two_namespaces();
    let mut translator = Translator::default();
    let nodes = [
        sidecar("shop-1", "a", "10.0.0.1", &[]),
        sidecar("bank-1", "b", "10.0.0.2", &[]),
        sidecar("else-1", "c", "10.0.0.3", &[]),
        sidecar("root-1", "istio-system", "10.0.0.4", &[]),
    ];
    let mut seen_difference = 0;
    for object in &objects {
        add(&mut world, object);
        for node in &nodes {
            let shared = translator.snapshot(&world, node);
            assert!(
                shared.to_snapshot() == translate(&world, node),
                "{} after {object}",
                node.id
            );
        }
        let [a, b] = [0, 1].map(|i| translate(&world, &nodes[i]));
        seen_difference += usize::from(a.clusters.get(SHOP) != b.clusters.get(SHOP));
    }
    assert!(seen_difference >= 3, "the cases must tell the namespaces apart");
}
