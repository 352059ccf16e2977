//! Pooled connections: HTTP/1.1 keep-alive, and as many HTTP/2 connections per origin as its streams
//! need, so that a long stream never delays the next request.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{BoxFuture, poll_fn};
use http::{Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use super::UpstreamError;
use super::body::{Body, BodyError};
use super::dial::{Stream, is_http2};
use crate::origin::Origin;
use crate::tasks::Tasks;

/// All pooled connections, by origin.
pub(super) struct Pool {
    origins: Mutex<Origins>,
    /// Drives the connections. Nobody waits for it: a pooled connection never ends by itself.
    tasks: Tasks,
}

#[derive(Default)]
struct Origins {
    open: HashMap<Origin, Arc<OriginPool>>,
    /// The version of the roots that all of it was verified under, or a later one.
    trust: u64,
}

/// A connection just opened, before it belongs to anybody.
pub(super) enum Opened {
    Http1(http1::SendRequest<Body>),
    Http2(Arc<Http2>),
}

/// What is open to one origin.
struct OriginPool {
    state: Mutex<State>,
    /// Rings when a dial ends, well or badly.
    dialled: Notify,
    tasks: Tasks,
}

#[derive(Default)]
struct State {
    http1: Vec<Idle>,
    http2: Vec<Arc<Http2>>,
    dialling: usize,
    /// The last dial gave HTTP/1.1 or failed, so one dial serves one request: do not wait for others'.
    each_for_itself: bool,
}

struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

/// One HTTP/2 connection, shared by its streams.
pub(super) struct Http2 {
    sender: http2::SendRequest<Body>,
    streams: AtomicUsize,
    /// The peer's SETTINGS_MAX_CONCURRENT_STREAMS, as of late.
    most: AtomicUsize,
}

/// Above this number of streams a further connection is opened, whatever the peer allows: 100 is the
/// least that RFC 9113 section 6.5.2 recommends to allow, and what common servers do.
const WATERMARK: usize = 100;

/// How long an HTTP/1.1 connection may idle: below nginx's 75 s and the 60 s of common load balancers.
/// A server with a shorter limit closes first, which the pool sees.
const IDLE_LIMIT: Duration = Duration::from_secs(50);

/// Most idle HTTP/1.1 connections kept per origin, so that a burst leaves no crowd of descriptors.
const MOST_IDLE: usize = 64;

/// How often an HTTP/2 connection in use is asked whether it lives, so that a stream on a dead one
/// ends; and how long the answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(15);

/// HTTP/2 windows: large enough for a fast download over a slow path, small enough that a slow reader
/// holds little memory. A stream's is what one connection alone would buffer.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

impl Pool {
    pub(super) fn new(tasks: Tasks) -> Self {
        Self { origins: Mutex::default(), tasks }
    }

    fn of(&self, origin: &Origin, trust: u64) -> Arc<OriginPool> {
        let mut origins = lock(&self.origins);
        if origins.trust < trust {
            // What is in use goes on to its end, and is then given back to nobody.
            *origins = Origins { open: HashMap::new(), trust };
        }
        if let Some(pool) = origins.open.get(origin) {
            return pool.clone();
        }
        let (state, dialled) = (Mutex::default(), Notify::new());
        let pool = Arc::new(OriginPool { state, dialled, tasks: self.tasks.clone() });
        origins.open.insert(origin.clone(), pool.clone());
        pool
    }

    /// A connection with room for one more request: an open one that was verified under this version of
    /// the roots or a later one, else one made by `dial`, which must use such roots. While the origin may
    /// turn out to speak HTTP/2, one dial serves all who come meanwhile.
    pub(super) async fn checkout<'a>(
        &self,
        (origin, trust): (&Origin, u64),
        dial: impl Fn() -> BoxFuture<'a, Result<Opened, UpstreamError>>,
    ) -> Result<Lease, UpstreamError> {
        let pool = self.of(origin, trust);
        loop {
            let other_dial = {
                let mut state = lock(&pool.state);
                if let Some(lease) = state.take(&pool) {
                    return Ok(lease);
                }
                if state.dialling > 0 && !state.each_for_itself {
                    pool.dialled.notified()
                } else {
                    state.dialling += 1;
                    break;
                }
            };
            other_dial.await;
        }
        let mut dialling = Dialling { pool: &pool, each_for_itself: true };
        let opened = dial().await?;
        dialling.each_for_itself = matches!(opened, Opened::Http1(_));
        Ok(pool.lease(opened))
    }
}

/// Counts a dial, and ends the count however the dial ends.
struct Dialling<'a> {
    pool: &'a OriginPool,
    each_for_itself: bool,
}

