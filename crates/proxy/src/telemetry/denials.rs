//! Denials that the proxy remembers, and what the nearest rule missed by.
//!
//! Nothing here runs for a request that passes. After a denial the request is remembered in a bounded ring, counted by the policy
//! and rule that decided, and, a bounded number of times a second, compared with the ALLOW rules once more to find the one that
//! came closest. Operators read it through the admin port; the client's answer is made without it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mantlet_model::authz::words::{self, RuleId};
use mantlet_model::authz::{Attribute, AuthzFilter, Connection, Engine, HttpSample, HttpView, Sample, miss};
use mantlet_model::query::{Denial, NearestRule};
use mantlet_runtime::{Counter, CounterFamily, Registry};

/// Denials that are remembered.
const MAX_DENIALS: usize = 256;
/// Near misses that are looked for in a second.
const EXPLAINED_PER_SECOND: u32 = 50;
/// Pairs of policy and rule that are counted apart.
const MAX_SERIES: usize = 1000;
/// Most failed conditions that are kept of a rule.
const MAX_FAILED: usize = 16;
/// Longest text of a condition.
const MAX_TEXT: usize = 512;

/// What a proxy remembers of its denials.
pub struct Denials {
    state: Mutex<State>,
    decisions: CounterFamily,
}

struct State {
    ring: VecDeque<Denial>,
    /// Counters by action, policy and rule: a handle is made once.
    series: HashMap<[String; 3], Counter>,
    second: Instant,
    explained: u32,
}

impl Denials {
    /// None yet.
    pub fn new(registry: &Registry) -> Self {
        Denials {
            state: Mutex::new(State {
                ring: VecDeque::new(),
                series: HashMap::new(),
                second: Instant::now(),
                explained: 0,
            }),
            decisions: registry.counter(
                "mantlet_authz_decisions_total",
                "Denied requests and connections by the policy and rule that denied; `none` where no ALLOW rule matched.",
                &["action", "policy", "rule", "outcome"],
            ),
        }
    }

    /// The remembered ones, newest last.
    pub fn all(&self) -> Vec<Denial> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ring.iter().cloned().collect()
    }

    /// Remembers and counts one.
    pub fn remember(&self, denial: Denial) {
        let key = series(&denial.details);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = if state.series.contains_key(&key) || state.series.len() < MAX_SERIES {
            key
        } else {
            ["other", "other", "other"].map(String::from)
        };
        let counter = state
            .series
            .entry(key)
            .or_insert_with_key(|[action, policy, rule]| self.decisions.with(&[action, policy, rule, "denied"]));
        counter.inc();
        if state.ring.len() >= MAX_DENIALS {
            state.ring.pop_front();
        }
        state.ring.push_back(denial);
    }

    /// Whether there is time for a near miss in this second.
    fn may_explain(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now.duration_since(state.second) >= Duration::from_secs(1) {
            state.second = now;
            state.explained = 0;
        }
        state.explained += 1;
        state.explained <= EXPLAINED_PER_SECOND
    }

    /// The ALLOW rule that came closest to what was denied without a match.
    pub fn nearest(
        &self,
        engine: &Engine,
        filters: &[AuthzFilter],
        connection: &Connection<'_>,
        http: Option<&dyn HttpView>,
    ) -> Option<NearestRule> {
        if !self.may_explain() {
            return None;
        }
        let rule = engine.nearest(connection, http)?;
        let (expr, failed) = miss(filters, rule, connection, http)?;
        let mut sample = Sample {
            peer: connection.peer_uris.to_vec(),
            source: connection.source,
            remote: connection.remote,
            destination: connection.destination,
            sni: connection.sni.map(str::to_string),
            http: None,
        };
        // Only the headers that are spoken of.
        sample.http = http.map(|view| HttpSample {
            method: view.method().to_string(),
            host: view.authority().to_string(),
            path: view.path().to_string(),
            headers: failed
                .iter()
                .filter_map(|f| match &f.atom.attribute {
                    Attribute::Header(name) => Some(name.to_ascii_lowercase()),
                    _ => None,
                })
                .collect::<BTreeSet<_>>()
                .into_iter()
                .flat_map(|name| values(view, &name).into_iter().map(move |value| (name.clone(), value)))
                .collect(),
            claims: view.claims().cloned(),
        });
        let failed = failed
            .iter()
            .take(MAX_FAILED)
            .map(|f| words::failure(&expr, f, &sample).chars().take(MAX_TEXT).collect())
            .collect();
        Some(NearestRule {
            rule: rule.to_string(),
            failed,
        })
    }
}

