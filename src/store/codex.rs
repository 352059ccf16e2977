//! Keeps a login in the cache that Codex owns, `auth.json`, with our record of its rotation beside it.
//!
//! Codex and we are two writers of one file. Ours writes under Codex's two locks, in Codex's order, keep
//! what we do not know, and never go over something that we have not read. The record says by
//! fingerprint of which tokens it speaks: tokens that differ were written by somebody else and are
//! newer than the record.

mod auth_json;
#[cfg(test)]
mod tests;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{Cas, Durability, Header, Record, RecordStore, StoreError, Version, file, record};
use crate::credential::Login;
use crate::secret::Fingerprint;
use crate::tasks::Tasks;
use auth_json::AuthJson;

/// The login in one Codex home, and its record in `.valetkey` there.
///
/// The home need not exist; it is made when a login is put into it.
pub struct CodexStore {
    place: Arc<Place>,
    tasks: Tasks,
}

impl CodexStore {
    /// The store of that Codex home. Its reads and writes are jobs of `tasks`, which shutdown waits for.
    pub fn new(home: PathBuf, tasks: Tasks) -> Self {
        let place = Place { home, changes: watch::Sender::new(0), watched: Mutex::default() };
        Self { place: Arc::new(place), tasks }
    }

    /// Runs a job on the files off the runtime's threads; it goes on when its caller goes away.
    fn run<T, F>(&self, job: F) -> BoxFuture<'_, Result<T, StoreError>>
    where
        F: FnOnce(&Place) -> Result<T, StoreError> + Send + 'static,
        T: Send + 'static,
    {
        async move {
            let place = Arc::clone(&self.place);
            let done = self.tasks.spawn_blocking(move || job(&place)).await;
            done.unwrap_or_else(|_| {
                let place = self.place.home.display().to_string();
                Err(StoreError::Unavailable { place, what: "the job did not finish".to_owned() })
            })
        }
        .boxed()
    }
}

impl RecordStore for CodexStore {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        self.run(|place| {
            place.watch();
            let found = place.read()?;
            Ok((found.version, Record { header: found.header, login: found.login }))
        })
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        self.run(move |place| place.swap(expected, &record))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.place.watched().wanted = true;
        self.place.changes.subscribe()
    }

    fn durability(&self) -> BoxFuture<'_, Result<Durability, StoreError>> {
        std::future::ready(Ok(Durability::Disk)).boxed()
    }
}

struct Place {
    home: PathBuf,
    changes: watch::Sender<u64>,
    watched: Mutex<Watched>,
}

/// Everything that is kept, as it was found.
struct Found {
    version: Version,
    header: Header,
    login: Option<Login>,
    /// The bytes of `auth.json`, and its members.
    bytes: Option<Zeroizing<Vec<u8>>>,
    cache: Option<AuthJson>,
}

impl Place {
    fn auth_json(&self) -> PathBuf {
        self.home.join("auth.json")
    }

    fn ours(&self) -> PathBuf {
        self.home.join(".valetkey")
    }

    /// The record's file, named as the keyring entry of this home is, so that both are one record.
    fn sidecar(&self) -> PathBuf {
        let home = std::fs::canonicalize(&self.home).unwrap_or_else(|_| self.home.clone());
        let hash = Fingerprint::of(home.to_string_lossy().as_bytes()).to_hex();
        self.ours().join(format!("{}.json", &hash[..16]))
    }

    /// What is kept now. Takes no lock, so that a home that cannot be written can still be read.
    fn read(&self) -> Result<Found, StoreError> {
        // The record first: tokens newer than their record are told by the fingerprint, a record newer
        // than its tokens could not be told from somebody else's write.
        let path = self.sidecar();
        let sidecar = file::read(&path)?;
        let (bytes, cache, login) = self.read_cache()?;
        let header = match &sidecar {
            None => Header::first(login.as_ref()),
            Some(bytes) => serde_json::from_slice::<Header>(bytes)
                .map_err(|error| {
                    let at = (error.line(), error.column());
                    file::corrupt(
                        &path,
                        format!("it is no record (line {}, column {})", at.0, at.1),
                    )
                })?
                .speaking_of(login.as_ref()),
        };
        let version = version(sidecar.as_deref(), bytes.as_deref());
        Ok(Found { version, header, login, bytes, cache })
    }

    /// The cache and its login. Codex before 0.169 wrote the file in place, so one that makes no sense
    /// is looked at again before it is called corrupt.
    fn read_cache(&self) -> Result<Cache, StoreError> {
        let path = self.auth_json();
        let mut looks = 0;
        loop {
            let Some(bytes) = file::read(&path)? else { return Ok((None, None, None)) };
            let parsed = AuthJson::parse(&bytes).and_then(|cache| {
                let login = cache.login()?;
                Ok((Some(cache), login))
            });
            match parsed {
                Ok((cache, login)) => return Ok((Some(bytes), cache, login)),
                Err(what) if looks == CORRUPT_LOOKS => return Err(file::corrupt(&path, what)),
                Err(_) => looks += 1,
            }
            std::thread::sleep(CORRUPT_PAUSE);
        }
    }

