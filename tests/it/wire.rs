//! HTTP/2 by hand, frame by frame, for peers that misbehave (RFC 9113 section 4.1).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// One frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const CANCEL: u32 = 8;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame in bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![len[1], len[2], len[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub(crate) fn reset(stream: u32, reason: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &reason.to_be_bytes())
}

pub(crate) fn go_away(last: u32, reason: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat())
}

/// The head of a 200 without fields, in HPACK (RFC 7541 appendix A).
pub(crate) const STATUS_200: &[u8] = &[0x88];

/// The head of a GET, in HPACK without compression.
pub(crate) fn get(host: &str, path: &str) -> Vec<u8> {
    let literal = |name: u8, value: &str| {
        [&[name, u8::try_from(value.len()).unwrap()][..], value.as_bytes()].concat()
    };
    [vec![0x82, 0x87], literal(0x01, host), literal(0x04, path)].concat()
}

/// A connection on which frames are written and read by hand.
pub(crate) struct Wire<S>(pub(crate) S);

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Begins as a client.
    pub(crate) async fn client(mut stream: S) -> io::Result<Self> {
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await?;
        Ok(Self(stream))
    }

    /// Begins as a server, whose SETTINGS have this payload.
    pub(crate) async fn server(mut stream: S, settings: &[u8]) -> io::Result<Self> {
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).await?;
        assert_eq!(preface, PREFACE);
        stream.write_all(&frame(SETTINGS, 0, 0, settings)).await?;
        Ok(Self(stream))
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await?;
        self.0.flush().await
    }

    /// The next frame; one that must be acknowledged is.
    pub(crate) async fn read(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; len];
        self.0.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let (kind, flags) = (head[3], head[4]);
        let answer = match kind {
            SETTINGS if flags & ACK == 0 => frame(SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => frame(PING, ACK, 0, &payload),
            _ => Vec::new(),
        };
        // Who has gone away may still have said why.
        let _gone = self.write(&answer).await;
        Ok(Frame { kind, flags, stream, payload })
    }

    /// Reads on to a frame of this kind.
    pub(crate) async fn read_to(&mut self, kind: u8) -> io::Result<Frame> {
        loop {
            let frame = self.read().await?;
            if frame.kind == kind {
                return Ok(frame);
            }
        }
    }

    /// Reads on to the end of a request; its stream.
    pub(crate) async fn read_request(&mut self) -> io::Result<u32> {
        loop {
            let frame = self.read().await?;
            if [HEADERS, DATA].contains(&frame.kind) && frame.flags & END_STREAM != 0 {
                return Ok(frame.stream);
            }
        }
    }

    /// Reads until the peer goes away, and gives the reason; `None` when it goes without a word.
    pub(crate) async fn reason_of_the_end(&mut self) -> Option<u32> {
        let mut reason = None;
        while let Ok(frame) = self.read().await {
            if frame.kind == GOAWAY {
                reason = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
        }
        reason
    }
}
