//! The mesh under test (`mesh.yaml`) in a cluster of its own, its callers, and what is asked of both.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Cluster, program, text};
use crate::load::Load;
use crate::processes::{Process, tree};

/// Kinds of requests that must be answered, by pod.
pub(crate) const OF_CALLERS: &[&str] = &["get-kept", "post-kept", "get-new", "post-new", "again"];
pub(crate) const OF_PLAIN: &[&str] = &["gateway-kept", "gateway-new"];

const WEB: &str = "web.shop.svc.cluster.local";
const AGAIN: &str = "again.shop.svc.cluster.local";
const GATEWAY: &str = "istio-ingressgateway.istio-system.svc.cluster.local";
const CALLERS: &[(&str, &str)] = &[
    ("shop", "caller-a"),
    ("shop", "caller-b"),
    ("shop", "stranger"),
    ("outside", "plain"),
];

pub(crate) struct Mesh {
    pub(crate) cluster: Cluster,
}

fn source(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/faults")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn kind(name: &str, host: &str, method: &str, path: &str, kept: bool, expect: &str) -> Value {
    json!({
        "name": name, "host": host, "port": 80, "method": method, "path": path, "kept": kept, "expect": expect,
        "every": 0.05, "workers": if expect == "allowed" { 2 } else { 1 },
    })
}

fn through_gateway(name: &str, path: &str, kept: bool, expect: &str) -> Value {
    let mut kind = kind(name, "shop.test", "GET", path, kept, expect);
    kind["via"] = json!(GATEWAY);
    kind
}

/// What a pod sends.
fn kinds(pod: &str) -> Vec<Value> {
    match pod {
        "stranger" => vec![
            kind("stranger-kept", WEB, "GET", "/", true, "denied"),
            kind("stranger-new", WEB, "POST", "/", false, "denied"),
        ],
        "plain" => vec![
            kind("plaintext", WEB, "GET", "/", false, "refused"),
            through_gateway("gateway-kept", "/", true, "allowed"),
            through_gateway("gateway-new", "/", false, "allowed"),
            through_gateway("gateway-path", "/customers", true, "denied"),
        ],
        _ => vec![
            kind("get-kept", WEB, "GET", "/", true, "allowed"),
            kind("post-kept", WEB, "POST", "/", true, "allowed"),
            kind("get-new", WEB, "GET", "/", false, "allowed"),
            kind("post-new", WEB, "POST", "/", false, "allowed"),
            kind("again", AGAIN, "GET", "/", true, "allowed"),
            kind("path", WEB, "GET", "/customers", true, "denied"),
        ],
    }
}

impl Mesh {
    /// A cluster with the mesh and the namespaces, nothing in them. `options` adds to the command line of the installation.
    pub(crate) fn bare(name: &str, options: &dyn Fn(&mut Command)) -> Self {
        for program_name in ["mantletd", "mantlet-proxy"] {
            let path = program().with_file_name(program_name);
            assert!(path.is_file(), "{} is missing: cargo build --bins", path.display());
        }
        let mesh = Self {
            cluster: Cluster::new(name),
        };
        let cluster = &mesh.cluster;
        cluster.up();
        let mut install = cluster.command(program().to_str().expect("UTF-8"));
        install.args(["install", "-y", "--set", "profile=demo"]);
        options(&mut install);
        let installed = install.output().expect("mantlet runs");
        assert!(installed.status.success(), "{}", text(&installed));
        cluster.apply(&source("namespaces.yaml"));
        mesh
    }

