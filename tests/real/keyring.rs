//! A real gnome-keyring on a session bus of its own: found, locked, and not there.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::ChildStdout;

use super::desktop::Desktop;
use super::support::{Done, LIMIT, done, fed, program};

const API_KEY: &str = "sk-proj-vk-canary-in-the-keyring";

/// Longest time for a command when the keyring does not answer: less than what a person waits.
const PATIENCE: Duration = Duration::from_secs(5);

impl Desktop {
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

/// There may be a keyring behind it, and a login in that.
#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_refuses_us_is_not_an_absent_one() {
    let Some(mut desktop) = Desktop::new("auto").await else { return };
    fs::remove_file(desktop.auth_json()).unwrap();
    let socket = desktop.scene.path("refusing");
    let refusing = tokio::net::UnixListener::bind(&socket).unwrap();
    let refuse = async {
        loop {
            let (mut client, _) = refusing.accept().await.unwrap();
            // It may be gone already.
            drop(client.write_all(b"REJECTED\r\n").await);
        }
    };
    let address = format!("unix:path={}", socket.display());
    desktop.scene.env.insert("DBUS_SESSION_BUS_ADDRESS".to_owned(), address);
    let status = tokio::select! {
        status = desktop.valetkey_in_time(&["status"]) => status,
        () = refuse => unreachable!("it refuses for ever"),
    };
    assert_eq!(status.status, 1, "{status:?}");
    assert!(status.out.contains("cannot be read"), "{status:?}");
}

/// gnome-keyring ends itself now and then when the first thing that it hears of a connection is a session to open.
#[tokio::test(flavor = "multi_thread")]
async fn it_knows_each_connection_before_a_session_is_opened() {
    let Some(mut desktop) = Desktop::new("keyring").await else { return };
    desktop.start_keyring(Some("pass")).await;
    let mut monitor = desktop.command("dbus-monitor");
    let mut monitor = monitor.args(["--session", "--profile"]).spawn().unwrap();
    let mut seen = BufReader::new(monitor.stdout.take().unwrap()).lines();
    // From its own loss of a name on it sees everything.
    until(&mut seen, "\tNameLost").await;
    assert_eq!(desktop.save_api_key().await.status, 0);
    assert_eq!(desktop.valetkey(&["status"]).await.status, 0);
    let mut end = desktop.command("dbus-send");
    let end = end.args(["--session", "--dest=org.freedesktop.DBus", "/", "org.example.Ended"]);
    assert_eq!(done(end.spawn().unwrap()).await.status, 0);
    let (mut known, mut sessions) = (BTreeMap::new(), 0);
    for line in until(&mut seen, "\tEnded").await {
        let parts: Vec<&str> = line.split('\t').collect();
        match *parts {
            ["mc", _, serial, sender, "org.freedesktop.secrets", .., "ReadAlias"] => {
                known.insert(sender.to_owned(), (serial.to_owned(), false));
            }
            ["mr", _, _, _, receiver, serial] => {
                let answered = known.get_mut(receiver).filter(|call| call.0 == serial);
                answered.into_iter().for_each(|call| call.1 = true);
            }
            ["mc", _, _, sender, "org.freedesktop.secrets", .., member] => {
                assert!(known.get(sender).is_some_and(|call| call.1), "{line}");
                sessions += usize::from(member == "OpenSession");
            }
            _ => {}
        }
    }
    assert!(sessions >= 2, "{sessions} sessions");
}

/// What is said up to the line with that end, and that line.
async fn until(lines: &mut Lines<BufReader<ChildStdout>>, end: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let line =
            tokio::time::timeout(LIMIT, lines.next_line()).await.expect("dbus-monitor is silent");
        let line = line.unwrap().expect("dbus-monitor has ended");
        let is_last = line.ends_with(end);
        seen.push(line);
        if is_last {
            return seen;
        }
    }
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
