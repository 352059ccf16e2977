//! Ends connections from our side: when the proxy drains or is cut, and when a client is not let in any more.

use std::pin::Pin;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How long the connection of a client that is not let in any more has for its goodbyes.
pub(super) const PARTING: Duration = Duration::from_secs(1);

/// What ends all connections.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// Asks connections to end after the exchange that they are in, and closes WebSockets.
    pub(super) draining: CancellationToken,
    /// Ends what has not ended by itself.
    pub(super) cut: CancellationToken,
}

impl Closing {
    /// Runs a connection to its end; asks it to finish when the proxy drains, drops it when it cuts. When the client
    /// is not let in any more (`ended`) it has a moment to finish, in which its WebSockets are closed.
    pub(super) async fn drive<C, E>(
        &self,
        mut connection: Pin<&mut C>,
        ended: &CancellationToken,
        finish: impl Fn(Pin<&mut C>),
    ) where
        C: Future<Output = Result<(), E>>,
        E: std::fmt::Display,
    {
        let mut asked = false;
        let last_moment = async {
            ended.cancelled().await;
            tokio::time::sleep(PARTING).await;
        };
        let mut last_moment = std::pin::pin!(last_moment);
        loop {
            tokio::select! {
                outcome = connection.as_mut() => {
                    if let Err(error) = outcome {
                        tracing::debug!(%error, "connection ended");
                    }
                    return;
                }
                () = self.draining.cancelled(), if !asked => {
                    asked = true;
                    finish(connection.as_mut());
                }
                () = ended.cancelled(), if !asked => {
                    asked = true;
                    finish(connection.as_mut());
                }
                () = last_moment.as_mut() => return,
                () = self.cut.cancelled() => return,
            }
        }
    }
}
