//! Finds certificates that vouch for no server: rustls takes a trust anchor for its name and key alone.

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;

use super::distrust::{is_self_issued, name_of};

/// Why a certificate is no root, as OpenSSL's `X509_check_ca` and its purpose of servers judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It is no CA's; self-issued, it may stand for itself, as a server's own.
    NotACa { is_self_issued: bool },
    /// Whatever else it is; completes "Corp Root …".
    Otherwise(String),
}

/// What keeps this certificate from vouching for servers, if anything does.
pub(super) fn unfitness(der: &CertificateDer<'_>, now: OffsetDateTime) -> Option<Unfit> {
    let Ok((_, it)) = x509_parser::parse_x509_certificate(der) else {
        return Some(Unfit::Otherwise("is malformed".to_owned()));
    };
    let (Ok(constraints), Ok(usage), Ok(purposes)) =
        (it.basic_constraints(), it.key_usage(), it.extended_key_usage())
    else {
        return Some(Unfit::Otherwise("has malformed extensions".to_owned()));
    };
    let signs = usage.as_ref().map(|usage| usage.value.key_cert_sign());
    let is_ca = match constraints {
        Some(constraints) => constraints.value.ca,
        // Roots older than the extension: of version 1, or with the usage alone.
        None => signs == Some(true) || (it.version().0 == 0 && is_self_issued(&it)),
    };
    if !is_ca {
        return Some(Unfit::NotACa { is_self_issued: is_self_issued(&it) });
    }
    if signs == Some(false) {
        return Some(Unfit::Otherwise("may not sign certificates (key usage)".to_owned()));
    }
    if purposes.is_some_and(|purposes| !purposes.value.server_auth && !purposes.value.any) {
        return Some(Unfit::Otherwise("is not for servers (extended key usage)".to_owned()));
    }
    expired(&it, now)
}

fn expired(certificate: &X509Certificate<'_>, now: OffsetDateTime) -> Option<Unfit> {
    let not_after = certificate.validity().not_after.to_datetime();
    (not_after < now).then(|| Unfit::Otherwise(format!("expired on {}", not_after.date())))
}

/// What to tell of the certificates that are in the bundle in vain. Nothing of those that the system has too: a bundle
/// may hold the whole list of public CAs, in which one has always just expired.
pub(super) fn notices<'a>(
    bundle: &'a [CertificateDer<'_>],
    system: &'a [CertificateDer<'_>],
    now: OffsetDateTime,
) -> impl Iterator<Item = String> {
    let own = bundle.iter().filter(|der| !system.contains(der));
    own.filter_map(move |der| notice(der, now))
}

/// Nothing of a server's own certificate, which counts for itself.
fn notice(der: &CertificateDer<'_>, now: OffsetDateTime) -> Option<String> {
    let why = match unfitness(der, now)? {
        Unfit::NotACa { is_self_issued: true } => return None,
        Unfit::NotACa { is_self_issued: false } => "is no CA's certificate".to_owned(),
        Unfit::Otherwise(why) => why,
    };
    let parsed = x509_parser::parse_x509_certificate(der).ok();
    let name = parsed.map(|(_, it)| name_of(it.subject())).unwrap_or_default();
    Some(format!("{name} {why} and was left out of the roots"))
}
