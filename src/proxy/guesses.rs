//! Holds passes that do not count against whoever shows them, so that trying many costs little and harms nobody else.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::listener::Client;
use crate::limits::WRONG_PASSES_IN;

/// Whom it is held against: all that one user, or one machine, sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// A user of this machine, where the kernel tells which.
    User(u32),
    /// A machine: an address, or in IPv6 all those of its network, of which it has as many as it likes (RFC 4291 section
    /// 2.5.4).
    Machine(IpAddr),
    /// Somebody at a Unix socket of whom nothing is known.
    Unknown,
}

impl Caller {
    /// The one at the other end, with its user where that is known.
    pub(super) fn of(client: Client, uid: Option<u32>) -> Self {
        match (uid, client) {
            (Some(uid), _) => Self::User(uid),
            (None, Client::Tcp { peer, .. }) => Self::Machine(match peer.ip().to_canonical() {
                IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
                ip => ip,
            }),
            (None, Client::Unix { .. }) => Self::Unknown,
        }
    }
}

/// The passes that did not count of late.
#[derive(Debug, Default)]
pub(super) struct Guesses(Mutex<HashMap<Caller, Recent>>);

#[derive(Clone, Copy, Debug)]
struct Recent {
    /// When the first of them was shown.
    since: Instant,
    count: u32,
}

impl Recent {
    fn is_over(&self) -> bool {
        self.since.elapsed() >= WRONG_PASSES_IN
    }
}

impl Guesses {
    /// Whether a caller has shown as many as it may.
    pub(super) fn are_too_many(&self, caller: Caller, most: u32) -> bool {
        self.recent().get(&caller).is_some_and(|recent| recent.count >= most && !recent.is_over())
    }

    /// Counts one more.
    pub(super) fn add(&self, caller: Caller) {
        let mut recent = self.recent();
        if !recent.contains_key(&caller) && recent.len() >= MOST_CALLERS {
            make_room(&mut recent);
        }
        let new = Recent { since: Instant::now(), count: 0 };
        let of_caller = recent.entry(caller).or_insert(new);
        if of_caller.is_over() {
            *of_caller = new;
        }
        of_caller.count = of_caller.count.saturating_add(1);
    }

    fn recent(&self) -> MutexGuard<'_, HashMap<Caller, Recent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_room(recent: &mut HashMap<Caller, Recent>) {
    recent.retain(|_, recent| !recent.is_over());
    if recent.len() >= MOST_CALLERS
        && let Some(oldest) = recent.iter().min_by_key(|(_, recent)| recent.since)
    {
        let oldest = *oldest.0;
        recent.remove(&oldest);
    }
}

/// Whom something is held against at one time: more machines than a proxy has clients, in some 50 KiB.
const MOST_CALLERS: usize = 1024;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn machine(number: u32) -> Caller {
        Caller::Machine(std::net::Ipv4Addr::from_bits(number).into())
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_held_against_one_caller_for_a_while() {
        let guesses = Guesses::default();
        for _ in 0..3 {
            assert!(!guesses.are_too_many(machine(1), 3));
            guesses.add(machine(1));
        }
        assert!(guesses.are_too_many(machine(1), 3));
        assert!(!guesses.are_too_many(machine(2), 3));
        tokio::time::advance(WRONG_PASSES_IN - Duration::from_millis(1)).await;
        assert!(guesses.are_too_many(machine(1), 3));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!guesses.are_too_many(machine(1), 3));
        guesses.add(machine(1));
        assert!(!guesses.are_too_many(machine(1), 3), "it is counted anew");
    }

    #[tokio::test(start_paused = true)]
    async fn many_callers_take_no_more_room() {
        let guesses = Guesses::default();
        for number in 0..5_000 {
            tokio::time::advance(Duration::from_millis(1)).await;
            guesses.add(machine(number));
        }
        assert_eq!(guesses.recent().len(), MOST_CALLERS);
        assert!(guesses.are_too_many(machine(4_999), 1));
        assert!(!guesses.are_too_many(machine(0), 1));
    }

    #[test]
    fn who_is_one_caller() {
        let at = |ip: &str, port| Client::Tcp {
            peer: (ip.parse::<IpAddr>().unwrap(), port).into(),
            own: ([127, 0, 0, 1], 1).into(),
        };
        let same = |one, other| Caller::of(one, None) == Caller::of(other, None);
        assert!(same(at("192.0.2.1", 1), at("192.0.2.1", 2)));
        assert!(same(at("192.0.2.1", 1), at("::ffff:192.0.2.1", 1)));
        assert!(!same(at("192.0.2.1", 1), at("192.0.2.2", 1)));
        assert!(same(at("2001:db8::1", 1), at("2001:db8::ffff:1", 1)));
        assert!(!same(at("2001:db8::1", 1), at("2001:db8:0:1::1", 1)));
        let by_user = Caller::of(at("127.0.0.1", 1), Some(1000));
        assert_eq!(by_user, Caller::of(Client::Unix { uid: Some(1000) }, Some(1000)));
    }
}
