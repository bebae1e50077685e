//! Analyses against brute force: every answer about all requests is compared with the engine's about very many.

use std::net::SocketAddr;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::json;

use super::super::{Action, Attribute, AuthzFilter, Expr, HttpSample, Matcher, Rule, Sample};
use super::*;

const TD: &str = "td";

fn universe(http: bool, peer: Peer) -> Universe {
    Universe {
        base: Sample {
            source: "10.9.9.9".parse().unwrap(),
            remote: "10.9.9.9".parse().unwrap(),
            destination: "10.0.0.1:8080".parse::<SocketAddr>().unwrap(),
            http: http.then(|| HttpSample {
                host: "web.shop".into(),
                ..HttpSample::default()
            }),
            ..Sample::default()
        },
        peer,
        usual: Vec::new(),
        fixed: Fixed {
            port: true,
            address: true,
            ..Fixed::default()
        },
        issuers: Some(vec!["iss-1".into(), "iss-2".into()]),
        normalization: PathNormalization::Base,
    }
}

fn any() -> Peer {
    Peer::Any(vec![TD.into()])
}

fn filter(action: Action, rules: Vec<Expr>) -> AuthzFilter {
    AuthzFilter {
        action,
        enforced: true,
        rules: rules
            .into_iter()
            .enumerate()
            .map(|(i, expr)| Rule {
                id: format!("ns[shop]-policy[{action:?}]-rule[{i}]"),
                expr,
            })
            .collect(),
        shadow: Vec::new(),
    }
}

fn policies(filters: &[AuthzFilter]) -> Policies<'_> {
    Policies { custom: &[], filters }
}

fn exact(attribute: Attribute, text: &str) -> Expr {
    Expr::atom(attribute, Matcher::Exact(text.into()))
}

fn prefix(attribute: Attribute, text: &str) -> Expr {
    Expr::atom(attribute, Matcher::Prefix(text.into()))
}

#[test]
fn who_can_sorts_identities_into_classes() {
    let filters = [
        filter(
            Action::Allow,
            vec![
                Expr::And(vec![
                    exact(Attribute::PeerUri, "spiffe://td/ns/shop/sa/web"),
                    exact(Attribute::Method, "GET"),
                ]),
                exact(Attribute::PeerNamespace, "ops"),
            ],
        ),
        filter(Action::Deny, vec![prefix(Attribute::Path, "/admin")]),
    ];
    let known: Vec<String> = ["shop/web", "shop/other", "ops/root"]
        .iter()
        .map(|n| {
            let (ns, sa) = n.split_once('/').unwrap();
            format!("spiffe://td/ns/{ns}/sa/{sa}")
        })
        .collect();
    let (rows, exact) = who_can(policies(&filters), &universe(true, any()), &known);
    assert!(exact);
    assert_eq!(rows.len(), 3, "{rows:#?}");
    let of = |uri: &str| rows.iter().find(|r| r.known.iter().any(|k| k == uri)).unwrap();
    let web = of(&known[0]);
    assert_eq!(
        web.allows,
        [("ns[shop]-policy[Allow]-rule[0]".into(), "methods GET".into())]
    );
    assert_eq!(
        web.denies,
        [("ns[shop]-policy[Deny]-rule[0]".into(), "paths /admin*".into())]
    );
    assert!(!web.is_never() && !web.is_always());
    let other = of(&known[1]);
    assert!(other.is_never());
    assert_eq!(other.others, ["any other identity"]);
    let ops = of(&known[2]);
    assert_eq!(ops.allows[0].1, "anything");
    assert_eq!(ops.others, ["any other with namespaces ops"]);
    // With a method that the rule does not name, nothing is left.
    let mut post = universe(true, Peer::Is(known[0].clone()));
    post.base.http.as_mut().unwrap().method = "POST".into();
    post.fixed.method = true;
    assert_eq!(find_allowed(policies(&filters), &post), Finding::Never);
}

#[test]
fn the_smallest_difference_is_found_and_none_is_proven() {
    let old = [filter(Action::Deny, vec![prefix(Attribute::Path, "/admin")])];
    let new = [filter(Action::Deny, vec![prefix(Attribute::Path, "/admin/")])];
    let change = compare(policies(&old), policies(&new), &universe(true, any()));
    let Finding::Request(witness) = &change.allowed else {
        panic!("{change:?}")
    };
    assert_eq!(witness.sample.http.as_ref().unwrap().path, "/admin");
    assert_eq!(witness.sample.http.as_ref().unwrap().method, "GET");
    assert_eq!(change.denied, Finding::Never);

    // Two spellings of one thing.
    let a = [filter(
        Action::Allow,
        vec![Expr::And(vec![
            Expr::Or(vec![exact(Attribute::Method, "GET"), exact(Attribute::Method, "HEAD")]),
            prefix(Attribute::Path, "/"),
        ])],
    )];
    let b = [filter(
        Action::Allow,
        vec![exact(Attribute::Method, "HEAD"), exact(Attribute::Method, "GET")],
    )];
    let change = compare(policies(&a), policies(&b), &universe(true, any()));
    assert!(change.is_none(), "{change:?}");
}

