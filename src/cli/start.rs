//! Builds a proxy out of a configuration: the list of steps that `serve` and `run` share.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::net::TcpListener;

use super::output::{self, Failure};
use crate::client_env::{ClientEnv, Facts};
use crate::clock::Clock;
use crate::config::env::Environment;
use crate::config::{Config, CredentialKind, ProxySetting, SourceSpec, Trust, UpstreamConfig};
use crate::oauth::codex::CodexIssuer;
use crate::proxy::{Parts, Proxy};
use crate::secret::{Fingerprint, Secret};
use crate::source::Source;
use crate::store::codex::CodexStore;
use crate::tasks::Tasks;
use crate::tls::ca::{LocalCa, Root};
use crate::tls::leaf::Leaves;
use crate::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
use crate::tokens::{self, TokenSource, Tokens};
use crate::upstream::Upstream;
use crate::upstream::chain::Chain;
use crate::upstream::dial::Dialer;

/// A proxy with all that belongs to it, ready to serve.
pub(super) struct Started {
    pub(super) proxy: Proxy,
    /// Refreshes in flight: shutdown waits for them.
    pub(super) refreshes: Tasks,
    roots: Vec<Root>,
    out: WayOut,
}

/// The way out and what it trusts.
pub(super) struct WayOut {
    pub(super) upstream: Upstream,
    trust: Arc<UpstreamTrust>,
    /// The bundle in force and the chain in force, as they are exported to clients.
    bundle: Option<PathBuf>,
    chain: String,
}

impl Started {
    /// Builds everything. Nothing is served and no login is needed yet.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a CA, a bundle or a chain that cannot be used.
    pub(super) async fn new(config: &Config, env: &Environment) -> Result<Self, Failure> {
        let clock = Clock::system();
        let names = config.rules.constraints();
        let ca = LocalCa::open(&ca_dir(config), &names, clock.clone()).map_err(output::hinted)?;
        let roots = ca.roots().to_vec();
        let out = WayOut::new(&config.upstream, &roots)?;
        let refreshes = Tasks::new();
        let tokens = tokens(config, env, &out.upstream, &refreshes).await;
        let proxy = Proxy::new(Parts {
            rules: config.rules.clone(),
            tokens: Arc::new(tokens),
            upstream: out.upstream.clone(),
            leaves: Leaves::new(ca).map_err(output::hinted)?,
        });
        Ok(Self { proxy, refreshes, roots, out })
    }

    /// The variables for clients of the proxy at `address`; their files are written into `dir`.
    ///
    /// # Errors
    ///
    /// [`Failure`] when `dir` cannot be written.
    pub(super) fn client_env(
        &self,
        address: SocketAddr,
        env: &Environment,
        dir: &Path,
    ) -> Result<ClientEnv, Failure> {
        self.out.client_env(&self.roots, address, env, dir)
    }

    /// Writes the roots that clients must trust into `dir`, as one file.
    ///
    /// # Errors
    ///
    /// [`Failure`] when `dir` cannot be written.
    pub(super) fn write_roots(&self, dir: &Path) -> Result<PathBuf, Failure> {
        let path = dir.join("ca.pem");
        let roots: String = self.roots.iter().map(Root::pem).collect();
        fs::write(&path, roots).map_err(|error| Failure::at(&path, error))?;
        Ok(path)
    }

    /// Ends serving, and waits for the refreshes whatever happens: they hold the next login.
    pub(super) async fn shut_down(&self, deadline: Duration) {
        self.proxy.shut_down(deadline).await;
        self.refreshes.finished().await;
    }
}

impl WayOut {
    /// The way out that a configuration describes. Our own `roots` are never trusted there.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a bundle or a chain that cannot be used.
    pub(super) fn new(config: &UpstreamConfig, roots: &[Root]) -> Result<Self, Failure> {
        let own: Vec<_> = roots.iter().map(Root::spki).collect();
        let (trust, bundle) = trust(config, &own)?;
        for notice in trust.notices() {
            output::warning(notice);
        }
        let chain = match config.proxies.first() {
            None => Chain::none(),
            Some(ProxySetting { url, named_by }) => {
                Chain::via(url.with_user_information(), &config.no_proxy)
                    .map_err(|error| Failure::new(format!("{named_by}: {error}")))?
            }
        };
        let shown = config.proxies.first().map(|proxy| proxy.url.to_string()).unwrap_or_default();
        let trust = Arc::new(trust);
        let dialer = Dialer::new(trust.clone(), chain, config.resolve.clone());
        Ok(Self { upstream: Upstream::new(dialer), trust, bundle, chain: shown })
    }

