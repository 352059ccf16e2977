//! Says one thing to an issuer and hears its answer: sent once, bounded in time and length.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::refresh::MAX_ANSWER_BYTES;
use super::wire::{error_code, error_description};
use super::{Leave, LoginError};
use crate::origin::Endpoint;
use crate::secret::Secret;
use crate::upstream::body::Body;
use crate::upstream::{Upstream, UpstreamError};

/// What an issuer answered.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// At most one byte more than [`MAX_ANSWER_BYTES`].
    pub(super) body: Bytes,
}

impl Reply {
    /// What an answer other than the one that was hoped for says.
    pub(super) fn refusal(&self) -> LoginError {
        match error_code(&self.body).flatten() {
            Some(code) => LoginError::Refused { code, description: error_description(&self.body) },
            None => LoginError::Nonsense(format!("status {}", self.status.as_u16())),
        }
    }
}

/// What is said to an issuer.
pub(super) enum Say<'a> {
    /// A form, as the RFCs have it.
    Form(&'a [(&'a str, &'a str)]),
    /// A JSON body, made by `wire`.
    Json(Bytes),
    /// Nothing: a GET.
    Nothing,
}

/// One request to an issuer.
pub(super) struct Call<'a> {
    pub(super) upstream: &'a Upstream,
    pub(super) endpoint: &'a Endpoint,
    /// `Authorization`, where the request has one.
    pub(super) authorization: Option<HeaderValue>,
    /// How long all of it may take.
    pub(super) limit: Duration,
    /// What is needed to send the body, where it redeems something.
    pub(super) leave: Option<&'a Arc<Leave>>,
}

impl Call<'_> {
    /// Sends it, once.
    ///
    /// # Errors
    ///
    /// [`CallError`], which says whether any of it may have been seen.
    pub(super) async fn say(self, what: Say<'_>) -> Result<Reply, CallError> {
        let limit = self.limit;
        within(limit, self.send(what)).await.unwrap_or(Err(CallError::Late(limit.as_secs())))
    }

    async fn send(self, what: Say<'_>) -> Result<Reply, CallError> {
        let (method, kind, body) = match what {
            Say::Form(fields) => (Method::POST, Some(FORM), form(fields)),
            Say::Json(body) => (Method::POST, Some(JSON), body),
            Say::Nothing => (Method::GET, None, Bytes::new()),
        };
        let body = match self.leave {
            Some(leave) => leave.body(body),
            None => Body::from(body),
        };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = self.endpoint.path.parse().map_err(|_| CallError::Path)?;
        let headers = request.headers_mut();
        if let Some(kind) = kind {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        headers.insert(ACCEPT, HeaderValue::from_static(JSON));
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert("originator", HeaderValue::from_static(super::provider::ORIGINATOR));
        if let Some(authorization) = self.authorization {
            headers.insert(AUTHORIZATION, authorization);
        }
        let response = self.upstream.send_once(&self.endpoint.origin, request).await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES + 1).collect().await;
        let body = body.map_err(|error| CallError::Broken(error.to_string()))?.to_bytes();
        Ok(Reply { status: parts.status, headers: parts.headers, body })
    }
}

/// Waits for an outcome as long as this process runs for that time, and not while it stands still: what has come meanwhile
/// is heard.
async fn within<T>(limit: Duration, outcome: impl Future<Output = T>) -> Option<T> {
    let mut outcome = pin!(outcome);
    let step = limit / LIMIT_STEPS;
    for taken in 1..=LIMIT_STEPS + 1 {
        let begun = Instant::now();
        if let Ok(outcome) = timeout(step, &mut outcome).await {
            return Some(outcome);
        }
        // Whoever stood still in the last of them has one more.
        if taken == LIMIT_STEPS && begun.elapsed() < step * 2 {
            break;
        }
    }
    None
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error("no answer within {0} s")]
    Late(u64),
    #[error("the answer broke off: {0}")]
    Broken(String),
    #[error("the endpoint's path cannot be sent")]
    Path,
}

impl CallError {
    /// Whether the issuer may have seen any of the request. `false` is a proof.
    pub(super) fn left(&self) -> bool {
        match self {
            Self::Upstream(error) => error.left(),
            Self::Late(_) | Self::Broken(_) => true,
            Self::Path => false,
        }
    }
}

impl From<CallError> for LoginError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Upstream(error) => Self::Unreachable(error),
            CallError::Late(seconds) => Self::NoAnswer(seconds),
            other => Self::Nonsense(other.to_string()),
        }
    }
}

/// `Basic`, with both parts encoded as a form first (RFC 6749 section 2.3.1). `None` for what no header
/// can hold.
pub(super) fn basic(user: &str, password: &Secret) -> Option<HeaderValue> {
    let encode =
        |text: &str| url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let pair = Zeroizing::new(format!("{}:{}", encode(user), encode(password.expose())));
    sensitive(format!("Basic {}", STANDARD.encode(pair.as_bytes())))
}

/// `Bearer` (RFC 6750 section 2.1). `None` for what no header can hold.
pub(super) fn bearer(token: &Secret) -> Option<HeaderValue> {
    sensitive(format!("Bearer {}", token.expose()))
}

fn sensitive(text: String) -> Option<HeaderValue> {
    let text = Zeroizing::new(text);
    let mut value = HeaderValue::from_str(&text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// A form body (RFC 6749 appendix B). Wiped on drop.
fn form(fields: &[(&str, &str)]) -> Bytes {
    // Large enough from the start: a buffer that grows leaves copies behind.
    let room = fields.iter().map(|(name, value)| name.len() + 3 * value.len() + 2).sum();
    let mut form = url::form_urlencoded::Serializer::new(String::with_capacity(room));
    form.extend_pairs(fields);
    Bytes::from_owner(Zeroizing::new(form.finish().into_bytes()))
}

/// In how many steps a limit runs out. One of them is enough to hear what has come.
const LIMIT_STEPS: u32 = 15;

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const AGENT: &str = concat!("valetkey/", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_a_client() {
        // RFC 6749 section 2.3.1 wants the parts encoded before they are joined.
        let value = basic("a b", &Secret::new("c:d")).unwrap();
        assert!(value.is_sensitive());
        assert_eq!(value, format!("Basic {}", STANDARD.encode("a+b:c%3Ad")));
        assert_eq!(bearer(&Secret::new("at-1")).unwrap(), "Bearer at-1");
        assert!(bearer(&Secret::new("a\nb")).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_a_process_stands_still_does_not_count() {
        let (limit, begun) = (Duration::from_secs(15), Instant::now());
        assert!(within(limit, std::future::pending::<()>()).await.is_none());
        assert_eq!(begun.elapsed(), limit);
        // The answer comes while it stands still, and takes a moment to be read.
        for before in [0, 7, 14] {
            let outcome = async {
                tokio::time::sleep(Duration::from_millis(before * 1000 + 500)).await;
                tokio::time::advance(Duration::from_secs(3600)).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            assert!(within(limit, outcome).await.is_some(), "{before}");
        }
    }

    #[test]
    fn forms() {
        assert_eq!(form(&[("a", "b c"), ("d", "&=")]), "a=b+c&d=%26%3D");
    }
}
