//! Settles how upstreams are reached: which roots are trusted, through which chain, under which names.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use url::Url;
use zeroize::Zeroizing;

use super::SourceSpec;
use super::env::{Environment, UPSTREAM_CA_BUNDLE, UPSTREAM_PROXY};
use super::file::Layer;
use super::mistakes::Mistakes;
use super::table::At;
use crate::origin::{Host, ProxyScheme, Target};

/// How upstreams are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Which roots are trusted.
    pub trust: Trust,
    /// Files with further roots: the first counts. The others are there for a caller that finds only its
    /// own roots in the first one.
    pub ca_bundles: Vec<BundleSetting>,
    /// The chain: the first counts. See [`UpstreamConfig::ignore_proxies`].
    pub proxies: Vec<ProxySetting>,
    /// The login for the chain; counts before the one in its URL.
    pub proxy_login: Option<LoginSpec>,
    /// The logins that do not count: for another proxy than the one in use, or said in a file below.
    pub other_logins: Vec<LoginSpec>,
    /// Hosts that are reached without the chain, whoever named it: the value of `no_proxy`, else
    /// `NO_PROXY`. Empty means none.
    pub no_proxy: String,
    /// Where to connect to in place of a target. The name that is verified stays that of the target. Empty
    /// where a managed file names the proxy.
    pub resolve: BTreeMap<Target, Target>,
}

impl UpstreamConfig {
    /// Drops the proxies that a variable of other programs names and that are running valetkeys, so that
    /// a valetkey started under another does not go through it.
    pub fn ignore_proxies(&mut self, is_valetkey: impl Fn(&Target) -> bool) {
        self.proxies.retain(|proxy| {
            [FILE_PROXY, UPSTREAM_PROXY].contains(&proxy.named_by)
                || !is_valetkey(proxy.url.target())
        });
    }

    pub(super) fn merge(layers: &[Layer], env: &Environment, mistakes: &Mistakes) -> Self {
        let trust = layers.iter().find_map(|layer| layer.trust.clone());
        let ca_bundles = ca_bundles(layers, env);
        if let Some(At { value: Trust::Bundle, place }) = &trust
            && ca_bundles.is_empty()
            // A bundle may be missing because of a mistake.
            && mistakes.count() == 0
        {
            mistakes.add(place, "no `ca_bundle` is set: nothing would be trusted");
        }
        // Nothing leads around a proxy that nobody may change.
        let is_free = !matches!(
            managed(layers).and_then(|layer| layer.proxy.as_ref()),
            Some(ProxyChoice::Url(_))
        );
        let no_proxy = either_case(env, "no_proxy").filter(|_| is_free);
        let mut resolve = BTreeMap::new();
        for layer in layers.iter().rev().filter(|_| is_free) {
            resolve.extend(layer.resolve.clone());
        }
        let proxies = proxies(layers, env, mistakes);
        let (mut proxy_login, mut other_logins) = (None, Vec::new());
        for layer in layers {
            let Some(login) = layer.proxy_login.clone() else { continue };
            if proxy_login.is_none() && is_for(layer, &proxies) {
                proxy_login = Some(login);
            } else {
                other_logins.push(login);
            }
        }
        Self {
            trust: trust.map(|trust| trust.value).unwrap_or_default(),
            ca_bundles,
            other_logins,
            proxies,
            proxy_login,
            no_proxy: no_proxy.map(|(_, value)| value).unwrap_or_default(),
            resolve,
        }
    }
}

/// Our variable, else the file, else the variables of other programs; ours set to nothing leaves those
/// out. A managed file that names one decides alone.
fn ca_bundles(layers: &[Layer], env: &Environment) -> Vec<BundleSetting> {
    if let Some(path) = managed(layers).and_then(|layer| layer.ca_bundle.clone()) {
        return vec![BundleSetting { path, named_by: FILE_CA_BUNDLE }];
    }
    let variable =
        |named_by: &'static str| Some(BundleSetting { path: env.get(named_by)?.into(), named_by });
    let in_file = layers.iter().find_map(|layer| layer.ca_bundle.clone());
    let ours = [
        variable(UPSTREAM_CA_BUNDLE),
        in_file.map(|path| BundleSetting { path, named_by: FILE_CA_BUNDLE }),
    ];
    let mut found: Vec<BundleSetting> = ours.into_iter().flatten().collect();
    if env.stated(UPSTREAM_CA_BUNDLE).is_none() {
        found.extend(["CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"].into_iter().filter_map(variable));
    }
    found
}

