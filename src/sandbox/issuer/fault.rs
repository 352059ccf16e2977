//! What goes wrong at the token endpoint when a test says so.

use http::header::RETRY_AFTER;
use http::{Response, StatusCode};

use super::Dialect;
use crate::sandbox::{Body, reply};

/// What the token endpoint does to one request, whatever its grant, in place of a proper answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Redeems, then closes the connection: the new tokens are lost.
    DropAfter,
    /// Closes the connection before it reads the body; nothing is redeemed.
    DropBefore,
    /// Answers 200 with something that is not JSON; nothing is redeemed.
    Garbage,
    /// Redeems, and answers after [`Issuer::release`](super::Issuer::release).
    Hold,
    /// Answers 429 with a `Retry-After` of so many seconds; nothing is redeemed.
    RateLimited(u32),
    /// Answers 401, where the standard dialect is spoken 400, with this error code; nothing is redeemed.
    Refuse(&'static str),
    /// Redeems, and answers after this time.
    Slow(std::time::Duration),
    /// Answers with this status; nothing is redeemed.
    Status(u16),
}

impl Fault {
    /// The answer that stands in for redeeming.
    pub(super) fn instead(self, dialect: Dialect) -> Option<Response<Body>> {
        match self {
            Self::Garbage => Some(reply(StatusCode::OK, "text/html", "<html>not JSON")),
            Self::RateLimited(seconds) => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let mut response = dialect.error(status, "rate_limit_exceeded");
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
                Some(response)
            }
            Self::Refuse(code) => Some(dialect.error(dialect.refusal(), code)),
            Self::Status(status) => {
                let status = StatusCode::from_u16(status).unwrap_or_default();
                Some(dialect.error(status, "server_error"))
            }
            Self::DropAfter | Self::DropBefore | Self::Hold | Self::Slow(_) => None,
        }
    }
}
