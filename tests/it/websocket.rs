//! A WebSocket is signed in at its handshake, over HTTP/1.1 and HTTP/2, and is bytes after that, until
//! its peers or the proxy close it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Request};
use hyper::ext::Protocol;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Error, Message};
use valetkey::credential::LoginKind;
use valetkey::policy::Level;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Visit};

use super::support::{CHATGPT, EXAMPLE, Options, Scene, refusal, within};

async fn echoes<S: AsyncRead + AsyncWrite + Unpin>(mut socket: WebSocketStream<S>) {
    for message in [Message::text("hello"), Message::binary(vec![7; 300_000]), Message::text("")] {
        within(socket.send(message.clone())).await.unwrap();
        assert_eq!(within(socket.next()).await.unwrap().unwrap(), message);
    }
    // The other end may have let go of the stream before our own goodbye is out.
    if within(socket.close(None)).await.is_ok() {
        assert!(!matches!(
            within(socket.next()).await,
            Some(Ok(Message::Text(_) | Message::Binary(_)))
        ));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http1_with_and_without_alpn() {
    let scene = Scene::expired().await;
    scene.world.api().require_login(true);
    for alpn in [&[][..], HTTP1] {
        let tls = scene.client.greet(Visit::to(CHATGPT, alpn)).await.unwrap();
        let url = "wss://chatgpt.com/backend-api/codex/ws";
        let (socket, answer) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
        assert_eq!(answer.status(), 101);
        Box::pin(echoes(socket)).await;
    }
    assert_eq!(scene.world.issuer().refreshes(), 1, "the expired token was not sent");
    assert!(
        scene.world.api().seen().iter().all(|seen| seen.headers.contains_key("chatgpt-account-id"))
    );
}

/// An HTTP/2 connection to a host that can ask for extended CONNECT.
pub(crate) async fn http2(
    client: &Client,
    target: &str,
) -> hyper::client::conn::http2::SendRequest<client::ClientBody> {
    let tls = client.greet(Visit::to(target, HTTP2)).await.unwrap();
    let tasks = valetkey::tasks::Tasks::new();
    let io = TokioIo::new(tls);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(tasks.clone(), io).await.unwrap();
    tasks.spawn(connection);
    // The first answer comes after the server's settings, which allow it.
    let (host, _) = target.split_once(':').unwrap();
    let mut first = client::get("/");
    *first.uri_mut() = format!("https://{host}/v1/first").parse().unwrap();
    within(sender.send_request(first)).await.unwrap();
    sender
}

pub(crate) fn extended_connect(path: &str) -> Request<client::ClientBody> {
    let mut request = client::get("/");
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = format!("https://chatgpt.com{path}").parse().unwrap();
    request.headers_mut().insert("sec-websocket-version", "13".parse().unwrap());
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http2_by_extended_connect() {
    let scene = Scene::usual().await;
    let mut sender = http2(&scene.client, CHATGPT).await;
    let answer =
        within(sender.send_request(extended_connect("/backend-api/codex/ws"))).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.headers().contains_key("sec-websocket-accept"));
    let upgraded = within(hyper::upgrade::on(answer)).await.unwrap();
    let io = TokioIo::new(upgraded);
    Box::pin(echoes(WebSocketStream::from_raw_socket(io, Role::Client, None).await)).await;
    let seen = scene.world.api().seen().pop().unwrap();
    assert_eq!((seen.method, seen.version), (Method::GET, http::Version::HTTP_11));
    assert_eq!(seen.headers.get_all("authorization").iter().count(), 1);

    let refused =
        within(sender.send_request(extended_connect("/backend-api/codex/ws-refused/403"))).await;
    assert_eq!(refused.unwrap().status(), 403);
    let mut other = extended_connect("/backend-api/codex/ws");
    other.extensions_mut().insert(Protocol::from_static("connect-udp"));
    let answer = within(sender.send_request(other)).await.unwrap();
    assert_eq!(answer.headers()["x-valetkey-error"], "target_forbidden");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_passes_and_what_came_early_is_never_a_tunnel() {
    let scene = Scene::usual().await;
    for status in [401, 403, 404, 426, 429, 500] {
        let tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
        let url = format!("wss://api.example.com/v1/ws-refused/{status}");
        match Box::pin(tokio_tungstenite::client_async(&url, tls)).await {
            Err(Error::Http(answer)) => {
                assert_eq!(answer.status(), status);
                assert!(!answer.headers().contains_key("x-valetkey-error"), "{status}");
            }
            other => panic!("{status}: {:?}", other.err()),
        }
    }
    scene.world.api().clear();
    let mut tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let early = "GET /backend-api/codex/smuggled HTTP/1.1\r\nHost: chatgpt.com\r\n\r\n";
    let upgrade = "GET /backend-api/codex/ws-refused/403 HTTP/1.1\r\nHost: chatgpt.com\r\n\
                   Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    tls.write_all(format!("{upgrade}{early}").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _reset = within(tls.read_to_end(&mut answer)).await;
    assert!(answer.starts_with(b"HTTP/1.1 403"));
    let paths: Vec<_> = scene.world.api().seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/backend-api/codex/ws-refused/403"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_401_on_the_handshake_is_repaired() {
    let scene = Scene::usual().await;
    let tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let url = "wss://chatgpt.com/backend-api/codex/ws-refused/401";
    let outcome = Box::pin(tokio_tungstenite::client_async(url, tls)).await;
    assert!(matches!(outcome, Err(Error::Http(answer)) if answer.status() == 401));
    assert_eq!(scene.world.issuer().refreshes(), 1);
    assert_eq!(scene.world.api().seen().len(), 2, "it was tried again with the new token, once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_place_of_a_websocket_is_no_open_socket() {
    let scene = Scene::usual().await;
    std::fs::write(scene.home.path().join("page"), "hello").unwrap();
    scene.world.api().serve_dir("/v1/files/", scene.home.path());
    let mut sender = http2(&scene.client, EXAMPLE).await;
    let mut asked = extended_connect("");
    *asked.uri_mut() = "https://api.example.com/v1/files/page".parse().unwrap();
    let answer = within(sender.send_request(asked)).await.unwrap();
    assert_eq!(answer.status(), 502);
    assert_eq!(answer.headers()["x-valetkey-error"], "upstream_websocket");
}

/// What the client is told, over HTTP/1.1 and over HTTP/2: status and our code, if it is ours.
async fn told(scene: &Scene, target: &str, path: &str) -> [(u16, Option<String>); 2] {
    let code = |headers: &http::HeaderMap| {
        headers.get("x-valetkey-error").map(|code| code.to_str().unwrap().to_owned())
    };
    let (host, _) = target.split_once(':').unwrap();
    let tls = scene.client.greet(Visit::to(target, HTTP1)).await.unwrap();
    let url = format!("wss://{host}{path}");
    let over_http1 = match Box::pin(tokio_tungstenite::client_async(&url, tls)).await {
        Err(Error::Http(answer)) => {
            let asks = answer.headers().contains_key("upgrade");
            assert_eq!(
                asks,
                code(answer.headers()).is_some_and(|it| it == "websocket_unavailable")
            );
            assert!(answer.headers()["connection"].to_str().unwrap().starts_with("close"));
            (answer.status().as_u16(), code(answer.headers()))
        }
        other => panic!("{url}: {:?}", other.err()),
    };
    let mut sender = http2(&scene.client, target).await;
    let mut asked = extended_connect("");
    *asked.uri_mut() = format!("https://{host}{path}").parse().unwrap();
    let answer = within(sender.send_request(asked)).await.unwrap();
    [over_http1, (answer.status().as_u16(), code(answer.headers()))]
}

#[tokio::test(flavor = "multi_thread")]
async fn where_none_can_be_had_a_rule_has_the_client_do_without() {
    let rule = |host: &str| {
        format!(
            "[[rules]]\nhost = \"{host}\"\ncredential = \"example\"\nwebsocket_fallback = true\n"
        )
    };
    let rules = ["untrusted.example.com", "no-such-host.invalid"].map(rule).concat();
    let scene = Scene::start(Options { rules, ..Options::default() }).await;
    std::fs::write(scene.home.path().join("page"), "hello").unwrap();
    scene.world.api().serve_dir("/backend-api/codex/files/", scene.home.path());
    let without = || (426, Some("websocket_unavailable".to_owned()));
    let codex = |path: &str| (CHATGPT, format!("/backend-api/codex/{path}"));
    let table = [
        (codex("ws-refused/400"), without()),
        (codex("ws-refused/404"), without()),
        (codex("ws-refused/426"), without()),
        (codex("ws-refused/503"), without()),
        (codex("files/page"), without()),
        (codex("ws-wrong-accept"), without()),
        (codex("ws-wrong-upgrade"), without()),
        (codex("close-before-head"), without()),
        (("untrusted.example.com:443", "/x".to_owned()), without()),
        (("no-such-host.invalid:443", "/x".to_owned()), without()),
        (codex("ws-refused/401"), (401, None)),
        (codex("ws-refused/403"), (403, None)),
        (codex("ws-refused/429"), (429, None)),
    ];
    for ((target, path), expected) in table {
        assert_eq!(told(&scene, target, &path).await, [expected.clone(), expected], "{path}");
    }
    // And where it has not.
    let wrong = || (502, Some("upstream_websocket".to_owned()));
    for path in ["/v1/ws-wrong-accept", "/v1/ws-wrong-upgrade"] {
        assert_eq!(told(&scene, EXAMPLE, path).await, [wrong(), wrong()], "{path}");
    }
    scene.assert_alive().await;
}

/// A WebSocket over HTTP/1.1 that has echoed once.
async fn open_http1(
    scene: &Scene,
    visit: Visit<'_>,
    path: &str,
) -> WebSocketStream<TlsStream<TcpStream>> {
    let tls = scene.client.greet(visit).await.unwrap();
    let (host, _) = visit.target.split_once(':').unwrap();
    let url = format!("wss://{host}{path}");
    let (mut socket, _) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
    echo_once(&mut socket).await;
    socket
}

/// One over HTTP/2.
async fn open_http2(scene: &Scene) -> WebSocketStream<TokioIo<Upgraded>> {
    let mut sender = http2(&scene.client, CHATGPT).await;
    let asked = extended_connect("/backend-api/codex/ws");
    let answer = within(sender.send_request(asked)).await.unwrap();
    let io = TokioIo::new(within(hyper::upgrade::on(answer)).await.unwrap());
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
    echo_once(&mut socket).await;
    socket
}

async fn echo_once<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) {
    within(socket.send(Message::text("hello"))).await.unwrap();
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text("hello"));
}

/// The code and the reason with which the other end closes; nothing comes before them, and then the end.
async fn close_of<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
) -> (u16, String) {
    let Some(Ok(Message::Close(Some(close)))) = within(socket.next()).await else {
        panic!("no Close, or one that says nothing");
    };
    assert!(within(socket.next()).await.is_none_or(|next| next.is_err()));
    (close.code.into(), close.reason.as_str().to_owned())
}

/// Longer than a test may take: a WebSocket does not wait for it.
const DRAIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_closes_it_at_both_ends() {
    for is_http2 in [false, true] {
        let scene = Scene::usual().await;
        let proxy = scene.proxy.clone();
        let drain = async move { within(proxy.shut_down(DRAIN)).await };
        let closing = async {
            if is_http2 {
                let mut socket = open_http2(&scene).await;
                tokio::join!(drain, close_of(&mut socket)).1
            } else {
                let visit = Visit::to(CHATGPT, HTTP1);
                let mut socket = open_http1(&scene, visit, "/backend-api/codex/ws").await;
                tokio::join!(drain, close_of(&mut socket)).1
            }
        };
        assert_eq!(Box::pin(closing).await, (1001, "going away".to_owned()));
        assert_eq!(within(scene.world.api().closes(1)).await, [Some(1001)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_login_closes_its_own_and_no_other() {
    let scene = Scene::usual().await;
    let mut first = open_http1(&scene, Visit::to(CHATGPT, HTTP1), "/backend-api/codex/ws").await;
    let mut second = Box::pin(open_http2(&scene)).await;
    let mut key = open_http1(&scene, Visit::to(EXAMPLE, HTTP1), "/v1/ws").await;
    let mut forwarded = open_http1(&scene, Visit::to(CHATGPT, HTTP1), "/ws").await;
    assert!(!scene.world.api().seen().pop().unwrap().headers.contains_key("authorization"));

    scene.allow_only(LoginKind::ApiKey, Level::Required);
    let policy = (1008, "policy".to_owned());
    assert_eq!(close_of(&mut first).await, policy);
    assert_eq!(close_of(&mut second).await, policy);
    assert_eq!(within(scene.world.api().closes(2)).await, [Some(1008); 2]);
    echo_once(&mut key).await;
    echo_once(&mut forwarded).await;
    assert_eq!(refusal(&scene.get("/models").await), (403, "policy_forbids".to_owned()));
    assert!(scene.auth_json().exists(), "a login that is only ignored is kept");

    scene.policy.send_replace(Arc::default());
    within(async { while scene.get("/models").await.status() != 200 {} }).await;
    let mut later = open_http1(&scene, Visit::to(CHATGPT, HTTP1), "/backend-api/codex/ws").await;
    echo_once(&mut later).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_a_policy_forces_out_is_deleted_and_not_revoked() {
    let scene = Scene::usual().await;
    let mut socket = open_http1(&scene, Visit::to(CHATGPT, HTTP1), "/backend-api/codex/ws").await;
    scene.allow_only(LoginKind::ApiKey, Level::Forced);
    assert_eq!(close_of(&mut socket).await, (1008, "policy".to_owned()));
    let (status, code) = refusal(&scene.get("/models").await);
    assert!(status == 403 && ["policy_forbids", "login_required"].contains(&&*code), "{code}");
    within(async {
        while scene.auth_json().exists() {
            tokio::task::yield_now().await
        }
    })
    .await;
    assert_eq!(scene.world.issuer().revokes(), 0);
    scene.assert_alive().await;
}

/// Sends long messages without end and checks their echoes until the other end closes; its code.
async fn chat<S>(socket: WebSocketStream<S>, is_busy: tokio::sync::oneshot::Sender<()>) -> u16
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut stream) = socket.split();
    let message = Message::binary(vec![7; 300_000]);
    let talk = async {
        while sink.send(message.clone()).await.is_ok() {}
        std::future::pending().await
    };
    let listen = async {
        let mut is_busy = Some(is_busy);
        loop {
            match within(stream.next()).await.unwrap().unwrap() {
                Message::Close(close) => return close.unwrap().code.into(),
                echo => assert_eq!(echo, message),
            }
            if let Some(is_busy) = is_busy.take() {
                is_busy.send(()).unwrap();
            }
        }
    };
    tokio::select! {
        code = listen => code,
        code = talk => code,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_closes_a_busy_one_between_two_frames() {
    for is_http2 in [false, true] {
        let scene = Scene::usual().await;
        let (is_busy, busy) = tokio::sync::oneshot::channel();
        let proxy = scene.proxy.clone();
        let drain = async move {
            busy.await.unwrap();
            within(proxy.shut_down(DRAIN)).await;
        };
        let closing = async {
            if is_http2 {
                let socket = open_http2(&scene).await;
                tokio::join!(drain, chat(socket, is_busy)).1
            } else {
                let visit = Visit::to(CHATGPT, HTTP1);
                let socket = open_http1(&scene, visit, "/backend-api/codex/ws").await;
                tokio::join!(drain, chat(socket, is_busy)).1
            }
        };
        assert_eq!(Box::pin(closing).await, 1001);
        assert_eq!(within(scene.world.api().closes(1)).await, [Some(1001)]);
    }
}
