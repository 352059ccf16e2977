//! An issuer and a store for tests: strict, countable, and out of order on demand.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, watch};

use crate::clock::Clock;
use crate::credential::{Account, Login, TokenSet};
use crate::oauth::{Answer, Issuer, Leave, Reason, RefreshError};
use crate::secret::{Fingerprint, Secret};
use crate::store::memory::MemoryStore;
use crate::store::{Cas, Journal, Left, Record, RecordStore, Redeemed, Stamp, StoreError, Version};

/// An issuer that takes each refresh token once and ends the login when one comes twice.
pub(super) struct StrictIssuer {
    inner: Mutex<Inner>,
    /// Every answer waits for a permit of this.
    pub(super) answers: Semaphore,
    /// A number that moves when a request has arrived.
    pub(super) arrived: watch::Sender<usize>,
}

struct Inner {
    rotation: u32,
    current: String,
    revoked: bool,
    posts: Vec<String>,
    script: VecDeque<Turn>,
    lifetime: Option<Duration>,
    date: Option<OffsetDateTime>,
}

/// What the issuer does with a request, other than answer it.
#[derive(Clone, Debug)]
pub(super) enum Turn {
    /// Fails before it looks at the token.
    Fail(RefreshError),
    /// Redeems the token, and the answer is lost.
    Lose,
}

impl StrictIssuer {
    /// An issuer that has handed out the refresh token `r0`.
    pub(super) fn new() -> Arc<Self> {
        let inner = Inner {
            rotation: 0,
            current: "r0".to_owned(),
            revoked: false,
            posts: Vec::new(),
            script: VecDeque::new(),
            lifetime: Some(HOUR),
            date: None,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            answers: Semaphore::new(Semaphore::MAX_PERMITS),
            arrived: watch::Sender::new(0),
        })
    }

    pub(super) fn will(&self, turn: Turn) {
        self.inner.lock().unwrap().script.push_back(turn);
    }

    /// Does from now on what it should.
    pub(super) fn recover(&self) {
        self.inner.lock().unwrap().script.clear();
    }

    pub(super) fn tell_time(&self, date: OffsetDateTime) {
        self.inner.lock().unwrap().date = Some(date);
    }

    /// How long its access tokens live from now on.
    pub(super) fn live_for(&self, lifetime: Duration) {
        self.inner.lock().unwrap().lifetime = Some(lifetime);
    }

    /// Every refresh token that arrived, in order.
    pub(super) fn posts(&self) -> Vec<String> {
        self.inner.lock().unwrap().posts.clone()
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.inner.lock().unwrap().revoked
    }

    /// Somebody else redeems the current token: what they get.
    pub(super) fn redeem_elsewhere(&self) -> (String, String) {
        let mut inner = self.inner.lock().unwrap();
        let answer = inner.redeem();
        (answer.access.expose().to_owned(), answer.refresh.unwrap().expose().to_owned())
    }
}

impl Inner {
    fn redeem(&mut self) -> Answer {
        self.rotation += 1;
        self.current = format!("r{}", self.rotation);
        Answer {
            access: Secret::new(format!("a{}", self.rotation)),
            refresh: Some(Secret::new(self.current.clone())),
            id: None,
            expires_in: self.lifetime,
            date: self.date,
        }
    }

    fn judge(&mut self, token: &str) -> Result<Answer, RefreshError> {
        self.posts.push(token.to_owned());
        let turn = self.script.pop_front();
        if let Some(Turn::Fail(error)) = turn {
            return Err(error);
        }
        if self.revoked || token != self.current {
            self.revoked = true;
            return Err(RefreshError::Rejected { code: "refresh_token_reused".to_owned() });
        }
        let answer = self.redeem();
        match turn {
            Some(Turn::Lose) => Err(RefreshError::Unknown("the answer was lost".to_owned())),
            _ => Ok(answer),
        }
    }
}

