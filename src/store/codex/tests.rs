//! The promises of a login in a Codex home, on real files.

use std::os::unix::fs::MetadataExt as _;

use super::super::{Phase, Redeemed};
use super::*;
use crate::credential::TokenSet;
use crate::secret::{Fingerprint, Secret};

struct Scene {
    folder: tempfile::TempDir,
    store: CodexStore,
}

fn file_store(home: &Path) -> CodexStore {
    CodexStore::new(home.to_owned(), Keep::File, Keyring::system(), Tasks::new())
}

impl Scene {
    fn new(auth_json: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = file_store(folder.path());
        let home = Self { folder, store };
        if let Some(text) = auth_json {
            home.write(text);
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path("auth.json"), text).unwrap();
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path("auth.json")).unwrap()
    }

    async fn get(&self) -> (Version, Record) {
        self.store.get().await.unwrap()
    }

    async fn cas(&self, expected: Version, record: &Record) -> Cas {
        self.store.cas(expected, record.clone()).await.unwrap()
    }

    /// Persists the record as it stands, in another phase.
    async fn mark(&self, phase: Phase) -> (Version, Record) {
        let (version, mut record) = self.get().await;
        record.header.phase = phase;
        assert!(matches!(self.cas(version, &record).await, Cas::Done(_)));
        self.get().await
    }
}

fn cache(refresh: &str, account: &str) -> String {
    format!(
        r#"{{"auth_mode":"chatgpt","x":[1],"tokens":{{"access_token":"a-{refresh}","refresh_token":"{refresh}","account_id":"{account}","y":{{}}}}}}"#
    )
}

fn set(record: &Record) -> &TokenSet {
    match &record.login {
        Some(Login::ChatGpt(set)) => set,
        other => panic!("no ChatGPT login: {other:?}"),
    }
}

fn rotated(record: &Record, refresh: &str) -> Record {
    let mut next = set(record).clone();
    next.access = Secret::new(format!("a-{refresh}"));
    next.refresh = Some(Secret::new(refresh));
    let login = Login::ChatGpt(next);
    Record { header: record.header.next_generation(&login), login: Some(login) }
}

#[tokio::test]
async fn a_missing_home_holds_no_login_and_is_made_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("no/such");
    let store = file_store(&home);
    let (_, record) = store.get().await.unwrap();
    assert!(record.login.is_none());
    assert!(!home.exists());
    store.put(Some(Login::ApiKey(Secret::new("sk-1"))), None).await.unwrap();
    let (_, record) = store.get().await.unwrap();
    assert!(matches!(record.login, Some(Login::ApiKey(_))));
    assert_eq!(
        std::fs::read_to_string(home.join("auth.json")).unwrap(),
        "{\n  \"auth_mode\": \"apikey\",\n  \"OPENAI_API_KEY\": \"sk-1\"\n}"
    );
    for (path, mode) in [("", 0o700), (".valetkey", 0o700), ("auth.json", 0o600)] {
        let found = std::fs::metadata(home.join(path)).unwrap().mode() & 0o777;
        assert_eq!(found, mode, "{path}");
    }
}

