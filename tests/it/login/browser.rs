//! Signing in with a browser: the URL, the way back, the page, the two ports, and every way to fail.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;
use tokio::net::TcpListener;
use valetkey::sandbox::{Consent, DeviceSetting, Fault, Person};

use super::web::{Page, Ports, agree, base, follow, get, get_with, is_open, sign_in, sign_in_to};
use super::{Home, assert_signed_in};

const LOGIN: &[&str] = &["login", "--no-browser"];

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_through_the_companys_proxy() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    home.issuer().person(Person { plan: "business".to_owned(), ..Person::of("acct-<7>") });
    let mut login = home.start(LOGIN);
    let url = login.url().await;
    let redirect = agree(&home.world, &url).await;
    let by_browser = home.world.connections();
    assert_is_codexs_request(&url);

    let page = follow(&redirect).await;
    let done = login.end().await.succeeded();
    assert!(done.words().contains("Successfully logged in\n"), "{}", done.words());
    assert_is_a_good_page(&page, &["acct-&lt;7&gt;@example.com", "acct-&lt;7&gt;", "business"]);
    assert!(!is_open(&base(&redirect)).await, "the port is still open");
    assert_is_codexs_cache(&home, "acct-<7>");

    let status = home.run(&["login", "status"]).await.succeeded();
    assert!(status.out.starts_with("Logged in using ChatGPT\n"), "{}", status.out);
    let logout = home.run(&["logout"]).await.succeeded();
    assert!(logout.words().contains("Successfully logged out"), "{}", logout.words());
    assert_eq!((home.cache(), home.issuer().revokes()), (None, 1));
    let status = home.run(&["login", "status"]).await;
    assert_eq!((status.status, status.out.lines().next()), (1, Some("Not logged in")));
    assert_eq!(home.world.connections(), by_browser, "somebody went past the company's proxy");
}

