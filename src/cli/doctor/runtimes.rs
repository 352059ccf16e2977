//! Whether the programs found here trust the local CA: each visits a host of this process, as under `valetkey run`.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::report::{Check, Report};
use crate::cli::programs::Search;
use crate::cli::start::ca_dir;
use crate::cli::{Failure, Typed, output, past, run};
use crate::client_env::{self, ClientEnv, Facts, Folder};
use crate::clock::Clock;
use crate::config::Config;
use crate::group::Group;
use crate::origin::{Host, Target};
use crate::tasks::Tasks;
use crate::tls::ca::LocalCa;
use crate::tls::leaf::Leaves;
use crate::tls::trust::UpstreamTrust;
use crate::upstream::chain::no_proxy::NoProxy;

/// A program that fetches a page.
struct Runtime {
    /// As it is found in `PATH`, and the path of the page that it fetches.
    name: &'static str,
    arguments: fn(&str) -> Vec<String>,
    /// What to type when it does not trust what the variables name.
    fix: &'static str,
}

const RUNTIMES: [Runtime; 5] = [
    Runtime { name: "curl", arguments: curl, fix: "look for `cacert` or `proxy` in ~/.curlrc" },
    Runtime {
        name: "git",
        arguments: git,
        fix: "see: git config --show-origin --get-regexp '^http\\.'",
    },
    Runtime {
        name: "node",
        arguments: node,
        fix: "look for NODE_OPTIONS (--use-openssl-ca) and a version older than 7.3",
    },
    Runtime {
        name: "python3",
        arguments: python,
        fix: "look for SSL_CERT_DIR and sitecustomize; or: valetkey ca install",
    },
    Runtime {
        name: "wget",
        arguments: wget,
        fix: "see whether it reads WGETRC (wget2 does not), or: valetkey ca install",
    },
];

fn curl(url: &str) -> Vec<String> {
    ["-sS", "-o", "/dev/null", "--max-time", "8", url].map(str::to_owned).into()
}

fn git(url: &str) -> Vec<String> {
    ["ls-remote", url].map(str::to_owned).into()
}

/// Older versions know no proxy. Where `fetch` does not come here soon, the tunnel is asked for by hand, to tell that
/// from trust: in a company it may wait for the way past the proxy until it is given up.
fn node(url: &str) -> Vec<String> {
    let script = "const [proxy, url] = [new URL(process.env.HTTPS_PROXY), new URL(process.argv[1])];\
                  const byHand = () => require('http').request({ host: proxy.hostname, port: proxy.port, \
                  method: 'CONNECT', path: url.hostname + ':443' }).on('connect', (_, socket) => \
                  require('https').get({ host: url.hostname, path: url.pathname + '/by-hand', socket, \
                  agent: false }, () => process.exit(0)).on('error', () => process.exit(1))).end();\
                  const late = setTimeout(byHand, 4000);\
                  fetch(url).then(() => process.exit(0), () => { clearTimeout(late); byHand(); });";
    ["-e", script, url].map(str::to_owned).into()
}

fn python(url: &str) -> Vec<String> {
    let script = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=8)";
    ["-c", script, url].map(str::to_owned).into()
}

fn wget(url: &str) -> Vec<String> {
    ["-q", "-O", "/dev/null", "--tries=1", "--timeout=8", url].map(str::to_owned).into()
}

/// One check for each program that is found. Without a ruled host there is nothing to trust.
pub(super) async fn examine(
    config: &Config,
    trust: &UpstreamTrust,
    typed: &Typed,
    report: &mut Report,
) {
    for target in past::hosts_past(&config.rules) {
        let sentence = past::sentence(&target);
        report.add(Check::warning("no-proxy", sentence, past::FIX).about(target));
    }
    let theirs = client_env::their_no_proxy(&typed.env);
    let (past, _) = NoProxy::parse(&theirs);
    let goes_past = |host: &Host| past.covers(&Target { host: host.clone(), port: 443 });
    let names = config.rules.constraints().into_iter().filter(|it| matches!(it, Host::Name(_)));
    let (avoided, names): (Vec<_>, Vec<_>) = names.partition(goes_past);
    for host in avoided {
        let sentence = "NO_PROXY sends programs past valetkey to it, without a credential";
        let fix = "give the tool lists without it: valetkey run -- env NO_PROXY=… no_proxy=… TOOL";
        report.add(Check::warning("no-proxy", sentence, fix).about(host));
    }
    let Some(host) = names.into_iter().next() else { return };
    if let Err(failure) = visit_all(config, (&host, trust), typed, report).await {
        report.add(Check::of_failure("runtime", &failure));
    }
}

