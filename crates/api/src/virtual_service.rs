//! `VirtualService` (networking.istio.io): routes for HTTP, TLS and TCP traffic to a host.
//!
//! Types, and the rules of the kind that matter for safety; routing itself is `translate`'s and `model`'s business.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::destination_rule::PortSelector;
use crate::diagnostic::Diagnostic;
use crate::duration::Duration;
use crate::validate;

/// Specification of a VirtualService.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualService {
    /// Hosts whose traffic it routes; `*` or `*.domain` allowed.
    pub hosts: Vec<String>,
    /// Gateways (`namespace/name`) it is bound to; `mesh` for sidecars, the default when empty.
    pub gateways: Vec<String>,
    /// Routes for HTTP, in order.
    pub http: Vec<HttpRoute>,
    /// Routes for TLS that is passed through, in order.
    pub tls: Vec<TlsRoute>,
    /// Routes for other TCP, in order.
    pub tcp: Vec<TcpRoute>,
    /// Namespaces that see it; `.` own, `*` all.
    pub export_to: Vec<String>,
}

/// One HTTP route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRoute {
    /// Its name, for logs.
    pub name: String,
    /// When it applies: any of these; empty always.
    pub r#match: Vec<HttpMatchRequest>,
    /// Where to, by weight.
    pub route: Vec<HttpRouteDestination>,
    /// Answer with a redirect instead.
    pub redirect: Option<HttpRedirect>,
    /// Answer with a fixed response instead.
    pub direct_response: Option<HttpDirectResponse>,
    /// Take the routes of another VirtualService.
    pub delegate: Option<Delegate>,
    /// Change path or host before forwarding.
    pub rewrite: Option<HttpRewrite>,
    /// Time for the whole request; 0 or absent is none.
    pub timeout: Option<Duration>,
    /// Retries.
    pub retries: Option<HttpRetry>,
    /// Injected delays and errors.
    pub fault: Option<HttpFaultInjection>,
    /// Copy requests to this destination.
    pub mirror: Option<Destination>,
    /// Copy requests to these destinations.
    pub mirrors: Vec<HttpMirrorPolicy>,
    /// Share of copied requests (deprecated form).
    #[serde(alias = "mirror_percent")]
    pub mirror_percent: Option<u32>,
    /// Share of copied requests.
    pub mirror_percentage: Option<Percent>,
    /// Cross-origin rules.
    pub cors_policy: Option<CorsPolicy>,
    /// Header changes.
    pub headers: Option<Headers>,
}

/// A condition on HTTP requests; all fields that are set must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMatchRequest {
    /// Its name, for logs.
    pub name: String,
    /// The path.
    pub uri: Option<StringMatch>,
    /// The scheme.
    pub scheme: Option<StringMatch>,
    /// The method.
    pub method: Option<StringMatch>,
    /// The host.
    pub authority: Option<StringMatch>,
    /// Headers; a match without a value asks for presence.
    pub headers: BTreeMap<String, StringMatch>,
    /// The port of the host that is addressed.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, overriding the top-level list.
    pub gateways: Vec<String>,
    /// Query parameters.
    pub query_params: BTreeMap<String, StringMatch>,
    /// Ignore case of the path.
    pub ignore_uri_case: bool,
    /// Headers that must not match.
    pub without_headers: BTreeMap<String, StringMatch>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
    /// Prefix of statistics.
    pub stat_prefix: String,
}

/// How a text is compared. At most one field may be set; none asks for presence.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("maxProperties" = 1))]
pub struct StringMatch {
    /// Equal.
    pub exact: Option<String>,
    /// Begins with.
    pub prefix: Option<String>,
    /// RE2 expression over the whole text.
    pub regex: Option<String>,
}

/// A weighted destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["destination"]))]
pub struct HttpRouteDestination {
    /// Where to.
    pub destination: Option<Destination>,
    /// Its share; with one destination 0 means all.
    pub weight: i32,
    /// Header changes for this destination.
    pub headers: Option<Headers>,
}

