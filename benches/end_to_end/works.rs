//! The kinds of work: each loads one way to the API for a while and tells how much got done, at what cost.

use std::future::Future;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use http::Request;
use http::header::AUTHORIZATION;
use http_body_util::BodyExt as _;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use valetkey::sandbox::client::{
    self, Client, ClientBody, Connection, HTTP1, HTTP2, Visit, gather,
};
use valetkey::sandbox::stamp;
use valetkey::tasks::Tasks;

use crate::machine::{self, Cpu};
use crate::ways::{PLAIN, SCRUBBED, TARGET, UNSEEN, Way};

/// What one turn of a work is to do.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) way: Way,
    /// Straight to the API, for what is to be done there before the way is measured.
    pub(crate) straight: Way,
    pub(crate) time: Duration,
    /// How long one body is.
    pub(crate) bulk: usize,
    /// The hosts below [`UNSEEN`] that are this turn's.
    pub(crate) unseen: Range<usize>,
}

/// What a turn has brought.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// Requests, connections, messages, events, or gigabytes.
    pub(crate) units: f64,
    pub(crate) seconds: f64,
    /// CPU of the load and the API together, in seconds.
    pub(crate) own_cpu: f64,
    /// CPU of the proxy, in seconds.
    pub(crate) proxy_cpu: f64,
    /// How long each unit took, in microseconds, the shortest first; empty where nobody waits for one.
    pub(crate) waits: Vec<f64>,
}

impl Done {
    /// The time that this share of all was not above, in microseconds.
    pub(crate) fn wait(&self, share: f64) -> f64 {
        let last = self.waits.len().saturating_sub(1);
        self.waits.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
    }
}

/// A kind of work.
pub(crate) struct Work {
    /// What `--only` and the saved figures call it.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// What one unit is called.
    pub(crate) unit: &'static str,
    pub(crate) shows: &'static [Show],
    /// Whether the load shares the proxy's core: between two cores of a virtual machine each wake-up costs more than the
    /// proxy does, and hides it.
    pub(crate) on_one_core: bool,
    pub(crate) run: fn(Load) -> BoxFuture<'static, Done>,
}

/// What is told of a work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// Units in a second. More is better; of everything else, less.
    Rate,
    /// CPU for each.
    Cpu,
    /// The wait that half of them do not exceed, in microseconds.
    Half,
    /// The wait that 99 of 100 do not exceed.
    Most,
    /// How much longer the two are than straight to the API.
    AddedHalf,
    AddedMost,
}

use Show::{AddedHalf, AddedMost, Half, Most, Rate};

