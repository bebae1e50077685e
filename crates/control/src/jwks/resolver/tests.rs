//! The task with real servers: updates, isolation, refetching, counting.

use std::sync::Mutex;

use mantlet_testkit::EchoServer;

use super::super::guard::Guard;
use super::*;
use mantlet_identity::jws::key_set_name;

const LONG: Duration = Duration::from_secs(60);

struct Bench {
    resolver: Resolver,
    needs: watch::Sender<Vec<KeySetNeed>>,
    updates: mpsc::UnboundedReceiver<Update>,
    registry: Registry,
    _task: mantlet_runtime::task::AbortOnDrop,
}

fn bench() -> Bench {
    let options = JwksOptions {
        guard: Guard::default().with_loopback(),
        ..JwksOptions::default()
    };
    let fetcher = Fetcher::with_roots(&options, Vec::new()).unwrap();
    let (needs, receiver) = watch::channel(Vec::new());
    let (tell, updates) = mpsc::unbounded_channel();
    let registry = Registry::new();
    let sink: Sink = Box::new(move |update| tell.send(update).unwrap());
    let (resolver, task) = Resolver::new(&options, fetcher, receiver, &registry, sink);
    let task = tokio::spawn(task.run());
    Bench {
        resolver,
        needs,
        updates,
        registry,
        _task: mantlet_runtime::task::AbortOnDrop(task.abort_handle()),
    }
}

impl Bench {
    async fn update(&mut self) -> Update {
        tokio::time::timeout(LONG, self.updates.recv())
            .await
            .expect("no update")
            .unwrap()
    }

    fn count(&self, name: &str) -> f64 {
        let text = self.registry.render();
        let line = text.lines().find(|l| l.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }
}

fn need(issuer: &str, server: &str) -> KeySetNeed {
    KeySetNeed {
        issuer: issuer.into(),
        jwks_uri: format!("http://{server}/{issuer}"),
        timeout: LONG,
    }
}

fn set(kid: &str) -> String {
    format!(r#"{{"keys":[{{"kid":"{kid}","kty":"EC"}}]}}"#)
}

/// A server whose key set can be changed.
async fn issuer() -> (EchoServer, Arc<Mutex<String>>) {
    let body = Arc::new(Mutex::new(set("1")));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shown = body.clone();
    let server = EchoServer::on(listener, None, move |_| {
        http::Response::new(http_body_util::Full::from(shown.lock().unwrap().clone()))
    });
    (server, body)
}

#[tokio::test]
async fn keys_arrive_and_an_unknown_key_fetches_the_new_set() {
    let (server, body) = issuer().await;
    let mut bench = bench();
    let need = need("a", &server.address().to_string());
    bench.needs.send_replace(vec![need.clone()]);
    let first = bench.update().await;
    assert_eq!(first.keys.as_deref(), Some(set("1").as_str()));
    assert_eq!(bench.count("pilot_jwks_resolver_network_fetch_success_total"), 1.0);
    assert_eq!(bench.count("pilot_jwks_resolver_network_fetch_fail_total"), 0.0);

    // Keys that are there already are not waited for.
    bench.resolver.announce(vec![need.clone()]).await;
    assert_eq!(server.requests().len(), 1);

    *body.lock().unwrap() = set("2");
    for _ in 0..1000 {
        bench.resolver.unknown_key(&key_set_name(set("1").as_bytes()));
    }
    let second = bench.update().await;
    assert_eq!(second.keys.as_deref(), Some(set("2").as_str()));
    assert_eq!(server.requests().len(), 2, "one fetch for a thousand reports");
}

#[tokio::test]
async fn a_silent_issuer_holds_up_nobody_else() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (server, _) = issuer().await;
    let mut bench = bench();
    let dead = silent.local_addr().unwrap().to_string();
    let mut needs: Vec<KeySetNeed> = (0..100).map(|i| need(&format!("dead-{i}"), &dead)).collect();
    let good = need("a", &server.address().to_string());
    needs.push(good.clone());
    bench.needs.send_replace(needs.clone());
    // Whoever waits for the good one gets through while all others still wait for their minute.
    bench.resolver.announce(vec![good.clone()]).await;
    let update = bench.update().await;
    assert_eq!(update.source, source_of(&good));
    let rows = bench.resolver.rows().await;
    assert_eq!(rows.iter().filter(|r| r.keys).count(), 1);
    assert_eq!(rows.len(), 101);
    // Whoever waits for a silent one waits its timeout.
    let mut short = need("dead-0", &dead);
    short.timeout = Duration::from_millis(50);
    bench.resolver.announce(vec![short]).await;
}

#[tokio::test]
async fn failures_are_counted_and_told_and_good_keys_stay() {
    let (server, body) = issuer().await;
    let mut bench = bench();
    let need = need("a", &server.address().to_string());
    bench.needs.send_replace(vec![need.clone()]);
    bench.update().await;
    // A sign-in page with status 200, in place of the keys.
    *body.lock().unwrap() = "<html></html>".into();
    bench.resolver.unknown_key(&key_set_name(set("1").as_bytes()));
    let end = Instant::now() + LONG;
    let row = loop {
        let row = bench.resolver.rows().await.remove(0);
        if row.error.is_some() {
            break row;
        }
        assert!(Instant::now() < end, "{row:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(row.keys, "the last good keys stay");
    assert!(row.error.unwrap().contains("not JSON"));
    assert_eq!(bench.count("pilot_jwks_resolver_network_fetch_fail_total"), 1.0);
    assert!(bench.updates.try_recv().is_err());
}
