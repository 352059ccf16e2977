//! Waits for the lock of a file, but not for ever.

use std::fs::{File, TryLockError};
use std::io;
use std::time::{Duration, Instant};

/// Locks a file for this process alone, and waits `limit` for that at most, so that a stopped process which holds the lock
/// cannot stop this one. Whether it is locked. It holds up the thread.
///
/// # Errors
///
/// Those of the system, which says nothing of who holds it.
pub fn wait(file: &File, limit: Duration) -> io::Result<bool> {
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if began.elapsed() >= limit => return Ok(false),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
        }
    }
}

/// How often a lock that is held is tried again: the system tells only whoever waits for ever that it is free. Others hold it
/// for a write or two.
const LOCK_POLL: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_while_somebody_holds_it_and_no_longer_than_said() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (file, holder) = (path.reopen().unwrap(), path.reopen().unwrap());
        holder.lock().unwrap();
        assert!(!wait(&file, LOCK_POLL * 2).unwrap());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&file, Duration::from_secs(600)));
            holder.unlock().unwrap();
            assert!(waiting.join().unwrap().unwrap());
        });
        assert!(!wait(&holder, Duration::ZERO).unwrap());
    }
}
