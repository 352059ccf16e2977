//! The state machine as a model: owners over one store, with a fault at any await, and an issuer that takes a refresh
//! token once.
//!
//! An owner that dies is dropped where it waits; what it has begun in the store is done or not, as the fault says.

use std::collections::{HashSet, VecDeque};
use std::sync::Mutex;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::super::super::fake::{Stumbling, login};
use super::super::*;
use super::ended;
use crate::credential::Account;
use crate::secret::Secret;

/// What happens at one await.
#[derive(Clone, Copy, Debug)]
enum Fault {
    No,
    /// It takes so many milliseconds.
    Slow(u64),
    /// It fails, and nothing is done. After the act it is too late for that, and nothing happens.
    Error,
    /// Whoever asks does not learn how it ended. Where that cannot be, it fails.
    Unsure,
    /// The owner dies.
    Die,
}

/// What the issuer does with a request.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Answer,
    /// The request never reaches it.
    NotSent,
    /// It reads no token: too many requests.
    Limited,
    /// A gateway in front of it fails.
    Gateway,
    /// It redeems the token, and the answer is lost.
    Lose,
}

/// An owner: when it starts, what happens to it, and how long it is away after it has died.
#[derive(Clone, Debug)]
struct Owner {
    start_ms: u64,
    faults: Vec<Fault>,
    away_ms: u64,
    reason: Reason,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        20 => Just(Fault::No),
        4 => (0..200_u64).prop_map(Fault::Slow),
        1 => (0..70_000_u64).prop_map(Fault::Slow),
        2 => Just(Fault::Error),
        2 => Just(Fault::Unsure),
        2 => Just(Fault::Die),
    ]
}

fn owner() -> impl Strategy<Value = Owner> {
    let faults = prop::collection::vec(fault(), 0..80);
    let reason = prop_oneof![3 => Just(Reason::Proactive), 1 => Just(Reason::Unauthorized)];
    (0..40_000_u64, faults, 0..90_000_u64, reason)
        .prop_map(|(start_ms, faults, away_ms, reason)| Owner { start_ms, faults, away_ms, reason })
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        6 => Just(Turn::Answer),
        2 => Just(Turn::NotSent),
        1 => Just(Turn::Limited),
        1 => Just(Turn::Gateway),
        1 => Just(Turn::Lose),
    ]
}

/// `PROPTEST_CASES` may ask for more.
fn rounds() -> ProptestConfig {
    let told = ProptestConfig::default();
    ProptestConfig { cases: told.cases.max(400), ..told }
}

