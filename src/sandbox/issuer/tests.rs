//! Plays every way of signing in against the pretend issuer, with a plain client.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION};
use http::{Request, Response, StatusCode};
use serde_json::{Value, json};
use time::Duration;
use url::Url;
use url::form_urlencoded::Serializer;

use super::authorize::challenge_of;
use super::*;
use crate::sandbox::client::{self, Client, ClientBody, HTTP1, Visit, gather};
use crate::sandbox::{Settings, World};

const VERIFIER: &str = "a-verifier-of-the-least-length-0123456789-._~";
const CODEX_PLACE: &str = "http://127.0.0.1:1455/auth/callback";
const LOOPBACK_PLACE: &str = "http://127.0.0.1:49152/any/path?kept=1";
const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";

struct Play {
    client: Client,
    clock: Clock,
    world: World,
}

impl Play {
    async fn start() -> Self {
        let clock = Clock::system();
        let settings = Settings { clock: clock.clone(), ..Settings::default() };
        let world = World::start(settings).await.unwrap();
        let client = Client::straight_to(world.resolve()[0].1, world.ca_file()).unwrap();
        Self { client, clock, world }
    }

    fn issuer(&self) -> &Issuer {
        self.world.issuer()
    }

    async fn send(&self, host: &str, request: Request<ClientBody>) -> Response<Bytes> {
        let target = format!("{host}:443");
        let visit = Visit::to(&target, HTTP1);
        gather(self.client.send(visit, request).await.unwrap()).await.unwrap()
    }

    async fn get(&self, host: &str, path: &str) -> Response<Bytes> {
        self.send(host, client::get(path)).await
    }

    async fn post(&self, host: &str, path: &str, form: &[(&str, &str)]) -> (StatusCode, Value) {
        told(&self.send(host, form_request(path, form)).await)
    }

    async fn post_json(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let mut request = client::post(path, body.to_string());
        let kind = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, kind);
        told(&self.send(ISSUER_HOST, request).await)
    }

    /// Where the issuer sends the person.
    async fn sent_back(&self, host: &str, path: &str, query: &[(&str, &str)]) -> Url {
        let response = self.get(host, &format!("{path}?{}", encoded(query))).await;
        assert_eq!(response.status(), StatusCode::FOUND);
        Url::parse(response.headers()[LOCATION].to_str().unwrap()).unwrap()
    }

    async fn codex_code(&self, more: &[(&str, &str)]) -> String {
        let query = [codex_query().as_slice(), more].concat();
        let place = self.sent_back(ISSUER_HOST, "/oauth/authorize", &query).await;
        assert!(place.as_str().starts_with(CODEX_PLACE), "{place}");
        assert_eq!(parameter(&place, "state").as_deref(), Some(STATE));
        parameter(&place, "code").unwrap()
    }

    async fn redeem_codex(&self, code: &str, verifier: &str) -> (StatusCode, Value) {
        self.redeem_codex_at(code, verifier, CODEX_PLACE).await
    }

    async fn redeem_codex_at(&self, code: &str, verifier: &str, to: &str) -> (StatusCode, Value) {
        let form = code_form(CLIENT_ID, code, verifier, to);
        self.post(ISSUER_HOST, "/oauth/token", &form).await
    }

    async fn standard_code(&self) -> String {
        let place = self.sent_back(OAUTH_HOST, "/authorize", &standard_query()).await;
        assert_eq!(parameter(&place, "kept").as_deref(), Some("1"), "{place}");
        parameter(&place, "code").unwrap()
    }

    fn is_current(&self, tokens: &Value) -> bool {
        let access = Secret::new(tokens["access_token"].as_str().unwrap());
        self.issuer().standing(&access) == Standing::Current
    }

    /// Every one of these is a secret that a search for leaks would find.
    fn assert_known(&self, values: &[&Value]) {
        let secrets = self.world.secrets();
        for value in values {
            let value = value.as_str().unwrap();
            assert!(value.contains("vk-canary-"), "{value}");
            assert!(secrets.iter().any(|secret| secret == value), "{value}");
        }
    }
}

