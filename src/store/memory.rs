//! Keeps a record in memory, for as long as the process lives.

use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use tokio::sync::watch;

use super::{Cas, Header, Journal, Left, Record, RecordStore, Stamp, StoreError, Version};
use crate::credential::Login;
use crate::secret::Fingerprint;

/// A record that ends with the process.
pub struct MemoryStore {
    kept: Mutex<(u64, Record)>,
    changes: watch::Sender<u64>,
}

impl MemoryStore {
    /// A store that holds this login, or none.
    pub fn new(login: Option<Login>) -> Self {
        let header = Header::first(login.as_ref());
        Self { kept: Mutex::new((0, Record { header, login })), changes: watch::Sender::new(0) }
    }

    fn kept(&self) -> MutexGuard<'_, (u64, Record)> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> (Version, Record) {
        let kept = self.kept();
        (version(kept.0), kept.1.clone())
    }

    fn swap(&self, expected: Version, record: Record) -> Cas {
        let mut kept = self.kept();
        if version(kept.0) != expected {
            return Cas::Conflict;
        }
        *kept = (kept.0 + 1, record);
        self.changes.send_modify(|count| *count += 1);
        Cas::Done(version(kept.0))
    }
}

fn version(count: u64) -> Version {
    Version(Fingerprint::of(&count.to_be_bytes()))
}

impl RecordStore for MemoryStore {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        ready(Ok(self.read())).boxed()
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        ready(Ok(self.swap(expected, record))).boxed()
    }

    fn reserve(&self, _: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        ready(Ok(None)).boxed()
    }

    fn look_back(&self, _: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        ready(Ok(Left::Nothing)).boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}
