//! Logins that are not allowed, that nobody knows yet, and that come to be by themselves.

use std::sync::atomic::AtomicUsize;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all};

use super::*;
use crate::credential::PersonalToken;
use crate::oauth::{Answer, Leave, Reason};
use crate::policy::{Demand, Level, Limit};
use crate::store::memory::MemoryStore;

fn personal() -> Login {
    Login::Personal(PersonalToken { token: Secret::new("at-1"), account: None })
}

fn asked(world: &World) -> usize {
    *world.issuer.arrived.borrow()
}

#[tokio::test(start_paused = true)]
async fn a_personal_token_is_asked_about_once_and_it_is_written_down() {
    let world = World::holding(Clock::system(), Some(personal())).await;
    assert_eq!(world.source.status().state, State::Ok);
    assert_eq!(world.source.kind(), Some(LoginKind::ChatGpt), "its host is intercepted before");
    let all = join_all((0..50).map(|_| world.source.current())).await;
    for credential in all {
        let credential = credential.unwrap();
        assert_eq!(credential.account().id.as_deref(), Some("account of at-1"));
        assert_eq!(credential.kind(), LoginKind::ChatGpt);
    }
    assert_eq!(asked(&world), 1);
    assert_eq!(world.source.status().masked.as_deref(), Some("***"));

    // Another process reads what was written down.
    let parts = parts(&world.clock, &world.refreshes, &world.background);
    let other = TokenSource::rotating(parts, world.store.clone(), world.issuer.clone()).await;
    assert!(other.current().await.unwrap().account().id.is_some());
    assert_eq!(asked(&world), 1);
    assert!(world.issuer.posts().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_personal_token_that_nobody_knows_is_not_sent() {
    let world = World::holding(Clock::system(), Some(personal())).await;
    world.will_fail(RefreshError::NotSent("no network".into()));
    assert_eq!(world.token().await, "issuer");
    assert_eq!(world.token().await, "issuer", "a storm asks once");
    assert_eq!(asked(&world), 1);
    world.pass_time(6);
    world.will_fail(RefreshError::Rejected { code: "unauthorized".to_owned() });
    assert!(world.token().await.starts_with("login: the issuer does not accept"));
    world.pass_time(6);
    assert_eq!(world.token().await, "at-1");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_written_down_is_known_all_the_same() {
    let world = World::holding(Clock::system(), Some(personal())).await;
    world.store.broken.store(1, Ordering::Relaxed);
    let credential = world.source.current().await.unwrap();
    assert!(credential.account().id.is_some());
}

/// A source over a login, under a policy that can be changed.
async fn under(
    login: Login,
    deletes: bool,
) -> (World, Arc<TokenSource>, watch::Sender<Arc<Policy>>) {
    let world = World::holding(Clock::system(), Some(login)).await;
    let (sender, policy) = watch::channel(Arc::default());
    let policy = Enforced { policy, deletes };
    let parts = Parts { policy, ..parts(&world.clock, &world.refreshes, &world.background) };
    let source = TokenSource::rotating(parts, world.store.clone(), world.issuer.clone()).await;
    (world, Arc::new(source), sender)
}

fn only(kind: LoginKind, level: Level) -> Arc<Policy> {
    let demand = Demand::Methods(vec![kind]);
    Arc::new(Policy::new(vec![Limit { demand, level, place: "a file".to_owned() }]))
}

async fn sent(source: &TokenSource) -> String {
    match source.current().await {
        Ok(credential) => short(&credential),
        Err(error) => brief(&error),
    }
}

#[tokio::test(start_paused = true)]
async fn a_login_that_is_not_allowed_is_ignored_and_kept() {
    let (world, source, policy) = under(login(&Clock::system(), 3000), true).await;
    assert_eq!(sent(&source).await, "a0");
    let (held, mut kinds) = (source.forbidden(), Tokens::default());
    kinds.0.insert("openai".parse().unwrap(), Arc::clone(&source));
    let mut violations = kinds.violations();
    policy.send_replace(only(LoginKind::ApiKey, Level::Required));
    let (name, violation) = violations.next().await;
    assert_eq!(name.as_str(), "openai");
    assert!(!violation.deletes);
    assert!(held.is_cancelled(), "whoever goes on using it is told");
    assert!(sent(&source).await.starts_with("forbidden: API key login is required"));
    assert_eq!((source.kind(), source.can_refresh()), (None, false));
    assert!(matches!(source.status().state, State::Forbidden(_)));
    assert!(world.store.record().await.login.is_some());

    policy.send_replace(Arc::default());
    world.settle().await;
    assert_eq!(sent(&source).await, "a0");
    assert!(!source.forbidden().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_login_that_is_forced_out_is_deleted_unless_one_only_looks() {
    for deletes in [true, false] {
        let (world, source, policy) = under(login(&Clock::system(), 3000), deletes).await;
        policy.send_replace(only(LoginKind::ApiKey, Level::Forced));
        world.settle().await;
        assert_eq!(world.store.record().await.login.is_none(), deletes);
        assert!(source.current().await.is_err());
        assert!(world.issuer.posts().is_empty());
        // One that is allowed takes its place.
        world.store.put(Some(Login::ApiKey(Secret::new("sk-1"))), None).await.unwrap();
        world.settle().await;
        assert_eq!(sent(&source).await, "sk-1");
    }
}

#[tokio::test(start_paused = true)]
async fn a_login_that_comes_while_it_is_not_allowed_is_never_sent() {
    let (world, source, policy) = under(Login::ApiKey(Secret::new("sk-1")), true).await;
    policy.send_replace(only(LoginKind::ApiKey, Level::Forced));
    world.store.put(Some(login(&world.clock, 3000)), None).await.unwrap();
    world.settle().await;
    assert!(world.store.record().await.login.is_none());
    let sentence = "forbidden: API key login is required, but ChatGPT is currently being used.";
    assert!(
        sent(&source).await.starts_with(sentence),
        "it is said until there is one that is allowed"
    );
    assert_eq!(world.header().await.line, 3, "its owner's login, then its end");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_read_keeps_no_login_in_use_that_is_not_allowed() {
    let (world, source, policy) = under(login(&Clock::system(), 3000), true).await;
    assert_eq!(sent(&source).await, "a0");
    let held = source.forbidden();
    world.store.broken.store(1000, Ordering::Relaxed);
    policy.send_replace(only(LoginKind::ApiKey, Level::Required));
    world.settle().await;
    assert!(sent(&source).await.starts_with("forbidden"));
    assert!(held.is_cancelled());
}

/// An issuer at which a client signs in by itself.
#[derive(Default)]
struct SelfService {
    asked: AtomicUsize,
}

impl Issuer for SelfService {
    fn can_renew(&self, _: Option<&TokenSet>) -> bool {
        true
    }

    fn renew<'a>(
        &'a self,
        old: Option<&'a TokenSet>,
        _: Reason,
        leave: &'a Arc<Leave>,
    ) -> BoxFuture<'a, Result<Answer, RefreshError>> {
        assert!(leave.take());
        let count = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        assert_eq!(old.is_some(), count > 1);
        std::future::ready(Ok(Answer {
            access: Secret::new(format!("c{count}")),
            refresh: None,
            id: None,
            expires_in: Some(Duration::from_secs(600)),
            date: None,
        }))
        .boxed()
    }

    fn identify<'a>(&'a self, _: &'a Secret) -> BoxFuture<'a, Result<Account, RefreshError>> {
        std::future::ready(Err(RefreshError::NotSent("not here".into()))).boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_signs_in_by_itself_needs_nobody() {
    let (clock, issuer) = (Clock::system(), Arc::new(SelfService::default()));
    let (refreshes, background) = (Tasks::new(), Tasks::new());
    let store = Arc::new(MemoryStore::new(None));
    let parts = parts(&clock, &refreshes, &background);
    let source = TokenSource::rotating(parts, store, issuer.clone()).await;
    assert_eq!(issuer.asked.load(Ordering::Relaxed), 0, "nobody has asked for a token yet");
    let all = join_all((0..50).map(|_| source.current())).await;
    assert!(all.iter().all(|value| short(value.as_ref().unwrap()) == "c1"));
    assert_eq!(source.kind(), Some(LoginKind::OAuth));
    clock.advance(time::Duration::seconds(601));
    let all = join_all((0..50).map(|_| source.current())).await;
    assert!(all.iter().all(|value| short(value.as_ref().unwrap()) == "c2"));
    assert_eq!(issuer.asked.load(Ordering::Relaxed), 2);
    let refused = all.into_iter().next().unwrap().unwrap();
    let newer = source.after_401("rule", &refused).await.unwrap().unwrap();
    assert_eq!(short(&newer), "c3");
}
