//! Takes a value from the look-up that was handed in.

use super::{Lookup, SourceError};
use crate::secret::{Secret, UnfitSecret};

/// A variable that is set to nothing has no value, and is said to be empty.
pub(super) fn read(name: &str, lookup: &Lookup) -> Result<Secret, SourceError> {
    let place = || format!("variable {name}");
    match lookup(name) {
        None => Err(SourceError::Missing { place: place() }),
        Some(value) if value.is_empty() => {
            Err(SourceError::Unfit { place: place(), reason: UnfitSecret::Empty })
        }
        Some(value) => Ok(value),
    }
}
