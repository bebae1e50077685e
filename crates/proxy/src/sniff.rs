//! What the first bytes of a connection say: TLS ClientHello (server name, protocols), HTTP/1, HTTP/2 preface, or neither.
//!
//! Called by `connection` before a filter chain is chosen. Bytes are read into a buffer of our own and never peeked at: a
//! post-quantum ClientHello arrives in several segments, and peeking cannot wait for the rest. The parser of TLS is rustls's.

use std::io::{self, Cursor};

use bytes::{Bytes, BytesMut};
use rustls::server::{Accepted, Acceptor};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes that are read before a decision; beyond it the connection counts as raw bytes (a ClientHello or a request
/// line of that size is refused later by its own parser).
const LIMIT: usize = 64 * 1024;

/// First bytes of every HTTP/2 connection with prior knowledge (RFC 9113 section 3.4).
pub const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A finished inspection.
pub struct Sniffed {
    /// Bytes read so far; they belong in front of the stream unless `hello` is used.
    pub bytes: Bytes,
    /// The connection's kind.
    pub kind: Kind,
}

/// What the bytes are.
pub enum Kind {
    /// A TLS ClientHello. `accepted` is absent when it is one that rustls cannot read (very old or broken): it can be
    /// passed through, not terminated.
    Tls {
        /// rustls' view; it has consumed all of `bytes`.
        accepted: Option<Box<Accepted>>,
        /// Server name, lower case.
        server_name: Option<String>,
        /// Protocols offered.
        alpn: Vec<String>,
    },
    /// HTTP/1.0 or HTTP/1.1 request line: the value is its ALPN name.
    Http1(&'static str),
    /// HTTP/2 preface.
    Http2,
    /// Something else, or not inspected.
    Raw,
}

/// Which inspectors run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspect {
    /// Look for TLS.
    pub tls: bool,
    /// Look for HTTP in plaintext.
    pub http: bool,
}

/// Reads until the kind is known, the peer ends its side, or the limit is reached. What was read stays in `buffer`, so a caller that gives
/// up waiting keeps the bytes.
///
/// # Errors
/// The stream's read error.
pub async fn sniff<S: AsyncRead + Unpin>(stream: &mut S, inspect: Inspect, buffer: &mut BytesMut) -> io::Result<Kind> {
    if !inspect.tls && !inspect.http {
        return Ok(Kind::Raw);
    }
    let mut state = State::new(inspect);
    loop {
        if buffer.len() >= LIMIT {
            return Ok(Kind::Raw);
        }
        buffer.reserve(4096);
        let read = stream.read_buf(buffer).await?;
        if read == 0 {
            return Ok(Kind::Raw);
        }
        if let Some(kind) = state.feed(&buffer[..]) {
            return Ok(kind);
        }
    }
}

struct State {
    tls: bool,
    http: bool,
    acceptor: Acceptor,
    /// How many of the bytes rustls has been given.
    fed: usize,
}

impl State {
    fn new(inspect: Inspect) -> Self {
        State {
            tls: inspect.tls,
            http: inspect.http,
            acceptor: Acceptor::default(),
            fed: 0,
        }
    }

    /// `all` is everything read so far.
    fn feed(&mut self, all: &[u8]) -> Option<Kind> {
        if self.tls {
            match looks_like_client_hello(all) {
                Some(false) => self.tls = false,
                None => return None,
                Some(true) => return self.feed_tls(all),
            }
        }
        if self.http { http_kind(all) } else { Some(Kind::Raw) }
    }

    fn feed_tls(&mut self, all: &[u8]) -> Option<Kind> {
        let mut cursor = Cursor::new(&all[self.fed..]);
        while self.fed < all.len() {
            match self.acceptor.read_tls(&mut cursor) {
                Ok(0) => break,
                Ok(n) => self.fed += n,
                Err(_) => return Some(unreadable()),
            }
        }
        match self.acceptor.accept() {
            Ok(None) => None,
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let server_name = hello.server_name().map(str::to_ascii_lowercase);
                let alpn = hello
                    .alpn()
                    .map(|list| list.map(|p| String::from_utf8_lossy(p).into_owned()).collect())
                    .unwrap_or_default();
                Some(Kind::Tls {
                    accepted: Some(Box::new(accepted)),
                    server_name,
                    alpn,
                })
            }
            Err(_) => Some(unreadable()),
        }
    }
}

fn unreadable() -> Kind {
    Kind::Tls {
        accepted: None,
        server_name: None,
        alpn: Vec::new(),
    }
}

/// Record type, version (2), length (2), handshake type.
const HEADER: usize = 6;

/// Whether bytes begin as a handshake record with a ClientHello; `None` while it could still become one.
fn looks_like_client_hello(all: &[u8]) -> Option<bool> {
    let checks: [fn(u8) -> bool; HEADER] = [|b| b == 0x16, |b| b == 3, |b| b <= 4, |_| true, |_| true, |b| b == 1];
    for (check, byte) in checks.iter().zip(all) {
        if !check(*byte) {
            return Some(false);
        }
    }
    (all.len() >= HEADER).then_some(true)
}

