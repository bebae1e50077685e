//! Values of an AuthorizationPolicy that are accepted and yet never match what they seem to mean (SEMANTICS 2d, S8.36).
//!
//! Called through [`crate::validate::traps`]. Istio takes these values silently; a warning is all that may be said, because the objects are
//! legal.

use super::{AuthorizationPolicy, Operation, Source};
use crate::diagnostic::{Code, Diagnostic, Hint, Severity};

/// Most warnings about one policy.
const MAX: usize = 50;

/// One warning per value.
pub(crate) fn traps(spec: &AuthorizationPolicy) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (i, rule) in spec.rules.iter().enumerate() {
        for (j, from) in rule.from.iter().enumerate() {
            if let Some(s) = &from.source {
                source(s, &format!("spec.rules[{i}].from[{j}].source"), &mut found);
            }
        }
        for (j, to) in rule.to.iter().enumerate() {
            if let Some(o) = &to.operation {
                operation(o, &format!("spec.rules[{i}].to[{j}].operation"), &mut found);
            }
        }
        for (j, when) in rule.when.iter().enumerate() {
            let path = format!("spec.rules[{i}].when[{j}]");
            if matches!(
                when.key.as_str(),
                "source.ip" | "remote.ip" | "destination.ip" | "destination.port"
            ) {
                continue;
            }
            for (name, list) in [("values", &when.values), ("notValues", &when.not_values)] {
                for (k, value) in list.iter().enumerate() {
                    star(value, &format!("{path}.{name}[{k}]"), false, &mut found);
                    if when.key == "source.principal" {
                        scheme(value, &format!("{path}.{name}[{k}]"), &mut found);
                    }
                }
            }
        }
        if found.len() >= MAX {
            found.truncate(MAX);
            break;
        }
    }
    found
}

fn source(source: &Source, path: &str, found: &mut Vec<Diagnostic>) {
    for (name, list, principal) in [
        ("principals", &source.principals, true),
        ("notPrincipals", &source.not_principals, true),
        ("requestPrincipals", &source.request_principals, false),
        ("notRequestPrincipals", &source.not_request_principals, false),
        ("namespaces", &source.namespaces, false),
        ("notNamespaces", &source.not_namespaces, false),
    ] {
        for (k, value) in list.iter().enumerate() {
            let at = format!("{path}.{name}[{k}]");
            star(value, &at, false, found);
            if principal {
                scheme(value, &at, found);
            }
        }
    }
}

fn operation(operation: &Operation, path: &str, found: &mut Vec<Diagnostic>) {
    for (name, list) in [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ] {
        for (k, value) in list.iter().enumerate() {
            let at = format!("{path}.{name}[{k}]");
            let is_path = name.ends_with("aths");
            star(value, &at, is_path, found);
            if is_path {
                request_path(value, &at, found);
            } else if name.ends_with("ethods") && value.bytes().any(|b| b.is_ascii_lowercase()) && known_method(value) {
                found.push(
                    warning(
                        Code::NEVER_MATCHES,
                        &at,
                        format!("{value:?} never matches: methods are compared with regard to case"),
                    )
                    .with_hint(Some(Hint::DidYouMean(value.to_ascii_uppercase()))),
                );
            }
        }
    }
}

fn warning(code: Code, path: &str, message: String) -> Diagnostic {
    Diagnostic::new(code, Severity::Warning, path, message)
}

/// A wildcard is the whole value, its first or its last character (S2.50): anything else is compared as it stands.
fn star(value: &str, path: &str, is_path: bool, found: &mut Vec<Diagnostic>) {
    let inner = match (value.strip_prefix('*'), value.strip_suffix('*')) {
        (Some(rest), _) | (None, Some(rest)) => rest,
        (None, None) => value,
    };
    // `{*}` and `{**}` are templates.
    let bare = if is_path {
        inner.replace("{**}", "").replace("{*}", "")
    } else {
        inner.to_string()
    };
    if !bare.contains('*') {
        return;
    }
    let core = value.trim_matches('*');
    let (message, advice) = if value.starts_with('*') {
        (
            format!(
                "{value:?} matches only what ends with the text {inner:?}: a `*` is a wildcard at the beginning or at the end of a value, not at both and not in the middle"
            ),
            if is_path && core.starts_with('/') && !core.contains('*') {
                format!(
                    "write {:?} for every path that begins so, {:?} for every path that ends so, or {:?} for any number of segments in front",
                    format!("{core}*"),
                    format!("*{core}"),
                    format!("/{{**}}{core}")
                )
            } else {
                format!("write {:?} or {:?}", format!("{core}*"), format!("*{core}"))
            },
        )
    } else {
        (
            format!(
                "the `*` inside {value:?} is compared as it stands: only the first or the last character can be a wildcard"
            ),
            if is_path {
                format!(
                    "for one segment of any text write the template {:?}, for any number of segments {:?}",
                    value.replace('*', "{*}"),
                    value.replace('*', "{**}")
                )
            } else {
                let head = value.split('*').next().unwrap_or_default();
                format!("write each value out, or a prefix such as {:?}", format!("{head}*"))
            },
        )
    };
    found.push(warning(Code::LITERAL_WILDCARD, path, message).with_hint(Some(Hint::Advice(advice))));
}

