//! The file of a Codex home that is not ours to look after: read once, or written once, without a record.

use std::path::Path;

use super::auth_json::AuthJson;
use crate::credential::Login;
use crate::store::{StoreError, file};

/// The login in the file of this home; `None` for one without a file, or whose file holds none.
///
/// # Errors
///
/// [`StoreError`] for a file that cannot be read or makes no sense.
pub fn read(home: &Path) -> Result<Option<Login>, StoreError> {
    let path = home.join(FILE);
    let Some(bytes) = file::read(&path)? else { return Ok(None) };
    let login = AuthJson::parse(&bytes).and_then(|members| members.login());
    login.map_err(|what| file::corrupt(&path, what))
}

/// Writes the file of this home as Codex does, over what is there. A home that is not there is made, for its
/// user alone.
///
/// # Errors
///
/// [`StoreError`] when it cannot be written.
pub fn write(home: &Path, login: &Login) -> Result<(), StoreError> {
    let path = home.join(FILE);
    let unfit = || file::unavailable(&path, "Codex keeps no login of this kind".to_owned());
    let bytes =
        AuthJson::of(login).and_then(|members| members.to_bytes().ok()).ok_or_else(unfit)?;
    // One that is there keeps its mode: it may be the folder of something else too.
    if !home.exists() {
        file::make_private_folder(home)?;
    }
    // Under no lock, so that no name of it is one that whoever holds one sweeps.
    file::replace(&path, ".auth-once-", &bytes)
}

/// The name that Codex gives its cache.
const FILE: &str = "auth.json";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::secret::Secret;

    #[test]
    fn written_for_its_user_alone() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("a/home");
        assert!(read(&home).unwrap().is_none());
        write(&home, &Login::ApiKey(Secret::new("sk-1"))).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&home), mode(&home.join(FILE))), (0o700, 0o600));
        let Some(Login::ApiKey(key)) = read(&home).unwrap() else { panic!() };
        assert_eq!(key.fingerprint(), Secret::new("sk-1").fingerprint());
        for (text, is_one) in [("{}", Some(false)), ("{", None), ("[]", None)] {
            std::fs::write(home.join(FILE), text).unwrap();
            assert_eq!(read(&home).ok().map(|login| login.is_some()), is_one, "{text}");
        }
        assert!(write(&home, &Login::Unsupported("x".into())).is_err());
    }
}
