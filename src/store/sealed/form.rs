//! The file of a login: its record in the clear, its tokens in the clear or sealed.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::super::record::{fingerprint, moment};
use super::super::seal::{Key, open, seal};
use super::super::{Header, Record};
use crate::credential::{CredentialName, Login, TokenSet};
use crate::secret::Secret;

/// How a login is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Sealed,
}

/// What the file holds. At most one of `login` and `sealed` is there; neither after a logout.
#[derive(Serialize, Deserialize)]
pub(super) struct LoginFile {
    pub(super) header: Header,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    login: Option<StoredTokens>,
    /// Nonce and sealed login, in Base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed: Option<String>,
}

/// Tokens as they are written down. Wiped on drop.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub(in crate::store) struct StoredTokens {
    access: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refresh: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account_id: Option<String>,
    #[zeroize(skip)]
    #[serde(default, with = "moment")]
    last_refresh: Option<OffsetDateTime>,
}

impl LoginFile {
    /// What a file's bytes say.
    ///
    /// # Errors
    ///
    /// What is wrong and where, without a byte of the contents.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let kept: Self = serde_json::from_slice(bytes).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            format!("it is no login of valetkey (line {line}, column {column})")
        })?;
        match (&kept.login, &kept.sealed) {
            (Some(_), Some(_)) => Err("it holds two logins".to_owned()),
            _ => Ok(kept),
        }
    }

    /// The record as it is to be written: sealed where there is a key.
    ///
    /// # Errors
    ///
    /// Why this login cannot be kept here.
    pub(super) fn of(
        record: &Record,
        name: &CredentialName,
        key: Option<&Key>,
    ) -> Result<Self, String> {
        let header = record.header.clone();
        let login = match &record.login {
            None => None,
            Some(Login::OAuth(set)) => Some(StoredTokens::of(set)),
            Some(_) => return Err("a login of this kind is not kept here".to_owned()),
        };
        let (login, sealed) = match (login, key) {
            (Some(login), Some(key)) => {
                let sealed = seal(&json(&login)?, key, &bound_to(name, &header))?;
                (None, Some(sealed))
            }
            (login, _) => (login, None),
        };
        Ok(Self { header, login, sealed })
    }

    pub(super) fn form(&self) -> Option<Form> {
        match (&self.login, &self.sealed) {
            (_, Some(_)) => Some(Form::Sealed),
            (Some(_), None) => Some(Form::Plain),
            (None, None) => None,
        }
    }

    /// The login, opened with the key where it is sealed. It must be the one that the record speaks of.
    ///
    /// # Errors
    ///
    /// What is wrong, without a byte of the contents.
    pub(super) fn open(
        &self,
        name: &CredentialName,
        key: Option<&Key>,
    ) -> Result<Option<Login>, String> {
        let login = match (&self.login, &self.sealed, key) {
            (None, None, _) => return Ok(None),
            (Some(login), ..) => Login::OAuth(login.to_set()),
            (None, Some(sealed), Some(key)) => {
                let bytes = open(sealed, key, &bound_to(name, &self.header))?;
                let tokens: StoredTokens = serde_json::from_slice(&bytes)
                    .map_err(|_| "what was sealed is no login".to_owned())?;
                Login::OAuth(tokens.to_set())
            }
            (None, Some(_), None) => return Err("it is sealed".to_owned()),
        };
        match self.header.refresh == Some(fingerprint(&login)) {
            true => Ok(Some(login)),
            false => Err("its record speaks of another login".to_owned()),
        }
    }

    /// The bytes of the file.
    pub(super) fn to_bytes(&self) -> Result<Zeroizing<Vec<u8>>, String> {
        json(self)
    }
}

impl StoredTokens {
    pub(in crate::store) fn of(set: &TokenSet) -> Self {
        let text = |secret: &Secret| secret.expose().to_owned();
        Self {
            access: text(&set.access),
            refresh: set.refresh.as_ref().map(text),
            id: set.id.as_ref().map(text),
            account_id: set.account_id.clone(),
            last_refresh: set.last_refresh,
        }
    }

    pub(in crate::store) fn to_set(&self) -> TokenSet {
        let secret = |text: &String| Secret::new(text.as_str());
        TokenSet {
            access: secret(&self.access),
            refresh: self.refresh.as_ref().map(secret),
            id: self.id.as_ref().map(secret),
            account_id: self.account_id.clone(),
            last_refresh: self.last_refresh,
        }
    }
}

/// A value in JSON; the buffer is wiped on drop.
pub(in crate::store) fn json(value: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, String> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(ROOM));
    serde_json::to_writer_pretty(&mut *bytes, value).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// What a seal is bound to, so that it opens nowhere else: neither under another name nor in the record of
/// another login or generation.
fn bound_to(name: &CredentialName, header: &Header) -> Vec<u8> {
    format!("valetkey login/{name}/{}/{}", header.line, header.generation).into_bytes()
}

/// Room for any login seen, so that the buffer does not grow and leave copies behind.
const ROOM: usize = 64 * 1024;