/// HTTP/2 preface or an HTTP/1 request line; `None` while undecided.
fn http_kind(all: &[u8]) -> Option<Kind> {
    let seen = all.len().min(H2_PREFACE.len());
    if all[..seen] == H2_PREFACE[..seen] {
        return (seen == H2_PREFACE.len()).then_some(Kind::Http2);
    }
    // RFC 9112 section 2.2: a server should ignore an empty line before the request line.
    let line = match all {
        [b'\r', b'\n', rest @ ..] => rest,
        [b'\r'] => return None,
        other => other,
    };
    let method_end = line.iter().position(|b| !is_token(*b));
    match method_end {
        None if line.len() <= 32 => return None,
        Some(end) if end > 0 && line[end] == b' ' => {}
        _ => return Some(Kind::Raw),
    }
    let Some(end) = line.iter().position(|b| *b == b'\n') else {
        return if line.contains(&0) { Some(Kind::Raw) } else { None };
    };
    let line = line[..end].strip_suffix(b"\r").unwrap_or(&line[..end]);
    Some(if line.ends_with(b" HTTP/1.1") {
        Kind::Http1("http/1.1")
    } else if line.ends_with(b" HTTP/1.0") {
        Kind::Http1("http/1.0")
    } else {
        Kind::Raw
    })
}

/// RFC 9110 `tchar`.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether a connection that is HTTP begins with the HTTP/2 preface; reads no more than the preface.
///
/// # Errors
/// The stream's read error.
pub async fn is_http2<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut BytesMut) -> io::Result<bool> {
    loop {
        let seen = buffer.len().min(H2_PREFACE.len());
        if buffer[..seen] != H2_PREFACE[..seen] {
            return Ok(false);
        }
        if seen == H2_PREFACE.len() {
            return Ok(true);
        }
        buffer.reserve(8192);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn hello(name: &str, alpn: &[&str]) -> Vec<u8> {
        let provider = mantlet_identity::tls::mesh_provider();
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name.to_string().try_into().unwrap()).unwrap();
        let mut out = Vec::new();
        client.write_tls(&mut out).unwrap();
        out
    }

    /// Feeds the bytes in pieces of `step` and returns the kind.
    async fn run(bytes: &[u8], step: usize, inspect: Inspect) -> Kind {
        let mut builder = tokio_test_io(bytes, step);
        let mut buffer = BytesMut::new();
        sniff(&mut builder, inspect, &mut buffer).await.unwrap()
    }

    /// A reader that hands out at most `step` bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl AsyncRead for Pieces<'_> {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buf: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            let n = self.1.min(self.0.len()).min(buf.remaining());
            buf.put_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            std::task::Poll::Ready(Ok(()))
        }
    }

    fn tokio_test_io(bytes: &[u8], step: usize) -> Pieces<'_> {
        Pieces(bytes, step)
    }

    const BOTH: Inspect = Inspect { tls: true, http: true };

    #[tokio::test]
    async fn client_hellos_are_read_however_they_are_cut() {
        let bytes = hello("Outbound_.80_._.Web.default", &["istio-http/1.1", "istio"]);
        for step in [1, 2, 5, 6, 7, 100, 700, 100_000] {
            match run(&bytes, step, BOTH).await {
                Kind::Tls {
                    accepted,
                    server_name,
                    alpn,
                } => {
                    assert!(accepted.is_some(), "step {step}");
                    assert_eq!(server_name.as_deref(), Some("outbound_.80_._.web.default"));
                    assert_eq!(alpn, ["istio-http/1.1", "istio"]);
                }
                _ => panic!("step {step}: not TLS"),
            }
        }
    }

    #[tokio::test]
    async fn plaintext_kinds_are_told_apart() {
        for step in [1, 3, 1000] {
            assert!(matches!(
                run(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", step, BOTH).await,
                Kind::Http1("http/1.1")
            ));
            assert!(matches!(
                run(b"BREW /pot HTTP/1.0\r\n\r\n", step, BOTH).await,
                Kind::Http1("http/1.0")
            ));
            assert!(matches!(run(H2_PREFACE, step, BOTH).await, Kind::Http2));
            assert!(matches!(
                run(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", step, BOTH).await,
                Kind::Raw
            ));
            assert!(matches!(run(b"SSH-2.0-OpenSSH\r\n", step, BOTH).await, Kind::Raw));
            assert!(matches!(run(b"\x00\x01\x02", step, BOTH).await, Kind::Raw));
            assert!(matches!(run(b"EHLO mail.example.org\r\n", step, BOTH).await, Kind::Raw));
            assert!(matches!(run(b"", step, BOTH).await, Kind::Raw));
        }
    }

    #[tokio::test]
    async fn inspectors_that_are_off_see_nothing() {
        let bytes = hello("a", &[]);
        let only_http = Inspect { tls: false, http: true };
        assert!(matches!(run(&bytes, 1000, only_http).await, Kind::Raw));
        let only_tls = Inspect { tls: true, http: false };
        assert!(matches!(run(b"GET / HTTP/1.1\r\n", 1000, only_tls).await, Kind::Raw));
    }

    #[tokio::test]
    async fn a_broken_client_hello_is_still_tls() {
        let mut bytes = hello("a", &[]);
        for byte in &mut bytes[11..] {
            *byte = 0xff;
        }
        assert!(matches!(
            run(&bytes, 1000, BOTH).await,
            Kind::Tls { accepted: None, .. }
        ));
    }

    #[tokio::test]
    async fn an_endless_request_line_is_given_up() {
        let mut bytes = b"GET /".to_vec();
        bytes.resize(200_000, b'a');
        assert!(matches!(run(&bytes, 10_000, BOTH).await, Kind::Raw));
    }
}
