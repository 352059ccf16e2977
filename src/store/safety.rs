//! Says who else may come to see a file that holds a login.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What is unsafe about where a file is, one sentence each; nothing for a file that is not there. Links and
/// somebody else's files need no warning: they are refused.
pub fn warnings(path: &Path) -> Vec<String> {
    let Ok(about) = std::fs::symlink_metadata(path) else { return Vec::new() };
    let place = path.display();
    let mut found = Vec::new();
    if about.mode() & 0o077 != 0 {
        found.push(format!("{place} may be read by others; type: chmod 600 {place}"));
    }
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let above = || real.ancestors().skip(1);
    if let Some(tree) = above().find(|folder| folder.join(".git").exists()) {
        found.push(format!(
            "{place} is inside the git work tree {}, and may be committed",
            tree.display()
        ));
    }
    if let Some(folder) = above().find(|folder| is_synced(folder)) {
        found
            .push(format!("{place} is in {}, which is copied to other machines", folder.display()));
    }
    found
}

/// Whether a folder is one that a program copies elsewhere, by the name that the program gives it.
fn is_synced(folder: &Path) -> bool {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    SYNCED.iter().any(|known| name.eq_ignore_ascii_case(known))
        || SYNCED_PREFIXES.iter().any(|known| name.starts_with(known))
        || folder.join(".stfolder").exists()
}

/// Folders that are copied elsewhere. macOS keeps those of iCloud under the last name.
const SYNCED: [&str; 8] = [
    "Dropbox",
    "OneDrive",
    "Google Drive",
    "GoogleDrive",
    "iCloud Drive",
    "Nextcloud",
    "ownCloud",
    "Mobile Documents",
];

/// The same with the name of a company or an account behind them.
const SYNCED_PREFIXES: [&str; 3] = ["OneDrive - ", "Dropbox (", "GoogleDrive-"];

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn says_who_else_may_see_it() {
        // The folder, what makes it special, the mode, and a word of each warning.
        let table: [(&str, Option<&str>, u32, &[&str]); 11] = [
            ("home/.codex", None, 0o600, &[]),
            ("home/.codex", None, 0o640, &["chmod 600"]),
            ("home/.codex", None, 0o604, &["chmod 600"]),
            ("home/work/.codex", Some("home/work/.git/"), 0o600, &["git work tree"]),
            ("home/tree/.codex", Some("home/tree/.git"), 0o600, &["git work tree"]),
            ("home/Dropbox/.codex", None, 0o600, &["copied to other"]),
            ("home/OneDrive - Example Ltd/x", None, 0o600, &["copied to other"]),
            ("home/Library/Mobile Documents/x", None, 0o600, &["copied to other"]),
            ("home/synced/.codex", Some("home/synced/.stfolder/"), 0o600, &["copied to other"]),
            ("home/onedriver/.codex", None, 0o600, &[]),
            ("Nextcloud/a", Some("Nextcloud/.git/"), 0o644, &["chmod", "git", "copied"]),
        ];
        for (folder, marker, mode, expected) in table {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            match marker {
                Some(marker) if marker.ends_with('/') => {
                    std::fs::create_dir(root.path().join(marker)).unwrap();
                }
                Some(marker) => std::fs::write(root.path().join(marker), "gitdir: x").unwrap(),
                None => {}
            }
            let path = folder.join("auth.json");
            assert!(warnings(&path).is_empty(), "a file that is not there is no danger");
            std::fs::write(&path, "{}").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let said = warnings(&path);
            assert_eq!(said.len(), expected.len(), "{said:?}");
            for (said, word) in said.iter().zip(expected) {
                assert!(said.contains(word), "{said}");
            }
        }
    }
}
