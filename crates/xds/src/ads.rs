//! The tonic ends of ADS: a service adapter for the control plane and a client task for the proxy.
//!
//! Both only move messages between a stream and the state machines of [`crate::server`] and [`crate::client`].

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::StreamExt;
use futures::future::BoxFuture;
use prost::Message;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::codec::BufferSettings;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::{Extensions, Request, Status, Streaming};
use tonic_prost::ProstDecoder;
use tower::Service;
use tracing::{debug, info, warn};

use crate::Node;
use crate::client::{Accepted, Change, DeltaClient};
use crate::frames::{Frames, framed};
use crate::resources::{ResourceSet, ResourceType};
use crate::server::{DeltaServer, SotwServer, StreamEvent};

/// Largest message in either direction, in bytes. A full state of a large mesh fits; a peer cannot ask for more memory.
pub const MAX_MESSAGE: usize = 64 << 20;
/// How long a new stream may take to send its first request with the node.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Responses that may wait for the transport.
const SEND_QUEUE: usize = 16;
/// Resources from which responses are heavy: their copies are megabytes.
const HEAVY: usize = 512;
/// Streams that may have heavy responses under way at once. When all proxies of a mesh come back together, this is what memory
/// depends on, not their number.
const HEAVY_STREAMS: usize = 8;
/// How long a stream waits for its turn, and how long its turn lasts while its peer does not answer: slow peers delay others, and no
/// more than that.
const HEAVY_TURN: Duration = Duration::from_secs(5);

static HEAVY_TURNS: Semaphore = Semaphore::const_new(HEAVY_STREAMS);

/// What a peer said of itself when it opened a stream. Nothing in it is verified; the backend authenticates.
#[derive(Debug)]
pub struct Hello {
    /// The node of the first request.
    pub node: Node,
    /// gRPC metadata (`authorization`, `clusterid`).
    pub metadata: MetadataMap,
    /// Extensions of the connection (peer certificates, remote address).
    pub extensions: Extensions,
    /// Whether the stream is incremental.
    pub delta: bool,
}

/// A stream that the backend admitted.
pub struct Session {
    /// The peer's resources; a new value is pushed as it appears. The stream ends when the sender is dropped.
    pub resources: watch::Receiver<Arc<ResourceSet>>,
    /// Gets the events of the stream, `Closed` last.
    pub observer: Box<dyn Fn(StreamEvent) + Send + Sync>,
    /// Name of this control plane in responses (`control_plane.identifier`).
    pub identifier: String,
}

/// Source of resources, implemented by the control plane.
#[tonic::async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Authenticates and admits a stream, or refuses it with a status.
    async fn connect(&self, hello: Hello) -> Result<Session, Status>;
}

/// The gRPC service of a backend, with message sizes bounded.
pub fn service<B: Backend>(backend: Arc<B>) -> AdsService<B> {
    AdsService { backend }
}

/// Adapter from tonic to the state machines.
pub struct AdsService<B> {
    backend: Arc<B>,
}

impl<B> Clone for AdsService<B> {
    fn clone(&self) -> Self {
        AdsService {
            backend: self.backend.clone(),
        }
    }
}

/// What both protocol variants have in common.
trait Machine: Send + 'static {
    type Request: Message + Default + Send + 'static;
    type Response: Message;
    fn take_node(request: &mut Self::Request) -> Option<Node>;
    fn on_request(&mut self, request: Self::Request) -> Result<(), Status>;
    fn poll(&mut self, set: &ResourceSet) -> Vec<Self::Response>;
    fn take_events(&mut self) -> Vec<StreamEvent>;
    /// About how many resources `poll` would send.
    fn weight(&self, set: &ResourceSet) -> usize;
    /// Whether any response waits for its answer.
    fn is_waiting(&self) -> bool;
    /// Types of which no response waits for its answer.
    fn idle(&self) -> Vec<ResourceType>;
}

impl Machine for DeltaServer {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;
    fn take_node(request: &mut Self::Request) -> Option<Node> {
        request.node.take()
    }
    fn on_request(&mut self, request: Self::Request) -> Result<(), Status> {
        DeltaServer::on_request(self, request).map_err(|e| Status::resource_exhausted(e.to_string()))
    }
    fn poll(&mut self, set: &ResourceSet) -> Vec<Self::Response> {
        DeltaServer::poll(self, set)
    }
    fn take_events(&mut self) -> Vec<StreamEvent> {
        DeltaServer::take_events(self)
    }
    fn weight(&self, set: &ResourceSet) -> usize {
        DeltaServer::weight(self, set)
    }
    fn is_waiting(&self) -> bool {
        DeltaServer::is_waiting(self)
    }
    fn idle(&self) -> Vec<ResourceType> {
        DeltaServer::idle(self)
    }
}

