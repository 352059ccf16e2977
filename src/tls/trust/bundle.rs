//! Reads the company's roots: a file of certificates, or a folder of such files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::TrustError;
use crate::tls::file;
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
        if !file.is_file() {
            let notice = format!("{}: it is no file, or leads to none; left out", file.display());
            all.notices.push(notice);
            continue;
        }
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
    let text = file::read(path).map_err(|source| unreadable(path, source))?;
    let mut bundle =
        pem::read(&text).map_err(|source| TrustError::Bundle { path: path.into(), source })?;
    for notice in &mut bundle.notices {
        *notice = format!("{}: {notice}", path.display());
    }
    Ok(bundle)
}

/// What is named like a certificate, in the order of the names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, TrustError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|source| unreadable(folder, source))? {
        let path = entry.map_err(|source| unreadable(folder, source))?.path();
        if is_named_like_a_certificate(&path) {
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
