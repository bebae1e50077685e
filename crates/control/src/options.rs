//! Settings of `mantletd discovery`, from flags and the environment (Istio's names).

use std::net::SocketAddr;

/// Settings of the control plane.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Plaintext xDS.
    #[arg(long = "grpcAddr", default_value = "0.0.0.0:15010")]
    pub grpc_addr: SocketAddr,
    /// xDS and certificate signing with TLS.
    #[arg(long = "secureGRPCAddr", default_value = "0.0.0.0:15012")]
    pub secure_grpc_addr: SocketAddr,
    /// Webhooks.
    #[arg(long = "httpsAddr", default_value = "0.0.0.0:15017")]
    pub https_addr: SocketAddr,
    /// Metrics.
    #[arg(long = "monitoringAddr", default_value = "0.0.0.0:15014")]
    pub monitoring_addr: SocketAddr,
    /// Readiness and debugging.
    #[arg(long = "httpAddr", default_value = "0.0.0.0:8080")]
    pub http_addr: SocketAddr,
    /// Namespace of the control plane.
    #[arg(long, env = "POD_NAMESPACE", default_value = "istio-system")]
    pub namespace: String,
    /// Name of this instance.
    #[arg(long, env = "POD_NAME", default_value = "istiod")]
    pub pod_name: String,
    /// Revision.
    #[arg(long, env = "REVISION", default_value = "default")]
    pub revision: String,
    /// Name of this cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// DNS domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    pub domain: String,
    /// Whether policies may name several external authorizers for one workload.
    #[arg(long, env = "PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS", default_value = "false", hide = true,
          action = clap::ArgAction::Set)]
    pub multiple_custom_providers: bool,
    /// Keep-alive of gRPC connections; accepted for compatibility.
    #[arg(long = "keepaliveMaxServerConnectionAge", hide = true)]
    pub keepalive_max_server_connection_age: Option<String>,
    /// Fetching key sets, before the environment changes it.
    #[arg(skip)]
    pub jwks: crate::jwks::options::JwksOptions,
    /// Log levels, `default:info,ads:debug`.
    #[arg(long = "log_output_level", default_value = "default:info")]
    pub log_output_level: String,
    /// Log as JSON.
    #[arg(long = "log_as_json")]
    pub log_as_json: bool,
}

impl Options {
    /// Names of the Service that webhooks of this control plane call.
    pub fn services(&self) -> Vec<String> {
        match self.revision.as_str() {
            "" | "default" => vec!["istiod".into()],
            revision => vec![format!("istiod-{revision}")],
        }
    }

    /// Name of the mesh ConfigMap.
    pub fn mesh_configmap(&self) -> String {
        match self.revision.as_str() {
            "" | "default" => mantlet_api::mesh_config::CONFIG_MAP.into(),
            revision => format!("{}-{revision}", mantlet_api::mesh_config::CONFIG_MAP),
        }
    }
}
