//! Group E: what an HTTP/2 peer can do with frames, and what it may cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mantlet_model::cluster::UpstreamProtocol;
use mantlet_proxy::worker::Tuning;
use mantlet_testkit::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::wire::*;

/// ENHANCE_YOUR_CALM.
const CALM: u32 = 11;

/// Sends `bytes` up to `rounds` times; whether the proxy had enough of it before or after the last.
async fn is_ended_by(h2: &mut H2, bytes: &[u8], rounds: usize) -> bool {
    const BATCH: usize = 100;
    let batch = bytes.repeat(BATCH);
    for _ in 0..rounds / BATCH {
        if !h2.send(&batch).await || h2.is_over() {
            return true;
        }
    }
    !h2.is_alive().await
}

/// The attack ends its connection with these bounds, and does not without them.
async fn needs(with: Tuning, without: Tuning, bytes: &[u8], rounds: usize) {
    for (tuning, ended) in [(with, true), (without, false)] {
        let site = Site::tuned(tuning).await;
        let mut h2 = H2::connect(site.address()).await;
        assert_eq!(is_ended_by(&mut h2, bytes, rounds).await, ended);
        site.is_well().await;
        assert_eq!(site.app.requests().len(), 1, "only the bystander's request arrives");
    }
}

/// The same for frames that carry nothing: `max_empty_frames` is the only defence.
async fn is_metered(bytes: &[u8], rounds: usize) {
    let without = Tuning {
        max_empty_frames: u64::MAX,
        ..tuning()
    };
    needs(tuning(), without, bytes, rounds).await;
}

/// CVE-2023-44487: streams that are opened and reset at once. Most never reach the application, and the connection ends.
#[tokio::test]
async fn reg_56_rapid_reset() {
    const STREAMS: u32 = 100_000;
    let mut arrived = Vec::new();
    for limited in [true, false] {
        let mut bounds = tuning();
        if !limited {
            bounds.max_pending_resets = usize::MAX;
            bounds.max_given_up = u64::MAX;
            bounds.max_empty_frames = u64::MAX;
        }
        let site = Site::tuned(bounds).await;
        let streams = if limited { STREAMS } else { 3_000 };
        let mut h2 = H2::connect(site.address()).await;
        let mut sent = 0;
        while sent < streams {
            let mut batch = Vec::new();
            for _ in 0..50 {
                let id = 2 * sent + 1;
                batch.extend(get(id, "/reset"));
                batch.extend(frame(RST_STREAM, 0, id, &8u32.to_be_bytes()));
                sent += 1;
            }
            if !h2.send(&batch).await || h2.is_over() {
                break;
            }
        }
        assert_eq!(h2.is_alive().await, !limited, "after {sent} streams");
        site.is_well().await;
        arrived.push(site.app.requests().iter().filter(|r| r.path == "/reset").count());
    }
    assert!(arrived[0] <= 600, "{arrived:?} requests reached the application");
}

/// The same at a pace at which every request is begun: Envoy's rule of premature resets.
#[tokio::test]
async fn reg_56_resets_of_begun_requests() {
    for (limit, ended) in [(500, true), (u64::MAX, false)] {
        let site = Site::tuned(Tuning {
            max_given_up: limit,
            ..tuning()
        })
        .await;
        let mut h2 = H2::connect(site.address()).await;
        let mut over = false;
        for n in 0..700u32 {
            let id = 2 * n + 1;
            // The PING's answer shows that the stream was accepted before its reset comes.
            let mut opened = frame(HEADERS, END_HEADERS, id, &request("POST", "/reset", &[]));
            opened.extend(frame(PING, 0, 0, b"accepted"));
            if !h2.send(&opened).await || h2.until(|f| f.kind == PING && f.flags & ACK != 0).await.is_none() {
                over = true;
                break;
            }
            if !h2.send(&frame(RST_STREAM, 0, id, &8u32.to_be_bytes())).await {
                over = true;
                break;
            }
        }
        assert_eq!(over || !h2.is_alive().await, ended, "limit {limit}");
        site.is_well().await;
    }
}

