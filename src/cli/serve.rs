//! `valetkey serve`: the proxy in the foreground.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::sleep;

use super::activation::{self, Inherited};
use super::changes::{Changes, Complaint};
use super::entrances::Entrances;
use super::output::{self, Failure};
use super::passes::{self, Followed};
use super::running::{self, ServerInfo};
use super::start::{self, Started};
use super::{Typed, process};
use crate::clock::Clock;
use crate::config::env::Environment;
use crate::config::{Config, SourceSpec};
use crate::lock;
use crate::panics;
use crate::tasks::Tasks;
use crate::telemetry;

/// What `serve` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Address to listen on, instead of the configured ones; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS")]
    pub(super) listen: Option<String>,

    /// Also write where the proxy runs to this file: JSON with "proxy", "port", "pid", "ca", …, with TLS also "tls_name"
    #[arg(long, value_name = "FILE")]
    pub(super) server_info: Option<PathBuf>,
}

/// How long exchanges may go on after the first signal; a second one ends them at once.
const DRAIN: Duration = Duration::from_secs(10);

/// How long another may keep the folder locked, for which it needs a millisecond.
const LOCK_LIMIT: Duration = Duration::from_millis(500);

/// How often it is looked whether another has ended: twice in the time that `env` waits for a proxy to start
/// (`running::PATIENCE`).
const LOOK: Duration = Duration::from_secs(1);

pub(super) fn run(typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    process::harden();
    telemetry::never_wait();
    process::forbid_core_files();
    process::raise_descriptors();
    process::require_descriptors()?;
    let inherited = activation::inherited()?;
    process::runtime()?.block_on(serve(typed, config, inherited))
}