const STATE: &str = "state & more";

fn encoded(pairs: &[(&str, &str)]) -> String {
    Serializer::new(String::new()).extend_pairs(pairs).finish()
}

fn form_request(path: &str, form: &[(&str, &str)]) -> Request<ClientBody> {
    let mut request = client::post(path, encoded(form));
    let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
    request.headers_mut().insert(CONTENT_TYPE, kind);
    request
}

fn told(response: &Response<Bytes>) -> (StatusCode, Value) {
    (response.status(), serde_json::from_slice(response.body()).unwrap_or_default())
}

fn parameter(place: &Url, name: &str) -> Option<String> {
    place.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn authorize_query<'a>(client: &'a str, place: &'a str) -> [(&'a str, &'a str); 6] {
    [
        ("response_type", "code"),
        ("client_id", client),
        ("redirect_uri", place),
        ("code_challenge", challenge()),
        ("code_challenge_method", "S256"),
        ("state", STATE),
    ]
}

fn challenge() -> &'static str {
    static CHALLENGE: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| challenge_of(VERIFIER));
    &CHALLENGE
}

fn codex_query() -> Vec<(&'static str, &'static str)> {
    authorize_query(CLIENT_ID, CODEX_PLACE).to_vec()
}

fn standard_query() -> Vec<(&'static str, &'static str)> {
    let mut query = authorize_query(OAUTH_CLIENT_ID, LOOPBACK_PLACE).to_vec();
    query.extend([("scope", "openid files.read"), ("audience", "https://api.example.com")]);
    query
}

fn code_form<'a>(
    client: &'a str,
    code: &'a str,
    verifier: &'a str,
    place: &'a str,
) -> [(&'a str, &'a str); 5] {
    [
        ("grant_type", "authorization_code"),
        ("client_id", client),
        ("code", code),
        ("redirect_uri", place),
        ("code_verifier", verifier),
    ]
}

fn claims(token: &Value) -> Value {
    let payload = token.as_str().unwrap().split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
}

fn openai(token: &Value) -> Value {
    claims(token)["https://api.openai.com/auth"].clone()
}

