//! A pretend world on loopback: an issuer, an API and a company proxy, behind private CAs.
//!
//! `valetkey demo`, the tests and the benchmarks share it. Everything is real (sockets, TLS, HTTP)
//! except the secrets, which all carry the text `vk-canary-`, so that a leak is easy to find.

mod api;
pub mod client;
mod company;
mod issuer;
mod pki;
mod seen;

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue};
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::clock::Clock;
use crate::secret::Secret;
use crate::tasks::Tasks;

pub use api::{Api, ENCODINGS, PLACES, REVEALED, SAID, stamp};
pub use company::{Company, CompanyKind};
pub use issuer::{
    Consent, DeviceSetting, Fault, Issuer, OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET, Person,
    PretendLogin, Revocation,
};
pub use pki::Defect;
pub use seen::{End, Passed, Seen};

use issuer::Dialect;
use pki::Ca;
use seen::Watched;

/// The host where the pretend issuer does as Codex's does.
pub const ISSUER_HOST: &str = "auth.openai.com";

/// The host where the pretend issuer does as the standards say.
pub const OAUTH_HOST: &str = "login.example.com";

/// What kind of world to start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The issuer's clock; a clone of the program's, or one of its own to make the two disagree.
    pub clock: Clock,
    /// How the company proxy is spoken to, and whether it opens the TLS inside.
    pub company: CompanyKind,
    /// `user:password` that the company proxy asks for; `None` lets everyone in.
    pub company_login: Option<Secret>,
    /// Hosts of the API, beside those of the issuer. One whose first label is `expired`, `untrusted` or
    /// `wrong-name` shows such a certificate.
    pub hosts: Vec<String>,
    /// Offers no HTTP/2.
    pub http1_only: bool,
    /// Hosts that somebody else plays, with [`World::acceptor`], and where: a peer that misbehaves.
    pub peers: Vec<(String, SocketAddr)>,
    /// Keeps what the API saw. Off for benchmarks, which would fill the memory with it; then nothing
    /// is ever seen, and waiting for it does not end.
    pub record: bool,
    /// How long a refreshed access token lives.
    pub token_lifetime: time::Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            clock: Clock::system(),
            company: CompanyKind::default(),
            company_login: None,
            hosts: HOSTS.map(str::to_owned).into(),
            http1_only: false,
            peers: Vec::new(),
            record: true,
            token_lifetime: time::Duration::hours(1),
        }
    }
}

const HOSTS: [&str; 9] = [
    "chatgpt.com",
    "eu.chatgpt.com",
    "ab.chatgpt.com",
    "api.openai.com",
    "api.example.com",
    "other.example.com",
    "expired.example.com",
    "untrusted.example.com",
    "wrong-name.example.com",
];

/// The running world. Dropping it closes every socket and removes its directory.
pub struct World {
    address: SocketAddr,
    ca: Arc<Ca>,
    company: Company,
    dir: TempDir,
    site: Arc<Site>,
    _stop: DropGuard,
}

impl World {
    /// Makes the CAs and opens the two listeners (issuer and API on one, the company proxy on the
    /// other) on free ports of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// No directory, no port, or no certificate could be made.
    pub async fn start(settings: Settings) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("valetkey-sandbox-").tempdir()?;
        let now = settings.clock.now();
        let ca = Ca::create("Sandbox Root", dir.path().join("ca.pem"), now)?;
        let company_ca = Ca::create("Company Root", dir.path().join("company.pem"), now)?;
        let alpn: &[&[u8]] =
            if settings.http1_only { &[b"http/1.1"] } else { &[b"h2", b"http/1.1"] };
        let acceptor = ca.acceptor(alpn)?;
        let front = company::Front {
            kind: settings.company,
            login: settings.company_login.clone(),
            outer: ca.acceptor(&[b"http/1.1"])?,
        };
        let behind =
            if front.kind == CompanyKind::Inspecting { company_ca } else { Arc::clone(&ca) };
        let inner = behind.acceptor(alpn)?;

