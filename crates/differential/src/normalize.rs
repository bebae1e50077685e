//! What policies see of a request target (SEMANTICS 2h), written down step by step.

use crate::world::Normalization;

/// Path and query of a target after normalisation; `None` when the request is answered with 400.
pub fn target(target: &[u8], mode: Normalization) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let without_fragment = cut(target, b'#').0;
    let (path, query) = cut(without_fragment, b'?');
    let mut path = path.to_vec();
    if path.first() != Some(&b'/') || without_fragment.iter().any(|b| !b.is_ascii_graphic()) {
        return None;
    }
    if mode != Normalization::None {
        if mode == Normalization::DecodeAndMergeSlashes {
            for (from, to) in [(b"%2f", b"/"), (b"%2F", b"/"), (b"%5c", b"\\"), (b"%5C", b"\\")] {
                path = replace(&path, from, to);
            }
        }
        path = without_parameters(&path);
        if contains(&path, b"%00") {
            return None;
        }
        path = decode_unreserved(&replace(&path, b"\\", b"/"));
        for character in b"\"<>^`{|}" {
            path = replace(&path, &[*character], format!("%{character:02X}").as_bytes());
        }
        path = without_dots(&path);
        if mode != Normalization::Base {
            // First and last slash stay, also of a path without segments (Envoy 1.40, seen).
            let segments: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|s| !s.is_empty()).collect();
            let last: &[u8] = if path.len() > 1 && path.ends_with(b"/") {
                b"/"
            } else {
                b""
            };
            path = [b"/", &segments.join(&b'/')[..], last].concat();
        }
    }
    Some((path, query.map(<[u8]>::to_vec)))
}

/// Text before and after the first `byte`.
fn cut(text: &[u8], byte: u8) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|b| *b == byte) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|w| w == part)
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with(from) {
            out.extend_from_slice(to);
            at += from.len();
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

/// `%41` becomes `A`; only letters, digits and `-._~`.
fn decode_unreserved(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < path.len() {
        let code = path
            .get(at..at + 3)
            .filter(|t| t[0] == b'%' && t[1].is_ascii_hexdigit() && t[2].is_ascii_hexdigit())
            .and_then(|t| std::str::from_utf8(&t[1..]).ok())
            .and_then(|t| u8::from_str_radix(t, 16).ok());
        match code {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(path[at]);
                at += 1;
            }
        }
    }
    out
}

/// `/..;x/` is `/../` and `/.;x/` is `/./`, for literal dots between slashes (Envoy 1.40, seen).
fn without_parameters(path: &[u8]) -> Vec<u8> {
    let segments = path.split(|b| *b == b'/').map(|segment| match cut(segment, b';') {
        (dots @ (b"." | b".."), Some(_)) => dots,
        _ => segment,
    });
    segments.collect::<Vec<_>>().join(&b'/')
}

/// RFC 3986 section 5.2.4, by its five rules.
fn without_dots(path: &[u8]) -> Vec<u8> {
    let mut input = path.to_vec();
    let mut output: Vec<u8> = Vec::new();
    let up = |output: &mut Vec<u8>| {
        let at = output.iter().rposition(|b| *b == b'/').unwrap_or(0);
        output.truncate(at);
    };
    while !input.is_empty() {
        if input.starts_with(b"/./") {
            input.drain(..2);
        } else if input == b"/." {
            input = b"/".to_vec();
        } else if input.starts_with(b"/../") {
            input.drain(..3);
            up(&mut output);
        } else if input == b"/.." {
            input = b"/".to_vec();
            up(&mut output);
        } else {
            let end = input[1..]
                .iter()
                .position(|b| *b == b'/')
                .map_or(input.len(), |n| n + 1);
            output.extend(input.drain(..end));
        }
    }
    output
}
