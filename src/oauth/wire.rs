//! Writes and reads what goes over the wire between a client and an issuer; pure, no I/O.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::{Answer, Reason};
use crate::credential::claims::Claims;
use crate::credential::{Account, TokenSet};
use crate::quote::{printable, quoted};
use crate::secret::Secret;

/// The body of a refresh request: JSON, with Codex's members in Codex's order. Wiped on drop.
pub fn refresh_request(client_id: &str, reason: Reason, token: &Secret) -> Bytes {
    #[derive(Serialize)]
    struct Request<'a> {
        client_id: &'a str,
        grant_type: &'static str,
        refresh_reason: &'static str,
        refresh_token: &'a str,
    }
    wiped_json(&Request {
        client_id,
        grant_type: "refresh_token",
        refresh_reason: reason.as_str(),
        refresh_token: token.expose(),
    })
}

/// The body of a revocation as Codex sends it: JSON; without a refresh token no client id. Wiped on drop.
pub(super) fn revoke_request(token: &Secret, hint: &str, client_id: Option<&str>) -> Bytes {
    #[derive(Serialize)]
    struct Request<'a> {
        token: &'a str,
        token_type_hint: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        client_id: Option<&'a str>,
    }
    wiped_json(&Request { token: token.expose(), token_type_hint: hint, client_id })
}

/// The body of a request for a device code as Codex sends it.
pub(super) fn user_code_request(client_id: &str) -> Bytes {
    #[derive(Serialize)]
    struct Request<'a> {
        client_id: &'a str,
    }
    wiped_json(&Request { client_id })
}

/// The body of the question whether a device code was entered, as Codex sends it. Wiped on drop.
pub(super) fn device_token_request(id: &Secret, user_code: &str) -> Bytes {
    #[derive(Serialize)]
    struct Request<'a> {
        device_auth_id: &'a str,
        user_code: &'a str,
    }
    wiped_json(&Request { device_auth_id: id.expose(), user_code })
}

/// What Codex's issuer hands out for a device: the id, the code and how often to ask (a number, also as a
/// text). `None` for anything else.
pub(super) fn parse_user_code(body: &[u8]) -> Option<(Secret, String, Option<Duration>)> {
    #[derive(Deserialize)]
    struct Response {
        device_auth_id: String,
        #[serde(alias = "usercode")]
        user_code: String,
        interval: Option<Value>,
    }
    let response: Response = serde_json::from_slice(body).ok()?;
    let interval = response.interval.as_ref().and_then(lifetime);
    Some((Secret::new(response.device_auth_id), shown(&response.user_code, 64)?, interval))
}

/// What Codex's issuer answers once a device code was entered: the code and the verifier that it made.
pub(super) fn parse_device_grant(body: &[u8]) -> Option<(Secret, Secret)> {
    #[derive(Deserialize)]
    struct Response {
        authorization_code: String,
        code_verifier: String,
    }
    let response: Response = serde_json::from_slice(body).ok()?;
    Some((Secret::new(response.authorization_code), Secret::new(response.code_verifier)))
}

/// What an issuer hands out for a device (RFC 8628 section 3.2).
#[derive(Debug)]
pub(super) struct DeviceAnswer {
    pub(super) device_code: Secret,
    pub(super) user_code: String,
    pub(super) verification_uri: String,
    pub(super) verification_uri_complete: Option<String>,
    pub(super) expires_in: Option<Duration>,
    pub(super) interval: Option<Duration>,
}

/// Reads such an answer; `None` for anything else. Only `https` pages are shown to people.
pub(super) fn parse_device_answer(body: &[u8]) -> Option<DeviceAnswer> {
    #[derive(Deserialize)]
    struct Response {
        device_code: String,
        user_code: String,
        #[serde(alias = "verification_url")]
        verification_uri: String,
        verification_uri_complete: Option<String>,
        expires_in: Option<Value>,
        interval: Option<Value>,
    }
    let response: Response = serde_json::from_slice(body).ok()?;
    let page = |url: &String| shown(url, 512).filter(|url| url.starts_with("https://"));
    Some(DeviceAnswer {
        device_code: Secret::new(response.device_code),
        user_code: shown(&response.user_code, 64)?,
        verification_uri: page(&response.verification_uri)?,
        verification_uri_complete: response.verification_uri_complete.as_ref().and_then(page),
        expires_in: response.expires_in.as_ref().and_then(lifetime),
        interval: response.interval.as_ref().and_then(lifetime),
    })
}

/// Whom a personal access token speaks for; `None` for an answer that does not say.
pub(super) fn parse_whoami(body: &[u8]) -> Option<Account> {
    #[derive(Deserialize)]
    struct Response {
        email: Option<String>,
        chatgpt_account_id: String,
        chatgpt_plan_type: Option<String>,
        #[serde(default)]
        chatgpt_account_is_fedramp: bool,
    }
    let response: Response = serde_json::from_slice(body).ok()?;
    Some(Account {
        id: Some(response.chatgpt_account_id).filter(|id| !id.is_empty()),
        email: response.email,
        plan: response.chatgpt_plan_type,
        fedramp: response.chatgpt_account_is_fedramp,
    })
}

