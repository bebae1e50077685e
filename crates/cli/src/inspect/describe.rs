//! `istioctl x describe pod|service`: what the mesh's configuration means for one workload.
//!
//! It reads the objects as the control plane does into the same `translate::world`, and asks the same functions, so what
//! it prints is what proxies are told. The words are istioctl's, those of its first releases included (`Pod is STRICT and clients are
//! ISTIO_MUTUAL`); what is ours stands below them.

mod policies;
mod routes;
mod rules;

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use mantlet_translate::inject::PROXY_CONTAINER;
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::World;
use mantlet_translate::world::service::{Service as MeshService, ServicePort, TargetPort};
use mantlet_translate::world::workload::Workload;

use super::target;

/// Arguments of `describe`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to describe.
    #[command(subcommand)]
    pub what: What,
    /// Namespace of the control plane.
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system", global = true)]
    pub istio_namespace: String,
    /// Namespace.
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
}

/// Kind of the described object.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum What {
    /// A pod: its services, rules and policies.
    #[command(alias = "po")]
    Pod {
        /// `pod[.namespace]` or `deploy/<name>`.
        name: String,
    },
    /// A service and the pod behind it.
    #[command(alias = "svc")]
    Service {
        /// `service[.namespace]`.
        name: String,
    },
}

const RULE: &str = "--------------------";

/// Reads the cluster and returns the printed description.
///
/// # Errors
/// The object does not exist, or the API server refuses a read.
pub async fn run(client: &Client, default_namespace: &str, args: &Args) -> Result<String> {
    let namespace = args.namespace.as_deref().unwrap_or(default_namespace);
    match &args.what {
        What::Pod { name } => {
            let pod = target::pod(client, namespace, name).await?;
            let mesh = Mesh::read(client, &args.istio_namespace).await?;
            Ok(mesh.pod(&pod))
        }
        What::Service { name } => {
            let (name, namespace) = name.split_once('.').unwrap_or((name, namespace));
            let services: Api<Service> = Api::namespaced(client.clone(), namespace);
            services
                .get(name)
                .await
                .with_context(|| format!("finding service {name} in namespace {namespace}"))?;
            let mesh = Mesh::read(client, &args.istio_namespace).await?;
            mesh.service(name, namespace)
        }
    }
}

/// What a description is made from.
struct Mesh {
    world: World,
    /// Services as they are, for the addresses of gateways.
    services: Vec<Service>,
}

impl Mesh {
    async fn read(client: &Client, istio_namespace: &str) -> Result<Mesh> {
        let world = crate::world::from_client(client, istio_namespace).await?;
        let services = Api::<Service>::all(client.clone()).list(&ListParams::default()).await?;
        Ok(Mesh {
            world,
            services: services.items,
        })
    }

    /// The description of a pod.
    fn pod(&self, pod: &Pod) -> String {
        let mut out = String::new();
        let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
        line(&mut out, format_args!("Pod: {name}"));
        let revision = pod.annotations().get("istio.io/rev").map_or("<none>", String::as_str);
        line(&mut out, format_args!("   Pod Revision: {revision}"));
        let spec = pod.spec.as_ref();
        let containers = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        let ports: Vec<String> = containers
            .iter()
            .flat_map(|c| {
                c.ports
                    .iter()
                    .flatten()
                    .map(move |p| format!("{} ({})", p.container_port, c.name))
            })
            .collect();
        let ports = if ports.is_empty() {
            "<none>".into()
        } else {
            ports.join(", ")
        };
        line(&mut out, format_args!("   Pod Ports: {ports}"));
        let meshed = containers
            .iter()
            .chain(spec.iter().flat_map(|s| s.init_containers.iter().flatten()))
            .any(|c| c.name == PROXY_CONTAINER);
        if !meshed {
            line(
                &mut out,
                format_args!("WARNING: {name} is not part of mesh; no Istio sidecar"),
            );
        }
        let Some(workload) = self.world.pod(&namespace, &name) else {
            line(
                &mut out,
                format_args!("The pod takes no part in the mesh (finished, or on the host network)"),
            );
            return out;
        };
        let services = self.world.services_of_workload(&namespace, &workload.labels);
        if services.is_empty() {
            line(&mut out, format_args!("{RULE}\nNo services select this pod"));
        }
        for service in &services {
            self.one_service(service, Some(workload), &mut out);
        }
        policies::describe(&self.world, workload, meshed, &mut out);
        for service in &services {
            self.exposure(service, Some(workload), &mut out);
        }
        out
    }

