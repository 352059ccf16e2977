//! The pretend API: tells what arrived, a token only where that is asked for, and behaves as the path asks.
//!
//! Under any host, bare or below one of [`COVERED`]:
//!
//! | path | answer |
//! | --- | --- |
//! | `/always-401` | 401 |
//! | `/401-until-refreshed` | 401 to the first token that it ever sees and to none, 200 to every other |
//! | `/bytes/N` | N bytes |
//! | `/chat/completions`, `/messages` | hello, as OpenAI's and as Anthropic's API say it, whole or as events |
//! | `/close-before-head` | none: the connection (HTTP/2: the stream) is cut |
//! | `/echo` | the request's body and trailers, as they come |
//! | `/expect` | 417 before the body is read |
//! | `/gzip` | a body that is compressed already |
//! | `/hold` | after [`Api::release`] |
//! | `/realtime` | a WebSocket that speaks as OpenAI's realtime API, and says hello |
//! | `/redirect?to=URL` | 302 |
//! | `/reflect-headers` | the names of the request's fields |
//! | `/reveal/PLACE?as=ENCODING&cut=N` | the request's token itself, in the encoding, at the place, and cut ([`ENCODINGS`], [`PLACES`]) |
//! | `/responses` | a turn of Codex's: over a WebSocket, or as events to a POST |
//! | `/reset-mid-body` | the first bytes of a long body, then a cut |
//! | `/sse?n=N` | events; each after the first waits for [`Api::release_event`], or `&every_ms=T`; with `&stamped=true` each says when it was sent ([`stamp`]) |
//! | `/status/NNN`, `/ws-refused/NNN` | that status |
//! | `/trailers` | a body with a trailer |
//! | `/wham/accounts/check` | the workspace that is asked for |
//! | `/upload` | length and SHA-256 of the request's body |
//! | `/ws` | a WebSocket that echoes messages; asked for elsewhere, 426 |
//! | `/ws-refused-late/NNN` | that status after [`Api::release`] |
//! | `/ws-wrong-accept` | a 101 that answers another handshake |
//! | `/ws-wrong-upgrade` | a 101 to another protocol |
//! | any other below [`COVERED`] | who asked, as whom, and how |

mod anthropic;
mod chat;
mod responses;
mod reveal;

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, stream};
use http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, LOCATION, SEC_WEBSOCKET_ACCEPT, TRAILER, UPGRADE, WWW_AUTHENTICATE,
};
use http::{Method, Response, StatusCode, Uri};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, StreamBody};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::create_response;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::issuer::{Issuer, Standing};
use super::seen::{Log, Seen, hex};
use super::{Answer, Ask, Board, Body, Crew, Cut, authority, error, full, reply};
use crate::secret::{Fingerprint, Secret};

pub use responses::SAID;
pub use reveal::{ENCODINGS, PLACES, REVEALED};

/// What the paths say that speak as OpenAI's and Anthropic's API do, in the pieces that events bring.
const WORDS: [&str; 2] = ["hello from ", "the sandbox"];

/// Prefixes below which every path has an answer: those that the `openai` preset covers.
const COVERED: [&str; 3] = ["/v1/", "/backend-api/codex/", "/backend-api/"];

/// The pretend API. Clones are the same API.
#[derive(Clone)]
pub struct Api(Arc<Room>);

struct Room {
    /// What the Close frames of clients said; nothing for one without a code.
    closes: Board<Vec<Option<u16>>>,
    crew: Crew,
    events: Semaphore,
    held: Semaphore,
    issuer: Issuer,
    log: Arc<Log>,
    orders: Board<Orders>,
}

/// What was asked of the API beforehand.
#[derive(Default)]
struct Orders {
    accepted: Vec<Secret>,
    folders: Vec<(String, PathBuf)>,
    needs_login: bool,
    /// Whether Codex's turns are to be had over WebSockets.
    no_websockets: bool,
    /// The first token that `/401-until-refreshed` saw.
    refused: Option<Fingerprint>,
    /// Tokens that are good by the issuer's account, and refused.
    rejected: Vec<Fingerprint>,
    rejects_all: bool,
}

