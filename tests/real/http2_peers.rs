//! Between HTTP/2 peers that we did not write: gRPC, Python's h2, and the tools of nghttp2.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use valetkey::sandbox::client::Client;
use valetkey::tasks::Tasks;

use super::authority::write_certificates;
use super::served::Serving;
use super::support::{KEY, Scene, done, own_loopback, program, python_with};

/// A home from which `api.example.com` is a server that somebody else wrote.
struct Peer {
    scene: Scene,
    server: Child,
    said: Said,
}

impl Peer {
    /// Starts a Python program that says where it listens.
    async fn python(python: &str, program: &str) -> Self {
        let scene = Scene::usual().await;
        let mut command = Command::new(python);
        command.arg("-c").arg(program).arg(folder(&scene));
        let mut peer = Self::start(scene, command);
        let line = peer.said.line("listening ").await;
        let port = line.trim_start_matches("listening ").parse().unwrap();
        peer.lead_to(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        peer
    }

    fn start(scene: Scene, mut command: Command) -> Self {
        write_certificates(&folder(&scene), "Root of the peers", "api.example.com");
        command.env_clear().kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut server = command.spawn().unwrap();
        let said = Said::by(server.stdout.take().unwrap());
        Self { scene, server, said }
    }

    fn lead_to(&self, address: SocketAddr) {
        let ca = folder(&self.scene).join("ca.pem");
        self.scene.configure(&format!(
            "[upstream]\nca_bundle = \"{}\"\nproxy = \"none\"\n\
             [upstream.resolve]\n\"api.example.com:443\" = \"{address}\"\n",
            ca.display()
        ));
    }

    /// Ends the server; gives all that it has said.
    async fn end(mut self) -> String {
        self.server.kill().await.unwrap();
        self.said.all().await
    }

    /// As [`Peer::end`], of one that says its requests in lines of JSON.
    async fn requests(self) -> Vec<serde_json::Value> {
        let said = self.end().await;
        said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// Where the peer's certificates are.
fn folder(scene: &Scene) -> PathBuf {
    let folder = scene.path("peer");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// What a program says, read as it comes, so that it never has to wait.
struct Said {
    text: watch::Receiver<String>,
    reading: JoinHandle<()>,
}

impl Said {
    fn by(stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let (sender, text) = watch::channel(String::new());
        let reading = Tasks::new().spawn(async move {
            let mut lines = BufReader::new(stream).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                sender.send_modify(|text| text.extend([line.as_str(), "\n"]));
            }
        });
        Self { text, reading }
    }

    /// The first line with this in it, as soon as there is one.
    async fn line(&mut self, text: &str) -> String {
        let find = |said: &str| said.lines().find(|line| line.contains(text)).map(str::to_owned);
        let waiting = self.text.wait_for(|said| find(said).is_some());
        let said = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        find(&said.expect("it never said it").expect("it ended without it")).unwrap()
    }

    async fn all(self) -> String {
        self.reading.await.unwrap();
        self.text.borrow().clone()
    }
}

/// A port behind which is a tunnel through the proxy to `api.example.com`, for programs that know of no proxy.
async fn tunnelled_port(client: Client) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let tasks = Tasks::new();
    tasks.clone().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let client = client.clone();
            tasks.spawn(async move {
                let mut tunnel = client.tunnel("api.example.com:443").await.unwrap();
                tokio::io::copy_bidirectional(&mut stream, &mut tunnel).await.ok();
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_of_every_kind_between_a_client_and_a_server_in_python() {
    let Some(python) = python_with("grpc") else { return };
    let peer = Peer::python(&python, include_str!("http2_peers/grpc_server.py")).await;
    let client = include_str!("http2_peers/grpc_client.py");
    let done = peer.scene.run_ok(&[&python, "-c", client]).await;
    assert_eq!(done.out, "done\n", "{done:?}");
    peer.scene.assert_no_secret("what the client said", &(done.out + &done.err));

    let calls = peer.requests().await;
    assert_eq!(calls.len(), 115, "{calls:#?}");
    let own = |call: &serde_json::Value, name: &str| -> Vec<String> {
        let pairs = call["metadata"].as_array().unwrap().iter();
        let named = pairs.filter(|pair| pair[0] == name);
        named.map(|pair| pair[1].as_str().unwrap().to_owned()).collect()
    };
    for call in &calls {
        assert_eq!(own(call, "authorization"), [format!("Bearer {KEY}")], "{call}");
    }
    let kept = calls.iter().filter(|call| own(call, "x-own") == ["kept"]).count();
    assert_eq!(kept, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_pythons_h2_on_both_sides() {
    let Some(python) = python_with("h2") else { return };
    let peer = Peer::python(&python, include_str!("http2_peers/h2_server.py")).await;
    let client = include_str!("http2_peers/h2_client.py");
    let done = peer.scene.run_ok(&[&python, "-c", client]).await;
    assert!(done.out.ends_with("done\n"), "{done:?}");
    // A stream that was refused is sent again.
    assert!(done.out.starts_with("refused 200\n"), "{}", done.out);

    let said = peer.requests().await;
    let requests: Vec<_> = said.iter().filter(|said| said["fields"].is_array()).collect();
    assert!(requests.len() >= 20, "{said:#?}");
    for request in requests {
        let fields = request["fields"].as_array().unwrap();
        let sent: Vec<_> = fields.iter().filter(|pair| pair[0] == "authorization").collect();
        assert!(sent.len() == 1 && sent[0][1] == format!("Bearer {KEY}"), "{request}");
    }
    let reset = said.iter().filter(|said| said["reset"] == "/v1/wait").collect::<Vec<_>>();
    // RFC 9113 section 7: CANCEL.
    assert!(reset.len() == 1 && reset[0]["code"] == 8, "{said:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tools_of_nghttp2_on_both_sides() {
    let (Some(nghttp), Some(h2load)) = (program("nghttp"), program("h2load")) else { return };
    let Some(nghttpd) = program("nghttpd") else { return };
    let scene = Scene::usual().await;
    let (folder, server) = (folder(&scene), SocketAddr::from((own_loopback(0), 8443)));
    fs::write(folder.join("file"), "f".repeat(100_000)).unwrap();
    fs::write(folder.join("upload"), "u".repeat(70_000)).unwrap();
    let mut command = Command::new(nghttpd);
    command.args(["-v", "--echo-upload", "--trailer", "x-end: of nghttpd", "-d"]).arg(&folder);
    command.args(["-a", &server.ip().to_string(), &server.port().to_string()]);
    command.args(["server.key", "server.pem"].map(|name| folder.join(name)));
    let mut peer = Peer::start(scene, command);
    peer.said.line("listen ").await;
    peer.lead_to(server);
    let serving = Serving::start(&peer.scene).await;
    let port = tunnelled_port(serving.client()).await;

    let at_port = format!("https://{port}/file");
    let upload = folder.join("upload").display().to_string();
    let get = ["-nv", "-y", "-m", "5", "-b", "32", "--continuation"];
    let post = ["-v", "-y", "--trailer", "x-sum: of nghttp", "-d", &upload];
    for (arguments, answers) in [(&get[..], 5), (&post, 1)] {
        let mut command = Command::new(&nghttp);
        command.args(arguments).args(["-H", ":authority: api.example.com", &at_port]);
        let done =
            done(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await;
        for line in [" :status: 200\n", " x-end: of nghttpd\n"] {
            assert_eq!(done.out.matches(line).count(), answers, "{line} {}", done.out);
        }
        assert_eq!(done.out.matches('u').count() > 70_000, answers == 1);
        peer.scene.assert_no_secret("what nghttp saw", &done.out);
    }
    let mut command = Command::new(&h2load);
    command.args(["-n", "1000", "-c", "4", "-m", "50"]).arg(format!("--connect-to={port}"));
    command.arg("https://api.example.com/file").stdout(Stdio::piped()).stderr(Stdio::piped());
    let done = done(command.spawn().unwrap()).await;
    assert!(done.out.contains("1000 succeeded, 0 failed, 0 errored, 0 timeout"), "{done:?}");
    assert!(done.out.contains("Application protocol: h2\n"), "{done:?}");

    let said = peer.end().await;
    let requests = said.matches("Open new stream").count();
    assert_eq!(said.matches(&format!(" authorization: Bearer {KEY}\n")).count(), 1006);
    assert_eq!((requests, said.matches(" x-sum: of nghttp\n").count()), (1006, 1));
}
