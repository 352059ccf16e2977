//! A rule with `scrub = true` keeps the credential out of what the client hears, in every encoding, place and
//! protocol, and holds nothing else up; without it the same looks find it everywhere.

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, Response};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use valetkey::sandbox::client::{self, Connection, HTTP1, HTTP2, Visit};
use valetkey::sandbox::{ENCODINGS, End, PLACES, REVEALED, Settings};

use super::peer::{PEER, Peer};
use super::support::{CHATGPT, OTHER, Options, Scene, refusal, within};
use super::websocket::{extended_connect, http2};

/// With every character that an encoding treats in its own way.
const ODD_KEY: &str = "vk-canary-\"a/b+c\\d%41=~e?f>g_z";

const SCRUBBED: &str = "/v1";
const SHOWN: &str = "/backend-api";

/// A scene in which one half of a host is scrubbed and the other is not; its key goes with the folder.
async fn scene() -> (Scene, TempDir) {
    scene_of(ODD_KEY, Settings::default()).await
}

async fn scene_of(key: &str, settings: Settings) -> (Scene, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, key).unwrap();
    let rule = |name: &str, paths: &str, more: &str| {
        format!(
            "[[rules]]\nname = \"{name}\"\nhost = \"other.example.com\"\npaths = [\"{paths}/\"]\n\
             credential = \"odd\"\n{more}\n"
        )
    };
    let rules = format!(
        "[credentials.odd]\nkind = \"api_key\"\nsource = \"file:{}\"\n{}{}",
        file.display(),
        rule("scrubbed", SCRUBBED, "scrub = true"),
        rule("shown", SHOWN, ""),
    );
    let scene = Scene::start(Options { rules, settings, ..Options::default() }).await;
    (scene, folder)
}

/// What the client hears of the key, and everything that it hears.
async fn heard(connection: &mut Connection, path: &str) -> (String, String) {
    let mut request = client::get(path);
    request.headers_mut().insert("te", "trailers".parse().unwrap());
    let (parts, body) = within(connection.send(request)).await.unwrap().into_parts();
    assert_eq!(parts.status, 200, "{path}");
    let body = within(body.collect()).await.unwrap();
    let trailers = body.trailers().cloned().unwrap_or_default();
    let body = String::from_utf8(body.to_bytes().into()).unwrap();
    if let Some(length) = parts.headers.get("content-length") {
        assert_eq!(length.to_str().unwrap(), body.len().to_string(), "{path}");
    }
    let of_key = [field(&parts.headers), body.clone(), field(&trailers)].concat();
    (of_key, format!("{:?} {body} {trailers:?}", parts.headers))
}

fn field(headers: &HeaderMap) -> String {
    headers.get(REVEALED).map_or_else(String::new, |value| value.to_str().unwrap().to_owned())
}

/// Asserts that of `shown` just the key is filler in `scrubbed`.
fn assert_filled(shown: &str, scrubbed: &str, (encoding, place): (&str, &str)) {
    assert_eq!(shown.len(), scrubbed.len(), "{encoding} {place}: {scrubbed}");
    let start = shown.find("before ").unwrap() + "before ".len();
    let end = shown[start..].find(' ').map_or(shown.len(), |len| start + len);
    let filler = scrubbed.bytes().filter(|byte| *byte == b'*').count();
    let is_same = |at: usize| scrubbed.as_bytes()[at] == shown.as_bytes()[at];
    for at in 0..shown.len() {
        let is_key = (start..end).contains(&at);
        assert!(
            is_same(at) || (is_key && scrubbed.as_bytes()[at] == b'*'),
            "{encoding} {place}: {scrubbed}"
        );
    }
    // Base64 shares up to three characters at either end with what is around it.
    let least = match encoding.starts_with("base64") {
        true => (ODD_KEY.len() * 8 / 6 - 2).min(end - start - 20),
        false => end - start,
    };
    assert!(filler >= least, "{encoding} {place}: {shown} {scrubbed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_repeats_the_key_in_any_way_is_not_heard_to() {
    let mut looks = 0;
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let (scene, _folder) = scene_of(ODD_KEY, settings).await;
        for alpn in [HTTP1, HTTP2] {
            let mut connection = scene.client.open(Visit::to(OTHER, alpn)).await.unwrap();
            for (encoding, place) in
                ENCODINGS.iter().flat_map(|it| PLACES.map(|place| (*it, place)))
            {
                let has_cuts = ["pieces", "events"].contains(&place);
                let cuts: &[usize] = if has_cuts { &[0, 8, 14, 21, 30, 46] } else { &[0] };
                for cut in cuts {
                    let path = format!("/reveal/{place}?as={encoding}&cut={cut}");
                    let (shown, all) = heard(&mut connection, &format!("{SHOWN}{path}")).await;
                    assert!(encoding != "plain" || shown.contains(ODD_KEY), "{path}: {all}");
                    let (scrubbed, all) =
                        heard(&mut connection, &format!("{SCRUBBED}{path}")).await;
                    assert_filled(&shown, &scrubbed, (encoding, place));
                    assert!(!all.contains("canary"), "{path}: {all}");
                    looks += 1;
                }
            }
        }
    }
    println!("looked for a key in {looks} answers, scrubbed and not");
}

