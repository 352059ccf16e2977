//! Behind the proxies that companies really run: Squid that inspects or tunnels, tinyproxy, an `https://` proxy, SOCKS5.

mod place;
mod proxies;

use std::fs;
use std::process::Stdio;

use http::Version;
use tokio::process::Command;
use valetkey::sandbox::Settings;

use self::place::Place;
use self::proxies::{CA_NAME, GUEST, Kind, Proxy, STAFF};
use super::support::{Done, Scene, SigningIn, done, node_modules, program, python};

const MODELS: &str = "https://chatgpt.com/backend-api/codex/models";
const TUNNELLED: &str = "https://other.example.com/v1/things";
const EVENTS: &str = "https://chatgpt.com/backend-api/codex/sse?n=4&every_ms=20";

/// A desk in a company, from which the proxy is the only way out.
struct Desk {
    scene: Scene,
    place: Place,
    proxy: Proxy,
    kind: Kind,
    /// Connections of the person's own browser, which knows the way by itself.
    by_browser: usize,
    /// All that our program has said, to look for secrets in.
    said: String,
}

impl Desk {
    /// A desk at which nobody is signed in. `None` after saying what is missing.
    async fn new(kind: Kind) -> Option<Self> {
        let scene = Scene::in_world(Settings::default(), time::Duration::hours(1)).await;
        fs::remove_file(scene.path(".codex/auth.json")).unwrap();
        scene.world.api().require_login(false);
        let world = scene.world.resolve()[0].1;
        let place = Place::take(world).await?;
        let proxy = Proxy::start(kind, &scene.world, &place).await?;
        let mut bundle = fs::read_to_string(proxy.ca_file()).unwrap_or_default();
        if !kind.inspects() {
            bundle.push_str(scene.world.ca_pem());
        }
        fs::write(scene.path("company.pem"), bundle).unwrap();
        let scene = scene.with("VALETKEY_LOG", "trace");
        let mut desk = Self { scene, place, proxy, kind, by_browser: 0, said: String::new() };
        desk.trust_by("CODEX_CA_CERTIFICATE");
        desk.go_as(STAFF, kind.password().0);
        Some(desk)
    }

    /// Names the company's bundle by this variable alone, or by the setting.
    fn trust_by(&mut self, variable: &str) {
        let bundle = self.scene.path("company.pem");
        for known in ["CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"] {
            self.scene.env.remove(known);
        }
        self.scene.configure("");
        if variable == "upstream.ca_bundle" {
            let setting = format!("[upstream]\nca_bundle = \"{}\"\n", bundle.display());
            return self.scene.configure(&setting);
        }
        self.scene.env.insert(variable.to_owned(), bundle.to_str().unwrap().to_owned());
    }

    /// Names the proxy with this user and password.
    fn go_as(&mut self, user: &str, password: &str) {
        let url = self.proxy.url(user, password);
        let variable = match self.kind {
            Kind::Tinyproxy => "https_proxy",
            Kind::Socks => "ALL_PROXY",
            _ => "HTTPS_PROXY",
        };
        self.scene.env.insert(variable.to_owned(), url);
    }

    /// Runs a command of ours to its end.
    async fn valetkey(&mut self, arguments: &[&str]) -> Done {
        let done = done(self.scene.valetkey(arguments).spawn().unwrap()).await;
        self.heard(&done);
        done
    }

    /// `valetkey run -- COMMAND`, which must succeed.
    async fn run_ok(&mut self, command: &[&str]) -> Done {
        let done = self.valetkey(&[&["run", "--"], command].concat()).await;
        assert_eq!(done.status, 0, "{:?} {command:?}: {done:#?}", self.kind);
        done
    }

    fn heard(&mut self, done: &Done) {
        self.said.push_str(&done.out);
        self.said.push_str(&done.err);
    }

    /// A person signs in with a browser, which is curl.
    async fn sign_in(&mut self, curl: &str) {
        let before = self.scene.world.connections();
        let signing_in = SigningIn::begin(&self.scene, &[]).await;
        assert_eq!(self.scene.world.connections(), before, "nobody is asked before the browser");
        let to = format!("auth.openai.com:443:{}", self.scene.world.resolve()[0].1);
        let mut browser = Command::new(curl);
        browser.args(["-sSL", "--fail", "--connect-to", &to, "--cacert"]);
        browser.arg(self.scene.world.ca_file()).arg(&signing_in.url).env_clear();
        let page = browser.output().await.unwrap();
        assert!(page.status.success(), "{page:?}");
        self.by_browser += 1;
        let done = signing_in.end().await;
        self.heard(&done);
        assert_eq!(done.status, 0, "{:?}: {done:?}", self.kind);
        assert!(self.scene.path(".codex/auth.json").exists());
    }

