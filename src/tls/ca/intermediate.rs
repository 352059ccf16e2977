//! The intermediate that signs leaves, and what all certificates made here have in common.

use std::ops::Range;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use super::names::Names;
use super::{CaError, Root};
use crate::tls::ORGANISATION;

/// What signs leaves, for a week at most.
#[derive(Debug)]
pub(in crate::tls) struct Intermediate {
    certificate: CertificateDer<'static>,
    params: CertificateParams,
    key: Zeroizing<KeyPair>,
    fresh: Range<OffsetDateTime>,
    not_after: OffsetDateTime,
}

impl Intermediate {
    /// Makes one that speaks for those of the names that its root permits.
    pub(super) fn under(
        root: &Root,
        root_key: &KeyPair,
        names: &Names,
        now: OffsetDateTime,
    ) -> Result<Self, CaError> {
        let not_after = root.not_after().min(now + LIFE);
        let common_name = format!("valetkey intermediate {}", random_hex()?);
        let mut params = authority(&common_name, now, not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.name_constraints = Some(names.intersection(root.constraints()).to_constraints());
        let key = Zeroizing::new(KeyPair::generate()?);
        let issuer = Issuer::from_ca_cert_der(root.der(), root_key)?;
        let certificate = params.signed_by(&*key, &issuer)?.into();
        let fresh = now..now + (not_after - now) / 2;
        Ok(Self { certificate, params, key, fresh, not_after })
    }

    /// Whether it is in the first half of its life, and not from the future of a clock set back.
    pub(super) fn is_fresh(&self, now: OffsetDateTime) -> bool {
        self.fresh.contains(&now)
    }

    /// Whether it can sign at all.
    pub(super) fn is_valid(&self, now: OffsetDateTime) -> bool {
        (self.fresh.start..self.not_after).contains(&now)
    }

    /// Nothing that it signs is valid longer.
    pub(in crate::tls) fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// Signs a certificate; gives the chain as a server sends it, without the root.
    pub(in crate::tls) fn sign(
        &self,
        leaf: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let issuer = Issuer::from_params(&self.params, &*self.key);
        Ok(vec![leaf.signed_by(key, &issuer)?.into(), self.certificate.clone()])
    }
}

/// What every certificate has: a random serial (RFC 5280 section 4.1.2.2), a validity that starts a day
/// early for clients whose clock is late, and its issuer's key identifier.
pub(in crate::tls) fn certificate(
    now: OffsetDateTime,
    not_after: OffsetDateTime,
) -> Result<CertificateParams, CaError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(CaError::signing)?;
    // Positive, and 16 octets whatever is drawn.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = now - BACKDATED;
    params.not_after = not_after;
    params.distinguished_name = DistinguishedName::new();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// What root and intermediate have in common.
pub(super) fn authority(
    common_name: &str,
    now: OffsetDateTime,
    not_after: OffsetDateTime,
) -> Result<CertificateParams, CaError> {
    let mut params = certificate(now, not_after)?;
    params.distinguished_name.push(DnType::OrganizationName, ORGANISATION);
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Tells one authority from another and says nothing of machine or user.
pub(super) fn random_hex() -> Result<String, CaError> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).map_err(CaError::signing)?;
    Ok(format!("{:08x}", u32::from_be_bytes(bytes)))
}

/// A week: what a stolen intermediate is worth at most.
pub(super) const LIFE: Duration = Duration::days(7);
/// How much later than ours a client's clock may be.
const BACKDATED: Duration = Duration::hours(24);
