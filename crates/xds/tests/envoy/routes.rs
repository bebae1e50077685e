//! Envoy chooses the virtual host and route that `CompiledRoutes` chooses.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mantlet_model::route::{
    CompiledRoutes, HeaderChange, HeaderMatch, PathMatch, Route, RouteAction, RouteMatch, RouteRequest, RouteTable,
    StringMatch, VirtualHost,
};
use mantlet_model::{ProxySnapshot, Secret};
use mantlet_testkit::programs::program;
use mantlet_xds::{Dialect, Options, ResourceSet, ResourceType};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::launch::{Running, ports};

#[derive(Clone, Debug)]
struct Request {
    authority: &'static str,
    method: &'static str,
    path: &'static str,
    query: Option<&'static str>,
    headers: Vec<(&'static str, &'static str)>,
}

impl RouteRequest for Request {
    fn authority(&self) -> &str {
        self.authority
    }
    fn path(&self) -> &str {
        self.path
    }
    fn query(&self) -> Option<&str> {
        self.query
    }
    fn header(&self, name: &str) -> Vec<&str> {
        match name {
            ":method" => vec![self.method],
            ":authority" => vec![self.authority],
            _ => self
                .headers
                .iter()
                .filter(|(n, _)| *n == name)
                .map(|(_, v)| *v)
                .collect(),
        }
    }
}

fn request() -> impl Strategy<Value = Request> {
    let select = |values: &'static [&'static str]| prop::sample::select(values);
    let headers = prop::sample::select(vec![
        vec![],
        vec![("x-v", "1")],
        vec![("x-v", "2")],
        vec![("x-v", "1"), ("x-v", "2")],
        vec![("x-v", "")],
    ]);
    (
        select(&[
            "web",
            "WEB:80",
            "web.a.com",
            "x.a.com",
            ".a.com",
            "a.com:8080",
            "api.b",
            "api.",
            "other",
            "[fd00::1]:80",
        ]),
        select(&["GET", "POST"]),
        select(&["/", "/a", "/ab", "/a/b", "/a/", "/r/12", "/r/12/x", "/q", "/h", "/A"]),
        prop::option::of(select(&["k=v", "k=w", "x=1&k=v1", "k", "k=w&k=v", ""])),
        headers,
    )
        .prop_map(|(authority, method, path, query, headers)| Request {
            authority,
            method,
            path,
            query,
            headers,
        })
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        prop::sample::select(vec!["1", "v", "1,2", "w", "GET"]).prop_map(|s| StringMatch::Exact(s.into())),
        prop::sample::select(vec!["1", "v", "P"]).prop_map(|s| StringMatch::Prefix(s.into())),
        prop::sample::select(vec!["[0-9]+", "v.*", "(1|2)(,2)?"]).prop_map(|s| StringMatch::Regex(s.into())),
    ]
}

/// Mostly none, or the routes would hardly be taken.
fn few<T: Clone + std::fmt::Debug>(one: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop::option::weighted(0.3, one).prop_map(|one| one.into_iter().collect())
}

fn route_match() -> impl Strategy<Value = RouteMatch> {
    let path = prop_oneof![
        prop::sample::select(vec!["/", "/a", "/a/", "/h"]).prop_map(|s| PathMatch::Prefix(s.into())),
        prop::sample::select(vec!["/a", "/r/12"]).prop_map(|s| PathMatch::SegmentPrefix(s.into())),
        prop::sample::select(vec!["/a", "/ab", "/q"]).prop_map(|s| PathMatch::Exact(s.into())),
        prop::sample::select(vec!["/r/[0-9]+", "/[a-z]", ".*b"]).prop_map(|s| PathMatch::Regex(s.into())),
    ];
    let name = prop::sample::select(vec!["x-v", ":method"]);
    let header =
        (name, prop::option::of(string_match()), any::<bool>()).prop_map(|(name, value, invert)| HeaderMatch {
            name: name.into(),
            value,
            invert,
        });
    let query = ("k", string_match());
    (path, few(header), few(query)).prop_map(|(path, headers, query)| RouteMatch {
        path,
        headers,
        query,
        claims: vec![],
    })
}

