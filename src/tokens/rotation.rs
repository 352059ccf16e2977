//! Redeems a refresh token once, whoever else wants it too, and sends one that may have been redeemed again only when its
//! access token has expired: one state machine over a store, for one process, many processes and many machines.
//!
//! `idle → claimed → posting → idle (one generation on) | unknown | dead`. Each arrow is a
//! compare-and-set. The one right before the request is the fence: a process that slept past its claim
//! fails there, before anything irreversible. A journal is reserved before the fence and has the answer before
//! anybody uses it, so that whoever looks can end what a process that died has begun. The commit is bound to the generation and not to the
//! claim: whoever holds the successor may publish it.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::rand;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::expiry::{Received, later, lifetime};
use crate::clock::Clock;
use crate::credential::{Login, TokenSet};
use crate::fault;
use crate::oauth::provider::POST_LIMIT;
use crate::oauth::{Answer, Issuer, Leave, Reason, RefreshError, Trouble};
use crate::secret::Fingerprint;
use crate::store::{
    Cas, Header, Journal, Left, Phase, Record, RecordStore, Redeemed, Stamp, StoreError, Version,
};

/// The rotation of one login, as one owner sees it. At most one [`Rotation::refresh`] runs at a time.
pub(super) struct Rotation {
    store: Arc<dyn RecordStore>,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    owner: String,
    /// Why the last request brought nothing, and the access token that it should have replaced.
    trouble: Mutex<Option<(Option<Fingerprint>, Trouble)>>,
}

/// What a refresh is wanted for.
#[derive(Clone, Debug)]
pub(super) struct Want {
    /// Fingerprint of the access token that is to be replaced; `None` where there is no set yet.
    pub(super) unwanted: Option<Fingerprint>,
    /// Whether that token can still be sent: neither expired nor refused.
    pub(super) good: bool,
    /// Whether it lives by its expiry. A refused one does: the 401 may mean something else.
    pub(super) alive: bool,
    /// Why it is to be replaced.
    pub(super) reason: Reason,
}

/// How a refresh ended, other than by trouble with the store.
pub(super) enum Outcome {
    /// The store holds something else than the unwanted token, or a login that cannot be refreshed.
    Found(Box<Record>),
    /// We hold the successor, and must publish it.
    Redeemed(Box<Successor>),
    /// Nobody may try before this much time has passed.
    Later(Duration),
    /// An upstream's 401 caused a refresh less than [`FORCED_INTERVAL`] ago.
    TooSoon,
}

/// A token set that the issuer has handed out, and what it follows.
pub(super) struct Successor {
    /// The record as it stood when the request was sent.
    parent: Record,
    redeemed: Redeemed,
    /// Where it is written down until it is published.
    journal: Option<Box<dyn Journal>>,
    /// Whether it is.
    is_kept: AtomicBool,
    /// When this process received it; `None` where it was another one.
    pub(super) received: Option<Received>,
    /// The issuer's clock less ours, where it told its time.
    pub(super) skew: Option<time::Duration>,
}

impl Rotation {
    /// The rotation of the login in that store, with a new random owner.
    pub(super) fn new(store: Arc<dyn RecordStore>, issuer: Arc<dyn Issuer>, clock: Clock) -> Self {
        let mut id = [0; 16];
        if rand::fill(&mut id).is_err() {
            tracing::warn!("the system gives no random bytes");
        }
        // Two owners must never share an id, with random bytes or without.
        let id = format!("{id:?} {} {}", std::process::id(), clock.now().unix_timestamp_nanos());
        let owner = Fingerprint::of(id.as_bytes()).to_hex()[..32].to_owned();
        Self { store, issuer, clock, owner, trouble: Mutex::default() }
    }

