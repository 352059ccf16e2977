//! Reads what one text says of logins: which are allowed, and where they are kept.

use super::table::{At, Table, Value, one_of};
use crate::credential::{Keep, LoginKind};
use crate::policy::{Demand, Level, Limit, METHODS};

/// What becomes of the process when the login in use is no longer allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnViolation {
    /// It goes on without it.
    #[default]
    Continue,
    /// It ends.
    Exit,
}

impl OnViolation {
    pub(super) const WORDS: [(&str, Self); 2] =
        [("continue", Self::Continue), ("exit", Self::Exit)];
}

/// What a text forces. A key that is there and asks for nothing is `Some` and empty: it hides the same key
/// in lower files.
#[derive(Debug, Default)]
pub(super) struct Forced {
    method: Option<Option<Limit>>,
    workspaces: Option<Option<Limit>>,
}

impl Forced {
    /// `place` is what people know the text by.
    pub(super) fn read(table: &Table<'_>, place: &str) -> Self {
        let limit = |demand| Limit { demand, level: Level::Forced, place: place.to_owned() };
        let method = table.get(FORCED_METHOD).map(|_| {
            let kind = table.parsed(FORCED_METHOD, one_of(&METHODS))?.value;
            Some(limit(Demand::Methods(vec![kind])))
        });
        let workspaces = table.get(FORCED_WORKSPACES).map(|value| {
            let ids = Some(ids(value.texts())).filter(|ids| !ids.is_empty())?;
            Some(limit(Demand::Workspaces(ids)))
        });
        Self { method, workspaces }
    }

    /// Of each key what the first text says that has it.
    pub(super) fn first<'a>(texts: impl IntoIterator<Item = &'a Self>) -> Vec<Limit> {
        let (mut method, mut workspaces) = (None, None);
        for text in texts {
            method = method.or(text.method.as_ref());
            workspaces = workspaces.or(text.workspaces.as_ref());
        }
        [method, workspaces].into_iter().flatten().flatten().cloned().collect()
    }
}

/// What a text requires. An empty list allows nothing.
pub(super) fn required(table: &Table<'_>, place: &str) -> Vec<Limit> {
    let limit = |demand| Limit { demand, level: Level::Required, place: place.to_owned() };
    let methods = table.get(ALLOWED_METHODS).map(|_| {
        let kinds = table.parsed_list(ALLOWED_METHODS, one_of(&METHODS));
        let kinds: Vec<LoginKind> = kinds.into_iter().map(|kind| kind.value).collect();
        limit(Demand::Methods(kinds))
    });
    let workspaces = table
        .get(ALLOWED_WORKSPACES)
        .map(|list| limit(Demand::Workspaces(ids(list.items().iter().filter_map(Value::text)))));
    methods.into_iter().chain(workspaces).collect()
}

/// Whether a text requires a second factor.
pub(super) fn second_factor(table: &Table<'_>, place: &str) -> Option<Limit> {
    table.get(REQUIRE_MFA)?.flag()?.then(|| Limit {
        demand: Demand::SecondFactor,
        level: Level::Required,
        place: place.to_owned(),
    })
}

/// Where logins are kept, under a key that Codex and we name differently.
pub(super) fn keep(table: &Table<'_>, key: &str) -> Option<At<Keep>> {
    table.parsed(key, one_of(&Keep::WORDS))
}

/// What becomes of the process.
pub(super) fn on_violation(table: &Table<'_>) -> Option<OnViolation> {
    Some(table.parsed("on_policy_violation", one_of(&OnViolation::WORDS))?.value)
}

/// Notes what is wrong with the limits of a text of ours. What they say is read whenever a policy is asked
/// for, not here.
pub(super) fn check(table: &Table<'_>) {
    let before = table.mistakes().count();
    let forced = Forced::read(table, "");
    required(table, "");
    second_factor(table, "");
    // In Codex's files it means nothing; in ours somebody meant something.
    if let (Some(None), Some(value)) = (forced.workspaces, table.get(FORCED_WORKSPACES))
        && table.mistakes().count() == before
    {
        table.mistakes().add(value.place(), "names no workspace");
    }
}

/// Ids of workspaces, without blanks.
fn ids<'a>(texts: impl IntoIterator<Item = At<&'a str>>) -> Vec<String> {
    let ids = texts.into_iter().map(|text| text.value.trim().to_owned());
    ids.filter(|id| !id.is_empty()).collect()
}

/// Our key for where logins are kept.
pub(super) const OUR_KEEP: &str = "credentials_store";
/// Codex's key for the same.
pub(super) const CODEX_KEEP: &str = "cli_auth_credentials_store";

const FORCED_METHOD: &str = "forced_login_method";
const FORCED_WORKSPACES: &str = "forced_chatgpt_workspace_id";
const ALLOWED_METHODS: &str = "allowed_login_methods";
const ALLOWED_WORKSPACES: &str = "allowed_chatgpt_workspaces";
const REQUIRE_MFA: &str = "require_mfa";
