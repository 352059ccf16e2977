//! Who is not the proxy's user shows a pass, and reaches what it is for, for as long as it counts.

use std::sync::atomic::Ordering;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderValue, Response};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use valetkey::access::{self, PassRecord, Reach};
use valetkey::limits::Limits;
use valetkey::proxy::{Door, Socket};
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Refused, Visit};
use valetkey::secret::{Fingerprint, Secret};

use super::support::{CHATGPT, CODEX, EXAMPLE, OTHER, Options, Scene, refusal, within};
use super::websocket::{extended_connect, http2};

/// A pass that anybody may make up, in the way that it is kept.
fn record(pass: &str) -> PassRecord {
    PassRecord {
        name: "ci".parse().unwrap(),
        digest: Secret::new(pass).fingerprint(),
        reach: Reach::default(),
        created: time::OffsetDateTime::now_utc(),
        expires: None,
        max_requests: None,
        used: 0,
    }
}

fn basic(pass: &str) -> HeaderValue {
    HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(format!("ci:{pass}")))).unwrap()
}

/// The proxy's answer to a CONNECT that opens no tunnel.
async fn refused(client: &Client, target: &str) -> Response<Bytes> {
    let error = within(client.tunnel(target)).await.expect_err(target);
    let refused = error.into_inner().unwrap().downcast::<Refused>().unwrap();
    *refused.0
}

const PASS: &str = "vkp_of-a-test";

#[tokio::test(flavor = "multi_thread")]
async fn nobody_comes_in_without_one_and_everybody_with_one() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    scene.proxy.limit(Limits { wrong_passes: u32::MAX, ..Limits::USUAL });
    scene.passes.replace(vec![record(PASS)], &[]);
    let wrong = ["", "vkp_", "vkp_of-a-tesT", "vkp_of-a-test2"].map(basic);
    let odd = ["Bearer", "Bearer vkp_", "Digest vkp_of-a-test", "vkp_of-a-test", "Basic !"];
    let wrong = wrong.into_iter().chain(odd.map(HeaderValue::from_static)).map(Some);
    for shown in wrong.chain([None]) {
        let client = shown.map_or_else(|| stranger.clone(), |shown| stranger.showing(shown));
        for target in [CHATGPT, EXAMPLE, OTHER] {
            let answer = refused(&client, target).await;
            assert_eq!(refusal(&answer), (407, "pass_required".into()));
            assert_eq!(answer.headers()["proxy-authenticate"], "Basic realm=\"valetkey\"");
        }
    }
    assert!(scene.world.api().seen().is_empty());
    let bearer = HeaderValue::from_str(&format!("Bearer {PASS}")).unwrap();
    for shown in [basic(PASS), bearer] {
        for alpn in [HTTP1, HTTP2] {
            let visit = Visit::to(EXAMPLE, alpn);
            let answer = stranger.showing(shown.clone()).get(visit, "/v1/x").await.unwrap();
            assert_eq!(answer.status(), 200);
        }
    }
    let seen = scene.world.api().seen();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|seen| !seen.headers.contains_key("proxy-authorization")));
    scene.assert_alive().await;
}

/// Whatever was heard of the passes until then.
#[tokio::test(flavor = "multi_thread")]
async fn it_counts_from_when_it_was_made_until_it_was_revoked() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    let client = stranger.showing(basic(PASS));
    *scene.kept_passes.lock().unwrap() = Some(vec![record(PASS)]);
    assert!(client.tunnel(CHATGPT).await.is_ok());
    *scene.kept_passes.lock().unwrap() = Some(Vec::new());
    assert_eq!(refusal(&refused(&client, CHATGPT).await), (407, "pass_required".into()));
}

