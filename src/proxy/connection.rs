//! One client connection: a CONNECT or an absolute-form request becomes a target, the rules decide.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use http::header::{CONTENT_LENGTH, ORIGIN, REFERER, TRANSFER_ENCODING};
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::admit::{Admitted, Door, Guest};
use super::explained::Explained;
use super::listener::{Client, ClientStream, RawStream};
use super::note::Note;
use super::reject::Rejection;
use super::{Now, Place, Shared, decoys, exchange, intercept, tunnel};
use crate::audit::Kind;
use crate::headers::{VALETKEY_VIA, clean_answer, strip_hop_by_hop};
use crate::origin::{Origin, Scheme, Target};
use crate::rules::{Action, Decision, Plain, Rule};
use crate::upstream::body::{Body, Inbound};
use crate::upstream::dial::Scope;
use crate::upstream::early::Early;

/// Serves one client until it goes, its tunnel takes over, or the proxy shuts down.
pub(super) async fn serve(
    shared: Arc<Shared>,
    door: Arc<Door>,
    (client, place): (Client, Place),
    stream: RawStream,
) {
    let span = tracing::debug_span!("connection", ?client);
    let guest = Arc::new(Guest::at(&door, client, place, &shared));
    let given_up = guest.given_up();
    tokio::select! {
        () = converse(shared, door, guest, stream).instrument(span.clone()) => {}
        () = given_up.cancelled() => {
            let _entered = span.entered();
            tracing::debug!("a stranger has made room for another");
        }
    }
}

async fn converse(shared: Arc<Shared>, door: Arc<Door>, guest: Arc<Guest>, stream: RawStream) {
    let Some(stream) = open(&shared, &door, stream).await else { return };
    let (serving, limits) = (shared.clone(), shared.limits.load_full());
    let service = service_fn(move |request| {
        let (serving, guest) = (serving.clone(), guest.clone());
        async move {
            let note = Note::of_request(&serving, &guest, &request);
            let answered = answer(serving, &guest, request, &note).await;
            if let Err(rejection) = &answered {
                note.refused(rejection);
            }
            let response = answered.unwrap_or_else(Rejection::into_response);
            Ok::<_, Infallible>(note.follow(response))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_size as usize)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(Explained::new(stream, Arc::default())), service)
        .with_upgrades();
    let never = CancellationToken::new();
    let finish = |connection: Pin<&mut _>| UpgradeableConnection::graceful_shutdown(connection);
    shared.closing.drive(std::pin::pin!(connection), &never, finish).await;
}

/// The stream in which the client speaks HTTP: inside TLS, where it is to speak that.
async fn open(shared: &Shared, door: &Door, stream: RawStream) -> Option<ClientStream> {
    let Some(name) = &door.tls else { return Some(Either::Left(stream)) };
    match intercept::accept_at_the_port(shared, name, stream).await {
        Ok(stream) => Some(Either::Right(Box::new(stream))),
        Err(error) => {
            tracing::debug!(%error, "client handshake failed at the port");
            None
        }
    }
}

async fn answer(
    shared: Arc<Shared>,
    guest: &Guest,
    request: Request<Incoming>,
    note: &Note,
) -> Result<Response<Body>, Rejection> {
    // Before anything is looked up: a page could guess at passes, too.
    refuse_browsers(&request)?;
    let (client, admitted) = (guest.client, guest.admit(request.headers(), &shared).await?);
    note.admitted(&admitted);
    if request.method() == Method::CONNECT {
        return connect(shared, (client, admitted), request, note).await;
    }
    match request.uri().scheme_str() {
        Some("http") => plain(&shared, (client, admitted), request, note).await,
        Some(_) => Err(Rejection::CleartextRefused),
        None => Err(Rejection::Target("this is a proxy: it serves no pages of its own")),
    }
}

/// A page in a browser can make it send requests to a loopback port, but cannot keep it from saying
/// so. Inside a tunnel these fields are the client's business.
fn refuse_browsers(request: &Request<Incoming>) -> Result<(), Rejection> {
    let headers = request.headers();
    let by_a_page = [ORIGIN, REFERER].iter().any(|name| headers.contains_key(name))
        || headers.contains_key("sec-fetch-site");
    if by_a_page {
        return Err(Rejection::Target("requests made by web pages are not proxied"));
    }
    Ok(())
}

async fn connect(
    shared: Arc<Shared>,
    (client, admitted): (Client, Admitted),
    mut request: Request<Incoming>,
    note: &Note,
) -> Result<Response<Body>, Rejection> {
    let headers = request.headers();
    if headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING) {
        return Err(Rejection::BadRequest("a CONNECT has no body".into()));
    }
    if request.uri().scheme().is_some() {
        return Err(Rejection::BadRequest("a CONNECT names a host and a port, not a URL".into()));
    }
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    let target = Target::parse(authority)
        .map_err(|bad| Rejection::BadRequest(format!("the CONNECT target is wrong: {bad}")))?;
    refuse_ourselves(client, &target)?;
    let via = headers.get(VALETKEY_VIA).and_then(|via| via.to_str().ok());
    shared.upstream.refuse_loop(&target, via)?;

    let (decision, scope) = admitted.decide(&shared.now.load().rules, &target)?;
    tracing::debug!(%target, ?decision, "connect");
    match decision {
        Decision::Refuse => Err(Rejection::Target("no rule allows this host")),
        Decision::Tunnel => {
            admitted.count(&shared.clock)?;
            // Dialled before the answer, so that a failure is explained instead of cut.
            let upstream = shared.upstream.connect(&target, scope, via).await?;
            let note = note.clone();
            note.goes_on_as(Kind::Tunnel);
            shared.take_over(hyper::upgrade::on(&mut request), |stream, shared| {
                tunnel::carry(shared, (admitted, note), stream, upstream)
            });
            Ok(Response::new(Body::empty()))
        }
        Decision::Intercept => {
            // Each of the exchanges in it is written down by itself.
            note.leave_to_others();
            shared.dial_ahead(&target);
            shared.take_over(hyper::upgrade::on(&mut request), |stream, shared| async move {
                intercept::serve(shared, (target, admitted), stream).await;
            });
            Ok(Response::new(Body::empty()))
        }
    }
}

