//! Values of single fields; whole policies are in `tests/authz_decisions.rs` and `tests/golden`.

use mantlet_model::authz::{Attribute, Expr, Matcher};

use super::values::Values;

fn values() -> Values<'static> {
    Values {
        trust_domains: vec!["cluster.local"],
        namespace: "own",
    }
}

fn matchers(expr: &Expr) -> Vec<Matcher> {
    match expr {
        Expr::Atom(atom) => vec![atom.matcher.clone()],
        Expr::And(children) | Expr::Or(children) => children.iter().flat_map(matchers).collect(),
        Expr::Not(inner) => matchers(inner),
    }
}

#[test]
fn request_principals_split_at_the_last_slash() {
    use Matcher::{Exact, Prefix, Present, Suffix};
    let text = |t: &str| t.to_string();
    for (value, issuer, subject) in [
        ("*", Present, Present),
        ("iss/sub", Exact(text("iss")), Exact(text("sub"))),
        ("https://a/b/sub", Exact(text("https://a/b")), Exact(text("sub"))),
        ("*/sub", Present, Exact(text("sub"))),
        ("*suf/sub", Suffix(text("suf")), Exact(text("sub"))),
        ("*suf", Present, Suffix(text("suf"))),
        ("iss/*", Exact(text("iss")), Present),
        ("iss/pre*", Exact(text("iss")), Prefix(text("pre"))),
        ("pre*", Prefix(text("pre")), Present),
        ("plain", Exact(text("plain")), Exact(text(""))),
        ("*/pre*", Present, Exact(text("pre*"))),
    ] {
        assert_eq!(
            matchers(&values().request_principal(value).unwrap()),
            [issuer, subject],
            "{value}"
        );
    }
}

#[test]
fn strings() {
    let one = |value: &str| matchers(&values().text(Attribute::Method, value)).remove(0);
    assert_eq!(one("*"), Matcher::Present);
    assert_eq!(one("*a*"), Matcher::Suffix("a*".into()), "S2.41");
    assert_eq!(one("a*"), Matcher::Prefix("a".into()));
    assert_eq!(one("a*b"), Matcher::Exact("a*b".into()));
}

#[test]
fn a_scheme_in_a_principal_never_matches() {
    let expr = values().principal("spiffe://cluster.local/ns/a/sa/b").unwrap();
    assert_eq!(
        matchers(&expr),
        [Matcher::Exact("spiffe://spiffe://cluster.local/ns/a/sa/b".into())],
        "S2.44"
    );
}

#[test]
fn bad_values() {
    let v = values();
    for bad in ["", "10.0.0.0/33", "ten", "1.2.3", "::1/129"] {
        assert!(v.cidr(Attribute::SourceIp, bad).is_err(), "{bad}");
    }
    for bad in ["", "http", "65536", "-1"] {
        assert!(v.port(bad).is_err(), "{bad}");
    }
    for bad in ["", "/", "a/", "/b", "a/b/c", "*", "a/*"] {
        assert!(v.service_account(bad).is_err(), "{bad}");
    }
    for bad in ["/a/{*}/*", "/{**}/a/{**}", "/{a}/{*}"] {
        assert!(v.path(bad).is_err(), "{bad}");
    }
    for bad in [
        "request.headers",
        "request.headers[]",
        "request.headers[a b]",
        "request.auth.claims",
        "source",
        "a[b]",
    ] {
        assert!(v.condition(bad).is_err(), "{bad}");
    }
}

#[test]
fn claim_names() {
    let v = values();
    let path = |key: &str| match v.condition(key).unwrap()("x").unwrap() {
        Expr::Atom(atom) => match atom.attribute {
            Attribute::Claim(path) => path,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    assert_eq!(path("request.auth.claims[a.b]"), ["a.b"], "S2.71");
    assert_eq!(path("request.auth.claims[a][b][c]"), ["a", "b", "c"]);
    assert_eq!(path("request.auth.claims[a[b]"), ["a[b"]);
    assert_eq!(path("request.auth.audiences"), ["aud"]);
}
