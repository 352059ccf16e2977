//! Tokens that a person made for a program of their own, and the question whose they are.

use http::header::{AUTHORIZATION, HeaderMap};
use http::{Response, StatusCode};
use serde_json::json;

use super::{Dialect, Issuer};
use crate::sandbox::{Body, json};
use crate::secret::Secret;

impl Issuer {
    /// A good personal access token (`at-…`) for this workspace; the API takes it too.
    pub fn personal_token(&self, account_id: &str) -> Secret {
        self.0.ledger.change(|ledger| ledger.issue_personal(account_id))
    }

    /// How often it was asked whose a personal token is.
    pub fn whoamis(&self) -> usize {
        self.0.ledger.read(|ledger| ledger.whoamis)
    }

    pub(super) fn whoami(&self, headers: &HeaderMap) -> Response<Body> {
        let shown = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = Secret::new(shown.and_then(|text| text.strip_prefix("Bearer ")).unwrap_or(""));
        let owner = self.0.ledger.change(|ledger| {
            ledger.whoamis += 1;
            ledger.owner(&shown).cloned()
        });
        let Some(person) = owner else {
            return Dialect::Codex.error(StatusCode::UNAUTHORIZED, "invalid_api_key");
        };
        json(
            StatusCode::OK,
            &json!({
                "email": person.email,
                "chatgpt_user_id": person.user_id,
                "chatgpt_account_id": person.account_id,
                "chatgpt_plan_type": person.plan,
                "chatgpt_account_is_fedramp": person.fedramp,
            }),
        )
    }
}
