//! Both sides of TLS: certificates for the clients, trust in the upstreams.

pub mod ca;
pub mod file;
pub mod leaf;
pub mod pem;
pub mod pkcs12;
pub mod trust;

#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use x509_parser::x509::X509Name;

/// The one provider of cryptography, made once. It is handed to every configuration by hand: no process
/// default is ever installed.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

/// Whether the name is that of a certificate authority that a valetkey made.
fn is_a_valetkey(name: &X509Name<'_>) -> bool {
    name.iter_organization().any(|part| part.as_str() == Ok(ORGANISATION))
}

/// The organisation in the subject of every certificate authority that a valetkey makes; what carries it
/// is never trusted upstream.
const ORGANISATION: &str = "valetkey";
