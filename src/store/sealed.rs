//! Keeps a login at any issuer in a file of ours: sealed with a key in the keyring, or in a private file.

pub(super) mod form;
pub(super) mod key;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::watch::Receiver;

use super::journal::{Current, Journal, Journals, Left, Stamp};
use super::keyring::Keyring;
use super::watch::Watch;
use super::{Cas, Header, Record, RecordStore, StoreError, Version, file, journal};
use crate::credential::{CredentialName, Keep, Login};
use crate::secret::Fingerprint;
use crate::tasks::Tasks;
use form::{Form, LoginFile};

/// The login of one credential, in a folder that holds those of all.
///
/// The folder need not exist; it is made when a login is put into it.
pub struct SealedStore {
    place: Arc<Place>,
    tasks: Tasks,
}

impl SealedStore {
    /// The store of that credential. Its reads and writes are jobs of `tasks`, which shutdown waits for.
    /// A login that is kept in memory is no concern of this store: for it, [`Keep::Ephemeral`] is the file.
    pub fn new(
        folder: PathBuf,
        name: &CredentialName,
        keep: Keep,
        keyring: Arc<Keyring>,
        tasks: Tasks,
    ) -> Self {
        let watch = Watch::new(concerns_us);
        let name = name.clone();
        let place = Place { folder, name, keep, keyring, watch, form: Mutex::default() };
        Self { place: Arc::new(place), tasks }
    }

    /// Runs a job on the file off the runtime's threads; it goes on when its caller goes away.
    fn run<T, F>(&self, job: F) -> BoxFuture<'_, Result<T, StoreError>>
    where
        F: FnOnce(&Place) -> Result<T, StoreError> + Send + 'static,
        T: Send + 'static,
    {
        async move {
            let place = Arc::clone(&self.place);
            let done = self.tasks.spawn_blocking(move || job(&place)).await;
            done.unwrap_or_else(|_| {
                Err(file::unavailable(&self.place.path(), "the job did not finish".to_owned()))
            })
        }
        .boxed()
    }
}

impl RecordStore for SealedStore {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        self.run(|place| {
            place.watch.update(std::slice::from_ref(&place.folder));
            let found = place.read()?;
            Ok((found.version, found.record))
        })
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        self.run(move |place| place.swap(expected, &record))
    }

    fn put(
        &self,
        login: Option<Login>,
        lifetime: Option<Duration>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(move |place| place.put(login, lifetime))
    }

    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        let tasks = self.tasks.clone();
        self.run(move |place| {
            let _ours = place.lock()?;
            place.journals().reserve(stamp, &place.now()?, tasks).map(Some)
        })
    }

    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        self.run(move |place| place.journals().look_and_tidy(&stamp, || place.now()))
    }

    fn file(&self) -> Option<PathBuf> {
        Some(self.place.path())
    }

    fn changes(&self) -> Receiver<u64> {
        self.place.watch.subscribe()
    }

    fn place(&self) -> String {
        let path = self.place.path();
        match *self.place.form() {
            Some(Form::Sealed) => format!("{}, sealed with a key in the keyring", path.display()),
            Some(Form::Plain) | None => path.display().to_string(),
        }
    }
}

struct Place {
    folder: PathBuf,
    name: CredentialName,
    keep: Keep,
    keyring: Arc<Keyring>,
    watch: Watch,
    /// In which form the file was when it was last read or written.
    form: Mutex<Option<Form>>,
}

/// The record as it was found, and in which form.
struct Found {
    version: Version,
    record: Record,
    form: Option<Form>,
}

