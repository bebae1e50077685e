//! String and header matchers.

use envoy_types::pb::envoy::r#type::matcher::v3::regex_matcher::EngineType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};

use crate::wire::{At, Result, done, fault};

/// What a string is compared with, as both planes understand it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Regex(String),
}

pub(crate) fn regex(regex: &str) -> RegexMatcher {
    RegexMatcher {
        regex: regex.into(),
        engine_type: None,
    }
}

pub(crate) fn take_regex(mut matcher: RegexMatcher) -> Result<String> {
    // The engine is always RE2; older control planes say so.
    if let Some(EngineType::GoogleRe2(_)) = matcher.engine_type {
        matcher.engine_type = None;
    }
    let text = std::mem::take(&mut matcher.regex);
    done(matcher)?;
    mantlet_model::authz::compile_regex(&text).map_err(|problem| crate::DecodeError {
        path: "regex".into(),
        problem: format!("{text:?}: {problem}"),
    })?;
    Ok(text)
}

pub(crate) fn encode(pattern: &Pattern, ignore_case: bool) -> StringMatcher {
    StringMatcher {
        ignore_case,
        match_pattern: Some(match pattern {
            Pattern::Exact(s) => MatchPattern::Exact(s.clone()),
            Pattern::Prefix(s) => MatchPattern::Prefix(s.clone()),
            Pattern::Suffix(s) => MatchPattern::Suffix(s.clone()),
            Pattern::Regex(s) => MatchPattern::SafeRegex(regex(s)),
        }),
    }
}

/// The pattern, and whether case is ignored. Envoy does not apply `ignore_case` to expressions.
pub(crate) fn decode(matcher: StringMatcher) -> Result<(Pattern, bool)> {
    let pattern = match matcher.match_pattern {
        Some(MatchPattern::Exact(s)) => Pattern::Exact(s),
        Some(MatchPattern::Prefix(s)) => Pattern::Prefix(s),
        Some(MatchPattern::Suffix(s)) => Pattern::Suffix(s),
        Some(MatchPattern::SafeRegex(r)) => Pattern::Regex(take_regex(r).at("safe_regex")?),
        Some(MatchPattern::Contains(_)) => return fault("contains", "not supported"),
        Some(MatchPattern::Custom(c)) => return fault("custom", format!("{} not supported", c.name)),
        None => return fault("match_pattern", "missing"),
    };
    Ok((pattern, matcher.ignore_case))
}

/// A pattern compared with case.
pub(crate) fn decode_exact_case(matcher: StringMatcher) -> Result<Pattern> {
    match decode(matcher)? {
        (pattern, false) => Ok(pattern),
        (_, true) => fault("ignore_case", "not supported here"),
    }
}
