//! Verified tokens of one worker, so that a client's token costs one signature check and not one per request.
//!
//! An entry belongs to a provider as it was compiled and to the token's full text, so its answer cannot change but for
//! the time, which is checked every time. With new configuration providers are new and former entries are never met
//! again; they leave as others come. Refusals are not kept: strangers could fill the cache with them.

use std::collections::HashMap;
use std::rc::Rc;

use http::header::{HeaderName, HeaderValue};
use serde_json::Value;

/// Most entries of a generation; there are two.
const GENERATION: usize = 256;
/// Longest token that is kept, in bytes.
const MAX_KEPT: usize = 4096;

/// What a verified token says.
#[derive(Debug)]
pub struct Verified {
    /// Claims as policies see them.
    pub claims: Value,
    /// Headers for the application.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// A header whose claim cannot be a header value: the request cannot be forwarded.
    pub impossible: Option<HeaderName>,
    /// Unix seconds of `nbf`.
    pub not_before: u64,
    /// Unix seconds of `exp`.
    pub expires: Option<u64>,
}

/// Entries of one provider by token.
type Entries = HashMap<u64, HashMap<Box<str>, Rc<Verified>>>;

/// Verified tokens.
#[derive(Default)]
pub struct Cache {
    fresh: Entries,
    old: Entries,
    count: usize,
}

impl Cache {
    /// The result of an earlier verification.
    pub fn get(&mut self, provider: u64, token: &str) -> Option<Rc<Verified>> {
        let of = |entries: &Entries| entries.get(&provider)?.get(token).cloned();
        if let Some(found) = of(&self.fresh) {
            return Some(found);
        }
        // What is used stays.
        let found = of(&self.old)?;
        self.put(provider, token, found.clone());
        Some(found)
    }

    /// Keeps a result.
    pub fn put(&mut self, provider: u64, token: &str, verified: Rc<Verified>) {
        if token.len() > MAX_KEPT {
            return;
        }
        if self.count >= GENERATION {
            self.old = std::mem::take(&mut self.fresh);
            self.count = 0;
        }
        let former = self.fresh.entry(provider).or_default().insert(token.into(), verified);
        self.count += usize::from(former.is_none());
    }

    /// Number of entries.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.fresh.values().chain(self.old.values()).map(HashMap::len).sum()
    }
}
