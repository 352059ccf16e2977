//! Makes one of all layers, the highest first, and checks what no layer can tell by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::file::{CredentialForm, Kind, Layer};
use super::mistakes::{Mistakes, closest};
use super::rule::{RuleForm, SignsIn};
use super::table::At;
use super::{CredentialKind, ListenAddress, Listener, OAuthConfig};
use crate::credential::{CredentialName, Grant, Keep};
use crate::origin::Target;
use crate::rules::pattern::HostPattern;
use crate::rules::{Action, Rule};

/// The listeners of the highest layer that has any. An address that was typed takes the place of the
/// first one's, whose conditions stay; the others go.
pub(super) fn listeners(typed: Option<ListenAddress>, layers: &[Layer]) -> Vec<Listener> {
    let of_layers = layers.iter().map(|layer| &layer.listeners).find(|some| !some.is_empty());
    let mut listeners = of_layers.cloned().unwrap_or_default();
    if let Some(address) = typed {
        listeners.truncate(1);
        match listeners.first_mut() {
            Some(first) => first.address = address,
            None => listeners.push(Listener::on(address)),
        }
    }
    listeners
}

/// All credentials by name; `None` for one that has a mistake.
pub(super) type Credentials = BTreeMap<CredentialName, Option<CredentialKind>>;

/// A credential of a higher layer adjusts the one below that has its name and is of its kind. While not
/// all is known, nothing is called missing.
pub(super) fn credentials(
    layers: &[Layer],
    codex_home: &Path,
    all_known: bool,
    mistakes: &Mistakes,
) -> Credentials {
    let names: BTreeSet<&CredentialName> =
        layers.iter().flat_map(|layer| layer.credentials.keys()).collect();
    let credential = |name: &CredentialName| {
        let forms: Vec<&CredentialForm> =
            layers.iter().filter_map(|layer| layer.credentials.get(name)).collect();
        let is_sound = forms.iter().all(|form| form.is_sound);
        let kind = || credential(name, &forms, codex_home, all_known, mistakes);
        (name.clone(), if is_sound { kind() } else { None })
    };
    names.into_iter().map(credential).collect()
}

fn credential(
    name: &CredentialName,
    forms: &[&CredentialForm],
    codex_home: &Path,
    all_known: bool,
    mistakes: &Mistakes,
) -> Option<CredentialKind> {
    let missing = |message: std::fmt::Arguments<'_>| {
        if let (true, Some(first)) = (all_known, forms.first()) {
            mistakes.add(&first.place, message);
        }
        None
    };
    let Some(kind) = forms.iter().find_map(|form| form.kind.as_ref()).map(|kind| kind.value) else {
        return missing(format_args!(
            "credential `{name}` needs a `kind`: `codex`, `api_key` or `oauth`"
        ));
    };
    let is_of_kind =
        |form: &&&CredentialForm| form.kind.as_ref().is_none_or(|stated| stated.value == kind);
    let forms: Vec<&&CredentialForm> = forms.iter().filter(is_of_kind).collect();
    let (word, known) = kind.keys();
    let strange = forms.iter().flat_map(|form| &form.keys).filter(|(key, _)| !known.contains(key));
    let before = mistakes.count();
    for (key, place) in strange {
        mistakes.add(place, format_args!("`{key}` has no meaning with kind `{word}`"));
    }
    if mistakes.count() != before {
        return None;
    }
    match kind {
        Kind::Codex => {
            let home = forms.iter().find_map(|form| form.home.as_ref());
            let home = home.map_or(codex_home, |home| &home.value);
            // Where it is kept is settled when Codex's own files are read, which are in its home.
            Some(CredentialKind::Codex { home: home.to_owned(), keep: Keep::default() })
        }
        Kind::ApiKey => match forms.iter().find_map(|form| form.source.as_ref()) {
            Some(source) => Some(CredentialKind::ApiKey { source: source.value.clone() }),
            None => missing(format_args!("credential `{name}` needs a `source`")),
        },
        Kind::OAuth => match oauth(&forms) {
            Ok(oauth) => Some(CredentialKind::OAuth(oauth)),
            Err(key) => missing(format_args!("credential `{name}` needs {key}")),
        },
    }
}

impl Kind {
    /// Its word, and the keys that mean something with it.
    fn keys(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::ApiKey => ("api_key", &["kind", "source"]),
            Self::Codex => ("codex", &["kind", "home", "credentials_store"]),
            Self::OAuth => (
                "oauth",
                &[
                    "kind",
                    "issuer",
                    "client_id",
                    "client_secret",
                    "scopes",
                    "audience",
                    "grant",
                    "credentials_store",
                ],
            ),
        }
    }
}

/// How one signs in at an issuer; an error names what is missing for that.
fn oauth(forms: &[&&CredentialForm]) -> Result<OAuthConfig, &'static str> {
    let issuer = forms.iter().find_map(|form| form.issuer.as_ref()).ok_or("an `issuer`")?;
    let client_id = forms.iter().find_map(|form| form.client_id.as_ref());
    let client_id = client_id.ok_or("a `client_id`")?;
    let client_secret = forms.iter().find_map(|form| form.client_secret.as_ref());
    let grant = forms.iter().find_map(|form| form.grant.as_ref());
    let grant = grant.map(|grant| grant.value).unwrap_or_default();
    if grant == Grant::ClientCredentials && client_secret.is_none() {
        return Err("a `client_secret` for grant `client_credentials`");
    }
    let audience = forms.iter().find_map(|form| form.audience.as_ref());
    Ok(OAuthConfig {
        issuer: issuer.value.clone(),
        client_id: client_id.value.clone(),
        client_secret: client_secret.map(|secret| secret.value.clone()),
        scopes: forms.iter().find_map(|form| form.scopes.clone()).unwrap_or_default(),
        audience: audience.map(|audience| audience.value.clone()),
        grant,
        keep: Keep::default(),
    })
}

