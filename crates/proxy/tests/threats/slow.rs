//! Group E, entries 68 and 73: peers that are slow, silent or many. Times are short here; what is shown is that they end.

use std::time::Duration;

use mantlet_proxy::worker::Tuning;
use mantlet_testkit::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::wire::*;

const SHORT: Duration = Duration::from_millis(400);
/// Longer than any test waits.
const NEVER: Duration = Duration::from_secs(3600);

fn times(header: Duration, body: Duration, handshake: Duration) -> Tuning {
    Tuning {
        header_timeout: header,
        body_timeout: body,
        handshake_timeout: handshake,
        ..tuning()
    }
}

/// Feeds `drip` for ever, until the proxy ends the connection; what it had to say.
async fn drip(mut tcp: TcpStream, begin: &[u8], drip: &[u8]) -> String {
    let mut out = Vec::new();
    let ended = async {
        if tcp.write_all(begin).await.is_err() {
            return;
        }
        let mut pause = tokio::time::interval(Duration::from_millis(50));
        loop {
            tokio::select! {
                read = tcp.read_buf(&mut out) => match read {
                    Ok(n) if n > 0 => {}
                    _ => return,
                },
                _ = pause.tick() => if tcp.write_all(drip).await.is_err() {
                    while tcp.read_buf(&mut out).await.unwrap_or(0) > 0 {}
                    return;
                },
            }
        }
    };
    soon("the proxy has patience without end", ended).await;
    String::from_utf8_lossy(&out).into_owned()
}

/// Whether the connection is still there while a bystander is served a few times.
async fn stays(site: &Site, begin: &[u8]) -> bool {
    let mut tcp = TcpStream::connect(site.address()).await.unwrap();
    tcp.write_all(begin).await.unwrap();
    let until = tokio::time::Instant::now() + 5 * SHORT;
    while tokio::time::Instant::now() < until {
        site.is_well().await;
    }
    let mut buffer = [0u8; 4096];
    loop {
        match tcp.try_read(&mut buffer) {
            Ok(n) if n > 0 => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return true,
            _ => return false,
        }
    }
}

/// A head that comes one byte at a time.
#[tokio::test]
async fn reg_73_slow_heads() {
    let site = Site::tuned(times(SHORT, NEVER, NEVER)).await;
    for begin in [
        &b""[..],
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nx: ",
        // The second request on a connection.
        b"GET /first HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nx: ",
    ] {
        let tcp = TcpStream::connect(site.address()).await.unwrap();
        let text = drip(tcp, begin, b"x").await;
        assert!(
            matches!(statuses(&text)[..], [] | [200] | [400] | [408] | [431]),
            "{text}"
        );
    }
    site.is_well().await;
    assert!(site.app.take().iter().all(|r| r.path == "/first" || r.path == "/well"));
    let patient = Site::tuned(times(NEVER, NEVER, NEVER)).await;
    assert!(
        stays(&patient, b"GET / HTTP/1.1\r\nHost: a\r\nx: ").await,
        "without the bound it would wait"
    );
}

/// An HTTP/2 header block without end, a frame without end, a preface without end.
#[tokio::test]
async fn reg_73_slow_frames() {
    let site = Site::tuned(times(SHORT, NEVER, NEVER)).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let settings = frame(SETTINGS, 0, 0, &[]);
    let open = frame(HEADERS, 0, 1, &request("GET", "/slow", &[]));
    for (name, begin, feed) in [
        ("preface", preface[..20].to_vec(), &b""[..]),
        ("block", [&preface[..], &settings, &open].concat(), b""),
        ("frame", [&preface[..], &settings, &open[..30]].concat(), b""),
        (
            "ping",
            [&preface[..], &settings, &frame(PING, 0, 0, &[0; 8])[..12]].concat(),
            b"",
        ),
    ] {
        let tcp = TcpStream::connect(site.address()).await.unwrap();
        drip(tcp, &begin, feed).await;
        println!("{name} ended");
    }
    let patient = Site::tuned(times(NEVER, NEVER, NEVER)).await;
    assert!(stays(&patient, &[&preface[..], &settings, &open].concat()).await);
    // A connection that has nothing begun is not slow.
    let mut idle = H2::connect(site.address()).await;
    let until = tokio::time::Instant::now() + 5 * SHORT;
    while tokio::time::Instant::now() < until {
        site.is_well().await;
    }
    assert!(idle.is_alive().await);
}

/// A body that stays away while the application waits for it.
#[tokio::test]
async fn reg_73_slow_bodies() {
    let site = Site::tuned(times(NEVER, SHORT, NEVER)).await;
    // The sweep must come often enough for the test, too.
    let site = Site::tuned(Tuning {
        header_timeout: 4 * SHORT,
        ..site.proxy.shared.tuning.clone()
    })
    .await;
    for begin in [
        &b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf"[..],
        b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let tcp = TcpStream::connect(site.address()).await.unwrap();
        let text = drip(tcp, begin, b"").await;
        assert_eq!(statuses(&text), [408], "{text}");
    }
    // On HTTP/2 only the stream ends.
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/slow", &[])))
        .await;
    h2.send(&frame(DATA, 0, 1, b"half")).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(408));
    h2.send(&get(3, "/next")).await;
    assert_eq!(h2.outcome(3).await, Outcome::Status(200));
    // Streams of gRPC may be silent for an hour.
    let grpc = request(
        "POST",
        "/slow",
        &[(b"content-type", b"application/grpc"), (b"te", b"trailers")],
    );
    h2.send(&frame(HEADERS, END_HEADERS, 5, &grpc)).await;
    let until = tokio::time::Instant::now() + 5 * SHORT;
    while tokio::time::Instant::now() < until {
        site.is_well().await;
    }
    h2.send(&frame(DATA, END_STREAM, 5, b"late")).await;
    assert_eq!(h2.outcome(5).await, Outcome::Status(200));
    assert!(
        site.app
            .take()
            .iter()
            .all(|r| r.body.is_empty() || &r.body[..] == b"late")
    );
    let patient = Site::tuned(times(NEVER, NEVER, NEVER)).await;
    assert!(
        stays(
            &patient,
            b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf"
        )
        .await
    );
}

