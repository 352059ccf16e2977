//! `valetkey run -- CMD`: a program behind a proxy of its own.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::output::{self, Failure};
use super::process::Signals;
use super::running::{self, ServerInfo};
use super::start::{self, Started};
use super::{Typed, process};
use crate::config::{Config, CredentialKind, LoginSpec, SourceSpec};
use crate::proxy::{Door, Socket};
use crate::telemetry;

/// What `run` takes.
#[derive(Debug, clap::Args)]
#[command(override_usage = "valetkey run [OPTIONS] -- PROGRAM [ARGS]...")]
pub(super) struct Arguments {
    /// Use a local CA of this run alone, whose keys are never written
    #[arg(long)]
    ephemeral_ca: bool,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// How long the program has to end once it may no longer be signed in.
const GRACE: Duration = Duration::from_secs(5);

/// How long exchanges may go on after the program has ended: there is nobody left to read them.
const DRAIN: Duration = Duration::from_millis(100);

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    process::harden();
    telemetry::never_wait();
    process::runtime()?.block_on(run_behind(arguments, typed, config))
}

async fn run_behind(
    arguments: &Arguments,
    typed: &Typed,
    config: Config,
) -> Result<ExitCode, Failure> {
    let mut signals = Signals::passed_on()?;
    let ca = match arguments.ephemeral_ca {
        true => start::ephemeral_ca(&config)?,
        false => start::local_ca(&config)?,
    };
    // The program is our own user's, who needs no pass.
    let mut started = Started::new(config, ca, None, &typed.env).await?;
    let listener = start::bind(([127, 0, 0, 1], 0).into()).await?;
    let address = listener.local_addr()?;
    started.proxy.serve(Socket::Tcp(listener), Door::default());

    let runtime_dir = &started.config().paths.runtime_dir;
    process::private_dir(runtime_dir)?;
    running::sweep(runtime_dir);
    let folder = tempfile::Builder::new().prefix(running::RUN_PREFIX).tempdir_in(runtime_dir)?;
    let info = ServerInfo::of_this_process(
        format!("http://{address}"),
        started.write_roots(folder.path())?,
    );
    info.write(&folder.path().join(running::FILE))?;
    let client_env = started.client_env(address, &typed.env, folder.path())?;

    let [program, arguments @ ..] = &*arguments.command else {
        return Err(Failure::new("no program was named").status(output::WRONG_USE));
    };
    let mut child = Command::new(program);
    child.args(arguments).envs(client_env.iter());
    for name in variables_of_sources(started.config()) {
        if typed.env.get(name).is_some() {
            output::words(format_args!(
                "valetkey: {name} is not passed on: what is in it is for requests alone"
            ));
            child.env_remove(name);
        }
    }
    let status = match child.spawn() {
        Ok(child) => wait(child, &mut signals, &mut started).await,
        Err(error) => Ok(not_started(program, &error)),
    };
    // What came before was meant for the program.
    let mut impatience = Signals::ending()?;
    tokio::select! {
        () = started.shut_down(DRAIN) => {}
        _ = impatience.next() => {}
    }
    status.map(ExitCode::from)
}

/// Waits for the program, and passes on the signals that reach us and not it.
async fn wait(
    mut child: Child,
    signals: &mut Signals,
    started: &mut Started,
) -> Result<u8, Failure> {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    let on_terminal = io::stdin().is_terminal();
    loop {
        let received = tokio::select! {
            status = child.wait() => return Ok(exit_status(status?)),
            received = signals.next() => received,
            failure = started.forbidden() => {
                if let Some(pid) = pid {
                    let sent = kill_process(pid, Signal::TERM);
                    tracing::debug!(ok = sent.is_ok(), "the program was asked to end");
                }
                if timeout(GRACE, child.wait()).await.is_err() {
                    child.kill().await?;
                }
                return Err(failure);
            }
        };
        // A terminal sends these to the whole foreground group, so the program has them already.
        let by_terminal = [Signal::INT, Signal::QUIT, Signal::WINCH].contains(&received);
        let has_it = on_terminal && by_terminal;
        if let (Some(pid), false) = (pid, has_it) {
            let sent = kill_process(pid, received);
            tracing::debug!(?received, ok = sent.is_ok(), "signal passed on");
        }
    }
}

/// As a shell has it: the program's own status, or 128 and the number of the signal that ended it.
fn exit_status(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(1)
}

/// As a shell has it: 127 for a program that is not there, 126 for one that cannot be run.
fn not_started(program: &OsStr, error: &io::Error) -> u8 {
    if program.is_empty() {
        let failure = Failure::new("the program that was named is an empty word");
        failure.hint("is a variable not set? valetkey run -- PROGRAM").report();
        return 127;
    }
    let program = program.to_string_lossy();
    let failure = Failure::new(format!("{program}: {error}"));
    let failure = match error.kind() {
        io::ErrorKind::NotFound => failure.hint("is it installed, and in PATH?"),
        _ => failure,
    };
    failure.report();
    if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}

/// The variables of our environment that hold credentials: those for a chain too, whether it is in use or not.
pub(super) fn variables_of_sources(config: &Config) -> impl Iterator<Item = &str> {
    let upstream = &config.upstream;
    let logins = upstream.proxy_login.iter().chain(&upstream.other_logins);
    let of_chain = logins.filter_map(|login| match login {
        LoginSpec::Source(source) => Some(source),
        LoginSpec::Command(_) => None,
    });
    let sources = config.credentials.values().filter_map(CredentialKind::source).chain(of_chain);
    sources.filter_map(|source| match source {
        SourceSpec::Env(name) => Some(name.as_str()),
        SourceSpec::File(_) => None,
    })
}
