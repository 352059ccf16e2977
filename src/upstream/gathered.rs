//! A future that lets others go first, so that what they have for it is done in one go.

use std::pin::Pin;
use std::task::{Context, Poll};

/// Whatever wakes it, it is polled one turn later if there is a crowd: the tasks that were ready by then have had theirs.
/// For a connection that many streams write on: without it each of them would be a system call of its own, as tokio runs
/// whom a task wakes directly after that task. One alone loses no time.
pub struct Gathered<F, C> {
    inner: F,
    is_crowd: C,
    has_waited: bool,
}

impl<F, C> Gathered<F, C> {
    /// The same future, a turn later whenever `is_crowd` says so.
    pub fn new(inner: F, is_crowd: C) -> Self {
        Self { inner, is_crowd, has_waited: false }
    }

    /// The future itself.
    pub fn get_mut(&mut self) -> &mut F {
        &mut self.inner
    }
}

impl<F: Future + Unpin, C: Fn() -> bool + Unpin> Future for Gathered<F, C> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        this.has_waited = !this.has_waited && (this.is_crowd)();
        if this.has_waited {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut this.inner).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn in_a_crowd_it_is_polled_a_turn_later() {
        let (polls, is_crowd) = (Cell::new(0), Cell::new(false));
        let counting = poll_fn(|_| {
            polls.set(polls.get() + 1);
            Poll::<()>::Pending
        });
        let mut gathered = Gathered::new(counting, || is_crowd.get());
        for (crowd, expected) in
            [(false, 1), (false, 2), (true, 2), (true, 3), (true, 3), (false, 4)]
        {
            is_crowd.set(crowd);
            assert!(poll!(&mut gathered).is_pending());
            assert_eq!(polls.get(), expected, "{crowd}");
        }
        is_crowd.set(true);
        // It asks for that turn by itself.
        let turns = async {
            while polls.get() < 5 {
                tokio::task::yield_now().await
            }
        };
        let gathered = poll_fn(|cx| Pin::new(&mut gathered).poll(cx));
        tokio::select! {
            () = gathered => unreachable!("it never ends"),
            () = turns => {}
        }
    }
}
