//! `valetkey login`: signs in, and saves a login that valetkey and Codex share.

mod browser;
mod device;
mod piped;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::credentials::{Credentials, SignIn, Turn};
use super::output::{self, Failure, WRONG_USE};
use super::way_out::WayOut;
use super::{Typed, audit, process, status};
use crate::audit::CredentialEvent;
use crate::clock::Clock;
use crate::credential::{Account, CredentialName, Grant, Keep, Login, TokenSet};
use crate::oauth::Answer;
use crate::policy::Method;
use crate::store::{StoreError, warnings};
use crate::tasks::Tasks;

/// What `login` takes.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Sign in with a code that is typed into a browser elsewhere
    #[arg(long, conflicts_with_all = ["with_api_key", "with_access_token"])]
    device_auth: bool,

    /// Read an API key from standard input and save it
    #[arg(long, conflicts_with = "with_access_token")]
    with_api_key: bool,

    /// Read a personal access token (at-…) from standard input and save it
    #[arg(long)]
    with_access_token: bool,

    /// Open no browser: print the URL, and take the address that the browser ended on
    #[arg(long, conflicts_with_all = ["device_auth", "with_api_key", "with_access_token"])]
    no_browser: bool,

    /// Show the URL as a QR code too
    #[arg(long, conflicts_with_all = ["with_api_key", "with_access_token"])]
    qr: bool,

    /// The credential to sign in to [default: openai]
    #[arg(long, value_name = "NAME")]
    credential: Option<CredentialName>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show who is signed in; exits 1 when nobody is
    Status(status::OneArguments),
}

/// What came of signing in.
struct Fresh {
    login: Login,
    /// How long the access token lives, where that is known.
    lifetime: Option<Duration>,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    if let Some(Command::Status(arguments)) = &arguments.command {
        return status::run_one(arguments, typed);
    }
    let config = typed.config()?;
    // Tokens pass through this process's memory.
    process::harden();
    let name = match &arguments.credential {
        Some(name) => name.clone(),
        None => CredentialName::USUAL.parse()?,
    };
    let jobs = Tasks::new();
    let way_out = WayOut::of(&config, &typed.env)?;
    let credentials = Credentials::new(&config, &typed.env, way_out.upstream, jobs.clone());
    let cache = credentials.cache(&name, Turn::In)?;
    let signing_in = async {
        let signed_in = sign_in(arguments, typed, &cache).await;
        // What was begun to be written is written.
        jobs.finished().await;
        signed_in
    };
    process::runtime()?.block_on(signing_in)?;
    audit::written(&config, |audit| audit.credential(&name, CredentialEvent::Login, None));
    Ok(ExitCode::SUCCESS)
}

async fn sign_in(arguments: &Arguments, typed: &Typed, cache: &SignIn) -> Result<(), Failure> {
    let method = match (arguments.with_api_key, arguments.with_access_token) {
        (true, _) => Method::ApiKey,
        (_, true) => Method::AccessToken,
        _ => Method::ChatGpt,
    };
    if cache.is_codex {
        cache.policy.judge_method(method).map_err(forbidden)?;
    } else if method != Method::ChatGpt {
        return Err(Failure::new(format!("`{}` is a login at an OAuth issuer", cache.name))
            .status(WRONG_USE)
            .hint(format!("sign in: valetkey login --credential {}", cache.name)));
    }
    check_place(cache).await?;
    match (method, cache.provider.grant()) {
        (Method::ApiKey, _) => {
            save(cache, piped::api_key()?).await?;
            // Codex's own words.
            output::words("API key saved. Authentication is checked when you send a request.");
        }
        (Method::AccessToken, _) => {
            let account = save(cache, piped::access_token(&cache.provider).await?).await?;
            say_who(&account);
        }
        (Method::ChatGpt, Grant::ClientCredentials) => {
            return Err(Failure::new(format!("`{}` signs in by itself", cache.name))
                .hint("its grant is client_credentials: there is nothing to do"));
        }
        (Method::ChatGpt, grant) => {
            let account = if arguments.device_auth || grant == Grant::DeviceCode {
                device::sign_in(arguments, typed, cache).await?
            } else {
                browser::sign_in(arguments, typed, cache).await?
            };
            say_who(&account);
        }
    }
    say_where(cache);
    Ok(())
}

