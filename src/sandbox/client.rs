//! A client as tools are: it goes through a proxy, trusts a file of roots, and holds no credential.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{HOST, HeaderValue, PROXY_AUTHORIZATION};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::kx_group::X25519;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::tasks::Tasks;
use crate::tls::{pem, provider};

/// A body that this client sends.
pub type ClientBody = UnsyncBoxBody<Bytes, io::Error>;

/// Where and how to connect.
#[derive(Clone, Copy, Debug)]
pub struct Visit<'a> {
    /// What CONNECT asks for, as it is spelled; without a proxy it is only the server's name.
    pub target: &'a str,
    /// The name in the TLS greeting; `None` greets without one.
    pub name: Option<&'a str>,
    /// The protocols offered; empty offers no ALPN.
    pub alpn: &'a [&'a [u8]],
}

/// HTTP/2 alone.
pub const HTTP2: &[&[u8]] = &[b"h2"];

/// HTTP/1.1 alone.
pub const HTTP1: &[&[u8]] = &[b"http/1.1"];

impl<'a> Visit<'a> {
    /// A well-behaved visit to a host at port 443, as `host:443`.
    pub fn to(target: &'a str, alpn: &'a [&'a [u8]]) -> Self {
        Self { target, name: target.rsplit_once(':').map(|(host, _)| host), alpn }
    }
}

/// Opens connections through a proxy, or straight to one address.
#[derive(Clone)]
pub struct Client {
    address: SocketAddr,
    is_proxy: bool,
    roots: Arc<RootCertStore>,
    /// What all connections have in common.
    tls: Arc<ClientConfig>,
    /// Whether a connection knows the TLS sessions of those before it.
    resumes: bool,
    tasks: Tasks,
    /// What is shown to the proxy.
    authorization: Option<HeaderValue>,
}

impl Client {
    /// A client of the proxy at `proxy` that trusts the roots in the PEM file `roots`.
    ///
    /// # Errors
    ///
    /// Those of reading the file.
    pub fn through(proxy: SocketAddr, roots: &Path) -> io::Result<Self> {
        let mut store = RootCertStore::empty();
        let bundle = pem::read(&std::fs::read(roots)?).map_err(io::Error::other)?;
        for root in bundle.certificates {
            store.add(root).map_err(io::Error::other)?;
        }
        let (roots, tasks) = (Arc::new(store), Tasks::new());
        let tls = Arc::new(client_config(provider(), roots.clone())?);
        let (is_proxy, resumes, authorization) = (true, false, None);
        Ok(Self { address: proxy, is_proxy, roots, tls, resumes, tasks, authorization })
    }

    /// The same client, which shows the proxy this in `Proxy-Authorization`.
    #[must_use]
    pub fn showing(&self, authorization: HeaderValue) -> Self {
        Self { authorization: Some(authorization), ..self.clone() }
    }

    /// The same client of another proxy.
    #[must_use]
    pub fn of(&self, proxy: SocketAddr) -> Self {
        Self { address: proxy, ..self.clone() }
    }

    /// A client that connects to `server` whatever host it visits.
    ///
    /// # Errors
    ///
    /// Those of reading the file.
    pub fn straight_to(server: SocketAddr, roots: &Path) -> io::Result<Self> {
        Ok(Self { is_proxy: false, ..Self::through(server, roots)? })
    }

    /// The same client, which from now on resumes the TLS sessions that it has had.
    #[must_use]
    pub fn resuming(&self) -> Self {
        let mut tls = ClientConfig::clone(&self.tls);
        tls.resumption = Resumption::default();
        Self { tls: Arc::new(tls), resumes: true, ..self.clone() }
    }

    /// The same client, which agrees on keys over X25519 alone, as programs do whose TLS knows nothing newer.
    ///
    /// # Errors
    ///
    /// TLS cannot be set up.
    pub fn with_x25519(&self) -> io::Result<Self> {
        let mut provider = CryptoProvider::clone(&provider());
        provider.kx_groups = vec![X25519];
        let tls = client_config(Arc::new(provider), self.roots.clone())?;
        Ok(Self { tls: Arc::new(tls), ..self.clone() })
    }

    /// Sends one request on a connection of its own.
    ///
    /// # Errors
    ///
    /// Those of the connection; [`Refused`] inside when the proxy did not open the tunnel.
    pub async fn send(
        &self,
        visit: Visit<'_>,
        request: Request<ClientBody>,
    ) -> io::Result<Response<Incoming>> {
        self.open(visit).await?.send(request).await
    }

    /// Sends a GET and gathers the answer.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub async fn get(&self, visit: Visit<'_>, path: &str) -> io::Result<Response<Bytes>> {
        gather(self.send(visit, get(path)).await?).await
    }

