//! Group I of the list of threats, by number: attacks on the meaning of policies, from YAML over translation and wire to a real
//! Envoy and to Mantlet's proxy, over their sockets.
//!
//! Each answer is written down here; that all sides agree would not show what they agree on.

use std::collections::BTreeMap;
use std::sync::Arc;

use mantlet_differential::generate::{Plan, SOURCES_V4, SOURCES_V6};
use mantlet_differential::world::{Connection, Normalization, Request, World};
use serde_json::{Value, json};

use super::arena::{self, addresses, translate};
use super::client::Reply;
use super::tokens;

/// How somebody comes.
#[derive(Clone, Copy, Debug)]
enum Way {
    Http,
    Tcp,
}

/// A policy, and what comes of connections that it judges.
struct Row {
    action: &'static str,
    rule: Value,
    /// As whom (`None`: plaintext), how, and whether it must get through.
    asked: Vec<(Option<String>, Way, bool)>,
}

fn row(action: &'static str, rule: Value) -> Row {
    Row {
        action,
        rule,
        asked: Vec::new(),
    }
}

impl Row {
    /// Both ways must end like this.
    fn both(self, peer: impl Into<Option<&'static str>>, passes: bool) -> Row {
        let peer = peer.into();
        self.tcp(peer, passes).http(peer, passes)
    }

    fn tcp(mut self, peer: impl Into<Option<&'static str>>, passes: bool) -> Row {
        let peer = peer.into().map(|p| format!("spiffe://{p}"));
        self.asked.push((peer, Way::Tcp, passes));
        self
    }

    fn http(mut self, peer: impl Into<Option<&'static str>>, passes: bool) -> Row {
        let peer = peer.into().map(|p| format!("spiffe://{p}"));
        self.asked.push((peer, Way::Http, passes));
        self
    }

    fn plan(&self, index: usize) -> Plan {
        let (http, tcp) = addresses(index);
        let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "shop"}, "spec": {"action": self.action, "rules": [self.rule]}});
        let world = World {
            trust_domain: "cluster.local".into(),
            aliases: vec![],
            normalization: Normalization::Base,
            root_namespace: "istio-system".into(),
            objects: vec![policy],
            namespace: "shop".into(),
            labels: BTreeMap::from([("app".into(), "web".into())]),
        };
        let mut plan = Plan {
            world,
            http: vec![],
            tcp: vec![],
        };
        for (peer, way, _) in &self.asked {
            let destination = match way {
                Way::Http => http,
                Way::Tcp => tcp,
            };
            let source = if destination.is_ipv6() {
                SOURCES_V6[0]
            } else {
                SOURCES_V4[0]
            };
            let connection = Connection {
                peer: peer.clone().map(|p| vec![p]),
                source: source.parse().unwrap(),
                destination,
                sni: peer.is_some().then(|| "web.example.com".into()),
            };
            let request = Request {
                method: "GET".into(),
                target: b"/data".to_vec(),
                host: "web.example.com".into(),
                headers: vec![],
                tokens: vec![],
            };
            match way {
                Way::Http => plan.http.push((connection, vec![request])),
                Way::Tcp => plan.tcp.push(connection),
            }
        }
        plan
    }
}

/// Sends every row's questions to both proxies, which must answer as written.
fn attack(rows: &[Row]) {
    let mint = Arc::new(tokens::Mint::new());
    let plans: Vec<Plan> = rows.iter().enumerate().map(|(index, row)| row.plan(index)).collect();
    let worlds: Vec<_> = plans.iter().map(|plan| translate(&plan.world)).collect();
    let answers = arena::run(&plans, &worlds, 0, &mint);
    for (row, answers) in rows.iter().zip(&answers) {
        let (mut http, mut tcp) = (answers.http.iter(), answers.tcp.iter());
        for (peer, way, passes) in &row.asked {
            let got = match way {
                Way::Http => http.next().unwrap()[0].clone().map(|said| match said.reply {
                    Reply::Http { status: 200, .. } => true,
                    Reply::Http { status: 403, .. } => false,
                    other => panic!("neither let through nor denied: {other:?}"),
                }),
                Way::Tcp => tcp.next().unwrap().clone().map(|did| did.passed),
            };
            assert_eq!(
                got, [*passes; 2],
                "Envoy and the proxy to {peer:?} by {way:?}: {} {}",
                row.action, row.rule
            );
        }
    }
}

