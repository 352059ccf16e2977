//! The promises of a token source, on a store in memory and on a Codex home on disk.

mod logins;

use std::sync::atomic::Ordering;

use super::fake::{HOUR, StrictIssuer, Stumble, Stumbling, Turn, login};
use super::*;
use crate::credential::{Keep, Login, TokenSet};
use crate::decoy::{DecoySet, Tag};
use crate::oauth::{RefreshError, Trouble};
use crate::store::codex::CodexStore;
use crate::store::keyring::Keyring;
use crate::store::{Header, Phase, Record, RecordStore as _, Redeemed, Stamp};

struct World {
    clock: Clock,
    store: Arc<Stumbling>,
    issuer: Arc<StrictIssuer>,
    refreshes: Tasks,
    background: Tasks,
    source: Arc<TokenSource>,
}

impl World {
    /// A source over a ChatGPT login whose access token expires in so many seconds.
    async fn expiring_in(seconds: i64) -> Self {
        let clock = Clock::system();
        let login = login(&clock, seconds);
        Self::holding(clock, Some(login)).await
    }

    async fn holding(clock: Clock, login: Option<Login>) -> Self {
        let (store, issuer) = (Stumbling::new(login), StrictIssuer::new());
        let (refreshes, background) = (Tasks::new(), Tasks::new());
        let parts = parts(&clock, &refreshes, &background);
        let source = TokenSource::rotating(parts, store.clone(), issuer.clone()).await;
        Self { clock, store, issuer, refreshes, background, source: Arc::new(source) }
    }

    async fn token(&self) -> String {
        match self.source.current().await {
            Ok(credential) => short(&credential),
            Err(error) => brief(&error),
        }
    }

    async fn after_401(&self, rule: &str, refused: &Credential) -> String {
        match self.source.after_401(rule, refused).await {
            Ok(Some(credential)) => short(&credential),
            Ok(None) => "pass".to_owned(),
            Err(error) => brief(&error),
        }
    }

    fn pass_time(&self, seconds: i64) {
        self.clock.advance(time::Duration::seconds(seconds));
    }

    fn will_fail(&self, error: RefreshError) {
        self.issuer.will(Turn::Fail(error));
    }

    /// Somebody else writes another set of the same login.
    async fn write(&self, access: &str, refresh: &str) {
        let (version, record) = self.store.inner.get().await.unwrap();
        let mut set = rotation::tokens_of(&record).unwrap().clone();
        (set.access, set.refresh) = (Secret::new(access), Some(Secret::new(refresh)));
        let login = Login::ChatGpt(set);
        let header = record.header.next_generation(&login);
        self.store.inner.cas(version, Record { header, login: Some(login) }).await.unwrap();
    }

    async fn header(&self) -> Header {
        self.store.record().await.header
    }

