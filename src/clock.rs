//! Tells the time, so that tests can turn it; the only reader of the system's wall clock.

use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;

/// Wall clock and monotonic clock of one process. Clones share the offset.
///
/// The offset is zero in production; tests move it with [`Clock::advance`].
#[derive(Clone, Debug, Default)]
pub struct Clock {
    offset_ms: Arc<AtomicI64>,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// Wall-clock time, UTC.
    #[expect(clippy::disallowed_methods, reason = "the one home of the wall clock")]
    pub fn now(&self) -> OffsetDateTime {
        let offset = time::Duration::milliseconds(self.offset_ms.load(Ordering::Relaxed));
        OffsetDateTime::from(SystemTime::now()) + offset
    }

    /// Time for measuring how long something took or how old it is, the sleep of the machine included; never goes
    /// backwards, except in a test that turns the clock back.
    pub fn instant(&self) -> Instant {
        let now = instant();
        let offset = self.offset_ms.load(Ordering::Relaxed);
        let distance = Duration::from_millis(offset.unsigned_abs());
        if offset < 0 { now.checked_sub(distance).unwrap_or(now) } else { now + distance }
    }

    /// Turns both clocks, for tests: positive is into the future.
    pub fn advance(&self, by: time::Duration) {
        let by = i64::try_from(by.whole_milliseconds()).unwrap_or(i64::MAX);
        self.offset_ms.fetch_add(by, Ordering::Relaxed);
    }
}

/// Now, in a count that goes on while the machine sleeps: on Linux that of [`Instant`] stands still meanwhile
/// (clock_gettime(2), `CLOCK_MONOTONIC`), so that what was there before a night seems as new as it was.
#[cfg(target_os = "linux")]
pub fn instant() -> Instant {
    use rustix::time::{ClockId, clock_gettime};
    static BEGAN: OnceLock<(Instant, Duration)> = OnceLock::new();
    let since_boot = || Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default();
    let (began, then) = BEGAN.get_or_init(|| (Instant::now(), since_boot()));
    *began + since_boot().saturating_sub(*then)
}

/// Now, in a count that never goes backwards.
#[cfg(not(target_os = "linux"))]
pub fn instant() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_turn_together() {
        let clock = Clock::system();
        let (before, started) = (clock.clone().now(), clock.instant());
        let clone = clock.clone();
        clone.advance(time::Duration::hours(2));
        assert!(clock.now() - before >= time::Duration::hours(2));
        assert!(clock.instant() - started >= Duration::from_secs(7200));
    }
}
