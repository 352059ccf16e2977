//! `valetkey login`: saves a login that valetkey and Codex share.

use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;

use zeroize::Zeroizing;

use super::output::{self, Failure, WRONG_USE};
use super::{Typed, process};
use crate::config::{Config, CredentialKind};
use crate::credential::{CredentialName, Login};
use crate::secret::Secret;
use crate::store::codex::CodexStore;
use crate::store::{RecordStore as _, put_login};
use crate::tasks::Tasks;

/// What `login` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Read an API key from standard input and save it
    #[arg(long)]
    with_api_key: bool,

    /// The credential to save it as [default: openai]
    #[arg(long, value_name = "NAME")]
    credential: Option<CredentialName>,
}

/// Longest input that is read: four times the longest secret that can be sent.
const MOST_INPUT: u64 = 64 * 1024;

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    if !arguments.with_api_key {
        return Err(Failure::new("valetkey cannot sign in to ChatGPT by itself yet")
            .status(WRONG_USE)
            .hint("sign in with Codex: codex login (valetkey uses the same login)")
            .hint("or save an API key: printenv OPENAI_API_KEY | valetkey login --with-api-key"));
    }
    let config = typed.config()?;
    let name = match &arguments.credential {
        Some(name) => name.clone(),
        None => "openai".parse()?,
    };
    let home = codex_home(&config, &name)?;
    let key = read_key()?;
    let store = CodexStore::new(home.to_owned(), Tasks::new());
    let saving = async {
        if let Some(Login::ChatGpt(_)) = store.get().await?.1.login {
            output::words("It takes the place of the ChatGPT login that was there.");
        }
        put_login(&store, Some(Login::ApiKey(key))).await
    };
    process::runtime()?.block_on(saving).map_err(output::hinted)?;
    // Codex's own words.
    output::words("API key saved. Authentication is checked when you send a request.");
    Ok(ExitCode::SUCCESS)
}

fn codex_home<'a>(
    config: &'a Config,
    name: &CredentialName,
) -> Result<&'a std::path::Path, Failure> {
    match config.credentials.get(name) {
        Some(CredentialKind::Codex { home }) => Ok(home),
        Some(CredentialKind::ApiKey { .. }) => {
            Err(Failure::new(format!("`{name}` is read from where the configuration says"))
                .hint("put the key there: it is not saved by a login"))
        }
        None => {
            let known: Vec<&str> = config.credentials.keys().map(CredentialName::as_str).collect();
            Err(Failure::new(format!("there is no credential `{name}`"))
                .status(WRONG_USE)
                .hint(format!("the configuration has: {}", known.join(", "))))
        }
    }
}

/// The key that is piped in. It never comes from an argument or a terminal, where it would be seen.
fn read_key() -> Result<Secret, Failure> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(Failure::new("--with-api-key expects the API key on stdin")
            .hint("pipe it: printenv OPENAI_API_KEY | valetkey login --with-api-key"));
    }
    output::words("Reading API key from stdin...");
    let mut input = Zeroizing::new(String::new());
    stdin
        .lock()
        .take(MOST_INPUT)
        .read_to_string(&mut input)
        .map_err(|error| Failure::new(format!("stdin could not be read: {error}")))?;
    let key = Secret::new(input.trim());
    if key.is_empty() {
        return Err(Failure::new("no API key provided via stdin").hint(
            "is the variable set? pipe it: printenv OPENAI_API_KEY | valetkey login --with-api-key",
        ));
    }
    key.check_field_value()
        .map_err(|unfit| Failure::new(format!("this is no API key: {unfit}")))?;
    Ok(key)
}
