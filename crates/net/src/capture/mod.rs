//! Traffic capture: what `istio-iptables` means, as one nft table.
//!
//! Called by `mantlet-proxy istio-iptables …` in the init container and by the VM installer. [`Config::from_args`] and
//! [`plan`] are pure; [`apply`] hands the text to `nft -f -`, which the kernel commits as one transaction. The order of
//! the rules is that of Istio's chains (SEMANTICS 5d); it is what makes a call of a pod to its own Service arrive at the
//! inbound listener and the proxy's own traffic leave.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use ipnet::IpNet;

#[cfg(test)]
mod tests;

/// The only table that capture owns.
pub const TABLE: &str = "mantlet_capture";
/// HBONE, never captured.
const HBONE_PORT: u16 = 15008;
/// The source address of connections from the inbound listener to the application.
const PASSTHROUGH_SOURCE: &str = "127.0.0.6";

/// Bad flags, named as on the command line.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
pub enum ConfigError {
    /// A flag that capture does not know.
    #[error("unknown flag {0}; known are -p -z -u -g -m -i -x -b -d -q -o -k -c and their long forms")]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag {0} needs a value")]
    MissingValue(String),
    /// A value that cannot be read.
    #[error("flag {flag}: {value:?} is {problem}")]
    BadValue {
        /// The flag.
        flag: String,
        /// What was given.
        value: String,
        /// Why it does not do.
        problem: &'static str,
    },
}

/// Why rules could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// `nft` could not be started.
    #[error("running nft: {0}; install the package nftables")]
    Start(std::io::Error),
    /// `nft` refused the rules, or has no permission.
    #[error("nft refused the capture rules ({0}); the container needs NET_ADMIN and runs as root")]
    Refused(String),
}

/// All, none or a list: how Istio's include flags read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Selection<T> {
    /// `*`.
    All,
    /// The listed ones; an empty list is none.
    Only(Vec<T>),
}

/// The flags of `istio-iptables`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// `-p`: where outbound connections go.
    pub outbound_port: u16,
    /// `-z`: where inbound connections go.
    pub inbound_port: u16,
    /// `-u`: user ids of the proxy, exempt.
    pub proxy_uids: Vec<u32>,
    /// `-g`: group ids of the proxy, exempt; by default the user ids.
    pub proxy_gids: Vec<u32>,
    /// `-i`: outbound address ranges to capture.
    pub include_ranges: Selection<IpNet>,
    /// `-x`: outbound address ranges not to capture.
    pub exclude_ranges: Vec<IpNet>,
    /// `-b`: inbound ports to capture.
    pub include_inbound_ports: Selection<u16>,
    /// `-d`: inbound ports not to capture; not asked when `-b` is a list.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// `-q`: outbound ports to capture whatever their address.
    pub include_outbound_ports: BTreeSet<u16>,
    /// `-o`: outbound ports not to capture.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// `-k`: interfaces of virtual machines whose traffic counts as outbound.
    pub virtual_interfaces: Vec<String>,
    /// `-c`: interfaces that are left alone.
    pub exclude_interfaces: Vec<String>,
    /// `--drop-invalid`: drop packets that conntrack calls invalid.
    pub drop_invalid: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            proxy_uids: vec![1337],
            proxy_gids: vec![1337],
            include_ranges: Selection::Only(Vec::new()),
            exclude_ranges: Vec::new(),
            include_inbound_ports: Selection::Only(Vec::new()),
            exclude_inbound_ports: BTreeSet::new(),
            include_outbound_ports: BTreeSet::new(),
            exclude_outbound_ports: BTreeSet::new(),
            virtual_interfaces: Vec::new(),
            exclude_interfaces: Vec::new(),
            drop_invalid: false,
        }
    }
}

