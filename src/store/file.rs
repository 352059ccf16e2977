//! Reads, writes and locks files that hold secrets: nobody else's file, never half a file.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::geteuid;
use zeroize::Zeroizing;

use super::StoreError;
use crate::fault;
use crate::lock;

/// What is in a file; `None` when there is none. Wiped on drop.
///
/// # Errors
///
/// [`StoreError::Denied`] for a link, for anything but a file, and for somebody else's file.
pub(super) fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
    let Some(file) = open(path)? else { return Ok(None) };
    let about = file.metadata().map_err(|error| refused(path, &error))?;
    if about.len() > MAX_FILE_BYTES {
        return Err(corrupt(path, "it is longer than 1 MiB".to_owned()));
    }
    // One more byte than there are, so that the buffer does not grow and leave a copy behind.
    let length = usize::try_from(about.len()).unwrap_or(0);
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| refused(path, &error))?;
    Ok(Some(bytes))
}

/// A file of ours, open for reading; `None` when there is none.
///
/// # Errors
///
/// As [`read`].
pub(super) fn open(path: &Path) -> Result<Option<File>, StoreError> {
    // Opened first and judged by what was opened; without O_NONBLOCK a named pipe would hold us.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if absent(&error) => return Ok(None),
        Err(error) => return Err(refused(path, &error)),
    };
    let about = file.metadata().map_err(|error| refused(path, &error))?;
    if !about.is_file() {
        return Err(denied(path, "it is not a file"));
    }
    if about.uid() != geteuid().as_raw() {
        return Err(denied(path, "it belongs to somebody else"));
    }
    Ok(Some(file))
}

/// Puts a file in place, whole and durably, as 0600: written beside it under a name that starts with
/// `prefix`, synced, renamed, and the folder synced.
pub(super) fn replace(path: &Path, prefix: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let write = || {
        let folder = folder_of(path)?;
        // Created with O_EXCL and 0600; removed again on drop unless it was renamed.
        let mut fresh = tempfile::Builder::new();
        let mut fresh = fresh.prefix(prefix).rand_bytes(RANDOM_LETTERS).tempfile_in(folder)?;
        fresh.write_all(bytes)?;
        fresh.as_file().sync_all()?;
        fault::point("saving");
        fresh.persist(path).map_err(|error| error.error)?;
        fault::point("renamed");
        File::open(folder)?.sync_all()
    };
    write().map_err(|error| refused(path, &error))
}

/// Removes what writers that died have left beside files that [`replace`] was to put in place under names with one of
/// these prefixes: it may hold secrets. The caller holds the lock under which all of them write.
pub(super) fn sweep(folder: &Path, prefixes: &[&str]) {
    let is_left = |name: &str| {
        prefixes.iter().any(|prefix| {
            let random = name.strip_prefix(prefix).unwrap_or_default();
            random.len() == RANDOM_LETTERS
                && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_left(&entry.file_name().to_string_lossy()) {
            // Nothing depends on it, and the next writer tries again.
            if let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::debug!(%error, "what a writer that died has left could not be removed");
            }
        }
    }
}

/// Removes a file durably; one that is not there is removed already.
pub(super) fn remove(path: &Path) -> Result<(), StoreError> {
    let remove = || match std::fs::remove_file(path) {
        Err(error) if !absent(&error) => Err(error),
        _ => File::open(folder_of(path)?)?.sync_all(),
    };
    remove().map_err(|error| refused(path, &error))
}

/// Makes a folder that only we may enter, and those above it where they are missing.
pub(super) fn make_private_folder(path: &Path) -> Result<(), StoreError> {
    let make = || {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::symlink_metadata(path)
    };
    let about = make().map_err(|error| refused(path, &error))?;
    if !about.is_dir() {
        return Err(denied(path, "it is not a folder"));
    }
    if about.uid() != geteuid().as_raw() {
        return Err(denied(path, "it belongs to somebody else"));
    }
    if about.mode() & 0o077 != 0 {
        let private = Permissions::from_mode(0o700);
        std::fs::set_permissions(path, private).map_err(|error| refused(path, &error))?;
    }
    Ok(())
}

/// The lock over a folder of ours, as [`lock()`] gives it.
pub(super) fn lock_folder(folder: &Path, limit: Duration) -> Result<File, StoreError> {
    lock(&folder.join("lock"), 0o600, limit)
}

/// A lock on a file that is there for nothing else, held until dropped. Waits at most `limit`, so
/// that a stopped process which holds it cannot stop this one.
pub(super) fn lock(path: &Path, mode: u32, limit: Duration) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(mode)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .map_err(|error| refused(path, &error))?;
    match lock::wait(&file, limit) {
        Ok(true) => Ok(file),
        Ok(false) => {
            let what = "another process has held this lock for too long".to_owned();
            Err(unavailable(path, what))
        }
        Err(error) => Err(refused(path, &error)),
    }
}

/// A file that is out of reach for now.
pub(super) fn unavailable(path: &Path, what: String) -> StoreError {
    StoreError::Unavailable { place: path.display().to_string(), what }
}

/// A file whose contents make no sense.
pub(super) fn corrupt(path: &Path, what: String) -> StoreError {
    StoreError::Corrupt { place: path.display().to_string(), what, is_replaceable: false }
}

