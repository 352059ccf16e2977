//! What upstreams may show, seen by both configurations.

use std::path::Path;
use std::process::Command;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::Duration;

use super::*;
use crate::clock::Clock;
use crate::tls::ca::{LocalCa, certificate};
use crate::tls::leaf::Leaves;
use crate::tls::pem;
use crate::tls::tests::{host, server, shake, write};

/// A company's CA, as a TLS-inspecting proxy has it.
pub(super) fn company(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let now = Clock::system().now();
    let mut params = certificate(now, now + Duration::days(1)).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

pub(super) fn leaf_params(name: &str) -> CertificateParams {
    let now = Clock::system().now();
    let mut params = certificate(now, now + Duration::days(1)).unwrap();
    params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
    params
}

pub(super) fn trust_in(mode: TrustMode, bundle: &Path) -> Result<UpstreamTrust, TrustError> {
    UpstreamTrust::load(TrustSettings { mode, bundle: Some(bundle.into()), own: vec![] })
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
    assert_eq!(trust.now().bundle(), [corp.der().clone()]);
    assert!(!trust.now().bundle_is_ours());
    let refused =
        shake(&trust.now().client_config(Alpn::Any), &leaves.server_config(&api).unwrap(), &api);
    let said = describe_failure(&refused.unwrap_err()).unwrap().to_string();
    assert!(said.contains("made by a valetkey"), "{said}");

    let only_ours = write(temp.path(), "ours.pem", &[ours.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &only_ours).unwrap();
    assert!(trust.now().bundle_is_ours() && trust.now().bundle().is_empty());
    assert!(matches!(trust_in(TrustMode::Bundle, &only_ours), Err(TrustError::Nothing)));

    // By its key alone, had the subject another organisation.
    let (_, parsed) = x509_parser::parse_x509_certificate(corp.der()).unwrap();
    let own = vec![Fingerprint::of(parsed.public_key().raw)];
    let settings = TrustSettings { mode: TrustMode::MozillaAndBundle, bundle: Some(bundle), own };
    assert!(UpstreamTrust::load(settings).unwrap().now().bundle_is_ours());
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
        let config = trust.now().client_config(Alpn::Any);
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
        ("folder", None, "there is no certificate in it"),
    ];
    std::fs::create_dir(temp.path().join("folder")).unwrap();
    std::fs::write(temp.path().join("folder/README"), &good).unwrap();
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
    assert_eq!(trust.now().notices().len(), 1);
    assert!(trust.now().notices()[0].contains("noted.pem: block 2 (X509 CRL)"));
}

/// The shapes in which companies hand out their roots, as they lie in `certs/`.
#[test]
fn the_samples() {
    let table: [(&str, usize, &[&str]); 11] = [
        ("several-with-text.pem", 2, &[]),
        ("trusted-certificate.pem", 1, &[]),
        ("rejected-for-servers.pem", 1, &["block 2 is marked as not trusted for servers"]),
        ("x509-certificate.pem", 1, &[]),
        ("crlf-with-bom.pem", 2, &[]),
        ("with-crl-and-key.pem", 1, &["block 1 (X509 CRL)", "block 2 (PUBLIC KEY)"]),
        ("root.der", 1, &[]),
        ("proxy.crt", 1, &[]),
        ("utf-16.pem", 1, &[]),
        // A certificate, another one in DER form, a hashed link to the first, and a text.
        ("directory", 2, &[]),
        ("sha-1.pem", 1, &[]),
    ];
    for (name, certificates, notices) in table {
        let trust = trust_in(TrustMode::Bundle, &sample(name)).expect(name);
        assert_eq!(trust.now().bundle().len(), certificates, "{name}");
        assert_eq!(trust.now().notices().len(), notices.len(), "{:?}", trust.now().notices());
        for (notice, expected) in trust.now().notices().iter().zip(notices) {
            assert!(notice.contains(name) && notice.contains(expected), "{notice}");
        }
    }
    let broken = [
        ("empty.pem", "there is no certificate in it"),
        ("no-certificate.pem", "there is no certificate in it"),
        ("only-a-crl.pem", "there is no certificate in it"),
        ("bad-base64.pem", "block 2 is not valid base64"),
        ("cut-off.pem", "block 2 has no END line"),
        ("lines-missing.pem", "block 2 is not a well-formed X.509 certificate"),
        ("cut-off.der", "block 1 is not a well-formed X.509 certificate"),
        ("pkcs7.p7b", "it is a PKCS #7 file"),
        ("pkcs12.p12", "it is a PKCS #12 file"),
    ];
    for (name, reason) in broken {
        let error = trust_in(TrustMode::Bundle, &sample("broken").join(name)).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().contains(name) && why.contains(reason), "{error}: {why}");
        assert!(error.hint().is_some());
    }
    // In a folder it is the file that is named, not the folder.
    let error = trust_in(TrustMode::Bundle, &sample("broken")).unwrap_err();
    assert!(error.to_string().contains("broken/bad-base64.pem"), "{error}");
}

#[test]
fn what_a_folder_names_and_has_not_is_told() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::copy(sample("proxy.crt"), temp.path().join("one.pem")).unwrap();
    std::os::unix::fs::symlink("/nowhere", temp.path().join("corp.pem")).unwrap();
    let roots = trust_in(TrustMode::Bundle, temp.path()).unwrap().now();
    assert_eq!(roots.bundle().len(), 1);
    assert_eq!(roots.notices().len(), 1);
    assert!(roots.notices()[0].contains("corp.pem: it is no file"), "{:?}", roots.notices());
}

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("certs").join(name)
}

