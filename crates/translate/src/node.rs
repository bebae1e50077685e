//! Who asks for configuration: a proxy's node id and metadata, read with bounds.
//!
//! Called by `control` for the first message of every stream. Nothing here is proof of identity: `control` compares
//! namespace and service account with the authenticated peer before a node is served (S4.37).

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::Value;

/// Longest node id that is read.
const MAX_ID: usize = 1024;
/// Most labels that are read.
const MAX_LABELS: usize = 256;

/// What a proxy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum NodeKind {
    /// Beside a workload, traffic captured.
    Sidecar,
    /// A gateway, connections addressed to it.
    Router,
}

/// A proxy as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ProxyNode {
    /// Full node id, the key of the stream.
    pub id: String,
    /// Sidecar or gateway.
    pub kind: NodeKind,
    /// Address of the proxy.
    pub ip: IpAddr,
    /// Pod (or workload instance) name.
    pub name: String,
    /// Namespace of its configuration.
    pub namespace: String,
    /// Service account from the metadata, if given.
    pub service_account: Option<String>,
    /// Labels from the metadata; the registry's are preferred where it knows the pod.
    pub labels: BTreeMap<String, String>,
    /// Cluster id.
    pub cluster: String,
    /// Istio version that it claims.
    pub version: String,
    /// Whether it is Mantlet's own proxy.
    pub mantlet: bool,
    /// Whether it asks for configuration at first use.
    pub on_demand: bool,
}

/// Why a node was refused. The text is for the peer and for logs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeError {
    /// The id has not the form `kind~ip~name.namespace~domain`.
    #[error("node id {0:?} is not of the form sidecar~IP~POD.NAMESPACE~DOMAIN")]
    BadId(String),
    /// A kind that is not served.
    #[error("proxy type {0:?} is not supported (sidecar and router are)")]
    BadKind(String),
    /// The address part is no address.
    #[error("node id holds no IP address: {0:?}")]
    BadAddress(String),
}

impl ProxyNode {
    /// Reads node id and metadata (`envoy.config.core.v3.Node`).
    pub fn parse(id: &str, metadata: &Value) -> Result<ProxyNode, NodeError> {
        let shown = || id.chars().take(200).collect::<String>();
        if id.len() > MAX_ID {
            return Err(NodeError::BadId(shown()));
        }
        let parts: Vec<&str> = id.split('~').collect();
        let [kind, ip, name, _domain] = parts.as_slice() else {
            return Err(NodeError::BadId(shown()));
        };
        let kind = match *kind {
            "sidecar" => NodeKind::Sidecar,
            "router" => NodeKind::Router,
            other => return Err(NodeError::BadKind(other.chars().take(40).collect())),
        };
        let ip = ip
            .parse()
            .map_err(|_| NodeError::BadAddress(ip.chars().take(60).collect()))?;
        let (pod, id_namespace) = name.rsplit_once('.').ok_or_else(|| NodeError::BadId(shown()))?;
        let text = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty() && t.len() <= 512)
        };
        let namespace = text("NAMESPACE").unwrap_or(id_namespace).to_string();
        if pod.is_empty() || namespace.is_empty() {
            return Err(NodeError::BadId(shown()));
        }
        let labels = metadata
            .get("LABELS")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .take(MAX_LABELS)
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string())))
            .collect();
        let flag = |key: &str| match metadata.get(key) {
            Some(Value::String(text)) => text == "true",
            Some(Value::Bool(flag)) => *flag,
            _ => false,
        };
        Ok(ProxyNode {
            id: id.to_string(),
            kind,
            ip,
            name: pod.to_string(),
            namespace,
            service_account: text("SERVICE_ACCOUNT").map(str::to_string),
            labels,
            cluster: text("CLUSTER_ID").unwrap_or("Kubernetes").to_string(),
            version: text("ISTIO_VERSION").unwrap_or_default().to_string(),
            mantlet: flag("MANTLET"),
            on_demand: flag("MANTLET_ON_DEMAND"),
        })
    }

    /// `POD.NAMESPACE`, as `proxy-status` shows it.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_istios_form() {
        let node = ProxyNode::parse(
            "sidecar~10.244.0.7~web-5f-x.default~default.svc.cluster.local",
            &json!({"NAMESPACE": "default", "SERVICE_ACCOUNT": "web", "LABELS": {"app": "web", "n": 1}, "MANTLET": "true"}),
        )
        .unwrap();
        assert_eq!((node.name.as_str(), node.namespace.as_str()), ("web-5f-x", "default"));
        assert_eq!(node.service_account.as_deref(), Some("web"));
        assert_eq!(node.labels, BTreeMap::from([("app".to_string(), "web".to_string())]));
        assert!(node.mantlet);
    }

    #[test]
    fn refuses_other_forms() {
        for id in [
            "",
            "sidecar~1.2.3.4~a.b",
            "ztunnel~1.2.3.4~a.b~c",
            "sidecar~nowhere~a.b~c",
            "sidecar~1.2.3.4~ab~c",
            "a~b~c~d~e",
        ] {
            assert!(ProxyNode::parse(id, &Value::Null).is_err(), "{id}");
        }
        assert!(ProxyNode::parse(&format!("sidecar~1.2.3.4~{}.b~c", "a".repeat(2000)), &Value::Null).is_err());
    }
}