    fn swap(&self, expected: Version, record: &Record) -> Result<Cas, StoreError> {
        file::make_private_folder(&self.ours())?;
        let _ours = file::lock(&self.ours().join("lock"), 0o600, LOCK_LIMIT)?;
        let found = self.read()?;
        if found.version != expected {
            return Ok(Cas::Conflict);
        }
        match self.write(found, record) {
            Ok(Some(version)) => Ok(Cas::Done(version)),
            Ok(None) => Ok(Cas::Conflict),
            // Part of it may be in place.
            Err(error) if self.read().is_ok_and(|now| now.version == expected) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "a record was written in part");
                Ok(Cas::Unknown)
            }
        }
    }

    /// Writes tokens, where they changed, then the record. `None` when Codex wrote first.
    fn write(&self, found: Found, record: &Record) -> Result<Option<Version>, StoreError> {
        let cache = if record::same_login(found.login.as_ref(), record.login.as_ref()) {
            found.bytes
        } else {
            match self.write_cache(found, record)? {
                Written::Now(bytes) => bytes,
                Written::NotOver => return Ok(None),
            }
        };
        let path = self.sidecar();
        let sidecar = serde_json::to_vec_pretty(&record.header)
            .map_err(|error| file::corrupt(&path, error.to_string()))?;
        file::replace(&path, ".record-", &sidecar)?;
        Ok(Some(version(Some(&sidecar), cache.as_deref())))
    }

    fn write_cache(&self, found: Found, record: &Record) -> Result<Written, StoreError> {
        let path = self.auth_json();
        let _first = file::lock(&self.home.join("auth.lock"), 0o666, LOCK_LIMIT)?;
        let _second = file::lock(&self.home.join("auth.json.lock"), 0o600, CODEX_LOCK_LIMIT)?;
        if file::read(&path)? != found.bytes {
            return Ok(Written::NotOver);
        }
        let same_line = found.header.line == record.header.line;
        let cache = match (&record.login, found.cache) {
            (None, _) => return file::remove(&path).map(|()| Written::Now(None)),
            (Some(Login::ChatGpt(set)), Some(old)) if same_line => Some(old.with_tokens(set)),
            (Some(login), _) => AuthJson::of(login),
        };
        let bytes = cache
            .ok_or_else(|| "a login of this kind is not ours to write".to_owned())
            .and_then(|cache| cache.to_bytes().map_err(|error| error.to_string()))
            .map_err(|what| StoreError::Denied { place: path.display().to_string(), what })?;
        file::replace(&path, ".auth-", &bytes)?;
        Ok(Written::Now(Some(bytes)))
    }

    /// Watches the folders that exist, once somebody wants to hear of changes. Called at every read:
    /// folders come and go.
    fn watch(&self) {
        let mut watched = self.watched();
        if !watched.wanted {
            return;
        }
        if let Err(error) = watched.update(&[self.home.clone(), self.ours()], &self.changes) {
            tracing::debug!(%error, "changes of a Codex home are looked for, not heard of");
            watched.wanted = false;
        }
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How writing the cache under Codex's locks ended.
enum Written {
    /// These bytes are in place; none when the cache was removed.
    Now(Option<Zeroizing<Vec<u8>>>),
    /// Codex wrote since it was read; its bytes stay.
    NotOver,
}

type Cache = (Option<Zeroizing<Vec<u8>>>, Option<AuthJson>, Option<Login>);

fn version(sidecar: Option<&Vec<u8>>, cache: Option<&Vec<u8>>) -> Version {
    let part =
        |bytes: Option<&Vec<u8>>| bytes.map_or(String::new(), |it| Fingerprint::of(it).to_hex());
    Version(Fingerprint::of(format!("{}/{}", part(sidecar), part(cache)).as_bytes()))
}

/// Which folders are watched, as they were then.
#[derive(Default)]
struct Watched {
    wanted: bool,
    watcher: Option<RecommendedWatcher>,
    folders: Vec<(PathBuf, u64)>,
}

impl Watched {
    fn update(&mut self, folders: &[PathBuf], changes: &watch::Sender<u64>) -> notify::Result<()> {
        for folder in folders {
            let Ok(about) = std::fs::metadata(folder) else { continue };
            let now = (folder.clone(), about.ino());
            if self.folders.contains(&now) {
                continue;
            }
            let watcher = match &mut self.watcher {
                Some(watcher) => watcher,
                none => none.insert(watcher(changes.clone())?),
            };
            // The watch of a folder that was there before under the same name, if any.
            drop(watcher.unwatch(folder));
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
            self.folders.retain(|(known, _)| known != folder);
            self.folders.push(now);
        }
        Ok(())
    }
}

fn watcher(changes: watch::Sender<u64>) -> notify::Result<RecommendedWatcher> {
    notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| concerns_us(&event)) {
            changes.send_modify(|count| *count += 1);
        }
    })
}

/// Whether something may have changed that we keep; our own reading of it is no change.
fn concerns_us(event: &Event) -> bool {
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        let within_ours =
            path.parent().and_then(Path::file_name).is_some_and(|it| it == ".valetkey");
        let record = within_ours && path.extension().is_some_and(|extension| extension == "json");
        name == "auth.json" || name == ".valetkey" || record
    };
    event.need_rescan() || (!event.kind.is_access() && event.paths.iter().any(ours))
}

/// Our own lock is held for one read and two writes; Codex's `auth.lock` for about the same.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Codex does not wait for `auth.json.lock` at all.
const CODEX_LOCK_LIMIT: Duration = Duration::from_secs(2);

/// A cache that makes no sense is looked at again this often, so far apart.
const CORRUPT_LOOKS: u32 = 5;
const CORRUPT_PAUSE: Duration = Duration::from_millis(20);