/// CVE-2025-8671: faults that make the proxy reset streams count as resets of the client.
#[tokio::test]
async fn reg_57_made_you_reset() {
    let mut survived = 0;
    for (name, fault) in [
        ("window update of 0", frame(WINDOW_UPDATE, 0, 1, &[0; 4])),
        (
            "window overflow",
            frame(WINDOW_UPDATE, 0, 1, &0x7fff_ffffu32.to_be_bytes()),
        ),
        ("stream that depends on itself", frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 0])),
    ] {
        for limited in [true, false] {
            let mut bounds = tuning();
            if !limited {
                bounds.max_provoked_resets = usize::MAX;
                bounds.max_pending_resets = usize::MAX;
                bounds.max_given_up = u64::MAX;
                bounds.max_empty_frames = u64::MAX;
            }
            let site = Site::tuned(bounds).await;
            let mut h2 = H2::connect(site.address()).await;
            let mut over = false;
            for n in 0..600u32 {
                let id = 2 * n + 1;
                let mut bytes = frame(HEADERS, END_HEADERS, id, &request("POST", "/provoked", &[]));
                let mut wrong = fault.clone();
                wrong[5..9].copy_from_slice(&id.to_be_bytes());
                if wrong[3] == PRIORITY {
                    wrong[9..13].copy_from_slice(&id.to_be_bytes());
                }
                bytes.extend(wrong);
                if !h2.send(&bytes).await || h2.is_over() {
                    over = true;
                    break;
                }
            }
            let alive = !over && h2.is_alive().await;
            assert!(!(limited && alive), "{name}");
            survived += usize::from(alive);
            site.is_well().await;
            assert!(
                site.app.requests().iter().all(|r| r.path != "/provoked"),
                "{name}: an unfinished request arrived"
            );
        }
    }
    // The codec ends the connection at some of them anyway; for the others the bound is what does.
    assert!(survived > 0, "something else than the bound ends them");
}

/// CVE-2019-9512: PINGs without end.
#[tokio::test]
async fn reg_58_ping_flood() {
    is_metered(&frame(PING, 0, 0, &[0; 8]), 20_000).await;
}

/// CVE-2019-9513: PRIORITY frames that shuffle the tree of streams.
#[tokio::test]
async fn reg_58_priority_flood() {
    is_metered(&frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 9]), 20_000).await;
}

/// CVE-2019-9514: resets of streams that are no more.
#[tokio::test]
async fn reg_58_reset_flood() {
    for limited in [true, false] {
        let mut bounds = tuning();
        if !limited {
            bounds.max_empty_frames = u64::MAX;
        }
        let site = Site::tuned(bounds).await;
        let mut h2 = H2::connect(site.address()).await;
        h2.send(&get(1, "/first")).await;
        assert_eq!(h2.outcome(1).await, Outcome::Status(200));
        let ended = is_ended_by(&mut h2, &frame(RST_STREAM, 0, 1, &8u32.to_be_bytes()), 20_000).await;
        assert_eq!(ended, limited);
        site.is_well().await;
    }
}

/// CVE-2019-9515: SETTINGS that want an acknowledgement each.
#[tokio::test]
async fn reg_58_settings_flood() {
    is_metered(&frame(SETTINGS, 0, 0, &[]), 20_000).await;
}

/// CVE-2019-9518: frames with nothing in them: header blocks that never grow, and frames of unknown kinds.
#[tokio::test]
async fn reg_58_empty_frame_flood() {
    is_metered(&frame(0x4d, 0, 0, &[]), 20_000).await;
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, 0, 1, &request("GET", "/empty", &[]))).await;
    assert!(is_ended_by(&mut h2, &frame(CONTINUATION, 0, 1, &[]), 20_000).await);
    site.is_well().await;
    assert_eq!(site.app.requests().len(), 1);
}

/// CVE-2024-27919 and its kin: a header block over CONTINUATION frames without end. The codec gives up early.
#[tokio::test]
async fn reg_59_continuation_flood() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, 0, 1, &request("GET", "/flood", &[]))).await;
    let piece = block(&[(b"x-flood", &[b'x'; 4000])]);
    let mut frames = 0;
    while frames < 10_000 && !h2.is_over() && h2.send(&frame(CONTINUATION, 0, 1, &piece)).await {
        frames += 1;
    }
    assert!(frames < 10_000, "40 MB of headers were taken");
    let code = h2.goaway().await;
    // The end of the connection may have thrown the GOAWAY away with what the socket still held.
    assert!(matches!(code, None | Some(CALM)), "{code:?}");
    site.is_well().await;
    // Small pieces: the bound is on frames, too.
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, 0, 1, &request("GET", "/flood", &[]))).await;
    let piece = block(&[(b"x", b"y")]);
    for _ in 0..40 {
        h2.send(&frame(CONTINUATION, 0, 1, &piece)).await;
    }
    assert_eq!(h2.goaway().await, Some(CALM), "40 frames of one header each");
    assert_eq!(site.app.requests().len(), 1);
}

