//! A real gnome-keyring on a session bus of its own: found, locked, and not there.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use valetkey::secret::Fingerprint;

use super::support::{Done, Scene, done, fed, program};

const API_KEY: &str = "sk-proj-vk-canary-in-the-keyring";

/// Longest time for a command when the keyring does not answer: less than what a person waits.
const PATIENCE: Duration = Duration::from_secs(5);

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
        let daemon = program("dbus-daemon")?;
        program("gnome-keyring-daemon")?;
        program("secret-tool")?;
        let scene = Scene::new(time::Duration::minutes(-1)).await;
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

    async fn stop_keyring(&mut self) {
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

    /// The same, which must not take long however the keyring behaves.
    async fn valetkey_in_time(&self, arguments: &[&str]) -> Done {
        let begun = Instant::now();
        let done = self.valetkey(arguments).await;
        assert!(begun.elapsed() < PATIENCE, "{:?} {done:?}", begun.elapsed());
        done
    }

    pub(crate) async fn save_api_key(&self) -> Done {
        fed(self.scene.valetkey(&["login", "--with-api-key"]), API_KEY).await
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
    async fn move_login_into_keyring(&self) {
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

#[tokio::test(flavor = "multi_thread")]
async fn a_login_in_the_keyring_is_as_codex_writes_it() {
    let Some(mut desktop) = Desktop::new("keyring").await else { return };
    desktop.start_keyring(Some("pass")).await;
    let none = desktop.valetkey(&["status"]).await;
    assert_eq!(none.status, 1, "the file does not count: {none:?}");
    assert!(none.out.contains("Not logged in"), "{none:?}");
    let said = desktop.save_api_key().await;
    assert_eq!(said.status, 0, "{said:?}");
    let entry = format!("keyring: Codex Auth, {}", desktop.account());
    assert!(said.err.contains(&entry), "{said:?}");
    assert!(!desktop.auth_json().exists(), "as Codex does, the file is removed");
    let status = desktop.valetkey(&["status"]).await;
    assert_eq!(status.status, 0, "{status:?}");
    assert!(status.out.contains("API key") && status.out.contains(&entry), "{status:?}");
    let found = desktop.found().await;
    let attributes: Vec<&str> =
        found.lines().filter(|line| line.starts_with("attribute.")).collect();
    for expected in [
        "attribute.service = Codex Auth".to_owned(),
        format!("attribute.username = {}", desktop.account()),
        "attribute.target = default".to_owned(),
        "attribute.application = rust-keyring".to_owned(),
    ] {
        assert!(attributes.contains(&&*expected), "{expected}: {found}");
    }
    let value = format!(r#"secret = {{"auth_mode":"apikey","OPENAI_API_KEY":"{API_KEY}"}}"#);
    assert!(found.contains(&value), "{found}");
    // A second login changes the entry, and makes no other one.
    assert_eq!(desktop.save_api_key().await.status, 0);
    assert_eq!(desktop.found().await.matches("secret = ").count(), 1);
    for left in walk(desktop.scene.path(".codex")) {
        assert!(!fs::read_to_string(&left).unwrap().contains(API_KEY), "{}", left.display());
    }

    // The same keyring, not unlocked.
    desktop.stop_keyring().await;
    desktop.start_keyring(None).await;
    let locked = desktop.valetkey_in_time(&["status"]).await;
    assert_eq!(locked.status, 1, "{locked:?}");
    assert!(locked.out.contains("is locked"), "{locked:?}");
    assert!(!locked.out.contains("Not logged in"), "{locked:?}");
    let refused = desktop.save_api_key().await;
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(
        refused.err.contains("is locked") && refused.err.contains("hint: unlock"),
        "{refused:?}"
    );
    assert!(!desktop.auth_json().exists());

    // No keyring on the bus.
    desktop.stop_keyring().await;
    let absent = desktop.valetkey_in_time(&["status"]).await;
    assert_eq!(absent.status, 1, "{absent:?}");
    assert!(absent.out.contains("no secret service provider"), "{absent:?}");
    assert!(!absent.out.contains("Not logged in"), "{absent:?}");
}

fn walk(folder: PathBuf) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bus_there_is_no_keyring_and_no_waiting() {
    for (keep, words) in [("keyring", "no secret service provider"), ("auto", "Not logged in")] {
        let Some(mut desktop) = Desktop::new(keep).await else { return };
        fs::remove_file(desktop.auth_json()).unwrap();
        let gone = format!("unix:path={}", desktop.scene.path("no-such-bus").display());
        for address in [None, Some(gone)] {
            match address {
                None => drop(desktop.scene.env.remove("DBUS_SESSION_BUS_ADDRESS")),
                Some(address) => {
                    desktop.scene.env.insert("DBUS_SESSION_BUS_ADDRESS".to_owned(), address);
                }
            }
            let status = desktop.valetkey_in_time(&["status"]).await;
            assert_eq!(status.status, 1, "{keep} {status:?}");
            assert!(status.out.contains(words), "{keep} {status:?}");
        }
        let said = desktop.save_api_key().await;
        assert_eq!(said.status == 0, keep == "auto", "{said:?}");
        assert_eq!(desktop.auth_json().exists(), keep == "auto");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_never_answers_holds_nobody_up() {
    let Some(mut desktop) = Desktop::new("keyring").await else { return };
    let socket = desktop.scene.path("deaf");
    let _deaf = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let address = format!("unix:path={}", socket.display());
    desktop.scene.env.insert("DBUS_SESSION_BUS_ADDRESS".to_owned(), address);
    let status = desktop.valetkey_in_time(&["status"]).await;
    assert_eq!(status.status, 1, "{status:?}");
    assert!(status.out.contains("does not answer"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_uses_the_keyring_where_there_is_one() {
    let Some(mut desktop) = Desktop::new("auto").await else { return };
    fs::remove_file(desktop.auth_json()).unwrap();
    desktop.start_keyring(Some("pass")).await;
    let said = desktop.save_api_key().await;
    assert!(said.err.contains("kept in keyring: Codex Auth"), "{said:?}");
    assert!(!desktop.auth_json().exists());
    desktop.stop_keyring().await;
    desktop.start_keyring(None).await;
    let locked = desktop.valetkey_in_time(&["status"]).await;
    assert!(locked.out.contains("is locked"), "{locked:?}");
    let said = desktop.save_api_key().await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(said.err.contains("auth.json"), "{said:?}");
    assert!(desktop.auth_json().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn four_runs_on_one_expired_login_in_the_keyring_cause_one_refresh() {
    let Some(curl) = program("curl") else { return };
    let Some(mut desktop) = Desktop::new("keyring").await else { return };
    desktop.start_keyring(Some("pass")).await;
    desktop.move_login_into_keyring().await;
    let url = "https://chatgpt.com/backend-api/codex/models?n=[1-100]";
    let many = ["-sS", "--parallel", "--parallel-max", "100", "-o", "/dev/null"];
    let arguments = [&["run", "--", &curl][..], &many, &["-w", "%{http_code}\n", url]].concat();
    let children: Vec<_> =
        (0..4).map(|_| desktop.scene.valetkey(&arguments).spawn().unwrap()).collect();
    for child in children {
        let done = done(child).await;
        assert_eq!(done.status, 0, "{done:?}");
        assert_eq!(done.out.lines().filter(|line| *line == "200").count(), 100, "{done:?}");
    }
    let issuer = desktop.scene.world.issuer();
    assert_eq!((issuer.posts(), issuer.refreshes(), issuer.reuses()), (1, 1, 0));
    assert!(!desktop.auth_json().exists());
    for path in walk(desktop.scene.path(".codex")) {
        let text = fs::read_to_string(&path).unwrap();
        desktop.scene.assert_no_secret(&path.display().to_string(), &text);
    }
}
