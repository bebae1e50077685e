//! Authorization over the wire: what comes back is equivalent, and for rules as Istio makes them even equal.

use std::net::IpAddr;

use mantlet_model::authz::{
    Action, Atom, Attribute, AuthzFilter, Connection, Engine, Expr, HttpView, Matcher, Rule, Verdict, canonical,
    canonical_filter,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::generate;
use crate::convert::authz::{decode_http, decode_network, encode_http, encode_network};

fn filter(action: Action, expr: Expr) -> AuthzFilter {
    AuthzFilter {
        action,
        enforced: true,
        rules: vec![Rule { id: "r".into(), expr }],
        shadow: vec![],
    }
}

/// A request whose parts come from a small world, so that atoms of the same world hit it.
#[derive(Debug)]
struct Request {
    uris: Vec<String>,
    source: IpAddr,
    port: u16,
    sni: Option<String>,
    method: &'static str,
    authority: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    claims: serde_json::Value,
}

impl HttpView for Request {
    fn method(&self) -> &str {
        self.method
    }
    fn authority(&self) -> &str {
        self.authority
    }
    fn path(&self) -> &str {
        self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(n, v)| *n == name && f(v.as_bytes()))
    }
    fn claims(&self) -> Option<&serde_json::Value> {
        Some(&self.claims)
    }
}

impl Request {
    fn allowed(&self, filter: &AuthzFilter) -> bool {
        let connection = Connection {
            peer_uris: &self.uris,
            source: self.source,
            remote: self.source,
            destination: ([10, 0, 0, 9], self.port).into(),
            sni: self.sni.as_deref(),
        };
        Engine::new(std::slice::from_ref(filter))
            .decide(&connection, Some(self))
            .verdict
            == Verdict::Allowed
    }
}

fn request() -> impl Strategy<Value = Request> {
    let uri = prop::sample::select(vec![
        "spiffe://td/ns/a/sa/x",
        "spiffe://td/ns/b/sa/y",
        "spiffe://other/ns/a/sa/y",
    ]);
    let uris = prop::option::of(uri).prop_map(|u| u.map(String::from).into_iter().collect());
    let source = prop::sample::select(vec!["10.1.0.1", "10.2.0.1", "192.168.0.1"]);
    let source = source.prop_map(|s| s.parse().unwrap());
    (
        (
            uris,
            source,
            prop::sample::select(vec![80u16, 8080]),
            prop::option::of(Just("web.example.com".to_string())),
        ),
        (
            prop::sample::select(vec!["GET", "POST"]),
            prop::sample::select(vec!["web:80", "WEB", "api"]),
            prop::sample::select(vec!["/", "/a", "/a/b", "/a/b/c"]),
            prop::sample::select(vec![
                vec![],
                vec![("x-role", "admin")],
                vec![("x-role", "user"), ("x-role", "admin")],
            ]),
            prop::sample::select(vec![
                serde_json::json!({}),
                serde_json::json!({"iss": "i", "aud": ["a", "b"]}),
            ]),
        ),
    )
        .prop_map(
            |((uris, source, port, sni), (method, authority, path, headers, claims))| Request {
                uris,
                source,
                port,
                sni,
                method,
                authority,
                path,
                headers,
                claims,
            },
        )
}

/// Atoms of the world of [`request`].
fn atom() -> impl Strategy<Value = Atom> {
    let exact = |s: &str| Matcher::Exact(s.into());
    let prefix = |s: &str| Matcher::Prefix(s.into());
    let suffix = |s: &str| Matcher::Suffix(s.into());
    let atoms = [
        (Attribute::PeerUri, exact("spiffe://td/ns/a/sa/x")),
        (Attribute::PeerUri, suffix("/sa/y")),
        (Attribute::PeerUri, Matcher::Present),
        (Attribute::PeerNamespace, exact("a")),
        (Attribute::PeerServiceAccount, exact("b/y")),
        (Attribute::PeerTrustDomain, exact("td")),
        (Attribute::SourceIp, Matcher::Cidr("10.1.0.0/16".parse().unwrap())),
        (Attribute::RemoteIp, Matcher::Cidr("10.0.0.0/8".parse().unwrap())),
        (Attribute::DestinationIp, Matcher::Cidr("10.0.0.9/32".parse().unwrap())),
        (Attribute::DestinationPort, Matcher::Port(80)),
        (Attribute::Sni, exact("web.example.com")),
        (Attribute::Host, exact("web")),
        (Attribute::Host, prefix("web")),
        (Attribute::Method, exact("GET")),
        (Attribute::Path, prefix("/a")),
        (Attribute::Path, exact("/a/b")),
        (Attribute::Path, Matcher::Template("/a/{*}".into())),
        (Attribute::Header("x-role".into()), exact("admin")),
        (Attribute::Claim(vec!["aud".into()]), exact("b")),
    ];
    let atoms = atoms.map(|(attribute, matcher)| Atom { attribute, matcher });
    prop::sample::select(atoms.to_vec())
}

