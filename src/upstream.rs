//! The only way out: requests, upgrades, refreshes, logins and tunnels leave here, over one policy of
//! trust and one chain.

pub mod body;
pub mod calm;
pub mod chain;
mod deadline;
pub mod dial;
pub mod early;
mod expect;
pub mod gathered;
mod interim;
mod pool;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, TRANSFER_ENCODING};
use http::uri::{Parts, PathAndQuery};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls_pki_types::CertificateDer;

use crate::limits::Limits;
use crate::origin::{Origin, Target};
use crate::tasks::Tasks;
use crate::tls::trust::Distrust;
use body::{Again, Body, BodyError};
use deadline::{HEAD_LIMIT, UPGRADE_LIMIT};
use dial::{Dialer, Scope};
use expect::Gate;
use interim::MostInterim;
use pool::Pool;

/// Sends requests to origins. Clones share the pooled connections.
#[derive(Clone)]
pub struct Upstream {
    dialer: Arc<ArcSwap<Dialer>>,
    pool: Arc<Pool>,
    /// The pool's tasks, and those of connections that serve one request.
    tasks: Tasks,
    /// What [`Limits::interim_responses`] says now.
    most_interim: Arc<AtomicU32>,
}

impl Upstream {
    /// An upstream without open connections.
    pub fn new(dialer: Dialer) -> Self {
        let tasks = Tasks::new();
        Self {
            dialer: Arc::new(ArcSwap::from_pointee(dialer)),
            pool: Arc::new(Pool::new(tasks.clone())),
            tasks,
            most_interim: Arc::new(AtomicU32::new(Limits::USUAL.interim_responses)),
        }
    }

    /// Holds upstreams to these limits from now on, for all clones.
    pub fn limit(&self, limits: &Limits) {
        self.most_interim.store(limits.interim_responses, Ordering::Relaxed);
    }

    fn most_interim(&self) -> MostInterim {
        MostInterim(self.most_interim.load(Ordering::Relaxed))
    }

    /// Connects by this dialer from now on, for all clones. What is open is used to the end of what is going on in
    /// it, and for nothing new.
    pub fn replace(&self, dialer: Dialer) {
        let dialer = dialer.in_the_place_of(&self.dialer.load());
        self.dialer.store(Arc::new(dialer));
    }

    /// Sends a request on a pooled connection. Its URI's path and query count; scheme and authority
    /// are the origin's, and so is `Host`. Header fields that belong to one connection must be out.
    ///
    /// A request that was provably not processed is sent again on another connection, at most three times
    /// in all: one that never left (the connection closed before taking it), and one that HTTP/2 says so
    /// of, if its body can be had again ([`Body::repeatable`]). No other is.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`]; [`UpstreamError::left`] says whether the upstream may have processed any of it.
    pub async fn send(
        &self,
        origin: &Origin,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        // What is rare is boxed here, as every request has room for all of it.
        if Gate::is_wanted(&request) {
            match Box::pin(self.send_gated(origin, request)).await {
                Ok(response) => return response,
                Err(ungated) => request = ungated,
            }
        }
        let mut attempt = 1;
        loop {
            // Anew each time, as the roots may be others by then.
            let dialer = self.dialer.load_full();
            let place = (origin, dialer.trust_version());
            let mut lease = match self.pool.take(place) {
                Some(lease) => lease,
                None => {
                    let dial = || -> BoxFuture<'_, _> { Box::pin(dialer.dial(origin)) };
                    Box::pin(self.pool.checkout(place, dial)).await?
                }
            };
            lease.ready().await;
            shape(&mut request, origin, lease.version());
            // Only HTTP/2 can tell of a request that left that it was not processed.
            let repeat =
                (lease.version() == Version::HTTP_2).then(|| Repeat::of(&request)).flatten();
            let over = request.body_mut().over();
            let sent = {
                let sending = pin!(lease.try_send(request, self.most_interim()));
                deadline::head(over, HEAD_LIMIT, sending).await
            };
            let failed = match sent.ok_or_else(|| UpstreamError::no_head(origin))? {
                Ok(response) => {
                    expect_http(origin, response.status())?;
                    return Ok(response.map(|body| lease.into_body(body)));
                }
                Err(failed) => failed,
            };
            let again = match failed.unsent {
                Some(unsent) => Some(unsent),
                None if failed.unprocessed => repeat.and_then(Repeat::request),
                None => None,
            };
            match again {
                Some(again) if attempt < MOST_ATTEMPTS => request = again,
                _ => return Err(UpstreamError::http(origin, failed.error, !failed.unprocessed)),
            }
            attempt += 1;
        }
    }

