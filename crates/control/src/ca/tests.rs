//! The CA end to end without Kubernetes: real TLS and gRPC, a Secret store in memory that can fail, a clock that can be
//! moved.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use mantlet_identity::{
    CaMaterial, ClientTlsOptions, ExpectedServer, KeyAlgorithm, PeerCertificate, PrivateKey, SelfSignedOptions,
    SpiffeId, TlsIdentity, TrustDomain, TrustDomainRule, build_csr,
};
use mantlet_runtime::Registry;
use mantlet_xds::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mantlet_xds::istio_ca::{IstioCertificateRequest, IstioCertificateResponse};
use rustls_pki_types::ServerName;
use time::{Duration, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::material::random_serial;
use super::*;
use crate::auth::{
    Authenticators, ClientCertAuthenticator, Clock, KubeTokenAuthenticator, PodRef, ReviewError, ReviewedToken,
    TlsIncoming, TokenReviewer,
};

/// A clock that moves only when told to.
struct TestClock(AtomicI64);

impl TestClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(OffsetDateTime::now_utc().unix_timestamp())))
    }
    fn advance(&self, by: Duration) {
        self.0.fetch_add(by.whole_seconds(), SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.0.load(SeqCst)).unwrap()
    }
}

/// Secrets in memory, with versions; the next operations fail with the queued errors.
#[derive(Debug, Default)]
struct Memory {
    secrets: Mutex<BTreeMap<String, CaSecret>>,
    failures: Mutex<Vec<SecretError>>,
    writes: AtomicUsize,
}

impl Memory {
    fn fail(&self) -> Result<(), SecretError> {
        self.failures.lock().unwrap().pop().map_or(Ok(()), Err)
    }
    fn put(&self, name: &str, mut secret: CaSecret) {
        secret.resource_version = self.writes.fetch_add(1, SeqCst).to_string();
        self.secrets.lock().unwrap().insert(name.to_owned(), secret);
    }
    fn stored(&self, name: &str) -> Option<CaSecret> {
        self.secrets.lock().unwrap().get(name).cloned()
    }
}

#[tonic::async_trait]
impl SecretStore for Memory {
    async fn get(&self, name: &str) -> Result<Option<CaSecret>, SecretError> {
        self.fail()?;
        Ok(self.stored(name))
    }
    async fn create(&self, name: &str, kind: &str, secret: &CaSecret) -> Result<(), SecretError> {
        assert_eq!(kind, "istio.io/ca-root");
        self.fail()?;
        if self.stored(name).is_some() {
            return Err(SecretError::AlreadyExists);
        }
        self.put(name, secret.clone());
        Ok(())
    }
    async fn update(&self, name: &str, secret: &CaSecret) -> Result<(), SecretError> {
        self.fail()?;
        match self.stored(name) {
            Some(stored) if stored.resource_version == secret.resource_version => {
                self.put(name, secret.clone());
                Ok(())
            }
            _ => Err(SecretError::Conflict),
        }
    }
}

/// Answers for known tokens, and counts.
#[derive(Default)]
struct Reviewer {
    known: Mutex<BTreeMap<String, ReviewedToken>>,
    asked: AtomicUsize,
}

impl Reviewer {
    fn know(&self, token: &str, username: &str, audience: &str) {
        let reviewed = ReviewedToken {
            username: username.to_owned(),
            groups: vec!["system:serviceaccounts".to_owned(), "system:authenticated".to_owned()],
            audiences: vec![audience.to_owned()],
            pod: Some(PodRef {
                name: "sleep-1".to_owned(),
                uid: "u".to_owned(),
            }),
        };
        self.known.lock().unwrap().insert(token.to_owned(), reviewed);
    }
}

#[tonic::async_trait]
impl TokenReviewer for Reviewer {
    async fn review(&self, token: &str, audiences: &[String]) -> Result<ReviewedToken, ReviewError> {
        assert_eq!(audiences, ["istio-ca"]);
        self.asked.fetch_add(1, SeqCst);
        let known = self.known.lock().unwrap().get(token).cloned();
        known.ok_or_else(|| ReviewError::Refused("invalid bearer token".to_owned()))
    }
}

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn options() -> CaOptions {
    CaOptions {
        root_ca_dir: "/nonexistent".into(),
        ..CaOptions::new(trust_domain(), "istio-system", "default")
    }
}