    /// A cluster with the mesh, all servers ready, nothing asked yet.
    pub(crate) fn start(name: &str) -> Self {
        let mesh = Self::bare(name, &|_| ());
        let cluster = &mesh.cluster;
        cluster.kubectl(&[
            "scale",
            "-n",
            "istio-system",
            "deployment/istio-ingressgateway",
            "--replicas=2",
        ]);
        cluster.apply(&source("mesh.yaml"));
        for namespace in ["shop", "outside"] {
            let scripts = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "load", "namespace": namespace },
                "data": { "caller.py": source("caller.py"), "hostile.py": source("hostile.py") },
            });
            cluster.apply(&scripts.to_string());
        }
        mesh.rolled_out("shop", "web");
        mesh.rolled_out("istio-system", "istio-ingressgateway");
        mesh
    }

    /// Waits for the end of a rollout.
    pub(crate) fn rolled_out(&self, namespace: &str, deployment: &str) {
        let deployment = format!("deployment/{deployment}");
        self.cluster
            .kubectl(&["rollout", "status", "-n", namespace, &deployment, "--timeout=120s"]);
    }

    /// Starts the callers and waits until each kind of request has had its expected outcome.
    pub(crate) fn load(&self) -> Load {
        for (namespace, pod) in CALLERS {
            self.caller(namespace, pod);
        }
        for (namespace, pod) in CALLERS {
            self.ready(namespace, pod);
        }
        let load = Load::follow(&self.cluster, CALLERS);
        self.answered(&load, 0.0);
        load
    }

    /// Waits until every kind of request has had its expected outcome after `moment`.
    pub(crate) fn answered(&self, load: &Load, moment: f64) {
        load.wait_for(OF_CALLERS, "allowed", moment);
        load.wait_for(OF_PLAIN, "allowed", moment);
        load.wait_for(
            &["path", "stranger-kept", "stranger-new", "gateway-path"],
            "denied",
            moment,
        );
        load.wait_for(&["plaintext"], "refused", moment);
    }

    fn caller(&self, namespace: &str, pod: &str) {
        let account = match pod {
            "stranger" => "stranger",
            "plain" => "default",
            _ => "caller",
        };
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": pod, "namespace": namespace, "labels": { "app": pod },
                "annotations": { "proxy.istio.io/config": r#"{"holdApplicationUntilProxyStarts": true}"# },
            },
            "spec": {
                "serviceAccountName": account,
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "load", "image": "python",
                    "command": ["python3", "-u", "/load/caller.py", json!(kinds(pod)).to_string()],
                    "volumeMounts": [{ "name": "load", "mountPath": "/load" }],
                }],
                "volumes": [{ "name": "load", "configMap": { "name": "load" } }],
            },
        });
        self.cluster.apply(&pod.to_string());
    }

    /// Waits until a pod is ready.
    pub(crate) fn ready(&self, namespace: &str, pod: &str) {
        let pod = format!("pod/{pod}");
        self.cluster
            .kubectl(&["wait", "-n", namespace, "--for=condition=Ready", "--timeout=120s", &pod]);
    }

    /// Names of the pods with a label, in order; those that are going are left out.
    pub(crate) fn pods(&self, namespace: &str, label: &str) -> Vec<String> {
        let list = self
            .cluster
            .kubectl(&["get", "pods", "-n", namespace, "-l", label, "-o", "json"]);
        let list: Value = serde_json::from_str(&list).expect("JSON");
        let pods = list["items"].as_array().expect("a list").iter();
        let living = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let mut names: Vec<String> = living
            .map(|pod| pod["metadata"]["name"].as_str().expect("a name").to_owned())
            .collect();
        names.sort();
        names
    }

    /// Restarts of a container so far.
    pub(crate) fn restarts(&self, namespace: &str, pod: &str, container: &str) -> u64 {
        let pod = self
            .cluster
            .kubectl(&["get", "pod", "-n", namespace, pod, "-o", "json"]);
        let pod: Value = serde_json::from_str(&pod).expect("JSON");
        let statuses = pod["status"]["containerStatuses"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let status = statuses.iter().find(|status| status["name"] == container);
        status
            .and_then(|status| status["restartCount"].as_u64())
            .unwrap_or_default()
    }

    /// Waits until a container that was killed runs again and its pod is ready.
    pub(crate) fn restarted(&self, namespace: &str, pod: &str, container: &str, before: u64) {
        self.wait_until(&format!("{container} of {pod} is started again"), || {
            self.restarts(namespace, pod, container) > before
        });
        self.ready(namespace, pod);
    }

    /// Waits for something to be true.
    pub(crate) fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(120), "{what}: not within 120 s");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Process id of the broker, above all others.
    pub(crate) fn broker(&self) -> i32 {
        let status = self.cluster.status().expect("the cluster runs");
        let broker = status["broker_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        broker.expect("a process id")
    }

    /// All processes of the cluster.
    pub(crate) fn processes(&self) -> Vec<Process> {
        tree(self.broker())
    }

    /// The process of a program in a pod.
    pub(crate) fn process(&self, pod: &str, program: &str) -> Process {
        let all = self.processes();
        let found = all.iter().find(|p| p.place == pod && p.program == program);
        found
            .unwrap_or_else(|| panic!("no {program} in {pod}: {all:?}"))
            .clone()
    }

    /// The control plane's process and its pod.
    pub(crate) fn control_plane(&self) -> (String, Process) {
        let pod = self.pods("istio-system", "app=istiod").remove(0);
        let process = self.process(&pod, "mantletd");
        (pod, process)
    }
}
