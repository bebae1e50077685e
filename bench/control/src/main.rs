//! A control plane of fixed content for the benchmark: certificates for all programs, and for `mantlet-proxy` the real
//! certificate service and real xDS, so that the proxy runs exactly as in a mesh.
//!
//! `bench-control --dir DIR --listen IP:PORT --server-ip IP --port-base N [--mantlet-endpoints false]`. Writes
//! `root.pem`, `client.{pem,key}`, `server.{pem,key}` and `mantlet-{client,server}.json` (the configuration, to be
//! printed) into DIR, then serves until it is ended.
//!
//! `bench-control --csr-rate SECONDS` measures the authority instead: how many requests of a fleet one core parses,
//! verifies, signs and checks in a second; `bench-control --decisions SECONDS` the authorization engine ([`rules`]), as
//! JSON, with so much processor time per figure.

mod resources;
mod rules;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use mantlet_identity::{
    CaMaterial, ClientAuth, Csr, IssueRequest, IssuedCertificate, PrivateKey, SelfSignedOptions, Serial,
    ServerTlsOptions, SpiffeId, SubjectAltName, TlsIdentity, build_csr, tls::mesh_provider,
};
use mantlet_xds::ads::{Backend, Hello, Session, service};
use mantlet_xds::istio_ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mantlet_xds::istio_ca::{IstioCertificateRequest, IstioCertificateResponse};
use mantlet_xds::{Dialect, Options, ResourceSet};
use time::{Duration, OffsetDateTime};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};

use resources::{Log, Plan, Proxy, Role};

fn main() -> Result<()> {
    let mut arguments: HashMap<String, String> = HashMap::new();
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().with_context(|| format!("{name} needs a value"))?;
        arguments.insert(name, value);
    }
    if let Some(seconds) = arguments.get("--csr-rate") {
        return csr_rate(seconds.parse()?);
    }
    if let Some(seconds) = arguments.get("--decisions") {
        let figures = rules::decisions(std::time::Duration::from_secs_f64(seconds.parse()?) / rules::SLICES)?;
        println!("{figures:#}");
        return Ok(());
    }
    let take = |name: &str| arguments.get(name).with_context(|| format!("{name} is missing"));
    let dir = PathBuf::from(take("--dir")?);
    let listen: SocketAddr = take("--listen")?.parse()?;
    let plan = Plan {
        server: take("--server-ip")?.parse::<IpAddr>()?,
        port_base: take("--port-base")?.parse()?,
        mantlet_endpoints: arguments.get("--mantlet-endpoints").is_none_or(|v| v == "true"),
        logs: std::path::absolute(&dir)?,
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(dir, listen, plan))
}

/// The work of one `CreateCertificate` without network and token review.
fn csr_rate(seconds: u64) -> Result<()> {
    let ca = CaMaterial::self_signed(
        &SelfSignedOptions::new("cluster.local"),
        OffsetDateTime::now_utc(),
        serial(),
    )?;
    let id = SpiffeId::parse(&resources::identity(Role::Client(Log::Off)))?;
    let requests = (0..64)
        .map(|_| Ok(build_csr(&PrivateKey::generate(Default::default())?, &id)?))
        .collect::<Result<Vec<_>>>()?;
    let begin = std::time::Instant::now();
    let mut signed = 0u64;
    while begin.elapsed().as_secs() < seconds {
        for request in &requests {
            let issued = issue(&ca, &Csr::from_pem(request)?, SubjectAltName::Spiffe(id.clone()))?;
            std::hint::black_box(issued.to_response());
            signed += 1;
        }
    }
    println!(
        "{:.0} certificates per second on one core",
        signed as f64 / begin.elapsed().as_secs_f64()
    );
    Ok(())
}

