//! Spawns every task of the program, so that shutdown can wait for them, and what may block for ever, which nobody waits for.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

/// Runs a job that may block for ever on a thread of its own, which nobody waits for: neither shutdown nor
/// the end of the program. The receiver is closed without a word if the job panics.
///
/// # Errors
///
/// Those of the system when it gives no thread.
#[expect(clippy::disallowed_methods, reason = "the one home of spawning")]
pub fn detached<T: Send + 'static>(
    name: &str,
    job: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<oneshot::Receiver<T>> {
    let (done, result) = oneshot::channel();
    // A receiver that is gone wants no answer.
    let run = move || drop(done.send(job()));
    std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(result)
}

/// A set of tasks that ends together. Clones are the same set.
///
/// The program keeps several, by who waits for them: connections, which shutdown may cut after a deadline;
/// refreshes, which it must wait for; and what nobody waits for, because it never ends by itself.
#[derive(Clone, Debug, Default)]
pub struct Tasks(TaskTracker);

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task. Dropping the handle leaves the task running.
    #[expect(clippy::disallowed_methods, reason = "the one home of spawning")]
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        tokio::spawn(self.0.track_future(future))
    }

    /// Keeps a job going that lasts as long as its owner: one that panics begins anew, after a second. Once it returns it is
    /// over.
    pub fn keep<F>(&self, name: &'static str, mut begin: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(async move {
            while AssertUnwindSafe(begin()).catch_unwind().await.is_err() {
                tracing::error!(job = name, "it begins anew");
                tokio::time::sleep(PAUSE).await;
            }
        });
    }

    /// Runs a short blocking job (a file, a lock) off the runtime's threads.
    #[expect(clippy::disallowed_methods, reason = "the one home of spawning")]
    pub fn spawn_blocking<F, T>(&self, job: F) -> JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let token = self.0.token();
        tokio::task::spawn_blocking(move || {
            let _running = token;
            job()
        })
    }

    /// Waits until no task is left. Tasks may still be added meanwhile, and are waited for too.
    pub async fn finished(&self) {
        self.0.close();
        self.0.wait().await;
    }

    /// How many tasks are running.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// How long a job rests that has panicked: one that always does costs little, and nobody waits long for one that does not.
const PAUSE: Duration = Duration::from_secs(1);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.spawn(future);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_begins_anew_until_it_returns() {
        let (tasks, began) = (Tasks::new(), Arc::new(AtomicUsize::new(0)));
        let beginning = began.clone();
        tasks.keep("a test", move || {
            let number = beginning.fetch_add(1, Ordering::Relaxed);
            async move { assert!(number >= 2, "as the test has it") }
        });
        tasks.finished().await;
        assert_eq!(began.load(Ordering::Relaxed), 3);
    }
}
