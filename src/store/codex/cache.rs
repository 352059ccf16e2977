//! The two places that Codex keeps its tokens in, a file and a keyring entry, and which of them is newer.

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::super::keyring::{Entry, Keyring, RingError};
use super::super::record::{fingerprint, refreshed};
use super::super::{Header, StoreError, Version, file};
use super::auth_json::AuthJson;
use crate::credential::{Keep, Login};
use crate::secret::Fingerprint;

/// One of the two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    File,
    Entry,
}

impl Spot {
    pub(super) fn other(self) -> Self {
        match self {
            Self::File => Self::Entry,
            Self::Entry => Self::File,
        }
    }
}

/// What is in a place.
pub(super) struct CachedLogin {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) members: AuthJson,
    pub(super) login: Option<Login>,
}

/// Why a place could not be read.
pub(super) struct Trouble {
    pub(super) error: StoreError,
    /// There is no such place on this machine, and another one to look at.
    pub(super) may_be_skipped: bool,
}

/// What a look at a place brought; a place that is not looked at holds nothing.
pub(super) type Look = Result<Option<CachedLogin>, Trouble>;

/// What is known of the bytes in a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Nothing,
    Unreadable,
    Bytes(Fingerprint),
}

impl Mark {
    pub(super) fn of(look: &Look) -> Self {
        match look {
            Ok(None) => Self::Nothing,
            Ok(Some(held)) => Self::Bytes(Fingerprint::of(&held.bytes)),
            Err(_) => Self::Unreadable,
        }
    }

    fn written(self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Unreadable => "?".to_owned(),
            Self::Bytes(fingerprint) => fingerprint.to_hex(),
        }
    }
}

/// The version that these make: of the record's bytes, of the file and of the entry.
pub(super) fn version(sidecar: Option<&[u8]>, file: Mark, entry: Mark) -> Version {
    let sidecar = sidecar.map_or(String::new(), |bytes| Fingerprint::of(bytes).to_hex());
    let all = format!("{sidecar}/{}/{}", file.written(), entry.written());
    Version(Fingerprint::of(all.as_bytes()))
}

/// Which of two logins in the two places counts, and whether the other one is certainly older.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) spot: Spot,
    pub(super) is_certain: bool,
}

/// Chooses between the logins of the two places: one that the record calls the generation before is old,
/// then the later refresh counts. Where neither tells, a file that the record speaks of counts, since
/// Codex removes the file when it writes the entry; then the entry, as for Codex.
pub(super) fn choose(header: Option<&Header>, file: &Login, entry: &Login) -> Choice {
    let (in_file, in_entry) = (fingerprint(file), fingerprint(entry));
    let previous = header.and_then(|header| header.previous);
    let certain = |spot| Choice { spot, is_certain: true };
    let likely = |spot| Choice { spot, is_certain: false };
    if in_file == in_entry {
        return likely(Spot::Entry);
    }
    if previous == Some(in_file) {
        return certain(Spot::Entry);
    }
    if previous == Some(in_entry) {
        return certain(Spot::File);
    }
    match (refreshed(file), refreshed(entry)) {
        (Some(file), Some(entry)) if file > entry => certain(Spot::File),
        (Some(file), Some(entry)) if file < entry => certain(Spot::Entry),
        _ if header.is_some_and(|header| header.refresh == Some(in_file)) => likely(Spot::File),
        _ => likely(Spot::Entry),
    }
}

/// The tokens of one Codex home, in either place or in both.
pub(super) struct Cache {
    pub(super) home: PathBuf,
    pub(super) keep: Keep,
    pub(super) keyring: Arc<Keyring>,
}

impl Cache {
    pub(super) fn auth_json(&self) -> PathBuf {
        self.home.join("auth.json")
    }

    /// The entry of this home, by the name that Codex gives it.
    pub(super) fn entry(&self) -> Entry {
        Entry { service: SERVICE.to_owned(), account: format!("cli|{}", self.hash()) }
    }

    /// What entry and record of this home are named by.
    pub(super) fn hash(&self) -> String {
        let home = std::fs::canonicalize(&self.home).unwrap_or_else(|_| self.home.clone());
        let mut hash = Fingerprint::of(home.to_string_lossy().as_bytes()).to_hex();
        hash.truncate(16);
        hash
    }

    /// A place as people read it; without one, where a login would be looked for.
    pub(super) fn place(&self, spot: Option<Spot>) -> String {
        let file = || self.auth_json().display().to_string();
        let entry = || self.entry().to_string();
        match (spot, self.keep) {
            (Some(Spot::File), _) | (None, Keep::File | Keep::Ephemeral) => file(),
            (Some(Spot::Entry), _) | (None, Keep::Keyring) => entry(),
            (None, Keep::Auto) => format!("{}, else {}", entry(), file()),
        }
    }

    /// The places that are looked at.
    pub(super) fn uses(&self, spot: Spot) -> bool {
        match spot {
            Spot::File => self.keep != Keep::Keyring,
            Spot::Entry => matches!(self.keep, Keep::Keyring | Keep::Auto),
        }
    }

    pub(super) fn look(&self, spot: Spot) -> Look {
        match spot {
            _ if !self.uses(spot) => Ok(None),
            Spot::File => self.look_at_file(),
            Spot::Entry => self.look_at_entry(),
        }
    }

