//! The promises of journals, on real files and a pretend keyring.

use std::os::unix::fs::MetadataExt as _;

use super::super::keyring::fake::{FakeRing, Mood};
use super::*;
use crate::credential::TokenSet;
use crate::secret::Secret;

struct Scene {
    root: tempfile::TempDir,
    ring: Arc<FakeRing>,
    keyring: Arc<Keyring>,
    in_keyring: bool,
}

impl Scene {
    fn new(in_keyring: bool) -> Self {
        let ring = FakeRing::new();
        let keyring = Keyring::with_limit(ring.clone(), Duration::from_millis(400));
        Self { root: tempfile::tempdir().unwrap(), ring, keyring, in_keyring }
    }

    fn journals(&self) -> Journals<'_> {
        self.named("work")
    }

    fn named(&self, name: &str) -> Journals<'_> {
        let folder = self.root.path().to_owned();
        Journals {
            folder,
            name: name.to_owned(),
            keyring: &self.keyring,
            in_keyring: self.in_keyring,
        }
    }

    fn reserve(&self, stamp: &Stamp) -> Box<dyn Journal> {
        self.journals().reserve(stamp.clone(), &Current::all(stamp.clone()), Tasks::new()).unwrap()
    }

    fn left(&self, stamp: &Stamp) -> Left {
        self.journals().look_and_tidy(stamp, || Ok(Current::all(stamp.clone()))).unwrap()
    }

    fn files(&self) -> usize {
        self.journals().paths().unwrap().len()
    }
}

fn set(refresh: &str) -> TokenSet {
    TokenSet {
        access: Secret::new(format!("access-{refresh}")),
        refresh: Some(Secret::new(refresh)),
        id: Some(Secret::new("id")),
        account_id: Some("account".to_owned()),
        last_refresh: OffsetDateTime::from_unix_timestamp_nanos(1_800_000_000_123_456_789).ok(),
    }
}

fn record(owner: &str) -> Record {
    let login = Login::ChatGpt(set("r0"));
    let header = Header { owner: owner.to_owned(), epoch: 3, ..Header::first(Some(&login)) };
    Record { header, login: Some(login) }
}

fn redeemed(refresh: &str) -> Redeemed {
    let login = Login::ChatGpt(set(refresh));
    Redeemed { login, lifetime: Some(Duration::from_secs(3600)), forced_at: None }
}

/// What is left, in a word: the refresh token of an answer.
fn word(left: Left) -> String {
    match left {
        Left::Nothing => "nothing".to_owned(),
        Left::Abandoned => "abandoned".to_owned(),
        Left::Answer(redeemed) => {
            assert_eq!(redeemed.lifetime, Some(Duration::from_secs(3600)));
            let set = redeemed.login.tokens().unwrap();
            assert_eq!(set.account_id.as_deref(), Some("account"));
            set.refresh.as_ref().unwrap().expose().to_owned()
        }
    }
}

#[tokio::test]
async fn an_answer_outlives_its_owner() {
    for in_keyring in [false, true] {
        let scene = Scene::new(in_keyring);
        let stamp = Stamp::of(&record("a"));
        assert_eq!(word(scene.left(&stamp)), "nothing");
        let journal = scene.reserve(&stamp);
        assert_eq!(word(scene.left(&stamp)), "nothing", "its owner may still write");
        journal.keep(&redeemed("r1")).await.unwrap();
        journal.keep(&redeemed("r1")).await.unwrap();
        assert_eq!(word(scene.left(&stamp)), "r1");
        drop(journal);
        assert_eq!(word(scene.left(&stamp)), "r1");
        // The phase, and who claims it now, are of no matter.
        let other = Stamp { owner: "b".to_owned(), epoch: 9, ..stamp.clone() };
        assert_eq!(word(scene.left(&other)), "r1");
        assert_eq!(scene.root.path().join("journal.key").exists(), !in_keyring);
    }
}

