//! What bodies and floods cost the serving process in memory, as the kernel counts it.

use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Child;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use valetkey::sandbox::client::{self, Client, ClientBody, HTTP1, HTTP2, Visit};
use valetkey::sandbox::{Seen, Settings};
use valetkey::tasks::Tasks;

use super::support::{Scene, done};
use super::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, PING, SETTINGS,
    STATUS_200, Wire, frame, get, reset,
};

const EXAMPLE: &str = "api.example.com:443";

/// A host that the test plays.
const PEER: &str = "peer.example.com:443";

/// What a body may add to the memory of the process.
const MOST_FOR_A_BODY: u64 = 4 << 20;

/// What a flood may add: the buffers of its connection, and what is read of it in one turn.
const MOST_FOR_A_FLOOD: u64 = 4 << 20;

const GIB: u64 = 1 << 30;

/// A catcher of hangs: the slowest of these bodies takes a fraction of it, but machines differ.
fn within<T>(what: impl Future<Output = T>) -> impl Future<Output = T> {
    let what = Box::pin(what);
    async {
        tokio::time::timeout(Duration::from_secs(240), what).await.expect("it took more than 240 s")
    }
}

/// `valetkey serve` in a world with a peer.
struct Serving {
    scene: Scene,
    child: Child,
    client: Client,
    listener: TcpListener,
}

impl Serving {
    async fn start(http1_only: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peers = vec![("peer.example.com".to_owned(), listener.local_addr().unwrap())];
        let settings = Settings { http1_only, peers, ..Settings::default() };
        let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
        let rule = "[[rules]]\nhost = \"peer.example.com\"\ncredential = \"example\"\n";
        scene.configure(&format!("{rule}{}", scene.world.upstream_toml()));
        let info = scene.path("info.json");
        let listen = ["serve", "--listen", "127.0.0.1:0", "--server-info", info.to_str().unwrap()];
        let mut child = scene.valetkey(&listen).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        while !said.next_line().await.unwrap().unwrap().starts_with("listening") {}
        Tasks::new().spawn(async move { while let Ok(Some(_)) = said.next_line().await {} });
        let info: serde_json::Value = serde_json::from_slice(&fs::read(info).unwrap()).unwrap();
        let port = info["port"].as_u64().unwrap();
        let address: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
        let roots = scene.path("client.pem");
        fs::copy(info["ca"].as_str().unwrap(), &roots).unwrap();
        let client = Client::through(address, &roots).unwrap();
        let serving = Self { scene, child, client, listener };
        serving.warm_up().await;
        serving
    }

    /// Touches the code and makes the connections that what is measured needs as well.
    async fn warm_up(&self) {
        for alpn in [HTTP1, HTTP2] {
            let visit = Visit::to(EXAMPLE, alpn);
            for _ in 0..20 {
                let answer = self.client.get(visit, "/v1/bytes/65536").await.unwrap();
                assert_eq!(answer.body().len(), 65536);
                let sent = self.client.send(visit, client::post("/v1/upload", vec![0; 65536]));
                client::gather(sent.await.unwrap()).await.unwrap();
            }
        }
        self.scene.world.api().clear();
    }

