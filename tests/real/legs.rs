//! One table: every leg, by every way out, with the CA named in every way.

use std::sync::Arc;

use futures_util::{SinkExt as _, StreamExt as _};
use http::Response;
use http::header::AUTHORIZATION;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Semaphore};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Visit};
use valetkey::sandbox::{CompanyKind, ISSUER_HOST, Settings, World};
use valetkey::secret::Secret;
use valetkey::tasks::Tasks;

use super::served::{Served, told};
use super::support::{Done, KEY, Scene, SigningIn, done};

/// How a world is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    name: &'static str,
    /// `None` goes there directly.
    chain: Option<CompanyKind>,
    with_login: bool,
}

const WAYS: [Way; 6] = [
    Way { name: "direct", chain: None, with_login: false },
    Way { name: "http chain", chain: Some(CompanyKind::Http), with_login: false },
    Way { name: "https chain", chain: Some(CompanyKind::Https), with_login: false },
    Way { name: "http chain with auth", chain: Some(CompanyKind::Http), with_login: true },
    Way { name: "socks5", chain: Some(CompanyKind::Socks5), with_login: true },
    Way { name: "TLS-inspecting chain", chain: Some(CompanyKind::Inspecting), with_login: false },
];

/// How the CA is named.
const BUNDLES: [&str; 3] = ["upstream.ca_bundle", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"];

/// The legs, in the order in which a scene plays them: each that asks for something does so at a host of its own, so
/// that no pooled connection serves two.
const LEGS: [(&str, &str); 11] = [
    ("refresh", ISSUER_HOST),
    ("HTTPS h1", "h1.example.com"),
    ("HTTPS h2", "h2.example.com"),
    ("SSE", "sse.example.com"),
    ("WebSocket h1", "ws1.example.com"),
    ("WebSocket h2", "ws2.example.com"),
    ("tunnel", "tunnel.example.com"),
    ("login", ISSUER_HOST),
    ("device login", ISSUER_HOST),
    ("doctor", "chatgpt.com"),
    ("revoke", ISSUER_HOST),
];

/// A login of a chain as it stands in a URL, and the two forms in which it could leak.
const CHAIN_USER: &str = "chain-user:p%40ss-of-the-chain@";
const CHAIN_LOGIN: &str = "chain-user:p@ss-of-the-chain";
const CHAIN_LEAKS: [&str; 2] = ["ss-of-the-chain", "Y2hhaW4tdXNlcjpwQHNzLW9mLXRoZS1jaGFpbg"];

/// One combination of a way and a bundle.
struct Play {
    way: Way,
    bundle: &'static str,
    scene: Scene,
}

impl Play {
    async fn new(way: Way, bundle: &'static str) -> Self {
        let own = LEGS.iter().map(|(_, host)| *host).filter(|host| host.ends_with(".example.com"));
        let mut hosts = Settings::default().hosts;
        hosts.extend(own.clone().map(str::to_owned));
        let settings = Settings {
            company: way.chain.unwrap_or_default(),
            company_login: way.with_login.then(|| Secret::new(CHAIN_LOGIN)),
            hosts,
            ..Settings::default()
        };
        let mut scene = Scene::in_world(settings, time::Duration::minutes(-1)).await;
        let ca = match way.chain {
            None => scene.world.ca_file().to_owned(),
            Some(_) => scene.world.company().ca_file().to_owned(),
        };
        let mut text: String = own
            .filter(|host| !host.starts_with("tunnel"))
            .map(|host| format!("[[rules]]\nhost = \"{host}\"\ncredential = \"example\"\n"))
            .collect();
        text.push_str("[upstream]\n");
        match bundle {
            "upstream.ca_bundle" => text.push_str(&format!("ca_bundle = {ca:?}\n")),
            variable => scene = scene.with(variable, &ca),
        }
        match way.chain {
            None => {
                text.push_str("[upstream.resolve]\n");
                for (target, address) in scene.world.resolve() {
                    text.push_str(&format!("\"{target}\" = \"{address}\"\n"));
                }
            }
            Some(_) => {
                let user = if way.with_login { CHAIN_USER } else { "" };
                let url = scene.world.company().url(user);
                scene = scene.with("HTTPS_PROXY", url);
            }
        }
        scene.configure(&text);
        Self { way, bundle, scene }
    }

    async fn typed(&self, arguments: &[&str]) -> Done {
        done(self.scene.valetkey(arguments).spawn().unwrap()).await
    }

    /// Plays one leg, and looks at which way it took.
    async fn leg(&self, (name, host): (&str, &str), served: &Served) {
        let world = &self.scene.world;
        let (connects, connections) = (world.company().connects().len(), world.connections());
        let visits = Box::pin(self.walk(name, host, served)).await;
        let asked = &world.company().connects()[connects..];
        let direct = world.connections() - connections - visits;
        if self.way.chain.is_some() {
            let is_there = asked.iter().any(|it| *it == format!("{host}:443"));
            assert!(is_there, "{name}, {self:?}: the chain was asked for {asked:?}");
            assert_eq!(direct, 0, "{name}, {self:?}: it went past the chain");
        } else {
            assert!(asked.is_empty() && direct > 0, "{name}, {self:?}: {asked:?} {direct}");
        }
        if host.ends_with(".example.com") {
            self.assert_signed_in(host);
        }
    }

    /// Answers with how often a browser went to the world directly.
    async fn walk(&self, name: &str, host: &str, served: &Served) -> usize {
        match name {
            "refresh" => self.refresh(served).await,
            "HTTPS h1" => self.https(served, host, HTTP1).await,
            "HTTPS h2" => self.https(served, host, HTTP2).await,
            "SSE" => self.events(served, host).await,
            "WebSocket h1" => echo(served.upgrade(host).await, 101).await,
            "WebSocket h2" => echo(served.extended_connect(host).await, 200).await,
            "tunnel" => self.tunnel(served, host).await,
            "login" => {
                self.log_in().await;
                return 1;
            }
            "device login" => self.log_in_elsewhere().await,
            "revoke" => self.log_out().await,
            "doctor" => self.doctor().await,
            other => panic!("{other} is no leg"),
        }
        0
    }

    async fn refresh(&self, served: &Served) {
        let answer = served.get("chatgpt.com", HTTP1, "/backend-api/codex/models").await;
        assert_eq!(answer.status(), 200, "{self:?}: {answer:?}");
        assert_eq!(self.scene.world.issuer().refreshes(), 1, "{self:?}");
    }

    async fn https(&self, served: &Served, host: &str, alpn: &[&[u8]]) {
        let answer = served.get(host, alpn, "/v1/things").await;
        assert_eq!(answer.status(), 200, "{self:?}: {answer:?}");
    }

    async fn events(&self, served: &Served, host: &str) {
        let answer = served.get(host, HTTP1, "/v1/sse?n=3&every_ms=1").await;
        assert_eq!(answer.status(), 200, "{self:?}: {answer:?}");
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let events = String::from_utf8_lossy(answer.body()).matches("data:").count();
        assert!(events >= 3, "{self:?}: {answer:?}");
    }

    /// The client's own key arrives as it is.
    async fn tunnel(&self, served: &Served, host: &str) {
        let target = format!("{host}:443");
        let mut request = client::get("/v1/things");
        let own = format!("Bearer {KEY}").parse().unwrap();
        request.headers_mut().insert(AUTHORIZATION, own);
        let answer = served.client.send(Visit::to(&target, HTTP1), request).await.unwrap();
        assert_eq!(answer.status(), 200, "{self:?}");
    }

    async fn log_in(&self) {
        // One at a time in this process; the lock of the ports is for the other ones.
        static BROWSERS: Mutex<()> = Mutex::const_new(());
        let alone = BROWSERS.lock().await;
        let login = SigningIn::begin(&self.scene, &[]).await;
        let place = agree(&self.scene.world, &login.url).await;
        let next = get(&place).await.expect("the callback leads to the page");
        let end = next.rsplit_once("/").map(|(_, last)| last.to_owned()).unwrap();
        let root = place.split("/auth/").next().unwrap();
        assert_eq!(get(&format!("{root}/{end}")).await, None, "the page leads nowhere");
        let done = login.end().await;
        drop(alone);
        self.assert_logged_in(&done, "authorization_code", 1);
    }

    async fn log_in_elsewhere(&self) {
        let issuer = self.scene.world.issuer();
        issuer.device_interval(1);
        issuer.approve_device();
        let done = self.typed(&["login", "--device-auth"]).await;
        self.assert_logged_in(&done, "authorization_code", 2);
    }

    fn assert_logged_in(&self, done: &Done, grant: &str, count: usize) {
        assert_eq!(done.status, 0, "{self:?}: {done:?}");
        assert!(done.err.contains("Successfully logged in"), "{self:?}: {done:?}");
        let issuer = self.scene.world.issuer();
        // The login before it was revoked.
        assert_eq!((issuer.grants(grant), issuer.revokes()), (count, count), "{self:?}");
    }

    async fn log_out(&self) {
        let issuer = self.scene.world.issuer();
        let before = issuer.revokes();
        let done = self.typed(&["logout"]).await;
        assert_eq!(done.status, 0, "{self:?}: {done:?}");
        assert!(!done.err.contains("warning:"), "{self:?}: {done:?}");
        assert_eq!(issuer.revokes(), before + 1, "{self:?}");
        assert!(!self.scene.path(".codex/auth.json").exists());
    }

    /// Nothing has failed in the eyes of the doctor.
    async fn doctor(&self) {
        let said = self.typed(&["doctor", "--json"]).await;
        let report: Value = serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:?}"));
        let checks = report["checks"].as_array().unwrap();
        assert!(checks.iter().any(|check| check["id"] == "http"), "{self:?}: {report:#}");
        assert!(checks.iter().all(|check| check["status"] != "failed"), "{self:?}: {report:#}");
    }

    /// The host has seen one credential, the right one, and none of the chain.
    fn assert_signed_in(&self, host: &str) {
        let seen = self.scene.world.api().seen();
        let seen = seen.iter().rev().find(|seen| seen.host == host);
        let seen = seen.unwrap_or_else(|| panic!("{host} was not asked, {self:?}"));
        let sent: Vec<_> = seen.headers.get_all(AUTHORIZATION).iter().collect();
        assert_eq!(sent, [&format!("Bearer {KEY}")], "{self:?}");
    }

    /// What the chain wants to know is told to nobody else.
    fn assert_chain_kept_its_login(&self) {
        let world = &self.scene.world;
        let all = [world.api().seen(), world.issuer().seen()].concat();
        assert!(all.len() >= LEGS.len(), "{self:?}: {}", all.len());
        for seen in all {
            assert!(!seen.headers.contains_key("proxy-authorization"), "{seen:?}");
            let shown = format!("{seen:?}");
            assert!(!CHAIN_LEAKS.iter().any(|leak| shown.contains(leak)), "{shown}");
        }
    }
}

