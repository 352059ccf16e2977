//! Configurations: each is taken or explained, at a place in it, and no secret in it is shown.

use std::cell::RefCell;
use std::fs;

use tempfile::TempDir;
use valetkey::config::env::Environment;
use valetkey::config::{Config, MachineFiles, Overrides};

use super::attack::{Attack, Verdict};
use crate::rounds;

/// Twenty thousand and not a million: each is a file that is written and read, and rules with all their presets.
#[test]
fn a_configuration_is_taken_or_explained() {
    let attack = Attack { name: "config", rounds: rounds(20_000, 2_000_000), words: WORDS };
    attack.run(|input, _| {
        FOLDER.with_borrow(|folder| judge(&String::from_utf8_lossy(input), folder))
    });
}

thread_local! {
    static FOLDER: RefCell<TempDir> = RefCell::new(tempfile::tempdir().unwrap());
}

fn judge(text: &str, folder: &TempDir) -> Verdict {
    let file = folder.path().join("config.toml");
    fs::write(&file, text).unwrap();
    let overrides = Overrides { config: Some(file.clone()), ..Overrides::default() };
    let env = Environment::from_pairs([("HOME", folder.path())]);
    let load = || Config::load_on(&MachineFiles::below(folder.path(), 0), &overrides, &env);
    let Err(errors) = load() else { return Ok(true) };
    let lines: Vec<&str> = text.split('\n').collect();
    let name = file.to_str().unwrap();
    for mistake in errors.mistakes() {
        let in_it = mistake.position().filter(|_| mistake.file() == Some(name));
        let Some((line, column)) = in_it else { continue };
        // In bytes: what is hidden is shown as a star for each.
        let length = lines.get(line - 1).map(|line| line.len());
        if length.is_none_or(|length| column > length + 1) {
            return Err(format!("{mistake} is said to be at {line}:{column}"));
        }
    }
    // Wide, so that no word is broken.
    told(text, &format!("{}{errors:?}{errors}", errors.render(false, 5000)))?;
    Ok(false)
}

/// Fails where a secret is shown that stands whole in the text: a key, and the password of a proxy.
fn told(text: &str, shown: &str) -> Result<(), String> {
    for secret in [KEY, PASSWORD] {
        let stands = match secret {
            KEY => text.contains(KEY),
            _ => {
                text.contains(LOGIN)
                    && text.matches(PASSWORD).count() == text.matches(LOGIN).count()
            }
        };
        if stands && shown.contains(secret) {
            return Err(format!("{secret} is shown:\n{shown}"));
        }
    }
    Ok(())
}

const KEY: &str = "sk-canary-0123456789abcdef";
const PASSWORD: &str = "pa55word";
const LOGIN: &str = "://me:pa55word@";

const WORDS: &[&str] = &[
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    " = ",
    "\"",
    "'",
    "'''",
    "\"\"\"",
    "#",
    ",",
    ".",
    "\\",
    "\\u0000",
    "\\n",
    "\n",
    "[[rules]]\n",
    "[upstream]\n",
    "[credentials.x]\n",
    "[[listeners]]\n",
    "host = ",
    "paths = ",
    "true",
    "1e9",
    "-1",
    "9223372036854775808",
    "1979-05-27",
    "\"*.example.com\"",
    "\"sk-canary-0123456789abcdef\"",
    "token = ",
    "source = ",
    "proxy = \"http://me:pa55word@proxy:3128\"\n",
    "http://me:pa55word@",
    "\u{feff}",
    "\u{202e}",
    "\u{e9}",
    "sk\\u002dcanary-0123456789abcdef",
    "key = ",
    "name = ",
    "sk-canary-0123456789abcdef = 1\n",
];
