//! Settles once, at the start, what the program runs on: flags, environment and files, in that order.

mod audit;
mod codex;
pub mod env;
mod file;
mod limits;
mod machine;
mod managed;
mod merge;
mod mistakes;
pub mod paths;
mod policy;
mod presets;
mod rule;
mod table;
mod terms;
mod text;
mod upstream;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::credential::{CredentialName, Grant, Keep};
use crate::limits::Limits;
use crate::origin::{Endpoint, Host};
use crate::rules::Rules;
use codex::CodexFiles;
use env::Environment;
use file::{Layer, Written};
use mistakes::Mistakes;
use paths::Paths;
use table::At;

pub use audit::AuditConfig;
pub use machine::MachineFiles;
pub use managed::Setting;
pub use mistakes::{ConfigErrors, Mistake};
pub use policy::PolicyFiles;
pub use terms::OnViolation;
pub use upstream::{
    BadProxy, BundleSetting, LoginSpec, ProxySetting, ProxyUrl, Trust, UpstreamConfig,
};

/// What the program runs on. Without mistakes: nobody has to check it again.
///
/// Layers, the highest first: the managed file, flags, environment, the user's file, the system's file, the
/// defaults, the presets in use. A setting is taken from the highest layer that has it, `use` and the listeners too.
/// Credentials and rules are taken from all; of rules with one name the highest counts, a credential
/// adjusts the ones of its kind below.
#[derive(Debug)]
pub struct Config {
    /// Where clients are heard; at least one.
    pub listeners: Vec<Listener>,
    /// What is done with targets and requests. No login is known to it yet.
    pub rules: Rules,
    /// What rules may use.
    pub credentials: BTreeMap<CredentialName, CredentialKind>,
    /// How upstreams are reached.
    pub upstream: UpstreamConfig,
    /// What clients may take; of connections as many as anybody wants.
    pub limits: Limits,
    /// Where files are.
    pub paths: Paths,
    /// Where else to write where the running proxy is, and where to read it.
    pub server_info: Option<PathBuf>,
    /// Which logins are allowed: read again whenever it is asked.
    pub policies: PolicyFiles,
    /// Where it is written down who asked for what.
    pub audit: AuditConfig,
    /// What becomes of the process when the login in use is no longer allowed.
    pub on_policy_violation: OnViolation,
    /// What the managed file settles, but for what `policies` reads.
    managed: Vec<Setting>,
}

/// What was typed as flags.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config`: the user's file.
    pub config: Option<PathBuf>,
    /// `--listen`: an address or a port, unparsed.
    pub listen: Option<String>,
    /// `--server-info`.
    pub server_info: Option<PathBuf>,
}

/// Where clients are heard, and which ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub address: ListenAddress,
    /// Users let in beside our own.
    pub allow_uids: Vec<u32>,
    /// Whether everybody needs a pass, our own user too.
    pub require_pass: bool,
    /// Clients speak TLS to it, and know it by these names, the usual one first; empty: without TLS.
    pub tls_names: Vec<Host>,
}

impl Listener {
    /// A listener for our own user.
    pub fn on(address: ListenAddress) -> Self {
        Self { address, allow_uids: Vec::new(), require_pass: false, tls_names: Vec::new() }
    }

    /// Whether other machines may reach it.
    pub fn is_beyond_loopback(&self) -> bool {
        match &self.address {
            ListenAddress::Tcp(address) => !address.ip().to_canonical().is_loopback(),
            ListenAddress::Unix(_) => false,
        }
    }
}

/// The address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// An IP address; port 0 takes a free one.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl ListenAddress {
    /// An address as clients on this machine reach it: all addresses by loopback.
    pub fn from_here(address: SocketAddr) -> SocketAddr {
        let here = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(here, address.port())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ListenAddress {
    /// An address as a file has it; `home` is the home folder, for `unix:~/`.
    fn written(text: &str, home: Option<&Path>) -> Result<Self, &'static str> {
        match text.strip_prefix("unix:~/").zip(home) {
            Some((inside, home)) => Ok(Self::Unix(home.join(inside))),
            None => text.parse(),
        }
    }

    /// An address as somebody types it: a port alone, and `localhost`, are on this machine.
    fn typed(text: &str, home: Option<&Path>) -> Result<Self, &'static str> {
        let port = text.strip_prefix("localhost:").unwrap_or(text);
        match port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse()) {
            Some(Ok(port)) => Ok(Self::Tcp((Ipv4Addr::LOCALHOST, port).into())),
            _ => Self::written(text, home),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err("the path of a Unix socket starts with `/` or `~/`"),
            None => text
                .parse::<SocketAddr>()
                .map(Self::Tcp)
                .map_err(|_| "expected an IP address and a port, as in `127.0.0.1:8377`"),
        }
    }
}

/// What a credential is, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialKind {
    /// The key of a service.
    ApiKey {
        /// Where it comes from.
        source: SourceSpec,
    },
    /// What a Codex cache holds: an API key or a ChatGPT login.
    Codex {
        /// The folder of the cache.
        home: PathBuf,
        /// Where in it, or elsewhere, the login is kept.
        keep: Keep,
    },
    /// A login at any other OAuth issuer.
    OAuth(OAuthConfig),
}

impl CredentialKind {
    /// Where a secret comes from that is only read: a key, or what a client proves itself with.
    pub fn source(&self) -> Option<&SourceSpec> {
        match self {
            Self::ApiKey { source } => Some(source),
            Self::Codex { .. } => None,
            Self::OAuth(oauth) => oauth.client_secret.as_ref(),
        }
    }
}

