//! Who may use a running proxy: other users of this machine, other machines, and what each of them sees.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use valetkey::sandbox::SAID;

use super::legs::agree;
use super::served::Serving;
use super::support::{Done, KEY, Scene, SigningIn, codex, done, program, python};

/// The user `nobody`, who has nothing to do with whoever runs the tests.
const NOBODY: u32 = 65_534;

/// Another user of this machine with a folder of its own; `None` after saying what is skipped.
struct Neighbour {
    folder: TempDir,
}

impl Neighbour {
    /// One who has got the proxy's roots.
    fn with_roots(ca: &Path) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can be another user, too");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        fs::copy(ca, folder.path().join("ca.pem")).unwrap();
        Some(Self { folder })
    }

    fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A program of this user's, who sees nothing of our environment.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env!("PATH")).uid(NOBODY).gid(NOBODY);
        command.current_dir(self.folder.path()).kill_on_drop(true).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// curl through this proxy, with these arguments.
    async fn curl(&self, curl: &str, proxy: &str, url: &str) -> Done {
        let mut command = self.command(curl);
        command.args(["--silent", "--show-error", "--proxy", proxy, "--cacert"]).arg(self.ca());
        command.args(["--write-out", "%{http_connect} %{http_code}", "--output", "/dev/null", url]);
        done(command.spawn().unwrap()).await
    }
}

impl Scene {
    /// What `valetkey pass new` prints.
    async fn new_pass(&self, arguments: &[&str]) -> String {
        let command = &mut self.valetkey(&[&["pass", "new"], arguments].concat());
        let done = done(command.spawn().unwrap()).await;
        assert_eq!(done.status, 0, "{done:?}");
        done.out.trim_end().to_owned()
    }

    async fn revoke(&self, name: &str) {
        let done = self.typed(&["pass", "revoke", name]).await;
        assert_eq!(done.status, 0, "{done:?}");
    }
}

const URL: &str = "https://api.example.com/v1/x";

#[tokio::test(flavor = "multi_thread")]
async fn a_second_user_needs_a_pass_and_loses_all_with_it() {
    let (Some(curl), Some(bash)) = (program("curl"), program("bash")) else { return };
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    let Some(neighbour) = Neighbour::with_roots(&serving.ca) else { return };
    let without = format!("http://{}", serving.address);
    let refused = neighbour.curl(&curl, &without, URL).await;
    assert!(refused.status != 0 && refused.out == "407 000", "{refused:?}");
    assert!(scene.world.api().seen().is_empty());

    let pass = scene.new_pass(&["ci", "--tunnel", "--allow-private", "--ttl", "1h"]).await;
    assert!(pass.starts_with("vkp_"), "{pass}");
    let with = format!("http://ci:{pass}@{}", serving.address);
    let let_in = neighbour.curl(&curl, &with, URL).await;
    assert_eq!((let_in.status, let_in.out.as_str()), (0, "200 200"), "{let_in:?}");
    scene.seen_signed_in();

    // A tunnel that stays open, of a host that no rule speaks of.
    let shown = STANDARD.encode(format!("ci:{pass}"));
    let held = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{}\n\
         printf 'CONNECT other.example.com:443 HTTP/1.1\\r\\nHost: other.example.com:443\\r\\n\
         Proxy-Authorization: Basic {shown}\\r\\n\\r\\n' >&3\n\
         read -r line <&3; echo \"$line\"; cat <&3; echo ended",
        serving.address.port()
    );
    let mut tunnel = neighbour.command(&bash).args(["-c", &held]).spawn().unwrap();
    let mut said = BufReader::new(tunnel.stdout.take().unwrap()).lines();
    let mut hear = async || said.next_line().await.unwrap().unwrap().trim_end().to_owned();
    assert_eq!(hear().await, "HTTP/1.1 200 OK");
    assert_eq!(hear().await, "", "the end of the head");
    scene.revoke("ci").await;
    assert_eq!(hear().await, "ended");
    let refused = neighbour.curl(&curl, &with, URL).await;
    assert!(refused.status != 0 && refused.out == "407 000", "{refused:?}");
    serving.signal(rustix::process::Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    fs::set_permissions(scene.home.path(), Permissions::from_mode(0o755)).unwrap();
    let ours =
        ["passes/passes.json", "ca"].map(|name| scene.path(".local/share/valetkey").join(name));
    for path in ours.into_iter().chain([scene.path(".codex/auth.json")]) {
        let read = done(neighbour.command("cat").arg(path).spawn().unwrap()).await;
        assert_ne!(read.status, 0, "{read:?}");
    }
}

