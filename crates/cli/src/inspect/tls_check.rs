//! `istioctl authn tls-check POD [SERVICE]`: for each service, what its servers ask for and what this client does (S7.81).
//!
//! Istio had the command until 1.5. It answers from today's objects, and from the former ones by what they were converted to, with the
//! functions that configure proxies.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use kube::ResourceExt;
use mantlet_api::destination_rule::ClientTlsMode;
use mantlet_translate::destination_rule::{self, Client};
use mantlet_translate::endpoint::target_port;
use mantlet_translate::peer_authentication::{self, Mode};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::World;
use mantlet_translate::world::service::{Service, ServicePort};
use mantlet_translate::world::workload::Workload;

use super::{Mesh, Table, target};

/// Arguments of `authn`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Check whether a pod's TLS settings fit those of the services that it may call
    TlsCheck {
        /// The client: `pod[.namespace]` or `deploy/<name>`
        pod: String,
        /// Only this service, by host
        service: Option<String>,
        /// Namespace
        #[arg(short, long)]
        namespace: Option<String>,
    },
}

/// Asks, and returns the table.
///
/// # Errors
/// There is no such pod or service, or the API server refuses a read.
pub async fn run(mesh: &Mesh, args: &Args) -> Result<String> {
    let Command::TlsCheck {
        pod,
        service,
        namespace,
    } = &args.command;
    let namespace = namespace.as_deref().unwrap_or(&mesh.namespace);
    let pod = target::pod(&mesh.client, namespace, pod).await?;
    let world = crate::world::from_cluster(mesh).await?;
    let namespace = pod.namespace().unwrap_or_default();
    let Some(client) = world.pod(&namespace, &pod.name_any()).cloned() else {
        bail!(
            "pod {} of namespace {namespace} takes no part in the mesh",
            pod.name_any()
        );
    };
    table(&world, &client, service.as_deref()).map(|t| t.to_string())
}

fn table(world: &World, client: &Workload, only: Option<&str>) -> Result<Table> {
    let mut out = Table::new(&[
        "HOST:PORT",
        "STATUS",
        "SERVER",
        "CLIENT",
        "AUTHN POLICY",
        "DESTINATION RULE",
    ]);
    let mut found = false;
    for service in world.visible_services(&client.namespace) {
        if only.is_some_and(|only| only != service.host) {
            continue;
        }
        found = true;
        for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp) {
            out.row(row(world, client, service, port));
        }
    }
    match only {
        Some(host) if !found => bail!(
            "there is no service {host:?}; services are named as SERVICE.NAMESPACE.svc.{}",
            world.mesh().domain
        ),
        _ => {}
    }
    out.sort();
    Ok(out)
}

/// What a server asks for, by which policy, and whether it can speak mutual TLS.
struct Server {
    mode: Mode,
    policy: String,
    mtls: bool,
}

fn servers(world: &World, service: &Service, port: &ServicePort) -> Vec<Server> {
    let pods: Vec<_> = if service.selector.is_empty() {
        Vec::new()
    } else {
        world
            .pods(&service.namespace)
            .filter(|pod| mantlet_api::selector::subset(&service.selector, &pod.labels))
            .collect()
    };
    pods.into_iter()
        .map(|pod| {
            let number = target_port(&port.target, pod).unwrap_or(port.number);
            let policy = peer_authentication::deciding(world, &pod.namespace, &pod.labels);
            Server {
                // Who runs no proxy asks for nothing.
                mode: if pod.mtls {
                    peer_authentication::effective(world, &pod.namespace, &pod.labels).port(number)
                } else {
                    Mode::Disable
                },
                policy: policy.filter(|_| pod.mtls).map_or_else(
                    || "-".to_string(),
                    |policy| match &policy.meta.origin {
                        Some(origin) => format!("{}/{}", origin.namespace, origin.name),
                        None => format!("{}/{}", policy.meta.namespace, policy.meta.name),
                    },
                ),
                mtls: pod.mtls,
            }
        })
        .collect()
}

fn row(world: &World, client: &Workload, service: &Service, port: &ServicePort) -> [String; 6] {
    let who = Client {
        namespace: &client.namespace,
        labels: &client.labels,
    };
    let applied = destination_rule::applied(world, who, service);
    let tls = applied.as_ref().and_then(|a| a.settings(port.number, None).tls);
    let servers = servers(world, service, port);
    let does = |server: &Server| match tls {
        Some(tls) => tls.mode,
        None if server.mtls && client.mtls && server.mode != Mode::Disable && world.mesh().auto_mtls => {
            ClientTlsMode::IstioMutual
        }
        None => ClientTlsMode::Disable,
    };
    let fits = |server: &Server| match (server.mode, does(server)) {
        (Mode::Strict, mode) => mode == ClientTlsMode::IstioMutual,
        (Mode::Disable, mode) => mode != ClientTlsMode::IstioMutual,
        (Mode::Permissive, _) => true,
    };
    let joined = |texts: BTreeSet<String>| match texts.len() {
        0 => "-".to_string(),
        _ => texts.into_iter().collect::<Vec<_>>().join(","),
    };
    let status = if servers.is_empty() {
        "-"
    } else if servers.iter().all(fits) {
        "OK"
    } else {
        "CONFLICT"
    };
    [
        format!("{}:{}", service.host, port.number),
        status.to_string(),
        joined(servers.iter().map(|s| server_text(s.mode).to_string()).collect()),
        joined(servers.iter().map(|s| client_text(does(s)).to_string()).collect()),
        joined(servers.iter().map(|s| s.policy.clone()).collect()),
        tls.and_then(|_| rule(world, client, service))
            .unwrap_or_else(|| "-".into()),
    ]
}

