//! Peer metadata in headers (S6.69): who the other workload says it is. For telemetry only, never for policy (S6.70).

use std::collections::HashMap;
use std::rc::Rc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{HeaderMap, HeaderValue};
use mantlet_model::http::{HttpManager, Reporter};
use mantlet_model::names::Direction;
use prost::Message;
use prost_types::value::Kind;
use prost_types::{Struct, Value};

use crate::connection::Downstream;
use crate::http::headers::{PEER_METADATA, PEER_METADATA_ID};
use crate::telemetry::record::Account;
use crate::worker::Worker;

/// Most peers that are remembered per worker.
const MAX_PEERS: usize = 1024;
/// Longest header that is looked at.
const MAX_HEADER: usize = 16 * 1024;

/// A workload as metrics show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerLabels {
    /// Number that is unique in its worker; 0 is the unknown peer.
    pub id: u32,
    /// Workload name.
    pub workload: String,
    /// Namespace.
    pub namespace: String,
    /// `service.istio.io/canonical-name`.
    pub canonical_name: String,
    /// `service.istio.io/canonical-revision`.
    pub canonical_revision: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
    /// Cluster id.
    pub cluster: String,
}

impl PeerLabels {
    /// A peer that says nothing.
    pub fn unknown() -> Self {
        let unknown = || "unknown".to_string();
        PeerLabels {
            id: 0,
            workload: unknown(),
            namespace: unknown(),
            canonical_name: unknown(),
            canonical_revision: "latest".to_string(),
            app: unknown(),
            version: unknown(),
            cluster: unknown(),
        }
    }
}

/// Peers by the header they send.
#[derive(Default)]
pub struct PeerCache {
    by_header: HashMap<Vec<u8>, Rc<PeerLabels>>,
    /// The last one that was asked for: consecutive requests often come from one peer.
    last: Option<(HeaderValue, Rc<PeerLabels>)>,
    next: u32,
}

impl PeerCache {
    /// The peer behind a header value; unknown when it cannot be read.
    pub fn get(&mut self, header: &HeaderValue) -> Option<Rc<PeerLabels>> {
        if let Some((last, found)) = &self.last
            && last == header
        {
            return Some(found.clone());
        }
        let bytes = header.as_bytes();
        if bytes.len() > MAX_HEADER {
            return None;
        }
        if let Some(found) = self.by_header.get(bytes) {
            self.last = Some((header.clone(), found.clone()));
            return Some(found.clone());
        }
        let mut labels = decode(bytes)?;
        if self.by_header.len() >= MAX_PEERS {
            self.by_header.clear();
        }
        self.next = self.next.wrapping_add(1).max(1);
        labels.id = self.next;
        let labels = Rc::new(labels);
        self.by_header.insert(bytes.to_vec(), labels.clone());
        Some(labels)
    }
}

/// The two header values that this workload sends.
pub fn encode(local: &PeerLabels, node_id: &str) -> Option<(HeaderValue, HeaderValue)> {
    let text = |s: &str| Value {
        kind: Some(Kind::StringValue(s.to_string())),
    };
    let labels = Struct {
        fields: [
            ("app", &local.app),
            ("version", &local.version),
            ("service.istio.io/canonical-name", &local.canonical_name),
            ("service.istio.io/canonical-revision", &local.canonical_revision),
        ]
        .into_iter()
        .filter(|(_, v)| !v.is_empty() && v.as_str() != "unknown")
        .map(|(k, v)| (k.to_string(), text(v)))
        .collect(),
    };
    let root = Struct {
        fields: [
            ("NAME".to_string(), text(node_id.split('~').nth(2).unwrap_or_default())),
            ("NAMESPACE".to_string(), text(&local.namespace)),
            ("WORKLOAD_NAME".to_string(), text(&local.workload)),
            ("CLUSTER_ID".to_string(), text(&local.cluster)),
            (
                "LABELS".to_string(),
                Value {
                    kind: Some(Kind::StructValue(labels)),
                },
            ),
        ]
        .into_iter()
        .collect(),
    };
    let metadata = HeaderValue::from_str(&STANDARD.encode(root.encode_to_vec())).ok()?;
    Some((metadata, HeaderValue::from_str(node_id).ok()?))
}

