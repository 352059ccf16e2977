//! The promises of a login in a file of ours, on real files and a pretend keyring.

use std::os::unix::fs::MetadataExt as _;

use super::super::Phase;
use super::super::keyring::fake::{FakeRing, Mood};
use super::*;
use crate::credential::TokenSet;
use crate::secret::Secret;

struct Scene {
    folder: tempfile::TempDir,
    ring: Arc<FakeRing>,
}

/// Shorter than the real one, so that a hanging keyring does not hold up the tests.
const LIMIT: Duration = Duration::from_millis(400);

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), ring: FakeRing::new() }
    }

    fn store(&self, keep: Keep) -> SealedStore {
        self.named("work", keep, LIMIT)
    }

    fn named(&self, name: &str, keep: Keep, limit: Duration) -> SealedStore {
        let keyring = Keyring::with_limit(self.ring.clone(), limit);
        let folder = self.folder.path().join("logins");
        SealedStore::new(folder, &name.parse().unwrap(), keep, keyring, Tasks::new())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("logins").join(name)
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path("work.json")).unwrap()
    }
}

fn oauth(refresh: &str) -> Login {
    Login::OAuth(TokenSet {
        access: Secret::new(format!("access-{refresh}")),
        refresh: Some(Secret::new(refresh)),
        id: Some(Secret::new(format!("id-{refresh}"))),
        account_id: Some("account".to_owned()),
        last_refresh: time::OffsetDateTime::from_unix_timestamp_nanos(1_800_000_000_123_456_789)
            .ok(),
    })
}

async fn current(store: &SealedStore) -> Option<Login> {
    store.get().await.unwrap().1.login
}

fn same(one: Option<Login>, other: Option<Login>) -> bool {
    super::super::record::same_login(one.as_ref(), other.as_ref())
}

async fn rotate(store: &SealedStore, refresh: &str) -> Result<Cas, StoreError> {
    let (version, record) = store.get().await?;
    let login = oauth(refresh);
    let header = record.header.next_generation(&login);
    store.cas(version, Record { header, login: Some(login) }).await
}

#[tokio::test]
async fn keeps_a_login_in_every_form() {
    for keep in [Keep::File, Keep::Keyring, Keep::Auto] {
        let scene = Scene::new();
        let store = scene.store(keep);
        assert!(current(&store).await.is_none());
        assert!(!scene.path("").exists(), "reading makes nothing");
        store.put(Some(oauth("refresh-1")), None).await.unwrap();
        assert!(same(current(&store).await, Some(oauth("refresh-1"))), "{keep:?}");
        assert!(matches!(rotate(&store, "refresh-2").await, Ok(Cas::Done(_))));
        let (version, mut record) = scene.store(keep).get().await.unwrap();
        assert_eq!((record.header.line, record.header.generation), (2, 2));
        assert!(same(record.login.clone(), Some(oauth("refresh-2"))), "{keep:?}");
        assert_eq!(scene.text().contains("refresh-2"), keep == Keep::File, "{keep:?}");
        assert_eq!(store.place().contains("sealed"), keep != Keep::File, "{}", store.place());
        record.header.phase = Phase::Posting;
        assert!(matches!(store.cas(version, record.clone()).await, Ok(Cas::Done(_))));
        assert_eq!(store.cas(version, record).await.unwrap(), Cas::Conflict);
        store.put(None, None).await.unwrap();
        assert!(current(&store).await.is_none());
        assert!(!scene.text().contains("sealed") && !scene.text().contains("refresh-"));
        let mode = |name: &str| std::fs::metadata(scene.path(name)).unwrap().mode() & 0o777;
        assert_eq!((mode(""), mode("work.json")), (0o700, 0o600));
    }
}

#[tokio::test]
async fn a_login_without_its_key_is_not_missing_and_not_written_over() {
    for keep in [Keep::Keyring, Keep::Auto] {
        let scene = Scene::new();
        let store = scene.store(keep);
        store.put(Some(oauth("refresh-1")), None).await.unwrap();
        let (version, record) = store.get().await.unwrap();
        let before = scene.text();
        let moods = [(Mood::Locked, true), (Mood::Hanging, true), (Mood::Absent, false)];
        for (mood, is_locked) in moods {
            scene.ring.be(mood);
            let fresh = scene.store(keep);
            let error = fresh.get().await.unwrap_err();
            assert_eq!(matches!(error, StoreError::Locked { .. }), is_locked, "{mood:?} {error}");
            let swapped = fresh.cas(version, record.clone()).await;
            assert!(swapped.is_err(), "{mood:?} {swapped:?}");
            assert_eq!(scene.text(), before);
            scene.ring.be(Mood::Willing);
        }
        assert!(same(current(&store).await, Some(oauth("refresh-1"))));
        scene.ring.clear();
        assert!(matches!(store.get().await, Err(StoreError::Corrupt { .. })), "the key is lost");
        store.put(Some(oauth("refresh-9")), None).await.unwrap();
        assert!(same(current(&store).await, Some(oauth("refresh-9"))), "signing in again helps");
    }
}

