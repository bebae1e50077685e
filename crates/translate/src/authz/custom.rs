//! CUSTOM policies → stages, and `extensionProviders` → how to ask them (SEMANTICS 2k).
//!
//! Whatever keeps a provider from being asked (unknown, invalid, its service missing, several providers on one workload
//! without the switch that allows them) makes requests denied that match the rules, also with `failOpen` (S2.144).

use mantlet_api::AuthorizationPolicy;
use mantlet_api::authorization_policy::Action as ApiAction;
use mantlet_api::mesh_config::{ExtAuthzGrpc, ExtAuthzHttp, RequestBody};
use mantlet_model::authz::Rule;
use mantlet_model::ext_authz::{
    BAD_SUFFIX, BodyInCheck, CheckProtocol, CustomStage, ExtAuthz, HeaderPattern, HttpCheck, Then,
};
use mantlet_model::names::ClusterName;

use super::{Form, Problem, Target, bound, translate};
use crate::world::{Config, World};

/// Time for an answer when a provider names none (S2.149).
const DEFAULT_TIMEOUT_MS: u64 = 600_000;
/// Status numbers that Envoy knows by name (`envoy.type.v3.StatusCode`), which `statusOnError` may be (S2.151).
const STATUSES: &[u16] = &[
    100, 200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402, 403,
    404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 421, 422, 423, 424, 426, 428, 429, 431, 500,
    501, 502, 503, 504, 505, 506, 507, 508, 510, 511,
];

/// The CUSTOM stages of a workload, in the order of provider names (S2.143).
pub fn custom(world: &World, target: Target<'_>, form: Form) -> Vec<CustomStage> {
    let policies: Vec<_> = bound(world, target).filter(|p| is_custom(p)).collect();
    let mut providers: Vec<&str> = policies.iter().map(|p| provider_of(p)).collect();
    providers.sort_unstable();
    providers.dedup();
    let too_many = providers.len() > 1 && !world.mesh().multiple_custom_providers;

    let mut out = Vec::new();
    for provider in providers {
        let mut rules = Vec::new();
        let mut trial = Vec::new();
        for policy in policies.iter().filter(|p| provider_of(p) == provider) {
            let translated = translate(world, policy, form, &mut Vec::new());
            if translated.shadow {
                trial.extend(translated.rules);
            } else {
                rules.extend(translated.rules);
            }
        }
        // Trial runs of CUSTOM policies are no such thing: what matches is denied (S2.136).
        push(&mut out, trial, Then::Deny);
        let asked = if too_many {
            Err(String::new())
        } else {
            resolve(world, provider, form)
        };
        match asked {
            Ok(Some(settings)) => push(&mut out, rules, Then::Ask(Box::new(settings))),
            // Providers over HTTP have no say about bytes (S2.146).
            Ok(None) => {}
            Err(_) => {
                for rule in &mut rules {
                    rule.id.push_str(BAD_SUFFIX);
                }
                push(&mut out, rules, Then::Deny);
            }
        }
    }
    out
}

fn push(out: &mut Vec<CustomStage>, rules: Vec<Rule>, then: Then) {
    if !rules.is_empty() {
        out.push(CustomStage { rules, then });
    }
}

fn is_custom(policy: &Config<AuthorizationPolicy>) -> bool {
    policy.broken.is_none() && policy.spec.action == ApiAction::Custom
}

pub(super) fn provider_of(policy: &Config<AuthorizationPolicy>) -> &str {
    policy.spec.provider.as_ref().map_or("", |p| p.name.as_str())
}

/// What keeps the provider of a CUSTOM policy from being asked, for the policy's status.
pub(super) fn provider_problems(world: &World, policy: &Config<AuthorizationPolicy>, problems: &mut Vec<Problem>) {
    let name = provider_of(policy);
    let mut problem = |reason: String| {
        problems.push(Problem {
            rule: None,
            message: format!("{reason}; requests that match its rules are denied"),
        });
    };
    if let Err(reason) = resolve(world, name, Form::Http) {
        problem(reason);
    }
    if world.mesh().multiple_custom_providers {
        return;
    }
    if let Some(other) = rival(world, policy) {
        let (namespace, other_name) = (&other.meta.namespace, &other.meta.name);
        problem(format!(
            "provider {name:?}: policy {other_name}.{namespace} names provider {:?} for a workload of this policy; set PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS=true in istiod, or use one provider per workload",
            provider_of(other)
        ));
    }
}

