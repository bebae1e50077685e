//! One question: this caller, this destination, this request. What happens, which policy decides, what would be missing?
//!
//! The chain and its filters come from `translate::journey`, the decision from [`mantlet_model::authz`], the engine that proxies
//! run. Everything here is a function of the world; commands print the answers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mantlet_model::authz::words::{self, RuleId};
use mantlet_model::authz::{
    Action, Attribute, AuthzFilter, Engine, Explanation, Expr, HttpSample, Sample, Verdict, canonical, explain,
};
use mantlet_model::ext_authz::{CustomStage, Then};
use mantlet_model::http::JwtAuthn;
use mantlet_translate::journey::{self, Arrival, Caller, Sends, Server, Wire};
use mantlet_translate::peer_authentication::Mode;
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::service::ServicePort;
use mantlet_translate::world::workload::Workload;
use serde::Serialize;
use serde_json::Value;

use super::target::Destination;
use crate::world::Loaded;

/// What is known of the request; the rest has defaults that the answer names where they matter.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Method; `GET` unless told otherwise.
    pub method: Option<String>,
    /// Path; `/` unless told otherwise.
    pub path: Option<String>,
    /// Host; the service's name unless told otherwise.
    pub host: Option<String>,
    /// Headers.
    pub headers: Vec<(String, String)>,
    /// Payload of the token that the request carries.
    pub claims: Option<Value>,
    /// Server name, where it is not the mesh's.
    pub sni: Option<String>,
    /// The client's address.
    pub source: Option<IpAddr>,
    /// Bytes instead of a request.
    pub tcp: bool,
    /// The client sends plaintext, whatever it would do by itself.
    pub plaintext: bool,
    /// Seconds since the epoch, for the token's times.
    pub now: i64,
}

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Decision {
    /// It reaches the application.
    Allowed,
    /// A policy denies it.
    Denied,
    /// Its token is refused, before any policy.
    Unauthorized,
    /// The connection ends before any policy.
    Reset,
}

/// A rule and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleRef {
    /// `namespace/name` of the policy, or the id of a rule that no policy has.
    pub policy: String,
    /// Index of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// `ALLOW`, `DENY`, `CUSTOM`.
    pub action: &'static str,
    /// File and line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
}

/// The rule that came closest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Nearest {
    /// Which.
    #[serde(flatten)]
    pub rule: RuleRef,
    /// What kept it from matching.
    pub failed: Vec<String>,
}

/// The client's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct From {
    /// Identity that the server verifies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
    /// `mTLS`, `plaintext`, `TLS`.
    pub transport: &'static str,
    /// Why it is not mTLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
}

/// The answer for the pods that behave alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The pods, as `pod.namespace`.
    pub pods: Vec<String>,
    /// Port of the service.
    pub service_port: u16,
    /// Port of the workload, which policies see.
    pub port: u16,
    /// The client's side.
    pub from: From,
    /// How the call ends.
    pub decision: Decision,
    /// The rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<RuleRef>,
    /// In a sentence, where no rule decided.
    pub reason: String,
    /// What the client gets.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub client_sees: String,
    /// For a denial without a matching rule: the rule that came closest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Nearest>,
    /// What else should be known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// All answers: one per port and group of pods that behave alike.
pub fn ask(world: &Loaded, caller: &Caller<'_>, to: &Destination<'_>, request: &Request) -> Vec<Answer> {
    let mut out: Vec<Answer> = Vec::new();
    for port in &to.ports {
        let first = out.len();
        for pod in &to.pods {
            let answer = one(world, caller, to, port, pod, request);
            let same = out[first..].iter_mut().find(|a| {
                let mut copy = answer.clone();
                copy.pods.clone_from(&a.pods);
                copy == **a
            });
            match same {
                Some(known) => known.pods.extend(answer.pods),
                None => out.push(answer),
            }
        }
    }
    out
}

