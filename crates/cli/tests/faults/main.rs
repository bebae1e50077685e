//! Faults under load: processes are killed and stopped, certificates expire, peers are hostile, while callers that never
//! try again ask for what they may have and for what they may not, and a writer changes objects.
//!
//! After each fault is printed, and asserted: no acknowledged write is lost, nobody was let in who must not be, and no
//! request failed where another replica could have answered it. Each fault says which failures cannot be avoided; those are
//! counted apart, and only while they cannot be avoided. `SOAK_SECONDS` makes the test go round for longer and judge the
//! resources of every process (`scripts/soak`).

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod identity;
mod load;
mod mesh;
mod processes;
mod run;
mod soak;
mod writer;

use std::time::Duration;

use load::now;
use mesh::{Mesh, OF_CALLERS, OF_PLAIN};
use run::{Excuse, Run};

/// How long a process stands still.
const STILL: Duration = Duration::from_secs(5);
/// How long the load goes on after a fault before it is judged.
const AFTERWARDS: Duration = Duration::from_millis(1500);

#[test]
fn faults_under_load() {
    let mesh = Mesh::start("faults");
    let run = Run::start(mesh);
    nothing(&run);
    control_plane_killed(&run);
    control_plane_stopped(&run);
    server_proxy_killed(&run);
    server_proxy_stopped(&run);
    client_proxy_killed(&run);
    client_proxy_stopped(&run);
    application_killed(&run);
    application_stopped(&run);
    gateway_killed(&run);
    gateway_stopped(&run);
    shim_stopped(&run);
    shim_killed(&run);
    cluster_process_stopped(&run);
    hostile::slow_peers(&run);
    hostile::connections_exhausted(&run);
    identity::certificates_expire(&run);
    rolling_restart(&run);
    no_endpoint_left(&run);
    cluster_process_killed(&run);
    if let Some(seconds) = run.soak {
        // Memory is judged for processes that live on; so nothing is killed from here on but servers, which a rolling restart
        // replaces in each round.
        let round: [fn(&Run); 11] = [
            control_plane_stopped,
            server_proxy_killed,
            server_proxy_stopped,
            client_proxy_stopped,
            application_killed,
            application_stopped,
            gateway_stopped,
            shim_stopped,
            cluster_process_stopped,
            hostile::slow_peers,
            rolling_restart,
        ];
        for fault in round.iter().cycle() {
            if run.seconds() > seconds {
                break;
            }
            fault(&run);
        }
    }
    run.finish();
}

fn pause(time: Duration) {
    std::thread::sleep(time);
}

fn nothing(run: &Run) {
    run.fault("no fault", |_| {
        pause(Duration::from_secs(3));
        vec![]
    });
}

/// Redundancy: the data path does not need the control plane. Writes of mesh objects are refused while its webhook is away,
/// which is no acknowledgement.
fn control_plane_killed(run: &Run) {
    run.fault("kill -9 of mantletd", |mesh| {
        let (pod, process) = mesh.control_plane();
        let before = mesh.restarts("istio-system", &pod, "discovery");
        process.kill();
        mesh.restarted("istio-system", &pod, "discovery", before);
        vec![]
    });
}

/// As above. A pod that is created meanwhile waits for its sidecar: without an answer of the injector there is no pod.
fn control_plane_stopped(run: &Run) {
    run.fault("SIGSTOP of mantletd, a pod is created meanwhile", |mesh| {
        let (_, process) = mesh.control_plane();
        process.stopped(|| {
            let output = mesh
                .cluster
                .command("kubectl")
                .args([
                    "run",
                    "late",
                    "-n",
                    "shop",
                    "--image=mantlet/customers",
                    "--request-timeout=60s",
                ])
                .output()
                .expect("kubectl runs");
            assert!(
                !output.status.success(),
                "a pod was made without the injector: {}",
                common::text(&output)
            );
        });
        mesh.wait_until("the injector answers again", || {
            let output = mesh
                .cluster
                .command("kubectl")
                .args(["run", "late", "-n", "shop", "--image=mantlet/customers"])
                .output();
            output.is_ok_and(|o| o.status.success())
        });
        mesh.ready("shop", "late");
        let containers = mesh.cluster.kubectl(&[
            "get",
            "pod",
            "-n",
            "shop",
            "late",
            "-o",
            "jsonpath={.spec.containers[*].name}",
        ]);
        assert!(containers.contains("istio-proxy"), "{containers}");
        mesh.cluster
            .kubectl(&["delete", "pod", "-n", "shop", "late", "--wait=false"]);
        vec![]
    });
}