impl Config {
    /// Reads the flags as the injector writes them; `-p 1`, `-p=1`, `--envoy-port 1` and `--envoy-port=1` are the same.
    ///
    /// # Errors
    /// [`ConfigError`], naming the flag: a typo must stop the pod, not capture less than was asked for.
    pub fn from_args<S: AsRef<str>>(args: &[S]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut gids_given = false;
        let mut args = args.iter().map(AsRef::as_ref);
        while let Some(arg) = args.next() {
            let (flag, inline) = match arg.split_once('=') {
                Some((flag, value)) => (flag, Some(value)),
                None => (arg, None),
            };
            if flag == "--drop-invalid" {
                config.drop_invalid = inline != Some("false");
                continue;
            }
            if !KNOWN.contains(&flag) {
                return Err(ConfigError::UnknownFlag(flag.to_owned()));
            }
            let value = match inline {
                Some(value) => value,
                None => args.next().ok_or_else(|| ConfigError::MissingValue(flag.to_owned()))?,
            };
            // Templates quote empty values for a shell that is not there.
            let value = if value == "\"\"" { "" } else { value };
            match flag {
                "-p" | "--envoy-port" => config.outbound_port = port(flag, value)?,
                "-z" | "--inbound-capture-port" => config.inbound_port = port(flag, value)?,
                "-u" | "--proxy-uid" => config.proxy_uids = ids(flag, value)?,
                "-g" | "--proxy-gid" => {
                    config.proxy_gids = ids(flag, value)?;
                    gids_given = true;
                }
                "-m" | "--istio-inbound-interception-mode" => {
                    if value != "REDIRECT" {
                        return Err(bad(flag, value, "not supported: only REDIRECT is"));
                    }
                }
                "-i" | "--istio-service-cidr" => {
                    config.include_ranges = if value == "*" {
                        Selection::All
                    } else {
                        Selection::Only(ranges(flag, value)?)
                    };
                }
                "-x" | "--istio-service-exclude-cidr" => config.exclude_ranges = ranges(flag, value)?,
                "-b" | "--istio-inbound-ports" => {
                    config.include_inbound_ports = if value == "*" {
                        Selection::All
                    } else {
                        Selection::Only(ports(flag, value)?.into_iter().collect())
                    };
                }
                "-d" | "--istio-local-exclude-ports" => config.exclude_inbound_ports = ports(flag, value)?,
                "-q" | "--istio-outbound-ports" => config.include_outbound_ports = ports(flag, value)?,
                "-o" | "--istio-local-outbound-ports-exclude" => config.exclude_outbound_ports = ports(flag, value)?,
                "-k" | "--kube-virt-interfaces" => config.virtual_interfaces = interfaces(flag, value)?,
                _ => config.exclude_interfaces = interfaces(flag, value)?,
            }
        }
        if !gids_given {
            config.proxy_gids.clone_from(&config.proxy_uids);
        }
        Ok(config)
    }
}

const KNOWN: [&str; 26] = [
    "-p",
    "--envoy-port",
    "-z",
    "--inbound-capture-port",
    "-u",
    "--proxy-uid",
    "-g",
    "--proxy-gid",
    "-m",
    "--istio-inbound-interception-mode",
    "-i",
    "--istio-service-cidr",
    "-x",
    "--istio-service-exclude-cidr",
    "-b",
    "--istio-inbound-ports",
    "-d",
    "--istio-local-exclude-ports",
    "-q",
    "--istio-outbound-ports",
    "-o",
    "--istio-local-outbound-ports-exclude",
    "-k",
    "--kube-virt-interfaces",
    "-c",
    "--istio-exclude-interfaces",
];

fn bad(flag: &str, value: &str, problem: &'static str) -> ConfigError {
    ConfigError::BadValue {
        flag: flag.to_owned(),
        value: value.to_owned(),
        problem,
    }
}