pub(crate) const WORKS: [Work; 14] = [
    Work {
        name: "warm-h1",
        title: "warm HTTP/1.1, 16 connections",
        unit: "req",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| warm(load, HTTP1, 16, 1).boxed(),
    },
    Work {
        name: "warm-h2",
        title: "warm HTTP/2, 16 streams",
        unit: "req",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| warm(load, HTTP2, 1, 16).boxed(),
    },
    Work {
        name: "single-h1",
        title: "one at a time, HTTP/1.1, one core",
        unit: "req",
        shows: &[AddedHalf, AddedMost],
        on_one_core: true,
        run: |load| warm(load, HTTP1, 1, 1).boxed(),
    },
    Work {
        name: "single-h2",
        title: "one at a time, HTTP/2, one core",
        unit: "req",
        shows: &[AddedHalf, AddedMost],
        on_one_core: true,
        run: |load| warm(load, HTTP2, 1, 1).boxed(),
    },
    Work {
        name: "connect",
        title: "new connections, 4 at a time",
        unit: "conn",
        shows: &[Rate, Show::Cpu, Most],
        on_one_core: false,
        run: |load| connections(load, false).boxed(),
    },
    Work {
        name: "resume",
        title: "resumed connections, 4 at a time",
        unit: "conn",
        shows: &[Rate, Show::Cpu, Most],
        on_one_core: false,
        run: |load| connections(load, true).boxed(),
    },
    Work {
        name: "first",
        title: "first visit to a host",
        unit: "visit",
        shows: &[Half, Show::Cpu],
        on_one_core: false,
        run: |load| first_visits(load).boxed(),
    },
    Work {
        name: "down",
        title: "download, HTTP/1.1",
        unit: "GB",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| download(load, TARGET).boxed(),
    },
    Work {
        name: "up",
        title: "upload, HTTP/1.1",
        unit: "GB",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| upload(load).boxed(),
    },
    Work {
        name: "scrub",
        title: "download, scrubbed",
        unit: "GB",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| download(load, SCRUBBED).boxed(),
    },
    Work {
        name: "events",
        title: "server-sent events, 4 streams",
        unit: "event",
        shows: &[AddedHalf, AddedMost],
        on_one_core: false,
        run: |load| events(load).boxed(),
    },
    Work {
        name: "websocket",
        title: "WebSocket echo, 8 sockets",
        unit: "msg",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| websockets(load).boxed(),
    },
    Work {
        name: TUNNEL,
        title: "tunnel without a rule, download",
        unit: "GB",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| download(load, PLAIN).boxed(),
    },
    Work {
        name: TUNNEL_SMALL,
        title: "tunnel without a rule, requests",
        unit: "req",
        shows: &[Show::Cpu, Rate],
        on_one_core: false,
        run: |load| warm_at(load, PLAIN, HTTP1, 16, 1).boxed(),
    },
];

/// The works that need a way to a host without a rule.
pub(crate) const TUNNEL: &str = "tunnel";
pub(crate) const TUNNEL_SMALL: &str = "tunnel-small";

impl Load {
    /// Who visits the host: in a tunnel without a rule it is the API that is trusted, and the client shows the key.
    fn client(&self, target: &str) -> (Client, bool) {
        if target == PLAIN {
            return (self.way.plain.clone().expect("a way without a rule"), true);
        }
        (self.way.client.clone(), self.way.shown.is_some())
    }

    fn begin(&self) -> Begun {
        let process = self.way.proxy;
        let proxy = process.map(Cpu::of).unwrap_or_default();
        let clock = Turn { began: Instant::now(), time: self.time };
        Begun { clock, own_cpu: machine::own_cpu(), process, proxy }
    }
}

/// How long a turn goes on.
#[derive(Clone, Copy)]
struct Turn {
    began: Instant,
    time: Duration,
}

impl Turn {
    /// Whether it does, with so much done by one worker: it is bounded in time and in count.
    fn goes_on(&self, done: usize) -> bool {
        done < MOST_UNITS && self.began.elapsed() < self.time
    }
}

/// A turn whose preparations are over.
struct Begun {
    clock: Turn,
    own_cpu: f64,
    process: Option<u32>,
    proxy: Cpu,
}

impl Begun {
    fn end(self, units: f64, mut waits: Vec<f64>) -> Done {
        let seconds = self.clock.began.elapsed().as_secs_f64();
        let own_cpu = machine::own_cpu() - self.own_cpu;
        let proxy_cpu = self.process.map_or(0.0, |it| Cpu::of(it).since(&self.proxy));
        waits.sort_by(f64::total_cmp);
        Done { units, seconds, own_cpu, proxy_cpu, waits }
    }
}

/// Sends one small request; how long it took, in microseconds.
async fn ask(connection: &mut Connection, shows: bool) -> f64 {
    let started = Instant::now();
    let answer = connection.send(signed(client::get(SMALL), shows)).await.unwrap();
    let answer = gather(answer).await.unwrap();
    // The API wants the key: without it the answer is 401.
    assert_eq!((answer.status().as_u16(), answer.body().len()), (200, 200));
    started.elapsed().as_secs_f64() * 1e6
}

fn signed(mut request: Request<ClientBody>, shows: bool) -> Request<ClientBody> {
    if shows {
        request.headers_mut().insert(AUTHORIZATION, crate::ways::authorization());
    }
    request
}

