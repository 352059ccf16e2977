//! `Expect: 100-continue` end to end: the body waits at a gate for the upstream's word, so that the client
//! is asked for it only when the upstream wants it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::Request;
use http::header::{EXPECT, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Sleep;

use super::body::{Body, BodyError};

/// How long an upstream may leave a client in the dark before the body goes anyway (RFC 9110 section 10.1.1
/// wants a limit; curl's is the same).
const PATIENCE: Duration = Duration::from_secs(1);

/// Holds back the body of a request that expects a 100.
#[derive(Clone)]
pub(super) struct Gate(Arc<State>);

struct State {
    is: AtomicU8,
    waiting: AtomicWaker,
}

const SHUT: u8 = 0;
const OPEN: u8 = 1;
const REFUSED: u8 = 2;

impl Gate {
    /// Whether a request expects a 100 before its body.
    pub(super) fn is_wanted(request: &Request<Body>) -> bool {
        let expects = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
        request.headers().get(EXPECT).is_some_and(expects) && !request.body().is_end_stream()
    }

    /// Puts a gate before the body of a request, and among its extensions.
    pub(super) fn before(request: &mut Request<Body>) -> Self {
        let state = State { is: AtomicU8::new(SHUT), waiting: AtomicWaker::new() };
        let gate = Self(Arc::new(state));
        let body = std::mem::replace(request.body_mut(), Body::empty());
        let patience = Box::pin(tokio::time::sleep(PATIENCE));
        *request.body_mut() = Body::boxed(Gated { body, gate: gate.clone(), patience });
        request.extensions_mut().insert(gate.clone());
        gate
    }

    /// Lets the body go: the upstream asked for it.
    pub(super) fn open(&self) {
        self.turn(OPEN);
    }

    /// The response's body; when it has ended, or is dropped, a request body that has not been asked for
    /// never will be.
    pub(super) fn until_end_of(self, response: Body) -> Body {
        if response.is_end_stream() {
            self.turn(REFUSED);
            return response;
        }
        Body::boxed(Answer { body: response, gate: self })
    }

    fn turn(&self, to: u8) {
        if self.0.is.compare_exchange(SHUT, to, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.0.waiting.wake();
        }
    }
}

struct Answer {
    body: Body,
    gate: Gate,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.gate.turn(REFUSED);
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

struct Gated {
    body: Body,
    gate: Gate,
    patience: Pin<Box<Sleep>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the upstream answered without asking for the body")]
struct Unwanted;

impl HttpBody for Gated {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let state = &this.gate.0;
        if state.is.load(Ordering::Acquire) == SHUT {
            state.waiting.register(cx.waker());
            if this.patience.as_mut().poll(cx).is_ready() {
                this.gate.turn(OPEN);
            }
        }
        match state.is.load(Ordering::Acquire) {
            SHUT => Poll::Pending,
            OPEN => Pin::new(&mut this.body).poll_frame(cx),
            _ => Poll::Ready(Some(Err(Unwanted.into()))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
