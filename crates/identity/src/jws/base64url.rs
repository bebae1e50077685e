//! Base64url as Envoy reads it in tokens: the padding may be left out, white space does not count, and bits after the
//! last whole byte are ignored. Key material is read by the strict form.

use std::borrow::Cow;

use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A section of a token.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let space = |b: u8| matches!(b, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r');
    let text: Cow<'_, [u8]> = if text.bytes().any(space) {
        text.bytes().filter(|b| !space(*b)).collect::<Vec<u8>>().into()
    } else {
        text.as_bytes().into()
    };
    // Padding is all or nothing.
    if text.ends_with(b"=") && !text.len().is_multiple_of(4) {
        return None;
    }
    LENIENT.decode(&text).ok()
}

/// A number or point of a key: no padding, no white space, canonical.
pub(super) fn decode_strict(text: &str) -> Option<Vec<u8>> {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).ok()
}
