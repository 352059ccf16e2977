//! Reads and writes entries of the desktop's keyring, and never waits for it longer than two seconds.
//!
//! What a keyring is asked may take for ever: its service may hang, or wait for a person. So every
//! question has a thread of its own that nobody waits for in the end, and there is never more than one
//! for a keyring.

#[cfg(test)]
pub(crate) mod fake;
#[cfg(not(target_os = "linux"))]
mod native;
#[cfg(target_os = "linux")]
mod service;

#[cfg(not(target_os = "linux"))]
use native::System;
#[cfg(target_os = "linux")]
use service::System;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::StoreError;
use crate::tasks;

/// A keyring as it is asked: each call may block for ever, and none opens a dialogue.
pub trait Ring: Send + Sync {
    /// The value of an entry; `None` when there is no such entry.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    fn get(&self, entry: &Entry) -> Result<Option<Zeroizing<Vec<u8>>>, RingError>;

    /// Sets the value of an entry, which is made where it is missing.
    ///
    /// # Errors
    ///
    /// [`RingError`]; then nothing was changed.
    fn set(&self, entry: &Entry, value: &[u8]) -> Result<(), RingError>;

    /// Deletes an entry; one that is not there is deleted already.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    fn delete(&self, entry: &Entry) -> Result<(), RingError>;
}

/// Why a keyring gave no answer, or no good one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A person must unlock it first. Nothing was read or changed.
    #[error("it is locked")]
    Locked,
    /// There is none on this machine, or none that can be reached from here.
    #[error("{0}")]
    Absent(String),
    /// It said no. Nothing was changed.
    #[error("{0}")]
    Failed(String),
    /// It was asked and has not answered in time. It may still do what it was asked.
    #[error("it does not answer")]
    Silent,
    /// It has not answered an earlier question yet, so it was not asked.
    #[error("it does not answer")]
    Busy,
}

impl RingError {
    /// The same as an error of the store that needs the entry.
    pub(super) fn into_store_error(self, entry: &Entry) -> StoreError {
        let place = entry.to_string();
        match self {
            Self::Locked | Self::Silent | Self::Busy => StoreError::Locked { place },
            Self::Absent(what) | Self::Failed(what) => StoreError::NoKeyring { place, what },
        }
    }
}

/// The name of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Entry {
    /// Which program's it is.
    pub service: String,
    /// Which of that program's.
    pub account: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "keyring: {}, {}", self.service, self.account)
    }
}

/// A keyring that answers within two seconds, or counts as not answering. Its calls block for as long, so
/// they belong off the runtime's threads.
pub struct Keyring {
    ring: Arc<dyn Ring>,
    turn: Arc<Turn>,
    limit: Duration,
}

impl Keyring {
    /// The keyring of this desktop. Nothing is asked before the first call.
    pub fn system() -> Arc<Self> {
        Self::over(Arc::new(System))
    }

    /// A keyring over any ring.
    pub fn over(ring: Arc<dyn Ring>) -> Arc<Self> {
        Self::with_limit(ring, LIMIT)
    }

    pub(super) fn with_limit(ring: Arc<dyn Ring>, limit: Duration) -> Arc<Self> {
        Arc::new(Self { ring, turn: Arc::default(), limit })
    }

    /// The value of an entry; `None` when there is no such entry.
    pub(super) fn get(&self, entry: &Entry) -> Result<Option<Zeroizing<Vec<u8>>>, RingError> {
        let entry = entry.clone();
        self.ask(move |ring| ring.get(&entry))
    }

    /// Sets the value of an entry. [`RingError::Silent`] when that may or may not have happened.
    pub(super) fn set(&self, entry: &Entry, value: &[u8]) -> Result<(), RingError> {
        let (entry, value) = (entry.clone(), Zeroizing::new(value.to_vec()));
        self.ask(move |ring| ring.set(&entry, &value))
    }

    /// Deletes an entry. [`RingError::Silent`] when that may or may not have happened.
    pub(super) fn delete(&self, entry: &Entry) -> Result<(), RingError> {
        let entry = entry.clone();
        self.ask(move |ring| ring.delete(&entry))
    }

    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Ring) -> Result<T, RingError> + Send + 'static,
    ) -> Result<T, RingError> {
        let taken = Turn::take(&self.turn, self.limit).ok_or(RingError::Busy)?;
        let (answer, answered) = mpsc::sync_channel(1);
        let ring = Arc::clone(&self.ring);
        let asking = move || {
            let said = question(&*ring);
            // Whoever hears the answer may ask again at once.
            drop(taken);
            // Nobody may be waiting any more.
            drop(answer.send(said));
        };
        let started = tasks::detached("keyring", asking);
        let _nobody_awaits = started.map_err(|error| RingError::Failed(error.to_string()))?;
        match answered.recv_timeout(self.limit) {
            Ok(said) => said,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(RingError::Silent),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(RingError::Failed("the keyring's own code failed".to_owned()))
            }
        }
    }
}

