//! Keeps a login in the cache that Codex owns, `auth.json` or its keyring entry, with our record of its
//! rotation beside it.
//!
//! Codex and we are two writers of one cache. Ours writes the file under Codex's two locks, in Codex's order,
//! keeps what we do not know, and never goes over something that we have not read. The record says by
//! fingerprint of which tokens it speaks: tokens that differ were written by somebody else and are
//! newer than the record.

pub mod auth_json;
mod cache;
mod found;
pub mod plain;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::journal::{Current, Journal, Journals, Left, Stamp};
use super::keyring::Keyring;
use super::watch::Watch;
use super::{Cas, Header, Record, RecordStore, StoreError, Version, file, journal, record};
use crate::credential::{Keep, Login};
use crate::tasks::Tasks;
use auth_json::AuthJson;
use cache::{Cache, CachedLogin, Mark, Spot, choose, version};
use found::{Found, Reading};

/// The login in one Codex home or in the keyring entry of that home, and its record in `.valetkey` there.
///
/// The home need not exist; it is made when a login is put into it.
pub struct CodexStore {
    home: Arc<Home>,
    tasks: Tasks,
}

impl CodexStore {
    /// The store of that Codex home. Its reads and writes are jobs of `tasks`, which shutdown waits for.
    /// A login that is kept in memory is no concern of this store: for it, [`Keep::Ephemeral`] is the file.
    pub fn new(home: PathBuf, keep: Keep, keyring: Arc<Keyring>, tasks: Tasks) -> Self {
        let cache = Cache { home, keep, keyring };
        let home = Home { cache, watch: Watch::new(concerns_us), found_in: Mutex::default() };
        Self { home: Arc::new(home), tasks }
    }

    /// Runs a job on the cache off the runtime's threads; it goes on when its caller goes away.
    fn run<T, F>(&self, job: F) -> BoxFuture<'_, Result<T, StoreError>>
    where
        F: FnOnce(&Home) -> Result<T, StoreError> + Send + 'static,
        T: Send + 'static,
    {
        async move {
            let home = Arc::clone(&self.home);
            let done = self.tasks.spawn_blocking(move || job(&home)).await;
            done.unwrap_or_else(|_| {
                Err(file::unavailable(&self.home.cache.home, "the job did not finish".to_owned()))
            })
        }
        .boxed()
    }
}

impl RecordStore for CodexStore {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        self.run(|home| home.get())
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        self.run(move |home| home.swap(expected, &record))
    }

    fn put(
        &self,
        login: Option<Login>,
        lifetime: Option<Duration>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(move |home| home.put(login, lifetime))
    }

    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        let tasks = self.tasks.clone();
        self.run(move |home| {
            let _ours = home.lock(LOCK_LIMIT)?;
            home.journals().reserve(stamp, &home.now()?, tasks).map(Some)
        })
    }

    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        self.run(move |home| home.journals().look_and_tidy(&stamp, || home.now()))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.home.watch.subscribe()
    }

    fn file(&self) -> Option<PathBuf> {
        let in_file = *self.home.found_in() == Some(Spot::File);
        in_file.then(|| self.home.cache.auth_json())
    }

    fn place(&self) -> String {
        self.home.cache.place(*self.home.found_in())
    }
}

struct Home {
    cache: Cache,
    watch: Watch,
    /// Where the login was when it was last read or written.
    found_in: Mutex<Option<Spot>>,
}

impl Home {
    fn ours(&self) -> PathBuf {
        self.cache.home.join(".valetkey")
    }

    /// The record's file.
    fn sidecar(&self) -> PathBuf {
        self.ours().join(format!("{}.json", self.name()))
    }