async fn visit_all(
    config: &Config,
    (host, trust): (&Host, &UpstreamTrust),
    typed: &Typed,
    report: &mut Report,
) -> Result<(), Failure> {
    let visited = Visited::open(config, host).await?;
    let folder = tempfile::tempdir()?;
    let now = trust.now();
    let facts = Facts {
        proxy: visited.address.into(),
        system: now.system(),
        bundle: now.bundle(),
        own: &visited.roots,
        chain: "",
        bundle_path: None,
    };
    let variables = ClientEnv::write(&facts, &typed.env, Folder::Here(folder.path()))?;
    let secret: Vec<&str> = run::variables_of_sources(config).collect();
    let search = Search::new(typed.env.get("PATH"));
    let found = RUNTIMES.iter().filter(|runtime| search.has(runtime.name));
    let visits = found.map(|runtime| visit(runtime, host, (&variables, &secret)));
    for runtime in join_all(visits).await {
        let check = match visited.seen_of(runtime.name) {
            Seen::Page => Check::ok("runtime", "trusts the local CA under `valetkey run`"),
            Seen::ByHand => Check::warning(
                "runtime",
                "trusts the local CA, but reads no HTTPS_PROXY: what it fetches goes past valetkey",
                "use a version that knows NODE_USE_ENV_PROXY (24), or undici's EnvHttpProxyAgent",
            ),
            Seen::Nothing => Check::warning(
                "runtime",
                "does not trust the local CA under `valetkey run`",
                runtime.fix,
            ),
        };
        report.add(check.about(runtime.name));
    }
    Ok(())
}

async fn visit<'a>(
    runtime: &'a Runtime,
    host: &Host,
    (variables, secret): (&ClientEnv, &[&str]),
) -> &'a Runtime {
    let mut command = Command::new(runtime.name);
    command.args((runtime.arguments)(&format!("https://{host}/{}", runtime.name)));
    command.envs(variables.iter());
    for name in secret {
        command.env_remove(name);
    }
    // Git would ask for a password.
    command.env("GIT_TERMINAL_PROMPT", "0");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Git fetches with a program of its own.
    let running = async {
        let (mut child, _group) = Group::start(&mut command)?;
        child.wait().await
    };
    let outcome = timeout(LIMIT, running).await;
    tracing::debug!(runtime = runtime.name, ?outcome, "visited");
    runtime
}

/// The paths of the pages that were fetched.
type Paths = Arc<Mutex<BTreeSet<String>>>;

/// A proxy that opens tunnels to one host only, which is itself.
struct Visited {
    address: SocketAddr,
    roots: Vec<CertificateDer<'static>>,
    paths: Paths,
}

impl Visited {
    /// With a leaf of the local CA, or of one in memory where there is none that speaks for all rules yet: to
    /// ask the doctor makes none.
    async fn open(config: &Config, host: &Host) -> Result<Self, Failure> {
        let (names, clock) = (config.ca_names(), Clock::system());
        let known = LocalCa::open_unchanged(&ca_dir(&config.paths), &names, clock.clone());
        let ca = match known.map_err(output::hinted)? {
            Some(ca) => ca,
            None => LocalCa::ephemeral(&names, clock).map_err(output::hinted)?,
        };
        let roots = ca.roots().iter().map(|root| root.der().clone()).collect();
        let leaves = Leaves::new(ca).map_err(output::hinted)?;
        let mut tls = ServerConfig::clone(&*leaves.server_config(host).map_err(output::hinted)?);
        // Enough to see whether a certificate is trusted; a server of HTTP/2 would make the program larger.
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let paths = Paths::default();
        let (noted, tasks) = (paths.clone(), Tasks::new());
        let serving = tasks.clone();
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serving.spawn(tunnel(stream, acceptor.clone(), noted.clone()));
            }
        });
        Ok(Self { address, roots, paths })
    }

    /// What a program has fetched.
    fn seen_of(&self, name: &str) -> Seen {
        let paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |page: &String| paths.iter().any(|path| path.starts_with(page.as_str()));
        match (has(&format!("/{name}/by-hand")), has(&format!("/{name}"))) {
            (true, _) => Seen::ByHand,
            (false, true) => Seen::Page,
            (false, false) => Seen::Nothing,
        }
    }
}

