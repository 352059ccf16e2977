//! HTTP/1.1 with an intercepted client, whose connection keeps no buffers while nothing goes on in it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::closing::{Closing, PARTING};
use super::explained::Explained;
use crate::limits::Limits;
use crate::upstream::body::{Body, Going};
use crate::upstream::early::Early;

/// Longest idle time of a client's HTTP/1.1 connection. Above the keep-alive limits of common clients
/// (curl 118 s, Node 5 s, Go 90 s), so that they close first and no request meets a closing connection.
const IDLE_LIMIT: Duration = Duration::from_secs(180);

/// How long nothing goes on before a connection rests. Clients that send one request after the other pause for less;
/// what it costs to begin again is nothing beside this.
const QUIET: Duration = Duration::from_secs(1);

/// Longest time between two looks at a connection in which a long exchange goes on, or nothing has begun: thousands of them
/// cost nothing that counts, and one that is over keeps its buffers a tenth of [`IDLE_LIMIT`] longer at most.
const SELDOM: Duration = Duration::from_secs(16);

/// What goes on in a connection.
#[derive(Debug, Default)]
pub(super) struct Activity {
    begun: AtomicU64,
    going: Arc<AtomicUsize>,
    unflushed: AtomicBool,
}

impl Activity {
    /// An exchange begins.
    pub(super) fn begin(&self) -> Going {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.part()
    }

    /// A part of an exchange that has begun.
    pub(super) fn part(&self) -> Going {
        Going::counted_in(&self.going)
    }

    /// Something is written that may not have left.
    pub(super) fn writes(&self) {
        self.unflushed.store(true, Ordering::Relaxed);
    }

    /// All that was written has left.
    pub(super) fn has_flushed(&self) {
        self.unflushed.store(false, Ordering::Relaxed);
    }

    /// Whether several exchanges go on, or one whose request still comes.
    pub(super) fn is_crowd(&self) -> bool {
        self.going.load(Ordering::Relaxed) > 1
    }

    fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether every exchange is over, with all parts of its bodies, and its response has left.
    fn is_over(&self) -> bool {
        self.going.load(Ordering::Relaxed) == 0 && !self.unflushed.load(Ordering::Relaxed)
    }

    /// Waits until nothing has gone on for a while, after at least one exchange since there had been `before`. What a client
    /// sends that is no request yet does not count, so that one that sends it slowly gets its time once.
    async fn rests(&self, before: u64) {
        let (mut seen, mut pause, mut was_over) = (before, QUIET, false);
        loop {
            sleep(pause).await;
            let (begun, is_over) = (self.begun(), self.is_over());
            // Twice in a row: hyper may not have seen yet what was over just now, and has to deal with what nobody wanted of
            // a request's body.
            if begun == seen && begun != before && is_over && was_over {
                return;
            }
            // Where nothing begins, nobody looks every second either.
            let is_new = begun != seen || is_over != was_over;
            pause = if is_new { QUIET } else { (pause * 2).min(SELDOM) };
            (seen, was_over) = (begun, is_over);
        }
    }
}

/// Serves the client until it goes, each of its requests with `answer`. hyper keeps 16 KiB for each connection, of which
/// one at rest needs nothing: it is taken apart, and put together again when the client sends something.
pub(super) async fn serve<S, A, R>(
    closing: &Closing,
    (ended, limits): (&CancellationToken, &Limits),
    (activity, stream): (Arc<Activity>, S),
    answer: A,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    A: Fn(Request<Incoming>) -> R + Clone + Unpin,
    R: Future<Output = Response<Body>>,
{
    let (mut stream, mut patience) = (Early::new([], stream), IDLE_LIMIT);
    loop {
        let (answer, counted, before) = (answer.clone(), activity.clone(), activity.begun());
        let service = service_fn(move |request| {
            let going = counted.begin();
            // Boxed, because hyper keeps room for this future beside every idle connection.
            let answered = Box::pin(answer(request));
            async move { Ok::<_, Infallible>(answered.await.map(|body| body.holding(going))) }
        });
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(patience)
            // A head, the next requests of a pipeline, and what comes before a WebSocket is open.
            .max_buf_size(limits.head_size as usize)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(Explained::new(stream, activity.clone())), service)
            .with_upgrades();
        // A box of its own, which is not there while the connection rests.
        let mut serving = Box::new(serving);
        let driven = Pin::new(&mut *serving);
        tokio::select! {
            // What goes on is seen before it is said to rest.
            biased;
            () = closing.drive(driven, ended, |serving| serving.graceful_shutdown()) => return,
            () = activity.rests(before) => {}
        }
        let Some(parts) = serving.into_parts() else { return };
        stream = parts.io.into_inner().into_inner();
        stream.put_back(parts.read_buf);
        let since = Instant::now();
        if !rest(closing, ended, &mut stream).await {
            return;
        }
        // Of the head that begins now some has come already.
        patience = IDLE_LIMIT.saturating_sub(since.elapsed()).max(limits.head_time);
    }
}

