//! Decisions over all authorization filters of a chain.
//!
//! The order is fixed (S2.20): audit, then DENY, then ALLOW. The proxy builds an [`Engine`] per chain when it receives
//! its configuration and asks it once per request or connection; asking allocates nothing and, for rules with an
//! indexable condition, does not get slower with their number ([`super::index`]).

use std::fmt::Write;

use super::index::RuleSet;
use super::{Action, AuthzFilter, Connection, HttpView};

/// Compiled authorization of one chain.
#[derive(Debug, Default)]
pub struct Engine {
    filters: Vec<Compiled>,
}

#[derive(Debug)]
struct Compiled {
    action: Action,
    enforced: bool,
    rules: RuleSet,
    shadow: Option<RuleSet>,
}

/// Result of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision<'e> {
    /// Allowed or denied.
    pub verdict: Verdict,
    /// The rule that decided, the first in byte order of the ids that match (S2.94); `None` for an ALLOW filter without
    /// a match and for "no policy".
    pub rule: Option<&'e str>,
    /// Whether an AUDIT rule matched.
    pub audited: bool,
    /// What the dry-run rules of the DENY filter would have decided (S2.130); `None` without such rules.
    pub shadow_deny: Option<Shadow<'e>>,
    /// What the dry-run rules of the ALLOW filter would have decided; `None` without such rules, or when the request was
    /// denied before.
    pub shadow_allow: Option<Shadow<'e>>,
}

/// Result of dry-run rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow<'e> {
    /// What they would have decided (`…shadow_engine_result`).
    pub verdict: Verdict,
    /// The rule that matched (`…shadow_effective_policy_id`).
    pub rule: Option<&'e str>,
}

/// Outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on.
    Allowed,
    /// Ends with 403 or a closed connection.
    Denied,
}

impl Decision<'_> {
    /// Response code details or connection termination details of a denial (S2.92); `None` if allowed.
    pub fn details(&self) -> Option<String> {
        (self.verdict == Verdict::Denied).then(|| {
            let mut out = String::from("rbac_access_denied_matched_policy[");
            for c in self.rule.unwrap_or("none").chars() {
                out.push(if c.is_whitespace() { '_' } else { c });
            }
            // Writing to a string cannot fail.
            out.write_char(']').unwrap_or_default();
            out
        })
    }
}

impl Engine {
    /// Compiles the filters of a chain. Rules that cannot be understood fail closed: they match everything in a DENY
    /// filter and nothing in an ALLOW filter.
    pub fn new(filters: &[AuthzFilter]) -> Engine {
        let mut filters: Vec<_> = filters
            .iter()
            .map(|filter| Compiled {
                action: filter.action,
                enforced: filter.enforced,
                rules: RuleSet::new(&filter.rules, filter.action),
                shadow: (!filter.shadow.is_empty()).then(|| RuleSet::new(&filter.shadow, filter.action)),
            })
            .collect();
        // Log, Deny, Allow; stable for several filters of one action.
        filters.sort_by_key(|f| f.action);
        Engine { filters }
    }

    /// Whether there is nothing to decide: everything is allowed.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// Number of rules, and how many of them are in no index and so cost time on every request.
    pub fn size(&self) -> (usize, usize) {
        let sets = self
            .filters
            .iter()
            .flat_map(|f| std::iter::once(&f.rules).chain(&f.shadow));
        sets.fold((0, 0), |(rules, residual), set| {
            (rules + set.len(), residual + set.residual())
        })
    }

    /// The enforced ALLOW rule that comes closest to matching: the fewest tests would have to change, the first in byte
    /// order of ids among equals. For denials without a match; it goes over all rules. [`super::miss`] says what failed.
    pub fn nearest(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Option<&str> {
        let allow = self.filters.iter().filter(|f| f.enforced && f.action == Action::Allow);
        allow
            .filter_map(|f| f.rules.nearest(connection, http))
            .min_by_key(|(misses, _)| *misses)
            .map(|(_, id)| id)
    }

    /// Decides about a request (`http` given) or a connection.
    pub fn decide(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Decision<'_> {
        let mut decision = Decision {
            verdict: Verdict::Allowed,
            rule: None,
            audited: false,
            shadow_deny: None,
            shadow_allow: None,
        };
        for filter in &self.filters {
            let shadow = filter.shadow.as_ref().map(|rules| {
                let rule = rules.first_match(connection, http);
                Shadow {
                    verdict: verdict(filter.action, rule.is_some()),
                    rule,
                }
            });
            match filter.action {
                Action::Log => {}
                Action::Deny => decision.shadow_deny = shadow,
                Action::Allow => decision.shadow_allow = shadow,
            }
            if !filter.enforced {
                continue;
            }
            let rule = filter.rules.first_match(connection, http);
            match filter.action {
                Action::Log => decision.audited |= rule.is_some(),
                action => {
                    if verdict(action, rule.is_some()) == Verdict::Denied {
                        decision.verdict = Verdict::Denied;
                        decision.rule = rule;
                        return decision;
                    }
                    decision.rule = rule.or(decision.rule);
                }
            }
        }
        decision
    }
}

/// What a match, or its absence, means.
fn verdict(action: Action, matched: bool) -> Verdict {
    match (action, matched) {
        (Action::Deny, true) | (Action::Allow, false) => Verdict::Denied,
        _ => Verdict::Allowed,
    }
}

#[cfg(test)]
mod tests;
