//! One request on an HTTP/2 connection: its head and its body out, its response in.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures_util::future::{AbortHandle, Abortable};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{Method, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};

use crate::headers::strip_trailers;
use crate::upstream::body::{Body, BodyError, BrokenOff};
use crate::upstream::interim::{MostInterim, Unanswered};
use crate::upstream::pool::http2::Place;

/// Sends a request, its body in a task of its own where it does not leave at once, and waits for the head of the response.
///
/// # Errors
///
/// [`Unanswered`].
pub(super) async fn send(
    mut sender: SendRequest<Bytes>,
    request: Request<Body>,
    (most_interim, place): (MostInterim, &Arc<Place>),
) -> Result<Response<Received>, Unanswered> {
    // Of a connection that takes no stream any more nothing has left, whatever it has ended with.
    if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
        return Err(Unanswered { unsent: Some(request), unprocessed: true, error: error.into() });
    }
    let (mut parts, body) = request.into_parts();
    let length = body.size_hint().exact();
    if let Some(length) = length.filter(|length| *length > 0 || has_a_body(&parts.method)) {
        parts.headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
    let is_whole = body.is_end_stream();
    let (answer, stream) = sender
        .send_request(Request::from_parts(parts, ()), is_whole)
        .map_err(|error| Unanswered { unprocessed: true, ..unanswered(error) })?;
    let sending = if is_whole { Sending::default() } else { leave(stream, body, place).await };
    let response = receive(answer, most_interim).await?;
    let length = response.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    Ok(response.map(|stream| Received { stream, length, has_data: true, sending }))
}

/// Methods whose requests say that they have no content (RFC 9110 section 8.6).
fn has_a_body(method: &Method) -> bool {
    matches!(*method, Method::POST | Method::PUT | Method::PATCH)
}

/// Waits for the response that is not an interim one.
async fn receive(
    mut answer: ResponseFuture,
    MostInterim(most): MostInterim,
) -> Result<Response<RecvStream>, Unanswered> {
    let mut seen = 0;
    let polled = poll_fn(|cx| {
        while let Poll::Ready(Some(interim)) = answer.poll_informational(cx) {
            interim.map_err(unanswered)?;
            seen += 1;
            if seen > most {
                return Poll::Ready(Err(Unanswered::too_many(MostInterim(most))));
            }
        }
        Pin::new(&mut answer).poll(cx).map_err(unanswered)
    });
    polled.await
}

fn unanswered(error: h2::Error) -> Unanswered {
    Unanswered { unsent: None, unprocessed: is_unprocessed(&error), error: error.into() }
}

/// Whether an error proves that the upstream has not processed the request (RFC 9113 section 8.7): its
/// stream is above the last one of a graceful GOAWAY, or was reset with REFUSED_STREAM.
///
/// h2 gives the error of a GOAWAY of the peer's to those streams alone (0.4.20, `proto/streams/
/// streams.rs`, `recv_go_away`); the others go on, and end with an error of another kind.
fn is_unprocessed(error: &h2::Error) -> bool {
    let graceful = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    error.is_remote() && (graceful || refused)
}

/// A request's body on its way in a task, which ends when this is dropped.
#[derive(Default)]
struct Sending(Option<AbortHandle>);

impl Sending {
    /// Lets the body go on to its end.
    fn let_go(&mut self) {
        self.0 = None;
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Sends as much of a body as leaves at once, and the rest in a task.
async fn leave(stream: SendStream<Bytes>, body: Body, place: &Arc<Place>) -> Sending {
    let mut leaving = Leaving { stream, body, held: None };
    if let Poll::Ready(outcome) = poll_fn(|cx| Poll::Ready(leaving.poll(cx))).await {
        leaving.end(outcome);
        return Sending::default();
    }
    let (task, registration) = AbortHandle::new_pair();
    let sending = async move {
        let outcome = poll_fn(|cx| leaving.poll(cx)).await;
        leaving.end(outcome);
    };
    place.spawn(async move {
        let _ended_or_not_wanted = Abortable::new(sending, registration).await;
    });
    Sending(Some(task))
}

/// A body, and the stream that it goes to.
struct Leaving {
    stream: SendStream<Bytes>,
    body: Body,
    /// What waits for the peer's window, and whether it is the last.
    held: Option<(Bytes, bool)>,
}

impl Leaving {
    fn end(&mut self, outcome: Result<(), BodyError>) {
        if let Err(error) = outcome {
            tracing::debug!(%error, "a request's body did not leave");
            self.stream.send_reset(Reason::CANCEL);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            // A peer may have its answer ready, and want no more.
            if let Poll::Ready(reason) = self.stream.poll_reset(cx)? {
                return Poll::Ready(match reason {
                    Reason::NO_ERROR => Ok(()),
                    reason => Err(h2::Error::from(reason).into()),
                });
            }
            if self.held.is_some() {
                ready!(self.poll_room(cx))?;
                if let Some((data, is_last)) = self.held.take() {
                    self.stream.send_data(data, is_last)?;
                    if is_last {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(frame) => frame?,
                None => return Poll::Ready(Ok(self.stream.send_data(Bytes::new(), true)?)),
            };
            match frame.into_data() {
                Ok(data) if data.has_remaining() => {
                    // One byte asks for room, and takes none of the window from others before there is something to send.
                    self.stream.reserve_capacity(1);
                    self.held = Some((data, self.body.is_end_stream()));
                }
                Ok(_) => {}
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        self.stream.reserve_capacity(0);
                        return Poll::Ready(Ok(self.stream.send_trailers(trailers)?));
                    }
                }
            }
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.stream.capacity() == 0 {
            if ready!(self.stream.poll_capacity(cx)).transpose()?.is_none() {
                return Poll::Ready(Err("the stream takes no more".into()));
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The body of a response. It ends only where the peer has said so, and has no trailers that frame.
pub(in crate::upstream) struct Received {
    stream: RecvStream,
    /// As the head says it.
    length: Option<u64>,
    has_data: bool,
    /// Goes on when the response has ended, and not when that is given up before.
    sending: Sending,
}

impl Received {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if self.has_data {
            if let Some(data) = ready!(self.stream.poll_data(cx)) {
                let data = data?;
                // What is passed on here has left the connection's window.
                self.stream.flow_control().release_capacity(data.len())?;
                self.length = self.length.map(|left| left.saturating_sub(data.len() as u64));
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            self.has_data = false;
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|mut trailers| {
            strip_trailers(&mut trailers);
            Ok(Frame::trailers(trailers))
        }))
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        // Also of a response without a body, which nobody reads.
        if self.stream.is_end_stream() {
            self.sending.let_go();
        }
    }
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let next = ready!(this.poll_next(cx));
        Poll::Ready(next.map(|frame| {
            // A stream may be reset with NO_ERROR behind its end, and that is all that some take it for (RFC 9113 section 8.1).
            frame.map_err(|error| match error.reason() {
                Some(Reason::NO_ERROR) => BrokenOff.into(),
                _ => error.into(),
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