    /// Lets the watch over the store see what was written.
    async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn parts(clock: &Clock, refreshes: &Tasks, background: &Tasks) -> Parts {
    Parts {
        name: "openai".parse().unwrap(),
        clock: clock.clone(),
        refreshes: refreshes.clone(),
        policy: Enforced::nothing(),
        background: background.clone(),
        audit: Audit::off(),
    }
}

/// The last part of a token: `a0` of the one in the store, `a1` of the issuer's first.
fn short(credential: &Credential) -> String {
    credential.token().expose().rsplit('.').next().unwrap().to_owned()
}

fn brief(error: &TokenError) -> String {
    match error {
        TokenError::LoginRequired { why, .. } => format!("login: {why}"),
        TokenError::Forbidden { why, .. } => format!("forbidden: {why}"),
        TokenError::IssuerUnavailable { .. } => "issuer".to_owned(),
        TokenError::StoreUnavailable(_) => "store".to_owned(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_hundred_that_wait_make_one_refresh() {
    let world = World::expiring_in(-10).await;
    world.issuer.answers.forget_permits(usize::MAX);
    let all = (0..100).map(|_| world.source.current());
    let answer = async {
        world.settle().await;
        world.issuer.answers.add_permits(100);
    };
    let (all, ()) = tokio::join!(futures_util::future::join_all(all), answer);
    let serials: std::collections::HashSet<_> =
        all.iter().map(|value| value.as_ref().unwrap().serial()).collect();
    assert_eq!(serials.len(), 1);
    assert_eq!(world.token().await, "a1");
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_due_is_sent_and_refreshed_behind() {
    let world = World::expiring_in(300).await;
    world.issuer.answers.forget_permits(usize::MAX);
    let mut arrived = world.issuer.arrived.subscribe();
    for _ in 0..10 {
        assert_eq!(world.token().await, "a0");
    }
    arrived.wait_for(|count| *count == 1).await.unwrap();
    assert_eq!(world.token().await, "a0", "nobody waits for the answer");
    world.issuer.answers.add_permits(1);
    world.refreshes.finished().await;
    assert_eq!(world.token().await, "a1");
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_due_is_left_alone() {
    let world = World::expiring_in(700).await;
    assert_eq!(world.token().await, "a0");
    world.settle().await;
    assert!(world.issuer.posts().is_empty());
    // The watch refreshes it when its time comes, though nobody asks.
    world.pass_time(200);
    tokio::time::sleep(Duration::from_secs(700)).await;
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn a_refresh_survives_those_who_wait_for_it() {
    let world = World::expiring_in(-10).await;
    world.issuer.answers.forget_permits(usize::MAX);
    let mut arrived = world.issuer.arrived.subscribe();
    let waiting = Box::pin(world.source.current());
    let sent = Box::pin(arrived.wait_for(|count| *count == 1));
    match futures_util::future::select(waiting, sent).await {
        futures_util::future::Either::Right((_, waiting)) => drop(waiting),
        futures_util::future::Either::Left(_) => panic!("the issuer has not answered"),
    }
    world.issuer.answers.add_permits(1);
    world.refreshes.finished().await;
    let header = world.header().await;
    assert_eq!(header.refresh, Some(Secret::new("r1").fingerprint()));
    assert_eq!((header.generation, header.phase), (2, Phase::Idle));
}

#[tokio::test(start_paused = true)]
async fn one_known_to_have_expired_is_never_given_out() {
    let text = || "x".to_owned();
    let table = [
        (RefreshError::NotSent(text().into()), "issuer"),
        (RefreshError::Limited { retry_after: None }, "issuer"),
        (RefreshError::Unknown(text()), "issuer"),
        (
            RefreshError::Rejected { code: "refresh_token_expired".to_owned() },
            "login: Your access token could not be refreshed because your refresh token has expired. \
             Please log out and sign in again.",
        ),
    ];
    for (error, expected) in table {
        let world = World::expiring_in(-10).await;
        world.will_fail(error.clone());
        let all = (0..100).map(|_| world.token());
        for token in futures_util::future::join_all(all).await {
            assert_eq!(token, expected, "{error}");
        }
        for _ in 0..100 {
            assert_eq!(world.token().await, expected, "{error}");
        }
        assert_eq!(world.issuer.posts().len(), 1, "{error}: no storm");
        let gets = world.store.gets.load(Ordering::Relaxed);
        assert!(gets < 20, "{error}: the store was read {gets} times");
        // Transient trouble passes; a dead login stays dead.
        world.pass_time(2);
        let later = if expected == "issuer" { "a1" } else { expected };
        assert_eq!(world.token().await, later, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn says_why_the_issuer_cannot_be_asked() {
    let world = World::expiring_in(-10).await;
    let trouble = Trouble { why: "no road there".to_owned(), hint: Some("build one".to_owned()) };
    world.will_fail(RefreshError::NotSent(trouble.clone()));
    // The first waits for the request, the second is put off without one.
    for _ in 0..2 {
        match world.source.current().await {
            Err(error @ TokenError::IssuerUnavailable { .. }) => {
                assert!(error.to_string().ends_with("for a new one now: no road there"), "{error}");
                let TokenError::IssuerUnavailable { trouble: told, .. } = error else { continue };
                assert_eq!(told.as_ref(), Some(&trouble));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(world.issuer.posts().len(), 1);
    world.pass_time(2);
    assert_eq!(world.token().await, "a1");
}

/// Three processes, each asked once a second through ten minutes in which the issuer fails in one way; the token
/// expires in the middle.
#[tokio::test(start_paused = true)]
async fn ten_minutes_of_trouble_are_twenty_requests_of_the_whole_machine() {
    let errors = [
        RefreshError::NotSent("no road".into()),
        RefreshError::Limited { retry_after: None },
        RefreshError::Unknown("502".to_owned()),
    ];
    for error in errors {
        let world = World::expiring_in(300).await;
        let mut sources = vec![Arc::clone(&world.source)];
        for _ in 0..2 {
            let parts = parts(&world.clock, &world.refreshes, &world.background);
            let (store, issuer) = (world.store.clone(), world.issuer.clone());
            sources.push(Arc::new(TokenSource::rotating(parts, store, issuer).await));
        }
        for _ in 0..40 {
            world.will_fail(error.clone());
        }
        for second in 0..600 {
            for source in &sources {
                let told = source.current().await;
                match (second < 299, &told) {
                    (true, Ok(credential)) => assert_eq!(short(credential), "a0"),
                    (false, Err(TokenError::IssuerUnavailable { retry_after, .. })) => {
                        assert!(*retry_after <= Duration::from_secs(60), "{retry_after:?}");
                    }
                    // At the moment of its expiry it may be either.
                    _ if (299..302).contains(&second) => {}
                    _ => panic!("{error}, second {second}: {told:?}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            world.pass_time(1);
        }
        let posts = world.issuer.posts().len();
        assert!((2..=20).contains(&posts), "{error}: {posts} requests");
        // As soon as it answers, all have the new one after one request.
        world.issuer.recover();
        world.pass_time(61);
        for source in &sources {
            assert_eq!(short(&source.current().await.unwrap()), "a1", "{error}");
        }
        assert_eq!(world.issuer.posts().len(), posts + 1, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn says_when_to_come_back() {
    let world = World::expiring_in(-10).await;
    world.will_fail(RefreshError::Limited { retry_after: Some(Duration::from_secs(30)) });
    assert_eq!(world.token().await, "issuer");
    world.pass_time(20);
    match world.source.current().await {
        Err(TokenError::IssuerUnavailable { retry_after, .. }) => {
            assert!(retry_after <= Duration::from_secs(10), "{retry_after:?}");
            assert!(retry_after >= Duration::from_secs(8), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_not_asked_for_again_while_the_token_lives() {
    let world = World::expiring_in(300).await;
    world.issuer.will(Turn::Lose);
    for _ in 0..20 {
        assert_eq!(world.token().await, "a0");
        world.settle().await;
        world.pass_time(14);
    }
    assert_eq!(world.issuer.posts().len(), 1);
    assert_eq!(world.header().await.phase, Phase::Unknown);
    // The last resort, when nothing is left to lose: here the login was lost with the answer.
    world.pass_time(60);
    assert!(world.token().await.starts_with("login: "));
    assert_eq!(world.issuer.posts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_gateway_error_costs_no_login() {
    let world = World::expiring_in(40).await;
    world.will_fail(RefreshError::Unknown("502".to_owned()));
    for _ in 0..3 {
        assert_eq!(world.token().await, "a0");
        world.settle().await;
        world.pass_time(5);
    }
    assert_eq!(world.header().await.phase, Phase::Unknown);
    world.pass_time(26);
    assert_eq!(world.token().await, "a1");
}

#[tokio::test(start_paused = true)]
async fn a_slow_read_does_not_undo_a_refresh() {
    let world = World::expiring_in(300).await;
    let (version, record) = world.store.inner.get().await.unwrap();
    world.store.next_get_ms.store(5_000, Ordering::Relaxed);
    world.store.inner.cas(version, record).await.unwrap();
    world.settle().await;
    assert_eq!(world.token().await, "a0");
    world.settle().await;
    let refreshed = world.source.current().await.unwrap();
    assert_eq!(short(&refreshed), "a1");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(world.source.current().await.unwrap().serial(), refreshed.serial());
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_401s_makes_one_refresh() {
    let world = World::expiring_in(3000).await;
    let refused = world.source.current().await.unwrap();
    let all = (0..1000).map(|_| world.after_401("chatgpt", &refused));
    for answer in futures_util::future::join_all(all).await {
        assert_eq!(answer, "a1");
    }
    // Late ones find the new value; one about the new value comes too soon.
    assert_eq!(world.after_401("chatgpt", &refused).await, "a1");
    let second = world.source.current().await.unwrap();
    for _ in 0..100 {
        assert_eq!(world.after_401("other", &second).await, "pass");
    }
    assert_eq!(world.issuer.posts(), ["r0"]);
    let gets = world.store.gets.load(Ordering::Relaxed);
    assert!(gets < 10, "the store was read {gets} times");
    world.pass_time(61);
    assert_eq!(world.after_401("other", &second).await, "a2");
}

#[tokio::test(start_paused = true)]
async fn a_rule_refused_twice_is_left_alone_until_the_token_changes_for_another_reason() {
    let world = World::expiring_in(3000).await;
    let first = world.source.current().await.unwrap();
    assert_eq!(world.after_401("a", &first).await, "a1");
    let second = world.source.current().await.unwrap();
    world.source.refused_again("a", &second);
    world.pass_time(61);
    assert_eq!(world.after_401("a", &second).await, "pass");
    // A 401 of another rule is not another reason.
    assert_eq!(world.after_401("b", &second).await, "a2");
    let third = world.source.current().await.unwrap();
    world.pass_time(61);
    assert_eq!(world.after_401("a", &third).await, "pass");
    assert_eq!(world.issuer.posts(), ["r0", "r1"]);
    // Its age is.
    world.pass_time(3400);
    assert_eq!(world.token().await, "a2");
    world.settle().await;
    let fourth = world.source.current().await.unwrap();
    assert_eq!(short(&fourth), "a3");
    world.pass_time(61);
    assert_eq!(world.after_401("a", &fourth).await, "a4");
}

#[tokio::test(start_paused = true)]
async fn a_401_finds_what_somebody_else_has_written() {
    let world = World::expiring_in(3000).await;
    let refused = world.source.current().await.unwrap();
    world.write("a-codex", "r-codex").await;
    assert_eq!(world.after_401("chatgpt", &refused).await, "a-codex");
    assert!(world.issuer.posts().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_request_is_not_replayed_for_another_account() {
    let world = World::expiring_in(3000).await;
    let refused = world.source.current().await.unwrap();
    let Login::ChatGpt(set) = login(&world.clock, 3000) else { unreachable!() };
    let other = TokenSet {
        access: Secret::new("b0"),
        refresh: Some(Secret::new("s0")),
        account_id: Some("account-2".to_owned()),
        ..set
    };
    world.store.put(Some(Login::ChatGpt(other)), None).await.unwrap();
    assert_eq!(world.after_401("chatgpt", &refused).await, "pass");
    assert_eq!(world.token().await, "b0");
    world.store.put(Some(Login::ApiKey(Secret::new("k"))), None).await.unwrap();
    world.settle().await;
    assert_eq!(world.after_401("chatgpt", &refused).await, "pass");
}

#[tokio::test(start_paused = true)]
async fn a_dead_login_is_used_while_its_token_lives_and_healed_by_another() {
    let world = World::expiring_in(300).await;
    world.will_fail(RefreshError::Rejected { code: "refresh_token_reused".to_owned() });
    assert_eq!(world.token().await, "a0");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.source.status().state, State::Dead("refresh_token_reused".to_owned()));
    assert!(!world.source.can_refresh());
    let held = world.source.current().await.unwrap();
    assert_eq!(short(&held), "a0");
    assert!(world.after_401("chatgpt", &held).await.starts_with("login: Your access token"));
    world.pass_time(301);
    assert!(world.token().await.starts_with("login: Your access token"));
    assert_eq!(world.issuer.posts().len(), 1);
    world.write("a-new", "r-new").await;
    world.settle().await;
    assert_eq!(world.token().await, "a-new");
    assert_eq!(world.source.status().state, State::Ok);
}

#[tokio::test(start_paused = true)]
async fn a_dead_login_is_healed_by_an_answer_that_somebody_has_left() {
    let world = World::expiring_in(-10).await;
    // Whoever has redeemed the token stands still, until others have sent it too, and dies with the answer written down.
    let record = world.store.record().await;
    let journal = world.store.reserve(Stamp::of(&record)).await.unwrap().unwrap();
    let (access, refresh) = world.issuer.redeem_elsewhere();
    assert!(world.token().await.starts_with("login: Your access token"));
    let set = TokenSet {
        access: Secret::new(access),
        refresh: Some(Secret::new(refresh)),
        id: None,
        account_id: None,
        last_refresh: Some(world.clock.now()),
    };
    let redeemed = Redeemed { login: Login::ChatGpt(set), lifetime: Some(HOUR), forced_at: None };
    journal.keep(&redeemed).await.unwrap();
    drop(journal);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!((world.token().await.as_str(), world.source.status().state), ("a1", State::Ok));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_adopts_what_is_newer() {
    let world = World::expiring_in(-10).await;
    let (access, refresh) = world.issuer.redeem_elsewhere();
    world.issuer.answers.forget_permits(usize::MAX);
    let mut arrived = world.issuer.arrived.subscribe();
    let write = async {
        arrived.wait_for(|count| *count == 1).await.unwrap();
        world.write(&access, &refresh).await;
        world.issuer.answers.add_permits(1);
    };
    let (token, ()) = tokio::join!(world.token(), write);
    assert_eq!(token, "a1");
    assert_eq!(world.header().await.phase, Phase::Idle);
}

#[tokio::test(start_paused = true)]
async fn a_token_received_here_is_good_whatever_the_clock_says() {
    let clock = Clock::system();
    let behind = login(&clock, 3000);
    clock.advance(time::Duration::days(365));
    let world = World::holding(clock, Some(behind)).await;
    world.issuer.live_for(HOUR);
    for _ in 0..10 {
        assert_eq!(world.token().await, "a1");
        world.pass_time(60);
    }
    assert_eq!(world.issuer.posts(), ["r0"]);
    // Whatever becomes of the record that it was noted in.
    let until = world.source.status().expires_at;
    let (version, mut record) = world.store.inner.get().await.unwrap();
    record.header.lifetime = None;
    world.store.inner.cas(version, record.clone()).await.unwrap();
    world.settle().await;
    let left = world.source.status().expires_at.unwrap() - until.unwrap();
    assert!(left < time::Duration::seconds(2), "{left}");
    record.header.lifetime = Some(HOUR);
    let (version, _) = world.store.inner.get().await.unwrap();
    world.store.inner.cas(version, record).await.unwrap();
    // Another process on this machine, which has received nothing itself, sees the same.
    let parts = parts(&world.clock, &world.refreshes, &world.background);
    let second = TokenSource::rotating(parts, world.store.clone(), world.issuer.clone()).await;
    assert_eq!(short(&second.current().await.unwrap()), "a1");
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn learns_how_far_its_clock_is_off() {
    let clock = Clock::system();
    let Login::ChatGpt(issued) = login(&clock, 3000) else { unreachable!() };
    clock.advance(time::Duration::hours(2));
    let world = World::holding(clock.clone(), Some(login(&clock, -10))).await;
    world.issuer.tell_time(clock.now() - time::Duration::hours(2));
    assert_eq!(world.token().await, "a1");
    // By our clock this one has expired, by the issuer's it has not.
    let set = TokenSet { refresh: Some(Secret::new("r-codex")), ..issued };
    let access = set.access.expose().to_owned();
    world.write(&access, "r-codex").await;
    world.settle().await;
    assert_eq!(world.token().await, "a0");
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn a_set_that_cannot_be_saved_is_used_and_saved_later() {
    let world = World::expiring_in(-10).await;
    world.issuer.answers.forget_permits(usize::MAX);
    let mut arrived = world.issuer.arrived.subscribe();
    let fill_the_disk = async {
        arrived.wait_for(|count| *count == 1).await.unwrap();
        world.store.broken.store(usize::MAX, Ordering::Relaxed);
        world.issuer.answers.add_permits(1);
    };
    let (token, ()) = tokio::join!(world.token(), fill_the_disk);
    assert_eq!(token, "a1");
    assert_eq!(world.header().await.phase, Phase::Posting);
    world.settle().await;
    // The store can be read again first: what it holds is older than what is held here.
    world.store.broken.store(0, Ordering::Relaxed);
    world.store.script.lock().unwrap().extend([Stumble::Error; 3]);
    for _ in 0..200 {
        assert_eq!(world.token().await, "a1");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let header = world.header().await;
    assert_eq!(header.refresh, Some(Secret::new("r1").fingerprint()));
    assert_eq!(world.issuer.posts(), ["r0"]);
}

#[tokio::test(start_paused = true)]
async fn without_its_store_it_serves_what_it_holds_and_refreshes_nothing() {
    let world = World::expiring_in(300).await;
    world.store.broken.store(usize::MAX, Ordering::Relaxed);
    assert_eq!(world.token().await, "a0");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.token().await, "a0");
    assert!(matches!(world.source.status().state, State::Unreadable(_)));
    world.pass_time(301);
    assert_eq!(world.token().await, "store");
    assert!(world.issuer.posts().is_empty());
    world.store.broken.store(0, Ordering::Relaxed);
    world.pass_time(61);
    assert_eq!(world.token().await, "a1");
    assert_eq!(world.source.status().state, State::Ok);
}

#[tokio::test(start_paused = true)]
async fn needs_no_login_to_start_and_finds_one_later() {
    let world = World::holding(Clock::system(), None).await;
    assert_eq!(world.token().await, "login: Not logged in");
    match world.source.current().await {
        Err(TokenError::LoginRequired { hint, .. }) => {
            assert!(hint.contains("valetkey login"), "{hint}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((world.source.kind(), world.source.status().state), (None, State::NoLogin));
    world.store.put(Some(login(&world.clock, 3000)), None).await.unwrap();
    world.settle().await;
    assert_eq!(world.token().await, "a0");
    world.store.put(Some(Login::Unsupported("an agent identity".into())), None).await.unwrap();
    world.settle().await;
    assert_eq!(
        world.token().await,
        "login: an agent identity is signed in, which cannot be used here"
    );
    // A home that a client has: it must not be taken for a login, and not be refreshed.
    let tag = Tag::of(&"openai".parse().unwrap());
    let decoys = DecoySet::new(tag, &Account::default(), world.clock.now()).into_login();
    world.store.put(Some(decoys), None).await.unwrap();
    world.settle().await;
    assert!(world.token().await.starts_with("login: a decoy of a login that is kept elsewhere"));
    assert!(matches!(world.source.status().state, State::Unsupported(_)));
    world.store.put(None, None).await.unwrap();
    world.settle().await;
    assert_eq!(world.token().await, "login: Not logged in");
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_store_is_no_missing_login() {
    let store = Stumbling::new(None);
    store.broken.store(usize::MAX, Ordering::Relaxed);
    let clock = Clock::system();
    let parts = parts(&clock, &Tasks::new(), &Tasks::new());
    let source = TokenSource::rotating(parts, store.clone(), StrictIssuer::new()).await;
    assert_eq!(brief(&source.current().await.unwrap_err()), "store");
    store.broken.store(0, Ordering::Relaxed);
    clock.advance(time::Duration::seconds(2));
    assert_eq!(brief(&source.current().await.unwrap_err()), "login: Not logged in");
}

#[tokio::test(start_paused = true)]
async fn tells_when_a_login_changes_its_kind() {
    let world = World::expiring_in(3000).await;
    let name: CredentialName = "openai".parse().unwrap();
    let tokens = Tokens::new([(name.clone(), world.source.clone())].into());
    assert_eq!(tokens.kinds(), [(name.clone(), LoginKind::ChatGpt)].into());
    let mut changes = tokens.kind_changes();
    let unheard = tokio::time::timeout(Duration::from_secs(40), changes.next()).await;
    assert!(unheard.is_err(), "nothing has changed");
    world.store.put(Some(Login::ApiKey(Secret::new("k"))), None).await.unwrap();
    changes.next().await;
    assert_eq!(tokens.kinds(), [(name.clone(), LoginKind::ApiKey)].into());
    assert_eq!(world.token().await, "k");
    world.store.put(None, None).await.unwrap();
    changes.next().await;
    assert!(tokens.kinds().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_api_key_in_the_cache_is_read_again_after_a_401() {
    let key = |text: &str| Some(Login::ApiKey(Secret::new(text)));
    let world = World::holding(Clock::system(), key("k1")).await;
    let first = world.source.current().await.unwrap();
    world.pass_time(2);
    assert_eq!(world.after_401("api", &first).await, "pass");
    world.store.put(key("k2"), None).await.unwrap();
    world.pass_time(2);
    assert_eq!(world.after_401("api", &first).await, "k2");
    assert!(world.issuer.posts().is_empty());
}

#[tokio::test(start_paused = true)]
async fn answers_clients_that_refresh_by_themselves() {
    let world = World::expiring_in(3000).await;
    assert_eq!(world.source.recognises(&Secret::new("r0")), Some(Whose::Current));
    assert_eq!(world.source.recognises(&Secret::new("r1")), None);
    let first: serde_json::Value =
        serde_json::from_slice(&world.source.answer_refresh(Whose::Current).await.unwrap())
            .unwrap();
    assert_eq!((&first["access_token"], &first["refresh_token"]), (&"a1".into(), &"r1".into()));
    assert!(first["expires_in"].as_u64().unwrap() > 3500);
    assert_eq!(world.source.recognises(&Secret::new("r0")), Some(Whose::Previous));
    assert_eq!(world.source.recognises(&Secret::new("r1")), Some(Whose::Current));
    assert_eq!(world.source.recognises(&Secret::new("a1")), Some(Whose::Access));
    // A client that asks again and again gets the same set.
    for whose in [Whose::Previous, Whose::Current, Whose::Current] {
        let again = world.source.answer_refresh(whose).await.unwrap();
        let again: serde_json::Value = serde_json::from_slice(&again).unwrap();
        assert_eq!(again["access_token"], "a1");
    }
    assert_eq!(world.issuer.posts(), ["r0"]);
    // With the issuer in trouble it gets what there is, or one clear refusal.
    world.pass_time(120);
    world.will_fail(RefreshError::Unknown("502".to_owned()));
    assert!(world.source.answer_refresh(Whose::Current).await.is_ok());
    world.pass_time(3600);
    world.will_fail(RefreshError::Unknown("502".to_owned()));
    let refused = world.source.answer_refresh(Whose::Current).await.unwrap_err();
    assert_eq!(brief(&refused), "issuer");
}

#[tokio::test(start_paused = true)]
async fn a_revoked_login_counts_as_gone_until_the_store_changes() {
    let world = World::expiring_in(3000).await;
    world.source.logged_out();
    assert_eq!(world.token().await, "login: Not logged in");
    world.pass_time(5);
    assert_eq!(world.token().await, "login: Not logged in", "also when it is read again");
    assert_eq!(world.source.kind(), None);
    world.write("a-new", "r-new").await;
    world.settle().await;
    assert_eq!(world.token().await, "a-new");
}

#[tokio::test(start_paused = true)]
async fn the_watch_ends_with_the_source() {
    let world = World::expiring_in(3000).await;
    assert_eq!(world.background.count(), 1);
    let World { source, background, .. } = world;
    drop(source);
    background.finished().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_shown_holds_a_secret() {
    let world = World::expiring_in(3000).await;
    let shown = format!("{:?} {:?}", world.source.status(), world.source.current().await);
    assert!(!shown.contains("e30.") && !shown.contains("r0"), "{shown}");
}

/// Many processes over one Codex home on disk: each has a store, a rotation and a watch of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_and_tasks_make_one_refresh() {
    let home = tempfile::tempdir().unwrap();
    let clock = Clock::system();
    let Login::ChatGpt(set) = login(&clock, -10) else { unreachable!() };
    let cache = format!(
        r#"{{"unknown":{{"x":1}},"tokens":{{"access_token":"{}","refresh_token":"r0","account_id":"account-1"}}}}"#,
        set.access.expose()
    );
    std::fs::write(home.path().join("auth.json"), cache).unwrap();
    let (issuer, tasks) = (StrictIssuer::new(), Tasks::new());
    let mut sources = Vec::new();
    for _ in 0..8 {
        let store = Arc::new(CodexStore::new(
            home.path().to_owned(),
            Keep::File,
            Keyring::system(),
            tasks.clone(),
        ));
        let parts = parts(&clock, &tasks, &tasks);
        sources.push(Arc::new(TokenSource::rotating(parts, store, issuer.clone()).await));
    }
    let all = (0..100).flat_map(|_| &sources).map(|source| {
        let source = source.clone();
        tasks.spawn(async move { source.current().await.map(|value| short(&value)) })
    });
    let all: Vec<_> = all.collect();
    for one in all {
        assert_eq!(one.await.unwrap().unwrap(), "a1");
    }
    assert_eq!(issuer.posts(), ["r0"]);
    assert!(!issuer.is_revoked());
    let text = std::fs::read_to_string(home.path().join("auth.json")).unwrap();
    assert!(text.contains(r#""refresh_token": "r1""#), "the successor is on disk");
    assert!(text.contains(r#""unknown": {"#), "and so is what we do not know");
}
