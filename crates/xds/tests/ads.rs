//! Both tonic ends over a real connection: updates, refusals, reconnection.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, UpstreamProtocol};
use mantlet_model::endpoint::Endpoints;
use mantlet_model::{ProxySnapshot, Secret};
use mantlet_xds::ads::{Backend, Backoff, ClientEvent, Connector, Hello, Session, Update, run_client, service};
use mantlet_xds::client::{Change, Decoded};
use mantlet_xds::server::StreamEvent;
use mantlet_xds::{Node, Options, ResourceSet, ResourceType};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Server};

const LIMIT: Duration = Duration::from_secs(60);

struct Source {
    resources: watch::Receiver<Arc<ResourceSet>>,
    events: mpsc::UnboundedSender<StreamEvent>,
}

#[tonic::async_trait]
impl Backend for Source {
    async fn connect(&self, hello: Hello) -> Result<Session, Status> {
        if hello.metadata.get("authorization").is_none_or(|v| v != "Bearer good") {
            return Err(Status::unauthenticated("who are you"));
        }
        assert_eq!(hello.node.id, "sidecar~1.2.3.4~a.b~b.svc.cluster.local");
        let events = self.events.clone();
        Ok(Session {
            resources: self.resources.clone(),
            observer: Box::new(move |event| drop(events.send(event))),
            identifier: "test".into(),
        })
    }
}

/// Connects with the token of the moment.
struct Dial {
    address: Mutex<String>,
    token: Mutex<&'static str>,
}

#[tonic::async_trait]
impl Connector for Dial {
    async fn connect(&self) -> Result<(Channel, MetadataMap), String> {
        let address = self.address.lock().unwrap().clone();
        let channel = Endpoint::from_shared(address)
            .unwrap()
            .connect()
            .await
            .map_err(|e| e.to_string())?;
        let mut metadata = MetadataMap::new();
        let token = format!("Bearer {}", self.token.lock().unwrap());
        metadata.insert("authorization", token.parse().unwrap());
        Ok((channel, metadata))
    }
}

fn set(clusters: &[(&str, u64)]) -> Arc<ResourceSet> {
    let mut snapshot = ProxySnapshot::default();
    for (name, timeout) in clusters {
        let cluster = Cluster {
            name: name.to_string(),
            discovery: Discovery::Eds {
                service: name.to_string(),
            },
            connect_timeout_ms: *timeout,
            balancer: Balancer::LeastRequest,
            tls: ClusterTls::Plain,
            protocol: UpstreamProtocol::Http1,
            bind_source: None,
            limits: Limits::default(),
            outlier: None,
            services: vec![],
            alpn_override: true,
        };
        snapshot.clusters.insert(name.to_string(), Arc::new(cluster));
        let endpoints = Endpoints {
            cluster: name.to_string(),
            endpoints: vec![],
        };
        snapshot.endpoints.insert(name.to_string(), Arc::new(endpoints));
    }
    Arc::new(ResourceSet::new(
        &snapshot,
        Vec::<Arc<Secret>>::new(),
        &Options::default(),
        None,
    ))
}

/// A control plane with a runtime of its own: when that ends, so do its connections, as with a process that dies.
fn serve(source: Arc<Source>) -> (String, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = format!("http://{}", socket.local_addr().unwrap());
    runtime.spawn(async move {
        let socket = TcpListener::from_std(socket).unwrap();
        let server = Server::builder()
            .add_service(service(source))
            .serve_with_incoming(TcpListenerStream::new(socket));
        drop(server.await)
    });
    (address, runtime)
}

async fn update(events: &mut mpsc::Receiver<ClientEvent>) -> Update {
    loop {
        match timeout(LIMIT, events.recv())
            .await
            .expect("an update")
            .expect("the client runs")
        {
            // "There is none" is an answer too.
            ClientEvent::Update(update) if update.changes.is_empty() => update.accept(),
            ClientEvent::Update(update) => return update,
            ClientEvent::Refused { message } => panic!("{message}"),
            ClientEvent::Connected | ClientEvent::Disconnected { .. } => {}
        }
    }
}