pub(crate) async fn warm(load: Load, alpn: Alpn, connections: usize, streams: usize) -> Done {
    warm_at(load, TARGET, alpn, connections, streams).await
}

async fn warm_at(
    load: Load,
    target: &'static str,
    alpn: Alpn,
    connections: usize,
    streams: usize,
) -> Done {
    let (client, shows) = load.client(target);
    let mut workers = Vec::new();
    for _ in 0..connections {
        let mut connection = client.open(Visit::to(target, alpn)).await.unwrap();
        ask(&mut connection, shows).await;
        for _ in 1..streams {
            workers.push(connection.share().expect("HTTP/2 is shared"));
        }
        workers.push(connection);
    }
    let begun = load.begin();
    let clock = begun.clock;
    let waits = all(workers, move |mut connection| async move {
        let mut waits = Vec::new();
        while clock.goes_on(waits.len()) {
            waits.push(ask(&mut connection, shows).await);
        }
        waits
    });
    let waits = waits.await;
    begun.end(waits.len() as f64, waits)
}

async fn connections(load: Load, resumes: bool) -> Done {
    let (client, shows) = load.client(TARGET);
    let mut clients = Vec::new();
    for _ in 0..4 {
        // Each with sessions of its own.
        let client = if resumes { client.resuming() } else { client.clone() };
        visit(&client, TARGET, shows).await;
        clients.push(client);
    }
    let begun = load.begin();
    let clock = begun.clock;
    let waits = all(clients, move |client: Client| async move {
        let mut waits = Vec::new();
        while clock.goes_on(waits.len()) {
            waits.push(visit(&client, TARGET, shows).await);
        }
        waits
    });
    let waits = waits.await;
    begun.end(waits.len() as f64, waits)
}

/// Opens a connection for one request; how long both took, in microseconds.
async fn visit(client: &Client, target: &str, shows: bool) -> f64 {
    let started = Instant::now();
    let mut connection = client.open(Visit::to(target, HTTP1)).await.unwrap();
    ask(&mut connection, shows).await;
    started.elapsed().as_secs_f64() * 1e6
}

async fn first_visits(load: Load) -> Done {
    let (client, shows) = load.client(TARGET);
    let targets: Vec<String> = load.unseen.clone().map(|n| format!("h{n}.{UNSEEN}:443")).collect();
    // The API makes a certificate for a new host too, which is not to be measured.
    for target in &targets {
        visit(&load.straight.client, target, true).await;
    }
    let (begun, mut waits) = (load.begin(), Vec::new());
    for target in &targets {
        waits.push(visit(&client, target, shows).await);
    }
    begun.end(waits.len() as f64, waits)
}

async fn download(load: Load, target: &'static str) -> Done {
    let (client, shows) = load.client(target);
    let path = format!("/v1/bytes/{}", load.bulk);
    let mut connection = client.open(Visit::to(target, HTTP1)).await.unwrap();
    ask(&mut connection, shows).await;
    let (begun, mut files, mut bytes) = (load.begin(), 0, 0);
    while begun.clock.goes_on(files) {
        let answer = connection.send(signed(client::get(&path), shows)).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        while let Some(frame) = body.frame().await {
            bytes += frame.unwrap().data_ref().map_or(0, |data| data.len());
        }
        files += 1;
        assert_eq!(bytes, files * load.bulk);
    }
    begun.end(bytes as f64 / 1e9, Vec::new())
}

async fn upload(load: Load) -> Done {
    let (client, shows) = load.client(TARGET);
    let body = Bytes::from(vec![b'x'; load.bulk]);
    let mut connection = client.open(Visit::to(TARGET, HTTP1)).await.unwrap();
    ask(&mut connection, shows).await;
    let (begun, mut files) = (load.begin(), 0);
    while begun.clock.goes_on(files) {
        let request = signed(client::post("/v1/upload", body.clone()), shows);
        let answer = gather(connection.send(request).await.unwrap()).await.unwrap();
        assert_eq!(answer.status(), 200);
        files += 1;
    }
    begun.end((files * load.bulk) as f64 / 1e9, Vec::new())
}