impl Machine for SotwServer {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;
    fn take_node(request: &mut Self::Request) -> Option<Node> {
        request.node.take()
    }
    fn on_request(&mut self, request: Self::Request) -> Result<(), Status> {
        SotwServer::on_request(self, request).map_err(|e| Status::resource_exhausted(e.to_string()))
    }
    fn poll(&mut self, set: &ResourceSet) -> Vec<Self::Response> {
        SotwServer::poll(self, set)
    }
    fn take_events(&mut self) -> Vec<StreamEvent> {
        SotwServer::take_events(self)
    }
    fn weight(&self, set: &ResourceSet) -> usize {
        SotwServer::weight(self, set)
    }
    fn is_waiting(&self) -> bool {
        SotwServer::is_waiting(self)
    }
    fn idle(&self) -> Vec<ResourceType> {
        SotwServer::idle(self)
    }
}

impl<B: Backend> AdsService<B> {
    async fn open<M: Machine>(
        &self,
        request: http::Request<tonic::body::Body>,
        delta: bool,
        machine: impl FnOnce(String) -> M,
    ) -> Result<Frames, Status> {
        let decoder = ProstDecoder::<M::Request>::new(BufferSettings::default());
        let request =
            Request::from_http(request.map(|body| Streaming::new_request(decoder, body, None, Some(MAX_MESSAGE))));
        let (metadata, extensions, mut requests) = request.into_parts();
        let mut first = match timeout(FIRST_REQUEST, requests.next()).await {
            Ok(Some(first)) => first?,
            Ok(None) => return Err(Status::cancelled("stream closed before its first request")),
            Err(_) => return Err(Status::deadline_exceeded("no first request")),
        };
        let node = M::take_node(&mut first)
            .ok_or_else(|| Status::invalid_argument("the first request must carry the node"))?;
        let hello = Hello {
            node,
            metadata,
            extensions,
            delta,
        };
        let session = self.backend.connect(hello).await?;
        let machine = machine(session.identifier.clone());
        let (tx, rx) = mpsc::channel(SEND_QUEUE);
        tokio::spawn(pump(machine, first, requests, session, tx));
        Ok(Frames::new(rx))
    }
}

/// Runs one stream until either side ends it.
async fn pump<M: Machine>(
    mut machine: M,
    first: M::Request,
    mut requests: Streaming<M::Request>,
    mut session: Session,
    tx: mpsc::Sender<Result<Bytes, Status>>,
) {
    let mut next = Some(first);
    // A place among the streams with heavy responses, and when it is given back at the latest.
    let mut turn = None;
    let mut looked = (0, Vec::new());
    loop {
        if let Some(request) = next.take()
            && let Err(status) = machine.on_request(request)
        {
            // The peer may be gone already; then there is nobody to tell.
            tx.send(Err(status)).await.unwrap_or_default();
            break;
        }
        let mut set = session.resources.borrow_and_update().clone();
        if turn.is_some() && !machine.is_waiting() {
            turn = None;
        }
        if turn.is_none() && machine.weight(&set) >= HEAVY {
            // Whoever waited long enough goes on without a turn.
            let place = timeout(HEAVY_TURN, HEAVY_TURNS.acquire())
                .await
                .ok()
                .and_then(Result::ok);
            turn = place.map(|place| (place, Instant::now() + HEAVY_TURN));
            set = session.resources.borrow_and_update().clone();
        }
        let responses = machine.poll(&set);
        for event in machine.take_events() {
            (session.observer)(event);
        }
        let mut gone = false;
        for response in responses {
            let message = framed(&response, MAX_MESSAGE);
            drop(response);
            gone |= message.is_err();
            gone |= tx.send(message).await.is_err();
        }
        if gone {
            break;
        }
        let look = (set.revision(), machine.idle());
        if look != looked {
            looked = look;
            let (revision, idle) = looked.clone();
            (session.observer)(StreamEvent::Looked { revision, idle });
        }
        tokio::select! {
            request = requests.next() => match request {
                Some(Ok(request)) => next = Some(request),
                Some(Err(status)) => {
                    debug!(%status, "xDS stream failed");
                    break;
                }
                None => break,
            },
            changed = session.resources.changed() => if changed.is_err() {
                break;
            },
            () = tx.closed() => break,
            () = sleep_until(turn.as_ref().map_or_else(Instant::now, |(_, end)| *end)), if turn.is_some() => {
                turn = None;
            }
        }
    }
    (session.observer)(StreamEvent::Closed);
}

