//! Configuration at first use, through sockets: what is asked for, what passes without being asked for, what waits, what fails, and what
//! is given up again. The control plane's end is the one that `mantletd` uses.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::agent::{Agent, outbound};
use common::control::{resources, serve};
use common::*;
use mantlet_model::cluster::Discovery;
use mantlet_model::endpoint::Endpoints;
use mantlet_model::listener::{ChainMatch, FilterChain, Filters, TcpManager};
use mantlet_model::names::ClusterName;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::{SharedMap, SharedSnapshot};
use mantlet_testkit::{EchoServer, eventually};
use mantlet_xds::{Dialect, Encoder, Options, ResourceSet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Address of the TCP service.
const TCP: ([u8; 4], u16) = ([10, 97, 0, 1], 5432);
/// Address of an HTTP service.
const HTTP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);

/// A mesh with so many HTTP services, all served by one application, and a TCP service.
fn mesh(out: &Outbound, services: usize) -> ProxySnapshot {
    let mut snapshot = out.snapshot();
    let web = out.cluster_name();
    let mut table_80 = (*snapshot.routes["80"]).clone();
    // The service of the fixture has an address, too.
    Arc::make_mut(&mut table_80.hosts[0]).domains.push("10.96.0.20".into());
    for n in 0..services {
        let host = format!("svc-{n}.default.svc.cluster.local");
        let name = ClusterName::outbound(80, "", &host).to_string();
        let mut cluster = (*snapshot.clusters[&web]).clone();
        cluster.name = name.clone();
        cluster.discovery = Discovery::Eds { service: name.clone() };
        let endpoints = Endpoints {
            cluster: name.clone(),
            ..(*snapshot.endpoints[&web]).clone()
        };
        let vip = format!("10.98.{}.{}", n / 250, n % 250 + 1);
        let domains = [&*host, &format!("svc-{n}"), &vip];
        let fresh = table("80", &domains, forward_to(&name, None)).hosts;
        table_80.hosts.splice(0..0, fresh);
        snapshot.clusters.insert(name.clone(), Arc::new(cluster));
        snapshot.endpoints.insert(name, Arc::new(endpoints));
    }
    snapshot.routes.insert("80".into(), Arc::new(table_80));
    let database = ClusterName::outbound(5432, "", "db.default.svc.cluster.local").to_string();
    let mut cluster = (*snapshot.clusters[&web]).clone();
    cluster.name = database.clone();
    cluster.discovery = Discovery::Eds {
        service: database.clone(),
    };
    let endpoints = Endpoints {
        cluster: database.clone(),
        ..(*snapshot.endpoints[&web]).clone()
    };
    let mut listener = (*snapshot.listeners["0.0.0.0_80"]).clone();
    listener.name = "10.97.0.1_5432".into();
    listener.address = TCP.into();
    listener.default_chain = Some(FilterChain {
        name: database.clone(),
        matches: ChainMatch::default(),
        tls: None,
        filters: Filters::Tcp(TcpManager {
            stat_prefix: database.clone(),
            custom: Vec::new(),
            authz: Vec::new(),
            cluster: database.clone(),
            idle_timeout_ms: None,
            telemetry: true,
        }),
    });
    snapshot.clusters.insert(database.clone(), Arc::new(cluster));
    snapshot.endpoints.insert(database, Arc::new(endpoints));
    snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
    snapshot
}

/// As `mantletd` gives it to a proxy that asks by name.
fn by_name(snapshot: &ProxySnapshot) -> Arc<ResourceSet> {
    let options = Options {
        dialect: Dialect::Istio,
        on_demand: true,
    };
    Arc::new(ResourceSet::new(snapshot, [], &options, None))
}

/// As a control plane gives it that knows nothing of lists.
fn without_lists(snapshot: &ProxySnapshot) -> Arc<ResourceSet> {
    let mut snapshot = SharedSnapshot::from(snapshot);
    snapshot.destinations = SharedMap::default();
    let options = Options {
        dialect: Dialect::Istio,
        on_demand: false,
    };
    Arc::new(ResourceSet::default().next(&snapshot, [], &options, &mut Encoder::default()))
}

async fn get(out: &Outbound, host: &str) -> CurlOutput {
    curl(&["-H", &format!("Host: {host}"), &format!("http://{}/", out.listen)]).await
}

fn go_to(agent: &Agent, destination: impl Into<SocketAddr>) {
    *agent.proxy.destination.lock().unwrap() = destination.into();
}

