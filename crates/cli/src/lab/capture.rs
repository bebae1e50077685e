//! Captures packets on the node's side of a pod's interface pair, where a wiretapper of the network would sit.
//!
//! Only for the embedded cluster: `tcpdump` is run inside the cluster's network namespace, which root and the cluster's own
//! user may enter.

use std::io::Read;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};

/// Packets that are kept; more means that the step is not what it should be.
const MAX_BYTES: u64 = 64 << 20;

/// A running capture.
pub(super) struct Capture {
    tcpdumps: Vec<(Child, JoinHandle<Vec<u8>>)>,
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
            capture.tcpdumps.push((child, packets));
            listening(stderr, &interface)?;
        }
        Ok(capture)
    }

    /// Ends the capture; the packets with their headers, as in a pcap file.
    pub(super) fn stop(mut self) -> Vec<u8> {
        let mut all = Vec::new();
        for (mut child, packets) in self.tcpdumps.drain(..) {
            // An orderly end, so that what the kernel has buffered is written out.
            let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            }
            let _ = child.wait();
            all.extend(packets.join().unwrap_or_default());
        }
        all
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for (child, _) in &mut self.tcpdumps {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn listening(mut stderr: std::process::ChildStderr, interface: &str) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let mut chunk = [0; 1024];
        let mut told = false;
        loop {
            let read = stderr.read(&mut chunk).unwrap_or(0);
            text.push_str(&String::from_utf8_lossy(&chunk[..read]));
            if !told && (read == 0 || text.contains("listening on")) {
                told = true;
                let _ = sender.send(text.clone());
            }
            if read == 0 {
                return;
            }
        }
    });
    match receiver.recv_timeout(Duration::from_secs(10)) {
        Ok(text) if text.contains("listening on") => Ok(()),
        Ok(text) => bail!("tcpdump on {interface}: {}", text.trim()),
        Err(_) => bail!("tcpdump on {interface} does not start"),
    }
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
