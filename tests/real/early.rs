//! What a client sends before its WebSocket is open: some of it is held, none of it is lost, and a refusal ends it all.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{join, join_all};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use valetkey::sandbox::client::{Client, HTTP1, Visit};
use valetkey::tasks::Tasks;

use super::served::Serving;
use super::support::{LIMIT, Scene};

const EXAMPLE: &str = "api.example.com:443";

/// The key of RFC 6455 section 1.2.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

const CLIENTS: usize = 40;

/// What each client would like to send early.
const EAGER: usize = 1 << 20;

/// For each client: what is held of it (64 KiB), the same again for what holds it, and once more for the rest of a
/// connection.
const MOST_HELD: u64 = (CLIENTS * 64 * 1024 * 3) as u64;

fn handshake(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: api.example.com\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    )
}

/// The head of an answer, and what of the rest came with it.
async fn head(from: &mut (impl AsyncRead + Unpin)) -> (String, Vec<u8>) {
    let mut read = Vec::new();
    loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = read.split_off(end + 4);
            return (String::from_utf8(read).unwrap(), rest);
        }
        assert_ne!(from.read_buf(&mut read).await.unwrap(), 0, "no answer: {read:?}");
    }
}

/// What a process has in memory, in bytes.
fn resident(pid: u64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

async fn within<T>(what: &str, doing: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, Box::pin(doing))
        .await
        .unwrap_or_else(|_| panic!("{what}: it hangs"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_early_is_held_in_part_and_gone_on_refusal() {
    let scene = Scene::usual().await;
    let serving = Serving::start(&scene).await;
    let (client, api) = (serving.client(), scene.world.api());
    let visit = Visit::to(EXAMPLE, HTTP1);
    let open = || async {
        let tls = client.greet(visit).await.unwrap();
        let (from, mut to) = tokio::io::split(tls);
        to.write_all(handshake("/v1/ws-refused-late/403").as_bytes()).await.unwrap();
        // TLS keeps the last of it where this task's turn was over before the socket had taken it.
        to.flush().await.unwrap();
        (from, to)
    };
    // What the first of everything costs is none of theirs.
    let mut first = open().await;
    within("the first handshake", api.wait_for(1)).await;
    api.release();
    assert!(within("the first answer", head(&mut first.0)).await.0.starts_with("HTTP/1.1 403"));
    drop(first);
    api.clear();

    let opened = join_all((0..CLIENTS).map(|_| open())).await;
    within("the handshakes", api.wait_for(CLIENTS)).await;
    let info: Value =
        serde_json::from_slice(&fs::read(scene.path("serving.json")).unwrap()).unwrap();
    let pid = info["pid"].as_u64().unwrap();
    let before = resident(pid);
    // To whoever takes it for requests it is requests.
    let smuggled = "GET /v1/smuggled HTTP/1.1\r\nHost: api.example.com\r\n\r\n";
    let eager: Arc<[u8]> = smuggled.bytes().cycle().take(EAGER).collect();
    let taken = Arc::<AtomicUsize>::default();
    let tasks = Tasks::new();
    let (readers, writers): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
    for mut to in writers {
        let (eager, taken) = (eager.clone(), taken.clone());
        tasks.spawn(async move {
            for piece in eager.chunks(16 * 1024) {
                // The refusal may end it.
                if to.write_all(piece).await.is_err() || to.flush().await.is_err() {
                    break;
                }
                taken.fetch_add(piece.len(), Ordering::Relaxed);
            }
            // Alive until the answer has been read.
            to
        });
    }
    stands_still(&taken, &client).await;
    let grown = resident(pid).saturating_sub(before);
    println!(
        "{CLIENTS} clients were rid of {:.1} MiB, and the process has grown by {:.2} MiB",
        taken.load(Ordering::Relaxed) as f64 / f64::from(1 << 20),
        grown as f64 / f64::from(1 << 20)
    );
    assert!(taken.load(Ordering::Relaxed) > CLIENTS * 64 * 1024, "nobody has sent anything");
    assert!(grown < MOST_HELD, "{grown} bytes");

    (0..CLIENTS).for_each(|_| api.release());
    let answers = join_all(readers.into_iter().map(|mut from| async move {
        let (head, mut body) = head(&mut from).await;
        // It may end with a reset, because of what nobody has read.
        let _reset = from.read_to_end(&mut body).await;
        (head, body)
    }));
    for (head, body) in within("the refusals", answers).await {
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        assert!(!head.contains("x-valetkey-error"), "{head}");
        assert_eq!(body, b"403 Forbidden");
    }
    within("the writers", tasks.finished()).await;
    let seen = api.seen();
    let others: Vec<_> = seen.iter().filter(|seen| seen.path != "/v1/alive").collect();
    assert_eq!(others.len(), CLIENTS, "{others:?}");
    for seen in others {
        assert_eq!((seen.path.as_str(), seen.request.bytes), ("/v1/ws-refused-late/403", 0));
    }
}

/// Waits until nothing more is taken while others are served two hundred times.
async fn stands_still(taken: &AtomicUsize, client: &Client) {
    let (mut last, mut still) = (0, 0);
    while still < 200 {
        let alive = client.get(Visit::to(EXAMPLE, HTTP1), "/v1/alive");
        assert_eq!(within("others", alive).await.unwrap().status(), 200);
        let now = taken.load(Ordering::Relaxed);
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
}

/// The frame of a client's message, masked with nothing (RFC 6455 section 5.2).
fn masked(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[0x82, 0x80 | 126][..], &length, &[0; 4], payload].concat()
}

/// As the server sends it.
fn plain(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[0x82, 126][..], &length, payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_early_comes_first_once_the_websocket_is_open() {
    let scene = Scene::usual().await;
    let serving = Serving::start(&scene).await;
    let tls = serving.client().greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let (mut from, mut to) = tokio::io::split(tls);
    // Four times what is held.
    let messages: Vec<_> = (0..256_u32).map(|number| number.to_be_bytes().repeat(256)).collect();
    let frames = messages.iter().flat_map(|message| masked(message));
    // The handshake and what is early leave in one piece, before there can be an answer.
    let all: Vec<u8> = handshake("/v1/ws").into_bytes().into_iter().chain(frames).collect();
    let writing = async {
        to.write_all(&all).await.unwrap();
        to.flush().await.unwrap();
    };
    let reading = async {
        let (head, mut echoed) = head(&mut from).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains(&derive_accept_key(KEY.as_bytes())), "{head}");
        let expected = messages.iter().flat_map(|message| plain(message)).collect::<Vec<_>>();
        while echoed.len() < expected.len() {
            assert_ne!(from.read_buf(&mut echoed).await.unwrap(), 0, "it ended");
        }
        assert!(echoed == expected, "what came early was lost, doubled or mixed up");
        println!("{} bytes of messages came back in order", echoed.len());
    };
    within("the messages", join(writing, reading)).await;
}