/// Numbers of listeners, virtual hosts, clusters and endpoint lists that the proxy runs.
fn held(agent: &Agent) -> (usize, usize, usize, usize) {
    let config = agent.proxy.shared.config.load();
    let snapshot = &config.snapshot;
    let (listeners, hosts) = (snapshot.listeners.len(), snapshot.virtual_hosts.len());
    (listeners, hosts, snapshot.clusters.len(), snapshot.endpoints.len())
}

#[tokio::test]
async fn what_a_proxy_holds_depends_on_what_it_calls_and_not_on_the_mesh() {
    let mut counts = Vec::new();
    let mut bytes = Vec::new();
    for services in [10, 2000] {
        let app = EchoServer::start().await;
        let out = outbound(app.address());
        let agent = Agent::with(by_name(&mesh(&out, services)), 3600, &[]).await;
        agent.ready().await;
        go_to(&agent, HTTP);
        let before = held(&agent);
        for n in 0..5 {
            assert_eq!(get(&out, &format!("svc-{n}")).await.status, 200);
        }
        counts.push((before, held(&agent)));
        let events = agent.events();
        let sent = events.iter().filter_map(|event| {
            let (_, bytes) = event.strip_prefix("Sent")?.split_once("bytes: ")?;
            bytes.trim_end_matches([' ', '}']).parse::<usize>().ok()
        });
        bytes.push(sent.sum::<usize>());
    }
    println!("held before and after five calls, with 10 and 2,000 services: {counts:?}, bytes: {bytes:?}");
    assert_eq!(counts[0], counts[1]);
    let (before, after) = counts[0];
    // The capture listener and the way out; then the port's listener, and of each service its host, cluster and endpoints.
    assert_eq!((before, after), ((1, 0, 1, 0), (2, 5, 6, 5)));
    assert!(
        bytes[1] < 100_000,
        "a proxy with 2,000 services gets {} bytes",
        bytes[1]
    );
}

#[tokio::test]
async fn a_host_that_nothing_serves_passes_until_it_is_served() {
    let (app, elsewhere) = (EchoServer::start().await, EchoServer::start().await);
    let out = outbound(app.address());
    let agent = Agent::with(by_name(&mesh(&out, 10)), 3600, &[]).await;
    agent.ready().await;
    // A port that has a listener, an address that nobody has: the bytes go where they were going.
    let port = elsewhere.address().port();
    let mut plain = mesh(&out, 10);
    let mut listener = (*plain.listeners["0.0.0.0_80"]).clone();
    listener.name = format!("0.0.0.0_{port}");
    listener.address = ([0, 0, 0, 0], port).into();
    plain.listeners.insert(listener.name.clone(), Arc::new(listener));
    agent.control.resources.send_replace(by_name(&plain));
    go_to(&agent, elsewhere.address());
    eventually("the new list is here", Duration::from_secs(10), || async {
        let config = agent.proxy.shared.config.load();
        let listed = config
            .snapshot
            .destinations
            .values()
            .any(|list| list.ports.contains(&port));
        if listed { Ok(()) } else { Err("not yet") }
    })
    .await;
    assert_eq!(get(&out, "late").await.status, 200);
    assert_eq!((elsewhere.requests().len(), app.requests().len()), (1, 0));
    // The answer "there is none" was asked for by name, and what comes under this name is sent.
    let mut with = (*plain.routes["80"]).clone();
    Arc::make_mut(&mut with.hosts[0]).domains.push("late".into());
    plain.routes.insert("80".into(), Arc::new(with));
    agent.control.resources.send_replace(by_name(&plain));
    eventually("the host is served", Duration::from_secs(10), || async {
        assert_eq!(get(&out, "late").await.status, 200);
        if app.requests().is_empty() {
            Err("not yet")
        } else {
            Ok(())
        }
    })
    .await;
    // And the other way round.
    let before = app.requests().len();
    let mut without = (*plain.routes["80"]).clone();
    Arc::make_mut(&mut without.hosts[0]).domains.pop();
    plain.routes.insert("80".into(), Arc::new(without));
    agent.control.resources.send_replace(by_name(&plain));
    eventually("the host is gone", Duration::from_secs(10), || async {
        let passed = elsewhere.requests().len();
        assert_eq!(get(&out, "late").await.status, 200);
        if elsewhere.requests().len() > passed {
            Ok(())
        } else {
            Err("not yet")
        }
    })
    .await;
    assert!(app.requests().len() >= before);
}

