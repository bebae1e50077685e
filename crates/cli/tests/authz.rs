//! `mantlet authz` on files, as a user types it: the real program, its output and its exit codes.

use std::path::Path;
use std::process::{Command, Output};

const APP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: customers, namespace: shop}
spec:
  selector: {app: customers}
  ports:
  - {name: http, port: 80, targetPort: 3000}
  - {name: tcp-db, port: 9000}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: customers, namespace: shop}
spec:
  selector: {matchLabels: {app: customers}}
  template:
    metadata: {labels: {app: customers}}
    spec: {serviceAccountName: customers, containers: [{name: c}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {serviceAccountName: web, containers: [{name: c}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: old, namespace: shop}
spec:
  selector: {matchLabels: {app: old}}
  template:
    metadata: {labels: {app: old, sidecar.istio.io/inject: "false"}}
    spec: {serviceAccountName: old, containers: [{name: c}]}
"#;

const POLICIES: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-web, namespace: shop}
spec:
  selector: {matchLabels: {app: customers}}
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/web]}
    to:
    - operation: {methods: [GET, HEAD], paths: ["/customers*"]}
  - to:
    - operation: {paths: [/healthz]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: shop}
spec:
  action: DENY
  rules:
  - to:
    - operation: {paths: ["/customers/admin*"]}
    when:
    - {key: "request.headers[x-role]", notValues: [admin]}
"#;

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        Files(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs `mantlet authz …` in the directory.
    fn authz(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mantlet"))
            .arg("authz")
            .args(args)
            .current_dir(self.path())
            // No cluster may be needed.
            .env("KUBECONFIG", self.path().join("none"))
            .output()
            .expect("mantlet runs")
    }

    /// Standard output of a run that ends with this code.
    fn text(&self, args: &[&str], code: i32) -> String {
        let output = self.authz(args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }
}

fn mesh() -> Files {
    Files::new(&[("mesh/app.yaml", APP), ("mesh/policies.yaml", POLICIES)])
}

#[test]
fn explain_names_policy_rule_line_and_miss() {
    let files = mesh();
    let allowed = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "shop/customers:80",
            "--path",
            "/customers/1",
        ],
        0,
    );
    assert!(
        allowed.starts_with("ALLOWED  shop/web -> shop/customers:80\n"),
        "{allowed}"
    );
    assert!(
        allowed.contains("ALLOW shop/allow-web, rule 0 (mesh/policies.yaml:7)"),
        "{allowed}"
    );
    assert!(
        allowed.contains("mTLS as spiffe://cluster.local/ns/shop/sa/web"),
        "{allowed}"
    );

    let missed = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "shop/customers:80",
            "--path",
            "/customers",
            "--method",
            "POST",
        ],
        0,
    );
    assert!(missed.starts_with("DENIED"), "{missed}");
    assert!(
        missed.contains("the method is \"POST\"; methods wants \"GET\" or \"HEAD\""),
        "{missed}"
    );
    assert!(missed.contains("client sees 403 RBAC: access denied"), "{missed}");

    let denied = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "customers.shop:80",
            "--path",
            "/customers/admin?x=1",
        ],
        0,
    );
    assert!(
        denied.contains("DENY shop/no-admin, rule 0 (mesh/policies.yaml:20)"),
        "{denied}"
    );
    assert!(
        denied.contains("assumed:") && denied.contains("no header x-role"),
        "{denied}"
    );
    let admin = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "customers.shop:80",
            "--path",
            "/customers/admin",
            "--header",
            "X-Role: admin",
        ],
        0,
    );
    assert!(admin.starts_with("ALLOWED"), "{admin}");
}

