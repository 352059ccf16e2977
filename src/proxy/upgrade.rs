//! A WebSocket is an ordinary exchange until the 101.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join;
use http::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE,
};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::admit::Admitted;
use super::explained::Explained;
use super::intercept::InsideTls;
use super::note::Note;
use super::reject::Rejection;
use super::scrubbed::Scrubbed;
use super::websocket::{self, Ends};
use crate::audit::Kind;
use crate::headers::{lists, strip_hop_by_hop};
use crate::scrub::Scrubber;
use crate::upstream::UpstreamError;
use crate::upstream::body::Body;
use crate::upstream::dial;
use crate::upstream::early::Early;

/// The client's half of a WebSocket handshake: HTTP/1.1 Upgrade (RFC 6455 section 4), or extended
/// CONNECT over HTTP/2 (RFC 8441), which goes on as the GET that it stands for.
pub(super) struct Upgrade {
    client: OnUpgrade,
    /// What the upstream's accept is checked against.
    key: HeaderValue,
    over_http2: bool,
    /// Whether the client is told to do without when no WebSocket can be had.
    falls_back: bool,
    /// Cancelled when the credential that it is signed in with may no longer be used; never for one that
    /// is forwarded as it is.
    forbidden: CancellationToken,
    /// Ends with the WebSocket.
    note: Note,
    /// Knows what the client must not hear.
    pub(super) scrubber: Option<Arc<Scrubber>>,
}

impl Upgrade {
    /// Recognises a handshake and makes its method the GET that rules and the upstream see.
    ///
    /// # Errors
    ///
    /// [`Rejection`] for a CONNECT that is none, and for a handshake without its key.
    pub(super) fn take(request: &mut Request<Incoming>) -> Result<Option<Self>, Rejection> {
        if request.method() == Method::CONNECT {
            let protocol = request.extensions().get::<Protocol>().map(Protocol::as_str);
            if protocol != Some("websocket") {
                return Err(Rejection::Target("a CONNECT inside a tunnel is not proxied"));
            }
            let client = hyper::upgrade::on(&mut *request);
            *request.method_mut() = Method::GET;
            let key = HeaderValue::try_from(generate_key())
                .map_err(|_| Rejection::BadRequest("no key could be made".into()))?;
            return Ok(Some(Self::new(client, key, true)));
        }
        if !asks_for_websocket(request) {
            return Ok(None);
        }
        let key = request.headers().get(SEC_WEBSOCKET_KEY).cloned();
        let key = key.ok_or_else(|| {
            Rejection::BadRequest("a WebSocket handshake needs Sec-WebSocket-Key".into())
        })?;
        Ok(Some(Self::new(hyper::upgrade::on(request), key, false)))
    }

    fn new(client: OnUpgrade, key: HeaderValue, over_http2: bool) -> Self {
        let forbidden = CancellationToken::new();
        Self {
            client,
            key,
            over_http2,
            falls_back: false,
            forbidden,
            note: Note::default(),
            scrubber: None,
        }
    }

    /// Has the WebSocket written down in this when it ends.
    pub(super) fn noted_in(&mut self, note: Note) {
        self.note = note;
    }

    /// Has the WebSocket closed when this token is cancelled, and no other.
    pub(super) fn ends_with(&mut self, forbidden: CancellationToken) {
        self.forbidden = forbidden;
    }

    /// Has the client told to do without (426) when no WebSocket can be had.
    pub(super) fn falls_back(&mut self) {
        self.falls_back = true;
    }

    /// What the client gets when the upstream gave no answer.
    pub(super) fn unanswered(&self, error: UpstreamError) -> Rejection {
        if self.falls_back { Rejection::NoWebSocket(error.to_string()) } else { error.into() }
    }

