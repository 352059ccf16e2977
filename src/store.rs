//! Keeps a login together with the record of its rotation, wherever that may be.

pub mod codex;
mod file;
pub mod memory;
mod record;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::credential::Login;

pub use record::{Header, Phase, Record, Version};

/// A place that keeps one record. All that rotation needs of it, so that one state machine serves one
/// process, many processes and many machines.
pub trait RecordStore: Send + Sync {
    /// The record as it is now, and which version that is. A place that holds no login yet has a
    /// record too.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; whatever is kept there is left alone.
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>>;

    /// Puts a record in the place of the one that was read as `expected`, durably. The future may be
    /// dropped; what it started then still happens whole or not at all.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when certainly nothing was changed.
    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>>;

    /// A number that moves when the record may have changed. A hint only: a change may go unseen,
    /// so whoever waits looks again from time to time.
    fn changes(&self) -> watch::Receiver<u64>;

    /// What outlives what.
    fn durability(&self) -> BoxFuture<'_, Result<Durability, StoreError>>;
}

/// How a compare-and-set ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cas {
    /// The record is in place, as this version.
    Done(Version),
    /// Somebody else changed it first; nothing was done.
    Conflict,
    /// The record may or may not be in place: read again.
    Unknown,
}

/// What a record survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing: it ends with the process.
    Process,
    /// A crash of this machine.
    Disk,
}

/// A store that could not do its work, by what must happen next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A person must mend or remove what is kept there.
    #[error("{place} cannot be read: {what}")]
    Corrupt {
        /// File or entry.
        place: String,
        /// What is wrong and where, without a byte of the contents.
        what: String,
    },
    /// A person must change whose it is or who may write it.
    #[error("{place} is refused: {what}")]
    Denied {
        /// File or entry.
        place: String,
        /// What is wrong with it.
        what: String,
    },
    /// It may work later.
    #[error("{place} is out of reach: {what}")]
    Unavailable {
        /// File or entry.
        place: String,
        /// What went wrong.
        what: String,
    },
}

/// Replaces whatever login a store holds by another, or by none: the user's own act, so it goes over
/// any refresh in flight, whose result is then dropped.
///
/// # Errors
///
/// [`StoreError`]; then nothing was changed.
pub async fn put_login(store: &dyn RecordStore, login: Option<Login>) -> Result<(), StoreError> {
    loop {
        let (version, record) = store.get().await?;
        let next = Record { header: record.header.next_line(login.as_ref()), login: login.clone() };
        match store.cas(version, next).await? {
            Cas::Done(_) => return Ok(()),
            Cas::Conflict | Cas::Unknown => {}
        }
    }
}