/// A text of an issuer as it stands, where it may be shown on a terminal: printable, not empty, not too long.
fn shown(text: &str, limit: usize) -> Option<String> {
    let fits = |text: &&str| (1..=limit).contains(&text.len()) && printable(text) == *text;
    Some(text).filter(fits).map(str::to_owned)
}

/// Characters of an issuer's own words that are shown: a few lines of a terminal.
pub(super) const LONGEST_SHOWN: usize = 300;

/// The answer that a client gets which shares this login and refreshes by itself: the set as it is
/// now, and how long its access token lives yet where that is known. Wiped on drop.
pub fn refresh_answer(tokens: &TokenSet, expires_in: Option<Duration>) -> Bytes {
    #[derive(Serialize)]
    struct Response<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        id_token: Option<&'a str>,
        access_token: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        refresh_token: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        expires_in: Option<u64>,
        token_type: &'static str,
    }
    wiped_json(&Response {
        id_token: tokens.id.as_ref().map(Secret::expose),
        access_token: tokens.access.expose(),
        refresh_token: tokens.refresh.as_ref().map(Secret::expose),
        expires_in: expires_in.map(|left| left.as_secs()),
        token_type: "Bearer",
    })
}

#[expect(clippy::expect_used, reason = "strings and numbers always have a JSON form")]
fn wiped_json(value: &impl Serialize) -> Bytes {
    // Large enough from the start: a buffer that grows leaves copies behind.
    let mut json = Zeroizing::new(Vec::with_capacity(super::refresh::MAX_ANSWER_BYTES));
    serde_json::to_writer(&mut *json, value).expect("strings and numbers become JSON");
    Bytes::from_owner(json)
}

/// Whether a message says that its body is JSON.
pub fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = declared.split(';').next().unwrap_or("").trim();
    media_type.eq_ignore_ascii_case("application/json")
}

/// Reads a token set out of an issuer's answer. [`Answer::date`] is left to the caller.
///
/// An `expires_in` that makes no sense and an id token that is no JWT (Codex cannot load a cache
/// with one) count as left out: the set must not be lost for them.
///
/// # Errors
///
/// [`BadAnswer`] says what is wrong and never quotes the answer.
pub fn parse_answer(body: &[u8]) -> Result<Answer, BadAnswer> {
    #[derive(Deserialize)]
    struct Response {
        access_token: Option<String>,
        refresh_token: Option<String>,
        id_token: Option<String>,
        expires_in: Option<Value>,
    }
    let response: Response = serde_json::from_slice(body).map_err(|_| BadAnswer::Form)?;
    // Taken first, so that every string is wiped whichever of them is refused.
    let access = response.access_token.map(Secret::new);
    let refresh = response.refresh_token.map(Secret::new).filter(|token| !token.is_empty());
    let id = response.id_token.map(Secret::new).filter(|token| Claims::of(token).is_some());
    let access = access.ok_or(BadAnswer::NoAccessToken)?;
    for token in std::iter::once(&access).chain(&refresh).chain(&id) {
        token.check_field_value().map_err(|_| BadAnswer::Token)?;
    }
    let expires_in = response.expires_in.as_ref().and_then(lifetime);
    Ok(Answer { access, refresh, id, expires_in, date: None })
}

/// A positive number of seconds, also as a string, at most a year.
fn lifetime(value: &Value) -> Option<Duration> {
    let seconds = value.as_f64().or_else(|| value.as_str()?.parse().ok())?;
    (seconds > 0.0).then(|| Duration::from_secs_f64(seconds.min(YEAR_SECONDS)))
}

/// The error code of an issuer's answer: `error.code`, else `error`, else `code`, in lower case.
/// `None` when the body is no JSON object, `Some(None)` when it has no code that makes sense.
pub fn error_code(body: &[u8]) -> Option<Option<String>> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let answer = answer.as_object()?;
    let code = match answer.get("error") {
        Some(Value::Object(error)) => error.get("code"),
        Some(error @ Value::String(_)) => Some(error),
        _ => answer.get("code"),
    };
    let fits = |code: &&str| {
        (1..=64).contains(&code.len())
            && code.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    Some(code.and_then(Value::as_str).filter(fits).map(str::to_ascii_lowercase))
}

/// The issuer's own words beside its error code: `error.message`, else `error_description`. `None` where
/// there are none that can be shown.
pub(super) fn error_description(body: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let said = answer["error"]["message"].as_str().or_else(|| answer["error_description"].as_str());
    said.filter(|said| !said.is_empty()).map(|said| quoted(said, LONGEST_SHOWN))
}