proptest! {
    #![proptest_config(rounds())]

    #[test]
    fn no_fault_at_any_await_costs_a_login_or_sends_a_token_twice(
        owners in prop::collection::vec(owner(), 1..5),
        turns in prop::collection::vec(turn(), 0..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let world = runtime.block_on(live(owners, turns));
        world.judge()?;
    }
}

/// What all owners share, and what was seen.
struct World {
    clock: Clock,
    store: Arc<Stumbling>,
    turns: Mutex<VecDeque<Turn>>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Which refresh token is good, by number.
    current: usize,
    /// Tokens that came and may have been redeemed.
    risked: Vec<usize>,
    /// Whether the access token has expired.
    is_over: bool,
    /// Tokens that came a second time before that.
    twice: Vec<usize>,
    /// Whether a request came whose journal was not there.
    unjournaled: bool,
    /// Successors that reached a journal or the record.
    safe: HashSet<Fingerprint>,
    /// Whether an order of headers went back.
    went_back: bool,
    /// How the last owner ended, on whom nothing falls.
    last: String,
}

impl World {
    fn judge(&self) -> Result<(), TestCaseError> {
        let seen = self.seen.lock().unwrap();
        prop_assert!(seen.twice.is_empty(), "sent twice: {:?}", seen.twice);
        prop_assert!(!seen.unjournaled, "a request was sent without a journal");
        prop_assert!(!seen.went_back, "a header went back");
        let is_first = seen.current == 0;
        let is_safe = is_first || seen.safe.contains(&token(seen.current).fingerprint());
        // The window that nobody can close: redeemed, and the answer nowhere.
        let is_signed_in = matches!(seen.last.as_str(), "redeemed" | "found");
        prop_assert!(is_signed_in || !is_safe, "lost at {}: {}", seen.current, seen.last);
        Ok(())
    }

    fn rotation(self: &Arc<Self>, life: &Arc<Life>) -> Rotation {
        let store = Shaky { world: Arc::clone(self), life: Arc::clone(life) };
        let issuer = Strict { world: Arc::clone(self), life: Arc::clone(life) };
        Rotation::new(Arc::new(store), Arc::new(issuer), self.clock.clone())
    }

    /// What is wanted of whatever is there now.
    async fn want(&self, alive: bool, reason: Reason) -> Want {
        let unwanted = access_of(&self.store.record().await);
        let good = alive && reason == Reason::Proactive;
        Want { unwanted, good, alive, reason }
    }
}

fn token(number: usize) -> Secret {
    Secret::new(format!("r{number}"))
}

async fn live(owners: Vec<Owner>, turns: Vec<Turn>) -> Arc<World> {
    let clock = Clock::system();
    let store = Stumbling::new(Some(login(&clock, 300)));
    let turns = Mutex::new(turns.into());
    let world = Arc::new(World { clock, store, turns, seen: Mutex::default() });
    let lives = owners.into_iter().map(|owner| live_as(&world, owner));
    futures_util::future::join_all(lives).await;
    // The access token expires, and one owner comes on whom nothing falls.
    world.turns.lock().unwrap().clear();
    world.clock.advance(time::Duration::hours(1));
    world.seen.lock().unwrap().is_over = true;
    let rotation = world.rotation(&Arc::new(Life::default()));
    rotation.recover().await.unwrap();
    let want = world.want(false, Reason::Proactive).await;
    let last = ended(&rotation, &want).await;
    world.seen.lock().unwrap().last = last;
    world
}

/// An owner that comes back each time it has died, until nothing falls on it any more and a last round is over.
async fn live_as(world: &Arc<World>, owner: Owner) {
    sleep(Duration::from_millis(owner.start_ms)).await;
    let mut faults: VecDeque<_> = owner.faults.into();
    for _ in 0..40 {
        let life = Arc::new(Life { faults: Mutex::new(faults), death: CancellationToken::new() });
        let rotation = world.rotation(&life);
        let rounds = async {
            drop(rotation.recover().await);
            while !life.is_over() {
                let want = world.want(true, owner.reason).await;
                ended(&rotation, &want).await;
                sleep(Duration::from_secs(20)).await;
                world.clock.advance(time::Duration::seconds(20));
            }
        };
        let died = tokio::select! {
            () = life.death.cancelled() => true,
            () = rounds => false,
        };
        faults = std::mem::take(&mut *life.faults.lock().unwrap());
        if !died {
            return;
        }
        sleep(Duration::from_millis(owner.away_ms)).await;
    }
}

/// What falls on an owner, in order.
#[derive(Default)]
struct Life {
    faults: Mutex<VecDeque<Fault>>,
    death: CancellationToken,
}

impl Life {
    fn is_over(&self) -> bool {
        self.faults.lock().unwrap().is_empty()
    }

    /// An await: what falls on the owner here. It does not come back from its death.
    async fn at(&self) -> Fault {
        let fault = self.faults.lock().unwrap().pop_front().unwrap_or(Fault::No);
        match fault {
            Fault::Slow(ms) => sleep(Duration::from_millis(ms)).await,
            Fault::Die => {
                self.death.cancel();
                std::future::pending().await
            }
            Fault::No | Fault::Error | Fault::Unsure => {}
        }
        fault
    }
}

/// The one store, as an owner reaches it.
struct Shaky {
    world: Arc<World>,
    life: Arc<Life>,
}

fn failed() -> StoreError {
    StoreError::Unavailable { place: "the store".to_owned(), what: "no".to_owned() }
}

impl Shaky {
    async fn is_well(&self) -> Result<(), StoreError> {
        match self.life.at().await {
            Fault::Error | Fault::Unsure => Err(failed()),
            _ => Ok(()),
        }
    }

    async fn swap(&self, expected: Version, record: Record) -> Result<Cas, StoreError> {
        let (before, order) = (self.world.store.record().await, order(&record));
        let refresh = record.header.refresh;
        let done = self.world.store.inner.cas(expected, record).await?;
        if matches!(done, Cas::Done(_)) {
            let mut seen = self.world.seen.lock().unwrap();
            seen.went_back |= order < self::order(&before);
            seen.safe.extend(refresh);
        }
        Ok(done)
    }
}

fn order(record: &Record) -> (u64, u64) {
    (record.header.line, record.header.generation)
}

impl RecordStore for Shaky {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        async {
            self.is_well().await?;
            let got = self.world.store.inner.get().await;
            self.life.at().await;
            got
        }
        .boxed()
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        async move {
            match self.life.at().await {
                Fault::Error => return Err(failed()),
                Fault::Unsure => return Ok(Cas::Unknown),
                _ => {}
            }
            let done = self.swap(expected, record).await?;
            match self.life.at().await {
                Fault::Unsure => Ok(Cas::Unknown),
                _ => Ok(done),
            }
        }
        .boxed()
    }

    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        async move {
            self.is_well().await?;
            let inner = self.world.store.reserve(stamp).await?;
            self.life.at().await;
            let (world, life) = (Arc::clone(&self.world), Arc::clone(&self.life));
            Ok(inner.map(|inner| Box::new(Half { world, life, inner }) as Box<dyn Journal>))
        }
        .boxed()
    }

    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        async move {
            self.is_well().await?;
            let left = self.world.store.look_back(stamp).await;
            self.life.at().await;
            left
        }
        .boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.world.store.changes()
    }

    fn place(&self) -> String {
        "the store".to_owned()
    }
}

