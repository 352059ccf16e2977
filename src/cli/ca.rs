//! `valetkey ca`: the local CA, for whoever must trust it.

use std::process::ExitCode;

use clap::Subcommand;

use super::Typed;
use super::output::{self, Failure};
use super::start::ca_dir;
use crate::clock::Clock;
use crate::tls::ca::LocalCa;

/// What `ca` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Command {
    /// Print the paths of the root certificates
    Path,
    /// Print the root certificates as PEM
    Print,
    /// Print the SHA-256 fingerprints of the root certificates
    Fingerprint,
}

/// There is a CA after this: one is made where there was none, so that a client can be told to trust it
/// before the first proxy runs.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    let names = config.rules.constraints();
    let ca = LocalCa::open(&ca_dir(&config), &names, Clock::system()).map_err(output::hinted)?;
    for root in ca.roots() {
        match arguments.command {
            Command::Fingerprint => output::data(with_colons(&root.fingerprint().to_hex())),
            Command::Path => {
                if let Some(path) = root.path() {
                    output::data(path.display());
                }
            }
            Command::Print => output::raw(&root.pem()),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The form in which browsers and `openssl x509 -fingerprint` show it.
fn with_colons(hex: &str) -> String {
    let pairs: Vec<&str> = (0..hex.len()).step_by(2).filter_map(|at| hex.get(at..at + 2)).collect();
    pairs.join(":").to_uppercase()
}