#[test]
fn each_rule_that_makes_a_difference_is_shown() {
    let path = |p: &str| exact(Attribute::Path, p);
    let old = [
        filter(Action::Allow, vec![path("/a")]),
        filter(Action::Deny, vec![path("/x")]),
    ];
    let new = [
        filter(Action::Allow, vec![path("/a"), path("/long"), path("/b"), path("/x")]),
        filter(Action::Deny, vec![exact(Attribute::Method, "PUT")]),
    ];
    let found = differences(policies(&old), policies(&new), &universe(true, any()), 10);
    let paths = |list: &[Witness]| -> Vec<String> {
        list.iter()
            .map(|w| {
                w.sample
                    .http
                    .as_ref()
                    .map(|h| format!("{} {}", h.method, h.path))
                    .unwrap_or_default()
            })
            .collect()
    };
    assert_eq!(paths(&found.allowed), ["GET /x", "GET /b", "GET /long"]);
    assert_eq!(paths(&found.denied), ["PUT /a"]);
    assert!(found.undecided.is_empty() && !found.more);
    let few = differences(policies(&old), policies(&new), &universe(true, any()), 1);
    assert_eq!((few.allowed.len(), few.more), (1, true));
}

#[test]
fn claims_need_a_token_of_an_accepted_issuer() {
    let claim = |name: &str, value: &str| exact(Attribute::Claim(vec![name.into()]), value);
    let admin = [filter(Action::Allow, vec![claim("role", "admin")])];
    let Finding::Request(witness) = find_allowed(policies(&admin), &universe(true, any())) else {
        panic!("reachable")
    };
    assert_eq!(
        witness.sample.http.unwrap().claims,
        Some(json!({"iss": "iss-1", "role": "admin"}))
    );
    let foreign = [filter(Action::Allow, vec![claim("iss", "elsewhere")])];
    assert_eq!(find_allowed(policies(&foreign), &universe(true, any())), Finding::Never);
    let mut nobody = universe(true, any());
    nobody.issuers = None;
    assert_eq!(find_allowed(policies(&admin), &nobody), Finding::Never);
}

#[test]
fn connections_have_no_http_attributes() {
    let filters = [filter(Action::Allow, vec![exact(Attribute::Method, "GET")])];
    assert_eq!(
        find_allowed(policies(&filters), &universe(false, any())),
        Finding::Never
    );
    let filters = [filter(
        Action::Deny,
        vec![Expr::atom(
            Attribute::SourceIp,
            Matcher::Cidr("10.1.0.0/16".parse().unwrap()),
        )],
    )];
    let Finding::Request(witness) = find_denied(policies(&filters), &universe(false, any())) else {
        panic!("reachable")
    };
    assert_eq!(witness.sample.source.to_string(), "10.1.0.0");
}

#[test]
fn providers_are_named_where_they_must_agree() {
    let stage = |then: Then| CustomStage {
        rules: vec![Rule {
            id: "istio-ext-authz-opa-ns[a]-policy[b]-rule[0]".into(),
            expr: prefix(Attribute::Path, "/"),
        }],
        then,
    };
    let custom = [stage(Then::Deny)];
    let denied = Policies {
        custom: &custom,
        filters: &[],
    };
    assert_eq!(find_allowed(denied, &universe(true, any())), Finding::Never);
    let custom = [stage(Then::Ask(Box::new(crate::ext_authz::ExtAuthz {
        provider: "opa".into(),
        cluster: "c".into(),
        protocol: crate::ext_authz::CheckProtocol::Grpc { authority: "x".into() },
        timeout_ms: 1,
        fail_open: false,
        status_on_error: None,
        body: None,
    })))];
    let asked = Policies {
        custom: &custom,
        filters: &[],
    };
    let Finding::Request(witness) = find_allowed(asked, &universe(true, any())) else {
        panic!("reachable")
    };
    assert_eq!(witness.providers, ["opa"]);
}

// Random policies over a small alphabet, so that brute force meets every combination.

