//! Accepts clients, and goes on accepting whatever goes wrong.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

/// How long accepting rests when it fails, so that running out of descriptors does not become a
/// spinning loop: long enough for some connection to end, short enough to go unnoticed.
const REST: Duration = Duration::from_millis(50);

/// The next client. Never fails: errors of `accept` concern a client that is gone, or a lack that
/// passes.
pub(super) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Without it every new connection waits 40 ms for a delayed acknowledgement.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "nodelay");
                }
                return (stream, peer);
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(REST).await;
            }
        }
    }
}
