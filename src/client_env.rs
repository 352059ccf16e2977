//! The variables that a client program needs to go through the proxy and to trust it: one list for
//! `run`, `env` and whoever sets a client up.

mod before;
mod git;
mod java;
mod proxy_url;
mod wget;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::Permissions;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;

pub use self::proxy_url::ProxyUrl;
use crate::config::env::{Environment, UPSTREAM_CA_BUNDLE, UPSTREAM_PROXY};
use crate::tls::{file, pem, pkcs12};

/// Variables whose file *replaces* the client's own roots: they get everything.
const REPLACING: [&str; 13] = [
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
    "pnpm_config_cafile",
];

/// Variables whose file is *added* to the client's own roots: they get all but the system's.
const ADDING: [&str; 2] = ["CODEX_CA_CERTIFICATE", "NODE_EXTRA_CA_CERTS"];

/// Variables that name the proxy for what goes through ours. gRPC, cargo, npm, pip and pnpm look at their own first,
/// where also a file of the user's may name another one.
const PROXIES: [&str; 7] = [
    "CARGO_HTTP_PROXY",
    "HTTPS_PROXY",
    "PIP_PROXY",
    "grpc_proxy",
    "https_proxy",
    "npm_config_https_proxy",
    "pnpm_config_https_proxy",
];

/// Variables in which the user may have named another proxy for one program, in lower case. It would go past ours.
const OF_ONE_PROGRAM: [&str; 4] =
    ["cargo_http_proxy", "npm_config_https_proxy", "pip_proxy", "pnpm_config_https_proxy"];

fn of_one_program(env: &Environment) -> impl Iterator<Item = &str> {
    env.names().filter(|name| OF_ONE_PROGRAM.contains(&name.to_ascii_lowercase().as_str()))
}

/// The three in which gcloud has its proxy where the user has named one for it: host, port and type.
const GCLOUD_PROXY: [&str; 3] =
    ["CLOUDSDK_PROXY_ADDRESS", "CLOUDSDK_PROXY_PORT", "CLOUDSDK_PROXY_TYPE"];

/// Variables of hosts that are reached without a proxy.
const PAST: [&str; 3] = ["NO_PROXY", "no_grpc_proxy", "no_proxy"];

/// Has Node look at the variables at all.
const OF_NODE: &str = "NODE_USE_ENV_PROXY";

/// Hosts that clients reach without the proxy, besides those of the user's own `NO_PROXY`.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Whether clients reach a host without the proxy, as it is written in a URL.
pub fn is_reached_directly(host: &str) -> bool {
    LOCAL.contains(&host.trim_matches(['[', ']']))
}

/// What a client's environment is made from.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Where clients find the proxy.
    pub proxy: ProxyUrl,
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

