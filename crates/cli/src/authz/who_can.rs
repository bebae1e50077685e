//! `mantlet authz who-can reach` and `what-can`: who may call a service, and what an identity may call.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Result, bail};
use mantlet_model::authz::analyse::{self, Finding, Peer, Row};
use mantlet_model::authz::words::RuleId;
use mantlet_translate::journey::{self, Caller, Sends, Server};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::service::ServicePort;
use mantlet_translate::world::workload::Workload;
use serde::Serialize;

use super::classes::{self, Door, Narrow};
use super::target::{self, Destination};
use super::{Outcome, Source};
use crate::inspect::{Output, Table, render};
use crate::world::Loaded;

/// Arguments of `authz who-can`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # Who may call the service, and under which conditions?
  mantlet authz who-can reach default/customers

  # Who may delete there?
  mantlet authz who-can reach default/customers:80 --method DELETE --path /customers/1

  # According to files, before they are applied
  mantlet authz who-can reach default/customers -f policies/ -f deployments/")]
pub struct WhoArgs {
    /// What: `reach`
    #[arg(value_parser = ["reach"])]
    pub verb: String,
    /// The server: NAMESPACE/SERVICE, SERVICE.NAMESPACE or deploy/NAME, with :PORT behind it where it has several
    pub to: String,
    /// What is asked.
    #[command(flatten)]
    pub question: Question,
}

/// Arguments of `authz what-can`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # Every service that the account may call, and under which conditions
  mantlet authz what-can default/sleep

  # What may a client outside of the mesh read?
  mantlet authz what-can plaintext --method GET")]
pub struct WhatArgs {
    /// The client: NAMESPACE/SERVICEACCOUNT, an IP address, or `plaintext`
    pub from: String,
    /// What is asked.
    #[command(flatten)]
    pub question: Question,
}

/// What both ask.
#[derive(Clone, Debug, clap::Args)]
pub struct Question {
    /// Only requests with this method
    #[arg(long)]
    pub method: Option<String>,
    /// Only requests with this path
    #[arg(long)]
    pub path: Option<String>,
    /// Where to look.
    #[command(flatten)]
    pub source: Source,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

impl Question {
    fn narrow(&self) -> Result<Narrow> {
        Ok(Narrow {
            method: self.method.clone(),
            path: self.path.as_deref().map(super::explain::path).transpose()?,
        })
    }
}

/// What somebody may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Access {
    /// `all`, `some`, `none` or `undecided`.
    access: &'static str,
    /// Why nothing, where no rule says so; why it could not be decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    because: Option<String>,
    /// Conditions under which rules allow; any is enough.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allowed_if: Vec<Condition>,
    /// Conditions under which rules deny, or ask a provider.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unless: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Condition {
    rule: String,
    condition: String,
}

/// One class of identities at one door.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Class {
    identities: Vec<String>,
    /// How it comes in.
    via: &'static str,
    #[serde(flatten)]
    access: Access,
}

/// A port of pods that behave alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct PortAnswer {
    service: String,
    service_port: u16,
    port: u16,
    pods: Vec<String>,
    classes: Vec<Class>,
}

fn conditions(list: &[(String, String)]) -> Vec<Condition> {
    list.iter()
        .map(|(id, condition)| {
            let rule = RuleId::find(id).map_or_else(|| id.clone(), |id| id.to_string());
            Condition {
                rule,
                condition: condition.clone(),
            }
        })
        .collect()
}

fn access(row: &Row) -> Access {
    let unknown = [&row.allowed, &row.denied].into_iter().find_map(|f| match f {
        Finding::Unknown(why) => Some(why.clone()),
        _ => None,
    });
    let word = if row.is_never() {
        "none"
    } else if row.is_always() {
        "all"
    } else if matches!(row.allowed, Finding::Request(_)) {
        "some"
    } else {
        "undecided"
    };
    Access {
        access: word,
        because: unknown.filter(|_| word == "undecided"),
        allowed_if: if matches!(word, "some" | "undecided") || (word == "all" && row.default_deny) {
            conditions(&row.allows)
        } else {
            Vec::new()
        },
        unless: if matches!(word, "some" | "undecided") {
            conditions(&row.denies)
        } else {
            Vec::new()
        },
    }
}

fn nothing(because: &str) -> Access {
    Access {
        access: "none",
        because: Some(because.into()),
        allowed_if: Vec::new(),
        unless: Vec::new(),
    }
}

fn everything(because: &str) -> Access {
    Access {
        access: "all",
        ..nothing(because)
    }
}

/// `who-can reach`.
///
/// # Errors
/// Nothing of that name, or a source that cannot be read.
pub fn who(args: &WhoArgs) -> Result<Outcome> {
    let narrow = args.question.narrow()?;
    let (world, namespace) = args.question.source.load()?;
    let to = target::destination(&world, &args.to, &namespace)?;
    if to.pods.is_empty() {
        bail!("{} has no pods; nothing would answer", to.name);
    }
    let answers = who_can(&world, &to, &narrow);
    if args.question.output != Output::Short {
        return render(&answers, args.question.output).map(Outcome::from);
    }
    let mut out = String::new();
    for (index, answer) in answers.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "Who can reach {}:{} (port {} of {}){}\n",
            answer.service,
            answer.service_port,
            answer.port,
            answer.pods.join(", "),
            asked(&narrow)
        );
        let mut table = Table::new(&["IDENTITY", "VIA", "ACCESS", "BY"]);
        for class in &answer.classes {
            lines(&class.identities, class.via, &class.access, &mut table);
        }
        out.push_str(&table.to_string());
    }
    Ok(out.into())
}

