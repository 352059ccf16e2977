//! The ways to the pretend API: straight, through `valetkey serve`, through haproxy; the two proxies as processes of their
//! own.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use http::header::HeaderValue;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use valetkey::sandbox::World;
use valetkey::sandbox::client::{Client, HTTP1, Visit};

use crate::machine::{self, Cores};

/// A host with a rule.
pub(crate) const TARGET: &str = "api.example.com:443";

/// A host whose answers are scrubbed, too.
pub(crate) const SCRUBBED: &str = "scrubbed.example.com:443";

/// A host without a rule.
pub(crate) const PLAIN: &str = "plain.example.com:443";

/// What both proxies set.
pub(crate) const KEY: &str = "vk-canary-benchmark-key";

/// Below it are hosts that nobody has visited yet: `h0` and so on.
pub(crate) const UNSEEN: &str = "unseen.example.com";

/// One way to the API.
#[derive(Clone)]
pub(crate) struct Way {
    /// To hosts with a rule.
    pub(crate) client: Client,
    /// To the host without one; `None` where there is no way to it.
    pub(crate) plain: Option<Client>,
    /// What the client shows by itself, where nobody sets it on the way.
    pub(crate) shown: Option<HeaderValue>,
    /// The process of the proxy.
    pub(crate) proxy: Option<u32>,
}

/// The header that signs in.
pub(crate) fn authorization() -> HeaderValue {
    format!("Bearer {KEY}").parse().unwrap()
}

impl Way {
    /// Straight to the API, showing the key.
    pub(crate) fn straight(world: &World) -> Self {
        let client = Client::straight_to(address_of(world), world.ca_file());
        let client = client.and_then(|client| client.with_x25519()).unwrap();
        let shown = Some(authorization());
        Self { plain: Some(client.clone()), client, shown, proxy: None }
    }
}

/// A proxy that is installed: it may be started any number of times, and finds its CA again.
pub(crate) struct Proxy {
    program: Program,
    config: PathBuf,
    /// What clients trust.
    roots: PathBuf,
    /// What the clients of its plain tunnels trust.
    upstream_roots: PathBuf,
    cores: Option<Cores>,
    home: TempDir,
}

enum Program {
    Valetkey(PathBuf),
    /// It says nowhere which port it took, so that it is told one.
    Haproxy(SocketAddr),
}

/// A proxy that runs. It ends with this.
pub(crate) struct Running {
    pub(crate) way: Way,
    /// Whether it has answered a request already, to show that it runs.
    pub(crate) has_answered: bool,
    child: Child,
    _said: Option<tokio::io::Lines<BufReader<ChildStderr>>>,
}

impl Running {
    /// Asks it to end, and waits until it has: one that is built with counters writes them as it exits.
    pub(crate) async fn end(mut self) {
        let process = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(process, Signal::TERM).unwrap();
        let ended = tokio::time::timeout(END, self.child.wait()).await;
        ended.expect("the proxy did not end").unwrap();
    }
}

impl Proxy {
    /// `serve` of this program with rules that sign in, one of which scrubs, so many that tunnel other hosts, and so many hosts
    /// below [`UNSEEN`].
    pub(crate) fn valetkey(world: &World, binary: &Path, others: usize, unseen: usize) -> Self {
        let home = tempfile::tempdir().unwrap();
        let (key, config) = (home.path().join("key"), home.path().join("config.toml"));
        fs::write(&key, KEY).unwrap();
        let mut text = format!(
            "[credentials.bench]\nkind = \"api_key\"\nsource = \"file:{}\"\n",
            key.display()
        );
        for other in 0..others {
            text +=
                &format!("[[rules]]\nhost = \"h{other}.other.example.com\"\naction = \"tunnel\"\n");
        }
        for host in ["api.example.com".to_owned(), format!("*.{UNSEEN}")] {
            text += &format!("[[rules]]\nhost = \"{host}\"\ncredential = \"bench\"\n");
        }
        text +=
            "[[rules]]\nhost = \"scrubbed.example.com\"\ncredential = \"bench\"\nscrub = true\n";
        let bundle = world.ca_file().display();
        text += &format!(
            "[upstream]\nca_bundle = \"{bundle}\"\nproxy = \"none\"\n[upstream.resolve]\n"
        );
        let unseen = (0..unseen).map(|number| format!("h{number}.{UNSEEN}:443"));
        for target in [TARGET, SCRUBBED, PLAIN].map(str::to_owned).into_iter().chain(unseen) {
            text += &format!("\"{target}\" = \"{}\"\n", address_of(world));
        }
        fs::write(&config, text).unwrap();
        let roots = home.path().join("run/valetkey/ca.pem");
        Self::new(Program::Valetkey(binary.to_owned()), config, roots, world, home)
    }