/// `allow_uids` lets a user in without a pass, and another one is told how to be let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_user_may_be_let_in_by_its_number() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let listener =
        |uid: u32| format!("[[listeners]]\naddress = \"127.0.0.1:0\"\nallow_uids = [{uid}]\n");
    for (uid, expected) in [(NOBODY, "200 200"), (1, "407 000")] {
        scene.configure(&(listener(uid) + &scene.world.upstream_toml()));
        let serving = Serving::start_with(&scene, &[]).await;
        let Some(neighbour) = Neighbour::with_roots(&serving.ca) else { return };
        let done = neighbour.curl(&curl, &format!("http://{}", serving.address), URL).await;
        assert_eq!(done.out, expected, "{done:?}");
    }
}

/// What a client says to a Unix socket, for there is no tool that takes one for an HTTP proxy.
const OVER_A_FILE: &str = "import socket, ssl, sys\n\
    s = socket.socket(socket.AF_UNIX)\n\
    s.connect(sys.argv[1])\n\
    s.sendall(b'CONNECT api.example.com:443 HTTP/1.1\\r\\nHost: api.example.com:443\\r\\n\\r\\n')\n\
    print(s.recv(4096).split(b'\\r\\n')[0].decode())\n\
    t = ssl.create_default_context(cafile=sys.argv[2]).wrap_socket(s, server_hostname='api.example.com')\n\
    t.sendall(b'GET /v1/x HTTP/1.1\\r\\nHost: api.example.com\\r\\nConnection: close\\r\\n\\r\\n')\n\
    print(t.recv(4096).split(b'\\r\\n')[0].decode())\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_for_its_user_alone() {
    let (Some(python), Some(curl)) = (python(), program("curl")) else { return };
    let scene = Scene::usual().await;
    let path = scene.path("sockets/proxy.sock");
    let listeners = format!(
        "[[listeners]]\naddress = \"127.0.0.1:0\"\n[[listeners]]\naddress = \"unix:{}\"\n{}",
        path.display(),
        scene.world.upstream_toml()
    );
    scene.configure(&listeners);
    let mut serving = Serving::start_with(&scene, &[]).await;
    serving.hear(path.to_str().unwrap()).await;
    let mut command = Command::new(&python);
    command.arg("-c").arg(OVER_A_FILE).args([&path, &serving.ca]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let answered = done(command.spawn().unwrap()).await;
    assert_eq!(answered.out, "HTTP/1.1 200 OK\nHTTP/1.1 200 OK\n", "{answered:?}");
    scene.seen_signed_in();
    if let Some(neighbour) = Neighbour::with_roots(&serving.ca) {
        fs::set_permissions(scene.home.path(), Permissions::from_mode(0o755)).unwrap();
        let knock = async || {
            let mut command = neighbour.command(&curl);
            command.arg("--unix-socket").arg(&path).args(["--silent", "--include", "http://x/"]);
            done(command.spawn().unwrap()).await
        };
        // curl's status for "failed to connect" (curl(1)).
        assert_eq!(knock().await.status, 7);
        // Where somebody opens the folder, the kernel still says who it is.
        fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let refused = knock().await;
        assert!(refused.out.starts_with("HTTP/1.1 407 "), "{refused:?}");
    }
    serving.signal(rustix::process::Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    assert!(!path.exists(), "the socket is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_loopback_there_must_be_passes_and_there_may_be_tls() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let far = format!(
        "[[listeners]]\naddress = \"0.0.0.0:0\"\ntls = true\nrequire_pass = true\n{}",
        scene.world.upstream_toml()
    );
    scene.configure(&far);
    let refused = scene.typed(&["serve"]).await;
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(refused.err.contains("there is no pass") && refused.err.contains("valetkey pass new"));

    let pass = scene.new_pass(&["laptop", "--max-requests", "2"]).await;
    let mut serving = Serving::start_with(&scene, &[]).await;
    serving.hear("Codex does not").await;
    let port = serving.address.port();
    for (login, name, expected) in [
        (String::new(), "localhost", "407 000"),
        (format!("laptop:{pass}@"), "localhost", "200 200"),
        (format!("laptop:{pass}@"), "127.0.0.1", "200 200"),
        (format!("laptop:{pass}@"), "localhost", "200 407"),
    ] {
        let mut command = Command::new(&curl);
        command.args(["--silent", "--proxy", &format!("https://{login}{name}:{port}")]);
        for option in ["--cacert", "--proxy-cacert"] {
            command.arg(option).arg(&serving.ca);
        }
        command.args(["--write-out", "%{http_connect} %{http_code}", "--output", "/dev/null", URL]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let done = done(command.spawn().unwrap()).await;
        assert_eq!(done.out, expected, "{name}: {done:?}");
    }
    let list = scene.typed(&["pass", "list"]).await;
    assert!(list.out.contains("laptop") && !list.out.contains(&pass), "{list:?}");
    serving.signal(rustix::process::Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    let list = scene.typed(&["pass", "list"]).await;
    assert!(list.out.contains("2 of 2 requests") && list.out.contains("used up"), "{list:?}");
    let all = fs::read_to_string(scene.path(".local/share/valetkey/passes/passes.json")).unwrap();
    assert!(!all.contains(&pass) && !all.contains(KEY));
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_that_make_no_sense_are_not_made() {
    let scene = Scene::usual().await;
    scene.new_pass(&["ci"]).await;
    for (arguments, status, said) in [
        (&["new", "ci"][..], 1, "there is a pass `ci` already"),
        (&["new", "a b"], 2, "expected letters, digits"),
        (&["new", "x", "--rules", "chatgpt,chatgtp"], 2, "there is no rule `chatgtp`"),
        (&["new", "x", "--ttl", "8"], 2, "as in 8h"),
        (&["new", "x", "--max-requests", "0"], 2, "0 is not in 1.."),
        (&["new", "x", "--allow-private"], 2, "--tunnel"),
        (&["revoke", "nobody"], 1, "there is no pass `nobody`"),
        (&["revoke"], 2, "required"),
        (&["revoke", "ci", "--all"], 2, "cannot be used with"),
    ] {
        let done = scene.typed(&[&["pass"], arguments].concat()).await;
        assert_eq!(done.status, status, "{arguments:?}: {done:?}");
        assert!(done.err.contains(said) && done.out.is_empty(), "{arguments:?}: {done:?}");
    }
    let list = scene.typed(&["pass", "list", "--json"]).await;
    let list: serde_json::Value = serde_json::from_str(&list.out).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    scene.revoke("ci").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_nobody_without_a_pass_says_so_to_its_own_user() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let strict = "[[listeners]]\naddress = \"127.0.0.1:0\"\nrequire_pass = true\n";
    scene.configure(&format!("{strict}{}", scene.world.upstream_toml()));
    let serving = Serving::start_with(&scene, &[]).await;
    let env = done(scene.valetkey(&["env", "--shell", "bash"]).spawn().unwrap()).await;
    assert!(env.status == 0 && env.err.contains("takes nobody without a pass"), "{env:?}");
    let health = done(scene.valetkey(&["health"]).spawn().unwrap()).await;
    assert_eq!(health.status, 0, "{health:?}");

    let pass = scene.new_pass(&["me"]).await;
    let url = format!("http://me:{pass}@{}", serving.address);
    let arguments = ["env", "--shell", "bash", "--proxy-url", &url];
    let env = done(scene.valetkey(&arguments).spawn().unwrap()).await;
    assert!(env.status == 0 && env.err.is_empty(), "{env:?}");
    let mut shell = Command::new("sh");
    let script = format!("{}\n'{curl}' --silent --fail {URL}", env.out);
    shell.env_clear().env("PATH", std::env!("PATH")).args(["-c", &script]);
    let done = done(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await;
    assert_eq!(done.status, 0, "{done:?}");
    scene.seen_signed_in();
}

/// What others of this machine can read in the arguments of a browser is enough to answer for it, but not for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_user_cannot_answer_for_who_signs_in() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let issuer = scene.world.issuer();
    let Some(neighbour) = Neighbour::with_roots(scene.world.ca_file()) else { return };
    let signing_in = SigningIn::begin(&scene, &[]).await;
    let redirect = agree(&scene.world, &signing_in.url).await;
    let arguments = ["--silent", "--write-out", "%{http_code}", &redirect];
    let refused = done(neighbour.command(&curl).args(arguments).spawn().unwrap()).await;
    // curl's statuses for a connection that ends or is reset without an answer (curl(1)).
    assert!([52, 56].contains(&refused.status) && refused.out == "000", "{refused:?}");
    assert_eq!(issuer.posts(), 0);

    let mut browser = Command::new(&curl);
    browser.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let followed = done(browser.spawn().unwrap()).await;
    assert_eq!(followed.out, "303", "{followed:?}");
    let signed_in = signing_in.end().await;
    assert_eq!((signed_in.status, issuer.posts()), (0, 1), "{signed_in:?}");
}

/// The whole story for another user of this machine: a pass, decoys and the roots are all that it has, the real Codex
/// works, and nothing that is worth anything can be read by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_codex_of_a_second_user_works_and_finds_no_token() {
    let Some(codex) = codex() else { return };
    let scene = Scene::usual().await;
    let serving = Serving::start(&scene).await;
    let Some(neighbour) = Neighbour::with_roots(&serving.ca) else { return };
    let pass = scene.new_pass(&["neighbour", "--rules", "chatgpt"]).await;
    let decoys = scene.path("decoys");
    let arguments = ["init", "codex", "--dir", decoys.to_str().unwrap()];
    assert_eq!(done(scene.valetkey(&arguments).spawn().unwrap()).await.status, 0);
    let home = neighbour.folder.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::copy(decoys.join("auth.json"), home.join("auth.json")).unwrap();
    fs::copy(&codex, neighbour.folder.path().join("codex")).unwrap();
    for path in [&home, &home.join("auth.json")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }

    let mut command = neighbour.command("./codex");
    command.args(["exec", "--skip-git-repo-check", "say hi"]).current_dir(neighbour.folder.path());
    command.env("HTTPS_PROXY", format!("http://neighbour:{pass}@{}", serving.address));
    command.env("CODEX_HOME", &home).env("HOME", &home).env("CODEX_CA_CERTIFICATE", neighbour.ca());
    let turn = done(command.spawn().unwrap()).await;
    assert!(turn.status == 0 && turn.out.contains(SAID), "{turn:?}");
    scene.assert_no_secret("Codex's output", &format!("{}{}", turn.out, turn.err));
    assert!(scene.world.api().seen().iter().any(|seen| seen.path.ends_with("/responses")));

    // What it may read of all that there is: its own folder, where there is no token.
    fs::set_permissions(scene.home.path(), Permissions::from_mode(0o755)).unwrap();
    let process = format!("/proc/{}", serving.pid());
    let places = [scene.home.path().to_str().unwrap(), neighbour.folder.path().to_str().unwrap()];
    for secret in scene.secrets() {
        let mut search = neighbour.command("grep");
        search.args(["-rlFa", "-e", &secret]).args(places);
        search.args(["environ", "cmdline", "mem", "maps"].map(|file| format!("{process}/{file}")));
        let found = done(search.spawn().unwrap()).await;
        assert_eq!(found.out, "", "{found:?}");
        assert!(found.err.contains("auth.json: Permission denied"), "{found:?}");
        assert!(found.err.contains("/mem: Permission denied"), "{found:?}");
    }
}
