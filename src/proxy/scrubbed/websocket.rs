//! The upstream of a WebSocket as its client hears it: scrubbed, over the frames of a message, which stay as they are.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::frames::Frames;
use crate::scrub::{Scrubber, Scrubbing};

/// Reading scrubs; writing is untouched. Reading fails for frames whose payload cannot be looked into, which no
/// upstream may send to whom it has not agreed on that with (RFC 6455 sections 5.1 and 5.2).
///
/// Each message is a text of its own, whether of characters or binary, and so is the payload of each control frame.
/// What is behind the held end of a message waits for that: a frame that is not its last, and control frames.
pub(in crate::proxy) struct Scrubbed<S> {
    stream: S,
    buffer: Vec<u8>,
    frames: Frames,
    scrubber: Arc<Scrubber>,
    message: Scrubbing,
    /// The payload of the control frame that is passing.
    control: Vec<u8>,
    /// What has come, in its order; the payloads of messages are only counted here.
    queue: VecDeque<Piece>,
    /// How much of the queue is not only counted.
    behind: usize,
    /// Payloads of messages that may go on.
    payload: BytesMut,
    /// Goes on next.
    ready: BytesMut,
    has_ended: bool,
}

enum Piece {
    /// Heads, and control frames.
    Known(BytesMut),
    /// So much of the payload of a message.
    Payload(usize),
}

/// Read at a time: as much as a record of TLS holds.
const BUFFER: usize = 16 * 1024;

/// Most that may wait behind the held end of a message: five hundred pings of the longest, many hours of them in
/// the middle of a message that stands still.
const MOST_BEHIND: usize = 64 * 1024;

impl<S> Scrubbed<S> {
    pub(in crate::proxy) fn new(stream: S, scrubber: Arc<Scrubber>) -> Self {
        Self {
            stream,
            buffer: vec![0; BUFFER],
            frames: Frames::default(),
            message: Scrubbing::new(scrubber.clone()),
            scrubber,
            control: Vec::new(),
            queue: VecDeque::new(),
            behind: 0,
            payload: BytesMut::new(),
            ready: BytesMut::new(),
            has_ended: false,
        }
    }

