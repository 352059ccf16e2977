//! Signing in and out with the built binary, against the pretend issuer, behind a company's proxy.

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStderr, Command};
use valetkey::sandbox::client::{Client, HTTP1, Visit};
use valetkey::sandbox::{Settings, World};

use super::support::within;

/// A home in which the company's proxy is the only way out, and its CA is named by a variable.
struct Home {
    world: World,
    folder: TempDir,
    env: BTreeMap<String, String>,
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
        Self::trusting(|world| world.company().ca_file().to_str().unwrap().to_owned()).await
    }

    async fn trusting(ca: impl Fn(&World) -> String) -> Self {
        let world = World::start(Settings::default()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let env = [
            ("HOME", path("")),
            ("XDG_RUNTIME_DIR", path("run")),
            ("HTTPS_PROXY", format!("http://{}", world.company().address())),
            ("CODEX_CA_CERTIFICATE", ca(&world)),
        ];
        let env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { world, folder, env }
    }

    fn valetkey(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_valetkey"));
        command.args(arguments).env_clear().envs(&self.env).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn run(&self, arguments: &[&str]) -> Done {
        done(self.valetkey(arguments).spawn().unwrap(), "").await
    }

    fn cached(&self) -> Option<Value> {
        let text = fs::read(self.folder.path().join(".codex/auth.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap())
    }
}

async fn done(child: Child, said: &str) -> Done {
    let output = within(child.wait_with_output()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let err = said.to_owned() + &text(&output.stderr);
    Done { status: output.status.code().unwrap(), out: text(&output.stdout), err }
}

/// Reads what a command says until a line fits; answers with that line and everything before it.
async fn until(
    lines: &mut Lines<BufReader<ChildStderr>>,
    fits: impl Fn(&str) -> bool,
) -> (String, String) {
    let mut said = String::new();
    loop {
        let line = within(lines.next_line()).await.unwrap().unwrap_or_else(|| panic!("{said}"));
        said.push_str(&line);
        said.push('\n');
        if fits(&line) {
            return (line, said);
        }
    }
}

/// A browser that does what pages tell it: it goes to the issuer, and where that sends it.
async fn visit_issuer(world: &World, url: &str) -> String {
    let roots = world.ca_file();
    let (_, address) = world.resolve().into_iter().next().unwrap();
    let client = Client::straight_to(address, roots).unwrap();
    let rest = url.strip_prefix("https://").unwrap();
    let (host, path) = rest.split_at(rest.find('/').unwrap());
    let answer = client.get(Visit::to(&format!("{host}:443"), HTTP1), path).await.unwrap();
    answer.headers()["location"].to_str().unwrap().to_owned()
}

#[expect(clippy::disallowed_methods, reason = "a browser of this machine")]
/// A GET on loopback: status, headers and body as they came.
async fn get(url: &str) -> String {
    let rest = url.strip_prefix("http://").unwrap();
    let (authority, path) = rest.split_at(rest.find('/').unwrap());
    let mut stream = TcpStream::connect(authority).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

fn location(answer: &str) -> &str {
    let line = answer.lines().find(|line| line.to_ascii_lowercase().starts_with("location:"));
    line.unwrap_or_else(|| panic!("{answer}")).split_once(':').unwrap().1.trim()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_through_the_companys_proxy() {
    let home = Home::new().await;
    let mut child = home.valetkey(&["login", "--no-browser"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (url, _) = until(&mut lines, |line| line.starts_with("https://")).await;
    let redirect = visit_issuer(&home.world, &url).await;
    let by_browser = home.world.connections();
    let base = redirect.split("/auth/callback").next().unwrap().to_owned();

    let wrong = get(&format!("{base}/auth/callback?code=c&state=wrong")).await;
    assert!(wrong.starts_with("HTTP/1.1 400") && wrong.ends_with("State mismatch"), "{wrong}");
    let answer = get(&redirect).await;
    assert!(answer.starts_with("HTTP/1.1 303"), "{answer}");
    let page = get(&format!("{base}{}", location(&answer))).await;
    assert!(page.contains("Signed in") && page.contains("acct-sandbox"), "{page}");
    let mut rest = String::new();
    within(lines.get_mut().read_to_string(&mut rest)).await.unwrap();
    let done = done(child, &rest).await;
    assert_eq!(done.status, 0, "{done:?}");
    assert!(done.err.contains("Successfully logged in"), "{done:?}");

    let status = home.run(&["login", "status"]).await;
    assert_eq!(status.status, 0, "{status:?}");
    let logout = home.run(&["logout"]).await;
    assert_eq!(logout.status, 0, "{logout:?}");
    assert!(home.cached().is_none());
    assert_eq!(home.world.issuer().revokes(), 1);
    let status = home.run(&["login", "status"]).await;
    assert_eq!((status.status, status.out.lines().next()), (1, Some("Not logged in")));
    assert_eq!(home.world.connections(), by_browser, "somebody went past the company's proxy");
}
