//! A disk that is full, read-only, out of bounds or closed, and an `auth.json` that others lay hands on: before a
//! refresh, and while its answer is on the way.
//!
//! Each case is a real `valetkey serve` in a mount namespace of the test's own. Nothing is sent that could not be kept,
//! nothing that was answered is lost, whoever asks is told, and a disk that recovers has it all.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures_util::future::join_all;
use http::Response;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use valetkey::sandbox::client::{HTTP1, Visit, gather};
use valetkey::sandbox::{Fault, client};

use super::served::{Serving, told};
use super::support::{LIMIT, Scene, done, option_env_now, program};

/// What is done to the disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Harm {
    /// Room for a record, and for no journal.
    NearlyFull,
    /// Not a block is free.
    Full,
    ReadOnly,
    /// No file may grow beyond this, by the process's own limit.
    Bounded,
    /// The folders of the login let nobody write.
    Closed,
}

impl Harm {
    /// Part of the words that tell of it.
    fn words(self) -> &'static str {
        match self {
            Self::NearlyFull | Self::Full => "No space left on device",
            Self::ReadOnly => "Read-only file system",
            Self::Bounded => "File too large",
            Self::Closed => "Permission denied",
        }
    }
}

/// A home whose Codex folder is a small disk, and a proxy.
struct Place {
    scene: Scene,
    serving: Serving,
}

/// Size of the disk.
const DISK: usize = 512 * 1024;

impl Place {
    /// A login that lives for so many seconds, and is due at once.
    async fn new(seconds: i64) -> Self {
        let scene = Scene::new(time::Duration::seconds(seconds)).await;
        let codex = scene.path(".codex");
        let text = fs::read(codex.join("auth.json")).unwrap();
        let size = format!("size={DISK},mode=700");
        run("mount", &["-t", "tmpfs", "-o", &size, "small", codex.to_str().unwrap()]).await;
        write(&codex.join("auth.json"), &text);
        let serving = serve(&scene).await;
        Self { scene, serving }
    }

    fn codex(&self) -> PathBuf {
        self.scene.path(".codex")
    }

    fn auth_json(&self) -> PathBuf {
        self.codex().join("auth.json")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.auth_json()).unwrap_or_default()
    }

    async fn harm(&self, harm: Harm) {
        let codex = self.codex();
        let filler = codex.join("filler");
        match harm {
            Harm::NearlyFull => fill(&filler, 40 * 1024),
            Harm::Full => fill(&filler, 0),
            Harm::ReadOnly => {
                run("mount", &["-o", "remount,ro", codex.to_str().unwrap()]).await;
            }
            // The first page of a journal.
            Harm::Bounded => self.bound(Some(4096)),
            Harm::Closed => self.close(0o500),
        }
    }

    async fn mend(&self, harm: Harm) {
        let codex = self.codex();
        match harm {
            Harm::NearlyFull | Harm::Full => fs::remove_file(codex.join("filler")).unwrap(),
            Harm::ReadOnly => {
                run("mount", &["-o", "remount,rw", codex.to_str().unwrap()]).await;
            }
            Harm::Bounded => self.bound(None),
            Harm::Closed => self.close(0o700),
        }
    }

    fn bound(&self, bytes: Option<u64>) {
        let pid = Pid::from_raw(self.serving.pid().cast_signed());
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(pid, Resource::Fsize, limit).unwrap();
    }

    fn close(&self, mode: u32) {
        for folder in [self.codex().join(".valetkey"), self.codex()] {
            if folder.exists() {
                fs::set_permissions(folder, Permissions::from_mode(mode)).unwrap();
            }
        }
    }

    async fn ask(&self) -> Response<bytes::Bytes> {
        let client = self.serving.client();
        let request = client::get("/backend-api/codex/models");
        let asked = client.send(Visit::to("chatgpt.com:443", HTTP1), request);
        gather(timeout(LIMIT, asked).await.unwrap().unwrap()).await.unwrap()
    }

    /// Asks until it is answered with a credential; the one that was sent.
    async fn sent(&self) -> String {
        let asking = async {
            loop {
                let answer = self.ask().await;
                if answer.status() == 200 {
                    return;
                }
                // As the refusal says.
                let (status, code, ..) = told(&answer);
                assert!(status == 503, "{status} {code}");
                sleep(Duration::from_millis(200)).await;
            }
        };
        timeout(LIMIT, asking).await.expect("it was refused for a minute");
        self.last_sent()
    }

    /// The access token that the API saw last.
    fn last_sent(&self) -> String {
        let seen = self.scene.world.api().seen();
        let sent = seen.last().unwrap().headers["authorization"].to_str().unwrap();
        sent.trim_start_matches("Bearer ").to_owned()
    }

    /// Waits until the file holds this token.
    async fn saved(&self, token: &str) {
        let saved = async {
            while !self.text().contains(token) {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LIMIT, saved).await.expect("it was not saved within a minute");
    }

    fn journals(&self) -> usize {
        let entries = fs::read_dir(self.codex().join(".valetkey")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|it| it == "journal")).count()
    }

    /// Waits until no journal is left.
    async fn tidied(&self) {
        let tidied = async {
            while self.journals() > 0 {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LIMIT, tidied).await.expect("a journal is left over");
    }

    /// Kills the proxy, and starts another one.
    async fn crash(&mut self) {
        self.serving.signal(Signal::KILL);
        self.serving.ended().await;
        self.serving = serve(&self.scene).await;
    }

    /// So many requests to the issuer, each of which was a refresh.
    fn assert_refreshes(&self, count: usize) {
        let issuer = self.scene.world.issuer();
        assert_eq!((issuer.posts(), issuer.refreshes(), issuer.reuses()), (count, count, 0));
    }
}

