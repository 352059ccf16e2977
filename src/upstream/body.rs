//! The body of a message on its way: streamed, never gathered.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::headers::strip_trailers;

/// What goes wrong while a body streams.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A body of a request or a response.
///
/// Frames pass as they come. Dropping it cancels the side that it comes from.
pub struct Body {
    kind: Kind,
    /// Goes with the body, which tells who waits at the other end.
    over: Option<oneshot::Sender<()>>,
    /// Is there as long as the body.
    _going: Option<Going>,
}

/// Counts as going on until it is dropped.
#[derive(Debug)]
pub struct Going(Arc<AtomicUsize>);

impl Going {
    /// One more of what this counts.
    pub fn counted_in(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Kind {
    Boxed(UnsyncBoxBody<Bytes, BodyError>, Option<Again>),
    Full(Option<Bytes>),
    Incoming(Incoming),
}

impl Body {
    fn of(kind: Kind) -> Self {
        Self { kind, over: None, _going: None }
    }

    /// Resolves when this body has been sent, or was given up; `None` for one that has ended already.
    pub(super) fn over(&mut self) -> Option<oneshot::Receiver<()>> {
        if self.is_end_stream() {
            return None;
        }
        let (goes_with_it, over) = oneshot::channel();
        self.over = Some(goes_with_it);
        Some(over)
    }

    /// The same body, which counts as going on until it is dropped.
    #[must_use]
    pub fn holding(self, going: Going) -> Self {
        Self { _going: Some(going), ..self }
    }

    /// No body at all.
    pub fn empty() -> Self {
        Self::of(Kind::Full(None))
    }

    /// Any other body.
    pub fn boxed<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        Self::of(Kind::Boxed(UnsyncBoxBody::new(body), None))
    }

    /// A body that `again` can give from its beginning once more, as long as it is whole. The one given
    /// before ends with that.
    pub fn repeatable<B>(body: B, again: impl Fn() -> Option<Self> + Send + Sync + 'static) -> Self
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        Self::of(Kind::Boxed(UnsyncBoxBody::new(body), Some(Again::Made(Arc::new(again)))))
    }

    /// The means to have it again; `None` for one that passes only once.
    pub(super) fn again(&self) -> Option<Again> {
        match &self.kind {
            Kind::Boxed(_, again) => again.clone(),
            Kind::Full(bytes) => Some(Again::Full(bytes.clone())),
            Kind::Incoming(body) => body.is_end_stream().then_some(Again::Full(None)),
        }
    }

    /// The same body, which breaks off when this is cancelled.
    #[must_use]
    pub fn until(self, ended: CancellationToken) -> Self {
        if self.is_end_stream() {
            return self;
        }
        let ended = Box::pin(ended.cancelled_owned());
        Self::boxed(Until { inner: self, ended })
    }

    /// The same body with its trailers passed through `edit`.
    #[must_use]
    pub fn map_trailers<F>(self, edit: F) -> Self
    where
        F: Fn(&mut HeaderMap) + Clone + Send + Sync + Unpin + 'static,
    {
        if self.is_end_stream() {
            return self;
        }
        let Some(again) = self.again() else {
            return Self::boxed(MapTrailers { inner: self, edit });
        };
        let edited = MapTrailers { inner: self, edit: edit.clone() };
        Self::repeatable(edited, move || Some(again.body()?.map_trailers(edit.clone())))
    }
}

/// Gives a body from its beginning once more.
#[derive(Clone)]
pub(super) enum Again {
    Full(Option<Bytes>),
    Made(Arc<dyn Fn() -> Option<Body> + Send + Sync>),
}

impl Again {
    /// The body; `None` when it is not whole any more.
    pub(super) fn body(&self) -> Option<Body> {
        match self {
            Self::Full(bytes) => Some(Body::of(Kind::Full(bytes.clone()))),
            Self::Made(make) => make(),
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::of(Kind::Full(Some(bytes).filter(|bytes| !bytes.is_empty())))
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self::of(Kind::Incoming(incoming))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.get_mut().kind {
            Kind::Boxed(body, _) => Pin::new(body).poll_frame(cx),
            Kind::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Kind::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Boxed(body, _) => body.is_end_stream(),
            Kind::Full(bytes) => bytes.is_none(),
            Kind::Incoming(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Boxed(body, _) => body.size_hint(),
            Kind::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Incoming(body) => body.size_hint(),
        }
    }
}

/// A body as hyper reads it, whose end is one only where the peer has ended it, and whose trailers are none that frame.
///
/// On HTTP/2 hyper takes RST_STREAM and GOAWAY with NO_ERROR for the end of a body, because a server may
/// follow its whole answer with them (RFC 9113 section 8.1). What has END_STREAM stays known to have it
/// (h2 0.4.20, `proto/streams/state.rs`); what has not was cut.
pub struct Inbound {
    body: Incoming,
    is_http2: bool,
    /// Counts its bytes, where somebody wants to know.
    count: Option<Arc<AtomicU64>>,
    /// Is there as long as the body.
    _going: Option<Going>,
}

#[derive(Debug, thiserror::Error)]
#[error("the body broke off")]
pub(super) struct BrokenOff;

impl Inbound {
    /// The body of a message that came in this version of HTTP.
    pub fn new(body: Incoming, version: Version) -> Self {
        Self { body, is_http2: version == Version::HTTP_2, count: None, _going: None }
    }

    /// The same body, whose bytes are counted in this.
    #[must_use]
    pub fn counted_in(self, count: Option<Arc<AtomicU64>>) -> Self {
        Self { count, ..self }
    }

    /// The same body, which counts as going on until it is dropped.
    #[must_use]
    pub fn holding(self, going: Going) -> Self {
        Self { _going: Some(going), ..self }
    }
}

impl HttpBody for Inbound {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if frame.is_none() && this.is_http2 && !this.body.is_end_stream() {
            return Poll::Ready(Some(Err(BrokenOff.into())));
        }
        let cleaned = frame.map(|frame| {
            let mut frame = frame?;
            if let (Some(count), Some(data)) = (&this.count, frame.data_ref()) {
                count.fetch_add(data.len() as u64, Ordering::Relaxed);
            }
            if let Some(trailers) = frame.trailers_mut() {
                strip_trailers(trailers);
            }
            Ok(frame)
        });
        Poll::Ready(cleaned)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Body(..)")
    }
}

struct Until {
    inner: Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl HttpBody for Until {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(BrokenOff.into())));
        }
        Pin::new(&mut this.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

struct MapTrailers<F> {
    inner: Body,
    edit: F,
}

impl<F: Fn(&mut HeaderMap) + Unpin> HttpBody for MapTrailers<F> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_frame(cx).map_ok(|mut frame| {
            if let Some(trailers) = frame.trailers_mut() {
                (this.edit)(trailers);
            }
            frame
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