#[test]
fn explain_knows_what_the_client_sends_and_what_bytes_carry() {
    let files = mesh();
    let old = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/old",
            "--to",
            "shop/customers:80",
        ],
        0,
    );
    assert!(old.contains("plaintext: pod old.shop has no sidecar"), "{old}");
    // On a TCP port the rules of ALLOW policies that look at HTTP are gone, so nothing is allowed.
    let tcp = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "shop/customers:9000",
            "--path",
            "/customers",
        ],
        0,
    );
    assert!(tcp.starts_with("DENIED"), "{tcp}");
    assert!(
        tcp.contains("the connection is closed") && tcp.contains("no HTTP"),
        "{tcp}"
    );

    let strict = Files::new(&[("mesh/app.yaml", APP), ("mesh/strict.yaml", STRICT)]);
    let refused = strict.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/old",
            "--to",
            "shop/customers:80",
        ],
        0,
    );
    assert!(
        refused.starts_with("REFUSED") && refused.contains("(STRICT)"),
        "{refused}"
    );
    let free = strict.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "shop/customers:80",
        ],
        0,
    );
    assert!(
        free.contains("no policy selects the workload: everything is allowed"),
        "{free}"
    );
}

#[test]
fn explain_answers_as_json_and_refuses_what_is_not_there() {
    let files = mesh();
    let text = files.text(
        &[
            "explain",
            "-f",
            "mesh",
            "--from",
            "shop/web",
            "--to",
            "shop/customers:80",
            "--path",
            "/x",
            "-o",
            "json",
        ],
        0,
    );
    let answers: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(answers[0]["decision"], "DENIED");
    assert_eq!(answers[0]["nearest"]["policy"], "shop/allow-web");
    assert_eq!(answers[0]["port"], 3000);
    for (args, wanted) in [
        (
            vec!["--from", "shop/web", "--to", "shop/custmers:80"],
            "did you mean shop/customers?",
        ),
        (
            vec!["--from", "shop/web", "--to", "shop/customers:81"],
            "has no port 81; it has 80, 9000",
        ),
        (
            vec!["--from", "a/b/c", "--to", "shop/customers"],
            "expected NAMESPACE/SERVICEACCOUNT",
        ),
        (
            vec!["--from", "spiffe://other/ns/a/sa/b", "--to", "shop/customers"],
            "is not accepted by this mesh",
        ),
        (
            vec!["--from", "shop/web", "--to", "shop/customers", "--path", "x"],
            "must begin with /",
        ),
        (
            vec!["--from", "shop/web", "--to", "shop/customers", "--jwt", "x"],
            "neither a token",
        ),
    ] {
        let mut all = vec!["explain", "-f", "mesh"];
        all.extend(args);
        let output = files.authz(&all);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(wanted), "{all:?}: {error}");
    }
}

#[test]
fn table_tests_fail_with_places_and_reports() {
    let files = mesh();
    let tests = "tests:
- name: web reads customers
  from: shop/web
  to: shop/customers:80
  request: {path: /customers}
  expect: allow
  policy: shop/allow-web
- name: everybody asks for health
  from: plaintext
  to: shop/customers:80
  request: {path: /healthz}
  expect: allow
- from: shop/web
  to: shop/customers:80
  request: {path: /customers/admin}
  expect: denied
  policy: shop/no-admin
";
    std::fs::write(files.path().join("good.yaml"), tests).expect("written");
    let good = files.text(&["test", "good.yaml", "-f", "mesh"], 0);
    assert!(good.ends_with("3 passed, 0 failed\n"), "{good}");

    let bad = tests
        .replace("expect: denied", "expect: allow")
        .replace("policy: shop/allow-web", "policy: shop/other");
    std::fs::write(files.path().join("bad.yaml"), bad).expect("written");
    let text = files.text(&["test", "bad.yaml", "-f", "mesh", "--junit", "out.xml"], 1);
    assert!(text.contains("FAIL  web reads customers\n      bad.yaml:2\n"), "{text}");
    assert!(text.contains("but decided by shop/allow-web, rule 0"), "{text}");
    assert!(
        text.contains("bad.yaml:13") && text.contains("got denied: DENY shop/no-admin"),
        "{text}"
    );
    assert!(text.ends_with("1 passed, 2 failed\n"), "{text}");
    let report = std::fs::read_to_string(files.path().join("out.xml")).expect("a report");
    assert!(report.contains("<testsuites tests=\"3\" failures=\"2\""), "{report}");
    assert!(report.contains("file=\"bad.yaml\" line=\"13\""), "{report}");

    for broken in ["tests: 3\n", "tests:\n- {from: a, to: b}\n", "tests: [\n", ""] {
        std::fs::write(files.path().join("broken.yaml"), broken).expect("written");
        files.text(&["test", "broken.yaml", "-f", "mesh"], 2);
    }
}