impl fmt::Display for SourceSpec {
    /// As the configuration has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// How one signs in at an OAuth issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OAuthConfig {
    /// The issuer, which publishes its metadata (RFC 8414).
    pub issuer: Endpoint,
    /// The client that we are registered as.
    pub client_id: String,
    /// Where a client's secret comes from that is not public.
    pub client_secret: Option<SourceSpec>,
    /// What is asked for; may be empty.
    pub scopes: Vec<String>,
    /// The API that the tokens are for.
    pub audience: Option<String>,
    /// How a login comes to be.
    pub grant: Grant,
    /// Where the login is kept.
    pub keep: Keep,
}

/// Where the value of a credential comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A variable of our environment.
    Env(String),
    /// A file, which may not exist.
    File(PathBuf),
}

impl Config {
    /// The hosts that the local CA must be able to sign for: those of rules, and what listeners with TLS are called.
    pub fn ca_names(&self) -> Vec<Host> {
        let of_listeners = self.listeners.iter().flat_map(|listener| &listener.tls_names).cloned();
        let mut hosts: Vec<Host> = self.rules.constraints();
        hosts.extend(of_listeners);
        hosts.sort();
        hosts.dedup();
        hosts
    }

    /// The files that it was read from or would be, there or not: a change of one may make it another.
    pub fn files(&self) -> Vec<PathBuf> {
        self.policies.settings_files()
    }

    /// Reads everything.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] with every mistake in every layer.
    pub fn load(overrides: &Overrides, env: &Environment) -> Result<Self, ConfigErrors> {
        Self::load_on(&MachineFiles::default(), overrides, env)
    }

    /// [`Config::load`] on a machine with other files of its owner: a test's. Nothing that a user types
    /// or sets leads here.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn load_on(
        machine: &MachineFiles,
        overrides: &Overrides,
        env: &Environment,
    ) -> Result<Self, ConfigErrors> {
        let mistakes = Mistakes::default();
        let named = overrides.config.clone().or_else(|| env.get(env::CONFIG).map(PathBuf::from));
        let is_named = named.is_some();
        let paths = match Paths::find(env, named) {
            Ok(paths) => paths,
            Err(error) => {
                mistakes.add_nowhere(error, "set HOME to the folder of the user valetkey runs as");
                return Err(mistakes.take_errors());
            }
        };
        let managed = machine.open_managed(&mistakes);
        let user = Written::open(&paths.config_file, is_named, &mistakes);
        let system = Written::open(&machine.system, false, &mistakes);
        let files = [managed, user, system].into_iter().flatten().collect();
        Self::assemble(files, paths, &Given { machine, overrides, env }, &mistakes)
    }

    /// `files` are the ones that exist, the highest first.
    fn assemble(
        mut files: Vec<Written>,
        paths: Paths,
        given: &Given<'_>,
        mistakes: &Mistakes,
    ) -> Result<Self, ConfigErrors> {
        let Given { machine, overrides, env } = *given;
        let home = paths::home(env);
        let read = |written: &Written| Layer::read(written, home.as_deref(), mistakes);
        files.push(presets::defaults());
        let mut layers: Vec<Layer> = files.iter().map(read).collect();
        let (presets, all_known) = presets::chosen(&layers, mistakes);
        layers.extend(presets.iter().map(read));
        // What could not be read may name a credential.
        let all_known = all_known && !layers.iter().any(|layer| layer.is_garbled);

        let listen = typed(("--listen", overrides.listen.as_deref()), env::LISTEN, env, mistakes);
        let listen = listen.and_then(|text| {
            text.parse(mistakes, |text| ListenAddress::typed(text, home.as_deref()))
        });
        let listeners = merge::listeners(listen.map(|address| address.value), &layers);
        let upstream = UpstreamConfig::merge(&layers, env, mistakes);
        let mut credentials = merge::credentials(&layers, &paths.codex_home, all_known, mistakes);
        let codex = CodexFiles::read(machine, codex::homes(&credentials), mistakes);
        codex::settle_keep(&mut credentials, &layers, &codex);
        let default = layers.iter().find_map(|layer| layer.default).unwrap_or_default();
        let on_violation = layers.iter().find_map(|layer| layer.on_violation).unwrap_or_default();
        // The highest that speaks of it decides alone: nobody takes half of it back.
        let audit = layers.iter().find_map(|layer| layer.audit.clone()).unwrap_or_default();
        let managed = managed::settings(&layers, machine);
        let limits = limits::merge(&layers);
        let forms = merge::rules(layers);
        merge::check(&forms, &credentials, all_known, mistakes);
        mistakes.finish()?;

        let known = |(name, kind): (_, Option<CredentialKind>)| Some((name, kind?));
        let server_info = overrides.server_info.clone();
        Ok(Self {
            listeners,
            rules: Rules::new(forms.into_iter().filter_map(|form| form.rule).collect(), default),
            credentials: credentials.into_iter().filter_map(known).collect(),
            upstream,
            limits,
            policies: PolicyFiles::new(machine.clone(), paths.config_file.clone()),
            audit: audit.settle(&paths),
            on_policy_violation: on_violation,
            managed,
            paths,
            server_info: server_info.or_else(|| env.get(env::SERVER_INFO).map(PathBuf::from)),
        })
    }
}

/// The value of a flag, else that of its variable.
fn typed(
    (flag, value): (&str, Option<&str>),
    variable: &str,
    env: &Environment,
    mistakes: &Mistakes,
) -> Option<At<String>> {
    let (name, value) = match value {
        Some(value) => (flag, value.to_owned()),
        None => (variable, env.text(variable)?),
    };
    let place = mistakes.open(name, &value);
    Some(At { value, place })
}

/// What a configuration is made of, but for our own files.
struct Given<'a> {
    machine: &'a MachineFiles,
    overrides: &'a Overrides,
    env: &'a Environment,
}

#[cfg(test)]
mod tests;
