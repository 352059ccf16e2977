//! A login whose tokens rotate: what is held of it, and what those get who ask for it.

mod flight;
mod personal;
mod watch;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::sync::watch::{Receiver, Sender};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::expiry::{Moment, Received};
use super::forbidden::Forbidden;
use super::held::{Held, Kept, Ready};
use super::rotation::{Rotation, Want, tokens_of};
use super::{Enforced, Parts, State, Status, TokenError, Whose};
use crate::audit::{Audit, CredentialEvent};
use crate::clock::Clock;
use crate::credential::{Credential, CredentialName, Login, LoginKind};
use crate::oauth::{Issuer, Reason, refresh, wire};
use crate::policy::Violation;
use crate::secret::{Fingerprint, Secret};
use crate::store::{Record, RecordStore, remove_login_if};
use crate::tasks::Tasks;
use flight::{Landing, Quiet};
use personal::Identifying;

pub(super) struct Rotating {
    name: CredentialName,
    clock: Clock,
    refreshes: Tasks,
    store: Arc<dyn RecordStore>,
    rotation: Rotation,
    /// What readers see. Written only with `gate` held.
    held: ArcSwap<Held>,
    gate: Mutex<Gate>,
    /// When the store was last read; held while reading, so that one reads.
    reading: tokio::sync::Mutex<Option<Instant>>,
    /// The issuer's clock less ours, in milliseconds.
    skew_ms: AtomicI64,
    kind: Sender<Option<LoginKind>>,
    issuer: Arc<dyn Issuer>,
    policy: Enforced,
    /// Why the last login was not allowed, until there is one that is.
    violation: Sender<Option<Violation>>,
    /// Tells those who go on using a value that its login is forbidden.
    forbidden: Forbidden,
    identifying: Identifying,
    audit: Audit,
    _watch: DropGuard,
}

/// What is changed together with what is held, and what decides whether a refresh starts.
#[derive(Default)]
struct Gate {
    /// The refresh in the air, until its sender is gone.
    flight: Option<Receiver<Landing>>,
    /// No refresh for a while, and what those hear who need one.
    quiet: Option<Quiet>,
    /// How often in a row the store was in trouble.
    store_failures: u32,
    /// When a 401 last caused a refresh.
    forced: Option<Instant>,
    /// When the set was last redeemed because of a 401, as the record says.
    forced_at: Option<time::OffsetDateTime>,
    /// Rules whose 401s pass.
    muted: HashSet<String>,
    /// The login that its owner has revoked.
    dropped: Option<Fingerprint>,
    /// The access token whose successor is held and not saved yet.
    outlived: Option<Fingerprint>,
    /// How many records were adopted otherwise than by a read: a read begun before one is older than it.
    adopted: u64,
}

impl Rotating {
    pub(super) async fn start(
        parts: Parts,
        store: Arc<dyn RecordStore>,
        issuer: Arc<dyn Issuer>,
    ) -> Arc<Self> {
        let stop = CancellationToken::new();
        let rotating = Arc::new(Self {
            rotation: Rotation::new(Arc::clone(&store), Arc::clone(&issuer), parts.clock.clone()),
            issuer,
            policy: parts.policy,
            violation: Sender::new(None),
            forbidden: Forbidden::default(),
            identifying: Identifying::default(),
            audit: parts.audit,
            name: parts.name,
            clock: parts.clock,
            refreshes: parts.refreshes,
            held: ArcSwap::default(),
            gate: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
            skew_ms: AtomicI64::new(0),
            kind: Sender::new(None),
            _watch: stop.clone().drop_guard(),
            store,
        });
        // Before the first read, so that nothing that comes after it is missed.
        let changes = rotating.store.changes();
        rotating.recover().await;
        rotating.read(Duration::ZERO).await;
        rotating.delete_what_is_forbidden().await;
        let source = Arc::downgrade(&rotating);
        let watching = move || watch::watch_store(source.clone(), changes.clone(), stop.clone());
        parts.background.keep("following a login", watching);
        rotating
    }

    /// The value to send. The warm path: one load, one look at the clock.
    pub(super) async fn current(self: &Arc<Self>) -> Result<Arc<Credential>, TokenError> {
        if let Some(ready) = self.held.load().ready()
            && !self.has_come(ready.times.due)
        {
            return Ok(Arc::clone(&ready.credential));
        }
        Box::pin(self.renewed()).await
    }

