//! What a service of a user's is started with, whoever starts it: systemd or launchd.

use std::path::{Path, PathBuf};

use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::config::env::{CONFIG, Environment, UPSTREAM_CA_BUNDLE};
use crate::config::{Config, CredentialKind, LoginSpec, MachineFiles, SourceSpec};

/// What a service is started with.
pub(super) struct Service<'a> {
    pub(super) exe: &'a Path,
    pub(super) config: &'a Config,
    /// Whether the owner of the machine has settled something, in a file that must be root's.
    pub(super) is_managed: bool,
    /// The configuration that was named, if one was.
    pub(super) config_file: Option<PathBuf>,
    /// Variables that it needs.
    pub(super) environment: Vec<(&'static str, String)>,
}

impl<'a> Service<'a> {
    /// The same as this command runs on.
    ///
    /// # Errors
    ///
    /// [`Failure`] of the system.
    pub(super) fn of(typed: &Typed, config: &'a Config, exe: &'a Path) -> Result<Self, Failure> {
        let named = typed.overrides.config.clone();
        let named = named.or_else(|| typed.env.get(CONFIG).map(Into::into));
        let config_file = named.map(std::path::absolute).transpose()?;
        let (environment, is_managed) =
            (environment(&typed.env, config), MachineFiles::default().managed.exists());
        Ok(Self { exe, config, is_managed, config_file, environment })
    }

    /// The folders that it writes to.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        let paths = &self.config.paths;
        let homes = self.config.credentials.values().filter_map(|kind| match kind {
            CredentialKind::Codex { home, .. } => Some(home.clone()),
            _ => None,
        });
        let mut folders: Vec<PathBuf> =
            [paths.data_dir.clone(), paths.state_dir.clone()].into_iter().chain(homes).collect();
        folders.sort();
        folders.dedup();
        folders
    }
}

fn environment(env: &Environment, config: &Config) -> Vec<(&'static str, String)> {
    let mut carried: Vec<_> =
        CARRIED.into_iter().filter_map(|name| Some((name, env.text(name)?))).collect();
    // Whichever variable names the company's bundle: this one wins over all of them.
    let bundle = config.upstream.ca_bundles.first().filter(|it| env.get(it.named_by).is_some());
    if let Some(path) = bundle.and_then(|bundle| bundle.path.to_str()) {
        carried.push((UPSTREAM_CA_BUNDLE, path.to_owned()));
    }
    carried
}

/// Says what of this shell a service will not have, and how else it may get it; `edit` is what changes its
/// variables, where something does.
pub(super) fn warn(config: &Config, exe: &Path, edit: Option<&str>) {
    if is_in_build_folder(exe) {
        output::warning("this binary is in a build folder");
        output::hint("first: cargo install --locked --path .");
    }
    let or = edit.map(|edit| format!(", or: {edit}")).unwrap_or_default();
    for Unseen { variable, of, key } in unseen(config) {
        output::warning(format_args!("the service does not see {variable} ({of})"));
        output::hint(format_args!("use {key} = \"file:/path\"{or}"));
    }
    warn_of_proxy(config);
}

/// Whether cargo has built a program here and nobody has installed it.
fn is_in_build_folder(exe: &Path) -> bool {
    let Some(folder) = exe.parent() else { return false };
    let is_profile = folder.ends_with("debug") || folder.ends_with("release");
    is_profile && folder.components().any(|part| part.as_os_str() == "target")
}

/// A secret that is in a variable, which a service does not see.
#[derive(Debug, PartialEq, Eq)]
struct Unseen<'a> {
    variable: &'a str,
    /// What needs it.
    of: String,
    /// The key that names it, and may name a file.
    key: &'static str,
}