fn decode(header: &[u8]) -> Option<PeerLabels> {
    let bytes = STANDARD.decode(header).ok()?;
    let root = Struct::decode(&bytes[..]).ok()?;
    let text = |s: &Struct, name: &str| match &s.fields.get(name)?.kind {
        Some(Kind::StringValue(v)) if !v.is_empty() => Some(v.chars().take(253).collect::<String>()),
        _ => None,
    };
    let mut out = PeerLabels::unknown();
    let set = |to: &mut String, value: Option<String>| {
        if let Some(value) = value {
            *to = value;
        }
    };
    set(&mut out.workload, text(&root, "WORKLOAD_NAME"));
    set(&mut out.namespace, text(&root, "NAMESPACE"));
    set(&mut out.cluster, text(&root, "CLUSTER_ID"));
    if let Some(Kind::StructValue(labels)) = root.fields.get("LABELS").and_then(|v| v.kind.as_ref()) {
        set(&mut out.app, text(labels, "app"));
        set(&mut out.version, text(labels, "version"));
        set(&mut out.canonical_name, text(labels, "service.istio.io/canonical-name"));
        set(
            &mut out.canonical_revision,
            text(labels, "service.istio.io/canonical-revision"),
        );
    }
    if out.canonical_name == "unknown" {
        out.canonical_name.clone_from(&out.workload);
    }
    Some(out)
}

/// Reads and removes the headers of a request, before anyone else sees it (inbound). On a connection that another Mantlet proxy
/// shares among its requests, the first one speaks for all: they come from one workload.
pub fn incoming_request(
    downstream: &Downstream,
    manager: &HttpManager,
    headers: &mut HeaderMap,
) -> Option<Rc<PeerLabels>> {
    if manager.telemetry != Some(Reporter::Destination) {
        return None;
    }
    let mut shared = downstream.shared_by.borrow_mut();
    let Some(header) = headers.remove(PEER_METADATA) else {
        return shared.as_ref().and_then(|s| s.peer.clone());
    };
    headers.remove(PEER_METADATA_ID);
    let peer = downstream.worker.telemetry.peers.borrow_mut().get(&header);
    if let Some(shared) = &mut *shared {
        shared.peer.clone_from(&peer);
    }
    peer
}

/// Sets the headers of a request that leaves for the mesh (outbound); inbound requests go to the app without. What the sender
/// put there has been removed.
pub fn outgoing(worker: &Worker, manager: &HttpManager, direction: Direction, headers: &mut HeaderMap) {
    if direction == Direction::Inbound || manager.telemetry.is_none() {
        return;
    }
    if let Some((metadata, id)) = &worker.shared.telemetry.local_metadata {
        headers.insert(PEER_METADATA, metadata.clone());
        headers.insert(PEER_METADATA_ID, id.clone());
    }
}

/// The response direction: what the upstream put there is removed; an outbound proxy reads it.
pub fn incoming_response(worker: &Worker, direction: Direction, headers: &mut HeaderMap, account: &mut Account) {
    headers.remove(PEER_METADATA_ID);
    let header = headers.remove(PEER_METADATA);
    if direction == Direction::Outbound
        && let Some(header) = header
    {
        account.upstream_peer = worker.telemetry.peers.borrow_mut().get(&header);
    }
}

/// An inbound proxy adds its own metadata to a response if it was told the client's.
/// On a shared connection the first answer speaks for all.
pub fn outgoing_response(downstream: &Downstream, direction: Direction, headers: &mut HeaderMap, account: &Account) {
    if direction != Direction::Inbound || account.downstream_peer.is_none() {
        return;
    }
    let told = match &mut *downstream.shared_by.borrow_mut() {
        Some(shared) => std::mem::replace(&mut shared.told, true),
        None => false,
    };
    if !told && let Some((metadata, id)) = &downstream.worker.shared.telemetry.local_metadata {
        headers.insert(PEER_METADATA, metadata.clone());
        headers.insert(PEER_METADATA_ID, id.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_proxy_sends_another_reads() {
        let local = PeerLabels {
            id: 0,
            workload: "web-v1".into(),
            namespace: "shop".into(),
            canonical_name: "web".into(),
            canonical_revision: "v1".into(),
            app: "web".into(),
            version: "v1".into(),
            cluster: "Kubernetes".into(),
        };
        let (header, id) = encode(&local, "sidecar~10.0.0.1~web-v1-abc.shop~shop.svc.cluster.local").unwrap();
        assert_eq!(id, "sidecar~10.0.0.1~web-v1-abc.shop~shop.svc.cluster.local");
        let mut cache = PeerCache::default();
        let got = cache.get(&header).unwrap();
        assert_eq!(
            PeerLabels {
                id: 0,
                ..(*got).clone()
            },
            local
        );
        assert!(Rc::ptr_eq(&got, &cache.get(&header).unwrap()));
    }

    #[test]
    fn junk_is_an_unknown_peer_and_no_panic() {
        let mut cache = PeerCache::default();
        for junk in ["", "%%%", "AAAA", "////", "CgQKAE5P"] {
            let _ = cache.get(&HeaderValue::from_static(junk));
        }
    }
}
