//! `istioctl x describe pod|service`: what the mesh's configuration means for one workload.
//!
//! It reads the objects as the control plane does into the same `translate::world`, and asks the same functions, so what
//! it prints is what proxies are told.

use std::fmt::Write;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use mantlet_api::MeshConfig;
use mantlet_api::mesh_config::{CONFIG_KEY, CONFIG_MAP};
use mantlet_translate::authz;
use mantlet_translate::destination_rule;
use mantlet_translate::mesh::Mesh;
use mantlet_translate::peer_authentication::{self, Mode};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::virtual_service;
use mantlet_translate::world::service::{Service as MeshService, ServicePort, TargetPort};
use mantlet_translate::world::workload::Workload;
use mantlet_translate::world::{Kind, World};

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
            let world = load(client, &args.istio_namespace).await?;
            let mut out = String::new();
            describe_pod(&world, &pod, &mut out)?;
            Ok(out)
        }
        What::Service { name } => {
            let (name, namespace) = name.split_once('.').unwrap_or((name, namespace));
            let services: Api<Service> = Api::namespaced(client.clone(), namespace);
            services
                .get(name)
                .await
                .with_context(|| format!("finding service {name} in namespace {namespace}"))?;
            let world = load(client, &args.istio_namespace).await?;
            let host = format!("{name}.{namespace}.svc.{}", world.mesh().domain);
            let service = world
                .service(&host, namespace)
                .context("the service has no port that the mesh carries")?;
            let mut out = String::new();
            let pod = world.pods(namespace).find(|pod| selects(service, pod));
            describe_service(&world, service, pod.map(|p| &**p), &mut out);
            match pod {
                Some(pod) => describe_policies(&world, pod, &mut out),
                None => writeln!(out, "No pods are selected by service {name}.{namespace}")?,
            }
            Ok(out)
        }
    }
}

/// All objects that translation reads, as the control plane sees them.
pub async fn load(client: &Client, istio_namespace: &str) -> Result<World> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), istio_namespace);
    let text = maps
        .get_opt(CONFIG_MAP)
        .await?
        .and_then(|map| map.data.and_then(|mut data| data.remove(CONFIG_KEY)))
        .unwrap_or_default();
    let config = match MeshConfig::read(&text) {
        Ok((config, _warnings)) => config,
        Err(problem) => anyhow::bail!("ConfigMap {CONFIG_MAP} in {istio_namespace}, key {CONFIG_KEY}: {problem}"),
    };
    let mut world = World::new(Mesh::from_config(&config));
    let everything = ListParams::default();
    for service in Api::<Service>::all(client.clone()).list(&everything).await? {
        world.set_service(&service);
    }
    for pod in Api::<Pod>::all(client.clone()).list(&everything).await? {
        world.set_pod(&pod);
    }
    for kind in Kind::ALL {
        let (group, version, plural) = kind.resource();
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.name()), plural);
        let objects: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        match objects.list(&everything).await {
            Ok(list) => {
                for object in list {
                    world.set_config(kind, &serde_json::to_value(&object)?);
                }
            }
            // A cluster without Istio's CRDs has none of these objects.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("listing {plural}.{group}")),
        }
    }
    Ok(world)
}

fn selects(service: &MeshService, pod: &Workload) -> bool {
    !service.selector.is_empty()
        && service.namespace == pod.namespace
        && mantlet_api::selector::subset(&service.selector, &pod.labels)
}

fn describe_pod(world: &World, pod: &Pod, out: &mut String) -> Result<()> {
    let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
    writeln!(out, "Pod: {name}")?;
    let revision = pod.annotations().get("istio.io/rev").map_or("<none>", String::as_str);
    writeln!(out, "   Pod Revision: {revision}")?;
    let containers = pod.spec.as_ref().map(|s| s.containers.as_slice()).unwrap_or_default();
    let ports: Vec<String> = containers
        .iter()
        .flat_map(|c| {
            c.ports
                .iter()
                .flatten()
                .map(move |p| format!("{} ({})", p.container_port, c.name))
        })
        .collect();
    writeln!(
        out,
        "   Pod Ports: {}",
        if ports.is_empty() {
            "<none>".into()
        } else {
            ports.join(", ")
        }
    )?;
    if !containers.iter().any(|c| c.name == "istio-proxy") {
        writeln!(out, "WARNING: {name} is not part of mesh; no Istio sidecar")?;
    }
    let Some(workload) = world.pod(&namespace, &name) else {
        writeln!(
            out,
            "The pod takes no part in the mesh (finished, or on the host network)"
        )?;
        return Ok(());
    };
    let services = world.services_of_workload(&namespace, &workload.labels);
    if services.is_empty() {
        writeln!(out, "{RULE}\nNo services select this pod")?;
    }
    for service in &services {
        describe_service(world, service, Some(workload), out);
    }
    describe_policies(world, workload, out);
    Ok(())
}

