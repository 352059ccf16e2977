//! A future that lets others go first, so that what they have for it is done in one go.

use std::pin::Pin;
use std::task::{Context, Poll};

/// Whatever wakes it, it is polled one turn later: the tasks that were ready by then have had theirs. For a connection
/// that many streams write on: without it each of them would be a system call of its own, as tokio runs whom a task wakes
/// directly after that task.
pub struct Gathered<F> {
    inner: F,
    has_waited: bool,
}

impl<F> Gathered<F> {
    /// The same future, a turn later each time.
    pub fn new(inner: F) -> Self {
        Self { inner, has_waited: false }
    }

    /// The future itself.
    pub fn get_mut(&mut self) -> &mut F {
        &mut self.inner
    }
}

impl<F: Future + Unpin> Future for Gathered<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        this.has_waited = !this.has_waited;
        if this.has_waited {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut this.inner).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::task::AtomicWaker;

    use super::*;
    use crate::tasks::Tasks;

    #[tokio::test]
    async fn what_many_tasks_have_for_it_is_done_in_one_go() {
        let (todo, rounds) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let waker = Arc::<AtomicWaker>::default();
        let (tasks, ours) = (Tasks::new(), (todo.clone(), rounds.clone(), waker.clone()));
        let doing = poll_fn(move |cx| {
            let (todo, rounds, waker) = &ours;
            waker.register(cx.waker());
            if todo.swap(0, Ordering::Relaxed) > 0 {
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Poll::<()>::Pending
        });
        let doing = tasks.spawn(Gathered::new(doing));
        tokio::task::yield_now().await;
        for _ in 0..16 {
            let (todo, waker) = (todo.clone(), waker.clone());
            tasks.spawn(async move {
                todo.fetch_add(1, Ordering::Relaxed);
                waker.wake();
            });
        }
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        assert_eq!(rounds.load(Ordering::Relaxed), 1);
        doing.abort();
    }
}
