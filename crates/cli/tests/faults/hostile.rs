//! Peers that are slow on purpose, and peers that open more connections than a proxy may have.

use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::text;
use crate::mesh::Mesh;
use crate::pause;
use crate::run::Run;

const GATEWAY: &str = "istio-ingressgateway.istio-system.svc.cluster.local";

/// A pod outside the mesh that `hostile.py` runs in.
fn place(mesh: &Mesh) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "hostile", "namespace": "outside" },
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "load", "image": "python", "command": ["sleep", "infinity"],
                "volumeMounts": [{ "name": "load", "mountPath": "/load" }],
            }],
            "volumes": [{ "name": "load", "configMap": { "name": "load" } }],
        },
    });
    mesh.cluster.apply(&pod.to_string());
    mesh.ready("outside", "hostile");
}

fn attack(mesh: &Mesh, host: &str, port: u16, count: u32, seconds: u32, mode: &str) -> Child {
    mesh.cluster
        .command("kubectl")
        .args([
            "exec",
            "-n",
            "outside",
            "hostile",
            "--",
            "python3",
            "/load/hostile.py",
            host,
        ])
        .args([&port.to_string(), &count.to_string(), &seconds.to_string(), mode])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs")
}

fn result(attack: Child) -> Value {
    let output = attack.wait_with_output().expect("kubectl ends");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
}

fn address(mesh: &Mesh, pod: &str) -> String {
    mesh.cluster
        .kubectl(&["get", "pod", "-n", "shop", pod, "-o", "jsonpath={.status.podIP}"])
}

/// Hundreds of peers that send a byte a second hold connections, and nothing else: everybody else is served as before.
pub(crate) fn slow_peers(run: &Run) {
    run.fault("slow peers at a gateway and at a server", |mesh| {
        place(mesh);
        let server = address(mesh, &run.web(1));
        let attacks = [
            attack(mesh, GATEWAY, 80, 150, 6, "head"),
            attack(mesh, GATEWAY, 80, 150, 6, "body"),
            attack(mesh, &server, 3000, 300, 6, "handshake"),
            attack(mesh, &server, 3000, 100, 6, "silent"),
        ];
        for attack in attacks {
            let result = result(attack);
            assert!(result["most"].as_u64() >= Some(100), "the attack was none: {result}");
        }
        vec![]
    });
}

/// Somebody opens more connections to a server's proxy than it may have. It lets wait what is too much and keeps the
/// descriptors that its requests need; it does not spin; new clients are served by the other servers meanwhile; when the
/// peer is gone, so are its connections.
pub(crate) fn connections_exhausted(run: &Run) {
    run.fault("more connections than descriptors at a server", |mesh| {
        place(mesh);
        let pod = run.web(0);
        let process = mesh.process(&pod, "mantlet-proxy");
        let calm = process.usage().expect("it lives");
        let mut attack = attack(mesh, &address(mesh, &pod), 3000, 12_000, 4, "flood");
        let mut most = 0;
        let mut before = calm;
        let mut busiest = 0.0f64;
        while attack.try_wait().expect("a child").is_none() {
            pause(Duration::from_secs(1));
            let usage = process.usage().expect("it lives");
            most = most.max(usage.descriptors);
            busiest = busiest.max((usage.ticks - before.ticks) as f64 / 100.0);
            before = usage;
        }
        let result = result(attack);
        mesh.wait_until("the connections are closed", || {
            process.usage().expect("it lives").descriptors < calm.descriptors + 300
        });
        println!("  {result}; most descriptors of the proxy {most}, its busiest second {busiest:.2} CPU-s");
        let opened = result["most"].as_u64().expect("a count");
        assert!(
            opened > 1000 && most < opened,
            "the attack was none, or the proxy has taken all of it: {result}, {most} descriptors"
        );
        mesh.ready("shop", &pod);
        vec![]
    });
}
