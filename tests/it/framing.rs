//! HTTP/1.1 as it is framed: pipelining, `Connection`, interim responses, and ends that are none.

use http_body_util::BodyExt as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Visit};
use valetkey::sandbox::{End, Seen, Settings};

use super::peer::{PEER, Peer};
use super::support::{EXAMPLE, KEY, Options, Scene, within};
use super::wire::{
    DATA, END_HEADERS, END_STREAM, HEADERS, NO_ERROR, STATUS_200, Wire, frame, go_away, reset,
};

/// Reads to the end of a head; what came, with what followed in the same piece.
pub(super) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0, "it ended in its head");
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_their_order() {
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let scene = Scene::start(Options { settings, ..Options::default() }).await;
        let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
        let host = "Host: api.example.com\r\n";
        let all = [
            format!("GET /v1/bytes/3 HTTP/1.1\r\n{host}\r\n"),
            format!("HEAD /v1/bytes/7 HTTP/1.1\r\n{host}\r\n"),
            format!("POST /v1/echo HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nfirst"),
            format!(
                "POST /v1/echo HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n6\r\nsecond\r\n0\r\n\r\n"
            ),
            format!("GET /v1/status/404 HTTP/1.1\r\n{host}\r\n"),
            format!("GET /v1/status/204 HTTP/1.1\r\n{host}Connection: close\r\n\r\n"),
            format!("GET /v1/after-the-close HTTP/1.1\r\n{host}\r\n"),
        ];
        within(tls.write_all(all.concat().as_bytes())).await.unwrap();
        let mut answers = String::new();
        within(tls.read_to_string(&mut answers)).await.unwrap();
        let statuses: Vec<&str> =
            answers.match_indices("HTTP/1.1 ").map(|(at, _)| &answers[at + 9..at + 12]).collect();
        assert_eq!(statuses, ["200", "200", "200", "200", "404", "204"], "{answers}");
        let places = ["aaa", "content-length: 7", "first", "second", "404 Not Found"];
        let places =
            places.map(|text| answers.find(text).unwrap_or_else(|| panic!("{text}: {answers}")));
        assert!(places.is_sorted(), "{places:?}: {answers}");
        let seen = scene.world.api().seen();
        let paths: Vec<&str> = seen.iter().map(|seen| seen.path.as_str()).collect();
        assert_eq!(paths.len(), 6, "{paths:?}");
        assert!(seen.iter().all(|seen| seen.headers["authorization"] == format!("Bearer {KEY}")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_connection_lists_is_gone_before_we_set_ours() {
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let scene = Scene::start(Options { settings, ..Options::default() }).await;
        let lists = [
            "authorization, host, content-length",
            "Authorization,Host , Content-Length,keep-alive, close",
            "transfer-encoding, authorization, x-own",
            "cookie\r\nConnection: authorization\r\nConnection: host, content-length",
        ];
        for list in lists {
            scene.world.api().clear();
            let request = format!(
                "POST /v1/upload HTTP/1.1\r\nHost: api.example.com\r\nConnection: {list}\r\n\
                 Authorization: Bearer the-clients-own\r\nContent-Length: 5\r\nX-Own: y\r\nCookie: c=d\r\n\
                 Proxy-Authorization: Basic eDp5\r\nKeep-Alive: 5\r\n\r\nhello"
            );
            let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
            within(tls.write_all(request.as_bytes())).await.unwrap();
            let answer = within(read_head(&mut tls)).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{list}: {answer}");
            let seen = &scene.world.api().seen()[0];
            let sent: Vec<_> = seen.headers.get_all("authorization").iter().collect();
            assert_eq!(sent, [&format!("Bearer {KEY}")], "{list}");
            assert_eq!((seen.host.as_str(), seen.request.bytes), ("api.example.com", 5), "{list}");
            for name in ["connection", "keep-alive", "proxy-authorization"] {
                assert!(!seen.headers.contains_key(name), "{list}: {name}");
            }
            for name in ["x-own", "cookie"].into_iter().filter(|name| list.contains(name)) {
                assert!(!seen.headers.contains_key(name), "{list}: {name}");
            }
        }
    }
}

const HINTS: &[u8] = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_has_sixteen_interim_responses() {
    for expects in [false, true] {
        for alpn in [HTTP1, HTTP2] {
            let (scene, peer) = Peer::scene(HTTP1).await;
            let request = || {
                let mut request = client::post("/v1/x", "body");
                if expects {
                    request.headers_mut().insert("expect", "100-continue".parse().unwrap());
                }
                scene.client.send(Visit::to(PEER, alpn), request)
            };
            let (answer, _ahead) = tokio::join!(within(request()), async {
                let ahead = if expects { Some(peer.accept().await) } else { None };
                let mut stream = peer.accept().await;
                read_head(&mut stream).await;
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                stream.write_all(&[&HINTS.repeat(16)[..], answer].concat()).await.unwrap();
                // What was dialled ahead stays open: what expects a 100 gets a connection of its own.
                ahead
            });
            assert_eq!(answer.unwrap().status(), 200, "{alpn:?} {expects}");

            let (answer, ()) = tokio::join!(within(request()), async {
                let mut stream = peer.accept().await;
                read_head(&mut stream).await;
                // Without end: until the proxy hangs up.
                let mut reading = Vec::new();
                while stream.write_all(&HINTS.repeat(100)).await.is_ok()
                    && stream.flush().await.is_ok()
                {
                    tokio::select! {
                        biased;
                        read = stream.read_buf(&mut reading) => if read.is_err() || read.unwrap() == 0 { return },
                        () = tokio::task::yield_now() => {}
                    }
                }
            });
            assert_eq!(answer.unwrap().status(), 502, "{alpn:?} {expects}");

            // What follows a 101 that nobody asked for is not HTTP.
            let (answer, ()) = tokio::join!(within(request()), async {
                let mut stream = peer.accept().await;
                read_head(&mut stream).await;
                let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
                stream.write_all(answer).await.unwrap();
            });
            assert_eq!(answer.unwrap().status(), 502, "{alpn:?} {expects}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_beside_a_coding_does_not_cut_the_body() {
    for alpn in [HTTP1, HTTP2] {
        for length in [2, 500] {
            let (scene, peer) = Peer::scene(HTTP1).await;
            let asked = async {
                let answer = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
                client::gather(within(answer).await.unwrap()).await
            };
            let (answer, ()) = tokio::join!(within(asked), async {
                let mut stream = peer.accept().await;
                read_head(&mut stream).await;
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nX-Valetkey-Error: policy_forbids\r\n\
                     Transfer-Encoding: chunked\r\n\r\n7\r\na whole\r\n0\r\n\r\n"
                );
                stream.write_all(head.as_bytes()).await.unwrap();
            });
            let answer = answer.unwrap();
            assert_eq!(answer.body(), "a whole", "{alpn:?} {length}");
            assert!(!answer.headers().contains_key("content-length"), "{alpn:?} {length}");
            // What it says of itself is not ours.
            assert!(!answer.headers().contains_key("x-valetkey-error"), "{alpn:?} {length}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_in_pieces_are_one_field_over_http1() {
    for (alpn, upstream) in [(HTTP2, HTTP1), (HTTP1, HTTP1)] {
        let (scene, peer) = Peer::scene(upstream).await;
        let mut request = client::get("/v1/x");
        for cookie in ["a=1", "b=2", "c=3"] {
            request.headers_mut().append("cookie", cookie.parse().unwrap());
        }
        let (answer, head) =
            tokio::join!(within(scene.client.send(Visit::to(PEER, alpn), request)), async {
                let mut stream = peer.accept().await;
                let head = read_head(&mut stream).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                head
            });
        assert_eq!(answer.unwrap().status(), 200);
        let cookies: Vec<&str> = head.lines().filter(|it| it.starts_with("cookie:")).collect();
        assert_eq!(cookies, ["cookie: a=1; b=2; c=3"], "{alpn:?}");
    }
}

/// How an upstream's answer ends.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// A TCP reset.
    Reset,
    /// TCP ends, and TLS does not say that it meant to.
    Bare,
    /// TLS says its goodbye.
    Goodbye,
}

async fn end(mut stream: TlsStream<TcpStream>, ending: Ending) {
    stream.flush().await.unwrap();
    match ending {
        Ending::Reset => stream.get_ref().0.set_zero_linger().unwrap(),
        Ending::Bare => stream.get_mut().0.shutdown().await.unwrap(),
        Ending::Goodbye => stream.shutdown().await.unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_body_is_never_a_whole_one() {
    let (long, chunked, open) = (
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nthe beginning",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\nthe beginning\r\n",
        "HTTP/1.1 200 OK\r\n\r\nthe beginning",
    );
    let mid_chunk = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nthe beginning";
    let no_trailers_end =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\nthe beginning\r\n0\r\n";
    let table = [
        (long, Ending::Reset, false),
        (long, Ending::Bare, false),
        (long, Ending::Goodbye, false),
        (chunked, Ending::Reset, false),
        (chunked, Ending::Bare, false),
        (chunked, Ending::Goodbye, false),
        (mid_chunk, Ending::Goodbye, false),
        (no_trailers_end, Ending::Goodbye, false),
        (open, Ending::Reset, false),
        (open, Ending::Bare, false),
        (open, Ending::Goodbye, true),
    ];
    for alpn in [HTTP1, HTTP2] {
        let (scene, peer) = Peer::scene(HTTP1).await;
        for (answer, ending, is_whole) in table {
            let asked = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
            let (response, stream) = tokio::join!(within(asked), async {
                let mut stream = peer.accept().await;
                read_head(&mut stream).await;
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                stream
            });
            let mut body = response.unwrap().into_body();
            let first = within(body.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(first, "the beginning");
            end(stream, ending).await;
            let rest = within(body.collect()).await;
            assert_eq!(rest.is_ok(), is_whole, "{answer:?} {ending:?} {alpn:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_comes_with_the_cut_is_not_lost_and_no_whole_body() {
    for alpn in [HTTP1, HTTP2] {
        let (scene, peer) = Peer::scene(HTTP2).await;
        let asked = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
        let (response, _open) = tokio::join!(within(asked), async {
            let mut wire = peer.accept_wire(&[]).await;
            assert_eq!(wire.read_request().await.unwrap(), 1);
            // In one piece, so that nobody has looked at the head before the cut.
            let head = frame(HEADERS, END_HEADERS, 1, STATUS_200);
            let begun = frame(DATA, 0, 1, b"the beginning");
            wire.write(&[head, begun, reset(1, NO_ERROR)].concat()).await.unwrap();
            wire
        });
        // Towards the client, too, the cut may overtake the head.
        if let Ok(response) = response {
            assert_eq!(response.status(), 200, "{alpn:?}");
            assert!(within(response.into_body().collect()).await.is_err(), "{alpn:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_is_never_a_whole_body() {
    for alpn in [HTTP1, HTTP2] {
        let (scene, peer) = Peer::scene(HTTP2).await;
        for ending in [Ending::Reset, Ending::Bare, Ending::Goodbye] {
            let asked = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
            let (response, wire) = tokio::join!(within(asked), async {
                let mut wire = peer.accept_wire(&[]).await;
                let stream = wire.read_request().await.unwrap();
                wire.write(&frame(HEADERS, END_HEADERS, stream, STATUS_200)).await.unwrap();
                wire.write(&frame(DATA, 0, stream, b"the beginning")).await.unwrap();
                wire
            });
            let mut body = response.unwrap().into_body();
            assert_eq!(
                within(body.frame()).await.unwrap().unwrap().into_data().unwrap(),
                "the beginning"
            );
            end(wire.0, ending).await;
            assert!(within(body.collect()).await.is_err(), "{ending:?} {alpn:?}");
        }
        // NO_ERROR is no end either; it may follow one.
        let (begun, whole) = (frame(DATA, 0, 1, b"the beginning"), frame(DATA, END_STREAM, 1, b""));
        let table = [
            (vec![reset(1, NO_ERROR)], false),
            (vec![go_away(0, NO_ERROR)], false),
            (vec![whole.clone(), reset(1, NO_ERROR)], true),
            (vec![whole, go_away(1, NO_ERROR)], true),
        ];
        for (ending, is_whole) in table {
            let (scene, peer) = Peer::scene(HTTP2).await;
            let asked = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
            let (response, mut wire) = tokio::join!(within(asked), async {
                let mut wire = peer.accept_wire(&[]).await;
                assert_eq!(wire.read_request().await.unwrap(), 1);
                wire.write(&frame(HEADERS, END_HEADERS, 1, STATUS_200)).await.unwrap();
                wire.write(&begun).await.unwrap();
                wire
            });
            let mut body = response.unwrap().into_body();
            let first = within(body.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(first, "the beginning");
            wire.write(&ending.concat()).await.unwrap();
            let rest = within(body.collect()).await;
            assert_eq!(rest.is_ok(), is_whole, "{ending:?} {alpn:?}");
        }
        // END_STREAM before the length that the head told: `content-length: 100` in HPACK.
        let head = [STATUS_200, b"\x0f\x0d\x03100"].concat();
        let asked = scene.client.send(Visit::to(PEER, alpn), client::get("/v1/x"));
        let (response, _open) = tokio::join!(within(asked), async {
            let mut wire = peer.accept_wire(&[]).await;
            let stream = wire.read_request().await.unwrap();
            wire.write(&frame(HEADERS, END_HEADERS, stream, &head)).await.unwrap();
            wire.write(&frame(DATA, END_STREAM, stream, b"the beginning")).await.unwrap();
            wire
        });
        if let Ok(response) = response {
            assert!(within(response.into_body().collect()).await.is_err(), "{alpn:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_breaks_off_its_body_is_never_taken_for_one_that_ended() {
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let scene = Scene::start(Options { settings, ..Options::default() }).await;
        let head = "POST /v1/upload HTTP/1.1\r\nHost: api.example.com\r\n";
        let bodies = [
            "Content-Length: 100\r\n\r\nhello",
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        ];
        for body in bodies {
            scene.world.api().clear();
            let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
            within(tls.write_all(format!("{head}{body}").as_bytes())).await.unwrap();
            within(
                scene.world.api().wait_until(|seen| seen.len() == 1 && seen[0].request.bytes == 5),
            )
            .await;
            drop(tls);
            let cut = |seen: &[Seen]| seen[0].request.end == End::Cut;
            within(scene.world.api().wait_until(cut)).await;
        }
        for says_no_error in [false, true] {
            let tls = scene.client.greet(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
            let mut wire = Wire::client(tls).await.unwrap();
            scene.world.api().clear();
            // A GET with a body is as good as a POST.
            let head = super::wire::get("api.example.com", "/v1/upload");
            wire.write(&frame(HEADERS, END_HEADERS, 1, &head)).await.unwrap();
            wire.write(&frame(DATA, 0, 1, b"hello")).await.unwrap();
            let come = |seen: &[Seen]| seen.len() == 1 && seen[0].request.bytes == 5;
            within(scene.world.api().wait_until(come)).await;
            let _open = if says_no_error {
                wire.write(&reset(1, NO_ERROR)).await.unwrap();
                Some(wire)
            } else {
                drop(wire);
                None
            };
            let ended = |seen: &[Seen]| seen[0].request.end != End::Open;
            within(scene.world.api().wait_until(ended)).await;
            scene.world.api().seen().iter().for_each(|seen| assert_eq!(seen.request.end, End::Cut));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_that_frame_are_left_out_and_the_message_ends() {
    let fields = "Transfer-Encoding: chunked\r\nConnection: close\r\nContent-Length: 9\r\nTE: trailers\r\n\
                  Keep-Alive: 5\r\nUpgrade: x\r\nHost: evil.example\r\nProxy-Connection: x\r\n";
    let body = format!("5\r\nhello\r\n0\r\n{fields}X-Kept: y\r\n\r\n");
    // To an upstream that speaks HTTP/2.
    let scene = Scene::usual().await;
    let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let head =
        "POST /v1/upload HTTP/1.1\r\nHost: api.example.com\r\nTransfer-Encoding: chunked\r\n\r\n";
    within(tls.write_all(format!("{head}{body}").as_bytes())).await.unwrap();
    let answer = within(read_head(&mut tls)).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let seen = &scene.world.api().seen()[0].request;
    assert_eq!((seen.bytes, seen.end), (5, End::Complete));
    let trailers: Vec<_> = seen.trailers.keys().map(|name| name.as_str()).collect();
    assert_eq!(trailers, ["x-kept"]);
    // To a client that does.
    let (scene, peer) = Peer::scene(HTTP1).await;
    let asked = async {
        let answer = scene.client.send(Visit::to(PEER, HTTP2), client::get("/v1/x")).await.unwrap();
        answer.into_body().collect().await.unwrap()
    };
    let (answer, _open) = tokio::join!(within(asked), async {
        let mut stream = peer.accept().await;
        read_head(&mut stream).await;
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        stream
    });
    let trailers = answer.trailers().unwrap();
    assert_eq!((trailers.len(), &trailers["x-kept"]), (1, &"y".parse().unwrap()));
    assert_eq!(answer.to_bytes(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_is_empty_behind_a_host_is_the_root() {
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let scene = Scene::start(Options { settings, ..Options::default() }).await;
        for (behind, path) in [("", "/"), ("?a=b", "/?a=b"), ("#c", "/"), ("/?", "/?")] {
            scene.world.api().clear();
            let request = format!(
                "GET https://api.example.com{behind} HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
            );
            let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
            within(tls.write_all(request.as_bytes())).await.unwrap();
            let answer = within(read_head(&mut tls)).await;
            assert!(!answer.contains("x-valetkey-error"), "{behind}: {answer}");
            assert_eq!(scene.world.api().seen()[0].path, path, "{behind}, {http1_only}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_names_no_path_or_shows_the_credential_is_refused() {
    let scene = Scene::usual().await;
    let behind = "GET /v1/behind HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n";
    let table = [
        ("GET *", 400, false),
        ("POST api.example.com:443", 400, false),
        ("OPTIONS api.example.com:443", 400, false),
        ("CONNECT api.example.com:443", 403, false),
        ("TRACE /v1/x", 403, true),
        ("trace /v1/x", 403, true),
    ];
    for (line, status, goes_on) in table {
        scene.world.api().clear();
        let request = format!("{line} HTTP/1.1\r\nHost: api.example.com\r\n\r\n{behind}");
        let mut tls = scene.client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
        within(tls.write_all(request.as_bytes())).await.unwrap();
        let mut answer = Vec::new();
        let _end = within(tls.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{line}: {answer}");
        let paths: Vec<_> = scene.world.api().seen().iter().map(|seen| seen.path.clone()).collect();
        let expected: &[&str] = if goes_on { &["/v1/behind"] } else { &[] };
        assert_eq!(paths, expected, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_http2_lets_pass_goes_on_clean_or_not_at_all() {
    for http1_only in [false, true] {
        let settings = Settings { http1_only, ..Settings::default() };
        let scene = Scene::start(Options { settings, ..Options::default() }).await;
        let visit = Visit::to(EXAMPLE, HTTP2);
        let mut request = client::get("/v1/x");
        request.headers_mut().insert("x-own", " a value\t".parse().unwrap());
        let answer = within(scene.client.send(visit, request)).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(scene.world.api().seen()[0].headers["x-own"], "a value");
        scene.world.api().clear();
        // `x"y: a`, which h2 takes for a name.
        let mut wire = Wire::client(scene.client.greet(visit).await.unwrap()).await.unwrap();
        let quoted = b"\x00\x03x\"y\x01a";
        let head = [&super::wire::get("api.example.com", "/v1/x")[..], quoted].concat();
        wire.write(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &head)).await.unwrap();
        within(wire.read_to(HEADERS)).await.unwrap();
        assert!(scene.world.api().seen().is_empty());
    }
}
