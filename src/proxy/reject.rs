//! Every refusal: what went wrong becomes a status, a stable code, a sentence and what to type next.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, PROXY_AUTHENTICATE, RETRY_AFTER, UPGRADE};
use http::{Response, StatusCode};
use serde_json::json;

use super::admit;
use super::decoys::Misplaced;
use crate::access::Refused;
use crate::headers::VALETKEY_ERROR;
use crate::inject::UnfitSecret;
use crate::limits::WRONG_PASSES_IN;
use crate::scrub::TooShort;
use crate::tokens::TokenError;
use crate::upstream::body::Body;
use crate::upstream::{Stage, UpstreamError};

/// Why a request is not sent on, or has no answer. Its `Display` is the sentence that people see.
///
/// A 401 is never among the statuses: it is only ever the upstream's.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    /// The request is malformed; holds what is wrong with it.
    #[error("{0}")]
    BadRequest(String),
    /// A 101 that does not answer the client's handshake.
    #[error("the upstream's WebSocket handshake is wrong")]
    BadUpgrade,
    /// A ruled host was asked for in plain text.
    #[error("this host is signed in by a rule, so it is never spoken to in plain text")]
    CleartextRefused,
    /// An answer that is to be scrubbed and cannot be looked into.
    #[error(
        "the upstream's answer is compressed or coded in another way, and a rule has it scrubbed"
    )]
    CodingRefused,
    /// A decoy where nothing would put a credential in its place.
    #[error(transparent)]
    DecoyMisplaced(#[from] Misplaced),
    /// Not HTTP/1.1, or more of it than is taken; holds the status that says which.
    #[error("{}", malformed(*.0))]
    Malformed(StatusCode),
    /// No WebSocket can be had, and the client is to do without; holds why.
    #[error("no WebSocket can be had: {0}")]
    NoWebSocket(String),
    /// A pass does not reach this; holds why.
    #[error("{0}")]
    OutOfReach(&'static str),
    /// The client is a stranger and shows no pass that counts.
    #[error("{}", admit::describe(*.uid, *.why))]
    PassRequired {
        /// Its user, where the kernel gave one and it could be let in for that.
        uid: Option<u32>,
        /// What is wrong with the pass that it shows, if it shows one.
        why: Option<Refused>,
    },
    /// No rule, or a rule, forbids this; holds why.
    #[error("{0}")]
    Target(&'static str),
    /// The credential is not to be had.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The credential cannot be scrubbed from the answer.
    #[error("the credential is not sent: {0}")]
    TooShort(#[from] TooShort),
    /// The credential cannot stand in a header.
    #[error("the credential cannot be sent: {0}")]
    Unfit(#[from] UnfitSecret),
    /// The upstream gave no answer.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The client has shown too many passes that do not count.
    #[error("too many passes that do not count have come from here")]
    WrongPasses,
    /// A request in a tunnel names another origin than the tunnel was opened for; holds that one.
    #[error("this tunnel was opened for {0}, and the request names another origin")]
    WrongOrigin(String),
}

/// Status, code and hint of one refusal.
struct Row(StatusCode, &'static str, String);

impl Rejection {
    /// The one table of refusals.
    fn row(&self) -> Row {
        use StatusCode as S;
        match self {
            Self::BadRequest(_) => {
                Row(S::BAD_REQUEST, "bad_request", "send a well-formed HTTP request".into())
            }
            Self::BadUpgrade => Row(
                S::BAD_GATEWAY,
                "upstream_websocket",
                "ask whoever runs the upstream, or try without a WebSocket".into(),
            ),
            Self::CleartextRefused => {
                Row(S::FORBIDDEN, "cleartext_refused", "use https:// (or wss://)".into())
            }
            Self::CodingRefused => Row(
                S::BAD_GATEWAY,
                "coding_refused",
                "ask for something that is not compressed, or take `scrub = true` out of the rule".into(),
            ),
            Self::DecoyMisplaced(misplaced) => {
                Row(S::FORBIDDEN, "decoy_misplaced", misplaced.hint())
            }
            Self::Malformed(status) => {
                let hint = match *status {
                    S::REQUEST_HEADER_FIELDS_TOO_LARGE => {
                        "send a smaller one, or have `head_size` in [limits] allow it"
                    }
                    S::URI_TOO_LONG => "send a shorter one",
                    _ => "send a well-formed HTTP/1.1 request",
                };
                Row(*status, "bad_request", hint.into())
            }
            Self::NoWebSocket(_) => Row(
                S::UPGRADE_REQUIRED,
                "websocket_unavailable",
                "use HTTP in its place, as Codex then does; see: valetkey doctor".into(),
            ),
            Self::OutOfReach(_) => Row(
                S::FORBIDDEN,
                "target_forbidden",
                "see what it reaches: valetkey pass list; make one that reaches more: valetkey pass new".into(),
            ),
            Self::PassRequired { uid, .. } => Row(
                S::PROXY_AUTHENTICATION_REQUIRED,
                "pass_required",
                match uid {
                    Some(uid) => format!(
                        "show a pass, http://NAME:PASS@HOST:PORT (valetkey pass new NAME); or let this user in: \
                         [[listeners]] allow_uids = [{uid}]"
                    ),
                    None => "show a pass in the proxy's URL, http://NAME:PASS@HOST:PORT; who runs valetkey makes one: \
                             valetkey pass new NAME"
                        .into(),
                },
            ),
            Self::Target(_) => {
                Row(S::FORBIDDEN, "target_forbidden", "see: valetkey explain URL".into())
            }
            Self::Token(error) => token_row(error),
            Self::TooShort(_) => Row(
                S::FORBIDDEN,
                "target_forbidden",
                "use a longer key, or take `scrub = true` out of the rule".into(),
            ),
            Self::Unfit(_) => Row(S::FORBIDDEN, "login_required", "see: valetkey status".into()),
            Self::Upstream(error) => upstream_row(error),
            Self::WrongPasses => Row(
                S::TOO_MANY_REQUESTS,
                "wrong_passes",
                "show one that counts, which is taken at once, or wait a minute; who runs valetkey lists them: valetkey \
                 pass list"
                    .into(),
            ),
            Self::WrongOrigin(_) => Row(
                S::MISDIRECTED_REQUEST,
                "wrong_origin",
                "open a tunnel for each host; SNI, Host and :authority must name it".into(),
            ),
        }
    }

    /// Whether an HTTP/1.1 connection is of no use after this: its framing or its names are in doubt.
    pub(super) fn ends_the_connection(&self) -> bool {
        matches!(self, Self::BadRequest(_) | Self::WrongOrigin(_))
    }

    /// The stable code.
    pub(super) fn code(&self) -> &'static str {
        self.row().1
    }

    /// The answer that the client gets.
    pub(super) fn into_response(self) -> Response<Body> {
        let Row(status, code, hint) = self.row();
        let error: &(dyn std::error::Error + 'static) = &self;
        tracing::debug!(code, status = status.as_u16(), error, "refused");
        let mut response = Response::new(Body::from(Bytes::from(self.body(code, &hint))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(VALETKEY_ERROR, HeaderValue::from_static(code));
        if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            // RFC 9110 section 15.5.8 wants a challenge.
            let basic = HeaderValue::from_static("Basic realm=\"valetkey\"");
            headers.insert(PROXY_AUTHENTICATE, basic);
        }
        if status == StatusCode::UPGRADE_REQUIRED {
            // RFC 9110 section 15.5.22 wants to be told what to upgrade to: HTTP will do.
            headers.insert(UPGRADE, HeaderValue::from_static("HTTP/1.1"));
        }
        let is_for_now = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
        if is_for_now.contains(&status) {
            let wait = match &self {
                Self::WrongPasses => WRONG_PASSES_IN,
                Self::Token(TokenError::IssuerUnavailable { retry_after, .. }) => *retry_after,
                Self::Upstream(_) => ROOM_RETRY,
                _ => STORE_RETRY,
            };
            headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response
    }

    fn body(&self, code: &str, hint: &str) -> String {
        let error = json!({ "code": code, "message": self.to_string(), "hint": hint });
        format!("{:#}\n", json!({ "error": error }))
    }

    /// The answer in bytes, for a connection that ends with it.
    pub(super) fn to_http1(&self) -> Bytes {
        let Row(status, code, hint) = self.row();
        tracing::debug!(code, status = status.as_u16(), "refused");
        let (body, reason) =
            (self.body(code, &hint), status.canonical_reason().unwrap_or_default());
        let head = format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\n{VALETKEY_ERROR}: {code}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            status.as_u16(),
            body.len(),
        );
        Bytes::from(head + &body)
    }
}

fn malformed(status: StatusCode) -> &'static str {
    match status {
        StatusCode::URI_TOO_LONG => "the request's URI is too long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the request's head is too large",
        _ => "the request is not well-formed HTTP/1.1",
    }
}

/// When it is worth asking again after trouble with the place that keeps the login: a person may have to
/// act, a lock may be let go.
const STORE_RETRY: Duration = Duration::from_secs(5);

fn token_row(error: &TokenError) -> Row {
    let (status, code) = match error {
        TokenError::LoginRequired { .. } => (StatusCode::FORBIDDEN, "login_required"),
        TokenError::Forbidden { .. } => (StatusCode::FORBIDDEN, "policy_forbids"),
        TokenError::IssuerUnavailable { .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, "issuer_unavailable")
        }
        TokenError::StoreUnavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable"),
    };
    Row(status, code, error.hint())
}

/// The same for a lack of descriptors: some connection ends.
const ROOM_RETRY: Duration = Duration::from_secs(1);

fn upstream_row(error: &UpstreamError) -> Row {
    if error.is_lack_of_descriptors() {
        let hint =
            "wait a moment; if it lasts, whoever runs valetkey gives it more: ulimit -n 65536";
        return Row(StatusCode::SERVICE_UNAVAILABLE, "overloaded", hint.into());
    }
    let status = match error.stage() {
        Stage::OutOfReach => StatusCode::FORBIDDEN,
        Stage::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::BAD_GATEWAY,
    };
    Row(status, error.code(), error.hint().into_owned())
}