    /// As [`Started::client_env`], for a proxy that runs elsewhere.
    ///
    /// # Errors
    ///
    /// [`Failure`] when `dir` cannot be written.
    pub(super) fn client_env(
        &self,
        roots: &[Root],
        address: SocketAddr,
        env: &Environment,
        dir: &Path,
    ) -> Result<ClientEnv, Failure> {
        let own: Vec<CertificateDer<'static>> =
            roots.iter().map(|root| root.der().clone()).collect();
        let facts = Facts {
            proxy: address,
            system: self.trust.system(),
            bundle: self.trust.bundle(),
            own: &own,
            chain: &self.chain,
            bundle_path: self.bundle.as_deref(),
        };
        let written = ClientEnv::write(&facts, env, dir);
        written.map_err(|error| Failure::at(dir, error))
    }
}

/// Where the local CA is kept.
pub(super) fn ca_dir(config: &Config) -> PathBuf {
    config.paths.data_dir.join("ca")
}

/// The trust and the bundle in force. A bundle of nothing but our own roots, as in the environment that
/// another valetkey made, counts as not set.
fn trust(
    config: &UpstreamConfig,
    own: &[Fingerprint],
) -> Result<(UpstreamTrust, Option<PathBuf>), Failure> {
    let mode = match config.trust {
        Trust::Bundle => TrustMode::Bundle,
        Trust::MozillaAndBundle => TrustMode::MozillaAndBundle,
        Trust::System => TrustMode::System,
        Trust::SystemAndBundle => TrustMode::SystemAndBundle,
    };
    for setting in &config.ca_bundles {
        let bundle = Some(setting.path.as_path());
        let loaded = UpstreamTrust::load(&TrustSettings { mode, bundle, own });
        let trust = loaded.map_err(|error| output::hinted(error).about(setting.named_by))?;
        if !trust.bundle_is_ours() {
            return Ok((trust, Some(setting.path.clone())));
        }
    }
    let trust = UpstreamTrust::load(&TrustSettings { mode, bundle: None, own });
    Ok((trust.map_err(output::hinted)?, None))
}

/// A source for each credential of the configuration.
pub(super) async fn tokens(
    config: &Config,
    env: &Environment,
    upstream: &Upstream,
    refreshes: &Tasks,
) -> Tokens {
    let issuer = Arc::new(CodexIssuer::new(upstream.clone()));
    let background = Tasks::new();
    let mut sources = BTreeMap::new();
    for (name, kind) in &config.credentials {
        let parts = tokens::Parts {
            name: name.clone(),
            clock: Clock::system(),
            refreshes: refreshes.clone(),
            background: background.clone(),
        };
        let source = match kind {
            CredentialKind::ApiKey { source } => {
                let source = source_of(source, env);
                let load = move || source.load().map_err(Into::into);
                TokenSource::fixed(parts, Arc::new(load))
            }
            CredentialKind::Codex { home } => {
                // A write that has begun is waited for, as the refresh is that it belongs to.
                let store = CodexStore::new(home.clone(), refreshes.clone());
                TokenSource::rotating(parts, Arc::new(store), issuer.clone()).await
            }
        };
        sources.insert(name.clone(), Arc::new(source));
    }
    Tokens::new(sources)
}

/// Where a plain key is read from.
pub(super) fn source_of(spec: &SourceSpec, env: &Environment) -> Source {
    match spec {
        SourceSpec::Env(name) => {
            let env = env.clone();
            Source::env(name, Arc::new(move |name| env.text(name).map(Secret::new)))
        }
        SourceSpec::File(path) => Source::file(path),
    }
}

/// Binds a listener.
///
/// # Errors
///
/// [`Failure`] with what to type when the port is taken.
pub(super) async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let failure = Failure::new(format!("cannot listen on {address}: {error}"));
        if error.kind() == std::io::ErrorKind::AddrInUse {
            return failure
                .hint("another program has the port; is it a valetkey? valetkey status")
                .hint("or take another port: valetkey serve --listen 127.0.0.1:0");
        }
        failure
    })
}
