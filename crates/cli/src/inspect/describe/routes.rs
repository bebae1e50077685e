//! VirtualServices: which of their routes reach a pod, and why others do not.

use mantlet_api::virtual_service::{Destination, HttpMatchRequest, HttpRoute, StringMatch};
use mantlet_api::{Gateway, VirtualService};
use mantlet_translate::destination_rule::expand_host;
use mantlet_translate::virtual_service::{self, MESH_GATEWAY};
use mantlet_translate::world::service::Service;
use mantlet_translate::world::{Config, World};

use super::rules::Rules;
use super::{line, short};

/// VirtualServices that route a service's host for clients in the mesh.
pub(super) fn of_mesh(world: &World, service: &Service, rules: &Rules<'_>, out: &mut String) {
    for config in virtual_service::visible(world, &service.namespace, MESH_GATEWAY) {
        if virtual_service::hosts(world, config).contains(&service.host) {
            describe(world, config, service, rules, out);
        }
    }
}

/// VirtualServices that bring requests of gateways to a service, with the Gateway; several times for several Gateways.
pub(super) fn of_gateways<'a>(world: &'a World, service: &Service) -> Vec<(&'a Config<VirtualService>, Gateway)> {
    let mut out = Vec::new();
    for config in world.virtual_services() {
        if config.broken.is_some() || !reaches(world, config, &service.host) {
            continue;
        }
        for gateway in world.gateways() {
            let name = format!("{}/{}", gateway.meta.namespace, gateway.meta.name);
            if virtual_service::bound_to(config, &name) {
                out.push((&**config, gateway.spec.clone()));
            }
        }
    }
    out
}

fn host_of(world: &World, config: &Config<VirtualService>, destination: &Destination) -> String {
    expand_host(&destination.host, &config.meta.namespace, &world.mesh().domain)
}

fn reaches(world: &World, config: &Config<VirtualService>, host: &str) -> bool {
    let http = config
        .spec
        .http
        .iter()
        .flat_map(|r| &r.route)
        .filter_map(|r| r.destination.as_ref());
    let tls = config
        .spec
        .tls
        .iter()
        .flat_map(|r| &r.route)
        .filter_map(|r| r.destination.as_ref());
    let tcp = config
        .spec
        .tcp
        .iter()
        .flat_map(|r| &r.route)
        .filter_map(|r| r.destination.as_ref());
    http.chain(tls).chain(tcp).any(|d| host_of(world, config, d) == host)
}

/// What of one VirtualService reaches the pod.
pub(super) fn describe(
    world: &World,
    config: &Config<VirtualService>,
    service: &Service,
    rules: &Rules<'_>,
    out: &mut String,
) {
    line(
        out,
        format_args!(
            "VirtualService: {}",
            short(&config.meta.name, &config.meta.namespace, &service.namespace)
        ),
    );
    let mut facts: Vec<String> = Vec::new();
    let mut notes: Vec<String> = Vec::new();
    let mut matches = 0;
    for route in &config.spec.http {
        let (reached, said) = http(world, config, route, service, rules);
        if reached {
            matches += 1;
            facts.extend(said);
        } else {
            notes.extend(said);
        }
    }
    for route in config
        .spec
        .tcp
        .iter()
        .map(|r| &r.route)
        .chain(config.spec.tls.iter().map(|r| &r.route))
    {
        let mut reached = false;
        for destination in route.iter().filter_map(|r| r.destination.as_ref()) {
            match judge(world, config, destination, service, rules) {
                Ok(()) => reached = true,
                Err(why) => notes.push(format!("{why} (TCP)")),
            }
        }
        matches += usize::from(reached);
    }
    for fact in &facts {
        line(out, format_args!("   {fact}"));
    }
    let (http, tcp) = (config.spec.http.len(), config.spec.tcp.len() + config.spec.tls.len());
    if matches == 0 {
        for (count, what) in [(http, "HTTP"), (tcp, "TCP")] {
            if count > 0 {
                line(
                    out,
                    format_args!("   WARNING: No destinations match pod subsets (checked {count} {what} routes)"),
                );
            }
        }
    } else if matches < http + tcp {
        line(
            out,
            format_args!(
                "   {} additional destination(s) that will not reach this pod",
                http + tcp - matches
            ),
        );
        if !facts.is_empty() {
            return;
        }
    } else if facts.is_empty() {
        for (count, what) in [(http, "HTTP"), (tcp, "TCP")] {
            if count > 0 {
                line(out, format_args!("   {count} {what} route(s)"));
            }
        }
        return;
    } else {
        return;
    }
    for note in notes {
        line(out, format_args!("      {note}"));
    }
}

