//! One HTTP/2 connection to an origin: how many streams it takes now, and whether it takes any more.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong};
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

use super::paced::Paced;
use super::stream::{self, Received};
use super::{IDLE_LIMIT, lock};
use crate::clock;
use crate::limits::{HEAD_SIZE, HTTP2_BROKEN_STREAMS, HTTP2_FRAME, HTTP2_SEND_BUFFER};
use crate::tasks::Tasks;
use crate::upstream::body::{Body, BodyError};
use crate::upstream::calm::{Calm, Signs};
use crate::upstream::gathered::Gathered;
use crate::upstream::interim::{MostInterim, Unanswered};

/// Above this number of streams a further connection is opened, whatever the peer allows: 100 is the
/// least that RFC 9113 section 6.5.2 recommends to allow, and what common servers do.
const WATERMARK: usize = 100;

/// What the upstream may send on a stream before its client has taken it, and so what a client that does
/// not read can make us hold. Wide windows are for speed over a distance: 512 KiB is 50 Mbit/s at 80 ms.
/// Of the connections of an origin that take streams one has them, or two that were dialled at once. Those that are opened when it is full
/// have RFC 9113's own default, which many short events need no more than. So their streams hold 50 MiB,
/// and 6.25 MiB more for every further hundred; what still ends on a connection that has gone away, beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Wide,
    Narrow,
}

impl Window {
    fn of_a_stream(self) -> u32 {
        match self {
            Self::Wide => 512 * 1024,
            Self::Narrow => 64 * 1024 - 1,
        }
    }

    /// That of all its streams together, so that those whose clients do not read never stall their
    /// neighbours (RFC 9113 section 5.2.2 warns of it).
    fn of_the_connection(self) -> u32 {
        self.of_a_stream() * WATERMARK as u32
    }
}

/// How often a connection in use from which nothing comes is asked whether it lives, so that a stream on a dead one ends;
/// and how long the answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(15);

/// How long others wait for the first SETTINGS of a connection, which tell how many requests it takes.
/// Every server sends them first of all (RFC 9113 section 3.4).
const SETTINGS_LIMIT: Duration = Duration::from_secs(1);

/// Stands for a number of streams that the peer has not told yet. It fits no SETTINGS, which have 32
/// bits, and h2 has `usize::MAX` for a peer that sets no limit.
const UNTOLD: usize = usize::MAX - 1;

/// One connection, shared by its streams.
pub(in crate::upstream) struct Http2 {
    sender: SendRequest<Bytes>,
    tasks: Tasks,
    streams: AtomicUsize,
    /// The peer's SETTINGS_MAX_CONCURRENT_STREAMS; [`UNTOLD`] before the first SETTINGS.
    most: AtomicUsize,
    /// The peer refused a stream, or goes away, or has gone: the streams that it has may end, and it gets no other.
    refuses: AtomicBool,
    opened: tokio::time::Instant,
    /// The same, in the count that goes on while the machine sleeps.
    opened_at: Instant,
    last_used: Mutex<Instant>,
    reading: Arc<Reading>,
    pub(super) window: Window,
}

impl Http2 {
    /// Whether it may be asked for one more stream. One goes out before the peer has told how many it
    /// takes; more might be refused.
    pub(super) fn has_room(&self) -> bool {
        let most = match self.most.load(Ordering::Acquire) {
            UNTOLD => 1,
            told => told.clamp(1, WATERMARK),
        };
        self.streams.load(Ordering::Relaxed) < most
    }

    /// Whether it is worth waiting for the peer's first SETTINGS.
    pub(super) fn will_tell(&self) -> bool {
        self.most.load(Ordering::Acquire) == UNTOLD && self.opened.elapsed() < SETTINGS_LIMIT
    }

