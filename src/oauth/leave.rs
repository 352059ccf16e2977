//! The permission to send a refresh token: it ends when others may think that it was never used.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

use crate::upstream::body::{Body, BodyError};

/// Taken at most once, and only in time. Whoever waits for what is sent may withdraw it until then.
#[derive(Debug)]
pub struct Leave {
    until: Instant,
    state: AtomicU8,
}

impl Leave {
    /// One that can be taken before that moment.
    pub fn until(until: Instant) -> Arc<Self> {
        Arc::new(Self { until, state: AtomicU8::new(OPEN) })
    }

    /// Whether what it is for may be sent, now and once.
    #[must_use]
    pub fn take(&self) -> bool {
        Instant::now() < self.until && self.leads_to(TAKEN)
    }

    /// Whether it was not taken, and never will be.
    #[must_use]
    pub fn withdraw(&self) -> bool {
        self.leads_to(WITHDRAWN) || self.state.load(Ordering::SeqCst) == WITHDRAWN
    }

    fn leads_to(&self, state: u8) -> bool {
        self.state.compare_exchange(OPEN, state, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// A body that takes the leave when its first byte is asked for, and breaks off without it.
    pub(super) fn body(self: &Arc<Self>, bytes: Bytes) -> Body {
        Body::boxed(OnLeave { leave: Arc::clone(self), bytes: Some(bytes) })
    }
}

struct OnLeave {
    leave: Arc<Leave>,
    bytes: Option<Bytes>,
}

impl HttpBody for OnLeave {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(bytes) = self.bytes.take() else { return Poll::Ready(None) };
        Poll::Ready(Some(match self.leave.take() {
            true => Ok(Frame::data(bytes)),
            false => Err("this process stood still for too long".into()),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

const OPEN: u8 = 0;
const TAKEN: u8 = 1;
const WITHDRAWN: u8 = 2;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn is_taken_once_and_in_time() {
        let leave = || Leave::until(Instant::now() + Duration::from_secs(30));
        let taken = leave();
        assert!(taken.take() && !taken.take() && !taken.withdraw());
        let withdrawn = leave();
        assert!(withdrawn.withdraw() && !withdrawn.take() && withdrawn.withdraw());
        let late = leave();
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(!late.take() && late.withdraw());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_without_leave_gives_nothing() {
        let leave = Leave::until(Instant::now() + Duration::from_secs(30));
        let body = leave.body(Bytes::from_static(b"token"));
        assert_eq!(body.size_hint().exact(), Some(5));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "token");
        assert!(leave.body(Bytes::from_static(b"token")).collect().await.is_err());
    }
}
