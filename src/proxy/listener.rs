//! Accepts clients, and goes on accepting whatever goes wrong.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle};
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

/// When a client of another machine is asked whether it is still there that has been silent: as upstreams are
/// (`upstream/dial.rs`). One that has lost its network would keep its place, and what is open for it, for ever.
const KEEPALIVE: Duration = Duration::from_secs(60);

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
                if let Err(error) = prepare(&stream, peer) {
                    tracing::debug!(%error, "options of a socket");
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

fn prepare(stream: &TcpStream, peer: SocketAddr) -> io::Result<()> {
    // Without it every new connection waits 40 ms for a delayed acknowledgement.
    stream.set_nodelay(true)?;
    // Nobody on this machine goes without the system's saying so.
    if !peer.ip().to_canonical().is_loopback() {
        set_socket_keepalive(stream, true)?;
        set_tcp_keepidle(stream, KEEPALIVE)?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::{socket_keepalive, tcp_keepidle};

    use super::*;

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    async fn who_comes_from_another_machine_is_asked_whether_it_is_there() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap();
        for (peer, is_asked) in [
            ("127.0.0.1:4000", false),
            ("[::1]:4000", false),
            ("[::ffff:127.0.0.1]:4000", false),
            ("192.0.2.1:4000", true),
            ("[2001:db8::1]:4000", true),
        ] {
            let stream = std::net::TcpStream::connect(own).unwrap();
            stream.set_nonblocking(true).unwrap();
            let stream = TcpStream::from_std(stream).unwrap();
            prepare(&stream, peer.parse().unwrap()).unwrap();
            assert_eq!(socket_keepalive(&stream).unwrap(), is_asked, "{peer}");
            let has_time = tcp_keepidle(&stream).unwrap() == KEEPALIVE;
            assert_eq!(has_time, is_asked, "{peer}");
            assert!(stream.nodelay().unwrap(), "{peer}");
        }
    }
}