#[tokio::test]
async fn has_all_its_room_before_anything_is_sent_and_takes_no_more() {
    let scene = Scene::new(false);
    let stamp = Stamp::of(&record("a"));
    let journal = scene.reserve(&stamp);
    let about = std::fs::metadata(scene.journals().path("a")).unwrap();
    assert_eq!((about.len(), about.mode() & 0o7777), (64 * 1024, 0o600));
    assert!(about.blocks() * 512 >= 64 * 1024, "there are holes in it");
    journal.keep(&redeemed("r1")).await.unwrap();
    let kept = std::fs::metadata(scene.journals().path("a")).unwrap();
    assert_eq!((kept.len(), kept.blocks()), (about.len(), about.blocks()));
    let text = std::fs::read(scene.journals().path("a")).unwrap();
    let holds = |needle: &str| memchr::memmem::find(&text, needle.as_bytes()).is_some();
    assert!(!holds("access-"), "a token is there in the clear");
    journal.forget().await;
    assert_eq!((scene.files(), word(scene.left(&stamp))), (0, "nothing".to_owned()));
}

#[tokio::test]
async fn tells_when_an_owner_has_died_without_an_answer() {
    let scene = Scene::new(false);
    let stamp = Stamp::of(&record("a"));
    drop(scene.reserve(&stamp));
    assert_eq!(word(scene.left(&stamp)), "abandoned");
    // Another claim is somebody else's business.
    let (mut later, mut theirs) = (stamp.clone(), stamp.clone());
    later.epoch = 4;
    theirs.owner = "b".to_owned();
    for other in [later, theirs] {
        assert_eq!(word(scene.left(&other)), "nothing", "{other:?}");
    }
    // The same owner goes on with another.
    let journal = scene.reserve(&stamp);
    assert_eq!(word(scene.left(&stamp)), "nothing");
    drop(journal);
}

#[tokio::test]
async fn a_torn_answer_is_none() {
    let scene = Scene::new(false);
    let stamp = Stamp::of(&record("a"));
    let journal = scene.reserve(&stamp);
    journal.keep(&redeemed("r1")).await.unwrap();
    drop(journal);
    let path = scene.journals().path("a");
    let whole = std::fs::read(&path).unwrap();
    let end = NOTE_ROOM + memchr::memchr(b'\n', &whole[NOTE_ROOM..]).unwrap();
    for at in (NOTE_ROOM..=end).step_by(7).chain([end]) {
        let mut torn = whole.clone();
        torn[at..].fill(0);
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(word(scene.left(&stamp)), "abandoned", "torn at {at} of {end}");
        std::fs::write(&path, &whole[..at]).unwrap();
        assert_eq!(word(scene.left(&stamp)), "abandoned", "cut at {at} of {end}");
        let mut other = whole.clone();
        other[at] ^= 1;
        std::fs::write(&path, &other).unwrap();
        assert_eq!(word(scene.left(&stamp)), "abandoned", "changed at {at} of {end}");
    }
    // A note that is changed opens nothing either, nor does the journal under another name.
    let text = String::from_utf8_lossy(&whole[..NOTE_ROOM]).replace("\"epoch\":3", "\"epoch\":4");
    std::fs::write(&path, [text.as_bytes(), &whole[NOTE_ROOM..]].concat()).unwrap();
    assert_eq!(word(scene.left(&stamp)), "nothing");
    std::fs::write(scene.named("other").path("a"), &whole).unwrap();
    assert_eq!(word(scene.named("other").look(&stamp).unwrap().0), "abandoned");
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(word(scene.left(&stamp)), "r1");
}

#[tokio::test]
async fn sweeps_what_is_superseded_and_nothing_that_is_held_or_of_others() {
    let scene = Scene::new(false);
    let old = Stamp::of(&record("a"));
    let held = scene.reserve(&old);
    held.keep(&redeemed("r1")).await.unwrap();
    let mut next =
        Stamp { owner: "b".to_owned(), ..Stamp::of(&redeemed("r1").over(&record("a").header)) };
    let neighbour = scene
        .named("work.more")
        .reserve(old.clone(), &Current::all(old.clone()), Tasks::new())
        .unwrap();
    drop(neighbour);
    std::fs::write(scene.journals().path("c"), "garbage").unwrap();
    std::fs::write(scene.root.path().join("notes.txt"), "a person's").unwrap();
    assert_eq!(word(scene.left(&next)), "nothing");
    assert_eq!(scene.files(), 1, "the garbage is gone, and what is held is not");
    drop(held);
    assert_eq!(word(scene.left(&next)), "nothing");
    assert_eq!(scene.files(), 0);
    assert!(scene.named("work.more").path("a").exists());
    assert!(scene.root.path().join("notes.txt").exists());
    // Whoever holds the lock of the folder is not disturbed.
    let journal = scene.reserve(&old);
    drop(journal);
    let lock = file::lock_folder(scene.root.path(), Duration::ZERO).unwrap();
    next.generation += 1;
    assert_eq!(word(scene.left(&next)), "nothing");
    assert_eq!(scene.files(), 1);
    drop(lock);
    assert_eq!((word(scene.left(&next)), scene.files()), ("nothing".to_owned(), 0));
}