fn sleep_id() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/default/sa/sleep").unwrap()
}

struct Bench {
    clock: Arc<TestClock>,
    secrets: Arc<Memory>,
    reviewer: Arc<Reviewer>,
    registry: Registry,
    ca: Arc<Authority>,
    cert: Arc<ServerCert>,
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Bench {
    async fn new(options: CaOptions) -> Self {
        let (clock, secrets, registry) = (TestClock::new(), Arc::new(Memory::default()), Registry::new());
        let ca = Authority::load(options, secrets.clone(), clock.clone(), &registry)
            .await
            .unwrap();
        let cert = ServerCert::new(ca.clone(), TrustDomainRule::one_of([trust_domain()])).unwrap();
        let reviewer = Arc::new(Reviewer::default());
        let authenticators = Authenticators::new(vec![
            Arc::new(ClientCertAuthenticator::new(clock.clone())),
            Arc::new(KubeTokenAuthenticator::new(
                trust_domain(),
                "Kubernetes",
                reviewer.clone(),
                vec!["istio-ca".to_owned()],
                clock.clone(),
            )),
        ]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let source = cert.clone();
        let incoming = TlsIncoming::new(listener, Arc::new(move || source.grpc_config()));
        let service = CaService::new(ca.clone(), authenticators).into_server();
        let server = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Self {
            clock,
            secrets,
            reviewer,
            registry,
            ca,
            cert,
            address,
            server,
        }
    }

    async fn client(&self, identity: &TlsIdentity) -> Result<IstioCertificateServiceClient<Channel>, String> {
        let address = self.address;
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
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let channel = Channel::from_static("http://istiod.istio-system.svc:15012")
            .connect_with_connector(connector)
            .await
            .map_err(|e| format!("{e:?}"))?;
        Ok(IstioCertificateServiceClient::new(channel))
    }

    fn anonymous(&self) -> TlsIdentity {
        TlsIdentity::anonymous(self.ca.material().bundle().clone(), self.ca.provider())
    }

    async fn ask(
        &self,
        token: Option<&str>,
        change: impl FnOnce(&mut Request<IstioCertificateRequest>),
    ) -> Result<IstioCertificateResponse, Status> {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let csr = build_csr(
            &key,
            &SpiffeId::parse("spiffe://cluster.local/ns/kube-system/sa/admin").unwrap(),
        )
        .unwrap();
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: 3600,
            metadata: None,
        });
        if let Some(token) = token {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        change(&mut request);
        let mut client = self.client(&self.anonymous()).await.unwrap();
        client
            .create_certificate(request)
            .await
            .map(tonic::Response::into_inner)
    }

    fn metric(&self, name: &str) -> u64 {
        self.registry.counter(name, "", &[]).total(&[])
    }
}

fn leaf(response: &IstioCertificateResponse) -> PeerCertificate {
    let der = mantlet_identity::pem::read_certificates("leaf", response.cert_chain[0].as_bytes()).unwrap();
    PeerCertificate::parse(&der[0]).unwrap()
}

#[tokio::test]
async fn a_pod_gets_its_own_identity_and_never_the_one_it_asks_for() {
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("good", "system:serviceaccount:default:sleep", "istio-ca");
    let response = bench.ask(Some("good"), |_| {}).await.unwrap();
    assert_eq!(response.cert_chain.len(), 2);
    assert_eq!(response.cert_chain[1], bench.ca.ca_bundle_pem());
    let leaf = leaf(&response);
    assert_eq!(leaf.uris, [sleep_id().as_str()], "the CSR said kube-system/admin");
    assert_eq!(
        leaf.not_after - leaf.not_before,
        Duration::hours(1) + Duration::minutes(2)
    );
    assert_eq!(bench.metric("citadel_server_csr_count"), 1);
    assert_eq!(bench.metric("citadel_server_success_cert_issuance_count"), 1);
}

#[tokio::test]
async fn a_certificate_renews_itself_without_a_token() {
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("good", "system:serviceaccount:default:sleep", "istio-ca");
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let csr = build_csr(&key, &sleep_id()).unwrap();
    let response = bench
        .ask(Some("good"), |r| r.get_mut().csr = csr.clone())
        .await
        .unwrap();
    let identity = TlsIdentity::from_csr_response(&response.cert_chain, &key, bench.ca.provider()).unwrap();
    let mut client = bench.client(&identity).await.unwrap();
    let request = || IstioCertificateRequest {
        csr: csr.clone(),
        validity_duration: 0,
        metadata: None,
    };
    let renewed = client.create_certificate(request()).await.unwrap().into_inner();
    assert_eq!(leaf(&renewed).uris, [sleep_id().as_str()]);
    assert_eq!(
        leaf(&renewed).not_after,
        bench.clock.now() + Duration::hours(24),
        "the default lifetime"
    );
    assert_eq!(bench.reviewer.asked.load(SeqCst), 1);

    // The same connection, after the certificate's end: the proof is gone although the connection is not.
    bench.clock.advance(Duration::hours(2));
    let status = client.create_certificate(request()).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unauthenticated, "request authenticate failure")
    );
}