/// On one connection, as fast as it goes.
#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_guesses_fail() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    scene.passes.replace(vec![record(PASS)], &[]);
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (mut answers, mut writer) = stream.split();
    let guessing = async {
        for left in (0..10_000).rev() {
            // The last one ends the connection, so that all answers are heard.
            let end = if left == 0 { "Connection: close\r\n" } else { "" };
            let guess = STANDARD.encode(format!("ci:{}", &*access::mint().unwrap()));
            let request = format!(
                "CONNECT {EXAMPLE} HTTP/1.1\r\nHost: {EXAMPLE}\r\nProxy-Authorization: Basic {guess}\r\n{end}\r\n"
            );
            writer.write_all(request.as_bytes()).await.unwrap();
        }
    };
    let mut heard = Vec::new();
    let (_, read) = within(async { tokio::join!(guessing, answers.read_to_end(&mut heard)) }).await;
    read.unwrap();
    let count = |what: &str| String::from_utf8_lossy(&heard).matches(what).count();
    let shown = usize::try_from(Limits::USUAL.wrong_passes).unwrap();
    // Over the minute in which they are counted it may take longer.
    assert!(count("HTTP/1.1 407 ") >= shown);
    assert_eq!(count("HTTP/1.1 407 ") + count("HTTP/1.1 429 "), 10_000);
    assert_eq!(scene.looks.load(Ordering::Relaxed), count("HTTP/1.1 407 "));
    assert_eq!(count("HTTP/1.1 "), 10_000);
    assert!(scene.world.api().seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn it_reaches_its_rules_and_nothing_else() {
    let rules = "[[rules]]\nname = \"v2\"\nhost = \"api.example.com\"\npaths = [\"/v2/\"]\n\
                 credential = \"example\"\n"
        .to_owned();
    let scene = Scene::start(Options { rules, ..Options::default() }).await;
    scene.world.api().require_login(true);
    let (_, stranger) = scene.strict().await;
    let client = stranger.showing(basic(PASS));
    let own = |reach: Reach| scene.passes.replace(vec![PassRecord { reach, ..record(PASS) }], &[]);
    let some = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect());
    let get = async |target, path: &str| {
        client.get(Visit::to(target, HTTP1), path).await.map(|answer| answer.status().as_u16())
    };

    own(Reach { rules: some(&["api.example.com"]), ..Reach::default() });
    assert_eq!(get(EXAMPLE, "/v1/x").await.unwrap(), 200);
    assert_eq!(
        get(EXAMPLE, "/unruled").await.unwrap(),
        401,
        "as it is: it is the origin of its rule"
    );
    assert_eq!(get(EXAMPLE, "/v2/x").await.unwrap(), 403, "another rule's");
    for target in [CHATGPT, OTHER, "auth.openai.com:443"] {
        assert_eq!(refusal(&refused(&client, target).await), (403, "target_forbidden".into()));
    }

    // The endpoints of its login come with a rule that signs in.
    own(Reach { rules: some(&["chatgpt"]), ..Reach::default() });
    assert_eq!(get(CHATGPT, "/backend-api/codex/models").await.unwrap(), 200);
    assert!(client.tunnel("auth.openai.com:443").await.is_ok());
    assert_eq!(refusal(&refused(&client, EXAMPLE).await), (403, "target_forbidden".into()));

    // What is not for it is not signed in, and what is on this machine is out of reach.
    own(Reach { rules: some(&["chatgpt"]), tunnel: true, allow_private: false });
    for target in [EXAMPLE, OTHER, "127.0.0.1:22", "[::1]:22", "169.254.169.254:80", "localhost:22"]
    {
        let answer = refused(&client, target).await;
        assert_eq!(refusal(&answer), (403, "target_forbidden".into()), "{target}");
    }
    scene.world.api().clear();
    own(Reach { rules: some(&["chatgpt"]), tunnel: true, allow_private: true });
    let through = |target| client.tunnel(target);
    assert!(through(OTHER).await.is_ok() && through(EXAMPLE).await.is_ok());
    assert_eq!(get(EXAMPLE, "/v1/x").await.unwrap(), 401, "tunnelled, and not signed in");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_of_other_hosts_too() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    let ask = async |url: String| {
        let shown = basic(PASS).to_str().unwrap().to_owned();
        let head = format!("GET {url} HTTP/1.1\r\nHost: {}\r\n", url.split('/').nth(2).unwrap());
        let request = format!("{head}Proxy-Authorization: {shown}\r\nConnection: close\r\n\r\n");
        answer_to(address, &request).await
    };
    let reached = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/x", reached.local_addr().unwrap());
    for (tunnel, code) in [(false, "target_forbidden"), (true, "target_forbidden")] {
        let reach = Reach { tunnel, ..Reach::default() };
        scene.passes.replace(vec![PassRecord { reach, ..record(PASS) }], &[]);
        let answer = ask(url.clone()).await;
        assert!(answer.contains(&format!("x-valetkey-error: {code}")), "{answer}");
    }
    let reach = Reach { tunnel: true, allow_private: true, ..Reach::default() };
    scene.passes.replace(vec![PassRecord { reach, ..record(PASS) }], &[]);
    let serving = async {
        let (mut stream, _) = reached.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let len = stream.read(&mut head).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await.unwrap();
        String::from_utf8(head[..len].to_vec()).unwrap()
    };
    let (head, answer) = within(async { tokio::join!(serving, ask(url.clone())) }).await;
    assert!(answer.ends_with("hi"), "{answer}");
    assert!(!head.to_ascii_lowercase().contains("proxy-"), "{head}");
}

