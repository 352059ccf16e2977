//! Knows the files in which the owner of the machine speaks for all its users, and whom to believe.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::file::Written;
use super::mistakes::Mistakes;

/// The files of the owner of the machine, each of which may not exist. No flag and no variable names
/// others: [`MachineFiles::default`] are the only ones outside tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFiles {
    /// Settings for users who have none of their own.
    pub system: PathBuf,
    /// Settings that no user can change.
    pub managed: PathBuf,
    /// The user that `managed` must belong to.
    pub owner: u32,
    /// Codex's settings above those of a user.
    pub codex_managed: PathBuf,
    /// Codex's settings below those of a user.
    pub codex_system: PathBuf,
    /// What logins Codex must not go without.
    pub codex_requirements: PathBuf,
}

impl Default for MachineFiles {
    fn default() -> Self {
        Self::below(Path::new("/"), ROOT)
    }
}

impl MachineFiles {
    /// The files of a machine whose root folder is `root`, and whose owner is this user.
    pub fn below(root: &Path, owner: u32) -> Self {
        let etc = root.join("etc");
        Self {
            system: etc.join("valetkey/config.toml"),
            managed: etc.join("valetkey/managed.toml"),
            owner,
            codex_managed: etc.join("codex/managed_config.toml"),
            codex_system: etc.join("codex/config.toml"),
            codex_requirements: etc.join("codex/requirements.toml"),
        }
    }

    /// The managed file. One that others than the owner could have written is a mistake, not a file less:
    /// who could write it could also take it away.
    pub(super) fn open_managed(&self, mistakes: &Mistakes) -> Option<Written> {
        let path = &self.managed;
        match self.read_managed() {
            Ok(Ok(text)) => Some(Written {
                name: path.display().to_string(),
                folder: path.parent().map(Path::to_owned).unwrap_or_default(),
                text,
                is_own: true,
                is_managed: true,
            }),
            Ok(Err(distrust)) => {
                mistakes.add_nowhere(
                    format_args!("{} is not to be trusted: {distrust}", path.display()),
                    &format!("as root: chown root {0} && chmod 644 {0}", path.display()),
                );
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                mistakes.add_nowhere(
                    format_args!("cannot read {}: {error}", path.display()),
                    "make it UTF-8 text that every user may read, or remove it",
                );
                None
            }
        }
    }

    /// The outer error is of reading, the inner one says why the file is not the owner's word.
    fn read_managed(&self) -> io::Result<Result<String, &'static str>> {
        let mut file = File::open(&self.managed)?;
        // Of the file that is open, so that nobody can exchange it in between.
        if let Err(distrust) = check(&file.metadata()?, self.owner) {
            return Ok(Err(distrust));
        }
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(Ok(text))
    }
}

#[cfg(unix)]
fn check(metadata: &Metadata, owner: u32) -> Result<(), &'static str> {
    use std::os::unix::fs::MetadataExt as _;

    if !metadata.is_file() {
        Err("it is not a file")
    } else if metadata.uid() != owner {
        Err("it does not belong to root")
    } else if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
        Err("its group or others may write it")
    } else {
        Ok(())
    }
}

#[cfg(not(unix))]
fn check(_: &Metadata, _: u32) -> Result<(), &'static str> {
    Err("this system does not say who may write it")
}

const ROOT: u32 = 0;

#[cfg(unix)]
const WRITABLE_BY_OTHERS: u32 = 0o022;
