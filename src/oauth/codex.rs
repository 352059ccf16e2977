//! The issuer of ChatGPT logins, spoken to as Codex speaks to it.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Limited};

use super::refresh::{MAX_ANSWER_BYTES, judge};
use super::wire::refresh_request;
use super::{Answer, Issuer, Reason, RefreshError};
use crate::origin::{Host, Origin, Target};
use crate::secret::Secret;
use crate::upstream::body::Body;
use crate::upstream::{Upstream, UpstreamError};

/// Redeems refresh tokens at `auth.openai.com`, over the same trust and chain as every other request.
#[derive(Debug)]
pub struct CodexIssuer {
    upstream: Upstream,
    origin: Origin,
}

/// The public client that Codex is registered as (observed, Codex 0.169.0).
const CLIENT_ID: &str = "app_EMoamEEZ73f0CkXaXp7hrann";

/// Where Codex's logins come from.
const HOST: &str = "auth.openai.com";

/// Longest time from asking to the last byte of the answer. The claim on a login outlives it.
const POST_LIMIT: Duration = Duration::from_secs(15);

impl CodexIssuer {
    /// The issuer, reached through `upstream`.
    pub fn new(upstream: Upstream) -> Self {
        let target = Target { host: Host::Name(HOST.into()), port: 443 };
        Self { upstream, origin: Origin::https(target) }
    }

    async fn post(&self, body: Bytes) -> Result<Answer, RefreshError> {
        let request = Request::builder()
            .method(Method::POST)
            .uri("/oauth/token")
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "application/json")
            .header("originator", "codex_cli_rs")
            .header(USER_AGENT, concat!("valetkey/", env!("CARGO_PKG_VERSION")))
            .body(Body::from(body))
            .map_err(|error| RefreshError::NotSent(error.to_string()))?;
        let response =
            self.upstream.send_once(&self.origin, request).await.map_err(unsent_or_not)?;
        let (parts, body) = Response::into_parts(response);
        let body = Limited::new(body, MAX_ANSWER_BYTES + 1).collect().await;
        let body = body.map_err(|error| RefreshError::Unknown(error.to_string()))?.to_bytes();
        judge(parts.status, &parts.headers, &body)
    }
}

impl Issuer for CodexIssuer {
    fn refresh<'a>(
        &'a self,
        token: &'a Secret,
        reason: Reason,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        let body = refresh_request(CLIENT_ID, reason, token);
        Box::pin(async move {
            match tokio::time::timeout(POST_LIMIT, self.post(body)).await {
                Ok(outcome) => outcome,
                Err(_late) => Err(RefreshError::Unknown("no answer within 15 s".to_owned())),
            }
        })
    }
}

fn unsent_or_not(error: UpstreamError) -> RefreshError {
    let why = error.to_string();
    if error.left() { RefreshError::Unknown(why) } else { RefreshError::NotSent(why) }
}
