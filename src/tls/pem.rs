//! Reads certificates from the PEM and DER files that companies hand out, and writes PEM files.

use std::borrow::Cow;
use std::collections::HashSet;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use x509_parser::asn1_rs::{Any, Class, FromDer, Tag};

use crate::quote::quoted;

/// What a file of certificates held.
#[derive(Debug, Default)]
pub struct Bundle {
    /// The certificates in their order, at least one; each can be a root for rustls.
    pub certificates: Vec<CertificateDer<'static>>,
    /// One sentence for each block that was left out.
    pub notices: Vec<String>,
    /// Whether the file takes one more block of text at its end.
    pub is_text: bool,
}

/// Reads every certificate of a file. Text around the blocks is ignored; so are, with a notice, blocks
/// of other kinds (keys, CRLs) and certificates that are marked as not trusted for servers.
///
/// Labels are `CERTIFICATE`, the old `X509 CERTIFICATE`, and `TRUSTED CERTIFICATE`, in which OpenSSL's
/// trust data follows the certificate. A file in DER form is one certificate, or several one after the other.
///
/// # Errors
///
/// [`PemError`] for the first certificate that cannot be used, or when there is none.
pub fn read(file: &[u8]) -> Result<Bundle, PemError> {
    // A SEQUENCE of more than 127 octets (X.690 section 8.1.3.5), which as text would be `0` and no ASCII.
    if matches!(file, [0x30, length, ..] if *length > 0x80) {
        return read_der(file);
    }
    let is_text = !matches!(file, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
    let mut bundle = Bundle { is_text, ..Bundle::default() };
    for block in blocks(&text_of(file))? {
        match block.certificate()? {
            Content::Certificate(der) => bundle.certificates.push(der),
            Content::LeftOut(notice) => bundle.notices.push(notice),
        }
    }
    if bundle.certificates.is_empty() { Err(PemError::Empty) } else { Ok(bundle) }
}

/// Windows' tools save text as UTF-16 with a byte order mark; every other encoding is ASCII where it counts.
fn text_of(file: &[u8]) -> Cow<'_, str> {
    let decode = |units: &[u8], order: fn([u8; 2]) -> u16| {
        let units = units.chunks_exact(2).map(|pair| order([pair[0], pair[1]]));
        char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
    };
    match file {
        [0xff, 0xfe, units @ ..] => Cow::Owned(decode(units, u16::from_le_bytes)),
        [0xfe, 0xff, units @ ..] => Cow::Owned(decode(units, u16::from_be_bytes)),
        _ => String::from_utf8_lossy(file),
    }
}

fn read_der(file: &[u8]) -> Result<Bundle, PemError> {
    let mut bundle = Bundle::default();
    let mut rest = file;
    while !rest.is_empty() {
        let number = bundle.certificates.len() + 1;
        let broken = PemError::Block { number, reason: NOT_X509 };
        let (after, outer) = Any::from_der(rest).map_err(|_| broken)?;
        let der = CertificateDer::from(&rest[..rest.len() - after.len()]).into_owned();
        if RootCertStore::empty().add(der.clone()).is_err() {
            return Err(container(outer.data).map_or(broken, PemError::Container));
        }
        bundle.certificates.push(der);
        rest = after;
    }
    Ok(bundle)
}

/// What else companies hand out in DER form, by its first element.
fn container(content: &[u8]) -> Option<Container> {
    let (_, first) = Any::from_der(content).ok()?;
    match (first.header.tag(), first.data) {
        (Tag::Oid, SIGNED_DATA) => Some(Container::Pkcs7),
        (Tag::Integer, [3]) => Some(Container::Pkcs12),
        _ => None,
    }
}

