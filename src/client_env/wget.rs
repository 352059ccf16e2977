//! What wget reads: no variable for its roots, but one that names a file of settings.

use std::path::{Path, PathBuf};

use super::ProxyUrl;
use crate::config::env::Environment;
use crate::tls::file;

/// The variable that names the file.
pub(super) const VARIABLE: &str = "WGETRC";

/// The user's own settings, as they are in their file; empty for none.
pub(super) fn settings_of_user(env: &Environment) -> Vec<u8> {
    let in_home = || Some(Path::new(env.get("HOME")?).join(".wgetrc"));
    let path = env.get(VARIABLE).map(PathBuf::from).or_else(in_home);
    path.as_deref().map(read).unwrap_or_default()
}

/// Settings, then ours: of two wget takes the last. `roots` are beside the system's.
pub(super) fn settings(mut theirs: Vec<u8>, proxy: &ProxyUrl, roots: &Path) -> Vec<u8> {
    let (roots, proxy) = (roots.display(), proxy.as_str());
    theirs.extend(format!("\nca_certificate = {roots}\nhttps_proxy = {proxy}\n").into_bytes());
    theirs
}

fn read(path: &Path) -> Vec<u8> {
    let content = file::read(path);
    if let (Err(error), true) = (&content, path.exists()) {
        tracing::warn!(file = %path.display(), %error, "left out the settings of wget");
    }
    content.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn the_users_own_settings_stay() {
        let home = tempfile::tempdir().unwrap();
        let named = home.path().join("named");
        fs::write(home.path().join(".wgetrc"), "tries = 7").unwrap();
        let proxy = SocketAddr::from(([127, 0, 0, 1], 8377)).into();
        let made = |pairs: &[(&str, &Path)]| {
            let env = Environment::from_pairs(pairs.iter().copied());
            let theirs = settings_of_user(&env);
            String::from_utf8(settings(theirs, &proxy, Path::new("/a b/roots.pem"))).unwrap()
        };
        let ours = "\nca_certificate = /a b/roots.pem\nhttps_proxy = http://127.0.0.1:8377\n";
        assert_eq!(made(&[]), ours);
        assert_eq!(made(&[("HOME", home.path())]), format!("tries = 7{ours}"));
        fs::write(&named, "tries = 8").unwrap();
        let both = [("HOME", home.path()), (VARIABLE, &*named)];
        assert_eq!(made(&both), format!("tries = 8{ours}"));
        assert_eq!(made(&[("HOME", home.path()), (VARIABLE, Path::new("/none"))]), ours);
    }
}
