//! `valetkey check`: reads the configuration and everything that it names.

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::credentials;
use super::output::{self, Failure};
use super::way_out::WayOut;
use super::{Typed, entrances, passes, past, process, status};
use crate::config::{Config, LoginSpec};
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
        if let Some(source) = kind.source()
            && let Err(error) = credentials::source_of(source, &typed.env).load()
        {
            wrong.push(output::hinted(error).about(&format!("credential `{name}`")));
        }
    }
    match passes::file(&config).read() {
        Ok(passes) => wrong.extend(entrances::obstacles(&config.listeners, !passes.is_empty())),
        Err(error) => wrong.push(output::hinted(error)),
    }
    let shown = match way_out {
        Some(way_out) => {
            let reading = status::read_through(typed, &config, way_out.upstream);
            process::runtime()?.block_on(reading).unwrap_or_default()
        }
        None => Vec::new(),
    };
    for shown in shown {
        if let (true, State::Unreadable(why)) = (shown.is_shared, &shown.status.state) {
            wrong.push(Failure::new(format!("credential `{}`: {why}", shown.name)));
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
    let file = &config.paths.config_file;
    let read = if file.exists() { file.display().to_string() } else { "the defaults alone".into() };
    output::words(format_args!(
        "ok: {read}; rules: {}; credentials: {}",
        rules.len(),
        config.credentials.len()
    ));
    Ok(ExitCode::SUCCESS)
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
