//! Fetches from real servers on loopback: good ones, wrong ones, hostile ones.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mantlet_testkit::TestCa;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

const KEYS: &str = r#"{"keys":[{"kty":"RSA","kid":"1","n":"AQ","e":"AQAB"}]}"#;
const LONG: Duration = Duration::from_secs(60);

/// A server that answers with what a function makes of the request's first line.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Respond = dyn Fn(&str) -> String + Send + Sync;

impl Server {
    async fn start(respond: impl Fn(&str) -> String + Send + Sync + 'static) -> Server {
        Server::start_with(None, respond).await
    }

    async fn start_with(tls: Option<TlsAcceptor>, respond: impl Fn(&str) -> String + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, respond): (_, Arc<Respond>) = (seen.clone(), Arc::new(respond));
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (log, respond, tls) = (log.clone(), respond.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(tcp, &log, &*respond).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(tcp).await {
                                serve(stream, &log, &*respond).await;
                            }
                        }
                    }
                });
            }
        });
        Server { address, seen, task }
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, log: &Mutex<Vec<String>>, respond: &Respond) {
    let mut head = Vec::new();
    let mut chunk = [0; 4096];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(n) => head.extend_from_slice(&chunk[..n]),
        }
    }
    let head = String::from_utf8(head).unwrap();
    let line = head.lines().next().unwrap().to_string();
    log.lock().unwrap().push(head);
    // The client may have gone already.
    let _ = stream.write_all(respond(&line).as_bytes()).await;
    let _ = stream.shutdown().await;
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn redirect(to: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n")
}

fn fetcher() -> Fetcher {
    let options = JwksOptions {
        guard: Guard::default().with_loopback(),
        ..JwksOptions::default()
    };
    Fetcher::with_roots(&options, Vec::new()).unwrap()
}

async fn fetch(uri: &str) -> Result<KeySet, FetchError> {
    let source = Source {
        issuer: "i".into(),
        jwks_uri: uri.into(),
    };
    fetcher().key_set(&source, LONG).await
}

#[tokio::test]
async fn a_key_set_is_fetched_and_no_credentials_are_sent() {
    let server = Server::start(|_| ok(KEYS)).await;
    let set = fetch(&server.uri("/keys?tenant=a")).await.unwrap();
    assert_eq!(set, key_set::parse(KEYS.as_bytes()).unwrap());
    let request = server.requests().remove(0).to_lowercase();
    assert!(request.starts_with("get /keys?tenant=a http/1.1"), "{request}");
    assert!(request.contains(&format!("host: {}", server.address)), "{request}");
    assert!(request.contains("connection: close"), "{request}");
    assert!(
        !request.contains("authorization") && !request.contains("cookie"),
        "{request}"
    );
}

