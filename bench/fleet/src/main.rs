//! `make bench-control`: the real `mantletd` against the real embedded API server, with simulated sidecars.
//!
//! `bench-fleet run --mantletd PATH [--sidecars 100,1000] [--services 500,2000] [--modes delta,sotw,on-demand] [--out FILE]` runs every
//! combination in a control plane of its own and prints a table beside istiod's figures and the budgets; see bench/README.md.
//! `bench-fleet apiserver --dir DIR` is the API server's process.

mod apiserver;
mod churn;
mod csr;
mod objects;
mod process;
mod report;
mod sidecar;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};
use mantlet_identity::{TlsIdentity, TrustBundle, tls::mesh_provider};
use mantlet_xds::ResourceType;
use tokio::task::JoinSet;

use objects::Plan;
use report::{Round, percentile};
use sidecar::{Fleet, Identity, Mode, Seen};

/// How long a sidecar waits before it comes back.
const AGAIN: Duration = Duration::from_millis(200);
/// How long anything may take before the run fails.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// The API server's process.
    Apiserver {
        /// Store and kubeconfig.
        #[arg(long)]
        dir: PathBuf,
    },
    /// The measurement.
    Run(Run),
}

#[derive(clap::Args)]
struct Run {
    /// The control plane's program.
    #[arg(long)]
    mantletd: PathBuf,
    /// Numbers of sidecars.
    #[arg(long, value_delimiter = ',', default_value = "100,1000")]
    sidecars: Vec<usize>,
    /// Numbers of services.
    #[arg(long, value_delimiter = ',', default_value = "500,2000")]
    services: Vec<usize>,
    /// Endpoints of a service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Namespaces that services and sidecars are spread over.
    #[arg(long, default_value_t = 20)]
    namespaces: usize,
    /// Protocol variants.
    #[arg(long, value_delimiter = ',', default_value = "delta,sotw,on-demand")]
    modes: Vec<Mode>,
    /// Writes of a policy, of each kind.
    #[arg(long, default_value_t = 40)]
    writes: usize,
    /// Seconds of each load.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Results as JSON.
    #[arg(long)]
    out: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Action::Apiserver { dir } => apiserver::run(&dir).await,
        Action::Run(run) => {
            let mut rounds = Vec::new();
            for services in &run.services {
                let plan = Plan {
                    namespaces: run.namespaces.min(*services),
                    services: *services,
                    endpoints: run.endpoints,
                };
                let cluster = Cluster::start(&plan, *run.sidecars.iter().max().unwrap_or(&1)).await?;
                for sidecars in &run.sidecars {
                    for mode in &run.modes {
                        let round = round(&run, &cluster, plan, *sidecars, *mode).await;
                        let round =
                            round.with_context(|| format!("{services} services, {sidecars} sidecars, {mode:?}"))?;
                        report::print(&round);
                        rounds.push(round);
                    }
                }
            }
            let json = report::json(&rounds);
            match &run.out {
                Some(path) => std::fs::write(path, format!("{json:#}\n"))?,
                None => println!("{json:#}"),
            }
            Ok(())
        }
    }
}

/// A process that ends with us.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The API server with a mesh in it.
struct Cluster {
    dir: tempfile::TempDir,
    client: kube::Client,
    identities: Vec<Identity>,
    /// Turn of the last policy: what one round has left must not pass for what a later one has written.
    policies: AtomicUsize,
    /// The same of endpoints.
    endpoints: Arc<AtomicUsize>,
    _server: Process,
}

