//! Signs in with a code that is typed in elsewhere: RFC 8628, and the like of it that Codex's issuer has.

use std::time::Duration;

use http::StatusCode;
use tokio::time::{Instant, sleep, timeout_at};

use super::authorize::redeem;
use super::provider::{Dialect, Provider};
use super::refresh::judge;
use super::wire::{self, error_code};
use super::{Answer, LoginError, RefreshError};
use crate::secret::Secret;

/// A code that a person has to type in.
pub struct DeviceCode {
    /// What is typed.
    pub user_code: String,
    /// Where it is typed: an `https` page.
    pub page: String,
    /// The same page with the code in it, where the issuer has one.
    pub page_with_code: Option<String>,
    /// How long there is time.
    pub lives: Duration,
    /// How long to wait between two questions.
    interval: Duration,
    /// What the issuer knows this by.
    id: Secret,
}

impl DeviceCode {
    /// Asks the issuer for a code.
    ///
    /// # Errors
    ///
    /// [`LoginError::NoDeviceCodes`] where the issuer has none for this client.
    pub async fn ask(provider: &Provider) -> Result<Self, LoginError> {
        let none = || LoginError::Unfit("the issuer offers no device codes".to_owned());
        let endpoint = provider.endpoints().await?.device.as_ref().ok_or_else(none)?;
        let registration = &provider.registration;
        match provider.dialect() {
            Dialect::Codex => {
                let body = wire::user_code_request(&registration.client_id);
                let reply = provider.post_json(endpoint, body).await?;
                if reply.status == StatusCode::NOT_FOUND {
                    return Err(LoginError::NoDeviceCodes(NOT_ENABLED.to_owned()));
                }
                if !reply.status.is_success() {
                    let status = reply.status;
                    let what = format!("device code request failed with status {status}");
                    return Err(LoginError::Nonsense(what));
                }
                let (id, user_code, interval) = wire::parse_user_code(&reply.body)
                    .ok_or_else(|| LoginError::Nonsense("it has no device code".to_owned()))?;
                Ok(Self {
                    user_code,
                    page: registration.issuer.at("/codex/device").url(),
                    page_with_code: None,
                    lives: CODEX_LIFE,
                    interval: interval.unwrap_or(USUAL_INTERVAL),
                    id,
                })
            }
            Dialect::Standard => {
                let id = registration.client_id.as_str();
                let scope = registration.scopes.join(" ");
                let mut fields = Vec::new();
                // Section 3.1 wants the id also of a client that proves itself.
                fields.extend(registration.client_secret.as_ref().map(|_| ("client_id", id)));
                fields.extend((!scope.is_empty()).then_some(("scope", scope.as_str())));
                fields.extend(registration.audience.as_deref().map(|it| ("audience", it)));
                let reply = provider.post_form(endpoint, &fields).await?;
                if !reply.status.is_success() {
                    return Err(reply.refusal());
                }
                let answer = wire::parse_device_answer(&reply.body)
                    .ok_or_else(|| LoginError::Nonsense("it has no device code".to_owned()))?;
                Ok(Self {
                    user_code: answer.user_code,
                    page: answer.verification_uri,
                    page_with_code: answer.verification_uri_complete,
                    lives: answer.expires_in.unwrap_or(CODEX_LIFE).min(LONGEST_LIFE),
                    interval: answer.interval.unwrap_or(USUAL_INTERVAL),
                    id: answer.device_code,
                })
            }
        }
    }

