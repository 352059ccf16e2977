//! Mints the sandbox's certificates: a private CA, and a leaf for whatever host a client asks for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, fs, io};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CidrSubnet, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints,
};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};
use tokio_rustls::TlsAcceptor;

/// What can be wrong with a certificate, each as badssl.com has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Its time is over.
    Expired,
    /// An intermediate has made it that may vouch for other names only.
    NameConstraint,
    /// An intermediate has made it that is not sent.
    NoIntermediate,
    /// Its time has not come.
    NotYetValid,
    /// It is its own issuer.
    SelfSigned,
    /// It leads to a root that nobody knows, which is sent.
    UnknownRoot,
    /// It is for clients.
    WrongEku,
    /// It is for `somebody-else.example`.
    WrongName,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Expired,
        Self::NameConstraint,
        Self::NoIntermediate,
        Self::NotYetValid,
        Self::SelfSigned,
        Self::UnknownRoot,
        Self::WrongEku,
        Self::WrongName,
    ];

    /// The one that the first label of a host asks for.
    fn of_host(host: &str) -> Option<Self> {
        match host.split('.').next()? {
            "expired" => Some(Self::Expired),
            "untrusted" => Some(Self::SelfSigned),
            "wrong-name" => Some(Self::WrongName),
            _ => None,
        }
    }
}

/// A CA whose key lives in memory only. All its leaves share one key.
pub(super) struct Ca {
    /// What is wrong with the leaves of these hosts, beside what their names ask for.
    defects: Mutex<HashMap<String, Defect>>,
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
        let issuer = root(name, now)?;
        let leaf_key = KeyPair::generate().map_err(io::Error::other)?;
        let der = PrivateKeyDer::try_from(leaf_key.serialize_der()).map_err(io::Error::other)?;
        let signer = aws_lc_rs::sign::any_ecdsa_type(&der).map_err(io::Error::other)?;
        let pem = issuer.pem();
        fs::write(&file, &pem)?;
        let (defects, leaves) = (Mutex::default(), Mutex::default());
        Ok(Arc::new(Self { defects, file, issuer, leaf_key, leaves, now, pem, signer }))
    }

    /// Gives a host a leaf with a defect from now on, or a good one again.
    pub(super) fn spoil(&self, host: &str, defect: Option<Defect>) {
        let mut defects = self.defects.lock().unwrap_or_else(PoisonError::into_inner);
        match defect {
            Some(defect) => defects.insert(host.to_owned(), defect),
            None => defects.remove(host),
        };
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner).remove(host);
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

    /// A chain for the host, with the defect that it was given, or that its first label asks for.
    fn mint(&self, host: &str) -> io::Result<CertifiedKey> {
        let given = self.defects.lock().unwrap_or_else(PoisonError::into_inner).get(host).copied();
        let defect = given.or_else(|| Defect::of_host(host));
        let name = if defect == Some(Defect::WrongName) { "somebody-else.example" } else { host };
        let mut params = params("Sandbox Leaf", &[name.to_owned()], self.now)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        match defect {
            Some(Defect::Expired) => params.not_after = self.now - Duration::days(1),
            Some(Defect::NotYetValid) => params.not_before = self.now + Duration::days(1),
            Some(Defect::WrongEku) => {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }
            _ => {}
        }
        let chain = self.chain(defect, &params).map_err(io::Error::other)?;
        Ok(CertifiedKey::new(chain, Arc::clone(&self.signer)))
    }

    fn chain(
        &self,
        defect: Option<Defect>,
        params: &CertificateParams,
    ) -> io::Result<Vec<CertificateDer<'static>>> {
        let signed_by = |issuer: &Issuer<'_, KeyPair>| {
            params
                .signed_by(&self.leaf_key, issuer)
                .map(CertificateDer::from)
                .map_err(io::Error::other)
        };
        Ok(match defect {
            Some(Defect::SelfSigned) => {
                let leaf = params.self_signed(&self.leaf_key).map_err(io::Error::other)?;
                vec![leaf.into()]
            }
            Some(Defect::UnknownRoot) => {
                let root = root("Unknown Root", self.now)?;
                vec![signed_by(&root)?, root.der().clone()]
            }
            Some(Defect::NoIntermediate) => {
                let (issuer, _) = self.intermediate("Sandbox Intermediate", None)?;
                vec![signed_by(&issuer)?]
            }
            Some(Defect::NameConstraint) => {
                let only = vec![
                    GeneralSubtree::DnsName("elsewhere.example".to_owned()),
                    GeneralSubtree::IpAddress(CidrSubnet::V4([10, 0, 0, 0], [255, 0, 0, 0])),
                ];
                let (issuer, der) = self.intermediate("Narrow Intermediate", Some(only))?;
                vec![signed_by(&issuer)?, der]
            }
            _ => vec![signed_by(&self.issuer)?],
        })
    }

    /// A CA below this one, which may vouch only for what it is told.
    fn intermediate(
        &self,
        name: &str,
        only: Option<Vec<GeneralSubtree>>,
    ) -> io::Result<(Issuer<'static, KeyPair>, CertificateDer<'static>)> {
        let mut params = ca_params(name, self.now)?;
        params.name_constraints = only.map(|permitted_subtrees| NameConstraints {
            permitted_subtrees,
            excluded_subtrees: Vec::new(),
        });
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let der = params.signed_by(&key, &self.issuer).map_err(io::Error::other)?.into();
        Ok((Issuer::new(params, key), der))
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

fn root(name: &str, now: OffsetDateTime) -> io::Result<CertifiedIssuer<'static, KeyPair>> {
    let key = KeyPair::generate().map_err(io::Error::other)?;
    CertifiedIssuer::self_signed(ca_params(name, now)?, key).map_err(io::Error::other)
}

fn ca_params(name: &str, now: OffsetDateTime) -> io::Result<CertificateParams> {
    let mut params = params(name, &[], now)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Good for a year, of which a month is over, so that a clock turned back a little does not hurt.
fn params(name: &str, hosts: &[String], now: OffsetDateTime) -> io::Result<CertificateParams> {
    let mut params = CertificateParams::new(hosts).map_err(io::Error::other)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - Duration::days(30);
    params.not_after = now + Duration::days(335);
    Ok(params)
}
