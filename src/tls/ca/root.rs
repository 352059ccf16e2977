//! A root of the local CA, and the folder in which roots and their keys lie.
//!
//! `root-N.pem` is the Nth root's certificate, for everybody; `root-KEY.key` its private key, named after
//! the public one. The key is on disk before its certificate, and the certificate appears whole and never
//! over another: whoever writes number N first has made it, and everybody sees the same roots.
//! `retired/root-KEY.pem` is the certificate of a root that was ended, or whose end was begun: it signs nothing.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tempfile::NamedTempFile;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use super::CaError;
use super::intermediate::{authority, random_hex};
use super::names::Names;
use crate::origin::Host;
use crate::secret::Fingerprint;
use crate::tls::{file, is_a_valetkey, pem};

/// A root's certificate and where it lies. Never holds the key.
#[derive(Clone, Debug)]
pub struct Root {
    der: CertificateDer<'static>,
    path: Option<PathBuf>,
    spki: Fingerprint,
    names: Names,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    has_key: bool,
    is_ending: bool,
}

impl Root {
    /// The roots of valetkeys among the certificates of a PEM file, whatever else is in it.
    pub fn among(text: &[u8]) -> Vec<Self> {
        let certificates = CertificateDer::pem_slice_iter(text).filter_map(Result::ok);
        let roots = certificates.filter_map(|der| Self::of(der).ok());
        roots.map(|root| Self { has_key: false, ..root }).collect()
    }

    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The certificate as a PEM block.
    pub fn pem(&self) -> String {
        pem::write_pem(std::slice::from_ref(&self.der))
    }

    /// SHA-256 of the certificate, as `openssl x509 -fingerprint -sha256` shows it.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }

    /// SHA-256 of the public key, by which the root is kept out of the trust in upstreams.
    pub fn spki(&self) -> Fingerprint {
        self.spki
    }

    /// The certificate's file; `None` for a root that is only in memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// What it may speak for: these addresses, and these DNS names with all names below.
    pub fn names(&self) -> &[Host] {
        self.names.hosts()
    }

    /// When it expires.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// Checks that the key lies beside the certificate, is this root's and is ours alone. A root in memory has
    /// it.
    ///
    /// # Errors
    ///
    /// [`CaError`], as it would be at the next signature.
    pub fn check_key(&self) -> Result<(), CaError> {
        match self.path.as_deref().and_then(Path::parent) {
            Some(dir) => self.read_key(dir).map(drop),
            None => Ok(()),
        }
    }

    pub(super) fn constraints(&self) -> &Names {
        &self.names
    }

    /// Whether it signs anything: its key lies beside it, and its end was not begun. One that was put beside ours
    /// to be trusted has no key.
    pub(super) fn signs(&self) -> bool {
        self.has_key && !self.is_ending
    }

    /// Whether its end was begun, and broken off.
    pub(super) fn is_ending(&self) -> bool {
        self.is_ending
    }

    /// Whether it can sign for the host from now until then.
    pub(super) fn can_sign(&self, host: &Host, now: OffsetDateTime, until: OffsetDateTime) -> bool {
        self.signs() && self.names.permit(host) && self.not_before <= now && until < self.not_after
    }

    fn of(der: CertificateDer<'static>) -> Result<Self, &'static str> {
        let (_, certificate) =
            x509_parser::parse_x509_certificate(&der).map_err(|_| "it is no X.509 certificate")?;
        if !is_a_valetkey(certificate.subject()) {
            return Err("it was not made by a valetkey");
        }
        let constraints = certificate.name_constraints().ok().flatten();
        let names = constraints.and_then(|found| Names::of_constraints(found.value));
        Ok(Self {
            path: None,
            spki: Fingerprint::of(certificate.public_key().raw),
            names: names.ok_or("it has not the name constraints of a root made here")?,
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            has_key: true,
            is_ending: false,
            der,
        })
    }

    fn key_path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("root-{}.key", &self.spki.to_hex()[..16]))
    }

    /// Where its certificate lies once it is ended.
    fn retired_path(&self, dir: &Path) -> PathBuf {
        dir.join(RETIRED).join(format!("root-{}.pem", &self.spki.to_hex()[..16]))
    }

    /// Reads the key of a root that lies in this folder.
    pub(super) fn read_key(&self, dir: &Path) -> Result<Zeroizing<KeyPair>, CaError> {
        let path = self.key_path(dir);
        let bad = |reason| CaError::BadFile { path: path.clone(), reason };
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_KEY_BYTES));
        let file = open_private(&path)?;
        let read = file.take(MAX_KEY_BYTES as u64).read_to_end(&mut text);
        read.map_err(|source| CaError::reading(&path, source))?;
        let der = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| bad(NO_KEY))?;
        let der = Zeroizing::new(der);
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256);
        let key = Zeroizing::new(key.map_err(|_| bad(NO_KEY))?);
        if spki_of(&key) != self.spki {
            return Err(bad("it is not the key of its root"));
        }
        Ok(key)
    }
}