#[tokio::test]
async fn callers_without_proof_get_nothing_and_learn_nothing() {
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("other-audience", "system:serviceaccount:default:sleep", "kubernetes");
    bench.reviewer.know("human", "alice", "istio-ca");
    bench
        .reviewer
        .know("colons", "system:serviceaccount:default:sleep:more", "istio-ca");
    bench
        .reviewer
        .know("odd", "system:serviceaccount:default:../../x", "istio-ca");
    bench.reviewer.know("empty", "system:serviceaccount::", "istio-ca");
    bench.reviewer.known.lock().unwrap().insert(
        "no-group".to_owned(),
        ReviewedToken {
            username: "system:serviceaccount:default:sleep".to_owned(),
            groups: vec![],
            audiences: vec!["istio-ca".to_owned()],
            pod: None,
        },
    );
    let tokens = [
        None,
        Some("unknown"),
        Some("other-audience"),
        Some("human"),
        Some("colons"),
        Some("odd"),
        Some("empty"),
        Some("no-group"),
    ];
    for token in tokens {
        let status = bench.ask(token, |_| {}).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unauthenticated, "request authenticate failure"),
            "{token:?}"
        );
    }
    for raw in ["good", "Basic good", "Bearer", "Bearer ", "BearerX good"] {
        bench
            .reviewer
            .know("good", "system:serviceaccount:default:sleep", "istio-ca");
        let status = bench
            .ask(None, |r| {
                r.metadata_mut().insert("authorization", raw.parse().unwrap());
            })
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{raw:?}");
    }
    let long = "x".repeat(17_000);
    assert!(bench.ask(Some(&long), |_| {}).await.is_err());
    let foreign_cluster = |r: &mut Request<IstioCertificateRequest>| {
        r.metadata_mut().insert("clusterid", "elsewhere".parse().unwrap());
    };
    assert_eq!(
        bench.ask(Some("good"), foreign_cluster).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let own_cluster = |r: &mut Request<IstioCertificateRequest>| {
        r.metadata_mut().insert("clusterid", "Kubernetes".parse().unwrap());
    };
    bench.ask(Some("good"), own_cluster).await.unwrap();
    assert_eq!(bench.metric("citadel_server_success_cert_issuance_count"), 1);
    // The over-long token is stopped by HTTP/2's bound on headers before it is anyone's.
    assert_eq!(bench.metric("citadel_server_authentication_failure_count"), 14);
}

#[tokio::test]
async fn a_certificate_of_a_foreign_ca_does_not_even_connect() {
    let bench = Bench::new(options()).await;
    let foreign = CaMaterial::self_signed(
        &SelfSignedOptions::new("cluster.local"),
        bench.clock.now(),
        random_serial(),
    )
    .unwrap();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let csr = mantlet_identity::Csr::from_pem(&build_csr(&key, &sleep_id()).unwrap()).unwrap();
    let issued = foreign
        .issue(&mantlet_identity::IssueRequest {
            csr: &csr,
            names: &[mantlet_identity::SubjectAltName::Spiffe(sleep_id())],
            ttl: Duration::hours(1),
            now: bench.clock.now(),
            serial: random_serial(),
        })
        .unwrap();
    let identity = TlsIdentity::from_csr_response(&issued.to_response(), &key, bench.ca.provider())
        .unwrap()
        .with_bundle(bench.ca.material().bundle().clone());
    let refused = match bench.client(&identity).await {
        Err(_) => true,
        // In TLS 1.3 the client may learn it only with the first answer.
        Ok(mut client) => {
            let request = IstioCertificateRequest {
                csr: String::new(),
                validity_duration: 0,
                metadata: None,
            };
            client.create_certificate(request).await.unwrap_err().code() != Code::InvalidArgument
        }
    };
    assert!(refused);
    assert_eq!(
        bench.metric("citadel_server_csr_count"),
        0,
        "no request reached the service"
    );
}

