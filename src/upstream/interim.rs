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

/// How many interim responses a request's final one may have before it. On HTTP/2 `pool/stream.rs` counts them.
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

impl Unanswered {
    /// Interim responses came, and no end of them.
    pub(super) fn too_many(MostInterim(most): MostInterim) -> Self {
        Self { unsent: None, unprocessed: false, error: TooMany(most).into() }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the upstream sent more than {0} interim responses")]
struct TooMany(u32);

/// Counts interim responses until they are too many.
#[derive(Default)]
struct Count {
    seen: AtomicU32,
    overflow: Notify,
}

/// Sends a request whose [`Gate`], where it has one, is among its extensions. It is on its way when this returns, before
/// the outcome is asked for.
///
/// # Errors
///
/// [`Unanswered`]; then the connection is of no use.
pub(super) fn send(
    sender: &mut SendRequest<Body>,
    mut request: Request<Body>,
    MostInterim(most): MostInterim,
) -> impl Future<Output = Result<Response<Incoming>, Unanswered>> + use<> {
    let gate = request.extensions_mut().remove::<Gate>();
    let count = Arc::<Count>::default();
    let counting = count.clone();
    hyper::ext::on_informational(&mut request, move |interim| {
        if counting.seen.fetch_add(1, Ordering::Relaxed) == most {
            counting.overflow.notify_one();
        }
        if let Some(gate) = &gate
            && interim.status() == StatusCode::CONTINUE
        {
            gate.open();
        }
    });
    let sending = sender.try_send_request(request);
    async move {
        tokio::select! {
            biased;
            () = count.overflow.notified() => {
                Err(Unanswered::too_many(MostInterim(most)))
            }
            response = sending => response.map_err(|mut failed| {
                let unsent = failed.take_message();
                let unprocessed = unsent.is_some();
                Unanswered { unsent, unprocessed, error: failed.into_error().into() }
            }),
        }
    }
}
