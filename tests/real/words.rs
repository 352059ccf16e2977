//! What is said to somebody who typed something else than would have worked: the sentence, and what to type.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use tokio::process::Command;

use super::served::Serving;
use super::support::{Done, Scene, done, fed};

/// A key in a variable that is not set, and one in a file that is not there.
const CONFIGURATION: &str = "[credentials.mine]\nkind = \"api_key\"\nsource = \"env:MY_TOKEN\"\n\
                             [credentials.kept]\nkind = \"api_key\"\nsource = \"file:/nowhere/key\"\n";

async fn scene() -> Scene {
    let scene = Scene::usual().await;
    scene.configure(&format!("{CONFIGURATION}{}", scene.world.upstream_toml()));
    scene
}

async fn typed(scene: &Scene, line: &str, input: &str) -> Done {
    let words: Vec<&str> = line.split(' ').collect();
    fed(scene.valetkey(&words), input).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_set_where_it_is_read_from() {
    let scene = scene().await;
    let table = [
        ("login --credential mine", "env:MY_TOKEN", "hint: set MY_TOKEN where valetkey runs"),
        ("logout --credential mine", "env:MY_TOKEN", "hint: unset MY_TOKEN where valetkey runs"),
        ("login --credential kept", "file:/nowhere/key", "hint: write the key into /nowhere/key"),
        ("logout --credential kept", "file:/nowhere/key", "hint: remove /nowhere/key"),
    ];
    for (line, place, hint) in table {
        let done = typed(&scene, line, "").await;
        assert_eq!(done.status, 1, "{line}: {done:?}");
        assert!(done.err.contains(&format!("is read from {place}")), "{line}: {done:?}");
        assert!(done.err.contains(hint), "{line}: {done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_no_access_token() {
    let scene = scene().await;
    let done = typed(&scene, "login --with-access-token", "sk-test-1234567890\n").await;
    assert_eq!(done.status, 1, "{done:?}");
    assert!(done.err.contains("this looks like an API key"), "{done:?}");
    assert!(done.err.contains("hint: for an API key: valetkey login --with-api-key"), "{done:?}");
    assert!(!done.err.contains("sk-test"), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_of_it_is_said_before() {
    let scene = Scene::usual().await;
    let work = "[credentials.work]\nkind = \"codex\"\nhome = \"/nowhere\"\n";
    let rule = "[[rules]]\nhost = \"api.example.org\"\ncredential = \"mine\"\n";
    let upstream = scene.world.upstream_toml();
    let written = format!("{work}{CONFIGURATION}{rule}{upstream}");
    let forced = "forced_login_method = \"api\"\n";
    let table = [
        // Of several the usual one is meant, as at `login`.
        ("init codex", "", 0, ""),
        ("explain https://api.example.org/", "", 0, "because     variable MY_TOKEN is not there"),
        ("pass new agent", "", 0, "is not narrowed by it: require_pass = true"),
        ("status", forced, 1, "currently being used. The next `run` or `serve` deletes it."),
    ];
    for (line, before, status, words) in table {
        let file = scene.path(".config/valetkey/config.toml");
        fs::write(file, format!("{before}use = [\"openai\"]\n{written}")).unwrap();
        let done = typed(&scene, line, "").await;
        assert_eq!(done.status, status, "{line}: {done:?}");
        assert!((done.out.clone() + &done.err).contains(words), "{line}: {done:?}");
    }
}

/// The example is typed as it stands.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_without_an_operation_says_how_to_ask_it() {
    let scene = scene().await;
    for helper in ["git", "docker"] {
        let asked = typed(&scene, &format!("token --helper {helper}"), "").await;
        assert_eq!(asked.status, 2, "{asked:?}");
        let (_, example) = asked.err.split_once("hint: by hand: ").unwrap();
        // The host of the example is one that is ruled here.
        let example = example.trim_end().replace("git.example.com", "api.example.com");
        let example = example.replace("registry.example.com", "api.example.com");
        let line = example.replace("| valetkey", &format!("| {}", env!("CARGO_BIN_EXE_valetkey")));
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).env_clear().envs(&scene.env).env("PATH", std::env!("PATH"));
        shell.stdout(Stdio::piped()).stderr(Stdio::piped());
        let answered = done(shell.spawn().unwrap()).await;
        assert_eq!(answered.status, 0, "{line}: {answered:?}");
        assert!(answered.out.contains(super::support::KEY), "{line}: {answered:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_typed_is_not_shown() {
    let scene = scene().await;
    let table = [
        "login sk-test-1234567890",
        "sk-test-1234567890",
        "login --with-api-key=sk-test-1234567890",
        "token sk-test-1234567890",
        "run --sk-test sk-test-1234567890",
        "pass new ghp_0123456789abcdef --ttl ghp_0123456789abcdef",
        "logout at-0123456789 vkp_0123456789",
        "--log eyJhbGciOiJub25lIn0.e30. completions eyJhbGciOiJub25lIn0.e30.",
    ];
    for line in table {
        let done = typed(&scene, line, "").await;
        assert_eq!(done.status, 2, "{line}: {done:?}");
        for key in ["1234567890", "0123456789", "eyJ"] {
            assert!(!format!("{done:?}").contains(key), "{line}: {done:?}");
        }
    }
    let done = typed(&scene, table[0], "").await;
    assert!(
        done.err.starts_with("error: a key is not an argument, your shell's history"),
        "{done:?}"
    );
    let hint = "hint: printenv OPENAI_API_KEY | valetkey login --with-api-key";
    assert!(done.err.contains(hint), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_says_what_to_type() {
    let scene = scene().await;
    fs::write(scene.path("file"), "").unwrap();
    let blocked = scene.path("file").display().to_string();
    // What is typed, the exit status, and what is said.
    let table: [(&str, i32, &[&str]); 11] = [
        ("--log verbose status", 2, &["`verbose` is no level", "hint: a level"]),
        ("pass revoke", 2, &["<NAME|--all>"]),
        ("pass revoke a --all", 2, &["cannot be used with"]),
        ("run --help", 0, &["valetkey run [OPTIONS] -- PROGRAM [ARGS]..."]),
        ("pass revoke --help", 0, &["all that is open by it", "<NAME|--all>"]),
        (
            "health --server-info /nope.json",
            1,
            &[
                "there is no /nope.json:",
                "hint: have one write it: valetkey serve --server-info /nope.json",
            ],
        ),
        ("init codex --dir file", 2, &["/file: it is a file", "hint: name a folder"]),
        ("init codex --dir file/below", 2, &["/file: it is a file", "hint: name a folder"]),
        (
            "explain api.example.com/v1",
            0,
            &["GET https://api.example.com/v1\n", "rule        api.example.com"],
        ),
        ("status", 1, &["hint: set MY_TOKEN where valetkey runs"]),
        ("login status --credential mine", 1, &["hint: set MY_TOKEN where valetkey runs"]),
    ];
    for (line, status, words) in table {
        let done = typed(&scene, line, "").await;
        assert_eq!(done.status, status, "{line}: {done:?}");
        let said = format!("{}{}", done.out, done.err);
        for word in words {
            assert!(said.contains(word), "{line}: {word}: {said}");
        }
    }
    assert!(scene.path("file").is_file(), "{blocked}");
}

/// Another rule on the host has the longer path: the one that is named is the one of the request.
#[tokio::test(flavor = "multi_thread")]
async fn the_rule_of_another_login_is_the_one_of_the_request() {
    let scene = scene().await;
    for (path, rule) in
        [("/v1/models", "`openai-api`"), ("/v1/responses", "`openai-api-responses`")]
    {
        let done = typed(&scene, &format!("explain api.openai.com{path}"), "").await;
        assert!(done.out.contains(&format!("rule {rule} is for login = \"api_key\"")), "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_scrubbed_is_said_and_what_cannot_be() {
    let scene = Scene::usual().await;
    let key = scene.path("odd.key");
    scene.configure(&format!(
        "[credentials.odd]\nkind = \"api_key\"\nsource = \"file:{}\"\n[[rules]]\nname = \"quiet\"\n\
         host = \"other.example.com\"\ncredential = \"odd\"\nscrub = true\n{}",
        key.display(),
        scene.world.upstream_toml()
    ));
    fs::write(&key, "long-enough").unwrap();
    let done = typed(&scene, "check", "").await;
    assert_eq!(done.status, 0, "{done:?}");
    assert!(done.err.contains("scrubbed from answers by: quiet\n"), "{done:?}");
    let done = typed(&scene, "explain https://other.example.com/", "").await;
    assert!(
        done.out.contains("scrubs      the credential from what the upstream answers"),
        "{done:?}"
    );
    fs::write(&key, "short").unwrap();
    let done = typed(&scene, "check", "").await;
    assert_eq!(done.status, 1, "{done:?}");
    let words =
        "credential `odd`: it is shorter than 8 characters, too short to be scrubbed from answers";
    assert!(done.err.contains(words), "{done:?}");
    assert!(done.err.contains("take `scrub = true` out of the rule `quiet`"), "{done:?}");
    let done = typed(&scene, "explain https://other.example.com/", "").await;
    let words = "answer      refused (403 target_forbidden): it is shorter than 8 characters";
    assert!(done.out.contains(words) && !done.out.contains("scrubs"), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_this_machine_is_reached_past_valetkey() {
    let scene = Scene::usual().await;
    scene.configure(&format!(
        "[[rules]]\nhost = \"localhost:18443\"\ncredential = \"example\"\n{}",
        scene.world.upstream_toml()
    ));
    let sentence = "tools reach localhost:18443 past valetkey: NO_PROXY names it";
    for line in ["check", "explain localhost:18443", "doctor"] {
        let done = typed(&scene, line, "").await;
        let said = format!("{}{}", done.out, done.err);
        assert!(said.contains(sentence) && said.contains("[upstream.resolve]"), "{line}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_shown_beside_a_broken_configuration() {
    let scene = Scene::usual().await;
    let serving = Serving::start_with(&scene, &["--listen", "0"]).await;
    fs::write(scene.path("broken.toml"), "listen = 8377\n").unwrap();
    let done = typed(&scene, "--config broken.toml status", "").await;
    assert_eq!(done.status, 2, "{done:?}");
    assert!(done.out.contains("proxy           http://127.0.0.1:"), "{done:?}");
    assert!(done.err.contains("listen = \"127.0.0.1:8377\""), "{done:?}");
    let json = typed(&scene, "--config broken.toml status --json", "").await;
    assert!(json.status == 2 && json.out.contains("\"credentials\": null"), "{json:?}");
    drop(serving);
}

/// The shell that `env` has put behind a proxy that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_shell_whose_proxy_is_gone_is_told_and_gets_out() {
    let scene = Scene::usual().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    let put = typed(&scene, &format!("env --shell json --proxy-url {url}"), "").await;
    let put: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&put.out).unwrap();
    let is_chain = |name: &str| name.starts_with("VALETKEY_UPSTREAM");
    let set = put.iter().filter(|(name, _)| name.as_str() != "JAVA_TOOL_OPTIONS");
    let inside = set
        .fold(Scene { ..scene }, |scene, (name, value)| scene.with(name, value.as_str().unwrap()));
    let doctor = typed(&inside, "doctor", "").await;
    let said = format!("not running, but HTTPS_PROXY of this shell names {free}");
    assert!(doctor.out.contains(&said) && doctor.out.contains("Fix: valetkey serve"), "{doctor:?}");
    let serving = Serving::start(&inside).await;
    let doctor = typed(&inside, "doctor", "").await;
    assert!(doctor.out.contains("Fix: eval \"$(valetkey env)\""), "{doctor:?}");
    drop(serving);
    let back = typed(&inside, "env --unset --shell bash", "").await;
    for name in put.keys().filter(|name| *name != "JAVA_TOOL_OPTIONS") {
        assert!(back.out.contains(&format!("unset {name}\n")), "{name}: {back:?}");
    }
    assert!(put.keys().any(|name| is_chain(name)), "{put:?}");
    let shell = format!("{}env", back.out);
    let mut command = Command::new("sh");
    command.args(["-c", &shell]).env_clear().envs(&inside.env).env("PATH", std::env!("PATH"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let left = done(command.spawn().unwrap()).await;
    assert!(!left.out.contains("_PROXY") && !left.out.contains("valetkey/env"), "{left:?}");
}

/// What a shell has of its own comes back, however often it was put behind a proxy, and git is not left with one.
#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_as_before_after_unset() {
    let scene = Scene::usual().await;
    let serving = Serving::start_with(&scene, &["--listen", "0"]).await;
    let certificates = scene.path("mine.pem");
    fs::copy(scene.world.ca_file(), &certificates).unwrap();
    let env = "eval \"$(valetkey env --shell bash)\"";
    let script = format!(
        "env | grep -v ^_= | sort >before; {env}; {env}; git config --get-all http.proxy | wc -l; \
         eval \"$(valetkey env --shell bash --unset)\"; env | grep -v ^_= | sort >after; diff before after && echo same"
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(scene.path("")).env_clear().envs(&scene.env);
    let here = std::path::Path::new(env!("CARGO_BIN_EXE_valetkey")).parent().unwrap();
    command.env("PATH", format!("{}:{}", here.display(), std::env!("PATH")));
    command.env("NODE_EXTRA_CA_CERTS", &certificates).env("NO_PROXY", "intra.corp");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let shell = done(command.spawn().unwrap()).await;
    assert_eq!(shell.out.trim(), "1\nsame", "{shell:?}");
    drop(serving);
}

/// What one needs in an emergency, whatever became of the configuration.
#[tokio::test(flavor = "multi_thread")]
async fn what_ends_something_needs_no_sound_configuration() {
    let scene = scene().await;
    for name in ["a", "b"] {
        assert_eq!(typed(&scene, &format!("pass new {name}"), "").await.status, 0);
    }
    let printed = typed(&scene, "ca print", "").await.out;
    fs::write(scene.path(".config/valetkey/config.toml"), "listen = 8377\n").unwrap();
    let list = typed(&scene, "pass list", "").await;
    assert!(list.status == 0 && list.out.starts_with("a\n"), "{list:?}");
    let revoked = typed(&scene, "pass revoke a", "").await;
    assert_eq!(revoked.status, 0, "{revoked:?}");
    assert!(revoked.err.contains("`a` counts no more"), "{revoked:?}");
    assert!(revoked.err.contains("warning: if there is an audit"), "{revoked:?}");
    let revoked = typed(&scene, "pass revoke --all", "").await;
    assert!(revoked.err.contains("1 pass counts no more"), "{revoked:?}");
    let ca = typed(&scene, "ca print", "").await;
    assert_eq!((ca.status, ca.out), (0, printed));
    assert!(ca.err.contains("listen = \"127.0.0.1:8377\""), "{}", ca.err);
    let verify = typed(&scene, "audit verify", "").await;
    assert!(verify.status == 2 && verify.err.contains("hint: or name the files"), "{verify:?}");
    let out = typed(&scene, "logout", "").await;
    assert!(out.status == 2 && out.err.contains("hint: to sign out of the usual login"), "{out:?}");
    fs::write(scene.path("empty"), "").unwrap();
    let out = typed(&scene, "--config empty logout", "").await;
    assert!(out.err.contains("Successfully logged out"), "{out:?}");
    assert!(!scene.path(".codex/auth.json").exists());
}

/// A pass that nobody has seen would let somebody in, one day.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_could_not_be_shown_is_none() {
    let scene = scene().await;
    let mut command = scene.valetkey(&["pass", "new", "a"]);
    command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
    let unseen = done(command.spawn().unwrap()).await;
    assert_eq!(unseen.status, 1, "{unseen:?}");
    assert!(unseen.err.contains("hint: there is no such pass now"), "{unseen:?}");
    assert_eq!(typed(&scene, "pass list", "").await.out, "");
    assert_eq!(typed(&scene, "pass new a", "").await.status, 0);
}

/// Each command says the same of a login that cannot be read, and what it says helps.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_a_damaged_login_helps() {
    let scene = Scene::usual().await;
    let file = scene.path(".codex/auth.json");
    fs::write(&file, "{").unwrap();
    let hint = format!("move {} away, then sign in again", file.display());
    for line in ["status", "check", "doctor"] {
        let done = typed(&scene, line, "").await;
        assert!([&*done.out, &*done.err].concat().contains(&hint), "{line}: {done:?}");
    }
    let out = typed(&scene, "logout", "").await;
    assert!(out.err.contains(&format!("hint: move {} away: then", file.display())), "{out:?}");
    assert!(!out.err.contains("sign in again"), "{out:?}");
}

/// An audit that nobody can write: `serve` refuses, and who is asked what is wrong says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_that_cannot_be_written_is_told() {
    let scene = Scene::usual().await;
    let audit = |file: &str| {
        let audit = format!("[audit]\nto = \"file\"\nfile = \"{file}\"\n");
        scene.configure(&format!("{audit}{}", scene.world.upstream_toml()));
    };
    fs::create_dir(scene.path("folder")).unwrap();
    audit(scene.path("folder").to_str().unwrap());
    for line in ["status", "check", "doctor", "serve --listen 0"] {
        let done = typed(&scene, line, "").await;
        let said = [&*done.out, &*done.err].concat();
        assert!(said.contains("the audit cannot be written"), "{line}: {done:?}");
        assert!(said.contains("name a file in it"), "{line}: {done:?}");
    }
    assert!(!scene.path("folder.lock").exists());
    audit("logs/audit.jsonl");
    let doctor = typed(&scene, "doctor", "").await;
    assert!(doctor.out.contains("logs/audit.jsonl"), "{doctor:?}");
    for file in ["", "~root/a"] {
        audit(file);
        assert_eq!(typed(&scene, "check", "").await.status, 2, "{file}");
    }
}

/// Nobody is told to type what would not work.
#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_led_to_the_proxy_that_says_so() {
    let scene = Scene::usual().await;
    let mut first = Serving::start_with(&scene, &["--listen", "0"]).await;
    let said = first.hear("put a shell behind it").await;
    assert!(said.ends_with("eval \"$(valetkey env)\""), "{said}");
    let mut second = Serving::start_with(&scene, &["--listen", "0"]).await;
    let said = second.hear("put a shell behind it").await;
    assert!(said.contains("--proxy-url http://127.0.0.1:"), "{said}");
    assert!(!said.contains(&first.address.to_string()), "{said}");
}

/// With too few descriptors a client would be told that it is somebody else.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn too_few_descriptors_are_told() {
    let scene = Scene::usual().await;
    let started = async |count: u32, command: &str| {
        let script = format!("ulimit -n {count}; exec \"$0\" {command}");
        done(scene.valetkey_in(&["sh", "-c", &script], &[]).spawn().unwrap()).await
    };
    let refused = started(20, "serve --listen 0").await;
    assert!(refused.status == 1 && refused.err.contains("too few to serve anybody"), "{refused:?}");
    scene.configure(&format!("[limits]\nconnections = 5000\n{}", scene.world.upstream_toml()));
    let warned = started(150, "check").await;
    assert!(warned.err.contains("connections = 5000 is more than"), "{warned:?}");
    let calm = started(20_000, "check").await;
    assert!(!calm.err.contains("connections = 5000"), "{calm:?}");
}

/// What cannot be used says why, and what would help.
#[tokio::test(flavor = "multi_thread")]
async fn the_reason_is_said_and_not_another_one() {
    let scene = Scene::usual().await.with("EMPTY", "");
    let key = |source: &str| {
        let key = format!("[credentials.k]\nkind = \"api_key\"\nsource = \"{source}\"\n");
        scene.configure(&format!("{key}{}", scene.world.upstream_toml()));
    };
    fs::write(scene.path("two"), "sk-test\n\n").unwrap();
    fs::create_dir(scene.path("folder")).unwrap();
    let path = |name: &str| format!("file:{}", scene.path(name).display());
    for (source, reason, hint) in [
        (path("two"), "a line's end in the value", "one line, no spaces"),
        (path("folder"), "not a regular file", "must be a regular file"),
        (path("none"), "is not there", "write the key into"),
        (
            "env:EMPTY".to_owned(),
            "variable EMPTY cannot be used: the value is empty",
            "put the bare key",
        ),
    ] {
        key(&source);
        let status = typed(&scene, "status", "").await;
        assert!(status.out.contains(reason), "{source}: {status:?}");
        assert!(status.err.contains(hint), "{source}: {status:?}");
    }
    for (rest, words) in [
        ("[credentials.k]\nkind = \"apikey\"\n", "did you mean `api_key`?"),
        (
            "[[listeners]]\naddress = \"127.0.0.1:0\"\nallow_uids = [4294967295]\n",
            "the number of a user",
        ),
    ] {
        scene.configure(rest);
        let check = typed(&scene, "check", "").await;
        assert!(check.status == 2 && check.err.contains(words), "{check:?}");
    }
    scene.configure("[upstream]\nca_bundle = \"/none.pem\"\n");
    let status = typed(&scene, "status", "").await;
    assert!(status.status == 1 && status.out.contains("proxy           not running"), "{status:?}");
    scene.configure(&scene.world.upstream_toml());
    let empty = typed(&scene, "run -- ", "").await;
    assert!(empty.status == 127 && empty.err.contains("an empty word"), "{empty:?}");
    fs::write(scene.path("audit"), "").unwrap();
    for (file, words) in
        [("audit", "there is no line"), ("folder", "name files"), ("none", "name files")]
    {
        let verify = typed(&scene, &format!("audit verify {file}"), "").await;
        assert!(verify.status == 1 && verify.err.contains(words), "{verify:?}");
        assert!(!verify.out.contains("sound"), "{verify:?}");
    }
}

/// A file that is gone is no file that was read.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_is_gone_is_told() {
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    fs::remove_file(scene.path(".config/valetkey/config.toml")).unwrap();
    serving.signal(rustix::process::Signal::HUP);
    let said = serving.hear("is not there").await;
    assert!(said.contains("config.toml is not there: the defaults hold"), "{said}");
}

/// Somebody whose home is not theirs: of root none keeps root out, so it is another user then.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_keeps_us_out_is_named() {
    let (home, runtime) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::set_permissions(home.path(), Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(runtime.path(), Permissions::from_mode(0o777)).unwrap();
    let hint = format!("hint: is {0} yours? ls -ld {0}", home.path().display());
    for line in ["pass new a", "ca print", "run -- true", "serve --listen 0"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_valetkey"));
        command.args(line.split(' ')).env_clear().current_dir("/").kill_on_drop(true);
        command.env("HOME", home.path()).env("XDG_RUNTIME_DIR", runtime.path());
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let Ok(child) = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() else {
            println!("skipped: another user may not run what was built");
            return;
        };
        let done = done(child).await;
        assert_eq!(done.status, 1, "{line}: {done:?}");
        assert!(done.err.contains(&hint), "{line}: {done:?}");
    }
}

/// The user `nobody`.
#[cfg(target_os = "linux")]
const NOBODY: u32 = 65_534;