/// A journal, as its owner reaches it.
struct Half {
    world: Arc<World>,
    life: Arc<Life>,
    inner: Box<dyn Journal>,
}

impl Journal for Half {
    fn keep(&self, redeemed: &Redeemed) -> BoxFuture<'_, Result<(), StoreError>> {
        let redeemed = redeemed.clone();
        async move {
            if matches!(self.life.at().await, Fault::Error | Fault::Unsure) {
                return Err(failed());
            }
            self.inner.keep(&redeemed).await?;
            let refresh = redeemed.login.tokens().and_then(|set| set.refresh.as_ref());
            self.world.seen.lock().unwrap().safe.extend(refresh.map(Secret::fingerprint));
            self.life.at().await;
            Ok(())
        }
        .boxed()
    }

    fn forget(&self) -> BoxFuture<'_, ()> {
        async {
            self.life.at().await;
            self.inner.forget().await;
            self.life.at().await;
        }
        .boxed()
    }
}

/// The one issuer, as an owner reaches it.
struct Strict {
    world: Arc<World>,
    life: Arc<Life>,
}

impl Strict {
    fn answer(&self, shown: Fingerprint) -> Result<Answer, RefreshError> {
        let turn = self.world.turns.lock().unwrap().pop_front().unwrap_or(Turn::Answer);
        match turn {
            Turn::NotSent => return Err(RefreshError::NotSent("no road".into())),
            Turn::Limited => return Err(RefreshError::Limited { retry_after: None }),
            Turn::Answer | Turn::Gateway | Turn::Lose => {}
        }
        let mut seen = self.world.seen.lock().unwrap();
        let number = (0..=seen.current).find(|number| token(*number).fingerprint() == shown);
        let number = number.unwrap_or(usize::MAX);
        if seen.risked.contains(&number) && !seen.is_over {
            seen.twice.push(number);
        }
        seen.risked.push(number);
        if number != seen.current {
            return Err(RefreshError::Rejected { code: "refresh_token_reused".to_owned() });
        }
        if matches!(turn, Turn::Gateway) {
            return Err(RefreshError::Unknown("502".to_owned()));
        }
        seen.current += 1;
        let number = seen.current;
        drop(seen);
        match turn {
            Turn::Lose => Err(RefreshError::Unknown("the answer was lost".to_owned())),
            _ => Ok(Answer {
                access: Secret::new(format!("a{number}")),
                refresh: Some(token(number)),
                id: None,
                expires_in: Some(Duration::from_secs(3600)),
                date: None,
            }),
        }
    }
}

impl Issuer for Strict {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        old.is_some_and(|old| old.refresh.is_some())
    }

    fn identify<'a>(&'a self, _: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        std::future::ready(Err(RefreshError::NotSent("nobody asks".into()))).boxed()
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        _: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        async move {
            self.life.at().await;
            if !leave.take() {
                return Err(RefreshError::NotSent("too late".into()));
            }
            let shown = old.unwrap().refresh.as_ref().unwrap().fingerprint();
            if !self.world.store.drawer.is_held(shown) {
                self.world.seen.lock().unwrap().unjournaled = true;
            }
            let answer = self.answer(shown);
            self.life.at().await;
            answer
        }
        .boxed()
    }
}
