//! `valetkey status`, and `valetkey login status`: who is signed in, how, and until when.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::credentials::{Credentials, Turn, source_of};
use super::output::{self, Failure};
use super::running::{self, ServerInfo};
use super::way_out::WayOut;
use super::{Typed, audit, process};
use crate::clock::Clock;
use crate::config::env::Environment;
use crate::config::paths::Paths;
use crate::config::{Config, CredentialKind, SourceSpec};
use crate::credential::{CredentialName, Grant, LoginKind};
use crate::source::SourceError;
use crate::store;
use crate::tasks::Tasks;
use crate::tokens::{State, Status};
use crate::upstream::Upstream;

/// What `status` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `login status` takes.
#[derive(Debug, clap::Args)]
pub(super) struct OneArguments {
    /// The credential [default: openai]
    #[arg(long, value_name = "NAME")]
    credential: Option<CredentialName>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Exits 0 when every credential can be used, else 1.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = match typed.config() {
        Ok(config) => config,
        Err(failure) => {
            // The proxy goes on by what it read before.
            show(arguments, None, running_proxy(typed)?);
            return Err(failure);
        }
    };
    let credentials = match process::runtime()?.block_on(read(typed, &config)) {
        Ok(credentials) => credentials,
        Err(failure) => {
            show(arguments, None, running_proxy(typed)?);
            return Err(failure);
        }
    };
    show(arguments, Some(&credentials), running_proxy(typed)?);
    for shown in &credentials {
        shown.say_more();
    }
    if let Err(failure) = audit::look_ahead(&config) {
        output::warning(failure.message());
        failure.first_hint().into_iter().for_each(output::hint);
    }
    let all_good = credentials.iter().all(Shown::is_usable);
    Ok(if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn running_proxy(typed: &Typed) -> Result<Option<ServerInfo>, Failure> {
    Ok(running::find(&Paths::find(&typed.env, None)?.runtime_dir, &typed.env))
}

/// Shows both, or the proxy alone where the credentials are not known.
fn show(arguments: &Arguments, credentials: Option<&[Shown]>, proxy: Option<ServerInfo>) {
    if arguments.json {
        let pair = |it: &Shown| (it.name.to_string(), it.to_json());
        let list: Option<serde_json::Map<String, Value>> =
            credentials.map(|credentials| credentials.iter().map(pair).collect());
        let proxy = proxy
            .map(|proxy| json!({ "url": proxy.proxy, "pid": proxy.pid, "panics": proxy.panics }));
        return output::data(format_args!("{:#}", json!({ "credentials": list, "proxy": proxy })));
    }
    for credential in credentials.unwrap_or_default() {
        output::data(&credential.name);
        output::raw(&credential.to_text("  "));
    }
    match proxy {
        Some(proxy) => {
            output::data(format_args!("proxy           {} (pid {})", proxy.proxy, proxy.pid));
            if proxy.panics > 0 {
                output::data(format_args!(
                    "  panics        {}: please report what it logged of them",
                    proxy.panics
                ));
            }
        }
        None => output::data("proxy           not running"),
    }
}

/// Exits 0 when the credential can be used, else 1.
pub(super) fn run_one(arguments: &OneArguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    let name = match &arguments.credential {
        Some(name) => name.clone(),
        None => CredentialName::USUAL.parse()?,
    };
    let credentials = process::runtime()?.block_on(read(typed, &config))?;
    let Some(shown) = credentials.iter().find(|shown| shown.name == name) else {
        return Err(output::no_credential(&config, &name));
    };
    if arguments.json {
        output::data(format_args!("{:#}", shown.to_json()));
    } else {
        output::raw(&shown.to_text(""));
    }
    shown.say_more();
    Ok(if shown.is_usable() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One credential as it is shown.
pub(super) struct Shown {
    pub(super) name: CredentialName,
    /// Whether it is a login that is saved here, and not a key that is only read.
    pub(super) is_shared: bool,
    /// Whether it is Codex's.
    is_codex: bool,
    /// Whether nobody has to sign in.
    is_by_itself: bool,
    /// Where its value is kept.
    pub(super) place: String,
    /// The file that it is in, if it is a login in a file.
    pub(super) file: Option<PathBuf>,
    pub(super) status: Status,
    /// Why it cannot be read, with all causes, and what to do about it.
    trouble: Option<(String, String)>,
}

/// Reads every credential, and asks no issuer.
pub(super) async fn read(typed: &Typed, config: &Config) -> Result<Vec<Shown>, Failure> {
    let way_out = WayOut::of(config, &typed.env)?;
    read_through(typed, config, way_out.upstream).await
}

/// The same, for who has a way out already.
pub(super) async fn read_through(
    typed: &Typed,
    config: &Config,
    upstream: Upstream,
) -> Result<Vec<Shown>, Failure> {
    let credentials = Credentials::new(config, &typed.env, upstream, Tasks::new());
    let tokens = credentials.tokens().await?;
    let mut all = Vec::new();
    for (name, source) in tokens.iter() {
        let kind = config.credentials.get(name);
        let is_key = matches!(kind, Some(CredentialKind::ApiKey { .. }));
        if is_key {
            // What comes of it is in the status.
            let _read_once = source.current().await;
        }
        let status = source.status();
        let source_of_key = kind.filter(|_| is_key).and_then(|kind| kind.source().cloned());
        let trouble = match (&status.state, &source_of_key) {
            (State::Unreadable(_), Some(key)) => trouble_of_key(key, &typed.env),
            // A keyring that does not answer would be waited for a second time.
            (State::Unreadable(_), None) if is_path(source.place()) => {
                trouble_of_login(&credentials, name).await
            }
            _ => None,
        };
        all.push(Shown {
            name: name.clone(),
            is_shared: !is_key,
            is_codex: matches!(kind, Some(CredentialKind::Codex { .. })),
            is_by_itself: matches!(
                kind,
                Some(CredentialKind::OAuth(oauth)) if oauth.grant == Grant::ClientCredentials
            ),
            place: source.place().unwrap_or_else(|| kind.map(place_of).unwrap_or_default()),
            file: source.file(),
            status,
            trouble,
        });
    }
    Ok(all)
}

/// Whether a place is a file or a folder, and no entry of a keyring.
fn is_path(place: Option<String>) -> bool {
    place.is_some_and(|place| Path::new(&place).is_absolute())
}

/// What the store of a login says of it.
async fn trouble_of_login(
    credentials: &Credentials<'_>,
    name: &CredentialName,
) -> Option<(String, String)> {
    let error = credentials.cache(name, Turn::In).ok()?.store.get().await.err()?;
    Some((output::chain_of(&error), error.hint()))
}

/// What is said of a key where it is read from. One that is not there yet is put where it belongs.
fn trouble_of_key(key: &SourceSpec, env: &Environment) -> Option<(String, String)> {
    let error = source_of(key, env).load().err()?;
    let hint = match (&error, key) {
        (SourceError::Missing { .. }, SourceSpec::Env(name)) => {
            format!("set {name} where valetkey runs")
        }
        (SourceError::Missing { .. }, SourceSpec::File(path)) => {
            format!("write the key into {}", path.display())
        }
        _ => error.hint(),
    };
    Some((output::chain_of(&error), hint))
}

fn place_of(kind: &CredentialKind) -> String {
    match kind {
        CredentialKind::ApiKey { source } => source.to_string(),
        CredentialKind::Codex { home, .. } => home.display().to_string(),
        CredentialKind::OAuth(_) => String::new(),
    }
}

impl Shown {
    fn is_usable(&self) -> bool {
        self.status.state == State::Ok
    }

    fn to_text(&self, indent: &str) -> String {
        let Status { account, expires_at, last_refresh, .. } = &self.status;
        let mut text = format!("{indent}{}\n", self.sentence());
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str(&format!("{indent}  {name:<14}{}\n", output::printable(&value)));
            }
        };
        line("because", self.reason());
        line("account", account.email.clone());
        line("workspace", account.id.clone());
        line("plan", account.plan.clone());
        line("data rules", self.data_rules());
        line("second factor", self.second_factor().map(str::to_owned));
        line("expires", expires_at.map(in_words));
        line("refreshed", last_refresh.map(in_words));
        let place = Some(self.place.clone()).filter(|place| !place.is_empty());
        let is_there = self.status.state != State::NoLogin;
        line(if is_there { "kept in" } else { "looked in" }, place);
        text
    }

    /// Whether there is a login to go on with.
    ///
    /// # Errors
    ///
    /// [`Failure`] with what to type where there is none.
    pub(super) fn require_login(&self) -> Result<(), Failure> {
        let failure = Failure::new(format!("credential `{}`: {}", self.name, self.sentence()));
        match &self.status.state {
            State::Ok => Ok(()),
            State::NoLogin | State::Dead(_) | State::Unsupported(_) => {
                Err(failure.status(output::SIGN_IN_NEEDED).hint(self.name.how_to_sign_in()))
            }
            State::Forbidden(violation) => Err(Failure::new(violation.sentence.clone())
                .hint("what is asked for, and where: valetkey check --managed")),
            State::Unreadable(_) => {
                Err(failure.hint(self.hint().unwrap_or_else(|| "see: valetkey status".to_owned())))
            }
        }
    }

    /// How it is signed in, or why not; Codex's own words where it has some.
    pub(super) fn sentence(&self) -> String {
        let masked = || self.status.masked.clone().unwrap_or_default();
        match (&self.status.state, self.status.kind) {
            (State::Ok, Some(LoginKind::ChatGpt)) if self.status.masked.is_some() => {
                format!("Logged in using personal access token - {}", masked())
            }
            (State::Ok, Some(LoginKind::ChatGpt)) => "Logged in using ChatGPT".to_owned(),
            (State::Ok, Some(LoginKind::OAuth)) if self.is_by_itself => {
                "Signs in by itself (client credentials)".to_owned()
            }
            (State::Ok, Some(LoginKind::OAuth)) => "Logged in using OAuth".to_owned(),
            (State::Ok, _) => format!("API key configured - {}", masked()),
            (State::NoLogin | State::Forbidden(_), _) => "Not logged in".to_owned(),
            (State::Dead(_), _) => "Logged in, but the issuer has ended this login".to_owned(),
            (State::Unsupported(_), _) => "Logged in, in a way that cannot be used here".to_owned(),
            (State::Unreadable(_), _) => "Unknown: the login cannot be read".to_owned(),
        }
    }

    /// Why it cannot be used.
    pub(super) fn reason(&self) -> Option<String> {
        match &self.status.state {
            State::Ok | State::NoLogin => None,
            State::Dead(code) => {
                Some(format!("it said {code}; sign in again: {}", self.name.how_to_sign_in()))
            }
            // Whoever only looks deletes nothing.
            State::Forbidden(violation) => {
                let logging_out = "The next `run` or `serve` deletes it.";
                Some(violation.sentence.replace("Logging out.", logging_out))
            }
            State::Unsupported(what) => Some(format!("it is {what}")),
            State::Unreadable(why) => {
                Some(self.trouble.as_ref().map_or_else(|| why.clone(), |(why, _)| why.clone()))
            }
        }
    }

    /// What to do so that it can be used, where a person can.
    pub(super) fn hint(&self) -> Option<String> {
        match &self.status.state {
            State::NoLogin if !self.is_by_itself => Some(self.name.how_to_sign_in()),
            State::Unreadable(_) => self.trouble.as_ref().map(|(_, hint)| hint.clone()),
            _ => None,
        }
    }

    /// Says who else may see it, and what to do so that it can be used.
    fn say_more(&self) {
        if self.is_shared {
            for warning in self.file.iter().flat_map(|file| store::warnings(file)) {
                output::warning(warning);
            }
        }
        if let Some(hint) = self.hint() {
            output::hint(hint);
        }
    }

    /// Whose rules hold for what is sent with it.
    fn data_rules(&self) -> Option<String> {
        if !self.is_codex {
            return None;
        }
        match self.status.kind? {
            LoginKind::ApiKey => {
                Some("those of the API organisation that the key belongs to".into())
            }
            LoginKind::ChatGpt => Some("those of the ChatGPT workspace".into()),
            LoginKind::OAuth => None,
        }
    }

    /// Whether a second factor was used, for a ChatGPT login with an id token.
    fn second_factor(&self) -> Option<&'static str> {
        let has_tokens = self.status.masked.is_none();
        (self.is_codex && self.status.kind == Some(LoginKind::ChatGpt) && has_tokens).then_some(
            match self.status.mfa {
                Some(true) => "yes",
                Some(false) => "no",
                None => "not stated",
            },
        )
    }

    /// What a request gets while the credential cannot be read.
    pub(super) fn unreadable(&self) -> &'static str {
        match self.is_shared {
            true => "refused (503 store_unavailable) until it can be read",
            false => "refused (403 login_required) until it can be read",
        }
    }

