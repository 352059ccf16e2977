//! The decisions on every kind of login under every kind of limit, and the words for each.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::*;
use crate::credential::{Account, TokenSet};
use crate::secret::Secret;

const OURS: &str = "/home/me/.config/valetkey/config.toml";
const CODEX: &str = "/home/me/.codex/config.toml";
const REQUIREMENTS: &str = "/etc/codex/requirements.toml";
const MANAGED: &str = "/etc/valetkey/managed.toml";

fn tokens(workspace: Option<&str>, mfa: Option<bool>) -> TokenSet {
    let workspace = workspace
        .map(|id| format!(r#""https://api.openai.com/auth":{{"chatgpt_account_id":"{id}"}}"#));
    let mfa = mfa.map(|yes| format!(r#""amr":["{}"]"#, if yes { "mfa" } else { "pwd" }));
    let claims: Vec<String> = [workspace, mfa].into_iter().flatten().collect();
    let payload = URL_SAFE_NO_PAD.encode(format!("{{{}}}", claims.join(",")));
    TokenSet {
        access: Secret::new("access"),
        refresh: None,
        id: Some(Secret::new(format!("e30.{payload}.sig"))),
        // What the cache states counts for nothing here.
        account_id: None,
        last_refresh: None,
    }
}

fn chatgpt(workspace: Option<&str>, mfa: Option<bool>) -> Login {
    Login::ChatGpt(tokens(workspace, mfa))
}

fn personal(account: Option<Option<&str>>) -> Login {
    let account = account.map(|id| Account { id: id.map(str::to_owned), ..Account::default() });
    Login::Personal(PersonalToken { token: Secret::new("at-x"), account })
}

fn api_key() -> Login {
    Login::ApiKey(Secret::new("sk-x"))
}

fn methods(level: Level, kinds: &[LoginKind], place: &str) -> Limit {
    Limit { demand: Demand::Methods(kinds.to_vec()), level, place: place.to_owned() }
}

fn workspaces(level: Level, ids: &[&str], place: &str) -> Limit {
    let ids = ids.iter().map(|id| (*id).to_owned()).collect();
    Limit { demand: Demand::Workspaces(ids), level, place: place.to_owned() }
}

fn second_factor() -> Limit {
    Limit { demand: Demand::SecondFactor, level: Level::Required, place: MANAGED.to_owned() }
}

/// What is expected of a login under one limit of methods or none, one of workspaces or none, and MFA.
struct Case {
    login: Login,
    is_key: bool,
    /// The workspace; the outer `None` for an API key.
    workspace: Option<Option<&'static str>>,
    mfa: Option<bool>,
}

impl Case {
    /// The sentence for a stored login, without its end, and for a new one.
    fn wrong(&self, allowed: Option<LoginKind>, ids: bool, mfa: bool) -> Option<(String, String)> {
        let is_personal = matches!(self.login, Login::Personal(_));
        let pair = |stored: &str, new: &str| Some((stored.to_owned(), new.to_owned()));
        match (allowed, self.is_key, is_personal) {
            (Some(LoginKind::ChatGpt), true, _) => {
                return pair(
                    "ChatGPT login is required, but an API key is currently being used.",
                    "API key login is disabled. Use ChatGPT login instead.",
                );
            }
            (Some(LoginKind::ApiKey), false, false) => {
                return pair(
                    "API key login is required, but ChatGPT is currently being used.",
                    "ChatGPT login is disabled. Use API key login instead.",
                );
            }
            (Some(LoginKind::ApiKey), false, true) => {
                return pair(
                    "API key login is required, but ChatGPT is currently being used.",
                    "Access token login is disabled. Use API key login instead.",
                );
            }
            _ => {}
        }
        match self.workspace {
            Some(Some("acct-1")) if ids => {
                return pair(
                    "Login is restricted to workspace(s) a, b, but current credentials belong to acct-1.",
                    "Login is restricted to workspace id(s) a, b.",
                );
            }
            Some(None) if ids => {
                return pair(
                    "Login is restricted to workspace(s) a, b, but current credentials lack a workspace identifier.",
                    "Login is restricted to workspace id(s) a, b, but the token did not include an chatgpt_account_id claim.",
                );
            }
            _ => {}
        }
        let sentence = match self.mfa {
            _ if !mfa || self.is_key => return None,
            Some(true) => return None,
            Some(false) => {
                "A second factor is required by /etc/valetkey/managed.toml, but this account was \
                 signed in without a second factor."
            }
            None if is_personal => {
                "A second factor is required by /etc/valetkey/managed.toml, but an access token \
                 does not say whether a second factor was used."
            }
            None => {
                "A second factor is required by /etc/valetkey/managed.toml, but the id token does \
                 not say whether a second factor was used."
            }
        };
        pair(sentence, sentence)
    }
}

#[test]
fn every_combination() {
    let mut cases = vec![Case { login: api_key(), is_key: true, workspace: None, mfa: None }];
    for workspace in [Some("a"), Some("acct-1"), None] {
        for mfa in [Some(true), Some(false), None] {
            let login = chatgpt(workspace, mfa);
            cases.push(Case { login, is_key: false, workspace: Some(workspace), mfa });
        }
        let login = personal(Some(workspace));
        cases.push(Case { login, is_key: false, workspace: Some(workspace), mfa: None });
    }
    let asks = every_ask();
    assert_eq!((cases.len(), asks.len()), (13, 4 * 3 * 2 * 2));
    for (case, ask) in cases.iter().flat_map(|case| asks.iter().map(move |ask| (case, ask))) {
        let wrong = case.wrong(ask.allowed, ask.ids, ask.mfa);
        let stored = wrong.as_ref().map(|(stored, _)| ask.violation(stored));
        let mut limits = ask.limits();
        for _ in 0..2 {
            let policy = Policy::new(limits.clone());
            assert_eq!(policy.judge(&case.login).err(), stored, "{limits:?}");
            let new = policy.judge_new(&case.login).err();
            assert_eq!(new, wrong.as_ref().map(|(_, new)| new.clone()), "{limits:?}");
            // Their order means nothing.
            limits.reverse();
        }
    }
}

/// What one layer asks; nothing at all where it is silent.
struct Ask {
    level: Level,
    place: &'static str,
    allowed: Option<LoginKind>,
    ids: bool,
    mfa: bool,
}

fn every_ask() -> Vec<Ask> {
    let layers = [
        (Level::Forced, OURS),
        (Level::Forced, CODEX),
        (Level::Required, REQUIREMENTS),
        (Level::Required, MANAGED),
    ];
    let mut asks = Vec::new();
    for (level, place) in layers {
        for allowed in [None, Some(LoginKind::ChatGpt), Some(LoginKind::ApiKey)] {
            let of = |(ids, mfa)| Ask { level, place, allowed, ids, mfa };
            asks.extend([(false, false), (false, true), (true, false), (true, true)].map(of));
        }
    }
    asks
}

impl Ask {
    fn limits(&self) -> Vec<Limit> {
        let method = self.allowed.map(|kind| methods(self.level, &[kind], self.place));
        let ids = self.ids.then(|| workspaces(self.level, &["a", "b"], self.place));
        [self.mfa.then(second_factor), ids, method].into_iter().flatten().collect()
    }

    /// A second factor is never more than required.
    fn violation(&self, stored: &str) -> Violation {
        let deletes = self.level == Level::Forced && !stored.starts_with("A second factor");
        let end = if deletes { " Logging out." } else { "" };
        Violation { sentence: format!("{stored}{end}"), deletes }
    }
}

#[test]
fn who_may_begin() {
    let [key, browser, token] = [Method::ApiKey, Method::ChatGpt, Method::AccessToken];
    let disabled = |method: Method| Err(method.is_disabled().to_owned());
    for level in [Level::Forced, Level::Required] {
        let only_keys = Policy::new(vec![methods(level, &[LoginKind::ApiKey], CODEX)]);
        assert_eq!(only_keys.judge_method(key), Ok(()));
        assert_eq!(only_keys.judge_method(browser), disabled(browser));
        assert_eq!(only_keys.judge_method(token), disabled(token));
        let no_keys = Policy::new(vec![methods(level, &[LoginKind::ChatGpt], CODEX)]);
        assert_eq!(no_keys.judge_method(key), disabled(key));
        assert_eq!(no_keys.judge_method(browser), Ok(()));
        assert_eq!(no_keys.judge_method(token), Ok(()));
        let both = [LoginKind::ApiKey, LoginKind::ChatGpt];
        let both =
            Policy::new(vec![methods(level, &both, CODEX), workspaces(level, &["a"], CODEX)]);
        for method in [key, browser, token] {
            assert_eq!(both.judge_method(method), Ok(()));
        }
    }
}

#[test]
fn what_deletes_comes_first() {
    let policy = Policy::new(vec![
        methods(Level::Required, &[LoginKind::ApiKey], REQUIREMENTS),
        workspaces(Level::Forced, &["ws-9"], CODEX),
    ]);
    let violation = policy.judge(&chatgpt(Some("acct-1"), None)).unwrap_err();
    assert!(violation.deletes);
    assert_eq!(
        violation.sentence,
        "Login is restricted to workspace(s) ws-9, but current credentials belong to acct-1. Logging out."
    );
    let violation = policy.judge(&chatgpt(Some("ws-9"), None)).unwrap_err();
    assert!(!violation.deletes);
    assert_eq!(
        violation.sentence,
        "API key login is required, but ChatGPT is currently being used."
    );
    let new = policy.judge_new(&chatgpt(Some("acct-1"), None));
    assert_eq!(new, Err("ChatGPT login is disabled. Use API key login instead.".to_owned()));
}

#[test]
fn limits_narrow_each_other() {
    let policy = Policy::new(vec![
        workspaces(Level::Forced, &["a", "b", "c"], OURS),
        workspaces(Level::Required, &["c", "d", "b"], REQUIREMENTS),
    ]);
    assert_eq!(policy.workspaces(), Some(vec!["b", "c"]));
    assert_eq!(policy.judge(&chatgpt(Some("b"), None)), Ok(()));
    let table = [("a", false), ("d", true), ("e", true)];
    for (id, deletes) in table {
        let violation = policy.judge(&chatgpt(Some(id), None)).unwrap_err();
        assert_eq!(violation.deletes, deletes, "{id}");
        assert!(violation.sentence.contains("workspace(s) b, c, but"), "{violation}");
    }
    assert_eq!(Policy::default().workspaces(), None);
}

#[test]
fn limits_that_leave_nothing_name_their_places() {
    let apart = Policy::new(vec![
        methods(Level::Forced, &[LoginKind::ChatGpt], OURS),
        methods(Level::Forced, &[LoginKind::ChatGpt], CODEX),
        methods(Level::Required, &[LoginKind::ApiKey], REQUIREMENTS),
    ]);
    let sentence =
        format!("No login method is allowed: {OURS} and {REQUIREMENTS} have none in common.");
    for method in [Method::ApiKey, Method::ChatGpt, Method::AccessToken] {
        assert_eq!(apart.judge_method(method), Err(sentence.clone()));
    }
    assert_eq!(apart.judge_new(&api_key()), Err(sentence.clone()));
    let stored = apart.judge(&chatgpt(Some("a"), None)).unwrap_err();
    assert_eq!(stored, Violation { sentence: sentence.clone(), deletes: false });
    let stored = apart.judge(&api_key()).unwrap_err();
    assert_eq!(
        stored,
        Violation { sentence, deletes: false },
        "a mistake in a file costs no login"
    );

    let none = Policy::new(vec![methods(Level::Required, &[], REQUIREMENTS)]);
    let sentence = format!("No login method is allowed by {REQUIREMENTS}.");
    assert_eq!(none.judge_method(Method::ChatGpt), Err(sentence));

    let apart = Policy::new(vec![
        workspaces(Level::Forced, &["a", "b"], OURS),
        workspaces(Level::Forced, &["b", "c"], CODEX),
        workspaces(Level::Required, &["a", "c"], MANAGED),
    ]);
    let sentence =
        format!("No workspace is allowed: {OURS} and {CODEX} and {MANAGED} have none in common.");
    assert_eq!(apart.judge_method(Method::ChatGpt), Err(sentence.clone()));
    assert_eq!(apart.judge(&chatgpt(Some("b"), None)).unwrap_err().sentence, sentence);
    assert_eq!(apart.judge(&api_key()), Ok(()));
    assert_eq!(apart.judge_method(Method::ApiKey), Ok(()));
}

#[test]
fn the_workspace_that_requests_name_counts_too() {
    let policy = Policy::new(vec![workspaces(Level::Required, &["a", "b"], MANAGED)]);
    let of = |claim: &str, named: &str| match chatgpt(Some(claim), None) {
        Login::ChatGpt(set) => {
            policy.judge(&Login::ChatGpt(TokenSet { account_id: Some(named.to_owned()), ..set }))
        }
        _ => unreachable!(),
    };
    assert_eq!((of("a", "a"), of("a", "b")), (Ok(()), Ok(())));
    assert!(of("c", "a").is_err());
    let error = of("a", "c").unwrap_err();
    assert!(error.sentence.ends_with("belong to a and name c."), "{error}");
}

#[test]
fn a_personal_token_is_judged_by_what_is_known() {
    let policy = Policy::new(vec![workspaces(Level::Forced, &["a"], OURS)]);
    assert_eq!(policy.judge(&personal(None)), Ok(()), "nobody knows yet");
    assert!(policy.judge(&personal(Some(Some("b")))).is_err());
    let policy = Policy::new(vec![methods(Level::Forced, &[LoginKind::ApiKey], OURS)]);
    assert!(policy.judge(&personal(None)).unwrap_err().deletes);
}

#[test]
fn other_logins_are_nobodys_business() {
    let policy = Policy::new(vec![
        methods(Level::Forced, &[], OURS),
        workspaces(Level::Forced, &[], OURS),
        second_factor(),
    ]);
    for login in [Login::OAuth(tokens(None, None)), Login::Unsupported("an agent".to_owned())] {
        assert_eq!((policy.judge(&login), policy.judge_new(&login)), (Ok(()), Ok(())));
    }
}

#[test]
fn limits_as_files_say_them() {
    let both = [LoginKind::ApiKey, LoginKind::ChatGpt];
    let table = [
        (methods(Level::Forced, &[LoginKind::ApiKey], OURS), r#"forced_login_method = "api""#),
        (methods(Level::Required, &both, OURS), r#"allowed_login_methods = ["api", "chatgpt"]"#),
        (workspaces(Level::Forced, &["a"], OURS), r#"forced_chatgpt_workspace_id = "a""#),
        (
            workspaces(Level::Forced, &["a", "b"], OURS),
            r#"forced_chatgpt_workspace_id = ["a", "b"]"#,
        ),
        (workspaces(Level::Required, &["a"], OURS), r#"allowed_chatgpt_workspaces = ["a"]"#),
        (second_factor(), "require_mfa = true"),
    ];
    for (limit, expected) in table {
        assert_eq!(limit.to_string(), expected);
    }
}
