//! Keeps a copy of a request's body beside its stream, so that a request refused with 401, or not processed
//! at all, can be sent once more. The copy never delays the stream, and is given up rather than let grow.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use crate::upstream::body::{Body, BodyError, Inbound};

/// Largest copy of the body of a request that may be sent again after a 401.
pub(super) const MOST_SIGNED: usize = 1 << 20;

/// Largest copy of any other, which is sent again only when HTTP/2 says that it was not processed: these share
/// the sum with the ones above and must leave room for them.
pub(super) const MOST_OTHER: usize = 64 << 10;

/// Largest sum of all copies.
const MOST_IN_ALL: usize = 64 << 20;

/// What all copies together may still take.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Budget {
    fn take(&self, len: usize) -> bool {
        let fits = |used: usize| used.checked_add(len).filter(|sum| *sum <= MOST_IN_ALL);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give_back(&self, len: usize) {
        self.0.fetch_sub(len, Ordering::Relaxed);
    }
}

/// The body as it is sent the first time, and the means to send it again while its copy has at most so many
/// bytes.
pub(super) fn keep(body: Inbound, budget: &Budget, most: usize) -> (Body, Replay) {
    if body.is_end_stream() {
        return (Body::empty(), Replay(None));
    }
    let size = body.size_hint();
    let copy =
        BodyCopy { frames: Vec::new(), len: 0, most, budget: budget.clone(), is_given_up: false };
    let state = State { rest: Some(body), copy: Some(copy), turn: 0, sent: 0 };
    let shared = Arc::new(Mutex::new(state));
    let first = Sending { shared: shared.clone(), turn: 0, size };
    let replay = Replay(Some(shared));
    (replay.repeatable(first), replay)
}

/// Whether and how a body can be sent again; `None` for one that is empty.
#[derive(Clone)]
pub(super) struct Replay(Option<Arc<Mutex<State>>>);

impl Replay {
    /// Gives the copy up: the sending that is under way goes on alone.
    pub(super) fn give_up(self) {
        if let Some(shared) = &self.0 {
            let mut state = lock(shared);
            if let Some(copy) = &mut state.copy {
                copy.is_given_up = true;
            }
            state.let_go();
        }
    }

    /// The body from its beginning, when the copy is whole as far as it was read. What had not been
    /// read yet follows from the client; the first sending ends.
    pub(super) fn again(&self) -> Option<Body> {
        let Some(shared) = &self.0 else { return Some(Body::empty()) };
        let mut state = lock(shared);
        state.copy.as_ref().filter(|copy| !copy.is_given_up)?;
        (state.turn, state.sent) = (state.turn + 1, 0);
        let turn = state.turn;
        drop(state);
        let shared = shared.clone();
        Some(self.repeatable(Sending { shared, turn, size: SizeHint::default() }))
    }

    fn repeatable(&self, sending: Sending) -> Body {
        let replay = self.clone();
        Body::repeatable(sending, move || replay.again())
    }
}

struct State {
    /// What the client has not sent yet; `None` after its end.
    rest: Option<Inbound>,
    copy: Option<BodyCopy>,
    /// Which sending may read on.
    turn: usize,
    /// How many frames of the copy that sending has passed on.
    sent: usize,
}

impl State {
    /// Drops a copy that was given up, but not before what is under way has passed all of it: a second
    /// sending has its beginning from nowhere else.
    fn let_go(&mut self) {
        if self.copy.as_ref().is_some_and(|copy| copy.is_given_up && self.sent >= copy.frames.len())
        {
            self.copy = None;
        }
    }
}

struct BodyCopy {
    frames: Vec<Frame<Bytes>>,
    len: usize,
    most: usize,
    budget: Budget,
    /// Whether it may not be sent once more.
    is_given_up: bool,
}

impl BodyCopy {
    /// Keeps one more frame; `false` when that is too much.
    fn push(&mut self, frame: &Frame<Bytes>) -> bool {
        let Some(copied) = duplicate(frame) else { return true };
        let len = copied.data_ref().map_or(0, Bytes::len);
        if self.len + len > self.most || !self.budget.take(len) {
            return false;
        }
        self.len += len;
        self.frames.push(copied);
        true
    }
}

impl Drop for BodyCopy {
    fn drop(&mut self) {
        self.budget.give_back(self.len);
    }
}

fn duplicate(frame: &Frame<Bytes>) -> Option<Frame<Bytes>> {
    let data = frame.data_ref().map(|data| Frame::data(data.clone()));
    data.or_else(|| frame.trailers_ref().map(|trailers| Frame::trailers(trailers.clone())))
}

struct Sending {
    shared: Arc<Mutex<State>>,
    turn: usize,
    size: SizeHint,
}

#[derive(Debug, thiserror::Error)]
#[error("the body is being sent again elsewhere")]
struct Superseded;

impl HttpBody for Sending {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let mut state = lock(&this.shared);
        let state = &mut *state;
        if state.turn != this.turn {
            return Poll::Ready(Some(Err(Superseded.into())));
        }
        if let Some(frame) = state.copy.as_ref().and_then(|copy| copy.frames.get(state.sent)) {
            let frame = duplicate(frame);
            state.sent += 1;
            state.let_go();
            return Poll::Ready(frame.map(Ok));
        }
        let Some(rest) = &mut state.rest else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(rest).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if state.copy.as_mut().is_some_and(|copy| !copy.push(frame)) {
                    state.copy = None;
                }
                state.sent = state.copy.as_ref().map_or(0, |copy| copy.frames.len());
            }
            Some(Err(_)) => state.copy = None,
            None => state.rest = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.shared);
        let copied = state.copy.as_ref().map_or(0, |copy| copy.frames.len());
        let rest_ended = state.rest.as_ref().is_none_or(HttpBody::is_end_stream);
        state.turn == self.turn && rest_ended && state.sent >= copied
    }

    fn size_hint(&self) -> SizeHint {
        self.size
    }
}

/// Held for a few steps that cannot panic.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
