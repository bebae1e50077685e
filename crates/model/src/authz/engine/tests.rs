//! The engine against an evaluator that shares nothing with it, and the truth tables of SEMANTICS 2.

mod oracle;
mod tables;

use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use super::super::{Atom, Attribute, Expr, Matcher, Rule};
use super::*;
use crate::authz::{Connection, canonical, explain};

/// A request with everything that can be tested.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) uris: Vec<String>,
    pub(super) source: IpAddr,
    pub(super) remote: IpAddr,
    pub(super) destination: std::net::SocketAddr,
    pub(super) sni: Option<String>,
    /// Whether it is HTTP; otherwise only the connection is asked about.
    pub(super) http: bool,
    pub(super) method: String,
    pub(super) authority: String,
    pub(super) path: String,
    pub(super) headers: Vec<(String, Vec<u8>)>,
    pub(super) claims: Option<Value>,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            uris: vec![],
            source: [10, 1, 0, 1].into(),
            remote: [10, 1, 0, 1].into(),
            destination: ([10, 0, 0, 9], 80).into(),
            sni: None,
            http: true,
            method: "GET".into(),
            authority: "web".into(),
            path: "/".into(),
            headers: vec![],
            claims: None,
        }
    }
}

impl HttpView for Request {
    fn method(&self) -> &str {
        &self.method
    }
    fn authority(&self) -> &str {
        &self.authority
    }
    fn path(&self) -> &str {
        &self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(n, v)| n == name && f(v))
    }
    fn claims(&self) -> Option<&Value> {
        self.claims.as_ref()
    }
}

impl Request {
    pub(super) fn connection(&self) -> Connection<'_> {
        Connection {
            peer_uris: &self.uris,
            source: self.source,
            remote: self.remote,
            destination: self.destination,
            sni: self.sni.as_deref(),
        }
    }

    pub(super) fn view(&self) -> Option<&dyn HttpView> {
        self.http.then_some(self as &dyn HttpView)
    }
}

fn pick<T: Clone + std::fmt::Debug + 'static>(values: &[T]) -> impl Strategy<Value = T> + use<T> {
    prop::sample::select(values.to_vec())
}

fn strings(values: &[&str]) -> impl Strategy<Value = String> + use<> {
    let values: Vec<String> = values.iter().map(|s| s.to_string()).collect();
    prop::sample::select(values)
}

const URIS: [&str; 9] = [
    "spiffe://td/ns/a/sa/x",
    "spiffe://td/ns/a/sa/y",
    "spiffe://td/ns/b/sa/x",
    "spiffe://td2/ns/ab/sa/y",
    "spiffe://other/ns/b/sa/z",
    "spiffe://td/ns/a/b/sa/x/more",
    "spiffe://td/x/ns/b/sa/y",
    "spiffe://td",
    "dns-like",
];

const PATHS: [&str; 10] = [
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/a//b",
    "/api/v1/x",
    "/api/v2/x.png",
    "/admin",
    "/admin/x",
    "/é",
];

fn request() -> impl Strategy<Value = Request> {
    let ip = || {
        strings(&["10.1.0.1", "10.2.0.1", "192.168.0.1", "fd00::1", "::ffff:10.1.0.1"]).prop_map(|s| s.parse().unwrap())
    };
    let header =
        (strings(&["x-a", "x-b"]), strings(&["1", "2", "", "admin", "a,b"])).prop_map(|(n, v)| (n, v.into_bytes()));
    let claims = pick(&[
        None,
        Some(json!({})),
        Some(json!({"iss": "i", "sub": "s", "aud": ["a", "b"], "scope": "read write"})),
        Some(json!({"iss": "j", "sub": "", "aud": "a", "n": 1, "nested": {"role": ["admin", 2, "user"]}})),
        Some(json!({"iss": "i", "aud": ["b"], "scope": ["read"], "nested": {"role": "user"}})),
    ]);
    (
        (vec(strings(&URIS), 0..3), ip(), ip(), ip(), pick(&[80u16, 443, 8080])),
        (
            prop::option::of(strings(&["web.example.com", "api.example.com", ""])),
            prop::bool::weighted(0.75),
            strings(&["GET", "POST", "PUT"]),
            strings(&["web", "WEB", "web:80", "api.example.com", "Api.Example.Com:8080", ""]),
            strings(&PATHS),
            vec(header, 0..3),
            claims,
        ),
    )
        .prop_map(
            |((uris, source, remote, ip, port), (sni, http, method, authority, path, headers, claims))| Request {
                uris,
                source,
                remote,
                destination: (ip, port).into(),
                sni,
                http,
                method,
                authority,
                path,
                headers,
                claims,
            },
        )
}

fn net(text: &str) -> Matcher {
    Matcher::Cidr(text.parse().unwrap())
}

