//! The control plane as a whole: what is started, in which order, and how it ends.
//!
//! `main` and the tests call [`start`]. Order: certificate authority (nothing works without it) → hub and watches → listeners.
//! Ready when the caches are complete and the CA is there; streams are admitted from then on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use mantlet_identity::{SpiffeIdError, TrustDomain, TrustDomainRule};
use mantlet_runtime::{Drain, DrainWatch, LogHandle, Readiness, Registry};
use mantlet_translate::mesh::Mesh;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::auth::{
    Authenticators, ClientCertAuthenticator, Clock, KubeTokenAuthenticator, KubeTokenReviewer, PlainIncoming,
    SystemClock, TlsIncoming,
};
use crate::ca::{Authority, CaLoadError, CaOptions, CaService, KubeSecrets, OptionError, ServerCert, root_configmap};
use crate::debug::Debug;
use crate::discovery::ads::AdsBackend;
use crate::discovery::board::Board;
use crate::discovery::hub::Hub;
use crate::discovery::metrics::PilotMetrics;
use crate::discovery::secrets::{self, SecretWants};
use crate::discovery::status;
use crate::discovery::watch::Watches;
use crate::jwks::Resolver;
use crate::jwks::fetch::Fetcher;
use crate::options::Options;
use crate::webhook::config::InjectorConfig;
use crate::webhook::{Webhooks, ca_bundle};

