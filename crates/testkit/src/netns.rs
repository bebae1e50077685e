//! Network namespaces for tests. Needs root, and says so when it is missing.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use crate::programs::program;

/// A network namespace with its loopback up. It is deleted when dropped.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// A new namespace whose name is unique on this machine; `hint` appears in it.
    ///
    /// # Panics
    /// Without root.
    pub fn new(hint: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces and needs root: run it with sudo, or in a root container"
        );
        let name = format!(
            "mt-{hint}-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        ip(&["netns", "add", &name]);
        let this = Self { name };
        this.exec(&["ip", "link", "set", "lo", "up"]);
        this
    }

    /// The name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run inside.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program("ip"));
        command.args(["netns", "exec", &self.name]).arg(program(name));
        command
    }

    /// Runs a command inside.
    ///
    /// # Panics
    /// When it fails, with its output.
    pub fn exec(&self, args: &[&str]) -> Output {
        let (name, rest) = args.split_first().expect("a command has a name");
        let out = self
            .command(name)
            .args(rest)
            .output()
            .unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert!(
            out.status.success(),
            "{args:?} in {}: {}",
            self.name,
            String::from_utf8_lossy(&out.stderr)
        );
        out
    }

    /// Runs a closure on a thread of its own inside, and returns what it returns. Sockets opened there stay there.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let handle = scope.spawn(|| {
                let file = File::open(self.path()).unwrap_or_else(|e| panic!("{}: {e}", self.path().display()));
                setns(file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("setns {}: {e}", self.name));
                inside()
            });
            match handle.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Joins this namespace and another with a veth pair, `a` here and `b` there, each with one address.
    pub fn connect(&self, other: &Self, a: &str, b: &str) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // Interface names have at most 15 bytes.
        let (left, right) = (format!("va{n}"), format!("vb{n}"));
        ip(&[
            "link",
            "add",
            &left,
            "netns",
            &self.name,
            "type",
            "veth",
            "peer",
            "name",
            &right,
            "netns",
            &other.name,
        ]);
        self.exec(&["ip", "address", "add", a, "dev", &left]);
        other.exec(&["ip", "address", "add", b, "dev", &right]);
        self.exec(&["ip", "link", "set", &left, "up"]);
        other.exec(&["ip", "link", "set", &right, "up"]);
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = Command::new(program("ip"))
            .args(["netns", "delete", &self.name])
            .status();
    }
}

fn ip(args: &[&str]) {
    let out = Command::new(program("ip"))
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("ip {args:?}: {e}"));
    assert!(
        out.status.success(),
        "ip {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}
