//! The API at its worst: it repeats the token of a request, in whatever encoding and place it is asked for.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TRAILER};
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::handshake::server::create_response;

use super::super::{Ask, Body, Crew, error, full, reply};
use super::{parameter, token};
use crate::secret::Secret;

/// What the token may be encoded as.
pub const ENCODINGS: [&str; 14] = [
    "plain",
    "json",
    "json-slashes",
    "json-every",
    "percent",
    "percent-lower",
    "percent-every",
    "hex",
    "hex-upper",
    "base64-0",
    "base64-1",
    "base64-2",
    "base64url-1",
    "base64url-2",
];

/// Where the token may stand.
pub const PLACES: [&str; 5] = ["head", "whole", "pieces", "events", "trailers"];

/// The header or trailer field that it stands in.
pub const REVEALED: HeaderName = HeaderName::from_static("x-revealed");

/// The token between two words: `before TOKEN after`.
fn text(request: &Ask) -> String {
    let token = token(request.headers()).unwrap_or_else(|| Secret::new(""));
    let encoding: String = parameter(request.uri(), "as").unwrap_or_default();
    format!("before {} after", encoded(token.expose(), &encoding))
}

fn encoded(token: &str, encoding: &str) -> String {
    let each = |write: fn(u8) -> String| token.bytes().map(write).collect();
    let json = || format!("{:?}", token).trim_matches('"').to_owned();
    let percent: String = url::form_urlencoded::byte_serialize(token.as_bytes()).collect();
    match encoding {
        "json" => json(),
        "json-slashes" => json().replace('/', "\\/"),
        "json-every" => each(|byte| format!("\\u{byte:04x}")),
        "percent" => percent,
        "percent-lower" => percent.split('%').map(lower).collect::<Vec<_>>().join("%"),
        "percent-every" => each(|byte| format!("%{byte:02X}")),
        "hex" => each(|byte| format!("{byte:02x}")),
        "hex-upper" => each(|byte| format!("{byte:02X}")),
        "base64-0" => STANDARD.encode(token),
        "base64-1" => STANDARD.encode(format!("Bearer {token}:")),
        "base64-2" => STANDARD.encode(format!("user-agent\r\nBearer {token}!")),
        "base64url-1" => URL_SAFE_NO_PAD.encode(format!("Bearer {token}")),
        "base64url-2" => URL_SAFE_NO_PAD.encode(format!("ab{token}")),
        _ => token.to_owned(),
    }
}

/// The two digits of a code in lower case.
fn lower(behind_percent: &str) -> String {
    let (code, rest) = behind_percent.split_at(behind_percent.len().min(2));
    code.to_ascii_lowercase() + rest
}

/// `/reveal/PLACE?as=ENCODING&cut=N`: the body comes in two pieces, the first of so many bytes.
pub(super) fn answer(request: &Ask, place: &str) -> Response<Body> {
    let text = text(request);
    let cut = parameter(request.uri(), "cut").unwrap_or(0).min(text.len());
    match place {
        "head" => {
            let mut response = reply(StatusCode::OK, "text/plain", "see the head");
            response.headers_mut().insert(REVEALED, field(&text));
            response
        }
        "pieces" => pieces(&text, cut, None),
        "events" => pieces(&format!("data: {text}\n\n"), cut, None),
        "trailers" => pieces("see the trailers", 0, Some(field(&text))),
        _ => reply(StatusCode::OK, "text/plain", text),
    }
}

fn field(text: &str) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("not for a field"))
}

fn pieces(text: &str, cut: usize, trailer: Option<HeaderValue>) -> Response<Body> {
    let (first, second) = text.split_at(cut);
    let pieces = [first, second].map(|piece| Bytes::copy_from_slice(piece.as_bytes()));
    let data = pieces.into_iter().filter(|piece| !piece.is_empty()).map(Frame::data);
    let trailers = trailer.map(|value| Frame::trailers(HeaderMap::from_iter([(REVEALED, value)])));
    let frames = stream::iter(data.chain(trailers)).then(|frame| async {
        // Gives the connection a turn to send what it has.
        tokio::task::yield_now().await;
        Ok(frame)
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(TRAILER, HeaderValue::from_static("x-revealed"));
    response
}

/// `/reveal/messages?as=ENCODING&cut=N`: a WebSocket that says it in one message of text, in one of two frames with a
/// ping between them, in a binary one, in a ping and in its Close.
pub(super) fn messages(crew: &Crew, mut request: Ask) -> Response<Body> {
    let text = text(&request);
    let cut = parameter(request.uri(), "cut").unwrap_or(0).min(text.len());
    let upgrade = hyper::upgrade::on(&mut request);
    let Ok(mut response) = create_response(&request.map(|_| ())) else {
        return error(StatusCode::BAD_REQUEST, "not_a_websocket_handshake");
    };
    response.headers_mut().insert(REVEALED, field(&text));
    crew.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut io = TokioIo::new(upgraded);
        let (first, second) = text.as_bytes().split_at(cut);
        let short = &text.as_bytes()[..text.len().min(100)];
        let frames = [
            (TEXT | FINAL, text.as_bytes()),
            (TEXT, first),
            (PING | FINAL, short),
            (CONTINUATION | FINAL, second),
            (BINARY | FINAL, text.as_bytes()),
            (CLOSE | FINAL, &[&1000_u16.to_be_bytes(), short].concat()[..]),
        ];
        for (head, payload) in frames {
            let sent = io.write_all(&frame(head, payload)).await;
            if sent.and(io.flush().await).is_err() {
                return;
            }
        }
        // Reads on until the client has gone.
        while io.read_buf(&mut Vec::with_capacity(1024)).await.is_ok_and(|len| len > 0) {}
    });
    response.map(|()| full(""))
}

fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    match u8::try_from(payload.len()) {
        Ok(len @ 0..126) => [&[head, len], payload].concat(),
        _ => {
            let len = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
            [&[head, 126], &len[..], payload].concat()
        }
    }
}

const FINAL: u8 = 0x80;
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