/// The rule that is applied, by name: of the client's namespace, the service's or the root's, the most exact one.
fn rule(world: &World, client: &Workload, service: &Service) -> Option<String> {
    let mesh = world.mesh();
    [
        client.namespace.as_str(),
        service.namespace.as_str(),
        mesh.root_namespace.as_str(),
    ]
    .into_iter()
    .find_map(|namespace| {
        let rules = world.destination_rules(namespace).iter();
        let scored = rules.filter(|r| r.broken.is_none()).filter_map(|r| {
            let visible =
                namespace == client.namespace || destination_rule::export(world, r).visible_to(&client.namespace);
            let host = destination_rule::expand_host(&r.spec.host, namespace, &mesh.domain);
            let score = destination_rule::specificity(&host, &service.host)?;
            visible.then_some((score, r))
        });
        // The oldest of the best; lists are sorted oldest first, and of equals `max_by_key` takes the last.
        let best = scored
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .max_by_key(|(score, _)| *score);
        best.map(|(_, r)| format!("{}/{}", r.meta.namespace, r.meta.name))
    })
}

fn server_text(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

fn client_text(mode: ClientTlsMode) -> &'static str {
    match mode {
        ClientTlsMode::Disable => "DISABLE",
        ClientTlsMode::Simple => "SIMPLE",
        ClientTlsMode::Mutual => "MUTUAL",
        ClientTlsMode::IstioMutual => "ISTIO_MUTUAL",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, mtls: bool) -> Value {
        let mut labels = json!({ "app": name });
        if mtls {
            labels["security.istio.io/tlsMode"] = json!("istio");
        }
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "a", "labels": labels},
            "spec": {"containers": []}})
    }

    fn service(name: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "a"},
            "spec": {"clusterIP": "10.0.0.1", "selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}})
    }

    fn check(more: &[Value]) -> String {
        let mut objects = vec![
            pod("web", true),
            pod("old", false),
            pod("client", true),
            service("web"),
            service("old"),
        ];
        objects.extend(more.iter().cloned());
        let mut world = World::default();
        for object in &objects {
            world.set_object(object).expect("readable");
        }
        let client = world.pod("a", "client").expect("there").clone();
        table(&world, &client, None).expect("services").to_string()
    }

    fn rows(text: &str) -> Vec<Vec<&str>> {
        text.lines().skip(1).map(|l| l.split_whitespace().collect()).collect()
    }

    #[test]
    fn what_servers_ask_for_and_clients_do() {
        let mesh = json!({"apiVersion": "authentication.istio.io/v1alpha1", "kind": "MeshPolicy",
            "metadata": {"name": "default"}, "spec": {"peers": [{"mtls": {}}]}});
        let text = check(std::slice::from_ref(&mesh));
        assert_eq!(
            rows(&text),
            [
                vec!["old.a.svc.cluster.local:80", "OK", "DISABLE", "DISABLE", "-", "-"],
                vec![
                    "web.a.svc.cluster.local:80",
                    "OK",
                    "STRICT",
                    "ISTIO_MUTUAL",
                    "/default",
                    "-"
                ],
            ]
        );
        let rule = |host: &str, mode: &str| {
            json!({"apiVersion": "networking.istio.io/v1alpha3", "kind": "DestinationRule",
                "metadata": {"name": "d", "namespace": "a"}, "spec": {"host": host, "trafficPolicy": {"tls": {"mode": mode}}}})
        };
        let text = check(&[mesh, rule("*.local", "ISTIO_MUTUAL")]);
        assert_eq!(
            rows(&text),
            [
                vec![
                    "old.a.svc.cluster.local:80",
                    "CONFLICT",
                    "DISABLE",
                    "ISTIO_MUTUAL",
                    "-",
                    "a/d"
                ],
                vec![
                    "web.a.svc.cluster.local:80",
                    "OK",
                    "STRICT",
                    "ISTIO_MUTUAL",
                    "/default",
                    "a/d"
                ],
            ]
        );
        let text = check(&[rule("web", "DISABLE")]);
        assert_eq!(rows(&text)[1][1..], ["OK", "PERMISSIVE", "DISABLE", "-", "a/d"]);
    }
}