#[test]
fn who_can_and_what_can_list_conditions() {
    let files = mesh();
    let who = files.text(&["who-can", "reach", "shop/customers:80", "-f", "mesh"], 0);
    assert!(who.contains("if methods GET or HEAD and paths /customers*"), "{who}");
    assert!(who.contains("shop/web"), "{who}");
    assert!(who.contains("if paths /healthz"), "{who}");
    let unless = "unless request.headers[x-role] notValues admin and paths /customers/admin*";
    // Told where it takes something away only: others may ask for health, which it does not touch.
    assert_eq!(who.matches(unless).count(), 1, "{who}");
    // Nobody may delete but for health.
    let delete = files.text(
        &[
            "who-can",
            "reach",
            "shop/customers:80",
            "-f",
            "mesh",
            "--method",
            "DELETE",
            "--path",
            "/customers",
            "-o",
            "json",
        ],
        0,
    );
    let answers: serde_json::Value = serde_json::from_str(&delete).expect("JSON");
    let classes = answers[0]["classes"].as_array().expect("classes");
    assert!(
        !classes.is_empty() && classes.iter().all(|c| c["access"] == "none"),
        "{delete}"
    );

    let what = files.text(
        &[
            "what-can",
            "shop/web",
            "-f",
            "mesh",
            "--path",
            "/customers",
            "--method",
            "GET",
        ],
        0,
    );
    let line = what
        .lines()
        .find(|l| l.starts_with("shop/customers:80"))
        .expect("a row");
    assert!(
        line.contains("all") && line.contains("shop/allow-web, rule 0"),
        "{what}"
    );
    let nobody = files.text(&["what-can", "shop/old", "-f", "mesh"], 0);
    assert!(
        nobody.contains("no identity") && nobody.contains("if paths /healthz"),
        "{nobody}"
    );
}

#[test]
fn diff_prints_the_smallest_request_or_proves_that_there_is_none() {
    let files = Files::new(&[
        ("apps/app.yaml", APP),
        ("old/p.yaml", POLICIES),
        (
            "same/p.yaml",
            &POLICIES.replace(
                "methods: [GET, HEAD], paths: [\"/customers*\"]",
                "methods: [HEAD, GET], paths: [\"/customers*\", /customers/x]",
            ),
        ),
        (
            "new/p.yaml",
            &POLICIES
                .replace("[GET, HEAD]", "[GET, HEAD, PUT]")
                .replace("paths: [/healthz]", "paths: [/health]"),
        ),
        ("strict/p.yaml", &format!("{POLICIES}---\n{STRICT}")),
    ]);
    let same = files.text(&["diff", "old", "same", "--workloads", "apps"], 0);
    assert!(same.starts_with("No change: "), "{same}");

    let text = files.text(&["diff", "old", "new", "--workloads", "apps"], 1);
    assert!(text.contains("+ now allowed: PUT /customers from shop/web\n"), "{text}");
    assert!(text.contains("+ now allowed: GET /health from"), "{text}");
    assert!(text.contains("- now denied: GET /healthz from"), "{text}");
    assert!(
        text.contains("after   allowed by ALLOW shop/allow-web, rule 0 (new/p.yaml:7)"),
        "{text}"
    );

    // STRICT takes plaintext away.
    let strict = files.text(&["diff", "old", "strict", "--workloads", "apps"], 1);
    assert!(
        strict.contains("- now denied: GET /healthz from a client without identity"),
        "{strict}"
    );
    assert!(strict.contains("after   the connection is refused"), "{strict}");

    // Policies alone: stand-ins take the place of workloads.
    let alone = files.text(&["diff", "old", "new"], 1);
    assert!(
        alone.contains("pods with app=customers") && alone.contains("stand-ins"),
        "{alone}"
    );

    files.text(&["diff", "old", "nowhere"], 2);
}