    /// Whether no request may go here any more: closed, going away, refusing, or idle for too long. After a sleep of the
    /// machine nobody knows whether the peer is still there; what is under way finds out.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let idle = || {
            self.streams.load(Ordering::Relaxed) == 0 && now - *lock(&self.last_used) >= IDLE_LIMIT
        };
        self.refuses.load(Ordering::Relaxed) || idle() || self.has_slept(now)
    }

    /// Whether it is in use, or was within the last [`REST`].
    pub(super) fn was_used(&self, now: Instant) -> bool {
        self.streams.load(Ordering::Relaxed) > 0 || now - *lock(&self.last_used) < REST
    }

    /// Takes in what the peer's last frames say; whether that is of interest to those who wait for room.
    fn take_note(&self, most: usize, cx: &mut Context<'_>) -> bool {
        let is_first = self.most.swap(most, Ordering::AcqRel) == UNTOLD && most != UNTOLD;
        let goes_away = matches!(self.sender.clone().poll_ready(cx), Poll::Ready(Err(_)));
        let is_new = goes_away && !self.refuses.swap(true, Ordering::Relaxed);
        is_first || is_new
    }

    fn has_slept(&self, now: Instant) -> bool {
        now - self.opened_at >= self.opened.elapsed() + IDLE_LIMIT
    }
}

/// How long to wait for another's connection before looking again.
pub(super) const PATIENCE: Duration = SETTINGS_LIMIT;

/// Starts HTTP/2 on a stream. `told` is called when the peer's first SETTINGS have come, when it goes away, and when the
/// connection has ended.
pub(super) async fn open<S>(
    stream: S,
    window: Window,
    tasks: &Tasks,
    told: impl Fn() + Send + Sync + 'static,
) -> Result<Arc<Http2>, h2::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (reading, signs) = (Arc::<Reading>::default(), Arc::<Signs>::default());
    let stream = Calm::of_server(Paced::new(stream)).telling(signs.clone());
    let (sender, mut connection) = Builder::new()
        .initial_max_send_streams(UNTOLD)
        .initial_window_size(window.of_a_stream())
        .initial_connection_window_size(window.of_the_connection())
        .max_frame_size(HTTP2_FRAME)
        .max_header_list_size(HEAD_SIZE)
        .max_send_buffer_size(HTTP2_SEND_BUFFER)
        .max_local_error_reset_streams(Some(HTTP2_BROKEN_STREAMS))
        .enable_push(false)
        .handshake(stream)
        .await?;
    let pulse = connection.ping_pong().map(Pulse::new);
    let now = clock::instant();
    let shared = Arc::new(Http2 {
        sender,
        tasks: tasks.clone(),
        streams: AtomicUsize::new(0),
        most: AtomicUsize::new(UNTOLD),
        refuses: AtomicBool::new(false),
        opened: tokio::time::Instant::now(),
        opened_at: now,
        last_used: Mutex::new(now),
        reading: reading.clone(),
        window,
    });
    let mut driver = Driver { connection, shared: Arc::downgrade(&shared), reading, signs, pulse };
    tasks.spawn(async move {
        let crowd = driver.shared.clone();
        let is_crowd = move || {
            crowd.upgrade().is_some_and(|shared| shared.streams.load(Ordering::Relaxed) > 1)
        };
        let driving = Gathered::new(poll_fn(|cx| driver.poll(cx, &told)), is_crowd);
        if let Err(error) = driving.await {
            tracing::debug!(%error, "connection to an upstream ended");
        }
        driver.end();
        told();
    });
    Ok(shared)
}

/// What reads and writes the frames of one connection, and notices what they say of it. It ends with the last stream once
/// the pool has let go of the connection.
struct Driver<S: AsyncRead + AsyncWrite + Unpin> {
    connection: Connection<Calm<Paced<S>>, Bytes>,
    shared: Weak<Http2>,
    reading: Arc<Reading>,
    signs: Arc<Signs>,
    /// `None` where it cannot be asked.
    pulse: Option<Pulse>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    /// Has nobody wait for the connection or ask it for anything any more, however it ended, and lets go of it.
    fn end(self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.refuses.store(true, Ordering::Relaxed);
        }
        self.reading.has_ended.store(true, Ordering::Release);
        self.reading.turn.notify_waiters();
    }

    fn poll(&mut self, cx: &mut Context<'_>, told: &impl Fn()) -> Poll<Result<(), BodyError>> {
        self.reading.waker.register(cx.waker());
        let outcome = Pin::new(&mut self.connection).poll(cx);
        self.reading.has_ended.store(outcome.is_ready(), Ordering::Release);
        self.reading.turn.notify_waiters();
        let shared = self.shared.upgrade();
        if self.signs.take_news() || outcome.is_ready() {
            let is_news = shared.as_ref().is_some_and(|shared| {
                shared.take_note(self.connection.max_concurrent_send_streams(), cx)
            });
            if is_news {
                told();
            }
        }
        let is_used = shared.is_none_or(|shared| shared.streams.load(Ordering::Relaxed) > 0);
        if let Some(pulse) = &mut self.pulse
            && pulse.poll_dead(cx, is_used, &self.signs).is_ready()
        {
            return Poll::Ready(Err("it has not answered a PING in time".into()));
        }
        outcome.map_err(Into::into)
    }
}

