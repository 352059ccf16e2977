//! Writes trust stores as Java reads them: PKCS #12 (RFC 7292) with nothing but certificates.

use std::collections::HashSet;

use rustls_pki_types::CertificateDer;

/// A trust store of these certificates, each once.
///
/// They are public: nothing is encrypted, and there is no code over the whole that a password could be checked by.
/// Java opens it without a password, and with any that somebody has set for a store of their own.
pub fn trust_store(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let mut seen = HashSet::new();
    let each_once = certificates.iter().map(AsRef::as_ref).filter(|der: &&[u8]| seen.insert(*der));
    let bags: Vec<_> = each_once.enumerate().map(|(number, der)| bag(der, number)).collect();
    let safe = data(&sequence(&[&data(&sequence(&[&bags.concat()]))]));
    sequence(&[&element(INTEGER, &[VERSION]), &safe])
}

/// A certificate that is trusted for everything, under a name of its own: of two with one name Java sees one.
fn bag(certificate: &[u8], number: usize) -> Vec<u8> {
    let kind = element(OID, X509_CERTIFICATE);
    let value = sequence(&[&kind, &element(EXPLICIT, &element(OCTETS, certificate))]);
    let name: Vec<u8> =
        format!("valetkey {number}").encode_utf16().flat_map(u16::to_be_bytes).collect();
    let attributes = [
        attribute(FRIENDLY_NAME, &element(BMP_STRING, &name)),
        attribute(TRUSTED_KEY_USAGE, &element(OID, ANY_KEY_USAGE)),
    ];
    let kind = element(OID, CERTIFICATE_BAG);
    sequence(&[&kind, &element(EXPLICIT, &value), &element(SET, &attributes.concat())])
}

fn attribute(oid: &[u8], value: &[u8]) -> Vec<u8> {
    sequence(&[&element(OID, oid), &element(SET, value)])
}

/// `ContentInfo` of the type `data` (RFC 7292 section 4).
fn data(content: &[u8]) -> Vec<u8> {
    sequence(&[&element(OID, DATA), &element(EXPLICIT, &element(OCTETS, content))])
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    element(SEQUENCE, &parts.concat())
}

/// One element of DER: its tag, its length in the shortest form (X.690 section 10.1), its content.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let zeros = length.iter().take_while(|byte| **byte == 0).count();
    let length = &length[zeros..];
    let mut out = vec![tag];
    match length {
        [] => out.push(0),
        [short @ ..=0x7f] => out.push(*short),
        long => {
            out.push(0x80 | long.len().to_le_bytes()[0]);
            out.extend(long);
        }
    }
    out.extend(content);
    out
}

/// PKCS #12 v1.0 and later.
const VERSION: u8 = 3;

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;
const BMP_STRING: u8 = 0x1e;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// `[0] EXPLICIT`.
const EXPLICIT: u8 = 0xa0;

/// 1.2.840.113549.1.7.1
const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01];
/// 1.2.840.113549.1.9.20
const FRIENDLY_NAME: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x14];
/// 1.2.840.113549.1.9.22.1
const X509_CERTIFICATE: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x16, 0x01];
/// 1.2.840.113549.1.12.10.1.3
const CERTIFICATE_BAG: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x0c, 0x0a, 0x01, 0x03];
/// 2.16.840.1.113894.746875.1.1, Oracle's: without it Java takes a certificate for that of some key of ours.
const TRUSTED_KEY_USAGE: &[u8] =
    &[0x60, 0x86, 0x48, 0x01, 0x86, 0xf9, 0x66, 0xad, 0xca, 0x7b, 0x01, 0x01];
/// 2.5.29.37.0
const ANY_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25, 0x00];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_as_short_as_they_can_be() {
        let table: [(usize, &[u8]); 5] = [
            (0, &[0]),
            (127, &[0x7f]),
            (128, &[0x81, 0x80]),
            (256, &[0x82, 1, 0]),
            (70_000, &[0x83, 1, 0x11, 0x70]),
        ];
        for (length, expected) in table {
            let made = element(OCTETS, &vec![7; length]);
            assert_eq!(&made[..=expected.len()], [&[OCTETS], expected].concat());
            assert_eq!(made.len(), 1 + expected.len() + length);
        }
    }

    #[test]
    fn each_certificate_is_in_it_once() {
        let [one, two] = [b"one certificate", b"two certificate"];
        let all = [one, two, one].map(|der| CertificateDer::from(der.to_vec()));
        let store = trust_store(&all);
        for der in [one, two] {
            assert_eq!(store.windows(der.len()).filter(|found| found == der).count(), 1);
        }
    }
}
