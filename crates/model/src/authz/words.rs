//! Rules and tests in the words of the policy's author.
//!
//! The command line prints these texts. They name fields as AuthorizationPolicy does and values as they are written there,
//! so that a reader finds them in the file.

use super::{Atom, Attribute, Expr, FailedTest, Matcher, Sample};

/// A rule's id in its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId<'a> {
    /// Namespace of the policy.
    pub namespace: &'a str,
    /// Name of the policy.
    pub policy: &'a str,
    /// Index of the rule, from 0.
    pub rule: usize,
}

impl<'a> RuleId<'a> {
    /// Finds `ns[…]-policy[…]-rule[…]` in an id, or in response code details that hold one; `None` for other forms.
    pub fn find(id: &'a str) -> Option<RuleId<'a>> {
        let rest = &id[id.find("ns[")? + 3..];
        let (namespace, rest) = rest.split_once("]-policy[")?;
        let (policy, rest) = rest.split_once("]-rule[")?;
        let (rule, _) = rest.split_once(']')?;
        Some(RuleId {
            namespace,
            policy,
            rule: rule.parse().ok()?,
        })
    }
}

impl std::fmt::Display for RuleId<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}, rule {}", self.namespace, self.policy, self.rule)
    }
}

/// The field of AuthorizationPolicy that tests an attribute.
pub fn field(attribute: &Attribute) -> String {
    match attribute {
        Attribute::PeerUri => "principals".into(),
        Attribute::PeerNamespace => "namespaces".into(),
        Attribute::PeerServiceAccount => "serviceAccounts".into(),
        Attribute::PeerTrustDomain => "trustDomains".into(),
        Attribute::SourceIp => "ipBlocks".into(),
        Attribute::RemoteIp => "remoteIpBlocks".into(),
        Attribute::DestinationIp => "destination.ip".into(),
        Attribute::DestinationPort => "ports".into(),
        Attribute::Sni => "connection.sni".into(),
        Attribute::Host => "hosts".into(),
        Attribute::Method => "methods".into(),
        Attribute::Path => "paths".into(),
        Attribute::Header(name) => format!("request.headers[{name}]"),
        Attribute::Claim(path) => match path.as_slice() {
            [one] if one == "aud" => "request.auth.audiences".into(),
            [one] if one == "azp" => "request.auth.presenter".into(),
            path => format!("request.auth.claims[{}]", path.join("][")),
        },
        Attribute::Metadata(filter, key) => format!("experimental.{filter}[{key}]"),
    }
}

/// What an attribute is, in a sentence.
pub fn noun(attribute: &Attribute) -> String {
    match attribute {
        Attribute::PeerUri => "the client's identity".into(),
        Attribute::PeerNamespace => "the client's namespace".into(),
        Attribute::PeerServiceAccount => "the client's service account".into(),
        Attribute::PeerTrustDomain => "the client's trust domain".into(),
        Attribute::SourceIp => "the peer's address".into(),
        Attribute::RemoteIp => "the client's address".into(),
        Attribute::DestinationIp => "the destination address".into(),
        Attribute::DestinationPort => "the workload's port".into(),
        Attribute::Sni => "the server name (SNI)".into(),
        Attribute::Host => "the host".into(),
        Attribute::Method => "the method".into(),
        Attribute::Path => "the path".into(),
        Attribute::Header(name) => format!("header {name}"),
        Attribute::Claim(path) => format!("claim {} of the token", path.join(".")),
        Attribute::Metadata(filter, key) => format!("metadata {filter}[{key}]"),
    }
}