#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
async fn answer_to(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_goes_on_under_it_ends_with_it() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    let reach = Reach { rules: None, tunnel: true, allow_private: true };
    let all = PassRecord { reach, ..record(PASS) };
    let other = PassRecord { name: "other".parse().unwrap(), ..record("vkp_other") };
    scene.passes.replace(vec![all, other.clone()], &[]);
    let client = stranger.showing(basic(PASS));

    let mut tunnel = client.tunnel(OTHER).await.unwrap();
    let silent = client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let mut sockets = Vec::new();
    for _ in 0..2 {
        let tls = client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
        let url = "wss://chatgpt.com/backend-api/codex/ws";
        sockets.push(Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap().0);
    }
    let mut over_http2 = http2(&client, CHATGPT).await;
    let asked = over_http2.send_request(extended_connect("/backend-api/codex/ws"));
    let upgraded = within(hyper::upgrade::on(within(asked).await.unwrap())).await.unwrap();
    let upgraded = TokioIo::new(upgraded);
    let mut over_http2 = WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await;
    let mut streams = Vec::new();
    for alpn in [HTTP1, HTTP2] {
        // The first event comes at once, and the next one is never let go.
        let request = client::get(&format!("{CODEX}/sse?n=2"));
        let mut connection = client.open(Visit::to(CHATGPT, alpn)).await.unwrap();
        let answer = connection.send(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        streams.push((connection, answer));
    }
    let kept = stranger.showing(basic("vkp_other"));
    let mut kept = kept.open(Visit::to(CHATGPT, HTTP2)).await.unwrap();
    assert_eq!(kept.get(&format!("{CODEX}/models")).await.unwrap().status(), 200);

    scene.passes.replace(vec![other], &[]);
    let mut rest = Vec::new();
    let end = within(tunnel.read_to_end(&mut rest)).await;
    assert!(end.is_err() || rest.is_empty(), "nothing was ever sent in it");
    for mut socket in sockets {
        match within(socket.next()).await {
            Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1008),
            other => panic!("{other:?}"),
        }
    }
    match within(over_http2.next()).await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1008),
        other => panic!("{other:?}"),
    }
    for (connection, answer) in streams {
        let broken = within(answer.into_body().collect()).await;
        assert!(broken.is_err(), "a body that breaks off does not end well");
        drop(connection);
    }
    let (mut silent, mut rest) = (silent, Vec::new());
    let _reset = within(silent.read_to_end(&mut rest)).await;
    let answer = refused(&client, CHATGPT).await;
    assert_eq!(refusal(&answer), (407, "pass_required".into()));
    assert_eq!(kept.get(&format!("{CODEX}/models")).await.unwrap().status(), 200);
    assert_eq!(scene.get("/models").await.status(), 200, "the user has nothing to do with it");
}

/// A response in plain HTTP is no tunnel, and its connection may go on with another pass.
#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
#[tokio::test(flavor = "multi_thread")]
async fn a_response_in_plain_http_ends_with_it() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    let reach = Reach { rules: None, tunnel: true, allow_private: true };
    scene.passes.replace(vec![PassRecord { reach, ..record(PASS) }], &[]);
    let reached = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = reached.local_addr().unwrap();
    let shown = basic(PASS).to_str().unwrap().to_owned();
    let request = format!(
        "GET http://{host}/x HTTP/1.1\r\nHost: {host}\r\nProxy-Authorization: {shown}\r\n\r\n"
    );
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut upstream, _) = within(reached.accept()).await.unwrap();
    // An answer that comes before its request is none.
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        assert_ne!(within(upstream.read_buf(&mut asked)).await.unwrap(), 0);
    }
    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n";
    upstream.write_all(head).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"hi\r\n") {
        assert_ne!(within(client.read_buf(&mut heard)).await.unwrap(), 0);
    }
    scene.passes.replace(Vec::new(), &[]);
    let mut rest = Vec::new();
    let _reset = within(client.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "a body that breaks off does not end well");
}

/// Also who waits for an answer.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_in_plain_http_is_told_why_it_ended() {
    let scene = Scene::usual().await;
    let (address, _) = scene.strict().await;
    let reached = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = reached.local_addr().unwrap();
    let shown = basic(PASS).to_str().unwrap().to_owned();
    let request = format!(
        "GET http://{host}/x HTTP/1.1\r\nHost: {host}\r\nProxy-Authorization: {shown}\r\nConnection: close\r\n\r\n"
    );
    let revoke = || scene.passes.replace(Vec::new(), &[]);
    let expire = || {
        scene.clock.advance(time::Duration::HOUR);
        scene.passes.end_expired(scene.clock.now());
    };
    for (end, said) in [(&revoke as &dyn Fn(), "was revoked"), (&expire, "has expired")] {
        let reach = Reach { rules: None, tunnel: true, allow_private: true };
        let expires = Some(scene.clock.now() + time::Duration::HOUR);
        scene.passes.replace(vec![PassRecord { reach, expires, ..record(PASS) }], &[]);
        let (answer, _silent) = tokio::join!(answer_to(address, &request), async {
            let silent = within(reached.accept()).await.unwrap();
            end();
            silent
        });
        assert!(answer.starts_with("HTTP/1.1 407 ") && answer.contains(said), "{said}: {answer}");
    }
}