impl Place {
    fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.json", self.name))
    }

    fn form(&self) -> MutexGuard<'_, Option<Form>> {
        self.form.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the file holds, still sealed, and its version.
    fn load(&self) -> Result<(Version, Option<LoginFile>), StoreError> {
        let path = self.path();
        let bytes = file::read(&path)?;
        let kept = bytes.as_ref().map(|bytes| LoginFile::parse(bytes)).transpose();
        let kept = kept.map_err(|what| file::corrupt(&path, what))?;
        Ok((version(bytes.as_deref()), kept))
    }

    fn read(&self) -> Result<Found, StoreError> {
        let (version, kept) = self.load()?;
        let Some(kept) = kept else {
            let record = Record { header: Header::first(None), login: None };
            return Ok(Found { version, record, form: None });
        };
        let form = kept.form();
        *self.form() = form;
        let login = self.open(&kept)?;
        Ok(Found { version, record: Record { header: kept.header, login }, form })
    }

    /// The login in the file. A key that cannot be had is an error, and never a missing login.
    fn open(&self, kept: &LoginFile) -> Result<Option<Login>, StoreError> {
        let key = match kept.form() {
            Some(Form::Sealed) => Some(key::find(&self.keyring)?.ok_or_else(|| {
                let what = "the key that it is sealed with is no longer in the keyring";
                self.cannot_be_opened(what)
            })?),
            Some(Form::Plain) | None => None,
        };
        kept.open(&self.name, key.as_ref()).map_err(|what| self.cannot_be_opened(&what))
    }

    fn cannot_be_opened(&self, what: &str) -> StoreError {
        let (place, what) = (self.path().display().to_string(), what.to_owned());
        StoreError::Corrupt { place, what, is_replaceable: true }
    }

    fn now(&self) -> Result<Current, StoreError> {
        self.read().map(|found| Current::all(Stamp::of(&found.record)))
    }

    fn journals(&self) -> Journals<'_> {
        Journals {
            folder: self.folder.clone(),
            name: self.name.to_string(),
            keyring: &self.keyring,
            in_keyring: *self.form() == Some(Form::Sealed),
        }
    }

    /// Our lock over the folder, for one reading and writing. Whoever has it removes what dead writers have left.
    fn lock(&self) -> Result<std::fs::File, StoreError> {
        file::make_private_folder(&self.folder)?;
        let lock = file::lock_folder(&self.folder, LOCK_LIMIT)?;
        file::sweep(&self.folder, &[FRESH, journal::FRESH_KEY]);
        Ok(lock)
    }

    fn swap(&self, expected: Version, record: &Record) -> Result<Cas, StoreError> {
        let _ours = self.lock()?;
        let found = self.read()?;
        if found.version != expected {
            return Ok(Cas::Conflict);
        }
        let is_new = found.record.header.line != record.header.line;
        let form = match (found.form, &record.login) {
            (_, None) => Form::Plain,
            (Some(form), Some(_)) if !is_new => self.form_of_known_login(form),
            (_, Some(_)) => self.form_of_new_login(),
        };
        match self.write(record, form) {
            Ok(version) => Ok(Cas::Done(version)),
            Err(error) if self.load().is_ok_and(|(now, _)| now == expected) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "a record may have been written");
                Ok(Cas::Unknown)
            }
        }
    }

    /// Replaces whatever is there, also what cannot be opened.
    fn put(&self, login: Option<Login>, lifetime: Option<Duration>) -> Result<(), StoreError> {
        let _ours = self.lock()?;
        let before = self.load()?.1.map_or_else(|| Header::first(None), |kept| kept.header);
        let header = Header { lifetime, ..before.next_line(login.as_ref()) };
        let form = match login {
            Some(_) => self.form_of_new_login(),
            None => Form::Plain,
        };
        let record = Record { header, login };
        self.write(&record, form)?;
        self.journals().sweep_after(&Current::all(Stamp::of(&record)));
        Ok(())
    }

    /// A login stays as it was found, so that a refresh asks as little as it can of a keyring.
    fn form_of_known_login(&self, found: Form) -> Form {
        match self.keep {
            Keep::File | Keep::Ephemeral => Form::Plain,
            Keep::Keyring => Form::Sealed,
            Keep::Auto => found,
        }
    }

    /// Sealed where that is wanted and there is a key, or one can be made.
    fn form_of_new_login(&self) -> Form {
        match self.keep {
            Keep::File | Keep::Ephemeral => Form::Plain,
            Keep::Keyring => Form::Sealed,
            Keep::Auto => match key::find_or_make(&self.keyring) {
                Ok(_) => Form::Sealed,
                Err(error) => {
                    tracing::warn!(%error, "a login is not sealed: the keyring cannot keep a key");
                    Form::Plain
                }
            },
        }
    }

    fn write(&self, record: &Record, form: Form) -> Result<Version, StoreError> {
        let path = self.path();
        let key = match (form, &record.login) {
            (Form::Sealed, Some(_)) => Some(key::find_or_make(&self.keyring)?),
            _ => None,
        };
        let unfit = |what| StoreError::Denied { place: path.display().to_string(), what };
        let kept = LoginFile::of(record, &self.name, key.as_ref()).map_err(unfit)?;
        let bytes = kept.to_bytes().map_err(unfit)?;
        file::replace(&path, FRESH, &bytes)?;
        *self.form() = kept.form();
        Ok(version(Some(&bytes)))
    }
}

fn version(bytes: Option<&Vec<u8>>) -> Version {
    Version(Fingerprint::of(bytes.map_or(&[], |bytes| bytes)))
}

/// Whether that file may be ours; the lock is not.
fn concerns_us(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

/// How the name of a login begins that is being written.
const FRESH: &str = ".login-";

/// Held for a read and a write, and two questions to a keyring.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
