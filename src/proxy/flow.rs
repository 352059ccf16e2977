//! Bytes on their way from one stream to another, in one direction and in both.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Read at a time. Larger ones save system calls, but a direction whose reader is slow may come to hold as much.
const SCRATCH: usize = 64 * 1024;

/// How long one direction may go on after the other has ended, if nothing moves: some peers half-close
/// and still read, others never close at all.
const LINGER: Duration = Duration::from_secs(30);

/// How often each direction may move before others have their turn: a MiB of copying, well below a millisecond.
const TURN: usize = 16;

thread_local! {
    /// What all directions of a thread read into, one after the other: none has room of its own while it is idle. Another
    /// one than that of `upstream/early.rs`, which is read into meanwhile where the stream is TLS.
    static READ_INTO: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    // Taken, so that there is no borrowing it twice.
    let mut scratch = READ_INTO.take();
    scratch.resize(SCRATCH, 0);
    let outcome = work(&mut scratch);
    READ_INTO.set(scratch);
    outcome
}

/// One direction that is copied. Whatever is polled here may be left after any poll, and no byte is lost or sent twice,
/// so that a direction can be stopped and then finished in another way.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// What was read and is not written yet; it has no room while that is nothing.
    held: Bytes,
    /// TLS may hold back the last of what was written, until it is flushed.
    is_unflushed: bool,
    has_ended: bool,
    is_over: bool,
    /// What was written, in bytes.
    written: u64,
}

impl Flow {
    /// Writes what is held, then reads once and writes as much of that as there is room for; passes the end on. `look` is
    /// shown what was read. How much that was; nothing when the direction is over.
    pub(super) fn poll_pass<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        (from, to): (&mut R, &mut W),
        look: impl FnOnce(&[u8]),
    ) -> Poll<io::Result<usize>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_deliver(cx, to))?;
        if !self.has_ended {
            let len = ready!(with_scratch(|scratch| {
                let read = ready!(self.poll_read(cx, from, scratch))?;
                look(read);
                Poll::Ready(self.write_at_once(cx, to, read).map(|()| read.len()))
            }))?;
            if len > 0 {
                return Poll::Ready(Ok(len));
            }
        }
        ready!(Pin::new(to).poll_shutdown(cx))?;
        self.is_over = true;
        Poll::Ready(Ok(0))
    }

    fn poll_read<'a, R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        into: &'a mut [u8],
    ) -> Poll<io::Result<&'a [u8]>> {
        let mut buf = ReadBuf::new(into);
        ready!(Pin::new(from).poll_read(cx, &mut buf))?;
        let len = buf.filled().len();
        self.has_ended = len == 0;
        Poll::Ready(Ok(&into[..len]))
    }

    /// Holds what cannot be written at once.
    fn write_at_once<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        read: &[u8],
    ) -> io::Result<()> {
        if read.is_empty() {
            return Ok(());
        }
        self.is_unflushed = true;
        let len = match Pin::new(to).poll_write(cx, read) {
            Poll::Ready(outcome) => some(outcome?)?,
            Poll::Pending => 0,
        };
        self.count(len);
        self.held = Bytes::copy_from_slice(&read[len..]);
        Ok(())
    }

    /// Writes what is held, and flushes.
    pub(super) fn poll_deliver<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let len = some(ready!(Pin::new(&mut *to).poll_write(cx, &self.held))?)?;
            self.count(len);
            self.held.advance(len);
            if self.held.is_empty() {
                // An empty one has its room still.
                self.held = Bytes::new();
            }
        }
        if self.is_unflushed {
            ready!(Pin::new(to).poll_flush(cx))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what is held, and flushes.
    pub(super) async fn deliver<W: AsyncWrite + Unpin>(&mut self, to: &mut W) -> io::Result<()> {
        poll_fn(|cx| self.poll_deliver(cx, to)).await
    }

    /// Reads once, at most so many bytes, which must be some; what it reads is held, and is to be delivered before
    /// the next. Nothing is read at the end.
    pub(super) async fn take<R>(&mut self, from: &mut R, most: usize) -> io::Result<&[u8]>
    where
        R: AsyncRead + Unpin,
    {
        let taking = poll_fn(|cx| {
            with_scratch(|scratch| {
                let most = most.min(scratch.len());
                let read = ready!(self.poll_read(cx, from, &mut scratch[..most]))?;
                Poll::Ready(io::Result::Ok(Bytes::copy_from_slice(read)))
            })
        });
        self.held = taking.await?;
        self.is_unflushed = true;
        Ok(&self.held)
    }

    /// Counts what was written, here or in another way.
    pub(super) fn count(&mut self, len: usize) {
        self.written += len as u64;
    }

    /// How many bytes were written.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Whether the stream that is read has come to its end.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether that end was passed on, too.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }
}

