//! Refuses what no setting could allow, and tells what is wrong with a certificate.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::distrust::{Distrust, Path, Remedy};
use crate::tls::{is_a_valetkey, provider};

/// Asks another verifier; refuses what a valetkey signed, and tells of the others what is wrong with them.
/// Remembers nothing. A self-issued certificate that is in the bundle stands for itself, and vouches for no other.
#[derive(Debug)]
pub(super) struct Verifier {
    /// `None` where there is no root.
    inner: Option<Arc<dyn ServerCertVerifier>>,
    /// Self-issued certificates of the bundle.
    selves: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    remedy: Remedy,
}

impl Verifier {
    pub(super) fn over(
        inner: Option<Arc<dyn ServerCertVerifier>>,
        selves: Vec<CertificateDer<'static>>,
        remedy: Remedy,
    ) -> Self {
        let algorithms = provider().signature_verification_algorithms;
        Self { inner, selves, algorithms, remedy }
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
            return Err(refused(Distrust::of_a_valetkey()));
        }
        let verified = match &self.inner {
            _ if self.selves.iter().any(|known| known == end_entity) => {
                stands_for_itself(end_entity, server_name, now)
            }
            Some(inner) => {
                inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            None => Err(CertificateError::UnknownIssuer.into()),
        };
        verified.map_err(|error| {
            let rustls::Error::InvalidCertificate(defect) = &error else { return error };
            let path = Path::of(end_entity, intermediates);
            let distrust = Distrust::of_path(defect, &path, server_name, &self.remedy);
            distrust.map_or(error, refused)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let verified = verify_tls12_signature(message, certificate, signature, &self.algorithms);
        verified.map_err(|error| Distrust::of_key(&error, certificate).map_or(error, refused))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let verified = verify_tls13_signature(message, certificate, signature, &self.algorithms);
        verified.map_err(|error| Distrust::of_key(&error, certificate).map_or(error, refused))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// All of a certificate but who issued it, which its own DER in the bundle answers; that the server has its key
/// is shown by the handshake.
fn stands_for_itself(
    der: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, rustls::Error> {
    let (_, it) =
        x509_parser::parse_x509_certificate(der).map_err(|_| CertificateError::BadEncoding)?;
    let [not_before, not_after] = [it.validity().not_before, it.validity().not_after].map(|at| {
        UnixTime::since_unix_epoch(
            at.timestamp().try_into().map_or(Duration::ZERO, Duration::from_secs),
        )
    });
    if now < not_before {
        return Err(CertificateError::NotValidYetContext { time: now, not_before }.into());
    }
    if now > not_after {
        return Err(CertificateError::ExpiredContext { time: now, not_after }.into());
    }
    let purposes = it.extended_key_usage().map_err(|_| CertificateError::BadEncoding)?;
    if purposes.is_some_and(|purposes| !purposes.value.server_auth && !purposes.value.any) {
        return Err(CertificateError::InvalidPurpose.into());
    }
    verify_server_name(&ParsedCertificate::try_from(der)?, name)?;
    Ok(ServerCertVerified::assertion())
}

fn is_signed_by_a_valetkey(der: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, certificate)| is_a_valetkey(certificate.issuer()))
}

fn refused(distrust: Distrust) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(distrust))).into()
}

/// What is wrong with a server's certificate; `None` when the error is of another kind.
pub fn describe_failure(error: &rustls::Error) -> Option<Distrust> {
    match error {
        rustls::Error::InvalidCertificate(error) => Some(match error {
            CertificateError::Other(OtherError(ours)) => ours
                .downcast_ref::<Distrust>()
                .map_or_else(|| Distrust::of_error(error), Distrust::clone),
            error => Distrust::of_error(error),
        }),
        rustls::Error::NoCertificatesPresented => {
            Some(Distrust::of_the_server("the server shows no certificate"))
        }
        _ => None,
    }
}
