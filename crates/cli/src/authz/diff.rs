//! `mantlet authz diff OLD NEW`: the smallest request that a change newly allows or denies, per workload port.
//!
//! Every request that is printed was decided by the engine of both sides. "No change" is a proof over all classes of requests, or
//! the output says what was not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use mantlet_model::authz::analyse::{self, Finding, Universe, Witness};
use mantlet_model::authz::{Attribute, AuthzFilter, Expr, Matcher, explain};
use mantlet_translate::journey::{Arrival, Server};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::World;
use mantlet_translate::world::workload::Workload;
use serde::Serialize;
use serde_json::{Value, json};

use super::Outcome;
use super::classes::{self, Door, Narrow};
use super::question;
use crate::files::Document;
use crate::inspect::{Output, render};
use crate::world::{self, Loaded};

/// Requests that are shown of one port in one direction.
const MAX_SHOWN: usize = 10;

/// Arguments of `authz diff`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 nothing changes, 1 something does, 2 it could not be decided or read.

Examples:
  # What does my branch change?
  mantlet authz diff main/policies/ branch/policies/

  # The workloads are in files of their own
  mantlet authz diff old.yaml new.yaml --workloads deploy/"
)]
pub struct Args {
    /// Configuration before: a file or directory
    pub old: PathBuf,
    /// Configuration after: a file or directory
    pub new: PathBuf,
    /// Files that belong to both, such as Deployments and Services, repeatable
    #[arg(short, long, value_name = "PATH")]
    pub workloads: Vec<PathBuf>,
    /// Namespace of objects without one
    #[arg(short, long, default_value = world::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// A request that is decided differently.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Difference {
    /// `allowed` or `denied`, now.
    now: &'static str,
    /// The request.
    request: String,
    /// What decided before.
    before: String,
    /// What decides now.
    after: String,
}

/// What was found, and where.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Differences, with the workload ports and doors that have them.
    differences: Vec<(Difference, Vec<String>)>,
    /// What could not be decided.
    undecided: Vec<String>,
    /// Changes that are not about single requests.
    notes: Vec<String>,
    /// Workload ports that were compared.
    ports: usize,
    /// Whether stand-ins were compared because the files have no workloads.
    stand_ins: bool,
}

/// Compares.
///
/// # Errors
/// Files that cannot be read; `main` prints them, with exit code 1 turned into 2 here.
pub fn run(args: &Args) -> Result<Outcome> {
    let report = match compare(args) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("Error: {error:#}");
            return Ok(Outcome {
                text: String::new(),
                code: 2,
            });
        }
    };
    let code = match (report.differences.is_empty(), report.undecided.is_empty()) {
        (false, _) => 1,
        (true, false) => 2,
        (true, true) => 0,
    };
    let text = match args.output {
        Output::Short => print(&report),
        output => render(&report, output)?,
    };
    Ok(Outcome { text, code })
}

fn print(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    for (difference, places) in &report.differences {
        let sign = if difference.now == "allowed" { '+' } else { '-' };
        let _ = writeln!(out, "{sign} now {}: {}", difference.now, difference.request);
        let _ = writeln!(out, "    at      {}", places.join("; "));
        let _ = writeln!(out, "    before  {}", difference.before);
        let _ = writeln!(out, "    after   {}", difference.after);
    }
    for note in &report.notes {
        let _ = writeln!(out, "note: {note}");
    }
    for undecided in &report.undecided {
        let _ = writeln!(out, "undecided: {undecided}");
    }
    if report.stand_ins {
        let _ = writeln!(
            out,
            "The files have no workloads; stand-ins were compared for every selector, alone and two at a time (--workloads adds real ones)."
        );
    }
    let ports = report.ports;
    let all = "all classes of requests were compared";
    let _ = match (report.differences.len(), report.undecided.is_empty()) {
        (0, true) => writeln!(out, "No change: {ports} workload ports, {all}."),
        (0, false) => writeln!(
            out,
            "No change was found in {ports} workload ports, but not everything was decided."
        ),
        (n, true) => writeln!(
            out,
            "{n} differences in {ports} workload ports; {all}, the smallest request of each rule is shown."
        ),
        (n, false) => writeln!(
            out,
            "{n} differences in {ports} workload ports; not everything was decided."
        ),
    };
    out
}

