//! The company's proxy: takes CONNECT, opens the TLS inside with a CA of its own, and looks on.

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
use super::{Board, Body, Cut, Site, accept, error, reply};
use crate::secret::Secret;

/// The inspecting proxy.
///
/// What it decrypts it hands to the world's own hosts in this process: to whoever is behind the
/// proxy that is the same as a second TLS leg, and the program keeps its one way out (`upstream`).
pub struct Company {
    address: SocketAddr,
    ca: Arc<Ca>,
    door: Arc<Door>,
}

struct Door {
    acceptor: TlsAcceptor,
    connects: Board<Vec<String>>,
    login: Option<Secret>,
    site: Arc<Site>,
}

impl Company {
    pub(super) async fn open(
        site: Arc<Site>,
        ca: Arc<Ca>,
        acceptor: TlsAcceptor,
        login: Option<Secret>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let door = Arc::new(Door { acceptor, connects: Board::default(), login, site });
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

    /// The certificate that an employee's machine trusts.
    pub fn ca_file(&self) -> &Path {
        self.ca.file()
    }

    /// The targets of the CONNECTs that were let in.
    pub fn connects(&self) -> Vec<String> {
        self.door.connects.read(Vec::clone)
    }
}

impl Door {
    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let service = service_fn(move |request| {
            let answer = self.answer(request);
            async move { Ok::<_, Cut>(answer) }
        });
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // A client that leaves early is no concern of the proxy.
        connection.with_upgrades().await.ok();
    }

    fn answer(&self, request: Request<Incoming>) -> Response<Body> {
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
        let target = request.uri().to_string();
        let host = target.strip_suffix(":443");
        if !host.is_some_and(|host| self.site.hosts.iter().any(|known| known == host)) {
            return error(StatusCode::BAD_GATEWAY, "unknown_host");
        }
        self.connects.change(|connects| connects.push(target));
        let (site, acceptor) = (Arc::clone(&self.site), self.acceptor.clone());
        self.site.crew.spawn(async move {
            let Ok(tunnel) = hyper::upgrade::on(request).await else { return };
            if let Ok(stream) = acceptor.accept(TokioIo::new(tunnel)).await {
                site.serve(stream).await;
            }
        });
        reply(StatusCode::OK, "", "")
    }

    fn admits(&self, request: &Request<Incoming>) -> bool {
        let Some(login) = &self.login else { return true };
        let expected = Secret::new(format!("Basic {}", STANDARD.encode(login.expose())));
        let shown = request.headers().get(PROXY_AUTHORIZATION);
        shown.is_some_and(|value| value.as_bytes() == expected.expose().as_bytes())
    }
}
