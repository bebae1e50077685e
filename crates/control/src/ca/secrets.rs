//! Where a self-signed CA keeps its material: a Secret, created only when absent, changed only if nobody else has.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use zeroize::Zeroize;

/// Why a Secret could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// It exists already: someone was faster.
    #[error("the secret exists already")]
    AlreadyExists,
    /// It was changed since it was read, or deleted.
    #[error("the secret was changed by someone else")]
    Conflict,
    /// The API server cannot be asked, or refuses. Never read as "absent" (S4.64).
    #[error("{0}")]
    Api(String),
}

/// A Secret's content and version.
#[derive(Clone, Default)]
pub struct CaSecret {
    /// `data`, decoded.
    pub data: BTreeMap<String, Vec<u8>>,
    /// Empty for one that does not exist yet.
    pub resource_version: String,
}

impl CaSecret {
    /// One entry, empty when missing.
    pub fn get(&self, key: &str) -> &[u8] {
        self.data.get(key).map_or(&[], Vec::as_slice)
    }
}

impl Drop for CaSecret {
    fn drop(&mut self) {
        for value in self.data.values_mut() {
            value.zeroize();
        }
    }
}

impl std::fmt::Debug for CaSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CaSecret({:?}, version {})", self.data.keys(), self.resource_version)
    }
}

/// The few operations the CA needs.
#[tonic::async_trait]
pub trait SecretStore: Send + Sync {
    /// The Secret, or none when the API server says NotFound. Every other failure is an error.
    async fn get(&self, name: &str) -> Result<Option<CaSecret>, SecretError>;
    /// Creates it; fails when it exists.
    async fn create(&self, name: &str, kind: &str, secret: &CaSecret) -> Result<(), SecretError>;
    /// Replaces the data if the version is still that of `secret`.
    async fn update(&self, name: &str, secret: &CaSecret) -> Result<(), SecretError>;
}

/// Secrets of one namespace, through the Kubernetes API.
#[derive(Clone)]
pub struct KubeSecrets {
    api: Api<Secret>,
}

impl KubeSecrets {
    /// RBAC: get, create, update secrets in `namespace`.
    pub fn new(client: kube::Client, namespace: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
        }
    }
}

#[tonic::async_trait]
impl SecretStore for KubeSecrets {
    async fn get(&self, name: &str) -> Result<Option<CaSecret>, SecretError> {
        let secret = self
            .api
            .get_opt(name)
            .await
            .map_err(|e| SecretError::Api(e.to_string()))?;
        Ok(secret.map(|secret| CaSecret {
            resource_version: secret.metadata.resource_version.clone().unwrap_or_default(),
            data: secret
                .data
                .unwrap_or_default()
                .into_iter()
                .map(|(k, v)| (k, v.0))
                .collect(),
        }))
    }

    async fn create(&self, name: &str, kind: &str, secret: &CaSecret) -> Result<(), SecretError> {
        let object = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            type_: Some(kind.to_owned()),
            data: Some(encode(secret)),
            ..Secret::default()
        };
        match self.api.create(&PostParams::default(), &object).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Err(SecretError::AlreadyExists),
            Err(error) => Err(SecretError::Api(error.to_string())),
        }
    }

    async fn update(&self, name: &str, secret: &CaSecret) -> Result<(), SecretError> {
        let Some(mut object) = self
            .api
            .get_opt(name)
            .await
            .map_err(|e| SecretError::Api(e.to_string()))?
        else {
            return Err(SecretError::Conflict);
        };
        // The version read with the data decides, not the one of this moment.
        object.metadata.resource_version = Some(secret.resource_version.clone());
        object.data = Some(encode(secret));
        match self.api.replace(name, &PostParams::default(), &object).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => Err(SecretError::Conflict),
            Err(error) => Err(SecretError::Api(error.to_string())),
        }
    }
}

fn encode(secret: &CaSecret) -> BTreeMap<String, ByteString> {
    secret
        .data
        .iter()
        .map(|(key, value)| (key.clone(), ByteString(value.clone())))
        .collect()
}
