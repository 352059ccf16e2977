//! A headless Chromium as a person would use it, driven over its DevTools protocol.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// Longest time for one answer of the browser: its first start on a busy machine takes several seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// A running browser with one page; it is killed and its profile removed when this is dropped.
pub(crate) struct Chromium {
    child: Child,
    /// What it says on stderr, read so that it never waits for us.
    complaints: Lines<BufReader<ChildStderr>>,
    devtools: WebSocketStream<TcpStream>,
    /// The page that the calls are for, by the id that the browser gave our attachment.
    page: Option<String>,
    calls: u64,
    /// How many events the browser has told.
    events: u64,
    requested: Vec<String>,
    /// Last, so that it is removed after the browser has ended.
    _profile: TempDir,
}

impl Chromium {
    /// Starts a browser that knows these hosts at these loopback addresses, `127.0.0.1`, `localhost`, and no other host.
    /// It takes every certificate, and nothing of our environment: no proxy, no roots.
    pub(crate) async fn start(program: &str, hosts: &[(String, SocketAddr)]) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut child = command(program, profile.path(), hosts).spawn().unwrap();
        let mut complaints = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = timeout(LIMIT, devtools_address(&mut complaints)).await.unwrap();
        let devtools = connect(&address).await;
        let mut browser = Self {
            child,
            complaints,
            devtools,
            page: None,
            calls: 0,
            events: 0,
            requested: Vec::new(),
            _profile: profile,
        };
        browser.open_page().await;
        browser
    }

    async fn open_page(&mut self) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target.unwrap()["targetId"], "flatten": true });
        let attached = self.call("Target.attachToTarget", attach).await.unwrap();
        self.page = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page.enable", "Runtime.enable", "Network.enable"] {
            self.call(domain, json!({})).await.unwrap();
        }
        let binding = json!({ "name": "changed", "executionContextName": "driver" });
        self.call("Runtime.addBinding", binding).await.unwrap();
        let script = json!({ "source": TELL_CHANGES, "worldName": "driver" });
        self.call("Page.addScriptToEvaluateOnNewDocument", script).await.unwrap();
    }

    /// Types the URL. The error is Chromium's, such as `net::ERR_CONNECTION_REFUSED`.
    pub(crate) async fn navigate(&mut self, url: &str) -> Result<(), String> {
        let answer = self.call("Page.navigate", json!({ "url": url })).await?;
        answer["errorText"].as_str().map_or(Ok(()), |error| Err(error.to_owned()))
    }

    /// Waits until the title or the visible text contains this, on whichever page that is then.
    pub(crate) async fn wait_for(&mut self, wanted: &str) {
        let script = format!("(document.title + '\\n' + {TEXT}).includes({})", json!(wanted));
        let seen = timeout(LIMIT, async {
            loop {
                let events = self.events;
                // An error is a page that goes away at this moment.
                if self.evaluate(&script).await.is_ok_and(|seen| seen == true) {
                    return;
                }
                while self.events == events {
                    self.hear().await;
                }
            }
        });
        if seen.await.is_err() {
            let (url, text) = (self.url().await, self.text().await);
            panic!("{wanted:?} did not appear; the page is {url}:\n{text}");
        }
    }

    /// The visible text of the page.
    pub(crate) async fn text(&mut self) -> String {
        self.read(TEXT).await
    }

    pub(crate) async fn title(&mut self) -> String {
        self.read("document.title").await
    }

    /// What stands in the address bar.
    pub(crate) async fn url(&mut self) -> String {
        self.read("location.href").await
    }

    /// Every URL that the page has asked for, its own and those of what it contains, without fragments.
    pub(crate) fn requested(&self) -> &[String] {
        &self.requested
    }

    /// Clicks the element, which must be visible: nothing else may lie over its middle.
    pub(crate) async fn click(&mut self, selector: &str) {
        // By a script: a mouse event that the browser is given just after a page came is lost now and then.
        let script = CLICK.replace("SELECTOR", &json!(selector).to_string());
        let outcome = self.read(&script).await;
        assert_eq!(outcome, "clicked", "{selector}");
    }

    /// Whether the person prefers dark pages.
    pub(crate) async fn set_dark(&mut self, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", media).await.unwrap();
    }

    /// How wide the window is, in CSS pixels.
    pub(crate) async fn set_width(&mut self, width: u32) {
        let metrics =
            json!({ "width": width, "height": 700, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await.unwrap();
    }

    /// Writes what is visible as a PNG.
    pub(crate) async fn screenshot(&mut self, path: &Path) {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" })).await.unwrap();
        let png = STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        assert!(png.starts_with(b"\x89PNG\r\n"), "not a PNG");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, png).unwrap();
    }

    /// The value of an expression, or of its promise; fails where the page goes away meanwhile.
    pub(crate) async fn evaluate(&mut self, expression: &str) -> Result<Value, String> {
        let script = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true, "userGesture": true });
        let mut answer = self.call("Runtime.evaluate", script).await?;
        let mistake = &answer["exceptionDetails"];
        assert!(mistake.is_null(), "{expression}: {mistake:#}");
        Ok(answer["result"]["value"].take())
    }

    async fn read(&mut self, expression: &str) -> String {
        self.evaluate(expression).await.unwrap().as_str().unwrap().to_owned()
    }

    async fn call(&mut self, method: &str, parameters: Value) -> Result<Value, String> {
        self.calls += 1;
        let id = self.calls;
        let mut call = json!({ "id": id, "method": method, "params": parameters });
        if let Some(page) = &self.page {
            call["sessionId"] = json!(page);
        }
        self.devtools.send(Message::text(call.to_string())).await.unwrap();
        let answer = timeout(LIMIT, async {
            loop {
                let heard = self.hear().await;
                if heard["id"] == id {
                    return heard;
                }
            }
        });
        let mut answer = answer.await.unwrap_or_else(|_| panic!("no answer to {method}"));
        match answer.get("error") {
            Some(error) => Err(format!("{method}: {error}")),
            None => Ok(answer["result"].take()),
        }
    }

    /// The next answer or event; what events tell about the page is kept.
    async fn hear(&mut self) -> Value {
        let text = loop {
            tokio::select! {
                Ok(Some(_)) = self.complaints.next_line() => {}
                message = self.devtools.next() => match message.expect("chromium ended").unwrap() {
                    Message::Text(text) => break text,
                    _ => continue,
                },
            }
        };
        let heard: Value = serde_json::from_str(&text).unwrap();
        let told = &heard["params"];
        if heard["method"] == "Network.requestWillBeSent" {
            self.requested.push(told["request"]["url"].as_str().unwrap().to_owned());
        }
        self.events += u64::from(heard["method"].is_string());
        heard
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // The browser leads a group of its own, with the processes of its pages.
        let group = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = group {
            _ = kill_process_group(group, Signal::KILL);
        }
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < LIMIT {
            std::thread::yield_now();
        }
    }
}