/// Whoever came in would be the proxy's own user there.
#[tokio::test(flavor = "multi_thread")]
async fn no_way_leads_back_into_the_proxy() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    let reach = Reach { rules: Some(Vec::new()), tunnel: true, allow_private: true };
    scene.passes.replace(vec![PassRecord { reach, ..record(PASS) }], &[]);
    let client = stranger.showing(basic(PASS));
    let wide = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = wide.local_addr().unwrap().port();
    scene.proxy.serve(Socket::Tcp(wide), Door::default());
    for host in ["127.0.0.1", "127.0.0.9", "[::ffff:127.1.2.3]", "0.0.0.0"] {
        let answer = refused(&client, &format!("{host}:{port}")).await;
        assert_eq!(refusal(&answer), (502, "upstream_loop".into()), "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_counts_so_long_and_so_often() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    let client = stranger.showing(basic(PASS));
    let expires = Some(scene.clock.now() + time::Duration::hours(1));
    scene.passes.replace(vec![PassRecord { expires, max_requests: Some(3), ..record(PASS) }], &[]);
    let mut connection = client.open(Visit::to(CHATGPT, HTTP2)).await.unwrap();
    let mut get = async || connection.get(&format!("{CODEX}/models")).await.unwrap();
    for _ in 0..2 {
        assert_eq!(get().await.status(), 200);
    }
    assert!(client.tunnel(CHATGPT).await.is_ok(), "it is its requests that count");
    assert_eq!(get().await.status(), 200);
    let answer = get().await;
    assert_eq!(refusal(&answer), (407, "pass_required".into()));
    let said = String::from_utf8_lossy(answer.body()).into_owned();
    assert!(said.contains("as many requests as it was made for"), "{said}");
    assert_eq!(scene.world.api().seen().len(), 3);

    scene.passes.replace(vec![PassRecord { expires, ..record(PASS) }], &[]);
    let mut connection = client.open(Visit::to(CHATGPT, HTTP2)).await.unwrap();
    scene.clock.advance(time::Duration::HOUR);
    // Also in a tunnel that was opened before.
    let answer = connection.get(&format!("{CODEX}/models")).await.unwrap();
    assert_eq!(refusal(&answer), (407, "pass_required".into()));
    let said = String::from_utf8_lossy(refused(&client, CHATGPT).await.body()).into_owned();
    assert!(said.contains("expired"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaked_token_of_the_login_is_worth_nothing_to_it() {
    let scene = Scene::usual().await;
    let (_, stranger) = scene.strict().await;
    scene.passes.replace(vec![record(PASS)], &[]);
    let client = stranger.showing(basic(PASS));
    let before = scene.cached();
    let refresh = before["tokens"]["refresh_token"].as_str().unwrap();
    for (path, body) in [
        ("/oauth/token", json!({ "grant_type": "refresh_token", "refresh_token": refresh })),
        ("/oauth/revoke", json!({ "token": refresh, "token_type_hint": "refresh_token" })),
        ("/oauth/revoke", json!({ "token": before["tokens"]["access_token"] })),
    ] {
        let mut request = client::post(path, body.to_string());
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert("content-type", json);
        let answer = client.send(Visit::to("auth.openai.com:443", HTTP1), request).await.unwrap();
        let answer = client::gather(answer).await.unwrap();
        assert_eq!(refusal(&answer), (403, "target_forbidden".into()));
    }
    assert_eq!(scene.world.issuer().refreshes(), 0);
    assert_eq!(scene.cached(), before);
    assert_eq!(scene.get("/models").await.status(), 200);
}

#[test]
fn passes_are_random_and_look_like_passes() {
    let passes: std::collections::BTreeSet<String> =
        (0..1000).map(|_| access::mint().unwrap().to_string()).collect();
    assert_eq!(passes.len(), 1000);
    for pass in &passes {
        assert!(pass.starts_with("vkp_") && pass.len() == 4 + 43, "{pass}");
        assert!(Fingerprint::of(pass.as_bytes()).is_same(&Secret::new(pass).fingerprint()));
    }
}
