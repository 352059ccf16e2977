//! The pretend issuer: logins made to order or by any of the ways to sign in, refresh tokens that work
//! once, and faults on demand.
//!
//! | at [`ISSUER_HOST`], as Codex has it | at [`OAUTH_HOST`], as the standards have it |
//! | --- | --- |
//! | `GET /oauth/authorize` | `GET /authorize` |
//! | `POST /oauth/token` | `POST /token` |
//! | `POST /oauth/revoke` | `POST /revoke` |
//! | `POST /api/accounts/deviceauth/usercode` | `POST /device` |
//! | `POST /api/accounts/deviceauth/token` | `POST /token` |
//! | `/codex/device`, for people | `/activate`, for people |
//! | `GET /api/accounts/v1/user-auth-credential/whoami` | `GET /.well-known/oauth-authorization-server` |

mod authorize;
mod device;
mod fault;
mod form;
mod ledger;
mod page;
mod person;
mod personal;
mod token;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use std::{fs, io};

use bytes::Bytes;
use http::header::DATE;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};
use time::Duration;
use time::format_description::FormatItem;
use time::macros::format_description;
use tokio::sync::Semaphore;

use super::seen::{Log, Seen};
use super::{Answer, Ask, Board, Body, ISSUER_HOST, OAUTH_HOST, error, reply};
use crate::clock::Clock;
use crate::secret::Secret;

pub use authorize::Consent;
pub use device::DeviceSetting;
pub use fault::Fault;
pub use person::{Person, PretendLogin};

pub(super) use ledger::Standing;

use form::{Form, Proof};
use ledger::{Grant, Ledger};

/// The client that the issuer at [`OAUTH_HOST`] knows.
pub const OAUTH_CLIENT_ID: &str = "example-client";

/// The secret of [`OAUTH_CLIENT_ID`].
pub const OAUTH_CLIENT_SECRET: &str = "vk-canary-client-secret";

/// The public client id of the Codex CLI.
const CLIENT_ID: &str = "app_EMoamEEZ73f0CkXaXp7hrann";

/// What a request to a revocation endpoint said beside the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// `token_type_hint`, where it was sent.
    pub hint: Option<String>,
    /// Whether `client_id` was sent in the body.
    pub client_id: bool,
}

/// The pretend issuer, under both its hosts. Clones are the same issuer.
#[derive(Clone)]
pub struct Issuer(Arc<Desk>);

struct Desk {
    clock: Clock,
    held: Semaphore,
    ledger: Board<Ledger>,
    lifetime: Duration,
    log: Arc<Log>,
}

impl Issuer {
    pub(super) fn new(clock: Clock, lifetime: Duration) -> Self {
        let (held, ledger, log) = (Semaphore::new(0), Board::default(), Log::new(true));
        Self(Arc::new(Desk { clock, held, ledger, lifetime, log }))
    }

    /// Signs a pretend user in. The access token ends after `lifetime`, which may be negative.
    pub fn login(&self, lifetime: Duration) -> PretendLogin {
        self.login_of(None, lifetime)
    }

    /// As [`Issuer::login`], into this workspace.
    pub fn login_as(&self, account_id: &str, lifetime: Duration) -> PretendLogin {
        self.login_of(Some(account_id), lifetime)
    }

    /// As [`Issuer::login`], at [`OAUTH_HOST`].
    pub fn oauth_login(&self, lifetime: Duration) -> PretendLogin {
        self.found(lifetime, |ledger| Grant::unasked(ledger.person_in(None)))
    }

    fn login_of(&self, account_id: Option<&str>, lifetime: Duration) -> PretendLogin {
        self.found(lifetime, |ledger| Grant::codex(ledger.person_in(account_id)))
    }

    fn found(&self, lifetime: Duration, grant: impl FnOnce(&Ledger) -> Grant) -> PretendLogin {
        let now = self.0.clock.now();
        let issued_at = if lifetime.is_negative() { now + lifetime - self.0.lifetime } else { now };
        self.0.ledger.change(|ledger| {
            let grant = grant(ledger);
            let family = ledger.found(grant);
            ledger.issue(family, issued_at, now + lifetime)
        })
    }

    /// Signs a pretend user in and puts the `auth.json` (0600) where Codex keeps it.
    ///
    /// # Errors
    ///
    /// The file could not be written; the login exists all the same.
    pub fn write_auth_json(
        &self,
        codex_home: &Path,
        lifetime: Duration,
    ) -> io::Result<PretendLogin> {
        let login = self.login(lifetime);
        let file = tempfile::NamedTempFile::new_in(codex_home)?;
        fs::write(file.path(), login.auth_json())?;
        file.persist(codex_home.join("auth.json"))?;
        Ok(login)
    }

    /// Who signs in from now on, by whatever way.
    pub fn person(&self, person: Person) {
        self.0.ledger.change(|ledger| ledger.person = Some(person));
    }

    /// The workspace that people choose when they sign in themselves, whichever was asked for.
    pub fn sign_in_as(&self, account_id: &str) {
        self.0.ledger.change(|ledger| ledger.workspace = Some(account_id.to_owned()));
    }

