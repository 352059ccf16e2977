//! The audit as its owner reads it: a line for whatever has ended, and a chain that shows what was changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio_tungstenite::tungstenite::Message;
use valetkey::sandbox::client::{HTTP1, HTTP2, Visit, get, post};

use super::served::Serving;
use super::support::{KEY, LIMIT, Scene, fed};

const EXAMPLE: &str = "api.example.com:443";

async fn scene(lifetime: time::Duration, listener: &str) -> (Scene, PathBuf) {
    let scene = Scene::new(lifetime).await;
    let audit = "[audit]\nto = \"file\"\nfile = \"logs/audit.jsonl\"\n";
    let closed = "[[rules]]\nname = \"closed\"\nhost = \"api.example.com\"\npaths = [\"/v1/closed/\"]\naction = \"refuse\"\n";
    scene.configure(&[closed, audit, listener, &scene.world.upstream_toml()].concat());
    let audit = scene.path(".config/valetkey/logs/audit.jsonl");
    (scene, audit)
}

fn lines(audit: &Path) -> Vec<Value> {
    let text = fs::read_to_string(audit).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The first line for which this holds, which may still be on its way.
async fn line(audit: &Path, is_it: impl Fn(&Value) -> bool) -> Value {
    let looking = async {
        loop {
            if let Some(line) = lines(audit).into_iter().find(|line| is_it(line)) {
                return line;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(LIMIT, looking).await {
        Ok(line) => line,
        Err(_) => panic!("no such line among {:#?}", lines(audit)),
    }
}

fn assert_has(line: &Value, expected: Value) {
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&line[name], value, "{name} of {line:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_exchange_has_its_line() {
    let (scene, audit) = scene(time::Duration::minutes(-1), "").await;
    let mut serving = Serving::start(&scene).await;
    let client = serving.client_in(&scene);
    let uid = rustix::process::geteuid().as_raw();
    for (alpn, path) in [(HTTP1, "/v1/bytes/1000?secret=in-the-query"), (HTTP2, "/v1/bytes/2000")] {
        client.get(Visit::to(EXAMPLE, alpn), path).await.unwrap();
        let path = path.split('?').next().unwrap();
        let line = line(&audit, |line| line["path"] == path).await;
        let size: u64 = path.rsplit('/').next().unwrap().parse().unwrap();
        assert_has(
            &line,
            json!({
                "event": "exchange", "uid": uid, "rule": "api.example.com", "credential": "example",
                "method": "GET", "host": EXAMPLE, "status": 200, "up": 0, "down": size, "outcome": "ok",
            }),
        );
    }
    let mut connection = client.open(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let answer = connection.send(post("/v1/echo", vec![b'x'; 70_000])).await.unwrap();
    answer.into_body().collect().await.unwrap();
    let echo = line(&audit, |line| line["path"] == "/v1/echo").await;
    assert_has(&echo, json!({ "method": "POST", "up": 70_000, "down": 70_000, "outcome": "ok" }));

    client.get(Visit::to(EXAMPLE, HTTP1), "/v1/closed/x").await.unwrap();
    let closed = line(&audit, |line| line["path"] == "/v1/closed/x").await;
    assert_has(
        &closed,
        json!({ "rule": "closed", "credential": null, "status": 403, "outcome": "target_forbidden" }),
    );

    // A stream that its client leaves, and a body that the upstream cuts.
    scene.world.api().release_event();
    let mut stream = client.send(Visit::to(EXAMPLE, HTTP1), get("/v1/sse?n=3")).await.unwrap();
    stream.frame().await.unwrap().unwrap();
    drop(stream);
    let left = line(&audit, |line| line["path"] == "/v1/sse").await;
    assert_has(&left, json!({ "status": 200, "outcome": "cut" }));
    assert!(left["down"].as_u64().unwrap() > 0);
    // Whether its head has come through before is chance.
    let answer = client.get(Visit::to(EXAMPLE, HTTP1), "/v1/reset-mid-body").await;
    let cut = line(&audit, |line| line["path"] == "/v1/reset-mid-body").await;
    match answer {
        Ok(_) => assert_has(&cut, json!({ "status": 502, "outcome": "upstream_closed" })),
        Err(_) => assert_has(&cut, json!({ "status": 200, "outcome": "broken_off" })),
    }
    client.get(Visit::to(EXAMPLE, HTTP2), "/v1/close-before-head").await.unwrap();
    let none = line(&audit, |line| line["path"] == "/v1/close-before-head").await;
    assert_eq!(none["status"], 502, "{none:#}");
    assert!(none["outcome"].as_str().unwrap().starts_with("upstream_"), "{none:#}");

    // Plain HTTP in a tunnel that is looked into.
    let mut tunnel = client.tunnel(EXAMPLE).await.unwrap();
    tunnel.write_all(b"GET /v1/cleartext HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let cleartext = line(&audit, |line| line["path"] == "/v1/cleartext").await;
    assert_has(
        &cleartext,
        json!({ "uid": uid, "host": EXAMPLE, "status": 403, "outcome": "cleartext_refused" }),
    );

    // The login has expired: one refresh for the first that asks.
    client.get(Visit::to("chatgpt.com:443", HTTP1), "/backend-api/codex/models").await.unwrap();
    let ended = line(&audit, |line| line["event"] == "refresh_ended").await;
    assert_has(&ended, json!({ "credential": "openai", "detail": "redeemed" }));
    assert!(lines(&audit).iter().any(|line| line["event"] == "refresh_begun"));

    // Nothing of what is looked into is a line of its own.
    serving.signal(Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    let all = lines(&audit);
    let exchanges = all.iter().filter(|line| line["event"] == "exchange").count();
    assert_eq!(exchanges, 9, "{all:#?}");
    scene.assert_no_secret("the audit", &fs::read_to_string(&audit).unwrap());
    assert!(!fs::read_to_string(&audit).unwrap().contains("in-the-query"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_open_has_its_line_when_it_ends() {
    let (scene, audit) = scene(time::Duration::hours(1), "").await;
    let mut serving = Serving::start(&scene).await;
    let client = serving.client_in(&scene);
    let tls = client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let url = "wss://api.example.com/v1/ws";
    let (mut socket, _) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
    socket.send(Message::text("hello")).await.unwrap();
    socket.next().await.unwrap().unwrap();
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}
    let ws = line(&audit, |line| line["event"] == "websocket").await;
    assert_has(
        &ws,
        json!({ "path": "/v1/ws", "status": 101, "rule": "api.example.com", "credential": "example", "outcome": "ok" }),
    );
    // Head, mask and payload of the message and of the Close.
    assert!(ws["up"].as_u64().unwrap() >= 11 && ws["down"].as_u64().unwrap() >= 7, "{ws:#}");

    client.get(Visit::to("other.example.com:443", HTTP1), "/v1/x").await.unwrap();
    let tunnel = line(&audit, |line| line["event"] == "tunnel").await;
    assert_has(
        &tunnel,
        json!({ "method": "CONNECT", "host": "other.example.com:443", "path": null, "rule": null, "status": 200 }),
    );
    let moved = ["up", "down"].map(|way| tunnel[way].as_u64().unwrap());
    assert!(moved.iter().all(|bytes| *bytes > 500), "at least the handshakes: {tunnel:#}");

    // One that is open when the proxy ends.
    let tls = client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
    let (mut socket, _) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
    serving.signal(Signal::TERM);
    while let Some(Ok(_)) = socket.next().await {}
    assert_eq!(serving.ended().await, Some(0));
    assert!(
        lines(&audit).iter().any(|line| line["outcome"] == "going_away"),
        "{:#?}",
        lines(&audit)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_let_in_by_a_pass_is_named_and_who_is_not_too() {
    let listener = "[[listeners]]\naddress = \"127.0.0.1:0\"\nrequire_pass = true\n";
    let (scene, audit) = scene(time::Duration::hours(1), listener).await;
    let pass = scene.typed(&["pass", "new", "ci"]).await;
    assert_eq!(pass.status, 0, "{pass:#?}");
    let serving = Serving::start_with(&scene, &[]).await;
    let client = serving.client();
    let shown = format!("Bearer {}", pass.out.trim()).parse().unwrap();
    client.showing(shown).get(Visit::to(EXAMPLE, HTTP1), "/v1/bytes/1").await.unwrap();
    let by_pass = line(&audit, |line| line["path"] == "/v1/bytes/1").await;
    assert_has(&by_pass, json!({ "pass": "ci", "status": 200, "outcome": "ok" }));
    client.get(Visit::to(EXAMPLE, HTTP1), "/v1/bytes/2").await.unwrap_err();
    let refused = line(&audit, |line| line["outcome"] == "pass_required").await;
    let uid = rustix::process::geteuid().as_raw();
    assert_has(
        &refused,
        json!({ "method": "CONNECT", "host": EXAMPLE, "status": 407, "uid": uid, "pass": null }),
    );
    assert_eq!(scene.typed(&["pass", "revoke", "ci"]).await.status, 0);
    let events: Vec<Value> = lines(&audit).iter().map(|line| line["event"].clone()).collect();
    assert!(events.contains(&json!("pass_made")) && events.contains(&json!("pass_revoked")));
    assert!(!fs::read_to_string(&audit).unwrap().contains(pass.out.trim()));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_who_signed_in_and_out_and_that_nothing_was_changed() {
    let (scene, audit) = scene(time::Duration::hours(1), "").await;
    assert_eq!(scene.typed(&["logout"]).await.status, 0);
    assert_eq!(scene.typed(&["logout"]).await.status, 0);
    let signed_in = fed(scene.valetkey(&["login", "--with-api-key"]), KEY).await;
    assert_eq!(signed_in.status, 0, "{signed_in:#?}");
    assert_eq!(scene.typed(&["token"]).await.out.trim(), KEY);
    let events: Vec<Value> = lines(&audit).iter().map(|line| line["event"].clone()).collect();
    let expected = ["file", "logout", "login", "handed_out"];
    assert_eq!(events, expected, "there was one login to sign out of");

    let well = scene.typed(&["audit", "verify"]).await;
    assert_eq!(well.status, 0, "{well:#?}");
    let expected = format!("sound   {}  lines 1 to 4\nhead    line 4  ", audit.display());
    assert!(well.out.starts_with(&expected), "{well:#?}");
    let head = well.out.trim().rsplit(' ').next().unwrap();
    let kept = scene.typed(&["audit", "verify", "--head", head]).await;
    assert!(
        kept.status == 0 && kept.err.contains("the head that you have kept is there"),
        "{kept:#?}"
    );
    let text = fs::read_to_string(&audit).unwrap();
    let name = audit.to_str().unwrap();
    // What no chain shows.
    let cut = text.lines().take(3).map(|line| format!("{line}\n")).collect::<String>();
    fs::write(&audit, cut).unwrap();
    assert_eq!(scene.typed(&["audit", "verify", name]).await.status, 0);
    let gone = scene.typed(&["audit", "verify", "--head", head]).await;
    assert!(gone.status == 1 && gone.err.contains("no line has this head"), "{gone:#?}");
    // What one does.
    fs::write(&audit, text.replace("\"event\":\"logout\"", "\"event\":\"dinner\"")).unwrap();
    let changed = scene.typed(&["audit", "verify"]).await;
    assert_eq!(changed.status, 1, "{changed:#?}");
    let expected = format!(
        "error: {name}, line 3: it does not follow on the line before it: one of the two was changed\nhint: "
    );
    assert!(changed.err.contains(&expected), "{changed:#?}");
    assert!(changed.out.contains("broken  "), "{changed:#?}");
    // The line before it may be the one.
    assert!(
        changed.err.contains("hint: but for the last one, the lines before it"),
        "{changed:#?}"
    );
    fs::write(&audit, "").unwrap();
    let emptied = scene.typed(&["audit", "verify"]).await;
    assert!(
        emptied.status == 1 && emptied.err.contains("error: there is no line\nhint: "),
        "{emptied:#?}"
    );
    let folder = scene.typed(&["audit", "verify", "."]).await;
    assert!(folder.status == 1 && folder.err.starts_with("error: .: "), "{folder:#?}");
    let wrong = scene.typed(&["audit", "verify", "--head", "nonsense"]).await;
    assert_eq!(wrong.status, 2, "{wrong:#?}");

    // A file that cannot be written keeps a proxy from starting, and undoes nothing that a command has done.
    assert_eq!(scene.typed(&["check"]).await.status, 0);
    fs::remove_file(&audit).unwrap();
    let none = scene.typed(&["audit", "verify"]).await;
    assert!(none.status == 1 && none.err.contains("hint: it begins when"), "{none:#?}");
    assert_eq!(scene.typed(&["check"]).await.status, 0);
    assert!(!audit.exists(), "whoever checks makes nothing");
    fs::create_dir(&audit).unwrap();
    let checked = scene.typed(&["check"]).await;
    assert_eq!(checked.status, 1, "{checked:#?}");
    assert!(checked.err.contains("error: the audit cannot be written: "), "{checked:#?}");
    let refused = scene.typed(&["serve", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(refused.status, 1, "{refused:#?}");
    assert!(refused.err.contains("error: the audit cannot be written: "), "{refused:#?}");
    let out = scene.typed(&["logout"]).await;
    assert!(out.status == 0 && out.err.contains("warning:"), "{out:#?}");
    scene.configure(&scene.world.upstream_toml());
    let off = scene.typed(&["audit", "verify"]).await;
    assert!(off.status == 1 && off.err.contains("no audit is written into a file"), "{off:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_switched_on_while_a_proxy_runs() {
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    let client = serving.client();
    client.get(Visit::to(EXAMPLE, HTTP1), "/v1/before").await.unwrap();
    scene.configure(&["[audit]\nto = \"file\"\n", &scene.world.upstream_toml()].concat());
    serving.hear("is in force").await;
    client.get(Visit::to(EXAMPLE, HTTP1), "/v1/after").await.unwrap();
    let audit = scene.path(".local/state/valetkey/audit.jsonl");
    line(&audit, |line| line["path"] == "/v1/after").await;
    assert!(!fs::read_to_string(&audit).unwrap().contains("/v1/before"));
}