    /// Why the wanted refresh brought nothing when this owner last tried it.
    pub(super) fn trouble(&self, want: &Want) -> Option<Trouble> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble
            .as_ref()
            .filter(|(unwanted, _)| *unwanted == want.unwanted)
            .map(|(_, it)| it.clone())
    }

    /// Replaces the unwanted token, unless somebody else has or does: then waits for that.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then no request was sent.
    pub(super) async fn refresh(&self, want: &Want) -> Result<Outcome, StoreError> {
        let mut changes = self.store.changes();
        let mut seen = Seen::default();
        loop {
            changes.mark_unchanged();
            let (version, record) = self.store.get().await?;
            if !self.is_wanted(&record, want) {
                return Ok(Outcome::Found(Box::new(record)));
            }
            let unchanged = match self.store.look_back(Stamp::of(&record)).await? {
                Left::Answer(redeemed) => {
                    return Ok(Outcome::Redeemed(Box::new(Successor::found(record, *redeemed))));
                }
                Left::Abandoned => Duration::MAX,
                Left::Nothing => seen.unchanged_for(version),
            };
            match self.next(&record.header, unchanged, want) {
                Next::Claim => {
                    if let Some(outcome) = self.claim(version, record, want).await? {
                        return Ok(outcome);
                    }
                }
                Next::CallUnknown => {
                    let header = Header { phase: Phase::Unknown, ..record.header.clone() };
                    tracing::warn!("a refresh was begun and not ended");
                    self.step(version, &record, header).await?;
                }
                Next::Wait => look_again(&mut changes).await,
                Next::Stop(outcome) => return Ok(outcome),
            }
        }
    }

    /// Publishes an answer that whoever asked for it has left in a journal, if anybody has.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then it is still there.
    pub(super) async fn recover(&self) -> Result<(), StoreError> {
        let (_, record) = self.store.get().await?;
        let Left::Answer(redeemed) = self.store.look_back(Stamp::of(&record)).await? else {
            return Ok(());
        };
        let successor = Successor::found(record, *redeemed);
        loop {
            if let Some(record) = self.try_publish(&successor).await? {
                self.tidy(&successor, &record).await;
                return Ok(());
            }
        }
    }

    /// Whether the record still holds the unwanted token, and there is something to ask with for its successor.
    fn is_wanted(&self, record: &Record, want: &Want) -> bool {
        access_of(record) == want.unwanted
            && record.login.as_ref().is_none_or(|login| login.tokens().is_some())
            && self.issuer.can_renew(tokens_of(record))
            && !matches!(record.header.phase, Phase::Dead(_))
    }

    /// What the phase allows. `unchanged` is how long the record has been seen as it is; for ever where its owner has
    /// died.
    fn next(&self, header: &Header, unchanged: Duration, want: &Want) -> Next {
        let own = header.owner == self.owner;
        match header.phase {
            Phase::Claimed if !own && unchanged < CLAIM_LEASE => Next::Wait,
            Phase::Posting if !own && unchanged < POSTING_LIMIT => Next::Wait,
            Phase::Posting => Next::CallUnknown,
            // Sending it again is the last resort, and never while the access token lives: it may end the login.
            Phase::Unknown if want.alive => Next::Stop(Outcome::Later(BACKOFF_LIMIT)),
            Phase::Idle | Phase::Claimed | Phase::Unknown | Phase::Dead(_) => {
                let now = self.clock.now();
                if let Some(wait) = header.retry_at.and_then(|at| until(at, now, LONGEST_WAIT)) {
                    return Next::Stop(Outcome::Later(wait));
                }
                let since = header.forced_at.filter(|_| want.reason == Reason::Unauthorized);
                match since.and_then(|at| until(later(at, FORCED_INTERVAL), now, FORCED_INTERVAL)) {
                    Some(_) => Next::Stop(Outcome::TooSoon),
                    None => Next::Claim,
                }
            }
        }
    }

    /// Claims the generation, reserves a journal, fences, and redeems it. `None` when somebody else was first.
    async fn claim(
        &self,
        version: Version,
        mut record: Record,
        want: &Want,
    ) -> Result<Option<Outcome>, StoreError> {
        let before = record.header.phase.clone();
        record.header = Header {
            phase: Phase::Claimed,
            owner: self.owner.clone(),
            epoch: record.header.epoch + 1,
            ..record.header
        };
        let Some(version) = self.step(version, &record, record.header.clone()).await? else {
            return Ok(None);
        };
        fault::point("claimed");
        let journal = match self.store.reserve(Stamp::of(&record)).await {
            Ok(journal) => journal,
            Err(error) => {
                // Nothing was sent, so others need not wait. Where this fails too, they do.
                let free = Header { phase: before, ..record.header.clone() };
                drop(self.step(version, &record, free).await);
                return Err(error);
            }
        };
        fault::point("noted");
        // Nobody can have seen the mark before this, so nobody gives the request up before the limit is over.
        let until = Instant::now() + POSTING_LIMIT;
        record.header.phase = Phase::Posting;
        let fenced = self.step(version, &record, record.header.clone()).await;
        if !matches!(fenced, Ok(Some(_))) {
            forget(journal.as_deref()).await;
            return fenced.map(|_| None);
        }
        fault::point("posting");
        match self.ask(&record, want.reason, until).await {
            Ok(answer) => {
                fault::point("answered");
                let successor = self.successor(record, answer, journal, want.reason);
                successor.keep().await;
                fault::point("journaled");
                Ok(Some(Outcome::Redeemed(Box::new(successor))))
            }
            Err(error) => {
                let outcome = self.settle(record, &error).await;
                forget(journal.as_deref()).await;
                Ok(Some(outcome))
            }
        }
    }

    /// Sends the request, unless this process stood still before that: others may have sent the token since. An answer is
    /// waited for however long it stands still after it.
    async fn ask(
        &self,
        record: &Record,
        reason: Reason,
        until: Instant,
    ) -> Result<Answer, RefreshError> {
        let leave = Leave::until(until);
        match self.issuer.renew(tokens_of(record), reason, &leave).await {
            Err(RefreshError::Unknown(why)) if leave.withdraw() => {
                Err(RefreshError::NotSent(why.into()))
            }
            answered => answered,
        }
    }

    /// One arrow: the record with another header. `None` when it is no longer as it was read.
    async fn step(
        &self,
        version: Version,
        record: &Record,
        header: Header,
    ) -> Result<Option<Version>, StoreError> {
        let next = Record { header, login: record.login.clone() };
        match self.store.cas(version, next.clone()).await? {
            Cas::Done(version) => Ok(Some(version)),
            Cas::Conflict => Ok(None),
            Cas::Unknown => {
                let (version, now) = self.store.get().await?;
                Ok((now.header == next.header && is_same(&now, &next)).then_some(version))
            }
        }
    }

    fn successor(
        &self,
        parent: Record,
        answer: Answer,
        journal: Option<Box<dyn Journal>>,
        reason: Reason,
    ) -> Successor {
        let (at, now) = (self.clock.instant(), self.clock.now());
        let skew = answer.date.map(|date| date - now);
        let lifetime = lifetime(&answer, now);
        let old = tokens_of(&parent);
        let set = TokenSet {
            access: answer.access,
            refresh: answer.refresh.or_else(|| old?.refresh.clone()),
            id: answer.id.or_else(|| old?.id.clone()),
            account_id: old.and_then(|old| old.account_id.clone()),
            last_refresh: Some(now),
        };
        let forced = (reason == Reason::Unauthorized).then_some(now);
        let redeemed = Redeemed {
            login: match &parent.login {
                Some(Login::ChatGpt(_)) => Login::ChatGpt(set),
                _ => Login::OAuth(set),
            },
            lifetime,
            forced_at: forced.or(parent.header.forced_at),
        };
        let received = Some(Received { at, lifetime });
        let is_kept = AtomicBool::new(false);
        Successor { redeemed, journal, is_kept, received, skew, parent }
    }

    /// Publishes a successor, however long that takes, and answers with what the store holds then:
    /// the successor, or what has superseded it. Its journal is removed.
    pub(super) async fn publish(&self, successor: &Successor) -> Record {
        let mut pause = SAVE_PAUSE;
        loop {
            match self.try_publish(successor).await {
                Ok(Some(record)) => {
                    fault::point("published");
                    self.tidy(successor, &record).await;
                    fault::point("forgotten");
                    return record;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "a new token set could not be saved, trying again");
                    successor.keep().await;
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF_LIMIT);
                }
            }
        }
    }

    /// `None` when it must be tried again at once.
    async fn try_publish(&self, successor: &Successor) -> Result<Option<Record>, StoreError> {
        let (version, record) = self.store.get().await?;
        if successor.is_in(&record) {
            return Ok(Some(record));
        }
        if !is_same_generation(&record, &successor.parent) {
            tracing::info!("a new token set was superseded by another login");
            return Ok(Some(record));
        }
        let mut next = successor.redeemed.over(&record.header);
        if access_of(&next) == successor.follows() {
            // Nothing is gained by asking again before it is renewed.
            next.header.attempts = record.header.attempts.saturating_add(1);
            next.header.retry_at = Some(later(self.clock.now(), backoff(&next.header)));
        }
        match self.store.cas(version, next.clone()).await? {
            Cas::Done(_) => Ok(Some(next)),
            Cas::Conflict | Cas::Unknown => Ok(None),
        }
    }

    /// Removes the journal of a successor that is published, and what those have left who died before us.
    async fn tidy(&self, successor: &Successor, published: &Record) {
        forget(successor.journal.as_deref()).await;
        // Whether it can be is nothing that anything depends on.
        drop(self.store.look_back(Stamp::of(published)).await);
    }

    /// Writes down how a request ended that brought no set.
    async fn settle(&self, record: Record, error: &RefreshError) -> Outcome {
        tracing::warn!(%error, "a refresh brought nothing");
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((access_of(&record), error.trouble()));
        if matches!(error, RefreshError::Rejected { .. }) {
            self.look_for_a_newer(&record).await;
        }
        let mut failed = record.header.clone();
        failed.attempts = failed.attempts.saturating_add(1);
        let mut wait = backoff(&failed);
        failed.phase = match error {
            RefreshError::NotSent(_) => Phase::Idle,
            RefreshError::Limited { retry_after } => {
                wait = wait.max(retry_after.unwrap_or_default().min(LONGEST_WAIT));
                Phase::Idle
            }
            RefreshError::Unknown(_) => Phase::Unknown,
            RefreshError::Rejected { code } => Phase::Dead(code.clone()),
        };
        failed.retry_at = Some(later(self.clock.now(), wait));
        let dead = matches!(failed.phase, Phase::Dead(_));
        match self.write_down(&record, failed.clone()).await {
            Some(newer) => Outcome::Found(Box::new(newer)),
            None if dead => {
                Outcome::Found(Box::new(Record { header: failed, login: record.login }))
            }
            None => Outcome::Later(wait),
        }
    }

    /// Somebody who does not know of claims, Codex itself, may have redeemed this generation before us
    /// and be about to write what it got.
    async fn look_for_a_newer(&self, record: &Record) {
        let mut changes = self.store.changes();
        let wait = async {
            while self.store.get().await.is_ok_and(|(_, now)| is_same(&now, record)) {
                look_again(&mut changes).await;
            }
        };
        // A time-out is an answer too: nobody has.
        drop(timeout(REJECTION_GRACE, wait).await);
    }

    /// Moves our own posting to how it ended; answers with the record if somebody else has moved it.
    /// Gives up after a few tries: a posting that stands for long is called unknown by whoever looks.
    async fn write_down(&self, record: &Record, header: Header) -> Option<Record> {
        let mut tries = 0;
        while tries < SETTLE_TRIES {
            let step = async {
                let (version, now) = self.store.get().await?;
                let ours = now.header.epoch == header.epoch && now.header.owner == header.owner;
                if !ours || !is_same(&now, record) {
                    return Ok(Some(Some(now)));
                }
                let done = self.step(version, record, header.clone()).await?.is_some();
                Ok::<_, StoreError>(done.then_some(None))
            };
            match step.await {
                Ok(Some(end)) => return end,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "the end of a refresh could not be written down");
                    tries += 1;
                    sleep(SAVE_PAUSE).await;
                }
            }
        }
        None
    }
}

