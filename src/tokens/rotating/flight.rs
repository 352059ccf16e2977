//! The one refresh of a login for all that wait: whether it starts, how it goes, and what it brings.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;

use super::{READ_INTERVAL, Rotating};
use crate::audit::CredentialEvent;
use crate::fault;
use crate::oauth::Reason;
use crate::store::{Phase, StoreError};
use crate::tokens::TokenError;
use crate::tokens::held::{Held, Kept};
use crate::tokens::rotation::{FORCED_INTERVAL, Outcome, Successor, Want};

/// A time in which no refresh starts.
pub(super) struct Quiet {
    until: Instant,
    error: TokenError,
    /// Whether the refresh that was put off was for a token that is still good. One that is not may
    /// be due at once: the record says.
    good: bool,
}

/// How a refresh ended; `None` while it is in the air.
pub(super) type Landing = Option<Result<(), TokenError>>;

impl Rotating {
    /// Starts a refresh in the background where the value held is due.
    pub(super) fn refresh_if_due(self: &Arc<Self>, held: &Held) {
        if held.ready().is_some_and(|ready| self.has_come(ready.times.due))
            && let Some(want) = self.want(held, Reason::Proactive)
        {
            // Whoever flies it looks after it; that it may not start now is no news.
            drop(self.flight(want));
        }
    }

    /// What a refresh of the set held would be for; `None` where it cannot be refreshed.
    pub(super) fn want(&self, held: &Held, reason: Reason) -> Option<Want> {
        let set = match &held.login {
            Kept::Nothing => None,
            Kept::Ready(ready) => Some(ready.set.as_deref()?),
            Kept::Forbidden(_) | Kept::Unidentified(_) | Kept::Unsupported(_) => return None,
        };
        if held.death().is_some() || !self.issuer.can_renew(set) {
            return None;
        }
        let alive = held.ready().is_some_and(|ready| !self.has_come(ready.times.expires));
        let good = reason == Reason::Proactive && alive;
        Some(Want { unwanted: set.map(|set| set.access.fingerprint()), good, alive, reason })
    }

    /// Waits for the refresh in the air, or for a new one.
    pub(super) async fn join(self: &Arc<Self>, want: Want) -> Result<(), TokenError> {
        let mut flight = self.flight(want)?;
        match flight.wait_for(Option::is_some).await {
            Ok(landing) => landing.clone().unwrap_or(Ok(())),
            // The task is gone without a word: it has panicked, or the runtime ends.
            Err(_) => {
                Err(TokenError::IssuerUnavailable { retry_after: READ_INTERVAL, trouble: None })
            }
        }
    }

    /// Waits for the refresh in the air, where there is one. How it ended is in what is held.
    pub(super) async fn wait_for_flight(&self) {
        let flight = self.gate().flight.clone();
        if let Some(mut flight) = flight {
            // The sender is dropped when it has landed long ago.
            let _landing = flight.wait_for(Option::is_some).await;
        }
    }

    pub(super) fn was_forced_lately(&self) -> bool {
        let (gate, now) = (self.gate(), self.clock.instant());
        gate.forced.is_some_and(|at| now.saturating_duration_since(at) < FORCED_INTERVAL)
    }

    /// The refresh in the air, else a new one: a task of its own, which goes on when all who wait
    /// for it have gone.
    fn flight(self: &Arc<Self>, want: Want) -> Result<watch::Receiver<Landing>, TokenError> {
        let mut gate = self.gate();
        if let Some(flight) = &gate.flight
            && flight.has_changed().is_ok()
        {
            return Ok(flight.clone());
        }
        if let Some(quiet) = gate.quiet.as_ref().filter(|quiet| want.good || !quiet.good) {
            let left = quiet.until.saturating_duration_since(self.clock.instant());
            if !left.is_zero() {
                return Err(quiet.error.clone().after(left));
            }
        }
        let (landing, flight) = watch::channel(None);
        gate.flight = Some(flight.clone());
        self.refreshes.spawn(Arc::clone(self).fly(want, landing));
        Ok(flight)
    }