    /// The description of a service.
    fn service(&self, name: &str, namespace: &str) -> Result<String> {
        let host = format!("{name}.{namespace}.svc.{}", self.world.mesh().domain);
        let service = self
            .world
            .service(&host, namespace)
            .context("the service has no port that the mesh carries")?;
        let pod = self.world.pods(namespace).find(|pod| selects(service, pod));
        let mut out = String::new();
        self.one_service(service, pod.map(|p| &**p), &mut out);
        match pod {
            Some(pod) => policies::describe(&self.world, pod, pod.mtls, &mut out),
            None => line(
                &mut out,
                format_args!("No pods are selected by service {name}.{namespace}"),
            ),
        }
        self.exposure(service, pod.map(|p| &**p), &mut out);
        Ok(out)
    }

    /// A service: ports, rules for its clients, routes of the mesh.
    fn one_service(&self, service: &MeshService, pod: Option<&Workload>, out: &mut String) {
        line(out, format_args!("{RULE}\nService: {}", service.name));
        for port in &service.ports {
            let target = match target_number(port, pod) {
                Some(target) => format!("targets pod port {target}"),
                None => match &port.target {
                    TargetPort::Name(name) => format!("targets pod port {name:?}, which no container declares"),
                    TargetPort::Number(number) => format!("targets pod port {number}"),
                },
            };
            line(
                out,
                format_args!(
                    "   Port: {} {}/{} {target}",
                    port.name,
                    port.number,
                    protocol(port.protocol)
                ),
            );
        }
        let rules = rules::Rules::of(&self.world, service, pod);
        rules.describe(out);
        rules.modes(out);
        routes::of_mesh(&self.world, service, &rules, out);
    }

    /// Where a service is exposed by gateways.
    fn exposure(&self, service: &MeshService, pod: Option<&Workload>, out: &mut String) {
        let rules = rules::Rules::of(&self.world, service, pod);
        let exposed = routes::of_gateways(&self.world, service);
        let mut by_address: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for (config, gateway) in exposed {
            let Some(address) = self.address(&gateway) else {
                line(
                    out,
                    format_args!("Skipping Gateway information (no ingress gateway pods)"),
                );
                continue;
            };
            by_address.entry(address).or_default().push(config);
        }
        for (address, mut configs) in by_address {
            line(out, format_args!("Exposed on Ingress Gateway {address}"));
            configs.dedup_by(|a, b| a.meta == b.meta);
            for config in configs {
                routes::describe(&self.world, config, service, &rules, out);
            }
        }
    }

    /// How clients outside reach the pods of a Gateway; `None` when it has no pods. A Service without an address yet
    /// leaves the host empty, as istioctl does.
    fn address(&self, gateway: &mantlet_api::Gateway) -> Option<String> {
        let namespaces: Vec<&str> = self.world.namespaces().collect();
        let pod = namespaces
            .iter()
            .flat_map(|namespace| self.world.pods(namespace))
            .find(|pod| mantlet_api::selector::subset(&gateway.selector, &pod.labels))?;
        let service = self.services.iter().find(|s| {
            let selector = s
                .spec
                .as_ref()
                .and_then(|spec| spec.selector.clone())
                .unwrap_or_default();
            s.namespace().as_deref() == Some(&pod.namespace)
                && !selector.is_empty()
                && mantlet_api::selector::subset(&selector, &pod.labels)
        });
        let host = service.and_then(|service| {
            let ingress = service
                .status
                .as_ref()?
                .load_balancer
                .as_ref()?
                .ingress
                .as_ref()?
                .first()?;
            ingress.ip.clone().or_else(|| ingress.hostname.clone())
        });
        let plain = gateway
            .servers
            .iter()
            .filter_map(|s| s.port.as_ref())
            .any(|p| !p.is_tls());
        let scheme = if plain { "http" } else { "https" };
        Some(format!("{scheme}://{}", host.unwrap_or_default()))
    }
}

/// Writes a line; writing to a `String` cannot fail.
fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = writeln!(out, "{text}");
}

fn selects(service: &MeshService, pod: &Workload) -> bool {
    !service.selector.is_empty()
        && service.namespace == pod.namespace
        && mantlet_api::selector::subset(&service.selector, &pod.labels)
}

/// The pod's port behind a service port.
fn target_number(port: &ServicePort, pod: Option<&Workload>) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod?.named_ports.get(name).copied(),
    }
}

fn protocol(protocol: Protocol) -> String {
    match protocol {
        Protocol::Auto => "auto-detect".into(),
        other => format!("{other:?}").to_uppercase(),
    }
}

/// A name as istioctl prints it: with its namespace only where that is another one.
fn short(name: &str, namespace: &str, own: &str) -> String {
    if namespace == own {
        name.to_string()
    } else {
        format!("{name}.{namespace}")
    }
}

#[cfg(test)]
mod tests;
