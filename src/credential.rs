//! What is held for a credential: its name, its kind, and the fields that change as one.

pub mod claims;

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::scrub::{Scrubber, TooShort};
use crate::secret::{Fingerprint, Secret};
use claims::Claims;

/// The name of a credential in the configuration: 1 to 64 letters, digits, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CredentialName(Arc<str>);

impl CredentialName {
    /// The one that is meant where none is named: that of the preset `openai`.
    pub const USUAL: &str = "openai";

    /// What to type to sign in to it.
    pub fn how_to_sign_in(&self) -> String {
        match self.as_str() {
            Self::USUAL => "valetkey login".to_owned(),
            name => format!("valetkey login --credential {name}"),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CredentialName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if (1..=64).contains(&text.len()) && text.bytes().all(fits) {
            Ok(Self(text.into()))
        } else {
            Err(BadName)
        }
    }
}

impl fmt::Display for CredentialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The issuer of ChatGPT logins (observed, Codex 0.169.0).
pub const CODEX_ISSUER: &str = "https://auth.openai.com";
/// The public client that Codex is registered as there (observed, Codex 0.169.0).
pub const CODEX_CLIENT_ID: &str = "app_EMoamEEZ73f0CkXaXp7hrann";

/// A text that cannot name a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a credential's name is 1 to 64 letters, digits, `-` and `_`")]
pub struct BadName;

/// How the Codex cache is signed in; rules choose by it, hosts are intercepted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoginKind {
    /// An OpenAI API key.
    ApiKey,
    /// A ChatGPT login: rotating OAuth tokens, or a personal access token, bound to an account.
    ChatGpt,
    /// A login at any other OAuth issuer. No rule chooses by it.
    OAuth,
}

impl LoginKind {
    /// As the configuration spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ApiKey => "api_key",
            Self::ChatGpt => "chatgpt",
            Self::OAuth => "oauth",
        }
    }
}

impl fmt::Display for LoginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A field of a credential that a rule's header may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The workspace that a ChatGPT login speaks for.
    AccountId,
    /// The account's e-mail address.
    Email,
    /// `true` for an account on a government cloud, else empty.
    Fedramp,
    /// The plan, as the issuer spells it.
    Plan,
    /// The secret itself.
    Token,
}

impl Field {
    /// Every field, with the name it has in a template.
    pub const ALL: [(&str, Self); 5] = [
        ("account_id", Self::AccountId),
        ("email", Self::Email),
        ("fedramp", Self::Fedramp),
        ("plan", Self::Plan),
        ("token", Self::Token),
    ];

    /// The field of that name in a template.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find_map(|(known, field)| (known == name).then_some(field))
    }
}

/// Whom a login speaks for. Everything is optional: an API key knows none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Workspace id (`chatgpt_account_id`).
    pub id: Option<String>,
    /// E-mail address.
    pub email: Option<String>,
    /// Plan, as the issuer spells it.
    pub plan: Option<String>,
    /// Whether the account lives on a government cloud.
    pub fedramp: bool,
}

impl Account {
    /// A field by its name in a template; `None` for an empty one, and for [`Field::Token`], which is not
    /// the account's.
    pub fn field(&self, field: Field) -> Option<&str> {
        match field {
            Field::AccountId => self.id.as_deref(),
            Field::Email => self.email.as_deref(),
            Field::Fedramp => self.fedramp.then_some("true"),
            Field::Plan => self.plan.as_deref(),
            Field::Token => None,
        }
        .filter(|text| !text.is_empty())
    }
}

/// The current value of a credential, ready to be injected.
///
/// Immutable: a refresh makes a new one with a new serial. Two values with one serial are the same.
#[derive(Debug)]
pub struct Credential {
    serial: u64,
    kind: LoginKind,
    token: Secret,
    account: Account,
    scrubber: OnceLock<Result<Arc<Scrubber>, TooShort>>,
}

impl Credential {
    /// A value with a serial of its own.
    pub fn new(kind: LoginKind, token: Secret, account: Account) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { serial, kind, token, account, scrubber: OnceLock::new() }
    }

    /// Which value this is within the process; higher is newer.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// How the login is signed in. A plain API key of any service is [`LoginKind::ApiKey`].
    pub fn kind(&self) -> LoginKind {
        self.kind
    }

    /// The secret that goes into the header.
    pub fn token(&self) -> &Secret {
        &self.token
    }

    /// Knows the token when an upstream repeats it; made when it is first asked for.
    ///
    /// # Errors
    ///
    /// [`TooShort`] for a token that cannot be scrubbed.
    pub fn scrubber(&self) -> Result<Arc<Scrubber>, TooShort> {
        self.scrubber.get_or_init(|| Scrubber::new(&self.token).map(Arc::new)).clone()
    }

    /// Whom it speaks for.
    pub fn account(&self) -> &Account {
        &self.account
    }
}