impl Api {
    pub(super) fn new(crew: Crew, issuer: Issuer, record: bool) -> Self {
        let (events, held) = (Semaphore::new(0), Semaphore::new(0));
        let (log, orders) = (Log::new(record), Board::default());
        let closes = Board::default();
        Self(Arc::new(Room { closes, crew, events, held, issuer, log, orders }))
    }

    /// Takes this API key for good, beside the issuer's access tokens.
    pub fn accept(&self, key: Secret) {
        self.0.orders.change(|orders| orders.accepted.push(key));
    }

    /// Whether a request without a good token gets 401, whatever its path. At first it does not.
    pub fn require_login(&self, needed: bool) {
        self.0.orders.change(|orders| orders.needs_login = needed);
    }

    /// Refuses this token from now on, though the issuer would not.
    pub fn reject(&self, token: &Secret) {
        self.0.orders.change(|orders| orders.rejected.push(token.fingerprint()));
    }

    /// Refuses every token from now on.
    pub fn reject_all(&self) {
        self.0.orders.change(|orders| orders.rejects_all = true);
    }

    /// Has Codex's turns over server-sent events alone: its WebSockets are answered 426.
    pub fn refuse_websockets(&self) {
        self.0.orders.change(|orders| orders.no_websockets = true);
    }

    /// Serves the files of a directory below a path (`/repo.git/`), before any other answer but 401.
    pub fn serve_dir(&self, prefix: &str, dir: impl Into<PathBuf>) {
        self.0.orders.change(|orders| orders.folders.push((prefix.to_owned(), dir.into())));
    }

    /// Lets one held answer go, now or when it comes to that.
    pub fn release(&self) {
        self.0.held.add_permits(1);
    }

    /// Lets one server-sent event go, now or when it comes to that.
    pub fn release_event(&self) {
        self.0.events.add_permits(1);
    }

    /// Every request since the last [`Api::clear`], in order of arrival. A body that is still under
    /// way is there as far as it got.
    pub fn seen(&self) -> Vec<Seen> {
        self.0.log.seen()
    }

    /// Forgets what was seen.
    pub fn clear(&self) {
        self.0.log.clear();
    }

    /// Waits until the heads of so many requests have arrived since the last [`Api::clear`].
    pub async fn wait_for(&self, count: usize) {
        self.wait_until(|seen| seen.len() >= count).await;
    }

    /// Waits until what was seen meets a condition.
    pub async fn wait_until(&self, is_met: impl Fn(&[Seen]) -> bool) {
        self.0.log.wait_until(is_met).await;
    }

    /// Waits until so many WebSockets have been closed by their clients with a Close frame; the codes, in
    /// order, nothing for a frame without one.
    pub async fn closes(&self, count: usize) -> Vec<Option<u16>> {
        self.0.closes.wait_until(|closes| closes.len() >= count).await;
        self.0.closes.read(Vec::clone)
    }

    pub(super) fn log(&self) -> &Arc<Log> {
        &self.0.log
    }

    pub(super) fn secrets(&self) -> Vec<String> {
        let accepted = |orders: &Orders| orders.accepted.clone();
        self.0.orders.read(accepted).iter().map(|key| key.expose().to_owned()).collect()
    }

