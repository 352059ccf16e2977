//! Pooled connections: HTTP/1.1 keep-alive, and as many HTTP/2 connections per origin as its streams
//! need, so that a long stream never delays the next request.

mod http2;
mod paced;
mod stream;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Either, TryFutureExt as _};
use http::{Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::UpstreamError;
use super::body::{Body, BodyError, Inbound};
use super::dial::{Stream, is_http2};
use super::interim::{self, MostInterim, Unanswered};
use crate::clock;
use crate::origin::Origin;
use crate::tasks::Tasks;
use http2::{Http2, Http2Lease, Window};
use stream::Received;

/// All pooled connections, by origin.
pub(super) struct Pool {
    origins: Arc<Mutex<Origins>>,
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
enum Opened {
    Http1(http1::SendRequest<Body>),
    Http2(Arc<Http2>),
}

/// What is open to one origin.
struct OriginPool {
    state: Mutex<State>,
    /// Rings when a dial ends, well or badly, and when an HTTP/2 connection has more room or has ended.
    dialled: Notify,
    tasks: Tasks,
}

#[derive(Default)]
struct State {
    http1: Vec<Idle>,
    http2: Vec<Arc<Http2>>,
    dialling: usize,
    /// When the last of those dials began.
    dialled_at: Option<tokio::time::Instant>,
    /// The last dial gave HTTP/1.1 or failed, so one dial serves one request: do not wait for others'.
    each_for_itself: bool,
    /// The last dial failed.
    has_failed: bool,
    /// One of those dials was begun before there was a request, and no request waits for it yet.
    is_ahead: bool,
}

struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

impl Idle {
    fn is_of_use(&self, now: Instant) -> bool {
        !self.sender.is_closed() && now - self.since < IDLE_LIMIT
    }
}

/// How long a connection may idle: below nginx's 75 s and the 60 s of common load balancers. A server
/// with a shorter limit closes first, which the pool sees.
const IDLE_LIMIT: Duration = Duration::from_secs(50);

/// How often idle connections are looked for; with [`IDLE_LIMIT`] it stays below those 75 s.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);

/// Most idle HTTP/1.1 connections kept per origin, so that a burst leaves no crowd of descriptors.
const MOST_IDLE: usize = 64;

impl Pool {
    pub(super) fn new(tasks: Tasks) -> Self {
        Self { origins: Arc::default(), tasks }
    }

    fn of(&self, origin: &Origin, trust: u64) -> Arc<OriginPool> {
        let mut origins = lock(&self.origins);
        if origins.trust > trust {
            // Whoever still goes by older roots dials for itself alone.
            return OriginPool::empty(&self.tasks);
        }
        if origins.trust < trust {
            // What is in use goes on to its end, and is then given back to nobody.
            *origins = Origins { open: HashMap::new(), trust };
        }
        if let Some(pool) = origins.open.get(origin) {
            return pool.clone();
        }
        let pool = OriginPool::empty(&self.tasks);
        origins.open.insert(origin.clone(), pool.clone());
        let entry = (origin.clone(), Arc::downgrade(&pool));
        let origins = Arc::downgrade(&self.origins);
        self.tasks.keep("tidying the pool", move || tidy(origins.clone(), entry.clone()));
        pool
    }

    /// As [`Pool::checkout`], where that has neither to look nor to wait: one that was used just now.
    pub(super) fn take(&self, (origin, trust): (&Origin, u64)) -> Option<Lease> {
        let pool = self.of(origin, trust);
        lock(&pool.state).take_used(&pool)
    }

    /// A connection with room for one more request: an open one that was verified under this version of
    /// the roots, else one made by `dial`, which must use these roots. While the origin may
    /// turn out to speak HTTP/2, one dial serves all who come meanwhile.
    pub(super) async fn checkout<'a>(
        &self,
        (origin, trust): (&Origin, u64),
        dial: impl Fn() -> BoxFuture<'a, Result<Stream, UpstreamError>>,
    ) -> Result<Lease, UpstreamError> {
        let pool = self.of(origin, trust);
        loop {
            match pool.next_step() {
                Step::Take(lease) if lease.is_there().await => return Ok(lease),
                // It is not taken again.
                Step::Take(_) => {}
                Step::Wait(other_dial) => {
                    let _another_look = tokio::time::timeout(http2::PATIENCE, other_dial).await;
                }
                Step::Dial => break,
            }
        }
        Dialling::new(&pool).finish(origin, dial()).await
    }

    /// Has a connection open, or on its way, for a request that is likely to come: one at most, and none to an origin that
    /// could not be reached the last time. `dial` is as for [`Pool::checkout`].
    pub(super) fn dial_ahead(
        &self,
        (origin, trust): (Origin, u64),
        dial: impl FnOnce(Origin) -> BoxFuture<'static, Result<Stream, UpstreamError>>,
    ) {
        let pool = self.of(&origin, trust);
        if !pool.begin_ahead() {
            return;
        }
        let dialling = dial(origin.clone());
        self.tasks.spawn(async move {
            let mut counted = Dialling::new(&pool);
            match counted.finish(&origin, dialling).await {
                // Before the dial is over, so that whoever waits for it finds the connection.
                Ok(lease) => lease.give_back(),
                Err(error) => tracing::debug!(%error, "a dial ahead of any request failed"),
            }
        });
    }
}

/// What is to be done for a connection.
enum Step<'a> {
    Take(Lease),
    Wait(Notified<'a>),
    Dial,
}

/// Counts a dial, and ends the count however the dial ends.
struct Dialling<'a> {
    pool: &'a Arc<OriginPool>,
    /// The protocol that was found.
    found: Option<Version>,
}

