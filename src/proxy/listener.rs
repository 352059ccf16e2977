//! Accepts clients, and goes on accepting whatever goes wrong.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

/// Where clients are heard.
#[derive(Debug)]
pub enum Socket {
    /// At an address.
    Tcp(TcpListener),
    /// At a file.
    Unix(UnixListener),
}

/// A client's bytes as they come from the system.
pub(super) type RawStream = Either<TcpStream, UnixStream>;

/// A client's bytes as HTTP is spoken in them: those of a listener with TLS are inside it.
pub(super) type ClientStream = Either<RawStream, Box<TlsStream<RawStream>>>;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Client {
    /// At an address.
    Tcp {
        /// Its own.
        peer: SocketAddr,
        /// The one of ours that it has connected to.
        own: SocketAddr,
    },
    /// At a file.
    Unix {
        /// Its user, as the kernel has it (unix(7), `SO_PEERCRED`).
        uid: Option<u32>,
    },
}

/// How long accepting rests when it fails, so that running out of descriptors does not become a
/// spinning loop: long enough for some connection to end, short enough to go unnoticed.
const REST: Duration = Duration::from_millis(50);

impl Socket {
    /// The address, where it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// The next client. Never fails: errors of `accept` concern a client that is gone, or a lack that
    /// passes.
    pub(super) async fn accept(&self) -> (RawStream, Client) {
        let mut has_failed = false;
        loop {
            match self.try_accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    // What lasts is said once.
                    if !has_failed {
                        tracing::warn!(%error, "accept failed; it is tried again until it works");
                    }
                    has_failed = true;
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }

    async fn try_accept(&self) -> io::Result<(RawStream, Client)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Without it every new connection waits 40 ms for a delayed acknowledgement.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "nodelay");
                }
                // The listener may be at any address of this machine, the client has come to one.
                let own = stream.local_addr()?;
                Ok((Either::Left(stream), Client::Tcp { peer, own }))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                Ok((Either::Right(stream), Client::Unix { uid }))
            }
        }
    }
}

impl Client {
    /// The address of ours that it has connected to.
    pub(super) fn own(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp { own, .. } => Some(*own),
            Self::Unix { .. } => None,
        }
    }
}
