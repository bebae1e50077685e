//! Worlds and questions from a seed. The same seed gives the same ones, byte for byte.
//!
//! Values of policies and of requests come from the same small pools, so that about half of all tests hit.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::naive::{Reading, ask};
use crate::world::{Connection, FIRST_ISSUER, Normalization, Place, Request, SECOND_ISSUER, Signature, Token, World};

/// Ports that workloads serve HTTP on.
pub const HTTP_PORTS: [u16; 3] = [80, 8080, 9090];
/// Ports that workloads serve other protocols on.
pub const TCP_PORTS: [u16; 2] = [3306, 9000];

/// Names that clients hold certificates for.
pub const IDENTITIES: [&[&str]; 9] = [
    &["spiffe://cluster.local/ns/a/sa/x"],
    &["spiffe://cluster.local/ns/a/sa/y"],
    &["spiffe://cluster.local/ns/ab/sa/x"],
    &["spiffe://cluster.local/ns/shop/sa/x"],
    &["spiffe://cluster.local/ns/a-b/sa/sa"],
    &["spiffe://td2.example/ns/a/sa/x"],
    &["spiffe://old.td2.example/ns/ab/sa/y"],
    // Listed deviations: such certificates do not get through Mantlet's handshake.
    &["spiffe://cluster.local/ns/a/b/sa/x"],
    &["spiffe://cluster.local/ns/a/sa/x", "spiffe://cluster.local/ns/ab/sa/y"],
];
/// How many of [`IDENTITIES`] are of the strict form.
pub const STRICT_IDENTITIES: usize = 7;

/// Addresses that clients connect from.
pub const SOURCES_V4: [&str; 5] = ["10.1.0.5", "10.1.0.77", "10.1.9.9", "10.2.3.4", "192.168.7.7"];
/// The same for IPv6.
pub const SOURCES_V6: [&str; 3] = ["fd00:1::5", "fd00:1:2::9", "fd00:2::1"];

const SNIS: [&str; 4] = [
    "web.example.com",
    "api.example.com",
    "outbound_.80_._.web.shop.svc.cluster.local",
    "other.org",
];
const METHODS: [&str; 7] = ["GET", "GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
const HOSTS: [&str; 8] = [
    "web",
    "WEB",
    "web.shop.svc.cluster.local",
    "Web.Example.COM",
    "web.example.com:8080",
    "api.example.com",
    "[fd00::1]:8080",
    "10.9.0.1",
];
const SEGMENTS: [&str; 12] = [
    "a", "a", "b", "b", "admin", "api", "v1", "c", "x.png", "A", "store", "cart",
];
const ODD: [&str; 38] = [
    "%61", "%2e%2e", "..", ".", "", "%2f", "%2F", "%5c", "\\", "%25", "%252e", "a;b=1", "%c3%bc", "~", "%7E", "*",
    "a,b", "a'b", "a:b@c", "..;", "...", "%c0%ae", "%41dmin", "%", "%zz", "a+b", "..;x=1", ".;", "...;", "%2e%2e;",
    "..;\\a", "..;%2fa", "a\"b", "{x}", "a|b^`", "\u{fc}", "%2E", "a=b&c",
];
const TEAMS: [&[u8]; 10] = [
    b"admin",
    b"admin",
    b"user",
    b"user,admin",
    b"",
    b"Admin",
    b"us",
    b"a b",
    "\u{fc}ser".as_bytes(),
    b"x-admin",
];
const FORWARDED: [&[&str]; 14] = [
    &[],
    &[],
    &["203.0.113.7"],
    &["10.1.0.5"],
    &["1.2.3.4, 203.0.113.9"],
    &["203.0.113.7", "10.1.9.9"],
    &["10.1.0.5,unknown"],
    &["203.0.113.7:1234"],
    &["fd00:9::1"],
    &["  203.0.113.7  "],
    &["10.2.3.4,"],
    &["::ffff:10.1.0.5"],
    &["10.1.0.05"],
    &["unknown", "203.0.113.7"],
];

/// A world with its questions.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The configuration.
    pub world: World,
    /// Requests by connection.
    pub http: Vec<(Connection, Vec<Request>)>,
    /// Plain connections.
    pub tcp: Vec<Connection>,
}

