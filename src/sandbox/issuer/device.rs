//! Signing in with a code that is typed on another device: Codex's own way, and that of RFC 8628.

use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Response, StatusCode, Uri};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::authorize::challenge_of;
use super::form::{Form, Proof};
use super::ledger::{Grant, Ledger, random};
use super::page::{escaped, page};
use super::{Dialect, Issuer, Person, PretendLogin};
use crate::sandbox::{Answer, Ask, Body, json};
use crate::secret::{Fingerprint, Secret};

/// What becomes of a login by device code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceSetting {
    /// It waits for approval.
    #[default]
    On,
    /// The account does not allow it: 404 to the request for a code.
    Off,
    /// The request for a code gets this status.
    Refused(u16),
    /// Codes are made, and whoever polls for one gets this status; in the standard dialect
    /// `access_denied`.
    Denied(u16),
}

impl Issuer {
    /// What becomes of logins by device code from now on.
    pub fn device_login(&self, setting: DeviceSetting) {
        self.0.ledger.change(|ledger| ledger.devices.setting = setting);
    }

    /// How many seconds a client is told to leave between two polls; 1 at first.
    pub fn device_interval(&self, seconds: u32) {
        self.0.ledger.change(|ledger| ledger.devices.interval = seconds);
    }

    /// Approves the newest device that waits, or else the next one that asks.
    pub fn approve_device(&self) {
        self.0.ledger.change(|ledger| {
            let newest = ledger.devices.all.iter().rposition(Device::is_pending);
            match newest {
                Some(at) => ledger.decide(at, true),
                None => ledger.devices.approvals += 1,
            }
        });
    }

    /// Refuses the newest device that waits: `access_denied`, at the Codex issuer 400.
    pub fn deny_device(&self) {
        self.0.ledger.change(|ledger| {
            if let Some(at) = ledger.devices.all.iter().rposition(Device::is_pending) {
                ledger.decide(at, false);
            }
        });
    }

    /// Answers one coming poll in the standard dialect with `slow_down`.
    pub fn slow_down(&self) {
        self.0.ledger.change(|ledger| ledger.devices.slow_downs += 1);
    }

    /// When each poll for a device code arrived, in both dialects.
    pub fn polls(&self) -> Vec<Instant> {
        self.0.ledger.read(|ledger| ledger.devices.polls.clone())
    }

    /// Waits until there have been so many polls in all.
    pub async fn wait_for_polls(&self, count: usize) {
        self.0.ledger.wait_until(|ledger| ledger.devices.polls.len() >= count).await;
    }

    /// Codex: makes a code to type.
    pub(super) async fn user_code(&self, request: Ask) -> Answer {
        let path = request.uri().path().to_owned();
        let (form, dialect) = (Form::read(request).await?, Dialect::Codex);
        self.note(&path, &form);
        if let Some(refusal) = self.refusal(dialect) {
            return Ok(refusal);
        }
        if !form.is_json || form.get("client_id") != dialect.client_id() {
            return Ok(dialect.error(StatusCode::BAD_REQUEST, "invalid_request"));
        }
        let now = self.0.clock.now();
        let (device, interval) = self.0.ledger.change(|ledger| {
            let device = ledger.wait_for_approval("deviceauth_", dialect, &form, now);
            (device, ledger.devices.interval)
        });
        Ok(json(
            StatusCode::OK,
            &json!({
                "device_auth_id": device.code.expose(),
                "user_code": device.user_code,
                "interval": interval.to_string(),
            }),
        ))
    }

    /// Codex: hands out an authorization code, with its verifier, once the device is approved.
    pub(super) async fn poll(&self, request: Ask) -> Answer {
        let path = request.uri().path().to_owned();
        let form = Form::read(request).await?;
        self.note(&path, &form);
        let now = self.0.clock.now();
        let verifier = URL_SAFE_NO_PAD.encode(random::<64>());
        let challenge = challenge_of(&verifier);
        let code = self.0.ledger.change(|ledger| {
            let person = ledger.poll_codex(&form, now)?;
            let place = format!("{}/deviceauth/callback", Dialect::Codex.issuer());
            Ok(ledger.hand_out(Grant::codex(person), &place, &challenge, now))
        });
        Ok(match code {
            Ok(code) => json(
                StatusCode::OK,
                &json!({
                    "authorization_code": code.expose(),
                    "code_challenge": challenge,
                    "code_verifier": verifier,
                }),
            ),
            Err(status) => Dialect::Codex.error(status, "device_code_not_approved"),
        })
    }

