//! The chain of a configuration: which proxy, shown which login, for which targets.

use std::sync::Arc;

use futures_util::FutureExt as _;

use super::credentials::source_of;
use super::output::{self, Failure};
use super::run;
use crate::client_env;
use crate::config::env::Environment;
use crate::config::{Config, LoginSpec, ProxySetting, SourceSpec};
use crate::origin::Target;
use crate::secret::Secret;
use crate::source::command::{self, Variable};
use crate::tasks::Tasks;
use crate::upstream::chain::auth::{Ask, AskedAuth, BasicAuth, NoAuth, ProxyAuth};
use crate::upstream::chain::no_proxy::NoProxy;
use crate::upstream::chain::{Chain, Hop};

/// The chain, and a warning for each entry of the list of exceptions that means nothing.
///
/// # Errors
///
/// [`Failure`] for a login that cannot be used.
pub(super) fn chain(config: &Config, env: &Environment) -> Result<Chain, Failure> {
    let upstream = &config.upstream;
    let Some(setting) = upstream.proxies.first() else { return Ok(Chain::none()) };
    let (direct, odd) = NoProxy::parse(&upstream.no_proxy);
    for entry in odd {
        let entry = output::printable(&entry);
        output::warning(format_args!("no_proxy: `{entry}` is no host, address or range"));
    }
    if upstream.proxy_login.is_none() && !upstream.other_logins.is_empty() {
        let (url, named_by) = (&setting.url, setting.named_by);
        output::warning(format_args!(
            "upstream.proxy_login is not shown to {url} ({named_by}): its file names another proxy"
        ));
    }
    let proxy = setting.url.target().clone();
    let auth = auth(setting, config, env)?;
    Ok(Chain::via(Hop { scheme: setting.url.scheme(), proxy, auth, direct }))
}

fn auth(
    ProxySetting { url, named_by }: &ProxySetting,
    config: &Config,
    env: &Environment,
) -> Result<Arc<dyn ProxyAuth>, Failure> {
    match (&config.upstream.proxy_login, url.login()) {
        (Some(LoginSpec::Source(source)), _) => Ok(Arc::new(AskedAuth::new(reader(source, env)))),
        (Some(LoginSpec::Command(line)), _) => {
            let variables = variables(url.target(), config, env);
            Ok(Arc::new(AskedAuth::new(asker(line.clone(), variables))))
        }
        (None, Some(login)) => match BasicAuth::new(Secret::new(login)) {
            Ok(auth) => Ok(Arc::new(auth)),
            Err(error) => Err(Failure::from(error).about(named_by)),
        },
        (None, None) => Ok(Arc::new(NoAuth)),
    }
}

/// Reads the login when it is needed.
fn reader(source: &SourceSpec, env: &Environment) -> Ask {
    let source = source_of(source, env);
    Arc::new(move || {
        let source = source.clone();
        let load = move || source.load_text().map_err(|error| output::chain_of(&error));
        let loading = Tasks::new().spawn_blocking(load);
        async { loading.await.unwrap_or_else(|_| Err("it could not be read".to_owned())) }.boxed()
    })
}

/// Has a command tell the login when it is needed.
fn asker(line: String, variables: Vec<Variable>) -> Ask {
    Arc::new(move || {
        let (line, variables) = (line.clone(), variables.clone());
        async move {
            let told = command::tell(&line, &variables).await;
            told.map_err(|error| output::chain_of(&error))
        }
        .boxed()
    })
}

/// A command is told for which proxy, and gets no secret that is for others.
fn variables(proxy: &Target, config: &Config, env: &Environment) -> Vec<Variable> {
    let proxies = client_env::without_logins(env);
    let mut variables: Vec<Variable> =
        proxies.map(|(name, proxy)| (name.to_owned(), Some(proxy))).collect();
    variables.extend(run::variables_of_sources(config).map(|name| (name.to_owned(), None)));
    variables.push(("VALETKEY_PROXY".to_owned(), Some(proxy.to_string())));
    variables
}
