//! The right key to the right door: the cross product of every name that a client gives its destination.

use std::sync::Arc;

use http::header::{HOST, HeaderValue};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use valetkey::sandbox::client;

use super::support::{KEY, Scene, within};

/// Spellings of a CONNECT target, with the ruled host that they mean.
const TARGETS: [(&str, Option<&str>); 17] = [
    ("chatgpt.com:443", Some("chatgpt.com")),
    ("ChatGPT.Com:443", Some("chatgpt.com")),
    ("chatgpt.com.:443", Some("chatgpt.com")),
    ("api.example.com:443", Some("api.example.com")),
    ("API.EXAMPLE.COM.:443", Some("api.example.com")),
    ("other.example.com:443", None),
    ("chatgpt.com:8443", None),
    ("chatgpt.com:80", None),
    ("chatgpt.com.evil.example:443", None),
    ("evilchatgpt.com:443", None),
    ("127.0.0.1:443", None),
    ("[::1]:443", None),
    ("user@chatgpt.com:443", None),
    ("chatgpt%2ecom:443", None),
    ("chatgpt.com", None),
    ("chatgpt.com..:443", None),
    ("xn--chatgpt-9za.com:443", None),
];

/// Names in the TLS greeting; `None` greets without one.
const GREETINGS: [Option<&str>; 5] = [
    None,
    Some("chatgpt.com"),
    Some("api.example.com"),
    Some("other.example.com"),
    Some("chatgpt.com.evil.example"),
];

/// Heads of a request, in which `{}` is the host that is meant rightly, with whether they all mean it.
fn heads() -> Vec<(String, bool)> {
    let mut heads: Vec<(String, bool)> = Vec::new();
    for right in ["{}", "{UPPER}", "{}:443", "{}.", "{}.:443"] {
        heads.push((format!("GET PATH HTTP/1.1\r\nHost: {right}\r\n"), true));
        heads.push((format!("GET https://{right}PATH HTTP/1.1\r\nHost: {{}}\r\n"), true));
    }
    let long = "x".repeat(300);
    let wrong = [
        "",
        "other.example.com",
        "OTHER",
        "{}:80",
        "{}:8443",
        "{}.evil.example",
        "evil{}",
        "user@{}",
        "{}@evil.example",
        "127.0.0.1",
        "[::1]",
        "{}, {}",
        "{} ",
        "a.{}",
        "{}%00",
        "{}..",
        "{}:0443x",
        "{}\u{3002}",
        &long,
    ];
    for wrong in wrong {
        let is_blank = wrong.trim() == "{}";
        heads.push((format!("GET PATH HTTP/1.1\r\nHost: {wrong}\r\n"), is_blank));
        if !wrong.is_empty() && !is_blank {
            heads.push((format!("GET https://{wrong}PATH HTTP/1.1\r\nHost: {{}}\r\n"), false));
        }
    }
    heads.push(("GET PATH HTTP/1.1\r\nHost: {}\r\nHost: other.example.com\r\n".into(), false));
    heads.push(("GET PATH HTTP/1.1\r\nHost: other.example.com\r\nHost: {}\r\n".into(), false));
    heads.push(("GET PATH HTTP/1.1\r\nHost: {}\r\nHost: {}\r\n".into(), false));
    heads.push(("GET PATH HTTP/1.1\r\n".into(), false));
    heads.push(("GET http://{}PATH HTTP/1.1\r\nHost: {}\r\n".into(), false));
    heads
}

fn path_of(host: &str) -> &'static str {
    if host == "api.example.com" { "/v1/x" } else { "/backend-api/codex/x" }
}

