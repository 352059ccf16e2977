//! Why a server's certificate is not accepted: a sentence for each defect, and what to do about it.

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use rustls::{CertificateError, OtherError};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::X509Name;

use crate::quote::quoted;
use crate::secret::Fingerprint;

/// Why a certificate is not accepted. Its `Display` is one clause, which begins with "the certificate" or "the
/// server"; what the server chose of it has no control characters and is cut to a length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distrust {
    sentence: String,
    hint: String,
}

impl Distrust {
    /// What no setting changes: whoever runs the server must do something.
    pub(super) fn of_the_server(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), hint: ASK.to_owned() }
    }

    /// Another valetkey has answered in the server's place.
    pub(super) fn of_a_valetkey() -> Self {
        let hint = "check upstream.proxy and HTTPS_PROXY: another valetkey is in the way";
        Self { hint: hint.to_owned(), ..Self::of_the_server(OURS) }
    }

    /// No certificate can be checked against the host's name, as for `a_b.example`.
    pub(crate) fn no_name() -> Self {
        Self::of_the_server("the certificate cannot be checked against this host name")
    }

    /// What to do about it.
    pub fn hint(&self) -> &str {
        &self.hint
    }

    /// What is wrong with the path, as `error` has it; `None` where the error says it all.
    pub(super) fn of_path(
        error: &CertificateError,
        path: &Path<'_>,
        name: &ServerName<'_>,
        remedy: &Remedy,
    ) -> Option<Self> {
        use CertificateError as E;
        let sentence = match error {
            E::UnknownIssuer => return Some(path.unknown_issuer(remedy)),
            E::ExpiredContext { not_after, .. } => {
                let of =
                    path.whose(|it| it.validity().not_after.timestamp() == seconds(*not_after));
                format!("{of} expired on {}", day(*not_after))
            }
            E::NotValidYetContext { not_before, .. } => {
                let of =
                    path.whose(|it| it.validity().not_before.timestamp() == seconds(*not_before));
                let day = day(*not_before);
                return Some(Self {
                    hint: CLOCK.to_owned(),
                    ..Self::of_the_server(format!("{of} is not valid before {day}"))
                });
            }
            E::NotValidForName | E::NotValidForNameContext { .. } => {
                format!("the certificate is for {}, and not for {}", path.names(), name.to_str())
            }
            E::BadSignature => match path.weak_key() {
                Some(sentence) => sentence,
                None => return Some(path.bad_signature(remedy)),
            },
            E::UnsupportedSignatureAlgorithmContext { .. }
            | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                path.weak_signature().or_else(|| path.weak_key())?
            }
            // What webpki has no variant for in rustls, it tells by its own word.
            E::Other(OtherError(error)) if error.to_string() == "NameConstraintViolation" => {
                path.name_constraint(name)
            }
            // As `openssl req -x509` makes a server's own: in the bundle it would stand for itself.
            E::Other(OtherError(error))
                if error.to_string() == "CaUsedAsEndEntity" && path.is_self_issued() =>
            {
                return Some(path.unknown_issuer(remedy));
            }
            _ => return None,
        };
        Some(Self::of_the_server(sentence))
    }

    /// What an error says by itself, without the certificates that it is about.
    pub(super) fn of_error(error: &CertificateError) -> Self {
        use CertificateError as E;
        Self::of_the_server(match error {
            E::Expired | E::ExpiredContext { .. } => "the certificate has expired",
            E::NotValidYet | E::NotValidYetContext { .. } => "the certificate is not valid yet",
            E::UnknownIssuer => "the certificate's issuer is not trusted",
            E::NotValidForName | E::NotValidForNameContext { .. } => {
                "the certificate is for another name"
            }
            E::Revoked => "the certificate has been revoked",
            E::BadEncoding => "the certificate is malformed",
            E::BadSignature => "the certificate's signature is wrong",
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
                "the certificate is not for servers (its extended key usage leaves them out)"
            }
            E::UnsupportedSignatureAlgorithmContext { .. }
            | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                "the certificate has a kind of key or signature that is not accepted"
            }
            _ => "the certificate is not acceptable",
        })
    }

    /// What is wrong with the server's own key, which the handshake uses.
    pub(super) fn of_key(error: &rustls::Error, leaf: &CertificateDer<'_>) -> Option<Self> {
        let is_foreign =
            *error == rustls::Error::InvalidCertificate(CertificateError::BadSignature);
        let foreign = || is_foreign.then(|| FOREIGN_KEY.to_owned());
        Path::of(leaf, &[]).weak_key().or_else(foreign).map(Self::of_the_server)
    }
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Distrust {}

/// What a person can do who trusts an issuer that we do not.
#[derive(Clone, Debug)]
pub(super) struct Remedy {
    /// The bundle in force.
    pub(super) bundle: Option<PathBuf>,
    /// Whether one more certificate can be appended to it.
    pub(super) is_text: bool,
    /// Whether the mode lets a bundle count.
    pub(super) counts: bool,
}

