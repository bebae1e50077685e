//! The server: its parts, and the ladder that every request climbs (authenticate, authorize, route).
//!
//! `serve` calls [`ApiServer::handle`] for connections, [`InProcess`] for clients in this process. Handlers are in `rest`.

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt;
use http::{Method, Request, Response, header};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::admission::Webhooks;
use crate::auth::{Identity, authn, bootstrap, rbac, token::Signer};
use crate::cache::Cached;
use crate::config::Config;
use crate::error::{ApiError, ApiResult};
use crate::http::{Body, BoxError, accepts_aggregated, erase, error_response, full, json_response, respond};
use crate::registry::{self, Registry};
use crate::request::{Query, RequestInfo};
use crate::store::{RedbStore, Store, StoreError};
use crate::{discovery, kubelet, openapi, rest};

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
}

/// A request in work.
pub type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// The API server.
pub struct ApiServer {
    config: Config,
    store: Arc<dyn Store>,
    signer: Signer,
    registry: Cached<Registry>,
    rbac: Cached<rbac::Index>,
    pub(crate) webhooks: Webhooks,
    in_flight: Arc<Semaphore>,
}

impl ApiServer {
    /// Opens the store and creates the bootstrap objects.
    ///
    /// # Errors
    /// [`OpenError::Store`] when the store is in use, damaged or unreachable; [`OpenError::Config`] for a bad key or range.
    pub async fn open(config: Config) -> Result<Arc<Self>, OpenError> {
        let path = config.store_path.clone();
        let options = config.store.clone();
        let opened = tokio::task::spawn_blocking(move || RedbStore::open(&path, &options)).await;
        let store = opened.map_err(|e| OpenError::Config(format!("opening the store: {e}")))??;
        Self::with_store(config, Arc::new(store)).await
    }

    /// The same over a store that is open already.
    ///
    /// # Errors
    /// As [`ApiServer::open`].
    pub async fn with_store(config: Config, store: Arc<dyn Store>) -> Result<Arc<Self>, OpenError> {
        let signer = Signer::from_pem(&config.sa_key_pem)?;
        if config.api_audiences.is_empty() {
            return Err(OpenError::Config("api_audiences must not be empty".into()));
        }
        if config.node_ports.0 > config.node_ports.1 {
            return Err(OpenError::Config("node_ports: the first port is above the last".into()));
        }
        let server = Arc::new(Self {
            webhooks: Webhooks::new(config.dialer.clone()),
            in_flight: Arc::new(Semaphore::new(config.max_in_flight.max(1))),
            store,
            signer,
            registry: registry::cache(),
            rbac: rbac::cache(),
            config,
        });
        bootstrap::run(&server).await?;
        rest::resume_cleanups(&server);
        rest::expire_events(&server);
        Ok(server)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The store.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    pub(crate) fn signer(&self) -> &Signer {
        &self.signer
    }

    pub(crate) fn registry(&self) -> ApiResult<Arc<Registry>> {
        Ok(self.registry.get(self.store())?)
    }

    pub(crate) fn rbac(&self) -> ApiResult<Arc<rbac::Index>> {
        Ok(self.rbac.get(self.store())?)
    }

    /// A tower service that acts as `identity`: what `kube::Client::new` takes.
    pub fn service(self: &Arc<Self>, identity: Identity) -> InProcess {
        InProcess {
            server: self.clone(),
            identity: Arc::new(identity),
        }
    }

    /// A tower service with all rights.
    pub fn service_as_admin(self: &Arc<Self>) -> InProcess {
        self.service(Identity::admin("system:admin"))
    }

    /// Answers one request. The identity comes from the request's extensions (set by the TLS edge or by [`InProcess`]) or from
    /// its `Authorization` header.
    pub fn handle<B>(self: &Arc<Self>, request: Request<B>) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let head = request.method() == Method::HEAD;
        let routed: Pin<Box<dyn Future<Output = ApiResult<Response<Body>>> + Send>> =
            Box::pin(self.clone().route(request.map(erase)));
        Box::pin(async move {
            // A bug in one handler must not take the connection, and with it other requests, down.
            let mut response = match AssertUnwindSafe(routed).catch_unwind().await {
                Ok(Ok(response)) => response,
                Ok(Err(e)) => error_response(&e),
                Err(_) => error_response(&ApiError::internal(
                    "the server failed on this request; its log says where",
                )),
            };
            if head {
                *response.body_mut() = full(Bytes::new());
            }
            response
        })
    }

