//! `valetkey serve`: the proxy in the foreground.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::output::{self, Failure};
use super::running::{self, ServerInfo};
use super::start::{self, Started};
use super::{Typed, process};
use crate::config::{Config, ListenAddress};

/// What `serve` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Address to listen on, instead of the configured ones; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS")]
    pub(super) listen: Option<String>,

    /// Also write where the proxy runs to this file: {"port","pid","ca","proxy"}
    #[arg(long, value_name = "FILE")]
    pub(super) server_info: Option<PathBuf>,
}

/// How long exchanges may go on after the first signal; a second one ends them at once.
const DRAIN: Duration = Duration::from_secs(10);

pub(super) fn run(typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    process::harden();
    process::forbid_core_files();
    process::runtime()?.block_on(serve(typed, &config))
}

async fn serve(typed: &Typed, config: &Config) -> Result<ExitCode, Failure> {
    let mut signals = process::Signals::ending()?;
    let mut started = Started::new(config, &typed.env).await?;
    let mut listeners = Vec::new();
    for listener in &config.listeners {
        let ListenAddress::Tcp(address) = listener.address else { continue };
        listeners.push((start::bind(address).await?, listener.allow_uids.clone()));
    }
    let addresses: Vec<_> = listeners.iter().filter_map(|(it, _)| it.local_addr().ok()).collect();
    let first =
        addresses.first().ok_or_else(|| Failure::new("there is no address to listen on"))?;
    for (listener, allow_uids) in listeners {
        started.proxy.serve(listener, allow_uids);
    }

    let runtime_dir = &config.paths.runtime_dir;
    process::private_dir(runtime_dir)?;
    running::sweep(runtime_dir);
    let info = ServerInfo::of_this_process(*first, started.write_roots(runtime_dir)?);
    let files = [Some(runtime_dir.join(running::FILE)), config.server_info.clone()];
    let files: Vec<PathBuf> = files.into_iter().flatten().collect();
    for file in &files {
        info.write(file).map_err(|error| Failure::at(file, error))?;
    }
    for address in &addresses {
        output::words(format_args!("listening on http://{address}"));
    }
    output::words("put a shell behind it: eval \"$(valetkey env)\"");

    let forbidden = tokio::select! {
        _ = signals.next() => None,
        failure = started.forbidden() => Some(failure),
    };
    output::words("shutting down; a second signal ends it at once");
    tokio::select! {
        () = started.shut_down(DRAIN) => {}
        _ = signals.next() => {}
    }
    for file in &files {
        // Only our own word: another proxy may have started meanwhile.
        if ServerInfo::read(file).is_some_and(|now| now.pid == info.pid) {
            let _gone_already = fs::remove_file(file);
        }
    }
    forbidden.map_or(Ok(ExitCode::SUCCESS), Err)
}
