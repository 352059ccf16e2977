//! How long an upstream may take for the head of its response. What comes after it has no limit.

use std::time::Duration;

use tokio::sync::oneshot;

/// Longest wait for a head, counted from the end of the request's body. Three times the ten minutes that
/// OpenAI's own clients wait for an answer that is not streamed: only an upstream that never answers meets it.
pub(super) const HEAD_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Longest wait for the answer to a WebSocket handshake, for which nothing has to be thought through: twice
/// what the chain has for its tunnel.
pub(super) const UPGRADE_LIMIT: Duration = Duration::from_secs(60);

/// Waits for the outcome of sending a request whose body is over when `over` resolves (`None`: it has none).
/// `None` when the limit has passed since.
pub(super) async fn head<T>(
    over: Option<oneshot::Receiver<()>>,
    limit: Duration,
    sending: impl Future<Output = T> + Unpin,
) -> Option<T> {
    let late = async {
        if let Some(over) = over {
            // Its sender lives in the body, and goes with it.
            let _gone = over.await;
        }
        tokio::time::sleep(limit).await;
    };
    tokio::select! {
        biased;
        outcome = sending => Some(outcome),
        () = late => None,
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::pin::pin;

    use tokio::time::{Instant, advance};

    use super::*;
    use crate::tasks::Tasks;

    #[tokio::test(start_paused = true)]
    async fn the_wait_begins_when_the_body_is_over() {
        assert_eq!(head(None, HEAD_LIMIT, ready(1)).await, Some(1));
        let began = Instant::now();
        assert_eq!(head(None, HEAD_LIMIT, pin!(pending::<()>())).await, None);
        assert_eq!(began.elapsed(), HEAD_LIMIT);

        let (body, over) = oneshot::channel::<()>();
        let (began, waiting) =
            (Instant::now(), head(Some(over), HEAD_LIMIT, Box::pin(pending::<()>())));
        let waiting = Tasks::new().spawn(waiting);
        // A long upload is no fault of the upstream.
        advance(HEAD_LIMIT * 10).await;
        assert!(!waiting.is_finished());
        drop(body);
        assert_eq!(waiting.await.unwrap(), None);
        assert!(began.elapsed() >= HEAD_LIMIT * 11);
    }
}
