//! Heads at the port, through the real proxy: a tunnel opens for a host that is allowed and spelled rightly, and what is
//! refused never reaches an upstream.

use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use valetkey::proxy::{Door, Socket};
use valetkey::sandbox::Settings;
use valetkey::tasks::Tasks;

use super::attack::{Attack, corpus, on_all_cores};
use super::hosts::{canonical, number};
use super::recorder::{self, Got, Record};
use super::strict::{self, Message, Reading};
use super::support::{Options, Scene, within};
use crate::rounds;

/// Forty thousand and not a million: each is a connection of its own to a proxy built for tests.
#[test]
fn what_is_refused_at_the_port_reaches_nobody() {
    let attack = Attack { name: "heads", rounds: rounds(40_000, 5_000_000), words: WORDS };
    let corpus = corpus(attack.name);
    let opened = on_all_cores(attack.name, attack.rounds / BATCH, |dice| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let port = Port::open().await;
            let mut opened = 0;
            for input in &corpus {
                port.judge(input).await;
            }
            for _ in 0..BATCH {
                let mut input = Vec::new();
                attack.mutate(&corpus, dice, &mut input);
                opened += usize::from(port.judge(&input).await);
            }
            opened
        })
    });
    println!("{}: {} inputs, {opened} of them went through", attack.name, attack.rounds);
    assert!((attack.rounds / 50..attack.rounds / 2).contains(&opened), "{opened} show nothing");
}

/// Inputs for each proxy.
const BATCH: usize = 5_000;

/// The host that is not ruled but allowed: what is sent on in plain text comes to a recorder.
const PLAIN: &str = "plain.example.com";

/// Hosts that a tunnel may lead to: of the two with rules no byte of ours goes out for a CONNECT alone.
const ALLOWED: [&str; 2] = ["plain.example.com:443", "api.example.com:443"];

struct Port {
    scene: Scene,
    record: Record,
}

impl Port {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peers = vec![(PLAIN.to_owned(), listener.local_addr().unwrap())];
        let settings = Settings { peers, ..Settings::default() };
        let rules = format!("[[rules]]\nhost = \"{PLAIN}\"\naction = \"tunnel\"\n");
        let top = "default = \"refuse\"\nuse = []";
        let scene = Scene::start(Options { lifetime: None, top, rules, settings }).await;
        // Ports of TCP would run out.
        let socket = UnixListener::bind(Self::path(&scene)).unwrap();
        scene.proxy.serve(Socket::Unix(socket), Door::default());
        let record = Record::default();
        let recording = record.clone();
        Tasks::new().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let record = recording.clone();
                Tasks::new().spawn(async move { recorder::http1(stream, &record).await });
            }
        });
        Self { scene, record }
    }

    fn path(scene: &Scene) -> std::path::PathBuf {
        Path::new(scene.home.path()).join("port.sock")
    }

    /// Whether the input opened a tunnel, or reached the recorder. Panics when it must not have.
    async fn judge(&self, input: &[u8]) -> bool {
        // What follows a CONNECT is the tunnel's, and behind another request is another input.
        let input = match strict::read(input) {
            Reading::Whole { len, .. } => &input[..len],
            _ => input,
        };
        let status = within(self.status(input)).await;
        let mut got = self.record.take();
        // It may be of an earlier one.
        got.retain(|got| !matches!(got, Got::Cut(..)));
        let said = match strict::read(input) {
            Reading::Whole { message, .. } | Reading::Frayed(message) => Some(message),
            _ => None,
        };
        let shown =
            || format!("{status:?} and {got:?}; as a line of a corpus:\n{}", input.escape_ascii());
        let is_tunnel = said.as_ref().is_some_and(|said| said.method == "CONNECT");
        if let [Got::Whole(came)] = &got[..] {
            let said = said.as_ref().unwrap_or_else(|| panic!("nobody said this: {}", shown()));
            assert!(!is_tunnel && is_sent_on(came, said), "not what was said: {}", shown());
            return true;
        }
        assert!(got.is_empty(), "{}", shown());
        if status != Some(200) {
            return false;
        }
        let target = said.filter(|_| is_tunnel).and_then(|said| {
            let (host, port) = said.target.rsplit_once(':')?;
            let is_framed =
                ["content-length", "transfer-encoding", "origin", "referer", "sec-fetch-site"];
            let is_bare = is_framed.iter().all(|name| said.all(name).is_empty());
            is_bare.then_some(format!("{}:{}", canonical(host)?, number(port)?))
        });
        assert!(
            target.is_some_and(|it| ALLOWED.contains(&it.as_str())),
            "it went through: {}",
            shown()
        );
        true
    }

    /// The status that the input is answered with.
    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    async fn status(&self, input: &[u8]) -> Option<u16> {
        let mut stream = UnixStream::connect(Self::path(&self.scene)).await.unwrap();
        let _written = stream.write_all(input).await;
        let mut answer = Vec::new();
        // It waits for more; nothing depends on for how long.
        let waited = tokio::time::timeout(SILENCE, read_head(&mut stream, &mut answer)).await;
        if waited.is_err() {
            let _closed = stream.shutdown().await;
            read_head(&mut stream, &mut answer).await;
        }
        String::from_utf8_lossy(&answer).split(' ').nth(1)?.parse().ok()
    }
}

const SILENCE: std::time::Duration = std::time::Duration::from_millis(20);

async fn read_head(stream: &mut UnixStream, answer: &mut Vec<u8>) {
    while !answer.windows(4).any(|four| four == b"\r\n\r\n") {
        if !matches!(stream.read_buf(answer).await, Ok(1..)) {
            return;
        }
    }
}

/// Whether this is what a request in absolute form becomes: its own name, its path, nothing of ours or of the proxy's.
fn is_sent_on(came: &Message, said: &Message) -> bool {
    let Some((scheme, rest)) = said.target.split_once("://") else { return false };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let of_proxies = came.fields.iter().any(|(name, _)| name.starts_with("proxy-"));
    let target =
        authority.rsplit_once(':').and_then(|(host, port)| Some((canonical(host)?, number(port)?)));
    scheme.eq_ignore_ascii_case("http")
        && target == Some((PLAIN.to_owned(), 443))
        && came.all("host") == [format!("{PLAIN}:443").as_bytes()]
        && (&came.method, &came.target, &came.body) == (&said.method, &path, &said.body)
        && came.all("authorization") == said.all("authorization")
        && !of_proxies
}

const WORDS: &[&str] = &[
    "CONNECT ",
    "GET ",
    "TRACE ",
    "api.example.com:443",
    "plain.example.com:443",
    "other.example.com:443",
    "http://",
    "https://",
    ":443",
    ":80",
    ":",
    "@",
    "user:pass@",
    "#",
    "?",
    "/",
    "//",
    "\\",
    " ",
    "\t",
    "\r\n",
    "\n",
    "\r",
    "\0",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "Host: plain.example.com:443\r\n",
    "Host: api.example.com\r\n",
    "Content-Length: 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Proxy-Authorization: Basic eDp5\r\n",
    "Connection: close\r\n",
    "Connection: host\r\n",
    "Upgrade: x\r\n",
    "Origin: https://x\r\n",
    "Authorization: Bearer x\r\n",
    "[::1]:443",
    "127.0.0.1:443",
    "0x7f.1:443",
    "xn--",
    "%2e",
    "..",
    "*",
    "x-valetkey-via: x\r\n",
    "GET http://plain.example.com:443/smuggled HTTP/1.1\r\nHost: plain.example.com:443\r\n\r\n",
];
