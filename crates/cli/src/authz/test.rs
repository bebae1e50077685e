//! `mantlet authz test`: tables of calls and what must become of them, against files or the live mesh.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use mantlet_api::{spans, yaml};
use serde::Deserialize;
use serde_json::Value;

use super::question::{self, Answer, Decision, Request};
use super::{Outcome, Source, explain, target};
use crate::world::Loaded;

/// Most tests of one run.
const MAX_TESTS: usize = 100_000;

/// Arguments of `authz test`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "A test file:
  tests:
  - name: the frontend may read customers
    from: default/web-frontend      # NAMESPACE/SERVICEACCOUNT, an IP address, or plaintext
    to: default/customers:80        # NAMESPACE/SERVICE:PORT
    request: {method: GET, path: /customers}
    expect: allow                   # allow, deny, or more exactly: denied, reset, unauthorized
    policy: default/allow-frontend  # optional: the policy that decides
  - from: plaintext
    to: default/customers:80
    request: {path: /, headers: {x-role: admin}, claims: {iss: https://a, sub: b}}
    expect: deny

Exit codes: 0 all pass, 1 some fail, 2 the tests cannot be run.

Examples:
  # Before a change is applied
  mantlet authz test tests.yaml -f policies/ -f deployments/

  # Against the live mesh, with a report for CI
  mantlet authz test tests.yaml --junit report.xml")]
pub struct Args {
    /// Files with tests; `-` is stdin
    #[arg(required = true, value_name = "TESTS")]
    pub tests: Vec<PathBuf>,
    /// Write a JUnit report here
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Where to look.
    #[command(flatten)]
    pub source: Source,
}

/// One test, as written.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Test {
    #[serde(default)]
    name: String,
    from: String,
    to: String,
    #[serde(default)]
    request: RequestSpec,
    expect: Expect,
    #[serde(default)]
    policy: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RequestSpec {
    method: Option<String>,
    path: Option<String>,
    host: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    claims: Option<Value>,
    sni: Option<String>,
    source_ip: Option<std::net::IpAddr>,
    #[serde(default)]
    tcp: bool,
    #[serde(default)]
    plaintext: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Allow,
    Deny,
    Denied,
    Reset,
    Unauthorized,
}

impl Expect {
    fn fits(self, decision: Decision) -> bool {
        match self {
            Expect::Allow => decision == Decision::Allowed,
            Expect::Deny => decision != Decision::Allowed,
            Expect::Denied => decision == Decision::Denied,
            Expect::Reset => decision == Decision::Reset,
            Expect::Unauthorized => decision == Decision::Unauthorized,
        }
    }
}

/// A test with its place.
#[derive(Clone, Debug)]
struct Placed {
    test: Test,
    place: String,
}

/// What became of a test.
struct Verdict {
    name: String,
    place: String,
    /// Lines that say what was wrong; empty if it passed.
    failure: Vec<String>,
    seconds: f64,
}

/// Runs the tests.
///
/// # Errors
/// Never for a test that fails or cannot be run: the exit code tells.
pub fn run(args: &Args) -> Result<Outcome> {
    let verdicts = match prepare(args) {
        Ok(verdicts) => verdicts,
        Err(error) => {
            eprintln!("Error: {error:#}");
            return Ok(Outcome {
                text: String::new(),
                code: 2,
            });
        }
    };
    let failed = verdicts.iter().filter(|v| !v.failure.is_empty()).count();
    let mut text = String::new();
    for verdict in &verdicts {
        let word = if verdict.failure.is_empty() { "ok" } else { "FAIL" };
        let _ = writeln!(text, "{word:<6}{}", verdict.name);
        if !verdict.failure.is_empty() {
            let _ = writeln!(text, "      {}", verdict.place);
            for line in &verdict.failure {
                let _ = writeln!(text, "      {line}");
            }
        }
    }
    let _ = writeln!(text, "{} passed, {failed} failed", verdicts.len() - failed);
    Ok(Outcome {
        text,
        code: u8::from(failed > 0),
    })
}

fn prepare(args: &Args) -> Result<Vec<Verdict>> {
    let mut tests = Vec::new();
    for (file, text) in crate::files::texts(&args.tests)? {
        tests.extend(read(&file, &text)?);
    }
    if tests.is_empty() {
        bail!("the files hold no tests");
    }
    if tests.len() > MAX_TESTS {
        bail!("{} tests are more than the {MAX_TESTS} of one run", tests.len());
    }
    let (world, namespace) = args.source.load()?;
    let verdicts: Vec<Verdict> = tests.iter().map(|test| judge(&world, &namespace, test)).collect();
    if let Some(file) = &args.junit {
        std::fs::write(file, junit(&verdicts)).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(verdicts)
}

/// Reads `tests:` (or a bare list) of one YAML document.
fn read(file: &Path, text: &str) -> Result<Vec<Placed>> {
    let shown = file.display().to_string();
    let tree =
        spans::parse(text).map_err(|e| anyhow::anyhow!("{shown}:{}:{}: {}", e.at.line, e.at.column, e.message))?;
    let value = yaml::read_one(text).with_context(|| shown.clone())?;
    let (list, prefix) = match value.get("tests") {
        Some(list) => (list, "tests"),
        None => (&value, ""),
    };
    let list = list
        .as_array()
        .with_context(|| format!("{shown}:1: expected a list under `tests:`"))?;
    let mut out = Vec::new();
    for (index, item) in list.iter().enumerate() {
        let path = format!("{prefix}[{index}]");
        let at = tree.as_ref().map(|t| t.locate(&path).0);
        let place = match at {
            Some(at) => format!("{shown}:{}", at.line),
            None => shown.clone(),
        };
        let test: Test =
            serde_json::from_value(item.clone()).map_err(|e| anyhow::anyhow!("{place}: test {}: {e}", index + 1))?;
        out.push(Placed { test, place });
    }
    Ok(out)
}

fn judge(world: &Loaded, namespace: &str, placed: &Placed) -> Verdict {
    let started = Instant::now();
    let test = &placed.test;
    let request = &test.request;
    let name = if test.name.is_empty() {
        format!(
            "{} -> {} {} {}",
            test.from,
            test.to,
            request.method.as_deref().unwrap_or("GET"),
            request.path.as_deref().unwrap_or("/")
        )
    } else {
        test.name.clone()
    };
    let failure = match answers(world, namespace, test) {
        Ok(answers) => answers.iter().flat_map(|a| compare(test, a)).collect(),
        Err(error) => vec![format!("{error:#}")],
    };
    Verdict {
        name,
        place: placed.place.clone(),
        failure,
        seconds: started.elapsed().as_secs_f64(),
    }
}

fn answers(world: &Loaded, namespace: &str, test: &Test) -> Result<Vec<Answer>> {
    let spec = &test.request;
    let request = Request {
        method: spec.method.clone(),
        path: spec.path.as_deref().map(explain::path).transpose()?,
        host: spec.host.clone(),
        headers: spec
            .headers
            .iter()
            .map(|(n, v)| (n.to_ascii_lowercase(), v.clone()))
            .collect(),
        claims: spec.claims.clone(),
        sni: spec.sni.clone(),
        source: spec.source_ip,
        tcp: spec.tcp,
        plaintext: spec.plaintext,
        now: explain::now(),
    };
    let caller = target::caller(world, &test.from, namespace)?;
    let to = target::destination(world, &test.to, namespace)?;
    if to.pods.is_empty() {
        bail!("{} has no pods", to.name);
    }
    Ok(question::ask(world, &caller, &to, &request))
}

/// What is wrong with an answer, in lines; nothing if it is as expected.
fn compare(test: &Test, answer: &Answer) -> Vec<String> {
    let mut out = Vec::new();
    let got = format!("{:?}", answer.decision).to_lowercase();
    let wanted = format!("{:?}", test.expect).to_lowercase();
    let decided = answer.decided_by.as_ref();
    if !test.expect.fits(answer.decision) {
        let by = match decided {
            Some(rule) => format!("{} {}", rule.action, question::shown(rule)),
            None => answer.reason.clone(),
        };
        out.push(format!(
            "expected {wanted}, got {got}: {by} (port {}, {})",
            answer.port,
            answer.pods.join(", ")
        ));
        if let Some(miss) = &answer.nearest {
            out.push(format!("nearest: {}", question::shown(&miss.rule)));
            out.extend(miss.failed.iter().map(|f| format!("  - {f}")));
        }
    } else if let Some(policy) = &test.policy
        && decided.is_none_or(|rule| rule.policy != *policy)
    {
        let by = match decided {
            Some(rule) => question::shown(rule),
            None => format!("no rule: {}", answer.reason),
        };
        out.push(format!("{got} as expected, but decided by {by}, not by {policy}"));
    }
    out
}

/// The report that CI systems read.
fn junit(verdicts: &[Verdict]) -> String {
    let failed = verdicts.iter().filter(|v| !v.failure.is_empty()).count();
    let total: f64 = verdicts.iter().map(|v| v.seconds).sum();
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        out,
        "<testsuites tests=\"{0}\" failures=\"{failed}\" time=\"{total:.6}\">\n<testsuite name=\"mantlet authz test\" tests=\"{0}\" failures=\"{failed}\" errors=\"0\" time=\"{total:.6}\">",
        verdicts.len()
    );
    for verdict in verdicts {
        let (file, line) = verdict.place.rsplit_once(':').unwrap_or((&verdict.place, "1"));
        let _ = write!(
            out,
            "<testcase name=\"{}\" classname=\"authz\" file=\"{}\" line=\"{}\" time=\"{:.6}\"",
            escape(&verdict.name),
            escape(file),
            escape(line),
            verdict.seconds
        );
        match verdict.failure.first() {
            None => out.push_str("/>\n"),
            Some(first) => {
                let _ = writeln!(
                    out,
                    "><failure message=\"{}\">{}</failure></testcase>",
                    escape(first),
                    escape(&format!("{}\n{}", verdict.place, verdict.failure.join("\n")))
                );
            }
        }
    }
    out.push_str("</testsuite>\n</testsuites>\n");
    out
}

/// Text for XML; characters that XML 1.0 cannot hold become `?`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            c if c < ' ' || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_have_places_and_unknown_fields_are_refused() {
        let text = "tests:\n- from: a/b\n  to: c/d:80\n  expect: allow\n- from: a/b\n  to: c/d\n  expect: deny\n";
        let tests = read(Path::new("t.yaml"), text).expect("two tests");
        assert_eq!(tests.len(), 2);
        assert_eq!(tests[1].place, "t.yaml:5");
        for (bad, wanted) in [
            (
                "tests:\n- from: a\n  too: b\n  expect: allow\n",
                "t.yaml:2: test 1: unknown field `too`",
            ),
            (
                "tests:\n- from: a\n  to: b\n  expect: maybe\n",
                "t.yaml:2: test 1: unknown variant `maybe`",
            ),
            ("a: b\n", "expected a list"),
        ] {
            let error = read(Path::new("t.yaml"), bad).expect_err(bad).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn reports_are_well_formed() {
        let report = junit(&[
            Verdict {
                name: "a < \"b\" & \u{1}".into(),
                place: "t.yaml:3".into(),
                failure: vec!["expected allow".into()],
                seconds: 0.0,
            },
            Verdict {
                name: "fine".into(),
                place: "t.yaml:9".into(),
                failure: Vec::new(),
                seconds: 0.0,
            },
        ]);
        assert!(report.contains("name=\"a &lt; &quot;b&quot; &amp; ?\""), "{report}");
        assert!(report.contains("tests=\"2\" failures=\"1\""));
        assert!(report.contains("<failure message=\"expected allow\">t.yaml:3&#10;expected allow</failure>"));
    }
}
