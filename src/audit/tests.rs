//! Chains of lines: whole, changed, cut, torn, shared and put aside.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Mutex;

use tempfile::TempDir;
use time::macros::datetime;

use super::file::numbered;
use super::verify::{Report, files_of, verify};
use super::*;

const NOW: OffsetDateTime = datetime!(2026-11-29 12:34:56.789 UTC);
const LARGE: u64 = 1 << 20;

fn entry(path: &str) -> Entry {
    let exchange = Exchange {
        uid: Some(1000),
        rule: Some("example".to_owned()),
        method: "GET".to_owned(),
        host: "api.example.com:443".to_owned(),
        path: Some(path.to_owned()),
        status: Some(200),
        outcome: "ok",
        ..Exchange::default()
    };
    Entry { time: NOW, event: "exchange", what: What::Exchange(exchange.bounded()) }
}

fn entries(count: usize) -> Vec<Entry> {
    (0..count).map(|number| entry(&format!("/v1/{number}"))).collect()
}

/// A folder with an audit that so many lines were written to.
fn written(count: usize) -> (TempDir, OnDisk) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/audit.jsonl");
    let mut file = AuditFile::open(&path, LARGE, 3).unwrap();
    assert_eq!(file.write(entries(count), 0), 0);
    (folder, OnDisk(path))
}

struct OnDisk(std::path::PathBuf);

impl OnDisk {
    fn lines(&self) -> Vec<String> {
        fs::read_to_string(&self.0).unwrap().lines().map(str::to_owned).collect()
    }

    fn put(&self, lines: &[String]) {
        fs::write(&self.0, lines.iter().map(|line| format!("{line}\n")).collect::<String>())
            .unwrap();
    }

    fn add(&self, bytes: &[u8]) {
        OpenOptions::new().append(true).open(&self.0).unwrap().write_all(bytes).unwrap();
    }

    fn report(&self) -> Report {
        verify(files_of(&self.0).unwrap(), None).unwrap()
    }

    fn more(&self, count: usize) {
        assert_eq!(AuditFile::open(&self.0, LARGE, 3).unwrap().write(entries(count), 0), 0);
    }
}

fn assert_sound(report: &Report, lines: u64) {
    assert_eq!(report.broken, None);
    assert_eq!(report.head.as_ref().map(|head| head.0), Some(lines), "{report:?}");
    assert!(report.follows.is_none(), "{report:?}");
}

