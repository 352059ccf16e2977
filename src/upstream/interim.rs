//! Sends a request on an HTTP/1.1 connection, and gives an upstream up that answers with interim responses
//! without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio::sync::Notify;

use super::body::{Body, BodyError};
use super::expect::Gate;
use crate::limits::INTERIM_RESPONSES;

/// How many interim responses a request's final one may have before it, as an extension of the request. Without it, as
/// for a proxy in front of us that is asked for a tunnel, [`INTERIM_RESPONSES`].
///
/// On HTTP/2 hyper tells nothing of them. There each is thrown away before the next turn of reading
/// (`pool/paced.rs`), and the client waits as it does for any slow answer.
#[derive(Clone, Copy)]
pub(super) struct MostInterim(pub(super) u32);

/// Why a request has no response.
pub(super) struct Unanswered {
    /// The request, when no byte of it was sent.
    pub(super) unsent: Option<Request<Body>>,
    /// The upstream has provably not processed it.
    pub(super) unprocessed: bool,
    pub(super) error: BodyError,
}

#[derive(Debug, thiserror::Error)]
#[error("the upstream sent more than {0} interim responses")]
struct TooMany(u32);

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
    let most = request.extensions_mut().remove::<MostInterim>();
    let most = most.map_or(INTERIM_RESPONSES, |MostInterim(most)| most);
    let flood = Arc::new(Notify::new());
    let (seen, overflow) = (AtomicU32::new(0), flood.clone());
    hyper::ext::on_informational(&mut request, move |interim| {
        if seen.fetch_add(1, Ordering::Relaxed) == most {
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
            Err(Unanswered { unsent: None, unprocessed: false, error: TooMany(most).into() })
        }
        response = sender.try_send_request(request) => response.map_err(|mut failed| {
            let unsent = failed.take_message();
            let unprocessed = unsent.is_some();
            Unanswered { unsent, unprocessed, error: failed.into_error().into() }
        }),
    }
}
