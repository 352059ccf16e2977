//! `valetkey explain`: what would happen to a request, and why.

use std::collections::BTreeMap;
use std::process::ExitCode;

use http::Method;
use url::Url;

use super::output::{self, Failure, WRONG_USE};
use super::status::{self, Shown};
use super::{Typed, credentials, past, process};
use crate::config::CredentialKind;
use crate::credential::{CredentialName, Field};
use crate::inject::Injection;
use crate::origin::{Host, Origin, Scheme, Target};
use crate::rules::{Action, Decision, Found, Plain, Rules, Unmatched, Use};
use crate::scrub::{Scrubber, TooShort};
use crate::tokens::State;

/// What `explain` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The request's URL
    url: String,

    /// The request's method
    #[arg(short = 'X', long, value_name = "METHOD", default_value = "GET")]
    method: Method,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let (origin, path) = parse(&arguments.url)?;
    let config = typed.config()?;
    let shown = process::runtime()?.block_on(status::read(typed, &config))?;
    let kinds = shown.iter().filter_map(|it| Some((it.name.clone(), it.status.kind?))).collect();
    let rules = config.rules.with_kinds(kinds);
    let short = |(name, kind): (&CredentialName, &CredentialKind)| {
        let secret = credentials::source_of(kind.source()?, &typed.env).load().ok()?;
        Some((name.clone(), Scrubber::new(&secret).err()?))
    };
    let unscrubbed = config.credentials.iter().filter_map(short).collect();
    let explaining = Explaining { rules: &rules, shown: &shown, unscrubbed: &unscrubbed };
    output::data(format_args!("{} {}{path}", arguments.method, origin));
    explaining.explain(&origin, &arguments.method, &path);
    Ok(ExitCode::SUCCESS)
}

fn parse(text: &str) -> Result<(Origin, String), Failure> {
    let wrong = |why: &str| {
        Failure::new(format!("not a URL that can be explained: {why}"))
            .status(WRONG_USE)
            .hint("for example: valetkey explain https://api.openai.com/v1/models")
    };
    // As curl has it, only that here nothing goes without TLS.
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&whole).map_err(|error| wrong(&error.to_string()))?;
    let scheme = match url.scheme() {
        "https" | "wss" => Scheme::Https,
        "http" | "ws" => Scheme::Http,
        _ => return Err(wrong("it must start with https:// or wss://")),
    };
    let host = Host::parse_typed(url.host_str().unwrap_or_default())
        .map_err(|error| wrong(&error.to_string()))?;
    let port = url.port().unwrap_or_else(|| scheme.default_port());
    // The path as it was typed: `url` would tidy away the very dots that rules look at.
    let after_scheme = text.split_once("://").map_or(text, |(_, rest)| rest);
    let path = after_scheme.find('/').map_or("/", |at| &after_scheme[at..]);
    let path = path.split(['?', '#']).next().unwrap_or("/");
    Ok((Origin { scheme, target: Target { host, port } }, path.to_owned()))
}

struct Explaining<'a> {
    rules: &'a Rules,
    shown: &'a [Shown],
    /// Those that no rule could scrub from answers.
    unscrubbed: &'a BTreeMap<CredentialName, TooShort>,
}

