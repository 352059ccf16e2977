//! `valetkey init codex`: a home for a Codex that holds no login, and starts as if it had one.

use std::path::{Component, Path, PathBuf};

use crate::cli::output::{self, Failure};
use crate::cli::status::{self, Shown};
use crate::cli::{Typed, process};
use crate::clock::Clock;
use crate::config::{Config, CredentialKind};
use crate::credential::{Account, CredentialName, LoginKind};
use crate::decoy::{self, DecoySet, Shape, Tag};
use crate::store::StoreError;
use crate::store::codex::plain;

/// What `init codex` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The home that is written: what CODEX_HOME is to say
    #[arg(long, value_name = "DIR", default_value = "codex-home")]
    dir: PathBuf,

    /// For an API key: write nothing, and print the variable that Codex reads one from
    #[arg(long, conflicts_with = "dir")]
    api_key: bool,

    /// The credential that it stands for [default: the one of kind codex]
    #[arg(long, value_name = "NAME")]
    credential: Option<CredentialName>,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    let name = match &arguments.credential {
        Some(name) => name.clone(),
        None => only_one(&config)?,
    };
    let credentials = process::runtime()?.block_on(status::read(typed, &config))?;
    let shown = credentials.iter().find(|shown| shown.name == name);
    let shown = shown.ok_or_else(|| output::no_credential(&config, &name))?;
    shown.require_login()?;
    match (arguments.api_key, shown.status.kind) {
        (true, Some(LoginKind::ApiKey)) => {
            print_key(&name);
            Ok(())
        }
        (false, Some(LoginKind::ChatGpt)) => write_home(&arguments.dir, &config, shown),
        (true, _) => Err(Failure::new(format!("`{name}` is not signed in with an API key")).hint(
            format!("for what it is signed in with: valetkey init codex --credential {name}"),
        )),
        (false, _) => Err(Failure::new(format!("`{name}` is not signed in with ChatGPT"))
            .hint(format!("for an API key: valetkey init codex --api-key --credential {name}"))),
    }
}

/// The credential that is meant where none is named.
fn only_one(config: &Config) -> Result<CredentialName, Failure> {
    let is_codex = |kind: &CredentialKind| matches!(kind, CredentialKind::Codex { .. });
    let mut all = config.credentials.iter().filter(|(_, kind)| is_codex(kind));
    if let Some((usual, _)) = all.clone().find(|(name, _)| name.as_str() == CredentialName::USUAL) {
        return Ok(usual.clone());
    }
    match (all.next(), all.next()) {
        (Some((name, _)), None) => Ok(name.clone()),
        (None, _) => Err(Failure::new("the configuration has no credential of kind codex")
            .hint("add to it: use = [\"openai\"]")),
        (Some((name, _)), Some(_)) => {
            Err(Failure::new("the configuration has several credentials of kind codex")
                .status(output::WRONG_USE)
                .hint(format!("say which: valetkey init codex --credential {name}")))
        }
    }
}

fn print_key(name: &CredentialName) {
    output::data(format_args!(
        "export CODEX_API_KEY='{}'",
        decoy::key(Tag::of(name), Shape::OpenAi)
    ));
    output::words(
        "Codex takes it for its key where it is behind valetkey: eval \"$(valetkey env)\"",
    );
}

fn write_home(dir: &Path, config: &Config, shown: &Shown) -> Result<(), Failure> {
    let dir = resolved(dir)?;
    refuse_home_in_use(&dir, config)?;
    let (tag, account) = (Tag::of(&shown.name), &shown.status.account);
    if account.id.is_none() {
        let message = format!("the workspace of `{}` is not known yet", shown.name);
        return Err(Failure::new(message)
            .hint(format!("have the issuer asked: valetkey token {} > /dev/null", shown.name)));
    }
    let file = dir.join("auth.json");
    let file = file.display();
    match plain::read(&dir).map_err(not_for_decoys)? {
        Some(login) if decoy::is_decoy_of(&login, tag, account) => {
            output::words(format_args!("unchanged: {file} holds decoys of this login"));
            say_what_is_next(&dir);
            return Ok(());
        }
        Some(login) if decoy::is_decoy(&login) => {
            output::words(format_args!("replacing the decoys of another login in {file}"));
        }
        Some(_) => {
            return Err(Failure::new(format!("{file} holds a login, which is left alone"))
                .hint("take another folder: valetkey init codex --dir DIR")
                .hint("or sign out of it first, with this folder as CODEX_HOME: codex logout"));
        }
        None => {}
    }
    let decoys = DecoySet::new(tag, account, Clock::system().now());
    plain::write(&dir, &decoys.into_login()).map_err(output::hinted)?;
    output::words(format_args!("wrote {file}: decoys of {}", whom(&shown.name, account)));
    say_what_is_next(&dir);
    Ok(())
}

/// The failure that a file is which cannot be read, where nobody wants to sign in.
fn not_for_decoys(error: StoreError) -> Failure {
    match error {
        StoreError::Corrupt { ref place, .. } => {
            let hint =
                format!("move {place} away, or take another folder: valetkey init codex --dir DIR");
            Failure::from(error).hint(hint)
        }
        error => output::hinted(error),
    }
}

/// The folder that a path means, whether it is there already or not.
///
/// # Errors
///
/// [`Failure`] for one that would mean another folder once those on its way are made.
fn resolved(path: &Path) -> Result<PathBuf, Failure> {
    let at = |error| Failure::at(path, error);
    let whole = std::path::absolute(path).map_err(at)?;
    let Some(there) = whole.ancestors().find(|folder| folder.exists()) else { return Ok(whole) };
    if !there.is_dir() {
        return Err(Failure::new(format!("{}: it is a file", there.display()))
            .status(output::WRONG_USE)
            .hint("name a folder: valetkey init codex --dir DIR"));
    }
    let missing = whole.strip_prefix(there).unwrap_or(&whole);
    if missing.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(Failure::new(format!("{}: no such folder", path.display()))
            .hint("name it without `..` behind what is not there yet"));
    }
    // Nothing joined would still be a slash.
    Ok(there.canonicalize().map_err(at)?.join(missing).components().collect())
}

/// The home of a credential is where its login is, or will be.
fn refuse_home_in_use(dir: &Path, config: &Config) -> Result<(), Failure> {
    let real = |path: &Path| resolved(path).unwrap_or_else(|_| path.to_owned());
    for (name, kind) in &config.credentials {
        if let CredentialKind::Codex { home, .. } = kind
            && real(home) == real(dir)
        {
            let message = format!("{} is the home of credential `{name}`", dir.display());
            return Err(
                Failure::new(message).hint("take another folder: valetkey init codex --dir DIR")
            );
        }
    }
    Ok(())
}

fn whom(name: &CredentialName, account: &Account) -> String {
    let known = [&account.email, &account.id, &account.plan];
    let known: Vec<&str> = known.into_iter().filter_map(Option::as_deref).collect();
    output::printable(&format!("`{name}` ({})", known.join(", ")))
}

fn say_what_is_next(dir: &Path) {
    let home = output::shell_word(&dir.to_string_lossy());
    output::words(
        "They are worth nothing but behind this valetkey, which puts your login in their place:",
    );
    // For Codex alone: our own login would be looked for there, too.
    output::words(format_args!("  valetkey run -- env CODEX_HOME={home} codex"));
    output::words("or, where `valetkey serve` runs:");
    output::words(format_args!("  eval \"$(valetkey env)\"; CODEX_HOME={home} codex"));
}
