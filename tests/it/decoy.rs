//! A client that holds decoys is signed in where a rule says so, refused where not, and never learns a real token.

use std::fs;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};
use valetkey::credential::claims::Claims;
use valetkey::credential::{Account, CODEX_CLIENT_ID, CredentialName};
use valetkey::decoy::{self, DecoySet, Shape, Tag};
use valetkey::sandbox::Fault;
use valetkey::sandbox::client::{self, ClientBody, HTTP1, HTTP2, Visit, gather};
use valetkey::secret::Secret;

use super::leak::leak;
use super::refuse::raw;
use super::support::{CHATGPT, EXAMPLE, KEY, OTHER, Options, Scene, refusal, within};
use super::websocket;

const ISSUER: &str = "auth.openai.com:443";

fn tag(name: &str) -> Tag {
    Tag::of(&name.parse::<CredentialName>().unwrap())
}

/// Decoys of the ChatGPT login, as a client in another place would hold them.
fn decoys() -> DecoySet {
    let account = Account { id: Some("acct-sandbox".into()), ..Account::default() };
    DecoySet::new(
        tag("openai"),
        &account,
        OffsetDateTime::from_unix_timestamp(1_795_402_057).unwrap(),
    )
}

fn key(name: &str) -> String {
    decoy::key(tag(name), Shape::OpenAi)
}

/// A request with these fields.
fn asking(path: &str, fields: &[(&str, &str)]) -> http::Request<ClientBody> {
    let mut request = client::get(path);
    for (name, value) in fields {
        let name: HeaderName = name.parse().unwrap();
        request.headers_mut().append(name, value.parse().unwrap());
    }
    request
}

impl Scene {
    async fn ask(&self, visit: Visit<'_>, request: http::Request<ClientBody>) -> Response<Bytes> {
        within(gather(within(self.client.send(visit, request)).await.unwrap())).await.unwrap()
    }

    async fn tell_issuer(&self, alpn: &[&[u8]], path: &str, body: &Value) -> Response<Bytes> {
        let mut request = client::post(path, body.to_string());
        request.headers_mut().insert(CONTENT_TYPE, "application/json".parse().unwrap());
        self.ask(Visit::to(ISSUER, alpn), request).await
    }

    fn assert_issuer_saw_nothing(&self) {
        let issuer = self.world.issuer();
        assert!(issuer.seen().is_empty(), "{:?}", issuer.seen());
        assert_eq!((issuer.posts(), issuer.revokes()), (0, 0));
    }

