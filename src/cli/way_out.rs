//! The way out of a configuration: its trust and its chain, and what clients are told of them.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use tokio_util::sync::DropGuard;

use super::output::{self, Failure};
use super::start::ca_dir;
use super::{chain, roots};
use crate::client_env::{ClientEnv, Facts, Folder, ProxyUrl};
use crate::config::env::Environment;
use crate::config::{Config, Trust, UpstreamConfig};
use crate::secret::Fingerprint;
use crate::tasks::Tasks;
use crate::tls::ca::{LocalCa, Root};
use crate::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
use crate::upstream::Upstream;
use crate::upstream::dial::Dialer;

/// The way out and what it trusts.
pub(super) struct WayOut {
    pub(super) upstream: Upstream,
    trust: Arc<UpstreamTrust>,
    /// The chain in force, as clients are told it; empty for none.
    chain: String,
    /// Has the files of the roots followed, where they are.
    following: Option<DropGuard>,
}

impl WayOut {
    /// The way out of a configuration, for commands that need no local CA.
    ///
    /// # Errors
    ///
    /// As [`WayOut::new`].
    pub(super) fn of(config: &Config, env: &Environment) -> Result<Self, Failure> {
        let roots = LocalCa::load_roots(&ca_dir(&config.paths)).map_err(output::hinted)?;
        Self::new(config, &roots, env)
    }

    /// The same, for who has read our own `roots`, which are never trusted there.
    ///
    /// # Errors
    ///
    /// As [`NewWay::of`].
    pub(super) fn new(config: &Config, roots: &[Root], env: &Environment) -> Result<Self, Failure> {
        let NewWay { dialer, trust, chain } = NewWay::of(config, roots, env)?;
        Ok(Self { upstream: Upstream::new(dialer), trust, chain, following: None })
    }

    /// Reads the roots again whenever their files change, for as long as this way is gone.
    pub(super) fn follow_roots(&mut self) {
        self.following = Some(roots::follow(&self.trust, &Tasks::new()));
    }

    /// Reads the roots again now.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a bundle that cannot be used; then nothing has changed.
    pub(super) fn reload_roots(&self) -> Result<(), Failure> {
        self.trust.reload().map(drop).map_err(output::hinted)
    }

    /// Goes another way from now on.
    pub(super) fn take(&mut self, NewWay { dialer, trust, chain }: NewWay) {
        self.upstream.replace(dialer);
        (self.trust, self.chain) = (trust, chain);
        // Who followed the trust of before ends here: its files may never change again.
        self.follow_roots();
    }

    /// The variables for clients of a proxy that goes this way; their files are written into `folder`.
    ///
    /// # Errors
    ///
    /// [`Failure`] when the folder cannot be written.
    pub(super) fn client_env(
        &self,
        roots: &[Root],
        proxy: ProxyUrl,
        env: &Environment,
        folder: Folder<'_>,
    ) -> Result<ClientEnv, Failure> {
        let own: Vec<CertificateDer<'static>> =
            roots.iter().map(|root| root.der().clone()).collect();
        let roots = self.trust.now();
        let facts = Facts {
            proxy,
            system: roots.system(),
            bundle: roots.bundle(),
            own: &own,
            chain: &self.chain,
            bundle_path: self.trust.bundle_path(),
        };
        let (Folder::Here(dir) | Folder::Mounted(dir)) = folder;
        let written = ClientEnv::write(&facts, env, folder);
        written.map_err(|error| {
            // What makes a file says its place itself.
            let why = error.get_ref().and_then(|inner| inner.source()).map(ToString::to_string);
            Failure::at(dir, why.unwrap_or_else(|| error.to_string()))
                .hint(format!("is there room, and is it yours? df {0}; ls -ld {0}", dir.display()))
        })
    }
}

/// A way out that nobody goes yet.
pub(super) struct NewWay {
    dialer: Dialer,
    trust: Arc<UpstreamTrust>,
    /// The chain, as clients are told it; empty for none.
    chain: String,
}

impl NewWay {
    /// The one that a configuration describes. Our own `roots` are never trusted there.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a bundle or a chain that cannot be used.
    pub(super) fn of(config: &Config, roots: &[Root], env: &Environment) -> Result<Self, Failure> {
        let UpstreamConfig { proxies, resolve, .. } = &config.upstream;
        let trust = trust(&config.upstream, roots.iter().map(Root::spki).collect())?;
        for notice in trust.now().notices() {
            output::warning(notice);
        }
        let (chain, trust) = (chain::chain(config, env)?, Arc::new(trust));
        let shown = proxies.first().map(|proxy| proxy.url.to_string()).unwrap_or_default();
        let dialer = Dialer::new(trust.clone(), chain, resolve.clone());
        Ok(Self { dialer, trust, chain: shown })
    }
}

/// The trust in force. A bundle of nothing but our own roots, as in the environment that another valetkey
/// made, counts as not set.
pub(super) fn trust(
    config: &UpstreamConfig,
    own: Vec<Fingerprint>,
) -> Result<UpstreamTrust, Failure> {
    let mode = match config.trust {
        Trust::Bundle => TrustMode::Bundle,
        Trust::MozillaAndBundle => TrustMode::MozillaAndBundle,
        Trust::System => TrustMode::System,
        Trust::SystemAndBundle => TrustMode::SystemAndBundle,
    };
    for setting in &config.ca_bundles {
        let bundle = Some(setting.path.clone());
        let loaded = UpstreamTrust::load(TrustSettings { mode, bundle, own: own.clone() });
        let trust = loaded.map_err(|error| output::hinted(error).about(setting.named_by))?;
        if !trust.now().bundle_is_ours() {
            return Ok(trust);
        }
    }
    UpstreamTrust::load(TrustSettings { mode, bundle: None, own }).map_err(output::hinted)
}
