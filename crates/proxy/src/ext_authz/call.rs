//! One call to a cluster that this proxy makes for itself: endpoint, connection, exchange, bounded reading.
//!
//! The same pools, TLS and limits as forwarded requests have; no retries but for connections that were dead already.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::BodyExt;
use mantlet_model::cluster::{Discovery, UpstreamProtocol};

use crate::connection::Downstream;
use crate::http::body::{BodyError, RequestBody, UpstreamBody};
use crate::http::forward;
use crate::upstream::pool::Lease;
use crate::upstream::{ActiveGuard, Endpoint};

/// Most connections that may turn out to be dead before a new one is made.
const STALE: u32 = 3;

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No such cluster in the configuration.
    #[error("cluster {0} is not known")]
    NoCluster(String),
    /// The cluster has nobody who could answer.
    #[error("no healthy upstream")]
    NoEndpoint,
    /// Too many requests under way already.
    #[error("overflow")]
    Overflow,
    /// gRPC needs HTTP/2, the cluster speaks HTTP/1.1.
    #[error("the cluster does not speak HTTP/2")]
    NotHttp2,
    /// No connection.
    #[error("{0}")]
    Connect(#[from] crate::upstream::connect::ConnectError),
    /// The exchange broke.
    #[error("{0}")]
    Exchange(BodyError),
}

/// A response whose body has not been read.
pub(super) struct Answer {
    pub(super) head: http::response::Parts,
    body: UpstreamBody,
    lease: Lease,
    endpoint: Rc<Endpoint>,
    _active: ActiveGuard,
}

/// A body that was read as far as the bounds allow.
pub(super) struct Read {
    pub(super) bytes: Bytes,
    pub(super) trailers: Option<HeaderMap>,
    /// Whether the end was reached.
    pub(super) complete: bool,
}

impl Answer {
    /// Reads at most `limit` bytes; an HTTP/1.1 connection goes back to its pool only when the end was reached.
    pub(super) async fn read(self, limit: usize) -> Read {
        let Answer {
            mut body,
            lease,
            endpoint,
            ..
        } = self;
        let mut bytes = BytesMut::new();
        let mut trailers = None;
        let complete = loop {
            match body.frame().await {
                None => break true,
                Some(Err(_)) => break false,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let room = limit - bytes.len();
                        bytes.extend_from_slice(&data[..data.len().min(room)]);
                        if data.len() > room {
                            break false;
                        }
                    }
                    Err(frame) => trailers = frame.into_trailers().ok().or(trailers),
                },
            }
        };
        if let (Lease::Http1(lease), true) = (lease, complete) {
            endpoint.pool.give_back(lease);
        }
        Read {
            bytes: bytes.freeze(),
            trailers,
            complete,
        }
    }
}

/// Sends a request to a cluster. `grpc` wants HTTP/2.
pub(super) async fn call(
    downstream: &Rc<Downstream>,
    cluster: &str,
    authority: &HeaderValue,
    grpc: bool,
    request: Request<Bytes>,
) -> Result<Answer, CallError> {
    let worker = &downstream.worker;
    let Some(cluster) = worker.upstreams.cluster(cluster) else {
        return Err(CallError::NoCluster(cluster.to_string()));
    };
    if cluster.active.get() >= cluster.model.limits.requests {
        return Err(CallError::Overflow);
    }
    if matches!(cluster.model.discovery, Discovery::OriginalDestination { .. }) {
        // The connection's own destination is not the provider.
        return Err(CallError::NoEndpoint);
    }
    let h2 = match cluster.model.protocol {
        UpstreamProtocol::Http2 => true,
        UpstreamProtocol::Downstream => grpc,
        UpstreamProtocol::Http1 if grpc => return Err(CallError::NotHttp2),
        UpstreamProtocol::Http1 => false,
    };
    let (head, bytes) = request.into_parts();
    let mut stale_left = STALE;
    let mut avoid: Option<Rc<Endpoint>> = None;
    loop {
        let endpoint = cluster
            .choose(downstream.facts.destination, avoid.as_ref())
            .ok_or(CallError::NoEndpoint)?;
        let active = ActiveGuard::new(cluster.clone(), endpoint.clone());
        let lease = forward::acquire(worker, &cluster, &endpoint, true, h2, false).await?;
        let mut request = Request::new(RequestBody::own(bytes.clone()));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = head.uri.clone();
        *request.headers_mut() = head.headers.clone();
        forward::target(&mut request, authority, h2, endpoint.tls.is_some());
        match lease.send(request).await {
            Ok(response) => {
                let (head, body) = response.into_parts();
                return Ok(Answer {
                    head,
                    body,
                    lease,
                    endpoint,
                    _active: active,
                });
            }
            Err(unanswered) => {
                if unanswered.back.is_some() && lease.reused() && stale_left > 0 {
                    stale_left -= 1;
                    avoid = None;
                    continue;
                }
                return Err(CallError::Exchange(unanswered.error));
            }
        }
    }
}
