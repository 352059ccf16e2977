//! The pretend issuer: logins made to order, refresh tokens that work once, and faults on demand.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER};
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use serde_json::{Value, json};
use time::format_description::FormatItem;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Duration, OffsetDateTime};
use tokio::sync::Semaphore;

use super::seen::{Log, Seen};
use super::{Answer, Ask, Board, Body, Cut, ISSUER_HOST, error, reply};
use crate::clock::Clock;
use crate::secret::{Fingerprint, Secret};

/// What the token endpoint does to one request in place of a proper answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Redeems, then closes the connection: the new tokens are lost.
    DropAfter,
    /// Closes the connection before it reads the body; nothing is redeemed.
    DropBefore,
    /// Answers 200 with something that is not JSON; nothing is redeemed.
    Garbage,
    /// Redeems, and answers after [`Issuer::release`].
    Hold,
    /// Answers 429 with a `Retry-After` of so many seconds; nothing is redeemed.
    RateLimited(u32),
    /// Answers 401 with this error code; nothing is redeemed.
    Refuse(&'static str),
    /// Redeems, and answers after this time.
    Slow(std::time::Duration),
    /// Answers with this status; nothing is redeemed.
    Status(u16),
}

impl Fault {
    /// The answer that stands in for redeeming.
    fn instead(self) -> Option<Response<Body>> {
        match self {
            Self::Garbage => Some(reply(StatusCode::OK, "text/html", "<html>not JSON")),
            Self::RateLimited(seconds) => {
                let mut response = error(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded");
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
                Some(response)
            }
            Self::Refuse(code) => Some(error(StatusCode::UNAUTHORIZED, code)),
            Self::Status(status) => {
                Some(error(StatusCode::from_u16(status).unwrap_or_default(), "server_error"))
            }
            Self::DropAfter | Self::DropBefore | Self::Hold | Self::Slow(_) => None,
        }
    }
}

/// A login as its owner's cache would hold it.
#[derive(Clone, Debug)]
pub struct PretendLogin {
    /// Sent to the API.
    pub access: Secret,
    /// Redeemed once.
    pub refresh: Secret,
    /// Says whom the login speaks for.
    pub id: Secret,
    /// The workspace.
    pub account_id: String,
    /// When the tokens were made.
    pub issued_at: OffsetDateTime,
    /// When the access token ends.
    pub expires_at: OffsetDateTime,
}

impl PretendLogin {
    /// The content of an `auth.json`, as Codex 0.169.0 writes it.
    pub fn auth_json(&self) -> String {
        let content = json!({
            "auth_mode": "chatgpt",
            "OPENAI_API_KEY": null,
            "tokens": {
                "id_token": self.id.expose(),
                "access_token": self.access.expose(),
                "refresh_token": self.refresh.expose(),
                "oauth_provenance": {
                    "issuer": format!("https://{ISSUER_HOST}"), "client_id": CLIENT_ID,
                },
                "login_owner_id": "sandbox-sandbox-sandbox-sandbox-sandbox-san",
                "account_id": self.account_id,
            },
            "last_refresh": self.issued_at.format(&Rfc3339).unwrap_or_default(),
        });
        format!("{content:#}")
    }
}

/// The public client id of the Codex CLI.
const CLIENT_ID: &str = "app_EMoamEEZ73f0CkXaXp7hrann";

/// The workspace of logins that ask for none.
const ACCOUNT: &str = "acct-sandbox";

/// The pretend issuer. Clones are the same issuer.
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
        self.login_as(ACCOUNT, lifetime)
    }

    /// As [`Issuer::login`], into this workspace.
    pub fn login_as(&self, account_id: &str, lifetime: Duration) -> PretendLogin {
        let now = self.0.clock.now();
        let issued_at = if lifetime.is_negative() { now + lifetime - self.0.lifetime } else { now };
        self.0.ledger.change(|ledger| {
            ledger.families.push(Family { account_id: account_id.to_owned(), revoked: false });
            ledger.issue(ledger.families.len() - 1, issued_at, now + lifetime)
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

    /// Adds a fault for one coming request to the token endpoint; they are used in the order given.
    pub fn script(&self, fault: Fault) {
        self.0.ledger.change(|ledger| ledger.script.push_back(fault));
    }

    /// Lets one answer go that [`Fault::Hold`] holds, now or when it comes to that.
    pub fn release(&self) {
        self.0.held.add_permits(1);
    }

    /// Requests to the token endpoint, whatever came of them.
    pub fn posts(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.posts)
    }

    /// Refresh tokens redeemed.
    pub fn refreshes(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.refreshes)
    }

    /// Refresh tokens shown a second time; each has revoked its whole login.
    pub fn reuses(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.reuses)
    }

    /// Requests to the revocation endpoint.
    pub fn revokes(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.revokes)
    }

    /// Waits until the token endpoint has got so many requests in all.
    pub async fn wait_for_posts(&self, count: usize) {
        self.0.ledger.wait_until(|ledger| ledger.posts >= count).await;
    }

    /// Waits until so many refresh tokens have been redeemed in all; answers may be under way.
    pub async fn wait_for_refreshes(&self, count: usize) {
        self.0.ledger.wait_until(|ledger| ledger.refreshes >= count).await;
    }

    /// Every request to the issuer's host.
    pub fn seen(&self) -> Vec<Seen> {
        self.0.log.seen()
    }

    pub(super) fn log(&self) -> &Arc<Log> {
        &self.0.log
    }

    pub(super) fn secrets(&self) -> Vec<String> {
        self.0.ledger.read(|ledger| ledger.secrets.clone())
    }

    /// What an access token is worth now.
    pub(super) fn standing(&self, token: &Secret) -> Standing {
        let now = self.0.clock.now();
        self.0.ledger.read(|ledger| ledger.standing(token, now))
    }

    pub(super) async fn answer(&self, request: Ask) -> Answer {
        let mut response = match (request.method(), request.uri().path()) {
            (&Method::POST, "/oauth/token") => self.token(request).await?,
            (&Method::POST, "/oauth/revoke") => self.revoke(request).await?,
            _ => error(StatusCode::NOT_FOUND, "not_found"),
        };
        // The issuer's own time, from which a client may learn that its clock is wrong.
        let date = self.0.clock.now().format(HTTP_DATE).unwrap_or_default();
        if let Ok(date) = date.try_into() {
            response.headers_mut().insert(DATE, date);
        }
        Ok(response)
    }

    async fn token(&self, request: Ask) -> Answer {
        let fault = self.0.ledger.change(|ledger| {
            ledger.posts += 1;
            ledger.script.pop_front()
        });
        if fault == Some(Fault::DropBefore) {
            return Err(Cut);
        }
        let form = form(request).await?;
        if let Some(response) = fault.and_then(Fault::instead) {
            return Ok(response);
        }
        let answer = self.redeem(&form);
        match fault {
            Some(Fault::DropAfter) => return Err(Cut),
            Some(Fault::Hold) => self.0.held.acquire().await.map_err(|_| Cut)?.forget(),
            Some(Fault::Slow(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        answer
    }

    fn redeem(&self, form: &HashMap<String, String>) -> Answer {
        if form.get("grant_type").is_none_or(|grant| grant != "refresh_token") {
            return Ok(error(StatusCode::BAD_REQUEST, "unsupported_grant_type"));
        }
        let refresh = Secret::new(form.get("refresh_token").cloned().unwrap_or_default());
        let (now, lifetime) = (self.0.clock.now(), self.0.lifetime);
        match self.0.ledger.change(|ledger| ledger.redeem(&refresh, now, lifetime)) {
            Ok(login) => Ok(super::json(
                StatusCode::OK,
                &json!({
                    "access_token": login.access.expose(),
                    "id_token": login.id.expose(),
                    "refresh_token": login.refresh.expose(),
                    "token_type": "Bearer",
                    "expires_in": lifetime.whole_seconds(),
                }),
            )),
            Err(code) => Ok(error(StatusCode::UNAUTHORIZED, code)),
        }
    }

    async fn revoke(&self, request: Ask) -> Answer {
        let form = form(request).await?;
        let token = Secret::new(form.get("token").cloned().unwrap_or_default());
        self.0.ledger.change(|ledger| ledger.revoke(&token));
        Ok(reply(StatusCode::OK, "", Bytes::new()))
    }
}

/// RFC 9110 section 5.6.7.
const HTTP_DATE: &[FormatItem<'_>] = format_description!(
    "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
);

/// What a bearer token is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Absent,
    Current,
    Expired,
    Revoked,
    Unknown,
}

/// Everything the issuer knows.
#[derive(Default)]
struct Ledger {
    access: HashMap<Fingerprint, (usize, OffsetDateTime)>,
    families: Vec<Family>,
    posts: usize,
    refresh: HashMap<Fingerprint, usize>,
    refreshes: usize,
    reuses: usize,
    revokes: usize,
    script: VecDeque<Fault>,
    secrets: Vec<String>,
    spent: HashSet<Fingerprint>,
}

/// All the tokens that descend from one login.
struct Family {
    account_id: String,
    revoked: bool,
}

impl Ledger {
    fn issue(
        &mut self,
        family: usize,
        issued_at: OffsetDateTime,
        expires_at: OffsetDateTime,
    ) -> PretendLogin {
        let account_id = self.families[family].account_id.clone();
        let email = format!("{account_id}@example.com");
        let claims = json!({
            "iss": format!("https://{ISSUER_HOST}"),
            "aud": [CLIENT_ID],
            "iat": issued_at.unix_timestamp(),
            "exp": expires_at.unix_timestamp(),
            "email": email,
            "https://api.openai.com/profile": {"email": email},
            "https://api.openai.com/auth": {
                "chatgpt_account_id": account_id,
                "chatgpt_plan_type": "plus",
                "chatgpt_user_id": format!("user-{account_id}"),
            },
        });
        let (access, id) = (jwt(&claims), jwt(&claims));
        let refresh = format!("rt_{}", canary());
        self.secrets.extend([access.clone(), id.clone(), refresh.clone()]);
        let (access, id, refresh) = (Secret::new(access), Secret::new(id), Secret::new(refresh));
        self.access.insert(access.fingerprint(), (family, expires_at));
        self.refresh.insert(refresh.fingerprint(), family);
        PretendLogin { access, refresh, id, account_id, issued_at, expires_at }
    }

    /// The next tokens, or the error code. A refresh token that was used before revokes its family.
    fn redeem(
        &mut self,
        refresh: &Secret,
        now: OffsetDateTime,
        lifetime: Duration,
    ) -> Result<PretendLogin, &'static str> {
        let token = refresh.fingerprint();
        let family = *self.refresh.get(&token).ok_or("refresh_token_invalidated")?;
        if !self.spent.insert(token) {
            self.reuses += 1;
            self.families[family].revoked = true;
            return Err("refresh_token_reused");
        }
        if self.families[family].revoked {
            return Err("refresh_token_invalidated");
        }
        self.refreshes += 1;
        Ok(self.issue(family, now, now + lifetime))
    }

    fn revoke(&mut self, token: &Secret) {
        self.revokes += 1;
        let token = token.fingerprint();
        let of_access = || self.access.get(&token).map(|(family, _)| family);
        if let Some(family) = self.refresh.get(&token).or_else(of_access) {
            self.families[*family].revoked = true;
        }
    }

    fn standing(&self, token: &Secret, now: OffsetDateTime) -> Standing {
        match self.access.get(&token.fingerprint()) {
            None => Standing::Unknown,
            Some((family, _)) if self.families[*family].revoked => Standing::Revoked,
            Some((_, expires_at)) if *expires_at <= now => Standing::Expired,
            Some(_) => Standing::Current,
        }
    }
}

