//! Group A: a path has one form, and policy, routes and the application see that one.

use std::collections::BTreeSet;

use mantlet_model::authz::{Action, Attribute, Expr, Matcher};
use mantlet_model::http::PathNormalization;

use super::wire::*;

fn path(matcher: Matcher) -> Expr {
    Expr::atom(Attribute::Path, matcher)
}

fn exact(text: &str) -> Expr {
    path(Matcher::Exact(text.into()))
}

/// The statuses of requests for these targets, one after the other on one connection.
async fn ask(site: &Site, targets: &[String]) -> Vec<u16> {
    let mut bytes = String::new();
    for (n, target) in targets.iter().enumerate() {
        let close = if n + 1 == targets.len() {
            "Connection: close\r\n"
        } else {
            ""
        };
        bytes.push_str(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n{close}\r\n"));
    }
    statuses(&once(site.address(), bytes.as_bytes()).await)
}

/// CVE-2019-9901: dot segments do not lead out of what a rule allows, raw or encoded.
#[tokio::test]
async fn reg_1_dot_segments() {
    let targets = [
        "/a/../admin",
        "/a/%2e%2e/admin",
        "/a/.%2E/admin",
        "/a/..;/admin",
        "/a/..;x=y/admin",
        "/a/./../admin",
        "/a/b/../../admin",
        "/a/b/%2E%2e/%2e./admin",
        "/a/..\\admin",
        "\\a\\..\\admin",
    ]
    .map(String::from);
    let mut site = Site::new().await;
    site.rule(Action::Allow, path(Matcher::Prefix("/a/".into()))).await;
    for target in &targets {
        assert!(
            matches!(ask(&site, std::slice::from_ref(target)).await[..], [403 | 400]),
            "{target}"
        );
    }
    assert!(site.app.take().is_empty());
    assert_eq!(ask(&site, &["/a/../a/b".into()]).await, [200]);
    assert_eq!(site.app.take()[0].path, "/a/b");
    // Without the normal form the rule is passed and the application told to walk up.
    site.change(|http| http.normalization = PathNormalization::None).await;
    assert_eq!(ask(&site, &targets[..1]).await, [200]);
    assert_eq!(site.app.take()[0].path, "/a/../admin");
}

/// CVE-2021-31920, CVE-2021-29492: each of 256 encoded bytes, and doubled slashes, in each mode: what is judged is what is
/// forwarded.
#[tokio::test]
async fn reg_2_encoded_bytes_and_slashes() {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
    let mut targets: Vec<String> = (0..=255u8).map(|byte| format!("/x%{byte:02x}y")).collect();
    targets.extend(
        [
            "//admin",
            "/x//admin",
            "/x///y",
            "/x/%2fadmin",
            "/x%2F%2Fy",
            "/x%5C%5cy",
            "/x\\\\y",
            "/%2Fa",
            "/x//..//y",
        ]
        .map(String::from),
    );
    for mode in [None, Base, MergeSlashes, DecodeAndMergeSlashes] {
        let mut site = Site::new().await;
        let set = |http: &mut mantlet_model::http::HttpManager| http.normalization = mode;
        site.change(set).await;
        let mut passed = Vec::new();
        // A refused request may end its connection.
        for target in &targets {
            match ask(&site, std::slice::from_ref(target)).await[..] {
                [200] => passed.push(target.clone()),
                [400] => {}
                ref other => panic!("{mode:?} {target}: {other:?}"),
            }
        }
        assert!(passed.len() >= 250, "{mode:?}");
        assert!(!passed.iter().any(|t| t.contains("%00")), "{mode:?}");
        let seen = site.app.take();
        assert_eq!(seen.len(), passed.len());
        // Rules for exactly what was forwarded stop all of it, so the judged path was that one.
        let forwarded: BTreeSet<String> = seen.into_iter().map(|r| r.path).collect();
        site.inbound.authz = rule(Action::Deny, Expr::Or(forwarded.iter().map(|p| exact(p)).collect()));
        site.proxy.apply(changed(site.inbound.snapshot(), set)).await;
        assert!(ask(&site, &passed).await.iter().all(|s| *s == 403), "{mode:?}");
        assert!(site.app.take().is_empty(), "{mode:?}");
        if mode == DecodeAndMergeSlashes {
            let double = |p: &String| {
                p.contains("//") && *p != "//"
                    || p.to_ascii_lowercase().contains("%2f")
                    || p.to_ascii_lowercase().contains("%5c")
            };
            assert!(!forwarded.iter().any(double), "{forwarded:?}");
        }
    }
}

/// CVE-2021-39156, CVE-2021-32779: a fragment does not hide a path from a rule, on either version.
#[tokio::test]
async fn reg_3_fragments() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, exact("/admin")).await;
    for target in ["/admin#x", "/admin#", "/admin#/../a", "/admin#?b", "/x/../admin#y"] {
        assert!(
            matches!(ask(&site, &[target.into()]).await[..], [403 | 400]),
            "{target}"
        );
        let mut h2 = H2::connect(site.address()).await;
        h2.send(&get(1, target)).await;
        assert!(h2.outcome(1).await.is_refusal(), "{target}");
    }
    assert!(site.app.take().is_empty());
    // What is forwarded has none.
    ask(&site, &["/other#admin".into()]).await;
    assert!(site.app.take().iter().all(|r| r.path == "/other"));
    assert_eq!(
        ask(&site, &["/other".into()]).await,
        [200],
        "the rule is only for the one path"
    );
}