/// What the owner of the machine says, whom no variable overrules.
fn managed(layers: &[Layer]) -> Option<&Layer> {
    layers.first().filter(|layer| layer.is_managed)
}

/// Our variable, else the file; the variables of other programs only where that says `env`. A managed file
/// wins over our variable.
fn proxies(layers: &[Layer], env: &Environment, mistakes: &Mistakes) -> Vec<ProxySetting> {
    let in_file = || layers.iter().find_map(|layer| layer.proxy.clone());
    let pinned = managed(layers).is_some_and(|layer| layer.proxy.is_some());
    let variable = env.stated(UPSTREAM_PROXY).filter(|_| !pinned);
    let (choice, named_by) = match variable {
        Some(value) if value.is_empty() => return Vec::new(),
        Some(value) => {
            let value = value.to_string_lossy();
            let place = mistakes.open(UPSTREAM_PROXY, &value);
            (ProxyChoice::read(&At { value: &value, place }, mistakes), UPSTREAM_PROXY)
        }
        None => (in_file().unwrap_or(ProxyChoice::Env), FILE_PROXY),
    };
    match choice {
        ProxyChoice::None => Vec::new(),
        ProxyChoice::Url(url) => {
            // What a valetkey around us exports has no password; the file that it read has.
            let same = in_file().and_then(|choice| choice.url().filter(|file| file.is_same(&url)));
            vec![ProxySetting { url: same.unwrap_or(url), named_by }]
        }
        ProxyChoice::Env => ["https_proxy", "all_proxy"]
            .into_iter()
            .filter_map(|variable| {
                let (named_by, value) = either_case(env, variable)?;
                let place = mistakes.open(named_by, &value);
                mistakes.hide_user_information(&place);
                let url = At { value, place }.parse(mistakes, ProxyUrl::parse)?.value;
                Some(ProxySetting { url, named_by })
            })
            .collect(),
    }
}

/// Whether the login of a file is for these proxies: one beside a proxy is for that proxy alone, whatever a
/// variable names; one beside none is for whichever is used.
fn is_for(layer: &Layer, proxies: &[ProxySetting]) -> bool {
    match &layer.proxy {
        Some(ProxyChoice::Url(own)) => proxies.iter().all(|proxy| proxy.url.is_at(own)),
        Some(ProxyChoice::Env | ProxyChoice::None) | None => true,
    }
}

/// The lower-case spelling first, as curl has it.
fn either_case(env: &Environment, lower: &'static str) -> Option<(&'static str, String)> {
    let upper = match lower {
        "https_proxy" => "HTTPS_PROXY",
        "all_proxy" => "ALL_PROXY",
        _ => "NO_PROXY",
    };
    [lower, upper].into_iter().find_map(|name| Some((name, env.text(name)?)))
}

/// Which roots an upstream's certificate may end in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Those of the system and those of the bundle.
    #[default]
    SystemAndBundle,
    /// Those of the bundle alone.
    Bundle,
    /// Those of the system alone.
    System,
    /// Mozilla's, as they were when this program was built, and those of the bundle.
    MozillaAndBundle,
}

impl Trust {
    pub(super) const WORDS: [(&str, Self); 4] = [
        ("system+bundle", Self::SystemAndBundle),
        ("bundle", Self::Bundle),
        ("system", Self::System),
        ("mozilla+bundle", Self::MozillaAndBundle),
    ];
}

/// A file with further roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleSetting {
    /// The file, which may not exist.
    pub path: PathBuf,
    /// The setting or the variable that names it.
    pub named_by: &'static str,
}

/// A proxy to go through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxySetting {
    /// Where it is.
    pub url: ProxyUrl,
    /// The setting or the variable that names it.
    pub named_by: &'static str,
}

/// What `upstream.proxy` says.
#[derive(Clone, Debug)]
pub(super) enum ProxyChoice {
    /// The variables of other programs.
    Env,
    /// No proxy.
    None,
    /// This one.
    Url(ProxyUrl),
}

impl ProxyChoice {
    fn url(self) -> Option<ProxyUrl> {
        match self {
            Self::Url(url) => Some(url),
            Self::Env | Self::None => None,
        }
    }