    /// haproxy as a reverse proxy that does the same to each request: TLS on both sides, the upstream verified and its
    /// connections kept for all, a field set; HTTP/2 to the API for clients that speak it.
    pub(crate) fn haproxy(world: &World) -> Self {
        let home = tempfile::tempdir().unwrap();
        let unseen = format!("*.{UNSEEN}");
        let names = ["api.example.com", "scrubbed.example.com", &unseen].map(str::to_owned);
        let own = rcgen::generate_simple_self_signed(names).unwrap();
        let (roots, both) = (home.path().join("ca.pem"), home.path().join("both.pem"));
        fs::write(&roots, own.cert.pem()).unwrap();
        fs::write(&both, own.cert.pem() + &own.signing_key.serialize_pem()).unwrap();
        let address = free_address();
        let server = format!(
            "server api {} ssl verify required ca-file {} sni str(api.example.com) verifyhost api.example.com",
            address_of(world),
            world.ca_file().display()
        );
        let text = format!(
            "global\n nbthread 1\n maxconn 8000\n ssl-server-verify required\n\
             defaults\n mode http\n http-reuse always\n timeout connect 5s\n timeout client 5m\n timeout server 5m\n timeout tunnel 5m\n\
             frontend tools\n bind {address} ssl crt {} alpn h2,http/1.1\n\
             \x20http-request set-header authorization \"Bearer {KEY}\"\n\
             \x20use_backend over2 if {{ ssl_fc_alpn h2 }}\n default_backend over1\n\
             backend over1\n {server} alpn http/1.1\n\
             backend over2\n {server} alpn h2\n",
            both.display()
        );
        let config = home.path().join("haproxy.cfg");
        fs::write(&config, text).unwrap();
        Self::new(Program::Haproxy(address), config, roots, world, home)
    }

    fn new(
        program: Program,
        config: PathBuf,
        roots: PathBuf,
        world: &World,
        home: TempDir,
    ) -> Self {
        let upstream_roots = world.ca_file().to_owned();
        Self { program, config, roots, upstream_roots, cores: None, home }
    }

    /// The same, held to another core than the load.
    pub(crate) fn on(self, cores: Option<Cores>) -> Self {
        Self { cores, ..self }
    }

    /// Starts it, and waits until it can be connected to.
    pub(crate) async fn start(&self) -> Running {
        machine::pin(self.cores.map(|cores| cores.proxy));
        let child = self.command().kill_on_drop(true).spawn();
        machine::pin(self.cores.map(|cores| cores.load));
        let mut child = child.expect("the proxy cannot be started: is it installed?");
        let said = child.stderr.take().map(|said| BufReader::new(said).lines());
        let (address, said) = match self.program {
            Program::Valetkey(_) => listening(said.unwrap()).await,
            Program::Haproxy(address) => (address, None),
        };
        let way = self.way(address, child.id().unwrap());
        let has_answered = said.is_none();
        if has_answered {
            until_it_answers(&way).await;
        }
        Running { way, has_answered, child, _said: said }
    }

    fn way(&self, address: SocketAddr, process: u32) -> Way {
        let through = |roots: &Path| Client::through(address, roots)?.with_x25519();
        let (client, plain) = match self.program {
            Program::Valetkey(_) => (through(&self.roots), through(&self.upstream_roots).ok()),
            Program::Haproxy(_) => {
                let client = Client::straight_to(address, &self.roots);
                (client.and_then(|client| client.with_x25519()), None)
            }
        };
        Way { client: client.unwrap(), plain, shown: None, proxy: Some(process) }
    }

    fn command(&self) -> Command {
        let home = self.home.path();
        match &self.program {
            Program::Valetkey(binary) => {
                let mut command = Command::new(binary);
                command.args(["--log", "warn", "serve", "--listen", "127.0.0.1:0", "--config"]);
                command.arg(&self.config).stderr(Stdio::piped());
                command.env("HOME", home).env("XDG_RUNTIME_DIR", home.join("run"));
                for other in
                    ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"]
                {
                    command.env_remove(other);
                }
                command
            }
            Program::Haproxy(_) => {
                let mut command = Command::new("haproxy");
                command.args(["-db", "-q", "-f"]).arg(&self.config).stdin(Stdio::null());
                command
            }
        }
    }
}

/// Where the proxy says that it listens; what it says later is to be read too.
async fn listening(
    mut said: tokio::io::Lines<BufReader<ChildStderr>>,
) -> (SocketAddr, Option<tokio::io::Lines<BufReader<ChildStderr>>>) {
    let wait = async {
        while let Some(line) = said.next_line().await.unwrap() {
            if let Some(address) = line.strip_prefix("listening on http://") {
                return address.parse().unwrap();
            }
        }
        panic!("valetkey did not start");
    };
    (tokio::time::timeout(START, wait).await.expect("valetkey did not start"), Some(said))
}

/// Asks a proxy that tells of no start until it answers.
async fn until_it_answers(way: &Way) {
    let started = Instant::now();
    while way.client.get(Visit::to(TARGET, HTTP1), "/v1/bytes/200").await.is_err() {
        assert!(started.elapsed() < START, "the proxy did not start");
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
}

/// Where the API of the world listens.
fn address_of(world: &World) -> SocketAddr {
    world.resolve()[0].1
}

fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|it| it.local_addr()).unwrap()
}

/// With ten thousand rules, in a build without optimisation, on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Longer than a proxy lets exchanges end.
const END: Duration = Duration::from_secs(60);
