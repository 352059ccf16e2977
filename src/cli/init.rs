//! `valetkey init`: files that put valetkey into a place, or a tool that holds no credential behind it.

mod codex;
mod compose;
mod decoy;
mod devcontainer;
mod github;
mod launchd;
mod place;
mod service;
mod systemd;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::Typed;
use super::output::Failure;
use crate::config::{Config, ListenAddress};

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
    /// A dev container: a Feature that trusts the local CA, and settings that lead to the proxy on the host
    Devcontainer(InFolder),
    /// Docker Compose: a sidecar with a health check, and an example of a service that it signs in
    Compose(InFolder),
    /// GitHub Actions: a workflow whose steps use an API without holding its key
    Github(InFolder),
    /// Your systemd: a service that the first client starts, hardened
    Systemd(place::Arguments),
    /// macOS: an agent that is started when you log in, and kept running
    Launchd(place::Arguments),
}

/// What the generators take that write into a project.
#[derive(Debug, clap::Args)]
struct InFolder {
    /// The folder of the project
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    dir: PathBuf,

    #[command(flatten)]
    place: place::Arguments,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    match &arguments.place {
        Place::Codex(arguments) => codex::run(arguments, typed),
        Place::Decoy(arguments) => decoy::run(arguments, typed),
        Place::Devcontainer(arguments) => devcontainer::run(arguments, typed),
        Place::Compose(arguments) => compose::run(arguments),
        Place::Github(arguments) => github::run(arguments),
        Place::Systemd(arguments) => systemd::run(arguments, typed),
        Place::Launchd(arguments) => launchd::run(arguments, typed),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// The port that containers reach the host's proxy at: that of the first listener beyond loopback, else of the first.
fn port(config: &Config) -> u16 {
    let addresses = config.listeners.iter().filter_map(|it| match it.address {
        ListenAddress::Tcp(at) if at.port() != 0 => Some(at),
        _ => None,
    });
    let addresses: Vec<_> = addresses.collect();
    let beyond = addresses.iter().find(|at| !at.ip().is_loopback());
    beyond.or_else(|| addresses.first()).map_or(USUAL_PORT, |at| at.port())
}

/// The port in config/default.toml.
const USUAL_PORT: u16 = 8377;
