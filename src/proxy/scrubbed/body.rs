//! The body of an answer as its client gets it: scrubbed while it streams.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::clean;
use crate::scrub::{Scrubber, Scrubbing};
use crate::upstream::body::{Body, BodyError};

/// As long as the body that it is made of; what is held back of that is a few bytes, and comes with the next ones or
/// at the end. One that breaks off breaks off here too, without what was held.
pub(super) struct Scrubbed {
    inner: Body,
    scrubber: Arc<Scrubber>,
    scrubbing: Scrubbing,
    /// Wait until what was held has gone.
    trailers: Option<HeaderMap>,
    has_ended: bool,
}

impl Scrubbed {
    pub(super) fn new(inner: Body, scrubber: Arc<Scrubber>) -> Self {
        let scrubbing = Scrubbing::new(scrubber.clone());
        Self { inner, scrubber, scrubbing, trailers: None, has_ended: false }
    }

    /// What goes on because of a frame; nothing where the next one is waited for.
    fn pass(&mut self, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        let mut trailers = match frame.into_data() {
            Ok(data) => {
                let passes = self.scrubbing.pass(data);
                return Some(passes).filter(|data| !data.is_empty()).map(Frame::data);
            }
            Err(frame) => frame.into_trailers().ok()?,
        };
        clean(&mut trailers, &self.scrubber);
        self.trailers = Some(trailers);
        self.end()
    }

    /// What is left at the end: what was held, then the trailers.
    fn end(&mut self) -> Option<Frame<Bytes>> {
        self.has_ended = true;
        let held = Some(self.scrubbing.end()).filter(|held| !held.is_empty());
        held.map(Frame::data).or_else(|| self.trailers.take().map(Frame::trailers))
    }
}

impl HttpBody for Scrubbed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        while !this.has_ended {
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Some(frame) = this.pass(frame) {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => break,
            }
        }
        Poll::Ready(this.end().map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        let is_empty = self.scrubbing.held() == 0 && self.trailers.is_none();
        is_empty && (self.has_ended || self.inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, held) = (self.inner.size_hint(), self.scrubbing.held() as u64);
        let mut size = SizeHint::new();
        size.set_lower(inner.lower().saturating_add(held));
        if let Some(upper) = inner.upper() {
            size.set_upper(upper.saturating_add(held));
        }
        size
    }
}
