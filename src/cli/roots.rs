//! Follows the files that say whom to trust, for as long as a proxy runs.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use futures_util::FutureExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::changes::{Changes, Complaint};
use super::output;
use crate::tasks::Tasks;
use crate::tls::trust::UpstreamTrust;

/// Reads the roots again whenever their files change. What cannot be used is said, and the roots from before
/// stay in force. Ends with the trust, and when the guard is dropped.
#[must_use]
pub(super) fn follow(trust: &Arc<UpstreamTrust>, tasks: &Tasks) -> DropGuard {
    let (trust, places, jobs) = (Arc::downgrade(trust), trust.places(), tasks.clone());
    let over = CancellationToken::new();
    let end = over.clone();
    tasks.keep("following the roots", move || {
        let following = until_nobody_trusts(trust.clone(), places.clone(), jobs.clone());
        end.clone().run_until_cancelled_owned(following).map(|_| ())
    });
    over.drop_guard()
}

async fn until_nobody_trusts(trust: Weak<UpstreamTrust>, places: Vec<PathBuf>, jobs: Tasks) {
    let mut changes = Changes::of(places, jobs.clone());
    let mut complaint = Complaint::default();
    loop {
        changes.next_settled().await;
        let Some(trust) = trust.upgrade() else { return };
        let reading = trust.clone();
        let read = jobs.spawn_blocking(move || reading.reload()).await;
        complaint.now(match read {
            Ok(Ok(false)) => None,
            Ok(Ok(true)) => {
                let roots = trust.now();
                let (system, bundle) = (roots.system().len(), roots.bundle().len());
                tracing::info!(system, bundle, "the roots have changed");
                roots.notices().iter().for_each(output::warning);
                None
            }
            Ok(Err(error)) => {
                let why = output::chain_of(&error);
                Some(format!("{why}; the roots from before stay in force"))
            }
            Err(_panicked) => None,
        });
    }
}
