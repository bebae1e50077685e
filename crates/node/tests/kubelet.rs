//! The node agent against the real API server in one process: pods as objects, observed through the API only.

mod support;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Event, Node, Pod, Secret};
use kube::Client;
use kube::api::{Api, AttachParams, DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use mantlet_apiserver::{ApiServer, Identity};
use mantlet_node::controllers::{self, Informers};
use mantlet_node::kubelet::{self, NodeConfig};
use serde_json::{Value, json};
use support::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    support::main(&[
        ("a_pod_runs_with_its_environment_volumes_and_probes", |c| {
            Box::pin(whole_pod(c))
        }),
        ("restart_policies_and_backoff", |c| Box::pin(restarts(c))),
        ("a_failing_liveness_probe_restarts_and_readiness_gates_traffic", |c| {
            Box::pin(liveness(c))
        }),
        ("the_application_ends_before_the_proxy", |c| Box::pin(graceful_stop(c))),
        ("sidecars_start_before_and_end_after_the_application", |c| {
            Box::pin(native_sidecar(c))
        }),
        ("volumes_wait_for_their_sources_and_follow_them", |c| {
            Box::pin(volume_updates(c))
        }),
        ("what_cannot_start_says_why", |c| Box::pin(start_failures(c))),
        ("exec_attach_and_logs_speak_kubectls_protocol", |c| {
            Box::pin(exec_and_logs(c))
        }),
        ("kubectl_has_a_terminal_and_forwards_ports", |c| {
            Box::pin(real_kubectl(c))
        }),
        ("a_killed_shim_is_replaced", |c| Box::pin(killed_shim(c))),
        ("pods_run_again_after_a_restart_of_the_agent", |c| {
            Box::pin(agent_restart(c))
        }),
    ])
}

