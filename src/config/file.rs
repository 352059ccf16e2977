//! Reads one text of settings, a user's file or what is compiled in, into what it says.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::de::DeTable;

use super::audit::AuditForm;
use super::limits;
use super::managed;
use super::mistakes::{Mistakes, Place};
use super::paths::{BadPath, resolve};
use super::rule::{self, RuleForm};
use super::table::{At, Table, Value, one_of};
use super::terms;
use super::upstream::{LoginSpec, ProxyChoice, Trust};
use super::{ListenAddress, Listener, OnViolation, SourceSpec};
use crate::credential::{CredentialName, Grant, Keep};
use crate::origin::{Endpoint, Host, Target};
use crate::rules::DefaultAction;

/// A text of settings, not yet read.
pub(super) struct Written {
    /// As people know it: the path of the file.
    pub(super) name: String,
    /// Where relative paths start.
    pub(super) folder: PathBuf,
    pub(super) text: String,
    /// Whether somebody wrote it, so that a mistake in it can be theirs; else it is compiled in.
    pub(super) is_own: bool,
    /// Whether the owner of the machine wrote it, above everybody else.
    pub(super) is_managed: bool,
}

impl Written {
    /// Reads a file. `None` when there is none, which is a mistake only if it must exist, or when it
    /// cannot be read, which always is.
    pub(super) fn open(path: &Path, must_exist: bool, mistakes: &Mistakes) -> Option<Self> {
        match read(path) {
            Ok(text) => Some(Self {
                name: path.display().to_string(),
                folder: path.parent().map(Path::to_owned).unwrap_or_default(),
                text,
                is_own: true,
                is_managed: false,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => None,
            Err(error) => {
                let message = format_args!("cannot read {}: {error}", path.display());
                mistakes
                    .add_nowhere(message, "give a readable file of UTF-8 text, or leave it out");
                None
            }
        }
    }
}

/// A pipe would hold whoever reads it, so only a regular file is read.
fn read(path: &Path) -> io::Result<String> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    std::fs::read_to_string(path)
}

/// What one text says. Nothing in it is required.
#[derive(Default)]
pub(super) struct Layer {
    pub(super) listeners: Vec<Listener>,
    pub(super) default: Option<DefaultAction>,
    pub(super) presets: Option<Vec<At<String>>>,
    pub(super) ca_bundle: Option<PathBuf>,
    pub(super) trust: Option<At<Trust>>,
    pub(super) proxy: Option<ProxyChoice>,
    pub(super) proxy_login: Option<LoginSpec>,
    pub(super) resolve: BTreeMap<Target, Target>,
    pub(super) credentials: BTreeMap<CredentialName, CredentialForm>,
    pub(super) rules: Vec<RuleForm>,
    pub(super) audit: Option<AuditForm>,
    pub(super) on_violation: Option<OnViolation>,
    pub(super) limits: limits::Asked,
    /// Where logins are kept that say nothing of it themselves.
    pub(super) keep: Option<Keep>,
    /// Whether the owner of the machine says it.
    pub(super) is_managed: bool,
    /// The text is no TOML, so that nothing is known of what it says.
    pub(super) is_garbled: bool,
}

/// What one text says of a credential.
pub(super) struct CredentialForm {
    pub(super) place: Place,
    pub(super) kind: Option<At<Kind>>,
    pub(super) home: Option<At<PathBuf>>,
    pub(super) source: Option<At<SourceSpec>>,
    pub(super) issuer: Option<At<Endpoint>>,
    pub(super) client_id: Option<At<String>>,
    pub(super) client_secret: Option<At<SourceSpec>>,
    pub(super) scopes: Option<Vec<String>>,
    pub(super) audience: Option<At<String>>,
    pub(super) grant: Option<At<Grant>>,
    pub(super) keep: Option<At<Keep>>,
    /// Every key that it has, and where.
    pub(super) keys: Vec<(&'static str, Place)>,
    /// Whether everything in it could be read.
    pub(super) is_sound: bool,
}

/// What kinds of credential there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ApiKey,
    Codex,
    OAuth,
}

impl Layer {
    /// Reads a text. `home` is the home folder.
    pub(super) fn read(written: &Written, home: Option<&Path>, mistakes: &Mistakes) -> Self {
        let place = mistakes.open(&written.name, &written.text);
        let (document, errors) = DeTable::parse_recoverable(&written.text);
        if !errors.is_empty() {
            for error in errors {
                mistakes.add(&place.at(error.span().unwrap_or_default()), error.message());
            }
            return Self { is_garbled: true, is_managed: written.is_managed, ..Self::default() };
        }
        let (document_keys, upstream_keys) = match written.is_managed {
            true => (managed::DOCUMENT, managed::UPSTREAM),
            false => (DOCUMENT, UPSTREAM),
        };
        let table = Table::document(document.get_ref(), place, document_keys, mistakes);
        terms::check(&table);
        let path = |text: &str| resolve(text, &written.folder, home);
        let mut layer = Self {
            listeners: listeners(&table, home),
            default: table.parsed("default", one_of(DEFAULTS)).map(|it| it.value),
            credentials: credentials(&table, &path),
            rules: managed::pin(rule::read_all(&table, written.is_own), written.is_managed),
            audit: AuditForm::read(&table, &path),
            on_violation: terms::on_violation(&table),
            limits: limits::read(&table),
            keep: terms::keep(&table, terms::OUR_KEEP).map(|keep| keep.value),
            is_managed: written.is_managed,
            ..Self::default()
        };
        let before = mistakes.count();
        let presets = table.parsed_list("use", |name| Ok::<_, BadPath>(name.to_owned()));
        if table.key("use").is_some() && mistakes.count() == before {
            layer.presets = Some(presets);
        }
        if let Some(upstream) = table.get("upstream").and_then(|it| it.table(upstream_keys)) {
            layer.ca_bundle = upstream.parsed("ca_bundle", path).map(|it| it.value);
            layer.trust = upstream.parsed("trust", one_of(&Trust::WORDS));
            let proxy = upstream.get("proxy").map(|proxy| proxy.text());
            layer.proxy = proxy.map(|text| match text {
                Some(text) => ProxyChoice::read(&text, mistakes),
                None => ProxyChoice::None,
            });
            layer.proxy_login = proxy_login(&upstream, &path);
            layer.resolve = resolved(&upstream);
        }
        layer
    }
}

/// A source, or here also a command.
fn proxy_login(
    table: &Table<'_>,
    path: &impl Fn(&str) -> Result<PathBuf, BadPath>,
) -> Option<LoginSpec> {
    let text = table.get("proxy_login")?.text()?;
    match text.value.strip_prefix("command:").map(str::trim) {
        Some("") => {
            table.mistakes().add(&text.place, "expected a command after `command:`");
            None
        }
        Some(line) => Some(LoginSpec::Command(line.to_owned())),
        None if text.value.starts_with("env:") || text.value.starts_with("file:") => {
            source(table, "proxy_login", path).map(|source| LoginSpec::Source(source.value))
        }
        None => {
            // Likely the login itself.
            table.mistakes().hide(&text.place);
            let expected =
                "expected `file:/path`, `env:NAME` or `command:…`, never the login itself";
            table.mistakes().add(&text.place, expected);
            None
        }
    }
}

/// `listen` is short for one more listener.
fn listeners(table: &Table<'_>, home: Option<&Path>) -> Vec<Listener> {
    let short = address(table, "listen", home);
    let short = short.map(|it| At { value: Listener::on(it.value), place: it.place });
    let long = table.get("listeners").map(|list| list.items()).unwrap_or_default();
    let long = long.iter().filter_map(|item| listener(&item.table(LISTENER)?, home));
    let all: Vec<At<Listener>> = short.into_iter().chain(long).collect();
    each_once(&all, table.mistakes());
    all.into_iter().map(|listener| listener.value).collect()
}

/// An address is listened on once; of free ports there are many.
fn each_once(all: &[At<Listener>], mistakes: &Mistakes) {
    let is_free = |address: &ListenAddress| matches!(address, ListenAddress::Tcp(address) if address.port() == 0);
    for (at, second) in all.iter().enumerate() {
        let address = &second.value.address;
        let first = all[..at].iter().find(|first| first.value.address == *address);
        if let Some(first) = first.filter(|_| !is_free(address)) {
            let line = mistakes.line(&first.place);
            let message =
                format_args!("a second listener on {address}: the first is in line {line}");
            let hint = "take one of them out, or give it another port";
            mistakes.add_with_hint(&second.place, message, Some(hint.to_owned()));
        }
    }
}

/// Where a listener is to be. A number alone is most likely the port.
fn address(table: &Table<'_>, key: &str, home: Option<&Path>) -> Option<At<ListenAddress>> {
    let value = table.get(key)?;
    let text = match value.number::<u16>() {
        Some(port) => value.is_no("a string", Some(format!("{key} = \"127.0.0.1:{port}\""))),
        None => value.text(),
    };
    text?.parse(table.mistakes(), |text| ListenAddress::written(text, home))
}

fn listener(table: &Table<'_>, home: Option<&Path>) -> Option<At<Listener>> {
    let mistakes = table.mistakes();
    if table.key("address").is_none() {
        mistakes.add(table.place(), "a listener needs an `address`");
    }
    let flag = |key| table.get(key).and_then(|value| value.flag()).unwrap_or_default();
    let (require_pass, tls) = (flag("require_pass"), flag("tls"));
    let uids = table.get("allow_uids").map(|list| list.items()).unwrap_or_default();
    let allow_uids = uids.iter().filter_map(Value::uid).collect();
    let names = table.parsed_list("tls_names", Host::parse);
    if let (Some(place), false) = (table.key("tls_names"), tls) {
        mistakes.add(&place, "`tls_names` has no meaning without `tls = true`");
    }
    let At { value: address, place } = address(table, "address", home)?;
    let own_names = || names_of(&address);
    let tls_names = match (tls, names.is_empty()) {
        (false, _) => Vec::new(),
        (true, true) => own_names(),
        (true, false) => names.into_iter().map(|name| name.value).collect(),
    };
    Some(At { value: Listener { address, allow_uids, require_pass, tls_names }, place })
}

/// What clients usually call a listener: its address, this machine, and this machine as containers on it know it.
fn names_of(address: &ListenAddress) -> Vec<Host> {
    let known = ["localhost", "host.docker.internal"].into_iter();
    let known = known.filter_map(|name| Host::parse(name).ok());
    let own = match address {
        ListenAddress::Tcp(address) => Some(Host::Ip(ListenAddress::from_here(*address).ip())),
        ListenAddress::Unix(_) => None,
    };
    own.into_iter().chain(known).collect()
}

fn resolved(upstream: &Table<'_>) -> BTreeMap<Target, Target> {
    let Some(table) = upstream.get("resolve").and_then(|it| it.names()) else {
        return BTreeMap::new();
    };
    let pair = |(key, value): (At<&str>, Value<'_>)| {
        let from = key.parse(table.mistakes(), Target::from_str);
        let to = value.text().and_then(|text| text.parse(table.mistakes(), Target::from_str));
        Some((from?.value, to?.value))
    };
    table.entries().filter_map(pair).collect()
}

fn credentials(
    table: &Table<'_>,
    path: &impl Fn(&str) -> Result<PathBuf, BadPath>,
) -> BTreeMap<CredentialName, CredentialForm> {
    let Some(table) = table.get("credentials").and_then(|it| it.names()) else {
        return BTreeMap::new();
    };
    let mistakes = table.mistakes();
    let form = |(name, value): (At<&str>, Value<'_>)| {
        let before = mistakes.count();
        let name = name.parse(mistakes, CredentialName::from_str)?;
        let mut form = CredentialForm::at(name.place);
        if let Some(table) = value.table(CREDENTIAL) {
            form.read(&table, path);
        }
        form.is_sound = mistakes.count() == before;
        Some((name.value, form))
    };
    table.entries().filter_map(form).collect()
}

impl CredentialForm {
    fn at(place: Place) -> Self {
        Self {
            place,
            kind: None,
            home: None,
            source: None,
            issuer: None,
            client_id: None,
            client_secret: None,
            scopes: None,
            audience: None,
            grant: None,
            keep: None,
            keys: Vec::new(),
            is_sound: false,
        }
    }