    /// Sends a request whose body waits for a 100: on HTTP/1.1, on a connection of its own, as a body that nobody wanted ends
    /// that. `Err` with the request, which expects nothing any more, for an upstream that may speak HTTP/2 alone: there the
    /// body may come at once, as a stream can be refused at any time.
    async fn send_gated(
        &self,
        origin: &Origin,
        mut request: Request<Body>,
    ) -> Result<Result<Response<Body>, UpstreamError>, Request<Body>> {
        let stream = match self.dialer.load_full().dial_http1(origin, Scope::Anywhere).await {
            Ok(stream) => stream,
            Err(error) if error.stage == Stage::Tls => {
                request.headers_mut().remove(EXPECT);
                return Err(request);
            }
            Err(error) => return Ok(Err(error)),
        };
        let gate = Gate::before(&mut request);
        let sent = self.send_on(stream, origin, request, HEAD_LIMIT).await;
        Ok(sent.and_then(|response| {
            expect_http(origin, response.status())?;
            Ok(response.map(|body| gate.until_end_of(body)))
        }))
    }

    /// Has a connection open, or on its way, for a request to this origin that is likely to come. What goes wrong is told
    /// to nobody: the request will find it out by itself.
    pub fn dial_ahead(&self, origin: &Origin) {
        let dialer = self.dialer.load_full();
        let place = (origin.clone(), dialer.trust_version());
        self.pool.dial_ahead(place, |origin| Box::pin(async move { dialer.dial(&origin).await }));
    }

    /// Sends a request on a fresh HTTP/1.1 connection of its own, once: for a token request, which no layer
    /// may repeat.
    ///
    /// # Errors
    ///
    /// As [`Upstream::send`].
    pub async fn send_once(
        &self,
        origin: &Origin,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        self.send_within(Scope::Anywhere, origin, request).await
    }

    /// Sends the handshake of an upgrade, once. After a 101 the connection is in the response's
    /// [`hyper::upgrade::on`].
    ///
    /// # Errors
    ///
    /// As [`Upstream::send`].
    pub async fn upgrade(
        &self,
        origin: &Origin,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        self.send_alone(origin, request, (Scope::Anywhere, UPGRADE_LIMIT)).await
    }

    /// Sends a request on a connection of its own to a place that must be in this scope, once: what others reach
    /// is no matter of whoever asks for it.
    ///
    /// # Errors
    ///
    /// As [`Upstream::send`].
    pub async fn send_within(
        &self,
        scope: Scope,
        origin: &Origin,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        let response = self.send_alone(origin, request, (scope, HEAD_LIMIT)).await?;
        expect_http(origin, response.status())?;
        Ok(response)
    }

    async fn send_alone(
        &self,
        origin: &Origin,
        request: Request<Body>,
        (scope, limit): (Scope, Duration),
    ) -> Result<Response<Body>, UpstreamError> {
        let stream = self.dialer.load_full().dial_http1(origin, scope).await?;
        self.send_on(stream, origin, request, limit).await
    }