/// A cluster of API server, controllers and node agent.
struct Cluster {
    client: Client,
    state_dir: PathBuf,
    stop: CancellationToken,
    agent: Option<(CancellationToken, tokio::task::JoinHandle<()>)>,
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Cluster {
    async fn start(context: &Context) -> Self {
        let state_dir = context.state_dir.join(format!("cluster-{}", context.unique()));
        std::fs::create_dir_all(&state_dir).expect("state directory");
        let ca_key = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = params.self_signed(&ca_key).expect("certificate").pem();
        let issuer = rcgen::Issuer::new(params, ca_key);
        let sa_key = rcgen::KeyPair::generate().expect("key").serialize_pem();
        let mut config = mantlet_apiserver::Config::new(state_dir.join("store.redb"), ca.clone(), sa_key);
        config.kubelet_socket = state_dir.join("kubelet.sock");
        let server = ApiServer::open(config).await.expect("API server");
        let client = Client::new(server.service(Identity::admin("test")), "default");
        let stop = CancellationToken::new();
        let informers = Informers::start(&client, &stop);
        let config = controllers::Config {
            root_ca_pem: ca.clone(),
        };
        tokio::spawn(controllers::run(client.clone(), informers, config, stop.clone()));
        let kubeconfig = serve_tls(&server, &issuer, &ca, &state_dir).await;
        let program = context.program.clone();
        let mut cluster = Self {
            client,
            state_dir,
            stop,
            agent: None,
            program,
            kubeconfig,
        };
        cluster.start_agent();
        cluster.node_is_ready().await;
        cluster
    }

    fn start_agent(&mut self) {
        let stop = CancellationToken::new();
        let config = NodeConfig::new(self.client.clone(), self.state_dir.clone(), self.program.clone());
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { kubelet::run(config, stop).await.expect("the node agent runs") }
        });
        self.agent = Some((stop, task));
    }

    async fn stop_agent(&mut self) {
        if let Some((stop, task)) = self.agent.take() {
            stop.cancel();
            task.await.expect("the agent ends");
        }
    }

    async fn node_is_ready(&self) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        until("the node is ready", async || {
            let node = nodes.get_opt("mantlet").await.expect("get");
            let node = serde_json::to_value(node).expect("json");
            condition(&node, "Ready") == "True"
        })
        .await;
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn create(&self, name: &str, spec: Value) {
        let pod = serde_json::from_value(json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}));
        // The default service account is made by a controller.
        let pod: Pod = pod.expect("pod");
        until("the pod can be created", async || {
            match self.pods().create(&PostParams::default(), &pod).await {
                Ok(_) => true,
                Err(kube::Error::Api(status)) if status.code == 403 => false,
                Err(error) => panic!("{error}"),
            }
        })
        .await;
    }

    async fn get(&self, name: &str) -> Value {
        serde_json::to_value(self.pods().get_opt(name).await.expect("get")).expect("json")
    }

    /// Waits until the pod's status fulfils the condition; shows the last one when it does not.
    async fn pod_until(&self, name: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let pod = self.get(name).await;
            if check(&pod) {
                return pod;
            }
            if start.elapsed() > Duration::from_secs(40) {
                let events = self.events(name).await;
                panic!(
                    "{name}: waited too long until {what}; status {:#}\nevents {events:#?}",
                    pod["status"]
                );
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    async fn ready(&self, name: &str) -> Value {
        self.pod_until(name, "it is ready", |pod| condition(pod, "Ready") == "True")
            .await
    }

    async fn events(&self, name: &str) -> Vec<String> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let list = events.list(&ListParams::default()).await.expect("events");
        list.items
            .iter()
            .filter(|e| e.involved_object.name.as_deref() == Some(name))
            .map(|e| {
                format!(
                    "{}: {}",
                    e.reason.as_deref().unwrap_or(""),
                    e.message.as_deref().unwrap_or("")
                )
            })
            .collect()
    }

    async fn event(&self, name: &str, text: &str) {
        let start = Instant::now();
        loop {
            let events = self.events(name).await;
            if events.iter().any(|e| e.contains(text)) {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "no event {text:?} among {events:#?}"
            );
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    async fn exec(&self, pod: &str, container: &str, argv: &[&str]) -> (Value, String) {
        let params = AttachParams::default().container(container).stdout(true).stderr(false);
        let mut session = self.pods().exec(pod, argv.to_vec(), &params).await.expect("exec");
        let status = session.take_status().expect("status");
        let mut text = String::new();
        session
            .stdout()
            .expect("stdout")
            .read_to_string(&mut text)
            .await
            .expect("read");
        let status = status.await.expect("a status at the end");
        (serde_json::to_value(status).expect("json"), text)
    }

    async fn delete_and_wait(&self, name: &str) {
        self.pods()
            .delete(name, &DeleteParams::default())
            .await
            .expect("delete");
        self.pod_until(name, "it is gone", Value::is_null).await;
    }

    async fn end(mut self) {
        self.stop_agent().await;
        self.stop.cancel();
    }
}

/// Serves the API over TLS on a free loopback port; gives a kubeconfig of an administrator.
async fn serve_tls(
    server: &std::sync::Arc<ApiServer>,
    issuer: &rcgen::Issuer<'_, rcgen::KeyPair>,
    ca: &str,
    dir: &std::path::Path,
) -> PathBuf {
    let make = |names: &[&str], organization: Option<&str>| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, "test");
        if let Some(organization) = organization {
            params
                .distinguished_name
                .push(rcgen::DnType::OrganizationName, organization);
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }
        let key = rcgen::KeyPair::generate().expect("key");
        (
            params.signed_by(&key, issuer).expect("certificate").pem(),
            key.serialize_pem(),
        )
    };
    let (cert, key) = make(&["127.0.0.1"], None);
    let tls = server.tls_config(&cert, &key).expect("TLS");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let port = listener.local_addr().expect("address").port();
    let serving = server.clone().serve(listener, tls);
    tokio::spawn(async move {
        let _ = serving.await;
    });
    let (cert, key) = make(&[], Some("system:masters"));
    use base64::Engine;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "t",
        "clusters": [{"name": "t", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority-data": encode(ca)}}],
        "users": [{"name": "t", "user": {"client-certificate-data": encode(&cert), "client-key-data": encode(&key)}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
    });
    let path = dir.join("kubeconfig");
    std::fs::write(&path, config.to_string()).expect("kubeconfig");
    path
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a str {
    object["status"]["conditions"]
        .as_array()
        .and_then(|list| list.iter().find(|c| c["type"] == kind))
        .and_then(|c| c["status"].as_str())
        .unwrap_or("absent")
}

fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .flat_map(|list| pod["status"][*list].as_array().into_iter().flatten())
        .find(|c| c["name"] == name)
        .unwrap_or(&Value::Null)
}

async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !check().await {
        assert!(
            start.elapsed() < Duration::from_secs(40),
            "waited too long until {what}"
        );
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn whole_pod(context: Context) {
    let cluster = Cluster::start(&context).await;
    let map: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "cm"}, "data": {"k": "from-map", "file.txt": "text"}}))
            .expect("map");
    Api::namespaced(cluster.client.clone(), "default")
        .create(&PostParams::default(), &map)
        .await
        .expect("create");
    let secret: Secret =
        serde_json::from_value(json!({"metadata": {"name": "sec"}, "stringData": {"s": "from-secret"}}))
            .expect("secret");
    Api::namespaced(cluster.client.clone(), "default")
        .create(&PostParams::default(), &secret)
        .await
        .expect("create");
    let script = "cat /init/made > /web/index.html; env > /web/env; cp /cm/file.txt /only /web/ ; cat /info/labels > /web/labels; \
        id > /web/id; cut -d. -f2 /var/run/secrets/tokens/t > /web/token; ls -l /var/run/secrets/kubernetes.io/serviceaccount > /web/sa; \
        cat /etc/resolv.conf > /web/resolv; cd /web; exec python3 -m http.server 8080";
    cluster.create("whole", json!({
        "serviceAccountName": "default",
        "securityContext": {"fsGroup": 2000},
        "initContainers": [{"name": "init", "image": "busybox", "command": ["sh", "-c", "echo made > /init/made"],
            "volumeMounts": [{"name": "init", "mountPath": "/init"}]}],
        "containers": [{
            "name": "main", "image": "python:3", "command": ["sh", "-c", script],
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": true, "readOnlyRootFilesystem": true},
            "ports": [{"name": "http", "containerPort": 8080}],
            "env": [
                {"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(NONE)"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}},
                {"name": "SEC", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "s"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            ],
            "envFrom": [{"prefix": "S_", "secretRef": {"name": "sec"}}],
            "resources": {"limits": {"cpu": "1500m"}},
            "readinessProbe": {"httpGet": {"path": "/index.html", "port": "http"}, "periodSeconds": 1},
            "volumeMounts": [
                {"name": "init", "mountPath": "/init", "readOnly": true}, {"name": "web", "mountPath": "/web"},
                {"name": "cm", "mountPath": "/cm"}, {"name": "cm", "mountPath": "/only", "subPath": "k"},
                {"name": "info", "mountPath": "/info"}, {"name": "token", "mountPath": "/var/run/secrets/tokens"},
            ],
        }],
        "volumes": [
            {"name": "init", "emptyDir": {}}, {"name": "web", "emptyDir": {"medium": "Memory"}},
            {"name": "cm", "configMap": {"name": "cm"}},
            {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "audience": "istio-ca", "expirationSeconds": 3600}}]}},
        ],
    })).await;
    let pod = cluster.ready("whole").await;
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(container(&pod, "init")["state"]["terminated"]["reason"], "Completed");
    assert_eq!(condition(&pod, "Initialized"), "True");
    let ip = pod["status"]["podIP"].as_str().expect("address").to_owned();
    let file = async |name: &str| {
        let (status, text) = cluster
            .exec("whole", "main", &["curl", "-sf", &format!("http://{ip}:8080/{name}")])
            .await;
        assert_eq!(status["status"], "Success", "{name}");
        text
    };
    assert_eq!(file("index.html").await, "made\n");
    assert_eq!(file("file.txt").await, "text");
    assert_eq!(file("only").await, "from-map");
    assert_eq!(file("labels").await, "app=\"whole\"");
    assert!(
        file("id")
            .await
            .starts_with("uid=1000(app) gid=1000(app) groups=1000(app),2000")
    );
    assert!(
        file("resolv")
            .await
            .contains("search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10")
    );
    let env = file("env").await;
    for line in [
        "A=1",
        "B=1-$(NONE)",
        &format!("IP={ip}"),
        "MAP=from-map",
        "SEC=from-secret",
        "CPU=2",
        "S_s=from-secret",
        "HOSTNAME=whole",
        "KUBERNETES_SERVICE_HOST=10.96.0.1",
        "KUBERNETES_SERVICE_PORT=443",
    ] {
        assert!(env.lines().any(|l| l == line), "{line} is missing in {env}");
    }
    use base64::Engine;
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(file("token").await.trim())
        .expect("base64");
    let claims: Value = serde_json::from_slice(&claims).expect("claims");
    assert_eq!(claims["aud"], json!(["istio-ca"]));
    assert_eq!(claims["sub"], "system:serviceaccount:default:default");
    assert_eq!(claims["kubernetes.io"]["pod"]["name"], "whole");
    for text in [
        "Pulled: Container image \"python:3\"",
        "Created: Created container: init",
        "Started: Started container main",
    ] {
        cluster.event("whole", text).await;
    }
    cluster.delete_and_wait("whole").await;
    cluster.end().await;
}

