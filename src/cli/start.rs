//! Builds a proxy out of a configuration: the list of steps that `serve` and `run` share.

use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::ready;
use tokio::net::TcpListener;

use super::audit;
use super::credentials::{Before, Credentials};
use super::output::{self, Failure};
use super::passes::Followed;
use super::process;
use super::way_out::{NewWay, WayOut};
use crate::audit::Audit;
use crate::client_env::{ClientEnv, Folder};
use crate::clock::Clock;
use crate::config::env::Environment;
use crate::config::paths::Paths;
use crate::config::{Config, OnViolation};
use crate::limits::Limits;
use crate::proxy::{Look, Parts, Proxy};
use crate::tasks::Tasks;
use crate::tls::ca::{LocalCa, Root};
use crate::tls::leaf::Leaves;
use crate::tokens::{Tokens, Violations};

/// A proxy with all that belongs to it, ready to serve.
pub(super) struct Started {
    pub(super) proxy: Proxy,
    /// Refreshes in flight: shutdown waits for them.
    pub(super) refreshes: Tasks,
    tokens: Arc<Tokens>,
    violations: Violations,
    /// Whether a login that is no longer allowed ends the process.
    exits: bool,
    roots: Vec<Root>,
    out: WayOut,
    audit: Audit,
    /// What all of it was made from.
    config: Config,
}

impl Started {
    /// Builds everything around a local CA. Nothing is served and no login is needed yet. Without `followed` nobody is
    /// let in by a pass.
    ///
    /// # Errors
    ///
    /// [`Failure`] for a bundle or a chain that cannot be used.
    pub(super) async fn new(
        config: Config,
        ca: LocalCa,
        followed: Option<&Arc<Followed>>,
        env: &Environment,
    ) -> Result<Self, Failure> {
        let roots = ca.roots().to_vec();
        let audit = audit::open(&config)?;
        let mut out = WayOut::new(&config, &roots, env)?;
        out.follow_roots();
        let refreshes = Tasks::new();
        let credentials = Credentials::new(&config, env, out.upstream.clone(), refreshes.clone());
        let credentials = credentials.written_down(audit.clone());
        let tokens = Arc::new(credentials.tokens_of_a_proxy(None).await?);
        // Before anybody looks, so that none falls in between.
        let violations = tokens.violations();
        if let Err(failure) = allowed(&tokens) {
            // What is being deleted is deleted.
            refreshes.finished().await;
            return Err(failure);
        }
        let (passes, look) = match followed {
            Some(followed) => (followed.passes.clone(), followed.looking()),
            None => (Arc::default(), Arc::new(|| ready(()).boxed()) as Look),
        };
        let proxy = Proxy::new(Parts {
            rules: config.rules.clone(),
            tokens: Arc::clone(&tokens),
            upstream: out.upstream.clone(),
            leaves: Leaves::new(ca).map_err(output::hinted)?,
            passes,
            look,
            clock: Clock::system(),
            limits: limits(&config),
            audit: audit.clone(),
        });
        let exits = config.on_policy_violation == OnViolation::Exit;
        Ok(Self { proxy, refreshes, tokens, violations, exits, roots, out, audit, config })
    }

    /// Goes by another configuration from now on, and reads keys and roots again. Nobody is cut off.
    ///
    /// # Errors
    ///
    /// [`Failure`] for what [`Started::new`] would fail for; then nothing has changed.
    pub(super) async fn reload(
        &mut self,
        config: Config,
        env: &Environment,
    ) -> Result<(), Failure> {
        let names_are_new = config.ca_names() != self.config.ca_names();
        let ca = if names_are_new { Some(local_ca(&config)?) } else { None };
        let roots = ca.as_ref().map_or_else(|| self.roots.clone(), |ca| ca.roots().to_vec());
        let leaves = ca.map(Leaves::new).transpose().map_err(output::hinted)?;
        let way_is_new = names_are_new || config.upstream != self.config.upstream;
        let way = if way_is_new { Some(NewWay::of(&config, &roots, env)?) } else { None };
        if way.is_none() {
            self.out.reload_roots()?;
        }
        let upstream = self.out.upstream.clone();
        let credentials = Credentials::new(&config, env, upstream, self.refreshes.clone());
        let credentials = credentials.written_down(self.audit.clone());
        let before = Before { config: &self.config, tokens: &self.tokens };
        let tokens = Arc::new(credentials.tokens_of_a_proxy(Some(before)).await?);
        if config.audit != self.config.audit {
            self.audit.flush();
            audit::change(&self.audit, &config)?;
        }
        // From here on nothing fails.
        if let Some(way) = way {
            self.out.take(way);
        }
        self.violations = tokens.violations();
        self.proxy.replace(config.rules.clone(), Arc::clone(&tokens), leaves);
        self.proxy.limit(limits(&config));
        self.exits = config.on_policy_violation == OnViolation::Exit;
        (self.tokens, self.roots, self.config) = (tokens, roots, config);
        Ok(())
    }

