//! Envoy's response flags.

/// Nothing special.
pub const NONE: u32 = 0;
/// UH: no healthy upstream.
pub const NO_HEALTHY_UPSTREAM: u32 = 1;
/// UF: upstream connection failure.
pub const UPSTREAM_CONNECTION_FAILURE: u32 = 1 << 1;
/// UO: circuit breaker.
pub const UPSTREAM_OVERFLOW: u32 = 1 << 2;
/// NR: no route, or no filter chain.
pub const NO_ROUTE: u32 = 1 << 3;
/// URX: retries used up.
pub const RETRY_LIMIT_EXCEEDED: u32 = 1 << 4;
/// NC: cluster not found.
pub const NO_CLUSTER: u32 = 1 << 5;
/// DC: the downstream closed.
pub const DOWNSTREAM_CONNECTION_TERMINATION: u32 = 1 << 6;
/// UT: upstream timeout.
pub const UPSTREAM_REQUEST_TIMEOUT: u32 = 1 << 7;
/// UR: upstream reset.
pub const UPSTREAM_RESET: u32 = 1 << 8;
/// UC: upstream connection ended.
pub const UPSTREAM_CONNECTION_TERMINATION: u32 = 1 << 9;
/// UPE: upstream protocol error.
pub const UPSTREAM_PROTOCOL_ERROR: u32 = 1 << 10;
/// DPE: downstream protocol error.
pub const DOWNSTREAM_PROTOCOL_ERROR: u32 = 1 << 11;
/// SI: idle timeout.
pub const STREAM_IDLE_TIMEOUT: u32 = 1 << 12;
/// UAEX: an external authorizer said no, or could not be asked.
pub const UNAUTHORIZED_EXTERNAL_SERVICE: u32 = 1 << 13;

const NAMES: [&str; 14] = [
    "UH", "UF", "UO", "NR", "URX", "NC", "DC", "UT", "UR", "UC", "UPE", "DPE", "SI", "UAEX",
];

/// Appends the flags as the access log shows them, `-` for none.
pub fn push(out: &mut Vec<u8>, flags: u32) {
    if flags == NONE {
        out.push(b'-');
        return;
    }
    let set = NAMES.iter().enumerate().filter(|(bit, _)| flags & (1 << bit) != 0);
    for (at, (_, name)) in set.enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.extend_from_slice(name.as_bytes());
    }
}

/// The same as a text, for the metrics.
pub fn text(flags: u32) -> String {
    let mut out = Vec::new();
    push(&mut out, flags);
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_have_envoys_names() {
        assert_eq!(text(NONE), "-");
        assert_eq!(text(UPSTREAM_CONNECTION_FAILURE | RETRY_LIMIT_EXCEEDED), "UF,URX");
        assert_eq!(text(DOWNSTREAM_PROTOCOL_ERROR), "DPE");
        assert_eq!(text(STREAM_IDLE_TIMEOUT), "SI");
    }
}