    /// Codex before 0.169 wrote the file in place, so one that makes no sense is looked at again before
    /// it is called corrupt.
    fn look_at_file(&self) -> Look {
        let trouble = |error| Trouble { error, may_be_skipped: false };
        let path = self.auth_json();
        let mut looks = 0;
        loop {
            let Some(bytes) = file::read(&path).map_err(trouble)? else { return Ok(None) };
            match parse(bytes) {
                Ok(held) => return Ok(Some(held)),
                Err(what) if looks == CORRUPT_LOOKS => {
                    return Err(trouble(file::corrupt(&path, what)));
                }
                Err(_) => looks += 1,
            }
            std::thread::sleep(CORRUPT_PAUSE);
        }
    }

    fn look_at_entry(&self) -> Look {
        let entry = self.entry();
        let bytes = self.keyring.get(&entry).map_err(|error| Trouble {
            may_be_skipped: self.keep == Keep::Auto && matches!(error, RingError::Absent(_)),
            error: error.into_store_error(&entry),
        })?;
        let held = bytes.map(parse).transpose();
        held.map_err(|what| Trouble {
            error: StoreError::Corrupt { place: entry.to_string(), what, is_replaceable: true },
            may_be_skipped: false,
        })
    }

    /// The bytes in a place, without any judgement of them.
    pub(super) fn bytes(&self, spot: Spot) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        match spot {
            Spot::File => file::read(&self.auth_json()),
            Spot::Entry => {
                let entry = self.entry();
                self.keyring.get(&entry).map_err(|error| error.into_store_error(&entry))
            }
        }
    }

    /// Writes the tokens into a place. The caller holds the locks of that place.
    pub(super) fn set(&self, spot: Spot, members: &AuthJson) -> Result<Mark, StoreError> {
        let unfit = |error: serde_json::Error| StoreError::Denied {
            place: self.place(Some(spot)),
            what: error.to_string(),
        };
        let bytes = match spot {
            Spot::File => {
                let bytes = members.to_bytes().map_err(unfit)?;
                file::replace(&self.auth_json(), FRESH, &bytes)?;
                bytes
            }
            Spot::Entry => {
                let (bytes, entry) = (members.to_compact_bytes().map_err(unfit)?, self.entry());
                let set = self.keyring.set(&entry, &bytes);
                set.map_err(|error| error.into_store_error(&entry))?;
                bytes
            }
        };
        Ok(Mark::Bytes(Fingerprint::of(&bytes)))
    }

    /// Codex's two locks, in its order. They guard the file only: it takes none for the entry.
    pub(super) fn lock(&self, spot: Spot) -> Result<Vec<std::fs::File>, StoreError> {
        match spot {
            Spot::Entry => Ok(Vec::new()),
            Spot::File => Ok(vec![
                file::lock(&self.home.join("auth.lock"), 0o666, CODEX_FIRST_LIMIT)?,
                file::lock(&self.home.join("auth.json.lock"), 0o600, CODEX_SECOND_LIMIT)?,
            ]),
        }
    }

    /// Removes the file, whatever is in it.
    pub(super) fn remove_file(&self) -> Result<(), StoreError> {
        if !self.auth_json().exists() {
            return Ok(());
        }
        let _locks = self.lock(Spot::File)?;
        file::remove(&self.auth_json())
    }

    /// Deletes the entry, whatever is in it. A machine without a keyring has none, unless only the keyring
    /// is used, or there was one when it was looked at.
    pub(super) fn delete_entry(&self, seen: &Look) -> Result<(), RingError> {
        let had_keyring = match seen {
            Ok(entry) => entry.is_some(),
            Err(trouble) => !trouble.may_be_skipped,
        };
        match self.keyring.delete(&self.entry()) {
            Err(RingError::Absent(_)) if self.keep == Keep::Auto && !had_keyring => Ok(()),
            done => done,
        }
    }

    /// Removes the older of two copies, if it is still the one that was read. Whether it could be is
    /// nothing that anything depends on.
    pub(super) fn remove_stale(&self, spot: Spot, read: &CachedLogin) -> Option<Mark> {
        let remove = || -> Result<bool, StoreError> {
            let _locks = self.lock(spot)?;
            if self.bytes(spot)?.as_ref() != Some(&read.bytes) {
                return Ok(false);
            }
            match spot {
                Spot::File => file::remove(&self.auth_json())?,
                Spot::Entry => {
                    let entry = self.entry();
                    let deleted = self.keyring.delete(&entry);
                    deleted.map_err(|error| error.into_store_error(&entry))?;
                }
            }
            Ok(true)
        };
        match remove() {
            Ok(true) => Some(Mark::Nothing),
            Ok(false) => None,
            Err(error) => {
                tracing::warn!(%error, "an older copy of a login could not be removed");
                None
            }
        }
    }
}

fn parse(bytes: Zeroizing<Vec<u8>>) -> Result<CachedLogin, String> {
    let members = AuthJson::parse(&bytes)?;
    let login = members.login()?;
    Ok(CachedLogin { bytes, members, login })
}

/// What Codex names its entries by.
const SERVICE: &str = "Codex Auth";

/// How the name of a cache begins that is being written.
pub(super) const FRESH: &str = ".auth-";

/// Codex holds its first lock for a read and a write.
const CODEX_FIRST_LIMIT: Duration = Duration::from_secs(10);

/// Codex does not wait for `auth.json.lock` at all, so whoever holds it is about to let it go: two seconds are for a disk that
/// is slow.
const CODEX_SECOND_LIMIT: Duration = Duration::from_secs(2);

/// A cache that makes no sense is looked at again this often, so far apart: 4 KiB are written in place in far less than
/// these 100 ms, and nobody who waits for the word that it is corrupt notices them.
const CORRUPT_LOOKS: u32 = 5;
const CORRUPT_PAUSE: Duration = Duration::from_millis(20);
