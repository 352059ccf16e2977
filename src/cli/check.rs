//! `valetkey check`: reads the configuration and everything that it names.

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::credentials;
use super::output::{self, Failure};
use super::way_out::WayOut;
use super::{Typed, audit, entrances, passes, past, process, start, status};
use crate::config::{Config, LoginSpec};
use crate::credential::CredentialName;
use crate::rules::Rule;
use crate::scrub::Scrubber;
use crate::secret::Secret;
use crate::tokens::State;

/// What `check` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Show instead what the owner of the machine has settled, and in which file
    #[arg(long)]
    managed: bool,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    if arguments.managed {
        return show_managed(&config);
    }
    let mut wrong = Vec::new();
    let way_out = match WayOut::of(&config, &typed.env) {
        Ok(way_out) => Some(way_out),
        Err(failure) => {
            wrong.push(failure);
            None
        }
    };
    if let Some(LoginSpec::Source(source)) = &config.upstream.proxy_login
        && let Err(error) = credentials::source_of(source, &typed.env).load_text()
    {
        wrong.push(output::hinted(error).about("upstream.proxy_login"));
    }
    for (name, kind) in &config.credentials {
        let Some(source) = kind.source() else { continue };
        let about = format!("credential `{name}`");
        match credentials::source_of(source, &typed.env).load() {
            Ok(secret) => {
                wrong.extend(unscrubbed(&config, name, &secret).map(|it| it.about(&about)))
            }
            Err(error) => wrong.push(output::hinted(error).about(&about)),
        }
    }
    match passes::file(&config.paths).read() {
        Ok(passes) => wrong.extend(entrances::obstacles(&config.listeners, !passes.is_empty())),
        Err(error) => wrong.push(output::hinted(error)),
    }
    wrong.extend(audit::look_ahead(&config).err());
    process::raise_descriptors();
    wrong.extend(process::require_descriptors().err());
    start::warn_of_descriptors(&config);
    let shown = match way_out {
        Some(way_out) => {
            let reading = status::read_through(typed, &config, way_out.upstream);
            process::runtime()?.block_on(reading).unwrap_or_default()
        }
        None => Vec::new(),
    };
    for shown in shown {
        if let (true, State::Unreadable(why)) = (shown.is_shared, &shown.status.state) {
            let failure = Failure::new(format!("credential `{}`: {why}", shown.name));
            wrong.push(match shown.hint() {
                Some(hint) => failure.hint(hint),
                None => failure,
            });
        }
    }
    for target in past::hosts_past(&config.rules) {
        output::warning(past::sentence(&target));
        output::hint(past::FIX);
    }
    for failure in &wrong {
        failure.report();
    }
    if !wrong.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    let rules: BTreeSet<&str> = config.rules.iter().map(|rule| rule.name.as_str()).collect();
    let scrubbed: BTreeSet<&str> =
        config.rules.iter().filter(|it| it.scrub).map(|it| it.name.as_str()).collect();
    if !scrubbed.is_empty() {
        let names: Vec<_> = scrubbed.into_iter().collect();
        output::words(format_args!("scrubbed from answers by: {}", names.join(", ")));
    }
    let file = &config.paths.config_file;
    let read = if file.exists() { file.display().to_string() } else { "the defaults alone".into() };
    output::words(format_args!(
        "ok: {read}; rules: {}; credentials: {}",
        rules.len(),
        config.credentials.len()
    ));
    Ok(ExitCode::SUCCESS)
}

/// What is wrong with a secret that a rule has scrubbed from answers.
fn unscrubbed(config: &Config, name: &CredentialName, secret: &Secret) -> Option<Failure> {
    let uses =
        |rule: &Rule| rule.scrub && rule.action.uses().is_some_and(|uses| uses.credential == *name);
    let rule = config.rules.iter().find(|rule| uses(rule))?;
    let failure = Failure::new(Scrubber::new(secret).err()?.to_string());
    Some(
        failure.hint(format!(
            "use a longer one, or take `scrub = true` out of the rule `{}`",
            rule.name
        )),
    )
}

/// One line for each setting, with its file.
fn show_managed(config: &Config) -> Result<ExitCode, Failure> {
    let settings = config.managed().map_err(output::mistakes)?;
    for setting in &settings {
        output::data(setting);
    }
    if settings.is_empty() {
        output::data("nothing is managed");
    }
    Ok(ExitCode::SUCCESS)
}