fn compare(args: &Args) -> Result<Report> {
    let common = crate::files::load(&args.workloads)?;
    let mut old = crate::files::load(std::slice::from_ref(&args.old))?;
    let mut new = crate::files::load(std::slice::from_ref(&args.new))?;
    old.extend(common.iter().cloned());
    new.extend(common);
    let stand_ins = stand_ins(&old, &new, &args.namespace);
    let has_stand_ins = !stand_ins.is_empty();
    old.extend(stand_ins.iter().cloned());
    new.extend(stand_ins);
    let old = world::from_documents(&old, &args.namespace);
    let new = world::from_documents(&new, &args.namespace);
    for (side, loaded) in [("old", &old), ("new", &new)] {
        if let Some(problem) = loaded.problems.first() {
            bail!("{side}: {problem}");
        }
    }
    let mut report = Report {
        differences: Vec::new(),
        undecided: Vec::new(),
        notes: Vec::new(),
        ports: 0,
        stand_ins: has_stand_ins,
    };
    if old.mesh() != new.mesh() {
        report.notes.push("the mesh configuration differs".into());
    }
    let mut found: BTreeMap<Difference, Vec<String>> = BTreeMap::new();
    for (namespace, name) in pods(&old).union(&pods(&new)) {
        let place = format!("{namespace}/{name}");
        match (old.pod(namespace, name), new.pod(namespace, name)) {
            (Some(before), Some(after)) => {
                workload(&old, &new, before, after, &place, &mut found, &mut report);
            }
            (Some(_), None) => report.notes.push(format!("workload {place} is gone")),
            (None, Some(_)) => report.notes.push(format!("workload {place} is new")),
            (None, None) => {}
        }
    }
    report.differences = found.into_iter().collect();
    report.notes.sort();
    report.notes.dedup();
    Ok(report)
}

fn pods(world: &World) -> BTreeSet<(String, String)> {
    let namespaces: Vec<&str> = world.namespaces().collect();
    namespaces
        .iter()
        .flat_map(|ns| world.pods(ns))
        .map(|p| (p.namespace.clone(), p.name.clone()))
        .collect()
}

fn workload(
    old: &Loaded,
    new: &Loaded,
    before: &Workload,
    after: &Workload,
    place: &str,
    found: &mut BTreeMap<Difference, Vec<String>>,
    report: &mut Report,
) {
    let servers = (Server::of(old, before), Server::of(new, after));
    if servers.0.has_proxy() != servers.1.has_proxy() {
        let word = if servers.1.has_proxy() { "gets" } else { "loses" };
        report
            .notes
            .push(format!("workload {place} {word} its proxy, and with it all policies"));
        return;
    }
    if !servers.0.has_proxy() {
        return;
    }
    let mut ports = declared(old, before);
    ports.extend(declared(new, after));
    let mut rest = None;
    if !servers.0.gateway {
        // Ports that rules name, and one for all the rest.
        let mut named = BTreeSet::new();
        for server in [&servers.0, &servers.1] {
            if let Some(arrival) = (Door {
                mtls: true,
                tls: false,
                http: false,
            })
            .arrive(server, 1, Protocol::Auto)
            {
                named.extend(named_ports(arrival.filters()));
            }
        }
        for port in named {
            ports.entry(port).or_insert(Protocol::Auto);
        }
        rest = (1..=u16::MAX).rev().find(|p| !ports.contains_key(p));
        ports.extend(rest.map(|p| (p, Protocol::Auto)));
    }
    let host = old
        .services_of_workload(&before.namespace, &before.labels)
        .first()
        .map_or_else(|| before.name.clone(), |s| s.host.clone());
    for (port, protocol) in ports {
        report.ports += 1;
        for door in Door::of(servers.0.gateway, protocol) {
            let at = match rest {
                Some(rest) if rest == port => format!("{place}, other ports ({})", door.name()),
                _ => format!("{place}:{port} ({})", door.name()),
            };
            let sides = (
                door.arrive(&servers.0, port, protocol),
                door.arrive(&servers.1, port, protocol),
            );
            let one = |now: &'static str, finding: Finding| match finding {
                Finding::Never => (Vec::new(), Vec::new()),
                Finding::Request(witness) => (vec![(now, *witness)], Vec::new()),
                Finding::Unknown(why) => (Vec::new(), vec![why]),
            };
            let ((changes, undecided), universe) = match &sides {
                (None, None) => continue,
                (Some(was), None) => {
                    let universe = classes::universe(old, &servers.0, was, port, &host, &Narrow::default());
                    let passed = analyse::find_allowed(classes::policies(was), &universe);
                    (one("denied", passed), universe)
                }
                (None, Some(is)) => {
                    let universe = classes::universe(new, &servers.1, is, port, &host, &Narrow::default());
                    let passes = analyse::find_allowed(classes::policies(is), &universe);
                    (one("allowed", passes), universe)
                }
                (Some(was), Some(is)) => {
                    let mut universe = classes::universe(old, &servers.0, was, port, &host, &Narrow::default());
                    let other = classes::universe(new, &servers.1, is, port, &host, &Narrow::default());
                    if was.http().is_some() != is.http().is_some() {
                        report.notes.push(format!("{at}: the protocol differs"));
                        continue;
                    }
                    common(&mut universe, &other, &at, &mut report.notes);
                    let changed =
                        analyse::differences(classes::policies(was), classes::policies(is), &universe, MAX_SHOWN);
                    if changed.more {
                        report
                            .notes
                            .push(format!("{at}: more than {MAX_SHOWN} rules make a difference"));
                    }
                    let allowed = changed.allowed.into_iter().map(|w| ("allowed", w));
                    let changes: Vec<_> = allowed
                        .chain(changed.denied.into_iter().map(|w| ("denied", w)))
                        .collect();
                    ((changes, changed.undecided), universe)
                }
            };
            report
                .undecided
                .extend(undecided.into_iter().map(|why| format!("{at}: {why}")));
            for (now, witness) in changes {
                let difference = Difference {
                    now,
                    request: classes::request(new, &witness, &universe.base),
                    before: decided(old, sides.0.as_ref(), &witness),
                    after: decided(new, sides.1.as_ref(), &witness),
                };
                found.entry(difference).or_default().push(at.clone());
            }
        }
    }
}