    /// The value to send where none is held, or one that is due.
    async fn renewed(self: &Arc<Self>) -> Result<Arc<Credential>, TokenError> {
        // A set that others brought may have expired too; more than two such in a row is no accident.
        for _ in 0..3 {
            let held = self.held.load_full();
            if let Kept::Unidentified(token) = &held.login {
                self.identify(token).await?;
                continue;
            }
            if let Some(ready) = self.unexpired(&held) {
                self.refresh_if_due(&held);
                return Ok(Arc::clone(&ready.credential));
            }
            let Some(want) = self.want(&held, Reason::Proactive) else {
                let is_read = self.read(READ_INTERVAL).await;
                // Somebody else may have read while we waited for that.
                let now = self.held.load_full();
                if is_read
                    || self.unexpired(&now).is_some()
                    || self.want(&now, Reason::Proactive).is_some()
                {
                    continue;
                }
                return Err(self.refusal(&now));
            };
            let landing = self.join(want).await;
            if self.unexpired(&self.held.load_full()).is_none() {
                landing?;
            }
        }
        Err(TokenError::IssuerUnavailable { retry_after: READ_INTERVAL, trouble: None })
    }

    pub(super) async fn after_401(
        self: &Arc<Self>,
        rule: &str,
        refused: &Credential,
    ) -> Result<Option<Arc<Credential>>, TokenError> {
        if self.gate().muted.contains(rule) {
            return Ok(None);
        }
        self.wait_for_flight().await;
        let mut held = self.held.load_full();
        let is_refused = |held: &Held| held.ready().is_some_and(|it| it.is(refused));
        if is_refused(&held) {
            match self.want(&held, Reason::Unauthorized) {
                Some(_) if self.was_forced_lately() => drop(self.read(READ_INTERVAL).await),
                Some(want) => self.join(want).await?,
                None => drop(self.read(READ_INTERVAL).await),
            }
            held = self.held.load_full();
        }
        if is_refused(&held) {
            return match held.death() {
                Some(_) => Err(self.refusal(&held)),
                None => Ok(None),
            };
        }
        let now = Box::pin(self.current()).await?;
        // The request was made for one account; another one must not answer it.
        let same = now.kind() == refused.kind() && now.account().id == refused.account().id;
        Ok(same.then_some(now))
    }

    pub(super) fn refused_again(&self, rule: &str, credential: &Credential) {
        let mut gate = self.gate();
        if self.held.load().ready().is_some_and(|ready| ready.is(credential)) {
            gate.muted.insert(rule.to_owned());
        }
    }

    pub(super) fn can_refresh(&self) -> bool {
        let held = self.held.load();
        match held.ready() {
            // Somebody may have put another key there.
            Some(Ready { set: None, .. }) => true,
            Some(Ready { set: Some(set), .. }) => {
                self.issuer.can_renew(Some(set)) && held.death().is_none()
            }
            None => false,
        }
    }

    pub(super) fn kind(&self) -> Option<LoginKind> {
        *self.kind.borrow()
    }

    pub(super) fn kind_changes(&self) -> Receiver<Option<LoginKind>> {
        self.kind.subscribe()
    }

    pub(super) fn status(&self) -> Status {
        let held = self.held.load();
        let ready = held.ready();
        let set = ready.and_then(|ready| ready.set.as_ref());
        let state = match (&held.trouble, &held.login) {
            (Some(error), _) => State::Unreadable(error.to_string()),
            // Nobody has to sign in.
            (None, Kept::Nothing) if self.issuer.can_renew(None) => State::Ok,
            (None, Kept::Nothing) => State::NoLogin,
            (None, Kept::Unsupported(what)) => State::Unsupported(what.clone()),
            (None, Kept::Unidentified(_)) => State::Ok,
            (None, Kept::Forbidden(violation)) => State::Forbidden(violation.clone()),
            (None, Kept::Ready(_)) => {
                held.death().map_or(State::Ok, |code| State::Dead(code.to_owned()))
            }
        };
        Status {
            kind: self.kind(),
            account: ready.map(|ready| ready.credential.account().clone()).unwrap_or_default(),
            expires_at: ready
                .and_then(|ready| ready.times.expires)
                .map(|moment| moment.on_the_wall(&self.clock, self.skew())),
            last_refresh: set.and_then(|set| set.last_refresh),
            masked: match &held.login {
                Kept::Unidentified(token) => Some(token.masked()),
                Kept::Ready(Ready { credential, set: None, .. }) => {
                    Some(credential.token().masked())
                }
                _ => None,
            },
            mfa: set.and_then(|set| set.id_claims().mfa),
            state,
        }
    }

