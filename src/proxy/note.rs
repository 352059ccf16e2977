//! What is written down of one exchange, tunnel or WebSocket: gathered on its way, written when it is over.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;

use super::Shared;
use super::admit::{Admitted, Guest};
use super::intercept::Intercepted;
use super::reject::Rejection;
use crate::audit::{Audit, Exchange, Kind};
use crate::rules::Rule;
use crate::upstream::body::{Body, BodyError};

/// How it ended, where no refusal of ours says so: as both sides wished.
pub(super) const OK: &str = "ok";
/// One of the sides has broken off.
pub(super) const BROKEN_OFF: &str = "broken_off";
/// The client has gone before its end, or the proxy has cut it.
pub(super) const CUT: &str = "cut";
/// The credential may no longer be used.
pub(super) const FORBIDDEN: &str = "policy_forbids";
/// The pass counts no more.
pub(super) const SHUT_OUT: &str = "pass_required";
/// The proxy ends.
pub(super) const GOING_AWAY: &str = "going_away";

/// One line of the audit to be; nothing where nobody writes one down. It is written when the last of its clones goes, so
/// that there is one whatever happens, and only one.
#[derive(Clone, Default)]
pub(super) struct Note(Option<Arc<Line>>);

struct Line {
    audit: Audit,
    begun: Instant,
    /// What the request itself says.
    asked: Exchange,
    pass: OnceLock<String>,
    rule: OnceLock<Arc<Rule>>,
    status: AtomicU16,
    up: Arc<AtomicU64>,
    down: AtomicU64,
    outcome: OnceLock<&'static str>,
    goes_on: OnceLock<Kind>,
    is_left_to_others: AtomicBool,
}

/// Counts the bytes of a request's body; hangs on the request until that is taken apart.
#[derive(Clone)]
pub(super) struct Count(pub(super) Arc<AtomicU64>);

impl Note {
    /// Of a request in an intercepted tunnel, whose body is counted from now on.
    pub(super) fn of_exchange(connection: &Intercepted, request: &mut Request<Incoming>) -> Self {
        if !connection.shared.audit.is_on() {
            return Self(None);
        }
        let asked = Exchange {
            uid: connection.admitted.uid(),
            method: request.method().to_string(),
            host: connection.origin.target.to_string(),
            path: Some(request.uri().path().to_owned()),
            ..Exchange::default()
        };
        let line = Line::new(&connection.shared, asked);
        request.extensions_mut().insert(Count(line.up.clone()));
        let note = Self(Some(Arc::new(line)));
        note.admitted(&connection.admitted);
        note
    }

    /// Of a request to the proxy itself.
    pub(super) fn of_request(shared: &Shared, guest: &Guest, request: &Request<Incoming>) -> Self {
        if !shared.audit.is_on() {
            return Self(None);
        }
        let uri = request.uri();
        let asked = Exchange {
            uid: guest.uid(),
            method: request.method().to_string(),
            // A login may stand before the host, where no client should put one.
            host: uri
                .host()
                .map(|host| match uri.port_u16() {
                    Some(port) => format!("{host}:{port}"),
                    None => host.to_owned(),
                })
                .unwrap_or_default(),
            path: uri.scheme().map(|_| uri.path().to_owned()),
            ..Exchange::default()
        };
        Self(Some(Arc::new(Line::new(shared, asked))))
    }

    /// The client was let in.
    pub(super) fn admitted(&self, admitted: &Admitted) {
        if let (Some(line), Some(pass)) = (&self.0, admitted.pass()) {
            line.pass.get_or_init(|| pass.name().to_string());
        }
    }

    /// This rule covers it.
    pub(super) fn ruled(&self, rule: &Arc<Rule>) {
        if let Some(line) = &self.0 {
            line.rule.get_or_init(|| rule.clone());
        }
    }

    /// It is refused.
    pub(super) fn refused(&self, rejection: &Rejection) {
        if let Some(line) = &self.0 {
            line.came_to(rejection.code());
        }
    }

    /// With the answer it is not over, but goes on as this.
    pub(super) fn goes_on_as(&self, kind: Kind) {
        if let Some(line) = &self.0 {
            line.goes_on.get_or_init(|| kind);
        }
    }

    /// Nothing is written down of it.
    pub(super) fn leave_to_others(&self) {
        if let Some(line) = &self.0 {
            line.is_left_to_others.store(true, Ordering::Relaxed);
        }
    }

    /// Where the bytes of the request are counted.
    pub(super) fn up(&self) -> Option<Arc<AtomicU64>> {
        self.0.as_ref().map(|line| line.up.clone())
    }

    /// It is over, after so many bytes up and down.
    pub(super) fn ended(&self, outcome: &'static str, (up, down): (u64, u64)) {
        if let Some(line) = &self.0 {
            line.up.store(up, Ordering::Relaxed);
            line.down.store(down, Ordering::Relaxed);
            line.came_to(outcome);
        }
    }

    /// The response, with whose end the exchange is over.
    pub(super) fn follow(self, response: Response<Body>) -> Response<Body> {
        let Some(line) = self.0 else { return response };
        line.status.store(response.status().as_u16(), Ordering::Relaxed);
        if line.goes_on.get().is_some() {
            return response;
        }
        if response.body().is_end_stream() {
            line.came_to(OK);
            return response;
        }
        response.map(|inner| Body::boxed(Followed { inner, line }))
    }
}

impl Line {
    fn new(shared: &Shared, asked: Exchange) -> Self {
        Self {
            audit: shared.audit.clone(),
            begun: Instant::now(),
            asked,
            pass: OnceLock::new(),
            rule: OnceLock::new(),
            status: AtomicU16::new(0),
            up: Arc::default(),
            down: AtomicU64::new(0),
            outcome: OnceLock::new(),
            goes_on: OnceLock::new(),
            is_left_to_others: AtomicBool::new(false),
        }
    }

    /// How it ended, unless that is known already.
    fn came_to(&self, outcome: &'static str) {
        self.outcome.get_or_init(|| outcome);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.is_left_to_others.load(Ordering::Relaxed) {
            return;
        }
        let status = self.status.load(Ordering::Relaxed);
        let uses = self.rule.get().and_then(|rule| rule.action.uses());
        let exchange = Exchange {
            pass: self.pass.take(),
            rule: self.rule.get().map(|rule| rule.name.clone()),
            credential: uses.map(|uses| uses.credential.to_string()),
            status: Some(status).filter(|status| *status != 0),
            up: self.up.load(Ordering::Relaxed),
            down: self.down.load(Ordering::Relaxed),
            ms: u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            outcome: self.outcome.get().copied().unwrap_or(CUT),
            ..std::mem::take(&mut self.asked)
        };
        let kind = self.goes_on.get().copied().unwrap_or(Kind::Exchange);
        self.audit.exchange(kind, exchange);
    }
}

/// A response's body, whose bytes and end are noted.
struct Followed {
    inner: Body,
    line: Arc<Line>,
}

impl HttpBody for Followed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                this.line.down.fetch_add(len as u64, Ordering::Relaxed);
            }
            Some(Err(_)) => this.line.came_to(BROKEN_OFF),
            None => this.line.came_to(OK),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // Who has read as much as was announced does not ask again.
        if self.inner.is_end_stream() {
            self.line.came_to(OK);
        }
    }
}
