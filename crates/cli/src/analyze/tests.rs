//! The command from files: output lines, thresholds, suppression, formats, exit codes.

use std::io::Write;

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// Strict modes that a client's rule breaks, on the third line of the second document.
const POLICIES: &str = "\
apiVersion: v1
kind: Namespace
metadata:
  name: foo
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: x
  namespace: foo
spec:
  rules:
  - from:
    - source:
        principals: [\"spiffe://cluster.local/ns/foo/sa/web\"]
";

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn analyze(text: &str, flags: &[&str]) -> Answer {
    let file = file(text);
    let path = file.path().display().to_string();
    let mut line = vec!["analyze", "--use-kube=false", &path];
    line.extend(flags);
    let mut answer = run(&Cli::parse_from(line).args).unwrap();
    answer.text = answer.text.replace(&path, "file.yaml");
    answer.errors = answer.errors.replace(&path, "file.yaml");
    answer
}

#[test]
fn lines_are_istioctls() {
    let answer = analyze(POLICIES, &[]);
    assert_eq!(
        answer.text,
        "Error [MNT0101] (AuthorizationPolicy foo/x file.yaml:15) Principal \"spiffe://cluster.local/ns/foo/sa/web\" never matches: \
         principals are written without scheme, \"cluster.local/ns/foo/sa/web\".\n\
         Info [IST0102] (Namespace foo file.yaml:3) The namespace is not enabled for Istio injection. Run 'kubectl label namespace foo \
         istio-injection=enabled' to enable it, or 'kubectl label namespace foo istio-injection=disabled' to explicitly mark it as not \
         needing injection.\n"
    );
    assert_eq!(
        answer.errors,
        "Error: Analyzers found issues when analyzing file.yaml.\nSee https://istio.io/v1.28/docs/reference/config/analysis for more \
         information about causes and resolutions.\n"
    );
    assert_eq!(answer.code, 79);
}

#[test]
fn a_clean_file_says_so() {
    let answer = analyze(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: foo, labels: {istio-injection: enabled}}\n",
        &[],
    );
    assert_eq!(answer.text, "");
    assert_eq!(
        answer.errors,
        "\u{2714} No validation issues found when analyzing file.yaml.\n"
    );
    assert_eq!(answer.code, 0);
}

#[test]
fn thresholds_and_suppression() {
    let few = analyze(POLICIES, &["--output-threshold", "error"]);
    assert!(
        !few.text.contains("IST0102") && few.text.contains("MNT0101") && few.code == 79,
        "{few:?}"
    );
    let info_fails = analyze(
        POLICIES,
        &["-S", "MNT0101=AuthorizationPolicy x.foo", "--failure-threshold=Info"],
    );
    assert!(
        info_fails.code == 79 && !info_fails.text.contains("MNT0101"),
        "{info_fails:?}"
    );
    let nothing = analyze(
        POLICIES,
        &[
            "-S",
            "MNT0101=AuthorizationPolicy foo/*",
            "--suppress",
            "IST0102=Namespace foo",
        ],
    );
    assert_eq!((nothing.text.as_str(), nothing.code), ("", 0));
    let other = analyze(POLICIES, &["-S", "MNT0101=AuthorizationPolicy y.foo"]);
    assert!(
        other.text.contains("MNT0101"),
        "another object's suppression was applied"
    );
    let elsewhere = analyze(POLICIES, &["-n", "bar"]);
    assert_eq!((elsewhere.text.as_str(), elsewhere.code), ("", 0));
    // Warnings alone do not fail unless asked to.
    let warned = POLICIES.replace(
        "principals: [\"spiffe://cluster.local/ns/foo/sa/web\"]",
        "notNamespaces: [\"foo\"]",
    );
    assert_eq!(analyze(&warned, &[]).code, 0);
    assert_eq!(analyze(&warned, &["--failure-threshold", "Warning"]).code, 79);
}

