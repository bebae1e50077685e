//! Asks the cluster and the proxies: pods, metrics of the receiving side, addresses of plaintext callers.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, ListParams, LogParams};
use kube::{Client, ResourceExt};
use mantlet_translate::inject::{IGNORED_NAMESPACES, PROXY_CONTAINER};

use super::readiness::{Facts, Flow, PodFacts};
use crate::inspect::target;

/// Proxies asked at a time.
const PARALLEL: usize = 8;
/// Lines of a proxy's log that are looked at.
const LOG_LINES: i64 = 5000;
/// Largest part of a proxy's log that is taken, bytes.
const LOG_BYTES: i64 = 4 << 20;
/// Ports of the proxy itself, to which probes are moved.
const PROXY_PORTS: [u16; 3] = [15020, 15021, 15090];

/// Source, destination, service, port and unit of a flow.
type FlowKey = (String, String, String, Option<u16>, &'static str);

/// Everything that the conclusions need.
pub async fn facts(client: &Client, istio_namespace: &str) -> Result<Facts> {
    let world = crate::world::from_client(client, istio_namespace).await?;
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await?;
    let mut facts = Facts {
        world,
        ..Facts::default()
    };
    let mut asked = Vec::new();
    for pod in pods {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if phase != Some("Running") || pod.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let known = pod_facts(&pod, istio_namespace);
        if known.meshed && !known.system {
            asked.push(pod.clone());
        }
        facts
            .pods
            .insert((pod.namespace().unwrap_or_default(), pod.name_any()), known);
    }
    let answers: Vec<(Pod, Result<Vec<u8>>)> = futures::stream::iter(asked)
        .map(|pod| async move {
            let stats = target::ask_proxy(client, &pod, "/stats/prometheus").await;
            (pod, stats)
        })
        .buffer_unordered(PARALLEL)
        .collect()
        .await;
    let by_ip: BTreeMap<String, Peer> = facts
        .pods
        .iter()
        .filter(|(_, p)| !p.ip.is_empty())
        .map(|((namespace, name), p)| {
            let workload = facts.world.pod(namespace, name);
            let peer = Peer {
                pod: format!("pod {namespace}/{name}"),
                workload: workload.map(|w| format!("{}/{}", w.namespace, w.telemetry.name)),
            };
            (p.ip.clone(), peer)
        })
        .collect();
    let mut flows: BTreeMap<FlowKey, (u64, u64)> = BTreeMap::new();
    for (pod, stats) in answers {
        let full = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
        let stats = match stats {
            Ok(stats) => stats,
            Err(error) => {
                facts.silent.push(format!("{full}: {error:#}"));
                continue;
            }
        };
        let own = facts
            .world
            .pod(&pod.namespace().unwrap_or_default(), &pod.name_any())
            .map_or_else(|| full.clone(), |w| format!("{}/{}", w.namespace, w.telemetry.name));
        let mut counted = metrics(&String::from_utf8_lossy(&stats), &own);
        if counted.iter().any(|f| f.plaintext > 0 && f.source == "unknown") {
            let callers = callers(client, &pod).await;
            counted = with_addresses(counted, &callers, &by_ip);
        }
        for flow in counted {
            let key = (flow.source, flow.destination, flow.service, flow.port, flow.unit);
            let sums = flows.entry(key).or_default();
            sums.0 += flow.plaintext;
            sums.1 += flow.mutual;
        }
    }
    facts.flows = flows
        .into_iter()
        .map(
            |((source, destination, service, port, unit), (plaintext, mutual))| Flow {
                source,
                destination,
                service,
                port,
                plaintext,
                mutual,
                unit,
            },
        )
        .collect();
    facts.silent.sort();
    Ok(facts)
}

fn pod_facts(pod: &Pod, istio_namespace: &str) -> PodFacts {
    let namespace = pod.namespace().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let all = || {
        spec.into_iter()
            .flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()))
    };
    let applications = || {
        spec.into_iter()
            .flat_map(|s| &s.containers)
            .filter(|c| c.name != PROXY_CONTAINER)
    };
    PodFacts {
        meshed: all().any(|c| c.name == PROXY_CONTAINER),
        ip: pod.status.as_ref().and_then(|s| s.pod_ip.clone()).unwrap_or_default(),
        ports: applications()
            .flat_map(|c| c.ports.iter().flatten())
            .filter(|p| p.protocol.as_deref().unwrap_or("TCP") == "TCP")
            .filter_map(|p| u16::try_from(p.container_port).ok())
            .collect(),
        probes: applications()
            .flat_map(probed)
            .filter(|p| !PROXY_PORTS.contains(p))
            .collect(),
        system: namespace == istio_namespace || IGNORED_NAMESPACES.contains(&namespace.as_str()),
    }
}