/// A service, subset and port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["host"]))]
pub struct Destination {
    /// The service; short names are expanded with the VirtualService's namespace.
    pub host: String,
    /// A subset of its DestinationRule.
    pub subset: String,
    /// The Service's port; needed when it has several.
    pub port: Option<PortSelector>,
}

/// A redirect.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRedirect {
    /// New path.
    pub uri: String,
    /// New host.
    pub authority: String,
    /// New port.
    pub port: Option<u32>,
    /// New port by rule.
    pub derive_port: Option<RedirectPort>,
    /// New scheme.
    pub scheme: String,
    /// Status; 301 by default.
    pub redirect_code: u32,
}

/// How a redirect chooses its port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RedirectPort {
    /// The scheme's default.
    #[default]
    FromProtocolDefault,
    /// The request's.
    FromRequestPort,
}

/// A fixed response.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["status"]))]
pub struct HttpDirectResponse {
    /// Status code.
    pub status: u32,
    /// Body.
    pub body: Option<HttpBody>,
}

/// The body of a fixed response.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpBody {
    /// As text.
    pub string: Option<String>,
    /// As base64.
    pub bytes: Option<String>,
}

/// Another VirtualService whose routes are taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Delegate {
    /// Its name.
    pub name: String,
    /// Its namespace; by default the same.
    pub namespace: String,
}

/// Changes of path or host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRewrite {
    /// New path, or new prefix for prefix matches.
    pub uri: String,
    /// New host.
    pub authority: String,
    /// Path by expression.
    pub uri_regex_rewrite: Option<RegexRewrite>,
}

/// A path change by expression.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RegexRewrite {
    /// RE2 expression.
    pub r#match: String,
    /// Substitution.
    pub rewrite: String,
}

/// Retries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRetry {
    /// How many; 0 turns them off.
    pub attempts: i32,
    /// Time for each try.
    pub per_try_timeout: Option<Duration>,
    /// Conditions, comma-separated.
    pub retry_on: String,
    /// Whether other localities may be tried.
    pub retry_remote_localities: Option<bool>,
    /// Whether endpoints already tried are avoided.
    pub retry_ignore_previous_hosts: Option<bool>,
    /// First pause between tries.
    pub backoff: Option<Duration>,
}

/// Injected faults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpFaultInjection {
    /// Delays.
    pub delay: Option<FaultDelay>,
    /// Errors.
    pub abort: Option<FaultAbort>,
}

/// An injected delay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultDelay {
    /// Share of requests (deprecated form).
    pub percent: i32,
    /// How long.
    pub fixed_delay: Option<Duration>,
    /// Not supported by any implementation.
    pub exponential_delay: Option<Duration>,
    /// Share of requests.
    pub percentage: Option<Percent>,
}

/// An injected error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultAbort {
    /// HTTP status.
    pub http_status: Option<i32>,
    /// gRPC status by name.
    pub grpc_status: Option<String>,
    /// HTTP/2 error; not supported by any implementation.
    pub http2_error: Option<String>,
    /// Share of requests.
    pub percentage: Option<Percent>,
}

/// A percentage, 0 to 100.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Percent {
    /// The number.
    pub value: f64,
}

/// A destination for copies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["destination"]))]
pub struct HttpMirrorPolicy {
    /// Where to.
    pub destination: Option<Destination>,
    /// Share of requests.
    pub percentage: Option<Percent>,
}

/// Cross-origin rules.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CorsPolicy {
    /// Deprecated exact origins.
    pub allow_origin: Vec<String>,
    /// Origins.
    pub allow_origins: Vec<StringMatch>,
    /// Methods.
    pub allow_methods: Vec<String>,
    /// Request headers.
    pub allow_headers: Vec<String>,
    /// Response headers scripts may read.
    pub expose_headers: Vec<String>,
    /// How long a preflight answer is kept.
    pub max_age: Option<Duration>,
    /// Whether credentials may be sent.
    pub allow_credentials: Option<bool>,
    /// What happens to preflights that match no origin.
    pub unmatched_preflights: UnmatchedPreflights,
}

/// What happens to preflights that match no origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum UnmatchedPreflights {
    /// Forward.
    #[default]
    Unspecified,
    /// Forward.
    Forward,
    /// Answer here.
    Ignore,
}