/// CVE-2023-26964: resets of streams that nobody has accepted yet. Their queue has an end.
#[tokio::test]
async fn reg_60_resets_before_acceptance() {
    for (limit, ended) in [(100, true), (usize::MAX, false)] {
        let site = Site::tuned(Tuning {
            max_pending_resets: limit,
            max_given_up: u64::MAX,
            ..tuning()
        })
        .await;
        let mut h2 = H2::connect(site.address()).await;
        // All in one write, so that the codec reads resets before the server looks at the streams.
        let mut bytes = Vec::new();
        for n in 0..2000u32 {
            bytes.extend(get(2 * n + 1, "/pending"));
            bytes.extend(frame(RST_STREAM, 0, 2 * n + 1, &8u32.to_be_bytes()));
        }
        let sent = h2.send(&bytes).await;
        assert_eq!(sent && h2.is_alive().await, !ended, "limit {limit}");
        site.is_well().await;
    }
}

/// RUSTSEC-2024-0003: frames on streams that are over make the proxy queue resets that a full line keeps it from sending.
/// A client that does not read cannot make that queue long: the codec stops to read, or ends the connection.
#[tokio::test]
async fn reg_61_resets_that_cannot_be_sent() {
    let site = Site::new().await;
    let mut tcp = TcpStream::connect(site.address()).await.unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    tcp.write_all(&bytes).await.unwrap();
    let mut taken = 0usize;
    // 64 MB of faulty streams; nothing is read.
    for n in 0..1_000_000u32 {
        let id = 2 * n + 1;
        let mut bad = get(id, "/x");
        bad.extend(frame(WINDOW_UPDATE, 0, id, &[0; 4]));
        match tokio::time::timeout(std::time::Duration::from_secs(3), tcp.write_all(&bad)).await {
            Ok(Ok(())) => taken += bad.len(),
            _ => break,
        }
    }
    assert!(taken < 16 << 20, "{taken} bytes were taken");
    site.is_well().await;
}

/// RUSTSEC-2026-0258: empty DATA frames without end on an open stream.
#[tokio::test]
async fn reg_62_empty_data_frames() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/empty", &[])))
        .await;
    assert!(is_ended_by(&mut h2, &frame(DATA, 0, 1, &[]), 20_000).await);
    site.is_well().await;
    assert_eq!(site.app.requests().len(), 1);
}

/// CVE-2026-47774: many crumbs of cookies and indexed copies of one big header: the bound is on what they unfold to.
#[tokio::test]
async fn reg_63_header_expansion() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    // Into the dynamic table once (literal with indexing), then one byte per copy.
    let mut bomb = request("GET", "/bomb", &[]);
    bomb.push(0x40);
    integer(&mut bomb, 1);
    bomb.push(b'c');
    integer(&mut bomb, 3000);
    bomb.extend([b'x'; 3000]);
    bomb.extend([0xbe; 4000]);
    h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb)).await;
    assert!(h2.outcome(1).await.is_refusal(), "12 MB from 7 kB");
    // 20,000 crumbs of 4 bytes: small on the wire, large as a list.
    let mut h2 = H2::connect(site.address()).await;
    let crumb = block(&[(b"cookie", b"a=bc")]).repeat(5000);
    let mut all = request("GET", "/crumbs", &[]);
    all.extend(crumb);
    let mut pieces = all.chunks(16_000).peekable();
    let first = pieces.next().unwrap();
    h2.send(&frame(HEADERS, END_STREAM, 1, first)).await;
    while let Some(piece) = pieces.next() {
        let end = if pieces.peek().is_none() { END_HEADERS } else { 0 };
        h2.send(&frame(CONTINUATION, end, 1, piece)).await;
    }
    assert!(h2.outcome(1).await.is_refusal());
    // A few crumbs are one cookie to an application behind HTTP/1.1 (RFC 9113 section 8.2.3).
    let mut h2 = H2::connect(site.address()).await;
    let some = request("GET", "/few", &[(b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")]);
    h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &some)).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(200));
    let seen = site.app.take();
    assert_eq!(seen.len(), 1, "nothing else arrived");
    let cookies: Vec<_> = seen[0].headers.get_all("cookie").iter().collect();
    assert_eq!(cookies, ["a=1; b=2"]);
}

