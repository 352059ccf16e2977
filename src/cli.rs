//! The command line: what was typed becomes a configuration once, and one command runs on it.

mod activation;
mod audit;
mod ca;
mod chain;
mod changes;
mod check;
mod completions;
mod credentials;
mod demo;
mod doctor;
#[cfg(test)]
mod documented;
mod entrances;
mod env;
mod explain;
mod health;
mod init;
mod login;
mod logout;
mod mistyped;
mod output;
mod pass;
mod passes;
mod past;
mod policies;
mod process;
mod programs;
mod roots;
mod run;
mod running;
mod serve;
mod start;
mod status;
mod token;
mod way_out;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::env::{Environment, LOG};
use crate::config::paths::Paths;
use crate::config::{Config, ListenAddress, Listener, Overrides};
use crate::fault;
use crate::origin::Target;
use crate::panics;
use crate::telemetry;
use output::{Failure, WRONG_USE};

/// A localhost HTTPS proxy that signs tools in without giving them the keys.
///
/// Start a tool with `valetkey run -- TOOL`: it gets a proxy of its own, which attaches your Codex login or
/// API key to the requests that your rules name. The tool never sees the credential.
#[derive(Debug, Parser)]
#[command(name = "valetkey", version, propagate_version = true)]
struct Arguments {
    /// Configuration file, instead of $XDG_CONFIG_HOME/valetkey/config.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// What to log to standard error: `info`, `debug`, `valetkey::proxy=debug`, …
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sign in, to a login that valetkey and Codex share
    Login(login::Arguments),
    /// Sign out, here and at the issuer
    Logout(logout::Arguments),
    /// Show who is signed in, how, and until when
    #[command(after_help = WHICH)]
    Status(status::Arguments),
    /// Run the proxy in the foreground
    Serve(serve::Arguments),
    /// Run a program behind a proxy of its own
    Run(run::Arguments),
    /// Print the variables that put a shell behind the running proxy
    #[command(after_help = WHICH)]
    Env(env::Arguments),
    /// Let others use this proxy: make, list and revoke passes
    Pass(pass::Arguments),
    /// Look whether the audit is as it was written
    Audit(audit::Arguments),
    /// Show, install or rotate the local CA that intercepted hosts are signed by
    Ca(ca::Arguments),
    /// Show every mistake of the configuration, then of the files and logins that it names
    Check(check::Arguments),
    /// Say what would happen to a request: which rule, which credential, which headers, or why not
    Explain(explain::Arguments),
    /// Look at everything that a request depends on, and name what is in its way
    Doctor(doctor::Arguments),
    /// Ask the running proxy whether it answers: for health checks
    #[command(after_help = WHICH)]
    Health(health::Arguments),
    /// Put valetkey into a place, or a tool behind it: files that are shown first, decoys in place of credentials
    Init(init::Arguments),
    /// Print the current secret of a credential, for tools that ask a command for it
    Token(token::Arguments),
    /// Show the whole thing at work, on this machine alone, in a few seconds
    Demo,
    /// Print a completion script for a shell
    Completions(completions::Arguments),
}

impl Command {
    /// What is logged unless somebody asks: a server tells what it does, a program that runs for a moment
    /// says by its own words what went wrong.
    fn usual_log(&self) -> &'static str {
        match self {
            Self::Serve(_) => "info",
            Self::Run(_) => "warn",
            _ => "error",
        }
    }
}

/// Runs the program as it was typed, and gives its exit status.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return ExitCode::from(mistyped::report(&error)),
    };
    let status = match dispatch(arguments).and_then(|status| output::lost().map_or(Ok(status), Err))
    {
        Ok(status) => status,
        Err(failure) => ExitCode::from(failure.report()),
    };
    telemetry::flush();
    status
}

/// What a command starts from.
struct Typed {
    env: Environment,
    overrides: Overrides,
}

impl Typed {
    /// Where files are, whatever the configuration says.
    fn paths(&self) -> Result<Paths, Failure> {
        let found = Paths::find(&self.env, self.overrides.config.clone());
        found.map_err(|error| {
            Failure::from(error).hint("set HOME to the folder of the user valetkey runs as")
        })
    }

    /// The configuration, with its mistakes shown all at once.
    fn config(&self) -> Result<Config, Failure> {
        let mut config = Config::load(&self.overrides, &self.env).map_err(output::mistakes)?;
        // A valetkey inside another one's environment goes out beside it, not through it.
        let runtime_dir = config.paths.runtime_dir.clone();
        let listeners = config.listeners.clone();
        let is_this = |target: &Target| {
            let at = |listener: &Listener| match &listener.address {
                ListenAddress::Tcp(address) => address.port() == target.port,
                ListenAddress::Unix(_) => false,
            };
            target.host.is_loopback() && listeners.iter().any(at)
        };
        let is_ours = |target: &Target| running::is_ours(&runtime_dir, target);
        config.upstream.ignore_proxies(|target| is_this(target) || is_ours(target));
        match config.upstream.proxies.first() {
            Some(proxy) if is_this(proxy.url.target()) => {
                let message = format!("{}: {} is valetkey itself", proxy.named_by, proxy.url);
                Err(Failure::new(message).hint("name the company's proxy there, or \"none\""))
            }
            _ => Ok(config),
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let env = Environment::from_process();
    let typed = arguments.log.map(|filter| ("--log", filter));
    let set = || env.text(LOG).map(|filter| (LOG, filter));
    let usual = || ("--log", arguments.command.usual_log().to_owned());
    let (named_by, filter) = typed.or_else(set).unwrap_or_else(usual);
    telemetry::start(&filter).map_err(|mistake| {
        Failure::new(format!("{named_by}: {mistake}"))
            .status(WRONG_USE)
            .hint("a level, error to debug, or that of a part: info, valetkey::proxy=debug")
    })?;

    panics::watch();
    if let Some(faults) = env.text(fault::VARIABLE) {
        fault::arm(&faults).map_err(|what| Failure::new(format!("{}: {what}", fault::VARIABLE)))?;
    }
    let overrides = Overrides { config: arguments.config, ..Overrides::default() };
    let mut typed = Typed { env, overrides };
    match arguments.command {
        Command::Audit(arguments) => audit::run(&arguments, &typed),
        Command::Ca(arguments) => ca::run(&arguments, &typed),
        Command::Check(arguments) => check::run(&arguments, &typed),
        Command::Completions(arguments) => Ok(completions::run::<Arguments>(&arguments)),
        Command::Demo => demo::run(&typed.env),
        Command::Doctor(arguments) => doctor::run(&arguments, &typed),
        Command::Env(arguments) => env::run(&arguments, &typed),
        Command::Explain(arguments) => explain::run(&arguments, &typed),
        Command::Health(arguments) => health::run(&arguments, &typed),
        Command::Init(arguments) => init::run(&arguments, &typed),
        Command::Login(arguments) => login::run(&arguments, &typed),
        Command::Logout(arguments) => logout::run(&arguments, &typed),
        Command::Pass(arguments) => pass::run(&arguments, &typed),
        Command::Run(arguments) => run::run(&arguments, &typed),
        Command::Serve(arguments) => {
            typed.overrides.listen.clone_from(&arguments.listen);
            typed.overrides.server_info.clone_from(&arguments.server_info);
            serve::run(&typed)
        }
        Command::Status(arguments) => status::run(&arguments, &typed),
        Command::Token(arguments) => token::run(&arguments, &typed),
    }
}

/// For the commands that look for a running proxy.
const WHICH: &str = "Where several proxies run, VALETKEY_SERVER_INFO names the file of one: serve --server-info FILE";
