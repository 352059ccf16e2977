//! Carries bytes both ways and looks at none.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::note::{self, Note};

/// Read at a time, for each direction. Larger ones save system calls on bulk (measured: 8 KiB costs
/// 0.82 s of CPU per GB, 64 KiB 0.57 s); untouched pages cost no memory.
const BUFFER: usize = 64 * 1024;

/// How long one direction may go on after the other has ended, if nothing moves: some peers half-close
/// and still read, others never close at all.
const LINGER: Duration = Duration::from_secs(30);

/// Joins two streams until both directions have ended, the client is not let in any more, or the proxy is cut.
pub(super) async fn carry<A, B>(
    shared: &Shared,
    (ended, note): (&CancellationToken, Note),
    client: A,
    upstream: B,
) where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (from_client, to_client) = tokio::io::split(client);
    let (from_upstream, to_upstream) = tokio::io::split(upstream);
    let moved = AtomicU64::new(0);
    let mut up = Flow::new(from_client, to_upstream, &moved);
    let mut down = Flow::new(from_upstream, to_client, &moved);
    let outcome = tokio::select! {
        outcome = both(up.run(|_| {}), down.run(|_| {}), &moved) => match outcome {
            Ok(()) => note::OK,
            Err(error) => {
                tracing::debug!(%error, "tunnel ended");
                note::BROKEN_OFF
            }
        },
        () = ended.cancelled() => {
            tracing::debug!("the pass of a tunnel counts no more");
            note::SHUT_OUT
        }
        () = shared.closing.cut.cancelled() => note::CUT,
    };
    note.ended(outcome, (up.written(), down.written()));
}

/// Runs two directions until both have ended, one has failed, or one has ended and the other stands
/// still. `moved` is what they count in.
pub(super) async fn both(
    up: impl Future<Output = io::Result<()>>,
    down: impl Future<Output = io::Result<()>>,
    moved: &AtomicU64,
) -> io::Result<()> {
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    let first = tokio::select! {
        up = up.as_mut() => (up, true),
        down = down.as_mut() => (down, false),
    };
    match first {
        (Err(error), _) => Err(error),
        (Ok(()), true) => linger(down, moved).await,
        (Ok(()), false) => linger(up, moved).await,
    }
}

/// Waits for the other direction as long as it moves.
async fn linger(
    mut running: Pin<&mut impl Future<Output = io::Result<()>>>,
    moved: &AtomicU64,
) -> io::Result<()> {
    loop {
        let before = moved.load(Ordering::Relaxed);
        match tokio::time::timeout(LINGER, running.as_mut()).await {
            Ok(outcome) => return outcome,
            Err(_still) if moved.load(Ordering::Relaxed) != before => {}
            Err(_idle) => return Ok(()),
        }
    }
}

/// One direction. Every future of it may be dropped half-way and no byte is lost or sent twice, so that
/// a direction can be stopped and then finished in another way.
pub(super) struct Flow<'a, R, W> {
    pub(super) from: R,
    pub(super) to: W,
    buffer: Vec<u8>,
    /// What was read and is not written yet, in `buffer`.
    held: Range<usize>,
    has_ended: bool,
    /// What was written, in bytes.
    written: u64,
    /// Counts what was written in both directions.
    moved: &'a AtomicU64,
}

impl<'a, R, W> Flow<'a, R, W>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    pub(super) fn new(from: R, to: W, moved: &'a AtomicU64) -> Self {
        Self { from, to, buffer: vec![0; BUFFER], held: 0..0, has_ended: false, written: 0, moved }
    }

    /// Copies to the end of `from`, then passes the end on. `look` is shown what was read.
    pub(super) async fn run(&mut self, mut look: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            self.deliver().await?;
            if self.has_ended {
                return self.to.shutdown().await;
            }
            look(self.take(BUFFER).await?);
        }
    }

    /// Reads once, at most so many bytes, which must be some; what it reads is to be delivered before
    /// the next. Nothing is read at the end.
    pub(super) async fn take(&mut self, most: usize) -> io::Result<&[u8]> {
        let most = most.min(self.buffer.len());
        let len = self.from.read(&mut self.buffer[..most]).await?;
        self.has_ended = len == 0;
        self.held = 0..len;
        Ok(&self.buffer[..len])
    }

    /// Writes what was read. It is flushed, because TLS may hold the last of it back until then.
    pub(super) async fn deliver(&mut self) -> io::Result<()> {
        while !self.held.is_empty() {
            let len = self.to.write(&self.buffer[self.held.clone()]).await?;
            if len == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.held.start += len;
            self.written += len as u64;
            self.moved.fetch_add(len as u64, Ordering::Relaxed);
        }
        self.to.flush().await
    }

    /// How many bytes were written.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Whether `from` has come to its end.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }
}
