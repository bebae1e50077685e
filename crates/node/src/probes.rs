//! Health probes: one attempt of each kind, and the loop with thresholds.
//!
//! Started by the pod worker for each running container. Network probes go from the node's namespace to the pod's address,
//! as a kubelet's do, so they pass the pod's traffic capture like any other client.

mod http;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::sync::mpsc::UnboundedSender;

use crate::shim::client::Shim;
use crate::shim::proto::ExecSpec;

/// How often a container that is not ready yet is asked.
const EAGER_PERIOD: Duration = Duration::from_millis(500);
/// Output of an exec probe that is kept for its event.
const MAX_OUTPUT: usize = 1024;

/// Which probe.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProbeKind {
    /// Gates the other two.
    Startup,
    /// Decides about endpoints.
    Readiness,
    /// Decides about restarts.
    Liveness,
}

impl ProbeKind {
    /// As in Kubernetes' events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// What a probe loop reports to the pod worker.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The probe crossed its success or failure threshold.
    Changed {
        /// Container id.
        id: String,
        /// Which probe.
        kind: ProbeKind,
        /// Passing now.
        healthy: bool,
    },
    /// One attempt failed.
    Failed {
        /// Container id.
        id: String,
        /// Which probe.
        kind: ProbeKind,
        /// Why.
        message: String,
    },
}

/// The container that is probed.
#[derive(Clone, Debug)]
pub struct Target {
    /// Container id in the shim.
    pub id: String,
    /// Its specification, for named ports.
    pub container: Container,
    /// The pod's address.
    pub address: Ipv4Addr,
    /// The pod's shim, for exec.
    pub shim: Shim,
}

/// Probes for ever, or until a startup probe has passed. End it by aborting its task.
pub async fn run(target: Target, kind: ProbeKind, probe: Probe, reports: UnboundedSender<Report>) {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(value.map_or(default, |v| v.max(0).unsigned_abs().into()))
    };
    let count = |value: Option<i32>, default: u32| value.map_or(default, |v| v.max(1).unsigned_abs());
    let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
    let (need, allow) = (count(probe.success_threshold, 1), count(probe.failure_threshold, 3));
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let mut passing: Option<bool> = None;
    let (mut good, mut bad) = (0u32, 0u32);
    let mut counted: Option<tokio::time::Instant> = None;
    loop {
        let started = tokio::time::Instant::now();
        match attempt(&target, &probe).await {
            Ok(()) => {
                (good, bad) = (good.saturating_add(1), 0);
                if good >= need && passing != Some(true) {
                    passing = Some(true);
                    let _ = reports.send(Report::Changed {
                        id: target.id.clone(),
                        kind,
                        healthy: true,
                    });
                }
            }
            // Early attempts between the periods may only succeed: thresholds are in periods.
            Err(_) if counted.is_some_and(|at| at.elapsed() < period) => good = 0,
            Err(message) => {
                counted = Some(started);
                (good, bad) = (0, bad.saturating_add(1));
                let _ = reports.send(Report::Failed {
                    id: target.id.clone(),
                    kind,
                    message,
                });
                if bad >= allow && passing != Some(false) {
                    passing = Some(false);
                    let _ = reports.send(Report::Changed {
                        id: target.id.clone(),
                        kind,
                        healthy: false,
                    });
                }
            }
        }
        if kind == ProbeKind::Startup && passing == Some(true) {
            return;
        }
        // Until it is ready, a pod is asked more often than its period says: rollouts wait for it.
        let eager = kind == ProbeKind::Readiness && passing != Some(true);
        let pause = if eager { period.min(EAGER_PERIOD) } else { period };
        tokio::time::sleep_until(started + pause).await;
    }
}

