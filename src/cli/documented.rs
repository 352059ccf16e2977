//! Holds the documents to what can be typed: each command of theirs is parsed as if it had been.

use std::fs;
use std::path::Path;

use clap::Parser as _;

use super::Arguments;

#[test]
fn what_the_documents_type_can_be_typed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = fs::read_dir(root.join("docs")).unwrap().map(|page| page.unwrap().path());
    let mut count = 0;
    for page in pages.chain([root.join("README.md")]) {
        for line in typed(&fs::read_to_string(&page).unwrap()) {
            let parsed = Arguments::try_parse_from(words(&line));
            // `--help` and `--version` are no mistakes.
            let mistake = parsed.err().filter(clap::Error::use_stderr);
            if let Some(mistake) = mistake {
                panic!("{}: {line}: {mistake}", page.display());
            }
            count += 1;
        }
    }
    assert!(count > 40, "only {count} commands were found");
}

/// The calls of valetkey in a page's blocks of shell, each to its end.
fn typed(page: &str) -> Vec<String> {
    let blocks = page.split("\n```sh\n").skip(1).filter_map(|block| block.split("\n```").next());
    let text = blocks.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let mut calls = Vec::new();
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        for (at, _) in line.match_indices("valetkey ") {
            let before = &line[..at];
            let is_word = at == 0 || before.ends_with([' ', '(', '"']);
            // Where it is the name of a unit or of an image, nobody calls it.
            let is_named = ["-u ", "-t "].iter().any(|option| before.ends_with(option));
            let is_called = is_word && !is_named;
            let call = line[at..].split(['|', '>', '<', '&', ')', ';']).next().unwrap_or_default();
            if is_called {
                calls.push(call.trim().to_owned());
            }
        }
    }
    calls
}

/// The words of a call, as a shell splits one that has no quotes within quotes.
fn words(call: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in call.chars() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if open == c => quote = None,
            (None, ' ') => words.push(String::new()),
            (_, c) => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}
