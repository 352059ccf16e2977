//! Reads the `[[rules]]` of a text, and keeps the places that later checks point at.

use std::str::FromStr;

use http::header::AUTHORIZATION;
use http::{HeaderName, Method};

use super::mistakes::Place;
use super::table::{At, Table, Value, one_of};
use crate::credential::{CredentialName, Field, LoginKind};
use crate::inject::{BadInjection, Injection, Template};
use crate::rules::pattern::{HostPattern, PathPrefix};
use crate::rules::{Action, Rule, Unmatched, Use};

/// A rule, and where its parts are written.
pub(super) struct RuleForm {
    /// `None` when that is wrong, or the host that it is taken from.
    pub(super) name: Option<String>,
    /// Where its host is written.
    pub(super) host: Place,
    /// What it signs in with, if it does.
    pub(super) signs_in: Option<SignsIn>,
    /// `None` when anything in it is wrong.
    pub(super) rule: Option<Rule>,
    /// Whether somebody wrote it; else it is compiled in.
    pub(super) is_own: bool,
}

/// How a rule uses a credential.
pub(super) struct SignsIn {
    pub(super) credential: At<CredentialName>,
    pub(super) login: Option<At<LoginKind>>,
    /// The fields of its templates that only a Codex login has.
    pub(super) codex_fields: Vec<At<&'static str>>,
    /// Whether it looks after a login's endpoints.
    pub(super) is_issuer: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Inject,
    Issuer,
    Refuse,
    Tunnel,
}

/// A header field and what it is set to.
type Setting = (At<HeaderName>, At<Template>);

/// All rules of a text. A name may come once.
pub(super) fn read_all(document: &Table<'_>, is_own: bool) -> Vec<RuleForm> {
    let items = document.get("rules").map(|list| list.items()).unwrap_or_default();
    let mut names = Vec::new();
    let read = |table: Table<'_>| RuleForm { is_own, ..read(&table, &mut names) };
    items.iter().filter_map(|item| item.table(KEYS)).map(read).collect()
}

fn read(table: &Table<'_>, names: &mut Vec<String>) -> RuleForm {
    let mistakes = table.mistakes();
    let before = mistakes.count();
    if table.key("host").is_none() {
        mistakes.add(table.place(), "a rule needs a `host`");
    }
    let host = table.parsed("host", host);
    let name = name(table, host.as_ref(), names);
    let paths = table.parsed_list("paths", PathPrefix::parse);
    let methods = table.parsed_list("methods", method);
    let unmatched = table.parsed("unmatched", one_of(UNMATCHED));
    let websocket_fallback = table.get("websocket_fallback").and_then(|flag| flag.flag());
    let scrub = table.get("scrub").and_then(|flag| flag.flag());
    let does = does(table);
    let settings = if does == Some(Does::Inject) { settings(table) } else { Vec::new() };
    let signs_in = signs_in(table, does, &settings);
    let injection = injection(table, settings);
    let is_sound = mistakes.count() == before;

    let place = host.as_ref().map_or_else(|| table.place(), |host| &host.place).clone();
    let rule = || {
        let uses = signs_in.as_ref().map(|signs_in| Use {
            credential: signs_in.credential.value.clone(),
            login: signs_in.login.as_ref().map(|login| login.value),
        });
        Some(Rule {
            name: name.clone()?,
            host: host?.value,
            paths: paths.into_iter().map(|path| path.value).collect(),
            methods: methods.into_iter().map(|method| method.value).collect(),
            action: match does? {
                Does::Inject => Action::Inject { uses: uses?, injection: injection? },
                Does::Issuer => Action::Issuer { uses: uses? },
                Does::Refuse => Action::Refuse,
                Does::Tunnel => Action::Tunnel,
            },
            unmatched: unmatched.map(|unmatched| unmatched.value).unwrap_or_default(),
            websocket_fallback: websocket_fallback.unwrap_or_default(),
            scrub: scrub.unwrap_or_default(),
            pinned: false,
        })
    };
    let rule = if is_sound { rule() } else { None };
    RuleForm { name, host: place, signs_in, rule, is_own: false }
}

/// The rule's name: the host unless it is written. Notes one that an earlier rule has.
fn name(
    table: &Table<'_>,
    host: Option<&At<HostPattern>>,
    names: &mut Vec<String>,
) -> Option<String> {
    let name = match table.key("name") {
        Some(_) => table.parsed("name", |name| match name {
            "" => Err("the name is empty"),
            name => Ok(name.to_owned()),
        })?,
        None => host.map(|host| At { value: host.value.to_string(), place: host.place.clone() })?,
    };
    if names.contains(&name.value) {
        let message = format_args!("a second rule with the name `{}`", name.value);
        let hint = "give each rule a `name` of its own; the host is the default";
        table.mistakes().add_with_hint(&name.place, message, Some(hint.to_owned()));
    }
    names.push(name.value.clone());
    Some(name.value)
}

/// What the rule does. Notes the keys that have no meaning for that, and a credential that is missing.
fn does(table: &Table<'_>) -> Option<Does> {
    let does = match table.key("action") {
        Some(_) => table.parsed("action", one_of(ACTIONS))?.value,
        None => Does::Inject,
    };
    let (action, foreign): (_, &[&str]) = match does {
        Does::Inject => ("inject", &[]),
        Does::Issuer => ("issuer", FOR_INJECTION),
        Does::Refuse => ("refuse", &[FOR_INJECTION, FOR_SIGNING_IN].concat()),
        Does::Tunnel => ("tunnel", &[FOR_INJECTION, FOR_SIGNING_IN, FOR_REQUESTS].concat()),
    };
    let mistakes = table.mistakes();
    for key in foreign {
        if let Some(place) = table.key(key) {
            mistakes.add(&place, format_args!("`{key}` has no meaning with action `{action}`"));
        }
    }
    if matches!(does, Does::Inject | Does::Issuer) && table.key("credential").is_none() {
        let message = format_args!("a rule with action `{action}` needs a `credential`");
        mistakes.add(table.place(), message);
    }
    Some(does)
}