/// How long a busy peer may take to read that a connection is closed, seconds: what it writes until then is lost with it.
const NOTICED: f64 = 0.5;

/// Redundancy: two other servers. A connection that is refused is tried elsewhere; requests that the dead process was
/// handling, or that were written before their proxy read of its end, are lost, unless the mesh may repeat them (`again`).
fn server_proxy_killed(run: &Run) {
    run.fault("kill -9 of a server's proxy", |mesh| {
        let pod = run.web(0);
        let before = mesh.restarts("shop", &pod, "istio-proxy");
        let from = now();
        mesh.process(&pod, "mantlet-proxy").kill();
        let excuse = Excuse::in_flight("handled by the dead proxy", from, now() + NOTICED).but(&["again"]);
        mesh.restarted("shop", &pod, "istio-proxy", before);
        vec![excuse]
    });
}

/// Redundancy: two other servers. Requests that are with the stopped process are answered when it goes on; others go
/// elsewhere once its probe has failed. None fails.
fn server_proxy_stopped(run: &Run) {
    run.fault("SIGSTOP of a server's proxy", |mesh| {
        mesh.process(&run.web(1), "mantlet-proxy").stopped(|| pause(STILL));
        mesh.ready("shop", &run.web(1));
        vec![]
    });
}

/// No redundancy for this one caller: all of its requests fail until its proxy is back, and none goes past it. Others do
/// not notice.
fn client_proxy_killed(run: &Run) {
    run.fault("kill -9 of a client's proxy", |mesh| {
        let before = mesh.restarts("shop", "caller-a", "istio-proxy");
        let from = now();
        mesh.process("caller-a", "mantlet-proxy").kill();
        mesh.restarted("shop", "caller-a", "istio-proxy", before);
        vec![Excuse::until("its only proxy is away", from, now()).of_pods(&["caller-a"])]
    });
}

/// The caller's requests wait.
fn client_proxy_stopped(run: &Run) {
    run.fault("SIGSTOP of a client's proxy", |mesh| {
        mesh.process("caller-b", "mantlet-proxy").stopped(|| pause(STILL));
        vec![]
    });
}

/// Redundancy: two other servers, from the moment on that the mesh knows: the proxy of the dead application answers 503,
/// which a client's proxy may repeat elsewhere only if its route says so (`again`: no failure).
fn application_killed(run: &Run) {
    run.fault("kill -9 of an application", |mesh| {
        let pod = run.web(1);
        let before = mesh.restarts("shop", &pod, "web");
        let from = now();
        mesh.process(&pod, "mantlet-samples").kill();
        mesh.restarted("shop", &pod, "web", before);
        vec![Excuse::until("its proxy answers for the dead application", from, now()).but(&["again"])]
    });
}

/// Redundancy: two other servers; as with the stopped proxy.
fn application_stopped(run: &Run) {
    run.fault("SIGSTOP of an application", |mesh| {
        mesh.process(&run.web(2), "mantlet-samples").stopped(|| pause(STILL));
        mesh.ready("shop", &run.web(2));
        vec![]
    });
}

/// Redundancy: a second gateway, once the Service has lost the first. Between the outsider and the gateways there is no
/// proxy that could try again.
fn gateway_killed(run: &Run) {
    run.fault("kill -9 of an ingress gateway", |mesh| {
        let pod = mesh.pods("istio-system", "app=istio-ingressgateway").remove(0);
        let before = mesh.restarts("istio-system", &pod, "istio-proxy");
        let from = now();
        mesh.process(&pod, "mantlet-proxy").kill();
        mesh.restarted("istio-system", &pod, "istio-proxy", before);
        vec![Excuse::until("connected to the dead gateway", from, now()).of_kinds(OF_PLAIN)]
    });
}

