//! `uninstall`: one revision, or with `--purge` everything, the user's mesh objects included.

use std::collections::BTreeSet;
use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams};
use kube::runtime::wait::{await_condition, conditions};
use mantlet_api::kind::KINDS;

use super::spec::Spec;
use super::{Outcome, Source, apply, confirm};

/// Arguments of `uninstall`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct UninstallArgs {
    /// Which installation.
    #[command(flatten)]
    pub source: Source,
    /// Delete all Istio related sources for all versions
    #[arg(long)]
    pub purge: bool,
    /// Skip the confirmation prompt
    #[arg(short = 'y', long = "skip-confirmation")]
    pub skip_confirmation: bool,
    /// Print what would be deleted, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Kubernetes configuration file
    #[arg(short = 'c', long)]
    pub kubeconfig: Option<String>,
    /// Context of the Kubernetes configuration
    #[arg(long)]
    pub context: Option<String>,
}

/// How long CRDs may take to go, which waits for all objects of their kinds.
const CRD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(120);

pub(super) async fn run(args: &UninstallArgs, input: &mut dyn BufRead, output: &mut dyn Write) -> Result<Outcome> {
    if !args.purge && args.source.revision.is_none() && args.source.filename.is_empty() {
        bail!("at least one of the --revision, --filename or --purge flags must be set");
    }
    let client = super::client(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    apply::check_server(&client).await?;
    run_on(&client, args, input, output).await
}

/// As [`run`], on a given cluster.
pub(super) async fn run_on(
    client: &kube::Client,
    args: &UninstallArgs,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
) -> Result<Outcome> {
    let selector = if args.purge {
        "operator.istio.io/managed=Reconcile".to_string()
    } else {
        let spec = Spec::resolve(&args.source)?;
        format!(
            "operator.istio.io/managed=Reconcile,istio.io/rev={}",
            spec.revision_label()
        )
    };
    let found = apply::find(client, &selector).await?;
    if found.is_empty() && !args.purge {
        return Ok(Outcome {
            text: format!("Nothing to uninstall: no objects with labels {selector}\n"),
            code: 1,
        });
    }
    if args.dry_run {
        let mut text = String::new();
        for object in &found {
            text.push_str(&format!(
                "Would delete {}:{}:{}\n",
                object.kind,
                object.namespace(),
                object.object.name_any()
            ));
        }
        return Ok(Outcome { text, code: 0 });
    }
    let question = if args.purge {
        "All Istio resources will be pruned from the cluster, including its CustomResourceDefinitions and with them every \
         object of these kinds.\nProceed? (y/N) "
    } else {
        "All objects of this revision will be deleted from the cluster. Proceed? (y/N) "
    };
    if !args.skip_confirmation && !confirm(question, input, output)? {
        return Ok(Outcome {
            text: "Cancelled.\n".into(),
            code: 1,
        });
    }
    for object in &found {
        object.delete(client).await?;
        writeln!(
            output,
            "  Removed {}:{}:{}.",
            object.kind,
            object.namespace(),
            object.object.name_any()
        )?;
        output.flush()?;
    }
    if args.purge {
        purge(client, &found.iter().map(apply::Found::namespace).collect(), output).await?;
    }
    Ok(Outcome {
        text: "✔ Uninstall complete\n".into(),
        code: 0,
    })
}

/// Removes what the control plane made at run time, then the CRDs.
async fn purge(client: &kube::Client, namespaces: &BTreeSet<String>, output: &mut dyn Write) -> Result<()> {
    let roots: Api<ConfigMap> = Api::all(client.clone());
    let list = roots
        .list(&ListParams::default().fields("metadata.name=istio-ca-root-cert"))
        .await
        .context("listing the root certificates of all namespaces")?;
    for map in list.items {
        let (namespace, name) = (map.namespace().unwrap_or_default(), map.name_any());
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        ignore_missing(api.delete(&name, &DeleteParams::default()).await.map(drop))
            .with_context(|| format!("deleting ConfigMap {namespace}/{name}"))?;
        writeln!(output, "  Removed ConfigMap:{namespace}:{name}.")?;
    }
    for namespace in namespaces.iter().filter(|n| !n.is_empty()) {
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let name = "istio-ca-secret";
        if api
            .get_opt(name)
            .await
            .with_context(|| format!("reading Secret {namespace}/{name}"))?
            .is_some()
        {
            ignore_missing(api.delete(name, &DeleteParams::default()).await.map(drop))
                .with_context(|| format!("deleting Secret {namespace}/{name}"))?;
            writeln!(output, "  Removed Secret:{namespace}:{name}.")?;
        }
    }
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for kind in KINDS {
        let name = kind.crd_name();
        let Some(existing) = api
            .get_opt(&name)
            .await
            .with_context(|| format!("reading CustomResourceDefinition {name}"))?
        else {
            continue;
        };
        let uid = existing.uid().unwrap_or_default();
        ignore_missing(api.delete(&name, &DeleteParams::default()).await.map(drop))
            .with_context(|| format!("deleting CustomResourceDefinition {name}"))?;
        tokio::time::timeout(
            CRD_TIMEOUT,
            await_condition(api.clone(), &name, conditions::is_deleted(&uid)),
        )
        .await
        .map_err(|_| {
            anyhow::anyhow!("CustomResourceDefinition {name} is still being deleted; objects with finalizers hold it")
        })?
        .with_context(|| format!("watching CustomResourceDefinition {name}"))?;
        writeln!(output, "  Removed CustomResourceDefinition::{name}.")?;
    }
    Ok(())
}

fn ignore_missing(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    }
}
