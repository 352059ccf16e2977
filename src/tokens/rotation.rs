//! Redeems a refresh token at most once per generation, whoever else wants it too: one state machine
//! over a store, for one process, many processes and many machines.
//!
//! `idle → claimed → posting → idle (one generation on) | unknown | dead`. Each arrow is a
//! compare-and-set. The one right before the request is the fence: a process that slept past its claim
//! fails there, before anything irreversible. The commit is bound to the generation and not to the
//! claim: whoever holds the successor may publish it.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::expiry::{Received, later, lifetime};
use crate::clock::Clock;
use crate::credential::{Login, TokenSet};
use crate::oauth::{Answer, Issuer, Reason, RefreshError};
use crate::secret::Fingerprint;
use crate::store::{Cas, Header, Phase, Record, RecordStore, StoreError, Version};

/// The rotation of one login, as one owner sees it. At most one [`Rotation::refresh`] runs at a time.
pub(super) struct Rotation {
    store: Arc<dyn RecordStore>,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    owner: String,
}

/// What a refresh is wanted for.
#[derive(Clone, Debug)]
pub(super) struct Want {
    /// Fingerprint of the access token that is to be replaced.
    pub(super) unwanted: Fingerprint,
    /// Whether that token can still be sent: neither expired nor refused.
    pub(super) good: bool,
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
    login: Login,
    access: Fingerprint,
    forced_at: Option<OffsetDateTime>,
    /// When this process received it.
    pub(super) received: Received,
    /// The issuer's clock less ours, where it told its time.
    pub(super) skew: Option<time::Duration>,
}

