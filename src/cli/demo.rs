//! `valetkey demo`: the main job on a pretend world, over real sockets on this machine alone.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{SinkExt as _, StreamExt as _};
use tempfile::TempDir;
use tokio::process::Command;
use tokio_tungstenite::tungstenite::Message;

use super::output::{self, Failure};
use super::process::{self, Signals};
use super::programs::Search;
use super::start::{self, Started};
use crate::client_env::ClientEnv;
use crate::config::env::Environment;
use crate::config::{Config, Overrides};
use crate::headers::VALETKEY_ERROR;
use crate::proxy::{Door, Socket};
use crate::sandbox::client::{self, Client, HTTP1, HTTP2, Visit};
use crate::sandbox::{Seen, Settings, World};
use crate::secret::Secret;

/// The host of the ChatGPT login's rule, and a path that it covers.
const CHATGPT: &str = "chatgpt.com:443";
const MODELS: &str = "/backend-api/codex/models";

/// How many requests find the token expired at once.
const CROWD: usize = 50;

/// How long one act may take: the world is on this machine, so this is a matter of seconds.
const ACT_LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(env: &Environment) -> Result<ExitCode, Failure> {
    process::runtime()?.block_on(async {
        let mut signals = Signals::ending()?;
        tokio::select! {
            outcome = play(env) => outcome,
            // Dropping the play removes its folders.
            signal = signals.next() => {
                let status = 128 + signal.as_raw() as u8;
                Err(Failure::new("the demo was interrupted").status(status))
            }
        }
    })
}

async fn play(env: &Environment) -> Result<ExitCode, Failure> {
    output::data(
        "valetkey demo: a pretend API and issuer behind a private \"company\" CA, and the real proxy.",
    );
    output::data("Real sockets on 127.0.0.1; nothing leaves this machine.\n");
    let world = World::start(Settings::default()).await?;
    let stage = Stage::set(&world, env).await?;
    let mut failed = 0;
    let mut number = 0;
    let mut show = |title: &str, told: Result<Vec<String>, String>| {
        number += 1;
        output::data(format_args!("{number}. {title}"));
        for line in told.as_ref().map_or(&[][..], Vec::as_slice) {
            output::data(format_args!("     {line}"));
        }
        match told {
            Ok(_) => output::data("   \u{1b}[32mok\u{1b}[0m\n"),
            Err(why) => {
                failed += 1;
                output::data(format_args!("   \u{1b}[31mfailed\u{1b}[0m: {why}\n"));
            }
        }
    };
    show("50 requests at once find the login's token expired", stage.crowd().await);
    show("HTTPS over HTTP/1.1", stage.https(&["--http1.1"], HTTP1).await);
    show("HTTPS over HTTP/2", stage.https(&["--http2"], HTTP2).await);
    show("server-sent events, as they come", stage.events().await);
    show("a WebSocket", stage.websocket().await);
    show("an API key for another host, by a rule of your own", stage.api_key().await);
    show("a request to a wrong host inside a signed-in tunnel", stage.wrong_host().await);
    show("a host without a rule", stage.tunnel().await);
    stage.started.shut_down(Duration::from_millis(100)).await;
    if failed > 0 {
        return Err(Failure::new(format!("{failed} of {number} steps failed")));
    }
    output::data(format_args!("All {number} steps held. Now your own login: valetkey status"));
    Ok(ExitCode::SUCCESS)
}

/// The proxy, its login, and who watches them.
struct Stage<'a> {
    world: &'a World,
    started: Started,
    client: Client,
    client_env: ClientEnv,
    has_curl: bool,
    _home: TempDir,
}

/// What an act tells, or why it did not come off.
type Told = Result<Vec<String>, String>;

impl<'a> Stage<'a> {
    async fn set(world: &'a World, env: &Environment) -> Result<Self, Failure> {
        let home = tempfile::Builder::new().prefix("valetkey-demo-").tempdir()?;
        let config = write_config(world, home.path())?;
        // Signed in, and expired a minute ago.
        let codex_home = home.path().join(".codex");
        fs::create_dir(&codex_home)?;
        world.issuer().write_auth_json(&codex_home, time::Duration::minutes(-1))?;
        world.api().accept(Secret::new(API_KEY));
        world.api().require_login(true);
        let own_env = Environment::from_pairs([("HOME", home.path())]);
        let overrides = Overrides { config: Some(config), ..Overrides::default() };
        let config = Config::load(&overrides, &own_env).map_err(output::mistakes)?;
        let ca = start::local_ca(&config)?;
        let started = Started::new(config, ca, None, &own_env).await?;
        let listener = start::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
        let address = listener.local_addr()?;
        started.proxy.serve(Socket::Tcp(listener), Door::default());
        let roots = started.write_roots(home.path())?;
        let all_roots = home.path().join("client.pem");
        fs::write(&all_roots, fs::read_to_string(roots)? + world.ca_pem())?;
        let client_env = started.client_env(address, &own_env, home.path())?;
        let has_curl = Search::new(env.get("PATH")).has("curl");
        output::data(format_args!("proxy {address}, pretend world {}", shown_address(world)));
        output::data(match has_curl {
            true => "client: the curl of this machine, and our own where curl cannot do it\n",
            false => "client: our own, for there is no curl on this machine\n",
        });
        let client = Client::through(address, &all_roots)?;
        Ok(Self { world, started, client, client_env, has_curl, _home: home })
    }