/// A table whose routes answer with their own name.
fn table(runner: &mut TestRunner, index: usize) -> RouteTable {
    let domains = [
        vec!["web", "web.a.com"],
        vec!["*.a.com", "a.com"],
        vec!["api.*", "[fd00::1]"],
        vec!["*"],
    ];
    // Every second table has no catch-all host.
    let domains = domains.into_iter().take(4 - index % 2).enumerate();
    let hosts = domains.map(|(host, domains)| {
        let matches = prop::collection::vec(route_match(), 1..5)
            .new_tree(runner)
            .unwrap()
            .current();
        let routes = matches.into_iter().enumerate().map(|(route, matches)| Route {
            name: format!("t{index}h{host}r{route}"),
            matches,
            action: RouteAction::Respond {
                status: 200,
                body: format!("t{index}h{host}r{route}"),
            },
            decorator: String::new(),
            request_headers: vec![],
            response_headers: vec![HeaderChange::Set("x-route".into(), format!("{route}"))],
        });
        VirtualHost {
            name: format!("h{host}"),
            domains: domains.into_iter().map(String::from).collect(),
            routes: routes.collect(),
            attempt_count: false,
        }
    });
    RouteTable {
        name: format!("t{index}"),
        hosts: hosts.map(Arc::new).collect(),
        ignore_port_in_host: !index.is_multiple_of(3),
        on_demand: false,
    }
}

/// Status and body.
fn send(request: &Request, port: u16) -> Result<(u16, String), i32> {
    let mut curl = Command::new(program("curl"));
    curl.args([
        "-s",
        "-w",
        "\n%{http_code}",
        "--max-time",
        "10",
        "--path-as-is",
        "-g",
        "-X",
        request.method,
    ]);
    curl.arg("-H").arg(format!("host: {}", request.authority));
    for (name, value) in &request.headers {
        curl.arg("-H").arg(if value.is_empty() {
            format!("{name};")
        } else {
            format!("{name}: {value}")
        });
    }
    let query = request.query.map(|q| format!("?{q}")).unwrap_or_default();
    curl.arg(format!("http://127.0.0.1:{port}{}{query}", request.path));
    let out = curl.output().unwrap();
    match out.status.code() {
        Some(0) => {
            let text = String::from_utf8(out.stdout).unwrap();
            let (body, code) = text.rsplit_once('\n').unwrap();
            Ok((code.parse().unwrap(), body.to_string()))
        }
        code => Err(code.unwrap_or(-1)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_routes_as_the_model_does() {
    const TABLES: usize = 24;
    const REQUESTS: usize = 25;
    let dir = tempfile::tempdir().unwrap();
    let mut runner = TestRunner::deterministic();
    let ports = ports(TABLES);
    let mut snapshot = ProxySnapshot::default();
    let mut tables = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let table = Arc::new(table(&mut runner, index));
        tables.push(table.clone());
        let mut listener = super::listener(format!("l{index}"), *port, vec![], Path::new("/dev/null"));
        // Plaintext by RDS only.
        listener.chains.remove(0);
        let mantlet_model::listener::Filters::Http(http) = &mut listener.chains[0].filters else {
            unreachable!("HTTP chains only");
        };
        http.jwt = None;
        http.routes = mantlet_model::http::RouteSource::Named(table.name.clone());
        snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
        snapshot.routes.insert(table.name.clone(), table);
    }
    let options = Options::new(Dialect::PlainEnvoy);
    let set = ResourceSet::new(&snapshot, Vec::<Arc<Secret>>::new(), &options, None);
    let mut running = Running::start(dir.path(), set, false).await;
    running
        .all_accepted(&[ResourceType::Listener, ResourceType::Routes])
        .await;

    let (mut found, mut missed) = (0, 0);
    for (table, port) in tables.iter().zip(&ports) {
        let compiled = CompiledRoutes::new(table.clone());
        let up = || async { tokio::net::TcpStream::connect(("127.0.0.1", *port)).await.map(drop) };
        mantlet_testkit::wait::eventually("listener", Duration::from_secs(20), up).await;
        for _ in 0..REQUESTS {
            let request = request().new_tree(&mut runner).unwrap().current();
            let expected = match compiled.select(&request) {
                Some((_, route)) => (200, route.name.clone()),
                None => (404, String::new()),
            };
            found += usize::from(expected.0 == 200);
            missed += usize::from(expected.0 == 404);
            assert_eq!(send(&request, *port), Ok(expected), "{table:#?}\n{request:#?}");
        }
    }
    println!("{found} routed, {missed} not found");
    assert!(found > 100 && missed > 100, "{found} {missed}: too one-sided to tell");
    running.stop();
}
