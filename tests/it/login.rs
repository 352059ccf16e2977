//! Signing in and out with the built binary, against the pretend issuer, behind a company's proxy.

mod browser;
mod device;
mod oauth;
mod out;
mod piped;
mod policy;
mod trouble;
mod web;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Mutex;

use bytes::Bytes;
use http::Response;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use valetkey::sandbox::client::{Client, HTTP1, Visit};
use valetkey::sandbox::{Issuer, PretendLogin, Settings, World};
use valetkey::tasks::Tasks;

use super::leak::leak;
use super::support::within;

/// A home in which the company's proxy is the only way out, and its CA is named by a variable. Everything that any
/// command of it says is looked through for secrets when it goes.
struct Home {
    world: World,
    folder: TempDir,
    env: BTreeMap<String, String>,
    said: Mutex<String>,
    /// Secrets that the test made up, beside those of the world.
    secrets: Vec<String>,
}

/// What a command did.
#[derive(Debug)]
struct Done {
    status: i32,
    out: String,
    err: String,
}

impl Home {
    async fn new() -> Self {
        Self::with(Settings::default()).await
    }

    async fn with(settings: Settings) -> Self {
        let world = World::start(settings).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(".codex")).unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let env = [
            ("HOME", path("")),
            ("XDG_RUNTIME_DIR", path("run")),
            ("HTTPS_PROXY", format!("http://{}", world.company().address())),
            ("CODEX_CA_CERTIFICATE", world.company().ca_file().to_str().unwrap().to_owned()),
            ("VALETKEY_LOG", "trace".to_owned()),
        ];
        let env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { world, folder, env, said: Mutex::default(), secrets: Vec::new() }
    }

    /// The same home, which trusts a CA that is not the company's.
    fn distrusting(mut self) -> Self {
        let other = self.world.ca_file().to_str().unwrap().to_owned();
        self.env.insert("CODEX_CA_CERTIFICATE".to_owned(), other);
        self
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.insert(name.to_owned(), value.into());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file below the home folder.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Writes our own configuration.
    fn configure(&self, text: &str) {
        self.write(".config/valetkey/config.toml", text);
    }

    fn issuer(&self) -> &Issuer {
        self.world.issuer()
    }

    /// Puts a login into the cache that lives for an hour.
    fn signed_in(&self) -> PretendLogin {
        self.signed_in_for(time::Duration::hours(1))
    }

    fn signed_in_for(&self, lifetime: time::Duration) -> PretendLogin {
        self.issuer().write_auth_json(&self.path(".codex"), lifetime).unwrap()
    }

    /// What Codex's cache holds, byte for byte.
    fn cache(&self) -> Option<String> {
        fs::read_to_string(self.path(".codex/auth.json")).ok()
    }

    fn cached(&self) -> Option<Value> {
        Some(serde_json::from_str(&self.cache()?).unwrap())
    }

    fn valetkey(&self, arguments: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_valetkey"), arguments)
    }

    /// A program in this home, with nothing of the real environment.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(&self.env).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, arguments: &[&str]) -> Running<'_> {
        Running::new(self, self.valetkey(arguments))
    }

    async fn run(&self, arguments: &[&str]) -> Done {
        self.start(arguments).end().await
    }

    /// As [`Home::run`], with this on standard input.
    async fn piped(&self, arguments: &[&str], input: &[u8]) -> Done {
        let mut running = self.start(arguments);
        // A command that has read enough reads no more.
        running.stdin.as_mut().unwrap().write_all(input).await.ok();
        running.end().await
    }

    async fn serve(&self) -> Server<'_> {
        let mut running = self.start(&["serve", "--listen", "127.0.0.1:0"]);
        let line = running.line(|line| line.starts_with("listening on ")).await;
        let address = line.strip_prefix("listening on http://").unwrap().parse().unwrap();
        let client = Client::through(address, &self.path("run/valetkey/ca.pem")).unwrap();
        Server { running, client }
    }

    fn secrets(&self) -> Vec<String> {
        [self.world.secrets(), self.secrets.clone()].concat()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let said = std::mem::take(self.said.get_mut().unwrap());
        let found = leak(&self.secrets(), &said).is_some();
        assert!(!found, "a command said a secret:\n{said}");
    }
}

/// A command that runs.
struct Running<'a> {
    home: &'a Home,
    child: Child,
    stdin: Option<ChildStdin>,
    out: Heard,
    err: Heard,
}