/// CVE-2019-15226: thousands of headers. They are refused by their number and size, before anything looks at each.
#[tokio::test]
async fn reg_64_ten_thousand_headers() {
    let site = Site::new().await;
    let mut head = b"GET /many HTTP/1.1\r\nHost: a\r\n".to_vec();
    for n in 0..10_000 {
        head.extend(format!("x{n}: y\r\n").bytes());
    }
    head.extend(b"\r\n");
    let answer = once(site.address(), &head).await;
    assert!(matches!(statuses(&answer)[..], [] | [431]), "{answer}");
    let mut fields = request("GET", "/many", &[]);
    for n in 0..10_000 {
        fields.extend(block(&[(format!("x{n}").as_bytes(), b"y")]));
    }
    let mut h2 = H2::connect(site.address()).await;
    let mut pieces = fields.chunks(16_000).peekable();
    h2.send(&frame(HEADERS, END_STREAM, 1, pieces.next().unwrap())).await;
    while let Some(piece) = pieces.next() {
        let end = if pieces.peek().is_none() { END_HEADERS } else { 0 };
        h2.send(&frame(CONTINUATION, end, 1, piece)).await;
    }
    assert!(h2.outcome(1).await.is_refusal());
    site.is_well().await;
    assert_eq!(site.app.requests().len(), 1);
}

/// CVE-2020-11080: SETTINGS with thousands of entries.
#[tokio::test]
async fn reg_65_oversized_settings() {
    let site = Site::new().await;
    let entry = [0, 3, 0, 0, 0, 100];
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(SETTINGS, 0, 0, &entry.repeat(32))).await;
    assert!(h2.is_alive().await);
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(SETTINGS, 0, 0, &entry.repeat(33))).await;
    assert!(!h2.is_alive().await);
    site.is_well().await;
}

/// CVE-2021-32778: thousands of open streams end at once with their connection; nothing of them is left.
#[tokio::test]
async fn reg_66_many_streams_end_at_once() {
    let app = silent_app().await;
    let (proxy, inbound, _ca) = before(app.address, tuning()).await;
    for _ in 0..3 {
        let mut h2 = H2::connect(inbound.listen).await;
        let before = app.open.load(Ordering::SeqCst);
        for n in 0..1000u32 {
            assert!(h2.send(&get(2 * n + 1, "/open")).await);
        }
        eventually("requests are under way", LONG, || async {
            let open = app.open.load(Ordering::SeqCst);
            if open >= before + 100 { Ok(()) } else { Err(open) }
        })
        .await;
        drop(h2);
        eventually("they end with their connection", LONG, || async {
            match (app.open.load(Ordering::SeqCst), proxy.shared.active_connections()) {
                (0, 0) => Ok(()),
                left => Err(left),
            }
        })
        .await;
    }
}

/// An application that takes requests and never answers; how many of its connections are open.
struct Silent {
    address: std::net::SocketAddr,
    open: Arc<AtomicUsize>,
}

async fn silent_app() -> Silent {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let open = Arc::new(AtomicUsize::new(0));
    let count = open.clone();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let count = count.clone();
            tokio::spawn(async move {
                let mut buffer = [0u8; 1024];
                while tcp.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
                count.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    Silent { address, open }
}

/// An HTTP/2 application that says something wrong to each request. Returns how many connections it has had and has.
async fn hostile_app(
    answer: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static,
) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let open = Arc::new(AtomicUsize::new(0));
    let count = open.clone();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (count, answer) = (count.clone(), answer.clone());
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut tcp = tcp;
                let mut preface = [0u8; 24];
                if tcp.read_exact(&mut preface).await.is_ok() {
                    let mut h2 = H2::over(tcp);
                    h2.send(&frame(SETTINGS, 0, 0, &[])).await;
                    while let Some(head) = h2.until(|f| f.kind == HEADERS).await {
                        if !h2.send(&answer(head.stream)).await {
                            break;
                        }
                    }
                }
                count.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (address, open)
}

/// What a hostile application answers to a stream.
type Attack = Box<dyn Fn(u32) -> Vec<u8> + Send + Sync>;

/// CVE-2021-32780 and CVE-2023-35945: hostile frames from the *upstream*. Each request gets an answer, no connection is
/// left behind.
#[tokio::test]
async fn reg_66_67_hostile_upstreams() {
    let calm = || frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]);
    let attacks: Vec<(&str, Attack)> = vec![
        (
            "goaway and settings",
            Box::new(move |_| [calm(), frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0])].concat()),
        ),
        (
            "reset and goaway",
            Box::new(move |id| [frame(RST_STREAM, 0, id, &[0, 0, 0, 2]), calm()].concat()),
        ),
        (
            "answer to another stream",
            Box::new(|id| frame(HEADERS, END_HEADERS, id + 2, &[0x88])),
        ),
        (
            "no status",
            Box::new(|id| frame(HEADERS, END_HEADERS | END_STREAM, id, &block(&[(b"x", b"y")]))),
        ),
        (
            "two lengths",
            Box::new(|id| {
                let head = block(&[
                    (b":status", b"200"),
                    (b"content-length", b"1"),
                    (b"content-length", b"2"),
                ]);
                [
                    frame(HEADERS, END_HEADERS, id, &head),
                    frame(DATA, END_STREAM, id, b"x"),
                ]
                .concat()
            }),
        ),
        (
            "pushed stream",
            Box::new(|id| {
                frame(
                    5,
                    END_HEADERS,
                    id,
                    &[&[0, 0, 0, 2][..], &request("GET", "/p", &[])].concat(),
                )
            }),
        ),
        ("frame too large", Box::new(|id| frame(DATA, 0, id, &[0; 70_000]))),
        (
            "headers without end",
            Box::new(|id| {
                let piece = block(&[(b"x", &[b'y'; 8000])]);
                let mut out = frame(HEADERS, 0, id, &[0x88]);
                for _ in 0..100 {
                    out.extend(frame(CONTINUATION, 0, id, &piece));
                }
                out
            }),
        ),
    ];
    for (name, attack) in attacks {
        let (address, open) = hostile_app(attack).await;
        let (_proxy, inbound, _ca) = before_as(address, tuning(), UpstreamProtocol::Http2).await;
        for round in 0..50 {
            let request = format!("GET /{round} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            let answer = once(inbound.listen, request.as_bytes()).await;
            let status = statuses(&answer);
            assert!(matches!(status[..], [502 | 503]), "{name}: {answer}");
        }
        eventually("the connections end", LONG, || {
            let open = open.load(Ordering::SeqCst);
            async move {
                if open <= 1 {
                    Ok(())
                } else {
                    Err(format!("{name}: {open} are open"))
                }
            }
        })
        .await;
    }
}