/// The credential of a rule that has one.
fn signs_in(table: &Table<'_>, does: Option<Does>, settings: &[Setting]) -> Option<SignsIn> {
    let credential = table.parsed("credential", CredentialName::from_str);
    let login = table.parsed("login", one_of(LOGINS));
    Some(SignsIn {
        credential: credential?,
        login,
        codex_fields: settings.iter().flat_map(codex_fields).collect(),
        is_issuer: does == Some(Does::Issuer),
    })
}

/// The fields of a template that only a Codex login has.
fn codex_fields((_, template): &Setting) -> impl Iterator<Item = At<&'static str>> {
    let (text, place) = (template.value.to_string(), template.place.clone());
    Field::ALL
        .into_iter()
        .filter(move |(name, field)| {
            *field != Field::Token && text.contains(&format!("{{{name}}}"))
        })
        .map(move |(name, _)| At { value: name, place: place.clone() })
}

/// What is set: `headers`, else `header` to `format`, else the token as bearer.
fn settings(table: &Table<'_>) -> Vec<Setting> {
    let mistakes = table.mistakes();
    let Some(headers) = table.get("headers") else { return Vec::from_iter(setting(table)) };
    for key in ["header", "format"] {
        if let Some(place) = table.key(key) {
            mistakes.add(&place, format_args!("`{key}` together with `headers`: give one of them"));
        }
    }
    let Some(entries) = headers.names() else { return Vec::new() };
    if entries.entries().next().is_none() {
        mistakes.add(headers.place(), "`headers` is empty: nothing would be injected");
    }
    let setting = |(name, value): (At<&str>, Value<'_>)| {
        let name = name.parse(mistakes, header_name);
        let template = value.text()?.parse(mistakes, Template::from_str);
        Some((name?, template?))
    };
    entries.entries().filter_map(setting).collect()
}

/// `header` and `format`, each of which has a default.
fn setting(table: &Table<'_>) -> Option<Setting> {
    let at = table.place().clone();
    let name = table.parsed("header", header_name);
    let name = name.unwrap_or_else(|| At { value: AUTHORIZATION, place: at.clone() });
    let usual = if name.value == AUTHORIZATION { "Bearer {token}" } else { "{token}" };
    let template = table
        .parsed("format", Template::from_str)
        .or_else(|| Some(At { value: usual.parse().ok()?, place: at }))?;
    Some((name, template))
}

fn injection(table: &Table<'_>, settings: Vec<Setting>) -> Option<Injection> {
    let remove = table.parsed_list("remove", header_name);
    let places: Vec<At<HeaderName>> = settings.iter().map(|(name, _)| name.clone()).collect();
    let set = settings.into_iter().map(|(name, template)| (name.value, template.value)).collect();
    match Injection::new(set, remove.into_iter().map(|name| name.value).collect()) {
        Ok(injection) => Some(injection),
        Err(error) => {
            let (BadInjection::Twice(name) | BadInjection::Forbidden(name)) = &error;
            let last = places.iter().rfind(|place| place.value == *name);
            let place = last.map_or_else(|| table.place(), |last| &last.place);
            table.mistakes().add(place, &error);
            None
        }
    }
}

fn host(text: &str) -> Result<HostPattern, String> {
    HostPattern::parse(text).map_err(|error| match text {
        url if url.contains('/') => "a host stands alone, without scheme and path".to_owned(),
        star if star.contains('*') => {
            "a star is the whole first label of a name with two more, as in `*.example.com`"
                .to_owned()
        }
        _ => error.to_string(),
    })
}

/// A header field that a rule may set or remove.
fn header_name(text: &str) -> Result<HeaderName, String> {
    let name: HeaderName = text.parse().map_err(|_| "not the name of a header field")?;
    match Injection::new(Vec::new(), vec![name.clone()]) {
        Ok(_) => Ok(name),
        Err(error) => Err(error.to_string()),
    }
}

fn method(text: &str) -> Result<Method, &'static str> {
    match text.parse() {
        Ok(Method::CONNECT | Method::TRACE) => Err("a credential is never sent with this method"),
        Ok(method) if !text.bytes().any(|byte| byte.is_ascii_lowercase()) => Ok(method),
        Ok(_) => Err("methods are written in capitals"),
        Err(_) => Err("not a method"),
    }
}

pub(super) const KEYS: &[&str] = &[
    "name",
    "host",
    "paths",
    "methods",
    "action",
    "credential",
    "login",
    "headers",
    "header",
    "format",
    "remove",
    "unmatched",
    "websocket_fallback",
    "scrub",
];
const FOR_INJECTION: &[&str] =
    &["headers", "header", "format", "remove", "websocket_fallback", "scrub"];
const FOR_SIGNING_IN: &[&str] = &["credential", "login"];
const FOR_REQUESTS: &[&str] = &["paths", "methods", "unmatched"];

const ACTIONS: &[(&str, Does)] = &[
    ("inject", Does::Inject),
    ("tunnel", Does::Tunnel),
    ("issuer", Does::Issuer),
    ("refuse", Does::Refuse),
];
const LOGINS: &[(&str, LoginKind)] =
    &[("chatgpt", LoginKind::ChatGpt), ("api_key", LoginKind::ApiKey)];
const UNMATCHED: &[(&str, Unmatched)] =
    &[("forward", Unmatched::Forward), ("refuse", Unmatched::Refuse)];
