//! `valetkey logout`: ends a login here and at its issuer, for every program that shares it.

use std::process::ExitCode;

use super::credentials::{Credentials, SignIn, Turn};
use super::output::{self, Failure};
use super::way_out::WayOut;
use super::{Typed, audit, process};
use crate::audit::CredentialEvent;
use crate::credential::{CredentialName, Login};
use crate::store::StoreError;
use crate::tasks::Tasks;

/// What `logout` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The credential to sign out of [default: openai]
    #[arg(long, value_name = "NAME")]
    credential: Option<CredentialName>,

    /// Sign out of every credential that one signs in to
    #[arg(long, conflicts_with = "credential")]
    all: bool,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let config = typed.config().map_err(|failure| {
        failure.hint("to sign out of the usual login, whatever it says: valetkey --config \"$(mktemp)\" logout")
    })?;
    process::harden();
    let jobs = Tasks::new();
    let way_out = WayOut::of(&config, &typed.env)?;
    let credentials = Credentials::new(&config, &typed.env, way_out.upstream, jobs.clone());
    let caches = match (&arguments.credential, arguments.all) {
        (_, true) => credentials.caches()?,
        (Some(name), _) => vec![credentials.cache(name, Turn::Out)?],
        (None, _) => vec![credentials.cache(&CredentialName::USUAL.parse()?, Turn::Out)?],
    };
    let signing_out = async {
        let (mut failed, mut signed_out) = (false, Vec::new());
        for cache in &caches {
            match sign_out(cache, caches.len() > 1).await {
                Ok(true) => signed_out.push(&cache.name),
                Ok(false) => {}
                Err(failure) => {
                    failure.report();
                    failed = true;
                }
            }
        }
        jobs.finished().await;
        (failed, signed_out)
    };
    let (failed, signed_out) = process::runtime()?.block_on(signing_out);
    audit::written(&config, |audit| {
        signed_out.iter().for_each(|name| audit.credential(name, CredentialEvent::Logout, None));
    });
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Deletes the login everywhere, so that no proxy uses it any more, and then tells the issuer. Whether there was one, as far
/// as it could be read.
async fn sign_out(cache: &SignIn, is_one_of_many: bool) -> Result<bool, Failure> {
    let about = if is_one_of_many { format!("{}: ", cache.name) } else { String::new() };
    let login = match cache.store.get().await {
        Ok((_, record)) => record.login,
        Err(StoreError::Locked { .. } | StoreError::NoKeyring { .. })
        | Err(StoreError::Corrupt { is_replaceable: true, .. }) => {
            // What can be reached is deleted, and the rest is said.
            cache.store.put(None, None).await.map_err(output::hinted)?;
            output::warning(format_args!(
                "{about}the login could not be read, so the issuer was not told: its tokens live until they expire"
            ));
            output::words(format_args!("{about}Successfully logged out"));
            return Ok(true);
        }
        Err(StoreError::Corrupt { place, what, is_replaceable: false }) => {
            return Err(Failure::new(format!("{place} cannot be read: {what}"))
                .hint(format!("move {place} away: then nobody is signed in by it"))
                .hint("the issuer is not told so: what is in it lives until it expires"));
        }
        Err(error) => return Err(output::hinted(error)),
    };
    let Some(login) = login else {
        // Codex's own words, here and below.
        output::words(format_args!("{about}Not logged in"));
        return Ok(false);
    };
    let deleted = cache.store.put(None, None).await.map_err(output::hinted);
    if let Some(set) = login.tokens()
        && let Err(error) = cache.provider.revoke(set).await
    {
        output::warning(format_args!(
            "{about}the issuer could not be told, so the tokens live until they expire: {}",
            output::chain_of(&error)
        ));
        if let Some(hint) = error.hint() {
            output::hint(hint);
        }
    }
    deleted?;
    if matches!(login, Login::Personal(_) | Login::ApiKey(_)) {
        output::words(format_args!(
            "{about}It was deleted here; it works until it is revoked where it was made."
        ));
    }
    output::words(format_args!("{about}Successfully logged out"));
    Ok(true)
}