impl<B> NamedService for AdsService<B> {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<B: Backend> Service<http::Request<tonic::body::Body>> for AdsService<B> {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let opened = match request.uri().path().rsplit('/').next() {
                Some("DeltaAggregatedResources") => this.open(request, true, DeltaServer::new).await,
                Some("StreamAggregatedResources") => this.open(request, false, SotwServer::new).await,
                _ => Err(Status::unimplemented("")),
            };
            Ok(opened.map_or_else(Status::into_http, Frames::into_response))
        })
    }
}

/// Makes connections to the control plane for the client task: TLS, current certificate, current token.
#[tonic::async_trait]
pub trait Connector: Send + Sync + 'static {
    /// A fresh channel and the metadata of the stream (`authorization: Bearer …`, `clusterid`), or the reason why not.
    async fn connect(&self) -> Result<(Channel, MetadataMap), String>;
}

/// What the client task tells the proxy.
#[derive(Debug)]
pub enum ClientEvent {
    /// A stream is open.
    Connected,
    /// Changes to apply as a whole. Answer through [`Update::accept`] or [`Update::reject`]; dropping it refuses.
    Update(Update),
    /// A response could not be decoded and was refused; nothing changed.
    Refused {
        /// Why.
        message: String,
    },
    /// The stream ended; the former configuration stays, and the task connects again.
    Disconnected {
        /// Why.
        reason: String,
    },
}

/// Changes of one response.
#[derive(Debug)]
pub struct Update {
    /// Type of the response.
    pub kind: ResourceType,
    /// What changes.
    pub changes: Vec<Change>,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Update {
    /// The proxy runs the changes.
    pub fn accept(self) {
        // The stream may have ended meanwhile; the next one tells the versions anew.
        self.answer.send(Ok(())).unwrap_or_default();
    }

    /// The proxy cannot run the changes; it keeps what it had.
    pub fn reject(self, reason: String) {
        self.answer.send(Err(reason)).unwrap_or_default();
    }

    /// Splits into the changes and the handle for the answer.
    pub fn into_parts(self) -> (ResourceType, Vec<Change>, Answer) {
        (self.kind, self.changes, Answer(self.answer))
    }
}

/// Answers an [`Update`] after its changes were taken out.
#[derive(Debug)]
pub struct Answer(oneshot::Sender<Result<(), String>>);

impl Answer {
    /// See [`Update::accept`] and [`Update::reject`].
    pub fn send(self, result: Result<(), String>) {
        self.0.send(result).unwrap_or_default();
    }
}

/// Waiting times between attempts to connect: doubled from `first` to `max`, reset by a stream that delivered.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// First waiting time.
    pub first: Duration,
    /// Longest waiting time.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff {
            first: Duration::from_millis(200),
            max: Duration::from_secs(10),
        }
    }
}

/// Subscribes and keeps subscribed until `stop` is cancelled or the receiver of events is dropped.
pub async fn run_client(
    node: Node,
    connector: Arc<dyn Connector>,
    backoff: Backoff,
    events: mpsc::Sender<ClientEvent>,
    stop: CancellationToken,
) {
    run_client_asking(DeltaClient::new(node), connector, backoff, events, Asks::none(), stop).await;
}

/// What the proxy says to its subscription while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// This resource, from now on.
    Want(ResourceType, String),
    /// These no more.
    GiveUp(ResourceType, Vec<String>),
    /// Everything: the control plane does not give by name.
    Everything,
}

/// Where that comes from.
#[derive(Debug)]
pub struct Asks {
    /// Subscriptions; those that wait while no stream is open are made with the next one.
    pub asks: mpsc::Receiver<Ask>,
    /// Names of held key sets that lack the key of a token. What is said while no stream is open is forgotten.
    pub unknown_keys: mpsc::Receiver<String>,
}

impl Asks {
    /// Nobody says anything.
    pub fn none() -> Asks {
        Asks {
            asks: mpsc::channel(1).1,
            unknown_keys: mpsc::channel(1).1,
        }
    }
}

