//! Reads a value from a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use zeroize::Zeroizing;

use super::SourceError;
use crate::secret::{Secret, UnfitSecret};

/// Reads the file, without one newline at its end.
pub(super) fn read(path: &Path) -> Result<Secret, SourceError> {
    let place = || format!("file {}", path.display());
    let bytes = read_bytes(path).map_err(|reason| match reason.kind() {
        io::ErrorKind::NotFound => SourceError::Missing { place: place() },
        _ => SourceError::Unreadable { place: place(), reason },
    })?;
    let unfit = |reason| SourceError::Unfit { place: place(), reason };
    if bytes.len() > MAX_BYTES {
        return Err(unfit(UnfitSecret::TooLong));
    }
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| unfit(UnfitSecret::Octet { at: error.valid_up_to() }))?;
    let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    if text.contains(['\n', '\r']) {
        return Err(unfit(UnfitSecret::LineEnd));
    }
    Ok(Secret::new(text))
}

/// Reads one byte more than a file may have.
fn read_bytes(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    // Looked at before it is opened: opening a pipe would wait for a writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    // Never grows, so that no copy is left behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES + 64));
    File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Says so when other users can read the file.
#[cfg(unix)]
pub(super) fn warning(path: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;

    let mode = std::fs::metadata(path).ok()?.permissions().mode();
    (mode & 0o004 != 0)
        .then(|| format!("every user can read {}: chmod 600 would keep it yours", path.display()))
}

/// Access lists are not looked at.
#[cfg(not(unix))]
pub(super) fn warning(_path: &Path) -> Option<String> {
    None
}

/// A file longer than this is something else than a key; four times the longest value that is sent.
const MAX_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::*;

    #[test]
    fn what_files_hold() {
        let folder = tempfile::tempdir().unwrap();
        let long = vec![b'x'; MAX_BYTES + 1];
        let table: &[(&[u8], Result<&str, UnfitSecret>)] = &[
            (b"sk-test", Ok("sk-test")),
            (b"sk-test\n", Ok("sk-test")),
            (b"sk-test\r\n", Ok("sk-test")),
            (b"sk-test\n\n", Err(UnfitSecret::LineEnd)),
            (b" sk-test", Err(UnfitSecret::Octet { at: 0 })),
            (b"sk-\r\nX: y", Err(UnfitSecret::LineEnd)),
            (b"sk-\xff", Err(UnfitSecret::Octet { at: 3 })),
            (b"nul\0", Err(UnfitSecret::Octet { at: 3 })),
            (b"\n", Err(UnfitSecret::Empty)),
            (b"", Err(UnfitSecret::Empty)),
            (&long, Err(UnfitSecret::TooLong)),
            (&long[..20_000], Err(UnfitSecret::TooLong)),
        ];
        let path = folder.path().join("key");
        for (bytes, expected) in table {
            std::fs::write(&path, bytes).unwrap();
            let got = match Source::file(&path).load() {
                Ok(secret) => Ok(secret.expose().to_owned()),
                Err(SourceError::Unfit { reason, .. }) => Err(reason),
                Err(other) => panic!("{other}"),
            };
            let shown = &bytes[..bytes.len().min(20)];
            assert_eq!(got, expected.clone().map(str::to_owned), "{shown:?}");
        }
    }

    #[test]
    fn a_value_that_was_replaced_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let source = Source::file(&path);
        assert!(matches!(source.load(), Err(SourceError::Missing { .. })));
        for value in ["one", "two"] {
            std::fs::write(&path, value).unwrap();
            assert_eq!(source.load().unwrap().expose(), value);
        }
    }

    #[test]
    fn only_regular_files() {
        let folder = tempfile::tempdir().unwrap();
        let error = Source::file(folder.path()).load().unwrap_err();
        assert!(matches!(error, SourceError::Unreadable { .. }), "{error}");
        assert!(error.hint().contains("regular file"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_for_everybody_is_warned_of() {
        use std::os::unix::fs::{PermissionsExt, symlink};

        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("key"), folder.path().join("link"));
        std::fs::write(&path, "sk-test").unwrap();
        symlink(&path, &link).unwrap();
        for (mode, warns) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Source::file(&link).warning().is_some(), warns, "{mode:o}");
        }
        assert_eq!(Source::file(&link).load().unwrap().expose(), "sk-test");
    }
}