fn some(written: usize) -> io::Result<usize> {
    if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(written) }
}

/// How a direction is passed.
pub(super) trait Passage<R, W> {
    /// Moves some bytes, or passes the end on. Like those of a [`Flow`], its polls may be the last ones at any time.
    fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        ends: (&mut R, &mut W),
    ) -> Poll<io::Result<usize>>;

    /// What is known of the direction.
    fn flow(&self) -> &Flow;
}

/// Two streams and the two directions between them, in one task and without a lock.
pub(super) struct Joint<A, B, U, D> {
    pub(super) client: A,
    pub(super) upstream: B,
    pub(super) up: U,
    pub(super) down: D,
    /// While one direction has ended and the other has not.
    lingering: Option<Lingering>,
}

impl<A, B, U: Passage<A, B>, D: Passage<B, A>> Joint<A, B, U, D> {
    pub(super) fn new((client, upstream): (A, B), (up, down): (U, D)) -> Self {
        Self { client, upstream, up, down, lingering: None }
    }

    /// Passes until both directions have ended, one has failed, or one has ended and the other stands still. May be
    /// dropped and run again.
    pub(super) async fn run(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// How many bytes went up and down.
    pub(super) fn written(&self) -> (u64, u64) {
        (self.up.flow().written(), self.down.flow().written())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (mut up, mut down) = (!self.up.flow().is_over(), !self.down.flow().is_over());
        for _ in 0..TURN {
            // In turns, so that none holds the other up.
            if up {
                let passed = self.up.poll_pass(cx, (&mut self.client, &mut self.upstream));
                up = goes_on(passed)?;
            }
            if down {
                let passed = self.down.poll_pass(cx, (&mut self.upstream, &mut self.client));
                down = goes_on(passed)?;
            }
            if !up && !down {
                return self.poll_end(cx);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Both directions wait for something, or have ended.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match (self.up.flow().is_over(), self.down.flow().is_over()) {
            (false, false) => Poll::Pending,
            (true, true) => Poll::Ready(Ok(())),
            _ => {
                let (up, down) = self.written();
                let lingering = self.lingering.get_or_insert_with(|| Lingering::begin(up + down));
                lingering.poll_idle(cx, up + down).map(Ok)
            }
        }
    }
}

/// Whether a direction can move at once.
fn goes_on(passed: Poll<io::Result<usize>>) -> io::Result<bool> {
    match passed {
        Poll::Ready(passed) => passed.map(|len| len > 0),
        Poll::Pending => Ok(false),
    }
}

/// Waits for the direction that is left, as long as it moves.
struct Lingering {
    until: Pin<Box<Sleep>>,
    /// What had been written when the wait began.
    written: u64,
}

impl Lingering {
    fn begin(written: u64) -> Self {
        Self { until: Box::pin(sleep(LINGER)), written }
    }

    /// Comes when nothing has moved for a while.
    fn poll_idle(&mut self, cx: &mut Context<'_>, written: u64) -> Poll<()> {
        loop {
            ready!(self.until.as_mut().poll(cx));
            if self.written == written {
                return Poll::Ready(());
            }
            self.written = written;
            self.until.as_mut().reset(Instant::now() + LINGER);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::future::poll_immediate;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    #[derive(Default)]
    struct Copied(Flow);

    impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Passage<R, W> for Copied {
        fn poll_pass(
            &mut self,
            cx: &mut Context<'_>,
            ends: (&mut R, &mut W),
        ) -> Poll<io::Result<usize>> {
            self.0.poll_pass(cx, ends, |_| {})
        }

        fn flow(&self) -> &Flow {
            &self.0
        }
    }

    type Scene<A, B> = Joint<A, B, Copied, Copied>;

    fn joint<A, B>(client: A, upstream: B) -> Scene<A, B>
    where
        A: AsyncRead + AsyncWrite + Unpin,
        B: AsyncRead + AsyncWrite + Unpin,
    {
        Joint::new((client, upstream), (Copied::default(), Copied::default()))
    }

    /// Leaves a future after so many polls.
    async fn left_after<F: Future>(polls: usize, running: F) -> Option<F::Output> {
        let (mut left, mut running) = (polls, pin!(running));
        poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(None);
            }
            left -= 1;
            running.as_mut().poll(cx).map(Some)
        })
        .await
    }

    /// The rest of a direction, as a WebSocket is ended.
    async fn finish(
        flow: &mut Flow,
        most: usize,
        (mut from, mut to): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    ) {
        flow.deliver(&mut to).await.unwrap();
        while !flow.has_ended() {
            flow.take(&mut from, most).await.unwrap();
            flow.deliver(&mut to).await.unwrap();
        }
        if !flow.is_over() {
            to.shutdown().await.unwrap();
        }
    }

    async fn exchange(peer: DuplexStream, sent: &[u8], piece: usize) -> Vec<u8> {
        let (mut from, mut to) = tokio::io::split(peer);
        let sending = async {
            for piece in sent.chunks(piece) {
                to.write_all(piece).await.unwrap();
            }
            to.shutdown().await.unwrap();
        };
        let mut heard = Vec::new();
        let (_sent, read) = tokio::join!(sending, from.read_to_end(&mut heard));
        read.unwrap();
        heard
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Stopped again and again, and then finished in the same way or by hand.
        #[test]
        fn what_arrives_is_what_was_sent(
            up in prop::collection::vec(any::<u8>(), 0..40_000),
            down in prop::collection::vec(any::<u8>(), 0..40_000),
            (near, far) in (1_usize..9000, 1_usize..9000),
            (piece, most) in (1_usize..9000, 1_usize..9000),
            (stops, polls, by_hand) in (0_usize..20, 1_usize..5, any::<bool>()),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let ((client, near), (upstream, far)) = (duplex(near), duplex(far));
                let mut joint = joint(near, far);
                let carrying = async {
                    for _ in 0..stops {
                        if left_after(polls, joint.run()).await.is_some() {
                            break;
                        }
                    }
                    if by_hand {
                        let (from_client, to_client) = tokio::io::split(&mut joint.client);
                        let (from_upstream, to_upstream) = tokio::io::split(&mut joint.upstream);
                        tokio::join!(
                            finish(&mut joint.up.0, most, (from_client, to_upstream)),
                            finish(&mut joint.down.0, most, (from_upstream, to_client)),
                        );
                    } else {
                        joint.run().await.unwrap();
                    }
                };
                let (to_client, to_upstream, ()) =
                    tokio::join!(exchange(client, &up, piece), exchange(upstream, &down, piece), carrying);
                assert_eq!(to_upstream, up);
                assert_eq!(to_client, down);
                assert_eq!(joint.written(), (up.len() as u64, down.len() as u64));
            });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_direction_that_is_left_may_move_and_not_stand_still() {
        let ((mut client, near), (mut upstream, far)) = (duplex(64), duplex(64));
        let mut joint = joint(near, far);
        client.shutdown().await.unwrap();
        let began = Instant::now();
        let moving = async {
            for _ in 0..5 {
                sleep(LINGER * 2 / 3).await;
                upstream.write_all(b"still here").await.unwrap();
            }
        };
        let ((), ended) = tokio::join!(moving, joint.run());
        ended.unwrap();
        assert_eq!(joint.written(), (0, 50));
        let (moved, slack) = (LINGER * 2 / 3 * 5, Duration::from_millis(5));
        assert!(began.elapsed() >= moved + LINGER / 2, "{:?}", began.elapsed());
        assert!(began.elapsed() <= moved + LINGER * 2 + slack, "{:?}", began.elapsed());
    }

    /// Always has something to read, until so much is left of it.
    struct Flood(usize);

    impl AsyncRead for Flood {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let len = buf.remaining().min(self.0);
            buf.initialize_unfilled_to(len);
            buf.advance(len);
            self.0 -= len;
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_direction_that_never_waits_leaves_the_other_and_the_task_their_turn() {
        let client = tokio::io::join(Flood(50 * SCRATCH), Vec::new());
        let upstream = tokio::io::join(&b"heard"[..], Vec::new());
        let mut joint = joint(client, upstream);
        assert!(poll_immediate(joint.run()).await.is_none());
        assert_eq!(joint.client.writer(), b"heard");
        assert_eq!(joint.written(), ((TURN * SCRATCH) as u64, 5));
        // It comes again by itself.
        joint.run().await.unwrap();
        assert_eq!(joint.written(), ((50 * SCRATCH) as u64, 5));
    }

    #[tokio::test]
    async fn what_is_held_is_less_than_what_was_read_and_has_no_room_later() {
        let ((mut client, near), (mut upstream, far)) = (duplex(1000), duplex(300));
        let mut joint = joint(near, far);
        client.write_all(&[7; 1000]).await.unwrap();
        assert!(poll_immediate(joint.run()).await.is_none());
        assert_eq!((joint.up.0.held.len(), joint.written()), (700, (300, 0)));
        let mut heard = vec![0; 1000];
        let reading = async { upstream.read_exact(&mut heard).await.unwrap() };
        tokio::select! {
            _ = reading => {}
            ended = joint.run() => panic!("{ended:?}"),
        }
        assert!(poll_immediate(joint.run()).await.is_none());
        assert_eq!((joint.up.0.held.len(), joint.written()), (0, (1000, 0)));
    }
}