impl<'a> Dialling<'a> {
    /// For a dial that [`OriginPool::next_step`] or [`OriginPool::begin_ahead`] has counted.
    fn new(pool: &'a Arc<OriginPool>) -> Self {
        Self { pool, found: None }
    }

    /// Dials, and starts HTTP. The connection is in the pool's lists, or leased, before the dial counts as over.
    async fn finish(
        &mut self,
        origin: &Origin,
        dial: BoxFuture<'_, Result<Stream, UpstreamError>>,
    ) -> Result<Lease, UpstreamError> {
        let opened = self.pool.open(dial.await?).await;
        let opened = opened.map_err(|error| UpstreamError::http(origin, error, false))?;
        let lease = self.pool.lease(opened);
        self.found = Some(lease.version());
        Ok(lease)
    }
}

impl Drop for Dialling<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        state.dialling -= 1;
        // Another may have found HTTP/2 meanwhile.
        state.each_for_itself = self.found != Some(Version::HTTP_2) && state.http2.is_empty();
        state.has_failed = self.found.is_none();
        state.is_ahead = false;
        drop(state);
        self.pool.dialled.notify_waiters();
    }
}

/// Closes what has idled for too long, and drops the entry of an origin to which nothing is open any more.
async fn tidy(origins: Weak<Mutex<Origins>>, entry: (Origin, Weak<OriginPool>)) {
    loop {
        tokio::time::sleep(TIDY_INTERVAL).await;
        let Some(origins) = origins.upgrade() else { return };
        if forget_unused(&mut lock(&origins).open, &entry, clock::instant()) {
            return;
        }
    }
}

/// One round of [`tidy`]; `true` when the entry is gone.
fn forget_unused(
    origins: &mut HashMap<Origin, Arc<OriginPool>>,
    (origin, entry): &(Origin, Weak<OriginPool>),
    now: Instant,
) -> bool {
    // Another may be in its place, of newer roots.
    let known = origins.get(origin).filter(|pool| Arc::as_ptr(pool) == entry.as_ptr());
    let Some(pool) = known else { return true };
    let is_empty = lock(&pool.state).tidy(now);
    // Whoever has another hold on it is dialling, waiting, or in an exchange on HTTP/1.1.
    let is_unused = is_empty && Arc::strong_count(pool) == 1;
    if is_unused {
        origins.remove(origin);
    }
    is_unused
}

impl OriginPool {
    fn empty(tasks: &Tasks) -> Arc<Self> {
        let (state, dialled) = (Mutex::default(), Notify::new());
        Arc::new(Self { state, dialled, tasks: tasks.clone() })
    }

    /// A dial is counted here, and is to be made.
    fn next_step(self: &Arc<Self>) -> Step<'_> {
        let mut state = lock(&self.state);
        if let Some(lease) = state.take(self) {
            return Step::Take(lease);
        }
        if std::mem::take(&mut state.is_ahead) || state.is_worth_waiting() {
            return Step::Wait(self.dialled.notified());
        }
        state.begin_dial();
        Step::Dial
    }

    /// Counts a dial that no request waits for yet, which is then to be made; `false` where none is.
    fn begin_ahead(&self) -> bool {
        let mut state = lock(&self.state);
        let is_open = !state.tidy(clock::instant());
        let begins = !is_open && state.dialling == 0 && !state.has_failed;
        if begins {
            state.begin_dial();
            state.is_ahead = true;
        }
        begins
    }

    /// Starts HTTP on a stream.
    async fn open(self: &Arc<Self>, stream: Stream) -> Result<Opened, BodyError> {
        if is_http2(&stream) {
            let pool = Arc::downgrade(self);
            let told = move || {
                if let Some(pool) = pool.upgrade() {
                    pool.dialled.notify_waiters();
                }
            };
            let window = lock(&self.state).next_window();
            return Ok(Opened::Http2(http2::open(stream, window, &self.tasks, told).await?));
        }
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        self.tasks.spawn(connection);
        Ok(Opened::Http1(sender))
    }

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
            state.http1.push(Idle { sender, since: clock::instant() });
        }
    }
}