impl Remedy {
    fn hint(&self, name: &str) -> String {
        let trust = "if it is the CA of your company, whose proxy then inspects TLS, get its certificate from your IT,";
        match (&self.bundle, self.counts) {
            (_, false) => format!(
                "{trust} put it into the system's store; or set upstream.trust = \"system+bundle\" \
                 and upstream.ca_bundle"
            ),
            (None, true) => format!(
                "{trust} save it as PEM and set upstream.ca_bundle; under [upstream] of the \
                 configuration: ca_bundle = \"/path/to/{}.pem\"",
                file_name(name)
            ),
            (Some(bundle), true) if bundle.is_dir() => {
                format!("{trust} put its certificate as PEM into the folder {}", bundle.display())
            }
            (Some(bundle), true) if !self.is_text => format!(
                "{trust} put both into a folder, and name that in the place of {}",
                bundle.display()
            ),
            (Some(bundle), true) => {
                format!("{trust} append its certificate as PEM to the bundle {}", bundle.display())
            }
        }
    }
}

/// The certificates that lead from the server's own to the last known issuer, as far as the server sent them.
pub(super) struct Path<'a>(Vec<(&'a CertificateDer<'a>, X509Certificate<'a>)>);

impl<'a> Path<'a> {
    /// Empty where the server's own is malformed.
    pub(super) fn of(leaf: &'a CertificateDer<'a>, sent: &'a [CertificateDer<'a>]) -> Self {
        let parse = |der: &'a CertificateDer<'a>| {
            x509_parser::parse_x509_certificate(der).ok().map(|(_, parsed)| (der, parsed))
        };
        let mut others: Vec<_> = sent.iter().filter_map(parse).collect();
        let mut path: Vec<_> = parse(leaf).into_iter().collect();
        while let Some((_, top)) = path.last()
            && !is_self_issued(top)
            && let Some(at) = others.iter().position(|(_, it)| is_issued_by(top, it))
        {
            path.push(others.swap_remove(at));
        }
        Self(path)
    }

    /// Whether the server's own is its own issuer, and so the whole path.
    fn is_self_issued(&self) -> bool {
        self.0.first().is_some_and(|(_, leaf)| is_self_issued(leaf))
    }

    fn unknown_issuer(&self, remedy: &Remedy) -> Distrust {
        let Some((der, top)) = self.0.last() else {
            return Distrust::of_error(&CertificateError::UnknownIssuer);
        };
        let (name, sha256) = (name_of(top.issuer()), Fingerprint::of(der).with_colons());
        let was_sent = is_self_issued(top);
        let sentence = match (was_sent, self.0.len()) {
            (true, 1) => {
                format!(
                    "the certificate is self-signed by `{name}`, which is not trusted (SHA-256 {sha256})"
                )
            }
            (true, _) => {
                format!(
                    "the certificate leads to the root `{name}`, which is not trusted (SHA-256 {sha256})"
                )
            }
            (false, 1) => format!(
                "the certificate is issued by `{name}`, whose own certificate is neither known nor sent: an \
                 intermediate is missing, or that is a root that is not trusted (SHA-256 of the server's own, \
                 `{}`: {sha256})",
                name_of(top.subject())
            ),
            (false, _) => format!(
                "the certificate leads to `{name}`, which is not trusted, and whose own certificate was not sent \
                 (SHA-256 of the last one sent, `{}`: {sha256})",
                name_of(top.subject())
            ),
        };
        let mut hint = remedy.hint(&name);
        if !was_sent && self.0.len() == 1 {
            hint = format!(
                "{hint}; if it is a public CA's, ask whoever runs the upstream to send its intermediates"
            );
        }
        Distrust { sentence, hint }
    }

    /// The first certificate that something is true of, in words.
    fn whose(&self, is_it: impl Fn(&X509Certificate<'_>) -> bool) -> String {
        self.at(self.0.iter().position(|(_, it)| is_it(it)).unwrap_or(0))
    }

    /// The names that the server's own certificate is for.
    fn names(&self) -> String {
        let names: Vec<String> =
            self.0.first().map(|(_, leaf)| host_names(leaf)).unwrap_or_default();
        match names.len() {
            0 => "no host".to_owned(),
            more if more > MOST_NAMES => {
                format!("{} and {} more", names[..MOST_NAMES].join(", "), more - MOST_NAMES)
            }
            _ => names.join(", "),
        }
    }

    fn bad_signature(&self, remedy: &Remedy) -> Distrust {
        let issuer = self.0.last().map(|(_, top)| name_of(top.issuer())).unwrap_or_default();
        let sentence = format!(
            "the certificate bears the name of `{issuer}` as its issuer, and a signature that is not of that \
             issuer's key as it is known here"
        );
        // A company's CA may have got a new key under its old name.
        let hint = format!("{ASK}; or, {}", remedy.hint(&issuer));
        Distrust { hint, ..Distrust::of_the_server(sentence) }
    }

    fn weak_key(&self) -> Option<String> {
        self.0.iter().enumerate().find_map(|(at, (_, it))| {
            let PublicKey::RSA(key) = it.public_key().parsed().ok()? else { return None };
            let bits = key.key_size();
            let of = self.at(at);
            (bits < LEAST_RSA_BITS).then(|| {
                format!("{of} has an RSA key of {bits} bits, and fewer than {LEAST_RSA_BITS} are not accepted")
            })
        })
    }

    fn weak_signature(&self) -> Option<String> {
        self.0.iter().enumerate().find_map(|(at, (_, it))| {
            let oid = it.signature_algorithm.algorithm.to_id_string();
            let (_, hash) = WEAK_SIGNATURES.iter().find(|(known, _)| *known == oid)?;
            Some(format!("{} is signed with {hash}, which is not accepted", self.at(at)))
        })
    }

    fn name_constraint(&self, name: &ServerName<'_>) -> String {
        let constrained =
            self.0.iter().skip(1).find(|(_, it)| {
                it.name_constraints().is_ok_and(|constraints| constraints.is_some())
            });
        let issuer = match (constrained, self.0.last()) {
            (Some((_, it)), _) => name_of(it.subject()),
            (None, Some((_, top))) => name_of(top.issuer()),
            (None, None) => String::new(),
        };
        format!(
            "the certificate's issuer `{issuer}` may not vouch for {} (name constraints)",
            name.to_str()
        )
    }

    /// One certificate of the path, in words.
    fn at(&self, at: usize) -> String {
        match self.0.get(at) {
            Some((_, it)) if at > 0 => {
                format!("the certificate of its issuer `{}`", name_of(it.subject()))
            }
            _ => "the certificate".to_owned(),
        }
    }
}

