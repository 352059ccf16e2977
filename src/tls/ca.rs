//! The local CA: roots that clients trust, each with a short-lived intermediate that signs the leaves.
//!
//! Everything is constrained to the names that rules may intercept. A root's key is read only to sign an
//! intermediate; while serving, only the intermediate's key is in memory.

mod intermediate;
mod names;
mod root;
mod rotation;
#[cfg(unix)]
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::KeyPair;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

pub(super) use self::intermediate::{Intermediate, certificate};
use self::names::Names;
pub use self::root::Root;
pub use self::rotation::{Begun, superseded};
use crate::clock::Clock;
use crate::origin::Host;

/// The roots of one folder, or one in memory, and what may be signed under them now.
///
/// Invariants: at most one intermediate of each root is in use; each speaks for exactly those of the
/// ruled names that its root permits. A host is signed under the oldest root that permits it, so what a
/// client trusts goes on working when newer roots are made.
#[derive(Debug)]
pub struct LocalCa {
    roots: Vec<Root>,
    names: Names,
    clock: Clock,
    keys: Keys,
    intermediates: Mutex<Vec<Option<Arc<Intermediate>>>>,
}

#[derive(Debug)]
enum Keys {
    Folder(PathBuf),
    Memory(Zeroizing<KeyPair>),
}

impl LocalCa {
    /// Opens the CA in a folder, for the names that are ruled now. A new root is made beside the others
    /// when a name is permitted by none that lives 30 more days, so that clients can learn of it while
    /// the old one still signs. No names: no root is made, and nothing can be signed.
    ///
    /// # Errors
    ///
    /// [`CaError`] when the folder cannot be read or written, is not ours alone, or holds a broken root.
    pub fn open(dir: &Path, names: &[Host], clock: Clock) -> Result<Self, CaError> {
        let names = Names::new(names);
        let now = clock.now();
        loop {
            let mut roots = root::load(dir)?;
            if !are_covered(&names, &roots, now) {
                let number = root::next_number(&roots);
                let Some(new) = root::make(dir, number, &names, now)? else { continue };
                tracing::info!(number, names = names.hosts().len(), "made a root of the local CA");
                roots.push(new);
            }
            return Ok(Self::with(roots, names, clock, Keys::Folder(dir.to_owned())));
        }
    }

    /// The same as it is, without a change to the folder: `None` where [`LocalCa::open`] would make a root.
    ///
    /// # Errors
    ///
    /// As [`LocalCa::open`].
    pub fn open_unchanged(
        dir: &Path,
        names: &[Host],
        clock: Clock,
    ) -> Result<Option<Self>, CaError> {
        let (names, roots) = (Names::new(names), root::load(dir)?);
        let is_complete = are_covered(&names, &roots, clock.now());
        Ok(is_complete.then(|| Self::with(roots, names, clock, Keys::Folder(dir.to_owned()))))
    }

    /// A CA that is never written anywhere and ends with the process. No names: its root speaks for none.
    ///
    /// # Errors
    ///
    /// [`CaError::Signing`].
    pub fn ephemeral(names: &[Host], clock: Clock) -> Result<Self, CaError> {
        let names = Names::new(names);
        let (root, key) = root::generate(&names, clock.now())?;
        Ok(Self::with(vec![root], names, clock, Keys::Memory(key)))
    }

    /// The certificates of a folder's roots, oldest first; no key is read. No folder, no roots.
    ///
    /// # Errors
    ///
    /// As [`LocalCa::open`].
    pub fn load_roots(dir: &Path) -> Result<Vec<Root>, CaError> {
        root::load(dir)
    }

