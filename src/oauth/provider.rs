//! One issuer as one registered client sees it: who we are there, where its endpoints are, how it speaks.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::header::HeaderValue;
use http::{HeaderMap, StatusCode};
use tokio::sync::OnceCell;

use super::call::{self, Call, CallError, Reply, Say};
use super::metadata::Endpoints;
use super::refresh::judge;
use super::wire::{self, error_code, is_json};
use super::{Answer, Issuer, Leave, LoginError, Reason, RefreshError, Trouble};
use crate::credential::{Account, CODEX_CLIENT_ID, CODEX_ISSUER, Grant, TokenSet};
use crate::origin::{Endpoint, Host, Origin, Target};
use crate::secret::Secret;
use crate::upstream::Upstream;

/// Speaks to one issuer, over the same trust and chain as every other request.
pub struct Provider {
    pub(super) upstream: Upstream,
    pub(super) registration: Registration,
    endpoints: OnceCell<Endpoints>,
}

/// What an issuer knows us as.
#[derive(Clone)]
pub struct Registration {
    /// The issuer's own URL.
    pub issuer: Endpoint,
    /// How it speaks.
    pub dialect: Dialect,
    /// The client that we are.
    pub client_id: String,
    /// What a client proves itself with that is not public. Read when it is needed.
    pub client_secret: Option<Arc<ReadSecret>>,
    /// What is asked for; may be empty.
    pub scopes: Vec<String>,
    /// The API that the tokens are for, where the issuer wants it named.
    pub audience: Option<String>,
    /// How a login comes to be.
    pub grant: Grant,
}

/// Reads a client's secret from where its owner keeps it. Its error must not quote it.
pub type ReadSecret = dyn Fn() -> BoxFuture<'static, Result<Secret, String>> + Send + Sync;

/// How an issuer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// As OpenAI's issuer and Codex do.
    Codex,
    /// As the RFCs have it: 6749, 7009, 7636, 8414, 8628.
    Standard,
}

impl Registration {
    /// The public client that Codex is registered as.
    pub fn codex() -> Self {
        let host = CODEX_ISSUER.trim_start_matches("https://");
        let origin = Origin::https(Target { host: Host::Name(host.into()), port: 443 });
        Self {
            issuer: Endpoint { origin, path: "/".to_owned() },
            dialect: Dialect::Codex,
            client_id: CODEX_CLIENT_ID.to_owned(),
            client_secret: None,
            scopes: CODEX_SCOPES.split(' ').map(str::to_owned).collect(),
            audience: None,
            grant: Grant::AuthorizationCode,
        }
    }
}

impl Provider {
    /// The issuer of ChatGPT logins, reached through `upstream`.
    pub fn codex(upstream: Upstream) -> Self {
        Self::new(upstream, Registration::codex())
    }

    /// An issuer, reached through `upstream`. Where its endpoints are is asked when they are needed.
    pub fn new(upstream: Upstream, registration: Registration) -> Self {
        let endpoints = match registration.dialect {
            Dialect::Codex => OnceCell::new_with(Some(Endpoints::codex(&registration.issuer))),
            Dialect::Standard => OnceCell::new(),
        };
        Self { upstream, registration, endpoints }
    }

    /// How it speaks.
    pub fn dialect(&self) -> Dialect {
        self.registration.dialect
    }

    /// How a login comes to be.
    pub fn grant(&self) -> Grant {
        self.registration.grant
    }

    /// Where its endpoints are. Asked once; a failure is not remembered.
    pub(super) async fn endpoints(&self) -> Result<&Endpoints, LoginError> {
        self.endpoints.get_or_try_init(|| Endpoints::discover(self)).await
    }

    pub(super) async fn get(
        &self,
        endpoint: &Endpoint,
        authorization: Option<HeaderValue>,
    ) -> Result<Reply, CallError> {
        self.call(endpoint, authorization).say(Say::Nothing).await
    }

    pub(super) async fn post_json(
        &self,
        endpoint: &Endpoint,
        body: bytes::Bytes,
    ) -> Result<Reply, CallError> {
        self.call(endpoint, None).say(Say::Json(body)).await
    }

    /// Posts a form as the client that we are: with its secret where it has one, else with its id.
    pub(super) async fn post_form(
        &self,
        endpoint: &Endpoint,
        fields: &[(&str, &str)],
    ) -> Result<Reply, PostError> {
        self.post_form_on(None, endpoint, fields).await
    }