impl Successor {
    /// One that somebody else was given for that record, and has left.
    fn found(parent: Record, redeemed: Redeemed) -> Self {
        tracing::warn!("an answer was found that nobody has saved");
        let is_kept = AtomicBool::new(true);
        Self { redeemed, journal: None, is_kept, received: None, skew: None, parent }
    }

    /// Writes it down where a crash does not reach it, unless it is. Where that fails it is in memory alone until it
    /// is published.
    async fn keep(&self) {
        let Some(journal) = &self.journal else { return };
        if self.is_kept.load(Ordering::Relaxed) {
            return;
        }
        match journal.keep(&self.redeemed).await {
            Ok(()) => self.is_kept.store(true, Ordering::Relaxed),
            Err(error) => tracing::error!(%error, "a new token set could not be written down"),
        }
    }

    /// The record as it will be, for use while it cannot be saved.
    pub(super) fn unsaved(&self) -> Record {
        self.redeemed.over(&self.parent.header)
    }

    /// Whether a record holds this very set, as what follows the one that was redeemed: an issuer may hand out anew what it
    /// has handed out before.
    pub(super) fn is_in(&self, record: &Record) -> bool {
        let number = |record: &Record| (record.header.line, record.header.generation);
        is_same(record, &self.unsaved()) && number(record) != number(&self.parent)
    }