    /// What it goes by.
    pub(super) fn config(&self) -> &Config {
        &self.config
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
        self.out.client_env(&self.roots, address.into(), env, Folder::Here(dir))
    }

    /// Writes the roots that clients must trust into `dir`, as one file. It appears whole, as a client may read it at any moment,
    /// and stays the same file while nothing in it changes.
    ///
    /// # Errors
    ///
    /// [`Failure`] when `dir` cannot be written.
    pub(super) fn write_roots(&self, dir: &Path) -> Result<PathBuf, Failure> {
        let path = dir.join("ca.pem");
        let roots: String = self.roots.iter().map(Root::pem).collect();
        if fs::read(&path).is_ok_and(|now| now == roots.as_bytes()) {
            return Ok(path);
        }
        let write = || -> io::Result<()> {
            let readable = Permissions::from_mode(0o644);
            let mut file = tempfile::Builder::new().permissions(readable).tempfile_in(dir)?;
            file.write_all(roots.as_bytes())?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|error| Failure::at(&path, error))?;
        Ok(path)
    }

    /// Waits for a reason to end that lies in what is allowed. Until then says what is no longer.
    pub(super) async fn forbidden(&mut self) -> Failure {
        loop {
            let (name, violation) = self.violations.next().await;
            let failure = Failure::new(violation.sentence)
                .about(&format!("credential `{name}`"))
                .hint("what is asked for, and where: valetkey check --managed");
            if self.exits {
                self.tokens.delete_what_is_forbidden().await;
                return failure;
            }
            failure.report();
        }
    }

    /// Ends serving, and waits for the refreshes whatever happens: they hold the next login.
    pub(super) async fn shut_down(&self, deadline: Duration) {
        self.proxy.shut_down(deadline).await;
        self.refreshes.finished().await;
        self.audit.flush();
    }
}

/// The limits that are asked for, as far as the descriptors allow.
fn limits(config: &Config) -> Limits {
    config.limits.clone().within(process::free_descriptors())
}

/// Says when the descriptors do not allow as many connections as are asked for. Nobody asks for as many as anybody may
/// want, which is the usual limit.
pub(super) fn warn_of_descriptors(config: &Config) {
    let (asked, most) = (config.limits.connections, limits(config).connections);
    if asked > most && asked != Limits::USUAL.connections {
        output::warning(format_args!(
            "[limits] connections = {asked} is more than open files allow: no more than {most} are served at one time"
        ));
        output::hint(process::MORE_DESCRIPTORS);
    }
}

/// Says which logins are not allowed. Where a policy has one deleted and there is no other credential, there is
/// nothing to go on with.
fn allowed(tokens: &Tokens) -> Result<(), Failure> {
    let is_only_one = tokens.iter().count() == 1;
    for (_, source) in tokens.iter() {
        match source.last_violation() {
            Some(violation) if violation.deletes && is_only_one => {
                return Err(Failure::new(violation.sentence).hint("see: valetkey check --managed"));
            }
            Some(violation) => output::warning(violation),
            None => {}
        }
    }
    Ok(())
}

/// The local CA that is kept, for the names that are ruled now.
///
/// # Errors
///
/// [`Failure`] for a CA that cannot be used.
pub(super) fn local_ca(config: &Config) -> Result<LocalCa, Failure> {
    let names = config.ca_names();
    LocalCa::open(&ca_dir(&config.paths), &names, Clock::system()).map_err(output::hinted)
}

/// One for this process alone, whose keys are never written. What is kept is neither read nor made.
///
/// # Errors
///
/// [`Failure`] when the cryptography fails.
pub(super) fn ephemeral_ca(config: &Config) -> Result<LocalCa, Failure> {
    let names = config.ca_names();
    LocalCa::ephemeral(&names, Clock::system()).map_err(output::hinted)
}

/// Where the local CA is kept.
pub(super) fn ca_dir(paths: &Paths) -> PathBuf {
    paths.data_dir.join("ca")
}

/// Binds a listener.
///
/// # Errors
///
/// [`Failure`] with what to type when the port is taken.
pub(super) async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let failure = Failure::new(format!("cannot listen on {address}: {error}"));
        if error.kind() == io::ErrorKind::AddrInUse {
            return failure
                .hint("another program has the port; is it a valetkey? valetkey status")
                .hint("or take another port: valetkey serve --listen 127.0.0.1:0");
        }
        if error.kind() == io::ErrorKind::PermissionDenied && address.port() < 1024 {
            return failure.hint(
                "ports below 1024 are for root; take a higher one: valetkey serve --listen 127.0.0.1:8377",
            );
        }
        failure
    })
}