#[tokio::test]
async fn bad_requests_get_istios_codes_and_texts() {
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("good", "system:serviceaccount:default:sleep", "istio-ca");
    let status = bench
        .ask(Some("good"), |r| r.get_mut().validity_duration = 2161 * 3600)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        status.message(),
        "CSR signing error (requested TTL 2161h0m0s is greater than the max allowed TTL 2160h0m0s)"
    );
    let huge = bench
        .ask(Some("good"), |r| r.get_mut().validity_duration = i64::MAX)
        .await
        .unwrap_err();
    assert_eq!(huge.code(), Code::InvalidArgument);
    bench
        .ask(Some("good"), |r| r.get_mut().validity_duration = 2160 * 3600)
        .await
        .unwrap();
    bench
        .ask(Some("good"), |r| r.get_mut().validity_duration = i64::MIN)
        .await
        .unwrap();
    for csr in [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ] {
        let status = bench
            .ask(Some("good"), |r| r.get_mut().csr = csr.to_owned())
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{csr:?}");
        assert!(
            status.message().starts_with("CSR signing error ("),
            "{}",
            status.message()
        );
    }
    let large = bench
        .ask(Some("good"), |r| r.get_mut().csr = "x".repeat(100_000))
        .await
        .unwrap_err();
    assert_eq!(large.code(), Code::OutOfRange, "{large:?}");
    let signing = bench
        .registry
        .counter("citadel_server_csr_sign_err_count", "", &["error"]);
    assert_eq!((signing.total(&["TTL_ERROR"]), signing.total(&["CSR_ERROR"])), (2, 3));
}

#[tokio::test]
async fn impersonation_is_refused() {
    use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("good", "system:serviceaccount:istio-system:ztunnel", "istio-ca");
    for kind in [
        Kind::StringValue("spiffe://cluster.local/ns/default/sa/sleep".to_owned()),
        Kind::NumberValue(1.0),
    ] {
        let fields = [("ImpersonatedIdentity".to_owned(), Value { kind: Some(kind) })]
            .into_iter()
            .collect();
        let status = bench
            .ask(Some("good"), |r| r.get_mut().metadata = Some(Struct { fields }))
            .await
            .unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unauthenticated, "request impersonation authentication failure")
        );
    }
}

#[tokio::test]
async fn reviews_are_remembered_briefly_and_never_beyond_the_tokens_end() {
    use base64::Engine;
    let bench = Bench::new(options()).await;
    let exp = bench.clock.now().unix_timestamp() + 20;
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{exp}}}"));
    let short = format!("e30.{payload}.sig");
    bench
        .reviewer
        .know(&short, "system:serviceaccount:default:sleep", "istio-ca");
    bench
        .reviewer
        .know("long", "system:serviceaccount:default:sleep", "istio-ca");
    for _ in 0..3 {
        bench.ask(Some(&short), |_| {}).await.unwrap();
        bench.ask(Some("long"), |_| {}).await.unwrap();
    }
    assert_eq!(bench.reviewer.asked.load(SeqCst), 2);
    bench.clock.advance(Duration::seconds(21));
    bench.ask(Some("long"), |_| {}).await.unwrap();
    assert_eq!(bench.reviewer.asked.load(SeqCst), 2);
    assert!(
        bench.ask(Some(&short), |_| {}).await.is_err(),
        "the token is over, whatever the API server says"
    );
    bench.clock.advance(Duration::seconds(10));
    bench.reviewer.known.lock().unwrap().clear();
    assert!(
        bench.ask(Some("long"), |_| {}).await.is_err(),
        "withdrawn, noticed within the half minute"
    );
    // Refusals are not remembered: a token that becomes valid works at once.
    bench
        .reviewer
        .know("long", "system:serviceaccount:default:sleep", "istio-ca");
    bench.ask(Some("long"), |_| {}).await.unwrap();
}

