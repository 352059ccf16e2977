//! Knows of a stream whether it is a bare TCP socket by now.

use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{client, server};
use tokio_util::either::Either;

use crate::upstream::early::Early;

/// A stream below which there may be nothing but a TCP socket.
pub(super) trait Plain {
    /// The socket, if whatever is read from this stream next is what is read from that, and whatever was written to it
    /// has been handed over. Once there, it stays the same.
    fn plain(&self) -> Option<&TcpStream>;
}

impl Plain for TcpStream {
    fn plain(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl Plain for UnixStream {
    fn plain(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S> Plain for Box<client::TlsStream<S>> {
    fn plain(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S> Plain for Box<server::TlsStream<S>> {
    fn plain(&self) -> Option<&TcpStream> {
        None
    }
}

impl<S: Plain> Plain for Early<S> {
    fn plain(&self) -> Option<&TcpStream> {
        self.with_nothing_early()?.plain()
    }
}

impl<L: Plain, R: Plain> Plain for Either<L, R> {
    fn plain(&self) -> Option<&TcpStream> {
        match self {
            Self::Left(stream) => stream.plain(),
            Self::Right(stream) => stream.plain(),
        }
    }
}

#[cfg(test)]
impl Plain for tokio::io::DuplexStream {
    fn plain(&self) -> Option<&TcpStream> {
        None
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_bare_when_nothing_early_is_left() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        let mut stream: Early<Either<TcpStream, UnixStream>> =
            Early::new(Bytes::from_static(b"ab"), Either::Left(stream));
        for _ in 0..2 {
            assert!(stream.plain().is_none());
            stream.read_u8().await.unwrap();
        }
        assert!(stream.plain().is_some());
        let (near, _far) = UnixStream::pair().unwrap();
        let stream: Either<TcpStream, UnixStream> = Either::Right(near);
        assert!(stream.plain().is_none());
    }
}
