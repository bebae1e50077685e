//! The store on disk: transactions, revisions, watches, compaction, damage.

use serde_json::json;

use super::*;

fn open(dir: &tempfile::TempDir, options: RedbOptions) -> RedbStore {
    RedbStore::open(&dir.path().join("store.redb"), &options).unwrap()
}

fn doc(n: u64) -> Bytes {
    json!({"n": n}).to_string().into()
}

#[tokio::test]
async fn transactions_are_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, RedbOptions::default());
    let first = store.commit(Txn::create("/a/b/x", doc(1))).await.unwrap();
    let both = Txn {
        expect: vec![("/a/b/y".into(), Expect::Absent), ("/a/b/x".into(), Expect::Absent)],
        ops: vec![Op::Put("/a/b/y".into(), doc(2))],
    };
    assert!(matches!(store.commit(both).await, Err(StoreError::Conflict { key, current: Some(_) }) if key == "/a/b/x"));
    assert!(store.get("/a/b/y").unwrap().0.is_none());
    assert!(matches!(
        store.commit(Txn::replace("/a/b/x", first[0] + 1, doc(3))).await,
        Err(StoreError::Conflict { .. })
    ));
    let second = store.commit(Txn::replace("/a/b/x", first[0], doc(3))).await.unwrap();
    assert_eq!(second[0], first[0] + 1);
    let (entry, revision) = store.get("/a/b/x").unwrap();
    let entry = entry.unwrap();
    assert_eq!(
        (entry.create_rev, entry.mod_rev, revision),
        (first[0], second[0], second[0])
    );
    assert_eq!(store.prefix_revision("/a/b/"), second[0]);
    assert_eq!(store.prefix_revision("/a/c/"), 0);
}

#[tokio::test]
async fn revisions_and_contents_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..3_u64 {
        let store = open(&dir, RedbOptions::default());
        assert!(store.revision() >= last);
        for i in 0..10 {
            last = store
                .commit(Txn {
                    expect: vec![],
                    ops: vec![Op::Put(format!("/a/b/{i}"), doc(round))],
                })
                .await
                .unwrap()[0];
        }
        let snapshot = store.range("/a/b/", None, 0).unwrap();
        assert_eq!((snapshot.entries.len(), snapshot.revision), (10, last));
        assert_eq!(
            store
                .range("/a/b/", Some("/a/b/3"), 2)
                .unwrap()
                .entries
                .iter()
                .map(|e| e.key.as_str())
                .collect::<Vec<_>>(),
            ["/a/b/4", "/a/b/5"]
        );
        assert_eq!(store.range("/a/b/", None, 4).unwrap().remaining, 6);
    }
}

#[tokio::test]
async fn watch_replays_then_follows_without_gap_or_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&dir, RedbOptions::default()));
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for i in 0..300 {
                store
                    .commit(Txn {
                        expect: vec![],
                        ops: vec![Op::Put(format!("/a/b/{}", i % 7), doc(i))],
                    })
                    .await
                    .unwrap();
            }
        }
    });
    let mut seen: Vec<Vec<u64>> = Vec::new();
    let start = 1;
    for _ in 0..5 {
        let mut watcher = store.watch("/a/b/", start).unwrap();
        let mut revisions = Vec::new();
        while revisions.len() < 300 {
            revisions.push(watcher.next().await.unwrap().revision);
        }
        seen.push(revisions);
    }
    writer.await.unwrap();
    let want: Vec<u64> = (2..=301).collect();
    assert!(seen.iter().all(|s| *s == want));
    let idle = store.watch("/other/", store.revision()).unwrap();
    assert_eq!(idle.idle_at(), Some(301));
}