impl Cluster {
    async fn start(plan: &Plan, sidecars: usize) -> Result<Cluster> {
        let dir = tempfile::tempdir()?;
        let server = Command::new(std::env::current_exe()?)
            .args(["apiserver", "--dir"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .context("starting the API server")?;
        let mut server = Process(server);
        let path = dir.path().join(apiserver::KUBECONFIG);
        let end = Instant::now() + PATIENCE;
        while !path.exists() {
            anyhow::ensure!(server.0.try_wait()?.is_none(), "the API server has ended");
            anyhow::ensure!(Instant::now() < end, "the API server does not come up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let config = Kubeconfig::read_from(&path)?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        let client = kube::Client::try_from(config)?;
        let began = Instant::now();
        objects::populate(&client, plan).await?;
        eprintln!(
            "{} services, {} pods written in {:.1} s",
            plan.services,
            plan.services * plan.endpoints,
            began.elapsed().as_secs_f64()
        );
        let mut identities = Vec::new();
        for at in 0..sidecars {
            let (service, pod) = (at % plan.services, at / plan.services % plan.endpoints);
            let (namespace, name) = (plan.namespace(service), plan.pod(service, pod));
            let calls = (1..=5).map(|n| {
                let called = (service + n * 7) % plan.services;
                format!("svc-{called:04}.{}.svc.cluster.local", plan.namespace(called))
            });
            identities.push(Identity {
                token: objects::token(&client, &namespace, &name).await?,
                ip: plan.address(service, pod),
                calls: calls.collect(),
                pod: name,
                namespace,
            });
        }
        Ok(Cluster {
            dir,
            client,
            identities,
            policies: AtomicUsize::new(0),
            endpoints: Arc::new(AtomicUsize::new(1)),
            _server: server,
        })
    }
}

/// A running `mantletd`.
struct Control {
    process: Process,
    xds: SocketAddr,
    http: SocketAddr,
    tls: TlsIdentity,
    ready_seconds: f64,
}

impl Control {
    fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Sum of the counters of a name in its metrics.
    async fn counted(&self, name: &str) -> Result<u64> {
        let text = get(self.http, "/metrics").await?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let rest = rest.strip_prefix("_total").unwrap_or(rest);
            (rest.starts_with('{') || rest.starts_with(' ')).then(|| rest.rsplit(' ').next())?
        });
        let mut sum = 0.0;
        for value in values {
            sum += value.trim().parse::<f64>()?;
        }
        Ok(sum as u64)
    }

    /// Fails unless the sidecars have got as many responses as the control plane says that it has sent.
    async fn check_responses(&self, fleet: &Fleet) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let (sent, got) = (
                self.counted("pilot_xds_pushes").await?,
                fleet.responses.load(Ordering::SeqCst),
            );
            if sent == got {
                return Ok(());
            }
            // The last ones may be under way.
            anyhow::ensure!(Instant::now() < end, "{sent} responses were sent, {got} have come");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn start(program: &Path, cluster: &Cluster) -> Result<Control> {
        let log_path = cluster.dir.path().join("mantletd.log");
        let log = std::fs::File::create(&log_path)?;
        let any = "127.0.0.1:0";
        let began = Instant::now();
        let child = Command::new(program)
            .args(["discovery", "--log_output_level", "default:warn,server:info"])
            .args([
                "--grpcAddr",
                any,
                "--secureGRPCAddr",
                any,
                "--httpsAddr",
                any,
                "--monitoringAddr",
                any,
                "--httpAddr",
                any,
            ])
            .env("KUBECONFIG", cluster.dir.path().join(apiserver::KUBECONFIG))
            .env("POD_NAMESPACE", "istio-system")
            .env("POD_NAME", "istiod-fleet")
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut process = Process(child);
        let end = Instant::now() + PATIENCE;
        let (xds, http) = loop {
            let text = std::fs::read_to_string(&log_path)?;
            if let Some(found) = addresses(&text) {
                break found;
            }
            anyhow::ensure!(process.0.try_wait()?.is_none(), "mantletd has ended:\n{text}");
            anyhow::ensure!(Instant::now() < end, "mantletd does not come up:\n{text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        while !ready(http).await {
            anyhow::ensure!(Instant::now() < end, "mantletd does not become ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let ready_seconds = began.elapsed().as_secs_f64();
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "istio-system");
        let root = loop {
            let map = maps.get_opt("istio-ca-root-cert").await?;
            if let Some(root) = map.and_then(|m| m.data?.remove("root-cert.pem")) {
                break root;
            }
            anyhow::ensure!(Instant::now() < end, "no ConfigMap istio-ca-root-cert");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let bundle = TrustBundle::from_pem("root", root.as_bytes())?;
        Ok(Control {
            process,
            xds,
            http,
            tls: TlsIdentity::anonymous(bundle, mesh_provider()),
            ready_seconds,
        })
    }
}

/// Where xDS with TLS and debugging listen, as `mantletd` logs it.
fn addresses(log: &str) -> Option<(SocketAddr, SocketAddr)> {
    let line = log.lines().find(|l| l.contains("xDS on "))?;
    let secure = line.split("xDS on ").nth(1)?.split(" and ").nth(1)?.split(',').next()?;
    let debug = line.split("debug on ").nth(1)?.split_whitespace().next()?;
    Some((secure.trim().parse().ok()?, debug.trim_matches('"').parse().ok()?))
}

async fn ready(address: SocketAddr) -> bool {
    get(address, "/ready").await.is_ok()
}

/// The answer, head and body, of an HTTP server; anything but 200 is an error.
async fn get(address: SocketAddr, path: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    Ok(answer)
}

/// All sidecars of a round.
struct Sidecars {
    fleet: Arc<Fleet>,
    seen: Vec<Arc<Seen>>,
    tasks: JoinSet<()>,
}

impl Sidecars {
    fn connect(&mut self, identities: &[Identity]) {
        for (at, (identity, seen)) in identities.iter().zip(&self.seen).enumerate() {
            let (fleet, identity, seen) = (self.fleet.clone(), identity.clone(), seen.clone());
            seen.synced.store(false, Ordering::SeqCst);
            self.tasks.spawn(async move {
                loop {
                    let outcome = sidecar::run(fleet.clone(), identity.clone(), seen.clone(), at == 0).await;
                    // As a proxy does; the figures say how often.
                    if fleet.again.fetch_add(1, Ordering::SeqCst) == 0 {
                        eprintln!("sidecar {at} comes back: {:?}", outcome.err());
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            });
        }
    }

    async fn synced(&self, what: &str) -> Result<()> {
        let all = || self.seen.iter().all(|s| s.synced.load(Ordering::SeqCst));
        self.fleet.until(what, PATIENCE, all).await
    }
}

async fn round(run: &Run, cluster: &Cluster, plan: Plan, sidecars: usize, mode: Mode) -> Result<Round> {
    let control = Control::start(&run.mantletd, cluster).await?;
    let pid = control.pid();
    let mut out = Round::new(plan, sidecars, mode);
    out.ready_s = control.ready_seconds;
    out.rss_empty_mb = process::memory_mb(pid, "VmRSS")?;
    let identities = &cluster.identities[..sidecars];
    let fleet = Fleet::new(control.xds, control.tls.clone(), mode);
    let mut all = Sidecars {
        seen: identities.iter().map(|_| Arc::default()).collect(),
        tasks: JoinSet::new(),
        fleet: fleet.clone(),
    };

    // First sync.
    let (began, cpu) = (Instant::now(), process::cpu_seconds(pid)?);
    all.connect(identities);
    all.synced("first sync").await?;
    out.first_sync_s = began.elapsed().as_secs_f64();
    out.first_sync_cpu_s = process::cpu_seconds(pid)? - cpu;
    let bytes: u64 = all.seen.iter().map(|s| s.bytes.load(Ordering::Relaxed)).sum();
    out.kb_per_proxy = bytes as f64 / sidecars as f64 / 1e3;
    out.first_sync_peak_mb = process::memory_mb(pid, "VmHWM")?;

    // Policies.
    let own = plan.namespace(0);
    for (namespace, latencies) in [
        (own.as_str(), &mut out.policy_one_ms),
        ("istio-system", &mut out.policy_all_ms),
    ] {
        let affected: Vec<&Arc<Seen>> = identities
            .iter()
            .zip(&all.seen)
            .filter(|(i, _)| namespace == "istio-system" || i.namespace == namespace)
            .map(|(_, s)| s)
            .collect();
        for write in 0..=run.writes {
            let turn = cluster.policies.fetch_add(1, Ordering::SeqCst) + 1;
            let object = objects::policy(namespace, turn);
            let began = Instant::now();
            if write == 0 {
                objects::create_or_apply(&cluster.client, "authorizationpolicies", &object).await?;
            } else {
                objects::apply(&cluster.client, "authorizationpolicies", &object).await?;
            }
            let done = || affected.iter().all(|s| s.policy.load(Ordering::SeqCst) >= turn);
            fleet.until("a policy at all affected proxies", PATIENCE, done).await?;
            if write > 0 {
                latencies.push(began.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    out.rss_mb = process::memory_mb(pid, "VmRSS")?;

    // Endpoints: at a steady rate, then as fast as the API server takes them. On demand the probe knows five services.
    let services: Vec<usize> = match mode {
        Mode::OnDemand => (1..=5).map(|n| n * 7 % plan.services).collect(),
        Mode::Delta | Mode::Sotw => (0..plan.services.min(200)).collect(),
    };
    let steady = churn::run(
        &cluster.client,
        plan,
        &fleet,
        (services.clone(), 4, run.seconds),
        Some(100.0),
        &cluster.endpoints,
    )
    .await?;
    let cpu = process::cpu_seconds(pid)?;
    let began = Instant::now();
    let fast = churn::run(
        &cluster.client,
        plan,
        &fleet,
        (services.clone(), 16, run.seconds),
        None,
        &cluster.endpoints,
    )
    .await?;
    out.churn_cpu = (process::cpu_seconds(pid)? - cpu) / began.elapsed().as_secs_f64();
    out.churn_steady_per_s = steady.events_per_second;
    out.churn_steady_ms = steady.latencies;
    out.churn_per_s = fast.events_per_second;
    out.churn_ms = fast.latencies;
    if mode == Mode::Delta {
        // Everybody ends with what the probe has.
        let same = || {
            services.iter().all(|service| {
                let name = format!(
                    "outbound|80||svc-{service:04}.{}.svc.cluster.local",
                    plan.namespace(*service)
                );
                let wanted = all.seen[0].version(ResourceType::Endpoints, &name);
                all.seen
                    .iter()
                    .all(|s| s.version(ResourceType::Endpoints, &name) == wanted)
            })
        };
        fleet
            .until("all sidecars hold the last endpoints", PATIENCE, same)
            .await?;
    }

    control.check_responses(&fleet).await?;

    // Certificates.
    let signed;
    (out.csr_per_s, out.csr_cpu_ms, signed) = csr::run(&fleet, identities, pid, run.seconds).await?;
    let issued = control.counted("citadel_server_success_cert_issuance_count").await?;
    anyhow::ensure!(
        issued == signed,
        "{issued} certificates were issued, {signed} have come"
    );

    // All drop and come back.
    all.tasks.shutdown().await;
    process::forget_peak(pid);
    let (began, cpu) = (Instant::now(), process::cpu_seconds(pid)?);
    all.connect(identities);
    all.synced("all sidecars are back").await?;
    out.storm_s = began.elapsed().as_secs_f64();
    out.storm_cpu_s = process::cpu_seconds(pid)? - cpu;
    out.storm_peak_mb = process::memory_mb(pid, "VmHWM")?;
    out.rss_end_mb = process::memory_mb(pid, "VmRSS")?;
    out.again = fleet.again.load(Ordering::SeqCst);
    out.load_average = process::load_average();
    control.check_responses(&fleet).await?;
    all.tasks.shutdown().await;
    out.policy_one_ms.sort_by(f64::total_cmp);
    anyhow::ensure!(percentile(&out.policy_all_ms, 0.5) > 0.0, "no policy was measured");
    Ok(out)
}