/// Ports that the kubelet probes by HTTP or gRPC; a TCP probe only connects, which STRICT lets it.
fn probed(container: &Container) -> Vec<u16> {
    let number = |port: &IntOrString| match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|p| p.name.as_ref() == Some(name))
            .and_then(|p| u16::try_from(p.container_port).ok()),
    };
    let port = |probe: &Probe| {
        let plain_http = probe
            .http_get
            .as_ref()
            .filter(|h| h.scheme.as_deref().is_none_or(|s| s == "HTTP"));
        plain_http
            .and_then(|h| number(&h.port))
            .or_else(|| probe.grpc.as_ref().and_then(|g| u16::try_from(g.port).ok()))
    };
    [
        &container.readiness_probe,
        &container.liveness_probe,
        &container.startup_probe,
    ]
    .into_iter()
    .flatten()
    .filter_map(port)
    .collect()
}

/// The flows that a proxy counted as their receiver.
pub(super) fn metrics(text: &str, destination: &str) -> Vec<Flow> {
    let mut out: BTreeMap<(String, String, &'static str), (u64, u64)> = BTreeMap::new();
    for line in text.lines() {
        let unit = if line.starts_with("istio_requests_total{") {
            "requests"
        } else if line.starts_with("istio_tcp_connections_opened_total{") {
            "connections"
        } else {
            continue;
        };
        let Some((labels, value)) = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')) else {
            continue;
        };
        let labels = parse_labels(labels);
        let label = |name: &str| labels.get(name).map(String::as_str).unwrap_or_default();
        if label("reporter") != "destination" {
            continue;
        }
        // Counters are written as floats by some versions.
        let Some(value) = value.split_whitespace().next().and_then(|v| v.parse::<f64>().ok()) else {
            continue;
        };
        let value = if value.is_finite() && value > 0.0 {
            value as u64
        } else {
            0
        };
        let source = match (label("source_workload_namespace"), label("source_workload")) {
            (_, "unknown" | "") => "unknown".to_string(),
            (namespace, workload) => format!("{namespace}/{workload}"),
        };
        let service = match label("destination_service") {
            "unknown" => "",
            host => host,
        };
        let sums = out.entry((source, service.to_string(), unit)).or_default();
        match label("connection_security_policy") {
            "none" => sums.0 += value,
            "mutual_tls" => sums.1 += value,
            _ => {}
        }
    }
    out.into_iter()
        .map(|((source, service, unit), (plaintext, mutual))| Flow {
            source,
            destination: destination.to_string(),
            service,
            port: None,
            plaintext,
            mutual,
            unit,
        })
        .collect()
}

/// Labels of the text format: `name="value"` with `\"`, `\\` and `\n` escaped.
fn parse_labels(text: &str) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut rest = text;
    while let Some((name, tail)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut chars = tail.char_indices();
        let mut end = tail.len();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c)) => value.push(c),
                    None => break,
                },
                '"' => {
                    end = at + 1;
                    break;
                }
                c => value.push(c),
            }
        }
        out.insert(name.trim_start_matches([',', ' ']).to_string(), value);
        rest = tail.get(end..).unwrap_or_default();
    }
    out
}

/// The pod behind an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pod: String,
    /// `namespace/workload`, as flows name it.
    workload: Option<String>,
}

/// A plaintext caller.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub(super) struct Caller {
    ip: String,
    port: u16,
}