    /// All of them wait for one refresh.
    async fn crowd(&self) -> Told {
        let before = self.world.issuer().refreshes();
        let visits = (0..CROWD).map(|_| self.client.get(Visit::to(CHATGPT, HTTP1), MODELS));
        let answers = within(async { Ok(join_all(visits).await) }).await?;
        let good = answers.iter().flatten().filter(|answer| answer.status() == 200).count();
        let refreshes = self.world.issuer().refreshes() - before;
        let told = vec![
            format!("the tools got     {good} of {CROWD} answers 200"),
            format!("the issuer saw    {refreshes} refresh"),
        ];
        if good == CROWD && refreshes == 1 { Ok(told) } else { Err(told.join(", ")) }
    }

    async fn https(&self, curl: &[&str], alpn: &[&[u8]]) -> Told {
        let sent = self.fetch(CHATGPT, MODELS, curl, alpn).await?;
        self.told(sent, CHATGPT)
    }

    async fn events(&self) -> Told {
        let path = "/backend-api/codex/sse?n=3&every_ms=50";
        let sent = self.fetch(CHATGPT, path, &["--no-buffer"], HTTP2).await?;
        let events = sent.body.matches("event: tick").count();
        if events != 3 {
            return Err(format!("{events} of 3 events came"));
        }
        let mut told = self.told(sent, CHATGPT)?;
        told.push("the tool got      3 events".to_owned());
        Ok(told)
    }

    async fn websocket(&self) -> Told {
        self.world.api().clear();
        let echo = within(async {
            let stream = self.client.greet(Visit::to(CHATGPT, &[])).await?;
            let url = "wss://chatgpt.com/backend-api/codex/ws";
            let shaking = Box::pin(tokio_tungstenite::client_async(url, stream));
            let (mut socket, _) = shaking.await.map_err(io::Error::other)?;
            socket.send(Message::text("turn the key")).await.map_err(io::Error::other)?;
            let echo = socket.next().await.ok_or(io::ErrorKind::UnexpectedEof)?;
            let echo = echo.map_err(io::Error::other)?;
            socket.close(None).await.map_err(io::Error::other)?;
            Ok(echo)
        });
        let echo = echo.await?;
        let mut sent = Sent::by_us("GET /backend-api/codex/ws, Upgrade: websocket");
        sent.status = 101;
        let mut told = self.told(sent, CHATGPT)?;
        told.push(format!("the echo          {:?}", echo.to_text().unwrap_or("not text")));
        if echo == Message::text("turn the key") { Ok(told) } else { Err(told.join(", ")) }
    }

    async fn api_key(&self) -> Told {
        let host = "api.example.com:443";
        let sent = self.fetch(host, "/v1/things", &[], HTTP2).await?;
        self.told(sent, host)
    }

    /// The tunnel was opened for a host with a rule, so it leads to no other.
    async fn wrong_host(&self) -> Told {
        self.world.api().clear();
        let mut request = client::get(MODELS);
        let host = http::HeaderValue::from_static("other.example.com");
        request.headers_mut().insert(http::header::HOST, host);
        let answer = within(self.client.send(Visit::to(CHATGPT, HTTP1), request)).await?;
        let code = answer.headers().get(VALETKEY_ERROR).and_then(|code| code.to_str().ok());
        let told = vec![
            "the tool sent     CONNECT chatgpt.com:443, then Host: other.example.com".to_owned(),
            format!("the tool got      {} ({})", answer.status(), code.unwrap_or("no code")),
            format!("the API saw       {} requests", self.world.api().seen().len()),
        ];
        let held = answer.status() == 421 && self.world.api().seen().is_empty();
        if held { Ok(told) } else { Err(told.join(", ")) }
    }

    async fn tunnel(&self) -> Told {
        let host = "other.example.com:443";
        let sent = self.fetch(host, "/v1/things", &[], HTTP2).await?;
        let seen = self.last_seen()?;
        let has_credential = seen.headers.contains_key("authorization");
        let told = vec![
            format!("the tool sent     {}", sent.head),
            format!("the tool got      {} from the API itself, over its own TLS", sent.status),
            format!(
                "the API saw       {}",
                if has_credential { "A CREDENTIAL" } else { "no credential" }
            ),
        ];
        if sent.status == 401 && !has_credential { Ok(told) } else { Err(told.join(", ")) }
    }

