//! The doctor names what is broken, and nothing else.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;
use valetkey::sandbox::{Defect, Settings};
use valetkey::secret::Secret;

use super::support::{Scene, done, program};

/// A check that is not well: its id, which of several, its status, and words of its message or fix.
type Culprit<'a> = (&'a str, &'a str, &'a str, &'a [&'a str]);

/// Runs the doctor, and compares everything that is not well with what is broken.
async fn assert_named(scene: &Scene, culprits: &[Culprit<'_>]) {
    let done = done(scene.valetkey(&["doctor", "--json"]).spawn().unwrap()).await;
    scene.assert_no_secret("the doctor's report", &format!("{}{}", done.out, done.err));
    let report: Value = serde_json::from_str(&done.out).unwrap_or_else(|_| panic!("{done:?}"));
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let all = report["checks"].as_array().unwrap();
    // Which programs there are, and how old, is a matter of the machine.
    let is_about = |check: &&Value| check["id"] != "runtime" || check["subject"] == "curl";
    let unwell: Vec<&Value> =
        all.iter().filter(|check| check["status"] != "ok").filter(is_about).collect();
    let found: Vec<_> =
        unwell.iter().map(|it| (text(it, "id"), text(it, "subject"), text(it, "status"))).collect();
    let expected: Vec<_> = culprits
        .iter()
        .map(|(id, subject, status, _)| ((*id).into(), (*subject).into(), (*status).into()))
        .collect();
    assert_eq!(found, expected, "{unwell:#?}");
    for (check, (.., words)) in unwell.iter().zip(culprits) {
        let said = text(check, "message") + "\n" + &text(check, "fix");
        assert!(!text(check, "fix").is_empty(), "{check}");
        for word in *words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }
    let status = |check: &Value| match check["status"].as_str() {
        Some("failed") => 2,
        Some("warning") => 1,
        _ => 0,
    };
    assert_eq!(done.status, all.iter().map(status).max().unwrap(), "{done:?}");
}

/// A scene with this instead of the usual `[upstream]`, which is given.
async fn upstream(change: impl FnOnce(&Scene, String) -> String) -> Scene {
    let scene = Scene::usual().await;
    let changed = change(&scene, scene.world.upstream_toml());
    scene.configure(&changed);
    scene
}

/// The rule for `host`, which the world shows in some way.
fn rule(host: &str) -> String {
    format!("[[rules]]\nhost = \"{host}\"\ncredential = \"example\"\n")
}

/// A scene in which everything goes through the company's proxy, given by this URL.
async fn chained(login: Option<&str>, url: impl FnOnce(&Scene) -> String) -> Scene {
    let company_login = login.map(Secret::new);
    let settings = Settings { company_login, ..Settings::default() };
    let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
    let (ca, url) = (scene.world.company().ca_file().display().to_string(), url(&scene));
    scene.configure(&format!("[upstream]\nproxy = \"{url}\"\nca_bundle = \"{ca}\"\n"));
    scene
}

/// A port at which nobody listens.
fn closed_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

const CHATGPT: &str = "chatgpt.com:443";
const EXAMPLE: &str = "api.example.com:443";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_broken() {
    let scene = Scene::usual().await;
    assert_named(&scene, &[]).await;
    let done = done(scene.valetkey(&["doctor"]).spawn().unwrap()).await;
    for words in [
        "ok       configuration: ",
        "ok       runtime ",
        "ok       tls chatgpt.com:443: certificate by `Sandbox Root`, no public CA",
        "ok       http api.example.com:443: HTTP/2",
        "ok       websocket chatgpt.com:443: refused with 401 without a credential, so not known",
        "ok       issuer auth.openai.com:443: ",
        "ok       clock: ",
        ", 0 failed",
    ] {
        assert!(done.out.contains(words), "no {words:?} in {}", done.out);
    }
    // To ask makes no local CA, and gives no program a key.
    assert!(!scene.path(".local/share/valetkey/ca").exists());
    // Nobody was signed in for it.
    let seen = scene.world.api().seen();
    assert!(seen.iter().all(|seen| !seen.headers.contains_key("authorization")), "{seen:?}");
    assert!(!seen.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_broken_behind_an_inspecting_proxy() {
    let login = "user:p@ss";
    let scene =
        chained(Some(login), |it| format!("http://user:p%40ss@{}", it.world.company().address()))
            .await;
    assert_named(&scene, &[]).await;
    let done = done(scene.valetkey(&["doctor"]).spawn().unwrap()).await;
    for words in ["answers, with a login", "`Company Root`, no public CA: a TLS-inspecting"] {
        assert!(done.out.contains(words), "no {words:?} in {}", done.out);
    }
    assert_eq!(scene.world.connections(), 0, "something went past the proxy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_in_request_is_sent_when_it_is_asked_for() {
    let scene = Scene::usual().await;
    let done = done(scene.valetkey(&["doctor", "--sign-in"]).spawn().unwrap()).await;
    assert!(done.status < 2, "{done:?}");
    for words in ["ok       sign-in chatgpt.com:443 as openai: answered 200", "as openai: opens"] {
        assert!(done.out.contains(words), "no {words:?} in {}", done.out);
    }
    let signed_in = |seen: &&valetkey::sandbox::Seen| seen.headers.contains_key("authorization");
    assert_eq!(scene.world.api().seen().iter().filter(signed_in).count(), 3);
    scene.assert_no_secret("the doctor's report", &done.out);

    let scene = Scene::usual().await.with("EXAMPLE_TOKEN", "vk-canary-of-nobody");
    let done =
        super::support::done(scene.valetkey(&["doctor", "--sign-in"]).spawn().unwrap()).await;
    assert_eq!(done.status, 2, "{done:?}");
    assert!(done.out.contains("the credential was refused with 401"), "{}", done.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn b01_a_mistake_in_the_configuration() {
    let scene = upstream(|_, usual| usual.replace("proxy = ", "proxi = ")).await;
    let words = &["unknown key `proxi`", "config.toml"][..];
    assert_named(&scene, &[("configuration", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b02_a_proxy_that_is_valetkey_itself() {
    let scene = upstream(|_, usual| usual.replace("\"none\"", "\"http://127.0.0.1:8377\"")).await;
    let words = &["upstream.proxy", "is valetkey itself"][..];
    assert_named(&scene, &[("configuration", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b03_a_login_that_is_not_allowed() {
    let scene = Scene::usual().await;
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(config, format!("forced_login_method = \"api\"\n{text}")).unwrap();
    let words = &["API key login is required", "check --managed"][..];
    assert_named(&scene, &[("store", "openai", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b04_nobody_is_signed_in() {
    let scene = Scene::usual().await;
    fs::remove_file(scene.path(".codex/auth.json")).unwrap();
    let words = &["Not logged in", "valetkey login"][..];
    assert_named(&scene, &[("store", "openai", "warning", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b05_a_cache_that_cannot_be_read() {
    let scene = Scene::usual().await;
    fs::write(scene.path(".codex/auth.json"), "{\"tokens\": ").unwrap();
    let words = &["cannot be read", "auth.json"][..];
    assert_named(&scene, &[("store", "openai", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b06_a_cache_that_everybody_can_read() {
    let scene = Scene::usual().await;
    let cache = scene.path(".codex/auth.json");
    fs::set_permissions(cache, Permissions::from_mode(0o644)).unwrap();
    assert_named(&scene, &[("permissions", "openai", "warning", &["auth.json", "yours alone"])])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b07_a_key_that_is_not_there() {
    let mut scene = Scene::usual().await;
    scene.env.remove("EXAMPLE_TOKEN");
    assert_named(&scene, &[("store", "example", "failed", &["EXAMPLE_TOKEN"])]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b08_a_token_that_has_expired() {
    let scene = Scene::new(time::Duration::minutes(-3)).await;
    let words = &["ago", "the next request refreshes it"][..];
    assert_named(&scene, &[("token", "openai", "warning", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b09_a_clock_that_is_wrong() {
    let Some(faketime) = program("faketime") else { return };
    let scene = Scene::usual().await;
    let doctor = scene.valetkey(&["doctor"]);
    let mut late = tokio::process::Command::new(faketime);
    late.args(["-f", "-20m", env!("CARGO_BIN_EXE_valetkey"), "doctor"]).env_clear();
    late.envs(doctor.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    late.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
    late.stderr(std::process::Stdio::piped()).current_dir(scene.home.path()).kill_on_drop(true);
    let done = done(late.spawn().unwrap()).await;
    assert_eq!(done.status, 2, "{done:?}");
    let said = done.out.lines().find(|line| line.starts_with("failed")).unwrap();
    assert!(said.contains("clock: this machine's clock is 1") && said.contains("behind"), "{said}");
    assert!(done.out.contains("1 failed") && done.out.contains("timedatectl"), "{}", done.out);
}

/// A scene with a local CA, whose folder is given.
async fn with_ca() -> (Scene, std::path::PathBuf) {
    let scene = Scene::usual().await;
    let made = done(scene.valetkey(&["ca", "path"]).spawn().unwrap()).await;
    let ca = Path::new(made.out.trim()).parent().unwrap().to_owned();
    (scene, ca)
}

#[tokio::test(flavor = "multi_thread")]
async fn b10_a_key_of_the_local_ca_that_others_can_read() {
    let (scene, ca) = with_ca().await;
    let is_key = |path: &Path| path.extension().is_some_and(|it| it == "key");
    let mut files = fs::read_dir(ca).unwrap().map(|entry| entry.unwrap().path());
    let key = files.find(|path| is_key(path)).unwrap();
    fs::set_permissions(key, Permissions::from_mode(0o644)).unwrap();
    assert_named(&scene, &[("ca", "", "failed", &["is open to other users", "chmod"])]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b11_a_root_of_the_local_ca_that_is_broken() {
    let (scene, ca) = with_ca().await;
    fs::write(ca.join("root-1.pem"), "no certificate").unwrap();
    assert_named(&scene, &[("ca", "", "failed", &["root-1.pem", "remove"])]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b12_a_bundle_that_is_missing() {
    let scene = upstream(|it, usual| {
        usual.replace(&it.world.ca_file().display().to_string(), "/no/such/corp.pem")
    });
    let words = &["upstream.ca_bundle", "/no/such/corp.pem", "No such file"][..];
    assert_named(&scene.await, &[("bundle", "", "failed", words)]).await;
}

/// A scene whose bundle is the world's with this behind it.
async fn bundled(more: &str) -> Scene {
    upstream(|it, usual| {
        let bundle = it.path("corp.pem");
        fs::write(&bundle, format!("{}{more}", it.world.ca_pem())).unwrap();
        usual.replace(&it.world.ca_file().display().to_string(), bundle.to_str().unwrap())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn b13_a_bundle_with_a_broken_block() {
    let scene = bundled("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").await;
    let words = &["corp.pem", "block 2 is not a well-formed X.509 certificate"][..];
    assert_named(&scene, &[("bundle", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b14_roots_that_are_trusted_in_vain() {
    let sample = |name: &str| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("certs").join(name);
        fs::read_to_string(file).unwrap()
    };
    let scene = bundled(&[sample("rsa-1024.pem"), sample("sha-1.pem")].concat()).await;
    let short = &["Example Corp Old CA (1024 bits)", "RSA key of 1024 bits"][..];
    let old = &["Example Corp Legacy CA (SHA-1)", "signed with SHA-1"][..];
    let culprits = [("bundle", "", "warning", short), ("bundle", "", "warning", old)];
    assert_named(&scene, &culprits).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b15_a_chain_that_is_not_there() {
    let scene = chained(None, |_| format!("http://127.0.0.1:{}", closed_port())).await;
    let words = &["the upstream proxy could not be reached", "refused", "upstream.proxy"][..];
    assert_named(&scene, &[("chain", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b16_a_chain_that_wants_a_login() {
    let to = |it: &Scene| format!("http://{}", it.world.company().address());
    let scene = chained(Some("user:p@ss"), to).await;
    let words = &["asks for Basic realm=\"company\"", "proxy_login"][..];
    assert_named(&scene, &[("chain", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b17_a_chain_that_does_not_take_the_login() {
    let to = |it: &Scene| format!("http://user:wrong@{}", it.world.company().address());
    let scene = chained(Some("user:p@ss"), to).await;
    let words = &["did not take the login", "check user and password"][..];
    assert_named(&scene, &[("chain", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b18_a_command_that_tells_no_login() {
    let to = |it: &Scene| format!("http://{}", it.world.company().address());
    let scene = chained(Some("user:p@ss"), to).await;
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let login = "[upstream]\nproxy_login = \"command: exit 3\"\n";
    fs::write(config, text.replace("[upstream]\n", login)).unwrap();
    let words = &["there is no login for the upstream proxy", "exit status: 3"][..];
    assert_named(&scene, &[("chain", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_tells_the_login_gets_no_other_secret() {
    let to = |it: &Scene| format!("http://{}", it.world.company().address());
    let scene = chained(Some("user:p@ss"), to).await.with("all_proxy", "me:pa55@other:1");
    let scene = scene.with("HTTPS_PROXY", "http://me:pa55@other:1");
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let login = "[upstream]\nproxy_login = \"command: env > found; echo user:p@ss\"\n";
    fs::write(config, text.replace("[upstream]\n", login)).unwrap();
    assert_named(&scene, &[]).await;
    let found = fs::read_to_string(scene.path("found")).unwrap();
    let proxy = format!("VALETKEY_PROXY={}", scene.world.company().address());
    for line in [&proxy, "HTTPS_PROXY=http://other:1", "all_proxy=other:1"] {
        assert!(found.lines().any(|it| it == line), "{line}: {found}");
    }
    assert!(!found.contains("pa55") && !found.contains("EXAMPLE_TOKEN"), "{found}");
    scene.assert_no_secret("the command's environment", &found);
}

#[tokio::test(flavor = "multi_thread")]
async fn b19_a_chain_that_is_no_proxy() {
    // The world's own port, at which TLS is spoken.
    let to = |it: &Scene| format!("http://{}", it.world.resolve()[0].1);
    let scene = chained(None, to).await;
    let words = &["answer makes no sense", "upstream.proxy"][..];
    assert_named(&scene, &[("chain", "", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b20_a_host_that_the_chain_refuses() {
    let to = |it: &Scene| format!("http://{}", it.world.company().address());
    let scene = chained(None, to).await;
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(config, text + &rule("elsewhere.example.com")).unwrap();
    let words = &["the upstream proxy answered 502", "ask whoever runs it"][..];
    let culprit = ("tunnel", "elsewhere.example.com:443", "failed", words);
    assert_named(&scene, &[culprit]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b21_an_inspecting_proxy_whose_ca_is_not_trusted() {
    let to = |it: &Scene| format!("http://{}", it.world.company().address());
    let scene = chained(None, to).await;
    let (right, wrong) = (scene.world.company().ca_file(), scene.world.ca_file());
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace(right.to_str().unwrap(), wrong.to_str().unwrap());
    fs::write(config, text).unwrap();
    let words = &["Company Root", "not trusted", "SHA-256", "append its certificate"][..];
    let hosts = [CHATGPT, "auth.openai.com:443", EXAMPLE];
    assert_named(&scene, &hosts.map(|host| ("tls", host, "failed", words))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b22_a_name_that_does_not_resolve() {
    let scene = upstream(|_, usual| rule("no-such-host.invalid") + &usual).await;
    let words = &["could not be resolved", "check the host name"][..];
    assert_named(&scene, &[("dns", "no-such-host.invalid:443", "failed", words)]).await;
}

/// The world with one host led elsewhere.
async fn led(target: &str, elsewhere: impl FnOnce(&Scene) -> String) -> Scene {
    upstream(|it, usual| {
        let line = |address: &str| format!("\"{target}\" = \"{address}\"");
        let right = line(&it.world.resolve()[0].1.to_string());
        usual.replace(&right, &line(&elsewhere(it)))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn b23_a_host_that_takes_no_connection() {
    let scene = led(EXAMPLE, |_| format!("127.0.0.1:{}", closed_port())).await;
    let words = &["could not be reached", "refused", "set upstream.proxy or HTTPS_PROXY"][..];
    assert_named(&scene, &[("tcp", EXAMPLE, "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b24_an_issuer_that_cannot_be_reached() {
    let scene = led("auth.openai.com:443", |_| format!("127.0.0.1:{}", closed_port())).await;
    let words = &["could not be reached", "refused"][..];
    assert_named(&scene, &[("tcp", "auth.openai.com:443", "failed", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_a_port_at_which_no_tls_is_spoken() {
    let scene = led(EXAMPLE, |it| it.world.company().address().to_string()).await;
    assert_named(&scene, &[("tls", EXAMPLE, "failed", &["the TLS handshake"])]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b26_certificates_that_are_not_good() {
    let scene = Scene::usual().await;
    for defect in Defect::ALL {
        scene.world.spoil("api.example.com", Some(defect));
        let sentence = super::certificates::sentence(defect, "api.example.com");
        let words: &[&str] = &[sentence.trim_end()];
        assert_named(&scene, &[("tls", EXAMPLE, "failed", words)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn b27_websockets_that_do_not_get_through() {
    let scene = Scene::usual().await;
    // Somebody in between has made a plain request of it.
    scene.world.api().require_login(false);
    scene.world.api().refuse_websockets();
    let words = &["answered with 426", "Upgrade: websocket", "websocket_fallback"][..];
    assert_named(&scene, &[("websocket", CHATGPT, "warning", words)]).await;
}

/// What is reached directly is looked at though the chain opens nothing.
#[tokio::test(flavor = "multi_thread")]
async fn b29_a_chain_and_a_host_that_does_not_need_it() {
    let scene = chained(None, |_| format!("http://127.0.0.1:{}", closed_port())).await;
    let config = scene.path(".config/valetkey/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(config, text + &rule("no-such-host.invalid")).unwrap();
    let scene = scene.with("NO_PROXY", "no-such-host.invalid");
    let chain = ("chain", "", "failed", &["could not be reached"][..]);
    let direct = ("dns", "no-such-host.invalid:443", "failed", &["could not be resolved"][..]);
    let past = ("no-proxy", "no-such-host.invalid", "warning", &["past valetkey"][..]);
    assert_named(&scene, &[past, chain, direct]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b28_a_program_that_trusts_others() {
    if program("curl").is_none() {
        return;
    }
    let scene = Scene::usual().await;
    let other = scene.world.ca_file().display();
    fs::write(scene.path(".curlrc"), format!("cacert = \"{other}\"\ncapath = \"/nowhere\"\n"))
        .unwrap();
    let words = &["does not trust the local CA", ".curlrc"][..];
    assert_named(&scene, &[("runtime", "curl", "warning", words)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b30_a_variable_that_sends_programs_past_valetkey() {
    let scene = Scene::usual().await.with("NO_PROXY", "chatgpt.com,api.example.com");
    let culprit = |host| ("no-proxy", host, "warning", &["NO_PROXY", "past valetkey"][..]);
    assert_named(&scene, &["api.example.com", "chatgpt.com"].map(culprit)).await;
}

/// Nobody writes to it, and who opens it for reading would wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_in_the_place_of_the_running_proxys_file_holds_up_nobody() {
    let scene = Scene::usual().await;
    let pipe = scene.path("server-info");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let scene = scene.with("VALETKEY_SERVER_INFO", pipe);
    for command in ["doctor", "status", "env"] {
        let done = done(scene.valetkey(&[command]).spawn().unwrap());
        let done = tokio::time::timeout(std::time::Duration::from_secs(60), done).await;
        assert!(done.expect(command).status < 2, "{command}");
    }
}

#[expect(clippy::disallowed_methods, reason = "who opens a pipe may wait for ever")]
#[tokio::test(flavor = "multi_thread")]
async fn who_stops_it_stops_what_it_tries() {
    let scene = Scene::usual().await;
    let programs = scene.path("programs");
    fs::create_dir(&programs).unwrap();
    let (pipe, git) = (scene.path("pipe"), programs.join("git"));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let script = format!("#!/bin/sh\nexec >'{}'\necho up\nsleep 300\n", pipe.display());
    fs::write(&git, script).unwrap();
    fs::set_permissions(&git, Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", programs.display());
    let child = scene.valetkey(&["doctor"]).env("PATH", path).spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    let (begin, begun) = tokio::sync::oneshot::channel();
    let (leave, left) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut held = std::io::BufReader::new(fs::File::open(pipe).unwrap());
        let mut said = String::new();
        std::io::BufRead::read_line(&mut held, &mut said).unwrap();
        begin.send(said).unwrap();
        leave.send(std::io::Read::read_to_string(&mut held, &mut String::new()).unwrap()).unwrap();
    });
    let limit = std::time::Duration::from_secs(30);
    let begun = tokio::time::timeout(limit, begun).await.expect("it was never tried");
    assert_eq!(begun.unwrap(), "up\n");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(done(child).await.status, 128 + 2);
    let left = tokio::time::timeout(limit, left).await.expect("what it had started lives on");
    assert_eq!(left.unwrap(), 0);
}