/// Writes certificates in their order, each once.
pub fn write_pem(certificates: &[CertificateDer<'_>]) -> String {
    let mut seen = HashSet::new();
    let mut out = String::new();
    for der in certificates {
        if !seen.insert(der.as_ref()) {
            continue;
        }
        let body = BASE64_STANDARD.encode(der);
        out.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut rest = body.as_str();
        while !rest.is_empty() {
            let (line, tail) = rest.split_at(rest.len().min(LINE));
            out.push_str(line);
            out.push('\n');
            rest = tail;
        }
        out.push_str("-----END CERTIFICATE-----\n");
    }
    out
}

/// Why a file gives no certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// A block is broken.
    #[error("block {number} {reason}")]
    Block {
        /// Which one, from 1, counting blocks of every kind.
        number: usize,
        /// What is wrong with it; completes "block 2 …".
        reason: &'static str,
    },
    /// It is of a form that holds certificates, and must be turned into PEM first.
    #[error("it is a {0} file, which is not read here")]
    Container(Container),
    /// No certificate, neither in PEM nor in DER form.
    #[error("there is no certificate in it")]
    Empty,
}

/// Other forms in which certificates are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Container {
    /// RFC 2315: `.p7b`, `.p7c`.
    #[error("PKCS #7")]
    Pkcs7,
    /// RFC 7292: `.p12`, `.pfx`.
    #[error("PKCS #12")]
    Pkcs12,
}

impl Container {
    /// What turns it into a file that can be named instead, to be typed.
    pub fn converter(self) -> &'static str {
        match self {
            Self::Pkcs7 => {
                "openssl pkcs7 -print_certs -in FILE -out company.pem (with -inform der if it is not text)"
            }
            Self::Pkcs12 => "openssl pkcs12 -nokeys -in FILE -out company.pem",
        }
    }
}

struct Block<'a> {
    number: usize,
    label: &'a str,
    base64: String,
}

enum Content {
    Certificate(CertificateDer<'static>),
    LeftOut(String),
}

/// Splits the text at its BEGIN and END lines.
fn blocks(text: &str) -> Result<Vec<Block<'_>>, PemError> {
    let mut done: Vec<Block<'_>> = Vec::new();
    let mut open: Option<Block<'_>> = None;
    // A file saved by Notepad starts with a byte order mark; some have CRLF, old Mac ones only CR.
    let lines = text.trim_start_matches('\u{feff}').split(['\n', '\r']).map(str::trim);
    for line in lines.flat_map(parted) {
        match (&mut open, marker(line, "BEGIN"), marker(line, "END")) {
            (Some(block), Some(_), _) => return Err(block.is("has no END line")),
            (None, Some(label), _) => {
                open = Some(Block { number: done.len() + 1, label, base64: String::new() });
            }
            (Some(block), _, Some(label)) if label != block.label => {
                return Err(block.is("ends with another label than it begins with"));
            }
            (Some(_), _, Some(_)) => done.extend(open.take()),
            (Some(block), None, None) => block.base64.push_str(line),
            (None, None, _) => (),
        }
    }
    match open {
        Some(block) => Err(block.is("has no END line")),
        None => Ok(done),
    }
}

/// The two lines that became one when files were put together of which the first ends without a line's end.
fn parted(line: &str) -> impl Iterator<Item = &str> {
    let joint = line.find("----------BEGIN ").filter(|_| line.starts_with("-----END "));
    let (first, second) = line.split_at(joint.map_or(line.len(), |at| at + "-----".len()));
    [first, second].into_iter().take(if joint.is_some() { 2 } else { 1 })
}

/// The label of a line like `-----BEGIN CERTIFICATE-----`.
fn marker<'a>(line: &'a str, word: &str) -> Option<&'a str> {
    line.strip_prefix("-----")?.strip_prefix(word)?.strip_prefix(' ')?.strip_suffix("-----")
}

