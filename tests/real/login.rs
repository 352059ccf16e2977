//! One login that many share: processes, programs, and a program that refreshes by itself.

use std::fs;

use serde_json::Value;

use super::support::{Scene, done, program, python};

fn cached(scene: &Scene) -> Value {
    serde_json::from_slice(&fs::read(scene.path(".codex/auth.json")).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn four_runs_with_a_hundred_requests_each_cause_one_refresh() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    let url = "https://chatgpt.com/backend-api/codex/models?n=[1-100]";
    let fetch = [
        "run",
        "--",
        &curl,
        "-sS",
        "--parallel",
        "--parallel-max",
        "100",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}\n",
        url,
    ];
    // Nothing is shared but the login.
    let children: Vec<_> = (0..4)
        .map(|number| {
            let home = scene.path(&format!("home-{number}"));
            fs::create_dir_all(home.join(".config/valetkey")).unwrap();
            let config = scene.path(".config/valetkey/config.toml");
            fs::copy(config, home.join(".config/valetkey/config.toml")).unwrap();
            let mut command = scene.valetkey(&fetch);
            command.env("HOME", &home).env("XDG_RUNTIME_DIR", home.join("run"));
            command.env("CODEX_HOME", scene.path(".codex"));
            command.spawn().unwrap()
        })
        .collect();
    for child in children {
        let done = done(child).await;
        assert_eq!(done.status, 0, "{done:?}");
        assert_eq!(done.out.lines().filter(|line| *line == "200").count(), 100, "{done:?}");
    }
    let issuer = scene.world.issuer();
    assert_eq!((issuer.posts(), issuer.refreshes(), issuer.reuses()), (1, 1, 0));
    assert_eq!(scene.world.api().seen().len(), 400);
    scene.seen_signed_in();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_refreshes_the_shared_login_by_itself() {
    let Some(python) = python() else { return };
    let scene = Scene::usual().await;
    // As Codex does it: read the cache, post its refresh token, write what comes back, forget the rest.
    let script = r#"
import json, os, requests
path = os.environ["HOME"] + "/.codex/auth.json"
auth = json.load(open(path))
body = {"client_id": "app", "grant_type": "refresh_token", "refresh_token": auth["tokens"]["refresh_token"]}
answer = requests.post("https://auth.openai.com/oauth/token", json=body)
answer.raise_for_status()
tokens = answer.json()
for name in ("id_token", "access_token", "refresh_token"):
    auth["tokens"][name] = tokens[name]
new = {name: auth[name] for name in ("auth_mode", "OPENAI_API_KEY", "tokens", "last_refresh")}
json.dump(new, open(path + ".new", "w"))
os.rename(path + ".new", path)
answer = requests.get("https://chatgpt.com/backend-api/codex/models",
                      headers={"Authorization": "Bearer " + tokens["access_token"]})
answer.raise_for_status()
"#;
    let before = cached(&scene);
    for _ in 0..2 {
        scene.run_ok(&[&python, "-c", script]).await;
    }
    let after = cached(&scene);
    assert_ne!(before["tokens"]["refresh_token"], after["tokens"]["refresh_token"]);
    let issuer = scene.world.issuer();
    assert_eq!(issuer.reuses(), 0);
    assert!((1..=2).contains(&issuer.refreshes()), "{}", issuer.refreshes());
    // What is in the cache is the real, current login: the issuer redeems it once more.
    scene.run_ok(&[&python, "-c", script]).await;
    assert_eq!(issuer.reuses(), 0);
    scene.seen_signed_in();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_saved_from_a_pipe_and_shown_to_nobody() {
    let scene = Scene::usual().await;
    let key = "sk-proj-vk-canary-0123456789";
    let mut login = scene.valetkey(&["login", "--with-api-key"]);
    let mut child = login.stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, format!("{key}\n").as_bytes()).await.unwrap();
    drop(stdin);
    let said = done(child).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(said.err.contains("API key saved."), "{said:?}");
    let expected = serde_json::json!({ "auth_mode": "apikey", "OPENAI_API_KEY": key });
    assert_eq!(cached(&scene), expected);
    let explain = ["explain", "https://api.openai.com/v1/models"];
    for arguments in [&["status"][..], &["status", "--json"], &explain, &["check"]] {
        let said = done(scene.valetkey(arguments).spawn().unwrap()).await;
        assert_eq!(said.status, 0, "{arguments:?}: {said:?}");
        assert!(!format!("{said:?}").contains(key), "{arguments:?}: {said:?}");
        scene.assert_no_secret("a command", &(said.out + &said.err));
    }
    let path = scene.path(".codex/auth.json");
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(path, readable).unwrap();
    let warned = done(scene.valetkey(&["status"]).spawn().unwrap()).await;
    assert!(warned.err.contains("chmod 600"), "{warned:?}");
    let empty = done(scene.valetkey(&["login", "--with-api-key"]).spawn().unwrap()).await;
    assert_eq!(empty.status, 1);
    assert!(empty.err.contains("pipe it: printenv"), "{empty:?}");
}
