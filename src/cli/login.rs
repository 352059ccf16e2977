//! `valetkey login`: signs in, and saves a login that valetkey and Codex share.

mod browser;
mod device;
mod piped;

use std::process::ExitCode;
use std::time::Duration;

use super::credentials::{Cache, Credentials, USUAL};
use super::output::{self, Failure, WRONG_USE};
use super::start::WayOut;
use super::{Typed, process, status};
use crate::clock::Clock;
use crate::credential::{Account, CredentialName, Grant, Keep, Login};
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
        None => USUAL.parse()?,
    };
    let jobs = Tasks::new();
    let way_out = WayOut::of(&config)?;
    let credentials = Credentials::new(&config, &typed.env, way_out.upstream, jobs.clone());
    let cache = credentials.cache(&name)?;
    let signing_in = async {
        let signed_in = sign_in(arguments, typed, &cache).await;
        // What was begun to be written is written.
        jobs.finished().await;
        signed_in
    };
    process::runtime()?.block_on(signing_in)?;
    Ok(ExitCode::SUCCESS)
}

async fn sign_in(arguments: &Arguments, typed: &Typed, cache: &Cache) -> Result<(), Failure> {
    let method = match (arguments.with_api_key, arguments.with_access_token) {
        (true, _) => Method::ApiKey,
        (_, true) => Method::AccessToken,
        _ => Method::ChatGpt,
    };
    if cache.is_codex {
        cache.policy.judge_method(method).map_err(Failure::new)?;
    } else if method != Method::ChatGpt {
        return Err(Failure::new(format!("`{}` is a login at an OAuth issuer", cache.name))
            .status(WRONG_USE)
            .hint(format!("sign in: valetkey login --credential {}", cache.name)));
    }
    // A place that cannot be used is better known before anybody signs in.
    match cache.store.get().await {
        Ok(_) | Err(StoreError::Encrypted { .. }) => {}
        // There is another place then.
        Err(StoreError::Locked { .. } | StoreError::Unavailable { .. })
            if cache.keep == Keep::Auto => {}
        Err(error) => return Err(output::hinted(error)),
    }
    match (method, cache.provider.grant()) {
        (Method::ApiKey, _) => {
            save(cache, piped::api_key()?).await?;
            // Codex's own words.
            output::words("API key saved. Authentication is checked when you send a request.");
        }
        (Method::AccessToken, _) => {
            save(cache, piped::access_token(&cache.provider).await?).await?;
            output::words("Successfully logged in");
        }
        (Method::ChatGpt, Grant::ClientCredentials) => {
            return Err(Failure::new(format!("`{}` signs in by itself", cache.name))
                .hint("its grant is client_credentials: there is nothing to do"));
        }
        (Method::ChatGpt, grant) => {
            if arguments.device_auth || grant == Grant::DeviceCode {
                device::sign_in(arguments, typed, cache).await?;
            } else {
                browser::sign_in(arguments, typed, cache).await?;
            }
            output::words("Successfully logged in");
        }
    }
    say_where(cache);
    Ok(())
}

impl Fresh {
    /// What an issuer handed out, received just now.
    fn received(cache: &Cache, answer: Answer) -> Self {
        let lifetime = answer.expires_in;
        let set = answer.into_set(Clock::system().now());
        let login = if cache.is_codex { Login::ChatGpt(set) } else { Login::OAuth(set) };
        Self { login, lifetime }
    }
}

/// Saves a login in the place of the one that is there, if it is allowed. What it supersedes is revoked, as
/// Codex does it: at best.
async fn save(cache: &Cache, fresh: Fresh) -> Result<Account, Failure> {
    cache.policy.judge_new(&fresh.login).map_err(Failure::new)?;
    let account = match &fresh.login {
        Login::ChatGpt(set) | Login::OAuth(set) => set.account(),
        Login::Personal(personal) => personal.account.clone().unwrap_or_default(),
        Login::ApiKey(_) | Login::Unsupported(_) => Account::default(),
    };
    let old = cache.store.get().await.ok().and_then(|(_, record)| record.login);
    let new = fresh.login.tokens().map(|set| set.fingerprint());
    cache.store.put(Some(fresh.login), fresh.lifetime).await.map_err(output::hinted)?;
    if let Some(set) = old.as_ref().and_then(Login::tokens)
        && Some(set.fingerprint()) != new
    {
        output::words("It takes the place of the login that was there.");
        if let Err(error) = cache.provider.revoke(set).await {
            tracing::warn!(%error, "the login that was there could not be revoked");
        }
    }
    Ok(account)
}

/// Says where the login is now, and what may be wrong with that place.
fn say_where(cache: &Cache) {
    if cache.keep == Keep::Ephemeral {
        output::warning("credentials_store is `ephemeral`: the login has ended with this command");
        return;
    }
    let place = cache.store.place();
    output::words(format_args!("kept in {place}"));
    for warning in warnings(std::path::Path::new(&place)) {
        output::warning(warning);
    }
}
