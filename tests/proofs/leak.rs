//! Secrets that are planted everywhere they may rightly be are found nowhere else: not in what any process says or writes,
//! nor in what others can see of it.
//!
//! As root the processes run as another user, so that root's own rights prove nothing.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures_util::{SinkExt as _, StreamExt as _};
use http::header::{AUTHORIZATION, COOKIE, HOST, HeaderName, ORIGIN};
use http::{HeaderValue, Method, Request};
use http_body_util::BodyExt as _;
use rustix::process::Signal;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;
use valetkey::sandbox::Fault;
use valetkey::sandbox::client::{Client, ClientBody, HTTP1, HTTP2, Visit, gather, get, post};

use super::forms::{forms, leak_in_bytes};
use super::sinks::Loud;
use super::support::{Done, LIMIT, Scene, SigningIn, done, fed, program};

/// Where the test itself, which may be root, is let in.
const LISTENER: &str = "[[listeners]]\naddress = \"127.0.0.1:0\"\nallow_uids = [0]\n";

const EXAMPLE: &str = "api.example.com:443";
const CHATGPT: &str = "chatgpt.com:443";

/// What a client itself sends, in places that are nobody's business.
const HEADER: &str = "vk-canary-in-a-header-of-the-clients";
const QUERY: &str = "vk-canary-in-a-query-of-the-clients";
const BODY: &str = "vk-canary-in-a-body-of-the-clients";
const MESSAGE: &str = "vk-canary-in-a-message-of-the-clients";
const PASSWORD: &str = "vk-canary-in-a-password-that-is-no-pass";
const CHAIN: &str = "vk-canary-in-the-login-of-the-chain";
const TYPED: &str = "sk-vk-canary-that-somebody-pipes-in";
/// Planted on purpose, where it must be found.
const PLANTED: &str = "vk-canary-planted-on-purpose/+";

/// Two users who are nobody.
const USER: u32 = 65_534;
const NEIGHBOUR: u32 = 65_533;

/// Everything that was seen, and where.
#[derive(Default)]
struct Looked(Vec<(String, Vec<u8>)>);

impl Looked {
    fn at(&mut self, place: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.push((place.into(), bytes.into()));
    }

    fn at_words(&mut self, command: &str, done: &Done) {
        self.at(format!("what `{command}` said"), done.err.clone());
        self.at(format!("what `{command}` printed"), done.out.clone());
    }

    /// Every file below a folder but these.
    fn below(&mut self, folder: &Path, except: &[PathBuf]) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if except.contains(&path) {
            } else if kind.is_dir() {
                self.below(&path, except);
            } else if kind.is_file() {
                self.at(path.display().to_string(), fs::read(&path).unwrap());
            }
        }
    }

    /// Where one of these is, in any form.
    fn holding(&self, secrets: &[String]) -> Vec<&str> {
        let holds = |(_, bytes): &&(String, Vec<u8>)| leak_in_bytes(secrets, bytes).is_some();
        self.0.iter().filter(holds).map(|(place, _)| place.as_str()).collect()
    }

    /// Nothing is found; and what is planted is found in each place, in one form after the other.
    fn assert_clean(mut self, secrets: &[String]) {
        let hits = self.holding(secrets);
        for (place, bytes) in &self.0 {
            if hits.contains(&place.as_str()) {
                let secret = leak_in_bytes(secrets, bytes).unwrap();
                println!("{place} holds {}…", &secret[..secret.len().min(24)]);
            }
        }
        assert_eq!(hits, [""; 0]);
        let (planted, places) = ([PLANTED.to_owned()], self.0.len());
        assert!(self.holding(&planted).is_empty());
        for (form, (_, bytes)) in forms(PLANTED).iter().cycle().zip(&mut self.0) {
            let middle = bytes.len() / 2;
            bytes.splice(middle..middle, form.bytes());
        }
        assert_eq!(self.holding(&planted).len(), places, "the scan is blind somewhere");
        println!(
            "{places} places, {} secrets, {} forms of each",
            secrets.len(),
            forms(PLANTED).len()
        );
    }
}

