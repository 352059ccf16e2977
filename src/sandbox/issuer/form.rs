//! Reads what a request to the pretend issuer says, and which client says it.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};
use serde_json::Value;

use super::{Dialect, OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET};
use crate::sandbox::{Ask, Body, Cut};

/// The parameters of one request.
pub(super) struct Form {
    pub(super) is_json: bool,
    /// Whether a parameter came twice, which RFC 6749 sections 3.1 and 3.2 forbid. `resource` may
    /// (RFC 8707 section 2), and some versions of Codex repeat `allowed_workspace_id`; the last counts.
    pub(super) is_repetitive: bool,
    headers: HeaderMap,
    members: HashMap<String, String>,
}

impl Form {
    /// The members of a JSON object or of a form, by what the request says it sends.
    pub(super) async fn read(request: Ask) -> Result<Self, Cut> {
        let (parts, body) = request.into_parts();
        let is_json = says_json(&parts.headers);
        let body: Bytes =
            Limited::new(body, MAX_BYTES).collect().await.map_err(|_| Cut)?.to_bytes();
        let (members, is_repetitive) =
            if is_json { (json_members(&body), false) } else { pairs(&body) };
        Ok(Self { is_json, is_repetitive, headers: parts.headers, members })
    }

    /// The query of a request.
    pub(super) fn of_query(uri: &Uri) -> Self {
        let (members, is_repetitive) = pairs(uri.query().unwrap_or_default().as_bytes());
        Self { is_json: false, is_repetitive, headers: HeaderMap::new(), members }
    }

    /// The value, empty where there is none.
    pub(super) fn get(&self, name: &str) -> &str {
        self.find(name).unwrap_or_default()
    }

    pub(super) fn find(&self, name: &str) -> Option<&str> {
        self.members.get(name).map(String::as_str)
    }

    /// What the tokens shall be good for: `audience`, or `resource` as RFC 8707 calls it.
    pub(super) fn audience(&self) -> &str {
        self.find("audience").unwrap_or_else(|| self.get("resource"))
    }

    /// What tests may read of it.
    pub(super) fn without_secrets(&self) -> BTreeMap<String, String> {
        let hidden = |name: &str| SECRET_MEMBERS.contains(&name);
        self.members
            .iter()
            .map(|(name, value)| {
                let value = if hidden(name) { "***" } else { value };
                (name.clone(), value.to_owned())
            })
            .collect()
    }

    /// Checks that the one known client asks (RFC 6749 section 2.3): by its id alone, or with its
    /// secret in one of the two places.
    pub(super) fn check_client(&self, proof: Proof) -> Result<(), Box<Response<Body>>> {
        let invalid_request = || Box::new(no(StatusCode::BAD_REQUEST, "invalid_request"));
        if self.is_json {
            return Err(invalid_request());
        }
        let (shown, secret) = (self.find("client_id"), self.find("client_secret"));
        let is_good = match self.headers.get(AUTHORIZATION) {
            Some(_) if secret.is_some() => return Err(invalid_request()),
            Some(basic) => {
                let (id, secret) = basic_pair(basic).unwrap_or_default();
                if shown.is_some_and(|shown| shown != id) {
                    return Err(invalid_request());
                }
                id == OAUTH_CLIENT_ID && secret == OAUTH_CLIENT_SECRET
            }
            None => {
                let is_secret = secret.map(|secret| secret == OAUTH_CLIENT_SECRET);
                shown == Some(OAUTH_CLIENT_ID) && is_secret.unwrap_or(proof == Proof::Id)
            }
        };
        if is_good { Ok(()) } else { Err(Box::new(invalid_client())) }
    }
}

/// What a client must show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// Its id; the secret, if it comes, must be right.
    Id,
    Secret,
}

fn no(status: StatusCode, code: &str) -> Response<Body> {
    Dialect::Standard.error(status, code)
}

/// RFC 6749 section 5.2.
fn invalid_client() -> Response<Body> {
    let mut response = no(StatusCode::UNAUTHORIZED, "invalid_client");
    let challenge = HeaderValue::from_static("Basic realm=\"sandbox\"");
    response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    response
}

/// Id and secret, each of which was encoded as in a form before the two were joined.
fn basic_pair(value: &HeaderValue) -> Option<(String, String)> {
    let (scheme, pair) = value.to_str().ok()?.split_once(' ')?;
    let pair = STANDARD.decode(pair).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let pair = String::from_utf8(pair).ok()?;
    let (id, secret) = pair.split_once(':')?;
    Some((decoded(id)?, decoded(secret)?))
}

fn decoded(text: &str) -> Option<String> {
    let pair = format!("value={text}");
    let mut pairs = url::form_urlencoded::parse(pair.as_bytes());
    let value = pairs.next()?.1.into_owned();
    // A bare `&` was not encoded.
    pairs.next().is_none().then_some(value)
}

/// The parameters, and whether one came twice.
fn pairs(text: &[u8]) -> (HashMap<String, String>, bool) {
    let (mut members, mut is_repetitive) = (HashMap::new(), false);
    for (name, value) in url::form_urlencoded::parse(text).into_owned() {
        let may_repeat = ["allowed_workspace_id", "resource"].contains(&name.as_str());
        is_repetitive |= members.insert(name, value).is_some() && !may_repeat;
    }
    (members, is_repetitive)
}

fn json_members(body: &[u8]) -> HashMap<String, String> {
    let Ok(Value::Object(members)) = serde_json::from_slice(body) else { return HashMap::new() };
    let text = |value: Value| value.as_str().map(str::to_owned);
    members.into_iter().filter_map(|(name, value)| Some((name, text(value)?))).collect()
}

fn says_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/json"))
}

/// Longest body that a request may have.
const MAX_BYTES: usize = 64 * 1024;

/// Members whose values nobody reads back.
const SECRET_MEMBERS: [&str; 8] = [
    "client_secret",
    "code",
    "code_verifier",
    "device_auth_id",
    "device_code",
    "refresh_token",
    "subject_token",
    "token",
];