#[test]
fn a_line_says_what_was_asked_and_what_came_of_it() {
    let (_folder, audit) = written(1);
    let lines = audit.lines();
    let first: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((first["event"].as_str(), first["seq"].as_u64()), (Some("file"), Some(1)));
    let hash = crate::secret::Fingerprint::of(lines[0].as_bytes()).to_hex();
    let expected = format!(
        "{{\"seq\":2,\"prev\":\"{hash}\",\"time\":\"2026-11-29T12:34:56.789Z\",\"pid\":{},\"event\":\"exchange\",\
         \"uid\":1000,\"rule\":\"example\",\"method\":\"GET\",\"host\":\"api.example.com:443\",\"path\":\"/v1/0\",\
         \"status\":200,\"up\":0,\"down\":0,\"ms\":0,\"outcome\":\"ok\"}}",
        std::process::id()
    );
    assert_eq!(lines[1], expected);
    let mode = fs::metadata(&audit.0).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn what_stands_in_a_line_is_visible_and_bounded() {
    let table = [
        ("/v1/a b", "/v1/a b"),
        ("/\n\"\\\u{1b}[2J", "/%0A\"\\%1B[2J"),
        ("/gr\u{fc}n", "/gr%C3%BCn"),
        ("", ""),
    ];
    for (text, expected) in table {
        assert_eq!(shortened(text, 100), expected);
    }
    assert_eq!(shortened(&"a".repeat(101), 100), "a".repeat(100) + "…");
    assert_eq!(shortened(&"a".repeat(100), 100), "a".repeat(100));
    for (text, expected) in [
        ("refresh_token_reused", "refresh_token_reused"),
        ("rt_SECRET", "other"),
        ("", "other"),
        (&"a".repeat(49), "other"),
    ] {
        assert_eq!(code(text), expected);
    }
    let (_folder, audit) = written(0);
    let mut file = AuditFile::open(&audit.0, LARGE, 3).unwrap();
    assert_eq!(file.write(vec![entry(&"/\u{1}\"".repeat(100_000))], 0), 0);
    assert!(audit.lines().iter().all(|line| line.len() < 4096));
    assert_sound(&audit.report(), 2);
}

#[test]
fn every_change_but_one_of_the_last_line_shows() {
    let (_folder, audit) = written(6);
    let whole = audit.lines();
    assert_sound(&audit.report(), 7);
    let mut tried = HashSet::new();
    let mut refute = |lines: Vec<String>, what: &str| {
        assert_ne!(lines, whole);
        audit.put(&lines);
        let report = audit.report();
        assert!(report.broken.is_some() || report.follows.is_some(), "{what}: {report:?}");
        tried.insert(what.split(' ').next().unwrap().to_owned());
    };
    for at in 0..whole.len() - 1 {
        for (from, to) in [("\"seq\":", "\"seq\": "), ("exchange", "exchangf"), ("12:34", "12:35")]
        {
            let mut lines = whole.clone();
            lines[at] = lines[at].replacen(from, to, 1);
            if lines != whole {
                refute(lines, &format!("changed {at}"));
            }
        }
        let mut lines = whole.clone();
        lines.remove(at);
        refute(lines, &format!("removed {at}"));
        let mut lines = whole.clone();
        lines.insert(at, whole[at].clone());
        refute(lines, &format!("doubled {at}"));
        let mut lines = whole.clone();
        lines.swap(at, at + 1);
        refute(lines, &format!("swapped {at}"));
        let mut lines = whole.clone();
        lines.insert(at + 1, "x".to_owned());
        refute(lines, &format!("inserted {at}"));
    }
    assert_eq!(tried.len(), 5);
    let mut lines = whole.clone();
    lines.remove(3);
    audit.put(&lines);
    let broken = audit.report().broken.unwrap();
    assert_eq!((broken.line, &*broken.why), (4, "line 4 of the chain is missing before it"));
    // What no chain can show, a head that is kept elsewhere does.
    audit.put(&whole);
    let (_, head) = audit.report().head.unwrap();
    let has_head = || verify(files_of(&audit.0).unwrap(), Some(&head)).unwrap().has_kept_head;
    assert_eq!(has_head(), Some(true));
    audit.put(&whole[..6]);
    assert_sound(&audit.report(), 6);
    assert_eq!(has_head(), Some(false));
}

#[test]
fn what_a_process_did_not_finish_is_told_and_gone_on_after() {
    for torn in [&b"{\"seq\":4,\"pr"[..], b"{\"seq\":4,\"prev\":\"\xff", b"\0\0\0\0"] {
        let (_folder, audit) = written(2);
        audit.add(torn);
        let report = audit.report();
        assert_sound(&report, 3);
        assert_eq!(report.sound[0].torn, 1);
        audit.more(2);
        let report = audit.report();
        // Two, and the one that says so.
        assert_sound(&report, 6);
        assert_eq!(report.sound[0].torn, 1);
        audit.more(1);
        assert_sound(&audit.report(), 7);
        // Nobody can take it out, or put something else there.
        let text = fs::read(&audit.0).unwrap();
        let at = text.windows(torn.len()).position(|part| part == torn).unwrap();
        let mut changed = text.clone();
        changed[at + 2] ^= 1;
        fs::write(&audit.0, changed).unwrap();
        assert!(audit.report().broken.is_some());
        let without = [&text[..at], &text[at + torn.len() + 1..]].concat();
        fs::write(&audit.0, without).unwrap();
        assert!(audit.report().broken.is_some());
    }
}

#[test]
fn a_line_that_is_whole_and_no_line_of_ours_is_no_accident() {
    let (_folder, audit) = written(2);
    audit.add(b"somebody was here\n");
    assert_eq!(audit.report().broken.unwrap().line, 4);
}

#[test]
fn files_are_put_aside_and_go_on_from_one_another() {
    let folder = tempfile::tempdir().unwrap();
    let audit = OnDisk(folder.path().join("audit.jsonl"));
    let mut file = AuditFile::open(&audit.0, 2000, 3).unwrap();
    for round in 0..8 {
        assert_eq!(file.write(entries(5), 0), 0, "round {round}");
    }
    let report = audit.report();
    assert_eq!(report.broken, None);
    assert_eq!(report.sound.len(), 4, "three are kept: {report:?}");
    assert!(report.sound.iter().all(|sound| sound.lines.is_some()));
    let (before_the_first, _) = report.follows.clone().expect("older ones are gone");
    assert_eq!(report.sound[0].lines.unwrap().0, before_the_first + 1);
    for number in 1..=3 {
        assert!(fs::metadata(numbered(&audit.0, number)).unwrap().len() <= 2000);
    }
    assert!(!numbered(&audit.0, 4).exists());
    // One that is taken out of the middle.
    let files = || files_of(&audit.0).unwrap();
    let mut some = files();
    some.remove(1);
    assert!(verify(some, None).unwrap().broken.is_some());
    // So it is when it is gone from the disk.
    let (second, kept) = (numbered(&audit.0, 1), folder.path().join("kept"));
    fs::rename(&second, &kept).unwrap();
    assert!(audit.report().broken.is_some(), "nobody has looked beyond the gap");
    fs::rename(&kept, &second).unwrap();
    // All that was there is deleted, and the process goes on: it does not begin anew.
    let last = report.head.unwrap();
    for (path, _) in files() {
        fs::remove_file(path).unwrap();
    }
    assert_eq!(file.write(entries(1), 0), 0);
    assert_eq!(audit.report().follows, Some(last));
}

#[test]
fn fewer_files_than_before_are_a_chain_without_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let audit = OnDisk(folder.path().join("audit.jsonl"));
    for (keep, files) in [(4, 5), (2, 3), (1, 2), (3, 4)] {
        let mut file = AuditFile::open(&audit.0, 2000, keep).unwrap();
        for _ in 0..8 {
            assert_eq!(file.write(entries(5), 0), 0);
            assert_eq!(audit.report().broken, None, "{keep} are kept");
        }
        assert_eq!(audit.report().sound.len(), files);
    }
}