fn one(
    world: &Loaded,
    caller: &Caller<'_>,
    to: &Destination<'_>,
    port: &ServicePort,
    pod: &Workload,
    request: &Request,
) -> Answer {
    let server = Server::of(world, pod);
    let sends = if request.plaintext {
        Sends::Plaintext("as asked".into())
    } else {
        journey::sends(world, caller, &to.service, port, pod)
    };
    let principal = caller.principal(world);
    let (transport, because) = match &sends {
        Sends::Mtls { .. } => ("mTLS", None),
        Sends::Plaintext(why) => ("plaintext", Some(why.clone())),
        Sends::OtherTls(why) => ("TLS", Some(why.clone())),
    };
    let number = server.port(port);
    let mut answer = Answer {
        pods: vec![format!("{}.{}", pod.name, pod.namespace)],
        service_port: port.number,
        port: number.unwrap_or(0),
        from: From {
            principal: principal.clone().filter(|_| transport == "mTLS"),
            transport,
            because,
        },
        decision: Decision::Reset,
        decided_by: None,
        reason: String::new(),
        client_sees: String::new(),
        nearest: None,
        notes: Vec::new(),
    };
    let Some(number) = number else {
        answer.reason = format!("the pod has no port {:?}", port.target);
        return answer;
    };
    if !server.has_proxy() {
        if matches!(sends, Sends::Mtls { .. }) {
            answer.reason = "the client insists on mTLS and the pod has no sidecar".into();
        } else {
            answer.decision = Decision::Allowed;
            answer.reason = "the pod has no sidecar: no policy is enforced there".into();
        }
        return answer;
    }
    let http = !request.tcp && !matches!(port.protocol, Protocol::Tcp | Protocol::Tls);
    let wire = match &sends {
        Sends::Mtls { sni } => Wire::Mtls { sni },
        Sends::OtherTls(_) => Wire::OtherTls,
        Sends::Plaintext(_) => Wire::Plaintext,
    };
    let Some(arrival) = server.arrive(number, port.protocol, &wire, http) else {
        answer.reason = match (server.mode(number), &wire) {
            (Mode::Strict, Wire::Plaintext | Wire::OtherTls) => {
                "the port accepts mTLS of the mesh only (STRICT); the connection ends before any policy is looked at"
                    .into()
            }
            _ if server.gateway => "the gateway has no server for this port and host".into(),
            _ => "no filter chain takes this connection".into(),
        };
        answer.client_sees = "connection reset".into();
        return answer;
    };
    if arrival.mtls && principal.as_deref().is_some_and(|p| !arrival.accepts(p)) {
        answer.reason = "the server does not accept the client's trust domain".into();
        answer.client_sees = "TLS handshake failure".into();
        return answer;
    }
    let mut sample = Sample {
        peer: principal.filter(|_| arrival.mtls).into_iter().collect(),
        source: request
            .source
            .or(caller.address)
            .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        remote: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        destination: SocketAddr::new(pod.ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), number),
        sni: request.sni.clone().or_else(|| match &sends {
            Sends::Mtls { sni } => Some(sni.clone()),
            _ => None,
        }),
        http: arrival.http().map(|_| HttpSample {
            method: request.method.clone().unwrap_or_else(|| "GET".into()),
            host: request.host.clone().unwrap_or_else(|| to.service.host.clone()),
            path: request.path.clone().unwrap_or_else(|| "/".into()),
            headers: request.headers.clone(),
            claims: None,
        }),
    };
    sample.remote = remote(&sample);
    decide(world, &arrival, &mut sample, request, &mut answer);
    assumptions(&arrival, &sample, request, caller, &mut answer);
    answer
}

/// The client's address as sidecars see it: the last entry of `x-forwarded-for`, else the peer (S2.52).
fn remote(sample: &Sample) -> IpAddr {
    let header = sample.http.as_ref().and_then(|h| {
        h.headers
            .iter()
            .rfind(|(name, _)| name == "x-forwarded-for")
            .and_then(|(_, value)| value.rsplit(',').next())
    });
    match header {
        Some(text) => text.trim().parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        None => sample.source,
    }
}

/// CUSTOM, token, policies, in the proxy's order.
fn decide(world: &Loaded, arrival: &Arrival<'_>, sample: &mut Sample, request: &Request, answer: &mut Answer) {
    for stage in arrival.custom() {
        let Some(rule) = applies(stage, sample) else { continue };
        let found = rule_ref(world, &rule, "CUSTOM");
        match &stage.then {
            Then::Deny => {
                answer.decision = Decision::Denied;
                answer.reason = "its provider cannot be asked, so what it matches is denied".into();
                answer.decided_by = Some(found);
                answer.client_sees = seen(sample);
                return;
            }
            Then::Ask(provider) => answer.notes.push(format!(
                "before the policies below, provider {} is asked ({}); it must agree",
                provider.provider,
                shown(&found)
            )),
        }
    }
    if let Some(reason) = token(arrival.jwt(), sample, request, &mut answer.notes) {
        answer.decision = Decision::Unauthorized;
        answer.reason = reason.1;
        answer.client_sees = reason.0;
        return;
    }
    let filters = arrival.filters();
    let explanation = explain(filters, &sample.connection(), sample.view());
    fill(world, filters, &explanation, sample, answer);
}

