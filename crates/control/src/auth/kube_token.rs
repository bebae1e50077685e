//! Callers with a Kubernetes service account token, checked by the API server's TokenReview (S4.32, S4.33).
//!
//! Accepted answers are remembered for a short while, never beyond the token's own end, keyed by a hash of the token, so
//! that a rollout of a thousand pods asks a thousand times and not five thousand. Refusals are not remembered.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::{Api, PostParams};
use mantlet_identity::{SpiffeId, TrustDomain};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

use super::{AuthSource, Authenticator, CallContext, Caller, Clock, PodRef};

/// How long an accepted answer is remembered.
const REMEMBER: Duration = Duration::seconds(30);
/// Most remembered answers; at the limit the oldest generation is dropped.
const MAX_REMEMBERED: usize = 20_000;
/// Longest token accepted. Projected tokens have about 1 kB.
const MAX_TOKEN: usize = 16 * 1024;

/// An authenticated answer of the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReviewedToken {
    /// `system:serviceaccount:<namespace>:<name>` for service accounts.
    pub username: String,
    /// The groups of the user.
    pub groups: Vec<String>,
    /// The audiences that both the request and the token name.
    pub audiences: Vec<String>,
    /// The pod the token is bound to.
    pub pod: Option<PodRef>,
}

/// Why a review gave no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The API server says the token is not valid.
    #[error("the token is not authenticated: {0}")]
    Refused(String),
    /// The API server could not be asked. Not the caller's fault, but no reason to let it in either.
    #[error("TokenReview failed: {0}")]
    Unavailable(String),
}

/// Asks whether a token is valid.
#[tonic::async_trait]
pub trait TokenReviewer: Send + Sync {
    /// Reviews `token` for `audiences`.
    async fn review(&self, token: &str, audiences: &[String]) -> Result<ReviewedToken, ReviewError>;
}

/// Asks a Kubernetes API server.
#[derive(Clone)]
pub struct KubeTokenReviewer {
    client: kube::Client,
}

impl KubeTokenReviewer {
    /// With the control plane's own client (RBAC: create tokenreviews).
    pub fn new(client: kube::Client) -> Self {
        Self { client }
    }
}

#[tonic::async_trait]
impl TokenReviewer for KubeTokenReviewer {
    async fn review(&self, token: &str, audiences: &[String]) -> Result<ReviewedToken, ReviewError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(audiences.to_vec()),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(|e| ReviewError::Unavailable(e.to_string()))?;
        let status = answer
            .status
            .ok_or_else(|| ReviewError::Unavailable("the answer has no status".to_owned()))?;
        if let Some(error) = status.error.filter(|e| !e.is_empty()) {
            return Err(ReviewError::Refused(error));
        }
        if status.authenticated != Some(true) {
            return Err(ReviewError::Refused("token is not authenticated".to_owned()));
        }
        let user = status.user.unwrap_or_default();
        let extra = user.extra.unwrap_or_default();
        let first = |key: &str| extra.get(key).and_then(|values| values.first()).cloned();
        let pod = match (
            first("authentication.kubernetes.io/pod-name"),
            first("authentication.kubernetes.io/pod-uid"),
        ) {
            (Some(name), Some(uid)) => Some(PodRef { name, uid }),
            _ => None,
        };
        Ok(ReviewedToken {
            username: user.username.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            audiences: status.audiences.unwrap_or_default(),
            pod,
        })
    }
}

struct Remembered {
    caller: Caller,
    until: OffsetDateTime,
}

/// Takes bearer tokens from the `authorization` metadata.
pub struct KubeTokenAuthenticator {
    reviewers: BTreeMap<String, Arc<dyn TokenReviewer>>,
    primary: String,
    audiences: Vec<String>,
    trust_domain: ArcSwap<TrustDomain>,
    clock: Arc<dyn Clock>,
    remembered: Mutex<HashMap<[u8; 32], Remembered>>,
}