    /// All roots, oldest first: what clients are to trust.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// Whether leaves can be signed for the host.
    pub fn permits(&self, host: &Host) -> bool {
        self.names.permit(host) && self.signing_root(host).is_some()
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Signs the intermediates that will be needed, so that what is wrong shows at the start.
    pub(super) fn prepare(&self) -> Result<(), CaError> {
        self.names.hosts().iter().try_for_each(|host| self.intermediate(host).map(drop))
    }

    /// The intermediate that signs for the host, renewed at half its life. When that fails the old one
    /// serves to its end.
    pub(super) fn intermediate(&self, host: &Host) -> Result<Arc<Intermediate>, CaError> {
        if !self.names.permit(host) {
            return Err(CaError::NotPermitted(host.clone()));
        }
        let index = self.signing_root(host).ok_or_else(|| CaError::NoRoot(host.clone()))?;
        let now = self.clock.now();
        let mut all = self.intermediates.lock().unwrap_or_else(PoisonError::into_inner);
        let current = all.get(index).cloned().flatten();
        if let Some(fresh) = current.as_ref().filter(|current| current.is_fresh(now)) {
            return Ok(fresh.clone());
        }
        match (self.sign_intermediate(&self.roots[index], now), current) {
            (Ok(new), _) => {
                let new = Arc::new(new);
                all[index] = Some(new.clone());
                Ok(new)
            }
            (Err(error), Some(old)) if old.is_valid(now) => {
                tracing::warn!("cannot renew the intermediate");
                tracing::debug!(%error, "cannot renew the intermediate");
                Ok(old)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Which root signs for the host: the oldest that outlives an intermediate, else the oldest alive.
    fn signing_root(&self, host: &Host) -> Option<usize> {
        let now = self.clock.now();
        let oldest = |until| self.roots.iter().position(|root| root.can_sign(host, now, until));
        oldest(now + intermediate::LIFE).or_else(|| oldest(now))
    }

    fn sign_intermediate(&self, root: &Root, now: OffsetDateTime) -> Result<Intermediate, CaError> {
        match &self.keys {
            Keys::Memory(key) => Intermediate::under(root, key, &self.names, now),
            Keys::Folder(dir) => Intermediate::under(root, &*root.read_key(dir)?, &self.names, now),
        }
    }

    fn with(roots: Vec<Root>, names: Names, clock: Clock, keys: Keys) -> Self {
        let intermediates = Mutex::new(vec![None; roots.len()]);
        Self { roots, names, clock, keys, intermediates }
    }
}

/// Whether a root that lives long enough speaks for each of the names.
fn are_covered(names: &Names, roots: &[Root], now: OffsetDateTime) -> bool {
    let is_covered =
        |name: &Host| roots.iter().any(|root| root.can_sign(name, now, now + ROOT_REPLACED));
    names.hosts().iter().all(is_covered)
}

/// Why the local CA cannot be opened or cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A root's certificate or key is not what it should be.
    #[error("cannot use {}: {reason}", .path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// A file or folder cannot be read or written.
    #[error("cannot {doing} {}", .path.display())]
    Io {
        /// `read`, `write` or `delete`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host is ruled, but every root that permits it has expired: open the CA again.
    #[error("no root of the local CA can sign for {0} any more")]
    NoRoot(Host),
    /// The host is not among the ruled names.
    #[error("the local CA may not sign for {0}")]
    NotPermitted(Host),
    /// The cryptography failed, which it does only when the machine is out of something.
    #[error("cannot sign a certificate")]
    Signing(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A key, or the folder of the keys, is not ours alone.
    #[error("{} {why}", .path.display())]
    Unsafe {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it; completes "FILE …".
        why: &'static str,
    },
}

impl CaError {
    /// What to do about it, where a person can.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::BadFile { path, .. } => {
                Some(format!("remove {}, and a new root is made", path.display()))
            }
            Self::NoRoot(_) => Some("start valetkey again, and a new root is made".to_owned()),
            Self::Unsafe { path, .. } => {
                let path = path.display();
                Some(format!(
                    "make {path} yours alone (chown, chmod go-rwx), or remove it, and a new root is made"
                ))
            }
            Self::Io { doing: "read", path, .. } => Some(format!(
                "make {} readable for you, or move it away, and a new root is made",
                path.display()
            )),
            Self::Io { path, source, .. } => Some(Self::how_to_write(path, source)),
            Self::NotPermitted(_) | Self::Signing(_) => None,
        }
    }

    /// What to do where something cannot be written or deleted.
    fn how_to_write(path: &Path, source: &io::Error) -> String {
        if source.kind() != io::ErrorKind::PermissionDenied {
            return "see that the disk can be written and has room; XDG_DATA_HOME names another folder"
                .to_owned();
        }
        let folder = path.ancestors().find(|folder| folder.exists()).unwrap_or(path).display();
        format!("is {folder} yours? ls -ld {folder}")
    }

    fn reading(path: &Path, source: io::Error) -> Self {
        Self::Io { doing: "read", path: path.into(), source }
    }

    fn writing(path: &Path, source: io::Error) -> Self {
        Self::Io { doing: "write", path: path.into(), source }
    }

    fn unsafe_file(path: &Path, why: &'static str) -> Self {
        Self::Unsafe { path: path.into(), why }
    }

    pub(super) fn signing(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Signing(error.into())
    }
}

impl From<rcgen::Error> for CaError {
    fn from(error: rcgen::Error) -> Self {
        Self::signing(error)
    }
}

/// A new root is handed out this long before the old one stops signing.
const ROOT_REPLACED: Duration = Duration::days(30);
