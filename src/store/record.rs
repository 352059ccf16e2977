//! The record of a login: where its rotation stands, and of which tokens that is said.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::credential::{Account, Login, TokenSet};
use crate::secret::{Fingerprint, Secret};

/// Which state of a record was read: SHA-256 over everything that is kept of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Version(pub(super) Fingerprint);

/// A login and where its rotation stands.
#[derive(Clone, Debug)]
pub struct Record {
    /// Where the rotation stands. Speaks of `login` and no other: a store sees to that.
    pub header: Header,
    /// What is signed in, if anything.
    pub login: Option<Login>,
}

/// Where the rotation of a login stands. Holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// One more for each login and logout.
    pub line: u64,
    /// One more for each rotation within a line.
    pub generation: u64,
    /// What is being done with this generation's refresh token.
    pub phase: Phase,
    /// Who moved it to this phase: a random id; empty before the first claim.
    pub owner: String,
    /// One more for each claim; with `owner` it fences a claim that was taken over.
    pub epoch: u64,
    /// Fingerprint of the login that this speaks of: of its refresh token where it has one.
    #[serde(with = "hex")]
    pub refresh: Option<Fingerprint>,
    /// The same of the generation before, within a line: by it a client is recognised that still
    /// presents that one.
    #[serde(with = "hex")]
    pub previous: Option<Fingerprint>,
    /// When the login that this speaks of was refreshed, where it says so: one from before is spent.
    #[serde(default, with = "moment")]
    pub refreshed: Option<OffsetDateTime>,
    /// Fingerprint of the account id, where the login has one.
    #[serde(with = "hex")]
    pub account: Option<Fingerprint>,
    /// Whom a personal access token speaks for, as the issuer said. No secret, and of use to every process.
    #[serde(default)]
    pub speaks_for: Option<Account>,
    /// How long the access token lived when it was received, where one of us received it.
    pub lifetime: Option<Duration>,
    /// Attempts of this generation that brought nothing.
    pub attempts: u32,
    /// No process tries again before this, by the wall clock.
    #[serde(with = "moment")]
    pub retry_at: Option<OffsetDateTime>,
    /// When a set was last redeemed because an upstream refused an access token.
    #[serde(with = "moment")]
    pub forced_at: Option<OffsetDateTime>,
}

/// What is being done with a generation's refresh token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing; whoever needs to may claim it.
    Idle,
    /// Somebody is about to send it; nothing was sent yet.
    Claimed,
    /// It may have been sent, or is about to be, and its successor may be on the way.
    Posting,
    /// It was sent and no answer came that counts: sending it again may end the login.
    Unknown,
    /// The issuer ended the login, with this code.
    Dead(String),
}

impl Record {
    /// The record of a login that a place holds. What only the record knows of it is filled in.
    pub(super) fn of(header: Header, mut login: Option<Login>) -> Self {
        if let Some(Login::Personal(personal)) = &mut login {
            personal.account.clone_from(&header.speaks_for);
        }
        Self { header, login }
    }
}

impl Header {
    /// The header of a login that nobody has recorded yet.
    pub(super) fn first(login: Option<&Login>) -> Self {
        Self {
            line: 1,
            generation: 1,
            phase: Phase::Idle,
            owner: String::new(),
            epoch: 0,
            refresh: login.map(fingerprint),
            previous: None,
            refreshed: login.and_then(refreshed),
            account: login.and_then(account),
            speaks_for: login.and_then(spoken_for),
            lifetime: None,
            attempts: 0,
            retry_at: None,
            forced_at: None,
        }
    }

    /// The header of another login, or of none, in the place of this one's.
    pub fn next_line(&self, login: Option<&Login>) -> Self {
        Self { line: self.line + 1, epoch: self.epoch, ..Self::first(login) }
    }

    /// The header of the same login, one rotation on.
    pub fn next_generation(&self, login: &Login) -> Self {
        Self {
            line: self.line,
            generation: self.generation + 1,
            epoch: self.epoch,
            previous: self.refresh,
            forced_at: self.forced_at,
            ..Self::first(Some(login))
        }
    }

    /// This header if it speaks of `login`, else the one that follows from somebody else having
    /// written `login`: the same account is one rotation on, anything else another line.
    pub(super) fn speaking_of(self, login: Option<&Login>) -> Self {
        match login {
            _ if self.refresh == login.map(fingerprint) => self,
            Some(login) if self.account.is_some() && self.account == account(login) => {
                self.next_generation(login)
            }
            _ => self.next_line(login),
        }
    }
}

/// When a login says that it was refreshed.
pub(super) fn refreshed(login: &Login) -> Option<OffsetDateTime> {
    login.tokens()?.last_refresh
}

/// By what a record knows a login: its refresh token where it has one.
pub(super) fn fingerprint(login: &Login) -> Fingerprint {
    match login {
        Login::ApiKey(key) => key.fingerprint(),
        Login::ChatGpt(tokens) | Login::OAuth(tokens) => tokens.fingerprint(),
        Login::Personal(personal) => personal.token.fingerprint(),
        Login::Unsupported(what) => Fingerprint::of(what.as_bytes()),
    }
}

fn account(login: &Login) -> Option<Fingerprint> {
    match login {
        Login::ChatGpt(tokens) => tokens.account().id.map(|id| Fingerprint::of(id.as_bytes())),
        Login::ApiKey(_) | Login::OAuth(_) | Login::Personal(_) | Login::Unsupported(_) => None,
    }
}

