//! `mantlet cluster` as a whole: the real program, real `kubectl`, real pods, each test with its own state directory.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cluster, program, text};

mod common;
#[path = "cluster/rootless.rs"]
mod rootless;

/// A rolling update from its start to its end.
fn roll(cluster: &Cluster, workload: &str) {
    let began = std::time::Instant::now();
    cluster.kubectl(&["rollout", "restart", workload]);
    cluster.kubectl(&["rollout", "status", workload, "--timeout=60s"]);
    // kubectl names a restart by its second and refuses two of the same name.
    std::thread::sleep(std::time::Duration::from_millis(1100).saturating_sub(began.elapsed()));
}

/// The process id of the cluster process: the first child of the init inside the sandbox.
fn cluster_process(cluster: &Cluster) -> i32 {
    let launcher = cluster.status().expect("runs")["sandbox_pid"]
        .as_i64()
        .expect("a number");
    let child = |pid: i64| {
        let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("readable");
        list.split_whitespace()
            .next()
            .expect("a child")
            .parse::<i64>()
            .expect("a number")
    };
    i32::try_from(child(child(launcher))).expect("a process id")
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: not within 60 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn up_makes_the_context_current_and_down_restores_the_former_one() {
    let cluster = Cluster::new("context");
    cluster.kubectl(&["config", "set-context", "prod", "--cluster=prod", "--user=prod"]);
    cluster.kubectl(&["config", "use-context", "prod"]);
    cluster.up();
    assert_eq!(
        cluster.kubectl(&["config", "current-context"]),
        format!("mantlet-{}", cluster.name)
    );
    assert_eq!(cluster.kubectl(&["get", "nodes", "-o", "name"]), "node/mantlet");
    assert!(cluster.up().contains("running already"));
    assert!(cluster.mantlet(&["down"]).status.success());
    assert_eq!(cluster.kubectl(&["config", "current-context"]), "prod");
    assert!(cluster.status().is_none());
    assert_eq!(cluster.mantlet(&["status"]).status.code(), Some(1));
}

#[test]
fn a_second_cluster_does_not_collide_and_a_taken_port_is_named() {
    let (first, second) = (Cluster::new("one"), Cluster::new("two"));
    first.up();
    let port = first.status().expect("runs")["port"].to_string();
    let refused = second.mantlet(&["up", "--port", &port]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused).contains(&format!("127.0.0.1:{port} is in use")),
        "{}",
        text(&refused)
    );
    second.up();
    assert_ne!(
        first.status().expect("runs")["port"],
        second.status().expect("runs")["port"]
    );
    first.kubectl(&["create", "ns", "only-here"]);
    assert!(!second.kubectl(&["get", "ns", "-o", "name"]).contains("only-here"));
}

#[test]
fn a_damaged_store_and_damaged_keys_are_explained() {
    let cluster = Cluster::new("damaged");
    cluster.up();
    assert!(cluster.mantlet(&["down"]).status.success());
    let store = cluster.state().join("store.redb");
    std::fs::write(&store, b"this is no database").expect("writable");
    let refused = cluster.mantlet(&["up"]);
    assert_eq!(refused.status.code(), Some(1));
    let message = text(&refused);
    assert!(
        message.contains("store.redb cannot be opened") && message.contains("--purge"),
        "{message}"
    );
    assert!(cluster.mantlet(&["down", "--purge"]).status.success());
    cluster.up();
    assert!(cluster.mantlet(&["down"]).status.success());
    std::fs::write(cluster.state().join("pki/ca.crt"), b"junk").expect("writable");
    let message = text(&cluster.mantlet(&["up"]));
    assert!(message.contains("ca.crt is damaged"), "{message}");
}

