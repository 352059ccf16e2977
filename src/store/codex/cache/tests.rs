//! The promises of a login that is in a keyring, or may be: on real files and a pretend keyring.

use std::time::Instant;

use time::OffsetDateTime;

use super::super::super::keyring::fake::{FakeRing, Mood};
use super::super::super::{Cas, Left, Phase, Record, RecordStore as _, Redeemed, Stamp};
use super::super::CodexStore;
use super::*;
use crate::credential::TokenSet;
use crate::secret::Secret;
use crate::tasks::Tasks;

fn login(refresh: &str, refreshed: Option<i64>) -> Login {
    Login::ChatGpt(TokenSet {
        access: Secret::new("a"),
        refresh: Some(Secret::new(refresh)),
        id: None,
        account_id: Some("x".to_owned()),
        last_refresh: refreshed
            .map(|at| OffsetDateTime::from_unix_timestamp(1_800_000_000 + at).unwrap()),
    })
}

#[test]
fn the_newer_place_counts() {
    use Spot::{Entry, File};
    // The generations that the record calls previous and current, then both places.
    let table = [
        (None, ("r1", None), ("r1", None), (Entry, false)),
        (None, ("r1", Some(2)), ("r1", Some(1)), (Entry, false)),
        (None, ("r1", Some(2)), ("r2", Some(1)), (File, true)),
        (None, ("r1", Some(1)), ("r2", Some(2)), (Entry, true)),
        (None, ("r1", Some(1)), ("r2", None), (Entry, false)),
        (None, ("r1", None), ("r2", Some(1)), (Entry, false)),
        (Some(("r1", "r2")), ("r1", Some(9)), ("r2", Some(1)), (Entry, true)),
        (Some(("r1", "r2")), ("r2", Some(1)), ("r1", Some(9)), (File, true)),
        (Some(("r1", "r2")), ("r1", None), ("r3", None), (Entry, true)),
        (Some(("r1", "r2")), ("r3", None), ("r1", None), (File, true)),
        (Some(("r0", "r1")), ("r1", None), ("r9", None), (File, false)),
        (Some(("r0", "r1")), ("r9", None), ("r1", None), (Entry, false)),
        (Some(("r0", "r1")), ("r8", None), ("r9", None), (Entry, false)),
    ];
    for (record, file, entry, (spot, is_certain)) in table {
        let header = record.map(|(previous, current)| {
            Header::first(Some(&login(previous, None))).next_generation(&login(current, None))
        });
        let chosen = choose(header.as_ref(), &login(file.0, file.1), &login(entry.0, entry.1));
        assert_eq!(chosen, Choice { spot, is_certain }, "{record:?} {file:?} {entry:?}");
    }
}

struct Scene {
    folder: tempfile::TempDir,
    ring: Arc<FakeRing>,
    keep: Keep,
    store: CodexStore,
}

/// Shorter than the real one, so that a hanging keyring does not hold up the tests.
const LIMIT: Duration = Duration::from_millis(800);

impl Scene {
    fn new(keep: Keep) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ring = FakeRing::new();
        let store = Self::store(&folder, keep, &ring);
        Self { folder, ring, keep, store }
    }

    fn store(folder: &tempfile::TempDir, keep: Keep, ring: &Arc<FakeRing>) -> CodexStore {
        let keyring = Keyring::with_limit(ring.clone(), LIMIT);
        CodexStore::new(folder.path().to_owned(), keep, keyring, Tasks::new())
    }

    fn entry(&self) -> Entry {
        self.store.home.cache.entry()
    }

    fn in_entry(&self, text: &str) {
        self.ring.put(&self.entry(), text);
    }

    fn in_file(&self, text: &str) {
        std::fs::write(self.folder.path().join("auth.json"), text).unwrap();
    }

    fn entry_text(&self) -> Option<String> {
        self.ring.peek(&self.entry().account)
    }

    fn file_text(&self) -> Option<String> {
        std::fs::read_to_string(self.folder.path().join("auth.json")).ok()
    }

    async fn get(&self) -> (Version, Record) {
        self.store.get().await.unwrap()
    }

    /// The refresh token of the login that counts.
    async fn current(&self) -> Option<String> {
        let login = self.get().await.1.login;
        login.map(|login| login.tokens().unwrap().refresh.as_ref().unwrap().expose().to_owned())
    }

    async fn error(&self) -> StoreError {
        self.store.get().await.unwrap_err()
    }

    async fn rotate(&self, refresh: &str, at: i64) -> Cas {
        let (version, record) = self.get().await;
        self.store.cas(version, rotated(&record, refresh, at)).await.unwrap()
    }

    async fn mark(&self, phase: Phase) {
        let (version, mut record) = self.get().await;
        record.header.phase = phase;
        assert!(matches!(self.store.cas(version, record).await.unwrap(), Cas::Done(_)));
    }

    /// Every file of the home, with what is in it.
    fn files(&self) -> String {
        fn walk(folder: &std::path::Path, all: &mut String) {
            for found in std::fs::read_dir(folder).unwrap() {
                let path = found.unwrap().path();
                if path.is_dir() {
                    walk(&path, all);
                } else {
                    let text = std::fs::read_to_string(&path).unwrap();
                    all.push_str(&format!("{} {text}\n", path.display()));
                }
            }
        }
        let mut all = String::new();
        walk(self.folder.path(), &mut all);
        all
    }
}

