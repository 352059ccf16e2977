//! `valetkey token`: prints the current secret of a credential, for tools that ask a command for it.

mod docker;
mod git;

use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;

use clap::ValueEnum;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::credentials::Credentials;
use super::output::{self, Failure};
use super::way_out::WayOut;
use super::{Typed, audit, process};
use crate::audit::{Audit, CredentialEvent};
use crate::config::Config;
use crate::credential::{Credential, CredentialName};
use crate::origin::{Scheme, Target};
use crate::rules::{Action, Decision, Rules};
use crate::tasks::Tasks;
use crate::tokens::{TokenError, Tokens};

/// What `token` takes.
#[derive(Debug, clap::Args)]
#[command(after_long_help = FOR_PROGRAMS)]
pub(super) struct Arguments {
    /// The credential [default: openai; with --helper the one whose rule signs the host in]
    #[arg(value_name = "NAME")]
    credential: Option<String>,

    /// What git or docker asks for; they add it themselves
    #[arg(value_name = "OPERATION", requires = "helper")]
    operation: Option<String>,

    /// Answer as a credential helper of this program
    #[arg(long, value_enum)]
    helper: Option<Asker>,

    /// Print it on a terminal too
    #[arg(long)]
    show: bool,
}

/// The programs that ask for credentials in a form of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Asker {
    Git,
    Docker,
}

/// How to have programs ask.
const FOR_PROGRAMS: &str = "\
Whoever runs this gets the secret itself, refreshed first where that is due; behind a proxy a tool needs none.

For Codex, in a provider of its config.toml:

  auth = { command = \"valetkey\", args = [\"token\"] }

For git, where a rule signs the host in:

  git config --global credential.https://git.example.com.helper '!valetkey token --helper git'

For docker, named `valetkey` under credHelpers, an executable `docker-credential-valetkey` in PATH:

  #!/bin/sh
  exec valetkey token --helper docker \"$@\"";

/// The user name that goes with a token: GitHub's for one of an app, and as good as any other elsewhere.
const USER: &str = "x-access-token";

/// Longest question that is read; a real one is below 1 KiB.
const MOST_INPUT: u64 = 64 * 1024;

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    if io::stdout().is_terminal() && !arguments.show {
        return Err(Failure::new(
            "a terminal shows and keeps what is printed, so the secret is not",
        )
        .status(output::WRONG_USE)
        .hint(format!("pipe it to where it is needed, or: {} --show", arguments.as_typed())));
    }
    let Some(asker) = arguments.helper else {
        let name = arguments.credential.as_deref().unwrap_or(CredentialName::USUAL);
        return print(&name.parse()?, typed);
    };
    let (name, operation) = match (&arguments.credential, &arguments.operation) {
        (name, Some(operation)) => (name.as_deref(), operation.as_str()),
        (Some(operation), None) => (None, operation.as_str()),
        (None, None) => {
            return Err(Failure::new("the operation is missing: git and docker add it themselves")
                .status(output::WRONG_USE)
                .hint(format!("by hand: {}", asker.by_hand())));
        }
    };
    let name = name.map(str::parse).transpose()?;
    match asker {
        Asker::Git => git::answer(operation, name.as_ref(), typed),
        Asker::Docker => docker::answer(operation, name.as_ref(), typed),
    }
}

impl Arguments {
    /// The command as it was typed, but for `--show`.
    fn as_typed(&self) -> String {
        let helper = self.helper.map(|asker| format!("--helper {}", asker.as_str()));
        let names = [&self.credential, &self.operation].into_iter().flatten();
        let names = names.map(|name| output::shell_word(name));
        let words = ["valetkey token".to_owned()].into_iter().chain(helper).chain(names);
        words.collect::<Vec<_>>().join(" ")
    }
}

impl Asker {
    fn as_str(self) -> &'static str {
        match self {
            Self::Git => "git",
            Self::Docker => "docker",
        }
    }

    /// How a person asks in its place.
    fn by_hand(self) -> &'static str {
        match self {
            Self::Git => {
                r"printf 'protocol=https\nhost=git.example.com\n\n' | valetkey token --helper git get"
            }
            Self::Docker => "echo registry.example.com | valetkey token --helper docker get",
        }
    }
}

fn print(name: &CredentialName, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config()?;
    let found = process::runtime()?.block_on(async {
        let opened = Opened::new(&config, typed).await?;
        opened.secret(&config, name).await
    })?;
    let text = Zeroizing::new(format!("{}\n", found.text.as_str()));
    output::raw(&text);
    Ok(ExitCode::SUCCESS)
}

