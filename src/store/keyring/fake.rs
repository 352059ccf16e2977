//! A keyring in memory that can be locked, absent, failing and hanging.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};

use zeroize::Zeroizing;

use super::{Entry, Ring, RingError};

/// How the keyring is disposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Willing,
    Locked,
    Absent,
    Failing,
    /// Reads, and says no to writes.
    ReadOnly,
    /// Reads, and is gone when it shall write.
    Ending,
    /// Does what it is asked as soon as its mood changes.
    Hanging,
    /// Reads, and hangs when it shall write.
    HangingWrites,
    Panicking,
}

pub(crate) struct FakeRing {
    mood: Mutex<Mood>,
    changed: Condvar,
    kept: Mutex<BTreeMap<Entry, Vec<u8>>>,
    asked: Mutex<usize>,
}

impl FakeRing {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            mood: Mutex::new(Mood::Willing),
            changed: Condvar::new(),
            kept: Mutex::default(),
            asked: Mutex::new(0),
        })
    }

    pub(crate) fn be(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.changed.notify_all();
    }

    /// How many questions were begun.
    pub(crate) fn asked(&self) -> usize {
        *self.asked.lock().unwrap()
    }

    /// What an entry holds, however the keyring is disposed.
    pub(crate) fn peek(&self, account: &str) -> Option<String> {
        let kept = self.kept.lock().unwrap();
        let found = kept.iter().find(|(entry, _)| entry.account == account);
        found.map(|(_, value)| String::from_utf8(value.clone()).unwrap())
    }

    /// Puts a value there, as another program does.
    pub(crate) fn put(&self, entry: &Entry, value: &str) {
        self.kept.lock().unwrap().insert(entry.clone(), value.as_bytes().to_vec());
    }

    /// Removes every entry, as another program does.
    pub(crate) fn clear(&self) {
        self.kept.lock().unwrap().clear();
    }

    fn answer(&self, writes: bool) -> Result<(), RingError> {
        *self.asked.lock().unwrap() += 1;
        let hangs =
            |mood: &mut Mood| *mood == Mood::Hanging || (writes && *mood == Mood::HangingWrites);
        let mood = *self.changed.wait_while(self.mood.lock().unwrap(), hangs).unwrap();
        match mood {
            Mood::Locked => Err(RingError::Locked),
            Mood::Absent => Err(RingError::Absent("no secret service".to_owned())),
            Mood::Failing => Err(RingError::Failed("the disk is full".to_owned())),
            Mood::Ending if writes => Err(RingError::Absent("no secret service".to_owned())),
            Mood::ReadOnly if writes => Err(RingError::Failed("the disk is full".to_owned())),
            Mood::Panicking => panic!("as asked"),
            _ => Ok(()),
        }
    }
}

impl Ring for FakeRing {
    fn get(&self, entry: &Entry) -> Result<Option<Zeroizing<Vec<u8>>>, RingError> {
        self.answer(false)?;
        Ok(self.kept.lock().unwrap().get(entry).cloned().map(Zeroizing::new))
    }

    fn set(&self, entry: &Entry, value: &[u8]) -> Result<(), RingError> {
        self.answer(true)?;
        self.kept.lock().unwrap().insert(entry.clone(), value.to_vec());
        Ok(())
    }

    fn delete(&self, entry: &Entry) -> Result<(), RingError> {
        self.answer(true)?;
        self.kept.lock().unwrap().remove(entry);
        Ok(())
    }
}