fn applies(stage: &CustomStage, sample: &Sample) -> Option<String> {
    let selector = [stage.selector()];
    let engine = Engine::new(&selector);
    let decision = engine.decide(&sample.connection(), sample.view());
    (decision.verdict == Verdict::Denied).then(|| decision.rule.unwrap_or_default().to_string())
}

/// Puts verified claims into the sample; status and reason of a refusal.
fn token(
    jwt: Option<&JwtAuthn>,
    sample: &mut Sample,
    request: &Request,
    notes: &mut Vec<String>,
) -> Option<(String, String)> {
    let claims = request.claims.clone()?;
    let Some(http) = &mut sample.http else {
        notes.push("the connection carries no HTTP request, so there is no token".into());
        return None;
    };
    let Some(jwt) = jwt else {
        notes.push(
            "no RequestAuthentication selects the workload: the token is not looked at, and no claim matches".into(),
        );
        return None;
    };
    let refused = |status: u16, body: &str, why: String| Some((format!("{status} {body}"), why));
    let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or_default();
    let provider = jwt.providers.iter().find(|p| p.issuer.is_empty() || p.issuer == issuer);
    let Some(provider) = provider else {
        let known: Vec<&str> = jwt.providers.iter().map(|p| p.issuer.as_str()).collect();
        return refused(
            401,
            "Jwt issuer is not configured",
            format!("the token's issuer is {issuer:?}; accepted are {}", known.join(", ")),
        );
    };
    if let Some(expiry) = claims.get("exp").and_then(Value::as_i64)
        && expiry < request.now
    {
        return refused(401, "Jwt is expired", "the token is expired".into());
    }
    let audiences: Vec<&str> = match claims.get("aud") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !provider.audiences.is_empty() && !audiences.iter().any(|a| provider.audiences.iter().any(|p| p == a)) {
        return refused(
            403,
            "Audiences in Jwt are not allowed",
            format!(
                "the token is for {audiences:?}; accepted are {}",
                provider.audiences.join(", ")
            ),
        );
    }
    notes.push("the token's signature is taken as good".into());
    http.claims = Some(claims);
    None
}

fn fill(world: &Loaded, filters: &[AuthzFilter], explanation: &Explanation, sample: &Sample, answer: &mut Answer) {
    for part in &explanation.filters {
        for id in &part.shadow_matched {
            let action = action_name(part.action);
            let rule = rule_ref(world, id, action);
            answer
                .notes
                .push(format!("dry run: {} matches ({action})", shown(&rule)));
        }
        if part.action == Action::Log {
            for id in &part.matched {
                answer
                    .notes
                    .push(format!("audited by {}", shown(&rule_ref(world, id, "AUDIT"))));
            }
        }
    }
    let enforced = || explanation.filters.iter().filter(|f| f.enforced);
    if explanation.allowed {
        answer.decision = Decision::Allowed;
        let allow = enforced().find(|f| f.action == Action::Allow);
        match allow.and_then(|f| f.matched.first()) {
            Some(id) => answer.decided_by = Some(rule_ref(world, id, "ALLOW")),
            None if enforced().any(|f| f.action == Action::Deny) => {
                answer.reason = "no DENY rule matches, and there is no ALLOW policy".into();
            }
            None => answer.reason = "no policy selects the workload: everything is allowed".into(),
        }
        return;
    }
    answer.decision = Decision::Denied;
    answer.client_sees = seen(sample);
    let Some(last) = explanation.filters.last() else { return };
    if let Some(id) = last.matched.first().filter(|_| last.action == Action::Deny) {
        answer.decided_by = Some(rule_ref(world, id, "DENY"));
        return;
    }
    let ids = filters
        .iter()
        .filter(|f| f.action == Action::Allow && f.enforced)
        .flat_map(|f| &f.rules)
        .map(|r| r.id.as_str());
    let mut policies: Vec<String> = ids.map(policy_name).collect();
    policies.sort();
    policies.dedup();
    answer.reason = match policies.as_slice() {
        [] => "an ALLOW policy is bound, and none of its rules applies to this protocol".into(),
        [one] => format!("no rule of ALLOW policy {one} matches"),
        many => format!("no rule of the ALLOW policies matches ({})", many.join(", ")),
    };
    if let Some(miss) = &last.nearest {
        let expr = filters
            .iter()
            .flat_map(|f| &f.rules)
            .find(|r| r.id == miss.rule)
            .map_or_else(Expr::never, |r| canonical(&r.expr));
        let failed = miss.failed.iter().map(|f| words::failure(&expr, f, sample)).collect();
        answer.nearest = Some(Nearest {
            rule: rule_ref(world, &miss.rule, "ALLOW"),
            failed,
        });
    }
}