#[test]
fn a_file_whose_first_lines_are_gone_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    let audit = OnDisk(folder.path().join("audit.jsonl"));
    let mut file = AuditFile::open(&audit.0, 2000, 1).unwrap();
    (0..5).for_each(|_| assert_eq!(file.write(entries(5), 0), 0));
    let report = audit.report();
    assert!(report.follows.is_some() && report.begins_a_file, "{report:?}");
    let oldest = OnDisk(numbered(&audit.0, 1));
    let lines = oldest.lines();
    oldest.put(&lines[1..]);
    let report = audit.report();
    assert!(report.broken.is_none() && !report.begins_a_file, "{report:?}");
}

#[test]
fn a_first_line_that_a_power_cut_has_torn_is_gone_on_after() {
    for torn in [&b"{\"seq\":1,\"prev\":\"00"[..], &[0; 300]] {
        let folder = tempfile::tempdir().unwrap();
        let audit = OnDisk(folder.path().join("audit.jsonl"));
        fs::write(&audit.0, torn).unwrap();
        AuditFile::look_ahead(&audit.0).unwrap();
        audit.more(2);
        let report = audit.report();
        assert_sound(&report, 3);
        assert_eq!(report.sound[0].torn, 1);
        assert!(report.begins_a_file);
    }
}

#[expect(clippy::disallowed_methods, reason = "it may wait for ever")]
#[test]
fn whoever_holds_the_lock_for_ever_holds_up_nobody_that_begins() {
    let (_folder, audit) = written(1);
    let lock = fs::File::open(audit.0.with_extension("jsonl.lock")).unwrap();
    lock.lock().unwrap();
    let (sender, opened) = std::sync::mpsc::channel();
    let path = audit.0.clone();
    let opening = move || sender.send(AuditFile::open(&path, LARGE, 3).map(drop));
    let _waits = std::thread::spawn(opening);
    let opened = opened.recv_timeout(FLUSH_LIMIT * 10).expect("it waits for ever");
    assert!(opened.unwrap_err().to_string().contains("another process"));
    lock.unlock().unwrap();
    audit.more(1);
}

#[test]
fn any_number_of_writers_make_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let audit = OnDisk(folder.path().join("audit.jsonl"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut file = AuditFile::open(&audit.0, 20_000, 1000).unwrap();
                for _ in 0..50 {
                    assert_eq!(file.write(entries(3), 0), 0);
                }
            });
        }
    });
    let report = audit.report();
    let files = report.sound.len() as u64;
    assert!(files > 5, "some were put aside: {files}");
    assert_sound(&report, 4 * 50 * 3 + files);
}