    /// Adds a fault for one coming request to a token endpoint, whatever its grant; they are used in the
    /// order given.
    pub fn script(&self, fault: Fault) {
        self.0.ledger.change(|ledger| ledger.script.push_back(fault));
    }

    /// The fault of every request to a token endpoint for which [`Issuer::script`] has none, from now on.
    pub fn always(&self, fault: Option<Fault>) {
        self.0.ledger.change(|ledger| ledger.standing_fault = fault);
    }

    /// How long the token endpoint takes from now on before it redeems anything; whoever hangs up meanwhile has
    /// had nothing redeemed.
    pub fn take(&self, time: std::time::Duration) {
        self.0.ledger.change(|ledger| ledger.takes = time);
    }

    /// From now on a refresh token that is shown a second time is refused, and its login lives on.
    pub fn forgive_reuse(&self) {
        self.0.ledger.change(|ledger| ledger.forgives = true);
    }

    /// Lets one answer go that [`Fault::Hold`] holds, now or when it comes to that.
    pub fn release(&self) {
        self.0.held.add_permits(1);
    }

    /// Puts a member into the metadata of [`OAUTH_HOST`] in place of the proper one; null leaves it out.
    pub fn metadata(&self, name: &str, value: Value) {
        self.0.ledger.change(|ledger| ledger.metadata.push((name.to_owned(), value)));
    }

    /// Requests to the token endpoints, whatever came of them.
    pub fn posts(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.posts)
    }

    /// Requests to the token endpoints with this `grant_type`, whatever came of them.
    pub fn grants(&self, grant_type: &str) -> usize {
        self.0.ledger.read(|ledger| ledger.grants.get(grant_type).copied().unwrap_or_default())
    }

    /// Refresh tokens redeemed.
    pub fn refreshes(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.refreshes)
    }

    /// When each refresh token was redeemed, in order.
    pub fn redeemed_at(&self) -> Vec<Instant> {
        self.0.ledger.read(|ledger| ledger.redeemed_at.clone())
    }

    /// Whether an access token is good now.
    pub fn accepts(&self, token: &Secret) -> bool {
        self.standing(token) == Standing::Current
    }

    /// Refresh tokens shown a second time; each has revoked its whole login, unless that is forgiven.
    pub fn reuses(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.reuses)
    }

    /// Requests to the revocation endpoints.
    pub fn revokes(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.revocations.len())
    }

    /// What those requests said, in order.
    pub fn revocations(&self) -> Vec<Revocation> {
        self.0.ledger.read(|ledger| ledger.revocations.clone())
    }

    /// The parameters of the last request to this path, the values of secrets as `***`; empty where
    /// there was none. Of requests to authorize, for codes and tokens, and to revoke.
    pub fn last_request(&self, path: &str) -> BTreeMap<String, String> {
        self.0.ledger.read(|ledger| ledger.last.get(path).cloned().unwrap_or_default())
    }

    /// Waits until the token endpoints have got so many requests in all.
    pub async fn wait_for_posts(&self, count: usize) {
        self.0.ledger.wait_until(|ledger| ledger.posts >= count).await;
    }

    /// Waits until so many refresh tokens have been redeemed in all; answers may be under way.
    pub async fn wait_for_refreshes(&self, count: usize) {
        self.0.ledger.wait_until(|ledger| ledger.refreshes >= count).await;
    }

    /// Every request to the issuer's hosts.
    pub fn seen(&self) -> Vec<Seen> {
        self.0.log.seen()
    }

    pub(super) fn log(&self) -> &Arc<Log> {
        &self.0.log
    }

    pub(super) fn secrets(&self) -> Vec<String> {
        let mut secrets = self.0.ledger.read(Ledger::secrets);
        secrets.push(OAUTH_CLIENT_SECRET.to_owned());
        secrets
    }

    /// What an access token is worth now.
    pub(super) fn standing(&self, token: &Secret) -> Standing {
        let now = self.0.clock.now();
        self.0.ledger.read(|ledger| ledger.standing(token, now))
    }

    pub(super) async fn answer(&self, dialect: Dialect, request: Ask) -> Answer {
        let mut response = match dialect {
            Dialect::Codex => self.answer_codex(request).await?,
            Dialect::Standard => self.answer_standard(request).await?,
        };
        // The issuer's own time, from which a client may learn that its clock is wrong.
        let date = self.0.clock.now().format(HTTP_DATE).unwrap_or_default();
        if let Ok(date) = date.try_into() {
            response.headers_mut().insert(DATE, date);
        }
        Ok(response)
    }

    async fn answer_codex(&self, request: Ask) -> Answer {
        const WHOAMI: &str = "/api/accounts/v1/user-auth-credential/whoami";
        let dialect = Dialect::Codex;
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/oauth/authorize") => Ok(self.authorize(dialect, request.uri())),
            (&Method::POST, "/oauth/token") => self.token(dialect, request).await,
            (&Method::POST, "/oauth/revoke") => self.revoke(dialect, request).await,
            (&Method::POST, "/api/accounts/deviceauth/usercode") => self.user_code(request).await,
            (&Method::POST, "/api/accounts/deviceauth/token") => self.poll(request).await,
            (&Method::GET, device::CODEX_PAGE) => Ok(self.device_page(request.uri())),
            (&Method::POST, device::CODEX_PAGE) => self.device_answer(dialect, request).await,
            (&Method::GET, WHOAMI) => Ok(self.whoami(request.headers())),
            _ => Ok(error(StatusCode::NOT_FOUND, "not_found")),
        }
    }

    async fn answer_standard(&self, request: Ask) -> Answer {
        let dialect = Dialect::Standard;
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/.well-known/oauth-authorization-server") => Ok(self.describe()),
            (&Method::GET, "/authorize") => Ok(self.authorize(dialect, request.uri())),
            (&Method::POST, "/token") => self.token(dialect, request).await,
            (&Method::POST, "/revoke") => self.revoke(dialect, request).await,
            (&Method::POST, "/device") => self.device_code(request).await,
            (&Method::GET, device::STANDARD_PAGE) => Ok(self.device_page(request.uri())),
            (&Method::POST, device::STANDARD_PAGE) => self.device_answer(dialect, request).await,
            _ => Ok(error(StatusCode::NOT_FOUND, "not_found")),
        }
    }

    /// The metadata of RFC 8414.
    fn describe(&self) -> Response<Body> {
        let issuer = Dialect::Standard.issuer();
        let mut metadata = json!({
            "issuer": issuer,
            "authorization_endpoint": format!("{issuer}/authorize"),
            "token_endpoint": format!("{issuer}/token"),
            "revocation_endpoint": format!("{issuer}/revoke"),
            "device_authorization_endpoint": format!("{issuer}/device"),
            "response_types_supported": ["code"],
            "code_challenge_methods_supported": ["S256"],
            "grant_types_supported": [
                "authorization_code", "refresh_token", "client_credentials", token::DEVICE_GRANT,
            ],
            "token_endpoint_auth_methods_supported": [
                "none", "client_secret_basic", "client_secret_post",
            ],
        });
        for (name, value) in self.0.ledger.read(|ledger| ledger.metadata.clone()) {
            metadata[name] = value;
        }
        if let Some(members) = metadata.as_object_mut() {
            members.retain(|_, value| !value.is_null());
        }
        super::json(StatusCode::OK, &metadata)
    }

    /// RFC 7009: 200 for a token that nobody knows, too.
    async fn revoke(&self, dialect: Dialect, request: Ask) -> Answer {
        let path = request.uri().path().to_owned();
        let form = Form::read(request).await?;
        self.note(&path, &form);
        let hint = form.find("token_type_hint").map(str::to_owned);
        let revocation = Revocation { hint, client_id: form.find("client_id").is_some() };
        self.0.ledger.change(|ledger| ledger.revocations.push(revocation));
        if dialect == Dialect::Standard
            && let Err(refusal) = form.check_client(Proof::Id)
        {
            return Ok(*refusal);
        }
        let token = Secret::new(form.get("token"));
        self.0.ledger.change(|ledger| ledger.revoke(dialect, &token));
        Ok(reply(StatusCode::OK, "", Bytes::new()))
    }

    /// Keeps what was asked, for tests.
    fn note(&self, path: &str, form: &Form) {
        let parameters = form.without_secrets();
        self.0.ledger.change(|ledger| ledger.last.insert(path.to_owned(), parameters));
    }
}

