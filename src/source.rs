//! Reads the value of a credential from where its owner keeps it: a variable, a file, a program.

pub mod command;
mod env;
mod file;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::secret::{Secret, UnfitSecret};

/// Looks a variable up in the one snapshot of the environment. This room never reads the environment.
pub type Lookup = Arc<dyn Fn(&str) -> Option<Secret> + Send + Sync>;

/// Where a value comes from. Reading it again gives the value of then, so that a rotated file counts.
#[derive(Clone)]
pub struct Source(Kind);

#[derive(Clone)]
enum Kind {
    Env { name: String, lookup: Lookup },
    File(PathBuf),
}

impl Source {
    /// The value of a variable, as it was when the process started.
    pub fn env(name: impl Into<String>, lookup: Lookup) -> Self {
        Self(Kind::Env { name: name.into(), lookup })
    }

    /// The text of a file, without one newline at its end.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Kind::File(path.into()))
    }

    /// Reads the value. Blocks for as long as the file system does.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; a value is only given if it can stand in a header field.
    pub fn load(&self) -> Result<Secret, SourceError> {
        self.load_if(Secret::check_field_value)
    }

    /// Reads a value that may have spaces and any letters in it, such as a password.
    ///
    /// # Errors
    ///
    /// As [`Source::load`], but only for a value that is empty or has control characters.
    pub fn load_text(&self) -> Result<Secret, SourceError> {
        self.load_if(|secret| check_text(secret.expose()))
    }

    fn load_if(
        &self,
        check: impl FnOnce(&Secret) -> Result<(), UnfitSecret>,
    ) -> Result<Secret, SourceError> {
        let secret = match &self.0 {
            Kind::Env { name, lookup } => env::read(name, lookup)?,
            Kind::File(path) => file::read(path)?,
        };
        match check(&secret) {
            Ok(()) => Ok(secret),
            Err(reason) => Err(SourceError::Unfit { place: self.to_string(), reason }),
        }
    }

    /// Why others may know the value: one sentence, if there is something to say.
    pub fn warning(&self) -> Option<String> {
        match &self.0 {
            Kind::Env { .. } => None,
            Kind::File(path) => file::warning(path),
        }
    }
}

/// Checks that a text has no control characters and is not empty.
fn check_text(text: &str) -> Result<(), UnfitSecret> {
    if text.is_empty() {
        return Err(UnfitSecret::Empty);
    }
    match text.find(char::is_control) {
        Some(at) => Err(UnfitSecret::Octet { at }),
        None => Ok(()),
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Kind::Env { name, .. } => write!(f, "variable {name}"),
            Kind::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({self})")
    }
}

/// Why there is no value. None of them quotes it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is nothing at that place.
    #[error("{place} is not there")]
    Missing {
        /// Where it was looked for.
        place: String,
    },
    /// There is something that cannot be sent.
    #[error("the value in {place} cannot be used")]
    Unfit {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        #[source]
        reason: UnfitSecret,
    },
    /// There is something that cannot be read.
    #[error("{place} cannot be read")]
    Unreadable {
        /// Where it is.
        place: String,
        /// Why.
        #[source]
        reason: io::Error,
    },
}

impl SourceError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Missing { place } => {
                format!("set or create {place}, then start valetkey again")
            }
            Self::Unfit { place, .. } => {
                format!("put the bare key into {place}: one line, no spaces, no quotes")
            }
            Self::Unreadable { place, .. } => {
                format!("let this user read {place}, which must be a regular file")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable() {
        let lookup: Lookup = Arc::new(|name| match name {
            "KEY" => Some(Secret::new("sk-test-1")),
            "SPACED" => Some(Secret::new("sk test")),
            _ => None,
        });
        let load = |name: &str| Source::env(name, lookup.clone()).load();
        assert_eq!(load("KEY").unwrap().expose(), "sk-test-1");
        assert!(matches!(load("OTHER"), Err(SourceError::Missing { .. })));
        let unfit = load("SPACED").unwrap_err();
        assert!(matches!(unfit, SourceError::Unfit { reason: UnfitSecret::Octet { at: 2 }, .. }));
        assert_eq!(unfit.to_string(), "the value in variable SPACED cannot be used");
        assert!(unfit.hint().contains("variable SPACED"));
    }

    #[test]
    fn debug_names_the_place_only() {
        let source = Source::env("KEY", Arc::new(|_| Some(Secret::new("sk-very-secret"))));
        assert_eq!(format!("{source:?}"), "Source(variable KEY)");
    }
}
