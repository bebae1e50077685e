//! The authentication step: finds tokens, verifies them, and passes on what they say (SEMANTICS 3b–3d).
//!
//! [`Plan`] is compiled with its chain: keys parsed, places sorted. [`Plan::evaluate`] is a pure function of head and
//! clock; the request function applies its outcome. The rule is that of S3.7: one provider must accept all tokens in its
//! places, or there is no token anywhere. Beyond it, every other token must be good for some provider of its place.

mod cache;
mod locate;
mod output;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::header::{self, HeaderName};
use http::request::Parts;
use http::{HeaderMap, Method};
use mantlet_identity::jws::{self, Failure, KeySet, Token};
use mantlet_model::http::{JwtAuthn, JwtProvider};

pub use cache::{Cache, Verified};
use locate::{Found, Place};
pub use locate::{remove_parameter, without_parameter};

/// Key sets by their text, so that one that many chains name is parsed once.
pub type KeySets = HashMap<Arc<str>, Option<Arc<KeySet>>>;

/// Token authentication of a chain, ready to run.
pub struct Plan {
    providers: Vec<Provider>,
    /// Headers that tell the application about tokens; a client's own are always removed (S3.44, S3.45).
    outputs: Vec<HeaderName>,
}

struct Provider {
    model: JwtProvider,
    /// Tells this provider's entries in a cache from all others that ever were.
    id: u64,
    /// `None` when the set has no usable key: every token fails.
    keys: Option<Arc<KeySet>>,
    /// Name of the key set.
    set_name: String,
    /// In the order of verification.
    places: Vec<Place>,
    payload_header: Option<HeaderName>,
    claim_headers: Vec<(HeaderName, Vec<String>)>,
}

/// What verified tokens bring about.
#[derive(Debug, Default)]
pub struct Accepted {
    /// Verified tokens in the order of verification.
    pub tokens: Vec<Rc<Verified>>,
    /// Headers that carried them and do not go on.
    pub spent_headers: Vec<HeaderName>,
    /// Query parameters that carried them and do not go on.
    pub spent_parameters: Vec<String>,
}

/// A refusal, and where its keys were not enough.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The reason for the client.
    pub failure: Failure,
    /// Name of a key set that did not hold the token's key (`jwks/…`).
    pub unknown_key: Option<String>,
}

impl Plan {
    /// Makes a chain's authentication ready; `None` without providers.
    pub fn compile(model: &JwtAuthn, sets: &mut KeySets) -> Option<Plan> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut outputs = Vec::new();
        let mut providers = Vec::with_capacity(model.providers.len());
        for provider in &model.providers {
            let keys = sets
                .entry(provider.jwks.clone())
                .or_insert_with(|| match KeySet::parse(provider.jwks.as_bytes()) {
                    Ok(keys) => Some(Arc::new(keys)),
                    Err(error) => {
                        tracing::warn!(target: "jwt", "keys of issuer {:?}: {error}; its tokens are refused", provider.issuer);
                        None
                    }
                })
                .clone();
            let name = |text: &str| text.parse::<HeaderName>().ok();
            let payload_header = provider.payload_header.as_deref().and_then(name);
            let claim_headers: Vec<(HeaderName, Vec<String>)> = provider
                .claim_headers
                .iter()
                .filter_map(|(header, claim)| Some((name(header)?, claim.split('.').map(String::from).collect())))
                .collect();
            outputs.extend(payload_header.iter().cloned());
            outputs.extend(claim_headers.iter().map(|(name, _)| name.clone()));
            providers.push(Provider {
                id: NEXT.fetch_add(1, Ordering::Relaxed),
                keys,
                set_name: jws::key_set_name(provider.jwks.as_bytes()),
                places: locate::places(provider),
                payload_header,
                claim_headers,
                model: provider.clone(),
            });
        }
        outputs.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        outputs.dedup();
        (!providers.is_empty()).then_some(Plan { providers, outputs })
    }

    /// Removes what only this step may say: the output headers, and wishes in `Connection` to have them removed later.
    pub fn strip(&self, headers: &mut HeaderMap) {
        if self.outputs.is_empty() {
            return;
        }
        for name in &self.outputs {
            headers.remove(name);
        }
        output::protect(headers, &self.outputs);
    }

    /// Decides about a request; `now` in Unix seconds. `None` is "no token anywhere".
    ///
    /// # Errors
    /// The first reason that is more than an unknown issuer (S3.24).
    pub fn evaluate(&self, parts: &Parts, now: u64, cache: &mut Cache) -> Result<Option<Accepted>, Refused> {
        let mut state = State::default();
        let mut refused: Option<Refused> = None;
        let mut note = |reason: Refused| {
            let better = refused.as_ref().is_none_or(|earlier| {
                earlier.failure == Failure::UnknownIssuer && reason.failure != Failure::UnknownIssuer
            });
            if better {
                refused = Some(reason);
            }
        };
        // Any provider that accepts all tokens in its places …
        for provider in &self.providers {
            match provider.try_request(parts, now, cache, &mut state) {
                Ok(true) => {
                    self.check_others(provider, parts, now, cache, &state)?;
                    return Ok(Some(state.into()));
                }
                Ok(false) => {}
                Err(reason) => note(reason),
            }
        }
        // … or all providers accept what is in theirs, or find nothing. What a provider has used up is nothing to the
        // next one, so that two tokens for two providers can share their places.
        if let [_] = &self.providers[..] {
            return refused.map_or(Ok(None), Err);
        }
        for provider in &self.providers {
            if let Err(reason) = provider.try_request(parts, now, cache, &mut state) {
                note(reason);
                return refused.map_or(Ok(None), Err);
            }
        }
        Ok((!state.tokens.is_empty()).then(|| state.into()))
    }

    /// Tokens in places that the accepting provider does not look at: a bad one refuses the request, since nobody can
    /// tell which of the two the application will believe.
    fn check_others(
        &self,
        winner: &Provider,
        parts: &Parts,
        now: u64,
        cache: &mut Cache,
        state: &State<'_>,
    ) -> Result<(), Refused> {
        if self.providers.len() == 1 {
            return Ok(());
        }
        for provider in &self.providers {
            for token in state.find(provider, parts) {
                if winner.places.contains(token.place) {
                    continue;
                }
                let mut reason = None;
                let good = self
                    .providers
                    .iter()
                    .filter(|p| p.places.contains(token.place))
                    .any(|p| match p.verify(&token.text, now, cache) {
                        Ok(_) => true,
                        Err(refused) => {
                            reason.get_or_insert(refused);
                            false
                        }
                    });
                if let (false, Some(refused)) = (good, reason) {
                    return Err(refused);
                }
            }
        }
        Ok(())
    }
}

