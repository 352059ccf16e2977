//! A peer's HTTP/2 stream that ends with ENHANCE_YOUR_CALM when it holds more questions than anything else, and that tells what comes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Counts the frames that carry nothing of a message, such as PING and SETTINGS, which h2 answers for ever. When there are more
/// than anybody needs, h2 is given a flood of the kind that it ends by itself: a head of more CONTINUATION frames than it
/// takes. So it says ENHANCE_YOUR_CALM to the peer, in the form and at the place that is right.
pub struct Calm<S> {
    stream: S,
    /// What of the current frame, or of the preface, is to come before the next head.
    left: usize,
    /// The head of the next frame, as far as it has come.
    head: Vec<u8>,
    /// What the frames have cost that carry nothing of a message, each its [`price`].
    spent: u64,
    /// Bytes both ways, but for those frames.
    moved: u64,
    since: Instant,
    /// Whether the current frame changes what the peer takes.
    is_news: bool,
    signs: Arc<Signs>,
    /// What is read in the place of what comes, and how much of it was.
    last_words: Option<(Vec<u8>, usize)>,
}

/// What comes from a peer.
#[derive(Debug, Default)]
pub struct Signs {
    life: AtomicBool,
    news: AtomicBool,
}

impl Signs {
    /// Whether anything has come since this was asked last.
    pub fn take_life(&self) -> bool {
        self.life.swap(false, Ordering::Relaxed)
    }

    /// Whether a frame has come since this was asked last that changes what the peer takes: SETTINGS or GOAWAY.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::Relaxed)
    }
}

impl<S> Calm<S> {
    /// The stream of a peer that begins with a preface: a client's.
    pub fn of_client(stream: S) -> Self {
        Self { left: PREFACE, ..Self::of_server(stream) }
    }

    /// The stream of a peer that begins with a frame: a server's.
    pub fn of_server(stream: S) -> Self {
        Self {
            stream,
            left: 0,
            head: Vec::with_capacity(HEAD),
            spent: 0,
            moved: 0,
            since: Instant::now(),
            is_news: false,
            signs: Arc::default(),
            last_words: None,
        }
    }

    /// The same, which says here what comes.
    #[must_use]
    pub fn telling(self, signs: Arc<Signs>) -> Self {
        Self { signs, ..self }
    }

    /// Looks through what has come, and gives how much of it h2 may see: all, or up to the end of the frame with which it
    /// is too much.
    fn look(&mut self, mut come: &[u8]) -> usize {
        let all = come.len();
        self.signs.life.store(true, Ordering::Relaxed);
        loop {
            let of_frame = self.left.min(come.len());
            self.left -= of_frame;
            come = &come[of_frame..];
            if self.left == 0 && std::mem::take(&mut self.is_news) {
                self.signs.news.store(true, Ordering::Relaxed);
            }
            if self.left == 0 && self.is_too_much() {
                self.last_words = Some((flood(), 0));
                return all - come.len();
            }
            if come.is_empty() {
                return all;
            }
            let of_head = (HEAD - self.head.len()).min(come.len());
            self.head.extend_from_slice(&come[..of_head]);
            come = &come[of_head..];
            if let [a, b, c, kind, ..] = self.head[..]
                && self.head.len() == HEAD
            {
                self.left = u32::from_be_bytes([0, a, b, c]) as usize;
                self.is_news = [SETTINGS, GOAWAY].contains(&kind);
                match price(kind) {
                    0 => self.moved += (HEAD + self.left) as u64,
                    price => self.spent += price,
                }
                self.head.clear();
            }
        }
    }

    fn is_too_much(&self) -> bool {
        let allowed = MOST_AT_ONCE + self.moved / BYTES_OF_A_QUESTION;
        let over = self.spent.saturating_sub(allowed * QUESTION);
        // The clock is not asked while it makes no difference.
        over > 0 && over > self.since.elapsed().as_secs() * MOST_IN_A_SECOND * QUESTION
    }
}

/// What a frame takes of what a peer may send that carries nothing of a message.
const fn price(kind: u8) -> u64 {
    match kind {
        DATA | HEADERS | CONTINUATION => 0,
        WINDOW_UPDATE => UPDATE,
        _ => QUESTION,
    }
}

/// A question, an answer that nobody has asked for, a stream given up, a kind that nobody knows.
const QUESTION: u64 = 16;

/// Two of them may answer each piece of content, of one byte even, by who gives the window of the stream and of the connection
/// back at once: its frame of ten bytes allows so much.
const UPDATE: u64 = 1;

/// What h2 ends a connection for, whatever stream it is on.
fn flood() -> Vec<u8> {
    let frame = |kind| [0, 0, 0, kind, 0, 0, 0, 0, 1];
    let all = std::iter::once(HEADERS).chain(std::iter::repeat_n(CONTINUATION, MORE_THAN_H2_TAKES));
    all.flat_map(frame).collect()
}

/// A frame's head (RFC 9113 section 4.1), and what a client sends first (section 3.4).
const HEAD: usize = 9;
const PREFACE: usize = 24;

/// Kinds of frames (RFC 9113 section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// h2 takes a quarter more than fill the longest head that it may have, each full (0.4.20, `codec/framed_read.rs`): 80 for
/// a MiB, which is the most that can be set.
const MORE_THAN_H2_TAKES: usize = 100;

/// Questions in a row that mean no harm, and in each second of a connection beside: keeping it alive takes one in ten
/// seconds.
const MOST_AT_ONCE: u64 = 1000;
const MOST_IN_A_SECOND: u64 = 10;

