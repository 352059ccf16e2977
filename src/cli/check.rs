//! `valetkey check`: reads the configuration and everything that it names.

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::output::{self, Failure};
use super::start::{self, WayOut, ca_dir};
use super::{Typed, process, status};
use crate::config::CredentialKind;
use crate::tls::ca::LocalCa;
use crate::tokens::State;

pub(super) fn run(typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    let roots = LocalCa::load_roots(&ca_dir(&config)).map_err(output::hinted)?;
    let mut wrong = Vec::new();
    if let Err(failure) = WayOut::new(&config.upstream, &roots) {
        wrong.push(failure);
    }
    for (name, kind) in &config.credentials {
        if let CredentialKind::ApiKey { source } = kind
            && let Err(error) = start::source_of(source, &typed.env).load()
        {
            wrong.push(output::hinted(error).about(&format!("credential `{name}`")));
        }
    }
    for shown in process::runtime()?.block_on(status::read(typed, &config)).unwrap_or_default() {
        if let (true, State::Unreadable(why)) = (shown.is_shared, &shown.status.state) {
            wrong.push(Failure::new(format!("credential `{}`: {why}", shown.name)));
        }
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