impl Issuer for StrictIssuer {
    fn can_renew(&self, old: Option<&TokenSet>) -> bool {
        old.is_some_and(|old| old.refresh.is_some())
    }

    fn identify<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        let account = match self.inner.lock().unwrap().script.pop_front() {
            Some(Turn::Fail(error)) => Err(error),
            _ => Ok(Account {
                id: Some(format!("account of {}", token.expose())),
                ..Account::default()
            }),
        };
        self.arrived.send_modify(|count| *count += 1);
        std::future::ready(account).boxed()
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        _: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        async move {
            let token = old.unwrap().refresh.as_ref().unwrap();
            if !leave.take() {
                return Err(RefreshError::NotSent("too late".into()));
            }
            let answer = self.inner.lock().unwrap().judge(token.expose());
            self.arrived.send_modify(|count| *count += 1);
            self.answers.acquire().await.unwrap().forget();
            answer
        }
        .boxed()
    }
}

/// A store in memory that stumbles on demand.
pub(super) struct Stumbling {
    pub(super) inner: MemoryStore,
    /// The journals, which outlive their owners.
    pub(super) drawer: Arc<Drawer>,
    /// What becomes of the next calls of `cas`.
    pub(super) script: Mutex<VecDeque<Stumble>>,
    /// How many calls of `cas` and `get` fail from now on.
    pub(super) broken: AtomicUsize,
    /// How often `get` was called.
    pub(super) gets: AtomicUsize,
    /// How many milliseconds the next `get` takes to bring what it has read.
    pub(super) next_get_ms: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Stumble {
    /// Done, and the caller does not learn it.
    UnknownDone,
    /// Not done, and the caller does not learn it.
    UnknownLost,
    /// Refused.
    Error,
    /// As it should be.
    No,
}

impl Stumbling {
    pub(super) fn new(login: Option<Login>) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryStore::new(login),
            drawer: Arc::default(),
            script: Mutex::default(),
            broken: AtomicUsize::new(0),
            gets: AtomicUsize::new(0),
            next_get_ms: AtomicU64::new(0),
        })
    }

    pub(super) async fn record(&self) -> Record {
        self.inner.get().await.unwrap().1
    }

    fn is_broken(&self) -> bool {
        is_due(&self.broken)
    }
}

/// Whether the next call is to fail, of so many.
fn is_due(calls: &AtomicUsize) -> bool {
    let less = |left: usize| left.checked_sub(1);
    calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
}

fn out_of_reach() -> StoreError {
    StoreError::Unavailable { place: "the store".to_owned(), what: "no space left".to_owned() }
}

impl RecordStore for Stumbling {
    fn get(&self) -> BoxFuture<'_, Result<(Version, Record), StoreError>> {
        async {
            self.gets.fetch_add(1, Ordering::Relaxed);
            if self.is_broken() {
                return Err(out_of_reach());
            }
            let got = self.inner.get().await;
            let delay = self.next_get_ms.swap(0, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(delay)).await;
            got
        }
        .boxed()
    }

    fn cas(&self, expected: Version, record: Record) -> BoxFuture<'_, Result<Cas, StoreError>> {
        async move {
            if self.is_broken() {
                return Err(out_of_reach());
            }
            let stumble = self.script.lock().unwrap().pop_front().unwrap_or(Stumble::No);
            match stumble {
                Stumble::No => self.inner.cas(expected, record).await,
                Stumble::UnknownLost => Ok(Cas::Unknown),
                Stumble::Error => Err(out_of_reach()),
                Stumble::UnknownDone => {
                    self.inner.cas(expected, record).await.map(|_| Cas::Unknown)
                }
            }
        }
        .boxed()
    }

    fn reserve(&self, stamp: Stamp) -> BoxFuture<'_, Result<Option<Box<dyn Journal>>, StoreError>> {
        let reserved = match is_due(&self.drawer.full) {
            true => Err(out_of_reach()),
            false => Ok(self.drawer.reserve(stamp)),
        };
        std::future::ready(reserved).boxed()
    }

    fn look_back(&self, stamp: Stamp) -> BoxFuture<'_, Result<Left, StoreError>> {
        async move {
            let (_, now) = self.inner.get().await?;
            Ok(self.drawer.look(&stamp, &Stamp::of(&now)))
        }
        .boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

