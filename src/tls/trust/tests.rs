//! What upstreams may show, seen by both configurations.

use std::path::Path;
use std::process::Command;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use rustls::Error;
use time::Duration;
use time::macros::datetime;

use super::*;
use crate::clock::Clock;
use crate::tls::ca::{LocalCa, certificate};
use crate::tls::leaf::Leaves;
use crate::tls::tests::{host, server, shake, write};

/// A company's CA, as a TLS-inspecting proxy has it.
fn company(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let now = Clock::system().now();
    let mut params = certificate(now, now + Duration::days(1)).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn leaf_params(name: &str) -> CertificateParams {
    let now = Clock::system().now();
    let mut params = certificate(now, now + Duration::days(1)).unwrap();
    params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
    params
}

fn trust_in(mode: TrustMode, bundle: &Path) -> Result<UpstreamTrust, TrustError> {
    UpstreamTrust::load(&TrustSettings { mode, bundle: Some(bundle), own: &[] })
}

/// What is wrong with an upstream is refused on every leg, and said in words.
#[test]
fn bad_upstreams_are_refused_and_described() {
    let temp = tempfile::tempdir().unwrap();
    let (corp, other) = (company("Corp Root"), company("Oth\ner Root"));
    let bundle = write(temp.path(), "corp.pem", &[corp.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &bundle).unwrap();
    assert_eq!(trust.bundle(), [corp.der().clone()]);
    let (api, key) = (host("api.example"), KeyPair::generate().unwrap());
    let outcome = |chain: Vec<CertificateDer<'static>>| {
        let legs = [Alpn::Any, Alpn::Http1].map(|alpn| {
            let shaken = shake(&trust.client_config(alpn), &server(chain.clone(), &key), &api);
            shaken.map(drop).map_err(|error| describe_failure(&error).unwrap())
        });
        assert_eq!(legs[0], legs[1]);
        legs[0].clone()
    };
    let signed = |params: &CertificateParams, by: &CertifiedIssuer<'static, KeyPair>| {
        vec![params.signed_by(&key, by).unwrap().into()]
    };
    let good = leaf_params("api.example");
    let now = Clock::system().now();
    let (mut expired, mut early, mut client) = (good.clone(), good.clone(), good.clone());
    (expired.not_before, expired.not_after) =
        (now - Duration::days(9), datetime!(2024-02-29 0:00 UTC));
    expired.not_before = expired.not_after - Duration::days(9);
    early.not_before = datetime!(2099-01-01 0:00 UTC);
    early.not_after = early.not_before + Duration::days(1);
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];

    assert_eq!(outcome(signed(&good, &corp)), Ok(()));
    let table = [
        (signed(&expired, &corp), "the certificate expired on 2024-02-29"),
        (
            signed(&early, &corp),
            "the certificate is not valid before 2099-01-01 (is the clock right?)",
        ),
        (signed(&leaf_params("other.example"), &corp), "the certificate is for another name"),
        (signed(&client, &corp), "the certificate is not for servers"),
        (signed(&good, &other), "the certificate's issuer is not trusted: Other Root"),
        (
            [signed(&good, &other), vec![other.der().clone()]].concat(),
            "the certificate's issuer is not trusted: Other Root",
        ),
        (vec![good.self_signed(&key).unwrap().into()], "the certificate's issuer is not trusted"),
        (vec![CertificateDer::from(vec![0x30, 0])], "the certificate is malformed"),
    ];
    for (chain, expected) in table {
        assert_eq!(outcome(chain), Err(expected.to_owned()));
    }
    assert_eq!(describe_failure(&Error::HandshakeNotComplete), None);
}