    fn read(&mut self, table: &Table<'_>, path: &impl Fn(&str) -> Result<PathBuf, BadPath>) {
        self.keys = CREDENTIAL.iter().filter_map(|key| Some((*key, table.key(key)?))).collect();
        self.kind = table.parsed("kind", one_of(KINDS));
        self.home = table.parsed("home", path);
        self.source = source(table, "source", path);
        self.issuer = table.parsed("issuer", Endpoint::parse);
        self.client_id = table.parsed("client_id", visible);
        self.client_secret = source(table, "client_secret", path);
        self.scopes = table.key("scopes").map(|_| {
            table.parsed_list("scopes", visible).into_iter().map(|scope| scope.value).collect()
        });
        self.audience = table.parsed("audience", visible);
        self.grant = table.parsed("grant", one_of(&Grant::WORDS));
        self.keep = terms::keep(table, terms::OUR_KEEP);
    }
}

/// A word that goes into a request: not empty, visible ASCII (RFC 6749 appendix A).
fn visible(text: &str) -> Result<String, &'static str> {
    let fits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err("expected visible ASCII without spaces") }
}

fn source(
    table: &Table<'_>,
    key: &str,
    path: &impl Fn(&str) -> Result<PathBuf, BadPath>,
) -> Option<At<SourceSpec>> {
    let text = table.get(key)?.text()?;
    let read = |value: &str| match value.split_once(':') {
        Some(("env", name)) if is_variable(name) => Ok(SourceSpec::Env(name.to_owned())),
        Some(("env", _)) => Err("expected the name of a variable after `env:`".to_owned()),
        Some(("file", "")) => Err("expected a path after `file:`".to_owned()),
        Some(("file", file)) => path(file).map(SourceSpec::File).map_err(|error| error.to_string()),
        Some(("command", _)) => Err("`command:` comes in a later version".to_owned()),
        _ => {
            // Likely the value itself, which does not belong in a file of settings.
            table.mistakes().hide(&text.place);
            Err("expected `env:NAME` or `file:/path`, never the value itself".to_owned())
        }
    };
    text.parse(table.mistakes(), read)
}

/// IEEE Std 1003.1 section 8.1, with lower case.
fn is_variable(name: &str) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

pub(super) const DOCUMENT: &[&str] = &[
    "listen",
    "default",
    "use",
    "credentials_store",
    "forced_login_method",
    "forced_chatgpt_workspace_id",
    "on_policy_violation",
    "audit",
    "listeners",
    "limits",
    "upstream",
    "credentials",
    "rules",
];
pub(super) const LISTENER: &[&str] = &["address", "allow_uids", "require_pass", "tls", "tls_names"];
pub(super) const UPSTREAM: &[&str] = &["ca_bundle", "trust", "proxy", "proxy_login", "resolve"];
pub(super) const CREDENTIAL: &[&str] = &[
    "kind",
    "home",
    "source",
    "issuer",
    "client_id",
    "client_secret",
    "scopes",
    "audience",
    "grant",
    "credentials_store",
];

const KINDS: &[(&str, Kind)] =
    &[("codex", Kind::Codex), ("api_key", Kind::ApiKey), ("oauth", Kind::OAuth)];

pub(super) const DEFAULTS: &[(&str, DefaultAction)] =
    &[("tunnel", DefaultAction::Tunnel), ("refuse", DefaultAction::Refuse)];
