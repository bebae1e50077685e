//! Facts about policies that only the wire shows: path normalisation (SEMANTICS 2h), denials as clients see them (2g), trial
//! runs and AUDIT (2j).

mod common;

use std::sync::Arc;

use common::*;
use mantlet_model::authz::{Action, Attribute, AuthzFilter, Expr, Matcher, Rule};
use mantlet_model::http::PathNormalization;
use mantlet_model::listener::{AccessLog, Filters};
use mantlet_model::names::VIRTUAL_INBOUND;
use mantlet_testkit::{EchoServer, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn filter(action: Action, rules: &[(&str, Expr)], shadow: &[(&str, Expr)]) -> AuthzFilter {
    let list = |rules: &[(&str, Expr)]| {
        let rule = |(id, expr): &(&str, Expr)| Rule {
            id: (*id).into(),
            expr: expr.clone(),
        };
        rules.iter().map(rule).collect()
    };
    AuthzFilter {
        action,
        enforced: !rules.is_empty(),
        rules: list(rules),
        shadow: list(shadow),
    }
}

fn path(exact: &str) -> Expr {
    Expr::atom(Attribute::Path, Matcher::Exact(exact.into()))
}

/// Status and body of a request whose target is sent as it stands.
async fn send(mesh: &Mesh, target: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await.unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, body.to_string())
}

/// The table of 2h. Each path is denied by its normal form and by nothing else, and that form is what the application gets.
#[tokio::test]
async fn policy_and_application_see_the_normal_form() {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    const ROWS: [(&str, &str, &str, &str); 12] = [
        ("/app/../admin", "/admin", "/admin", "/admin"),
        ("/app//", "/app//", "/app/", "/app/"),
        ("/app/%2f", "/app/%2f", "/app/%2f", "/app/"),
        ("/app%2f/", "/app%2f/", "/app%2f/", "/app/"),
        ("/xyz%30..//abc", "/xyz0..//abc", "/xyz0../abc", "/xyz0../abc"),
        ("/app/%2E./admin", "/admin", "/admin", "/admin"),
        ("/app\\admin", "/app/admin", "/app/admin", "/app/admin"),
        ("/app/\\/\\/\\admin", "/app//////admin", "/app/admin", "/app/admin"),
        (
            "/%2Fapp%5cadmin%5Cabc",
            "/%2Fapp%5cadmin%5Cabc",
            "/%2Fapp%5cadmin%5Cabc",
            "/app/admin/abc",
        ),
        ("/app//../admin", "/app/admin", "/app/admin", "/app/admin"),
        ("/app//../../admin", "/admin", "/admin", "/admin"),
        // Not as the table has it: Envoy 1.40 drops the parameters of dot segments.
        ("/..;/admin", "/admin", "/admin", "/admin"),
    ];
    for mode in [None, Base, MergeSlashes, DecodeAndMergeSlashes] {
        for (sent, base, merged, decoded) in ROWS {
            let normal = match mode {
                None => sent,
                Base => base,
                MergeSlashes => merged,
                DecodeAndMergeSlashes => decoded,
            };
            for (rule, want) in [(normal, 403), ("/elsewhere", 200)] {
                mesh.inbound.authz = vec![filter(Action::Deny, &[("ns[a]-policy[b]-rule[0]", path(rule))], &[])];
                let mut snapshot = mesh.inbound.snapshot();
                let listener = Arc::make_mut(snapshot.listeners.get_mut(VIRTUAL_INBOUND).unwrap());
                for chain in &mut listener.chains {
                    if let Filters::Http(http) = &mut chain.filters {
                        http.normalization = mode;
                    }
                }
                mesh.server.apply(snapshot).await;
                let got = send(&mesh, sent).await;
                assert_eq!(got.0, want, "S2.113: {mode:?} {sent} against {rule}");
                if want == 200 {
                    assert_eq!(app.take().remove(0).path, normal, "S2.113: {mode:?} {sent}");
                } else {
                    assert!(app.take().is_empty());
                }
            }
        }
    }
    // Whatever the mode: S2.112 and S2.114.
    assert_eq!(send(&mesh, "/a%00b").await.0, 400, "S2.114");
    for same in ["/a%c0%aeb", "/a%252e%252e/b", "/a;x=1/b", "/A/b"] {
        assert_eq!(send(&mesh, same).await.0, 200);
        assert_eq!(app.take().remove(0).path, same, "S2.114: untouched");
    }
}