/// Narrows a universe to what both sides take, and notes what only one does.
fn common(universe: &mut Universe, other: &Universe, at: &str, notes: &mut Vec<String>) {
    if universe.peer != other.peer {
        notes.push(format!(
            "{at}: the accepted trust domains differ; identities of both were compared"
        ));
        if let (analyse::Peer::Any(mine), analyse::Peer::Any(theirs)) = (&mut universe.peer, &other.peer) {
            mine.retain(|d| theirs.contains(d));
        }
    }
    if universe.issuers != other.issuers {
        notes.push(format!(
            "{at}: the accepted token issuers differ; tokens that both accept were compared"
        ));
        universe.issuers = match (universe.issuers.take(), &other.issuers) {
            (Some(mine), Some(theirs)) if mine.is_empty() => Some(theirs.clone()),
            (Some(mine), Some(theirs)) if theirs.is_empty() => Some(mine),
            (Some(mine), Some(theirs)) => {
                let both: Vec<String> = mine.into_iter().filter(|i| theirs.contains(i)).collect();
                (!both.is_empty()).then_some(both)
            }
            _ => None,
        };
    }
}

/// Ports that services of a workload declare, or that its gateway listens on.
fn declared(world: &World, pod: &Workload) -> BTreeMap<u16, Protocol> {
    let mut out = BTreeMap::new();
    for service in world.services_of_workload(&pod.namespace, &pod.labels) {
        for port in &service.ports {
            if let Some(number) = mantlet_translate::endpoint::target_port(&port.target, pod) {
                out.entry(number).or_insert(port.protocol);
            }
        }
    }
    out
}

fn named_ports(filters: &[AuthzFilter]) -> BTreeSet<u16> {
    fn walk(expr: &Expr, out: &mut BTreeSet<u16>) {
        match expr {
            Expr::And(parts) | Expr::Or(parts) => parts.iter().for_each(|p| walk(p, out)),
            Expr::Not(inner) => walk(inner, out),
            Expr::Atom(atom) => {
                if let (Attribute::DestinationPort, Matcher::Port(port)) = (&atom.attribute, &atom.matcher)
                    && *port != 0
                {
                    out.insert(*port);
                }
            }
        }
    }
    let mut out = BTreeSet::new();
    filters
        .iter()
        .flat_map(|f| &f.rules)
        .for_each(|r| walk(&r.expr, &mut out));
    out
}