    /// As [`Provider::post_form`], with the leave that it takes to send it.
    async fn post_form_on(
        &self,
        leave: Option<&Arc<Leave>>,
        endpoint: &Endpoint,
        fields: &[(&str, &str)],
    ) -> Result<Reply, PostError> {
        let id = self.registration.client_id.as_str();
        let mut all = Vec::with_capacity(fields.len() + 1);
        let proof = match &self.registration.client_secret {
            None => {
                all.push(("client_id", id));
                None
            }
            Some(read) => {
                let secret = read().await.map_err(PostError::Secret)?;
                let unfit = || PostError::Secret("the client secret cannot be sent".to_owned());
                Some(call::basic(id, &secret).ok_or_else(unfit)?)
            }
        };
        all.extend_from_slice(fields);
        Ok(Call { leave, ..self.call(endpoint, proof) }.say(Say::Form(&all)).await?)
    }

    fn call<'a>(&'a self, endpoint: &'a Endpoint, authorization: Option<HeaderValue>) -> Call<'a> {
        Call { upstream: &self.upstream, endpoint, authorization, limit: POST_LIMIT, leave: None }
    }

    /// Tells the issuer that the tokens of a set are not wanted any more; what it answers does not matter to
    /// us, as they are forgotten here in any case.
    ///
    /// # Errors
    ///
    /// [`LoginError`] when the issuer cannot have heard it, or did not do it.
    pub async fn revoke(&self, set: &TokenSet) -> Result<(), LoginError> {
        tokio::time::timeout(REVOKE_LIMIT, self.revoke_unlimited(set))
            .await
            .unwrap_or(Err(LoginError::NoAnswer(REVOKE_LIMIT.as_secs())))
    }

    async fn revoke_unlimited(&self, set: &TokenSet) -> Result<(), LoginError> {
        let Some(endpoint) = &self.endpoints().await?.revoke else { return Ok(()) };
        let (token, hint) = match &set.refresh {
            Some(refresh) => (refresh, "refresh_token"),
            None => (&set.access, "access_token"),
        };
        let reply = match self.dialect() {
            Dialect::Codex => {
                let id = set.refresh.as_ref().map(|_| self.registration.client_id.as_str());
                self.post_json(endpoint, wire::revoke_request(token, hint, id)).await?
            }
            Dialect::Standard => {
                let fields = [("token", token.expose()), ("token_type_hint", hint)];
                self.post_form(endpoint, &fields).await?
            }
        };
        if reply.status.is_success() { Ok(()) } else { Err(reply.refusal()) }
    }

    async fn whoami(&self, token: &Secret) -> Result<Account, RefreshError> {
        if self.dialect() != Dialect::Codex {
            return Err(RefreshError::NotSent("this issuer has no such tokens".into()));
        }
        let unfit = || RefreshError::Rejected { code: "unfit_token".to_owned() };
        let bearer = call::bearer(token).ok_or_else(unfit)?;
        let endpoint = self.registration.issuer.at(WHOAMI);
        let reply = self.get(&endpoint, Some(bearer)).await.map_err(unsent_or_not)?;
        match (reply.status, is_json(&reply.headers)) {
            (StatusCode::OK, true) => wire::parse_whoami(&reply.body)
                .ok_or_else(|| RefreshError::Unknown("the answer names no account".to_owned())),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, true) => {
                let code = error_code(&reply.body).flatten();
                Err(RefreshError::Rejected { code: code.unwrap_or_else(|| "unauthorized".into()) })
            }
            (StatusCode::TOO_MANY_REQUESTS, _) => Err(RefreshError::Limited { retry_after: None }),
            (status, _) => Err(RefreshError::Unknown(format!("status {}", status.as_u16()))),
        }
    }

    async fn next(
        &self,
        old: Option<&TokenSet>,
        reason: Reason,
        leave: &Arc<Leave>,
    ) -> Result<Answer, RefreshError> {
        // Whatever becomes of this, no token has left.
        let found = tokio::time::timeout(DISCOVERY_LIMIT, self.endpoints()).await;
        let late =
            || RefreshError::NotSent("the issuer does not say where its endpoints are".into());
        let endpoints = found.map_err(|_| late())?;
        let endpoints = endpoints.map_err(|error| RefreshError::NotSent(trouble_of(&error)))?;
        let reply = match (self.dialect(), old.and_then(|old| old.refresh.as_ref())) {
            (Dialect::Codex, Some(token)) => {
                let body = wire::refresh_request(&self.registration.client_id, reason, token);
                let call = Call { leave: Some(leave), ..self.call(&endpoints.token, None) };
                call.say(Say::Json(body)).await.map_err(unsent_or_not)?
            }
            (Dialect::Standard, Some(token)) => {
                let fields = [("grant_type", "refresh_token"), ("refresh_token", token.expose())];
                self.post_form_on(Some(leave), &endpoints.token, &fields).await?
            }
            (Dialect::Standard, None) if self.signs_in_by_itself() => {
                let scope = self.registration.scopes.join(" ");
                let mut fields = vec![("grant_type", "client_credentials")];
                fields.extend((!scope.is_empty()).then_some(("scope", scope.as_str())));
                let audience = self.registration.audience.as_deref();
                fields.extend(audience.map(|audience| ("audience", audience)));
                self.post_form_on(Some(leave), &endpoints.token, &fields).await?
            }
            (_, None) => {
                return Err(RefreshError::NotSent("there is nothing to redeem".into()));
            }
        };
        judge_as(self.dialect(), reply.status, &reply.headers, &reply.body)
    }

    fn signs_in_by_itself(&self) -> bool {
        self.grant() == Grant::ClientCredentials
    }
}