#[tokio::test]
async fn trial_runs_and_audit_are_counted_and_logged_and_change_nothing() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("access.log");
    mesh.inbound.authz = vec![
        filter(Action::Log, &[("ns[a]-policy[audit]-rule[0]", path("/audited"))], &[]),
        filter(Action::Deny, &[], &[("ns[a]-policy[no]-rule[0]", path("/bad"))]),
        filter(Action::Allow, &[], &[("ns[a]-policy[yes]-rule[0]", path("/good"))]),
    ];
    let mut snapshot = mesh.inbound.snapshot();
    let listener = Arc::make_mut(snapshot.listeners.get_mut(VIRTUAL_INBOUND).unwrap());
    for chain in &mut listener.chains {
        if let Filters::Http(http) = &mut chain.filters {
            let of = |key: &str| format!("%DYNAMIC_METADATA({key})%");
            let rbac = |key: &str| of(&format!("envoy.filters.http.rbac:istio_dry_run_{key}"));
            http.access_log = Some(AccessLog {
                path: file.display().to_string(),
                format: [
                    "%REQ(:PATH)%".to_string(),
                    rbac("deny_shadow_engine_result"),
                    rbac("deny_shadow_effective_policy_id"),
                    rbac("allow_shadow_engine_result"),
                    rbac("allow_shadow_effective_policy_id"),
                    of("envoy.common:access_log_hint"),
                ]
                .join(" ")
                    + "\n",
                json: vec![],
            });
        }
    }
    mesh.server.apply(snapshot).await;
    for target in ["/good", "/bad", "/audited"] {
        assert_eq!(send(&mesh, target).await.0, 200, "S2.134: {target}");
    }
    let metrics = mesh.server.metrics();
    for line in [
        "envoy_http_rbac_istio_dry_run_deny_shadow_denied 1",
        "envoy_http_rbac_istio_dry_run_deny_shadow_allowed 2",
        "envoy_http_rbac_istio_dry_run_allow_shadow_allowed 1",
        "envoy_http_rbac_istio_dry_run_allow_shadow_denied 2",
        "envoy_http_rbac_allowed 3",
        "envoy_http_rbac_denied 0",
    ] {
        assert!(
            metrics.lines().any(|l| l == line),
            "S2.96, S2.134: {line} is not in\n{metrics}"
        );
    }
    let lines = eventually("the access log", std::time::Duration::from_secs(60), || async {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
        // Each worker writes its own.
        lines.sort();
        if lines.len() == 3 { Ok(lines) } else { Err(text) }
    })
    .await;
    assert_eq!(
        lines,
        [
            "/audited allowed - denied - true",
            "/bad denied ns[a]-policy[no]-rule[0] denied - false",
            "/good allowed - allowed ns[a]-policy[yes]-rule[0] false"
        ],
        "S2.133, S2.135"
    );
}

#[tokio::test]
async fn denials_as_clients_see_them() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let id = "ns[foo]-policy[deny all]-rule[0]";
    mesh.inbound.authz = vec![filter(
        Action::Deny,
        &[("ns[foo]-policy[z]-rule[0]", Expr::always()), (id, Expr::always())],
        &[],
    )];
    mesh.apply().await;
    let url = format!("http://{}/", mesh.inbound.listen);
    let plain = curl(&[&url]).await;
    assert_eq!(
        (plain.status, plain.body.as_str()),
        (403, "RBAC: access denied"),
        "S2.90"
    );
    for header in ["content-type: text/plain", "content-length: 19", "server: istio-envoy"] {
        assert!(plain.headers.contains(header), "S2.90: {}", plain.headers);
    }
    let preflight = curl(&[
        "-X",
        "OPTIONS",
        "-H",
        "origin: http://a",
        "-H",
        "access-control-request-method: GET",
        &url,
    ])
    .await;
    assert_eq!(preflight.status, 403, "S2.23");
    let grpc = curl(&["-X", "POST", "-H", "content-type: application/grpc", &url]).await;
    assert_eq!(grpc.status, 200, "S2.91");
    for header in [
        "grpc-status: 7",
        "grpc-message: rbac: access denied",
        "content-length: 0",
    ] {
        assert!(grpc.headers.contains(header), "S2.91: {}", grpc.headers);
    }
    let denials = mesh.server.shared.telemetry.denials();
    assert_eq!(
        denials[0].details, "rbac_access_denied_matched_policy[ns[foo]-policy[deny_all]-rule[0]]",
        "S2.92, S2.94: whitespace, and the first id in byte order"
    );
    let metrics = mesh.server.metrics();
    let counted = |l: &str| l.starts_with("istio_requests_total") && l.contains("response_code=\"403\"");
    assert!(metrics.lines().any(counted), "S2.99");
}