/// A matcher's value, as a policy spells it.
pub fn value(atom: &Atom) -> String {
    let identity = atom.attribute == Attribute::PeerUri;
    let plain = |text: &str| {
        let text = if identity {
            text.strip_prefix("spiffe://").unwrap_or(text)
        } else {
            text
        };
        text.to_string()
    };
    match &atom.matcher {
        Matcher::Exact(text) => plain(text),
        Matcher::Prefix(text) => format!("{}*", plain(text)),
        Matcher::Suffix(text) => format!("*{text}"),
        Matcher::Present => "*".into(),
        Matcher::Glob(text) | Matcher::Template(text) => text.clone(),
        Matcher::Cidr(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        Matcher::Cidr(net) => net.to_string(),
        Matcher::Port(port) => port.to_string(),
        Matcher::Regex(text) => format!("regular expression {text}"),
    }
}

/// Why a test failed on a sample: what was found and what the rule wants, with all values that would have done.
pub fn failure(expr: &Expr, test: &FailedTest, sample: &Sample) -> String {
    if let Some(problem) = &test.problem {
        return problem.clone();
    }
    let attribute = &test.atom.attribute;
    let found = match sample.shown(attribute) {
        Some(_) if is_secret(attribute) => format!("{} has another value (not shown)", noun(attribute)),
        Some(text) => format!("{} is {}", noun(attribute), quoted(&text)),
        None => match attribute {
            Attribute::PeerUri
            | Attribute::PeerNamespace
            | Attribute::PeerServiceAccount
            | Attribute::PeerTrustDomain => "the client has no identity (plaintext)".into(),
            Attribute::Claim(_) if sample.http.as_ref().is_some_and(|h| h.claims.is_none()) => {
                "the request carries no valid token".into()
            }
            _ if attribute.is_http() && sample.http.is_none() => format!("{} exists only in HTTP", noun(attribute)),
            _ => format!("{} is absent", noun(attribute)),
        },
    };
    let mut values: Vec<String> = alternatives(expr, &test.atom).iter().map(|a| value(a)).collect();
    values.sort();
    values.dedup();
    let shown = list(&values);
    if test.wanted {
        format!("{found}; {} wants {shown}", field(attribute))
    } else {
        format!("{found}; {} excludes {shown}", not_field(attribute))
    }
}

/// Whether an attribute's values may be credentials, which no log or answer shows.
fn is_secret(attribute: &Attribute) -> bool {
    const NAMES: [&str; 6] = ["authorization", "cookie", "password", "secret", "token", "api-key"];
    match attribute {
        Attribute::Header(name) => {
            let name = name.to_ascii_lowercase();
            NAMES.iter().any(|part| name.contains(part))
        }
        _ => false,
    }
}

fn not_field(attribute: &Attribute) -> String {
    let name = field(attribute);
    if name.contains('.') {
        return format!("{name} notValues");
    }
    let mut chars = name.chars();
    match chars.next() {
        Some(first) => format!("not{}{}", first.to_ascii_uppercase(), chars.as_str()),
        None => name,
    }
}

fn list(values: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut out = values
        .iter()
        .take(SHOWN)
        .map(|v| quoted(v))
        .collect::<Vec<_>>()
        .join(" or ");
    if values.len() > SHOWN {
        out.push_str(&format!(" or {} more", values.len() - SHOWN));
    }
    out
}

fn quoted(text: &str) -> String {
    format!("{text:?}")
}

/// The tests of the same attribute that stand beside an atom in its disjunction.
fn alternatives<'e>(expr: &'e Expr, atom: &'e Atom) -> Vec<&'e Atom> {
    fn walk<'e>(expr: &'e Expr, atom: &Atom) -> Option<Vec<&'e Atom>> {
        match expr {
            Expr::Or(children) => {
                if children.iter().any(|c| matches!(c, Expr::Atom(a) if a == atom)) {
                    let same = children.iter().filter_map(|c| match c {
                        Expr::Atom(a) if a.attribute == atom.attribute => Some(a),
                        _ => None,
                    });
                    return Some(same.collect());
                }
                children.iter().find_map(|c| walk(c, atom))
            }
            Expr::And(children) => children.iter().find_map(|c| walk(c, atom)),
            Expr::Not(inner) => walk(inner, atom),
            Expr::Atom(_) => None,
        }
    }
    walk(expr, atom).unwrap_or_else(|| vec![atom])
}

/// An expression as a condition: `methods GET or POST, and paths /api/*`.
pub fn condition(expr: &Expr) -> String {
    match expr {
        Expr::And(children) if children.is_empty() => "anything".into(),
        Expr::Or(children) if children.is_empty() => "nothing".into(),
        _ => text(expr, 0),
    }
}

fn text(expr: &Expr, depth: usize) -> String {
    match expr {
        Expr::Atom(atom) => format!("{} {}", field(&atom.attribute), value(atom)),
        Expr::Not(inner) => match &**inner {
            Expr::Atom(atom) => format!("{} {}", not_field(&atom.attribute), value(atom)),
            Expr::Or(children) => match same_attribute(children) {
                Some(atoms) => grouped(&not_field(&atoms[0].attribute), &atoms),
                None => format!("not ({})", text(inner, 0)),
            },
            _ => format!("not ({})", text(inner, 0)),
        },
        Expr::Or(children) => match same_attribute(children) {
            Some(atoms) => grouped(&field(&atoms[0].attribute), &atoms),
            None => wrap(join(children, " or ", depth), depth),
        },
        Expr::And(children) => wrap(join(children, " and ", depth), depth),
    }
}

