//! Tokens and key sets one by one, known attacks by their number, and whatever bytes a stranger sends. The whole way, beside
//! Envoy, is in `crates/proxy/tests/jwt`.

use mantlet_testkit::jwt::{Issuer, base64url};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn keys(list: &[Value]) -> KeySet {
    KeySet::parse(Issuer::jwks(list).as_bytes()).unwrap()
}

fn verify(token: &str, keys: &KeySet) -> Result<(), Failure> {
    Token::parse(token)?.verify(keys)
}

const ALGORITHMS: [(&str, &str); 13] = [
    ("RS256", "RSA"),
    ("RS384", "RSA"),
    ("RS512", "RSA"),
    ("PS256", "RSA"),
    ("PS384", "RSA"),
    ("PS512", "RSA"),
    ("ES256", "P-256"),
    ("ES384", "P-384"),
    ("ES512", "P-521"),
    ("HS256", "oct"),
    ("HS384", "oct"),
    ("HS512", "oct"),
    ("EdDSA", "Ed25519"),
];

#[test]
fn every_algorithm_with_its_key_and_with_no_other() {
    let (issuer, stranger) = (Issuer::new(), Issuer::new());
    for (alg, kind) in ALGORITHMS {
        let token = issuer.token(alg, &json!({"iss": "i"}));
        assert_eq!(verify(&token, &keys(&[issuer.jwk(kind, json!({}))])), Ok(()), "{alg}");
        assert_eq!(
            verify(&token, &keys(&[issuer.jwk(kind, json!({"alg": alg}))])),
            Ok(()),
            "{alg}"
        );
        let other = verify(&token, &keys(&[stranger.jwk(kind, json!({}))]));
        assert_eq!(other, Err(Failure::Verification), "{alg}");
        for (_, another) in ALGORITHMS.iter().filter(|(_, k)| *k != kind) {
            assert!(
                verify(&token, &keys(&[issuer.jwk(another, json!({}))])).is_err(),
                "{alg} {another}"
            );
        }
    }
}

#[test]
fn key_ids_choose_keys() {
    let (a, b) = (Issuer::new(), Issuer::new());
    let set = keys(&[
        a.jwk("P-256", json!({"kid": "one"})),
        b.jwk("P-256", json!({"kid": "two"})),
        b.jwk("RSA", json!({"kid": "rsa", "alg": "RS256"})),
    ]);
    let token = |issuer: &Issuer, kid: &str| issuer.token_with(json!({"alg": "ES256", "kid": kid}), &json!({}));
    assert_eq!(verify(&token(&a, "one"), &set), Ok(()));
    assert_eq!(verify(&token(&a, "two"), &set), Err(Failure::Verification));
    assert_eq!(verify(&token(&a, "three"), &set), Err(Failure::NoMatchingKey));
    assert_eq!(verify(&token(&a, "rsa"), &set), Err(Failure::NoMatchingKey));
    assert_eq!(
        verify(&token(&b, ""), &set),
        Ok(()),
        "S3.28: without kid every key is a candidate"
    );
    assert_eq!(set.key_ids().collect::<Vec<_>>(), ["one", "two", "rsa"]);
    // Two keys of one name: both are tried (threat 129).
    let twins = keys(&[a.jwk("P-256", json!({"kid": "k"})), b.jwk("P-256", json!({"kid": "k"}))]);
    assert_eq!(verify(&token(&b, "k"), &twins), Ok(()));
}