#[test]
fn roots_that_are_trusted_in_vain() {
    let table = [
        ("rsa-1024.pem", Some("Example Corp Old CA (1024 bits) has an RSA key of 1024 bits")),
        ("sha-1.pem", Some("Example Corp Legacy CA (SHA-1) is signed with SHA-1")),
        ("root.der", None),
        ("proxy.crt", None),
    ];
    for (name, expected) in table {
        let trust = trust_in(TrustMode::Bundle, &sample(name)).unwrap();
        let said = weakness(&trust.now().bundle()[0]).map(|weakness| weakness.to_string());
        let is_right = match (&said, expected) {
            (Some(said), Some(expected)) => said.starts_with(expected),
            (said, expected) => said.is_none() && expected.is_none(),
        };
        assert!(is_right, "{name}: {said:?}");
    }
}

/// What OpenSSL would not take for a CA vouches for nobody, though it is in the bundle.
#[test]
fn what_is_no_ca_vouches_for_nobody() {
    let temp = tempfile::tempdir().unwrap();
    let (api, corp) = (host("api.example"), company("Corp Root"));
    type Change = fn(&mut CertificateParams);
    let table: [(&str, Change); 5] = [
        ("is no CA's certificate", |it| it.is_ca = IsCa::ExplicitNoCa),
        ("is no CA's certificate", |it| it.is_ca = IsCa::NoCa),
        ("expired on ", |it| {
            it.not_after = Clock::system().now() - Duration::days(1);
            it.not_before = it.not_after - Duration::days(9);
        }),
        ("is not for servers", |it| {
            it.extended_key_usages = vec![ExtendedKeyUsagePurpose::EmailProtection];
        }),
        ("may not sign certificates", |it| it.key_usages = vec![KeyUsagePurpose::CrlSign]),
    ];
    for (why, change) in table {
        let (signer_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = leaf_params("intranet.example");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "Intranet");
        change(&mut params);
        let signer = params.signed_by(&signer_key, &corp).unwrap();
        let by = Issuer::new(params, signer_key);
        let chain = vec![leaf_params("api.example").signed_by(&key, &by).unwrap().into()];
        let path = write(temp.path(), "corp.pem", &[corp.der().clone(), signer.der().clone()]);
        let roots = trust_in(TrustMode::Bundle, &path).unwrap().now();
        let shaken = shake(&roots.client_config(Alpn::Any), &server(chain, &key), &api);
        assert!(shaken.is_err(), "{why}");
        let named = format!("{}: ", path.display());
        assert!(
            roots.notices()[0].starts_with(&named) && roots.notices()[0].contains(why),
            "{:?}",
            roots.notices()
        );
    }
}

#[test]
fn what_the_system_has_too_is_left_out_in_silence() {
    let expired = {
        let mut params = leaf_params("old.example");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = Clock::system().now() - Duration::days(1);
        params.not_before = params.not_after - Duration::days(9);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    };
    let bundle = [expired.clone()];
    let told = |system: &[_]| fit::notices(&bundle, system, Clock::system().now()).count();
    assert_eq!((told(&[]), told(&[expired])), (1, 0));
}

/// What the hint says to add: a self-signed certificate in the bundle counts for its server, and for no other.
#[test]
fn a_self_signed_certificate_stands_for_itself() {
    let temp = tempfile::tempdir().unwrap();
    for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = leaf_params("api.example");
        params.is_ca = is_ca;
        params.distinguished_name.push(DnType::CommonName, "Alone");
        let alone: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
        let path = write(temp.path(), "alone.pem", std::slice::from_ref(&alone));
        let config = trust_in(TrustMode::Bundle, &path).unwrap().now().client_config(Alpn::Any);
        let outcome = |chain: &CertificateDer<'static>, key: &KeyPair, name: &str| {
            shake(&config, &server(vec![chain.clone()], key), &host(name)).is_ok()
        };
        assert!(outcome(&alone, &key, "api.example"), "{is_ca:?}");
        assert!(!outcome(&alone, &key, "other.example"), "{is_ca:?}");
        assert!(!outcome(&alone, &other, "api.example"), "without its key, {is_ca:?}");
        if matches!(is_ca, IsCa::Ca(_)) {
            continue;
        }
        let by = Issuer::new(params, key);
        let below = leaf_params("api.example").signed_by(&other, &by).unwrap().into();
        assert!(!outcome(&below, &other, "api.example"), "{is_ca:?}");
    }
}

/// A changed bundle counts at the next handshake; a broken one leaves the old in force.
#[test]
fn a_bundle_is_read_again() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (company("Old Root"), company("New Root"));
    let (api, key) = (host("api.example"), KeyPair::generate().unwrap());
    let bundle = write(temp.path(), "corp.pem", &[old.der().clone()]);
    let trust = trust_in(TrustMode::Bundle, &bundle).unwrap();
    let trusts = |by: &CertifiedIssuer<'static, KeyPair>| {
        let chain = vec![leaf_params("api.example").signed_by(&key, by).unwrap().into()];
        shake(&trust.now().client_config(Alpn::Any), &server(chain, &key), &api).is_ok()
    };
    assert!(trusts(&old) && !trusts(&new));
    assert!(!trust.reload().unwrap(), "nothing has changed");
    assert_eq!(trust.version(), 0);

    write(temp.path(), "corp.pem", &[new.der().clone()]);
    assert!(!trusts(&new), "not before it is read again");
    assert!(trust.reload().unwrap());
    assert!(trusts(&new) && !trusts(&old));
    assert_eq!(trust.version(), 1);

    std::fs::write(&bundle, "half a file").unwrap();
    assert!(trust.reload().is_err());
    assert!(trusts(&new) && !trusts(&old));
    assert_eq!(trust.version(), 1);
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
    let settings = TrustSettings { mode: TrustMode::System, bundle: None, own: vec![] };
    assert!(UpstreamTrust::load(settings).unwrap().now().system().len() > 50);
}