/// The rules of all layers, those of the higher ones first; of two with one name the higher counts.
pub(super) fn rules(layers: Vec<Layer>) -> Vec<RuleForm> {
    let mut rules: Vec<RuleForm> = Vec::new();
    for layer in layers {
        let is_new = |form: &RuleForm| {
            form.name.is_none() || rules.iter().all(|known| known.name != form.name)
        };
        let new: Vec<RuleForm> = layer.rules.into_iter().filter(is_new).collect();
        rules.extend(new);
    }
    rules
}

/// Checks that every rule can do what it says. `all_known` is false when a text that could not be read
/// may name a credential.
pub(super) fn check(
    forms: &[RuleForm],
    credentials: &Credentials,
    all_known: bool,
    mistakes: &Mistakes,
) {
    for signs_in in forms.iter().filter_map(|form| form.signs_in.as_ref()) {
        match credentials.get(&signs_in.credential.value) {
            None if all_known => unknown_credential(&signs_in.credential, credentials, mistakes),
            Some(Some(CredentialKind::ApiKey { .. })) => {
                check_plain(signs_in, Plain::ApiKey, mistakes)
            }
            Some(Some(CredentialKind::OAuth(_))) => check_plain(signs_in, Plain::OAuth, mistakes),
            None | Some(None | Some(CredentialKind::Codex { .. })) => {}
        }
    }
    let rules = || forms.iter().filter_map(|form| Some((form, form.rule.as_ref()?)));
    for (form, rule) in rules().filter(|(_, rule)| matches!(rule.action, Action::Tunnel)) {
        check_tunnel((form, rule), rules(), mistakes);
    }
    // A rule that is missing because of a mistake would make others look wrong.
    if mistakes.count() == 0 {
        for (form, rule) in rules().filter(|(_, rule)| matches!(rule.action, Action::Refuse)) {
            check_refusal((form, rule), rules(), mistakes);
        }
    }
}

fn unknown_credential(name: &At<CredentialName>, credentials: &Credentials, mistakes: &Mistakes) {
    let At { value: name, place } = name;
    let meant = closest(name.as_str(), credentials.keys().map(CredentialName::as_str));
    let hint = match meant {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("describe it under [credentials.{name}]"),
    };
    mistakes.add_with_hint(place, format_args!("unknown credential `{name}`"), Some(hint));
}

/// A credential that has no field but the token, and logins of one kind only.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plain {
    ApiKey,
    OAuth,
}

fn check_plain(signs_in: &SignsIn, plain: Plain, mistakes: &Mistakes) {
    let At { value: name, place } = &signs_in.credential;
    let is = match plain {
        Plain::ApiKey => "is an API key",
        Plain::OAuth => "is of kind `oauth`",
    };
    if signs_in.is_issuer && plain == Plain::ApiKey {
        mistakes.add(place, format_args!("`{name}` {is}, which has no issuer"));
    }
    if let Some(login) = &signs_in.login {
        let message = format_args!("`{name}` {is}: only kind `codex` has logins of two kinds");
        mistakes.add(&login.place, message);
    }
    for field in &signs_in.codex_fields {
        mistakes.add(&field.place, format_args!("`{name}` {is} and has no {{{}}}", field.value));
    }
}

type Whole<'a> = (&'a RuleForm, &'a Rule);

/// One host cannot be both never touched and looked at. Of the two rules the one in the higher layer is
/// wrong, unless the owner of the machine pinned it: it then counts alone.
fn check_tunnel<'a>(
    (form, rule): Whole<'a>,
    others: impl Iterator<Item = Whole<'a>>,
    mistakes: &Mistakes,
) {
    let clash = others
        .filter(|(_, other)| other.host == rule.host && other.pinned == rule.pinned)
        .find(|(_, other)| !matches!(other.action, Action::Tunnel));
    if let Some((other_form, other)) = clash {
        let place =
            if other_form.host.is_above(&form.host) { &other_form.host } else { &form.host };
        let (tunnel, other) = (&rule.name, &other.name);
        let message = format_args!("rule `{tunnel}` tunnels a host that rule `{other}` intercepts");
        mistakes.add(place, message);
    }
}

/// A host is intercepted for a credential only, so that a refusal needs one to be seen. Those of a preset
/// may be left over from a rule that was replaced.
fn check_refusal<'a>(
    (form, rule): Whole<'a>,
    mut others: impl Iterator<Item = Whole<'a>>,
    mistakes: &Mistakes,
) {
    let is_seen = others.any(|(_, other)| other.action.uses().is_some() && overlap(other, rule));
    // One of a managed file may guard against rules that nobody has written yet.
    if form.is_own && !rule.pinned && !is_seen {
        let message = format_args!("rule `{}` refuses nothing", rule.name);
        let hint =
            "no rule signs in on this host, so it is tunnelled and its requests are not seen";
        mistakes.add_with_hint(&form.host, message, Some(hint.to_owned()));
    }
}

/// Whether a host may be of both rules.
fn overlap(one: &Rule, other: &Rule) -> bool {
    let covers = |wide: &HostPattern, narrow: &HostPattern| {
        let target = narrow.exact().map(|_| Target::parse_with_default(&narrow.to_string(), 443));
        matches!(target, Some(Ok(target)) if wide.matches(&target))
    };
    one.host == other.host || covers(&one.host, &other.host) || covers(&other.host, &one.host)
}
