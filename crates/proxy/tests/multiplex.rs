//! HTTP/1.1 requests that share HTTP/2 connections between two proxies: what the client and the application see is HTTP/1.1 as
//! ever, one request never waits for another, and whatever breaks is broken for its own request only.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::*;
use mantlet_identity::{ClientAuth, ServerTlsOptions, TrustDomainRule};
use mantlet_model::authz::{Attribute, Expr, Matcher};
use mantlet_model::listener::Filters;
use mantlet_model::route::RouteAction;
use mantlet_proxy::upstream::multiplex::STREAM_WINDOW;
use mantlet_proxy::worker::Phase;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};

/// Long enough for a loaded machine; nothing passes because of it.
const DEADLINE: Duration = Duration::from_secs(120);

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(out) => out,
        Err(_) => panic!("{what}: nothing in {DEADLINE:?}"),
    }
}

/// What the application of these tests saw.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// A head, whole.
    Head(String),
    /// What came after the head of `/sink`, when its connection ended.
    Ended(Vec<u8>),
    /// Nobody reads `/endless` any more.
    Gone,
}

/// An HTTP/1.1 server that answers byte for byte as its paths say.
struct App {
    address: SocketAddr,
    seen: mpsc::UnboundedReceiver<Seen>,
    /// `/gate` and `/events` wait for it.
    gate: watch::Sender<bool>,
    /// Bytes of `/big` that were written.
    written: Arc<AtomicUsize>,
}

const BIG: usize = 10 << 20;

impl App {
    async fn start() -> App {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, seen) = mpsc::unbounded_channel();
        let (gate, wait) = watch::channel(false);
        let written = Arc::<AtomicUsize>::default();
        let count = written.clone();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (tell, wait, count) = (tell.clone(), wait.clone(), count.clone());
                // An error is a client that went away; the tests look at what the client sees.
                tokio::spawn(async move { serve(BufReader::new(tcp), &tell, wait, &count).await.ok() });
            }
        });
        App {
            address,
            seen,
            gate,
            written,
        }
    }

    async fn next(&mut self) -> Seen {
        within("the application", self.seen.recv()).await.unwrap()
    }
}

async fn serve(
    mut stream: BufReader<TcpStream>,
    tell: &mpsc::UnboundedSender<Seen>,
    mut gate: watch::Receiver<bool>,
    written: &AtomicUsize,
) -> std::io::Result<()> {
    const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let path = head.split(' ').nth(1).unwrap_or_default().to_string();
        let _ = tell.send(Seen::Head(head));
        match path.as_str() {
            "/gate" => {
                let _ = gate.wait_for(|open| *open).await;
                stream.write_all(OK).await?;
            }
            "/events" => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                stream.write_all(head.as_bytes()).await?;
                stream.write_all(b"9\r\ndata: 1\n\n\r\n").await?;
                let _ = gate.wait_for(|open| *open).await;
                stream.write_all(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n").await?;
            }
            "/big" => {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BIG}\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                let piece = [b'b'; 16 << 10];
                for _ in 0..BIG / piece.len() {
                    stream.write_all(&piece).await?;
                    written.fetch_add(piece.len(), Ordering::SeqCst);
                }
            }
            "/endless" => {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    .await?;
                while stream.write_all(b"4\r\nmore\r\n").await.is_ok() {}
                let _ = tell.send(Seen::Gone);
                return Ok(());
            }
            "/cut" => {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npart\r\n")
                    .await?;
                return Ok(());
            }
            "/sink" => {
                let mut rest = Vec::new();
                // A reset is an end as well.
                let _ = stream.read_to_end(&mut rest).await;
                let _ = tell.send(Seen::Ended(rest));
                return Ok(());
            }
            "/chat" => {
                stream
                    .write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n")
                    .await?;
                let mut buffer = [0u8; 1024];
                loop {
                    match stream.read(&mut buffer).await? {
                        0 => return Ok(()),
                        n => stream.write_all(&buffer[..n]).await?,
                    }
                }
            }
            "/304" => {
                stream
                    .write_all(b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\ncontent-length: 4711\r\n\r\n")
                    .await?;
            }
            "/204" => stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await?,
            "/head" => {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4711\r\n\r\n")
                    .await?
            }
            _ => stream.write_all(OK).await?,
        }
    }
}

