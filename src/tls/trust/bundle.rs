//! Reads the company's roots: a file of certificates, or a folder of such files.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::TrustError;
use crate::tls::pem::{self, Bundle, PemError};

/// Everything in the file, or in the files of the folder that are named like certificates, by name.
/// Notices say which file they are about.
///
/// # Errors
///
/// [`TrustError`] for the first file that is not entirely usable, and for a folder without any.
pub(super) fn read(path: &Path) -> Result<Bundle, TrustError> {
    let metadata = fs::metadata(path).map_err(|source| unreadable(path, source))?;
    if !metadata.is_dir() {
        return read_file(path);
    }
    let mut all = Bundle::default();
    for file in files_in(path)? {
        let Bundle { certificates, notices, .. } = read_file(&file)?;
        // OpenSSL's hashed folders hold every certificate twice: by name, and as a link to it.
        for certificate in certificates {
            if !all.certificates.contains(&certificate) {
                all.certificates.push(certificate);
            }
        }
        all.notices.extend(notices);
    }
    if all.certificates.is_empty() {
        return Err(TrustError::Bundle { path: path.into(), source: PemError::Empty });
    }
    Ok(all)
}

fn read_file(path: &Path) -> Result<Bundle, TrustError> {
    let file = content(path).map_err(|source| unreadable(path, source))?;
    let mut bundle =
        pem::read(&file).map_err(|source| TrustError::Bundle { path: path.into(), source })?;
    for notice in &mut bundle.notices {
        *notice = format!("{}: {notice}", path.display());
    }
    Ok(bundle)
}

/// All of a regular file. What it is, is asked of the open file: the name may lead to a pipe by now.
pub(crate) fn content(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        // Opening a pipe would wait for a writer.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut content = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > LARGEST {
        return Err(io::Error::other("larger than 16 MiB, and no bundle of certificates is"));
    }
    Ok(content)
}

/// The files that are named like certificates, in the order of their names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, TrustError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|source| unreadable(folder, source))? {
        let path = entry.map_err(|source| unreadable(folder, source))?.path();
        if is_named_like_a_certificate(&path) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// By its ending, or as `openssl rehash` names its links: eight hexadecimal digits, a dot, a number.
fn is_named_like_a_certificate(path: &Path) -> bool {
    let (Some(stem), Some(ending)) = (path.file_stem(), path.extension()) else { return false };
    let (stem, ending) = (stem.to_string_lossy(), ending.to_string_lossy());
    let is_hashed = stem.len() == 8
        && stem.bytes().all(|byte| byte.is_ascii_hexdigit())
        && ending.bytes().all(|byte| byte.is_ascii_digit());
    let ending = ending.to_ascii_lowercase();
    is_hashed || ["pem", "crt", "cer", "der"].contains(&ending.as_str())
}

fn unreadable(path: &Path, source: io::Error) -> TrustError {
    TrustError::Unreadable { path: path.into(), source }
}

/// Largest file that is read, in bytes: all of Mozilla's roots have about 230 KB, and what was put in the place of a
/// bundle by mistake must not fill the memory.
const LARGEST: u64 = 16 << 20;

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// What comes under the name after it was looked at neither holds up the reader nor fills the memory.
    #[test]
    fn only_regular_files_of_some_size_are_read() {
        let temp = tempfile::tempdir().unwrap();
        let (pipe, large) = (temp.path().join("pipe.pem"), temp.path().join("large.pem"));
        let is_made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success();
        assert!(is_made);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(content(&pipe).unwrap_err().to_string()));
        let said = receiver.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert_eq!(said, "not a regular file");
        fs::File::create(&large).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(content(&large).unwrap_err().to_string().contains("larger than 16 MiB"));
    }
}
