//! Ends the client's TLS with a leaf for the target, and serves HTTP/1.1 or HTTP/2 on it.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::Shared;
use super::admit::Admitted;
use super::exchange;
use super::explained::Explained;
use super::listener::ClientStream;
use super::note::Note;
use super::reject::Rejection;
use super::resting::{self, Activity};
use super::ticket::HeldTicket;
use crate::limits::{HTTP2_BROKEN_STREAMS, HTTP2_FRAME, HTTP2_SEND_BUFFER, Limits};
use crate::origin::{Host, Origin, Target};
use crate::upstream::calm::Calm;
use crate::upstream::early::Early;
use crate::upstream::gathered::Gathered;

/// How many streams may be reset by the client before we have looked at them (CVE-2023-44487, rapid
/// reset); h2's own default. One that we have looked at ends at once when it is reset, so that resets
/// cost a client as much as they cost us.
const MOST_RESET_UNSEEN: usize = 20;

/// The connection's window: that of all its streams together, so that an upload that an upstream does not
/// take never stalls its neighbours (RFC 9113 section 5.2.2 warns of it). h2 takes its half, usually 8 MiB, for
/// the most that small DATA frames may cost before the connection ends.
fn connection_window(limits: &Limits) -> u32 {
    limits.stream_window.saturating_mul(limits.streams).min(LARGEST_WINDOW)
}

/// RFC 9113 section 6.9.1.
const LARGEST_WINDOW: u32 = (1 << 31) - 1;

/// A client connection whose TLS ends here. The origin is fixed by the CONNECT and never asked again.
pub(super) struct Intercepted {
    pub(super) shared: Arc<Shared>,
    pub(super) origin: Origin,
    /// Who the client is.
    pub(super) admitted: Admitted,
    /// What goes on in it.
    pub(super) activity: Arc<Activity>,
    /// The client greeted another host than it asked the tunnel for: every request gets 421.
    pub(super) greeted_another: bool,
}

impl Intercepted {
    fn new(shared: Arc<Shared>, origin: Origin, admitted: Admitted) -> Self {
        Self { shared, origin, admitted, activity: Arc::default(), greeted_another: false }
    }
}

/// The client of a tunnel, inside the TLS that ends here.
pub(super) type InsideTls = TlsStream<HeldTicket<Early<ClientStream>>>;

/// Serves the client of a tunnel to `target`, in the place of the target.
pub(super) async fn serve(
    shared: Arc<Shared>,
    (target, admitted): (Target, Admitted),
    mut stream: Early<ClientStream>,
) {
    let limits = shared.limits.load_full();
    let reading = tokio::time::timeout(limits.handshake_time, stream.peek());
    let Ok(Ok(Some(first))) = reading.await else { return };
    if first != TLS_HANDSHAKE {
        let origin = Origin::https(target);
        let connection = Intercepted::new(shared, origin, admitted);
        return explain_cleartext(Arc::new(connection), stream).await;
    }
    let accepting = tokio::time::timeout(
        limits.handshake_time,
        accept(&shared, &target, HeldTicket::new(stream.reading_ahead())),
    );
    match accepting.await {
        Ok(Ok((stream, greeted_another))) => {
            let origin = Origin::https(target);
            let connection =
                Intercepted { greeted_another, ..Intercepted::new(shared, origin, admitted) };
            converse(Arc::new(connection), &limits, stream).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "client handshake failed"),
        Err(_late) => tracing::debug!("client handshake took too long"),
    }
}

/// The record type of a ClientHello (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 22;

async fn accept(
    shared: &Shared,
    target: &Target,
    stream: HeldTicket<Early<ClientStream>>,
) -> io::Result<(InsideTls, bool)> {
    let greeting = LazyConfigAcceptor::new(Default::default(), stream).await?;
    let greeted = greeting.client_hello().server_name().map(Host::parse);
    let greeted_another = greeted.as_ref().is_some_and(|host| host.as_ref() != Ok(&target.host));
    // With a leaf for the name that the client greeted, it gets to see why it is refused.
    let leaves = shared.now.load().leaves.clone();
    let host = match greeted {
        Some(Ok(host)) if greeted_another && leaves.permits(&host) => host,
        _ => target.host.clone(),
    };
    let config = leaves.server_config(&host).map_err(io::Error::other)?;
    let mut stream = greeting.into_stream(config).await?;
    stream.get_mut().0.handshake_is_over();
    Ok((stream, greeted_another))
}