/// The members of a JSON object or of a form, by what the request says it sends.
async fn form(request: Ask) -> Result<HashMap<String, String>, Cut> {
    let is_json = says_json(request.headers());
    let body = Limited::new(request.into_body(), MAX_FORM_BYTES);
    let body: Bytes = body.collect().await.map_err(|_| Cut)?.to_bytes();
    if !is_json {
        return Ok(url::form_urlencoded::parse(&body).into_owned().collect());
    }
    let Ok(Value::Object(members)) = serde_json::from_slice(&body) else {
        return Ok(HashMap::new());
    };
    let text = |value: Value| value.as_str().map(str::to_owned);
    Ok(members.into_iter().filter_map(|(name, value)| Some((name, text(value)?))).collect())
}

/// Longest body that a token request may have.
const MAX_FORM_BYTES: usize = 64 * 1024;

fn says_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/json"))
}

/// A JWT that says it is unsigned (RFC 7519 section 6); the canary stands where the signature would.
fn jwt(claims: &Value) -> String {
    let head = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
    format!("{head}.{}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()), canary())
}

/// A text that is found wherever it should not be, and that no other token has.
#[expect(clippy::expect_used, reason = "a machine without randomness has no TLS either")]
fn canary() -> String {
    let mut random = [0; 16];
    rand::fill(&mut random).expect("the system gives random bytes");
    random.iter().fold("vk-canary-".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}