/// What is asked of one world.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// HTTP connections.
    pub connections: usize,
    /// Requests on each of them.
    pub requests: usize,
    /// TCP connections.
    pub tcp: usize,
}

/// One more policy of an action, bound in the world's namespace or mesh-wide, enforced, with at least one rule.
pub fn another_policy(seed: u64, world: &World, address: IpAddr, action: &str) -> Value {
    let mut g = Gen {
        keys: KeySets {
            first: String::new(),
            second: String::new(),
        },
        rng: StdRng::seed_from_u64(seed),
        address,
    };
    let mut policy = g.policy(9, &world.namespace, false);
    policy["metadata"] = json!({"name": "p-9", "namespace": world.namespace});
    policy["spec"]["action"] = json!(action);
    if let Some(spec) = policy["spec"].as_object_mut() {
        spec.remove("selector");
        spec.remove("targetRefs");
        spec.entry("rules").or_insert_with(|| json!([{}]));
    }
    policy
}

/// Key sets of the two issuers, as JSON.
#[derive(Clone, Debug)]
pub struct KeySets {
    /// Of [`FIRST_ISSUER`].
    pub first: String,
    /// Of [`SECOND_ISSUER`].
    pub second: String,
}

/// A world and questions for a workload at these addresses.
pub fn plan(seed: u64, http: SocketAddr, tcp: SocketAddr, size: Size, keys: &KeySets) -> Plan {
    let mut g = Gen {
        keys: keys.clone(),
        rng: StdRng::seed_from_u64(seed),
        address: http.ip(),
    };
    let world = g.world();
    let http = (0..size.connections)
        .map(|_| {
            let connection = g.aimed_connection(&world, http);
            let requests = (0..size.requests)
                .map(|_| g.aimed_request(&world, &connection))
                .collect();
            (connection, requests)
        })
        .collect();
    let tcp = (0..size.tcp).map(|_| g.aimed_connection(&world, tcp)).collect();
    Plan { world, http, tcp }
}

struct Gen {
    keys: KeySets,
    rng: StdRng,
    address: IpAddr,
}