    /// Puts a login into the cache whose access token is over.
    fn let_the_token_expire(&self) {
        let (home, lifetime) = (self.scene.path(".codex"), time::Duration::minutes(-1));
        self.scene.world.issuer().write_auth_json(&home, lifetime).unwrap();
    }

    /// Fails unless all went through the proxy by its own account, and its password stayed with it.
    async fn assert_all_went_through(&self, hosts: &[&str]) {
        let lines: Vec<_> = hosts.iter().map(|host| self.proxy.line_of(host)).collect();
        self.proxy.logged(&lines).await;
        let direct = self.scene.world.connections() - self.by_browser;
        assert_eq!(direct, self.place.passed(), "somebody went past the company's proxy");

        let seen = [self.scene.world.api().seen(), self.scene.world.issuer().seen()].concat();
        for seen in &seen {
            assert!(!seen.headers.contains_key("proxy-authorization"), "{seen:?}");
        }
        for password in self.passwords() {
            assert!(!self.said.contains(&password), "we have said the proxy's password");
            assert!(!format!("{seen:?}").contains(&password), "an upstream got the password");
        }
        self.scene.assert_no_secret("what we have said", &self.said);
    }

    /// Fails unless a signed-in request, a tunnel and a login each end with this code and this sentence.
    async fn assert_no_way_out(&mut self, code: &str, sentence: &str) {
        let Some(curl) = program("curl") else { return };
        let kind = self.kind;
        let login = self.valetkey(&["login", "--device-auth"]).await;
        let error = login.err.lines().find(|line| line.starts_with("error: "));
        let told = error.is_some_and(|line| line.contains(sentence));
        assert!(login.status == 1 && told, "{kind:?}: {login:?}");

        let (home, hour) = (self.scene.path(".codex"), time::Duration::hours(1));
        self.scene.world.issuer().write_auth_json(&home, hour).unwrap();
        for url in [MODELS, TUNNELLED] {
            let done = self.valetkey(&["run", "--", &curl, "-sSi", url]).await;
            assert!(done.out.contains(" 502 "), "{kind:?} {url}: {done:?}");
            let code = format!("x-valetkey-error: {code}\r\n");
            assert!(done.out.contains(&code), "{kind:?} {url}: {done:?}");
            let told = url == TUNNELLED || done.out.contains(sentence);
            assert!(told, "{kind:?} {url}: {done:?}");
        }
    }

    /// The proxy's password in every form that it takes on the way.
    fn passwords(&self) -> Vec<String> {
        use base64::Engine as _;
        let (in_url, plain) = self.kind.password();
        let pair = format!("{STAFF}:{plain}");
        let basic = base64::engine::general_purpose::STANDARD.encode(pair);
        vec![in_url.to_owned(), plain.to_owned(), basic]
    }

    /// Fails unless each request was signed in as its host asks.
    fn assert_signed_in(&self) {
        for seen in self.scene.world.api().seen() {
            let sent: Vec<_> = seen.headers.get_all("authorization").iter().collect();
            if seen.host == "other.example.com" {
                assert!(sent.is_empty(), "{seen:?}");
                continue;
            }
            assert_eq!((seen.host.as_str(), sent.len()), ("chatgpt.com", 1), "{seen:?}");
            let token = sent[0].to_str().unwrap().trim_start_matches("Bearer ");
            assert!(self.scene.world.secrets().iter().any(|secret| secret == token), "{seen:?}");
            assert_eq!(seen.headers["chatgpt-account-id"], self.scene.login.account_id.as_str());
        }
    }
}

const PYTHON: &str = r#"
import asyncio, requests, websockets
base = "https://chatgpt.com/backend-api/codex"
assert requests.get(base + "/models").json()["authorization"] == "present and current"
assert requests.post(base + "/upload", data=b"x" * 100000).json()["bytes"] == 100000
with requests.get(base + "/sse?n=3&every_ms=10", stream=True) as events:
    assert sum(line == b"event: tick" for line in events.iter_lines()) == 3
async def echo():
    async with websockets.connect("wss://chatgpt.com/backend-api/codex/ws?python") as socket:
        for text in ["hello", "y" * 200000]:
            await socket.send(text)
            assert await socket.recv() == text
asyncio.run(echo())
print("done")
"#;

const NODE: &str = r#"
const { EnvHttpProxyAgent, fetch, setGlobalDispatcher, WebSocket } = require("MODULES/undici");
setGlobalDispatcher(new EnvHttpProxyAgent());
(async () => {
  const base = "https://chatgpt.com/backend-api/codex";
  const answer = await (await fetch(base + "/models")).json();
  if (answer.authorization !== "present and current") throw new Error(answer.authorization);
  const events = await (await fetch(base + "/sse?n=3&every_ms=10")).text();
  if (events.split("event: tick").length !== 4) throw new Error("events");
  const socket = new WebSocket("wss://chatgpt.com/backend-api/codex/ws?node");
  await new Promise((resolve, reject) => {
    socket.onopen = () => socket.send("hello");
    socket.onerror = (event) => reject(event.error);
    socket.onmessage = (event) => event.data === "hello" ? resolve() : reject(event.data);
  });
  socket.close();
  console.log("done");
  process.exit(0);
})().catch((error) => { console.error(error); process.exit(1); });
"#;