#[test]
fn missing_programs_are_named_with_their_packages() {
    let cluster = Cluster::new("bare");
    // Without /usr/sbin and /sbin `nft` and `ip` cannot be found: an empty directory is mounted over them.
    let script = format!(
        "for d in /usr/sbin /sbin /usr/bin/ip /bin/ip; do [ -d $d ] && [ ! -L $d ] && mount -t tmpfs none $d; [ -f $d ] && mount --bind /dev/null $d; done; \
         exec {} cluster up --name {}",
        program().display(),
        cluster.name
    );
    let output = cluster
        .command("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .env("PATH", "/usr/bin:/bin")
        .output()
        .expect("unshare (package util-linux) is needed");
    let message = text(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("the program nft is missing"), "{message}");
    assert!(
        message.contains("sudo apt-get install -y") && message.contains("nftables"),
        "{message}"
    );
}

/// In a user namespace without id maps the process is nobody, who has no subordinate ids.
#[test]
fn a_missing_privilege_is_explained_with_the_administrators_commands() {
    let cluster = Cluster::new("plain");
    let output = cluster
        .command("unshare")
        .args(["--user", "--"])
        .arg(program())
        .args(["cluster", "up", "--name", &cluster.name])
        .output()
        .expect("unshare (package util-linux) is needed");
    let message = text(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("/etc/subuid gives nobody no range of 65536 ids"),
        "{message}"
    );
    assert!(
        message.contains("sudo usermod --add-subuids ") && message.contains(" nobody\n"),
        "{message}"
    );
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_and_pods_run_again() {
    let cluster = Cluster::new("kill");
    cluster.up();
    cluster.kubectl(&[
        "create",
        "deployment",
        "web",
        "--image=mantlet/customers",
        "--port=3000",
    ]);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    for round in 0..3 {
        let mut acknowledged = Vec::new();
        let victim = nix::unistd::Pid::from_raw(cluster_process(&cluster));
        let killer = std::thread::spawn(move || {
            // At a moment that has nothing to do with what is being written.
            std::thread::sleep(Duration::from_millis(150 + 70 * round));
            nix::sys::signal::kill(victim, nix::sys::signal::Signal::SIGKILL).expect("the cluster process lives");
        });
        for number in 0..10_000 {
            let name = format!("round-{round}-{number}");
            let output = cluster
                .command("kubectl")
                .args(["create", "configmap", &name])
                .output()
                .expect("kubectl runs");
            if !output.status.success() {
                break;
            }
            acknowledged.push(name);
        }
        killer.join().expect("kills");
        wait_for("the broker sees the end", || cluster.status().is_none());
        cluster.up();
        let names = cluster.kubectl(&["get", "configmap", "-o", "name"]);
        for name in &acknowledged {
            assert!(
                names.lines().any(|line| line == format!("configmap/{name}")),
                "{name} was acknowledged and is lost"
            );
        }
        cluster.kubectl(&["wait", "--for=condition=Available", "--timeout=30s", "deployment/web"]);
    }
    let pods = cluster.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=web",
        "-o",
        "jsonpath={.items[*].status.phase}",
    ]);
    assert_eq!(pods, "Running");
}

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: mantlet/customers
        readinessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{port: 80, targetPort: 3000, name: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: load}
spec:
  containers: [{name: load, image: python, command: [sleep, infinity]}]
"#;

/// Three rolling updates under load, from a pod through the ClusterIP and from the host through the LoadBalancer: no retry,
/// POST too, on kept and on fresh connections; every request must be answered with 200.
#[test]
fn a_rolling_update_loses_no_request() {
    let cluster = Cluster::new("roll");
    cluster.up();
    cluster.apply(WEB);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", "pod/load"]);
    cluster.kubectl(&[
        "wait",
        "--for=jsonpath={.status.loadBalancer.ingress}",
        "--timeout=30s",
        "service/web",
    ]);
    let address = cluster.kubectl(&[
        "get",
        "service",
        "web",
        "-o",
        "jsonpath={.status.loadBalancer.ingress[0].ip}",
    ]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/load.py");
    let feed = || Stdio::from(std::fs::File::open(script).expect("the script"));
    let inside = cluster
        .command("kubectl")
        .args(["exec", "-i", "load", "--", "python3", "-", "web", "80", "12"])
        .stdin(feed())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs");
    let outside = Command::new("python3")
        .args(["-", &address, "80", "12"])
        .stdin(feed())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is needed");
    for _ in 0..3 {
        roll(&cluster, "deployment/web");
    }
    for (name, child) in [("ClusterIP", inside), ("LoadBalancer", outside)] {
        let output = child.wait_with_output().expect("the load ends");
        let result: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
        let number = |key: &str| result[key].as_u64().expect("a number");
        println!("{name}: {result}");
        assert!(
            number("sent") > 1000,
            "{name}: too few requests to mean anything: {result}"
        );
        assert_eq!(number("sent"), number("ok"), "{name}: {result}");
    }
}

/// The same between two sidecars, over mutual TLS: the control plane, both proxies and the node agent take part.
#[test]
fn a_rolling_update_in_the_mesh_loses_no_request() {
    for name in ["mantletd", "mantlet-proxy"] {
        let path = program().with_file_name(name);
        assert!(
            path.is_file(),
            "{} is missing: cargo build -p mantlet-control -p mantlet-proxy",
            path.display()
        );
    }
    let cluster = Cluster::new("mesh");
    cluster.up();
    let installed = cluster
        .command(program().to_str().expect("UTF-8"))
        .args(["install", "-y"])
        .output()
        .expect("mantlet runs");
    assert!(installed.status.success(), "{}", text(&installed));
    cluster.kubectl(&["label", "ns", "default", "istio-injection=enabled"]);
    cluster.apply(WEB);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/load"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/load.py");
    let load = cluster
        .command("kubectl")
        .args([
            "exec", "-i", "load", "-c", "load", "--", "python3", "-", "web", "80", "20",
        ])
        .stdin(Stdio::from(std::fs::File::open(script).expect("the script")))
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs");
    for _ in 0..2 {
        roll(&cluster, "deployment/web");
    }
    let output = load.wait_with_output().expect("the load ends");
    let result: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    println!("mesh: {result}");
    assert!(
        result["sent"].as_u64() > Some(1000),
        "too few requests to mean anything: {result}"
    );
    assert_eq!(result["sent"], result["ok"], "{result}");
}

