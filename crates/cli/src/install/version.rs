//! `version`: of this program, of the control plane and of the proxies.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::json;

use super::Outcome;
use crate::inspect::Output;

/// Arguments of `version`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct VersionArgs {
    /// Also ask the cluster
    #[arg(long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub remote: bool,
    /// Print the numbers only
    #[arg(short, long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub short: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// Namespace of the control plane
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system")]
    pub istio_namespace: String,
    /// Kubernetes configuration file
    #[arg(short = 'c', long)]
    pub kubeconfig: Option<String>,
    /// Context of the Kubernetes configuration
    #[arg(long)]
    pub context: Option<String>,
}

/// How long the cluster may take to answer; a version is worth no longer wait.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Versions of one side and how many pods have them.
pub(super) type Versions = BTreeMap<String, usize>;

pub(super) async fn run(args: &VersionArgs) -> Result<Outcome> {
    let remote = if args.remote {
        match tokio::time::timeout(TIMEOUT, ask(args)).await {
            Ok(answer) => Some(answer),
            Err(_) => Some(Err(anyhow::anyhow!(
                "the cluster did not answer within {} s",
                TIMEOUT.as_secs()
            ))),
        }
    } else {
        None
    };
    let (control, data, trouble) = match remote {
        Some(Ok((control, data))) => (control, data, None),
        Some(Err(error)) => (Versions::new(), Versions::new(), Some(format!("{error:#}"))),
        None => (Versions::new(), Versions::new(), None),
    };
    if args.output != Output::Short {
        let list = |versions: &Versions| -> Vec<_> {
            versions
                .iter()
                .map(|(v, n)| json!({ "version": v, "count": n }))
                .collect()
        };
        let mut value =
            json!({ "clientVersion": { "version": mantlet_api::VERSION, "istioApi": mantlet_api::ISTIO_VERSION } });
        if args.remote {
            value["meshVersion"] = json!(list(&control));
            value["dataPlaneVersion"] = json!(list(&data));
        }
        return Ok(Outcome {
            text: crate::inspect::render(&value, args.output)?,
            code: 0,
        });
    }
    let mut text = String::new();
    if let Some(trouble) = trouble {
        text.push_str(&format!("unable to retrieve Pods: {trouble}\n"));
    } else if args.remote && control.is_empty() {
        text.push_str(&format!(
            "Istio is not present in the cluster: no running Istio pods in namespace {:?}\n",
            args.istio_namespace
        ));
    }
    text.push_str(&format!("client version: {}\n", mantlet_api::VERSION));
    if !control.is_empty() {
        let all: Vec<&str> = control.keys().map(String::as_str).collect();
        text.push_str(&format!("control plane version: {}\n", all.join(", ")));
    }
    if !data.is_empty() {
        let all: Vec<String> = data
            .iter()
            .map(|(v, n)| format!("{v} ({n} {})", if *n == 1 { "proxy" } else { "proxies" }))
            .collect();
        text.push_str(&format!("data plane version: {}\n", all.join(", ")));
    } else if !control.is_empty() {
        text.push_str("data plane version: none\n");
    }
    Ok(Outcome { text, code: 0 })
}

/// Versions by what runs: the tags of the images of running containers.
async fn ask(args: &VersionArgs) -> Result<(Versions, Versions)> {
    let client = super::client(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    let control: Api<Pod> = Api::namespaced(client.clone(), &args.istio_namespace);
    let control = control
        .list(&ListParams::default().labels("app=istiod"))
        .await
        .context("listing control plane pods")?;
    let data: Api<Pod> = Api::all(client);
    let data = data.list(&ListParams::default()).await.context("listing pods")?;
    Ok((count(&control.items, "discovery"), count(&data.items, "istio-proxy")))
}

/// Image tags of a container over running pods.
pub(super) fn count(pods: &[Pod], container: &str) -> Versions {
    let mut versions = Versions::new();
    for pod in pods {
        let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
        let Some(spec) = pod.spec.as_ref().filter(|_| running) else {
            continue;
        };
        let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        if let Some(found) = all.into_iter().find(|c| c.name == container) {
            let image = found.image.clone().unwrap_or_default();
            let tag = image
                .rsplit_once(':')
                .filter(|(_, tag)| !tag.contains('/'))
                .map_or("unknown", |(_, tag)| tag);
            *versions.entry(tag.to_string()).or_default() += 1;
        }
    }
    versions
}
