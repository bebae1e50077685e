//! Where the host reaches the cluster's Services: `cluster ports`, the end of `cluster up`, and the lab runner's terminals.
//!
//! The truth is in the Services: a LoadBalancer's address in its status, stand-ins for ports that the user may not open in an
//! annotation (`node/src/services/host_ports.rs`). This only reads them.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, ResourceExt};
use mantlet_net::sockopt::{ListenOptions, listen_tcp};
use mantlet_node::services::host_ports;

use super::paths::Paths;
use super::{Answer, control};
use crate::inspect::Table;

/// An address that clusters never use, where `up` tries whether port 80 is for everybody.
const TRIAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 63, 255, 254), 80);

/// One TCP port of a Service that the host reaches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// `namespace/name` of the Service.
    pub service: String,
    /// The Service's own port.
    pub port: u16,
    /// Where it is on the host.
    pub host: SocketAddrV4,
    /// The address is the LoadBalancer's, not that of a NodePort.
    pub balanced: bool,
}

/// What is open on the host, in the order of Services and ports.
///
/// # Errors
/// The API does not answer.
pub async fn list(client: &Client) -> Result<Vec<HostPort>> {
    let services: Api<Service> = Api::all(client.clone());
    let list = services
        .list(&ListParams::default())
        .await
        .context("asking for Services")?;
    let mut ports: Vec<_> = list.iter().flat_map(of_service).collect();
    ports.sort();
    Ok(ports)
}

fn of_service(service: &Service) -> Vec<HostPort> {
    let name = format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any());
    let stand_ins = host_ports::of(service);
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let address = ingress.first().and_then(|ingress| ingress.ip.as_deref()?.parse().ok());
    let mut found = Vec::new();
    for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
        let tcp = matches!(port.protocol.as_deref(), None | Some("TCP"));
        let Some(number) = u16::try_from(port.port).ok().filter(|_| tcp) else {
            continue;
        };
        let mut add = |host, balanced| {
            found.push(HostPort {
                service: name.clone(),
                port: number,
                host,
                balanced,
            });
        };
        if let Some(address) = address {
            let host = stand_ins.get(&number).copied().unwrap_or(number);
            add(SocketAddrV4::new(address, host), true);
        }
        let node_port = port.node_port.and_then(|port| u16::try_from(port).ok());
        if let Some(host) = node_port.filter(|port| *port > 0) {
            add(SocketAddrV4::new(Ipv4Addr::LOCALHOST, host), false);
        }
    }
    found
}

/// Lines of a `.curlrc` that lead curl to the stand-ins: commands and URLs then are what they are for root.
pub fn curlrc(ports: &[HostPort]) -> String {
    let moved = ports
        .iter()
        .filter(|port| port.balanced && port.port != port.host.port());
    moved
        .map(|port| {
            let ip = port.host.ip();
            format!("connect-to = \"{ip}:{}:{ip}:{}\"\n", port.port, port.host.port())
        })
        .collect()
}

/// `mantlet cluster ports`.
pub(super) fn run(paths: &Paths, curl: bool) -> Result<Answer> {
    if control::status(paths)?.is_none() {
        return Ok(Answer {
            text: format!("Cluster {:?} is not running.\n", paths.name),
            code: 1,
        });
    }
    let config = paths.settings()?.kubeconfig.context("the cluster has no kubeconfig")?;
    let ports = ask(&config, &paths.context())?;
    if curl {
        return Ok(Answer::ok(curlrc(&ports)));
    }
    let mut table = Table::new(&["SERVICE", "PORT", "ON THE HOST", "BY"]);
    for port in &ports {
        let by = match (port.balanced, port.port == port.host.port()) {
            (true, true) => "LoadBalancer",
            (true, false) => "LoadBalancer (stand-in)",
            (false, _) => "NodePort",
        };
        table.row([
            port.service.clone(),
            port.port.to_string(),
            port.host.to_string(),
            by.to_owned(),
        ]);
    }
    Ok(Answer::ok(table.to_string()))
}

fn ask(config: &Path, context: &str) -> Result<Vec<HostPort>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { list(&client(config, context).await?).await })
}

/// A client as any other program has it: over TLS, with what the kubeconfig says.
pub(super) async fn client(config: &Path, context: &str) -> Result<Client> {
    let options = KubeConfigOptions {
        context: Some(context.to_owned()),
        ..KubeConfigOptions::default()
    };
    let config = kube::Config::from_custom_kubeconfig(Kubeconfig::read_from(config)?, &options).await?;
    Ok(Client::try_from(config)?)
}

/// What `up` has to say about ports below 1024: nothing where they are for everybody.
pub(super) fn note(config: &Path, paths: &Paths) -> String {
    let refused = listen_tcp(TRIAL.into(), ListenOptions::default())
        .is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    if !refused {
        return String::new();
    }
    let name = &paths.name;
    let mut text = format!(
        "Ports below 1024 are for root on this host; a LoadBalancer's are mapped: 80 to 8080, 443 to 8443, see\n  \
         mantlet cluster ports --name {name}            where each port is\n  \
         mantlet cluster ports --name {name} --curl     the same as lines for ~/.curlrc\n\
         To have them as they are: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80\n"
    );
    // Services of the last time have their ports again.
    for port in ask(config, &paths.context()).unwrap_or_default() {
        if port.balanced && port.port != port.host.port() {
            text.push_str(&format!("  {} port {} is at {}\n", port.service, port.port, port.host));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_and_node_ports_are_listed_and_curl_is_led_there() {
        let service: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "gate", "namespace": "ns", "annotations": {(host_ports::ANNOTATION): "80=8080"}},
            "spec": {"ports": [{"port": 80, "nodePort": 30080}, {"port": 15021}, {"port": 53, "protocol": "UDP"}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "127.64.1.2"}]}},
        }))
        .expect("a service");
        let ports = of_service(&service);
        let shown: Vec<_> = ports
            .iter()
            .map(|port| format!("{} {} {}", port.service, port.port, port.host))
            .collect();
        assert_eq!(
            shown,
            [
                "ns/gate 80 127.64.1.2:8080",
                "ns/gate 80 127.0.0.1:30080",
                "ns/gate 15021 127.64.1.2:15021"
            ]
        );
        assert_eq!(curlrc(&ports), "connect-to = \"127.64.1.2:80:127.64.1.2:8080\"\n");
    }
}
