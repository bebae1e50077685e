//! The store seam: one trait over an ordered map of keys to JSON documents with one store-wide revision.
//!
//! Called by the request handlers (`crate::registry`), by bootstrap and by the lazily rebuilt caches. It must not know what a
//! Kubernetes object is: keys are strings, values are bytes, and the only order is the revision. Every operation of an
//! acknowledged transaction has its own revision, which is the `resourceVersion` that clients see.

mod hub;
mod redb_store;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;

pub use hub::Watcher;
pub use redb_store::{RedbOptions, RedbStore};

/// What went wrong in the store, sorted by who can do something about it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process (or another part of this one) has the file open.
    #[error("store {path} is already in use by another process; stop that cluster first or choose another name")]
    Locked {
        /// The file.
        path: String,
    },
    /// The file is not a store or is damaged.
    #[error(
        "store {path} is damaged: {detail}; restore it from a backup, or move it away to start with an empty cluster"
    )]
    Corrupt {
        /// The file.
        path: String,
        /// What the reader found.
        detail: String,
    },
    /// The file cannot be opened, read or written.
    #[error("store {path}: {detail}")]
    Io {
        /// The file.
        path: String,
        /// The system's error.
        detail: String,
    },
    /// The file system is full, or nearly; nothing was written.
    #[error(
        "store {path}: its file system has {free_mib} MiB free and {needed_mib} MiB are needed; nothing was written, \
         free some space and try again"
    )]
    NoSpace {
        /// The file.
        path: String,
        /// Free, MiB.
        free_mib: u64,
        /// Wanted, MiB.
        needed_mib: u64,
    },
    /// The revision asked for has been compacted away.
    #[error("revision {requested} is older than the compacted revision {oldest}")]
    Compacted {
        /// The revision asked for.
        requested: u64,
        /// The oldest revision from which a watch can start.
        oldest: u64,
    },
    /// The revision asked for has not happened yet.
    #[error("revision {requested} is in the future, the store is at {current}")]
    Future {
        /// The revision asked for.
        requested: u64,
        /// The newest revision.
        current: u64,
    },
    /// A precondition of a transaction does not hold; nothing was written.
    #[error("precondition on {key} does not hold")]
    Conflict {
        /// The key whose precondition failed.
        key: String,
        /// What is there now.
        current: Option<Box<Entry>>,
    },
    /// The watcher limit is reached.
    #[error("too many watchers")]
    TooManyWatchers,
    /// The writer is gone (shutdown or an earlier write error).
    #[error("the store has been closed: {0}")]
    Closed(String),
}

/// One stored document.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub value: Bytes,
    /// The revision that created the key.
    pub create_rev: u64,
    /// The revision of the last write.
    pub mod_rev: u64,
}

/// A consistent read of a key range.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Entries in key order.
    pub entries: Vec<Entry>,
    /// The revision at which they were read.
    pub revision: u64,
    /// How many entries match beyond those returned.
    pub remaining: u64,
}

/// What must hold for a key before a transaction is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key exists and was last written by this revision.
    Revision(u64),
    /// The key exists.
    Present,
}

/// One write of a transaction.
#[derive(Debug, Clone)]
pub enum Op {
    /// Write a key.
    Put(String, Bytes),
    /// Delete a key; deleting what is not there does nothing.
    Delete(String),
}

/// A compare-and-swap transaction: all preconditions, then all operations, or nothing.
#[derive(Debug, Clone, Default)]
pub struct Txn {
    /// Preconditions.
    pub expect: Vec<(String, Expect)>,
    /// Writes, each with its own revision.
    pub ops: Vec<Op>,
}

impl Txn {
    /// A transaction that creates one key.
    pub fn create(key: impl Into<String>, value: Bytes) -> Self {
        let key = key.into();
        Self {
            expect: vec![(key.clone(), Expect::Absent)],
            ops: vec![Op::Put(key, value)],
        }
    }

    /// A transaction that replaces one key last written at `revision`.
    pub fn replace(key: impl Into<String>, revision: u64, value: Bytes) -> Self {
        let key = key.into();
        Self {
            expect: vec![(key.clone(), Expect::Revision(revision))],
            ops: vec![Op::Put(key, value)],
        }
    }

    /// A transaction that deletes one key last written at `revision`.
    pub fn delete(key: impl Into<String>, revision: u64) -> Self {
        let key = key.into();
        Self {
            expect: vec![(key.clone(), Expect::Revision(revision))],
            ops: vec![Op::Delete(key)],
        }
    }
}

/// The document after and before a change.
pub type Documents = (Option<Arc<Value>>, Option<Arc<Value>>);

/// One change, as the log keeps it and watchers see it.
#[derive(Debug)]
pub struct Event {
    /// The revision of this change.
    pub revision: u64,
    /// The key.
    pub key: String,
    /// The new bytes; none for a deletion.
    pub value: Option<Bytes>,
    /// The bytes before the change; none for a creation.
    pub prev: Option<Bytes>,
    /// Parsed forms, shared by all watchers.
    parsed: OnceLock<Documents>,
}

impl Event {
    /// A change.
    pub fn new(revision: u64, key: String, value: Option<Bytes>, prev: Option<Bytes>) -> Self {
        Self {
            revision,
            key,
            value,
            prev,
            parsed: OnceLock::new(),
        }
    }

    /// The new and the former document, parsed once for all watchers.
    pub fn documents(&self) -> &Documents {
        self.parsed.get_or_init(|| {
            let parse = |b: &Option<Bytes>| b.as_ref().and_then(|b| serde_json::from_slice(b).ok()).map(Arc::new);
            (parse(&self.value), parse(&self.prev))
        })
    }
}

/// The store. Reads are synchronous (memory-mapped speed, no lock held); writes return once they are on disk.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads one key and the revision at which it was read.
    fn get(&self, key: &str) -> Result<(Option<Entry>, u64), StoreError>;
    /// Reads all keys that start with `prefix`, after `start_after` if given, at most `limit` (0: all).
    fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<Snapshot, StoreError>;
    /// Applies a transaction; the revisions are those of its operations in order. Durable when it returns.
    async fn commit(&self, txn: Txn) -> Result<Vec<u64>, StoreError>;
    /// Watches keys that start with `prefix`: every change after `from` (exclusive).
    fn watch(&self, prefix: &str, from: u64) -> Result<Watcher, StoreError>;
    /// The newest revision that can be read.
    fn revision(&self) -> u64;
    /// The newest revision that changed a key under `prefix`, which must be a first-level prefix (`/group/resource/`);
    /// 0 if none did since the store was opened.
    fn prefix_revision(&self, prefix: &str) -> u64;
}

/// `/group/resource/` of a key: the unit in which caches are invalidated.
pub(crate) fn first_level(key: &str) -> &str {
    let mut slashes = key.match_indices('/').map(|(i, _)| i);
    match (slashes.next(), slashes.next(), slashes.next()) {
        (Some(_), Some(_), Some(third)) => &key[..=third],
        _ => key,
    }
}