fn identity() -> impl Strategy<Value = Expr> {
    let names = prop::sample::select(vec!["a", "b", "ab"]);
    prop_oneof![
        (names.clone(), names.clone())
            .prop_map(|(n, s)| exact(Attribute::PeerUri, &format!("spiffe://td/ns/{n}/sa/{s}"))),
        names
            .clone()
            .prop_map(|n| prefix(Attribute::PeerUri, &format!("spiffe://td/ns/{n}"))),
        names
            .clone()
            .prop_map(|s| Expr::atom(Attribute::PeerUri, Matcher::Suffix(s.into()))),
        Just(Expr::atom(Attribute::PeerUri, Matcher::Present)),
        names.clone().prop_map(|n| exact(Attribute::PeerNamespace, n)),
        names
            .clone()
            .prop_map(|n| Expr::atom(Attribute::PeerNamespace, Matcher::Glob(format!("{n}*")))),
        (names.clone(), names).prop_map(|(n, s)| exact(Attribute::PeerServiceAccount, &format!("{n}/{s}"))),
        Just(exact(Attribute::PeerTrustDomain, "td")),
        Just(Expr::atom(Attribute::PeerTrustDomain, Matcher::Glob("t*".into()))),
    ]
}

fn other() -> impl Strategy<Value = Expr> {
    let paths = prop::sample::select(vec!["/", "/a", "/a/", "/a/b", "/b"]);
    let texts = prop::sample::select(vec!["x", "y", "xy"]);
    prop_oneof![
        paths.clone().prop_map(|p| exact(Attribute::Path, p)),
        paths.prop_map(|p| prefix(Attribute::Path, p)),
        prop::sample::select(vec!["b", "/b", "a"]).prop_map(|p| Expr::atom(Attribute::Path, Matcher::Suffix(p.into()))),
        prop::sample::select(vec!["/{*}", "/a/{**}", "/{*}/b"])
            .prop_map(|p| Expr::atom(Attribute::Path, Matcher::Template(p.into()))),
        prop::sample::select(vec!["GET", "POST", "P"]).prop_map(|m| exact(Attribute::Method, m)),
        prop::sample::select(vec!["P", "G"]).prop_map(|m| prefix(Attribute::Method, m)),
        texts.clone().prop_map(|t| exact(Attribute::Header("h".into()), t)),
        texts.clone().prop_map(|t| prefix(Attribute::Header("h".into()), t)),
        Just(Expr::atom(Attribute::Header("h".into()), Matcher::Present)),
        texts.prop_map(|t| exact(Attribute::Claim(vec!["c".into()]), t)),
        Just(Expr::atom(Attribute::Claim(vec!["iss".into()]), Matcher::Present)),
        Just(Expr::atom(Attribute::Claim(vec!["sub".into()]), Matcher::Present)),
        prop::sample::select(vec!["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "::/0"])
            .prop_map(|n| Expr::atom(Attribute::SourceIp, Matcher::Cidr(n.parse().unwrap()))),
        prop::sample::select(vec!["web", "web:80"]).prop_map(|h| exact(Attribute::Host, h)),
        Just(Expr::atom(Attribute::DestinationPort, Matcher::Port(8080))),
        Just(Expr::atom(Attribute::DestinationPort, Matcher::Port(9090))),
    ]
}

fn rule() -> impl Strategy<Value = Expr> {
    let leaf = prop_oneof![identity(), other()];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Expr::And),
            prop::collection::vec(inner.clone(), 1..4).prop_map(Expr::Or),
            inner.prop_map(Expr::not),
        ]
    })
}

fn filters() -> impl Strategy<Value = Vec<AuthzFilter>> {
    (
        prop::option::of(prop::collection::vec(rule(), 0..3)),
        prop::option::of(prop::collection::vec(rule(), 1..3)),
    )
        .prop_map(|(allow, deny)| {
            let mut out = Vec::new();
            out.extend(deny.map(|rules| filter(Action::Deny, rules)));
            out.extend(allow.map(|rules| filter(Action::Allow, rules)));
            out
        })
}

/// Very many requests that meet the tests above in every combination that matters.
fn requests(peers: &[&str]) -> Vec<Sample> {
    let base = universe(true, any()).base;
    let mut out = Vec::new();
    for peer in peers {
        for path in ["/", "/a", "/a/", "/a/b", "/b", "/z", "/ab", "/z/b", "/a/z", "/b/a/b"] {
            for method in ["GET", "POST", "P", "Z", "G"] {
                for header in [&[][..], &["x"], &["y"], &["xy"], &["z"], &["x", "y"], &["y", "xy"]] {
                    for (claims, source) in [
                        (None, "10.9.9.9"),
                        (Some(json!({"iss": "iss-1", "sub": "s", "c": ["x", "y"]})), "10.1.2.3"),
                        (Some(json!({"iss": "iss-2", "c": "xy"})), "10.1.9.9"),
                        (Some(json!({"iss": "iss-1"})), "11.0.0.1"),
                    ] {
                        for host in ["web", "web:80", "z"] {
                            let mut sample = base.clone();
                            sample.peer = vec![peer.to_string()];
                            sample.source = source.parse().unwrap();
                            let http = sample.http.as_mut().unwrap();
                            http.path = path.into();
                            http.method = method.into();
                            http.host = host.into();
                            http.headers = header.iter().map(|v| ("h".to_string(), v.to_string())).collect();
                            http.claims = claims.clone();
                            out.push(sample);
                        }
                    }
                }
            }
        }
    }
    out
}