fn asked(narrow: &Narrow) -> String {
    match (&narrow.method, &narrow.path) {
        (None, None) => String::new(),
        (Some(method), None) => format!(" with method {method}"),
        (None, Some(path)) => format!(" with path {path}"),
        (Some(method), Some(path)) => format!(" with {method} {path}"),
    }
}

/// Rows of a class: names on the left, conditions on the right.
fn lines(names: &[String], via: &str, access: &Access, table: &mut Table) {
    let mut right: Vec<(String, String)> = Vec::new();
    match access.access {
        "some" | "undecided" => {
            for condition in &access.allowed_if {
                right.push((format!("if {}", condition.condition), condition.rule.clone()));
            }
            if access.allowed_if.is_empty() && access.access == "some" {
                right.push(("all".into(), String::new()));
            }
            for condition in &access.unless {
                let word = if condition.condition == "anything" {
                    "asks"
                } else {
                    "unless"
                };
                right.push((format!("{word} {}", condition.condition), condition.rule.clone()));
            }
            if access.access == "undecided" {
                right.push((
                    format!("undecided: {}", access.because.as_deref().unwrap_or_default()),
                    String::new(),
                ));
            }
        }
        word => {
            let rules: Vec<&str> = access.allowed_if.iter().map(|c| c.rule.as_str()).collect();
            let by = access.because.clone().unwrap_or_else(|| rules.join("; "));
            right.push((word.to_string(), by));
        }
    }
    for index in 0..names.len().max(right.len()) {
        let (what, by) = right.get(index).cloned().unwrap_or_default();
        table.row([
            names.get(index).cloned().unwrap_or_default(),
            if index == 0 { via.to_string() } else { String::new() },
            what,
            by,
        ]);
    }
}

fn who_can(world: &Loaded, to: &Destination<'_>, narrow: &Narrow) -> Vec<PortAnswer> {
    let asked = classes::known(world);
    let mut out: Vec<PortAnswer> = Vec::new();
    for port in &to.ports {
        let first = out.len();
        for pod in &to.pods {
            let server = Server::of(world, pod);
            let Some(number) = server.port(port) else { continue };
            let classes = classes_of(world, &server, to, port, number, narrow, &asked);
            let pod = format!("{}.{}", pod.name, pod.namespace);
            match out[first..]
                .iter_mut()
                .find(|a| a.port == number && a.classes == classes)
            {
                Some(same) => same.pods.push(pod),
                None => out.push(PortAnswer {
                    service: to.name.clone(),
                    service_port: port.number,
                    port: number,
                    pods: vec![pod],
                    classes,
                }),
            }
        }
    }
    out
}

fn classes_of(
    world: &Loaded,
    server: &Server<'_>,
    to: &Destination<'_>,
    port: &ServicePort,
    number: u16,
    narrow: &Narrow,
    asked: &[String],
) -> Vec<Class> {
    if !server.has_proxy() {
        return vec![Class {
            identities: vec!["anybody".into()],
            via: "anything",
            access: everything("the pod has no sidecar: no policy is enforced"),
        }];
    }
    let mut out = Vec::new();
    for door in Door::of(server.gateway, port.protocol) {
        if !door.http && (narrow.method.is_some() || narrow.path.is_some()) {
            continue;
        }
        let Some(arrival) = door.arrive(server, number, port.protocol) else {
            out.push(Class {
                identities: vec![everybody(door)],
                via: door.name(),
                access: nothing("the connection is refused"),
            });
            continue;
        };
        let universe = classes::universe(world, server, &arrival, number, &to.service.host, narrow);
        let (rows, exact) = analyse::who_can(classes::policies(&arrival), &universe, asked);
        for row in rows {
            let mut identities: Vec<String> = row.known.iter().map(|uri| classes::short(world, uri)).collect();
            identities.extend(row.others.iter().map(|o| match o.contains('/') && !o.contains(' ') {
                true => classes::short(world, o),
                false => o.clone(),
            }));
            if !arrival.mtls {
                identities = vec![everybody(door)];
            }
            if identities.is_empty() {
                continue;
            }
            let mut access = access(&row);
            if access.access == "none" && access.because.is_none() && row.allows.is_empty() {
                access.because = Some("no rule allows it".into());
            } else if access.access == "none" && access.because.is_none() {
                let stops: Vec<String> = conditions(&row.denies).into_iter().map(|c| c.rule).collect();
                access.because = Some(if stops.is_empty() {
                    "the rules contradict themselves".into()
                } else {
                    format!("denied by {}", stops.join("; "))
                });
            }
            out.push(Class {
                identities,
                via: door.name(),
                access,
            });
        }
        if !exact {
            out.push(Class {
                identities: vec!["(more identities than were looked at)".into()],
                via: door.name(),
                access: Access {
                    access: "undecided",
                    because: Some("too many tests of identities".into()),
                    allowed_if: Vec::new(),
                    unless: Vec::new(),
                },
            });
        }
    }
    out
}