#[test]
fn a_service_without_pods_refuses_at_once_and_its_address_comes_and_goes() {
    let cluster = Cluster::new("lb");
    cluster.up();
    cluster.apply(WEB);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    cluster.kubectl(&[
        "wait",
        "--for=jsonpath={.status.loadBalancer.ingress}",
        "--timeout=30s",
        "service/web",
    ]);
    let address = cluster.kubectl(&[
        "get",
        "service",
        "web",
        "-o",
        "jsonpath={.status.loadBalancer.ingress[0].ip}",
    ]);
    let curl = |url: &str| {
        Command::new("curl")
            .args(["-s", "--max-time", "5", url])
            .output()
            .expect("curl is needed")
    };
    assert!(curl(&format!("http://{address}/")).status.success());
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", "pod/load"]);
    cluster.kubectl(&["scale", "deployment/web", "--replicas=0"]);
    wait_for("no endpoint", || {
        cluster
            .kubectl(&["get", "endpoints", "web", "-o", "jsonpath={.subsets[*].addresses}"])
            .is_empty()
    });
    let start = Instant::now();
    let inside = cluster
        .command("kubectl")
        .args(["exec", "load", "--", "curl", "-s", "--max-time", "5", "http://web"])
        .output()
        .expect("kubectl runs");
    assert_eq!(inside.status.code(), Some(7), "{}", text(&inside));
    assert!(start.elapsed() < Duration::from_secs(3));
    cluster.kubectl(&["delete", "service", "web"]);
    wait_for("the host's listener is closed", || {
        curl(&format!("http://{address}/")).status.code() == Some(7)
    });
}

#[test]
fn garbage_is_collected_and_namespaces_are_emptied() {
    let cluster = Cluster::new("gc");
    cluster.up();
    let count = |kind: &str, namespace: &str| {
        cluster
            .kubectl(&["get", kind, "-n", namespace, "-o", "name"])
            .lines()
            .filter(|line| !line.is_empty())
            .count()
    };
    cluster.kubectl(&[
        "create",
        "deployment",
        "web",
        "--image=mantlet/customers",
        "--replicas=2",
    ]);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    cluster.kubectl(&["delete", "deployment", "web", "--cascade=orphan"]);
    assert_eq!((count("replicasets", "default"), count("pods", "default")), (1, 2));
    let set = cluster.kubectl(&["get", "replicasets", "-o", "name"]);
    cluster.kubectl(&["delete", &set, "--cascade=foreground", "--timeout=60s"]);
    assert_eq!(count("pods", "default"), 0);
    cluster.kubectl(&["create", "deployment", "web", "--image=mantlet/customers"]);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    cluster.kubectl(&["delete", "deployment", "web"]);
    wait_for("pods are collected", || {
        count("pods", "default") == 0 && count("replicasets", "default") == 0
    });
    cluster.kubectl(&["create", "ns", "busy"]);
    cluster.kubectl(&["create", "deployment", "web", "--image=mantlet/customers", "-n", "busy"]);
    cluster.kubectl(&["create", "secret", "generic", "s", "-n", "busy"]);
    cluster.kubectl(&["rollout", "status", "deployment/web", "-n", "busy", "--timeout=30s"]);
    cluster.kubectl(&["delete", "ns", "busy", "--timeout=60s"]);
    assert!(!cluster.kubectl(&["get", "ns", "-o", "name"]).contains("busy"));
    // A new namespace of the same name starts empty, but for what every namespace gets.
    cluster.kubectl(&["create", "ns", "busy"]);
    wait_for("the defaults", || {
        count("serviceaccounts", "busy") == 1 && count("configmaps", "busy") == 1
    });
    assert_eq!((count("pods", "busy"), count("secrets", "busy")), (0, 0));
}

