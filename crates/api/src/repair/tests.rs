//! Repairs: the policies of a web article that lost its indentation, single slips, what must be refused, and properties.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Repair, document, read};
use crate::yaml;

fn fixed(text: &str) -> Repair {
    let repair = document(text);
    let again = document(&repair.text);
    assert_eq!(again.text, repair.text, "a second repair changes something");
    assert!(again.changes.is_empty(), "{again:?}");
    repair
}

#[track_caller]
fn becomes(text: &str, expected: &str) {
    let repair = fixed(text);
    assert_eq!(repair.text, expected, "{repair:?}");
    let errors = read(expected).expect("YAML").errors;
    assert!(errors.is_empty(), "{errors:?}");
}

#[track_caller]
fn untouched(text: &str) -> Repair {
    let repair = fixed(text);
    assert_eq!(repair.text, text);
    assert!(repair.changes.is_empty(), "{repair:?}");
    repair
}

#[test]
fn lost_indentation() {
    becomes(
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata:\nname: \"example-peer-policy_strict\"\nnamespace: example_1\nspec:\nselector:\nmatchLabels:\napp: reviews\nmtls:\nmode: STRICT\n",
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata:\n  name: \"example-peer-policy-strict\"\n  namespace: example-1\nspec:\n  selector:\n    matchLabels:\n      app: reviews\n  mtls:\n    mode: STRICT\n",
    );
    becomes(
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\nname: \"allow_call\"\nnamespace: example_2\nspec:\nselector:\nmatchLabels:\napp: webapp\naction: ALLOW\nrules:\n- to:\n- operation:\npath: [\"/api/catalog*\"]\n",
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\n  name: \"allow-call\"\n  namespace: example-2\nspec:\n  selector:\n    matchLabels:\n      app: webapp\n  action: ALLOW\n  rules:\n    - to:\n        - operation:\n            paths: [\"/api/catalog*\"]\n",
    );
    becomes(
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\nname: \"deny_all\"\nspec:\naction: DENY\nrules: {}\n",
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\n  name: \"deny-all\"\nspec:\n  action: DENY\n  rules: [{}]\n",
    );
    becomes(
        "apiVersion: security.istio.io/v1beta1\nkind: RequestAuthentication\nmetadata:\nname: \"example_jwt\"\nnamespace: example_2\nspec:\nselector:\nmatchLabels:\nistio: ingressgateway\nJwtrules:\n-issuer: ”test@istio.io”\njwkUri: ”https://example.com/jwks.json”\n",
        "apiVersion: security.istio.io/v1beta1\nkind: RequestAuthentication\nmetadata:\n  name: \"example-jwt\"\n  namespace: example-2\nspec:\n  selector:\n    matchLabels:\n      istio: ingressgateway\n  jwtRules:\n    - issuer: \"test@istio.io\"\n      jwksUri: \"https://example.com/jwks.json\"\n",
    );
}

const HEAD: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: a\nspec:\n";

#[test]
fn single_slips() {
    let slip = |from: &str, to: &str| becomes(&format!("{HEAD}{from}"), &format!("{HEAD}{to}"));
    slip(
        "  acton: DENY # why\n  rules:\n  - {}\n",
        "  action: DENY # why\n  rules:\n  - {}\n",
    );
    slip("  action: Deny\n  rules: [{}]\n", "  action: DENY\n  rules: [{}]\n");
    slip(
        "  action: \"deny\"\n  rules: [{}]\n",
        "  action: \"DENY\"\n  rules: [{}]\n",
    );
    slip(
        "  rules:\n  - to:\n    - operation:\n        port: [8080, 9090]\n        methods: GET\n",
        "  rules:\n  - to:\n    - operation:\n        ports: [\"8080\", \"9090\"]\n        methods: [GET]\n",
    );
    slip(
        "  rules:\n    from:\n      source:\n        principals: [\"a\"]\n    # kept\n    to:\n      operation: {methods: [GET]}\n",
        "  rules:\n    - from:\n        - source:\n            principals: [\"a\"]\n      # kept\n      to:\n        - operation: {methods: [GET]}\n",
    );
    slip(
        "  selector:\n\tmatchLabels: {app: a}\n",
        "  selector:\n    matchLabels: {app: a}\n",
    );
    slip(
        "  selector:\n    matchLabels:\n      version: 1.10\n      on: true\n",
        "  selector:\n    matchLabels:\n      version: \"1.10\"\n      on: \"true\"\n",
    );
    slip(
        "  action: CUSTOM\n  provider:\n    name: “a: b” # kept\n  rules: [{}]\n",
        "  action: CUSTOM\n  provider:\n    name: \"a: b\" # kept\n  rules: [{}]\n",
    );
}

#[test]
fn frames() {
    becomes(
        "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata:\n  name: A_b\n  lables: {a: b}\nspec: {}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: a-b\n  labels: {a: b}\nspec: {}\n",
    );
    becomes(
        "apiVersion: networking.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: a\nspecs: {}\n",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: a\nspec: {}\n",
    );
    becomes(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: example_1\n",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: example-1\n",
    );
}

