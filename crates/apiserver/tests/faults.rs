//! What the server does when its disk is full, its file damaged, a client stops reading, or there is very much of
//! everything. In every case an acknowledged write is there afterwards, and who is refused is told why.
//!
//! Faults that need limits of a whole process run in a copy of this program (`child`).

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Ca, Cluster, config};
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, PostParams, WatchEvent, WatchParams};
use mantlet_apiserver::store::{Op, RedbOptions, RedbStore, Store, StoreError, Txn};
use mantlet_apiserver::{ApiServer, OpenError};
use mantlet_testkit::{eventually, program};
use rustix::process::{Resource, Rlimit};
use serde_json::json;

const CHILD: &str = "MANTLET_TEST_FAULT_DIR";
const LONG: Duration = Duration::from_secs(120);

/// Runs one test of this program again, with a directory, through `wrapper`.
fn child(test: &str, dir: &Path, wrapper: &[&str]) {
    let me = std::env::current_exe().unwrap();
    let out = Command::new(program(wrapper[0]))
        .args(&wrapper[1..])
        .arg(me)
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
}

fn child_dir() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

fn cm(name: &str, bytes: usize) -> ConfigMap {
    // Not compressible, not that anything here compresses.
    let noise: String = (0..bytes).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"k": noise}})).unwrap()
}

fn configmaps(server: &Arc<ApiServer>) -> Api<ConfigMap> {
    Api::default_namespaced(kube::Client::new(server.service_as_admin(), "default"))
}

async fn names(api: &Api<ConfigMap>) -> BTreeSet<String> {
    let list = api.list(&ListParams::default()).await.unwrap();
    list.items.into_iter().filter_map(|o| o.metadata.name).collect()
}

/// Creates config maps until the server refuses one; returns those that it acknowledged and its refusal.
async fn fill(api: &Api<ConfigMap>, prefix: &str) -> (BTreeSet<String>, kube::core::Status) {
    let mut acknowledged = BTreeSet::new();
    for n in 0..2000 {
        let name = format!("{prefix}-{n:04}");
        match api.create(&PostParams::default(), &cm(&name, 200_000)).await {
            Ok(_) => acknowledged.insert(name),
            Err(kube::Error::Api(status)) => return (acknowledged, *status),
            Err(other) => panic!("{other}"),
        };
    }
    panic!("2000 writes of 200 kB fit");
}

/// The server of a child, and what a full disk must not change.
async fn write_until_full(dir: &Path, make_room: impl FnOnce(), text: &str) {
    let options = config(dir, &Ca::new("ca"));
    let server = ApiServer::open(options.clone()).await.unwrap();
    let api = configmaps(&server);
    let (mut acknowledged, refusal) = fill(&api, "a").await;
    assert!(acknowledged.len() > 10, "{acknowledged:?}");
    assert_eq!(
        (refusal.code, refusal.reason.as_str()),
        (500, "InternalError"),
        "{refusal:?}"
    );
    assert!(
        refusal.message.contains("store.redb") && refusal.message.contains(text),
        "{}",
        refusal.message
    );
    // Reading goes on, and shows what was acknowledged and nothing that was refused.
    assert_eq!(names(&api).await, acknowledged);
    let again = api.create(&PostParams::default(), &cm("b", 200_000)).await;
    assert!(matches!(again, Err(kube::Error::Api(s)) if s.code == 500));
    make_room();
    // Without a restart.
    let created = api.create(&PostParams::default(), &cm("c", 200_000)).await.unwrap();
    acknowledged.insert("c".to_owned());
    assert_eq!(names(&api).await, acknowledged);
    drop((api, server));
    // Tasks of the former server let go of the store one after the other.
    let opened = eventually("the store is let go", LONG, async || {
        match ApiServer::open(options.clone()).await {
            Err(OpenError::Store(locked @ StoreError::Locked { .. })) => Err(locked),
            other => Ok(other),
        }
    });
    let server = opened.await.unwrap();
    let api = configmaps(&server);
    assert_eq!(names(&api).await, acknowledged, "after opening the store again");
    assert_eq!(
        api.get("c").await.unwrap().metadata.resource_version,
        created.metadata.resource_version
    );
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_loses_none() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        let mount = r#"mount -t tmpfs -o size=64m tmpfs "$MANTLET_TEST_FAULT_DIR" && exec "$@""#;
        return child(
            "a_full_disk_refuses_writes_and_loses_none",
            dir.path(),
            &[
                "unshare",
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                mount,
                "sh",
            ],
        );
    };
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 24 << 20]).unwrap();
    write_until_full(
        &dir,
        || std::fs::remove_file(&ballast).unwrap(),
        "nothing was written, free some space and try again",
    )
    .await;
}

