//! Says where files are kept, by the XDG base directory specification, on every platform.

use std::path::{Path, PathBuf};

use super::env::Environment;

/// Where this user's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The user's configuration, which may not exist: `$XDG_CONFIG_HOME/valetkey/config.toml`, or the one
    /// that was named.
    pub config_file: PathBuf,
    /// What is kept: the local CA is in `ca` below it. `$XDG_DATA_HOME/valetkey`.
    pub data_dir: PathBuf,
    /// What may be lost: `$XDG_STATE_HOME/valetkey`.
    pub state_dir: PathBuf,
    /// What ends with the login to the machine: `$XDG_RUNTIME_DIR/valetkey`, else `run` in the state
    /// folder.
    pub runtime_dir: PathBuf,
    /// Where Codex keeps its login: `$CODEX_HOME`, else `~/.codex`.
    pub codex_home: PathBuf,
}

impl Paths {
    /// Finds them all. `config_file` is the file that was named, if one was.
    ///
    /// # Errors
    ///
    /// [`NoHome`] when a folder is below the home folder and that is not known.
    pub fn find(env: &Environment, config_file: Option<PathBuf>) -> Result<Self, NoHome> {
        let below_home = |inside: &str| home(env).map(|home| home.join(inside)).ok_or(NoHome);
        let folder = |variable: &str, inside: &str| match absolute(env, variable) {
            Some(folder) => Ok(folder.join("valetkey")),
            None => Ok(below_home(inside)?.join("valetkey")),
        };
        let config_file = match config_file {
            Some(file) => file,
            None => folder("XDG_CONFIG_HOME", ".config")?.join("config.toml"),
        };
        let state_dir = folder("XDG_STATE_HOME", ".local/state")?;
        let runtime_dir = absolute(env, "XDG_RUNTIME_DIR").map(|folder| folder.join("valetkey"));
        Ok(Self {
            config_file,
            data_dir: folder("XDG_DATA_HOME", ".local/share")?,
            runtime_dir: runtime_dir.unwrap_or_else(|| state_dir.join("run")),
            state_dir,
            codex_home: match env.get("CODEX_HOME") {
                Some(folder) => folder.into(),
                None => below_home(".codex")?,
            },
        })
    }
}

/// The user's home folder.
pub(super) fn home(env: &Environment) -> Option<PathBuf> {
    absolute(env, if cfg!(windows) { "USERPROFILE" } else { "HOME" })
}

/// The specification has relative paths ignored.
fn absolute(env: &Environment, variable: &str) -> Option<PathBuf> {
    env.get(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// A path as a file has it: `~/` is the home folder, a relative one starts in the folder of that file.
///
/// # Errors
///
/// [`BadPath`] for what names no file, or not the one that a shell would take.
pub(super) fn resolve(text: &str, folder: &Path, home: Option<&Path>) -> Result<PathBuf, BadPath> {
    match text.strip_prefix("~/") {
        Some(inside) => Ok(home.ok_or(NoHome)?.join(inside)),
        None if text == "~" => Ok(home.ok_or(NoHome)?.to_owned()),
        None if text.is_empty() => Err(BadPath::Empty),
        None if text.starts_with('~') => Err(BadPath::OtherHome),
        None => Ok(folder.join(text)),
    }
}

/// The home folder is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("HOME is not set to an absolute path")]
pub struct NoHome;

/// A path that cannot be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// It is below a home folder that is not known.
    #[error(transparent)]
    NoHome(#[from] NoHome),
    /// It would be the folder of the file that says it.
    #[error("an empty path names no file")]
    Empty,
    /// A shell would look up the home of another user.
    #[error("`~` is your own home alone, as in `~/file`: write another one in full")]
    OtherHome,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_a_home_folder_only() {
        let env = Environment::from_pairs([("HOME", "/home/me"), ("XDG_DATA_HOME", "relative")]);
        let paths = Paths::find(&env, None).unwrap();
        let expected = Paths {
            config_file: "/home/me/.config/valetkey/config.toml".into(),
            data_dir: "/home/me/.local/share/valetkey".into(),
            state_dir: "/home/me/.local/state/valetkey".into(),
            runtime_dir: "/home/me/.local/state/valetkey/run".into(),
            codex_home: "/home/me/.codex".into(),
        };
        assert_eq!(paths, expected);
    }

    #[test]
    fn with_every_variable_and_no_home_folder() {
        let env = Environment::from_pairs([
            ("XDG_CONFIG_HOME", "/c"),
            ("XDG_DATA_HOME", "/d"),
            ("XDG_STATE_HOME", "/s"),
            ("XDG_RUNTIME_DIR", "/r"),
            ("CODEX_HOME", "/x"),
        ]);
        let paths = Paths::find(&env, None).unwrap();
        let expected = Paths {
            config_file: "/c/valetkey/config.toml".into(),
            data_dir: "/d/valetkey".into(),
            state_dir: "/s/valetkey".into(),
            runtime_dir: "/r/valetkey".into(),
            codex_home: "/x".into(),
        };
        assert_eq!(paths, expected);
        let named = Paths::find(&env, Some("mine.toml".into())).unwrap();
        assert_eq!(named.config_file, Path::new("mine.toml"));
        for home in ["", "relative"] {
            assert_eq!(Paths::find(&Environment::from_pairs([("HOME", home)]), None), Err(NoHome));
        }
    }

    #[test]
    fn paths_of_a_file_are_relative_to_it() {
        let (folder, home) = (Path::new("/etc/valetkey"), Path::new("/home/me"));
        let table = [
            ("corp.pem", "/etc/valetkey/corp.pem"),
            ("/corp.pem", "/corp.pem"),
            ("~/corp.pem", "/home/me/corp.pem"),
            ("~", "/home/me"),
            ("./~you/corp.pem", "/etc/valetkey/./~you/corp.pem"),
        ];
        for (text, expected) in table {
            assert_eq!(resolve(text, folder, Some(home)), Ok(expected.into()), "{text}");
        }
        assert_eq!(resolve("~/a", folder, None), Err(BadPath::NoHome(NoHome)));
        assert_eq!(resolve("~you/corp.pem", folder, Some(home)), Err(BadPath::OtherHome));
        assert_eq!(resolve("", folder, Some(home)), Err(BadPath::Empty));
    }
}
