//! Atoms that Istio writes as regular expressions (SEMANTICS 2d): both directions, so that they cannot disagree.
//!
//! `xds` writes these expressions for Envoy and folds them back when it reads, whoever wrote them. The engine never
//! sees them: the folded atoms are cheaper and can be indexed.

use super::{Atom, Attribute, Matcher};

/// Presence of a string: at least one character (S2.42).
const PRESENT: &str = ".+";
/// Scheme of all identities.
pub(super) const SPIFFE: &str = "spiffe://";

/// Quotes text for use inside an expression, as Go's `QuoteMeta` does.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if SPECIAL.contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

const SPECIAL: &str = r"\.+*?()|[]{}^$";

/// Reverts [`quote`]; `None` if the text has an unquoted special character.
fn unquote(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().filter(|c| SPECIAL.contains(*c))?),
            c if SPECIAL.contains(c) => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

/// The matcher for the identity URI that an identity atom stands for, as an Exact, Prefix or Regex on the whole URI.
/// `None` for atoms of other attributes and for matchers that do not apply.
pub fn identity_matcher(atom: &Atom) -> Option<Matcher> {
    Some(match (&atom.attribute, &atom.matcher) {
        (Attribute::PeerUri, Matcher::Present) => Matcher::Regex(PRESENT.into()),
        (Attribute::PeerUri, Matcher::Suffix(s)) => Matcher::Regex(format!("{SPIFFE}.*{}", quote(s))),
        (Attribute::PeerUri, m @ (Matcher::Exact(_) | Matcher::Prefix(_) | Matcher::Regex(_))) => m.clone(),
        (Attribute::PeerNamespace, Matcher::Exact(ns)) => Matcher::Regex(format!(".*/ns/{}/.*", quote(ns))),
        (Attribute::PeerNamespace, Matcher::Glob(glob)) => {
            let parts: Vec<String> = glob.split('*').map(quote).collect();
            Matcher::Regex(format!(".*/ns/{}/.*", parts.join(".*")))
        }
        (Attribute::PeerServiceAccount, Matcher::Exact(name)) => {
            let (ns, sa) = name.split_once('/')?;
            Matcher::Regex(format!("{SPIFFE}.+/ns/{}/(.+/|)sa/{}(/.+)?", quote(ns), quote(sa)))
        }
        (Attribute::PeerTrustDomain, Matcher::Exact(td)) => Matcher::Prefix(format!("{SPIFFE}{td}/")),
        (Attribute::PeerTrustDomain, Matcher::Glob(glob)) if glob == "*" => Matcher::Prefix(SPIFFE.into()),
        (Attribute::PeerTrustDomain, Matcher::Glob(glob)) => {
            let (before, after) = glob.split_once('*')?;
            Matcher::Regex(format!("{SPIFFE}{}[^/]*{}/.*", quote(before), quote(after)))
        }
        _ => return None,
    })
}

/// The expression for presence of a plain string.
pub fn presence() -> String {
    PRESENT.into()
}