/// The TLS of a client of a listener that speaks it, for the name that the client greets, else for `name`. HTTP/1.1
/// is all that is spoken at the port.
pub(super) async fn accept_at_the_port<S>(
    shared: &Shared,
    name: &Host,
    stream: S,
) -> io::Result<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let accepting = async {
        let greeting = LazyConfigAcceptor::new(Default::default(), stream).await?;
        let greeted = greeting.client_hello().server_name().and_then(|it| Host::parse(it).ok());
        let leaves = shared.now.load().leaves.clone();
        let host = greeted.filter(|host| leaves.permits(host));
        let config = leaves.server_config(host.as_ref().unwrap_or(name));
        let mut config = ServerConfig::clone(&*config.map_err(io::Error::other)?);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        greeting.into_stream(Arc::new(config)).await
    };
    tokio::time::timeout(shared.limits.load().handshake_time, accepting).await?
}

async fn converse(connection: Arc<Intercepted>, limits: &Limits, stream: InsideTls) {
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return http1(connection, limits, stream).await;
    }
    let (shared, ended) = (connection.shared.clone(), connection.admitted.ended());
    let activity = connection.activity.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let going = connection.activity.begin();
        // Boxed, because hyper and tokio move this future about before it begins.
        let exchange = Box::pin(exchange::exchange(connection.clone(), request));
        async move { Ok::<_, Infallible>(exchange.await.map(|body| body.holding(going))) }
    });
    let serving = http2::Builder::new(shared.connections.clone())
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .max_concurrent_streams(limits.streams)
        .max_pending_accept_reset_streams(MOST_RESET_UNSEEN)
        .max_local_error_reset_streams(HTTP2_BROKEN_STREAMS)
        .max_header_list_size(limits.head_size)
        .max_frame_size(HTTP2_FRAME)
        .max_send_buf_size(HTTP2_SEND_BUFFER)
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(connection_window(limits))
        .serve_connection(TokioIo::new(Calm::of_client(stream)), service);
    let serving = std::pin::pin!(Gathered::new(serving, move || activity.is_crowd()));
    let closing = &shared.closing;
    closing.drive(serving, &ended, |it| Pin::new(it.get_mut().get_mut()).graceful_shutdown()).await;
}

async fn http1(connection: Arc<Intercepted>, limits: &Limits, stream: InsideTls) {
    let (shared, ended) = (connection.shared.clone(), connection.admitted.ended());
    let served = (connection.activity.clone(), stream);
    let answer = move |request| exchange::exchange(connection.clone(), request);
    resting::serve(&shared.closing, (&ended, limits), served, answer).await;
}

/// A client that speaks plain HTTP in a tunnel to an intercepted host gets told so.
async fn explain_cleartext<S>(connection: Arc<Intercepted>, stream: S)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (shared, ended) = (connection.shared.clone(), connection.admitted.ended());
    let service = service_fn(move |mut request: Request<Incoming>| {
        let is_noted = connection.shared.audit.is_on();
        let note = is_noted.then(|| Note::of_exchange(&connection, &mut request));
        let refusal = Rejection::CleartextRefused;
        if let Some(note) = &note {
            note.refused(&refusal);
        }
        let response = refusal.into_response();
        let response = match note {
            Some(note) => note.follow(response),
            None => response,
        };
        async { Ok::<_, Infallible>(response) }
    });
    let limits = shared.limits.load_full();
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_size as usize)
        .keep_alive(false)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(Explained::new(stream, Arc::default())), service);
    let serving = std::pin::pin!(serving);
    shared.closing.drive(serving, &ended, |serving| serving.graceful_shutdown()).await;
}