    /// Fingerprint of the access token that this follows.
    pub(super) fn follows(&self) -> Option<Fingerprint> {
        access_of(&self.parent)
    }
}

enum Next {
    Claim,
    CallUnknown,
    Wait,
    Stop(Outcome),
}

/// Which version was seen, and since when, on the monotonic clock of this process.
#[derive(Default)]
struct Seen(Option<(Version, Instant)>);

impl Seen {
    fn unchanged_for(&mut self, version: Version) -> Duration {
        match self.0 {
            Some((known, since)) if known == version => since.elapsed(),
            _ => {
                self.0 = Some((version, Instant::now()));
                Duration::ZERO
            }
        }
    }
}

/// Until the record may have changed; at most [`LOOK_AGAIN`], as a signal may be lost.
async fn look_again(changes: &mut watch::Receiver<u64>) {
    if let Ok(Err(_)) = timeout(LOOK_AGAIN, changes.changed()).await {
        sleep(LOOK_AGAIN).await;
    }
}

async fn forget(journal: Option<&dyn Journal>) {
    if let Some(journal) = journal {
        journal.forget().await;
    }
}

/// The tokens of a login that has such.
pub(super) fn tokens_of(record: &Record) -> Option<&TokenSet> {
    record.login.as_ref().and_then(Login::tokens)
}

