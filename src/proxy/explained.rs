//! Puts an explanation in the place of the bare answers that hyper gives to what it cannot parse.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::reject::Rejection;
use super::resting::Activity;

/// The statuses of hyper's own answers (hyper 1.12, `proto/h1/role.rs`, `on_error`).
const BARE: [StatusCode; 3] = [
    StatusCode::BAD_REQUEST,
    StatusCode::URI_TOO_LONG,
    StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
];

/// A client's stream on which an HTTP/1.1 server writes; one that adds no `Date` by itself, so that its own
/// answers have no other field than these two, which no answer of an upstream is like.
pub(super) struct Explained<S> {
    stream: S,
    /// Is told what is written here, and when that has left.
    activity: Arc<Activity>,
    /// What is written in the place of a bare answer, as far as it is not out yet.
    explanation: Option<Bytes>,
}

impl<S> Explained<S> {
    pub(super) fn new(stream: S, activity: Arc<Activity>) -> Self {
        Self { stream, activity, explanation: None }
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

/// The explanation for a bare answer; `None` for every other write.
fn explain(written: &[u8]) -> Option<Bytes> {
    let rest = written.strip_prefix(b"HTTP/1.1 ")?;
    let status = BARE.into_iter().find(|status| rest.starts_with(status.as_str().as_bytes()))?;
    let reason = status.canonical_reason()?;
    let bare =
        format!("{} {reason}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", status.as_str());
    (rest == bare.as_bytes()).then(|| Rejection::Malformed(status).to_http1())
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Explained<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.activity.writes();
        if this.explanation.is_none() {
            this.explanation = explain(buf);
        }
        let Some(explanation) = &mut this.explanation else {
            return Pin::new(&mut this.stream).poll_write(cx, buf);
        };
        while explanation.has_remaining() {
            let len = ready!(Pin::new(&mut this.stream).poll_write(cx, explanation))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            explanation.advance(len);
        }
        this.explanation = None;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        this.activity.has_flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = bufs.iter().filter(|buf| !buf.is_empty());
        // A bare answer is written alone, in one piece.
        match (filled.next(), filled.next()) {
            (Some(only), None) => self.poll_write(cx, only),
            _ => {
                self.activity.writes();
                Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Explained<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bare_answers_are_explained() {
        let bare = |status: &str| {
            format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        };
        let table = [
            (bare("400 Bad Request"), true),
            (bare("414 URI Too Long"), true),
            (bare("431 Request Header Fields Too Large"), true),
            (bare("404 Not Found"), false),
            (bare("400 Bad Request").replace("connection: close\r\n", ""), false),
            (bare("400 Bad Request").replace("\r\n\r\n", "\r\nserver: x\r\n\r\n"), false),
            (bare("400 Bad Request") + "more", false),
            (String::new(), false),
        ];
        for (written, explained) in table {
            let explanation = explain(written.as_bytes());
            assert_eq!(explanation.is_some(), explained, "{written}");
        }
    }

    /// If hyper changes its answers, this fails and the table above is to be mended.
    #[tokio::test]
    async fn hyper_still_answers_so() {
        use hyper::server::conn::http1;
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        for request in [
            "GET / HTTP/1.1\r\nA B: c\r\n\r\n".to_owned(),
            format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000)),
        ] {
            let (mut client, server) = tokio::io::duplex(1 << 20);
            let service = hyper::service::service_fn(|_| async {
                Ok::<_, std::convert::Infallible>(http::Response::new(
                    crate::upstream::body::Body::empty(),
                ))
            });
            let serving = http1::Builder::new().auto_date_header(false).serve_connection(
                hyper_util::rt::TokioIo::new(Explained::new(server, Arc::default())),
                service,
            );
            client.write_all(request.as_bytes()).await.unwrap();
            let _parse_error = serving.await;
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.contains("x-valetkey-error: bad_request"), "{answer}");
            assert!(answer.contains("hint"), "{answer}");
        }
    }
}
