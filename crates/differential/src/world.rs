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
    /// Tokens that it carries.
    pub tokens: Vec<(Place, Token)>,
}

/// Where a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `Authorization: Bearer TOKEN`.
    Bearer,
    /// `X-Token: Token TOKEN`.
    Header,
    /// Query parameter `access_token`.
    AccessToken,
    /// Query parameter `token`.
    Parameter,
    /// Cookie `session`.
    Cookie,
}

/// A token before it is signed.
#[derive(Clone, Debug)]
pub struct Token {
    /// Payload.
    pub claims: Value,
    /// How it is signed.
    pub signature: Signature,
}

/// Keys, right and wrong ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signature {
    /// ES256 by the first issuer.
    First,
    /// EdDSA by the first issuer.
    FirstEd,
    /// ES256 by the second issuer.
    Second,
    /// By somebody else under the first issuer's key id.
    Forged,
    /// By somebody else under a key id of nobody.
    Unknown,
    /// Algorithm `none`, no signature.
    Absent,
    /// Two sections only.
    Malformed,
}

/// The first issuer, of [`Signature::First`] and [`Signature::FirstEd`].
pub const FIRST_ISSUER: &str = "https://issuer.example";
/// The second issuer, of [`Signature::Second`].
pub const SECOND_ISSUER: &str = "testing@example.org";

impl Request {
    /// The bytes on the wire; `mint` signs tokens, `case` becomes a header that logs show.
    pub fn bytes(&self, case: usize, mint: &dyn Fn(&Token) -> String) -> Vec<u8> {
        let mut target = self.target.clone();
        let mut headers = String::new();
        for (place, token) in &self.tokens {
            let text = mint(token);
            let parameter = match place {
                Place::Bearer => {
                    headers.push_str(&format!("Authorization: Bearer {text}\r\n"));
                    continue;
                }
                Place::Header => {
                    headers.push_str(&format!("x-token: Token {text}\r\n"));
                    continue;
                }
                Place::Cookie => {
                    headers.push_str(&format!("cookie: a=b; session={text}\r\n"));
                    continue;
                }
                Place::AccessToken => format!("access_token={text}"),
                Place::Parameter => format!("token={text}"),
            };
            let end = target.iter().position(|b| *b == b'#').unwrap_or(target.len());
            let mark = if target[..end].contains(&b'?') { '&' } else { '?' };
            target.splice(end..end, format!("{mark}{parameter}").into_bytes());
        }
        let mut out = format!("{} ", self.method).into_bytes();
        out.extend_from_slice(&target);
        out.extend_from_slice(format!(" HTTP/1.1\r\nHost: {}\r\nx-case: {case}\r\n{headers}", self.host).as_bytes());
        for (name, value) in &self.headers {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
        out
    }
}