fn from(field: &str, values: &[&str]) -> Value {
    json!({"from": [{"source": {field: values}}]})
}

/// CVE-2020-16844: a DENY with a suffix of principals never matched on TCP. Every kind of match has to.
#[test]
fn reg_130_denied_principals_on_tcp() {
    const EVIL: &str = "cluster.local/ns/a/sa/evil";
    const OTHER: &str = "cluster.local/ns/b/sa/good";
    let denies = |field, value| row("DENY", from(field, &[value])).both(EVIL, false);
    let mut rows = vec![denies("principals", "*").both(OTHER, false).both(None, true)];
    for (field, value) in [
        ("principals", EVIL),
        ("principals", "cluster.local/ns/a/*"),
        ("principals", "*/ns/a/sa/evil"),
        ("principals", "*/evil"),
        ("principals", "*evil"),
        ("namespaces", "a"),
        ("namespaces", "a*"),
        ("serviceAccounts", "a/evil"),
    ] {
        rows.push(denies(field, value).both(OTHER, true).both(None, true));
    }
    // The same values admit nobody else.
    for value in [EVIL, "cluster.local/ns/a/*", "*/ns/a/sa/evil", "*evil"] {
        let row = row("ALLOW", from("principals", &[value]));
        rows.push(row.both(EVIL, true).both(OTHER, false).both(None, false));
    }
    attack(&rows);
}

/// CVE-2026-39350: names of accounts and namespaces and ends of principals went into an expression as they were, so that `a.b`
/// matched `axb`. Every character stands for itself.
#[test]
fn reg_131_metacharacters_in_identities() {
    const DOT: &str = "cluster.local/ns/shop/sa/a.b";
    const ANY: &str = "cluster.local/ns/shop/sa/axb";
    const DOT_NS: &str = "cluster.local/ns/t.1/sa/w";
    const ANY_NS: &str = "cluster.local/ns/tx1/sa/w";
    let mut rows = Vec::new();
    for (field, value) in [
        ("serviceAccounts", "a.b"),
        ("serviceAccounts", "shop/a.b"),
        ("principals", "*/sa/a.b"),
        ("principals", "*a.b"),
        ("principals", "cluster.local/ns/shop/sa/a.b"),
        ("principals", "cluster.local/ns/shop/sa/a.*"),
    ] {
        rows.push(row("ALLOW", from(field, &[value])).both(DOT, true).both(ANY, false));
        rows.push(row("DENY", from(field, &[value])).both(DOT, false).both(ANY, true));
    }
    for (field, value) in [
        ("namespaces", "t.1"),
        ("namespaces", "t.*"),
        ("serviceAccounts", "t.1/w"),
        ("principals", "*/ns/t.1/sa/w"),
    ] {
        rows.push(
            row("ALLOW", from(field, &[value]))
                .both(DOT_NS, true)
                .both(ANY_NS, false),
        );
        rows.push(
            row("DENY", from(field, &[value]))
                .both(DOT_NS, false)
                .both(ANY_NS, true),
        );
    }
    // What would match everybody as an expression matches nobody.
    for (field, value) in [
        ("principals", "*/sa/[a-z.]+"),
        ("principals", "*/sa/(a.b|axb)"),
        ("principals", "*|.+"),
        ("namespaces", "shop|t.1"),
        ("namespaces", "[a-z]+"),
        ("serviceAccounts", "shop/a.?b"),
        ("serviceAccounts", "a.b|axb"),
    ] {
        rows.push(row("ALLOW", from(field, &[value])).both(DOT, false).both(ANY, false));
        rows.push(row("DENY", from(field, &[value])).both(DOT, true).both(ANY, true));
    }
    attack(&rows);
}

