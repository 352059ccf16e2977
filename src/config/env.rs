//! Takes the one snapshot of the process environment; the rest of the program sees no other.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

/// Names the configuration file, which must exist then. Flag: `--config`.
pub const CONFIG: &str = "VALETKEY_CONFIG";
/// Address to listen on. Flag: `--listen`.
pub const LISTEN: &str = "VALETKEY_LISTEN";
/// Which messages are logged, in the form of `tracing`'s filters.
pub const LOG: &str = "VALETKEY_LOG";
/// Names the file that says where the running proxy is. Flag: `--server-info`.
pub const SERVER_INFO: &str = "VALETKEY_SERVER_INFO";
/// PEM file with further roots. Set but empty: no variable of another program names one.
pub const UPSTREAM_CA_BUNDLE: &str = "VALETKEY_UPSTREAM_CA_BUNDLE";
/// The chain, as `upstream.proxy`. Set but empty: none.
pub const UPSTREAM_PROXY: &str = "VALETKEY_UPSTREAM_PROXY";

/// The environment as it was when the process started. Clones share it.
///
/// A variable that is set to nothing counts as not set, except in [`Environment::stated`]. May hold
/// secrets: `Debug` shows no name and no value.
#[derive(Clone, Default)]
pub struct Environment(Arc<BTreeMap<OsString, OsString>>);

impl Environment {
    /// The environment of this process.
    #[expect(clippy::disallowed_methods, reason = "the one snapshot of the environment")]
    pub fn from_process() -> Self {
        Self(Arc::new(std::env::vars_os().collect()))
    }

    /// An environment made up for a test.
    pub fn from_pairs<K, V>(pairs: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let pairs = pairs.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self(Arc::new(pairs.collect()))
    }

    /// The names of all variables, but for those that are not UTF-8.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().filter_map(|name| name.to_str())
    }

    /// The value of a variable; `None` for an empty one.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        self.stated(name).filter(|value| !value.is_empty())
    }

    /// The value of a variable, even an empty one.
    pub fn stated(&self, name: &str) -> Option<&OsStr> {
        self.0.get(OsStr::new(name)).map(OsString::as_os_str)
    }

    /// The value of a variable as text. What is not UTF-8 comes as U+FFFD, so that it is refused where it
    /// is read and not overlooked.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(|value| value.to_string_lossy().into_owned())
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Environment({} variables)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_is_not_set() {
        let env = Environment::from_pairs([("EMPTY", ""), ("SET", "value")]);
        assert_eq!((env.get("EMPTY"), env.get("UNSET")), (None, None));
        assert_eq!(env.stated("EMPTY"), Some(OsStr::new("")));
        assert_eq!(env.text("SET").as_deref(), Some("value"));
        assert_eq!(env.text("EMPTY"), None);
    }

    #[test]
    fn debug_shows_nothing() {
        let env = Environment::from_pairs([("API_KEY", "sk-very-secret")]);
        assert_eq!(format!("{env:?}"), "Environment(1 variables)");
    }
}