    async fn send_on(
        &self,
        stream: dial::Stream,
        origin: &Origin,
        mut request: Request<Body>,
        limit: Duration,
    ) -> Result<Response<Body>, UpstreamError> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| UpstreamError::http(origin, error, false))?;
        self.tasks.spawn(connection.with_upgrades());
        shape(&mut request, origin, Version::HTTP_11);
        let over = request.body_mut().over();
        let sending = pin!(interim::send(&mut sender, request, self.most_interim()));
        let sent = deadline::head(over, limit, sending).await;
        sent.ok_or_else(|| UpstreamError::no_head(origin))?
            .map(|response| response.map(Body::from))
            .map_err(|failed| UpstreamError::http(origin, failed.error, !failed.unprocessed))
    }

    /// Connects as a request would, and gives the certificates that the upstream shows, its own first; none
    /// without TLS.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`] with the step that failed.
    pub async fn look(
        &self,
        origin: &Origin,
    ) -> Result<Vec<CertificateDer<'static>>, UpstreamError> {
        Ok(dial::certificates(&self.dialer.load_full().dial(origin).await?))
    }

    /// A connection of one's own on which only HTTP/1.1 was offered.
    ///
    /// # Errors
    ///
    /// As [`Upstream::look`].
    pub async fn open(&self, origin: &Origin) -> Result<dial::Stream, UpstreamError> {
        self.dialer.load_full().dial_http1(origin, Scope::Anywhere).await
    }

    /// Whether the target is reached through the chain.
    pub fn goes_through_the_chain(&self, target: &Target) -> bool {
        self.dialer.load().goes_through_the_chain(target)
    }

    /// Refuses to connect to this address from now on: where this very proxy listens.
    pub fn avoid(&self, own: SocketAddr) {
        self.dialer.load().avoid(own);
    }

    /// Connects to this address again, where this very proxy listens no more.
    pub fn no_longer_avoid(&self, own: SocketAddr) {
        self.dialer.load().no_longer_avoid(own);
    }

    /// Refuses a CONNECT that has come through this very proxy before: `via` is the list of those that have
    /// passed it on ([`crate::headers::VALETKEY_VIA`]).
    ///
    /// # Errors
    ///
    /// [`UpstreamError`] when we are in the list.
    pub fn refuse_loop(&self, target: &Target, via: Option<&str>) -> Result<(), UpstreamError> {
        self.dialer.load().refuse_loop(target, via)
    }

    /// Opens a byte stream to a target for a tunnel: TCP, through the chain where there is one, and
    /// no TLS of ours; only to a place in this scope. `via` is the list of those that have passed the client's CONNECT on, to which we add
    /// ourselves.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`] with the stage that failed.
    pub async fn connect(
        &self,
        target: &Target,
        scope: Scope,
        via: Option<&str>,
    ) -> Result<dial::Transport, UpstreamError> {
        self.dialer.load_full().connect(target, scope, via).await
    }
}

/// What it takes to send a request once more: its head, and the means to have its body again.
struct Repeat {
    head: Request<()>,
    body: Again,
}

impl Repeat {
    fn of(request: &Request<Body>) -> Option<Self> {
        let body = request.body().again()?;
        let mut head = Request::new(());
        *head.method_mut() = request.method().clone();
        *head.uri_mut() = request.uri().clone();
        *head.headers_mut() = request.headers().clone();
        Some(Self { head, body })
    }

    /// The request anew; `None` when its body is not whole any more.
    fn request(self) -> Option<Request<Body>> {
        let body = self.body.body()?;
        Some(self.head.map(|()| body))
    }
}

/// How often a request that was not processed is tried: an idle connection may have died, and so may the
/// one that was tried instead, hardly a third; and an upstream that refuses three streams has no room.
const MOST_ATTEMPTS: u32 = 3;

/// Fails for a 101 that no request has asked for: whatever follows it is not HTTP.
fn expect_http(origin: &Origin, status: StatusCode) -> Result<(), UpstreamError> {
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(UpstreamError {
            left: true,
            ..UpstreamError::new(Stage::Http, &origin.target)
        });
    }
    Ok(())
}

/// Gives a request the form that its protocol wants: origin-form and `Host` for HTTP/1.1 (RFC 9112
/// section 3.2.1), absolute form and no `Host` for HTTP/2 (RFC 9113 section 8.3.1).
fn shape(request: &mut Request<Body>, origin: &Origin, version: Version) {
    let path = whole_path(request.uri());
    *request.version_mut() = version;
    if version == Version::HTTP_2 {
        request.headers_mut().remove(HOST);
        request.headers_mut().remove(TRANSFER_ENCODING);
        let mut parts = Parts::default();
        parts.scheme = origin.scheme.as_str().parse().ok();
        parts.authority = origin.authority().parse().ok();
        parts.path_and_query = Some(path);
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    } else {
        if let Ok(host) = HeaderValue::from_str(&origin.authority()) {
            request.headers_mut().insert(HOST, host);
        }
        join_cookies(request.headers_mut());
        let is_framed = request.headers().contains_key(CONTENT_LENGTH)
            || request.body().size_hint().exact().is_some();
        if !is_framed {
            // HTTP/2 needs neither, and without one hyper would leave the body of a GET out.
            let chunked = HeaderValue::from_static("chunked");
            request.headers_mut().insert(TRANSFER_ENCODING, chunked);
        }
        *request.uri_mut() = Uri::from(path);
    }
}