/// ISTIO-SECURITY-2021-004: whoever comes without mTLS has no name, so "not this name" holds for it. A DENY must therefore hit
/// it, and an ALLOW that also asks for a name must not let it in. (That an ALLOW with nothing but a negation admits plaintext
/// where a port takes plaintext is Istio's meaning, S2.60, which `validate` warns of; `reg_132_strict_ports_see_no_plaintext`
/// is the other half.)
#[test]
fn reg_132_negations_and_plaintext() {
    const FRIEND: &str = "cluster.local/ns/a/sa/friend";
    const OTHER: &str = "cluster.local/ns/b/sa/good";
    let mut rows = Vec::new();
    for (field, value) in [
        ("notPrincipals", FRIEND),
        ("notPrincipals", "*/friend"),
        ("notPrincipals", "cluster.local/ns/a/*"),
        ("notNamespaces", "a"),
        ("notServiceAccounts", "a/friend"),
    ] {
        let denies = row("DENY", from(field, &[value]));
        rows.push(denies.both(None, false).both(OTHER, false).both(FRIEND, true));
        let named = json!({"from": [{"source": {"namespaces": ["*"], field: [value]}}]});
        // Accounts may not stand beside namespaces.
        if field != "notServiceAccounts" {
            rows.push(
                row("ALLOW", named)
                    .both(None, false)
                    .both(OTHER, true)
                    .both(FRIEND, false),
            );
        }
    }
    rows.push(
        row("DENY", from("notPrincipals", &["*"]))
            .both(None, false)
            .both(OTHER, true),
    );
    let condition = json!({"when": [{"key": "source.principal", "notValues": [FRIEND]}]});
    rows.push(
        row("DENY", condition)
            .both(None, false)
            .both(OTHER, false)
            .both(FRIEND, true),
    );
    attack(&rows);
}

/// Istio issue 61126, CVE-2021-36213: a DENY that says nothing but things about requests was not enforced where there are none.
/// There it denies all; an ALLOW of that kind admits nothing.
#[test]
fn reg_135_denials_about_requests_on_tcp() {
    const ANYONE: &str = "cluster.local/ns/a/sa/x";
    let mut rows = Vec::new();
    for operation in [
        json!({"methods": ["DELETE"]}),
        json!({"notMethods": ["GET"]}),
        json!({"paths": ["/admin"]}),
        json!({"notPaths": ["/data"]}),
        json!({"paths": ["/a/{*}/b"]}),
        json!({"hosts": ["admin.example.com"]}),
        json!({"notHosts": ["web.example.com"]}),
    ] {
        let rule = json!({"to": [{"operation": operation}]});
        // A request that the rule does not mean goes on.
        rows.push(row("DENY", rule.clone()).both(ANYONE, true).both(None, true));
        let last = rows.last_mut().unwrap();
        for asked in last.asked.iter_mut().filter(|a| matches!(a.1, Way::Tcp)) {
            asked.2 = false;
        }
        rows.push(row("ALLOW", rule).tcp(ANYONE, false).tcp(None, false));
    }
    for rule in [
        json!({"from": [{"source": {"requestPrincipals": ["nobody/x"]}}]}),
        json!({"when": [{"key": "request.headers[x-role]", "values": ["admin"]}]}),
        json!({"when": [{"key": "request.auth.claims[group]", "values": ["admin"]}]}),
    ] {
        let denies = row("DENY", rule.clone());
        rows.push(denies.tcp(ANYONE, false).tcp(None, false).http(ANYONE, true));
        rows.push(row("ALLOW", rule).both(ANYONE, false));
    }
    // What it says of connections stays: other ports and other peers are not its business.
    let elsewhere = json!({"to": [{"operation": {"methods": ["DELETE"], "ports": ["1"]}}]});
    rows.push(row("DENY", elsewhere).tcp(ANYONE, true));
    let others = json!({"from": [{"source": {"namespaces": ["b"]}}], "to": [{"operation": {"paths": ["/admin"]}}]});
    rows.push(
        row("DENY", others)
            .tcp(ANYONE, true)
            .tcp("cluster.local/ns/b/sa/x", false),
    );
    attack(&rows);
}
