//! HTTP in its variants across both proxies: HTTP/2 and gRPC trailers, WebSocket, streams, large bodies, empty answers;
//! and applications and clients that misbehave.

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use common::*;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mantlet_model::cluster::UpstreamProtocol;
use mantlet_testkit::EchoServer;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// An HTTP/2 server that answers with the request's body in small frames and gRPC trailers.
async fn grpc_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let service = service_fn(|request: http::Request<Incoming>| async move {
                    assert_eq!(request.version(), http::Version::HTTP_2);
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let mut frames: Vec<Result<Frame<Bytes>, Infallible>> = body
                        .chunks(3)
                        .map(|c| Ok(Frame::data(Bytes::copy_from_slice(c))))
                        .collect();
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "5".parse().unwrap());
                    trailers.insert("grpc-message", "none such".parse().unwrap());
                    frames.push(Ok(Frame::trailers(trailers)));
                    let body = StreamBody::new(futures::stream::iter(frames));
                    Ok::<_, Infallible>(
                        http::Response::builder()
                            .header("content-type", "application/grpc")
                            .body(body)
                            .unwrap(),
                    )
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(tcp), service)
                    .await;
            });
        }
    });
    address
}

#[tokio::test]
async fn grpc_crosses_with_trailers_and_its_status_is_counted() {
    let app = grpc_app().await;
    let mut mesh = Mesh::new(app, Port::Http, Mode::Strict).await;
    mesh.inbound.protocol = UpstreamProtocol::Http2;
    mesh.outbound.protocol = UpstreamProtocol::Http2;
    mesh.apply().await;
    let tcp = TcpStream::connect(mesh.entry()).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        let request = http::Request::builder()
            .method("POST")
            .uri("http://web/pkg.Service/Method")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from_static(b"\0\0\0\0\x05hello")))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let collected = response.into_body().collect().await.unwrap();
        let trailers = collected.trailers().cloned().unwrap();
        assert_eq!(trailers["grpc-status"], "5");
        assert_eq!(trailers["grpc-message"], "none such");
        assert_eq!(collected.to_bytes(), &b"\0\0\0\0\x05hello"[..]);
    }
    let metrics = mesh.server.metrics();
    let line = metrics.lines().find(|l| l.starts_with("istio_requests_total")).unwrap();
    assert!(line.contains("request_protocol=\"grpc\""), "{line}");
    assert!(line.contains("grpc_response_status=\"5\""), "{line}");
    assert!(line.ends_with(" 3"), "{line}");
}

#[tokio::test]
async fn many_streams_share_one_connection() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    mesh.outbound.protocol = UpstreamProtocol::Http2;
    mesh.apply().await;
    let tcp = TcpStream::connect(mesh.entry()).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    let calls = (0..200).map(|n| {
        let mut sender = sender.clone();
        async move {
            let request = http::Request::builder()
                .uri(format!("http://web/{n}"))
                .body(Full::new(Bytes::new()))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, format!("/{n}"));
        }
    });
    futures::future::join_all(calls).await;
    assert_eq!(app.requests().len(), 200);
}

/// A WebSocket-like server: 101 (unless the path says no), then echo.
async fn websocket_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut stream = BufReader::new(tcp);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let lower = head.to_ascii_lowercase();
                if head.starts_with("GET /plain") || !lower.contains("upgrade: websocket") {
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\nx-upgrade: {}\r\n\r\nno",
                        lower.contains("upgrade")
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    return;
                }
                assert!(lower.contains("connection: upgrade"), "{head}");
                let answer =
                    "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\nready";
                stream.write_all(answer.as_bytes()).await.unwrap();
                let mut buffer = [0u8; 1024];
                while let Ok(n) = stream.read(&mut buffer).await {
                    if n == 0 {
                        return;
                    }
                    stream.write_all(&buffer[..n]).await.unwrap();
                }
            });
        }
    });
    address
}

async fn read_head(stream: &mut BufReader<TcpStream>) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).await.unwrap() > 0, "closed after {head:?}");
    }
    head
}