fn denied(path: &Path, what: &str) -> StoreError {
    StoreError::Denied { place: path.display().to_string(), what: what.to_owned() }
}

/// What the system's error about that file means for its store.
pub(super) fn refused(path: &Path, error: &io::Error) -> StoreError {
    let place = path.display().to_string();
    if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) {
        return denied(path, "it is a symbolic link");
    }
    // Of a temporary file the error names the path too, which says nothing to anybody.
    let what = error.to_string();
    let what = what.split(" at path ").next().unwrap_or_default().to_owned();
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly { place, what },
        io::ErrorKind::PermissionDenied => kept_out(path, what),
        _ => StoreError::Unavailable { place, what },
    }
}

/// Of a file that is there, it keeps us out by itself; else the nearest folder on the way to it does.
fn kept_out(path: &Path, what: String) -> StoreError {
    let is_there = |path: &&Path| std::fs::symlink_metadata(path).is_ok();
    let place = path.display().to_string();
    match path.ancestors().find(is_there) {
        Some(folder) if folder != path => {
            StoreError::NotOurs { place, folder: folder.display().to_string(), what }
        }
        _ => StoreError::Denied { place, what },
    }
}

/// Whether there is no such file, also because there is no such folder.
fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound)
}

pub(super) fn folder_of(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Longest file that is read: 1 MiB, a hundred times the largest cache seen.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// How many random letters and digits make the name of a file that is being written.
const RANDOM_LETTERS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_whole_private_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert!(read(&path).unwrap().is_none());
        assert!(read(&folder.path().join("no/such/folder")).unwrap().is_none());
        for text in ["one", "twenty-one"] {
            replace(&path, ".a-", text.as_bytes()).unwrap();
            assert_eq!(read(&path).unwrap().unwrap().as_slice(), text.as_bytes());
        }
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left over");
    }

    #[test]
    fn sweeps_what_dead_writers_have_left_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let stays =
            [".a-", ".a-12345", ".a-1234567", ".a-12345x.json", ".a-1234_6", ".b-123456", "a"];
        for name in stays.iter().chain(&[".a-aB3456", ".c-000000"]) {
            std::fs::write(folder.path().join(name), "left").unwrap();
        }
        std::fs::create_dir(folder.path().join(".a-folder")).unwrap();
        sweep(folder.path(), &[".a-", ".c-"]);
        sweep(&folder.path().join("none"), &[".a-"]);
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut left: Vec<_> =
            entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let mut expected = [&stays[..], &[".a-folder"]].concat();
        expected.sort_unstable();
        assert_eq!(left, expected);
    }

    #[test]
    fn refuses_what_is_no_file_of_ours() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        std::fs::write(&real, "{}").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        for (path, what) in [
            (&link, "it is a symbolic link"),
            (&pipe, "it is not a file"),
            (&folder.path().to_owned(), "it is not a file"),
        ] {
            let error = read(path).unwrap_err();
            assert!(matches!(&error, StoreError::Denied { .. }), "{error}");
            assert!(error.to_string().ends_with(what), "{error}");
        }
        assert!(lock(&link, 0o600, Duration::ZERO).is_err());
        if geteuid().is_root() {
            std::os::unix::fs::chown(&real, Some(65534), None).unwrap();
            let error = read(&real).unwrap_err();
            assert!(error.to_string().ends_with("it belongs to somebody else"), "{error}");
        }
        std::fs::write(pipe.with_extension("big"), vec![b' '; 1024 * 1024 + 1]).unwrap();
        assert!(matches!(read(&pipe.with_extension("big")), Err(StoreError::Corrupt { .. })));
    }

    #[test]
    fn says_what_keeps_us_out() {
        let root = tempfile::tempdir().unwrap();
        let (folder, file) = (root.path().join("folder"), root.path().join("file"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(&file, "").unwrap();
        let name = folder.display();
        let table = [
            (
                file.clone(),
                "is refused: no".to_owned(),
                format!("no link: ls -l {}", file.display()),
            ),
            (
                folder.join("a"),
                "cannot be made: no".to_owned(),
                format!("is {name} yours? ls -ld {name}"),
            ),
            (
                folder.join("a/b"),
                "cannot be made: no".to_owned(),
                format!("is {name} yours? ls -ld {name}"),
            ),
        ];
        for (path, sentence, hint) in table {
            let error = kept_out(&path, "no".to_owned());
            assert_eq!(error.to_string(), format!("{} {sentence}", path.display()));
            assert!(error.hint().ends_with(&hint), "{}", error.hint());
        }
    }

    #[test]
    fn locks_keep_others_out_for_a_bounded_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = lock(&path, 0o600, Duration::ZERO).unwrap();
        assert_eq!(held.metadata().unwrap().mode() & 0o777, 0o600);
        let error = lock(&path, 0o600, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        // A disk with room does not help here.
        assert!(error.hint().contains("what else uses the place"), "{}", error.hint());
        drop(held);
        lock(&path, 0o600, Duration::ZERO).unwrap();
    }

    #[test]
    fn folders_are_private() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        make_private_folder(&folder).unwrap();
        std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        make_private_folder(&folder).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(matches!(make_private_folder(&link), Err(StoreError::Denied { .. })));
    }
}