/// Where screenshots are kept to be looked at.
pub(crate) fn screenshot_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("screenshots").join(name)
}

fn command(program: &str, profile: &Path, hosts: &[(String, SocketAddr)]) -> Command {
    // First match wins; what no rule names is not looked up at all, so a test cannot reach the network.
    let mut rules: Vec<_> = hosts.iter().map(|(host, at)| format!("MAP {host} {at}")).collect();
    rules.extend(["MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1", "EXCLUDE localhost"].map(str::to_owned));
    let mut command = Command::new(program);
    command
        .args(ARGUMENTS)
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--host-resolver-rules={}", rules.join(",")))
        .arg("about:blank")
        .env_clear()
        .envs([("HOME", profile), ("TMPDIR", profile)])
        .env("PATH", std::env!("PATH"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    command
}

async fn devtools_address(complaints: &mut Lines<BufReader<ChildStderr>>) -> String {
    let mut heard = Vec::new();
    while let Some(line) = complaints.next_line().await.unwrap() {
        if let Some((_, address)) = line.split_once("DevTools listening on ") {
            return address.trim().to_owned();
        }
        heard.push(line);
    }
    panic!("chromium ended at once: {heard:#?}");
}

#[expect(clippy::disallowed_methods, reason = "a test speaks to a browser that it has started")]
async fn connect(address: &str) -> WebSocketStream<TcpStream> {
    let host = address.strip_prefix("ws://").and_then(|rest| rest.split('/').next()).unwrap();
    let stream = TcpStream::connect(host).await.unwrap();
    tokio_tungstenite::client_async(address, stream).await.unwrap().0
}

const ARGUMENTS: [&str; 17] = [
    "--headless=new",
    "--remote-debugging-port=0",
    "--window-size=900,700",
    // Containers: no user namespaces, no GPU, a small /dev/shm.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--ignore-certificate-errors",
    "--no-proxy-server",
    // Nothing of its own on the network, in a keyring, or after its end.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--no-first-run",
    "--no-default-browser-check",
    "--password-store=basic",
];

/// Tells us of every change, from a world of its own that the page does not see.
const TELL_CHANGES: &str = "new MutationObserver(() => changed('')).observe(document, {
  attributes: true, characterData: true, childList: true, subtree: true,
})";

