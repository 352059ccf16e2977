//! Tells those who go on using a credential that its login has been forbidden.

use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// Holds the token of the login in force. It is never a cancelled one.
#[derive(Default)]
pub(super) struct Forbidden(Mutex<CancellationToken>);

impl Forbidden {
    /// Cancelled when the login that is in force now is forbidden.
    pub(super) fn token(&self) -> CancellationToken {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells all who hold the token, and puts a new one in its place for a login that may come.
    pub(super) fn forbid(&self) {
        let old = {
            let mut token = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *token)
        };
        // Cancelling wakes others, who may ask for the new one at once.
        old.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_forbidden_and_the_next_one_is_not() {
        let forbidden = Forbidden::default();
        let (first, again) = (forbidden.token(), forbidden.token());
        forbidden.forbid();
        assert!(first.is_cancelled() && again.is_cancelled());
        let second = forbidden.token();
        assert!(!second.is_cancelled());
        forbidden.forbid();
        assert!(second.is_cancelled());
    }
}
