//! Bytes flow: bodies both ways, in every pair of protocols, neither held back nor changed.

use std::io::Write as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use rustls::HandshakeKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use valetkey::sandbox::client::{self, ClientBody, HTTP1, HTTP2, Visit, gather};
use valetkey::sandbox::{End, Settings};

use super::support::{EXAMPLE, Options, Scene, within};

const NO_ALPN: &[&[u8]] = &[];

/// Scenes whose upstream offers both protocols, and only HTTP/1.1.
async fn upstreams() -> [Scene; 2] {
    let http1_only = Settings { http1_only: true, ..Settings::default() };
    let old = Scene::start(Options { settings: http1_only, ..Options::default() });
    [Scene::usual().await, old.await]
}

/// A body that the test writes as it goes.
fn written() -> (mpsc::Sender<Frame<Bytes>>, ClientBody) {
    let (sender, receiver) = mpsc::channel(1);
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|frame| (Ok(frame), receiver))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

fn post(path: &str, body: ClientBody) -> Request<ClientBody> {
    let mut request = client::post(path, Bytes::new()).map(|_| body);
    request.headers_mut().insert("te", "trailers".parse().unwrap());
    request.headers_mut().insert("trailer", "x-sum".parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pair_of_protocols_carries_every_shape() {
    for scene in upstreams().await {
        for alpn in [HTTP1, HTTP2, NO_ALPN] {
            let visit = Visit::to(EXAMPLE, alpn);
            let mut head = client::get("/v1/bytes/12345");
            *head.method_mut() = Method::HEAD;
            let answer = within(scene.client.send(visit, head)).await.unwrap();
            assert_eq!(answer.headers()["content-length"], "12345");
            assert!(within(gather(answer)).await.unwrap().body().is_empty());
            for status in [204, 304, 404, 500] {
                let path = format!("/v1/status/{status}");
                let answer = within(scene.client.get(visit, &path)).await.unwrap();
                assert_eq!(answer.status(), status);
                assert!(!answer.headers().contains_key("x-valetkey-error"));
            }
            for size in [0, 1, 70_000] {
                let answer =
                    within(scene.client.get(visit, &format!("/v1/bytes/{size}"))).await.unwrap();
                assert_eq!(answer.body().len(), size);
                let sent = scene.client.send(visit, client::post("/v1/upload", vec![b'x'; size]));
                let answer = within(gather(within(sent).await.unwrap())).await.unwrap();
                let told: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
                assert_eq!(told["bytes"], size);
            }
            let gzip = within(scene.client.get(visit, "/v1/gzip")).await.unwrap();
            assert_eq!(gzip.headers()["content-encoding"], "gzip");
            assert_eq!(gzip.body()[..2], [0x1f, 0x8b], "not decompressed");
            let away =
                within(scene.client.get(visit, "/v1/redirect?to=https://other.example.com/")).await;
            let away = away.unwrap();
            assert_eq!(
                (away.status().as_u16(), &away.headers()["location"]),
                (302, &"https://other.example.com/".parse().unwrap())
            );
        }
        let signed_in = |seen: &valetkey::sandbox::Seen| {
            seen.headers.get_all("authorization").iter().count() == 1
        };
        assert!(scene.world.api().seen().iter().all(signed_in));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_echoed_while_it_is_written_with_its_trailers() {
    for scene in upstreams().await {
        for alpn in [HTTP1, HTTP2] {
            let (writer, body) = written();
            writer.send(Frame::data("first".into())).await.unwrap();
            let mut connection = scene.client.open(Visit::to(EXAMPLE, alpn)).await.unwrap();
            let answer = within(connection.send(post("/v1/echo", body))).await.unwrap();
            let mut echo = answer.into_body();
            let first = within(echo.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(first, "first", "it came back before the rest was sent");
            writer.send(Frame::data("second".into())).await.unwrap();
            let second = within(echo.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(second, "second");
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "42".parse().unwrap());
            trailers.insert("authorization", "Bearer smuggled".parse().unwrap());
            writer.send(Frame::trailers(trailers)).await.unwrap();
            drop(writer);
            let rest = within(echo.collect()).await.unwrap();
            let trailers = rest.trailers().expect("trailers came back");
            assert_eq!(trailers["x-sum"], "42");
            assert!(!trailers.contains_key("authorization"), "the client's own credential");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_one_by_one() {
    for scene in upstreams().await {
        for alpn in [HTTP1, HTTP2] {
            let request = client::get("/v1/sse?n=3");
            let mut events = within(scene.client.send(Visit::to(EXAMPLE, alpn), request))
                .await
                .unwrap()
                .into_body();
            for number in 0..3 {
                let event = within(events.frame()).await.unwrap().unwrap().into_data().unwrap();
                let text = String::from_utf8(event.to_vec()).unwrap();
                assert!(text.starts_with(&format!("id: {number}\n")), "{text}");
                scene.world.api().release_event();
            }
            assert!(within(events.collect()).await.unwrap().to_bytes().is_empty());
            // One release is left over.
            drop(within(scene.client.get(Visit::to(EXAMPLE, alpn), "/v1/sse?n=2")).await.unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_waits_for_no_acknowledgement() {
    let scenes = upstreams().await;
    // Other work on the machine may make many slow for a while.
    for _ in 0..3 {
        let mut slow = 0;
        for number in 0..CONNECTIONS {
            let (scene, alpn) = (&scenes[number % 2], [HTTP1, HTTP2][number / 2 % 2]);
            let begun = Instant::now();
            let answer = within(scene.client.get(Visit::to(EXAMPLE, alpn), "/v1/x")).await;
            assert_eq!(answer.unwrap().status(), 200);
            slow += usize::from(begun.elapsed() > WITHOUT_NAGLE);
        }
        println!("{slow} of {CONNECTIONS} new connections took more than {WITHOUT_NAGLE:?}");
        if slow < CONNECTIONS / 8 {
            return;
        }
    }
    panic!("new connections wait for something");
}

const CONNECTIONS: usize = 40;

/// Where Nagle's algorithm is on, a small write behind another one waits for the acknowledgement of that one, which is
/// delayed by 40 ms (`TCP_DELACK_MIN` of Linux): on a third to a half of the new connections. All else takes a tenth of this.
const WITHOUT_NAGLE: Duration = Duration::from_millis(25);

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_the_upstream_back() {
    const SIZE: u64 = 1 << 30;
    for scene in upstreams().await {
        for alpn in [HTTP1, HTTP2] {
            scene.world.api().clear();
            let request = client::get(&format!("/v1/bytes/{SIZE}"));
            let answer =
                within(scene.client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap();
            let mut body = answer.into_body();
            let mut read = 0;
            while read < 4 << 20 {
                read +=
                    within(body.frame()).await.unwrap().unwrap().into_data().unwrap().len() as u64;
            }
            // What is on its way: windows, buffers and sockets, never the rest of the body.
            let sent = scene.world.api().seen()[0].response.bytes;
            assert!(sent < read + (48 << 20), "{sent} sent, {read} read");
            drop(body);
            within(scene.world.api().wait_until(|seen| seen[0].response.end == End::Cut)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_goes_away_is_noticed_at_once() {
    for scene in upstreams().await {
        for alpn in [HTTP1, HTTP2] {
            scene.world.api().clear();
            // The client goes while it waits for the head,
            let mut connection = scene.client.open(Visit::to(EXAMPLE, alpn)).await.unwrap();
            tokio::select! {
                _ = connection.send(client::get("/v1/hold")) => panic!("it was not released"),
                () = within(scene.world.api().wait_for(1)) => {}
            }
            drop(connection);
            within(scene.world.api().wait_until(|seen| seen[0].response.end == End::Cut)).await;
            // and the upstream in the middle of its body.
            for path in ["/v1/reset-mid-body", "/v1/close-before-head"] {
                let answer = scene.client.get(Visit::to(EXAMPLE, alpn), path);
                match within(answer).await {
                    Ok(answer) => assert_eq!(answer.status(), 502, "{path}: a clean end"),
                    Err(error) => drop(error),
                }
            }
            scene.assert_alive().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_streams_never_delay_the_next_request() {
    let scene = Scene::usual().await;
    let visit = Visit::to(EXAMPLE, HTTP1);
    let holding: Vec<_> = (0..250)
        .map(|_| {
            let client = scene.client.clone();
            valetkey::tasks::Tasks::new().spawn(async move { client.get(visit, "/v1/hold").await })
        })
        .collect();
    within(scene.world.api().wait_for(250)).await;
    scene.assert_alive().await;
    // HTTP/2 takes a hundred streams on each connection, so a few connections do.
    assert!(scene.world.connections() < 20, "{}", scene.world.connections());
    for _ in 0..250 {
        scene.world.api().release();
    }
    for held in holding {
        assert_eq!(within(held).await.unwrap().unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_used_again() {
    for scene in upstreams().await {
        let mut connection = scene.client.open(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
        for _ in 0..100 {
            assert_eq!(within(connection.get("/v1/x")).await.unwrap().status(), 200);
        }
        assert!(scene.world.connections() <= 2, "{}", scene.world.connections());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_lets_exchanges_end() {
    let scene = Scene::usual().await;
    let (client, visit) = (scene.client.clone(), Visit::to(EXAMPLE, HTTP1));
    let tasks = valetkey::tasks::Tasks::new();
    let held = tasks.spawn(async move { client.get(visit, "/v1/hold").await });
    within(scene.world.api().wait_for(1)).await;
    let proxy = scene.proxy.clone();
    let ending = tasks.spawn(async move { proxy.shut_down(Duration::from_secs(20)).await });
    while scene.client.tunnel(EXAMPLE).await.is_ok() {
        tokio::task::yield_now().await;
    }
    scene.world.api().release();
    assert_eq!(within(held).await.unwrap().unwrap().status(), 200);
    within(ending).await.unwrap();
}

#[tokio::test]
async fn the_ticket_of_a_session_comes_with_the_first_response() {
    let scene = Scene::usual().await;
    let client = scene.client.resuming();
    let visit = Visit::to(EXAMPLE, HTTP1);
    let (mut stream, mut tls) = client.greet(visit).await.unwrap().into_inner();
    assert_eq!(tls.handshake_kind(), Some(HandshakeKind::Full));
    let request = b"GET /v1/alive HTTP/1.1\r\nhost: api.example.com\r\n\r\n";
    tls.writer().write_all(request).unwrap();
    let mut sent = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut sent).unwrap();
    }
    stream.write_all(&sent).await.unwrap();
    let mut read = [0; 4096];
    let len = within(stream.read(&mut read)).await.unwrap();
    tls.read_tls(&mut &read[..len]).unwrap();
    let state = tls.process_new_packets().unwrap();
    assert!(state.plaintext_bytes_to_read() > 0, "{len} bytes came, and no response in them");

    let again = client.greet(visit).await.unwrap();
    assert_eq!(again.get_ref().1.handshake_kind(), Some(HandshakeKind::Resumed));
}
