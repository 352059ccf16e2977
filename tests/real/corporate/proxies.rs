//! The proxies that companies run, each from Debian's package, with its own folder of configuration and logs.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use valetkey::sandbox::World;

use super::super::authority::write_certificates;
use super::super::support::program;
use super::place::Place;

/// Who may use the proxies.
pub(super) const STAFF: &str = "staff";

/// Whom Squid knows, and lets nowhere.
pub(super) const GUEST: &str = "guest";

/// Which proxy a company runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Squid, which ends TLS with certificates of the company's CA.
    Inspecting,
    /// The same, set up by somebody who has never heard of WebSockets.
    InspectingHttpOnly,
    /// Squid, which lets TLS through.
    Tunnelling,
    /// Squid behind TLS of its own: an `https://` proxy.
    OverTls,
    Tinyproxy,
    Socks,
}

impl Kind {
    /// As it is typed into a URL, and as it is.
    pub(super) fn password(self) -> (&'static str, &'static str) {
        match self {
            // tinyproxy's configuration has no way to quote.
            Self::Tinyproxy => ("canary-of-the-chain", "canary-of-the-chain"),
            _ => ("canary%40of%3Athe%2Fchain", "canary@of:the/chain"),
        }
    }

    pub(super) fn inspects(self) -> bool {
        matches!(self, Self::Inspecting | Self::InspectingHttpOnly)
    }

    fn port(self) -> u16 {
        match self {
            Self::Inspecting | Self::InspectingHttpOnly => 3128,
            Self::Tunnelling => 3129,
            Self::OverTls => 3130,
            Self::Tinyproxy => 8888,
            Self::Socks => 1080,
        }
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::OverTls => "https",
            Self::Socks => "socks5h",
            _ => "http",
        }
    }
}

/// A proxy that runs; it ends with this.
pub(super) struct Proxy {
    kind: Kind,
    address: SocketAddr,
    folder: TempDir,
    log: PathBuf,
    child: Child,
}

impl Proxy {
    /// Starts it, and waits until it listens. `None` after saying what is missing.
    pub(super) async fn start(kind: Kind, world: &World, place: &Place) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("valetkey-proxy-").tempdir().unwrap();
        let hosts = place.write_hosts(world, folder.path());
        let (command, log) = match kind {
            Kind::Tinyproxy => (tinyproxy(folder.path(), &hosts, place.address).await?, "said"),
            Kind::Socks => (microsocks(&hosts, place.address).await?, "said"),
            _ => (squid(kind, folder.path(), world, place.address).await?, "access.log"),
        };
        let address = SocketAddr::from((place.address, kind.port()));
        let log = folder.path().join(log);
        let child = spawn(command, &folder.path().join("said"));
        let mut proxy = Self { kind, address, folder, log, child };
        proxy.listens().await;
        Some(proxy)
    }

    /// The URL that a person of the company is told.
    pub(super) fn url(&self, user: &str, password: &str) -> String {
        format!("{}://{user}:{password}@{}", self.kind.scheme(), self.address)
    }

    /// Our program, where the names of the world are known as they are to the proxy.
    pub(super) async fn valetkey_that_resolves(&self) -> Option<Command> {
        with_hosts(&self.folder.path().join("hosts"), env!("CARGO_BIN_EXE_valetkey")).await
    }

    /// The certificate of the company's own CA, where it has one.
    pub(super) fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// What its own log says so far.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its log has a line with each of these. Nobody tells when a file grows, and Squid writes of a
    /// tunnel when it ends.
    pub(super) async fn logged(&self, texts: &[String]) {
        let missing = |log: &str| texts.iter().find(|text| !log.contains(*text)).cloned();
        for _ in 0..LIMIT_IN_TICKS {
            if missing(&self.log()).is_none() {
                return;
            }
            tokio::time::sleep(TICK).await;
        }
        panic!("{:?} is not in the proxy's log:\n{}", missing(&self.log()), self.log());
    }

    /// How its log says that this user of the company was led to the host.
    pub(super) fn line_of(&self, host: &str) -> String {
        match self.kind {
            Kind::Tinyproxy => format!("CONNECT {host}:443 "),
            Kind::Socks => format!("connected to {host}:443"),
            _ => format!("CONNECT {host}:443 {STAFF} "),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "it only asks whether a proxy listens")]
    async fn listens(&mut self) {
        for _ in 0..LIMIT_IN_TICKS {
            if TcpStream::connect(self.address).await.is_ok() {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the proxy ended: {}", self.everything_said());
            tokio::time::sleep(TICK).await;
        }
        panic!("the proxy never listened: {}", self.everything_said());
    }

    fn everything_said(&self) -> String {
        let read = |name| fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        read("said") + &read("cache.log")
    }
}

/// Ten seconds in steps of twenty milliseconds: a limit that only catches what hangs.
const LIMIT_IN_TICKS: usize = 500;
const TICK: Duration = Duration::from_millis(20);

fn spawn(mut command: Command, said: &Path) -> Child {
    let said = File::create(said).unwrap();
    command.stdout(said.try_clone().unwrap()).stderr(said).stdin(Stdio::null());
    command.env_clear().env("PATH", std::env!("PATH")).kill_on_drop(true).spawn().unwrap()
}

