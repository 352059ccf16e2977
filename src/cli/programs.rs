//! Looks for programs where a person who types their names would find them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// Where programs are looked for.
#[derive(Clone, Debug)]
pub(super) struct Search {
    folders: Vec<PathBuf>,
}

impl Search {
    /// In the folders of `PATH`.
    pub(super) fn new(path: Option<&OsStr>) -> Self {
        Self { folders: path.map(|path| std::env::split_paths(path).collect()).unwrap_or_default() }
    }

    /// Whether there is a program of this name for whoever types it.
    pub(super) fn has(&self, name: &str) -> bool {
        self.folders.iter().any(|folder| folder.join(name).is_file())
    }

    /// The program as it is typed: its name, or its whole path where only root's `PATH` leads to it.
    pub(super) fn find(&self, name: &str) -> Option<OsString> {
        if self.has(name) {
            return Some(name.into());
        }
        let is_in = |folder: &Path| folder.join(name).is_file();
        let of_root = ["/usr/sbin", "/sbin"].map(Path::new);
        of_root.into_iter().find(|folder| is_in(folder)).map(|folder| folder.join(name).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_root_are_called_by_their_path() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("certutil"), "").unwrap();
        let search = Search::new(Some(dir.path().as_os_str()));
        assert_eq!(search.find("certutil"), Some("certutil".into()));
        assert_eq!(search.find("no such program"), None);
        assert_eq!(Search::new(None).find("certutil"), None);
    }
}
