//! Logins at any other issuer: codes, device codes, clients that sign in by themselves; refreshed, kept and revoked.

use std::os::unix::fs::PermissionsExt as _;

use http::Response;
use serde_json::{Value, json};
use valetkey::sandbox::{Fault, OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET, Settings};

use super::web::{agree, follow, sign_in};
use super::{Done, Home, Server, signed_in};
use crate::support::refusal;

const BROWSER: &[&str] = &["login", "--no-browser", "--credential", "example"];
const DEVICE: &[&str] = &["login", "--device-auth", "--credential", "example"];
const STATUS: &[&str] = &["login", "status", "--credential", "example"];
const LOGOUT: &[&str] = &["logout", "--credential", "example"];
const KEPT: &str = "data/valetkey/credentials/example.json";

impl Home {
    /// A home with a credential `example` at the issuer, for one host.
    async fn of_oauth(more: &str) -> Self {
        Self::of_oauth_in(Settings::default(), more).await
    }

    async fn of_oauth_in(settings: Settings, more: &str) -> Self {
        let mut home = Self::with(settings).await;
        let data = home.path("data").to_str().unwrap().to_owned();
        home.set("XDG_DATA_HOME", data);
        home.write(".config/valetkey/client.secret", OAUTH_CLIENT_SECRET);
        home.configure(&format!(
            "[credentials.example]\nkind = \"oauth\"\nissuer = \"https://login.example.com\"\n\
             client_id = \"{OAUTH_CLIENT_ID}\"\ncredentials_store = \"file\"\n{more}\
             [[rules]]\nhost = \"api.example.com\"\npaths = [\"/v1/\"]\ncredential = \"example\"\n"
        ));
        home
    }

    fn kept(&self) -> Option<String> {
        std::fs::read_to_string(self.path(KEPT)).ok()
    }

    /// Signs in with a browser.
    async fn signed_in_at_example(&self) -> Done {
        sign_in(self, BROWSER).await.0.succeeded()
    }
}

impl Server<'_> {
    async fn ask_example(&self) -> Response<bytes::Bytes> {
        self.ask_at("api.example.com", "/v1/things").await
    }

    async fn assert_signed_in_at_example(&self) {
        let expected = ("present and current".to_owned(), None);
        assert_eq!(signed_in(&self.ask_example().await), expected);
    }
}