impl State {
    fn take(&mut self, pool: &Arc<OriginPool>) -> Option<Lease> {
        self.tidy(clock::instant());
        if let Some(connection) = self.http2.iter().find(|connection| connection.has_room()) {
            return Some(Lease::Http2(Http2Lease::new(connection.clone())));
        }
        // The one used last is the one most likely to live.
        let Idle { sender, .. } = self.http1.pop()?;
        Some(Lease::Http1(Http1Lease { sender, pool: pool.clone() }))
    }

    /// As [`State::take`], where that was used just now; what it passes over is not tidied.
    fn take_used(&mut self, pool: &Arc<OriginPool>) -> Option<Lease> {
        let now = clock::instant();
        let has_room = |open: &&Arc<Http2>| open.has_room() && !open.is_over(now);
        if let Some(connection) = self.http2.iter().find(has_room) {
            return connection
                .was_used(now)
                .then(|| Lease::Http2(Http2Lease::new(connection.clone())));
        }
        let Idle { sender, .. } = self.http1.pop_if(|idle| idle.is_of_use(now))?;
        Some(Lease::Http1(Http1Lease { sender, pool: pool.clone() }))
    }

    fn begin_dial(&mut self) {
        self.dialling += 1;
        self.dialled_at = Some(tokio::time::Instant::now());
    }

    /// For a connection that is about to be opened.
    fn next_window(&self) -> Window {
        let is_wide = |open: &Arc<Http2>| open.window == Window::Wide;
        if self.http2.iter().any(is_wide) { Window::Narrow } else { Window::Wide }
    }

    /// Whether another's connection may have room in a moment. Of a dial that takes long, somebody makes another.
    fn is_worth_waiting(&self) -> bool {
        let is_fresh = |at: tokio::time::Instant| at.elapsed() < http2::PATIENCE;
        (self.dialling > 0 && !self.each_for_itself && self.dialled_at.is_some_and(is_fresh))
            || self.http2.iter().any(|open| open.will_tell())
    }

    /// Lets go of what is closed or has idled for too long; whether nothing is left.
    fn tidy(&mut self, now: Instant) -> bool {
        self.http2.retain(|connection| !connection.is_over(now));
        self.http1.retain(|idle| idle.is_of_use(now));
        self.http2.is_empty() && self.http1.is_empty()
    }
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

impl Lease {
    /// Whether the upstream is still there, as far as the system knows; one that is not is given up. hyper looks by itself
    /// before it takes a request for HTTP/1.1.
    async fn is_there(&self) -> bool {
        match self {
            Self::Http1(_) => true,
            Self::Http2(lease) => lease.is_there().await,
        }
    }

    /// Gives the room back without having used it.
    fn give_back(self) {
        if let Self::Http1(Http1Lease { sender, pool }) = self {
            pool.put_back(sender);
        }
    }

    pub(super) fn version(&self) -> Version {
        match self {
            Self::Http1(_) => Version::HTTP_11,
            Self::Http2(_) => Version::HTTP_2,
        }
    }

    /// Waits until the connection takes a request.
    pub(super) async fn ready(&mut self) {
        if let Self::Http1(lease) = self {
            // An idle one may still be tidying up after its last response.
            let _closed_is_found_by_sending = lease.sender.ready().await;
        }
    }

    /// Sends a request, which is on its way when this returns, before the outcome is asked for.
    pub(super) fn try_send(
        &mut self,
        request: Request<Body>,
        most_interim: MostInterim,
    ) -> impl Future<Output = Result<Response<Answer>, Unanswered>> {
        match self {
            Self::Http1(lease) => {
                let sending = interim::send(&mut lease.sender, request, most_interim);
                Either::Left(sending.map_ok(|response| response.map(Answer::Http1)))
            }
            Self::Http2(lease) => {
                let sending = lease.send(request, most_interim);
                Either::Right(sending.map_ok(|response| response.map(Answer::Http2)))
            }
        }
    }

    /// The response's body, which gives the room back when it ends and closes an HTTP/1.1 connection,
    /// or cancels an HTTP/2 stream, when it is dropped before.
    pub(super) fn into_body(self, answer: Answer) -> Body {
        match answer {
            Answer::Http1(body) => self.lend(Inbound::new(body, Version::HTTP_11)),
            Answer::Http2(body) => self.lend(body),
        }
    }