#[tokio::test]
async fn names_the_record_as_the_keyring_entry() {
    let home = Scene::new(Some(&cache("r1", "x")));
    home.mark(Phase::Claimed).await;
    let canonical = std::fs::canonicalize(home.folder.path()).unwrap();
    let hash = Fingerprint::of(canonical.to_str().unwrap().as_bytes()).to_hex();
    let sidecar = home.path(&format!(".valetkey/{}.json", &hash[..16]));
    assert_eq!(std::fs::metadata(&sidecar).unwrap().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(sidecar).unwrap();
    assert!(!text.contains("a-r1") && !text.contains("\"r1\"") && !text.contains("\"x\""));
}

#[tokio::test]
async fn a_home_that_is_seen_under_another_path_has_the_same_record() {
    let root = tempfile::tempdir().unwrap();
    let (here, there) = (root.path().join("here"), root.path().join("there"));
    std::fs::create_dir(&here).unwrap();
    std::fs::write(here.join("auth.json"), cache("r1", "x")).unwrap();
    let store = file_store(&here);
    let (version, mut record) = store.get().await.unwrap();
    record.header.phase = Phase::Posting;
    record.header.owner = "1".to_owned();
    assert!(matches!(store.cas(version, record.clone()).await, Ok(Cas::Done(_))));
    let journal = store.reserve(Stamp::of(&record)).await.unwrap().unwrap();
    let login = rotated(&record, "r2").login.unwrap();
    journal.keep(&Redeemed { login, lifetime: None, forced_at: None }).await.unwrap();
    drop(journal);
    // A container has it mounted elsewhere, or it was moved.
    std::fs::rename(&here, &there).unwrap();
    let store = file_store(&there);
    let (version, record) = store.get().await.unwrap();
    assert_eq!(record.header.phase, Phase::Posting);
    assert!(matches!(store.look_back(Stamp::of(&record)).await, Ok(Left::Answer(_))));
    assert!(matches!(store.cas(version, rotated(&record, "r2")).await, Ok(Cas::Done(_))));
    std::fs::rename(&there, &here).unwrap();
    assert_eq!(file_store(&here).get().await.unwrap().1.header.generation, 2);
}

#[tokio::test]
async fn rotates_and_keeps_what_is_unknown() {
    let home = Scene::new(Some(&cache("r1", "x")));
    let before = home.text();
    let (version, record) = home.mark(Phase::Posting).await;
    assert_eq!(home.text(), before, "a phase does not touch the cache");
    let Cas::Done(done) = home.cas(version, &rotated(&record, "r2")).await else {
        panic!("no conflict here")
    };
    let (now, after) = home.get().await;
    assert_eq!(now, done);
    assert_eq!((after.header.line, after.header.generation), (1, 2));
    assert_eq!(after.header.previous, record.header.refresh);
    let compact: String = home.text().split_whitespace().collect();
    assert_eq!(compact, cache("r2", "x"));
    assert_eq!(home.cas(version, &rotated(&record, "r3")).await, Cas::Conflict);
    let mode = |name: &str| std::fs::metadata(home.path(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("auth.json"), mode("auth.json.lock")), (0o600, 0o600));
    assert!(home.path("auth.lock").exists(), "Codex's first lock is taken too");
}

#[tokio::test]
async fn tells_who_wrote_the_cache() {
    let home = Scene::new(Some(&cache("r1", "x")));
    home.mark(Phase::Posting).await;
    let key = r#"{"OPENAI_API_KEY":"k"}"#;
    let steps: [(&str, u64, u64, Phase); 4] = [
        (&cache("r1", "x").replace("[1]", "[2]"), 1, 1, Phase::Posting),
        (&cache("r2", "x"), 1, 2, Phase::Idle),
        (&cache("r2", "other"), 2, 1, Phase::Idle),
        (key, 2, 1, Phase::Idle),
    ];
    for (text, line, generation, phase) in steps {
        home.write(text);
        let header = home.get().await.1.header;
        assert_eq!((header.line, header.generation), (line, generation), "{text}");
        assert_eq!(header.phase, phase, "{text}");
    }
    std::fs::remove_file(home.path("auth.json")).unwrap();
    let (_, record) = home.get().await;
    assert!(record.login.is_none());
    assert_eq!(record.header.line, 2);
}

#[tokio::test]
async fn a_write_between_read_and_swap_is_a_conflict() {
    let home = Scene::new(Some(&cache("r1", "x")));
    let (version, record) = home.get().await;
    home.write(&cache("r9", "x"));
    assert_eq!(home.cas(version, &rotated(&record, "r2")).await, Cas::Conflict);
    assert_eq!(home.text(), cache("r9", "x"));
}

#[tokio::test]
async fn of_many_that_swap_one_wins() {
    let home = Scene::new(Some(&cache("r1", "x")));
    let (version, record) = home.get().await;
    let swaps = (0..16).map(|n| {
        let store = file_store(home.folder.path());
        let next = rotated(&record, &format!("r-{n}"));
        async move { store.cas(version, next).await.unwrap() }
    });
    let ends = futures_util::future::join_all(swaps).await;
    let won = ends.iter().filter(|end| matches!(end, Cas::Done(_))).count();
    assert_eq!(won, 1, "{ends:?}");
}

#[tokio::test]
async fn of_many_that_claim_one_wins() {
    for _ in 0..5 {
        let home = Scene::new(Some(&cache("r1", "x")));
        let (version, record) = home.get().await;
        let claims = (0..16).map(|n| {
            let store = file_store(home.folder.path());
            let mut next = record.clone();
            (next.header.phase, next.header.epoch) = (Phase::Claimed, n);
            async move { store.cas(version, next).await.unwrap() }
        });
        let ends = futures_util::future::join_all(claims).await;
        let won = ends.iter().filter(|end| matches!(end, Cas::Done(_))).count();
        assert_eq!(won, 1, "{ends:?}");
    }
}

#[tokio::test]
async fn does_not_go_over_what_codex_writes_meanwhile() {
    let home = Scene::new(Some(&cache("r1", "x")));
    let (version, record) = home.get().await;
    let codex = file::lock(&home.path("auth.json.lock"), 0o600, Duration::ZERO).unwrap();
    let write = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        home.write(&cache("r9", "x"));
        drop(codex);
    };
    let next = rotated(&record, "r2");
    let (swapped, ()) = tokio::join!(home.cas(version, &next), write);
    assert_eq!(swapped, Cas::Conflict);
    assert_eq!(home.text(), cache("r9", "x"));
}