/// What has been heard of a stream, by whole lines.
struct Heard {
    text: watch::Receiver<String>,
    reading: JoinHandle<()>,
}

impl<'a> Running<'a> {
    fn new(home: &'a Home, mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let out = Heard::of(child.stdout.take().unwrap());
        let err = Heard::of(child.stderr.take().unwrap());
        Self { home, stdin: child.stdin.take(), child, out, err }
    }

    /// The first line on standard error that fits, as soon as there is one.
    async fn line(&mut self, fits: impl Fn(&str) -> bool) -> String {
        let find = |said: &str| said.lines().find(|line| fits(line)).map(str::to_owned);
        let heard = within(self.err.text.wait_for(|said| find(said).is_some())).await;
        let line = heard.ok().and_then(|said| find(&said));
        line.unwrap_or_else(|| panic!("it ended without it: {}", *self.err.text.borrow()))
    }

    /// Where the browser shall go.
    async fn url(&mut self) -> String {
        self.line(|line| line.starts_with("https://")).await
    }

    async fn paste(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
        rustix::process::kill_process(pid.unwrap(), signal).unwrap();
    }

    /// Ends standard input, and waits for the end of all.
    async fn end(mut self) -> Done {
        drop(self.stdin.take());
        let status = within(self.child.wait()).await.unwrap().code().unwrap();
        let (out, err) = (self.out.all().await, self.err.all().await);
        let mut said = self.home.said.lock().unwrap();
        said.push_str(&out);
        said.push_str(&err);
        Done { status, out, err }
    }
}

impl Heard {
    fn of(stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let (sender, text) = watch::channel(String::new());
        let reading = Tasks::new().spawn(async move {
            let (mut stream, mut line) = (BufReader::new(stream), Vec::new());
            while stream.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
                sender.send_modify(|text| text.push_str(&String::from_utf8_lossy(&line)));
                line.clear();
            }
        });
        Self { text, reading }
    }

    async fn all(self) -> String {
        within(self.reading).await.unwrap();
        self.text.borrow().clone()
    }
}

impl Done {
    /// The lines that were meant for people, without the log's.
    fn words(&self) -> String {
        let is_logged = |line: &str| {
            let mut parts = line.split_whitespace().skip(1);
            parts.next().is_some_and(|it| ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"].contains(&it))
        };
        self.err.lines().filter(|line| !is_logged(line)).map(|line| format!("{line}\n")).collect()
    }

    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.status, 0, "{}{}", self.words(), self.out);
        self
    }

    /// It said why not in one sentence, and what to type.
    #[track_caller]
    fn failed(self, status: i32, sentence: &str, hint: &str) -> Self {
        let words = self.words();
        assert_eq!(self.status, status, "{words}");
        let errors: Vec<_> = words.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(matches!(errors[..], [error] if error.contains(sentence)), "{sentence}: {words}");
        let has_hint = words.lines().any(|line| line.starts_with("hint: ") && line.contains(hint));
        assert!(has_hint, "{hint}: {words}");
        self
    }
}

/// A proxy that runs.
struct Server<'a> {
    running: Running<'a>,
    client: Client,
}

impl Server<'_> {
    /// Asks for something that a ChatGPT login is attached to.
    async fn ask(&self) -> Response<Bytes> {
        self.ask_at("chatgpt.com", "/backend-api/codex/models").await
    }

    async fn ask_at(&self, host: &str, path: &str) -> Response<Bytes> {
        let target = format!("{host}:443");
        within(self.client.get(Visit::to(&target, HTTP1), path)).await.unwrap()
    }

    async fn stop(self) -> Done {
        self.running.signal(rustix::process::Signal::TERM);
        self.running.end().await.succeeded()
    }
}

/// What the API says of a request: what its token was worth, and the account it named.
#[track_caller]
fn signed_in(answer: &Response<Bytes>) -> (String, Option<String>) {
    let text = String::from_utf8_lossy(answer.body());
    assert_eq!(answer.status(), 200, "{text}");
    let body: Value = serde_json::from_str(&text).unwrap();
    let member = |name: &str| body[name].as_str().map(str::to_owned);
    (member("authorization").unwrap(), member("account"))
}

/// Fails unless the token was good, and for this workspace.
#[track_caller]
fn assert_signed_in(answer: &Response<Bytes>, account_id: &str) {
    let expected = ("present and current".to_owned(), Some(account_id.to_owned()));
    assert_eq!(signed_in(answer), expected);
}