/// What a valetkey signs is refused upstream, wherever its root lies.
#[test]
fn our_own_certificates_are_not_trusted() {
    let temp = tempfile::tempdir().unwrap();
    let (api, corp) = (host("api.example"), company("Corp Root"));
    let ca = LocalCa::ephemeral(std::slice::from_ref(&api), Clock::system()).unwrap();
    let ours = ca.roots()[0].clone();
    let leaves = Leaves::new(ca).unwrap();
    let bundle = write(temp.path(), "both.pem", &[ours.der().clone(), corp.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &bundle).unwrap();
    assert_eq!(trust.bundle(), [corp.der().clone()]);
    assert!(!trust.bundle_is_ours());
    let refused =
        shake(&trust.client_config(Alpn::Any), &leaves.server_config(&api).unwrap(), &api);
    let said = describe_failure(&refused.unwrap_err()).unwrap();
    assert!(said.contains("made by a valetkey"), "{said}");

    let only_ours = write(temp.path(), "ours.pem", &[ours.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &only_ours).unwrap();
    assert!(trust.bundle_is_ours() && trust.bundle().is_empty());
    assert!(matches!(trust_in(TrustMode::Bundle, &only_ours), Err(TrustError::Nothing)));

    // By its key alone, had the subject another organisation.
    let (_, parsed) = x509_parser::parse_x509_certificate(corp.der()).unwrap();
    let own = [Fingerprint::of(parsed.public_key().raw)];
    let settings =
        TrustSettings { mode: TrustMode::MozillaAndBundle, bundle: Some(&bundle), own: &own };
    assert!(UpstreamTrust::load(&settings).unwrap().bundle_is_ours());
}

#[test]
fn modes_choose_the_roots() {
    let temp = tempfile::tempdir().unwrap();
    let (api, corp, key) = (host("api.example"), company("Corp"), KeyPair::generate().unwrap());
    let bundle = write(temp.path(), "corp.pem", &[corp.der().clone()]);
    let chain = vec![leaf_params("api.example").signed_by(&key, &corp).unwrap().into()];
    let table = [
        (TrustMode::Bundle, true),
        (TrustMode::MozillaAndBundle, true),
        (TrustMode::SystemAndBundle, true),
        (TrustMode::System, false),
    ];
    for (mode, expected) in table {
        // A system without roots has none to trust alone.
        let Ok(trust) = trust_in(mode, &bundle) else {
            assert_eq!(mode, TrustMode::System);
            continue;
        };
        let config = trust.client_config(Alpn::Any);
        let shaken = shake(&config, &server(chain.clone(), &key), &api);
        assert_eq!(shaken.is_ok(), expected, "{mode:?}");
    }
}

/// A bundle that cannot be used is an error that names it.
#[test]
fn bad_bundles_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let good = pem::write_pem(&[company("Corp").der().clone()]);
    let bad = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n";
    let table = [
        ("empty.pem", Some(String::new()), "there is no certificate in it"),
        ("bad.pem", Some(format!("{good}{bad}")), "block 2 is not a well-formed X.509 certificate"),
        ("missing.pem", None, "No such file"),
        (".", None, "directory"),
    ];
    for (name, content, reason) in table {
        let path = temp.path().join(name);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let error = trust_in(TrustMode::SystemAndBundle, &path).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().contains(name) && why.contains(reason), "{error}: {why}");
        assert!(error.hint().is_some());
    }
    let noted = temp.path().join("noted.pem");
    let crl = bad.replace("CERTIFICATE", "X509 CRL");
    std::fs::write(&noted, format!("{good}{crl}")).unwrap();
    let trust = trust_in(TrustMode::Bundle, &noted).unwrap();
    assert_eq!(trust.notices().len(), 1);
    assert!(trust.notices()[0].contains("noted.pem: block 2 (X509 CRL)"));
}

/// The variables would take the system's place if the usual loader read it.
#[cfg(target_os = "linux")]
#[test]
fn no_variable_changes_the_system_roots() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tls::trust::tests::the_system_has_roots"])
        .env("SSL_CERT_FILE", "/dev/null")
        .env("SSL_CERT_DIR", "/nonexistent")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_system_has_roots() {
    if !Path::new("/etc/ssl/certs/ca-certificates.crt").exists() {
        return;
    }
    let settings = TrustSettings { mode: TrustMode::System, bundle: None, own: &[] };
    assert!(UpstreamTrust::load(&settings).unwrap().system().len() > 50);
}
