//! What a question consists of: objects as a user applies them, a workload, a connection and bytes on the wire.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

/// Path normalisation of the mesh (S2.111).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalization {
    /// `NONE`.
    None,
    /// `BASE`, and what an absent setting means.
    Base,
    /// `MERGE_SLASHES`.
    MergeSlashes,
    /// `DECODE_AND_MERGE_SLASHES`.
    DecodeAndMergeSlashes,
}

impl Normalization {
    /// The value of `pathNormalization.normalization`.
    pub fn name(self) -> &'static str {
        match self {
            Normalization::None => "NONE",
            Normalization::Base => "BASE",
            Normalization::MergeSlashes => "MERGE_SLASHES",
            Normalization::DecodeAndMergeSlashes => "DECODE_AND_MERGE_SLASHES",
        }
    }
}

/// Everything that is configured.
#[derive(Clone, Debug)]
pub struct World {
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Path normalisation.
    pub normalization: Normalization,
    /// Namespace whose policies are mesh-wide.
    pub root_namespace: String,
    /// Istio objects, as JSON.
    pub objects: Vec<Value>,
    /// Namespace of the workload.
    pub namespace: String,
    /// Labels of the workload.
    pub labels: BTreeMap<String, String>,
}

/// A connection as both ends know it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// URI names in the client's certificate; `None` for plaintext.
    pub peer: Option<Vec<String>>,
    /// Address of the TCP peer.
    pub source: IpAddr,
    /// Where the client connected to.
    pub destination: SocketAddr,
    /// Server name of the ClientHello.
    pub sni: Option<String>,
}

/// A request, byte by byte.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Request target as sent.
    pub target: Vec<u8>,
    /// Value of `Host`.
    pub host: String,
    /// Other headers in order, names as sent.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Payload of the one valid token among the headers, as the tests minted it.
    pub claims: Option<Value>,
}