    pub(super) async fn answer(&self, request: Ask) -> Answer {
        let standing = self.standing(request.headers());
        if standing != Standing::Current && self.0.orders.read(|orders| orders.needs_login) {
            return unauthorized(request, standing).await;
        }
        if let Some(content) = self.file(request.uri().path()).await {
            return Ok(reply(StatusCode::OK, "application/octet-stream", content));
        }
        let path = request.uri().path().to_owned();
        let below = COVERED.iter().find_map(|prefix| path.strip_prefix(prefix));
        let rest = below.unwrap_or_else(|| path.trim_start_matches('/'));
        match rest.split_once('/').unwrap_or((rest, "")) {
            ("realtime", _) => Ok(self.realtime(request)),
            ("responses", _) if request.headers().contains_key(UPGRADE) => Ok(self.turns(request)),
            ("responses", _) if request.method() == Method::POST => responses::turn(request).await,
            ("wham", "accounts/check") => responses::accounts(request).await,
            ("reveal", "messages") => Ok(reveal::messages(&self.0.crew, request)),
            ("reveal", place) => Ok(reveal::answer(&request, place)),
            ("ws", _) => Ok(self.websocket(request)),
            ("ws-refused", code) => Ok(status(code)),
            ("ws-refused-late", code) => {
                let _released = self.hold().await;
                Ok(status(code))
            }
            ("ws-wrong-accept", _) => {
                let mut response = self.websocket(request);
                let wrong = HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
                response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, wrong);
                Ok(response)
            }
            ("ws-wrong-upgrade", _) => {
                let mut response = self.websocket(request);
                response.headers_mut().insert(UPGRADE, HeaderValue::from_static("h2c"));
                Ok(response)
            }
            _ if request.headers().contains_key(UPGRADE) => Ok(status("426")),
            ("401-until-refreshed", _) if self.is_the_first(request.headers()) => {
                unauthorized(request, Standing::Expired).await
            }
            ("401-until-refreshed", _) => self.whoami(request).await,
            ("always-401", _) => unauthorized(request, Standing::Expired).await,
            ("bytes", count) => Ok(Response::new(
                count.parse().map_or_else(|_| full(""), |left| Filler { left }.boxed_unsync()),
            )),
            ("chat", "completions") => chat::completions(request).await,
            ("close-before-head", _) => Err(Cut),
            ("echo", _) => Ok(echo(request)),
            ("expect", _) => Ok(status("417")),
            ("gzip", _) => Ok(gzip()),
            ("hold", _) => self.hold().await,
            ("messages", _) => anthropic::messages(request).await,
            ("redirect", _) => Ok(redirect(request.uri())),
            ("reflect-headers", _) => Ok(names(request.headers())),
            ("reset-mid-body", _) => Ok(reset_mid_body()),
            ("sse", _) => Ok(self.events(request.uri())),
            ("status", code) => Ok(status(code)),
            ("trailers", _) => Ok(trailers()),
            ("upload", _) => upload(request).await,
            _ if below.is_some() => self.whoami(request).await,
            _ => Ok(error(StatusCode::NOT_FOUND, "not_found")),
        }
    }

    /// What the token of the request is worth.
    fn standing(&self, headers: &HeaderMap) -> Standing {
        match token(headers) {
            None => Standing::Absent,
            Some(token) if self.has_rejected(&token) => Standing::Expired,
            Some(token) if self.has_accepted(&token) => Standing::Current,
            Some(token) => self.0.issuer.standing(&token),
        }
    }

    fn has_accepted(&self, token: &Secret) -> bool {
        let is_same = |key: &Secret| key.expose() == token.expose();
        self.0.orders.read(|orders| orders.accepted.iter().any(is_same))
    }

    fn has_rejected(&self, token: &Secret) -> bool {
        let token = token.fingerprint();
        self.0.orders.read(|orders| orders.rejects_all || orders.rejected.contains(&token))
    }

    fn turns(&self, request: Ask) -> Response<Body> {
        if self.0.orders.read(|orders| orders.no_websockets) {
            return status("426");
        }
        responses::turns(&self.0.crew, request)
    }

    fn is_the_first(&self, headers: &HeaderMap) -> bool {
        let Some(token) = token(headers) else { return true };
        let token = token.fingerprint();
        self.0.orders.change(|orders| *orders.refused.get_or_insert(token) == token)
    }

    /// The file that a served directory has for the path.
    async fn file(&self, path: &str) -> Option<Vec<u8>> {
        let file = self.0.orders.read(|orders| {
            orders
                .folders
                .iter()
                .find_map(|(prefix, dir)| Some(dir.join(path.strip_prefix(prefix)?)))
        })?;
        if path.split('/').any(|part| part == "..") {
            return None;
        }
        self.0.crew.tasks.spawn_blocking(move || std::fs::read(file)).await.ok()?.ok()
    }

    async fn whoami(&self, mut request: Ask) -> Answer {
        drain(request.body_mut(), |_| ()).await?;
        let headers = request.headers();
        let account = headers.get("chatgpt-account-id").and_then(|value| value.to_str().ok());
        let mut told = json!({
            "host": authority(&request),
            "method": request.method().as_str(),
            "path": request.uri().path(),
            "version": format!("{:?}", request.version()),
            "authorization": self.standing(headers).as_str(),
            "account": account,
        });
        if request.uri().path().ends_with("/models") {
            // Codex wants a list, and makes do with an empty one.
            told["models"] = json!([]);
        }
        Ok(super::json(StatusCode::OK, &told))
    }

    async fn hold(&self) -> Answer {
        self.0.held.acquire().await.map_err(|_| Cut)?.forget();
        Ok(reply(StatusCode::OK, "text/plain", "released"))
    }

    fn events(&self, uri: &Uri) -> Response<Body> {
        let count = parameter(uri, "n").unwrap_or(5);
        let every = parameter(uri, "every_ms").map(Duration::from_millis);
        let is_stamped = parameter(uri, "stamped").unwrap_or(false);
        let room = Arc::clone(&self.0);
        let events = stream::unfold(0, move |number| {
            let room = Arc::clone(&room);
            async move {
                match every {
                    _ if number == count => return None,
                    _ if number == 0 => {}
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => room.events.acquire().await.ok()?.forget(),
                }
                let sent =
                    if is_stamped { format!(",\"sent\":{}", stamp()) } else { String::new() };
                let event =
                    format!("id: {number}\nevent: tick\ndata: {{\"number\":{number}{sent}}}\n\n");
                Some((Ok(Frame::data(event.into())), number + 1))
            }
        });
        let mut response = Response::new(StreamBody::new(events).boxed_unsync());
        let kind = HeaderValue::from_static("text/event-stream");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    }

    fn realtime(&self, mut request: Ask) -> Response<Body> {
        let upgrade = hyper::upgrade::on(&mut request);
        let Ok(response) = create_response(&request.map(|_| ())) else {
            return error(StatusCode::BAD_REQUEST, "not_a_websocket_handshake");
        };
        self.0.crew.spawn(async move {
            let Ok(io) = upgrade.await else { return };
            let io = TokioIo::new(io);
            chat::realtime(WebSocketStream::from_raw_socket(io, Role::Server, None).await).await;
        });
        response.map(|()| full(""))
    }

    fn websocket(&self, mut request: Ask) -> Response<Body> {
        let upgrade = hyper::upgrade::on(&mut request);
        let Ok(response) = create_response(&request.map(|_| ())) else {
            return error(StatusCode::BAD_REQUEST, "not_a_websocket_handshake");
        };
        let room = Arc::clone(&self.0);
        self.0.crew.spawn(async move {
            let Ok(io) = upgrade.await else { return };
            let io = TokioIo::new(io);
            let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
            while let Some(Ok(message)) = socket.next().await {
                if let Message::Close(close) = &message {
                    let code = close.as_ref().map(|close| close.code.into());
                    room.closes.change(|closes| closes.push(code));
                }
                let is_content = message.is_text() || message.is_binary();
                if is_content && socket.send(message).await.is_err() {
                    return;
                }
            }
        });
        response.map(|()| full(""))
    }
}

