//! h2spec, all sections and its strict cases, against a sidecar's inbound side and a gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use super::hosts::Gateway;
use super::wire::*;

/// Its "too large" frame is 20 kB, and this proxy takes frames of 64 kB; it runs again with longer headers.
const SHORT: &str = "4.2 Sends a large size HEADERS frame";

type Report = (usize, Vec<(String, String)>);

/// Runs h2spec; its report as (case, what was wrong).
async fn run(host: &str, address: SocketAddr, more: &[&str]) -> Report {
    let program = tokio::task::spawn_blocking(h2spec).await.unwrap();
    let report = tempfile::NamedTempFile::new().unwrap();
    let mut command = tokio::process::Command::new(program);
    command
        .args(["--host", host, "--port", &address.port().to_string()])
        // The application's answer is the path, and one case wants a few bytes of it.
        .args(["--strict", "--timeout", "20", "--path", "/0123456789"])
        .args(more)
        .arg("--junit-report")
        .arg(report.path())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    // It ends with a failure when a case fails; the report says which.
    let _ = command.status().await.unwrap();
    let text = std::fs::read_to_string(report.path()).unwrap();
    let attribute = |piece: &str, name: &str| {
        let from = piece.find(&format!("{name}=\"")).unwrap() + name.len() + 2;
        piece[from..][..piece[from..].find('"').unwrap()].to_string()
    };
    let (mut count, mut failed) = (0, Vec::new());
    for case in text.split("<testcase ").skip(1) {
        count += 1;
        let case = case.split("</testcase>").next().unwrap();
        if case.contains("<failure") || case.contains("<error") || case.contains("<skipped") {
            let name = format!("{} {}", attribute(case, "package"), attribute(case, "classname"));
            failed.push((name, case.to_string()));
        }
    }
    (count, failed)
}

/// The program, built on first use by `bench/get-h2spec`.
fn h2spec() -> PathBuf {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../bench/get-h2spec");
    let out = std::process::Command::new(&script).output().unwrap();
    let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
    assert!(
        out.status.success() && path.is_file(),
        "this test needs h2spec; {} failed: {}",
        script.display(),
        String::from_utf8_lossy(&out.stderr)
    );
    path
}

/// All cases pass but the listed ones, and those do not.
async fn judge(host: &str, address: SocketAddr, tls: &[&str], listed: &[&str]) {
    let (count, failed) = run(host, address, tls).await;
    assert!(count >= 145, "only {count} cases ran");
    let unlisted: Vec<_> = failed
        .iter()
        .filter(|(name, _)| !listed.iter().any(|l| name.contains(l)))
        .collect();
    assert!(unlisted.is_empty(), "{} of {count}: {unlisted:#?}", unlisted.len());
    for name in listed {
        assert!(failed.iter().any(|(f, _)| f.contains(name)), "{name} passes now");
    }
    let longer = [tls, &["http2/4.2", "--max-header-length", "16000"]].concat();
    let (count, failed) = run(host, address, &longer).await;
    assert!(
        count > 0 && failed.is_empty(),
        "with longer headers, of {count}: {failed:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h2spec_inbound() {
    let site = Site::new().await;
    // The port speaks HTTP/1.1 too, and a wrong preface is a wrong request line there: 400 and the end, as with Envoy's
    // codec type AUTO. h2spec reads the answer as a frame.
    let preface = "3.5 Sends invalid connection preface";
    judge(&site.address().ip().to_string(), site.address(), &[], &[SHORT, preface]).await;
    site.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h2spec_gateway() {
    // An address would be no server name.
    let gateway = Gateway::start(&["localhost"]).await;
    judge("localhost", gateway.address, &["--tls", "--insecure"], &[SHORT]).await;
}
