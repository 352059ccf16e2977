//! Many clients, slow ones, and ones that come and go: others are served meanwhile, and afterwards nothing is left of them.

use std::fs;
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _, stream};
use http::StatusCode;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_util::sync::CancellationToken;
use valetkey::sandbox::Settings;
use valetkey::sandbox::client::{self, Client, Connection, HTTP1, HTTP2, Visit};
use valetkey::tasks::Tasks;

use super::rounds;
use super::served::{Serving, extended_connect};
use super::support::{LIMIT, Scene};

const EXAMPLE: &str = "api.example.com:443";
const CHATGPT: &str = "chatgpt.com:443";
const CODEX: &str = "/backend-api/codex";

/// How many clients are at one step at one time: as many as wait in a usual queue of a listener.
const AT_ONCE: usize = 64;

/// A catcher of hangs.
async fn within<T>(what: impl Future<Output = T>) -> T {
    let what = Box::pin(what);
    tokio::time::timeout(LIMIT, what).await.expect("it took more than a minute")
}

/// Runs `count` of them, some at one time, and gives what they come to.
async fn all<F: Future>(count: usize, make: impl FnMut(usize) -> F) -> Vec<F::Output> {
    stream::iter((0..count).map(make)).buffer_unordered(AT_ONCE).collect().await
}

/// A proxy under load, and what it was before.
struct Load {
    scene: Scene,
    serving: Serving,
    client: Client,
    /// Descriptors and memory of the proxy when it was idle.
    before: (usize, u64),
    probing: CancellationToken,
    probes: JoinHandle<Probes>,
}

/// What became of the probes.
#[derive(Default)]
struct Probes {
    answered: u32,
    slowest: Duration,
}

impl Load {
    async fn begin() -> Self {
        raise_descriptors();
        let settings = Settings { record: false, ..Settings::default() };
        let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
        scene.configure(&scene.world.upstream_toml());
        let serving = Serving::start(&scene).await;
        let client = serving.client();
        for alpn in [HTTP1, HTTP2] {
            for target in [EXAMPLE, CHATGPT] {
                let path = format!("{CODEX}/models");
                let answer = client.get(Visit::to(target, alpn), &path).await.unwrap();
                assert_eq!(answer.status(), 200);
            }
        }
        let probing = CancellationToken::new();
        let probes = Tasks::new().spawn(probe(client.clone(), probing.clone()));
        let mut load = Self { scene, serving, client, before: (0, 0), probing, probes };
        load.before = (load.descriptors(), load.memory("VmRSS"));
        load
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.serving.pid())).unwrap().count()
    }

    /// Connections of clients that the proxy has open: sockets at its port that belong to a process (proc_net(5)).
    fn clients(&self) -> usize {
        const LISTENS: &str = "0A";
        let path = format!("/proc/{}/net/tcp", self.serving.pid());
        let text = fs::read_to_string(path).unwrap();
        let port = format!(":{:04X}", self.serving.address.port());
        let sockets = text.lines().skip(1).map(|line| line.split_ascii_whitespace());
        let is_one = |mut fields: std::str::SplitAsciiWhitespace<'_>| {
            let local = fields.nth(1).unwrap();
            let (state, inode) = (fields.nth(1).unwrap(), fields.nth(5).unwrap());
            local.ends_with(&port) && state != LISTENS && inode != "0"
        };
        sockets.filter(|fields| is_one(fields.clone())).count()
    }

    /// A line of `/proc/PID/status`, in bytes.
    fn memory(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.serving.pid());
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_matches([':', ' ', '\t', 'k', 'B']).parse::<u64>().unwrap() * 1024
    }

    /// How far the memory is above what it was.
    fn grown(&self) -> u64 {
        self.memory("VmHWM").saturating_sub(self.before.1)
    }

    /// So many connections have cost no more than idle ones may, and something for all of them.
    fn assert_bounded(&self, connections: usize) {
        let grown = self.grown();
        println!(
            "{connections} connections: {:.1} KiB each",
            grown as f64 / 1024.0 / connections as f64
        );
        let most = connections as u64 * MOST_FOR_A_TUNNEL + (16 << 20);
        assert!(grown < most, "{:.1} MiB", mib(grown));
    }

    /// Waits until the clients are gone for the proxy, too.
    async fn settled(&self) {
        // A probe may be one.
        let is_left = || self.clients() > 1 || self.descriptors() > self.before.0 + IDLE_UPSTREAMS;
        let gone = async {
            while is_left() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let gone = tokio::time::timeout(LIMIT, gone).await;
        let (now, before) = (self.descriptors(), self.before.0);
        assert!(gone.is_ok(), "{now} descriptors, {before} before, {} clients", self.clients());
    }

    /// Ends the proxy, which nobody uses any more, and says what it came to.
    async fn end(mut self, what: &str) {
        self.settled().await;
        self.probing.cancel();
        let probes = within(&mut self.probes).await.unwrap();
        assert!(probes.answered > 0, "nothing was probed");
        assert!(probes.slowest < SOON, "a probe took {:?}", probes.slowest);
        let (now, grown) = (self.memory("VmRSS"), self.memory("VmHWM"));
        self.serving.signal(Signal::TERM);
        while let Some(line) = self.serving.next_line().await {
            // It would say so of tasks that are left over.
            assert!(!line.contains("cutting connections") && !line.contains("mistake"), "{line}");
        }
        assert_eq!(self.serving.ended().await, Some(0));
        println!(
            "{what}: {:.1} MiB before, {:.1} at most, {:.1} after; {} probes answered meanwhile, within {:?}",
            mib(self.before.1),
            mib(grown),
            mib(now),
            probes.answered,
            probes.slowest,
        );
    }
}