/// A policy that binds a pod which this one binds too, with another provider.
fn rival<'a>(world: &'a World, policy: &Config<AuthorizationPolicy>) -> Option<&'a Config<AuthorizationPolicy>> {
    let name = provider_of(policy);
    // Nearly every mesh has one provider: nothing to look for then.
    let one = world
        .namespaces()
        .flat_map(|n| world.authorization_policies(n))
        .all(|p| !is_custom(p) || provider_of(p) == name);
    if one {
        return None;
    }
    let own = policy.meta.namespace.as_str();
    let everywhere = own == world.mesh().root_namespace;
    let namespaces: Vec<&str> = world.namespaces().filter(|n| everywhere || *n == own).collect();
    for namespace in namespaces {
        for pod in world.pods(namespace) {
            let target = Target {
                namespace,
                labels: &pod.labels,
                gateway: pod.labels.contains_key(super::GATEWAY_NAME_LABEL),
            };
            let mut mine = false;
            let mut other = None;
            for found in bound(world, target).filter(|p| is_custom(p)) {
                if found.meta.name == policy.meta.name && found.meta.namespace == policy.meta.namespace {
                    mine = true;
                } else if provider_of(found) != name {
                    other = Some(found);
                }
            }
            if mine && other.is_some() {
                return other;
            }
        }
    }
    None
}

/// How a provider is asked; `None` when it has no say on this kind of chain.
fn resolve(world: &World, name: &str, form: Form) -> Result<Option<ExtAuthz>, String> {
    if name.is_empty() {
        return Err("the policy names no provider".into());
    }
    let mut found = world.mesh().providers.iter().filter(|p| p.name == name);
    let Some(provider) = found.next() else {
        let known: Vec<&str> = world
            .mesh()
            .providers
            .iter()
            .filter(|p| p.envoy_ext_authz_http.is_some() || p.envoy_ext_authz_grpc.is_some())
            .map(|p| p.name.as_str())
            .collect();
        return Err(format!(
            "provider {name:?} is not in meshConfig.extensionProviders (there are: {})",
            if known.is_empty() {
                "none".to_string()
            } else {
                known.join(", ")
            }
        ));
    };
    let in_provider = |reason: String| format!("provider {name:?}: {reason}");
    if found.next().is_some() {
        return Err(in_provider("the name is used twice in extensionProviders".into()));
    }
    if !is_label(name) {
        return Err(in_provider(
            "the name must be 1 to 63 lower-case letters, digits and `-`, the latter not at its ends".into(),
        ));
    }
    match (&provider.envoy_ext_authz_http, &provider.envoy_ext_authz_grpc) {
        (Some(http), None) => {
            // Its settings count on every chain: an invalid one denies on TCP too (S2.144).
            let settings = http_provider(world, name, http).map_err(in_provider)?;
            Ok((form == Form::Http).then_some(settings))
        }
        (None, Some(grpc)) => {
            let mut settings = grpc_provider(world, name, grpc).map_err(in_provider)?;
            if form == Form::Tcp {
                settings.body = None;
                settings.status_on_error = None;
            }
            Ok(Some(settings))
        }
        (Some(_), Some(_)) => Err(in_provider("only one kind can be set".into())),
        (None, None) => Err(in_provider(
            "is no external authorizer; set envoyExtAuthzHttp or envoyExtAuthzGrpc".into(),
        )),
    }
}

