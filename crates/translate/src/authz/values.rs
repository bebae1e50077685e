//! Single values of policy fields → atoms (SEMANTICS 2d, 2e, 2i).

use std::net::IpAddr;

use ipnet::IpNet;
use mantlet_model::authz::{Attribute, Expr, Matcher};

/// Why a value cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bad(pub(super) String);

/// A reader of one field's values.
pub(super) type Reader<'a> = Box<dyn Fn(&str) -> Result<Expr, Bad> + 'a>;

/// What values are read against.
pub(super) struct Values<'a> {
    /// The mesh's trust domain and its aliases, the trust domain first.
    pub(super) trust_domains: Vec<&'a str>,
    /// The policy's namespace.
    pub(super) namespace: &'a str,
}

impl Values<'_> {
    /// A string field: `*` alone, leading `*`, trailing `*`, else equal (S2.40, S2.41).
    pub(super) fn text(&self, attribute: Attribute, value: &str) -> Expr {
        Expr::atom(attribute, text_matcher(value))
    }

    /// `principals` (S2.44, S2.45) with trust domain aliases (S2.121–S2.124).
    pub(super) fn principal(&self, value: &str) -> Result<Expr, Bad> {
        let atom = |value: &str| {
            let matcher = match text_matcher(value) {
                Matcher::Prefix(prefix) => Matcher::Prefix(format!("spiffe://{prefix}")),
                Matcher::Exact(exact) => Matcher::Exact(format!("spiffe://{exact}")),
                // `*/ns/a/sa/b`: any trust domain, so the scheme is no part of the suffix.
                other => other,
            };
            Expr::atom(Attribute::PeerUri, matcher)
        };
        let expanded = self.expand_principal(value);
        match expanded.as_slice() {
            [single] => Ok(atom(single)),
            many => Ok(Expr::Or(many.iter().map(|v| atom(v)).collect())),
        }
    }

    /// A principal with five parts, once per name of the mesh's trust domain.
    fn expand_principal(&self, value: &str) -> Vec<String> {
        let parts: Vec<&str> = value.split('/').collect();
        let [trust_domain, rest @ ..] = parts.as_slice() else {
            return vec![value.to_string()];
        };
        if rest.len() != 4 || *trust_domain == "*" {
            return vec![value.to_string()];
        }
        let rest = rest.join("/");
        if let Some(suffix) = trust_domain.strip_prefix('*') {
            if !self.trust_domains.iter().any(|d| d.ends_with(suffix)) {
                return vec![value.to_string()];
            }
            let mut out = vec![value.to_string()];
            out.extend(
                self.trust_domains
                    .iter()
                    .filter(|d| !d.ends_with(suffix))
                    .map(|d| format!("{d}/{rest}")),
            );
            return out;
        }
        if *trust_domain != "cluster.local" && !self.trust_domains.contains(trust_domain) {
            return vec![value.to_string()];
        }
        self.trust_domains.iter().map(|d| format!("{d}/{rest}")).collect()
    }

    /// `namespaces`: `*` stands for any text anywhere (S2.48).
    pub(super) fn peer_namespace(&self, value: &str) -> Result<Expr, Bad> {
        Ok(Expr::atom(Attribute::PeerNamespace, glob(value)))
    }

    /// `serviceAccounts`: `sa` or `ns/sa`, no wildcards (S2.49).
    pub(super) fn service_account(&self, value: &str) -> Result<Expr, Bad> {
        let full = match value.split('/').collect::<Vec<_>>().as_slice() {
            [account] if !account.is_empty() => format!("{}/{account}", self.namespace),
            [namespace, account] if !namespace.is_empty() && !account.is_empty() => format!("{namespace}/{account}"),
            _ => return Err(Bad("is neither NAME nor NAMESPACE/NAME".into())),
        };
        if full.contains('*') {
            return Err(Bad("wildcards are not supported here".into()));
        }
        Ok(Expr::atom(Attribute::PeerServiceAccount, Matcher::Exact(full)))
    }

    /// `trustDomains` (S2.50, S2.120).
    pub(super) fn trust_domain(&self, value: &str) -> Result<Expr, Bad> {
        let inner = value.strip_prefix('*').unwrap_or(value);
        let inner = inner.strip_suffix('*').unwrap_or(inner);
        if inner.contains('*') {
            return Err(Bad("`*` is allowed at the start or the end only".into()));
        }
        if self.trust_domains.contains(&value) {
            let atoms: Vec<Expr> = self
                .trust_domains
                .iter()
                .map(|d| Expr::atom(Attribute::PeerTrustDomain, Matcher::Exact(d.to_string())))
                .collect();
            return Ok(match <[Expr; 1]>::try_from(atoms) {
                Ok([single]) => single,
                Err(many) => Expr::Or(many),
            });
        }
        Ok(Expr::atom(Attribute::PeerTrustDomain, glob(value)))
    }

    /// An address or range; host bits are masked (S2.51).
    pub(super) fn cidr(&self, attribute: Attribute, value: &str) -> Result<Expr, Bad> {
        let net: IpNet = match (value.parse::<IpAddr>(), value.parse::<IpNet>()) {
            (Ok(address), _) => address.into(),
            (_, Ok(net)) => net.trunc(),
            _ => return Err(Bad("is neither an IP address nor a CIDR range".into())),
        };
        Ok(Expr::atom(attribute, Matcher::Cidr(net)))
    }

    /// `ports` (S2.59).
    pub(super) fn port(&self, value: &str) -> Result<Expr, Bad> {
        let port = value
            .parse::<u16>()
            .map_err(|_| Bad("is no port number (0..65535)".into()))?;
        Ok(Expr::atom(Attribute::DestinationPort, Matcher::Port(port)))
    }

    /// `hosts`: case is ignored, the port is part of it (S2.54).
    pub(super) fn host(&self, value: &str) -> Result<Expr, Bad> {
        Ok(Expr::atom(Attribute::Host, text_matcher(&value.to_ascii_lowercase())))
    }

    /// `paths`: strings, or templates with `{*}` and `{**}` (S2.57).
    pub(super) fn path(&self, value: &str) -> Result<Expr, Bad> {
        if !value.contains("{*}") && !value.contains("{**}") {
            return Ok(self.text(Attribute::Path, value));
        }
        let literal = value.replace("{**}", "").replace("{*}", "");
        if literal.contains(['*', '{', '}']) {
            return Err(Bad("`*`, `{` and `}` cannot be mixed with {*} and {**}".into()));
        }
        if value.matches("{**}").count() > 1 {
            return Err(Bad("{**} is allowed once".into()));
        }
        Ok(Expr::atom(Attribute::Path, Matcher::Template(value.to_string())))
    }

    /// `requestPrincipals`: issuer and subject, split at the last `/` (table in 2d).
    pub(super) fn request_principal(&self, value: &str) -> Result<Expr, Bad> {
        let (issuer, subject) = if value == "*" {
            (Matcher::Present, Matcher::Present)
        } else if let Some((issuer, subject)) = value.rsplit_once('/') {
            if value.starts_with('*') {
                // A leading `*` takes priority: the subject is literal (S2.62).
                (text_matcher(issuer), Matcher::Exact(subject.to_string()))
            } else {
                let subject = match subject.strip_suffix('*') {
                    Some("") => Matcher::Present,
                    Some(prefix) => Matcher::Prefix(prefix.to_string()),
                    None => Matcher::Exact(subject.to_string()),
                };
                (Matcher::Exact(issuer.to_string()), subject)
            }
        } else if let Some(suffix) = value.strip_prefix('*') {
            (Matcher::Present, Matcher::Suffix(suffix.to_string()))
        } else if let Some(prefix) = value.strip_suffix('*') {
            (Matcher::Prefix(prefix.to_string()), Matcher::Present)
        } else {
            (Matcher::Exact(value.to_string()), Matcher::Exact(String::new()))
        };
        Ok(Expr::And(vec![
            Expr::atom(Attribute::Claim(vec!["iss".into()]), issuer),
            Expr::atom(Attribute::Claim(vec!["sub".into()]), subject),
        ]))
    }

    /// The reader of a `when` key's values (2e).
    pub(super) fn condition<'a>(&'a self, key: &str) -> Result<Reader<'a>, Bad> {
        let claim = |name: &str| -> Reader<'a> {
            let path = vec![name.to_string()];
            Box::new(move |v| Ok(self.text(Attribute::Claim(path.clone()), v)))
        };
        Ok(match key {
            "source.ip" => Box::new(|v| self.cidr(Attribute::SourceIp, v)),
            "remote.ip" => Box::new(|v| self.cidr(Attribute::RemoteIp, v)),
            "source.namespace" => Box::new(|v| self.peer_namespace(v)),
            "source.principal" => Box::new(|v| self.principal(v)),
            "source.serviceAccount" => Box::new(|v| self.service_account(v)),
            "source.trustDomain" => Box::new(|v| self.trust_domain(v)),
            "request.auth.principal" => Box::new(|v| self.request_principal(v)),
            "request.auth.audiences" => claim("aud"),
            "request.auth.presenter" => claim("azp"),
            "destination.ip" => Box::new(|v| self.cidr(Attribute::DestinationIp, v)),
            "destination.port" => Box::new(|v| self.port(v)),
            "connection.sni" => Box::new(|v| Ok(self.text(Attribute::Sni, v))),
            _ => {
                if let Some(rest) = key.strip_prefix("request.headers") {
                    let name = bracketed(rest).ok_or_else(|| Bad("is not of the form request.headers[NAME]".into()))?;
                    if !is_header_name(name) {
                        return Err(Bad(format!("{name:?} is no header name")));
                    }
                    let name = name.to_ascii_lowercase();
                    return Ok(Box::new(move |v| Ok(self.text(Attribute::Header(name.clone()), v))));
                }
                if let Some(rest) = key.strip_prefix("request.auth.claims") {
                    let path =
                        claim_path(rest).ok_or_else(|| Bad("is not of the form request.auth.claims[NAME]".into()))?;
                    return Ok(Box::new(move |v| Ok(self.text(Attribute::Claim(path.clone()), v))));
                }
                if let Some(rest) = key.strip_prefix("experimental.") {
                    let (filter, name) = rest
                        .split_once('[')
                        .and_then(|(f, n)| Some((f, n.strip_suffix(']')?)))
                        .filter(|(f, n)| f.starts_with("envoy.filters.") && !n.is_empty())
                        .ok_or_else(|| Bad("is not of the form experimental.envoy.filters.FILTER[KEY]".into()))?;
                    let (filter, name) = (filter.to_string(), name.to_string());
                    return Ok(Box::new(move |v| {
                        let value = bracketed(v).unwrap_or(v);
                        Ok(self.text(Attribute::Metadata(filter.clone(), name.clone()), value))
                    }));
                }
                return Err(Bad("unknown attribute".into()));
            }
        })
    }
}

