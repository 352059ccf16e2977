//! The local CA on disk and over time.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use super::*;

type Spoiler = (fn(&Path), &'static str);

fn hosts(names: &[&str]) -> Vec<Host> {
    names.iter().map(|name| Host::parse(name).unwrap()).collect()
}

fn host(name: &str) -> Host {
    Host::parse(name).unwrap()
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("valetkey/ca");
    (temp, dir)
}

fn key_file(dir: &Path) -> PathBuf {
    let mut files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|end| end == "key")).unwrap()
}

fn key_of(dir: &Path, root: &Root) -> PathBuf {
    dir.join(format!("root-{}.key", &root.spki().to_hex()[..16]))
}

fn delete_key(dir: &Path, root: &Root) {
    fs::remove_file(key_of(dir, root)).unwrap();
}

fn retired_file(dir: &Path, root: &Root) -> PathBuf {
    dir.join("retired").join(format!("root-{}.pem", &root.spki().to_hex()[..16]))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_key_is_ours_alone_and_the_certificate_is_not() {
    let (_temp, dir) = folder();
    let ca = LocalCa::open(&dir, &hosts(&["a.example"]), Clock::system()).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&key_file(&dir)), 0o600);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    let certificate = ca.roots()[0].path().unwrap();
    assert_eq!(fs::read_to_string(certificate).unwrap(), ca.roots()[0].pem());
    assert!(!ca.roots()[0].pem().contains("PRIVATE"));
    assert!(!format!("{ca:?}").contains("PRIVATE"));
}

