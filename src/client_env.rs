//! The variables that a client program needs to go through the proxy and to trust it: one list for
//! `run`, `env` and whoever sets a client up.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;

use crate::config::env::{Environment, UPSTREAM_CA_BUNDLE, UPSTREAM_PROXY};
use crate::tls::{file, pem};

/// Variables whose file *replaces* the client's own roots: they get everything.
const REPLACING: [&str; 12] = [
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "CURL_CA_BUNDLE",
    "DENO_CERT",
    "GIT_SSL_CAINFO",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "NIX_SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "npm_config_cafile",
];

/// Variables whose file is *added* to the client's own roots: they get all but the system's.
const ADDING: [&str; 2] = ["CODEX_CA_CERTIFICATE", "NODE_EXTRA_CA_CERTS"];

/// Variables that name the proxy for what goes through ours.
const PROXIES: [&str; 3] = ["HTTPS_PROXY", "grpc_proxy", "https_proxy"];

/// Hosts that clients reach without the proxy, besides those of the user's own `NO_PROXY`.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What a client's environment is made from.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The proxy's address.
    pub proxy: SocketAddr,
    /// The system's roots.
    pub system: &'a [CertificateDer<'static>],
    /// The company's certificates.
    pub bundle: &'a [CertificateDer<'static>],
    /// Our own roots.
    pub own: &'a [CertificateDer<'static>],
    /// The chain in force, without a password; empty for none.
    pub chain: &'a str,
    /// The company's bundle in force, by its path.
    pub bundle_path: Option<&'a Path>,
}

/// Variables to set, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientEnv(BTreeMap<String, OsString>);

impl ClientEnv {
    /// Writes the certificate files that the variables name into `dir`, and makes the variables.
    ///
    /// A variable that is set already keeps the certificates of its file: each distinct former value
    /// gets a file of its own. One that cannot be read is left out, with a warning in the log.
    /// Several may write into one folder.
    ///
    /// # Errors
    ///
    /// Those of writing to `dir`.
    pub fn write(facts: &Facts<'_>, env: &Environment, dir: &Path) -> io::Result<Self> {
        let mut set = BTreeMap::new();
        let mut files = Files { facts, dir, written: BTreeMap::new() };
        for name in REPLACING {
            set.insert(name.to_owned(), files.file(env.get(name).map(PathBuf::from), true)?);
        }
        for name in ADDING {
            set.insert(name.to_owned(), files.file(env.get(name).map(PathBuf::from), false)?);
        }
        for (name, proxy) in without_logins(env) {
            set.insert(name.to_owned(), proxy.into());
        }
        let proxy = format!("http://{}", facts.proxy);
        // gRPC looks at its own first.
        for name in PROXIES {
            set.insert(name.to_owned(), proxy.clone().into());
        }
        let no_proxy = no_proxy(env);
        for name in ["NO_PROXY", "no_proxy", "no_grpc_proxy"] {
            set.insert(name.to_owned(), no_proxy.clone().into());
        }
        set.insert("NODE_USE_ENV_PROXY".to_owned(), "1".into());
        set.insert(UPSTREAM_PROXY.to_owned(), facts.chain.into());
        let bundle_path = facts.bundle_path.map(Path::as_os_str).unwrap_or_default();
        set.insert(UPSTREAM_CA_BUNDLE.to_owned(), bundle_path.to_owned());
        Ok(Self(set))
    }

    /// The variables, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &OsString)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

/// The certificate files of one client environment, one for each distinct former value.
struct Files<'a> {
    facts: &'a Facts<'a>,
    dir: &'a Path,
    written: BTreeMap<(Option<PathBuf>, bool), PathBuf>,
}

impl Files<'_> {
    fn file(&mut self, former: Option<PathBuf>, with_system: bool) -> io::Result<OsString> {
        let key = (former, with_system);
        if let Some(path) = self.written.get(&key) {
            return Ok(path.into());
        }
        let former = key.0.as_deref().map(certificates_of).unwrap_or_default();
        let system = if with_system { self.facts.system } else { &[] };
        let all = [system, self.facts.bundle, &former, self.facts.own].concat();
        let kind = if with_system { "roots" } else { "added" };
        let path = write_once(self.dir, kind, &pem::write_pem(&all))?;
        let value = path.clone().into();
        self.written.insert(key, path);
        Ok(value)
    }
}

/// Writes a file that is named by its contents, so that whoever writes the same folder at the same time
/// writes the same file, and one that a client reads never changes.
fn write_once(dir: &Path, kind: &str, contents: &str) -> io::Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    let path = dir.join(format!("{kind}-{:016x}.pem", hasher.finish()));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(contents.as_bytes())?;
    file.persist(&path)?;
    Ok(path)
}