impl Drop for Place {
    /// A folder with a disk in it is not removed.
    fn drop(&mut self) {
        let codex = self.codex();
        // Lazily: the proxy ends a moment later.
        let _it_says_why_not = std::process::Command::new("umount").arg("-l").arg(codex).status();
    }
}

/// Starts the proxy: as a user whom modes bind, which root is without these two capabilities.
async fn serve(scene: &Scene) -> Serving {
    let bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let program = if rustix::process::geteuid().is_root() { &bound[..] } else { &[] };
    Serving::start_in(scene, program, &["--listen", "127.0.0.1:0"]).await
}

fn write(path: &Path, text: &[u8]) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Fills the disk but for so many bytes.
fn fill(path: &Path, but: usize) {
    use std::io::Write as _;
    let mut file = fs::File::create(path).unwrap();
    while file.write_all(&[b'x'; 4096]).is_ok() {}
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(but as u64)).unwrap();
}

async fn run(program: &str, arguments: &[&str]) {
    let ran = Command::new(program).args(arguments).output().await.unwrap();
    assert!(ran.status.success(), "{program} {arguments:?}: {ran:?}");
}

/// Whether this is the copy of the test that runs in a mount namespace of its own. Elsewhere that copy is started and
/// must succeed; or it is said why there is none.
async fn is_inside(test: &str) -> bool {
    const INSIDE: &str = "VALETKEY_TEST_INSIDE";
    if option_env_now(INSIDE).is_some() {
        return true;
    }
    let (Some(unshare), Some(_)) = (program("unshare"), program("setpriv")) else { return false };
    let inside = |how: &str, program: &Path| {
        let mut command = Command::new(&unshare);
        command.args([how, "--"]).arg(program).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    };
    let probe =
        "mount -t tmpfs -o size=64k probe /mnt && setpriv --bounding-set=-dac_override true";
    let mut refused = String::new();
    for how in ["-m", "-rm"] {
        let mut shell = inside(how, Path::new("sh"));
        let probe = done(shell.args(["-c", probe]).spawn().unwrap()).await;
        if probe.status != 0 {
            refused = probe.err;
            continue;
        }
        let mut copy = inside(how, &std::env::current_exe().unwrap());
        copy.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
        let copy = copy.spawn().unwrap().wait_with_output();
        let copy = timeout(LIMIT * 5, copy).await.expect("it took five minutes").unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&copy.stdout), text(&copy.stderr));
        assert!(copy.status.success(), "{out}\n{err}");
        assert!(out.contains("1 passed"), "there is no such test: {test}");
        println!("{out}");
        return false;
    }
    println!("skipped: this user may not mount anything: {}", refused.trim());
    false
}

const EVERY_HARM: [Harm; 5] =
    [Harm::NearlyFull, Harm::Full, Harm::ReadOnly, Harm::Bounded, Harm::Closed];

