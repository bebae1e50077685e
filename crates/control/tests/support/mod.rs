//! A control plane in process: the real API server over a store in a temporary directory, `mantletd`'s server on loopback
//! ports, and a proxy's side of CSR and xDS with real TLS and gRPC.

#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use envoy_types::pb::google::protobuf::value::Kind as PbKind;
use envoy_types::pb::google::protobuf::{Struct, Value as PbValue};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use mantlet_apiserver::{ApiServer, BoxIo, Config, Dial, DialTarget, Identity};
use mantlet_control::jwks::guard::Guard;
use mantlet_control::jwks::options::JwksOptions;
use mantlet_control::options::Options;
use mantlet_control::server::{self, Running};
use mantlet_identity::{
    CaMaterial, ClientTlsOptions, ExpectedServer, KeyAlgorithm, PrivateKey, SelfSignedOptions, SpiffeId, TlsIdentity,
    build_csr,
};
use mantlet_runtime::Registry;
use mantlet_xds::ads::{Asks, Backoff, ClientEvent, Connector, run_client_asking};
use mantlet_xds::client::{Change, Decoded, DeltaClient};
use mantlet_xds::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mantlet_xds::istio_ca::{IstioCertificateRequest, IstioCertificateResponse};
use mantlet_xds::{Node, ResourceType};
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Sends webhook calls to wherever the control plane listens now.
#[derive(Default)]
pub struct WebhookDialer {
    pub address: Mutex<Option<SocketAddr>>,
}

impl Dial for WebhookDialer {
    fn dial(&self, _: DialTarget) -> Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send>> {
        let address = *self.address.lock().unwrap();
        Box::pin(async move {
            let address = address.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok(Box::new(TcpStream::connect(address).await?) as BoxIo)
        })
    }
}

/// An API server, and how the control plane reaches it.
pub struct Cluster {
    _dir: tempfile::TempDir,
    pub server: Arc<ApiServer>,
    pub dialer: Arc<WebhookDialer>,
}

