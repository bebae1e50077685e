//! A proxy's agent against a control plane end.

use std::sync::Arc;
use std::time::Duration;

use mantlet_model::snapshot::ProxySnapshot;
use mantlet_proxy::agent::{certs, xds};
use mantlet_proxy::settings::{Role, Settings};
use mantlet_runtime::Readiness;
use mantlet_testkit::TestCa;
use mantlet_xds::ResourceSet;

use super::control::{Control, Server, resources, serve, token};
use super::*;

/// A proxy's agent with its control plane, both in this process.
pub struct Agent {
    pub control: Arc<Control>,
    pub address: std::net::SocketAddr,
    pub server: Option<Server>,
    pub proxy: Proxy,
    pub readiness: Readiness,
    pub directory: tempfile::TempDir,
}

impl Agent {
    pub async fn start(snapshot: &ProxySnapshot, ttl: i64, grace: f64) -> Agent {
        let grace = grace.to_string();
        Agent::with(resources(snapshot), ttl, &[("SECRET_GRACE_PERIOD_RATIO", &grace)]).await
    }

    /// With these variables in its environment.
    pub async fn with(resources: Arc<ResourceSet>, ttl: i64, environment: &[(&str, &str)]) -> Agent {
        let ca = Arc::new(TestCa::new("cluster.local"));
        let control = Control::new(ca.clone(), resources, ttl);
        let address = free_address();
        let server = serve(control.clone(), address);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("token"), format!("{}\n", token("sleep"))).unwrap();
        std::fs::write(directory.path().join("root.pem"), ca.root_pem()).unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let (token_file, root) = (path("token"), path("root.pem"));
        let discovery = format!("{{\"discoveryAddress\":\"localhost:{}\"}}", address.port());
        let settings = Settings::from_env(Role::Sidecar, Some("default.svc.cluster.local"), &|name| {
            if let Some((_, value)) = environment.iter().find(|(known, _)| *known == name) {
                return Some(value.to_string());
            }
            Some(match name {
                "POD_NAME" => "sleep-1".to_string(),
                "POD_NAMESPACE" => "default".to_string(),
                "SERVICE_ACCOUNT" => "sleep".to_string(),
                "PROXY_CONFIG" => discovery.clone(),
                "MANTLET_TOKEN_FILE" => token_file.clone(),
                "XDS_ROOT_CA" | "CA_ROOT_CA" | "MANTLET_MESH_ROOT" => root.clone(),
                _ => return None,
            })
        })
        .unwrap();
        let settings = Arc::new(settings);
        let proxy = Proxy::start("sleep", 2);
        let readiness = Readiness::new();
        let (one, two) = (readiness.register("certificate"), readiness.register("configuration"));
        tokio::spawn(certs::watch_roots(settings.clone(), proxy.shared.clone()));
        tokio::spawn(certs::keep_fresh(settings.clone(), proxy.shared.clone(), one));
        tokio::spawn(xds::subscribe(settings, proxy.shared.clone(), two));
        Agent {
            control,
            address,
            server: Some(server),
            proxy,
            readiness,
            directory,
        }
    }

    pub async fn ready(&self) {
        tokio::time::timeout(Duration::from_secs(20), self.readiness.ready())
            .await
            .unwrap_or_else(|_| panic!("not ready: {:?}", self.readiness.pending()));
    }

    pub fn events(&self) -> Vec<String> {
        self.control.events.lock().unwrap().clone()
    }
}

pub fn outbound(endpoint: std::net::SocketAddr) -> Outbound {
    Outbound {
        listen: free_address(),
        port: 80,
        endpoints: vec![endpoint],
        mtls: false,
        sans: vec![SERVER_SA.into()],
        protocol: mantlet_model::cluster::UpstreamProtocol::Http1,
        retry: Some(default_retry()),
        tcp: false,
    }
}

pub async fn status(outbound: &Outbound) -> u16 {
    curl(&["-H", "Host: web", &format!("http://{}/", outbound.listen)])
        .await
        .status
}