    /// Takes what was read; nothing is the end.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            self.end();
        }
        while !bytes.is_empty() {
            let is_payload = self.frames.is_in_payload();
            let (part, rest) = bytes.split_at(self.frames.step(bytes));
            if !self.frames.is_plain() {
                let why = "the payload of a frame cannot be looked into";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            match (is_payload, self.frames.is_control()) {
                (false, _) => self.push(part),
                (true, true) => self.control.extend_from_slice(part),
                (true, false) => {
                    self.queue.push_back(Piece::Payload(part.len()));
                    let passes = self.message.pass(Bytes::copy_from_slice(part));
                    self.payload.extend_from_slice(&passes);
                }
            }
            if self.frames.is_at_boundary() {
                self.end_frame();
            }
            self.settle();
            bytes = rest;
        }
        if self.behind > MOST_BEHIND {
            return Err(io::Error::other("too much waits for the rest of a message"));
        }
        Ok(())
    }

    fn push(&mut self, bytes: &[u8]) {
        self.behind += bytes.len();
        match self.queue.back_mut() {
            Some(Piece::Known(last)) => last.extend_from_slice(bytes),
            _ => self.queue.push_back(Piece::Known(bytes.into())),
        }
    }

    fn end_frame(&mut self) {
        if self.frames.is_control() {
            self.end_control();
        } else if self.frames.is_final() {
            self.payload.extend_from_slice(&self.message.end());
        }
    }

    fn end_control(&mut self) {
        let control = std::mem::take(&mut self.control);
        self.push(&self.scrubber.clean(&control).unwrap_or(control));
    }

    /// There is no more: nothing is held any longer.
    fn end(&mut self) {
        self.has_ended = true;
        self.payload.extend_from_slice(&self.message.end());
        self.end_control();
        self.settle();
    }

    /// Moves on what may go on.
    fn settle(&mut self) {
        while let Some(first) = self.queue.front_mut() {
            match first {
                Piece::Known(bytes) => {
                    self.behind -= bytes.len();
                    self.ready.extend_from_slice(bytes);
                }
                Piece::Payload(left) => {
                    let passes = self.payload.split_to(self.payload.len().min(*left));
                    *left -= passes.len();
                    self.ready.unsplit(passes);
                    if *left > 0 {
                        return;
                    }
                }
            }
            self.queue.pop_front();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Scrubbed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready.is_empty() && !this.has_ended {
            let mut buffer = std::mem::take(&mut this.buffer);
            let mut read = ReadBuf::new(&mut buffer);
            let outcome = Pin::new(&mut this.stream).poll_read(cx, &mut read);
            let taken = match (&outcome, read.filled()) {
                (Poll::Ready(Ok(())), bytes) => this.take(bytes),
                _ => Ok(()),
            };
            this.buffer = buffer;
            ready!(outcome)?;
            taken?;
        }
        let len = this.ready.len().min(buf.remaining());
        buf.put_slice(&this.ready[..len]);
        this.ready.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Scrubbed<S> {
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
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::secret::Secret;

    const SECRET: &str = "vk-canary-of-a-websocket";

    fn scrubber() -> Arc<Scrubber> {
        Arc::new(Scrubber::new(&Secret::new(SECRET)).unwrap())
    }

    fn frame(head: u8, payload: &str) -> Vec<u8> {
        let payload = payload.as_bytes();
        match payload.len() {
            len @ 0..126 => [&[head, u8::try_from(len).unwrap()], payload].concat(),
            len => {
                let len = u16::try_from(len).unwrap().to_be_bytes();
                [&[head, 126], &len[..], payload].concat()
            }
        }
    }

    /// What is heard of an upstream that says this in pieces and ends.
    async fn heard(
        scrubber: &Arc<Scrubber>,
        (first, second): (&[u8], &[u8]),
    ) -> io::Result<Vec<u8>> {
        let mut heard = Vec::new();
        let stream = AsyncReadExt::chain(first, second);
        Scrubbed::new(stream, scrubber.clone()).read_to_end(&mut heard).await?;
        Ok(heard)
    }

    #[tokio::test]
    async fn frames_stay_what_they_are_wherever_reading_stops() {
        let scrubber = scrubber();
        let long = "x".repeat(130);
        let filler = "*".repeat(SECRET.len());
        for cut in 0..=SECRET.len() {
            let (first, second) = SECRET.split_at(cut);
            let filled = filler.split_at(cut);
            let build = |(first, second): (&str, &str), whole: &str| {
                [
                    frame(0x81, &format!("{long}{whole}{long}")),
                    frame(0x01, &format!("a {first}")),
                    frame(0x89, &format!("ping {whole}")),
                    frame(0x00, ""),
                    frame(0x80, &format!("{second} b")),
                    frame(0x82, whole),
                    frame(0x8a, ""),
                    // Between two messages nothing is put together, but an end that is cut off is one.
                    frame(0x81, if whole == SECRET { &SECRET[..20] } else { &filler[..20] }),
                    frame(0x81, &SECRET[20..]),
                    frame(0x88, &format!("\u{3}\u{3}{whole}")),
                ]
                .concat()
            };
            let (said, expected) = (build((first, second), SECRET), build(filled, &filler));
            for at in 0..=said.len() {
                let (one, other) = said.split_at(at);
                assert_eq!(heard(&scrubber, (one, other)).await.unwrap(), expected, "{cut} {at}");
            }
        }
    }

    #[tokio::test]
    async fn a_message_waits_for_its_next_frame_only_with_what_may_begin_a_secret() {
        let (near, mut upstream) = tokio::io::duplex(4096);
        let mut near = Scrubbed::new(near, scrubber());
        let mut read = async |len: usize| {
            let mut read = vec![0; len];
            near.read_exact(&mut read).await.unwrap();
            read
        };
        let write = async |upstream: &mut tokio::io::DuplexStream, bytes: &[u8]| {
            tokio::io::AsyncWriteExt::write_all(upstream, bytes).await.unwrap();
        };
        let whole = frame(0x81, "{\"delta\": \"vk\"}");
        write(&mut upstream, &whole).await;
        assert_eq!(read(whole.len()).await, whole);
        let ends_in_it = frame(0x81, "it begins with vk-can");
        write(&mut upstream, &ends_in_it).await;
        assert_eq!(read(ends_in_it.len()).await, ends_in_it, "the message has ended");
        let goes_on = frame(0x01, "it begins with vk-can");
        write(&mut upstream, &goes_on).await;
        let free = goes_on.len() - "vk-can".len();
        assert_eq!(read(free).await, goes_on[..free]);
        let rest = frame(0x80, "not");
        write(&mut upstream, &rest).await;
        assert_eq!(read(6 + rest.len()).await, [b"vk-can", &rest[..]].concat());
    }

    #[tokio::test]
    async fn what_hides_its_payload_is_not_heard() {
        let scrubber = scrubber();
        let good = frame(0x81, "hello");
        // Each is whole, so that what comes next would be heard.
        let bad: [&[u8]; 6] = [
            b"\xc1\x05hello",
            b"\xa1\x05hello",
            b"\x91\x05hello",
            b"\x81\x85maskhello",
            b"\x83\x05hello",
            b"\x89\x7e\x00\x05hello\x09\x00",
        ];
        for bad in bad {
            let error = heard(&scrubber, (bad, &good)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
        assert_eq!(heard(&scrubber, (&good, &good)).await.unwrap(), good.repeat(2));
    }

    #[tokio::test]
    async fn what_waits_has_a_ceiling() {
        let scrubber = scrubber();
        let begun = frame(0x01, "vk-canary");
        let pings = |count: usize| frame(0x89, &"p".repeat(125)).repeat(count);
        let few = pings(MOST_BEHIND / 127 - 1);
        let heard_of_few = heard(&scrubber, (&begun, &few)).await.unwrap();
        assert_eq!(heard_of_few.len(), begun.len() + few.len());
        // Of one end that never comes the secret's part is filler, for it is long enough to be one.
        assert_eq!(heard_of_few[..begun.len()], frame(0x01, "*********"));
        assert!(heard(&scrubber, (&begun, &pings(MOST_BEHIND / 127 + 1))).await.is_err());
        let elsewhere = pings(MOST_BEHIND / 127 * 3);
        assert_eq!(heard(&scrubber, (&elsewhere, b"")).await.unwrap(), elsewhere, "nothing waits");
    }
}
