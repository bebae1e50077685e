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
    /// Bytes that RFC 3986 does not allow and that programs read in different ways.
    #[error("the path holds bytes other than printable ASCII")]
    NotAscii,
}

/// Whether every byte of a request target is printable ASCII.
pub fn is_printable(target: &str) -> bool {
    target.bytes().all(|b| (0x21..0x7f).contains(&b))
}

/// Printable characters that no path holds as such; they are percent-encoded, as Envoy does.
fn must_be_encoded(byte: u8) -> bool {
    matches!(byte, b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}')
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
    if !is_printable(path) {
        return Err(BadPath::NotAscii);
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
            byte if must_be_encoded(*byte) => suspicious = true,
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
    let bytes = if decode_slashes {
        unescape_slashes(bytes)
    } else {
        bytes.to_vec()
    };
    let mut out = remove_dot_segments(&decode(&without_parameters(&bytes)));
    if merge {
        let only_slashes = out.len() > 1 && out.iter().all(|b| *b == b'/');
        out.dedup_by(|next, previous| *next == b'/' && *previous == b'/');
        if only_slashes {
            // Envoy keeps the first and the last slash of a path without segments, and policies see that.
            out.push(b'/');
        }
    }
    // All of it is ASCII.
    match String::from_utf8(out) {
        Ok(text) if text == path => Ok(Cow::Borrowed(path)),
        Ok(text) => Ok(Cow::Owned(text)),
        Err(_) => Err(BadPath::NotAbsolute),
    }
}

/// `%2f` and `%5c` as the characters that they stand for.
fn unescape_slashes(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let slash = match rest.get(..3) {
            Some([b'%', b'2', b'f' | b'F']) => Some(b'/'),
            Some([b'%', b'5', b'c' | b'C']) => Some(b'\\'),
            _ => None,
        };
        out.push(slash.unwrap_or(*first));
        rest = if slash.is_some() { &rest[3..] } else { after };
    }
    out
}

/// `..;x` is `..`: parameters of a dot segment are dropped, since programs in Java ignore them and walk up. Only literal
/// dots, as Envoy 1.40 has it.
fn without_parameters(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    for (index, segment) in path.split(|b| *b == b'/').enumerate() {
        if index > 0 {
            out.push(b'/');
        }
        out.extend_from_slice(match segment {
            [b'.', b';', ..] => b".",
            [b'.', b'.', b';', ..] => b"..",
            other => other,
        });
    }
    out
}

/// Decodes unreserved characters, turns `\` into `/` and encodes what must not be in a path. Decoded bytes are not looked
/// at again, so `%252e` stays.
fn decode(path: &[u8]) -> Vec<u8> {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = Vec::with_capacity(path.len());
    let mut i = 0;
    while i < path.len() {
        let byte = path[i];
        if byte == b'%'
            && let (Some(high), Some(low)) = (path.get(i + 1).and_then(hex), path.get(i + 2).and_then(hex))
        {
            let value = high << 4 | low;
            if value.is_ascii_alphanumeric() || matches!(value, b'-' | b'.' | b'_' | b'~') {
                out.push(value);
                i += 3;
                continue;
            }
        }
        match byte {
            b'\\' => out.push(b'/'),
            byte if must_be_encoded(byte) => {
                out.extend([b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
            }
            byte => out.push(byte),
        }
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
        ("/..;/admin", ["/..;/admin", "/admin", "/admin", "/admin"]),
        ("/a/..;x=1/b", ["/a/..;x=1/b", "/b", "/b", "/b"]),
        ("/a/.;/b", ["/a/.;/b", "/a/b", "/a/b", "/a/b"]),
        ("/a//..;/b", ["/a//..;/b", "/a/b", "/a/b", "/a/b"]),
        ("/a/...;/b", ["/a/...;/b", "/a/...;/b", "/a/...;/b", "/a/...;/b"]),
        ("/a/%2e%2e;/b", ["/a/%2e%2e;/b", "/a/..;/b", "/a/..;/b", "/a/..;/b"]),
        ("/a/..;%2fb", ["/a/..;%2fb", "/", "/", "/b"]),
        ("/a%2f..;/b", ["/a%2f..;/b", "/a%2f..;/b", "/a%2f..;/b", "/b"]),
        ("/a/..;x%5cy/b", ["/a/..;x%5cy/b", "/b", "/b", "/b"]),
        ("/a\\..;/b", ["/a\\..;/b", "/a/..;/b", "/a/..;/b", "/a/..;/b"]),
        (
            "/a\"b|{c}",
            ["/a\"b|{c}", "/a%22b%7C%7Bc%7D", "/a%22b%7C%7Bc%7D", "/a%22b%7C%7Bc%7D"],
        ),
        (
            "/a^`<>",
            ["/a^`<>", "/a%5E%60%3C%3E", "/a%5E%60%3C%3E", "/a%5E%60%3C%3E"],
        ),
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
            assert_eq!(normalize("/\u{fc}", mode), Err(BadPath::NotAscii));
            assert_eq!(normalize("/a\u{7f}", mode), Err(BadPath::NotAscii));
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