const TEXT: &str = "(document.body ? document.body.innerText : '')";

const CLICK: &str = "(() => {
  const element = document.querySelector(SELECTOR);
  if (!element) return 'is not on the page';
  element.scrollIntoView({ block: 'center', behavior: 'instant' });
  const { x, y, width, height } = element.getBoundingClientRect();
  const top = document.elementFromPoint(x + width / 2, y + height / 2);
  if (!element.contains(top)) return `is under ${top ? top.outerHTML : 'nothing that is visible'}`;
  element.click();
  return 'clicked';
})()";

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::super::support::{Scene, chromium};
    use super::*;

    #[tokio::test]
    async fn a_browser_reads_clicks_follows_and_takes_pictures() {
        let Some(program) = chromium() else { return };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::select! {
            () = serve(listener) => panic!("the server ended"),
            () = browse(&program, address) => {}
        }
    }

    async fn browse(program: &str, address: SocketAddr) {
        let hosts = [("pages.example.com".to_owned(), address)];
        let mut browser = Chromium::start(program, &hosts).await;
        let error = browser.navigate("http://elsewhere.example.com/").await.unwrap_err();
        assert_eq!(error, "net::ERR_NAME_NOT_RESOLVED");

        // A redirect from a host that only this browser knows to one on loopback.
        let redirect = format!("http://pages.example.com/to?http://{address}/first");
        browser.navigate(&redirect).await.unwrap();
        browser.wait_for("The first page").await;
        assert_eq!(browser.url().await, format!("http://{address}/first"));
        take_pictures(&mut browser).await;

        browser.click("#next").await;
        browser.wait_for("written by a script").await;
        assert_eq!(browser.title().await, "second");
        assert!(browser.text().await.starts_with("The second page"), "the visible text");
        assert!(browser.requested().contains(&redirect), "{:?}", browser.requested());
    }

    async fn take_pictures(browser: &mut Chromium) {
        let mut pictures = Vec::new();
        for (dark, name, background) in [
            (false, "driver-light.png", "rgb(255, 255, 255)"),
            (true, "driver-dark.png", "rgb(0, 0, 0)"),
        ] {
            browser.set_dark(dark).await;
            let seen = browser.evaluate("getComputedStyle(document.body).backgroundColor").await;
            assert_eq!(seen.unwrap(), background);
            browser.screenshot(&screenshot_path(name)).await;
            pictures.push(fs::read(screenshot_path(name)).unwrap());
        }
        assert_ne!(pictures[0], pictures[1], "light and dark look the same");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_browser_reaches_the_pretend_issuer_by_its_real_name() {
        let Some(program) = chromium() else { return };
        let scene = Scene::usual().await;
        let mut browser = Chromium::start(&program, &scene.world.resolve()).await;
        browser.navigate("https://auth.openai.com/nothing-here").await.unwrap();
        assert_eq!(browser.url().await, "https://auth.openai.com/nothing-here");
        assert_eq!(browser.requested()[0], "https://auth.openai.com/nothing-here");
    }

    async fn serve(listener: TcpListener) {
        let accepted = stream::unfold(listener, |listener| async {
            let (stream, _) = listener.accept().await.unwrap();
            Some((stream, listener))
        });
        accepted.for_each_concurrent(None, answer).await;
    }

    /// Answers one request; a browser that only opened the connection, or left, is none of our business.
    async fn answer(mut stream: TcpStream) {
        let mut lines = BufReader::new(&mut stream).lines();
        let Ok(Some(first)) = lines.next_line().await else { return };
        while matches!(lines.next_line().await, Ok(Some(line)) if !line.is_empty()) {}
        let path = first.split(' ').nth(1).unwrap();
        let (head, body) = match path.split_once('?') {
            Some((_, to)) => (format!("302 Found\r\nlocation: {to}"), String::new()),
            None => ("200 OK\r\ncontent-type: text/html".to_owned(), page(path)),
        };
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        stream.write_all(answer.as_bytes()).await.ok();
    }

    fn page(path: &str) -> String {
        let style = "<style>:root { color-scheme: light dark } body { background: white }
            @media (prefers-color-scheme: dark) { body { background: black } }</style>";
        match path {
            "/first" => format!(
                "<!doctype html><title>first</title>{style}\
                 <h1>The first page</h1><a id=next href=/second>On to the second</a>"
            ),
            "/second" => format!(
                "<!doctype html><title>second</title>{style}<h1>The second page</h1><p id=late></p>\
                 <script>setTimeout(() => late.textContent = 'written by a script', 50)</script>"
            ),
            _ => String::new(),
        }
    }
}