impl Standing {
    fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Current => "present and current",
            Self::Expired => "present but expired",
            Self::Revoked => "present but revoked",
            Self::Unknown => "unknown",
        }
    }
}

/// The token in `Authorization` or `X-Api-Key`; two such fields count as a token that nobody knows.
fn token(headers: &HeaderMap) -> Option<Secret> {
    const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
    let mut shown = headers.get_all(AUTHORIZATION).iter().chain(headers.get_all(API_KEY));
    let (first, second) = (shown.next()?, shown.next());
    let text = first.to_str().ok().filter(|_| second.is_none()).unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Some(Secret::new(token)),
        _ => Some(Secret::new(text)),
    }
}

/// 401, once the whole body has come: a close before that could overtake the answer.
async fn unauthorized(mut request: Ask, standing: Standing) -> Answer {
    drain(request.body_mut(), |_| ()).await?;
    let code = match standing {
        Standing::Absent => "missing_authorization",
        Standing::Current | Standing::Expired => "token_expired",
        Standing::Revoked => "token_revoked",
        Standing::Unknown => "invalid_api_key",
    };
    let mut response = error(StatusCode::UNAUTHORIZED, code);
    let challenge = HeaderValue::from_static("Bearer realm=\"sandbox\"");
    response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    Ok(response)
}

/// The request's body as JSON; null for anything else.
async fn asked(request: &mut Ask) -> Result<Value, Cut> {
    let mut body = Vec::new();
    drain(request.body_mut(), |data| body.extend_from_slice(data)).await?;
    Ok(serde_json::from_slice(&body).unwrap_or_default())
}

