//! Measures what the proxy costs: the same work straight to the pretend API and through `valetkey serve`, in
//! turns, printed as ratios. The load and the API share this process; the proxy is a process of its own.
//!
//! `cargo bench --bench end_to_end [-- --quick]`

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and may fail by panicking"
)]

use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt as _, join_all};
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Visit};
use valetkey::sandbox::{Settings, World};
use valetkey::secret::Secret;

const TARGET: &str = "api.example.com:443";
const KEY: &str = "vk-canary-benchmark-key";

/// One kind of work: how much of it was done in the time given.
struct Work {
    name: &'static str,
    unit: &'static str,
    run: fn(Client, Duration) -> BoxFuture<'static, f64>,
}

const WORKS: [Work; 9] = [
    Work {
        name: "warm requests, HTTP/1.1, 16 connections",
        unit: "req/s",
        run: |c, t| warm(c, t, HTTP1, 16, 1).boxed(),
    },
    Work {
        name: "warm requests, HTTP/2, 16 streams",
        unit: "req/s",
        run: |c, t| warm(c, t, HTTP2, 1, 16).boxed(),
    },
    Work {
        name: "one at a time, HTTP/1.1",
        unit: "req/s",
        run: |c, t| warm(c, t, HTTP1, 1, 1).boxed(),
    },
    Work {
        name: "one at a time, HTTP/2",
        unit: "req/s",
        run: |c, t| warm(c, t, HTTP2, 1, 1).boxed(),
    },
    Work {
        name: "new connections, 4 at a time",
        unit: "conn/s",
        run: |c, t| connections(c, t).boxed(),
    },
    Work { name: "download, HTTP/1.1", unit: "MB/s", run: |c, t| download(c, t, HTTP1).boxed() },
    Work { name: "upload, HTTP/1.1", unit: "MB/s", run: |c, t| upload(c, t).boxed() },
    Work { name: "server-sent events", unit: "events/s", run: |c, t| events(c, t).boxed() },
    Work { name: "WebSocket echo", unit: "msg/s", run: |c, t| websocket(c, t).boxed() },
];

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (rounds, time) = if quick { (3, 300) } else { (5, 1000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(compare(rounds, Duration::from_millis(time)));
}

async fn compare(rounds: usize, time: Duration) {
    let world = World::start(Settings { record: false, ..Settings::default() }).await.unwrap();
    world.api().accept(Secret::new(KEY));
    let proxy = Serving::start(&world).await;
    let through = Client::through(proxy.address, &proxy.roots).unwrap();
    let straight = Client::straight_to(world.resolve()[0].1, world.ca_file()).unwrap();
    // The credential arrives, and only through the proxy; from here on every answer is counted only if 200.
    world.api().require_login(true);
    let status = async |client: &Client| {
        client.get(Visit::to(TARGET, HTTP1), "/v1/x").await.unwrap().status()
    };
    assert_eq!(
        (status(&straight).await, status(&through).await),
        (401.try_into().unwrap(), 200.try_into().unwrap())
    );
    world.api().require_login(false);

    println!(
        "{:<42} {:>10} {:>10} {:>7} {:>13} {:>16}",
        "", "direct", "through", "ratio", "spread", "proxy CPU"
    );
    for work in &WORKS {
        let mut pairs = Vec::new();
        let (mut cpu, mut done) = (0.0, 0.0);
        // One unmeasured turn each warms connections up.
        (work.run)(straight.clone(), time / 4).await;
        (work.run)(through.clone(), time / 4).await;
        for round in 0..rounds {
            let mut pair = [0.0; 2];
            // A, B, B, A: what drifts hits both alike.
            for turn in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let before = proxy.cpu();
                let rate = (work.run)([&straight, &through][turn].clone(), time).await;
                pair[turn] = rate;
                if turn == 1 {
                    cpu += proxy.cpu() - before;
                    done += rate * time.as_secs_f64();
                }
            }
            pairs.push(pair);
        }
        let median = |of: &dyn Fn(&[f64; 2]) -> f64| {
            let mut all: Vec<f64> = pairs.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            (all[all.len() / 2], all[0], all[all.len() - 1])
        };
        let (ratio, low, high) = median(&|[direct, through]| through / direct);
        let per = cpu / done;
        let cost = match work.unit {
            "MB/s" => format!("{:.2} s/GB", per * 1e3),
            _ => format!("{:.1} us each", per * 1e6),
        };
        let (direct, through) = (median(&|pair| pair[0]).0, median(&|pair| pair[1]).0);
        println!(
            "{:<42} {direct:>10.0} {through:>10.0} {ratio:>7.2} {:>13} {cost:>16}  {}",
            work.name,
            format!("{low:.2}-{high:.2}"),
            work.unit
        );
    }
}

/// `valetkey serve`, which ends with this.
struct Serving {
    address: SocketAddr,
    roots: std::path::PathBuf,
    child: Child,
    _home: tempfile::TempDir,
}