impl Rotation {
    /// The rotation of the login in that store, with a new random owner.
    pub(super) fn new(store: Arc<dyn RecordStore>, issuer: Arc<dyn Issuer>, clock: Clock) -> Self {
        let mut id = [0; 16];
        // An owner without a random id would share one with others: the fence still holds by version.
        if rand::fill(&mut id).is_err() {
            tracing::warn!("the system gives no random bytes");
        }
        let owner = Fingerprint::of(&id).to_hex()[..32].to_owned();
        Self { store, issuer, clock, owner }
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
            if !is_wanted(&record, want) {
                return Ok(Outcome::Found(Box::new(record)));
            }
            match self.next(&record.header, seen.unchanged_for(version), want) {
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

    /// What the phase allows. `unchanged` is how long the record has been seen as it is.
    fn next(&self, header: &Header, unchanged: Duration, want: &Want) -> Next {
        let own = header.owner == self.owner;
        match header.phase {
            Phase::Claimed if !own && unchanged < CLAIM_LEASE => Next::Wait,
            Phase::Posting if !own && unchanged < POSTING_LIMIT => Next::Wait,
            Phase::Posting => Next::CallUnknown,
            // Sending it again is the last resort: it may end the login, while the token is good.
            Phase::Unknown if want.good => Next::Stop(Outcome::Later(BACKOFF_LIMIT)),
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

    /// Claims the generation, fences, and redeems it. `None` when somebody else was first.
    async fn claim(
        &self,
        version: Version,
        mut record: Record,
        want: &Want,
    ) -> Result<Option<Outcome>, StoreError> {
        let Some(token) = chatgpt(&record).and_then(|set| set.refresh.clone()) else {
            return Ok(Some(Outcome::Found(Box::new(record))));
        };
        record.header = Header {
            phase: Phase::Claimed,
            owner: self.owner.clone(),
            epoch: record.header.epoch + 1,
            ..record.header
        };
        let Some(version) = self.step(version, &record, record.header.clone()).await? else {
            return Ok(None);
        };
        // The journal's note that this generation is about to be sent belongs here, before the fence.
        record.header.phase = Phase::Posting;
        if self.step(version, &record, record.header.clone()).await?.is_none() {
            return Ok(None);
        }
        match self.issuer.refresh(&token, want.reason).await {
            // The journal's sealed copy of the answer belongs here, before anybody sees it.
            Ok(answer) => {
                let successor = self.successor(record, answer, want.reason);
                Ok(Some(Outcome::Redeemed(Box::new(successor))))
            }
            Err(error) => Ok(Some(self.settle(record, &error).await)),
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

    fn successor(&self, parent: Record, answer: Answer, reason: Reason) -> Successor {
        let (at, now) = (self.clock.instant(), self.clock.now());
        let skew = answer.date.map(|date| date - now);
        let lifetime = lifetime(&answer, now);
        let access = answer.access.fingerprint();
        let old = chatgpt(&parent);
        let set = TokenSet {
            access: answer.access,
            refresh: answer.refresh.or_else(|| old?.refresh.clone()),
            id: answer.id.or_else(|| old?.id.clone()),
            account_id: old.and_then(|old| old.account_id.clone()),
            last_refresh: Some(now),
        };
        let forced = (reason == Reason::Unauthorized).then_some(now);
        Successor {
            login: Login::ChatGpt(set),
            access,
            forced_at: forced.or(parent.header.forced_at),
            received: Received { at, lifetime },
            skew,
            parent,
        }
    }

    /// Publishes a successor, however long that takes, and answers with what the store holds then:
    /// the successor, or what has superseded it.
    pub(super) async fn publish(&self, successor: &Successor) -> Record {
        let mut pause = SAVE_PAUSE;
        loop {
            match self.try_publish(successor).await {
                Ok(Some(record)) => return record,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "a new token set could not be saved, trying again");
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF_LIMIT);
                }
            }
        }
    }

    /// `None` when it must be tried again at once.
    async fn try_publish(&self, successor: &Successor) -> Result<Option<Record>, StoreError> {
        let (version, record) = self.store.get().await?;
        if access_of(&record) == Some(successor.access) {
            return Ok(Some(record));
        }
        if !is_same_generation(&record, &successor.parent) {
            tracing::info!("a new token set was superseded by another login");
            return Ok(Some(record));
        }
        let next = successor.record(&record.header);
        match self.store.cas(version, next.clone()).await? {
            Cas::Done(_) => Ok(Some(next)),
            Cas::Conflict | Cas::Unknown => Ok(None),
        }
    }

    /// Writes down how a request ended that brought no set.
    async fn settle(&self, record: Record, error: &RefreshError) -> Outcome {
        tracing::warn!(%error, "a refresh brought nothing");
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
    /// The record that publishes this over a header of the same generation.
    fn record(&self, over: &Header) -> Record {
        let header = Header {
            owner: over.owner.clone(),
            lifetime: self.received.lifetime,
            forced_at: self.forced_at,
            ..over.next_generation(&self.login)
        };
        Record { header, login: Some(self.login.clone()) }
    }

    /// The record as it will be, for use while it cannot be saved.
    pub(super) fn unsaved(&self) -> Record {
        self.record(&self.parent.header)
    }

    /// Whether a record holds this very set.
    pub(super) fn is_in(&self, record: &Record) -> bool {
        access_of(record) == Some(self.access)
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

/// The token set of a ChatGPT login.
pub(super) fn chatgpt(record: &Record) -> Option<&TokenSet> {
    match &record.login {
        Some(Login::ChatGpt(set)) => Some(set),
        _ => None,
    }
}

fn access_of(record: &Record) -> Option<Fingerprint> {
    chatgpt(record).map(|set| set.access.fingerprint())
}

/// Whether the record still holds the unwanted token and one to redeem for its successor.
fn is_wanted(record: &Record, want: &Want) -> bool {
    access_of(record) == Some(want.unwanted)
        && chatgpt(record).is_some_and(|set| set.refresh.is_some())
        && !matches!(record.header.phase, Phase::Dead(_))
}

fn is_same_generation(one: &Record, other: &Record) -> bool {
    let stamp = |header: &Header| (header.line, header.generation, header.refresh);
    stamp(&one.header) == stamp(&other.header)
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

/// A request takes 15 s at most; after twice that its outcome is unknown.
const POSTING_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait between two looks at somebody else's claim.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Longest backoff between two attempts, for the whole machine.
const BACKOFF_LIMIT: Duration = Duration::from_secs(60);

/// Longest `Retry-After` that is honoured; a moment further off than this is a clock that was turned.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);

/// At most one refresh in this time because of an upstream's 401.
pub(super) const FORCED_INTERVAL: Duration = Duration::from_secs(60);

/// How long a rejection waits for whoever may have redeemed the token to write what it got.
const REJECTION_GRACE: Duration = Duration::from_secs(1);

/// First pause after a write that failed.
const SAVE_PAUSE: Duration = Duration::from_millis(50);

/// How often the end of a refresh is tried to be written down.
const SETTLE_TRIES: u32 = 5;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::FutureExt as _;
    use futures_util::future::BoxFuture;
    use proptest::prelude::*;

    use super::super::fake::{StrictIssuer, Stumble, Stumbling, Turn, login};
    use super::*;
    use crate::secret::Secret;
    use crate::store::{Durability, put_login};
    use crate::tasks::Tasks;

    struct World {
        clock: Clock,
        store: Arc<Stumbling>,
        issuer: Arc<StrictIssuer>,
    }

    impl World {
        fn new() -> Self {
            let clock = Clock::system();
            let store = Stumbling::new(Some(login(&clock, 300)));
            Self { clock, store, issuer: StrictIssuer::new() }
        }

        fn rotation(&self) -> Rotation {
            Rotation::new(self.store.clone(), self.issuer.clone(), self.clock.clone())
        }

        async fn want(&self, good: bool) -> Want {
            let unwanted = access_of(&self.store.record().await).unwrap();
            Want { unwanted, good, reason: Reason::Proactive }
        }

        async fn header(&self) -> Header {
            self.store.record().await.header
        }

        /// The header as some other owner might have left it.
        async fn leave(&self, phase: Phase) {
            let (version, record) = self.store.inner.get().await.unwrap();
            let header = Header { phase, owner: "other".into(), epoch: 7, ..record.header };
            self.store.inner.cas(version, Record { header, ..record }).await.unwrap();
        }
    }

    /// An outcome in a word, published if there is something to publish.
    async fn ended(rotation: &Rotation, want: &Want) -> String {
        match rotation.refresh(want).await.unwrap() {
            Outcome::Found(record) => match &record.header.phase {
                Phase::Dead(code) => format!("dead {code}"),
                _ => "found".to_owned(),
            },
            Outcome::Redeemed(successor) => {
                let record = rotation.publish(&successor).await;
                if successor.is_in(&record) { "redeemed" } else { "superseded" }.to_owned()
            }
            Outcome::Later(_) => "later".to_owned(),
            Outcome::TooSoon => "too soon".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refresh_moves_one_generation_on() {
        let world = World::new();
        let want = world.want(true).await;
        assert_eq!(ended(&world.rotation(), &want).await, "redeemed");
        let record = world.store.record().await;
        let header = &record.header;
        assert_eq!((header.line, header.generation, &header.phase), (1, 2, &Phase::Idle));
        assert_eq!(header.previous, Some(Secret::new("r0").fingerprint()));
        assert_eq!(header.refresh, Some(Secret::new("r1").fingerprint()));
        assert_eq!(header.lifetime, Some(Duration::from_secs(3600)));
        let set = chatgpt(&record).unwrap();
        assert_eq!(set.account_id.as_deref(), Some("account-1"));
        assert!(world.clock.now() - set.last_refresh.unwrap() < time::Duration::minutes(1));
        // Who wants the same again finds it.
        assert_eq!(ended(&world.rotation(), &want).await, "found");
        assert_eq!(world.issuer.posts(), ["r0"]);
    }

    #[tokio::test(start_paused = true)]
    async fn every_failure_leaves_its_phase() {
        let text = || "x".to_owned();
        let limited =
            |seconds| RefreshError::Limited { retry_after: Some(Duration::from_secs(seconds)) };
        let rejected = RefreshError::Rejected { code: "invalid_grant".to_owned() };
        let dead = Phase::Dead("invalid_grant".to_owned());
        // The error, how the refresh ends, its phase, the longest wait, and the next try once that
        // is over while the token is good.
        let table = [
            (RefreshError::NotSent(text()), "later", Phase::Idle, 1, "redeemed"),
            (RefreshError::Limited { retry_after: None }, "later", Phase::Idle, 1, "redeemed"),
            (limited(30), "later", Phase::Idle, 30, "redeemed"),
            (limited(u64::MAX), "later", Phase::Idle, 600, "redeemed"),
            (RefreshError::Unknown(text()), "later", Phase::Unknown, 1, "later"),
            (rejected, "dead invalid_grant", dead, 1, "dead invalid_grant"),
        ];
        for (error, end, phase, longest, next) in table {
            let world = World::new();
            let (rotation, want) = (world.rotation(), world.want(true).await);
            world.issuer.will(Turn::Fail(error.clone()));
            assert_eq!(ended(&rotation, &want).await, end, "{error}");
            let header = world.header().await;
            assert_eq!((&header.phase, header.attempts), (&phase, 1), "{error}");
            let wait = header.retry_at.unwrap() - world.clock.now();
            assert!(wait <= time::Duration::seconds(longest), "{error}: {wait}");
            assert!(wait >= time::Duration::seconds(longest) * 0.7, "{error}: {wait}");
            // Neither we nor another process try before that.
            if end == "later" {
                assert_eq!(ended(&rotation, &want).await, "later", "{error}");
                assert_eq!(ended(&world.rotation(), &want).await, "later", "{error}");
            }
            assert_eq!(world.issuer.posts().len(), 1, "{error}");
            world.clock.advance(time::Duration::seconds(longest + 1));
            assert_eq!(ended(&world.rotation(), &want).await, next, "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn backs_off_from_one_second_to_a_minute_for_the_whole_machine() {
        let world = World::new();
        let want = world.want(true).await;
        for step in [1, 2, 4, 8, 16, 32, 60, 60] {
            world.issuer.will(Turn::Fail(RefreshError::NotSent("x".to_owned())));
            assert_eq!(ended(&world.rotation(), &want).await, "later");
            let wait = world.header().await.retry_at.unwrap() - world.clock.now();
            let step = time::Duration::seconds(step);
            assert!(wait <= step && wait > step * 0.7, "{wait} is not about {step}");
            world.clock.advance(step);
        }
        assert_eq!(world.issuer.posts().len(), 8);
        // A moment that no backoff can have set: somebody has turned the clock back.
        world.issuer.will(Turn::Fail(RefreshError::NotSent("x".to_owned())));
        assert_eq!(ended(&world.rotation(), &want).await, "later");
        world.clock.advance(-time::Duration::hours(1));
        assert_eq!(ended(&world.rotation(), &want).await, "redeemed");
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_a_claim_and_takes_over_one_that_is_abandoned() {
        // What was left, whether the token is good, how it ends, after how many seconds, posts.
        let table = [
            (Phase::Claimed, true, "redeemed", 20, 1),
            (Phase::Posting, true, "later", 30, 0),
            (Phase::Posting, false, "redeemed", 30, 1),
            (Phase::Unknown, true, "later", 0, 0),
            (Phase::Unknown, false, "redeemed", 0, 1),
        ];
        for (phase, good, end, seconds, posts) in table {
            let world = World::new();
            let want = world.want(good).await;
            world.leave(phase.clone()).await;
            let started = Instant::now();
            let case = format!("{phase:?} {good}");
            assert_eq!(ended(&world.rotation(), &want).await, end, "{case}");
            let took = started.elapsed().as_secs_f64();
            let seconds = f64::from(seconds);
            assert!((seconds..seconds + 0.6).contains(&took), "{case} took {took}");
            assert_eq!(world.issuer.posts().len(), posts, "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_slept_past_its_claim_fails_at_the_fence() {
        let world = World::new();
        let want = world.want(true).await;
        let slow = Delayed::new(world.store.clone(), [0, 0, 45_000].into());
        let sleeper = Rotation::new(Arc::new(slow), world.issuer.clone(), world.clock.clone());
        let other = world.rotation();
        let (slept, woke) = tokio::join!(ended(&sleeper, &want), async {
            sleep(Duration::from_secs(1)).await;
            ended(&other, &want).await
        });
        assert_eq!((slept.as_str(), woke.as_str()), ("found", "redeemed"));
        assert_eq!(world.issuer.posts(), ["r0"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_is_published_whatever_became_of_the_claim() {
        for phase in [Phase::Unknown, Phase::Claimed, Phase::Posting, Phase::Dead("x".into())] {
            let world = World::new();
            let (rotation, want) = (world.rotation(), world.want(true).await);
            let Outcome::Redeemed(successor) = rotation.refresh(&want).await.unwrap() else {
                panic!("nothing stands in the way")
            };
            world.leave(phase).await;
            world.store.script.lock().unwrap().extend([
                Stumble::Error,
                Stumble::UnknownLost,
                Stumble::Error,
                Stumble::UnknownDone,
            ]);
            assert!(successor.is_in(&rotation.publish(&successor).await));
            let header = world.header().await;
            assert_eq!((header.generation, header.phase), (2, Phase::Idle));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_never_goes_over_another_login() {
        let others = [None, Some(Login::ApiKey(Secret::new("k")))];
        for other in others {
            let world = World::new();
            let (rotation, want) = (world.rotation(), world.want(true).await);
            let Outcome::Redeemed(successor) = rotation.refresh(&want).await.unwrap() else {
                panic!("nothing stands in the way")
            };
            put_login(&*world.store, other.clone()).await.unwrap();
            assert!(!successor.is_in(&rotation.publish(&successor).await));
            let record = world.store.record().await;
            assert_eq!(record.header.line, 2);
            assert!(chatgpt(&record).is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_uncertain_write_is_looked_after() {
        use Stumble::{No, UnknownDone, UnknownLost};
        for script in [[UnknownDone, No], [UnknownLost, No], [No, UnknownDone], [No, UnknownLost]] {
            let world = World::new();
            let want = world.want(true).await;
            world.store.script.lock().unwrap().extend(script);
            assert_eq!(ended(&world.rotation(), &want).await, "redeemed", "{script:?}");
            assert_eq!(world.issuer.posts(), ["r0"], "{script:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn sends_nothing_that_it_could_not_mark() {
        for script in [vec![Stumble::Error], vec![Stumble::No, Stumble::Error]] {
            let world = World::new();
            let want = world.want(true).await;
            world.store.script.lock().unwrap().extend(script);
            assert!(world.rotation().refresh(&want).await.is_err());
            assert!(world.issuer.posts().is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_gives_way_to_whoever_was_faster() {
        let world = World::new();
        let want = world.want(true).await;
        // Codex has redeemed the token without a claim, and writes what it got a little later.
        let (access, refresh) = world.issuer.redeem_elsewhere();
        let write = async {
            sleep(Duration::from_millis(600)).await;
            let (version, record) = world.store.inner.get().await.unwrap();
            let mut set = chatgpt(&record).unwrap().clone();
            (set.access, set.refresh) = (Secret::new(access), Some(Secret::new(refresh)));
            let login = Login::ChatGpt(set);
            let header = record.header.next_generation(&login);
            let next = Record { header, login: Some(login) };
            assert!(matches!(world.store.inner.cas(version, next).await, Ok(Cas::Done(_))));
        };
        let rotation = world.rotation();
        let (end, ()) = tokio::join!(ended(&rotation, &want), write);
        assert_eq!(end, "found");
        assert_eq!(world.header().await.phase, Phase::Idle);
    }

    #[tokio::test(start_paused = true)]
    async fn one_refresh_a_minute_because_of_401s() {
        let world = World::new();
        let forced = async || {
            let want = Want { reason: Reason::Unauthorized, good: false, ..world.want(true).await };
            ended(&world.rotation(), &want).await
        };
        assert_eq!(forced().await, "redeemed");
        assert_eq!(forced().await, "too soon");
        assert_eq!(ended(&world.rotation(), &world.want(true).await).await, "redeemed");
        assert_eq!(forced().await, "too soon");
        world.clock.advance(time::Duration::seconds(61));
        assert_eq!(forced().await, "redeemed");
        assert_eq!(world.issuer.posts(), ["r0", "r1", "r2"]);
    }

    /// A store whose calls take their time: each waits for the next delay, in milliseconds, once
    /// before it is done and once after.
    struct Delayed {
        inner: Arc<Stumbling>,
        delays: Mutex<std::collections::VecDeque<u64>>,
    }

    impl Delayed {
        fn new(inner: Arc<Stumbling>, delays: std::collections::VecDeque<u64>) -> Self {
            Self { inner, delays: Mutex::new(delays) }
        }

        async fn pause(&self) {
            let delay = self.delays.lock().unwrap().pop_front().unwrap_or(0);
            sleep(Duration::from_millis(delay)).await;
        }
    }

    impl RecordStore for Delayed {
        fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
            async {
                let got = self.inner.get().await;
                self.pause().await;
                got
            }
            .boxed()
        }

        fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
            async move {
                self.pause().await;
                let done = self.inner.cas(expected, record).await;
                self.pause().await;
                done
            }
            .boxed()
        }

        fn changes(&self) -> watch::Receiver<u64> {
            self.inner.changes()
        }

        fn durability(&self) -> BoxFuture<'_, Result<Durability, StoreError>> {
            self.inner.durability()
        }
    }

    /// An issuer that answers after so many milliseconds, or fails so.
    struct Slow {
        inner: Arc<StrictIssuer>,
        delay: u64,
    }

    impl Issuer for Slow {
        fn refresh<'a>(
            &'a self,
            token: &'a Secret,
            reason: Reason,
        ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
            async move {
                sleep(Duration::from_millis(self.delay / 2)).await;
                let answer = self.inner.refresh(token, reason).await;
                sleep(Duration::from_millis(self.delay / 2)).await;
                answer
            }
            .boxed()
        }
    }

    /// A process of the interleaving test.
    #[derive(Clone, Debug)]
    struct Process {
        start_ms: u64,
        post_ms: u64,
        store_ms: Vec<u64>,
        /// When it is killed.
        killed_ms: Option<u64>,
    }

    fn process() -> impl Strategy<Value = Process> {
        let store = prop::collection::vec(prop_oneof![3 => 0..50_u64, 1 => 0..70_000_u64], 0..12);
        let killed = prop::option::of(0..60_000_u64);
        (0..40_000_u64, 0..15_000_u64, store, killed).prop_map(
            |(start_ms, post_ms, store_ms, killed_ms)| Process {
                start_ms,
                post_ms,
                store_ms,
                killed_ms,
            },
        )
    }

    fn turn() -> impl Strategy<Value = Option<Turn>> {
        prop_oneof![
            3 => Just(None),
            1 => Just(Some(Turn::Lose)),
            1 => Just(Some(Turn::Fail(RefreshError::NotSent("x".to_owned())))),
            1 => Just(Some(Turn::Fail(RefreshError::Limited { retry_after: None }))),
            1 => Just(Some(Turn::Fail(RefreshError::Unknown("502".to_owned())))),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// However processes interleave, sleep and die: while the access token is good, no refresh
        /// token arrives twice unless its first arrival provably changed nothing.
        #[test]
        fn no_generation_is_redeemed_twice(
            processes in prop::collection::vec(process(), 1..6),
            turns in prop::collection::vec(turn(), 0..4),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let counted = runtime.block_on(interleave(processes, turns));
            prop_assert!(!counted.revoked, "a token came twice: {:?}", counted.posts);
            prop_assert!(counted.risky <= 1, "{:?}", counted.posts);
        }
    }

    struct Counted {
        posts: Vec<String>,
        /// How often the first token arrived and may have been redeemed.
        risky: usize,
        revoked: bool,
    }

    async fn interleave(processes: Vec<Process>, turns: Vec<Option<Turn>>) -> Counted {
        let world = World::new();
        // A first token whose arrivals fail harmlessly may come again; the script is played in order.
        let harmless = turns.iter().take_while(|turn| is_harmless(turn)).count();
        let limit = turns.len().min(harmless);
        for turn in turns.into_iter().take(limit + 1).flatten() {
            world.issuer.will(turn);
        }
        let tasks = Tasks::new();
        let want = world.want(true).await;
        let running: Vec<_> = processes
            .into_iter()
            .map(|process| {
                let store = Delayed::new(world.store.clone(), process.store_ms.into());
                let issuer = Slow { inner: world.issuer.clone(), delay: process.post_ms };
                let rotation =
                    Rotation::new(Arc::new(store), Arc::new(issuer), world.clock.clone());
                let want = want.clone();
                let life = Duration::from_millis(process.killed_ms.unwrap_or(3_600_000));
                tasks.spawn(async move {
                    sleep(Duration::from_millis(process.start_ms)).await;
                    let live = async {
                        for _ in 0..3 {
                            drop(ended(&rotation, &want).await);
                            sleep(Duration::from_secs(90)).await;
                        }
                    };
                    drop(timeout(life, live).await);
                })
            })
            .collect();
        for task in running {
            task.await.unwrap();
        }
        let posts = world.issuer.posts();
        let first = posts.iter().filter(|post| *post == "r0").count();
        let revoked = world.issuer.is_revoked();
        Counted { risky: first.saturating_sub(limit), posts, revoked }
    }

    fn is_harmless(turn: &Option<Turn>) -> bool {
        use RefreshError::{Limited, NotSent};
        matches!(turn, Some(Turn::Fail(NotSent(_) | Limited { .. })))
    }
}