#[test]
fn refusals() {
    // ALLOW: {} could be meant as nothing or as everything.
    untouched(&format!("{HEAD}  action: ALLOW\n  rules: {{}}\n"));
    // Both names are there.
    untouched(&format!(
        "{HEAD}  rules:\n  - to:\n    - operation:\n        path: [/a]\n        paths: [/b]\n"
    ));
    // A wildcard in the middle is legal; what was meant is not known.
    untouched(&format!(
        "{HEAD}  rules:\n  - to:\n    - operation:\n        paths: [\"*/api/catalog*\"]\n"
    ));
    // trafficPolicy is a field of the rule and of a subset.
    let several = untouched(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata:\nname: a\nspec:\nhost: a\nsubsets:\n- name: v1\nlabels:\nversion: v1\ntrafficPolicy:\ntls:\nmode: ISTIO_MUTUAL\n",
    );
    assert_eq!(
        several.refused,
        ["the indentation can be restored in more than one way"]
    );
    let block = untouched(&format!("{HEAD}  x: |\n  y\n"));
    assert!(block.refused[0].contains("line 6: texts of several lines"), "{block:?}");
    untouched("not: an object\n");
    untouched("a: [\n");
    untouched("\u{feff}");
    untouched(
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  metadata: {name: A}\n",
    );
    assert!(document(&format!("{HEAD}  x: {}\n", "a".repeat(super::MAX_BYTES))).refused[0].contains("is not repaired"));
}

#[test]
fn comments_and_order_stay() {
    becomes(
        "# head\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n# who\nmetadata:\nname: a # here\n\nspec:\n# how\nmtls:\nmode: STRICT\n# end",
        "# head\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n# who\nmetadata:\n  name: a # here\n\nspec:\n  # how\n  mtls:\n    mode: STRICT\n# end",
    );
}

#[test]
fn large_texts_are_bounded() {
    let many = |lines: usize| {
        let rules = "- to:\n- operation:\nmethods: [GET]\n".repeat(lines / 3);
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\nname: a\nspec:\nrules:\n{rules}"
        )
    };
    // Test threads have small stacks; the search must not need a deep one.
    let repair = document(&many(500));
    assert_eq!(read(&repair.text).expect("YAML").errors.len(), 0, "{repair:?}");
    assert!(document(&many(1_900)).refused.len() <= 1);
    assert!(document(&many(30_000)).refused[0].contains("lines are not repaired"));
    // Labels that could be anything: each line has one reading, and none of them is tried twice.
    let labels: String = (0..300).map(|i| format!("l{i}: x\n")).collect();
    let flat = format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: a\nlabels:\n{labels}spec:\nmtls:\nmode: STRICT\n"
    );
    assert!(document(&flat).changes.len() == 1);
    for hostile in ["[".repeat(100_000), "{a: ".repeat(50_000), "- ".repeat(50_000), "a:\n".repeat(50_000), format!("{}: b\nc: d\n", "k".repeat(500_000)),
        "a: &x [1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y]\nd: &w [*z,*z,*z,*z,*z,*z,*z,*z]\ne: [*w,*w,*w,*w,*w,*w,*w,*w]\n".into()] {
        assert_eq!(document(&hostile).text, hostile);
    }
}

/// Policies to flatten.
fn policy() -> impl Strategy<Value = Value> {
    let word = "[a-z][a-z0-9]{0,5}";
    let list = move || prop::collection::vec(word, 1..3);
    let source = (list(), list()).prop_map(|(p, n)| json!({"source": {"principals": p, "notNamespaces": n}}));
    let operation = (list(), list()).prop_map(|(m, h)| json!({"operation": {"methods": m, "hosts": h}}));
    let when = (list(),).prop_map(|(v,)| json!({"key": "source.namespace", "values": v}));
    let rule = (
        prop::collection::vec(source, 1..3),
        prop::collection::vec(operation, 1..3),
        prop::collection::vec(when, 1..3),
        any::<[bool; 3]>(),
    )
        .prop_map(|(from, to, when, keep)| {
            let mut rule = json!({"from": from});
            if keep[0] {
                rule["to"] = to.into();
            }
            if keep[1] {
                rule["when"] = when.into();
            }
            rule
        });
    (
        word,
        prop::collection::btree_map(word, word, 1..3),
        prop::collection::vec(rule, 1..3),
        prop::sample::select(vec!["ALLOW", "DENY", "AUDIT"]),
    )
        .prop_map(|(name, labels, rules, action)| {
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": name},
                "spec": {"selector": {"matchLabels": labels}, "action": action, "rules": rules},
            })
        })
}

proptest! {
    /// Whatever lost its indentation comes back as it was, or is left alone.
    #[test]
    fn flattened_policies_come_back(value in policy()) {
        let text = yaml::write(&value);
        prop_assert_eq!(&fixed(&text).text, &text, "a valid text is changed");
        let flat: String = text.lines().map(|line| format!("{}\n", line.trim_start())).collect();
        let repair = document(&flat);
        if repair.changes.is_empty() {
            prop_assert_eq!(&repair.refused, &["the indentation can be restored in more than one way".to_string()]);
        } else {
            prop_assert_eq!(yaml::read_one(&repair.text).unwrap(), value, "{}", repair.text);
        }
    }

    /// No text makes repair panic or loop, whatever is done to it, and a second repair changes nothing.
    #[test]
    fn mutated_texts(
        value in policy(),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, "[-a-z:{}\\[\\]\"' \t\n#&*!|>%@`”\u{a0}\u{feff}]{0,6}"), 0..6),
    ) {
        let mut text: Vec<char> = yaml::write(&value).chars().collect();
        for (at, len, with) in cuts {
            if text.is_empty() {
                break;
            }
            let at = at.index(text.len());
            let end = (at + len).min(text.len());
            text.splice(at..end, with.chars());
        }
        let text: String = text.into_iter().collect();
        let start = std::time::Instant::now();
        let valid = read(&text).is_some_and(|reading| reading.errors.is_empty());
        let repair = document(&text);
        if valid {
            prop_assert_eq!(&repair.text, &text);
        }
        prop_assert_eq!(&document(&repair.text).text, &repair.text);
        prop_assert!(start.elapsed() < std::time::Duration::from_secs(60));
    }
}
