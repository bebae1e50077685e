//! Clients that misbehave: HTTP/1 as bytes, HTTP/2 as frames made by hand, and a proxy with its application before them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mantlet_identity::{ClientTlsOptions, ExpectedServer};
use mantlet_model::authz::{Action, AuthzFilter, Expr, Rule};
use mantlet_model::cluster::UpstreamProtocol;
use mantlet_model::http::HttpManager;
use mantlet_model::listener::Filters;
use mantlet_model::names::VIRTUAL_INBOUND;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_proxy::worker::Tuning;
use mantlet_testkit::{EchoServer, TestCa};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::common::{HOST, Inbound, Mode, Port, Proxy, free_address};

/// How long anything may take on a loaded machine.
pub(crate) const LONG: Duration = Duration::from_secs(90);

/// The outcome, or a failure of the test.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, work)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing happens"))
}

/// Bounds for tests: one thread, short times where a test waits for them.
pub(crate) fn tuning() -> Tuning {
    Tuning {
        workers: 1,
        ..Tuning::default()
    }
}

/// A sidecar's inbound side, PERMISSIVE, before an application that echoes and remembers.
pub(crate) struct Site {
    pub app: EchoServer,
    pub proxy: Proxy,
    pub inbound: Inbound,
    pub ca: TestCa,
}

impl Site {
    pub(crate) async fn new() -> Site {
        Site::tuned(tuning()).await
    }

    pub(crate) async fn tuned(tuning: Tuning) -> Site {
        let app = EchoServer::start().await;
        let (proxy, inbound, ca) = before(app.address(), tuning).await;
        Site {
            app,
            proxy,
            inbound,
            ca,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.inbound.listen
    }

    /// A rule in force from now on.
    pub(crate) async fn rule(&mut self, action: Action, expr: Expr) {
        self.inbound.authz = rule(action, expr);
        self.proxy.apply(self.inbound.snapshot()).await;
    }

    /// The same configuration with other HTTP settings.
    pub(crate) async fn change(&self, change: impl Fn(&mut HttpManager)) {
        self.proxy.apply(changed(self.inbound.snapshot(), change)).await;
    }

    /// Somebody else's request is answered.
    pub(crate) async fn is_well(&self) {
        is_well(self.address()).await;
        let seen = self.app.requests();
        assert!(seen.iter().any(|r| r.path == "/well"), "the application has seen it");
    }

    /// A connection with a workload's certificate.
    pub(crate) async fn mtls(&self, alpn: &str) -> TlsStream<TcpStream> {
        mtls(self.address(), &self.ca, alpn).await
    }
}

/// A proxy before an application.
pub(crate) async fn before(app: SocketAddr, tuning: Tuning) -> (Proxy, Inbound, TestCa) {
    before_as(app, tuning, UpstreamProtocol::Http1).await
}

/// A proxy before an application that speaks this.
pub(crate) async fn before_as(app: SocketAddr, tuning: Tuning, protocol: UpstreamProtocol) -> (Proxy, Inbound, TestCa) {
    let ca = TestCa::new("cluster.local");
    let proxy = Proxy::tuned("web", tuning);
    proxy.identity(&ca, "web");
    *proxy.destination.lock().unwrap() = app;
    let inbound = Inbound {
        listen: free_address(),
        app,
        port: Port::Http,
        mode: Mode::Permissive,
        authz: vec![],
        protocol,
    };
    proxy.apply(inbound.snapshot()).await;
    (proxy, inbound, ca)
}

pub(crate) fn rule(action: Action, expr: Expr) -> Vec<AuthzFilter> {
    vec![AuthzFilter {
        action,
        enforced: true,
        rules: vec![Rule {
            id: "ns[default]-policy[threat]-rule[0]".into(),
            expr,
        }],
        shadow: vec![],
    }]
}

pub(crate) fn changed(mut snapshot: ProxySnapshot, change: impl Fn(&mut HttpManager)) -> ProxySnapshot {
    let listener = Arc::make_mut(snapshot.listeners.get_mut(VIRTUAL_INBOUND).unwrap());
    for chain in &mut listener.chains {
        if let Filters::Http(http) = &mut chain.filters {
            change(http);
        }
    }
    snapshot
}

pub(crate) async fn is_well(address: SocketAddr) {
    let answer = soon(
        "a bystander's request",
        once(address, b"GET /well HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "a bystander gets {answer}");
}

pub(crate) async fn mtls(address: SocketAddr, ca: &TestCa, alpn: &str) -> TlsStream<TcpStream> {
    let config = ca
        .workload("default", "sleep")
        .identity
        .client(&ClientTlsOptions {
            expected: ExpectedServer::ChainOnly,
            alpn: vec![alpn.as_bytes().to_vec()],
            present_certificate: true,
            min_tls13: false,
        })
        .unwrap();
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(HOST).unwrap();
    TlsConnector::from(config).connect(name, tcp).await.unwrap()
}

/// Writes bytes and reads until the proxy ends the connection, however it does.
pub(crate) async fn once(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    on(&mut stream, bytes).await
}

/// The same on an open stream.
pub(crate) async fn on(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), bytes: &[u8]) -> String {
    // The proxy may refuse before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut out = Vec::new();
    let read = async { while stream.read_buf(&mut out).await.unwrap_or(0) > 0 {} };
    soon("the end of the connection", read).await;
    String::from_utf8_lossy(&out).into_owned()
}

/// Writes bytes and ends its side, so that nobody waits for more.
pub(crate) async fn half(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    on(&mut stream, b"").await
}

/// The statuses of all answers in a text.
pub(crate) fn statuses(text: &str) -> Vec<u16> {
    text.match_indices("HTTP/1.1 ")
        .filter_map(|(at, _)| text.get(at + 9..at + 12)?.parse().ok())
        .collect()
}

/// A frame (RFC 9113 section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A header block: literals without indexing and without Huffman codes (RFC 7541 section 6.2.2).
pub(crate) fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0);
        for text in [name, value] {
            integer(&mut out, text.len());
            out.extend(*text);
        }
    }
    out
}

