//! Holds the one policy of trust: which certificates an upstream, an issuer or a chain proxy may show.
//!
//! No environment variable has a say on Linux, and no setting switches verification off. Certificates that
//! a valetkey made are never trusted, wherever they lie, so no valetkey can come between us and an upstream.

mod bundle;
mod distrust;
mod fit;
#[cfg(test)]
mod tests;
mod verify;
mod weak;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};

pub use self::distrust::Distrust;
use self::distrust::{Remedy, is_self_issued, issuer_of};
use self::verify::Verifier;
pub use self::verify::describe_failure;
pub use self::weak::{Weakness, weakness};
use super::pem::{Bundle, PemError};
use super::{is_a_valetkey, provider};
use crate::clock::Clock;
use crate::origin::Host;
use crate::secret::Fingerprint;

/// Which roots count, apart from the bundle's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrustMode {
    /// None: the bundle alone.
    Bundle,
    /// Mozilla's, compiled in, for systems that have none.
    MozillaAndBundle,
    /// The system's, without the bundle.
    System,
    /// The system's.
    #[default]
    SystemAndBundle,
}

/// What to trust.
#[derive(Clone, Debug)]
pub struct TrustSettings {
    /// Which roots count.
    pub mode: TrustMode,
    /// More roots: a PEM or DER file, or a folder of them. Read whatever the mode, because children are
    /// handed it.
    pub bundle: Option<PathBuf>,
    /// Public keys of our own roots, which are never trusted.
    pub own: Vec<Fingerprint>,
}

/// What is offered to an upstream in ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/2, else HTTP/1.1.
    Any,
    /// HTTP/1.1 only: upgrades, and CONNECT to a chain proxy.
    Http1,
}

/// The one policy of trust. What it trusts is read again with [`UpstreamTrust::reload`].
#[derive(Debug)]
pub struct UpstreamTrust {
    settings: TrustSettings,
    roots: ArcSwap<Roots>,
}

/// The roots that count at one time and the TLS client configurations on them.
///
/// Invariant: both configurations have the same verifier; each has a session store of its own, so a
/// session made under other trust is never resumed.
#[derive(Debug)]
pub struct Roots {
    any: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
    system: Vec<CertificateDer<'static>>,
    bundle: Vec<CertificateDer<'static>>,
    bundle_is_ours: bool,
    notices: Vec<String>,
    version: u64,
}

impl UpstreamTrust {
    /// Reads the system's roots and the bundle. A system certificate that rustls cannot take is left out.
    ///
    /// # Errors
    ///
    /// [`TrustError`] when the bundle is not entirely usable, or nothing at all would be trusted.
    pub fn load(settings: TrustSettings) -> Result<Self, TrustError> {
        let roots = ArcSwap::from_pointee(Roots::load(&settings, 0)?);
        Ok(Self { settings, roots })
    }

    /// Reads everything again, and trusts what is there now in handshakes from now on. `false` when it is
    /// what was trusted before.
    ///
    /// # Errors
    ///
    /// As [`UpstreamTrust::load`]; then what was trusted before is in force.
    pub fn reload(&self) -> Result<bool, TrustError> {
        let before = self.now();
        let roots = Roots::load(&self.settings, before.version + 1)?;
        if (&roots.system, &roots.bundle) == (&before.system, &before.bundle) {
            return Ok(false);
        }
        self.roots.store(Arc::new(roots));
        Ok(true)
    }

    /// What is trusted now.
    pub fn now(&self) -> Arc<Roots> {
        self.roots.load_full()
    }

    /// How often the roots have changed: a connection that was verified under an older version may not
    /// be used again.
    pub fn version(&self) -> u64 {
        self.roots.load().version
    }

    /// The bundle, by its path.
    pub fn bundle_path(&self) -> Option<&Path> {
        self.settings.bundle.as_deref()
    }

    /// Who signed certificates that were accepted for this name, the server's own first.
    pub fn signer(&self, path: &[CertificateDer<'_>], name: &Host, clock: &Clock) -> Signer {
        let issuer = path.last().map(issuer_of).unwrap_or_default();
        if is_public(path, name, clock) { Signer::Public(issuer) } else { Signer::Private(issuer) }
    }

    /// What a change of the roots shows itself in: files, and folders whose entries count.
    pub fn places(&self) -> Vec<PathBuf> {
        let mut places = system_places();
        places.extend(self.settings.bundle.clone());
        places
    }
}

/// Who signed a certificate; holds the name of the last issuer that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signer {
    /// One of Mozilla's list, as it was when this program was built.
    Public(String),
    /// Somebody whom this machine or the bundle trusts: a company.
    Private(String),
}

