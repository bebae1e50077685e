//! Name rules: DNS-1123, DNS-1035, qualified names and label values, with the API's message texts.
//!
//! Pure. Used by metadata validation, selectors and CRD checks.

/// What is told about a wrong DNS-1123 subdomain.
pub(crate) const SUBDOMAIN_MSG: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
/// What is told about a wrong DNS-1123 label.
pub(crate) const LABEL_MSG: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
/// What is told about a wrong DNS-1035 label.
pub(crate) const LABEL_1035_MSG: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
/// What is told about a wrong qualified name.
pub(crate) const QUALIFIED_NAME_MSG: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
/// What is told about a wrong label value.
pub(crate) const LABEL_VALUE_MSG: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

/// DNS-1123 label, at most 63 bytes.
pub(crate) fn is_dns1123_label(s: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let b = s.as_bytes();
    (1..=63).contains(&b.len()) && edge(b[0]) && edge(b[b.len() - 1]) && b.iter().all(|&c| edge(c) || c == b'-')
}

/// DNS-1123 subdomain, at most 253 bytes.
pub(crate) fn is_dns1123_subdomain(s: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    s.len() <= 253
        && s.split('.').all(|part| {
            let b = part.as_bytes();
            !b.is_empty() && edge(b[0]) && edge(b[b.len() - 1]) && b.iter().all(|&c| edge(c) || c == b'-')
        })
}

/// DNS-1035 label, at most 63 bytes.
pub(crate) fn is_dns1035_label(s: &str) -> bool {
    is_dns1123_label(s) && s.as_bytes()[0].is_ascii_lowercase()
}

/// The name part of a qualified name, at most 63 bytes.
pub(crate) fn qualified_part(s: &str) -> bool {
    let b = s.as_bytes();
    (1..=63).contains(&b.len())
        && b[0].is_ascii_alphanumeric()
        && b[b.len() - 1].is_ascii_alphanumeric()
        && b.iter()
            .all(|&c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
}

/// A label value: empty, or like the name part of a qualified name.
pub(crate) fn is_label_value(s: &str) -> bool {
    s.is_empty() || qualified_part(s)
}

/// What is wrong with a qualified name (`prefix/name`), as the API says it.
pub(crate) fn qualified_name_errors(key: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let parts: Vec<&str> = key.split('/').collect();
    let name = match parts.as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".to_owned());
            } else if !is_dns1123_subdomain(prefix) {
                errors.push(format!("prefix part {SUBDOMAIN_MSG}"));
            }
            *name
        }
        _ => {
            return vec![format!(
                "a qualified name must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        errors.push("name part must be no more than 63 bytes".to_owned());
    }
    if !qualified_part(name) && name.len() <= 63 {
        errors.push(QUALIFIED_NAME_MSG.to_owned());
    }
    errors
}

/// How names of a kind are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameRule {
    /// DNS-1123 subdomain, most kinds.
    Subdomain,
    /// DNS-1123 label: namespaces.
    Label,
    /// DNS-1035 label: services.
    Label1035,
    /// A path segment: RBAC kinds.
    PathSegment,
}

/// The rule for a kind.
pub(crate) fn rule_for(group: &str, kind: &str) -> NameRule {
    match (group, kind) {
        ("", "Namespace") => NameRule::Label,
        ("", "Service") => NameRule::Label1035,
        ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
        _ => NameRule::Subdomain,
    }
}

/// What is wrong with an object name.
pub(crate) fn name_errors(rule: NameRule, name: &str) -> Vec<String> {
    let long = |max: usize| format!("must be no more than {max} characters");
    match rule {
        NameRule::Subdomain if is_dns1123_subdomain(name) => vec![],
        NameRule::Subdomain if name.len() > 253 => vec![long(253)],
        NameRule::Subdomain => vec![SUBDOMAIN_MSG.to_owned()],
        NameRule::Label if is_dns1123_label(name) => vec![],
        NameRule::Label if name.len() > 63 => vec![long(63)],
        NameRule::Label => vec![LABEL_MSG.to_owned()],
        NameRule::Label1035 if is_dns1035_label(name) => vec![],
        NameRule::Label1035 if name.len() > 63 => vec![long(63)],
        NameRule::Label1035 => vec![LABEL_1035_MSG.to_owned()],
        NameRule::PathSegment => match name {
            "." | ".." => vec![format!("may not be '{name}'")],
            _ => ["/", "%"]
                .iter()
                .filter(|c| name.contains(**c))
                .map(|c| format!("may not contain '{c}'"))
                .collect(),
        },
    }
}

/// The name that a refused one was probably meant to be: lower case, `-` for blanks and `_`. None if that is no name either.
pub(crate) fn near_name(rule: NameRule, name: &str) -> Option<String> {
    let label = matches!(rule, NameRule::Label | NameRule::Label1035);
    let near: String = name
        .chars()
        .map(|c| match c {
            '_' | ' ' => '-',
            '.' if label => '-',
            c => c.to_ascii_lowercase(),
        })
        .collect();
    let near = near.trim_matches('-').to_owned();
    (near != name && !near.is_empty() && name_errors(rule, &near).is_empty()).then_some(near)
}

/// Random suffix of `generateName`, in the API's alphabet (no vowels, nothing to misread).
pub(crate) fn random_suffix(len: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rng = rand::rng();
    (0..len)
        .map(|_| ALPHABET[rand::Rng::random_range(&mut rng, 0..ALPHABET.len())] as char)
        .collect()
}

/// A random UUID (version 4).
pub(crate) fn new_uid() -> String {
    let mut b: [u8; 16] = rand::random();
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let hex: String = b.iter().map(|x| format!("{x:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[0..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_names() {
        for ok in ["a", "a-b", "1a", "a.b.c"] {
            assert!(is_dns1123_subdomain(ok), "{ok}");
        }
        for bad in ["", "A", "-a", "a-", "a..b", "a_b", ".a", &"x".repeat(254)] {
            assert!(!is_dns1123_subdomain(bad), "{bad}");
        }
        assert!(!is_dns1035_label("1a") && is_dns1035_label("a1"));
        assert!(!is_dns1123_label(&"a".repeat(64)));
        assert_eq!(name_errors(NameRule::PathSegment, "system:node"), Vec::<String>::new());
        assert!(qualified_name_errors("istio.io/rev").is_empty());
        assert!(!qualified_name_errors("a/b/c").is_empty());
        assert_eq!(new_uid().len(), 36);
        let near = |rule, name| near_name(rule, name);
        assert_eq!(near(NameRule::Label, "Example_1").as_deref(), Some("example-1"));
        assert_eq!(near(NameRule::Subdomain, "a.b_c").as_deref(), Some("a.b-c"));
        assert_eq!(near(NameRule::Label, "ä"), None);
        assert_eq!(near(NameRule::Label1035, "1"), None);
        assert_eq!(near(NameRule::Label, "good"), None);
    }
}
