//! Who is signed in, and signing out: everywhere, at the issuer, and under a proxy that runs.

use std::fs;

use serde_json::Value;
use valetkey::sandbox::Person;

use super::{Home, assert_signed_in};
use crate::support::refusal;

const STATUS: &[&str] = &["login", "status"];
const WORK: &str = "[credentials.work]\nkind = \"codex\"\nhome = \"~/.codex-work\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn status_says_who_is_signed_in() {
    let home = Home::new().await;
    let nobody = home.run(STATUS).await;
    assert_eq!((nobody.status, nobody.out.lines().next()), (1, Some("Not logged in")));
    assert!(nobody.words().contains("hint: valetkey login"), "{}", nobody.words());

    let amr = Some(vec!["pwd".to_owned(), "mfa".to_owned()]);
    home.issuer().person(Person { amr, plan: "team".to_owned(), ..Person::of("acct-7") });
    home.signed_in();
    let place = home.path(".codex/auth.json").display().to_string();
    let said = home.run(STATUS).await.succeeded().out;
    for (name, value) in [
        ("account", "acct-7@example.com"),
        ("workspace", "acct-7"),
        ("plan", "team"),
        ("data rules", "those of the ChatGPT workspace"),
        ("second factor", "yes"),
        ("expires", "(in 60 minutes)"),
        ("refreshed", "ago)"),
        ("kept in", &place),
    ] {
        let line = said.lines().find(|line| line.trim_start().starts_with(name));
        assert!(line.is_some_and(|line| line.ends_with(value)), "{name}: {said}");
    }
    assert_eq!(said.lines().next(), Some("Logged in using ChatGPT"));
    let json: Value =
        serde_json::from_str(&home.run(&["login", "status", "--json"]).await.out).unwrap();
    assert_eq!(json["usable"], true, "{json}");
    for (name, value) in [("account_id", "acct-7"), ("email", "acct-7@example.com"), ("mfa", "yes")]
    {
        assert_eq!(json[name], value, "{json}");
    }
    assert!(home.issuer().seen().is_empty(), "whoever only looks asks nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_of_all_says_the_same() {
    let home = Home::new().await;
    home.configure(WORK);
    home.signed_in();
    let all = home.run(&["status"]).await;
    assert_eq!(all.status, 1, "one is missing: {}", all.out);
    assert!(all.out.contains("openai\n  Logged in using ChatGPT\n"), "{}", all.out);
    assert!(all.out.contains("work\n  Not logged in\n"), "{}", all.out);
    let json: Value = serde_json::from_str(&home.run(&["status", "--json"]).await.out).unwrap();
    let usable = |name: &str| json["credentials"][name]["usable"].as_bool();
    assert_eq!((usable("openai"), usable("work")), (Some(true), Some(false)));
    let none = home.run(&["login", "status", "--credential", "nobody"]).await;
    none.failed(2, "there is no credential `nobody`", "the configuration has: openai, work");
}

#[tokio::test(flavor = "multi_thread")]
async fn logging_out_ends_the_login_under_a_proxy_that_runs() {
    let home = Home::new().await;
    home.signed_in();
    let server = home.serve().await;
    assert_signed_in(&server.ask().await, "acct-sandbox");
    let words = home.run(&["logout"]).await.succeeded().words();
    assert!(words.contains("Successfully logged out\n"), "{words}");
    let refused = server.ask().await;
    assert_eq!(refusal(&refused), (403, "login_required".to_owned()));
    assert_eq!(home.cache(), None);
    assert_revoked_as_codex_does(&home);

    home.issuer().sign_in_as("acct-new");
    home.issuer().approve_device();
    home.run(&["login", "--device-auth"]).await.succeeded();
    assert_signed_in(&server.ask().await, "acct-new");
    assert_eq!(home.world.connections(), 0, "somebody went past the company's proxy");
    server.stop().await;
}

