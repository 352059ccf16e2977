//! The page of the pretend issuer where a person agrees, and the one-time codes that it sends back.

use std::collections::{HashMap, VecDeque};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderValue, LOCATION, REFERRER_POLICY};
use http::{Response, StatusCode, Uri};
use time::{Duration, OffsetDateTime};
use url::{Host, Url};

use super::form::Form;
use super::ledger::{Grant, Ledger, random};
use super::page::{escaped, page};
use super::{Dialect, Issuer, PretendLogin};
use crate::sandbox::Body;
use crate::secret::{Fingerprint, Secret};

/// What the person says to one request to sign in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consent {
    /// Yes.
    #[default]
    Allow,
    /// No, or the issuer's own no; the two stand in the redirect.
    Deny {
        /// The code, as RFC 6749 section 4.1.2.1 or the issuer has it.
        error: &'static str,
        /// What is said beside it.
        description: &'static str,
    },
    /// Yes, but the redirect holds no code.
    NoCode,
    /// Yes, but the redirect has another state than the request, as if a stranger had sent it.
    WrongState,
}

impl Issuer {
    /// Adds what the person says to one coming request to sign in; used in the order given. At first,
    /// and when none is left, it is [`Consent::Allow`].
    pub fn consent(&self, consent: Consent) {
        self.0.ledger.change(|ledger| ledger.authorize.script.push_back(consent));
    }

    /// Whether the person has to follow a link before they are sent back. At first they need not.
    pub fn ask_first(&self, asks: bool) {
        self.0.ledger.change(|ledger| ledger.authorize.asks_first = asks);
    }

    /// Whether the Codex issuer too sends people back to any port, for tests that run beside each
    /// other. At first it knows 1455 and 1457 alone, as the real one does.
    pub fn any_port(&self, any: bool) {
        self.0.ledger.change(|ledger| ledger.authorize.any_port = any);
    }

    pub(super) fn authorize(&self, dialect: Dialect, uri: &Uri) -> Response<Body> {
        let (form, now) = (Form::of_query(uri), self.0.clock.now());
        self.note(uri.path(), &form);
        let (place, asks_first) = self
            .0
            .ledger
            .change(|ledger| (ledger.sent_back(dialect, &form, now), ledger.authorize.asks_first));
        let place = match place {
            Ok(place) => place,
            Err(what) => return page(StatusCode::BAD_REQUEST, &format!("<p>Bad request: {what}.")),
        };
        let link = format!(
            "<p>Sign in to the sandbox?<p><a id=\"continue\" href=\"{}\">Continue</a>",
            escaped(place.as_str())
        );
        let status = if asks_first { StatusCode::OK } else { StatusCode::FOUND };
        let mut response = page(status, &link);
        response.headers_mut().insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        if let Some(place) = HeaderValue::from_str(place.as_str()).ok().filter(|_| !asks_first) {
            response.headers_mut().insert(LOCATION, place);
        }
        response
    }
}

/// What the page knows.
#[derive(Default)]
pub(super) struct Desk {
    any_port: bool,
    asks_first: bool,
    codes: HashMap<Fingerprint, Code>,
    script: VecDeque<Consent>,
}

/// A code that was handed out, and what it is bound to.
struct Code {
    challenge: String,
    expires_at: OffsetDateTime,
    /// What came of it.
    family: Option<usize>,
    grant: Grant,
    is_spent: bool,
    redirect_uri: String,
}

