//! `cluster up`, `down`, `status`, `logs`: what the command line does on the host's side.

use std::io::{BufRead, BufReader, Seek};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use mantlet_net::sockopt::{ListenOptions, listen_tcp};

use super::paths::Paths;
use super::protocol::{Progress, Start};
use super::{Answer, broker, control, kubeconfig, pki, ports, preflight};

/// Port of the API when it is free and nothing else is asked for.
const DEFAULT_PORT: u16 = 6443;
/// A cluster that is not up by then has a problem that waiting does not solve.
const UP_LIMIT: Duration = Duration::from_secs(60);
/// The log is cut to its last part by `up` when it has grown over this.
const LOG_LIMIT: u64 = 64 << 20;

/// Starts the cluster unless it runs, and makes its context current.
pub(super) fn up(paths: &Paths, kubeconfig: Option<PathBuf>, port: Option<u16>) -> Result<Answer> {
    let begin = Instant::now();
    let mut settings = paths.settings()?;
    let config = match kubeconfig {
        Some(path) => std::path::absolute(path)?,
        None => kubeconfig::default_path()?,
    };
    kubeconfig::check(&config)?;
    if let Some(running) = control::status(paths)? {
        if port.is_some_and(|port| port != running.port) {
            bail!(
                "cluster {:?} runs on port {} already; stop it first: mantlet cluster down --name {}",
                paths.name,
                running.port,
                paths.name
            );
        }
        let pki = pki::load(&paths.pki())?;
        write_context(paths, &mut settings, &config, running.port, &pki)?;
        return Ok(Answer::ok(format!(
            "Cluster {:?} is running already. Context \"{}\" is current in {}.\n{}",
            paths.name,
            paths.context(),
            config.display(),
            ports::note(&config, paths)
        )));
    }
    preflight::check()?;
    make_private_dir(&paths.dir)?;
    let listener = bind(paths, port, settings.port)?;
    let port = listener.local_addr()?.port();
    let pki = pki::ensure(&paths.pki(), time::OffsetDateTime::now_utc())?;
    settings.port = Some(port);
    paths.save(&settings)?;
    start_broker(paths, port, listener)?;
    write_context(paths, &mut settings, &config, port, &pki)?;
    verify(&config, &paths.context()).inspect_err(|_| {
        let _ = control::stop(paths);
    })?;
    Ok(Answer::ok(format!(
        "Cluster {:?} is up after {:.1} s: https://127.0.0.1:{port}\nContext \"{}\" is current in {}.\n{}",
        paths.name,
        begin.elapsed().as_secs_f64(),
        paths.context(),
        config.display(),
        ports::note(&config, paths)
    )))
}

fn make_private_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("making the state directory {}", dir.display()))
}

/// The API's listener: on the port asked for, the port of the last time, 6443, or any.
fn bind(paths: &Paths, asked: Option<u16>, last: Option<u16>) -> Result<TcpListener> {
    let open = |port| listen_tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), ListenOptions::default());
    if let Some(port) = asked {
        return open(port).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => anyhow::anyhow!(
                "127.0.0.1:{port} is in use{}; choose another port with --port, or leave --port out to get a free one",
                owner_of(paths, port)
            ),
            std::io::ErrorKind::PermissionDenied => {
                anyhow::anyhow!("port {port} is reserved for root; choose one above 1023 with --port")
            }
            _ => anyhow::anyhow!("cannot listen on 127.0.0.1:{port}: {error}"),
        });
    }
    for port in last.into_iter().chain([DEFAULT_PORT, 0]) {
        match open(port) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("cannot listen on 127.0.0.1:{port}")),
        }
    }
    bail!("no free port on 127.0.0.1")
}

/// ` by cluster "x"`, when another cluster of this user has the port.
fn owner_of(paths: &Paths, port: u16) -> String {
    let siblings = paths.dir.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    for entry in siblings.into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let other = Paths {
            name: name.clone(),
            dir: entry.path(),
        };
        if let Ok(Some(status)) = control::status(&other)
            && status.port == port
        {
            return format!(" by cluster {name:?}");
        }
    }
    String::new()
}

fn start_broker(paths: &Paths, port: u16, listener: TcpListener) -> Result<()> {
    let log_path = paths.log();
    trim_log(&log_path)?;
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("opening {}", log_path.display()))?;
    let start = Start {
        name: paths.name.clone(),
        dir: paths.dir.clone(),
        port,
    };
    let mut broker = Command::new(std::env::current_exe()?)
        .arg(broker::SUBCOMMAND)
        .arg(serde_json::to_string(&start)?)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .current_dir("/")
        .spawn()
        .context("starting the broker")?;
    let stdout = broker.stdout.take().context("the broker's output")?;
    let (sender, progress) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(read.map(|_| line));
    });
    let line = match progress.recv_timeout(UP_LIMIT) {
        Ok(line) => line.context("reading from the broker")?,
        Err(_) => {
            let _ = control::stop(paths);
            let _ = broker.kill();
            bail!(
                "the cluster is not up after {} s; see {}",
                UP_LIMIT.as_secs(),
                log_path.display()
            );
        }
    };
    match serde_json::from_str(&line) {
        Ok(Progress::Ready) => Ok(()),
        Ok(Progress::Failed(reason)) => bail!("{reason}{}", tail_of(&log_path)),
        Err(_) => bail!("the broker ended without a word{}", tail_of(&log_path)),
    }
}

/// The end of the log as part of an error message.
fn tail_of(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().rev().take(5).collect();
    if lines.is_empty() {
        return String::new();
    }
    let lines: Vec<_> = lines.into_iter().rev().collect();
    format!("\nLast lines of {}:\n  {}", path.display(), lines.join("\n  "))
}

