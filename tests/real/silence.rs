//! Streams that say nothing for long are never cut: not by a timer of ours, and not by a refresh.
//!
//! The timers that we own, none of which may count here: 10 s each for a client's TLS handshake, for the head of a
//! CONNECT, for TCP and for the upstream's handshake, 20 s for a name, 30 s for the chain, 50 s for an idle
//! upstream connection, 60 s for the answer to a handshake and for TCP keep-alive, 15 and 30 s for HTTP/2's pings, 30 s
//! for the second half of a tunnel, 180 s for an idle HTTP/1.1 connection of a client. (30 minutes for the head of a
//! response begin before there is a stream.)

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Visit};

use super::served::{Serving, extended_connect};
use super::support::{Scene, option_env_now};

const CHATGPT: &str = "chatgpt.com:443";
const TUNNELLED: &str = "other.example.com:443";
const CODEX: &str = "/backend-api/codex";

/// Longer than every timer above; an hour with `VALETKEY_TEST_SILENCE=3600 tests/run silent`.
fn silence() -> Duration {
    let asked = option_env_now("VALETKEY_TEST_SILENCE").and_then(|text| text.parse().ok());
    Duration::from_secs(asked.unwrap_or(200))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
type Socket = WebSocketStream<Box<dyn Stream>>;

async fn over_http1(client: &Client, target: &str) -> Socket {
    let tls = client.greet(Visit::to(target, HTTP1)).await.unwrap();
    let (host, _) = target.split_once(':').unwrap();
    let stream: Box<dyn Stream> = Box::new(tls);
    let url = format!("wss://{host}{CODEX}/ws");
    Box::pin(tokio_tungstenite::client_async(url, stream)).await.unwrap().0
}

async fn over_http2(client: &Client) -> Socket {
    let answer = extended_connect(client, CHATGPT, &format!("{CODEX}/ws")).await;
    assert_eq!(answer.status(), 200);
    let io = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let stream: Box<dyn Stream> = Box::new(io);
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

async fn echo(socket: &mut Socket) {
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));
}

async fn events(client: &Client, alpn: &[&[u8]]) -> Incoming {
    let request = client::get(&format!("{CODEX}/sse?n=2"));
    let mut events = client.send(Visit::to(CHATGPT, alpn), request).await.unwrap().into_body();
    event(&mut events, 0).await;
    events
}

async fn event(events: &mut Incoming, number: u32) {
    let event = events.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(event.starts_with(format!("id: {number}\n").as_bytes()), "{event:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_silent_for_long_goes_on() {
    let scene = Scene::usual().await;
    // Nobody signs in what is tunnelled.
    scene.world.api().require_login(false);
    let serving = Serving::start(&scene).await;
    let client = serving.client_in(&scene);
    let mut sockets = [
        over_http1(&client, CHATGPT).await,
        over_http2(&client).await,
        over_http1(&client, TUNNELLED).await,
    ];
    for socket in &mut sockets {
        echo(socket).await;
    }
    let mut streams = [events(&client, HTTP1).await, events(&client, HTTP2).await];

    // The token that opened them is replaced meanwhile.
    let half = silence() / 2;
    tokio::time::sleep(half).await;
    let path = format!("{CODEX}/401-until-refreshed");
    let repaired = client.get(Visit::to(CHATGPT, HTTP1), &path).await.unwrap();
    assert_eq!(repaired.status(), 200);
    assert_eq!(scene.world.issuer().refreshes(), 1);
    tokio::time::sleep(half).await;

    for socket in &mut sockets {
        echo(socket).await;
    }
    for stream in &mut streams {
        scene.world.api().release_event();
        event(stream, 1).await;
    }
    println!("silent for {} s", silence().as_secs());
}