/// CVE-2021-29258: METADATA and other unknown frames, empty ones too, mean nothing.
#[tokio::test]
async fn reg_69_unknown_frames_are_ignored() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/metadata", &[])))
        .await;
    for kind in [0x4d, 0x20, 0xff] {
        for payload in [&b""[..], b"\0", &[0xff; 300]] {
            h2.send(&frame(kind, 0xff, 1, payload)).await;
            h2.send(&frame(kind, 0, 0, payload)).await;
        }
    }
    h2.send(&frame(DATA, END_STREAM, 1, b"body")).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(200));
    assert_eq!(&site.app.take()[0].body[..], b"body");
}

/// CVE-2021-28682: `grpc-timeout` of any form neither ends the proxy nor the call.
#[tokio::test]
async fn reg_70_grpc_timeouts() {
    let site = Site::new().await;
    let mut h2 = H2::connect(site.address()).await;
    let values = [
        "99999999H",
        "100000000H",
        "-1S",
        "0n",
        "1",
        "H",
        "1X",
        "18446744073709551616S",
        "",
        "1S, 2S",
    ];
    for (n, value) in values.into_iter().enumerate() {
        let id = 2 * n as u32 + 1;
        let head = request(
            "POST",
            "/pkg.Service/Method",
            &[
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
                (b"grpc-timeout", value.as_bytes()),
            ],
        );
        h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, id, &head)).await;
        assert_eq!(h2.outcome(id).await, Outcome::Status(200), "{value}");
        assert_eq!(site.app.take()[0].headers["grpc-timeout"], value);
    }
}

/// GHSA-p7c7-7c47-pwch (QPACK), and CVE-2026-31812, CVE-2026-25800, CVE-2023-42805, CVE-2024-45311 (quinn-proto), the half of
/// CVE-2026-48743 that is about HTTP/3: there is no QUIC in the program, so nobody can send it any.
#[tokio::test]
async fn reg_71_72_there_is_no_quic() {
    let tree = std::process::Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--locked",
            "--package",
            "mantlet-proxy",
            "--edges",
            "normal,build",
            "--prefix",
            "none",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8_lossy(&tree.stdout).into_owned();
    assert!(tree.contains("h2 v"), "{tree}");
    for package in ["quinn", "quiche", "h3", "s2n-quic", "neqo", "msquic"] {
        assert!(
            !tree.lines().any(|l| l.starts_with(package) && !l.starts_with("h2")),
            "{package} is in the program"
        );
    }
    // Nothing takes datagrams where HTTP is served.
    let site = Site::new().await;
    let free = std::net::UdpSocket::bind(site.address());
    assert!(free.is_ok(), "{free:?}: something holds the UDP port");
}
