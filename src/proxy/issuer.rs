//! The token and revoke endpoints as the proxy sees them: a client that shares our login gets our one
//! refresh; every other login passes through untouched.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use super::exchange::{Head, forward};
use super::intercept::Intercepted;
use super::reject::Rejection;
use crate::headers::strip_hop_by_hop;
use crate::rules::Use;
use crate::secret::Secret;
use crate::tokens::{TokenSource, Whose};
use crate::upstream::body::{Body, Inbound};

/// Longest token request that is looked at; a real one is below 4 KiB.
const MOST_BODY: usize = 64 * 1024;

/// Answers a request to an issuer's endpoint, judged by the token in its body.
pub(super) async fn answer(
    connection: &Arc<Intercepted>,
    (uses, source): (&Use, Option<&Arc<TokenSource>>),
    request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let (Some(source), &Method::POST) = (source, request.method()) else {
        return forward(connection, request, None).await;
    };
    if request.headers().contains_key(CONTENT_ENCODING) {
        // What cannot be read might be our own token, and would be redeemed behind our back.
        return Err(Rejection::BadRequest(
            "a token request is sent without Content-Encoding".into(),
        ));
    }
    let (mut head, body) = Head::of(request);
    let body = gather(body).await?;
    let asked = Asked::read(head.headers.get(CONTENT_TYPE), &body);
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
            strip_hop_by_hop(response.headers_mut());
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