fn access_of(record: &Record) -> Option<Fingerprint> {
    tokens_of(record).map(|set| set.access.fingerprint())
}

fn is_same_generation(one: &Record, other: &Record) -> bool {
    Stamp::of(one).is_same_generation(&Stamp::of(other))
}

/// Same generation, same access token.
fn is_same(one: &Record, other: &Record) -> bool {
    is_same_generation(one, other) && access_of(one) == access_of(other)
}

/// How long until `at`; `None` when it has come, or when it is further off than it can rightly be,
/// because the clock was turned.
fn until(at: OffsetDateTime, now: OffsetDateTime, limit: Duration) -> Option<Duration> {
    let left = Duration::try_from(at - now).ok()?;
    (!left.is_zero() && left <= limit).then_some(left)
}

/// 1 s after the first failure, twice that after each further one, 60 s at most, and up to a quarter
/// less: not every machine at once.
fn backoff(header: &Header) -> Duration {
    let doublings = header.attempts.saturating_sub(1).min(6);
    let step = Duration::from_secs(1 << doublings).min(BACKOFF_LIMIT);
    step.mul_f64(1.0 - spread(&header.owner, header.epoch) / 4.0)
}

/// A number from 0 to 1 that looks random and is the same for the same owner and number.
pub(super) fn spread(owner: &str, number: u64) -> f64 {
    let hex = Fingerprint::of(format!("{owner} {number}").as_bytes()).to_hex();
    let byte = u8::from_str_radix(&hex[..2], 16).unwrap_or(0);
    f64::from(byte) / 255.0
}

/// A claim that nobody has moved for this long is free: longer than any honest way from claim to fence.
const CLAIM_LEASE: Duration = Duration::from_secs(20);

/// After twice the time that a request may take its outcome is unknown.
const POSTING_LIMIT: Duration = POST_LIMIT.saturating_mul(2);

/// Longest wait between two looks at somebody else's claim.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Longest backoff between two attempts, for the whole machine.
const BACKOFF_LIMIT: Duration = Duration::from_secs(60);

/// Longest `Retry-After` that is honoured; a moment further off than this is a clock that was turned.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);

/// At most one refresh in this time because of an upstream's 401.
pub(super) const FORCED_INTERVAL: Duration = Duration::from_secs(60);

/// How long a rejection waits for whoever may have redeemed the token to write what it got: Codex does so as soon as it has
/// the answer, which takes milliseconds, and all who need the token wait meanwhile.
const REJECTION_GRACE: Duration = Duration::from_secs(1);

/// First pause after a write that failed: longer than another writer keeps the place busy, and too short to be noticed.
const SAVE_PAUSE: Duration = Duration::from_millis(50);

/// How often the end of a refresh is tried to be written down: clients wait for it, and a store that fails for a quarter of a
/// second fails for longer.
const SETTLE_TRIES: u32 = 5;