    /// What a text says; one that says nothing is noted and counts as none.
    pub(super) fn read(text: &At<&str>, mistakes: &Mistakes) -> Self {
        mistakes.hide_user_information(&text.place);
        let choice = text.parse(mistakes, |text| match text.to_ascii_lowercase().as_str() {
            "env" => Ok(Self::Env),
            "none" => Ok(Self::None),
            "direct" => Err(BadProxy::Direct),
            _ => ProxyUrl::parse(text).map(Self::Url),
        });
        choice.map_or(Self::None, |choice| choice.value)
    }
}

/// As a file says it, without user information.
impl fmt::Display for ProxyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env => f.write_str("env"),
            Self::None => f.write_str("none"),
            Self::Url(url) => url.fmt(f),
        }
    }
}

/// The URL of a proxy, which may hold a login: `Display` and `Debug` leave it out.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    scheme: ProxyScheme,
    target: Target,
    login: Option<Zeroizing<String>>,
}

impl ProxyUrl {
    /// Parses `http://`, `https://`, `socks5://` and `socks5h://`; without a scheme, `http://` is meant.
    /// Without a port, 80, 443 or 1080 is.
    ///
    /// # Errors
    ///
    /// [`BadProxy`] for anything else.
    pub fn parse(text: &str) -> Result<Self, BadProxy> {
        if text.contains('\\') {
            return Err(BadProxy::Backslash);
        }
        let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let full = Zeroizing::new(full);
        let before_host = full.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@'));
        if before_host.is_some_and(|(login, _)| login.contains(['/', '?', '#'])) {
            return Err(BadProxy::Reserved);
        }
        let url = Url::parse(&full).map_err(|_| BadProxy::Form)?;
        let (scheme, default_port) = ProxyScheme::of(url.scheme()).ok_or(BadProxy::Form)?;
        if !matches!(url.path(), "" | "/") {
            return Err(BadProxy::Path);
        }
        let host = Host::parse_typed(url.host_str().unwrap_or("")).map_err(|_| BadProxy::Form)?;
        let port = url.port().unwrap_or(default_port);
        if port == 0 {
            return Err(BadProxy::Form);
        }
        Ok(Self { scheme, target: Target { host, port }, login: login(&url)? })
    }

    /// How it is spoken to.
    pub fn scheme(&self) -> ProxyScheme {
        self.scheme
    }

    /// Where to connect to.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `user:password`, percent-decoded, where the URL has a user.
    pub fn login(&self) -> Option<&str> {
        self.login.as_ref().map(|login| login.as_str())
    }

    /// Whether this is the other one, which names no user, with or without a login.
    fn is_same(&self, other: &Self) -> bool {
        self.is_at(other) && other.login.is_none()
    }

    /// Whether both are the same proxy, whoever logs in.
    fn is_at(&self, other: &Self) -> bool {
        (self.scheme, &self.target) == (other.scheme, &other.target)
    }
}

/// The user information of a URL, percent-decoded (RFC 3986 section 3.2.1).
fn login(url: &Url) -> Result<Option<Zeroizing<String>>, BadProxy> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let decode = |part: &str| match percent_decode_str(part).decode_utf8() {
        Ok(text) if !text.contains(char::is_control) => Ok(Zeroizing::new(text.into_owned())),
        _ => Err(BadProxy::Login),
    };
    let (user, password) = (decode(url.username())?, decode(url.password().unwrap_or(""))?);
    Ok(Some(Zeroizing::new(format!("{}:{}", *user, *password))))
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.target)
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProxyUrl({self})")
    }
}

/// A text that names no proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadProxy {
    /// It is no such URL.
    #[error(
        "not a proxy: expected `http://`, `https://`, `socks5h://` or `socks5://` with a host, and a port where it is \
         not 80, 443 or 1080"
    )]
    Form,
    /// The word that other programs have for going straight.
    #[error("`direct` is no proxy: what goes straight is `none`")]
    Direct,
    /// A backslash, which a URL reads as a slash.
    #[error("a backslash in a proxy's user must be written as `%5C`")]
    Backslash,
    /// What ends the host of a URL, in user or password.
    #[error(
        "`#`, `/` and `?` in a proxy's user or password must be written as `%23`, `%2F` and `%3F`"
    )]
    Reserved,
    /// It names a file, as automatic configurations do.
    #[error("a proxy's URL has no path: PAC files are not read")]
    Path,
    /// User or password are not text once they are percent-decoded.
    #[error("user or password of the proxy hold what is no text once `%xx` is decoded")]
    Login,
}