    /// Puts the fields of an HTTP/1.1 handshake on a head that has been stripped of them.
    pub(super) fn dress(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_KEY, self.key.clone());
    }

    /// What the client gets for the upstream's answer. After a 101 to a WebSocket with the right accept
    /// the two halves are joined; any other answer passes as it is, and what the client sent early is never looked at.
    ///
    /// # Errors
    ///
    /// [`Rejection::BadUpgrade`] for a 101 that does not belong to this handshake; [`Rejection::NoWebSocket`]
    /// where the rule has it so, for whatever else is no WebSocket and does not speak of the client.
    pub(super) fn answer(
        self,
        shared: &Arc<Shared>,
        admitted: &Admitted,
        mut response: Response<Body>,
    ) -> Result<Response<Body>, Rejection> {
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return self.refused(response);
        }
        if !self.accepts(response.headers()) {
            return Err(match self.falls_back {
                true => Rejection::NoWebSocket(Rejection::BadUpgrade.to_string()),
                false => Rejection::BadUpgrade,
            });
        }
        let upstream = hyper::upgrade::on(&mut response);
        strip_hop_by_hop(response.headers_mut());
        if self.over_http2 {
            *response.status_mut() = StatusCode::OK;
            response.headers_mut().remove(SEC_WEBSOCKET_ACCEPT);
        } else {
            let headers = response.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        }
        self.join(shared, admitted, upstream);
        Ok(response.map(|_| Body::from(Bytes::new())))
    }

    /// What the client gets for an answer that opens no WebSocket.
    fn refused(self, mut response: Response<Body>) -> Result<Response<Body>, Rejection> {
        let status = response.status();
        if self.falls_back && !SPEAKS_OF_THE_CLIENT.contains(&status) {
            return Err(Rejection::NoWebSocket(format!("the upstream answered {status}")));
        }
        if self.over_http2 && status.is_success() {
            // To an extended CONNECT any 2xx says that the WebSocket is open (RFC 8441 section 5).
            return Err(Rejection::BadUpgrade);
        }
        strip_hop_by_hop(response.headers_mut());
        if !self.over_http2 {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// Whether the head of a 101 belongs to this handshake.
    fn accepts(&self, headers: &HeaderMap) -> bool {
        let accept = derive_accept_key(self.key.as_bytes());
        headers.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|got| *got == *accept)
            && switches_to_websocket(headers)
    }

    /// Passes on what both sides say until one ends, or is ended. The client's place is taken as long.
    fn join(self, shared: &Arc<Shared>, admitted: &Admitted, upstream: OnUpgrade) {
        let ends = Ends {
            draining: shared.closing.draining.clone(),
            forbidden: self.forbidden,
            shut_out: admitted.ended(),
            cut: shared.closing.cut.clone(),
        };
        let (client, over_http2) = (self.client, self.over_http2);
        let (place, note, scrubber) = (admitted.clone(), self.note, self.scrubber);
        note.goes_on_as(Kind::WebSocket);
        shared.connections.spawn(async move {
            let _place = place;
            let (client, upstream) = match try_join(client, upstream).await {
                Ok((client, upstream)) => {
                    (client_side(client, over_http2), upstream_side(upstream))
                }
                Err(error) => return tracing::debug!(%error, "upgrade failed"),
            };
            let (outcome, bytes) = match scrubber {
                Some(scrubber) => {
                    let upstream = Scrubbed::new(upstream, scrubber);
                    Box::pin(websocket::relay(&ends, client, upstream)).await
                }
                None => websocket::relay(&ends, client, upstream).await,
            };
            note.ended(outcome, bytes);
        });
    }
}

/// One half as it is once HTTP has let go of it: the stream that HTTP was spoken on, or, on HTTP/2, a stream of that.
type Side<S> = Either<S, TokioIo<Upgraded>>;

fn client_side(upgraded: Upgraded, over_http2: bool) -> Side<Box<Early<InsideTls>>> {
    match upgraded.downcast::<TokioIo<Explained<Early<InsideTls>>>>() {
        Ok(parts) => {
            let mut stream = parts.io.into_inner().into_inner();
            stream.put_back(parts.read_buf);
            Either::Left(Box::new(stream))
        }
        Err(upgraded) => {
            debug_assert!(over_http2, "HTTP/1.1 is spoken on another type");
            Either::Right(TokioIo::new(upgraded))
        }
    }
}

fn upstream_side(upgraded: Upgraded) -> Side<Early<dial::Stream>> {
    match upgraded.downcast::<TokioIo<dial::Stream>>() {
        Ok(parts) => Either::Left(Early::new(parts.read_buf, parts.io.into_inner())),
        Err(upgraded) => {
            debug_assert!(false, "an upgrade is asked for on another type");
            Either::Right(TokioIo::new(upgraded))
        }
    }
}

/// Refusals that would be the same without a WebSocket: sign in, not you, not so often.
const SPEAKS_OF_THE_CLIENT: [StatusCode; 3] =
    [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::TOO_MANY_REQUESTS];

fn asks_for_websocket(request: &Request<Incoming>) -> bool {
    request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && switches_to_websocket(request.headers())
}

/// What both sides of a handshake say (RFC 6455 sections 4.1 and 4.2.1).
fn switches_to_websocket(headers: &HeaderMap) -> bool {
    lists(headers, &CONNECTION, "upgrade") && lists(headers, &UPGRADE, "websocket")
}