fn spoken_for(login: &Login) -> Option<Account> {
    match login {
        Login::Personal(personal) => personal.account.clone(),
        _ => None,
    }
}

/// Whether two logins are the same to the last token.
pub(super) fn same_login(one: Option<&Login>, other: Option<&Login>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(Login::ApiKey(one)), Some(Login::ApiKey(other))) => {
            one.fingerprint() == other.fingerprint()
        }
        (Some(Login::Personal(one)), Some(Login::Personal(other))) => {
            one.token.fingerprint() == other.token.fingerprint()
        }
        (Some(Login::ChatGpt(one)), Some(Login::ChatGpt(other)))
        | (Some(Login::OAuth(one)), Some(Login::OAuth(other))) => {
            let tokens = |set: &TokenSet| {
                let of = |secret: &Option<Secret>| secret.as_ref().map(Secret::fingerprint);
                (set.access.fingerprint(), of(&set.refresh), of(&set.id), set.last_refresh)
            };
            tokens(one) == tokens(other) && one.account_id == other.account_id
        }
        (Some(Login::Unsupported(one)), Some(Login::Unsupported(other))) => one == other,
        _ => false,
    }
}

/// Fingerprints as hexadecimal text.
pub(super) mod hex {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::secret::Fingerprint;

    pub(in crate::store) fn serialize<S: Serializer>(
        value: &Option<Fingerprint>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(Fingerprint::to_hex).serialize(serializer)
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Fingerprint>, D::Error> {
        let read =
            |hex: String| Fingerprint::from_hex(&hex).ok_or_else(|| D::Error::custom("no SHA-256"));
        Option::<String>::deserialize(deserializer)?.map(read).transpose()
    }
}

/// Moments as RFC 3339 text.
pub(super) mod moment {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
    use time::OffsetDateTime;
    use time::format_description::well_known::Rfc3339;

    pub(in crate::store) fn serialize<S: Serializer>(
        value: &Option<OffsetDateTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = value.map(|moment| moment.format(&Rfc3339)).transpose();
        text.map_err(ser::Error::custom)?.serialize(serializer)
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<OffsetDateTime>, D::Error> {
        let read = |text: String| OffsetDateTime::parse(&text, &Rfc3339).map_err(de::Error::custom);
        Option::<String>::deserialize(deserializer)?.map(read).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chatgpt(refresh: &str, account: Option<&str>) -> Login {
        Login::ChatGpt(TokenSet {
            access: Secret::new("a"),
            refresh: Some(Secret::new(refresh)),
            id: None,
            account_id: account.map(str::to_owned),
            last_refresh: None,
        })
    }

    #[test]
    fn tells_who_wrote_the_tokens() {
        let key = |text: &str| Login::ApiKey(Secret::new(text));
        // What the header speaks of, what is found, and the (line, generation, phase kept) that follow.
        let table = [
            (Some(chatgpt("r1", Some("x"))), Some(chatgpt("r1", Some("x"))), (5, 3, true)),
            (Some(chatgpt("r1", Some("x"))), Some(chatgpt("r2", Some("x"))), (5, 4, false)),
            (Some(chatgpt("r1", Some("x"))), Some(chatgpt("r2", Some("y"))), (6, 1, false)),
            (Some(chatgpt("r1", Some("x"))), Some(chatgpt("r2", None)), (6, 1, false)),
            (Some(chatgpt("r1", None)), Some(chatgpt("r2", None)), (6, 1, false)),
            (Some(chatgpt("r1", Some("x"))), Some(key("k1")), (6, 1, false)),
            (Some(chatgpt("r1", Some("x"))), None, (6, 1, false)),
            (None, Some(chatgpt("r1", Some("x"))), (6, 1, false)),
            (None, None, (5, 3, true)),
            (Some(key("k1")), Some(key("k1")), (5, 3, true)),
            (Some(key("k1")), Some(key("k2")), (6, 1, false)),
        ];
        for (known, found, (line, generation, kept)) in table {
            let old = Header {
                line: 5,
                generation: 3,
                phase: Phase::Dead("invalid_grant".to_owned()),
                attempts: 4,
                epoch: 9,
                ..Header::first(known.as_ref())
            };
            let new = old.clone().speaking_of(found.as_ref());
            let case = format!("{known:?} {found:?}");
            assert_eq!((new.line, new.generation), (line, generation), "{case}");
            assert_eq!(new.phase == old.phase && new.attempts == 4, kept, "{case}");
            assert_eq!(new.epoch, 9, "{case}");
            let rotated = line == 5 && generation == 4;
            assert_eq!(new.previous == old.refresh && rotated, rotated, "{case}");
        }
    }

    #[test]
    fn survives_being_written_down() {
        let login = chatgpt("r1", Some("x"));
        let moment = OffsetDateTime::from_unix_timestamp_nanos(1_800_000_000_123_456_789).ok();
        let mut header = Header {
            phase: Phase::Dead("invalid_grant".to_owned()),
            lifetime: Some(Duration::from_secs(3600)),
            retry_at: moment,
            ..Header::first(Some(&login))
        };
        for phase in [header.phase.clone(), Phase::Idle, Phase::Posting] {
            header.phase = phase;
            let json = serde_json::to_string(&header).unwrap();
            assert_eq!(serde_json::from_str::<Header>(&json).unwrap(), header, "{json}");
        }
    }
}
