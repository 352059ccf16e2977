//! What a Codex home holds at one moment, and which login in it counts.

use super::super::record::{fingerprint, refreshed};
use super::super::{Header, StoreError, Version};
use super::cache::{CachedLogin, Look, Spot, choose};
use crate::credential::Login;

/// Everything that is kept, as it was found.
pub(super) struct Found {
    pub(super) version: Version,
    pub(super) header: Header,
    /// Where the login that counts is, if there is any.
    pub(super) spot: Option<Spot>,
    /// Whether the other place holds one that is certainly older.
    pub(super) has_stale: bool,
    pub(super) file: Look,
    pub(super) entry: Look,
}

impl Found {
    pub(super) fn look(&self, spot: Spot) -> &Look {
        match spot {
            Spot::File => &self.file,
            Spot::Entry => &self.entry,
        }
    }

    pub(super) fn held(&self, spot: Spot) -> Option<&CachedLogin> {
        self.look(spot).as_ref().ok().and_then(Option::as_ref)
    }

    pub(super) fn login(&self) -> Option<&Login> {
        login(self.look(self.spot?))
    }
}

/// Whether a login is of a generation before the recorded one.
fn is_spent(login: &Login, header: &Header) -> bool {
    let is_older = || refreshed(login).zip(header.refreshed).is_some_and(|(its, ours)| its < ours);
    let found = Some(fingerprint(login));
    found == header.previous || (found != header.refresh && is_older())
}

fn login(look: &Look) -> Option<&Login> {
    look.as_ref().ok()?.as_ref()?.login.as_ref()
}

/// Whether what cannot be read must be known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// It must: a login that cannot be read is not a login that is missing.
    Strict,
    /// A keyring need not be: whatever is in it is about to be replaced.
    ToReplace,
}

impl Found {
    /// Decides which login counts.
    pub(super) fn settle(
        &mut self,
        recorded: Option<&Header>,
        reading: Reading,
    ) -> Result<(), StoreError> {
        // A login that the record knows to be spent is none to go on with.
        let is_current = |login: &Login| recorded.is_none_or(|header| !is_spent(login, header));
        match (login(&self.file), login(&self.entry)) {
            (Some(file), Some(entry)) => {
                let choice = choose(recorded, file, entry);
                self.has_stale = choice.is_certain;
                self.spot = Some(choice.spot);
            }
            (Some(login), None) if self.entry.is_ok() || is_current(login) => {
                self.spot = Some(Spot::File);
            }
            (None, Some(login)) if self.file.is_ok() || is_current(login) => {
                self.spot = Some(Spot::Entry);
            }
            _ => return self.none(reading),
        }
        Ok(())
    }

    /// No login counts: is there none, or could it not be read?
    fn none(&mut self, reading: Reading) -> Result<(), StoreError> {
        let has_spent_login = login(&self.file).is_some();
        let entry_may_fail = match &self.entry {
            Err(_) if reading == Reading::ToReplace => true,
            // A machine without a keyring keeps its logins in files.
            Err(trouble) => trouble.may_be_skipped && !has_spent_login,
            Ok(_) => true,
        };
        match (error_of(&mut self.file), entry_may_fail) {
            (Some(error), _) => Err(error),
            (None, true) => Ok(()),
            (None, false) => error_of(&mut self.entry).map_or(Ok(()), Err),
        }
    }
}

/// The error of a look that failed, which then counts as one that found nothing.
fn error_of(look: &mut Look) -> Option<StoreError> {
    look.is_err().then(|| std::mem::replace(look, Ok(None)))?.err().map(|trouble| trouble.error)
}