const PEERS: [&str; 5] = [
    "spiffe://td/ns/a/sa/a",
    "spiffe://td/ns/a/sa/b",
    "spiffe://td/ns/ab/sa/z",
    "spiffe://td/ns/b/sa/ab",
    "spiffe://td/ns/z/sa/z",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, rng_seed: RngSeed::Fixed(4), ..ProptestConfig::default() })]

    /// Rows agree with the engine for every request that is tried, every asked identity is in exactly one row, and
    /// identities outside of all tests are in one, too.
    #[test]
    fn who_can_agrees_with_brute_force(filters in filters()) {
        let asked: Vec<String> = PEERS.iter().map(|p| p.to_string()).collect();
        let (rows, exact) = who_can(policies(&filters), &universe(true, any()), &asked);
        prop_assert!(exact);
        for uri in &asked {
            prop_assert_eq!(rows.iter().filter(|r| r.known.contains(uri)).count(), 1, "{}", uri);
        }
        let engine = Engine::new(&filters);
        for sample in requests(&PEERS) {
            let allowed = engine.decide(&sample.connection(), sample.view()).verdict == Verdict::Allowed;
            let row = rows.iter().find(|r| r.known.contains(&sample.peer[0])).unwrap();
            if allowed {
                prop_assert!(!row.is_never(), "{:?} passes, yet {:#?}", sample, row);
            } else {
                prop_assert!(!row.is_always(), "{:?} is stopped, yet {:#?}", sample, row);
            }
        }
        for row in &rows {
            // Nothing is left open, and what is shown is so (checked by the engine inside).
            prop_assert!(!matches!(row.allowed, Finding::Unknown(_)), "{:#?}", row);
            prop_assert!(!matches!(row.denied, Finding::Unknown(_)), "{:#?}", row);
        }
    }

    /// No difference is claimed where there is one, and every shown difference is one.
    #[test]
    fn differences_agree_with_brute_force(old in filters(), new in filters()) {
        let change = compare(policies(&old), policies(&new), &universe(true, any()));
        let (before, after) = (Engine::new(&old), Engine::new(&new));
        let allowed = |engine: &Engine, s: &Sample| engine.decide(&s.connection(), s.view()).verdict == Verdict::Allowed;
        for sample in requests(&PEERS) {
            match (allowed(&before, &sample), allowed(&after, &sample)) {
                (false, true) => prop_assert!(change.allowed != Finding::Never, "{:?}", sample),
                (true, false) => prop_assert!(change.denied != Finding::Never, "{:?}", sample),
                _ => {}
            }
        }
        prop_assert!(!matches!(change.allowed, Finding::Unknown(_)), "{:?}", change);
        prop_assert!(!matches!(change.denied, Finding::Unknown(_)), "{:?}", change);
        let all = differences(policies(&old), policies(&new), &universe(true, any()), 20);
        prop_assert_eq!(all.allowed.is_empty(), change.allowed == Finding::Never);
        prop_assert_eq!(all.denied.is_empty(), change.denied == Finding::Never);
        for w in &all.allowed {
            prop_assert!(!allowed(&before, &w.sample) && allowed(&after, &w.sample));
        }
        for w in &all.denied {
            prop_assert!(allowed(&before, &w.sample) && !allowed(&after, &w.sample));
        }
        if let Finding::Request(w) = &change.allowed {
            prop_assert!(!allowed(&before, &w.sample) && allowed(&after, &w.sample));
        }
        if let Finding::Request(w) = &change.denied {
            prop_assert!(allowed(&before, &w.sample) && !allowed(&after, &w.sample));
        }
    }
}

#[test]
fn a_thousand_rules_are_analysed_in_reasonable_time() {
    let rules: Vec<Expr> = (0..1000)
        .map(|i| {
            Expr::And(vec![
                exact(Attribute::PeerUri, &format!("spiffe://td/ns/n{}/sa/s{i}", i % 50)),
                prefix(Attribute::Path, &format!("/service-{i}/")),
            ])
        })
        .collect();
    let old = [filter(Action::Allow, rules.clone())];
    let mut changed = rules;
    changed.remove(777);
    let new = [filter(Action::Allow, changed)];
    let change = compare(policies(&old), policies(&new), &universe(true, any()));
    let Finding::Request(witness) = &change.denied else {
        panic!("{change:?}")
    };
    assert_eq!(witness.sample.peer, ["spiffe://td/ns/n27/sa/s777"]);
    assert_eq!(witness.sample.http.as_ref().unwrap().path, "/service-777/");
    assert_eq!(change.allowed, Finding::Never);
}