/// The path and the query. Behind a host the path may be empty, which means `/` (RFC 9110 section 4.2.3) and would be
/// written as nothing.
fn whole_path(uri: &Uri) -> PathAndQuery {
    let root = || PathAndQuery::from_static("/");
    match uri.path_and_query() {
        Some(path) if path.as_str().starts_with('?') => {
            format!("/{}", path.as_str()).parse().unwrap_or_else(|_| root())
        }
        // An empty one says so, too.
        Some(path) if path == "/" => root(),
        Some(path) => path.clone(),
        None => root(),
    }
}

/// HTTP/2 may send each cookie in a field of its own, HTTP/1.1 has one field (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let fields: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if fields.len() > 1
        && let Ok(mut joined) = HeaderValue::from_bytes(&fields.join(&b"; "[..]))
    {
        joined.set_sensitive(true);
        headers.insert(COOKIE, joined);
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").finish_non_exhaustive()
    }
}

/// Why an upstream gave no response: where it failed, and whether any of the request had left.
#[derive(Debug, thiserror::Error)]
#[error("{stage} ({place})")]
pub struct UpstreamError {
    stage: Stage,
    /// Host and port that were being reached.
    place: String,
    left: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The step that failed. Its `Display` is the sentence that people see.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stage {
    /// The proxy in front of us asked for a login, or did not take ours.
    #[error(
        "the upstream proxy {} {asks}",
        if *.was_shown { "did not take the login; it asks for" } else { "asks for" }
    )]
    ChainAuth {
        /// What it asks for: schemes and realms.
        asks: String,
        /// Whether a login was shown to it.
        was_shown: bool,
    },
    /// The proxy in front of us answered with something else than its protocol.
    #[error("the upstream proxy's answer makes no sense")]
    ChainGarbage,
    /// There should be a login for the proxy in front of us and none is to be had; holds why.
    #[error("there is no login for the upstream proxy: {0}")]
    ChainLogin(String),
    /// The proxy in front of us refused the target; holds its word.
    #[error("the upstream proxy answered {0} instead of opening a tunnel")]
    ChainRefused(String),
    /// The proxy in front of us could not be reached; holds the step that failed, unless it is TCP.
    #[error(
        "the upstream proxy could not be reached{}",
        .0.as_deref().map(|step| format!(": {}", step.replace("the upstream", "it"))).unwrap_or_default()
    )]
    ChainUnreachable(Option<String>),
    /// The certificate of the proxy in front of us was not accepted; holds why.
    #[error("the upstream proxy's certificate was not accepted: {0}")]
    ChainUntrusted(Box<Distrust>),
    /// The name has no address.
    #[error("the host name could not be resolved")]
    Dns,
    /// The connection ended before a response came, or spoke no HTTP.
    #[error("the upstream gave no HTTP response")]
    Http,
    /// Whoever asked may not reach what is at this address: this machine, or a private network.
    #[error(
        "this is an address of this machine or of a private network, which the pass does not reach"
    )]
    OutOfReach,
    /// The connection leads back to this very proxy.
    #[error("the connection would lead back to this valetkey")]
    Ourselves,
    /// No TCP connection.
    #[error("the upstream could not be reached")]
    Tcp,
    /// A step took longer than it may.
    #[error("{0}")]
    Timeout(Step),
    /// TLS failed for another reason than trust.
    #[error("the TLS handshake with the upstream failed")]
    Tls,
    /// The certificate was not accepted; holds why.
    #[error("the upstream's certificate was not accepted: {0}")]
    Untrusted(Box<Distrust>),
}

impl Stage {
    /// Whether the proxy in front of us failed, whatever it was asked for; not that it refused one target.
    pub fn is_of_the_chain(&self) -> bool {
        matches!(
            self,
            Self::ChainAuth { .. }
                | Self::ChainGarbage
                | Self::ChainLogin(_)
                | Self::ChainUnreachable(_)
                | Self::ChainUntrusted(_)
                | Self::Ourselves
                | Self::Timeout(Step::Chain)
        )
    }
}

/// A step with a deadline. Its `Display` says that it was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Step {
    /// The tunnel through the proxy in front of us.
    #[error("the upstream proxy opened no tunnel in time")]
    Chain,
    /// Looking the name up.
    #[error("the host name was not resolved in time")]
    Dns,
    /// The head of the response.
    #[error("the upstream sent no response in time")]
    Head,
    /// The TCP connection.
    #[error("the upstream took no connection in time")]
    Tcp,
    /// The TLS handshake.
    #[error("the upstream did not end the TLS handshake in time")]
    Tls,
}