impl Gen {
    fn one<T: Clone>(&mut self, pool: &[T]) -> T {
        pool.choose(&mut self.rng)
            .cloned()
            .unwrap_or_else(|| unreachable!("pools are not empty"))
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn world(&mut self) -> World {
        let namespace = self.one(&["shop", "a"]);
        let (trust_domain, aliases) = self.one(&[
            ("cluster.local", &[][..]),
            ("cluster.local", &["old.td2.example"][..]),
            ("td2.example", &["cluster.local", "old.td2.example"][..]),
            ("td2.example", &[][..]),
        ]);
        let mut world = World {
            trust_domain: trust_domain.into(),
            aliases: aliases.iter().map(|s| s.to_string()).collect(),
            normalization: self.one(&[
                Normalization::None,
                Normalization::Base,
                Normalization::Base,
                Normalization::MergeSlashes,
                Normalization::DecodeAndMergeSlashes,
            ]),
            root_namespace: "istio-system".into(),
            objects: Vec::new(),
            namespace: namespace.into(),
            labels: BTreeMap::from([("app".into(), "web".into()), ("version".into(), "v1".into())]),
        };
        let count = self.rng.random_range(1..=4);
        // Without HTTP fields the TCP chain is more than "drop all".
        let l4 = self.chance(35);
        for index in 0..count {
            let policy = self.policy(index, namespace, l4);
            world.objects.push(policy);
        }
        if self.chance(75) {
            let authentication = self.request_authentication(namespace);
            world.objects.push(authentication);
        }
        world
    }

    fn request_authentication(&mut self, own: &str) -> Value {
        let rules: Vec<Value> = (0..self.one(&[1, 1, 2])).map(|_| self.jwt_rule()).collect();
        let namespace = if self.chance(20) { "istio-system" } else { own };
        let mut spec = json!({"jwtRules": rules});
        if self.chance(10) {
            spec["selector"] = json!({"matchLabels": {"version": self.one(&["v1", "v2"])}});
        }
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "tokens", "namespace": namespace}, "spec": spec,
        })
    }

    fn jwt_rule(&mut self) -> Value {
        let first = self.chance(75);
        let (issuer, jwks) = if first {
            (FIRST_ISSUER, self.keys.first.clone())
        } else {
            (SECOND_ISSUER, self.keys.second.clone())
        };
        let mut rule = json!({"issuer": issuer, "jwks": jwks});
        match self.rng.random_range(0..10) {
            0..=5 => {}
            6 => rule["fromHeaders"] = json!([{"name": "X-Token", "prefix": "Token "}]),
            7 => {
                rule["fromHeaders"] =
                    json!([{"name": "x-token", "prefix": "Token "}, {"name": "Authorization", "prefix": "Bearer "}])
            }
            8 => rule["fromParams"] = json!(["token"]),
            _ => rule["fromCookies"] = json!(["session"]),
        }
        if self.chance(20) {
            rule["audiences"] = json!(self.one(&[["web", "other"], ["api", "web"]]));
        }
        if self.chance(30) {
            rule["forwardOriginalToken"] = json!(true);
        }
        if self.chance(30) {
            rule["outputClaimToHeaders"] = json!([{"header": "x-sub", "claim": "sub"}]);
        }
        rule
    }

    fn tokens(&mut self) -> Vec<(Place, Token)> {
        let count = self.one(&[0, 0, 1, 1, 1, 1, 1, 1, 1, 2]);
        let mut out: Vec<(Place, Token)> = Vec::new();
        for _ in 0..count {
            use Place::{AccessToken, Bearer, Cookie, Header, Parameter};
            let place = self.one(&[
                Bearer,
                Bearer,
                Bearer,
                Bearer,
                Bearer,
                Header,
                AccessToken,
                Parameter,
                Cookie,
            ]);
            if out.iter().all(|(p, _)| *p != place) {
                let token = self.token();
                out.push((place, token));
            }
        }
        out
    }

    fn token(&mut self) -> Token {
        let issuer = self.one(&[
            FIRST_ISSUER,
            FIRST_ISSUER,
            FIRST_ISSUER,
            FIRST_ISSUER,
            SECOND_ISSUER,
            SECOND_ISSUER,
            "other",
        ]);
        let right = match issuer {
            SECOND_ISSUER => Signature::Second,
            _ => self.one(&[Signature::First, Signature::FirstEd]),
        };
        let wrong = [
            Signature::Forged,
            Signature::Unknown,
            Signature::Absent,
            Signature::Malformed,
            Signature::First,
            Signature::Second,
        ];
        let signature = if self.chance(92) { right } else { self.one(&wrong) };
        let mut claims = json!({"iss": issuer, "iat": 1_700_000_000});
        let pools: &[(&str, &[Value])] = &[
            (
                "sub",
                &[
                    json!("alice"),
                    json!("alice"),
                    json!("bob"),
                    json!("team/bob"),
                    json!(""),
                ],
            ),
            (
                "aud",
                &[json!("web"), json!(["web", "api"]), json!("api"), json!(["other"])],
            ),
            ("azp", &[json!("frontend"), json!("backend")]),
            (
                "groups",
                &[
                    json!(["admins", "users"]),
                    json!("users"),
                    json!([]),
                    json!(["others", 7]),
                    json!({"admins": true}),
                ],
            ),
            (
                "scope",
                &[json!("read write"), json!("read"), json!(["write"]), json!("")],
            ),
            ("level", &[json!(7), json!("7"), json!("gold"), json!(true)]),
            (
                "realm",
                &[
                    json!({"roles": ["ops", "dev"]}),
                    json!({"roles": "ops"}),
                    json!({"roles": []}),
                    json!("ops"),
                ],
            ),
            ("a.b", &[json!("dotted"), json!(["dotted", "x"])]),
            ("exp", &[json!(4_000_000_000_u64)]),
        ];
        for (name, pool) in pools {
            if self.chance(85) {
                claims[*name] = self.one(pool);
            }
        }
        if self.chance(2) {
            claims["exp"] = json!(1_000_000_000);
        }
        if self.chance(2) {
            claims["nbf"] = json!(4_000_000_000_u64);
        }
        Token { claims, signature }
    }

    /// Of several candidates often the one for which most tests hit, so that rare values are met.
    fn aimed<T>(&mut self, candidates: Vec<T>, hits: impl Fn(&T) -> usize) -> T {
        let aim = self.chance(50);
        let mut best: Option<(usize, T)> = None;
        for candidate in candidates {
            let score = if aim { hits(&candidate) } else { 0 };
            if best.as_ref().is_none_or(|(most, _)| score > *most) {
                best = Some((score, candidate));
            }
        }
        best.map(|(_, candidate)| candidate)
            .unwrap_or_else(|| unreachable!("there is a candidate"))
    }

    fn aimed_connection(&mut self, world: &World, to: SocketAddr) -> Connection {
        let candidates = (0..4).map(|_| self.connection(to)).collect();
        self.aimed(candidates, |connection| {
            let mut hits = 0;
            ask(world, connection, None, Reading::Mantlet, None, &mut |_, hit| {
                hits += usize::from(hit)
            });
            hits
        })
    }

    fn aimed_request(&mut self, world: &World, connection: &Connection) -> Request {
        let candidates = (0..4).map(|_| self.request()).collect();
        self.aimed(candidates, |request| {
            let mut hits = 0;
            ask(
                world,
                connection,
                Some(request),
                Reading::Mantlet,
                None,
                &mut |_, hit| hits += usize::from(hit),
            );
            hits
        })
    }

    fn policy(&mut self, index: usize, own: &str, l4: bool) -> Value {
        let namespace = match self.rng.random_range(0..10) {
            0 | 1 => "istio-system",
            2 => "elsewhere",
            _ => own,
        };
        let action = self.one(&["ALLOW", "ALLOW", "ALLOW", "DENY", "DENY", "AUDIT", ""]);
        let mut spec = json!({});
        if !action.is_empty() {
            spec["action"] = json!(action);
        }
        match self.rng.random_range(0..10) {
            0..=5 => {}
            6 | 7 => spec["selector"] = json!({"matchLabels": {"app": "web"}}),
            8 => spec["selector"] = json!({"matchLabels": {"app": "web", "version": "v2"}}),
            _ => spec["targetRefs"] = json!([{"kind": "Service", "group": "", "name": "web"}]),
        }
        let rules = if self.chance(4) {
            0
        } else {
            self.rng.random_range(1..=3)
        };
        let deny = action == "DENY";
        let rules: Vec<Value> = (0..rules).map(|_| self.rule(l4, deny)).collect();
        if !rules.is_empty() {
            spec["rules"] = json!(rules);
        }
        let mut metadata = json!({"name": format!("p-{index}"), "namespace": namespace});
        if matches!(action, "ALLOW" | "DENY") && self.chance(12) {
            metadata["annotations"] = json!({"istio.io/dry-run": self.one(&["true", "true", "T", "false", "perhaps"])});
        }
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})
    }

    fn rule(&mut self, l4: bool, deny: bool) -> Value {
        let mut rule = json!({});
        let parts = self.one(&[1, 1, 2, if deny { 3 } else { 2 }]);
        for _ in 0..parts {
            match self.rng.random_range(0..3) {
                0 => {
                    let sources: Vec<Value> = (0..self.one(&[1, 1, 2]))
                        .map(|_| json!({"source": self.fields(FROM, l4)}))
                        .collect();
                    rule["from"] = json!(sources);
                }
                1 => {
                    let operations: Vec<Value> = (0..self.one(&[1, 1, 2]))
                        .map(|_| json!({"operation": self.fields(TO, l4)}))
                        .collect();
                    rule["to"] = json!(operations);
                }
                _ => {
                    let conditions: Vec<Value> = (0..self.one(&[1, 1, 2])).map(|_| self.condition(l4)).collect();
                    rule["when"] = json!(conditions);
                }
            }
        }
        rule
    }

    fn fields(&mut self, all: &[(&str, bool)], l4: bool) -> Value {
        let usable: Vec<&str> = all
            .iter()
            .filter(|(_, http)| !(l4 && *http))
            .map(|(name, _)| *name)
            .collect();
        let mut out = json!({});
        for _ in 0..self.one(&[1, 1, 2]) {
            let name = self.one(&usable);
            let values = self.values(name);
            if self.chance(35) {
                out[format!("not{}{}", name[..1].to_uppercase(), &name[1..])] = values;
            } else {
                out[name] = values;
            }
        }
        out
    }

    fn condition(&mut self, l4: bool) -> Value {
        if self.chance(1) {
            return json!({"key": "request.unknown", "values": ["x"]});
        }
        let usable: Vec<&str> = WHEN
            .iter()
            .filter(|(_, http)| !(l4 && *http))
            .map(|(key, _)| *key)
            .collect();
        let key = self.one(&usable);
        let mut out = json!({"key": key});
        let kind = self.rng.random_range(0..10);
        if kind < 7 {
            out["values"] = self.values(key);
        }
        if kind >= 6 {
            out["notValues"] = self.values(key);
        }
        out
    }

    fn values(&mut self, field: &str) -> Value {
        let count = self.one(&[1, 1, 1, 2, 3]);
        let values: Vec<String> = (0..count).map(|_| self.value(field)).collect();
        json!(values)
    }

    /// A value of a field or key, in any of its forms.
    fn value(&mut self, field: &str) -> String {
        let address = self.address;
        let pool: &[&str] = match field {
            "principals" | "source.principal" => &[
                "cluster.local/ns/a/sa/x",
                "cluster.local/ns/a/sa/x",
                "td2.example/ns/a/sa/x",
                "old.td2.example/ns/ab/sa/y",
                "cluster.local/ns/shop/sa/x",
                "cluster.local/ns/a/*",
                "cluster.local/ns/a*",
                "cluster.local/*",
                "*/ns/a/sa/x",
                "*/sa/x",
                "*x",
                "*.example/ns/ab/sa/y",
                "*",
                "spiffe://cluster.local/ns/a/sa/x",
                "cluster.local/ns/*/sa/x",
            ],
            "requestPrincipals" | "request.auth.principal" => &[
                "*",
                "https://issuer.example/alice",
                "https://issuer.example/*",
                "https://issuer.example/al*",
                "*/alice",
                "*example/alice",
                "*lice",
                "https://*",
                "https://issuer.example",
                "testing@example.org/team/bob",
                "testing@example.org/*",
            ],
            "namespaces" | "source.namespace" => &["a", "a", "ab", "shop", "a*", "*b", "*", "a*b", "*-*", "x*"],
            "serviceAccounts" | "source.serviceAccount" => {
                &["x", "a/x", "a/x", "a/y", "ab/x", "sa", "a-b/sa", "y", "a/b/c"]
            }
            "trustDomains" | "source.trustDomain" => &[
                "cluster.local",
                "cluster.local",
                "td2.example",
                "*.example",
                "cluster*",
                "*",
                "old.td2.example",
                "td*",
            ],
            "ipBlocks" | "source.ip" => &[
                "10.1.0.5",
                "10.1.0.0/24",
                "10.1.9.0/16",
                "10.0.0.0/8",
                "192.168.7.7",
                "0.0.0.0/0",
                "fd00:1::/32",
                "fd00:1::5",
                "10.1.0.77/31",
                "10.1.0",
            ],
            "remoteIpBlocks" | "remote.ip" => &[
                "203.0.113.7",
                "203.0.113.0/24",
                "10.1.0.0/16",
                "10.0.0.0/8",
                "fd00::/16",
                "1.2.3.4",
                "0.0.0.0/0",
                "10.1.0.5",
            ],
            "destination.ip" => match self.rng.random_range(0..6) {
                0 | 1 => return address.to_string(),
                2 => &["10.9.0.0/16"],
                3 => &["fd00:9::/64"],
                4 => &["10.9.0.0/17", "10.9.0.9"],
                _ => &["0.0.0.0/0", "::/0", "10.8.0.0/16"],
            },
            "ports" | "destination.port" => &["80", "8080", "9090", "3306", "9000", "3306", "http", "70000"],
            "connection.sni" => &[
                "web.example.com",
                "api.example.com",
                "web*",
                "*.example.com",
                "*",
                "outbound_.80*",
                "*.org",
            ],
            "hosts" => &[
                "web",
                "Web",
                "web.example.com",
                "web.example.com*",
                "web*",
                "WEB*",
                "*.com",
                "*:8080",
                "*",
                "api.example.com",
                "web.example.com:8080",
                "*.cluster.local",
            ],
            "methods" => &["GET", "GET", "POST", "PUT", "P*", "*T", "*", "get", "OPTIONS", "DELETE"],
            "paths" => &[
                "/a",
                "/a/b",
                "/a*",
                "/a/*",
                "/admin",
                "/admin*",
                "/",
                "*.png",
                "*/b",
                "*b",
                "*",
                "/a/{*}",
                "/{*}",
                "/{*}/b",
                "/a/{**}",
                "/api/{*}/{**}",
                "/{**}/b",
                "/{*}/{*}/{**}",
                "/{**}.png",
                "/store/{**}/cart",
                "/A",
                "/a%2fb",
                "/a/",
                "/b*",
            ],
            "request.headers[X-Role]" | "request.headers[x-role]" => &[
                "admin",
                "user",
                "*",
                "us*",
                "*admin",
                "a b",
                "user,admin",
                "\u{fc}*",
                "A*",
                "*r",
            ],
            "request.headers[authorization]" | "request.headers[x-token]" => &["*"],
            "request.headers[x-sub]" => &["alice", "root", "bob", "*", "al*"],
            "request.auth.audiences" => &["web", "api", "*", "w*", "*i", "other"],
            "request.auth.presenter" => &["frontend", "front*", "*end", "*", "other"],
            "request.auth.claims[groups]" => &["admins", "users", "*", "adm*", "*s", "others"],
            "request.auth.claims[scope]" => &["read", "write", "*", "re*", "*te", "read write"],
            "request.auth.claims[level]" => &["7", "*", "gold", "go*", "*ld"],
            "request.auth.claims[realm][roles]" => &["ops", "dev", "*", "o*", "*v"],
            "request.auth.claims[a.b]" => &["dotted", "*", "dot*", "*ted"],
            _ => &["[x]", "x", "*", "x*", "*x"],
        };
        self.one(pool).to_string()
    }

    fn connection(&mut self, destination: SocketAddr) -> Connection {
        let tls = self.chance(75);
        let peer = tls.then(|| {
            let pool = if self.chance(97) {
                &IDENTITIES[..STRICT_IDENTITIES]
            } else {
                &IDENTITIES[..]
            };
            // The first ones are named by more values.
            let identity = if self.chance(30) { IDENTITIES[0] } else { self.one(pool) };
            identity.iter().map(|s| s.to_string()).collect()
        });
        let source = match destination {
            SocketAddr::V4(_) => self.one(&SOURCES_V4),
            SocketAddr::V6(_) => self.one(&SOURCES_V6),
        };
        let sni = (tls && self.chance(85)).then(|| self.one(&SNIS).to_string());
        Connection {
            peer,
            source: source.parse().unwrap_or(IpAddr::from([0, 0, 0, 0])),
            destination,
            sni,
        }
    }

    fn request(&mut self) -> Request {
        let mut headers: Vec<(String, Vec<u8>)> = Vec::new();
        for _ in 0..self.one(&[0, 1, 1, 1, 2]) {
            let name = self.one(&["x-role", "X-Role", "x-ROLE"]);
            headers.push((name.into(), self.one(&TEAMS).to_vec()));
        }
        for value in self.one(&FORWARDED) {
            headers.push(("X-Forwarded-For".into(), value.as_bytes().to_vec()));
        }
        if self.chance(10) {
            headers.push(("X-Sub".into(), self.one(&["alice", "root"]).as_bytes().to_vec()));
        }
        let method = self.one(&METHODS);
        if method == "OPTIONS" && self.chance(40) {
            headers.push(("Origin".into(), b"https://elsewhere.example".to_vec()));
            headers.push(("Access-Control-Request-Method".into(), b"PUT".to_vec()));
        }
        Request {
            method: method.into(),
            target: self.target().into_bytes(),
            host: self.one(&HOSTS).into(),
            headers,
            tokens: self.tokens(),
        }
    }

    fn target(&mut self) -> String {
        const USUAL: [&str; 16] = [
            "/",
            "/a",
            "/a/b",
            "/a/b/c",
            "/admin",
            "/admin/x",
            "/Admin",
            "/api/v1/x.png",
            "/api/v1/",
            "/store//cart",
            "/store/a/b/cart",
            "/a//b",
            "/a/",
            "/b",
            "/b/a",
            "/x/b",
        ];
        let mut target = if self.chance(55) {
            self.one(&USUAL).to_string()
        } else {
            let mut path = String::new();
            for _ in 0..self.rng.random_range(1..=5) {
                path.push('/');
                let segment = if self.chance(35) {
                    self.one(&ODD)
                } else {
                    self.one(&SEGMENTS)
                };
                path.push_str(segment);
                if self.chance(6) {
                    path.push_str(self.one(&ODD));
                }
            }
            if self.chance(20) {
                path.push('/');
            }
            if self.chance(1) {
                path.push_str("%00");
            }
            path
        };
        if self.chance(20) {
            target.push_str(self.one(&["?", "?x=1", "?/a", "?a=%2f..", "?x=1?y", "?*"]));
        }
        if self.chance(4) {
            target.push_str(self.one(&["#", "#f", "#/b", "#?x"]));
        }
        target
    }
}

