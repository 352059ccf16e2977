//! A credential that somebody else looks after: read when first needed, and again after a 401.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex;

use super::{Loader, Parts, State, Status, TokenError};
use crate::credential::{Account, Credential, LoginKind};
use crate::secret::Secret;

pub(super) struct Fixed {
    parts: Parts,
    loader: Arc<Loader>,
    held: ArcSwapOption<Credential>,
    /// When it was last read, and how that went wrong; held while reading, so that one reads.
    last: Mutex<Option<(Instant, Option<TokenError>)>>,
}

impl Fixed {
    pub(super) fn new(parts: Parts, loader: Arc<Loader>) -> Self {
        Self { parts, loader, held: ArcSwapOption::empty(), last: Mutex::default() }
    }

    pub(super) async fn current(&self) -> Result<Arc<Credential>, TokenError> {
        match self.held.load_full() {
            Some(held) => Ok(held),
            None => self.read().await,
        }
    }

    pub(super) async fn after_401(
        &self,
        refused: &Credential,
    ) -> Result<Option<Arc<Credential>>, TokenError> {
        let newer = |held: Arc<Credential>| (held.serial() != refused.serial()).then_some(held);
        match self.held.load_full().and_then(newer) {
            Some(newer) => Ok(Some(newer)),
            None => Ok(newer(self.read().await?)),
        }
    }

    /// Reads it, unless it was read a moment ago.
    async fn read(&self) -> Result<Arc<Credential>, TokenError> {
        let mut last = self.last.lock().await;
        let now = self.parts.clock.instant();
        if let Some((at, error)) = &*last
            && now.saturating_duration_since(*at) < READ_INTERVAL
        {
            match (error, self.held.load_full()) {
                (Some(error), _) => return Err(error.clone()),
                (None, Some(held)) => return Ok(held),
                (None, None) => {}
            }
        }
        let loader = Arc::clone(&self.loader);
        let loaded = self.parts.refreshes.spawn_blocking(move || loader()).await;
        let loaded = loaded.unwrap_or_else(|_| Err("it could not be read".into()));
        let read = loaded.map(|token| self.adopt(token)).map_err(|error| {
            let name = &self.parts.name;
            tracing::warn!(credential = %name, %error, "a credential cannot be read");
            let why = error.to_string();
            TokenError::LoginRequired { why, hint: "valetkey check".to_owned() }
        });
        *last = Some((now, read.as_ref().err().cloned()));
        read
    }

    fn adopt(&self, token: Secret) -> Arc<Credential> {
        let same = |held: &Arc<Credential>| held.token().fingerprint() == token.fingerprint();
        if let Some(held) = self.held.load_full().filter(same) {
            return held;
        }
        let fresh = Arc::new(Credential::new(LoginKind::ApiKey, token, Account::default()));
        self.held.store(Some(Arc::clone(&fresh)));
        fresh
    }

    pub(super) fn status(&self) -> Status {
        let trouble = self.last.try_lock().ok().and_then(|last| last.as_ref()?.1.clone());
        let state = match trouble {
            Some(error) => State::Unreadable(error.to_string()),
            None => State::Ok,
        };
        Status {
            kind: Some(LoginKind::ApiKey),
            account: Account::default(),
            expires_at: None,
            last_refresh: None,
            masked: self.held.load().as_ref().map(|held| held.token().masked()),
            mfa: None,
            state,
        }
    }

    pub(super) fn has_no_set(&self) -> TokenError {
        let name = &self.parts.name;
        TokenError::LoginRequired {
            why: format!("`{name}` is not a login with tokens"),
            hint: "valetkey status".to_owned(),
        }
    }
}

/// At most one read in this time, whatever number of 401s come.
const READ_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::clock::Clock;
    use crate::tasks::Tasks;

    struct World {
        fixed: Fixed,
        clock: Clock,
        value: Arc<Mutex<Option<&'static str>>>,
        reads: Arc<AtomicUsize>,
    }

    fn world(value: Option<&'static str>) -> World {
        let (clock, value) = (Clock::system(), Arc::new(Mutex::new(value)));
        let reads = Arc::new(AtomicUsize::new(0));
        let parts = Parts {
            name: "example".parse().unwrap(),
            clock: clock.clone(),
            refreshes: Tasks::new(),
            policy: super::super::Enforced::nothing(),
            background: Tasks::new(),
            audit: crate::audit::Audit::off(),
        };
        let (from, count) = (Arc::clone(&value), Arc::clone(&reads));
        let loader = move || {
            count.fetch_add(1, Ordering::Relaxed);
            from.lock().unwrap().map(Secret::new).ok_or_else(|| "EXAMPLE_TOKEN is not set".into())
        };
        World { fixed: Fixed::new(parts, Arc::new(loader)), clock, value, reads }
    }

    #[tokio::test]
    async fn reads_once_and_again_after_a_401() {
        let world = world(Some("k1"));
        let first = world.fixed.current().await.unwrap();
        assert_eq!(world.fixed.current().await.unwrap().serial(), first.serial());
        assert_eq!(world.reads.load(Ordering::Relaxed), 1);

        world.clock.advance(time::Duration::seconds(2));
        assert!(world.fixed.after_401(&first).await.unwrap().is_none());
        for _ in 0..50 {
            assert!(world.fixed.after_401(&first).await.unwrap().is_none());
        }
        assert_eq!(world.reads.load(Ordering::Relaxed), 2, "a storm reads once");

        *world.value.lock().unwrap() = Some("k2");
        world.clock.advance(time::Duration::seconds(2));
        let second = world.fixed.after_401(&first).await.unwrap().unwrap();
        assert_eq!(second.token().expose(), "k2");
        assert_eq!(world.fixed.current().await.unwrap().serial(), second.serial());
        assert!(world.fixed.after_401(&first).await.unwrap().is_some());
        assert_eq!(world.reads.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn says_why_it_has_no_value_and_recovers() {
        let world = world(None);
        let error = world.fixed.current().await.unwrap_err();
        assert!(matches!(error, TokenError::LoginRequired { .. }));
        assert_eq!(error.to_string(), "EXAMPLE_TOKEN is not set");
        assert_eq!(
            world.fixed.status().state,
            State::Unreadable("EXAMPLE_TOKEN is not set".to_owned())
        );
        *world.value.lock().unwrap() = Some("k1");
        world.clock.advance(time::Duration::seconds(2));
        assert!(world.fixed.current().await.is_ok());
        assert_eq!(world.fixed.status().state, State::Ok);
    }
}