/// Signs in, refreshes, works with every program, and signs out: all behind one proxy.
async fn a_day_behind(kind: Kind) {
    let Some(curl) = program("curl") else { return };
    let Some(mut desk) = Desk::new(kind).await else { return };
    desk.sign_in(&curl).await;
    desk.run_ok(&[&curl, "-sS", "--fail", MODELS]).await;
    assert_eq!(desk.scene.world.issuer().refreshes(), 0);
    refresh(&mut desk, &curl).await;
    every_program(&mut desk, &curl).await;
    desk.assert_signed_in();

    let done = desk.valetkey(&["logout"]).await;
    assert_eq!(done.status, 0, "{done:?}");
    assert_eq!(desk.scene.world.issuer().revokes(), 1);
    let hosts = ["auth.openai.com", "chatgpt.com", "other.example.com"];
    desk.assert_all_went_through(&hosts).await;
    if kind.inspects() {
        // It has read what passed.
        let mut read = vec!["auth.openai.com/oauth/token", "auth.openai.com/oauth/revoke"];
        read.extend(python().map(|_| "/codex/ws?"));
        let read: Vec<String> = read.into_iter().map(str::to_owned).collect();
        desk.proxy.logged(&read).await;
    }
}

async fn refresh(desk: &mut Desk, curl: &str) {
    desk.let_the_token_expire();
    for version in ["--http1.1", "--http2"] {
        let done = desk.run_ok(&[curl, "-sS", "--fail", version, MODELS]).await;
        assert!(done.out.contains("present and current"), "{:?}: {done:?}", desk.kind);
    }
    let issuer = desk.scene.world.issuer();
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
    // Squid speaks no HTTP/2, and tells both sides so.
    let upstream = if desk.kind.inspects() { Version::HTTP_11 } else { Version::HTTP_2 };
    assert!(desk.scene.world.api().seen().iter().all(|seen| seen.version == upstream));
}