/// Asks a connection that is silent whether it lives.
struct Pulse {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    was_asked: bool,
}

impl Pulse {
    fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(sleep(PING_INTERVAL)), was_asked: false }
    }

    /// Ready when it has not answered in time, and nothing else has come from it either.
    fn poll_dead(&mut self, cx: &mut Context<'_>, is_used: bool, signs: &Signs) -> Poll<()> {
        loop {
            if self.was_asked {
                match self.pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => self.wait(PING_INTERVAL, false),
                    // The connection ends by itself.
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => {
                        ready!(self.timer.as_mut().poll(cx));
                        // The answer may stand behind much else, which says as much.
                        if !signs.take_life() {
                            return Poll::Ready(());
                        }
                        self.wait(PING_LIMIT, true);
                        continue;
                    }
                }
            }
            ready!(self.timer.as_mut().poll(cx));
            let is_silent = !signs.take_life();
            if is_used && is_silent && self.pings.send_ping(Ping::opaque()).is_ok() {
                self.wait(PING_LIMIT, true);
            } else {
                self.wait(PING_INTERVAL, false);
            }
        }
    }

    fn wait(&mut self, time: Duration, was_asked: bool) {
        self.was_asked = was_asked;
        self.timer.as_mut().reset(tokio::time::Instant::now() + time);
    }
}

/// The reading of the frames of one connection.
#[derive(Default)]
struct Reading {
    /// Has it look at the socket once more.
    waker: AtomicWaker,
    /// Told when it has read all that had come.
    turn: Notify,
    has_ended: AtomicBool,
}

impl Reading {
    /// Has it read what has come by now; whether it goes on. One that does not get round to it is of no use either.
    async fn goes_on(&self) -> bool {
        let mut turn = pin!(self.turn.notified());
        turn.as_mut().enable();
        self.waker.wake();
        let has_read = tokio::time::timeout(SETTINGS_LIMIT, turn).await.is_ok();
        has_read && !self.has_ended.load(Ordering::Acquire)
    }
}

/// Room for one stream, for one request.
pub(in crate::upstream) struct Http2Lease {
    place: Arc<Place>,
    /// Whether nobody had used the connection for [`REST`].
    has_rested: bool,
}

/// What a stream takes of its connection for as long as the peer counts it: until the response has ended and the request's
/// body, too (RFC 9113 section 5.1.2).
pub(super) struct Place(Arc<Http2>);

