//! `valetkey status`: who is signed in, how, and until when.

use std::process::ExitCode;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::output::{self, Failure};
use super::start::{self, WayOut, ca_dir};
use super::{Typed, process, running};
use crate::clock::Clock;
use crate::config::{Config, CredentialKind, SourceSpec};
use crate::credential::{CredentialName, LoginKind};
use crate::tasks::Tasks;
use crate::tls::ca::LocalCa;
use crate::tokens::{State, Status};

/// What `status` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Exits 0 when every credential can be used, else 1.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    let credentials = process::runtime()?.block_on(read(typed, &config))?;
    let proxy = running::find(&config.paths.runtime_dir, &typed.env);
    if arguments.json {
        let list: serde_json::Map<String, Value> =
            credentials.iter().map(|it| (it.name.to_string(), it.to_json())).collect();
        let proxy = proxy.as_ref().map(|proxy| json!({ "url": proxy.proxy, "pid": proxy.pid }));
        output::data(format_args!("{:#}", json!({ "credentials": list, "proxy": proxy })));
    } else {
        for credential in &credentials {
            output::raw(&credential.to_text());
        }
        match proxy {
            Some(proxy) => {
                output::data(format_args!("proxy     {} (pid {})", proxy.proxy, proxy.pid))
            }
            None => output::data("proxy     not running"),
        }
    }
    let all_good = credentials.iter().all(|it| it.status.state == State::Ok);
    Ok(if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One credential as it is shown.
pub(super) struct Shown {
    pub(super) name: CredentialName,
    /// Whether it is a cache that others write too, and not a key that is only read.
    pub(super) is_shared: bool,
    /// Where its value is kept.
    pub(super) place: String,
    pub(super) status: Status,
}

/// Reads every credential, and asks no issuer.
pub(super) async fn read(typed: &Typed, config: &Config) -> Result<Vec<Shown>, Failure> {
    let roots = LocalCa::load_roots(&ca_dir(config)).map_err(output::hinted)?;
    let way_out = WayOut::new(&config.upstream, &roots)?;
    let tokens = start::tokens(config, &typed.env, &way_out.upstream, &Tasks::new()).await;
    for (name, source) in tokens.iter() {
        if let Some(CredentialKind::ApiKey { .. }) = config.credentials.get(name) {
            // What comes of it is in the status.
            let _read_once = source.current().await;
        }
    }
    let shown = tokens.iter().map(|(name, source)| Shown {
        name: name.clone(),
        is_shared: matches!(config.credentials.get(name), Some(CredentialKind::Codex { .. })),
        place: config.credentials.get(name).map(place_of).unwrap_or_default(),
        status: source.status(),
    });
    Ok(shown.collect())
}

fn place_of(kind: &CredentialKind) -> String {
    match kind {
        CredentialKind::ApiKey { source: SourceSpec::Env(name) } => format!("env:{name}"),
        CredentialKind::ApiKey { source: SourceSpec::File(path) } => {
            format!("file:{}", path.display())
        }
        CredentialKind::Codex { home } => home.join("auth.json").display().to_string(),
    }
}

impl Shown {
    fn to_text(&self) -> String {
        let Status { account, expires_at, last_refresh, .. } = &self.status;
        let mut text = format!("{}\n", self.name);
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str(&format!("  {name:<10}{value}\n"));
            }
        };
        line("login", Some(self.sentence()));
        line("account", account.email.clone());
        line("workspace", account.id.clone());
        line("plan", account.plan.clone());
        line("expires", expires_at.map(in_words));
        line("refreshed", last_refresh.map(in_words));
        line("kept in", Some(self.place.clone()));
        text
    }

    /// How it is signed in, or why not.
    pub(super) fn sentence(&self) -> String {
        match (&self.status.state, self.status.kind) {
            (State::Ok, Some(LoginKind::ChatGpt)) => "Logged in using ChatGPT".to_owned(),
            (State::Ok, _) => "API key".to_owned(),
            (State::NoLogin, _) => "Not logged in".to_owned(),
            (State::Dead(code), _) => format!("over: the issuer said {code}; sign in again"),
            (State::Unsupported(what), _) => format!("cannot be used: {what}"),
            (State::Unreadable(why), _) => format!("cannot be read: {why}"),
        }
    }

    /// What a request gets while the credential cannot be read.
    pub(super) fn unreadable(&self) -> &'static str {
        match self.is_shared {
            true => "refused (503 store_unavailable) until it can be read",
            false => "refused (403 login_required) until it can be read",
        }
    }

    fn to_json(&self) -> Value {
        let Status { kind, account, expires_at, last_refresh, state } = &self.status;
        let moment = |at: &Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok());
        json!({
            "kind": kind.map(LoginKind::as_str),
            "usable": *state == State::Ok,
            "state": self.sentence(),
            "email": account.email,
            "account_id": account.id,
            "plan": account.plan,
            "expires_at": moment(expires_at),
            "last_refresh": moment(last_refresh),
            "place": self.place,
        })
    }
}

/// A moment as people read it: the time and how far it is.
pub(super) fn in_words(moment: OffsetDateTime) -> String {
    let distance = moment - Clock::system().now();
    let far = match distance.abs() {
        far if far.whole_days() >= 2 => format!("{} days", far.whole_days()),
        far if far.whole_hours() >= 2 => format!("{} hours", far.whole_hours()),
        far if far.whole_minutes() >= 2 => format!("{} minutes", far.whole_minutes()),
        far => format!("{} seconds", far.whole_seconds()),
    };
    let how = if distance.is_negative() { format!("{far} ago") } else { format!("in {far}") };
    let written = moment.replace_nanosecond(0).ok().and_then(|at| at.format(&Rfc3339).ok());
    format!("{} ({how})", written.unwrap_or_default())
}