    /// A line of `/proc/PID/status`, in bytes.
    fn status(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id().unwrap());
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_matches([':', ' ', '\t', 'k', 'B']).parse::<u64>().unwrap() * 1024
    }

    /// Memory now; the kernel's highest mark starts from here.
    fn mark(&self) -> u64 {
        fs::write(format!("/proc/{}/clear_refs", self.child.id().unwrap()), "5").unwrap();
        self.status("VmRSS")
    }

    /// How far the memory has risen above the mark at its highest.
    fn risen(&self, mark: u64) -> u64 {
        self.status("VmHWM").saturating_sub(mark)
    }

    /// Looks at the memory again and again until `moved` stands still, and says how often it looked.
    async fn watch_until_still(&self, moved: impl Fn() -> u64) -> usize {
        let (mut last, mut still, mut looks) = (moved(), 0, 0);
        while still < 200 {
            let visit = Visit::to(EXAMPLE, HTTP1);
            let alive = within(self.client.get(visit, "/v1/alive")).await.unwrap();
            assert_eq!(alive.status(), 200, "others are served meanwhile");
            self.status("VmRSS");
            looks += 1;
            let now = moved();
            still = if now == last { still + 1 } else { 0 };
            last = now;
        }
        looks
    }

    /// Others are served, three hundred times.
    async fn assert_alive_often(&self) {
        for _ in 0..300 {
            let alive = within(self.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/alive")).await;
            assert_eq!(alive.unwrap().status(), 200);
        }
    }

    async fn accept(&self, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
        let acceptor: TlsAcceptor = self.scene.world.acceptor(alpn).unwrap();
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        within(acceptor.accept(stream)).await.unwrap()
    }

    async fn stop(self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(done(self.child).await.status, 0);
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn count(mut body: Incoming) -> u64 {
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.unwrap().data_ref().map_or(0, Bytes::len) as u64;
    }
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_of_a_gibibyte_costs_little() {
    for http1_only in [true, false] {
        for alpn in [HTTP1, HTTP2] {
            let serving = Serving::start(http1_only).await;
            let mark = serving.mark();
            let request = client::get(&format!("/v1/bytes/{GIB}"));
            let sent = serving.client.send(Visit::to(EXAMPLE, alpn), request);
            let mut body = within(sent).await.unwrap().into_body();
            let first =
                within(body.frame()).await.unwrap().unwrap().into_data().unwrap().len() as u64;
            let api = serving.scene.world.api();
            let looks = serving.watch_until_still(|| api.seen()[0].response.bytes).await;
            let stalled = serving.risen(mark);
            assert_eq!(first + within(count(body)).await, GIB);
            let risen = serving.risen(mark);
            println!(
                "download, client {}, upstream {}: {:.2} MiB while stalled ({looks} looks), {:.2} MiB in all",
                String::from_utf8_lossy(alpn[0]),
                if http1_only { "http/1.1" } else { "h2" },
                mib(stalled),
                mib(risen)
            );
            assert!(risen <= MOST_FOR_A_BODY, "{:.2} MiB", mib(risen));
            serving.stop().await;
        }
    }
}

/// What five hundred streams to one origin may hold: a hundred on a wide connection, the others on narrow ones
/// (`upstream/pool/http2.rs`), with what the allocator adds: a frame of 16 KiB with its head takes 20 KiB.
const MOST_FOR_STREAMS: u64 = (50 + 4 * 7 + 32) << 20;

/// What a client's connection may hold beside: the buffers of hyper and rustls, 64 KiB each way, and of TLS, with up to a
/// quarter for the sizes that the allocator has.
const MOST_FOR_A_CONNECTION: u64 = 240 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_answers_that_nobody_reads_have_a_bound() {
    for alpn in [HTTP2, HTTP1] {
        let serving = Serving::start(false).await;
        let mark = serving.mark();
        let mut answers = Vec::new();
        let mut connections = Vec::new();
        for number in 0..500 {
            let visit = Visit::to(EXAMPLE, alpn);
            // Two connections of HTTP/2; over HTTP/1.1 one for each.
            if alpn == HTTP1 || number % 250 == 0 {
                connections.push(within(serving.client.open(visit)).await.unwrap());
            }
            let connection = connections.last_mut().unwrap();
            let sent = within(connection.send(client::get(&format!("/v1/bytes/{GIB}")))).await;
            answers.push(sent.unwrap());
        }
        let api = serving.scene.world.api();
        let sent = || {
            let unread = |seen: &Seen| seen.path.contains("bytes").then_some(seen.response.bytes);
            api.seen().iter().filter_map(unread).sum()
        };
        let looks = serving.watch_until_still(sent).await;
        let risen = serving.risen(mark);
        println!(
            "500 unread answers, client {}: {:.2} MiB ({looks} looks)",
            String::from_utf8_lossy(alpn[0]),
            mib(risen)
        );
        let most = MOST_FOR_STREAMS + connections.len() as u64 * MOST_FOR_A_CONNECTION;
        assert!(risen <= most, "{:.2} MiB", mib(risen));
        drop(answers);
        serving.stop().await;
    }
}

/// Takes one upload at the peer: nothing of it before `go`, then all; its length.
async fn take(stream: TlsStream<TcpStream>, is_http2: bool, go: impl Future<Output = ()>) -> u64 {
    if !is_http2 {
        return take_http1(stream, go).await;
    }
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 20);
    let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
    let (request, mut respond) = connection.accept().await.unwrap().unwrap();
    let mut body = request.into_body();
    let taking = async {
        go.await;
        let mut read = 0;
        while let Some(data) = body.data().await {
            let data: Bytes = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            read += data.len() as u64;
        }
        respond.send_response(Response::new(()), true).unwrap();
        read
    };
    let mut taking = std::pin::pin!(taking);
    let read = tokio::select! {
        read = &mut taking => read,
        _ = connection.accept() => panic!("the connection ended"),
    };
    let _until_the_answer_is_out =
        tokio::time::timeout(Duration::from_secs(1), connection.accept()).await;
    read
}

async fn take_http1(mut stream: TlsStream<TcpStream>, go: impl Future<Output = ()>) -> u64 {
    let mut piece = vec![0; 64 * 1024];
    let mut head = Vec::new();
    let after_head = loop {
        assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
        if let Some(at) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let mut read = (head.len() - after_head) as u64;
    go.await;
    while read < GIB {
        let len = stream.read(&mut piece).await.unwrap();
        assert_ne!(len, 0);
        read += len as u64;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    stream.flush().await.unwrap();
    read
}

/// A body so long, of which the counter tells how much was asked for.
fn upload(length: u64, asked: std::sync::Arc<std::sync::atomic::AtomicU64>) -> Request<ClientBody> {
    static PIECE: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    let pieces = (0..length / PIECE.len() as u64).map(move |_| {
        asked.fetch_add(PIECE.len() as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(Frame::data(Bytes::from_static(&PIECE)))
    });
    let body = StreamBody::new(futures_util::stream::iter(pieces)).boxed_unsync();
    let mut request = client::post("/v1/upload", Bytes::new()).map(|_| body);
    request.headers_mut().insert("content-length", length.into());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_a_gibibyte_to_a_slow_reader_costs_little() {
    for upstream in [HTTP1, HTTP2] {
        for alpn in [HTTP1, HTTP2] {
            let serving = Serving::start(false).await;
            let mark = serving.mark();
            let asked = std::sync::Arc::<std::sync::atomic::AtomicU64>::default();
            let sending = serving.client.send(Visit::to(PEER, alpn), upload(GIB, asked.clone()));
            let (go, gone) = tokio::sync::oneshot::channel();
            let stalled = async {
                let moved = || asked.load(std::sync::atomic::Ordering::Relaxed);
                let looks = serving.watch_until_still(moved).await;
                let stalled = serving.risen(mark);
                go.send(()).unwrap();
                (looks, stalled)
            };
            let taking = async {
                let stream = serving.accept(upstream).await;
                take(stream, upstream == HTTP2, async { gone.await.unwrap() }).await
            };
            let (answer, read, (looks, stalled)) =
                within(futures_util::future::join3(sending, taking, stalled)).await;
            assert_eq!((answer.unwrap().status().as_u16(), read), (200, GIB));
            let risen = serving.risen(mark);
            println!(
                "upload, client {}, upstream {}: {:.2} MiB while stalled ({looks} looks), {:.2} MiB in all",
                String::from_utf8_lossy(alpn[0]),
                String::from_utf8_lossy(upstream[0]),
                mib(stalled),
                mib(risen)
            );
            assert!(risen <= MOST_FOR_A_BODY, "{:.2} MiB", mib(risen));
            serving.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_mebibytes_at_full_speed_cost_little() {
    const LENGTH: u64 = 64 << 20;
    for http1_only in [true, false] {
        for alpn in [HTTP1, HTTP2] {
            let serving = Serving::start(http1_only).await;
            let visit = Visit::to(EXAMPLE, alpn);
            let mark = serving.mark();
            let request = client::get(&format!("/v1/bytes/{LENGTH}"));
            let body = within(serving.client.send(visit, request)).await.unwrap().into_body();
            assert_eq!(within(count(body)).await, LENGTH);
            let down = serving.risen(mark);
            let sent = serving.client.send(visit, upload(LENGTH, std::sync::Arc::default()));
            let answer = within(client::gather(within(sent).await.unwrap())).await.unwrap();
            let told: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
            assert_eq!(told["bytes"], LENGTH);
            let risen = serving.risen(mark);
            println!(
                "64 MiB, client {}, upstream {}: {:.2} MiB after the download, {:.2} MiB in all",
                String::from_utf8_lossy(alpn[0]),
                if http1_only { "http/1.1" } else { "h2" },
                mib(down),
                mib(risen)
            );
            assert!(risen <= MOST_FOR_A_BODY, "{:.2} MiB", mib(risen));
            serving.stop().await;
        }
    }
}

/// Writes a piece for ever, until the peer goes away; the counter tells how much it has taken.
async fn pour<S>(wire: &mut Wire<S>, piece: &[u8], poured: &std::sync::atomic::AtomicU64)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while wire.write(piece).await.is_ok() {
        poured.fetch_add(piece.len() as u64, std::sync::atomic::Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_flood_ends_its_connection_and_nobody_elses() {
    let serving = Serving::start(false).await;
    let host = "api.example.com";
    let open = frame(HEADERS, END_HEADERS, 1, &get(host, "/v1/hold"));
    let resets = (0..5_000).flat_map(|number| {
        let stream = number * 2 + 1;
        let head = frame(HEADERS, END_HEADERS | END_STREAM, stream, &get(host, "/v1/x"));
        [head, reset(stream, super::wire::CANCEL)].concat()
    });
    // A field of 8 KiB whose name is new: `0x00`, the name's length and name, the value's.
    let field = [&b"\x00\x01a\x7f\x81\x3f"[..], &[b'x'; 8192]].concat();
    let begun = frame(HEADERS, 0, 1, &get(host, "/v1/x"));
    let floods = [
        ("rapid reset", Vec::new(), resets.collect()),
        ("empty CONTINUATION", begun.clone(), frame(CONTINUATION, 0, 1, &[]).repeat(1000)),
        ("CONTINUATION", begun, frame(CONTINUATION, 0, 1, &field).repeat(1000)),
        ("empty DATA", open, frame(DATA, 0, 1, &[]).repeat(1000)),
    ];
    for (name, first, flood) in floods {
        let mark = serving.mark();
        let tls = serving.client.greet(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
        let mut wire = Wire::client(tls).await.unwrap();
        // It may hang up before it has read all.
        let _cut = wire.write(&[first, flood].concat()).await;
        let reason = within(wire.reason_of_the_end()).await;
        let risen = serving.risen(mark);
        println!("{name}: reason {reason:?}, {:.2} MiB", mib(risen));
        assert_eq!(reason, Some(ENHANCE_YOUR_CALM), "{name}");
        assert!(risen <= MOST_FOR_A_FLOOD, "{name}: {:.2} MiB", mib(risen));
        let alive = serving.client.get(Visit::to(EXAMPLE, HTTP2), "/v1/alive");
        assert_eq!(within(alive).await.unwrap().status(), 200);
    }

    // What wants an answer is read no faster than the answers are, and only so much of it.
    let pings = frame(PING, 0, 0, b"12345678").repeat(1000);
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000);
    for (name, flood) in [("PING", pings), ("SETTINGS", settings)] {
        let mark = serving.mark();
        let tls = serving.client.greet(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
        let (answers, mut flooding) = tokio::io::split(Wire::client(tls).await.unwrap().0);
        let flooding = async { while flooding.write_all(&flood).await.is_ok() {} };
        let mut answers = Wire(tokio::io::join(answers, tokio::io::sink()));
        let hearing = answers.reason_of_the_end();
        let (reason, ()) = within(futures_util::future::join(hearing, flooding)).await;
        let risen = serving.risen(mark);
        println!("{name}: reason {reason:?}, {:.2} MiB", mib(risen));
        assert_eq!(reason, Some(ENHANCE_YOUR_CALM), "{name}");
        assert!(risen <= MOST_FOR_A_FLOOD, "{name}: {:.2} MiB", mib(risen));
        let alive = serving.client.get(Visit::to(EXAMPLE, HTTP2), "/v1/alive");
        assert_eq!(within(alive).await.unwrap().status(), 200);
    }
    serving.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstreams_flood_ends_its_connection_and_nobody_elses() {
    let serving = Serving::start(false).await;
    let field = [&b"\x00\x01a\x7f\x81\x3f"[..], &[b'x'; 8192]].concat();
    let floods = [
        ("empty CONTINUATION", frame(HEADERS, 0, 1, STATUS_200), frame(CONTINUATION, 0, 1, &[])),
        ("CONTINUATION", frame(HEADERS, 0, 1, STATUS_200), frame(CONTINUATION, 0, 1, &field)),
        ("empty DATA", frame(HEADERS, END_HEADERS, 1, STATUS_200), frame(DATA, 0, 1, &[])),
    ];
    for (name, first, flood) in floods {
        let mark = serving.mark();
        let asked = serving.client.get(Visit::to(PEER, HTTP2), "/v1/x");
        let (answer, reason) = within(futures_util::future::join(asked, async {
            let mut wire = Wire::server(serving.accept(HTTP2).await, &[]).await.unwrap();
            wire.read_request().await.unwrap();
            let _cut = wire.write(&[first, flood.repeat(1000)].concat()).await;
            wire.reason_of_the_end().await
        }))
        .await;
        let risen = serving.risen(mark);
        println!("{name}: reason {reason:?}, {:.2} MiB", mib(risen));
        assert_eq!(reason, Some(ENHANCE_YOUR_CALM), "{name}");
        assert!(answer.is_err() || answer.unwrap().status() == 502, "{name}");
        assert!(risen <= MOST_FOR_A_FLOOD, "{name}: {:.2} MiB", mib(risen));
    }
    let pings = frame(PING, 0, 0, b"12345678").repeat(1000);
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000);
    for (name, flood) in [("PING", pings), ("SETTINGS", settings)] {
        let mark = serving.mark();
        let asked = serving.client.get(Visit::to(PEER, HTTP2), "/v1/x");
        let flooding = async {
            let mut wire = Wire::server(serving.accept(HTTP2).await, &[]).await.unwrap();
            wire.read_request().await.unwrap();
            let (answers, mut flooding) = tokio::io::split(wire.0);
            let flooding = async { while flooding.write_all(&flood).await.is_ok() {} };
            let mut answers = Wire(tokio::io::join(answers, tokio::io::sink()));
            futures_util::future::join(answers.reason_of_the_end(), flooding).await.0
        };
        let (answer, reason) = within(futures_util::future::join(asked, flooding)).await;
        let risen = serving.risen(mark);
        println!("{name}: reason {reason:?}, {:.2} MiB", mib(risen));
        assert_eq!(
            (answer.unwrap().status().as_u16(), reason),
            (502, Some(ENHANCE_YOUR_CALM)),
            "{name}"
        );
        assert!(risen <= MOST_FOR_A_FLOOD, "{name}: {:.2} MiB", mib(risen));
    }

    // Interim responses without end are no answer, and are kept nowhere.
    let mark = serving.mark();
    let asked = serving.client.get(Visit::to(PEER, HTTP2), "/v1/x");
    let poured = std::sync::atomic::AtomicU64::new(0);
    let pouring = async {
        let mut wire = Wire::server(serving.accept(HTTP2).await, &[]).await.unwrap();
        let stream = wire.read_request().await.unwrap();
        // `:status` is the name with number 8 in HPACK.
        let hints = frame(HEADERS, END_HEADERS, stream, b"\x08\x03103");
        pour(&mut wire, &hints.repeat(1000), &poured).await;
    };
    let answer = within(async {
        tokio::select! {
            answer = asked => answer.unwrap(),
            () = pouring => panic!("it hung up before it answered"),
        }
    });
    assert_eq!(answer.await.status(), 502);
    serving.assert_alive_often().await;
    let (risen, poured) = (serving.risen(mark), poured.into_inner());
    println!("interim responses: took {:.2} MiB, {:.2} MiB", mib(poured), mib(risen));
    assert!(risen <= MOST_FOR_A_FLOOD, "{:.2} MiB", mib(risen));
    serving.stop().await;
}
