//! An exchange whose answer is scrubbed: what is asked of the upstream, and what becomes of what it says.

mod body;
mod websocket;

use std::sync::Arc;

use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderName, HeaderValue, IF_RANGE, RANGE,
    SEC_WEBSOCKET_EXTENSIONS, TRANSFER_ENCODING,
};
use http::{Response, StatusCode};
use http_body::Body as _;
use hyper::ext::ReasonPhrase;

use super::reject::Rejection;
use crate::scrub::Scrubber;
use crate::upstream::body::Body;
pub(super) use websocket::Scrubbed;

/// Has a request ask for an answer that can be looked into: whole, and not coded.
pub(super) fn ask(headers: &mut HeaderMap) {
    for name in ASK_FOR_LESS {
        headers.remove(name);
    }
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

/// Fields that ask for parts, which a client could cut out of a secret and put together; for what differs from
/// something else (RFC 3229); and for messages that are compressed, of WebSockets, of gRPC and of Connect.
const ASK_FOR_LESS: [HeaderName; 6] = [
    RANGE,
    IF_RANGE,
    HeaderName::from_static("a-im"),
    SEC_WEBSOCKET_EXTENSIONS,
    HeaderName::from_static("grpc-accept-encoding"),
    HeaderName::from_static("connect-accept-encoding"),
];

/// Fields that name a coding: of the body, and of each message in it.
const CODINGS: [HeaderName; 3] = [
    CONTENT_ENCODING,
    HeaderName::from_static("grpc-encoding"),
    HeaderName::from_static("connect-content-encoding"),
];

/// The same answer without what the scrubber knows, in its head, its body and its trailers.
///
/// # Errors
///
/// [`Rejection::CodingRefused`] for one that cannot be looked into, though nobody asked for such.
pub(super) fn answer(
    mut response: Response<Body>,
    scrubber: &Arc<Scrubber>,
) -> Result<Response<Body>, Rejection> {
    if is_coded(&response) {
        return Err(Rejection::CodingRefused);
    }
    // It would be written as it came.
    response.extensions_mut().remove::<ReasonPhrase>();
    clean(response.headers_mut(), scrubber);
    Ok(response.map(|body| match body.is_end_stream() {
        true => body,
        false => Body::boxed(body::Scrubbed::new(body, scrubber.clone())),
    }))
}

fn is_coded(response: &Response<Body>) -> bool {
    let headers = response.headers();
    let opens = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let has_body = !response.body().is_end_stream();
    let is_other_than = |name: HeaderName, usual: &str| {
        let mut values = headers.get_all(name).iter();
        // A second one is a second coding.
        let first =
            values.next().is_none_or(|it| it.as_bytes().eq_ignore_ascii_case(usual.as_bytes()));
        !first || values.next().is_some()
    };
    let hides_messages = opens && headers.contains_key(SEC_WEBSOCKET_EXTENSIONS);
    let hides_body = CODINGS.into_iter().any(|name| is_other_than(name, "identity"))
        || is_other_than(TRANSFER_ENCODING, "chunked");
    hides_messages || (has_body && hides_body)
}

/// Puts filler for what the scrubber knows into the values of header or trailer fields.
fn clean(headers: &mut HeaderMap, scrubber: &Arc<Scrubber>) {
    for value in headers.values_mut() {
        let Some(cleaned) = scrubber.clean(value.as_bytes()) else { continue };
        let is_sensitive = value.is_sensitive();
        // Filler may stand in any field.
        *value = HeaderValue::from_bytes(&cleaned).unwrap_or(HeaderValue::from_static(""));
        value.set_sensitive(is_sensitive);
    }
}