fn names(update: &Update) -> Vec<String> {
    let name = |change: &Change| match change {
        Change::Upsert(Decoded::Cluster(c)) => format!("+{}", c.name),
        Change::Upsert(Decoded::Endpoints(e)) => format!("+{}", e.cluster),
        Change::Remove(kind, name) => format!("-{kind} {name}"),
        other => panic!("{other:?}"),
    };
    update.changes.iter().map(name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_refusals_and_reconnection() {
    let (resources_tx, resources) = watch::channel(set(&[("a", 1), ("b", 1)]));
    let (server_events, mut seen) = mpsc::unbounded_channel();
    let source = Arc::new(Source {
        resources,
        events: server_events,
    });
    let (address, server) = serve(source.clone());
    let dial = Arc::new(Dial {
        address: Mutex::new(address),
        token: Mutex::new("bad"),
    });
    let (events_tx, mut events) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let node = Node {
        id: "sidecar~1.2.3.4~a.b~b.svc.cluster.local".into(),
        ..Node::default()
    };
    let backoff = Backoff {
        first: Duration::from_millis(10),
        max: Duration::from_millis(50),
    };
    let client = tokio::spawn(run_client(node, dial.clone(), backoff, events_tx, stop.clone()));

    // A bad token ends in a reason, and the client tries on.
    match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
        ClientEvent::Disconnected { reason } => assert!(reason.contains("who are you"), "{reason}"),
        other => panic!("{other:?}"),
    }
    *dial.token.lock().unwrap() = "good";

    let first = update(&mut events).await;
    assert_eq!(
        (first.kind, names(&first)),
        (ResourceType::Cluster, vec!["+a".into(), "+b".into()])
    );
    first.accept();
    let second = update(&mut events).await;
    assert_eq!(
        (second.kind, names(&second)),
        (ResourceType::Endpoints, vec!["+a".into(), "+b".into()])
    );
    second.accept();

    // What the proxy refuses is told to the control plane with the reason, and not repeated.
    resources_tx.send(set(&[("a", 1), ("b", 2)])).unwrap();
    let third = update(&mut events).await;
    assert_eq!(names(&third), ["+b"]);
    third.reject("b: cannot".into());
    loop {
        match timeout(LIMIT, seen.recv()).await.unwrap().unwrap() {
            StreamEvent::Nacked { kind, message, .. } => {
                assert_eq!((kind, message.as_str()), (ResourceType::Cluster, "b: cannot"));
                break;
            }
            StreamEvent::Closed => panic!("closed"),
            _ => {}
        }
    }

    // The rest of the push does not wait for what was refused.
    let fourth = update(&mut events).await;
    assert_eq!(
        (fourth.kind, names(&fourth)),
        (ResourceType::Endpoints, vec!["+b".into()])
    );
    fourth.accept();

    // The control plane restarts elsewhere with another state: only the difference is sent.
    server.shutdown_background();
    loop {
        match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            ClientEvent::Disconnected { .. } => break,
            // The endpoints of the cluster that was refused may still be on their way.
            ClientEvent::Update(update) => {
                assert!(names(&update).iter().all(|name| name == "+b"), "{update:?}");
                update.accept();
            }
            other => panic!("{other:?}"),
        }
    }
    resources_tx.send(set(&[("a", 1), ("c", 1)])).unwrap();
    let (address, server) = serve(source);
    *dial.address.lock().unwrap() = address;
    let mut changes = Vec::new();
    while changes.len() < 4 {
        let update = update(&mut events).await;
        changes.extend(names(&update));
        update.accept();
    }
    changes.sort();
    // Endpoints of `b` go with their cluster, without a word from the control plane.
    assert_eq!(changes, ["+c", "+c", "-CDS b", "-EDS b"]);

    stop.cancel();
    timeout(LIMIT, client).await.unwrap().unwrap();
    server.shutdown_background();
}