/// Header changes in both directions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Headers {
    /// In requests.
    pub request: Option<HeaderOperations>,
    /// In responses.
    pub response: Option<HeaderOperations>,
}

/// Header changes in one direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderOperations {
    /// Overwrite.
    pub set: BTreeMap<String, String>,
    /// Append.
    pub add: BTreeMap<String, String>,
    /// Remove.
    pub remove: Vec<String>,
}

/// One TLS route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["match"]))]
pub struct TlsRoute {
    /// When it applies: any of these.
    pub r#match: Vec<TlsMatchAttributes>,
    /// Where to.
    pub route: Vec<RouteDestination>,
}

/// A condition on TLS connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["sniHosts"]))]
pub struct TlsMatchAttributes {
    /// Server names.
    pub sni_hosts: Vec<String>,
    /// Destination ranges.
    pub destination_subnets: Vec<String>,
    /// The port.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, overriding the top-level list.
    pub gateways: Vec<String>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
}

/// One TCP route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRoute {
    /// When it applies: any of these; empty always.
    pub r#match: Vec<L4MatchAttributes>,
    /// Where to.
    pub route: Vec<RouteDestination>,
}

/// A condition on TCP connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct L4MatchAttributes {
    /// Destination ranges.
    pub destination_subnets: Vec<String>,
    /// The port.
    pub port: u32,
    /// Client range.
    pub source_subnet: String,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, overriding the top-level list.
    pub gateways: Vec<String>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
}

/// A weighted destination below HTTP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["destination"]))]
pub struct RouteDestination {
    /// Where to.
    pub destination: Option<Destination>,
    /// Its share.
    pub weight: i32,
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &VirtualService, namespace: &str, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let for_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|gateway| gateway == "mesh");
    let is_delegate = spec.hosts.is_empty();
    if is_delegate && !spec.gateways.is_empty() {
        findings.push(Diagnostic::error(
            "spec.gateways",
            "delegate virtual service must have empty gateways",
        ));
    }
    let mut seen = std::collections::BTreeSet::new();
    for (i, host) in spec.hosts.iter().enumerate() {
        let path = format!("spec.hosts[{i}]");
        if host == "*" {
            if for_mesh {
                findings.push(Diagnostic::error(
                    path,
                    "wildcard host * is not allowed for virtual services bound to the mesh gateway",
                ));
            }
        } else if host.parse::<std::net::IpAddr>().is_err() {
            validate::wildcard_host(host, &path, &mut findings);
        }
        if !seen.insert(host) {
            findings.push(Diagnostic::error(
                format!("spec.hosts[{i}]"),
                format!("duplicate hosts in virtual service: {host}"),
            ));
        }
    }
    if spec.http.is_empty() && spec.tcp.is_empty() && spec.tls.is_empty() {
        findings.push(Diagnostic::error(
            "spec",
            "http, tcp or tls must be provided in virtual service",
        ));
    }
    for (i, gateway) in spec.gateways.iter().enumerate() {
        if gateway.split('/').count() > 2 || gateway.split('/').any(|part| !crate::names::is_dns1123_subdomain(part)) {
            findings.push(Diagnostic::error(
                format!("spec.gateways[{i}]"),
                format!("config name {gateway:?} is no gateway name, use <name> or <namespace>/<name>"),
            ));
        }
    }
    validate::export_to(&spec.export_to, namespace, false, &mut findings);
    for (i, route) in spec.http.iter().enumerate() {
        http_route(route, &format!("spec.http[{i}]"), is_delegate, &mut findings);
    }
    for (i, route) in spec.tls.iter().enumerate() {
        let path = format!("spec.tls[{i}]");
        if route.r#match.is_empty() {
            findings.push(Diagnostic::error(
                &path,
                "TLS route must have at least one match condition",
            ));
        }
        for m in &route.r#match {
            if m.sni_hosts.is_empty() {
                findings.push(Diagnostic::error(
                    format!("{path}.match"),
                    "TLS match must have at least one SNI host",
                ));
            }
        }
        l4_route(&route.route, &path, &mut findings);
    }
    for (i, route) in spec.tcp.iter().enumerate() {
        l4_route(&route.route, &format!("spec.tcp[{i}]"), &mut findings);
    }
    findings
}