fn assert_revoked_as_codex_does(home: &Home) {
    let asked = home.issuer().last_request("/oauth/revoke");
    let asked: Vec<_> = asked.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let expected = [
        ("client_id", "app_EMoamEEZ73f0CkXaXp7hrann"),
        ("token", "***"),
        ("token_type_hint", "refresh_token"),
    ];
    assert_eq!(asked, expected);
    assert_eq!(home.issuer().revokes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_not_signed_in_is_signed_out() {
    let home = Home::new().await;
    let done = home.run(&["logout"]).await.succeeded();
    assert!(done.words().contains("Not logged in\n"), "{}", done.words());
    assert!(home.issuer().seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_cannot_be_told_keeps_nobody_signed_in() {
    let away = |home: &mut Home| home.set("HTTPS_PROXY", "http://127.0.0.1:1");
    let foreign = |home: &mut Home| {
        let other = home.world.ca_file().to_str().unwrap().to_owned();
        home.set("CODEX_CA_CERTIFICATE", other);
    };
    type Trouble<'a> = (&'a dyn Fn(&mut Home), &'a str);
    let table: [Trouble<'_>; 2] = [
        (&away, "the upstream proxy could not be reached"),
        (&foreign, "the upstream's certificate was not accepted"),
    ];
    for (trouble, reason) in table {
        let mut home = Home::new().await;
        home.signed_in();
        trouble(&mut home);
        let words = home.run(&["logout"]).await.succeeded().words();
        assert!(words.contains("warning: the issuer could not be told"), "{words}");
        assert!(words.contains(reason) && words.contains("Successfully logged out"), "{words}");
        assert_eq!((home.cache(), home.issuer().revokes()), (None, 0));
        assert!(home.issuer().seen().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_logins_are_apart() {
    let home = Home::new().await;
    home.configure(WORK);
    home.signed_in();
    let usual = home.cache();
    home.issuer().sign_in_as("acct-work");
    home.issuer().approve_device();
    let login = ["login", "--device-auth", "--credential", "work"];
    let words = home.run(&login).await.succeeded().words();
    assert!(words.contains(".codex-work/auth.json"), "{words}");
    assert_eq!((home.cache(), home.issuer().revokes()), (usual.clone(), 0));
    let status = home.run(&["login", "status", "--credential", "work"]).await.succeeded();
    assert!(status.out.contains("acct-work"), "{}", status.out);

    home.run(&["logout", "--credential", "work"]).await.succeeded();
    assert_eq!((home.cache(), home.issuer().revokes()), (usual, 1));
    assert!(!home.path(".codex-work/auth.json").exists());
    let none = home.run(&["logout", "--credential", "nobody"]).await;
    none.failed(2, "there is no credential `nobody`", "openai, work");
}

#[tokio::test(flavor = "multi_thread")]
async fn logging_out_of_all() {
    let home = Home::new().await;
    let more = format!(
        "{WORK}[credentials.empty]\nkind = \"codex\"\nhome = \"~/.codex-empty\"\n\
         [credentials.key]\nkind = \"api_key\"\nsource = \"env:SOME_KEY\"\n"
    );
    home.configure(&more);
    home.signed_in();
    fs::create_dir(home.path(".codex-work")).unwrap();
    home.issuer().write_auth_json(&home.path(".codex-work"), time::Duration::hours(1)).unwrap();
    let words = home.run(&["logout", "--all"]).await.succeeded().words();
    for line in [
        "openai: Successfully logged out\n",
        "work: Successfully logged out\n",
        "empty: Not logged in\n",
    ] {
        assert!(words.contains(line), "{line}: {words}");
    }
    assert_eq!((home.cache(), home.issuer().revokes()), (None, 2));
    assert!(!home.path(".codex-work/auth.json").exists());
    let both = home.run(&["logout", "--all", "--credential", "work"]).await;
    assert_eq!(both.status, 2, "{}", both.words());
    let key = home.run(&["logout", "--credential", "key"]).await;
    key.failed(
        1,
        "`key` is read from env:SOME_KEY, and not saved",
        "unset SOME_KEY where valetkey",
    );
}
