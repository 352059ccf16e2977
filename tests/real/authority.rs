//! A CA that a test makes, and a certificate of it for a server that is not ours.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// Writes `ca.pem` and `ca.key` of a CA with this name, and `server.pem` and `server.key` for this host.
pub(crate) fn write_certificates(folder: &Path, name: &str, host: &str) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new([host.to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    let server = params.signed_by(&key, &ca).unwrap();
    let write = |name: &str, text: String| fs::write(folder.join(name), text).unwrap();
    write("ca.pem", ca.pem());
    write("ca.key", ca.key().serialize_pem());
    write("server.pem", server.pem());
    write("server.key", key.serialize_pem());
}