/// As [`judge`]; but where a client has to prove itself, that the issuer does not take the proof says nothing
/// of the token (RFC 6749 section 5.2, `invalid_client`).
fn judge_as(
    dialect: Dialect,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Answer, RefreshError> {
    let code = || error_code(body).flatten();
    if dialect == Dialect::Standard && status.is_client_error() && is_json(headers) {
        match code() {
            Some(code) if OF_THE_CLIENT.contains(&code.as_str()) => {
                let why = format!("the issuer refuses the client: {code}");
                return Err(RefreshError::NotSent(why.into()));
            }
            _ => {}
        }
    }
    judge(status, headers, body)
}

impl Issuer for Provider {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        old.is_some_and(|old| old.refresh.is_some()) || self.signs_in_by_itself()
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        reason: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        self.next(old, reason, leave).boxed()
    }

    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        self.whoami(token).boxed()
    }
}

/// Why a form was not answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum PostError {
    #[error("the client secret cannot be read: {0}")]
    Secret(String),
    #[error(transparent)]
    Call(#[from] CallError),
}

impl From<PostError> for LoginError {
    fn from(error: PostError) -> Self {
        match error {
            PostError::Call(error) => error.into(),
            PostError::Secret(_) => Self::Unfit(error.to_string()),
        }
    }
}

impl From<PostError> for RefreshError {
    fn from(error: PostError) -> Self {
        match error {
            PostError::Call(error) => unsent_or_not(error),
            PostError::Secret(_) => Self::NotSent(error.to_string().into()),
        }
    }
}

fn unsent_or_not(error: CallError) -> RefreshError {
    let why = error.to_string();
    if error.left() {
        return RefreshError::Unknown(why);
    }
    let hint = match &error {
        CallError::Upstream(error) => Some(error.hint().into_owned()),
        _ => None,
    };
    RefreshError::NotSent(Trouble { why, hint })
}

fn trouble_of(error: &LoginError) -> Trouble {
    let why = match error {
        LoginError::Unreachable(cause) => cause.to_string(),
        other => other.to_string(),
    };
    Trouble { why, hint: error.hint() }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Provider({})", self.registration.issuer.url())
    }
}

/// Codex says who it is in this field and in the parameter of the same name; the issuer's allow-lists go by
/// it (observed, Codex 0.169.0).
pub(super) const ORIGINATOR: &str = "codex_cli_rs";

/// What Codex asks for (observed, Codex 0.169.0).
const CODEX_SCOPES: &str =
    "openid profile email offline_access api.connectors.read api.connectors.invoke";

/// Who a personal access token speaks for (observed, Codex 0.169.0).
const WHOAMI: &str = "/api/accounts/v1/user-auth-credential/whoami";

/// Codes that say something of the client and nothing of its token (RFC 6749 section 5.2).
const OF_THE_CLIENT: [&str; 4] =
    ["invalid_client", "invalid_scope", "unauthorized_client", "unsupported_grant_type"];

/// Longest time from asking to the last byte of the answer. The claim on a login outlives it, and the search
/// for the endpoints before it.
pub const POST_LIMIT: Duration = Duration::from_secs(15);

/// Longest search for the endpoints before a refresh.
const DISCOVERY_LIMIT: Duration = Duration::from_secs(10);

/// As long as Codex waits for the answer to a revocation.
const REVOKE_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_client_does_not_end_a_login() {
        let mut json = HeaderMap::new();
        json.insert("content-type", HeaderValue::from_static("application/json"));
        let judged = |dialect, status: u16, body: &[u8]| {
            judge_as(dialect, StatusCode::from_u16(status).unwrap(), &json, body)
        };
        for code in OF_THE_CLIENT {
            let body = format!(r#"{{"error":"{code}"}}"#);
            for status in [400, 401] {
                let judged = judged(Dialect::Standard, status, body.as_bytes());
                assert!(matches!(judged, Err(RefreshError::NotSent(_))), "{status} {code}");
            }
        }
        let gone = judged(Dialect::Standard, 400, br#"{"error":"invalid_grant"}"#);
        assert!(matches!(gone, Err(RefreshError::Rejected { .. })));
        let codex = judged(Dialect::Codex, 401, br#"{"error":"invalid_client"}"#);
        assert!(matches!(codex, Err(RefreshError::Rejected { .. })));
    }
}
