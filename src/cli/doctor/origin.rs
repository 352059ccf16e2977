//! One origin, step by step: name, connection, certificate, HTTP, WebSocket.

use std::time::Duration;

use http::header::DATE;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::Scene;
use super::network::{Asked, in_words, request};
use super::report::{Check, Report};
use crate::clock::Clock;
use crate::origin::Origin;
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
    http: Option<Result<Answer, UpstreamError>>,
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
    let answered = send(scene, origin, request("/")).await;
    met.skew = answered.as_ref().ok().and_then(skew);
    met.http = Some(answered.map(|answer| Answer {
        version: answer.version(),
        status: answer.status(),
        page: page_of_a_proxy(&answer),
    }));
    let is_answered = matches!(&met.http, Some(Ok(Answer { page: None, status, .. })) if *status != StatusCode::BAD_GATEWAY);
    if let (Some(path), true) = (&asked.websocket, is_answered) {
        met.websocket = Some(websocket(scene, origin, path, &HeaderMap::new()).await);
    }
    met
}

/// Sends a request, and waits for its answer no longer than a person would.
pub(super) async fn send(
    scene: &Scene,
    origin: &Origin,
    request: Request<Body>,
) -> Result<Response<Body>, UpstreamError> {
    let sent = timeout(scene.limit, scene.upstream.send(origin, request)).await;
    sent.unwrap_or_else(|_late| Err(UpstreamError::no_head(origin)))
}

fn skew(answer: &Response<Body>) -> Option<time::Duration> {
    let date = answer.headers().get(DATE)?.to_str().ok()?;
    let theirs = OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822).ok()?;
    Some(theirs - Clock::system().now())
}

/// Shakes hands for a WebSocket with these fields besides its own, and closes it at once; the status of the answer.
pub(super) async fn websocket(
    scene: &Scene,
    origin: &Origin,
    path: &str,
    fields: &HeaderMap,
) -> Result<u16, String> {
    let url = format!("wss://{}{path}", origin.authority());
    let mut request = url.into_client_request().map_err(|error| error.to_string())?;
    request.headers_mut().extend(fields.clone());
    let asking = async {
        let stream = scene.upstream.open(origin).await.map_err(|error| in_words(&error))?;
        match Box::pin(tokio_tungstenite::client_async(request, stream)).await {
            Ok((mut socket, answer)) => {
                let _gone = socket.close(None).await;
                Ok(answer.status().as_u16())
            }
            Err(Error::Http(answer)) => Ok(answer.status().as_u16()),
            Err(error) => Err(error.to_string()),
        }
    };
    let late = |_| Err("no answer in time".to_owned());
    timeout(WEBSOCKET_LIMIT, asking).await.unwrap_or_else(late)
}

impl Met<'_> {
    /// Why it could not be met.
    pub(super) fn failure(&self) -> Option<&UpstreamError> {
        match (&self.look, &self.http) {
            (Err(error), _) | (Ok(_), Some(Err(error))) => Some(error),
            _ => None,
        }
    }

    /// Whether the chain has answered, be it with a refusal.
    pub(super) fn has_met_the_chain(&self) -> bool {
        let refused = |error: &UpstreamError| matches!(error.stage(), Stage::ChainRefused(_));
        self.failure().is_none_or(|error| refused(error) || self.step_of(error) != "tunnel")
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
            false if scene.config.upstream.resolve.contains_key(&self.asked.origin.target) => {
                &DIRECT_ELSEWHERE[..]
            }
            false if scene.config.upstream.proxies.is_empty() => &DIRECT[..],
            false => &DIRECT_BESIDE_A_CHAIN[..],
        };
        for (id, sentence) in ways {
            if failed_at == Some(id) {
                checks.extend(self.failure().map(|error| match error.stage() {
                    Stage::Dns if *id == "tunnel" => Check::failed(id, in_words(error), SOCKS5H),
                    _ => failed(id, error),
                }));
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
            Some(Ok(answer)) => checks.push(self.answer(answer)),
        }
        checks.extend(self.websocket.as_ref().map(|it| websocket_check(it, false)));
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

    fn answer(&self, answer: &Answer) -> Check {
        let id = if self.asked.is_issuer { "issuer" } else { "http" };
        let protocol = if answer.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" };
        let (status, code) = (answer.status, answer.status.as_u16());
        if let Some(page) = &answer.page {
            let sentence =
                format!("{protocol}; {code} with a page of the proxy in between ({page})");
            return Check::warning(id, sentence, "ask whoever runs it to allow this host");
        }
        let sentence = format!("{protocol}; a request without a credential got {code}");
        if status.is_server_error() {
            let fix = "wait and try again; if it stays so, ask whoever runs the upstream";
            return Check::warning(id, sentence, fix);
        }
        Check::ok(id, sentence)
    }
}

/// What a request without a credential got.
struct Answer {
    version: Version,
    status: StatusCode,
    page: Option<String>,
}

/// What tells that a refusal is a page that a proxy in between has put in the upstream's place.
pub(super) fn page_of_a_proxy(answer: &Response<Body>) -> Option<String> {
    let is_refusal = answer.status() == StatusCode::FORBIDDEN || answer.status().is_server_error();
    let squid = answer.headers().get("x-squid-error").filter(|_| is_refusal)?;
    Some(format!("X-Squid-Error: {}", squid.to_str().unwrap_or("?")))
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

pub(super) fn websocket_check(outcome: &Result<u16, String>, is_signed_in: bool) -> Check {
    let fix = "ask whoever runs the proxies in between to let `Upgrade: websocket` pass; until then Codex goes on \
               over HTTP (websocket_fallback)";
    match outcome {
        Ok(101) => Check::ok("websocket", "opens"),
        // Any request would be refused so, and also what a proxy has made of a handshake.
        Ok(status @ (401 | 403 | 429)) if is_signed_in => Check::failed(
            "websocket",
            format!("the handshake was refused with {status}"),
            "sign in again, or ask what the account may use",
        ),
        Ok(status @ (401 | 403 | 429)) => Check::ok(
            "websocket",
            format!("refused with {status} without a credential, so not known: --sign-in tries it"),
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

const DIRECT: [(&str, &str); 2] = [("dns", "the name resolves"), ("tcp", "takes connections")];
const DIRECT_ELSEWHERE: [(&str, &str); 2] =
    [("dns", "not asked for: [upstream.resolve] says where it is"), ("tcp", "takes connections")];
const DIRECT_BESIDE_A_CHAIN: [(&str, &str); 2] = [
    ("dns", "reached without the proxy (NO_PROXY); the name resolves"),
    ("tcp", "takes connections"),
];

const SOCKS5H: &str =
    "write socks5h://, with which the proxy resolves names, in the place of socks5://";

/// Longest wait for a handshake; a person waits for the doctor.
const WEBSOCKET_LIMIT: Duration = Duration::from_secs(15);