/// The file system says that there is room, and the write fails all the same (a quota, a broken disk): the store is
/// opened anew behind its readers.
#[tokio::test]
async fn a_failed_write_is_not_acknowledged_and_the_store_goes_on() {
    let Some(dir) = child_dir() else {
        let dir = tempfile::tempdir().unwrap();
        return child(
            "a_failed_write_is_not_acknowledged_and_the_store_goes_on",
            dir.path(),
            // Ignored, the signal lets the write fail instead.
            &["sh", "-c", r#"trap '' XFSZ && exec "$@""#, "sh"],
        );
    };
    let limit = |bytes: Option<u64>| {
        let limit = Rlimit {
            current: bytes,
            maximum: None,
        };
        rustix::process::setrlimit(Resource::Fsize, limit).unwrap();
    };
    limit(Some(12 << 20));
    write_until_full(&dir, || limit(None), "os error 27").await;
}

/// One flipped byte anywhere: the store either says that it is damaged, or holds exactly what was written.
#[tokio::test]
async fn a_damaged_file_is_never_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let key = |n: usize| format!("/core/configmaps/default/c-{n:03}");
    let value = |n: usize| bytes::Bytes::from(format!("{{\"n\":{n},\"pad\":\"{}\"}}", "x".repeat(900)));
    let store = RedbStore::open(&path, &RedbOptions::default()).unwrap();
    for n in 0..300 {
        let ops = vec![Op::Put(key(n), value(n))];
        store.commit(Txn { expect: vec![], ops }).await.unwrap();
    }
    let revision = store.revision();
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    let copy = dir.path().join("copy.redb");
    let mut refused = 0;
    let mut check = |bytes: &[u8], what: &str| {
        std::fs::write(&copy, bytes).unwrap();
        match RedbStore::open(&copy, &RedbOptions::default()) {
            Err(StoreError::Corrupt { path, .. }) => {
                assert!(path.ends_with("copy.redb"));
                refused += 1;
            }
            Err(other) => panic!("{what}: {other}"),
            Ok(store) => {
                let all = store.range("/", None, 0).unwrap();
                assert_eq!((all.entries.len(), all.revision), (300, revision), "{what}");
                for (n, entry) in all.entries.iter().enumerate() {
                    assert!(entry.key == key(n) && entry.value == value(n), "{what}: {}", entry.key);
                }
                assert!(store.watch("/", 1).is_ok(), "{what}");
            }
        }
    };
    // A step that is prime to the page size meets every part of a page.
    for at in (0..whole.len()).step_by((whole.len() / 150) | 1) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x41;
        check(&bytes, &format!("byte {at} flipped"));
    }
    check(&whole[..whole.len() / 2], "cut in half");
    check(&whole[..100], "cut to 100 bytes");
    assert!(refused > 30, "only {refused} of about 150 damages were noticed");

    // The server as a whole says it in words.
    let mut bytes = whole;
    let end = bytes.len();
    bytes[4096..end].fill(7);
    let mut options = config(dir.path(), &Ca::new("ca"));
    options.store_path = dir.path().join("damaged.redb");
    std::fs::write(&options.store_path, bytes).unwrap();
    let error = ApiServer::open(options).await.err().unwrap();
    assert!(
        matches!(&error, OpenError::Store(StoreError::Corrupt { .. })),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("damaged.redb is damaged") && error.to_string().contains("restore it from a backup"),
        "{error}"
    );
}

