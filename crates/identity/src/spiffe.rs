//! SPIFFE IDs and trust domains: the names that policy, certificates and logs agree on.
//!
//! The parser is the gate that every foreign name passes; it accepts exactly Istio's form
//! `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` and nothing that two parsers could read differently
//! (upper-case trust domains, ports, user info, percent signs, empty or dot segments, trailing slashes).

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Scheme and authority marker, compared byte for byte.
const SCHEME: &str = "spiffe://";
/// SPIFFE-ID section 2.1: a trust domain name is at most 255 bytes.
const MAX_TRUST_DOMAIN: usize = 255;
/// SPIFFE-ID section 2.3: implementations need not support more than 2048 bytes.
const MAX_SPIFFE_ID: usize = 2048;

/// Why a text is not a SPIFFE ID of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Not `spiffe://…`, or not exactly the five parts.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// The trust domain has characters or a length that SPIFFE does not allow.
    #[error("{0:?} is not a trust domain (lower-case letters, digits, '.', '-', '_', at most 255 bytes)")]
    TrustDomain(String),
    /// Namespace or service account has characters that SPIFFE does not allow, or is a dot segment.
    #[error("{0:?} is not a path segment of a SPIFFE ID (letters, digits, '.', '-', '_'; not '.' or '..')")]
    Segment(String),
    /// Longer than 2048 bytes.
    #[error("a SPIFFE ID has at most 2048 bytes, this one has {0}")]
    TooLong(usize),
}

/// A trust domain, for example `cluster.local`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain as it stands in a certificate or token: nothing is repaired.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(SpiffeIdError::TrustDomain(shorten(text)));
        }
        Ok(Self(text.into()))
    }

    /// Parses a trust domain from mesh configuration, where Istio reads `@` as `.` (`meshConfig.trustDomain`).
    pub fn from_config(text: &str) -> Result<Self, SpiffeIdError> {
        Self::parse(&text.replace('@', "."))
    }

    /// The name, for example `cluster.local`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The identity of a workload: trust domain, namespace, service account. Cloning is a reference count.
#[derive(Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// End of the trust domain in `uri`.
    td_end: u16,
    /// End of the namespace in `uri`.
    ns_end: u16,
}

impl SpiffeId {
    /// Puts the three parts together; each is checked as [`SpiffeId::parse`] would.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        Self::parse(&format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}"))
    }

    /// Parses `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, strictly.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > MAX_SPIFFE_ID {
            return Err(SpiffeIdError::TooLong(text.len()));
        }
        let form = || SpiffeIdError::Form(shorten(text));
        let rest = text.strip_prefix(SCHEME).ok_or_else(form)?;
        let mut parts = rest.split('/');
        let (td, ns_word, ns, sa_word, sa) =
            match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
                (Some(td), Some(ns_word), Some(ns), Some(sa_word), Some(sa)) if parts.next().is_none() => {
                    (td, ns_word, ns, sa_word, sa)
                }
                _ => return Err(form()),
            };
        if ns_word != "ns" || sa_word != "sa" {
            return Err(form());
        }
        TrustDomain::parse(td)?;
        check_segment(ns)?;
        check_segment(sa)?;
        let td_end = SCHEME.len() + td.len();
        let ns_end = td_end + "/ns/".len() + ns.len();
        // Both fit: the whole text has at most 2048 bytes.
        Ok(Self {
            uri: text.into(),
            td_end: td_end as u16,
            ns_end: ns_end as u16,
        })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The form that policies write in `principals` and logs show: the URI without its scheme.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// The trust domain as text.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.td_end)]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.td_end) + "/ns/".len()..usize::from(self.ns_end)]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.ns_end) + "/sa/".len()..]
    }
}

fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if segment.is_empty() || segment == "." || segment == ".." || !segment.bytes().all(allowed) {
        return Err(SpiffeIdError::Segment(shorten(segment)));
    }
    Ok(())
}

/// Keeps error texts short when the input is hostile.
fn shorten(text: &str) -> String {
    const KEEP: usize = 120;
    if text.chars().count() <= KEEP {
        text.to_owned()
    } else {
        text.chars().take(KEEP).chain("…".chars()).collect()
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}
impl Eq for SpiffeId {}
impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}
impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}
impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}
impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}
impl std::str::FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}
impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.uri)
    }
}
impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}
impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::str::FromStr for TrustDomain {
    type Err = SpiffeIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}
impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
impl<'de> Deserialize<'de> for TrustDomain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_come_back() {
        let id = SpiffeId::parse("spiffe://cluster.local/ns/default/sa/customers").unwrap();
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.namespace(), "default");
        assert_eq!(id.service_account(), "customers");
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/customers");
        assert_eq!(serde_like_roundtrip(&id), id);
    }

    fn serde_like_roundtrip(id: &SpiffeId) -> SpiffeId {
        id.as_str().parse().unwrap()
    }

    #[test]
    fn whatever_two_parsers_could_read_differently_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe:/cluster.local/ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:443/ns/a/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local//ns/a/sa/b",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/./sa/b",
            "spiffe://cluster.local/ns/a/sa/b%2fc",
            "spiffe://cluster.local/ns/a/sa/b\0",
            "spiffe://cluster.local/ns/a/sa/b c",
            "spiffe://cluster.local/ns/a/sa/b?x=1",
            "spiffe://cluster.local/ns/a/sa/b#x",
            "spiffe://cluster.local/ns/a/sa/ü",
            "spiffe://cluster.local/NS/a/sa/b",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local",
            "spiffe:///ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            " spiffe://cluster.local/ns/a/sa/b",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(SpiffeId::parse(&format!("spiffe://cluster.local/ns/a/sa/{}", "b".repeat(2048))).is_err());
        assert!(TrustDomain::parse(&"a".repeat(256)).is_err());
        assert!(TrustDomain::parse(&"a".repeat(255)).is_ok());
    }

    #[test]
    fn an_at_sign_is_a_dot_in_configuration_only() {
        assert_eq!(TrustDomain::from_config("team@corp").unwrap().as_str(), "team.corp");
        assert!(TrustDomain::parse("team@corp").is_err());
    }

    proptest! {
        #[test]
        fn what_was_put_together_parses_to_the_same_parts(
            td in "[a-z0-9][a-z0-9._-]{0,40}", ns in "[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", sa in "[a-z0-9]([-.a-z0-9]{0,30}[a-z0-9])?"
        ) {
            let id = SpiffeId::new(&TrustDomain::parse(&td).unwrap(), &ns, &sa).unwrap();
            let again = SpiffeId::parse(id.as_str()).unwrap();
            prop_assert_eq!(again.trust_domain(), td);
            prop_assert_eq!(again.namespace(), ns);
            prop_assert_eq!(again.service_account(), sa);
        }

        #[test]
        fn any_text_parses_or_fails_without_panic_and_only_to_itself(text in ".{0,80}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.as_str(), text);
            }
        }

        #[test]
        fn a_slash_smuggled_into_a_part_never_yields_another_identity(ns in "[a-z]{1,5}/[a-z/]{0,8}") {
            prop_assert!(SpiffeId::new(&TrustDomain::parse("cluster.local").unwrap(), &ns, "x").is_err());
        }
    }
}
