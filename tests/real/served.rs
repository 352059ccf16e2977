//! A `valetkey serve` that runs, and requests through it of every kind.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use valetkey::sandbox::client::{self, Client, ClientBody, HTTP1, HTTP2, Visit, gather};
use valetkey::tasks::Tasks;

use super::support::{LIMIT, Scene};

/// A running `valetkey serve`, and what it says.
pub(crate) struct Serving {
    child: Child,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// The roots that clients must trust.
    pub(crate) ca: PathBuf,
    said: Lines<BufReader<ChildStderr>>,
}

impl Serving {
    /// Starts one on a free port, and waits until it listens.
    pub(crate) async fn start(scene: &Scene) -> Self {
        Self::start_with(scene, &["--listen", "127.0.0.1:0"]).await
    }

    /// Starts one with these arguments, and waits until it listens: at the address that is best for this machine.
    pub(crate) async fn start_with(scene: &Scene, arguments: &[&str]) -> Self {
        Self::start_in(scene, &[], arguments).await
    }

    /// The same, started by another program, which is given it and its arguments behind its own.
    pub(crate) async fn start_in(scene: &Scene, around: &[&str], arguments: &[&str]) -> Self {
        let info = scene.path("serving.json");
        let written = ["--server-info", info.to_str().unwrap()];
        let arguments = [&["serve"], arguments, &written].concat();
        Self::started(scene.valetkey_in(around, &arguments), info).await
    }

    /// One that this command is, which writes into that file where it listens.
    pub(crate) async fn started(mut command: Command, info: PathBuf) -> Self {
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        // The line comes after the file.
        hear(&mut said, "listening on").await;
        let info: Value = serde_json::from_str(&fs::read_to_string(info).unwrap()).unwrap();
        let (_, address) = info["proxy"].as_str().unwrap().split_once("://").unwrap();
        let ca = PathBuf::from(info["ca"].as_str().unwrap());
        Self { child, address: address.parse().unwrap(), ca, said }
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for its end, and gives its exit status.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        tokio::time::timeout(LIMIT, self.child.wait()).await.unwrap().unwrap().code()
    }

    /// Waits until it says something with this in it, and gives the line.
    pub(crate) async fn hear(&mut self, words: &str) -> String {
        hear(&mut self.said, words).await
    }

    /// The next line that it says; `None` when it has ended.
    #[allow(dead_code, reason = "proofs alone hear all of it")]
    pub(crate) async fn next_line(&mut self) -> Option<String> {
        tokio::time::timeout(LIMIT, self.said.next_line()).await.unwrap().unwrap()
    }

    /// A client of it that trusts its local CA.
    pub(crate) fn client(&self) -> Client {
        Client::through(self.address, &self.ca).unwrap()
    }

    /// One that trusts what is out there too, for the hosts that are tunnelled.
    pub(crate) fn client_in(&self, scene: &Scene) -> Client {
        let (roots, world) = (scene.path("client.pem"), &scene.world);
        let all = [&self.ca, world.ca_file(), world.company().ca_file()];
        fs::write(&roots, all.map(|file| fs::read_to_string(file).unwrap()).concat()).unwrap();
        Client::through(self.address, &roots).unwrap()
    }
}

async fn hear(said: &mut Lines<BufReader<ChildStderr>>, words: &str) -> String {
    let listening = async {
        let mut before = Vec::new();
        while let Some(line) = said.next_line().await.unwrap() {
            if line.contains(words) {
                return line;
            }
            before.push(line);
        }
        panic!("it ended without saying {words:?}: {before:#?}");
    };
    tokio::time::timeout(LIMIT, listening).await.expect("it did not say so within a minute")
}

/// One whose words nobody hears, and a client of it.
pub(crate) struct Served {
    pub(crate) client: Client,
    /// Ends with this.
    _serving: Serving,
}

impl Served {
    pub(crate) async fn start(scene: &Scene) -> Self {
        let serving = Serving::start(scene).await;
        Self { client: serving.client_in(scene), _serving: serving }
    }

    pub(crate) async fn get(&self, host: &str, alpn: &[&[u8]], path: &str) -> Response<Bytes> {
        let target = format!("{host}:443");
        self.client.get(Visit::to(&target, alpn), path).await.unwrap()
    }

    /// A WebSocket handshake over HTTP/1.1, whatever is answered.
    pub(crate) async fn upgrade(&self, host: &str) -> Response<Incoming> {
        let mut request = client::get("/v1/ws");
        let fields = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            // The key of RFC 6455 section 1.2.
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        for (name, value) in fields {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let target = format!("{host}:443");
        self.client.send(Visit::to(&target, HTTP1), request).await.unwrap()
    }

    /// A WebSocket handshake over HTTP/2, whatever is answered.
    pub(crate) async fn extended_connect(&self, host: &str) -> Response<Incoming> {
        extended_connect(&self.client, &format!("{host}:443"), "/v1/ws").await
    }
}

/// A WebSocket handshake over HTTP/2 (RFC 8441), whatever is answered.
pub(crate) async fn extended_connect(
    client: &Client,
    target: &str,
    path: &str,
) -> Response<Incoming> {
    let tls = client.greet(Visit::to(target, HTTP2)).await.unwrap();
    let (tasks, host) = (Tasks::new(), target.trim_end_matches(":443"));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(tasks.clone(), TokioIo::new(tls)).await.unwrap();
    tasks.spawn(connection);
    // The first answer comes after the server's settings, which allow it.
    let mut first = client::get("/");
    *first.uri_mut() = format!("https://{host}/v1/first").parse().unwrap();
    sender.send_request(first).await.unwrap();
    let mut request: Request<ClientBody> = client::get("/");
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = format!("https://{host}{path}").parse().unwrap();
    request.headers_mut().insert("sec-websocket-version", "13".parse().unwrap());
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    sender.send_request(request).await.unwrap()
}

/// Status, code, sentence and hint of one of our refusals.
pub(crate) async fn refusal(answer: Response<Incoming>) -> (u16, String, String, String) {
    told(&gather(answer).await.unwrap())
}

/// As [`refusal`], of an answer that is whole.
pub(crate) fn told(answer: &Response<Bytes>) -> (u16, String, String, String) {
    let code = answer.headers().get("x-valetkey-error");
    let code = code.unwrap_or_else(|| panic!("not a refusal of ours: {answer:?}"));
    let body: Value = serde_json::from_slice(answer.body()).unwrap();
    let text = |name: &str| body["error"][name].as_str().unwrap().to_owned();
    assert_eq!(text("code"), code.to_str().unwrap());
    (answer.status().as_u16(), text("code"), text("message"), text("hint"))
}
