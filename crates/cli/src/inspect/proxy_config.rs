//! `istioctl proxy-config`: what one proxy holds, in istioctl's columns.

use anyhow::{Context, Result};
use kube::Client;
use mantlet_model::cluster::{Cluster, Discovery};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::http::RouteSource;
use mantlet_model::listener::{FilterChain, Filters, Listener, Transport};
use mantlet_model::names::{ClusterName, Direction};
use mantlet_model::query::ConfigDump;
use mantlet_model::route::{PathMatch, RouteAction, RouteTable};

use super::{Output, Table, render, target};

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Clusters.
    #[value(alias = "clusters", alias = "c")]
    Cluster,
    /// Listeners.
    #[value(alias = "listeners", alias = "l")]
    Listener,
    /// Routes.
    #[value(alias = "routes", alias = "r")]
    Route,
    /// Endpoints.
    #[value(alias = "endpoints", alias = "ep")]
    Endpoint,
    /// Certificates and trust bundles.
    #[value(alias = "secrets", alias = "s")]
    Secret,
    /// Everything.
    All,
}

/// Arguments of `proxy-config`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to show.
    #[arg(value_enum)]
    pub what: What,
    /// `pod[.namespace]`, `deploy/<name>` or `svc/<name>`.
    pub target: String,
    /// Namespace.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// Only clusters of this host.
    #[arg(long)]
    pub fqdn: Option<String>,
    /// Only this port.
    #[arg(long)]
    pub port: Option<u16>,
    /// Only this direction (`inbound`, `outbound`).
    #[arg(long)]
    pub direction: Option<String>,
    /// Only endpoints of this cluster.
    #[arg(long)]
    pub cluster: Option<String>,
    /// Only the route table or cluster of this name.
    #[arg(long)]
    pub name: Option<String>,
}

/// Asks the proxy and returns the printed answer.
///
/// # Errors
/// The pod does not exist, has no proxy, or does not answer.
pub async fn run(client: &Client, default_namespace: &str, args: &Args) -> Result<String> {
    let namespace = args.namespace.as_deref().unwrap_or(default_namespace);
    let pod = target::pod(client, namespace, &args.target).await?;
    let answer = target::ask_proxy(client, &pod, "config_dump").await?;
    let dump: ConfigDump = serde_json::from_slice(&answer).context("reading the proxy's configuration dump")?;
    show(&dump, args)
}

fn show(dump: &ConfigDump, args: &Args) -> Result<String> {
    let snapshot = &dump.snapshot;
    if args.output != Output::Short {
        return match args.what {
            What::Cluster => render(&snapshot.clusters, args.output),
            What::Listener => render(&snapshot.listeners, args.output),
            What::Route => render(&snapshot.routes, args.output),
            What::Endpoint => render(&snapshot.endpoints, args.output),
            What::Secret => render(&dump.secrets, args.output),
            What::All => render(dump, args.output),
        };
    }
    Ok(match args.what {
        What::Cluster => clusters(dump, args).to_string(),
        What::Listener => listeners(dump, args).to_string(),
        What::Route => routes(dump, args).to_string(),
        What::Endpoint => endpoints(dump, args).to_string(),
        What::Secret => secrets(dump).to_string(),
        What::All => [
            clusters(dump, args),
            listeners(dump, args),
            routes(dump, args),
            endpoints(dump, args),
            secrets(dump),
        ]
        .map(|table| table.to_string())
        .join("\n"),
    })
}

fn clusters(dump: &ConfigDump, args: &Args) -> Table {
    let mut table = Table::new(&[
        "SERVICE FQDN",
        "PORT",
        "SUBSET",
        "DIRECTION",
        "TYPE",
        "DESTINATION RULE",
    ]);
    for cluster in dump.snapshot.clusters.values() {
        let kind = discovery(cluster);
        match ClusterName::parse(&cluster.name) {
            Some(name) => {
                let direction = direction(name.direction);
                if args.fqdn.as_deref().is_some_and(|f| f != name.host)
                    || args.port.is_some_and(|p| p != name.port)
                    || args.direction.as_deref().is_some_and(|d| d != direction)
                {
                    continue;
                }
                let subset = if name.subset.is_empty() { "-" } else { name.subset };
                table.row([name.host, &name.port.to_string(), subset, direction, kind, ""]);
            }
            None if args.port.is_none() && args.direction.is_none() && args.fqdn.is_none() => {
                table.row([cluster.name.as_str(), "-", "-", "-", kind, ""]);
            }
            None => {}
        }
    }
    table.sort();
    table
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

fn discovery(cluster: &Cluster) -> &'static str {
    match cluster.discovery {
        Discovery::Eds { .. } => "EDS",
        Discovery::Static(_) => "STATIC",
        Discovery::Dns(_) => "STRICT_DNS",
        Discovery::OriginalDestination { .. } => "ORIGINAL_DST",
    }
}

fn listeners(dump: &ConfigDump, args: &Args) -> Table {
    let mut table = Table::new(&["ADDRESSES", "PORT", "MATCH", "DESTINATION"]);
    let mut all: Vec<&Listener> = dump.snapshot.listeners.values().map(|l| &**l).collect();
    all.sort_by_key(|l| (l.address.port(), l.address.ip()));
    for listener in all {
        if args.port.is_some_and(|p| p != listener.address.port()) {
            continue;
        }
        for chain in listener.all_chains() {
            table.row([
                listener.address.ip().to_string(),
                listener.address.port().to_string(),
                chain_match(chain),
                destination(chain),
            ]);
        }
    }
    table
}

