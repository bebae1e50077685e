//! The table: which providers, which requests, and which of them this proxy refuses on purpose.

use std::time::{SystemTime, UNIX_EPOCH};

use mantlet_model::http::{JwtAuthn, JwtProvider};
use mantlet_testkit::jwt::{Issuer, base64url};
use serde_json::{Value, json};

use super::pair::Request;

/// A listed deviation (docs/deviations.toml).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deviation {
    /// Envoy lets it pass, this proxy refuses.
    Denies(&'static str),
    /// Both let it pass; the application sees a cleaner request.
    ForwardsOther(&'static str),
}

pub(crate) struct Case {
    pub name: String,
    pub request: Request,
    pub deviation: Option<Deviation>,
}

pub(crate) struct Scenario {
    pub name: &'static str,
    pub jwt: JwtAuthn,
    pub cases: Vec<Case>,
}

impl Scenario {
    fn new(name: &'static str, providers: Vec<JwtProvider>) -> Self {
        let mut providers = providers;
        for (index, provider) in providers.iter_mut().enumerate() {
            provider.name = format!("origins-{index}");
        }
        Scenario {
            name,
            jwt: JwtAuthn { providers },
            cases: Vec::new(),
        }
    }

    fn request(&mut self, name: &str, request: Request) -> &mut Case {
        self.cases.push(Case {
            name: name.into(),
            request,
            deviation: None,
        });
        self.cases.last_mut().unwrap()
    }

    fn headers(&mut self, name: &str, headers: &[(&str, &str)]) -> &mut Case {
        self.request(name, get("/", headers))
    }

    fn bearer(&mut self, name: &str, token: &str) -> &mut Case {
        let value = format!("Bearer {token}");
        self.headers(name, &[("authorization", &value)])
    }

    fn target(&mut self, name: &str, target: String) -> &mut Case {
        let mut request = get("/", &[]);
        request.target = target;
        self.request(name, request)
    }
}

impl Case {
    fn denies(&mut self, id: &'static str) {
        self.deviation = Some(Deviation::Denies(id));
    }

    fn forwards_other(&mut self, id: &'static str) {
        self.deviation = Some(Deviation::ForwardsOther(id));
    }
}

pub(crate) fn get(target: &str, headers: &[(&str, &str)]) -> Request {
    Request {
        method: "GET",
        target: target.into(),
        headers: headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
    }
}

pub(crate) fn provider(issuer: &str, keys: &[Value]) -> JwtProvider {
    JwtProvider {
        name: "origins-0".into(),
        issuer: issuer.into(),
        audiences: vec![],
        jwks: Issuer::jwks(keys).into(),
        from_headers: vec![],
        from_params: vec![],
        from_cookies: vec![],
        forward: false,
        payload_header: None,
        claim_headers: vec![],
        space_delimited: vec![],
        clear_route_cache: false,
    }
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

const ALGORITHMS: [&str; 13] = [
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "HS256", "HS384", "HS512", "EdDSA",
];

pub(crate) fn scenarios(issuer: &Issuer) -> Vec<Scenario> {
    vec![
        forms(issuer),
        payloads(issuer),
        algorithms(issuer, "all keys with kid", all_keys(issuer, true)),
        algorithms(issuer, "rsa only", vec![issuer.jwk("RSA", json!({}))]),
        algorithms(issuer, "rsa with alg", vec![issuer.jwk("RSA", json!({"alg": "RS256"}))]),
        algorithms(issuer, "p256 only", vec![issuer.jwk("P-256", json!({}))]),
        algorithms(issuer, "p384 only", vec![issuer.jwk("P-384", json!({}))]),
        algorithms(
            issuer,
            "p521 with alg",
            vec![issuer.jwk("P-521", json!({"alg": "ES512"}))],
        ),
        algorithms(issuer, "ed only", vec![issuer.jwk("Ed25519", json!({}))]),
        algorithms(issuer, "oct only", vec![issuer.jwk("oct", json!({}))]),
        algorithms(
            issuer,
            "ed before rsa",
            vec![issuer.jwk("Ed25519", json!({})), issuer.jwk("RSA", json!({}))],
        ),
        algorithms(
            issuer,
            "bad keys among good ones",
            vec![
                json!({"kty": "RSA"}),
                json!(7),
                issuer.jwk("RSA", json!({"alg": 1})),
                issuer.jwk("RSA", json!({"use": "enc", "key_ops": ["sign"]})),
                json!({"kty": "EC", "crv": "secp256k1"}),
            ],
        ),
        audiences(issuer),
        places(issuer),
        own_places(issuer),
        outputs(issuer),
        two_issuers(issuer),
        two_places(issuer),
        same_issuer(issuer),
        any_issuer(issuer),
        shared_list(issuer),
    ]
}

fn all_keys(issuer: &Issuer, kid: bool) -> Vec<Value> {
    ["RSA", "P-256", "P-384", "P-521", "Ed25519", "oct"]
        .map(|kind| issuer.jwk(kind, if kid { json!({"kid": kind}) } else { json!({}) }))
        .into()
}

/// What a token must look like.
fn forms(issuer: &Issuer) -> Scenario {
    let mut s = Scenario::new("forms", vec![provider("i", &[issuer.jwk("RSA", json!({"kid": "k"}))])]);
    let good = issuer.token("RS256", &json!({"iss": "i", "sub": "s"}));
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else {
        panic!("three sections")
    };
    s.headers("no token", &[]);
    s.bearer("good", &good);
    s.headers("basic", &[("authorization", "Basic abc")]);
    s.headers("lower case bearer", &[("authorization", &format!("bearer {good}"))]);
    s.headers(
        "prefix in the middle",
        &[("authorization", &format!("xx Bearer {good}"))],
    );
    s.bearer("prefix twice", &format!("Bearer {good}"));
    s.bearer("two spaces", &format!(" {good}"));
    s.bearer("nothing that can be a token", "!!");
    s.headers("prefix alone", &[("authorization", "Bearer")]);
    s.bearer("something before", &format!("\"{good}"));
    for (name, token) in [
        ("two sections", format!("{header}.{payload}")),
        ("four sections", format!("{good}.x")),
        ("JWE", format!("{good}.x.y")),
        ("no signature", format!("{header}.{payload}.")),
        ("no payload", format!("{header}..{signature}")),
        ("only dots", "..".into()),
        ("one word", "abc".into()),
        ("comma", format!("{good},{good}")),
        ("semicolon", format!("{good};")),
        ("plus", format!("{header}.{payload}.+{}", &signature[1..])),
        ("slash", format!("{good}/")),
        ("quote", format!("{good}\"")),
        ("padding", format!("{good}==")),
        ("half a padding", format!("{good}=")),
        (
            "signature one short",
            format!("{header}.{payload}.{}", &signature[..signature.len() - 1]),
        ),
        ("payload one long", format!("{header}.{payload}A.{signature}")),
        ("header one long", format!("{header}A.{payload}.{signature}")),
        ("header of one character", format!("a.{payload}.{signature}")),
        ("word behind", format!("{good} junk")),
        ("space inside", format!("{} {}", &good[..20], &good[20..])),
        (
            "another payload",
            format!("{header}.{}.{signature}", base64url(r#"{"iss":"i","sub":"admin"}"#)),
        ),
        (
            "another header",
            format!("{}.{payload}.{signature}", base64url(r#"{"alg":"RS256","x":1}"#)),
        ),
    ] {
        s.bearer(name, &token);
    }
    s.bearer("dot behind", &format!("{good}.")).denies("jwt-form");
    s.bearer("two dots", &good.replacen('.', "..", 1)).denies("jwt-form");
    s.bearer("dot before", &format!(".{good}")).denies("jwt-form");

    let of_header = |header: &str| issuer.raw("RS256", header, r#"{"iss":"i"}"#);
    for header in [
        "xx",
        "[]",
        "\"x\"",
        "{}",
        "",
        r#"{"alg":1}"#,
        r#"{"alg":null}"#,
        r#"{"alg":["RS256"]}"#,
        r#"{"alg":"none"}"#,
        r#"{"alg":"None"}"#,
        r#"{"alg":""}"#,
        r#"{"alg":"rs256"}"#,
        r#"{"alg":"RS256","kid":1}"#,
        r#"{"alg":"RS256","kid":null}"#,
        r#"{"alg":"RS256","kid":{}}"#,
        r#"{"alg":"RS256","kid":"x"}"#,
        r#"{"alg":"RS256","kid":""}"#,
        r#"{"alg":"RS256","kid":"k"}"#,
        r#"{"alg":"RS256","alg":"RS256"}"#,
        r#"{"alg":"RS256","zip":"DEF"}"#,
        r#"{"alg":"RS256","typ":1}"#,
        r#"{"alg":"RS256","cty":"JWT"}"#,
        r#"{"alg":"RS256","jwk":{"kty":"oct"}}"#,
        r#"{"alg":"RS256","b64":true}"#,
        " \n{\"alg\":\"RS256\"} \n",
        r#"{"alg":"RS256"}x"#,
        "{\"alg\":\"RS256\"}\0",
        r#"{"alg":"RS256","x":"\ud800"}"#,
        r#"{"\u0061lg":"RS256"}"#,
        "\u{feff}{\"alg\":\"RS256\"}",
    ] {
        s.bearer(&format!("header {header:?}"), &of_header(header));
    }
    for header in [
        r#"{"alg":"RS256",}"#,
        r#"{'alg':'RS256'}"#,
        r#"{alg:"RS256"}"#,
        "{\"alg\":\"RS256\",\"x\":\"\u{1}\"}",
    ] {
        s.bearer(&format!("header {header:?}"), &of_header(header))
            .denies("jwt-json");
    }
    for header in [
        r#"{"alg":"RS256","crit":["x"]}"#,
        r#"{"alg":"RS256","b64":false,"crit":["b64"]}"#,
    ] {
        s.bearer(&format!("header {header:?}"), &of_header(header))
            .denies("jwt-crit");
    }
    s.bearer(
        "header that is no UTF-8",
        &issuer.raw("RS256", b"{\"alg\":\"RS256\",\"x\":\"\xff\"}", "{}"),
    );
    let two = |first: &str, second: &str| get("/", &[("authorization", first), ("authorization", second)]);
    s.request("header twice, good first", two(&format!("Bearer {good}"), "Bearer abc"));
    s.request("header twice, bad first", two("Bearer abc", &format!("Bearer {good}")));
    s.request("header twice, basic first", two("Basic abc", &format!("Bearer {good}")));
    let bad = [("authorization", "Bearer bad")];
    for target in [
        "/a//b/../c?x=1&y=2".to_string(),
        format!("/{}?x=1", "a".repeat(300)),
        "/?".into(),
        "/%41?%41".into(),
    ] {
        s.request(&format!("target {target}"), get(&target, &bad));
    }
    for proto in ["https", "http", "ftp", "HTTPS"] {
        s.headers(
            &format!("forwarded proto {proto}"),
            &[bad[0], ("x-forwarded-proto", proto)],
        );
    }
    s.headers("original path", &[bad[0], ("x-envoy-original-path", "/orig?x")]);
    for (name, headers) in [
        (
            "preflight",
            vec![("origin", "x"), ("access-control-request-method", "GET")],
        ),
        ("no origin", vec![("access-control-request-method", "GET")]),
        ("no method", vec![("origin", "x")]),
        (
            "empty origin",
            vec![("origin", ""), ("access-control-request-method", "GET")],
        ),
    ] {
        let mut request = get("/", &[&headers[..], &bad[..]].concat());
        request.method = "OPTIONS";
        s.request(&format!("OPTIONS {name}"), request);
    }
    s
}

/// Typed claims and the clock.
fn payloads(issuer: &Issuer) -> Scenario {
    let mut provider = provider("i", &[issuer.jwk("P-256", json!({}))]);
    provider.payload_header = Some("x-o-payload".into());
    let mut s = Scenario::new("payloads", vec![provider]);
    let now = now();
    let of = |payload: &str| issuer.raw("ES256", r#"{"alg":"ES256"}"#, payload);
    let claim = |name: &str, value: &str| format!(r#"{{"iss":"i","{name}":{value}}}"#);
    // Far enough from the skew that a slow machine does not matter.
    let times = [now - 30, now + 3600].map(|t| t.to_string());
    for name in ["exp", "nbf", "iat"] {
        let odd = [
            "-1",
            "1e30",
            "1e400",
            "\"5\"",
            "null",
            "true",
            "[]",
            "18446744073709551616",
            "9223372036854775808",
        ];
        for value in odd.into_iter().chain(times.iter().map(String::as_str)) {
            s.bearer(&format!("{name} {value}"), &of(&claim(name, value)));
        }
        s.bearer(
            &format!("{name} fraction"),
            &of(&claim(name, &format!("{}.7", now + 30))),
        );
    }
    s.bearer("exp long ago", &of(&claim("exp", "1000")));
    s.bearer("exp 2 minutes ago", &of(&claim("exp", &(now - 120).to_string())));
    s.bearer("nbf in 30 s", &of(&claim("nbf", &(now + 30).to_string())));
    s.bearer("exp 0", &of(&claim("exp", "0"))).denies("jwt-exp-zero");
    s.bearer("exp -0", &of(&claim("exp", "-0"))).denies("jwt-exp-zero");
    for name in ["iss", "sub", "jti"] {
        for value in ["1", "null", "[\"i\"]", "{}", "true"] {
            let payload = if name == "iss" {
                format!(r#"{{"iss":{value}}}"#)
            } else {
                claim(name, value)
            };
            s.bearer(&format!("{name} {value}"), &of(&payload));
        }
    }
    for payload in [
        "{}",
        "[]",
        "\"x\"",
        " ",
        "x",
        r#"{"iss":"j"}"#,
        r#"{"iss":"I"}"#,
        r#"{"iss":"i/"}"#,
        r#"{"iss":"i","iss":"i"}"#,
        r#"{"iss":"i","a":{"b":1,"b":2}}"#,
        r#"{"iss":"i","a":[{"b":1,"b":2}]}"#,
        r#"{"iss":"i","\u0069ss":"i"}"#,
        r#"{"iss":"i\u0000"}"#,
        r#"{"iss":"i","a":NaN}"#,
        r#"{"iss":"i","a":1e400}"#,
        r#"{"iss":"i","a":01}"#,
        r#"{"iss":"i","a":+1}"#,
        r#"{"iss":"i","a":.5}"#,
        r#"{"iss":"i","a":1.}"#,
        r#"{"iss":"i"/**/}"#,
        r#"{"iss":"i","a":"\x"}"#,
        r#"{"iss":"i","a":"\ud800"}"#,
        r#"{"iss":"i","a":"\ud83d\ude00"}"#,
        r#"{"iss":"i","":1}"#,
        r#"{"iss":"i","a":-0}"#,
        r#"{"iss":"i","a":123456789012345678901234567890}"#,
        r#"{"iss":"i","a":1E5}"#,
        r#"{"iss":"i","a":"\/"}"#,
    ] {
        s.bearer(&format!("payload {payload}"), &of(payload));
    }
    for payload in [
        "{\"iss\":\"i\",\"a\":\"\u{1}\"}",
        "{\"iss\":\"i\",\"a\":\"x\ny\"}",
        "{\"iss\":\"i\",}",
        "{'iss':'i'}",
    ] {
        s.bearer(&format!("payload {payload:?}"), &of(payload))
            .denies("jwt-json");
    }
    for depth in [10, 99, 100, 101, 500, 5000] {
        let lists = format!(r#"{{"iss":"i","a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        s.bearer(&format!("{depth} lists"), &of(&lists));
        let objects = format!(
            r#"{{"iss":"i","a":{}1{}}}"#,
            r#"{"a":"#.repeat(depth),
            "}".repeat(depth)
        );
        s.bearer(&format!("{depth} objects"), &of(&objects));
    }
    s.bearer("large", &of(&claim("a", &format!("\"{}\"", "x".repeat(20_000)))));
    s.bearer(
        "several faults",
        &issuer.raw("ES384", r#"{"alg":"ES256"}"#, r#"{"iss":"i","exp":1000}"#),
    );
    s.bearer("several faults, issuer first", &of(r#"{"iss":"j","exp":1000}"#));
    s
}

/// Key choice: every algorithm against a key set.
fn algorithms(issuer: &Issuer, name: &'static str, keys: Vec<Value>) -> Scenario {
    let mut s = Scenario::new(name, vec![provider("i", &keys)]);
    let claims = json!({"iss": "i", "sub": "s"});
    for alg in ALGORITHMS {
        s.bearer(alg, &issuer.token(alg, &claims));
        let kinds = [("RS", "RSA"), ("PS", "RSA"), ("HS", "oct"), ("Ed", "Ed25519")];
        let kid = match alg {
            "ES256" => "P-256",
            "ES384" => "P-384",
            "ES512" => "P-521",
            other => kinds.iter().find(|(p, _)| other.starts_with(p)).unwrap().1,
        };
        s.bearer(
            &format!("{alg} with kid"),
            &issuer.token_with(json!({"alg": alg, "kid": kid}), &claims),
        );
        s.bearer(
            &format!("{alg} with another kid"),
            &issuer.token_with(json!({"alg": alg, "kid": "x"}), &claims),
        );
        let good = issuer.token_with(json!({"alg": alg, "kid": kid}), &claims);
        let signed = good.rsplit_once('.').unwrap().0;
        for (what, bytes) in [("zeros", vec![0; 64]), ("short", vec![1; 20]), ("long", vec![1; 300])] {
            s.bearer(&format!("{alg}, {what}"), &format!("{signed}.{}", base64url(bytes)));
        }
    }
    for alg in ["none", "ES256K", "RSA1_5"] {
        s.bearer(alg, &issuer.token(alg, &claims));
    }
    // Signed by a good key, but under the name of an algorithm of another kind of key.
    let labelled = |label: &str, alg: &str| issuer.raw(alg, json!({"alg": label}).to_string(), claims.to_string());
    if name == "p256 only" {
        s.bearer("ES256 called RS256", &labelled("RS256", "ES256"))
            .denies("jwt-alg-key");
        s.bearer("ES256 called HS256", &labelled("HS256", "ES256"))
            .denies("jwt-alg-key");
    }
    if name == "rsa only" {
        s.bearer("RS256 called ES256", &labelled("ES256", "RS256"));
        s.bearer("PS256 called RS256", &labelled("RS256", "PS256"));
        s.bearer("RS384 called RS256", &labelled("RS256", "RS384"));
        let public = issuer.jwk("RSA", json!({})).to_string();
        let signed = format!("{}.{}", base64url(r#"{"alg":"HS256"}"#), base64url(claims.to_string()));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, public.as_bytes());
        let mac = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        s.bearer("HS256 with the public key", &format!("{signed}.{}", base64url(mac)));
    }
    s
}

fn audiences(issuer: &Issuer) -> Scenario {
    let mut provider = provider("i", &[issuer.jwk("Ed25519", json!({}))]);
    provider.audiences = vec!["a".into(), "https://x.com/".into()];
    let mut s = Scenario::new("audiences", vec![provider]);
    for aud in [
        json!("a"),
        json!(["b", "a"]),
        json!("c"),
        json!(""),
        json!([]),
        json!("https://a/"),
        json!("http://a"),
        json!("x.com"),
        json!("http://x.com/"),
        json!("a//"),
        json!(1),
        json!(["a", 1]),
        json!(null),
        json!({}),
        json!("A"),
        json!("https://a/b"),
        json!("HTTPS://a"),
        json!(["http://https://a"]),
    ] {
        s.bearer(
            &format!("aud {aud}"),
            &issuer.token("EdDSA", &json!({"iss": "i", "aud": aud})),
        );
    }
    s.bearer("no aud", &issuer.token("EdDSA", &json!({"iss": "i"})));
    s.bearer(
        "expired",
        &issuer.token("EdDSA", &json!({"iss": "i", "aud": "c", "exp": 1000})),
    );
    let forged = format!(
        "{}.{}",
        issuer
            .token("EdDSA", &json!({"iss": "i", "aud": "c"}))
            .rsplit_once('.')
            .unwrap()
            .0,
        base64url([0; 64])
    );
    s.bearer("bad signature", &forged);
    s
}

/// The default places.
fn places(issuer: &Issuer) -> Scenario {
    let mut s = Scenario::new(
        "default places",
        vec![provider("i", &[issuer.jwk("Ed25519", json!({}))])],
    );
    let good = issuer.token("EdDSA", &json!({"iss": "i", "sub": "s"}));
    let bearer = format!("Bearer {good}");
    let escaped: String = good.replace('.', "%2E").replace('e', "%65");
    for (name, target) in [
        ("parameter", format!("/p?access_token={good}")),
        ("parameter in escapes", format!("/p?access_token={escaped}")),
        ("name in escapes", format!("/p?access%5Ftoken={good}")),
        ("among others", format!("/p?a=1&access_token={good}&b=2")),
        ("upper case name", format!("/p?ACCESS_TOKEN={good}")),
        ("empty", "/p?access_token=".into()),
        ("no value", "/p?access_token".into()),
        ("twice, good first", format!("/p?access_token={good}&access_token=bad")),
        ("twice, bad first", format!("/p?access_token=bad&access_token={good}")),
        ("plus", format!("/p?access_token={good}+")),
        ("space behind", format!("/p?access_token={good}%20")),
        ("word behind", format!("/p?access_token={good}%20x")),
        ("semicolon", format!("/p?a=1;access_token={good}")),
        ("broken escape", format!("/p?access_token={good}%zz")),
    ] {
        s.target(name, target);
    }
    s.target("other parameters", format!("/p?x=%2F&y=a+b&access_token={good}&z"))
        .forwards_other("jwt-query-as-sent");
    s.target("injection", format!("/p?a=%26admin%3D1&access_token={good}"))
        .forwards_other("jwt-query-as-sent");
    let both = |token: &str| get(&format!("/p?access_token={token}"), &[("authorization", &bearer)]);
    s.request("header and parameter", both(&good));
    s.request("good header, bad parameter", both("abc"));
    s.request(
        "good header, expired parameter",
        both(&issuer.token("EdDSA", &json!({"iss": "i", "exp": 1000}))),
    );
    s.headers("cookie is no place", &[("cookie", &format!("access_token={good}"))]);
    s
}

/// Places of a rule's own.
fn own_places(issuer: &Issuer) -> Scenario {
    let mut provider = provider("i", &[issuer.jwk("Ed25519", json!({}))]);
    provider.from_headers = vec![
        ("x-jwt".into(), String::new()),
        ("authorization".into(), "Token ".into()),
    ];
    provider.from_params = vec!["tok".into(), "t2".into()];
    provider.from_cookies = vec!["c1".into(), "c2".into()];
    provider.claim_headers = vec![("x-o-sub".into(), "sub".into())];
    let mut s = Scenario::new("own places", vec![provider]);
    let of = |sub: &str| issuer.token("EdDSA", &json!({"iss": "i", "sub": sub}));
    let good = of("s");
    let late = issuer.token("EdDSA", &json!({"iss": "i", "exp": 1000}));
    s.bearer("default header is off", &good);
    s.target("default parameter is off", format!("/?access_token={good}"));
    for (name, value) in [
        ("plain", good.clone()),
        ("with Bearer", format!("Bearer {good}")),
        ("empty", String::new()),
        ("word behind", format!("{good} x")),
        ("list", format!("{good},{good}")),
    ] {
        s.headers(&format!("x-jwt {name}"), &[("X-Jwt", &value)]);
    }
    s.headers("x-jwt twice", &[("x-jwt", &good), ("x-jwt", &of("t"))]);
    s.headers("x-jwt good, bad", &[("x-jwt", &good), ("x-jwt", "bad")]);
    s.headers("x-jwt bad, good", &[("x-jwt", "bad"), ("x-jwt", &good)]);
    s.headers("x-jwt empty, good", &[("x-jwt", ""), ("x-jwt", &good)]);
    s.headers("Token", &[("authorization", &format!("Token {good}"))]);
    s.headers("token", &[("authorization", &format!("token {good}"))]);
    for (name, value) in [
        ("first", format!("c1={good}")),
        ("second", format!("x=1; c2={good}; y=2")),
        ("quoted", format!("c1=\"{good}\"")),
        ("half quoted", format!("c1=\"{good}")),
        ("twice", format!("c1={good}; c1=bad")),
        ("twice, bad first", format!("c1=bad; c1={good}")),
        ("no space", format!("x=1;c1={good}")),
        ("space before equals", format!("c1 ={good}")),
        ("empty", "c1=".into()),
        ("upper case", format!("C1={good}")),
        ("longer name", format!("xc1={good}")),
        ("no value", format!("c1; c2={good}")),
        ("tab", format!("a=1;\tc1={good}")),
        ("spaces", format!("a=1;   c1={good} ; b=2")),
        ("comma", format!("a=1,c1={good}")),
        ("bad", "c2=x".into()),
    ] {
        s.headers(&format!("cookie {name}"), &[("cookie", &value)]);
    }
    s.headers(
        "cookie headers",
        &[("cookie", "a=1"), ("cookie", &format!("c1={good}"))],
    );
    let all = [
        ("x-jwt", of("h")),
        ("authorization", format!("Token {}", of("a"))),
        ("cookie", format!("c1={}; c2={}", of("c1"), of("c2"))),
    ];
    let all: Vec<(&str, &str)> = all.iter().map(|(n, v)| (*n, v.as_str())).collect();
    s.request(
        "everywhere",
        get(&format!("/p?tok={}&t2={}", of("tok"), of("t2")), &all),
    );
    let both = |header: &str, parameter: &str| get(&format!("/?tok={parameter}"), &[("x-jwt", header)]);
    s.request("bad header, late parameter", both("bad", &late));
    s.request("late header, bad parameter", both(&late, "bad"));
    s.request("bad parameters", get(&format!("/?tok=bad&t2={late}"), &[]));
    s.headers("bad cookies", &[("cookie", &format!("c1=bad; c2={late}"))]);
    s.request(
        "bad cookie, late parameter",
        get(&format!("/?tok={late}"), &[("cookie", "c1=bad")]),
    );
    s
}

/// What the application is told.
fn outputs(issuer: &Issuer) -> Scenario {
    let mut provider = provider("i", &[issuer.jwk("Ed25519", json!({}))]);
    provider.forward = true;
    provider.payload_header = Some("x-o-payload".into());
    provider.claim_headers = [
        "sub", "n", "f", "b", "l", "o.p", "o.l", "o", "a.b", "e", "scope", "neg", "big", "nul", "no.such", "l.0",
    ]
    .map(|c| (format!("x-o-{}", c.replace('.', "-")), c.to_string()))
    .into();
    let mut s = Scenario::new("outputs", vec![provider]);
    for claims in [
        json!({"iss": "i", "sub": "me", "n": 5, "f": 1.5, "b": true, "l": ["a", 1], "o": {"p": "q"}}),
        json!({"iss": "i", "a.b": "dot", "a": {"b": "nest"}, "e": "", "scope": "a b", "neg": -3, "big": 1e21, "nul": null}),
        json!({"iss": "i", "a.b": "dot", "n": 0, "f": 0.1, "b": false, "l": [], "o": {"l": [1, "x", true, null]}, "e": "é"}),
        json!({"iss": "i", "n": 1e15, "f": 123456.789012345, "big": 1e19, "neg": -0.5, "l": [[]], "sub": "a, b; c=\"d\""}),
        json!({"iss": "i", "n": 9007199254740993u64, "f": 1e16, "big": 18446744073709551615u64, "sub": "tab\there"}),
    ] {
        s.bearer(&claims.to_string(), &issuer.token("EdDSA", &claims));
    }
    for sub in ["a\r\nx-admin: 1", "a\u{0}b", "a\u{1}b"] {
        s.bearer(
            &format!("control {sub:?}"),
            &issuer.token("EdDSA", &json!({"iss": "i", "sub": sub})),
        );
    }
    let forged = [("x-o-payload", "forged"), ("X-O-Sub", "forged"), ("x-o-n", "1")];
    s.headers("forged without a token", &forged);
    let token = format!("Bearer {}", issuer.token("EdDSA", &json!({"iss": "i"})));
    let with = [&forged[..], &[("authorization", token.as_str())][..]].concat();
    s.headers("forged with a token", &with);
    let mut preflight = get(
        "/",
        &[
            &forged[..],
            &[("origin", "x"), ("access-control-request-method", "GET")][..],
        ]
        .concat(),
    );
    preflight.method = "OPTIONS";
    s.request("forged in a preflight", preflight);
    s.target(
        "the parameter goes on",
        format!("/p?z=%2f&access_token={}", issuer.token("EdDSA", &json!({"iss": "i"}))),
    );
    s
}

fn two_issuers(issuer: &Issuer) -> Scenario {
    let keys = [issuer.jwk("Ed25519", json!({}))];
    let mut s = Scenario::new("two issuers", vec![provider("a", &keys), provider("b", &keys)]);
    let of = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss}));
    let late = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss, "exp": 1000}));
    for iss in ["a", "b", "c"] {
        s.bearer(iss, &of(iss));
        s.bearer(&format!("{iss} late"), &late(iss));
        s.target(&format!("{iss} in parameter"), format!("/p?access_token={}", of(iss)));
    }
    s.bearer("malformed", "abc");
    let both = |header: &str, parameter: &str| {
        get(
            &format!("/?access_token={parameter}"),
            &[("authorization", &format!("Bearer {header}"))],
        )
    };
    s.request("a and b", both(&of("a"), &of("b")));
    // The header goes with its good token, and nobody looks at the other one.
    let mut shared = get("/", &[]);
    shared.headers = vec![("authorization".into(), format!("Bearer {}", of("a")))];
    s.request("b late twice", both(&late("b"), &late("b")));
    s.request("header alone", shared);
    s.request("a and a", both(&of("a"), &of("a")));
    s.request("a and c", both(&of("a"), &of("c")));
    s.request("b late and a", both(&late("b"), &of("a")));
    s
}

fn two_places(issuer: &Issuer) -> Scenario {
    let keys = [issuer.jwk("Ed25519", json!({}))];
    let of_place = |iss: &str| {
        let mut provider = provider(iss, &keys);
        provider.from_headers = vec![(format!("x-{iss}"), String::new())];
        provider.payload_header = Some(format!("x-o-{iss}"));
        provider
    };
    let mut s = Scenario::new("two places", vec![of_place("a"), of_place("b")]);
    let of = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss}));
    let late = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss, "exp": 1000}));
    let early = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss, "nbf": now() + 5000}));
    s.headers("a", &[("x-a", &of("a"))]);
    s.headers("b", &[("x-b", &of("b"))]);
    s.headers("a and b", &[("x-a", &of("a")), ("x-b", &of("b"))]);
    s.headers("a in b's place", &[("x-b", &of("a"))]);
    s.headers("b in a's place", &[("x-a", &of("b"))]);
    s.headers("late, early", &[("x-a", &late("a")), ("x-b", &early("b"))]);
    s.headers("early, late", &[("x-a", &early("a")), ("x-b", &late("b"))]);
    s.headers("unknown, late", &[("x-a", &of("b")), ("x-b", &late("b"))]);
    s.headers("late, unknown", &[("x-a", &late("a")), ("x-b", &of("a"))]);
    s.headers("late and missing", &[("x-b", &late("b"))]);
    s.headers("forged", &[("x-a", &of("a")), ("x-o-b", "forged"), ("x-o-a", "forged")]);
    s.headers("good, late", &[("x-a", &of("a")), ("x-b", &late("b"))])
        .denies("jwt-good-and-bad");
    s.headers("late, good", &[("x-a", &late("a")), ("x-b", &of("b"))])
        .denies("jwt-good-and-bad");
    s.headers("good, malformed", &[("x-a", &of("a")), ("x-b", "x")])
        .denies("jwt-good-and-bad");
    s
}

fn same_issuer(issuer: &Issuer) -> Scenario {
    let of = |aud: &str, key: &str| {
        let mut provider = provider("a", &[issuer.jwk(key, json!({}))]);
        provider.audiences = vec![aud.into()];
        provider
    };
    let mut s = Scenario::new("one issuer, two rules", vec![of("x", "P-256"), of("y", "RSA")]);
    for alg in ["ES256", "RS256"] {
        for aud in ["x", "y", "z"] {
            s.bearer(
                &format!("{alg} {aud}"),
                &issuer.token(alg, &json!({"iss": "a", "aud": aud})),
            );
        }
        s.bearer(
            &format!("{alg} late"),
            &issuer.token(alg, &json!({"iss": "a", "aud": "y", "exp": 1000})),
        );
    }
    s
}

fn any_issuer(issuer: &Issuer) -> Scenario {
    let keys = [issuer.jwk("Ed25519", json!({}))];
    let mut s = Scenario::new("any issuer", vec![provider("", &keys)]);
    for claims in [json!({"iss": "zz"}), json!({}), json!({"iss": ""}), json!({"iss": 1})] {
        s.bearer(&claims.to_string(), &issuer.token("EdDSA", &claims));
    }
    s.bearer("another key", &issuer.token("ES256", &json!({})));
    s
}

/// Two providers that look at every value of one header.
fn shared_list(issuer: &Issuer) -> Scenario {
    let keys = [issuer.jwk("Ed25519", json!({}))];
    let of_list = |iss: &str| {
        let mut provider = provider(iss, &keys);
        provider.from_headers = vec![("x-jwt".into(), String::new())];
        provider
    };
    let mut s = Scenario::new("shared list", vec![of_list("a"), of_list("b")]);
    let of = |iss: &str| issuer.token("EdDSA", &json!({"iss": iss}));
    s.headers("a", &[("x-jwt", &of("a"))]);
    s.headers("c", &[("x-jwt", &of("c"))]);
    s.headers("good, bad", &[("x-jwt", &of("a")), ("x-jwt", "bad")]);
    s.headers("bad, good", &[("x-jwt", "bad"), ("x-jwt", &of("a"))])
        .denies("jwt-good-and-bad");
    s.headers("bad, good of b", &[("x-jwt", "bad"), ("x-jwt", &of("b"))])
        .denies("jwt-good-and-bad");
    s
}
