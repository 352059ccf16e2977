//! `valetkey completions`: scripts that complete what is typed.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use super::output;

/// What `completions` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The shell that will read the script
    shell: Shell,
}

pub(super) fn run<C: CommandFactory>(arguments: &Arguments) -> ExitCode {
    let mut script = Vec::new();
    generate(arguments.shell, &mut C::command(), "valetkey", &mut script);
    output::raw(&String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}