/// What an issuer handed out for one login, and when.
#[derive(Clone, Debug)]
pub struct TokenSet {
    /// Sent to the API. Usually a JWT; an opaque one has no known expiry.
    pub access: Secret,
    /// Redeemed once for the next set; empty for tokens that somebody else refreshes.
    pub refresh: Option<Secret>,
    /// Says whom the login speaks for.
    pub id: Option<Secret>,
    /// The account as the cache states it; wins over the claim.
    pub account_id: Option<String>,
    /// When the set was received, by the wall clock of whoever stored it.
    pub last_refresh: Option<OffsetDateTime>,
}

impl TokenSet {
    /// Whom the set speaks for: the cache's account id, the rest from the claims of the id token,
    /// else of the access token.
    pub fn account(&self) -> Account {
        let claims = self.id_claims();
        let spare = || Claims::of(&self.access).unwrap_or_default();
        let claims = if claims.account_id.is_some() { claims } else { spare() };
        Account {
            id: self.account_id.clone().or(claims.account_id),
            email: claims.email,
            plan: claims.plan,
            fedramp: claims.fedramp,
        }
    }

    /// What the id token says, which policies judge by; empty without one.
    pub fn id_claims(&self) -> Claims {
        self.id.as_ref().and_then(Claims::of).unwrap_or_default()
    }

    /// Which rotation this is, for the record: the refresh token's fingerprint, else the access token's.
    pub fn fingerprint(&self) -> Fingerprint {
        self.refresh.as_ref().unwrap_or(&self.access).fingerprint()
    }
}

/// What a cache holds.
#[derive(Clone, Debug)]
pub enum Login {
    /// An API key.
    ApiKey(Secret),
    /// A ChatGPT login.
    ChatGpt(TokenSet),
    /// A login at any other OAuth issuer.
    OAuth(TokenSet),
    /// A ChatGPT login by a personal access token.
    Personal(PersonalToken),
    /// A login of a kind that cannot be injected as a header yet; holds what it is.
    Unsupported(String),
}

/// Where a login is kept: what `credentials_store` says, and `cli_auth_credentials_store` in Codex's own
/// configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// In a file.
    #[default]
    File,
    /// In the keyring of the desktop, or sealed with a key that is there: never in the clear in a file.
    Keyring,
    /// In the keyring where there is one that works, else in a file.
    Auto,
    /// In memory: it ends with the process.
    Ephemeral,
}

impl Keep {
    /// The words of the configuration.
    pub const WORDS: [(&str, Self); 4] = [
        ("file", Self::File),
        ("keyring", Self::Keyring),
        ("auto", Self::Auto),
        ("ephemeral", Self::Ephemeral),
    ];
}

/// How a login at an OAuth issuer comes to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Grant {
    /// A person signs in with a browser on this machine.
    #[default]
    AuthorizationCode,
    /// A person signs in with a browser anywhere.
    DeviceCode,
    /// Nobody signs in: the client proves itself with its secret.
    ClientCredentials,
}

impl Grant {
    /// The words of the configuration.
    pub const WORDS: [(&str, Self); 3] = [
        ("authorization_code", Self::AuthorizationCode),
        ("device_code", Self::DeviceCode),
        ("client_credentials", Self::ClientCredentials),
    ];
}

/// A long-lived token (`at-…`) that its owner made for a machine. It is never refreshed.
#[derive(Clone, Debug)]
pub struct PersonalToken {
    /// Sent to the API.
    pub token: Secret,
    /// Whom it speaks for, which the token does not say and only the issuer knows; `None` before the
    /// issuer was asked.
    pub account: Option<Account>,
}

impl PersonalToken {
    /// What such tokens start with (observed, Codex 0.169.0).
    pub const PREFIX: &str = "at-";
}

impl Login {
    /// The kind that rules choose by; `None` for one that cannot be injected.
    pub fn kind(&self) -> Option<LoginKind> {
        match self {
            Self::ApiKey(_) => Some(LoginKind::ApiKey),
            Self::ChatGpt(_) | Self::Personal(_) => Some(LoginKind::ChatGpt),
            Self::OAuth(_) => Some(LoginKind::OAuth),
            Self::Unsupported(_) => None,
        }
    }

    /// The tokens of a login that has such as can expire and be replaced.
    pub fn tokens(&self) -> Option<&TokenSet> {
        match self {
            Self::ChatGpt(set) | Self::OAuth(set) => Some(set),
            Self::ApiKey(_) | Self::Personal(_) | Self::Unsupported(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["openai", "work-2", "a_b", &"x".repeat(64)] {
            assert!(good.parse::<CredentialName>().is_ok(), "{good}");
        }
        for bad in ["", "a b", "caf\u{e9}", "a.b", &"x".repeat(65)] {
            assert!(bad.parse::<CredentialName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn empty_fields_count_as_absent() {
        let account =
            Account { email: Some(String::new()), plan: Some("plus".into()), ..Account::default() };
        let seen: Vec<_> = Field::ALL.map(|(name, field)| (name, account.field(field))).into();
        assert_eq!(
            seen,
            [
                ("account_id", None),
                ("email", None),
                ("fedramp", None),
                ("plan", Some("plus")),
                ("token", None)
            ]
        );
    }
}