impl UpstreamError {
    fn new(stage: Stage, place: &impl fmt::Display) -> Self {
        Self { stage, place: place.to_string(), left: false, source: None }
    }

    fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    fn http(origin: &Origin, error: impl Into<BodyError>, left: bool) -> Self {
        Self { left, ..Self::new(Stage::Http, &origin.target).because(error) }
    }

    /// No response within some time.
    pub(crate) fn no_head(origin: &Origin) -> Self {
        Self { left: true, ..Self::new(Stage::Timeout(Step::Head), &origin.target) }
    }

    /// Whether it failed because this process, or the machine, may open no more descriptors.
    pub fn is_lack_of_descriptors(&self) -> bool {
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
            if code.is_some_and(|code| {
                [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error).contains(&code)
            }) {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// The step that failed.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Whether the upstream may have processed any of the request. `false` is a proof.
    pub fn left(&self) -> bool {
        self.left
    }

    /// What to do about it.
    pub fn hint(&self) -> Cow<'static, str> {
        let fixed = match &self.stage {
            Stage::ChainAuth { was_shown: false, .. } => {
                "put user and password into the proxy's URL, or set upstream.proxy_login; a shell behind `valetkey \
                 env` has no password of a URL, and needs the latter"
            }
            Stage::ChainAuth { was_shown: true, .. } => {
                "check user and password: in the proxy's URL, or upstream.proxy_login, which is for the proxy that \
                 the same file names"
            }
            Stage::ChainLogin(_) => {
                "give it one line, user:password, where upstream.proxy_login says"
            }
            Stage::ChainUnreachable(Some(step)) if step.contains("TLS") => {
                "check upstream.proxy or HTTPS_PROXY: a proxy that speaks no TLS itself is http://"
            }
            Stage::ChainGarbage | Stage::ChainUnreachable(_) | Stage::Timeout(Step::Chain) => {
                "check upstream.proxy or HTTPS_PROXY: the address, and the kind (http, https, socks5h)"
            }
            Stage::ChainRefused(word) if word.starts_with('5') => {
                "check the host name; the upstream proxy, its DNS or its way to this host may be broken: ask whoever \
                 runs it"
            }
            Stage::ChainRefused(_) => {
                "check the host name; ask whoever runs the upstream proxy to allow this host"
            }
            Stage::Dns | Stage::Timeout(Step::Dns) => {
                "check the host name and this network; behind a company's proxy set upstream.proxy or HTTPS_PROXY"
            }
            Stage::Http | Stage::Timeout(Step::Head | Step::Tls) => "try again",
            Stage::Tls => {
                "check host and port: what answers there may speak no TLS; else try again"
            }
            Stage::OutOfReach => {
                "make a pass that does: valetkey pass new --tunnel --allow-private"
            }
            Stage::Ourselves => {
                "check upstream.proxy and HTTPS_PROXY: they must not name this valetkey"
            }
            // A network that wants a proxy drops what does not go through it.
            Stage::Tcp | Stage::Timeout(Step::Tcp) => {
                "check the network; behind a company's proxy set upstream.proxy or HTTPS_PROXY"
            }
            Stage::ChainUntrusted(why) | Stage::Untrusted(why) => {
                return Cow::Owned(why.hint().to_owned());
            }
        };
        Cow::Borrowed(fixed)
    }

    /// The stable code for machines.
    pub fn code(&self) -> &'static str {
        match self.stage {
            Stage::ChainAuth { .. } | Stage::ChainLogin(_) => "chain_auth",
            Stage::ChainGarbage => "chain_garbage",
            Stage::ChainRefused(_) => "chain_refused",
            Stage::ChainUnreachable(_) => "chain_unreachable",
            Stage::ChainUntrusted(_) => "chain_tls_untrusted",
            Stage::Dns => "upstream_dns",
            Stage::Http => "upstream_closed",
            Stage::OutOfReach => "target_forbidden",
            Stage::Ourselves => "upstream_loop",
            Stage::Tcp => "upstream_unreachable",
            Stage::Timeout(_) => "deadline",
            Stage::Tls => "upstream_tls",
            Stage::Untrusted(_) => "upstream_tls_untrusted",
        }
    }
}