/// An answer that holds no token set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// Not JSON, not an object, or a member of the wrong type.
    #[error("the answer is not a token set")]
    Form,
    /// RFC 6749 section 5.1 requires one.
    #[error("the answer has no access token")]
    NoAccessToken,
    /// A token with a character that no token may have, or longer than one may be.
    #[error("the answer has a token that cannot be sent")]
    Token,
}

/// Longest life of an access token that is believed.
const YEAR_SECONDS: f64 = 366.0 * 86_400.0;

#[cfg(test)]
mod tests {
    use super::*;

    const JWT: &str = "e30.e30.s";

    #[test]
    fn asks_as_codex_does() {
        let body = refresh_request("app_1", Reason::Proactive, &Secret::new("rt_\"1"));
        assert_eq!(
            body,
            r#"{"client_id":"app_1","grant_type":"refresh_token","refresh_reason":"proactive_expiry","refresh_token":"rt_\"1"}"#
        );
    }

    #[test]
    fn answers_with_the_whole_set() {
        let mut tokens = TokenSet {
            access: Secret::new("a"),
            refresh: Some(Secret::new("r")),
            id: Some(Secret::new(JWT)),
            account_id: None,
            last_refresh: None,
        };
        assert_eq!(
            refresh_answer(&tokens, Some(Duration::from_millis(3_599_900))),
            r#"{"id_token":"e30.e30.s","access_token":"a","refresh_token":"r","expires_in":3599,"token_type":"Bearer"}"#
        );
        tokens.refresh = None;
        tokens.id = None;
        assert_eq!(refresh_answer(&tokens, None), r#"{"access_token":"a","token_type":"Bearer"}"#);
    }

    #[test]
    fn reads_token_sets() {
        let full = format!(
            r#"{{"access_token":"a.b-c_d~","refresh_token":"rt_1","id_token":"{JWT}","expires_in":3600,"x":[]}}"#
        );
        let answer = parse_answer(full.as_bytes()).unwrap();
        assert_eq!(answer.access.expose(), "a.b-c_d~");
        assert_eq!(answer.refresh.unwrap().expose(), "rt_1");
        assert_eq!(answer.id.unwrap().expose(), JWT);
        assert_eq!(answer.expires_in, Some(Duration::from_secs(3600)));

        let bare = parse_answer(br#"{"access_token":"a","id_token":"opaque","refresh_token":""}"#)
            .unwrap();
        assert!(bare.refresh.is_none() && bare.id.is_none() && bare.expires_in.is_none());
    }

    #[test]
    fn refuses_what_is_no_token_set() {
        let long = format!(r#"{{"access_token":"{}"}}"#, "x".repeat(17 * 1024));
        let table: [(&[u8], BadAnswer); 10] = [
            (b"", BadAnswer::Form),
            (b"null", BadAnswer::Form),
            (b"[]", BadAnswer::Form),
            (br#"{"access_token":1}"#, BadAnswer::Form),
            (br#"{"access_token":"a","refresh_token":{}}"#, BadAnswer::Form),
            (br#"{}"#, BadAnswer::NoAccessToken),
            (br#"{"access_token":""}"#, BadAnswer::Token),
            (br#"{"access_token":"a\r\nHost: evil"}"#, BadAnswer::Token),
            (br#"{"access_token":"a","refresh_token":"r r"}"#, BadAnswer::Token),
            (long.as_bytes(), BadAnswer::Token),
        ];
        for (body, expected) in table {
            assert_eq!(parse_answer(body).err(), Some(expected), "{:?}", body.get(..40));
        }
    }

    #[test]
    fn believes_sensible_lifetimes() {
        let year = Some(YEAR_SECONDS as u64);
        let table = [
            ("3600", Some(3600)),
            ("\"3600\"", Some(3600)),
            ("0", None),
            ("-1", None),
            ("1e300", year),
            ("99999999999999999999", year),
            ("\"soon\"", None),
            ("\"nan\"", None),
            ("null", None),
            ("[]", None),
        ];
        for (text, expected) in table {
            let body = format!(r#"{{"access_token":"a","expires_in":{text}}}"#);
            let seconds = parse_answer(body.as_bytes()).unwrap().expires_in.map(|d| d.as_secs());
            assert_eq!(seconds, expected, "{text}");
        }
    }

    #[test]
    fn finds_error_codes() {
        let table: [(&str, Option<Option<&str>>); 7] = [
            (r#"{"error":{"code":"A_b"}}"#, Some(Some("a_b"))),
            (r#"{"error":"a","code":"b"}"#, Some(Some("a"))),
            (r#"{"code":"b"}"#, Some(Some("b"))),
            (r#"{"error":{"code":7}}"#, Some(None)),
            (r#"{"error":"has spaces"}"#, Some(None)),
            ("[]", None),
            ("<html>", None),
        ];
        for (body, expected) in table {
            let expected = expected.map(|code| code.map(str::to_owned));
            assert_eq!(error_code(body.as_bytes()), expected, "{body}");
        }
    }
}