impl Cluster {
    /// A fresh cluster with Istio's kinds and the namespaces `istio-system`, `default`, `foo`.
    pub async fn new() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let now = time::OffsetDateTime::now_utc();
        let serial = mantlet_identity::Serial::from_random([7; 16]);
        let ca = CaMaterial::self_signed(&SelfSignedOptions::new("test"), now, serial).unwrap();
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let dialer = Arc::new(WebhookDialer::default());
        let mut config = Config::new(
            dir.path().join("store.redb"),
            ca.certificate_pem(),
            key.to_pem().to_string(),
        );
        config.dialer = Some(dialer.clone());
        let server = ApiServer::open(config).await.unwrap();
        let cluster = Cluster {
            _dir: dir,
            server,
            dialer,
        };
        for crd in mantlet_api::crd::all() {
            cluster.apply(&crd).await;
        }
        let namespaces: Api<Namespace> = Api::all(cluster.client());
        for name in ["istio-system", "foo"] {
            let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            namespaces.create(&PostParams::default(), &namespace).await.unwrap();
        }
        cluster
    }

    /// A client of an administrator.
    pub fn client(&self) -> Client {
        Client::new(self.server.service_as_admin(), "default")
    }

    /// A client with the control plane's own service account.
    pub fn control_client(&self) -> Client {
        let groups = ["system:serviceaccounts", "system:serviceaccounts:istio-system"];
        let identity = Identity::user("system:serviceaccount:istio-system:istiod", &groups);
        Client::new(self.server.service(identity), "default")
    }

    /// Creates or replaces an object (server-side apply).
    pub async fn apply(&self, object: &Value) {
        self.try_apply(object)
            .await
            .unwrap_or_else(|e| panic!("applying {object}: {e}"));
    }

    /// As [`Cluster::apply`], telling the error.
    pub async fn try_apply(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        let (api, name) = self.api_of(object);
        let params = PatchParams::apply("test").force();
        api.patch(&name, &params, &Patch::Apply(object)).await
    }

    /// Deletes an object.
    pub async fn delete(&self, object: &Value) {
        let (api, name) = self.api_of(object);
        api.delete(&name, &Default::default()).await.unwrap();
    }

    /// An object as it is now.
    pub async fn get(&self, object: &Value) -> Option<Value> {
        let (api, name) = self.api_of(object);
        api.get_opt(&name)
            .await
            .unwrap()
            .map(|o| serde_json::to_value(o).unwrap())
    }

    fn api_of(&self, object: &Value) -> (Api<DynamicObject>, String) {
        let version = object["apiVersion"].as_str().unwrap();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let kind = object["kind"].as_str().unwrap();
        let lower = kind.to_lowercase();
        let plural = if let Some(stem) = lower.strip_suffix('y') {
            if lower.ends_with("gateway") {
                format!("{lower}s")
            } else {
                format!("{stem}ies")
            }
        } else {
            format!("{lower}s")
        };
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural);
        let name = object["metadata"]["name"].as_str().unwrap().to_string();
        let api = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
            None => Api::all_with(self.client(), &resource),
        };
        (api, name)
    }

    /// A token of a service account for the mesh CA; the account is created if absent.
    pub async fn token(&self, namespace: &str, account: &str) -> String {
        self.token_bound_to(namespace, account, None).await
    }

    /// As [`Cluster::token`], bound to a pod as the kubelet's are.
    pub async fn token_bound_to(&self, namespace: &str, account: &str, pod: Option<&str>) -> String {
        self.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": namespace}}))
            .await;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        let mut request = json!({"metadata": {}, "spec": {"audiences": ["istio-ca"], "expirationSeconds": 3600}});
        if let Some(pod) = pod {
            request["spec"]["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": pod});
        }
        let request: TokenRequest = serde_json::from_value(request).unwrap();
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .unwrap();
        answer.status.unwrap().token.unwrap()
    }

    /// Starts the control plane and waits until it is ready.
    pub async fn start(&self) -> Control {
        self.start_as(self.client()).await
    }

    /// As [`Cluster::start`], with this client.
    pub async fn start_as(&self, client: Client) -> Control {
        // Tests' issuers are on this machine.
        self.start_guarded(client, Guard::default().with_loopback()).await
    }

    /// As [`Cluster::start_as`], with what may be dialled for keys.
    pub async fn start_guarded(&self, client: Client, guard: Guard) -> Control {
        let any = "127.0.0.1:0".parse().unwrap();
        let options = Options {
            grpc_addr: any,
            secure_grpc_addr: any,
            https_addr: any,
            monitoring_addr: any,
            http_addr: any,
            namespace: "istio-system".into(),
            pod_name: "istiod-1".into(),
            revision: "default".into(),
            cluster_id: "Kubernetes".into(),
            domain: "cluster.local".into(),
            multiple_custom_providers: false,
            keepalive_max_server_connection_age: None,
            jwks: JwksOptions {
                guard,
                ..JwksOptions::default()
            },
            log_output_level: "default:info".into(),
            log_as_json: false,
        };
        let registry = Registry::new();
        let running = server::start(options, client, registry.clone(), None).await.unwrap();
        let ready = tokio::time::timeout(PATIENCE, running.readiness.ready()).await;
        assert!(ready.is_ok(), "not ready: {:?}", running.readiness.pending());
        *self.dialer.address.lock().unwrap() = Some(running.https);
        Control { running, registry }
    }
}

/// A running control plane.
pub struct Control {
    pub running: Running,
    pub registry: Registry,
}

impl Control {
    /// Ends it.
    pub async fn stop(self) {
        self.running.stop(Duration::from_secs(5)).await;
    }

    /// A proxy's TLS with a certificate of this many seconds.
    pub async fn identity(&self, token: &str, seconds: i64) -> TlsIdentity {
        let (response, key) = self.sign_for(token, seconds).await.unwrap();
        TlsIdentity::from_csr_response(&response.cert_chain, &key, self.running.authority.provider()).unwrap()
    }

    /// A proxy's TLS without an own certificate.
    pub fn anonymous(&self) -> TlsIdentity {
        let authority = &self.running.authority;
        TlsIdentity::anonymous(authority.material().bundle().clone(), authority.provider())
    }

