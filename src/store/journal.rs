//! Keeps what an issuer has answered before anybody uses it, in a file that has its room on the disk already.
//!
//! A journal is of one record and one owner, who holds its lock for as long as it may still write into it: a journal
//! that nobody holds is of somebody who has died. It is never renamed, and others remove it only under the lock of
//! its folder.

#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::keyring::Keyring;
use super::record::{fingerprint, hex, moment};
use super::sealed::form::{StoredTokens, json};
use super::sealed::key;
use super::{Header, Record, StoreError, file, seal};
use crate::credential::Login;
use crate::secret::Fingerprint;
use crate::tasks::Tasks;

/// The journal of one request, reserved before it is sent. One that is dropped stays, for whoever looks.
pub trait Journal: Send + Sync {
    /// Writes down what was answered, sealed and durably, in the room that is reserved. May be called again.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then nothing can be read there.
    fn keep(&self, redeemed: &Redeemed) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Removes it, because what it holds is saved, or because it will never hold anything.
    fn forget(&self) -> BoxFuture<'_, ()>;
}

/// What the journals of a record tell of a request.
#[derive(Debug)]
pub enum Left {
    /// Nothing that is of use.
    Nothing,
    /// Its owner has died, and no answer is there.
    Abandoned,
    /// What was answered; it may be published by anybody.
    Answer(Box<Redeemed>),
}

/// What an issuer has handed out in return for the refresh token of a record.
#[derive(Clone, Debug)]
pub struct Redeemed {
    /// The tokens.
    pub login: Login,
    /// How long the access token lived when it was received, where that is known.
    pub lifetime: Option<Duration>,
    /// When a set was last redeemed because an upstream refused an access token.
    pub forced_at: Option<OffsetDateTime>,
}

impl Redeemed {
    /// The record that publishes this over a header of the generation that it follows.
    pub fn over(&self, header: &Header) -> Record {
        let header = Header {
            owner: header.owner.clone(),
            lifetime: self.lifetime,
            forced_at: self.forced_at,
            ..header.next_generation(&self.login)
        };
        Record { header, login: Some(self.login.clone()) }
    }

    /// Whether these very tokens are what a record holds.
    fn is_in(&self, stamp: &Stamp) -> bool {
        let access = self.login.tokens().map(|set| set.access.fingerprint());
        stamp.refresh == Some(fingerprint(&self.login)) && stamp.access == access
    }
}

/// Which generation of which tokens, and whose claim on it. Holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    line: u64,
    generation: u64,
    owner: String,
    epoch: u64,
    /// That of the refresh token, where the login has one.
    #[serde(with = "hex")]
    pub refresh: Option<Fingerprint>,
    #[serde(with = "hex")]
    access: Option<Fingerprint>,
}

impl Stamp {
    /// That of a record.
    pub fn of(record: &Record) -> Self {
        let header = &record.header;
        let tokens = record.login.as_ref().and_then(Login::tokens);
        Self {
            line: header.line,
            generation: header.generation,
            owner: header.owner.clone(),
            epoch: header.epoch,
            refresh: header.refresh,
            access: tokens.map(|set| set.access.fingerprint()),
        }
    }

    /// Whether both speak of one generation, by whomever it is claimed. The same two tokens are the same generation
    /// also where the record of them was lost and begun again.
    pub fn is_same_generation(&self, other: &Self) -> bool {
        let numbers = (self.line, self.generation) == (other.line, other.generation);
        let tokens = self.access.is_some() && self.access == other.access;
        self.refresh == other.refresh && (numbers || tokens)
    }

    /// Whether both are of one claim.
    pub fn is_same_claim(&self, other: &Self) -> bool {
        (&self.owner, self.epoch) == (&other.owner, other.epoch)
    }
}

/// What is there now, for those who remove what is not needed any more.
pub(super) struct Current {
    pub(super) stamp: Stamp,
    /// Whether the login would have been seen that is kept in a file.
    pub(super) has_seen_file: bool,
    /// The same of one that is kept in the keyring, or sealed with a key there.
    pub(super) has_seen_keyring: bool,
}

impl Current {
    /// A record that could be nowhere else.
    pub(super) fn all(stamp: Stamp) -> Self {
        Self { stamp, has_seen_file: true, has_seen_keyring: true }
    }