fn cache(refresh: &str, account: &str, at: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(1_800_000_000 + at).unwrap();
    let at = at.format(&time::format_description::well_known::Rfc3339).unwrap();
    format!(
        r#"{{"auth_mode":"chatgpt","x":[1],"tokens":{{"access_token":"a-{refresh}","refresh_token":"{refresh}","account_id":"{account}","y":{{}}}},"last_refresh":"{at}"}}"#
    )
}

fn rotated(record: &Record, refresh: &str, at: i64) -> Record {
    let mut set = record.login.as_ref().unwrap().tokens().unwrap().clone();
    set.access = Secret::new(format!("a-{refresh}"));
    set.refresh = Some(Secret::new(refresh));
    set.last_refresh = OffsetDateTime::from_unix_timestamp(1_800_000_000 + at).ok();
    let login = Login::ChatGpt(set);
    Record { header: record.header.next_generation(&login), login: Some(login) }
}

fn key(text: &str) -> Login {
    Login::ApiKey(Secret::new(text))
}

#[tokio::test]
async fn a_keyring_holds_what_codex_writes_and_no_file_does() {
    let scene = Scene::new(Keep::Keyring);
    scene.in_file(&cache("r-old", "x", 0));
    assert_eq!(scene.current().await, None, "the file is not looked at");
    scene.in_entry(&cache("r1", "x", 1));
    assert_eq!(scene.current().await.as_deref(), Some("r1"));
    scene.mark(Phase::Posting).await;
    assert_eq!(scene.entry_text().unwrap(), cache("r1", "x", 1), "a phase touches no token");
    assert!(matches!(scene.rotate("r2", 2).await, Cas::Done(_)));
    let compact = cache("r2", "x", 2).replace("Z\"", ".000000000Z\"");
    assert_eq!(scene.entry_text().unwrap(), compact, "what we do not know survives");
    let all = scene.files();
    assert!(!all.contains("auth.json {"), "{all}");
    assert!(!all.contains("a-r") && !all.contains("\"r2"), "no token is in a file: {all}");
    scene.store.put(Some(key("sk-1")), None).await.unwrap();
    assert_eq!(scene.entry_text().unwrap(), r#"{"auth_mode":"apikey","OPENAI_API_KEY":"sk-1"}"#);
    assert_eq!(scene.store.place(), scene.entry().to_string());
    assert!(!scene.files().contains("sk-1"));
    scene.store.put(None, None).await.unwrap();
    assert_eq!(scene.entry_text(), None);
    assert_eq!(scene.get().await.1.header.line, 3);
}

#[tokio::test]
async fn the_entry_is_named_as_codex_names_it() {
    let scene = Scene::new(Keep::Keyring);
    let home = std::fs::canonicalize(scene.folder.path()).unwrap();
    let hash = Fingerprint::of(home.to_str().unwrap().as_bytes()).to_hex();
    let entry = scene.entry();
    assert_eq!(
        (&*entry.service, &*entry.account),
        ("Codex Auth", &*format!("cli|{}", &hash[..16]))
    );
}

#[tokio::test]
async fn an_older_copy_is_deleted_and_never_refreshed_from() {
    for newer in [Spot::File, Spot::Entry] {
        let scene = Scene::new(Keep::Auto);
        let (file, entry) = if newer == Spot::File { (5, 1) } else { (1, 5) };
        scene.in_file(&cache(&format!("r{file}"), "x", file));
        scene.in_entry(&cache(&format!("r{entry}"), "x", entry));
        assert_eq!(scene.current().await.as_deref(), Some("r5"), "{newer:?}");
        assert_eq!(scene.store.place(), scene.store.home.cache.place(Some(newer)));
        let left = (scene.file_text().is_some(), scene.entry_text().is_some());
        assert_eq!(left, (newer == Spot::File, newer == Spot::Entry));
        assert!(matches!(scene.rotate("r6", 6).await, Cas::Done(_)));
        let left = (scene.file_text().is_some(), scene.entry_text().is_some());
        assert_eq!(
            left,
            (newer == Spot::File, newer == Spot::Entry),
            "saved where it was read from"
        );
    }
}

#[tokio::test]
async fn two_copies_of_one_login_become_one_when_it_is_refreshed() {
    let scene = Scene::new(Keep::Auto);
    scene.in_file(&cache("r1", "x", 1));
    scene.in_entry(&cache("r1", "x", 1));
    assert_eq!(scene.current().await.as_deref(), Some("r1"));
    assert!(scene.file_text().is_some(), "neither is older");
    assert!(matches!(scene.rotate("r2", 2).await, Cas::Done(_)));
    assert!(scene.entry_text().unwrap().contains("\"r2\""));
    assert_eq!(scene.file_text(), None);
}

#[tokio::test]
async fn a_spent_copy_is_not_fallen_back_on() {
    let scene = Scene::new(Keep::Auto);
    scene.in_entry(&cache("r1", "x", 1));
    assert!(matches!(scene.rotate("r2", 2).await, Cas::Done(_)));
    // What an older program, or a backup, leaves behind.
    scene.in_file(&cache("r1", "x", 9));
    for mood in [Mood::Locked, Mood::Absent, Mood::Failing] {
        scene.ring.be(mood);
        scene.error().await;
    }
    scene.ring.be(Mood::Willing);
    assert_eq!(scene.current().await.as_deref(), Some("r2"));
    assert_eq!(scene.file_text(), None);
}

#[tokio::test]
async fn a_locked_keyring_is_not_a_missing_login() {
    for (mood, is_locked) in [(Mood::Locked, true), (Mood::Hanging, true), (Mood::Failing, false)] {
        for keep in [Keep::Auto, Keep::Keyring] {
            let scene = Scene::new(keep);
            scene.ring.be(mood);
            let error = scene.error().await;
            assert_eq!(matches!(error, StoreError::Locked { .. }), is_locked, "{mood:?} {error}");
            assert!(error.to_string().contains("Codex Auth"), "{error}");
            scene.in_file(&cache("r1", "x", 1));
            match keep {
                Keep::Auto => assert_eq!(scene.current().await.as_deref(), Some("r1")),
                _ => drop(scene.error().await),
            }
            scene.ring.be(Mood::Willing);
        }
    }
}

/// A backup that is put back, say: its refresh token was sent long ago, and sending it again would end the login.
#[tokio::test]
async fn a_file_from_before_the_recorded_login_does_not_count_for_it() {
    for mood in [Mood::Failing, Mood::Locked, Mood::Absent] {
        let scene = Scene::new(Keep::Auto);
        scene.in_entry(&cache("r1", "x", 1));
        for (refresh, at) in [("r2", 2), ("r3", 3)] {
            assert!(matches!(scene.rotate(refresh, at).await, Cas::Done(_)));
        }
        scene.ring.be(mood);
        scene.in_file(&cache("r1", "x", 1));
        let error = scene.error().await;
        assert!(error.to_string().contains("Codex Auth"), "{mood:?} {error}");
        // Somebody has signed in since.
        scene.in_file(&cache("r9", "x", 9));
        assert_eq!(scene.current().await.as_deref(), Some("r9"), "{mood:?}");
    }
}

#[tokio::test]
async fn a_machine_without_a_keyring_keeps_logins_in_files() {
    let scene = Scene::new(Keep::Auto);
    scene.ring.be(Mood::Absent);
    assert_eq!(scene.current().await, None);
    scene.store.put(Some(login("r1", Some(1))), None).await.unwrap();
    assert_eq!(scene.store.place(), scene.folder.path().join("auth.json").display().to_string());
    assert!(matches!(scene.rotate("r2", 2).await, Cas::Done(_)));
    assert!(scene.file_text().unwrap().contains("r2"));
    scene.store.put(None, None).await.unwrap();
    assert_eq!(scene.file_text(), None);
    let only = Scene::new(Keep::Keyring);
    only.ring.be(Mood::Absent);
    let error = only.error().await;
    assert!(matches!(error, StoreError::NoKeyring { .. }), "{error}");
    let error = only.store.put(Some(key("sk-1")), None).await.unwrap_err();
    assert!(matches!(error, StoreError::NoKeyring { .. }), "{error}");
    assert!(!only.files().contains("sk-1"));
}

#[tokio::test]
async fn a_new_login_prefers_the_keyring() {
    let scene = Scene::new(Keep::Auto);
    scene.in_file(&cache("r1", "x", 1));
    scene.store.put(Some(login("r2", Some(2))), None).await.unwrap();
    assert_eq!(scene.file_text(), None);
    assert!(scene.entry_text().unwrap().contains("r2"));
    for (number, mood) in
        [Mood::ReadOnly, Mood::Locked, Mood::Failing, Mood::Hanging].iter().enumerate()
    {
        scene.ring.be(*mood);
        let refresh = format!("r{}", number + 3);
        let at = i64::try_from(number).unwrap() + 3;
        scene.store.put(Some(login(&refresh, Some(at))), None).await.unwrap();
        assert!(scene.file_text().unwrap().contains(&refresh), "{mood:?}");
        assert!(scene.store.place().ends_with("auth.json"));
        assert_eq!(scene.current().await, Some(refresh), "{mood:?}");
    }
    scene.ring.be(Mood::Willing);
    // The question that the keyring was given up on may be answered first.
    assert_eq!(scene.current().await.as_deref(), Some("r6"));
}

#[tokio::test]
async fn a_write_that_gets_no_answer_may_have_happened() {
    for happens in [true, false] {
        let scene = Scene::new(Keep::Keyring);
        scene.in_entry(&cache("r1", "x", 1));
        scene.mark(Phase::Posting).await;
        let (version, record) = scene.get().await;
        scene.ring.be(Mood::HangingWrites);
        let begun = Instant::now();
        let ended = scene.store.cas(version, rotated(&record, "r2", 2)).await.unwrap();
        assert_eq!(ended, Cas::Unknown);
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(
            matches!(scene.error().await, StoreError::Locked { .. }),
            "nobody asks it meanwhile"
        );
        scene.ring.be(if happens { Mood::Willing } else { Mood::ReadOnly });
        let now = scene.get().await.1;
        let expected = if happens { (2, Phase::Idle) } else { (1, Phase::Posting) };
        assert_eq!((now.header.generation, now.header.phase), expected);
    }
}

#[tokio::test]
async fn of_many_that_swap_an_entry_one_wins() {
    for keep in [Keep::Keyring, Keep::Auto] {
        let scene = Scene::new(keep);
        scene.in_entry(&cache("r1", "x", 1));
        let (version, record) = scene.get().await;
        let swaps = (0..16).map(|n| {
            let keyring = Keyring::over(scene.ring.clone());
            let home = scene.folder.path().to_owned();
            let store = CodexStore::new(home, scene.keep, keyring, Tasks::new());
            let next = rotated(&record, &format!("r-{n}"), 2);
            async move { store.cas(version, next).await.unwrap() }
        });
        let ends = futures_util::future::join_all(swaps).await;
        let won = ends.iter().filter(|end| matches!(end, Cas::Done(_))).count();
        assert_eq!(won, 1, "{ends:?}");
        assert_eq!(scene.file_text(), None);
    }
}

#[tokio::test]
async fn does_not_go_over_an_entry_that_it_has_not_read() {
    for keep in [Keep::Keyring, Keep::Auto] {
        let scene = Scene::new(keep);
        scene.in_entry(&cache("r1", "x", 1));
        let (version, record) = scene.get().await;
        scene.in_entry(&cache("r9", "x", 9));
        let ended = scene.store.cas(version, rotated(&record, "r2", 2)).await.unwrap();
        assert_eq!(ended, Cas::Conflict);
        assert_eq!(scene.current().await.as_deref(), Some("r9"));
    }
}

#[tokio::test]
async fn a_logout_says_what_it_could_not_delete() {
    for keep in [Keep::Keyring, Keep::Auto] {
        for mood in [Mood::Locked, Mood::ReadOnly, Mood::Ending, Mood::Hanging] {
            let scene = Scene::new(keep);
            scene.in_file(&cache("r1", "x", 1));
            scene.in_entry(&cache("r2", "x", 2));
            scene.ring.be(mood);
            let error = scene.store.put(None, None).await.unwrap_err();
            assert!(matches!(error, StoreError::Remains { .. }), "{keep:?} {mood:?} {error}");
            assert!(error.to_string().contains("Codex Auth"), "{error}");
            assert_eq!(scene.file_text(), None, "{keep:?} {mood:?}");
            scene.ring.be(Mood::Willing);
        }
    }
}

#[tokio::test]
async fn an_encrypted_login_of_codex_is_explained() {
    for keep in [Keep::File, Keep::Keyring, Keep::Auto] {
        let scene = Scene::new(keep);
        std::fs::create_dir(scene.folder.path().join("secrets")).unwrap();
        std::fs::write(scene.folder.path().join("secrets/cli_auth.age"), "age").unwrap();
        let error = scene.error().await;
        assert!(matches!(error, StoreError::Encrypted { .. }), "{error}");
        assert!(error.to_string().contains("secret_auth_storage"), "{error}");
        scene.store.put(Some(login("r1", Some(1))), None).await.unwrap();
        assert_eq!(scene.current().await.as_deref(), Some("r1"));
    }
}

#[tokio::test]
async fn an_entry_that_makes_no_sense_is_left_alone() {
    let scene = Scene::new(Keep::Keyring);
    scene.in_entry(r#"{"tokens": {"access_token": "a-sec"#);
    let error = scene.error().await;
    assert!(matches!(error, StoreError::Corrupt { .. }));
    assert!(!error.to_string().contains("a-sec"), "{error}");
    scene.ring.clear();
    assert_eq!(scene.current().await, None);
}

#[tokio::test]
async fn a_session_without_a_keyring_takes_no_answer_that_was_left() {
    let scene = Scene::new(Keep::Auto);
    scene.store.put(Some(login("r1", None)), None).await.unwrap();
    let claimed = async |store: &CodexStore, owner: &str| {
        let mut record = store.get().await.unwrap().1;
        record.header.owner = owner.to_owned();
        store.reserve(Stamp::of(&record)).await.unwrap().unwrap()
    };
    let journal = claimed(&scene.store, "1").await;
    let redeemed = Redeemed { login: login("r2", Some(1)), lifetime: None, forced_at: None };
    journal.keep(&redeemed).await.unwrap();
    drop(journal);
    // Somebody looks from where there is no desktop: over SSH, or as a service. There is no login for them, or another.
    scene.ring.be(Mood::Absent);
    for in_file in [None, Some(login("r9", None))] {
        if let Some(login) = &in_file {
            let text = AuthJson::of(login).unwrap().to_bytes().unwrap();
            std::fs::write(scene.folder.path().join("auth.json"), text).unwrap();
        }
        let elsewhere = Scene::store(&scene.folder, Keep::Auto, &scene.ring);
        let (_, record) = elsewhere.get().await.unwrap();
        assert_eq!(record.login.is_some(), in_file.is_some());
        assert!(matches!(elsewhere.look_back(Stamp::of(&record)).await, Ok(Left::Nothing)));
        if in_file.is_some() {
            drop(claimed(&elsewhere, "2").await);
        }
    }
    std::fs::remove_file(scene.folder.path().join("auth.json")).unwrap();
    for keep in [Keep::File, Keep::Auto] {
        let elsewhere = Scene::store(&scene.folder, keep, &scene.ring);
        let (_, record) = elsewhere.get().await.unwrap();
        drop(elsewhere.look_back(Stamp::of(&record)).await.unwrap());
    }
    scene.ring.be(Mood::Willing);
    let back = Scene::store(&scene.folder, Keep::Auto, &scene.ring);
    let (_, record) = back.get().await.unwrap();
    let left = back.look_back(Stamp::of(&record)).await.unwrap();
    assert!(matches!(left, Left::Answer(_)), "{left:?}");
}
