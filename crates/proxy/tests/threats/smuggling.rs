//! Group D: where a request ends, and when a connection is something else than requests.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use mantlet_model::authz::{Action, Attribute, Expr, Matcher};
use mantlet_model::cluster::UpstreamProtocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::wire::*;

/// What an application got, byte for byte, per connection.
type Seen = Arc<Mutex<Vec<Vec<u8>>>>;

/// An application that answers the n-th head on a connection with `answers[n]` (the last one again and again) and writes
/// down everything it reads.
async fn scripted(answers: &'static [&'static [u8]]) -> (SocketAddr, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Seen::default();
    let log = seen.clone();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let log = log.clone();
            tokio::spawn(async move {
                let index = {
                    let mut log = log.lock().unwrap();
                    log.push(Vec::new());
                    log.len() - 1
                };
                let (mut buffer, mut at, mut count) = ([0u8; 4096], 0, 0);
                while let Ok(n) = tcp.read(&mut buffer).await {
                    if n == 0 {
                        return;
                    }
                    let heads = {
                        let mut log = log.lock().unwrap();
                        log[index].extend(&buffer[..n]);
                        let all = &log[index];
                        let mut heads = 0;
                        while let Some(end) = all[at..].windows(4).position(|w| w == b"\r\n\r\n") {
                            at += end + 4;
                            heads += 1;
                        }
                        heads
                    };
                    for _ in 0..heads {
                        let answer = answers[count.min(answers.len() - 1)];
                        count += 1;
                        if tcp.write_all(answer).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (address, seen)
}

fn text(seen: &Seen) -> String {
    let all = seen.lock().unwrap();
    all.iter()
        .map(|c| String::from_utf8_lossy(c).into_owned())
        .collect::<Vec<_>>()
        .join("\n--\n")
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UPGRADE: &str =
    "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";

/// CVE-2024-23326: a tunnel only after 101. When the application answers otherwise, what the client sent behind its request
/// is a request like any other, and is judged.
#[tokio::test]
async fn reg_42_no_tunnel_without_101() {
    let (app, seen) = scripted(&[OK]).await;
    let (proxy, mut inbound, _ca) = before(app, tuning()).await;
    inbound.authz = rule(
        Action::Deny,
        Expr::atom(Attribute::Path, Matcher::Exact("/admin".into())),
    );
    proxy.apply(inbound.snapshot()).await;
    let behind = "GET /admin HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = once(inbound.listen, format!("{UPGRADE}{behind}").as_bytes()).await;
    assert!(matches!(statuses(&answer)[..], [200] | [200, 403]), "{answer}");
    assert!(!text(&seen).contains("/admin"), "{}", text(&seen));

    // With 101 it is a tunnel, and the same bytes are nobody's business: the test above could fail.
    const SWITCHING: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
    let (app, seen) = scripted(&[SWITCHING, b"", b""]).await;
    let (_proxy, inbound, _ca) = before(app, tuning()).await;
    let mut tcp = TcpStream::connect(inbound.listen).await.unwrap();
    tcp.write_all(UPGRADE.as_bytes()).await.unwrap();
    let mut head = [0u8; 12];
    soon("101", tcp.read_exact(&mut head)).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 101");
    tcp.write_all(behind.as_bytes()).await.unwrap();
    mantlet_testkit::eventually("the tunnel", LONG, || async {
        let text = text(&seen);
        if text.contains("/admin") { Ok(()) } else { Err(text) }
    })
    .await;
}

/// CVE-2025-64763: bytes behind a CONNECT that nobody has accepted go nowhere.
#[tokio::test]
async fn reg_43_early_data_of_connect() {
    let (app, seen) = scripted(&[OK]).await;
    let (_proxy, inbound, _ca) = before(app, tuning()).await;
    let early = "GET /early HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for target in ["a:80", "a:443", "127.0.0.1:15000"] {
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n{early}");
        let answer = once(inbound.listen, request.as_bytes()).await;
        assert_eq!(statuses(&answer), [404], "{answer}");
    }
    let mut h2 = H2::connect(inbound.listen).await;
    let connect = block(&[(b":method", b"CONNECT"), (b":authority", b"a:80")]);
    h2.send(&frame(HEADERS, END_HEADERS, 1, &connect)).await;
    h2.send(&frame(DATA, 0, 1, early.as_bytes())).await;
    assert!(h2.outcome(1).await.is_refusal());
    // Extended CONNECT (RFC 8441) was not offered.
    let mut h2 = H2::connect(inbound.listen).await;
    let websocket = request("CONNECT", "/chat", &[(b":protocol", b"websocket")]);
    h2.send(&frame(HEADERS, END_HEADERS, 1, &websocket)).await;
    assert!(h2.outcome(1).await.is_refusal());
    assert_eq!(text(&seen), "", "something reached the application");
}

/// CVE-2026-2833: the other direction. A 101 that nobody asked for opens nothing, and what follows it is no answer.
#[tokio::test]
async fn reg_44_switches_nobody_asked_for() {
    const UNASKED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged";
    let (app, seen) = scripted(&[UNASKED]).await;
    let (_proxy, inbound, _ca) = before(app, tuning()).await;
    let ask = "GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = once(inbound.listen, ask.as_bytes()).await;
    assert!(
        statuses(&answer).iter().all(|s| *s == 502) && !answer.contains("forged"),
        "{answer}"
    );
    // Each on a connection of its own: none was given back with bytes in it.
    assert!(
        seen.lock()
            .unwrap()
            .iter()
            .all(|c| String::from_utf8_lossy(c).matches("GET ").count() <= 1)
    );
    // Asked for another protocol than WebSocket: not passed on, so a 101 is unasked, too.
    let other = "GET /tls HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: TLS/1.0\r\n\r\n";
    let answer = once(inbound.listen, other.as_bytes()).await;
    assert_eq!(statuses(&answer), [502], "{answer}");
    assert!(
        !text(&seen).to_ascii_lowercase().contains("upgrade:"),
        "{}",
        text(&seen)
    );
}

/// Whether the bytes behind a request with odd framing are ever taken for a request.
async fn nothing_arrives(name: &str, requests: &[&str]) {
    let site = Site::new().await;
    for request in requests {
        let smuggled = format!("{request}GET /smuggled HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let answer = once(site.address(), smuggled.as_bytes()).await;
        assert!(
            statuses(&answer).iter().all(|s| matches!(s, 400 | 413 | 426 | 431)),
            "{name}: {request:?} gives {answer}"
        );
        let seen = site.app.take();
        assert!(seen.is_empty(), "{name}: {request:?} became {seen:?}");
    }
    site.is_well().await;
}

/// CVE-2026-2835: chunks in HTTP/1.0 are refused.
#[tokio::test]
async fn reg_45_chunks_in_http_1_0() {
    nothing_arrives(
        "1.0",
        &[
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        ],
    )
    .await;
}

/// CVE-2025-4366: the body of a request that the proxy answers itself is not the next request.
#[tokio::test]
async fn reg_46_bodies_behind_own_answers() {
    let mut site = Site::new().await;
    site.rule(
        Action::Deny,
        Expr::atom(Attribute::Path, Matcher::Exact("/denied".into())),
    )
    .await;
    let inner = "GET /smuggled HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let mut padded = inner.to_string();
    padded.push_str(&"x".repeat(500_000));
    for body in [inner, &padded] {
        let sized = format!(
            "POST /denied HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let chunked = format!(
            "POST /denied HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        );
        for request in [sized, chunked] {
            let end = "GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            let answer = once(site.address(), format!("{request}{end}").as_bytes()).await;
            assert!(matches!(statuses(&answer)[..], [] | [403] | [403, 200]), "{answer}");
            let seen = site.app.take();
            assert!(seen.iter().all(|r| r.path == "/end"), "{seen:?}");
        }
    }
}

/// CVE-2021-21299: several Transfer-Encoding fields, or odd ones.
#[tokio::test]
async fn reg_48_several_transfer_encodings() {
    nothing_arrives(
        "encodings",
        &[
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        ],
    )
    .await;
}

/// CVE-2021-32715: a length is digits, once, or the same again.
#[tokio::test]
async fn reg_49_odd_lengths() {
    nothing_arrives(
        "lengths",
        &[
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3 0\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3,4\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 0\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551619\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3.0\r\n\r\nabc",
        ],
    )
    .await;
}

/// CVE-2021-32714: sizes of chunks do not run over, and neither they nor their extensions are endless.
#[tokio::test]
async fn reg_50_sizes_of_chunks() {
    let site = Site::new().await;
    let long = "0".repeat(5_000_000);
    let extension = "x".repeat(5_000_000);
    for (name, chunk) in [
        ("seventeen digits", "f0000000000000003\r\nabc\r\n0\r\n\r\n".to_string()),
        ("sixteen digits", "ffffffffffffffff\r\nabc\r\n0\r\n\r\n".to_string()),
        ("a sign", "+3\r\nabc\r\n0\r\n\r\n".to_string()),
        ("0x", "0x3\r\nabc\r\n0\r\n\r\n".to_string()),
        ("a space", "3 3\r\nabc\r\n0\r\n\r\n".to_string()),
        ("no size", "\r\nabc\r\n0\r\n\r\n".to_string()),
        ("LF alone", "3\nabc\n0\n\n".to_string()),
        ("no end of chunk", "3\r\nabcX0\r\n\r\n".to_string()),
        ("LF in an extension", "3;a\nb\r\nabc\r\n0\r\n\r\n".to_string()),
        ("leading zeros", format!("{long}3\r\nabc\r\n0\r\n\r\n")),
        ("extension", format!("3;{extension}\r\nabc\r\n0\r\n\r\n")),
        ("trailers", format!("3\r\nabc\r\n0\r\nx: {extension}\r\n\r\n")),
    ] {
        let request = format!(
            "POST /chunks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}GET /smuggled HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        );
        // A chunk may well be as long as it says: its end is the end of the connection.
        let answer = half(site.address(), request.as_bytes()).await;
        assert!(statuses(&answer).iter().all(|s| *s >= 400), "{name}: {answer}");
        let seen = site.app.take();
        assert!(seen.is_empty(), "{name}: {seen:?}");
    }
    site.is_well().await;
}

/// CVE-2020-35863: a GET may have a body, and it is not the next request. CVE-2017-18587: newlines in values are entry 28's.
#[tokio::test]
async fn reg_51_52_bodies_of_get() {
    let site = Site::new().await;
    let inner = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for method in ["GET", "DELETE", "OPTIONS", "HEAD"] {
        for framing in [
            format!("Content-Length: {}\r\n\r\n{inner}", inner.len()),
            format!(
                "Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{inner}\r\n0\r\n\r\n",
                inner.len()
            ),
        ] {
            let request = format!(
                "{method} /body HTTP/1.1\r\nHost: a\r\n{framing}GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            );
            let answer = once(site.address(), request.as_bytes()).await;
            let seen = site.app.take();
            let got: Vec<(&str, usize)> = seen.iter().map(|r| (r.path.as_str(), r.body.len())).collect();
            assert_eq!(got, [("/body", inner.len()), ("/end", 0)], "{method}: {answer}");
        }
    }
}

/// CVE-2026-48743: the length and the DATA of an HTTP/2 request agree, and so do an answer's. (Its HTTP/3 half: see
/// `reg_71_72_there_is_no_quic`.)
#[tokio::test]
async fn reg_53_lengths_and_data_disagree() {
    let site = Site::new().await;
    for (length, data) in [("5", &b"four"[..]), ("3", b"four"), ("0", b"x"), ("5", b"")] {
        let mut h2 = H2::connect(site.address()).await;
        let head = request("POST", "/length", &[(b"content-length", length.as_bytes())]);
        h2.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
        h2.send(&frame(DATA, END_STREAM, 1, data)).await;
        let outcome = h2.outcome(1).await;
        // The application may have seen the head and an end that is none; it must not have seen a whole request.
        assert_ne!(outcome, Outcome::Status(200), "{length} and {data:?}");
    }
    let seen = site.app.take();
    assert!(seen.is_empty(), "{seen:?}");
    let mut h2 = H2::connect(site.address()).await;
    let head = request("POST", "/length", &[(b"content-length", b"4")]);
    h2.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
    h2.send(&frame(DATA, END_STREAM, 1, b"four")).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(200));

    // Answers: too short and too long ones do not look complete.
    for answer in [&b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\nfour"[..]] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let mut buffer = [0u8; 1024];
                let _ = tcp.read(&mut buffer).await;
                let _ = tcp.write_all(answer).await;
            }
        });
        let (_proxy, inbound, _ca) = before(address, tuning()).await;
        let mut h2 = H2::connect(inbound.listen).await;
        h2.send(&get(1, "/short")).await;
        let end = h2
            .until(|f| f.stream == 1 && (f.kind == RST_STREAM || f.flags & END_STREAM != 0 && f.kind == DATA))
            .await;
        assert_eq!(end.map(|f| f.kind), Some(RST_STREAM));
    }
}

/// CVE-2020-12603 and its kin: a body in frames, or chunks, of one byte each. What is kept for it has an end, whether the
/// application reads or not.
#[tokio::test]
async fn reg_54_tiny_frames_and_chunks() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/tiny", &[])))
        .await;
    let mut sent = 0;
    while sent < 20_000 && h2.send(&frame(DATA, 0, 1, b"x").repeat(100)).await && !h2.is_over() {
        sent += 100;
    }
    // An application that reads gets them all, or the codec found them too many: both are bounded.
    if h2.send(&frame(DATA, END_STREAM, 1, b"")).await && !h2.is_over() {
        let outcome = h2.outcome(1).await;
        assert!(matches!(outcome, Outcome::Status(200) | Outcome::Closed), "{outcome:?}");
    }
    let mut chunks =
        b"POST /tiny HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    chunks.extend(b"1\r\nx\r\n".repeat(100_000));
    chunks.extend(b"0\r\n\r\n");
    assert!(once(site.address(), &chunks).await.starts_with("HTTP/1.1 200"));
    assert_eq!(site.app.requests().last().unwrap().body.len(), 100_000);
    // An application that reads nothing: the client is stopped long before 64 MB.
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = deaf.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((tcp, _)) = deaf.accept().await {
            held.push(tcp);
        }
    });
    let (_proxy, inbound, _ca) = before(address, tuning()).await;
    let mut tcp = TcpStream::connect(inbound.listen).await.unwrap();
    tcp.write_all(b"POST /deaf HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    let piece = b"1\r\nx\r\n".repeat(10_000);
    let mut taken = 0;
    while taken < 64 << 20 {
        match tokio::time::timeout(std::time::Duration::from_secs(3), tcp.write(&piece)).await {
            Ok(Ok(n)) if n > 0 => taken += n,
            _ => break,
        }
    }
    assert!(taken < 24 << 20, "{taken} bytes were taken");
    is_well_without_app(inbound.listen).await;
}

/// The proxy still answers when its application is deaf.
async fn is_well_without_app(address: SocketAddr) {
    let answer = once(address, b"GET /a%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert_eq!(statuses(&answer), [400]);
}

/// h2c: an upgrade is not passed on, and prior knowledge on a port of HTTP/1 meets the same rules.
#[tokio::test]
async fn reg_55_h2c() {
    let (app, seen) = scripted(&[OK]).await;
    let (proxy, mut inbound, _ca) = before_as(app, tuning(), UpstreamProtocol::Http1).await;
    inbound.authz = rule(
        Action::Deny,
        Expr::atom(Attribute::Path, Matcher::Exact("/admin".into())),
    );
    proxy.apply(inbound.snapshot()).await;
    let upgrade = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let answer = once(inbound.listen, upgrade.as_bytes()).await;
    assert_eq!(statuses(&answer), [200], "{answer}");
    let lower = text(&seen).to_ascii_lowercase();
    assert!(
        !lower.contains("upgrade") && !lower.contains("http2-settings"),
        "{lower}"
    );
    let mut h2 = H2::connect(inbound.listen).await;
    h2.send(&get(1, "/admin")).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(403));
    h2.send(&get(3, "/x/../admin")).await;
    assert_eq!(h2.outcome(3).await, Outcome::Status(403));
    h2.send(&get(5, "/open")).await;
    assert_eq!(h2.outcome(5).await, Outcome::Status(200));
    assert!(!text(&seen).contains("/admin"));
}
