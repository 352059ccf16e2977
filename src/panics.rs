//! Counts panics, and says where one was and never why: the reason may quote a secret.

use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

static COUNT: AtomicU64 = AtomicU64::new(0);
static ONE_MORE: Notify = Notify::const_new();

/// Hears of every panic of this process from now on, in the place of who has printed them until now.
pub fn watch() {
    panic::set_hook(Box::new(|about| {
        let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        let place = about.location();
        let (file, line) = (place.map(panic::Location::file), place.map(panic::Location::line));
        tracing::error!(
            file,
            line,
            count,
            "a mistake of valetkey's own has ended what it was doing"
        );
        ONE_MORE.notify_one();
    }));
}

/// How many there were.
pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Waits until there was one since this ended last. For one who waits.
pub async fn next() {
    ONE_MORE.notified().await;
}