/// A secret to be printed.
struct Found {
    text: Zeroizing<String>,
    /// When it ends, where that is known.
    expires_at: Option<OffsetDateTime>,
}

/// Asks for the secret that is for a host, reached over TLS; `None` where no rule signs it in with this
/// credential, or with any.
fn secret_for(
    target: &Target,
    wanted: Option<&CredentialName>,
    typed: &Typed,
) -> Result<Option<Found>, Failure> {
    let config = typed.config()?;
    process::runtime()?.block_on(async {
        let opened = Opened::new(&config, typed).await?;
        let rules = config.rules.with_kinds(opened.tokens.kinds());
        let Some(name) = covering(&rules, target, wanted) else { return Ok(None) };
        opened.secret(&config, name).await.map(Some)
    })
}

/// The credential whose rule signs requests to the host in.
fn covering<'a>(
    rules: &'a Rules,
    target: &Target,
    wanted: Option<&CredentialName>,
) -> Option<&'a CredentialName> {
    if rules.decide(target) != Decision::Intercept {
        return None;
    }
    rules.on_host(target).filter(|rule| rules.is_in_force(rule)).find_map(|rule| {
        let Action::Inject { uses, .. } = &rule.action else { return None };
        wanted.is_none_or(|wanted| *wanted == uses.credential).then_some(&uses.credential)
    })
}

/// The credentials of a configuration, open to be read.
struct Opened {
    tokens: Tokens,
    jobs: Tasks,
    audit: Audit,
}

impl Opened {
    async fn new(config: &Config, typed: &Typed) -> Result<Self, Failure> {
        process::harden();
        let jobs = Tasks::new();
        let way_out = WayOut::of(config, &typed.env)?;
        let credentials = Credentials::new(config, &typed.env, way_out.upstream, jobs.clone());
        let audit = audit::of_a_command(config);
        let credentials = credentials.written_down(audit.clone());
        Ok(Self { tokens: credentials.tokens().await?, jobs, audit })
    }

    /// The secret as it is once every refresh that is due has ended.
    async fn secret(&self, config: &Config, name: &CredentialName) -> Result<Found, Failure> {
        let source = self.tokens.source(name);
        let source = source.ok_or_else(|| output::no_credential(config, name))?;
        let asked = source.current().await;
        // The one that was asked for, and one that asking has started in the background.
        self.jobs.finished().await;
        let credential = match asked {
            Ok(_) => source.current().await,
            Err(error) => Err(error),
        };
        self.jobs.finished().await;
        let text = text_of(&*credential.map_err(failure)?)?;
        self.audit.credential(name, CredentialEvent::HandedOut, None);
        self.audit.flush();
        Ok(Found { text, expires_at: source.status().expires_at })
    }
}

fn text_of(credential: &Credential) -> Result<Zeroizing<String>, Failure> {
    // A line's end in it would be read as the end of the answer.
    credential.token().check_field_value()?;
    Ok(Zeroizing::new(credential.token().expose().to_owned()))
}

fn failure(error: TokenError) -> Failure {
    let hint = error.hint();
    let status = match &error {
        TokenError::LoginRequired { .. } => output::SIGN_IN_NEEDED,
        _ => 1,
    };
    Failure::from(error).status(status).hint(hint)
}

/// What the asking program says on standard input.
fn question() -> Result<String, Failure> {
    let mut text = String::new();
    io::stdin().take(MOST_INPUT).read_to_string(&mut text)?;
    Ok(text)
}

/// The host that a text names, with or without a port.
fn host_of(text: &str) -> Option<Target> {
    Target::parse_with_default(text, Scheme::Https.default_port()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_typed_is_typed_again() {
        let table = [
            (None, [None, None], "valetkey token"),
            (None, [Some("mine"), None], "valetkey token mine"),
            (Some(Asker::Git), [Some("get"), None], "valetkey token --helper git get"),
            (
                Some(Asker::Docker),
                [Some("mine"), Some("get")],
                "valetkey token --helper docker mine get",
            ),
            (None, [Some("a b"), None], "valetkey token 'a b'"),
        ];
        for (helper, words, expected) in table {
            let [credential, operation] = words.map(|word| word.map(str::to_owned));
            let arguments = Arguments { credential, operation, helper, show: false };
            assert_eq!(arguments.as_typed(), expected);
        }
    }
}