fn l4_route(route: &[RouteDestination], path: &str, findings: &mut Vec<Diagnostic>) {
    if route.is_empty() {
        findings.push(Diagnostic::error(path, "TCP route is required"));
    }
    for (i, to) in route.iter().enumerate() {
        destination(
            to.destination.as_ref(),
            &format!("{path}.route[{i}].destination"),
            findings,
        );
    }
    weights(route.iter().map(|to| to.weight), path, findings);
}

fn http_route(route: &HttpRoute, path: &str, is_delegate: bool, findings: &mut Vec<Diagnostic>) {
    let error = |findings: &mut Vec<Diagnostic>, field: &str, message: &str| {
        findings.push(Diagnostic::error(format!("{path}{field}"), message));
    };
    let answers = usize::from(route.redirect.is_some()) + usize::from(route.direct_response.is_some());
    if answers > 1 {
        error(
            findings,
            "",
            "HTTP route cannot contain both redirect and direct_response",
        );
    }
    if answers > 0 && !route.route.is_empty() {
        error(
            findings,
            "",
            "HTTP route cannot contain both route and redirect or direct_response",
        );
    }
    if answers > 0 && route.rewrite.is_some() {
        error(
            findings,
            ".rewrite",
            "HTTP route rule cannot contain both rewrite and redirect",
        );
    }
    if route.delegate.is_some() && (answers > 0 || !route.route.is_empty()) {
        error(
            findings,
            ".delegate",
            "delegate HTTP route cannot contain route or redirect",
        );
    }
    if is_delegate && route.delegate.is_some() {
        error(
            findings,
            ".delegate",
            "delegate virtual service cannot delegate further",
        );
    }
    if answers == 0 && route.route.is_empty() && route.delegate.is_none() {
        error(findings, "", "HTTP route, redirect or direct_response is required");
    }
    if let Some(redirect) = &route.redirect
        && redirect.redirect_code != 0
        && ![301, 302, 303, 307, 308].contains(&redirect.redirect_code)
    {
        error(
            findings,
            ".redirect.redirectCode",
            &format!("{} is not a valid redirect code", redirect.redirect_code),
        );
    }
    if let Some(direct) = &route.direct_response
        && !(200..600).contains(&direct.status)
    {
        error(
            findings,
            ".directResponse.status",
            &format!("HTTP status {} must be in range 200 to 599", direct.status),
        );
    }
    for (i, m) in route.r#match.iter().enumerate() {
        for (field, value) in [
            ("uri", &m.uri),
            ("scheme", &m.scheme),
            ("method", &m.method),
            ("authority", &m.authority),
        ] {
            if let Some(value) = value {
                string_match(value, &format!("{path}.match[{i}].{field}"), findings);
            }
        }
        for (name, value) in m.headers.iter().chain(&m.without_headers) {
            let at = format!("{path}.match[{i}].headers[{name}]");
            if !claim_header(name) {
                findings.push(Diagnostic::error(
                    &at,
                    format!(
                        "header {name:?} is no claim: write @request.auth.claims.a.b or @request.auth.claims[a][b]"
                    ),
                ));
            }
            if name.is_empty() {
                findings.push(Diagnostic::error(&at, "header name cannot be empty"));
            }
            string_match(value, &at, findings);
        }
        for (name, value) in &m.query_params {
            string_match(value, &format!("{path}.match[{i}].queryParams[{name}]"), findings);
        }
        if m.port > 65535 {
            findings.push(Diagnostic::error(
                format!("{path}.match[{i}].port"),
                format!("port number {} must be in the range 1..65535", m.port),
            ));
        }
    }
    for (i, to) in route.route.iter().enumerate() {
        destination(
            to.destination.as_ref(),
            &format!("{path}.route[{i}].destination"),
            findings,
        );
    }
    weights(route.route.iter().map(|to| to.weight), path, findings);
    if let Some(retries) = &route.retries {
        if retries.attempts < 0 {
            error(findings, ".retries.attempts", "attempts cannot be negative");
        }
        if retries.attempts == 0 && (retries.per_try_timeout.is_some() || !retries.retry_on.is_empty()) {
            error(
                findings,
                ".retries",
                "http retry policy configured when attempts are set to 0 (disabled)",
            );
        }
    }
    let percents = [
        (
            "fault.delay.percentage",
            route
                .fault
                .as_ref()
                .and_then(|f| f.delay.as_ref())
                .and_then(|d| d.percentage.as_ref()),
        ),
        (
            "fault.abort.percentage",
            route
                .fault
                .as_ref()
                .and_then(|f| f.abort.as_ref())
                .and_then(|a| a.percentage.as_ref()),
        ),
        ("mirrorPercentage", route.mirror_percentage.as_ref()),
    ];
    for (field, percent) in percents {
        if percent.is_some_and(|p| !(0.0..=100.0).contains(&p.value)) {
            error(findings, &format!(".{field}"), "percentage is not in range 0..100");
        }
    }
}

