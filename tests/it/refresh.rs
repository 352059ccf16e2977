//! Tokens rotate once, whoever asks, and a 401 is repaired.

use std::fs;

use bytes::Bytes;
use futures_util::future::join_all;
use http::Response;
use serde_json::Value;
use valetkey::sandbox::Fault;
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Visit, gather};

use super::support::{CHATGPT, CODEX, EXAMPLE, Options, Scene, refusal, within};

fn statuses(answers: &[Response<Bytes>]) -> Vec<u16> {
    let mut all: Vec<u16> = answers.iter().map(|answer| answer.status().as_u16()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

async fn crowd(scene: &Scene, path: &str, count: usize) -> Vec<Response<Bytes>> {
    within(join_all((0..count).map(|_| scene.get(path)))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_requests_on_an_expired_token_cause_one_refresh() {
    let scene = Scene::expired().await;
    scene.world.api().require_login(true);
    let answers = crowd(&scene, "/models", 100).await;
    assert_eq!(statuses(&answers), [200]);
    let issuer = scene.world.issuer();
    assert_eq!((issuer.posts(), issuer.refreshes(), issuer.reuses()), (1, 1, 0));
    let stale = scene.login.as_ref().unwrap().access.masked();
    assert!(scene.world.api().seen().iter().all(|seen| {
        let sent = seen.headers["authorization"].to_str().unwrap();
        valetkey::secret::Secret::new(sent.trim_start_matches("Bearer ")).masked() != stale
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_401_is_repaired_by_one_refresh_and_one_replay() {
    for (size, status) in [(0, 200), (200 * 1024, 200), (2 * 1024 * 1024, 401)] {
        let scene = Scene::usual().await;
        let body = vec![b'x'; size];
        let path = format!("{CODEX}/401-until-refreshed");
        let request = client::post(&path, body.clone());
        let answer = within(scene.client.send(Visit::to(CHATGPT, HTTP1), request)).await.unwrap();
        let answer = within(gather(answer)).await.unwrap();
        assert_eq!(answer.status(), status, "{size} bytes");
        assert_eq!(scene.world.issuer().refreshes(), 1, "{size} bytes");
        let seen = scene.world.api().seen();
        assert_eq!(seen.len(), if status == 200 { 2 } else { 1 }, "{size} bytes");
        assert!(seen.iter().all(|seen| seen.request.bytes == size as u64), "{size}: {seen:?}");
        let first = &seen[0].request.sha256;
        assert!(seen.iter().all(|seen| seen.request.sha256 == *first), "the same body twice");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_always_answers_401_causes_one_refresh_and_the_login_lives() {
    let scene = Scene::usual().await;
    for _ in 0..10 {
        let answers = crowd(&scene, "/always-401", 100).await;
        assert_eq!(statuses(&answers), [401]);
        assert!(answers.iter().all(|it| !it.headers().contains_key("x-valetkey-error")));
    }
    let issuer = scene.world.issuer();
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
    scene.world.api().require_login(true);
    assert_eq!(scene.get("/models").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_outlives_all_who_wait_for_it() {
    let scene = Scene::expired().await;
    let issuer = scene.world.issuer();
    issuer.script(Fault::Hold);
    let waiting = async {
        within(issuer.wait_for_refreshes(1)).await;
    };
    // All clients hang up as soon as the refresh token has been redeemed.
    tokio::select! {
        () = waiting => {}
        _ = crowd(&scene, "/models", 20) => panic!("answered without a token"),
    }
    issuer.release();
    within(scene.refreshed()).await;
    let old = scene.login.as_ref().unwrap().refresh.fingerprint();
    let cached = scene.cached()["tokens"]["refresh_token"].as_str().unwrap().to_owned();
    assert_ne!(valetkey::secret::Secret::new(cached).fingerprint(), old);
    scene.world.api().require_login(true);
    assert_eq!(scene.get("/models").await.status(), 200);
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn issuer_trouble_is_one_clear_refusal_and_no_storm() {
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Garbage,
        Fault::RateLimited(7),
        Fault::DropBefore,
        Fault::DropAfter,
    ];
    for fault in faults {
        let scene = Scene::expired().await;
        scene.world.issuer().script(fault);
        let answers = crowd(&scene, "/models", 30).await;
        for answer in &answers {
            assert_eq!(refusal(answer), (503, "issuer_unavailable".to_owned()), "{fault:?}");
            assert!(answer.headers().contains_key("retry-after"), "{fault:?}");
        }
        assert_eq!(scene.world.issuer().posts(), 1, "{fault:?}");
        assert!(scene.world.api().seen().is_empty(), "an expired token was sent: {fault:?}");
        scene.assert_alive().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_issuers_own_word_ends_a_login() {
    let scene = Scene::expired().await;
    scene.world.issuer().script(Fault::Refuse("refresh_token_reused"));
    let answer = scene.get("/models").await;
    assert_eq!(refusal(&answer), (403, "login_required".to_owned()));
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    assert!(text.contains("because your refresh token was already used"), "{text}");
    assert_eq!(refusal(&scene.get("/models").await).0, 403);
    assert_eq!(scene.world.issuer().posts(), 1, "a dead login is not asked for again");
    // Whoever signs in again brings it back to life.
    let home = scene.home.path().join(".codex");
    scene.world.issuer().write_auth_json(&home, time::Duration::hours(1)).unwrap();
    let alive = async {
        while scene.get("/models").await.status() != 200 {
            tokio::task::yield_now().await;
        }
    };
    within(alive).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_write_is_picked_up_and_what_is_unknown_survives() {
    let scene = Scene::expired().await;
    let mut cached = scene.cached();
    cached["from_the_future"] = Value::from(vec![1, 2, 3]);
    cached["tokens"]["also_new"] = "kept".into();
    fs::write(scene.auth_json(), format!("{cached:#}")).unwrap();
    assert_eq!(scene.get("/models").await.status(), 200);
    let now = scene.cached();
    assert_eq!(now["from_the_future"], cached["from_the_future"]);
    assert_eq!(now["tokens"]["also_new"], "kept");
    assert_eq!(now["tokens"]["oauth_provenance"], cached["tokens"]["oauth_provenance"]);
    assert_ne!(now["tokens"]["access_token"], cached["tokens"]["access_token"]);
    assert_ne!(now["last_refresh"], cached["last_refresh"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_changes_its_kind_changes_what_is_intercepted() {
    let scene = Scene::usual().await;
    assert_eq!(scene.get("/models").await.status(), 200);
    let seen = |host: &str| {
        let mut all = scene.world.api().seen().into_iter();
        all.rfind(|seen| seen.host == host)
            .is_some_and(|it| it.headers.contains_key("authorization"))
    };
    assert!(seen("chatgpt.com"));
    scene.world.api().clear();
    let key = "vk-canary-openai-api-key";
    fs::write(
        scene.auth_json(),
        format!("{{\"auth_mode\": \"apikey\", \"OPENAI_API_KEY\": \"{key}\"}}"),
    )
    .unwrap();
    let signed_in = async {
        loop {
            let visit = Visit::to("api.openai.com:443", HTTP2);
            let answer = scene.client.get(visit, "/v1/models").await.unwrap();
            if answer.status() == 200 && seen("api.openai.com") {
                break;
            }
        }
    };
    within(signed_in).await;
    // The other host is tunnelled now: its own certificate, and no credential.
    scene.world.api().clear();
    let _whatever = scene.get("/models").await;
    assert!(!seen("chatgpt.com"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_signed_in_is_refused_with_what_to_type() {
    let scene = Scene::start(Options { lifetime: None, ..Options::default() }).await;
    let answer = scene.get("/models").await;
    assert_eq!(refusal(&answer), (403, "login_required".to_owned()));
    assert!(String::from_utf8_lossy(answer.body()).contains("valetkey login"));
    assert!(scene.world.api().seen().is_empty());
    for corrupt in ["{", "[]", "{\"tokens\": 7}", "\0\0\0"] {
        fs::write(scene.auth_json(), corrupt).unwrap();
        let refused = async {
            loop {
                let (status, code) = refusal(&scene.get("/models").await);
                assert!([403, 503].contains(&status));
                if code == "store_unavailable" {
                    break;
                }
            }
        };
        within(refused).await;
        assert_eq!(fs::read_to_string(scene.auth_json()).unwrap(), corrupt, "it is left alone");
    }
    scene.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_changed_is_read_again_after_a_401() {
    let scene = Scene::usual().await;
    scene.world.api().require_login(true);
    scene.assert_alive().await;
    let visit = Visit::to(EXAMPLE, HTTP1);
    let path = "/v1/401-until-refreshed";
    assert_eq!(
        scene.client.get(visit, path).await.unwrap().status(),
        401,
        "nothing newer is there"
    );
    let rotated = "vk-canary-rotated-key";
    scene.world.api().accept(valetkey::secret::Secret::new(rotated));
    fs::write(scene.home.path().join("example.key"), rotated).unwrap();
    // A file is read once a second at most, whatever number of 401s come.
    scene.clock.advance(time::Duration::seconds(2));
    assert_eq!(scene.client.get(visit, path).await.unwrap().status(), 200);
    let seen = scene.world.api().seen();
    let last = seen.last().unwrap().headers["authorization"].to_str().unwrap().to_owned();
    assert_eq!(last, format!("Bearer {rotated}"));
}

/// Codex refreshes by itself: it sends the refresh token that it shares with us.
async fn refresh_as_a_client(scene: &Scene, token: &str) -> Response<Bytes> {
    let body = serde_json::json!({ "client_id": "app", "grant_type": "refresh_token", "refresh_token": token });
    let mut request = client::post("/oauth/token", body.to_string());
    let json = http::HeaderValue::from_static("application/json");
    request.headers_mut().insert("content-type", json);
    let answer = scene.client.send(Visit::to("auth.openai.com:443", HTTP1), request).await.unwrap();
    gather(answer).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_own_refresh_of_the_shared_login_is_ours() {
    let scene = Scene::usual().await;
    let token =
        |scene: &Scene| scene.cached()["tokens"]["refresh_token"].as_str().unwrap().to_owned();
    let old = token(&scene);
    let answers = within(join_all((0..20).map(|_| refresh_as_a_client(&scene, &old)))).await;
    assert_eq!(statuses(&answers), [200]);
    let issuer = scene.world.issuer();
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
    for answer in &answers {
        let body: Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(body["refresh_token"].as_str(), Some(&*token(&scene)), "the real, current set");
    }
    // The generation before is answered with the current set too, without another refresh.
    assert_eq!(refresh_as_a_client(&scene, &old).await.status(), 200);
    assert_eq!(issuer.refreshes(), 1);
    // Somebody else's passes through, and the issuer judges it.
    let foreign = issuer.login(time::Duration::hours(1));
    let foreign: Value = serde_json::from_str(&foreign.auth_json()).unwrap();
    let answer =
        refresh_as_a_client(&scene, foreign["tokens"]["refresh_token"].as_str().unwrap()).await;
    assert_eq!(answer.status(), 200);
    assert_eq!((issuer.refreshes(), issuer.reuses()), (2, 0));
    assert_eq!(refresh_as_a_client(&scene, "nobodys").await.status(), 401);
    // One that cannot be read might be ours.
    let mut encoded = client::post("/oauth/token", "whatever");
    encoded.headers_mut().insert("content-encoding", http::HeaderValue::from_static("gzip"));
    let visit = Visit::to("auth.openai.com:443", HTTP1);
    let answer = gather(scene.client.send(visit, encoded).await.unwrap()).await.unwrap();
    assert_eq!(refusal(&answer), (400, "bad_request".to_owned()));
    scene.world.api().require_login(true);
    assert_eq!(scene.get("/models").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_logout_is_passed_on_and_ends_the_login() {
    let scene = Scene::usual().await;
    assert_eq!(scene.get("/models").await.status(), 200);
    let token = scene.cached()["tokens"]["refresh_token"].as_str().unwrap().to_owned();
    let body = serde_json::json!({ "token": token, "token_type_hint": "refresh_token" });
    let mut request = client::post("/oauth/revoke", body.to_string());
    let json = http::HeaderValue::from_static("application/json");
    request.headers_mut().insert("content-type", json);
    let visit = Visit::to("auth.openai.com:443", HTTP2);
    let answer = gather(scene.client.send(visit, request).await.unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(scene.world.issuer().revokes(), 1);
    assert_eq!(refusal(&scene.get("/models").await), (403, "login_required".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_unclear_answer_a_401_does_not_send_the_token_again() {
    for fault in [Fault::DropAfter, Fault::Status(502)] {
        let scene = Scene::usual().await;
        let issuer = scene.world.issuer();
        issuer.script(fault);
        assert_eq!(scene.get("/always-401").await.status(), 401);
        assert_eq!(issuer.posts(), 1);
        for _ in 0..5 {
            scene.clock.advance(time::Duration::seconds(90));
            assert_eq!(scene.get("/always-401").await.status(), 401);
        }
        assert_eq!((issuer.posts(), issuer.reuses()), (1, 0), "{fault:?}");
        scene.world.api().require_login(true);
        assert_eq!(scene.get("/models").await.status(), 200, "the access token lives");
    }
}
