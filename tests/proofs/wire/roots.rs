//! Files of certificates: what is read of one is in it, is written as it was, and no key beside it is told.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use valetkey::tls::pem::{self, PemError};

use super::attack::{Attack, Verdict};
use crate::rounds;

#[test]
fn certificates_are_read_as_they_stand() {
    let attack = Attack { name: "pem", rounds: rounds(1_000_000, 20_000_000), words: WORDS };
    attack.run(|input, _| judge(input));
}

fn judge(input: &[u8]) -> Verdict {
    let bundle = match pem::read(input) {
        Ok(bundle) => bundle,
        Err(PemError::Block { number, reason }) => {
            let text = String::from_utf8_lossy(input);
            // In UTF-16 every other byte is 0.
            let begun = text.matches("BEGIN ").count() + text.matches("B\0E\0G\0I\0N\0 ").count();
            let most = if is_der(input) { input.len() / 2 } else { begun };
            let says = format!("block {number} {reason}");
            return if (1..=most).contains(&number) && !is_told(&says) {
                Ok(false)
            } else {
                Err(format!("it says: {says}"))
            };
        }
        Err(PemError::Container(_) | PemError::Empty) => return Ok(false),
    };
    if bundle.certificates.is_empty() {
        return Err("it gives nothing".to_owned());
    }
    if let Some(notice) = bundle.notices.iter().find(|notice| is_told(notice)) {
        return Err(format!("it says: {notice}"));
    }
    let der = is_der(input);
    let letters =
        String::from_utf8_lossy(input).replace(|c: char| c == '\0' || c.is_whitespace(), "");
    for certificate in &bundle.certificates {
        // The last letters hold what follows a certificate, too, where OpenSSL's trust data does.
        let encoded = BASE64_STANDARD.encode(certificate);
        let encoded = &encoded[..encoded.len() - 4];
        let holds = match der {
            true => input.windows(certificate.len()).any(|piece| piece == certificate.as_ref()),
            false => letters.contains(encoded),
        };
        if !holds {
            return Err("a certificate is not in it".to_owned());
        }
    }
    let written = pem::write_pem(&bundle.certificates);
    let again = pem::read(written.as_bytes()).map_err(|error| format!("once written: {error}"))?;
    let mut each = bundle.certificates;
    let mut seen = std::collections::HashSet::new();
    each.retain(|certificate| seen.insert(certificate.clone()));
    if again.certificates != each || pem::write_pem(&again.certificates) != written {
        return Err("it is not written as it was".to_owned());
    }
    Ok(true)
}

/// Whether it begins as no text does: a SEQUENCE of more than 127 octets.
fn is_der(input: &[u8]) -> bool {
    matches!(input, [0x30, length, ..] if *length > 0x80)
}

/// Whether a message quotes the key of the corpus, of which mutations may have left a piece.
fn is_told(says: &str) -> bool {
    (0..KEY.len() - 8).any(|at| says.contains(&KEY[at..at + 8]))
}

/// Stands in the corpus where a private key would.
const KEY: &str = "Q0FOQVJZLUtFWS1OT1QtQS1SRUFMLU9ORQ";

const WORDS: &[&str] = &[
    "-----BEGIN CERTIFICATE-----\n",
    "-----END CERTIFICATE-----\n",
    "-----BEGIN PRIVATE KEY-----\n",
    "-----END PRIVATE KEY-----\n",
    "-----BEGIN TRUSTED CERTIFICATE-----",
    "-----BEGIN PKCS7-----\n",
    "-----",
    "\r",
    "\n",
    "=",
    "==",
    "\u{feff}",
    "-----END CERTIFICATE----------BEGIN CERTIFICATE-----",
    "BEGIN ",
    "END ",
    "A",
    "MIIB",
    "\0",
    "-----BEGIN Q0FOQVJZLUtFWS-----\n",
    " ",
    "\t",
];