/// Addresses of plaintext callers: from the proxy itself, or from its access log where it does not know (Envoy).
async fn callers(client: &Client, pod: &Pod) -> BTreeSet<Caller> {
    #[derive(serde::Deserialize)]
    struct Answer {
        callers: Vec<Caller>,
    }
    if let Ok(answer) = target::ask_proxy(client, pod, "/mantlet/plaintext").await
        && let Ok(answer) = serde_json::from_slice::<Answer>(&answer)
    {
        return answer
            .callers
            .into_iter()
            .filter(|c| !PROXY_PORTS.contains(&c.port))
            .collect();
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let params = LogParams {
        container: Some(PROXY_CONTAINER.into()),
        tail_lines: Some(LOG_LINES),
        limit_bytes: Some(LOG_BYTES),
        ..LogParams::default()
    };
    match pods.logs(&pod.name_any(), &params).await {
        Ok(text) => text.lines().filter_map(caller).collect(),
        Err(_) => BTreeSet::new(),
    }
}

/// The caller of a line about an inbound request without a server name: mutual TLS of the mesh always has one.
pub(super) fn caller(line: &str) -> Option<Caller> {
    let (cluster, remote, name) = if line.starts_with('{') {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        let text = |key: &str| {
            value
                .get(key)
                .and_then(serde_json::Value::as_str)
                .unwrap_or("-")
                .to_string()
        };
        (
            text("upstream_cluster"),
            text("downstream_remote_address"),
            text("requested_server_name"),
        )
    } else {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let at = fields.iter().rposition(|f| f.starts_with("inbound|"))?;
        let field = |offset: usize| fields.get(at + offset).copied().unwrap_or("-").to_string();
        // UPSTREAM_CLUSTER UPSTREAM_LOCAL_ADDRESS DOWNSTREAM_LOCAL_ADDRESS DOWNSTREAM_REMOTE_ADDRESS REQUESTED_SERVER_NAME
        (field(0), field(3), field(4))
    };
    let port = cluster.strip_prefix("inbound|")?.split('|').next()?.parse().ok()?;
    let (ip, _) = remote.rsplit_once(':')?;
    let plaintext = matches!(name.as_str(), "-" | "");
    (plaintext && !ip.is_empty()).then(|| Caller {
        ip: ip.trim_matches(['[', ']']).to_string(),
        port,
    })
}

/// Replaces "unknown" by the addresses that are known. Metrics count the callers without name together, so the addresses share one line.
pub(super) fn with_addresses(
    flows: Vec<Flow>,
    callers: &BTreeSet<Caller>,
    by_ip: &BTreeMap<String, Peer>,
) -> Vec<Flow> {
    // Callers with a sidecar say who they are in HTTP; those have lines of their own.
    let named: BTreeSet<&str> = flows
        .iter()
        .filter(|f| f.plaintext > 0)
        .map(|f| f.source.as_str())
        .collect();
    let unnamed: Vec<&Caller> = callers
        .iter()
        .filter(|c| {
            let workload = by_ip.get(&c.ip).and_then(|p| p.workload.as_deref());
            workload.is_none_or(|workload| !named.contains(workload))
        })
        .collect();
    let names: BTreeSet<String> = unnamed
        .iter()
        .map(|c| match by_ip.get(&c.ip) {
            Some(peer) => format!("{} ({})", peer.pod, c.ip),
            None => format!("address {}", c.ip),
        })
        .collect();
    let ports: BTreeSet<u16> = unnamed.iter().map(|c| c.port).collect();
    let port = match ports.iter().collect::<Vec<_>>().as_slice() {
        [port] => Some(**port),
        _ => None,
    };
    flows
        .into_iter()
        .map(|mut flow| {
            if flow.source == "unknown" && flow.plaintext > 0 && !names.is_empty() {
                flow.source = names.iter().cloned().collect::<Vec<_>>().join(", ");
                if flow.mutual == 0 {
                    flow.port = port;
                }
            }
            flow
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_the_receiving_side() {
        let text = "\
# TYPE istio_requests_total counter
istio_requests_total{reporter=\"destination\",source_workload=\"sleep\",source_workload_namespace=\"default\",destination_service=\"c.default.svc.cluster.local\",response_code=\"200\",connection_security_policy=\"mutual_tls\"} 3
istio_requests_total{reporter=\"destination\",source_workload=\"sleep\",source_workload_namespace=\"default\",destination_service=\"c.default.svc.cluster.local\",response_code=\"404\",connection_security_policy=\"mutual_tls\"} 2
istio_requests_total{reporter=\"destination\",source_workload=\"unknown\",source_workload_namespace=\"unknown\",destination_service=\"c.default.svc.cluster.local\",user=\"a\\\"b}c,x=\",connection_security_policy=\"none\"} 7
istio_requests_total{reporter=\"source\",source_workload=\"c\",source_workload_namespace=\"default\",connection_security_policy=\"unknown\"} 9
istio_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"unknown\",source_workload_namespace=\"unknown\",destination_service=\"unknown\",connection_security_policy=\"none\"} 1
other_total{reporter=\"destination\"} 5
";
        let flows = metrics(text, "default/c");
        let shown: Vec<(String, u64, u64)> = flows
            .iter()
            .map(|f| (f.source.clone(), f.plaintext, f.mutual))
            .collect();
        assert_eq!(
            shown,
            [
                ("default/sleep".into(), 0, 5),
                ("unknown".into(), 1, 0),
                ("unknown".into(), 7, 0),
            ]
        );
        assert_eq!((flows[1].unit, flows[1].service.as_str()), ("connections", ""));
    }

    #[test]
    fn plaintext_callers_of_access_logs() {
        let mutual = "[2026-11-22T20:30:53.609Z] \"GET / HTTP/1.1\" 200 - via_upstream - \"-\" 0 505 1 0 \"-\" \"curl\" \"id\" \"c\" \
                      \"10.244.0.6:3000\" inbound|3000|| - 10.244.0.6:3000 10.244.0.5:34284 outbound_.80_._.c.default.svc.cluster.local default";
        assert_eq!(caller(mutual), None);
        let plain = mutual.replace("outbound_.80_._.c.default.svc.cluster.local", "-");
        let found = caller(&plain).unwrap();
        assert_eq!((found.ip.as_str(), found.port), ("10.244.0.5", 3000));
        let json = r#"{"upstream_cluster":"inbound|3000||","downstream_remote_address":"10.244.0.5:1","requested_server_name":null}"#;
        assert_eq!(caller(json), Some(found.clone()));
        assert_eq!(caller("info\txds\tconnected"), None);
        assert_eq!(caller(&plain.replace("inbound|3000||", "outbound|80||c")), None);

        let flow = Flow {
            source: "unknown".into(),
            plaintext: 2,
            unit: "requests",
            ..Flow::default()
        };
        let peer = Peer {
            pod: "pod default/legacy".into(),
            workload: Some("default/legacy".into()),
        };
        let by_ip = BTreeMap::from([("10.244.0.5".to_string(), peer)]);
        let of_sidecar = Flow {
            source: "default/legacy".into(),
            ..flow.clone()
        };
        let two = with_addresses(vec![of_sidecar, flow.clone()], &BTreeSet::from([found.clone()]), &by_ip);
        assert_eq!(two[1].source, "unknown", "its line is there already");
        let named = with_addresses(vec![flow.clone()], &BTreeSet::from([found]), &by_ip);
        assert_eq!(named[0].source, "pod default/legacy (10.244.0.5)");
        assert_eq!(named[0].port, Some(3000));
        assert_eq!(with_addresses(vec![flow.clone()], &BTreeSet::new(), &by_ip), [flow]);
    }

    #[test]
    fn probes_of_the_application() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {"containers": [
                {"name": "app", "ports": [{"name": "web", "containerPort": 8080}],
                 "readinessProbe": {"httpGet": {"port": "web"}}, "livenessProbe": {"tcpSocket": {"port": 9000}}},
                {"name": "moved", "readinessProbe": {"httpGet": {"port": 15020}}},
                {"name": "istio-proxy", "readinessProbe": {"httpGet": {"port": 15021}}},
            ]},
        }))
        .unwrap();
        let facts = pod_facts(&pod, "istio-system");
        assert!(facts.meshed && !facts.system);
        assert_eq!(facts.probes, BTreeSet::from([8080]));
        assert_eq!(facts.ports, BTreeSet::from([8080]));
    }
}
