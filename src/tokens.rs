//! Hands out the current value of each credential, and keeps it current.

mod expiry;
#[cfg(test)]
mod fake;
mod fixed;
mod forbidden;
mod held;
mod rotating;
mod rotation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{pending, select_all};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::audit::Audit;
use crate::clock::Clock;
use crate::credential::{Account, Credential, CredentialName, LoginKind};
use crate::oauth::{Issuer, Trouble};
use crate::policy::{Policy, Violation};
use crate::secret::Secret;
use crate::store::{RecordStore, StoreError};
use crate::tasks::Tasks;
use fixed::Fixed;
use rotating::Rotating;

/// The credentials of a configuration, by name. A reload makes a new one and may take
/// sources of the old one over.
#[derive(Clone, Default)]
pub struct Tokens(BTreeMap<CredentialName, Arc<TokenSource>>);

impl Tokens {
    /// These sources.
    pub fn new(sources: BTreeMap<CredentialName, Arc<TokenSource>>) -> Self {
        Self(sources)
    }

    /// The source of a credential.
    pub fn source(&self, name: &CredentialName) -> Option<&Arc<TokenSource>> {
        self.0.get(name)
    }

    /// All sources, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&CredentialName, &Arc<TokenSource>)> {
        self.0.iter()
    }

    /// How each credential is signed in; one without a login, or with one that cannot be injected,
    /// has no entry.
    pub fn kinds(&self) -> BTreeMap<CredentialName, LoginKind> {
        let kind = |(name, source): (&CredentialName, &Arc<TokenSource>)| {
            source.kind().map(|kind| (name.clone(), kind))
        };
        self.0.iter().filter_map(kind).collect()
    }

    /// To hear of logins that are not allowed, from now on.
    pub fn violations(&self) -> Violations {
        let of = |(name, source): (&CredentialName, &Arc<TokenSource>)| {
            Some((name.clone(), source.violation()?))
        };
        let (names, changes) = self.0.iter().filter_map(of).unzip();
        Violations { names, changes }
    }

    /// Deletes every login that a policy wants deleted, for those who go before that has happened by itself.
    pub async fn delete_what_is_forbidden(&self) {
        for source in self.0.values() {
            if let Kind::Rotating(rotating) = &source.0 {
                rotating.delete_what_is_forbidden().await;
            }
        }
    }

    /// To hear when [`Tokens::kinds`] changes from what it is now.
    pub fn kind_changes(&self) -> KindChanges {
        KindChanges(self.0.values().filter_map(|source| source.kind_changes()).collect())
    }
}

/// Hears of logins that change their kind.
pub struct KindChanges(Vec<watch::Receiver<Option<LoginKind>>>);

impl KindChanges {
    /// Waits for the next change; never ends when there can be none. May be dropped and called again
    /// without missing one.
    pub async fn next(&mut self) {
        next_change(&mut self.0).await;
    }
}

/// Hears of logins that are not allowed.
pub struct Violations {
    names: Vec<CredentialName>,
    changes: Vec<watch::Receiver<Option<Violation>>>,
}

impl Violations {
    /// Waits for the next one; never ends when there can be none. May be dropped and called again
    /// without missing one.
    pub async fn next(&mut self) -> (CredentialName, Violation) {
        loop {
            let at = next_change(&mut self.changes).await;
            if let (Some(name), Some(violation)) = (self.names.get(at), &*self.changes[at].borrow())
            {
                return (name.clone(), violation.clone());
            }
        }
    }
}

/// Waits until one of these changes, and says which.
async fn next_change<T>(receivers: &mut [watch::Receiver<T>]) -> usize {
    let changes = receivers.iter_mut().map(|receiver| {
        Box::pin(async {
            if receiver.changed().await.is_err() {
                // The source is gone, and with it all change.
                pending::<()>().await;
            }
        })
    });
    let changes: Vec<_> = changes.collect();
    if changes.is_empty() {
        pending::<()>().await;
    }
    pin!(select_all(changes)).await.1
}

/// Where the current value of one credential comes from.
pub struct TokenSource(Kind);

enum Kind {
    Fixed(Box<Fixed>),
    Rotating(Arc<Rotating>),
}

/// Reads the value of a credential that somebody else looks after: an environment variable, a file.
/// May block. Its errors must not quote the value.
pub type Loader = dyn Fn() -> Result<Secret, Box<dyn Error + Send + Sync>> + Send + Sync;

