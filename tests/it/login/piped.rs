//! Signing in with a secret from standard input, and what is said of one that is of no use.

use std::path::Path;

use super::{Home, Running, assert_signed_in, signed_in};

const KEY: &str = "sk-vk-canary-0123456789-abcde";
const WITH_KEY: &[&str] = &["login", "--with-api-key"];
const WITH_TOKEN: &[&str] = &["login", "--with-access-token"];

impl Home {
    /// A home in which the API takes [`KEY`].
    async fn of_key() -> Self {
        let mut home = Self::new().await;
        home.secrets.push(KEY.to_owned());
        home.world.api().accept(valetkey::secret::Secret::new(KEY));
        home
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_saved_and_not_tried() {
    let home = Home::of_key().await;
    let done = home.piped(WITH_KEY, format!("  {KEY}\r\n").as_bytes()).await.succeeded();
    let words = done.words();
    assert!(words.contains("Reading API key from stdin...\n"), "{words}");
    let saved = "API key saved. Authentication is checked when you send a request.\n";
    assert!(words.contains(saved), "{words}");
    let expected = serde_json::json!({ "auth_mode": "apikey", "OPENAI_API_KEY": KEY });
    assert_eq!(home.cached(), Some(expected));
    assert!(home.issuer().seen().is_empty() && home.world.company().connects().is_empty());

    let status = home.run(&["login", "status"]).await.succeeded();
    assert!(status.out.starts_with("API key configured - sk-vk-ca***abcde\n"), "{}", status.out);
    let server = home.serve().await;
    let answer = server.ask_at("api.openai.com", "/v1/models").await;
    assert_eq!(signed_in(&answer), ("present and current".to_owned(), None));
    server.stop().await;

    let logout = home.run(&["logout"]).await.succeeded();
    let words = logout.words();
    assert!(words.contains("works until it is revoked where it was made"), "{words}");
    assert_eq!((home.cache(), home.issuer().revokes()), (None, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_personal_token_is_asked_about_once() {
    let home = Home::new().await;
    let token = home.issuer().personal_token("acct-pat");
    let line = format!("{}\n", token.expose());
    let done = home.piped(WITH_TOKEN, line.as_bytes()).await.succeeded();
    let words = done.words();
    assert!(words.contains("Reading access token from stdin...\n"), "{words}");
    assert!(words.contains("Successfully logged in\n"), "{words}");
    assert!(words.contains("acct-pat@example.com, workspace acct-pat"), "{words}");
    let cached = home.cached().unwrap();
    assert_eq!(cached["personal_access_token"], token.expose());
    assert!(cached.get("auth_mode").is_none(), "Codex writes none");
    assert_eq!(home.issuer().whoamis(), 1);

    let status = home.run(&["login", "status"]).await.succeeded();
    assert!(status.out.contains("personal access token - "), "{}", status.out);
    for _ in 0..2 {
        let server = home.serve().await;
        assert_signed_in(&server.ask().await, "acct-pat");
        assert_signed_in(&server.ask().await, "acct-pat");
        server.stop().await;
    }
    assert_eq!(home.issuer().whoamis(), 1, "a second process asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_run_is_signed_in_by_a_personal_token() {
    let curl = Path::new("/usr/bin/curl");
    if !curl.exists() {
        println!("skipped: there is no {}", curl.display());
        return;
    }
    let home = Home::new().await;
    let token = home.issuer().personal_token("acct-pat");
    home.piped(WITH_TOKEN, token.expose().as_bytes()).await.succeeded();
    let url = "https://chatgpt.com/backend-api/codex/models";
    let done = home.run(&["run", "--", curl.to_str().unwrap(), "-sS", "--fail", url]).await;
    let body: serde_json::Value = serde_json::from_str(&done.succeeded().out).unwrap();
    assert_eq!(body["authorization"], "present and current");
    assert_eq!(body["account"], "acct-pat");
    assert_eq!(home.issuer().whoamis(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_secret_is_not_saved() {
    let long = "x".repeat(20_000);
    let longer = format!("at-{}", "x".repeat(100_000));
    let usual = "pipe it: printenv";
    type Row<'a> = (&'a [&'a str], &'a [u8], &'a str, &'a str);
    let table: [Row<'_>; 12] = [
        (WITH_KEY, b"", "no API key provided via stdin", usual),
        (WITH_KEY, b" \r\n\n", "no API key provided via stdin", usual),
        (WITH_KEY, b"\xff\xfe\x00", "this is no API key: it is not text", usual),
        (WITH_KEY, b"sk-a\x1b[2Jb", "this is no API key", usual),
        (WITH_KEY, b"sk-one\nsk-two", "this is no API key", usual),
        (WITH_KEY, long.as_bytes(), "this is no API key", usual),
        (WITH_TOKEN, b"", "no access token provided via stdin", usual),
        (WITH_TOKEN, b"at-\0", "this is no access token", usual),
        (WITH_TOKEN, longer.as_bytes(), "this is no access token", usual),
        (WITH_TOKEN, b"sk-1", "this looks like an API key", "login --with-api-key"),
        (WITH_TOKEN, b"eyJh.eyJh.s", "which starts with `at-`", "agent identity"),
        (WITH_TOKEN, b"at-unknown", "does not accept this access token", "make a new one"),
    ];
    let home = Home::new().await;
    home.signed_in();
    let before = home.cache();
    for (arguments, input, sentence, hint) in table {
        home.piped(arguments, input).await.failed(1, sentence, hint);
        assert_eq!(home.cache(), before, "{sentence}");
    }
    assert_eq!((home.issuer().whoamis(), home.issuer().revokes()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_told_what_to_pipe() {
    let script = Path::new("/usr/bin/script");
    if !script.exists() {
        println!("skipped: there is no {} to make a terminal", script.display());
        return;
    }
    let home = Home::new().await;
    let table = [
        (WITH_KEY, "--with-api-key expects the API key on stdin", "printenv OPENAI_API_KEY |"),
        (WITH_TOKEN, "--with-access-token expects the access token", "CODEX_ACCESS_TOKEN |"),
    ];
    for (arguments, sentence, hint) in table {
        let typed = format!("{} {}", env!("CARGO_BIN_EXE_valetkey"), arguments.join(" "));
        let command = home.command(script.to_str().unwrap(), &["-qec", &typed, "/dev/null"]);
        let mut running = Running::new(&home, command);
        // A terminal that is left is not what is tested.
        let stdin = running.stdin.take();
        let done = running.end().await;
        drop(stdin);
        assert_eq!(done.status, 1, "{}", done.out);
        assert!(done.out.contains(sentence) && done.out.contains(hint), "{}", done.out);
    }
    assert_eq!(home.cache(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_never_an_argument() {
    let home = Home::new().await;
    for arguments in
        [&["login", "--with-api-key", "sk-1"][..], &["login", "--with-access-token=at-1"]]
    {
        let done = home.run(arguments).await;
        assert_eq!((done.status, home.cache()), (2, None), "{}", done.words());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_the_wrong_ca_a_token_is_not_saved() {
    let home = Home::new().await.distrusting();
    home.signed_in();
    let before = home.cache();
    let token = home.issuer().personal_token("acct-pat");
    let done = home.piped(WITH_TOKEN, token.expose().as_bytes()).await;
    done.failed(1, "the upstream's certificate was not accepted", "append its certificate as PEM");
    assert_eq!((home.cache(), home.issuer().whoamis()), (before, 0));
    assert!(home.issuer().seen().is_empty());
}
