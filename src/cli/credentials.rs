//! What each credential of a configuration is in practice: where it is kept, who issues it, what is allowed.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::FutureExt as _;

use super::output::{self, Failure};
use super::policies;
use crate::audit::Audit;
use crate::clock::Clock;
use crate::config::env::Environment;
use crate::config::{Config, CredentialKind, OAuthConfig, SourceSpec};
use crate::credential::{CredentialName, Grant, Keep};
use crate::oauth::provider::{Dialect, Provider, Registration};
use crate::policy::Policy;
use crate::secret::Secret;
use crate::source::Source;
use crate::store::RecordStore;
use crate::store::codex::CodexStore;
use crate::store::keyring::Keyring;
use crate::store::memory::MemoryStore;
use crate::store::sealed::SealedStore;
use crate::tasks::Tasks;
use crate::tokens::{self, Enforced, TokenSource, Tokens};
use crate::upstream::Upstream;

/// The credentials of one configuration.
pub(super) struct Credentials<'a> {
    config: &'a Config,
    env: &'a Environment,
    upstream: Upstream,
    keyring: Arc<Keyring>,
    /// What shutdown waits for: refreshes, and writes that have begun.
    jobs: Tasks,
    /// What it does not wait for.
    background: Tasks,
    audit: Audit,
}

/// A credential that one signs in to.
pub(super) struct SignIn {
    pub(super) name: CredentialName,
    pub(super) store: Arc<dyn RecordStore>,
    pub(super) provider: Arc<Provider>,
    /// What is allowed; everything for a login that is not Codex's.
    pub(super) policy: Policy,
    /// How it is kept.
    pub(super) keep: Keep,
    /// Whether it is the login that Codex uses too.
    pub(super) is_codex: bool,
    /// What the command waits for at its end.
    pub(super) jobs: Tasks,
}

/// What a proxy went by before. A source that is kept fresh by itself, for a credential that is described as it was, is
/// taken over with all that it knows; others are read anew.
pub(super) struct Before<'a> {
    pub(super) config: &'a Config,
    pub(super) tokens: &'a Tokens,
}

impl Before<'_> {
    fn kept(&self, name: &CredentialName, kind: &CredentialKind) -> Option<&Arc<TokenSource>> {
        let is_same = self.config.credentials.get(name) == Some(kind);
        let rotates = !matches!(kind, CredentialKind::ApiKey { .. });
        self.tokens.source(name).filter(|_| is_same && rotates)
    }
}

/// Which of the two somebody wants.
#[derive(Clone, Copy, Debug)]
pub(super) enum Turn {
    /// To sign in.
    In,
    /// To sign out.
    Out,
}

impl Turn {
    /// What comes to the same for a key that is only read.
    fn at(self, source: &SourceSpec) -> String {
        match (self, source) {
            (Self::In, SourceSpec::Env(name)) => format!("set {name} where valetkey runs"),
            (Self::In, SourceSpec::File(path)) => format!("write the key into {}", path.display()),
            (Self::Out, SourceSpec::Env(name)) => format!("unset {name} where valetkey runs"),
            (Self::Out, SourceSpec::File(path)) => format!("remove {}", path.display()),
        }
    }
}

impl<'a> Credentials<'a> {
    /// Nothing is read yet, and nobody is asked.
    pub(super) fn new(
        config: &'a Config,
        env: &'a Environment,
        upstream: Upstream,
        jobs: Tasks,
    ) -> Self {
        let (keyring, background) = (Keyring::system(), Tasks::new());
        Self { config, env, upstream, keyring, jobs, background, audit: Audit::off() }
    }

    /// The same, where what becomes of them is written down.
    #[must_use]
    pub(super) fn written_down(self, audit: Audit) -> Self {
        Self { audit, ..self }
    }

    /// A source for each, to be looked at: no login is deleted.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a policy that cannot be read: nothing is taken for allowed then.
    pub(super) async fn tokens(&self) -> Result<Tokens, Failure> {
        self.sources(false, None).await
    }

    /// A source for each, for a proxy: a login that a policy wants deleted is.
    ///
    /// # Errors
    ///
    /// As [`Credentials::tokens`].
    pub(super) async fn tokens_of_a_proxy(
        &self,
        before: Option<Before<'_>>,
    ) -> Result<Tokens, Failure> {
        self.sources(true, before).await
    }

    async fn sources(&self, deletes: bool, before: Option<Before<'_>>) -> Result<Tokens, Failure> {
        let mut sources = BTreeMap::new();
        for (name, kind) in &self.config.credentials {
            if let Some(source) = before.as_ref().and_then(|before| before.kept(name, kind)) {
                sources.insert(name.clone(), Arc::clone(source));
                continue;
            }
            let source = match kind {
                CredentialKind::ApiKey { source } => {
                    let source = source_of(source, self.env);
                    let load = move || source.load().map_err(Into::into);
                    TokenSource::fixed(self.parts(name, Enforced::nothing()), Arc::new(load))
                }
                CredentialKind::Codex { home, .. } => {
                    let policy = policies::follow(&self.config.policies, home, &self.background);
                    let policy = Enforced { policy: policy.map_err(output::mistakes)?, deletes };
                    self.rotating(name, kind, policy).await
                }
                CredentialKind::OAuth(_) => self.rotating(name, kind, Enforced::nothing()).await,
            };
            if let (Keep::Auto, Some(place)) = (keep_of(kind), source.place()) {
                tracing::info!(credential = %name, place, "credentials_store is auto");
            }
            sources.insert(name.clone(), Arc::new(source));
        }
        Ok(Tokens::new(sources))
    }