#[tokio::test]
async fn the_root_is_made_once_and_kept() {
    let bench = Bench::new(options()).await;
    let secret = bench.secrets.stored("istio-ca-secret").unwrap();
    let keys: Vec<_> = secret.data.keys().map(String::as_str).collect();
    assert_eq!(keys, ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"]);
    assert!(bench.secrets.stored("cacerts").is_none());
    let again = Authority::load(options(), bench.secrets.clone(), bench.clock.clone(), &Registry::new())
        .await
        .unwrap();
    assert_eq!(again.material().certificate(), bench.ca.material().certificate());
    let life = again.material().not_after() - again.material().not_before();
    assert_eq!(life, Duration::days(3650));

    let (other, flagged) = (
        Arc::new(Memory::default()),
        CaOptions {
            use_cacerts_secret: true,
            ..options()
        },
    );
    Authority::load(flagged, other.clone(), bench.clock.clone(), &Registry::new())
        .await
        .unwrap();
    assert!(other.stored("istio-ca-secret").is_none());
    assert!(other.stored("cacerts").unwrap().data.contains_key("istio-generated"));
}

#[tokio::test]
async fn an_api_error_is_not_an_absent_secret() {
    let bench = Bench::new(options()).await;
    let known = bench.ca.material().certificate().clone();
    let error = || SecretError::Api("etcdserver: request timed out".to_owned());
    bench
        .secrets
        .failures
        .lock()
        .unwrap()
        .extend([error(), error(), error()]);
    let again = Authority::load(options(), bench.secrets.clone(), bench.clock.clone(), &Registry::new())
        .await
        .unwrap();
    assert_eq!(
        again.material().certificate(),
        &known,
        "retried until the secret could be read"
    );
    assert!(bench.secrets.failures.lock().unwrap().is_empty());

    // Two replicas starting on an empty store: the slower one takes the faster one's root.
    struct Race(Arc<Memory>, Mutex<Option<CaSecret>>);
    #[tonic::async_trait]
    impl SecretStore for Race {
        async fn get(&self, name: &str) -> Result<Option<CaSecret>, SecretError> {
            let found = self.0.get(name).await;
            if let Some(theirs) = self.1.lock().unwrap().take() {
                self.0.put(name, theirs);
            }
            found
        }
        async fn create(&self, name: &str, kind: &str, secret: &CaSecret) -> Result<(), SecretError> {
            self.0.create(name, kind, secret).await
        }
        async fn update(&self, name: &str, secret: &CaSecret) -> Result<(), SecretError> {
            self.0.update(name, secret).await
        }
    }
    let race = Race(Arc::default(), Mutex::new(bench.secrets.stored("istio-ca-secret")));
    let slower = Authority::load(options(), Arc::new(race), bench.clock.clone(), &Registry::new())
        .await
        .unwrap();
    assert_eq!(slower.material().certificate(), &known);
}

#[tokio::test]
async fn damaged_material_stops_the_start_and_is_never_overwritten() {
    let bench = Bench::new(options()).await;
    let mut secret = bench.secrets.stored("istio-ca-secret").unwrap();
    secret.data.insert("ca-key.pem".to_owned(), b"scratched".to_vec());
    bench.secrets.put("istio-ca-secret", secret);
    let error = Authority::load(options(), bench.secrets.clone(), bench.clock.clone(), &Registry::new())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("istio-ca-secret") && error.to_string().contains("ca-key.pem"),
        "{error}"
    );
    assert_eq!(
        bench.secrets.stored("istio-ca-secret").unwrap().get("ca-key.pem"),
        b"scratched"
    );
}

#[tokio::test]
async fn the_root_is_renewed_with_its_key_when_a_fifth_of_its_life_is_left() {
    let bench = Bench::new(CaOptions {
        root_ttl: Duration::days(100),
        ..options()
    })
    .await;
    let before = bench.ca.material();
    let mut news = bench.ca.bundle_watch();
    bench.clock.advance(Duration::days(79));
    bench.ca.check_once().await;
    assert_eq!(bench.ca.material().certificate(), before.certificate(), "not yet");
    bench.clock.advance(Duration::days(2));

    // A failing write changes nothing.
    bench
        .secrets
        .failures
        .lock()
        .unwrap()
        .push(SecretError::Api("no".to_owned()));
    bench.ca.check_once().await;
    assert_eq!(bench.ca.material().certificate(), before.certificate());

    bench.ca.check_once().await;
    let after = bench.ca.material();
    assert_ne!(after.certificate(), before.certificate());
    assert_eq!(*after.key_pem(), *before.key_pem());
    assert!(news.has_changed().unwrap());
    assert_eq!(news.borrow_and_update().to_pem(), after.certificate_pem());
    let stored = bench.secrets.stored("istio-ca-secret").unwrap();
    assert_eq!(stored.get("ca-cert.pem"), after.certificate_pem().as_bytes());
    assert_eq!(stored.get("root-cert.pem"), after.certificate_pem().as_bytes());

    // The other replica finds the new one and takes it (S4.76).
    let names = bench.ca.options().server_names();
    assert!(names.contains(&"istiod.istio-system.svc".to_owned()));
    bench.cert.renew().unwrap();
    assert_eq!(bench.cert.identity().bundle(), after.bundle());
}

