//! The program itself in two network namespaces with real capture: `istio-iptables`, original destinations, uid 1337,
//! certificate and configuration from a control plane, readiness, SIGTERM.

mod common;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::control::{Control, Server, resources, serve_on, token};
use common::*;
use mantlet_model::cluster::UpstreamProtocol;
use mantlet_model::listener::AccessLog;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_testkit::{ChildGuard, EchoServer, NetNs, TestCa, eventually};

/// A pod: its namespace, its proxy and the control plane on its loopback.
struct Pod {
    net: NetNs,
    proxy: ChildGuard,
    control: Arc<Control>,
    _server: Server,
    directory: tempfile::TempDir,
}

impl Pod {
    fn start(net: NetNs, ca: &Arc<TestCa>, account: &str, address: &str, snapshot: &ProxySnapshot) -> Pod {
        let control = Control::new(ca.clone(), resources(snapshot), 3600);
        let listener = net
            .run(|| mantlet_net::sockopt::listen_tcp("127.0.0.1:15012".parse().unwrap(), Default::default()).unwrap());
        let server = serve_on(control.clone(), listener);
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("token"), token(account)).unwrap();
        std::fs::write(path("root.pem"), ca.root_pem()).unwrap();
        let binary = env!("CARGO_BIN_EXE_mantlet-proxy");
        // The init container's words, byte for byte.
        net.exec(&[
            binary,
            "istio-iptables",
            "-p",
            "15001",
            "-z",
            "15006",
            "-u",
            "1337",
            "-m",
            "REDIRECT",
            "-i",
            "*",
            "-x",
            "",
            "-b",
            "*",
            "-d",
            "15090,15021,15020",
        ]);
        let log = std::fs::File::create(path("log")).unwrap();
        let child = as_proxy(&net)
            .args([binary, "proxy", "sidecar", "--domain", "default.svc.cluster.local"])
            .args(["--proxyLogLevel=warning", "--proxyComponentLogLevel=misc:error"])
            .arg("--log_output_level=default:info")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("POD_NAME", format!("{account}-1"))
            .env("POD_NAMESPACE", "default")
            .env("SERVICE_ACCOUNT", account)
            .env("INSTANCE_IP", address)
            .env("ISTIO_META_WORKLOAD_NAME", account)
            .env(
                "PROXY_CONFIG",
                r#"{"discoveryAddress":"localhost:15012","terminationDrainDuration":"2s"}"#,
            )
            .env(
                "ISTIO_KUBE_APP_PROBERS",
                r#"{"/app-health/web/readyz":{"httpGet":{"path":"/healthz","port":3000},"timeoutSeconds":2},"/app-health/web/livez":{"tcpSocket":{"port":3001}}}"#,
            )
            .env("MANTLET_TOKEN_FILE", path("token"))
            .env("XDS_ROOT_CA", path("root.pem"))
            .env("CA_ROOT_CA", path("root.pem"))
            .env("MANTLET_MESH_ROOT", path("root.pem"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Pod {
            net,
            proxy: ChildGuard::new(child),
            control,
            _server: server,
            directory,
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    async fn ready(&self) {
        eventually("the proxy is ready", Duration::from_secs(20), || async {
            let answer = self.curl(&["http://127.0.0.1:15021/healthz/ready"]);
            if answer.contains(" 200 ") {
                Ok(())
            } else {
                Err((answer, self.log()))
            }
        })
        .await;
    }

    /// curl in the pod, as the application's user: captured.
    fn curl(&self, arguments: &[&str]) -> String {
        output(
            self.net
                .command("curl")
                .args(["-sS", "-i", "--max-time", "10"])
                .args(arguments),
        )
    }

    /// curl in the pod, as the proxy's user: not captured, like a client without a proxy.
    fn bare_curl(&self, arguments: &[&str]) -> String {
        output(
            as_proxy(&self.net)
                .args(["curl", "-sS", "-i", "--max-time", "10"])
                .args(arguments),
        )
    }
}

fn as_proxy(net: &NetNs) -> Command {
    let mut command = net.command("setpriv");
    command.args(["--reuid", "1337", "--regid", "1337", "--clear-groups"]);
    command
}

/// Output and exit code as one text.
fn output(command: &mut Command) -> String {
    let out = command.output().unwrap();
    format!(
        "{}{}exit {}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
        out.status.code().unwrap_or(-1)
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_pods_with_captured_traffic() {
    let ca = Arc::new(TestCa::new("cluster.local"));
    let (client_net, server_net) = (NetNs::new("pc"), NetNs::new("ps"));
    client_net.connect(&server_net, "10.0.0.1/24", "10.0.0.2/24");
    client_net.exec(&["ip", "route", "add", "10.96.0.0/16", "via", "10.0.0.2"]);
    let app = server_net
        .run(|| mantlet_net::sockopt::listen_tcp("0.0.0.0:3000".parse().unwrap(), Default::default()).unwrap());
    let app = EchoServer::on(tokio::net::TcpListener::from_std(app).unwrap(), None, |request| {
        http::Response::new(http_body_util::Full::new(request.path.clone().into()))
    });
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let mut inbound = Inbound {
        listen: address("0.0.0.0:15006"),
        app: address("10.0.0.2:3000"),
        port: Port::Http,
        mode: Mode::Permissive,
        authz: vec![],
        protocol: UpstreamProtocol::Http1,
    };
    let outbound = Outbound {
        listen: address("0.0.0.0:15001"),
        port: 80,
        endpoints: vec![address("10.0.0.2:3000")],
        mtls: true,
        sans: vec![SERVER_SA.into()],
        protocol: UpstreamProtocol::Http1,
        retry: Some(default_retry()),
        tcp: false,
    };
    let server = Pod::start(server_net, &ca, "web", "10.0.0.2", &logged(inbound.snapshot()));
    let mut client = Pod::start(client_net, &ca, "sleep", "10.0.0.1", &outbound.snapshot());
    server.ready().await;
    client.ready().await;
    assert_eq!(
        server.control.nodes.lock().unwrap()[0],
        "sidecar~10.0.0.2~web-1.default~default.svc.cluster.local"
    );

    // Through both proxies; the address is the Service's, which exists nowhere.
    let answer = client.curl(&["-H", "Host: web", "http://10.96.0.20/through"]);
    assert!(
        answer.contains("HTTP/1.1 200"),
        "{answer}\n{}\n{}",
        client.log(),
        server.log()
    );
    let seen = app.take();
    assert_eq!(seen[0].path, "/through");
    assert_eq!(seen[0].peer.ip().to_string(), "127.0.0.6");
    let xfcc = seen[0].headers["x-forwarded-client-cert"].to_str().unwrap();
    assert!(xfcc.ends_with(&format!("URI={CLIENT_SA}")), "{xfcc}");
    // Straight to the pod's address, captured too: unknown to the mesh, so it passes as plaintext.
    let answer = client.curl(&["http://10.0.0.2:3000/direct"]);
    assert!(answer.contains("HTTP/1.1 200"), "{answer}");
    // Without a proxy.
    let answer = client.bare_curl(&["http://10.0.0.2:3000/bare"]);
    assert!(answer.contains("HTTP/1.1 200"), "{answer}");
    assert_eq!(app.take().len(), 2);

    inbound.mode = Mode::Strict;
    server
        .control
        .resources
        .send_replace(common::control::resources(&logged(inbound.snapshot())));
    eventually("STRICT is in force", Duration::from_secs(10), || async {
        let answer = client.bare_curl(&["http://10.0.0.2:3000/bare"]);
        if answer.ends_with("exit 56") && answer.contains("Connection reset by peer") {
            Ok(())
        } else {
            Err(answer)
        }
    })
    .await;
    let answer = client.curl(&["-H", "Host: web", "http://10.96.0.20/strict"]);
    assert!(answer.contains("HTTP/1.1 200"), "{answer}");

    // Probes reach the application past its own STRICT policy, and tell of one that is not there.
    app.take();
    let probe = server.curl(&["http://127.0.0.1:15020/app-health/web/readyz"]);
    assert!(probe.contains("HTTP/1.1 200"), "{probe}");
    assert_eq!(app.take()[0].path, "/healthz");
    let probe = server.curl(&["http://127.0.0.1:15020/app-health/web/livez"]);
    assert!(probe.contains("HTTP/1.1 500"), "{probe}");
    let probe = server.curl(&["http://127.0.0.1:15020/app-health/web/none"]);
    assert!(probe.contains("HTTP/1.1 404"), "{probe}");

    let metrics = server.curl(&["http://127.0.0.1:15020/stats/prometheus"]);
    assert!(
        metrics.contains("connection_security_policy=\"mutual_tls\""),
        "{metrics}"
    );
    let certs = server.curl(&["http://127.0.0.1:15000/certs"]);
    assert!(certs.contains(SERVER_SA) && !certs.contains("PRIVATE"), "{certs}");
    let dump = server.curl(&["http://127.0.0.1:15000/config_dump"]);
    assert!(dump.contains("virtualInbound") && !dump.contains("PRIVATE"), "{dump}");
    eventually("the access log has its lines", Duration::from_secs(5), || async {
        let log = server.log();
        let line = log
            .lines()
            .find(|l| l.contains("\"GET /strict HTTP/1.1\" 200 - via_upstream"));
        let refused = log.contains("NR filter_chain_not_found");
        if line.is_some() && refused {
            Ok(())
        } else {
            Err(log.clone())
        }
    })
    .await;
    keys_stay_inside(server.directory.path());

    client.proxy.signal(nix::sys::signal::Signal::SIGTERM);
    eventually("the draining proxy is not ready", Duration::from_secs(5), || async {
        let answer = client.curl(&["http://127.0.0.1:15021/healthz/ready"]);
        if answer.contains(" 503 ") { Ok(()) } else { Err(answer) }
    })
    .await;
    // It still serves until its time is over.
    let answer = client.curl(&["-H", "Host: web", "http://10.96.0.20/draining"]);
    assert!(
        answer.contains("HTTP/1.1 200") && answer.contains("connection: close"),
        "{answer}"
    );
    let status = client.proxy.wait(Duration::from_secs(10)).expect("it ends");
    assert!(status.success(), "{status:?}\n{}", client.log());
}

fn logged(mut snapshot: ProxySnapshot) -> ProxySnapshot {
    let log = AccessLog {
        path: "/dev/stdout".into(),
        format: String::new(),
        json: vec![],
    };
    for listener in snapshot.listeners.values_mut() {
        let listener = Arc::make_mut(listener);
        listener.access_log = Some(log.clone());
        for chain in &mut listener.chains {
            if let mantlet_model::listener::Filters::Http(http) = &mut chain.filters {
                http.access_log = Some(log.clone());
            }
        }
    }
    snapshot
}

/// No file of the pod holds a private key.
fn keys_stay_inside(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("PRIVATE KEY"), "{}", path.display());
    }
}