fn unseen(config: &Config) -> Vec<Unseen<'_>> {
    let of_credentials = config.credentials.iter().filter_map(|(name, kind)| {
        let key = if matches!(kind, CredentialKind::OAuth(_)) { "client_secret" } else { "source" };
        let of = format!("credential \"{name}\"");
        kind.source().and_then(variable).map(|variable| Unseen { variable, of, key })
    });
    let of_chain = config.upstream.proxy_login.iter().filter_map(|login| match login {
        LoginSpec::Source(source) => variable(source),
        LoginSpec::Command(_) => None,
    });
    let key = "proxy_login";
    let of_chain = of_chain.map(|variable| Unseen { variable, of: "[upstream]".to_owned(), key });
    of_credentials.chain(of_chain).collect()
}

fn variable(source: &SourceSpec) -> Option<&str> {
    match source {
        SourceSpec::Env(name) => Some(name),
        SourceSpec::File(_) => None,
    }
}

/// Says that a proxy which only a variable names is not known to a service. It may hold a password, which is not
/// for a file that everybody reads.
fn warn_of_proxy(config: &Config) {
    let Some(proxy) = config.upstream.proxies.first() else { return };
    if !proxy.named_by.contains('.') {
        output::warning(format_args!("the service does not see {} of this shell", proxy.named_by));
        output::hint(format_args!(
            "in {}: [upstream] with proxy = \"{}\"",
            config.paths.config_file.display(),
            proxy.url
        ));
    }
}

/// A path as text, which generated files are made of.
///
/// # Errors
///
/// [`Failure`] for one that is not UTF-8.
pub(super) fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| {
        Failure::new(format!("{}: the path is not UTF-8", path.display()))
            .hint("choose a folder whose name is")
    })
}

/// Variables of this shell that the service gets too, which say where files are. None holds a secret; what holds
/// one is for the configuration to name a file of.
const CARRIED: [&str; 4] = ["CODEX_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"];

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::Overrides;

    /// A configuration of this text, on a machine whose owner says nothing.
    pub(in super::super) fn configured(text: &str, env: &Environment) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        let overrides = Overrides { config: Some(file), ..Overrides::default() };
        let owner = rustix::process::geteuid().as_raw();
        let machine = MachineFiles::below(dir.path(), owner);
        Config::load_on(&machine, &overrides, env).unwrap()
    }

    /// A service that this environment starts.
    pub(in super::super) fn service<'a>(config: &'a Config, env: &Environment) -> Service<'a> {
        let environment = environment(env, config);
        Service { exe: Path::new(EXE), config, is_managed: false, config_file: None, environment }
    }

    #[test]
    fn variables_that_a_service_does_not_see() {
        let env = Environment::from_pairs([("HOME", "/home/me"), ("KEY", "set here")]);
        let text = "[upstream]\nproxy = \"http://corp:1\"\nproxy_login = \"env:CORP\"\n\
                    [credentials.x]\nkind = \"api_key\"\nsource = \"env:KEY\"\n\
                    [credentials.y]\nkind = \"api_key\"\nsource = \"file:/key\"\n\
                    [credentials.z]\nkind = \"oauth\"\nissuer = \"https://login.example\"\n\
                    client_id = \"c\"\nclient_secret = \"env:SECRET\"\n";
        let config = configured(text, &env);
        let unseen = unseen(&config);
        let told: Vec<_> = unseen.iter().map(|it| (it.variable, &*it.of, it.key)).collect();
        let expected = [
            ("KEY", "credential \"x\"", "source"),
            ("SECRET", "credential \"z\"", "client_secret"),
            ("CORP", "[upstream]", "proxy_login"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn binaries_that_are_not_installed() {
        let table = [
            (EXE, false),
            ("/home/me/valetkey/target/debug/valetkey", true),
            ("/home/me/valetkey/target/release/valetkey", true),
            ("/home/me/valetkey/target/aarch64-unknown-linux-musl/release/valetkey", true),
            ("/opt/target/valetkey", false),
            ("/opt/release/valetkey", false),
        ];
        for (exe, expected) in table {
            assert_eq!(is_in_build_folder(Path::new(exe)), expected, "{exe}");
        }
    }

    const EXE: &str = "/home/me/.cargo/bin/valetkey";
}