/// A TLS handshake that is never finished, and a ClientHello that never ends.
#[tokio::test]
async fn reg_73_slow_handshakes() {
    let hello = client_hello();
    let site = Site::tuned(times(SHORT, NEVER, SHORT)).await;
    for begin in [&hello[..], &hello[..hello.len() / 2], &hello[..3]] {
        let tcp = TcpStream::connect(site.address()).await.unwrap();
        drip(tcp, begin, b"").await;
    }
    site.is_well().await;
    let patient = Site::tuned(times(NEVER, NEVER, NEVER)).await;
    assert!(stays(&patient, &hello[..3]).await);
}

/// A mesh client's ClientHello.
pub(crate) fn client_hello() -> Vec<u8> {
    let provider = mantlet_identity::tls::mesh_provider();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"istio-h2".to_vec()];
    let name = "outbound_.80_._.web.default.svc.cluster.local".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}

/// A connection without requests ends, at once when there is no room and late otherwise.
#[tokio::test]
async fn reg_73_idle_connections_make_room() {
    let site = Site::tuned(Tuning {
        max_connections: 2,
        ..times(SHORT, NEVER, NEVER)
    })
    .await;
    let mut idle = Vec::new();
    for _ in 0..2 {
        let mut tcp = TcpStream::connect(site.address()).await.unwrap();
        tcp.write_all(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = [0u8; 12];
        tcp.read_exact(&mut answer).await.unwrap();
        idle.push(tcp);
    }
    // There is no room, and yet it is served in the end.
    site.is_well().await;
    let roomy = Site::tuned(times(SHORT, NEVER, NEVER)).await;
    assert!(!stays(&roomy, b"").await, "a connection that says nothing ends");
    let mut tcp = TcpStream::connect(roomy.address()).await.unwrap();
    tcp.write_all(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = vec![0u8; 12];
    tcp.read_exact(&mut answer).await.unwrap();
    let until = tokio::time::Instant::now() + 5 * SHORT;
    while tokio::time::Instant::now() < until {
        roomy.is_well().await;
    }
    tcp.write_all(b"GET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    tcp.read_to_end(&mut answer).await.unwrap();
    assert_eq!(
        roomy.app.take().iter().filter(|r| r.path == "/second").count(),
        1,
        "an idle one with room stays"
    );
}

/// CVE-2020-8663: more connections than the proxy takes. Those that wait are served when others end; none is lost.
#[tokio::test]
async fn reg_68_too_many_connections_wait() {
    let site = Site::tuned(Tuning {
        max_connections: 8,
        ..tuning()
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..8 {
        let mut tcp = TcpStream::connect(site.address()).await.unwrap();
        tcp.write_all(b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = [0u8; 12];
        tcp.read_exact(&mut answer).await.unwrap();
        held.push(tcp);
    }
    let late: Vec<_> = (0..20)
        .map(|_| {
            tokio::spawn(once(
                site.address(),
                b"GET /late HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            ))
        })
        .collect();
    // One is taken in before the proxy notices; the others wait.
    eventually("the proxy is full", LONG, || async {
        let open = site.proxy.shared.active_connections();
        if open >= 8 { Ok(()) } else { Err(open) }
    })
    .await;
    assert!(site.proxy.shared.active_connections() <= 9);
    drop(held);
    for task in late {
        let answer = soon("a late one", task).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

/// CVE-2020-8661: a client that sends requests without end and reads no answer. What is kept for it has an end.
#[tokio::test]
async fn reg_68_pipelined_answers_nobody_reads() {
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = app.local_addr().unwrap();
    let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = sent.clone();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = app.accept().await {
            let count = count.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0u8; 4096];
                let body = vec![b'x'; 64 << 10];
                while tcp.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                    let _ = tcp
                        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 67108864\r\n\r\n")
                        .await;
                    for _ in 0..1024 {
                        if tcp.write_all(&body).await.is_err() {
                            return;
                        }
                        count.fetch_add(body.len(), std::sync::atomic::Ordering::SeqCst);
                    }
                }
            });
        }
    });
    let (_proxy, inbound, _ca) = before(address, tuning()).await;
    let mut tcp = TcpStream::connect(inbound.listen).await.unwrap();
    let requests = b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n".repeat(1000);
    let mut written = 0;
    // Until the proxy reads no more.
    while written < 100 << 20 {
        match tokio::time::timeout(Duration::from_secs(3), tcp.write(&requests)).await {
            Ok(Ok(n)) if n > 0 => written += n,
            _ => break,
        }
    }
    assert!(written < 16 << 20, "{written} bytes of requests were taken");
    let answers = sent.load(std::sync::atomic::Ordering::SeqCst);
    assert!(answers < 32 << 20, "{answers} bytes of answers were taken");
}
