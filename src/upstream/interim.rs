//! Sends a request on an HTTP/1.1 connection, and gives an upstream up that answers with interim responses
//! without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio::sync::Notify;

use super::body::{Body, BodyError};
use super::expect::Gate;

/// Most interim responses before the final one: a 100, some 103, and a 102 now and then while the
/// upstream works. One that sends more would hold a client for ever, and hyper has no limit of its own.
/// The same for a proxy in front of us that is asked for a tunnel.
///
/// On HTTP/2 hyper tells nothing of them. There each is thrown away before the next turn of reading
/// (`pool/paced.rs`), and the client waits as it does for any slow answer.
const MOST_INTERIM: usize = 16;

/// Why a request has no response.
pub(super) struct Unanswered {
    /// The request, when no byte of it was sent.
    pub(super) unsent: Option<Request<Body>>,
    /// The upstream has provably not processed it.
    pub(super) unprocessed: bool,
    pub(super) error: BodyError,
}

#[derive(Debug, thiserror::Error)]
#[error("the upstream sent more than {MOST_INTERIM} interim responses")]
struct TooMany;

/// Sends a request whose [`Gate`], where it has one, is among its extensions.
///
/// # Errors
///
/// [`Unanswered`]; then the connection is of no use.
pub(super) async fn send(
    sender: &mut SendRequest<Body>,
    mut request: Request<Body>,
) -> Result<Response<Incoming>, Unanswered> {
    let gate = request.extensions_mut().remove::<Gate>();
    let flood = Arc::new(Notify::new());
    let (seen, overflow) = (AtomicUsize::new(0), flood.clone());
    hyper::ext::on_informational(&mut request, move |interim| {
        if seen.fetch_add(1, Ordering::Relaxed) == MOST_INTERIM {
            overflow.notify_one();
        }
        if let Some(gate) = &gate
            && interim.status() == StatusCode::CONTINUE
        {
            gate.open();
        }
    });
    tokio::select! {
        biased;
        () = flood.notified() => {
            Err(Unanswered { unsent: None, unprocessed: false, error: TooMany.into() })
        }
        response = sender.try_send_request(request) => response.map_err(|mut failed| {
            let unsent = failed.take_message();
            let unprocessed = unsent.is_some();
            Unanswered { unsent, unprocessed, error: failed.into_error().into() }
        }),
    }
}
