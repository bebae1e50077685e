//! What a request asks for, read from its method, path and query: the `RequestInfo` that authorization and routing share.
//!
//! Pure; knows neither which resources exist nor who asks.

use std::borrow::Cow;

/// The parsed request line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RequestInfo {
    /// Whether this addresses an API resource at all.
    pub(crate) is_resource: bool,
    /// The path as sent.
    pub(crate) path: String,
    /// API verb: get, list, watch, create, update, patch, delete, deletecollection; lower-case method for other paths.
    pub(crate) verb: String,
    /// API group.
    pub(crate) group: String,
    /// API version.
    pub(crate) version: String,
    /// Namespace, if the path has one.
    pub(crate) namespace: Option<String>,
    /// Plural name.
    pub(crate) resource: String,
    /// Subresource, if any.
    pub(crate) subresource: String,
    /// Object name; empty for collections.
    pub(crate) name: String,
    /// What follows the subresource (`proxy` paths).
    pub(crate) rest: Vec<String>,
}

/// Query parameters in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a raw query string; percent sequences that are no UTF-8 are replaced.
    pub(crate) fn parse(raw: Option<&str>) -> Self {
        let mut pairs = Vec::new();
        for part in raw.unwrap_or_default().split('&').filter(|p| !p.is_empty()).take(1024) {
            let (k, v) = part.split_once('=').unwrap_or((part, ""));
            pairs.push((unescape(k, true).into_owned(), unescape(v, true).into_owned()));
        }
        Self(pairs)
    }

    /// The first value of a parameter, if it is not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_str())
            .filter(|v| !v.is_empty())
    }

    /// All values of a parameter.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Whether a boolean parameter is set.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.0
            .iter()
            .find(|(k, _)| k == name)
            .is_some_and(|(_, v)| matches!(v.as_str(), "true" | "1" | "True" | "t"))
    }
}

/// Decodes percent sequences (and `+` in queries).
pub(crate) fn unescape(s: &str, plus: bool) -> Cow<'_, str> {
    let escaped = s.contains('%') || (plus && s.contains('+'));
    if !escaped {
        return Cow::Borrowed(s);
    }
    let bytes = s.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |b: Option<&u8>| b.and_then(|b| (*b as char).to_digit(16));
        match bytes[i] {
            b'%' => match (hex(bytes.get(i + 1)), hex(bytes.get(i + 2))) {
                (Some(h), Some(l)) => {
                    out.push((h * 16 + l) as u8);
                    i += 2;
                }
                _ => out.push(b'%'),
            },
            b'+' if plus => out.push(b' '),
            b => out.push(b),
        }
        i += 1;
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

impl RequestInfo {
    /// Reads method, path and query.
    pub(crate) fn parse(method: &http::Method, path: &str, query: &Query) -> Self {
        let mut info = Self {
            path: path.to_owned(),
            verb: method.as_str().to_ascii_lowercase(),
            ..Self::default()
        };
        let parts: Vec<String> = path
            .split('/')
            .filter(|p| !p.is_empty())
            .map(|p| unescape(p, false).into_owned())
            .collect();
        let mut rest: &[String] = match parts.as_slice() {
            [api, version, rest @ ..] if api == "api" && !rest.is_empty() => {
                info.version = version.clone();
                rest
            }
            [apis, group, version, rest @ ..] if apis == "apis" && !rest.is_empty() => {
                info.group = group.clone();
                info.version = version.clone();
                rest
            }
            _ => return info,
        };
        info.is_resource = true;
        // The old form /api/v1/watch/... is still allowed by the API.
        let mut forced_watch = false;
        if rest.len() > 1 && rest[0] == "watch" {
            forced_watch = true;
            rest = &rest[1..];
        }
        if rest.len() > 2
            && rest[0] == "namespaces"
            && !(rest.len() == 3 && matches!(rest[2].as_str(), "status" | "finalize"))
        {
            info.namespace = Some(rest[1].clone());
            rest = &rest[2..];
        } else if rest.len() >= 2 && rest[0] == "namespaces" {
            // A namespace lives "in itself", so that roles in it can grant access to it.
            info.namespace = Some(rest[1].clone());
        }
        let mut it = rest.iter();
        info.resource = it.next().cloned().unwrap_or_default();
        info.name = it.next().cloned().unwrap_or_default();
        info.subresource = it.next().cloned().unwrap_or_default();
        info.rest = it.cloned().collect();
        let one = !info.name.is_empty();
        info.verb = match *method {
            http::Method::GET | http::Method::HEAD => {
                if forced_watch || (query.flag("watch") && (!one || info.subresource.is_empty())) {
                    "watch"
                } else if one {
                    "get"
                } else {
                    "list"
                }
            }
            http::Method::POST => "create",
            http::Method::PUT => "update",
            http::Method::PATCH => "patch",
            http::Method::DELETE if one => "delete",
            http::Method::DELETE => "deletecollection",
            _ => "",
        }
        .to_owned();
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &str, path: &str, query: &str) -> RequestInfo {
        RequestInfo::parse(&method.parse().unwrap(), path, &Query::parse(Some(query)))
    }

    #[test]
    fn paths_and_verbs() {
        let i = parse("GET", "/api/v1/namespaces/default/pods/x/log", "");
        assert_eq!(
            (
                i.verb.as_str(),
                i.resource.as_str(),
                i.name.as_str(),
                i.subresource.as_str()
            ),
            ("get", "pods", "x", "log")
        );
        assert_eq!(i.namespace.as_deref(), Some("default"));
        let i = parse("GET", "/apis/apps/v1/deployments", "watch=true");
        assert_eq!(
            (i.group.as_str(), i.verb.as_str(), i.namespace),
            ("apps", "watch", None)
        );
        let i = parse("PUT", "/api/v1/namespaces/x/finalize", "");
        assert_eq!(
            (i.resource.as_str(), i.name.as_str(), i.subresource.as_str()),
            ("namespaces", "x", "finalize")
        );
        let i = parse("DELETE", "/api/v1/namespaces/x", "");
        assert_eq!(
            (i.resource.as_str(), i.name.as_str(), i.verb.as_str()),
            ("namespaces", "x", "delete")
        );
        let i = parse("DELETE", "/api/v1/namespaces/x/pods", "");
        assert_eq!((i.resource.as_str(), i.verb.as_str()), ("pods", "deletecollection"));
        assert!(!parse("GET", "/apis/apps/v1", "").is_resource);
        assert_eq!(parse("GET", "/healthz", "").verb, "get");
    }

    #[test]
    fn query_decoding() {
        let q = Query::parse(Some("labelSelector=app%3Dx+y&command=a&command=b%2&watch=1"));
        assert_eq!(q.get("labelSelector"), Some("app=x y"));
        assert_eq!(q.all("command").collect::<Vec<_>>(), ["a", "b%2"]);
        assert!(q.flag("watch"));
    }
}
