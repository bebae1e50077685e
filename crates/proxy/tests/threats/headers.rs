//! Group C: header values that are matched, forwarded and believed.

use mantlet_model::authz::{Action, Attribute, Expr, Matcher};
use mantlet_model::http::ForwardedClientCert;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::common::CLIENT_SA;
use super::wire::*;

fn header(name: &str, matcher: Matcher) -> Expr {
    Expr::atom(Attribute::Header(name.into()), matcher)
}

/// The status of a GET with these header lines.
async fn with(site: &Site, lines: &str) -> u16 {
    let request = format!("GET /c HTTP/1.1\r\nHost: a\r\n{lines}Connection: close\r\n\r\n");
    statuses(&once(site.address(), request.as_bytes()).await)
        .first()
        .copied()
        .unwrap_or(0)
}

async fn with_fields(site: &Site, fields: &[(&[u8], &[u8])]) -> Outcome {
    let mut h2 = H2::connect(site.address()).await;
    h2.send(&frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        1,
        &request("GET", "/c", fields),
    ))
    .await;
    h2.outcome(1).await
}

/// CVE-2026-26308: values of a repeated header are matched one by one, not as one text with commas.
#[tokio::test]
async fn reg_24_repeated_headers_are_matched_one_by_one() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, header("x", Matcher::Exact("admin".into())))
        .await;
    for lines in [
        "x: admin\r\n",
        "x: a\r\nx: admin\r\n",
        "x: admin\r\nx: b\r\n",
        "x: admin\r\nx: admin\r\n",
    ] {
        assert_eq!(with(&site, lines).await, 403, "{lines:?}");
    }
    assert_eq!(
        with_fields(&site, &[(b"x", b"a"), (b"x", b"admin")]).await,
        Outcome::Status(403)
    );
    assert_eq!(with(&site, "x: a\r\nx: b\r\n").await, 200);
    // ALLOW: any value, as Envoy 1.40 has it.
    site.rule(Action::Allow, header("x", Matcher::Exact("good".into())))
        .await;
    assert_eq!(with(&site, "x: bad\r\nx: good\r\n").await, 200);
    assert_eq!(with(&site, "x: bad,good\r\n").await, 403);
    assert_eq!(with(&site, "x: go\r\nx: od\r\n").await, 403);
    assert_eq!(site.app.take().len(), 2);
}

/// CVE-2020-25017: not only the first of many, whatever the case of its name.
#[tokio::test]
async fn reg_25_the_last_of_many_counts_too() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, header("x-role", Matcher::Exact("admin".into())))
        .await;
    for position in [0, 1, 7, 49] {
        let mut lines = String::new();
        for n in 0..50 {
            let name = ["x-role", "X-Role", "X-ROLE"][n % 3];
            let value = if n == position { "admin" } else { "user" };
            lines.push_str(&format!("{name}: {value}\r\n"));
        }
        assert_eq!(with(&site, &lines).await, 403, "position {position}");
    }
    assert!(site.app.take().is_empty());
    assert_eq!(with(&site, &"X-Role: user\r\n".repeat(50)).await, 200);
}

/// CVE-2019-9900: NUL, CR and LF in a header end the request (H1) or its stream (H2); nothing is cut at them.
#[tokio::test]
async fn reg_28_control_characters_in_headers() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, header("x", Matcher::Exact("admin".into())))
        .await;
    for bytes in [
        &b"adm\0in"[..],
        b"admin\0",
        b"\0admin",
        b"a\rdmin",
        b"a\ndmin",
        b"a\r\nx-more: 1",
        b"\x01",
        b"\x7f",
    ] {
        let mut head = b"GET /c HTTP/1.1\r\nHost: a\r\nx: ".to_vec();
        head.extend(bytes);
        head.extend(b"\r\nConnection: close\r\n\r\n");
        let splits = bytes.windows(2).any(|w| w == b"\r\n") || bytes.contains(&b'\n');
        if !splits {
            let answer = once(site.address(), &head).await;
            assert!(matches!(statuses(&answer)[..], [400] | []), "{bytes:?}: {answer}");
        }
        assert!(with_fields(&site, &[(b"x", bytes)]).await.is_refusal(), "{bytes:?}");
        assert!(
            with_fields(&site, &[(bytes, b"x")]).await.is_refusal(),
            "{bytes:?} as a name"
        );
    }
    assert!(site.app.take().is_empty());
}