/// Four streams, on each an event every five milliseconds that says when it was sent.
async fn events(load: Load) -> Done {
    let (client, shows) = load.client(TARGET);
    let count = (load.time.as_millis() / EVENT_EVERY).max(1);
    let path = format!("/v1/sse?n={count}&every_ms={EVENT_EVERY}&stamped=true");
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut connection = client.open(Visit::to(TARGET, HTTP1)).await.unwrap();
        ask(&mut connection, shows).await;
        streams.push((connection, signed(client::get(&path), shows)));
    }
    let begun = load.begin();
    let waits = all(streams, |(mut connection, request): (Connection, _)| async move {
        let answer = connection.send(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let (mut body, mut text, mut waits) = (answer.into_body(), String::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.unwrap();
            let now = stamp();
            text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
            while let Some((event, rest)) = text.split_once("\n\n") {
                let (_, sent) = event.rsplit_once(':').unwrap();
                let sent: u64 = sent.trim_end_matches('}').parse().unwrap();
                waits.push((now - sent) as f64 / 1e3);
                text = rest.to_owned();
            }
        }
        waits
    });
    let waits = waits.await;
    assert_eq!(waits.len() as u128, 4 * count);
    begun.end(waits.len() as f64, waits)
}

async fn websockets(load: Load) -> Done {
    let (client, shows) = load.client(TARGET);
    let mut sockets = Vec::new();
    for _ in 0..8 {
        let tls = client.greet(Visit::to(TARGET, &[])).await.unwrap();
        let mut request = "wss://api.example.com/v1/ws".into_client_request().unwrap();
        if shows {
            request.headers_mut().insert(AUTHORIZATION, crate::ways::authorization());
        }
        // Without the key there is no WebSocket.
        sockets.push(tokio_tungstenite::client_async(request, tls).await.unwrap().0);
    }
    let message = Message::binary(vec![b'w'; 128]);
    let begun = load.begin();
    let clock = begun.clock;
    let waits = all(sockets, move |mut socket| {
        let message = message.clone();
        async move {
            let mut waits = Vec::new();
            while clock.goes_on(waits.len()) {
                let started = Instant::now();
                socket.send(message.clone()).await.unwrap();
                assert_eq!(socket.next().await.unwrap().unwrap(), message);
                waits.push(started.elapsed().as_secs_f64() * 1e6);
            }
            waits
        }
    });
    let waits = waits.await;
    begun.end(waits.len() as f64, waits)
}

/// Opens connections that stay, each of which has served one request; those of [`PLAIN`] are tunnels without a rule.
pub(crate) async fn held(way: &Way, target: &'static str, count: usize) -> Vec<Connection> {
    let load = Load {
        way: way.clone(),
        straight: way.clone(),
        time: Duration::ZERO,
        bulk: 0,
        unseen: 0..0,
    };
    let (client, shows) = load.client(target);
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = client.open(Visit::to(target, HTTP1)).await.unwrap();
        ask(&mut connection, shows).await;
        held.push(connection);
    }
    held
}

/// Has each worker do its part beside the others; how long all that they did took.
async fn all<W, F>(workers: Vec<W>, work: impl Fn(W) -> F) -> Vec<f64>
where
    F: Future<Output = Vec<f64>> + Send + 'static,
{
    let tasks = Tasks::new();
    let running: Vec<_> = workers.into_iter().map(|worker| tasks.spawn(work(worker))).collect();
    let mut waits = Vec::new();
    for worker in running {
        waits.extend(worker.await.unwrap());
    }
    waits
}

/// What is offered to speak.
type Alpn = &'static [&'static [u8]];

/// What a small answer is: that of an API that says little.
const SMALL: &str = "/v1/bytes/200";

/// Between two events of a stream; tokens of a model come about so fast.
const EVENT_EVERY: u128 = 5;

/// More than any worker does in a turn on any machine.
const MOST_UNITS: usize = 1_000_000;
