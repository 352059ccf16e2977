//! Keeps a login together with the record of its rotation, wherever that may be.

pub mod codex;
mod file;
mod journal;
pub mod keyring;
pub mod memory;
pub mod passes;
mod record;
mod safety;
mod seal;
pub mod sealed;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::watch::Receiver;

use crate::credential::Login;

pub use journal::{Journal, Left, Redeemed, Stamp};
pub use record::{Header, Phase, Record, Version};
pub use safety::warnings;

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

    /// Puts another login in the place of whatever is there, or none: the user's own act, so it goes over any
    /// refresh in flight, whose result is then dropped. Its access token lives for `lifetime` from now, where
    /// that is known.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then nothing was changed, except for [`StoreError::Remains`].
    fn put(
        &self,
        login: Option<Login>,
        lifetime: Option<Duration>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            loop {
                let (version, record) = self.get().await?;
                let header = Header { lifetime, ..record.header.next_line(login.as_ref()) };
                match self.cas(version, Record { header, login: login.clone() }).await? {
                    Cas::Done(_) => return Ok(()),
                    Cas::Conflict | Cas::Unknown => {}
                }
            }
        }
        .boxed()
    }

    /// Reserves a journal for the request of that claim, durably and with all the room that it will need: only then
    /// may the request be sent. `None` where the record ends with the process, which no journal would outlive.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then there is none.
    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>>;

    /// What the journals of the record, whosever they are, tell of that claim and generation. Removes those that are
    /// of no use any more.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there may be an answer that cannot be read now.
    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>>;

    /// A number that moves when the record may have changed. A hint only: a change may go unseen,
    /// so whoever waits looks again from time to time.
    fn changes(&self) -> Receiver<u64>;

    /// The file that holds the login, if a file does.
    fn file(&self) -> Option<PathBuf> {
        None
    }

    /// Where the login is kept, or would be, for people to read: a file or an entry. Exact once the record
    /// was read or written.
    fn place(&self) -> String;
}

impl StoreError {
    /// What is wrong, without where: for who may not know this machine's folders.
    pub fn why(&self) -> String {
        match self {
            Self::Corrupt { what, .. }
            | Self::Denied { what, .. }
            | Self::NotOurs { what, .. }
            | Self::ReadOnly { what, .. }
            | Self::NoKeyring { what, .. }
            | Self::Remains { what, .. }
            | Self::Unavailable { what, .. } => what.clone(),
            Self::Locked { .. } => "its keyring is locked, or does not answer".to_owned(),
            Self::Encrypted { .. } => "Codex keeps it encrypted".to_owned(),
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Corrupt { is_replaceable: true, .. } => {
                "sign in again; that takes its place".to_owned()
            }
            Self::Corrupt { place, .. } => format!("move {place} away, then sign in again"),
            Self::Denied { place, .. } => {
                format!("make it a file of your own, and no link: ls -l {place}")
            }
            Self::NotOurs { folder, .. } => format!("is {folder} yours? ls -ld {folder}"),
            Self::ReadOnly { .. } => {
                "name a folder that can be written: for a Codex login CODEX_HOME, or `home` of the credential, for all \
                 else XDG_DATA_HOME"
                    .to_owned()
            }
            Self::NoKeyring { .. } => {
                "start a keyring, or choose another place: credentials_store = \"file\"".to_owned()
            }
            Self::Locked { .. } => "unlock the keyring of your desktop, then try again".to_owned(),
            Self::Encrypted { .. } => {
                "valetkey login; or switch the feature off, set cli_auth_credentials_store = \"keyring\" in \
                 Codex's config.toml, and sign in again: codex login"
                    .to_owned()
            }
            Self::Remains { .. } => "unlock the keyring, then sign out once more".to_owned(),
            Self::Unavailable { .. } => {
                "try again; if it lasts, see that the disk has room, and what else uses the place: valetkey status"
                    .to_owned()
            }
        }
    }
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
        /// Whether signing in or out puts it right, so that nobody has to move anything away.
        is_replaceable: bool,
    },
    /// A person must change whose it is or who may write it.
    #[error("{place} is refused: {what}")]
    Denied {
        /// File or entry.
        place: String,
        /// What is wrong with it.
        what: String,
    },
    /// A person must let us into a folder, or name another place.
    #[error("{place} cannot be made: {what}")]
    NotOurs {
        /// What is not there, as far as we can see.
        place: String,
        /// The folder on the way to it that keeps us out.
        folder: String,
        /// What the system says.
        what: String,
    },
    /// A person must name another place: nothing can be written in this one.
    #[error("{place} cannot be written: {what}")]
    ReadOnly {
        /// File or folder.
        place: String,
        /// What the system says.
        what: String,
    },
    /// A person must start a keyring, or choose another place.
    #[error("{place} is out of reach: {what}")]
    NoKeyring {
        /// The entry.
        place: String,
        /// What went wrong.
        what: String,
    },
    /// A person must unlock it first.
    #[error("{place} is locked, or its keyring does not answer")]
    Locked {
        /// The entry.
        place: String,
    },
    /// A person must sign in again in another way: this login cannot be read by anybody but Codex.
    #[error(
        "Codex keeps its login encrypted in {place} (its feature secret_auth_storage), which only Codex can \
         read: sign in with that feature off and cli_auth_credentials_store = \"keyring\", or with valetkey login"
    )]
    Encrypted {
        /// File.
        place: String,
    },
    /// A person must sign out once more: of several copies this one could not be deleted.
    #[error("the login in {place} could not be deleted and is still there: {what}")]
    Remains {
        /// The entry.
        place: String,
        /// What went wrong.
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

/// Removes the login that a store holds if it is one of those, as the user's own act would.
///
/// # Errors
///
/// [`StoreError`]; then nothing was changed.
pub async fn remove_login_if(
    store: &dyn RecordStore,
    is_one: impl Fn(&Login) -> bool,
) -> Result<(), StoreError> {
    loop {
        let (version, record) = store.get().await?;
        if !record.login.as_ref().is_some_and(&is_one) {
            return Ok(());
        }
        let gone = Record { header: record.header.next_line(None), login: None };
        match store.cas(version, gone).await? {
            Cas::Done(_) => return Ok(()),
            Cas::Conflict | Cas::Unknown => {}
        }
    }
}
