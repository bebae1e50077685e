//! A control plane end for tests: certificate service and delta xDS over TLS, with tokens.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use mantlet_identity::{Csr, IssueRequest, Serial, SubjectAltName};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_testkit::TestCa;
use mantlet_xds::ads::{Backend, Hello, Session, service};
use mantlet_xds::istio_ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mantlet_xds::istio_ca::{IstioCertificateRequest, IstioCertificateResponse};
use mantlet_xds::resources::ResourceSet;
use mantlet_xds::server::StreamEvent;
use mantlet_xds::{Dialect, Options};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// The token of a service account, as far as this control plane goes.
pub fn token(account: &str) -> String {
    format!("token-of-{account}")
}

/// What the control plane serves and has seen.
pub struct Control {
    pub ca: Arc<TestCa>,
    pub resources: watch::Sender<Arc<ResourceSet>>,
    /// Seconds that certificates live, whatever is asked for.
    pub ttl: i64,
    pub issued: AtomicUsize,
    /// Events of all streams.
    pub events: Arc<Mutex<Vec<String>>>,
    /// Node ids that opened streams.
    pub nodes: Mutex<Vec<String>>,
}

impl Control {
    pub fn new(ca: Arc<TestCa>, resources: Arc<ResourceSet>, ttl: i64) -> Arc<Control> {
        Arc::new(Control {
            ca,
            resources: watch::Sender::new(resources),
            ttl,
            issued: AtomicUsize::new(0),
            events: Arc::default(),
            nodes: Mutex::default(),
        })
    }
}

/// The service account that the token names.
fn authenticated(metadata: &tonic::metadata::MetadataMap) -> Result<String, Status> {
    let value = metadata.get("authorization").and_then(|v| v.to_str().ok());
    match value.and_then(|v| v.strip_prefix("Bearer token-of-")) {
        Some(account) => Ok(account.to_string()),
        _ => Err(Status::unauthenticated("request authenticate failure")),
    }
}

struct Shared(Arc<Control>);

#[tonic::async_trait]
impl Backend for Shared {
    async fn connect(&self, hello: Hello) -> Result<Session, Status> {
        authenticated(&hello.metadata)?;
        self.0.nodes.lock().unwrap().push(hello.node.id.clone());
        let events = self.0.events.clone();
        Ok(Session {
            resources: self.0.resources.subscribe(),
            observer: Box::new(move |event: StreamEvent| events.lock().unwrap().push(format!("{event:?}"))),
            identifier: "test".into(),
        })
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Shared {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let account = authenticated(request.metadata())?;
        let csr = Csr::from_pem(&request.get_ref().csr).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let number = self.0.issued.fetch_add(1, Ordering::SeqCst);
        let names = [SubjectAltName::Spiffe(self.0.ca.id("default", &account))];
        let mut serial = [1u8; 16];
        serial[..8].copy_from_slice(&(number as u64).to_be_bytes());
        let issued = self
            .0
            .ca
            .material()
            .issue(&IssueRequest {
                csr: &csr,
                names: &names,
                ttl: time::Duration::seconds(self.0.ttl),
                now: OffsetDateTime::now_utc(),
                serial: Serial::from_random(serial),
            })
            .map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: issued.to_response(),
        }))
    }
}

/// One TLS connection, as tonic wants it.
struct Conn(tokio_rustls::server::TlsStream<tokio::net::TcpStream>);

impl tonic::transport::server::Connected for Conn {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A control plane with a runtime of its own: dropping it ends every stream and gives its port back, as a killed process does.
pub struct Server(Option<tokio::runtime::Runtime>);

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // A thread in a runtime must not wait; the next control plane may need the port at once.
            let stopped = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(20)));
            stopped.join().unwrap();
        }
    }
}

pub fn serve(control: Arc<Control>, address: std::net::SocketAddr) -> Server {
    let listener = mantlet_net::sockopt::listen_tcp(address, Default::default()).unwrap();
    serve_on(control, listener)
}

pub fn serve_on(control: Arc<Control>, listener: std::net::TcpListener) -> Server {
    let tls = control.ca.host(&["localhost"]).identity;
    let tls = tls
        .server(&mantlet_identity::ServerTlsOptions {
            client_auth: mantlet_identity::ClientAuth::Optional(mantlet_identity::TrustDomainRule::AnySpiffe),
            alpn: vec![b"h2".to_vec()],
            min_tls13: false,
        })
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls.strict());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let incoming = futures::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
            loop {
                let Ok((tcp, _)) = listener.accept().await else {
                    return None;
                };
                if let Ok(stream) = acceptor.accept(tcp).await {
                    return Some((Ok::<_, std::io::Error>(Conn(stream)), (listener, acceptor)));
                }
            }
        });
        tonic::transport::Server::builder()
            .add_service(service(Arc::new(Shared(control.clone()))))
            .add_service(IstioCertificateServiceServer::new(Shared(control)))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
    Server(Some(runtime))
}

pub fn resources(snapshot: &ProxySnapshot) -> Arc<ResourceSet> {
    Arc::new(ResourceSet::new(snapshot, [], &Options::new(Dialect::Istio), None))
}
