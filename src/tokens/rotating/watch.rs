//! Follows the store of a login: holds what others have written, and refreshes what is due.

use std::sync::Weak;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Rotating;
use crate::store::Phase;

/// Holds what the store holds, and refreshes what is due, as long as anybody uses the source.
pub(super) async fn watch_store(
    source: Weak<Rotating>,
    mut changes: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut wait = LOOK_INTERVAL;
    let mut policy = match source.upgrade() {
        Some(source) => source.policy.policy.clone(),
        None => return,
    };
    loop {
        tokio::select! {
            // One that nobody changes any more stays as it is.
            Ok(()) = policy.changed() => {}
            () = stop.cancelled() => return,
            () = sleep(wait) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
        let Some(source) = source.upgrade() else { return };
        source.read(Duration::ZERO).await;
        if source.is_unsettled() {
            source.recover().await;
            source.read(Duration::ZERO).await;
        }
        source.delete_what_is_forbidden().await;
        source.refresh_if_due(&source.held.load_full());
        wait = source.until_due();
    }
}

impl Rotating {
    /// Saves what an owner that died was answered, if there is such.
    pub(super) async fn recover(&self) {
        if let Err(error) = self.rotation.recover().await {
            tracing::debug!(credential = %self.name, %error, "no journal could be looked at");
        }
    }

    /// Whether somebody may have sent the refresh token that is held, and nobody knows what was answered; or another was
    /// refused because of that.
    fn is_unsettled(&self) -> bool {
        let held = self.held.load();
        let phase = held.header.as_ref().map(|header| &header.phase);
        matches!(phase, Some(Phase::Posting | Phase::Unknown | Phase::Dead(_)))
    }

    /// How long the watch over the store sleeps at most.
    fn until_due(&self) -> Duration {
        let held = self.held.load();
        let due = held.ready().and_then(|ready| ready.times.due);
        let left = due.map(|moment| moment.left(&self.clock, self.skew()));
        // What is due already is tried again at the pace of the looks.
        left.filter(|left| !left.is_zero()).map_or(LOOK_INTERVAL, |left| left.min(LOOK_INTERVAL))
    }
}

/// How often the store is looked at although no change was heard of.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);
