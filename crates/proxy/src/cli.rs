//! The command line: pilot-agent's words, so that Istio's injection templates start this program unchanged.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use mantlet_net::capture;
use mantlet_runtime::log::{self, LogOptions};

use crate::process;
use crate::sandbox;
use crate::settings::{ISTIO_VERSION, Role, Settings};

const USAGE: &str = "usage: mantlet-proxy proxy sidecar|router [flags]
       mantlet-proxy istio-iptables [flags]
       mantlet-proxy wait [--timeoutSeconds N] [--periodMillis N] [--url URL]
       mantlet-proxy request GET|POST PATH
       mantlet-proxy version";

/// Flags that take no value.
const SWITCHES: [&str; 4] = ["--log_as_json", "--outlierLogPath", "--help", "--eager"];

/// Runs the command of `arguments` (program name first).
pub fn run(arguments: &[String]) -> ExitCode {
    let rest = arguments.get(1..).unwrap_or_default();
    match rest.first().map(String::as_str) {
        Some("proxy") => proxy(&rest[1..]),
        Some("istio-iptables") => iptables(&rest[1..]),
        Some("wait") => wait(&rest[1..]),
        Some("request") => request(&rest[1..]),
        Some("version") => {
            println!("version.BuildInfo{{Version:\"{ISTIO_VERSION}\"}}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// Positional arguments and flags; flags of Istio that mean nothing here are carried along and ignored.
struct Flags {
    positional: Vec<String>,
    named: Vec<(String, String)>,
}

impl Flags {
    fn parse(arguments: &[String]) -> Self {
        let mut out = Flags {
            positional: Vec::new(),
            named: Vec::new(),
        };
        let mut at = 0;
        while let Some(argument) = arguments.get(at) {
            at += 1;
            if !argument.starts_with('-') {
                out.positional.push(argument.clone());
            } else if let Some((name, value)) = argument.split_once('=') {
                out.named.push((name.to_string(), value.to_string()));
            } else if SWITCHES.contains(&argument.as_str()) {
                out.named.push((argument.clone(), "true".to_string()));
            } else {
                match arguments.get(at) {
                    Some(value) if !value.starts_with('-') => {
                        out.named.push((argument.clone(), value.clone()));
                        at += 1;
                    }
                    _ => out.named.push((argument.clone(), "true".to_string())),
                }
            }
        }
        out
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.named
            .iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }
}

fn fail(message: impl std::fmt::Display) -> ExitCode {
    eprintln!("Error: {message}");
    ExitCode::FAILURE
}

fn proxy(arguments: &[String]) -> ExitCode {
    let flags = Flags::parse(arguments);
    let role = match flags.positional.first().map(String::as_str) {
        Some("sidecar") | None => Role::Sidecar,
        Some("router") => Role::Router,
        Some(other) => return fail(format!("unknown proxy type {other:?}: use sidecar or router")),
    };
    let mut levels = flags.get("--log_output_level").unwrap_or("default:info").to_string();
    if let Some(level) = flags.get("--proxyLogLevel").filter(|l| *l == "debug" || *l == "trace") {
        levels.push_str(&format!(",http:{level},upstream:{level},tls:{level}"));
    }
    let options = LogOptions {
        levels,
        json: flags.get("--log_as_json") == Some("true"),
    };
    let env = |name: &str| match (name, flags.get("--eager")) {
        ("MANTLET_EAGER", Some(flag)) => Some(flag.to_string()),
        _ => std::env::var(name).ok(),
    };
    let settings = match Settings::from_env(role, flags.get("--domain"), &env) {
        Ok(settings) => settings,
        Err(error) => return fail(error),
    };
    // Before the log, which is the first thread: rights are given up by threads, and inherited by those they make.
    let enforced = match sandbox::enter(&settings) {
        Ok(enforced) => enforced,
        Err(error) => {
            return fail(format!(
                "the process cannot give up its rights ({error}); MANTLET_SANDBOX=off starts it with all of them"
            ));
        }
    };
    let log = match log::init(&options) {
        Ok(log) => log,
        Err(error) => return fail(error),
    };
    sandbox::report(enforced);
    match process::run(settings, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

fn iptables(arguments: &[String]) -> ExitCode {
    let config = match capture::Config::from_args(arguments) {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let plan = capture::plan(&config);
    println!("{plan}");
    match capture::apply(&plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

fn local_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// `pilot-agent wait`: returns once the proxy is ready.
fn wait(arguments: &[String]) -> ExitCode {
    let flags = Flags::parse(arguments);
    let url = flags.get("--url").unwrap_or("http://localhost:15021/healthz/ready");
    let number = |name: &str, default: u64| flags.get(name).and_then(|v| v.parse().ok()).unwrap_or(default);
    let limit = Duration::from_secs(number("--timeoutSeconds", 60));
    let period = Duration::from_millis(number("--periodMillis", 500));
    let Some((address, path)) = split_url(url) else {
        return fail(format!("{url:?} is no http URL"));
    };
    let runtime = match local_runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error),
    };
    let end = Instant::now() + limit;
    loop {
        let last = runtime.block_on(process::simple_request("GET", &address, &path));
        match last {
            Ok((200, _)) => return ExitCode::SUCCESS,
            Ok((status, body)) if Instant::now() >= end => {
                return fail(format!("not ready after {limit:?}: {status} {}", body.trim()));
            }
            Err(error) if Instant::now() >= end => return fail(format!("not ready after {limit:?}: {error}")),
            _ => std::thread::sleep(period),
        }
    }
}

fn split_url(url: &str) -> Option<(String, String)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let authority = if authority.contains(':') {
        authority.to_string()
    } else {
        format!("{authority}:80")
    };
    Some((authority, format!("/{path}")))
}

/// `pilot-agent request`: one request to the proxy's admin port.
fn request(arguments: &[String]) -> ExitCode {
    let flags = Flags::parse(arguments);
    let [method, path] = flags.positional.as_slice() else {
        return fail("request wants a method and a path, such as: request GET /stats");
    };
    let port = flags.get("--debug-port").unwrap_or("15000");
    let path = if path.starts_with('/') {
        path.clone()
    } else {
        format!("/{path}")
    };
    let runtime = match local_runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(error),
    };
    match runtime.block_on(process::simple_request(method, &format!("127.0.0.1:{port}"), &path)) {
        Ok((status, body)) => {
            print!("{body}");
            if status < 400 {
                ExitCode::SUCCESS
            } else {
                fail(format!("received unsuccessful status code {status}"))
            }
        }
        Err(error) => fail(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(text: &str) -> Flags {
        Flags::parse(&text.split_whitespace().map(str::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn istios_arguments_are_understood() {
        let f = flags(
            "sidecar --domain shop.svc.cluster.local --proxyLogLevel=warning --proxyComponentLogLevel=misc:error --log_output_level=default:info",
        );
        assert_eq!(f.positional, ["sidecar"]);
        assert_eq!(f.get("--domain"), Some("shop.svc.cluster.local"));
        assert_eq!(f.get("--log_output_level"), Some("default:info"));
        let f = flags("router --log_as_json --domain=x");
        assert_eq!(f.positional, ["router"]);
        assert_eq!(f.get("--domain"), Some("x"));
    }

    #[test]
    fn urls_are_split() {
        assert_eq!(
            split_url("http://localhost:15021/healthz/ready"),
            Some(("localhost:15021".into(), "/healthz/ready".into()))
        );
        assert_eq!(split_url("https://x"), None);
    }
}