/// Action, policy and rule by which a denial is counted.
fn series(details: &str) -> [String; 3] {
    if details.starts_with("jwt_authn") {
        return ["JWT", "none", "none"].map(String::from);
    }
    let custom = details.starts_with("ext_authz") || details.contains(mantlet_model::ext_authz::ID_PREFIX);
    match RuleId::find(details) {
        Some(id) => [
            if custom { "CUSTOM" } else { "DENY" }.to_string(),
            format!("{}/{}", id.namespace, id.policy),
            id.rule.to_string(),
        ],
        None => [if custom { "CUSTOM" } else { "ALLOW" }, "none", "none"].map(String::from),
    }
}

/// Values of a header, as text.
fn values(view: &dyn HttpView, name: &str) -> Vec<String> {
    let mut out = Vec::new();
    view.any_header(name, &mut |value| {
        out.push(String::from_utf8_lossy(value).into_owned());
        out.len() >= 4
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(details: &str) -> Denial {
        Denial {
            time: String::new(),
            source_principal: None,
            source: String::new(),
            port: 1,
            method: String::new(),
            path: String::new(),
            host: String::new(),
            details: details.into(),
            nearest: None,
        }
    }

    #[test]
    fn memory_and_series_are_bounded() {
        let registry = Registry::new();
        let denials = Denials::new(&registry);
        for i in 0..3000 {
            denials.remember(denial(&format!(
                "rbac_access_denied_matched_policy[ns[a]-policy[p{i}]-rule[0]]"
            )));
        }
        denials.remember(denial("rbac_access_denied_matched_policy[none]"));
        let kept = denials.all();
        assert_eq!(kept.len(), MAX_DENIALS);
        assert!(kept.last().is_some_and(|d| d.details.ends_with("[none]")));
        let text = registry.render();
        let series = text
            .lines()
            .filter(|l| l.starts_with("mantlet_authz_decisions_total{"))
            .count();
        assert_eq!(series, MAX_SERIES + 1, "{text}");
        assert!(
            text.contains(r#"mantlet_authz_decisions_total{action="DENY",policy="a/p0",rule="0",outcome="denied"} 1"#)
        );
        assert!(text.contains(r#"action="other",policy="other",rule="other",outcome="denied"} 2001"#));
    }

    #[test]
    fn each_kind_of_denial_has_its_series() {
        for (details, wanted) in [
            (
                "rbac_access_denied_matched_policy[ns[a]-policy[b]-rule[2]]",
                ["DENY", "a/b", "2"],
            ),
            ("rbac_access_denied_matched_policy[none]", ["ALLOW", "none", "none"]),
            (
                "rbac_access_denied_matched_policy[istio-ext-authz-opa-ns[a]-policy[b]-rule[0]-deny-due-to-bad-CUSTOM-action]",
                ["CUSTOM", "a/b", "0"],
            ),
            ("ext_authz_denied", ["CUSTOM", "none", "none"]),
            ("jwt_authn_access_denied{Jwt_is_expired}", ["JWT", "none", "none"]),
        ] {
            assert_eq!(series(details), wanted.map(String::from), "{details}");
        }
    }

    #[test]
    fn near_misses_are_rationed() {
        let denials = Denials::new(&Registry::new());
        let begun = Instant::now();
        let granted = (0..1000).filter(|_| denials.may_explain()).count();
        let seconds = usize::try_from(begun.elapsed().as_secs()).expect("few") + 1;
        let ration = usize::try_from(EXPLAINED_PER_SECOND).expect("small");
        assert!(granted >= ration && granted <= ration * (seconds + 1), "{granted}");
    }
}