/// Fields of a source; whether they exist in HTTP only.
const FROM: &[(&str, bool)] = &[
    ("principals", false),
    ("principals", false),
    ("requestPrincipals", true),
    ("namespaces", false),
    ("serviceAccounts", false),
    ("trustDomains", false),
    ("ipBlocks", false),
    ("remoteIpBlocks", false),
];
/// Fields of an operation.
const TO: &[(&str, bool)] = &[
    ("hosts", true),
    ("methods", true),
    ("paths", true),
    ("paths", true),
    ("ports", false),
];
/// Keys of conditions.
const WHEN: &[(&str, bool)] = &[
    ("request.headers[X-Role]", true),
    ("request.headers[x-role]", true),
    ("request.headers[authorization]", true),
    ("request.headers[x-token]", true),
    ("request.headers[x-sub]", true),
    ("source.ip", false),
    ("remote.ip", false),
    ("source.namespace", false),
    ("source.principal", false),
    ("source.serviceAccount", false),
    ("source.trustDomain", false),
    ("destination.ip", false),
    ("destination.port", false),
    ("connection.sni", false),
    ("request.auth.principal", true),
    ("request.auth.audiences", true),
    ("request.auth.presenter", true),
    ("request.auth.claims[groups]", true),
    ("request.auth.claims[scope]", true),
    ("request.auth.claims[level]", true),
    ("request.auth.claims[realm][roles]", true),
    ("request.auth.claims[a.b]", true),
    ("experimental.envoy.filters.network.test[key]", false),
];
