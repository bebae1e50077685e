//! What counts as a key set: checked before it is stored, so that an error page never replaces good keys (S3.66).

use std::sync::Arc;

use serde_json::{Map, Value};

/// Most bytes of a response body; a key set of a thousand keys is far below.
pub const MAX_BODY: usize = 1 << 20;
/// Most keys of a set. Every key without `kid` may be tried for every token.
pub const MAX_KEYS: usize = 256;
/// Members that hold private or symmetric material (RFC 7518, 6.2.2 and 6.3.2). Whoever publishes them does so by mistake; they do
/// not travel on.
const PRIVATE: [&str; 7] = ["d", "p", "q", "dp", "dq", "qi", "oth"];

/// A key set in canonical form: equal sets are equal texts, whatever the order of keys and members (S3.65).
pub type KeySet = Arc<str>;

/// Why a body is no key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAKeySet {
    /// Not JSON.
    #[error("the answer is not JSON: {0}")]
    Json(String),
    /// JSON of another shape.
    #[error("the answer is JSON, but no key set (RFC 7517): {0}")]
    Shape(String),
    /// More keys than anybody has.
    #[error("the key set has {0} keys, more than {MAX_KEYS}")]
    TooManyKeys(usize),
}

/// Reads a body. The set may be empty: an issuer without keys has no valid tokens.
///
/// # Errors
/// [`NotAKeySet`].
pub fn parse(body: &[u8]) -> Result<KeySet, NotAKeySet> {
    let value: Value = serde_json::from_slice(body).map_err(|e| NotAKeySet::Json(e.to_string()))?;
    let shape = |what: String| NotAKeySet::Shape(what);
    let Value::Object(mut object) = value else {
        return Err(shape("it is not an object".into()));
    };
    let keys = match object.remove("keys") {
        Some(Value::Array(keys)) => keys,
        Some(_) => return Err(shape("\"keys\" is not an array".into())),
        None => return Err(shape("it has no \"keys\"".into())),
    };
    if keys.len() > MAX_KEYS {
        return Err(NotAKeySet::TooManyKeys(keys.len()));
    }
    let mut canonical = Vec::with_capacity(keys.len());
    for (index, key) in keys.into_iter().enumerate() {
        let Value::Object(key) = key else {
            return Err(shape(format!("keys[{index}] is not an object")));
        };
        if !key.get("kty").is_some_and(Value::is_string) {
            return Err(shape(format!("keys[{index}] has no \"kty\"")));
        }
        canonical.push(canonical_key(key));
    }
    canonical.sort();
    canonical.dedup();
    let texts: Vec<&str> = canonical.iter().map(|(_, text)| text.as_str()).collect();
    Ok(format!("{{\"keys\":[{}]}}", texts.join(",")).into())
}

/// `kid` and text of a key, its members sorted and without private ones.
fn canonical_key(key: Map<String, Value>) -> (String, String) {
    let kid = key.get("kid").and_then(Value::as_str).unwrap_or_default().to_string();
    let mut members: Vec<(String, Value)> = key
        .into_iter()
        .filter(|(name, _)| !PRIVATE.contains(&name.as_str()))
        .collect();
    members.sort_by(|a, b| a.0.cmp(&b.0));
    let text = Value::Object(members.into_iter().collect()).to_string();
    (kid, text)
}

/// The `jwks_uri` of an OpenID provider's configuration (OpenID Connect Discovery 1.0, 4.2).
///
/// # Errors
/// In words, what is wrong with the document.
pub fn discovered(body: &[u8]) -> Result<String, String> {
    let value: Value = serde_json::from_slice(body).map_err(|e| format!("the discovery document is not JSON: {e}"))?;
    match value.get("jwks_uri").and_then(Value::as_str) {
        Some(uri) if !uri.is_empty() => Ok(uri.to_string()),
        _ => Err("the discovery document has no \"jwks_uri\"".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_keys_and_members_does_not_matter() {
        let a = br#"{"keys":[{"kty":"RSA","kid":"b","n":"x","e":"AQAB"},{"kid":"a","kty":"EC"}],"extra":1}"#;
        let b = br#"{"keys":[{"kty":"EC","kid":"a"},{"e":"AQAB","n":"x","kid":"b","kty":"RSA"}]}"#;
        assert_eq!(parse(a), parse(b));
        let c = br#"{"keys":[{"kty":"EC","kid":"a"},{"e":"AQAB","n":"y","kid":"b","kty":"RSA"}]}"#;
        assert_ne!(parse(a), parse(c), "another modulus is another key");
    }

    #[test]
    fn private_parts_do_not_travel_on() {
        let set = parse(br#"{"keys":[{"kty":"RSA","n":"n","e":"e","d":"secret","p":"secret","q":"secret"}]}"#).unwrap();
        assert!(!set.contains("secret"), "{set}");
        assert!(set.contains("\"n\":\"n\""), "{set}");
    }

    #[test]
    fn what_is_no_key_set_is_refused() {
        for (body, words) in [
            ("<html>502</html>", "not JSON"),
            ("[]", "not an object"),
            ("{}", "no \"keys\""),
            (r#"{"keys":{}}"#, "not an array"),
            (r#"{"keys":["x"]}"#, "keys[0] is not an object"),
            (r#"{"keys":[{"kid":"x"}]}"#, "keys[0] has no \"kty\""),
            (r#"{"keys":[{"kty":1}]}"#, "keys[0] has no \"kty\""),
        ] {
            let error = parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{body}: {error}");
        }
        assert!(parse(b"\xff\xfe").is_err());
        // Deep nesting is an error, not an exhausted stack.
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
        let many = format!("{{\"keys\":[{}]}}", vec![r#"{"kty":"EC"}"#; MAX_KEYS + 1].join(","));
        assert_eq!(parse(many.as_bytes()), Err(NotAKeySet::TooManyKeys(MAX_KEYS + 1)));
        assert_eq!(&*parse(br#"{"keys":[]}"#).unwrap(), r#"{"keys":[]}"#);
    }

    #[test]
    fn discovery_documents_name_the_key_set() {
        let document = br#"{"issuer":"https://x","jwks_uri":"https://x/keys"}"#;
        assert_eq!(discovered(document), Ok("https://x/keys".into()));
        assert!(discovered(b"{}").unwrap_err().contains("jwks_uri"));
        assert!(discovered(br#"{"jwks_uri":5}"#).unwrap_err().contains("jwks_uri"));
        assert!(discovered(b"no").unwrap_err().contains("not JSON"));
    }
}