impl Drop for Dialling<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        state.dialling -= 1;
        state.each_for_itself = self.each_for_itself;
        drop(state);
        self.pool.dialled.notify_waiters();
    }
}

impl OriginPool {
    fn lease(self: &Arc<Self>, opened: Opened) -> Lease {
        match opened {
            Opened::Http1(sender) => Lease::Http1(Http1Lease { sender, pool: self.clone() }),
            Opened::Http2(connection) => {
                lock(&self.state).http2.push(connection.clone());
                Lease::Http2(Http2Lease::new(connection))
            }
        }
    }

    fn put_back(&self, sender: http1::SendRequest<Body>) {
        let mut state = lock(&self.state);
        if state.http1.len() < MOST_IDLE {
            state.http1.push(Idle { sender, since: Instant::now() });
        }
    }
}

impl State {
    fn take(&mut self, pool: &Arc<OriginPool>) -> Option<Lease> {
        self.http2.retain(|connection| !connection.sender.is_closed());
        if let Some(connection) = self.http2.iter().find(|connection| connection.has_room()) {
            return Some(Lease::Http2(Http2Lease::new(connection.clone())));
        }
        let now = Instant::now();
        self.http1.retain(|idle| !idle.sender.is_closed() && now - idle.since < IDLE_LIMIT);
        // The one used last is the one most likely to live.
        let Idle { sender, .. } = self.http1.pop()?;
        Some(Lease::Http1(Http1Lease { sender, pool: pool.clone() }))
    }
}

impl Http2 {
    fn has_room(&self) -> bool {
        let most = self.most.load(Ordering::Relaxed).clamp(1, WATERMARK);
        self.streams.load(Ordering::Relaxed) < most
    }
}

/// Starts HTTP on a stream.
pub(super) async fn open(stream: Stream, tasks: &Tasks) -> hyper::Result<Opened> {
    if !is_http2(&stream) {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tasks.spawn(connection);
        return Ok(Opened::Http1(sender));
    }
    let (sender, mut connection) = http2::Builder::new(tasks.clone())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .handshake(TokioIo::new(stream))
        .await?;
    let most = AtomicUsize::new(connection.current_max_send_streams());
    let shared = Arc::new(Http2 { sender, streams: AtomicUsize::new(0), most });
    let mirror = Arc::downgrade(&shared);
    tasks.spawn(poll_fn(move |cx| {
        let outcome = Pin::new(&mut connection).poll(cx);
        if let Some(shared) = mirror.upgrade() {
            shared.most.store(connection.current_max_send_streams(), Ordering::Relaxed);
        }
        outcome
    }));
    Ok(Opened::Http2(shared))
}

/// Room for one request on a connection, held until the response's body ends.
pub(super) enum Lease {
    Http1(Http1Lease),
    Http2(Http2Lease),
}

pub(super) struct Http1Lease {
    sender: http1::SendRequest<Body>,
    pool: Arc<OriginPool>,
}

pub(super) struct Http2Lease(Arc<Http2>);

impl Http2Lease {
    fn new(connection: Arc<Http2>) -> Self {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self(connection)
    }
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lease {
    pub(super) fn version(&self) -> Version {
        match self {
            Self::Http1(_) => Version::HTTP_11,
            Self::Http2(_) => Version::HTTP_2,
        }
    }

    pub(super) async fn try_send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Body>>> {
        match self {
            Self::Http1(lease) => {
                // An idle connection may still be tidying up after its last response.
                let _closed_is_found_by_sending = lease.sender.ready().await;
                lease.sender.try_send_request(request).await
            }
            Self::Http2(lease) => lease.0.sender.clone().try_send_request(request).await,
        }
    }

    /// The response's body, which gives the room back when it ends and closes an HTTP/1.1 connection,
    /// or cancels an HTTP/2 stream, when it is dropped before.
    pub(super) fn into_body(self, body: Incoming) -> Body {
        let mut leased = Leased { body, lease: Some(self) };
        if leased.body.is_end_stream() {
            leased.end();
            return Body::empty();
        }
        Body::boxed(leased)
    }
}

struct Leased {
    body: Incoming,
    lease: Option<Lease>,
}

impl Leased {
    fn end(&mut self) {
        let Some(Lease::Http1(Http1Lease { mut sender, pool })) = self.lease.take() else {
            return;
        };
        if sender.is_ready() {
            return pool.put_back(sender);
        }
        // The request's body may still be on its way; the connection is of use only after it.
        let tasks = pool.tasks.clone();
        tasks.spawn(async move {
            if sender.ready().await.is_ok() {
                pool.put_back(sender);
            }
        });
    }
}

impl HttpBody for Leased {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if frame.is_none() || this.body.is_end_stream() {
            this.end();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The pool's locks are held for a few steps that cannot panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
