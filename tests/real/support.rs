//! A home of its own, the sandbox world, and the built binary.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use valetkey::sandbox::{PretendLogin, Seen, Settings, World};
use valetkey::secret::{Fingerprint, Secret};

use super::forms::leak;

/// The API key of `api.example.com`, which comes from the environment.
pub(crate) const KEY: &str = "vk-canary-key-from-the-environment";

/// Longest time for one program.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) login: PretendLogin,
    pub(crate) home: TempDir,
    /// Variables of the programs besides `PATH`.
    pub(crate) env: BTreeMap<String, String>,
}

/// What a program did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Scene {
    /// A home with a ChatGPT login that lives for `lifetime`, in a world that is reached directly.
    pub(crate) async fn new(lifetime: time::Duration) -> Self {
        let scene = Self::in_world(Settings::default(), lifetime).await;
        scene.configure(&scene.world.upstream_toml());
        scene
    }

    pub(crate) async fn usual() -> Self {
        Self::new(time::Duration::hours(1)).await
    }

    /// A home without an `[upstream]`.
    pub(crate) async fn in_world(settings: Settings, lifetime: time::Duration) -> Self {
        let world = World::start(settings).await.unwrap();
        world.api().accept(Secret::new(KEY));
        world.api().require_login(true);
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join(".codex")).unwrap();
        let login = world.issuer().write_auth_json(&home.path().join(".codex"), lifetime).unwrap();
        let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
        let env = [
            ("HOME", path("")),
            ("XDG_RUNTIME_DIR", path("run")),
            ("EXAMPLE_TOKEN", KEY.to_owned()),
        ];
        let env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let scene = Self { world, login, home, env };
        scene.configure("");
        scene
    }

    /// Writes the configuration: the usual rule for `api.example.com`, and this.
    pub(crate) fn configure(&self, rest: &str) {
        let dir = self.home.path().join(".config/valetkey");
        fs::create_dir_all(&dir).unwrap();
        let text = format!(
            "[credentials.example]\nkind = \"api_key\"\nsource = \"env:EXAMPLE_TOKEN\"\n\
             [[rules]]\nhost = \"api.example.com\"\ncredential = \"example\"\n{rest}"
        );
        fs::write(dir.join("config.toml"), text).unwrap();
    }

    pub(crate) fn with(mut self, name: &str, value: impl AsRef<Path>) -> Self {
        self.env.insert(name.to_owned(), value.as_ref().to_str().unwrap().to_owned());
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The built binary with these arguments, in this home and nothing else of the real environment.
    pub(crate) fn valetkey(&self, arguments: &[&str]) -> Command {
        self.valetkey_in(&[], arguments)
    }

    /// The same, started by another program, which is given it and its arguments behind its own.
    pub(crate) fn valetkey_in(&self, around: &[&str], arguments: &[&str]) -> Command {
        let all = [around, &[env!("CARGO_BIN_EXE_valetkey")], arguments].concat();
        let mut command = Command::new(all[0]);
        command.args(&all[1..]).env_clear().envs(&self.env).kill_on_drop(true);
        command.env("PATH", std::env!("PATH")).current_dir(self.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same, to its end. Whatever it is, it says no secret; what `run` starts speaks for itself.
    pub(crate) async fn typed(&self, arguments: &[&str]) -> Done {
        let done = done(self.valetkey(arguments).spawn().unwrap()).await;
        if !arguments.contains(&"run") {
            self.assert_no_secret("what it said", &done.err);
        }
        if !arguments.iter().any(|word| ["run", "token"].contains(word)) {
            self.assert_no_secret("what it printed", &done.out);
        }
        done
    }

    /// `valetkey run -- COMMAND`, to its end.
    pub(crate) async fn run(&self, command: &[&str]) -> Done {
        self.typed(&[&["run", "--"], command].concat()).await
    }

    /// `valetkey run -- COMMAND`, which must succeed.
    pub(crate) async fn run_ok(&self, command: &[&str]) -> Done {
        let done = self.run(command).await;
        assert_eq!(done.status, 0, "{command:?}: {done:#?}");
        done
    }

    /// A program of the test's own in this home, not behind a proxy, which must succeed.
    pub(crate) async fn prepare(&self, program: &str, arguments: &[&str]) {
        let made = Command::new(program).args(arguments).current_dir(self.home.path()).output();
        let made = made.await.unwrap();
        assert!(made.status.success(), "{made:?}");
    }

    /// What the API saw, the newest last; each with the right credential for its host.
    pub(crate) fn seen_signed_in(&self) -> Vec<Seen> {
        let seen = self.world.api().seen();
        assert!(!seen.is_empty(), "the API saw nothing");
        for seen in &seen {
            let sent = seen.headers.get_all("authorization").iter().collect::<Vec<_>>();
            assert_eq!(sent.len(), 1, "{seen:?}");
            let sent = sent[0].to_str().unwrap().trim_start_matches("Bearer ");
            match seen.host.as_str() {
                "api.example.com" | "api.openai.com" => assert_eq!(sent, KEY),
                "chatgpt.com" => {
                    assert!(self.world.secrets().iter().any(|secret| secret == sent), "{seen:?}");
                    assert_eq!(seen.headers["chatgpt-account-id"], self.login.account_id.as_str());
                }
                host => panic!("{host} was signed in"),
            }
        }
        seen
    }

    /// A personal access token as a person would pipe it in.
    pub(crate) fn personal_token(&self) -> String {
        let token = self.world.issuer().personal_token(&self.login.account_id).fingerprint();
        // A secret does not show itself; the world keeps a list of all, to look for them.
        let is_it = |text: &String| Fingerprint::of(text.as_bytes()) == token;
        self.world.secrets().into_iter().find(is_it).unwrap()
    }

    /// Every secret of this scene.
    pub(crate) fn secrets(&self) -> Vec<String> {
        [self.world.secrets(), vec![KEY.to_owned()]].concat()
    }

    /// Fails where a text holds a secret, in whatever form.
    pub(crate) fn assert_no_secret(&self, what: &str, text: &str) {
        assert!(leak(&self.secrets(), text).is_none(), "{what} holds a secret");
    }
}

/// The ports that Codex's client is registered with, which there are once on a machine: whoever signs in with a
/// browser holds this meanwhile.
pub(crate) struct LoginPorts(
    #[expect(dead_code, reason = "it is locked until it is dropped")] File,
);

impl LoginPorts {
    /// Waits until no other test has them.
    pub(crate) fn hold() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("codex-ports.lock");
        let file = File::create(path).unwrap();
        file.lock().unwrap();
        Self(file)
    }
}

/// A `valetkey login` that has opened the person's browser.
pub(crate) struct SigningIn {
    child: Child,
    /// Where it sent the browser.
    pub(crate) url: String,
    _ports: LoginPorts,
}

impl SigningIn {
    /// Types `valetkey login`, behind these arguments, where `BROWSER` is a program that only says what it should
    /// open.
    pub(crate) async fn begin(scene: &Scene, arguments: &[&str]) -> Self {
        let ports = LoginPorts::hold();
        let (script, pipe) = (scene.path("browser"), scene.path("opened"));
        let made = Command::new("mkfifo").arg(&pipe).status().await.unwrap();
        assert!(made.success(), "no pipe could be made");
        let mut opened = Command::new("cat");
        opened.arg(&pipe).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let opened = opened.spawn().unwrap();
        fs::write(&script, format!("#!/bin/sh\necho \"$1\" > '{}'\n", pipe.display())).unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        let mut command = scene.valetkey(&[arguments, &["login"]].concat());
        let child = command.env("BROWSER", &script).spawn().unwrap();
        let opened = done(opened).await;
        assert_eq!(opened.status, 0, "{opened:?}");
        let url = opened.out.trim_end().to_owned();
        fs::remove_file(&pipe).unwrap();
        Self { child, url, _ports: ports }
    }

    /// The process, while somebody signs in.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    pub(crate) async fn end(self) -> Done {
        done(self.child).await
    }
}