impl Place {
    fn take(connection: Arc<Http2>) -> Arc<Self> {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self(connection))
    }

    /// Goes on with a stream in a task, for which the place is kept.
    pub(super) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let place = self.clone();
        self.0.tasks.spawn(async move {
            task.await;
            drop(place);
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.0.last_used) = clock::instant();
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long after a use a connection is taken for open without a look: a look costs a turn of another task, and who sends
/// one request after the other need not wait for it. After a longer time, in which a laptop may have slept, it is worth
/// that: a request that goes out on a connection whose end is not read yet may be lost.
const REST: Duration = Duration::from_secs(1);

impl Http2Lease {
    pub(super) fn new(connection: Arc<Http2>) -> Self {
        let has_rested = !connection.was_used(clock::instant());
        Self { place: Place::take(connection), has_rested }
    }

    /// Whether the peer is still there, as far as the system knows; a connection whose peer is not gets no other stream.
    pub(super) async fn is_there(&self) -> bool {
        let is_there = !self.has_rested || self.place.0.reading.goes_on().await;
        if !is_there {
            self.retire();
        }
        is_there
    }

    /// Sends a request as a stream of this connection, which is asked for no other when it has not processed this one.
    ///
    /// # Errors
    ///
    /// [`Unanswered`].
    pub(super) async fn send(
        &self,
        request: Request<Body>,
        most_interim: MostInterim,
    ) -> Result<Response<Received>, Unanswered> {
        let sender = self.place.0.sender.clone();
        let sent = stream::send(sender, request, (most_interim, &self.place)).await;
        if sent.as_ref().is_err_and(|failed| failed.unprocessed) {
            self.retire();
        }
        sent
    }

    fn retire(&self) {
        self.place.0.refuses.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt as _, DuplexStream};

    use super::*;

    type Peer = h2::server::Connection<DuplexStream, Bytes>;

    /// A connection to a peer that takes two streams; before its SETTINGS, and what comes of it after.
    async fn opened() -> (Arc<Http2>, Arc<Notify>, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let rung = Arc::new(Notify::new());
        let bell = rung.clone();
        let told = move || bell.notify_one();
        let connection = open(ours, Window::Wide, &Tasks::new(), told).await.unwrap();
        // Its tasks have all come to wait before anything arrives.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        (connection, rung, theirs)
    }

    async fn heard(told: &Notify) {
        let limit = Duration::from_secs(10);
        tokio::time::timeout(limit, told.notified()).await.expect("it was never told");
    }

    async fn begin(theirs: DuplexStream) -> Peer {
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_streams(2).handshake(theirs).await.unwrap()
    }

    #[tokio::test]
    async fn one_request_goes_before_the_peer_tells_how_many_it_takes() {
        let (connection, told, theirs) = opened().await;
        assert!(connection.has_room() && connection.will_tell());
        let first = Http2Lease::new(connection.clone());
        assert!(!connection.has_room());
        let mut peer = begin(theirs).await;
        let driving = Tasks::new().spawn(async move { peer.accept().await.is_some() });
        heard(&told).await;
        assert!(connection.has_room() && !connection.will_tell());
        let second = Http2Lease::new(connection.clone());
        assert!(!connection.has_room());
        drop((first, second));
        assert!(connection.has_room());
        driving.abort();
    }

    #[tokio::test]
    async fn a_connection_is_over_when_it_has_idled() {
        let (connection, told, theirs) = opened().await;
        let mut peer = begin(theirs).await;
        let driving = Tasks::new().spawn(async move { peer.accept().await.is_some() });
        heard(&told).await;
        let later = clock::instant() + IDLE_LIMIT - Duration::from_millis(1);
        *lock(&connection.last_used) -= Duration::from_millis(1);
        assert!(!connection.is_over(clock::instant()));
        assert!(connection.is_over(later), "nobody used it");
        let _lease = Http2Lease::new(connection.clone());
        assert!(!connection.is_over(later), "somebody uses it");
        // As if the machine had slept: a minute in the one count, and none in the other.
        let awake = clock::instant() + Duration::from_secs(60);
        assert!(connection.is_over(awake), "nobody knows whether the peer is still there");
        driving.abort();
    }

    #[tokio::test]
    async fn a_connection_is_over_when_its_peer_says_so_though_a_stream_goes_on() {
        let (connection, told, theirs) = opened().await;
        let mut peer = begin(theirs).await;
        Tasks::new().spawn(async move {
            let _held = peer.accept().await;
            peer.graceful_shutdown();
            peer.accept().await.is_some()
        });
        heard(&told).await;
        let lease = Http2Lease::new(connection.clone());
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = http::Uri::from_static("https://api.example.com/");
        let answer =
            Tasks::new().spawn(async move { lease.send(request, MostInterim(1)).await.is_ok() });
        // Nobody sends another request: that no other is taken is noticed nevertheless.
        heard(&told).await;
        assert!(connection.is_over(clock::instant()));
        assert!(!answer.is_finished(), "the one under way goes on");
    }

    /// Frames that want no answer: empty SETTINGS, and a WINDOW_UPDATE by one byte.
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const WINDOW_UPDATE: [u8; 13] = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_answers_no_ping_is_asked_for_nothing_more() {
        let (connection, told, mut theirs) = opened().await;
        theirs.write_all(&SETTINGS).await.unwrap();
        heard(&told).await;
        let lease = Http2Lease::new(connection.clone());
        let died = tokio::time::timeout(PING_INTERVAL * 2 + PING_LIMIT * 2, told.notified());
        died.await.expect("nobody was told");
        assert!(connection.is_over(clock::instant()));
        let sent = lease.send(Request::new(Body::empty()), MostInterim(1)).await;
        let failed = sent.map(drop).unwrap_err();
        assert!(failed.unsent.is_some() && failed.unprocessed, "nothing has left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_from_which_anything_comes_lives() {
        let (connection, told, mut theirs) = opened().await;
        theirs.write_all(&SETTINGS).await.unwrap();
        heard(&told).await;
        let _lease = Http2Lease::new(connection.clone());
        // By the end of the first of these times it has been asked, as it was silent in all of another.
        sleep(PING_INTERVAL * 2 + Duration::from_secs(1)).await;
        for _ in 0..20 {
            theirs.write_all(&WINDOW_UPDATE).await.unwrap();
            sleep(PING_LIMIT - Duration::from_secs(1)).await;
            assert!(!connection.is_over(clock::instant()));
        }
        let died = tokio::time::timeout(PING_LIMIT * 2, told.notified());
        died.await.expect("it is silent, and has not answered");
    }

    #[tokio::test]
    async fn a_body_goes_on_when_the_response_has_none() {
        let (connection, _told, theirs) = opened().await;
        let mut peer = begin(theirs).await;
        let (taken, all) = tokio::sync::oneshot::channel();
        Tasks::new().spawn(async move {
            let (request, mut answer) = peer.accept().await.unwrap().unwrap();
            answer.send_response(Response::new(()), true).unwrap();
            Tasks::new().spawn(async move {
                let (mut body, mut read) = (request.into_body(), Vec::new());
                while let Some(data) = body.data().await {
                    let Ok(data) = data else { break };
                    read.extend_from_slice(&data);
                    body.flow_control().release_capacity(data.len()).unwrap();
                }
                taken.send((read, body.is_end_stream())).unwrap();
            });
            peer.accept().await.is_some()
        });
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        let frames = futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx).map(|data| data.map(|data| Ok(http_body::Frame::data(data))))
        });
        let mut request = Request::new(Body::boxed(http_body_util::StreamBody::new(frames)));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = http::Uri::from_static("https://api.example.com/");
        let lease = Http2Lease::new(connection.clone());
        let sent = lease.send(request, MostInterim(1)).await;
        let response = sent.map_err(|failed| failed.error).unwrap();
        assert!(http_body::Body::is_end_stream(response.body()));
        drop((response, lease));
        let _another = Http2Lease::new(connection.clone());
        assert!(!connection.has_room(), "the peer counts the stream until its body has ended");
        for _ in 0..3 {
            sender.send(Bytes::from_static(b"abc")).await.expect("the body is not wanted");
        }
        drop(sender);
        let limit = Duration::from_secs(10);
        let all = tokio::time::timeout(limit, all).await.unwrap().unwrap();
        assert_eq!(all, (b"abcabcabc".to_vec(), true));
        assert!(connection.has_room(), "the body has ended");
    }

    #[tokio::test]
    async fn a_whole_body_says_its_length_and_trailers_frame_nothing() {
        let (connection, _told, theirs) = opened().await;
        let mut peer = begin(theirs).await;
        Tasks::new().spawn(async move {
            let (request, mut answer) = peer.accept().await.unwrap().unwrap();
            let length = request.headers()[http::header::CONTENT_LENGTH].clone();
            let response = Response::builder().header("x-length", length).body(()).unwrap();
            let mut stream = answer.send_response(response, false).unwrap();
            let trailers = [("x-sum", "1"), ("content-length", "9"), ("host", "a")];
            let trailers =
                trailers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            stream.send_trailers(trailers.into_iter().collect()).unwrap();
            peer.accept().await.is_some()
        });
        let body = http_body_util::Full::new(Bytes::from_static(b"abc"));
        let body = http_body_util::BodyExt::map_err(body, |never| match never {});
        let mut request = Request::new(Body::boxed(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = http::Uri::from_static("https://api.example.com/");
        let lease = Http2Lease::new(connection);
        let sent = lease.send(request, MostInterim(1)).await;
        let response = sent.map_err(|failed| failed.error).unwrap();
        assert_eq!(response.headers()["x-length"], "3");
        let all = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
        let names: Vec<_> = all.trailers().unwrap().keys().map(|name| name.as_str()).collect();
        assert_eq!(names, ["x-sum"]);
    }

    #[tokio::test]
    async fn a_connection_that_refused_is_not_asked_again() {
        let (connection, _told, _theirs) = opened().await;
        let lease = Http2Lease::new(connection.clone());
        lease.retire();
        assert!(connection.is_over(clock::instant()));
    }
}
