//! The default store: one redb file.
//!
//! Tables: `kv` (key → revisions + bytes), `log` (revision → change), `meta` (counters). One writer thread owns all writes: it
//! takes what has queued up, applies it in one redb transaction with the log rows and the counter, syncs once, publishes to the
//! hub and only then answers (group commit). Readers use redb's snapshots and never wait for the writer. redb's file lock keeps
//! a second process out.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageError, TableDefinition,
};
use tokio::sync::{mpsc, oneshot};

use self::handle::Handle;
use super::hub::{Hub, Watcher};
use super::{Entry, Event, Expect, Op, Snapshot, Store, StoreError, Txn};

mod handle;

const KV: TableDefinition<'static, &str, (u64, u64, &[u8])> = TableDefinition::new("kv");
/// Key, new bytes, former bytes.
type Change = (&'static str, Option<&'static [u8]>, Option<&'static [u8]>);

const LOG: TableDefinition<'static, u64, Change> = TableDefinition::new("log");
const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");

const META_REVISION: &str = "revision";
const META_COMPACTED: &str = "compacted";
const META_LOG_BYTES: &str = "log-bytes";
const META_FORMAT: &str = "format";
const FORMAT: u64 = 1;

/// Most transactions that one sync may carry.
const MAX_BATCH: usize = 512;

/// Sizes of the store.
#[derive(Debug, Clone)]
pub struct RedbOptions {
    /// Changes kept in the log; older ones are compacted away and watches from before answer 410.
    pub log_entries: u64,
    /// Bytes kept in the log.
    pub log_bytes: u64,
    /// Changes buffered per watcher before it is cut off.
    pub watch_buffer: usize,
    /// Most watchers at a time.
    pub max_watchers: usize,
    /// redb's page cache, bytes. It fills up with whatever was read or written last, mostly the log, which hardly anybody reads
    /// again; the kernel caches the file's pages as well.
    pub cache_bytes: usize,
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self {
            log_entries: 20_000,
            log_bytes: 128 << 20,
            watch_buffer: 4096,
            max_watchers: 4096,
            cache_bytes: 8 << 20,
        }
    }
}

struct Request {
    txn: Txn,
    reply: oneshot::Sender<Result<Vec<u64>, StoreError>>,
}

/// A store in one redb file.
pub struct RedbStore {
    db: Arc<Handle>,
    path: PathBuf,
    hub: Arc<Hub>,
    tx: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

impl RedbStore {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it, [`StoreError::Corrupt`] when it is no store or damaged,
    /// [`StoreError::Io`] when it cannot be read or written.
    pub fn open(path: &Path, options: &RedbOptions) -> Result<Self, StoreError> {
        let shown = path.display().to_string();
        let existed = path.metadata().map(|m| m.len() > 0).unwrap_or(false);
        let started = Instant::now();
        let handle = Handle::open(path, options.cache_bytes)?;
        let fail = |e: redb::Error| classify(&shown, e);

        let db = handle.get()?;
        let mut txn = db.begin_write().map_err(|e| fail(e.into()))?;
        txn.set_durability(Durability::Immediate).map_err(|e| fail(e.into()))?;
        let revision;
        {
            txn.open_table(KV).map_err(|e| fail(e.into()))?;
            txn.open_table(LOG).map_err(|e| fail(e.into()))?;
            let mut meta = txn.open_table(META).map_err(|e| fail(e.into()))?;
            let read = |meta: &redb::Table<'_, &'static str, u64>, key: &str| {
                meta.get(key).map(|v| v.map(|v| v.value())).map_err(|e| fail(e.into()))
            };
            match read(&meta, META_FORMAT)? {
                None => {
                    if existed && meta.len().map_err(|e| fail(e.into()))? > 0 {
                        return Err(StoreError::Corrupt {
                            path: shown,
                            detail: "its format marker is missing".into(),
                        });
                    }
                    // Revision 0 means "any" in the Kubernetes API, so the first usable one is 1.
                    meta.insert(META_FORMAT, FORMAT).map_err(|e| fail(e.into()))?;
                    meta.insert(META_REVISION, 1).map_err(|e| fail(e.into()))?;
                    meta.insert(META_COMPACTED, 0).map_err(|e| fail(e.into()))?;
                    meta.insert(META_LOG_BYTES, 0).map_err(|e| fail(e.into()))?;
                }
                Some(FORMAT) => {}
                Some(other) => {
                    let detail = format!("its format is {other}, this program reads {FORMAT}");
                    return Err(StoreError::Corrupt { path: shown, detail });
                }
            }
            revision = read(&meta, META_REVISION)?.ok_or_else(|| StoreError::Corrupt {
                path: shown.clone(),
                detail: "its revision counter is missing".into(),
            })?;
        }
        txn.commit().map_err(|e| fail(e.into()))?;
        drop(db);
        tracing::info!(path = %shown, revision, took = ?started.elapsed(), "store checked and open");

        let db = Arc::new(handle);
        let hub = Hub::new(revision, options.watch_buffer, options.max_watchers);
        let (tx, rx) = mpsc::channel(4096);
        let worker = Writer {
            db: db.clone(),
            path: shown,
            hub: hub.clone(),
            log_entries: options.log_entries.max(16),
            log_bytes: options.log_bytes.max(1 << 20),
        };
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || worker.run(rx))
            .map_err(|e| StoreError::Io {
                path: path.display().to_string(),
                detail: e.to_string(),
            })?;
        Ok(Self {
            db,
            path: path.to_owned(),
            hub,
            tx: Some(tx),
            writer: Some(writer),
        })
    }

