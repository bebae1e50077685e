//! Admission webhooks over real TLS, and pod streams to a node agent's socket.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use common::{Ca, config};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mantlet_apiserver::{ApiServer, BoxIo, Dial, DialTarget, Identity};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::ServiceExt;

const B64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

/// Sends every pod address to one local listener and notes what was dialled.
struct ToLocal {
    address: SocketAddr,
    dialled: std::sync::Mutex<Vec<DialTarget>>,
}

impl Dial for ToLocal {
    fn dial(&self, target: DialTarget) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<BoxIo>> + Send>> {
        self.dialled.lock().unwrap().push(target);
        let address = self.address;
        Box::pin(async move { Ok(Box::new(tokio::net::TcpStream::connect(address).await?) as BoxIo) })
    }
}

struct Hooked {
    server: Arc<ApiServer>,
    dialer: Arc<ToLocal>,
    calls: Arc<AtomicUsize>,
    ca: Ca,
    listener: Option<tokio::task::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Hooked {
    /// A server with a webhook behind Service `hook` in namespace `default`, answering by `answer`.
    async fn new(answer: impl Fn(&Value, &str) -> Value + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::new("hook-ca");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialer = Arc::new(ToLocal {
            address: listener.local_addr().unwrap(),
            dialled: Default::default(),
        });
        let (cert, key) = ca.server(&["hook.default.svc"]);
        let calls = Arc::new(AtomicUsize::new(0));
        let listener = serve(listener, &cert, &key, Arc::new(answer), calls.clone());
        let mut config = config(dir.path(), &Ca::new("cluster-ca"));
        config.dialer = Some(dialer.clone());
        let server = ApiServer::open(config).await.unwrap();
        let h = Self {
            server,
            dialer,
            calls,
            ca,
            listener: Some(listener),
            _dir: dir,
        };
        h.ok(
            "/api/v1/namespaces/default/serviceaccounts",
            json!({"metadata": {"name": "default"}}),
        )
        .await;
        h.ok("/api/v1/namespaces/default/services", json!({"metadata": {"name": "hook"}, "spec": {"ports": [{"name": "https", "port": 443, "targetPort": 15017}]}})).await;
        h
    }

    async fn endpoints(&self) {
        self.ok("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", json!({
            "metadata": {"name": "hook-1", "labels": {"kubernetes.io/service-name": "hook"}}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.0.9"], "conditions": {"ready": false}}, {"addresses": ["10.244.0.7"], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": 15017, "protocol": "TCP"}],
        })).await;
    }

    fn bundle(&self) -> String {
        B64.encode(&self.ca.pem)
    }

    async fn configure(&self, kind: &str, hook: Value) {
        let plural = format!("{}s", kind.to_lowercase());
        let mut base = json!({
            "name": "hook.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": {"service": {"name": "hook", "namespace": "default", "path": "/inject"}, "caBundle": self.bundle()},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
        });
        for (k, v) in hook.as_object().unwrap() {
            base[k] = v.clone();
        }
        self.ok(
            &format!("/apis/admissionregistration.k8s.io/v1/{plural}"),
            json!({"metadata": {"name": kind.to_lowercase()}, "webhooks": [base]}),
        )
        .await;
    }

    async fn send(&self, method: Method, path: &str, body: Value) -> (u16, Value, Vec<String>) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json")
            .body(Full::new(bytes::Bytes::from(body.to_string())))
            .unwrap();
        let response = self
            .server
            .service(Identity::admin("test"))
            .oneshot(request)
            .await
            .unwrap();
        let code = response.status().as_u16();
        let warnings = response
            .headers()
            .get_all("warning")
            .iter()
            .map(|v| v.to_str().unwrap().to_owned())
            .collect();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice(&bytes).unwrap(), warnings)
    }

    async fn ok(&self, path: &str, body: Value) -> Value {
        let (code, v, _) = self.send(Method::POST, path, body).await;
        assert_eq!(code, 201, "{path}: {v}");
        v
    }

    async fn pod(&self, name: &str, labels: Value) -> (u16, Value, Vec<String>) {
        let body = json!({"metadata": {"name": name, "labels": labels}, "spec": {"containers": [{"name": "app", "image": "i"}]}});
        self.send(Method::POST, "/api/v1/namespaces/default/pods", body).await
    }
}

