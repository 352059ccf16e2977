//! Refuses what no setting could allow, and tells what is wrong with a certificate.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::distrust::{Distrust, Path, Remedy};
use crate::tls::is_a_valetkey;

/// Asks another verifier; refuses what a valetkey signed, and tells of the others what is wrong with them.
/// Remembers nothing.
#[derive(Debug)]
pub(super) struct Verifier {
    inner: Arc<dyn ServerCertVerifier>,
    remedy: Remedy,
}

impl Verifier {
    pub(super) fn over(inner: Arc<dyn ServerCertVerifier>, remedy: Remedy) -> Self {
        Self { inner, remedy }
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
        self.inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| {
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
        let verified = self.inner.verify_tls12_signature(message, certificate, signature);
        verified.map_err(|error| Distrust::of_key(&error, certificate).map_or(error, refused))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let verified = self.inner.verify_tls13_signature(message, certificate, signature);
        verified.map_err(|error| Distrust::of_key(&error, certificate).map_or(error, refused))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
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
