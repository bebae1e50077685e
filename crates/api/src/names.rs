//! Kubernetes and DNS name forms, and host name helpers that several kinds share. Pure text checks.

/// A DNS-1123 label: 1 to 63 lower-case letters, digits and inner `-`.
pub fn is_dns1123_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= 63
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

/// A DNS-1123 subdomain: labels joined by dots, at most 253 characters.
pub fn is_dns1123_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns1123_label)
}

/// A host name as Istio takes it: like a subdomain, but upper case and `_` pass, and a trailing dot.
pub fn is_host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    !text.is_empty()
        && text.len() <= 255
        && text.split('.').all(|label| {
            let bytes = label.as_bytes();
            !bytes.is_empty()
                && bytes.len() <= 63
                && bytes
                    .iter()
                    .all(|b| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_')
                && bytes[0] != b'-'
                && bytes[bytes.len() - 1] != b'-'
        })
}

/// A host name whose first label may be `*` (or that is `*` as a whole).
pub fn is_wildcard_host(text: &str) -> bool {
    text == "*" || is_host_name(text.strip_prefix("*.").unwrap_or(text))
}

/// Expands a short host with the namespace of the object it stands in (S1.100): a name without a dot, wildcard or address
/// becomes `name.namespace.svc.domain`; anything else stays.
pub fn expand_host(host: &str, namespace: &str, domain: &str) -> String {
    if host.is_empty() || host.contains('.') || host.contains('*') || host.parse::<std::net::IpAddr>().is_ok() {
        return host.to_string();
    }
    format!("{host}.{namespace}.svc.{domain}")
}

/// True when `pattern` (exact or `*`-leading) covers `host`. Both are compared without regard to case.
pub fn host_matches(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    match pattern.strip_prefix('*') {
        Some(suffix) => {
            host.len() >= suffix.len() && host.ends_with(suffix) && (suffix.is_empty() || host.len() > suffix.len())
        }
        None => pattern == host,
    }
}

/// The control plane's resource names for a revision: `istiod` and `istiod-canary`, etc. The default revision has no suffix.
pub fn with_revision(name: &str, revision: &str) -> String {
    if revision.is_empty() || revision == "default" {
        name.to_string()
    } else {
        format!("{name}-{revision}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_hosts() {
        assert!(is_dns1123_label("a-1"));
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(64)] {
            assert!(!is_dns1123_label(bad), "{bad:?}");
        }
        assert!(is_wildcard_host("*") && is_wildcard_host("*.a.b") && is_wildcard_host("a.b"));
        for bad in ["", "a*", "*a.b", "a.*.b", "a..b", "a b"] {
            assert!(!is_wildcard_host(bad), "{bad:?}");
        }
    }

    #[test]
    fn expansion() {
        let e = |h| expand_host(h, "foo", "cluster.local");
        assert_eq!(e("reviews"), "reviews.foo.svc.cluster.local");
        assert_eq!(e("reviews.foo"), "reviews.foo");
        assert_eq!(e("*"), "*");
        assert_eq!(e("10.0.0.1"), "10.0.0.1");
    }

    #[test]
    fn matching() {
        assert!(host_matches("*.a.b", "x.A.b") && host_matches("*", "x") && host_matches("a.b", "A.B"));
        assert!(!host_matches("*.a.b", "a.b") && !host_matches("*.a.b", ".a.b"));
    }
}