    pub(super) fn recognises(&self, token: &Secret) -> Option<Whose> {
        let (held, token) = (self.held.load(), token.fingerprint());
        let ready = held.ready()?;
        let set = ready.set.as_ref()?;
        let refresh = set.refresh.as_ref().map(Secret::fingerprint);
        let previous = held.header.as_ref().and_then(|header| header.previous);
        if refresh == Some(token) {
            Some(Whose::Current)
        } else if previous == Some(token) {
            Some(Whose::Previous)
        } else {
            (set.access.fingerprint() == token).then_some(Whose::Access)
        }
    }

    pub(super) async fn answer_refresh(
        self: &Arc<Self>,
        whose: Whose,
    ) -> Result<Bytes, TokenError> {
        // A set that is being replaced must not be handed out: the client would save it over the new one.
        self.wait_for_flight().await;
        let held = self.held.load_full();
        if whose == Whose::Current
            && !self.was_forced_lately()
            && let Some(want) = self.want(&held, Reason::Unauthorized)
        {
            let good = self.unexpired(&held).is_some();
            // Where it fails and the set is still good, that is the answer.
            if let Err(error) = self.join(Want { good, ..want }).await {
                tracing::debug!(credential = %self.name, %error, "a client gets the set as it is");
            }
        } else {
            // Another process may have replaced it.
            self.read(Duration::ZERO).await;
        }
        Box::pin(self.current()).await?;
        let held = self.held.load();
        let ready = self.unexpired(&held).ok_or_else(|| self.refusal(&held))?;
        let set = ready.set.as_ref().ok_or_else(|| self.refusal(&held))?;
        let left = ready.times.expires.map(|moment| moment.left(&self.clock, self.skew()));
        Ok(wire::refresh_answer(set, left))
    }

    pub(super) fn logged_out(&self) {
        self.audit.credential(&self.name, CredentialEvent::Logout, Some("by_a_client"));
        let mut gate = self.gate();
        let held = self.held.load_full();
        gate.dropped = held.ready().and_then(Ready::fingerprint);
        self.hold(Held { login: Kept::Nothing, ..Held::clone(&held) });
    }

    /// The file that holds the login, if a file does.
    pub(super) fn file(&self) -> Option<PathBuf> {
        self.store.file()
    }

    /// Where the store keeps the login.
    pub(super) fn place(&self) -> String {
        self.store.place()
    }

    /// Reads the store and holds what is there, unless that was done less than `interval` ago.
    async fn read(&self, interval: Duration) -> bool {
        let mut last = self.reading.lock().await;
        let now = self.clock.instant();
        if last.is_some_and(|at| now.saturating_duration_since(at) < interval) {
            return false;
        }
        *last = Some(now);
        loop {
            let adopted = self.gate().adopted;
            let read = self.store.get().await;
            let gate = self.gate();
            if gate.adopted != adopted {
                continue;
            }
            match read {
                Ok((_, record)) => self.adopt_within(gate, &record, None),
                Err(error) => {
                    let policy = Arc::clone(&self.policy.policy.borrow());
                    // What is held is used on, as far as it is allowed.
                    let held = self.held.load().under(&policy);
                    if held.trouble.is_none() {
                        tracing::warn!(credential = %self.name, %error, "a login cannot be read");
                    }
                    self.hold(Held { trouble: Some(Arc::new(error)), ..held });
                }
            }
            return true;
        }
    }

    /// Holds a record that did not come from a read: what a refresh has brought or found, or whom a token speaks for.
    fn adopt(&self, record: &Record, received: Option<Received>) {
        let mut gate = self.gate();
        gate.adopted += 1;
        gate.store_failures = 0;
        self.adopt_within(gate, record, received);
    }

    fn adopt_within(
        &self,
        mut gate: MutexGuard<'_, Gate>,
        record: &Record,
        received: Option<Received>,
    ) {
        let set = tokens_of(record);
        if gate.outlived.is_some() && gate.outlived == set.map(|set| set.access.fingerprint()) {
            return;
        }
        let old = self.held.load_full();
        let policy = Arc::clone(&self.policy.policy.borrow());
        let held = old.followed_by(record, received, gate.dropped, &policy);
        if held.serial() != old.serial() {
            gate.dropped = None;
            gate.quiet = None;
            if gate.forced_at == record.header.forced_at || record.header.forced_at.is_none() {
                gate.muted.clear();
            }
        }
        gate.forced_at = record.header.forced_at;
        self.hold(held);
    }

