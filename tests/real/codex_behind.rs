//! The real Codex CLI behind the proxy, without a credential: it works, and nowhere does it hold a real token.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::join_all;
use http::Version;
use serde_json::{Value, json};
use tokio::process::Command;
use valetkey::decoy::tags_in;
use valetkey::sandbox::{SAID, Settings};
use valetkey::secret::Secret;

use super::served::Serving;
use super::support::{Done, Scene, codex, done};

const API_KEY: &str = "sk-vk-canary-the-real-api-key";

/// A Codex in a home of its own, which knows of the proxy and of nothing else.
struct Behind {
    scene: Scene,
    codex: String,
    /// Ends with this.
    _serving: Serving,
    /// What `valetkey env` says.
    env: Vec<(String, String)>,
}

impl Behind {
    /// Behind a `valetkey serve` with a ChatGPT login whose token lives so long, and decoys of it. `None` where
    /// Codex is missing.
    async fn new(lifetime: time::Duration) -> Option<Self> {
        let codex = codex()?;
        let scene = Scene::in_world(Settings::default(), lifetime).await;
        Self::in_scene(codex, scene).await.with_decoys().await.into()
    }

    async fn in_scene(codex: String, scene: Scene) -> Self {
        // What Codex asks of others while it works.
        let others =
            "\"github.com:443\" = \"127.0.0.1:9\"\n\"api.github.com:443\" = \"127.0.0.1:9\"\n";
        scene.configure(&(scene.world.upstream_toml() + others));
        let serving = Serving::start(&scene).await;
        let asked = scene.typed(&["env", "--shell", "json"]).await;
        let told: Value = serde_json::from_str(&asked.out).unwrap_or_else(|_| panic!("{asked:?}"));
        let text =
            |(name, value): (&String, &Value)| (name.clone(), value.as_str().unwrap().to_owned());
        let env = told.as_object().unwrap().iter().map(text).collect();
        fs::create_dir(scene.path("client")).unwrap();
        Self { scene, codex, _serving: serving, env }
    }

    async fn with_decoys(self) -> Self {
        let home = self.home();
        let arguments = ["init", "codex", "--dir", home.to_str().unwrap()];
        let made = self.scene.typed(&arguments).await;
        assert_eq!(made.status, 0, "{made:?}");
        self
    }

    fn client(&self) -> PathBuf {
        self.scene.path("client")
    }

    fn home(&self) -> PathBuf {
        self.client().join("codex")
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", std::env!("PATH"));
        command.env("HOME", self.client()).env("CODEX_HOME", self.home());
        command.current_dir(self.client()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn codex(&self, arguments: &[&str], more: &[(&str, &str)]) -> Done {
        let mut command = self.command(&self.codex, arguments);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        done(command.envs(more.iter().copied()).spawn().unwrap()).await
    }

    /// One turn, which must end with what the API says.
    async fn says_hi(&self, more: &[(&str, &str)]) -> Done {
        let done = self.codex(&["exec", "--skip-git-repo-check", "say hi"], more).await;
        assert_eq!(done.status, 0, "{done:?}");
        assert!(done.out.contains(SAID), "{done:?}");
        self.scene.assert_no_secret("Codex's output", &format!("{}{}", done.out, done.err));
        done
    }

    /// Whether turns came over a WebSocket, and whether over events.
    fn ways(&self, path: &str) -> (bool, bool) {
        let seen = self.scene.world.api().seen();
        let turns: Vec<_> = seen.iter().filter(|seen| seen.path == path).collect();
        let is_socket = |seen: &&&valetkey::sandbox::Seen| seen.headers.contains_key("upgrade");
        let sockets = turns.iter().filter(is_socket).count();
        assert!(turns.iter().all(|seen| seen.version <= Version::HTTP_2));
        (sockets > 0, sockets < turns.len())
    }

    /// Nothing that the client has, had or sent is a real token, and no decoy reached the API.
    fn assert_clean(&self) {
        let all = files(&self.client());
        assert!(all.iter().any(|path| path.starts_with(self.home())), "Codex has written nothing");
        for path in all {
            let text = fs::read(&path).unwrap();
            self.scene
                .assert_no_secret(&path.display().to_string(), &String::from_utf8_lossy(&text));
        }
        for (name, value) in &self.env {
            self.scene.assert_no_secret(name, value);
        }
        for seen in self.scene.world.api().seen() {
            // ab.chatgpt.com is tunnelled, and gets no credential of either kind.
            assert!(!format!("{:?}", seen.headers).contains("valetkeyDecoy"), "{seen:?}");
        }
    }

    fn stays_signed_in(&self) {
        let issuer = self.scene.world.issuer();
        assert_eq!((issuer.reuses(), issuer.revokes()), (0, 0));
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            all.extend(files(&path));
        } else if path.is_file() {
            all.push(path);
        }
    }
    all
}

const CHATGPT_TURNS: &str = "/backend-api/codex/responses";
const API_TURNS: &str = "/v1/responses";

#[tokio::test(flavor = "multi_thread")]
async fn decoys_of_a_chatgpt_login_over_a_websocket() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    behind.says_hi(&[]).await;
    assert_eq!(behind.ways(CHATGPT_TURNS), (true, false));
    behind.assert_clean();
    assert_eq!(behind.scene.world.issuer().posts(), 0);
    let seen = behind.scene.world.api().seen();
    assert!(seen.iter().any(|seen| seen.path == "/backend-api/wham/accounts/check"));
}

