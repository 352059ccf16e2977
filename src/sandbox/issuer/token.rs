//! The pretend issuer's token endpoint: one grant after another, with the faults that were ordered.

use http::header::{CACHE_CONTROL, HeaderValue};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use time::Duration;

use super::form::{Form, Proof};
use super::ledger::{Grant, Ledger};
use super::{Dialect, Fault, Issuer, PretendLogin};
use crate::sandbox::{Answer, Ask, Body, Cut, json as json_reply};
use crate::secret::Secret;

impl Issuer {
    pub(super) async fn token(&self, dialect: Dialect, request: Ask) -> Answer {
        let fault = self.0.ledger.change(|ledger| {
            ledger.posts += 1;
            ledger.script.pop_front().or(ledger.standing_fault)
        });
        if fault == Some(Fault::DropBefore) {
            return Err(Cut);
        }
        let path = request.uri().path().to_owned();
        let form = Form::read(request).await?;
        self.note(&path, &form);
        self.0.ledger.change(|ledger| {
            *ledger.grants.entry(form.get("grant_type").to_owned()).or_default() += 1;
        });
        if let Some(response) = fault.and_then(|fault| fault.instead(dialect)) {
            return Ok(response);
        }
        let takes = self.0.ledger.read(|ledger| ledger.takes);
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let mut answer = self.redeem(dialect, &form);
        // RFC 6749 section 5.1.
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match fault {
            Some(Fault::DropAfter) => return Err(Cut),
            Some(Fault::Hold) => self.0.held.acquire().await.map_err(|_| Cut)?.forget(),
            Some(Fault::Slow(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        Ok(answer)
    }

    fn redeem(&self, dialect: Dialect, form: &Form) -> Response<Body> {
        let grant_type = form.get("grant_type");
        if form.is_repetitive {
            return dialect.error(StatusCode::BAD_REQUEST, "invalid_request");
        }
        if dialect == Dialect::Standard {
            let is_own = grant_type == "client_credentials";
            let proof = if is_own { Proof::Secret } else { Proof::Id };
            if let Err(refusal) = form.check_client(proof) {
                return *refusal;
            }
        }
        match (dialect, grant_type) {
            (_, "authorization_code") => self.redeem_code(dialect, form),
            (_, "refresh_token") => self.redeem_refresh(dialect, form),
            (Dialect::Standard, "client_credentials") => self.redeem_client(form),
            (Dialect::Standard, DEVICE_GRANT) => {
                let (now, lifetime) = (self.0.clock.now(), self.0.lifetime);
                self.issued(dialect, StatusCode::BAD_REQUEST, |ledger| {
                    ledger.take_device_code(form, now, lifetime)
                })
            }
            _ => dialect.error(StatusCode::BAD_REQUEST, "unsupported_grant_type"),
        }
    }

    fn redeem_code(&self, dialect: Dialect, form: &Form) -> Response<Body> {
        if form.is_json {
            return dialect.error(StatusCode::BAD_REQUEST, "invalid_request");
        }
        if form.get("client_id") != dialect.client_id() && dialect == Dialect::Codex {
            return dialect.error(StatusCode::BAD_REQUEST, "invalid_grant");
        }
        let (now, lifetime) = (self.0.clock.now(), self.0.lifetime);
        self.issued(dialect, StatusCode::BAD_REQUEST, |ledger| {
            ledger.take_code(dialect, form, now, lifetime)
        })
    }

    fn redeem_refresh(&self, dialect: Dialect, form: &Form) -> Response<Body> {
        let refresh = Secret::new(form.get("refresh_token"));
        let (now, lifetime) = (self.0.clock.now(), self.0.lifetime);
        self.issued(dialect, dialect.refusal(), |ledger| {
            let next = ledger.refresh(dialect, &refresh, now, lifetime);
            // RFC 6749 has one code for all that can be wrong with it.
            next.map_err(|code| if dialect == Dialect::Standard { "invalid_grant" } else { code })
        })
    }

    /// A token for the client itself, which it can ask for again at any time.
    fn redeem_client(&self, form: &Form) -> Response<Body> {
        let grant = Grant::standard(None, form);
        let (now, lifetime) = (self.0.clock.now(), self.0.lifetime);
        let scope = grant.scope.clone();
        let access = self.0.ledger.change(|ledger| {
            let family = ledger.found(grant);
            ledger.issue_access(family, now, now + lifetime)
        });
        let members = standard_members(&access, &scope, lifetime);
        json_reply(StatusCode::OK, &members)
    }

    /// The answer that the tokens stand in, or that says why there are none.
    fn issued<F>(&self, dialect: Dialect, refusal: StatusCode, take: F) -> Response<Body>
    where
        F: FnOnce(&mut Ledger) -> Result<(usize, PretendLogin), &'static str>,
    {
        let taken = self.0.ledger.change(|ledger| {
            let (family, login) = take(ledger)?;
            Ok((ledger.grant(family).scope.clone(), login))
        });
        match taken {
            Ok((scope, login)) => {
                let lifetime = self.0.lifetime;
                json_reply(StatusCode::OK, &members(dialect, &login, &scope, lifetime))
            }
            Err(code) => dialect.error(refusal, code),
        }
    }
}

/// RFC 8628 section 3.4.
pub(super) const DEVICE_GRANT: &str = "urn:ietf:params:oauth:grant-type:device_code";

fn members(dialect: Dialect, login: &PretendLogin, scope: &str, lifetime: Duration) -> Value {
    if dialect == Dialect::Codex {
        return json!({
            "access_token": login.access.expose(),
            "id_token": login.id.expose(),
            "refresh_token": login.refresh.expose(),
            "token_type": "Bearer",
            "expires_in": lifetime.whole_seconds(),
        });
    }
    let mut members = standard_members(&login.access, scope, lifetime);
    members["refresh_token"] = login.refresh.expose().into();
    // OpenID Connect Core 1.0 section 3.1.2.1.
    if scope.split(' ').any(|name| name == "openid") {
        members["id_token"] = login.id.expose().into();
    }
    members
}

fn standard_members(access: &Secret, scope: &str, lifetime: Duration) -> Value {
    json!({
        "access_token": access.expose(),
        "token_type": "Bearer",
        "expires_in": lifetime.whole_seconds(),
        "scope": scope,
    })
}
