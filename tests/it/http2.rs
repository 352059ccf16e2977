//! HTTP/2 on both legs: safe retry, limits of streams, flow control, gRPC, cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{Barrier, mpsc};
use tokio_rustls::server::TlsStream;
use valetkey::sandbox::client::{self, ClientBody, Connection, HTTP1, HTTP2, Visit, gather};
use valetkey::sandbox::{End, ISSUER_HOST, Settings};
use valetkey::tasks::Tasks;

use super::peer::{PEER, Peer};
use super::support::{EXAMPLE, Options, Scene, within};
use super::wire::{
    CANCEL, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, NO_ERROR, REFUSED_STREAM,
    RST_STREAM, STATUS_200, Wire, frame, get, go_away, reset,
};

type Ended = Wire<TlsStream<TcpStream>>;

/// What a peer does with the one request of a connection.
#[derive(Clone, Copy, Debug)]
enum Act {
    Answer,
    Close,
    GoAway { last: u32, reason: u32 },
    GoAwayThenClose { last: u32 },
    Reset(u32),
}

/// Takes a connection for each act, and keeps it open; counts the requests.
async fn play(peer: Peer, acts: Vec<Act>, requests: Arc<AtomicUsize>) {
    let mut open: Vec<Ended> = Vec::new();
    for act in acts {
        let mut wire = peer.accept_wire(&[]).await;
        let stream = wire.read_request().await.unwrap();
        requests.fetch_add(1, Ordering::SeqCst);
        let answer = match act {
            Act::Answer => frame(HEADERS, END_HEADERS | END_STREAM, stream, STATUS_200),
            Act::Close => continue,
            Act::GoAway { last, reason } => go_away(last, reason),
            Act::GoAwayThenClose { last } => {
                wire.write(&go_away(last, NO_ERROR)).await.unwrap();
                // Closed with something unread, TCP would reset, and take the GOAWAY with it.
                wire.0.shutdown().await.unwrap();
                let _until_it_ends = tokio::io::copy(&mut wire.0, &mut tokio::io::sink()).await;
                continue;
            }
            Act::Reset(reason) => reset(stream, reason),
        };
        wire.write(&answer).await.unwrap();
        open.push(wire);
    }
    std::future::pending::<()>().await;
}

