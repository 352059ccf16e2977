//! Every defect has a sentence of its own, on both configurations.

use std::path::Path as FilePath;
use std::process::Command;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    Issuer, KeyPair, NameConstraints,
};
use rustls::{Error, ServerConfig};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;
use time::Duration;
use time::macros::datetime;

use super::super::tests::{company, leaf_params, trust_in};
use super::super::{Alpn, TrustMode, TrustSettings, UpstreamTrust, describe_failure};
use super::*;
use crate::clock::Clock;
use crate::tls::provider;
use crate::tls::tests::{host, server, shake, write};

type Chain = Vec<CertificateDer<'static>>;

/// What a trust says of a server, the same on both legs; `None` when it is accepted.
fn said(trust: &UpstreamTrust, server: &Arc<ServerConfig>) -> Option<Distrust> {
    let api = host("api.example");
    let [any, http1] = [Alpn::Any, Alpn::Http1].map(|alpn| {
        let shaken = shake(&trust.now().client_config(alpn), server, &api);
        shaken.err().map(|error| describe_failure(&error).unwrap())
    });
    assert_eq!(any, http1);
    any
}

/// A CA below another one.
fn below(
    above: &Issuer<'_, KeyPair>,
    name: &str,
    change: impl Fn(&mut CertificateParams),
) -> Below {
    let now = Clock::system().now();
    let mut params = crate::tls::ca::certificate(now, now + Duration::days(1)).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let der = params.signed_by(&key, above).unwrap().into();
    Below { der, issuer: Issuer::new(params, key) }
}

