//! Mints the sandbox's certificates: a private CA, and a leaf for whatever host a client asks for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, fs, io};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls_pki_types::PrivateKeyDer;
use time::{Duration, OffsetDateTime};
use tokio_rustls::TlsAcceptor;

/// A CA whose key lives in memory only. All its leaves share one key.
pub(super) struct Ca {
    file: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
    leaf_key: KeyPair,
    leaves: Mutex<HashMap<String, Arc<CertifiedKey>>>,
    now: OffsetDateTime,
    pem: String,
    signer: Arc<dyn SigningKey>,
}

impl Ca {
    /// Makes the CA and writes its certificate to the file.
    pub(super) fn create(name: &str, file: PathBuf, now: OffsetDateTime) -> io::Result<Arc<Self>> {
        let mut params = params(name, &[], now)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        let leaf_key = KeyPair::generate().map_err(io::Error::other)?;
        let der = PrivateKeyDer::try_from(leaf_key.serialize_der()).map_err(io::Error::other)?;
        let signer = aws_lc_rs::sign::any_ecdsa_type(&der).map_err(io::Error::other)?;
        let pem = issuer.pem();
        fs::write(&file, &pem)?;
        Ok(Arc::new(Self { file, issuer, leaf_key, leaves: Mutex::default(), now, pem, signer }))
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A server that shows the leaf of the name that the client asks for.
    pub(super) fn acceptor(self: &Arc<Self>, alpn: &[&[u8]]) -> io::Result<TlsAcceptor> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    fn leaf(&self, host: &str) -> io::Result<Arc<CertifiedKey>> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(host) {
            return Ok(Arc::clone(leaf));
        }
        let leaf = Arc::new(self.mint(host)?);
        leaves.insert(host.to_owned(), Arc::clone(&leaf));
        Ok(leaf)
    }

    /// A leaf for the host, with the defect that its first label asks for.
    fn mint(&self, host: &str) -> io::Result<CertifiedKey> {
        let defect = host.split('.').next().unwrap_or(host);
        let name = if defect == "wrong-name" { "somebody-else.example" } else { host };
        let mut params = params("Sandbox Leaf", &[name.to_owned()], self.now)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if defect == "expired" {
            params.not_after = self.now - Duration::days(1);
        }
        let leaf = if defect == "untrusted" {
            params.self_signed(&self.leaf_key)
        } else {
            params.signed_by(&self.leaf_key, &self.issuer)
        };
        let chain = vec![leaf.map_err(io::Error::other)?.der().clone()];
        Ok(CertifiedKey::new(chain, Arc::clone(&self.signer)))
    }
}

impl ResolvesServerCert for Ca {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // TLS has no server name for an IP address.
        self.leaf(hello.server_name().unwrap_or("127.0.0.1")).ok()
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// Good for a year, of which a month is over, so that a clock turned back a little does not hurt.
fn params(name: &str, hosts: &[String], now: OffsetDateTime) -> io::Result<CertificateParams> {
    let mut params = CertificateParams::new(hosts).map_err(io::Error::other)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - Duration::days(30);
    params.not_after = now + Duration::days(335);
    Ok(params)
}