    async fn route(self: Arc<Self>, request: Request<Body>) -> ApiResult<Response<Body>> {
        let (parts, body) = request.into_parts();
        let query = Query::parse(parts.uri.query());
        let info = RequestInfo::parse(&parts.method, parts.uri.path(), &query);
        if info.verb.is_empty() {
            return Err(ApiError::method_not_allowed());
        }

        let identity = match parts.extensions.get::<Arc<Identity>>() {
            Some(identity) => identity.clone(),
            None => Arc::new(authn::from_headers(&self, &parts.headers)?),
        };
        let identity = self.impersonated(identity, &parts.headers)?;
        let attributes = rbac::Attributes::from(&info);
        if self.rbac()?.authorize(&identity, &attributes).is_none() {
            if identity.is_anonymous() {
                return Err(ApiError::unauthorized());
            }
            let why = rbac::denial(&identity, &attributes);
            let mut resource = attributes.resource.clone();
            if attributes.path.is_some() {
                resource.clear();
            }
            return Err(ApiError::forbidden(
                &attributes.group,
                &resource,
                &attributes.name,
                &why,
            ));
        }
        if !info.is_resource {
            return self.non_resource(&parts, &info);
        }

        let registry = self.registry()?;
        let resource = registry
            .get(&info.group, &info.version, &info.resource)
            .cloned()
            .ok_or_else(ApiError::no_such_path)?;
        if !resource.namespaced && info.namespace.is_some() && info.resource != "namespaces" {
            return Err(ApiError::no_such_path());
        }
        if !info.subresource.is_empty() && !resource.has_subresource(&info.subresource) {
            return Err(ApiError::no_such_path());
        }
        let streaming =
            info.verb == "watch" || matches!(info.subresource.as_str(), "exec" | "attach" | "portforward" | "log");
        let _permit = if streaming {
            None
        } else {
            let waited = tokio::time::timeout(
                std::time::Duration::from_secs(10),
                self.in_flight.clone().acquire_owned(),
            )
            .await;
            Some(waited.map_err(|_| ApiError::too_many_requests("Too many requests, please try again later."))?)
        };
        if resource.kind == "Pod" && matches!(info.subresource.as_str(), "exec" | "attach" | "portforward" | "log") {
            return kubelet::proxy(self, identity, info, query, Request::from_parts(parts, body)).await;
        }
        rest::dispatch(
            rest::Cx::new(self.clone(), identity, info, query, resource, parts),
            body,
        )
        .await
    }

    /// `Impersonate-User` and `Impersonate-Group`, for those who may.
    fn impersonated(&self, identity: Arc<Identity>, headers: &http::HeaderMap) -> ApiResult<Arc<Identity>> {
        let text = |v: &header::HeaderValue| {
            v.to_str()
                .map(str::to_owned)
                .map_err(|_| ApiError::bad_request("bad Impersonate header"))
        };
        let groups: Vec<String> = headers
            .get_all("impersonate-group")
            .iter()
            .map(text)
            .collect::<ApiResult<_>>()?;
        // A uid or extras that were left out would give the request a wider identity than was asked for.
        let more = headers
            .keys()
            .any(|k| k.as_str() == "impersonate-uid" || k.as_str().starts_with("impersonate-extra-"));
        let Some(user) = headers.get("impersonate-user").map(text).transpose()? else {
            if groups.is_empty() && !more {
                return Ok(identity);
            }
            return Err(ApiError::bad_request(
                "requested groups or uid without impersonating a user",
            ));
        };
        if more {
            return Err(ApiError::bad_request(
                "impersonating a uid or extra attributes is not supported",
            ));
        }
        if identity.is_anonymous() {
            return Err(ApiError::unauthorized());
        }
        let index = self.rbac()?;
        let mut asks = Vec::new();
        if let Some((ns, name)) = user
            .strip_prefix("system:serviceaccount:")
            .and_then(|r| r.split_once(':'))
        {
            asks.push(("serviceaccounts", ns.to_owned(), name.to_owned()));
        } else {
            asks.push(("users", String::new(), user.clone()));
        }
        asks.extend(groups.iter().map(|g| ("groups", String::new(), g.clone())));
        for (resource, namespace, name) in asks {
            let ask = rbac::Attributes {
                verb: "impersonate".into(),
                resource: resource.into(),
                namespace,
                name: name.clone(),
                ..Default::default()
            };
            if index.authorize(&identity, &ask).is_none() {
                return Err(ApiError::forbidden("", resource, &name, &rbac::denial(&identity, &ask)));
            }
        }
        let mut all = groups;
        let namespace = user
            .strip_prefix("system:serviceaccount:")
            .and_then(|r| r.split_once(':'))
            .map(|(ns, _)| ns);
        if let Some(ns) = namespace.filter(|_| all.is_empty()) {
            all.extend([
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{ns}"),
            ]);
        }
        if user != "system:anonymous" && !all.iter().any(|g| g == "system:authenticated") {
            all.push("system:authenticated".into());
        }
        Ok(Arc::new(Identity {
            username: user,
            groups: all,
            ..Identity::default()
        }))
    }