    /// No byte of a real token is in this answer.
    fn assert_no_secret(&self, answer: &Response<Bytes>) {
        let secrets = [self.world.secrets(), vec![KEY.to_owned()]].concat();
        let text = format!("{:?} {}", answer.headers(), String::from_utf8_lossy(answer.body()));
        assert_eq!(leak(&secrets, &text), None, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decoy_is_swapped_for_the_real_thing() {
    let scene = Scene::expired().await;
    scene.world.api().require_login(true);
    let bearer = format!("Bearer {}", decoys().access);
    let fields = [("authorization", &*bearer), ("chatgpt-account-id", "acct-sandbox")];
    for alpn in [HTTP1, HTTP2] {
        for path in ["/backend-api/wham/accounts/check", "/backend-api/codex/models"] {
            let answer = scene.ask(Visit::to(CHATGPT, alpn), asking(path, &fields)).await;
            assert_eq!(answer.status(), 200, "{answer:?}");
        }
        let bearer = format!("Bearer {}", key("example"));
        let request = asking("/v1/things", &[("authorization", &bearer)]);
        assert_eq!(scene.ask(Visit::to(EXAMPLE, alpn), request).await.status(), 200);
        // Twice, and in a field that the rule takes out.
        let fields = [("authorization", &*bearer), ("authorization", &*bearer)];
        let answer = scene.ask(Visit::to(EXAMPLE, alpn), asking("/v1/things", &fields)).await;
        assert_eq!(answer.status(), 200);
    }
    let removed = [("openai-organization", &*bearer)];
    let path = "/backend-api/codex/models";
    let answer = scene.ask(Visit::to(CHATGPT, HTTP2), asking(path, &removed)).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(scene.world.issuer().refreshes(), 1, "of the expired token");
    let seen = scene.world.api().seen();
    assert_eq!(seen.len(), 9);
    assert!(!format!("{seen:?}").contains("valetkeyDecoy"));
}

#[tokio::test(flavor = "multi_thread")]
async fn decoys_of_an_account_that_has_gone_say_so() {
    let scene = Scene::usual().await;
    let bearer = format!("Bearer {}", decoys().access);
    for (account, status) in [("acct-sandbox", 200), ("acct-of-last-week", 403)] {
        let fields = [("authorization", &*bearer), ("chatgpt-account-id", account)];
        let path = "/backend-api/wham/accounts/check";
        let answer = scene.ask(Visit::to(CHATGPT, HTTP1), asking(path, &fields)).await;
        assert_eq!(answer.status(), status, "{account}");
        if status == 403 {
            assert_eq!(refusal(&answer).1, "decoy_misplaced");
            assert!(String::from_utf8_lossy(answer.body()).contains("valetkey init codex"));
        }
    }
    // Whoever holds nothing claims nothing: the account is set right, as ever.
    let fields = [("chatgpt-account-id", "acct-of-last-week")];
    let request = asking("/backend-api/codex/models", &fields);
    assert_eq!(scene.ask(Visit::to(CHATGPT, HTTP1), request).await.status(), 200);
    let seen = scene.world.api().seen();
    assert!(seen.iter().all(|seen| seen.headers["chatgpt-account-id"] == "acct-sandbox"));
    assert_eq!(seen.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_is_signed_in_too() {
    let scene = Scene::usual().await;
    scene.world.api().require_login(true);
    let bearer = format!("Bearer {}", decoys().access);
    let handshake = |protocol: Option<&str>| {
        let mut request = "wss://chatgpt.com/backend-api/codex/ws".into_client_request().unwrap();
        request.headers_mut().insert(AUTHORIZATION, bearer.parse().unwrap());
        if let Some(protocol) = protocol {
            request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        }
        request
    };
    let tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let opened = within(Box::pin(tokio_tungstenite::client_async(handshake(None), tls))).await;
    let (mut socket, _) = opened.unwrap();
    within(socket.send(Message::text("hello"))).await.unwrap();
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text("hello"));

    let mut sender = websocket::http2(&scene.client, CHATGPT).await;
    let mut request = websocket::extended_connect("/backend-api/codex/ws");
    request.headers_mut().insert(AUTHORIZATION, bearer.parse().unwrap());
    let answer = within(sender.send_request(request)).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(!format!("{:?}", scene.world.api().seen()).contains("valetkeyDecoy"));

    // As pages in a browser show a key.
    scene.world.api().clear();
    let smuggled = format!("realtime, openai-insecure-api-key.{}", key("openai"));
    let tls = scene.client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let request = handshake(Some(&smuggled));
    match within(Box::pin(tokio_tungstenite::client_async(request, tls))).await {
        Err(Error::Http(answer)) => {
            assert_eq!(answer.headers()["x-valetkey-error"], "decoy_misplaced")
        }
        other => panic!("{other:?}"),
    }
    let mut request = websocket::extended_connect("/backend-api/codex/ws");
    request.headers_mut().insert("sec-websocket-protocol", smuggled.parse().unwrap());
    let answer = within(sender.send_request(request)).await.unwrap();
    assert_eq!(answer.headers()["x-valetkey-error"], "decoy_misplaced");
    assert!(scene.world.api().seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decoy_anywhere_else_is_refused_before_it_leaves() {
    use base64::Engine as _;
    let scene = Scene::usual().await;
    let (ours, example, nobodys) = (key("openai"), key("example"), key("nobody"));
    let jwt = decoys().access;
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("user:{example}"));
    let (codex, models) = ("/backend-api/codex/models", "/v1/models");
    let in_query = format!("/v1/models?key={example}");
    let in_path = format!("/v1/models/{example}");
    let table: Vec<(&str, &str, &str, String)> = vec![
        // In a field that the rule leaves alone.
        (CHATGPT, codex, "x-api-key", ours.clone()),
        (CHATGPT, codex, "cookie", format!("a=b; token={jwt}")),
        (EXAMPLE, models, "x-api-key", example.clone()),
        // In the URL.
        (EXAMPLE, &in_query, "accept", "*/*".into()),
        (EXAMPLE, &in_path, "accept", "*/*".into()),
        // Of another credential, or of none.
        (CHATGPT, codex, "authorization", format!("Bearer {example}")),
        (EXAMPLE, models, "authorization", format!("Bearer {jwt}")),
        (EXAMPLE, models, "authorization", format!("Bearer {nobodys}")),
        // Where no rule signs in.
        (CHATGPT, "/elsewhere", "authorization", format!("Bearer {jwt}")),
        (EXAMPLE, "/elsewhere", "authorization", format!("Basic {basic}")),
        (CHATGPT, "/backend-api/wham/remote/control/x", "authorization", format!("Bearer {jwt}")),
        (ISSUER, "/oauth/token", "authorization", format!("Bearer {jwt}")),
        (ISSUER, "/api/accounts/deviceauth/usercode", "authorization", format!("Bearer {jwt}")),
    ];
    for alpn in [HTTP1, HTTP2] {
        for (target, path, name, value) in &table {
            for method in [Method::GET, Method::POST] {
                let mut request = asking(path, &[(name, value)]);
                *request.method_mut() = method.clone();
                let answer = scene.ask(Visit::to(target, alpn), request).await;
                let told = refusal(&answer);
                assert_eq!(told, (403, "decoy_misplaced".to_owned()), "{target}{path} {name}");
                assert!(!String::from_utf8_lossy(answer.body()).contains("valetkeyDecoy"));
            }
        }
    }
    let plain = format!(
        "GET http://other.example.com/ HTTP/1.1\r\nHost: other.example.com\r\n\
         Authorization: Bearer {example}\r\nConnection: close\r\n\r\n"
    );
    let answer = raw(&scene, plain.as_bytes()).await.unwrap();
    assert_eq!(refusal(&answer), (403, "decoy_misplaced".to_owned()));
    let ruled = plain.replace("other.example.com", "api.example.com");
    let answer = raw(&scene, ruled.as_bytes()).await.unwrap();
    assert_eq!(refusal(&answer), (403, "cleartext_refused".to_owned()));
    assert!(scene.world.api().seen().is_empty() && scene.world.issuer().seen().is_empty());
    // What cannot be seen cannot be refused, and is worth nothing.
    let request = asking("/v1/models", &[("authorization", &example)]);
    assert_eq!(scene.ask(Visit::to(OTHER, HTTP1), request).await.status(), 200);
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decoy_in_a_trailer_stays_here() {
    let scene = Scene::usual().await;
    for path in ["/v1/echo", "/echo"] {
        for alpn in [HTTP1, HTTP2] {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "42".parse().unwrap());
            trailers.insert("x-more", format!("Bearer {}", key("example")).parse().unwrap());
            let frames = [Ok(Frame::data(Bytes::from("body"))), Ok(Frame::trailers(trailers))];
            let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
            let mut request = client::post(path, "").map(|_| body);
            request.headers_mut().insert("te", "trailers".parse().unwrap());
            request.headers_mut().insert("trailer", "x-sum, x-more".parse().unwrap());
            let answer =
                within(scene.client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap();
            let rest = within(answer.into_body().collect()).await.unwrap();
            let trailers = rest.trailers().expect("trailers came back");
            assert_eq!(trailers["x-sum"], "42");
            assert!(!trailers.contains_key("x-more"), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_with_decoys_is_answered_with_decoys() {
    let scene = Scene::usual().await;
    scene.world.api().require_login(true);
    let mut refresh = decoys().refresh;
    for alpn in [HTTP1, HTTP2] {
        let body =
            json!({ "client_id": "app", "grant_type": "refresh_token", "refresh_token": refresh });
        let answer = scene.tell_issuer(alpn, "/oauth/token", &body).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "application/json");
        scene.assert_no_secret(&answer);
        let set: Value = serde_json::from_slice(answer.body()).unwrap();
        for name in ["access_token", "id_token"] {
            let token = set[name].as_str().unwrap();
            assert_eq!(decoy::tags_in(token.as_bytes()), [tag("openai")]);
            let claims = Claims::of(&Secret::new(token)).unwrap();
            assert_eq!(claims.account_id.as_deref(), Some("acct-sandbox"), "the real one");
            assert_eq!(claims.email.as_deref(), Some("acct-sandbox@example.com"));
            assert_eq!(claims.plan.as_deref(), Some("plus"));
            let left = claims.expires_at.unwrap() - scene.clock.now();
            assert!(left > time::Duration::days(3000), "{left}");
        }
        let fresh = set["refresh_token"].as_str().unwrap().to_owned();
        assert_ne!(fresh, refresh);
        let bearer = format!("Bearer {}", set["access_token"].as_str().unwrap());
        let request = asking("/backend-api/codex/models", &[("authorization", &bearer)]);
        assert_eq!(scene.ask(Visit::to(CHATGPT, alpn), request).await.status(), 200);
        refresh = fresh;
    }
    // As a form, where a letter may be escaped.
    let form =
        format!("grant_type=refresh_token&refresh_token={refresh}").replace("rt_v", "rt_%76");
    let mut request = client::post("/oauth/token", form);
    let kind = "application/x-www-form-urlencoded".parse().unwrap();
    request.headers_mut().insert(CONTENT_TYPE, kind);
    let answer = scene.ask(Visit::to(ISSUER, HTTP1), request).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    scene.assert_no_secret(&answer);
    scene.assert_issuer_saw_nothing();
}

#[tokio::test(flavor = "multi_thread")]
async fn decoys_live_from_the_proxys_own_now() {
    let lifetime = Some(time::Duration::days(2));
    let scene = Scene::start(Options { lifetime, ..Options::default() }).await;
    scene.clock.advance(time::Duration::hours(12));
    let body = json!({ "grant_type": "refresh_token", "refresh_token": decoys().refresh });
    let answer = scene.tell_issuer(HTTP1, "/oauth/token", &body).await;
    let set: Value = serde_json::from_slice(answer.body()).unwrap();
    let claims = Claims::of(&Secret::new(set["access_token"].as_str().unwrap())).unwrap();
    let left = (claims.expires_at.unwrap() - scene.clock.now()).whole_seconds();
    let whole = set["expires_in"].as_i64().unwrap();
    assert!((whole - 3600..=whole).contains(&left), "{left} s of {whole}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_with_decoys_ends_nothing() {
    let scene = Scene::usual().await;
    scene.world.api().require_login(true);
    let DecoySet { access, refresh, .. } = decoys();
    for (alpn, token, hint) in
        [(HTTP1, &refresh, "refresh_token"), (HTTP2, &access, "access_token")]
    {
        let body = json!({ "token": token, "token_type_hint": hint, "client_id": "app" });
        let answer = scene.tell_issuer(alpn, "/oauth/revoke", &body).await;
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (200, &b"{}"[..]));
    }
    scene.assert_issuer_saw_nothing();
    assert_eq!(scene.get("/models").await.status(), 200, "the login lives");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decoy_that_means_nothing_to_the_issuer_is_refused() {
    let scene = Scene::usual().await;
    let ours = decoys().refresh;
    let refresh = |token: &str| json!({ "grant_type": "refresh_token", "refresh_token": token });
    let table = [
        refresh(&key("example")),
        refresh(&key("nobody")),
        json!({ "token": key("example") }),
        json!({ "grant_type": "authorization_code", "code": ours }),
        json!({ "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange", "subject_token": ours }),
        json!({ "grant_type": "refresh_token", "refresh_token": "real", "client_secret": ours }),
        json!({ "grant_type": "refresh_token", "refresh_token": ours, "client_secret": key("example") }),
    ];
    for body in &table {
        let answer = scene.tell_issuer(HTTP1, "/oauth/token", body).await;
        assert_eq!(refusal(&answer), (403, "decoy_misplaced".to_owned()), "{body}");
    }
    scene.assert_issuer_saw_nothing();
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_in_anew_passes_through() {
    let scene = Scene::usual().await;
    let body = json!({ "client_id": CODEX_CLIENT_ID });
    let path = "/api/accounts/deviceauth/usercode";
    assert_eq!(scene.tell_issuer(HTTP1, path, &body).await.status(), 200);
    let body = json!({ "grant_type": "authorization_code", "code": "unknown", "client_id": "app" });
    let answer = scene.tell_issuer(HTTP1, "/oauth/token", &body).await;
    assert!(!answer.headers().contains_key("x-valetkey-error"), "the issuer's own word");
    let paths: Vec<_> = scene.world.issuer().seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, [path, "/oauth/token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_is_signed_in_a_refresh_says_so() {
    let body = json!({ "grant_type": "refresh_token", "refresh_token": decoys().refresh });
    let nobody = Scene::start(Options { lifetime: None, ..Options::default() }).await;
    let answer = nobody.tell_issuer(HTTP1, "/oauth/token", &body).await;
    assert_eq!(refusal(&answer), (403, "login_required".to_owned()));
    nobody.assert_issuer_saw_nothing();

    // One whose login has ended learns it here, and the issuer is not asked again.
    let dead = Scene::expired().await;
    dead.world.issuer().script(Fault::Refuse("refresh_token_reused"));
    assert_eq!(dead.get("/models").await.status(), 403);
    let answer = dead.tell_issuer(HTTP1, "/oauth/token", &body).await;
    assert_eq!(refusal(&answer), (403, "login_required".to_owned()));
    assert_eq!(dead.world.issuer().posts(), 1);

    // One whose token has only expired is answered without a refresh: that is for a request to cause.
    let expired = Scene::expired().await;
    let before = fs::read(expired.auth_json()).unwrap();
    assert_eq!(expired.tell_issuer(HTTP1, "/oauth/token", &body).await.status(), 200);
    expired.assert_issuer_saw_nothing();
    assert_eq!(fs::read(expired.auth_json()).unwrap(), before);
}
