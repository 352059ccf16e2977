//! The units, and `valetkey serve` on sockets that systemd's own program has opened.

use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::net::UnixDatagram;
use tokio::process::{Child, ChildStderr};
use valetkey::sandbox::client::{Client, HTTP2, Visit};

use super::*;
use crate::support::{LIMIT, own_loopback};

#[tokio::test]
async fn takes_the_units() {
    let Some(analyze) = program("systemd-analyze") else { return };
    let scene = Scene::usual().await;
    let bridge = "[[listeners]]\naddress = \"172.17.0.1:8377\"\nrequire_pass = true\n";
    scene.configure(bridge);
    generated(&scene, &["systemd"]).await;
    let said = succeed(&mut scene.valetkey(&["init", "systemd"])).await.err;
    assert!(said.contains("does not see EXAMPLE_TOKEN (credential \"example\")"), "{said}");
    assert!(said.contains("or: systemctl --user edit valetkey"), "{said}");
    let runtime = scene.path("run");
    fs::create_dir_all(&runtime).unwrap();
    let units = scene.path(".config/systemd/user");
    let unit = |name: &str| units.join(name);
    let mut verify = Command::new(&analyze);
    verify.args(["verify", "--user", "--man=no"]).env_clear();
    verify.env("PATH", env!("PATH")).env("HOME", scene.path("")).env("XDG_RUNTIME_DIR", runtime);
    verify.arg(unit("valetkey.service")).arg(unit("valetkey.socket"));
    let done = succeed(&mut verify).await;
    // It calls a misspelt setting a warning.
    let about_ours = |line: &&str| line.contains("valetkey");
    assert_eq!(done.err.lines().find(about_ours), None, "{done:#?}");
    for folder in [".codex", ".local/share/valetkey", ".local/state/valetkey"] {
        assert!(scene.path(folder).is_dir(), "{folder}: the service could not write there");
    }
}

/// A `valetkey serve` that systemd's own program starts at the first client.
struct Activated {
    child: Child,
    notify: UnixDatagram,
    said: Lines<BufReader<ChildStderr>>,
}

impl Activated {
    /// Waits until it listens; nobody has connected yet, and nothing is started.
    async fn start(program: &str, scene: &Scene, socket: &str) -> Self {
        let notify = UnixDatagram::bind(scene.path("notify")).unwrap();
        let mut command = Command::new(program);
        command.args(["--listen", socket]);
        command.arg(format!("--setenv=NOTIFY_SOCKET={}", scene.path("notify").display()));
        for (name, value) in &scene.env {
            command.arg(format!("--setenv={name}={value}"));
        }
        command.args([env!("CARGO_BIN_EXE_valetkey"), "serve"]);
        command.env_clear().env("PATH", env!("PATH")).current_dir(scene.path(""));
        command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let listening = async { said.next_line().await.unwrap().unwrap_or_default() };
        let line = tokio::time::timeout(LIMIT, listening).await.unwrap();
        assert!(line.starts_with("Listening on "), "{line}");
        Self { child, notify, said }
    }

    /// The rest of what is said, and the status in the end.
    async fn end(mut self) -> (Option<i32>, String) {
        let ending = async {
            let mut said = String::new();
            while let Some(line) = self.said.next_line().await.unwrap() {
                said = format!("{said}{line}\n");
            }
            (self.child.wait().await.unwrap().code(), said)
        };
        tokio::time::timeout(LIMIT, ending).await.expect("it did not end within a minute")
    }

    /// What the service manager is told next.
    async fn told(&self) -> String {
        let mut buffer = [0; 1024];
        let told = tokio::time::timeout(LIMIT, self.notify.recv(&mut buffer)).await;
        let length = told.expect("nothing was told within a minute").unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }
}

#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
#[tokio::test(flavor = "multi_thread")]
async fn starts_it_at_the_first_client_and_hears_how_it_is() {
    let Some(activate) = program("systemd-socket-activate") else { return };
    let scene = Scene::usual().await;
    fs::create_dir_all(scene.path("run")).unwrap();
    let address = std::net::SocketAddr::from((own_loopback(1), 8377));
    let listen = format!("listen = \"{address}\"\n");
    let config = scene.path(".config/valetkey/config.toml");
    fs::write(&config, listen + &fs::read_to_string(&config).unwrap()).unwrap();
    let activated = Activated::start(&activate, &scene, &address.to_string()).await;
    let waiting = std::net::TcpStream::connect(address).unwrap();

    let told = activated.told().await;
    assert!(told.starts_with("READY=1\nSTATUS=listening on http://127."), "{told}");
    drop(waiting);
    let health = scene.typed(&["health"]).await;
    assert_eq!(health.status, 0, "{health:#?}");
    let client = Client::through(address, &scene.path("run/valetkey/ca.pem")).unwrap();
    let visit = Visit::to("api.example.com:443", HTTP2);
    assert_eq!(client.get(visit, "/v1/things").await.unwrap().status(), 200);
    assert_eq!(scene.seen_signed_in().len(), 1);

    let pid = Pid::from_raw(activated.child.id().unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(activated.told().await, "STOPPING=1\n");
    let (status, said) = activated.end().await;
    assert_eq!(status, Some(0), "{said}");
}

#[expect(clippy::disallowed_methods, reason = "the test plays a client")]
#[tokio::test(flavor = "multi_thread")]
async fn is_told_of_a_socket_that_no_listener_speaks_of() {
    let Some(activate) = program("systemd-socket-activate") else { return };
    let scene = Scene::usual().await;
    let config = scene.path(".config/valetkey/config.toml");
    let listen = format!("listen = \"{}:8377\"\n", own_loopback(2));
    fs::write(&config, listen + &fs::read_to_string(&config).unwrap()).unwrap();
    let socket = scene.path("socket");
    let activated = Activated::start(&activate, &scene, socket.to_str().unwrap()).await;
    let _waiting = UnixStream::connect(&socket).unwrap();
    let (status, said) = activated.end().await;
    assert_eq!(status, Some(1), "{said}");
    let refused = format!("a socket at unix:{} was handed over", socket.display());
    assert!(said.contains(&refused) && said.contains("hint: "), "{said}");
}