/// What a source is made of.
pub struct Parts {
    /// The credential's name, for logs and hints.
    pub name: CredentialName,
    /// Tells the time.
    pub clock: Clock,
    /// Runs refreshes, which shutdown waits for.
    pub refreshes: Tasks,
    /// What the owner of the machine allows.
    pub policy: Enforced,
    /// Runs the watch over the store, which ends with the source; shutdown does not wait for it.
    pub background: Tasks,
    /// Where it is written down what becomes of it.
    pub audit: Audit,
}

/// What the owner of the machine allows, and what is done about the rest.
#[derive(Clone)]
pub struct Enforced {
    /// The policy in force; it may change.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// Whether a login that a policy wants deleted is: a command that only shows things deletes none.
    pub deletes: bool,
}

impl Enforced {
    /// Everything is allowed, for good.
    pub fn nothing() -> Self {
        Self { policy: watch::channel(Arc::default()).1, deletes: false }
    }
}

impl TokenSource {
    /// A source whose value is read with `loader`, when it is first needed and after a 401.
    pub fn fixed(parts: Parts, loader: Arc<Loader>) -> Self {
        Self(Kind::Fixed(Box::new(Fixed::new(parts, loader))))
    }

    /// A source over the login in a store, which it keeps fresh with the help of the issuer. The store
    /// is read once before this returns; a login that is missing or cannot be read is no error.
    pub async fn rotating(
        parts: Parts,
        store: Arc<dyn RecordStore>,
        issuer: Arc<dyn Issuer>,
    ) -> Self {
        Self(Kind::Rotating(Rotating::start(parts, store, issuer).await))
    }

    /// The value to send now. One that is known to have expired is never given out.
    ///
    /// # Errors
    ///
    /// [`TokenError`], which says what to tell the client.
    pub async fn current(&self) -> Result<Arc<Credential>, TokenError> {
        match &self.0 {
            Kind::Fixed(fixed) => fixed.current().await,
            Kind::Rotating(rotating) => rotating.current().await,
        }
    }

    /// What to do after an upstream refused `refused`, which the rule of that name had sent: replay the
    /// request once with this value, or pass the 401 on (`None`).
    ///
    /// # Errors
    ///
    /// [`TokenError`] when the login turned out to be over, or cannot be refreshed at the moment.
    pub async fn after_401(
        &self,
        rule: &str,
        refused: &Credential,
    ) -> Result<Option<Arc<Credential>>, TokenError> {
        match &self.0 {
            Kind::Fixed(fixed) => fixed.after_401(refused).await,
            Kind::Rotating(rotating) => rotating.after_401(rule, refused).await,
        }
    }

    /// The replay of a request was refused too: 401s of that rule pass, and cause no refresh, until the
    /// credential changes for another reason than a 401.
    pub fn refused_again(&self, rule: &str, credential: &Credential) {
        match &self.0 {
            Kind::Fixed(_) => {}
            Kind::Rotating(rotating) => rotating.refused_again(rule, credential),
        }
    }

    /// Whether [`TokenSource::after_401`] may bring a new value, so that a body is worth keeping.
    pub fn can_refresh(&self) -> bool {
        match &self.0 {
            Kind::Fixed(_) => true,
            Kind::Rotating(rotating) => rotating.can_refresh(),
        }
    }

    /// How it is signed in, as far as it is known.
    pub fn kind(&self) -> Option<LoginKind> {
        match &self.0 {
            Kind::Fixed(_) => Some(LoginKind::ApiKey),
            Kind::Rotating(rotating) => rotating.kind(),
        }
    }

