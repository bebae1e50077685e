//! The open database, replaced by a fresh one after an I/O error.
//!
//! redb refuses every operation of a handle on which a write has failed, also after the cause is gone. The writer thread
//! then closes that handle and opens the file anew ([`Handle::reopen`]), which rolls an unfinished commit back. Readers
//! borrow the database for the length of one read. This module knows nothing of keys and revisions.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use redb::{Database, DatabaseError};

use super::super::StoreError;
use super::classify;

/// The file system's free space below which nothing is written, bytes: redb must never meet the end of the disk in the
/// middle of a commit, and reading, which needs no space, goes on.
const RESERVE: u64 = 16 << 20;

/// A database that can be closed and opened again behind its readers.
pub(super) struct Handle {
    path: PathBuf,
    cache_bytes: usize,
    /// None while it is being opened anew, or when that failed.
    open: RwLock<Option<Arc<Database>>>,
}

impl Handle {
    /// Opens or creates the file and checks every page of it: a damaged file is refused here, where it can be said, not
    /// trusted until a read meets the damage.
    pub(super) fn open(path: &Path, cache_bytes: usize) -> Result<Handle, StoreError> {
        let handle = Handle {
            path: path.to_owned(),
            cache_bytes,
            open: RwLock::new(None),
        };
        let database = handle.database()?;
        *handle.open.write().unwrap_or_else(PoisonError::into_inner) = Some(database);
        Ok(handle)
    }

    /// The database, for one read or one write.
    ///
    /// # Errors
    /// [`StoreError::Closed`] after an I/O error from which opening anew has not helped yet.
    pub(super) fn get(&self) -> Result<Arc<Database>, StoreError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| {
            StoreError::Closed(format!(
                "{} could not be opened again after a write error",
                self.path.display()
            ))
        })
    }

    /// Closes the database and opens it anew.
    ///
    /// # Errors
    /// Those of [`Handle::open`]; the handle stays closed then and another try may succeed.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = open.take() {
            // Nobody can borrow it now; whoever has borrowed it is in the middle of a short synchronous read.
            while Arc::strong_count(&old) > 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        *open = Some(self.database()?);
        Ok(())
    }

    /// Whether there is room for a commit of about `bytes`.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`].
    pub(super) fn room_for(&self, bytes: usize) -> Result<(), StoreError> {
        // A file system that cannot say is not full for that reason.
        let Ok(stat) = rustix::fs::statvfs(&self.path) else {
            return Ok(());
        };
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        // Every changed page is written anew, and so are its ancestors; the log holds the bytes a second time.
        let needed = RESERVE.saturating_add((bytes as u64).saturating_mul(4));
        if free >= needed {
            return Ok(());
        }
        Err(StoreError::NoSpace {
            path: self.path.display().to_string(),
            free_mib: free >> 20,
            needed_mib: needed.div_ceil(1 << 20),
        })
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let shown = self.path.display().to_string();
        let existed = self.path.metadata().map(|m| m.len() > 0).unwrap_or(false);
        let mut builder = Database::builder();
        builder.set_cache_size(self.cache_bytes);
        builder.set_check_integrity_on_open(true);
        let opened = if existed {
            builder.open(&self.path)
        } else {
            builder.create(&self.path)
        };
        opened.map(Arc::new).map_err(|e| open_error(&shown, e))
    }
}

fn open_error(path: &str, e: DatabaseError) -> StoreError {
    let path = path.to_owned();
    match e {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => StoreError::Locked { path },
        DatabaseError::UpgradeRequired(v) => StoreError::Corrupt {
            path,
            detail: format!("its file format {v} is not readable by this program"),
        },
        DatabaseError::RepairAborted => StoreError::Corrupt {
            path,
            detail: "its repair was aborted".into(),
        },
        other => classify(&path, other.into()),
    }
}