    /// RFC 8628 section 3.2.
    pub(super) async fn device_code(&self, request: Ask) -> Answer {
        let path = request.uri().path().to_owned();
        let (form, dialect) = (Form::read(request).await?, Dialect::Standard);
        self.note(&path, &form);
        if let Some(refusal) = self.refusal(dialect) {
            return Ok(refusal);
        }
        if let Err(refusal) = form.check_client(Proof::Id) {
            return Ok(*refusal);
        }
        let now = self.0.clock.now();
        let (device, interval) = self.0.ledger.change(|ledger| {
            let device = ledger.wait_for_approval("", dialect, &form, now);
            (device, ledger.devices.interval)
        });
        let place = format!("{}{STANDARD_PAGE}", dialect.issuer());
        Ok(json(
            StatusCode::OK,
            &json!({
                "device_code": device.code.expose(),
                "user_code": device.user_code,
                "verification_uri": place,
                "verification_uri_complete": format!("{place}?user_code={}", device.user_code),
                "expires_in": DEVICE_LIFETIME.whole_seconds(),
                "interval": interval,
            }),
        ))
    }

    /// The page where the code is typed.
    pub(super) fn device_page(&self, uri: &Uri) -> Response<Body> {
        let form = Form::of_query(uri);
        let (path, typed) = (uri.path(), escaped(form.get("user_code")));
        let inside = format!(
            "<form method=\"post\" action=\"{path}\">\
             <label>Code <input id=\"user_code\" name=\"user_code\" value=\"{typed}\"></label>\
             <button id=\"allow\" name=\"answer\" value=\"allow\">Continue</button>\
             <button id=\"deny\" name=\"answer\" value=\"deny\">Cancel</button></form>"
        );
        page(StatusCode::OK, &inside)
    }

    /// Approves or refuses the device whose code was typed.
    pub(super) async fn device_answer(&self, dialect: Dialect, request: Ask) -> Answer {
        let form = Form::read(request).await?;
        let is_known = self.0.ledger.change(|ledger| {
            let is_it = |device: &Device| {
                device.grant.dialect == dialect
                    && device.is_pending()
                    && device.user_code == form.get("user_code")
            };
            let found = ledger.devices.all.iter().position(is_it);
            found.map(|at| ledger.decide(at, form.get("answer") == "allow")).is_some()
        });
        Ok(match is_known {
            true => page(StatusCode::OK, "<p id=\"done\">Done. You can close this page."),
            false => page(StatusCode::BAD_REQUEST, "<p>No device waits with this code."),
        })
    }

    fn refusal(&self, dialect: Dialect) -> Option<Response<Body>> {
        let status = match self.0.ledger.read(|ledger| ledger.devices.setting) {
            DeviceSetting::On | DeviceSetting::Denied(_) => return None,
            DeviceSetting::Off => StatusCode::NOT_FOUND,
            DeviceSetting::Refused(status) => status_of(status),
        };
        Some(dialect.error(status, "device_code_refused"))
    }
}

/// Where a device code is typed, at the Codex issuer.
pub(super) const CODEX_PAGE: &str = "/codex/device";

/// Where a device code is typed, in the standard dialect.
pub(super) const STANDARD_PAGE: &str = "/activate";

/// The devices that asked, and what was ordered for those to come.
pub(super) struct Devices {
    all: Vec<Device>,
    approvals: usize,
    interval: u32,
    polls: Vec<Instant>,
    setting: DeviceSetting,
    slow_downs: usize,
}

impl Default for Devices {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            approvals: 0,
            interval: 1,
            polls: Vec::new(),
            setting: DeviceSetting::On,
            slow_downs: 0,
        }
    }
}

/// One device that asked.
struct Device {
    code: Fingerprint,
    expires_at: OffsetDateTime,
    /// Whom it is for is known when it is approved.
    grant: Grant,
    stage: Stage,
    user_code: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Pending,
    Approved,
    Denied,
    Spent,
}