struct Stage {
    scene: Scene,
    /// Whether the processes run as another user.
    is_other_user: bool,
}

impl Stage {
    async fn new(lifetime: time::Duration, settings: &str) -> Self {
        let scene = Scene::new(lifetime).await;
        scene.configure(&[settings, LISTENER, &scene.world.upstream_toml()].concat());
        let stage = Self { scene, is_other_user: rustix::process::geteuid().is_root() };
        stage.give_away();
        stage
    }

    /// Gives the home to the user that the processes run as.
    fn give_away(&self) {
        if !self.is_other_user {
            println!("as the same user: only root can be others, too");
            return;
        }
        fn all(path: &Path) {
            chown(path, Some(USER), Some(USER)).unwrap();
            if path.is_dir() {
                fs::read_dir(path).unwrap().for_each(|entry| all(&entry.unwrap().path()));
            }
        }
        all(self.scene.home.path());
        let world = &self.scene.world;
        for file in [world.ca_file(), world.company().ca_file()] {
            for path in file.ancestors().take_while(|path| path.starts_with(world.dir())) {
                let mode = if path.is_dir() { 0o755 } else { 0o644 };
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
    }

    /// The program at its most talkative.
    fn valetkey(&self, arguments: &[&str]) -> Command {
        let mut command = self.scene.valetkey(arguments);
        command.env("VALETKEY_LOG", "trace").env("RUST_BACKTRACE", "full");
        if self.is_other_user {
            command.uid(USER).gid(USER);
        }
        command
    }

    async fn typed(&self, arguments: &[&str]) -> Done {
        done(self.valetkey(arguments).spawn().unwrap()).await
    }

    /// `serve`, whose words go into this file of the home.
    async fn serve(&self, said: &str, settings: &[(&str, &str)]) -> Loud {
        let said = File::create(self.scene.path(said)).unwrap();
        let mut command = self.valetkey(&["serve", "--listen", "127.0.0.1:0"]);
        command.stderr(said).envs(settings.iter().copied());
        Loud::of(&self.scene, command).await
    }

    fn secrets(&self, more: &[String]) -> Vec<String> {
        let ours = [HEADER, QUERY, BODY, MESSAGE, PASSWORD, CHAIN, TYPED].map(str::to_owned);
        [self.scene.secrets(), ours.to_vec(), more.to_vec()].concat()
    }

    /// Every file of the home but the logins themselves.
    fn look(&self) -> Looked {
        let mut looked = Looked::default();
        let logins = [".codex/auth.json", ".local/share/valetkey/credentials"];
        looked.below(self.scene.home.path(), &logins.map(|path| self.scene.path(path)));
        looked
    }
}

fn dressed(mut request: Request<ClientBody>) -> Request<ClientBody> {
    let bearer = HeaderValue::from_str(&format!("Bearer {HEADER}")).unwrap();
    let plain = HeaderValue::from_static(HEADER);
    let fields = [
        (AUTHORIZATION, &bearer),
        (COOKIE, &plain),
        (HeaderName::from_static("x-api-key"), &plain),
        (HeaderName::from_static("x-anything"), &plain),
    ];
    for (name, value) in fields {
        request.headers_mut().insert(name, value.clone());
    }
    request
}

/// Requests of every kind, whatever is answered.
async fn ask_everything(stage: &Stage, client: &Client) {
    let query = format!("?key={QUERY}");
    let paths = [
        "/v1/models",
        "/v1/echo",
        "/v1/always-401",
        "/v1/401-until-refreshed",
        "/v1/status/500",
        "/v1/close-before-head",
        "/v1/reset-mid-body",
        "/v1/gzip",
        "/v1/redirect",
        "/v1/trailers",
        "/v1/closed/x",
        "/v1/nothing",
    ];
    for (host, prefix) in
        [(EXAMPLE, "/v1/"), (CHATGPT, "/backend-api/codex/"), ("api.openai.com:443", "/v1/")]
    {
        for alpn in [HTTP1, HTTP2] {
            for path in paths {
                let path = path.replacen("/v1/", prefix, 1) + &query;
                for request in [get(&path), post(&path, BODY)] {
                    if let Ok(answer) = client.send(Visit::to(host, alpn), dressed(request)).await {
                        let _broken_off = gather(answer).await;
                    }
                }
            }
        }
    }
    // What is refused.
    let mut others = dressed(get("/v1/x"));
    others.headers_mut().insert(HOST, HeaderValue::from_static("other.example.com"));
    let mut trace = dressed(get("/v1/x"));
    *trace.method_mut() = Method::TRACE;
    let mut page = dressed(get("/v1/x"));
    page.headers_mut().insert(ORIGIN, HeaderValue::from_static("https://page.example"));
    for request in [others, trace, page] {
        let answer = client.send(Visit::to(EXAMPLE, HTTP1), request).await.unwrap();
        gather(answer).await.unwrap();
    }
    // A stream that is left, and a WebSocket.
    stage.scene.world.api().release_event();
    let mut stream = client
        .send(Visit::to(EXAMPLE, HTTP1), dressed(get(&format!("/v1/sse{query}&n=3"))))
        .await
        .unwrap();
    stream.frame().await.unwrap().unwrap();
    drop(stream);
    for path in ["/v1/ws", "/v1/ws-refused/403", "/v1/ws-wrong-accept"] {
        let tls = client.greet(Visit::to(EXAMPLE, HTTP1)).await.unwrap();
        let url = format!("wss://api.example.com{path}{query}");
        if let Ok((mut socket, _)) = Box::pin(tokio_tungstenite::client_async(url, tls)).await {
            socket.send(Message::text(MESSAGE)).await.unwrap();
            socket.next().await.unwrap().unwrap();
            let _gone = socket.close(None).await;
        }
    }
}

/// What is said to the port itself, in plain text.
async fn say(loud: &Loud, text: String) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    #[expect(clippy::disallowed_methods, reason = "this is a client")]
    let mut stream = socket.connect(loud.address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(LIMIT, stream.read(&mut answer)).await;
    assert!(read.unwrap().is_ok_and(|len| len > 0), "{text:?} has no answer");
}

async fn knock(loud: &Loud) {
    let basic = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, format!("u:{PASSWORD}"));
    for text in [
        format!(
            "GET http://api.example.com/v1/x?key={QUERY} HTTP/1.1\r\nHost: api.example.com\r\nX: {HEADER}\r\n\r\n"
        ),
        format!("GET /{QUERY} HTTP/1.1\r\nHost: x\r\nX: {HEADER}\r\n\r\n"),
        format!("CONNECT {QUERY}:443 HTTP/1.1\r\nX: {HEADER}\r\n\r\n"),
        format!("CONNECT bad target HTTP/1.1\r\nX: {HEADER}\r\n\r\n"),
        format!(
            "CONNECT api.example.com:443 HTTP/1.1\r\nProxy-Authorization: Basic {basic}\r\nContent-Length: 1\r\n\r\n"
        ),
        format!(
            "GET https://u:{PASSWORD}@api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
        ),
        format!(
            "GET http://u:{PASSWORD}@other.example.com/?{QUERY} HTTP/1.1\r\nHost: other.example.com\r\n\r\n"
        ),
        format!("{HEADER}\r\n\r\n"),
    ] {
        // The names of hosts are no secret of anybody's; a client that spells one there is answered.
        if !text.starts_with(&format!("CONNECT {QUERY}")) {
            say(loud, text).await;
        }
    }
}

/// The commands, each at its most talkative.
async fn type_everything(stage: &Stage, looked: &mut Looked) -> Vec<String> {
    let scene = &stage.scene;
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["login", "status"],
        &["check"],
        &["check", "--managed"],
        &["explain", "https://api.example.com/v1/models", "-X", "POST"],
        &["explain", "https://chatgpt.com/backend-api/codex/responses"],
        &["env"],
        &["env", "--shell", "json"],
        &["doctor", "--json"],
        &["doctor", "--sign-in"],
        &["health"],
        &["ca", "print"],
        &["init", "decoy", "openai"],
        &["pass", "list", "--json"],
        &["run", "--", "true"],
        &["run", "--", "env"],
        &["audit", "verify"],
    ] {
        looked.at_words(&arguments.join(" "), &stage.typed(arguments).await);
    }
    // These print a secret because that is what they are for: what they say beside it holds none.
    let pass = stage.typed(&["pass", "new", "box"]).await;
    assert_eq!(pass.status, 0, "{pass:#?}");
    looked.at("what `pass new` said", pass.err);
    for arguments in [&["token", "example"][..], &["token"]] {
        let token = stage.typed(arguments).await;
        looked.at("what `token` said", token.err);
    }
    let piped = fed(stage.valetkey(&["login", "--with-api-key"]), TYPED).await;
    looked.at_words("login --with-api-key", &piped);
    let personal = scene.personal_token();
    let piped = fed(stage.valetkey(&["login", "--with-access-token"]), &personal).await;
    looked.at_words("login --with-access-token", &piped);
    // What somebody types where it can be seen is not repeated.
    looked.at_words("login with a key", &stage.typed(&["login", TYPED]).await);
    scene.world.issuer().approve_device();
    let mut device = stage.valetkey(&["login", "--device-auth"]);
    looked.at_words("login --device-auth", &done(device.spawn().unwrap()).await);
    looked.at_words("logout", &stage.typed(&["logout"]).await);
    vec![pass.out.trim().to_owned()]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_where_it_should_not_be() {
    let closed = "[[rules]]\nname = \"closed\"\nhost = \"api.example.com\"\npaths = [\"/v1/closed/\"]\naction = \"refuse\"\n";
    let audit = "[audit]\nto = \"file\"\n";
    let stage = Stage::new(time::Duration::minutes(-1), &[closed, audit].concat()).await;
    let scene = &stage.scene;
    let mut looked = Looked::default();

    let mut loud = stage.serve("said-1", &[]).await;
    ask_everything(&stage, &loud.client).await;
    knock(&loud).await;
    // A client that shares the login refreshes it, and one that knows another one.
    let refresh = async |token: &str| {
        let body = json!({ "grant_type": "refresh_token", "refresh_token": token }).to_string();
        let mut request = dressed(post("/oauth/token", body));
        request.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
        let issuer = Visit::to("auth.openai.com:443", HTTP1);
        gather(loud.client.send(issuer, request).await.unwrap()).await.unwrap()
    };
    let shared = scene.secrets().into_iter().rfind(|secret| secret.starts_with("rt_"));
    assert_eq!(refresh(&shared.expect("a refresh token")).await.status(), 200);
    let _another_login = refresh(BODY).await;
    for fault in [Fault::Garbage, Fault::Status(500), Fault::RateLimited(1), Fault::DropBefore] {
        scene.world.issuer().script(fault);
        let _in_trouble = refresh(BODY).await;
    }
    loud.signal(Signal::HUP);
    let passes = type_everything(&stage, &mut looked).await;
    let secrets = stage.secrets(&passes);
    loud.ends().await;

    // The same with the audit in the log, behind a chain with a login, at the door with a pass, with a login that dies,
    // and with a panic in an exchange.
    let (company, ca) = (scene.world.company().url(""), scene.world.company().ca_file());
    fs::write(scene.path("chain.login"), format!("u:{CHAIN}")).unwrap();
    scene.configure(&format!(
        "[audit]\nto = \"stderr\"\n[[listeners]]\naddress = \"127.0.0.1:0\"\nrequire_pass = true\n\
         [upstream]\nproxy = \"{company}\"\nproxy_login = \"file:{}\"\nca_bundle = \"{}\"\n",
        scene.path("chain.login").display(),
        ca.display(),
    ));
    stage.give_away();
    let checked = stage.typed(&["check"]).await;
    assert_eq!(checked.status, 0, "{}", checked.err);
    looked.at_words("check", &checked);
    let mut command = stage.valetkey(&["serve"]);
    command.stderr(File::create(scene.path("said-2")).unwrap());
    let mut strict = Loud::of(scene, command).await;
    let _refused = strict.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await;
    let wrong = HeaderValue::from_str(&format!("Bearer {PASSWORD}")).unwrap();
    let _refused = strict.client.showing(wrong).get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await;
    let right = HeaderValue::from_str(&format!("Bearer {}", passes[0])).unwrap();
    let answered = strict.client.showing(right).get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await;
    assert_eq!(answered.unwrap().status(), 200);
    strict.ends().await;

    scene.configure(&[audit, LISTENER, &scene.world.upstream_toml()].concat());
    let expired = time::Duration::minutes(-1);
    scene.world.issuer().write_auth_json(&scene.path(".codex"), expired).unwrap();
    stage.give_away();
    scene.world.issuer().script(Fault::Refuse("refresh_token_expired"));
    let ask = async |loud: &Loud, host: &str| {
        let request = dressed(post(&format!("/backend-api/codex/x?{QUERY}"), BODY));
        let answer = loud.client.send(Visit::to(host, HTTP1), request).await;
        answer.ok().map(|answer| answer.status().as_u16())
    };
    let mut dying = stage.serve("said-4", &[]).await;
    assert_eq!(ask(&dying, CHATGPT).await, Some(403), "the issuer has ended the login");
    dying.ends().await;
    let mut broken = stage.serve("said-3", &[("VALETKEY_FAULT", "exchange=panic")]).await;
    assert_eq!(ask(&broken, EXAMPLE).await, None, "it has panicked");
    broken.ends().await;
    let said = fs::read_to_string(scene.path("said-3")).unwrap();
    assert!(said.contains("a mistake of valetkey's own"), "{said}");

    let Looked(files) = stage.look();
    for file in ["said-1", "said-2", "said-3", "said-4", "audit.jsonl"] {
        let is_it =
            |(place, bytes): &(String, Vec<u8>)| place.ends_with(file) && bytes.len() > 1000;
        assert!(files.iter().any(is_it), "{file} was not looked at");
    }
    let own = scene.path("chain.login").display().to_string();
    looked.0.extend(files.into_iter().filter(|(place, _)| *place != own));
    looked.assert_clean(&[secrets, stage.secrets(&[])].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scan_finds_what_is_said_and_written_down_itself() {
    // The name of a rule is in the log and in the audit: here one is a secret.
    let audit = "[audit]\nto = \"file\"\n";
    let named = format!(
        "[[rules]]\nname = \"{PLANTED}\"\nhost = \"api.openai.com\"\ncredential = \"example\"\n"
    );
    let stage = Stage::new(time::Duration::hours(1), &[&named, audit].concat()).await;
    let planted = [PLANTED.to_owned()];
    let mut loud = stage.serve("said", &[]).await;
    loud.client.get(Visit::to("api.openai.com:443", HTTP1), "/v1/x").await.unwrap();
    loud.ends().await;
    let mut looked = stage.look();
    let words = stage
        .typed(&["run", "--", "sh", "-c", &format!("echo '{PLANTED}'; echo '{PLANTED}' >&2")])
        .await;
    looked.at_words("run", &words);
    let holding = looked.holding(&planted);
    for place in ["said", "audit.jsonl", "what `run` said", "what `run` printed", "config.toml"] {
        assert!(holding.iter().any(|it| it.ends_with(place)), "{place} among {holding:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_and_no_word_tells_the_tokens() {
    let scene = Scene::usual().await.with("VALETKEY_LOG", "trace").with("RUST_BACKTRACE", "full");
    let signing_in = SigningIn::begin(&scene, &[]).await;
    let Some(curl) = program("curl") else { return };
    let mut browser = Command::new(curl);
    let resolve =
        scene.world.resolve().into_iter().flat_map(|(target, address)| {
            ["--connect-to".to_owned(), format!("{target}:{address}")]
        });
    browser.args(["--silent", "--show-error", "--location", "--cacert"]).arg(scene.world.ca_file());
    browser.args(resolve).arg(&signing_in.url).stdout(Stdio::piped()).stderr(Stdio::piped());
    let page = done(browser.spawn().unwrap()).await;
    assert_eq!(page.status, 0, "{page:#?}");
    let words = signing_in.end().await;
    assert_eq!(words.status, 0, "{words:#?}");
    let mut looked = Looked::default();
    looked.at_words("login", &words);
    looked.at("the page", page.out);
    looked.assert_clean(&scene.secrets());
}

/// What another process may see of one.
mod seen_by_others {
    use super::*;

    /// A program as this user.
    async fn by(uid: Option<u32>, folder: &Path, program: &str, arguments: &[&str]) -> Done {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(folder).stdin(Stdio::null()).kill_on_drop(true);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        done(command.spawn().unwrap()).await
    }

    /// A folder that anybody may write to.
    fn open_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        folder
    }

    /// What a process of this user can have of that one: its memory, its variables, its core.
    async fn taken(uid: Option<u32>, pid: u32, gcore: &str) -> Looked {
        let (mut looked, folder) = (Looked::default(), open_folder());
        for file in ["environ", "maps", "stack", "auxv"] {
            let path = format!("/proc/{pid}/{file}");
            let read = by(uid, folder.path(), "head", &["-c", "65536", &path]).await;
            looked.at(path, read.out);
        }
        // Where there is anything, root tells who asks.
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let memory = format!("if=/proc/{pid}/mem");
        for (from, to) in maps.lines().filter_map(heap) {
            let (skip, count) = (format!("skip={from}"), format!("count={}", to - from));
            let flags = ["bs=64K", "status=none", "iflag=skip_bytes,count_bytes", "of=heap"];
            let arguments = [&[&memory[..], &skip, &count], &flags[..]].concat();
            by(uid, folder.path(), "dd", &arguments).await;
            looked.at(
                format!("{memory} at {from:x}"),
                fs::read(folder.path().join("heap")).unwrap_or_default(),
            );
        }
        let dumped = by(uid, folder.path(), gcore, &["-o", "core", &pid.to_string()]).await;
        looked.at("what gcore said", [dumped.out, dumped.err].concat());
        looked.below(folder.path(), &[]);
        looked
    }

    /// Where a line of `/proc/PID/maps` tells of memory in which values are made.
    fn heap(line: &str) -> Option<(u64, u64)> {
        let mut fields = line.split_ascii_whitespace();
        let (range, rights) = (fields.next()?, fields.next()?);
        let (from, to) = range.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        let is_its_own = matches!(fields.nth(3), None | Some("[heap]"));
        (rights.starts_with("rw") && is_its_own && to - from < MOST_TO_READ).then_some((from, to))
    }

    /// More is the room of an allocator, and not in use.
    const MOST_TO_READ: u64 = 64 << 20;

    #[tokio::test(flavor = "multi_thread")]
    async fn neither_its_own_user_nor_another_takes_a_secret_out_of_it() {
        let Some(gcore) = program("gcore") else { return };
        let stage = Stage::new(time::Duration::hours(1), "").await;
        let mut loud = stage.serve("said", &[]).await;
        loud.client.get(Visit::to(CHATGPT, HTTP1), "/backend-api/codex/x").await.unwrap();
        loud.client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await.unwrap();
        let (pid, secrets) = (loud.child.id().unwrap(), stage.secrets(&[]));
        let users = match stage.is_other_user {
            true => vec![Some(USER), Some(NEIGHBOUR)],
            false => vec![None],
        };
        for user in users {
            let looked = taken(user, pid, &gcore).await;
            assert_eq!(looked.holding(&secrets), [""; 0], "as {user:?}");
            let has_core = looked.0.iter().any(|(place, _)| place.contains("/core"));
            assert!(!has_core, "{user:?} has got a core");
        }
        // Root is out of scope, and shows that there is something to find.
        if stage.is_other_user {
            let looked = taken(None, pid, &gcore).await;
            let found = looked.holding(&secrets);
            let core = found.iter().any(|place| place.contains("/core"));
            assert!(core || !can_trace().await, "the scan finds nothing in a core: {found:?}");
            assert!(found.iter().any(|place| place.ends_with("/environ")), "{found:?}");
            let heap = found.iter().any(|place| place.contains("/mem at "));
            assert!(heap || !can_trace().await, "the scan finds nothing in memory: {found:?}");
        }
        loud.ends().await;
    }

    /// Whether this machine lets root trace at all: in some containers nobody may.
    async fn can_trace() -> bool {
        let (folder, Some(gcore)) = (open_folder(), program("gcore")) else { return false };
        let mut sleeping = Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
        let pid = sleeping.id().unwrap().to_string();
        let dumped = by(None, folder.path(), &gcore, &["-o", "core", &pid]).await;
        sleeping.kill().await.unwrap();
        if dumped.status != 0 {
            println!("skipped: nobody may trace here, so that no core can be made");
        }
        dumped.status == 0
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_abort_leaves_no_core_file() {
        let stage = Stage::new(time::Duration::hours(1), "").await;
        let mut loud = stage.serve("said", &[]).await;
        loud.client.get(Visit::to(CHATGPT, HTTP1), "/backend-api/codex/x").await.unwrap();
        loud.signal(Signal::ABORT);
        let status = tokio::time::timeout(LIMIT, loud.child.wait()).await.unwrap().unwrap();
        assert_eq!((status.signal(), status.core_dumped()), (Some(6), false));
        stage.look().assert_clean(&stage.secrets(&[]));
        // A program that does nothing about it leaves one, where the machine writes any.
        let folder = open_folder();
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -c unlimited && kill -ABRT $$"]).current_dir(folder.path());
        let status = shell.status().await.unwrap();
        if !status.core_dumped() {
            println!("this machine writes no core of anybody: {status}");
        }
    }

    /// A child that runs behind a proxy of its own, until its input ends.
    async fn behind(stage: &Stage, planted: bool) -> (Child, u32) {
        let mut command = stage.valetkey(&["run", "--", "sh", "-c", "echo $$; exec cat"]);
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        if planted {
            command.env("ANYTHING", PLANTED);
        }
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let pid = tokio::time::timeout(LIMIT, out.next_line()).await.unwrap().unwrap().unwrap();
        // What says this again is the program that it has become, which is given all by then.
        child.stdin.as_mut().unwrap().write_all(b"there\n").await.unwrap();
        let said = tokio::time::timeout(LIMIT, out.next_line()).await.unwrap().unwrap().unwrap();
        assert_eq!(said, "there");
        // It goes on writing there.
        child.stdout = Some(out.into_inner().into_inner());
        (child, pid.parse().unwrap())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_child_is_given_holds_no_secret() {
        let stage = Stage::new(time::Duration::hours(1), "").await;
        let secrets = [stage.secrets(&[]), vec![PLANTED.to_owned()]].concat();
        for planted in [false, true] {
            let (mut child, pid) = behind(&stage, planted).await;
            let mut looked = Looked::default();
            for file in ["environ", "cmdline"] {
                let path = format!("/proc/{pid}/{file}");
                looked.at(path.clone(), fs::read(&path).unwrap());
            }
            looked.at(
                "the proxy's arguments",
                fs::read(format!("/proc/{}/cmdline", child.id().unwrap())).unwrap(),
            );
            assert!(looked.0.iter().all(|(_, bytes)| !bytes.is_empty()));
            let expected = if planted { vec![format!("/proc/{pid}/environ")] } else { Vec::new() };
            assert_eq!(looked.holding(&secrets), expected);
            drop(child.stdin.take());
            let ended = tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap();
            assert!(ended.success(), "{ended}");
        }
    }
}
