//! `validate` and `validate --fix` over files: frame, places, exit codes, what is written and what is not.

use std::path::{Path, PathBuf};

use clap::Parser;
use proptest::prelude::*;

use super::{Answer, Args, findings, fix, run};
use crate::files;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn validate(words: &[&str]) -> Answer {
    let command = Command::try_parse_from([&["validate"], words].concat()).expect("arguments");
    run(&command.args).expect("an answer")
}

/// A directory with files.
fn files_of(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn at(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

const GOOD: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: a\nspec:\n  mtls:\n    mode: STRICT\n";
const BAD: &str = "# two objects\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: a\nspec:\n  rules:\n  - to:\n    - operation:\n        path: [\"/a\"]\n";

#[test]
fn frame_and_places() {
    let dir = files_of(&[("good.yaml", GOOD), ("bad.yaml", BAD)]);
    let good = at(&dir, "good.yaml");
    let answer = validate(&["-f", &good]);
    assert_eq!(answer.text, format!("{good:?} is valid\n"));
    assert_eq!((answer.error.as_str(), answer.code), ("", 0));

    let bad = at(&dir, "bad.yaml");
    let answer = validate(&[&bad, "-f", &good]);
    assert_eq!(answer.code, 1);
    assert_eq!(answer.text, format!("{good:?} is valid\n"));
    let expected = format!(
        "Error: 1 error occurred:\n\t* {bad}:15:9: spec.rules[0].to[0].operation.path: unknown field \"path\" (allowed: hosts, notHosts, ports, notPorts, methods, notMethods, paths, notPaths; did you mean \"paths\"?)\n"
    );
    assert!(answer.error.starts_with(&expected), "{}", answer.error);
    assert!(
        answer.error.ends_with("mantlet validate --fix -f FILE\n"),
        "{}",
        answer.error
    );
}

#[test]
fn warnings_do_not_fail() {
    let text = BAD.replace("path: [\"/a\"]", "paths: [\"*/a*\"]");
    let dir = files_of(&[("warn.yaml", &text)]);
    let answer = validate(&["-f", &at(&dir, "warn.yaml")]);
    assert_eq!((answer.code, answer.error.as_str()), (0, ""));
    assert!(
        answer
            .text
            .starts_with(&format!("{:?} has warnings:\n\t* ", at(&dir, "warn.yaml"))),
        "{}",
        answer.text
    );
    assert!(
        answer
            .text
            .contains("warn.yaml:15:17: spec.rules[0].to[0].operation.paths[0]: \"*/a*\" matches only"),
        "{}",
        answer.text
    );
}

#[test]
fn several_errors_and_unreadable_documents() {
    let text = format!("{GOOD}---\na: [\n---\n{}", BAD.replace("name: p", "name: P_1"));
    let dir = files_of(&[("many.yaml", &text)]);
    let answer = validate(&["-f", &at(&dir, "many.yaml")]);
    assert!(
        answer.error.starts_with("Error: 3 errors occurred:\n"),
        "{}",
        answer.error
    );
    assert!(
        answer.error.contains("many.yaml:19:9: metadata.name: \"P_1\""),
        "{}",
        answer.error
    );
    assert!(answer.error.contains("invalid YAML: "), "{}", answer.error);
    let tab = files_of(&[("tab.yaml", "a:\n\tb: 1\n")]);
    let answer = validate(&["-f", &at(&tab, "tab.yaml")]);
    assert!(answer.error.contains("tab.yaml:2:"), "{}", answer.error);
    assert!(
        answer.error.contains("YAML does not allow tabs in indentation"),
        "{}",
        answer.error
    );
    let star = files_of(&[("star.yaml", "paths:\n- *foo*\n")]);
    let answer = validate(&["-f", &at(&star, "star.yaml")]);
    assert_eq!(answer.code, 1);
}

#[test]
fn lost_indentation_shows_the_layout() {
    let article = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../labs/001-first-steps/article/jwt.yaml");
    let text = std::fs::read_to_string(article).unwrap();
    let dir = files_of(&[("jwt.yaml", &format!("# mine\n---\n{text}"))]);
    let file = at(&dir, "jwt.yaml");
    let answer = validate(&["-f", &file]);
    let lines: Vec<&str> = answer.error.lines().collect();
    let expected = [
        "Error: 7 errors occurred:".to_string(),
        format!("\t* {file}:6:1: the indentation is lost; by their names the lines belong together like this:"),
        "\t\t| apiVersion: security.istio.io/v1beta1".into(),
        "\t\t| kind: RequestAuthentication".into(),
        "\t\t| metadata:".into(),
        "\t\t|   name: \"example_jwt\"".into(),
    ];
    assert_eq!(lines[..6], expected, "{}", answer.error);
    for part in [
        format!("{file}:6:7: metadata.name: \"example_jwt\" is no name that Kubernetes takes"),
        format!("{file}:7:12: metadata.namespace: \"example_2\" is no name"),
        format!(
            "{file}:12:1: spec.Jwtrules: unknown field \"Jwtrules\" (allowed: selector, targetRef, targetRefs, jwtRules; did you mean \"jwtRules\"?)"
        ),
        format!(
            "{file}:13:10: spec.Jwtrules[0].issuer: the typographic quotes are part of the value \"”test@istio.io”\" (did you mean \"test@istio.io\"?)"
        ),
        format!("{file}:14:1: spec.Jwtrules[0].jwkUri: unknown field \"jwkUri\""),
    ] {
        assert!(answer.error.contains(&part), "no {part} in {}", answer.error);
    }
}

#[test]
fn json_for_programs() {
    let dir = files_of(&[("bad.yaml", BAD)]);
    let answer = validate(&["-f", &at(&dir, "bad.yaml"), "-o", "json"]);
    assert_eq!((answer.code, answer.error.as_str()), (1, ""));
    let list: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(list[0]["line"], 15);
    assert_eq!(list[0]["column"], 9);
    assert_eq!(list[0]["object"], "AuthorizationPolicy/a/p");
    assert_eq!(list[0]["code"], "MNT0001");
    assert_eq!(list[0]["fix"], "RenameKey");
    assert_eq!(list[0]["hint"]["DidYouMean"], "paths");
}

#[test]
fn nothing_to_read() {
    let command = Command::try_parse_from(["validate"]).unwrap();
    let error = run(&command.args).unwrap_err().to_string();
    assert_eq!(error, "filename is required (see --filename)");
    let command = Command::try_parse_from(["validate", "-f", "/does/not/exist.yaml"]).unwrap();
    assert!(run(&command.args).is_err());
}

#[test]
fn fix_writes_once() {
    let dir = files_of(&[("bad.yaml", BAD), ("good.yaml", GOOD)]);
    let bad = at(&dir, "bad.yaml");
    let read = || std::fs::read_to_string(&bad).unwrap();
    let before = std::fs::metadata(dir.path().join("good.yaml"))
        .unwrap()
        .modified()
        .unwrap();
    let answer = validate(&["-f", &bad, "--fix", "--dry-run"]);
    assert_eq!(read(), BAD);
    assert!(
        answer
            .text
            .contains("-        path: [\"/a\"]\n+        paths: [\"/a\"]\n"),
        "{}",
        answer.text
    );
    let answer = validate(&["--fix", "-f", &dir.path().display().to_string()]);
    assert_eq!(read(), BAD.replace("path:", "paths:"));
    assert_eq!(answer.code, 0, "{answer:?}");
    assert!(
        answer
            .error
            .contains("bad.yaml:5: repaired: \"path\" becomes \"paths\""),
        "{}",
        answer.error
    );
    assert!(
        answer
            .text
            .ends_with(&format!("{bad:?} is valid\n{:?} is valid\n", at(&dir, "good.yaml"))),
        "{}",
        answer.text
    );
    let again = validate(&["--fix", "-f", &bad]);
    assert_eq!(
        (again.text, again.error),
        (format!("{bad:?} is valid\n"), String::new())
    );
    assert_eq!(
        std::fs::metadata(dir.path().join("good.yaml"))
            .unwrap()
            .modified()
            .unwrap(),
        before
    );
}

#[test]
fn fix_refuses_a_name_that_is_taken() {
    let policy = |name: &str| GOOD.replace("name: a", &format!("name: {name}"));
    let dir = files_of(&[("a.yaml", &policy("a_b")), ("b.yaml", &policy("a-b"))]);
    let answer = validate(&["--fix", "-f", &dir.path().display().to_string()]);
    assert_eq!(
        std::fs::read_to_string(dir.path().join("a.yaml")).unwrap(),
        policy("a_b")
    );
    assert!(
        answer
            .error
            .contains("another object is called PeerAuthentication /a-b"),
        "{}",
        answer.error
    );
    assert_eq!(answer.code, 1);
}

/// The article's policies, as `labs/001-first-steps` has them.
#[test]
fn the_article_of_the_first_lab() {
    let article = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../labs/001-first-steps/article");
    let sources = files::texts(&[article]).unwrap();
    assert_eq!(sources.len(), 5);
    for (file, text) in &sources {
        let found = findings(&files::split(file, text));
        assert!(
            found
                .iter()
                .any(|f| f.finding.severity == mantlet_api::diagnostic::Severity::Error),
            "{}",
            file.display()
        );
    }
    for fixed in fix::fix(sources) {
        let left = findings(&files::split(&fixed.file, &fixed.text));
        let texts: Vec<String> = left.iter().map(super::Located::line).collect();
        let expected = usize::from(fixed.file.ends_with("allow-catalog.yaml"));
        assert_eq!(texts.len(), expected, "{}: {texts:?}", fixed.file.display());
        assert!(
            texts.iter().all(|t| t.contains("matches only what ends with")),
            "{texts:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any text is answered, with places inside the file, and a repair neither touches what is valid nor wants a second run.
    #[test]
    fn any_text_is_answered(pieces in prop::collection::vec((prop::sample::select(vec![GOOD, BAD, "---\n", "kind: List\nitems:\n- ", "  - a: b\n", "\t", "{", "]: ", "\u{feff}", "é”"]), "[ -~\n\t]{0,8}"), 0..6)) {
        let text: String = pieces.into_iter().map(|(a, b)| format!("{a}{b}")).collect();
        let file = PathBuf::from("any.yaml");
        let lines = text.lines().count().max(1);
        let found = findings(&files::split(&file, &text));
        for one in &found {
            prop_assert!(one.line >= 1 && one.line <= lines + 1, "{:?}", one);
        }
        let fixed = fix::fix(vec![(file.clone(), text.clone())]).remove(0);
        if found.is_empty() {
            prop_assert_eq!(&fixed.text, &text);
        }
        let again = fix::fix(vec![(file, fixed.text.clone())]).remove(0);
        prop_assert_eq!(again.text, fixed.text);
    }
}
