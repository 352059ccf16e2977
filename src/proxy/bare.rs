//! Knows of a stream whether it is a bare TCP socket by now.

use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{client, server};
use tokio_util::either::Either;

use crate::upstream::early::Early;

/// A stream below which there may be nothing but a TCP socket.
pub(super) trait Bare {
    /// The socket, if whatever is read from this stream next is what is read from that, and whatever was written to it
    /// has been handed over. Once there, it stays the same.
    fn bare(&self) -> Option<&TcpStream>;
}

impl Bare for TcpStream {
    fn bare(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl Bare for UnixStream {
    fn bare(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S> Bare for Box<client::TlsStream<S>> {
    fn bare(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S> Bare for Box<server::TlsStream<S>> {
    fn bare(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S: Bare> Bare for Early<S> {
    fn bare(&self) -> Option<&TcpStream> {
        self.with_nothing_early()?.bare()
    }
}

impl<L: Bare, R: Bare> Bare for Either<L, R> {
    fn bare(&self) -> Option<&TcpStream> {
        match self {
            Self::Left(stream) => stream.bare(),
            Self::Right(stream) => stream.bare(),
        }
    }
}

#[cfg(test)]
impl Bare for tokio::io::DuplexStream {
    fn bare(&self) -> Option<&TcpStream> {
        None
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    #[tokio::test]
    async fn a_socket_is_bare_when_nothing_early_is_left() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        let mut stream: Early<Either<TcpStream, UnixStream>> =
            Early::new(Bytes::from_static(b"ab"), Either::Left(stream));
        for _ in 0..2 {
            assert!(stream.bare().is_none());
            stream.read_u8().await.unwrap();
        }
        assert!(stream.bare().is_some());
        let (near, _far) = UnixStream::pair().unwrap();
        let stream: Either<TcpStream, UnixStream> = Either::Right(near);
        assert!(stream.bare().is_none());
    }
}
