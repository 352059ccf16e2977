//! A log that nobody reads or that cannot be written, and a closed standard output: serving goes on.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read as _, Write as _, pipe};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bytes::Bytes;
use http::Response;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use tokio::process::{Child, Command};
use valetkey::sandbox::client::{Client, HTTP1, HTTP2, Visit, gather, post};

use super::rounds;
use super::support::{Done, LIMIT, Scene, done};

/// A `valetkey serve` that runs, and a client of it.
pub(crate) struct Loud {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
}

impl Loud {
    /// One at the log's most talkative, whose standard error is this.
    async fn start(scene: &Scene, stderr: impl Into<Stdio>) -> Self {
        let mut command = scene.valetkey(&["--log", "trace", "serve", "--listen", "127.0.0.1:0"]);
        command.stderr(stderr.into());
        Self::of(scene, command).await
    }

    /// One that is started so.
    pub(crate) async fn of(scene: &Scene, mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        // It waits for one that has just been started.
        let well = scene.typed(&["health"]).await;
        assert_eq!(well.status, 0, "{well:#?}");
        let info = fs::read_to_string(scene.path("run/valetkey/serve.json")).unwrap();
        let info: Value = serde_json::from_str(&info).unwrap();
        let (_, address) = info["proxy"].as_str().unwrap().split_once("://").unwrap();
        let address = address.parse().unwrap();
        let ca = PathBuf::from(info["ca"].as_str().unwrap());
        Self { child, address, client: Client::through(address, &ca).unwrap() }
    }

