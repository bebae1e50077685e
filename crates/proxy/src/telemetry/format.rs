//! Access log formats with Envoy's `%COMMAND%` operators, as text and as JSON.
//!
//! Used when the mesh configures a format of its own; the default one is written directly by `access_log`. Unknown
//! operators show `-`, as absent values do, so that a format made for a newer proxy still logs.

use std::borrow::Cow;
use std::net::SocketAddr;

use http::HeaderMap;
use serde_json::{Map, Value};

use super::access_log::{Line, clean, rfc3339_millis};

/// Longest value that is written.
const MAX_VALUE: usize = 4096;

/// What operators may look at.
pub struct Subject<'a> {
    /// The fields of the default format.
    pub line: &'a Line<'a>,
    /// The request's headers as received.
    pub request: Option<&'a HeaderMap>,
    /// The response's headers as sent.
    pub response: Option<&'a HeaderMap>,
    /// Dynamic metadata.
    pub metadata: &'a [super::record::Metadata],
    /// First URI name of the downstream's certificate.
    pub peer_uri: &'a str,
    /// First URI name of the own certificate.
    pub own_uri: &'a str,
}

/// A text format: everything between operators is copied, `%%` is a percent sign.
pub fn text(format: &str, subject: &Subject<'_>) -> String {
    let mut out = String::with_capacity(256);
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let Some(end) = operator_end(rest) else {
            out.push('%');
            break;
        };
        match subject.value(&rest[..end]) {
            Some(value) => out.push_str(&clean(&value)),
            None => out.push('-'),
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    out
}

/// Fields as one JSON object with a newline. A field that is one operator keeps its type: numbers are numbers, absent
/// values are null.
pub fn json(fields: &[(String, String)], subject: &Subject<'_>) -> String {
    let mut object = Map::new();
    for (name, format) in fields {
        let single = format
            .strip_prefix('%')
            .and_then(|f| f.strip_suffix('%'))
            .filter(|f| operator_end(&format[1..]) == Some(f.len()));
        let value = match single {
            None => Value::String(text(format, subject)),
            Some(operator) => match subject.value(operator) {
                None => Value::Null,
                Some(text) if is_number(operator) => text.parse::<u64>().map_or(Value::Null, Value::from),
                Some(text) => Value::String(text.into_owned()),
            },
        };
        object.insert(name.clone(), value);
    }
    let mut out = Value::Object(object).to_string();
    out.push('\n');
    out
}

/// Where the operator ends: the next `%` outside of parentheses.
fn operator_end(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

fn is_number(operator: &str) -> bool {
    matches!(
        operator,
        "RESPONSE_CODE" | "BYTES_RECEIVED" | "BYTES_SENT" | "DURATION" | "RESPONSE_DURATION"
    )
}

fn some(text: &str) -> Option<Cow<'_, str>> {
    (!text.is_empty() && text != "-").then_some(Cow::Borrowed(text))
}

fn address(address: Option<SocketAddr>) -> Option<Cow<'static, str>> {
    address.map(|a| Cow::Owned(a.to_string()))
}

