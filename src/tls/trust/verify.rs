//! Refuses what no setting could allow, and says in words what is wrong with a certificate.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use time::OffsetDateTime;
use x509_parser::x509::X509Name;

use crate::tls::ORGANISATION;

/// Asks another verifier; refuses what a valetkey signed, and names the issuer that is not trusted.
/// Remembers nothing.
#[derive(Debug)]
pub(super) struct Verifier {
    inner: Arc<dyn ServerCertVerifier>,
}

impl Verifier {
    pub(super) fn over(inner: Arc<dyn ServerCertVerifier>) -> Self {
        Self { inner }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Where the system's store decides, it may hold our roots: `ca install` puts them there.
        if intermediates.iter().chain([end_entity]).any(is_signed_by_a_valetkey) {
            return Err(Refusal::Valetkey.into());
        }
        let last = intermediates.last().unwrap_or(end_entity);
        self.inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| match error {
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                    Refusal::UnknownIssuer(issuer_of(last)).into()
                }
                other => other,
            })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn is_signed_by_a_valetkey(der: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, certificate)| is_a_valetkey(certificate.issuer()))
}

/// Whether the name is that of a certificate authority that a valetkey made.
pub(super) fn is_a_valetkey(name: &X509Name<'_>) -> bool {
    name.iter_organization().any(|part| part.as_str() == Ok(ORGANISATION))
}

/// The issuer's name as it can be shown: the sender of the certificate chose it.
fn issuer_of(der: &CertificateDer<'_>) -> String {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else {
        return String::new();
    };
    let issuer = certificate.issuer();
    let mut parts = issuer.iter_common_name().chain(issuer.iter_organization());
    let name = parts.find_map(|part| part.as_str().ok()).unwrap_or_default();
    name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

/// What the verifier itself refuses.
#[derive(Debug)]
enum Refusal {
    UnknownIssuer(String),
    Valetkey,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownIssuer(name) if name.is_empty() => {
                f.write_str("the certificate's issuer is not trusted")
            }
            Self::UnknownIssuer(name) => {
                write!(f, "the certificate's issuer is not trusted: {name}")
            }
            Self::Valetkey => f.write_str(
                "the certificate was made by a valetkey, which is never trusted upstream",
            ),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// What is wrong with an upstream's certificate, as one clause; `None` when the error is of another kind.
pub fn describe_failure(error: &rustls::Error) -> Option<String> {
    use CertificateError as E;
    let error = match error {
        rustls::Error::InvalidCertificate(error) => error,
        rustls::Error::NoCertificatesPresented => {
            return Some("the server shows no certificate".to_owned());
        }
        _ => return None,
    };
    let fixed = match error {
        E::ExpiredContext { not_after, .. } => {
            return Some(format!("the certificate expired on {}", day(*not_after)));
        }
        E::NotValidYetContext { not_before, .. } => {
            let day = day(*not_before);
            return Some(format!(
                "the certificate is not valid before {day} (is the clock right?)"
            ));
        }
        E::Other(OtherError(error)) => return Some(error.to_string()),
        E::Expired => "the certificate has expired",
        E::NotValidYet => "the certificate is not valid yet (is the clock right?)",
        E::UnknownIssuer => "the certificate's issuer is not trusted",
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "the certificate is for another name"
        }
        E::Revoked => "the certificate has been revoked",
        E::BadEncoding => "the certificate is malformed",
        E::BadSignature => "the certificate's signature is wrong",
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => "the certificate is not for servers",
        E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "the certificate has a kind of key or signature that is not accepted (SHA-1, short RSA)"
        }
        _ => "the certificate is not acceptable",
    };
    Some(fixed.to_owned())
}

fn day(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(time) => time.date().to_string(),
        Err(_) => "a day beyond the calendar".to_owned(),
    }
}

/// Characters of an issuer's name that are shown; RFC 5280 allows 64 (ub-common-name).
pub(super) const MAX_NAME: usize = 64;
