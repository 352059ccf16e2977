//! `run`, `serve` and `env` as processes: exit codes, signals, files, nesting, and what can be read of them.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use valetkey::tasks::Tasks;

use super::browser::holds_verifier;
use super::forms::leak;
use super::served::Serving;
use super::support::{KEY, Scene, SigningIn, done, fed, program};

const THINGS: &str = "https://api.example.com/v1/things";

#[tokio::test(flavor = "multi_thread")]
async fn the_programs_exit_status_is_ours() {
    let scene = Scene::usual().await;
    let table: [(&[&str], i32); 6] = [
        (&["true"], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["sh", "-c", "kill -KILL $$"], 128 + 9),
        (&["no-such-program"], 127),
        (&["/etc"], 126),
    ];
    for (command, status) in table {
        assert_eq!(scene.run(command).await.status, status, "{command:?}");
    }
    let left = fs::read_dir(scene.path("run/valetkey")).unwrap().count();
    assert_eq!(left, 0, "a folder of a run was left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_and_streams_pass() {
    let scene = Scene::usual().await;
    let script = "trap 'exit 9' TERM; echo ready; cat; while :; do read -r line || :; done";
    let mut command = scene.valetkey(&["run", "--", "sh", "-c", script]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(out.next_line().await.unwrap().as_deref(), Some("ready"));
    stdin.write_all(b"through the pipe\n").await.unwrap();
    assert_eq!(out.next_line().await.unwrap().as_deref(), Some("through the pipe"));
    drop(stdin);
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(done(child).await.status, 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_runs_are_apart() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let script = format!(
        "echo \"$SSL_CERT_FILE $HTTPS_PROXY\"; exec '{curl}' -sS --fail -o /dev/null {THINGS}"
    );
    let command = ["sh", "-c", &script];
    let runs = (0..6).map(|_| scene.run_ok(&command));
    let mut seen: Vec<String> =
        futures_util::future::join_all(runs).await.into_iter().map(|done| done.out).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 6, "{seen:?}");
    assert_eq!(scene.seen_signed_in().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valetkey_in_a_valetkey() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let valetkey = env!("CARGO_BIN_EXE_valetkey");
    let chatgpt = "https://chatgpt.com/backend-api/codex/models";
    let inner = [valetkey, "run", "--", valetkey, "run", "--", &curl, "-sS", "--fail", chatgpt];
    assert!(scene.run_ok(&inner).await.out.contains("present and current"));
    assert_eq!(scene.seen_signed_in().len(), 1);

    let script = format!(
        "set -e; '{valetkey}' status --json || :; '{valetkey}' ca fingerprint; \
         echo sk-inside-0123456789 | '{valetkey}' login --with-api-key; \
         '{valetkey}' explain https://api.openai.com/v1/models"
    );
    let done = scene.run_ok(&["sh", "-c", &script]).await;
    assert!(done.out.contains("\"proxy\": {\n    \"url\": \"http://127.0.0.1:"), "{done:?}");
    assert!(done.out.contains("openai (API key configured - "), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_and_env() {
    let (Some(curl), Some(bash)) = (program("curl"), program("bash")) else { return };
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    let info = scene.path("serving.json");
    let parsed: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&info).unwrap()).unwrap();
    assert_eq!(parsed["port"], serving.address.port());
    assert_eq!(parsed["pid"], serving.pid());
    assert!(fs::read_to_string(&serving.ca).unwrap().contains("CERTIFICATE"));

    let valetkey = env!("CARGO_BIN_EXE_valetkey");
    let script = format!(
        "set -e; eval \"$('{valetkey}' env --shell bash)\"; '{curl}' -sS --fail {THINGS}; \
         '{valetkey}' run -- '{curl}' -sS --fail {THINGS}"
    );
    let mut shell = tokio::process::Command::new(bash);
    shell.args(["-c", &script]).env_clear().envs(&scene.env).env("PATH", env!("PATH"));
    let outcome = done(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await;
    assert_eq!(outcome.status, 0, "{outcome:?}");
    assert_eq!(scene.seen_signed_in().len(), 2);

    let taken = serving.address.to_string();
    let second = scene.typed(&["serve", "--listen", &taken]).await;
    assert_eq!(second.status, 1);
    assert!(second.err.contains("hint:") && second.err.contains("cannot listen"), "{second:?}");

    serving.signal(rustix::process::Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    assert!(!info.exists() && !scene.path("run/valetkey/serve.json").exists());
    let none = scene.typed(&["env"]).await;
    assert_eq!(none.status, 1);
    assert!(none.err.contains("hint: start one: valetkey serve"), "{none:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_days_work_shows_no_secret_to_anybody() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    let scene = scene.with("VALETKEY_LOG", "trace").with("SSLKEYLOGFILE", "keys.log");
    let script = format!(
        "for path in models 401-until-refreshed always-401 status/500 close-before-head reset-mid-body; do \
         for version in --http1.1 --http2; do \
         '{curl}' -sS $version https://chatgpt.com/backend-api/codex/$path; done; done; \
         '{curl}' -sS {THINGS}; '{curl}' -sS https://untrusted.example.com/; \
         echo ready; read -r line; env; echo done"
    );
    let mut command = scene.valetkey(&["run", "--", "sh", "-c", &script]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut errors = child.stderr.take().unwrap();
    let reading = Tasks::new().spawn(async move {
        let mut log = String::new();
        errors.read_to_string(&mut log).await.unwrap();
        log
    });
    let mut answers = String::new();
    while !answers.contains("ready\n") {
        assert_ne!(out.read_line(&mut answers).await.unwrap(), 0, "{answers}");
    }
    let own = child.id().unwrap();
    let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap();
    let mut readable = String::new();
    for pid in children.split_whitespace().chain([own.to_string().as_str()]) {
        for file in ["cmdline", "environ"] {
            // Our own environment is not for others to read.
            let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let is_own_environment = pid == own.to_string() && file == "environ";
            if !is_own_environment {
                assert!(!bytes.is_empty(), "/proc/{pid}/{file}");
                readable.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    }
    stdin.write_all(b"go on\n").await.unwrap();
    out.read_to_string(&mut answers).await.unwrap();
    let status =
        tokio::time::timeout(Duration::from_secs(30), child.wait()).await.unwrap().unwrap();
    assert!(status.success() && answers.ends_with("done\n"), "{answers}");
    let log = reading.await.unwrap();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "nothing was logged: {log}");
    let secrets = scene.secrets();
    assert!(secrets.len() > 3 && secrets.contains(&KEY.to_owned()));
    for (what, text) in [("the log", &log), ("an answer", &answers), ("/proc", &readable)] {
        assert_eq!(leak(&secrets, text), None, "{what}");
        let planted = format!("{text}{}", secrets[0]);
        assert!(leak(&secrets, &planted).is_some(), "the scan of {what} finds nothing at all");
    }
    for extra in [&["status"][..], &["status", "--json"], &["check"], &["explain", THINGS]] {
        let said = scene.typed(extra).await;
        assert_eq!(leak(&secrets, &(said.out + &said.err)), None, "{extra:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_in_and_out_shows_no_secret_to_anybody() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let trace = ["--log", "trace"];
    let (_, address) = scene.world.resolve().remove(0);
    let mut seen = String::new();

    let signing_in = SigningIn::begin(&scene, &trace).await;
    seen += &fs::read_to_string(format!("/proc/{}/cmdline", signing_in.pid())).unwrap();
    assert!(seen.contains("trace\0login"), "{seen}");
    let url = signing_in.url.clone();
    let mut browser = tokio::process::Command::new(curl);
    let issuer = format!("auth.openai.com:443:{address}");
    browser.args(["-sSLk", "--fail", "--connect-to", &issuer, &url]);
    let browser = browser.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (page, login) = tokio::join!(done(browser), signing_in.end());
    assert!(page.out.contains("Signed in") && login.status == 0, "{page:?} {login:?}");
    assert!(login.err.contains("TRACE") || login.err.contains("DEBUG"), "nothing was logged");
    seen += &(url.clone() + &page.out + &login.out + &login.err);

    let personal = scene.personal_token();
    for (arguments, input) in [
        (&["status"][..], ""),
        (&["status", "--json"], ""),
        (&["login", "status"], ""),
        (&["login", "--with-access-token"], &personal),
        (&["login", "status", "--json"], ""),
        (&["login", "--with-api-key"], PIPED_KEY),
        (&["status"], ""),
        (&["check"], ""),
        (&["check", "--managed"], ""),
        (&["logout"], ""),
        (&["logout", "--all"], ""),
    ] {
        let said = fed(scene.valetkey(&[&trace, arguments].concat()), input).await;
        assert_eq!(said.status, 0, "{arguments:?}: {said:?}");
        seen += &(said.out + &said.err);
    }
    assert!(!scene.path(".codex/auth.json").exists());
    let secrets = [scene.secrets(), vec![PIPED_KEY.to_owned()]].concat();
    // The code of the browser flow is among them, and the tokens of two logins.
    assert!(secrets.iter().any(|secret| secret.starts_with("ac_")) && secrets.len() > 8);
    assert_eq!(leak(&secrets, &seen), None);
    assert!(!holds_verifier(&seen, &url), "the code verifier was shown");
    assert!(
        leak(&secrets, &format!("{seen}{personal}")).is_some(),
        "the scan finds nothing at all"
    );
}

/// An API key that is only ever piped in.
const PIPED_KEY: &str = "sk-proj-vk-canary-that-is-piped-in";

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_plays_every_act() {
    let scene = Scene::usual().await;
    let with_curl = scene.typed(&["demo"]).await;
    let without =
        done(scene.valetkey(&["demo"]).env("PATH", "/nonexistent").spawn().unwrap()).await;
    for done in [with_curl, without] {
        assert_eq!(done.status, 0, "{done:?}");
        for number in 1..=8 {
            assert!(done.out.contains(&format!("\n{number}. ")), "{done:?}");
        }
        assert!(done.out.contains("All 8 steps held"), "{done:?}");
        assert_eq!(done.out.matches("\n   ok\n").count(), 8, "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_managed_is_shown() {
    let scene = Scene::usual().await;
    let file = scene.path(".codex/config.toml");
    let check = async || scene.typed(&["check", "--managed"]).await;
    fs::write(&file, "forced_login_method = \"chatgpt\"\n[projects.x]\n").unwrap();
    let shown = check().await;
    let line = format!("forced_login_method = \"chatgpt\"  ({})\n", file.display());
    assert!(shown.status == 0 && shown.out.contains(&line), "{shown:?}");
    fs::write(&file, "forced_login_method = \"both\"\n").unwrap();
    let refused = check().await;
    assert!(refused.status == 2 && refused.err.contains("config.toml:1:23"), "{refused:?}");
}

/// The login is for the proxy of its own file, and a variable names another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_does_not_count_is_shown_to_nobody() {
    let Some(curl) = program("curl") else { return };
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", other.local_addr().unwrap());
    let asked = Tasks::new().spawn(async move {
        let mut heads = Vec::new();
        loop {
            let Ok((mut stream, _)) = other.accept().await else { return heads };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
            }
            let head = String::from_utf8(head).unwrap();
            let is_last = head.contains("last.example");
            heads.push(head);
            let answer = "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"other\"\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            if is_last {
                return heads;
            }
        }
    });
    let scene = Scene::usual().await;
    scene.configure("[upstream]\nproxy = 'http://corp:1'\nproxy_login = 'env:LOGIN'\n");
    let scene = scene.with("LOGIN", "me:pa55").with("VALETKEY_UPSTREAM_PROXY", &url);
    let script = "env; for url; do \"$0\" -sS \"$url\"; done";
    let done = scene.run(&["sh", "-c", script, &curl, THINGS, "https://last.example/"]).await;
    let expected = format!("upstream.proxy_login is not shown to {url} (VALETKEY_UPSTREAM_PROXY)");
    assert!(done.err.contains(&expected), "{done:?}");
    assert!(done.err.contains("LOGIN is not passed on"), "{done:?}");
    assert!(done.out.contains("chain_auth") && done.out.contains("asks for Basic"), "{done:?}");
    assert!(!done.out.contains("LOGIN=") && !done.out.contains("pa55"), "{done:?}");
    let heads = asked.await.unwrap().join("");
    assert!(heads.contains("CONNECT api.example.com:443"), "{heads}");
    assert!(!heads.to_ascii_lowercase().contains("authorization"), "{heads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_passwords_of_other_proxies_are_kept_from_the_program() {
    let scene = Scene::usual().await.with("HTTP_PROXY", "http://me:pa55@corp:1");
    let scene = scene.with("all_proxy", "me:pa55@corp:2").with("http_proxy", "http://corp:3");
    let done = scene.run_ok(&["env"]).await;
    for line in ["HTTP_PROXY=http://corp:1", "all_proxy=corp:2", "http_proxy=http://corp:3"] {
        assert!(done.out.lines().any(|it| it == line), "{line}: {done:?}");
    }
    assert!(!done.out.contains("pa55"), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_never_its_own_chain() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    // The port that a profile exports, and that serve is about to take.
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let listen = format!("127.0.0.1:{port}");
    scene.configure(&scene.world.upstream_toml().replace("proxy = \"none\"\n", ""));
    let scene = scene.with("HTTPS_PROXY", format!("http://localhost:{port}"));
    let mut serving = Serving::start_with(&scene, &["--listen", &listen]).await;
    let mut client = tokio::process::Command::new(curl);
    client.args([
        "-sS",
        "-o",
        "/dev/null",
        "-w",
        "%{http_connect}",
        "-x",
        &format!("http://{listen}"),
    ]);
    client.arg("https://no-such-host.invalid/").stdout(Stdio::piped()).stderr(Stdio::piped());
    assert_eq!(done(client.spawn().unwrap()).await.out, "502");
    serving.signal(rustix::process::Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));

    scene.configure(&format!("[upstream]\nproxy = \"http://{listen}\"\n"));
    let refused = scene.typed(&["serve", "--listen", &listen]).await;
    assert_eq!(refused.status, 1);
    assert!(refused.err.contains("is valetkey itself"), "{refused:?}");
}

/// Each takes the other for the company's proxy.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_lead_to_each_other_end_at_once() {
    let Some(curl) = program("curl") else { return };
    let (one, two) = (Scene::usual().await, Scene::usual().await);
    let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let listen = ports.each_ref().map(|port| port.local_addr().unwrap().to_string());
    drop(ports);
    let mut serving = Vec::new();
    for (scene, own, other) in [(&one, 0, 1), (&two, 1, 0)] {
        scene.configure(&format!("[upstream]\nproxy = \"http://{}\"\n", listen[other]));
        serving.push(Serving::start_with(scene, &["--listen", &listen[own]]).await);
    }
    let proxy = format!("http://{}", listen[0]);
    let mut client = tokio::process::Command::new(curl);
    client.args(["-sS", "-v", "--max-time", "20", "-x", &proxy, "https://no-rule.example/"]);
    let done = done(client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await;
    assert!(done.err.contains("response 502"), "{done:?}");
    for serving in &serving {
        let open = fs::read_dir(format!("/proc/{}/fd", serving.pid())).unwrap().count();
        assert!(open < 40, "{open} descriptors");
    }
}
