//! The client of external authorizers: asks one about a request or a connection, through this proxy's own clusters, so
//! with the mesh's identity and the destination's rules.
//!
//! Called by `http::custom` and `tcp`. Everything that a provider sends is bounded in size and time; what is asked of it
//! and what its answer means is here, what is done about it is the callers' matter.

mod call;
mod grpc;
mod http;

use std::rc::Rc;
use std::time::Duration;

use ::http::{HeaderName, HeaderValue, StatusCode};
use bytes::Bytes;
use mantlet_model::ext_authz::{CheckProtocol, ExtAuthz};

use crate::connection::Downstream;
use crate::http::request::Exchange;

pub use call::CallError;

/// Longest wait for an answer, whatever the configuration says.
const LONGEST: Duration = Duration::from_secs(3600);
/// Wait for an answer when the configuration says "none".
const DEFAULT: Duration = Duration::from_secs(600);
/// Most bytes of an answer's body.
const MAX_ANSWER: usize = 256 * 1024;
/// Most header changes that an answer may ask for.
const MAX_CHANGES: usize = 256;

/// Says whether the provider sees only the first part of the body.
const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

/// What a provider said.
#[derive(Debug)]
pub enum Outcome {
    /// The request goes on, changed like this.
    Allowed(Changes),
    /// The request ends with this answer.
    Denied(Denial),
    /// Nothing that counts: unreachable, too late, broken.
    Failed(Failed),
}

/// Why there is no answer.
#[derive(Debug)]
pub struct Failed {
    /// For the log.
    pub reason: String,
    /// Whether time ran out.
    pub timeout: bool,
    /// What the provider wants the client to be told about it.
    pub answer: Option<Denial>,
}

impl Failed {
    fn new(reason: impl Into<String>) -> Self {
        Failed {
            reason: reason.into(),
            timeout: false,
            answer: None,
        }
    }
}

/// Changes of an allowed request and its response.
#[derive(Debug, Default)]
pub struct Changes {
    /// Changes of the request, in order.
    pub request: Vec<Change>,
    /// Changes of the response, in order.
    pub response: Vec<Change>,
    /// Query parameters to set.
    pub query_set: Vec<(String, String)>,
    /// Query parameters to remove.
    pub query_remove: Vec<String>,
}

/// One change of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Replaces all values.
    Set(HeaderName, HeaderValue),
    /// Adds a value if the header is there, and nothing otherwise.
    AppendIfPresent(HeaderName, HeaderValue),
    /// Adds a value.
    Add(HeaderName, HeaderValue),
    /// Sets it unless it is there.
    AddIfAbsent(HeaderName, HeaderValue),
    /// Replaces it if it is there.
    SetIfPresent(HeaderName, HeaderValue),
    /// Removes all values.
    Remove(HeaderName),
}

/// A provider's own answer to the client.
#[derive(Debug)]
pub struct Denial {
    /// Status.
    pub status: StatusCode,
    /// Changes of the answer's headers, in order.
    pub headers: Vec<Change>,
    /// Body.
    pub body: Bytes,
}

/// The part of a body that the provider sees.
#[derive(Debug, Clone, Default)]
pub struct ShownBody {
    /// Its bytes.
    pub bytes: Bytes,
    /// Whether there is more.
    pub partial: bool,
}

fn limit(provider: &ExtAuthz) -> Duration {
    match provider.timeout_ms {
        0 => DEFAULT,
        ms => Duration::from_millis(ms).min(LONGEST),
    }
}

/// Asks about a request. `body` is what of its body is to be shown, if anything.
pub async fn check_request(exchange: &Exchange, provider: &ExtAuthz, body: Option<ShownBody>) -> Outcome {
    let asked = async {
        match &provider.protocol {
            CheckProtocol::Http(check) => http::check(exchange, provider, check, body).await,
            CheckProtocol::Grpc { authority } => {
                let question = grpc::of_request(exchange, provider, body);
                grpc::check(&exchange.downstream, provider, authority, question).await
            }
        }
    };
    within(provider, asked).await
}

/// Asks about a connection; providers over HTTP have no say about those.
pub async fn check_connection(downstream: &Rc<Downstream>, provider: &ExtAuthz) -> Outcome {
    let CheckProtocol::Grpc { authority } = &provider.protocol else {
        return Outcome::Failed(Failed::new("the provider cannot be asked about connections"));
    };
    let question = grpc::of_connection(downstream);
    within(provider, grpc::check(downstream, provider, authority, question)).await
}

async fn within(provider: &ExtAuthz, asked: impl Future<Output = Outcome>) -> Outcome {
    match tokio::time::timeout(limit(provider), asked).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failed(Failed {
            timeout: true,
            ..Failed::new("timeout")
        }),
    }
}

/// Headers that an answer cannot change: they belong to the message on the wire, and another value would make two
/// messages of one.
fn is_framing(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "content-length"
            | "transfer-encoding"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "upgrade"
            | "te"
            | "trailer"
            | "host"
    )
}

/// Replaces what is there under the names of a denial's headers; several values of one name all stay.
fn replacing(headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>) -> Vec<Change> {
    let mut out: Vec<Change> = Vec::new();
    for (name, value) in headers.into_iter().take(MAX_CHANGES) {
        let again = out.iter().any(|c| matches!(c, Change::Set(n, _) if *n == name));
        out.push(if again {
            Change::Add(name, value)
        } else {
            Change::Set(name, value)
        });
    }
    out
}

/// Applies changes; framing headers stay as they are.
pub fn apply(headers: &mut ::http::HeaderMap, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Set(name, _)
            | Change::AppendIfPresent(name, _)
            | Change::Add(name, _)
            | Change::AddIfAbsent(name, _)
            | Change::SetIfPresent(name, _)
            | Change::Remove(name)
                if is_framing(name) => {}
            Change::Set(name, value) => {
                headers.insert(name.clone(), value.clone());
            }
            Change::Add(name, value) => {
                headers.append(name.clone(), value.clone());
            }
            Change::AddIfAbsent(name, value) => {
                if !headers.contains_key(name) {
                    headers.insert(name.clone(), value.clone());
                }
            }
            Change::SetIfPresent(name, value) => {
                if headers.contains_key(name) {
                    headers.insert(name.clone(), value.clone());
                }
            }
            Change::AppendIfPresent(name, value) => {
                // One field with commas, so that every reader sees one value (RFC 9110 section 5.3).
                if let Some(first) = headers.get(name) {
                    let joined = [first.as_bytes(), b",", value.as_bytes()].concat();
                    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
                        let rest: Vec<HeaderValue> = headers.get_all(name).iter().skip(1).cloned().collect();
                        headers.insert(name.clone(), joined);
                        for value in rest {
                            headers.append(name.clone(), value);
                        }
                    }
                }
            }
            Change::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}
