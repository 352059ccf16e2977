//! The browser of a person who signs in, and what becomes of the ports that it is sent back to.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use valetkey::sandbox::World;
use valetkey::sandbox::client::{Client, HTTP1, Visit};
use valetkey::tasks::Tasks;

use super::{Done, Home, Running};
use crate::support::within;

/// What a browser was shown.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Page {
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// Goes to the issuer and agrees; answers with where that sends the browser.
pub(super) async fn agree(world: &World, url: &str) -> String {
    let (_, address) = world.resolve().into_iter().next().unwrap();
    let client = Client::straight_to(address, world.ca_file()).unwrap();
    let rest = url.strip_prefix("https://").unwrap();
    let (host, path) = rest.split_at(rest.find('/').unwrap());
    let answer = client.get(Visit::to(&format!("{host}:443"), HTTP1), path).await.unwrap();
    let body = String::from_utf8_lossy(answer.body());
    let place = answer.headers().get("location").unwrap_or_else(|| panic!("{body}"));
    place.to_str().unwrap().to_owned()
}

/// A GET on loopback.
pub(super) async fn get(url: &str) -> Page {
    let authority = authority(url);
    get_with(url, &format!("Host: {authority}\r\n")).await
}

/// A GET on loopback with exactly these fields.
#[expect(clippy::disallowed_methods, reason = "a browser of this machine")]
pub(super) async fn get_with(url: &str, fields: &str) -> Page {
    let authority = authority(url);
    let path = url.split_once(authority).unwrap().1;
    let mut stream = TcpStream::connect(authority).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Page { status, head: head.to_owned(), body: body.to_owned() }
}

/// Whether anybody listens there.
#[expect(clippy::disallowed_methods, reason = "a browser of this machine")]
pub(super) async fn is_open(base: &str) -> bool {
    TcpStream::connect(authority(base)).await.is_ok()
}

/// `http://127.0.0.1:1455` of an address below it.
pub(super) fn base(url: &str) -> String {
    format!("http://{}", authority(url))
}

fn authority(url: &str) -> &str {
    url.strip_prefix("http://").unwrap().split('/').next().unwrap()
}

/// Signs in as a browser does that follows where it is sent; answers with the last page.
pub(super) async fn follow(redirect: &str) -> Page {
    let answer = get(redirect).await;
    assert_eq!(answer.status, 303, "{answer:?}");
    get(&format!("{}{}", base(redirect), answer.field("location").unwrap())).await
}

/// All of it, for those to whom it is not new.
pub(super) async fn sign_in(home: &Home, arguments: &[&str]) -> (Done, Page) {
    sign_in_to(home, home.start(arguments)).await
}

pub(super) async fn sign_in_to(home: &Home, mut running: Running<'_>) -> (Done, Page) {
    let redirect = agree(&home.world, &running.url().await).await;
    let page = follow(&redirect).await;
    (running.end().await, page)
}

/// Holds the two ports that Codex's client is registered with against the other tests of this file, as long as it
/// lives: whoever signs in there ends every login that is at it.
pub(super) struct Ports(#[expect(dead_code, reason = "it is held")] File);

impl Ports {
    pub(super) fn hold() -> Self {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("codex-ports.lock");
        let file = File::create(file).unwrap();
        file.lock().unwrap();
        Self(file)
    }
}

/// A way to the company's proxy that can be shut, and opened again at the same address.
pub(super) struct Gate {
    pub(super) address: SocketAddr,
    passing: JoinHandle<()>,
}

impl Gate {
    pub(super) async fn open(proxy: SocketAddr) -> Self {
        Self::open_at(([127, 0, 0, 1], 0).into(), proxy).await
    }

    #[expect(clippy::disallowed_methods, reason = "a network that comes and goes")]
    pub(super) async fn open_at(address: SocketAddr, proxy: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let passing = Tasks::new().spawn(async move {
            let mut streams = tokio::task::JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                streams.spawn(async move {
                    let mut far = TcpStream::connect(proxy).await.unwrap();
                    copy_bidirectional(&mut near, &mut far).await.ok();
                });
            }
        });
        Self { address, passing }
    }

    /// Closes the listener and cuts whatever goes through it.
    pub(super) async fn shut(self) -> SocketAddr {
        self.passing.abort();
        self.passing.await.ok();
        self.address
    }
}