/// The simplest atom that means the same.
pub(super) fn fold(atom: &Atom) -> Atom {
    let Atom { attribute, matcher } = atom;
    let make = |attribute: Attribute, matcher| Atom { attribute, matcher };
    match (attribute, matcher) {
        (Attribute::PeerUri, Matcher::Regex(text)) => fold_identity(text).unwrap_or_else(|| atom.clone()),
        (Attribute::PeerUri, Matcher::Prefix(text)) => match text.strip_prefix(SPIFFE) {
            Some("") => make(Attribute::PeerTrustDomain, Matcher::Glob("*".into())),
            Some(rest) => match rest.strip_suffix('/') {
                Some(td) if !td.is_empty() && !td.contains('/') => {
                    make(Attribute::PeerTrustDomain, Matcher::Exact(td.into()))
                }
                _ => atom.clone(),
            },
            None => atom.clone(),
        },
        (Attribute::PeerNamespace | Attribute::PeerTrustDomain, Matcher::Glob(glob)) if !glob.contains('*') => {
            make(attribute.clone(), Matcher::Exact(glob.clone()))
        }
        (Attribute::Path | Attribute::Sni | Attribute::Claim(_) | Attribute::Metadata(..), Matcher::Regex(text))
            if text == PRESENT =>
        {
            make(attribute.clone(), Matcher::Present)
        }
        // Stars without braces mean the same to the template engine (S2.57).
        (Attribute::Path, Matcher::Template(text)) if !text.contains('{') => {
            make(attribute.clone(), Matcher::Template(braced(text)))
        }
        // Expressions regard case, also for hosts.
        (Attribute::Host, Matcher::Regex(_)) => make(Attribute::Header(":authority".into()), matcher.clone()),
        (Attribute::Header(name), _) => match (name.to_ascii_lowercase().as_str(), matcher) {
            (":method", _) => make(Attribute::Method, matcher.clone()),
            (":authority", Matcher::Present) => make(Attribute::Host, Matcher::Present),
            (lower, _) => make(Attribute::Header(lower.into()), matcher.clone()),
        },
        (_, Matcher::Cidr(net)) => make(attribute.clone(), Matcher::Cidr(net.trunc())),
        _ => atom.clone(),
    }
}

fn fold_identity(text: &str) -> Option<Atom> {
    let make = |attribute, matcher| Some(Atom { attribute, matcher });
    if text == PRESENT {
        return make(Attribute::PeerUri, Matcher::Present);
    }
    if let Some(namespace) = text.strip_prefix(".*/ns/").and_then(|t| t.strip_suffix("/.*")) {
        let parts: Option<Vec<String>> = namespace.split(".*").map(unquote).collect();
        let parts = parts?;
        return match parts.as_slice() {
            [one] if one.is_empty() => None,
            [one] => make(Attribute::PeerNamespace, Matcher::Exact(one.clone())),
            many => make(Attribute::PeerNamespace, Matcher::Glob(many.join("*"))),
        };
    }
    let rest = text.strip_prefix(SPIFFE)?;
    if let Some(suffix) = rest.strip_prefix(".*") {
        let suffix = unquote(suffix).filter(|s| !s.is_empty())?;
        return make(Attribute::PeerUri, Matcher::Suffix(suffix));
    }
    if let Some(rest) = rest.strip_prefix(".+/ns/") {
        let (ns, sa) = rest.strip_suffix("(/.+)?")?.split_once("/(.+/|)sa/")?;
        let (ns, sa) = (unquote(ns)?, unquote(sa)?);
        let plain = |s: &str| !s.is_empty() && !s.contains('/');
        return if plain(&ns) && plain(&sa) {
            make(Attribute::PeerServiceAccount, Matcher::Exact(format!("{ns}/{sa}")))
        } else {
            None
        };
    }
    let (before, after) = rest.strip_suffix("/.*")?.split_once("[^/]*")?;
    let (before, after) = (unquote(before)?, unquote(after)?);
    let plain = |s: &str| !s.contains(['/', '*']);
    if plain(&before) && plain(&after) && !(before.is_empty() && after.is_empty()) {
        return make(Attribute::PeerTrustDomain, Matcher::Glob(format!("{before}*{after}")));
    }
    None
}

/// A path template in Envoy's spelling: `*` and `**` without braces (S2.57).
pub fn bare(template: &str) -> String {
    template.replace("{**}", "**").replace("{*}", "*")
}

/// A path template in Istio's spelling: `{*}` and `{**}`.
pub fn braced(template: &str) -> String {
    let mut out = String::with_capacity(template.len() + 4);
    let mut rest = template;
    while let Some(at) = rest.find('*') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix('*') {
            Some(after) => {
                out.push_str("{**}");
                rest = after;
            }
            None => out.push_str("{*}"),
        }
    }
    out.push_str(rest);
    out
}
