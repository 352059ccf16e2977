//! Signs in at an issuer, asks it for the next token set, and signs out: one code path, two dialects.
//!
//! A [`Provider`] is one issuer as one registered client sees it. Its dialect says how things are put on
//! the wire: as OpenAI's issuer and Codex do it, or as the RFCs have it.
//!
//! [`Provider`]: provider::Provider

pub mod authorize;
mod call;
pub mod callback;
pub mod device;
pub mod leave;
mod metadata;
pub mod page;
pub mod provider;
pub mod refresh;
pub mod wire;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use time::OffsetDateTime;

use crate::credential::{Account, TokenSet};
use crate::secret::Secret;
use crate::upstream::UpstreamError;

pub use leave::Leave;

/// Whoever hands out tokens for a login.
pub trait Issuer: Send + Sync {
    /// Whether there is anything to ask with for the set that follows `old`; `None` is no set at all,
    /// after which only a client that signs in by itself has one.
    fn can_renew(&self, old: Option<&TokenSet>) -> bool;

    /// Asks for the set that follows `old`, once: an implementation redeems a refresh token at most one
    /// time, whatever happens, and answers within 30 s of being asked. It takes its leave right before anything that
    /// can redeem the token leaves; without that nothing of the kind does.
    ///
    /// # Errors
    ///
    /// [`RefreshError`], which says what may be done with the refresh token afterwards. An implementation
    /// that cannot tell says [`RefreshError::Unknown`].
    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        reason: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>>;

    /// Asks whom a personal access token speaks for.
    ///
    /// # Errors
    ///
    /// [`RefreshError`]: `Rejected` when the token is worth nothing.
    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>>;
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

impl Answer {
    /// The set of a new login, received at `now`.
    pub fn into_set(self, now: OffsetDateTime) -> TokenSet {
        let mut set = TokenSet {
            access: self.access,
            refresh: self.refresh,
            id: self.id,
            account_id: None,
            last_refresh: Some(now),
        };
        set.account_id = set.account().id;
        set
    }
}

/// A refresh that brought nothing, by what may be done with the refresh token now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefreshError {
    /// Provably the token was not redeemed: it is as it was, try again later.
    #[error("the issuer could not be asked: {0}")]
    NotSent(Trouble),
    /// The issuer wants fewer requests and did not look at this one: try again later.
    #[error("the issuer asks to be left alone for a while")]
    Limited {
        /// How long, where it says so.
        retry_after: Option<Duration>,
    },
    /// The issuer's own definite no: the token is worth nothing.
    #[error("the issuer refused the token ({code})")]
    Rejected {
        /// The issuer's code in lower case, else `unauthorized`.
        code: String,
    },
    /// The issuer may or may not have redeemed the token: it must not be sent again lightly.
    #[error("no answer that counts came from the issuer: {0}")]
    Unknown(String),
}

impl RefreshError {
    /// The same in words, for those who wait for the token.
    pub fn trouble(&self) -> Trouble {
        match self {
            Self::NotSent(trouble) => trouble.clone(),
            other => Trouble::from(other.to_string()),
        }
    }
}

/// Why an issuer could not be asked: one clause, and what to do about it where a person can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Trouble {
    /// One clause; it names the host that could not be reached.
    pub why: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl<T: Into<String>> From<T> for Trouble {
    fn from(why: T) -> Self {
        Self { why: why.into(), hint: None }
    }
}

/// Why nobody was signed in, by what the person does next. The store is as it was.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The issuer could not be reached, or a certificate was not accepted.
    #[error("the issuer could not be reached")]
    Unreachable(#[source] UpstreamError),
    /// The issuer said no, by a code of its own.
    #[error("the issuer refused: {code}{}", .description.as_deref().map(|it| format!(" ({it})")).unwrap_or_default())]
    Refused {
        /// Letters, digits and `_`.
        code: String,
        /// The issuer's own words, without control characters.
        description: Option<String>,
    },
    /// The account's workspace has not been given Codex.
    #[error("Codex is not enabled for your workspace")]
    NotEntitled,
    /// The issuer's answer makes no sense; holds what is wrong with it.
    #[error("the issuer's answer cannot be used: {0}")]
    Nonsense(String),
    /// The issuer was asked, and nothing came in time; holds the time limit in seconds.
    #[error("the issuer did not answer within {0} s")]
    NoAnswer(u64),
    /// Another login has taken this one's place, or the person gave up.
    #[error("Login cancelled")]
    Cancelled,
    /// Nobody signed in in time; holds the time limit in minutes.
    #[error("nobody signed in within {0} minutes")]
    TimedOut(u64),
    /// The account may not use device codes; holds Codex's sentence.
    #[error("{0}")]
    NoDeviceCodes(String),
    /// The ports that the issuer redirects to are taken; holds Codex's sentence.
    #[error("{0}")]
    PortTaken(String),
    /// What was pasted is not the address of the page that the browser ended on.
    #[error("this is not the address that the browser ended on: {0}")]
    NotTheRedirect(&'static str),
    /// The configuration does not fit the issuer; holds why.
    #[error("{0}")]
    Unfit(String),
    /// This machine has no port or no random bytes.
    #[error("this machine cannot do it: {0}")]
    Machine(String),
}

impl LoginError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Unreachable(error) => return Some(error.hint().into_owned()),
            Self::Refused { code, .. } if code == "access_denied" => "sign in again, and allow it",
            Self::NotEntitled => {
                "ask the workspace's administrator for access to Codex, or sign in to another one"
            }
            Self::NoDeviceCodes(_) => {
                "switch it on in ChatGPT: Settings, Security, device code authorization (in a \
                 workspace its administrator does), or sign in with: valetkey login"
            }
            Self::TimedOut(_) | Self::Cancelled => "start again: valetkey login",
            Self::PortTaken(_) => {
                "end the other login, or sign in without a port: valetkey login --device-auth"
            }
            Self::NotTheRedirect(_) => {
                "paste all of it: http://127.0.0.1:…/auth/callback?code=…&state=…"
            }
            Self::NoAnswer(_) => "try again",
            Self::Refused { .. } => "try again; if it stays so, tell the issuer",
            Self::Nonsense(_) => {
                "try again; if it stays so, ask whoever runs your company's proxy: it may have answered itself"
            }
            Self::Unfit(_) => {
                "see: valetkey check; and the credential's `issuer`, `grant` and `client_secret`"
            }
            Self::Machine(_) => return None,
        };
        Some(hint.to_owned())
    }
}