type Answer = Arc<dyn Fn(&Value, &str) -> Value + Send + Sync>;

fn serve(
    listener: TcpListener,
    cert: &str,
    key: &str,
    answer: Answer,
    calls: Arc<AtomicUsize>,
) -> tokio::task::JoinHandle<()> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            CertificateDer::pem_slice_iter(cert.as_bytes())
                .collect::<Result<_, _>>()
                .unwrap(),
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, answer, calls) = (acceptor.clone(), answer.clone(), calls.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let (answer, calls) = (answer.clone(), calls.clone());
                    async move {
                        calls.fetch_add(1, Ordering::SeqCst);
                        let path = request.uri().to_string();
                        let bytes = request.into_body().collect().await.unwrap().to_bytes();
                        let review: Value = serde_json::from_slice(&bytes).unwrap();
                        let mut response = answer(&review["request"], &path);
                        if response["uid"].is_null() {
                            response["uid"] = review["request"]["uid"].clone();
                        }
                        let body = json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response});
                        Ok::<_, std::convert::Infallible>(Response::new(Full::new(bytes::Bytes::from(
                            body.to_string(),
                        ))))
                    }
                });
                let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    })
}

fn patch(operations: Value) -> Value {
    json!({"allowed": true, "patchType": "JSONPatch", "patch": B64.encode(operations.to_string())})
}