/// Atoms of every kind, in the world of [`request`], so that each is hit and missed often.
fn atom() -> impl Strategy<Value = Atom> {
    let exact = |values: &[&str]| strings(values).prop_map(Matcher::Exact);
    let prefix = |values: &[&str]| strings(values).prop_map(Matcher::Prefix);
    let suffix = |values: &[&str]| strings(values).prop_map(Matcher::Suffix);
    let regex = |values: &[&str]| strings(values).prop_map(Matcher::Regex);
    let glob = |values: &[&str]| strings(values).prop_map(Matcher::Glob);
    let present = || Just(Matcher::Present);
    let text = |values: &'static [&'static str], parts: &'static [&'static str]| prop_oneof![3 => exact(values), 1 => prefix(parts), 1 => suffix(parts), 1 => present(), 1 => regex(&[".+", "[a-z/]*", "(w|/a).*"])];
    let cidr = || {
        strings(&[
            "10.1.0.0/16",
            "10.0.0.0/8",
            "192.168.0.1/32",
            "fd00::/8",
            "0.0.0.0/0",
            "10.1.2.3/16",
        ])
        .prop_map(|s| net(&s))
    };
    let with = |attribute: Attribute| {
        move |matcher| Atom {
            attribute: attribute.clone(),
            matcher,
        }
    };
    prop_oneof![
        exact(&URIS).prop_map(with(Attribute::PeerUri)),
        prefix(&["spiffe://td", "spiffe://td/", "spiffe://td/ns/a/", "spiffe://"]).prop_map(with(Attribute::PeerUri)),
        suffix(&["/sa/x", "/ns/a/sa/y", "x", "td"]).prop_map(with(Attribute::PeerUri)),
        prop_oneof![
            present(),
            regex(&[
                "spiffe://td2?/.*",
                ".*/ns/a.*/.*",
                "spiffe://.*/sa/y",
                "(",
                "spiffe://t[^/]*/.*"
            ])
        ]
        .prop_map(with(Attribute::PeerUri)),
        exact(&["a", "b", "ab"]).prop_map(with(Attribute::PeerNamespace)),
        glob(&["*", "a*", "*b", "*", "a*b", "*a*", "a/b", "b"]).prop_map(with(Attribute::PeerNamespace)),
        exact(&["a/x", "a/y", "b/y", "b/z", "ab/y"]).prop_map(with(Attribute::PeerServiceAccount)),
        exact(&["td", "td2", "other"]).prop_map(with(Attribute::PeerTrustDomain)),
        glob(&["*", "t*", "*2", "td*", "o*r"]).prop_map(with(Attribute::PeerTrustDomain)),
        cidr().prop_map(with(Attribute::SourceIp)),
        cidr().prop_map(with(Attribute::RemoteIp)),
        cidr().prop_map(with(Attribute::DestinationIp)),
        pick(&[80u16, 443, 8080]).prop_map(|p| Atom {
            attribute: Attribute::DestinationPort,
            matcher: Matcher::Port(p)
        }),
        text(&["web.example.com", "api.example.com"], &["web", "com", "api"]).prop_map(with(Attribute::Sni)),
        text(&["web", "WEB:80", "api.example.com"], &["WE", "80", "b", "api", ".com"]).prop_map(with(Attribute::Host)),
        text(&["GET", "POST"], &["P", "T", "G"]).prop_map(with(Attribute::Method)),
        text(&PATHS, &["/a", "/admin", "/b", "c", ".png", "/"]).prop_map(with(Attribute::Path)),
        strings(&[
            "/a/{*}",
            "/a/{**}",
            "/{*}/b",
            "/api/{*}/{**}",
            "/{**}/x",
            "/admin/{*}",
            "/{*}"
        ])
        .prop_map(Matcher::Template)
        .prop_map(with(Attribute::Path)),
        text(&["1", "admin", ""], &["a", "1", "n"]).prop_map(with(Attribute::Header("x-a".into()))),
        text(&["2", "a,b"], &["a", "2"]).prop_map(with(Attribute::Header("X-B".into()))),
        text(&["web", "WEB"], &["web", ":80"]).prop_map(with(Attribute::Header(":authority".into()))),
        text(&["i", "j"], &["i"]).prop_map(with(Attribute::Claim(vec!["iss".into()]))),
        text(&["a", "b"], &["a"]).prop_map(with(Attribute::Claim(vec!["aud".into()]))),
        text(&["s", ""], &["s"]).prop_map(with(Attribute::Claim(vec!["sub".into()]))),
        text(&["read", "write", "read write"], &["r", "e"]).prop_map(with(Attribute::Claim(vec!["scope".into()]))),
        text(&["admin", "user"], &["a", "r"]).prop_map(with(Attribute::Claim(vec!["nested".into(), "role".into()]))),
        text(&["x"], &["x"]).prop_map(with(Attribute::Metadata("f".into(), "k".into()))),
    ]
}

