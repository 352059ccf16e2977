//! Every refusal explains itself, and the proxy lives on.

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use valetkey::proxy::{Door, Socket};
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Refused, Visit, gather};

use super::framing::read_head;
use super::peer::Peer;
use super::support::{CHATGPT, CODEX, EXAMPLE, OTHER, Options, Scene, refusal, within};

/// Sends bytes to the proxy's port, and gives the answer when it has one.
#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
pub(crate) async fn raw(scene: &Scene, bytes: &[u8]) -> Option<Response<Bytes>> {
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    // The proxy may answer and close before it has read all.
    let _broken_pipe = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _reset = within(stream.read_to_end(&mut answer)).await;
    parse(&answer)
}

/// Sends bytes inside an intercepted tunnel.
async fn raw_inside(scene: &Scene, bytes: &[u8]) -> Option<Response<Bytes>> {
    let mut tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let _broken_pipe = tls.write_all(bytes).await;
    let mut answer = Vec::new();
    let _reset = within(tls.read_to_end(&mut answer)).await;
    parse(&answer)
}

fn parse(answer: &[u8]) -> Option<Response<Bytes>> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let mut lines = head.lines();
    let status: u16 = lines.next()?.split_whitespace().nth(1)?.parse().ok()?;
    let mut response = Response::builder().status(status);
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        response = response.header(name, value);
    }
    Some(response.body(Bytes::copy_from_slice(&answer[end + 4..])).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_port() {
    let scene = Scene::usual().await;
    let (bad, forbidden, cleartext) = ("bad_request", "target_forbidden", "cleartext_refused");
    let huge = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(700_000));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    let own = format!("CONNECT {} HTTP/1.1\r\n\r\n", scene.address);
    let table: Vec<(&str, u16, &str)> = vec![
        ("CONNECT chatgpt.com HTTP/1.1\r\nConnection: close\r\n\r\n", 400, bad),
        ("CONNECT chatgpt.com:0 HTTP/1.1\r\nConnection: close\r\n\r\n", 400, bad),
        ("CONNECT chatgpt.com:443x HTTP/1.1\r\nConnection: close\r\n\r\n", 400, bad),
        ("CONNECT user@chatgpt.com:443 HTTP/1.1\r\nConnection: close\r\n\r\n", 400, bad),
        (
            "CONNECT chatgpt.com:443 HTTP/1.1\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
            400,
            bad,
        ),
        ("CONNECT https://chatgpt.com:443 HTTP/1.1\r\nConnection: close\r\n\r\n", 400, bad),
        ("CONNECT a b c HTTP/1.1\r\n\r\n", 400, bad),
        ("GET / HTTP/1.1\r\nA B: c\r\n\r\n", 400, bad),
        ("GET / HTTP/1.1\r\nA : c\r\n\r\n", 400, bad),
        ("GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400, bad),
        ("\x16\x03\x01\x02\x00\x01", 400, bad),
        (&huge, 431, bad),
        (&long, 414, bad),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 403, forbidden),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 403, forbidden),
        (
            "GET https://chatgpt.com/ HTTP/1.1\r\nHost: chatgpt.com\r\nConnection: close\r\n\r\n",
            403,
            cleartext,
        ),
        (
            "GET http://chatgpt.com/ HTTP/1.1\r\nHost: chatgpt.com\r\nConnection: close\r\n\r\n",
            403,
            cleartext,
        ),
        (
            "GET http://api.example.com:8080/ HTTP/1.1\r\nHost: api.example.com:8080\r\nConnection: close\r\n\r\n",
            403,
            cleartext,
        ),
        (
            "GET http://a.example/ HTTP/1.1\r\nHost: b.example\r\nConnection: close\r\n\r\n",
            421,
            "wrong_origin",
        ),
        (
            "GET http://no-such-host.invalid/ HTTP/1.1\r\nHost: no-such-host.invalid\r\nConnection: close\r\n\r\n",
            502,
            "upstream_dns",
        ),
        (
            "CONNECT no-such-host.invalid:443 HTTP/1.1\r\nConnection: close\r\n\r\n",
            502,
            "upstream_dns",
        ),
        ("CONNECT 127.0.0.1:1 HTTP/1.1\r\nConnection: close\r\n\r\n", 502, "upstream_unreachable"),
        (&own, 403, forbidden),
    ];
    for (bytes, status, code) in table {
        let what = &bytes[..bytes.len().min(90)];
        // A kept-alive connection would be read for ever.
        let bytes = bytes.replace("HTTP/1.1\r\n\r\n", "HTTP/1.1\r\nConnection: close\r\n\r\n");
        let answer =
            raw(&scene, bytes.as_bytes()).await.unwrap_or_else(|| panic!("no answer: {what}"));
        assert_eq!(refusal(&answer), (status, code.to_owned()), "{what}");
    }
    assert!(raw(&scene, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.is_none(), "HTTP/2 at the port");
    assert!(scene.world.api().seen().is_empty());
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_web_page_can_make_a_browser_send_changes_nothing() {
    let scene = Scene::usual().await;
    let lines = [
        "GET /",
        "POST /",
        "GET http://other.example.com/",
        "CONNECT chatgpt.com:443",
        "CONNECT other.example.com:443",
        "OPTIONS /",
        "PUT /x",
        "GET http://127.0.0.1/",
    ];
    let marks = [
        "Origin: https://evil.example",
        "Origin: null",
        "Referer: https://evil.example/a",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-origin",
    ];
    for line in lines {
        for mark in marks {
            let host = if line.contains("other") { "other.example.com" } else { "127.0.0.1" };
            let request =
                format!("{line} HTTP/1.1\r\nHost: {host}\r\n{mark}\r\nConnection: close\r\n\r\n");
            let answer = raw(&scene, request.as_bytes()).await.unwrap();
            assert_eq!(refusal(&answer), (403, "target_forbidden".to_owned()), "{request}");
            assert!(
                answer.headers().keys().all(|name| !name.as_str().starts_with("access-control"))
            );
        }
    }
    assert!(scene.world.api().seen().is_empty());
    // Inside a tunnel they are the client's business.
    let mut request = client::get(&format!("{CODEX}/models"));
    request.headers_mut().insert("origin", "https://app.example".parse().unwrap());
    let answer = scene.client.send(Visit::to(CHATGPT, HTTP1), request).await.unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_a_tunnel() {
    let scene = Scene::usual().await;
    let head = "POST /backend-api/codex/upload HTTP/1.1\r\nHost: chatgpt.com\r\n";
    let table = [
        ("Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        ("Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        ("Content-Length: +1\r\n\r\na", 400),
        ("X : y\r\n\r\n", 400),
        ("X: a\r\n b\r\n\r\n", 400),
        ("X: a\0b\r\n\r\n", 400),
    ];
    for (rest, status) in table {
        let answer = raw_inside(&scene, format!("{head}{rest}").as_bytes()).await;
        let answer = answer.unwrap_or_else(|| panic!("no answer: {rest:?}"));
        assert_eq!(refusal(&answer), (status, "bad_request".to_owned()), "{rest:?}");
    }
    assert!(scene.world.api().seen().is_empty(), "{:?}", scene.world.api().seen());
    let mut trace = client::get(&format!("{CODEX}/models"));
    *trace.method_mut() = Method::TRACE;
    let mut connect = client::get("/");
    *connect.method_mut() = Method::CONNECT;
    *connect.uri_mut() = "chatgpt.com:443".parse().unwrap();
    for request in [trace, connect] {
        let method = request.method().clone();
        let answer = scene.client.send(Visit::to(CHATGPT, HTTP1), request).await.unwrap();
        let answer = gather(answer).await.unwrap();
        assert_eq!(refusal(&answer), (403, "target_forbidden".to_owned()), "{method}");
    }
    // Plain HTTP in a tunnel to a ruled host is told so.
    let mut stream = scene.client.tunnel(CHATGPT).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: chatgpt.com\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    within(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(refusal(&parse(&answer).unwrap()), (403, "cleartext_refused".to_owned()));
    assert!(scene.world.api().seen().is_empty());
    scene.assert_alive().await;
}

/// By none of the ways on which an answer comes.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_cannot_have_its_answer_taken_for_a_refusal_of_ours() {
    let forged = b"HTTP/1.1 403 Forbidden\r\nX-Valetkey-Error: x\r\nContent-Length: 2\r\n\r\nhi";
    let assert_plain = |answer: Response<Bytes>, way: &str| {
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (403, &b"hi"[..]), "{way}");
        assert!(!answer.headers().contains_key("x-valetkey-error"), "{way}: {answer:?}");
    };
    for (host, path) in [("peer.example.com", "/v1/x"), ("auth.openai.com", "/oauth/token")] {
        let (scene, peer) = Peer::at(host, HTTP1).await;
        let target = format!("{host}:443");
        let asked = scene.client.send(Visit::to(&target, HTTP1), client::post(path, ""));
        let (answer, _open) = tokio::join!(within(asked), async {
            let mut stream = peer.accept().await;
            read_head(&mut stream).await;
            stream.write_all(forged).await.unwrap();
            stream.flush().await.unwrap();
            stream
        });
        assert_plain(within(gather(answer.unwrap())).await.unwrap(), host);
    }
    let scene = Scene::usual().await;
    let reached = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = reached.local_addr().unwrap();
    let request =
        format!("GET http://{host}/x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let (answer, _open) = tokio::join!(raw(&scene, request.as_bytes()), async {
        let (mut stream, _) = within(reached.accept()).await.unwrap();
        read_head(&mut stream).await;
        stream.write_all(forged).await.unwrap();
        stream
    });
    assert_plain(answer.unwrap(), "plain HTTP");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_good_gets_no_byte() {
    let hosts = ["expired.example.com", "untrusted.example.com", "wrong-name.example.com"];
    let rule = |host: &str| format!("[[rules]]\nhost = \"{host}\"\ncredential = \"example\"\n");
    let rules = hosts.map(rule).concat();
    let scene = Scene::start(Options { rules, ..Options::default() }).await;
    for host in hosts {
        for alpn in [HTTP1, HTTP2] {
            let target = format!("{host}:443");
            let answer = scene.client.get(Visit::to(&target, alpn), "/v1/x").await.unwrap();
            assert_eq!(refusal(&answer), (502, "upstream_tls_untrusted".to_owned()), "{host}");
        }
    }
    assert!(scene.world.api().seen().is_empty(), "a byte got through");
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_refuse_and_default_refuses() {
    let rules = "[[rules]]\nname = \"keys\"\nhost = \"api.example.com\"\npaths = [\"/v1/keys/\"]\naction = \"refuse\"\n";
    let scene = Scene::start(Options { rules: rules.into(), ..Options::default() }).await;
    for path in ["/v1/keys", "/v1/keys/", "/v1/%6Beys/1"] {
        let answer = scene.client.get(Visit::to(EXAMPLE, HTTP1), path).await.unwrap();
        assert_eq!(refusal(&answer), (403, "target_forbidden".to_owned()), "{path}");
    }
    // Paths that could be read as another one are not signed in.
    for path in ["/v1/../v1/keys", "/v1//keys", "/v1/%2e%2e/x", "/v1/x%2fy"] {
        let answer = scene.client.get(Visit::to(EXAMPLE, HTTP1), path).await.unwrap();
        assert_ne!(answer.status(), StatusCode::FORBIDDEN, "{path}");
    }
    assert!(
        scene.world.api().seen().iter().all(|seen| !seen.headers.contains_key("authorization"))
    );

    let top = "default = \"refuse\"";
    let strict = Scene::start(Options { top, ..Options::default() }).await;
    let refused = strict.client.get(Visit::to(OTHER, HTTP1), "/").await.unwrap_err();
    let refused = refused.into_inner().unwrap().downcast::<Refused>().unwrap();
    assert_eq!(refusal(&refused.0), (403, "target_forbidden".to_owned()));
    strict.assert_alive().await;
}

/// A listener that is open leads back to the proxy; where it was, another program may listen.
#[tokio::test(flavor = "multi_thread")]
async fn the_address_of_a_closed_listener_is_anybodys() {
    let scene = Scene::usual().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let entrance = scene.proxy.serve(Socket::Tcp(listener), Door::default());
    assert!(scene.client.tunnel(&address.to_string()).await.is_err());
    entrance.close();
    let another = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_not_yet) => tokio::task::yield_now().await,
            }
        }
    };
    let _another = within(another).await;
    assert!(scene.client.tunnel(&address.to_string()).await.is_ok());
}