/// What a denied client gets.
fn seen(sample: &Sample) -> String {
    match &sample.http {
        None => "the connection is closed".into(),
        Some(http) => {
            let grpc = http
                .headers
                .iter()
                .any(|(n, v)| n == "content-type" && v.starts_with("application/grpc"));
            if grpc {
                "grpc-status 7, RBAC: access denied".into()
            } else {
                "403 RBAC: access denied".into()
            }
        }
    }
}

fn action_name(action: Action) -> &'static str {
    match action {
        Action::Log => "AUDIT",
        Action::Deny => "DENY",
        Action::Allow => "ALLOW",
    }
}

fn policy_name(id: &str) -> String {
    match RuleId::find(id) {
        Some(id) => format!("{}/{}", id.namespace, id.policy),
        None => id.to_string(),
    }
}

/// A rule by its id, with its place in the files.
pub fn rule_ref(world: &Loaded, id: &str, action: &'static str) -> RuleRef {
    let Some(found) = RuleId::find(id) else {
        return RuleRef {
            policy: id.to_string(),
            rule: None,
            action,
            position: None,
        };
    };
    let place = world.place(
        "AuthorizationPolicy",
        found.namespace,
        found.policy,
        &format!("spec.rules[{}]", found.rule),
    );
    RuleRef {
        policy: format!("{}/{}", found.namespace, found.policy),
        rule: Some(found.rule),
        action,
        position: place.map(|p| p.to_string()),
    }
}

/// A rule as text: `ns/name, rule 0 (file:line)`.
pub fn shown(rule: &RuleRef) -> String {
    let mut out = rule.policy.clone();
    if let Some(index) = rule.rule {
        out.push_str(&format!(", rule {index}"));
    }
    if let Some(position) = &rule.position {
        out.push_str(&format!(" ({position})"));
    }
    out
}

/// Says which of the things that rules look at were not given.
fn assumptions(arrival: &Arrival<'_>, sample: &Sample, request: &Request, caller: &Caller<'_>, answer: &mut Answer) {
    let mut used = std::collections::BTreeSet::new();
    let rules = arrival.filters().iter().flat_map(|f| f.rules.iter().chain(&f.shadow));
    for rule in rules.chain(arrival.custom().iter().flat_map(|s| &s.rules)) {
        attributes(&rule.expr, &mut used);
    }
    let mut assumed = Vec::new();
    for attribute in used {
        let given = match &attribute {
            Attribute::Method => request.method.is_some(),
            Attribute::Path => request.path.is_some(),
            Attribute::Host => request.host.is_some(),
            Attribute::SourceIp => request.source.is_some() || caller.address.is_some(),
            Attribute::RemoteIp => {
                request.source.is_some()
                    || caller.address.is_some()
                    || request.headers.iter().any(|(n, _)| n == "x-forwarded-for")
            }
            Attribute::DestinationIp => !sample.destination.ip().is_unspecified(),
            Attribute::Header(name) => request.headers.iter().any(|(n, _)| n == name),
            Attribute::Claim(_) => request.claims.is_some(),
            _ => true,
        };
        if given || (attribute.is_http() && sample.http.is_none()) {
            continue;
        }
        let noun = words::noun(&attribute);
        assumed.push(match (&attribute, sample.shown(&attribute)) {
            (Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp, _) => format!("{noun} unknown"),
            (_, Some(value)) => format!("{noun} {value}"),
            (_, None) => format!("no {}", noun.trim_start_matches("the ")),
        });
    }
    // Claims come one by one; one sentence is enough.
    let claims = assumed.iter().filter(|a| a.starts_with("no claim")).count();
    if claims > 0 {
        assumed.retain(|a| !a.starts_with("no claim"));
        assumed.push("no token".into());
    }
    if !assumed.is_empty() {
        answer.notes.push(format!(
            "policies look at more than was given; assumed: {}",
            assumed.join(", ")
        ));
    }
    if sample.http.is_none() && (request.method.is_some() || request.path.is_some() || !request.headers.is_empty()) {
        answer.notes.push(
            "the port carries bytes to the mesh, no HTTP: method, path and headers are not seen by its policies".into(),
        );
    }
}

fn attributes(expr: &Expr, out: &mut std::collections::BTreeSet<Attribute>) {
    match expr {
        Expr::And(children) | Expr::Or(children) => children.iter().for_each(|c| attributes(c, out)),
        Expr::Not(inner) => attributes(inner, out),
        Expr::Atom(atom) => {
            out.insert(atom.attribute.clone());
        }
    }
}