fn expr() -> impl Strategy<Value = Expr> {
    atom().prop_map(Expr::Atom).prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Expr::And),
            vec(inner.clone(), 0..4).prop_map(Expr::Or),
            inner.prop_map(Expr::not)
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Mixed expressions are spread out into several policies; the meaning stays.
    #[test]
    fn any_expression_means_the_same_after_the_wire(expr in expr(), requests in vec(request(), 8)) {
        for action in [Action::Allow, Action::Deny] {
            let before = filter(action, expr.clone());
            let after = decode_http(encode_http(&before)).unwrap();
            for request in &requests {
                prop_assert_eq!(request.allowed(&before), request.allowed(&after), "{:?}", after);
            }
        }
    }

    /// Spreading out is stable: the second journey changes nothing.
    #[test]
    fn the_second_journey_changes_nothing(expr in generate::expr()) {
        let once = decode_http(encode_http(&filter(Action::Allow, expr))).unwrap();
        let twice = decode_http(encode_http(&once)).unwrap();
        let thrice = decode_http(encode_http(&twice)).unwrap();
        prop_assert_eq!(thrice, twice);
    }

    #[test]
    fn istios_rules_come_back_equal(model in generate::filter()) {
        prop_assert_eq!(decode_http(encode_http(&model)).unwrap(), canonical_filter(&model));
        prop_assert_eq!(decode_network(encode_network(&model)).unwrap(), canonical_filter(&model));
    }

    #[test]
    fn single_atoms_come_back(atom in generate::atom()) {
        let expr = Expr::Atom(atom);
        let back = decode_http(encode_http(&filter(Action::Deny, expr.clone()))).unwrap();
        prop_assert_eq!(&back.rules[0].expr, &canonical(&expr));
    }
}

#[test]
fn one_policy_per_rule_unless_both_sides_mix() {
    let peer = || Expr::atom(Attribute::PeerNamespace, Matcher::Exact("a".into()));
    let port = || Expr::atom(Attribute::DestinationPort, Matcher::Port(80));
    let rule = |expr| encode_http(&filter(Action::Allow, expr)).rules.unwrap().policies;
    let both = rule(Expr::And(vec![peer(), port()]));
    assert_eq!(both.keys().collect::<Vec<_>>(), ["r"]);
    let mut either: Vec<_> = rule(Expr::Or(vec![peer(), port()])).into_keys().collect();
    either.sort();
    assert_eq!(either, ["r", "r#1"]);
}

#[test]
fn what_cannot_be_carried_fails_closed() {
    let peer = |n: usize| Expr::atom(Attribute::PeerNamespace, Matcher::Exact(format!("ns{n}")));
    let port = |n: u16| Expr::atom(Attribute::DestinationPort, Matcher::Port(n));
    // Ten conjuncts that mix both sides are 1024 policies.
    let huge = Expr::And((0..10).map(|n| Expr::Or(vec![peer(n.into()), port(n)])).collect());
    let broken = Expr::atom(Attribute::Path, Matcher::Regex("(".into())).not();
    for expr in [huge, broken] {
        let allow = decode_http(encode_http(&filter(Action::Allow, expr.clone()))).unwrap();
        assert_eq!(allow.rules[0].expr, Expr::never());
        let deny = decode_http(encode_http(&filter(Action::Deny, expr))).unwrap();
        assert_eq!(deny.rules[0].expr, Expr::always());
    }
}

/// The expressions that istiod writes (SEMANTICS 2d) become atoms.
#[test]
fn istiods_expressions_are_folded() {
    let cases = [
        (".+", Attribute::PeerUri, Matcher::Present),
        (
            "spiffe://.*/ns/a/sa/b",
            Attribute::PeerUri,
            Matcher::Suffix("/ns/a/sa/b".into()),
        ),
        (".*/ns/foo/.*", Attribute::PeerNamespace, Matcher::Exact("foo".into())),
        (
            ".*/ns/foo-.*/.*",
            Attribute::PeerNamespace,
            Matcher::Glob("foo-*".into()),
        ),
        (".*/ns/.*/.*", Attribute::PeerNamespace, Matcher::Glob("*".into())),
        (
            "spiffe://.+/ns/foo/(.+/|)sa/bar(/.+)?",
            Attribute::PeerServiceAccount,
            Matcher::Exact("foo/bar".into()),
        ),
        (
            "spiffe://td-[^/]*/.*",
            Attribute::PeerTrustDomain,
            Matcher::Glob("td-*".into()),
        ),
    ];
    for (regex, attribute, matcher) in cases {
        let foreign = Expr::atom(Attribute::PeerUri, Matcher::Regex(regex.into()));
        assert_eq!(canonical(&foreign), Expr::atom(attribute, matcher), "{regex}");
    }
    let odd = Expr::atom(Attribute::PeerUri, Matcher::Regex("spiffe://.*(a|b)".into()));
    assert_eq!(canonical(&odd), odd);
}