#[test]
fn the_challenge_is_that_of_rfc_7636() {
    // Its appendix B.
    let verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    assert_eq!(challenge_of(verifier), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
}

#[tokio::test]
async fn a_browser_login_brings_tokens_once() {
    let play = Play::start().await;
    let code = play.codex_code(&[]).await;
    let (status, tokens) = play.redeem_codex(&code, VERIFIER).await;
    assert_eq!(status, StatusCode::OK, "{tokens}");
    assert!(play.is_current(&tokens));
    let all = [&tokens["access_token"], &tokens["id_token"], &tokens["refresh_token"]];
    play.assert_known(&all);
    play.assert_known(&[&Value::from(code.as_str())]);
    assert_eq!(openai(&tokens["id_token"])["chatgpt_account_id"], "acct-sandbox");
    assert_eq!(claims(&tokens["id_token"]).get("amr"), None);

    // A code that comes again was stolen: what it brought ends too.
    let (status, refusal) = play.redeem_codex(&code, VERIFIER).await;
    assert_eq!(
        (status, &refusal["error"]["code"]),
        (StatusCode::BAD_REQUEST, &"invalid_grant".into())
    );
    assert!(!play.is_current(&tokens));
    assert_eq!(play.issuer().grants("authorization_code"), 2);
    assert_eq!(play.issuer().posts(), 2);

    let exchange = [("grant_type", EXCHANGE), ("subject_token", "x")];
    let (status, _) = play.post(ISSUER_HOST, "/oauth/token", &exchange).await;
    assert_eq!((status, play.issuer().grants(EXCHANGE)), (StatusCode::BAD_REQUEST, 1));
    assert_eq!(play.issuer().last_request("/oauth/token")["subject_token"], "***");
}

#[tokio::test]
async fn a_code_is_bound_to_its_request() {
    let play = Play::start().await;
    let other = "another-verifier-that-is-long-enough-0123456789";
    let localhost = "http://localhost:1455/auth/callback";
    let table = [
        (other, CODEX_PLACE, CLIENT_ID),
        ("too-short", CODEX_PLACE, CLIENT_ID),
        (VERIFIER, localhost, CLIENT_ID),
        (VERIFIER, CODEX_PLACE, OAUTH_CLIENT_ID),
    ];
    for (verifier, place, client) in table {
        let code = play.codex_code(&[]).await;
        let form = code_form(client, &code, verifier, place);
        let (status, refusal) = play.post(ISSUER_HOST, "/oauth/token", &form).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{form:?}");
        assert_eq!(refusal["error"]["code"], "invalid_grant");
    }

    let code = play.codex_code(&[]).await;
    let form = code_form(OAUTH_CLIENT_ID, &code, VERIFIER, CODEX_PLACE);
    let (status, _) = play.post(OAUTH_HOST, "/token", &form).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "a code of the other issuer");

    let code = play.codex_code(&[]).await;
    play.clock.advance(Duration::minutes(11));
    assert_eq!(play.redeem_codex(&code, VERIFIER).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(play.redeem_codex("never-made", VERIFIER).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn only_a_proper_request_gets_to_the_page() {
    let play = Play::start().await;
    let codex = [
        ("response_type", "token"),
        ("client_id", "somebody"),
        ("redirect_uri", "http://127.0.0.1:1456/auth/callback"),
        ("redirect_uri", "https://127.0.0.1:1455/auth/callback"),
        ("redirect_uri", "http://127.0.0.1:1455/auth/callback/"),
        ("redirect_uri", "http://127.0.0.1:1455/auth/callback?a=b"),
        ("redirect_uri", "http://127.0.0.1.example.com:1455/auth/callback"),
        ("redirect_uri", "http://example.com:1455/auth/callback"),
        ("redirect_uri", "http://me@127.0.0.1:1455/auth/callback"),
        ("code_challenge", "plain"),
        ("code_challenge_method", "plain"),
        ("state", ""),
    ];
    let standard = [
        ("redirect_uri", "https://example.com/"),
        ("redirect_uri", "http://127.0.0.1:1/#fragment"),
        ("client_id", CLIENT_ID),
    ];
    for (host, path, proper, wrong) in [
        (ISSUER_HOST, "/oauth/authorize", codex_query(), codex.as_slice()),
        (OAUTH_HOST, "/authorize", standard_query(), standard.as_slice()),
    ] {
        for (name, value) in wrong {
            let query: Vec<_> = proper
                .iter()
                .map(|(key, proper)| (*key, if key == name { *value } else { *proper }))
                .collect();
            let response = play.get(host, &format!("{path}?{}", encoded(&query))).await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{host}: {name}={value}");
            assert!(!response.headers().contains_key(LOCATION));
        }
    }
    let twice = [codex_query(), vec![("state", STATE)]].concat();
    let response = play.get(ISSUER_HOST, &format!("/oauth/authorize?{}", encoded(&twice))).await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let twice = [("grant_type", "refresh_token"), ("grant_type", "refresh_token")];
    let (_, refusal) = play.post(OAUTH_HOST, "/token", &twice).await;
    assert_eq!(refusal["error"], "invalid_request");
    for place in ["http://localhost:1457/auth/callback", "http://127.0.0.1:1457/auth/callback"] {
        play.sent_back(ISSUER_HOST, "/oauth/authorize", &authorize_query(CLIENT_ID, place)).await;
    }
    play.issuer().any_port(true);
    let place = "http://127.0.0.1:40000/auth/callback";
    play.sent_back(ISSUER_HOST, "/oauth/authorize", &authorize_query(CLIENT_ID, place)).await;
    let place = "http://[::1]:40000/";
    play.sent_back(OAUTH_HOST, "/authorize", &authorize_query(OAUTH_CLIENT_ID, place)).await;
}

#[tokio::test]
async fn a_person_may_refuse_and_a_stranger_may_answer() {
    let play = Play::start().await;
    let description = "missing_codex_entitlement";
    play.issuer().consent(Consent::Deny { error: "access_denied", description });
    play.issuer().consent(Consent::WrongState);
    play.issuer().consent(Consent::NoCode);
    let query = codex_query();

    let denied = play.sent_back(ISSUER_HOST, "/oauth/authorize", &query).await;
    assert_eq!(parameter(&denied, "error").as_deref(), Some("access_denied"));
    assert_eq!(parameter(&denied, "error_description").as_deref(), Some(description));
    assert_eq!(parameter(&denied, "state").as_deref(), Some(STATE));
    assert_eq!(parameter(&denied, "code"), None);

    let strange = play.sent_back(ISSUER_HOST, "/oauth/authorize", &query).await;
    assert!(parameter(&strange, "code").is_some());
    assert_ne!(parameter(&strange, "state").as_deref(), Some(STATE));

    let empty = play.sent_back(ISSUER_HOST, "/oauth/authorize", &query).await;
    assert_eq!(parameter(&empty, "code"), None);
    play.codex_code(&[]).await;
}

#[tokio::test]
async fn the_page_may_ask_first() {
    let play = Play::start().await;
    play.issuer().ask_first(true);
    let path = format!("/oauth/authorize?{}", encoded(&codex_query()));
    let response = play.get(ISSUER_HOST, &path).await;
    assert_eq!(response.status(), StatusCode::OK);
    let page = std::str::from_utf8(response.body()).unwrap();
    let link = page.split("href=\"").nth(1).unwrap().split('"').next().unwrap();
    let place = Url::parse(&link.replace("&amp;", "&")).unwrap();
    let code = parameter(&place, "code").unwrap();
    assert_eq!(parameter(&place, "state").as_deref(), Some(STATE));
    assert_eq!(play.redeem_codex(&code, VERIFIER).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_login_is_for_the_workspace_that_was_chosen() {
    let play = Play::start().await;
    let person = Person {
        amr: Some(vec!["pwd".to_owned(), "mfa".to_owned()]),
        email: "ada@example.com".to_owned(),
        fedramp: true,
        plan: "team".to_owned(),
        ..Person::of("acct-own")
    };
    play.issuer().person(person.clone());
    let id_of = async |more: &[(&'static str, &'static str)]| {
        let code = play.codex_code(more).await;
        play.redeem_codex(&code, VERIFIER).await.1["id_token"].clone()
    };
    let own = id_of(&[]).await;
    assert_eq!(claims(&own)["amr"], json!(["pwd", "mfa"]));
    assert_eq!(claims(&own)["email"], "ada@example.com");
    let expected = json!({
        "chatgpt_user_id": "user-acct-own", "chatgpt_account_id": "acct-own",
        "chatgpt_plan_type": "team", "chatgpt_account_is_fedramp": true,
    });
    assert_eq!(openai(&own), expected);

    let asked = [("allowed_workspace_id", "acct-1,acct-2")];
    assert_eq!(openai(&id_of(&asked).await)["chatgpt_account_id"], "acct-1");
    play.issuer().sign_in_as("acct-wrong");
    assert_eq!(openai(&id_of(&asked).await)["chatgpt_account_id"], "acct-wrong");
    assert_eq!(claims(&id_of(&asked).await)["email"], "ada@example.com");

    let written = play.issuer().write_auth_json(play.world.dir(), Duration::hours(1)).unwrap();
    assert_eq!(written.account_id, "acct-own");
    let bare = Person { account_id: String::new(), plan: String::new(), ..person };
    play.issuer().person(bare);
    let id = play.issuer().login(Duration::hours(1)).id.expose().into();
    assert_eq!(openai(&id).get("chatgpt_account_id"), None);
}

#[tokio::test]
async fn faults_meet_any_grant_in_order() {
    let play = Play::start().await;
    play.issuer().script(Fault::Status(500));
    play.issuer().script(Fault::Refuse("token_expired"));
    let code = play.codex_code(&[]).await;
    assert_eq!(play.redeem_codex(&code, VERIFIER).await.0.as_u16(), 500);
    assert_eq!(play.redeem_codex(&code, VERIFIER).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(play.redeem_codex(&code, VERIFIER).await.0, StatusCode::OK, "not redeemed before");

    play.issuer().script(Fault::Refuse("unauthorized_client"));
    let (status, refusal) = play.post(OAUTH_HOST, "/token", &[("grant_type", "x")]).await;
    assert_eq!(
        (status, &refusal["error"]),
        (StatusCode::BAD_REQUEST, &"unauthorized_client".into())
    );
}

#[tokio::test]
async fn a_device_waits_until_it_is_approved() {
    const USER_CODE: &str = "/api/accounts/deviceauth/usercode";
    const TOKEN: &str = "/api/accounts/deviceauth/token";
    let play = Play::start().await;
    let asked = json!({"client_id": CLIENT_ID});
    play.issuer().device_interval(7);
    let (status, device) = play.post_json(USER_CODE, asked.clone()).await;
    assert_eq!((status, &device["interval"]), (StatusCode::OK, &"7".into()));
    play.assert_known(&[&device["device_auth_id"]]);
    let poll = json!({
        "device_auth_id": device["device_auth_id"], "user_code": device["user_code"],
    });
    assert_eq!(play.post_json(TOKEN, poll.clone()).await.0, StatusCode::FORBIDDEN);
    let wrong = json!({"device_auth_id": device["device_auth_id"], "user_code": "AAAA-AAAA"});
    assert_eq!(play.post_json(TOKEN, wrong).await.0, StatusCode::NOT_FOUND);

    play.issuer().approve_device();
    let (status, code) = play.post_json(TOKEN, poll.clone()).await;
    assert_eq!(status, StatusCode::OK);
    play.assert_known(&[&code["authorization_code"]]);
    let verifier = code["code_verifier"].as_str().unwrap();
    assert_eq!(challenge_of(verifier), code["code_challenge"]);
    let (code, place) = (code["authorization_code"].as_str().unwrap(), "/deviceauth/callback");
    let place = format!("https://{ISSUER_HOST}{place}");
    let (status, tokens) = play.redeem_codex_at(code, verifier, &place).await;
    assert_eq!(status, StatusCode::OK);
    assert!(play.is_current(&tokens));
    assert_eq!(play.post_json(TOKEN, poll).await.0, StatusCode::NOT_FOUND, "good for one code");

    play.issuer().wait_for_polls(4).await;
    let polls = play.issuer().polls();
    assert!(polls.len() == 4 && polls.is_sorted());

    // Approved before it asked, and asked of an account that does not allow it.
    play.issuer().approve_device();
    let (_, device) = play.post_json(USER_CODE, asked.clone()).await;
    play.issuer().device_login(DeviceSetting::Denied(451));
    assert_eq!(play.post_json(TOKEN, device.clone()).await.0.as_u16(), 451);
    play.issuer().device_login(DeviceSetting::On);
    assert_eq!(play.post_json(TOKEN, device).await.0, StatusCode::OK);
    play.issuer().device_login(DeviceSetting::Off);
    assert_eq!(play.post_json(USER_CODE, asked.clone()).await.0, StatusCode::NOT_FOUND);
    play.issuer().device_login(DeviceSetting::Refused(429));
    assert_eq!(play.post_json(USER_CODE, asked).await.0.as_u16(), 429);
}

#[tokio::test]
async fn a_personal_token_says_whose_it_is() {
    const WHOAMI: &str = "/api/accounts/v1/user-auth-credential/whoami";
    let play = Play::start().await;
    let token = play.issuer().personal_token("acct-9");
    play.assert_known(&[&token.expose().into()]);
    assert!(token.expose().starts_with("at-"));
    let ask = async |token: &str| {
        let mut request = client::get(WHOAMI);
        let field = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
        request.headers_mut().insert(AUTHORIZATION, field);
        told(&play.send(ISSUER_HOST, request).await)
    };
    let expected = json!({
        "email": "acct-9@example.com", "chatgpt_user_id": "user-acct-9",
        "chatgpt_account_id": "acct-9", "chatgpt_plan_type": "plus",
        "chatgpt_account_is_fedramp": false,
    });
    assert_eq!(ask(token.expose()).await, (StatusCode::OK, expected));
    assert_eq!(play.issuer().standing(&token), Standing::Current);
    let login = play.issuer().login(Duration::hours(1));
    for other in ["at-unknown", login.access.expose(), ""] {
        let (status, refusal) = ask(other).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        assert!(refusal["error"]["code"].is_string());
    }
    assert_eq!(play.issuer().whoamis(), 4);
}

#[tokio::test]
async fn a_revocation_is_recorded_and_ends_the_login() {
    let play = Play::start().await;
    let login = play.issuer().login(Duration::hours(1));
    let body = json!({
        "token": login.refresh.expose(), "token_type_hint": "refresh_token",
        "client_id": CLIENT_ID,
    });
    assert_eq!(play.post_json("/oauth/revoke", body).await.0, StatusCode::OK);
    assert_eq!(play.issuer().standing(&login.access), Standing::Revoked);

    // At the other host the same token is one that nobody knows.
    let login = play.issuer().login(Duration::hours(1));
    let form = [("token", login.access.expose()), ("client_id", OAUTH_CLIENT_ID)];
    assert_eq!(play.post(OAUTH_HOST, "/revoke", &form).await.0, StatusCode::OK);
    assert_eq!(play.issuer().standing(&login.access), Standing::Current);
    let form = [("token", login.access.expose())];
    assert_eq!(play.post(OAUTH_HOST, "/revoke", &form).await.0, StatusCode::UNAUTHORIZED);

    let hint = Some("refresh_token".to_owned());
    let expected = [
        Revocation { hint, client_id: true },
        Revocation { hint: None, client_id: true },
        Revocation { hint: None, client_id: false },
    ];
    assert_eq!(play.issuer().revocations(), expected);
    assert_eq!(play.issuer().revokes(), 3);
}

#[tokio::test]
async fn the_standard_dialect_describes_itself() {
    const METADATA: &str = "/.well-known/oauth-authorization-server";
    let play = Play::start().await;
    let (status, told_once) = told(&play.get(OAUTH_HOST, METADATA).await);
    assert_eq!(
        (status, &told_once["issuer"]),
        (StatusCode::OK, &"https://login.example.com".into())
    );
    assert_eq!(told_once["code_challenge_methods_supported"], json!(["S256"]));
    play.issuer().metadata("issuer", "https://other.example.com".into());
    play.issuer().metadata("device_authorization_endpoint", Value::Null);
    let (_, changed) = told(&play.get(OAUTH_HOST, METADATA).await);
    assert_eq!(changed["issuer"], "https://other.example.com");
    assert_eq!(changed.get("device_authorization_endpoint"), None);
}

#[tokio::test]
async fn a_standard_login_rotates() {
    let play = Play::start().await;
    let code = play.standard_code().await;
    let asked = play.issuer().last_request("/authorize");
    assert_eq!(asked["scope"], "openid files.read");
    assert_eq!(asked["audience"], "https://api.example.com");
    let form = code_form(OAUTH_CLIENT_ID, &code, VERIFIER, LOOPBACK_PLACE);
    let (status, first) = play.post(OAUTH_HOST, "/token", &form).await;
    assert_eq!((status, &first["scope"]), (StatusCode::OK, &"openid files.read".into()));
    assert_eq!(claims(&first["access_token"])["aud"], json!(["https://api.example.com"]));
    assert_eq!(claims(&first["id_token"])["aud"], json!([OAUTH_CLIENT_ID]));
    play.assert_known(&[&first["access_token"], &first["id_token"], &first["refresh_token"]]);

    let refresh = async |tokens: &Value| {
        let form = [
            ("grant_type", "refresh_token"),
            ("client_id", OAUTH_CLIENT_ID),
            ("refresh_token", tokens["refresh_token"].as_str().unwrap()),
        ];
        play.post(OAUTH_HOST, "/token", &form).await
    };
    let (status, second) = refresh(&first).await;
    assert_eq!(status, StatusCode::OK);
    assert_ne!(first["refresh_token"], second["refresh_token"]);
    assert!(play.is_current(&second));
    let (status, refusal) = refresh(&first).await;
    assert_eq!((status, &refusal["error"]), (StatusCode::BAD_REQUEST, &"invalid_grant".into()));
    assert!(!play.is_current(&second), "used twice, the whole login ends");
    assert_eq!((play.issuer().refreshes(), play.issuer().reuses()), (1, 1));

    let (status, refusal) = play.post(OAUTH_HOST, "/token", &form).await;
    assert_eq!((status, &refusal["error"]), (StatusCode::BAD_REQUEST, &"invalid_grant".into()));
    let code = play.standard_code().await;
    let form = code_form(OAUTH_CLIENT_ID, &code, challenge(), LOOPBACK_PLACE);
    let (status, _) = play.post(OAUTH_HOST, "/token", &form).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "a wrong verifier");
}

#[tokio::test]
async fn it_may_be_down_or_forgive() {
    let play = Play::start().await;
    let (issuer, login) = (play.issuer(), play.issuer().oauth_login(Duration::HOUR));
    let refresh = async |token: &str| {
        let form = [
            ("grant_type", "refresh_token"),
            ("client_id", OAUTH_CLIENT_ID),
            ("refresh_token", token),
        ];
        play.post(OAUTH_HOST, "/token", &form).await
    };
    issuer.always(Some(Fault::Status(503)));
    for _ in 0..3 {
        assert_eq!(refresh(login.refresh.expose()).await.0, StatusCode::SERVICE_UNAVAILABLE);
    }
    issuer.always(None);
    issuer.take(std::time::Duration::from_millis(1));
    issuer.forgive_reuse();
    let (status, next) = refresh(login.refresh.expose()).await;
    assert_eq!((status, issuer.redeemed_at().len()), (StatusCode::OK, 1));
    assert_eq!(refresh(login.refresh.expose()).await.0, StatusCode::BAD_REQUEST);
    assert!(issuer.accepts(&Secret::new(next["access_token"].as_str().unwrap())));
    let (status, _) = refresh(next["refresh_token"].as_str().unwrap()).await;
    assert_eq!((status, issuer.reuses()), (StatusCode::OK, 1), "the login lives on");
}

#[tokio::test]
async fn a_client_speaks_for_itself_with_its_secret() {
    let play = Play::start().await;
    let pair =
        |id: &str, secret: &str| format!("Basic {}", STANDARD.encode(format!("{id}:{secret}")));
    let own = [("grant_type", "client_credentials"), ("scope", "jobs"), ("resource", "urn:jobs")];
    let id = [("client_id", OAUTH_CLIENT_ID)];
    let secret = [("client_secret", OAUTH_CLIENT_SECRET)];
    let good = pair(OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET);
    // Every character may be encoded (RFC 6749 section 2.3.1).
    let spelled = pair("example%2Dclient", &OAUTH_CLIENT_SECRET.replace('-', "%2D"));
    let form = |parts: &[&[(&'static str, &'static str)]]| parts.concat();
    let table = [
        (Some(good.clone()), form(&[&own]), 200),
        (Some(spelled), form(&[&own, &id]), 200),
        (None, form(&[&own, &id, &secret]), 200),
        (None, form(&[&own, &id]), 401),
        (None, form(&[&own, &secret]), 401),
        (None, form(&[&own, &id, &[("client_secret", "wrong")]]), 401),
        (Some(pair(OAUTH_CLIENT_ID, "wrong")), form(&[&own]), 401),
        (Some("Basic !".to_owned()), form(&[&own]), 401),
        (Some(good.clone()), form(&[&own, &secret]), 400),
        (Some(good), form(&[&own, &[("client_id", "other")]]), 400),
    ];
    for (field, form, expected) in table {
        let mut request = form_request("/token", &form);
        if let Some(field) = &field {
            let field = HeaderValue::try_from(field).unwrap();
            request.headers_mut().insert(AUTHORIZATION, field);
        }
        let (status, tokens) = told(&play.send(OAUTH_HOST, request).await);
        assert_eq!(status.as_u16(), expected, "{field:?} {form:?}: {tokens}");
        if expected == 200 {
            assert!(play.is_current(&tokens));
            assert_eq!(claims(&tokens["access_token"])["aud"], json!(["urn:jobs"]));
            assert_eq!((tokens.get("refresh_token"), tokens.get("id_token")), (None, None));
        }
    }
    assert_eq!(play.issuer().last_request("/token")["scope"], "jobs");
    play.assert_known(&[&OAUTH_CLIENT_SECRET.into()]);
}

#[tokio::test]
async fn a_standard_device_hears_the_words_of_rfc_8628() {
    let play = Play::start().await;
    let ask = async || {
        let form = [("client_id", OAUTH_CLIENT_ID), ("scope", "files.read")];
        let (status, device) = play.post(OAUTH_HOST, "/device", &form).await;
        assert_eq!((status, &device["interval"]), (StatusCode::OK, &1.into()), "{device}");
        device
    };
    let poll = async |device: &Value| {
        let form = [
            ("grant_type", token::DEVICE_GRANT),
            ("client_id", OAUTH_CLIENT_ID),
            ("device_code", device["device_code"].as_str().unwrap()),
        ];
        let (status, told) = play.post(OAUTH_HOST, "/token", &form).await;
        assert_eq!(status == StatusCode::OK, told.get("error").is_none(), "{told}");
        told
    };
    let device = ask().await;
    play.assert_known(&[&device["device_code"]]);
    let complete = device["verification_uri_complete"].as_str().unwrap();
    assert!(complete.ends_with(device["user_code"].as_str().unwrap()));
    assert_eq!(poll(&device).await["error"], "authorization_pending");
    play.issuer().slow_down();
    assert_eq!(poll(&device).await["error"], "slow_down");
    assert_eq!(poll(&device).await["error"], "authorization_pending");
    play.issuer().approve_device();
    let tokens = poll(&device).await;
    assert!(play.is_current(&tokens));
    assert_eq!(tokens["scope"], "files.read");
    assert!(tokens["refresh_token"].is_string());
    assert_eq!(poll(&device).await["error"], "invalid_grant", "good for one login");

    let device = ask().await;
    play.issuer().deny_device();
    assert_eq!(poll(&device).await["error"], "access_denied");
    let device = ask().await;
    play.clock.advance(Duration::minutes(16));
    assert_eq!(poll(&device).await["error"], "expired_token");
    assert_eq!(play.issuer().polls().len(), 7);
}

#[tokio::test]
async fn a_person_types_the_code_of_a_device() {
    let play = Play::start().await;
    let form = [("client_id", OAUTH_CLIENT_ID)];
    let (_, device) = play.post(OAUTH_HOST, "/device", &form).await;
    let user_code = device["user_code"].as_str().unwrap();
    let page = play.get(OAUTH_HOST, &format!("/activate?user_code={user_code}%22%3C")).await;
    let page = std::str::from_utf8(page.body()).unwrap();
    assert!(page.contains(&format!("value=\"{user_code}&quot;&lt;\"")), "{page}");
    for (host, path, code, expected) in [
        (OAUTH_HOST, "/activate", "AAAA-AAAA", StatusCode::BAD_REQUEST),
        (ISSUER_HOST, "/codex/device", user_code, StatusCode::BAD_REQUEST),
        (OAUTH_HOST, "/activate", user_code, StatusCode::OK),
        (OAUTH_HOST, "/activate", user_code, StatusCode::BAD_REQUEST),
    ] {
        let form = [("user_code", code), ("answer", "allow")];
        assert_eq!(play.post(host, path, &form).await.0, expected, "{host} {code}");
    }
    let form = [
        ("grant_type", token::DEVICE_GRANT),
        ("client_id", OAUTH_CLIENT_ID),
        ("device_code", device["device_code"].as_str().unwrap()),
    ];
    assert_eq!(play.post(OAUTH_HOST, "/token", &form).await.0, StatusCode::OK);
}