/// The program, where `/etc/hosts` is another file. `None` after saying that this user may not have it so.
async fn with_hosts(hosts: &Path, program: &str) -> Option<Command> {
    let exchange = |program: &str| {
        let mut command = Command::new("unshare");
        let exchange = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
        command.args(["-m", "--", "sh", "-c", exchange, "sh"]).arg(hosts).arg(program);
        command
    };
    if !exchange("true").output().await.is_ok_and(|done| done.status.success()) {
        println!("skipped: this user may not make a namespace in which /etc/hosts is another file");
        return None;
    }
    Some(exchange(program))
}

async fn tinyproxy(folder: &Path, hosts: &Path, address: Ipv4Addr) -> Option<Command> {
    let (kind, file) = (Kind::Tinyproxy, folder.join("tinyproxy.conf"));
    let config = format!(
        "Port {port}\nListen {address}\nTimeout 600\nMaxClients 100\nLogLevel Info\n\
         BasicAuth {STAFF} {password}\nConnectPort 443\n",
        port = kind.port(),
        password = kind.password().1
    );
    fs::write(&file, config).unwrap();
    let mut command = with_hosts(hosts, &program("tinyproxy")?).await?;
    command.arg("-d").arg("-c").arg(file);
    Some(command)
}

async fn microsocks(hosts: &Path, address: Ipv4Addr) -> Option<Command> {
    let (kind, address) = (Kind::Socks, address.to_string());
    let mut command = with_hosts(hosts, &program("microsocks")?).await?;
    command.args(["-i", &address, "-p", &kind.port().to_string()]);
    command.args(["-u", STAFF, "-P", kind.password().1]);
    Some(command)
}

async fn squid(kind: Kind, folder: &Path, world: &World, address: Ipv4Addr) -> Option<Command> {
    let (squid, openssl) = (program("squid")?, program("openssl")?);
    write_certificates(folder, CA_NAME, &address.to_string());
    fs::copy(world.ca_file(), folder.join("upstream.pem")).unwrap();
    let mut passwords = String::new();
    for user in [STAFF, GUEST] {
        let hash = said(&openssl, &["passwd", "-apr1", kind.password().1]).await;
        passwords.push_str(&format!("{user}:{hash}\n"));
    }
    fs::write(folder.join("passwords"), passwords).unwrap();
    let certificates = folder.join("certificates").display().to_string();
    said(CERTGEN, &["-c", "-s", &certificates, "-M", "4MB"]).await;
    let config = squid_config(kind, folder, address);
    fs::write(folder.join("squid.conf"), config).unwrap();
    // It gives up being root, and must still be able to write.
    let file = folder.display().to_string();
    said("chown", &["-R", "proxy:", &file]).await;
    let mut command = Command::new(squid);
    command.args(["-N", "-f"]).arg(folder.join("squid.conf"));
    Some(command)
}

const CERTGEN: &str = "/usr/lib/squid/security_file_certgen";

/// One port that inspects, one that tunnels, and one behind TLS, all with a password.
fn squid_config(kind: Kind, folder: &Path, address: Ipv4Addr) -> String {
    let websockets = match kind {
        Kind::InspectingHttpOnly => "",
        _ => "http_upgrade_request_protocols websocket allow all",
    };
    format!(
        "
visible_hostname squid.corp.example
hosts_file {folder}/hosts
pid_filename {folder}/squid.pid
coredump_dir {folder}
cache_log {folder}/cache.log
access_log stdio:{folder}/access.log
cache_effective_user proxy
cache deny all
cache_mem 8 MB
max_filedescriptors 1024
pinger_enable off
shutdown_lifetime 0 seconds

http_port {address}:{inspecting} ssl-bump generate-host-certificates=on dynamic_cert_mem_cache_size=4MB tls-cert={folder}/ca.pem tls-key={folder}/ca.key
http_port {address}:{tunnelling}
https_port {address}:{over_tls} tls-cert={folder}/server.pem tls-key={folder}/server.key
sslcrtd_program {CERTGEN} -s {folder}/certificates -M 4MB
sslcrtd_children 2 startup=1 idle=1
tls_outgoing_options cafile={folder}/upstream.pem
acl hello at_step SslBump1
ssl_bump peek hello
ssl_bump bump all
{websockets}

auth_param basic program /usr/lib/squid/basic_ncsa_auth {folder}/passwords
auth_param basic children 2 startup=1 idle=1
auth_param basic realm corp.example
acl known proxy_auth REQUIRED
acl guests proxy_auth {GUEST}
http_access deny !known
http_access deny guests all
http_access allow all
",
        folder = folder.display(),
        inspecting = Kind::Inspecting.port(),
        tunnelling = Kind::Tunnelling.port(),
        over_tls = Kind::OverTls.port(),
    )
}

/// Whom Squid's certificates name as their issuer.
pub(super) const CA_NAME: &str = "Root of corp.example";

/// What a program says, without the end of the line.
async fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}