/// Whether a route reaches the pod, with what is to be said about it.
fn http(
    world: &World,
    config: &Config<VirtualService>,
    route: &HttpRoute,
    service: &Service,
    rules: &Rules<'_>,
) -> (bool, Vec<String>) {
    let condition = conditions(&route.r#match);
    if let Some(redirect) = &route.redirect {
        return (
            false,
            vec![format!(
                "Redirect to {}{} for {condition}",
                redirect.authority, redirect.uri
            )],
        );
    }
    if let Some(answer) = &route.direct_response {
        return (
            false,
            vec![format!("Direct response {} for {condition}", answer.status)],
        );
    }
    let mut reached = false;
    let mut facts = Vec::new();
    let mut notes = Vec::new();
    for weighted in &route.route {
        let Some(destination) = &weighted.destination else {
            continue;
        };
        match judge(world, config, destination, service, rules) {
            Ok(()) => {
                reached = true;
                if weighted.weight > 0 && weighted.weight < 100 {
                    facts.push(format!("Weight {}%", weighted.weight));
                }
            }
            // Faults of the configuration are said without the condition.
            Err(why) if why.starts_with("Warning") => notes.push(why),
            Err(why) => notes.push(format!("{why} for {condition}")),
        }
    }
    if !reached {
        return (false, notes);
    }
    if !route.r#match.is_empty() {
        let texts: Vec<String> = route
            .r#match
            .iter()
            .map(|m| format!("Match: {}", condition_text(m)))
            .collect();
        facts.insert(0, texts.join(", "));
    }
    (true, facts)
}

/// Whether a destination is the pod's; otherwise why not.
fn judge(
    world: &World,
    config: &Config<VirtualService>,
    destination: &Destination,
    service: &Service,
    rules: &Rules<'_>,
) -> Result<(), String> {
    if host_of(world, config, destination) != service.host {
        return Err(format!("Route to host {}", destination.host));
    }
    let subset = destination.subset.as_str();
    if subset.is_empty() {
        return Ok(());
    }
    match (rules.subset(subset), rules.name()) {
        (Some(true), _) => Ok(()),
        (Some(false), _) => Err(format!("Route to non-matching subset {subset}")),
        (None, Some(rule)) => Err(format!(
            "Warning: Route to UNKNOWN subset {subset}; check DestinationRule {rule}"
        )),
        (None, None) => Err(format!(
            "Warning: Route to subset {subset} but NO DESTINATION RULE defining subsets!"
        )),
    }
}

fn conditions(matches: &[HttpMatchRequest]) -> String {
    if matches.is_empty() {
        return "(everything)".into();
    }
    matches.iter().map(condition_text).collect::<Vec<_>>().join(", ")
}

fn condition_text(condition: &HttpMatchRequest) -> String {
    let mut parts = Vec::new();
    if let Some(uri) = &condition.uri {
        parts.push(value(uri));
    }
    for (name, text) in [
        ("scheme", &condition.scheme),
        ("method", &condition.method),
        ("authority", &condition.authority),
    ] {
        if let Some(text) = text {
            parts.push(format!("{name}={}", value(text)));
        }
    }
    if condition.port != 0 {
        parts.push(format!("port={}", condition.port));
    }
    for (name, text) in &condition.query_params {
        parts.push(format!("{name}={} in the query", value(text)));
    }
    if !condition.headers.is_empty() {
        let headers: Vec<String> = condition
            .headers
            .iter()
            .map(|(name, text)| format!("{name}={}", value(text)))
            .collect();
        parts.push(format!("when headers are {}", headers.join("; ")));
    }
    if !condition.without_headers.is_empty() {
        let headers: Vec<String> = condition
            .without_headers
            .iter()
            .map(|(name, text)| format!("{name}={}", value(text)))
            .collect();
        parts.push(format!("when headers are not {}", headers.join("; ")));
    }
    if !condition.source_labels.is_empty() {
        let labels: Vec<String> = condition
            .source_labels
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        parts.push(format!("from {}", labels.join(",")));
    }
    if parts.is_empty() {
        "(everything)".into()
    } else {
        parts.join(" ")
    }
}

fn value(text: &StringMatch) -> String {
    match (&text.exact, &text.prefix, &text.regex) {
        (Some(exact), _, _) => exact.clone(),
        (_, Some(prefix), _) => format!("{prefix}*"),
        (_, _, Some(regex)) => format!("regex {regex}"),
        _ => "(present)".into(),
    }
}
