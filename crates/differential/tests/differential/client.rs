//! A client that sends exactly the bytes it is told to, over connections that stay open.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mantlet_differential::world::{Connection, Request};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::pki::Pki;
use super::tokens::Mint;

/// How long anything may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// The clients' certificates.
type Configs = HashMap<(Vec<String>, bool), Arc<ClientConfig>>;

/// Makes connections.
pub(crate) struct Dialer {
    pki: Arc<Pki>,
    configs: Mutex<Configs>,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// An answer.
    Http {
        status: u16,
        body: String,
        /// `server`, `content-type` and `www-authenticate`.
        headers: [String; 3],
    },
    /// The connection ended without one.
    Closed,
}

impl Dialer {
    pub(crate) fn new(pki: Arc<Pki>) -> Dialer {
        Dialer {
            pki,
            configs: Mutex::default(),
        }
    }

    fn config(&self, uris: &[String], sni: bool) -> Arc<ClientConfig> {
        let mut all = self.configs.lock().unwrap();
        all.entry((uris.to_vec(), sni))
            .or_insert_with(|| self.pki.leaf(uris).client(sni))
            .clone()
    }

    /// A connection as `facts` says, but to `to`. Returns the client's own address too.
    pub(crate) async fn dial(&self, facts: &Connection, to: SocketAddr) -> io::Result<(Box<dyn Io>, SocketAddr)> {
        let socket = match facts.source {
            IpAddr::V4(_) => TcpSocket::new_v4()?,
            IpAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.bind(SocketAddr::new(facts.source, 0))?;
        let tcp = timeout(LIMIT, socket.connect(to)).await??;
        tcp.set_nodelay(true)?;
        let own = tcp.local_addr()?;
        let Some(uris) = &facts.peer else {
            return Ok((Box::new(tcp), own));
        };
        let name = facts.sni.clone().unwrap_or_else(|| "none.invalid".into());
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let connector = TlsConnector::from(self.config(uris, facts.sni.is_some()));
        let tls = timeout(LIMIT, connector.connect(name, tcp)).await??;
        Ok((Box::new(tls), own))
    }
}

/// One client's requests to one address.
pub(crate) struct HttpClient<'a> {
    dialer: &'a Dialer,
    mint: &'a Mint,
    facts: &'a Connection,
    to: SocketAddr,
    stream: Option<Box<dyn Io>>,
}

impl<'a> HttpClient<'a> {
    pub(crate) fn new(dialer: &'a Dialer, mint: &'a Mint, facts: &'a Connection, to: SocketAddr) -> Self {
        HttpClient {
            dialer,
            mint,
            facts,
            to,
            stream: None,
        }
    }

    pub(crate) async fn send(&mut self, request: &Request, case: usize) -> Reply {
        let bytes = request.bytes(case, &|token| self.mint.sign(token));
        if let Some(mut stream) = self.stream.take() {
            // A connection that was kept may have been closed in the meantime; then a new one tells.
            if let Ok((reply, keep)) = exchange(&mut stream, &bytes).await {
                self.stream = keep.then_some(stream);
                return reply;
            }
        }
        let Ok((mut stream, _)) = self.dialer.dial(self.facts, self.to).await else {
            return Reply::Closed;
        };
        match exchange(&mut stream, &bytes).await {
            Ok((reply, keep)) => {
                self.stream = keep.then_some(stream);
                reply
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                panic!("no answer from {} to {:?}", self.to, String::from_utf8_lossy(&bytes))
            }
            Err(_) => Reply::Closed,
        }
    }
}

async fn exchange(stream: &mut Box<dyn Io>, request: &[u8]) -> io::Result<(Reply, bool)> {
    timeout(LIMIT, async {
        stream.write_all(request).await?;
        stream.flush().await?;
        let mut seen = Vec::with_capacity(512);
        let end = loop {
            if let Some(at) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            more(stream, &mut seen).await?;
        };
        let head = String::from_utf8_lossy(&seen[..end]).to_ascii_lowercase();
        let field = |name: &str| {
            let line = head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.map(|v| v.trim().to_string()).unwrap_or_default()
        };
        let bad = |what: &str| io::Error::other(format!("{what}: {head}"));
        let status: u16 = head
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| bad("no status"))?;
        let length: usize = match field("content-length").as_str() {
            "" if status < 300 || !field("transfer-encoding").is_empty() => return Err(bad("no length")),
            "" => 0,
            text => text.parse().map_err(|_| bad("bad length"))?,
        };
        while seen.len() < end + length {
            more(stream, &mut seen).await?;
        }
        let body = String::from_utf8_lossy(&seen[end..end + length]).into_owned();
        let keep = field("connection") != "close";
        let headers = ["server", "content-type", "www-authenticate"].map(field);
        Ok((Reply::Http { status, body, headers }, keep))
    })
    .await
    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn more(stream: &mut Box<dyn Io>, seen: &mut Vec<u8>) -> io::Result<()> {
    match stream.read_buf(seen).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Whether bytes reach the application behind a TCP chain, and the client's address.
pub(crate) async fn tcp(dialer: &Dialer, facts: &Connection, to: SocketAddr) -> (bool, Option<SocketAddr>) {
    let Ok((mut stream, own)) = dialer.dial(facts, to).await else {
        return (false, None);
    };
    let passed = timeout(LIMIT, async {
        // Envoy's TLS inspector wants to see a whole record header, which is five bytes.
        let mut answer = [0; 9];
        stream.write_all(b"ping pong").await.is_ok()
            && stream.flush().await.is_ok()
            && stream.read_exact(&mut answer).await.is_ok()
    });
    (passed.await.unwrap_or(false), Some(own))
}