#[tokio::test(flavor = "multi_thread")]
async fn decoys_of_a_chatgpt_login_over_events() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    behind.scene.world.api().refuse_websockets();
    behind.says_hi(&[]).await;
    assert_eq!(behind.ways(CHATGPT_TURNS), (true, true), "asked for one, and went on without");
    behind.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_proxy_of_its_own() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    let home = format!("CODEX_HOME={}", behind.home().display());
    let exec = ["exec", "--skip-git-repo-check", "say hi"];
    let typed = [&["run", "--", "env", &home, &behind.codex][..], &exec].concat();
    let turn = behind.scene.typed(&typed).await;
    assert!(turn.status == 0 && turn.out.contains(SAID), "{turn:?}");
    behind.scene.assert_no_secret("Codex's output", &format!("{}{}", turn.out, turn.err));
    behind.assert_clean();
    // Where valetkey is told of that home as well, it says that nobody is signed in there.
    let mut confused = behind.scene.valetkey(&["login", "status"]);
    let confused = done(confused.env("CODEX_HOME", behind.home()).spawn().unwrap()).await;
    assert!(confused.status == 1 && confused.out.contains("a decoy of a login"), "{confused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_home_at_all_and_an_api_key() {
    for events_only in [false, true] {
        let Some(codex) = codex() else { return };
        let scene = Scene::in_world(Settings::default(), time::Duration::hours(1)).await;
        scene.world.api().accept(Secret::new(API_KEY));
        let login = json!({ "auth_mode": "apikey", "OPENAI_API_KEY": API_KEY });
        fs::write(scene.path(".codex/auth.json"), login.to_string()).unwrap();
        let behind = Behind::in_scene(codex, scene).await;
        fs::create_dir(behind.home()).unwrap();
        if events_only {
            behind.scene.world.api().refuse_websockets();
        }
        behind.says_hi(&[]).await;
        assert_eq!(behind.ways(API_TURNS), (true, events_only));
        // And where it is told a key that looks like one.
        behind.scene.world.api().clear();
        let made = behind.scene.valetkey(&["init", "codex", "--api-key"]).output().await.unwrap();
        let made = String::from_utf8(made.stdout).unwrap();
        let (name, key) = made.trim().strip_prefix("export ").unwrap().split_once('=').unwrap();
        assert_eq!(name, "CODEX_API_KEY");
        behind.says_hi(&[(name, key.trim_matches('\''))]).await;
        assert_eq!(behind.ways(API_TURNS), (true, events_only));
        behind.assert_clean_of_keys();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_asks_a_command() {
    let Some(codex) = codex() else { return };
    let scene = Scene::in_world(Settings::default(), time::Duration::hours(1)).await;
    let behind = Behind::in_scene(codex, scene).await;
    fs::create_dir(behind.home()).unwrap();
    // The command is one of a person's own, not of a client that is to hold nothing. The host has no rule.
    let script = behind.client().join("token");
    let (home, valetkey) = (behind.scene.home.path().display(), env!("CARGO_BIN_EXE_valetkey"));
    let ask = format!(
        "#!/bin/sh\nunset CODEX_HOME\nHOME='{home}' EXAMPLE_TOKEN='-' exec '{valetkey}' token\n"
    );
    fs::write(&script, ask).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    let provider = format!(
        "model = \"any\"\nmodel_provider = \"own\"\n[model_providers.own]\nname = \"own\"\n\
         base_url = \"https://other.example.com/v1\"\nwire_api = \"responses\"\n\
         auth = {{ command = \"{}\", args = [] }}\n",
        script.display()
    );
    fs::write(behind.home().join("config.toml"), provider).unwrap();
    let done = behind.codex(&["exec", "--skip-git-repo-check", "say hi"], &[]).await;
    assert!(done.status == 0 && done.out.contains(SAID), "{done:?}");
    let seen = behind.scene.world.api().seen();
    let turns: Vec<_> = seen.iter().filter(|seen| seen.host == "other.example.com").collect();
    assert!(turns.iter().any(|seen| seen.path == API_TURNS), "{seen:?}");
    assert!(turns.iter().all(|seen| seen.headers.contains_key("authorization")));
}

impl Behind {
    /// As [`Behind::assert_clean`], for hosts that are ruled: a decoy of an API key goes through tunnels, where
    /// nobody sees it and nobody takes it.
    fn assert_clean_of_keys(&self) {
        for path in files(&self.client()) {
            let text = fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&text);
            assert!(!text.contains(API_KEY), "{}", path.display());
        }
        for seen in self.scene.world.api().seen() {
            let is_ruled = seen.host == "api.openai.com";
            let holds_decoy = format!("{:?}", seen.headers).contains("valetkeyDecoy");
            assert!(!is_ruled || !holds_decoy, "{seen:?}");
            if is_ruled {
                assert_eq!(seen.headers["authorization"], format!("Bearer {API_KEY}").as_str());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn six_at_once_on_an_expired_token_cause_one_refresh() {
    let Some(behind) = Behind::new(time::Duration::minutes(-1)).await else { return };
    let all = join_all((0..6).map(|_| behind.says_hi(&[]))).await;
    assert_eq!(all.len(), 6);
    assert_eq!(behind.scene.world.issuer().refreshes(), 1);
    behind.stays_signed_in();
    behind.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_the_api_rejects_is_replaced_unseen() {
    for events_only in [false, true] {
        let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
        behind.scene.world.api().reject(&behind.scene.login.access);
        if events_only {
            behind.scene.world.api().refuse_websockets();
        }
        let home = fs::read(behind.home().join("auth.json")).unwrap();
        behind.says_hi(&[]).await;
        assert_eq!(behind.scene.world.issuer().refreshes(), 1);
        behind.stays_signed_in();
        assert_eq!(fs::read(behind.home().join("auth.json")).unwrap(), home, "Codex saw no 401");
        behind.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_rejects_every_token_causes_one_refresh() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    let api = behind.scene.world.api();
    api.refuse_websockets();
    api.reject_all();
    let done = behind.codex(&["exec", "--skip-git-repo-check", "say hi"], &[]).await;
    assert_ne!(done.status, 0, "{done:?}");
    behind.scene.assert_no_secret("Codex's output", &format!("{}{}", done.out, done.err));
    assert_eq!(behind.scene.world.issuer().posts(), 1, "what Codex refreshes is decoys");
    behind.stays_signed_in();
    behind.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn its_own_refresh_brings_it_decoys() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    let path = behind.home().join("auth.json");
    let read = || -> Value { serde_json::from_slice(&fs::read(&path).unwrap()).unwrap() };
    // A decoy that has expired by its own account, as one of ten years ago has.
    let mut cached = read();
    let access = cached["tokens"]["access_token"].as_str().unwrap().to_owned();
    let (head, rest) = access.split_once('.').unwrap();
    let (claims, mark) = rest.split_once('.').unwrap();
    let mut claims: Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    claims["exp"] = json!(1_700_000_000);
    let claims = URL_SAFE_NO_PAD.encode(claims.to_string());
    let expired = format!("{head}.{claims}.{mark}");
    cached["tokens"]["access_token"] = json!(expired);
    fs::write(&path, cached.to_string()).unwrap();

    behind.says_hi(&[]).await;
    let now = read();
    for name in ["access_token", "refresh_token"] {
        let token = now["tokens"][name].as_str().unwrap();
        assert_ne!(token, cached["tokens"][name].as_str().unwrap(), "{name}");
        assert_eq!(tags_in(token.as_bytes()).len(), 1, "{name}");
    }
    assert_eq!(behind.scene.world.issuer().posts(), 0);
    behind.stays_signed_in();
    behind.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn its_logout_leaves_our_login_alive() {
    let Some(behind) = Behind::new(time::Duration::hours(1)).await else { return };
    let status = behind.codex(&["login", "status"], &[]).await;
    assert!(status.status == 0 && status.err.contains("Logged in using ChatGPT"), "{status:?}");
    behind.says_hi(&[]).await;
    let logout = behind.codex(&["logout"], &[]).await;
    assert!(logout.status == 0 && logout.err.contains("Successfully logged out"), "{logout:?}");
    assert!(!behind.home().join("auth.json").exists());
    behind.stays_signed_in();
    let behind = behind.with_decoys().await;
    behind.says_hi(&[]).await;
    behind.assert_clean();
}

/// A login of its own passes through, and is not ours; its requests are signed in with ours all the same.
#[tokio::test(flavor = "multi_thread")]
async fn it_may_sign_in_by_itself() {
    let Some(codex) = codex() else { return };
    let scene = Scene::in_world(Settings::default(), time::Duration::hours(1)).await;
    let behind = Behind::in_scene(codex, scene).await;
    let issuer = behind.scene.world.issuer();
    let ours = fs::read(behind.scene.path(".codex/auth.json")).unwrap();
    fs::create_dir_all(behind.home()).unwrap();
    issuer.device_interval(1);
    issuer.approve_device();
    let signed_in = behind.codex(&["login", "--device-auth"], &[]).await;
    assert_eq!(signed_in.status, 0, "{signed_in:?}");
    let theirs: Value =
        serde_json::from_slice(&fs::read(behind.home().join("auth.json")).unwrap()).unwrap();
    let theirs = theirs["tokens"]["access_token"].as_str().unwrap().to_owned();
    assert!(tags_in(theirs.as_bytes()).is_empty(), "it is a real login");
    assert_eq!(fs::read(behind.scene.path(".codex/auth.json")).unwrap(), ours);

    behind.scene.world.api().clear();
    let turn = behind.codex(&["exec", "--skip-git-repo-check", "say hi"], &[]).await;
    assert!(turn.status == 0 && turn.out.contains(SAID), "{turn:?}");
    // With the host's login, whatever the client has.
    let host: Value = serde_json::from_slice(&ours).unwrap();
    let bearer = format!("Bearer {}", host["tokens"]["access_token"].as_str().unwrap());
    let seen = behind.scene.world.api().seen();
    let turns: Vec<_> = seen.iter().filter(|seen| seen.path == CHATGPT_TURNS).collect();
    assert!(!turns.is_empty() && turns.iter().all(|it| it.headers["authorization"] == bearer));
    assert!(seen.iter().all(|seen| !format!("{:?}", seen.headers).contains(&theirs)), "{seen:?}");

    // Its logout is passed on, and ends its own login alone.
    let logout = behind.codex(&["logout"], &[]).await;
    assert!(logout.status == 0, "{logout:?}");
    assert_eq!(issuer.revokes(), 1);
    assert_eq!(fs::read(behind.scene.path(".codex/auth.json")).unwrap(), ours);
    let status = done(behind.scene.valetkey(&["login", "status"]).spawn().unwrap()).await;
    assert_eq!(status.status, 0, "{status:?}");
}