    /// Opens a connection on which HTTP is spoken.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub async fn open(&self, visit: Visit<'_>) -> io::Result<Connection> {
        let tls = self.greet(visit).await?;
        let authority = visit.target.strip_suffix(":443").unwrap_or(visit.target).to_owned();
        if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
            let (sender, driver) = http2::Builder::new(self.tasks.clone())
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(4 << 20)
                .handshake(TokioIo::new(tls))
                .await
                .map_err(io::Error::other)?;
            self.tasks.spawn(driver);
            return Ok(Connection { sender: Sender::Http2(sender), authority });
        }
        let (sender, driver) =
            http1::handshake(TokioIo::new(tls)).await.map_err(io::Error::other)?;
        self.tasks.spawn(driver.with_upgrades());
        Ok(Connection { sender: Sender::Http1(sender), authority })
    }

    /// Opens a tunnel and ends the TLS handshake in it.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub async fn greet(&self, visit: Visit<'_>) -> io::Result<TlsStream<TcpStream>> {
        let stream = match self.is_proxy {
            true => self.tunnel(visit.target).await?,
            false => self.dial().await?,
        };
        let mut config = ClientConfig::clone(&self.tls);
        if !self.resumes {
            config.resumption = Resumption::default();
        }
        config.alpn_protocols = visit.alpn.iter().map(|name| name.to_vec()).collect();
        config.enable_sni = visit.name.is_some();
        let host = visit.target.rsplit_once(':').map_or(visit.target, |(host, _)| host);
        let name = visit.name.unwrap_or(host).trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    /// Asks the proxy for a tunnel.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub async fn tunnel(&self, target: &str) -> io::Result<TcpStream> {
        let (mut sender, driver) =
            http1::handshake(TokioIo::new(self.dial().await?)).await.map_err(io::Error::other)?;
        self.tasks.spawn(driver.with_upgrades());
        let uri = Uri::builder().authority(target).build().map_err(io::Error::other)?;
        let mut request = Request::new(empty());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        let host = HeaderValue::from_str(target).map_err(io::Error::other)?;
        request.headers_mut().insert(HOST, host);
        if let Some(shown) = &self.authorization {
            request.headers_mut().insert(PROXY_AUTHORIZATION, shown.clone());
        }
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        if response.status() != StatusCode::OK {
            return Err(io::Error::other(Refused(Box::new(gather(response).await?))));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(io::Error::other)?;
        let parts = upgraded.downcast::<TokioIo<TcpStream>>();
        let parts = parts.map_err(|_| io::Error::other("another stream came back"))?;
        Ok(parts.io.into_inner())
    }

    #[expect(clippy::disallowed_methods, reason = "the sandbox plays the client")]
    async fn dial(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

#[expect(clippy::disallowed_methods, reason = "the sandbox plays the client")]
fn client_config(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
) -> io::Result<ClientConfig> {
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A proxy's answer that opened no tunnel.
#[derive(Debug, thiserror::Error)]
#[error("the proxy answered {} instead of opening a tunnel", .0.status())]
pub struct Refused(pub Box<Response<Bytes>>);

/// One connection to a host.
pub struct Connection {
    sender: Sender,
    authority: String,
}

enum Sender {
    Http1(http1::SendRequest<ClientBody>),
    Http2(http2::SendRequest<ClientBody>),
}

impl Connection {
    /// Whether HTTP/2 is spoken.
    pub fn is_http2(&self) -> bool {
        matches!(self.sender, Sender::Http2(_))
    }

    /// Another hold on the same connection; `None` on HTTP/1.1, which takes one request at a time.
    pub fn share(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        let sender = Sender::Http2(sender.clone());
        Some(Self { sender, authority: self.authority.clone() })
    }

    /// Sends a request. `Host` or the authority are filled in where the request has none.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub async fn send(
        &mut self,
        mut request: Request<ClientBody>,
    ) -> io::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                if !request.headers().contains_key(HOST) {
                    let host = HeaderValue::from_str(&self.authority).map_err(io::Error::other)?;
                    request.headers_mut().insert(HOST, host);
                }
                sender.ready().await.map_err(io::Error::other)?;
                sender.send_request(request).await.map_err(io::Error::other)
            }
            Sender::Http2(sender) => {
                *request.version_mut() = Version::HTTP_2;
                if request.uri().authority().is_none() {
                    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
                    *request.uri_mut() = format!("https://{}{path}", self.authority)
                        .parse()
                        .map_err(io::Error::other)?;
                }
                sender.clone().send_request(request).await.map_err(io::Error::other)
            }
        }
    }

    /// Sends a GET and gathers the answer.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub async fn get(&mut self, path: &str) -> io::Result<Response<Bytes>> {
        gather(self.send(get(path)).await?).await
    }
}

/// A GET without a body.
pub fn get(path: &str) -> Request<ClientBody> {
    let mut request = Request::new(empty());
    *request.uri_mut() = path.parse().unwrap_or_default();
    request
}

/// A POST with a body.
pub fn post(path: &str, body: impl Into<Bytes>) -> Request<ClientBody> {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path.parse().unwrap_or_default();
    request
}

/// No body.
pub fn empty() -> ClientBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Reads a response to its end.
///
/// # Errors
///
/// Those of the connection.
pub async fn gather(response: Response<Incoming>) -> io::Result<Response<Bytes>> {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    Ok(Response::from_parts(parts, body))
}