    /// Replaces what is held; `gate` must be.
    fn hold(&self, held: Held) {
        let kind = match &held.login {
            Kept::Unidentified(_) => Some(LoginKind::ChatGpt),
            Kept::Nothing if self.issuer.can_renew(None) => Some(LoginKind::OAuth),
            _ => held.ready().map(|ready| ready.credential.kind()),
        };
        let violation = match &held.login {
            Kept::Forbidden(violation) => Some(violation.clone()),
            // It was deleted for that.
            Kept::Nothing => self.violation.borrow().clone(),
            Kept::Ready(_) | Kept::Unidentified(_) | Kept::Unsupported(_) => None,
        };
        if let Some(code) = held.death()
            && self.held.load().death().is_none()
        {
            self.audit.credential(&self.name, CredentialEvent::Dead, Some(code));
        }
        self.held.store(Arc::new(held));
        self.kind.send_if_modified(|known| std::mem::replace(known, kind) != kind);
        let is_new = |known: &mut Option<Violation>| *known != violation;
        let begins = violation.is_some();
        let moved = self.violation.send_if_modified(|known| {
            is_new(known) && {
                known.clone_from(&violation);
                true
            }
        });
        if moved && begins {
            self.audit.credential(&self.name, CredentialEvent::Forbidden, None);
            self.forbidden.forbid();
        }
    }

    /// Cancelled when the login that is in force now is forbidden.
    pub(super) fn forbidden(&self) -> CancellationToken {
        self.forbidden.token()
    }

    /// Why the last login was not allowed, until there is one that is.
    pub(super) fn violation(&self) -> Receiver<Option<Violation>> {
        self.violation.subscribe()
    }

    /// Deletes the login that a policy wants deleted, as Codex does: here, and not at the issuer. One that
    /// has taken its place meanwhile stays.
    pub(super) async fn delete_what_is_forbidden(&self) {
        let must_go = match &self.held.load().login {
            Kept::Forbidden(violation) => violation.deletes && self.policy.deletes,
            _ => false,
        };
        if !must_go {
            return;
        }
        let is_forbidden = |login: &Login| {
            let policy = Arc::clone(&self.policy.policy.borrow());
            policy.judge(login).is_err_and(|violation| violation.deletes)
        };
        match remove_login_if(&*self.store, is_forbidden).await {
            Ok(()) => {
                self.audit.credential(&self.name, CredentialEvent::Deleted, None);
                tracing::warn!(credential = %self.name, "a login that is not allowed was deleted")
            }
            Err(error) => {
                tracing::error!(credential = %self.name, %error, "a login that is not allowed could not be deleted");
            }
        }
    }

    fn unexpired<'a>(&self, held: &'a Held) -> Option<&'a Ready> {
        held.ready().filter(|ready| !self.has_come(ready.times.expires))
    }

    fn has_come(&self, moment: Option<Moment>) -> bool {
        moment.is_some_and(|moment| moment.left(&self.clock, self.skew()).is_zero())
    }

    fn skew(&self) -> time::Duration {
        time::Duration::milliseconds(self.skew_ms.load(Ordering::Relaxed))
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why there is nothing to send.
    fn refusal(&self, held: &Held) -> TokenError {
        let violation = match &held.login {
            Kept::Forbidden(violation) => Some(violation.clone()),
            Kept::Nothing if held.trouble.is_none() => self.violation.borrow().clone(),
            _ => None,
        };
        if let Some(violation) = violation {
            let hint = format!("see: valetkey check --managed; then {}", self.how_to_sign_in());
            return TokenError::Forbidden { why: violation.to_string(), hint };
        }
        let why = match (&held.login, &held.trouble, held.death()) {
            (Kept::Nothing, Some(error), _) => {
                return TokenError::StoreUnavailable(Arc::clone(error));
            }
            (Kept::Nothing, None, _) => "Not logged in".to_owned(),
            (Kept::Unsupported(what), ..) => {
                format!("{what} is signed in, which cannot be used here")
            }
            (Kept::Forbidden(violation), ..) => violation.to_string(),
            (Kept::Unidentified(_), ..) => {
                "the issuer has not said whom the access token speaks for".to_owned()
            }
            (Kept::Ready(_), _, Some(code)) => refresh::verdict(code),
            (Kept::Ready(_), _, None) => {
                "The access token has expired, and there is no refresh token".to_owned()
            }
        };
        TokenError::LoginRequired { why, hint: self.how_to_sign_in() }
    }

    fn how_to_sign_in(&self) -> String {
        format!("sign in: {}", self.name.how_to_sign_in())
    }
}

/// How often it is read for those who find nothing to send, at most: it may be a keyring, which a busy client would
/// keep busy, and whoever has just signed in waits no longer than this.
const READ_INTERVAL: Duration = Duration::from_secs(1);