/// Which of its two languages the issuer speaks; the host decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Codex,
    Standard,
}

impl Dialect {
    /// That of a host, if it is one of the issuer's.
    pub(super) fn of_host(host: &str) -> Option<Self> {
        match host {
            ISSUER_HOST => Some(Self::Codex),
            OAUTH_HOST => Some(Self::Standard),
            _ => None,
        }
    }

    fn issuer(self) -> String {
        match self {
            Self::Codex => format!("https://{ISSUER_HOST}"),
            Self::Standard => format!("https://{OAUTH_HOST}"),
        }
    }

    fn client_id(self) -> &'static str {
        match self {
            Self::Codex => CLIENT_ID,
            Self::Standard => OAUTH_CLIENT_ID,
        }
    }

    /// The status of an answer that refuses a refresh token.
    fn refusal(self) -> StatusCode {
        match self {
            Self::Codex => StatusCode::UNAUTHORIZED,
            Self::Standard => StatusCode::BAD_REQUEST,
        }
    }

    /// An error in the form that clients of this dialect read (RFC 6749 section 5.2).
    fn error(self, status: StatusCode, code: &str) -> Response<Body> {
        match self {
            Self::Codex => error(status, code),
            Self::Standard => {
                let description = format!("the sandbox says {code}");
                super::json(status, &json!({"error": code, "error_description": description}))
            }
        }
    }
}

/// RFC 9110 section 5.6.7.
const HTTP_DATE: &[FormatItem<'_>] = format_description!(
    "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
);
