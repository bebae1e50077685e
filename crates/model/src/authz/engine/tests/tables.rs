//! Truth tables of SEMANTICS 2, row by row.

use super::*;

fn engine(action: Action, exprs: Vec<Expr>) -> Engine {
    let rules = exprs.into_iter().enumerate().map(|(n, expr)| Rule {
        id: format!("ns[foo]-policy[p]-rule[{n}]"),
        expr,
    });
    Engine::new(&[AuthzFilter {
        action,
        enforced: true,
        rules: rules.collect(),
        shadow: vec![],
    }])
}

fn matches(attribute: Attribute, matcher: Matcher, request: &Request) -> bool {
    let engine = engine(Action::Allow, vec![Expr::atom(attribute, matcher)]);
    engine.decide(&request.connection(), request.view()).verdict == Verdict::Allowed
}

fn path(path: &str) -> Request {
    Request {
        path: path.into(),
        ..Request::default()
    }
}

fn peer(uri: &str) -> Request {
    Request {
        uris: vec![uri.into()],
        ..Request::default()
    }
}

/// S2.58.
#[test]
fn templates() {
    let table = [
        ("/allow/admin/{**}", "/allow/admin/", true),
        ("/allow/admin/{**}", "/allow/admin/x", true),
        ("/allow/admin/{**}", "/allow/admin/x/y.txt", true),
        ("/allow/admin/{**}", "/allow/admin", false),
        ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat.txt", true),
        ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat", true),
        ("/foo/{*}/bar/{**}", "/foo/bar/bat.txt", false),
        ("/foo/{*}/bar/{**}", "/foo//bar/bat.txt", false),
        ("/store/{**}/cart", "/store//cart", true),
        ("/store/{**}/cart", "/store/a/cart", true),
        ("/store/{**}/cart", "/store/a/b/cart", true),
        ("/store/{**}/cart", "/store/cart", false),
        // A bare star that slipped through validation reaches the template engine, where it means the same (S2.57).
        ("/a/*", "/a/b", true),
        ("/a/*", "/a/b/c", false),
    ];
    for (template, sent, expected) in table {
        let got = matches(Attribute::Path, Matcher::Template(template.into()), &path(sent));
        assert_eq!(got, expected, "{template} on {sent}");
    }
    for broken in ["a", "/{x}", "/{*", "/{**}/{*}", "/{*}{*}"] {
        // An ALLOW rule that cannot be understood admits nothing, a DENY rule refuses everything.
        let expr = Expr::atom(Attribute::Path, Matcher::Template(broken.into())).not();
        let request = path("/a");
        for action in [Action::Allow, Action::Deny] {
            let engine = engine(action, vec![expr.clone()]);
            let decision = engine.decide(&request.connection(), request.view());
            assert_eq!(decision.verdict, Verdict::Denied, "{action:?} {broken}");
        }
    }
}

/// S2.40–S2.45, S2.48–S2.50.
#[test]
fn identities() {
    let uri = "spiffe://cluster.local/ns/a/sa/b";
    let m = |s: &str| s.to_string();
    let table = [
        (Attribute::PeerUri, Matcher::Exact(m(uri)), true),
        (
            Attribute::PeerUri,
            Matcher::Exact(m("spiffe://spiffe://cluster.local/ns/a/sa/b")),
            false,
        ),
        (
            Attribute::PeerUri,
            Matcher::Prefix(m("spiffe://cluster.local/ns/a/")),
            true,
        ),
        (Attribute::PeerUri, Matcher::Suffix(m("/ns/a/sa/b")), true),
        (Attribute::PeerUri, Matcher::Suffix(m("/sa/c")), false),
        (Attribute::PeerUri, Matcher::Present, true),
        (Attribute::PeerNamespace, Matcher::Exact(m("a")), true),
        (Attribute::PeerNamespace, Matcher::Exact(m("b")), false),
        (Attribute::PeerNamespace, Matcher::Glob(m("*")), true),
        (Attribute::PeerServiceAccount, Matcher::Exact(m("a/b")), true),
        (Attribute::PeerServiceAccount, Matcher::Exact(m("a/bb")), false),
        (Attribute::PeerTrustDomain, Matcher::Exact(m("cluster.local")), true),
        (Attribute::PeerTrustDomain, Matcher::Exact(m("cluster")), false),
        (Attribute::PeerTrustDomain, Matcher::Glob(m("*.local")), true),
        (Attribute::PeerTrustDomain, Matcher::Glob(m("cluster*")), true),
        (Attribute::PeerTrustDomain, Matcher::Glob(m("x*")), false),
    ];
    for (attribute, matcher, expected) in table {
        let got = matches(attribute.clone(), matcher.clone(), &peer(uri));
        assert_eq!(got, expected, "{attribute:?} {matcher:?}");
        // S2.60: nothing positive matches a plaintext peer.
        assert!(!matches(attribute, matcher, &Request::default()));
    }
}

/// S2.60: negations match plaintext peers.
#[test]
fn negations_match_plaintext_peers() {
    let not_x = || Expr::atom(Attribute::PeerUri, Matcher::Exact("spiffe://td/ns/a/sa/x".into())).not();
    let plain = Request::default();
    let decide = |e: &Engine, r: &Request| e.decide(&r.connection(), r.view()).verdict;
    assert_eq!(decide(&engine(Action::Allow, vec![not_x()]), &plain), Verdict::Allowed);
    let no_identity = || Expr::atom(Attribute::PeerUri, Matcher::Present).not();
    let deny_plaintext = engine(Action::Deny, vec![no_identity()]);
    assert_eq!(decide(&deny_plaintext, &plain), Verdict::Denied);
    assert_eq!(
        decide(&deny_plaintext, &peer("spiffe://td/ns/a/sa/x")),
        Verdict::Allowed
    );
}