        let stop = CancellationToken::new();
        let site = Arc::new(Site::new(settings, stop.clone()));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        site.crew.spawn(accept(listener, site.crew.clone(), {
            let site = Arc::clone(&site);
            move |stream| Arc::clone(&site).connection(acceptor.clone(), stream)
        }));
        let company = Company::open(Arc::clone(&site), front, (behind, inner)).await?;
        Ok(Self { address, ca, company, dir, site, _stop: stop.drop_guard() })
    }

    /// The CA that signs the issuer's and the API's certificates; trusted by nobody else.
    pub fn ca_pem(&self) -> &str {
        self.ca.pem()
    }

    /// A file with [`World::ca_pem`].
    pub fn ca_file(&self) -> &Path {
        self.ca.file()
    }

    /// A directory that lives as long as the world.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The pretend issuer.
    pub fn issuer(&self) -> &Issuer {
        &self.site.issuer
    }

    /// The pretend API.
    pub fn api(&self) -> &Api {
        &self.site.api
    }

    /// Gives a host of the world (or `127.0.0.1`, for the door of a company proxy that is spoken to over TLS) a
    /// certificate with a defect from now on, or a good one again. Only where no proxy inspects.
    pub fn spoil(&self, host: &str, defect: Option<Defect>) {
        self.ca.spoil(host, defect);
    }

    /// The proxy of the company, which inspects TLS unless it was set otherwise.
    pub fn company(&self) -> &Company {
        &self.company
    }

    /// Where every host of the world listens, as `[upstream.resolve]` wants it.
    pub fn resolve(&self) -> Vec<(String, SocketAddr)> {
        let is_ours = |host: &&String| !self.site.peers.iter().any(|(peer, _)| peer == *host);
        let own = self.site.hosts.iter().filter(is_ours).map(|host| (host.clone(), self.address));
        let all = own.chain(self.site.peers.iter().cloned());
        all.map(|(host, address)| (format!("{host}:443"), address)).collect()
    }

    /// Ends TLS for whatever host a client asks for, with a certificate of [`World::ca_pem`].
    ///
    /// # Errors
    ///
    /// TLS cannot be set up.
    pub fn acceptor(&self, alpn: &[&[u8]]) -> io::Result<TlsAcceptor> {
        self.ca.acceptor(alpn)
    }

    /// The part of a configuration that leads every host of the world to it.
    pub fn upstream_toml(&self) -> String {
        let ca = self.ca_file().display();
        let mut text = format!("[upstream]\nca_bundle = \"{ca}\"\nproxy = \"none\"\n");
        text.push_str("[upstream.resolve]\n");
        for (target, address) in self.resolve() {
            text.push_str(&format!("\"{target}\" = \"{address}\"\n"));
        }
        text
    }

    /// How many TCP connections the issuer and the API have accepted directly.
    pub fn connections(&self) -> usize {
        self.site.connections.load(Ordering::SeqCst)
    }

    /// Every secret that exists in this world, for tests that look for leaks.
    pub fn secrets(&self) -> Vec<String> {
        let mut secrets = self.site.issuer.secrets();
        secrets.extend(self.site.api.secrets());
        secrets
    }
}

/// What stands behind every host of the world.
struct Site {
    api: Api,
    connections: AtomicUsize,
    crew: Crew,
    hosts: Vec<String>,
    issuer: Issuer,
    peers: Vec<(String, SocketAddr)>,
}