fn destination(destination: Option<&Destination>, path: &str, findings: &mut Vec<Diagnostic>) {
    let Some(destination) = destination else {
        findings.push(Diagnostic::error(path, "destination is required"));
        return;
    };
    if destination.host == "*" {
        findings.push(Diagnostic::error(format!("{path}.host"), "invalid destination host *"));
    } else {
        validate::wildcard_host(&destination.host, &format!("{path}.host"), findings);
    }
    if !destination.subset.is_empty() && !crate::names::is_dns1123_label(&destination.subset) {
        findings.push(Diagnostic::error(
            format!("{path}.subset"),
            format!("subset name is invalid: {:?}", destination.subset),
        ));
    }
    if let Some(port) = &destination.port
        && !(1..=65535).contains(&port.number)
    {
        findings.push(Diagnostic::error(
            format!("{path}.port"),
            format!("port number {} must be in the range 1..65535", port.number),
        ));
    }
}

fn weights(weights: impl Iterator<Item = i32>, path: &str, findings: &mut Vec<Diagnostic>) {
    let weights: Vec<i32> = weights.collect();
    if weights.iter().any(|w| *w < 0) {
        findings.push(Diagnostic::error(
            format!("{path}.route"),
            "weight must be non-negative",
        ));
    } else if weights.len() > 1 && weights.iter().map(|w| i64::from(*w)).sum::<i64>() == 0 {
        findings.push(Diagnostic::error(
            format!("{path}.route"),
            "total destination weight = 0",
        ));
    }
}

fn string_match(value: &StringMatch, path: &str, findings: &mut Vec<Diagnostic>) {
    let set = [&value.exact, &value.prefix, &value.regex]
        .iter()
        .filter(|v| v.is_some())
        .count();
    if set > 1 {
        findings.push(Diagnostic::error(path, "only one of exact, prefix, regex can be set"));
    }
    if let Some(pattern) = &value.regex
        && let Err(e) = regex::Regex::new(pattern)
    {
        let reason = e.to_string();
        let last = reason.lines().last().unwrap_or_default();
        findings.push(Diagnostic::error(
            path,
            format!("{pattern:?} is not a valid RE2 regex: {last}"),
        ));
    }
}

/// False for a header name that looks like a claim (`@request.auth…`) and has neither of the two forms that name one (S8.58).
fn claim_header(name: &str) -> bool {
    const PREFIX: &str = "@request.auth.claims";
    if !name.starts_with('@') {
        return true;
    }
    let Some(rest) = name
        .get(..PREFIX.len())
        .filter(|p| p.eq_ignore_ascii_case(PREFIX))
        .map(|_| &name[PREFIX.len()..])
    else {
        return false;
    };
    let dotted = rest
        .strip_prefix('.')
        .is_some_and(|rest| !rest.contains(['[', ']']) && rest.split('.').all(|part| !part.is_empty()));
    let bracketed = rest
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|rest| {
            rest.split("][")
                .all(|part| !part.is_empty() && !part.contains(['[', ']']))
        });
    dotted || bracketed
}