/// Open to upstreams although nobody uses them now, a hundred streams on each: the pool closes them after a while.
const IDLE_UPSTREAMS: usize = 16;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Longest time for a probe, of which a machine that does other things too takes most.
const SOON: Duration = Duration::from_secs(15);

/// Asks again and again, each time on a connection of its own.
async fn probe(client: Client, end: CancellationToken) -> Probes {
    let mut probes = Probes::default();
    loop {
        let begun = Instant::now();
        let answer = within(client.get(Visit::to(EXAMPLE, HTTP1), "/v1/probe")).await;
        assert_eq!(answer.unwrap().status(), 200);
        probes.answered += 1;
        probes.slowest = probes.slowest.max(begun.elapsed());
        tokio::select! {
            () = end.cancelled() => return probes,
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
}

/// Takes all descriptors that there are for this process, which plays the clients and the upstreams; the proxy inherits
/// the limit. Gives how many.
fn raise_descriptors() -> usize {
    let wanted = Rlimit { current: Some(65_536), maximum: Some(65_536) };
    let most = getrlimit(Resource::Nofile).maximum;
    // Only root may have more than before.
    if most.is_some_and(|most| most >= 65_536) || setrlimit(Resource::Nofile, wanted).is_err() {
        setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
    }
    usize::try_from(getrlimit(Resource::Nofile).current.unwrap_or(65_536)).unwrap()
}

/// So many, or what the descriptors of this machine allow where each takes this many of one process.
fn as_allowed(count: usize, each: usize) -> usize {
    let most = raise_descriptors().saturating_sub(500) / each;
    if most < count {
        println!("{most} instead of {count}: the limit of descriptors allows no more");
    }
    count.min(most)
}

/// What an idle tunnel may cost: hyper's and rustls' state in a build that is not optimised.
const MOST_FOR_A_TUNNEL: u64 = 96 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn idle_tunnels() {
    let load = Load::begin().await;
    let count = as_allowed(rounds(1_000, 10_000), 2);
    let open = async |number: usize| {
        let alpn = [HTTP1, HTTP2][number % 2];
        let mut connection = within(load.client.open(Visit::to(EXAMPLE, alpn))).await.unwrap();
        let answer = within(connection.get("/v1/x")).await.unwrap();
        assert_eq!(answer.status(), 200);
        connection
    };
    let mut first_time = 0;
    for time in 0..2 {
        let mut tunnels: Vec<Connection> = all(count, open).await;
        assert!(load.clients() >= count, "{} of {count}", load.clients());
        load.assert_bounded(count);
        let grown = load.grown();
        // They still carry.
        for connection in tunnels.iter_mut().step_by(17) {
            assert_eq!(within(connection.get("/v1/x")).await.unwrap().status(), 200);
        }
        drop(tunnels);
        load.settled().await;
        if time == 0 {
            first_time = grown;
        } else {
            let more = grown.saturating_sub(first_time);
            assert!(
                more < first_time / 4 + (8 << 20),
                "the second time took {:.1} MiB more",
                mib(more)
            );
        }
    }
    load.end("idle tunnels").await;
}

async fn event(events: &mut Incoming, number: usize) {
    let event = within(events.frame()).await.unwrap().unwrap().into_data().unwrap();
    assert!(event.starts_with(format!("id: {number}\n").as_bytes()), "{event:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_events() {
    let load = Load::begin().await;
    let count = as_allowed(rounds(100, 1_000), 4);
    let open = async |number: usize| {
        let alpn = [HTTP1, HTTP2][number % 2];
        let request = client::get("/v1/sse?n=3");
        let answer = within(load.client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap();
        let mut events = answer.into_body();
        event(&mut events, 0).await;
        events
    };
    let mut streams = all(count, open).await;
    for number in 1..3 {
        (0..count).for_each(|_| load.scene.world.api().release_event());
        for events in &mut streams {
            event(events, number).await;
        }
    }
    load.assert_bounded(count * 2);
    for events in streams {
        let rest = within(events.collect()).await.unwrap().to_bytes();
        assert!(rest.is_empty(), "{rest:?}");
    }
    load.end(&format!("{count} streams of events")).await;
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Bytes for S {}
type Socket = WebSocketStream<Box<dyn Bytes>>;

async fn websocket(client: &Client, over_http2: bool) -> Socket {
    let path = "/v1/ws";
    if over_http2 {
        let answer = extended_connect(client, EXAMPLE, path).await;
        assert_eq!(answer.status(), 200);
        let stream: Box<dyn Bytes> =
            Box::new(TokioIo::new(hyper::upgrade::on(answer).await.unwrap()));
        return WebSocketStream::from_raw_socket(stream, Role::Client, None).await;
    }
    let stream: Box<dyn Bytes> = Box::new(client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap());
    let url = format!("wss://api.example.com{path}");
    Box::pin(tokio_tungstenite::client_async(url, stream)).await.unwrap().0
}

async fn echo(socket: &mut Socket, text: &str) {
    socket.send(Message::text(text)).await.unwrap();
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text(text));
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets() {
    let load = Load::begin().await;
    let count = as_allowed(rounds(100, 1_000), 4);
    let open = async |number: usize| within(websocket(&load.client, number % 2 == 1)).await;
    let mut sockets = all(count, open).await;
    for round in 0..3 {
        for socket in &mut sockets {
            echo(socket, &format!("hello {round}")).await;
        }
    }
    load.assert_bounded(count * 2);
    for mut socket in sockets {
        within(socket.close(None)).await.unwrap();
    }
    load.end(&format!("{count} WebSockets")).await;
}

#[expect(clippy::disallowed_methods, reason = "the test plays clients")]
async fn dial(serving: &Serving) -> TcpStream {
    within(TcpStream::connect(serving.address)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_come_and_go() {
    let load = Load::begin().await;
    let count = rounds(3_000, 100_000);
    let come_and_go = async |number: usize| match number % 6 {
        // Says nothing.
        0 => drop(dial(&load.serving).await),
        // Leaves half a head.
        1 => {
            let mut stream = dial(&load.serving).await;
            let _gone = stream.write_all(b"CONNECT api.example.com:443 HTT").await;
        }
        // Asks for a tunnel and does not wait.
        2 => {
            let mut stream = dial(&load.serving).await;
            let head = format!("CONNECT {EXAMPLE} HTTP/1.1\r\nHost: {EXAMPLE}\r\n\r\n");
            let _gone = stream.write_all(head.as_bytes()).await;
        }
        // Leaves half a handshake.
        3 => {
            let mut tunnel = within(load.client.tunnel(EXAMPLE)).await.unwrap();
            let _gone = tunnel.write_all(&[22, 3, 1, 2, 0, 1]).await;
        }
        // Does not wait for the answer.
        4 => {
            let mut connection = within(load.client.open(Visit::to(EXAMPLE, HTTP2))).await.unwrap();
            let sending = connection.send(client::get("/v1/hold"));
            let early = tokio::time::timeout(Duration::from_millis(1), sending).await;
            assert!(early.is_err(), "{early:?}");
        }
        _ => {
            let answer = within(load.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x")).await;
            assert_eq!(answer.unwrap().status(), 200);
        }
    };
    all(count, come_and_go).await;
    load.settled().await;
    let grown = load.grown();
    assert!(grown < MOST_FOR_CHURN, "{:.1} MiB", mib(grown));
    load.end(&format!("{count} clients that came and went")).await;
}

/// What some clients at one time, however many come after them, may add to the memory.
const MOST_FOR_CHURN: u64 = 48 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients() {
    let load = Load::begin().await;
    let each = as_allowed(rounds(200, 1_000), 4) / 4;
    let mut heads = Vec::new();
    for _ in 0..each {
        let mut stream = dial(&load.serving).await;
        stream.write_all(b"CONNECT api.example.com:443 HTTP/1.1\r\nX: ").await.unwrap();
        heads.push(stream);
    }
    // Readers that do not read, over both.
    let asking = async |number: usize| {
        let alpn = [HTTP1, HTTP2][number % 2];
        let request = client::get("/v1/bytes/10000000");
        within(load.client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap()
    };
    let unread = all(each * 2, asking).await;
    assert!(unread.iter().all(|answer| answer.status() == StatusCode::OK));
    // Writers that send a little of what they have announced.
    let writing = async |_| {
        let mut tls = within(load.client.greet(Visit::to(EXAMPLE, HTTP1))).await.unwrap();
        let head =
            "POST /v1/upload HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 1000000\r\n\r\n";
        tls.write_all(head.as_bytes()).await.unwrap();
        tls
    };
    let mut writers = all(each, writing).await;
    for _ in 0..5 {
        for head in &mut heads {
            // It is cut after its ten seconds.
            let _cut = head.write_all(b"x").await;
        }
        for writer in &mut writers {
            writer.write_all(b"x").await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let grown = load.grown();
    let most = each as u64 * 4 * MOST_FOR_A_SLOW_CLIENT + (64 << 20);
    assert!(grown < most, "{:.1} MiB", mib(grown));
    // A head that does not come is given up; an answer that nobody reads, and a body that comes slowly, are not.
    for mut head in heads {
        let mut rest = Vec::new();
        let _reset = within(head.read_to_end(&mut rest)).await;
    }
    for writer in &mut writers {
        writer.write_all(b"x").await.unwrap();
    }
    drop((unread, writers));
    load.end(&format!("{} slow clients", each * 4)).await;
}

/// The buffers of hyper and rustls on both sides, and of TLS (`real/memory.rs` has them one by one).
const MOST_FOR_A_SLOW_CLIENT: u64 = 512 << 10;

/// One who sends requests of every kind, one after the other.
struct Mixed<'a> {
    load: &'a Load,
    http1: Connection,
    http2: Connection,
    socket: Socket,
}

impl<'a> Mixed<'a> {
    async fn begin(load: &'a Load) -> Self {
        let open = async |alpn| within(load.client.open(Visit::to(EXAMPLE, alpn))).await.unwrap();
        let socket = within(websocket(&load.client, false)).await;
        Self { load, http1: open(HTTP1).await, http2: open(HTTP2).await, socket }
    }

    async fn send(&mut self, number: usize) {
        let connection = if number.is_multiple_of(2) { &mut self.http1 } else { &mut self.http2 };
        match number % 10 {
            0..=3 => {
                let answer = within(connection.get("/v1/bytes/2000")).await.unwrap();
                assert_eq!((answer.status().as_u16(), answer.body().len()), (200, 2000));
            }
            4 | 5 => {
                let body = vec![b'e'; 1 + number % 30_000];
                let sent = connection.send(client::post("/v1/echo", body.clone()));
                let answer = client::gather(within(sent).await.unwrap()).await.unwrap();
                assert!(answer.body() == &body, "the echo of {} bytes", body.len());
            }
            6 | 7 => {
                let sent = connection.send(client::get("/v1/sse?n=3&every_ms=1"));
                let answer = client::gather(within(sent).await.unwrap()).await.unwrap();
                let events = String::from_utf8_lossy(answer.body()).matches("event: tick").count();
                assert_eq!(events, 3);
            }
            8 => echo(&mut self.socket, &format!("message {number}")).await,
            _ => {
                let mut request = client::get("/v1/x");
                *request.method_mut() = http::Method::TRACE;
                let answer = within(connection.send(request)).await.unwrap();
                let answer = client::gather(answer).await.unwrap();
                assert_eq!(answer.headers()["x-valetkey-error"], "target_forbidden");
            }
        }
        // Now and then on new connections.
        if number % 500 == 499 {
            *self = Self::begin(self.load).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mixture_of_requests_has_no_failure() {
    const CLIENTS: usize = 16;
    let load = Load::begin().await;
    let count = rounds(20_000, 1_000_000);
    let sending = async |_| {
        let mut mixed = Mixed::begin(&load).await;
        for number in 0..count / CLIENTS {
            mixed.send(number).await;
        }
    };
    all(CLIENTS, sending).await;
    let grown = load.grown();
    assert!(grown < MOST_FOR_CHURN, "{:.1} MiB", mib(grown));
    load.end(&format!("{count} mixed requests, 0 failures")).await;
}

/// A proxy that may have no more descriptors than this at any time.
async fn with_descriptors(scene: &Scene, count: usize) -> Serving {
    let script = format!("ulimit -n {count}; exec \"$0\" \"$@\"");
    Serving::start_in(scene, &["sh", "-c", &script], &["--listen", "127.0.0.1:0"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_descriptors() {
    // Of its two logins one has expired, and is not asked for before all places are taken.
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    let mut serving = with_descriptors(&scene, 64).await;
    let client = serving.client();
    // Many more than there is room for: each has its turn.
    let asking = async |number: usize| {
        let alpn = [HTTP1, HTTP2][number % 2];
        within(client.get(Visit::to(EXAMPLE, alpn), "/v1/x")).await.unwrap().status()
    };
    let answers = all(rounds(300, 10_000), asking).await;
    assert!(answers.iter().all(|status| *status == 200), "{answers:?}");
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", serving.pid())).unwrap().count();
    assert!(descriptors() < 64 - 16, "the reserve is used up: {}", descriptors());

    // As many tunnels as there may be: the next one waits, and no longer than until one has gone.
    let mut first = within(client.open(Visit::to(CHATGPT, HTTP1))).await.unwrap();
    let mut tunnels = Vec::new();
    while let Ok(tunnel) =
        tokio::time::timeout(Duration::from_secs(1), client.open(Visit::to(EXAMPLE, HTTP1))).await
    {
        tunnels.push(tunnel.unwrap());
        assert!(tunnels.len() < 32, "there is no end of places");
    }
    println!("{} places with 64 descriptors, {} of them open", tunnels.len(), descriptors());
    let mut waiting = Box::pin(client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x"));
    assert!(tokio::time::timeout(Duration::from_secs(1), waiting.as_mut()).await.is_err());
    drop(tunnels.pop());
    assert_eq!(within(waiting).await.unwrap().status(), 200);
    // With all places taken a refresh and a reload still find what they need.
    tunnels.push(within(client.open(Visit::to(EXAMPLE, HTTP1))).await.unwrap());
    assert_eq!(scene.world.issuer().refreshes(), 0);
    let answer = within(first.get(&format!("{CODEX}/models"))).await.unwrap();
    assert_eq!((answer.status().as_u16(), scene.world.issuer().refreshes()), (200, 1));
    scene.configure(&format!("# changed\n{}", scene.world.upstream_toml()));
    serving.signal(Signal::HUP);
    serving.hear("the configuration was read again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_descriptor_left() {
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    let client = serving.client();
    let mut tunnel = within(client.open(Visit::to(EXAMPLE, HTTP1))).await.unwrap();
    let pid = Pid::from_raw(serving.pid().cast_signed()).unwrap();
    let open = fs::read_dir(format!("/proc/{}/fd", serving.pid())).unwrap().count() as u64;
    let usual = getrlimit(Resource::Nofile);
    // Nothing can be opened above what is open.
    let lowest = Rlimit { current: Some(open.min(8)), maximum: usual.maximum };
    let before = prlimit(Some(pid), Resource::Nofile, lowest).unwrap();

    // One connection was dialled ahead. What expects a 100 wants its own.
    let mut expecting = client::post("/v1/upload", "a body");
    expecting.headers_mut().insert("expect", "100-continue".parse().unwrap());
    let answer = within(tunnel.send(expecting)).await.unwrap();
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["x-valetkey-error"], "overloaded");
    assert_eq!(answer.headers()["retry-after"], "1");
    let mut waiting = Box::pin(client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x"));
    tokio::select! {
        answer = waiting.as_mut() => panic!("there were descriptors: {answer:?}"),
        _said = serving.hear("accept failed") => {}
    }
    let spent = ticks(serving.pid());
    assert!(tokio::time::timeout(Duration::from_secs(3), waiting.as_mut()).await.is_err());
    let spent = ticks(serving.pid()) - spent;
    // A loop that spins takes all three seconds, 100 ticks each.
    assert!(spent < 150, "accepting spins: {spent} ticks in 3 s");
    prlimit(Some(pid), Resource::Nofile, before).unwrap();
    assert_eq!(within(waiting).await.unwrap().status(), 200);
    assert_eq!(within(tunnel.get("/v1/x")).await.unwrap().status(), 200);
}

/// The time that a process has run, user and system: fields 14 and 15 of `/proc/PID/stat` (proc(5)).
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}
