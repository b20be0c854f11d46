//! Values that the control plane replaces and workers look at between batches.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Holds the newest of several values. Looking for a newer one is one load of a number; only when
/// there is one is the lock taken, for as long as a pointer takes to copy.
#[derive(Debug)]
pub(crate) struct Slot<T> {
    generation: AtomicU64,
    value: Mutex<Arc<T>>,
}

impl<T> Slot<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            generation: AtomicU64::new(0),
            value: Mutex::new(Arc::new(value)),
        }
    }

    pub(crate) fn set(&self, value: T) {
        self.change(|_| value);
    }

    /// Puts something in place of the value that is made of it.
    pub(crate) fn change(&self, change: impl FnOnce(&T) -> T) {
        let mut place = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let new = Arc::new(change(&place));
        let old = std::mem::replace(&mut *place, new);
        self.generation.fetch_add(1, Ordering::Release);
        drop(place);
        // A large value is freed after the lock is.
        drop(old);
    }

    pub(crate) fn load(&self) -> Arc<T> {
        Arc::clone(&self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn reader(self: &Arc<Self>) -> Reader<T> {
        let seen = self.generation.load(Ordering::Acquire);
        Reader {
            slot: Arc::clone(self),
            seen,
            value: self.load(),
        }
    }
}

/// One worker's look at a slot.
#[derive(Debug)]
pub(crate) struct Reader<T> {
    slot: Arc<Slot<T>>,
    seen: u64,
    value: Arc<T>,
}

impl<T> Reader<T> {
    /// Goes over to the newest value; says whether it is another.
    pub(crate) fn refresh(&mut self) -> bool {
        let generation = self.slot.generation.load(Ordering::Acquire);
        if generation == self.seen {
            return false;
        }
        self.seen = generation;
        self.value = self.slot.load();
        true
    }

    pub(crate) fn value(&self) -> &Arc<T> {
        &self.value
    }
}
