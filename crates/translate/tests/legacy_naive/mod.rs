//! The former kinds by their own rules (SEMANTICS 7a, 7b), straight from JSON: slow, literal, and without any of the converter's
//! code. Knows the fixture's services only.

#![allow(unreachable_pub, reason = "a module of one test binary")]

use mantlet_translate::peer_authentication::Mode;
use serde_json::Value;

/// A request, or a connection if it is no HTTP.
#[derive(Clone, Debug)]
pub struct Question {
    pub app: &'static str,
    /// Port of the workload.
    pub port: u16,
    pub http: bool,
    /// Identity without the scheme.
    pub peer: Option<String>,
    pub ip: String,
    pub method: String,
    pub host: String,
    pub path: String,
    /// Header `x-role`.
    pub header: Option<String>,
    /// Claims of a token that is signed rightly.
    pub claims: Option<Value>,
}

pub struct Naive<'a> {
    policies: &'a [Value],
    rbac: &'a [Value],
}

fn list<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    value[key]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// S7.37.
fn glob(pattern: &str, text: &str) -> bool {
    if pattern == "*" {
        true
    } else if let Some(end) = pattern.strip_prefix('*') {
        text.ends_with(end)
    } else if let Some(start) = pattern.strip_suffix('*') {
        text.starts_with(start)
    } else {
        pattern == text
    }
}

fn in_network(network: &str, ip: &str) -> bool {
    let number = |s: &str| s.split('.').fold(0u32, |n, part| n << 8 | part.parse::<u32>().unwrap());
    let (base, bits) = network.split_once('/').unwrap_or((network, "32"));
    let bits: u32 = bits.parse().unwrap();
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    number(base) & mask == number(ip) & mask
}

/// A field and its negation: absent is true.
fn both(object: &Value, yes: &str, no: &str, test: impl Fn(&str) -> bool) -> bool {
    let (yes, no) = (list(object, yes), list(object, no));
    (yes.is_empty() || yes.iter().any(|v| test(v))) && !no.iter().any(|v| test(v))
}

