//! Finds roots that are trusted in vain: what they sign is not accepted by rustls.

use std::fmt;

use rustls_pki_types::CertificateDer;
use x509_parser::oid_registry::{Oid, asn1_rs::oid};
use x509_parser::prelude::X509Certificate;
use x509_parser::public_key::PublicKey;

use super::distrust::{LEAST_RSA_BITS, WEAK_SIGNATURES, name_of};

/// Why what a root signs is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weakness {
    /// The root, as its subject names it.
    pub name: String,
    reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    ShortKey(usize),
    OldDigest(&'static str),
    OtherKey,
}

impl Weakness {
    /// Whether nothing that the root signs can be accepted.
    pub fn is_certain(&self) -> bool {
        matches!(self.reason, Reason::ShortKey(_) | Reason::OtherKey)
    }
}

/// What is weak about a root, if anything is: a key that no signature of is accepted (RSA below 2,048 bits,
/// or of another kind than RSA, EC and Ed25519; the curve is not looked at), or a certificate signed with
/// SHA-1 or MD5, whose owner likely signs servers' certificates so.
pub fn weakness(root: &CertificateDer<'_>) -> Option<Weakness> {
    let (_, certificate) = x509_parser::parse_x509_certificate(root).ok()?;
    let reason = reason(&certificate)?;
    Some(Weakness { name: name_of(certificate.subject()), reason })
}

fn reason(certificate: &X509Certificate<'_>) -> Option<Reason> {
    match certificate.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < LEAST_RSA_BITS => {
            return Some(Reason::ShortKey(key.key_size()));
        }
        Ok(PublicKey::RSA(_) | PublicKey::EC(_)) => {}
        _ if certificate.public_key().algorithm.algorithm == ED25519 => {}
        _ => return Some(Reason::OtherKey),
    }
    let signed_with = certificate.signature_algorithm.algorithm.to_id_string();
    let (_, digest) = WEAK_SIGNATURES.iter().find(|(known, _)| *known == signed_with)?;
    Some(Reason::OldDigest(digest))
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.name)?;
        match self.reason {
            Reason::ShortKey(bits) => {
                write!(f, "has an RSA key of {bits} bits: nothing that it signs is accepted")
            }
            Reason::OldDigest(digest) => write!(
                f,
                "is signed with {digest}: if it signs servers' certificates so, they are not accepted"
            ),
            Reason::OtherKey => f.write_str("has a kind of key of which no signature is accepted"),
        }
    }
}

/// RFC 8410 section 3.
const ED25519: Oid<'static> = oid!(1.3.101.112);