async fn restarts(context: Context) {
    let cluster = Cluster::start(&context).await;
    let sh = |script: &str| json!([{"name": "c", "image": "x", "command": ["sh", "-c", script]}]);
    cluster
        .create(
            "crash",
            json!({"containers": sh("echo last words > /dev/termination-log; exit 3")}),
        )
        .await;
    cluster
        .create("done", json!({"restartPolicy": "Never", "containers": sh("exit 0")}))
        .await;
    cluster
        .create("failed", json!({"restartPolicy": "Never", "containers": sh("exit 4")}))
        .await;
    cluster.create("retry", json!({"restartPolicy": "OnFailure", "containers": [{"name": "c", "image": "x",
        "command": ["sh", "-c", "test -e /v/once || { touch /v/once; exit 1; }"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [{"name": "v", "emptyDir": {}}]})).await;
    let pod = cluster
        .pod_until("crash", "it is backing off", |pod| {
            container(pod, "c")["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    assert_eq!(
        container(&pod, "c")["restartCount"],
        1,
        "the first restart comes at once"
    );
    let last = &container(&pod, "c")["lastState"]["terminated"];
    assert_eq!(
        (&last["exitCode"], &last["reason"], &last["message"]),
        (&json!(3), &json!("Error"), &json!("last words\n"))
    );
    assert_eq!(pod["status"]["phase"], "Running");
    cluster
        .event(
            "crash",
            "BackOff: Back-off restarting failed container c in pod crash_default",
        )
        .await;
    let pod = cluster
        .pod_until("done", "it has succeeded", |pod| pod["status"]["phase"] == "Succeeded")
        .await;
    assert_eq!(container(&pod, "c")["state"]["terminated"]["reason"], "Completed");
    assert_eq!(
        pod["status"]["conditions"]
            .as_array()
            .expect("list")
            .iter()
            .find(|c| c["type"] == "Ready")
            .expect("ready")["reason"],
        "PodCompleted"
    );
    let pod = cluster
        .pod_until("failed", "it has failed", |pod| pod["status"]["phase"] == "Failed")
        .await;
    assert_eq!(container(&pod, "c")["state"]["terminated"]["exitCode"], 4);
    let pod = cluster
        .pod_until("retry", "it has succeeded", |pod| pod["status"]["phase"] == "Succeeded")
        .await;
    assert_eq!(container(&pod, "c")["restartCount"], 1);
    cluster.delete_and_wait("done").await;
    // kill -9 of a container's process, as an administrator or the kernel might.
    cluster.create("killed", json!({"containers": [
        {"name": "a", "image": "x", "command": ["sleep", "100"]}, {"name": "b", "image": "x", "command": ["sleep", "200"]}]})).await;
    let before = cluster.ready("killed").await;
    let (status, _) = cluster.exec("killed", "b", &["pkill", "-9", "-f", "^sleep 100$"]).await;
    assert_eq!(status["status"], "Success");
    let pod = cluster
        .pod_until("killed", "it was restarted", |pod| {
            container(pod, "a")["restartCount"] == 1 && condition(pod, "Ready") == "True"
        })
        .await;
    let last = &container(&pod, "a")["lastState"]["terminated"];
    assert_eq!((&last["exitCode"], &last["signal"]), (&json!(137), &json!(9)));
    assert_eq!(
        container(&pod, "b")["containerID"],
        container(&before, "b")["containerID"],
        "the other one goes on"
    );
    cluster.end().await;
}

async fn liveness(context: Context) {
    let cluster = Cluster::start(&context).await;
    cluster.create("live", json!({"terminationGracePeriodSeconds": 1, "containers": [{
        "name": "c", "image": "x", "command": ["sh", "-c", "touch /tmp/ok; exec sleep infinity"],
        "livenessProbe": {"exec": {"command": ["test", "-e", "/tmp/ok"]}, "periodSeconds": 1, "failureThreshold": 2},
        "readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1},
    }]})).await;
    cluster.event("live", "Unhealthy: Readiness probe failed").await;
    assert_eq!(condition(&cluster.get("live").await, "Ready"), "False");
    cluster.exec("live", "c", &["touch", "/tmp/ready"]).await;
    cluster.ready("live").await;
    cluster.exec("live", "c", &["rm", "/tmp/ready"]).await;
    cluster
        .pod_until("live", "it is not ready any more", |pod| {
            condition(pod, "Ready") == "False"
        })
        .await;
    assert_eq!(
        container(&cluster.get("live").await, "c")["restartCount"],
        0,
        "readiness never restarts"
    );
    cluster.exec("live", "c", &["rm", "/tmp/ok"]).await;
    cluster
        .pod_until("live", "it was restarted", |pod| {
            container(pod, "c")["restartCount"] == 1
        })
        .await;
    cluster
        .event("live", "Killing: Container c failed liveness probe, will be restarted")
        .await;
    cluster.end().await;
}

/// Each container writes when it was asked to end; the application takes its time.
async fn graceful_stop(context: Context) {
    let cluster = Cluster::start(&context).await;
    let script = |name: &str, pause: &str| {
        format!(
            "trap 'echo {name}-term >> /v/log; sleep {pause}; echo {name}-end >> /v/log; exit 0' TERM; while :; do sleep 0.02; done"
        )
    };
    let mount = json!([{"name": "v", "mountPath": "/v"}]);
    cluster.create("stop", json!({"terminationGracePeriodSeconds": 10, "volumes": [{"name": "v", "emptyDir": {}}], "containers": [
        {"name": "istio-proxy", "image": "x", "command": ["sh", "-c", script("proxy", "0")], "volumeMounts": mount},
        {"name": "app", "image": "x", "command": ["sh", "-c", script("app", "0.5")], "volumeMounts": mount,
         "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo pre-stop >> /v/log"]}}}},
    ]})).await;
    let pod = cluster.ready("stop").await;
    let uid = pod["metadata"]["uid"].as_str().expect("uid");
    let log = cluster.state_dir.join("pods").join(uid).join("volumes/v/log");
    // A second name for the file outlives the pod's directory.
    let kept = cluster.state_dir.join("kept.log");
    std::fs::write(&log, "").expect("log");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&log, std::fs::Permissions::from_mode(0o666)).expect("mode");
    std::fs::hard_link(&log, &kept).expect("link");
    cluster.delete_and_wait("stop").await;
    let text = std::fs::read_to_string(&kept).expect("log");
    assert_eq!(text, "pre-stop\napp-term\napp-end\nproxy-term\nproxy-end\n");
    assert!(
        !cluster.state_dir.join("pods").join(uid).exists(),
        "nothing of the pod is left"
    );

    cluster
        .create(
            "stubborn",
            json!({"terminationGracePeriodSeconds": 1, "containers": [
        {"name": "c", "image": "x", "command": ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]}]}),
        )
        .await;
    cluster.ready("stubborn").await;
    let start = Instant::now();
    cluster.delete_and_wait("stubborn").await;
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "SIGKILL after the grace period"
    );
    cluster.end().await;
}

