//! From a pod's specification to what a container is started with.

use super::*;
use serde_json::json;

fn spec(value: serde_json::Value) -> (PodSpec, Container) {
    let spec: PodSpec = serde_json::from_value(value).expect("pod spec");
    let container = spec.containers[0].clone();
    (spec, container)
}

fn caps(names: &[&str]) -> Caps {
    names.iter().fold(Caps(0), |set, name| set.with(name).expect("known"))
}

#[test]
fn a_container_that_asks_for_nothing_cannot_escalate() {
    let (spec, container) = spec(json!({"containers": [{"name": "a"}]}));
    let got = identity(&spec, &container).expect("identity");
    assert_eq!((got.uid, got.gid), (0, 0));
    assert!(got.no_new_privs && got.seccomp);
    assert_eq!(got.caps, Caps::container_default());
}

#[test]
fn the_sidecar_and_its_init_container_get_what_the_injector_asks_for() {
    let (spec, container) = spec(json!({"containers": [{"name": "istio-init", "securityContext": {
        "allowPrivilegeEscalation": false, "capabilities": {"add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"]},
        "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": false}}]}));
    let got = identity(&spec, &container).expect("identity");
    assert_eq!(got.caps, caps(&["NET_ADMIN", "NET_RAW"]));
    let (spec, container) = self::spec(
        json!({"securityContext": {"fsGroup": 1337}, "containers": [{"name": "istio-proxy",
        "securityContext": {"privileged": true, "allowPrivilegeEscalation": true, "capabilities": {"drop": ["ALL"]},
        "runAsUser": 1337, "runAsGroup": 1337, "runAsNonRoot": true}}]}),
    );
    let got = identity(&spec, &container).expect("identity");
    assert_eq!(
        (got.uid, got.gid, got.groups.as_slice()),
        (1337, 1337, [1337].as_slice())
    );
    assert!(!got.no_new_privs && got.caps == Caps::ALL);
}

#[test]
fn contradictions_and_unknown_names_are_refused() {
    let error = |context: serde_json::Value| {
        let (spec, container) = spec(json!({"containers": [{"name": "a", "securityContext": context}]}));
        identity(&spec, &container).expect_err("must be refused")
    };
    assert_eq!(
        error(json!({"runAsNonRoot": true})),
        "container has runAsNonRoot and image will run as root"
    );
    assert_eq!(
        error(json!({"capabilities": {"add": ["FLY"]}})),
        "unknown capability \"FLY\""
    );
    assert!(error(json!({"privileged": true, "allowPrivilegeEscalation": false})).contains("privileged"));
    assert!(error(json!({"runAsUser": 70000})).contains("runAsUser 70000"));
}

#[test]
fn resolv_conf_follows_the_dns_policy() {
    let cluster = ClusterFacts {
        dns_server: "10.96.0.10".into(),
        cluster_domain: "cluster.local".into(),
        service_host: "10.96.0.1".into(),
        service_port: 443,
    };
    let (plain, _) = spec(json!({"containers": [{"name": "a"}]}));
    assert_eq!(
        resolv_conf(&plain, "ns", &cluster),
        "search ns.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    );
    let (own, _) = spec(json!({"dnsPolicy": "None", "containers": [{"name": "a"}],
        "dnsConfig": {"nameservers": ["1.2.3.4"], "options": [{"name": "ndots", "value": "1"}]}}));
    assert_eq!(
        resolv_conf(&own, "ns", &cluster),
        "nameserver 1.2.3.4\noptions ndots:1\n"
    );
}
