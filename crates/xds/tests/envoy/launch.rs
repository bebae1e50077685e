//! Envoy as a child process, with an ADS server of ours behind it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mantlet_testkit::process::ChildGuard;
use mantlet_testkit::programs::envoy;
use mantlet_xds::ads::{Backend, Hello, Session, service};
use mantlet_xds::server::StreamEvent;
use mantlet_xds::{ResourceSet, ResourceType};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Status;

struct Source {
    resources: watch::Receiver<Arc<ResourceSet>>,
    events: mpsc::UnboundedSender<StreamEvent>,
    delta: bool,
}

#[tonic::async_trait]
impl Backend for Source {
    async fn connect(&self, hello: Hello) -> Result<Session, Status> {
        assert_eq!(hello.delta, self.delta);
        let events = self.events.clone();
        Ok(Session {
            resources: self.resources.clone(),
            observer: Box::new(move |event| drop(events.send(event))),
            identifier: "mantletd-test".into(),
        })
    }
}

/// A running Envoy.
pub(crate) struct Running {
    /// What Envoy is fed with.
    pub(crate) resources: watch::Sender<Arc<ResourceSet>>,
    /// What happens on its stream.
    pub(crate) events: mpsc::UnboundedReceiver<StreamEvent>,
    child: ChildGuard,
    server: JoinHandle<()>,
    stderr: PathBuf,
}

impl Running {
    /// Starts Envoy with these resources.
    pub(crate) async fn start(dir: &Path, set: ResourceSet, delta: bool) -> Running {
        let (sender, resources) = watch::channel(Arc::new(set));
        let (events_tx, events) = mpsc::unbounded_channel();
        let source = Arc::new(Source {
            resources,
            events: events_tx,
            delta,
        });
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(service(source));
        let server = server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(socket));
        let server = tokio::spawn(async move { drop(server.await) });

        let config = dir.join("envoy.yaml");
        fs::write(&config, bootstrap(address, delta)).unwrap();
        let stderr = dir.join("envoy.log");
        let child = Command::new(envoy())
            .arg("-c")
            .arg(&config)
            .args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"])
            .stdout(Stdio::null())
            .stderr(fs::File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Running {
            resources: sender,
            events,
            child: ChildGuard::new(child),
            server,
            stderr,
        }
    }

    /// Waits until Envoy has accepted these types; a refusal is a failure.
    pub(crate) async fn all_accepted(&mut self, kinds: &[ResourceType]) {
        let mut accepted = std::collections::BTreeSet::new();
        while !kinds.iter().all(|kind| accepted.contains(kind)) {
            match timeout(Duration::from_secs(30), self.events.recv()).await {
                Ok(Some(StreamEvent::Acked { kind, .. })) => drop(accepted.insert(kind)),
                Ok(Some(StreamEvent::Nacked { kind, message, .. })) => panic!("Envoy refused {kind}: {message}"),
                Ok(Some(_)) => {}
                _ => {
                    let said = fs::read_to_string(&self.stderr).unwrap();
                    panic!("only {accepted:?} accepted; Envoy says: {said}");
                }
            }
        }
    }

    /// Ends Envoy in an orderly way, so that its logs are complete.
    pub(crate) fn stop(mut self) {
        self.child.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(self.child.wait(Duration::from_secs(20)).is_some());
        self.server.abort();
    }
}

/// Ports for Envoy's listeners.
pub(crate) fn ports(count: usize) -> Vec<u16> {
    std::iter::repeat_with(mantlet_testkit::free_port).take(count).collect()
}

fn bootstrap(ads: SocketAddr, delta: bool) -> String {
    let kind = if delta { "DELTA_GRPC" } else { "GRPC" };
    format!(
        r#"
node: {{ id: "sidecar~127.0.0.1~test.default~default.svc.cluster.local", cluster: test }}
dynamic_resources:
  ads_config:
    api_type: {kind}
    transport_api_version: V3
    grpc_services: [ {{ envoy_grpc: {{ cluster_name: xds }} }} ]
  lds_config: {{ ads: {{}}, resource_api_version: V3 }}
  cds_config: {{ ads: {{}}, resource_api_version: V3 }}
# The flags that Istio's bootstrap sets and that change answers (S2.112).
layered_runtime:
  layers:
  - name: istio
    static_layer:
      envoy.reloadable_features.http_reject_path_with_fragment: false
      re2.max_program_size.error_level: 32768
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}
    load_assignment:
      cluster_name: xds
      endpoints: [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }} }} }} ] }} ]
"#,
        port = ads.port()
    )
}
