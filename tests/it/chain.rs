//! The proxy in front of us: what it may answer, what it is told, and that nobody else hears of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use valetkey::origin::{ProxyScheme, Target};
use valetkey::secret::Secret;
use valetkey::tasks::Tasks;
use valetkey::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
use valetkey::upstream::chain::auth::{AskedAuth, BasicAuth, NoAuth, ProxyAuth};
use valetkey::upstream::chain::no_proxy::NoProxy;
use valetkey::upstream::chain::{Chain, Hop};
use valetkey::upstream::dial::{Dialer, Scope};
use valetkey::upstream::{Stage, Upstream, UpstreamError};

use super::support::within;

/// A proxy that gives these answers, one to each head that it reads, whatever the connection, and remembers
/// the heads. Behind an answer that ends in `!` it closes the connection.
struct Scripted {
    upstream: Upstream,
    heads: Arc<Mutex<Vec<String>>>,
}

async fn scripted(auth: Arc<dyn ProxyAuth>, answers: &[&'static str]) -> Scripted {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Target::parse(&listener.local_addr().unwrap().to_string()).unwrap();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let heard = heads.clone();
    let mut answers: VecDeque<_> = answers.iter().copied().collect();
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            loop {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                if head.is_empty() {
                    break;
                }
                heard.lock().unwrap().push(String::from_utf8(head).unwrap());
                let Some(answer) = answers.pop_front() else { return };
                stream.write_all(answer.trim_end_matches('!').as_bytes()).await.unwrap();
                if answer.ends_with('!') {
                    break;
                }
            }
        }
    });
    Scripted { upstream: through(proxy, auth), heads }
}

fn through(proxy: Target, auth: Arc<dyn ProxyAuth>) -> Upstream {
    let direct = NoProxy::default();
    upstream_through(Chain::via(Hop { scheme: ProxyScheme::Http, proxy, auth, direct }))
}

fn upstream_through(chain: Chain) -> Upstream {
    let own = Vec::new();
    let settings = TrustSettings { mode: TrustMode::MozillaAndBundle, bundle: None, own };
    let trust = Arc::new(UpstreamTrust::load(settings).unwrap());
    Upstream::new(Dialer::new(trust, chain, BTreeMap::new()))
}

impl Scripted {
    /// Opens a tunnel and reads what comes through it to its end.
    async fn tunnel(&self) -> Result<String, UpstreamError> {
        let target = Target::parse("api.example.com:443").unwrap();
        let mut stream = within(self.upstream.connect(&target, Scope::Anywhere, None)).await?;
        let mut through = String::new();
        // The proxy may have gone with an error of its own.
        drop(within(stream.read_to_string(&mut through)).await);
        Ok(through)
    }

    /// What was shown in each head.
    fn shown(&self) -> Vec<Option<String>> {
        let field = |head: &String| {
            let line = head.lines().find_map(|line| line.strip_prefix("proxy-authorization: "));
            line.map(str::to_owned)
        };
        self.heads.lock().unwrap().iter().map(field).collect()
    }
}

fn basic(login: &str) -> Arc<dyn ProxyAuth> {
    Arc::new(BasicAuth::new(Secret::new(login)).unwrap())
}

const ASKS: &str =
    "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"Corp\"\r\nContent-Length: 2\r\n\r\nno";
const ASKS_AND_CLOSES: &str = "HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\nConnection: close\r\n\r\nno!";