    fn kind_changes(&self) -> Option<watch::Receiver<Option<LoginKind>>> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Rotating(rotating) => Some(rotating.kind_changes()),
        }
    }

    /// Why the last login was not allowed, until there is one that is.
    pub fn last_violation(&self) -> Option<Violation> {
        self.violation()?.borrow().clone()
    }

    fn violation(&self) -> Option<watch::Receiver<Option<Violation>>> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Rotating(rotating) => Some(rotating.violation()),
        }
    }

    /// The file that holds the login, if a file does.
    pub fn file(&self) -> Option<PathBuf> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Rotating(rotating) => rotating.file(),
        }
    }

    /// Where the login is kept, as people read it; `None` for a value that somebody else looks after.
    pub fn place(&self) -> Option<String> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Rotating(rotating) => Some(rotating.place()),
        }
    }

    /// What people may know of it.
    pub fn status(&self) -> Status {
        match &self.0 {
            Kind::Fixed(fixed) => fixed.status(),
            Kind::Rotating(rotating) => rotating.status(),
        }
    }

    /// Whether a token is one of this login's, and which.
    pub fn recognises(&self, token: &Secret) -> Option<Whose> {
        match &self.0 {
            Kind::Fixed(_) => None,
            Kind::Rotating(rotating) => rotating.recognises(token),
        }
    }

    /// Answers a client that shares this login and refreshes by itself, with the refresh token that was
    /// recognised as `whose`: our own single refresh runs, or has run, and this is the JSON body of an
    /// issuer's answer with the set as it is then. Holds secrets; wiped on drop.
    ///
    /// # Errors
    ///
    /// [`TokenError`] when there is no set that could be used. A fixed source has none.
    pub async fn answer_refresh(&self, whose: Whose) -> Result<Bytes, TokenError> {
        match &self.0 {
            Kind::Fixed(fixed) => Err(fixed.has_no_set()),
            Kind::Rotating(rotating) => rotating.answer_refresh(whose).await,
        }
    }

    /// For who uses a value longer than one request (a WebSocket): a token for the value in force now. It is
    /// cancelled when the login of that value is forbidden; one that is asked for after that is another
    /// token. Take it before the value, so that nothing falls in between.
    pub fn forbidden(&self) -> CancellationToken {
        match &self.0 {
            // Policies speak of logins, not of keys that are only read.
            Kind::Fixed(_) => CancellationToken::new(),
            Kind::Rotating(rotating) => rotating.forbidden(),
        }
    }

    /// The owner has revoked the login: it counts as gone until the store holds another set.
    pub fn logged_out(&self) {
        match &self.0 {
            Kind::Fixed(_) => {}
            Kind::Rotating(rotating) => rotating.logged_out(),
        }
    }
}

/// Which of a login's tokens a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The access token.
    Access,
    /// The refresh token of the current generation.
    Current,
    /// The refresh token of the generation before.
    Previous,
}

/// What people may know of a credential; never a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// How it is signed in, if it is.
    pub kind: Option<LoginKind>,
    /// Whom it speaks for.
    pub account: Account,
    /// When the access token expires, by this machine's clock, where that is known.
    pub expires_at: Option<OffsetDateTime>,
    /// When the set was received.
    pub last_refresh: Option<OffsetDateTime>,
    /// A long-lived secret as people may see it: an API key, a personal access token.
    pub masked: Option<String>,
    /// Whether the person signed in with a second factor, where the id token says.
    pub mfa: Option<bool>,
    /// Whether it can be used, and if not, why.
    pub state: State,
}

/// Whether a credential can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It can.
    Ok,
    /// Nobody is signed in.
    NoLogin,
    /// The issuer has ended the login, with this code. Its access token is used while it lives.
    Dead(String),
    /// The owner of the machine does not allow it, for this reason.
    Forbidden(Violation),
    /// A login that cannot be injected; what it is.
    Unsupported(String),
    /// The place that keeps it cannot be read, for this reason. What was read before is used.
    Unreadable(String),
}

/// Why there is no value to send, by what the client is told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenError {
    /// Final until the user acts.
    #[error("{why}")]
    LoginRequired {
        /// One sentence.
        why: String,
        /// What to type.
        hint: String,
    },
    /// The owner of the machine does not allow the login.
    #[error("{why}")]
    Forbidden {
        /// One sentence.
        why: String,
        /// What to type.
        hint: String,
    },
    /// The issuer is in trouble, or cannot be reached, or was asked too often.
    #[error("the token has expired and the issuer cannot be asked for a new one now{}", .trouble.as_ref().map(|it| format!(": {it}")).unwrap_or_default())]
    IssuerUnavailable {
        /// When it is worth asking again.
        retry_after: Duration,
        /// Why, as far as this process has seen it.
        trouble: Option<Trouble>,
    },
    /// The place that keeps the login is in trouble.
    #[error("the login cannot be read or saved: {}", .0.why())]
    StoreUnavailable(#[source] Arc<StoreError>),
}

impl TokenError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::LoginRequired { hint, .. } | Self::Forbidden { hint, .. } => hint.clone(),
            Self::IssuerUnavailable { trouble, .. } => trouble
                .as_ref()
                .and_then(|trouble| trouble.hint.clone())
                .unwrap_or_else(|| "wait and try again; if it lasts: valetkey doctor".into()),
            Self::StoreUnavailable(error) => match &**error {
                StoreError::ReadOnly { .. } | StoreError::Unavailable { .. } => error.hint(),
                _ => "see: valetkey status".to_owned(),
            },
        }
    }
}