/// Reads the certificates of all roots in a folder, oldest first. No folder, no roots.
pub(super) fn load(dir: &Path) -> Result<Vec<Root>, CaError> {
    let cannot_read = |source| CaError::reading(dir, source);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(cannot_read(error)),
    };
    check_owner(dir, &fs::metadata(dir).map_err(cannot_read)?, 0o022)?;
    let mut numbers = Vec::new();
    for entry in entries {
        numbers.extend(number_in(&entry.map_err(cannot_read)?.file_name().to_string_lossy()));
    }
    numbers.sort_unstable();
    numbers.into_iter().map(|number| load_one(dir, number)).collect()
}

fn load_one(dir: &Path, number: u32) -> Result<Root, CaError> {
    let path = certificate_path(dir, number);
    let text = file::read(&path).map_err(|source| CaError::reading(&path, source))?;
    let root = match pem::read(&text).map(|bundle| bundle.certificates) {
        Ok(mut certificates) if certificates.len() == 1 => Root::of(certificates.remove(0)),
        _ => Err("it is not one certificate in PEM form"),
    };
    let root = root.map_err(|reason| CaError::BadFile { path: path.clone(), reason })?;
    // A link that leads nowhere is there too, and is refused when the key is needed.
    let has_key = root.key_path(dir).symlink_metadata().is_ok();
    let is_ending = root.retired_path(dir).is_file();
    Ok(Root { path: Some(path), has_key, is_ending, ..root })
}

/// Reads the certificates of all roots that were retired from a folder, in no order.
pub(super) fn load_retired(dir: &Path) -> Result<Vec<Root>, CaError> {
    let dir = dir.join(RETIRED);
    let cannot_read = |source| CaError::reading(&dir, source);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(cannot_read(error)),
    };
    let mut roots = Vec::new();
    for entry in entries {
        let path = entry.map_err(cannot_read)?.path();
        // What is being written has another ending.
        if path.extension().is_none_or(|ending| ending != "pem") {
            continue;
        }
        let text = file::read(&path).map_err(|source| CaError::reading(&path, source))?;
        roots.extend(Root::among(&text));
    }
    Ok(roots)
}

/// Ends a root: puts its certificate aside, and only then deletes its key, for a store can be rid of it only by its
/// certificate; gives the certificate's new place. What was broken off in between is finished by doing it again: until
/// the last step the root lies beside the others, and signs nothing from the first one on.
pub(super) fn retire(dir: &Path, root: &Root) -> Result<PathBuf, CaError> {
    let (retired, aside) = (dir.join(RETIRED), root.retired_path(dir));
    make_folder(&retired)?;
    let written = write_temporary(&retired, root.pem().as_bytes(), 0o644)
        .and_then(|file| Ok(file.persist(&aside)?));
    written.map_err(|source| CaError::writing(&aside, source))?;
    sync(&retired)?;
    // The folder may be new.
    sync(dir)?;
    for path in [Some(&*root.key_path(dir)), root.path()].into_iter().flatten() {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CaError::Io { doing: "delete", path: path.into(), source: error });
            }
            _ => sync(dir)?,
        }
    }
    Ok(aside)
}

fn sync(dir: &Path) -> Result<(), CaError> {
    let synced = if cfg!(unix) { File::open(dir).and_then(|dir| dir.sync_all()) } else { Ok(()) };
    synced.map_err(|source| CaError::writing(dir, source))
}

/// The number that a root gets that is made beside these.
pub(super) fn next_number(roots: &[Root]) -> u32 {
    let last =
        roots.last().and_then(|root| number_in(&root.path()?.file_name()?.to_string_lossy()));
    last.unwrap_or(0).saturating_add(1)
}

/// Makes the root of that number; `None` when another process was first.
pub(super) fn make(
    dir: &Path,
    number: u32,
    names: &Names,
    now: OffsetDateTime,
) -> Result<Option<Root>, CaError> {
    make_folder(dir)?;
    let (root, key) = generate(names, now)?;
    let (key_path, path) = (root.key_path(dir), certificate_path(dir, number));
    let key = Zeroizing::new(key.serialize_pem());
    let made = write_new(dir, &key_path, key.as_bytes(), 0o600)
        .and_then(|_| write_new(dir, &path, root.pem().as_bytes(), 0o644));
    if !matches!(made, Ok(true)) {
        // Without its certificate the key is worth nothing; should it stay, it harms nobody.
        drop(fs::remove_file(key_path));
    }
    Ok(made?.then_some(Root { path: Some(path), ..root }))
}