/// S2.42, S2.54 and the table of 2e.
#[test]
fn headers_and_hosts() {
    let role = || Attribute::Header("x-role".into());
    let with = |values: &[&str]| Request {
        headers: values
            .iter()
            .map(|v| ("x-role".to_string(), v.as_bytes().to_vec()))
            .collect(),
        ..Request::default()
    };
    let admin = || Matcher::Exact("admin".into());
    assert!(matches(role(), admin(), &with(&["user", "admin"])));
    assert!(!matches(role(), admin(), &with(&["user,admin"])));
    assert!(matches(role(), Matcher::Present, &with(&[""])));
    assert!(!matches(role(), Matcher::Present, &with(&[])));
    let host = |authority: &str| Request {
        authority: authority.into(),
        ..Request::default()
    };
    let example = || Matcher::Exact("Example.com".into());
    assert!(matches(Attribute::Host, example(), &host("eXample.com")));
    assert!(!matches(Attribute::Host, example(), &host("example.com:8080")));
    assert!(matches(
        Attribute::Host,
        Matcher::Prefix("example.com".into()),
        &host("EXAMPLE.com:8080")
    ));
    assert!(!matches(Attribute::Path, Matcher::Exact("/A".into()), &path("/a")));
}

/// S2.71, S2.73.
#[test]
fn claims() {
    let request = Request {
        claims: Some(json!({"a.b": "dot", "a": {"b": ["x", 1, true]}, "scope": "read write", "n": 7})),
        ..Request::default()
    };
    let claim = |path: &[&str]| Attribute::Claim(path.iter().map(|p| p.to_string()).collect());
    let exact = |text: &str| Matcher::Exact(text.into());
    assert!(matches(claim(&["a.b"]), exact("dot"), &request));
    assert!(matches(claim(&["a", "b"]), exact("x"), &request));
    assert!(!matches(claim(&["a", "b"]), exact("1"), &request));
    assert!(!matches(claim(&["n"]), exact("7"), &request));
    assert!(matches(claim(&["scope"]), exact("write"), &request));
    assert!(!matches(claim(&["scope"]), exact("read write"), &request));
}

/// S2b table, S2.28, S2.132.
#[test]
fn filters_without_rules() {
    let request = Request::default();
    let filter = |action, enforced, shadow: Vec<Rule>| AuthzFilter {
        action,
        enforced,
        rules: vec![],
        shadow,
    };
    let decide = |filters: &[AuthzFilter]| {
        let engine = Engine::new(filters);
        let decision = engine.decide(&request.connection(), request.view());
        (
            decision.verdict,
            decision.details(),
            decision.shadow_allow.map(|s| s.verdict),
        )
    };
    assert_eq!(decide(&[]), (Verdict::Allowed, None, None));
    assert_eq!(
        decide(&[filter(Action::Deny, true, vec![])]),
        (Verdict::Allowed, None, None)
    );
    let none = "rbac_access_denied_matched_policy[none]".to_string();
    assert_eq!(
        decide(&[filter(Action::Allow, true, vec![])]),
        (Verdict::Denied, Some(none), None)
    );
    let never = Rule {
        id: "r".into(),
        expr: Expr::never(),
    };
    let dry_run = filter(Action::Allow, false, vec![never]);
    assert_eq!(decide(&[dry_run]), (Verdict::Allowed, None, Some(Verdict::Denied)));
}

/// S2.92, S2.94.
#[test]
fn the_first_id_in_byte_order_is_reported() {
    let rule = |id: &str, expr| Rule { id: id.into(), expr };
    let get = || Expr::atom(Attribute::Method, Matcher::Exact("GET".into()));
    let filter = AuthzFilter {
        action: Action::Deny,
        enforced: true,
        rules: vec![
            rule("ns[foo]-policy[z]-rule[0]", Expr::always()),
            rule("ns[foo]-policy[deny all]-rule[10]", get()),
            rule("ns[foo]-policy[deny all]-rule[9]", get()),
        ],
        shadow: vec![],
    };
    let engine = Engine::new(&[filter]);
    let request = Request::default();
    let decision = engine.decide(&request.connection(), request.view());
    assert_eq!(decision.rule, Some("ns[foo]-policy[deny all]-rule[10]"));
    let details = decision.details().unwrap();
    assert_eq!(
        details,
        "rbac_access_denied_matched_policy[ns[foo]-policy[deny_all]-rule[10]]"
    );
}

/// The nearest rule is named with what failed.
#[test]
fn explanations_name_the_failed_test() {
    let path_is = |p: &str| Expr::atom(Attribute::Path, Matcher::Exact(p.into()));
    let from = |ns: &str| Expr::atom(Attribute::PeerNamespace, Matcher::Exact(ns.into()));
    let rule = |id: &str, expr| Rule { id: id.into(), expr };
    let filter = AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: vec![
            rule("far", Expr::And(vec![from("x"), path_is("/x"), path_is("/y")])),
            rule(
                "near",
                Expr::And(vec![from("a"), Expr::Or(vec![path_is("/b"), path_is("/c")])]),
            ),
        ],
        shadow: vec![],
    };
    let request = Request {
        path: "/d".into(),
        ..peer("spiffe://td/ns/a/sa/b")
    };
    let told = explain(&[filter], &request.connection(), request.view());
    assert!(!told.allowed);
    let nearest = told.filters[0].nearest.as_ref().unwrap();
    assert_eq!(nearest.rule, "near");
    assert_eq!(nearest.failed.len(), 1);
    assert_eq!(nearest.failed[0].atom.attribute, Attribute::Path);
    assert!(nearest.failed[0].wanted);
}