    fn non_resource(&self, parts: &http::request::Parts, info: &RequestInfo) -> ApiResult<Response<Body>> {
        if !matches!(parts.method, Method::GET | Method::HEAD) {
            return Err(ApiError::method_not_allowed());
        }
        let path = info.path.trim_end_matches('/');
        let steps: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
        let ok = |v: Value| Ok(json_response(200, &v));
        match steps.as_slice() {
            ["healthz" | "livez" | "readyz", ..] => Ok(respond(200, "text/plain; charset=utf-8", "ok")),
            ["version"] => ok(json!({
                "major": "1", "minor": "32", "gitVersion": crate::GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
                "buildDate": "2025-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc",
                "platform": format!("{}/{}", std::env::consts::OS, if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }),
            })),
            [] => ok(
                json!({"paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"]}),
            ),
            ["api"] | ["apis"] => {
                let registry = self.registry()?;
                let core = steps[0] == "api";
                match accepts_aggregated(&parts.headers) {
                    Some(version) => {
                        let doc = discovery::aggregated(&registry, core, version);
                        let kind =
                            format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
                        let mut response = json_response(200, &doc);
                        if let Ok(v) = kind.parse() {
                            response.headers_mut().insert(header::CONTENT_TYPE, v);
                        }
                        response
                            .headers_mut()
                            .insert(header::VARY, header::HeaderValue::from_static("Accept"));
                        Ok(response)
                    }
                    None if core => ok(discovery::core_versions()),
                    None => ok(discovery::group_list(&registry)),
                }
            }
            ["apis", group] => {
                let registry = self.registry()?;
                let g = registry.groups.iter().find(|g| g.name == *group && !g.name.is_empty());
                g.map(|g| json_response(200, &discovery::group(g)))
                    .ok_or_else(ApiError::no_such_path)
            }
            ["api", version] => self.group_version("", version),
            ["apis", group, version] => self.group_version(group, version),
            ["openapi", "v2"] => {
                let accept = parts
                    .headers
                    .get(header::ACCEPT)
                    .and_then(|v| v.to_str().ok())
                    .unwrap_or_default();
                let protobuf = accept.contains(openapi::V2_PROTOBUF);
                // The answer's type is spelt without the "@", which no media type may have.
                let kind = if protobuf {
                    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
                } else {
                    "application/json"
                };
                Ok(respond(200, kind, openapi::v2(protobuf)))
            }
            ["openapi", "v3"] => ok(openapi::index(&*self.registry()?)),
            ["openapi", "v3", "api", version] => self.openapi("", version, parts),
            ["openapi", "v3", "apis", group, version] => self.openapi(group, version, parts),
            [".well-known", "openid-configuration"] => ok(json!({
                "issuer": self.config.issuer,
                "jwks_uri": format!("https://{}/openid/v1/jwks", self.config.advertise),
                "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": [self.signer.jwks()["keys"][0]["alg"]],
            })),
            ["openid", "v1", "jwks"] => {
                let body = self.signer.jwks().to_string();
                Ok(respond(200, "application/jwk-set+json", body))
            }
            _ => Err(ApiError::no_such_path()),
        }
    }

    fn group_version(&self, group: &str, version: &str) -> ApiResult<Response<Body>> {
        let registry = self.registry()?;
        let found = registry
            .groups
            .iter()
            .find(|g| g.name == group)
            .and_then(|g| g.versions.iter().find(|(v, _)| v == version));
        let (_, resources) = found.ok_or_else(ApiError::no_such_path)?;
        Ok(json_response(200, &discovery::resource_list(group, version, resources)))
    }

    fn openapi(&self, group: &str, version: &str, parts: &http::request::Parts) -> ApiResult<Response<Body>> {
        let registry = self.registry()?;
        let found = registry
            .groups
            .iter()
            .find(|g| g.name == group)
            .and_then(|g| g.versions.iter().find(|(v, _)| v == version));
        let (_, resources) = found.ok_or_else(ApiError::no_such_path)?;
        let mut response = json_response(200, &openapi::document(group, version, resources));
        // With the hash of the index in the URL the document never changes.
        if parts.uri.query().is_some_and(|q| q.contains("hash=")) {
            let headers = response.headers_mut();
            headers.insert(
                header::CACHE_CONTROL,
                header::HeaderValue::from_static("public, immutable"),
            );
            headers.insert(
                header::EXPIRES,
                header::HeaderValue::from_static("Fri, 01 Jan 2100 00:00:00 GMT"),
            );
            let tag = format!("\"{}-{}\"", env!("CARGO_PKG_VERSION"), registry.digest);
            if let Ok(v) = tag.parse() {
                headers.insert(header::ETAG, v);
            }
        }
        Ok(response)
    }
}

/// The server as a tower service for one identity, without a connection.
#[derive(Clone)]
pub struct InProcess {
    server: Arc<ApiServer>,
    identity: Arc<Identity>,
}

impl<B> tower::Service<Request<B>> for InProcess
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        request.extensions_mut().insert(self.identity.clone());
        Box::pin(self.server.handle(request).map(Ok))
    }
}