/// Rules as policies make them: conjunctions of alternatives, some negated.
fn expr() -> impl Strategy<Value = Expr> {
    let field = (vec(atom().prop_map(Expr::Atom), 1..4), prop::bool::weighted(0.2))
        .prop_map(|(values, not)| if not { Expr::Or(values).not() } else { Expr::Or(values) });
    let branch = vec(field, 1..3).prop_map(Expr::And);
    let usual = vec(vec(branch, 1..3).prop_map(Expr::Or), 1..3).prop_map(Expr::And);
    let wild = atom().prop_map(Expr::Atom).prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Expr::And),
            vec(inner.clone(), 0..4).prop_map(Expr::Or),
            inner.prop_map(Expr::not)
        ]
    });
    prop_oneof![3 => usual, 1 => wild]
}

fn rules(max: usize) -> impl Strategy<Value = Vec<Rule>> {
    vec((any::<u16>(), expr()), 0..max).prop_map(|list| {
        // Ids in no order, unique.
        let by_id: BTreeMap<u16, Expr> = list.into_iter().collect();
        let mut rules: Vec<Rule> = by_id
            .into_iter()
            .map(|(id, expr)| Rule {
                id: format!("r{id}"),
                expr,
            })
            .collect();
        rules.reverse();
        rules
    })
}

fn filters() -> impl Strategy<Value = Vec<AuthzFilter>> {
    let filter = |action, enforced, rules, shadow| AuthzFilter {
        action,
        enforced,
        rules,
        shadow,
    };
    let deny = (prop::bool::weighted(0.8), rules(4), rules(3)).prop_map(move |(e, r, s)| filter(Action::Deny, e, r, s));
    let allow =
        (prop::bool::weighted(0.9), rules(5), rules(3)).prop_map(move |(e, r, s)| filter(Action::Allow, e, r, s));
    let log = rules(3).prop_map(move |r| filter(Action::Log, true, r, vec![]));
    (
        prop::option::weighted(0.9, allow),
        prop::option::weighted(0.4, deny),
        prop::option::of(log),
    )
        .prop_map(|(allow, deny, log)| [allow, deny, log].into_iter().flatten().collect())
}

/// The engine and the oracle agree on verdict, id, audit and dry run; and the world is rich enough to believe it.
#[test]
fn engine_and_oracle_agree() {
    let mut runner = TestRunner::deterministic();
    let (filters, requests) = (filters(), vec(request(), 12));
    let mut hits: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    let (mut allowed, mut total) = (0, 0);
    for _ in 0..900 {
        let filters = filters.new_tree(&mut runner).unwrap().current();
        let engine = Engine::new(&filters);
        for (index, request) in requests.new_tree(&mut runner).unwrap().current().iter().enumerate() {
            let decision = engine.decide(&request.connection(), request.view());
            let expected = oracle::decide(&filters, request);
            assert_eq!(decision, expected, "{filters:#?}\n{request:#?}");
            total += 1;
            allowed += usize::from(decision.verdict == Verdict::Allowed);
            for rule in filters.iter().flat_map(|f| f.rules.iter().chain(&f.shadow)) {
                oracle::each_atom(&rule.expr, &mut |atom| {
                    let hit = usize::from(oracle::atom(atom, request) == Some(true));
                    hits.entry(oracle::kind(atom)).or_default()[hit] += 1;
                });
            }
            // Explaining compiles everything anew.
            if index > 1 {
                continue;
            }
            let told = explain(&filters, &request.connection(), request.view());
            assert_eq!(
                told.allowed,
                decision.verdict == Verdict::Allowed,
                "{filters:#?}\n{request:#?}"
            );
            assert_eq!(told.details, decision.details());
            if decision.verdict == Verdict::Denied && decision.rule.is_none() {
                // The proxy looks for the near miss in the compiled rules; both find the same one.
                let near = told.filters.last().and_then(|f| f.nearest.clone());
                let near = near.filter(|n| n.failed.iter().all(|f| f.problem.is_none()));
                assert_eq!(
                    engine.nearest(&request.connection(), request.view()),
                    near.as_ref().map(|n| n.rule.as_str()),
                    "{filters:#?}\n{request:#?}"
                );
            }
        }
    }
    for (kind, [misses, hits]) in &hits {
        println!("{kind:40} {hits:7} hits {misses:7} misses");
        assert!(*misses >= 100, "{kind} is hardly missed");
        // Metadata of other filters does not exist in Mantlet's proxy.
        assert!(*hits >= 100 || kind.starts_with("Metadata"), "{kind} is hardly hit");
    }
    let share = allowed * 100 / total;
    println!("{share} % of {total} allowed");
    assert!((30..=70).contains(&share), "{share} % allowed: the test hardly tells");
}