/// A server-sent event that is named after its type.
fn named(event: &Value) -> String {
    let name = event["type"].as_str().unwrap_or_default();
    format!("event: {name}\ndata: {event}\n\n")
}

/// Server-sent events, each in a frame of its own.
fn event_stream(events: Vec<String>) -> Response<Body> {
    let frames = events.into_iter().map(|event| Ok(Frame::data(Bytes::from(event))));
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync());
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn status(code: &str) -> Response<Body> {
    let status = code.parse().unwrap_or(StatusCode::BAD_REQUEST);
    reply(status, "text/plain", status.to_string())
}

fn echo(request: Ask) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let mut response = Response::new(body.map_err(io::Error::other).boxed_unsync());
    // HTTP/1.1 sends the trailers that were announced.
    for name in [CONTENT_TYPE, TRAILER] {
        if let Some(value) = parts.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}

fn gzip() -> Response<Body> {
    // "valetkey sandbox\n", compressed with `gzip -n`.
    const COMPRESSED: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x2b\x4b\xcc\x49\x2d\xc9\x4e\xad\x54\x28\x4e\xcc\x4b\x49\xca\xaf\xe0\x02\x00\xfc\x96\x95\x9c\x11\x00\x00\x00";
    let mut response = reply(StatusCode::OK, "text/plain", COMPRESSED);
    response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    response
}

fn redirect(uri: &Uri) -> Response<Body> {
    let place = parameter::<String>(uri, "to").and_then(|to| HeaderValue::try_from(to).ok());
    let Some(place) = place else { return status("400") };
    let mut response = status("302");
    response.headers_mut().insert(LOCATION, place);
    response
}

fn names(headers: &HeaderMap) -> Response<Body> {
    let mut names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    super::json(StatusCode::OK, &Value::from(names))
}

fn reset_mid_body() -> Response<Body> {
    let start = stream::iter([Ok(Frame::data(Bytes::from_static(b"the first bytes")))]);
    let cut = stream::once(async {
        // Gives the connection a turn to send what it has.
        tokio::task::yield_now().await;
        Err(io::Error::other(Cut))
    });
    let mut response = Response::new(StreamBody::new(start.chain(cut)).boxed_unsync());
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("1048576"));
    response
}

fn trailers() -> Response<Body> {
    let trailers = HeaderMap::from_iter([(TRAILER_FIELD, HeaderValue::from_static("done"))]);
    let frames =
        [Ok(Frame::data(Bytes::from_static(b"with a trailer"))), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert(TRAILER, HeaderValue::from_static("x-sandbox-trailer"));
    response
}

const TRAILER_FIELD: HeaderName = HeaderName::from_static("x-sandbox-trailer");

async fn upload(mut request: Ask) -> Answer {
    let (mut digest, mut bytes) = (digest::Context::new(&digest::SHA256), 0);
    drain(request.body_mut(), |data| {
        digest.update(data);
        bytes += data.len();
    })
    .await?;
    let facts = json!({"bytes": bytes, "sha256": hex(digest.finish())});
    Ok(super::json(StatusCode::OK, &facts))
}

async fn drain<B>(body: &mut B, mut look: impl FnMut(&Bytes)) -> Result<(), Cut>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame.map_err(|_| Cut)?.data_ref() {
            look(data);
        }
    }
    Ok(())
}

fn parameter<T: std::str::FromStr>(uri: &Uri, name: &str) -> Option<T> {
    let mut pairs = url::form_urlencoded::parse(uri.query()?.as_bytes());
    pairs.find(|(key, _)| key == name)?.1.parse().ok()
}

/// Nanoseconds of a clock that never goes backwards and whose zero is the same for all of this process.
pub fn stamp() -> u64 {
    static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(ZERO.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// So many bytes of the letter `a`.
struct Filler {
    left: u64,
}

impl http_body::Body for Filler {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        static CHUNK: [u8; 64 * 1024] = [b'a'; 64 * 1024];
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let length = usize::try_from(self.left).map_or(CHUNK.len(), |left| left.min(CHUNK.len()));
        self.left -= length as u64;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&CHUNK[..length])))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