/// One attempt within the probe's timeout.
///
/// # Errors
/// What a kubelet writes into its `Unhealthy` event.
pub async fn attempt(target: &Target, probe: &Probe) -> Result<(), String> {
    let timeout = Duration::from_secs(probe.timeout_seconds.map_or(1, |s| s.max(1).unsigned_abs().into()));
    let work = async {
        if let Some(action) = &probe.http_get {
            http_get(target, action).await
        } else if let Some(action) = &probe.tcp_socket {
            let port = port(&target.container, &action.port)?;
            let address = host(action.host.as_deref(), target.address)?;
            tokio::net::TcpStream::connect((address, port))
                .await
                .map(drop)
                .map_err(|e| format!("dial tcp {address}:{port}: {e}"))
        } else if let Some(action) = &probe.grpc {
            let port = u16::try_from(action.port).map_err(|_| format!("port {} is out of range", action.port))?;
            http::grpc_health(
                (target.address, port).into(),
                action.service.as_deref().unwrap_or_default(),
            )
            .await
        } else if let Some(action) = &probe.exec {
            exec(&target.shim, &target.id, action.command.as_deref().unwrap_or_default()).await
        } else {
            Err("the probe names no action".into())
        }
    };
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(format!("command or request timed out after {} s", timeout.as_secs())),
    }
}

fn host(host: Option<&str>, pod: Ipv4Addr) -> Result<IpAddr, String> {
    match host.filter(|h| !h.is_empty()) {
        None => Ok(pod.into()),
        Some(text) => text.parse().map_err(|_| format!("host {text:?} is no IP address")),
    }
}

/// A port by number or by the name of a container port.
pub(crate) fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match name.parse() {
            Ok(number) => number,
            Err(_) => container
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_deref() == Some(name))
                .map(|p| p.container_port)
                .ok_or_else(|| format!("couldn't find port: {name}"))?,
        },
    };
    u16::try_from(number)
        .ok()
        .filter(|p| *p > 0)
        .ok_or_else(|| format!("invalid port number: {number}"))
}

/// An HTTP(S) request as probes and lifecycle hooks make it: 200 to 399 is success.
pub(crate) async fn http_get(target: &Target, action: &HTTPGetAction) -> Result<(), String> {
    let port = port(&target.container, &action.port)?;
    let address = host(action.host.as_deref(), target.address)?;
    let headers: Vec<(String, String)> = action
        .http_headers
        .iter()
        .flatten()
        .map(|h| (h.name.clone(), h.value.clone()))
        .collect();
    let path = action.path.as_deref().unwrap_or("/");
    let secure = action.scheme.as_deref() == Some("HTTPS");
    let status = http::get((address, port).into(), secure, path, &headers).await?;
    if (200..400).contains(&status) {
        Ok(())
    } else {
        Err(format!("HTTP probe failed with statuscode: {status}"))
    }
}

static SESSION: AtomicU64 = AtomicU64::new(1);

/// Runs a command in a container; success is exit code 0. When the future is dropped, the command is killed.
pub(crate) async fn exec(shim: &Shim, container: &str, command: &[String]) -> Result<(), String> {
    let id = format!("probe-{}", SESSION.fetch_add(1, Ordering::Relaxed));
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| e.to_string())?;
    let null = std::fs::File::open("/dev/null").map_err(|e| e.to_string())?;
    let copy = write.try_clone().map_err(|e| e.to_string())?;
    let spec = ExecSpec {
        id: id.clone(),
        container: container.to_owned(),
        argv: command.to_vec(),
        tty: false,
    };
    let guard = KillOnDrop {
        shim: shim.clone(),
        id,
        armed: true,
    };
    let session = shim
        .exec(spec, Some([null.into(), copy, write]))
        .await
        .map_err(|e| e.to_string())?;
    let mut output = tokio::net::unix::pipe::Receiver::from_owned_fd(read).map_err(|e| e.to_string())?;
    let mut text = Vec::new();
    let mut buffer = [0u8; 1024];
    let mut exit = session.exit;
    let exit = loop {
        tokio::select! {
            exit = &mut exit => break exit.map_err(|_| "the pod has ended".to_owned())?,
            count = tokio::io::AsyncReadExt::read(&mut output, &mut buffer) => match count {
                Ok(count) if count > 0 => if text.len() < MAX_OUTPUT { text.extend_from_slice(&buffer[..count]) },
                _ => break (&mut exit).await.map_err(|_| "the pod has ended".to_owned())?,
            },
        }
    };
    guard.disarm();
    if exit.code == 0 {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&text).trim_end().to_owned())
    }
}

struct KillOnDrop {
    shim: Shim,
    id: String,
    armed: bool,
}

impl KillOnDrop {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.armed {
            let (shim, id) = (self.shim.clone(), self.id.clone());
            tokio::spawn(async move {
                // Refused when it has ended meanwhile.
                let _ = shim.signal(&id, 9, false).await;
            });
        }
    }
}
