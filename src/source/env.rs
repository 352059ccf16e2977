//! Takes a value from the look-up that was handed in.

use super::{Lookup, SourceError};
use crate::secret::Secret;

/// A variable that is set to nothing counts as not set.
pub(super) fn read(name: &str, lookup: &Lookup) -> Result<Secret, SourceError> {
    lookup(name)
        .filter(|value| !value.is_empty())
        .ok_or_else(|| SourceError::Missing { place: format!("variable {name}") })
}