#[tokio::test]
async fn of_many_that_died_in_one_generation_no_more_is_left_than_somebody_needs() {
    let scene = Scene::new(false);
    let first = Stamp::of(&record("a"));
    let claim = |number: u64| Stamp { owner: format!("{number}"), epoch: number, ..first.clone() };
    for number in 0..20 {
        drop(scene.reserve(&claim(number)));
    }
    assert_eq!(scene.files(), 1);
    assert_eq!(word(scene.left(&claim(19))), "abandoned");
    // Without a claim of anybody's none of them is needed, nor when it is another's.
    assert_eq!((word(scene.left(&claim(20))), scene.files()), ("nothing".to_owned(), 0));
    // What is held may still be written into, and an answer is for whoever looks.
    let held = scene.reserve(&claim(21));
    let journal = scene.reserve(&claim(22));
    journal.keep(&redeemed("r1")).await.unwrap();
    drop(journal);
    assert_eq!((word(scene.left(&claim(23))), scene.files()), ("r1".to_owned(), 2));
    drop(held);
    assert_eq!((word(scene.left(&claim(23))), scene.files()), ("r1".to_owned(), 1));
}

#[tokio::test]
async fn an_answer_is_not_swept_by_somebody_who_has_slept() {
    let scene = Scene::new(false);
    let old = Stamp::of(&record("a"));
    // One generation on, an owner dies with an answer, while somebody still thinks of the one before.
    let now =
        Stamp { owner: "b".to_owned(), ..Stamp::of(&redeemed("r1").over(&record("a").header)) };
    let journal = scene.reserve(&now);
    journal.keep(&redeemed("r2")).await.unwrap();
    drop(journal);
    let left = scene.journals().look_and_tidy(&old, || Ok(Current::all(now.clone()))).unwrap();
    assert_eq!(word(left), "nothing");
    let late = scene.journals().reserve(old, &Current::all(now.clone()), Tasks::new()).unwrap();
    assert_eq!(word(scene.left(&now)), "r2");
    drop(late);
}

#[tokio::test]
async fn what_cannot_be_read_is_never_taken_for_nothing() {
    let scene = Scene::new(true);
    let stamp = Stamp::of(&record("a"));
    let journal = scene.reserve(&stamp);
    journal.keep(&redeemed("r1")).await.unwrap();
    drop(journal);
    scene.ring.be(Mood::Locked);
    let error = scene.journals().look(&stamp).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    // Nor is anything reserved that could not be sealed.
    assert!(
        scene
            .journals()
            .reserve(stamp.clone(), &Current::all(stamp.clone()), Tasks::new())
            .is_err()
    );
    scene.ring.be(Mood::Willing);
    // Nor over an answer that is there.
    assert!(
        scene
            .journals()
            .reserve(stamp.clone(), &Current::all(stamp.clone()), Tasks::new())
            .is_err()
    );
    assert_eq!(word(scene.left(&stamp)), "r1");
    // A link is no journal of ours.
    let link = scene.named("linked").path("b");
    std::os::unix::fs::symlink(scene.journals().path("a"), &link).unwrap();
    let error = scene.named("linked").look(&stamp).unwrap_err();
    assert!(error.to_string().ends_with("it is a symbolic link"), "{error}");
}

#[test]
fn the_same_tokens_are_the_same_generation_when_their_record_was_lost() {
    let known = Stamp::of(&record("a"));
    let table = [
        (Stamp { line: 1, generation: 7, ..known.clone() }, true),
        (Stamp { access: None, ..known.clone() }, true),
        (Stamp { generation: 7, access: None, ..known.clone() }, false),
        (Stamp { refresh: None, ..known.clone() }, false),
        (Stamp { refresh: Some(Fingerprint::of(b"r1")), ..known.clone() }, false),
    ];
    for (other, same) in table {
        assert_eq!(known.is_same_generation(&other), same, "{other:?}");
        assert_eq!(other.is_same_generation(&known), same, "{other:?}");
    }
}