    /// So many requests of several kinds, each of which must be answered.
    async fn ask(&self, count: usize) {
        for alpn in [HTTP1, HTTP2] {
            let visit = Visit::to("api.example.com:443", alpn);
            let mut connection = self.client.open(visit).await.unwrap();
            for number in 0..count / 2 {
                let answer: Response<Bytes> = match number % 3 {
                    0 => connection.get("/v1/bytes/100").await.unwrap(),
                    1 => gather(connection.send(post("/v1/echo", "body")).await.unwrap())
                        .await
                        .unwrap(),
                    _ => connection.get("/v1/status/503").await.unwrap(),
                };
                let expected = if number % 3 == 2 { 503 } else { 200 };
                assert_eq!(answer.status(), expected, "request {number}");
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end, which is the usual one.
    pub(crate) async fn ends(&mut self) {
        self.signal(Signal::TERM);
        let ended = tokio::time::timeout(LIMIT, self.child.wait()).await;
        assert_eq!(ended.expect("it does not end").unwrap().code(), Some(0));
    }

    /// It still reads its configuration again, and still ends by itself.
    async fn still_listens_to_its_owner(mut self, scene: &Scene) {
        scene.configure(&format!(
            "[[rules]]\nname = \"closed\"\nhost = \"api.example.com\"\npaths = [\"/v1/bytes/\"]\naction = \"refuse\"\n{}",
            scene.world.upstream_toml()
        ));
        self.signal(Signal::HUP);
        let refused = async {
            let visit = || Visit::to("api.example.com:443", HTTP1);
            while self.client.get(visit(), "/v1/bytes/1").await.unwrap().status() != 403 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, refused).await.expect("it has not read its configuration");
        self.ends().await;
    }
}

/// A pipe with no room left, whose writers wait.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'.'; 4096]).is_ok() {}
    while writer.write(b".").is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (reader, writer)
}

/// More requests than the log may keep waiting, at some 350 bytes for each.
fn requests() -> usize {
    rounds(10_000, 200_000)
}

/// Requests behind a log that fails at once.
fn some_requests() -> usize {
    rounds(2_000, 200_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_the_log_costs_no_request() {
    let scene = Scene::usual().await;
    let full = File::options().write(true).open("/dev/full").unwrap();
    let loud = Loud::start(&scene, full).await;
    loud.ask(some_requests()).await;
    loud.still_listens_to_its_owner(&scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_reader_has_gone_costs_no_request() {
    let scene = Scene::usual().await;
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let loud = Loud::start(&scene, writer).await;
    loud.ask(some_requests()).await;
    loud.still_listens_to_its_owner(&scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_costs_no_request() {
    let scene = Scene::usual().await;
    // The audit shares its lot.
    scene.configure(&["[audit]\nto = \"stderr\"\n", &scene.world.upstream_toml()].concat());
    let (reader, writer) = full_pipe();
    let loud = Loud::start(&scene, writer).await;
    loud.ask(requests()).await;
    loud.still_listens_to_its_owner(&scene).await;
    drop(reader);
}

/// Has every process write its audit into a file.
fn audited(scene: &Scene) -> PathBuf {
    scene.configure(&["[audit]\nto = \"file\"\n", &scene.world.upstream_toml()].concat());
    scene.path(".local/state/valetkey/audit.jsonl")
}

fn count_of(audit: &Path, event: &str) -> usize {
    fs::read_to_string(audit).unwrap_or_default().matches(&format!("\"event\":\"{event}\"")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_that_cannot_grow_costs_no_request_and_says_what_it_lacks() {
    let scene = Scene::usual().await;
    let audit = audited(&scene);
    // 32 KiB are room for some hundred lines.
    let script = "ulimit -S -f 64; exec \"$0\" serve --listen 127.0.0.1:0";
    let mut command = scene.valetkey(&[]);
    let valetkey = command.as_std().get_program().to_owned();
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(valetkey).env_clear().kill_on_drop(true);
    shell.envs(command.as_std_mut().get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut loud = Loud::of(&scene, {
        shell.current_dir(scene.home.path()).stdin(Stdio::null()).stderr(Stdio::null());
        shell
    })
    .await;
    let count = rounds(1_000, 50_000);
    loud.ask(count).await;
    assert!(fs::metadata(&audit).unwrap().len() <= 32 * 1024);
    let unlimited = Rlimit { current: None, maximum: None };
    prlimit(Some(loud.pid()), Resource::Fsize, unlimited).unwrap();
    let (before, mut more) = (count_of(&audit, "exchange"), 0);
    let written_again = async {
        while count_of(&audit, "exchange") == before {
            loud.ask(2).await;
            more += 2;
        }
    };
    tokio::time::timeout(LIMIT, written_again).await.expect("it is not written again");
    loud.ends().await;
    let verified = scene.typed(&["audit", "verify"]).await;
    assert_eq!(verified.status, 0, "{verified:#?}");
    let said = verified
        .err
        .lines()
        .find_map(|line| line.strip_suffix(" could not be written then, as the audit itself says"));
    let lost: usize = said.unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(lost > 0);
    // One is the question whether it is well.
    assert_eq!(count_of(&audit, "exchange") + lost, 1 + count + more);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_of_many_that_are_killed_is_one_chain() {
    let scene = Scene::usual().await;
    let audit = audited(&scene);
    let mut killed = 0;
    for _ in 0..rounds(4, 200) {
        let quiet = || {
            let mut command = scene.valetkey(&["serve", "--listen", "127.0.0.1:0"]);
            command.stderr(Stdio::null());
            command
        };
        let [mut one, mut other] =
            [Loud::of(&scene, quiet()).await, Loud::of(&scene, quiet()).await];
        let before = count_of(&audit, "exchange");
        let asking = async { tokio::join!(one.ask(100), other.ask(100)) };
        asking.await;
        let begun = async {
            while count_of(&audit, "exchange") == before {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, begun).await.expect("nothing is written");
        one.signal(Signal::KILL);
        one.child.wait().await.unwrap();
        killed += 1;
        other.ends().await;
        let verified = scene.typed(&["audit", "verify"]).await;
        assert_eq!(verified.status, 0, "{verified:#?}");
        // Of the one that ended by itself nothing is missing.
        assert!(count_of(&audit, "exchange") >= before + 100);
    }
    println!("killed {killed} times");
}

#[expect(clippy::disallowed_methods, reason = "the test plays a reader that blocks")]
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_read_again_says_what_it_has_lost() {
    let scene = Scene::usual().await;
    let (mut reader, writer) = full_pipe();
    let loud = Loud::start(&scene, writer).await;
    loud.ask(requests()).await;
    let reading = std::thread::spawn(move || {
        let mut said = Vec::new();
        reader.read_to_end(&mut said).unwrap();
        String::from_utf8(said).unwrap()
    });
    loud.ask(200).await;
    loud.still_listens_to_its_owner(&scene).await;
    let said = reading.join().unwrap();
    assert!(said.contains(" lines of the log were lost here)"), "{} bytes", said.len());
    assert!(said.contains("shutting down"), "its last words are there");
    scene.assert_no_secret("the log", &said);
}

/// What writes to standard output, each in its own way.
const COMMANDS: &[&[&str]] = &[
    &["--help"],
    &["--version"],
    &["serve", "--help"],
    &["status"],
    &["status", "--json"],
    &["login", "status"],
    &["check"],
    &["check", "--managed"],
    &["explain", "https://api.example.com/v1/models"],
    &["env"],
    &["env", "--shell", "json"],
    &["pass", "list", "--json"],
    &["ca", "print"],
    &["ca", "path"],
    &["token", "example"],
    &["completions", "bash"],
    &["init", "decoy", "github", "--shape", "github"],
    &["run", "--", "true"],
    // And what writes to standard error.
    &["status", "--strange"],
    &["explain", "nonsense"],
    &["pass", "revoke", "nobody"],
];

#[tokio::test(flavor = "multi_thread")]
async fn no_command_breaks_on_a_closed_output() {
    let scene = Scene::usual().await;
    assert_eq!(scene.typed(&["check"]).await.status, 0);
    for command in COMMANDS {
        let expected = scene.typed(command).await;
        let closed = || {
            let (reader, writer) = pipe().unwrap();
            drop(reader);
            Stdio::from(writer)
        };
        let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
        let quiet = |done: &Done| {
            assert!(!done.err.contains("panicked"), "{command:?}: {done:#?}");
            assert!((0..=4).contains(&done.status), "{command:?}: {done:#?}");
        };
        let ends = |stdout: Stdio, stderr: Stdio| {
            let child = scene.valetkey(command).stdout(stdout).stderr(stderr).spawn().unwrap();
            done(child)
        };
        for (stdout, stderr) in [(closed(), Stdio::piped()), (closed(), closed())] {
            let done = ends(stdout, stderr).await;
            quiet(&done);
            assert_eq!(done.status, expected.status, "{command:?}: {done:#?}");
        }
        for stderr in [closed(), full()] {
            let done = ends(Stdio::piped(), stderr).await;
            quiet(&done);
            assert_eq!(done.status, expected.status, "{command:?}: {done:#?}");
            assert_eq!(done.out.is_empty(), expected.out.is_empty(), "{command:?}: {done:#?}");
        }
        // Data that is lost is no success; that of `run` is its program's.
        let lost = ends(full(), Stdio::piped()).await;
        quiet(&lost);
        if !expected.out.is_empty()
            && !command
                .iter()
                .any(|word| word.starts_with("--help") || word.starts_with("--version"))
        {
            assert_eq!(lost.status, 1, "{command:?}: {lost:#?}");
            assert!(lost.err.contains("error: standard output: "), "{command:?}: {lost:#?}");
        }
        quiet(&ends(full(), full()).await);
    }
}