    /// What record and journals are named by: as the keyring entry of this home, so that both are one record. A home that is
    /// mounted elsewhere too, or was moved, has the record that is there: what one path knows of a token, all must.
    fn name(&self) -> String {
        let own = self.cache.hash();
        let names = std::fs::read_dir(self.ours()).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let name = name.strip_suffix(".json")?;
            let is_hash = name.len() == own.len() && name.bytes().all(|it| it.is_ascii_hexdigit());
            is_hash.then(|| name.to_owned())
        });
        // Its own before all others; of several others the same for whoever looks.
        names.min_by_key(|name| (*name != own, name.clone())).unwrap_or(own)
    }

    fn now(&self) -> Result<Current, StoreError> {
        let found = self.read(Reading::Strict)?;
        let record = Record { header: found.header.clone(), login: found.login().cloned() };
        Ok(self.now_with(&found, &record))
    }

    /// What is there once that record is in the place of what was found. A place that was not looked at, or could not be,
    /// may hold another login, whose journals are not in the way.
    fn now_with(&self, found: &Found, record: &Record) -> Current {
        let has_seen = |spot| self.cache.uses(spot) && found.look(spot).is_ok();
        Current {
            stamp: Stamp::of(record),
            has_seen_file: has_seen(Spot::File),
            has_seen_keyring: has_seen(Spot::Entry),
        }
    }

    fn journals(&self) -> Journals<'_> {
        Journals {
            folder: self.ours(),
            name: self.name(),
            keyring: &self.cache.keyring,
            in_keyring: *self.found_in() == Some(Spot::Entry),
        }
    }

    /// Our lock over the home, for one reading and writing. Whoever has it removes what dead writers have left.
    fn lock(&self, limit: Duration) -> Result<std::fs::File, StoreError> {
        file::make_private_folder(&self.ours())?;
        let lock = file::lock_folder(&self.ours(), limit)?;
        file::sweep(&self.cache.home, &[cache::FRESH]);
        file::sweep(&self.ours(), &[FRESH_RECORD, journal::FRESH_KEY]);
        Ok(lock)
    }

    fn found_in(&self) -> std::sync::MutexGuard<'_, Option<Spot>> {
        self.found_in.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> Result<(Version, Record), StoreError> {
        self.watch.update(&[self.cache.home.clone(), self.ours()]);
        let mut found = self.read(Reading::Strict)?;
        if found.has_stale && self.tidy(&found).is_ok() {
            found = self.read(Reading::Strict)?;
        }
        if found.spot.is_none() {
            self.explain_encrypted()?;
        }
        let login = found.login().cloned();
        let record = Record::of(found.header, login);
        Ok((found.version, record))
    }

    /// Codex can keep its login encrypted beside the cache; then the cache is empty, and yet somebody
    /// is signed in.
    fn explain_encrypted(&self) -> Result<(), StoreError> {
        let path = self.cache.home.join("secrets/cli_auth.age");
        match std::fs::symlink_metadata(&path) {
            Ok(_) => Err(StoreError::Encrypted { place: path.display().to_string() }),
            Err(_) => Ok(()),
        }
    }

    /// What is kept now. Takes no lock, so that a home that cannot be written can still be read.
    fn read(&self, reading: Reading) -> Result<Found, StoreError> {
        // The record first: tokens newer than their record are told by the fingerprint, a record newer
        // than its tokens could not be told from somebody else's write.
        let path = self.sidecar();
        let sidecar = file::read(&path)?;
        let recorded: Option<Header> = match &sidecar {
            None => None,
            Some(bytes) => Some(serde_json::from_slice(bytes).map_err(|error| {
                let at = (error.line(), error.column());
                file::corrupt(&path, format!("it is no record (line {}, column {})", at.0, at.1))
            })?),
        };
        let (file, entry) = (self.cache.look(Spot::File), self.cache.look(Spot::Entry));
        let version = version(sidecar.as_ref().map(|it| &***it), Mark::of(&file), Mark::of(&entry));
        let header = Header::first(None);
        let mut found = Found { version, header, spot: None, has_stale: false, file, entry };
        found.settle(recorded.as_ref(), reading)?;
        found.header = match recorded {
            None => Header::first(found.login()),
            Some(header) => header.speaking_of(found.login()),
        };
        *self.found_in() = found.spot;
        Ok(found)
    }

    /// Removes the older of two copies under our lock, unless somebody holds it.
    fn tidy(&self, before: &Found) -> Result<(), StoreError> {
        let _ours = self.lock(Duration::ZERO)?;
        let now = self.read(Reading::Strict)?;
        if now.version == before.version
            && let Some(stale) = now.spot.map(Spot::other)
            && let Some(held) = now.held(stale)
        {
            self.cache.remove_stale(stale, held);
        }
        Ok(())
    }

    fn swap(&self, expected: Version, record: &Record) -> Result<Cas, StoreError> {
        let _ours = self.lock(LOCK_LIMIT)?;
        let found = self.read(Reading::Strict)?;
        if found.version != expected {
            return Ok(Cas::Conflict);
        }
        match self.write(&found, record) {
            Ok(Some(version)) => Ok(Cas::Done(version)),
            Ok(None) => Ok(Cas::Conflict),
            // Part of it may be in place; a keyring that was given up on may do it yet.
            Err(error) => match self.read(Reading::Strict) {
                Ok(now) if now.version == expected => Err(error),
                _ => {
                    tracing::warn!(%error, "a record may have been written in part");
                    Ok(Cas::Unknown)
                }
            },
        }
    }

    /// Replaces whatever is there. A keyring that cannot be read keeps nobody from signing in or out.
    fn put(&self, login: Option<Login>, lifetime: Option<Duration>) -> Result<(), StoreError> {
        let _ours = self.lock(LOCK_LIMIT)?;
        for _ in 0..PUT_TRIES {
            let found = self.read(Reading::ToReplace)?;
            let header = Header { lifetime, ..found.header.next_line(login.as_ref()) };
            let record = Record { header, login: login.clone() };
            match self.write(&found, &record) {
                Ok(Some(_)) => {
                    self.journals().sweep_after(&self.now_with(&found, &record));
                    return Ok(());
                }
                Ok(None) => {}
                Err(error) if self.holds(login.as_ref()) => {
                    // The record follows from the tokens: the next who writes it down writes this one.
                    tracing::warn!(%error, "a login is saved, and what is said of it is not");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        let place = self.cache.place(None);
        Err(StoreError::Unavailable { place, what: "another program keeps writing it".to_owned() })
    }

    /// Whether this very login is what is kept, and nothing has to be said of another place.
    fn holds(&self, login: Option<&Login>) -> bool {
        login.is_some()
            && self.read(Reading::ToReplace).is_ok_and(|now| record::same_login(now.login(), login))
    }

    /// Writes tokens, where they changed, then the record. `None` when Codex wrote first.
    fn write(&self, found: &Found, record: &Record) -> Result<Option<Version>, StoreError> {
        let is_new_line = found.header.line != record.header.line;
        let is_same = record::same_login(found.login(), record.login.as_ref());
        let written = match &record.login {
            _ if is_same && !is_new_line => WriteOutcome::unchanged(found),
            None => self.remove_tokens(found)?,
            Some(login) => self.write_tokens(found, login, is_new_line)?,
        };
        let WriteOutcome::Done { mut file, mut entry, spot, remains } = written else {
            return Ok(None);
        };
        if let Some(stale) = spot.map(Spot::other)
            && let Some(held) = self.stale(found, record, stale)
            && let Some(mark) = self.cache.remove_stale(stale, held)
        {
            match stale {
                Spot::File => file = mark,
                Spot::Entry => entry = mark,
            }
        }
        let path = self.sidecar();
        let sidecar = serde_json::to_vec_pretty(&record.header)
            .map_err(|error| file::corrupt(&path, error.to_string()))?;
        file::replace(&path, FRESH_RECORD, &sidecar)?;
        *self.found_in() = spot;
        match remains {
            Some(error) => Err(error),
            None => Ok(Some(version(Some(&sidecar), file, entry))),
        }
    }

    /// What another place than the one written holds, if it is certainly older.
    fn stale<'a>(&self, found: &'a Found, record: &Record, other: Spot) -> Option<&'a CachedLogin> {
        let held = found.held(other)?;
        let (old, new) = (held.login.as_ref()?, record.login.as_ref()?);
        let choice = match other {
            Spot::File => choose(Some(&record.header), old, new),
            Spot::Entry => choose(Some(&record.header), new, old),
        };
        let is_new_line = found.header.line != record.header.line;
        let is_older = is_new_line || (choice.spot != other && choice.is_certain);
        is_older.then_some(held)
    }

    /// Writes the tokens where they were read; those of a new login into the keyring where that is
    /// wanted and works.
    fn write_tokens(
        &self,
        found: &Found,
        login: &Login,
        is_new_line: bool,
    ) -> Result<WriteOutcome, StoreError> {
        let spot = match (self.cache.uses(Spot::Entry), self.cache.uses(Spot::File)) {
            (false, _) => Spot::File,
            (true, false) => Spot::Entry,
            (true, true) => found.spot.filter(|_| !is_new_line).unwrap_or(Spot::Entry),
        };
        let written = self.write_into(spot, found, login, is_new_line);
        match written {
            Err(error) if spot == Spot::Entry && is_new_line && self.cache.uses(Spot::File) => {
                tracing::warn!(%error, "a login goes into a file: the keyring cannot keep it");
                self.write_into(Spot::File, found, login, is_new_line)
            }
            written => written,
        }
    }

    fn write_into(
        &self,
        spot: Spot,
        found: &Found,
        login: &Login,
        is_new_line: bool,
    ) -> Result<WriteOutcome, StoreError> {
        let _locks = self.cache.lock(spot)?;
        if self.was_changed(found, spot)? {
            return Ok(WriteOutcome::NotOver);
        }
        if spot == Spot::File && found.file.is_err() {
            let what = "what is in it makes no sense".to_owned();
            return Err(file::corrupt(&self.cache.auth_json(), what));
        }
        let held = found.held(spot);
        let members = match (login, held) {
            (Login::ChatGpt(set), Some(held)) if !is_new_line => {
                Some(held.members.with_tokens(set))
            }
            _ => AuthJson::of(login),
        };
        let members = members.ok_or_else(|| StoreError::Denied {
            place: self.cache.place(Some(spot)),
            what: "a login of this kind is not ours to write".to_owned(),
        })?;
        let (mut file, mut entry) = (Mark::of(&found.file), Mark::of(&found.entry));
        match spot {
            Spot::File => file = self.cache.set(spot, &members)?,
            Spot::Entry => entry = self.cache.set(spot, &members)?,
        }
        // As Codex does.
        if !self.cache.uses(Spot::File)
            && let Err(error) = self.cache.remove_file()
        {
            tracing::warn!(%error, "a login is in the keyring, and an old file still there");
        }
        Ok(WriteOutcome::Done { file, entry, spot: Some(spot), remains: None })
    }

    /// Removes the tokens from both places. A keyring that cannot be reached keeps its entry, which the
    /// caller must hear of.
    fn remove_tokens(&self, found: &Found) -> Result<WriteOutcome, StoreError> {
        if self.was_changed(found, Spot::Entry).unwrap_or(false) {
            return Ok(WriteOutcome::NotOver);
        }
        let locks = self.cache.lock(Spot::File)?;
        if self.was_changed(found, Spot::File)? {
            return Ok(WriteOutcome::NotOver);
        }
        file::remove(&self.cache.auth_json())?;
        drop(locks);
        let deleted = match self.cache.uses(Spot::Entry) {
            true => self.cache.delete_entry(&found.entry),
            false => Ok(()),
        };
        let place = || self.cache.entry().to_string();
        let remains = deleted
            .err()
            .map(|error| StoreError::Remains { place: place(), what: error.to_string() });
        let entry = if remains.is_some() { Mark::Unreadable } else { Mark::Nothing };
        Ok(WriteOutcome::Done { file: Mark::Nothing, entry, spot: None, remains })
    }

    /// Whether a place holds something else than what was read there.
    fn was_changed(&self, found: &Found, spot: Spot) -> Result<bool, StoreError> {
        match found.look(spot) {
            Ok(held) if self.cache.uses(spot) => {
                Ok(self.cache.bytes(spot)?.as_ref() != held.as_ref().map(|held| &held.bytes))
            }
            _ => Ok(false),
        }
    }
}

/// How writing the tokens ended.
enum WriteOutcome {
    /// This is what the places hold now, and where the login is. `remains`: why it is still somewhere.
    Done { file: Mark, entry: Mark, spot: Option<Spot>, remains: Option<StoreError> },
    /// Codex wrote since they were read; its tokens stay.
    NotOver,
}

impl WriteOutcome {
    fn unchanged(found: &Found) -> Self {
        let (file, entry) = (Mark::of(&found.file), Mark::of(&found.entry));
        Self::Done { file, entry, spot: found.spot, remains: None }
    }
}

/// Whether something that we keep is in that file.
fn concerns_us(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    let within_ours = path.parent().and_then(Path::file_name).is_some_and(|it| it == ".valetkey");
    let record = within_ours && path.extension().is_some_and(|extension| extension == "json");
    name == "auth.json" || name == ".valetkey" || record
}

/// How the name of a record begins that is being written.
const FRESH_RECORD: &str = ".record-";

/// Our own lock is held for a few reads and writes, each of which may wait for a keyring.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// How often a write gives way to Codex's before it gives up: Codex writes once for a login or a refresh, so that even a second
/// time is rare.
const PUT_TRIES: u32 = 5;
