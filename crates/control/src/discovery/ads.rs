//! Who may open an xDS stream, and what it is then given (S4.36, S4.37).
//!
//! Port 15012: every stream authenticates, and the identity's namespace and service account must be those of the
//! node. Port 15010: no identity, therefore no secrets. A stream ends when the proof of its peer's identity does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value as PbValue};
use mantlet_identity::SpiffeId;
use mantlet_runtime::Readiness;
use mantlet_runtime::task::AbortOnDrop;
use mantlet_translate::node::ProxyNode;
use mantlet_xds::ads::{Backend, Hello, Session};
use mantlet_xds::server::StreamEvent;
use mantlet_xds::{Dialect, Node};
use serde_json::Value;
use tonic::Status;

use super::board::Board;
use super::hub::{Hub, Subscriber};
use super::metrics::PilotMetrics;
use crate::auth::{Authenticators, CallContext, Caller, Clock};
use crate::jwks::Resolver;

/// Most streams at once.
const MAX_STREAMS: usize = 20_000;
/// Deepest metadata that is read.
const MAX_DEPTH: usize = 16;
/// Most values of metadata that are read.
const MAX_VALUES: usize = 4096;
/// How long a stream waits for the first sync of the caches before it is told to come back.
const WAIT_FOR_SYNC: Duration = Duration::from_secs(5);

/// Admits streams of one port.
pub struct AdsBackend {
    hub: Hub,
    board: Board,
    metrics: PilotMetrics,
    readiness: Readiness,
    clock: Arc<dyn Clock>,
    /// `None` on the plaintext port.
    authenticators: Option<Authenticators>,
    identifier: String,
    /// Told when a proxy met a token of an unknown key.
    keys: Option<Resolver>,
    open: Arc<AtomicUsize>,
}

impl AdsBackend {
    /// A backend; without `authenticators` nobody has an identity.
    pub fn new(
        hub: Hub,
        board: Board,
        metrics: PilotMetrics,
        readiness: Readiness,
        clock: Arc<dyn Clock>,
        authenticators: Option<Authenticators>,
        identifier: String,
    ) -> AdsBackend {
        AdsBackend {
            hub,
            board,
            metrics,
            readiness,
            clock,
            authenticators,
            identifier,
            keys: None,
            open: Arc::default(),
        }
    }

    /// The same, telling `keys` when a proxy met a token of an unknown key.
    #[must_use]
    pub fn telling(self, keys: Resolver) -> AdsBackend {
        AdsBackend {
            keys: Some(keys),
            ..self
        }
    }

    async fn caller(&self, hello: &Hello) -> Result<Option<Caller>, Status> {
        let Some(authenticators) = &self.authenticators else {
            return Ok(None);
        };
        let call = CallContext::from_parts(&hello.metadata, &hello.extensions);
        match authenticators.authenticate(&call).await {
            Ok(caller) => Ok(Some(caller)),
            Err(failure) => {
                self.metrics.refused.with(&["unauthenticated"]).inc();
                let peer = call.peer.map_or_else(|| "unknown".to_owned(), |p| p.to_string());
                tracing::warn!(target: "ads", "Failed to authenticate client from {peer}: {failure}");
                Err(Status::unauthenticated("authentication failure"))
            }
        }
    }
}

#[tonic::async_trait]
impl Backend for AdsBackend {
    async fn connect(&self, hello: Hello) -> Result<Session, Status> {
        let caller = self.caller(&hello).await?;
        let (node, dialect) = read_node(&hello.node).map_err(|reason| {
            self.metrics.refused.with(&["bad_node"]).inc();
            Status::invalid_argument(reason)
        })?;
        let identity = match &caller {
            None => None,
            Some(caller) => Some(check_identity(caller, &node).map_err(|reason| {
                self.metrics.refused.with(&["identity_mismatch"]).inc();
                tracing::warn!(target: "ads", "Unauthorized XDS: {reason}");
                Status::permission_denied(reason)
            })?),
        };
        if tokio::time::timeout(WAIT_FOR_SYNC, self.readiness.ready())
            .await
            .is_err()
        {
            return Err(Status::unavailable(
                "server is not ready to serve discovery information",
            ));
        }
        let slot = Slot::take(&self.open)
            .ok_or_else(|| Status::resource_exhausted(format!("{MAX_STREAMS} streams are open")))?;
        let node = Arc::new(node);
        let subscriber = Subscriber {
            node: node.clone(),
            dialect,
            identity,
        };
        let admitted = self
            .hub
            .connect(subscriber)
            .await
            .ok_or_else(|| Status::unavailable("shutting down"))?;
        tracing::info!(
            target: "ads",
            "ADS: new {} connection for node:{}-{}",
            if hello.delta { "delta" } else { "sotw" },
            node.display_name(),
            admitted.id
        );
        let id = admitted.id;
        let expiry = caller
            .and_then(|c| c.expires)
            .map(|at| self.end_at(id, &node, at - self.clock.now()));
        let (hub, board, keys) = (self.hub.clone(), self.board.clone(), self.keys.clone());
        let observer = move |event: StreamEvent| {
            // Held until the stream is gone.
            let _kept = (&slot, &expiry);
            if matches!(event, StreamEvent::Closed) {
                tracing::info!(target: "ads", "ADS: {}-{id} terminated", node.display_name());
                hub.disconnect(id);
            } else {
                if let (StreamEvent::UnknownKeys { held }, Some(keys)) = (&event, &keys) {
                    held.iter().for_each(|name| keys.unknown_key(name));
                }
                board.event(id, event);
            }
        };
        Ok(Session {
            resources: admitted.resources,
            observer: Box::new(observer),
            identifier: self.identifier.clone(),
        })
    }
}