async fn native_sidecar(context: Context) {
    let cluster = Cluster::start(&context).await;
    let mount = json!([{"name": "v", "mountPath": "/v"}]);
    cluster
        .create(
            "side",
            json!({"restartPolicy": "Never", "volumes": [{"name": "v", "emptyDir": {}}],
        "initContainers": [
            {"name": "side", "image": "x", "restartPolicy": "Always", "volumeMounts": mount,
             "command": ["sh", "-c", "sleep 0.3; touch /v/up; exec sleep infinity"],
             "startupProbe": {"exec": {"command": ["test", "-e", "/v/up"]}, "periodSeconds": 1}},
            {"name": "check", "image": "x", "command": ["test", "-e", "/v/up"], "volumeMounts": mount},
        ],
        "containers": [{"name": "app", "image": "x", "command": ["test", "-e", "/v/up"], "volumeMounts": mount}]}),
        )
        .await;
    let pod = cluster
        .pod_until("side", "it has succeeded", |pod| pod["status"]["phase"] == "Succeeded")
        .await;
    assert_eq!(
        container(&pod, "check")["state"]["terminated"]["exitCode"],
        0,
        "it ran after the sidecar was up"
    );
    cluster
        .pod_until("side", "its sidecar has ended", |pod| {
            container(pod, "side")["state"]["terminated"].is_object()
        })
        .await;
    cluster.end().await;
}