#[test]
fn bad_keys_are_passed_over_and_bad_sets_refused() {
    let issuer = Issuer::new();
    let good = issuer.jwk("P-256", json!({}));
    let mut off_curve = good.clone();
    off_curve["y"] = off_curve["x"].clone();
    let mut padded = issuer.jwk("RSA", json!({}));
    padded["n"] = format!("{}=", padded["n"].as_str().unwrap()).into();
    let small = json!({"kty": "RSA", "e": "AQAB", "n": base64url([0xff; 128])});
    let bad = [
        json!({}),
        json!(1),
        json!({"kty": "foo"}),
        json!({"kty": "RSA"}),
        json!({"kty": "RSA", "n": "AQ", "e": "AQ"}),
        small,
        off_curve,
        padded,
        issuer.jwk("RSA", json!({"alg": "ES256"})),
        issuer.jwk("RSA", json!({"alg": 7})),
        issuer.jwk("RSA", json!({"kid": 7})),
        issuer.jwk("RSA", json!({"e": "AQ"})),
        issuer.jwk("RSA", json!({"e": "Ag"})),
        issuer.jwk("RSA", json!({"e": ""})),
        issuer.jwk("RSA", json!({"n": base64url([0xff; 2048])})),
        issuer.jwk("P-256", json!({"crv": "P-384"})),
        issuer.jwk("P-256", json!({"crv": "secp256k1"})),
        issuer.jwk("P-256", json!({"alg": "ES384"})),
        issuer.jwk("P-256", json!({"x": base64url([0; 40])})),
        issuer.jwk("Ed25519", json!({"crv": "X25519"})),
        issuer.jwk("Ed25519", json!({"alg": "RS256"})),
        issuer.jwk("Ed25519", json!({"x": "AAAA"})),
        issuer.jwk("oct", json!({"alg": "RS256"})),
        issuer.jwk("oct", json!({"k": base64url([1; 31])})),
    ];
    for key in &bad {
        let alone = KeySet::parse(Issuer::jwks(std::slice::from_ref(key)).as_bytes());
        assert!(
            matches!(alone, Err(KeySetError::NoUsableKey(Some(_)))),
            "{key}: {alone:?}"
        );
    }
    let mut all = bad.to_vec();
    all.push(good);
    assert_eq!(keys(&all).len(), 1);
    assert_eq!(verify(&issuer.token("ES256", &json!({})), &keys(&all)), Ok(()));

    for text in [
        "",
        "x",
        "[]",
        "{}",
        r#"{"keys":{}}"#,
        r#"{"keys":[]}"#,
        r#"{"keys":[],"keys":[]}"#,
    ] {
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
    }
    let many = vec![issuer.jwk("Ed25519", json!({})); MAX_KEYS + 1];
    assert_eq!(
        KeySet::parse(Issuer::jwks(&many).as_bytes()).err(),
        Some(KeySetError::TooLarge)
    );
    let large = format!("{{\"keys\":[],\"x\":\"{}\"}}", "x".repeat(MAX_KEY_SET));
    assert_eq!(KeySet::parse(large.as_bytes()).err(), Some(KeySetError::TooLarge));
}

/// The set for unknown keys is a set, and the private half of its point is nobody's: its x coordinate is a hash.
#[test]
fn nobody_holds_the_key_of_missing_keys() {
    let set: Value = serde_json::from_str(NO_KEYS).unwrap();
    let text = b"mantlet: nobody holds this key\0";
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text);
    assert_eq!(set["keys"][0]["x"], base64url(hash));
    assert!(set["keys"][0].get("kid").is_none() && set["keys"][0].get("alg").is_none());
    let set = KeySet::parse(NO_KEYS.as_bytes()).unwrap();
    let issuer = Issuer::new();
    for (alg, _) in ALGORITHMS {
        assert_eq!(
            verify(&issuer.token(alg, &json!({})), &set),
            Err(Failure::Verification),
            "S3.62 {alg}"
        );
    }
}

#[test]
fn time_windows_have_a_skew() {
    let now = 1_000_000;
    let at = |claims: Value| Token::parse(&Issuer::new().token("none?", &claims)).map(|_| ());
    assert_eq!(at(json!({})), Err(Failure::AlgorithmUnsupported));
    let issuer = Issuer::new();
    let check = |claims: Value| {
        let token = issuer.token("HS256", &claims);
        Token::parse(&token).and_then(|t| t.check_time(now))
    };
    assert_eq!(check(json!({"exp": now - 60})), Ok(()), "S3.26");
    assert_eq!(check(json!({"exp": now - 61})), Err(Failure::Expired));
    assert_eq!(check(json!({"nbf": now + 60})), Ok(()));
    assert_eq!(check(json!({"nbf": now + 61})), Err(Failure::NotYetValid));
    assert_eq!(check(json!({"nbf": now + 61, "exp": 1})), Err(Failure::NotYetValid));
    assert_eq!(
        check(json!({"exp": u64::MAX})),
        Err(Failure::ExpRange),
        "rounds up to 2^64"
    );
    assert_eq!(check(json!({"exp": 1u64 << 63})), Ok(()));
    assert_eq!(check(json!({"exp": 0})), Err(Failure::Expired), "a listed deviation");
    assert_eq!(check(json!({"iat": now * 2})), Ok(()));
    assert_eq!(check(json!({})), Ok(()), "no exp never ends");
}

