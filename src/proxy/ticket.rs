//! Sends a client the ticket of its TLS session along with what it is sent next.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Lies below the server's TLS. The last that a handshake writes is the session ticket (RFC 8446 section 4.6.1), which no
/// client waits for: sent alone it wakes the client once more for nothing, and is a system call on both sides. It is held until
/// the next record: SETTINGS, the first response, or the alert that closes the session. A connection that is cut before loses it,
/// and a client that opens a second one before its first response has none to resume with.
pub(super) struct HeldTicket<S> {
    stream: S,
    is_handshaking: bool,
    /// Whether the last write was taken whole, so that the next begins with a record.
    is_between_records: bool,
    held: Vec<u8>,
}

/// The outer type of an encrypted record (RFC 8446 section 5.2). Each write of a server's handshake begins with another one
/// (ServerHello, or in TLS 1.2 all of it), but for the ticket and an alert.
const APPLICATION_DATA: u8 = 23;

/// An encrypted alert: header, alert, type, tag (RFC 8446 sections 5.2 and 6). It ends the handshake, and is not held.
const ALERT: usize = 5 + 2 + 1 + 16;

impl<S> HeldTicket<S> {
    /// One for a handshake that has not begun.
    pub(super) fn new(stream: S) -> Self {
        Self { stream, is_handshaking: true, is_between_records: true, held: Vec::new() }
    }

    /// The handshake is over: what is held goes with what comes next.
    pub(super) fn handshake_is_over(&mut self) {
        self.is_handshaking = false;
    }

    /// The ticket, if that is what this is.
    fn ticket<'a>(&self, bufs: &'a [IoSlice<'_>]) -> Option<&'a [u8]> {
        // rustls gives each record by itself; an alert may follow the ticket at once.
        let [record] = bufs else { return None };
        let is_encrypted = record.first() == Some(&APPLICATION_DATA);
        let is_ticket = self.is_handshaking && self.is_between_records && is_encrypted;
        (is_ticket && record.len() > ALERT).then(|| &record[..])
    }
}

impl<S: AsyncWrite + Unpin> HeldTicket<S> {
    /// Writes what is held and these behind it; gives how much was written of these, which is something unless they are empty.
    fn poll_write_both(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        while !self.held.is_empty() {
            let both = [&[IoSlice::new(&self.held)][..], bufs].concat();
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &both))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_held = written.min(self.held.len());
            // Not drained, which would keep its room.
            self.held = self.held.split_off(of_held);
            if written > of_held {
                return Poll::Ready(Ok(written - of_held));
            }
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeldTicket<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeldTicket<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Some(ticket) = this.ticket(bufs) {
            this.held.extend_from_slice(ticket);
            return Poll::Ready(Ok(ticket.len()));
        }
        let written = ready!(this.poll_write_both(cx, bufs))?;
        this.is_between_records = written == bufs.iter().map(|buf| buf.len()).sum::<usize>();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    const TICKET: [u8; 25] = [APPLICATION_DATA; 25];
    const ALONE: [u8; 24] = [APPLICATION_DATA; 24];

    async fn read<const N: usize>(client: &mut DuplexStream) -> [u8; N] {
        let mut read = [0; N];
        timeout(Duration::from_secs(1), client.read_exact(&mut read)).await.unwrap().unwrap();
        read
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_goes_before_what_is_sent_next_however_little_is_taken() {
        // Wherever it is split, what is left begins as an encrypted record does.
        let mut flight = [APPLICATION_DATA; 300];
        flight[0] = 22;
        for room in [1, 7, TICKET.len(), TICKET.len() + 1, 1024] {
            let (mut client, stream) = duplex(room);
            let mut stream = HeldTicket::new(stream);
            let (written, first) =
                tokio::join!(stream.write_all(&flight), read::<300>(&mut client));
            written.unwrap();
            assert!(first == flight, "{room}");

            // Nobody reads, so it would not all go into a small one.
            stream.write_all(&TICKET).await.unwrap();
            stream.flush().await.unwrap();
            assert_eq!(stream.held, TICKET, "{room}");
            stream.handshake_is_over();
            let writing = async {
                stream.write_all(b"one").await.unwrap();
                assert_eq!(stream.held.capacity(), 0);
                stream.write_all(&TICKET).await.unwrap();
            };
            let (_, rest) = tokio::join!(writing, read::<53>(&mut client));
            assert_eq!(rest[..], [&TICKET[..], b"one", &TICKET].concat(), "{room}");
        }
    }

    /// It may come after the ticket or with it, as the client's last may come with something wrong.
    #[tokio::test(start_paused = true)]
    async fn an_alert_that_ends_the_handshake_is_not_held() {
        let (mut client, stream) = duplex(1024);
        let mut stream = HeldTicket::new(stream);
        stream.write_all(&ALONE).await.unwrap();
        assert_eq!(read(&mut client).await, ALONE);
        let both = [IoSlice::new(&TICKET), IoSlice::new(&ALONE)];
        assert_eq!(stream.write_vectored(&both).await.unwrap(), 49);
        assert_eq!(read(&mut client).await, [APPLICATION_DATA; 49]);
        stream.write_all(&TICKET).await.unwrap();
        stream.write_all(&ALONE).await.unwrap();
        assert_eq!(read(&mut client).await, [APPLICATION_DATA; 49]);
    }
}