    /// What the tool sent and what the API saw, when the one had no credential and the other took it.
    fn told(&self, sent: Sent, host: &str) -> Told {
        let seen = self.last_seen()?;
        let field = |name: &str| seen.headers.get(name).and_then(|value| value.to_str().ok());
        let shown = field("authorization").map(|value| Secret::new(value).masked());
        let account = field("chatgpt-account-id").map(|id| format!(", chatgpt-account-id: {id}"));
        let told = vec![
            format!("the tool sent     {}", sent.head),
            format!(
                "the API saw       {:?} {} {}, authorization: {}{}",
                seen.version,
                seen.method,
                seen.path,
                shown.as_deref().unwrap_or("none"),
                account.unwrap_or_default()
            ),
            format!("the tool got      {}", sent.status),
        ];
        if sent.has_credential {
            return Err(format!("the tool itself held a credential: {}", sent.head));
        }
        let is_host = Some(seen.host.as_str()) == host.strip_suffix(":443");
        if sent.status < 300 && is_host && shown.is_some() {
            Ok(told)
        } else {
            Err(told.join(", "))
        }
    }

    fn last_seen(&self) -> Result<Seen, String> {
        self.world.api().seen().pop().ok_or_else(|| "the API saw nothing".to_owned())
    }

    /// Fetches with curl, where there is one, else with our own client.
    async fn fetch(
        &self,
        target: &str,
        path: &str,
        curl: &[&str],
        alpn: &[&[u8]],
    ) -> Result<Sent, String> {
        self.world.api().clear();
        if self.has_curl {
            let host = target.strip_suffix(":443").unwrap_or(target);
            return within(self.curl(&format!("https://{host}{path}"), curl)).await;
        }
        let answer = within(self.client.get(Visit::to(target, alpn), path)).await?;
        let mut sent = Sent::by_us(&format!("GET {path}"));
        sent.status = answer.status().as_u16();
        sent.body = String::from_utf8_lossy(answer.body()).into_owned();
        Ok(sent)
    }

    async fn curl(&self, url: &str, arguments: &[&str]) -> io::Result<Sent> {
        let output = Command::new("curl")
            // No file of the user's has a say: it might hold a credential.
            .args(["--disable", "--silent", "--show-error", "--verbose", "--max-time", "15"])
            .args(arguments)
            .arg(url)
            .envs(self.client_env.iter())
            .kill_on_drop(true)
            .output()
            .await?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let why = said.lines().filter(|line| line.starts_with("curl: ")).collect::<Vec<_>>();
            return Err(io::Error::other(format!("curl failed: {}", why.join(" "))));
        }
        Ok(Sent::of_curl(&said, String::from_utf8_lossy(&output.stdout).into_owned()))
    }
}

/// What a tool sent through the proxy, and what it got.
struct Sent {
    head: String,
    has_credential: bool,
    status: u16,
    body: String,
}

impl Sent {
    fn by_us(head: &str) -> Self {
        Self { head: head.to_owned(), has_credential: false, status: 200, body: String::new() }
    }

    /// Reads curl's own account of it: lines with `>` were sent, with `<` received; the CONNECT and its
    /// answer come first.
    fn of_curl(said: &str, body: String) -> Self {
        let after_connect =
            said.rfind("\n> ").and_then(|_| said.find("CONNECT tunnel established"));
        let inside = after_connect.map_or(said, |at| &said[at..]);
        let sent: Vec<&str> = inside.lines().filter_map(|line| line.strip_prefix("> ")).collect();
        let names =
            sent.iter().skip(1).filter_map(|line| line.split_once(':')).map(|(name, _)| name);
        let names: Vec<&str> = names.collect();
        let is_credential =
            |name: &&str| ["authorization", "cookie", "x-api-key"].contains(&&*name.to_lowercase());
        let status = inside.lines().rev().find_map(|line| line.strip_prefix("< HTTP/"));
        let status = status.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        Self {
            head: format!("{} ({})", sent.first().unwrap_or(&"nothing"), names.join(", ")),
            has_credential: names.iter().any(is_credential),
            status: status.unwrap_or(0),
            body,
        }
    }
}

/// The key of the pretend API; it is worth nothing anywhere else.
const API_KEY: &str = "sk-vk-canary-demo-0123456789";

fn write_config(world: &World, home: &Path) -> io::Result<std::path::PathBuf> {
    let key = home.join("example.key");
    fs::write(&key, API_KEY)?;
    restrict(&key)?;
    let rule = format!(
        "[credentials.example]\nkind = \"api_key\"\nsource = \"file:{}\"\n\n\
         [[rules]]\nhost = \"api.example.com\"\npaths = [\"/v1/\"]\ncredential = \"example\"\n\n",
        key.display()
    );
    let file = home.join("config.toml");
    fs::write(&file, rule + &world.upstream_toml())?;
    Ok(file)
}

fn restrict(file: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))
}

fn shown_address(world: &World) -> String {
    world.resolve().first().map(|(_, address)| address.to_string()).unwrap_or_default()
}

async fn within<T>(act: impl Future<Output = io::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(ACT_LIMIT, act).await {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_late) => Err(format!("it took more than {} s", ACT_LIMIT.as_secs())),
    }
}