/// What decided on one side, in words.
fn decided(world: &Loaded, arrival: Option<&Arrival<'_>>, witness: &Witness) -> String {
    let Some(arrival) = arrival else {
        return "the connection is refused".into();
    };
    let explanation = explain(arrival.filters(), &witness.sample.connection(), witness.sample.view());
    let rule = explanation.filters.iter().filter(|f| f.enforced).rev().find_map(|f| {
        let action = match f.action {
            mantlet_model::authz::Action::Deny => "DENY",
            mantlet_model::authz::Action::Allow => "ALLOW",
            mantlet_model::authz::Action::Log => return None,
        };
        let id = f.matched.first()?;
        Some(format!(
            "{action} {}",
            question::shown(&question::rule_ref(world, id, action))
        ))
    });
    let passes = analyse::permitted(
        classes::policies(arrival),
        &witness.sample,
        !witness.providers.is_empty(),
    );
    match (rule, explanation.allowed, passes) {
        (_, true, false) => "a CUSTOM policy stops it".into(),
        (Some(rule), true, _) => format!("allowed by {rule}"),
        (None, true, _) => "allowed: no policy is against it".into(),
        (Some(rule), false, _) if rule.starts_with("DENY") => format!("denied by {rule}"),
        (_, false, _) => "denied: no rule of the ALLOW policies matches".into(),
    }
}

/// Pods for every selector and port that policies name, where the files hold no workloads at all: alone, and two at a time
/// where one pod could have the labels of both.
fn stand_ins(old: &[Document], new: &[Document], default_namespace: &str) -> Vec<Document> {
    let kind = |d: &Document| d.value["kind"].as_str().unwrap_or_default().to_string();
    let has_pods = |d: &Document| kind(d) == "Pod" || mantlet_translate::world::object::pod_of(&d.value).is_some();
    if old.iter().chain(new).any(has_pods) {
        return Vec::new();
    }
    let mut namespaces: BTreeSet<String> = BTreeSet::new();
    let mut selectors: BTreeSet<(String, BTreeMap<String, String>)> = BTreeSet::new();
    for document in old.iter().chain(new) {
        let kind = kind(document);
        let namespace = match document.value.pointer("/metadata/namespace").and_then(Value::as_str) {
            Some(namespace) if !namespace.is_empty() => namespace.to_string(),
            _ => default_namespace.to_string(),
        };
        let pointer = match kind.as_str() {
            "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => "/spec/selector/matchLabels",
            "Service" => "/spec/selector",
            _ => continue,
        };
        let labels: BTreeMap<String, String> = document
            .value
            .pointer(pointer)
            .and_then(|l| serde_json::from_value(l.clone()).ok())
            .unwrap_or_default();
        namespaces.insert(namespace.clone());
        selectors.insert((namespace, labels));
    }
    // A policy of the root namespace selects pods of all namespaces.
    let everywhere: Vec<BTreeMap<String, String>> = selectors.iter().map(|(_, labels)| labels.clone()).collect();
    for namespace in &namespaces {
        selectors.insert((namespace.clone(), BTreeMap::new()));
        for labels in &everywhere {
            selectors.insert((namespace.clone(), labels.clone()));
        }
    }
    let single: Vec<_> = selectors.iter().cloned().collect();
    for (index, (namespace, labels)) in single.iter().enumerate() {
        for (other, more) in single.iter().skip(index + 1).take(200) {
            let compatible = more.iter().all(|(k, v)| labels.get(k).is_none_or(|own| own == v));
            if namespace == other && compatible {
                let mut both = labels.clone();
                both.extend(more.clone());
                selectors.insert((namespace.clone(), both));
            }
        }
    }
    selectors
        .into_iter()
        .map(|(namespace, labels)| {
            let name = if labels.is_empty() {
                "any-other-pod".to_string()
            } else {
                let shown: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
                format!("pods with {}", shown.join(","))
            };
            let value = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"containers": []},
            });
            Document {
                file: "(stand-in)".into(),
                line: 1,
                text: std::sync::Arc::from(""),
                value,
            }
        })
        .collect()
}
