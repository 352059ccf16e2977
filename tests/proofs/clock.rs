//! A clock that jumps while the proxy runs: serving goes on, and no jump is a storm of refreshes.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::process::Signal;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use valetkey::sandbox::Settings;
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Visit};
use valetkey::tasks::Tasks;

use super::rounds;
use super::served::Serving;
use super::support::{LIMIT, Scene, done, program};

const CHATGPT: &str = "chatgpt.com:443";
const MODELS: &str = "/backend-api/codex/models";

/// A wall clock that a file turns, for programs that are started with its variables. The monotonic clock stays what it is,
/// as where a person or a time server sets the time.
struct Turned {
    file: PathBuf,
    variables: Vec<(&'static str, String)>,
}

impl Turned {
    /// That of all programs in the scene, not turned yet; `None` where there is no faketime, or no curl to go by the same clock.
    fn in_scene(scene: &mut Scene) -> Option<Self> {
        let (faketime, _curl) = (program("faketime")?, program("curl")?);
        let shown =
            std::process::Command::new(faketime).args(["-f", "+0", "env"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let library = shown.lines().find_map(|line| line.strip_prefix("LD_PRELOAD=")).unwrap();
        let file = scene.path("clock");
        let on = || "1".to_owned();
        let variables = vec![
            ("LD_PRELOAD", library.to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap().to_owned()),
            ("FAKETIME_NO_CACHE", on()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", on()),
            ("DONT_FAKE_MONOTONIC", on()),
        ];
        let own = variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        scene.env.extend(own);
        let turned = Self { file, variables };
        turned.by("+0");
        Some(turned)
    }

    /// Turns it in one step.
    fn by(&self, how_far: &str) {
        let next = self.file.with_extension("next");
        fs::write(&next, how_far).unwrap();
        fs::rename(&next, &self.file).unwrap();
    }
}

/// A request by a program whose clock is turned as the proxy's is, as all are on one machine: its status.
async fn by_curl(serving: &Serving, turned: &Turned) -> String {
    let mut curl = tokio::process::Command::new(program("curl").unwrap());
    curl.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30"]);
    curl.arg("--cacert").arg(&serving.ca).args(["-x", &format!("http://{}", serving.address)]);
    curl.arg(format!("https://chatgpt.com{MODELS}")).env_clear().kill_on_drop(true);
    curl.envs(turned.variables.iter().map(|(name, value)| (name, value)));
    curl.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let done = done(curl.spawn().unwrap()).await;
    format!("{}{}", done.out, done.err)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_jumps_and_serving_goes_on() {
    let mut scene = Scene::usual().await;
    let Some(turned) = Turned::in_scene(&mut scene) else { return };
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    let issuer = scene.world.issuer();
    // How far, and whether a client whose clock stands right can take a leaf of then.
    let jumps = [
        ("+0", true),
        ("-1h", true),
        ("+1h", true),
        ("-1h", true),
        ("+300d", false),
        ("+0", true),
        ("+300d", false),
        ("-1h", true),
        ("+0", true),
    ];
    let mut said = Vec::new();
    for (how_far, is_near) in jumps {
        turned.by(how_far);
        let before = issuer.posts();
        for alpn in [HTTP1, HTTP2].iter().cycle().take(10) {
            if is_near {
                let answer = client.get(Visit::to(CHATGPT, alpn), MODELS).await;
                assert_eq!(answer.expect(how_far).status(), 200, "{how_far}");
            }
        }
        assert_eq!(by_curl(&serving, &turned).await, "200", "{how_far}");
        // What goes on in the background has looked at the clock, too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let posts = issuer.posts() - before;
        assert!(posts <= 1, "{posts} posts after a jump to {how_far}");
        said.push(format!("{how_far}: {posts}"));
    }
    println!("refreshes after each jump: {}", said.join(", "));
    assert_eq!(issuer.reuses(), 0);
}

/// Everything has expired by then, our own root and the upstream's certificate too: that is said, to nobody's harm.
#[tokio::test(flavor = "multi_thread")]
async fn a_year_ahead_and_back() {
    let mut scene = Scene::usual().await;
    let Some(turned) = Turned::in_scene(&mut scene) else { return };
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    assert_eq!(client.get(Visit::to(CHATGPT, HTTP1), MODELS).await.unwrap().status(), 200);
    turned.by("+366d");
    for _ in 0..5 {
        let failed = by_curl(&serving, &turned).await;
        assert!(!failed.starts_with("200"), "{failed}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    turned.by("+0");
    for alpn in [HTTP1, HTTP2] {
        let answer = client.get(Visit::to(CHATGPT, alpn), MODELS).await;
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert_eq!(by_curl(&serving, &turned).await, "200");
    let issuer = scene.world.issuer();
    println!("{} posts in all", issuer.posts());
    assert!(issuer.posts() <= 2 && issuer.reuses() == 0, "{}", issuer.posts());
}

const PEER: &str = "peer.example.com:443";

/// An upstream that answers everything with what it was sent, and closes all its connections when it is told.
struct Peer {
    closing: watch::Sender<()>,
    open: Arc<AtomicUsize>,
}

impl Peer {
    fn serve(listener: TcpListener, acceptor: TlsAcceptor) -> Self {
        let (closing, tasks) = (watch::Sender::new(()), Tasks::new());
        let peer = Self { closing: closing.clone(), open: Arc::default() };
        let open = peer.open.clone();
        tasks.clone().spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (mut told, open) = (closing.subscribe(), open.clone());
                let answering = answer_all(acceptor.clone(), stream, tasks.clone());
                open.fetch_add(1, Ordering::SeqCst);
                tasks.spawn(async move {
                    tokio::select! {
                        () = answering => {}
                        _told = told.changed() => {}
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        peer
    }

    /// Hangs up on everybody.
    async fn close_all(&self) {
        self.closing.send_replace(());
        while self.open.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn answer_all(acceptor: TlsAcceptor, stream: TcpStream, tasks: Tasks) {
    let tls = acceptor.accept(stream).await.unwrap();
    let is_http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
    let service = service_fn(async |request: Request<Incoming>| {
        let body = request.into_body().collect().await?.to_bytes();
        Ok::<_, hyper::Error>(Response::new(Full::new(body)))
    });
    let io = TokioIo::new(tls);
    let _gone = match is_http2 {
        true => http2::Builder::new(tasks).serve_connection(io, service).await,
        false => http1::Builder::new().serve_connection(io, service).await,
    };
}

/// Long enough for a connection to count as one that has rested.
const NAP: Duration = Duration::from_millis(1_200);

/// As on a laptop whose lid is closed: upstreams hang up meanwhile, and a tool asks in the moment in which it wakes.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_ended_while_it_slept_lose_no_request() {
    for alpn in [HTTP1, HTTP2] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peers = vec![("peer.example.com".to_owned(), listener.local_addr().unwrap())];
        let settings = Settings { peers, ..Settings::default() };
        let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
        let rule = "[[rules]]\nhost = \"peer.example.com\"\ncredential = \"example\"\n";
        scene.configure(&format!("{rule}{}", scene.world.upstream_toml()));
        let peer = Peer::serve(listener, scene.world.acceptor(alpn).unwrap());
        let serving = Serving::start(&scene).await;
        let client = serving.client();
        let mut connection = client.open(Visit::to(PEER, HTTP1)).await.unwrap();
        let rounds = rounds(10, 200);
        for round in 0..rounds {
            let mut post = async |said: &'static str| {
                let answer = connection.send(client::post("/v1/x", said)).await.unwrap();
                (answer.status().as_u16(), client::gather(answer).await.unwrap().into_body())
            };
            assert_eq!(post("before").await, (200, "before".into()));
            serving.signal(Signal::STOP);
            peer.close_all().await;
            tokio::time::sleep(NAP).await;
            let mut asking = Box::pin(post("after"));
            let asleep = tokio::time::timeout(Duration::from_millis(10), asking.as_mut()).await;
            assert!(asleep.is_err(), "it is not stopped");
            serving.signal(Signal::CONT);
            let answer = tokio::time::timeout(LIMIT, asking).await.unwrap();
            assert_eq!(answer, (200, "after".into()), "round {round}");
        }
        println!("upstream {}: {rounds} naps", String::from_utf8_lossy(alpn[0]));
    }
}