#[test]
fn machine_formats() {
    let answer = analyze(POLICIES, &["-o", "json"]);
    let list: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(list[0]["code"], "MNT0101");
    assert_eq!(list[0]["level"], "Error");
    assert_eq!(list[0]["origin"], "AuthorizationPolicy foo/x");
    assert_eq!(list[0]["reference"], "file.yaml:15");
    assert_eq!(
        list[1]["documentationUrl"],
        "https://istio.io/v1.28/docs/reference/config/analysis/ist0102/"
    );
    let yaml = mantlet_api::yaml::read_one(&analyze(POLICIES, &["-o", "yaml"]).text).unwrap();
    assert_eq!(yaml, list);
    let clean = analyze("apiVersion: v1\nkind: Service\nmetadata: {name: a}\n", &["-o", "json"]);
    assert_eq!(clean.text.trim(), "[]");
}

#[test]
fn texts_that_are_no_yaml_are_findings() {
    let answer = analyze(
        "a: [\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: foo}\n",
        &[],
    );
    let first = answer.text.lines().next().unwrap();
    assert!(first.starts_with("Error [MNT0005] (file.yaml:"), "{first}");
    assert!(answer.text.contains("IST0102") && answer.code == 79, "{answer:?}");
}

#[test]
fn recursion_can_be_turned_off() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("below")).unwrap();
    std::fs::write(
        dir.path().join("below/ns.yaml"),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: foo}\n",
    )
    .unwrap();
    std::fs::write(
        dir.path().join("a.yaml"),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: bar}\n",
    )
    .unwrap();
    let path = dir.path().display().to_string();
    let of = |flag: &str| {
        run(&Cli::parse_from(["analyze", "--use-kube=false", flag, &path]).args)
            .unwrap()
            .text
    };
    assert!(of("--recursive").contains("Namespace foo") && of("--recursive").contains("Namespace bar"));
    assert!(!of("--recursive=false").contains("Namespace foo") && of("--recursive=false").contains("Namespace bar"));
}

#[test]
fn lists_and_explanations() {
    let list = run(&Cli::parse_from(["analyze", "-L"]).args).unwrap().text;
    assert!(list.contains("* schema.ValidationAnalyzer:\n"), "{list}");
    let explained = run(&Cli::parse_from(["analyze", "--explain", "mnt0101"]).args)
        .unwrap()
        .text;
    assert!(
        explained.starts_with("MNT0101 PrincipalWithScheme (Error, about security)"),
        "{explained}"
    );
    assert!(run(&Cli::parse_from(["analyze", "--explain", "MNT9999"]).args).is_err());
    assert!(run(&Cli::parse_from(["analyze", "--use-kube=false"]).args).is_err());
    assert!(run(&Cli::parse_from(["analyze", "--use-kube=false", "-S", "nonsense", "x.yaml"]).args).is_err());
}

#[test]
fn sockets_of_localhost() {
    let text = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100007F:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3
   3: 0100007F:0052 0100007F:0999 01 00000000:00000000 00:00000000 00000000     0        0 4
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A
   1: 00000000000000000000000000000000:0051 00000000000000000000000000000000:0000 0A
";
    let ports: Vec<u16> = collect::only_localhost(text).into_iter().collect();
    assert_eq!(ports, [8080, 8081], "81 is open on ::, 82 is no listener");
}

#[test]
fn texts_without_indentation_are_findings() {
    let flat = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\nname: a_b\nspec:\nrules:\n- to:\n- operation:\npath: [/a]\n";
    let answer = analyze(flat, &[]);
    for part in [
        "Error [MNT0007] (AuthorizationPolicy a_b file.yaml:4) the indentation is lost; by their names the lines belong together like this:",
        "|   name: a_b\n",
        "Error [MNT0004] (AuthorizationPolicy a_b file.yaml:4) \"a_b\" is no name that Kubernetes takes",
        "[MNT0001] (AuthorizationPolicy a_b file.yaml:9) unknown field \"path\"",
        "did you mean \"paths\"?",
    ] {
        assert!(answer.text.contains(part), "no {part:?} in {}", answer.text);
    }
    assert_ne!(answer.code, 0);
    let good = flat
        .replace("\nname: a_b", "\n  name: ab")
        .replace("\nrules", "\n  rules")
        .replace("\n- to", "\n  - to")
        .replace("\n- op", "\n    - op")
        .replace("\npath", "\n        paths");
    assert!(
        !analyze(&good, &[]).text.contains("MNT00"),
        "{}",
        analyze(&good, &[]).text
    );
}