/// Every system call in its order, of all threads.
#[tokio::test]
async fn nothing_is_sent_before_a_journal_is_on_the_disk() {
    let Some(strace) = program("strace") else { return };
    let scene = Scene::new(time::Duration::seconds(-10)).await;
    let calls = scene.path("calls");
    let calls_to = calls.to_str().unwrap();
    let watching = [&strace, "-fy", "-e", "trace=write,fsync,connect", "-o", calls_to];
    let token = done(scene.valetkey_in(&watching, &["token"]).spawn().unwrap()).await;
    if token.err.contains("ptrace") && token.status != 0 {
        println!("skipped: nobody may trace here: {}", token.err);
        return;
    }
    assert_eq!(token.status, 0, "{token:?}");
    let calls = fs::read_to_string(calls).unwrap();
    let (_, address) = scene.world.resolve().remove(0);
    let port = format!("htons({})", address.port());
    let steps = [
        ["write(", ".journal>", ", 65536"],
        ["fsync(", ".journal>", ""],
        ["fsync(", "/.valetkey>", ""],
        ["connect(", &port, ""],
    ];
    // Each behind the return of the one before it.
    let mut rest = calls.lines();
    for step in steps {
        let call = rest.find(|line| step.iter().all(|part| line.contains(part)));
        let call = call.unwrap_or_else(|| panic!("no {step:?} in its place in\n{calls}"));
        if call.ends_with("<unfinished ...>") {
            let thread = call.split(' ').next().unwrap();
            rest.find(|line| line.starts_with(thread) && line.contains(" resumed>")).unwrap();
        }
    }
    let dials = calls.lines().filter(|line| line.contains("connect(") && line.contains(&port));
    assert_eq!(dials.count(), 1, "it was dialled before, too:\n{calls}");
}

#[tokio::test]
async fn a_disk_that_cannot_keep_an_answer_costs_no_request_and_no_login() {
    if !is_inside("disk::a_disk_that_cannot_keep_an_answer_costs_no_request_and_no_login").await {
        return;
    }
    join_all(EVERY_HARM.map(cannot_keep)).await;
}

async fn cannot_keep(harm: Harm) {
    // Alive for a while, and due at once: 5 s are the least margin.
    let place = Place::new(6).await;
    place.harm(harm).await;
    let before = place.text();
    let first = place.sent().await;
    assert!(before.contains(&first), "{harm:?}: what is cached is served on");
    // It expires, and nobody has asked the issuer.
    let refused = async {
        loop {
            let answer = place.ask().await;
            if answer.status() != 200 {
                return answer;
            }
            sleep(Duration::from_millis(200)).await;
        }
    };
    let answer = timeout(LIMIT, refused).await.expect("a token outlived its end");
    let (status, code, message, hint) = told(&answer);
    assert_eq!((status, code.as_str()), (503, "store_unavailable"), "{harm:?}: {message}");
    assert!(answer.headers().contains_key("retry-after"), "{harm:?}");
    assert!(message.contains(harm.words()), "{harm:?}: {message}");
    assert!(!message.contains('/'), "{harm:?}: it tells a client of a folder: {message}");
    assert!(!hint.is_empty(), "{harm:?}");
    place.assert_refreshes(0);
    assert_eq!(place.text(), before, "{harm:?}");
    place.mend(harm).await;
    let second = place.sent().await;
    assert_ne!(second, first, "{harm:?}");
    place.saved(&second).await;
    place.tidied().await;
    place.assert_refreshes(1);
    println!("{harm:?}: {message}; hint: {hint}");
}

#[tokio::test]
async fn an_answer_that_cannot_be_saved_is_served_kept_and_saved_later() {
    if !is_inside("disk::an_answer_that_cannot_be_saved_is_served_kept_and_saved_later").await {
        return;
    }
    // A disk that somebody writes to cannot be made read-only.
    for harm in [Harm::Full, Harm::Bounded, Harm::Closed] {
        for crashes in [false, true] {
            let mut place = Place::new(-10).await;
            let before = place.text();
            let sent = in_flight(&place, async || place.harm(harm).await).await;
            assert!(!before.contains(&sent), "{harm:?}");
            // Where the limit of the process is on every file, the journal cannot be written either.
            let is_kept = harm != Harm::Bounded;
            if crashes && is_kept {
                assert_eq!(place.text(), before, "{harm:?}: it was saved all the same");
                assert_eq!(place.journals(), 1, "{harm:?}");
                place.crash().await;
                // Also while the disk is as it is.
                assert_eq!(place.sent().await, sent, "{harm:?}");
            }
            place.mend(harm).await;
            place.saved(&sent).await;
            assert_eq!(place.sent().await, sent, "{harm:?}");
            place.tidied().await;
            place.assert_refreshes(1);
        }
    }
}

/// Begins a refresh, does something while its answer is on the way, and gives what is sent then.
async fn in_flight(place: &Place, act: impl AsyncFn()) -> String {
    let issuer = place.scene.world.issuer();
    issuer.script(Fault::Hold);
    let acting = async {
        issuer.wait_for_refreshes(1).await;
        act().await;
        issuer.release();
    };
    tokio::join!(place.sent(), acting).0
}

/// What others do to the file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Hand {
    /// Somebody else signs in.
    Replaced,
    Deleted,
    Truncated,
    Linked,
}

const EVERY_HAND: [Hand; 4] = [Hand::Replaced, Hand::Deleted, Hand::Truncated, Hand::Linked];