fn join(children: &[Expr], word: &str, depth: usize) -> String {
    children
        .iter()
        .map(|c| text(c, depth + 1))
        .collect::<Vec<_>>()
        .join(word)
}

fn wrap(text: String, depth: usize) -> String {
    if depth > 0 { format!("({text})") } else { text }
}

fn same_attribute(children: &[Expr]) -> Option<Vec<&Atom>> {
    let atoms: Option<Vec<&Atom>> = children
        .iter()
        .map(|c| match c {
            Expr::Atom(atom) => Some(atom),
            _ => None,
        })
        .collect();
    let atoms = atoms?;
    let first = atoms.first()?;
    atoms.iter().all(|a| a.attribute == first.attribute).then_some(atoms)
}

fn grouped(field: &str, atoms: &[&Atom]) -> String {
    let values: Vec<String> = atoms.iter().map(|a| value(a)).collect();
    format!("{field} {}", values.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::super::{AuthzFilter, HttpSample, Rule, explain};
    use super::*;

    #[test]
    fn credentials_are_not_shown() {
        let attribute = Attribute::Header("Authorization".into());
        let rule = exact(attribute.clone(), "Basic x");
        let test = FailedTest {
            atom: Atom {
                attribute,
                matcher: Matcher::Exact("Basic x".into()),
            },
            wanted: true,
            problem: None,
        };
        let sample = Sample {
            http: Some(HttpSample {
                headers: vec![("authorization".into(), "Basic c2VjcmV0".into())],
                ..HttpSample::default()
            }),
            ..Sample::default()
        };
        let text = failure(&rule, &test, &sample);
        assert!(!text.contains("c2VjcmV0") && text.contains("not shown"), "{text}");
    }

    #[test]
    fn ids_are_found_in_details() {
        let details = "rbac_access_denied_matched_policy[ns[a]-policy[b]-rule[3]]";
        let id = RuleId::find(details).unwrap();
        assert_eq!(id.to_string(), "a/b, rule 3");
        assert_eq!(RuleId::find("rbac_access_denied_matched_policy[none]"), None);
    }

    fn exact(attribute: Attribute, value: &str) -> Expr {
        Expr::atom(attribute, Matcher::Exact(value.into()))
    }

    #[test]
    fn a_miss_names_what_was_found_and_all_that_would_do() {
        let rule = Expr::And(vec![
            exact(Attribute::PeerUri, "spiffe://td/ns/a/sa/web"),
            Expr::Or(vec![exact(Attribute::Method, "GET"), exact(Attribute::Method, "HEAD")]),
            Expr::Or(vec![Expr::atom(Attribute::Path, Matcher::Prefix("/admin".into()))]).not(),
        ]);
        let filter = AuthzFilter {
            action: super::super::Action::Allow,
            enforced: true,
            rules: vec![Rule {
                id: "ns[a]-policy[p]-rule[0]".into(),
                expr: rule.clone(),
            }],
            shadow: Vec::new(),
        };
        let sample = |peer: Option<&str>, method: &str, path: &str| Sample {
            peer: peer.into_iter().map(String::from).collect(),
            http: Some(HttpSample {
                method: method.into(),
                path: path.into(),
                ..HttpSample::default()
            }),
            ..Sample::default()
        };
        let miss = |sample: &Sample| {
            let explained = explain(std::slice::from_ref(&filter), &sample.connection(), sample.view());
            let nearest = explained.filters[0].nearest.clone().expect("a miss");
            nearest
                .failed
                .iter()
                .map(|f| failure(&rule, f, sample))
                .collect::<Vec<_>>()
        };
        let web = Some("spiffe://td/ns/a/sa/web");
        assert_eq!(
            miss(&sample(web, "POST", "/")),
            ["the method is \"POST\"; methods wants \"GET\" or \"HEAD\""]
        );
        assert_eq!(
            miss(&sample(web, "GET", "/admin/x")),
            ["the path is \"/admin/x\"; notPaths excludes \"/admin*\""]
        );
        assert_eq!(
            miss(&sample(None, "GET", "/")),
            ["the client has no identity (plaintext); principals wants \"td/ns/a/sa/web\""]
        );
        assert_eq!(
            condition(&rule),
            "principals td/ns/a/sa/web and methods GET or HEAD and notPaths /admin*"
        );
    }
}
