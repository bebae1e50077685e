//! `kube-inject -f`: injects sidecars into manifests with the same function as the webhook.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use mantlet_api::{names, yaml};
use mantlet_translate::inject::{self, InjectConfig};

use super::Outcome;

/// Arguments of `kube-inject`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KubeInjectArgs {
    /// Input Kubernetes resource filename; `-` is stdin
    #[arg(short = 'f', long, required = true)]
    pub filename: String,
    /// Modified output Kubernetes resource filename
    #[arg(short = 'o', long)]
    pub output: Option<String>,
    /// Mesh configuration file; by default read from the cluster
    #[arg(long = "meshConfigFile")]
    pub mesh_config_file: Option<String>,
    /// Injection configuration file; by default read from the cluster
    #[arg(long = "injectConfigFile")]
    pub inject_config_file: Option<String>,
    /// Injection values file; by default read from the cluster
    #[arg(long = "valuesFile")]
    pub values_file: Option<String>,
    /// Control plane revision
    #[arg(short = 'r', long, default_value = "")]
    pub revision: String,
    /// Namespace of objects that name none
    #[arg(short = 'n', long)]
    pub namespace: Option<String>,
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

pub(super) async fn run(args: &KubeInjectArgs) -> Result<Outcome> {
    let text = if args.filename == "-" {
        std::io::read_to_string(std::io::stdin()).context("reading stdin")?
    } else {
        std::fs::read_to_string(&args.filename).with_context(|| format!("reading {}", args.filename))?
    };
    let documents = yaml::read_all(&text).with_context(|| args.filename.clone())?;
    let file = |path: &Option<String>| -> Result<Option<String>> {
        path.as_ref()
            .map(|p| std::fs::read_to_string(p).with_context(|| format!("reading {p}")))
            .transpose()
    };
    let mut mesh = file(&args.mesh_config_file)?;
    let mut config = file(&args.inject_config_file)?;
    let mut values = file(&args.values_file)?;
    let mut namespace = args.namespace.clone();
    if mesh.is_none() || config.is_none() || values.is_none() || namespace.is_none() {
        let all_given = mesh.is_some() && config.is_some() && values.is_some();
        match super::client(args.kubeconfig.as_deref(), args.context.as_deref()).await {
            Ok(client) => {
                namespace.get_or_insert_with(|| client.default_namespace().to_string());
                if !all_given {
                    let api: Api<ConfigMap> = Api::namespaced(client, &args.istio_namespace);
                    let read = async |name: String, key: &str| -> Result<String> {
                        let map = api.get(&name).await.with_context(|| {
                            format!(
                                "could not read valid configmap {name:?} from namespace {:?}; use --meshConfigFile, --injectConfigFile \
                                 and --valuesFile, or re-run with -i <istioSystemNamespace> and make sure Istio is installed there",
                                args.istio_namespace
                            )
                        })?;
                        map.data
                            .and_then(|mut data| data.remove(key))
                            .with_context(|| format!("configmap {name:?} has no key {key:?}"))
                    };
                    let injector = names::with_revision("istio-sidecar-injector", &args.revision);
                    if mesh.is_none() {
                        mesh = Some(read(names::with_revision("istio", &args.revision), "mesh").await?);
                    }
                    if config.is_none() {
                        config = Some(read(injector.clone(), "config").await?);
                    }
                    if values.is_none() {
                        values = Some(read(injector, "values").await?);
                    }
                }
            }
            Err(error) if !all_given => return Err(error),
            Err(_) => {}
        }
    }
    let config = InjectConfig::read(
        &config.unwrap_or_default(),
        &values.unwrap_or_default(),
        &mesh.unwrap_or_default(),
        &args.revision,
    )?;
    let (documents, warnings) = inject::kube_inject(documents, namespace.as_deref().unwrap_or("default"), &config)
        .with_context(|| args.filename.clone())?;
    for warning in warnings {
        eprintln!("Warning: {warning}");
    }
    let text = yaml::write_all(&documents);
    match &args.output {
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("writing {path}"))?;
            Ok(Outcome::default())
        }
        None => Ok(Outcome { text, code: 0 }),
    }
}