/// Whether Mozilla's roots alone vouch for the certificates.
fn is_public(path: &[CertificateDer<'_>], name: &Host, clock: &Clock) -> bool {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let ([leaf, others @ ..], Some(name), Ok(verifier)) = (path, name.server_name(), webpki(roots))
    else {
        return false;
    };
    let seconds = u64::try_from(clock.now().unix_timestamp()).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    verifier.verify_server_cert(leaf, others, &name, &[], now).is_ok()
}

impl Roots {
    fn load(settings: &TrustSettings, version: u64) -> Result<Self, TrustError> {
        let is_foreign = |der: &CertificateDer<'_>| !is_of_a_valetkey(der, &settings.own);
        let mut system = system_certificates();
        system.retain(is_foreign);
        let Bundle { certificates: mut bundle, mut notices, is_text } = match &settings.bundle {
            Some(path) => bundle::read(path)?,
            None => Bundle::default(),
        };
        bundle.retain(is_foreign);
        let now = Clock::system().now();
        if let Some(path) = &settings.bundle {
            let named = |notice| format!("{}: {notice}", path.display());
            notices.extend(fit::notices(&bundle, &system, now).map(named));
        }
        let remedy = Remedy {
            // A bundle of ours counts as none.
            bundle: settings.bundle.clone().filter(|_| !bundle.is_empty()),
            is_text,
            counts: settings.mode != TrustMode::System,
        };
        let is_fit = |der: &&CertificateDer<'static>| fit::unfitness(der, now).is_none();
        let [fit_system, fit_bundle] =
            [&system, &bundle].map(|all| all.iter().filter(is_fit).cloned().collect::<Vec<_>>());
        let selves = match settings.mode {
            TrustMode::System => Vec::new(),
            _ => bundle.iter().filter(|der| is_self_issued_der(der)).cloned().collect(),
        };
        let inner = match verifier(settings.mode, &fit_system, &fit_bundle) {
            // A server's own certificate alone is enough to reach that server.
            Err(TrustError::Nothing) if !selves.is_empty() => None,
            inner => Some(inner?),
        };
        let verifier: Arc<dyn ServerCertVerifier> = Arc::new(Verifier::over(inner, selves, remedy));
        Ok(Self {
            any: client_config(verifier.clone(), &[b"h2", b"http/1.1"])?,
            http1: client_config(verifier, &[b"http/1.1"])?,
            system,
            bundle_is_ours: settings.bundle.is_some() && bundle.is_empty(),
            bundle,
            notices,
            version,
        })
    }

    /// The TLS client configuration for every leg of every kind.
    pub fn client_config(&self, alpn: Alpn) -> Arc<ClientConfig> {
        match alpn {
            Alpn::Any => self.any.clone(),
            Alpn::Http1 => self.http1.clone(),
        }
    }

    /// The system's roots, none of ours, whether the mode trusts them or not: what a child needs for the
    /// hosts that are tunnelled.
    pub fn system(&self) -> &[CertificateDer<'static>] {
        &self.system
    }

    /// The bundle's certificates, none of ours.
    pub fn bundle(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    /// Whether the bundle held certificates of a valetkey and no others, which counts as no bundle: the
    /// setting was made for a child of a running valetkey.
    pub fn bundle_is_ours(&self) -> bool {
        self.bundle_is_ours
    }

    /// One sentence for each thing in the bundle that was left out, with the file's name.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }
}

/// The files that distributions keep their roots in, and the folders that OpenSSL knows. The loader's own
/// search is not used: it lets `SSL_CERT_FILE` take the system's place.
#[cfg(target_os = "linux")]
fn system_certificates() -> Vec<CertificateDer<'static>> {
    let file = SYSTEM_FILES.iter().map(Path::new).find(|path| path.exists());
    let mut folders = openssl_probe::candidate_cert_dirs();
    // What the folder links to that file is then not read again.
    let mut parts = vec![rustls_native_certs::load_certs_from_paths(file, folders.next())];
    for folder in folders {
        parts.push(rustls_native_certs::load_certs_from_paths(None, Some(folder)));
    }
    let mut found = Vec::new();
    for part in parts {
        for error in part.errors {
            tracing::debug!(%error, "left out a system certificate");
        }
        found.extend(part.certs);
    }
    found.sort_unstable_by(|one, other| one.cmp(other));
    found.dedup();
    found
}

/// What is written anew whenever the system's roots change: the one file of all, where there is one.
fn system_places() -> Vec<PathBuf> {
    #[cfg(target_os = "linux")]
    let places = SYSTEM_FILES.iter().map(PathBuf::from).find(|path| path.exists());
    #[cfg(not(target_os = "linux"))]
    let places = None;
    places.into_iter().collect()
}

/// What the system shows of its store. Only children get it; the platform's verifier asks the store itself.
#[cfg(not(target_os = "linux"))]
fn system_certificates() -> Vec<CertificateDer<'static>> {
    rustls_native_certs::load_native_certs().certs
}