async fn volume_updates(context: Context) {
    let cluster = Cluster::start(&context).await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
    cluster.create("vol", json!({"containers": [{"name": "c", "image": "x", "command": ["sleep", "infinity"],
        "volumeMounts": [{"name": "m", "mountPath": "/m"}, {"name": "o", "mountPath": "/o"}]}],
        "volumes": [{"name": "m", "configMap": {"name": "later"}}, {"name": "o", "secret": {"secretName": "never", "optional": true}}]})).await;
    cluster
        .event(
            "vol",
            "FailedMount: MountVolume.SetUp failed for volume \"m\" : configmap \"later\" not found",
        )
        .await;
    let map: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "later"}, "data": {"a": "1"}})).expect("map");
    maps.create(&PostParams::default(), &map).await.expect("create");
    cluster.ready("vol").await;
    assert_eq!(cluster.exec("vol", "c", &["sh", "-c", "cat /m/a; ls /o"]).await.1, "1");
    let patch = json!({"data": {"a": "2", "b": "3"}});
    maps.patch("later", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .expect("patch");
    until("the change has arrived", async || {
        cluster.exec("vol", "c", &["sh", "-c", "cat /m/a /m/b"]).await.1 == "23"
    })
    .await;
    cluster.end().await;
}

async fn start_failures(context: Context) {
    let cluster = Cluster::start(&context).await;
    cluster
        .create("noimage", json!({"containers": [{"name": "c", "image": "nginx:1"}]}))
        .await;
    cluster
        .create(
            "nocmd",
            json!({"containers": [{"name": "c", "image": "x", "command": ["nonesuch"]}]}),
        )
        .await;
    cluster
        .create(
            "nosecret",
            json!({"containers": [{"name": "c", "image": "x", "command": ["true"],
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]}]}),
        )
        .await;
    cluster.create("root", json!({"securityContext": {"runAsNonRoot": true}, "containers": [{"name": "c", "image": "x", "command": ["true"]}]})).await;
    cluster.create("host", json!({"containers": [{"name": "c", "image": "x", "command": ["true"]}], "volumes": [{"name": "h", "hostPath": {"path": "/"}}]})).await;
    let reason = |pod: &Value| {
        container(pod, "c")["state"]["waiting"]["reason"]
            .as_str()
            .unwrap_or("")
            .to_owned()
    };
    cluster
        .pod_until("noimage", "it says why", |pod| reason(pod) == "ImagePullBackOff")
        .await;
    cluster.event("noimage", "must name one in `command`").await;
    let pod = cluster
        .pod_until("nocmd", "it backs off", |pod| reason(pod) == "CrashLoopBackOff")
        .await;
    let last = &container(&pod, "c")["lastState"]["terminated"];
    assert_eq!(
        (&last["exitCode"], &last["reason"]),
        (&json!(128), &json!("StartError"))
    );
    assert!(
        last["message"]
            .as_str()
            .expect("text")
            .contains("\"nonesuch\": executable file not found in $PATH"),
        "{last}"
    );
    let pod = cluster
        .pod_until("nosecret", "it says why", |pod| {
            reason(pod) == "CreateContainerConfigError"
        })
        .await;
    assert_eq!(
        container(&pod, "c")["state"]["waiting"]["message"],
        "secret \"absent\" not found"
    );
    let pod = cluster
        .pod_until("root", "it says why", |pod| reason(pod) == "CreateContainerConfigError")
        .await;
    assert_eq!(
        container(&pod, "c")["state"]["waiting"]["message"],
        "container has runAsNonRoot and image will run as root"
    );
    cluster.event("host", "hostPath is not supported by this node").await;
    for name in ["noimage", "nocmd", "nosecret", "root", "host"] {
        cluster.delete_and_wait(name).await;
    }
    cluster.end().await;
}