fn trim_log(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > LOG_LIMIT => {
            let old = path.with_extension("log.1");
            std::fs::rename(path, &old).with_context(|| format!("moving {} away", path.display()))
        }
        _ => Ok(()),
    }
}

fn write_context(
    paths: &Paths,
    settings: &mut super::paths::Settings,
    config: &Path,
    port: u16,
    pki: &pki::Pki,
) -> Result<()> {
    let context = paths.context();
    if let Some(other) = settings.kubeconfig.as_deref().filter(|other| *other != config) {
        // The context moves; the old file must not keep a dead one.
        if let Err(error) = kubeconfig::remove(other, &context, settings.former_context.as_deref()) {
            eprintln!(
                "warning: the context {context:?} stays in {}: {error:#}",
                other.display()
            );
        }
        settings.former_context = None;
    }
    let access = kubeconfig::Access {
        context: &context,
        server: &format!("https://127.0.0.1:{port}"),
        ca_cert: &pki.ca_cert,
        cert: &pki.admin_cert,
        key: &pki.admin_key,
    };
    let former = kubeconfig::add(config, &access)?;
    settings.former_context = former.or(settings.former_context.take());
    settings.kubeconfig = Some(config.to_owned());
    paths.save(settings)
}

/// Asks the cluster as any client does: over TLS, with what the kubeconfig says.
fn verify(config: &Path, context: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime
        .block_on(async {
            let client = ports::client(config, context).await?;
            let check = async {
                let request = http::Request::get("/readyz").body(Vec::new())?;
                client.request_text(request).await?;
                let nodes: Api<Node> = Api::all(client.clone());
                nodes.get("mantlet").await?;
                anyhow::Ok(())
            };
            tokio::time::timeout(Duration::from_secs(10), check)
                .await
                .context("the API does not answer")?
        })
        .context("the cluster runs, but cannot be used with its kubeconfig")
}

/// Stops the cluster and takes its context away.
pub(super) fn down(paths: &Paths, purge: bool) -> Result<Answer> {
    let ran = control::stop(paths)?;
    let mut settings = paths.settings()?;
    if let Some(config) = settings.kubeconfig.take() {
        kubeconfig::remove(&config, &paths.context(), settings.former_context.as_deref())?;
        settings.former_context = None;
        paths.save(&settings)?;
    }
    let mut text = if ran {
        format!("Cluster {:?} is stopped.\n", paths.name)
    } else {
        format!("Cluster {:?} was not running.\n", paths.name)
    };
    if purge && paths.dir.exists() {
        remove_state(&paths.dir)?;
        text.push_str("Its objects, keys and logs are deleted.\n");
    }
    Ok(Answer::ok(text))
}

/// Deletes the state directory. Pods' files belong to subordinate ids, which only the sandbox may touch.
fn remove_state(dir: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() && dir.join("pods").exists() {
        use mantlet_node::sandbox;
        let program = std::env::current_exe()?;
        let config = sandbox::SandboxConfig {
            state_dir: dir.to_owned(),
            program: "/bin/rm".into(),
            args: ["-rf", "--"]
                .into_iter()
                .map(str::to_owned)
                .chain([format!("{}/pods", dir.display())])
                .collect(),
            read_only_dirs: Vec::new(),
        };
        let status = sandbox::command(&program, &config)?
            .env("PATH", preflight::search_path())
            .stdin(Stdio::null())
            .status()?;
        if !status.success() {
            bail!("the pods' files below {} could not be deleted", dir.display());
        }
    }
    std::fs::remove_dir_all(dir).with_context(|| format!("deleting {}", dir.display()))
}

/// Whether the cluster runs; exit code 1 when it does not.
pub(super) fn status(paths: &Paths, json: bool) -> Result<Answer> {
    let status = control::status(paths)?;
    let code = u8::from(status.is_none());
    if json {
        let value = match &status {
            Some(status) => serde_json::to_value(status)?,
            None => serde_json::json!({"name": paths.name, "ready": false}),
        };
        return Ok(Answer {
            text: format!("{value:#}\n"),
            code,
        });
    }
    let text = match status {
        Some(status) => format!(
            "Cluster:  {}\nState:    {}\nAPI:      https://127.0.0.1:{}\nContext:  {}\nDir:      {}\nUptime:   {} s\n",
            status.name,
            if status.ready { "running" } else { "starting" },
            status.port,
            paths.context(),
            paths.dir.display(),
            status.uptime_seconds
        ),
        None => format!("Cluster {:?} is not running.\n", paths.name),
    };
    Ok(Answer { text, code })
}

/// The log, or its end; with `follow` until interrupted.
pub(super) fn logs(paths: &Paths, follow: bool, tail: Option<usize>) -> Result<Answer> {
    use std::os::unix::process::CommandExt;
    let path = paths.log();
    let mut file = std::fs::File::open(&path)
        .with_context(|| format!("cluster {:?} has no log yet: {}", paths.name, path.display()))?;
    if follow {
        let lines = tail.map_or_else(|| "+1".to_owned(), |lines| lines.to_string());
        let error = Command::new("tail").args(["-n", &lines, "-F"]).arg(&path).exec();
        return Err(error).context("running tail");
    }
    file.rewind()?;
    let text = std::io::read_to_string(file).context("reading the log")?;
    let skip = tail.map_or(0, |lines| text.lines().count().saturating_sub(lines));
    Ok(Answer::ok(
        text.lines()
            .skip(skip)
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    ))
}