/// How far a program has come.
enum Seen {
    /// To its page.
    Page,
    /// To its page, once the tunnel was asked for by hand.
    ByHand,
    Nothing,
}

async fn tunnel(stream: TcpStream, acceptor: TlsAcceptor, seen: Paths) {
    let tasks = Tasks::new();
    let service = service_fn(move |request: Request<Incoming>| {
        let (acceptor, seen) = (acceptor.clone(), seen.clone());
        if request.method() == Method::CONNECT {
            tasks.spawn(async move {
                if let Ok(stream) = hyper::upgrade::on(request).await {
                    page(stream, acceptor, seen).await;
                }
            });
        }
        async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::new()))) }
    });
    let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    drop(serving.with_upgrades().await);
}

/// Answers every request, and notes its path. One that comes has trusted our certificate.
async fn page(stream: hyper::upgrade::Upgraded, acceptor: TlsAcceptor, seen: Paths) {
    let Ok(tls) = acceptor.accept(TokioIo::new(stream)).await else { return };
    let service = service_fn(move |request: Request<Incoming>| {
        let path = request.uri().path().to_owned();
        seen.lock().unwrap_or_else(PoisonError::into_inner).insert(path);
        async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok")))) }
    });
    drop(http1::Builder::new().serve_connection(TokioIo::new(tls), service).await);
}

/// Longest time for one program, which has its own limits below that where it knows any.
const LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::pin::pin;

    use tokio::sync::oneshot;

    use super::*;
    use crate::config::env::Environment;

    /// It goes on in a program of its own, as Git does. The folder is that of the certificates.
    fn begun_and_late(_url: &str) -> Vec<String> {
        let script = "exec 3>\"${SSL_CERT_FILE%/*}/pipe\"; sleep 61 & echo >&3; wait";
        ["-c", script].map(str::to_owned).into()
    }

    #[expect(clippy::disallowed_methods, reason = "who opens a pipe may wait for ever")]
    #[tokio::test]
    async fn nothing_of_a_program_that_takes_too_long_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let ((begin, begun), (leave, left)) = (oneshot::channel(), oneshot::channel());
        std::thread::spawn(move || {
            let mut pipe = std::fs::File::open(pipe).unwrap();
            pipe.read_exact(&mut [0]).unwrap();
            begin.send(()).unwrap();
            // Its end comes when nobody holds it any more.
            leave.send(pipe.read(&mut [0]).unwrap()).unwrap();
        });
        let proxy = SocketAddr::from(([127, 0, 0, 1], 1)).into();
        let (chain, bundle_path) = ("", None);
        let facts = Facts { proxy, system: &[], bundle: &[], own: &[], chain, bundle_path };
        let variables =
            ClientEnv::write(&facts, &Environment::default(), Folder::Here(folder.path())).unwrap();
        let runtime = Runtime { name: "sh", arguments: begun_and_late, fix: "" };
        let host = Host::parse("api.example").unwrap();
        {
            let mut visiting = pin!(visit(&runtime, &host, (&variables, &[])));
            tokio::select! {
                _ = &mut visiting => panic!("it has ended"),
                begun = begun => begun.unwrap(),
            }
            tokio::time::pause();
            visiting.await;
            tokio::time::resume();
        }
        assert_eq!(timeout(LIMIT, left).await.unwrap().unwrap(), 0);
    }
}