    fn lend<B>(self, body: B) -> Body
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + Unpin + 'static,
    {
        let mut leased = Leased { body, lease: Some(self) };
        if leased.body.is_end_stream() {
            leased.end();
            return Body::empty();
        }
        Body::boxed(leased)
    }
}

/// The body of a response as it comes.
pub(super) enum Answer {
    Http1(Incoming),
    Http2(Received),
}

struct Leased<B> {
    body: B,
    lease: Option<Lease>,
}

impl<B> Leased<B> {
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

impl<B> HttpBody for Leased<B>
where
    B: HttpBody<Data = Bytes, Error = BodyError> + Unpin,
{
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
        Poll::Ready(frame)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::Target;

    #[tokio::test]
    async fn an_origin_is_forgotten_when_nothing_of_it_is_open() {
        let pool = Pool::new(Tasks::new());
        let origin = Origin::https(Target::parse("api.example.com:443").unwrap());
        let now = clock::instant();
        let in_use = pool.of(&origin, 0);
        let entry = (origin.clone(), Arc::downgrade(&in_use));
        let forgotten = |now| forget_unused(&mut lock(&pool.origins).open, &entry, now);
        assert!(!forgotten(now), "somebody is dialling");
        let (ours, _theirs) = tokio::io::duplex(1024);
        let (mut sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        pool.tasks.spawn(connection);
        sender.ready().await.unwrap();
        in_use.put_back(sender);
        drop(in_use);
        assert!(!forgotten(now), "a connection is open");
        assert!(pool.of(&origin, 0).state.lock().unwrap().http1.len() == 1);
        assert!(forgotten(now + IDLE_LIMIT + TIDY_INTERVAL));
        assert!(lock(&pool.origins).open.is_empty());
        // One of newer roots in its place is looked after by another.
        let newer = pool.of(&origin, 1);
        assert!(forgotten(now) && Arc::ptr_eq(&newer, &pool.of(&origin, 1)));
    }

    #[tokio::test]
    async fn what_is_dialled_by_older_roots_is_for_nobody_else() {
        let pool = Pool::new(Tasks::new());
        let origin = Origin::https(Target::parse("api.example.com:443").unwrap());
        let newer = pool.of(&origin, 2);
        let (older, again) = (pool.of(&origin, 1), pool.of(&origin, 1));
        assert!(!Arc::ptr_eq(&older, &newer) && !Arc::ptr_eq(&older, &again));
        assert!(Arc::ptr_eq(&newer, &pool.of(&origin, 2)));
    }

    type Outcome = tokio::sync::oneshot::Sender<Result<Stream, UpstreamError>>;

    /// A dial whose outcome the test sends, and how many there were.
    fn told(
        outcomes: &Arc<Mutex<Vec<Outcome>>>,
    ) -> impl Fn() -> BoxFuture<'static, Result<Stream, UpstreamError>> + use<> {
        let outcomes = outcomes.clone();
        move || {
            let (sender, outcome) = tokio::sync::oneshot::channel();
            lock(&outcomes).push(sender);
            Box::pin(async { outcome.await.unwrap() })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_the_dial_that_was_made_ahead_of_it() {
        let pool = Pool::new(Tasks::new());
        let origin = Origin::https(Target::parse("api.example.com:443").unwrap());
        let dials = Arc::default();
        let (dial, count) = (told(&dials), || lock(&dials).len());
        let ahead = || pool.dial_ahead((origin.clone(), 0), |_| dial());
        ahead();
        ahead();
        assert_eq!(count(), 1, "one is enough");
        let mut first = Box::pin(pool.checkout((&origin, 0), &dial));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert_eq!(count(), 1, "it waits");
        let mut second = Box::pin(pool.checkout((&origin, 0), &dial));
        assert!(futures_util::poll!(&mut second).is_pending());
        let failed = || Err(UpstreamError::new(super::super::Stage::Tcp, &"here"));
        let next = || lock(&dials).remove(0);
        next().send(failed()).map_err(drop).unwrap();
        // What failed ahead is found out again, and told then.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(futures_util::poll!(&mut first).is_pending());
        while count() > 0 {
            next().send(failed()).map_err(drop).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(first.await.is_err());
        drop(second);
        ahead();
        assert_eq!(count(), 0, "none to where nothing could be reached");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dial_that_takes_long_gets_another_beside_it_after_a_second() {
        let pool = Pool::new(Tasks::new());
        let origin = Origin::https(Target::parse("api.example.com:443").unwrap());
        let never = || -> BoxFuture<'_, _> { Box::pin(std::future::pending()) };
        let mut stuck = Box::pin(pool.checkout((&origin, 0), never));
        assert!(futures_util::poll!(&mut stuck).is_pending());
        let began = tokio::time::Instant::now();
        let fails = || -> BoxFuture<'_, _> {
            Box::pin(async { Err(UpstreamError::new(super::super::Stage::Tcp, &"here")) })
        };
        assert!(pool.checkout((&origin, 0), fails).await.is_err(), "it has dialled by itself");
        assert_eq!(began.elapsed(), http2::PATIENCE);
    }
}