impl Explaining<'_> {
    fn explain(&self, origin: &Origin, method: &Method, path: &str) {
        if origin.scheme == Scheme::Http {
            return say(
                "decision",
                match self.rules.decide_plain(&origin.target) {
                    Plain::Forward => "sent on as plain HTTP; no rule applies to that",
                    Plain::NoRule => {
                        "refused (403 target_forbidden): no rule, and default = \"refuse\""
                    }
                    Plain::OnlyTls => "refused (403 cleartext_refused): only spoken to over TLS",
                },
            );
        }
        match self.rules.decide(&origin.target) {
            Decision::Refuse => {
                say("decision", "refused (403 target_forbidden): no rule, and default = \"refuse\"")
            }
            Decision::Tunnel => {
                say("decision", "tunnelled: bytes both ways, nothing is looked at or added");
                say("because", self.why_tunnelled(origin, method, path));
            }
            Decision::Intercept => {
                say("decision", "intercepted: the client's TLS ends here");
                if past::goes_past(&origin.target) {
                    output::warning(past::sentence(&origin.target));
                    output::hint(past::FIX);
                }
                self.explain_exchange(origin, method, path);
            }
        }
    }

    fn why_tunnelled(&self, origin: &Origin, method: &Method, path: &str) -> String {
        let target = &origin.target;
        let Some(rule) = self.rules.on_host(target).next() else {
            return "no rule speaks of this host".to_owned();
        };
        if matches!(rule.action, Action::Tunnel) {
            return format!("rule `{}` says so", rule.name);
        }
        // Under any login the rule of the request, else one that signs the host in at all.
        let any_login = self.rules.with_kinds(BTreeMap::new());
        let found = match any_login.find(origin, method, path) {
            Found::Rule(rule) => Some(rule),
            Found::Unmatched(_) => None,
        };
        let mut rules = found.into_iter().chain(self.rules.on_host(target));
        let waiting = rules.find_map(|rule| Some((rule, rule.action.uses()?)));
        match waiting {
            Some((rule, Use { credential, login: Some(login) })) => {
                let kind = self.credential(credential).and_then(|it| it.status.kind);
                let kind = kind.map_or("none", |kind| kind.as_str());
                format!(
                    "rule `{}` is for login = \"{login}\", and `{credential}` is signed in with: {kind}",
                    rule.name
                )
            }
            _ => "its rules sign nothing in".to_owned(),
        }
    }

    fn explain_exchange(&self, origin: &Origin, method: &Method, path: &str) {
        let rule = match self.rules.find(origin, method, path) {
            Found::Rule(rule) => rule,
            Found::Unmatched(Unmatched::Forward) => {
                return say("rule", "none covers this path and method: sent on as it is");
            }
            Found::Unmatched(Unmatched::Refuse) => {
                return say(
                    "rule",
                    "none covers this path and method: refused (403 target_forbidden)",
                );
            }
        };
        say("rule", &rule.name);
        match &rule.action {
            Action::Inject { .. } if method == Method::TRACE => {
                say("answer", "refused (403 target_forbidden): a TRACE would show the credential");
            }
            Action::Inject { uses, injection } => {
                self.explain_injection(uses, injection);
                if rule.scrub {
                    self.explain_scrubbing(&uses.credential);
                }
                if rule.websocket_fallback {
                    say("websocket", "where none can be had: 426, on which Codex uses HTTP");
                }
            }
            Action::Issuer { uses } => {
                say("credential", uses.credential.to_string());
                say(
                    "answer",
                    "a refresh of this login is answered by valetkey's own, one of decoys with decoys; all else passes through",
                );
            }
            Action::Refuse => {
                say("answer", "refused (403 target_forbidden): the rule refuses this path")
            }
            Action::Tunnel => say("answer", "sent on as it is"),
        }
    }

    fn explain_injection(&self, uses: &Use, injection: &Injection) {
        let Some(credential) = self.credential(&uses.credential) else { return };
        say("credential", format!("{} ({})", credential.name, credential.sentence()));
        if let Some(reason) = credential.reason() {
            say("because", reason);
        }
        say("kept in", &credential.place);
        if let Some(at) = credential.status.expires_at {
            say("expires", status::in_words(at));
        }
        if let Some(at) = credential.status.last_refresh {
            say("refreshed", status::in_words(at));
        }
        for (name, template) in injection.templates() {
            let account = &credential.status.account;
            let is_absent = |field| field != Field::Token && account.field(field).is_none();
            let note = if template.fields().any(is_absent) {
                "  (empty: removed and not set)"
            } else {
                ""
            };
            say("sets", format!("{name}: {template}{note}"));
        }
        for name in injection.removed() {
            say("removes", name.as_str());
        }
        match credential.status.state {
            State::Ok => {}
            State::Dead(_) | State::NoLogin | State::Unsupported(_) => {
                let how = credential.name.how_to_sign_in();
                say(
                    "answer",
                    format!("refused (403 login_required) until somebody signs in: {how}"),
                );
            }
            State::Forbidden(_) => {
                say("answer", "refused (403 policy_forbids): see valetkey check --managed")
            }
            State::Unreadable(_) => say("answer", credential.unreadable()),
        }
    }

    fn explain_scrubbing(&self, name: &CredentialName) {
        match self.unscrubbed.get(name) {
            Some(why) => say("answer", format!("refused (403 target_forbidden): {why}")),
            None => {
                let what = "the credential from what the upstream answers, which is asked for";
                say("scrubs", format!("{what} uncompressed and whole"));
            }
        }
    }

    fn credential(&self, name: &CredentialName) -> Option<&Shown> {
        self.shown.iter().find(|shown| shown.name == *name)
    }
}

fn say(what: &str, value: impl AsRef<str>) {
    output::data(format_args!("  {what:<12}{}", value.as_ref()));
}
