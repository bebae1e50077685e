//! Nothing is lost while the world changes: certificates, configuration, endpoints, applications that close connections.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::*;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mantlet_model::authz::Expr;
use mantlet_testkit::EchoServer;
use tokio::net::TcpStream;

/// Clients that send without pause and count every answer.
struct Load {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(entry: SocketAddr, clients: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let good = Arc::new(AtomicU64::new(0));
        let tasks = (0..clients)
            .map(|n| tokio::spawn(client(entry, n, stop.clone(), good.clone())))
            .collect();
        Load { stop, good, tasks }
    }

    async fn more(&self, n: u64) {
        let from = self.good.load(Ordering::SeqCst);
        let limit = tokio::time::Instant::now() + Duration::from_secs(20);
        while self.good.load(Ordering::SeqCst) < from + n {
            assert!(tokio::time::Instant::now() < limit, "the load does not move");
            assert!(
                !self.tasks.iter().any(|t| t.is_finished()),
                "a client gave up: {:?}",
                self.good
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Stops and returns how many requests were answered with 200; anything else is a failure of the test.
    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            let failures = task.await.unwrap();
            assert_eq!(failures, Vec::<String>::new());
        }
        self.good.load(Ordering::SeqCst)
    }
}

/// Even clients keep their connection, odd ones make a new one for each request; GET and POST in turn.
async fn client(entry: SocketAddr, n: usize, stop: Arc<AtomicBool>, good: Arc<AtomicU64>) -> Vec<String> {
    let mut failures = Vec::new();
    let mut kept: Option<http1::SendRequest<Full<Bytes>>> = None;
    let mut number = 0u64;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let mut sender = match kept.take().filter(|s| !s.is_closed()) {
            Some(sender) => sender,
            None => {
                let tcp = TcpStream::connect(entry).await.unwrap();
                let (sender, connection) = http1::handshake(TokioIo::new(tcp)).await.unwrap();
                tokio::spawn(connection);
                sender
            }
        };
        let post = number.is_multiple_of(2);
        let body = if post {
            format!("client {n} request {number}")
        } else {
            String::new()
        };
        let request = http::Request::builder()
            .method(if post { "POST" } else { "GET" })
            .uri(format!("/{n}/{number}"))
            .header("host", "web")
            .body(Full::new(Bytes::from(body.clone())))
            .unwrap();
        let want = if post { body } else { format!("/{n}/{number}") };
        let outcome = async {
            sender.ready().await.map_err(|e| format!("ready: {e}"))?;
            let response = sender.send_request(request).await.map_err(|e| format!("send: {e}"))?;
            let status = response.status();
            let close = response.headers().get("connection").is_some_and(|v| v == "close");
            let body = response.into_body().collect().await.map_err(|e| format!("body: {e}"))?;
            let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            if status != 200 || body != want {
                return Err(format!("{status} {body:?} instead of {want:?}"));
            }
            Ok(close)
        };
        match outcome.await {
            Ok(close) => {
                good.fetch_add(1, Ordering::SeqCst);
                if n.is_multiple_of(2) && !close {
                    kept = Some(sender);
                }
            }
            Err(problem) => {
                failures.push(format!("client {n} request {number}: {problem}"));
                if failures.len() > 20 {
                    return failures;
                }
            }
        }
    }
    failures
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_rotate_without_a_lost_request() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let load = Load::start(mesh.entry(), 6);
    load.more(20).await;
    for _ in 0..15 {
        mesh.client.identity(&mesh.ca, "sleep");
        load.more(8).await;
        mesh.server.identity(&mesh.ca, "web");
        load.more(8).await;
    }
    let good = load.end().await;
    assert_eq!(app.requests().len() as u64, good);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_come_without_a_lost_request() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let load = Load::start(mesh.entry(), 6);
    load.more(20).await;
    for round in 0..20 {
        mesh.inbound.authz = match round % 3 {
            0 => allow(Expr::always()),
            1 => allow(Expr::atom(
                mantlet_model::authz::Attribute::PeerUri,
                mantlet_model::authz::Matcher::Exact(CLIENT_SA.into()),
            )),
            _ => vec![],
        };
        mesh.inbound.mode = if round % 2 == 0 { Mode::Permissive } else { Mode::Strict };
        mesh.outbound.sans = match round % 2 {
            0 => vec![SERVER_SA.into()],
            _ => vec!["spiffe://cluster.local/ns/default/sa/another".into(), SERVER_SA.into()],
        };
        mesh.apply().await;
        load.more(10).await;
    }
    let good = load.end().await;
    assert_eq!(app.requests().len() as u64, good);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_come_and_go_without_a_lost_request() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let second = Proxy::start("web", 2);
    second.identity(&mesh.ca, "web");
    *second.destination.lock().unwrap() = app.address();
    let other = Inbound {
        listen: free_address(),
        app: app.address(),
        port: Port::Http,
        mode: Mode::Strict,
        authz: vec![],
        protocol: mantlet_model::cluster::UpstreamProtocol::Http1,
    };
    second.apply(other.snapshot()).await;
    let (one, two) = (mesh.inbound.listen, other.listen);
    let load = Load::start(mesh.entry(), 6);
    for round in 0..20 {
        mesh.outbound.endpoints = match round % 3 {
            0 => vec![one, two],
            1 => vec![two],
            _ => vec![one],
        };
        mesh.client.apply(mesh.outbound.snapshot()).await;
        load.more(15).await;
    }
    let good = load.end().await;
    assert_eq!(app.requests().len() as u64, good);
    assert!(
        second.metrics().contains("istio_requests_total"),
        "the second endpoint took its share"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_server_loses_nothing() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let second = Proxy::start("web", 2);
    second.identity(&mesh.ca, "web");
    *second.destination.lock().unwrap() = app.address();
    let other = Inbound {
        listen: free_address(),
        app: app.address(),
        port: Port::Http,
        mode: Mode::Strict,
        authz: vec![],
        protocol: mantlet_model::cluster::UpstreamProtocol::Http1,
    };
    second.apply(other.snapshot()).await;
    mesh.outbound.endpoints = vec![mesh.inbound.listen, other.listen];
    mesh.client.apply(mesh.outbound.snapshot()).await;
    let load = Load::start(mesh.entry(), 6);
    load.more(50).await;
    // The order of a pod's end: its endpoint leaves, then its proxy drains.
    mesh.outbound.endpoints = vec![mesh.inbound.listen];
    mesh.client.apply(mesh.outbound.snapshot()).await;
    second.shared.set_phase(mantlet_proxy::worker::Phase::Draining);
    load.more(100).await;
    mantlet_testkit::eventually(
        "the drained proxy has no connection left",
        Duration::from_secs(10),
        || async {
            match second.shared.active_connections() {
                0 => Ok(()),
                n => Err(n),
            }
        },
    )
    .await;
    second.shared.set_phase(mantlet_proxy::worker::Phase::Stopping);
    load.more(50).await;
    let good = load.end().await;
    assert_eq!(app.requests().len() as u64, good);
}
