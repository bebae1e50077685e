//! Values computed from stored objects, recomputed only when one of their prefixes changed.
//!
//! The store raises a prefix's revision before it acknowledges a write, so whoever reads after its own write sees its effect.

use std::sync::{Arc, Mutex, PoisonError};

use crate::store::{Store, StoreError};

type Build<T> = Box<dyn Fn(&dyn Store) -> Result<T, StoreError> + Send + Sync>;

/// A lazily rebuilt value.
pub(crate) struct Cached<T> {
    prefixes: Vec<String>,
    build: Build<T>,
    slot: Mutex<Option<(u64, Arc<T>)>>,
}

impl<T> Cached<T> {
    pub(crate) fn new(
        prefixes: Vec<String>,
        build: impl Fn(&dyn Store) -> Result<T, StoreError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            prefixes,
            build: Box::new(build),
            slot: Mutex::new(None),
        }
    }

    /// The current value.
    pub(crate) fn get(&self, store: &dyn Store) -> Result<Arc<T>, StoreError> {
        // Read before building: a change in between makes the next call rebuild once more, never less.
        let at = self
            .prefixes
            .iter()
            .map(|p| store.prefix_revision(p))
            .max()
            .unwrap_or(0);
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((revision, value)) = &*slot
            && *revision >= at
        {
            return Ok(value.clone());
        }
        let value = Arc::new((self.build)(store)?);
        *slot = Some((at, value.clone()));
        Ok(value)
    }
}