#[tokio::test]
async fn waits_for_codex_but_not_for_ever() {
    let home = Scene::new(Some(&cache("r1", "x")));
    let (version, record) = home.get().await;
    let held = file::lock(&home.path("auth.json.lock"), 0o600, Duration::ZERO).unwrap();
    let swap = home.cas(version, &record);
    assert!(matches!(swap.await, Cas::Done(_)), "a phase needs no lock of Codex");
    let (version, record) = home.get().await;
    let next = rotated(&record, "r2");
    let swap = home.store.cas(version, next);
    let release = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(held);
    };
    let (swapped, ()) = tokio::join!(swap, release);
    assert!(matches!(swapped.unwrap(), Cas::Done(_)));
}

#[tokio::test]
async fn leaves_a_broken_cache_alone() {
    let home = Scene::new(Some(r#"{"tokens": {"access_token": "a-sec"#));
    let before = home.text();
    let error = home.store.get().await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }));
    let said = error.to_string();
    assert!(said.contains("auth.json") && said.contains("line 1"), "{said}");
    assert!(!said.contains("a-sec"), "{said}");
    assert_eq!(home.text(), before);
    std::fs::remove_file(home.path("auth.json")).unwrap();
    std::os::unix::fs::symlink("/dev/null", home.path("auth.json")).unwrap();
    assert!(matches!(home.store.get().await, Err(StoreError::Denied { .. })));
}

#[expect(clippy::disallowed_methods, reason = "the test plays another program")]
#[tokio::test]
async fn never_reads_half_a_file() {
    let home = Scene::new(Some(&cache("r1", "x")));
    for _ in 0..20 {
        let (path, whole) = (home.path("auth.json"), cache("r2", "x"));
        let writer = std::thread::spawn(move || {
            // As Codex did before 0.169: cut off, then written in place.
            let mut file = std::fs::File::create(&path).unwrap();
            for part in whole.as_bytes().chunks(40) {
                std::io::Write::write_all(&mut file, part).unwrap();
                std::thread::yield_now();
            }
        });
        while !writer.is_finished() {
            assert!(home.get().await.1.login.is_some());
        }
        writer.join().unwrap();
    }
}

#[tokio::test]
async fn a_logout_removes_the_cache_and_a_login_replaces_it() {
    let home = Scene::new(Some(&cache("r1", "x")));
    home.mark(Phase::Unknown).await;
    home.store.put(None, None).await.unwrap();
    assert!(!home.path("auth.json").exists());
    let header = home.get().await.1.header;
    assert_eq!((header.line, header.generation, header.phase), (2, 1, Phase::Idle));
    home.write(&cache("r1", "x"));
    home.store.put(Some(Login::ApiKey(Secret::new("sk-2"))), None).await.unwrap();
    assert!(!home.text().contains("r1") && !home.text().contains("\"x\""));
    assert_eq!(home.get().await.1.header.line, 4);
}

#[tokio::test]
async fn hears_of_changes_also_in_a_home_made_later() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("later");
    let store = file_store(&home);
    let mut changes = store.changes();
    store.get().await.unwrap();
    std::fs::create_dir(&home).unwrap();
    store.get().await.unwrap();
    for text in [cache("r1", "x"), cache("r2", "x")] {
        std::fs::write(home.join("auth.json"), text).unwrap();
        let heard = tokio::time::timeout(Duration::from_secs(5), changes.changed()).await;
        heard.expect("a change is heard of").unwrap();
        // Everything that one write causes, so that the next change is the next write.
        tokio::time::sleep(Duration::from_millis(20)).await;
        changes.mark_unchanged();
    }
    store.get().await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!changes.has_changed().unwrap(), "our own reading is no change");
}

#[tokio::test]
async fn a_journal_is_beside_the_record_and_goes_with_the_login() {
    let scene = Scene::new(Some(&cache("r1", "acct")));
    let (version, mut record) = scene.get().await;
    record.header.owner = "0123".to_owned();
    assert!(matches!(scene.cas(version, &record).await, Cas::Done(_)));
    let stamp = Stamp::of(&record);
    let journal = scene.store.reserve(stamp.clone()).await.unwrap().unwrap();
    let ours = || {
        let entries = std::fs::read_dir(scene.path(".valetkey")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let journals =
        || ours().iter().filter(|it| it.to_string_lossy().ends_with(".0123.journal")).count();
    assert_eq!(journals(), 1);
    for path in ours() {
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
    }
    let next =
        Login::ChatGpt(TokenSet { refresh: Some(Secret::new("r2")), ..set(&record).clone() });
    let redeemed = Redeemed { login: next, lifetime: None, forced_at: None };
    journal.keep(&redeemed).await.unwrap();
    drop(journal);
    // Another process finds it; the owner's logout leaves nothing of it.
    let left = file_store(scene.folder.path()).look_back(stamp.clone()).await.unwrap();
    let Left::Answer(found) = left else { panic!("{left:?}") };
    assert!(record::same_login(Some(&found.login), Some(&redeemed.login)));
    scene.store.put(None, None).await.unwrap();
    assert_eq!(journals(), 0);
    assert!(matches!(scene.store.look_back(stamp).await, Ok(Left::Nothing)));
}