/// As Codex 0.169.0 asks, with the random parts of the right length, and with nothing else.
fn assert_is_codexs_request(url: &str) {
    let query = url.strip_prefix("https://auth.openai.com/oauth/authorize?").unwrap();
    let mut query: BTreeMap<_, _> =
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    for (random, length) in [("state", 43), ("code_challenge", 43)] {
        assert_eq!(query.remove(random).unwrap().len(), length, "{random}");
    }
    let expected = [
        ("client_id", "app_EMoamEEZ73f0CkXaXp7hrann"),
        ("code_challenge_method", "S256"),
        ("codex_cli_simplified_flow", "true"),
        ("id_token_add_organizations", "true"),
        ("originator", "codex_cli_rs"),
        ("redirect_uri", "http://127.0.0.1:1455/auth/callback"),
        ("response_type", "code"),
        ("scope", "openid profile email offline_access api.connectors.read api.connectors.invoke"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(query, BTreeMap::from(expected));
}

/// It says who signed in, holds no script, loads nothing, and is kept nowhere.
fn assert_is_a_good_page(page: &Page, facts: &[&str]) {
    assert_eq!(page.status, 200);
    for text in [&["Signed in", "close this tab"], facts].concat() {
        assert!(page.body.contains(text), "{text}: {}", page.body);
    }
    for text in ["<script", "http:", "https:", "eyJ", "url("] {
        assert!(!page.body.contains(text), "{text}: {}", page.body);
    }
    assert!(page.field("content-security-policy").unwrap().starts_with("default-src 'none'"));
    let private = [("cache-control", "no-store"), ("referrer-policy", "no-referrer")];
    for (name, value) in private {
        assert_eq!(page.field(name), Some(value), "{}", page.head);
    }
}

/// The members that Codex 0.169.0 writes, in a file for its owner alone.
fn assert_is_codexs_cache(home: &Home, account_id: &str) {
    let cached = home.cached().unwrap();
    let members = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(members(&cached), ["auth_mode", "OPENAI_API_KEY", "tokens", "last_refresh"]);
    assert_eq!(
        (&cached["auth_mode"], &cached["OPENAI_API_KEY"]),
        (&"chatgpt".into(), &Value::Null)
    );
    let tokens = &cached["tokens"];
    for name in ["id_token", "access_token", "refresh_token"] {
        let token = tokens[name].as_str().unwrap().to_owned();
        assert!(home.world.secrets().contains(&token), "{name}");
    }
    assert_eq!(tokens["account_id"], account_id);
    let mode = std::fs::metadata(home.path(".codex/auth.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_answer_to_this_attempt_counts() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    let mut login = home.start(LOGIN);
    let url = login.url().await;
    home.issuer().consent(Consent::WrongState);
    let wrong = agree(&home.world, &url).await;
    let right = agree(&home.world, &url).await;
    let base = base(&right);
    let refused = [
        (get(&wrong).await, 400, "State mismatch"),
        (get(&format!("{base}/auth/callback?code=c")).await, 400, "State mismatch"),
        (get(&format!("{base}/auth/callback?error=access_denied&state=x")).await, 400, "State"),
        (get_with(&right, "Host: evil.example:1455\r\n").await, 403, "Wrong host"),
        (get_with(&right, "").await, 403, "Wrong host"),
        (cancel_from(&base, "Sec-Fetch-Site: cross-site").await, 403, "Not from a page"),
        (cancel_from(&base, "Sec-Fetch-Site: same-site").await, 403, "Not from a page"),
        (cancel_from(&base, "Origin: https://evil.example").await, 403, "Not from a page"),
        (get(&format!("{base}/success?id_token=x")).await, 404, "Not found"),
    ];
    for (at, (page, status, text)) in refused.iter().enumerate() {
        assert!(page.status == *status && page.body.contains(text), "{at}: {page:?}");
        assert!(!page.body.contains("eyJ"), "{page:?}");
    }
    assert_eq!(home.issuer().posts(), 0);

    // By its other name, too; and then never again.
    let answer = get_with(&right, "Host: localhost:1455\r\n").await;
    assert_eq!(answer.status, 303, "{answer:?}");
    assert_eq!(get(&right).await.status, 400);
    let page = get(&format!("{base}{}", answer.field("location").unwrap())).await;
    assert!(page.body.contains("Signed in"), "{page:?}");
    login.end().await.succeeded();
    assert_eq!(home.issuer().posts(), 1);
}

async fn cancel_from(base: &str, field: &str) -> Page {
    let host = base.strip_prefix("http://").unwrap();
    get_with(&format!("{base}/cancel"), &format!("Host: {host}\r\n{field}\r\n")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_address_may_be_pasted() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    let mut login = home.start(LOGIN);
    let url = login.url().await;
    let redirect = agree(&home.world, &url).await;
    login.paste("").await;
    login.line(|line| line.contains("it has no state")).await;
    login.paste(&redirect.replace("state=", "state=x")).await;
    login.line(|line| line.contains("it belongs to another attempt")).await;
    login.paste(&format!("  {redirect}  ")).await;
    let done = login.end().await.succeeded();
    let words = done.words();
    assert_eq!(words.matches("hint: paste all of it").count(), 2, "{words}");
    assert!(words.contains("ssh -N -L 1455:127.0.0.1:1455"), "{words}");
    assert_is_codexs_cache(&home, "acct-sandbox");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_login_takes_the_port_of_the_first() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    let mut first = home.start(LOGIN);
    first.url().await;
    let mut second = home.start(LOGIN);
    let url = second.url().await;
    first.end().await.failed(1, "Login cancelled", "start again: valetkey login");
    assert!(url.contains("127.0.0.1%3A1455"), "{url}");
    follow(&agree(&home.world, &url).await).await;
    second.end().await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_not_given_up_is_left_alone() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    let _first = TcpListener::bind("127.0.0.1:1455").await.unwrap();
    let mut login = home.start(LOGIN);
    let url = login.url().await;
    assert!(url.contains("127.0.0.1%3A1457"), "{url}");
    let page = follow(&agree(&home.world, &url).await).await;
    assert_is_a_good_page(&page, &[]);
    login.end().await.succeeded();

    let _second = TcpListener::bind("127.0.0.1:1457").await.unwrap();
    let before = home.cache();
    let done = home.run(LOGIN).await;
    done.failed(1, "Port 127.0.0.1:1457 is already in use", "valetkey login --device-auth");
    assert_eq!(home.cache(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_signed_in_reads_the_same_twice() {
    let _ports = Ports::hold();
    let denied = |error, description| Consent::Deny { error, description };
    let table = [
        (denied("access_denied", "no"), "the issuer refused: access_denied (no)", "and allow it"),
        (
            denied("access_denied", "missing_codex_entitlement"),
            "Codex is not enabled for your workspace",
            "administrator",
        ),
        (denied("server_error", "<b>"), "the issuer refused: server_error (<b>)", "try again"),
        (Consent::NoCode, "missing_authorization_code", "try again"),
    ];
    for (consent, sentence, hint) in table {
        let home = Home::new().await;
        home.issuer().consent(consent);
        let (done, page) = sign_in(&home, LOGIN).await;
        done.failed(1, sentence, hint);
        assert_is_a_bad_page(&page, &[sentence, hint]);
        assert_eq!((home.cache(), home.issuer().posts()), (None, 0), "{sentence}");
    }
}

/// The sentence and the hint stand in it as text.
fn assert_is_a_bad_page(page: &Page, words: &[&str]) {
    let shown = page.body.to_lowercase();
    for words in [words, &["nothing was saved"]].concat() {
        let words = words.replace('<', "&lt;").replace('>', "&gt;").to_lowercase();
        assert!(shown.contains(&words), "{words}: {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_workspace_is_not_saved() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    home.configure("forced_chatgpt_workspace_id = [\"ws-9\", \"ws-10\"]\n");
    let (done, _) = sign_in(&home, LOGIN).await;
    done.succeeded();
    let asked = home.issuer().last_request("/oauth/authorize");
    assert_eq!(asked["allowed_workspace_id"], "ws-9,ws-10");
    assert_is_codexs_cache(&home, "ws-9");

    let before = home.cache();
    home.issuer().sign_in_as("ws-1");
    let sentence = "Login is restricted to workspace id(s) ws-9, ws-10.";
    let (done, page) = sign_in(&home, LOGIN).await;
    assert_eq!(done.status, 1);
    assert!(done.words().contains(&format!("error: {sentence}\n")), "{}", done.words());
    assert_is_a_bad_page(&page, &[sentence]);
    // What nobody keeps is given back.
    assert_eq!((home.cache(), home.issuer().revokes()), (before, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_issuer_answers_the_code_is_redeemed_once() {
    let _ports = Ports::hold();
    let table = [
        (Fault::DropBefore, "the issuer could not be reached"),
        (Fault::DropAfter, "the issuer could not be reached"),
        (Fault::Garbage, "the issuer's answer cannot be used"),
        (Fault::RateLimited(7), "the issuer refused: rate_limit_exceeded"),
        (Fault::Refuse("invalid_grant"), "the issuer refused: invalid_grant"),
        (Fault::Status(400), "the issuer refused: server_error"),
        (Fault::Status(403), "the issuer refused: server_error"),
        (Fault::Status(500), "the issuer refused: server_error"),
        (Fault::Status(503), "the issuer refused: server_error"),
    ];
    let home = Home::new().await;
    home.signed_in();
    let before = home.cache();
    for (round, (fault, sentence)) in table.into_iter().enumerate() {
        home.issuer().script(fault);
        let (done, page) = sign_in(&home, LOGIN).await;
        done.failed(1, sentence, "try again");
        let sentence = sentence.replace('\'', "&#39;");
        assert_is_a_bad_page(&page, &[&sentence]);
        assert_eq!(home.issuer().posts(), round + 1, "{fault:?}");
        assert_eq!((home.cache(), home.issuer().revokes()), (before.clone(), 0), "{fault:?}");
    }
    let (done, _) = sign_in(&home, LOGIN).await;
    done.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_login_takes_the_place_of_the_old_one_everywhere() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    home.signed_in();
    let server = home.serve().await;
    assert_signed_in(&server.ask().await, "acct-sandbox");
    home.issuer().sign_in_as("acct-new");
    let (done, _) = sign_in(&home, LOGIN).await;
    assert!(done.succeeded().words().contains("It takes the place of the login that was there."));
    let revocations = home.issuer().revocations();
    assert_eq!(revocations.len(), 1);
    assert_eq!(revocations[0].hint.as_deref(), Some("refresh_token"));
    assert!(revocations[0].client_id);
    assert_signed_in(&server.ask().await, "acct-new");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_arguments_and_environment_show_no_secret() {
    let _ports = Ports::hold();
    let home = Home::new().await;
    let mut login = home.start(LOGIN);
    let url = login.url().await;
    let pid = login.child.id().unwrap();
    let redirect = agree(&home.world, &url).await;
    login.paste(&redirect.replace("state=", "state=x")).await;
    login.line(|line| line.contains("another attempt")).await;
    let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let shown = [read("cmdline"), read("environ")].concat();
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(shown.contains("--no-browser"), "{shown}");
    assert_eq!(crate::leak::leak(&home.secrets(), &shown), None);
    follow(&redirect).await;
    login.end().await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_of_this_machine_is_opened() {
    let _ports = Ports::hold();
    let mut home = Home::new().await;
    let note = home.path("opened");
    let browser = home.write("browser", &format!("#!/bin/sh\necho \"$1\" > {}\n", note.display()));
    std::fs::set_permissions(&browser, std::fs::Permissions::from_mode(0o700)).unwrap();
    home.set("BROWSER", browser.to_str().unwrap());
    let login = home.start(&["login"]);
    let (done, page) = sign_in_to(&home, login).await;
    let words = done.succeeded().words();
    assert_is_a_good_page(&page, &[]);
    assert!(words.contains("Starting local login server on http://localhost:1455."), "{words}");
    assert!(words.contains("valetkey login --device-auth"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_without_device_codes_signs_in_with_a_browser_of_this_machine() {
    let _ports = Ports::hold();
    let mut home = Home::new().await;
    home.set("BROWSER", "true");
    home.issuer().device_login(DeviceSetting::Off);
    let (done, page) = sign_in(&home, &["login", "--device-auth"]).await;
    let words = done.succeeded().words();
    assert!(words.contains("error: device code login is not enabled"), "{words}");
    assert!(words.contains("Signing in with the browser of this machine instead."), "{words}");
    assert_is_a_good_page(&page, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_the_wrong_ca_nobody_signs_in() {
    let _ports = Ports::hold();
    let home = Home::new().await.distrusting();
    home.signed_in();
    let before = home.cache();
    let (done, page) = sign_in(&home, LOGIN).await;
    done.failed(1, "the upstream's certificate was not accepted", "append its certificate as PEM");
    assert_is_a_bad_page(&page, &["the issuer could not be reached"]);
    assert_eq!(home.cache(), before);
    assert_eq!((home.issuer().posts(), home.issuer().revokes()), (0, 0));
}