/// A client that opens a watch and stops reading holds nobody up and is cut off; another sees every change.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_nobody_reads_is_cut_off() {
    let c = Cluster::start_with(|config| config.store.watch_buffer = 256).await;
    let (cert, key) = c.ca.client("admin", &["system:masters"]);
    for (name, text) in [("c.crt", &cert), ("c.key", &key), ("ca.crt", &c.ca.pem)] {
        std::fs::write(c.dir.path().join(name), text).unwrap();
    }
    let path = "/api/v1/namespaces/default/configmaps?watch=1&resourceVersion=0&allowWatchBookmarks=true";
    let mut curl = Command::new(program("curl"))
        .args(["-sN", "--http1.1", "--cacert", "ca.crt", "--cert", "c.crt"])
        .args(["--key", "c.key", "-o", "unread.json"])
        .arg(format!("https://127.0.0.1:{}{path}", c.address.port()))
        .current_dir(c.dir.path())
        .spawn()
        .unwrap();
    let unread = c.dir.path().join("unread.json");
    let size = || unread.metadata().map_or(0, |m| m.len());
    eventually("the first bookmark", LONG, async || {
        (size() > 0).then_some(()).ok_or("nothing")
    })
    .await;
    let pid = rustix::process::Pid::from_child(&curl);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();

    let api = configmaps(&c.server);
    let reader = api.watch(&WatchParams::default().timeout(290), "0").await.unwrap();
    let (seen, mut count) = tokio::sync::watch::channel(0);
    let reading = tokio::spawn(async move {
        let mut reader = std::pin::pin!(reader);
        while let Some(event) = reader.next().await {
            match event.unwrap() {
                WatchEvent::Added(_) => seen.send_modify(|n| *n += 1),
                WatchEvent::Bookmark(_) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    // More than all buffers on the way hold: sockets (about 10 MB) and 256 changes.
    let (rounds, each) = (12, 128);
    for round in 0..rounds {
        let writes = futures::stream::iter((0..each).map(|n| {
            let (api, object) = (api.clone(), cm(&format!("w-{round}-{n}"), 30_000));
            async move { drop(api.create(&PostParams::default(), &object).await.unwrap()) }
        }));
        writes.buffer_unordered(16).collect::<Vec<()>>().await;
        let wanted = (round + 1) * each;
        tokio::time::timeout(LONG, count.wait_for(|n| *n == wanted))
            .await
            .expect("the other watch follows")
            .unwrap();
    }
    reading.abort();

    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let status = tokio::task::spawn_blocking(move || curl.wait().unwrap());
    tokio::time::timeout(LONG, status)
        .await
        .expect("the watch ends")
        .unwrap();
    let text = std::fs::read_to_string(&unread).unwrap();
    let added = text.lines().filter(|l| l.starts_with("{\"type\":\"ADDED\"")).count();
    assert!(
        added < rounds * each,
        "everything was kept for a client that did not read"
    );
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(
        (last["type"].as_str(), last["object"]["code"].as_u64()),
        (Some("ERROR"), Some(410)),
        "{last}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_objects() {
    const COUNT: usize = 10_000;
    let c = Cluster::start_with(|_| {}).await;
    let api = configmaps(&c.server);
    let writes = futures::stream::iter((0..COUNT).map(|n| {
        let (api, object) = (api.clone(), cm(&format!("o-{n:05}"), 500));
        async move { drop(api.create(&PostParams::default(), &object).await.unwrap()) }
    }));
    writes.buffer_unordered(64).collect::<Vec<()>>().await;
    // Through the wire, as a user: kubectl asks for pages.
    let listed = c.ok(&["get", "configmaps", "--no-headers", "-o", "name"]).await;
    assert_eq!(listed.lines().filter(|l| l.starts_with("configmap/o-")).count(), COUNT);
    // A watch from the beginning delivers them all, then says so.
    let params = WatchParams::default().initial_events().timeout(290);
    let stream = api.watch(&params, "0").await.unwrap();
    let mut stream = std::pin::pin!(stream);
    let mut initial = 0;
    loop {
        match tokio::time::timeout(LONG, stream.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
        {
            WatchEvent::Added(_) => initial += 1,
            WatchEvent::Bookmark(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(initial, COUNT);
    let selected = ListParams::default().fields("metadata.name=o-07777");
    assert_eq!(api.list(&selected).await.unwrap().items.len(), 1);
    let everything = ListParams::default();
    api.delete_collection(&Default::default(), &everything).await.unwrap();
    assert_eq!(names(&api).await.len(), 0);
}