impl Block<'_> {
    fn is(&self, reason: &'static str) -> PemError {
        PemError::Block { number: self.number, reason }
    }

    fn certificate(&self) -> Result<Content, PemError> {
        let Self { number, label, .. } = self;
        if matches!(*label, "PKCS7" | "CMS") {
            return Err(PemError::Container(Container::Pkcs7));
        }
        if !matches!(*label, "CERTIFICATE" | "X509 CERTIFICATE" | "TRUSTED CERTIFICATE") {
            let label = quoted(label, LINE);
            let notice = format!("block {number} ({label}) is no certificate and was left out");
            return Ok(Content::LeftOut(notice));
        }
        let mut der =
            BASE64_STANDARD.decode(&self.base64).map_err(|_| self.is("is not valid base64"))?;
        if *label == "TRUSTED CERTIFICATE" {
            let (aux, _) = Any::from_der(&der).map_err(|_| self.is(NOT_X509))?;
            let serves = may_serve(aux).ok_or_else(|| self.is("has unreadable trust data"))?;
            if !serves {
                let notice =
                    format!("block {number} is marked as not trusted for servers and was left out");
                return Ok(Content::LeftOut(notice));
            }
            der.truncate(der.len() - aux.len());
        }
        let der = CertificateDer::from(der);
        match RootCertStore::empty().add(der.clone()) {
            Ok(()) => Ok(Content::Certificate(der)),
            Err(_) => Err(self.is(NOT_X509)),
        }
    }
}

/// Reads OpenSSL's trust data (`X509_CERT_AUX`: an optional list of purposes trusted, then as `[0]` one
/// of purposes rejected): whether the certificate may vouch for servers. `None` when it is malformed.
fn may_serve(aux: &[u8]) -> Option<bool> {
    if aux.is_empty() {
        return Some(true);
    }
    let (_, aux) = Any::from_der(aux).ok()?;
    let mut serves = true;
    for part in elements(aux.data)? {
        match (part.header.class(), part.header.tag()) {
            (Class::Universal, Tag::Sequence) => serves &= names_servers(part.data)?,
            (Class::ContextSpecific, Tag(0)) => serves &= !names_servers(part.data)?,
            // An alias, a key id.
            _ => (),
        }
    }
    Some(serves)
}

fn names_servers(purposes: &[u8]) -> Option<bool> {
    Some(elements(purposes)?.iter().any(|oid| oid.data == SERVER_AUTH || oid.data == ANY_PURPOSE))
}

fn elements(mut der: &[u8]) -> Option<Vec<Any<'_>>> {
    let mut out = Vec::new();
    while !der.is_empty() {
        let (rest, element) = Any::from_der(der).ok()?;
        out.push(element);
        der = rest;
    }
    Some(out)
}