    /// Asks for a certificate; the CSR names somebody else on purpose.
    pub async fn sign(&self, token: &str) -> Result<(IstioCertificateResponse, PrivateKey), Status> {
        self.sign_for(token, 3600).await
    }

    /// As [`Control::sign`], for this many seconds.
    pub async fn sign_for(&self, token: &str, seconds: i64) -> Result<(IstioCertificateResponse, PrivateKey), Status> {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let other = SpiffeId::parse("spiffe://cluster.local/ns/kube-system/sa/admin").unwrap();
        let mut request = Request::new(IstioCertificateRequest {
            csr: build_csr(&key, &other).unwrap(),
            validity_duration: seconds,
            metadata: None,
        });
        let bearer = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let channel = tls_channel(self.running.secure_grpc, &self.anonymous()).await.unwrap();
        let mut client = IstioCertificateServiceClient::new(channel);
        let response = client.create_certificate(request).await?.into_inner();
        Ok((response, key))
    }

    /// GET of a path of the debug port; status and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        use http_body_util::{BodyExt, Empty};
        let stream = TcpStream::connect(self.running.http).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get(path)
            .header("host", "x")
            .body(Empty::<bytes::Bytes>::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Rows of /debug/syncz.
    pub async fn syncz(&self) -> Vec<Value> {
        let (status, body) = self.get("/debug/syncz").await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// A channel to 15012.
pub async fn tls_channel(address: SocketAddr, identity: &TlsIdentity) -> Result<Channel, String> {
    let config = identity
        .client(&ClientTlsOptions {
            expected: ExpectedServer::ServerName,
            alpn: vec![b"h2".to_vec()],
            present_certificate: !identity.chain().is_empty(),
            min_tls13: false,
        })
        .unwrap();
    let connector = tower::service_fn(move |_: http::Uri| {
        let config = config.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("istiod.istio-system.svc").unwrap();
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
            Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Channel::from_static("http://istiod.istio-system.svc:15012")
        .connect_with_connector(connector)
        .await
        .map_err(|e| format!("{e:?}"))
}

/// How a test proxy connects.
pub struct Dialer {
    pub address: Mutex<SocketAddr>,
    pub identity: Option<TlsIdentity>,
    pub token: Option<String>,
}

#[tonic::async_trait]
impl Connector for Dialer {
    async fn connect(&self) -> Result<(Channel, MetadataMap), String> {
        let address = *self.address.lock().unwrap();
        let channel = match &self.identity {
            Some(identity) => tls_channel(address, identity).await?,
            None => Channel::from_shared(format!("http://{address}"))
                .unwrap()
                .connect()
                .await
                .map_err(|e| e.to_string())?,
        };
        let mut metadata = MetadataMap::new();
        if let Some(token) = &self.token {
            metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        Ok((channel, metadata))
    }
}

/// A node as Istio's proxies describe themselves.
pub fn node(kind: &str, name: &str, namespace: &str, account: &str, labels: &[(&str, &str)]) -> Node {
    let text = |t: &str| PbValue {
        kind: Some(PbKind::StringValue(t.to_string())),
    };
    let labels = Struct {
        fields: labels.iter().map(|(k, v)| (k.to_string(), text(v))).collect(),
    };
    let fields = [
        ("NAMESPACE".to_string(), text(namespace)),
        ("SERVICE_ACCOUNT".to_string(), text(account)),
        ("CLUSTER_ID".to_string(), text("Kubernetes")),
        ("ISTIO_VERSION".to_string(), text("1.28.0")),
        ("MANTLET".to_string(), text("true")),
        (
            "LABELS".to_string(),
            PbValue {
                kind: Some(PbKind::StructValue(labels)),
            },
        ),
    ];
    Node {
        id: format!("{kind}~10.0.0.9~{name}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct {
            fields: fields.into_iter().collect(),
        }),
        ..Node::default()
    }
}

/// A proxy's subscription, with what it has received.
pub struct Proxy {
    events: mpsc::Receiver<ClientEvent>,
    /// Key sets that lack the key of a token.
    pub unknown_keys: mpsc::Sender<String>,
    pub dialer: Arc<Dialer>,
    stop: CancellationToken,
    /// Names of listeners, clusters, … held now.
    pub held: BTreeMap<ResourceType, BTreeMap<String, Decoded>>,
    /// Refuse the next response of this type with this text.
    pub refuse: Option<(ResourceType, String)>,
}

/// What a step of the subscription was.
#[derive(Debug, PartialEq)]
pub enum Step {
    Connected,
    /// Type, names that changed, names that went.
    Update(ResourceType, Vec<String>, Vec<String>),
    Disconnected(String),
    Refused(String),
}

impl Proxy {
    /// Connects and stays connected.
    pub fn start(node: Node, dialer: Dialer) -> Proxy {
        let (tx, events) = mpsc::channel(64);
        let dialer = Arc::new(dialer);
        let stop = CancellationToken::new();
        let backoff = Backoff {
            first: Duration::from_millis(20),
            max: Duration::from_millis(200),
        };
        let (unknown_keys, reports) = mpsc::channel(16);
        let asks = Asks {
            unknown_keys: reports,
            ..Asks::none()
        };
        let client = DeltaClient::new(node);
        tokio::spawn(run_client_asking(
            client,
            dialer.clone(),
            backoff,
            tx,
            asks,
            stop.clone(),
        ));
        Proxy {
            unknown_keys,
            events,
            dialer,
            stop,
            held: BTreeMap::new(),
            refuse: None,
        }
    }

    /// The next event, answered.
    pub async fn step(&mut self) -> Step {
        let event = tokio::time::timeout(PATIENCE, self.events.recv())
            .await
            .expect("no event of the xDS client in time")
            .expect("the xDS client ended");
        match event {
            ClientEvent::Connected => Step::Connected,
            ClientEvent::Disconnected { reason } => Step::Disconnected(reason),
            ClientEvent::Refused { message } => Step::Refused(message),
            ClientEvent::Update(update) => {
                let (kind, changes, answer) = update.into_parts();
                if let Some((_, reason)) = self.refuse.take_if(|(k, _)| *k == kind) {
                    answer.send(Err(reason.clone()));
                    return Step::Refused(reason);
                }
                let (mut set, mut gone) = (Vec::new(), Vec::new());
                for change in changes {
                    match change {
                        Change::Upsert(decoded) => {
                            let name = name_of(&decoded);
                            set.push(name.clone());
                            self.held.entry(kind).or_default().insert(name, decoded);
                        }
                        Change::Missing(_, name) => gone.push(name),
                        Change::Remove(kind, name) => {
                            self.held.entry(kind).or_default().remove(&name);
                            gone.push(name);
                        }
                    }
                }
                answer.send(Ok(()));
                set.sort();
                gone.sort();
                Step::Update(kind, set, gone)
            }
        }
    }

    /// Steps until `done` holds of what was received.
    pub async fn until(&mut self, what: &str, mut done: impl FnMut(&Proxy) -> bool) -> Vec<Step> {
        let mut steps = Vec::new();
        while !done(self) {
            let step = tokio::time::timeout(PATIENCE, self.step()).await;
            steps.push(step.unwrap_or_else(|_| panic!("gave up waiting: {what}")));
        }
        steps
    }

    /// A listener that is held.
    pub fn listener(&self, name: &str) -> Option<&mantlet_model::Listener> {
        match self.held.get(&ResourceType::Listener)?.get(name)? {
            Decoded::Listener(listener) => Some(listener),
            _ => None,
        }
    }

    /// A cluster that is held.
    pub fn cluster(&self, name: &str) -> Option<&mantlet_model::Cluster> {
        match self.held.get(&ResourceType::Cluster)?.get(name)? {
            Decoded::Cluster(cluster) => Some(cluster),
            _ => None,
        }
    }

    /// Disconnects.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn name_of(decoded: &Decoded) -> String {
    match decoded {
        Decoded::Listener(l) => l.name.clone(),
        Decoded::Cluster(c) => c.name.clone(),
        Decoded::Endpoints(e) => e.cluster.clone(),
        Decoded::Routes(r) => r.name.clone(),
        Decoded::VirtualHost(name, _) => name.clone(),
        Decoded::Secret(s) => s.name.clone(),
        Decoded::Destinations(d) => d.name.clone(),
    }
}