impl Subject<'_> {
    fn value(&self, operator: &str) -> Option<Cow<'_, str>> {
        let line = self.line;
        let (name, argument) = match operator.split_once('(') {
            Some((name, rest)) => {
                let (argument, length) = rest.rsplit_once(')')?;
                (name, Some((argument, length.strip_prefix(':'))))
            }
            None => (operator, None),
        };
        if let Some((argument, length)) = argument
            && matches!(name, "REQ" | "RESP")
        {
            let headers = if name == "REQ" { self.request } else { self.response };
            // `REQ(X?Y)`: Y stands in for an absent X.
            let found = argument
                .split('?')
                .find_map(|header| self.header(name, header, headers))?;
            let limit = length.and_then(|l| l.parse().ok()).unwrap_or(MAX_VALUE);
            return Some(match found.char_indices().nth(limit) {
                Some((at, _)) => Cow::Owned(found[..at].to_string()),
                None => found,
            });
        }
        if let (Some((argument, _)), "DYNAMIC_METADATA") = (argument, name) {
            let (filter, key) = argument.split_once(':')?;
            return self
                .metadata
                .iter()
                .rev()
                .find(|(f, k, _)| *f == filter && k == key)
                .map(|(_, _, value)| Cow::Borrowed(value.as_str()));
        }
        match name {
            "START_TIME" => line.start.map(|at| Cow::Owned(rfc3339_millis(at))),
            "PROTOCOL" => some(line.protocol),
            "RESPONSE_CODE" => Some(Cow::Owned(line.status.to_string())),
            "RESPONSE_FLAGS" => Some(Cow::Owned(super::flags::text(line.flags))),
            "RESPONSE_CODE_DETAILS" => some(line.details),
            "CONNECTION_TERMINATION_DETAILS" => some(line.termination),
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => some(line.transport_failure),
            "BYTES_RECEIVED" => Some(Cow::Owned(line.received.to_string())),
            "BYTES_SENT" => Some(Cow::Owned(line.sent.to_string())),
            "DURATION" => Some(Cow::Owned(line.duration.to_string())),
            "UPSTREAM_HOST" => address(line.upstream_host),
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => some(line.cluster),
            "UPSTREAM_LOCAL_ADDRESS" => address(line.upstream_local),
            "DOWNSTREAM_LOCAL_ADDRESS" => address(line.downstream_local),
            "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => address(line.downstream_remote),
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => line.downstream_remote.map(|a| Cow::Owned(a.ip().to_string())),
            "REQUESTED_SERVER_NAME" => some(line.sni),
            "ROUTE_NAME" => some(line.route),
            "DOWNSTREAM_PEER_URI_SAN" => some(self.peer_uri),
            "DOWNSTREAM_LOCAL_URI_SAN" => some(self.own_uri),
            _ => None,
        }
    }

    fn header<'s>(&'s self, side: &str, name: &str, headers: Option<&'s HeaderMap>) -> Option<Cow<'s, str>> {
        if side == "REQ" {
            match name {
                ":METHOD" | ":method" => return some(self.line.method),
                ":PATH" | ":path" => return some(self.line.path),
                ":AUTHORITY" | ":authority" => return some(self.line.authority),
                _ if name.eq_ignore_ascii_case("x-request-id") => return some(self.line.request_id),
                _ => {}
            }
        } else if name.eq_ignore_ascii_case("x-envoy-upstream-service-time") {
            return self.line.service_time.map(|ms| Cow::Owned(ms.to_string()));
        }
        // Bytes of a peer: what is no text is shown as such, never trusted to be UTF-8.
        let value = headers?.get(name.to_ascii_lowercase())?;
        Some(String::from_utf8_lossy(value.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    fn with<T>(check: impl FnOnce(&Subject<'_>) -> T) -> T {
        let line = Line {
            start: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1500)),
            method: "GET",
            path: "/a?b",
            status: 200,
            authority: "web",
            service_time: Some(7),
            sent: 19,
            ..Line::default()
        };
        let mut request = HeaderMap::new();
        request.insert("user-agent", "curl/8".parse().unwrap());
        request.insert("x-bin", http::HeaderValue::from_bytes(b"a\xffb").unwrap());
        check(&Subject {
            line: &line,
            request: Some(&request),
            response: None,
            metadata: &[],
            peer_uri: "spiffe://td/ns/a/sa/b",
            own_uri: "",
        })
    }

    #[test]
    fn operators_are_replaced_and_absent_values_are_dashes() {
        with(|s| {
            assert_eq!(
                text(
                    "[%START_TIME%] %REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESPONSE_CODE% 100%%\n",
                    s
                ),
                "[1970-01-01T00:00:01.500Z] GET /a?b 200 100%\n"
            );
            assert_eq!(
                text("%REQ(USER-AGENT):4% %REQ(NONE)% %RESP(X)% %NEW_ONE%", s),
                "curl - - -"
            );
            assert_eq!(
                text("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %DOWNSTREAM_PEER_URI_SAN%", s),
                "7 spiffe://td/ns/a/sa/b"
            );
            assert_eq!(text("%REQ(X-BIN)% %unfinished", s), "a\u{fffd}b %unfinished");
        });
    }

    #[test]
    fn json_fields_keep_their_types() {
        let fields: Vec<(String, String)> = [
            ("code", "%RESPONSE_CODE%"),
            ("bytes", "%BYTES_SENT%"),
            ("none", "%UPSTREAM_HOST%"),
            ("text", "%REQ(:METHOD)% of %REQ(:AUTHORITY)%"),
        ]
        .map(|(a, b)| (a.to_string(), b.to_string()))
        .into();
        with(|s| {
            assert_eq!(
                json(&fields, s),
                "{\"code\":200,\"bytes\":19,\"none\":null,\"text\":\"GET of web\"}\n"
            );
        });
    }
}
