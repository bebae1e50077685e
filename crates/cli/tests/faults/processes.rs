//! The processes of a cluster, seen from the host: found by pod, signalled, measured.
//!
//! It knows how the cluster's processes hang together (broker, sandbox, cluster process, a shim per pod, containers below
//! it), and nothing of what they do.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Process id on the host.
    pub(crate) pid: i32,
    /// Start in clock ticks since boot; with `pid` it names a process for good.
    pub(crate) started: u64,
    /// Name of the program.
    pub(crate) program: String,
    /// The pod it belongs to, or the part of the cluster that it is.
    pub(crate) place: String,
}

/// Resources of a process at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Resident memory in KiB.
    pub(crate) rss: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
    /// Threads.
    pub(crate) threads: u64,
    /// Processor time used so far, in clock ticks.
    pub(crate) ticks: u64,
}

fn read(pid: i32, file: &str) -> Option<String> {
    std::fs::read(format!("/proc/{pid}/{file}"))
        .ok()
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Fields of `/proc/PID/stat` behind the program's name, which may contain anything.
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = read(pid, "stat")?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(str::to_owned).collect())
}

fn children(pid: i32) -> Vec<i32> {
    // Children belong to the thread that made them.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let mut all = Vec::new();
    for task in tasks {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    all
}

/// Every process below and including `root`, the broker of a cluster.
pub(crate) fn tree(root: i32) -> Vec<Process> {
    let mut all = Vec::new();
    let mut open = vec![(root, "broker".to_owned())];
    while let Some((pid, place)) = open.pop() {
        let (Some(stat), Some(arguments)) = (stat(pid), read(pid, "cmdline")) else {
            continue;
        };
        let arguments: Vec<&str> = arguments.split('\0').collect();
        let place = match arguments.get(1..) {
            Some(["shim", pod, ..]) => (*pod).to_owned(),
            Some(["sandbox", ..]) => "sandbox".to_owned(),
            Some(["cluster-process", ..]) => "cluster process".to_owned(),
            _ => place,
        };
        let program = arguments[0].rsplit('/').next().unwrap_or_default().to_owned();
        let shim = arguments.get(1) == Some(&"shim");
        all.push(Process {
            pid,
            started: stat.get(19).and_then(|ticks| ticks.parse().ok()).unwrap_or_default(),
            program: if shim { "shim".to_owned() } else { program },
            place: place.clone(),
        });
        open.extend(children(pid).into_iter().map(|child| (child, place.clone())));
    }
    all
}

impl Process {
    /// Whether it has not ended; a dead one whose parent has not looked counts as ended.
    pub(crate) fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|stat| {
            stat.first().is_some_and(|state| state != "Z" && state != "X")
                && stat.get(19).and_then(|ticks| ticks.parse().ok()) == Some(self.started)
        })
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        assert!(self.alive(), "{self:?} has ended");
        kill(Pid::from_raw(self.pid), signal).unwrap_or_else(|error| panic!("{signal} to {self:?}: {error}"));
    }

    /// SIGKILL, and the wait until it is gone with its sockets.
    pub(crate) fn kill(&self) {
        self.signal(Signal::SIGKILL);
        let start = Instant::now();
        // The first thread may be a zombie while others still hold the descriptors.
        let threads = || std::fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count);
        while self.alive() || threads() > 1 {
            assert!(start.elapsed() < Duration::from_secs(60), "{self:?} survives SIGKILL");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGSTOP for as long as `during` runs; the result is `during`'s. SIGCONT comes also when it panics.
    pub(crate) fn stopped<T>(&self, during: impl FnOnce() -> T) -> T {
        struct Continue<'a>(&'a Process);
        impl Drop for Continue<'_> {
            fn drop(&mut self) {
                let _ = kill(Pid::from_raw(self.0.pid), Signal::SIGCONT);
            }
        }
        self.signal(Signal::SIGSTOP);
        let _continue = Continue(self);
        during()
    }

    /// What it uses now; `None` when it has ended.
    pub(crate) fn usage(&self) -> Option<Usage> {
        let status = read(self.pid, "status")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':')
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        };
        let stat = stat(self.pid)?;
        let ticks = |at: usize| stat.get(at).and_then(|t| t.parse::<u64>().ok()).unwrap_or_default();
        let usage = Usage {
            rss: field("VmRSS")?,
            descriptors: std::fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count() as u64,
            threads: field("Threads")?,
            ticks: ticks(11) + ticks(12),
        };
        self.alive().then_some(usage)
    }
}