    fn counter(&self, txn: &redb::ReadTransaction, name: &str) -> Result<u64, StoreError> {
        let meta = txn.open_table(META).map_err(|e| self.fail(e))?;
        let value = meta.get(name).map_err(|e| self.fail(e))?;
        Ok(value.map_or(0, |v| v.value()))
    }

    fn fail(&self, e: impl Into<redb::Error>) -> StoreError {
        classify(&self.path.display().to_string(), e.into())
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        self.tx.take();
        self.hub.close();
        if let Some(writer) = self.writer.take() {
            // The writer only waits for the channel, which was closed above.
            let _ = writer.join();
        }
    }
}

#[async_trait::async_trait]
impl Store for RedbStore {
    fn get(&self, key: &str) -> Result<(Option<Entry>, u64), StoreError> {
        let db = self.db.get()?;
        let txn = db.begin_read().map_err(|e| self.fail(e))?;
        let revision = self.counter(&txn, META_REVISION)?;
        let kv = txn.open_table(KV).map_err(|e| self.fail(e))?;
        let entry = kv
            .get(key)
            .map_err(|e| self.fail(e))?
            .map(|guard| entry_of(key, guard.value()));
        Ok((entry, revision))
    }

    fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<Snapshot, StoreError> {
        let db = self.db.get()?;
        let txn = db.begin_read().map_err(|e| self.fail(e))?;
        let revision = self.counter(&txn, META_REVISION)?;
        let kv = txn.open_table(KV).map_err(|e| self.fail(e))?;
        let start = start_after.unwrap_or(prefix);
        let mut entries = Vec::new();
        let mut remaining = 0;
        for row in kv.range(start..).map_err(|e| self.fail(e))? {
            let (key, value) = row.map_err(|e| self.fail(e))?;
            let key = key.value();
            if !key.starts_with(prefix) {
                break;
            }
            if Some(key) == start_after {
                continue;
            }
            if limit > 0 && entries.len() == limit {
                remaining += 1;
                continue;
            }
            entries.push(entry_of(key, value.value()));
        }
        Ok(Snapshot {
            entries,
            revision,
            remaining,
        })
    }