fn certificates_of(path: &Path) -> Vec<CertificateDer<'static>> {
    let read = file::read(path).map_err(|error| error.to_string());
    match read.and_then(|bytes| pem::read(&bytes).map_err(|error| error.to_string())) {
        Ok(bundle) => bundle.certificates,
        Err(error) => {
            let file = path.display();
            tracing::warn!(%file, %error, "left out a certificate file of the environment");
            Vec::new()
        }
    }
}

/// Variables that name a proxy with a login, without it: those for plain HTTP and whatever else does not go through
/// ours are the client's, and only what they say of the host.
pub fn without_logins(env: &Environment) -> impl Iterator<Item = (&str, String)> {
    let is_of_a_proxy = |name: &&str| OF_PROXIES.contains(&name.to_ascii_lowercase().as_str());
    let names = env.names().filter(is_of_a_proxy);
    names.filter_map(|name| Some((name, without_login(&env.text(name)?)?)))
}

/// Variables whose values are the URL of one proxy, in lower case. Others are something else: `GOPROXY` is a list of
/// servers of modules.
const OF_PROXIES: [&str; 14] = [
    "all_proxy",
    "cargo_http_proxy",
    "ftp_proxy",
    "grpc_proxy",
    "http_proxy",
    "https_proxy",
    "npm_config_http_proxy",
    "npm_config_https_proxy",
    "npm_config_proxy",
    "rsync_proxy",
    "socks_proxy",
    "valetkey_upstream_proxy",
    "ws_proxy",
    "wss_proxy",
];

/// A proxy without its user and password, however they are written; `None` where it has none.
fn without_login(proxy: &str) -> Option<String> {
    let (before, host) = proxy.rsplit_once('@')?;
    let is_scheme = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match before.split_once("://") {
        Some((scheme, _)) if is_scheme(scheme) => Some(format!("{scheme}://{host}")),
        _ => Some(host.to_owned()),
    }
}

/// What the user's own variable has programs reach without a proxy.
pub fn their_no_proxy(env: &Environment) -> String {
    env.text("no_proxy").or_else(|| env.text("NO_PROXY")).unwrap_or_default()
}

/// The user's own list, then ours; nothing twice.
fn no_proxy(env: &Environment) -> String {
    let theirs = their_no_proxy(env);
    let mut hosts: Vec<&str> =
        theirs.split(',').map(str::trim).filter(|host| !host.is_empty()).collect();
    hosts.extend(LOCAL.iter().filter(|host| !theirs.split(',').any(|own| own.trim() == **host)));
    hosts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_from(env: &Environment) -> ClientEnv {
        let folder = tempfile::tempdir().unwrap();
        let (proxy, chain, bundle_path) = (([127, 0, 0, 1], 8377).into(), "", None);
        let facts = Facts { proxy, system: &[], bundle: &[], own: &[], chain, bundle_path };
        ClientEnv::write(&facts, env, folder.path()).unwrap()
    }

    #[test]
    fn what_names_no_proxy_is_left_as_it_is() {
        let others = ["GOPROXY", "INPUT_HTTP-PROXY", "SSH_PROXY", "x;cmd;proxy"];
        let env = Environment::from_pairs(others.map(|name| (name, "https://u:p@corp,direct")));
        assert!(made_from(&env).iter().all(|(name, _)| !others.contains(&name)));
    }

    /// Nobody writes to it, and who opens it for reading would wait.
    #[cfg(unix)]
    #[test]
    fn a_pipe_is_no_file_of_certificates() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let env = Environment::from_pairs([("SSL_CERT_FILE", pipe)]);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(made_from(&env)));
        let made = receiver.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert!(made.iter().any(|(name, _)| name == "SSL_CERT_FILE"));
    }

    #[test]
    fn other_proxies_lose_their_login() {
        let table = [
            (None, None),
            (Some(""), None),
            (Some("http://proxy.corp:3128"), None),
            (Some("proxy.corp:3128"), None),
            (Some("http://me:pa55@proxy.corp:3128/"), Some("http://proxy.corp:3128/")),
            (Some("socks5h://me:pa55@[::1]:1080"), Some("socks5h://[::1]:1080")),
            (Some("me:pa55@proxy.corp:3128"), Some("proxy.corp:3128")),
            (Some("me@proxy.corp"), Some("proxy.corp")),
            (Some("http://me:pa@55@proxy.corp"), Some("http://proxy.corp")),
            (Some("http://me:pa/55@proxy.corp"), Some("http://proxy.corp")),
            (Some("me:pa://55@proxy.corp"), Some("proxy.corp")),
        ];
        for (value, expected) in table {
            for name in ["ALL_PROXY", "FTP_PROXY", "http_proxy", "npm_config_https_proxy"] {
                let env = Environment::from_pairs(value.map(|value| (name, value)));
                let made = made_from(&env);
                let found = made.iter().filter(|(it, _)| *it == name);
                let found: Vec<_> =
                    found.map(|(it, value)| (it, value.to_str().unwrap())).collect();
                assert_eq!(found, expected.map(|it| (name, it)).into_iter().collect::<Vec<_>>());
            }
        }
    }
}