/// Waits for a program's end.
pub(crate) async fn done(child: Child) -> Done {
    use std::os::unix::process::ExitStatusExt as _;
    let output = tokio::time::timeout(LIMIT, child.wait_with_output());
    let output = output.await.expect("the program took more than a minute").unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let status = output.status.code().or_else(|| output.status.signal().map(|signal| -signal));
    Done { status: status.unwrap(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// Starts a program with this on its standard input, and waits for its end.
pub(crate) async fn fed(mut command: Command, input: &str) -> Done {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    done(child).await
}

/// Where `tests/run` has put what it installed.
fn tools() -> Option<PathBuf> {
    option_env_now("VALETKEY_TEST_TOOLS").map(PathBuf::from)
}

#[expect(clippy::disallowed_methods, reason = "tests are told by variables")]
pub(crate) fn option_env_now(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The program, or `None` after saying what is skipped. With `tests/run` a missing one is a failure.
pub(crate) fn program(name: &str) -> Option<String> {
    // Where Debian puts servers, which is not in everybody's path.
    let dirs = std::env::split_paths(std::env!("PATH")).chain([PathBuf::from("/usr/sbin")]);
    present(name, dirs.map(|dir| dir.join(name)).find(|path| path.exists()))
}

/// The Python that has requests and websockets, or `None` after saying what is skipped.
pub(crate) fn python() -> Option<String> {
    let found = tools().map(|tools| tools.join("venv/bin/python")).filter(|path| path.exists());
    present("Python with requests and websockets", found)
}

/// The same Python where it has this module too, or `None` after saying what is skipped.
pub(crate) fn python_with(module: &str) -> Option<String> {
    let python = python()?;
    let import =
        std::process::Command::new(&python).args(["-c", &format!("import {module}")]).output();
    let has_it = import.is_ok_and(|done| done.status.success());
    present(&format!("Python's {module}"), has_it.then(|| PathBuf::from(python)))
}

/// A program that a package brings with it, or `None` after saying what is skipped.
pub(crate) fn packaged(name: &str) -> Option<String> {
    let places = ["node_modules/.bin", "venv/bin"];
    let dirs = tools().into_iter().flat_map(|tools| places.map(|place| tools.join(place)));
    present(name, dirs.map(|dir| dir.join(name)).find(|path| path.exists()))
}

/// The folder with Node's packages, or `None` after saying what is skipped.
pub(crate) fn node_modules() -> Option<String> {
    let found =
        tools().map(|tools| tools.join("node_modules")).filter(|dir| dir.join("undici").exists());
    present("undici", found)
}

/// The Codex executable itself, without the JavaScript that usually starts it; or `None` after saying what is skipped.
pub(crate) fn codex() -> Option<String> {
    // Packages named after platforms, each with one folder named after what it was compiled for.
    let packages = tools().map(|tools| tools.join("node_modules/@openai"));
    let mut compiled = packages
        .iter()
        .flat_map(|packages| entries(packages))
        .flat_map(|package| entries(&package.join("vendor")))
        .map(|compiled_for| compiled_for.join("bin/codex"));
    present("Codex", compiled.find(|path| path.exists()))
}

/// Chromium, under the names that distributions give it; or `None` after saying what is skipped.
pub(crate) fn chromium() -> Option<String> {
    if !cfg!(target_os = "linux") {
        println!("skipped: only on Linux does tests/run install Chromium");
        return None;
    }
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let mut in_path =
        std::env::split_paths(std::env!("PATH")).flat_map(|dir| names.map(|name| dir.join(name)));
    present("Chromium", in_path.find(|path| path.exists()))
}

/// A loopback address that no other test process has, or another one for another attempt.
#[cfg(target_os = "linux")]
pub(crate) fn own_loopback(attempt: u32) -> std::net::Ipv4Addr {
    // 127.64.0.0/10 has room for every process id (2^22, proc(5)), with steps between the attempts.
    let number = std::process::id().wrapping_add(attempt * 4_099) & 0x003f_ffff;
    std::net::Ipv4Addr::from(0x7f40_0000 | number)
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn present(name: &str, found: Option<PathBuf>) -> Option<String> {
    if found.is_none() {
        assert!(tools().is_none(), "{name} is missing, and tests/run should have installed it");
        println!("skipped: {name} is not installed (tests/run installs it)");
    }
    Some(found?.to_str().unwrap().to_owned())
}