fn is_label(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn http_provider(world: &World, name: &str, from: &ExtAuthzHttp) -> Result<ExtAuthz, String> {
    let (host, cluster) = cluster(world, &from.service, from.port)?;
    if !from.path_prefix.is_empty()
        && (!from.path_prefix.starts_with('/') || from.path_prefix.bytes().any(|b| b <= b' ' || b >= 0x7f))
    {
        return Err(format!(
            "pathPrefix must begin with `/` and have no spaces, found: {:?}",
            from.path_prefix
        ));
    }
    let shown = if from.include_request_headers_in_check.is_empty() {
        // The old name counts only when the new one is not used (S2.154).
        &from.include_headers_in_check
    } else {
        &from.include_request_headers_in_check
    };
    let mut add_headers: Vec<(String, String)> = Vec::new();
    for (header, value) in &from.include_additional_headers_in_check {
        if !is_token(header) || value.bytes().any(|b| b < b' ' && b != b'\t' || b == 0x7f) {
            return Err(format!("includeAdditionalHeadersInCheck: {header:?} is no header"));
        }
        add_headers.push((header.clone(), value.clone()));
    }
    Ok(ExtAuthz {
        provider: name.to_string(),
        cluster,
        protocol: CheckProtocol::Http(HttpCheck {
            host,
            path_prefix: from.path_prefix.clone(),
            request_headers: patterns("includeRequestHeadersInCheck", shown)?,
            add_headers,
            upstream_headers: patterns("headersToUpstreamOnAllow", &from.headers_to_upstream_on_allow)?,
            deny_headers: patterns("headersToDownstreamOnDeny", &from.headers_to_downstream_on_deny)?,
            allow_headers: patterns("headersToDownstreamOnAllow", &from.headers_to_downstream_on_allow)?,
        }),
        timeout_ms: timeout(from.timeout),
        fail_open: from.fail_open,
        status_on_error: status(&from.status_on_error)?,
        body: body(from.include_request_body_in_check.as_ref())?,
    })
}

fn grpc_provider(world: &World, name: &str, from: &ExtAuthzGrpc) -> Result<ExtAuthz, String> {
    let (_, cluster) = cluster(world, &from.service, from.port)?;
    Ok(ExtAuthz {
        provider: name.to_string(),
        // `|` cannot stand in an authority.
        protocol: CheckProtocol::Grpc {
            authority: cluster.replace('|', "_."),
        },
        cluster,
        timeout_ms: timeout(from.timeout),
        fail_open: from.fail_open,
        status_on_error: status(&from.status_on_error)?,
        body: body(from.include_request_body_in_check.as_ref())?,
    })
}

fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn timeout(from: Option<mantlet_api::Duration>) -> u64 {
    from.map_or(DEFAULT_TIMEOUT_MS, |d| {
        u64::try_from(d.0.as_millis()).unwrap_or(DEFAULT_TIMEOUT_MS)
    })
}

fn status(text: &str) -> Result<Option<u16>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<u16>() {
        Ok(code) if STATUSES.contains(&code) => Ok(Some(code)),
        _ => Err(format!("statusOnError {text:?} is no known HTTP status number")),
    }
}

fn body(from: Option<&RequestBody>) -> Result<Option<BodyInCheck>, String> {
    match from {
        None => Ok(None),
        Some(body) if body.max_request_bytes == 0 => {
            Err("includeRequestBodyInCheck.maxRequestBytes must be greater than 0".into())
        }
        Some(body) => Ok(Some(BodyInCheck {
            max_bytes: body.max_request_bytes,
            allow_partial: body.allow_partial_message,
            as_bytes: body.pack_as_bytes,
        })),
    }
}

fn patterns(field: &str, list: &[String]) -> Result<Vec<HeaderPattern>, String> {
    list.iter()
        .map(|text| match text.as_str() {
            "" => Err(format!("{field}: empty name")),
            "*" => Err(format!(
                "{field}: a single wildcard (\"*\") is not supported, change it to either prefix or suffix match"
            )),
            text => Ok(HeaderPattern::parse(text)),
        })
        .collect()
}

/// Host and cluster of `[namespace/]host` (S2.148).
fn cluster(world: &World, service: &str, port: u32) -> Result<(String, String), String> {
    let port = u16::try_from(port)
        .ok()
        .filter(|p| *p != 0)
        .ok_or_else(|| format!("port must be in the range [1, 65535], found: {port}"))?;
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    let host = host.to_ascii_lowercase();
    let all = world.services_of_host(&host);
    let mut fitting = all.iter().filter(|s| namespace.is_none_or(|n| s.namespace == n));
    let Some(found) = fitting.next() else {
        return Err(format!("could not find service {service} in Istio service registry"));
    };
    let mut namespaces: Vec<&str> = std::iter::once(found)
        .chain(fitting)
        .map(|s| s.namespace.as_str())
        .collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    if namespaces.len() > 1 {
        return Err(format!(
            "found {host} in several namespaces ({}), specify the namespace explicitly in the format of <Namespace>/<Hostname>",
            namespaces.join(", ")
        ));
    }
    if found.port(port).is_none() {
        return Err(format!("service {service} has no port {port}"));
    }
    let name = ClusterName::outbound(port, "", &host).to_string();
    Ok((host, name))
}
