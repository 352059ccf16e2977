//! What clients may take of the proxy: a place, a head, a time, streams, wrong passes; and what it does to the others.

#![expect(clippy::disallowed_methods, reason = "the tests play clients")]

use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use valetkey::access::{PassRecord, Reach};
use valetkey::limits::Limits;
use valetkey::sandbox::Settings;
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Visit};
use valetkey::secret::Secret;

use super::support::{CHATGPT, EXAMPLE, OTHER, Options, Scene, within};
use super::wire::{PING, SETTINGS, Wire, frame};

const PASS: &str = "vkp_of-a-test";

fn record() -> PassRecord {
    PassRecord {
        name: "ci".parse().unwrap(),
        digest: Secret::new(PASS).fingerprint(),
        reach: Reach::default(),
        created: time::OffsetDateTime::now_utc(),
        expires: None,
        max_requests: None,
        used: 0,
    }
}

fn connect_showing(pass: &str) -> String {
    let shown = STANDARD.encode(format!("ci:{pass}"));
    format!(
        "CONNECT {EXAMPLE} HTTP/1.1\r\nHost: {EXAMPLE}\r\nProxy-Authorization: Basic {shown}\r\n\r\n"
    )
}

/// Sends a head, and gives what comes back.
async fn ask(stream: &mut TcpStream, head: &str) -> String {
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut answer, mut length) = (Vec::new(), None);
    loop {
        let text = String::from_utf8_lossy(&answer).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let field = |line: &str| {
                line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned)
            };
            let found = head.lines().find_map(field).map_or(0, |text| text.parse().unwrap());
            if body.len() >= *length.get_or_insert(found) {
                return text;
            }
        }
        assert_ne!(within(stream.read_buf(&mut answer)).await.unwrap(), 0, "{text}");
    }
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// The end of a connection in which nothing is said.
async fn cut(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let _reset = within(stream.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
}

async fn holds(stream: &TcpStream) {
    let mut nothing = [0; 1];
    let looked = tokio::time::timeout(Duration::from_millis(100), stream.peek(&mut nothing)).await;
    assert!(looked.is_err(), "it was cut: {looked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_too_many_waits_until_one_has_gone() {
    let scene = Scene::usual().await;
    scene.proxy.limit(Limits { connections: 2, ..Limits::USUAL });
    // Both are in tunnels, in which the tunnel's own connection has long ended: one intercepted, one not.
    let intercepted = scene.client.open(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let tunnelled = scene.client.tunnel(OTHER).await.unwrap();
    let asking = scene.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x");
    let mut asking = Box::pin(asking);
    let early = tokio::time::timeout(Duration::from_millis(300), asking.as_mut()).await;
    assert!(early.is_err(), "there was a third place: {early:?}");
    drop(tunnelled);
    assert_eq!(within(asking).await.unwrap().status(), 200);
    // More of them are for those who wait already.
    let second = scene.client.tunnel(OTHER).await.unwrap();
    let mut asking = Box::pin(scene.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x"));
    assert!(tokio::time::timeout(Duration::from_millis(300), asking.as_mut()).await.is_err());
    scene.proxy.limit(Limits { connections: 3, ..Limits::USUAL });
    assert_eq!(within(asking).await.unwrap().status(), 200);
    drop((intercepted, second));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_keeps_its_place() {
    let scene = Scene::usual().await;
    scene.proxy.limit(Limits { connections: 1, ..Limits::USUAL });
    let tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let url = "wss://chatgpt.com/backend-api/codex/ws";
    let (socket, _) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
    let mut asking = Box::pin(scene.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x"));
    assert!(tokio::time::timeout(Duration::from_millis(300), asking.as_mut()).await.is_err());
    drop(socket);
    assert_eq!(within(asking).await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_hold_places_make_room_for_one_with_a_pass() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    scene.passes.replace(vec![record()], &[]);
    scene.proxy.limit(Limits { strangers: 3, ..Limits::USUAL });
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // An answer says that it was taken in.
        assert_eq!(status(&ask(&mut stream, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await), 407);
        silent.push(stream);
    }
    let mut guest = TcpStream::connect(address).await.unwrap();
    assert_eq!(status(&ask(&mut guest, &connect_showing(PASS)).await), 200);
    cut(&mut silent[0]).await;
    holds(&silent[1]).await;
    // Who has shown a pass is a stranger no more, and keeps its place whoever comes.
    for _ in 0..10 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(status(&ask(&mut stream, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await), 407);
    }
    holds(&guest).await;
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_keep_nobody_out_when_every_place_is_taken() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    let head_time = Duration::from_secs(3600);
    scene.proxy.limit(Limits { connections: 3, strangers: 1, head_time, ..Limits::USUAL });
    let tunnels =
        [scene.client.tunnel(OTHER).await.unwrap(), scene.client.tunnel(OTHER).await.unwrap()];
    let mut stranger = TcpStream::connect(address).await.unwrap();
    assert_eq!(status(&ask(&mut stranger, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await), 407);
    let mut more = Vec::new();
    for _ in 0..3 {
        more.push(TcpStream::connect(address).await.unwrap());
    }
    let asking = scene.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x");
    assert_eq!(within(asking).await.unwrap().status(), 200);
    cut(&mut stranger).await;
    drop(tunnels);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_passes_are_counted_and_a_right_one_counts_all_the_same() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    scene.passes.replace(vec![record()], &[]);
    scene.proxy.limit(Limits { wrong_passes: 3, ..Limits::USUAL });
    let mut stream = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        assert_eq!(status(&ask(&mut stream, &connect_showing("vkp_wrong")).await), 407);
    }
    let looks = || scene.looks.load(Ordering::Relaxed);
    let before = looks();
    for _ in 0..100 {
        let answer = ask(&mut stream, &connect_showing("vkp_wrong")).await;
        assert_eq!(status(&answer), 429);
        assert!(answer.contains("x-valetkey-error: wrong_passes"), "{answer}");
        assert!(answer.contains("retry-after: 60"), "{answer}");
    }
    assert_eq!(looks(), before, "the place of the passes was looked at");
    // Without a pass it is what it was, and the right one opens the door.
    assert_eq!(status(&ask(&mut stream, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await), 407);
    assert_eq!(status(&ask(&mut stream, &connect_showing(PASS)).await), 200);
    assert_eq!(looks(), before + 1, "and is still looked for before it counts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_ends_the_connection() {
    let scene = Scene::usual().await;
    scene.proxy.limit(Limits { head_time: Duration::from_secs(1), ..Limits::USUAL });
    for begun in ["", "CONNECT "] {
        let mut stream = TcpStream::connect(scene.address).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        cut(&mut stream).await;
    }
    // One that comes in drops, each soon after the last.
    let (mut reader, mut writer) = TcpStream::connect(scene.address).await.unwrap().into_split();
    let dripping = async {
        for drop in b"CONNECT a:443 HTTP/1.1\r\nX: ".iter().chain(std::iter::repeat(&b'x')) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if writer.write_all(&[*drop]).await.is_err() {
                return;
            }
        }
    };
    let mut rest = Vec::new();
    let (_, _reset) = within(async { tokio::join!(dripping, reader.read_to_end(&mut rest)) }).await;
    assert!(rest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_does_not_come_ends_the_tunnel() {
    let scene = Scene::usual().await;
    scene.proxy.limit(Limits { handshake_time: Duration::from_secs(1), ..Limits::USUAL });
    for begun in [&b""[..], &[22], &[22, 3, 1, 2, 0, 1]] {
        let mut tunnel = scene.client.tunnel(EXAMPLE).await.unwrap();
        tunnel.write_all(begun).await.unwrap();
        cut(&mut tunnel).await;
    }
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_has_its_size() {
    let scene = Scene::usual().await;
    scene.proxy.limit(Limits { head_size: 16 * 1024, ..Limits::USUAL });
    let with = |size| format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(size));
    for (size, expected) in [(15 * 1024, 403), (17 * 1024, 431)] {
        let mut stream = TcpStream::connect(scene.address).await.unwrap();
        let answer = ask(&mut stream, &with(size)).await;
        assert_eq!(status(&answer), expected, "{size}");
        assert_eq!(answer.contains("`head_size` in [limits]"), expected == 431, "{answer}");
        for alpn in [HTTP1, HTTP2] {
            let mut request = client::get("/v1/x");
            request.headers_mut().insert("x", "x".repeat(size).parse().unwrap());
            let answer =
                within(scene.client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap();
            let expected = if expected == 403 { 200 } else { expected };
            assert_eq!(answer.status(), expected, "{size}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_clients_are_told_their_limits() {
    let scene = Scene::usual().await;
    let limits = Limits { streams: 7, stream_window: 32_768, head_size: 16_384, ..Limits::USUAL };
    scene.proxy.limit(limits);
    let tls = scene.client.greet(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
    let mut wire = Wire::client(tls).await.unwrap();
    let told = within(wire.read_to(SETTINGS)).await.unwrap().payload;
    let setting = |number: u16| {
        let mut all = told.chunks(6).map(|it| it.split_at(2));
        let found = all.find(|(id, _)| *id == number.to_be_bytes());
        found.map(|(_, value)| u32::from_be_bytes(value.try_into().unwrap()))
    };
    // MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE (RFC 9113 section 6.5.2).
    assert_eq!([3, 4, 6].map(setting), [Some(7), Some(32_768), Some(16_384)]);
    within(wire.write(&frame(PING, 0, 0, b"12345678"))).await.unwrap();
    assert_eq!(within(wire.read_to(PING)).await.unwrap().payload, b"12345678");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_has_as_many_interim_responses_as_it_may() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peers = vec![("peer.example.com".to_owned(), listener.local_addr().unwrap())];
    let settings = Settings { peers, ..Settings::default() };
    let rules = "[[rules]]\nhost = \"peer.example.com\"\ncredential = \"example\"\n".to_owned();
    let scene = Scene::start(Options { settings, rules, ..Options::default() }).await;
    scene.proxy.limit(Limits { interim_responses: 2, ..Limits::USUAL });
    for (count, expected) in [(2, 200), (3, 502)] {
        let asked = scene.client.get(Visit::to("peer.example.com:443", HTTP1), "/v1/x");
        let answering = async {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = scene.world.acceptor(HTTP1).unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
            }
            let interim = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(count);
            let last = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _given_up = stream.write_all((interim + last).as_bytes()).await;
            let _given_up = stream.flush().await;
            let _end = stream.read_to_end(&mut head).await;
        };
        let both = Box::pin(async { tokio::join!(asked, answering) });
        let (answer, ()) = within(both).await;
        assert_eq!(answer.unwrap().status(), expected, "{count}");
    }
}

/// What a listener of strangers has is its own: everybody else is let in beside them.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_cost_the_user_nothing() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    scene.proxy.limit(Limits { connections: 8, strangers: 2, ..Limits::USUAL });
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(within(TcpStream::connect(address)).await.unwrap());
    }
    // One of those may come to the door after one that asks, and takes its place once.
    let mut is_heard = false;
    for _ in 0..=silent.len() {
        let mut asking = within(TcpStream::connect(address)).await.unwrap();
        let asked = asking.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut answer = [0; 13];
        is_heard = asked.is_ok()
            && within(asking.read_exact(&mut answer)).await.is_ok()
            && answer == *b"HTTP/1.1 407 ";
        if is_heard {
            break;
        }
    }
    assert!(is_heard, "no stranger was");
    scene.assert_alive().await;
}
