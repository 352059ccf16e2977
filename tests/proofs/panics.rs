//! A panic ends the connection that it was in, is counted and not quoted, and costs nobody else anything.

use std::fs;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use valetkey::sandbox::client::{HTTP1, HTTP2, Visit};

use super::rounds;
use super::served::Serving;
use super::support::{LIMIT, Scene};

const EXAMPLE: &str = "api.example.com:443";
const CHATGPT: &str = "chatgpt.com:443";
const TUNNELLED: &str = "other.example.com:443";

/// Descriptors that a process has open.
fn open_descriptors(serving: &Serving) -> usize {
    fs::read_dir(format!("/proc/{}/fd", serving.pid())).unwrap().count()
}

/// The panics that `status` tells of, once they are so many: the word is left after the connection has ended.
async fn counted(scene: &Scene, expected: u64) {
    let told = async {
        loop {
            let status = scene.typed(&["status", "--json"]).await;
            let status: serde_json::Value = serde_json::from_str(&status.out).unwrap();
            if status["proxy"]["panics"] == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, told).await.expect("status did not tell of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_in_an_exchange_ends_its_connection() {
    let scene = Scene::usual().await.with("VALETKEY_FAULT", "exchange=panic");
    let mut serving = Serving::start(&scene).await;
    let client = serving.client_in(&scene);
    let mut tunnel = client.greet(Visit::to(TUNNELLED, HTTP1)).await.unwrap();
    let before = open_descriptors(&serving);
    let rounds = rounds(300, 30_000);
    for round in 0..rounds {
        let alpn = if round % 2 == 0 { HTTP1 } else { HTTP2 };
        let asked = client.get(Visit::to(EXAMPLE, alpn), "/v1/x");
        let answer = tokio::time::timeout(LIMIT, asked).await.expect("the client was left to wait");
        assert!(answer.is_err(), "{answer:?}");
        let line = serving.hear("a mistake of valetkey's own").await;
        let counted = line.contains(&format!("count={}", round + 1));
        assert!(counted && line.contains("src/fault.rs"), "{line}");
    }
    assert!(scene.world.api().seen().is_empty(), "nothing was sent on");

    // A tunnel that was open before still carries.
    tunnel
        .write_all(b"GET /v1/x HTTP/1.1\r\nHost: other.example.com\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _end = tokio::time::timeout(LIMIT, tunnel.read_to_end(&mut answer)).await.unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("the sandbox says"), "{answer:?}");
    drop(tunnel);
    counted(&scene, rounds as u64).await;
    let back = async {
        while open_descriptors(&serving) > before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, back).await.expect("descriptors are leaked");

    serving.signal(rustix::process::Signal::TERM);
    let last = serving.hear(&format!("mistakes of valetkey's own while it ran: {rounds}")).await;
    assert!(last.starts_with("warning"), "{last}");
    assert_eq!(serving.ended().await, Some(0));
    println!("{rounds} panics, each the end of one connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_says_is_in_no_log() {
    let scene = Scene::usual().await.with("VALETKEY_FAULT", "exchange=panic");
    let scene = scene.with("VALETKEY_LOG", "trace");
    let mut serving = Serving::start(&scene).await;
    let answer = serving.client().get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await;
    assert!(answer.is_err());
    serving.signal(rustix::process::Signal::TERM);
    let mut all = Vec::new();
    while let Some(line) = serving.next_line().await {
        all.push(line);
    }
    let log = all.join("\n");
    assert!(log.contains("a mistake of valetkey's own"), "{log}");
    assert!(!log.contains("as a proof has asked"), "the reason is quoted: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_while_accepting_costs_one_client() {
    let scene = Scene::usual().await.with("VALETKEY_FAULT", "accepting#1=panic");
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    let first = tokio::time::timeout(LIMIT, client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x")).await;
    assert!(first.expect("it was left to wait").is_err());
    let next = tokio::time::timeout(LIMIT, client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x")).await;
    assert_eq!(next.expect("nobody accepts any more").unwrap().status(), 200);
    counted(&scene, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_in_a_refresh_is_an_answer_and_the_next_request_refreshes() {
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    let scene = scene.with("VALETKEY_FAULT", "refreshing#1=panic");
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    let get = async || {
        let asked = client.get(Visit::to(CHATGPT, HTTP1), "/backend-api/codex/models");
        tokio::time::timeout(LIMIT, asked).await.expect("it was left to wait").unwrap().status()
    };
    let mut answers = vec![get().await];
    while answers.last().is_some_and(|status| *status != 200) && answers.len() < 30 {
        answers.push(get().await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("answers: {answers:?}");
    assert_eq!(answers.last().unwrap().as_u16(), 200);
    assert_eq!(scene.world.issuer().refreshes(), 1);
    counted(&scene, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_while_the_passes_are_followed_leaves_nobody_in() {
    let scene = Scene::usual().await.with("VALETKEY_FAULT", "following#1=panic");
    scene.configure(&format!(
        "[[listeners]]\naddress = \"127.0.0.1:0\"\nrequire_pass = true\n{}",
        scene.world.upstream_toml()
    ));
    let serving = Serving::start_with(&scene, &[]).await;
    let made = scene.typed(&["pass", "new", "ci", "--tunnel", "--allow-private"]).await;
    let pass = made.out.trim().to_owned();
    let shown = format!("Bearer {pass}").parse().unwrap();
    let client = serving.client_in(&scene).showing(shown);
    let mut tunnel = client.tunnel(TUNNELLED).await.unwrap();
    counted(&scene, 1).await;
    assert_eq!(scene.typed(&["pass", "revoke", "ci"]).await.status, 0);
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(LIMIT, tunnel.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "a pass that was revoked is not followed any more");
}