/// Sends one request to a peer that acts so; the status that the client got, and how often it was sent.
async fn outcome(acts: &[Act], alpn: &[&[u8]], request: Request<ClientBody>) -> (u16, usize) {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let requests = Arc::new(AtomicUsize::new(0));
    let playing = Tasks::new().spawn(play(peer, acts.to_vec(), requests.clone()));
    let answer = within(scene.client.send(Visit::to(PEER, alpn), request)).await.unwrap();
    playing.abort();
    (answer.status().as_u16(), requests.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_provably_not_processed_is_sent_again() {
    const INTERNAL_ERROR: u32 = 2;
    let table = [
        (Act::Reset(REFUSED_STREAM), true),
        (Act::GoAway { last: 0, reason: NO_ERROR }, true),
        (Act::GoAwayThenClose { last: 0 }, true),
        (Act::GoAway { last: 0, reason: INTERNAL_ERROR }, false),
        (Act::GoAway { last: 0, reason: ENHANCE_YOUR_CALM }, false),
        (Act::GoAwayThenClose { last: 1 }, false),
        (Act::Reset(CANCEL), false),
        (Act::Reset(INTERNAL_ERROR), false),
        (Act::Close, false),
    ];
    for alpn in [HTTP1, HTTP2] {
        for (act, again) in table {
            for request in [client::get("/v1/x"), client::post("/v1/x", "a body")] {
                let method = request.method().clone();
                let expected = if again { (200, 2) } else { (502, 1) };
                let seen = outcome(&[act, Act::Answer], alpn, request).await;
                assert_eq!(seen, expected, "{act:?} {method} {alpn:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_sent_three_times_at_most_and_never_without_its_whole_body() {
    let refused = Act::Reset(REFUSED_STREAM);
    let (refusals, request) = ([refused, refused, refused, Act::Answer], client::get("/v1/x"));
    assert_eq!(outcome(&refusals, HTTP2, request).await, (502, 3));

    // The copy of the body stops growing at 1 MiB; the peer has read more than that when it refuses.
    let (scene, peer) = Peer::scene(HTTP2).await;
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let playing = Tasks::new().spawn(async move {
        for act in [refused, Act::Answer] {
            let stream = peer.accept().await;
            let mut builder = h2::server::Builder::new();
            builder.initial_window_size(4 << 20).initial_connection_window_size(4 << 20);
            let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            Tasks::new().spawn(async move {
                let mut body = request.into_body();
                let mut read = 0;
                while read < 3 << 20 {
                    read += body.data().await.unwrap().unwrap().len();
                }
                match act {
                    Act::Answer => drop(respond.send_response(Response::new(()), true)),
                    _ => respond.send_reset(h2::Reason::REFUSED_STREAM),
                }
            });
            let _until_it_ends = connection.accept().await;
        }
    });
    let request = client::post("/v1/x", vec![b'x'; 3 << 20]);
    let answer = within(scene.client.send(Visit::to(PEER, HTTP1), request)).await.unwrap();
    assert_eq!((answer.status().as_u16(), requests.load(Ordering::SeqCst)), (502, 1));
    playing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_request_is_never_sent_again() {
    let (scene, peer) = Peer::at(ISSUER_HOST, HTTP2).await;
    let requests = Arc::new(AtomicUsize::new(0));
    let acts = vec![Act::Reset(REFUSED_STREAM), Act::Answer];
    let playing = Tasks::new().spawn(play(peer, acts, requests.clone()));
    let mut request = client::post("/oauth/token", "grant_type=refresh_token&refresh_token=theirs");
    let form = http::HeaderValue::from_static("application/x-www-form-urlencoded");
    request.headers_mut().insert("content-type", form);
    let target = format!("{ISSUER_HOST}:443");
    let answer = within(scene.client.send(Visit::to(&target, HTTP1), request)).await.unwrap();
    assert_eq!((answer.status().as_u16(), requests.load(Ordering::SeqCst)), (502, 1));
    playing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expects_a_100_reaches_an_upstream_that_speaks_only_http2() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let mut request = client::post("/v1/x", "a body");
    request.headers_mut().insert("expect", http::HeaderValue::from_static("100-continue"));
    let playing = async {
        // Dialled ahead.
        let stream = peer.accept().await;
        peer.disagree().await;
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let had_expectation = request.headers().contains_key("expect");
        let reading = async {
            let read = read_all(request.into_body()).await;
            let mut answer = Response::new(());
            *answer.status_mut() = http::StatusCode::CREATED;
            drop::<h2::SendStream<Bytes>>(respond.send_response(answer, true).unwrap());
            (read, had_expectation)
        };
        let mut reading = std::pin::pin!(reading);
        let read = tokio::select! {
            read = &mut reading => read,
            _ = connection.accept() => panic!("the connection ended"),
        };
        (read, connection)
    };
    let sent = scene.client.send(Visit::to(PEER, HTTP1), request);
    // Until the answer is here the connection is driven.
    let mut playing = std::pin::pin!(playing);
    let mut sent = std::pin::pin!(within(sent));
    let ((read, had_expectation), mut connection) = tokio::select! {
        _ = &mut sent => panic!("an answer before it was given"),
        played = within(&mut playing) => played,
    };
    let answer = tokio::select! {
        answer = &mut sent => answer,
        _ = connection.accept() => panic!("the connection ended"),
    };
    assert_eq!((answer.unwrap().status().as_u16(), read, had_expectation), (201, Some(6), false));
}

/// Reads a body to its end; `None` when it broke off.
async fn read_all(mut body: h2::RecvStream) -> Option<usize> {
    let mut read = 0;
    while let Some(data) = body.data().await {
        let len = data.ok()?.len();
        read += len;
        body.flow_control().release_capacity(len).unwrap();
    }
    Some(read)
}

/// Refuses a request whose body it has read, takes it the second time, and gives the head of the answer
/// before it reads the body; what it then reads, once it is asked to.
async fn refuse_then_answer_early(
    peer: Peer,
    len: usize,
    go_on: Arc<tokio::sync::Notify>,
) -> Option<usize> {
    let mut first = h2::server::Builder::new();
    first.initial_window_size(4 << 20).initial_connection_window_size(4 << 20);
    let mut refusing = first.handshake::<_, Bytes>(peer.accept().await).await.unwrap();
    let (request, mut respond) = refusing.accept().await.unwrap().unwrap();
    let refusal = Tasks::new().spawn(async move {
        let mut body = request.into_body();
        let mut read = 0;
        while read < len {
            read += body.data().await.unwrap().unwrap().len();
        }
        respond.send_reset(h2::Reason::REFUSED_STREAM);
    });
    let _driven = Tasks::new().spawn(async move { while refusing.accept().await.is_some() {} });
    refusal.await.unwrap();
    let mut taking = h2::server::handshake(peer.accept().await).await.unwrap();
    let (request, mut respond) = taking.accept().await.unwrap().unwrap();
    let _driven = Tasks::new().spawn(async move { while taking.accept().await.is_some() {} });
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    go_on.notified().await;
    let read = read_all(request.into_body()).await;
    answer.send_data(Bytes::new(), true).unwrap();
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_sent_again_is_whole_though_the_answer_begins_before_its_end() {
    const LEN: usize = 1_000_000;
    for alpn in [HTTP1, HTTP2] {
        let (scene, peer) = Peer::scene(HTTP2).await;
        let go_on = Arc::new(tokio::sync::Notify::new());
        let playing = Tasks::new().spawn(refuse_then_answer_early(peer, LEN, go_on.clone()));
        let frames = (0..10).map(|_| Ok(Frame::data(Bytes::from(vec![b'x'; LEN / 10]))));
        // No length is told, which would have shown the hole.
        let mut request = client::post("/v1/x", "");
        *request.body_mut() = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let answer = within(scene.client.send(Visit::to(PEER, alpn), request)).await.unwrap();
        // The client has the head, so the proxy has given the copy up.
        go_on.notify_one();
        assert_eq!(within(gather(answer)).await.unwrap().status(), 200, "{alpn:?}");
        assert_eq!(within(playing).await.unwrap(), Some(LEN), "{alpn:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_goes_away_is_never_chosen_again_while_its_streams_end() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let visit = Visit::to(PEER, HTTP1);
    let mut first = scene.client.open(visit).await.unwrap();
    let (answer, (mut old, stream)) = tokio::join!(first.send(client::get("/v1/long")), async {
        let mut wire = peer.accept_wire(&[]).await;
        let stream = wire.read_request().await.unwrap();
        wire.write(&frame(HEADERS, END_HEADERS, stream, STATUS_200)).await.unwrap();
        wire.write(&frame(DATA, 0, stream, b"begun ")).await.unwrap();
        wire.write(&go_away(stream, NO_ERROR)).await.unwrap();
        (wire, stream)
    });
    let mut long = answer.unwrap().into_body();
    assert_eq!(within(long.frame()).await.unwrap().unwrap().into_data().unwrap(), "begun ");

    let mut fresh: Option<Ended> = None;
    for _ in 0..20 {
        let request = scene.client.get(visit, "/v1/next");
        let (answer, ()) = tokio::join!(within(request), async {
            let wire = match &mut fresh {
                Some(wire) => wire,
                none => none.insert(peer.accept_wire(&[]).await),
            };
            let stream = within(wire.read_request()).await.unwrap();
            let answer = frame(HEADERS, END_HEADERS | END_STREAM, stream, STATUS_200);
            wire.write(&answer).await.unwrap();
        });
        assert_eq!(answer.unwrap().status(), 200);
    }

    old.write(&frame(DATA, END_STREAM, stream, b"and ended")).await.unwrap();
    assert_eq!(within(long.collect()).await.unwrap().to_bytes(), "and ended");
    // Having no stream any more, it is closed, and was never asked for another one.
    while let Ok(frame) = within(old.read()).await {
        assert_ne!(frame.kind, HEADERS, "{frame:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_takes_few_streams_refuses_nobody() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let (connections, together) = (Arc::new(AtomicUsize::new(0)), Arc::new(Barrier::new(10)));
    let (count, tasks) = (connections.clone(), Tasks::new());
    let playing = tasks.clone().spawn(async move {
        loop {
            let stream = peer.accept().await;
            count.fetch_add(1, Ordering::SeqCst);
            let together = together.clone();
            tasks.spawn(async move {
                let mut builder = h2::server::Builder::new();
                builder.max_concurrent_streams(2);
                let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let together = together.clone();
                    Tasks::new().spawn(async move {
                        // Nobody is answered before all ten are here.
                        together.wait().await;
                        respond.send_response(Response::new(()), true).unwrap();
                    });
                }
            });
        }
    });
    let requests = (0..10).map(|_| scene.client.get(Visit::to(PEER, HTTP1), "/v1/x"));
    for answer in within(futures_util::future::join_all(requests)).await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    // A refusal would have made it more.
    assert_eq!(connections.load(Ordering::SeqCst), 5);
    playing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_event_streams_do_not_delay_the_next_request() {
    let scene = Scene::usual().await;
    let connection = scene.client.open(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
    let streams = (0..200).map(|_| async {
        let mut connection = connection.share().unwrap();
        let answer = connection.send(client::get("/v1/sse?n=2")).await.unwrap();
        let mut events = answer.into_body();
        let first = events.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(first.starts_with(b"id: 0\n"));
        events
    });
    let streams = within(futures_util::future::join_all(streams)).await;
    assert_eq!(streams.len(), 200);
    // On the same connection, and on others.
    let mut same = connection.share().unwrap();
    assert_eq!(within(same.get("/v1/next")).await.unwrap().status(), 200);
    for alpn in [HTTP1, HTTP2] {
        let next = scene.client.get(Visit::to(EXAMPLE, alpn), "/v1/next");
        assert_eq!(within(next).await.unwrap().status(), 200);
    }
    let seen = scene.world.api().seen();
    let open = seen.iter().filter(|seen| seen.response.end == End::Open).count();
    assert_eq!(open, 200, "they were open all the while");
    assert!(scene.world.connections() <= 3, "{}", scene.world.connections());
    streams.iter().for_each(|_| scene.world.api().release_event());
    for events in streams {
        assert!(within(events.collect()).await.unwrap().to_bytes().starts_with(b"id: 1\n"));
    }
}

/// Sends requests whose bodies nobody reads, or whose answers nobody reads, and keeps them so.
async fn stalled(
    scene: &Scene,
    count: usize,
    alpn: &[&[u8]],
) -> Vec<(Connection, Response<hyper::body::Incoming>)> {
    let mut stalled = Vec::new();
    for _ in 0..count {
        let mut connection = scene.client.open(Visit::to(EXAMPLE, alpn)).await.unwrap();
        let request = client::get("/v1/bytes/1073741824");
        stalled.push(
            (within(connection.send(request)).await.map(|answer| (connection, answer))).unwrap(),
        );
    }
    stalled
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_do_not_stall_their_neighbours_on_an_upstream_connection() {
    let scene = Scene::usual().await;
    for alpn in [HTTP1, HTTP2] {
        scene.world.api().clear();
        let silent = stalled(&scene, 12, alpn).await;
        // Each has what a stream's window and the buffers on the way take.
        let full = |seen: &[valetkey::sandbox::Seen]| {
            seen.iter().filter(|seen| seen.response.bytes >= 1 << 19).count() == silent.len()
        };
        within(scene.world.api().wait_until(full)).await;
        for _ in 0..20 {
            let next = scene.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/bytes/3000000");
            assert_eq!(within(next).await.unwrap().body().len(), 3_000_000);
        }
        assert_eq!(scene.world.connections(), 1, "they shared one connection");
    }
}

/// A body that the test writes as it goes.
fn written() -> (mpsc::Sender<Frame<Bytes>>, ClientBody) {
    let (sender, receiver) = mpsc::channel(1);
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|frame| (Ok(frame), receiver))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_are_not_read_do_not_stall_their_neighbours_on_a_client_connection() {
    // Over HTTP/1.1 each has an upstream connection of its own, which says nothing of the others.
    let settings = Settings { http1_only: true, ..Settings::default() };
    let scene = Scene::start(Options { settings, ..Options::default() }).await;
    let connection = scene.client.open(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
    let (tasks, stuck) = (Tasks::new(), Arc::new(Barrier::new(13)));
    for _ in 0..12 {
        let (writer, body) = written();
        let mut connection = connection.share().unwrap();
        let request = client::post("/v1/hold", Bytes::new()).map(|_| body);
        tasks.spawn(async move { connection.send(request).await });
        let stuck = stuck.clone();
        tasks.spawn(async move {
            // More than the client may send on one stream, so that every window is used up.
            for _ in 0..4 {
                writer.send(Frame::data(vec![b'x'; 64 * 1024].into())).await.unwrap();
            }
            stuck.wait().await;
            while writer.send(Frame::data(vec![b'x'; 64 * 1024].into())).await.is_ok() {}
        });
    }
    within(stuck.wait()).await;
    within(scene.world.api().wait_for(12)).await;
    for _ in 0..20 {
        let mut connection = connection.share().unwrap();
        let sent = connection.send(client::post("/v1/upload", vec![b'x'; 300_000]));
        let told = within(gather(within(sent).await.unwrap())).await.unwrap();
        let told: serde_json::Value = serde_json::from_slice(told.body()).unwrap();
        assert_eq!(told["bytes"], 300_000);
    }
    let held = scene.world.api().seen();
    assert_eq!(held.iter().filter(|seen| seen.path == "/v1/hold").count(), 12);
}

/// A gRPC server of the test: one message back for each that comes, then the status in trailers; a method
/// `/Unknown` gets a head alone.
async fn serve_grpc(stream: TlsStream<TcpStream>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        Tasks::new().spawn(async move {
            let (head, mut messages) = request.into_parts();
            assert_eq!(head.headers["te"], "trailers");
            assert_eq!(head.headers["content-type"], "application/grpc");
            assert_eq!(head.headers["grpc-timeout"], "30S");
            assert_eq!(head.headers["authorization"], format!("Bearer {}", super::support::KEY));
            let answer = Response::builder().header("content-type", "application/grpc");
            if head.uri.path().ends_with("/Unknown") {
                let answer = answer.header("grpc-status", "12").body(()).unwrap();
                respond.send_response(answer, true).unwrap();
                return;
            }
            let mut stream = respond.send_response(answer.body(()).unwrap(), false).unwrap();
            while let Some(message) = messages.data().await {
                let message = message.unwrap();
                messages.flow_control().release_capacity(message.len()).unwrap();
                // The end of a body may come in a frame of its own.
                if message.is_empty() {
                    continue;
                }
                stream.send_data([b"re: ", &message[..]].concat().into(), false).unwrap();
            }
            let mut status = HeaderMap::new();
            status.insert("grpc-status", "0".parse().unwrap());
            status.insert("grpc-message", "done".parse().unwrap());
            stream.send_trailers(status).unwrap();
        });
    }
}

fn call(method: &str, body: ClientBody) -> Request<ClientBody> {
    let mut request = client::post(&format!("/pkg.Service/{method}"), Bytes::new()).map(|_| body);
    for (name, value) in
        [("te", "trailers"), ("content-type", "application/grpc"), ("grpc-timeout", "30S")]
    {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_calls_interleave_and_end_with_their_trailers() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let playing = Tasks::new().spawn(async move { serve_grpc(peer.accept().await).await });
    let connection = scene.client.open(Visit::to(PEER, HTTP2)).await.unwrap();
    let mut calls = Vec::new();
    for number in 0..20 {
        let (writer, body) = written();
        let mut connection = connection.share().unwrap();
        let answer = within(connection.send(call("Talk", body))).await.unwrap();
        assert_eq!(answer.headers()["content-type"], "application/grpc");
        calls.push((number, writer, answer.into_body()));
    }
    for round in 0..5 {
        for (number, writer, answers) in &mut calls {
            let message = format!("{number} {round}");
            writer.send(Frame::data(message.clone().into())).await.unwrap();
            let answer = within(answers.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(answer, format!("re: {message}"));
        }
    }
    for (_, writer, answers) in calls {
        drop(writer);
        let rest = within(answers.collect()).await.unwrap();
        let trailers = rest.trailers().unwrap();
        assert_eq!(
            (&trailers["grpc-status"], &trailers["grpc-message"]),
            (&"0".parse().unwrap(), &"done".parse().unwrap())
        );
        assert!(rest.to_bytes().is_empty());
    }
    let mut unknown = connection.share().unwrap();
    let answer = within(unknown.send(call("Unknown", client::empty()))).await.unwrap();
    assert_eq!(answer.headers()["grpc-status"], "12");
    assert!(within(gather(answer)).await.unwrap().body().is_empty());
    playing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_is_seen_as_such_at_the_other_side() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let tls = scene.client.greet(Visit::to(PEER, HTTP2)).await.unwrap();
    let mut client = Wire::client(tls).await.unwrap();
    let head = get("peer.example.com", "/v1/x");
    let reason =
        |frame: super::wire::Frame| u32::from_be_bytes(frame.payload[..].try_into().unwrap());

    // Before the head, with the body still open,
    client.write(&frame(HEADERS, END_HEADERS, 1, &head)).await.unwrap();
    let mut upstream = peer.accept_wire(&[]).await;
    let first = within(upstream.read_to(HEADERS)).await.unwrap().stream;
    client.write(&reset(1, CANCEL)).await.unwrap();
    let seen = within(upstream.read_to(RST_STREAM)).await.unwrap();
    assert_eq!((seen.stream, reason(seen)), (first, CANCEL));

    // in the middle of an answer,
    client.write(&frame(HEADERS, END_HEADERS | END_STREAM, 3, &head)).await.unwrap();
    let second = within(upstream.read_request()).await.unwrap();
    upstream.write(&frame(HEADERS, END_HEADERS, second, STATUS_200)).await.unwrap();
    upstream.write(&frame(DATA, 0, second, b"some")).await.unwrap();
    assert_eq!(within(client.read_to(DATA)).await.unwrap().payload, b"some");
    client.write(&reset(3, CANCEL)).await.unwrap();
    let seen = within(upstream.read_to(RST_STREAM)).await.unwrap();
    assert_eq!((seen.stream, reason(seen)), (second, CANCEL));

    // and by the upstream.
    client.write(&frame(HEADERS, END_HEADERS | END_STREAM, 5, &head)).await.unwrap();
    let third = within(upstream.read_request()).await.unwrap();
    upstream.write(&frame(HEADERS, END_HEADERS, third, STATUS_200)).await.unwrap();
    upstream.write(&frame(DATA, 0, third, b"some")).await.unwrap();
    assert_eq!(within(client.read_to(DATA)).await.unwrap().payload, b"some");
    upstream.write(&reset(third, CANCEL)).await.unwrap();
    let seen = within(client.read_to(RST_STREAM)).await.unwrap();
    assert_eq!((seen.stream, reason(seen)), (5, CANCEL));
}

#[tokio::test(flavor = "multi_thread")]
async fn long_heads_pass_both_ways_up_to_64_kib() {
    let (scene, peer) = Peer::scene(HTTP2).await;
    let (count, tasks) = (Arc::new(AtomicUsize::new(0)), Tasks::new());
    let requests = count.clone();
    let playing = tasks.clone().spawn(async move {
        loop {
            let stream = peer.accept().await;
            let requests = requests.clone();
            tasks.spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    requests.fetch_add(1, Ordering::SeqCst);
                    let wanted = request.headers()["x-wanted"].to_str().unwrap();
                    let long = "y".repeat(wanted.parse().unwrap());
                    let answer = Response::builder().header("x-long", long).body(()).unwrap();
                    drop(respond.send_response(answer, true));
                }
            });
        }
    });
    // The client of these tests takes long heads over HTTP/1.1 only.
    let table = [
        (HTTP2, 40_000, 1, 200, 1),
        (HTTP1, 1, 40_000, 200, 1),
        (HTTP2, 100_000, 1, 431, 0),
        (HTTP1, 1, 100_000, 502, 1),
    ];
    for (alpn, sent, wanted, status, arrived) in table {
        count.store(0, Ordering::SeqCst);
        let mut request = client::get("/v1/x");
        let wanted = http::HeaderValue::from(wanted);
        request.headers_mut().insert("x-wanted", wanted);
        request.headers_mut().insert("x-sent", "z".repeat(sent).parse().unwrap());
        let answer = within(scene.client.send(Visit::to(PEER, alpn), request)).await.unwrap();
        assert_eq!((answer.status().as_u16(), count.load(Ordering::SeqCst)), (status, arrived));
    }
    playing.abort();
}

/// How a field stands in a block of HPACK (RFC 7541 section 6), and the number of its name or of itself; 0 for a name
/// that is spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    InTable(usize),
    ForTable(usize),
    Alone(usize),
    Never(usize),
    /// No field: the table gets another size.
    Size(usize),
}

fn fields_of(mut block: &[u8]) -> Vec<Stands> {
    let mut fields = Vec::new();
    while let Some(first) = block.first() {
        let (bits, make): (_, fn(usize) -> Stands) = match first.leading_zeros() {
            0 => (7, Stands::InTable),
            1 => (6, Stands::ForTable),
            2 => (5, Stands::Size),
            3 => (4, Stands::Never),
            _ => (4, Stands::Alone),
        };
        let at = number(&mut block, bits);
        let field = make(at);
        if !matches!(field, Stands::InTable(_) | Stands::Size(_)) {
            for _ in 0..if at == 0 { 2 } else { 1 } {
                let len = number(&mut block, 7);
                block = &block[len..];
            }
        }
        fields.push(field);
    }
    fields
}

/// A number whose first bits are the last ones of a byte (RFC 7541 section 5.1).
fn number(block: &mut &[u8], bits: u32) -> usize {
    let most = (1 << bits) - 1;
    let mut take = || {
        let (first, rest) = block.split_first().unwrap();
        *block = rest;
        usize::from(*first)
    };
    let mut number = take() & most;
    let mut shift = 0;
    while number >= most {
        let more = take();
        number += (more & 0x7f) << shift;
        shift += 7;
        if more & 0x80 == 0 {
            break;
        }
    }
    number
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_is_never_kept_in_a_table_of_hpack() {
    /// The number of `authorization` (RFC 7541 appendix A), which is what these numbers begin to end with.
    const AUTHORIZATION: usize = 23;
    const LAST_OF_ALL: usize = 61;
    let (scene, peer) = Peer::scene(HTTP2).await;
    let mut connection = scene.client.open(Visit::to(PEER, HTTP2)).await.unwrap();
    let mut blocks = Vec::new();
    let mut wire = None;
    for _ in 0..3 {
        let mut request = client::get("/v1/x");
        request.headers_mut().insert("x-own", "the client's own".parse().unwrap());
        let (answer, ()) = tokio::join!(within(connection.send(request)), async {
            let wire = match &mut wire {
                Some(wire) => wire,
                none => none.insert(peer.accept_wire(&[]).await),
            };
            let head = within(wire.read_to(HEADERS)).await.unwrap();
            assert_eq!(head.flags & !END_STREAM, END_HEADERS, "neither padded nor in parts");
            let answer = frame(HEADERS, END_HEADERS | END_STREAM, head.stream, STATUS_200);
            wire.write(&answer).await.unwrap();
            blocks.push(fields_of(&head.payload));
        });
        assert_eq!(answer.unwrap().status(), 200);
    }
    for fields in &blocks {
        let never: Vec<_> = fields.iter().filter(|it| matches!(it, Stands::Never(_))).collect();
        assert_eq!(never, [&Stands::Never(AUTHORIZATION)], "{fields:?}");
        let other = [Stands::ForTable(AUTHORIZATION), Stands::Alone(AUTHORIZATION)];
        assert!(!fields.iter().any(|it| other.contains(it)), "{fields:?}");
    }
    // The same look sees that other fields are kept.
    assert!(blocks[0].contains(&Stands::ForTable(0)), "{blocks:?}");
    let is_kept = |it: &Stands| matches!(it, Stands::InTable(at) if *at > LAST_OF_ALL);
    assert!(blocks[1].iter().any(is_kept), "{blocks:?}");
}
