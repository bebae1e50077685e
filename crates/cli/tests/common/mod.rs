//! A cluster of its own for a test, through the real program and the real `kubectl`.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// One cluster, stopped and deleted at the end of its test.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) name: String,
    mantlet: PathBuf,
    /// How a program is started.
    launch: Box<dyn Fn(&str) -> Command>,
}

impl Cluster {
    pub(crate) fn new(name: &str) -> Self {
        let samples = program().with_file_name("mantlet-samples");
        assert!(
            samples.is_file(),
            "{} is missing: cargo build -p mantlet-samples",
            samples.display()
        );
        // Unique on the machine, so that parallel runs get different addresses on the host.
        Self {
            dir: tempfile::tempdir().expect("a directory"),
            name: format!("{name}-{}", std::process::id()),
            mantlet: program(),
            launch: Box::new(|program| Command::new(program)),
        }
    }

    /// The cluster of somebody else than whoever runs the tests, with this program, started in this way.
    pub(crate) fn run_by(mut self, mantlet: PathBuf, launch: impl Fn(&str) -> Command + 'static) -> Self {
        self.mantlet = mantlet;
        self.launch = Box::new(launch);
        self
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state").join(&self.name)
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = (self.launch)(program);
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("MANTLET_STATE_DIR", self.dir.path().join("state"))
            // kubectl caches discovery there.
            .env("HOME", self.dir.path());
        command
    }

    pub(crate) fn mantlet(&self, args: &[&str]) -> Output {
        let mut command = self.command(self.mantlet.to_str().expect("UTF-8"));
        command.arg("cluster").args(args).args(["--name", &self.name]);
        command.output().expect("mantlet runs")
    }

    pub(crate) fn up(&self) -> String {
        let output = self.mantlet(&["up"]);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    /// Standard output of a successful kubectl.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let output = self.command("kubectl").args(args).output().expect("kubectl is needed");
        assert!(output.status.success(), "kubectl {args:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn apply(&self, manifest: &str) {
        let mut child = self
            .command("kubectl")
            .args(["apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("kubectl is needed");
        let mut stdin = child.stdin.take().expect("piped");
        std::io::Write::write_all(&mut stdin, manifest.as_bytes()).expect("kubectl reads");
        drop(stdin);
        assert!(child.wait().expect("kubectl ends").success());
    }

    pub(crate) fn status(&self) -> Option<serde_json::Value> {
        let output = self.mantlet(&["status", "--json"]);
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.state().join("cluster.log")).unwrap_or_default();
            eprintln!("--- cluster.log\n{log}");
        }
        self.mantlet(&["down", "--purge"]);
    }
}

pub(crate) fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_mantlet"))
}

pub(crate) fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
