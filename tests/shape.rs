//! Holds the shape of the house: imports point downward, every file says what is in it, secrets are
//! opened in few rooms.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Which rooms a room may import; the same table stands in `ARCHITECTURE.md`.
const TABLE: &str = "
secret clock origin headers tasks peer quote group fault limits lock panics ←
sink       ← tasks
telemetry  ← sink
scrub      ← secret
credential ← secret clock scrub
inject     ← headers secret credential
rules      ← inject origin credential
policy     ← credential
access     ← secret
audit      ← credential access secret clock sink lock
decoy      ← credential secret
config     ← rules inject origin credential policy limits
tls        ← clock origin secret quote
upstream   ← tls origin headers tasks secret quote limits clock
store      ← credential secret tasks access fault lock
source     ← credential secret clock group
oauth      ← upstream credential secret origin tasks peer quote
tokens     ← oauth source store policy decoy audit credential secret clock tasks fault
proxy      ← tokens upstream tls rules inject decoy scrub credential access audit headers origin secret clock tasks peer limits fault
client_env ← config tls
sandbox    ← tls upstream credential secret clock origin headers tasks
cli        ← secret clock origin headers tasks telemetry quote group fault lock limits panics credential inject rules policy access audit decoy scrub config tls upstream store source oauth tokens proxy client_env sandbox
main       ← cli
";

/// Rooms, and files of rooms, that may open a secret: where it goes to its destination.
/// (`decoy.rs` only looks for its own mark in one.)
const MAY_EXPOSE: [&str; 10] = [
    "cli/token.rs",
    "inject.rs",
    "credential/claims.rs",
    "decoy.rs",
    "oauth",
    "scrub.rs",
    "source",
    "store",
    "sandbox",
    "upstream/chain",
];

/// Files that are compiled for tests only, like the tests at the foot of the others.
const TEST_ONLY: [&str; 2] = ["fake.rs", "tests.rs"];

/// The words that the design does not use, as parts of file names.
const OTHER_WORDS: [&str; 7] =
    ["mitm", "handler", "manager", "helper", "util", "context", "backend"];

fn files() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&src, &mut found);
    assert!(found.len() > 40, "the walk found only {} files", found.len());
    found.iter_mut().for_each(|(path, _)| *path = path.strip_prefix(&src).unwrap().to_owned());
    found.sort();
    found
}

/// The text without the tests at its foot.
fn without_tests<'a>(path: &Path, text: &'a str) -> &'a str {
    if TEST_ONLY.iter().any(|name| path.ends_with(name)) {
        return "";
    }
    text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

fn room_of(path: &Path) -> String {
    let first = path.iter().next().unwrap().to_str().unwrap();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// The text without the lines that are comments.
fn code_of(text: &str) -> String {
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    text.lines().filter(is_code).collect::<Vec<_>>().join("\n")
}

fn imports_of(text: &str) -> Vec<String> {
    let code = code_of(text);
    code.match_indices("crate::")
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        .map(|(at, found)| {
            let rest = &code[at + found.len()..];
            rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        })
        .collect()
}

fn allowed(room: &str) -> Option<Vec<&'static str>> {
    TABLE.trim().lines().find_map(|line| {
        let (rooms, imports) = line.split_once('←').unwrap();
        rooms
            .split_whitespace()
            .any(|known| known == room)
            .then(|| imports.split_whitespace().collect())
    })
}

#[test]
fn imports_point_downward() {
    let mut broken = Vec::new();
    for (path, text) in files() {
        let room = room_of(&path);
        if room == "lib" {
            continue;
        }
        let Some(allowed) = allowed(&room) else {
            broken.push(format!("{}: room `{room}` is not in the table", path.display()));
            continue;
        };
        for import in imports_of(without_tests(&path, &text)) {
            if import != room && !allowed.contains(&import.as_str()) {
                broken.push(format!("{}: `{room}` may not import `{import}`", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn the_table_is_acyclic_and_stands_in_the_architecture() {
    let mut seen: Vec<&str> = Vec::new();
    for line in TABLE.trim().lines() {
        let (rooms, imports) = line.split_once('←').unwrap();
        for import in imports.split_whitespace() {
            assert!(seen.contains(&import), "`{import}` is imported above its own line: {line}");
        }
        seen.extend(rooms.split_whitespace());
    }
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    for line in TABLE.trim().lines() {
        assert!(page.contains(line.trim()), "ARCHITECTURE.md lacks the line: {line}");
    }
}

#[test]
fn every_file_says_what_is_in_it() {
    for (path, text) in files() {
        assert!(text.starts_with("//! "), "{} does not start with `//!`", path.display());
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(name != "mod", "{}: use foo.rs beside foo/", path.display());
        for word in OTHER_WORDS {
            assert!(!name.split('_').any(|part| part == word), "{}: not our word", path.display());
        }
    }
}

#[test]
fn secrets_are_opened_in_few_rooms() {
    for (path, text) in files() {
        let code = code_of(without_tests(&path, &text));
        // Called, or handed to something that calls it.
        let opens = path.to_str().unwrap() != "secret.rs"
            && [".expose()", "Secret::expose"].iter().any(|way| code.contains(way));
        let may = MAY_EXPOSE.iter().any(|room| path.starts_with(room) || path == Path::new(room))
            || MAY_EXPOSE.contains(&room_of(&path).as_str());
        assert!(!opens || may, "{} opens a secret", path.display());
    }
}

/// `SECURITY.md` names its tests as `file` and, behind it, `names` of tests in it.
#[test]
fn every_promise_names_tests_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let (mut missing, mut named) = (Vec::new(), 0);
    for row in page.lines().filter(|line| line.starts_with("| ") && line.contains(".rs` `")) {
        let proofs = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let mut text = String::new();
        for word in proofs.split('`').skip(1).step_by(2) {
            if Path::new(word).extension().is_some() {
                text = fs::read_to_string(root.join(word)).unwrap_or_default();
            } else {
                named += 1;
                if !text.contains(&format!("fn {word}(")) {
                    missing.push(word.to_owned());
                }
            }
        }
    }
    assert!(named > 50, "the walk found only {named} names");
    assert_eq!(missing, Vec::<String>::new());
    let lines = |line: &&str| line.starts_with("| ") && !line.starts_with("| ---");
    let promises = page.lines().filter(lines).filter(|line| !line.starts_with("| promise |"));
    let unproven: Vec<_> = promises.filter(|line| !line.contains(".rs` `")).collect();
    assert!(unproven.is_empty(), "{unproven:#?}");
}