    /// Whether that journal may still be of use, though nobody writes into it.
    fn needs(&self, note: &Note, bytes: &[u8]) -> bool {
        let has_seen_its_login = match note.holder {
            Holder::File => self.has_seen_file,
            Holder::Keyring => self.has_seen_keyring,
        };
        let is_of_use = note.stamp.is_same_generation(&self.stamp)
            && (answer_of(bytes).is_some() || note.stamp.is_same_claim(&self.stamp));
        is_of_use || !has_seen_its_login
    }
}

/// The journals of one record, in the folder of ours that the record is in.
pub(super) struct Journals<'a> {
    pub(super) folder: PathBuf,
    /// What the files of the record are named by.
    pub(super) name: String,
    pub(super) keyring: &'a Keyring,
    /// Whether they are sealed with the key in the keyring, else with one in a private file.
    pub(super) in_keyring: bool,
}

impl Journals<'_> {
    /// Makes the journal of that claim, with all the room that it will need, durably. The caller holds the lock of
    /// the folder, and `now` is what is there.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then there is none.
    pub(super) fn reserve(
        &self,
        stamp: Stamp,
        now: &Current,
        tasks: Tasks,
    ) -> Result<Box<dyn Journal>, StoreError> {
        self.sweep(now)?;
        let path = self.path(&stamp.owner);
        if let (Left::Answer(_), _) = self.look(&stamp)? {
            return Err(file::unavailable(&path, "an answer is there already".to_owned()));
        }
        let (holder, key) = self.key()?;
        if is_free(&path)? {
            // Of an earlier request of the same owner, which brought nothing.
            file::remove(&path)?;
        }
        let note = Note { stamp, holder };
        let page = note.page().map_err(|what| file::unavailable(&path, what))?;
        let file = begin(&path, &page).map_err(|error| file::refused(&path, &error))?;
        let bound_to = self.bound_to(note_of(&page));
        let held = LockedJournal { path, file, key, bound_to };
        Ok(Box::new(Reserved { held: Arc::new(held), tasks }))
    }

    /// What they tell of a record, and whether some are there that nobody needs.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there may be an answer that cannot be read now.
    pub(super) fn look(&self, stamp: &Stamp) -> Result<(Left, bool), StoreError> {
        let (mut left, mut untidy) = (Left::Nothing, false);
        for path in self.paths()? {
            // Asked first: what somebody dead has written is all that there will be.
            let free = is_free(&path)?;
            let Some(bytes) = file::read(&path)? else { continue };
            let note = Note::read(&bytes).filter(|note| note.stamp.is_same_generation(stamp));
            let Some(note) = note else {
                untidy |= free;
                continue;
            };
            let is_same_claim = note.stamp.is_same_claim(stamp);
            untidy |= free && !is_same_claim && answer_of(&bytes).is_none();
            let redeemed = self.open(&note, &bytes)?;
            if let Some(redeemed) = redeemed.filter(|redeemed| !redeemed.is_in(stamp)) {
                return Ok((Left::Answer(Box::new(redeemed)), untidy));
            }
            if free && is_same_claim {
                left = Left::Abandoned;
            }
        }
        Ok((left, untidy))
    }

    /// Removes those that nobody writes into and nobody needs: of another generation than the one that the record is
    /// of now, or of another claim on it and without an answer. The caller holds the lock of the folder.
    pub(super) fn sweep(&self, now: &Current) -> Result<(), StoreError> {
        for path in self.paths()? {
            let free = is_free(&path)?;
            let Some(bytes) = file::read(&path)? else { continue };
            if free && !Note::read(&bytes).is_some_and(|note| now.needs(&note, &bytes)) {
                file::remove(&path)?;
            }
        }
        Ok(())
    }

    /// What they tell of a record; those that nobody needs are removed, unless somebody holds the lock of the folder.
    /// Which these are `now` says, what is there under that lock: `stamp` may be of a record that was read long ago.
    ///
    /// # Errors
    ///
    /// As [`Journals::look`].
    pub(super) fn look_and_tidy(
        &self,
        stamp: &Stamp,
        now: impl FnOnce() -> Result<Current, StoreError>,
    ) -> Result<Left, StoreError> {
        let (left, untidy) = self.look(stamp)?;
        if untidy
            && let Ok(_ours) = file::lock_folder(&self.folder, Duration::ZERO)
            && let Ok(now) = now()
        {
            self.sweep_after(&now);
        }
        Ok(left)
    }

    /// As [`Journals::sweep`], where nothing depends on it.
    pub(super) fn sweep_after(&self, now: &Current) {
        if let Err(error) = self.sweep(now) {
            tracing::warn!(%error, "journals that nobody needs could not be removed");
        }
    }

    fn path(&self, owner: &str) -> PathBuf {
        self.folder.join(format!("{}.{owner}.journal", self.name))
    }

    fn paths(&self) -> Result<Vec<PathBuf>, StoreError> {
        let refused = |error: &io::Error| file::refused(&self.folder, error);
        let entries = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| refused(&error))?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| refused(&error))?;
            if self.is_ours(&entry.file_name().to_string_lossy()) {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    }

    /// Whether that is the name of a journal of this record. An owner has no dot in it: a record whose name begins
    /// like this one's is another.
    fn is_ours(&self, file: &str) -> bool {
        let rest = file.strip_prefix(&self.name).and_then(|rest| rest.strip_prefix('.'));
        let owner = rest.and_then(|rest| rest.strip_suffix(".journal"));
        owner.is_some_and(|owner| !owner.contains('.'))
    }

    /// The answer in a journal, if there is a whole one.
    fn open(&self, note: &Note, bytes: &[u8]) -> Result<Option<Redeemed>, StoreError> {
        let Some(sealed) = answer_of(bytes) else { return Ok(None) };
        let key = match note.holder {
            Holder::Keyring => key::find(self.keyring)?,
            Holder::File => read_key(&self.key_file())?,
        };
        let Some(key) = key else { return Ok(None) };
        let bound_to = self.bound_to(note_of(bytes));
        // One that was torn does not open.
        let opened = seal::open(sealed, &key, &bound_to).ok();
        let kept = opened.and_then(|bytes| serde_json::from_slice::<StoredAnswer>(&bytes).ok());
        Ok(kept.map(|kept| kept.redeemed()))
    }

    /// What a seal is bound to, so that it opens nowhere else.
    fn bound_to(&self, note: &[u8]) -> Vec<u8> {
        [b"valetkey journal/", self.name.as_bytes(), b"/", note].concat()
    }

    /// The key to seal with, which is made where there is none.
    fn key(&self) -> Result<(Holder, seal::Key), StoreError> {
        if self.in_keyring {
            return Ok((Holder::Keyring, key::find_or_make(self.keyring)?));
        }
        let path = self.key_file();
        if let Some(key) = read_key(&path)? {
            return Ok((Holder::File, key));
        }
        let no_random = || file::unavailable(&path, "the system gives no random bytes".to_owned());
        let key = seal::new_key().ok_or_else(no_random)?;
        file::replace(&path, FRESH_KEY, &*key)?;
        Ok((Holder::File, key))
    }

    fn key_file(&self) -> PathBuf {
        self.folder.join("journal.key")
    }
}

