//! Whom a pretend login speaks for, and how a client would hold it.

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::CLIENT_ID;
use crate::sandbox::ISSUER_HOST;
use crate::secret::Secret;

/// Whoever signs in: what the tokens say of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The workspace; empty leaves the claim out.
    pub account_id: String,
    /// How they proved who they are (RFC 8176); `None` leaves the claim out.
    pub amr: Option<Vec<String>>,
    /// Their address.
    pub email: String,
    /// Whether the workspace lives on a government cloud.
    pub fedramp: bool,
    /// The plan as the issuer spells it; empty leaves the claim out.
    pub plan: String,
    /// The same in every workspace.
    pub user_id: String,
}

impl Person {
    /// Somebody in this workspace, of plan `plus`, of whose ways to sign in nothing is said.
    pub fn of(account_id: &str) -> Self {
        Self {
            account_id: account_id.to_owned(),
            amr: None,
            email: format!("{account_id}@example.com"),
            fedramp: false,
            plan: "plus".to_owned(),
            user_id: format!("user-{account_id}"),
        }
    }
}

impl Default for Person {
    /// Somebody in the workspace of logins that ask for none.
    fn default() -> Self {
        Self::of("acct-sandbox")
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
