//! An upstream that the test plays itself, at a host with a rule.

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use valetkey::sandbox::Settings;

use super::support::{Options, Scene, within};
use super::wire::Wire;

/// The host that the peer plays.
pub(crate) const PEER: &str = "peer.example.com:443";

pub(crate) struct Peer {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Peer {
    /// A scene with a peer in it that speaks this protocol.
    pub(crate) async fn scene(alpn: &[&[u8]]) -> (Scene, Self) {
        Self::at("peer.example.com", alpn).await
    }

    /// The same in the place of another host.
    pub(crate) async fn at(host: &str, alpn: &[&[u8]]) -> (Scene, Self) {
        Self::ruled(host, alpn, "").await
    }

    /// The same with more in the rule.
    pub(crate) async fn ruled(host: &str, alpn: &[&[u8]], more: &str) -> (Scene, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peers = vec![(host.to_owned(), listener.local_addr().unwrap())];
        let rules =
            format!("[[rules]]\nhost = \"peer.example.com\"\ncredential = \"example\"\n{more}\n");
        let settings = Settings { peers, ..Settings::default() };
        let scene = Scene::start(Options { rules, settings, ..Options::default() }).await;
        let acceptor = scene.world.acceptor(alpn).unwrap();
        (scene, Self { listener, acceptor })
    }

    /// The next connection of the proxy's.
    pub(crate) async fn accept(&self) -> TlsStream<TcpStream> {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        within(self.acceptor.accept(stream)).await.unwrap()
    }

    /// Has no protocol in common with the next connection.
    pub(crate) async fn disagree(&self) {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        assert!(within(self.acceptor.accept(stream)).await.is_err());
    }

    /// The next connection, on which HTTP/2 has begun with these SETTINGS.
    pub(crate) async fn accept_wire(&self, settings: &[u8]) -> Wire<TlsStream<TcpStream>> {
        within(Wire::server(self.accept().await, settings)).await.unwrap()
    }
}