/// Whether the certificate is one of our roots, or any valetkey's: one may run inside another's
/// environment and find the other's roots in its bundle.
fn is_of_a_valetkey(der: &CertificateDer<'_>, own: &[Fingerprint]) -> bool {
    x509_parser::parse_x509_certificate(der).is_ok_and(|(_, certificate)| {
        own.contains(&Fingerprint::of(certificate.public_key().raw))
            || is_a_valetkey(certificate.subject())
    })
}

fn is_self_issued_der(der: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(der).is_ok_and(|(_, it)| is_self_issued(&it))
}

fn verifier(
    mode: TrustMode,
    system: &[CertificateDer<'static>],
    bundle: &[CertificateDer<'static>],
) -> Result<Arc<dyn ServerCertVerifier>, TrustError> {
    let bundle = if mode == TrustMode::System { &[] } else { bundle };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(bundle.iter().cloned());
    match mode {
        TrustMode::Bundle => webpki(roots),
        TrustMode::MozillaAndBundle => {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
            webpki(roots)
        }
        TrustMode::System | TrustMode::SystemAndBundle => platform(roots, system, bundle),
    }
}

#[cfg(target_os = "linux")]
fn platform(
    mut roots: RootCertStore,
    system: &[CertificateDer<'static>],
    _bundle: &[CertificateDer<'static>],
) -> Result<Arc<dyn ServerCertVerifier>, TrustError> {
    let (taken, left) = roots.add_parsable_certificates(system.iter().cloned());
    tracing::debug!(taken, left, "read the system's roots");
    webpki(roots)
}

#[cfg(not(target_os = "linux"))]
fn platform(
    _roots: RootCertStore,
    _system: &[CertificateDer<'static>],
    bundle: &[CertificateDer<'static>],
) -> Result<Arc<dyn ServerCertVerifier>, TrustError> {
    let verifier = rustls_platform_verifier::Verifier::new_with_extra_roots(
        bundle.iter().cloned(),
        provider(),
    );
    Ok(Arc::new(verifier.map_err(TrustError::Tls)?))
}

fn webpki(roots: RootCertStore) -> Result<Arc<dyn ServerCertVerifier>, TrustError> {
    let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    // The builder has no other complaint: revocation lists are not used.
    Ok(builder.build().map_err(|_| TrustError::Nothing)?)
}

#[expect(clippy::disallowed_methods, reason = "the one home of the policy of trust")]
fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TrustError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TrustError::Tls)?
        // "Dangerous" is any verifier but rustls' own; ours adds refusals to it, and servers' own certificates.
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::in_memory_sessions(SESSIONS);
    Ok(Arc::new(config))
}

/// Why there is no trust to work with.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The bundle has a broken block, or no certificate.
    #[error("cannot use the CA bundle {}", .path.display())]
    Bundle {
        /// The bundle.
        path: PathBuf,
        /// Which block, and why.
        source: PemError,
    },
    /// No root at all.
    #[error("no upstream could be trusted: there is no root certificate")]
    Nothing,
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    /// The bundle cannot be read.
    #[error("cannot read the CA bundle {}", .path.display())]
    Unreadable {
        /// The bundle.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl TrustError {
    /// What to do about it, where a person can.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Bundle { source: PemError::Container(it), .. } => Some(it.converter()),
            Self::Bundle { .. } | Self::Unreadable { .. } => Some(
                "name a PEM or DER file with your company's roots, or a folder of them, or leave it out to use the system's roots",
            ),
            Self::Nothing => Some(
                "install the system's ca-certificates, name a bundle, or set trust = \"mozilla+bundle\"",
            ),
            Self::Tls(_) => None,
        }
    }
}

/// Where Debian and Arch, Fedora and RHEL, openSUSE, old RHEL, and Alpine keep all roots in one file.
#[cfg(target_os = "linux")]
const SYSTEM_FILES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];
/// TLS sessions kept for resumption, per configuration: rustls' own default.
const SESSIONS: usize = 256;