    /// Asks until the person has signed in, never more often than the issuer wants, and gives up when the
    /// code has expired.
    ///
    /// # Errors
    ///
    /// [`LoginError`].
    pub async fn wait(&self, provider: &Provider) -> Result<Answer, LoginError> {
        let end = Instant::now() + self.lives;
        let minutes = self.lives.as_secs().div_ceil(60);
        let mut interval = self.interval.clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL);
        let asking = async {
            loop {
                sleep(interval).await;
                match self.poll(provider).await {
                    Ok(Polled::Ended(end)) => return *end,
                    Ok(Polled::Pending) => {}
                    Ok(Polled::SlowDown) => {
                        interval = (interval + SLOW_DOWN).min(LONGEST_INTERVAL);
                    }
                    // A network that is away for a moment; section 3.5 wants fewer questions then.
                    Err(LoginError::Unreachable(error)) if is_passing(&error) => {
                        tracing::debug!(%error, "a question went unanswered");
                        interval = (interval * 2).min(LONGEST_INTERVAL);
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        timeout_at(end, asking).await.unwrap_or(Err(LoginError::TimedOut(minutes)))
    }

    async fn poll(&self, provider: &Provider) -> Result<Polled, LoginError> {
        match provider.dialect() {
            Dialect::Codex => self.poll_codex(provider).await,
            Dialect::Standard => self.poll_standard(provider).await,
        }
    }

    async fn poll_codex(&self, provider: &Provider) -> Result<Polled, LoginError> {
        let issuer = &provider.registration.issuer;
        let endpoint = issuer.at("/api/accounts/deviceauth/token");
        let body = wire::device_token_request(&self.id, &self.user_code);
        let reply = provider.post_json(&endpoint, body).await?;
        match reply.status {
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => return Ok(Polled::Pending),
            StatusCode::TOO_MANY_REQUESTS => return Ok(Polled::SlowDown),
            status if !status.is_success() => {
                let what = format!("device auth failed with status {status}");
                return Err(LoginError::Nonsense(what));
            }
            _ => {}
        }
        let (code, verifier) = wire::parse_device_grant(&reply.body)
            .ok_or_else(|| LoginError::Nonsense("it has no authorization code".to_owned()))?;
        let redirect_uri = issuer.at("/deviceauth/callback").url();
        // Whatever comes of it: the code may be spent, and there is no other.
        let end = redeem(provider, &code, &redirect_uri, &verifier).await;
        Ok(Polled::Ended(Box::new(end)))
    }

    async fn poll_standard(&self, provider: &Provider) -> Result<Polled, LoginError> {
        let fields = [("grant_type", GRANT), ("device_code", self.id.expose())];
        let token = &provider.endpoints().await?.token;
        let reply = provider.post_form(token, &fields).await?;
        // Some issuers answer 200 with an error, so the code is looked at first.
        match error_code(&reply.body).flatten().as_deref() {
            Some("authorization_pending") => return Ok(Polled::Pending),
            Some("slow_down") => return Ok(Polled::SlowDown),
            Some("expired_token") => {
                return Err(LoginError::TimedOut(self.lives.as_secs().div_ceil(60)));
            }
            Some(_) => return Err(reply.refusal()),
            None => {}
        }
        match judge(reply.status, &reply.headers, &reply.body) {
            Ok(answer) => Ok(Polled::Ended(Box::new(Ok(answer)))),
            Err(RefreshError::Limited { .. }) => Ok(Polled::SlowDown),
            Err(error) => Err(LoginError::Nonsense(error.to_string())),
        }
    }
}

enum Polled {
    /// The person is done, and so are we.
    Ended(Box<Result<Answer, LoginError>>),
    Pending,
    SlowDown,
}

/// Whether it may be over in a moment: a certificate that is not accepted stays so.
fn is_passing(error: &crate::upstream::UpstreamError) -> bool {
    use crate::upstream::Stage;
    matches!(
        error.stage(),
        Stage::Dns | Stage::Http | Stage::Tcp | Stage::Timeout(_) | Stage::ChainUnreachable(_)
    )
}

/// Codex's sentence.
const NOT_ENABLED: &str = "device code login is not enabled for this Codex server. Use the browser login or \
     verify the server URL.";

/// RFC 8628 section 3.4.
const GRANT: &str = "urn:ietf:params:oauth:grant-type:device_code";

/// How long a code of Codex's issuer lives.
const CODEX_LIFE: Duration = Duration::from_secs(15 * 60);

/// Longest that anybody waits for a person.
const LONGEST_LIFE: Duration = Duration::from_secs(60 * 60);

/// RFC 8628 section 3.2, where the issuer says nothing.
const USUAL_INTERVAL: Duration = Duration::from_secs(5);

/// No issuer is asked more often than this, or less often than that, whatever it says.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// RFC 8628 section 3.5.
const SLOW_DOWN: Duration = Duration::from_secs(5);
