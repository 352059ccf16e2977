//! `init codex`, `init decoy` and `token`: what a client without a credential starts from, and what one gets that
//! asks a command.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::process::Command;
use valetkey::clock::Clock;
use valetkey::credential::CredentialName;
use valetkey::credential::claims::Claims;
use valetkey::decoy::{Tag, tags_in};
use valetkey::sandbox::Settings;
use valetkey::secret::Secret;

use super::support::{Done, KEY, Scene, done, fed, program};

impl Scene {
    /// What is printed, and that it is nothing secret.
    async fn typed_ok(&self, arguments: &[&str]) -> Done {
        let done = self.typed(arguments).await;
        assert_eq!(done.status, 0, "{arguments:?}: {done:?}");
        self.assert_no_secret(&format!("{arguments:?}"), &format!("{}{}", done.out, done.err));
        done
    }

    fn cached(&self, home: &str) -> Value {
        let text = fs::read_to_string(self.path(home).join("auth.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Signs in with an API key, in the place of the ChatGPT login.
    fn sign_in_with_key(&self) {
        let login = json!({ "auth_mode": "apikey", "OPENAI_API_KEY": "sk-vk-canary-real-key" });
        fs::write(self.path(".codex/auth.json"), login.to_string()).unwrap();
    }
}

fn tag(name: &str) -> Tag {
    Tag::of(&name.parse::<CredentialName>().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_of_decoys() {
    let scene = Scene::usual().await;
    let wrote = scene.typed_ok(&["init", "codex", "--dir", "new/box"]).await;
    assert!(wrote.out.is_empty() && wrote.err.contains("wrote "), "{wrote:?}");
    assert!(wrote.err.contains("CODEX_HOME=") && wrote.err.contains("valetkey env"), "{wrote:?}");
    let mode = |path: &str| fs::metadata(scene.path(path)).unwrap().mode() & 0o777;
    assert_eq!((mode("new/box"), mode("new/box/auth.json")), (0o700, 0o600));
    let cached = scene.cached("new/box");
    assert_eq!(
        (&cached["auth_mode"], &cached["OPENAI_API_KEY"]),
        (&json!("chatgpt"), &Value::Null)
    );
    assert!(cached["last_refresh"].is_string());
    for name in ["access_token", "id_token", "refresh_token"] {
        let token = cached["tokens"][name].as_str().unwrap();
        assert_eq!(tags_in(token.as_bytes()), [tag("openai")], "{name}");
    }
    assert_eq!(cached["tokens"]["account_id"], scene.login.account_id.as_str());
    let claims = Claims::of(&Secret::new(cached["tokens"]["id_token"].as_str().unwrap())).unwrap();
    let real = Claims::of(&scene.login.id).unwrap();
    assert_eq!((claims.email, claims.account_id), (real.email, real.account_id));
    assert_eq!((claims.plan, claims.fedramp), (real.plan, real.fedramp));
    scene.assert_no_secret("the home", &cached.to_string());

    let again = scene.typed_ok(&["init", "codex", "--dir", "new/box"]).await;
    assert!(again.err.starts_with("unchanged: "), "{again:?}");
    assert!(again.err.contains("new/box codex\n") && !again.err.contains("box/ "), "{again:?}");
    assert_eq!(scene.cached("new/box"), cached, "the same decoys");

    let other = scene.world.issuer().login_as("acct-other", time::Duration::hours(1));
    fs::write(scene.path(".codex/auth.json"), other.auth_json()).unwrap();
    let moved = scene.typed_ok(&["init", "codex", "--dir", "new/box"]).await;
    assert!(moved.err.starts_with("replacing the decoys of another login"), "{moved:?}");
    assert_eq!(scene.cached("new/box")["tokens"]["account_id"], "acct-other");

    let mut confused = scene.valetkey(&["login", "status"]);
    let confused = done(confused.env("CODEX_HOME", scene.path("new/box")).spawn().unwrap()).await;
    assert!(confused.status == 1 && confused.out.contains("a decoy of a login"), "{confused:?}");

    scene.typed_ok(&["init", "codex"]).await;
    assert_eq!(scene.cached("codex-home")["tokens"]["account_id"], "acct-other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_of_decoys_for_a_personal_access_token() {
    let scene = Scene::usual().await;
    let token = scene.personal_token();
    fs::write(
        scene.path(".codex/auth.json"),
        json!({ "OPENAI_API_KEY": null, "personal_access_token": token }).to_string(),
    )
    .unwrap();
    let unknown = scene.typed(&["init", "codex"]).await;
    assert!(unknown.status == 1 && unknown.err.contains("valetkey token openai"), "{unknown:?}");
    assert!(!scene.path("codex-home").exists());
    // What is printed is the token; that it was asked about is what matters.
    assert_eq!(scene.typed(&["token", "openai"]).await.out, format!("{token}\n"));
    scene.typed_ok(&["init", "codex"]).await;
    let cached = scene.cached("codex-home");
    assert_eq!(cached["tokens"]["account_id"], scene.login.account_id.as_str());
    assert_eq!(cached["auth_mode"], "chatgpt");
    scene.assert_no_secret("the home", &cached.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_login_is_never_written_over() {
    let scene = Scene::usual().await;
    let before = fs::read(scene.path(".codex/auth.json")).unwrap();
    std::os::unix::fs::symlink(scene.path(".codex"), scene.path("link")).unwrap();
    let other = scene.world.issuer().login_as("acct-other", time::Duration::hours(1));
    for (folder, content) in [
        ("real", other.auth_json()),
        ("key", json!({ "OPENAI_API_KEY": "sk-vk-canary-other" }).to_string()),
        ("broken", "{".to_owned()),
    ] {
        fs::create_dir(scene.path(folder)).unwrap();
        fs::write(scene.path(folder).join("auth.json"), &content).unwrap();
        let refused = scene.typed(&["init", "codex", "--dir", folder]).await;
        assert_eq!(refused.status, 1, "{folder}: {refused:?}");
        assert!(refused.err.contains("hint:"), "{folder}: {refused:?}");
        assert_eq!(fs::read_to_string(scene.path(folder).join("auth.json")).unwrap(), content);
    }
    for home in [".codex", "link", "./box/../.codex"] {
        let refused = scene.typed(&["init", "codex", "--dir", home]).await;
        assert_eq!(refused.status, 1, "{home}: {refused:?}");
        assert_eq!(fs::read(scene.path(".codex/auth.json")).unwrap(), before);
        assert!(!scene.path("box").exists(), "nothing was touched");
    }
    // Whose home it is counts, also where nobody is signed in there.
    let two = "[credentials.second]\nkind = \"codex\"\nhome = \"second\"\n";
    scene.configure(&format!("{two}{}", scene.world.upstream_toml()));
    let second = scene.path(".config/valetkey/second");
    let typed = ["init", "codex", "--credential", "openai", "--dir", second.to_str().unwrap()];
    assert_eq!(scene.typed(&typed).await.status, 1);
    assert!(!second.exists());
    let third = "use = []\n[credentials.third]\nkind = \"codex\"\nhome = \"third\"\n";
    fs::write(scene.path(".config/valetkey/config.toml"), format!("{third}{two}")).unwrap();
    let which = scene.typed(&["init", "codex"]).await;
    assert!(which.status == 2 && which.err.contains("--credential"), "{which:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_signed_in_decides_what_is_made() {
    let scene = Scene::usual().await;
    let wrong = scene.typed(&["init", "codex", "--api-key"]).await;
    assert!(wrong.status == 1 && wrong.err.contains("hint:"), "{wrong:?}");
    scene.sign_in_with_key();
    let wrong = scene.typed(&["init", "codex"]).await;
    assert!(wrong.status == 1 && wrong.err.contains("--api-key"), "{wrong:?}");
    let made = scene.typed_ok(&["init", "codex", "--api-key"]).await;
    let key = made.out.strip_prefix("export CODEX_API_KEY='sk-").unwrap();
    let key = key.strip_suffix("'\n").unwrap();
    assert_eq!(tags_in(key.as_bytes()), [tag("openai")]);
    fs::remove_file(scene.path(".codex/auth.json")).unwrap();
    for typed in [&["init", "codex"][..], &["init", "codex", "--api-key"]] {
        let nobody = scene.typed(typed).await;
        assert_eq!(nobody.status, 4, "{nobody:?}");
        assert!(nobody.err.contains("hint: valetkey login"), "{nobody:?}");
    }
    assert!(!scene.path("codex-home").exists());
    for (shape, prefix) in [("openai", "sk-"), ("anthropic", "sk-ant-api03-"), ("github", "ghp_")] {
        let made = scene.typed_ok(&["init", "decoy", "example", "--shape", shape]).await;
        assert!(made.out.starts_with(prefix) && made.err.is_empty(), "{made:?}");
        assert_eq!(tags_in(made.out.as_bytes()), [tag("example")]);
    }
    assert_eq!(scene.typed(&["init", "decoy", "nobody"]).await.status, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_for_those_who_ask_a_command() {
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    let printed = scene.typed(&["token"]).await;
    assert_eq!(printed.status, 0, "{printed:?}");
    assert_eq!(scene.world.issuer().refreshes(), 1, "the expired one is not printed");
    let access = scene.cached(".codex")["tokens"]["access_token"].as_str().unwrap().to_owned();
    assert_eq!((printed.out, printed.err.as_str()), (format!("{access}\n"), ""));
    let printed = scene.typed(&["token", "openai"]).await;
    assert_eq!(printed.out, format!("{access}\n"));
    assert_eq!(scene.typed(&["token", "example"]).await.out, format!("{KEY}\n"));
    assert_eq!(scene.typed(&["token", "nobody"]).await.status, 2);
    fs::remove_file(scene.path(".codex/auth.json")).unwrap();
    let nobody = scene.typed(&["token"]).await;
    assert!(nobody.status == 4 && nobody.out.is_empty(), "{nobody:?}");
    assert!(nobody.err.contains("valetkey login"), "{nobody:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_due_is_refreshed_first() {
    // An issuer that is almost an hour behind: its tokens of one hour are about to end here.
    let clock = Clock::system();
    clock.advance(time::Duration::minutes(-55));
    let settings = Settings { clock, ..Settings::default() };
    let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
    scene.configure(&scene.world.upstream_toml());
    let old = scene.cached(".codex")["tokens"]["access_token"].as_str().unwrap().to_owned();
    let printed = scene.typed(&["token"]).await;
    assert_eq!(scene.world.issuer().refreshes(), 1);
    let new = scene.cached(".codex")["tokens"]["access_token"].as_str().unwrap().to_owned();
    assert_ne!(old, new);
    assert_eq!(printed.out, format!("{new}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_no_secret_unless_asked() {
    let Some(script) = program("script") else { return };
    let scene = Scene::usual().await;
    let at_terminal = async |typed: &str| {
        let typed = format!("{} {typed}", env!("CARGO_BIN_EXE_valetkey"));
        let mut command = Command::new(&script);
        command.args(["-qefc", &typed, "/dev/null"]).env_clear().envs(&scene.env);
        command.env("PATH", std::env!("PATH")).current_dir(scene.home.path()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        done(command.spawn().unwrap()).await
    };
    for typed in ["token example", "token example get --helper git"] {
        let refused = at_terminal(typed).await;
        assert_eq!(refused.status, 2, "{refused:?}");
        assert!(refused.out.contains("--show"), "{refused:?}");
        scene.assert_no_secret("the terminal", &refused.out);
    }
    let shown = at_terminal("token example --show").await;
    assert_eq!((shown.status, shown.out.trim_end()), (0, KEY));
}

#[tokio::test(flavor = "multi_thread")]
async fn git_asks_for_what_a_rule_covers() {
    let Some(git) = program("git") else { return };
    let scene = Scene::usual().await;
    let helper =
        format!("credential.helper=!{} token --helper git", env!("CARGO_BIN_EXE_valetkey"));
    let ask = async |question: &str| {
        let mut command = Command::new(&git);
        command.args(["-c", "credential.helper=", "-c", &helper, "credential", "fill"]);
        command.env_clear().envs(&scene.env).env("PATH", std::env!("PATH"));
        command.env("GIT_TERMINAL_PROMPT", "0").env("GIT_CONFIG_NOSYSTEM", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        fed(command, question).await
    };
    let filled = ask("protocol=https\nhost=api.example.com\n\n").await;
    assert_eq!(filled.status, 0, "{filled:?}");
    assert!(
        filled.out.contains(&format!("username=x-access-token\npassword={KEY}\n")),
        "{filled:?}"
    );
    let filled = ask("protocol=https\nhost=api.example.com\nusername=me\n\n").await;
    assert!(filled.out.contains(&format!("username=me\npassword={KEY}\n")), "{filled:?}");
    let access = scene.cached(".codex")["tokens"]["access_token"].as_str().unwrap().to_owned();
    let filled = ask("protocol=https\nhost=chatgpt.com\n\n").await;
    assert!(filled.out.contains(&format!("password={access}\n")), "{filled:?}");
    assert!(filled.out.contains("password_expiry_utc="), "{filled:?}");
    for other in [
        "protocol=https\nhost=other.example.com\n\n",
        "protocol=https\nhost=api.example.com:8443\n\n",
        "protocol=http\nhost=api.example.com\n\n",
        "protocol=https\nhost=auth.openai.com\n\n",
        // Tunnelled: its rules are for an API key.
        "protocol=https\nhost=api.openai.com\n\n",
    ] {
        let unfilled = ask(other).await;
        assert_ne!(unfilled.status, 0, "{other}: {unfilled:?}");
        scene.assert_no_secret("git", &unfilled.out);
    }
    for arguments in [
        &["token", "--helper", "git", "store"][..],
        &["token", "--helper", "git", "erase"],
        &["token", "openai", "--helper", "git", "get"],
    ] {
        let question =
            format!("protocol=https\nhost=api.example.com\nusername=u\npassword={KEY}\n");
        let done = fed(scene.valetkey(arguments), &question).await;
        assert_eq!((done.status, done.out.as_str()), (0, ""), "{arguments:?} {done:?}");
    }
    assert_eq!(scene.typed(&["token", "--helper", "git"]).await.status, 2);
    assert_eq!(scene.typed(&["token", "example", "get"]).await.status, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_asks_for_what_a_rule_covers() {
    let scene = Scene::usual().await;
    let ask = async |operation: &str, question: &str| {
        fed(scene.valetkey(&["token", "example", "--helper", "docker", operation]), question).await
    };
    for server in ["api.example.com", "https://api.example.com/v1/\n"] {
        let found = ask("get", server).await;
        assert_eq!(found.status, 0, "{found:?}");
        let answer: Value = serde_json::from_str(&found.out).unwrap();
        let expected =
            json!({ "ServerURL": server.trim(), "Username": "x-access-token", "Secret": KEY });
        assert_eq!(answer, expected);
    }
    for server in ["other.example.com", "http://api.example.com", "chatgpt.com", ""] {
        let none = ask("get", server).await;
        assert_eq!(
            (none.status, none.out.as_str()),
            (1, "credentials not found in native keychain\n"),
            "{server}"
        );
    }
    assert_eq!(ask("list", "").await.out, "{}\n");
    assert_eq!(ask("erase", "api.example.com").await.status, 0);
    let refused =
        ask("store", "{\"ServerURL\": \"a\", \"Username\": \"b\", \"Secret\": \"c\"}").await;
    assert!(refused.status == 1 && refused.out.contains("stores no login"), "{refused:?}");
    assert!(!Path::new(&scene.path(".docker")).exists());
}