/// Whose turn it is to ask: one at a time, however many want to.
#[derive(Default)]
struct Turn {
    /// Since when it is somebody's.
    taken: Mutex<Option<Instant>>,
    given_back: Condvar,
}

/// The turn, given back on drop.
struct Taken(Arc<Turn>);

impl Turn {
    /// Takes it within the limit. One who has had it for as long already is waited for a quarter of that: it has no answer,
    /// and nor would we, unless the keyring has just come back.
    fn take(turn: &Arc<Self>, limit: Duration) -> Option<Taken> {
        let (begun, mut taken) = (Instant::now(), turn.lock());
        while let Some(since) = *taken {
            let until = (since + limit).max(begun + limit / 4).min(begun + limit);
            let left = until.checked_duration_since(Instant::now())?;
            let waiting = turn.given_back.wait_timeout(taken, left);
            (taken, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        }
        *taken = Some(Instant::now());
        Some(Taken(Arc::clone(turn)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        *self.0.lock() = None;
        self.0.given_back.notify_one();
    }
}

/// How long a keyring may take for an answer: one that works needs milliseconds, and a person who waits
/// for a command notices more than this.
const LIMIT: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::fake::{FakeRing, Mood};
    use super::*;

    fn entry() -> Entry {
        Entry { service: "s".to_owned(), account: "a".to_owned() }
    }

    fn kept(keyring: &Keyring) -> Option<Vec<u8>> {
        keyring.get(&entry()).unwrap().map(|value| value.to_vec())
    }

    #[test]
    fn keeps_values() {
        let keyring = Keyring::over(FakeRing::new());
        assert_eq!(kept(&keyring), None);
        keyring.set(&entry(), b"one").unwrap();
        keyring.set(&entry(), b"two").unwrap();
        assert_eq!(kept(&keyring), Some(b"two".to_vec()));
        keyring.delete(&entry()).unwrap();
        keyring.delete(&entry()).unwrap();
        assert_eq!(kept(&keyring), None);
    }

    #[test]
    fn a_lock_is_no_missing_entry() {
        let ring = FakeRing::new();
        let keyring = Keyring::over(ring.clone());
        ring.be(Mood::Locked);
        assert_eq!(keyring.get(&entry()).unwrap_err(), RingError::Locked);
        let error = RingError::Locked.into_store_error(&entry());
        assert!(matches!(&error, StoreError::Locked { place } if place == "keyring: s, a"));
        ring.be(Mood::Absent);
        let error = keyring.get(&entry()).unwrap_err();
        assert!(matches!(error.into_store_error(&entry()), StoreError::NoKeyring { .. }));
    }

    #[test]
    fn one_that_hangs_is_asked_once() {
        let ring = FakeRing::new();
        let keyring = Keyring::with_limit(ring.clone(), Duration::from_millis(50));
        ring.be(Mood::Hanging);
        assert_eq!(keyring.set(&entry(), b"late"), Err(RingError::Silent));
        for _ in 0..3 {
            assert_eq!(keyring.get(&entry()).unwrap_err(), RingError::Busy);
        }
        assert_eq!(ring.asked(), 1, "no second thread waits for it");
        // Nor is it waited for once more for as long: a command may ask several times.
        let (turn, begun, patient) =
            (Arc::new(Turn::default()), Instant::now(), Duration::from_secs(4));
        *turn.lock() = begun.checked_sub(patient);
        assert!(turn.lock().is_some() && Turn::take(&turn, patient).is_none());
        assert!(begun.elapsed() < patient);
        ring.be(Mood::Willing);
        // The question that was given up is answered now; the next one waits for it.
        let keyring = Keyring { ring, turn: keyring.turn.clone(), limit: LIMIT };
        assert_eq!(kept(&keyring), Some(b"late".to_vec()));
    }

    #[test]
    fn a_panic_takes_nothing_with_it() {
        let ring = FakeRing::new();
        let keyring = Keyring::over(ring.clone());
        ring.be(Mood::Panicking);
        assert!(matches!(keyring.get(&entry()), Err(RingError::Failed(_))));
        ring.be(Mood::Willing);
        assert_eq!(kept(&keyring), None);
    }
}