/// What each message says, with the payloads of pings and of the Close.
async fn messages<S>(mut socket: WebSocketStream<S>) -> Vec<String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut heard = Vec::new();
    while let Some(Ok(message)) = within(socket.next()).await {
        match message {
            Message::Close(close) => {
                heard.push(close.unwrap().reason.to_string());
                return heard;
            }
            other => heard.push(String::from_utf8(other.into_data().into()).unwrap()),
        }
    }
    panic!("it ended without a Close: {heard:?}");
}

async fn messages_over(alpn: &[&[u8]], scene: &Scene, path: &str) -> Vec<String> {
    if alpn == HTTP1 {
        let tls = scene.client.greet(Visit::to(OTHER, HTTP1)).await.unwrap();
        let url = format!("wss://other.example.com{path}");
        let (socket, answer) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
        let mut heard = vec![field(answer.headers())];
        heard.extend(messages(socket).await);
        return heard;
    }
    let mut sender = http2(&scene.client, OTHER).await;
    let mut request = extended_connect("/");
    *request.uri_mut() = format!("https://other.example.com{path}").parse().unwrap();
    let answer = within(sender.send_request(request)).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut heard = vec![field(answer.headers())];
    let io = TokioIo::new(within(hyper::upgrade::on(answer)).await.unwrap());
    heard.extend(messages(WebSocketStream::from_raw_socket(io, Role::Client, None).await).await);
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_is_scrubbed_over_its_frames() {
    let (scene, _folder) = scene().await;
    for alpn in [HTTP1, HTTP2] {
        for encoding in ENCODINGS {
            for cut in [0, 9, 23, 38] {
                let path = format!("/reveal/messages?as={encoding}&cut={cut}");
                let shown = messages_over(alpn, &scene, &format!("{SHOWN}{path}")).await;
                let scrubbed = messages_over(alpn, &scene, &format!("{SCRUBBED}{path}")).await;
                // The handshake's field, a text, the ping within the next text, that text, a binary message, a Close.
                assert_eq!((shown.len(), scrubbed.len()), (6, 6), "{path}: {scrubbed:?}");
                assert_eq!(shown[1], shown[3], "{path}");
                for (shown, scrubbed) in shown.iter().zip(&scrubbed) {
                    assert_filled(shown, scrubbed, (encoding, "messages"));
                }
                assert!(
                    encoding != "plain" || shown.iter().all(|it| it.contains(ODD_KEY)),
                    "{path}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_there_before_the_next_one_is_sent() {
    let (scene, _folder) = scene().await;
    for alpn in [HTTP1, HTTP2] {
        let request = client::get("/v1/sse?n=4");
        let answer = within(scene.client.send(Visit::to(OTHER, alpn), request)).await.unwrap();
        let mut body = answer.into_body();
        for number in 0..4 {
            let frame = within(body.frame()).await.unwrap().unwrap();
            let event = String::from_utf8(frame.into_data().unwrap().into()).unwrap();
            assert!(event.ends_with(&format!("data: {{\"number\":{number}}}\n\n")), "{event}");
            scene.world.api().release_event();
        }
        assert_eq!(within(body.collect()).await.unwrap().to_bytes(), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_is_whole_and_not_coded() {
    let (scene, _folder) = scene().await;
    let ask = |path: &str| {
        let mut request = client::get(path);
        let fields = [
            ("accept-encoding", "gzip, br"),
            ("accept-encoding", "zstd"),
            ("range", "bytes=0-9"),
            ("if-range", "\"x\""),
            ("a-im", "gzip"),
            ("grpc-accept-encoding", "gzip"),
            ("connect-accept-encoding", "gzip"),
        ];
        for (name, value) in fields {
            request.headers_mut().append(name, value.parse().unwrap());
        }
        request
    };
    for (prefix, is_scrubbed) in [(SCRUBBED, true), (SHOWN, false)] {
        scene.world.api().clear();
        let request = ask(&format!("{prefix}/x"));
        let answer = within(scene.client.send(Visit::to(OTHER, HTTP1), request)).await.unwrap();
        assert_eq!(answer.status(), 200);
        let seen = scene.world.api().seen().pop().unwrap();
        let codings: Vec<_> = seen.headers.get_all("accept-encoding").iter().collect();
        let expected = if is_scrubbed { &["identity"][..] } else { &["gzip, br", "zstd"] };
        assert_eq!(codings, expected);
        for name in ["range", "if-range", "a-im", "grpc-accept-encoding", "connect-accept-encoding"]
        {
            assert_eq!(seen.headers.contains_key(name), !is_scrubbed, "{name}");
        }
    }
    for (prefix, is_scrubbed) in [(SCRUBBED, true), (SHOWN, false)] {
        scene.world.api().clear();
        let mut tls = scene.client.greet(Visit::to(OTHER, HTTP1)).await.unwrap();
        let handshake = handshake(&format!("{prefix}/ws"));
        within(tls.write_all(handshake.as_bytes())).await.unwrap();
        let head = within(read_head(&mut tls)).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let seen = scene.world.api().seen().pop().unwrap();
        assert_eq!(seen.headers.contains_key("sec-websocket-extensions"), !is_scrubbed);
    }
}

const WEBSOCKET_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

fn handshake(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: other.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {WEBSOCKET_KEY}\r\n\
         Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    )
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// A scene with an upstream that the test plays over HTTP/1.1, at a scrubbed host.
async fn played() -> (Scene, Peer) {
    Peer::ruled("peer.example.com", HTTP1, "scrub = true").await
}

/// What the client gets when the upstream answers with this.
async fn answered(
    scene: &Scene,
    peer: &Peer,
    (method, answer): (&str, &str),
) -> std::io::Result<Response<Bytes>> {
    let mut request = client::get("/v1/x");
    *request.method_mut() = method.parse().unwrap();
    let (heard, ()) =
        tokio::join!(within(scene.client.send(Visit::to(PEER, HTTP1), request)), async {
            let mut stream = peer.accept().await;
            within(read_head(&mut stream)).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        });
    within(client::gather(heard?)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_be_looked_into_is_refused() {
    let (scene, peer) = played().await;
    let refused = Some((502, "coding_refused".to_owned()));
    let table = [
        ("GET", "content-encoding: gzip\r\ncontent-length: 4\r\n\r\nbody", &refused),
        ("GET", "content-encoding: BR\r\ncontent-length: 4\r\n\r\nbody", &refused),
        ("GET", "content-encoding: identity, gzip\r\ncontent-length: 4\r\n\r\nbody", &refused),
        (
            "GET",
            "content-encoding: identity\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nbody",
            &refused,
        ),
        ("GET", "transfer-encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", &refused),
        ("GET", "transfer-encoding: gzip\r\nconnection: close\r\n\r\nbody", &refused),
        ("GET", "grpc-encoding: gzip\r\ncontent-length: 4\r\n\r\nbody", &refused),
        ("GET", "grpc-encoding: identity\r\ncontent-length: 4\r\n\r\nbody", &None),
        ("GET", "connect-content-encoding: br\r\ncontent-length: 4\r\n\r\nbody", &refused),
        ("GET", "content-encoding: Identity\r\ncontent-length: 4\r\n\r\nbody", &None),
        ("GET", "transfer-encoding: Chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", &None),
        ("GET", "connection: close\r\n\r\nbody", &None),
        // Nothing is in these.
        ("HEAD", "content-encoding: gzip\r\ncontent-length: 4\r\n\r\n", &None),
        ("GET", "content-encoding: gzip\r\ncontent-length: 0\r\n\r\n", &None),
    ];
    for (method, answer, expected) in table {
        let answer = format!("HTTP/1.1 200 OK\r\n{answer}");
        let heard = Box::pin(answered(&scene, &peer, (method, &answer))).await.unwrap();
        let was_refused = heard.headers().contains_key("x-valetkey-error");
        assert_eq!(was_refused.then(|| refusal(&heard)), *expected, "{answer}");
        if !was_refused && answer.ends_with("body") {
            assert_eq!(heard.body(), "body");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reason_phrase_goes_with_what_it_says() {
    for (more, is_shown) in [("", true), ("scrub = true", false)] {
        let (scene, peer) = Peer::ruled("peer.example.com", HTTP1, more).await;
        let mut tls = scene.client.greet(Visit::to(PEER, HTTP1)).await.unwrap();
        let request = b"GET /v1/x HTTP/1.1\r\nHost: peer.example.com\r\n\r\n";
        let (head, ()) = tokio::join!(
            async {
                tls.write_all(request).await.unwrap();
                within(read_head(&mut tls)).await
            },
            async {
                let mut stream = peer.accept().await;
                let head = within(read_head(&mut stream)).await;
                let key =
                    head.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap();
                let answer =
                    format!("HTTP/1.1 404 {key}\r\nX-Key: {key}\r\nContent-Length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        );
        assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
        assert_eq!(head.contains("canary"), is_shown, "{head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_that_cannot_be_looked_into_is_none() {
    let (scene, peer) = played().await;
    let handshake = handshake("/v1/ws").replace("other.example.com", "peer.example.com");
    let accept = derive_accept_key(WEBSOCKET_KEY.as_bytes());
    let opens = format!(
        "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n"
    );
    let table: [(&str, &[u8], &str); 5] = [
        ("Sec-WebSocket-Extensions: permessage-deflate\r\n", b"", "502"),
        ("", b"\xc1\x02hi", "101"),
        ("", b"\x81\x82abcdhi", "101"),
        ("", b"\x83\x02hi", "101"),
        ("", b"\x81\x02hi", "101"),
    ];
    let mut ahead = None;
    for (more, frame, status) in table {
        let mut tls = scene.client.greet(Visit::to(PEER, HTTP1)).await.unwrap();
        // Dialled once: a WebSocket has a connection of its own.
        if ahead.is_none() {
            ahead = Some(peer.accept().await);
        }
        within(tls.write_all(handshake.as_bytes())).await.unwrap();
        let mut stream = peer.accept().await;
        within(read_head(&mut stream)).await;
        let answer = [opens.as_bytes(), more.as_bytes(), b"\r\n", frame].concat();
        stream.write_all(&answer).await.unwrap();
        let head = within(read_head(&mut tls)).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        if status == "502" {
            assert!(head.contains("x-valetkey-error: coding_refused"), "{head}");
            continue;
        }
        let is_plain = frame == b"\x81\x02hi";
        let mut heard = Vec::new();
        if is_plain {
            heard.resize(4, 0);
            within(tls.read_exact(&mut heard)).await.unwrap();
        } else {
            // However it is cut, nothing of the frame is heard.
            let _cut = within(tls.read_to_end(&mut heard)).await;
        }
        assert_eq!(heard, if is_plain { frame } else { b"" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_replay_both_tokens_are_scrubbed() {
    let rules = "[[rules]]\nname = \"chatgpt\"\nhost = \"chatgpt.com\"\npaths = [\"/backend-api/codex/\"]\n\
                 credential = \"openai\"\nlogin = \"chatgpt\"\nscrub = true\n";
    let options = Options { rules: rules.to_owned(), ..Options::default() };
    let scene = Scene::start(options).await;
    let api = scene.world.api();
    api.require_login(true);
    let older = scene.login.as_ref().unwrap().access.expose().to_owned();
    let echo = async |text: &str| {
        let request = client::post("/backend-api/codex/echo", text.to_owned());
        let answer = scene.client.send(Visit::to(CHATGPT, HTTP1), request).await.unwrap();
        let body = within(client::gather(answer)).await.unwrap().into_body();
        String::from_utf8(body.into()).unwrap()
    };
    assert_eq!(echo(&older).await, "*".repeat(older.len()), "the token that is sent");
    api.reject(&scene.login.as_ref().unwrap().access);
    assert_eq!(echo(&older).await, "*".repeat(older.len()), "the one that was sent first");
    assert_eq!(scene.world.issuer().refreshes(), 1);
    scene.refreshed().await;
    let newer = scene.cached()["tokens"]["access_token"].as_str().unwrap().to_owned();
    assert_ne!(newer, older);
    assert_eq!(echo(&newer).await, "*".repeat(newer.len()));
    assert_eq!(echo(&older).await, older, "this request has nothing to do with that");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_as_long_and_as_whole_as_they_were() {
    let (scene, _folder) = scene().await;
    for alpn in [HTTP1, HTTP2] {
        let visit = Visit::to(OTHER, alpn);
        let answer = within(scene.client.get(visit, "/v1/bytes/5000000")).await.unwrap();
        assert_eq!(answer.headers()["content-length"], "5000000");
        assert!(answer.body().len() == 5_000_000 && answer.body().iter().all(|byte| *byte == b'a'));
        let text = format!("{ODD_KEY} {}", "vk-canary ".repeat(100_000));
        let request = client::post("/v1/echo", text.clone());
        let answer = within(scene.client.send(visit, request)).await.unwrap();
        let body = within(client::gather(answer)).await.unwrap().into_body();
        assert_eq!(body, text.replace(ODD_KEY, &"*".repeat(ODD_KEY.len())));
        for status in [204, 304, 404, 500] {
            let path = format!("/v1/status/{status}");
            let answer = within(scene.client.get(visit, &path)).await.unwrap();
            assert_eq!(answer.status(), status);
        }
        let mut head = client::get("/v1/reveal/whole?as=plain");
        *head.method_mut() = http::Method::HEAD;
        let answer = within(scene.client.send(visit, head)).await.unwrap();
        assert_eq!(answer.headers()["content-length"], (ODD_KEY.len() + 13).to_string());
        let request = client::get("/v1/reset-mid-body");
        // The cut may overtake the head, of the upstream's answer or of ours.
        match within(scene.client.send(visit, request)).await {
            Ok(answer) if answer.status() == 502 => {
                assert_eq!(answer.headers()["x-valetkey-error"], "upstream_closed");
            }
            Ok(answer) => assert!(within(client::gather(answer)).await.is_err(), "it broke off"),
            Err(_overtaken) => {}
        }
    }
    let seen = scene.world.api().seen();
    assert!(seen.iter().any(|seen| seen.response.end == End::Complete));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_too_short_to_be_scrubbed_is_not_sent() {
    for (key, is_sent) in [("short-7", false), ("enough-8", true)] {
        let (scene, _folder) = scene_of(key, Settings::default()).await;
        let visit = Visit::to(OTHER, HTTP1);
        let answer = within(scene.client.get(visit, "/v1/reveal/whole?as=plain")).await.unwrap();
        if is_sent {
            assert_eq!(answer.body(), "before ******** after");
        } else {
            assert_eq!(refusal(&answer), (403, "target_forbidden".to_owned()));
        }
        assert_eq!(scene.world.api().seen().len(), usize::from(is_sent));
        let answer = within(scene.client.get(visit, "/backend-api/reveal/whole?as=plain")).await;
        assert_eq!(answer.unwrap().body(), &format!("before {key} after"));
    }
}
