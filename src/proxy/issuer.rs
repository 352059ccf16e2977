//! The token and revoke endpoints as the proxy sees them: a client that shares our login gets our one
//! refresh, one that holds decoys gets decoys; every other login passes through untouched.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::Now;
use super::exchange::{Head, forward};
use super::intercept::Intercepted;
use super::reject::Rejection;
use crate::clock::Clock;
use crate::credential::{Account, CredentialName};
use crate::decoy::{self, DecoySet, Tag};
use crate::headers::{clean_answer, strip_hop_by_hop};
use crate::rules::Use;
use crate::secret::Secret;
use crate::tokens::{State, TokenSource, Whose};
use crate::upstream::body::{Body, Inbound};

/// Longest token request that is looked at; a real one is below 4 KiB.
const MOST_BODY: usize = 64 * 1024;

/// Answers a request to an issuer's endpoint, judged by the token in its body.
pub(super) async fn answer(
    connection: &Arc<Intercepted>,
    now: &Now,
    uses: &Use,
    request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let source = now.tokens.source(&uses.credential);
    let (Some(source), &Method::POST) = (source, request.method()) else {
        return forward(connection, request, None).await;
    };
    if request.headers().contains_key(CONTENT_ENCODING) {
        // What cannot be read might be our own token, and would be redeemed behind our back.
        return Err(Rejection::BadRequest(
            "a token request is sent without Content-Encoding".into(),
        ));
    }
    let (mut head, body) = Head::of(connection, request);
    let body = gather(body).await?;
    let asked = Asked::read(head.headers.get(CONTENT_TYPE), &body);
    let shown = asked.as_ref().map(|asked| decoy::tags_in_secret(asked.token()));
    let (all, shown) = (decoy::tags_in(&body), shown.unwrap_or_default());
    if !all.is_empty() || !shown.is_empty() {
        now.decoys.check_body(&all, &shown, &uses.credential)?;
        let clock = &connection.shared.clock;
        return answer_decoy(source, &uses.credential, asked, clock).await;
    }
    let whose = asked.as_ref().and_then(|asked| source.recognises(asked.token()));
    if connection.admitted.is_by_pass() && whose.is_some() {
        // Who holds a pass was never given the login; what it shows has leaked, and gets nothing for it.
        return Err(Rejection::OutOfReach("a token of the shared login is not for a pass to use"));
    }
    match (asked, whose) {
        (Some(Asked::Refresh(_)), Some(whose @ (Whose::Current | Whose::Previous))) => {
            tracing::info!(credential = %uses.credential, "answering a client's refresh of the shared login");
            let answer = source.answer_refresh(whose).await?;
            let mut response = Response::new(Body::from(answer));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            Ok(response)
        }
        (asked, whose) => {
            strip_hop_by_hop(&mut head.headers);
            // Not one that can be sent again: no layer may repeat a token request.
            let once = Body::boxed(Full::new(body).map_err(|never| match never {}));
            let mut response = connection.send(head, once, None).await?;
            clean_answer(response.headers_mut());
            if matches!(asked, Some(Asked::Revoke(_)))
                && matches!(whose, Some(Whose::Current | Whose::Previous))
                && response.status().is_success()
            {
                tracing::info!(credential = %uses.credential, "a client logged out of the shared login");
                source.logged_out();
            }
            Ok(response)
        }
    }
}

/// Answers who shows a decoy, without a word to the issuer: a refresh with fresh ones, a logout with success
/// and no effect.
async fn answer_decoy(
    source: &TokenSource,
    name: &CredentialName,
    asked: Option<Asked>,
    clock: &Clock,
) -> Result<Response<Body>, Rejection> {
    let answer = match asked {
        Some(Asked::Revoke(_)) | None => json!({}),
        Some(Asked::Refresh(_)) => {
            let status = source.status();
            if status.state != State::Ok {
                // A client whose every request will be refused learns it here.
                source.current().await?;
            }
            decoys_for(Tag::of(name), &status.account, clock)
        }
    };
    tracing::debug!(credential = %name, "answering a client that holds decoys");
    let mut response = Response::new(Body::from(Bytes::from(answer.to_string())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// An issuer's answer (RFC 6749 section 5.1) with nothing but decoys.
fn decoys_for(tag: Tag, account: &Account, clock: &Clock) -> Value {
    let set = DecoySet::new(tag, account, clock.now());
    json!({
        "access_token": set.access,
        "expires_in": DecoySet::expires_in(),
        "id_token": set.id,
        "refresh_token": set.refresh,
        "token_type": "Bearer",
    })
}

async fn gather(body: Inbound) -> Result<Bytes, Rejection> {
    match Limited::new(body, MOST_BODY).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Rejection::BadRequest("a token request is at most 64 KiB".into()))
        }
        Err(_) => Err(Rejection::BadRequest("the request's body broke off".into())),
    }
}

/// What a token request asks for, with the token that it shows.
enum Asked {
    Refresh(Secret),
    Revoke(Secret),
}

impl Asked {
    /// Reads JSON (as Codex sends it) or a form (RFC 6749 section 6, RFC 7009 section 2.1); `None` for
    /// everything that shows no token of ours.
    fn read(content_type: Option<&HeaderValue>, body: &[u8]) -> Option<Self> {
        let content_type = content_type?.to_str().ok()?.split(';').next()?.trim();
        let fields: Vec<(String, String)> = if content_type.eq_ignore_ascii_case("application/json")
        {
            let Value::Object(object) = serde_json::from_slice(body).ok()? else { return None };
            let text = |(name, value): (String, Value)| Some((name, value.as_str()?.to_owned()));
            object.into_iter().filter_map(text).collect()
        } else {
            url::form_urlencoded::parse(body).into_owned().collect()
        };
        let is_refresh =
            fields.iter().any(|(name, value)| name == "grant_type" && value == "refresh_token");
        let field = |wanted: &str| {
            let found = fields.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| Secret::new(value))
        };
        if let Some(token) = field("refresh_token") {
            return is_refresh.then_some(Self::Refresh(token));
        }
        field("token").map(Self::Revoke)
    }

    fn token(&self) -> &Secret {
        match self {
            Self::Refresh(token) | Self::Revoke(token) => token,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content_type: &'static str, body: &str) -> String {
        match Asked::read(Some(&HeaderValue::from_static(content_type)), body.as_bytes()) {
            Some(Asked::Refresh(token)) => format!("refresh {}", token.expose()),
            Some(Asked::Revoke(token)) => format!("revoke {}", token.expose()),
            None => "nothing".into(),
        }
    }

    #[test]
    fn token_requests() {
        let (json, form) = ("application/json", "application/x-www-form-urlencoded; charset=utf-8");
        let table = [
            (json, r#"{"grant_type": "refresh_token", "refresh_token": "rt_1"}"#, "refresh rt_1"),
            (json, r#"{"grant_type": "authorization_code", "refresh_token": "rt_1"}"#, "nothing"),
            (json, r#"{"refresh_token": "rt_1"}"#, "nothing"),
            (json, r#"{"token": "rt_1", "token_type_hint": "refresh_token"}"#, "revoke rt_1"),
            (json, r#"{"token": 7}"#, "nothing"),
            (json, "grant_type=refresh_token&refresh_token=rt_1", "nothing"),
            (form, "grant_type=refresh_token&refresh_token=rt%5F1", "refresh rt_1"),
            (form, "token=at", "revoke at"),
            (form, "", "nothing"),
        ];
        for (content_type, body, expected) in table {
            assert_eq!(read(content_type, body), expected, "{body}");
        }
    }
}
