//! `valetkey ca`: the local CA, for whoever must trust it.

mod anchors;
mod install;
mod keychain;
mod nss;
mod rotate;
mod step;
mod stores;

use std::process::ExitCode;

use clap::Subcommand;

use super::Typed;
use super::output::{self, Failure};
use super::start::ca_dir;
use crate::clock::Clock;
use crate::tls::ca::{LocalCa, Root};

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
    /// Put the root certificates where programs of this system look
    ///
    /// Not needed for `valetkey run` and `valetkey env`. Each step is shown as you could type it yourself; those
    /// that need root go through sudo. Roots that have expired or were ended by `rotate` are taken out. Only
    /// certificates are installed, never keys; they are good for the hosts that your rules name and no others.
    Install(install::Arguments),
    /// Take all root certificates of yours out again, also those whose files are gone
    Uninstall(install::Arguments),
    /// Make a new root beside the old ones, which go on signing until `rotate --finish`
    ///
    /// A planned renewal is three commands: `ca rotate`, `ca install` (where you have installed), and, when every
    /// client knows the new root, `ca rotate --finish`. When a key may be in the wrong hands: `ca rotate --now`,
    /// then `ca install`. A `serve` that runs signs under the old root until it is started again, or has read a
    /// configuration that names other hosts.
    Rotate(rotate::Arguments),
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    match arguments.command {
        Command::Path => print(typed, |root| {
            if let Some(path) = root.path() {
                output::data(path.display());
            }
        }),
        Command::Print => print(typed, |root| output::raw(&root.pem())),
        Command::Fingerprint => print(typed, |root| output::data(root.fingerprint().with_colons())),
        Command::Install(arguments) => install::install(arguments, typed),
        Command::Uninstall(arguments) => install::uninstall(arguments, typed),
        Command::Rotate(arguments) => rotate::run(arguments, typed),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// There is a CA after this: one is made where there was none, so that a client can be told to trust it
/// before the first proxy runs.
fn print(typed: &Typed, show: impl Fn(&Root)) -> Result<(), Failure> {
    let config = match typed.config() {
        Ok(config) => config,
        Err(failure) => return print_what_is_there(typed, failure, show),
    };
    let names = config.ca_names();
    let ca =
        LocalCa::open(&ca_dir(&config.paths), &names, Clock::system()).map_err(output::hinted)?;
    ca.roots().iter().for_each(show);
    Ok(())
}

/// The roots that there are need no configuration; where there are none it would have to say for which hosts.
fn print_what_is_there(
    typed: &Typed,
    mistakes: Failure,
    show: impl Fn(&Root),
) -> Result<(), Failure> {
    let roots = LocalCa::load_roots(&ca_dir(&typed.paths()?)).map_err(output::hinted)?;
    if roots.is_empty() {
        return Err(mistakes);
    }
    mistakes.report();
    roots.iter().for_each(show);
    Ok(())
}
