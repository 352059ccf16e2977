//! What a company allows: when somebody signs in, when a proxy starts, and while it runs.

use serde_json::Value;
use valetkey::sandbox::Issuer;

use super::{Home, Server, assert_signed_in};
use crate::support::refusal;

const KEY: &str = "sk-vk-canary-0123456789-abcde";
const SERVE: &[&str] = &["serve", "--listen", "127.0.0.1:0"];
const RUN: &[&str] = &["run", "--", "true"];

/// Another credential, without which there is nothing to go on with.
const OTHER: &str = "[credentials.other]\nkind = \"api_key\"\nsource = \"file:other.key\"\n";

/// A stored login that is not allowed.
struct Violation {
    /// What the company asks.
    asks: &'static str,
    is_key: bool,
    sentence: &'static str,
}

const VIOLATIONS: [Violation; 3] = [
    Violation {
        asks: "forced_login_method = \"api\"\n",
        is_key: false,
        sentence: "API key login is required, but ChatGPT is currently being used.",
    },
    Violation {
        asks: "forced_login_method = \"chatgpt\"\n",
        is_key: true,
        sentence: "ChatGPT login is required, but an API key is currently being used.",
    },
    Violation {
        asks: "forced_chatgpt_workspace_id = [\"ws-9\", \"ws-10\"]\n",
        is_key: false,
        sentence: "Login is restricted to workspace(s) ws-9, ws-10, but current credentials belong to acct-sandbox.",
    },
];

impl Violation {
    /// A home with this login, and with what is asked in one of the two files.
    async fn home(&self, is_in_codexs_file: bool, more: &str) -> Home {
        let mut home = Home::new().await;
        home.secrets.push(KEY.to_owned());
        home.write(".config/valetkey/other.key", "vk-canary-other");
        if is_in_codexs_file {
            home.write(".codex/config.toml", self.asks);
            home.configure(more);
        } else {
            home.configure(&format!("{}{more}", self.asks));
        }
        self.sign_in(&home);
        home
    }

    fn sign_in(&self, home: &Home) {
        if self.is_key {
            home.write(".codex/auth.json", &key_json());
        } else {
            home.signed_in();
        }
    }
}

fn key_json() -> String {
    serde_json::json!({ "auth_mode": "apikey", "OPENAI_API_KEY": KEY }).to_string()
}