/// An absolute-form `http://` request: plain text, so it never meets a credential.
async fn plain(
    shared: &Arc<Shared>,
    (client, admitted): (Client, Admitted),
    mut request: Request<Incoming>,
    note: &Note,
) -> Result<Response<Body>, Rejection> {
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    let target = Target::parse_with_default(authority, Scheme::Http.default_port())
        .map_err(|bad| Rejection::BadRequest(format!("the request's host is wrong: {bad}")))?;
    refuse_ourselves(client, &target)?;
    let origin = Origin { scheme: Scheme::Http, target };
    exchange::check_framing(&request)?;
    exchange::check_target(&request)?;
    exchange::check_host(&request, &origin)?;

    check_plain(&shared.now.load(), &origin.target, &request)?;
    // No rule speaks of the host.
    let scope = admitted.elsewhere()?;
    admitted.count(&shared.clock)?;
    strip_hop_by_hop(request.headers_mut());
    let version = request.version();
    let request = request.map(|body| {
        let body = Body::boxed(Inbound::new(body, version).counted_in(note.up()));
        body.map_trailers(decoys::strip_trailers)
    });
    let sending = async {
        match scope {
            Scope::Anywhere => shared.upstream.send(&origin, request).await,
            Scope::Public => shared.upstream.send_within(scope, &origin, request).await,
        }
    };
    let ended = admitted.ended();
    let mut response = tokio::select! {
        response = sending => response?,
        () = ended.cancelled() => {
            let why = admitted.why_ended(&shared.clock);
            return Err(Rejection::PassRequired { uid: None, why: Some(why) });
        }
    };
    clean_answer(response.headers_mut());
    // The connection may go on with another pass: what ends with this one is the response.
    Ok(if admitted.is_by_pass() { response.map(|body| body.until(ended)) } else { response })
}

/// Refuses what may not go out in plain text by what is in force.
fn check_plain(now: &Now, target: &Target, request: &Request<Incoming>) -> Result<(), Rejection> {
    match now.rules.decide_plain(target) {
        Plain::Forward => {}
        Plain::NoRule => return Err(Rejection::Target("no rule allows this host")),
        Plain::OnlyTls => return Err(Rejection::CleartextRefused),
    }
    now.decoys.check(request, None)?;
    Ok(())
}

/// A target that is this very proxy would loop until something runs out.
fn refuse_ourselves(client: Client, target: &Target) -> Result<(), Rejection> {
    let own_port = client.own().is_some_and(|own| own.port() == target.port);
    if own_port && target.host.is_loopback() {
        return Err(Rejection::Target("the target is this proxy itself"));
    }
    Ok(())
}

impl Shared {
    /// Has the upstream dialled while the client shakes hands, where its requests are likely to be signed in.
    fn dial_ahead(&self, target: &Target) {
        let now = self.now.load();
        let signs_in = |rule: &Arc<Rule>| matches!(rule.action, Action::Inject { .. });
        if now.rules.on_host(target).any(signs_in) {
            self.upstream.dial_ahead(&Origin::https(target.clone()));
        }
    }

    /// Gives the client's stream, once HTTP has let go of it, to a task of its own.
    fn take_over<F, T>(self: &Arc<Self>, upgrade: OnUpgrade, road: F)
    where
        F: FnOnce(Early<ClientStream>, Arc<Self>) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let shared = self.clone();
        let span = tracing::Span::current();
        let carrying = async move {
            let Ok(upgraded) = upgrade.await else { return };
            // The connection was built on this very type, so the other case does not happen.
            let Ok(parts) = upgraded.downcast::<TokioIo<Explained<ClientStream>>>() else { return };
            road(Early::new(parts.read_buf, parts.io.into_inner().into_inner()), shared).await;
        };
        self.connections.spawn(carrying.instrument(span));
    }
}
