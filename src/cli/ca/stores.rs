//! The stores of this system in which programs look for roots.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::anchors::Anchors;
use super::keychain::Keychain;
use super::nss::{self, Nss};
use super::step::Step;
use crate::cli::Typed;
use crate::cli::output::Failure;
use crate::cli::programs::Search;
use crate::tls::ca::Root;

/// Which stores are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// The system's: curl, git, Python, Go and most others
    System,
    /// NSS databases of your own: Chromium, Chrome, Firefox
    Nss,
}

/// A store, as it is now and as it is changed.
pub(super) trait Store {
    /// What a person calls it.
    fn name(&self) -> String;

    /// Finds our roots in it. Nobody else's are ever in the answer.
    ///
    /// # Errors
    ///
    /// [`Failure`] when it cannot be read.
    fn look(&self) -> Result<Found, Failure>;

    /// The file in the place of a root in which there is more than the root, or something else: it is neither written
    /// over nor removed. Only where roots lie in files.
    fn in_the_way(&self, _root: &Root) -> Option<PathBuf> {
        None
    }

    /// The steps that put roots in and take others out; there are some even for nothing, where the store has to be
    /// put together anew.
    fn changing(&self, add: &[Root], remove: &[Entry]) -> Vec<Step>;
}

/// What a store holds of ours.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) entries: Vec<Entry>,
    /// What programs still see though it was taken out: an earlier command was broken off.
    pub(super) stale: Vec<Root>,
    /// What is not as it should be.
    pub(super) notices: Vec<String>,
}

/// One of our roots in a store.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its name there: that of a file, a nickname.
    pub(super) name: String,
    pub(super) root: Root,
    /// Whether programs see it and trust it.
    pub(super) counts: bool,
}

impl Found {
    /// Whether the root is there, and counts.
    pub(super) fn counts(&self, root: &Root) -> bool {
        let is_it = |entry: &Entry| entry.root.fingerprint() == root.fingerprint();
        self.entries.iter().any(|entry| entry.counts && is_it(entry))
    }
}

/// The stores that are meant and are here.
#[derive(Default)]
pub(super) struct Stores {
    pub(super) all: Vec<Box<dyn Store>>,
    /// What could not be among them, each with what to type.
    pub(super) missing: Vec<Failure>,
}

impl Stores {
    /// Looks for them.
    ///
    /// # Errors
    ///
    /// [`Failure`] when there is none, or those that were asked for by name cannot be changed.
    pub(super) fn present(kind: Option<Kind>, typed: &Typed) -> Result<Self, Failure> {
        let search = search(typed);
        let home = typed.env.get("HOME").map(Path::new);
        let anchors = Anchors::find(&search);
        let mut stores = Self::default();
        if kind != Some(Kind::Nss) {
            stores.add(system(anchors.clone(), home));
        }
        if kind != Some(Kind::System) {
            let databases = home.map(nss::databases).unwrap_or_default();
            match certutil(&search, anchors.as_ref()) {
                _ if databases.is_empty() && kind.is_none() => {}
                _ if databases.is_empty() => stores.missing.push(
                    Failure::new("there is no NSS database in your home").hint(HOW_DATABASES_COME),
                ),
                certutil => stores.add(certutil.map(|certutil| {
                    let database =
                        |dir| Box::new(Nss::new(certutil.clone(), dir)) as Box<dyn Store>;
                    databases.into_iter().map(database).collect()
                })),
            }
        }
        match stores.missing.pop() {
            Some(missing) if stores.all.is_empty() => Err(missing),
            missing => {
                stores.missing.extend(missing);
                Ok(stores)
            }
        }
    }

    fn add(&mut self, found: Result<Vec<Box<dyn Store>>, Failure>) {
        match found {
            Ok(stores) => self.all.extend(stores),
            Err(failure) => self.missing.push(failure),
        }
    }
}

fn system(anchors: Option<Anchors>, home: Option<&Path>) -> Result<Vec<Box<dyn Store>>, Failure> {
    let keychain = home.filter(|_| cfg!(target_os = "macos"));
    match (keychain, anchors) {
        (Some(home), _) => Ok(vec![Box::new(Keychain::of(home))]),
        (None, Some(anchors)) => Ok(vec![Box::new(anchors)]),
        (None, None) => Err(Failure::new(NO_SYSTEM).hint(BY_HAND)),
    }
}

/// Why databases that are here cannot be looked at, if they cannot.
pub(super) fn closed(typed: &Typed) -> Option<Failure> {
    let search = search(typed);
    let databases = typed.env.get("HOME").map(Path::new).map(nss::databases).unwrap_or_default();
    if databases.is_empty() {
        return None;
    }
    certutil(&search, Anchors::find(&search).as_ref()).err()
}

/// Where programs are looked for.
pub(super) fn search(typed: &Typed) -> Search {
    Search::new(typed.env.get("PATH"))
}

/// The name of a root in a store: short, and enough to tell which one it is.
pub(super) fn short_name(root: &Root) -> String {
    format!("{PREFIX}{}", &root.fingerprint().to_hex()[..DIGITS])
}

/// The root among these whose fingerprint begins with the digits in a name.
pub(super) fn named(digits: &str, roots: Vec<Root>) -> Option<Root> {
    let is_it =
        |root: &Root| digits.len() == DIGITS && root.fingerprint().to_hex().starts_with(digits);
    roots.into_iter().find(is_it)
}

fn certutil(search: &Search, anchors: Option<&Anchors>) -> Result<OsString, Failure> {
    search.find("certutil").ok_or_else(|| {
        let package = match anchors {
            _ if cfg!(target_os = "macos") => "brew install nss",
            Some(anchors) => anchors.certutil_package(),
            None => "install the package that has certutil (libnss3-tools, nss-tools, nss)",
        };
        Failure::new("the databases of your browsers cannot be changed: certutil is not installed")
            .hint(package)
    })
}

/// How the names of our entries begin.
pub(super) const PREFIX: &str = "valetkey-";
/// How much of a fingerprint is in a name: 64 bits, for telling apart and never for trusting.
const DIGITS: usize = 16;

const NO_SYSTEM: &str =
    "the system has no store that is known here (Debian, Fedora, Arch, openSUSE, macOS)";
const BY_HAND: &str =
    "valetkey ca print gives the roots as PEM; valetkey run and valetkey env need no store";
const HOW_DATABASES_COME: &str = "start Firefox once, it makes its own; for Chromium: \
     mkdir -p ~/.pki/nssdb && certutil -d sql:$HOME/.pki/nssdb -N --empty-password";