/// What providers have verified so far. It stays when a provider refuses another token, as in Envoy.
#[derive(Default)]
struct State<'p> {
    tokens: Vec<Rc<Verified>>,
    /// Verified tokens that do not go on, with their places; the next provider does not find them.
    spent: Vec<Found<'p>>,
}

impl<'p> State<'p> {
    fn find(&self, provider: &'p Provider, parts: &'p Parts) -> Vec<Found<'p>> {
        let mut found = locate::find(&provider.places, parts);
        found.retain(|f| !self.spent.iter().any(|s| s.text == f.text && s.place.carries(f.place)));
        found
    }
}

impl From<State<'_>> for Accepted {
    fn from(state: State<'_>) -> Accepted {
        let mut accepted = Accepted {
            tokens: state.tokens,
            ..Accepted::default()
        };
        for token in state.spent {
            match token.place {
                Place::Header { name, .. } => accepted.spent_headers.push(name.clone()),
                Place::Parameter(name) => accepted.spent_parameters.push(name.clone()),
                // S3.19.
                Place::Cookie(_) => {}
            }
        }
        accepted
    }
}

impl Provider {
    /// Verifies all tokens in this provider's places; whether there was any.
    fn try_request<'p>(
        &'p self,
        parts: &'p Parts,
        now: u64,
        cache: &mut Cache,
        state: &mut State<'p>,
    ) -> Result<bool, Refused> {
        let found = state.find(self, parts);
        let any = !found.is_empty();
        for token in found {
            let verified = self.verify(&token.text, now, cache)?;
            state.tokens.push(verified);
            if !self.model.forward {
                state.spent.push(token);
            }
        }
        Ok(any)
    }

    /// One token, in the order of S3.25.
    fn verify(&self, text: &str, now: u64, cache: &mut Cache) -> Result<Rc<Verified>, Refused> {
        let refused = |failure| Refused {
            failure,
            unknown_key: None,
        };
        if let Some(verified) = cache.get(self.id, text) {
            // The rest of the answer cannot change while this provider exists.
            jws::check_time(verified.not_before, verified.expires, now).map_err(refused)?;
            return Ok(verified);
        }
        let token = Token::parse(text).map_err(refused)?;
        if !self.model.issuer.is_empty() && token.issuer() != self.model.issuer {
            return Err(refused(Failure::UnknownIssuer));
        }
        token.check_time(now).map_err(refused)?;
        token.check_audience(&self.model.audiences).map_err(refused)?;
        let keys = self.keys.as_ref().ok_or(refused(Failure::NoValidKeys))?;
        token.verify(keys).map_err(|failure| Refused {
            failure,
            unknown_key: (failure == Failure::NoMatchingKey || !known(keys, &token)).then(|| self.set_name.clone()),
        })?;
        let (headers, impossible) = output::headers(self.payload_header.as_ref(), &self.claim_headers, &token);
        let (not_before, expires) = (token.not_before(), token.expires());
        let verified = Rc::new(Verified {
            headers,
            impossible,
            not_before,
            expires,
            claims: output::normalize(token.into_claims(), &self.model.space_delimited),
        });
        cache.put(self.id, text, verified.clone());
        Ok(verified)
    }
}

/// Whether the token's key is in the set; without a `kid` nobody can tell.
fn known(keys: &KeySet, token: &Token<'_>) -> bool {
    match token.key_id() {
        None => true,
        Some(kid) => keys.key_ids().any(|k| k == kid),
    }
}

/// Whether a request asks a server, on behalf of a browser, what a page may do (S3.6). Tokens never come with it.
pub fn is_preflight(parts: &Parts) -> bool {
    let filled = |name: HeaderName| parts.headers.get(name).is_some_and(|v| !v.is_empty());
    parts.method == Method::OPTIONS && filled(header::ORIGIN) && filled(header::ACCESS_CONTROL_REQUEST_METHOD)
}