fn describe_service(world: &World, service: &MeshService, pod: Option<&Workload>, out: &mut String) {
    // Writing to a String cannot fail; `fmt::Result`s are dropped below.
    let _ = writeln!(out, "{RULE}\nService: {}", service.name);
    for port in &service.ports {
        let shown = match target_number(port, pod) {
            Some(target) => format!("targets pod port {target}"),
            None => format!("targets pod port {:?}, which no container declares", port.target),
        };
        let name = if port.name.is_empty() { "unnamed" } else { &port.name };
        let _ = writeln!(
            out,
            "   Port: {name} {}/{} {shown}",
            port.number,
            protocol(port.protocol)
        );
    }
    let no_labels = std::collections::BTreeMap::new();
    let labels = pod.map_or(&no_labels, |p| &p.labels);
    let client = destination_rule::Client {
        namespace: &service.namespace,
        labels,
    };
    for rule in world.destination_rules(&service.namespace) {
        let host = destination_rule::expand_host(&rule.spec.host, &rule.meta.namespace, &world.mesh().domain);
        if destination_rule::specificity(&host, &service.host).is_none() {
            continue;
        }
        let _ = writeln!(out, "DestinationRule: {} for \"{}\"", rule.meta.name, rule.spec.host);
        let (matching, others): (Vec<_>, Vec<_>) = rule
            .spec
            .subsets
            .iter()
            .partition(|s| pod.is_some_and(|p| mantlet_api::selector::subset(&s.labels, &p.labels)));
        let names = |list: &[&mantlet_api::destination_rule::Subset]| {
            list.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(",")
        };
        if !matching.is_empty() {
            let _ = writeln!(out, "   Matching subsets: {}", names(&matching));
        }
        if !others.is_empty() {
            let _ = writeln!(out, "      (Non-matching subsets {})", names(&others));
        }
    }
    if let Some(applied) = destination_rule::applied(world, client, service) {
        match service.ports.first().and_then(|p| applied.settings(p.number, None).tls) {
            Some(tls) => {
                let _ = writeln!(out, "   Traffic Policy TLS Mode: {:?}", tls.mode);
            }
            None => {
                let _ = writeln!(out, "   No Traffic Policy");
            }
        }
    }
    for config in world.virtual_services() {
        if virtual_service::hosts(world, config).iter().any(|h| h == &service.host)
            || routes_to(world, config, &service.host)
        {
            let _ = writeln!(out, "VirtualService: {}", config.meta.name);
            let _ = writeln!(out, "   {} HTTP route(s)", config.spec.http.len());
        }
    }
}

fn routes_to(
    world: &World,
    config: &mantlet_translate::world::Config<mantlet_api::VirtualService>,
    host: &str,
) -> bool {
    config
        .spec
        .http
        .iter()
        .flat_map(|r| &r.route)
        .filter_map(|r| r.destination.as_ref())
        .any(|d| destination_rule::expand_host(&d.host, &config.meta.namespace, &world.mesh().domain) == host)
}

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

fn describe_policies(world: &World, pod: &Workload, out: &mut String) {
    let effective = peer_authentication::effective(world, &pod.namespace, &pod.labels);
    let text = |mode: Mode| match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    };
    let _ = writeln!(
        out,
        "{RULE}\nEffective PeerAuthentication:\n   Workload mTLS mode: {}",
        text(effective.workload)
    );
    if !effective.ports.is_empty() {
        let _ = writeln!(out, "   Port Level mTLS mode:");
        for (port, mode) in &effective.ports {
            let _ = writeln!(out, "      {port}: {}", text(*mode));
        }
    }
    let root = world.mesh().root_namespace.clone();
    let namespaces = [
        Some(root.as_str()),
        (pod.namespace != root).then_some(pod.namespace.as_str()),
    ];
    let applied: Vec<String> = namespaces
        .into_iter()
        .flatten()
        .flat_map(|namespace| world.peer_authentications(namespace))
        .filter(|p| {
            p.spec
                .selector
                .as_ref()
                .is_none_or(|s| s.is_empty() || s.matches(&pod.labels))
        })
        .map(|p| format!("{}.{}", p.meta.name, p.meta.namespace))
        .collect();
    if !applied.is_empty() {
        let _ = writeln!(out, "Applied PeerAuthentication:\n   {}", applied.join(", "));
    }
    let target = authz::Target {
        namespace: &pod.namespace,
        labels: &pod.labels,
        gateway: false,
    };
    let bound: Vec<_> = authz::bound(world, target).collect();
    if !bound.is_empty() {
        let _ = writeln!(out, "Applied AuthorizationPolicy:");
    }
    for policy in bound {
        let action = format!("{:?}", policy.spec.action).to_uppercase();
        let _ = writeln!(
            out,
            "   {}.{} ({action}, {} rule(s))",
            policy.meta.name,
            policy.meta.namespace,
            policy.spec.rules.len()
        );
        for problem in authz::problems(world, policy) {
            let _ = writeln!(out, "      WARNING: {}", problem.message);
        }
    }
}
