//! `valetkey init`: what puts a tool into place behind a proxy.

mod codex;
mod decoy;

use std::process::ExitCode;

use clap::Subcommand;

use super::Typed;
use super::output::Failure;

/// What `init` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    place: Place,
}

#[derive(Debug, Subcommand)]
enum Place {
    /// A home for a Codex that holds no login: decoys of yours
    Codex(codex::Arguments),
    /// A decoy for a tool that looks at the form of its key before it starts
    Decoy(decoy::Arguments),
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    match &arguments.place {
        Place::Codex(arguments) => codex::run(arguments, typed),
        Place::Decoy(arguments) => decoy::run(arguments, typed),
    }
    .map(|()| ExitCode::SUCCESS)
}