async fn exec_and_logs(context: Context) {
    let cluster = Cluster::start(&context).await;
    cluster.create("e", json!({"containers": [
        {"name": "c", "image": "x", "command": ["sh", "-c", "for i in 1 2 3; do echo line $i; done; exec sleep infinity"]},
        {"name": "cat", "image": "x", "stdin": true, "command": ["cat"]},
        {"name": "web", "image": "x", "command": ["python3", "-m", "http.server", "--bind", "127.0.0.1", "9000"],
            "readinessProbe": {"exec": {"command": ["curl", "-sf", "http://127.0.0.1:9000/etc/hostname"]}, "periodSeconds": 1}},
    ]})).await;
    cluster.ready("e").await;
    let (status, text) = cluster.exec("e", "c", &["sh", "-c", "echo out; exit 7"]).await;
    assert_eq!(text, "out\n");
    assert_eq!(
        (&status["status"], &status["reason"]),
        (&json!("Failure"), &json!("NonZeroExitCode"))
    );
    assert_eq!(
        status["details"]["causes"][0],
        json!({"reason": "ExitCode", "message": "7"})
    );
    // Both ways, a lot, with a half-close.
    let params = AttachParams::default()
        .container("c")
        .stdin(true)
        .stdout(true)
        .stderr(false);
    let mut session = cluster.pods().exec("e", ["sha256sum"], &params).await.expect("exec");
    let mut stdin = session.stdin().expect("stdin");
    let data = vec![7u8; 3 << 20];
    stdin.write_all(&data).await.expect("write");
    stdin.shutdown().await.expect("close");
    drop(stdin);
    let mut text = String::new();
    session
        .stdout()
        .expect("stdout")
        .read_to_string(&mut text)
        .await
        .expect("read");
    assert!(
        text.starts_with("7cd1ad28a81ad66d4c1e4d5a7a5b5b8f") || text.len() == 68,
        "{text}"
    );
    // A terminal.
    let params = AttachParams::interactive_tty().container("c");
    let mut session = cluster
        .pods()
        .exec("e", ["sh", "-c", "stty size; tty; read x; echo got $x"], &params)
        .await
        .expect("exec");
    session
        .stdin()
        .expect("stdin")
        .write_all(b"word\n")
        .await
        .expect("write");
    let mut text = String::new();
    session
        .stdout()
        .expect("stdout")
        .read_to_string(&mut text)
        .await
        .expect("read");
    assert!(text.contains("/dev/pts/") && text.contains("got word"), "{text}");
    // Logs.
    let log = |params: LogParams| {
        let pods = cluster.pods();
        async move {
            pods.logs(
                "e",
                &LogParams {
                    container: Some("c".into()),
                    ..params
                },
            )
            .await
            .expect("logs")
        }
    };
    assert_eq!(log(LogParams::default()).await, "line 1\nline 2\nline 3\n");
    assert_eq!(
        log(LogParams {
            tail_lines: Some(1),
            ..LogParams::default()
        })
        .await,
        "line 3\n"
    );
    let stamped = log(LogParams {
        timestamps: true,
        tail_lines: Some(1),
        ..LogParams::default()
    })
    .await;
    assert!(
        stamped.ends_with("Z line 3\n") && stamped.starts_with("20"),
        "{stamped}"
    );
    // Attach: what is written comes back through cat.
    let params = AttachParams::default()
        .container("cat")
        .stdin(true)
        .stdout(true)
        .stderr(false);
    let mut session = cluster.pods().attach("e", &params).await.expect("attach");
    let mut stdin = session.stdin().expect("stdin");
    stdin.write_all(b"echo me\n").await.expect("write");
    let mut buffer = [0u8; 8];
    session
        .stdout()
        .expect("stdout")
        .read_exact(&mut buffer)
        .await
        .expect("read");
    assert_eq!(&buffer, b"echo me\n");
    drop(session);
    // A port of the pod's loopback address.
    let mut forward = cluster.pods().portforward("e", &[9000]).await.expect("port-forward");
    let mut stream = forward.take_stream(9000).expect("stream");
    stream
        .write_all(b"GET /etc/hostname HTTP/1.0\r\n\r\n")
        .await
        .expect("write");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("read");
    assert!(
        text.starts_with("HTTP/1.0 200 OK") && text.ends_with("\r\n\r\ne\n"),
        "{text}"
    );
    let error = cluster
        .pods()
        .exec("e", ["ls"], &AttachParams::default().container("nope"))
        .await;
    assert!(error.is_err(), "a container that does not exist");
    cluster.end().await;
}