fn everybody(door: Door) -> String {
    if door.mtls {
        "anybody".into()
    } else {
        "no identity".into()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reach {
    target: String,
    port: u16,
    pods: Vec<String>,
    via: &'static str,
    #[serde(flatten)]
    access: Access,
}

/// `what-can`.
///
/// # Errors
/// No such caller, or a source that cannot be read.
pub fn what(args: &WhatArgs) -> Result<Outcome> {
    let narrow = args.question.narrow()?;
    let (world, namespace) = args.question.source.load()?;
    let caller = target::caller(&world, &args.from, &namespace)?;
    let mut found = what_can(&world, &caller, &narrow);
    found.sort_by_key(|r| (r.access.access == "none", r.target.clone()));
    if args.question.output != Output::Short {
        return render(&found, args.question.output).map(Outcome::from);
    }
    if found.is_empty() {
        return Ok(Outcome::from("There are no services with pods.\n".to_string()));
    }
    let identity = match caller.principal(&world) {
        Some(uri) => format!("{} ({uri})", args.from),
        None => format!("{} (no identity)", args.from),
    };
    let mut table = Table::new(&["TARGET", "VIA", "ACCESS", "BY"]);
    for reach in &found {
        lines(
            std::slice::from_ref(&reach.target),
            reach.via,
            &reach.access,
            &mut table,
        );
    }
    Ok(format!("What {identity} can reach{}\n\n{table}", asked(&narrow)).into())
}

fn what_can(world: &Loaded, caller: &Caller<'_>, narrow: &Narrow) -> Vec<Reach> {
    let mut out: Vec<Reach> = Vec::new();
    // Servers are translated once, whatever number of services they have.
    let mut servers: BTreeMap<(String, String), Server<'_>> = BTreeMap::new();
    for service in world.visible_services(&caller.namespace) {
        let pods = journey::servers(world, service);
        for port in &service.ports {
            let first = out.len();
            for pod in &pods {
                let key = (pod.namespace.clone(), pod.name.clone());
                let server = servers.entry(key).or_insert_with(|| Server::of(world, pod));
                let sends = journey::sends(world, caller, service, port, pod);
                for reach in reaches(world, caller, server, service, port, &sends, narrow) {
                    let same = out[first..].iter_mut().find(|r| {
                        (&r.target, r.port, r.via, &r.access) == (&reach.target, reach.port, reach.via, &reach.access)
                    });
                    match same {
                        Some(same) => same.pods.extend(reach.pods),
                        None => out.push(reach),
                    }
                }
            }
        }
    }
    out
}

fn reaches(
    world: &Loaded,
    caller: &Caller<'_>,
    server: &Server<'_>,
    service: &mantlet_translate::world::service::Service,
    port: &ServicePort,
    sends: &Sends,
    narrow: &Narrow,
) -> Vec<Reach> {
    let pod: &Workload = server.pod;
    let reach = |number: u16, via: &'static str, access: Access| Reach {
        target: format!("{}/{}:{}", service.namespace, service.name, port.number),
        port: number,
        pods: vec![format!("{}.{}", pod.name, pod.namespace)],
        via,
        access,
    };
    let Some(number) = server.port(port) else {
        return Vec::new();
    };
    if !server.has_proxy() {
        return vec![reach(
            number,
            "plaintext",
            everything("the pod has no sidecar: no policy is enforced"),
        )];
    }
    let mut out = Vec::new();
    let mtls = matches!(sends, Sends::Mtls { .. });
    for door in Door::of(false, port.protocol) {
        let narrowed = narrow.method.is_some() || narrow.path.is_some();
        if door.mtls != mtls || (!door.http && (narrowed || port.protocol == Protocol::Auto)) {
            continue;
        }
        if matches!(sends, Sends::OtherTls(_)) {
            out.push(reach(number, "TLS", nothing("the client's TLS is not the mesh's")));
            break;
        }
        let Some(arrival) = door.arrive(server, number, port.protocol) else {
            out.push(reach(
                number,
                door.name(),
                nothing("the connection is refused (STRICT)"),
            ));
            continue;
        };
        let mut universe = classes::universe(world, server, &arrival, number, &service.host, narrow);
        if let Some(address) = caller.address {
            universe.base.source = address;
            universe.fixed.source = true;
        }
        universe.peer = match caller.principal(world).filter(|_| arrival.mtls) {
            Some(uri) => Peer::Is(uri),
            None => Peer::None,
        };
        let (rows, _) = analyse::who_can(classes::policies(&arrival), &universe, &[]);
        for row in &rows {
            let mut access = access(row);
            if access.access == "none" && access.because.is_none() {
                access.because = Some("no rule allows it".into());
            }
            out.push(reach(number, door.name(), access));
        }
    }
    out
}
