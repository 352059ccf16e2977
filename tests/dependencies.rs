//! Holds what may be in the dependency tree: one TLS stack, permissive licences, a reason for each crate.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

/// A second TLS stack, or a second provider of cryptography.
const BANNED: [&str; 6] = ["boring", "boring-sys", "native-tls", "openssl", "openssl-sys", "ring"];

/// Licences that ask for no more than a notice; one of a crate's alternatives must be among them.
const PERMISSIVE: [&str; 14] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Every crate of the tree on every platform: its name, where it comes from, its licence.
///
/// `cargo tree` and not `cargo metadata`, which lists crates of features that are off.
fn tree() -> Vec<(String, String, String)> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--target=all", "--edges=normal,build,dev", "--prefix=none"])
        .arg("--format={p}|{l}")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let crates = lines.lines().filter(|line| !line.is_empty()).map(|line| {
        let (package, licence) = line.split_once('|').unwrap();
        let (name, origin) = package.split_once(' ').unwrap();
        (name.to_owned(), origin.to_owned(), licence.trim_end_matches(" (*)").to_owned())
    });
    crates.collect()
}

/// Whether a licence expression (SPDX) can be met with permissive licences alone.
fn is_permissive(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], " ");
    let meets = |part: &str| {
        part.split(" AND ").all(|licence| {
            let licence = licence.trim().split(" WITH ").next().unwrap();
            PERMISSIVE.contains(&licence)
        })
    };
    // Without parentheses `A AND B OR C` is read too loosely only if B is not permissive and C is.
    expression.split(" OR ").any(meets)
}

#[test]
fn one_tls_stack_and_permissive_licences() {
    let tree = tree();
    assert!(tree.len() > 100, "only {} crates were found", tree.len());
    for (name, origin, licence) in tree {
        assert!(
            !BANNED.contains(&&*name),
            "`{name}` is in the tree: cargo tree --target all -i {name}"
        );
        assert!(
            !origin.contains("(git") && !origin.contains("http"),
            "`{name}` comes from {origin}"
        );
        assert!(is_permissive(&licence), "`{name}` is under {licence:?}");
    }
}

#[test]
fn licence_expressions() {
    for good in ["MIT", "MIT OR GPL-3.0", "MIT/Apache-2.0", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(is_permissive(good), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "none", "LGPL-2.1 WITH something"] {
        assert!(!is_permissive(bad), "{bad}");
    }
}

#[test]
fn every_dependency_has_a_line_of_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest: toml::Table =
        fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let mut names: Vec<String> = Vec::new();
    let mut add = |table: &toml::Value| names.extend(table.as_table().unwrap().keys().cloned());
    add(&manifest["dependencies"]);
    add(&manifest["dev-dependencies"]);
    for target in manifest["target"].as_table().unwrap().values() {
        add(&target["dependencies"]);
    }
    assert!(names.len() > 20);
    let page = fs::read_to_string(root.join("CONTRIBUTING.md")).unwrap();
    let reasons: String = page.lines().filter(|line| line.starts_with("| ")).collect();
    for name in names {
        let has_one = reasons.split(['|', ',', ' ']).any(|word| word.trim() == name);
        assert!(has_one, "CONTRIBUTING.md has no line of reason for `{name}`");
    }
}
