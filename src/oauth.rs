//! Asks the issuer of a login for its next token set.

pub mod codex;
pub mod refresh;
pub mod wire;

use std::time::Duration;

use futures_util::future::BoxFuture;
use time::OffsetDateTime;

use crate::secret::Secret;

/// Whoever hands out tokens for a login.
pub trait Issuer: Send + Sync {
    /// Redeems a refresh token, once: an implementation sends the request at most one time, whatever
    /// happens, and answers within 15 s of being asked.
    ///
    /// # Errors
    ///
    /// [`RefreshError`], which says what may be done with the token afterwards. An implementation
    /// that cannot tell says [`RefreshError::Unknown`].
    fn refresh<'a>(
        &'a self,
        token: &'a Secret,
        reason: Reason,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>>;
}

/// Why a token is redeemed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The access token is about to expire, or has.
    Proactive,
    /// An upstream refused the access token with a 401.
    Unauthorized,
}

impl Reason {
    /// As Codex 0.169 spells it in the request.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proactive => "proactive_expiry",
            Self::Unauthorized => "unauthorized_recovery",
        }
    }
}

/// The next token set, as the issuer hands it out. What it leaves out stays as it was.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The new access token.
    pub access: Secret,
    /// The next refresh token; `None` when the old one stays good.
    pub refresh: Option<Secret>,
    /// A new id token, which is always a decodable JWT.
    pub id: Option<Secret>,
    /// How long the access token lives from now, where the issuer says so; never zero.
    pub expires_in: Option<Duration>,
    /// The issuer's clock when it answered.
    pub date: Option<OffsetDateTime>,
}

/// A refresh that brought nothing, by what may be done with the refresh token now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefreshError {
    /// Provably no byte of the request left: the token is as it was, try again later.
    #[error("the issuer could not be reached: {0}")]
    NotSent(String),
    /// The issuer wants fewer requests and did not look at this one: try again later.
    #[error("the issuer asks to be left alone for a while")]
    Limited {
        /// How long, where it says so.
        retry_after: Option<Duration>,
    },
    /// The issuer's own definite no: the token is worth nothing.
    #[error("the issuer refused the refresh token ({code})")]
    Rejected {
        /// The issuer's code in lower case, else `unauthorized`.
        code: String,
    },
    /// The issuer may or may not have redeemed the token: it must not be sent again lightly.
    #[error("no answer that counts came from the issuer: {0}")]
    Unknown(String),
}
