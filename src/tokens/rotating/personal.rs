//! Whom a personal access token speaks for: asked once for all that wait, and written down.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::Rotating;
use crate::credential::{Account, Login, PersonalToken};
use crate::oauth::RefreshError;
use crate::secret::{Fingerprint, Secret};
use crate::store::{Cas, Record, RecordStore, StoreError};
use crate::tokens::TokenError;
use crate::tokens::held::Kept;

/// When the issuer last failed to say it; held while asking, so that one asks.
#[derive(Default)]
pub(super) struct Identifying(Mutex<Option<(Instant, TokenError)>>);

impl Rotating {
    /// Asks the issuer whom a personal access token speaks for, once for all that wait, and writes it down.
    pub(super) async fn identify(&self, token: &Secret) -> Result<(), TokenError> {
        let mut failed = self.identifying.0.lock().await;
        if !matches!(self.held.load().login, Kept::Unidentified(_)) {
            return Ok(());
        }
        let now = self.clock.instant();
        if let Some((at, error)) = &*failed
            && now.saturating_duration_since(*at) < IDENTIFY_INTERVAL
        {
            return Err(error.clone());
        }
        let account = match self.issuer.identify(token).await {
            Ok(account) => account,
            Err(error) => {
                tracing::warn!(credential = %self.name, %error, "nobody knows whom a token speaks for");
                let error = match error {
                    RefreshError::Rejected { .. } => TokenError::LoginRequired {
                        why: "the issuer does not accept the personal access token".to_owned(),
                        hint: self.how_to_sign_in(),
                    },
                    other => TokenError::IssuerUnavailable {
                        retry_after: IDENTIFY_INTERVAL,
                        trouble: Some(other.trouble()),
                    },
                };
                *failed = Some((now, error.clone()));
                return Err(error);
            }
        };
        *failed = None;
        match write_down_account(&*self.store, token.fingerprint(), &account).await {
            Ok(record) => self.adopt(&record, None),
            Err(error) => {
                // It can be asked again; what is known is used.
                tracing::warn!(credential = %self.name, %error, "whom a token speaks for could not be saved");
                let personal = PersonalToken { token: token.clone(), account: Some(account) };
                let login = Some(Login::Personal(personal));
                if let Some(header) = self.held.load().header.clone() {
                    self.adopt(&Record { header, login }, None);
                }
            }
        }
        Ok(())
    }
}

/// Writes down whom a personal access token speaks for; answers with the record as it is then.
async fn write_down_account(
    store: &dyn RecordStore,
    token: Fingerprint,
    account: &Account,
) -> Result<Record, StoreError> {
    loop {
        let (version, mut record) = store.get().await?;
        match &mut record.login {
            Some(Login::Personal(personal)) if personal.token.fingerprint() == token => {
                personal.account = Some(account.clone());
            }
            _ => return Ok(record),
        }
        record.header.speaks_for = Some(account.clone());
        match store.cas(version, record.clone()).await? {
            Cas::Done(_) => return Ok(record),
            Cas::Conflict | Cas::Unknown => {}
        }
    }
}

/// How often the issuer is asked whom a personal access token speaks for, while it does not say: clients are told to come
/// back after this, and however many do, it is no storm.
const IDENTIFY_INTERVAL: Duration = Duration::from_secs(5);