fn text_matcher(value: &str) -> Matcher {
    if value == "*" {
        Matcher::Present
    } else if let Some(suffix) = value.strip_prefix('*') {
        Matcher::Suffix(suffix.to_string())
    } else if let Some(prefix) = value.strip_suffix('*') {
        Matcher::Prefix(prefix.to_string())
    } else {
        Matcher::Exact(value.to_string())
    }
}

fn glob(value: &str) -> Matcher {
    if value.contains('*') {
        Matcher::Glob(value.to_string())
    } else {
        Matcher::Exact(value.to_string())
    }
}

fn bracketed(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']').filter(|t| !t.is_empty())
}

/// `[a][b]` is the path a, b; a malformed expression is taken as one name (S2.71).
fn claim_path(text: &str) -> Option<Vec<String>> {
    let inner = bracketed(text)?;
    let parts: Vec<&str> = inner.split("][").collect();
    if parts.iter().any(|p| p.is_empty() || p.contains(['[', ']'])) {
        return Some(vec![inner.to_string()]);
    }
    Some(parts.iter().map(|p| p.to_string()).collect())
}

fn is_header_name(name: &str) -> bool {
    let token = name.strip_prefix(':').unwrap_or(name);
    !token.is_empty()
        && name.len() <= 256
        && token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}
