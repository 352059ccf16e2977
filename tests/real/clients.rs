//! curl, git, wget, Python and Node: each is signed in, and none holds a credential.

use std::fs;

use http::Version;
use tokio::process::Command;

use super::support::{Scene, node_modules, program, python};

const MODELS: &str = "https://chatgpt.com/backend-api/codex/models";

#[tokio::test(flavor = "multi_thread")]
async fn curl() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    for version in ["--http1.1", "--http2"] {
        let done = scene.run_ok(&[&curl, "-sS", "--fail", "-v", version, MODELS]).await;
        assert!(done.out.contains("present and current"), "{done:?}");
        assert!(!done.err.to_lowercase().contains("> authorization"), "{done:?}");
        scene.assert_no_secret("curl's own account", &(done.out + &done.err));
    }
    scene.seen_signed_in();
    scene.world.api().clear();

    let body = "x".repeat(300_000);
    fs::write(scene.path("body"), &body).unwrap();
    let upload = "https://api.example.com/v1/upload";
    let done = scene.run_ok(&[&curl, "-sS", "--fail", "--data-binary", "@body", upload]).await;
    assert!(done.out.contains("300000"), "{done:?}");
    let expect = ["-H", "Expect: 100-continue", "-T", "body", "--http1.1", upload];
    let done = scene.run_ok(&[&[&*curl, "-sS", "--fail", "-v"][..], &expect].concat()).await;
    assert!(done.err.contains("< HTTP/1.1 100 Continue"), "{done:?}");
    let refused =
        ["-o", "/dev/null", "-w", "%{http_code}", "-H", "Expect: 100-continue", "-T", "body"];
    let url = "https://api.example.com/v1/expect";
    let done = scene.run(&[&[&*curl, "-sS", "--http1.1"][..], &refused, &[url]].concat()).await;
    assert_eq!(done.out, "417", "{done:?}");
    let done = scene.run_ok(&[&curl, "-sS", "-I", "https://api.example.com/v1/bytes/12345"]).await;
    assert!(done.out.contains("content-length: 12345"), "{done:?}");

    let done = scene
        .run_ok(&[&curl, "-sSN", "https://chatgpt.com/backend-api/codex/sse?n=4&every_ms=20"])
        .await;
    assert_eq!(done.out.matches("event: tick").count(), 4, "{done:?}");
    let elsewhere = "https://api.example.com/v1/redirect?to=https://other.example.com/v1/x";
    let done = scene.run(&[&curl, "-sS", "-L", "-w", "%{http_code}", elsewhere]).await;
    assert!(done.out.ends_with("401"), "the other host gets no credential: {done:?}");
    let (others, ours): (Vec<_>, Vec<_>) =
        scene.world.api().seen().into_iter().partition(|seen| seen.host == "other.example.com");
    assert!(
        others.iter().all(|seen| !seen.headers.contains_key("authorization")) && others.len() == 1
    );
    assert!(ours.iter().all(|seen| seen.headers.contains_key("authorization")));
}

#[tokio::test(flavor = "multi_thread")]
async fn git_clone() {
    let Some(git) = program("git") else { return };
    let scene = Scene::usual().await;
    let script = "set -e; git init -q work; cd work; echo hello > file; git add file; \
                  git -c user.name=t -c user.email=t@example.com commit -qm one; cd ..; \
                  git clone -q --bare work repo.git; git -C repo.git update-server-info";
    let made =
        Command::new("sh").args(["-c", script]).current_dir(scene.home.path()).output().await;
    assert!(made.as_ref().unwrap().status.success(), "{made:?}");
    scene.world.api().serve_dir("/repo.git/", scene.path("repo.git"));
    // The proxy of the company, past which nobody got.
    fs::write(scene.path(".gitconfig"), "[http]\nproxy = http://127.0.0.1:9\n").unwrap();
    let clone = "https://api.example.com/repo.git";
    scene.run_ok(&[&git, "-c", "credential.helper=", "clone", "-q", clone, "cloned"]).await;
    assert_eq!(fs::read_to_string(scene.path("cloned/file")).unwrap(), "hello\n");
    scene.seen_signed_in();
}

#[tokio::test(flavor = "multi_thread")]
async fn wget() {
    let Some(wget) = program("wget") else { return };
    let scene = Scene::usual().await;
    fs::write(scene.path(".wgetrc"), "header = X-Theirs: still here").unwrap();
    let done = scene.run_ok(&[&wget, "-qO-", "https://api.example.com/v1/things"]).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    let seen = scene.seen_signed_in();
    assert_eq!(seen[0].headers["x-theirs"], "still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn python_requests_and_websockets() {
    let Some(python) = python() else { return };
    let scene = Scene::usual().await;
    let script = r#"
import asyncio, os, requests, websockets
base = "https://chatgpt.com/backend-api/codex"
answer = requests.get(base + "/models")
assert answer.status_code == 200, answer.text
assert "Authorization" not in answer.request.headers
answer = requests.post(base + "/upload", data=b"x" * 100000)
assert answer.json()["bytes"] == 100000, answer.text
with requests.get(base + "/sse?n=3&every_ms=10", stream=True) as events:
    assert sum(line == b"event: tick" for line in events.iter_lines()) == 3

async def echo():
    async with websockets.connect("wss://chatgpt.com/backend-api/codex/ws") as socket:
        await socket.send("hello")
        assert await socket.recv() == "hello"
        await socket.send("y" * 200000)
        assert len(await socket.recv()) == 200000
asyncio.run(echo())
print("done")
"#;
    let done = scene.run_ok(&[&python, "-c", script]).await;
    assert_eq!(done.out, "done\n");
    let seen = scene.seen_signed_in();
    assert!(seen.iter().any(|seen| seen.path.ends_with("/ws") && seen.version == Version::HTTP_11));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_undici() {
    let (Some(node), Some(modules)) = (program("node"), node_modules()) else { return };
    let scene = Scene::usual().await;
    let script = format!(
        r#"
const {{ EnvHttpProxyAgent, fetch, setGlobalDispatcher, WebSocket }} = require("{modules}/undici");
setGlobalDispatcher(new EnvHttpProxyAgent());
(async () => {{
  const base = "https://chatgpt.com/backend-api/codex";
  const answer = await fetch(base + "/models");
  if (answer.status !== 200) throw new Error(await answer.text());
  const posted = await fetch(base + "/upload", {{ method: "POST", body: "z".repeat(50000) }});
  if ((await posted.json()).bytes !== 50000) throw new Error("upload");
  const events = await (await fetch(base + "/sse?n=3&every_ms=10")).text();
  if (events.split("event: tick").length !== 4) throw new Error("events");
  console.log("done");
  process.exit(0);
}})().catch((error) => {{ console.error(error); process.exit(1); }});
"#
    );
    let done = scene.run_ok(&[&node, "-e", &script]).await;
    assert_eq!(done.out, "done\n");
    scene.seen_signed_in();
}
