//! Path normalisation before policy, routing and forwarding (SEMANTICS 2h).
//!
//! Pure; the request function calls it once per request, and policy, routes and the upstream all see its result. It
//! must not know what a path means.

use std::borrow::Cow;

use mantlet_model::http::PathNormalization;

/// A path that no mode accepts; the request is answered with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// Neither absolute nor `*`.
    #[error("the path does not start with a slash")]
    NotAbsolute,
    /// `%00`: programs in C would cut the path there.
    #[error("the path holds an encoded NUL")]
    EncodedNul,
}

/// The normal form of a path without query. Borrowed when nothing changes, which is nearly always.
///
/// # Errors
/// See [`BadPath`]; refused in every mode, `NONE` included (a deviation towards denial).
pub fn normalize(path: &str, mode: PathNormalization) -> Result<Cow<'_, str>, BadPath> {
    // The fragment is no part of the request (S2.112); it goes first so that nothing behind it is looked at.
    let path = path.split('#').next().unwrap_or_default();
    if path == "*" {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with('/') {
        return Err(BadPath::NotAbsolute);
    }
    let mut suspicious = false;
    let bytes = path.as_bytes();
    for (i, byte) in bytes.iter().enumerate() {
        match byte {
            b'%' => {
                if bytes.get(i + 1) == Some(&b'0') && bytes.get(i + 2) == Some(&b'0') {
                    return Err(BadPath::EncodedNul);
                }
                suspicious = true;
            }
            b'\\' => suspicious = true,
            b'/' => suspicious |= matches!(bytes.get(i + 1), Some(b'.' | b'/')),
            _ => {}
        }
    }
    if !suspicious || mode == PathNormalization::None {
        return Ok(Cow::Borrowed(path));
    }
    let decode_slashes = mode == PathNormalization::DecodeAndMergeSlashes;
    let merge = matches!(
        mode,
        PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes
    );
    let mut out = remove_dot_segments(&decode(bytes, decode_slashes));
    if merge {
        out.dedup_by(|next, previous| *next == b'/' && *previous == b'/');
    }
    // Only ASCII was decoded or removed, so the rest is the UTF-8 it was.
    match String::from_utf8(out) {
        Ok(text) if text == path => Ok(Cow::Borrowed(path)),
        Ok(text) => Ok(Cow::Owned(text)),
        Err(_) => Err(BadPath::NotAbsolute),
    }
}

/// Decodes unreserved characters and turns `\` into `/`; with `slashes`, `%2f` and `%5c` too. Decoded bytes are not looked
/// at again, so `%252e` stays.
fn decode(path: &[u8], slashes: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut i = 0;
    while i < path.len() {
        let byte = path[i];
        if byte == b'%'
            && let (Some(high), Some(low)) = (path.get(i + 1).and_then(hex), path.get(i + 2).and_then(hex))
        {
            let value = high << 4 | low;
            let known = value.is_ascii_alphanumeric() || matches!(value, b'-' | b'.' | b'_' | b'~');
            if known {
                out.push(value);
                i += 3;
                continue;
            }
            if slashes && matches!(value, b'/' | b'\\') {
                out.push(b'/');
                i += 3;
                continue;
            }
        }
        out.push(if byte == b'\\' { b'/' } else { byte });
        i += 1;
    }
    out
}

fn hex(byte: &u8) -> Option<u8> {
    char::from(*byte).to_digit(16).map(|d| d as u8)
}