impl KubeTokenAuthenticator {
    /// Tokens of the cluster `cluster_id` (`Kubernetes` by default), reviewed by `reviewer` for `audiences`
    /// (`TOKEN_AUDIENCES`, default `istio-ca`).
    pub fn new(
        trust_domain: TrustDomain,
        cluster_id: &str,
        reviewer: Arc<dyn TokenReviewer>,
        audiences: Vec<String>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            reviewers: BTreeMap::from([(cluster_id.to_owned(), reviewer)]),
            primary: cluster_id.to_owned(),
            audiences,
            trust_domain: ArcSwap::from_pointee(trust_domain),
            clock,
            remembered: Mutex::default(),
        }
    }

    /// Another name of the primary cluster, or a remote cluster with its own reviewer.
    #[must_use]
    pub fn with_cluster(mut self, cluster_id: &str, reviewer: Arc<dyn TokenReviewer>) -> Self {
        self.reviewers.insert(cluster_id.to_owned(), reviewer);
        self
    }

    /// Identities are of this trust domain from now on, also those of tokens that were reviewed before.
    pub fn set_trust_domain(&self, trust_domain: TrustDomain) {
        self.trust_domain.store(Arc::new(trust_domain));
    }

    fn check(&self, reviewed: &ReviewedToken) -> Result<SpiffeId, String> {
        // An API server that knows no audiences answers with none: then the token could be meant for anyone.
        if !reviewed.audiences.iter().any(|a| self.audiences.contains(a)) {
            return Err(format!(
                "the token is not for any of the audiences {:?}",
                self.audiences
            ));
        }
        let mut parts = reviewed.username.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("system"), Some("serviceaccount"), Some(namespace), Some(name), None) => {
                if !reviewed.groups.iter().any(|g| g == "system:serviceaccounts") {
                    return Err(format!("the token of {:?} is not a service account", reviewed.username));
                }
                SpiffeId::new(&self.trust_domain.load(), namespace, name).map_err(|e| e.to_string())
            }
            _ => Err(format!(
                "the token of {:?} is not a service account's",
                reviewed.username
            )),
        }
    }

    fn recall(&self, key: &[u8; 32]) -> Option<Caller> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = remembered.get(key)?;
        let current = self.trust_domain.load();
        let of_today = entry
            .caller
            .identities
            .iter()
            .all(|id| id.trust_domain() == current.as_str());
        if entry.until <= self.clock.now() || !of_today {
            remembered.remove(key);
            return None;
        }
        Some(entry.caller.clone())
    }

    fn remember(&self, key: [u8; 32], caller: &Caller) {
        let now = self.clock.now();
        let until = caller.expires.map_or(now + REMEMBER, |end| end.min(now + REMEMBER));
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= MAX_REMEMBERED {
            remembered.retain(|_, entry| entry.until > now);
            if remembered.len() >= MAX_REMEMBERED {
                remembered.clear();
            }
        }
        remembered.insert(
            key,
            Remembered {
                caller: caller.clone(),
                until,
            },
        );
    }
}

#[tonic::async_trait]
impl Authenticator for KubeTokenAuthenticator {
    fn name(&self) -> &'static str {
        "KubeJWTAuthenticator"
    }

    async fn authenticate(&self, call: &CallContext<'_>) -> Result<Caller, String> {
        let token = bearer(call.authorization)?;
        let cluster = if call.cluster_id.is_empty() {
            &self.primary
        } else {
            call.cluster_id
        };
        let reviewer = self.reviewers.get(cluster).ok_or_else(|| {
            format!(
                "client claims to be in cluster {cluster:?}, but only {:?} are known",
                self.reviewers.keys()
            )
        })?;
        // The length of the cluster's name keeps (cluster, token) pairs apart.
        let mut hash = Sha256::new();
        hash.update((cluster.len() as u64).to_be_bytes());
        hash.update(cluster.as_bytes());
        hash.update(token.as_bytes());
        let key: [u8; 32] = hash.finalize().into();
        if let Some(caller) = self.recall(&key) {
            return Ok(caller);
        }
        let reviewed = reviewer
            .review(token, &self.audiences)
            .await
            .map_err(|e| e.to_string())?;
        let id = self.check(&reviewed)?;
        let expires = token_expiry(token);
        if expires.is_some_and(|end| end <= self.clock.now()) {
            return Err("the token has expired".to_owned());
        }
        let caller = Caller {
            identities: vec![id],
            source: AuthSource::KubernetesToken,
            expires,
            pod: reviewed.pod,
        };
        self.remember(key, &caller);
        Ok(caller)
    }
}

/// The token behind `Bearer `; the scheme is compared without regard to case (RFC 9110 11.1).
fn bearer(authorization: Option<&str>) -> Result<&str, String> {
    let text = authorization.ok_or("no bearer token exists")?;
    let (scheme, token) = text.split_once(' ').ok_or("no bearer token exists")?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err("no bearer token exists".to_owned());
    }
    if token.len() > MAX_TOKEN {
        return Err(format!(
            "the bearer token has {} bytes, more than {MAX_TOKEN}",
            token.len()
        ));
    }
    Ok(token)
}

/// `exp` of a JWT, read without verification: the API server has verified the token, this only shortens how long its
/// answer is used.
fn token_expiry(token: &str) -> Option<OffsetDateTime> {
    let payload = token.split('.').nth(1)?;
    let bytes = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    OffsetDateTime::from_unix_timestamp(value.get("exp")?.as_i64()?).ok()
}
