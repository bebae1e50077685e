//! What the control plane's process gives up at its start, seen from outside.

use std::process::{Command, Stdio};
use std::time::Duration;

use mantlet_testkit::{ChildGuard, eventually};

/// `mantletd discovery` before an API server that accepts and says nothing.
fn start(sandbox: &str) -> (ChildGuard, std::net::TcpListener, tempfile::TempDir) {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config");
    let server = silent.local_addr().unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: \"http://{server}\"}}}}]\nusers: [{{name: u, user: {{}}}}]\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mantletd"));
    command
        .arg("discovery")
        .env("KUBECONFIG", config)
        .env("MANTLET_SANDBOX", sandbox);
    for flag in ["grpcAddr", "secureGRPCAddr", "httpsAddr", "monitoringAddr", "httpAddr"] {
        command.arg(format!("--{flag}=127.0.0.1:0"));
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    (ChildGuard::new(child), silent, directory)
}

/// Lines of `/proc/PID/status` once the process has threads, which it makes after it has given up its rights.
async fn status(process: &ChildGuard) -> String {
    let path = format!("/proc/{}/status", process.id());
    eventually("mantletd runs with its threads", Duration::from_secs(60), || async {
        let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
        let threads = text.lines().find_map(|l| l.strip_prefix("Threads:"));
        match threads.and_then(|t| t.trim().parse::<usize>().ok()) {
            Some(2..) => Ok(text),
            _ => Err(text),
        }
    })
    .await
}

#[tokio::test]
async fn nothing_is_left_to_gain() {
    let (confined, _api, _directory) = start("on");
    let text = status(&confined).await;
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    let (open, _api, _directory) = start("off");
    let text = status(&open).await;
    assert!(
        text.contains("NoNewPrivs:\t0") && text.contains("Seccomp:\t0"),
        "{text}"
    );
}