/// RFC 3986 section 5.2.4, for an absolute path.
fn remove_dot_segments(path: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    let mut segments = path.split(|b| *b == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            b"." => {}
            b".." => out.truncate(out.iter().rposition(|b| *b == b'/').unwrap_or(0)),
            _ => {
                out.push(b'/');
                out.extend_from_slice(segment);
                continue;
            }
        }
        if last {
            out.push(b'/');
        }
    }
    if out.is_empty() {
        out.push(b'/');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use PathNormalization::*;
    use proptest::prelude::*;

    /// The table of S2.114: input, then the result per mode.
    const TABLE: &[(&str, [&str; 4])] = &[
        ("/app/../admin", ["/app/../admin", "/admin", "/admin", "/admin"]),
        ("/app//", ["/app//", "/app//", "/app/", "/app/"]),
        ("/app/%2f", ["/app/%2f", "/app/%2f", "/app/%2f", "/app/"]),
        ("/app%2f/", ["/app%2f/", "/app%2f/", "/app%2f/", "/app/"]),
        (
            "/xyz%30..//abc",
            ["/xyz%30..//abc", "/xyz0..//abc", "/xyz0../abc", "/xyz0../abc"],
        ),
        ("/app/%2E./admin", ["/app/%2E./admin", "/admin", "/admin", "/admin"]),
        ("/app\\admin", ["/app\\admin", "/app/admin", "/app/admin", "/app/admin"]),
        (
            "/app/\\/\\/\\admin",
            ["/app/\\/\\/\\admin", "/app//////admin", "/app/admin", "/app/admin"],
        ),
        (
            "/%2Fapp%5cadmin%5Cabc",
            [
                "/%2Fapp%5cadmin%5Cabc",
                "/%2Fapp%5cadmin%5Cabc",
                "/%2Fapp%5cadmin%5Cabc",
                "/app/admin/abc",
            ],
        ),
        (
            "/app//../admin",
            ["/app//../admin", "/app/admin", "/app/admin", "/app/admin"],
        ),
        ("/app//../../admin", ["/app//../../admin", "/admin", "/admin", "/admin"]),
        ("/..;/admin", ["/..;/admin", "/..;/admin", "/..;/admin", "/..;/admin"]),
        (
            "/...//admin",
            ["/...//admin", "/...//admin", "/.../admin", "/.../admin"],
        ),
        ("/%c0%ae/x", ["/%c0%ae/x", "/%c0%ae/x", "/%c0%ae/x", "/%c0%ae/x"]),
        (
            "/%252e%252e/x",
            ["/%252e%252e/x", "/%252e%252e/x", "/%252e%252e/x", "/%252e%252e/x"],
        ),
        ("/a;v=1/B", ["/a;v=1/B", "/a;v=1/B", "/a;v=1/B", "/a;v=1/B"]),
        ("/..", ["/..", "/", "/", "/"]),
        ("/a/.", ["/a/.", "/a/", "/a/", "/a/"]),
        ("/a/b/..", ["/a/b/..", "/a/", "/a/", "/a/"]),
        ("/a#b", ["/a", "/a", "/a", "/a"]),
        ("/%zz%2", ["/%zz%2", "/%zz%2", "/%zz%2", "/%zz%2"]),
        ("*", ["*", "*", "*", "*"]),
    ];

    #[test]
    fn the_table_of_the_semantics_holds() {
        for (input, wanted) in TABLE {
            for (mode, want) in [None, Base, MergeSlashes, DecodeAndMergeSlashes]
                .into_iter()
                .zip(wanted)
            {
                assert_eq!(normalize(input, mode).unwrap(), *want, "{input} in {mode:?}");
            }
        }
    }

    #[test]
    fn encoded_nul_and_relative_paths_are_refused_in_every_mode() {
        for mode in [None, Base, MergeSlashes, DecodeAndMergeSlashes] {
            assert_eq!(normalize("/a%00b", mode), Err(BadPath::EncodedNul));
            assert_eq!(normalize("a/b", mode), Err(BadPath::NotAbsolute));
            assert_eq!(normalize("", mode), Err(BadPath::NotAbsolute));
        }
    }

    proptest! {
        /// What policy sees must be stable: normalising twice changes nothing, and no dot segment is left.
        #[test]
        fn normal_forms_are_fixed_points(path in r"/([a-c./\\%2efF5cC]{0,4}/?){0,6}") {
            for mode in [Base, MergeSlashes] {
                let Ok(once) = normalize(&path, mode) else { continue };
                prop_assert!(once.starts_with('/'));
                prop_assert!(!once.split('/').any(|s| s == "." || s == ".."), "{once}");
                prop_assert!(!once.contains('\\'));
            }
        }
    }
}