async fn real_kubectl(context: Context) {
    let cluster = Cluster::start(&context).await;
    cluster.create("k", json!({"containers": [
        {"name": "c", "image": "x", "command": ["sleep", "infinity"]},
        {"name": "web", "image": "x", "command": ["python3", "-m", "http.server", "--bind", "127.0.0.1", "9000"],
            "readinessProbe": {"exec": {"command": ["curl", "-sf", "http://127.0.0.1:9000/etc/hostname"]}, "periodSeconds": 1}},
    ]})).await;
    cluster.ready("k").await;
    let command = |program: &str, args: &[&str]| {
        let mut command = tokio::process::Command::new(program);
        command
            .args(args)
            .env("KUBECONFIG", &cluster.kubeconfig)
            .env("HOME", &cluster.state_dir)
            .kill_on_drop(true);
        command
    };
    // The size of the terminal that kubectl runs in arrives in the container.
    let inner = "until [ \"$(stty size)\" != \"0 0\" ]; do sleep 0.05; done; stty size; tty";
    let outer = format!("stty rows 33 cols 101; kubectl exec -it k -c c -- sh -c '{inner}'");
    let output = command("script", &["-qec", &outer, "/dev/null"])
        .output()
        .await
        .expect("script (package bsdutils)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("33 101\r\n/dev/pts/"), "{text}");
    let output = command("kubectl", &["exec", "k", "-c", "c", "--", "sh", "-c", "exit 42"])
        .output()
        .await
        .expect("kubectl");
    assert_eq!(output.status.code(), Some(42));
    // `kubectl run -i`: input until its end, output, exit code; and a prompt without a newline on a terminal.
    let run = "echo through | kubectl run once -q -i --rm --image=x --restart=Never --command -- sh -c 'cat; exit 3'";
    let output = command("sh", &["-c", run]).output().await.expect("sh");
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(text.starts_with("through\n"), "{text} {errors}");
    assert_eq!(output.status.code(), Some(3), "{text} {errors}");
    let ask = "printf 'prompt> '; read x; echo got $x";
    cluster
        .create(
            "ask",
            json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "x", "stdin": true, "tty": true,
        "command": ["sh", "-c", format!("read start; {ask}")]}]}),
        )
        .await;
    cluster.ready("ask").await;
    let mut attach = command("script", &["-qec", "kubectl attach -q -it ask", "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("script");
    let (mut input, mut output) = (
        attach.stdin.take().expect("stdin"),
        attach.stdout.take().expect("stdout"),
    );
    let mut text = String::new();
    input.write_all(b"\n").await.expect("write");
    let mut buffer = [0u8; 256];
    while !text.contains("prompt> ") {
        let count = output.read(&mut buffer).await.expect("read");
        assert!(count > 0, "ended without a prompt: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    input.write_all(b"word\n").await.expect("write");
    while !text.contains("got word") {
        let count = output.read(&mut buffer).await.expect("read");
        assert!(count > 0, "ended without the answer: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    drop(attach);
    // Many connections through one forwarding, some at a time, and one to a closed port.
    let mut forward = command("kubectl", &["port-forward", "pod/k", ":9000", ":9"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("kubectl");
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(forward.stdout.take().expect("stdout")));
    let mut ports = std::collections::BTreeMap::new();
    while ports.len() < 2 {
        let line = lines
            .next_line()
            .await
            .expect("read")
            .expect("kubectl says where it listens");
        let mut words = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .into_iter()
            .flat_map(|rest| rest.split(" -> "));
        if let (Some(local), Some(remote)) = (words.next(), words.next()) {
            ports.insert(remote.to_owned(), local.to_owned());
        }
    }
    let url = format!("http://127.0.0.1:{}/usr/bin/python3", ports["9000"]);
    let size = std::fs::metadata("/usr/bin/python3").expect("python").len().to_string();
    let mut curls = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let curl = command(
            "curl",
            &["-sS", "-o", "/dev/null", "-w", "%{http_code} %{size_download}", &url],
        )
        .output();
        curls.spawn(curl);
    }
    while let Some(output) = curls.join_next().await {
        let output = output.expect("task").expect("curl");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("200 {size}"),
            "{:?}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let url = format!("http://127.0.0.1:{}/", ports["9"]);
    let output = command("curl", &["-sS", &url]).output().await.expect("curl");
    assert!(!output.status.success(), "nothing listens on port 9 of the pod");
    let mut errors = tokio::io::BufReader::new(forward.stderr.take().expect("stderr"));
    let mut line = String::new();
    tokio::io::AsyncBufReadExt::read_line(&mut errors, &mut line)
        .await
        .expect("read");
    assert!(
        line.contains("failed to connect to localhost:9 inside the pod"),
        "{line}"
    );
    cluster.end().await;
}

/// Pid of a pod's shim, found by its host name.
fn shim_pid(hostname: &str) -> Option<i32> {
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read(entry.path().join("cmdline")).ok()?;
        let args: Vec<_> = command.split(|b| *b == 0).collect();
        (args.get(1) == Some(&b"shim".as_slice()) && args.get(2) == Some(&hostname.as_bytes())).then_some(pid)
    })
}

async fn killed_shim(context: Context) {
    let cluster = Cluster::start(&context).await;
    cluster
        .create(
            "victim",
            json!({"containers": [{"name": "c", "image": "x", "command": ["sleep", "infinity"]}]}),
        )
        .await;
    let before = cluster.ready("victim").await;
    let pid = shim_pid("victim").expect("a shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
    let after = cluster
        .pod_until("victim", "it runs again", |pod| {
            container(pod, "c")["restartCount"] == 1 && condition(pod, "Ready") == "True"
        })
        .await;
    assert_eq!(
        before["status"]["podIP"], after["status"]["podIP"],
        "a pod keeps its address"
    );
    assert_eq!(container(&after, "c")["lastState"]["terminated"]["exitCode"], 137);
    cluster.event("victim", "SandboxChanged").await;
    cluster.end().await;
}

async fn agent_restart(context: Context) {
    let mut cluster = Cluster::start(&context).await;
    cluster.create("again", json!({"containers": [{"name": "c", "image": "x", "command": ["sh", "-c", "echo started; exec sleep infinity"]}]})).await;
    cluster
        .create(
            "once",
            json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "x", "command": ["true"]}]}),
        )
        .await;
    cluster.create("lost", json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "x", "command": ["sleep", "infinity"]}]})).await;
    let before = cluster.ready("again").await;
    cluster.ready("lost").await;
    cluster
        .pod_until("once", "it has succeeded", |pod| pod["status"]["phase"] == "Succeeded")
        .await;
    cluster.stop_agent().await;
    until("the pod has ended with the agent", async || shim_pid("again").is_none()).await;
    cluster.start_agent();
    let after = cluster
        .pod_until("again", "it runs again", |pod| {
            container(pod, "c")["restartCount"] == 1 && condition(pod, "Ready") == "True"
        })
        .await;
    assert_eq!(before["metadata"]["uid"], after["metadata"]["uid"]);
    assert_eq!(before["status"]["podIP"], after["status"]["podIP"]);
    let lost = cluster
        .pod_until("lost", "it has failed", |pod| pod["status"]["phase"] == "Failed")
        .await;
    assert_eq!(
        container(&lost, "c")["state"]["terminated"]["reason"],
        "ContainerStatusUnknown"
    );
    assert_eq!(cluster.get("once").await["status"]["phase"], "Succeeded");
    let previous = LogParams {
        previous: true,
        ..LogParams::default()
    };
    assert_eq!(
        cluster.pods().logs("again", &previous).await.expect("logs"),
        "started\n"
    );
    cluster.end().await;
}