fn heard_nothing(issuer: &Issuer) -> bool {
    issuer.seen().is_empty() && issuer.revokes() == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_login_that_is_not_allowed_ends_the_start() {
    for violation in &VIOLATIONS {
        for (in_codexs_file, command) in [(false, SERVE), (true, SERVE), (false, RUN), (true, RUN)]
        {
            let home = violation.home(in_codexs_file, "").await;
            let done = home.run(command).await;
            let sentence = format!("{} Logging out.", violation.sentence);
            done.failed(1, &sentence, "valetkey check --managed");
            assert_eq!(home.cache(), None, "{sentence}");
            assert!(heard_nothing(home.issuer()), "{sentence}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_credential_it_goes_on() {
    for violation in &VIOLATIONS {
        let home = violation.home(true, OTHER).await;
        let done = home.run(RUN).await.succeeded();
        let sentence = format!("warning: {} Logging out.", violation.sentence);
        assert!(done.words().contains(&sentence), "{sentence}: {}", done.words());
        assert_eq!(home.cache(), None, "{sentence}");
        assert!(heard_nothing(home.issuer()), "{sentence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_only_looks_deletes_nothing() {
    for violation in &VIOLATIONS {
        let home = violation.home(true, "").await;
        let before = home.cache();
        for arguments in [&["login", "status"][..], &["status"]] {
            let done = home.run(arguments).await;
            assert_eq!(done.status, 1, "{}", done.out);
            assert!(done.out.contains("Not logged in\n"), "{}", done.out);
            assert!(done.out.contains(violation.sentence), "{}", done.out);
            assert!(!done.out.contains("Logging out"), "{}", done.out);
        }
        let json = home.run(&["login", "status", "--json"]).await;
        let json: Value = serde_json::from_str(&json.out).unwrap();
        assert_eq!(json["usable"], false, "{json}");
        assert_eq!(home.cache(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_to_sign_in_that_is_not_allowed_asks_nobody() {
    let only_key = "forced_login_method = \"api\"\n";
    let only_chatgpt = "forced_login_method = \"chatgpt\"\n";
    let table: [(&str, &[&str], &str); 4] = [
        (only_key, &["--no-browser"], "ChatGPT login is disabled. Use API key login instead."),
        (only_key, &["--device-auth"], "ChatGPT login is disabled. Use API key login instead."),
        (
            only_key,
            &["--with-access-token"],
            "Access token login is disabled. Use API key login instead.",
        ),
        (
            only_chatgpt,
            &["--with-api-key"],
            "API key login is disabled. Use ChatGPT login instead.",
        ),
    ];
    for (asks, arguments, sentence) in table {
        let home = Home::new().await;
        home.configure(asks);
        let done = home.run(&[&["login"], arguments].concat()).await;
        assert_eq!(done.status, 1, "{}", done.words());
        assert!(done.words().contains(&format!("error: {sentence}\n")), "{}", done.words());
        assert!(home.cache().is_none() && heard_nothing(home.issuer()), "{sentence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_personal_token_of_the_wrong_workspace_is_not_saved() {
    let home = Home::new().await;
    home.write(".codex/config.toml", "forced_chatgpt_workspace_id = \"ws-9\"\n");
    for (workspace, status) in [("ws-1", 1), ("ws-9", 0)] {
        let token = home.issuer().personal_token(workspace);
        let done = home.piped(&["login", "--with-access-token"], token.expose().as_bytes()).await;
        assert_eq!(done.status, status, "{}", done.words());
        let said = done.words().contains("error: Login is restricted to workspace id(s) ws-9.\n");
        assert_eq!((said, home.cache().is_some()), (status == 1, status == 0), "{workspace}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_becomes_forbidden_is_used_no_more() {
    let home = Home::new().await;
    home.configure(&format!("forced_chatgpt_workspace_id = \"acct-sandbox\"\n{OTHER}"));
    home.write(".config/valetkey/other.key", "vk-canary-other");
    home.signed_in();
    let mut server = home.serve().await;
    assert_signed_in(&server.ask().await, "acct-sandbox");

    home.write(".codex/auth.json", &other_workspace(&home));
    let sentence = "Login is restricted to workspace(s) acct-sandbox, but current credentials \
                    belong to ws-1. Logging out.";
    let line = server.running.line(|line| line.starts_with("error: ")).await;
    assert!(line.contains(sentence), "{line}");
    assert_eq!(refusal(&server.ask().await), (403, "policy_forbids".to_owned()));
    server.has_deleted_it().await;
    assert_eq!(home.cache(), None);
    assert!(heard_nothing(home.issuer()));

    // The process lives, and takes the next login that is allowed.
    home.signed_in();
    assert_signed_in(&server.ask().await, "acct-sandbox");
    server.stop().await;
}

fn other_workspace(home: &Home) -> String {
    home.issuer().login_as("ws-1", time::Duration::hours(1)).auth_json()
}

impl Server<'_> {
    /// Waits until the login is deleted, which happens behind the answers.
    async fn has_deleted_it(&mut self) {
        self.running.line(|line| line.contains("a login that is not allowed was deleted")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_wants_it_ends_with_the_login() {
    let home = Home::new().await;
    home.configure(
        "on_policy_violation = \"exit\"\nforced_chatgpt_workspace_id = \"acct-sandbox\"\n",
    );
    home.signed_in();
    let server = home.serve().await;
    assert_signed_in(&server.ask().await, "acct-sandbox");
    home.write(".codex/auth.json", &other_workspace(&home));
    let done = server.running.end().await;
    assert_eq!(done.status, 1, "{}", done.words());
    let sentence = "error: credential `openai`: Login is restricted to workspace(s) acct-sandbox";
    assert!(done.words().contains(sentence), "{}", done.words());
    assert_eq!(home.cache(), None);
    assert!(heard_nothing(home.issuer()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_comes_while_a_proxy_runs_holds() {
    let home = Home::new().await;
    home.signed_in();
    let mut server = home.serve().await;
    assert_signed_in(&server.ask().await, "acct-sandbox");
    home.write(".codex/config.toml", "forced_login_method = \"api\"\n");
    let line = server.running.line(|line| line.starts_with("error: ")).await;
    assert!(line.contains("API key login is required"), "{line}");
    assert_eq!(refusal(&server.ask().await), (403, "policy_forbids".to_owned()));
    server.has_deleted_it().await;
    assert_eq!(home.cache(), None);
    server.stop().await;
}