impl std::fmt::Debug for Play {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} × {}", self.way.name, self.bundle)
    }
}

/// All legs of one way and one bundle.
async fn play(way: Way, bundle: &'static str) {
    let play = Play::new(way, bundle).await;
    let served = Served::start(&play.scene).await;
    for leg in LEGS {
        Box::pin(play.leg(leg, &served)).await;
    }
    play.assert_chain_kept_its_login();
}

/// Says something over a WebSocket that was opened with this status, and hears it again.
async fn echo(answer: Response<Incoming>, status: u16) {
    assert_eq!(answer.status(), status);
    let upgraded = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let mut socket = WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await;
    for message in [Message::text("hello"), Message::binary(vec![7; 100_000])] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
}

/// The browser goes to the issuer and agrees; answers with where it is sent.
pub(super) async fn agree(world: &World, url: &str) -> String {
    let (_, address) = world.resolve().into_iter().next().unwrap();
    let browser = Client::straight_to(address, world.ca_file()).unwrap();
    let path = url.strip_prefix("https://auth.openai.com").unwrap();
    let answer = browser.get(Visit::to("auth.openai.com:443", HTTP1), path).await.unwrap();
    answer.headers()["location"].to_str().unwrap().to_owned()
}

/// The browser goes to a page of this machine; answers with where it is sent, if it is.
#[expect(clippy::disallowed_methods, reason = "a browser of this machine")]
async fn get(url: &str) -> Option<String> {
    let rest = url.strip_prefix("http://").unwrap();
    let (authority, path) = rest.split_at(rest.find('/').unwrap());
    let mut stream = TcpStream::connect(authority).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let is_good = ["200", "303"].map(|it| answer.starts_with(&format!("HTTP/1.1 {it}")));
    assert!(is_good.contains(&true), "{answer}");
    let mut fields = answer.lines().filter_map(|line| line.split_once(": "));
    fields.find(|(name, _)| name.eq_ignore_ascii_case("location")).map(|(_, it)| it.to_owned())
}

