//! One origin, step by step: name, connection, certificate, HTTP, WebSocket.

use std::time::Duration;

use http::header::DATE;
use http::{Response, Version};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::Scene;
use super::network::{Asked, in_words, request};
use super::report::{Check, Report};
use crate::clock::Clock;
use crate::tls::trust::Signer;
use crate::upstream::body::Body;
use crate::upstream::{Stage, Step, UpstreamError};

/// What came of asking an origin.
pub(super) struct Met<'a> {
    asked: &'a Asked,
    pub(super) goes_through_the_chain: bool,
    /// The certificates that it showed.
    look: Result<Vec<CertificateDer<'static>>, UpstreamError>,
    /// `None` when the certificate was not accepted, so nothing was asked.
    http: Option<Result<(Version, http::StatusCode), UpstreamError>>,
    websocket: Option<Result<u16, String>>,
    /// How far its clock is ahead of ours.
    pub(super) skew: Option<time::Duration>,
}

/// Connects, looks at the certificate, asks for nothing in particular, and for a WebSocket where one is expected.
pub(super) async fn meet<'a>(scene: &Scene, asked: &'a Asked) -> Met<'a> {
    let origin = &asked.origin;
    let goes_through_the_chain = scene.upstream.goes_through_the_chain(&origin.target);
    let look = scene.upstream.look(origin).await;
    let mut met =
        Met { asked, goes_through_the_chain, look, http: None, websocket: None, skew: None };
    if met.look.is_err() {
        return met;
    }
    let answered = scene.upstream.send(origin, request("/")).await;
    met.skew = answered.as_ref().ok().and_then(skew);
    met.http = Some(answered.map(|answer| (answer.version(), answer.status())));
    if let Some(path) = &asked.websocket {
        let asking = tokio::time::timeout(WEBSOCKET_LIMIT, websocket(scene, asked, path));
        let late = || Err("no answer in time".to_owned());
        met.websocket = Some(asking.await.unwrap_or_else(|_late| late()));
    }
    met
}

fn skew(answer: &Response<Body>) -> Option<time::Duration> {
    let date = answer.headers().get(DATE)?.to_str().ok()?;
    let theirs = OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822).ok()?;
    Some(theirs - Clock::system().now())
}

/// Shakes hands for a WebSocket, and closes it at once; the status of the answer.
async fn websocket(scene: &Scene, asked: &Asked, path: &str) -> Result<u16, String> {
    let url = format!("wss://{}{path}", asked.origin.authority());
    let request = url.into_client_request().map_err(|error| error.to_string())?;
    let stream = scene.upstream.open(&asked.origin).await.map_err(|error| in_words(&error))?;
    match Box::pin(tokio_tungstenite::client_async(request, stream)).await {
        Ok((mut socket, answer)) => {
            let _gone = socket.close(None).await;
            Ok(answer.status().as_u16())
        }
        Err(Error::Http(answer)) => Ok(answer.status().as_u16()),
        Err(error) => Err(error.to_string()),
    }
}

impl Met<'_> {
    /// Why it could not be met.
    pub(super) fn failure(&self) -> Option<&UpstreamError> {
        match (&self.look, &self.http) {
            (Err(error), _) | (Ok(_), Some(Err(error))) => Some(error),
            _ => None,
        }
    }

    /// One check for each step, up to the one that failed.
    pub(super) fn report(&self, scene: &Scene, report: &mut Report) {
        let subject = &self.asked.origin.target;
        for check in self.checks(scene) {
            report.add(check.about(subject));
        }
    }

    fn checks(&self, scene: &Scene) -> Vec<Check> {
        let mut checks = Vec::new();
        let failed_at = self.failure().map(|error| self.step_of(error));
        // Behind a chain the first steps are the chain's.
        let ways = match self.goes_through_the_chain {
            true => &[("tunnel", "opened by the upstream proxy")][..],
            false => &[("dns", "the name resolves"), ("tcp", "takes connections")],
        };
        for (id, sentence) in ways {
            if failed_at == Some(id) {
                checks.extend(self.failure().map(|error| failed(id, error)));
                return checks;
            }
            checks.push(Check::ok(id, *sentence));
        }
        match &self.look {
            Err(error) => {
                checks.push(failed(self.step_of(error), error));
                return checks;
            }
            Ok(shown) => {
                let signer =
                    scene.trust.signer(shown, &self.asked.origin.target.host, &Clock::system());
                checks.push(certificate(signer));
            }
        }
        match &self.http {
            None => {}
            Some(Err(error)) => {
                checks.push(failed(if self.asked.is_issuer { "issuer" } else { "http" }, error))
            }
            Some(Ok((version, status))) => checks.push(self.answer(*version, *status)),
        }
        checks.extend(self.websocket.as_ref().map(websocket_check));
        checks
    }

    /// The check that a failure belongs to. Behind a chain the first steps are one.
    fn step_of(&self, error: &UpstreamError) -> &'static str {
        match error.stage() {
            Stage::Tls | Stage::Untrusted(_) | Stage::Timeout(Step::Tls) => "tls",
            Stage::Http | Stage::Timeout(Step::Head) => "http",
            _ if self.goes_through_the_chain => "tunnel",
            Stage::Dns | Stage::Timeout(Step::Dns) => "dns",
            _ => "tcp",
        }
    }

    fn answer(&self, version: Version, status: http::StatusCode) -> Check {
        let id = if self.asked.is_issuer { "issuer" } else { "http" };
        let protocol = if version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" };
        let sentence =
            format!("{protocol}; a request without a credential got {}", status.as_u16());
        if status.is_server_error() {
            let fix = "wait and try again; if it stays so, ask whoever runs the upstream";
            return Check::warning(id, sentence, fix);
        }
        Check::ok(id, sentence)
    }
}

/// Who signed the certificate that was seen.
fn certificate(signer: Signer) -> Check {
    match signer {
        Signer::Public(issuer) => {
            Check::ok("tls", format!("certificate by `{issuer}`, a public CA"))
        }
        Signer::Private(issuer) => Check::ok(
            "tls",
            format!(
                "certificate by `{issuer}`, no public CA: a TLS-inspecting proxy is in the path (it reads what \
                 passes), or the host has a CA of its own; it is trusted by your settings"
            ),
        ),
    }
}

fn websocket_check(outcome: &Result<u16, String>) -> Check {
    let fix = "ask whoever runs the proxies in between to let `Upgrade: websocket` pass; until then Codex goes on \
               over HTTP (websocket_fallback)";
    match outcome {
        Ok(101) => Check::ok("websocket", "opens"),
        // RFC 6455 section 4.2.2 has servers say so before they switch.
        Ok(status @ (401 | 403 | 429)) => Check::ok(
            "websocket",
            format!(
                "the handshake gets through; it was refused with {status} without a credential"
            ),
        ),
        Ok(status) => Check::warning(
            "websocket",
            format!("the handshake was answered with {status}, as if it had been no handshake"),
            fix,
        ),
        Err(error) => Check::warning("websocket", format!("the handshake failed: {error}"), fix),
    }
}

fn failed(id: &'static str, error: &UpstreamError) -> Check {
    Check::failed(id, in_words(error), error.hint())
}

/// Longest wait for a handshake; a person waits for the doctor.
const WEBSOCKET_LIMIT: Duration = Duration::from_secs(15);