/// The key in a file; one that is none counts as missing, since what it sealed is out of reach anyway.
fn read_key(path: &Path) -> Result<Option<seal::Key>, StoreError> {
    Ok(file::read(path)?.and_then(|bytes| seal::key_of(&bytes)))
}

/// Creates a journal and holds its lock; every byte that it will ever need is on the disk then.
fn begin(path: &Path, page: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    let mut fill = || {
        // Whoever looks whether anybody holds it does so for a moment, and in shared form.
        file.lock()?;
        file.write_all(page)?;
        file.sync_all()?;
        File::open(file::folder_of(path)?)?.sync_all()
    };
    if let Err(error) = fill() {
        // Should it stay, it is swept once nobody holds it.
        drop(std::fs::remove_file(path));
        return Err(error);
    }
    Ok(file)
}

/// Whether there is such a file and nobody holds it.
fn is_free(path: &Path) -> Result<bool, StoreError> {
    let Some(file) = file::open(path)? else { return Ok(false) };
    match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(file::refused(path, &error)),
    }
}

struct Reserved {
    held: Arc<LockedJournal>,
    tasks: Tasks,
}

struct LockedJournal {
    path: PathBuf,
    /// Locked.
    file: File,
    key: seal::Key,
    bound_to: Vec<u8>,
}