    async fn fly(self: Arc<Self>, want: Want, landing: watch::Sender<Landing>) {
        fault::point("refreshing");
        self.audit.credential(&self.name, CredentialEvent::RefreshBegun, None);
        let outcome = self.rotation.refresh(&want).await;
        self.write_down_outcome(&outcome);
        if want.reason == Reason::Unauthorized
            && matches!(outcome, Ok(Outcome::Redeemed(_) | Outcome::TooSoon | Outcome::Later(_)))
        {
            self.gate().forced = Some(self.clock.instant());
        }
        let ended = match outcome {
            Ok(Outcome::Found(record)) => {
                self.adopt(&record, None);
                Ok(())
            }
            Ok(Outcome::Redeemed(successor)) => {
                self.save(&successor, &landing).await;
                Ok(())
            }
            Ok(Outcome::TooSoon) => Ok(()),
            Ok(Outcome::Later(wait)) => {
                let trouble = self.rotation.trouble(&want);
                let error = TokenError::IssuerUnavailable { retry_after: wait, trouble };
                Err(self.keep_quiet(wait, error, want.good))
            }
            Err(error) => {
                tracing::warn!(credential = %self.name, %error, "a login cannot be refreshed");
                let error = TokenError::StoreUnavailable(Arc::new(error));
                Err(self.keep_quiet(self.store_pause(), error, want.good))
            }
        };
        landing.send_replace(Some(ended));
        drop(landing);
        // Somebody may have written between what we hold and our holding it.
        self.read(Duration::ZERO).await;
    }

    fn write_down_outcome(&self, outcome: &Result<Outcome, StoreError>) {
        let (event, detail) = match outcome {
            Ok(Outcome::Redeemed(_)) => (CredentialEvent::RefreshEnded, "redeemed"),
            Ok(Outcome::Found(record)) if matches!(record.header.phase, Phase::Dead(_)) => return,
            Ok(Outcome::Found(_)) => (CredentialEvent::RefreshEnded, "found"),
            Ok(Outcome::TooSoon) => (CredentialEvent::RefreshFailed, "too_soon"),
            Ok(Outcome::Later(_)) => (CredentialEvent::RefreshFailed, "later"),
            Err(_) => (CredentialEvent::RefreshFailed, "store"),
        };
        self.audit.credential(&self.name, event, Some(detail));
    }

    /// Saves a new set and holds it. Where saving takes long it is held, and all who wait have it,
    /// before it is saved.
    async fn save(&self, successor: &Successor, landing: &watch::Sender<Landing>) {
        if let Some(skew) = successor.skew {
            let skew = skew.clamp(-LARGEST_SKEW, LARGEST_SKEW).whole_milliseconds();
            self.skew_ms.store(i64::try_from(skew).unwrap_or(0), Ordering::Relaxed);
        }
        let mut saved = pin!(self.rotation.publish(successor));
        let record = match timeout(SAVE_PATIENCE, &mut saved).await {
            Ok(record) => record,
            Err(_) => {
                self.gate().outlived = successor.follows();
                self.adopt(&successor.unsaved(), successor.received);
                landing.send_replace(Some(Ok(())));
                saved.await
            }
        };
        let received = successor.received.filter(|_| successor.is_in(&record));
        self.adopt(&record, received);
        self.gate().outlived = None;
        tracing::info!(credential = %self.name, "refreshed");
    }

    fn keep_quiet(&self, wait: Duration, error: TokenError, good: bool) -> TokenError {
        let until = self.clock.instant() + wait;
        self.gate().quiet = Some(Quiet { until, error: error.clone(), good });
        error
    }

    /// How long a store in trouble is left alone: 1 s at first, and longer each time.
    fn store_pause(&self) -> Duration {
        let mut gate = self.gate();
        gate.store_failures = gate.store_failures.saturating_add(1);
        Duration::from_secs(1 << (gate.store_failures - 1).min(6)).min(SLOWEST_RETRY)
    }
}

impl TokenError {
    /// The same, heard when `left` is left of the wait.
    fn after(self, left: Duration) -> Self {
        match self {
            Self::IssuerUnavailable { trouble, .. } => {
                Self::IssuerUnavailable { retry_after: left, trouble }
            }
            other => other,
        }
    }
}

/// How long a new set may take to be saved before it is used all the same: a disk takes milliseconds, and a client that
/// waits for its request should not wait for a store in trouble.
const SAVE_PATIENCE: Duration = Duration::from_secs(2);

/// Slowest pace of trying a store that is in trouble: who has mended it waits a minute at most, as with an issuer.
const SLOWEST_RETRY: Duration = Duration::from_secs(60);

/// Furthest that a clock is believed to be off: ten years, longer than certificates live. Where it is further off than that
/// no answer comes that could tell, so what says so is a mistake.
const LARGEST_SKEW: time::Duration = time::Duration::days(3660);