/// The folder that certificate files are written into, for whom.
#[derive(Clone, Copy, Debug)]
pub enum Folder<'a> {
    /// For programs of this machine.
    Here(&'a Path),
    /// For a container, which sees it at [`IN_CONTAINER`] and has a home and settings of its own.
    Mounted(&'a Path),
}

/// Where a container sees the folder.
pub const IN_CONTAINER: &str = "/run/valetkey";

/// Variables to set, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientEnv(BTreeMap<String, OsString>);

impl ClientEnv {
    /// Writes the files that the variables name into a folder, and makes the variables.
    ///
    /// A variable that is set already keeps the certificates of its file: each distinct former value
    /// gets a file of its own. One that cannot be read is left out, with a warning in the log.
    /// Where they are set already, they are made from what was there before. Several may write into one folder.
    ///
    /// # Errors
    ///
    /// Those of writing to the folder.
    pub fn write(facts: &Facts<'_>, env: &Environment, folder: Folder<'_>) -> io::Result<Self> {
        let mut set = BTreeMap::new();
        let mut files = Files { facts, folder, written: BTreeMap::new() };
        let env = &folder.reached_by(&before::restored(env));
        for name in REPLACING {
            set.insert(name.to_owned(), files.file(env.get(name).map(PathBuf::from), true)?);
        }
        for name in ADDING {
            set.insert(name.to_owned(), files.file(env.get(name).map(PathBuf::from), false)?);
        }
        for (name, proxy) in without_logins(env) {
            set.insert(name.to_owned(), proxy.into());
        }
        for name in PROXIES.into_iter().chain(of_one_program(env)) {
            set.insert(name.to_owned(), facts.proxy.as_str().into());
        }
        set.extend(git::setting(&facts.proxy, env));
        if env.get(GCLOUD_PROXY[0]).is_some() {
            let port = facts.proxy.port().to_string();
            let values = [facts.proxy.host(), &port, "http"];
            set.extend(
                GCLOUD_PROXY.iter().zip(values).map(|(name, it)| ((*name).into(), it.into())),
            );
        }
        let no_proxy = no_proxy(env);
        for name in PAST {
            set.insert(name.to_owned(), no_proxy.clone().into());
        }
        let former = env.text(java::VARIABLE);
        let options = java::options(former, (&facts.proxy, &no_proxy), &files.java()?);
        set.insert(java::VARIABLE.to_owned(), options);
        set.insert(wget::VARIABLE.to_owned(), files.wgetrc(env)?);
        set.insert(OF_NODE.to_owned(), "1".into());
        if let Folder::Here(_) = folder {
            set.insert(UPSTREAM_PROXY.to_owned(), facts.chain.into());
            let bundle_path = facts.bundle_path.map(Path::as_os_str).unwrap_or_default();
            set.insert(UPSTREAM_CA_BUNDLE.to_owned(), bundle_path.to_owned());
            set.insert(before::VARIABLE.to_owned(), before::kept(env).into());
        }
        Ok(Self(set))
    }

    /// Whether an environment is one that the variables are set in, by whichever valetkey of this machine.
    pub fn is_set_in(env: &Environment) -> bool {
        let added = env.get(ADDING[0]).map(Path::new).and_then(Path::file_name);
        let is_ours = added.is_some_and(|name| name.to_string_lossy().starts_with(ADDED));
        is_ours && env.stated(UPSTREAM_PROXY).is_some()
    }

    /// What takes the variables back in an environment that they are set in: each with what it is to be then, or `None`
    /// where it is to be unset. What was there before comes back, but for a proxy that had a login; what somebody has set
    /// since stays.
    pub fn taken_back(env: &Environment) -> BTreeMap<String, Option<String>> {
        before::taken_back(env)
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&OsString> {
        self.0.get(name)
    }

    /// The variables, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &OsString)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl Folder<'_> {
    /// What counts of our environment: for a container no more than certificates, which it gets a copy of, and the
    /// hosts to be reached without a proxy.
    fn reached_by(&self, env: &Environment) -> Environment {
        match self {
            Self::Here(_) => env.clone(),
            Self::Mounted(_) => {
                let names = REPLACING.into_iter().chain(ADDING).chain(["NO_PROXY", "no_proxy"]);
                Environment::from_pairs(names.filter_map(|name| Some((name, env.get(name)?))))
            }
        }
    }

    /// Writes a file that is named by its contents, so that whoever writes the same folder at the same time
    /// writes the same file, and one that a client reads never changes. Gives the path that the client knows.
    fn write_once(
        &self,
        (kind, ending): (&str, &str),
        contents: &[u8],
        mode: u32,
    ) -> io::Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        contents.hash(&mut hasher);
        let name = format!("{kind}-{:016x}{ending}", hasher.finish());
        let (Self::Here(dir) | Self::Mounted(dir)) = self;
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(contents)?;
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.persist(dir.join(&name))?;
        Ok(match self {
            Self::Here(dir) => dir.join(name),
            Self::Mounted(_) => Path::new(IN_CONTAINER).join(name),
        })
    }
}

/// What the names of files start with that are added to a client's own roots.
const ADDED: &str = "added";

/// What the names of files start with that replace them.
const ROOTS: &str = "roots";

/// What the names of wget's settings start with.
const SETTINGS: &str = "wgetrc";

/// Certificates are for everybody who is let into their folder: in a container that may be another user.
const PUBLIC: u32 = 0o644;
/// What was the user's may hold a password.
const PRIVATE: u32 = 0o600;

/// The files of one client environment: of certificates one for each distinct former value.
struct Files<'a> {
    facts: &'a Facts<'a>,
    folder: Folder<'a>,
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
        let kind = if with_system { ROOTS } else { ADDED };
        let path =
            self.folder.write_once((kind, ".pem"), pem::write_pem(&all).as_bytes(), PUBLIC)?;
        let value = path.clone().into();
        self.written.insert(key, path);
        Ok(value)
    }

    /// Java's trust store, which replaces its own roots.
    fn java(&self) -> io::Result<PathBuf> {
        let all = [self.facts.system, self.facts.bundle, self.facts.own].concat();
        self.folder.write_once((ROOTS, ".p12"), &pkcs12::trust_store(&all), PUBLIC)
    }

    /// wget's settings: those of the user, then ours.
    fn wgetrc(&mut self, env: &Environment) -> io::Result<OsString> {
        let roots = PathBuf::from(self.file(None, true)?);
        let theirs = wget::settings_of_user(env);
        // Without theirs a container may read it.
        let mode = if theirs.is_empty() { PUBLIC } else { PRIVATE };
        let settings = wget::settings(theirs, &self.facts.proxy, &roots);
        Ok(self.folder.write_once((SETTINGS, ""), &settings, mode)?.into())
    }
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
const OF_PROXIES: [&str; 15] = [
    "all_proxy",
    "cargo_http_proxy",
    "ftp_proxy",
    "grpc_proxy",
    "http_proxy",
    "https_proxy",
    "npm_config_http_proxy",
    "npm_config_https_proxy",
    "npm_config_proxy",
    "pnpm_config_proxy",
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
    use std::net::SocketAddr;

    use super::*;

    pub(super) fn made_from(env: &Environment) -> ClientEnv {
        let folder = tempfile::tempdir().unwrap();
        let proxy = SocketAddr::from(([127, 0, 0, 1], 8377)).into();
        let (chain, bundle_path) = ("", None);
        let facts = Facts { proxy, system: &[], bundle: &[], own: &[], chain, bundle_path };
        ClientEnv::write(&facts, env, Folder::Here(folder.path())).unwrap()
    }

    #[test]
    fn what_names_no_proxy_is_left_as_it_is() {
        let others = ["GOPROXY", "INPUT_HTTP-PROXY", "SSH_PROXY", "x;cmd;proxy"];
        let env = Environment::from_pairs(others.map(|name| (name, "https://u:p@corp,direct")));
        assert!(made_from(&env).iter().all(|(name, _)| !others.contains(&name)));
    }

    #[test]
    fn a_proxy_of_one_program_gives_way() {
        let names = ["CARGO_HTTP_PROXY", "NPM_CONFIG_HTTPS_PROXY", "PIP_PROXY"];
        let theirs = names.map(|name| (name, "http://me:pa55@corp:3128"));
        let made = made_from(&Environment::from_pairs(theirs));
        for name in names {
            let found = made.iter().find(|(it, _)| *it == name).unwrap();
            assert_eq!(found.1, "http://127.0.0.1:8377", "{name}");
        }
        let is_gcloud = |(name, _): &(&str, &OsString)| GCLOUD_PROXY.contains(name);
        assert_eq!(made.iter().filter(is_gcloud).count(), 0);
        let env = Environment::from_pairs([("CLOUDSDK_PROXY_ADDRESS", "corp")]);
        let made = made_from(&env);
        let values: Vec<_> = made.iter().filter(is_gcloud).map(|(_, value)| value).collect();
        assert_eq!(values, ["127.0.0.1", "8377", "http"]);
    }

    /// Nobody writes to it, and who opens it for reading would wait.
    #[expect(clippy::disallowed_methods, reason = "who opens a pipe may wait for ever")]
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
            for name in ["ALL_PROXY", "FTP_PROXY", "http_proxy", "npm_config_proxy"] {
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
