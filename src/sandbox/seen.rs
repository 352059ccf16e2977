//! Keeps what the sandbox saw of every exchange, for tests to read and to wait on.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use aws_lc_rs::digest;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Version};
use http_body::{Body, Frame, SizeHint};

use super::Board;

/// One exchange as the upstream saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    id: u64,
    /// `:authority` or `Host`, as spelled.
    pub host: String,
    /// The method.
    pub method: Method,
    /// Path and query, as they stood in the request.
    pub path: String,
    /// The version of HTTP.
    pub version: Version,
    /// The request's fields.
    pub headers: HeaderMap,
    /// The request's body so far.
    pub request: Passed,
    /// The response's body so far.
    pub response: Passed,
}

/// What has passed of a body.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    /// Its length so far.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal of what passed; empty while the body is open.
    pub sha256: String,
    /// Its trailers, where there were any.
    pub trailers: HeaderMap,
    /// How it ended.
    pub end: End,
}

/// How a body ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// Not yet, or not read by the sandbox.
    #[default]
    Open,
    /// Whole.
    Complete,
    /// The peer went away, the sandbox cut it, or nobody read the rest.
    Cut,
}

/// The exchanges of one host, in the order in which their heads arrived.
#[derive(Default)]
pub(super) struct Log {
    board: Board<Entries>,
    is_off: bool,
}

#[derive(Default)]
struct Entries {
    next_id: u64,
    seen: Vec<Seen>,
}

impl Log {
    pub(super) fn new(record: bool) -> Arc<Self> {
        Arc::new(Self { board: Board::default(), is_off: !record })
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.board.read(|entries| entries.seen.clone())
    }

    pub(super) fn clear(&self) {
        self.board.change(|entries| entries.seen.clear());
    }

    pub(super) async fn wait_until(&self, is_met: impl Fn(&[Seen]) -> bool) {
        self.board.wait_until(|entries| is_met(&entries.seen)).await;
    }

    /// Notes a request's head; the two watches note its body and that of the response.
    pub(super) fn enter<B>(self: &Arc<Self>, host: String, request: &Request<B>) -> (Watch, Watch) {
        if self.is_off {
            return (Watch::idle(), Watch::idle());
        }
        let path = request.uri().path_and_query().map_or("", |path| path.as_str()).to_owned();
        let id = self.board.change(|entries| {
            entries.next_id += 1;
            entries.seen.push(Seen {
                id: entries.next_id,
                host,
                method: request.method().clone(),
                path,
                version: request.version(),
                headers: request.headers().clone(),
                request: Passed::default(),
                response: Passed::default(),
            });
            entries.next_id
        });
        (
            Watch::new(self, id, |seen| &mut seen.request),
            Watch::new(self, id, |seen| &mut seen.response),
        )
    }
}

/// Notes how one body passes; a watch that is dropped before the end notes that it was cut.
pub(super) struct Watch(Option<Open>);

/// The note of a body that has not ended.
struct Open {
    digest: digest::Context,
    id: u64,
    log: Arc<Log>,
    side: fn(&mut Seen) -> &mut Passed,
}

impl Watch {
    fn new(log: &Arc<Log>, id: u64, side: fn(&mut Seen) -> &mut Passed) -> Self {
        let digest = digest::Context::new(&digest::SHA256);
        Self(Some(Open { digest, id, log: Arc::clone(log), side }))
    }

    fn idle() -> Self {
        Self(None)
    }

    /// Nothing more will come.
    pub(super) fn complete(&mut self) {
        self.end(End::Complete);
    }

    pub(super) fn over<B: Body>(mut self, body: B) -> Watched<B> {
        if body.is_end_stream() {
            self.complete();
        }
        Watched { body, watch: self }
    }

    fn frame(&mut self, frame: &Frame<Bytes>) {
        let Some(open) = &mut self.0 else { return };
        if let Some(data) = frame.data_ref() {
            open.digest.update(data);
            open.note(|passed| passed.bytes += data.len() as u64);
        } else if let Some(trailers) = frame.trailers_ref() {
            open.note(|passed| passed.trailers = trailers.clone());
            // Nothing follows trailers, and nobody asks whether something does.
            self.complete();
        }
    }

    fn end(&mut self, end: End) {
        let Some(open) = self.0.take() else { return };
        let sha256 = hex(open.digest.clone().finish());
        open.note(|passed| (passed.sha256, passed.end) = (sha256, end));
    }
}

impl Open {
    fn note(&self, change: impl FnOnce(&mut Passed)) {
        self.log.board.change(|entries| {
            // The newest are the likeliest; a cleared record has nothing to note.
            if let Some(seen) = entries.seen.iter_mut().rev().find(|seen| seen.id == self.id) {
                change((self.side)(seen));
            }
        });
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end(End::Cut);
    }
}

/// A body that is watched.
pub(super) struct Watched<B> {
    body: B,
    watch: Watch,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Watched<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.watch.frame(frame),
            Some(Err(_)) => self.watch.end(End::Cut),
            None => self.watch.complete(),
        }
        if self.body.is_end_stream() {
            self.watch.complete();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

pub(super) fn hex(digest: digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