impl LockedJournal {
    fn keep(&self, answer: &[u8]) -> Result<(), StoreError> {
        let sealed = seal::seal(answer, &self.key, &self.bound_to);
        let line = sealed.map_err(|what| file::unavailable(&self.path, what))? + "\n";
        let write = || {
            self.file.write_all_at(line.as_bytes(), NOTE_ROOM as u64)?;
            self.file.sync_data()
        };
        write().map_err(|error| file::refused(&self.path, &error))
    }
}

impl Journal for Reserved {
    fn keep(&self, redeemed: &Redeemed) -> BoxFuture<'_, Result<(), StoreError>> {
        let answer = StoredAnswer::of(redeemed).and_then(|kept| json(&kept));
        async move {
            let held = Arc::clone(&self.held);
            let answer = answer.map_err(|what| file::unavailable(&held.path, what))?;
            let done = self.tasks.spawn_blocking(move || held.keep(&answer)).await;
            done.unwrap_or_else(|_| {
                Err(file::unavailable(&self.held.path, "the job did not finish".to_owned()))
            })
        }
        .boxed()
    }

    fn forget(&self) -> BoxFuture<'_, ()> {
        async move {
            let held = Arc::clone(&self.held);
            // Not durably: one that comes back is superseded.
            let removed = self.tasks.spawn_blocking(move || std::fs::remove_file(&held.path));
            if let Ok(Err(error)) = removed.await {
                tracing::debug!(%error, "a journal stays until somebody sweeps");
            }
        }
        .boxed()
    }
}

/// What a journal says in the clear.
#[derive(Serialize, Deserialize)]
struct Note {
    stamp: Stamp,
    holder: Holder,
}

/// Who has the key that an answer is sealed with.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Holder {
    Keyring,
    File,
}

impl Note {
    /// A journal with this note and without an answer.
    fn page(&self) -> Result<Vec<u8>, String> {
        let mut page = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        if page.len() >= NOTE_ROOM {
            return Err("its note is too long".to_owned());
        }
        page.push(b'\n');
        page.resize(ROOM, 0);
        Ok(page)
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(note_of(bytes)).ok()
    }
}

/// The bytes of the note.
fn note_of(bytes: &[u8]) -> &[u8] {
    let room = &bytes[..bytes.len().min(NOTE_ROOM)];
    room.split(|byte| *byte == b'\n').next().unwrap_or_default()
}

/// The sealed answer, if there is one that ends.
fn answer_of(bytes: &[u8]) -> Option<&str> {
    let room = bytes.get(NOTE_ROOM..)?;
    let end = memchr::memchr(b'\n', room)?;
    std::str::from_utf8(&room[..end]).ok()
}

/// An answer as it is written down.
#[derive(Serialize, Deserialize)]
struct StoredAnswer {
    kind: Kind,
    tokens: StoredTokens,
    lifetime: Option<Duration>,
    #[serde(with = "moment")]
    forced_at: Option<OffsetDateTime>,
}

/// The kinds of login that rotate.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    ChatGpt,
    OAuth,
}

impl StoredAnswer {
    fn of(redeemed: &Redeemed) -> Result<Self, String> {
        let (kind, set) = match &redeemed.login {
            Login::ChatGpt(set) => (Kind::ChatGpt, set),
            Login::OAuth(set) => (Kind::OAuth, set),
            _ => return Err("a login of this kind does not rotate".to_owned()),
        };
        let (lifetime, forced_at) = (redeemed.lifetime, redeemed.forced_at);
        Ok(Self { kind, tokens: StoredTokens::of(set), lifetime, forced_at })
    }

    fn redeemed(&self) -> Redeemed {
        let set = self.tokens.to_set();
        let login = match self.kind {
            Kind::ChatGpt => Login::ChatGpt(set),
            Kind::OAuth => Login::OAuth(set),
        };
        Redeemed { login, lifetime: self.lifetime, forced_at: self.forced_at }
    }
}

/// How the name of a key begins that is being written.
pub(super) const FRESH_KEY: &str = ".key-";

/// Room of the note: one block of any usual file system, so that writing an answer touches no byte of it.
const NOTE_ROOM: usize = 4 * 1024;

/// Size of a journal: the note and any answer seen, several times over.
const ROOM: usize = 64 * 1024;