    fn to_json(&self) -> Value {
        let Status { kind, account, expires_at, last_refresh, .. } = &self.status;
        let moment = |at: &Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok());
        json!({
            "kind": kind.map(LoginKind::as_str),
            "usable": self.is_usable(),
            "state": self.sentence(),
            "reason": self.reason(),
            "email": account.email,
            "account_id": account.id,
            "plan": account.plan,
            "data_rules": self.data_rules(),
            "mfa": self.second_factor(),
            "expires_at": moment(expires_at),
            "last_refresh": moment(last_refresh),
            "place": self.place,
        })
    }
}

/// A moment as people read it: the time and how far it is.
pub(super) fn in_words(moment: OffsetDateTime) -> String {
    let written = moment.replace_nanosecond(0).ok().and_then(|at| at.format(&Rfc3339).ok());
    let far = far(moment - Clock::system().now());
    format!("{} ({far})", written.unwrap_or_default())
}

/// How far a moment is, to the nearest of the largest unit of which it is two or more.
fn far(distance: time::Duration) -> String {
    let seconds = distance.abs().whole_milliseconds().saturating_add(500) / 1000;
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let nearest = |count: i64, of: i64| count.saturating_add(of / 2) / of;
    // Of what was just made to last two hours, a few milliseconds are gone.
    let minutes = nearest(seconds, 60);
    let far = match minutes {
        2880.. => output::counted(nearest(minutes, 24 * 60), "day"),
        120.. => output::counted(nearest(minutes, 60), "hour"),
        _ if seconds >= 120 => output::counted(minutes, "minute"),
        _ => output::counted(seconds, "second"),
    };
    if distance.is_negative() { format!("{far} ago") } else { format!("in {far}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_a_moment_is() {
        let table = [
            (8 * 3_600_000 - 7, "in 8 hours"),
            (7_200_000 - 7, "in 2 hours"),
            (7_100_000, "in 118 minutes"),
            (1_800_000 - 7, "in 30 minutes"),
            (119_400, "in 119 seconds"),
            (119_600, "in 2 minutes"),
            (1_000, "in 1 second"),
            (7, "in 0 seconds"),
            (-1_000, "1 second ago"),
            (-3 * 3_600_000, "3 hours ago"),
            (47 * 3_600_000, "in 47 hours"),
            (7 * 86_400_000 - 7, "in 7 days"),
            (-10 * 86_400_000, "10 days ago"),
        ];
        for (milliseconds, expected) in table {
            assert_eq!(far(time::Duration::milliseconds(milliseconds)), expected);
        }
        assert!(far(time::Duration::MIN).ends_with("days ago"));
    }
}