/// A new root with its key, both in memory.
pub(super) fn generate(
    names: &Names,
    now: OffsetDateTime,
) -> Result<(Root, Zeroizing<KeyPair>), CaError> {
    let key = Zeroizing::new(KeyPair::generate()?);
    let mut params = authority(&format!("valetkey local CA {}", random_hex()?), now, now + LIFE)?;
    params.is_ca = rcgen::IsCa::Ca(BasicConstraints::Constrained(1));
    params.name_constraints = Some(names.to_constraints());
    let root = Root::of(params.self_signed(&*key)?.into());
    Ok((root.map_err(CaError::signing)?, key))
}

fn spki_of(key: &KeyPair) -> Fingerprint {
    Fingerprint::of(&rcgen::PublicKeyData::subject_public_key_info(key))
}

fn certificate_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("root-{number}.pem"))
}

fn number_in(file_name: &str) -> Option<u32> {
    let digits = file_name.strip_prefix("root-")?.strip_suffix(".pem")?;
    digits.parse().ok().filter(|number: &u32| number.to_string() == digits)
}

fn make_folder(dir: &Path) -> Result<(), CaError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    let made = builder.create(dir).and_then(|()| fs::metadata(dir));
    check_owner(dir, &made.map_err(|source| CaError::writing(dir, source))?, 0o022)
}

/// Writes a file that appears whole and durable or not at all; `false` when the name is taken.
fn write_new(dir: &Path, path: &Path, content: &[u8], mode: u32) -> Result<bool, CaError> {
    let attempt = || -> io::Result<bool> {
        match write_temporary(dir, content, mode)?.persist_noclobber(path) {
            Ok(_) => (),
            Err(taken) if taken.error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            Err(other) => return Err(other.error),
        }
        #[cfg(unix)]
        File::open(dir)?.sync_all()?;
        Ok(true)
    };
    attempt().map_err(|source| CaError::writing(path, source))
}

/// Writes a file under a name that nobody knows; durable before it gets its own.
fn write_temporary(dir: &Path, content: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut file = temporary(dir, mode)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

#[cfg(unix)]
fn temporary(dir: &Path, mode: u32) -> io::Result<NamedTempFile> {
    use std::os::unix::fs::PermissionsExt;
    let permissions = fs::Permissions::from_mode(mode);
    tempfile::Builder::new().prefix(".new-").permissions(permissions).tempfile_in(dir)
}

#[cfg(not(unix))]
fn temporary(dir: &Path, _mode: u32) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(".new-").tempfile_in(dir)
}

/// Opens a key file, which must be a plain file that is ours and closed to everybody else.
fn open_private(path: &Path) -> Result<File, CaError> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        // Not to be led elsewhere by a link, not to wait for the writer of a pipe.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let is_link = || path.symlink_metadata().is_ok_and(|found| found.is_symlink());
    let file = options.open(path).map_err(|source| match is_link() {
        true => CaError::unsafe_file(path, "is a symbolic link"),
        false => CaError::reading(path, source),
    })?;
    let metadata = file.metadata().map_err(|source| CaError::reading(path, source))?;
    if !metadata.is_file() {
        return Err(CaError::unsafe_file(path, "is not a plain file"));
    }
    check_owner(path, &metadata, 0o077)?;
    Ok(file)
}

/// Checks that a file or folder is ours and has none of these permission bits.
#[cfg(unix)]
fn check_owner(path: &Path, metadata: &Metadata, closed: u32) -> Result<(), CaError> {
    use std::os::unix::fs::MetadataExt;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(CaError::unsafe_file(path, "belongs to another user"));
    }
    if metadata.mode() & closed != 0 {
        return Err(CaError::unsafe_file(path, "is open to other users"));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_owner(_path: &Path, _metadata: &Metadata, _closed: u32) -> Result<(), CaError> {
    Ok(())
}

/// One year: short enough that a forgotten root ends, long enough that nobody has to think of it.
const LIFE: Duration = Duration::days(365);
/// A P-256 key in PEM form has about 250.
const MAX_KEY_BYTES: usize = 4096;
/// Where the certificates of roots lie that sign nothing any more, so that they can be taken out of stores.
const RETIRED: &str = "retired";
const NO_KEY: &str = "it is no P-256 key in PKCS #8 PEM form";