fn scheme(value: &str, path: &str, found: &mut Vec<Diagnostic>) {
    if let Some(rest) = value.strip_prefix("spiffe://") {
        found.push(
            warning(
                Code::PRINCIPAL_WITH_SCHEME,
                path,
                format!("{value:?} never matches: principals are written without `spiffe://`"),
            )
            .with_hint(Some(Hint::DidYouMean(rest.into()))),
        );
    }
}

/// Paths are compared without query, and begin with a slash.
fn request_path(value: &str, path: &str, found: &mut Vec<Diagnostic>) {
    let never = |why: &str, hint: Hint| {
        warning(Code::NEVER_MATCHES, path, format!("{value:?} never matches: {why}")).with_hint(Some(hint))
    };
    if let Some((before, _)) = value.split_once('?') {
        found.push(never(
            "paths are compared without the query",
            Hint::Advice(format!("write {before:?}; a query cannot be asked for")),
        ));
    } else if !value.is_empty() && !value.starts_with(['/', '*', '{']) {
        found.push(never(
            "a request's path begins with \"/\"",
            Hint::DidYouMean(format!("/{value}")),
        ));
    }
}

fn known_method(value: &str) -> bool {
    let upper = value.to_ascii_uppercase();
    [
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT",
    ]
    .contains(&upper.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts(rule: serde_json::Value) -> Vec<String> {
        let spec: AuthorizationPolicy = serde_json::from_value(json!({"rules": [rule]})).unwrap();
        traps(&spec)
            .iter()
            .map(|f| format!("{} {}: {}", f.code, f.path, f.full()))
            .collect()
    }

    #[track_caller]
    fn one(rule: serde_json::Value, parts: &[&str]) {
        let found = texts(rule);
        assert_eq!(found.len(), 1, "{found:?}");
        for part in parts {
            assert!(found[0].contains(part), "no {part:?} in {found:?}");
        }
    }

    #[test]
    fn values_that_never_match() {
        let to = |operation| json!({"to": [{"operation": operation}]});
        let from = |source| json!({"from": [{"source": source}]});
        one(
            to(json!({"paths": ["/ok", "*/api/catalog*"]})),
            &[
                "MNT0102 spec.rules[0].to[0].operation.paths[1]: \"*/api/catalog*\" matches only what ends with the text \"/api/catalog*\"",
                "write \"/api/catalog*\" for every path that begins so, \"*/api/catalog\" for every path that ends so, or \"/{**}/api/catalog\"",
            ],
        );
        one(
            to(json!({"paths": ["/a/*/b"]})),
            &[
                "the `*` inside \"/a/*/b\" is compared as it stands",
                "\"/a/{*}/b\"",
                "\"/a/{**}/b\"",
            ],
        );
        one(
            from(json!({"principals": ["a*b*c"]})),
            &["MNT0102", "principals[0]", "the `*` inside \"a*b*c\"", "\"a*\""],
        );
        one(
            from(json!({"principals": ["spiffe://cluster.local/ns/a/sa/b"]})),
            &["MNT0101", "never matches", "did you mean \"cluster.local/ns/a/sa/b\"?"],
        );
        one(to(json!({"methods": ["get"]})), &["MNT0107", "did you mean \"GET\"?"]);
        one(to(json!({"paths": ["/a?b=c"]})), &["without the query", "\"/a\""]);
        one(
            to(json!({"paths": ["api/catalog"]})),
            &["begins with \"/\"", "\"/api/catalog\""],
        );
        one(
            json!({"when": [{"key": "request.headers[x]", "values": ["a", "*b*"]}]}),
            &["when[0].values[1]", "ends with the text \"b*\""],
        );
    }

    #[test]
    fn good_values_are_silent() {
        for value in ["*", "a*", "*a", "/a/{*}/b/{**}", "/a", "{*}/b", "*{x}"] {
            assert!(
                texts(json!({"to": [{"operation": {"paths": [if value.starts_with('a') { "/a*" } else { value }]}}]}))
                    .is_empty(),
                "{value}"
            );
        }
        let sources = json!({"from": [{"source": {"principals": ["*", "cluster.local/ns/*", "*/sa/x"], "namespaces": ["a*"]}}],
            "when": [{"key": "source.ip", "values": ["10.0.0.0/8"]}]});
        assert!(texts(sources).is_empty());
        assert!(texts(json!({"to": [{"operation": {"methods": ["GET", "x-own"], "hosts": ["*.a"]}}]})).is_empty());
    }
}
