//! Reads the claims of a JWT, without checking its signature: the token came straight from the issuer
//! over verified TLS (OpenID Connect Core 1.0, section 3.1.3.7) or from the user's own cache.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use time::OffsetDateTime;

use crate::secret::Secret;

/// What we read of a token. All of it may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// When the token stops being good.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was made.
    pub issued_at: Option<OffsetDateTime>,
    /// E-mail address of the account.
    pub email: Option<String>,
    /// Workspace id.
    pub account_id: Option<String>,
    /// Plan, as the issuer spells it.
    pub plan: Option<String>,
    /// Whether the account lives on a government cloud.
    pub fedramp: bool,
    /// Whether the person signed in with more than one factor: `amr` (OpenID Connect Core 1.0 section 2)
    /// holds `mfa` (RFC 8176 section 2). `None` where the token does not say.
    pub mfa: Option<bool>,
}

impl Claims {
    /// The claims of a token; `None` when it is not a JWT of three parts with a JSON payload.
    pub fn of(token: &Secret) -> Option<Self> {
        let mut parts = token.expose().split('.');
        let (head, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || head.is_empty() || signature.is_empty() {
            return None;
        }
        let payload = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
        let claims: Value = serde_json::from_slice(&payload).ok()?;
        claims.is_object().then(|| Self::from_json(&claims))
    }

    fn from_json(claims: &Value) -> Self {
        // The two namespaces that ChatGPT tokens use.
        let auth = &claims["https://api.openai.com/auth"];
        let profile = &claims["https://api.openai.com/profile"];
        Self {
            expires_at: instant(&claims["exp"]),
            issued_at: instant(&claims["iat"]),
            email: text(&claims["email"]).or_else(|| text(&profile["email"])),
            account_id: text(&auth["chatgpt_account_id"]),
            plan: text(&auth["chatgpt_plan_type"]),
            fedramp: auth["chatgpt_account_is_fedramp"] == Value::Bool(true),
            mfa: claims["amr"].as_array().map(|methods| methods.iter().any(|it| it == "mfa")),
        }
    }
}

/// A NumericDate (RFC 7519 section 2), which may have a fraction; out of range counts as absent.
fn instant(value: &Value) -> Option<OffsetDateTime> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a float cast saturates, then the range check refuses"
    )]
    let seconds = value.as_i64().or_else(|| value.as_f64().map(|float| float as i64))?;
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(payload: &str) -> Secret {
        Secret::new(format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(payload)))
    }

    #[test]
    fn reads_a_chatgpt_token() {
        let claims = Claims::of(&jwt(
            r#"{"exp": 1800000000, "iat": 1799990000.5, "https://api.openai.com/profile": {"email": "a@b.example"},
                "https://api.openai.com/auth": {"chatgpt_account_id": "acct-1", "chatgpt_plan_type": "plus",
                "chatgpt_account_is_fedramp": true}, "amr": ["pwd", "mfa"]}"#,
        ))
        .unwrap();
        assert_eq!(claims.expires_at.unwrap().unix_timestamp(), 1_800_000_000);
        assert_eq!(claims.issued_at.unwrap().unix_timestamp(), 1_799_990_000);
        assert_eq!(claims.email.as_deref(), Some("a@b.example"));
        assert_eq!(
            (claims.account_id.as_deref(), claims.plan.as_deref()),
            (Some("acct-1"), Some("plus"))
        );
        assert!(claims.fedramp);
        assert_eq!(claims.mfa, Some(true));
        assert_eq!(Claims::of(&jwt(r#"{"amr": ["pwd"]}"#)).unwrap().mfa, Some(false));
    }

    #[test]
    fn takes_only_jwts() {
        for token in
            ["opaque", "a.b", "a..c", ".e30.c", "e30.e30.", "e30.e30.s.x", "e30.!!.s", "e30.W10.s"]
        {
            assert_eq!(Claims::of(&Secret::new(token)), None, "{token}");
        }
        assert_eq!(Claims::of(&jwt(r#"{"exp": "soon", "email": ""}"#)), Some(Claims::default()));
        assert_eq!(Claims::of(&jwt(r#"{"exp": 1e300}"#)), Some(Claims::default()));
    }
}