impl Place {
    /// Lays hands on the file; the access token of another login, where one comes.
    fn lay(&self, hand: Hand) -> Option<String> {
        let path = self.auth_json();
        match hand {
            Hand::Replaced => {
                let issuer = self.scene.world.issuer();
                let login = issuer.login_as("another-workspace", time::Duration::hours(1));
                write(&self.codex().join("new"), login.auth_json().as_bytes());
                fs::rename(self.codex().join("new"), &path).unwrap();
                let secrets = self.scene.world.secrets();
                let text = self.text();
                let mut theirs = secrets.into_iter().filter(|secret| text.contains(secret));
                return theirs.find(|secret| {
                    valetkey::secret::Fingerprint::of(secret.as_bytes())
                        == login.access.fingerprint()
                });
            }
            Hand::Deleted => fs::remove_file(path).unwrap(),
            Hand::Truncated => write(&path, b""),
            Hand::Linked => {
                let elsewhere = self.scene.path("elsewhere.json");
                fs::copy(&path, &elsewhere).unwrap();
                // At no moment is there none.
                std::os::unix::fs::symlink(elsewhere, self.codex().join("link")).unwrap();
                fs::rename(self.codex().join("link"), path).unwrap();
            }
        }
        None
    }

    /// Puts a file back as it was.
    fn put_back(&self, text: &str) {
        write(&self.codex().join("old"), text.as_bytes());
        fs::rename(self.codex().join("old"), self.auth_json()).unwrap();
    }
}

#[tokio::test]
async fn a_file_that_others_lay_hands_on_while_it_is_served() {
    if !is_inside("disk::a_file_that_others_lay_hands_on_while_it_is_served").await {
        return;
    }
    for hand in EVERY_HAND {
        let place = Place::new(3600).await;
        let before = place.text();
        let first = place.sent().await;
        let theirs = place.lay(hand);
        let now = || async {
            let answer = place.ask().await;
            match answer.status().as_u16() {
                200 => place.last_sent(),
                _ => told(&answer).1,
            }
        };
        let expected = match hand {
            Hand::Replaced => theirs.unwrap(),
            Hand::Deleted => "login_required".to_owned(),
            // What is held is used on.
            Hand::Truncated | Hand::Linked => first.clone(),
        };
        let told = async {
            while now().await != expected {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LIMIT, told).await.unwrap_or_else(|_| panic!("{hand:?}: nobody heard of it"));
        if matches!(hand, Hand::Truncated | Hand::Linked) {
            let status = place.scene.typed(&["status"]).await;
            let words = format!("{}{}", status.out, status.err);
            let why = if hand == Hand::Linked { "symbolic link" } else { "cannot be read" };
            assert!(words.contains(why), "{hand:?}: {words}");
        }
        place.put_back(&before);
        let again = async {
            while now().await != first {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LIMIT, again).await.unwrap_or_else(|_| panic!("{hand:?}: it is not served again"));
        place.assert_refreshes(0);
    }
}

#[tokio::test]
async fn a_file_that_others_lay_hands_on_while_a_refresh_is_in_flight() {
    if !is_inside("disk::a_file_that_others_lay_hands_on_while_a_refresh_is_in_flight").await {
        return;
    }
    for hand in EVERY_HAND {
        let place = Place::new(-10).await;
        let before = place.text();
        let issuer = place.scene.world.issuer();
        match hand {
            Hand::Replaced => {
                let theirs = std::cell::RefCell::new(None);
                let sent = in_flight(&place, async || {
                    theirs.replace(place.lay(hand));
                })
                .await;
                // The new login is what counts, and what was answered for the other one goes over nothing.
                assert_eq!(Some(sent), theirs.into_inner());
                assert!(place.text().contains("another-workspace"));
            }
            Hand::Deleted => {
                issuer.script(Fault::Hold);
                let acting = async {
                    issuer.wait_for_refreshes(1).await;
                    place.lay(hand);
                    issuer.release();
                };
                let (answer, ()) = tokio::join!(place.ask(), acting);
                // Whoever deletes it has signed out.
                assert_eq!(told(&answer).1, "login_required");
                assert!(!place.auth_json().exists());
            }
            Hand::Truncated | Hand::Linked => {
                let sent = in_flight(&place, async || {
                    place.lay(hand);
                })
                .await;
                // Nobody's file is written through, and what was answered is served until it can be saved.
                assert!(!before.contains(&sent), "{hand:?}");
                let elsewhere = place.scene.path("elsewhere.json");
                if hand == Hand::Linked {
                    assert_eq!(fs::read_to_string(elsewhere).unwrap(), before);
                }
                place.put_back(&before);
                place.saved(&sent).await;
                assert_eq!(place.sent().await, sent, "{hand:?}");
            }
        }
        place.tidied().await;
        place.assert_refreshes(1);
    }
}
