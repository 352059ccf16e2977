//! Keeps clients to as many as there is room for: all of them, and those that have not been let in yet.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The places for clients. How many there are is told with each question, so that it may change.
#[derive(Debug, Default)]
pub(super) struct Places {
    taken: AtomicUsize,
    freed: Notify,
}

/// One client's place, until it is dropped. Whatever outlives the client's connection holds it too.
#[derive(Debug)]
pub(super) struct Place(Arc<Places>);

impl Places {
    /// A place, if fewer than `most` are taken.
    pub(super) fn try_take(self: &Arc<Self>, most: usize) -> Option<Place> {
        let more = |taken| (taken < most).then_some(taken + 1);
        let took = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        took.is_ok().then(|| Place(self.clone()))
    }

    /// Waits for a place. `most` is asked whenever one has become free, and after [`Places::look_again`].
    pub(super) async fn take(self: &Arc<Self>, most: impl Fn() -> usize) -> Place {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(place) = self.try_take(most()) {
                return place;
            }
            freed.await;
        }
    }

    /// There may be more of them than before.
    pub(super) fn look_again(&self) {
        self.freed.notify_waiters();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.look_again();
    }
}

/// The strangers at the doors, the one that has waited longest first.
#[derive(Debug, Default)]
pub(super) struct Strangers(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    waiting: VecDeque<(u64, CancellationToken)>,
}

/// A client in its time as a stranger.
#[derive(Debug)]
pub(super) struct Waiting {
    strangers: Arc<Strangers>,
    number: u64,
    given_up: CancellationToken,
}

impl Strangers {
    /// One more of them. If that is more than `most`, those that have waited longest are given up: a client with a pass
    /// shows it at once, and one that only wants to hold a place has held it long enough.
    pub(super) fn enter(self: &Arc<Self>, most: usize) -> Waiting {
        let given_up = CancellationToken::new();
        let mut queue = self.queue();
        let number = queue.next;
        queue.next += 1;
        queue.waiting.push_back((number, given_up.clone()));
        while queue.waiting.len() > most.max(1) {
            if let Some((_, oldest)) = queue.waiting.pop_front() {
                oldest.cancel();
            }
        }
        drop(queue);
        Waiting { strangers: self.clone(), number, given_up }
    }

    /// Has the one that has waited longest give its place to somebody who has none.
    pub(super) fn make_room(&self) {
        if let Some((_, oldest)) = self.queue().waiting.pop_front() {
            oldest.cancel();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// It is a stranger no more.
    pub(super) fn end(&self) {
        let mut queue = self.strangers.queue();
        if let Ok(at) = queue.waiting.binary_search_by_key(&self.number, |(number, _)| *number) {
            queue.waiting.remove(at);
        }
    }

    /// Cancelled when another takes its place.
    pub(super) fn given_up(&self) -> &CancellationToken {
        &self.given_up
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_place_is_waited_for() {
        let places = Arc::new(Places::default());
        let (first, second) = (places.try_take(2).unwrap(), places.try_take(2).unwrap());
        assert!(places.try_take(2).is_none());
        let mut waits = Box::pin(places.take(|| 2));
        assert!(waits.as_mut().now_or_never().is_none());
        drop(first);
        let third = waits.await;
        assert!(places.try_take(2).is_none());
        assert!(places.try_take(3).is_some(), "there may be more than before");
        drop((second, third));
        assert_eq!(places.taken.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn fewer_places_than_clients_send_nobody_away() {
        let places = Arc::new(Places::default());
        let held: Vec<Place> = (0..3).map(|_| places.try_take(3).unwrap()).collect();
        let mut waits = Box::pin(places.take(|| 1));
        for place in held {
            assert!(waits.as_mut().now_or_never().is_none());
            drop(place);
        }
        assert!(waits.now_or_never().is_some());
    }

    #[test]
    fn the_stranger_that_has_waited_longest_makes_room() {
        let strangers = Arc::new(Strangers::default());
        let [first, second, third] = std::array::from_fn(|_| strangers.enter(3));
        second.end();
        let fourth = strangers.enter(3);
        let given_up = |all: &[&Waiting]| -> Vec<bool> {
            all.iter().map(|waiting| waiting.given_up().is_cancelled()).collect()
        };
        assert_eq!(given_up(&[&first, &second, &third, &fourth]), [false; 4]);
        let fifth = strangers.enter(3);
        let all = [&first, &second, &third, &fourth, &fifth];
        assert_eq!(given_up(&all), [true, false, false, false, false]);
        drop((third, fourth));
        let _sixth = strangers.enter(2);
        assert!(!fifth.given_up().is_cancelled());
        drop(fifth);
        assert_eq!(strangers.queue().waiting.len(), 1);
    }
}
