//! The company's proxy: HTTP, TLS or SOCKS at its door; inside it opens the TLS with a CA of its own, or lets it be.

mod socks;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::pki::Ca;
use super::{AnyStream, Board, Body, Cut, Site, accept, error, reply};
use crate::secret::Secret;

/// What kind of proxy a company has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompanyKind {
    /// HTTP at the door; the TLS inside is opened with the company's own CA.
    #[default]
    Inspecting,
    /// HTTP at the door; what is inside is let through.
    Http,
    /// HTTP over TLS at the door, with a certificate of the world's CA; what is inside is let through.
    Https,
    /// SOCKS5 at the door; what is inside is let through.
    Socks5,
}

/// The company's proxy.
///
/// Whatever it lets through, opened or not, it hands to the world's own hosts in this process: to whoever is behind
/// the proxy that is the same as a second leg, the program keeps its one way out (`upstream`), and
/// [`World::connections`] counts only what went past the proxy.
///
/// [`World::connections`]: super::World::connections
pub struct Company {
    address: SocketAddr,
    ca: Arc<Ca>,
    door: Arc<Door>,
}

/// What is at the door.
pub(super) struct Front {
    pub(super) kind: CompanyKind,
    pub(super) login: Option<Secret>,
    /// The TLS of a proxy that is spoken to over it.
    pub(super) outer: TlsAcceptor,
}

struct Door {
    front: Front,
    /// The TLS of the hosts behind it.
    inner: TlsAcceptor,
    connects: Board<Vec<String>>,
    site: Arc<Site>,
}

impl Company {
    pub(super) async fn open(
        site: Arc<Site>,
        front: Front,
        (ca, inner): (Arc<Ca>, TlsAcceptor),
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let door = Arc::new(Door { front, inner, connects: Board::default(), site });
        let crew = door.site.crew.clone();
        crew.spawn(accept(listener, crew.clone(), {
            let door = Arc::clone(&door);
            move |stream| Arc::clone(&door).connection(stream)
        }));
        Ok(Self { address, ca, door })
    }

    /// Where it listens, without any password.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL, with this user information, which may be empty: `user:p%40ss@`.
    pub fn url(&self, user: &str) -> String {
        let scheme = match self.door.front.kind {
            CompanyKind::Inspecting | CompanyKind::Http => "http",
            CompanyKind::Https => "https",
            CompanyKind::Socks5 => "socks5h",
        };
        format!("{scheme}://{user}{}", self.address)
    }

    /// The certificate that an employee's machine trusts: that of the hosts as they are seen behind the proxy.
    pub fn ca_file(&self) -> &Path {
        self.ca.file()
    }

    /// The targets that were asked for and let in, by CONNECT or by SOCKS.
    pub fn connects(&self) -> Vec<String> {
        self.door.connects.read(Vec::clone)
    }
}

impl Door {
    async fn connection(self: Arc<Self>, stream: TcpStream) {
        match self.front.kind {
            CompanyKind::Inspecting | CompanyKind::Http => self.http(Box::new(stream)).await,
            CompanyKind::Https => {
                let stream: AnyStream = Box::new(stream);
                // A client that refuses our certificate is a result of its own, for the client to tell.
                if let Ok(stream) = self.front.outer.accept(stream).await {
                    self.http(Box::new(stream)).await;
                }
            }
            CompanyKind::Socks5 => self.socks(stream).await,
        }
    }

    async fn http(self: Arc<Self>, stream: AnyStream) {
        let service = service_fn(move |request| {
            let answer = self.answer(request);
            async move { Ok::<_, Cut>(answer) }
        });
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // A client that leaves early is no concern of the proxy.
        connection.with_upgrades().await.ok();
    }

    fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if !self.admits(&request) {
            let status = StatusCode::PROXY_AUTHENTICATION_REQUIRED;
            let mut response = error(status, "proxy_login_required");
            let challenge = HeaderValue::from_static("Basic realm=\"company\"");
            response.headers_mut().insert(PROXY_AUTHENTICATE, challenge);
            return response;
        }
        if request.method() != Method::CONNECT {
            return error(StatusCode::METHOD_NOT_ALLOWED, "connect_only");
        }
        if !self.lets_in(request.uri().to_string()) {
            return error(StatusCode::BAD_GATEWAY, "unknown_host");
        }
        let door = Arc::clone(self);
        self.site.crew.spawn(async move {
            if let Ok(tunnel) = hyper::upgrade::on(request).await {
                door.behind(Box::new(TokioIo::new(tunnel))).await;
            }
        });
        reply(StatusCode::OK, "", "")
    }

    fn admits(&self, request: &Request<Incoming>) -> bool {
        let Some(login) = &self.front.login else { return true };
        let expected = Secret::new(format!("Basic {}", STANDARD.encode(login.expose())));
        let shown = request.headers().get(PROXY_AUTHORIZATION);
        shown.is_some_and(|value| value.as_bytes() == expected.expose().as_bytes())
    }

    /// Notes a target, if it is one of the world.
    fn lets_in(&self, target: String) -> bool {
        let host = target.strip_suffix(":443");
        let is_known = host.is_some_and(|host| self.site.hosts.iter().any(|known| known == host));
        if is_known {
            self.connects.change(|connects| connects.push(target));
        }
        is_known
    }

    /// What is behind the door, for one that was let in.
    async fn behind(&self, stream: AnyStream) {
        Arc::clone(&self.site).serve(self.inner.clone(), stream).await;
    }
}