#[test]
#[expect(clippy::needless_collect, reason = "all threads start before the first is waited for")]
fn concurrent_first_starts_get_one_root() {
    let (_temp, dir) = folder();
    let start = std::sync::Barrier::new(8);
    let open = || {
        start.wait();
        let ca = LocalCa::open(&dir, &hosts(&["a.example"]), Clock::system()).unwrap();
        ca.prepare().unwrap();
        ca.roots().iter().map(Root::fingerprint).collect::<Vec<_>>()
    };
    let seen: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(seen.iter().all(|roots| roots.len() == 1 && *roots == seen[0]), "{seen:?}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "the losers' keys are gone");
}

#[test]
fn concurrent_starts_with_other_names_get_a_root_each() {
    let (_temp, dir) = folder();
    std::thread::scope(|scope| {
        for index in 0..8 {
            let name = host(&format!("host{index}.example"));
            let dir = &dir;
            scope.spawn(move || {
                let ca = LocalCa::open(dir, std::slice::from_ref(&name), Clock::system());
                assert!(ca.unwrap().permits(&name));
            });
        }
    });
    assert_eq!(LocalCa::load_roots(&dir).unwrap().len(), 8);
}

#[test]
fn a_host_stays_under_the_oldest_root_that_permits_it() {
    let (_temp, dir) = folder();
    let open = |names: &[&str]| LocalCa::open(&dir, &hosts(names), Clock::system()).unwrap();
    let first = open(&["old.example", "api.wide.example"]);
    assert_eq!(open(&["old.example"]).roots().len(), 1, "fewer names need no new root");
    let grown = open(&["old.example", "new.example", "wide.example", "127.0.0.1"]);
    assert_eq!(grown.roots().len(), 2);
    assert_eq!(grown.roots()[0].fingerprint(), first.roots()[0].fingerprint());
    let table = [
        ("old.example", Some(0)),
        ("api.wide.example", Some(0)),
        ("web.wide.example", Some(1)),
        ("new.example", Some(1)),
        ("127.0.0.1", Some(1)),
        ("127.0.0.2", None),
        ("other.example", None),
    ];
    for (name, root) in table {
        let found = grown.permits(&host(name)).then(|| grown.signing_root(&host(name)));
        assert_eq!(found.flatten(), root, "{name}");
        assert_eq!(grown.intermediate(&host(name)).is_ok(), root.is_some(), "{name}");
    }
    let narrowed = open(&["new.example"]);
    assert!(!narrowed.permits(&host("old.example")), "its root would, no rule does");
    let again: Vec<_> =
        LocalCa::load_roots(&dir).unwrap().iter().map(|root| root.names().to_vec()).collect();
    assert_eq!(again[0], Names::new(&hosts(&["old.example", "api.wide.example"])).hosts());
    assert_eq!(again.len(), 2);
}

#[test]
fn without_names_nothing_is_made_and_nothing_signed() {
    let (_temp, dir) = folder();
    let on_disk = LocalCa::open(&dir, &[], Clock::system()).unwrap();
    assert!(on_disk.roots().is_empty() && !dir.exists());
    for ca in [on_disk, LocalCa::ephemeral(&[], Clock::system()).unwrap()] {
        ca.prepare().unwrap();
        assert!(!ca.permits(&host("a.example")));
        assert!(matches!(ca.intermediate(&host("a.example")), Err(CaError::NotPermitted(_))));
    }
}

#[test]
fn keys_that_others_could_have_touched_are_refused() {
    let names = hosts(&["a.example"]);
    let outcome = |spoil: fn(&Path)| {
        let (_temp, dir) = folder();
        LocalCa::open(&dir, &names, Clock::system()).unwrap();
        spoil(&dir);
        let ca = LocalCa::open(&dir, &names, Clock::system())?;
        ca.prepare().map(|()| ca.roots().len())
    };
    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let spoilers: [Spoiler; 5] = [
        (|dir| chmod(&key_file(dir), 0o640), "is open to other users"),
        (|dir| chmod(&key_file(dir), 0o604), "is open to other users"),
        (|dir| chmod(dir, 0o770), "is open to other users"),
        (
            |dir| {
                let key = key_file(dir);
                fs::rename(&key, dir.join("elsewhere")).unwrap();
                symlink(dir.join("elsewhere"), &key).unwrap();
            },
            "is a symbolic link",
        ),
        (
            |dir| {
                let key = key_file(dir);
                fs::remove_file(&key).unwrap();
                fs::create_dir(&key).unwrap();
            },
            "is not a plain file",
        ),
    ];
    for (spoil, expected) in spoilers {
        let error = outcome(spoil).unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
        assert!(error.hint().is_some(), "{error}");
    }
    let broken: [Spoiler; 3] = [
        (|dir| fs::write(key_file(dir), "junk").unwrap(), "no P-256 key"),
        (|dir| fs::write(dir.join("root-1.pem"), "junk").unwrap(), "not one certificate"),
        (
            |dir| {
                let other = KeyPair::generate().unwrap().serialize_pem();
                fs::write(key_file(dir), other).unwrap();
            },
            "not the key of its root",
        ),
    ];
    for (spoil, expected) in broken {
        let error = outcome(spoil).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    if rustix::process::geteuid().is_root() {
        let error = outcome(|dir| chown(key_file(dir), Some(65534), None).unwrap()).unwrap_err();
        assert!(error.to_string().ends_with("belongs to another user"), "{error}");
    }
    let without_key: fn(&Path) = |dir| fs::remove_file(key_file(dir)).unwrap();
    assert_eq!(outcome(without_key).unwrap(), 2, "a root without a key is handed out, not used");
}

#[test]
fn a_foreign_certificate_is_no_root() {
    let (_temp, dir) = folder();
    LocalCa::open(&dir, &hosts(&["a.example"]), Clock::system()).unwrap();
    let foreign = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    fs::write(dir.join("root-2.pem"), foreign.cert.pem()).unwrap();
    let error = LocalCa::load_roots(&dir).unwrap_err();
    assert!(error.to_string().contains("root-2.pem"), "{error}");
}

#[test]
fn roots_are_found_among_anything() {
    let ca = LocalCa::ephemeral(&hosts(&["a.example"]), Clock::system()).unwrap();
    let ours = ca.roots()[0].pem();
    let foreign = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let (foreign, key) = (foreign.cert.pem(), foreign.signing_key.serialize_pem());
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (text, expected) in [
        (format!("# roots\n{foreign}{key}{broken}{ours}words\n{foreign}"), 1),
        (format!("{ours}{ours}"), 2),
        (format!("{foreign}{broken}"), 0),
        (String::new(), 0),
    ] {
        let found = Root::among(text.as_bytes());
        assert_eq!(found.len(), expected, "{text}");
        assert!(found.iter().all(|root| root.fingerprint() == ca.roots()[0].fingerprint()));
        assert!(found.iter().all(|root| !root.signs()), "a certificate alone signs nothing");
    }
}

#[test]
fn intermediates_are_renewed_at_half_their_life() {
    let (_temp, dir) = folder();
    let (clock, a) = (Clock::system(), host("a.example"));
    let ca = LocalCa::open(&dir, std::slice::from_ref(&a), clock.clone()).unwrap();
    let serving = || ca.intermediate(&a);
    let first = serving().unwrap();
    clock.advance(Duration::hours(83));
    assert!(Arc::ptr_eq(&serving().unwrap(), &first));
    clock.advance(Duration::hours(2));
    let second = serving().unwrap();
    assert!(!Arc::ptr_eq(&second, &first));
    fs::remove_file(key_file(&dir)).unwrap();
    clock.advance(Duration::days(6));
    assert!(Arc::ptr_eq(&serving().unwrap(), &second), "the old one serves when renewal fails");
    clock.advance(Duration::days(2));
    assert!(matches!(serving(), Err(CaError::Io { .. })));
}

#[test]
fn a_root_is_replaced_early_and_used_late() {
    let (_temp, dir) = folder();
    let (clock, a) = (Clock::system(), host("a.example"));
    let open = || LocalCa::open(&dir, std::slice::from_ref(&a), clock.clone()).unwrap();
    assert_eq!(open().roots().len(), 1);
    let table = [(330, 1, Some(0)), (10, 2, Some(0)), (19, 2, Some(1)), (10, 2, Some(1))];
    for (days, roots, signing) in table {
        clock.advance(Duration::days(days));
        let ca = open();
        assert_eq!((ca.roots().len(), ca.signing_root(&a)), (roots, signing), "{days}");
    }
    let running = open();
    clock.advance(Duration::days(400));
    assert!(!running.permits(&a));
    assert!(matches!(running.intermediate(&a), Err(CaError::NoRoot(_))));
}

#[test]
fn nothing_outlives_its_issuer() {
    let (clock, a) = (Clock::system(), host("a.example"));
    let ca = LocalCa::ephemeral(std::slice::from_ref(&a), clock.clone()).unwrap();
    clock.advance(Duration::days(363));
    assert!(ca.intermediate(&a).unwrap().not_after() <= ca.roots()[0].not_after());
}

#[test]
fn a_rotation_leaves_the_old_root_signing_until_it_is_retired() {
    let (_temp, dir) = folder();
    let names = hosts(&["a.example", "b.example"]);
    let begin = || LocalCa::begin_rotation(&dir, &names, Clock::system()).unwrap();
    let open = || LocalCa::open(&dir, &names, Clock::system()).unwrap();
    let old = |ca: &LocalCa| superseded(ca.roots(), &names, &Clock::system());
    let Begun::Made(first) = begin() else { panic!("there was no root") };
    assert_eq!((open().signing_root(&names[0]), old(&open()).len()), (Some(0), 0));
    let Begun::Made(second) = begin() else { panic!("the first one signs") };
    let Begun::Waits(waiting) = begin() else { panic!("one waits already") };
    assert_eq!(waiting.fingerprint(), second.fingerprint());
    let ca = open();
    assert_eq!((ca.roots().len(), ca.signing_root(&names[0])), (2, Some(0)));

    let old = old(&ca);
    assert_eq!(old.iter().map(Root::fingerprint).collect::<Vec<_>>(), [first.fingerprint()]);
    let aside = LocalCa::retire(&dir, &old[0]).unwrap();
    assert_eq!(fs::read_to_string(&aside).unwrap(), first.pem());
    let left: Vec<_> = open().roots().iter().map(Root::fingerprint).collect();
    assert_eq!(left, [second.fingerprint()]);
    assert!(open().intermediate(&names[0]).is_ok());
    let keys = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(keys.filter(|path| path.extension().is_some_and(|end| end == "key")).count(), 1);
    let retired = LocalCa::load_retired(&dir).unwrap();
    assert_eq!(retired[0].fingerprint(), first.fingerprint());
    assert_eq!(retired.len(), 1);
    let Begun::Made(third) = begin() else { panic!("the second one signs now") };
    assert!(third.path().unwrap().ends_with("root-3.pem"));
}

#[test]
fn what_is_broken_off_while_retiring_is_finished_by_doing_it_again() {
    /// What was done before it broke off, in a folder that has this root and a newer one.
    type Done = fn(&Path, &Root);
    let put_aside: Done = |dir, root| {
        fs::create_dir(dir.join("retired")).unwrap();
        fs::write(retired_file(dir, root), root.pem()).unwrap();
    };
    let table: [(&str, &[Done]); 5] = [
        ("nothing", &[]),
        (
            "the certificate written, under no name yet",
            &[|dir, root| {
                fs::create_dir(dir.join("retired")).unwrap();
                fs::write(dir.join("retired/.new-1"), root.pem()).unwrap();
                assert!(LocalCa::load_retired(dir).unwrap().is_empty(), "it is not ended yet");
            }],
        ),
        ("the certificate put aside", &[put_aside]),
        ("the key deleted", &[put_aside, delete_key]),
        ("all", &[put_aside, delete_key, |_, root| fs::remove_file(root.path().unwrap()).unwrap()]),
    ];
    let names = hosts(&["a.example"]);
    for (what, done) in table {
        let (_temp, dir) = folder();
        let begin = || match LocalCa::begin_rotation(&dir, &names, Clock::system()).unwrap() {
            Begun::Made(root) => root,
            other => panic!("{what}: {other:?}"),
        };
        let (old, new) = (begin(), begin());
        done.iter().for_each(|step| step(&dir, &old));
        let finish = || {
            let roots = LocalCa::load_roots(&dir).unwrap();
            let old = superseded(&roots, &names, &Clock::system());
            for root in &old {
                LocalCa::retire(&dir, root).unwrap();
            }
            old.len()
        };
        assert_eq!(finish(), usize::from(what != "all"), "{what}");
        assert_eq!(finish(), 0, "{what}");
        let ca = LocalCa::open(&dir, &names, Clock::system()).unwrap();
        let left: Vec<_> = ca.roots().iter().map(Root::fingerprint).collect();
        assert_eq!(left, [new.fingerprint()], "{what}");
        ca.prepare().unwrap();
        assert!(!key_of(&dir, &old).exists() && key_of(&dir, &new).exists(), "{what}");
        assert_eq!(fs::read_to_string(retired_file(&dir, &old)).unwrap(), old.pem(), "{what}");
        let retired = LocalCa::load_retired(&dir).unwrap();
        let retired: Vec<_> = retired.iter().map(Root::fingerprint).collect();
        assert_eq!(retired, [old.fingerprint()], "{what}");
    }
}

#[test]
fn a_root_whose_certificate_cannot_be_put_aside_keeps_its_key() {
    let (_temp, dir) = folder();
    let ca = LocalCa::open(&dir, &hosts(&["a.example"]), Clock::system()).unwrap();
    let root = &ca.roots()[0];
    fs::create_dir_all(retired_file(&dir, root)).unwrap();
    assert!(matches!(LocalCa::retire(&dir, root), Err(CaError::Io { doing: "write", .. })));
    assert!(key_of(&dir, root).exists() && root.path().unwrap().exists());
}

#[test]
fn a_root_whose_end_was_begun_signs_nothing() {
    let (_temp, dir) = folder();
    let names = hosts(&["a.example"]);
    let open = || LocalCa::open(&dir, &names, Clock::system()).unwrap();
    let root = open().roots()[0].clone();
    fs::create_dir(dir.join("retired")).unwrap();
    fs::write(retired_file(&dir, &root), root.pem()).unwrap();
    assert_eq!((open().roots().len(), open().signing_root(&names[0])), (2, Some(1)));
}

#[test]
fn only_what_a_newer_root_can_do_is_superseded() {
    let (_temp, dir) = folder();
    let clock = Clock::system();
    let open = |names: &[&str]| LocalCa::open(&dir, &hosts(names), clock.clone()).unwrap();
    let old = |names: &[&str]| superseded(open(names).roots(), &hosts(names), &clock).len();
    assert_eq!(old(&["a.example"]), 0);
    // Its rules were others: the second root knows nothing of the first one's names.
    assert_eq!(old(&["b.example"]), 1, "no rule needs the first one");
    assert_eq!(superseded(open(&[]).roots(), &hosts(&["a.example"]), &clock).len(), 0);
    assert_eq!(old(&["a.example", "b.example"]), 0, "each has one of its own");
    assert!(matches!(LocalCa::begin_rotation(&dir, &[], clock.clone()).unwrap(), Begun::NoNames));
    let names = hosts(&["a.example", "b.example"]);
    let Begun::Made(_) = LocalCa::begin_rotation(&dir, &names, clock.clone()).unwrap() else {
        panic!("none waits")
    };
    assert_eq!(old(&["a.example", "b.example"]), 2);
    fs::remove_file(dir.join("root-1.pem")).unwrap();
    delete_key(&dir, &open(&["a.example", "b.example"]).roots()[0]);
    assert_eq!(old(&["a.example", "b.example"]), 0, "one without a key was put there by somebody");
}
