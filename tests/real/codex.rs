//! The real Codex CLI, which shares its login with us: how it names what is stored, and how it logs out.

use std::fs;
use std::process::Stdio;

use tokio::process::Command;

use super::support::{Done, Scene, codex, done};

impl Scene {
    /// Codex itself with these arguments, in this home, where neither its issuer nor anything else can be reached.
    async fn codex(&self, program: &str, arguments: &[&str]) -> Done {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().current_dir(self.home.path()).kill_on_drop(true);
        command.env("HOME", self.home.path()).env("PATH", std::env!("PATH"));
        // A proxy on the discard port refuses at once; without it Codex looks up names for five seconds.
        command.env("HTTPS_PROXY", "http://127.0.0.1:9");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        done(command.spawn().unwrap()).await
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