async fn every_program(desk: &mut Desk, curl: &str) {
    let done = desk.run_ok(&[curl, "-sSN", "--fail", EVENTS]).await;
    assert_eq!(done.out.matches("event: tick").count(), 4, "{done:?}");
    let done = desk.run_ok(&[curl, "-sSv", "--fail", TUNNELLED]).await;
    let issuer = if desk.kind.inspects() { CA_NAME } else { "Sandbox Root" };
    let shown = done.err.lines().find(|line| line.starts_with("*  issuer: "));
    assert!(shown.is_some_and(|line| line.contains(issuer)), "{:?}: {done:?}", desk.kind);
    if let Some(python) = python() {
        desk.run_ok(&[&python, "-c", PYTHON]).await;
    }
    if let (Some(node), Some(modules)) = (program("node"), node_modules()) {
        desk.run_ok(&[&node, "-e", &NODE.replace("MODULES", &modules)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_behind_a_squid_that_inspects() {
    a_day_behind(Kind::Inspecting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_behind_a_squid_that_tunnels() {
    a_day_behind(Kind::Tunnelling).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_behind_a_squid_over_tls() {
    a_day_behind(Kind::OverTls).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_behind_tinyproxy() {
    a_day_behind(Kind::Tinyproxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_behind_a_socks_server() {
    a_day_behind(Kind::Socks).await;
}

/// `socks5://` resolves names here, `socks5h://` there; only here the names are known by a file.
#[tokio::test(flavor = "multi_thread")]
async fn a_socks_server_is_told_addresses_where_it_is_not_to_resolve() {
    let Some(curl) = program("curl") else { return };
    let Some(mut desk) = Desk::new(Kind::Socks).await else { return };
    desk.let_the_token_expire();
    let url = desk.proxy.url(STAFF, Kind::Socks.password().0).replace("socks5h:", "socks5:");
    desk.scene.env.insert("ALL_PROXY".to_owned(), url);
    let mut valetkey = desk.proxy.valetkey_that_resolves().await.unwrap();
    valetkey.args(["run", "--", &curl, "-sS", "--fail", MODELS]).env_clear().envs(&desk.scene.env);
    valetkey.env("PATH", std::env!("PATH")).current_dir(desk.scene.home.path()).kill_on_drop(true);
    valetkey.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let done = done(valetkey.spawn().unwrap()).await;
    assert!(done.status == 0 && done.out.contains("present and current"), "{done:?}");
    desk.proxy.logged(&[format!("connected to {}:443", desk.place.address)]).await;
    let log = desk.proxy.log();
    assert!(!log.contains("chatgpt.com") && !log.contains("auth.openai.com"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_told_as_the_proxys_wish() {
    // tinyproxy says 401 to a wrong password and 407 to none; SOCKS5 has no statuses.
    for kind in [Kind::Inspecting, Kind::Tunnelling, Kind::OverTls, Kind::Tinyproxy, Kind::Socks] {
        let Some(mut desk) = Desk::new(kind).await else { return };
        desk.go_as(STAFF, "canary-of-a-wrong-one");
        desk.assert_no_way_out("chain_auth", "the upstream proxy did not take the login").await;
        assert!(!desk.said.contains("canary-of-a-wrong-one"), "{kind:?}");
        assert_eq!(desk.place.passed(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_squid_forbids_is_told_as_its_refusal() {
    for kind in [Kind::Tunnelling, Kind::OverTls] {
        let Some(mut desk) = Desk::new(kind).await else { return };
        desk.go_as(GUEST, kind.password().0);
        let sentence = "the upstream proxy answered 403 Forbidden instead of opening a tunnel";
        desk.assert_no_way_out("chain_refused", sentence).await;
        let account = format!(" CONNECT chatgpt.com:443 {GUEST} ");
        desk.proxy.logged(&[account, "TCP_DENIED/403".to_owned()]).await;
        assert_eq!(desk.place.passed(), 0);
    }
}

/// A Squid that inspects opens every tunnel, and puts its own page in it: only the status tells.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_squid_that_inspects_forbids_costs_no_login() {
    let Some(curl) = program("curl") else { return };
    let Some(mut desk) = Desk::new(Kind::Inspecting).await else { return };
    desk.let_the_token_expire();
    let before = fs::read_to_string(desk.scene.path(".codex/auth.json")).unwrap();
    desk.go_as(GUEST, desk.kind.password().0);
    let login = desk.valetkey(&["login", "--device-auth"]).await;
    assert!(login.status == 1 && login.err.contains("403 Forbidden"), "{login:?}");
    let get = desk.valetkey(&["run", "--", &curl, "-sSi", MODELS]).await;
    assert!(get.out.contains("x-valetkey-error: issuer_unavailable"), "{}", get.out);
    let kept = fs::read_to_string(desk.scene.path(".codex/auth.json")).unwrap();
    assert_eq!(kept, before);
    desk.go_as(STAFF, desk.kind.password().0);
    // Until the pause after a refresh that failed is over, curl comes again as it is told.
    let patient = ["-sS", "--fail", "--retry", "10", "--retry-max-time", "40", MODELS];
    let get = desk.run_ok(&[&[&*curl][..], &patient].concat()).await;
    assert!(get.out.contains("present and current"), "{get:?}");
    let issuer = desk.scene.world.issuer();
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn squids_ca_is_trusted_by_every_name_for_it_and_by_none_unnamed() {
    let Some(curl) = program("curl") else { return };
    let Some(mut desk) = Desk::new(Kind::Inspecting).await else { return };
    desk.let_the_token_expire();
    for variable in ["upstream.ca_bundle", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"] {
        desk.trust_by(variable);
        for url in [MODELS, TUNNELLED] {
            desk.run_ok(&[&curl, "-sS", "--fail", url]).await;
        }
    }
    let seen = desk.scene.world.api().seen().len();
    let other = desk.scene.world.ca_file().to_owned();
    fs::copy(other, desk.scene.path("company.pem")).unwrap();
    let done = desk.valetkey(&["run", "--", &curl, "-sSi", MODELS]).await;
    assert!(done.out.contains("x-valetkey-error: upstream_tls_untrusted"), "{done:?}");
    let done = desk.valetkey(&["login", "--device-auth"]).await;
    assert!(done.status == 1 && done.err.contains("append its certificate"), "{done:?}");
    assert_eq!(desk.scene.world.api().seen().len(), seen, "nothing was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_squid_without_websockets_the_client_is_told_to_do_without() {
    let Some(python) = python() else { return };
    let Some(mut desk) = Desk::new(Kind::InspectingHttpOnly).await else { return };
    desk.let_the_token_expire();
    let script = r#"
import asyncio, requests, websockets
base = "chatgpt.com/backend-api/codex"
async def ask():
    try:
        async with websockets.connect(f"wss://{base}/ws"):
            print("opened")
    except websockets.exceptions.InvalidStatus as refused:
        print(refused.response.status_code)
asyncio.run(ask())
requests.get(f"https://{base}/models").raise_for_status()
"#;
    let done = desk.run_ok(&[&python, "-c", script]).await;
    assert_eq!(done.out, "426\n", "{done:?}");
    desk.assert_all_went_through(&["chatgpt.com", "auth.openai.com"]).await;
}