impl Serving {
    async fn start(world: &World) -> Self {
        let home = tempfile::tempdir().unwrap();
        let key = home.path().join("key");
        fs::write(&key, KEY).unwrap();
        let config = home.path().join("config.toml");
        let text = format!(
            "[credentials.bench]\nkind = \"api_key\"\nsource = \"file:{}\"\n[[rules]]\n\
             host = \"api.example.com\"\ncredential = \"bench\"\n{}",
            key.display(),
            world.upstream_toml()
        );
        fs::write(&config, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_valetkey"))
            .args(["--log", "warn", "serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&config)
            .env("HOME", home.path())
            .env("XDG_RUNTIME_DIR", home.path().join("run"))
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = said.next_line().await.unwrap().expect("the proxy did not start");
            if let Some(address) = line.strip_prefix("listening on http://") {
                break address.parse().unwrap();
            }
        };
        let roots = home.path().join("run/valetkey/ca.pem");
        Self { address, roots, child, _home: home }
    }

    /// Seconds of CPU so far, user and system: fields 14 and 15 of `/proc/PID/stat`, 100 to the second.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id().unwrap()));
        let stat = stat.unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ticks: f64 = fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum();
        ticks / 100.0
    }
}

async fn warm(
    client: Client,
    time: Duration,
    alpn: &'static [&'static [u8]],
    connections: usize,
    streams: usize,
) -> f64 {
    let started = Instant::now();
    let workers = (0..connections).map(|_| {
        let client = client.clone();
        async move {
            let mut connection = client.open(Visit::to(TARGET, alpn)).await.unwrap();
            if streams == 1 {
                let mut count = 0;
                while started.elapsed() < time {
                    assert_eq!(connection.get("/v1/bytes/200").await.unwrap().status(), 200);
                    count += 1;
                }
                return count;
            }
            let streams = (0..streams).map(|_| {
                let mut stream = connection.share().expect("HTTP/2 is shared");
                async move {
                    let mut count = 0;
                    while started.elapsed() < time {
                        assert_eq!(stream.get("/v1/bytes/200").await.unwrap().status(), 200);
                        count += 1;
                    }
                    count
                }
            });
            join_all(streams).await.into_iter().sum::<usize>()
        }
    });
    let count: usize = join_all(workers).await.into_iter().sum();
    count as f64 / started.elapsed().as_secs_f64()
}

async fn connections(client: Client, time: Duration) -> f64 {
    let started = Instant::now();
    let workers = (0..4).map(|_| {
        let client = client.clone();
        async move {
            let mut count = 0;
            while started.elapsed() < time {
                let answer = client.get(Visit::to(TARGET, HTTP1), "/v1/bytes/200").await.unwrap();
                assert_eq!(answer.status(), 200);
                count += 1;
            }
            count
        }
    });
    let count: usize = join_all(workers).await.into_iter().sum();
    count as f64 / started.elapsed().as_secs_f64()
}

async fn download(client: Client, time: Duration, alpn: &'static [&'static [u8]]) -> f64 {
    let (started, mut bytes) = (Instant::now(), 0);
    let mut connection = client.open(Visit::to(TARGET, alpn)).await.unwrap();
    while started.elapsed() < time {
        let answer = connection.send(client::get("/v1/bytes/33554432")).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        while let Some(frame) = body.frame().await {
            bytes += frame.unwrap().data_ref().map_or(0, |data| data.len());
        }
    }
    bytes as f64 / 1e6 / started.elapsed().as_secs_f64()
}

async fn upload(client: Client, time: Duration) -> f64 {
    let body = bytes::Bytes::from(vec![b'x'; 32 << 20]);
    let (started, mut bytes) = (Instant::now(), 0);
    let mut connection = client.open(Visit::to(TARGET, HTTP1)).await.unwrap();
    while started.elapsed() < time {
        let answer = connection.send(client::post("/v1/upload", body.clone())).await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.into_body().collect().await.unwrap();
        bytes += body.len();
    }
    bytes as f64 / 1e6 / started.elapsed().as_secs_f64()
}

async fn events(client: Client, time: Duration) -> f64 {
    let (started, mut count) = (Instant::now(), 0);
    let mut connection = client.open(Visit::to(TARGET, HTTP1)).await.unwrap();
    while started.elapsed() < time {
        // Every event is sent by itself, as soon as the one before has left.
        let answer = connection.send(client::get("/v1/sse?n=500&every_ms=0")).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        count += body.windows(12).filter(|window| window == b"event: tick\n").count();
    }
    count as f64 / started.elapsed().as_secs_f64()
}

async fn websocket(client: Client, time: Duration) -> f64 {
    let tls = client.greet(Visit::to(TARGET, &[])).await.unwrap();
    let url = "wss://api.example.com/v1/ws";
    let (mut socket, _) = tokio_tungstenite::client_async(url, tls).await.unwrap();
    let (started, mut count) = (Instant::now(), 0);
    let message = Message::text("x".repeat(200));
    while started.elapsed() < time {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
        count += 1;
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}