    async fn rotating(
        &self,
        name: &CredentialName,
        kind: &CredentialKind,
        policy: Enforced,
    ) -> TokenSource {
        let (store, provider) = (self.store(name, kind), Arc::new(self.provider(kind)));
        TokenSource::rotating(self.parts(name, policy), store, provider).await
    }

    fn parts(&self, name: &CredentialName, policy: Enforced) -> tokens::Parts {
        tokens::Parts {
            name: name.clone(),
            clock: Clock::system(),
            refreshes: self.jobs.clone(),
            policy,
            background: self.background.clone(),
            audit: self.audit.clone(),
        }
    }

    /// A credential to sign in to or out of.
    ///
    /// # Errors
    ///
    /// [`Failure`] when there is none of that name, or one that is only read: then with what to do at its source.
    pub(super) fn cache(&self, name: &CredentialName, turn: Turn) -> Result<SignIn, Failure> {
        let Some(kind) = self.config.credentials.get(name) else {
            return Err(output::no_credential(self.config, name));
        };
        let policy = match kind {
            CredentialKind::ApiKey { source } => {
                return Err(Failure::new(format!("`{name}` is read from {source}, and not saved"))
                    .hint(turn.at(source)));
            }
            CredentialKind::Codex { home, .. } => {
                self.config.policies.read(home).map_err(output::mistakes)?
            }
            CredentialKind::OAuth(_) => Policy::default(),
        };
        Ok(SignIn {
            name: name.clone(),
            store: self.store(name, kind),
            provider: Arc::new(self.provider(kind)),
            policy,
            keep: keep_of(kind),
            is_codex: matches!(kind, CredentialKind::Codex { .. }),
            jobs: self.jobs.clone(),
        })
    }

    /// Every credential that one signs in to, for who signs out of all of them.
    ///
    /// # Errors
    ///
    /// As [`Credentials::cache`].
    pub(super) fn caches(&self) -> Result<Vec<SignIn>, Failure> {
        let signed_in_to = |kind: &CredentialKind| match kind {
            CredentialKind::ApiKey { .. } => false,
            CredentialKind::Codex { .. } => true,
            CredentialKind::OAuth(oauth) => oauth.grant != Grant::ClientCredentials,
        };
        let names = self.config.credentials.iter().filter(|(_, kind)| signed_in_to(kind));
        names.map(|(name, _)| self.cache(name, Turn::Out)).collect()
    }

    fn store(&self, name: &CredentialName, kind: &CredentialKind) -> Arc<dyn RecordStore> {
        let (keep, keyring, jobs) = (keep_of(kind), self.keyring.clone(), self.jobs.clone());
        match kind {
            _ if keep == Keep::Ephemeral => Arc::new(MemoryStore::new(None)),
            CredentialKind::Codex { home, .. } => {
                Arc::new(CodexStore::new(home.clone(), keep, keyring, jobs))
            }
            CredentialKind::OAuth(_) | CredentialKind::ApiKey { .. } => {
                let folder = self.config.paths.data_dir.join("credentials");
                Arc::new(SealedStore::new(folder, name, keep, keyring, jobs))
            }
        }
    }

    fn provider(&self, kind: &CredentialKind) -> Provider {
        match kind {
            CredentialKind::OAuth(oauth) => {
                Provider::new(self.upstream.clone(), registration(oauth, self.env, &self.jobs))
            }
            CredentialKind::Codex { .. } | CredentialKind::ApiKey { .. } => {
                Provider::codex(self.upstream.clone())
            }
        }
    }
}

/// Tokens that a client gets by itself are kept in memory: they are got again at no cost.
fn keep_of(kind: &CredentialKind) -> Keep {
    match kind {
        CredentialKind::OAuth(oauth) if oauth.grant == Grant::ClientCredentials => Keep::Ephemeral,
        CredentialKind::OAuth(oauth) => oauth.keep,
        CredentialKind::Codex { keep, .. } => *keep,
        CredentialKind::ApiKey { .. } => Keep::File,
    }
}

fn registration(oauth: &OAuthConfig, env: &Environment, jobs: &Tasks) -> Registration {
    let read = |spec: &SourceSpec| {
        let (source, jobs) = (source_of(spec, env), jobs.clone());
        Arc::new(move || {
            let source = source.clone();
            let load = move || source.load().map_err(|error| output::chain_of(&error));
            let loading = jobs.spawn_blocking(load);
            async { loading.await.unwrap_or_else(|_| Err("it could not be read".to_owned())) }
                .boxed()
        }) as Arc<_>
    };
    Registration {
        issuer: oauth.issuer.clone(),
        dialect: Dialect::Standard,
        client_id: oauth.client_id.clone(),
        client_secret: oauth.client_secret.as_ref().map(read),
        scopes: oauth.scopes.clone(),
        audience: oauth.audience.clone(),
        grant: oauth.grant,
    }
}

/// Where a plain key is read from.
pub(super) fn source_of(spec: &SourceSpec, env: &Environment) -> Source {
    match spec {
        SourceSpec::Env(name) => {
            let env = env.clone();
            // One that is set to nothing is there, and said to be empty.
            let value = move |name: &str| Some(Secret::new(env.stated(name)?.to_string_lossy()));
            Source::env(name, Arc::new(value))
        }
        SourceSpec::File(path) => Source::file(path),
    }
}
