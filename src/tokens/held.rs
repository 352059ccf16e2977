//! What a source holds of its login, ready to be sent: one value, replaced as a whole.

use std::sync::Arc;

use super::expiry::{Moment, Received, Times};
use crate::credential::{Account, Credential, Login, LoginKind, PersonalToken, TokenSet};
use crate::decoy;
use crate::policy::{Policy, Violation};
use crate::secret::{Fingerprint, Secret, UnfitSecret};
use crate::store::{Header, Phase, Record, StoreError};

/// What is held of a login.
#[derive(Clone, Default)]
pub(super) struct Held {
    /// Where its rotation stands; `None` before the store could be read.
    pub(super) header: Option<Header>,
    /// The login itself.
    pub(super) login: Kept,
    /// Why the store could not be read the last time; what was read before is held then.
    pub(super) trouble: Option<Arc<StoreError>>,
}

/// The login that is held.
#[derive(Clone, Default)]
pub(super) enum Kept {
    /// None.
    #[default]
    Nothing,
    /// One that cannot be injected; what it is.
    Unsupported(String),
    /// One that the owner of the machine does not allow.
    Forbidden(Violation),
    /// A personal access token of which nobody knows yet whom it speaks for.
    Unidentified(Secret),
    /// One that can.
    Ready(Ready),
}

/// A login that can be sent.
#[derive(Clone)]
pub(super) struct Ready {
    /// What is injected.
    pub(super) credential: Arc<Credential>,
    /// What it was made from; `None` for an API key.
    pub(super) set: Option<Arc<TokenSet>>,
    /// When it is due and when it expires.
    pub(super) times: Times,
}

impl Held {
    /// What is held after this when a store holds `record`. What says the same keeps its serial, and
    /// its times where this process received it. A set that is `dropped` counts as none.
    pub(super) fn followed_by(
        &self,
        record: &Record,
        received: Option<Received>,
        dropped: Option<Fingerprint>,
        policy: &Policy,
    ) -> Self {
        let violation = record.login.as_ref().and_then(|login| policy.judge(login).err());
        let unfit = record.login.as_ref().and_then(unfit);
        let login = match (&record.login, violation, unfit) {
            (None, ..) => Kept::Nothing,
            // Before any judgement: the home of a client is not for us to tidy up.
            (Some(login), ..) if decoy::is_decoy(login) => Kept::Unsupported(DECOY.to_owned()),
            (_, Some(violation), _) => Kept::Forbidden(violation),
            (_, _, Some(unfit)) => {
                Kept::Unsupported(format!("a login whose token cannot be sent ({unfit})"))
            }
            (Some(Login::Unsupported(what)), ..) => Kept::Unsupported(what.clone()),
            (Some(Login::ApiKey(key)), ..) => {
                let credential = self.same_or_new(LoginKind::ApiKey, key, Account::default());
                Kept::Ready(Ready { credential, set: None, times: Times::NEVER })
            }
            (Some(Login::Personal(personal)), ..) => match &personal.account {
                None => Kept::Unidentified(personal.token.clone()),
                Some(account) => {
                    let (kind, account) = (LoginKind::ChatGpt, account.clone());
                    let credential = self.same_or_new(kind, &personal.token, account);
                    Kept::Ready(Ready { credential, set: None, times: Times::NEVER })
                }
            },
            (Some(Login::ChatGpt(set) | Login::OAuth(set)), ..)
                if dropped == Some(set.fingerprint()) =>
            {
                Kept::Nothing
            }
            (Some(login @ (Login::ChatGpt(set) | Login::OAuth(set))), ..) => {
                let kind = login.kind().unwrap_or(LoginKind::OAuth);
                let credential = self.same_or_new(kind, &set.access, set.account());
                let known = self.ready().filter(|known| known.is_received(&credential));
                let times = match (received, known) {
                    (None, Some(known)) => known.times,
                    _ => Times::of(set, &record.header, received),
                };
                Kept::Ready(Ready { credential, set: Some(Arc::new(set.clone())), times })
            }
        };
        Self { header: Some(record.header.clone()), login, trouble: None }
    }

    /// The same under a policy that may have changed.
    pub(super) fn under(&self, policy: &Policy) -> Self {
        let judge = |ready: &Ready| policy.judge(&ready.login()).err();
        match self.ready().and_then(judge) {
            Some(violation) => Self { login: Kept::Forbidden(violation), ..self.clone() },
            None => self.clone(),
        }
    }

    fn same_or_new(&self, kind: LoginKind, token: &Secret, account: Account) -> Arc<Credential> {
        let same = |known: &&Arc<Credential>| {
            known.kind() == kind
                && known.token().fingerprint() == token.fingerprint()
                && *known.account() == account
        };
        match self.ready().map(|ready| &ready.credential).filter(same) {
            Some(known) => Arc::clone(known),
            None => Arc::new(Credential::new(kind, token.clone(), account)),
        }
    }

    /// The login, where it can be sent.
    pub(super) fn ready(&self) -> Option<&Ready> {
        match &self.login {
            Kept::Ready(ready) => Some(ready),
            Kept::Nothing | Kept::Forbidden(_) | Kept::Unsupported(_) | Kept::Unidentified(_) => {
                None
            }
        }
    }

    /// Which value it is.
    pub(super) fn serial(&self) -> Option<u64> {
        self.ready().map(|ready| ready.credential.serial())
    }

    /// The code with which the issuer has ended the login.
    pub(super) fn death(&self) -> Option<&str> {
        match self.header.as_ref().map(|header| &header.phase) {
            Some(Phase::Dead(code)) => Some(code),
            _ => None,
        }
    }
}

/// What is said of a home that a client holds decoys in.
const DECOY: &str =
    "a decoy of a login that is kept elsewhere (is CODEX_HOME set for valetkey itself?)";

/// What keeps the token of a login out of a header field.
fn unfit(login: &Login) -> Option<UnfitSecret> {
    let token = match login {
        Login::ApiKey(key) => key,
        Login::ChatGpt(set) | Login::OAuth(set) => &set.access,
        Login::Personal(personal) => &personal.token,
        Login::Unsupported(_) => return None,
    };
    token.check_field_value().err()
}

impl Ready {
    /// Whether this is that very value.
    pub(super) fn is(&self, credential: &Credential) -> bool {
        self.credential.serial() == credential.serial()
    }

    fn is_received(&self, credential: &Credential) -> bool {
        self.is(credential) && matches!(self.times.expires, Some(Moment::Here(_)))
    }

    /// The login that this was made from.
    fn login(&self) -> Login {
        let credential = &self.credential;
        match (&self.set, credential.kind()) {
            (Some(set), LoginKind::OAuth) => Login::OAuth(TokenSet::clone(set)),
            (Some(set), _) => Login::ChatGpt(TokenSet::clone(set)),
            (None, LoginKind::ApiKey) => Login::ApiKey(credential.token().clone()),
            (None, _) => Login::Personal(PersonalToken {
                token: credential.token().clone(),
                account: Some(credential.account().clone()),
            }),
        }
    }

    /// Which rotation it is; `None` for an API key.
    pub(super) fn fingerprint(&self) -> Option<Fingerprint> {
        self.set.as_ref().map(|set| set.fingerprint())
    }
}
