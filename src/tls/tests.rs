//! The whole room at work: chains that OpenSSL judges, handshakes between its two sides.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, Error, HandshakeKind, RootCertStore, ServerConfig,
    ServerConnection,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::Duration;

use super::ca::{LocalCa, Root, certificate};
use super::leaf::{Leaves, has_aes};
use super::{pem, provider};
use crate::clock::Clock;
use crate::origin::Host;

pub(super) fn host(name: &str) -> Host {
    Host::parse(name).unwrap()
}

fn long_name() -> String {
    let label = "a".repeat(63);
    let name = format!("{label}.{label}.{label}.{}.example", "b".repeat(53));
    assert_eq!(name.len(), 253);
    name
}

/// Lets both sides talk until the handshake is done and the client has its ticket.
pub(super) fn shake(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    host: &Host,
) -> Result<ClientConnection, Error> {
    let mut client = ClientConnection::new(client.clone(), host.server_name().unwrap())?;
    let mut server = ServerConnection::new(server.clone())?;
    for _ in 0..6 {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        // When the client refuses, its alert is the server's error; the client's own tells more.
        let _answer = server.process_new_packets();
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(client)
}

fn plain_client(roots: &[CertificateDer<'static>], alpn: &[&[u8]]) -> Arc<ClientConfig> {
    client_with(provider(), roots, alpn)
}

#[expect(clippy::disallowed_methods, reason = "a client as others build it, not an upstream leg")]
fn client_with(
    provider: Arc<CryptoProvider>,
    roots: &[CertificateDer<'static>],
    alpn: &[&[u8]],
) -> Arc<ClientConfig> {
    let mut store = RootCertStore::empty();
    assert_eq!(store.add_parsable_certificates(roots.to_vec()).1, 0);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

pub(super) fn server(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Arc<ServerConfig> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    server_with(chain, provider().key_provider.load_private_key(key).unwrap())
}

pub(super) fn server_with(
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
) -> Arc<ServerConfig> {
    let resolver = SingleCertAndKey::from(CertifiedKey::new(chain, key));
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    Arc::new(config)
}

/// The chain that a client is shown for a host.
fn presented(leaves: &Leaves, roots: &[Root], host: &Host) -> Vec<CertificateDer<'static>> {
    let roots: Vec<_> = roots.iter().map(|root| root.der().clone()).collect();
    let client =
        shake(&plain_client(&roots, &[]), &leaves.server_config(host).unwrap(), host).unwrap();
    client.peer_certificates().unwrap().iter().map(|der| der.clone().into_owned()).collect()
}

pub(super) fn write(dir: &Path, name: &str, certificates: &[CertificateDer<'static>]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, pem::write_pem(certificates)).unwrap();
    path
}

/// What `openssl verify -x509_strict` says of a leaf with its intermediates.
fn openssl_verify(root: &Root, chain: &[CertificateDer<'static>], host: &Host) -> String {
    let temp = tempfile::tempdir().unwrap();
    let (check, name) = match host {
        Host::Ip(address) => ("-verify_ip", address.to_string()),
        Host::Name(name) => ("-verify_hostname", name.to_string()),
    };
    let mut command = Command::new("openssl");
    command.args(["verify", "-x509_strict", "-no-CApath", "-no-CAstore"]);
    command.args(["-purpose", "sslserver", check, &name]);
    command.arg("-CAfile").arg(write(temp.path(), "root.pem", &[root.der().clone()]));
    if chain.len() > 1 {
        command.arg("-untrusted").arg(write(temp.path(), "untrusted.pem", &chain[1..]));
    }
    command.arg(write(temp.path(), "leaf.pem", &chain[..1]));
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8(text).unwrap()
}

#[test]
fn openssl_accepts_what_we_sign() {
    let long = long_name();
    let names = ["api.example.com", "127.0.0.1", "[2001:db8::1]", "xn--bcher-kva.example", &long];
    let sets = [names.to_vec(), vec!["127.0.0.1"], vec!["[2001:db8::1]"], vec!["api.example.com"]];
    for set in sets {
        let hosts: Vec<_> = set.iter().map(|name| host(name)).collect();
        let ca = LocalCa::ephemeral(&hosts, Clock::system()).unwrap();
        let roots = ca.roots().to_vec();
        let leaves = Leaves::new(ca).unwrap();
        for host in &hosts {
            let chain = presented(&leaves, &roots, host);
            assert_eq!(chain.len(), 2);
            let said = openssl_verify(&roots[0], &chain, host);
            assert!(said.ends_with("leaf.pem: OK\n"), "{host}: {said}");
        }
    }
}

#[test]
fn a_leaf_is_as_clients_want_it() {
    let ca = LocalCa::ephemeral(&[host("example.com")], Clock::system()).unwrap();
    let roots = ca.roots().to_vec();
    let leaves = Leaves::new(ca).unwrap();
    let chain = presented(&leaves, &roots, &host("api.example.com"));
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    let (_, intermediate) = x509_parser::parse_x509_certificate(&chain[1]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names.len(), 1);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert_eq!(usage.flags, 1, "digitalSignature only");
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && !purposes.client_auth && !purposes.any);
    assert_eq!(leaf.raw_serial().len(), 16);
    assert_eq!(leaf.issuer(), intermediate.subject());
    let now = Clock::system().now();
    let [from, to] = [leaf.validity().not_before, leaf.validity().not_after]
        .map(|at| (at.to_datetime() - now).whole_minutes());
    assert!((-1441..=-1439).contains(&from) && (1439..=1441).contains(&to), "{from} {to}");
    let constraints = intermediate.name_constraints().unwrap().unwrap();
    assert!(constraints.critical);
    let limits = intermediate.basic_constraints().unwrap().unwrap();
    assert!(limits.critical && limits.value.ca && limits.value.path_len_constraint == Some(0));
    let (_, root) = x509_parser::parse_x509_certificate(roots[0].der()).unwrap();
    assert_eq!(root.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(1));
    assert!(root.name_constraints().unwrap().unwrap().critical);
    assert!(root.key_usage().unwrap().unwrap().critical);
}

/// What a stolen key is worth.
#[test]
fn a_stolen_key_signs_for_no_other_host() {
    let names = ["example.com", "evil.example", "example.com.evil.example", "127.0.0.1", "[::1]"];
    for ruled in ["example.com", "127.0.0.1", "[::1]"] {
        let ruled = host(ruled);
        let temp = tempfile::tempdir().unwrap();
        let ca = LocalCa::open(temp.path(), std::slice::from_ref(&ruled), Clock::system()).unwrap();
        for host in names.map(host) {
            let (key, chains) = chains_by_a_thief(&ca, temp.path(), &ruled, &host);
            for chain in chains {
                let said = openssl_verify(&ca.roots()[0], &chain, &host);
                let client = plain_client(&[ca.roots()[0].der().clone()], &[]);
                let shaken = shake(&client, &server(chain, &key), &host);
                if host == ruled {
                    assert!(said.ends_with("OK\n") && shaken.is_ok(), "{host}: {said} {shaken:?}");
                } else {
                    assert!(said.contains("subtree violation"), "{host} by {ruled}: {said}");
                    assert!(shaken.is_err(), "{host} by {ruled}");
                }
            }
        }
    }
}

/// Leaves for a host: by the intermediate's key, by the root's, and by an intermediate without
/// constraints that the root's key signed.
fn chains_by_a_thief(
    ca: &LocalCa,
    dir: &Path,
    ruled: &Host,
    wanted: &Host,
) -> (KeyPair, [Vec<CertificateDer<'static>>; 3]) {
    let now = Clock::system().now();
    let key = KeyPair::generate().unwrap();
    let mut leaf = certificate(now, now + Duration::days(1)).unwrap();
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.subject_alt_names = vec![match wanted {
        Host::Ip(address) => SanType::IpAddress(*address),
        Host::Name(name) => SanType::DnsName(name.to_string().try_into().unwrap()),
    }];
    let mut files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let key_file = files.find(|path| path.extension().is_some_and(|end| end == "key")).unwrap();
    let root_key = KeyPair::from_pem(&std::fs::read_to_string(key_file).unwrap()).unwrap();
    let root = Issuer::from_ca_cert_der(ca.roots()[0].der(), root_key).unwrap();
    let mut free = certificate(now, now + Duration::days(1)).unwrap();
    free.distinguished_name.push(DnType::CommonName, "free");
    free.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    free.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let free = CertifiedIssuer::signed_by(free, KeyPair::generate().unwrap(), &root).unwrap();
    let chains = [
        ca.intermediate(ruled).unwrap().sign(&leaf, &key).unwrap(),
        vec![leaf.signed_by(&key, &root).unwrap().into()],
        vec![leaf.signed_by(&key, &free).unwrap().into(), free.der().clone()],
    ];
    (key, chains)
}

#[test]
fn clients_with_and_without_alpn_are_served_and_resume() {
    let (a, b) = (host("a.example"), host("b.example"));
    let ca = LocalCa::ephemeral(&[a.clone(), b.clone()], Clock::system()).unwrap();
    let roots = [ca.roots()[0].der().clone()];
    let leaves = Leaves::new(ca).unwrap();
    let table: [(&[&[u8]], &str); 4] = [
        (&[b"h2", b"http/1.1"], "h2"),
        (&[b"http/1.1"], "http/1.1"),
        (&[b"http/1.0", b"http/1.1"], "http/1.1"),
        (&[], ""),
    ];
    for (offered, expected) in table {
        let client = plain_client(&roots, offered);
        let first = shake(&client, &leaves.server_config(&a).unwrap(), &a).unwrap();
        assert_eq!(first.alpn_protocol().unwrap_or_default(), expected.as_bytes());
        assert_ne!(first.handshake_kind(), Some(HandshakeKind::Resumed));
        assert_eq!(first.tls13_tickets_received(), 1);
        let again = shake(&client, &leaves.server_config(&a).unwrap(), &a).unwrap();
        assert_eq!(again.handshake_kind(), Some(HandshakeKind::Resumed));
        let other = shake(&client, &leaves.server_config(&b).unwrap(), &b).unwrap();
        assert_ne!(other.handshake_kind(), Some(HandshakeKind::Resumed));
    }
    let refused =
        shake(&plain_client(&roots, &[b"spdy/3"]), &leaves.server_config(&a).unwrap(), &a);
    assert!(matches!(refused, Err(Error::AlertReceived(_))), "{refused:?}");
}

/// What costs least, of what the client has.
#[test]
fn aes_128_is_chosen_first_where_there_are_instructions_for_it() {
    use CipherSuite::*;
    #[cfg(target_os = "linux")]
    {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        assert_eq!(has_aes(), processor.split_whitespace().any(|flag| flag == "aes"));
    }
    let a = host("a.example");
    let ca = LocalCa::ephemeral(std::slice::from_ref(&a), Clock::system()).unwrap();
    let roots = [ca.roots()[0].der().clone()];
    let leaves = Leaves::new(ca).unwrap();
    let (small, large, other) =
        (TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256);
    let (small12, large12) =
        (TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384);
    let table: [(&[CipherSuite], CipherSuite); 6] = [
        (&[large, small, other], small),
        (&[other, large, small], small),
        (&[other, large], large),
        (&[other], other),
        (&[large12, small12], small12),
        (&[large12], large12),
    ];
    for (offered, expected) in table {
        let all = provider();
        let suite = |wanted: &CipherSuite| {
            *all.cipher_suites.iter().find(|it| it.suite() == *wanted).unwrap()
        };
        let cipher_suites = offered.iter().map(suite).collect();
        let offering = CryptoProvider { cipher_suites, ..CryptoProvider::clone(&all) };
        let client = client_with(Arc::new(offering), &roots, &[]);
        let shaken = shake(&client, &leaves.server_config(&a).unwrap(), &a).unwrap();
        let chosen = shaken.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(chosen, if has_aes() { expected } else { offered[0] }, "{offered:?}");
    }
}

#[test]
fn leaves_are_kept_for_half_their_life() {
    let (clock, a) = (Clock::system(), host("a.example"));
    let ca = LocalCa::ephemeral(std::slice::from_ref(&a), clock.clone()).unwrap();
    let leaves = Leaves::new(ca).unwrap();
    let first = leaves.server_config(&a).unwrap();
    clock.advance(Duration::hours(11));
    assert!(Arc::ptr_eq(&first, &leaves.server_config(&a).unwrap()));
    clock.advance(Duration::hours(2));
    let second = leaves.server_config(&a).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(Arc::ptr_eq(&first.ticketer, &second.ticketer));
    clock.advance(Duration::hours(-30));
    assert!(!Arc::ptr_eq(&second, &leaves.server_config(&a).unwrap()), "the clock was set back");
    assert!(leaves.permits(&host("sub.a.example")) && !leaves.permits(&host("b.example")));
    assert!(leaves.server_config(&host("b.example")).is_err());
}

#[test]
fn distinguished_names_say_nothing_of_the_machine() {
    let ca = LocalCa::ephemeral(&[host("a.example")], Clock::system()).unwrap();
    let (_, root) = x509_parser::parse_x509_certificate(ca.roots()[0].der()).unwrap();
    let subject = root.subject().to_string();
    let suffix = subject.strip_prefix("O=valetkey, CN=valetkey local CA ").unwrap();
    assert!(ca.roots()[0].path().is_none());
    assert!(suffix.len() == 8 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit()), "{subject}");
}
