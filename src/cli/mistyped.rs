//! Says what was typed wrongly, without a key that somebody typed where it can be seen.

use super::output::{Failure, WRONG_USE};

/// Reports what clap found. `--help` and `--version` come this way too, and are no mistakes. The exit status.
pub(super) fn report(error: &clap::Error) -> u8 {
    if error.use_stderr() && holds_key(&error.render().to_string()) {
        return a_key_was_typed().report();
    }
    let _closed_pipe = error.print();
    if error.use_stderr() { WRONG_USE } else { 0 }
}

/// The failure that a key among the arguments is. It says nothing of the key.
pub(super) fn a_key_was_typed() -> Failure {
    Failure::new("a key is not an argument, your shell's history has it now: take it out there, and make a new one")
        .status(WRONG_USE)
        .hint("printenv OPENAI_API_KEY | valetkey login --with-api-key")
}

/// Whether a word of a text looks like a key.
pub(super) fn holds_key(text: &str) -> bool {
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    text.split(|c| !is_of_key(c)).any(looks_like_key)
}

fn looks_like_key(word: &str) -> bool {
    let rest = |start: &&str| word.strip_prefix(*start);
    KEYS.iter().find_map(rest).is_some_and(|rest| rest.len() >= SHORTEST)
}

/// What keys start with: those of OpenAI and Anthropic, of GitHub and GitLab, our passes, personal access tokens, JWTs.
const KEYS: [&str; 8] = ["sk-", "ghp_", "gho_", "github_pat_", "glpat-", "vkp_", "at-", "eyJ"];

/// Characters behind that at least: a name such as `at-home` has fewer, a key many more.
const SHORTEST: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_key() {
        let table = [
            ("unexpected argument 'sk-test-1234' found", true),
            ("invalid value 'x=ghp_0123456789abcdef' for '--rules <RULE,…>'", true),
            ("'--credential=eyJhbGciOiJub25lIn0.e30.' ", true),
            ("at-0123456789", true),
            ("vkp_0123456789", true),
            ("https://u:sk-test-1234@host", true),
            ("unexpected argument '--with-access-token' found", false),
            ("the credential at-home", false),
            ("risk-assessment-2026", false),
            ("", false),
        ];
        for (text, expected) in table {
            assert_eq!(holds_key(text), expected, "{text}");
        }
    }
}
