//! The keyring of a desktop that is no Linux: Keychain, Credential Manager.

use keyring::{Entry as Native, Error};
use zeroize::Zeroizing;

use super::{Entry, Ring, RingError};

/// The keyring that the system itself has.
pub(super) struct System;

impl Ring for System {
    fn get(&self, entry: &Entry) -> Result<Option<Zeroizing<Vec<u8>>>, RingError> {
        match native(entry)?.get_password() {
            Ok(value) => Ok(Some(Zeroizing::new(value.into_bytes()))),
            Err(Error::NoEntry) => Ok(None),
            Err(error) => Err(refused(error)),
        }
    }

    fn set(&self, entry: &Entry, value: &[u8]) -> Result<(), RingError> {
        let text = std::str::from_utf8(value);
        let text = text.map_err(|_| RingError::Failed("the value is no text".to_owned()))?;
        native(entry)?.set_password(text).map_err(refused)
    }

    fn delete(&self, entry: &Entry) -> Result<(), RingError> {
        match native(entry)?.delete_credential() {
            Ok(()) | Err(Error::NoEntry) => Ok(()),
            Err(error) => Err(refused(error)),
        }
    }
}

fn native(entry: &Entry) -> Result<Native, RingError> {
    Native::new(&entry.service, &entry.account).map_err(|error| match error {
        Error::NoDefaultStore => RingError::Absent("no keyring found".to_owned()),
        error => refused(error),
    })
}

fn refused(error: Error) -> RingError {
    match error {
        Error::NoStorageAccess(_) => RingError::Locked,
        // What these say may quote the value.
        Error::BadEncoding(_) | Error::BadDataFormat(..) => {
            RingError::Failed("the entry is no text".to_owned())
        }
        Error::Ambiguous(_) => RingError::Failed("there is more than one such entry".to_owned()),
        error => RingError::Failed(error.to_string()),
    }
}
