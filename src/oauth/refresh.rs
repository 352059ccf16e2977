//! Judges an issuer's answer to a refresh: a new set, a definite no, or nothing to go by.

use std::time::Duration;

use http::header::{DATE, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use super::wire::{error_code, is_json, parse_answer};
use super::{Answer, RefreshError};

/// What an answer to a refresh means.
///
/// Definite are only: a set with an access token (2xx), a JSON 401, a JSON 400 or 403 with one of
/// the codes that end a login, and 429. Everything else, a redirect and a page of HTML included, may
/// come from something between the issuer and us and leaves open whether the token was redeemed.
///
/// # Errors
///
/// [`RefreshError`], never [`RefreshError::NotSent`].
pub fn judge(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Result<Answer, RefreshError> {
    if status == StatusCode::TOO_MANY_REQUESTS {
        return Err(RefreshError::Limited { retry_after: retry_after(headers) });
    }
    if body.len() > MAX_ANSWER_BYTES {
        return Err(RefreshError::Unknown("the answer is longer than 64 KiB".to_owned()));
    }
    if !is_json(headers) {
        return Err(RefreshError::Unknown(format!("{} that is not JSON", status.as_u16())));
    }
    if status.is_success() {
        let answer = parse_answer(body).map_err(|bad| RefreshError::Unknown(bad.to_string()))?;
        return Ok(Answer { date: date(headers), ..answer });
    }
    match (status, error_code(body)) {
        (StatusCode::UNAUTHORIZED, Some(code)) => {
            Err(RefreshError::Rejected { code: code.unwrap_or_else(|| "unauthorized".to_owned()) })
        }
        (StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN, Some(Some(code)))
            if FINAL_CODES.contains(&code.as_str()) =>
        {
            Err(RefreshError::Rejected { code })
        }
        _ => Err(RefreshError::Unknown(format!("status {}", status.as_u16()))),
    }
}

/// Why a login that the issuer ended must be made anew: one sentence, Codex's own where it has one.
pub fn verdict(code: &str) -> String {
    let why = match code {
        "refresh_token_expired" => " because your refresh token has expired",
        "refresh_token_reused" => " because your refresh token was already used",
        "refresh_token_invalidated" => " because your refresh token was revoked",
        _ => "",
    };
    format!("Your access token could not be refreshed{why}. Please log out and sign in again.")
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn date(headers: &HeaderMap) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(headers.get(DATE)?.to_str().ok()?, &Rfc2822).ok()
}

/// Longest answer that is read: 64 KiB, sixteen times the largest set seen.
pub const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// The codes that end a login with a 400 or 403; a 401 ends it with any (Codex 0.169, and RFC 6749 section 5.2).
const FINAL_CODES: [&str; 4] =
    ["invalid_grant", "refresh_token_expired", "refresh_token_invalidated", "refresh_token_reused"];

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Seen {
        Set,
        Limited(Option<u64>),
        Rejected(String),
        Unknown,
    }

    fn judged(status: u16, head: &[(&'static str, &'static str)], body: &[u8]) -> Seen {
        let mut headers = HeaderMap::new();
        for (name, value) in head {
            headers.insert(*name, value.parse().unwrap());
        }
        match judge(StatusCode::from_u16(status).unwrap(), &headers, body) {
            Ok(_) => Seen::Set,
            Err(RefreshError::Limited { retry_after }) => {
                Seen::Limited(retry_after.map(|wait| wait.as_secs()))
            }
            Err(RefreshError::Rejected { code }) => Seen::Rejected(code),
            Err(RefreshError::Unknown(_)) => Seen::Unknown,
            Err(RefreshError::NotSent(_)) => unreachable!("an answer came"),
        }
    }

    #[test]
    fn only_the_issuers_own_word_ends_a_login() {
        const JSON: &[(&str, &str)] = &[("content-type", "application/json; charset=utf-8")];
        const HTML: &[(&str, &str)] = &[("content-type", "text/html")];
        let rejected = |code: &str| Seen::Rejected(code.to_owned());
        let set = br#"{"access_token":"a.b.c"}"#.as_slice();
        let long = vec![b' '; MAX_ANSWER_BYTES + 1];
        type Row<'a> = (u16, &'a [(&'static str, &'static str)], &'a [u8], Seen);
        let table: [Row<'_>; 24] = [
            (200, JSON, set, Seen::Set),
            (201, JSON, set, Seen::Set),
            (200, HTML, set, Seen::Unknown),
            (200, &[], set, Seen::Unknown),
            (200, JSON, b"", Seen::Unknown),
            (200, JSON, br#"{"access_tok"#, Seen::Unknown),
            (200, JSON, br#"{"error":"invalid_grant"}"#, Seen::Unknown),
            (200, JSON, &long, Seen::Unknown),
            (302, HTML, b"", Seen::Unknown),
            (400, JSON, br#"{"error":"invalid_grant"}"#, rejected("invalid_grant")),
            (400, JSON, br#"{"error":"Invalid_Grant"}"#, rejected("invalid_grant")),
            (400, JSON, br#"{"error":"invalid_request"}"#, Seen::Unknown),
            (400, HTML, b"<html>", Seen::Unknown),
            (401, JSON, br#"{"error":{"code":"refresh_token_reused"}}"#, {
                rejected("refresh_token_reused")
            }),
            (401, JSON, br#"{"error":{"code":"token_expired"}}"#, rejected("token_expired")),
            (401, JSON, br#"{"code":"refresh_token_expired"}"#, rejected("refresh_token_expired")),
            (401, JSON, br#"{"error":{"message":"no"}}"#, rejected("unauthorized")),
            (401, JSON, b"[]", Seen::Unknown),
            (401, HTML, b"<html>blocked</html>", Seen::Unknown),
            (403, HTML, b"<html>challenge</html>", Seen::Unknown),
            (403, JSON, br#"{"error":"refresh_token_invalidated"}"#, {
                rejected("refresh_token_invalidated")
            }),
            (429, HTML, b"", Seen::Limited(None)),
            (429, &[("retry-after", "17")], b"", Seen::Limited(Some(17))),
            (503, &[("retry-after", "17")], b"", Seen::Unknown),
        ];
        for (status, head, body, expected) in table {
            let body_text = String::from_utf8_lossy(&body[..body.len().min(60)]);
            assert_eq!(judged(status, head, body), expected, "{status} {head:?} {body_text}");
        }
    }

    #[test]
    fn learns_the_issuers_time() {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", "application/json".parse().unwrap());
        headers.insert("date", "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
        let answer = judge(StatusCode::OK, &headers, br#"{"access_token":"a"}"#).unwrap();
        assert_eq!(answer.date.map(OffsetDateTime::unix_timestamp), Some(784_111_777));
    }

    #[test]
    fn speaks_as_codex_does() {
        assert_eq!(
            verdict("refresh_token_reused"),
            "Your access token could not be refreshed because your refresh token was already used. \
             Please log out and sign in again."
        );
        assert_eq!(
            verdict("token_expired"),
            "Your access token could not be refreshed. Please log out and sign in again."
        );
    }
}