async fn serve(typed: &Typed, config: Config, inherited: Inherited) -> Result<ExitCode, Failure> {
    let mut signals = process::Signals::ending()?;
    let (mut serving, mut changes) = Serving::begin(typed, config, inherited).await?;
    let outcome = serving.until_asked_to_end(&mut signals, &mut changes).await;
    activation::stopping();
    output::words("shutting down; a second signal ends it at once");
    serving.take_word_back();
    tokio::select! {
        () = serving.end() => {}
        _ = signals.next() => {}
    }
    serving.entrances.tidy();
    if panics::count() > 0 {
        output::warning(format_args!(
            "mistakes of valetkey's own while it ran: {}; please report what it logged of them",
            panics::count()
        ));
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// A proxy that runs, and what it goes by.
struct Serving<'a> {
    typed: &'a Typed,
    started: Started,
    entrances: Entrances,
    followed: Arc<Followed>,
    /// What was left for other commands, in these files.
    info: ServerInfo,
    files: Vec<PathBuf>,
    /// Those of `files` without it: with the word of another who still runs, or which could not be written.
    missing: Vec<PathBuf>,
    /// Why it is missing, beside another's word.
    complaint: Complaint,
    has_terminal: bool,
}

impl<'a> Serving<'a> {
    async fn begin(
        typed: &'a Typed,
        config: Config,
        inherited: Inherited,
    ) -> Result<(Self, Changes), Failure> {
        let has_terminal = process::has_terminal();
        warn_of_missing_variables(&config, &typed.env);
        start::warn_of_descriptors(&config);
        let (file, tasks) = (passes::file(&config.paths), Tasks::new());
        let followed = Followed::read(file, Clock::system(), tasks.clone());
        let followed = Arc::new(followed.map_err(output::hinted)?);
        let ca = start::local_ca(&config)?;
        let started = Started::new(config, ca, Some(&followed), &typed.env).await?;
        let config = started.config();
        let runtime_dir = &config.paths.runtime_dir;
        process::private_dir(runtime_dir)?;
        running::sweep(runtime_dir);
        let files = [Some(runtime_dir.join(running::FILE)), config.server_info.clone()];
        let files: Vec<PathBuf> = files.into_iter().flatten().collect();

        let mut entrances = Entrances::new(inherited, &config.listeners)?;
        let prepared = entrances.prepare(&config.listeners, followed.passes.has_any()).await?;
        entrances.open(prepared, &started.proxy);
        let following = followed.clone();
        tasks.keep("following the passes", move || following.clone().follow());
        let info = entrances.server_info(started.write_roots(runtime_dir)?)?;
        let mut serving = Self {
            typed,
            started,
            entrances,
            followed,
            info,
            files,
            missing: Vec::new(),
            complaint: Complaint::default(),
            has_terminal,
        };
        serving.leave_word()?;
        let changes = Changes::of(serving.started.config().files(), Tasks::new());
        // Who hears it finds the word, and is followed.
        serving.entrances.announce();
        activation::ready(&format!("listening on {}", serving.info.proxy));
        serving.say_how_to_use();
        Ok((serving, changes))
    }

    /// Says how a shell is put behind it, where that is so: `env` finds one proxy, and variables lead to no socket and no
    /// TLS.
    fn say_how_to_use(&self) {
        if !self.info.proxy.starts_with("http://") {
            return;
        }
        let runtime_dir = &self.started.config().paths.runtime_dir;
        let found = running::find(runtime_dir, &self.typed.env);
        if found.is_some_and(|found| found.pid == self.info.pid) {
            output::words("put a shell behind it: eval \"$(valetkey env)\"");
        } else {
            let proxy = &self.info.proxy;
            output::words(format_args!(
                "put a shell behind it: eval \"$(valetkey env --proxy-url {proxy})\""
            ));
        }
    }

    /// Says to other commands where it runs; over nobody's word who still runs.
    fn leave_word(&mut self) -> Result<(), Failure> {
        let dir = &self.started.config().paths.runtime_dir;
        let folder = File::open(dir).map_err(|error| Failure::at(dir, error))?;
        // Of two who start at once, or wait for the same end, one is found and the other knows of it. One that was stopped
        // meanwhile is not waited for: at worst both leave their word, and the later one stays.
        let _is_locked = lock::wait(&folder, LOCK_LIMIT);
        let (mut missing, mut outcome) = (Vec::new(), Ok(()));
        for file in &self.files {
            match ServerInfo::read(file).filter(|other| other.pid != self.info.pid) {
                Some(other) => {
                    let ServerInfo { proxy, pid, .. } = other;
                    output::warning(format_args!(
                        "another valetkey runs at {proxy} (pid {pid}), and is found in {} until it ends",
                        file.display()
                    ));
                    output::hint(
                        "to have `env` and `status` find this one: --server-info FILE, and VALETKEY_SERVER_INFO=FILE",
                    );
                    missing.push(file.clone());
                }
                None => {
                    if let Err(error) = self.info.write(file) {
                        missing.push(file.clone());
                        outcome = Err(Failure::at(file, error));
                    }
                }
            }
        }
        self.missing = missing;
        outcome
    }

    /// Serves, and follows what it goes by.
    ///
    /// # Errors
    ///
    /// [`Failure`] when a login that is not allowed ends it.
    async fn until_asked_to_end(
        &mut self,
        signals: &mut process::Signals,
        changes: &mut Changes,
    ) -> Result<(), Failure> {
        loop {
            // Outlives the other branches: dropped, it would forget what it has heard of.
            let mut changed = std::pin::pin!(changes.next_settled());
            loop {
                tokio::select! {
                    signal = signals.next() => match signal {
                        // From a terminal that is gone it means what it means to every program.
                        Signal::HUP if !self.has_terminal || process::has_terminal() => break,
                        _ => return Ok(()),
                    },
                    () = &mut changed => break,
                    () = one_is_free(&self.missing), if !self.missing.is_empty() => self.take_place(),
                    () = panics::next() => self.tell_of_panics(),
                    failure = self.started.forbidden() => return Err(failure),
                }
            }
            self.reload().await;
        }
    }

    /// Takes the place of one that has ended: often it was letting its exchanges end when this one started.
    fn take_place(&mut self) {
        let dir = &self.started.config().paths.runtime_dir;
        // The folder may be gone with the other, and the roots in it may be those of the other.
        let written = process::private_dir(dir).and_then(|()| self.started.write_roots(dir));
        let outcome = written.and_then(|_roots| self.leave_word());
        let wrong = outcome.as_ref().err().map(|failure| failure.message().to_owned());
        self.complaint.now(wrong);
        if outcome.is_ok() && self.missing.is_empty() {
            output::words(
                "the other valetkey has given its place up: `env` and `status` find this one now",
            );
        }
    }

    /// Leaves word of how many there were, for `status`.
    fn tell_of_panics(&mut self) {
        self.info.panics = panics::count();
        if let Err(failure) = self.leave_word() {
            failure.report();
        }
    }

    /// Reads everything again. What is wrong is said, and what was in force stays so.
    async fn reload(&mut self) {
        activation::reloading();
        let outcome = self.try_reload().await;
        activation::ready(&format!("listening on {}", self.info.proxy));
        match outcome {
            Ok(()) => {
                let file = &self.started.config().paths.config_file;
                if !file.exists() {
                    output::warning(format_args!(
                        "{} is not there: the defaults hold",
                        file.display()
                    ));
                }
                output::words("the configuration was read again and is in force");
            }
            Err(failure) => {
                failure.report();
                output::words("the configuration from before stays in force");
            }
        }
    }

    async fn try_reload(&mut self) -> Result<(), Failure> {
        let config = self.typed.config()?;
        warn_of_missing_variables(&config, &self.typed.env);
        start::warn_of_descriptors(&config);
        process::private_dir(&config.paths.runtime_dir)?;
        self.followed.look().await.map_err(output::hinted)?;
        // An address may be taken, and the rest can be undone no more; who may come changes when nothing fails.
        let has_passes = self.followed.passes.has_any();
        let prepared = self.entrances.prepare(&config.listeners, has_passes).await?;
        self.started.reload(config, &self.typed.env).await?;
        self.entrances.open(prepared, &self.started.proxy);
        // It is in force, whether others can be told of it or not.
        if let Err(failure) = self.tell() {
            failure.report();
        }
        self.entrances.announce();
        Ok(())
    }

    /// Says to other commands and to clients what has changed for them.
    fn tell(&mut self) -> Result<(), Failure> {
        let runtime_dir = &self.started.config().paths.runtime_dir;
        let before = fs::read(&self.info.ca).unwrap_or_default();
        let roots = self.started.write_roots(runtime_dir)?;
        if fs::read(&roots).unwrap_or_default() != before {
            output::words(
                "there is a new root for hosts that were not ruled before: clients trust it after",
            );
            output::words(
                "  eval \"$(valetkey env)\", and where it was installed: valetkey ca install",
            );
        }
        self.info = self.entrances.server_info(roots)?;
        self.info.panics = panics::count();
        self.leave_word()
    }

    /// Ends serving, and saves what is to last.
    async fn end(&self) {
        self.started.shut_down(DRAIN).await;
        if let Err(error) = self.followed.save().await {
            output::warning(output::chain_of(&error));
        }
    }

    /// Nobody is led to it any more: it takes no new clients, and another may wait for its place.
    fn take_word_back(&self) {
        for file in &self.files {
            // Only our own word: another proxy may have started meanwhile.
            if ServerInfo::read(file).is_some_and(|now| now.pid == self.info.pid) {
                let _gone_already = fs::remove_file(file);
            }
        }
    }
}

/// Waits until one of these files holds nobody's word: who left it has ended, or it is gone. It is looked at, as the end of
/// a process that is no child can be awaited on Linux alone.
async fn one_is_free(files: &[PathBuf]) {
    loop {
        sleep(LOOK).await;
        if files.iter().any(|file| ServerInfo::read(file).is_none()) {
            return;
        }
    }
}

/// Says which variables are not there that keys are read from: they cannot come while the process runs.
fn warn_of_missing_variables(config: &Config, env: &Environment) {
    for (name, kind) in &config.credentials {
        if let Some(SourceSpec::Env(variable)) = kind.source()
            && env.get(variable).is_none()
        {
            output::warning(format_args!("credential `{name}`: {variable} is not set here"));
            output::hint(format_args!(
                "set it where valetkey is started, and start it again; or use source = \"file:/path\""
            ));
        }
    }
}