    async fn commit(&self, txn: Txn) -> Result<Vec<u64>, StoreError> {
        let closed = || StoreError::Closed("the writer has stopped".into());
        let (reply, answer) = oneshot::channel();
        let tx = self.tx.as_ref().ok_or_else(closed)?;
        tx.send(Request { txn, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    fn watch(&self, prefix: &str, from: u64) -> Result<Watcher, StoreError> {
        let (mut watcher, registered) = self.hub.register(prefix)?;
        // Everything up to `registered` is in the log (the writer publishes after it commits); the rest arrives live.
        let db = self.db.get()?;
        let txn = db.begin_read().map_err(|e| self.fail(e))?;
        // A commit can be read a moment before it is published; whoever has read it may watch from there.
        let committed = self.counter(&txn, META_REVISION)?;
        if from > committed {
            return Err(StoreError::Future {
                requested: from,
                current: committed,
            });
        }
        let compacted = self.counter(&txn, META_COMPACTED)?;
        if from < compacted {
            return Err(StoreError::Compacted {
                requested: from,
                oldest: compacted,
            });
        }
        if from < registered {
            watcher.replay = changes(&txn, from, registered, prefix).map_err(|e| self.fail(e))?;
        }
        watcher.after = from.max(registered);
        Ok(watcher)
    }

    fn revision(&self) -> u64 {
        self.hub.published()
    }

    fn prefix_revision(&self, prefix: &str) -> u64 {
        self.hub.level(prefix)
    }
}

/// The log's changes after `from` up to `to` of keys that start with `prefix`.
fn changes(txn: &redb::ReadTransaction, from: u64, to: u64, prefix: &str) -> Result<VecDeque<Arc<Event>>, redb::Error> {
    let log = txn.open_table(LOG)?;
    let mut out = VecDeque::new();
    for row in log.range(from + 1..=to)? {
        let (revision, change) = row?;
        let (key, value, prev) = change.value();
        if key.starts_with(prefix) {
            out.push_back(Arc::new(Event::new(
                revision.value(),
                key.to_owned(),
                value.map(Bytes::copy_from_slice),
                prev.map(Bytes::copy_from_slice),
            )));
        }
    }
    Ok(out)
}

fn entry_of(key: &str, (create_rev, mod_rev, value): (u64, u64, &[u8])) -> Entry {
    Entry {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value),
        create_rev,
        mod_rev,
    }
}

fn classify(path: &str, e: redb::Error) -> StoreError {
    let path = path.to_owned();
    match e {
        redb::Error::Corrupted(detail) => StoreError::Corrupt { path, detail },
        redb::Error::Io(io)
            if matches!(
                io.kind(),
                std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
            ) =>
        {
            StoreError::Corrupt {
                path,
                detail: io.to_string(),
            }
        }
        redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. } => StoreError::Corrupt {
            path,
            detail: e.to_string(),
        },
        other => StoreError::Io {
            path,
            detail: other.to_string(),
        },
    }
}

/// What a batch changed, and the outcome of each of its transactions.
type Applied = (Vec<Arc<Event>>, Vec<Result<Vec<u64>, StoreError>>);

struct Writer {
    db: Arc<Handle>,
    path: String,
    hub: Arc<Hub>,
    log_entries: u64,
    log_bytes: u64,
}

impl Writer {
    fn run(self, mut rx: mpsc::Receiver<Request>) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while rx.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
            match self.write(&batch) {
                Ok((events, outcomes)) => {
                    self.hub.publish(&events);
                    for (request, outcome) in batch.drain(..).zip(outcomes) {
                        // The caller may have gone away; the write stands all the same.
                        let _ = request.reply.send(outcome);
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "store write failed");
                    for request in batch.drain(..) {
                        let _ = request.reply.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    /// Writes a batch. After an I/O error the file is opened anew before anybody is answered, so that the next write,
    /// and every read meanwhile, does not suffer from it.
    fn write(&self, batch: &[Request]) -> Result<Applied, StoreError> {
        let bytes = |op: &Op| match op {
            Op::Put(key, value) => key.len() + value.len(),
            Op::Delete(key) => key.len(),
        };
        let size = batch.iter().flat_map(|request| &request.txn.ops).map(bytes).sum();
        self.db.room_for(size)?;
        let db = match self.db.get() {
            Ok(db) => db,
            Err(_) => {
                self.recover()?;
                self.db.get()?
            }
        };
        let applied = self.apply(&db, batch);
        drop(db);
        applied.map_err(|error| {
            let error = classify(&self.path, error);
            if let Err(again) = self.recover() {
                tracing::error!(error = %again, "the store could not be opened again");
            }
            error
        })
    }

    /// Opens the file anew and tells watchers what a commit has made durable without being able to say so.
    fn recover(&self) -> Result<(), StoreError> {
        self.db.reopen()?;
        let db = self.db.get()?;
        let missed = || -> Result<Vec<Arc<Event>>, redb::Error> {
            let txn = db.begin_read()?;
            let revision = txn.open_table(META)?.get(META_REVISION)?.map_or(0, |v| v.value());
            let published = self.hub.published();
            if revision <= published {
                return Ok(Vec::new());
            }
            Ok(changes(&txn, published, revision, "")?.into())
        };
        self.hub.publish(&missed().map_err(|e| classify(&self.path, e))?);
        Ok(())
    }

    /// Applies a batch in one transaction. A failed precondition fails only its own transaction.
    fn apply(&self, db: &Database, batch: &[Request]) -> Result<Applied, redb::Error> {
        let mut txn = db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        let mut events = Vec::new();
        let mut outcomes = Vec::with_capacity(batch.len());
        {
            let mut kv = txn.open_table(KV)?;
            let mut log = txn.open_table(LOG)?;
            let mut meta = txn.open_table(META)?;
            let counter = |meta: &redb::Table<'_, &'static str, u64>, key: &str| -> Result<u64, StorageError> {
                Ok(meta.get(key)?.map_or(0, |v| v.value()))
            };
            let mut revision = counter(&meta, META_REVISION)?;
            let mut log_bytes = counter(&meta, META_LOG_BYTES)?;
            let before = revision;
            for request in batch {
                if let Some(conflict) = first_conflict(&kv, &request.txn)? {
                    outcomes.push(Err(conflict));
                    continue;
                }
                let mut revisions = Vec::with_capacity(request.txn.ops.len());
                for op in &request.txn.ops {
                    let (key, value) = match op {
                        Op::Put(key, value) => (key, Some(value)),
                        Op::Delete(key) => (key, None),
                    };
                    let prev = kv.get(key.as_str())?.map(|g| {
                        let (create, _, bytes) = g.value();
                        (create, Bytes::copy_from_slice(bytes))
                    });
                    if prev.is_none() && value.is_none() {
                        revisions.push(revision);
                        continue;
                    }
                    revision += 1;
                    match value {
                        Some(value) => {
                            let create = prev.as_ref().map_or(revision, |(create, _)| *create);
                            kv.insert(key.as_str(), (create, revision, value.as_ref()))?;
                        }
                        None => {
                            kv.remove(key.as_str())?;
                        }
                    }
                    let prev = prev.map(|(_, bytes)| bytes);
                    log.insert(revision, (key.as_str(), value.map(AsRef::as_ref), prev.as_deref()))?;
                    log_bytes += row_size(key, value.map(AsRef::as_ref), prev.as_deref());
                    revisions.push(revision);
                    events.push(Arc::new(Event::new(revision, key.clone(), value.cloned(), prev)));
                }
                outcomes.push(Ok(revisions));
            }
            if revision > before {
                meta.insert(META_REVISION, revision)?;
                let mut compacted = counter(&meta, META_COMPACTED)?;
                let mut rows = log.len()?;
                // Compacting to three quarters keeps this out of most commits.
                if rows > self.log_entries || log_bytes > self.log_bytes {
                    while rows > self.log_entries * 3 / 4 || log_bytes > self.log_bytes / 4 * 3 {
                        let Some((oldest, change)) = log.pop_first()? else {
                            break;
                        };
                        compacted = oldest.value();
                        let (key, value, prev) = change.value();
                        log_bytes = log_bytes.saturating_sub(row_size(key, value, prev));
                        rows -= 1;
                    }
                    meta.insert(META_COMPACTED, compacted)?;
                }
                meta.insert(META_LOG_BYTES, log_bytes)?;
            }
        }
        if events.is_empty() {
            txn.abort()?;
        } else {
            txn.commit()?;
        }
        Ok((events, outcomes))
    }
}

fn row_size(key: &str, value: Option<&[u8]>, prev: Option<&[u8]>) -> u64 {
    (key.len() + value.map_or(0, <[u8]>::len) + prev.map_or(0, <[u8]>::len) + 32) as u64
}

fn first_conflict(
    kv: &redb::Table<'_, &'static str, (u64, u64, &'static [u8])>,
    txn: &Txn,
) -> Result<Option<StoreError>, StorageError> {
    for (key, expect) in &txn.expect {
        let current = kv.get(key.as_str())?.map(|g| entry_of(key, g.value()));
        let holds = match (expect, &current) {
            (Expect::Absent, None) | (Expect::Present, Some(_)) => true,
            (Expect::Revision(rev), Some(entry)) => entry.mod_rev == *rev,
            _ => false,
        };
        if !holds {
            return Ok(Some(StoreError::Conflict {
                key: key.clone(),
                current: current.map(Box::new),
            }));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