async fn serve(dir: PathBuf, listen: SocketAddr, plan: Plan) -> Result<()> {
    let now = OffsetDateTime::now_utc();
    let ca = Arc::new(CaMaterial::self_signed(
        &SelfSignedOptions::new("cluster.local"),
        now,
        serial(),
    )?);
    std::fs::write(dir.join("root.pem"), ca.bundle().to_pem())?;
    for proxy in [Proxy::Mantlet, Proxy::Envoy] {
        let requests = rules::requests(plan.rules_port(proxy)).to_string();
        std::fs::write(dir.join(format!("rules-{}.json", proxy.pod())), requests)?;
    }
    for role in [Role::Client(Log::Off), Role::Server(Log::Off)] {
        let name = role.pod();
        let id = SpiffeId::parse(&resources::identity(role))?;
        write_certificate(&ca, &dir, name, SubjectAltName::Spiffe(id))?;
    }
    for log in [Log::Off, Log::On] {
        for role in [Role::Client(log), Role::Server(log)] {
            let snapshot = serde_json::to_string(&resources::snapshot(role, &plan))?;
            std::fs::write(dir.join(format!("mantlet-{}.json", role.pod())), snapshot)?;
        }
    }
    let key = PrivateKey::generate(Default::default())?;
    let issued = issue(&ca, &Csr::for_key(&key)?, SubjectAltName::Ip(listen.ip()))?;
    let tls =
        TlsIdentity::from_csr_response(&issued.to_response(), &key, mesh_provider())?.server(&ServerTlsOptions {
            client_auth: ClientAuth::None,
            alpn: vec![b"h2".to_vec()],
            min_tls13: false,
        })?;
    let routes = tonic::service::Routes::new(service(Arc::new(Fixed { plan })))
        .add_service(IstioCertificateServiceServer::new(Signer { ca }));
    let acceptor = TlsAcceptor::from(tls.strict());
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("binding {listen}"))?;
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await?;
        let (acceptor, routes) = (acceptor.clone(), routes.clone());
        tokio::spawn(async move {
            let stream = match acceptor.accept(stream).await {
                Ok(stream) => stream,
                Err(error) => return eprintln!("handshake: {error}"),
            };
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http2_only();
            if let Err(error) = server
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
                .await
            {
                eprintln!("connection: {error}");
            }
        });
    }
}

fn serial() -> Serial {
    Serial::from_random(rand::random())
}

fn issue(ca: &CaMaterial, csr: &Csr, name: SubjectAltName) -> Result<IssuedCertificate> {
    let request = IssueRequest {
        csr,
        names: &[name],
        ttl: Duration::hours(24),
        now: OffsetDateTime::now_utc(),
        serial: serial(),
    };
    Ok(ca.issue(&request)?)
}

fn write_certificate(ca: &CaMaterial, dir: &Path, name: &str, san: SubjectAltName) -> Result<()> {
    let key = PrivateKey::generate(Default::default())?;
    let issued = issue(ca, &Csr::for_key(&key)?, san)?;
    let chain = &issued.to_response()[0];
    std::fs::write(dir.join(format!("{name}.pem")), chain)?;
    std::fs::write(dir.join(format!("{name}.key")), key.to_pem().as_bytes())?;
    // HAProxy wants both in one file.
    std::fs::write(
        dir.join(format!("{name}.both")),
        format!("{chain}{}", key.to_pem().as_str()),
    )?;
    Ok(())
}

/// What a node is, from its pod name in the node id.
fn role_of(node: &mantlet_xds::Node) -> Option<Role> {
    Role::named(node.id.split('~').nth(2)?.split('.').next()?)
}

struct Fixed {
    plan: Plan,
}

#[tonic::async_trait]
impl Backend for Fixed {
    async fn connect(&self, hello: Hello) -> Result<Session, Status> {
        let role = role_of(&hello.node).ok_or_else(|| Status::not_found("no role has this node's name"))?;
        let snapshot = resources::snapshot(role, &self.plan);
        let dialect = match role {
            Role::Rules(Proxy::Envoy) => Dialect::PlainEnvoy,
            _ => Dialect::Istio,
        };
        let set = ResourceSet::new(&snapshot, Vec::new(), &Options::new(dialect), None);
        let (tx, rx) = watch::channel(Arc::new(set));
        let name = hello.node.id;
        Ok(Session {
            resources: rx,
            // The sender lives in the observer, so that the stream stays open for as long as it is observed.
            observer: Box::new(move |event| {
                let _ = &tx;
                eprintln!("{name}: {event:?}");
            }),
            identifier: "bench-control".to_owned(),
        })
    }
}

/// Signs for whoever calls: the benchmark's namespaces have no other callers.
struct Signer {
    ca: Arc<CaMaterial>,
}

#[tonic::async_trait]
impl IstioCertificateService for Signer {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let invalid = |e: &dyn std::fmt::Display| Status::invalid_argument(e.to_string());
        let header = request.metadata().get("authorization").and_then(|v| v.to_str().ok());
        let role = header
            .and_then(|v| Role::named(v.strip_prefix("Bearer ")?))
            .ok_or_else(|| Status::unauthenticated("request authenticate failure"))?;
        let csr = Csr::from_pem(&request.get_ref().csr).map_err(|e| invalid(&e))?;
        let id = SpiffeId::parse(&resources::identity(role)).map_err(|e| invalid(&e))?;
        let issued = issue(&self.ca, &csr, SubjectAltName::Spiffe(id)).map_err(|e| invalid(&e))?;
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: issued.to_response(),
        }))
    }
}