const SECRET: &str = "client_secret = \"file:client.secret\"\n";
const SCOPES: &str =
    "scopes = [\"read\", \"offline_access\"]\naudience = \"https://api.example.com\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_with_a_code() {
    for (client, proves) in [("", false), (SECRET, true)] {
        let home = Home::of_oauth(&format!("{client}{SCOPES}")).await;
        let (done, page) = sign_in(&home, BROWSER).await;
        done.succeeded();
        assert!(page.body.contains("You are signed in to example."), "{}", page.body);
        let asked = home.issuer().last_request("/authorize");
        let redirect = asked["redirect_uri"].as_str();
        assert!(redirect.starts_with("http://127.0.0.1:"), "{redirect}");
        assert!(!redirect.contains(":1455/"), "{redirect}");
        assert_eq!(
            (asked["scope"].as_str(), asked["audience"].as_str()),
            ("read offline_access", "https://api.example.com")
        );
        assert!(!asked.contains_key("originator"), "{asked:?}");
        let redeemed = home.issuer().last_request("/token");
        assert_eq!(redeemed["grant_type"], "authorization_code");
        assert_eq!(redeemed["redirect_uri"], redirect);
        // A secret is proof enough (RFC 6749 section 2.3.1).
        assert_eq!(redeemed.contains_key("client_id"), !proves);
        assert_eq!(home.issuer().posts(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_login_outlives_the_command() {
    let home = Home::of_oauth(SECRET).await;
    let words = home.signed_in_at_example().await.words();
    assert!(words.contains(KEPT), "{words}");
    let mode = home.path(KEPT).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = home.run(STATUS).await.succeeded();
    assert!(status.out.starts_with("Logged in using OAuth\n"), "{}", status.out);
    assert!(status.out.contains(KEPT) && status.out.contains("expires"), "{}", status.out);

    let server = home.serve().await;
    server.assert_signed_in_at_example().await;
    server.stop().await;
    assert_eq!((home.cache(), home.world.connections()), (None, 1), "1 is the browser");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_that_is_typed_elsewhere_signs_in() {
    let home = Home::of_oauth("grant = \"device_code\"\n").await;
    home.issuer().slow_down();
    let mut login = home.start(&["login", "--credential", "example"]);
    login.line(|line| line.contains("https://login.example.com/activate")).await;
    home.issuer().wait_for_polls(1).await;
    home.issuer().approve_device();
    login.end().await.succeeded();
    let polls = home.issuer().polls();
    // RFC 8628 section 3.5: five seconds more, for every question to come.
    let apart = polls[1] - polls[0];
    assert!(polls.len() == 2 && apart.as_secs_f64() > 5.8, "{apart:?}");
    home.run(STATUS).await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_refused() {
    let home = Home::of_oauth("").await;
    let mut login = home.start(DEVICE);
    login.line(|line| line.contains("/activate")).await;
    home.issuer().deny_device();
    login.end().await.failed(1, "the issuer refused: access_denied", "allow it");
    assert_eq!(home.kept(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_signs_in_by_itself() {
    let more = format!("grant = \"client_credentials\"\n{SECRET}{SCOPES}");
    let home = Home::of_oauth(&more).await;
    let server = home.serve().await;
    server.assert_signed_in_at_example().await;
    server.assert_signed_in_at_example().await;
    server.stop().await;
    assert_eq!((home.issuer().grants("client_credentials"), home.issuer().posts()), (1, 1));
    let asked = home.issuer().last_request("/token");
    assert_eq!(
        (asked["scope"].as_str(), asked["audience"].as_str()),
        ("read offline_access", "https://api.example.com")
    );
    assert_eq!(home.kept(), None, "it can be got again at no cost");
    let done = home.run(BROWSER).await;
    done.failed(1, "`example` signs in by itself", "there is nothing to do");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_refreshed_once_and_what_comes_is_kept() {
    let token_lifetime = time::Duration::seconds(2);
    let settings = Settings { token_lifetime, ..Settings::default() };
    let home = Home::of_oauth_in(settings, SECRET).await;
    home.signed_in_at_example().await;
    let before = home.kept();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let server = home.serve().await;
    let (first, second) = tokio::join!(server.ask_example(), server.ask_example());
    for answer in [first, second] {
        assert_eq!(signed_in(&answer).0, "present and current");
    }
    server.stop().await;
    let issuer = home.issuer();
    assert_eq!((issuer.grants("refresh_token"), issuer.refreshes(), issuer.reuses()), (1, 1, 0));
    assert_ne!(home.kept(), before, "the next refresh token was lost");
    home.run(LOGOUT).await.succeeded();
    assert_eq!(home.issuer().reuses(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn logging_out_revokes() {
    let home = Home::of_oauth("").await;
    home.signed_in_at_example().await;
    let server = home.serve().await;
    server.assert_signed_in_at_example().await;
    let words = home.run(LOGOUT).await.succeeded().words();
    assert!(words.contains("Successfully logged out"), "{words}");
    let asked = home.issuer().last_request("/revoke");
    let expected =
        [("client_id", OAUTH_CLIENT_ID), ("token", "***"), ("token_type_hint", "refresh_token")];
    assert_eq!(
        asked.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>(),
        expected
    );
    assert_eq!(refusal(&server.ask_example().await), (403, "login_required".to_owned()));
    server.stop().await;
    let status = home.run(STATUS).await;
    assert_eq!((status.status, status.out.lines().next()), (1, Some("Not logged in")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_login_revokes_the_one_that_was_there() {
    let home = Home::of_oauth("").await;
    home.signed_in_at_example().await;
    let server = home.serve().await;
    server.assert_signed_in_at_example().await;
    let words = home.signed_in_at_example().await.words();
    assert!(words.contains("It takes the place of the login that was there."), "{words}");
    assert_eq!(home.issuer().revokes(), 1);
    server.assert_signed_in_at_example().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_that_is_of_no_use() {
    let evil = json!("https://evil.example.com");
    let table: [(&str, Value, &[&str], &str); 5] = [
        ("issuer", evil, BROWSER, "its metadata is that of another issuer"),
        ("token_endpoint", Value::Null, BROWSER, "its metadata has no issuer or no token endpoint"),
        ("token_endpoint", json!("http://login.example.com/token"), BROWSER, "its token endpoint"),
        ("authorization_endpoint", Value::Null, BROWSER, "offers no sign-in in a browser"),
        ("device_authorization_endpoint", Value::Null, DEVICE, "the issuer offers no device codes"),
    ];
    for (name, value, arguments, sentence) in table {
        let home = Home::of_oauth("").await;
        home.issuer().metadata(name, value);
        home.run(arguments).await.failed(1, sentence, "");
        assert_eq!((home.kept(), home.issuer().posts()), (None, 0), "{sentence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_issuer_answers_the_code_is_redeemed_once() {
    let table = [
        (Fault::DropBefore, "the issuer could not be reached"),
        (Fault::DropAfter, "the issuer could not be reached"),
        (Fault::Garbage, "the issuer's answer cannot be used"),
        (Fault::RateLimited(7), "the issuer refused: rate_limit_exceeded"),
        (Fault::Refuse("invalid_grant"), "the issuer refused: invalid_grant"),
        (Fault::Status(500), "the issuer refused: server_error"),
    ];
    let home = Home::of_oauth(SECRET).await;
    for (round, (fault, sentence)) in table.into_iter().enumerate() {
        home.issuer().script(fault);
        let (done, page) = sign_in(&home, BROWSER).await;
        done.failed(1, sentence, "try again");
        assert!(page.body.contains("Not signed in"), "{}", page.body);
        assert_eq!((home.kept(), home.issuer().posts()), (None, round + 1), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_issuer_is_refused() {
    let home = Home::of_oauth("").await;
    let mut login = home.start(BROWSER);
    let redirect = agree(&home.world, &login.url().await).await;
    // RFC 9207 section 2.4.
    let page = follow(&format!("{redirect}&iss=https%3A%2F%2Fevil.example.com")).await;
    assert!(page.body.contains("it is from another issuer"), "{}", page.body);
    login.end().await.failed(1, "it is from another issuer", "try again");
    assert_eq!((home.kept(), home.issuer().posts()), (None, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_secret_that_cannot_be_read() {
    let home = Home::of_oauth("client_secret = \"file:no-such.secret\"\n").await;
    let (done, _) = sign_in(&home, BROWSER).await;
    done.failed(1, "the client secret cannot be read", "valetkey check");
    assert_eq!((home.kept(), home.issuer().posts()), (None, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_not_for_an_issuer() {
    let home = Home::of_oauth("").await;
    for flag in ["--with-api-key", "--with-access-token"] {
        let done = home.piped(&["login", flag, "--credential", "example"], b"at-1").await;
        done.failed(2, "`example` is a login at an OAuth issuer", "login --credential example");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_the_wrong_ca_nobody_signs_in() {
    let home = Home::of_oauth("").await.distrusting();
    for arguments in [BROWSER, DEVICE] {
        let done = home.run(arguments).await;
        done.failed(
            1,
            "the upstream's certificate was not accepted",
            "append its certificate as PEM",
        );
    }
    let home =
        Home::of_oauth(&format!("grant = \"client_credentials\"\n{SECRET}")).await.distrusting();
    let server = home.serve().await;
    assert_eq!(refusal(&server.ask_example().await), (503, "issuer_unavailable".to_owned()));
    server.stop().await;
    assert!(home.kept().is_none() && home.issuer().seen().is_empty());
}
