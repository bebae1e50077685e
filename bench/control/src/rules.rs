//! What a decision costs against the number of rules: the same filters for the engine alone and, as listeners, for
//! proxies.
//!
//! Every filter is an ALLOW filter of N distinct rules of one form, of which only the one in the middle matches the
//! request that is allowed; the request that is denied differs from it in the path.

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mantlet_model::authz::{Action, Attribute, AuthzFilter, Engine, Expr, HttpSample, Matcher, Rule, Sample, Verdict};
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, PathNormalization, RouteSource};
use mantlet_model::listener::Filters;
use mantlet_model::names::Direction;
use mantlet_model::route::{Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::snapshot::ProxySnapshot;
use serde_json::{Value, json};

use crate::resources::listener;

/// Forms of a rule. The first two have conditions that the engine indexes, the others have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// This caller, this path.
    Exact,
    /// This caller, paths below this one.
    Prefix,
    /// Paths that match an expression.
    Regex,
    /// Not below this path, not this caller.
    Negation,
}

/// All filters.
const FILTERS: [(Form, &str, &[usize]); 4] = [
    (Form::Exact, "exact", &[1, 10, 1_000, 10_000]),
    (Form::Prefix, "prefix", &[1, 10, 1_000, 10_000]),
    (Form::Regex, "regex", &[10, 1_000]),
    (Form::Negation, "negation", &[10, 1_000]),
];

/// The path that no rule admits.
const DENIED: &str = "/team-none/items/7";
/// The header that names the caller where connections are plaintext.
const CALLER: &str = "x-caller";
/// Slices of a measurement; the median is reported.
pub(crate) const SLICES: u32 = 5;

/// How rules know their caller.
#[derive(Clone, Copy, Debug)]
enum By {
    Identity,
    Header,
}

impl By {
    fn is(self, team: &str) -> Expr {
        match self {
            By::Identity => Expr::atom(Attribute::PeerUri, Matcher::Exact(identity(team))),
            By::Header => Expr::atom(Attribute::Header(CALLER.to_owned()), Matcher::Exact(team.to_owned())),
        }
    }
}

fn identity(team: &str) -> String {
    format!("spiffe://cluster.local/ns/{team}/sa/app")
}

/// The team whose rule is in the middle.
fn middle(count: usize) -> String {
    format!("team-{}", count / 2)
}

fn allowed_path(count: usize) -> String {
    format!("/{}/items/7", middle(count))
}

fn filter(form: Form, count: usize, by: By) -> AuthzFilter {
    let path = |matcher| Expr::atom(Attribute::Path, matcher);
    let expr = |i: usize| {
        let team = format!("team-{i}");
        match form {
            Form::Exact => Expr::And(vec![by.is(&team), path(Matcher::Exact(format!("/{team}/items/7")))]),
            Form::Prefix => Expr::And(vec![by.is(&team), path(Matcher::Prefix(format!("/{team}/")))]),
            Form::Regex => path(Matcher::Regex(format!("/{team}/[a-z]+/[0-9]+"))),
            Form::Negation => {
                let (closed, caller) = match i == count / 2 {
                    true => ("/team-none", "nobody".to_owned()),
                    false => ("/team-", team),
                };
                Expr::And(vec![
                    path(Matcher::Prefix(closed.to_owned())).not(),
                    by.is(&caller).not(),
                ])
            }
        }
    };
    let rule = |i| Rule {
        id: format!("ns[bench]-policy[rules]-rule[{i:05}]"),
        expr: expr(i),
    };
    AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: (0..count).map(rule).collect(),
        shadow: Vec::new(),
    }
}

/// Measures [`Engine::decide`] on one core: for each filter an allowed and a denied request, `slice` of processor time
/// per slice.
pub(crate) fn decisions(slice: Duration) -> Result<Value> {
    let mut out = Vec::new();
    for (form, name, counts) in FILTERS {
        for &count in counts {
            let engine = Engine::new(&[filter(form, count, By::Identity)]);
            let (rules, residual) = engine.size();
            let indexed = matches!(form, Form::Exact | Form::Prefix);
            ensure!(
                rules == count && residual == if indexed { 0 } else { count },
                "{name}: {residual} of {rules} rules are in no index"
            );
            for (path, verdict) in [
                (allowed_path(count), Verdict::Allowed),
                (DENIED.to_owned(), Verdict::Denied),
            ] {
                let request = Sample {
                    peer: vec![identity(&middle(count))],
                    http: Some(HttpSample {
                        host: "app.bench".to_owned(),
                        path,
                        ..HttpSample::default()
                    }),
                    ..Sample::default()
                };
                let ns = nanoseconds(&engine, &request, verdict, slice)?;
                out.push(json!({
                    "form": name, "rules": count, "residual": residual,
                    "allowed": verdict == Verdict::Allowed,
                    "ns_per_decision": (ns * 10.0).round() / 10.0, "decisions_per_second": (1e9 / ns).round(),
                }));
            }
        }
    }
    Ok(Value::Array(out))
}