/// A string's length (RFC 7541 section 5.1, seven bits).
pub(crate) fn integer(out: &mut Vec<u8>, mut value: usize) {
    if value < 127 {
        out.push(value as u8);
        return;
    }
    out.push(127);
    value -= 127;
    while value >= 128 {
        out.push((value % 128) as u8 | 128);
        value /= 128;
    }
    out.push(value as u8);
}

/// Pseudo header fields and more.
pub(crate) fn request(method: &str, path: &str, more: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut fields: Vec<(&[u8], &[u8])> = vec![
        (b":method", method.as_bytes()),
        (b":scheme", b"http"),
        (b":authority", b"a"),
        (b":path", path.as_bytes()),
    ];
    fields.extend(more);
    block(&fields)
}

/// A GET as one frame.
pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &request("GET", path, &[]))
}

/// A frame that came back.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of RST_STREAM and GOAWAY.
    pub(crate) fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        self.payload
            .get(at..at + 4)
            .map_or(u32::MAX, |b| u32::from_be_bytes(b.try_into().unwrap()))
    }

    /// The status of an answer's head, which the proxy's codec writes from the static table or as a literal.
    pub(crate) fn status(&self) -> u16 {
        const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
        let sizes = self.payload.iter().take_while(|b| **b & 0xe0 == 0x20).count();
        match &self.payload[sizes..] {
            [first, ..] if (0x88..=0x8e).contains(first) => STATIC[usize::from(first - 0x88)],
            // Literal with the name :status, with indexing or without.
            [0x48 | 0x08, 3, text @ ..] => std::str::from_utf8(&text[..3]).unwrap().parse().unwrap(),
            // Huffman codes of digits: 0 to 2 are five bits, 3 to 9 are six.
            [0x48 | 0x08, length, text @ ..] if length & 0x80 != 0 => {
                let bits: Vec<u8> = text[..usize::from(length & 0x7f)]
                    .iter()
                    .flat_map(|b| (0..8).rev().map(move |i| b >> i & 1))
                    .collect();
                let (mut at, mut out) = (0, 0u16);
                let take = |at: usize, n: usize| bits[at..at + n].iter().fold(0u16, |sum, b| sum * 2 + u16::from(*b));
                for _ in 0..3 {
                    let five = take(at, 5);
                    let digit = if five < 3 {
                        at += 5;
                        five
                    } else {
                        at += 6;
                        take(at - 6, 6) - 0x19 + 3
                    };
                    out = out * 10 + digit;
                }
                out
            }
            other => panic!("no status in {other:x?}"),
        }
    }
}

