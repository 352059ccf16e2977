//! The chain of a configuration: which proxy, shown which login, for which targets.

use std::sync::Arc;

use futures_util::FutureExt as _;

use super::credentials::source_of;
use super::output::{self, Failure};
use crate::config::env::Environment;
use crate::config::{LoginSpec, ProxySetting, UpstreamConfig};
use crate::origin::Target;
use crate::secret::Secret;
use crate::source;
use crate::tasks::Tasks;
use crate::upstream::chain::auth::{Ask, AskedAuth, BasicAuth, NoAuth, ProxyAuth};
use crate::upstream::chain::no_proxy::NoProxy;
use crate::upstream::chain::{Chain, Hop};

/// The chain, and a warning for each entry of the list of exceptions that means nothing.
///
/// # Errors
///
/// [`Failure`] for a login that cannot be used.
pub(super) fn chain(config: &UpstreamConfig, env: &Environment) -> Result<Chain, Failure> {
    let Some(setting) = config.proxies.first() else { return Ok(Chain::none()) };
    let (direct, odd) = NoProxy::parse(&config.no_proxy);
    for entry in odd {
        let entry = output::printable(&entry);
        output::warning(format_args!("no_proxy: `{entry}` is no host, address or range"));
    }
    if config.proxy_login.is_none() && !config.other_logins.is_empty() {
        let (url, named_by) = (&setting.url, setting.named_by);
        output::warning(format_args!(
            "upstream.proxy_login is not shown to {url} ({named_by}): its file names another proxy"
        ));
    }
    let proxy = setting.url.target().clone();
    let auth = auth(setting, config.proxy_login.as_ref(), env)?;
    Ok(Chain::via(Hop { scheme: setting.url.scheme(), proxy, auth, direct }))
}

fn auth(
    ProxySetting { url, named_by }: &ProxySetting,
    login: Option<&LoginSpec>,
    env: &Environment,
) -> Result<Arc<dyn ProxyAuth>, Failure> {
    match (login, url.login()) {
        (Some(spec), _) => Ok(Arc::new(AskedAuth::new(asker(spec, url.target(), env)))),
        (None, Some(login)) => match BasicAuth::new(Secret::new(login)) {
            Ok(auth) => Ok(Arc::new(auth)),
            Err(error) => Err(Failure::from(error).about(named_by)),
        },
        (None, None) => Ok(Arc::new(NoAuth)),
    }
}

/// Reads the login when it is needed. A command is told for which proxy.
fn asker(spec: &LoginSpec, proxy: &Target, env: &Environment) -> Ask {
    match spec {
        LoginSpec::Source(source) => {
            let source = source_of(source, env);
            Arc::new(move || {
                let source = source.clone();
                let load = move || source.load_text().map_err(|error| output::chain_of(&error));
                let loading = Tasks::new().spawn_blocking(load);
                async { loading.await.unwrap_or_else(|_| Err("it could not be read".to_owned())) }
                    .boxed()
            })
        }
        LoginSpec::Command(line) => {
            let (line, proxy) = (line.clone(), proxy.to_string());
            Arc::new(move || {
                let (line, proxy) = (line.clone(), proxy.clone());
                async move {
                    let told = source::command::tell(&line, &[("VALETKEY_PROXY", proxy)]).await;
                    told.map_err(|error| output::chain_of(&error))
                }
                .boxed()
            })
        }
    }
}