#[tokio::test]
async fn websockets_are_tunnelled_and_other_upgrades_are_not() {
    let mesh = Mesh::new(websocket_app().await, Port::Http, Mode::Strict).await;
    let mut stream = BufReader::new(TcpStream::connect(mesh.entry()).await.unwrap());
    let request = "GET /chat HTTP/1.1\r\nHost: web\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.to_ascii_lowercase().contains("upgrade: websocket"));
    let mut five = [0u8; 5];
    stream.read_exact(&mut five).await.unwrap();
    assert_eq!(&five, b"ready");
    for word in [b"hello", b"world"] {
        stream.write_all(word).await.unwrap();
        stream.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, word);
    }
    // The application says no: an ordinary answer.
    let mut stream = BufReader::new(TcpStream::connect(mesh.entry()).await.unwrap());
    stream
        .write_all(request.replace("/chat", "/plain").as_bytes())
        .await
        .unwrap();
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    // h2c upgrade would carry requests past the checks (threat 55): the header does not reach the application.
    let mut stream = BufReader::new(TcpStream::connect(mesh.entry()).await.unwrap());
    let h2c = "GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    stream.write_all(h2c.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await;
    assert!(head.contains("x-upgrade: false"), "{head}");
}

#[tokio::test]
async fn large_bodies_pass_whole_in_both_directions() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("big");
    let data: Vec<u8> = (0..8_000_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&file, &data).unwrap();
    let back = directory.path().join("back");
    let program = mantlet_testkit::program("curl");
    for extra in [
        &[][..],
        &["-H", "Transfer-Encoding: chunked"],
        &["-H", "Expect: 100-continue"],
    ] {
        let status = tokio::process::Command::new(&program)
            .args([
                "-sS",
                "--fail",
                "--max-time",
                "30",
                "-X",
                "POST",
                "-H",
                "Host: web",
                "--data-binary",
            ])
            .arg(format!("@{}", file.display()))
            .args(extra)
            .arg("-o")
            .arg(&back)
            .arg(format!("http://{}/upload", mesh.entry()))
            .status()
            .await
            .unwrap();
        assert!(status.success(), "{extra:?}");
        assert!(
            std::fs::read(&back).unwrap() == data,
            "{extra:?}: other bytes came back"
        );
    }
}

