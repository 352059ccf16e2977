//! One HTTP/2 connection to an origin: how many streams it takes now, and whether it takes any more.

use std::error::Error;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;

use super::paced::Paced;
use super::{IDLE_LIMIT, lock};
use crate::clock;
use crate::limits::HEAD_SIZE;
use crate::tasks::Tasks;
use crate::upstream::body::Body;
use crate::upstream::calm::Calm;

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

/// What of a request's body waits beside the socket's buffer for the upstream's window.
const SEND_BUFFER: usize = 128 * 1024;

/// Largest frame: the least that RFC 9113 section 4.2 allows to ask for. A larger one is held whole
/// before any of it can be passed on.
const MOST_FRAME: u32 = 16 * 1024;

/// How many streams an upstream may make us reset by breaking the protocol on them, before the
/// connection is given up (RUSTSEC-2024-0003).
///
/// Pings and SETTINGS are counted by [`Calm`]: h2 reads the next frame only when the answer to the last one is
/// in its buffer for the socket, so a peer that sends them without reading stops itself, but one that reads the answers
/// would go on for ever. Of empty DATA frames h2 takes 100, of small ones as many as have
/// a cost of half the connection's window; then it ends the connection.
const MOST_BROKEN_STREAMS: usize = 64;

/// How often a connection in use is asked whether it lives, so that a stream on a dead one ends; and how
/// long the answer may take.
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
    pub(super) sender: http2::SendRequest<Body>,
    streams: AtomicUsize,
    /// The peer's SETTINGS_MAX_CONCURRENT_STREAMS; [`UNTOLD`] before the first SETTINGS.
    most: AtomicUsize,
    /// The peer refused a stream: those that it has may end, and it gets no other.
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
        self.sender.is_closed()
            || self.refuses.load(Ordering::Relaxed)
            || idle()
            || self.has_slept(now)
    }

    fn has_slept(&self, now: Instant) -> bool {
        now - self.opened_at >= self.opened.elapsed() + IDLE_LIMIT
    }
}

/// How long to wait for another's connection before looking again.
pub(super) const PATIENCE: Duration = SETTINGS_LIMIT;

/// Starts HTTP/2 on a stream. `told` is called when the peer's first SETTINGS have come, and when the
/// connection has ended.
pub(super) async fn open<S>(
    stream: S,
    window: Window,
    tasks: &Tasks,
    told: impl Fn() + Send + Sync + 'static,
) -> hyper::Result<Arc<Http2>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stirred = Arc::new(AtomicWaker::new());
    let reading = Arc::<Reading>::default();
    let executor = Executor {
        tasks: tasks.clone(),
        first: Arc::default(),
        stirred: stirred.clone(),
        reading: reading.clone(),
    };
    let (sender, mut connection) = http2::Builder::new(executor)
        .timer(TokioTimer::new())
        .initial_max_send_streams(UNTOLD)
        .initial_stream_window_size(window.of_a_stream())
        .initial_connection_window_size(window.of_the_connection())
        .max_frame_size(MOST_FRAME)
        .max_header_list_size(HEAD_SIZE)
        .max_send_buf_size(SEND_BUFFER)
        .max_local_error_reset_streams(MOST_BROKEN_STREAMS)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .handshake(TokioIo::new(Calm::of_server(Paced::new(stream))))
        .await?;
    let now = clock::instant();
    let shared = Arc::new(Http2 {
        sender,
        streams: AtomicUsize::new(0),
        most: AtomicUsize::new(UNTOLD),
        refuses: AtomicBool::new(false),
        opened: tokio::time::Instant::now(),
        opened_at: now,
        last_used: Mutex::new(now),
        reading,
        window,
    });
    let mirror = Arc::downgrade(&shared);
    tasks.spawn(async move {
        let ended = poll_fn(|cx| {
            stirred.register(cx.waker());
            let outcome = Pin::new(&mut connection).poll(cx);
            if let Some(shared) = mirror.upgrade() {
                let most = connection.current_max_send_streams();
                if shared.most.swap(most, Ordering::AcqRel) == UNTOLD && most != UNTOLD {
                    told();
                }
            }
            outcome
        });
        if let Err(error) = ended.await {
            tracing::debug!(%error, "connection to an upstream ended");
        }
        drop(connection);
        told();
    });
    Ok(shared)
}