/// Streams that one connection may open.
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// How often gRPC connections are probed.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Why the control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener cannot be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The mesh configuration cannot be read; it decides about identities, so nothing is guessed.
    #[error("ConfigMap {namespace}/{name}: {reason}")]
    Mesh {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A setting of the environment is bad.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// No TLS configuration for fetching key sets.
    #[error("fetching key sets: {0}")]
    Fetcher(rustls::Error),
    /// The certificate authority has no usable material.
    #[error("certificate authority: {0}")]
    Ca(#[from] CaLoadError),
    /// The control plane's own certificate cannot be made.
    #[error("own certificate: {0}")]
    Certificate(#[from] mantlet_identity::Error),
    /// The trust domain is no trust domain.
    #[error("trust domain: {0}")]
    TrustDomain(#[from] SpiffeIdError),
}

/// A running control plane.
pub struct Running {
    /// Where plaintext xDS listens.
    pub grpc: SocketAddr,
    /// Where xDS and CA listen with TLS.
    pub secure_grpc: SocketAddr,
    /// Where webhooks listen.
    pub https: SocketAddr,
    /// Where metrics are.
    pub monitoring: SocketAddr,
    /// Where readiness and debugging are.
    pub http: SocketAddr,
    /// What readiness waits for.
    pub readiness: Readiness,
    /// The certificate authority.
    pub authority: Arc<Authority>,
    hub: Hub,
    drain: Drain,
    tasks: JoinSet<()>,
}

impl Running {
    /// Ends in order: no new streams, then the open ones, then the rest; at most `limit`.
    pub async fn stop(mut self, limit: Duration) {
        self.drain.announce();
        self.hub.close();
        let ended = self.drain.drain(limit).await;
        if !ended {
            tracing::warn!(target: "server", "connections were still open after {limit:?}");
        }
        self.tasks.shutdown().await;
    }

    /// Returns when a part of the control plane has ended by itself, which it never should.
    pub async fn failed(&mut self) {
        let ended = self.tasks.join_next().await;
        if let Some(Err(error)) = ended {
            tracing::error!(target: "server", "a part of the control plane failed: {error}");
        }
    }
}

/// Starts everything.
///
/// # Errors
/// When a listener, the mesh configuration or the certificate authority is not to be had.
pub async fn start(
    options: Options,
    client: Client,
    registry: Registry,
    log: Option<LogHandle>,
) -> Result<Running, StartError> {
    // Listeners first: a taken port is a mistake that should show at once.
    let grpc = listen(options.grpc_addr).await?;
    let secure_grpc = listen(options.secure_grpc_addr).await?;
    let https = listen(options.https_addr).await?;
    let monitoring = listen(options.monitoring_addr).await?;
    let http = listen(options.http_addr).await?;

    let readiness = Readiness::new();
    let started = readiness.register("start");
    let (drain, watch) = Drain::new();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let mut tasks = JoinSet::new();

    let mesh = read_mesh(&client, &options).await?;
    let trust_domain = TrustDomain::from_config(&mesh.trust_domain)?;
    let ca_options = CaOptions::from_env(trust_domain.clone(), &options.namespace, &options.revision)?;
    let audiences = ca_options.token_audiences.clone();
    let root_name = ca_options.root_configmap.clone();
    let store = Arc::new(KubeSecrets::new(client.clone(), &options.namespace));
    let authority = Authority::start(ca_options, store, clock.clone(), &registry).await?;
    let (_, rule) = trust(mesh.accepted_trust_domains())?;
    let cert = ServerCert::start(authority.clone(), rule)?;
    tasks.spawn(root_configmap::run(client.clone(), root_name, authority.bundle_watch()));

    let metrics = PilotMetrics::new(&registry);
    let board = Board::new(metrics.clone(), &options.pod_name);
    let (wants, requests) = SecretWants::channel();
    let hub = Hub::start(mesh.clone(), metrics.clone(), board.clone(), wants).map_err(StartError::Thread)?;
    let watched = hub.clone();
    tasks.spawn(async move {
        watched.ended().await;
        tracing::error!(target: "server", "the hub has failed");
    });
    tasks.spawn(secrets::run(client.clone(), hub.clone(), requests));
    let (jobs, statuses) = mpsc::unbounded_channel();
    tasks.spawn(status::run(client.clone(), hub.clone(), board.clone(), statuses));
    tasks.spawn(crate::discovery::unread::run(client.clone()));
    let jwks = options.jwks.clone().with_env(|name| std::env::var(name).ok())?;
    let fetcher = Fetcher::new(&jwks).map_err(StartError::Fetcher)?;
    let sink = hub.clone();
    let (keys, task) = Resolver::new(
        &jwks,
        fetcher,
        hub.key_needs(),
        &registry,
        Box::new(move |update| sink.change(move |world| update.apply(world))),
    );
    tasks.spawn(task.run());
    let watches = Watches {
        keys: keys.clone(),
        client: client.clone(),
        hub: hub.clone(),
        board: board.clone(),
        metrics: metrics.clone(),
        readiness: readiness.clone(),
        status: jobs,
        namespace: options.namespace.clone(),
        mesh_configmap: options.mesh_configmap(),
        base: mesh,
    };
    let mut kinds = watches.start();
    tasks.spawn(async move { while kinds.join_next().await.is_some() {} });

    let reviewer = Arc::new(KubeTokenReviewer::new(client.clone()));
    let tokens = Arc::new(KubeTokenAuthenticator::new(
        trust_domain,
        &options.cluster_id,
        reviewer,
        audiences,
        clock.clone(),
    ));
    let authenticators = Authenticators::new(vec![
        Arc::new(ClientCertAuthenticator::new(clock.clone())),
        tokens.clone(),
    ]);
    tasks.spawn(follow_trust_domains(hub.trust_domains(), tokens, cert.clone()));
    let backend = |auth: Option<Authenticators>| {
        let backend = AdsBackend::new(
            hub.clone(),
            board.clone(),
            metrics.clone(),
            readiness.clone(),
            clock.clone(),
            auth,
            options.pod_name.clone(),
        );
        Arc::new(backend.telling(keys.clone()))
    };

    let injector = InjectorConfig::default();
    tasks.spawn(
        injector
            .clone()
            .run(client.clone(), options.namespace.clone(), options.revision.clone()),
    );
    let owner = ca_bundle::Owner {
        namespace: options.namespace.clone(),
        services: options.services(),
    };
    tasks.spawn(ca_bundle::run(client, owner, authority.bundle_watch()));

    let debug = Debug {
        hub: hub.clone(),
        board: board.clone(),
        readiness: readiness.clone(),
        registry: registry.clone(),
        keys: keys.clone(),
        log,
    };
    let running = Running {
        grpc: local(&grpc, options.grpc_addr),
        secure_grpc: local(&secure_grpc, options.secure_grpc_addr),
        https: local(&https, options.https_addr),
        monitoring: local(&monitoring, options.monitoring_addr),
        http: local(&http, options.http_addr),
        readiness: readiness.clone(),
        authority: authority.clone(),
        hub: hub.clone(),
        drain,
        tasks: JoinSet::new(),
    };
    tasks.spawn(debug.routes().serve(http, watch.clone()));
    tasks.spawn(debug.routes().serve(monitoring, watch.clone()));
    tasks.spawn(Webhooks::new(injector, &registry).serve(https, cert.clone(), watch.clone()));
    let plain = mantlet_xds::ads::service(backend(None));
    tasks.spawn(serve(
        "15010",
        grpc_server()
            .add_service(plain)
            .serve_with_incoming_shutdown(PlainIncoming(grpc), stopped(watch.clone())),
    ));
    let ca = CaService::new(authority, authenticators.clone()).into_server();
    let secure = mantlet_xds::ads::service(backend(Some(authenticators)));
    let incoming = TlsIncoming::new(secure_grpc, Arc::new(move || cert.grpc_config()));
    tasks.spawn(serve(
        "15012",
        grpc_server()
            .add_service(ca)
            .add_service(secure)
            .serve_with_incoming_shutdown(incoming, stopped(watch)),
    ));
    started.done();
    Ok(Running { tasks, ..running })
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen { address, source })
}

fn local(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

fn grpc_server() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

async fn serve(name: &'static str, server: impl Future<Output = Result<(), tonic::transport::Error>>) {
    if let Err(error) = server.await {
        tracing::error!(target: "server", "gRPC on {name}: {error}");
    }
}

/// The first trust domain, and the rule that accepts all of them.
fn trust(domains: impl IntoIterator<Item: AsRef<str>>) -> Result<(TrustDomain, TrustDomainRule), SpiffeIdError> {
    let all: Result<Vec<TrustDomain>, _> = domains
        .into_iter()
        .map(|d| TrustDomain::from_config(d.as_ref()))
        .collect();
    let all = all?;
    let first = all.first().cloned().map_or_else(|| TrustDomain::from_config(""), Ok)?;
    Ok((first, TrustDomainRule::one_of(all)))
}

/// New certificates are of the trust domain that the mesh configuration names now; those of the former one are accepted while
/// it is among the aliases.
async fn follow_trust_domains(
    mut domains: tokio::sync::watch::Receiver<Vec<String>>,
    tokens: Arc<KubeTokenAuthenticator>,
    cert: Arc<ServerCert>,
) {
    while domains.changed().await.is_ok() {
        let now = domains.borrow_and_update().clone();
        match trust(&now) {
            Ok((own, rule)) => {
                tracing::info!(target: "ca", "trust domain {own}, accepted: {}", now.join(", "));
                tokens.set_trust_domain(own);
                if let Err(error) = cert.set_trust_domains(rule) {
                    tracing::error!(target: "ca", "the control plane's own certificate cannot be renewed: {error}");
                }
            }
            Err(error) => tracing::error!(target: "ca", "the trust domain stays as it was: {error}"),
        }
    }
    // The hub is gone, and with it the process.
    std::future::pending::<()>().await;
}

async fn stopped(mut watch: DrainWatch) {
    watch.draining().await;
}

/// The mesh configuration at start. It names the trust domain, so it is waited for as long as the API server cannot be
/// asked; a missing ConfigMap means Istio's defaults.
async fn read_mesh(client: &Client, options: &Options) -> Result<Mesh, StartError> {
    use k8s_openapi::api::core::v1::ConfigMap;
    let name = options.mesh_configmap();
    let api: kube::Api<ConfigMap> = kube::Api::namespaced(client.clone(), &options.namespace);
    let mut backoff = mantlet_runtime::Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let found = loop {
        match api.get_opt(&name).await {
            Ok(found) => break found,
            Err(error) => {
                tracing::warn!(target: "server", "reading ConfigMap {name}: {error}");
                backoff.sleep().await;
            }
        }
    };
    let base = Mesh {
        root_namespace: options.namespace.clone(),
        cluster: options.cluster_id.clone(),
        domain: options.domain.clone(),
        multiple_custom_providers: options.multiple_custom_providers,
        ..Mesh::default()
    };
    match found {
        None => Ok(base),
        Some(map) => crate::discovery::watch::read_mesh(&map, &base).map_err(|reason| StartError::Mesh {
            namespace: options.namespace.clone(),
            name,
            reason,
        }),
    }
}