#[test]
fn one_that_is_cut_while_it_is_written_shows_it() {
    let (_folder, audit) = written(5);
    let mut file = AuditFile::open(&audit.0, LARGE, 3).unwrap();
    assert_eq!(file.write(entries(2), 0), 0);
    let lines = audit.lines();
    audit.put(&lines[..4]);
    assert_eq!(file.write(entries(1), 0), 0);
    let broken = audit.report().broken.unwrap();
    assert_eq!(broken.why, "lines 5 to 8 of the chain are missing before it");
}

#[test]
fn only_a_file_of_ours_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |path: &Path| {
        let ahead = AuditFile::look_ahead(path);
        let opened = AuditFile::open(path, LARGE, 3).map(drop);
        assert_eq!(ahead.is_ok(), opened.is_ok(), "{ahead:?}, {opened:?}");
        opened
    };
    fs::write(path("other"), "precious\n").unwrap();
    assert!(matches!(open(&path("other")), Err(file::AuditError::Unfit { .. })));
    assert_eq!(fs::read_to_string(path("other")).unwrap(), "precious\n");
    AuditFile::look_ahead(&path("new/audit.jsonl")).unwrap();
    assert!(!path("new").exists(), "whoever only looks makes nothing");
    open(&path("new/audit.jsonl")).unwrap();
    open(&path("new/audit.jsonl")).unwrap();
    open(&path("other/audit.jsonl")).unwrap_err();
    symlink(path("target"), path("link")).unwrap();
    open(&path("link")).unwrap_err();
    assert!(!path("target").exists());
    fs::create_dir(path("dir")).unwrap();
    open(&path("dir")).unwrap_err();
    // There is no safe way to make one elsewhere.
    #[cfg(target_os = "linux")]
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    #[cfg(target_os = "linux")]
    open(&path("pipe")).unwrap_err();
}

#[test]
fn what_is_lost_is_counted_in_the_chain() {
    let (_folder, audit) = written(1);
    let mut file = AuditFile::open(&audit.0, LARGE, 3).unwrap();
    assert_eq!(file.write(entries(2), 17), 0);
    assert_eq!(file.write(Vec::new(), 3), 3, "there is no line to tell it with yet");
    let report = audit.report();
    assert_sound(&report, 5);
    assert_eq!(report.lost, 17);
    assert!(audit.lines()[2].contains("\"event\":\"lost\",\"lines\":17"));
}

/// Fails while there is nothing in it to say how often it may work.
#[derive(Clone, Default)]
struct Fickle(Arc<Mutex<(u32, Vec<u8>)>>);

impl Write for Fickle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap();
        inner.0 = inner.0.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        inner.1.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_that_go_elsewhere_are_chained_too() {
    let out = Fickle::default();
    let mut lines = Lines { chain: Chain::default(), out: Box::new(out.clone()) };
    let allow = |times| out.0.lock().unwrap().0 = times;
    allow(2);
    assert_eq!(lines.write(entries(5), 0), 3);
    allow(100);
    assert_eq!(lines.write(entries(2), 3), 0);
    let folder = tempfile::tempdir().unwrap();
    let audit = OnDisk(folder.path().join("caught"));
    fs::write(&audit.0, &out.0.lock().unwrap().1).unwrap();
    let report = audit.report();
    assert_sound(&report, 5);
    assert_eq!(report.lost, 3);
}

#[test]
fn it_is_switched_on_and_off_for_all_that_hold_it() {
    let (audit, out) = (Audit::off(), Fickle::default());
    out.0.lock().unwrap().0 = 100;
    let other = audit.clone();
    let name = "openai".parse().unwrap();
    other.credential(&name, CredentialEvent::Login, None);
    assert!(!other.is_on() && other.flush());
    audit.change(Some(Trail::Lines(Box::new(out.clone()))), Clock::system()).unwrap();
    assert!(other.is_on());
    other.credential(&name, CredentialEvent::Dead, Some("refresh_token_reused"));
    other.pass_made(&"ci".parse().unwrap());
    other.pass_revoked(None);
    assert!(audit.flush());
    audit.change(None, Clock::system()).unwrap();
    other.credential(&name, CredentialEvent::Logout, None);
    let text = String::from_utf8(out.0.lock().unwrap().1.clone()).unwrap();
    let events: Vec<&str> =
        text.lines().map(|line| &line[line.find("\"event\"").unwrap()..]).collect();
    assert_eq!(
        events,
        [
            "\"event\":\"dead\",\"credential\":\"openai\",\"detail\":\"refresh_token_reused\"}",
            "\"event\":\"pass_made\",\"pass\":\"ci\"}",
            "\"event\":\"pass_revoked\"}",
        ]
    );
}