/// A commit is readable a moment before it is published: who reads it then and watches from there misses nothing and gets
/// nothing twice.
#[tokio::test]
async fn a_watch_from_a_revision_that_is_not_published_yet() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, RedbOptions::default());
    let published = store.commit(Txn::create("/t/keys/a", doc(1))).await.unwrap()[0];
    let next = published + 1;
    {
        let txn = store.db.get().unwrap().begin_write().unwrap();
        let (key, value) = ("/t/keys/b", doc(2));
        let bytes: &[u8] = &value;
        txn.open_table(KV).unwrap().insert(key, (next, next, bytes)).unwrap();
        txn.open_table(LOG)
            .unwrap()
            .insert(next, (key, Some(bytes), None))
            .unwrap();
        txn.open_table(META).unwrap().insert(META_REVISION, next).unwrap();
        txn.commit().unwrap();
    }
    let mut watcher = store.watch("/t/", next).unwrap();
    assert_eq!(watcher.idle_at(), Some(next), "bookmarks do not go back");
    let mut behind = store.watch("/t/", published).unwrap();
    let ahead = store.watch("/t/", next + 1).err();
    assert!(matches!(ahead, Some(StoreError::Future { .. })), "{ahead:?}");
    let event = Event::new(next, "/t/keys/b".into(), Some(doc(2)), None);
    store.hub.publish(&[Arc::new(event)]);
    let later = store.commit(Txn::create("/t/keys/c", doc(3))).await.unwrap()[0];
    assert_eq!(watcher.next().await.unwrap().revision, later);
    assert_eq!(behind.next().await.unwrap().revision, next);
    assert_eq!(behind.next().await.unwrap().revision, later);
}

#[tokio::test]
async fn old_revisions_are_compacted_and_slow_watchers_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(
        &dir,
        RedbOptions {
            log_entries: 100,
            watch_buffer: 8,
            max_watchers: 2,
            ..RedbOptions::default()
        },
    );
    let mut slow = store.watch("/a/", 1).unwrap();
    for i in 0..500 {
        store
            .commit(Txn {
                expect: vec![],
                ops: vec![Op::Put("/a/b/x".into(), doc(i))],
            })
            .await
            .unwrap();
    }
    let mut got = 0;
    while slow.next().await.is_some() {
        got += 1;
    }
    assert_eq!(got, 8, "what was buffered is delivered, then the watch ends");
    assert!(matches!(
        store.watch("/a/", 1),
        Err(StoreError::Compacted { requested: 1, .. })
    ));
    assert!(matches!(store.watch("/a/", 10_000), Err(StoreError::Future { .. })));
    let _one = store.watch("/a/", store.revision()).unwrap();
    let _two = store.watch("/a/", store.revision()).unwrap();
    assert!(matches!(
        store.watch("/a/", store.revision()),
        Err(StoreError::TooManyWatchers)
    ));
}

#[tokio::test]
async fn deletions_carry_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, RedbOptions::default());
    let rev = store.commit(Txn::create("/a/b/x", doc(7))).await.unwrap()[0];
    let gone = store.commit(Txn::delete("/a/b/x", rev)).await.unwrap()[0];
    let mut watcher = store.watch("/a/", rev).unwrap();
    let event = watcher.next().await.unwrap();
    assert_eq!((event.revision, event.value.is_none()), (gone, true));
    assert_eq!(event.documents().1.as_ref().unwrap()["n"], 7);
    let nothing = store
        .commit(Txn {
            expect: vec![],
            ops: vec![Op::Delete("/a/b/x".into())],
        })
        .await
        .unwrap();
    assert_eq!(nothing[0], gone, "deleting nothing is no change");
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, b"this is no database, but somebody's letter".repeat(200)).unwrap();
    let e = RedbStore::open(&path, &RedbOptions::default()).err().unwrap();
    assert!(matches!(e, StoreError::Corrupt { .. }), "{e}");
    assert!(
        e.to_string().contains("store.redb") && e.to_string().contains("restore it from a backup"),
        "{e}"
    );
    let e = RedbStore::open(&dir.path().join("no/such/dir/store.redb"), &RedbOptions::default())
        .err()
        .unwrap();
    assert!(matches!(e, StoreError::Io { .. }), "{e}");
}

#[test]
fn one_opener_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir, RedbOptions::default());
    let e = RedbStore::open(&dir.path().join("store.redb"), &RedbOptions::default())
        .err()
        .unwrap();
    assert!(matches!(e, StoreError::Locked { .. }), "{e}");
    drop(first);
    open(&dir, RedbOptions::default());
}
