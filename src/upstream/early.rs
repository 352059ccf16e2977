//! A stream with bytes that were read already and must be read again, and that may read more than it is asked for.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Gives back what was read already first, then reads on from the stream. Writing is untouched.
pub struct Early<S> {
    stream: S,
    /// What was read and is not given back yet, from `given` on. It takes no memory when there is nothing.
    held: Vec<u8>,
    given: usize,
    reads_ahead: bool,
}

/// Read at once where somebody asks for less: a full record of TLS (RFC 8446 section 5.2). rustls asks for 4 KiB at a time,
/// five system calls for such a record; reading more than this gains nothing more (benches/README.md).
const AHEAD: usize = 5 + 16 * 1024 + 256;

thread_local! {
    /// Where a thread reads ahead, so that no connection keeps room for it.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl<S> Early<S> {
    /// A stream that starts with `early`, which may be empty.
    pub fn new(early: impl Into<Vec<u8>>, stream: S) -> Self {
        let mut new = Self { stream, held: Vec::new(), given: 0, reads_ahead: false };
        new.put_back(early);
        new
    }

    /// The same, which takes from the stream what there is, a full record of TLS at most, where it is asked for less.
    /// For a reader that comes for all of it in the end.
    #[must_use]
    pub fn reading_ahead(self) -> Self {
        Self { reads_ahead: true, ..self }
    }

    /// Has these bytes read next, before all others.
    pub fn put_back(&mut self, bytes: impl Into<Vec<u8>>) {
        let mut bytes = bytes.into();
        bytes.extend_from_slice(&self.held[self.given..]);
        if bytes.is_empty() {
            // It may have the room of a whole buffer.
            bytes = Vec::new();
        }
        (self.held, self.given) = (bytes, 0);
    }

    /// The stream, once it is read from itself.
    pub fn with_nothing_early(&self) -> Option<&S> {
        self.held.is_empty().then_some(&self.stream)
    }

    /// Gives as much of what is held as there is room for.
    fn give(&mut self, buf: &mut ReadBuf<'_>) {
        let held = &self.held[self.given..];
        let len = held.len().min(buf.remaining());
        buf.put_slice(&held[..len]);
        self.given += len;
        if self.given == self.held.len() {
            (self.held, self.given) = (Vec::new(), 0);
        }
    }
}

impl<S: AsyncRead + Unpin> Early<S> {
    /// Waits for the next byte, which is held with what came along, and read later; `None` at the end. May be given up at
    /// any time, and nothing is lost.
    ///
    /// # Errors
    ///
    /// Those of the stream.
    pub async fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.held.is_empty() {
            poll_fn(|cx| self.read_ahead(cx, &mut ReadBuf::new(&mut []))).await?;
        }
        Ok(self.held.get(self.given).copied())
    }

    fn read_ahead(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Taken out meanwhile, because the stream may be TLS that reads ahead itself.
        let mut scratch = SCRATCH.take();
        scratch.resize(AHEAD, 0);
        let mut read = ReadBuf::new(&mut scratch);
        let polled = Pin::new(&mut self.stream).poll_read(cx, &mut read);
        let (now, later) = read.filled().split_at(read.filled().len().min(buf.remaining()));
        buf.put_slice(now);
        if !later.is_empty() {
            self.held = later.to_vec();
        }
        SCRATCH.set(scratch);
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Early<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.held.is_empty() {
            this.give(buf);
            return Poll::Ready(Ok(()));
        }
        if this.reads_ahead && (1..AHEAD).contains(&buf.remaining()) {
            return this.read_ahead(cx, buf);
        }
        Pin::new(&mut this.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Early<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncReadExt as _;

    use super::*;

    struct Counted<'a, S> {
        stream: S,
        asked: &'a AtomicUsize,
    }

    impl<S: AsyncRead + Unpin> AsyncRead for Counted<'_, S> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.stream).poll_read(cx, buf)
        }
    }

    #[tokio::test]
    async fn early_bytes_come_first_and_once() {
        for reads_ahead in [false, true] {
            let mut stream = Early::new(*b"early ", &b"and late"[..]);
            stream.reads_ahead = reads_ahead;
            let mut all = String::new();
            stream.read_to_string(&mut all).await.unwrap();
            assert_eq!(all, "early and late");
        }
    }

    #[tokio::test]
    async fn all_of_it_comes_in_order_however_little_is_asked_for() {
        let sent: Vec<u8> = (0..5 * AHEAD).map(|at| at as u8).collect();
        // One that reads ahead may lie on another that does.
        for piece in [1, 7, 4096, AHEAD - 1, AHEAD, 3 * AHEAD] {
            let below = Early::new([], &sent[..]).reading_ahead();
            let mut stream = Early::new([], below).reading_ahead();
            let (mut read, mut buffer) = (Vec::new(), vec![0; piece]);
            loop {
                match stream.read(&mut buffer).await.unwrap() {
                    0 => break,
                    len => read.extend_from_slice(&buffer[..len]),
                }
            }
            assert!(read == sent, "{piece}");
            assert_eq!(stream.held.capacity(), 0, "{piece}: nothing is kept");
        }
    }

    #[tokio::test]
    async fn a_stream_is_asked_once_for_a_record() {
        let sent = vec![0; AHEAD];
        let asked = AtomicUsize::new(0);
        let counted = Counted { stream: &sent[..], asked: &asked };
        let mut stream = Early::new([], counted).reading_ahead();
        let mut buffer = [0; 4096];
        for _ in 0..4 {
            stream.read_exact(&mut buffer).await.unwrap();
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