impl Device {
    fn is_pending(&self) -> bool {
        self.stage == Stage::Pending
    }
}

/// What a device is told.
struct Waiting {
    code: Secret,
    user_code: String,
}

impl Ledger {
    fn wait_for_approval(
        &mut self,
        prefix: &str,
        dialect: Dialect,
        form: &Form,
        now: OffsetDateTime,
    ) -> Waiting {
        let (code, user_code) = (self.mint(prefix), new_user_code());
        let grant = Grant { dialect, ..Grant::standard(None, form) };
        self.devices.all.push(Device {
            code: code.fingerprint(),
            expires_at: now + DEVICE_LIFETIME,
            grant,
            stage: Stage::Pending,
            user_code: user_code.clone(),
        });
        if self.devices.approvals > 0 {
            self.devices.approvals -= 1;
            self.decide(self.devices.all.len() - 1, true);
        }
        Waiting { code, user_code }
    }

    fn decide(&mut self, at: usize, is_approved: bool) {
        let person = self.signing_in("");
        let device = &mut self.devices.all[at];
        device.grant.person = Some(person);
        device.stage = if is_approved { Stage::Approved } else { Stage::Denied };
    }

    /// Who approved the device, or the status of the answer.
    fn poll_codex(&mut self, form: &Form, now: OffsetDateTime) -> Result<Person, StatusCode> {
        self.devices.polls.push(Instant::now());
        let code = Fingerprint::of(form.get("device_auth_id").as_bytes());
        let setting = self.devices.setting;
        let is_it = |device: &&mut Device| {
            device.grant.dialect == Dialect::Codex
                && device.code == code
                && device.user_code == form.get("user_code")
                && now < device.expires_at
        };
        let device = self.devices.all.iter_mut().find(is_it).ok_or(StatusCode::NOT_FOUND)?;
        match (setting, device.stage) {
            (DeviceSetting::Denied(status), _) => Err(status_of(status)),
            (_, Stage::Pending) => Err(StatusCode::FORBIDDEN),
            (_, Stage::Denied) => Err(StatusCode::BAD_REQUEST),
            (_, Stage::Spent) => Err(StatusCode::NOT_FOUND),
            (_, Stage::Approved) => {
                device.stage = Stage::Spent;
                device.grant.person.clone().ok_or(StatusCode::NOT_FOUND)
            }
        }
    }

    /// The first tokens of an approved device, or the error code (RFC 8628 section 3.5).
    pub(super) fn take_device_code(
        &mut self,
        form: &Form,
        now: OffsetDateTime,
        lifetime: Duration,
    ) -> Result<(usize, PretendLogin), &'static str> {
        self.devices.polls.push(Instant::now());
        let code = Fingerprint::of(form.get("device_code").as_bytes());
        let devices = &mut self.devices;
        let is_it =
            |device: &&mut Device| device.grant.dialect == Dialect::Standard && device.code == code;
        let device = devices.all.iter_mut().find(is_it).ok_or("invalid_grant")?;
        if now >= device.expires_at {
            return Err("expired_token");
        }
        if matches!(devices.setting, DeviceSetting::Denied(_)) {
            return Err("access_denied");
        }
        if devices.slow_downs > 0 {
            devices.slow_downs -= 1;
            return Err("slow_down");
        }
        match device.stage {
            Stage::Pending => return Err("authorization_pending"),
            Stage::Denied => return Err("access_denied"),
            Stage::Spent => return Err("invalid_grant"),
            Stage::Approved => device.stage = Stage::Spent,
        }
        let grant = device.grant.clone();
        let family = self.found(grant);
        Ok((family, self.issue(family, now, now + lifetime)))
    }
}

/// Eight letters that cannot be mistaken for others and make no words (RFC 8628 section 6.1).
fn new_user_code() -> String {
    const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
    let letter = |byte: &u8| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]);
    let letters: String = random::<8>().iter().map(letter).collect();
    format!("{}-{}", &letters[..4], &letters[4..])
}

fn status_of(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or_default()
}

/// What Codex tells people.
const DEVICE_LIFETIME: Duration = Duration::minutes(15);