/// The canonical form means the same as what it was made from.
#[test]
fn canonical_keeps_the_meaning() {
    let mut runner = TestRunner::deterministic();
    let (exprs, requests) = (expr(), request());
    for _ in 0..4_000 {
        let expr = exprs.new_tree(&mut runner).unwrap().current();
        let request = requests.new_tree(&mut runner).unwrap().current();
        let form = canonical(&expr);
        assert_eq!(
            oracle::expr(&expr, &request),
            oracle::expr(&form, &request),
            "{expr:#?}\n{request:#?}"
        );
        assert_eq!(canonical(&form), form, "canonical form is stable");
    }
}

/// Rules that share a path, a method or a caller are told apart by what they do not share.
#[test]
fn the_rarest_condition_is_the_key() {
    let exact = |attribute, text: String| Expr::atom(attribute, Matcher::Exact(text));
    let rule = |n: usize, expr| Rule {
        id: format!("r{n:05}"),
        expr,
    };
    let caller = || exact(Attribute::PeerUri, "spiffe://td/ns/a/sa/x".into());
    let port = || Expr::atom(Attribute::DestinationPort, Matcher::Port(80));
    type Differ = fn(usize) -> Expr;
    let differ: [Differ; 6] = [
        |n| Expr::atom(Attribute::Path, Matcher::Exact(format!("/p{n}"))),
        |n| Expr::atom(Attribute::Path, Matcher::Template(format!("/p{n}/{{*}}/x"))),
        |n| Expr::atom(Attribute::Host, Matcher::Suffix(format!(".s{n}.com"))),
        |n| {
            Expr::atom(
                Attribute::SourceIp,
                Matcher::Cidr(format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap()),
            )
        },
        |n| Expr::atom(Attribute::Header("x-tenant".into()), Matcher::Exact(format!("t{n}"))),
        |n| Expr::atom(Attribute::Claim(vec!["sub".into()]), Matcher::Exact(format!("u{n}"))),
    ];
    for (index, differ) in differ.into_iter().enumerate() {
        let rules = (0..5000).map(|n| rule(n, Expr::And(vec![caller(), port(), differ(n)])));
        let filter = AuthzFilter {
            action: Action::Allow,
            enforced: true,
            rules: rules.collect(),
            shadow: vec![],
        };
        let engine = Engine::new(&[filter]);
        assert_eq!(engine.size(), (5000, 0));
        let request = Request {
            uris: vec!["spiffe://td/ns/a/sa/x".into()],
            source: [10, 0, 42, 7].into(),
            authority: "www.s42.com".into(),
            path: if index == 0 { "/p42".into() } else { "/p42/a/x".into() },
            headers: vec![("x-tenant".into(), b"t42".to_vec())],
            claims: Some(json!({"sub": "u42"})),
            ..Request::default()
        };
        let decision = engine.decide(&request.connection(), request.view());
        assert_eq!(decision.rule, Some("r00042"), "{index}");
        let candidates = engine.filters[0]
            .rules
            .candidates(&request.connection(), request.view());
        assert!(candidates <= 2, "{index}: {candidates} candidates");
    }
}

/// With indexable rules a request looks at its own rules only, however many there are.
#[test]
fn the_index_leaves_no_residual_for_ordinary_rules() {
    let exact = |attribute, text: String| Expr::atom(attribute, Matcher::Exact(text));
    let rules = (0..10_000).map(|n| Rule {
        id: format!("ns[a]-policy[p{n}]-rule[0]"),
        expr: Expr::And(vec![
            Expr::Or(vec![
                exact(Attribute::PeerUri, format!("spiffe://td/ns/a/sa/s{n}")),
                exact(Attribute::PeerServiceAccount, format!("b/s{n}")),
            ]),
            Expr::Or(vec![Expr::atom(Attribute::Path, Matcher::Prefix(format!("/p{n}/")))]),
            exact(Attribute::Method, "DELETE".into()).not(),
        ]),
    });
    let filter = AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: rules.collect(),
        shadow: vec![],
    };
    let engine = Engine::new(&[filter]);
    assert_eq!(engine.size(), (10_000, 0));
    let mut request = Request {
        uris: vec!["spiffe://td/ns/b/sa/s77".into()],
        path: "/p77/x".into(),
        ..Request::default()
    };
    let decision = engine.decide(&request.connection(), request.view());
    assert_eq!(decision.rule, Some("ns[a]-policy[p77]-rule[0]"));
    let candidates = engine.filters[0]
        .rules
        .candidates(&request.connection(), request.view());
    assert_eq!(candidates, 1, "of 10000 rules only the own one is looked at");
    request.path = "/p78/x".into();
    assert_eq!(
        engine.decide(&request.connection(), request.view()).verdict,
        Verdict::Denied
    );
}