#[tokio::test]
async fn discovery_asks_the_issuer() {
    let keys = Server::start(|_| ok(KEYS)).await;
    let uri = keys.uri("/jwks");
    let issuer = Server::start(move |_| ok(&format!(r#"{{"issuer":"x","jwks_uri":"{uri}"}}"#))).await;
    for (suffix, path) in [
        ("", "/.well-known/openid-configuration"),
        ("/", "/.well-known/openid-configuration"),
        ("/realms/a", "/realms/a/.well-known/openid-configuration"),
    ] {
        let source = Source {
            issuer: issuer.uri(suffix),
            jwks_uri: String::new(),
        };
        assert!(fetcher().key_set(&source, LONG).await.is_ok());
        assert!(issuer.requests().last().unwrap().starts_with(&format!("GET {path} ")));
    }
    // An issuer that is no URL has no place to ask.
    let source = Source {
        issuer: "accounts@example.com".into(),
        jwks_uri: String::new(),
    };
    assert!(matches!(
        fetcher().key_set(&source, LONG).await,
        Err(FetchError::Uri { .. })
    ));
}

#[tokio::test]
async fn what_is_no_key_set_is_an_error() {
    for (answer, words) in [
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_string(), "404"),
        ("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n".into(), "500"),
        ("HTTP/1.1 304 Not Modified\r\n\r\n".into(), "304"),
        (ok("<html>sign in</html>"), "not JSON"),
        (ok("{}"), "no \"keys\""),
        ("nonsense\r\n\r\n".into(), "127.0.0.1"),
        (String::new(), "127.0.0.1"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".into(), "127.0.0.1"),
    ] {
        let shown = answer.clone();
        let server = Server::start(move |_| answer.clone()).await;
        let error = fetch(&server.uri("/")).await.unwrap_err().to_string();
        assert!(error.contains(words), "{shown}: {error}");
    }
}

#[tokio::test]
async fn redirects_are_followed_a_little() {
    let server = Server::start(|line| match line.split(' ').nth(1).unwrap() {
        "/a" => redirect("/b/c"),
        "/b/c" => redirect("d?x=1"),
        "/b/d?x=1" => ok(KEYS),
        _ => redirect("/loop"),
    })
    .await;
    assert!(fetch(&server.uri("/a")).await.is_ok());
    assert!(matches!(fetch(&server.uri("/loop")).await, Err(FetchError::Redirects)));
    assert_eq!(server.requests().len(), 3 + MAX_REDIRECTS + 1);
}

#[tokio::test]
async fn a_redirect_leads_to_no_refused_place() {
    for target in [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/keys",
        "http://[::ffff:169.254.169.254]/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://user:password@127.0.0.1/",
    ] {
        let server = Server::start(move |_| redirect(target)).await;
        let error = fetch(&server.uri("/")).await.unwrap_err();
        assert!(
            matches!(error, FetchError::Address { .. } | FetchError::Uri { .. }),
            "{target}: {error}"
        );
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn refused_addresses_are_not_dialled_however_they_are_written() {
    let server = Server::start(|_| ok(KEYS)).await;
    let port = server.address.port();
    let strict = Fetcher::with_roots(&JwksOptions::default(), Vec::new()).unwrap();
    for host in [
        "127.0.0.1",
        "localhost",
        "127.1",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "[::1]",
    ] {
        let source = Source {
            issuer: "i".into(),
            jwks_uri: format!("http://{host}:{port}/keys"),
        };
        let error = strict.key_set(&source, LONG).await.unwrap_err();
        assert!(matches!(error, FetchError::Address { .. }), "{host}: {error}");
    }
    assert!(server.requests().is_empty(), "no connection was made");
    // A range that the operator closed: checked on the address behind the name.
    let closed = JwksOptions {
        guard: Guard::new(vec![super::super::guard::range("127.0.0.0/8").unwrap()]).with_loopback(),
        ..JwksOptions::default()
    };
    let source = Source {
        issuer: "i".into(),
        jwks_uri: format!("http://127.0.0.1:{port}/keys"),
    };
    let closed = Fetcher::with_roots(&closed, Vec::new()).unwrap();
    let error = closed.key_set(&source, LONG).await.unwrap_err().to_string();
    assert!(error.contains("BLOCKED_CIDRS_IN_JWKS_URIS"), "{error}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn uris_that_cannot_be_meant_are_refused() {
    for uri in [
        "",
        "keys",
        "/keys",
        "ftp://example.com/keys",
        "http://",
        "http:///keys",
        "http://user@example.com/",
        "http://example.com:0/",
        "http://example.com:99999/",
        "http://exa mple.com/",
    ] {
        assert!(matches!(fetch(uri).await, Err(FetchError::Uri { .. })), "{uri}");
    }
    let long = format!("http://127.0.0.1/{}", "a".repeat(MAX_URI));
    assert!(matches!(fetch(&long).await, Err(FetchError::Uri { .. })));
}

#[tokio::test]
async fn endless_answers_end() {
    // A body that never ends, by length and by chunks.
    let big = "x".repeat(MAX_BODY + 1);
    let answer = ok(&big);
    let server = Server::start(move |_| answer.clone()).await;
    assert!(matches!(
        fetch(&server.uri("/")).await,
        Err(FetchError::TooLarge { .. })
    ));
    let chunked = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{}",
        format!("10000\r\n{}\r\n", "y".repeat(0x10000)).repeat(32)
    );
    let server = Server::start(move |_| chunked.clone()).await;
    assert!(matches!(
        fetch(&server.uri("/")).await,
        Err(FetchError::TooLarge { .. })
    ));
    // A head that never ends.
    let head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "z".repeat(4 * MAX_HEAD));
    let server = Server::start(move |_| head.clone()).await;
    assert!(matches!(
        fetch(&server.uri("/")).await,
        Err(FetchError::Connection { .. })
    ));
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_the_timeout_and_no_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let source = Source {
        issuer: "i".into(),
        jwks_uri: format!("http://{}/keys", listener.local_addr().unwrap()),
    };
    // Accepted by the kernel, answered by nobody.
    let short = Duration::from_millis(200);
    assert!(matches!(
        fetcher().key_set(&source, short).await,
        Err(FetchError::Timeout(_))
    ));
}

#[tokio::test]
async fn https_is_verified_and_never_becomes_http() {
    let ca = TestCa::new("cluster.local");
    let server_tls = |names: &[&str]| {
        let identity = ca.host(names).identity;
        let options = mantlet_identity::ServerTlsOptions {
            client_auth: mantlet_identity::ClientAuth::None,
            alpn: Vec::new(),
            min_tls13: false,
        };
        TlsAcceptor::from(identity.server(&options).unwrap().strict())
    };
    let plain = Server::start(|_| ok(KEYS)).await;
    let downgrade = plain.uri("/keys");
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    let good = Server::start_with(Some(server_tls(&["localhost"])), move |line| {
        count.fetch_add(1, Ordering::Relaxed);
        if line.starts_with("GET /down") {
            redirect(&downgrade)
        } else {
            ok(KEYS)
        }
    })
    .await;
    let source = |path: &str| Source {
        issuer: "i".into(),
        jwks_uri: format!("https://localhost:{}{path}", good.address.port()),
    };
    let options = JwksOptions {
        guard: Guard::default().with_loopback(),
        ..JwksOptions::default()
    };
    let roots = vec![CertificateDer::from_pem_slice(ca.root_pem().as_bytes()).unwrap()];

    let trusting = Fetcher::with_roots(&options, roots.clone()).unwrap();
    assert!(trusting.key_set(&source("/keys"), LONG).await.is_ok());
    let error = trusting.key_set(&source("/down"), LONG).await.unwrap_err().to_string();
    assert!(error.contains("from https to http"), "{error}");
    assert!(plain.requests().is_empty());

    let before = served.load(Ordering::Relaxed);
    let stranger = Fetcher::with_roots(
        &options,
        vec![CertificateDer::from_pem_slice(TestCa::new("other").root_pem().as_bytes()).unwrap()],
    )
    .unwrap();
    assert!(stranger.key_set(&source("/keys"), LONG).await.is_err());
    let nobody = Fetcher::with_roots(&options, Vec::new()).unwrap();
    let error = nobody.key_set(&source("/keys"), LONG).await.unwrap_err().to_string();
    assert!(error.contains("no trust anchors"), "{error}");
    let other_name = Server::start_with(Some(server_tls(&["example.com"])), |_| ok(KEYS)).await;
    let wrong = Source {
        issuer: "i".into(),
        jwks_uri: format!("https://localhost:{}/", other_name.address.port()),
    };
    assert!(trusting.key_set(&wrong, LONG).await.is_err());
    assert!(other_name.requests().is_empty());
    assert_eq!(
        served.load(Ordering::Relaxed),
        before,
        "no request reached an unverified server"
    );

    // Only with Istio's switch.
    let skipping = JwksOptions {
        skip_verify: true,
        ..options
    };
    let skipping = Fetcher::with_roots(&skipping, Vec::new()).unwrap();
    assert!(skipping.key_set(&wrong, LONG).await.is_ok());
}

#[tokio::test]
async fn extra_roots_are_read_from_their_file() {
    let ca = TestCa::new("cluster.local");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("extra.pem");
    std::fs::write(&file, ca.root_pem()).unwrap();
    let options = JwksOptions {
        guard: Guard::default().with_loopback(),
        extra_roots: file,
        ..JwksOptions::default()
    };
    let identity = ca.host(&["localhost"]).identity;
    let tls = identity
        .server(&mantlet_identity::ServerTlsOptions {
            client_auth: mantlet_identity::ClientAuth::None,
            alpn: Vec::new(),
            min_tls13: false,
        })
        .unwrap();
    let server = Server::start_with(Some(TlsAcceptor::from(tls.strict())), |_| ok(KEYS)).await;
    let source = Source {
        issuer: "i".into(),
        jwks_uri: format!("https://localhost:{}/", server.address.port()),
    };
    assert!(Fetcher::new(&options).unwrap().key_set(&source, LONG).await.is_ok());
}