/// Starts hyper's tasks for one connection.
///
/// The first is the one that reads frames, and hyper does not tell the connection's own future what
/// they said: without a stir, a GOAWAY or new SETTINGS would be noticed only by the next request.
#[derive(Clone)]
struct Executor {
    tasks: Tasks,
    first: Arc<AtomicBool>,
    stirred: Arc<AtomicWaker>,
    reading: Arc<Reading>,
}

/// The task that reads the frames of one connection.
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

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        if self.first.swap(true, Ordering::Relaxed) {
            self.tasks.spawn(future);
            return;
        }
        let (stirred, turns) = (self.stirred.clone(), self.reading.clone());
        self.tasks.spawn(async move {
            let mut reading = pin!(future);
            poll_fn(|cx| {
                turns.waker.register(cx.waker());
                let outcome = reading.as_mut().poll(cx);
                turns.has_ended.store(outcome.is_ready(), Ordering::Release);
                turns.turn.notify_waiters();
                stirred.wake();
                outcome
            })
            .await
        });
    }
}

/// Room for one stream.
pub(in crate::upstream) struct Http2Lease {
    connection: Arc<Http2>,
    /// Whether nobody had used the connection for [`REST`].
    has_rested: bool,
}

/// How long after a use a connection is taken for open without a look: a look costs a turn of another task, and who sends
/// one request after the other need not wait for it. After a longer time, in which a laptop may have slept, it is worth
/// that: a request that goes out on a connection whose end is not read yet may be lost.
const REST: Duration = Duration::from_secs(1);

impl Http2Lease {
    pub(super) fn new(connection: Arc<Http2>) -> Self {
        let is_first = connection.streams.fetch_add(1, Ordering::Relaxed) == 0;
        let has_rested = is_first && clock::instant() - *lock(&connection.last_used) >= REST;
        Self { connection, has_rested }
    }

    /// Whether the peer is still there, as far as the system knows; a connection whose peer is not gets no other stream.
    pub(super) async fn is_there(&self) -> bool {
        let is_there = !self.has_rested || self.connection.reading.goes_on().await;
        if !is_there {
            self.retire();
        }
        is_there
    }

    pub(super) fn sender(&self) -> http2::SendRequest<Body> {
        self.connection.sender.clone()
    }

    /// Asks this connection for no stream any more.
    pub(super) fn retire(&self) {
        self.connection.refuses.store(true, Ordering::Relaxed);
    }
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        *lock(&self.connection.last_used) = clock::instant();
        self.connection.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether an error proves that the upstream has not processed the request (RFC 9113 section 8.7): its
/// stream is above the last one of a graceful GOAWAY, or was reset with REFUSED_STREAM.
///
/// h2 gives the error of a GOAWAY of the peer's to those streams alone (0.4.20, `proto/streams/
/// streams.rs`, `recv_go_away`); the others go on, and end with an error of another kind.
pub(super) fn is_unprocessed(error: &hyper::Error) -> bool {
    let Some(error) = error.source().and_then(|source| source.downcast_ref::<h2::Error>()) else {
        return false;
    };
    let graceful = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    error.is_remote() && (graceful || refused)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::io::DuplexStream;

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
        let mut request = http::Request::new(Body::empty());
        *request.uri_mut() = http::Uri::from_static("https://api.example.com/");
        let mut sender = lease.sender();
        let answer =
            Tasks::new().spawn(async move { sender.try_send_request(request).await.is_ok() });
        // Nobody sends another request: that no other is taken is noticed nevertheless.
        heard(&told).await;
        assert!(connection.is_over(clock::instant()));
        assert!(!answer.is_finished(), "the one under way goes on");
    }

    #[tokio::test]
    async fn a_connection_that_refused_is_not_asked_again() {
        let (connection, _told, _theirs) = opened().await;
        let lease = Http2Lease::new(connection.clone());
        lease.retire();
        assert!(connection.is_over(clock::instant()));
    }
}