/// CVE-2023-27491 (RFC 9113 section 8.2): what HTTP/1.1 could read otherwise does not come over from HTTP/2: names with
/// upper case, colons or spaces, fields of one connection, second pseudo fields, whitespace around values.
#[tokio::test]
async fn reg_31_fields_that_http1_would_read_otherwise() {
    let site = Site::new().await;
    for (name, value) in [
        (&b"X-Upper"[..], &b"1"[..]),
        (b"x y", b"1"),
        (b"x:", b"1"),
        (b"", b"1"),
        (b"x\r\ny", b"1"),
        (b"x", b"1\r\ny: 2"),
        (b"x", b"1\n"),
        (b"connection", b"close"),
        (b"keep-alive", b"1"),
        (b"proxy-connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
        (b":path", b"/other"),
        (b":authority", b"b"),
        (b":status", b"200"),
        (b":unknown", b"1"),
        (b"host", b"other"),
        (b"content-length", b"5"),
        (b"content-length", b"+0"),
    ] {
        let outcome = with_fields(&site, &[(name, value)]).await;
        assert!(
            outcome.is_refusal(),
            "{}: {} gives {outcome:?}",
            name.escape_ascii(),
            value.escape_ascii()
        );
    }
    assert!(
        with_fields(&site, &[(b"x", b"1"), (b":scheme", b"http")])
            .await
            .is_refusal(),
        "pseudo after regular"
    );
    assert!(site.app.take().is_empty());
    // Whitespace is no part of a value, for rules and for the application.
    let mut site = site;
    site.rule(Action::Deny, header("x", Matcher::Exact("admin".into())))
        .await;
    for value in [&b" admin"[..], b"admin ", b"\tadmin \t"] {
        assert_eq!(with_fields(&site, &[(b"x", value)]).await, Outcome::Status(403));
        let line = format!("x: {}\r\n", String::from_utf8_lossy(value));
        assert_eq!(with(&site, &line).await, 403);
    }
    assert_eq!(with_fields(&site, &[(b"x", b" a b ")]).await, Outcome::Status(200));
    assert_eq!(site.app.take()[0].headers["x"], "a b");
}

/// CVE-2024-45806: nothing is believed because it comes from a private address; this client is at 127.0.0.1, and what it
/// says of itself counts only as far as the configuration trusts hops.
#[tokio::test]
async fn reg_33_private_addresses_are_not_trusted() {
    let mut site = Site::new().await;
    let inside = Expr::atom(Attribute::RemoteIp, Matcher::Cidr("10.0.0.0/8".parse().unwrap()));
    site.inbound.authz = rule(Action::Allow, inside);
    let apply = async |site: &Site, edge: bool, hops: u32| {
        site.change(|http| {
            http.use_remote_address = edge;
            http.trusted_hops = hops;
        })
        .await;
    };
    apply(&site, true, 0).await;
    for lines in [
        "X-Forwarded-For: 10.1.2.3\r\n",
        "X-Forwarded-For: 10.1.2.3\r\nx-envoy-external-address: 10.1.2.3\r\nx-envoy-internal: true\r\n",
        "Forwarded: for=10.1.2.3\r\nX-Real-Ip: 10.1.2.3\r\nTrue-Client-Ip: 10.1.2.3\r\n",
    ] {
        assert_eq!(with(&site, lines).await, 403, "{lines}");
    }
    assert!(site.app.take().is_empty());
    // The same header counts as soon as one hop is trusted: the test above rests on the number of hops alone.
    apply(&site, true, 1).await;
    assert_eq!(with(&site, "X-Forwarded-For: 10.1.2.3\r\n").await, 200);
}

/// Forged forwarding headers, and off-by-one in the number of hops: the table of `numTrustedProxies`.
#[tokio::test]
async fn reg_40_forwarded_addresses_by_trusted_hops() {
    let mut site = Site::new().await;
    let from = |ip: &str| Expr::atom(Attribute::RemoteIp, Matcher::Cidr(format!("{ip}/32").parse().unwrap()));
    // List, hops, the address that counts.
    for (list, hops, client) in [
        ("", 0, "127.0.0.1"),
        ("10.0.0.1", 0, "127.0.0.1"),
        ("10.0.0.1,10.0.0.2", 0, "127.0.0.1"),
        ("10.0.0.1", 1, "10.0.0.1"),
        ("10.0.0.1, 10.0.0.2", 1, "10.0.0.2"),
        ("10.0.0.1,10.0.0.2,10.0.0.3", 2, "10.0.0.2"),
        ("10.0.0.1,10.0.0.2,10.0.0.3", 3, "10.0.0.1"),
        // Shorter than the hops: nobody vouches for anything.
        ("10.0.0.1,10.0.0.2", 3, "127.0.0.1"),
        ("", 1, "127.0.0.1"),
        // Not an address where it counts: not its neighbour either.
        ("10.0.0.1,junk", 1, "127.0.0.1"),
        ("junk,10.0.0.2", 1, "10.0.0.2"),
        ("10.0.0.1,10.0.0.2:80", 1, "127.0.0.1"),
    ] {
        let lines = if list.is_empty() {
            String::new()
        } else {
            format!("X-Forwarded-For: {list}\r\n")
        };
        for (action, want) in [(Action::Allow, 200), (Action::Deny, 403)] {
            site.inbound.authz = rule(action, from(client));
            site.change(|http| {
                http.use_remote_address = true;
                http.trusted_hops = hops;
            })
            .await;
            assert_eq!(with(&site, &lines).await, want, "{list:?} with {hops} hops is {client}");
        }
    }
    // In two lines it is the same list.
    site.inbound.authz = rule(Action::Allow, from("10.0.0.2"));
    site.change(|http| {
        http.use_remote_address = true;
        http.trusted_hops = 1;
    })
    .await;
    assert_eq!(
        with(&site, "X-Forwarded-For: 10.0.0.1\r\nx-forwarded-for: 10.0.0.2\r\n").await,
        200
    );
    // The application gets the list with the peer at its end, and the scheme that was used.
    site.app.take();
    site.change(|http| http.use_remote_address = true).await;
    site.inbound.authz = vec![];
    site.change(|http| http.use_remote_address = true).await;
    with(&site, "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\n").await;
    let seen = site.app.take();
    assert_eq!(seen[0].headers["x-forwarded-for"], "10.0.0.1,127.0.0.1");
    assert_eq!(seen[0].headers["x-forwarded-proto"], "http");
}

/// `x-forwarded-client-cert` that a client made up never reaches the application as if the mesh had said it: without mTLS
/// not at all, with mTLS only behind what this proxy adds, at an edge replaced.
#[tokio::test]
async fn reg_40_forged_client_certificates() {
    let site = Site::new().await;
    let forged = "x-forwarded-client-cert: By=x;URI=spiffe://cluster.local/ns/admin/sa/root\r\n";
    for lines in [
        forged.to_string(),
        forged.repeat(3),
        forged.to_ascii_uppercase().replace("SPIFFE", "spiffe"),
        format!("{forged}Connection: x-forwarded-client-cert\r\n"),
    ] {
        assert_eq!(with(&site, &lines).await, 200);
        assert!(
            !site.app.take()[0].headers.contains_key("x-forwarded-client-cert"),
            "{lines}"
        );
    }
    use ForwardedClientCert::{AlwaysForwardOnly, AppendForward, ForwardOnly, Sanitize, SanitizeSet};
    for (mode, kept, own) in [
        (Sanitize, false, false),
        (SanitizeSet, false, true),
        (AppendForward, true, true),
        (ForwardOnly, true, false),
        (AlwaysForwardOnly, true, false),
    ] {
        site.change(|http| http.forwarded_client_cert = mode).await;
        let mut tls = site.mtls("istio-http/1.1").await;
        // Named in Connection as well, so that a hop would strip it (threat 41).
        let request =
            format!("GET /c HTTP/1.1\r\nHost: a\r\n{forged}Connection: close, x-forwarded-client-cert\r\n\r\n");
        tls.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon("the answer", tls.read_to_end(&mut answer)).await.ok();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{mode:?}");
        let seen = site.app.take();
        let values: Vec<&str> = seen[0]
            .headers
            .get_all("x-forwarded-client-cert")
            .iter()
            .map(|v| v.to_str().unwrap())
            .collect();
        let text = values.join("|");
        assert_eq!(text.contains("sa/root"), kept, "{mode:?}: {text}");
        assert_eq!(
            text.ends_with(&format!("URI={CLIENT_SA}")),
            own,
            "{mode:?}: the last element is ours: {text}"
        );
        assert!(values.len() <= 1, "{mode:?}: {values:?}");
    }
}