/// A client that speaks bytes.
struct Client(BufReader<TcpStream>);

impl Client {
    async fn new(mesh: &Mesh) -> Client {
        Client(BufReader::new(TcpStream::connect(mesh.entry()).await.unwrap()))
    }

    /// One whose kernel keeps little of what it does not read.
    async fn stalling(mesh: &Mesh) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Client(BufReader::with_capacity(
            512,
            socket.connect(mesh.entry()).await.unwrap(),
        ))
    }

    async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    async fn head(&mut self) -> String {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let read = within("a head", self.0.read_line(&mut head)).await;
            assert!(read.unwrap() > 0, "closed after {head:?}");
        }
        head
    }

    async fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut out = vec![0; count];
        within("a body", self.0.read_exact(&mut out)).await.unwrap();
        out
    }

    async fn get(&mut self, path: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: web\r\n\r\n")).await;
        self.head().await
    }

    async fn ok(&mut self) {
        let head = self.get("/").await;
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        assert_eq!(self.bytes(2).await, b"ok");
    }
}

/// Connections that the server's proxy has accepted.
fn accepted(mesh: &Mesh) -> u64 {
    mesh.server.shared.accepted.load(Ordering::Relaxed)
}

/// Returns once the client's proxy has counted so many requests with these response flags.
async fn counted(mesh: &Mesh, flags: &str, requests: usize) {
    let (flags, requests) = (format!("response_flags=\"{flags}\""), format!(" {requests}"));
    within(&flags, async {
        while !mesh
            .client
            .metrics()
            .lines()
            .any(|l| l.starts_with("istio_requests_total") && l.contains(&flags) && l.ends_with(&requests))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn clients_share_one_connection_and_keep_their_version() {
    let mut app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    // All at once: those that find no connection wait for the first one's.
    let mut clients = Vec::new();
    for _ in 0..40 {
        clients.push(Client::new(&mesh).await);
    }
    futures::future::join_all(clients.iter_mut().map(Client::ok)).await;
    assert_eq!(accepted(&mesh), 1, "one connection for all");
    for _ in 0..40 {
        let Seen::Head(head) = app.next().await else { panic!() };
        assert!(head.starts_with("GET / HTTP/1.1\r\n"), "{head}");
        assert!(!head.contains("x-mantlet"), "{head}");
    }
    // Answers without a body, one after the other on one connection: none may shift the next.
    let client = &mut clients[0];
    for _ in 0..2 {
        let head = client.get("/304").await;
        assert!(head.starts_with("HTTP/1.1 304"), "{head}");
        let head = client.get("/204").await;
        assert!(head.starts_with("HTTP/1.1 204"), "{head}");
        client.send("HEAD /head HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let head = client.head().await;
        assert!(head.contains("content-length: 4711"), "{head}");
        client.ok().await;
    }
    // HTTP/1.0 is refused as ever, and never becomes something newer on its way.
    while app.seen.try_recv().is_ok() {}
    let mut old = Client::new(&mesh).await;
    old.send("GET / HTTP/1.0\r\nHost: web\r\n\r\n").await;
    let head = old.head().await;
    assert_eq!(head.split(' ').nth(1), Some("426"), "{head}");
    assert!(app.seen.try_recv().is_err());
}

#[tokio::test]
async fn more_requests_than_a_connection_takes_open_another() {
    let mut app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        let mut client = Client::new(&mesh).await;
        client.send("GET /gate HTTP/1.1\r\nHost: web\r\n\r\n").await;
        clients.push(client);
    }
    // All of them are at the application at once: no queue in between.
    for _ in 0..100 {
        assert!(matches!(app.next().await, Seen::Head(_)));
    }
    assert_eq!(accepted(&mesh), 2);
    app.gate.send_replace(true);
    for client in &mut clients {
        let head = client.head().await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        client.bytes(2).await;
    }
    // The second one is not needed any more.
    clients[0].ok().await;
    assert_eq!(accepted(&mesh), 2);
}

#[tokio::test]
async fn events_arrive_when_they_are_sent() {
    let app = App::start().await;
    let mesh = Mesh::new(app.address, Port::Http, Mode::Strict).await;
    let mut client = Client::new(&mesh).await;
    let head = client.get("/events").await;
    assert!(head.contains("text/event-stream"), "{head}");
    // The second event is sent only after the first one has been read.
    assert_eq!(client.bytes(14).await, b"9\r\ndata: 1\n\n\r\n");
    app.gate.send_replace(true);
    assert_eq!(client.bytes(19).await, b"9\r\ndata: 2\n\n\r\n0\r\n\r\n");
    client.ok().await;
}

#[tokio::test]
async fn stalled_downloads_and_uploads_hold_up_nobody() {
    const STALLED: usize = 24;
    let app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut client = Client::stalling(&mesh).await;
        client.get("/big").await;
        stalled.push(client);
    }
    // Every stream may fill its window, whatever the others do.
    within("the windows of all streams", async {
        while app.written.load(Ordering::SeqCst) < STALLED * STREAM_WINDOW as usize {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let mut uploads = Vec::new();
    for _ in 0..STALLED {
        let client = TcpStream::connect(mesh.entry()).await.unwrap();
        uploads.push(tokio::spawn(async move {
            let mut client = client;
            let head = format!("POST /gate HTTP/1.1\r\nHost: web\r\ncontent-length: {BIG}\r\n\r\n");
            client.write_all(head.as_bytes()).await.unwrap();
            // Until nobody takes more; aborted at the end of the test.
            let piece = [b'u'; 16 << 10];
            for _ in 0..BIG / piece.len() {
                if client.write_all(&piece).await.is_err() {
                    return;
                }
            }
        }));
    }
    let mut small = Client::new(&mesh).await;
    for _ in 0..50 {
        small.ok().await;
    }
    assert_eq!(accepted(&mesh), 1, "all of it on one connection");
    assert!(
        app.written.load(Ordering::SeqCst) < STALLED * BIG,
        "the downloads are not through"
    );
    for upload in uploads {
        upload.abort();
    }
    // Who begins to read gets everything.
    for client in &mut stalled {
        let body = client.bytes(BIG).await;
        assert!(body.iter().all(|b| *b == b'b'));
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_own_exchange_only() {
    let mut app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let mut other = Client::new(&mesh).await;
    other.ok().await;
    assert!(matches!(app.next().await, Seen::Head(_)));
    let mut client = Client::new(&mesh).await;
    client.get("/endless").await;
    client.bytes(1000).await;
    assert!(matches!(app.next().await, Seen::Head(_)));
    drop(client);
    assert_eq!(app.next().await, Seen::Gone);
    // A request that waits for its answer.
    let mut client = Client::new(&mesh).await;
    client
        .send("POST /sink HTTP/1.1\r\nHost: web\r\ntransfer-encoding: chunked\r\n\r\n4\r\npart\r\n")
        .await;
    assert!(matches!(app.next().await, Seen::Head(_)));
    drop(client);
    let Seen::Ended(bytes) = app.next().await else { panic!() };
    assert!(!bytes.ends_with(b"0\r\n\r\n"), "a part became the whole");
    other.ok().await;
    assert_eq!(accepted(&mesh), 1);
}

#[tokio::test]
async fn a_reset_upload_never_looks_complete() {
    for reason in [h2::Reason::CANCEL, h2::Reason::NO_ERROR, h2::Reason::INTERNAL_ERROR] {
        let mut app = App::start().await;
        let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
        let tcp = TcpStream::connect(mesh.entry()).await.unwrap();
        let (mut sender, connection) = h2::client::handshake(tcp).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::post("http://web/sink").body(()).unwrap();
        let (answer, mut body) = sender.send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(b"part"), false).unwrap();
        let Seen::Head(head) = app.next().await else { panic!() };
        assert!(
            head.to_ascii_lowercase().contains("transfer-encoding: chunked"),
            "{head}"
        );
        body.send_reset(reason);
        let Seen::Ended(bytes) = app.next().await else { panic!() };
        assert!(!bytes.ends_with(b"0\r\n\r\n"), "{reason:?}: a part became the whole");
        assert!(answer.await.is_err());
        // The connection between the proxies lives on.
        let mut other = Client::new(&mesh).await;
        other.ok().await;
        assert_eq!(accepted(&mesh), 1);
    }
}

#[tokio::test]
async fn a_download_that_is_cut_never_looks_complete() {
    let app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let mut client = Client::new(&mesh).await;
    client.send("GET /cut HTTP/1.1\r\nHost: web\r\n\r\n").await;
    let mut all = Vec::new();
    let _ = within("the end", client.0.read_to_end(&mut all)).await;
    assert!(!all.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&all));
    // The same over HTTP/2: the stream is reset, the connection is not.
    let tcp = TcpStream::connect(mesh.entry()).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(connection);
    for (path, whole) in [("cut", false), ("", true)] {
        let request = http::Request::get(format!("http://web/{path}")).body(()).unwrap();
        let (answer, _) = sender.send_request(request, true).unwrap();
        let read = within("the answer", async {
            let mut body = answer.await?.into_body();
            while let Some(piece) = body.data().await {
                piece?;
            }
            Ok::<_, h2::Error>(())
        });
        assert_eq!(read.await.is_ok(), whole, "/{path}");
    }
    let mut other = Client::new(&mesh).await;
    other.ok().await;
    assert_eq!(accepted(&mesh), 1);
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_is_503_uc() {
    let mut app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::new(&mesh).await;
        client
            .send("POST /gate HTTP/1.1\r\nHost: web\r\ncontent-length: 0\r\n\r\n")
            .await;
        clients.push(client);
        assert!(matches!(app.next().await, Seen::Head(_)));
    }
    mesh.server.shared.set_phase(Phase::Stopping);
    for client in &mut clients {
        let head = client.head().await;
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    }
    counted(&mesh, "UC", 3).await;
}

#[tokio::test]
async fn a_server_that_drains_under_load_loses_no_request() {
    let app = App::start().await;
    let mut mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    mesh.outbound.retry = None;
    let second = Proxy::start("web", 1);
    second.identity(&mesh.ca, "web");
    *second.destination.lock().unwrap() = app.address;
    let inbound = Inbound {
        listen: free_address(),
        app: app.address,
        port: Port::Http,
        mode: Mode::Strict,
        authz: vec![],
        protocol: mesh.inbound.protocol,
    };
    second.apply(inbound.snapshot()).await;
    mesh.outbound.endpoints.push(inbound.listen);
    mesh.apply().await;
    let answered = Arc::<AtomicUsize>::default();
    let (stop, stopped) = watch::channel(false);
    let mut load = Vec::new();
    for _ in 0..16 {
        let mut client = Client::new(&mesh).await;
        let (answered, stopped) = (answered.clone(), stopped.clone());
        load.push(tokio::spawn(async move {
            while !*stopped.borrow() {
                // Not idempotent and without retries: whatever is lost is seen.
                client
                    .send("POST /x HTTP/1.1\r\nHost: web\r\ncontent-length: 2\r\n\r\nhi")
                    .await;
                let head = client.head().await;
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                client.bytes(2).await;
                answered.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }
    let more = |count: usize| {
        let answered = answered.clone();
        within("more answers", async move {
            let from = answered.load(Ordering::SeqCst);
            while answered.load(Ordering::SeqCst) < from + count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    more(500).await;
    // As when a pod ends: its proxy drains, and the endpoint leaves the configuration.
    mesh.server.shared.set_phase(Phase::Draining);
    mesh.outbound.endpoints.remove(0);
    mesh.client.apply(mesh.outbound.snapshot()).await;
    within("the drained proxy", async {
        while mesh.server.shared.active_connections() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    more(500).await;
    stop.send_replace(true);
    for one in load {
        one.await.unwrap();
    }
}

#[tokio::test]
async fn a_request_that_goaway_leaves_out_is_sent_again() {
    let app = App::start().await;
    let mut mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    mesh.outbound.endpoints = vec![listener.local_addr().unwrap()];
    // Nothing but the peer's word that it has not looked at the request allows a second try.
    mesh.outbound.retry = Some(mantlet_model::route::Retry {
        on: "refused-stream".into(),
        ..default_retry()
    });
    mesh.apply().await;
    let tls = mesh.ca.workload("default", "web").identity.server(&ServerTlsOptions {
        client_auth: ClientAuth::Required(TrustDomainRule::AnySpiffe),
        alpn: vec![b"h2".to_vec()],
        min_tls13: false,
    });
    let acceptor = tokio_rustls::TlsAcceptor::from(tls.unwrap().strict());
    let server = tokio::spawn(async move {
        // The first connection: SETTINGS, and when the request is there, GOAWAY with last stream 0.
        let (tcp, _) = listener.accept().await.unwrap();
        let mut first = acceptor.accept(tcp).await.unwrap();
        first.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut seen = Vec::new();
        loop {
            assert!(first.read_buf(&mut seen).await.unwrap() > 0);
            if holds_headers(&seen[24.min(seen.len())..]) {
                break;
            }
        }
        let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        first.write_all(&goaway).await.unwrap();
        first.flush().await.unwrap();
        // The second one answers.
        let (tcp, _) = listener.accept().await.unwrap();
        let second = acceptor.accept(tcp).await.unwrap();
        let mut connection = h2::server::handshake(second).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let answer = http::Response::builder().status(204).body(()).unwrap();
            respond.send_response(answer, true).unwrap();
        }
    });
    let mut client = Client::new(&mesh).await;
    let head = client.get("/").await;
    assert!(head.starts_with("HTTP/1.1 204"), "{head}");
    server.abort();
}

/// Whether whole frames up to a HEADERS frame have been read.
fn holds_headers(mut bytes: &[u8]) -> bool {
    while let [a, b, c, kind, ..] = bytes {
        let length = 9 + usize::from(*a) * 65536 + usize::from(*b) * 256 + usize::from(*c);
        if bytes.len() < length {
            return false;
        }
        if *kind == 1 {
            return true;
        }
        bytes = &bytes[length..];
    }
    false
}

#[tokio::test]
async fn a_tunnel_ends_with_its_permission() {
    let app = App::start().await;
    let mut mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    let only = |path: &str| allow(Expr::atom(Attribute::Path, Matcher::Prefix(path.into())));
    mesh.inbound.authz = only("/chat");
    mesh.apply().await;
    let mut client = Client::new(&mesh).await;
    client
        .send("GET /chat HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    client.send("hello").await;
    assert_eq!(client.bytes(5).await, b"hello");
    // Other policies that allow it as well change nothing.
    mesh.inbound.authz = allow(Expr::always());
    mesh.server.apply(mesh.inbound.snapshot()).await;
    client.send("again").await;
    assert_eq!(client.bytes(5).await, b"again");
    mesh.inbound.authz = only("/other");
    mesh.server.apply(mesh.inbound.snapshot()).await;
    let mut rest = Vec::new();
    let _ = within("the end of the tunnel", client.0.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "{rest:?}");
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_cut() {
    let app = App::start().await;
    let mesh = Mesh::with_workers(app.address, Port::Http, Mode::Strict, 1).await;
    // The route's timeout is for the whole answer, the manager's for the time between two pieces.
    for whole in [true, false] {
        let mut snapshot = mesh.outbound.snapshot();
        if whole {
            let table = snapshot.routes.values_mut().next().unwrap();
            let RouteAction::Forward(forward) = &mut Arc::make_mut(&mut Arc::make_mut(table).hosts[0]).routes[0].action
            else {
                panic!()
            };
            forward.timeout_ms = 3_000;
        } else {
            let listener = snapshot.listeners.get_mut("0.0.0.0_80").unwrap();
            let chain = Arc::make_mut(listener).default_chain.as_mut().unwrap();
            let Filters::Http(manager) = &mut chain.filters else {
                panic!()
            };
            manager.stream_idle_timeout_ms = 3_000;
        }
        mesh.client.apply(snapshot).await;
        let mut client = Client::new(&mesh).await;
        client.get("/events").await;
        // The second event never comes.
        let mut all = Vec::new();
        let _ = within("the cut", client.0.read_to_end(&mut all)).await;
        assert_eq!(all, b"9\r\ndata: 1\n\n\r\n", "whole: {whole}");
        counted(&mesh, if whole { "UT" } else { "SI" }, 1).await;
    }
}