#[test]
fn audiences_are_compared_without_scheme_and_slash() {
    for (given, clean) in [
        ("a", "a"),
        ("http://a", "a"),
        ("https://a/", "a"),
        ("a//", "a/"),
        ("HTTP://a", "HTTP://a"),
        ("https://http://a", "http://a"),
        ("", ""),
        ("/", ""),
    ] {
        assert_eq!(sanitize_audience(given), clean);
    }
}

#[test]
fn texts_are_envoys_and_statuses_two() {
    assert_eq!(Failure::AudienceNotAllowed.status(), 403);
    assert_eq!(Failure::Expired.status(), 401);
    assert_eq!(Failure::NoValidKeys.text(), "Jwks doesn't have any valid public key");
    assert_eq!(key_set_name(b"{}"), "jwks/44136fa355b3678a1146ad16f7e8649e");
}

/// Malformed ECDSA signatures of every length (threat 119), and the all-zero one (threat 127).
#[test]
fn reg_119_malformed_signatures_of_every_length() {
    let issuer = Issuer::new();
    for (alg, kind) in ALGORITHMS {
        let set = keys(&[issuer.jwk(kind, json!({}))]);
        let token = issuer.token(alg, &json!({"iss": "i"}));
        let signed = token.rsplit_once('.').unwrap().0;
        for length in 1..=200 {
            for fill in [0, 1, 0xff] {
                let token = format!("{signed}.{}", base64url(vec![fill; length]));
                assert!(verify(&token, &set).is_err(), "{alg}: {length} bytes of {fill}");
            }
        }
    }
}