#[tokio::test]
async fn a_deleted_secret_is_written_again_and_a_replaced_one_is_taken() {
    let bench = Bench::new(options()).await;
    let before = bench.ca.material();
    bench.secrets.secrets.lock().unwrap().clear();
    bench.ca.check_once().await;
    assert_eq!(bench.ca.material().certificate(), before.certificate());
    assert_eq!(
        bench.secrets.stored("istio-ca-secret").unwrap().get("ca-cert.pem"),
        before.certificate_pem().as_bytes()
    );

    let other = Bench::new(options()).await;
    bench
        .secrets
        .put("istio-ca-secret", other.secrets.stored("istio-ca-secret").unwrap());
    bench.ca.check_once().await;
    assert_eq!(bench.ca.material().certificate(), other.ca.material().certificate());
}

#[tokio::test]
async fn plugged_in_files_come_first_and_half_of_them_stop_the_start() {
    let made = Bench::new(options()).await;
    let secret = made.secrets.stored("istio-ca-secret").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, data: &[u8]| std::fs::write(dir.path().join(name), data).unwrap();
    let with_dir = || CaOptions {
        root_ca_dir: dir.path().to_owned(),
        ..options()
    };
    let load = || async {
        let store = Arc::new(Memory::default());
        let loaded = Authority::load(with_dir(), store.clone(), TestClock::new(), &Registry::new()).await;
        loaded.map(|ca| (ca, store))
    };
    write("ca-key.pem", secret.get("ca-key.pem"));
    let error = load().await.unwrap_err().to_string();
    assert!(error.contains("incomplete signing CA bundle detected"), "{error}");
    write("ca-cert.pem", secret.get("ca-cert.pem"));
    write("cert-chain.pem", secret.get("ca-cert.pem"));
    write("root-cert.pem", secret.get("root-cert.pem"));
    let (ca, store) = load().await.unwrap();
    assert_eq!(ca.material().certificate(), made.ca.material().certificate());
    assert!(
        store.secrets.lock().unwrap().is_empty(),
        "no secret is made beside plugged-in files"
    );

    // Another root under the running process: refused, unless the mesh has several roots and the sets are related.
    let other = Bench::new(options()).await.secrets.stored("istio-ca-secret").unwrap();
    for name in ["ca-key.pem", "ca-cert.pem", "root-cert.pem"] {
        write(name, other.get(name));
    }
    write("cert-chain.pem", other.get("ca-cert.pem"));
    ca.check_once().await;
    assert_eq!(ca.material().certificate(), made.ca.material().certificate());
    let both = [secret.get("root-cert.pem"), other.get("root-cert.pem")].concat();
    write("root-cert.pem", &both);
    ca.check_once().await;
    assert_eq!(
        ca.material().certificate(),
        made.ca.material().certificate(),
        "not without ISTIO_MULTIROOT_MESH"
    );
    let multi = CaOptions {
        multi_root: true,
        ..with_dir()
    };
    for name in ["ca-key.pem", "ca-cert.pem", "root-cert.pem"] {
        write(name, secret.get(name));
    }
    write("cert-chain.pem", secret.get("ca-cert.pem"));
    let ca = Authority::load(multi, Arc::new(Memory::default()), TestClock::new(), &Registry::new())
        .await
        .unwrap();
    for name in ["ca-key.pem", "ca-cert.pem"] {
        write(name, other.get(name));
    }
    write("cert-chain.pem", other.get("ca-cert.pem"));
    write("root-cert.pem", &both);
    ca.check_once().await;
    assert_eq!(ca.material().bundle().certificates().len(), 2);
    assert_ne!(ca.material().certificate(), made.ca.material().certificate());

    // Only a root in the mount: it joins a self-signed bundle (S4.66).
    for name in ["ca-key.pem", "ca-cert.pem", "cert-chain.pem"] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    write("root-cert.pem", secret.get("root-cert.pem"));
    let (ca, store) = load().await.unwrap();
    assert_eq!(ca.material().bundle().certificates().len(), 2);
    assert!(store.stored("istio-ca-secret").is_some());
}

