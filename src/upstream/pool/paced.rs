//! A stream that gives others a turn after some bytes, so that what was read is taken before more comes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What may be read in one turn. h2 keeps interim responses of any number until the task that waits for
/// the response has had its turn, and flow control does not count them: with frames of 14 bytes this is
/// about a megabyte of them, and a pause every fifth of a millisecond at 2.5 Gbit/s.
const TURN: usize = 64 * 1024;

/// Pauses reading after each [`TURN`] that came without a pause. Writing is untouched.
pub(super) struct Paced<S> {
    stream: S,
    read: usize,
}

impl<S> Paced<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, read: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read >= TURN {
            this.read = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if polled.is_pending() {
            this.read = 0;
        }
        ready!(polled)?;
        this.read += buf.filled().len() - before;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
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
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn all_of_it_comes_with_a_pause_after_each_turn() {
        let all = vec![b'x'; 3 * TURN];
        let mut paced = Paced::new(&all[..]);
        let (mut read, mut pauses, mut piece) = (0, 0, vec![0; 1024]);
        loop {
            match paced.read(&mut piece).now_or_never() {
                Some(Ok(0)) => break,
                Some(len) => read += len.unwrap(),
                None => pauses += 1,
            }
        }
        assert_eq!((read, pauses), (all.len(), 3));
    }
}