#[tokio::test]
async fn auto_falls_back_to_a_private_file_and_stays_there_until_the_next_login() {
    for mood in [Mood::Locked, Mood::Absent, Mood::Failing, Mood::ReadOnly, Mood::Hanging] {
        let scene = Scene::new();
        scene.ring.be(mood);
        let store = scene.store(Keep::Auto);
        store.put(Some(oauth("refresh-1")), None).await.unwrap();
        assert!(scene.text().contains("refresh-1"), "{mood:?}");
        scene.ring.be(Mood::Willing);
        let store = scene.store(Keep::Auto);
        assert!(matches!(rotate(&store, "refresh-2").await, Ok(Cas::Done(_))));
        assert!(scene.text().contains("refresh-2"), "{mood:?}");
        store.put(Some(oauth("refresh-3")), None).await.unwrap();
        assert!(!scene.text().contains("refresh-"), "{mood:?}");
        assert!(same(current(&store).await, Some(oauth("refresh-3"))));
    }
    let scene = Scene::new();
    scene.ring.be(Mood::Locked);
    let error = scene.store(Keep::Keyring).put(Some(oauth("refresh-1")), None).await.unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(!scene.path("work.json").exists(), "`keyring` writes no token in the clear");
}

#[tokio::test]
async fn a_seal_opens_nowhere_else() {
    let scene = Scene::new();
    let store = scene.store(Keep::Keyring);
    store.put(Some(oauth("refresh-1")), None).await.unwrap();
    let old: serde_json::Value = serde_json::from_str(&scene.text()).unwrap();
    assert!(matches!(rotate(&store, "refresh-2").await, Ok(Cas::Done(_))));
    let new: serde_json::Value = serde_json::from_str(&scene.text()).unwrap();
    let put = |name: &str, value: &serde_json::Value| {
        std::fs::write(scene.path(name), value.to_string()).unwrap();
    };
    // The tokens of the generation before under the record of this one.
    let mut rolled_back = new.clone();
    rolled_back["sealed"] = old["sealed"].clone();
    // This record's numbers with those tokens, as if it had spoken of them.
    let mut renumbered = old.clone();
    renumbered["header"]["generation"] = new["header"]["generation"].clone();
    // One bit.
    let mut flipped = new.clone();
    let sealed = new["sealed"].as_str().unwrap();
    let last = sealed.len() - 6;
    let other = if sealed.as_bytes()[last] == b'A' { "B" } else { "A" };
    flipped["sealed"] = format!("{}{other}{}", &sealed[..last], &sealed[last + 1..]).into();
    let mut cut = new.clone();
    cut["sealed"] = sealed[..8].into();
    for changed in [rolled_back, renumbered, flipped, cut] {
        put("work.json", &changed);
        let error = store.get().await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    }
    put("work.json", &new);
    assert!(same(current(&store).await, Some(oauth("refresh-2"))));
    put("private.json", &new);
    let other = scene.named("private", Keep::Keyring, LIMIT);
    assert!(matches!(other.get().await, Err(StoreError::Corrupt { .. })), "another name");
}

#[tokio::test]
async fn of_many_that_make_the_key_and_swap_one_wins() {
    let scene = Scene::new();
    let names: Vec<String> = (0..8).map(|number| format!("login-{number}")).collect();
    let limit = Duration::from_secs(2);
    let puts = names.iter().map(|name| {
        let store = scene.named(name, Keep::Keyring, limit);
        async move { store.put(Some(oauth("refresh-1")), None).await.unwrap() }
    });
    futures_util::future::join_all(puts).await;
    for name in &names {
        let store = scene.named(name, Keep::Keyring, limit);
        assert!(same(current(&store).await, Some(oauth("refresh-1"))), "one key opens all");
    }
    let (version, record) = scene.named("login-0", Keep::Keyring, limit).get().await.unwrap();
    let swaps = (0..16).map(|number| {
        let store = scene.named("login-0", Keep::Keyring, limit);
        let mut next = record.clone();
        (next.header.phase, next.header.epoch) = (Phase::Claimed, number);
        async move { store.cas(version, next).await.unwrap() }
    });
    let ends = futures_util::future::join_all(swaps).await;
    assert_eq!(ends.iter().filter(|end| matches!(end, Cas::Done(_))).count(), 1, "{ends:?}");
}

#[tokio::test]
async fn leaves_alone_what_it_does_not_understand() {
    let scene = Scene::new();
    let store = scene.store(Keep::File);
    let error = store.put(Some(Login::ApiKey(Secret::new("k"))), None).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    store.put(Some(oauth("refresh-1")), None).await.unwrap();
    for text in ["", "{}", "{\"header\": \"refresh-1", "[]"] {
        std::fs::write(scene.path("work.json"), text).unwrap();
        let error = store.get().await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert!(!error.to_string().contains("refresh-1"), "{error}");
        assert_eq!(scene.text(), text);
    }
}

#[tokio::test]
async fn hears_of_changes() {
    let scene = Scene::new();
    let store = scene.store(Keep::File);
    store.put(Some(oauth("refresh-1")), None).await.unwrap();
    let mut changes = store.changes();
    store.get().await.unwrap();
    assert!(matches!(rotate(&scene.store(Keep::File), "refresh-2").await, Ok(Cas::Done(_))));
    let heard = tokio::time::timeout(Duration::from_secs(5), changes.changed()).await;
    heard.expect("a change is heard of").unwrap();
}