/// One HTTP/2 connection without any rules. A task reads what comes back.
pub(crate) struct H2 {
    writer: WriteHalf<Box<dyn Io>>,
    frames: mpsc::UnboundedReceiver<Frame>,
    ended: bool,
    reader: tokio::task::AbortHandle,
}

impl Drop for H2 {
    /// The reader holds the socket, too.
    fn drop(&mut self) {
        self.reader.abort();
    }
}

pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl H2 {
    /// With prior knowledge, after the preface and empty settings.
    pub(crate) async fn connect(address: SocketAddr) -> H2 {
        let mut h2 = H2::over(TcpStream::connect(address).await.unwrap());
        h2.begin().await;
        h2
    }

    pub(crate) async fn begin(&mut self) {
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        // No dynamic table for answers, so that each can be read alone.
        self.send(&frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0])).await;
    }

    pub(crate) fn over(stream: impl Io + 'static) -> H2 {
        let (mut reader, writer) = tokio::io::split(Box::new(stream) as Box<dyn Io>);
        let (sender, frames) = mpsc::unbounded_channel();
        let reading = tokio::spawn(async move {
            let mut head = [0u8; 9];
            while reader.read_exact(&mut head).await.is_ok() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                if reader.read_exact(&mut payload).await.is_err() {
                    return;
                }
                let stream = u32::from_be_bytes(head[5..].try_into().unwrap()) & 0x7fff_ffff;
                let frame = Frame {
                    kind: head[3],
                    flags: head[4],
                    stream,
                    payload,
                };
                if sender.send(frame).is_err() {
                    return;
                }
            }
        });
        H2 {
            writer,
            frames,
            ended: false,
            reader: reading.abort_handle(),
        }
    }

    /// Whether the bytes could be written.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        let sent = soon("sending", self.writer.write_all(bytes)).await.is_ok();
        sent && soon("flushing", self.writer.flush()).await.is_ok()
    }

    /// The next frame, or nothing when the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let next = soon("the next frame", self.frames.recv()).await;
        self.ended |= next.is_none();
        next
    }

    /// Whether the proxy has ended the connection.
    pub(crate) fn is_over(&mut self) -> bool {
        self.ended || self.frames.is_closed() && self.frames.is_empty()
    }

    /// Reads until a frame that is wanted; nothing when the connection ends before.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        loop {
            let frame = self.next().await?;
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }

    /// Reads to the end of the connection; the error code of a GOAWAY before it.
    pub(crate) async fn goaway(&mut self) -> Option<u32> {
        let mut code = None;
        while let Some(frame) = self.next().await {
            if frame.kind == GOAWAY {
                code = Some(frame.code());
            }
        }
        code
    }

    /// Whether the connection still answers: a PING comes back.
    pub(crate) async fn is_alive(&mut self) -> bool {
        const MARK: &[u8] = b"mantlet?";
        self.send(&frame(PING, 0, 0, MARK)).await
            && self
                .until(|f| f.kind == PING && f.flags & ACK != 0 && f.payload == MARK)
                .await
                .is_some()
    }

    /// What came of a stream: the status of its answer, or the code of its reset, or nothing but the connection's end.
    pub(crate) async fn outcome(&mut self, stream: u32) -> Outcome {
        match self
            .until(|f| f.kind == GOAWAY || f.stream == stream && matches!(f.kind, HEADERS | RST_STREAM))
            .await
        {
            Some(frame) if frame.kind == HEADERS => Outcome::Status(frame.status()),
            Some(frame) if frame.kind == RST_STREAM => Outcome::Reset(frame.code()),
            _ => Outcome::Closed,
        }
    }
}

/// See [`H2::outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Status(u16),
    Reset(u32),
    Closed,
}

impl Outcome {
    /// Refused, in whatever way.
    pub(crate) fn is_refusal(self) -> bool {
        match self {
            Outcome::Status(status) => (400..500).contains(&status),
            Outcome::Reset(_) | Outcome::Closed => true,
        }
    }
}