/// Median over slices that are long enough.
fn nanoseconds(engine: &Engine, request: &Sample, verdict: Verdict, slice: Duration) -> Result<f64> {
    let mut batch = 64;
    while run(engine, request, verdict, batch)? < slice {
        batch *= 2;
    }
    let mut slices = (0..SLICES)
        .map(|_| run(engine, request, verdict, batch))
        .collect::<Result<Vec<_>>>()?;
    slices.sort();
    Ok(slices[slices.len() / 2].as_nanos() as f64 / f64::from(batch))
}

/// Processor time of so many decisions, which must all be this one.
fn run(engine: &Engine, request: &Sample, verdict: Verdict, times: u32) -> Result<Duration> {
    let (connection, view) = (request.connection(), request.view());
    let begin = processor_time()?;
    let right = (0..times)
        .filter(|_| engine.decide(black_box(&connection), black_box(view)).verdict == verdict)
        .count();
    let spent = processor_time()? - begin;
    ensure!(
        right == times as usize,
        "only {right} of {times} decisions are {verdict:?}"
    );
    Ok(spent)
}

/// Time that this thread has had a processor, to the nanosecond.
fn processor_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let first = text.split_whitespace().next().context("empty schedstat")?;
    Ok(Duration::from_nanos(first.parse()?))
}

/// A listener for each filter, on ports from `first` on. Each answers by itself.
pub(crate) fn snapshot(server: IpAddr, first: u16) -> ProxySnapshot {
    let mut out = ProxySnapshot::default();
    for (port, (form, name, count)) in (first..).zip(each()) {
        let name = format!("{name}_{count}");
        let filters = answer(&name, filter(form, count, By::Header));
        let listener = listener(name, SocketAddr::new(server, port), Direction::Inbound, None, filters);
        out.listeners.insert(listener.name.clone(), Arc::new(listener));
    }
    out
}

/// What the load generator has to know of [`snapshot`].
pub(crate) fn requests(first: u16) -> Value {
    let one = |(port, (_, name, count)): (u16, (Form, &str, usize))| {
        json!({
            "form": name, "rules": count, "port": port, "header": format!("{CALLER}: {}", middle(count)),
            "allowed": allowed_path(count), "denied": DENIED,
        })
    };
    (first..).zip(each()).map(one).collect()
}

fn each() -> impl Iterator<Item = (Form, &'static str, usize)> {
    FILTERS
        .into_iter()
        .flat_map(|(form, name, counts)| counts.iter().map(move |&count| (form, name, count)))
}

fn answer(name: &str, authz: AuthzFilter) -> Filters {
    let route = Route {
        name: "default".to_owned(),
        matches: RouteMatch::default(),
        action: RouteAction::Respond {
            status: 200,
            body: "ok".to_owned(),
        },
        decorator: String::new(),
        request_headers: Vec::new(),
        response_headers: Vec::new(),
    };
    let table = RouteTable {
        name: name.to_owned(),
        hosts: vec![Arc::new(VirtualHost {
            name: "any".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            attempt_count: false,
        })],
        ignore_port_in_host: false,
        on_demand: false,
    };
    Filters::Http(Box::new(HttpManager {
        stat_prefix: name.to_owned(),
        codec: Codec::Auto,
        routes: RouteSource::Inline(Box::new(table)),
        normalization: PathNormalization::Base,
        forwarded_client_cert: ForwardedClientCert::Sanitize,
        use_remote_address: false,
        trusted_hops: 0,
        server_name: "istio-envoy".to_owned(),
        generate_request_id: false,
        websocket: true,
        stream_idle_timeout_ms: 0,
        jwt: None,
        custom: Vec::new(),
        authz: vec![authz],
        istio_alpn: false,
        telemetry: None,
        access_log: None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mantlet_xds::{Dialect, Options, ResourceSet};

    #[test]
    fn every_filter_decides_as_it_says_and_can_be_sent() {
        assert!(decisions(Duration::from_micros(1)).is_ok());
        let snapshot = snapshot("10.99.0.2".parse().unwrap(), 47_000);
        assert!(snapshot.dangling().is_empty());
        assert_eq!(snapshot.listeners.len(), requests(47_000).as_array().unwrap().len());
        for dialect in [Dialect::Istio, Dialect::PlainEnvoy] {
            assert!(!ResourceSet::new(&snapshot, Vec::new(), &Options::new(dialect), None).is_empty());
        }
    }
}
