//! A `valetkey serve` that runs, and requests through it of every kind.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;
use valetkey::sandbox::client::{self, Client, ClientBody, HTTP1, HTTP2, Visit, gather};
use valetkey::tasks::Tasks;

use super::support::Scene;

pub(crate) struct Served {
    pub(crate) client: Client,
    /// Ends with this.
    _child: Child,
}

impl Served {
    pub(crate) async fn start(scene: &Scene) -> Self {
        let info = scene.path("server.json");
        let info_text = info.to_str().unwrap();
        let arguments = ["serve", "--listen", "127.0.0.1:0", "--server-info", info_text];
        let mut child = scene.valetkey(&arguments).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            said.push_str(&line);
            if line.starts_with("listening on ") {
                break;
            }
        }
        // Nobody reads on: what it says after that must not fill the pipe.
        Tasks::new().spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let text = fs::read_to_string(&info).unwrap_or_else(|_| panic!("it did not start: {said}"));
        let info: Value = serde_json::from_str(&text).unwrap();
        let port = u16::try_from(info["port"].as_u64().unwrap()).unwrap();
        // What a client trusts: the local CA where it is intercepted, and what is out there where it is not.
        let (own, world) = (PathBuf::from(info["ca"].as_str().unwrap()), &scene.world);
        let roots = [&own, world.ca_file(), world.company().ca_file()];
        let roots: String = roots.map(|file| fs::read_to_string(file).unwrap()).concat();
        fs::write(scene.path("client.pem"), roots).unwrap();
        let roots = scene.path("client.pem");
        let client = Client::through(SocketAddr::from(([127, 0, 0, 1], port)), &roots).unwrap();
        Self { client, _child: child }
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

    /// A WebSocket handshake over HTTP/2 (RFC 8441), whatever is answered.
    pub(crate) async fn extended_connect(&self, host: &str) -> Response<Incoming> {
        let target = format!("{host}:443");
        let tls = self.client.greet(Visit::to(&target, HTTP2)).await.unwrap();
        let tasks = Tasks::new();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(tasks.clone(), TokioIo::new(tls)).await.unwrap();
        tasks.spawn(connection);
        // The first answer comes after the server's settings, which allow it.
        let mut first = client::get("/");
        *first.uri_mut() = format!("https://{host}/v1/first").parse().unwrap();
        sender.send_request(first).await.unwrap();
        let mut request: Request<ClientBody> = client::get("/");
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = format!("https://{host}/v1/ws").parse().unwrap();
        request.headers_mut().insert("sec-websocket-version", "13".parse().unwrap());
        request.extensions_mut().insert(Protocol::from_static("websocket"));
        sender.send_request(request).await.unwrap()
    }
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
