//! The promises of a rotation: every phase, every failure, and processes that interleave.

mod model;

use std::sync::Mutex;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use proptest::prelude::*;

use super::super::fake::{Drawer, StrictIssuer, Stumble, Stumbling, Turn, login};
use super::*;
use crate::credential::Account;
use crate::secret::Secret;
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

    fn drawer(&self) -> &Drawer {
        &self.store.drawer
    }

    async fn want(&self, good: bool) -> Want {
        let unwanted = access_of(&self.store.record().await).unwrap();
        Want { unwanted: Some(unwanted), good, alive: good, reason: Reason::Proactive }
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
    let Ok(outcome) = rotation.refresh(want).await else { return "store".to_owned() };
    match outcome {
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
    let set = tokens_of(&record).unwrap();
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
        (RefreshError::NotSent(text().into()), "later", Phase::Idle, 1, "redeemed"),
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
        world.issuer.will(Turn::Fail(RefreshError::NotSent("x".into())));
        assert_eq!(ended(&world.rotation(), &want).await, "later");
        let wait = world.header().await.retry_at.unwrap() - world.clock.now();
        let step = time::Duration::seconds(step);
        assert!(wait <= step && wait > step * 0.7, "{wait} is not about {step}");
        world.clock.advance(step);
    }
    assert_eq!(world.issuer.posts().len(), 8);
    // A moment that no backoff can have set: somebody has turned the clock back.
    world.issuer.will(Turn::Fail(RefreshError::NotSent("x".into())));
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
        world.store.put(other.clone(), None).await.unwrap();
        assert!(!successor.is_in(&rotation.publish(&successor).await));
        let record = world.store.record().await;
        assert_eq!(record.header.line, 2);
        assert!(tokens_of(&record).is_none());
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
        let mut set = tokens_of(&record).unwrap().clone();
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

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_written_down_is_published_by_whoever_looks() {
    for phase in [Phase::Posting, Phase::Unknown, Phase::Claimed, Phase::Idle] {
        let world = World::new();
        let want = world.want(true).await;
        // Its owner dies between the journal and the commit.
        drop(world.rotation().refresh(&want).await);
        assert_eq!(world.drawer().count(), 1);
        world.leave(phase.clone()).await;
        let started = Instant::now();
        assert_eq!(ended(&world.rotation(), &want).await, "redeemed", "{phase:?}");
        assert!(started.elapsed().is_zero(), "{phase:?}: nobody is waited for");
        let record = world.store.record().await;
        let header = &record.header;
        assert_eq!((header.generation, &header.phase), (2, &Phase::Idle), "{phase:?}");
        assert_eq!(tokens_of(&record).unwrap().access.expose(), "a1", "{phase:?}");
        assert_eq!(header.lifetime, Some(Duration::from_secs(3600)), "{phase:?}");
        assert_eq!(world.drawer().count(), 0, "{phase:?}: a journal is left over");
        assert_eq!(world.issuer.posts(), ["r0"], "{phase:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_saves_what_was_left_and_leaves_no_journal() {
    let world = World::new();
    let want = world.want(true).await;
    // One has died before it sent anything, another with an answer.
    drop(world.store.reserve(Stamp::of(&world.store.record().await)).await);
    drop(world.rotation().refresh(&want).await);
    assert_eq!(world.drawer().count(), 2);
    for _ in 0..2 {
        world.rotation().recover().await.unwrap();
        assert_eq!((world.header().await.generation, world.drawer().count()), (2, 0));
    }
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_a_journal_goes_over_no_other_login() {
    let world = World::new();
    let want = world.want(true).await;
    drop(world.rotation().refresh(&want).await);
    world.store.put(Some(Login::ApiKey(Secret::new("k"))), None).await.unwrap();
    let before = world.header().await;
    world.rotation().recover().await.unwrap();
    assert_eq!(world.header().await, before);
    assert_eq!(ended(&world.rotation(), &want).await, "found");
    assert!(tokens_of(&world.store.record().await).is_none());
    assert_eq!(world.drawer().count(), 0, "what is superseded is removed");
}

#[tokio::test(start_paused = true)]
async fn of_an_owner_that_died_is_known_at_once_what_it_has_done() {
    // What was left, whether the token is good, how it ends, posts.
    let table = [
        (Phase::Claimed, true, "redeemed", 1),
        (Phase::Posting, true, "later", 0),
        (Phase::Posting, false, "redeemed", 1),
    ];
    for (phase, good, end, posts) in table {
        let world = World::new();
        let want = world.want(good).await;
        world.leave(phase.clone()).await;
        let journal = world.store.reserve(Stamp::of(&world.store.record().await)).await.unwrap();
        drop(journal);
        let started = Instant::now();
        let case = format!("{phase:?} {good}");
        assert_eq!(ended(&world.rotation(), &want).await, end, "{case}");
        assert!(started.elapsed().is_zero(), "{case}");
        assert_eq!(world.issuer.posts().len(), posts, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn sends_nothing_without_a_journal() {
    for (before, good) in [(Phase::Idle, true), (Phase::Unknown, false)] {
        let world = World::new();
        let want = world.want(good).await;
        world.leave(before.clone()).await;
        world.drawer().full.store(1, Ordering::Relaxed);
        assert_eq!(ended(&world.rotation(), &want).await, "store");
        assert!(world.issuer.posts().is_empty());
        // Nobody has to wait for the claim, and nobody forgets what is known of the token.
        assert_eq!(world.header().await.phase, before);
        assert_eq!(ended(&world.rotation(), &want).await, "redeemed");
        assert_eq!(world.drawer().count(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn every_end_of_a_request_removes_its_journal() {
    let text = || "x".to_owned();
    let ends = [
        Some(RefreshError::NotSent(text().into())),
        Some(RefreshError::Unknown(text())),
        Some(RefreshError::Rejected { code: text() }),
        None,
    ];
    for end in ends {
        let world = World::new();
        let want = world.want(true).await;
        if let Some(error) = &end {
            world.issuer.will(Turn::Fail(error.clone()));
        }
        ended(&world.rotation(), &want).await;
        assert_eq!(world.issuer.posts().len(), 1);
        assert_eq!(world.drawer().count(), 0, "{end:?}");
    }
    // One that fails at the fence, too.
    let world = World::new();
    let want = world.want(true).await;
    world.store.script.lock().unwrap().extend([Stumble::No, Stumble::Error]);
    assert_eq!(ended(&world.rotation(), &want).await, "store");
    assert_eq!(world.drawer().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_written_down_is_written_down_while_it_cannot_be_saved() {
    let world = World::new();
    let (rotation, want) = (world.rotation(), world.want(true).await);
    world.drawer().broken.store(1, Ordering::Relaxed);
    let Outcome::Redeemed(successor) = rotation.refresh(&want).await.unwrap() else {
        panic!("nothing stands in the way")
    };
    world.store.script.lock().unwrap().extend([Stumble::Error, Stumble::Error]);
    // It dies while it waits to try again.
    let publishing = rotation.publish(&successor);
    assert!(timeout(Duration::from_millis(10), publishing).await.is_err());
    drop(successor);
    assert_eq!(ended(&world.rotation(), &want).await, "redeemed");
    assert_eq!(world.issuer.posts(), ["r0"]);
}

/// An issuer that hands out the access token that it has handed out before, as long as that lives.
struct Thrifty(Arc<StrictIssuer>);

impl Issuer for Thrifty {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        self.0.can_renew(old)
    }

    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        self.0.identify(token)
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        reason: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        async move {
            let answer = self.0.renew(old, reason, leave).await?;
            Ok(Answer { access: old.unwrap().access.clone(), ..answer })
        }
        .boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_refresh_token_is_saved_though_the_access_token_is_the_old_one() {
    let world = World::new();
    let want = world.want(true).await;
    let issuer = Arc::new(Thrifty(world.issuer.clone()));
    let rotation = Rotation::new(world.store.clone(), issuer.clone(), world.clock.clone());
    let Outcome::Redeemed(successor) = rotation.refresh(&want).await.unwrap() else {
        panic!("nothing stands in the way")
    };
    rotation.publish(&successor).await;
    drop(successor);
    let header = world.header().await;
    assert_eq!((header.generation, &header.phase), (2, &Phase::Idle));
    assert_eq!(header.refresh, Some(Secret::new("r1").fingerprint()));
    assert_eq!(world.drawer().count(), 0);
    // Whoever finds it in a journal saves it too.
    world.clock.advance(time::Duration::seconds(1));
    let Outcome::Redeemed(successor) = rotation.refresh(&world.want(true).await).await.unwrap()
    else {
        panic!("nothing stands in the way")
    };
    drop(successor);
    let other = Rotation::new(world.store.clone(), issuer, world.clock.clone());
    other.recover().await.unwrap();
    let header = world.header().await;
    assert_eq!(header.refresh, Some(Secret::new("r2").fingerprint()));
    other.recover().await.unwrap();
    assert_eq!(world.header().await, header);
    assert_eq!(world.issuer.posts(), ["r0", "r1"]);
}

#[tokio::test(start_paused = true)]
async fn an_access_token_that_is_not_renewed_is_asked_for_ever_more_seldom() {
    let world = World::new();
    let issuer = Arc::new(Thrifty(world.issuer.clone()));
    let rotation = Rotation::new(world.store.clone(), issuer, world.clock.clone());
    for step in [1, 2, 4, 8] {
        let want = world.want(true).await;
        assert_eq!(ended(&rotation, &want).await, "redeemed");
        assert_eq!(ended(&rotation, &want).await, "later");
        assert_eq!(world.header().await.phase, Phase::Idle);
        world.clock.advance(time::Duration::seconds(step));
    }
    assert_eq!(world.issuer.posts().len(), 4);
    assert_eq!(ended(&world.rotation(), &world.want(true).await).await, "redeemed");
    assert_eq!((world.header().await.attempts, world.header().await.retry_at), (0, None));
}

/// A process that stands still for so long before it sends, or between that and the answer.
struct Still {
    inner: Arc<StrictIssuer>,
    before: Duration,
    after: Duration,
}

impl Issuer for Still {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        self.inner.can_renew(old)
    }

    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        self.inner.identify(token)
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        reason: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        async move {
            tokio::time::advance(self.before).await;
            let answer = self.inner.renew(old, reason, leave).await;
            tokio::time::advance(self.after).await;
            answer
        }
        .boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn after_standing_still_nothing_is_sent_and_an_answer_is_heard() {
    let (no, long) = (Duration::ZERO, Duration::from_secs(3600));
    // How long before and after sending, how it ends, which phase it leaves, requests.
    let table = [
        (no, no, "redeemed", Phase::Idle, 1),
        (Duration::from_secs(29), no, "redeemed", Phase::Idle, 1),
        (no, long, "redeemed", Phase::Idle, 1),
        (Duration::from_secs(30), no, "later", Phase::Idle, 0),
        (long, no, "later", Phase::Idle, 0),
    ];
    for (before, after, end, phase, posts) in table {
        let world = World::new();
        let issuer = Still { inner: world.issuer.clone(), before, after };
        let rotation = Rotation::new(world.store.clone(), Arc::new(issuer), world.clock.clone());
        let case = format!("{before:?} {after:?}");
        assert_eq!(ended(&rotation, &world.want(true).await).await, end, "{case}");
        assert_eq!(
            (world.header().await.phase, world.issuer.posts().len()),
            (phase, posts),
            "{case}"
        );
    }
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

    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        async move {
            self.pause().await;
            let reserved = self.inner.reserve(stamp).await;
            self.pause().await;
            reserved
        }
        .boxed()
    }

    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        self.inner.look_back(stamp)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

/// An issuer that answers after so many milliseconds, or fails so.
struct Slow {
    inner: Arc<StrictIssuer>,
    delay: u64,
}

impl Issuer for Slow {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        self.inner.can_renew(old)
    }

    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        self.inner.identify(token)
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        reason: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        async move {
            sleep(Duration::from_millis(self.delay / 2)).await;
            let answer = self.inner.renew(old, reason, leave).await;
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
        1 => Just(Some(Turn::Fail(RefreshError::NotSent("x".into())))),
        1 => Just(Some(Turn::Fail(RefreshError::Limited { retry_after: None }))),
        1 => Just(Some(Turn::Fail(RefreshError::Unknown("502".to_owned())))),
    ]
}

fn stumble() -> impl Strategy<Value = Stumble> {
    prop_oneof![
        4 => Just(Stumble::No),
        1 => Just(Stumble::UnknownDone),
        1 => Just(Stumble::UnknownLost),
        1 => Just(Stumble::Error),
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
        stumbles in prop::collection::vec(stumble(), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let counted = runtime.block_on(interleave(processes, turns, stumbles));
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

async fn interleave(
    processes: Vec<Process>,
    turns: Vec<Option<Turn>>,
    stumbles: Vec<Stumble>,
) -> Counted {
    let world = World::new();
    world.store.script.lock().unwrap().extend(stumbles);
    // A first token whose arrivals fail harmlessly may come again; the script is played in order.
    let harmless = turns.iter().take_while(|turn| is_harmless(turn)).count();
    for turn in turns.into_iter().take(harmless + 1).flatten() {
        world.issuer.will(turn);
    }
    let tasks = Tasks::new();
    let want = world.want(true).await;
    let running: Vec<_> = processes
        .into_iter()
        .map(|process| {
            let store = Delayed::new(world.store.clone(), process.store_ms.into());
            let issuer = Slow { inner: world.issuer.clone(), delay: process.post_ms };
            let rotation = Rotation::new(Arc::new(store), Arc::new(issuer), world.clock.clone());
            let (want, clock) = (want.clone(), world.clock.clone());
            let life = Duration::from_millis(process.killed_ms.unwrap_or(3_600_000));
            tasks.spawn(async move {
                sleep(Duration::from_millis(process.start_ms)).await;
                let live = async {
                    for _ in 0..3 {
                        drop(ended(&rotation, &want).await);
                        sleep(Duration::from_secs(90)).await;
                        clock.advance(time::Duration::seconds(90));
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
    Counted { risky: first.saturating_sub(harmless), posts, revoked }
}

fn is_harmless(turn: &Option<Turn>) -> bool {
    use RefreshError::{Limited, NotSent};
    matches!(turn, Some(Turn::Fail(NotSent(_) | Limited { .. })))
}