/// Characters on a line (RFC 7468 section 2).
const LINE: usize = 64;
/// Content octets of 1.3.6.1.5.5.7.3.1 (RFC 5280 section 4.2.1.12).
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
/// Content octets of 2.5.29.37.0 (RFC 5280 section 4.2.1.12).
const ANY_PURPOSE: &[u8] = &[0x55, 0x1d, 0x25, 0];
/// Content octets of 1.2.840.113549.1.7.2 (RFC 2315 section 14).
const SIGNED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2];
const NOT_X509: &str = "is not a well-formed X.509 certificate";

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate() -> CertificateDer<'static> {
        rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap().cert.into()
    }

    fn block(label: &str, der: &[u8]) -> String {
        let body = BASE64_STANDARD.encode(der);
        format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
    }

    /// Trust data: purposes trusted, purposes rejected.
    fn aux(trusted: &[u8], rejected: &[u8]) -> Vec<u8> {
        let wrap = |tag: u8, data: &[u8]| [&[tag, data.len() as u8], data].concat();
        let list = |tag: u8, oid: &[u8]| match oid {
            [] => vec![],
            oid => wrap(tag, &wrap(6, oid)),
        };
        wrap(0x30, &[list(0x30, trusted), list(0xa0, rejected)].concat())
    }

    #[test]
    fn what_companies_hand_out() {
        let (one, two) = (certificate(), certificate());
        let (plain, other) = (write_pem(std::slice::from_ref(&one)), block("CERTIFICATE", &two));
        let trusted = |aux: &[u8]| block("TRUSTED CERTIFICATE", &[&*one, aux].concat());
        let email = &[0x2b, 6, 1, 5, 5, 7, 3, 4];
        let crl = block("X509 CRL", b"crl");
        let table = [
            (plain.clone(), 1, 0),
            (format!("# Corp Root\n{plain}\ntext between\n{other}# end\n"), 2, 0),
            (format!("\u{feff}{plain}").replace('\n', "\r\n"), 1, 0),
            (plain.replace('\n', "\r"), 1, 0),
            (plain.replace('\n', "  \n  "), 1, 0),
            (format!("{}{other}", plain.trim_end()), 2, 0),
            (block("X509 CERTIFICATE", &one), 1, 0),
            (trusted(&[]), 1, 0),
            (trusted(&aux(SERVER_AUTH, &[])), 1, 0),
            (trusted(&aux(ANY_PURPOSE, email)), 1, 0),
            (format!("{other}{}", trusted(&aux(&[], SERVER_AUTH))), 1, 1),
            (format!("{other}{}", trusted(&aux(email, &[]))), 1, 1),
            (format!("{crl}{plain}{}", block("PRIVATE KEY", b"key")), 1, 2),
        ];
        for (text, certificates, notices) in table {
            let bundle = read(text.as_bytes()).expect(&text);
            assert_eq!(bundle.certificates.len(), certificates, "{text}");
            assert_eq!(bundle.notices.len(), notices, "{text}");
            assert!(bundle.certificates.iter().all(|der| *der == one || *der == two), "{text}");
        }
        let latin1 = [b"# Soci\xe9t\xe9\n", plain.as_bytes()].concat();
        assert_eq!(read(&latin1).unwrap().certificates.len(), 1);
    }

    #[test]
    fn what_is_broken_is_named() {
        let one = certificate();
        let plain = write_pem(std::slice::from_ref(&one));
        let cut = plain.strip_suffix("-----END CERTIFICATE-----\n").unwrap();
        let at = |number, reason| PemError::Block { number, reason };
        let table = [
            (String::new(), PemError::Empty),
            ("no PEM at all".to_owned(), PemError::Empty),
            (block("X509 CRL", b"crl"), PemError::Empty),
            (format!("{plain}{cut}"), at(2, "has no END line")),
            (format!("{cut}{plain}"), at(1, "has no END line")),
            (
                plain.replace("END CERT", "END TRUSTED CERT"),
                at(1, "ends with another label than it begins with"),
            ),
            (
                format!("{plain}{}", block("CERTIFICATE", b"").replace("\n\n", "\n!!!\n")),
                at(2, "is not valid base64"),
            ),
            (format!("{plain}{}", block("CERTIFICATE", b"junk")), at(2, NOT_X509)),
            (block("CERTIFICATE", &one[..one.len() - 1]), at(1, NOT_X509)),
            (block("CERTIFICATE", &[&*one, b"more"].concat()), at(1, NOT_X509)),
            (
                block("TRUSTED CERTIFICATE", &[&*one, b"junk"].concat()),
                at(1, "has unreadable trust data"),
            ),
        ];
        for (text, expected) in table {
            assert_eq!(read(text.as_bytes()).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn der_is_one_certificate_or_several() {
        let (one, two) = (certificate(), certificate());
        assert_eq!(read(&one).unwrap().certificates, std::slice::from_ref(&one));
        assert_eq!(read(&[&*one, &*two].concat()).unwrap().certificates, [one.clone(), two]);
        let at = |number| PemError::Block { number, reason: NOT_X509 };
        assert_eq!(read(&[&*one, b"\x30\x82junk"].concat()).unwrap_err(), at(2));
        assert_eq!(read(&one[..one.len() - 1]).unwrap_err(), at(1));
        // Text that begins like DER.
        assert_eq!(read(b"00 Root\n").unwrap_err(), PemError::Empty);
    }

    #[test]
    fn duplicates_are_written_once() {
        let (one, two) = (certificate(), certificate());
        let text = write_pem(&[one.clone(), two.clone(), one.clone()]);
        assert!(text.lines().all(|line| line.len() <= LINE));
        assert_eq!(read(text.as_bytes()).unwrap().certificates, [one, two]);
    }

    proptest::proptest! {
        #[test]
        fn no_file_panics(file in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            assert!(read(&file).is_err());
            assert!(read(block("TRUSTED CERTIFICATE", &file).as_bytes()).is_err());
        }
    }
}