/// How many bytes allow one more, in whatever direction they go: clients that measure the way (gRPC) ask in each round trip
/// in which something has come, on loopback some thousand times a second.
const BYTES_OF_A_QUESTION: u64 = 64;

impl<S: AsyncRead + Unpin> AsyncRead for Calm<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.last_words.is_none() {
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let shown = before + this.look(&buf.filled()[before..]);
            buf.set_filled(shown);
            if shown > before || this.last_words.is_none() {
                return Poll::Ready(Ok(()));
            }
        }
        if let Some((words, read)) = &mut this.last_words {
            let len = buf.remaining().min(words.len() - *read);
            buf.put_slice(&words[*read..*read + len]);
            *read += len;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> Calm<S> {
    fn count(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(len)) = written {
            self.moved += len as u64;
        }
        written
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Calm<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.count(written)
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
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    const PING: u8 = 6;
    const ACK: u8 = 1;

    fn frame(kind: u8, flags: u8, len: u8) -> Vec<u8> {
        [&[0, 0, len, kind, flags, 0, 0, 0, 0][..], &vec![b'x'; usize::from(len)]].concat()
    }

    /// What is read of `sent` when it comes in such pieces.
    async fn read(sent: &[u8], piece: usize) -> Vec<u8> {
        let (mut read, mut calm) = (Vec::new(), Calm::of_server(sent));
        let mut buffer = vec![0; piece];
        loop {
            match calm.read(&mut buffer).await.unwrap() {
                0 => return read,
                len => read.extend_from_slice(&buffer[..len]),
            }
        }
    }

    #[tokio::test]
    async fn a_flood_ends_between_two_frames() {
        let allowed = frame(PING, 0, 8).repeat(usize::try_from(MOST_AT_ONCE).unwrap());
        let useful = frame(DATA, 0, 200).repeat(200);
        for piece in [1, 7, 9, 17, 64, 100_000] {
            assert_eq!(read(&allowed, piece).await, allowed, "{piece}");
            let sent = [&allowed[..], &frame(PING, 0, 8), &frame(PING, 0, 8)].concat();
            let expected = [&allowed[..], &frame(PING, 0, 8), &flood()].concat();
            assert!(read(&sent, piece).await == expected, "{piece}");
            let sent = [&useful[..], &allowed, &frame(SETTINGS, 0, 0)].concat();
            assert!(read(&sent, piece).await == sent, "{piece}: what is useful allows more");
        }
    }

    #[tokio::test]
    async fn whatever_carries_nothing_is_counted() {
        const RST_STREAM: u8 = 3;
        for (kind, flags, len) in
            [(SETTINGS, ACK, 0), (PING, ACK, 8), (RST_STREAM, 0, 4), (2, 0, 5), (99, 0, 3)]
        {
            let sent = frame(kind, flags, len).repeat(2 * usize::try_from(MOST_AT_ONCE).unwrap());
            assert!(read(&sent, 1000).await.ends_with(&flood()), "{kind}");
        }
        let (window, content) = (frame(WINDOW_UPDATE, 0, 4), frame(DATA, 0, 1));
        assert!(read(&window.repeat(20_000), 1000).await.ends_with(&flood()));
        let each = [&content[..], &window, &window].concat().repeat(20_000);
        assert!(read(&each, 1000).await == each, "they answer content");
    }

    #[tokio::test]
    async fn the_preface_is_no_frame() {
        let sent = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0)].concat();
        let mut calm = Calm::of_client(&sent[..]);
        let mut read = Vec::new();
        calm.read_to_end(&mut read).await.unwrap();
        assert_eq!((read, calm.spent, calm.moved), (sent, QUESTION, 0));
    }

    #[tokio::test]
    async fn news_are_told_when_all_of_the_frame_has_come() {
        for (kind, is_news) in
            [(0, false), (1, false), (SETTINGS, true), (PING, false), (GOAWAY, true)]
        {
            let sent = frame(kind, 0, 20);
            let signs = Arc::<Signs>::default();
            let mut calm = Calm::of_server(&sent[..]).telling(signs.clone());
            let mut all_but_one = vec![0; sent.len() - 1];
            calm.read_exact(&mut all_but_one).await.unwrap();
            assert!(!signs.take_news(), "{kind}");
            assert_eq!(calm.read(&mut [0]).await.unwrap(), 1);
            assert_eq!(signs.take_news(), is_news, "{kind}");
        }
        let signs = Arc::<Signs>::default();
        let sent = frame(SETTINGS, ACK, 0);
        let mut calm = Calm::of_server(&sent[..]).telling(signs.clone());
        calm.read_exact(&mut [0; HEAD]).await.unwrap();
        assert!(signs.take_news(), "one without a payload");
        assert!(signs.take_life() && !signs.take_life());
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_now_and_then_may_ask_for_ever() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let mut calm = Calm::of_server(ours);
        let pings = frame(PING, 0, 8).repeat(usize::try_from(MOST_IN_A_SECOND).unwrap());
        let mut buffer = vec![0; pings.len()];
        for _ in 0..1000 {
            tokio::io::AsyncWriteExt::write_all(&mut peer, &pings).await.unwrap();
            calm.read_exact(&mut buffer).await.unwrap();
            assert_eq!(buffer, pings);
            tokio::time::advance(std::time::Duration::from_secs(1)).await;
        }
        assert!(calm.last_words.is_none());
    }
}