/// One type for all, so that the program holds TLS and HTTP for them once: the sandbox is a part of it, and seldom at work.
type AnyStream = Box<dyn Stream>;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Site {
    fn new(settings: Settings, stop: CancellationToken) -> Self {
        let crew = Crew { tasks: Tasks::new(), stop };
        let issuer = Issuer::new(settings.clock, settings.token_lifetime);
        let api = Api::new(crew.clone(), issuer.clone(), settings.record);
        let mut hosts = settings.hosts;
        hosts.extend([ISSUER_HOST, OAUTH_HOST].map(str::to_owned));
        let peers = settings.peers;
        Self { api, connections: AtomicUsize::new(0), crew, hosts, issuer, peers }
    }

    async fn connection(self: Arc<Self>, acceptor: TlsAcceptor, stream: TcpStream) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        self.serve(acceptor, Box::new(stream)).await;
    }

    /// Ends the client's TLS, and speaks the version of HTTP that ALPN chose until it leaves.
    async fn serve(self: Arc<Self>, acceptor: TlsAcceptor, stream: AnyStream) {
        // A client that refuses our certificate is a result of its own, for the client to tell.
        let Ok(stream) = acceptor.accept(stream).await else { return };
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let (io, crew) = (TokioIo::new(stream), self.crew.clone());
        let service = service_fn(move |request| Arc::clone(&self).answer(request));
        // How the connection ended is told by the record of each exchange.
        if is_h2 {
            http2::Builder::new(crew).serve_connection(io, service).await.ok();
        } else {
            http1::Builder::new().serve_connection(io, service).with_upgrades().await.ok();
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Watched<Body>>, Cut> {
        let host = authority(&request);
        let name = host.parse::<Authority>().ok();
        let dialect = name.and_then(|name| Dialect::of_host(name.host()));
        let log = if dialect.is_some() { self.issuer.log() } else { self.api.log() };
        let (of_request, mut of_response) = log.enter(host, &request);
        let is_head = request.method() == Method::HEAD;
        if is_head {
            of_response.complete();
        }
        let request = request.map(|body| of_request.over(body));
        let response = match dialect {
            Some(dialect) => self.issuer.answer(dialect, request).await?,
            None => self.api.answer(request).await?,
        };
        // hyper would send the body of an answer to HEAD as HTTP/2 frames.
        let response = if is_head { without_body(response) } else { response };
        Ok(response.map(|body| of_response.over(body)))
    }
}

/// The answer to a HEAD: the length is told, and nothing of it is sent.
fn without_body(response: Response<Body>) -> Response<Body> {
    let length = response.body().size_hint().exact();
    let mut response = response.map(|_| full(""));
    if let Some(length) = length {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    response
}

/// The authority that the request names, as it was spelled.
fn authority<B>(request: &Request<B>) -> String {
    let field = || request.headers().get(HOST).and_then(|value| value.to_str().ok());
    request.uri().authority().map(Authority::as_str).or_else(field).unwrap_or_default().to_owned()
}

type Ask = Request<Watched<Incoming>>;
type Body = UnsyncBoxBody<Bytes, io::Error>;
type Answer = Result<Response<Body>, Cut>;

/// Ends the connection (HTTP/2: the stream) without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox cuts the exchange")]
struct Cut;

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer of one kind and one piece; nothing for the kind of an empty one.
fn reply(status: StatusCode, kind: &'static str, content: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(content));
    *response.status_mut() = status;
    if !kind.is_empty() {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    reply(status, "application/json", value.to_string())
}

/// An error in the form of OpenAI's services.
fn error(status: StatusCode, code: &str) -> Response<Body> {
    let message = format!("the sandbox says {code}");
    json(
        status,
        &serde_json::json!({"error": {
            "message": message, "type": "invalid_request_error", "param": null, "code": code,
        }}),
    )
}

/// Takes connections until the world ends.
async fn accept<F, C>(listener: TcpListener, crew: Crew, serve: F)
where
    F: Fn(TcpStream) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((stream, _)) if stream.set_nodelay(true).is_ok() => crew.spawn(serve(stream)),
            _ => tokio::task::yield_now().await,
        }
    }
}

/// The tasks of one world, which end with it.
#[derive(Clone)]
struct Crew {
    tasks: Tasks,
    stop: CancellationToken,
}

impl Crew {
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(work));
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Crew {
    fn execute(&self, future: F) {
        self.spawn(future);
    }
}

/// Shared state that tests can wait on, so that none of them sleeps.
#[derive(Default)]
struct Board<T> {
    changed: Notify,
    state: Mutex<T>,
}

impl<T> Board<T> {
    fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.lock())
    }

    fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.lock());
        self.changed.notify_waiters();
        result
    }

    async fn wait_until(&self, is_met: impl Fn(&T) -> bool) {
        loop {
            // Made before the look, so that a change in between is not missed.
            let changed = self.changed.notified();
            if self.read(&is_met) {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
