//! Captures packets on the node's side of a pod's interface pair, where a wiretapper of the network would sit.
//!
//! Only for the embedded cluster: `tcpdump` is run inside the cluster's network namespace, which root and the cluster's own
//! user may enter.

use std::io::Read;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use rustix::process::{Pid, Signal};

/// Packets that are kept; more means that the step is not what it should be.
const MAX_BYTES: u64 = 64 << 20;

/// How long `tcpdump` may take to start, and to catch up at the end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running capture.
pub(super) struct Capture {
    tcpdumps: Vec<Tcpdump>,
}

struct Tcpdump {
    child: Child,
    packets: JoinHandle<Vec<u8>>,
    /// What it says on its standard error, piece by piece.
    said: mpsc::Receiver<String>,
    interface: String,
}

impl Capture {
    /// Starts to capture what the pods with these addresses send and receive; returns when every `tcpdump` listens.
    pub(super) fn start(addresses: &[Ipv4Addr], process: u32) -> Result<Self> {
        let mut capture = Self { tcpdumps: Vec::new() };
        for address in addresses {
            let interface = mantlet_node::podnet::host_interface(*address);
            let mut child = Command::new("nsenter")
                .args([
                    "--target",
                    &process.to_string(),
                    "--user",
                    "--net",
                    "--setuid",
                    "0",
                    "--setgid",
                    "0",
                    "--",
                    "tcpdump",
                ])
                .args([
                    "-i",
                    &interface,
                    "-Z",
                    "root",
                    "-n",
                    "-s",
                    "0",
                    "-U",
                    "--immediate-mode",
                    "-w",
                    "-",
                    "tcp",
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .context("nsenter (package util-linux) and tcpdump (package tcpdump) are needed")?;
            let stdout = child.stdout.take().context("tcpdump's output")?;
            let packets = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = stdout.take(MAX_BYTES).read_to_end(&mut bytes);
                bytes
            });
            let stderr = child.stderr.take().context("tcpdump's messages")?;
            let mut tcpdump = Tcpdump {
                child,
                packets,
                said: messages(stderr),
                interface,
            };
            tcpdump.hears("listening on", |text| text.contains("listening on"))?;
            capture.tcpdumps.push(tcpdump);
        }
        Ok(capture)
    }

    /// Ends the capture; the packets with their headers, as in a pcap file.
    ///
    /// # Errors
    /// When `tcpdump` does not get through what the kernel has counted for it.
    pub(super) fn stop(mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for mut tcpdump in self.tcpdumps.drain(..) {
            let caught_up = tcpdump.catch_up();
            if caught_up.is_ok() {
                tcpdump.signal(Signal::INT);
            } else {
                let _ = tcpdump.child.kill();
            }
            let _ = tcpdump.child.wait();
            all.extend(tcpdump.packets.join().unwrap_or_default());
            caught_up?;
        }
        Ok(all)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for tcpdump in &mut self.tcpdumps {
            let _ = tcpdump.child.kill();
            let _ = tcpdump.child.wait();
        }
    }
}

impl Tcpdump {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits until it has written every packet that the kernel has counted for it: an interrupted `tcpdump` throws away
    /// what it has not read yet, and on a busy machine that may be everything.
    fn catch_up(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            self.signal(Signal::USR1);
            let text = self.hears("statistics", |text| counts(text).is_some())?;
            match counts(&text) {
                Some((captured, received)) if captured >= received => return Ok(()),
                _ if started.elapsed() > PATIENCE => bail!("tcpdump on {} lags behind: {text}", self.interface),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Waits for a message.
    fn hears(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut text = String::new();
        loop {
            match self
                .said
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(piece) => text.push_str(&piece),
                Err(RecvTimeoutError::Disconnected) => bail!("tcpdump on {}: {}", self.interface, text.trim()),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("tcpdump on {} says no {what}: {}", self.interface, text.trim())
                }
            }
            if is_it(&text) {
                return Ok(text);
            }
        }
    }
}

fn messages(mut stderr: std::process::ChildStderr) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut chunk = [0; 1024];
        while let Ok(read @ 1..) = stderr.read(&mut chunk) {
            // Nobody may be interested; the pipe must not fill up all the same.
            let _ = sender.send(String::from_utf8_lossy(&chunk[..read]).into_owned());
        }
    });
    receiver
}

/// Packets captured and packets received by the filter, from a whole line of statistics.
fn counts(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.contains(" dropped by kernel"))?;
    let number = |unit: &str| {
        let before = line.split(unit).next().filter(|before| before.len() < line.len())?;
        before.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
    };
    let count = |one: &str, many: &str| number(many).or_else(|| number(one));
    Some((
        count(" packet captured", " packets captured")?,
        count(" packet received by filter", " packets received by filter")?,
    ))
}

/// The addresses of the pods that a selector picks: `LABELS`, in namespace `default`, or `LABELS -n NAMESPACE`.
pub(super) async fn addresses(client: &Client, selector: &str) -> Result<Vec<Ipv4Addr>> {
    let (selector, namespace) = selector.split_once(" -n ").unwrap_or((selector, "default"));
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = api.list(&ListParams::default().labels(selector)).await?;
    let found: Vec<_> = pods
        .iter()
        .filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok())
        .collect();
    if found.is_empty() {
        bail!("no pod with an address has the labels {selector:?}");
    }
    Ok(found)
}

/// A process inside the sandbox of the cluster behind a context: a child of the launcher.
pub(super) fn sandboxed_process(context: &str) -> Result<u32> {
    let launcher = crate::cluster::sandbox_pid(context)?;
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children"))?;
    let first = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
    first.context("the cluster has no process inside its sandbox")
}

#[cfg(test)]
mod tests {
    use super::counts;

    #[test]
    fn statistics_of_tcpdump() {
        let line = "tcpdump: 12 packets captured, 14 packets received by filter, 0 packets dropped by kernel\n";
        assert_eq!(counts(line), Some((12, 14)));
        let one = "tcpdump: 1 packet captured, 1 packet received by filter, 0 packets dropped by kernel\n";
        assert_eq!(counts(one), Some((1, 1)));
        assert_eq!(counts("tcpdump: 12 packets captured, 14 pack"), None);
    }
}