#[tokio::test]
async fn a_webhook_injects() {
    let h = Hooked::new(|request, path| {
        assert_eq!(path, "/inject?timeout=10s");
        assert_eq!((request["operation"].as_str(), request["namespace"].as_str()), (Some("CREATE"), Some("default")));
        assert_eq!(request["userInfo"]["username"], "test");
        assert_eq!(request["object"]["spec"]["restartPolicy"], "Always", "defaults come first");
        let mut answer = patch(json!([{"op": "add", "path": "/spec/containers/-", "value": {"name": "istio-proxy", "image": "mantlet/proxyv2"}}]));
        answer["warnings"] = json!(["mind the sidecar"]);
        answer
    })
    .await;
    h.endpoints().await;
    h.configure("MutatingWebhookConfiguration", json!({"namespaceSelector": {"matchLabels": {"istio-injection": "enabled"}},
        "objectSelector": {"matchExpressions": [{"key": "sidecar.istio.io/inject", "operator": "NotIn", "values": ["false"]}]}})).await;
    let (code, plain, _) = h.pod("plain", json!({})).await;
    assert_eq!((code, plain["spec"]["containers"].as_array().unwrap().len()), (201, 1));
    assert_eq!(h.calls.load(Ordering::SeqCst), 0, "the namespace is not labelled");

    let label = json!({"metadata": {"labels": {"istio-injection": "enabled"}}});
    let request = Request::patch("/api/v1/namespaces/default")
        .header("content-type", "application/merge-patch+json")
        .body(Full::new(bytes::Bytes::from(label.to_string())))
        .unwrap();
    assert_eq!(
        h.server.service_as_admin().oneshot(request).await.unwrap().status(),
        200
    );
    let (code, injected, warnings) = h.pod("injected", json!({})).await;
    assert_eq!(code, 201, "{injected}");
    let containers = injected["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 2);
    assert_eq!(
        containers[1]["imagePullPolicy"], "Always",
        "what a webhook adds gets defaults too"
    );
    let mounts = |c: &Value| c["volumeMounts"][0]["name"].as_str().unwrap().to_owned();
    assert_eq!(
        mounts(&containers[0]),
        mounts(&containers[1]),
        "and the same token volume"
    );
    assert_eq!(injected["spec"]["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(warnings, ["299 - \"mind the sidecar\""]);
    assert_eq!(
        *h.dialer.dialled.lock().unwrap(),
        [DialTarget {
            host: "10.244.0.7".into(),
            port: 15017
        }]
    );
    let (_, out, _) = h.pod("out", json!({"sidecar.istio.io/inject": "false"})).await;
    assert_eq!(out["spec"]["containers"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_webhook_denies_in_kubernetes_words() {
    let h = Hooked::new(
        |_, _| json!({"allowed": false, "status": {"code": 422, "message": "configuration is invalid: bad principal"}}),
    )
    .await;
    h.endpoints().await;
    h.configure("ValidatingWebhookConfiguration", json!({})).await;
    let (code, status, _) = h.pod("x", json!({})).await;
    assert_eq!(code, 422);
    assert_eq!(
        status["message"],
        "admission webhook \"hook.example.com\" denied the request: configuration is invalid: bad principal"
    );
    let (code, _, _) = h
        .send(Method::GET, "/api/v1/namespaces/default/pods/x", Value::Null)
        .await;
    assert_eq!(code, 404);
}

#[tokio::test]
async fn what_cannot_be_asked_fails_closed() {
    let mut h = Hooked::new(|_, _| json!({"allowed": true})).await;
    h.configure("MutatingWebhookConfiguration", json!({})).await;
    let failed = |status: &Value, why: &str| {
        assert_eq!(
            status["message"].as_str().unwrap(),
            format!(
                "Internal error occurred: failed calling webhook \"hook.example.com\": failed to call webhook: Post \"https://hook.default.svc:443/inject?timeout=10s\": {why}"
            )
        );
    };
    let (code, status, _) = h.pod("x", json!({})).await;
    assert_eq!(code, 500);
    failed(&status, "no endpoints available for service \"hook\"");
    h.endpoints().await;
    assert_eq!(h.pod("fine", json!({})).await.0, 201);

    // Nobody listens any more.
    let listener = h.listener.take().unwrap();
    listener.abort();
    let _ = listener.await;
    let (code, status, _) = h.pod("x", json!({})).await;
    assert_eq!(code, 500);
    failed(&status, "dial tcp 10.244.0.7:15017: connect: connection refused");

    let set = |change: Value| {
        let h = &h;
        async move {
            let path =
                "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/mutatingwebhookconfiguration";
            let (_, mut object, _) = h.send(Method::GET, path, Value::Null).await;
            for (k, v) in change.as_object().unwrap() {
                object["webhooks"][0][k] = v.clone();
            }
            let (code, v, _) = h.send(Method::PUT, path, object).await;
            assert_eq!(code, 200, "{v}");
        }
    };
    set(json!({"failurePolicy": "Ignore"})).await;
    assert_eq!(h.pod("ignored", json!({})).await.0, 201);
}

#[tokio::test]
async fn the_certificate_is_checked() {
    let h = Hooked::new(|_, _| json!({"allowed": true})).await;
    h.endpoints().await;
    let other = B64.encode(&Ca::new("other").pem);
    h.configure("MutatingWebhookConfiguration", json!({"clientConfig": {"service": {"name": "hook", "namespace": "default", "path": "/inject"}, "caBundle": other}})).await;
    let (code, status, _) = h.pod("x", json!({})).await;
    assert_eq!(code, 500);
    let message = status["message"].as_str().unwrap();
    assert!(
        message.ends_with("tls: failed to verify certificate: x509: certificate signed by unknown authority"),
        "{message}"
    );
    assert_eq!(h.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn answers_are_not_believed_blindly() {
    let h = Hooked::new(|request, _| match request["name"].as_str().unwrap() {
        "uid" => json!({"allowed": true, "uid": "other"}),
        "rename" => patch(json!([{"op": "replace", "path": "/metadata/name", "value": "evil"}])),
        "broken" => json!({"allowed": true, "patchType": "JSONPatch", "patch": "%%%"}),
        "invalid" => patch(json!([{"op": "remove", "path": "/spec/containers"}])),
        _ => json!({"allowed": true}),
    })
    .await;
    h.endpoints().await;
    h.configure("MutatingWebhookConfiguration", json!({})).await;
    for (name, code) in [
        ("uid", 500),
        ("rename", 500),
        ("broken", 500),
        ("invalid", 422),
        ("good", 201),
    ] {
        let (got, status, _) = h.pod(name, json!({})).await;
        assert_eq!(got, code, "{name}: {status}");
    }
    for (bad, want) in [
        (json!({"sideEffects": "Some"}), "sideEffects"),
        (
            json!({"matchConditions": [{"name": "x", "expression": "true"}]}),
            "matchConditions",
        ),
        (json!({"name": "short"}), "at least three segments"),
        (json!({"timeoutSeconds": 31}), "between 1 and 30"),
    ] {
        let mut hook = json!({"name": "a.b.c", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {"url": "https://x/"}});
        for (k, v) in bad.as_object().unwrap() {
            hook[k] = v.clone();
        }
        let body = json!({"metadata": {"name": "bad"}, "webhooks": [hook]});
        let (code, status, _) = h
            .send(
                Method::POST,
                "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
                body,
            )
            .await;
        assert!(
            code == 422 && status["message"].as_str().unwrap().contains(want),
            "{status}"
        );
    }
}

#[tokio::test]
async fn reinvocation_when_a_later_webhook_changed_something() {
    let h = Hooked::new(|request, path| {
        if path.starts_with("/first") {
            // Notes how many containers it saw last.
            let n = request["object"]["spec"]["containers"].as_array().unwrap().len();
            patch(json!([{"op": "add", "path": "/metadata/annotations", "value": {"seen": n.to_string()}}]))
        } else if request["object"]["spec"]["containers"].as_array().unwrap().len() == 1 {
            patch(json!([{"op": "add", "path": "/spec/containers/-", "value": {"name": "second", "image": "i"}}]))
        } else {
            json!({"allowed": true})
        }
    })
    .await;
    h.endpoints().await;
    let hook = |name: &str, path: &str, policy: &str| {
        json!({"name": name, "admissionReviewVersions": ["v1"], "sideEffects": "None", "reinvocationPolicy": policy,
            "clientConfig": {"service": {"name": "hook", "namespace": "default", "path": path}, "caBundle": h.bundle()},
            "rules": [{"apiGroups": ["*"], "apiVersions": ["*"], "resources": ["pods"], "operations": ["CREATE"]}]})
    };
    let webhooks = json!([
        hook("first.example.com", "/first", "IfNeeded"),
        hook("second.example.com", "/second", "Never")
    ]);
    h.ok(
        "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
        json!({"metadata": {"name": "both"}, "webhooks": webhooks}),
    )
    .await;
    let (code, pod, _) = h.pod("x", json!({})).await;
    assert_eq!(
        (code, pod["metadata"]["annotations"]["seen"].as_str()),
        (201, Some("2")),
        "{pod}"
    );
    assert_eq!(h.calls.load(Ordering::SeqCst), 3);
}

/// A node agent's end: answers logs, switches protocols on exec and echoes.
fn node_agent(path: &std::path::Path) -> (tokio::task::JoinHandle<()>, Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    let seen: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let noted = seen.clone();
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let noted = noted.clone();
            tokio::spawn(async move {
                let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
                    let noted = noted.clone();
                    async move {
                        noted.lock().unwrap().push(request.uri().to_string());
                        let mut response = Response::new(Full::new(bytes::Bytes::from_static(b"line 1\n")));
                        if request.headers().contains_key("authorization") {
                            *response.status_mut() = http::StatusCode::IM_A_TEAPOT;
                        } else if request.headers().contains_key("upgrade") {
                            *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
                            for name in ["upgrade", "connection"] {
                                response.headers_mut().insert(name, request.headers()[name].clone());
                            }
                            tokio::spawn(async move {
                                let mut io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                                let (mut r, mut w) = tokio::io::split(&mut io);
                                let _ = tokio::io::copy(&mut r, &mut w).await;
                            });
                        }
                        Ok::<_, std::convert::Infallible>(response)
                    }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await;
            });
        }
    });
    (task, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_streams_reach_the_node_agent() {
    let c = common::Cluster::start().await;
    let socket = c.server.config().kubelet_socket.clone();
    let post = |path: &str, body: Value| {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .body(Full::new(bytes::Bytes::from(body.to_string())))
            .unwrap();
        c.server.service_as_admin().oneshot(request)
    };
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}});
    assert_eq!(
        post("/api/v1/namespaces/default/pods", pod).await.unwrap().status(),
        201
    );
    // Without a node agent the error says so.
    let e = c.fails(&["logs", "p", "-c", "a"], "").await;
    assert!(e.contains("error dialing backend: dial unix"), "{e}");
    let (agent, seen) = node_agent(&socket);
    assert_eq!(c.ok(&["logs", "p", "-c", "a", "--tail=3"]).await, "line 1\n");
    assert_eq!(
        seen.lock().unwrap().pop().unwrap(),
        "/containerLogs/default/p/a?tailLines=3"
    );
    let e = c.fails(&["logs", "p", "-c", "none"], "").await;
    assert!(e.contains("container none is not valid for pod p"), "{e}");

    // An upgrade over TLS: bytes go both ways untouched.
    c.user("operator", &[]);
    let (cert, key) = c.ca.client("operator", &[]);
    let dir = c.dir.path().to_owned();
    for (name, text) in [("o.crt", &cert), ("o.key", &key), ("ca.crt", &c.ca.pem)] {
        std::fs::write(dir.join(name), text).unwrap();
    }
    let port = c.address.port();
    let upgrade = move |dir: std::path::PathBuf| async move {
        let mut child = tokio::process::Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-no_ign_eof",
                "-CAfile",
                "ca.crt",
                "-cert",
                "o.crt",
                "-key",
                "o.key",
                "-connect",
                &format!("127.0.0.1:{port}"),
            ])
            .current_dir(dir)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("openssl is not installed; install the package openssl");
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdin
            .write_all(b"GET /api/v1/namespaces/default/pods/p/exec?container=a&command=sh&command=-c&command=a%20b&stdin=true&stdout=true HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            .await
            .unwrap();
        let mut got = Vec::new();
        let mut sent = false;
        let mut buffer = [0; 4096];
        loop {
            let n = tokio::time::timeout(std::time::Duration::from_secs(20), stdout.read(&mut buffer))
                .await
                .unwrap()
                .unwrap();
            got.extend_from_slice(&buffer[..n]);
            let text = String::from_utf8_lossy(&got).into_owned();
            if n == 0 || text.contains("ping-pong") || text.contains("Forbidden") {
                return text;
            }
            if text.contains("101 Switching Protocols") && !sent {
                sent = true;
                stdin.write_all(b"ping-pong\n").await.unwrap();
            }
        }
    };
    let denied = upgrade(dir.clone()).await;
    assert!(
        denied.contains("403 Forbidden") && denied.contains("cannot get resource \\\"pods/exec\\\""),
        "{denied}"
    );
    c.ok(&["create", "role", "exec", "--verb=get", "--resource=pods/exec"])
        .await;
    c.ok(&["create", "rolebinding", "exec", "--role=exec", "--user=operator"])
        .await;
    let denied = upgrade(dir.clone()).await;
    assert!(
        denied.contains("cannot create resource \\\"pods/exec\\\""),
        "reading a stream is not enough to open one: {denied}"
    );
    c.ok(&["delete", "role", "exec"]).await;
    c.ok(&["create", "role", "exec", "--verb=get,create", "--resource=pods/exec"])
        .await;
    let text = upgrade(dir).await;
    assert!(
        text.contains("101 Switching Protocols") && text.contains("ping-pong"),
        "{text}"
    );
    assert_eq!(
        seen.lock().unwrap().pop().unwrap(),
        "/exec/default/p/a?command=sh&command=-c&command=a%20b&input=1&output=1"
    );
    agent.abort();
}