pub(super) fn is_self_issued(certificate: &X509Certificate<'_>) -> bool {
    is_issued_by(certificate, certificate)
}

fn is_issued_by(one: &X509Certificate<'_>, other: &X509Certificate<'_>) -> bool {
    one.issuer().as_raw() == other.subject().as_raw()
}

/// The issuer's name of a certificate, as it can be shown.
pub(super) fn issuer_of(der: &CertificateDer<'_>) -> String {
    let parsed = x509_parser::parse_x509_certificate(der);
    parsed.map(|(_, certificate)| name_of(certificate.issuer())).unwrap_or_default()
}

/// A common name, else an organisation, else that there is none.
pub(super) fn name_of(name: &X509Name<'_>) -> String {
    let mut parts = name.iter_common_name().chain(name.iter_organization());
    let name = quoted(parts.find_map(|part| part.as_str().ok()).unwrap_or_default(), MAX_NAME);
    if name.is_empty() { "(no name)".to_owned() } else { name }
}

fn host_names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = leaf.subject_alternative_name() else { return Vec::new() };
    let shown = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(quoted(name, MAX_NAME)),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let v6 = <[u8; 16]>::try_from(*bytes).map(IpAddr::from);
            v4.or(v6).ok().map(|address| address.to_string())
        }
        _ => None,
    };
    names.value.general_names.iter().filter_map(shown).collect()
}

/// A name for the file that an issuer's certificate is kept in.
fn file_name(issuer: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { ' ' };
    let plain: String = issuer.chars().map(plain).collect();
    let words: Vec<&str> = plain.split_whitespace().collect();
    if words.is_empty() { "company-ca".to_owned() } else { words.join("-") }
}

fn day(time: UnixTime) -> String {
    match OffsetDateTime::from_unix_timestamp(seconds(time)) {
        Ok(time) => time.date().to_string(),
        Err(_) => "a day beyond the calendar".to_owned(),
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// Characters of a name that are shown; RFC 5280 allows 64 (ub-common-name).
const MAX_NAME: usize = 64;

/// Names of a certificate that are shown: a line of a terminal.
const MOST_NAMES: usize = 3;

/// Shortest RSA key that the provider takes (rustls-webpki, `RSA_PKCS1_2048_8192_SHA256`).
pub(super) const LEAST_RSA_BITS: usize = 2048;

/// Algorithms that are worth nothing any more, by object identifier (RFC 3279 section 2.2, RFC 5758 section 3.2).
pub(super) const WEAK_SIGNATURES: [(&str, &str); 3] = [
    ("1.2.840.113549.1.1.4", "MD5"),
    ("1.2.840.113549.1.1.5", "SHA-1"),
    ("1.2.840.10045.4.1", "SHA-1"),
];

const FOREIGN_KEY: &str = "the certificate's key is not the one that the server has";
const OURS: &str = "the certificate was made by a valetkey, which is never trusted upstream";
const ASK: &str = "ask whoever runs the upstream for a good certificate";
const CLOCK: &str = "check this machine's clock; if it is right, ask whoever runs the upstream for a good certificate";