#[test]
fn variables_are_read_and_nonsense_is_refused() {
    let with = |pairs: &[(&str, &str)]| {
        let map: BTreeMap<_, _> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        options().with_env(|name| map.get(name).cloned())
    };
    let read = with(&[
        ("DEFAULT_WORKLOAD_CERT_TTL", "10m"),
        ("MAX_WORKLOAD_CERT_TTL", "1h30m"),
        ("CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE", "4096"),
        ("ISTIOD_CUSTOM_HOST", "istiod.example.com, other"),
        ("TOKEN_AUDIENCES", "istio-ca,other"),
        ("ISTIO_MULTIROOT_MESH", "true"),
    ])
    .unwrap();
    assert_eq!(
        (read.default_ttl, read.max_ttl),
        (Duration::minutes(10), Duration::minutes(90))
    );
    assert_eq!(read.root_key, KeyAlgorithm::Rsa4096);
    assert_eq!(read.token_audiences, ["istio-ca", "other"]);
    assert!(read.multi_root);
    let names = CaOptions {
        revision: "canary".to_owned(),
        ..read
    }
    .server_names();
    assert_eq!(
        names,
        [
            "istiod.istio-system.svc",
            "istiod-remote.istio-system.svc",
            "istio-pilot.istio-system.svc",
            "istiod-canary.istio-system.svc",
            "istiod.example.com",
            "other"
        ]
    );
    for (name, value) in [
        ("DEFAULT_WORKLOAD_CERT_TTL", "soon"),
        ("DEFAULT_WORKLOAD_CERT_TTL", "0s"),
        ("DEFAULT_WORKLOAD_CERT_TTL", "3000h"),
        ("CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE", "1024"),
        ("ISTIO_MULTIROOT_MESH", "perhaps"),
        ("CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE", "150"),
    ] {
        let error = with(&[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[tokio::test]
async fn what_runs_in_the_background_notices_a_root_that_is_due() {
    let (clock, secrets) = (TestClock::new(), Arc::new(Memory::default()));
    let options = CaOptions {
        root_ttl: Duration::days(100),
        check_interval: Duration::milliseconds(5),
        rotator_jitter: false,
        ..options()
    };
    let registry = Registry::new();
    let ca = Authority::start(options, secrets, clock.clone(), &registry)
        .await
        .unwrap();
    let cert = ServerCert::start(ca.clone(), TrustDomainRule::one_of([trust_domain()])).unwrap();
    let before = ca.material();
    let mut news = ca.bundle_watch();
    clock.advance(Duration::days(90));
    let patience = std::time::Duration::from_secs(10);
    tokio::time::timeout(patience, news.changed())
        .await
        .expect("no new root in time")
        .unwrap();
    assert_ne!(ca.material().certificate(), before.certificate());
    let renewed = async {
        while cert.identity().bundle() != ca.material().bundle() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(patience, renewed)
        .await
        .expect("the own certificate does not follow the root");
    assert_eq!(
        cert.identity().not_after(),
        Some(ca.material().not_after()),
        "S4.48: as long as the root, S4.17: no longer"
    );
    let text = registry.render();
    let expected = format!(
        "citadel_server_root_cert_expiry_timestamp {}",
        ca.material().not_after().unix_timestamp()
    );
    assert!(text.contains(&expected), "{expected} is not in\n{text}");
}

#[tokio::test]
async fn silent_and_babbling_peers_hold_nobody_up() {
    use tokio::io::AsyncWriteExt;
    let bench = Bench::new(options()).await;
    bench
        .reviewer
        .know("good", "system:serviceaccount:default:sleep", "istio-ca");
    let mut others = Vec::new();
    for n in 0..50 {
        let mut stream = TcpStream::connect(bench.address).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        }
        others.push(stream);
    }
    bench.ask(Some("good"), |_| {}).await.unwrap();
}