impl<'a> Naive<'a> {
    pub fn new(policies: &'a [Value], rbac: &'a [Value]) -> Naive<'a> {
        Naive { policies, rbac }
    }

    /// S7.4, S7.5. Objects have no creation time here, so the oldest is the first by name.
    fn policy(&self, app: &str, port: Option<u16>) -> Option<&'a Value> {
        let targets = |p: &Value, with_port: bool| {
            p["spec"]["targets"].as_array().into_iter().flatten().any(|t| {
                let ports = t["ports"].as_array().map_or(0, Vec::len);
                // The fixture's port 80 is the workload's 8080.
                t["name"] == app
                    && if with_port {
                        ports > 0 && port == Some(8080)
                    } else {
                        ports == 0
                    }
            })
        };
        let all: Vec<&Value> = self.policies.iter().collect();
        let own: Vec<&Value> = all.iter().filter(|p| p["kind"] == "Policy").copied().collect();
        own.iter()
            .find(|p| targets(p, true))
            .or_else(|| own.iter().find(|p| targets(p, false)))
            .or_else(|| own.iter().find(|p| p["metadata"]["name"] == "default"))
            .or_else(|| all.iter().find(|p| p["kind"] == "MeshPolicy"))
            .copied()
    }

    pub fn mode(&self, app: &str, port: u16) -> Mode {
        let Some(policy) = self.policy(app, Some(port)) else {
            return Mode::Permissive;
        };
        match policy["spec"]["peers"].as_array().into_iter().flatten().next() {
            None => Mode::Disable,
            Some(peer) if peer["mtls"]["mode"] == "PERMISSIVE" => Mode::Permissive,
            Some(_) => Mode::Strict,
        }
    }

    pub fn allows(&self, q: &Question) -> bool {
        let tcp = !q.http;
        (tcp || self.token_is_there(q)) && self.rbac_allows(q)
    }

    fn token_is_there(&self, q: &Question) -> bool {
        let Some(policy) = self.policy(q.app, Some(q.port)) else {
            return true;
        };
        let spec = &policy["spec"];
        if spec["originIsOptional"] == true {
            return true;
        }
        let triggered: Vec<&Value> = spec["origins"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|o| &o["jwt"])
            .filter(|jwt| triggers(jwt, &q.path))
            .collect();
        let issuer = q.claims.as_ref().map(|c| c["iss"].clone());
        triggered.is_empty() || triggered.iter().any(|jwt| issuer.as_ref() == Some(&jwt["issuer"]))
    }

    /// Claims that authorization sees: of a token whose issuer the service knows, on whatever port.
    fn claims<'q>(&self, q: &'q Question) -> Option<&'q Value> {
        let claims = q.claims.as_ref()?;
        let mut policies = vec![self.policy(q.app, None)];
        policies.push(self.policy(q.app, Some(8080)));
        let knows = policies.into_iter().flatten().any(|p| {
            let origins = p["spec"]["origins"].as_array();
            origins
                .into_iter()
                .flatten()
                .any(|o| o["jwt"]["issuer"] == claims["iss"])
        });
        knows.then_some(claims)
    }

    fn rbac_allows(&self, q: &Question) -> bool {
        let Some(config) = self.rbac.iter().find(|o| o["kind"] == "ClusterRbacConfig") else {
            return true;
        };
        let spec = &config["spec"];
        let host = format!("{}.shop.svc.cluster.local", q.app);
        let listed = |target: &Value| {
            list(target, "namespaces").contains(&"shop") || list(target, "services").contains(&host.as_str())
        };
        let on = match spec["mode"].as_str().unwrap() {
            "OFF" => false,
            "ON" => true,
            "ON_WITH_INCLUSION" => listed(&spec["inclusion"]),
            _ => !listed(&spec["exclusion"]),
        };
        if !on || spec["enforcementMode"] == "PERMISSIVE" {
            return true;
        }
        self.rbac
            .iter()
            .filter(|o| o["kind"] == "ServiceRoleBinding" && o["spec"]["mode"] != "PERMISSIVE")
            .any(|binding| {
                let spec = &binding["spec"];
                let rules = match spec.get("actions") {
                    Some(actions) => Some(actions),
                    None => self
                        .rbac
                        .iter()
                        .find(|o| o["kind"] == "ServiceRole" && o["metadata"]["name"] == spec["roleRef"]["name"])
                        .map(|role| &role["spec"]["rules"]),
                };
                let rules: Vec<&Value> = rules.and_then(Value::as_array).into_iter().flatten().collect();
                let subjects = || spec["subjects"].as_array().into_iter().flatten();
                rules.iter().any(|rule| self.rule(rule, q, &host)) && subjects().any(|s| self.subject(s, q))
            })
    }

    fn rule(&self, rule: &Value, q: &Question, host: &str) -> bool {
        // S7.47.
        let http_only = ["hosts", "notHosts", "paths", "notPaths", "methods", "notMethods"]
            .iter()
            .any(|f| !list(rule, f).is_empty())
            || rule["constraints"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|c| c["key"].as_str().unwrap().starts_with("request.headers"));
        if !q.http && http_only {
            return false;
        }
        let ports: Vec<u64> = rule["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_u64)
            .collect();
        list(rule, "services").iter().any(|s| glob(s, host))
            && both(rule, "methods", "notMethods", |v| glob(v, &q.method))
            && both(rule, "paths", "notPaths", |v| glob(v, &q.path))
            && both(rule, "hosts", "notHosts", |v| glob(v, &q.host))
            && (ports.is_empty() || ports.contains(&u64::from(q.port)))
            && rule["constraints"].as_array().into_iter().flatten().all(|c| {
                let values = list(c, "values");
                let any = |text: &str| values.iter().any(|v| glob(v, text));
                match c["key"].as_str().unwrap() {
                    "destination.labels[app]" => values.contains(&q.app),
                    "request.headers[x-role]" => q.header.as_deref().is_some_and(any),
                    "destination.port" => any(&q.port.to_string()),
                    "destination.namespace" => any("shop"),
                    "destination.name" => any(q.app),
                    // The account that the workload runs as.
                    "destination.user" => any(&format!("cluster.local/ns/shop/sa/{}", q.app)),
                    other => panic!("{other}"),
                }
            })
    }

    fn subject(&self, subject: &Value, q: &Question) -> bool {
        let fields = subject.as_object().map_or(0, serde_json::Map::len);
        let claims = self.claims(q).filter(|_| q.http);
        let needs_token = !list(subject, "groups").is_empty()
            || !list(subject, "notGroups").is_empty()
            || subject["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .any(|(k, _)| k.starts_with("request."));
        // S7.44, S7.47.
        if fields == 0 || (!q.http && needs_token) {
            return false;
        }
        let origin = self
            .policy(q.app, None)
            .is_some_and(|p| p["spec"]["principalBinding"] == "USE_ORIGIN");
        // S7.17.
        let principal = if origin {
            claims.map(|c| format!("{}/{}", c["iss"].as_str().unwrap(), c["sub"].as_str().unwrap()))
        } else {
            q.peer.clone()
        };
        // A token's principal is an attribute of HTTP alone.
        let asks_identity = subject["user"].as_str().is_some_and(|u| u != "*")
            || (!list(subject, "names").is_empty() && !list(subject, "names").contains(&"allUsers"))
            || !list(subject, "notNames").is_empty()
            || subject["properties"]["source.principal"]
                .as_str()
                .is_some_and(|p| p != "*");
        if origin && !q.http && asks_identity {
            return false;
        }
        let is = |name: &str| match name {
            "allUsers" => true,
            "allAuthenticatedUsers" => principal.is_some(),
            name => principal.as_deref().is_some_and(|p| glob(name, p)),
        };
        let namespace = q.peer.as_deref().and_then(|p| p.split('/').nth(2));
        let in_namespace = |name: &str| namespace.is_some_and(|n| glob(name, n));
        let group = |name: &str| {
            let groups = claims.and_then(|c| c["groups"].as_array());
            groups
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .any(|g| glob(name, g))
        };
        let user = match subject["user"].as_str() {
            None | Some("*") => true,
            Some(user) => is(user),
        };
        user && both(subject, "names", "notNames", is)
            && both(subject, "namespaces", "notNamespaces", in_namespace)
            && both(subject, "ips", "notIps", |v| in_network(v, &q.ip))
            && both(subject, "groups", "notGroups", group)
            && subject["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .all(|(key, value)| {
                    let value = value.as_str().unwrap();
                    match key.as_str() {
                        "source.principal" => value == "*" || is(value),
                        "source.namespace" => in_namespace(value),
                        "source.ip" => in_network(value, &q.ip),
                        "request.auth.claims[groups]" => group(value),
                        "request.headers[x-role]" => q.header.as_deref().is_some_and(|h| glob(value, h)),
                        // Metadata that no filter has set.
                        _ => false,
                    }
                })
    }
}

/// S7.15.
fn triggers(jwt: &Value, path: &str) -> bool {
    let rules: Vec<&Value> = jwt["triggerRules"].as_array().into_iter().flatten().collect();
    let hit = |m: &Value| {
        m["exact"].as_str().is_some_and(|v| v == path)
            || m["prefix"].as_str().is_some_and(|v| path.starts_with(v))
            || m["suffix"].as_str().is_some_and(|v| path.ends_with(v))
    };
    rules.is_empty()
        || rules.iter().any(|rule| {
            let excluded = rule["excludedPaths"].as_array().into_iter().flatten().any(hit);
            let included: Vec<&Value> = rule["includedPaths"].as_array().into_iter().flatten().collect();
            !excluded && (included.is_empty() || included.into_iter().any(hit))
        })
}
