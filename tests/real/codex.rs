//! The real Codex CLI, which shares its login with us: what one of the two stores, the other one uses and forgets.

use std::fs;
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio::process::Command;

use super::support::{Done, Scene, codex, done, program};

impl Scene {
    /// Codex itself with these arguments, in this home, where neither its issuer nor anything else can be reached.
    async fn codex(&self, program: &str, arguments: &[&str]) -> Done {
        let mut command = self.codex_command(program, arguments);
        // A proxy on the discard port refuses at once; without it Codex looks up names for five seconds.
        command.env("HTTPS_PROXY", "http://127.0.0.1:9");
        done(command.spawn().unwrap()).await
    }

    /// Codex behind the company's proxy, where it reaches the pretend issuer.
    pub(crate) fn codex_inside(&self, program: &str, arguments: &[&str]) -> Command {
        let company = self.world.company();
        let mut command = self.codex_command(program, arguments);
        command.env("HTTPS_PROXY", format!("http://{}", company.address()));
        command.env("CODEX_CA_CERTIFICATE", company.ca_file());
        command
    }

    fn codex_command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(&self.env).env("PATH", std::env!("PATH"));
        command.current_dir(self.home.path()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_names_what_is_stored_and_forgets_it_without_its_issuer() {
    let Some(program) = codex() else { return };
    let scene = Scene::usual().await;
    let cache = scene.path(".codex/auth.json");
    for (stored, status, said) in [
        (None, 0, "Logged in using ChatGPT\n"),
        (
            Some(r#"{"auth_mode":"apikey","OPENAI_API_KEY":"sk-test-1234567890abcdefghij"}"#),
            0,
            "API key configured - sk-test-***fghij\nAuthentication is checked when you send a request.\n",
        ),
        (Some("{"), 1, "Error checking login status: failed to deserialize CLI auth from file: "),
    ] {
        stored.inspect(|text| fs::write(&cache, text).unwrap());
        let before = fs::read(&cache).unwrap();
        let done = scene.codex(&program, &["login", "status"]).await;
        assert_eq!(done.status, status, "{done:?}");
        assert!(done.err.contains(said) && done.out.is_empty(), "{done:?}");
        assert_eq!(fs::read(&cache).unwrap(), before, "looking changes nothing");
    }
    scene.world.issuer().write_auth_json(&scene.path(".codex"), time::Duration::hours(1)).unwrap();
    for said in ["Successfully logged out\n", "Not logged in\n"] {
        let done = scene.codex(&program, &["logout"]).await;
        assert_eq!(done.status, 0, "{done:?}");
        assert!(done.err.ends_with(said) && !cache.exists(), "{done:?}");
    }
    let done = scene.codex(&program, &["login", "status"]).await;
    assert!(done.status == 1 && done.err.ends_with("Not logged in\n"), "{done:?}");
}

#[cfg(target_os = "linux")]
mod shared {
    use super::super::desktop::Desktop;
    use super::super::support::fed;
    use super::*;

    const API_KEY: &str = "sk-proj-vk-canary-typed-into-codex";

    /// One home, one login, two programs.
    struct Pair {
        desktop: Desktop,
        codex: String,
        /// Whether the login is in the keyring.
        in_keyring: bool,
    }

    impl Pair {
        /// Nobody is signed in. `None` where a program is missing.
        async fn new(keep: &str) -> Option<Self> {
            let codex = codex()?;
            let mut desktop = Desktop::new(keep).await?;
            fs::remove_file(desktop.auth_json()).unwrap();
            let in_keyring = keep != "file";
            desktop.start_keyring(Some("pass")).await;
            Some(Self { desktop, codex, in_keyring })
        }

        async fn codex(&self, arguments: &[&str]) -> Done {
            let command = &mut self.desktop.scene.codex_inside(&self.codex, arguments);
            done(command.spawn().unwrap()).await
        }

        async fn codex_fed(&self, arguments: &[&str], input: &str) {
            let command = self.desktop.scene.codex_inside(&self.codex, arguments);
            let done = fed(command, input).await;
            assert_eq!(done.status, 0, "{arguments:?}: {done:?}");
        }

        async fn valetkey(&self, arguments: &[&str]) -> Done {
            self.desktop.valetkey(arguments).await
        }

        async fn valetkey_ok(&self, arguments: &[&str]) {
            let done = self.valetkey(arguments).await;
            assert_eq!(done.status, 0, "{arguments:?}: {done:?}");
        }

        /// Both say the same of the login; what they say first is the answer of each.
        async fn status(&self) -> (String, String) {
            let (codex, ours) =
                (self.codex(&["login", "status"]).await, self.valetkey(&["login", "status"]).await);
            assert_eq!(codex.status, ours.status, "{codex:?} {ours:?}");
            let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
            // Codex warns before it answers where a home is below the folder for temporary files.
            let said =
                codex.err.lines().filter(|line| !line.starts_with("WARNING")).collect::<Vec<_>>();
            (first(&said.join("\n")), first(&ours.out))
        }

        /// Both say this, and there is a login in one place or none.
        async fn assert_status(&self, said: &str) {
            let (codex, ours) = self.status().await;
            assert_eq!((codex.as_str(), ours.split(" - ").next().unwrap()), (said, said));
            self.assert_places(usize::from(said != "Not logged in")).await;
        }

        /// Codex fails where two entries of the keyring match, so there must not be a second.
        async fn assert_places(&self, count: usize) {
            let found = self.desktop.found().await;
            let (entries, files) = if self.in_keyring { (count, 0) } else { (0, count) };
            assert_eq!(found.matches("secret = ").count(), entries, "{found}");
            assert_eq!(usize::from(self.desktop.auth_json().exists()), files);
        }

        async fn stored(&self) -> Value {
            if !self.in_keyring {
                return serde_json::from_slice(&fs::read(self.desktop.auth_json()).unwrap())
                    .unwrap();
            }
            let found = self.desktop.found().await;
            let secret = found.lines().find_map(|line| line.strip_prefix("secret = ")).unwrap();
            serde_json::from_str(secret).unwrap()
        }

        async fn store(&self, value: &Value) {
            if self.in_keyring {
                return self.desktop.put_into_keyring(value).await;
            }
            fs::write(self.desktop.auth_json(), value.to_string()).unwrap();
        }
    }

    async fn what_one_stores_the_other_uses_and_forgets(keep: &str) {
        let Some(pair) = Pair::new(keep).await else { return };
        pair.assert_status("Not logged in").await;
        pair.assert_our_login_is_theirs().await;
        pair.assert_their_key_is_ours().await;
        pair.assert_our_access_token_is_theirs().await;
    }

    impl Pair {
        async fn assert_our_login_is_theirs(&self) {
            self.desktop.scene.world.issuer().approve_device();
            self.valetkey_ok(&["login", "--device-auth"]).await;
            self.assert_status("Logged in using ChatGPT").await;
            self.valetkey_ok(&["logout"]).await;
            self.assert_status("Not logged in").await;
        }

        async fn assert_their_key_is_ours(&self) {
            self.codex_fed(&["login", "--with-api-key"], API_KEY).await;
            let (codex, ours) = self.status().await;
            assert!(codex.starts_with("API key configured - sk-proj-"), "{codex}");
            assert_eq!(codex, ours, "the mask is Codex's");
            self.assert_places(1).await;
            assert_eq!(self.codex(&["logout"]).await.status, 0);
            self.assert_status("Not logged in").await;
        }

        async fn assert_our_access_token_is_theirs(&self) {
            let scene = &self.desktop.scene;
            let login = scene.valetkey(&["login", "--with-access-token"]);
            let done = fed(login, &scene.personal_token()).await;
            assert_eq!(done.status, 0, "{done:?}");
            let asked = scene.world.issuer().whoamis();
            self.assert_status("Logged in using personal access token").await;
            assert!(scene.world.issuer().whoamis() > asked, "Codex asks whose it is");
            self.valetkey_ok(&["logout"]).await;
            self.assert_status("Not logged in").await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_login_in_a_file() {
        what_one_stores_the_other_uses_and_forgets("file").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_login_in_the_keyring() {
        what_one_stores_the_other_uses_and_forgets("keyring").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_login_wherever_there_is_room() {
        what_one_stores_the_other_uses_and_forgets("auto").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_codex_alone_knows_survives_our_refresh() {
        let Some(curl) = program("curl") else { return };
        for keep in ["file", "keyring", "auto"] {
            let Some(pair) = Pair::new(keep).await else { return };
            let issuer = pair.desktop.scene.world.issuer();
            issuer.approve_device();
            let login = pair.codex(&["login", "--device-auth"]).await;
            assert_eq!(login.status, 0, "{login:?}");
            let mut before = pair.stored().await;
            before["made_up"] = json!({ "kept": [1, 2.5, "\u{e9}"] });
            before["tokens"]["made_up"] = json!("kept too");
            let expired = URL_SAFE_NO_PAD.encode(json!({ "exp": 1_700_000_000 }).to_string());
            before["tokens"]["access_token"] = json!(format!("e30.{expired}.c2ln"));
            pair.store(&before).await;

            let url = "https://chatgpt.com/backend-api/codex/models";
            pair.valetkey_ok(&["run", "--", &curl, "-sS", "--fail", url]).await;
            assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
            let mut after = pair.stored().await;
            for renewed in ["access_token", "refresh_token", "id_token"] {
                let (before, after) = (&mut before["tokens"], &mut after["tokens"]);
                assert_ne!(before[renewed].take(), after[renewed].take(), "{keep}: {renewed}");
            }
            assert_ne!(before["last_refresh"].take(), after["last_refresh"].take());
            assert!(
                before["tokens"]["login_owner_id"].is_string(),
                "Codex has changed: {before:#}"
            );
            assert_eq!(before, after, "{keep}");
            pair.assert_status("Logged in using ChatGPT").await;
        }
    }
}