/// Where user and password for the chain come from.
#[derive(Clone, PartialEq, Eq)]
pub enum LoginSpec {
    /// A variable or a file.
    Source(SourceSpec),
    /// A line for the shell, whose output it is.
    Command(String),
}

/// As a file says it, but for the command: its line may hold a secret, in the first word too (`PASSWORD=… ask`).
impl fmt::Display for LoginSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(SourceSpec::Env(name)) => write!(f, "env:{name}"),
            Self::Source(SourceSpec::File(path)) => write!(f, "file:{}", path.display()),
            Self::Command(_) => f.write_str("command:…"),
        }
    }
}

impl fmt::Debug for LoginSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LoginSpec({self})")
    }
}

const FILE_PROXY: &str = "upstream.proxy";
const FILE_CA_BUNDLE: &str = "upstream.ca_bundle";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_command_is_not_shown() {
        let table = [
            (LoginSpec::Source(SourceSpec::Env("LOGIN".to_owned())), "env:LOGIN"),
            (LoginSpec::Source(SourceSpec::File("/a/b".into())), "file:/a/b"),
            (LoginSpec::Command("PASSWORD=pa55 ask --key k3y".to_owned()), "command:…"),
        ];
        for (login, shown) in table {
            assert_eq!(login.to_string(), shown);
            assert_eq!(format!("{login:?}"), format!("LoginSpec({shown})"));
        }
    }

    #[test]
    fn words_that_are_no_host() {
        for (text, expected) in [
            ("none", Some("none")),
            ("NONE", Some("none")),
            ("None", Some("none")),
            ("Env", Some("env")),
            ("direct", None),
            ("DIRECT", None),
            ("direct:8080", Some("http://direct:8080")),
            ("none.corp", Some("http://none.corp:80")),
        ] {
            let mistakes = Mistakes::default();
            let place = mistakes.open("proxy", text);
            let choice = ProxyChoice::read(&At { value: text, place }, &mistakes);
            assert_eq!(mistakes.count() == 0, expected.is_some(), "{text}");
            assert_eq!(choice.to_string(), expected.unwrap_or("none"), "{text}");
        }
    }

    #[test]
    fn proxies_as_people_write_them() {
        let table = [
            ("http://proxy.corp:3128", Some("http://proxy.corp:3128")),
            ("proxy.corp:3128", Some("http://proxy.corp:3128")),
            ("https://PROXY.corp/", Some("https://proxy.corp:443")),
            ("http://me:pa55@proxy.corp", Some("http://proxy.corp:80")),
            ("socks5h://me:pa55@[::1]", Some("socks5h://[::1]:1080")),
            ("ftp://proxy.corp", None),
            ("http://", None),
            ("http://:3128", None),
            ("http://proxy.corp:0", None),
            ("proxy corp", None),
        ];
        for (text, shown) in table {
            let got = ProxyUrl::parse(text).ok();
            assert_eq!(got.as_ref().map(ToString::to_string).as_deref(), shown, "{text}");
            assert!(!format!("{got:?}").contains("pa55"));
        }
        let logins = [
            ("me:pa55@proxy.corp:3128", Some("me:pa55")),
            ("http://CORP%5Cme:p%40%3A55@proxy.corp", Some("CORP\\me:p@:55")),
            ("http://me@proxy.corp", Some("me:")),
            ("http://gr%C3%BCn:x@proxy.corp", Some("gr\u{fc}n:x")),
            ("http://proxy.corp", None),
        ];
        for (text, login) in logins {
            assert_eq!(ProxyUrl::parse(text).unwrap().login(), login, "{text}");
        }
        assert_eq!(ProxyUrl::parse("http://CORP\\me:x@proxy"), Err(BadProxy::Backslash));
        assert_eq!(ProxyUrl::parse("http://corp/proxy.pac"), Err(BadProxy::Path));
        for text in ["http://me:a#b@proxy.corp", "me:a/b@proxy.corp:1", "http://me:?@proxy"] {
            assert_eq!(ProxyUrl::parse(text), Err(BadProxy::Reserved), "{text}");
        }
        for text in ["http://me:%ff@proxy.corp", "http://me:a%0d%0ab@proxy.corp"] {
            assert_eq!(ProxyUrl::parse(text), Err(BadProxy::Login), "{text}");
        }
    }
}