#[test]
fn rollouts_can_be_undone_paused_and_recreated() {
    let cluster = Cluster::new("undo");
    cluster.up();
    cluster.apply(WEB);
    let done = || cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    let revision = || {
        cluster.kubectl(&[
            "get",
            "deployment",
            "web",
            "-o",
            r"jsonpath={.metadata.annotations.deployment\.kubernetes\.io/revision}",
        ])
    };
    let image = || {
        cluster.kubectl(&[
            "get",
            "deployment",
            "web",
            "-o",
            "jsonpath={.spec.template.spec.containers[0].image}",
        ])
    };
    done();
    assert_eq!(revision(), "1");
    cluster.kubectl(&["set", "image", "deployment/web", "web=mantlet/customers:2"]);
    done();
    assert_eq!((revision().as_str(), image().as_str()), ("2", "mantlet/customers:2"));
    cluster.kubectl(&["rollout", "undo", "deployment/web"]);
    done();
    assert_eq!((revision().as_str(), image().as_str()), ("3", "mantlet/customers"));
    assert!(cluster.kubectl(&["rollout", "history", "deployment/web"]).contains('3'));
    cluster.kubectl(&["rollout", "pause", "deployment/web"]);
    cluster.kubectl(&["set", "image", "deployment/web", "web=mantlet/customers:4"]);
    wait_for("the pause is seen", || {
        cluster.kubectl(&[
            "get",
            "deployment",
            "web",
            "-o",
            "jsonpath={.status.conditions[?(@.type=='Progressing')].reason}",
        ]) == "DeploymentPaused"
    });
    assert_eq!(revision(), "3");
    cluster.kubectl(&["rollout", "resume", "deployment/web"]);
    done();
    assert_eq!(revision(), "4");
    cluster.kubectl(&[
        "patch",
        "deployment",
        "web",
        "--type=merge",
        "-p",
        r#"{"spec":{"strategy":{"type":"Recreate","rollingUpdate":null}}}"#,
    ]);
    cluster.kubectl(&["rollout", "restart", "deployment/web"]);
    done();
    assert_eq!(revision(), "5");
    // A bad template must not take the working pods away.
    cluster.kubectl(&[
        "patch",
        "deployment",
        "web",
        "--type=merge",
        "-p",
        r#"{"spec":{"strategy":{"type":"RollingUpdate"}}}"#,
    ]);
    cluster.kubectl(&["patch", "deployment", "web", "-p", r#"{"spec":{"template":{"spec":{"containers":[{"name":"web","readinessProbe":{"httpGet":{"path":"/nowhere"}}}]}}}}"#]);
    wait_for("the new pod exists", || {
        cluster.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.updatedReplicas}"]) == "1"
    });
    wait_for("its probe fails", || {
        let reasons = cluster.kubectl(&[
            "get",
            "events",
            "-o",
            "jsonpath={.items[?(@.reason=='Unhealthy')].message}",
        ]);
        reasons.contains("404")
    });
    let available = cluster.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.availableReplicas}"]);
    assert_eq!(available, "2");
}

#[test]
fn jobs_daemon_sets_and_stateful_sets_run() {
    let cluster = Cluster::new("kinds");
    cluster.up();
    cluster.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec:
  completions: 2
  template:
    spec:
      restartPolicy: Never
      containers: [{name: c, image: sh, command: [sh, -c, "echo done"]}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      containers: [{name: c, image: mantlet/customers}]
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 3000}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      containers: [{name: c, image: mantlet/customers}]
"#,
    );
    cluster.kubectl(&["wait", "--for=condition=Complete", "--timeout=30s", "job/once"]);
    assert_eq!(
        cluster.kubectl(&["get", "job", "once", "-o", "jsonpath={.status.succeeded}"]),
        "2"
    );
    cluster.kubectl(&["rollout", "status", "daemonset/agent", "--timeout=30s"]);
    cluster.kubectl(&["rollout", "status", "statefulset/db", "--timeout=30s"]);
    let names = cluster.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=db",
        "-o",
        "jsonpath={.items[*].metadata.name}",
    ]);
    assert_eq!(names, "db-0 db-1");
    let answer = cluster.kubectl(&[
        "exec",
        "db-0",
        "--",
        "curl",
        "-s",
        "http://db-1.db.default.svc.cluster.local:3000/healthz",
    ]);
    assert!(answer.contains("ok"), "{answer}");
}