impl AdsBackend {
    /// Ends a stream when its peer's credential ends; the peer reconnects with a fresh one.
    fn end_at(&self, id: u64, node: &ProxyNode, left: time::Duration) -> AbortOnDrop {
        let hub = self.hub.clone();
        let name = node.display_name();
        let left = Duration::try_from(left).unwrap_or_default();
        let task = tokio::spawn(async move {
            tokio::time::sleep(left).await;
            tracing::info!(target: "ads", "ADS: {name}-{id} ends, the peer's credential has expired");
            hub.disconnect(id);
        });
        AbortOnDrop(task.abort_handle())
    }
}

/// A place among the open streams.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Option<Slot> {
        open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
            (n < MAX_STREAMS).then_some(n + 1)
        })
        .ok()
        .map(|_| Slot(open.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The identity under which the node is served: one of the caller's that has the node's namespace and account.
fn check_identity(caller: &Caller, node: &ProxyNode) -> Result<SpiffeId, String> {
    if let Some(pod) = &caller.pod
        && pod.name != node.name
    {
        return Err(format!(
            "the token belongs to pod {}, the node claims to be {}",
            pod.name, node.name
        ));
    }
    caller
        .identities
        .iter()
        .find(|id| {
            id.namespace() == node.namespace
                && node
                    .service_account
                    .as_deref()
                    .is_none_or(|sa| sa == id.service_account())
        })
        .cloned()
        .ok_or_else(|| {
            format!(
                "no identities ({}) matched {}/{}",
                caller
                    .identities
                    .iter()
                    .map(SpiffeId::as_str)
                    .collect::<Vec<_>>()
                    .join(", "),
                node.namespace,
                node.service_account.as_deref().unwrap_or("*"),
            )
        })
}

fn read_node(node: &Node) -> Result<(ProxyNode, Dialect), String> {
    let mut left = MAX_VALUES;
    let metadata = match &node.metadata {
        Some(metadata) => object(&metadata.fields, MAX_DEPTH, &mut left)
            .ok_or_else(|| format!("node metadata is deeper than {MAX_DEPTH} or has more than {MAX_VALUES} values"))?,
        None => Value::Null,
    };
    let parsed = ProxyNode::parse(&node.id, &metadata).map_err(|e| e.to_string())?;
    // Istio's proxies say which Istio they are of; a bare Envoy knows none of its filters.
    let dialect = if parsed.mantlet || !parsed.version.is_empty() {
        Dialect::Istio
    } else {
        Dialect::PlainEnvoy
    };
    Ok((parsed, dialect))
}

fn object<'a>(
    fields: impl IntoIterator<Item = (&'a String, &'a PbValue)>,
    depth: usize,
    left: &mut usize,
) -> Option<Value> {
    let fields: BTreeMap<&String, &PbValue> = fields.into_iter().collect();
    let mut map = serde_json::Map::new();
    for (name, value) in fields {
        map.insert(name.clone(), json(value, depth, left)?);
    }
    Some(Value::Object(map))
}

fn json(value: &PbValue, depth: usize, left: &mut usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    *left = left.checked_sub(1)?;
    Some(match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::NumberValue(n)) => serde_json::Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::StructValue(Struct { fields })) => object(fields, depth, left)?,
        Some(Kind::ListValue(list)) => {
            let mut out = Vec::new();
            for value in &list.values {
                out.push(json(value, depth, left)?);
            }
            Value::Array(out)
        }
    })
}
