//! Key sets of token issuers, as the control plane's resolver found them.
//!
//! Translation fetches nothing: it tells which key sets its RequestAuthentications need ([`World::needed_key_sets`]),
//! and the resolver of `control` puts them in ([`World::set_key_set`]). A key set that is needed and absent makes
//! tokens of its issuer fail (S3.62), never pass.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mantlet_api::request_authentication::JwtRule;

use super::{Effect, Scope, World};

/// Time for a fetch when the rule says nothing (S3.46).
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// A key set that has to be fetched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeySetNeed {
    /// Issuer of the tokens.
    pub issuer: String,
    /// Address of the key set; empty: found through OpenID discovery at the issuer (S3.43).
    pub jwks_uri: String,
    /// Time for discovery or fetch with all retries (S3.46); the longest, if several rules name the same key set.
    pub timeout: Duration,
}

/// Key sets by issuer and address (S3.61).
pub(super) type KeySets = BTreeMap<(String, String), Arc<str>>;

/// Whether a rule's keys are fetched; inline keys win (S3.42).
fn is_fetched(rule: &JwtRule) -> bool {
    rule.jwks.is_empty() && !(rule.issuer.is_empty() && rule.jwks_uri.is_empty())
}

impl World {
    /// The key sets that have to be fetched for the RequestAuthentications of all namespaces, each once, in order.
    pub fn needed_key_sets(&self) -> Vec<KeySetNeed> {
        let mut out: BTreeMap<(&str, &str), Duration> = BTreeMap::new();
        for config in self.namespaces.values().flat_map(|n| &n.request) {
            for rule in config.spec.jwt_rules.iter().filter(|r| is_fetched(r)) {
                let wanted = rule.timeout.map_or(DEFAULT_TIMEOUT, |t| t.0);
                let timeout = out.entry((&rule.issuer, &rule.jwks_uri)).or_default();
                *timeout = wanted.max(*timeout);
            }
        }
        out.into_iter()
            .map(|((issuer, uri), timeout)| KeySetNeed {
                issuer: issuer.to_string(),
                jwks_uri: uri.to_string(),
                timeout,
            })
            .collect()
    }

    /// Puts in what was fetched for an issuer and address (empty with OpenID discovery); `None` removes it. The effect
    /// is that on the namespaces whose RequestAuthentications name it.
    pub fn set_key_set(&mut self, issuer: &str, jwks_uri: &str, keys: Option<Arc<str>>) -> Effect {
        let name = (issuer.to_string(), jwks_uri.to_string());
        let sets = Arc::make_mut(&mut self.key_sets);
        let former = match &keys {
            Some(keys) => sets.insert(name, keys.clone()),
            None => sets.remove(&name),
        };
        if former == keys {
            return Effect::NONE;
        }
        let mut spaces = BTreeSet::new();
        for (name, space) in &self.namespaces {
            let mut rules = space.request.iter().flat_map(|c| &c.spec.jwt_rules);
            if rules.any(|r| is_fetched(r) && r.issuer == issuer && r.jwks_uri == jwks_uri) {
                if *name == self.mesh.root_namespace {
                    return self.stamped(Effect {
                        inbound: Scope::All,
                        ..Effect::NONE
                    });
                }
                spaces.insert(name.clone());
            }
        }
        self.stamped(Effect {
            inbound: if spaces.is_empty() {
                Scope::None
            } else {
                Scope::Namespaces(spaces)
            },
            ..Effect::NONE
        })
    }

    /// The fetched key set of an issuer and address.
    pub fn key_set(&self, issuer: &str, jwks_uri: &str) -> Option<&Arc<str>> {
        self.key_sets.get(&(issuer.to_string(), jwks_uri.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::world::Kind;

    fn world() -> World {
        let mut world = World::default();
        let mut add = |namespace: &str, name: &str, rules: serde_json::Value| {
            world.set_config(
                Kind::RequestAuthentication,
                &json!({"metadata": {"name": name, "namespace": namespace}, "spec": {"jwtRules": rules}}),
            );
        };
        add(
            "a",
            "one",
            json!([{"issuer": "i", "jwksUri": "http://k"}, {"issuer": "inline", "jwks": "{}"}]),
        );
        add(
            "b",
            "two",
            json!([{"issuer": "i", "jwksUri": "http://k", "timeout": "9s"}, {"issuer": "d"}]),
        );
        add("istio-system", "three", json!([{"issuer": "mesh"}]));
        world
    }

    #[test]
    fn needed_sets_are_named_once_with_the_longest_timeout() {
        let need = |issuer: &str, uri: &str, seconds| KeySetNeed {
            issuer: issuer.into(),
            jwks_uri: uri.into(),
            timeout: Duration::from_secs(seconds),
        };
        let expected = [need("d", "", 5), need("i", "http://k", 9), need("mesh", "", 5)];
        assert_eq!(world().needed_key_sets(), expected);
    }

    #[test]
    fn a_key_set_touches_those_that_name_it() {
        let mut world = world();
        let keys: Arc<str> = "{\"keys\":[]}".into();
        let effect = world.set_key_set("i", "http://k", Some(keys.clone()));
        assert!(effect.touches("a") && effect.touches("b") && !effect.touches("c"));
        assert!(world.set_key_set("i", "http://k", Some(keys.clone())).is_none());
        assert!(world.set_key_set("mesh", "", Some(keys.clone())).touches("c"));
        assert!(world.set_key_set("nobody", "", Some(keys.clone())).is_none());
        assert_eq!(world.key_set("i", "http://k"), Some(&keys));
        assert!(world.set_key_set("i", "http://k", None).touches("a"));
        assert_eq!(world.key_set("i", "http://k"), None);
    }
}
