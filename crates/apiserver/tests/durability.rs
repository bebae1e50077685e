//! What was acknowledged is there after SIGKILL, and two processes cannot open one store.
//!
//! The test program runs itself again as a child that writes and reports each acknowledged write on its standard output.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use mantlet_apiserver::store::{Op, RedbOptions, RedbStore, Store, StoreError, Txn};

const CHILD: &str = "MANTLET_TEST_DURABILITY_CHILD";

fn child_main(path: &Path) -> ! {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = std::sync::Arc::new(
            RedbStore::open(
                path,
                &RedbOptions {
                    log_entries: 200,
                    ..RedbOptions::default()
                },
            )
            .unwrap(),
        );
        let mut tasks = Vec::new();
        for task in 0..4 {
            let store = store.clone();
            tasks.push(tokio::spawn(async move {
                for n in 0_u64.. {
                    let key = format!("/t/keys/{task}-{}", n % 5);
                    let value = format!("{{\"n\":{n},\"pad\":\"{}\"}}", "x".repeat(500));
                    let rev = store
                        .commit(Txn {
                            expect: vec![],
                            ops: vec![Op::Put(key.clone(), value.into())],
                        })
                        .await
                        .unwrap()[0];
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "{key} {n} {rev}").unwrap();
                    out.flush().unwrap();
                }
            }));
        }
        for t in tasks {
            t.await.unwrap();
        }
    });
    std::process::exit(0)
}

#[test]
fn acknowledged_writes_survive_sigkill() {
    if let Some(path) = std::env::var_os(CHILD) {
        child_main(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let mut total = 0;
    let mut last_revision = 0;
    for round in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "acknowledged_writes_survive_sigkill", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        let mut note = |line: &str| {
            let parts: Vec<&str> = line.split(' ').collect();
            if let [key, n, rev] = parts.as_slice()
                && key.starts_with("/t/")
                && let (Ok(n), Ok(rev)) = (n.parse(), rev.parse())
            {
                acknowledged.insert((*key).to_owned(), (n, rev));
                return true;
            }
            false
        };
        // A different number of writes each time, so that the kill falls at different moments of the commit.
        let wanted = 20 + round * 7;
        let mut seen = 0;
        while seen < wanted {
            if note(&lines.next().expect("the child writes until it is killed").unwrap()) {
                seen += 1;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            if note(&line) {
                seen += 1;
            }
        }
        total += seen;
        let store = RedbStore::open(&path, &RedbOptions::default()).unwrap();
        let newest = acknowledged.values().map(|(_, rev)| *rev).max().unwrap();
        assert!(
            store.revision() >= newest && newest > last_revision,
            "revisions never go back"
        );
        last_revision = store.revision();
        for (key, (n, rev)) in &acknowledged {
            let entry = store.get(key).unwrap().0.unwrap_or_else(|| panic!("{key} is lost"));
            let value: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
            assert!(
                entry.mod_rev >= *rev && value["n"].as_u64().unwrap() >= *n,
                "{key}: {n} at {rev} was acknowledged, found {value} at {}",
                entry.mod_rev
            );
        }
        // The log goes without gaps up to the newest revision.
        let from = (1..=last_revision).find(|r| store.watch("/t/", *r).is_ok()).unwrap();
        let mut watcher = store.watch("/t/", from).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for want in from + 1..=last_revision {
            assert_eq!(runtime.block_on(watcher.next()).unwrap().revision, want);
        }
    }
    assert!(total > 1000, "{total}");
}

#[test]
fn a_second_process_is_refused() {
    if let Some(path) = std::env::var_os(CHILD) {
        child_main(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_second_process_is_refused", "--nocapture"])
        .env(CHILD, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().starts_with("/t/") {}
    let refused = RedbStore::open(&path, &RedbOptions::default()).err();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(refused, Some(StoreError::Locked { .. })), "{refused:?}");
}