/// Waits for the client to send something. `false` when it does not, or may not any more: then it has been told so.
async fn rest<S>(closing: &Closing, ended: &CancellationToken, stream: &mut Early<S>) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let goes_on = tokio::select! {
        next = timeout(IDLE_LIMIT, stream.peek()) => match next {
            Ok(Ok(next)) => next.is_some(),
            Ok(Err(error)) => {
                tracing::debug!(%error, "connection ended at rest");
                return false;
            }
            Err(_idle) => false,
        },
        () = closing.draining.cancelled() => false,
        () = ended.cancelled() => false,
        () = closing.cut.cancelled() => return false,
    };
    if !goes_on {
        // One that does not take it is left as it is.
        let _told = timeout(PARTING, stream.shutdown()).await;
    }
    goes_on
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::task::{Context, Poll};

    use bytes::Bytes;
    use futures_util::future::ready;
    use http_body_util::BodyExt as _;
    use tokio::io::{AsyncReadExt as _, DuplexStream, ReadBuf, duplex};
    use tokio::task::JoinHandle;

    use super::*;
    use crate::tasks::Tasks;

    /// A client's connection that is served, as the client sees it.
    struct Scene {
        client: DuplexStream,
        closing: Arc<Closing>,
        ended: CancellationToken,
        /// How much was asked for at last: hyper's room for a head, or what is read ahead at rest.
        asked: Arc<AtomicUsize>,
        serving: JoinHandle<()>,
    }

    struct Asked {
        stream: DuplexStream,
        asked: Arc<AtomicUsize>,
    }

    impl AsyncRead for Asked {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.asked.store(buf.remaining(), Ordering::Relaxed);
            Pin::new(&mut self.stream).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Asked {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.stream).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        }
    }

    impl Scene {
        /// `room` is how much the client can be sent that it does not read.
        fn new<R>(
            room: usize,
            answer: impl Fn(Request<Incoming>) -> R + Clone + Unpin + Send + 'static,
        ) -> Self
        where
            R: Future<Output = Response<Body>> + Send + 'static,
        {
            Self::of(Arc::default(), room, answer)
        }

        fn of<R>(
            activity: Arc<Activity>,
            room: usize,
            answer: impl Fn(Request<Incoming>) -> R + Clone + Unpin + Send + 'static,
        ) -> Self
        where
            R: Future<Output = Response<Body>> + Send + 'static,
        {
            let (client, stream) = duplex(room);
            let (closing, ended) = (Arc::<Closing>::default(), CancellationToken::new());
            let asked = Arc::<AtomicUsize>::default();
            let stream = Asked { stream, asked: asked.clone() };
            let (ours, until) = (closing.clone(), ended.clone());
            let serving = Tasks::new().spawn(async move {
                let limits = Limits::USUAL;
                serve(&ours, (&until, &limits), (activity, stream), answer).await;
            });
            Self { client, closing, ended, asked, serving }
        }

        fn rests(&self) -> bool {
            // hyper's room for a head grows to 16 KiB.
            self.asked.load(Ordering::Relaxed) > 16 * 1024
        }

        async fn send(&mut self, text: &str) {
            self.client.write_all(text.as_bytes()).await.unwrap();
        }

        /// Reads the head of an answer.
        async fn answered(&mut self) {
            let mut read = Vec::new();
            while !read.ends_with(b"\r\n\r\n") {
                read.push(self.client.read_u8().await.unwrap());
            }
            assert!(read.starts_with(b"HTTP/1.1 200 OK\r\n"), "{read:?}");
        }

        /// Whether the connection has ended after so long, and not before.
        async fn ends_after(mut self, time: Duration) {
            let began = Instant::now();
            let mut rest = Vec::new();
            self.client.read_to_end(&mut rest).await.unwrap();
            assert_eq!((rest.len(), began.elapsed().as_secs()), (0, time.as_secs()));
            self.serving.await.unwrap();
        }
    }

    fn empty<T>(_: T) -> impl Future<Output = Response<Body>> + Send + use<T> {
        ready(Response::new(Body::empty()))
    }

    const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn it_rests_between_requests_and_loses_none() {
        let mut scene = Scene::new(1024, empty);
        sleep(QUIET * 5).await;
        assert!(!scene.rests(), "nothing was asked yet");
        for _ in 0..3 {
            scene.send(GET).await;
            scene.answered().await;
            sleep(Duration::from_millis(1)).await;
            assert!(!scene.rests());
            sleep(SELDOM + QUIET * 3).await;
            assert!(scene.rests());
            // The next ones come together, the last of them in two pieces.
            scene.send(&format!("{GET}{GET}{}", &GET[..9])).await;
            scene.answered().await;
            scene.answered().await;
            sleep(QUIET * 3).await;
            scene.send(&GET[9..]).await;
            scene.answered().await;
        }
        scene.closing.draining.cancel();
        scene.ends_after(Duration::ZERO).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_at_rest_has_as_long_as_any_other() {
        let mut scene = Scene::new(1024, empty);
        scene.send(GET).await;
        scene.answered().await;
        let rested = Instant::now() + QUIET * 2;
        sleep(QUIET * 3).await;
        let left = IDLE_LIMIT - rested.elapsed();
        scene.ends_after(left).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_comes_slowly_gets_no_more_time_by_resting() {
        let mut scene = Scene::new(1024, empty);
        scene.send(GET).await;
        scene.answered().await;
        sleep(IDLE_LIMIT - QUIET * 5).await;
        assert!(scene.rests());
        let began = Instant::now();
        for piece in GET.bytes() {
            if scene.client.write_u8(piece).await.is_err() {
                break;
            }
            sleep(QUIET * 4).await;
        }
        assert!(scene.serving.is_finished());
        let (taken, given) = (began.elapsed(), Limits::USUAL.head_time);
        assert!(taken < given + QUIET * 8, "{taken:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_let_in_any_more_is_told_at_rest() {
        let mut scene = Scene::new(1024, empty);
        scene.send(GET).await;
        scene.answered().await;
        sleep(QUIET * 3).await;
        scene.ended.cancel();
        scene.ends_after(Duration::ZERO).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_that_is_silent_for_long_does_not_rest() {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
        let mut scene = Scene::new(1024, move |_| {
            let mut receiver = receiver.lock().unwrap().take().unwrap();
            let frames = futures_util::stream::poll_fn(move |cx| {
                receiver.poll_recv(cx).map(|data| data.map(|data| Ok(http_body::Frame::data(data))))
            });
            ready(Response::new(Body::boxed(http_body_util::StreamBody::new(frames))))
        });
        scene.send(GET).await;
        scene.answered().await;
        for _ in 0..100 {
            sleep(IDLE_LIMIT).await;
            assert!(!scene.rests());
            sender.send(Bytes::from_static(b"x")).await.unwrap();
            let mut chunk = [0; 6];
            scene.client.read_exact(&mut chunk).await.unwrap();
            assert_eq!(&chunk, b"1\r\nx\r\n");
        }
    }

    /// The rest of a body that nobody wanted is no request, whenever it was given up.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_given_up_before_a_look_is_not_read_as_requests() {
        for _ in 0..32 {
            let (activity, asked) = (Arc::<Activity>::default(), Arc::<AtomicUsize>::default());
            let (ours, counted) = (activity.clone(), asked.clone());
            let began = Instant::now();
            let mut scene = Scene::of(activity, 1024, move |request: Request<Incoming>| {
                counted.fetch_add(1, Ordering::Relaxed);
                let (body, going) = (request.into_body(), ours.part());
                Tasks::new().spawn(async move {
                    tokio::time::sleep_until(began + QUIET * 2).await;
                    drop((going, body));
                });
                empty(())
            });
            scene.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await;
            scene.answered().await;
            sleep(QUIET * 10).await;
            // It may be closed already.
            let _sent = scene.client.write_all(GET.as_bytes()).await;
            sleep(QUIET).await;
            assert_eq!(asked.load(Ordering::Relaxed), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_not_left_or_come_yet_keeps_it_from_resting() {
        let long = |_| ready(Response::new(Body::from(Bytes::from(vec![b'x'; 100_000]))));
        let mut scene = Scene::new(1024, long);
        scene.send(GET).await;
        sleep(SELDOM * 3).await;
        assert!(!scene.rests(), "the client reads nothing");
        scene.answered().await;
        let mut body = vec![0; 100_000];
        scene.client.read_exact(&mut body).await.unwrap();
        sleep(SELDOM * 2).await;
        assert!(scene.rests());

        // The response is out, and the request is not all there.
        let activity = Arc::<Activity>::default();
        let ours = activity.clone();
        let mut scene = Scene::of(activity, 1024, move |request: Request<Incoming>| {
            let (collecting, going) = (request.into_body().collect(), ours.part());
            Tasks::new().spawn(async move {
                let _going = going;
                drop(collecting.await);
            });
            ready(Response::new(Body::empty()))
        });
        scene.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nx").await;
        scene.answered().await;
        sleep(QUIET * 5).await;
        scene.send("xx").await;
        scene.send(GET).await;
        scene.answered().await;
    }
}