/// CVE-2020-8595: the query is no part of the path that rules see.
#[tokio::test]
async fn reg_4_queries() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, exact("/admin")).await;
    for target in [
        "/admin?x",
        "/admin?",
        "/admin??",
        "/admin?#",
        "/admin?/../a",
        "/admin?a=%2e%2e",
    ] {
        assert!(
            matches!(ask(&site, &[target.into()]).await[..], [403 | 400]),
            "{target}"
        );
    }
    assert!(site.app.take().is_empty());
    assert_eq!(ask(&site, &["/other?/admin".into()]).await, [200]);
    assert_eq!(
        site.app.take()[0].path,
        "/other?/admin",
        "and reaches the application untouched"
    );
}

/// CVE-2023-27487: `x-envoy-original-path` and its kin are not believed, and do not pass an edge.
#[tokio::test]
async fn reg_5_internal_headers() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, exact("/admin")).await;
    let with = |target: &str| {
        format!(
            "GET {target} HTTP/1.1\r\nHost: a\r\nX-Envoy-Original-Path: /public\r\nx-envoy-internal: true\r\n\
             x-envoy-decorator-operation: forged\r\nX-ENVOY-UPSTREAM-RQ-TIMEOUT-MS: 1\r\nx-envoy-retry-on: 5xx\r\n\
             x-envoy-max-retries: 100\r\nConnection: close\r\n\r\n"
        )
    };
    assert_eq!(statuses(&once(site.address(), with("/admin").as_bytes()).await), [403]);
    // Nor the other way round: a claim to be the denied path denies nobody.
    let harmless = with("/public").replace(": /public", ": /admin");
    assert_eq!(statuses(&once(site.address(), harmless.as_bytes()).await), [200]);
    site.app.take();
    for edge in [true, false] {
        site.change(|http| http.use_remote_address = edge).await;
        assert_eq!(statuses(&once(site.address(), with("/public").as_bytes()).await), [200]);
        let seen = site.app.take();
        let left: Vec<_> = seen[0]
            .headers
            .keys()
            .filter(|n| n.as_str().starts_with("x-envoy-"))
            .collect();
        assert_eq!(left.is_empty(), edge, "edge {edge}: {left:?}");
    }
}

/// CVE-2026-33186: an HTTP/2 path without its slash is refused, not judged.
#[tokio::test]
async fn reg_9_paths_without_a_slash() {
    let mut site = Site::new().await;
    site.rule(Action::Deny, path(Matcher::Prefix("/".into()))).await;
    for target in [
        "admin",
        "",
        "*",
        "?x",
        "#",
        "http://a/admin",
        "%2Fadmin",
        "..",
        "a/../admin",
        ";x",
    ] {
        let mut h2 = H2::connect(site.address()).await;
        h2.send(&get(1, target)).await;
        assert!(h2.outcome(1).await.is_refusal(), "{target:?}");
        let mut h2 = H2::connect(site.address()).await;
        let twice = request("GET", target, &[(b":path", b"/second")]);
        h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &twice)).await;
        assert!(h2.outcome(1).await.is_refusal(), "{target:?} and another");
    }
    // Also when no rule stands behind: refused for what it is.
    let open = Site::new().await;
    for target in ["admin", "", "?x", "%2Fadmin", "a/../admin"] {
        let mut h2 = H2::connect(open.address()).await;
        h2.send(&get(1, target)).await;
        assert!(h2.outcome(1).await.is_refusal(), "{target:?}");
    }
    assert!(site.app.take().is_empty() && open.app.take().is_empty());
    let mut h2 = H2::connect(open.address()).await;
    h2.send(&get(1, "/admin")).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(200));
}