/// Journals in memory, which are there after their owner has died, as files are.
#[derive(Default)]
pub(super) struct Drawer {
    kept: Mutex<Vec<Kept>>,
    /// How many calls of `reserve` fail from now on.
    pub(super) full: AtomicUsize,
    /// How many of `keep` do.
    pub(super) broken: AtomicUsize,
}

struct Kept {
    stamp: Stamp,
    answer: Option<Redeemed>,
    /// Dropped with the owner's half.
    held: std::sync::Weak<()>,
}

/// The owner's half of a journal.
struct Half {
    drawer: Arc<Drawer>,
    stamp: Stamp,
    _held: Arc<()>,
}

impl Drawer {
    /// How many are there.
    pub(super) fn count(&self) -> usize {
        self.kept.lock().unwrap().len()
    }

    /// Whether somebody holds one for that refresh token.
    pub(super) fn is_held(&self, refresh: Fingerprint) -> bool {
        let kept = self.kept.lock().unwrap();
        kept.iter().any(|it| it.held.strong_count() > 0 && it.stamp.refresh == Some(refresh))
    }

    fn reserve(self: &Arc<Self>, stamp: Stamp) -> Option<Box<dyn Journal>> {
        let held = Arc::new(());
        let kept = Kept { stamp: stamp.clone(), answer: None, held: Arc::downgrade(&held) };
        self.kept.lock().unwrap().push(kept);
        Some(Box::new(Half { drawer: Arc::clone(self), stamp, _held: held }))
    }

    fn look(&self, stamp: &Stamp, now: &Stamp) -> Left {
        let mut kept = self.kept.lock().unwrap();
        kept.retain(|it| it.held.strong_count() > 0 || it.stamp.is_same_generation(now));
        let mut left = Left::Nothing;
        for it in kept.iter().filter(|it| it.stamp.is_same_generation(stamp)) {
            if let Some(redeemed) = &it.answer {
                return Left::Answer(Box::new(redeemed.clone()));
            }
            if it.held.strong_count() == 0 && it.stamp.is_same_claim(stamp) {
                left = Left::Abandoned;
            }
        }
        left
    }
}

impl Journal for Half {
    fn keep(&self, redeemed: &Redeemed) -> BoxFuture<'_, Result<(), StoreError>> {
        if is_due(&self.drawer.broken) {
            return std::future::ready(Err(out_of_reach())).boxed();
        }
        let mut kept = self.drawer.kept.lock().unwrap();
        let own = kept.iter_mut().find(|it| it.stamp == self.stamp).unwrap();
        own.answer = Some(redeemed.clone());
        std::future::ready(Ok(())).boxed()
    }

    fn forget(&self) -> BoxFuture<'_, ()> {
        self.drawer.kept.lock().unwrap().retain(|it| it.stamp != self.stamp);
        std::future::ready(()).boxed()
    }
}

/// A ChatGPT login with refresh token `r0` whose access token `a0` expires in so many seconds.
pub(super) fn login(clock: &Clock, expires_in: i64) -> Login {
    let now = clock.now();
    let exp = now.unix_timestamp() + expires_in;
    let claims = format!(r#"{{"iat":{},"exp":{exp}}}"#, exp - 3600);
    Login::ChatGpt(TokenSet {
        access: Secret::new(format!("e30.{}.a0", URL_SAFE_NO_PAD.encode(claims))),
        refresh: Some(Secret::new("r0")),
        id: None,
        account_id: Some("account-1".to_owned()),
        last_refresh: Some(now - time::Duration::hours(1)),
    })
}

pub(super) const HOUR: Duration = Duration::from_secs(3600);