/// Requests that are with the stopped gateway wait.
fn gateway_stopped(run: &Run) {
    run.fault("SIGSTOP of an ingress gateway", |mesh| {
        let pod = mesh.pods("istio-system", "app=istio-ingressgateway").remove(1);
        mesh.process(&pod, "mantlet-proxy").stopped(|| pause(STILL));
        mesh.ready("istio-system", &pod);
        vec![]
    });
}

/// Nobody reads what the pod's containers print: the proxy's log fills its pipe. The data path must not wait for it.
fn shim_stopped(run: &Run) {
    run.fault("SIGSTOP of a server's shim: its logs are not read", |mesh| {
        let pod = run.web(0);
        // Every frame of every connection is a line now, from the threads that carry the traffic.
        let level = |level: &str| {
            let path = format!("logging?level={level}");
            let command = [
                "exec",
                "-n",
                "shop",
                &pod,
                "-c",
                "istio-proxy",
                "--",
                "pilot-agent",
                "request",
                "POST",
                &path,
            ];
            mesh.cluster.kubectl(&command);
        };
        level("default:info,h2:debug");
        mesh.process(&pod, "shim").stopped(|| pause(2 * STILL));
        level("default:info");
        vec![]
    });
}

/// Redundancy: two other servers. The pod's processes end with their pid 1 and are started anew: a connection that was begun
/// before the mesh knew may reach the new proxy before its application is there.
fn shim_killed(run: &Run) {
    run.fault("kill -9 of a server's shim", |mesh| {
        let pod = run.web(2);
        let before = mesh.restarts("shop", &pod, "istio-proxy");
        let from = now();
        let proxy = mesh.process(&pod, "mantlet-proxy");
        mesh.process(&pod, "shim").kill();
        mesh.wait_until("the proxy ends with its pod", || !proxy.alive());
        mesh.restarted("shop", &pod, "istio-proxy", before);
        vec![Excuse::until("with the dead pod, or before its application is back", from, now()).but(&["again"])]
    });
}

/// The API server, the controllers, the node agent and DNS stand still: nothing of the data path needs them.
fn cluster_process_stopped(run: &Run) {
    run.fault("SIGSTOP of the cluster process", |mesh| {
        let all = mesh.processes();
        let process = all
            .iter()
            .find(|p| p.place == "cluster process")
            .expect("the cluster process");
        process.stopped(|| pause(STILL));
        vec![]
    });
}

/// Redundancy: the old pods serve until the new ones are ready.
fn rolling_restart(run: &Run) {
    run.fault("rolling restart of the servers", |mesh| {
        mesh.cluster
            .kubectl(&["rollout", "restart", "-n", "shop", "deployment/web"]);
        mesh.rolled_out("shop", "web");
        vec![]
    });
}

/// No redundancy: every request fails, with the answer for that, and none is let through. Requests under way when the
/// servers are told to end are answered.
fn no_endpoint_left(run: &Run) {
    run.fault("scale to no server, then to three", |mesh| {
        let from = now();
        mesh.cluster
            .kubectl(&["scale", "-n", "shop", "deployment/web", "--replicas=0"]);
        mesh.wait_until("no server is left", || mesh.pods("shop", "app=web").is_empty());
        run.load.wait_for(OF_CALLERS, "failed", from);
        run.load.wait_for(OF_PLAIN, "failed", from);
        mesh.cluster
            .kubectl(&["scale", "-n", "shop", "deployment/web", "--replicas=3"]);
        mesh.rolled_out("shop", "web");
        mesh.answered(&run.load, now());
        vec![Excuse::until("there is no server", from, now()).saying("503 no healthy upstream")]
    });
}

/// No redundancy: with the cluster process everything in its namespaces ends. What was acknowledged must be there after
/// the next start, and nobody may be let in while everything starts at once.
fn cluster_process_killed(run: &Run) {
    run.fault("kill -9 of the cluster process, then `cluster up`", |mesh| {
        let from = now();
        let all = mesh.processes();
        all.iter()
            .find(|p| p.place == "cluster process")
            .expect("the cluster process")
            .kill();
        mesh.wait_until("the broker sees the end", || mesh.cluster.status().is_none());
        mesh.cluster.up();
        mesh.rolled_out("istio-system", "istiod");
        mesh.rolled_out("shop", "web");
        mesh.answered(&run.load, now());
        vec![Excuse::until("there is no cluster", from, now())]
    });
}
