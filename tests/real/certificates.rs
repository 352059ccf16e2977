//! Certificates as badssl.com has them: refused on every leg before a byte is sent, each with its own sentence.

use valetkey::sandbox::client::{HTTP1, HTTP2};
use valetkey::sandbox::{CompanyKind, Defect, ISSUER_HOST, Settings};

use super::served::{Served, refusal, told};
use super::support::{Done, Scene, done};

const API: &str = "api.example.com";

/// What is said of a certificate for this host.
pub(crate) fn sentence(defect: Defect, host: &str) -> String {
    match defect {
        Defect::Expired => "the certificate expired on ".to_owned(),
        Defect::NotYetValid => "the certificate is not valid before ".to_owned(),
        Defect::WrongName => {
            format!("the certificate is for somebody-else.example, and not for {host} ")
        }
        Defect::SelfSigned => {
            "the certificate is self-signed by `Sandbox Leaf`, which is not trusted (SHA-256 ".to_owned()
        }
        Defect::UnknownRoot => {
            "the certificate leads to the root `Unknown Root`, which is not trusted (SHA-256 ".to_owned()
        }
        Defect::NoIntermediate => {
            "the certificate is issued by `Sandbox Intermediate`, whose own certificate is neither known nor sent"
                .to_owned()
        }
        Defect::WrongEku => "the certificate is not for servers".to_owned(),
        Defect::NameConstraint => format!(
            "the certificate's issuer `Narrow Intermediate` may not vouch for {host} (name constraints)"
        ),
    }
}

/// It is said what is wrong with the certificate of that host, and nothing else.
#[track_caller]
fn assert_says(words: &str, defect: Defect, host: &str, leg: &str) {
    for other in Defect::ALL {
        let is_said = words.contains(&sentence(other, host));
        assert_eq!(is_said, other == defect, "{leg}, {defect:?}, {other:?}: {words}");
    }
    assert!(words.contains(host), "{leg}, {defect:?}: {words}");
}

/// What a person can do: add the issuer, where that is what is wrong.
#[track_caller]
fn assert_hints(scene: &Scene, hint: &str, defect: Defect) {
    let bundle = scene.world.ca_file().to_str().unwrap();
    let adds = format!("append its certificate as PEM to the bundle {bundle}");
    let is_of_the_issuer =
        matches!(defect, Defect::SelfSigned | Defect::UnknownRoot | Defect::NoIntermediate);
    assert_eq!(hint.contains(&adds), is_of_the_issuer, "{defect:?}: {hint}");
    assert_eq!(hint.contains("clock"), defect == Defect::NotYetValid, "{defect:?}: {hint}");
}

async fn typed(scene: &Scene, arguments: &[&str]) -> Done {
    done(scene.valetkey(arguments).spawn().unwrap()).await
}

/// A home in which the login has expired, in a world with this defect at a host.
async fn broken(defect: Defect, host: &str) -> Scene {
    let settings = Settings { company: CompanyKind::Https, ..Settings::default() };
    let scene = Scene::in_world(settings, time::Duration::minutes(-1)).await;
    scene.configure(&scene.world.upstream_toml());
    scene.world.spoil(host, Some(defect));
    scene
}

/// HTTPS and WebSockets, each over HTTP/1.1 and HTTP/2.
async fn requests(defect: Defect) -> usize {
    let scene = broken(defect, API).await;
    let served = Served::start(&scene).await;
    let answers = [
        ("https h1", told(&served.get(API, HTTP1, "/v1/x").await)),
        ("https h2", told(&served.get(API, HTTP2, "/v1/x").await)),
        ("websocket h1", refusal(served.upgrade(API).await).await),
        ("websocket h2", refusal(served.extended_connect(API).await).await),
    ];
    for (leg, (status, code, message, hint)) in &answers {
        assert_eq!((*status, code.as_str()), (502, "upstream_tls_untrusted"), "{leg}, {defect:?}");
        assert_says(message, defect, API, leg);
        assert_hints(&scene, hint, defect);
        println!("{defect:?} | {leg} | {message} | {hint}");
    }
    assert!(scene.world.api().seen().is_empty(), "{defect:?}: a byte got through");
    assert!(scene.world.connections() > 0);
    answers.len()
}

/// A refresh, signing in, and signing out.
async fn issuer(defect: Defect) -> usize {
    let scene = broken(defect, ISSUER_HOST).await;
    let served = Served::start(&scene).await;
    let asked = served.get("chatgpt.com", HTTP1, "/backend-api/codex/models").await;
    let (status, code, message, hint) = told(&asked);
    assert_eq!((status, code.as_str()), (503, "issuer_unavailable"), "{defect:?}");
    assert_says(&message, defect, ISSUER_HOST, "refresh");
    assert_hints(&scene, &hint, defect);
    println!("{defect:?} | refresh | {message} | {hint}");
    drop(served);

    let login = typed(&scene, &["login", "--device-auth"]).await;
    assert_eq!(login.status, 1, "{login:?}");
    let logout = typed(&scene, &["logout"]).await;
    assert_eq!(logout.status, 0, "{logout:?}");
    for (leg, done) in [("login", login), ("revoke", logout)] {
        assert_says(&done.err, defect, ISSUER_HOST, leg);
        let hint = done.err.lines().find_map(|line| line.strip_prefix("hint: "));
        assert_hints(&scene, hint.unwrap_or_else(|| panic!("no hint: {done:?}")), defect);
        println!("{defect:?} | {leg} | {}", done.err.trim_end().replace('\n', " / "));
    }
    assert!(scene.world.issuer().seen().is_empty(), "{defect:?}: a byte got through");
    assert!(scene.world.api().seen().is_empty(), "{defect:?}: an expired token was sent");
    3
}

/// TLS to a proxy in front of us.
async fn chain(defect: Defect) -> usize {
    let scene = broken(defect, "127.0.0.1").await;
    let (ca, proxy) = (scene.world.ca_file().display(), scene.world.company().url(""));
    scene.configure(&format!("[upstream]\nca_bundle = \"{ca}\"\nproxy = \"{proxy}\"\n"));
    let served = Served::start(&scene).await;
    let (status, code, message, hint) = told(&served.get(API, HTTP1, "/v1/x").await);
    assert_eq!(status, 502, "{defect:?}");
    assert_eq!(code, "chain_tls_untrusted", "{defect:?}");
    assert_says(&message, defect, "127.0.0.1", "https chain");
    assert_hints(&scene, &hint, defect);
    println!("{defect:?} | https chain | {code} | {message} | {hint}");
    assert_eq!(scene.world.company().connects(), [""; 0], "{defect:?}: it was asked for a tunnel");
    assert!(scene.world.api().seen().is_empty());

    // The same chain with a good certificate is taken.
    scene.world.spoil("127.0.0.1", None);
    assert_eq!(served.get(API, HTTP1, "/v1/x").await.status(), 200);
    assert_eq!(scene.world.company().connects(), ["api.example.com:443"]);
    1
}

#[tokio::test(flavor = "multi_thread")]
async fn each_defect_is_refused_on_each_leg_with_its_own_sentence() {
    let mut legs = 0;
    for defect in Defect::ALL {
        let (one, two, three) = tokio::join!(requests(defect), issuer(defect), chain(defect));
        legs += one + two + three;
    }
    println!("{} defects, {legs} legs", Defect::ALL.len());
    assert_eq!(legs, 64);
}