#[test]
fn reg_126_odd_header_types_and_symmetric_algorithms_with_public_keys() {
    let issuer = Issuer::new();
    for kid in [json!(1), json!(null), json!({}), json!([]), json!(true), json!(1.5)] {
        let token = issuer.token_with(json!({"alg": "RS256", "kid": kid}), &json!({}));
        assert_eq!(Token::parse(&token).err(), Some(Failure::HeaderKid));
    }
    // The public key's bytes, in any form that a verifier could mistake for a secret.
    let jwk = issuer.jwk("RSA", json!({}));
    let set = keys(std::slice::from_ref(&jwk));
    for secret in [
        jwk.to_string(),
        jwk["n"].as_str().unwrap().to_string(),
        Issuer::jwks(std::slice::from_ref(&jwk)),
    ] {
        let signed = format!("{}.{}", base64url(r#"{"alg":"HS256"}"#), base64url("{}"));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret.as_bytes());
        let mac = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        assert!(verify(&format!("{signed}.{}", base64url(mac)), &set).is_err());
    }
}

#[test]
fn reg_127_known_tricks_with_headers() {
    let issuer = Issuer::new();
    let set = keys(&[issuer.jwk("P-256", json!({"kid": "k"}))]);
    let claims = json!({"iss": "i"});
    for alg in ["none", "None", "NONE", "nOnE", ""] {
        for signature in ["", "AA", "e30"] {
            let token = format!("{}.e30.{signature}", base64url(json!({"alg": alg}).to_string()));
            assert!(Token::parse(&token).is_err(), "{alg}");
        }
    }
    // A key inside the token, or an address of one, is nobody's.
    let attacker = Issuer::new();
    for header in [
        json!({"alg": "ES256", "jwk": attacker.jwk("P-256", json!({}))}),
        json!({"alg": "ES256", "jku": "https://attacker", "kid": "k"}),
        json!({"alg": "ES256", "x5c": ["AA"], "x5u": "https://attacker"}),
    ] {
        assert_eq!(
            verify(&attacker.token_with(header, &claims), &set),
            Err(Failure::Verification)
        );
    }
    for header in [
        json!({"alg": "ES256", "crit": ["exp"], "exp": 1}),
        json!({"alg": "ES256", "crit": []}),
        json!({"alg": "ES256", "b64": false}),
        json!({"alg": "ES256", "b64": "x"}),
    ] {
        assert_eq!(
            verify(&issuer.token_with(header, &claims), &set),
            Err(Failure::Verification)
        );
    }
    assert_eq!(
        verify(&issuer.token_with(json!({"alg": "ES256", "b64": true}), &claims), &set),
        Ok(())
    );
    // Compressed content is not opened.
    let zipped = issuer.raw("ES256", r#"{"alg":"ES256","zip":"DEF"}"#, [0x78, 0x9c, 0x03]);
    assert_eq!(Token::parse(&zipped).err(), Some(Failure::PayloadJson));
    // JWE.
    assert_eq!(Token::parse("e30.e30.e30.e30.e30").err(), Some(Failure::Form));
}

#[test]
fn reg_78_deep_json_ends_early() {
    for depth in [101, 1000, 100_000] {
        let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(strict_json(deep.as_bytes()).is_err());
        let deep = format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
        assert!(strict_json(deep.as_bytes()).is_err());
    }
    let fits = format!("{}{}", "[".repeat(100), "]".repeat(100));
    assert!(strict_json(fits.as_bytes()).is_ok());
}

#[test]
fn reg_129_two_readings_are_refused() {
    let issuer = Issuer::new();
    for payload in [
        r#"{"iss":"i","iss":"j"}"#,
        r#"{"sub":"user","\u0073ub":"admin"}"#,
        r#"{"a":{"b":1,"b":2}}"#,
        r#"{"exp":1e999}"#,
        r#"{"iss":"i"}{"iss":"j"}"#,
    ] {
        let token = issuer.raw("HS256", r#"{"alg":"HS256"}"#, payload);
        assert_eq!(Token::parse(&token).err(), Some(Failure::PayloadJson), "{payload}");
    }
    let twice = issuer.raw("HS256", r#"{"alg":"HS256","alg":"HS384"}"#, "{}");
    assert_eq!(Token::parse(&twice).err(), Some(Failure::HeaderJson));
}

#[test]
fn huge_tokens_are_bounded() {
    let issuer = Issuer::new();
    let token = issuer.token("HS256", &json!({"a": "x".repeat(MAX_TOKEN)}));
    assert_eq!(Token::parse(&token).err(), Some(Failure::Form));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,300}") {
        let _ = Token::parse(&text);
        let _ = KeySet::parse(text.as_bytes());
    }

    #[test]
    fn no_three_sections_make_it_panic(
        header in proptest::collection::vec(any::<u8>(), 0..80),
        payload in proptest::collection::vec(any::<u8>(), 0..80),
        signature in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let text = [header, payload, signature].map(base64url).join(".");
        let _ = Token::parse(&text);
    }

    /// One changed character of a signed token, anywhere, is noticed.
    #[test]
    fn any_change_is_noticed(at in any::<prop::sample::Index>(), replacement in "[A-Za-z0-9_.=-]", alg in 0..13usize) {
        use std::sync::LazyLock;
        static ISSUER: LazyLock<Issuer> = LazyLock::new(Issuer::new);
        let (alg, kind) = ALGORITHMS[alg];
        let token = ISSUER.token(alg, &json!({"iss": "i", "sub": "somebody", "roles": ["a", "b"]}));
        let index = at.index(token.len());
        let changed = format!("{}{replacement}{}", &token[..index], &token[index + 1..]);
        let set = keys(&[ISSUER.jwk(kind, json!({}))]);
        // Bits behind the last byte of the signature mean nothing, nor does padding there.
        prop_assume!(changed != token && index + 1 != token.len());
        prop_assert!(verify(&changed, &set).is_err(), "{token} {changed}");
    }

    #[test]
    fn any_key_set_is_read_or_refused(n in ".{0,40}", e in ".{0,10}", crv in "(P-256|P-384|P-521|Ed25519|x)", kty in "(RSA|EC|OKP|oct)") {
        let key = json!({"kty": kty, "n": n, "e": e, "x": n, "y": e, "k": n, "crv": crv});
        let _ = KeySet::parse(Issuer::jwks(&[key]).as_bytes());
    }
}