/// As [`run_client`], with a client of some [`Scope`](crate::client::Scope) and what the proxy says to it.
pub async fn run_client_asking(
    mut client: DeltaClient,
    connector: Arc<dyn Connector>,
    backoff: Backoff,
    events: mpsc::Sender<ClientEvent>,
    mut asks: Asks,
    stop: CancellationToken,
) {
    let mut wait = backoff.first;
    loop {
        let mut delivered = false;
        let outcome = tokio::select! {
            outcome = one_stream(&mut client, connector.as_ref(), &events, &mut asks, &mut delivered) => outcome,
            () = stop.cancelled() => return,
        };
        client.closed();
        let reason = match outcome {
            Ok(()) => return,
            Err(reason) => reason,
        };
        if delivered {
            wait = backoff.first;
        }
        warn!(%reason, retry_ms = wait.as_millis() as u64, "xDS stream ended");
        if events.send(ClientEvent::Disconnected { reason }).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
        wait = (wait * 2).min(backoff.max);
    }
}

/// One stream. `Ok` means that nobody listens any more.
async fn one_stream(
    client: &mut DeltaClient,
    connector: &dyn Connector,
    events: &mpsc::Sender<ClientEvent>,
    asks: &mut Asks,
    delivered: &mut bool,
) -> Result<(), String> {
    let (channel, metadata) = connector.connect().await?;
    let mut ads = AggregatedDiscoveryServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let (tx, rx) = mpsc::channel::<DeltaDiscoveryRequest>(SEND_QUEUE);
    // The queue is filled before anybody reads it, so the opening requests must fit: one per type.
    for request in client.start() {
        tx.send(request).await.map_err(|e| e.to_string())?;
    }
    let mut request = Request::new(ReceiverStream::new(rx));
    *request.metadata_mut() = metadata;
    let mut responses = ads
        .delta_aggregated_resources(request)
        .await
        .map_err(|status| format!("{:?}: {}", status.code(), status.message()))?
        .into_inner();
    info!("xDS stream open");
    if events.send(ClientEvent::Connected).await.is_err() {
        return Ok(());
    }
    while asks.unknown_keys.try_recv().is_ok() {}
    loop {
        let next = tokio::select! {
            next = responses.next() => next,
            Some(ask) = asks.asks.recv() => {
                let (requests, forgotten) = match ask {
                    Ask::Want(kind, name) => (client.want(kind, &name).into_iter().collect(), Vec::new()),
                    Ask::Everything => (client.want_all(), Vec::new()),
                    Ask::GiveUp(kind, names) => {
                        let Accepted { requests, forgotten } = client.give_up(kind, names);
                        (requests, forgotten)
                    }
                };
                if !forget(forgotten, ResourceType::Listener, events).await {
                    return Ok(());
                }
                for request in requests {
                    tx.send(request).await.map_err(|_| "stream closed while asking".to_string())?;
                }
                continue;
            }
            Some(held) = asks.unknown_keys.recv() => {
                let report = client.unknown_key(&held);
                tx.send(report).await.map_err(|_| "stream closed while reporting".to_string())?;
                continue;
            }
        };
        let response = match next {
            Some(Ok(response)) => response,
            Some(Err(status)) => return Err(format!("{:?}: {}", status.code(), status.message())),
            None => return Err("closed by the control plane".into()),
        };
        *delivered = true;
        let answers = match client.on_response(response) {
            Err(refusal) => {
                warn!(message = %refusal.message, "refusing configuration");
                let message = refusal.message;
                if events.send(ClientEvent::Refused { message }).await.is_err() {
                    return Ok(());
                }
                vec![*refusal.request]
            }
            Ok(mut pending) => {
                let (answer, verdict) = oneshot::channel();
                let update = Update {
                    kind: pending.kind(),
                    changes: std::mem::take(&mut pending.changes),
                    answer,
                };
                if events.send(ClientEvent::Update(update)).await.is_err() {
                    return Ok(());
                }
                match verdict.await {
                    Ok(Ok(())) => {
                        let kind = pending.kind();
                        let accepted = client.accept(pending);
                        if !forget(accepted.forgotten, kind, events).await {
                            return Ok(());
                        }
                        accepted.requests
                    }
                    Ok(Err(reason)) => vec![client.reject(pending, &reason)],
                    Err(_) => vec![client.reject(pending, "the proxy dropped the update")],
                }
            }
        };
        for answer in answers {
            tx.send(answer)
                .await
                .map_err(|_| "stream closed while answering".to_string())?;
        }
    }
}

/// Tells of resources to which nothing refers any more, so that there is no verdict to wait for. `false`: nobody listens.
async fn forget(changes: Vec<Change>, kind: ResourceType, events: &mpsc::Sender<ClientEvent>) -> bool {
    if changes.is_empty() {
        return true;
    }
    let update = Update {
        kind,
        changes,
        answer: oneshot::channel().0,
    };
    events.send(ClientEvent::Update(update)).await.is_ok()
}
