//! A session bus of its own, with a real gnome-keyring on it.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use valetkey::sandbox::Settings;
use valetkey::secret::Fingerprint;

use super::support::{Done, Scene, done, fed, program};

/// A bus on which nothing starts by itself.
const BUS: &str = r#"<busconfig><type>session</type><listen>unix:dir=DIR</listen>
<policy context="default"><allow send_destination="*"/>
<allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"#;

/// A scene with a session bus; both end with it.
pub(crate) struct Desktop {
    pub(crate) scene: Scene,
    keyring: Option<Child>,
    _bus: Child,
}

impl Desktop {
    /// A session bus without a keyring, and a Codex that keeps its login as told. `None` where the
    /// programs are not installed.
    pub(crate) async fn new(keep: &str) -> Option<Self> {
        Self::in_world(keep, Settings::default()).await
    }

    /// As [`Desktop::new`], in such a world.
    pub(crate) async fn in_world(keep: &str, settings: Settings) -> Option<Self> {
        let daemon = program("dbus-daemon")?;
        program("gnome-keyring-daemon")?;
        program("secret-tool")?;
        let scene = Scene::in_world(settings, time::Duration::minutes(-1)).await;
        scene.configure(&scene.world.upstream_toml());
        let config = format!("cli_auth_credentials_store = \"{keep}\"\n");
        fs::write(scene.path(".codex/config.toml"), config).unwrap();
        let run = scene.path("run");
        fs::create_dir_all(&run).unwrap();
        fs::write(scene.path("bus.conf"), BUS.replace("DIR", run.to_str().unwrap())).unwrap();
        let mut bus = Command::new(daemon);
        bus.arg(format!("--config-file={}", scene.path("bus.conf").display()));
        bus.args(["--nofork", "--print-address"]).stdout(Stdio::piped()).kill_on_drop(true);
        let mut bus = bus.spawn().unwrap();
        let mut said = BufReader::new(bus.stdout.take().unwrap()).lines();
        let address = said.next_line().await.unwrap().unwrap();
        let scene = scene.with("DBUS_SESSION_BUS_ADDRESS", address);
        Some(Self { scene, keyring: None, _bus: bus })
    }

    /// Starts the keyring, with its password or without, and waits until it is on the bus.
    pub(crate) async fn start_keyring(&mut self, password: Option<&str>) {
        let how = if password.is_some() { "--unlock" } else { "--start" };
        let mut daemon = self.command("gnome-keyring-daemon");
        daemon.args([how, "--foreground", "--components=secrets"]);
        // What it says last explains why it is gone, where it is.
        daemon.stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut daemon = daemon.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = daemon.stdin.take().unwrap();
        stdin.write_all(password.unwrap_or_default().as_bytes()).await.unwrap();
        drop(stdin);
        self.keyring = Some(daemon);
        let owned = ["--session", "--print-reply", "--dest=org.freedesktop.DBus", "/"];
        let begun = Instant::now();
        loop {
            let mut ask = self.command("dbus-send");
            ask.args(owned).arg("org.freedesktop.DBus.NameHasOwner");
            ask.arg("string:org.freedesktop.secrets");
            if done(ask.spawn().unwrap()).await.out.contains("true") {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "the keyring does not start");
            // There is nothing that can be waited for before the name has an owner.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn stop_keyring(&mut self) {
        self.keyring.take().unwrap().kill().await.unwrap();
    }

    pub(crate) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program(name).unwrap());
        command.env_clear().envs(&self.scene.env).env("PATH", env!("PATH")).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) async fn valetkey(&self, arguments: &[&str]) -> Done {
        done(self.scene.valetkey(arguments).spawn().unwrap()).await
    }

    pub(crate) fn account(&self) -> String {
        let home = fs::canonicalize(self.scene.path(".codex")).unwrap();
        format!("cli|{}", &Fingerprint::of(home.to_str().unwrap().as_bytes()).to_hex()[..16])
    }

    /// What another program finds in the keyring.
    pub(crate) async fn found(&self) -> String {
        let mut search = self.command("secret-tool");
        search.args(["search", "--all", "service", "Codex Auth"]);
        let done = done(search.spawn().unwrap()).await;
        done.out + &done.err
    }

    /// Puts the ChatGPT login of the scene into the keyring, as Codex does, and removes the file.
    pub(crate) async fn move_login_into_keyring(&self) {
        let path = self.auth_json();
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        self.put_into_keyring(&value).await;
        fs::remove_file(path).unwrap();
    }

    /// Writes the entry as Codex does.
    pub(crate) async fn put_into_keyring(&self, value: &Value) {
        let mut store = self.command("secret-tool");
        store.args(["store", "--label=codex", "service", "Codex Auth", "username"]);
        store.args([&self.account(), "target", "default", "application", "rust-keyring"]);
        let done = fed(store, &value.to_string()).await;
        assert_eq!(done.status, 0, "{done:?}");
    }

    pub(crate) fn auth_json(&self) -> PathBuf {
        self.scene.path(".codex/auth.json")
    }
}
