//! Makes a certificate for each intercepted host when it is first asked for, and keeps it for a while.

use std::ops::Range;
use std::sync::Arc;

use quick_cache::sync::Cache;
use rcgen::{
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SubjectPublicKeyInfo,
};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::ResolvesServerCertUsingSni;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{CipherSuite, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use super::ca::{CaError, LocalCa, certificate};
use crate::clock::Clock;
use crate::origin::Host;

/// The server side of TLS for every host that the local CA permits.
///
/// Invariants: one private key for all leaves of the process; all configurations are one but for the
/// certificate, so a client's session ticket is good for every later connection to its host. Making a
/// leaf takes one signature and is done inline.
#[derive(Debug)]
pub struct Leaves {
    ca: LocalCa,
    clock: Clock,
    public: SubjectPublicKeyInfo,
    private: Arc<dyn SigningKey>,
    template: ServerConfig,
    made: Cache<Host, Arc<Leaf>>,
}

#[derive(Debug)]
struct Leaf {
    config: Arc<ServerConfig>,
    fresh: Range<OffsetDateTime>,
}

impl Leaves {
    /// Makes the leaf key and signs the intermediates.
    ///
    /// # Errors
    ///
    /// [`CaError`], above all when a root's key cannot be used.
    pub fn new(ca: LocalCa) -> Result<Self, CaError> {
        ca.prepare()?;
        let provider = super::provider();
        let key = KeyPair::generate()?;
        let public = SubjectPublicKeyInfo::from_der(&key.subject_public_key_info())?;
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
        let private = provider.key_provider.load_private_key(private).map_err(CaError::signing)?;
        Ok(Self {
            clock: ca.clock().clone(),
            ca,
            public,
            private,
            template: template().map_err(CaError::signing)?,
            made: Cache::new(MAX_LEAVES),
        })
    }

    /// Whether there can be a leaf for the host.
    pub fn permits(&self, host: &Host) -> bool {
        self.ca.permits(host)
    }

    /// The TLS configuration for connections that a client opens to the host. HTTP/2 and HTTP/1.1 are
    /// offered; a client without ALPN is served too.
    ///
    /// # Errors
    ///
    /// [`CaError::NotPermitted`] for a host without a rule, [`CaError::NoRoot`] when the CA has to be
    /// opened again.
    pub fn server_config(&self, host: &Host) -> Result<Arc<ServerConfig>, CaError> {
        let now = self.clock.now();
        if let Some(leaf) = self.made.get(host).filter(|leaf| leaf.fresh.contains(&now)) {
            return Ok(leaf.config.clone());
        }
        let leaf = self.make(host, now)?;
        self.made.insert(host.clone(), leaf.clone());
        Ok(leaf.config.clone())
    }

    fn make(&self, host: &Host, now: OffsetDateTime) -> Result<Arc<Leaf>, CaError> {
        let intermediate = self.ca.intermediate(host)?;
        let not_after = intermediate.not_after().min(now + LIFE);
        let mut params = certificate(now, not_after)?;
        // The subject stays empty: the one name is the alternative one, which is then critical.
        params.subject_alt_names = vec![match host {
            Host::Ip(address) => SanType::IpAddress(*address),
            Host::Name(name) => SanType::DnsName(name.to_string().try_into()?),
        }];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let chain = intermediate.sign(&params, &self.public)?;
        let certified = CertifiedKey::new(chain, self.private.clone());
        let mut config = self.template.clone();
        config.cert_resolver = Arc::new(SingleCertAndKey::from(certified));
        tracing::debug!(%host, "made a leaf");
        let fresh = now..now + (not_after - now) / 2;
        Ok(Arc::new(Leaf { config: Arc::new(config), fresh }))
    }
}

/// The configuration of every leaf, without a certificate. Clones share tickets and sessions.
fn template() -> Result<ServerConfig, rustls::Error> {
    let mut provider = CryptoProvider::clone(&super::provider());
    // Stable: all others stay in their order.
    provider.cipher_suites.sort_by_key(|it| !AES_128.contains(&it.suite()));
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
    config.ignore_client_order = has_aes();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = Ticketer::new()?;
    // One is used by one resumption; clients that open several connections get one on each.
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// Chosen before all others that a client offers, for they cost least: fewer rounds, and a hash (SHA-256) that most processors
/// have instructions for, too; a handshake hashes a hundred blocks. Of 128 bits, as are X25519 and the leaf's P-256. Upstream it is
/// the upstream's choice.
const AES_128: [CipherSuite; 2] =
    [CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256];

/// Whether this processor has instructions for AES. Without them ChaCha20 costs less, and clients on such a processor may say so by
/// their order.
pub(super) fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// A day; a leaf is made again at half of it, so that none is presented in its last twelve hours.
const LIFE: Duration = Duration::hours(24);
/// Hosts remembered. Rules name a few dozen; below a wildcard there may be many.
const MAX_LEAVES: usize = 1024;