#[tokio::test]
async fn without_the_control_plane_known_destinations_work_cold_ones_fail_and_foreign_ones_pass() {
    let (app, elsewhere) = (EchoServer::start().await, EchoServer::start().await);
    let out = outbound(app.address());
    let mut agent = Agent::with(by_name(&mesh(&out, 10)), 3600, &[]).await;
    agent.ready().await;
    go_to(&agent, HTTP);
    assert_eq!(get(&out, "svc-1").await.status, 200);
    drop(agent.server.take());
    eventually("the stream is gone", Duration::from_secs(10), || async {
        if agent.proxy.shared.on_demand.is_connected() {
            Err("open")
        } else {
            Ok(())
        }
    })
    .await;
    let served = app.requests().len();
    assert_eq!(get(&out, "svc-1").await.status, 200);
    assert_eq!(app.requests().len(), served + 1);
    // A host that was never used, at an address of the mesh: refused, and no byte of it anywhere.
    let cold = get(&out, "svc-2").await;
    assert_eq!(cold.status, 503, "{}", cold.body);
    assert!(cold.body.contains("control plane"), "{}", cold.body);
    // So is a TCP service: reset, not passed by.
    go_to(&agent, TCP);
    let mut stream = TcpStream::connect(out.listen).await.unwrap();
    let read = stream.read(&mut [0; 16]).await;
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(app.requests().len(), served + 1);
    // An address that is not the mesh's passes as before, at once.
    go_to(&agent, elsewhere.address());
    assert_eq!(get(&out, "example.com").await.status, 200);
    assert_eq!(elsewhere.requests().len(), 1);
    // When the control plane is back, so is what was missing.
    go_to(&agent, HTTP);
    let _server = serve(agent.control.clone(), agent.address);
    eventually("cold destinations work again", Duration::from_secs(30), || async {
        match get(&out, "svc-2").await.status {
            200 => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

#[tokio::test]
async fn what_nobody_uses_is_given_up_and_what_somebody_holds_stays() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let agent = Agent::with(by_name(&mesh(&out, 10)), 3600, &[("MANTLET_ON_DEMAND_IDLE", "1s")]).await;
    agent.ready().await;
    let begin = held(&agent);
    go_to(&agent, HTTP);
    for n in 0..5 {
        assert_eq!(get(&out, &format!("svc-{n}")).await.status, 200);
    }
    assert_eq!(held(&agent), (2, 5, 6, 5));
    go_to(&agent, TCP);
    let mut held_open = TcpStream::connect(out.listen).await.unwrap();
    held_open
        .write_all(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0; 256];
    assert!(held_open.read(&mut answer).await.unwrap() > 0);
    eventually(
        "all but the connection's is given up",
        Duration::from_secs(20),
        || async {
            // The connection has its listener, cluster and endpoints.
            let now = held(&agent);
            if now == (begin.0 + 1, 0, begin.2 + 1, 1) {
                Ok(())
            } else {
                Err(now)
            }
        },
    )
    .await;
    // It still runs, and what was given up comes back when it is used.
    held_open
        .write_all(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        .await
        .unwrap();
    assert!(held_open.read(&mut answer).await.unwrap() > 0);
    go_to(&agent, HTTP);
    assert_eq!(get(&out, "svc-3").await.status, 200);
    drop(held_open);
    eventually("all is given up", Duration::from_secs(20), || async {
        let now = held(&agent);
        if now == begin { Ok(()) } else { Err(now) }
    })
    .await;
}

#[tokio::test]
async fn an_eager_proxy_holds_everything() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let snapshot = mesh(&out, 10);
    let agent = Agent::with(resources(&snapshot), 3600, &[("MANTLET_EAGER", "true")]).await;
    agent.ready().await;
    let all = (
        snapshot.listeners.len(),
        0,
        snapshot.clusters.len(),
        snapshot.endpoints.len(),
    );
    eventually("everything is here", Duration::from_secs(10), || async {
        let now = held(&agent);
        if now == all { Ok(()) } else { Err(now) }
    })
    .await;
}

/// Other control planes know neither the lists of what is served nor names of virtual hosts.
#[tokio::test]
async fn a_control_plane_that_gives_nothing_by_name_is_asked_for_everything() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let snapshot = mesh(&out, 10);
    let agent = Agent::with(without_lists(&snapshot), 3600, &[]).await;
    agent.ready().await;
    let all = (
        snapshot.listeners.len(),
        0,
        snapshot.clusters.len(),
        snapshot.endpoints.len(),
    );
    assert_eq!(held(&agent), all);
    go_to(&agent, HTTP);
    assert_eq!(get(&out, "svc-7").await.status, 200);
    // A host of which nothing was known a moment ago is there with the next push, without being asked for.
    let more = mesh(&out, 12);
    agent.control.resources.send_replace(without_lists(&more));
    eventually("the new services are here", Duration::from_secs(10), || async {
        match get(&out, "svc-11").await.status {
            200 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    assert_eq!(held(&agent).2, more.clusters.len());
}