/// Answers by path, byte for byte as written here, then closes or waits.
async fn raw_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut stream = BufReader::new(tcp);
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let path = head.split(' ').nth(1).unwrap_or_default().to_string();
                    let (answer, close): (&[u8], bool) = match path.as_str() {
                        "/old" => (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", true),
                        "/silent" => (b"", true),
                        "/short" => (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort", true),
                        "/junk" => (b"this is not HTTP\r\n\r\n", true),
                        "/204" => (b"HTTP/1.1 204 No Content\r\n\r\n", false),
                        "/head" => (b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n", false),
                        "/switch" => (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nGET /smuggled", true),
                        "/continue" => (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false),
                        _ => (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false),
                    };
                    if stream.write_all(answer).await.is_err() || close {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn applications_of_every_kind_get_an_answer_through() {
    let mesh = Mesh::new(raw_app().await, Port::Http, Mode::Strict).await;
    let get = |path: &'static str| {
        let url = format!("http://{}{path}", mesh.entry());
        async move { curl(&["-H", "Host: web", &url]).await }
    };
    let old = get("/old").await;
    assert_eq!((old.status, old.body.as_str()), (200, "until the end"));
    for _ in 0..3 {
        assert_eq!(get("/204").await.status, 204);
        assert_eq!(get("/continue").await.body, "ok");
        assert_eq!(get("/").await.body, "ok");
    }
    let head = curl(&["-I", "-H", "Host: web", &format!("http://{}/head", mesh.entry())]).await;
    assert_eq!(head.status, 200);
    assert!(head.headers.contains("content-length: 12345"), "{}", head.headers);

    let silent = get("/silent").await;
    assert_eq!(silent.status, 503);
    assert!(
        silent.body.ends_with("reset reason: connection termination"),
        "{}",
        silent.body
    );
    assert_eq!(get("/junk").await.status, 502);
    // 18: the body ended before its length; 52: even its head had not left yet. Never a body that looks complete.
    assert!(matches!(get("/short").await.code, 18 | 52));
    // An answer that nobody asked for must not open a tunnel (threat 42).
    assert_eq!(get("/switch").await.status, 502);
    assert_eq!(get("/").await.body, "ok");
}

/// The only endpoint fails while a new configuration brings another one: the retry goes there.
#[tokio::test]
async fn a_retry_knows_the_endpoints_that_came_meanwhile() {
    let app = EchoServer::start().await;
    let failing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let living = std::mem::replace(&mut mesh.outbound.endpoints, vec![failing.local_addr().unwrap()]);
    mesh.apply().await;
    let url = format!("http://{}/", mesh.entry());
    let request = tokio::spawn(async move { curl(&["-H", "Host: web", &url]).await });
    let (handshake, _) = failing.accept().await.unwrap();
    mesh.outbound.endpoints = living;
    mesh.apply().await;
    drop(handshake);
    assert_eq!(request.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_post_is_never_sent_twice() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = seen.clone();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let mut buffer = [0u8; 4096];
            // Reads the request and dies before it answers.
            if tcp.read(&mut buffer).await.unwrap_or(0) > 0 {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
    });
    let mut mesh = Mesh::new(address, Port::Http, Mode::Strict).await;
    mesh.outbound.retry = Some(mantlet_model::route::Retry {
        on: "connect-failure,refused-stream,reset".into(),
        ..default_retry()
    });
    mesh.apply().await;
    let answer = curl(&[
        "-X",
        "POST",
        "-d",
        "once",
        "-H",
        "Host: web",
        &format!("http://{}/", mesh.entry()),
    ])
    .await;
    assert_eq!(answer.status, 503);
    assert_eq!(seen.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn requests_with_two_readings_are_refused() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    for (name, request) in [
        (
            "two lengths",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        ),
        ("plus", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc"),
        ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        ("no host", "GET / HTTP/1.1\r\n\r\n"),
        ("space before colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
        ("folded header", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n"),
        ("NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n"),
        (
            "chunks in 1.0",
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "odd encoding",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "too many headers",
            &format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(150)),
        ),
        (
            "too long",
            &format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(80_000)),
        ),
        ("encoded NUL", "GET /a%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
    ] {
        let mut tcp = TcpStream::connect(mesh.inbound.listen).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(5), tcp.read_buf(&mut answer)).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(matches!(read, Ok(Ok(_))) || answer.is_empty(), "{name}: {read:?}");
        let status: u16 = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        // Some faults end the connection without an answer.
        assert!(matches!(status, 0 | 400 | 413 | 414 | 426 | 431), "{name}: {text}");
        assert!(app.take().is_empty(), "{name}: it reached the application");
    }
}

#[tokio::test]
async fn a_length_beside_chunks_does_not_reach_the_application() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let mut tcp = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    // Chunks win (RFC 9112 section 6.3); what follows them is the next request, not part of the first.
    let request = "POST /first HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), tcp.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    for request in app.take() {
        assert!(
            matches!(
                (request.path.as_str(), &request.body[..]),
                ("/first", b"abc") | ("/second", b"")
            ),
            "{request:?}"
        );
        assert!(
            request.path != "/first" || !request.headers.contains_key("content-length"),
            "{request:?}"
        );
    }
}

#[tokio::test]
async fn plaintext_clients_cannot_forge_identity_headers() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let forged = format!("x-forwarded-client-cert: By=x;URI={CLIENT_SA}");
    let answer = curl(&["-H", &forged, &format!("http://{}/", mesh.inbound.listen)]).await;
    assert_eq!(answer.status, 200);
    assert!(!app.take()[0].headers.contains_key("x-forwarded-client-cert"));
}