fn items(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn port(flag: &str, value: &str) -> Result<u16, ConfigError> {
    match value.parse() {
        Ok(0) | Err(_) => Err(bad(flag, value, "no port number (1 to 65535)")),
        Ok(port) => Ok(port),
    }
}

fn ports(flag: &str, value: &str) -> Result<BTreeSet<u16>, ConfigError> {
    items(value).map(|item| port(flag, item)).collect()
}

fn ids(flag: &str, value: &str) -> Result<Vec<u32>, ConfigError> {
    let ids: Vec<u32> = items(value)
        .map(|item| item.parse().map_err(|_| bad(flag, item, "no user or group number")))
        .collect::<Result<_, _>>()?;
    if ids.is_empty() {
        Err(bad(flag, value, "empty: the proxy's own traffic would loop"))
    } else {
        Ok(ids)
    }
}

fn ranges(flag: &str, value: &str) -> Result<Vec<IpNet>, ConfigError> {
    items(value)
        .map(|item| {
            item.parse::<IpNet>()
                .or_else(|_| item.parse::<IpAddr>().map(IpNet::from))
                .map(|net| net.trunc())
                .map_err(|_| bad(flag, item, "no address range such as 10.0.0.0/8"))
        })
        .collect()
}

fn interfaces(flag: &str, value: &str) -> Result<Vec<String>, ConfigError> {
    items(value)
        .map(|item| {
            // The name goes into the ruleset's text: only what a name may hold, so it cannot end the quotes.
            let fits = item.len() < 16 && item.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+@".contains(&b));
            if fits {
                Ok(item.to_owned())
            } else {
                Err(bad(flag, item, "no interface name"))
            }
        })
        .collect()
}

/// The ruleset as text for `nft -f`: replaces the table, so that applying twice is the same as once.
#[must_use]
pub fn plan(config: &Config) -> String {
    let mut text = format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    chain(
        &mut text,
        "to_inbound",
        &[format!("meta l4proto tcp redirect to :{}", config.inbound_port)],
    );
    chain(
        &mut text,
        "to_outbound",
        &[format!("meta l4proto tcp redirect to :{}", config.outbound_port)],
    );
    chain(&mut text, "inbound", &inbound_rules(config));
    chain(&mut text, "outbound", &outbound_rules(config));
    chain(&mut text, "prerouting", &prerouting_rules(config));
    let mut output = vec!["type nat hook output priority -100; policy accept;".to_owned()];
    output.extend(
        config
            .exclude_interfaces
            .iter()
            .map(|name| format!("oifname \"{name}\" return")),
    );
    output.push("jump outbound".to_owned());
    chain(&mut text, "output", &output);
    if config.drop_invalid {
        let rules = [
            "type filter hook prerouting priority -150; policy accept;".to_owned(),
            "ct state invalid drop".to_owned(),
        ];
        chain(&mut text, "drop_invalid", &rules);
    }
    text.push_str("}\n");
    text
}

fn chain(text: &mut String, name: &str, rules: &[String]) {
    let _ = writeln!(text, "\tchain {name} {{");
    for rule in rules {
        let _ = writeln!(text, "\t\t{rule}");
    }
    text.push_str("\t}\n");
}

fn port_set(ports: impl IntoIterator<Item = u16>) -> String {
    let list: Vec<String> = ports.into_iter().map(|p| p.to_string()).collect();
    format!("{{ {} }}", list.join(", "))
}

fn to(net: &IpNet) -> String {
    match net {
        IpNet::V4(net) => format!("ip daddr {net}"),
        IpNet::V6(net) => format!("ip6 daddr {net}"),
    }
}

fn prerouting_rules(config: &Config) -> Vec<String> {
    let mut rules = vec!["type nat hook prerouting priority -100; policy accept;".to_owned()];
    rules.extend(
        config
            .exclude_interfaces
            .iter()
            .map(|name| format!("iifname \"{name}\" return")),
    );
    for name in &config.virtual_interfaces {
        rules.extend(
            config
                .exclude_ranges
                .iter()
                .map(|net| format!("iifname \"{name}\" {} return", to(net))),
        );
        match &config.include_ranges {
            Selection::All => rules.push(format!("iifname \"{name}\" meta l4proto tcp goto to_outbound")),
            Selection::Only(nets) => rules.extend(
                nets.iter()
                    .map(|net| format!("iifname \"{name}\" meta l4proto tcp {} goto to_outbound", to(net))),
            ),
        }
        rules.push(format!("iifname \"{name}\" return"));
    }
    if config.include_inbound_ports != Selection::Only(Vec::new()) {
        rules.push("meta l4proto tcp jump inbound".to_owned());
    }
    rules
}

fn inbound_rules(config: &Config) -> Vec<String> {
    let mut rules = vec![format!("tcp dport {HBONE_PORT} return")];
    match &config.include_inbound_ports {
        Selection::All => {
            if !config.exclude_inbound_ports.is_empty() {
                rules.push(format!(
                    "tcp dport {} return",
                    port_set(config.exclude_inbound_ports.iter().copied())
                ));
            }
            rules.push("meta l4proto tcp goto to_inbound".to_owned());
        }
        Selection::Only(ports) if ports.is_empty() => {}
        Selection::Only(ports) => rules.push(format!("tcp dport {} goto to_inbound", port_set(ports.iter().copied()))),
    }
    rules
}

fn outbound_rules(config: &Config) -> Vec<String> {
    let mut rules = Vec::new();
    if !config.exclude_outbound_ports.is_empty() {
        let ports = port_set(config.exclude_outbound_ports.iter().copied());
        rules.push(format!("meta l4proto {{ tcp, udp }} th dport {ports} return"));
    }
    rules.push(format!("oifname \"lo\" ip saddr {PASSTHROUGH_SOURCE} return"));
    rules.push("oifname \"lo\" ip6 saddr ::6 return".to_owned());
    // A range within 127.0.0.0/8 in the include list means that the application's loopback traffic is wanted.
    let loopback_wanted = matches!(&config.include_ranges, Selection::Only(nets) if nets.iter().any(|net| match net {
        IpNet::V4(net) => net.network().is_loopback(),
        IpNet::V6(net) => net.network().is_loopback(),
    }));
    let owners = config
        .proxy_uids
        .iter()
        .map(|id| ("skuid", id))
        .chain(config.proxy_gids.iter().map(|id| ("skgid", id)));
    for (key, id) in owners {
        rules.push(format!(
            "oifname \"lo\" ip daddr != 127.0.0.1 tcp dport != {HBONE_PORT} meta {key} {id} goto to_inbound"
        ));
        rules.push(format!(
            "oifname \"lo\" ip6 daddr != ::1 tcp dport != {HBONE_PORT} meta {key} {id} goto to_inbound"
        ));
        if !loopback_wanted {
            rules.push(format!("oifname \"lo\" meta {key} != {id} return"));
        }
        rules.push(format!("meta {key} {id} return"));
    }
    rules.push("ip daddr 127.0.0.1 return".to_owned());
    rules.push("ip6 daddr ::1 return".to_owned());
    rules.extend(config.exclude_ranges.iter().map(|net| format!("{} return", to(net))));
    if !config.include_outbound_ports.is_empty() {
        rules.push(format!(
            "tcp dport {} goto to_outbound",
            port_set(config.include_outbound_ports.iter().copied())
        ));
    }
    match &config.include_ranges {
        Selection::All => rules.push("meta l4proto tcp goto to_outbound".to_owned()),
        Selection::Only(nets) => {
            rules.extend(
                nets.iter()
                    .map(|net| format!("meta l4proto tcp {} goto to_outbound", to(net))),
            );
        }
    }
    rules
}

/// Installs a ruleset in the network namespace of this process.
///
/// # Errors
/// [`ApplyError`]; nothing is changed then.
pub fn apply(ruleset: &str) -> Result<(), ApplyError> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ApplyError::Start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A broken pipe means that nft has ended with a message, which says more.
        let _ = stdin.write_all(ruleset.as_bytes());
    }
    let output = child.wait_with_output().map_err(ApplyError::Start)?;
    if output.status.success() {
        Ok(())
    } else {
        Err(ApplyError::Refused(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))
    }
}