/// A client that believes every certificate: an attacker's.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let provider = valetkey::tls::provider();
        verify_tls12_signature(message, cert, dss, &provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let provider = valetkey::tls::provider();
        verify_tls13_signature(message, cert, dss, &provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        valetkey::tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

#[expect(clippy::disallowed_methods, reason = "the test plays an attacker")]
fn gullible(alpn: &[&[u8]], greets: bool) -> TlsConnector {
    let mut config = ClientConfig::builder_with_provider(valetkey::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = greets;
    TlsConnector::from(Arc::new(config))
}

/// Opens a tunnel as it is spelled, and greets in it; `None` when either is refused.
async fn visit(
    scene: &Scene,
    target: &str,
    greeting: Option<&str>,
    alpn: &[&[u8]],
) -> Option<TlsStream<TcpStream>> {
    let mut stream = connect(scene).await;
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    if status_of(&mut stream).await? != 200 {
        return None;
    }
    let name = ServerName::try_from(greeting.unwrap_or("no.name").to_owned()).unwrap();
    gullible(alpn, greeting.is_some()).connect(name, stream).await.ok()
}

#[expect(clippy::disallowed_methods, reason = "the test plays an attacker")]
async fn connect(scene: &Scene) -> TcpStream {
    let stream = TcpStream::connect(scene.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Reads one head, and gives its status; `None` when the connection ends before that.
async fn status_of(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<u16> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8_lossy(&head).split_whitespace().nth(1)?.parse().ok()
}

/// How many requests arrived with the credential of their own host; one with another's fails the test.
fn arrivals(scene: &Scene, what: &str) -> usize {
    let tokens = scene.world.secrets();
    let mut rightly = 0;
    for seen in scene.world.api().seen() {
        for value in seen.headers.values() {
            let value = String::from_utf8_lossy(value.as_bytes());
            if tokens.iter().any(|token| value.contains(token) && token != KEY) {
                assert_eq!(seen.host, "chatgpt.com", "{what}");
                rightly += 1;
            }
            if value.contains(KEY) {
                assert_eq!(seen.host, "api.example.com", "{what}");
                rightly += 1;
            }
        }
    }
    scene.world.api().clear();
    rightly
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http1() {
    let scene = Scene::usual().await;
    let (mut rows, mut right) = (0, 0);
    for (target, ruled) in TARGETS {
        for greeting in GREETINGS {
            // What has no tunnel to a ruled host behaves alike whatever is sent in it.
            let most = if ruled.is_some() { usize::MAX } else { 1 };
            for (head, names_agree) in heads().into_iter().take(most) {
                let meant = ruled.unwrap_or("chatgpt.com");
                let request = head
                    .replace("{UPPER}", &meant.to_uppercase())
                    .replace("{}", meant)
                    .replace("PATH", path_of(meant))
                    + "Connection: close\r\n\r\n";
                let what = format!("CONNECT {target}, SNI {greeting:?}, {request:?}");
                rows += 1;
                let status = within(async {
                    let mut tls = visit(&scene, target, greeting, &[]).await?;
                    tls.write_all(request.as_bytes()).await.ok()?;
                    status_of(&mut tls).await
                });
                let status = status.await;
                let greeted_rightly = greeting.is_none_or(|name| Some(name) == ruled);
                let is_right = ruled.is_some() && greeted_rightly && names_agree;
                assert_eq!(arrivals(&scene, &what), usize::from(is_right), "{what}");
                right += usize::from(is_right);
                match (ruled, is_right) {
                    (_, true) => assert_eq!(status, Some(200), "{what}"),
                    (Some(_), false) => assert!(
                        status.is_none_or(|status| [400, 421].contains(&status)),
                        "{what}: {status:?}"
                    ),
                    (None, false) => {}
                }
            }
        }
    }
    println!("{rows} rows, {right} of them right");
    assert!(rows >= 1000, "{rows} rows");
    assert!(right >= 100, "{right} right rows");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http2() {
    let scene = Scene::usual().await;
    let authorities = [
        ("{}", true),
        ("{UPPER}", true),
        ("{}:443", true),
        ("{}.", true),
        ("other.example.com", false),
        ("{}:80", false),
        ("{}.evil.example", false),
        ("evil{}", false),
        ("user@{}", false),
        ("127.0.0.1", false),
        ("[::1]", false),
        ("a.{}", false),
    ];
    let hosts = [
        (None, true),
        (Some("{}"), true),
        (Some("{UPPER}:443"), true),
        (Some("other.example.com"), false),
        (Some(""), false),
        (Some("{}, {}"), false),
        (Some("{}:80"), false),
    ];
    let (mut rows, mut right) = (0, 0);
    for (target, ruled) in TARGETS.into_iter().filter(|(_, ruled)| ruled.is_some()) {
        let meant = ruled.unwrap();
        let spell =
            |text: &str| text.replace("{UPPER}", &meant.to_uppercase()).replace("{}", meant);
        for greeting in GREETINGS {
            let greeted_rightly = greeting.is_none_or(|name| Some(name) == ruled);
            let Some(tls) = within(visit(&scene, target, greeting, client::HTTP2)).await else {
                assert!(!greeted_rightly, "CONNECT {target}, SNI {greeting:?}");
                continue;
            };
            let io = hyper_util::rt::TokioIo::new(tls);
            let tasks = valetkey::tasks::Tasks::new();
            let (sender, driver) =
                hyper::client::conn::http2::handshake(tasks.clone(), io).await.unwrap();
            tasks.spawn(driver);
            for (authority, authority_agrees) in authorities {
                for (host, host_agrees) in hosts {
                    let (authority, host) = (spell(authority), host.map(spell));
                    let what =
                        format!("CONNECT {target}, SNI {greeting:?}, {authority}, Host {host:?}");
                    rows += 1;
                    let mut request = client::get("/");
                    let uri = format!("https://{authority}{}", path_of(meant));
                    *request.uri_mut() = uri.parse().unwrap();
                    if let Some(host) = &host {
                        request.headers_mut().insert(HOST, HeaderValue::from_str(host).unwrap());
                    }
                    let answer = within(sender.clone().send_request(request)).await;
                    let status = answer.as_ref().ok().map(|answer| answer.status().as_u16());
                    let is_right = greeted_rightly && authority_agrees && host_agrees;
                    assert_eq!(arrivals(&scene, &what), usize::from(is_right), "{what}");
                    right += usize::from(is_right);
                    let expected = if is_right { &[200][..] } else { &[400, 421] };
                    assert!(status.is_none_or(|it| expected.contains(&it)), "{what}: {status:?}");
                    assert!(!is_right || status.is_some(), "{what}");
                }
            }
        }
    }
    println!("{rows} rows, {right} of them right");
    assert!(rows >= 1000, "{rows} rows");
    assert!(right >= 100, "{right} right rows");
}