/// What a policy forbids, in Codex's words.
fn forbidden(sentence: String) -> Failure {
    Failure::new(sentence).hint("what is asked for, and where: valetkey check --managed")
}

/// A place that cannot be used is better known before anybody signs in.
async fn check_place(cache: &SignIn) -> Result<(), Failure> {
    match cache.store.get().await {
        Ok(_)
        | Err(StoreError::Encrypted { .. } | StoreError::Corrupt { is_replaceable: true, .. }) => {
            Ok(())
        }
        // There is another place then.
        Err(StoreError::Locked { .. } | StoreError::NoKeyring { .. })
            if cache.keep == Keep::Auto =>
        {
            Ok(())
        }
        Err(error) => Err(output::hinted(error)),
    }
}

impl Fresh {
    /// What an issuer handed out, received just now.
    fn received(cache: &SignIn, answer: Answer) -> Self {
        let lifetime = answer.expires_in;
        let set = answer.into_set(Clock::system().now());
        let login = if cache.is_codex { Login::ChatGpt(set) } else { Login::OAuth(set) };
        Self { login, lifetime }
    }
}

/// Saves a login in the place of the one that is there, if it is allowed. Tokens that are not kept, the old
/// ones or the new, are revoked, at best and behind.
async fn save(cache: &SignIn, fresh: Fresh) -> Result<Account, Failure> {
    let account = match &fresh.login {
        Login::ChatGpt(set) | Login::OAuth(set) => set.account(),
        Login::Personal(personal) => personal.account.clone().unwrap_or_default(),
        Login::ApiKey(_) | Login::Unsupported(_) => Account::default(),
    };
    let before = login_in(cache).await;
    let new = fresh.login.tokens().cloned();
    let saved = match cache.policy.judge_new(&fresh.login) {
        Err(sentence) => Err(forbidden(sentence)),
        Ok(()) => {
            let put = cache.store.put(Some(fresh.login), fresh.lifetime).await;
            put.map_err(output::hinted)
        }
    };
    let unkept = match (&saved, &before) {
        // Codex too gives back only what another such login takes the place of.
        (Ok(()), Some(before)) if new.is_some() => before.tokens().cloned(),
        // What was not saved may be there all the same: only a place that was read says that it is not.
        (Err(_), _) if !may_hold(cache, new.as_ref()).await => new,
        _ => None,
    };
    if let Some(set) = unkept {
        let provider = Arc::clone(&cache.provider);
        cache.jobs.spawn(async move {
            if let Err(error) = provider.revoke(&set).await {
                tracing::warn!(%error, "tokens that are not kept could not be revoked");
            }
        });
    }
    saved?;
    if before.is_some() {
        output::words("It takes the place of the login that was there.");
    }
    Ok(account)
}

/// Whether a set may be there.
async fn may_hold(cache: &SignIn, set: Option<&TokenSet>) -> bool {
    let Ok((_, record)) = cache.store.get().await else { return true };
    let there = record.login.as_ref().and_then(Login::tokens).map(TokenSet::fingerprint);
    there.is_some() && there == set.map(TokenSet::fingerprint)
}

/// The login that is there, as far as it can be read.
async fn login_in(cache: &SignIn) -> Option<Login> {
    cache.store.get().await.ok().and_then(|(_, record)| record.login)
}

fn say_who(account: &Account) {
    // Codex's own words.
    output::words("Successfully logged in");
    if let Some(email) = &account.email {
        let of = account.id.as_deref().map(|id| format!(", workspace {id}")).unwrap_or_default();
        output::words(output::printable(&format!("as {email}{of}")));
    }
}

/// Says where the login is now, and what may be wrong with that place.
fn say_where(cache: &SignIn) {
    if cache.keep == Keep::Ephemeral {
        output::warning("credentials_store is `ephemeral`: the login has ended with this command");
        return;
    }
    output::words(format_args!("kept in {}", cache.store.place()));
    for warning in cache.store.file().iter().flat_map(|file| warnings(file)) {
        output::warning(warning);
    }
}