struct Below {
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

#[test]
fn each_defect_has_a_sentence() {
    let temp = tempfile::tempdir().unwrap();
    let (corp, other) = (company("Corp Root"), company("Oth\ner\u{202e} Root"));
    let bundle = write(temp.path(), "corp.pem", &[corp.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &bundle).unwrap();
    let key = KeyPair::generate().unwrap();
    let outcome = |chain: Chain| said(&trust, &server(chain, &key));
    let signed = |params: &CertificateParams,
                  by: &Issuer<'_, KeyPair>|
     -> CertificateDer<'static> { params.signed_by(&key, by).unwrap().into() };
    let good = leaf_params("api.example");
    let (mut expired, mut early, mut client) = (good.clone(), good.clone(), good.clone());
    expired.not_after = datetime!(2024-02-29 0:00 UTC);
    expired.not_before = expired.not_after - Duration::days(9);
    early.not_before = datetime!(2099-01-01 0:00 UTC);
    early.not_after = early.not_before + Duration::days(1);
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let mut many = leaf_params("a.example");
    many.subject_alt_names = ["a", "b", "c", "d"]
        .map(|it| format!("{it}.example").as_str().try_into().unwrap())
        .map(rcgen::SanType::DnsName)
        .into();

    let middle = below(&corp, "Corp Issuing", |_| ());
    let foreign = below(&other, "Other Issuing", |_| ());
    let old = below(&corp, "Old Issuing", |it| {
        (it.not_before, it.not_after) = (expired.not_before, expired.not_after);
    });
    let narrow = below(&corp, "Narrow Issuing", |it| {
        let permitted_subtrees = vec![GeneralSubtree::DnsName("else.example".to_owned())];
        it.name_constraints =
            Some(NameConstraints { permitted_subtrees, excluded_subtrees: vec![] });
    });
    let impostor = company("Corp Root");

    let leaf = |by: &Issuer<'_, KeyPair>| signed(&good, by);
    assert_eq!(outcome(vec![leaf(&corp)]), None);
    assert_eq!(outcome(vec![leaf(&middle.issuer), middle.der.clone()]), None);
    let under_other = leaf(&other);
    let by_foreign = leaf(&foreign.issuer);
    let by_middle = leaf(&middle.issuer);
    let alone: CertificateDer<'static> = good.self_signed(&key).unwrap().into();
    let table: [(Chain, String); 16] = [
        (vec![signed(&expired, &corp)], "the certificate expired on 2024-02-29".into()),
        (
            vec![leaf(&old.issuer), old.der.clone()],
            "the certificate of its issuer `Old Issuing` expired on 2024-02-29".into(),
        ),
        (vec![signed(&early, &corp)], "the certificate is not valid before 2099-01-01".into()),
        (
            vec![signed(&leaf_params("other.example"), &corp)],
            "the certificate is for other.example, and not for api.example".into(),
        ),
        (
            vec![signed(&many, &corp)],
            "the certificate is for a.example, b.example, c.example and 1 more, and not for api.example".into(),
        ),
        (
            vec![signed(&client, &corp)],
            "the certificate is not for servers (its extended key usage leaves them out)".into(),
        ),
        (
            vec![leaf(&narrow.issuer), narrow.der.clone()],
            "the certificate's issuer `Narrow Issuing` may not vouch for api.example (name constraints)".into(),
        ),
        (
            vec![leaf(&impostor)],
            "the certificate bears the name of `Corp Root` as its issuer, and a signature that is not of that \
             issuer's key as it is known here".into(),
        ),
        (
            vec![alone.clone()],
            format!("the certificate is self-signed by `(no name)`, which is not trusted (SHA-256 {})", openssl(&alone)),
        ),
        (
            vec![under_other.clone(), other.der().clone()],
            format!("the certificate leads to the root `Oth\u{fffd}er\u{fffd} Root`, which is not trusted (SHA-256 {})", openssl(other.der())),
        ),
        (
            vec![under_other.clone()],
            format!(
                "the certificate is issued by `Oth\u{fffd}er\u{fffd} Root`, whose own certificate is neither known nor sent: an \
                 intermediate is missing, or that is a root that is not trusted (SHA-256 of the server's own, \
                 `(no name)`: {})", openssl(&under_other)
            ),
        ),
        // What was sent beside it has nothing to do with it.
        (
            vec![by_middle.clone(), foreign.der.clone()],
            format!(
                "the certificate is issued by `Corp Issuing`, whose own certificate is neither known nor sent: an \
                 intermediate is missing, or that is a root that is not trusted (SHA-256 of the server's own, \
                 `(no name)`: {})", openssl(&by_middle)
            ),
        ),
        (
            vec![by_foreign.clone(), foreign.der.clone()],
            format!(
                "the certificate leads to `Oth\u{fffd}er\u{fffd} Root`, which is not trusted, and whose own certificate was not sent \
                 (SHA-256 of the last one sent, `Other Issuing`: {})", openssl(&foreign.der)
            ),
        ),
        (
            vec![by_foreign, foreign.der.clone(), other.der().clone()],
            format!("the certificate leads to the root `Oth\u{fffd}er\u{fffd} Root`, which is not trusted (SHA-256 {})", openssl(other.der())),
        ),
        (vec![CertificateDer::from(vec![0x30, 0])], "the certificate is malformed".into()),
        (vec![], "the server shows no certificate".into()),
    ];
    for (chain, expected) in table {
        let distrust = outcome(chain).unwrap();
        assert_eq!(distrust.to_string(), expected);
        let names_an_issuer = expected.contains("SHA-256");
        let is_a_matter_of_trust = names_an_issuer || expected.contains("bears the name");
        assert_eq!(is_a_matter_of_trust, distrust.hint().contains("corp.pem"), "{expected}");
        assert!(!distrust.hint().is_empty() && !expected.contains('\n'));
    }
    let other_key =
        said(&trust, &server(vec![leaf(&corp)], &KeyPair::generate().unwrap())).unwrap();
    assert_eq!(other_key.to_string(), "the certificate's key is not the one that the server has");
    assert_eq!(describe_failure(&Error::HandshakeNotComplete), None);
}

/// The fingerprint as OpenSSL shows it.
fn openssl(der: &CertificateDer<'_>) -> String {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("it.der");
    std::fs::write(&path, der).unwrap();
    let mut command = Command::new("openssl");
    command.args(["x509", "-inform", "DER", "-noout", "-fingerprint", "-sha256", "-in"]).arg(path);
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    output.trim().split_once('=').unwrap().1.to_owned()
}

/// Certificates that nobody should make any more, made by OpenSSL, which still can.
#[test]
fn weak_keys_and_signatures_are_named() {
    let table = [
        (
            "rsa:1024",
            "-sha256",
            "the certificate of its issuer `Old Root` has an RSA key of 1024 bits, and fewer than 2048 are not \
             accepted",
        ),
        ("rsa:2048", "-sha1", "the certificate is signed with SHA-1, which is not accepted"),
    ];
    for (ca_key, hash, expected) in table {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        run(
            dir,
            &[
                "req",
                "-x509",
                "-newkey",
                ca_key,
                "-nodes",
                "-keyout",
                "ca.key",
                "-out",
                "ca.pem",
                "-subj",
                "/CN=Old Root",
                "-sha256",
            ],
        );
        run(
            dir,
            &[
                "req",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                "leaf.key",
                "-out",
                "leaf.csr",
                "-subj",
                "/CN=Old Leaf",
            ],
        );
        std::fs::write(dir.join("ext"), "subjectAltName=DNS:api.example\n").unwrap();
        run(
            dir,
            &[
                "x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out",
                "leaf.pem", "-extfile", "ext", hash,
            ],
        );
        let chain =
            ["leaf.pem", "ca.pem"].map(|it| CertificateDer::from_pem_file(dir.join(it)).unwrap());
        let key = PrivateKeyDer::from_pem_file(dir.join("leaf.key")).unwrap();
        let key = provider().key_provider.load_private_key(key).unwrap();
        // A server's own key is first used in the handshake, and rustls plays no server with a short one.
        let short =
            Distrust::of_key(&Error::HandshakeNotComplete, &chain[1]).map(|it| it.to_string());
        let expected_of_key =
            "the certificate has an RSA key of 1024 bits, and fewer than 2048 are not accepted";
        assert_eq!(short.as_deref(), (ca_key == "rsa:1024").then_some(expected_of_key));
        let trust = trust_in(TrustMode::SystemAndBundle, &dir.join("ca.pem")).unwrap();
        let server = crate::tls::tests::server_with(chain.into(), key);
        assert_eq!(said(&trust, &server).unwrap().to_string(), expected);
    }
}

/// `openssl req -x509` makes a CA's certificate, which is told like any other that is self-signed: it may be added.
#[test]
fn a_self_signed_certificate_by_openssl_may_be_added() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    run(
        dir,
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "it.key",
            "-out",
            "it.pem",
            "-subj",
            "/CN=Alone",
            "-addext",
            "subjectAltName=DNS:api.example",
        ],
    );
    let alone = CertificateDer::from_pem_file(dir.join("it.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join("it.key")).unwrap();
    let key = provider().key_provider.load_private_key(key).unwrap();
    let server = crate::tls::tests::server_with(vec![alone.clone()], key);
    let corp = company("Corp Root");
    let bundle = write(dir, "corp.pem", &[corp.der().clone()]);
    let trust = trust_in(TrustMode::SystemAndBundle, &bundle).unwrap();
    let distrust = said(&trust, &server).unwrap();
    let expected = format!(
        "the certificate is self-signed by `Alone`, which is not trusted (SHA-256 {})",
        openssl(&alone)
    );
    assert_eq!(distrust.to_string(), expected);
    let append = format!("append its certificate as PEM to the bundle {}", bundle.display());
    assert!(distrust.hint().contains(&append), "{}", distrust.hint());
    write(dir, "corp.pem", &[corp.der().clone(), alone]);
    assert!(trust.reload().unwrap());
    assert_eq!(said(&trust, &server), None);
}

fn run(dir: &FilePath, arguments: &[&str]) {
    let output = Command::new("openssl").args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The line that would add the issuer fits the settings in force.
#[test]
fn the_hint_is_the_line_that_would_add_it() {
    let temp = tempfile::tempdir().unwrap();
    let (corp, other) = (company("Corp Root"), company("Oth\ner Root, Inc."));
    let bundle = write(temp.path(), "corp.pem", &[corp.der().clone()]);
    let key = KeyPair::generate().unwrap();
    let chain: Chain = vec![
        leaf_params("api.example").signed_by(&key, &other).unwrap().into(),
        other.der().clone(),
    ];
    let append = format!("append its certificate as PEM to the bundle {}", bundle.display());
    let table = [
        (
            TrustMode::MozillaAndBundle,
            None,
            "under [upstream] of the configuration: ca_bundle = \"/path/to/oth-er-root-inc.pem\"",
        ),
        (TrustMode::MozillaAndBundle, Some(bundle.clone()), append.as_str()),
        (
            TrustMode::System,
            Some(bundle),
            "set upstream.trust = \"system+bundle\" and upstream.ca_bundle",
        ),
    ];
    for (mode, bundle, expected) in table {
        let settings = TrustSettings { mode, bundle, own: vec![] };
        let Ok(trust) = UpstreamTrust::load(settings) else {
            // A system without roots has none to trust alone.
            assert_eq!(mode, TrustMode::System);
            continue;
        };
        let distrust = said(&trust, &server(chain.clone(), &key)).unwrap();
        assert!(distrust.hint().contains(expected), "{mode:?}: {}", distrust.hint());
        assert!(distrust.to_string().contains("`Oth\u{fffd}er Root, Inc.`"), "{distrust}");
    }
}