fn chain_match(chain: &FilterChain) -> String {
    let m = &chain.matches;
    let mut parts = Vec::new();
    if !m.server_names.is_empty() {
        parts.push(format!("SNI: {}", m.server_names.join(",")));
    }
    match m.transport {
        Some(Transport::Tls) => parts.push("Trans: tls".into()),
        Some(Transport::Raw) => parts.push("Trans: raw_buffer".into()),
        None => {}
    }
    if !m.application_protocols.is_empty() {
        parts.push(format!("App: {}", m.application_protocols.join(",")));
    }
    if !m.destination_ranges.is_empty() {
        let ranges: Vec<String> = m.destination_ranges.iter().map(ToString::to_string).collect();
        parts.push(format!("Addr: {}", ranges.join(",")));
    }
    if let Some(port) = m.destination_port {
        parts.push(format!("Addr: *:{port}"));
    }
    if parts.is_empty() {
        "ALL".into()
    } else {
        parts.join("; ")
    }
}

fn destination(chain: &FilterChain) -> String {
    match &chain.filters {
        Filters::Tcp(tcp) => format!("Cluster: {}", tcp.cluster),
        Filters::Http(http) => match &http.routes {
            RouteSource::Named(name) => format!("Route: {name}"),
            RouteSource::Inline(table) => match single_cluster(table) {
                Some(cluster) => format!("Cluster: {cluster}"),
                None => format!("Inline Route: {}", table.name),
            },
        },
    }
}

/// The cluster that a whole table forwards to, if it is one.
fn single_cluster(table: &RouteTable) -> Option<&str> {
    let [host] = table.hosts.as_slice() else { return None };
    let [route] = host.routes.as_slice() else { return None };
    match &route.action {
        RouteAction::Forward(forward) => match forward.clusters.as_slice() {
            [(cluster, _)] => Some(cluster),
            _ => None,
        },
        _ => None,
    }
}

fn routes(dump: &ConfigDump, args: &Args) -> Table {
    let mut table = Table::new(&["NAME", "VHOST NAME", "DOMAINS", "MATCH", "VIRTUAL SERVICE"]);
    let inline = dump
        .snapshot
        .listeners
        .values()
        .flat_map(|l| l.all_chains())
        .filter_map(|chain| match &chain.filters {
            Filters::Http(http) => match &http.routes {
                RouteSource::Inline(table) => Some(&**table),
                RouteSource::Named(_) => None,
            },
            Filters::Tcp(_) => None,
        });
    for routes in dump.snapshot.routes.values().map(|t| &**t).chain(inline) {
        if args.name.as_deref().is_some_and(|n| n != routes.name) {
            continue;
        }
        for host in &routes.hosts {
            let domains = match host.domains.as_slice() {
                [] => "-".to_string(),
                [one] => one.clone(),
                [a, b] => format!("{a}, {b}"),
                [a, b, rest @ ..] => format!("{a}, {b} + {} more...", rest.len()),
            };
            for route in &host.routes {
                let path = match &route.matches.path {
                    PathMatch::Prefix(p) | PathMatch::SegmentPrefix(p) => format!("{p}*"),
                    PathMatch::Exact(p) => p.clone(),
                    PathMatch::Regex(r) => format!("regex {r}"),
                };
                table.row([routes.name.as_str(), &host.name, &domains, &path, ""]);
            }
        }
    }
    table.sort();
    table
}

fn endpoints(dump: &ConfigDump, args: &Args) -> Table {
    let mut table = Table::new(&["ENDPOINT", "STATUS", "OUTLIER CHECK", "CLUSTER"]);
    let mut add = |cluster: &str, endpoint: &Endpoint| {
        if args.cluster.as_deref().is_some_and(|c| c != cluster) || args.port.is_some_and(|p| p != endpoint.port) {
            return;
        }
        let status = match endpoint.health {
            Health::Healthy => "HEALTHY",
            Health::Unhealthy => "UNHEALTHY",
            Health::Draining => "DRAINING",
        };
        table.row([
            &format!("{}:{}", endpoint.address, endpoint.port),
            status,
            "OK",
            cluster,
        ]);
    };
    for group in dump.snapshot.endpoints.values() {
        for endpoint in &group.endpoints {
            add(&group.cluster, endpoint);
        }
    }
    for cluster in dump.snapshot.clusters.values() {
        if let Discovery::Static(list) | Discovery::Dns(list) = &cluster.discovery {
            for endpoint in list {
                add(&cluster.name, endpoint);
            }
        }
    }
    table.sort();
    table
}

fn secrets(dump: &ConfigDump) -> Table {
    let mut table = Table::new(&[
        "RESOURCE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    for secret in &dump.secrets {
        table.row([
            secret.name.as_str(),
            &secret.kind,
            &secret.state,
            if secret.valid { "true" } else { "false" },
            &secret.serial,
            &secret.not_after,
            &secret.not_before,
        ]);
    }
    table
}