#[tokio::test(flavor = "multi_thread")]
async fn what_opens_a_tunnel() {
    let answers = [
        "HTTP/1.1 200 Connection established\r\n\r\n!",
        "HTTP/1.1 200 OK\r\n\r\nearly bytes!",
        "HTTP/1.0 200 OK\r\nProxy-Agent: old\r\n\r\nearly bytes!",
        "HTTP/1.1 204 No Content\r\n\r\nearly bytes!",
        "HTTP/1.1 299 Whatever\r\n\r\nearly bytes!",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nearly bytes!",
    ];
    for answer in answers {
        let proxy = scripted(basic("user:p@ss"), &[answer]).await;
        let through = proxy.tunnel().await.unwrap_or_else(|error| panic!("{answer:?}: {error}"));
        let expected = if answer.contains("early") { "early bytes" } else { "" };
        assert_eq!(through, expected, "{answer:?}");
        let head = proxy.heads.lock().unwrap()[0].clone();
        assert!(head.starts_with("CONNECT api.example.com:443 HTTP/1.1\r\n"), "{head}");
        assert_eq!(proxy.shown(), [Some("Basic dXNlcjpwQHNz".to_owned())]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_the_chains_and_says_so() {
    let no: fn() -> Arc<dyn ProxyAuth> = || Arc::new(NoAuth);
    let login = || basic("user:p@ss");
    let refused = |word: &str| Stage::ChainRefused(word.to_owned());
    let asks = |asks: &str, was_shown| Stage::ChainAuth { asks: asks.to_owned(), was_shown };
    let basic_asked = "Basic realm=\"Corp\"";
    type Row<'a> = (Arc<dyn ProxyAuth>, &'a str, Stage, &'a str);
    let unauthorized = "HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=\"Corp\"\r\n\r\n!";
    let table: [Row<'_>; 10] = [
        (login(), unauthorized, asks(basic_asked, true), "chain_auth"),
        (no(), ASKS, asks(basic_asked, false), "chain_auth"),
        (login(), ASKS, asks(basic_asked, true), "chain_auth"),
        (login(), ASKS_AND_CLOSES, asks("Negotiate or NTLM", true), "chain_auth"),
        (no(), "HTTP/1.1 403 No\r\n\r\n!", refused("403 Forbidden"), "chain_refused"),
        (no(), "HTTP/1.1 503 No\r\n\r\n!", refused("503 Service Unavailable"), "chain_refused"),
        (no(), "HTTP/1.1 302 No\r\nLocation: /\r\n\r\n!", refused("302 Found"), "chain_refused"),
        (no(), "SSH-2.0-OpenSSH_9.2\r\n!", Stage::ChainGarbage, "chain_garbage"),
        (no(), "!", Stage::ChainGarbage, "chain_garbage"),
        (no(), "HTTP/1.1 200 OK\r\nX!", Stage::ChainGarbage, "chain_garbage"),
    ];
    for (auth, answer, stage, code) in table {
        let answer: &'static str = answer.to_owned().leak();
        let proxy = scripted(auth, &[answer]).await;
        let error = proxy.tunnel().await.unwrap_err();
        assert_eq!((error.stage(), error.code()), (&stage, code), "{answer:?}");
        assert!(error.to_string().contains("the upstream proxy"), "{error}");
        let said = format!("{error} {error:?} {}", error.hint());
        assert!(!said.contains("p@ss") && !said.contains("dXNlcjpwQHNz"), "{said}");
        assert_eq!(proxy.heads.lock().unwrap().len(), 1, "asked once: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_has_changed_is_shown_on_the_same_connection_or_the_next() {
    const OPENED: &str = "HTTP/1.1 200 OK\r\n\r\nthrough!";
    for asks in [ASKS, ASKS_AND_CLOSES] {
        let told = Arc::new(Mutex::new(vec!["u:new", "u:old"]));
        let ask = move || {
            let next = told.lock().unwrap().pop().map(Secret::new);
            std::future::ready(next.ok_or_else(|| "nobody knows".to_owned())).boxed()
        };
        let auth = Arc::new(AskedAuth::new(Arc::new(ask)));
        let proxy = scripted(auth, &[asks, OPENED, OPENED, asks]).await;
        assert_eq!(proxy.tunnel().await.unwrap(), "through");
        assert_eq!(proxy.tunnel().await.unwrap(), "through", "it is remembered");
        let error = proxy.tunnel().await.unwrap_err();
        assert_eq!(error.code(), "chain_auth");
        assert!(error.to_string().contains("nobody knows"), "{error}");
        let shown = proxy.shown();
        assert_eq!(shown.len(), 4);
        assert_ne!(shown[0], shown[1]);
        assert_eq!(shown[1..3], [shown[3].clone(), shown[3].clone()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_never_taken_is_not_shown_for_ever() {
    let count = AtomicUsize::new(0);
    let ask = move || {
        let login = format!("u:{}", count.fetch_add(1, Ordering::SeqCst));
        std::future::ready(Ok(Secret::new(login))).boxed()
    };
    let proxy = scripted(Arc::new(AskedAuth::new(Arc::new(ask))), &[ASKS; 100]).await;
    assert_eq!(proxy.tunnel().await.unwrap_err().code(), "chain_auth");
    assert_eq!(proxy.shown().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_to_ourselves_is_refused() {
    let scene = super::support::Scene::usual().await;
    let own = Target::parse(&scene.address.to_string()).unwrap();
    let upstream = through(own.clone(), Arc::new(NoAuth));
    upstream.avoid(scene.address);
    let target = Target::parse("api.example.com:443").unwrap();
    let error =
        within(upstream.connect(&target, Scope::Anywhere, None)).await.map(drop).unwrap_err();
    assert_eq!((error.stage(), error.code()), (&Stage::Ourselves, "upstream_loop"));
    // A name may lead to the same place written as an address of IPv6.
    let mapped = format!("[::ffff:{}]:{}", scene.address.ip(), scene.address.port());
    let disguised = through(Target::parse(&mapped).unwrap(), Arc::new(NoAuth));
    disguised.avoid(scene.address);
    let error =
        within(disguised.connect(&target, Scope::Anywhere, None)).await.map(drop).unwrap_err();
    assert_eq!(error.stage(), &Stage::Ourselves, "{mapped}");
    // So is a target that leads here, for which there is no chain.
    let error = within(upstream.connect(&own, Scope::Anywhere, None)).await.map(drop).unwrap_err();
    assert_eq!(error.stage(), &Stage::Ourselves);
    assert!(scene.world.api().seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_without_end_are_given_up() {
    let flood: &'static str = "HTTP/1.1 102 Wait\r\n\r\n".repeat(1000).leak();
    let proxy = scripted(Arc::new(NoAuth), &[flood]).await;
    assert_eq!(proxy.tunnel().await.unwrap_err().stage(), &Stage::ChainGarbage);
    const SIXTEEN: &str = "HTTP/1.1 102 Wait\r\n\r\n";
    let some: &'static str =
        format!("{}HTTP/1.1 200 OK\r\n\r\nthrough!", SIXTEEN.repeat(16)).leak();
    let proxy = scripted(Arc::new(NoAuth), &[some]).await;
    assert_eq!(proxy.tunnel().await.unwrap(), "through");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_passes_a_connect_on_is_told_and_a_loop_is_seen_by_it() {
    const OPENED: &str = "HTTP/1.1 200 OK\r\n\r\n!";
    let proxy = scripted(Arc::new(NoAuth), &[OPENED, OPENED]).await;
    let target = Target::parse("api.example.com:443").unwrap();
    drop(
        within(proxy.upstream.connect(&target, Scope::Anywhere, Some("one, another")))
            .await
            .unwrap(),
    );
    let head = proxy.heads.lock().unwrap()[0].clone();
    let via = head.lines().find_map(|line| line.strip_prefix("x-valetkey-via: ")).unwrap();
    let own = via.strip_prefix("one, another, ").unwrap();
    assert_eq!(own.len(), 16, "{via}");
    let error = proxy.upstream.refuse_loop(&target, Some(via)).unwrap_err();
    assert_eq!(error.stage(), &Stage::Ourselves);
    let others = via.strip_suffix(own).unwrap();
    assert!(proxy.upstream.refuse_loop(&target, Some(others)).is_ok());
    assert!(proxy.upstream.refuse_loop(&target, None).is_ok());
}

/// A SOCKS server that takes this login and no other, and gives what is behind it.
async fn socks(login: &'static [u8], auth: Arc<dyn ProxyAuth>) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Target::parse(&listener.local_addr().unwrap().to_string()).unwrap();
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut offer = [0; 4];
            stream.read_exact(&mut offer).await.unwrap();
            assert_eq!(offer, [5, 2, 0, 2]);
            stream.write_all(&[5, 2]).await.unwrap();
            let mut shown = vec![0; login.len()];
            stream.read_exact(&mut shown).await.unwrap();
            let is_right = shown == login;
            stream.write_all(&[1, u8::from(!is_right)]).await.unwrap();
            if is_right {
                let mut request = [0; 5 + 15 + 2];
                stream.read_exact(&mut request).await.unwrap();
                assert_eq!(request[5..20], *b"api.example.com");
                stream.write_all(b"\x05\0\0\x01\0\0\0\0\0\0through").await.unwrap();
            }
        }
    });
    let direct = NoProxy::default();
    let chain = Chain::via(Hop { scheme: ProxyScheme::Socks5h, proxy, auth, direct });
    upstream_through(chain)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socks_login_that_has_changed_is_shown_once_more() {
    let told = Arc::new(Mutex::new(vec!["u:new", "u:old"]));
    let ask = move || {
        let next = told.lock().unwrap().pop().map(Secret::new);
        std::future::ready(next.ok_or_else(|| "nobody knows".to_owned())).boxed()
    };
    let upstream = socks(b"\x01\x01u\x03new", Arc::new(AskedAuth::new(Arc::new(ask)))).await;
    let target = Target::parse("api.example.com:443").unwrap();
    let mut stream = within(upstream.connect(&target, Scope::Anywhere, None)).await.unwrap();
    let mut through = String::new();
    within(stream.read_to_string(&mut through)).await.unwrap();
    assert_eq!(through, "through");

    let upstream = socks(b"\x01\x01u\x03new", basic("u:old")).await;
    let error =
        within(upstream.connect(&target, Scope::Anywhere, None)).await.map(drop).unwrap_err();
    assert_eq!(error.code(), "chain_auth");
    assert!(error.to_string().contains("did not take the login"), "{error}");
}