impl Ledger {
    /// Where the person is sent back to, or what is wrong with the request.
    fn sent_back(
        &mut self,
        dialect: Dialect,
        form: &Form,
        now: OffsetDateTime,
    ) -> Result<Url, &'static str> {
        let mut place = check(dialect, form, self.authorize.any_port)?;
        let consent = self.authorize.script.pop_front().unwrap_or_default();
        let mut state = form.get("state").to_owned();
        match consent {
            Consent::Allow | Consent::WrongState => {
                let code = self.code(dialect, form, now);
                place.query_pairs_mut().append_pair("code", code.expose());
            }
            Consent::Deny { error, description } => {
                let mut query = place.query_pairs_mut();
                query.append_pair("error", error).append_pair("error_description", description);
            }
            Consent::NoCode => {}
        }
        if consent == Consent::WrongState {
            state = URL_SAFE_NO_PAD.encode(random::<32>());
        }
        place.query_pairs_mut().append_pair("state", &state);
        Ok(place)
    }

    fn code(&mut self, dialect: Dialect, form: &Form, now: OffsetDateTime) -> Secret {
        let grant = match dialect {
            // Only Codex knows workspaces that a login may be restricted to.
            Dialect::Codex => Grant::codex(self.signing_in(form.get("allowed_workspace_id"))),
            Dialect::Standard => Grant::standard(Some(self.signing_in("")), form),
        };
        self.hand_out(grant, form.get("redirect_uri"), form.get("code_challenge"), now)
    }

    /// A fresh code.
    pub(super) fn hand_out(
        &mut self,
        grant: Grant,
        redirect_uri: &str,
        challenge: &str,
        now: OffsetDateTime,
    ) -> Secret {
        let code = self.mint("ac_");
        self.authorize.codes.insert(
            code.fingerprint(),
            Code {
                challenge: challenge.to_owned(),
                expires_at: now + CODE_LIFETIME,
                family: None,
                grant,
                is_spent: false,
                redirect_uri: redirect_uri.to_owned(),
            },
        );
        code
    }

    /// The first tokens of a login. A code is good for one try; shown again it ends what came of it
    /// (RFC 6749 section 4.1.2).
    pub(super) fn take_code(
        &mut self,
        dialect: Dialect,
        form: &Form,
        now: OffsetDateTime,
        lifetime: Duration,
    ) -> Result<(usize, PretendLogin), &'static str> {
        let shown = Fingerprint::of(form.get("code").as_bytes());
        let code = self.authorize.codes.get_mut(&shown);
        let code = code.filter(|code| code.grant.dialect == dialect).ok_or("invalid_grant")?;
        if std::mem::replace(&mut code.is_spent, true) {
            if let Some(family) = code.family {
                self.end(family);
            }
            return Err("invalid_grant");
        }
        let is_good = now < code.expires_at
            && form.get("redirect_uri") == code.redirect_uri
            && is_verifier(form.get("code_verifier"))
            && challenge_of(form.get("code_verifier")) == code.challenge;
        if !is_good {
            return Err("invalid_grant");
        }
        let grant = code.grant.clone();
        let family = self.found(grant);
        if let Some(code) = self.authorize.codes.get_mut(&shown) {
            code.family = Some(family);
        }
        Ok((family, self.issue(family, now, now + lifetime)))
    }
}

/// Where to, if nothing is wrong with the request.
fn check(dialect: Dialect, form: &Form, any_port: bool) -> Result<Url, &'static str> {
    if form.get("client_id") != dialect.client_id() {
        return Err("unknown client_id");
    }
    let place = place(dialect, form.get("redirect_uri"), any_port).ok_or("wrong redirect_uri")?;
    if form.is_repetitive {
        return Err("a parameter came twice");
    }
    if form.get("response_type") != "code" {
        return Err("response_type is not code");
    }
    if form.get("code_challenge_method") != "S256" || !is_challenge(form.get("code_challenge")) {
        return Err("no code_challenge of method S256");
    }
    if form.get("state").is_empty() {
        return Err("no state");
    }
    Ok(place)
}

/// The redirect URI, if it is one of this issuer's client: on loopback, with the port and path that
/// were registered (Codex) or any (RFC 8252 section 7.3).
fn place(dialect: Dialect, uri: &str, any_port: bool) -> Option<Url> {
    let place = Url::parse(uri).ok()?;
    let is_loopback = match place.host()? {
        Host::Ipv4(ip) => ip.is_loopback(),
        Host::Ipv6(ip) => ip.is_loopback() && dialect == Dialect::Standard,
        Host::Domain(name) => name == "localhost",
    };
    let is_plain = place.scheme() == "http"
        && place.fragment().is_none()
        && place.username().is_empty()
        && place.password().is_none();
    let is_registered = match dialect {
        Dialect::Codex => {
            let is_port = any_port || matches!(place.port(), Some(1455 | 1457));
            is_port && place.path() == "/auth/callback" && place.query().is_none()
        }
        Dialect::Standard => true,
    };
    (is_loopback && is_plain && is_registered).then_some(place)
}

/// RFC 7636 section 4.2, for the method S256.
pub(super) fn challenge_of(verifier: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes()))
}

fn is_challenge(text: &str) -> bool {
    URL_SAFE_NO_PAD.decode(text).is_ok_and(|digest| digest.len() == 32)
}

/// RFC 7636 section 4.1.
fn is_verifier(text: &str) -> bool {
    let is_unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    (43..=128).contains(&text.len()) && text.bytes().all(is_unreserved)
}

/// The longest that RFC 6749 section 4.1.2 wants.
const CODE_LIFETIME: Duration = Duration::minutes(10);