/// A chain that would let everybody in would prove nothing above.
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_with_a_login_lets_nobody_in_without_it() {
    for way in WAYS.into_iter().filter(|way| way.with_login) {
        for user in ["", "chain-user:wrong@"] {
            let mut play = Play::new(way, BUNDLES[0]).await;
            let url = play.scene.world.company().url(user);
            play.scene = play.scene.with("HTTPS_PROXY", url);
            let served = Served::start(&play.scene).await;
            let (status, code, message, _) =
                told(&served.get(LEGS[1].1, HTTP1, "/v1/things").await);
            println!("{} | {user} | {status} {code} | {message}", way.name);
            assert_eq!((status, code.as_str()), (502, "chain_auth"), "{play:?}");
            assert_eq!(play.scene.world.company().connects(), [""; 0], "{play:?}");
            assert!(play.scene.world.api().seen().is_empty(), "{play:?}");
        }
    }
}

/// Scenes at a time: each is two or three processes, which mostly wait for each other.
const AT_ONCE: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_leg_by_every_way_with_every_bundle() {
    let (places, tasks) = (Arc::new(Semaphore::new(AT_ONCE)), Tasks::new());
    let mut plays = Vec::new();
    for way in WAYS {
        for bundle in BUNDLES {
            let places = Arc::clone(&places);
            let playing = tasks.spawn(async move {
                let _place = places.acquire().await.unwrap();
                Box::pin(play(way, bundle)).await
            });
            plays.push((way, bundle, playing));
        }
    }
    let mut rows = 0;
    for (way, bundle, playing) in plays {
        playing.await.unwrap();
        for (leg, _) in LEGS {
            rows += 1;
            println!("{leg} | {} | {bundle}", way.name);
        }
    }
    println!("{rows} rows");
    assert_eq!(rows, 198);
}
