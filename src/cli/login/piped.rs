//! Signs in with a secret that is piped in. It never comes from an argument or a terminal, where it would be
//! seen.

use std::io::{self, IsTerminal as _, Read as _};

use zeroize::Zeroizing;

use super::Fresh;
use crate::cli::output::{self, Failure};
use crate::credential::{Login, PersonalToken};
use crate::oauth::provider::Provider;
use crate::oauth::{Issuer as _, RefreshError};
use crate::secret::Secret;

/// Longest input that is read: four times the longest secret that can be sent.
const MOST_INPUT: u64 = 64 * 1024;

/// The API key on standard input. Whether it is a good one shows when it is used.
pub(super) fn api_key() -> Result<Fresh, Failure> {
    let (key, _) = read(&API_KEY)?;
    Ok(Fresh { login: Login::ApiKey(key), lifetime: None })
}

/// The personal access token on standard input, of which the issuer says whose it is.
pub(super) async fn access_token(provider: &Provider) -> Result<Fresh, Failure> {
    let (token, form) = read(&ACCESS_TOKEN)?;
    match form {
        Form::Personal => {}
        Form::ApiKey => {
            return Err(Failure::new("this looks like an API key")
                .hint("for an API key: valetkey login --with-api-key"));
        }
        Form::Other => {
            let sentence = "this is not a personal access token, which starts with `at-`";
            return Err(Failure::new(sentence)
                .hint("an agent identity cannot be used here: it signs each request by itself"));
        }
    }
    let account = provider.identify(&token).await.map_err(|error| match error {
        RefreshError::Rejected { code } => {
            Failure::new(format!("the issuer does not accept this access token ({code})"))
                .hint("make a new one in ChatGPT's settings, and pipe it in")
        }
        other => {
            let hint = other.trouble().hint.unwrap_or_else(|| "try again".to_owned());
            Failure::from(other).hint(format!("{hint}; the token was not saved"))
        }
    })?;
    let personal = PersonalToken { token, account: Some(account) };
    Ok(Fresh { login: Login::Personal(personal), lifetime: None })
}

/// What is read, in Codex's words where it has some.
struct Wanted {
    flag: &'static str,
    what: &'static str,
    pipe: &'static str,
}

const API_KEY: Wanted = Wanted {
    flag: "--with-api-key",
    what: "API key",
    pipe: "pipe it: printenv OPENAI_API_KEY | valetkey login --with-api-key",
};

const ACCESS_TOKEN: Wanted = Wanted {
    flag: "--with-access-token",
    what: "access token",
    pipe: "pipe it: printenv CODEX_ACCESS_TOKEN | valetkey login --with-access-token",
};

/// What a secret looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    ApiKey,
    Personal,
    Other,
}

impl Form {
    fn of(text: &str) -> Self {
        match text {
            key if key.starts_with(API_KEYS) => Self::ApiKey,
            token if token.starts_with(PersonalToken::PREFIX) => Self::Personal,
            _ => Self::Other,
        }
    }
}

/// What OpenAI's API keys start with.
const API_KEYS: &str = "sk-";

/// The secret, and what it looks like.
fn read(wanted: &Wanted) -> Result<(Secret, Form), Failure> {
    let Wanted { flag, what, pipe } = wanted;
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(Failure::new(format!("{flag} expects the {what} on stdin")).hint(*pipe));
    }
    output::words(format_args!("Reading {what} from stdin..."));
    let mut input = Zeroizing::new(Vec::with_capacity(4096));
    stdin
        .lock()
        .take(MOST_INPUT)
        .read_to_end(&mut input)
        .map_err(|error| Failure::new(format!("stdin could not be read: {error}")))?;
    let text = std::str::from_utf8(&input)
        .map_err(|_| Failure::new(format!("this is no {what}: it is not text")).hint(*pipe))?;
    let form = Form::of(text.trim());
    let secret = Secret::new(text.trim());
    if secret.is_empty() {
        return Err(Failure::new(format!("no {what} provided via stdin"))
            .hint(format!("is the variable set? {pipe}")));
    }
    let unfit = |unfit| Failure::new(format!("this is no {what}: {unfit}")).hint(*pipe);
    secret.check_field_value().map_err(unfit)?;
    Ok((secret, form))
}
