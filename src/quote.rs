//! What somebody else has written, as it can be shown.

/// The text with a replacement character for all that would move a terminal's cursor, turn the line around, or
/// not be seen: controls, format characters, odd spaces, and what Unicode has no character for.
pub fn printable(text: &str) -> String {
    text.chars().map(plain).collect()
}

/// The same of its first `most` characters, with `…` where there are more, for a place in a sentence of ours. A
/// backtick becomes an apostrophe, because between backticks stands what people are told to type.
pub fn quoted(text: &str, most: usize) -> String {
    let mut rest = text.chars().map(|c| if c == '`' { '\'' } else { plain(c) });
    let mut quoted: String = rest.by_ref().take(most).collect();
    if rest.next().is_some() {
        quoted.push('…');
    }
    quoted
}

fn plain(c: char) -> char {
    // The standard library escapes what is not to be seen; a combining mark only where nothing is before it.
    let is_plain = || format!("a{c}").escape_debug().count() == 2;
    if matches!(c, '"' | '\'' | '\\') || is_plain() { c } else { '\u{fffd}' }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_shown_of_a_text() {
        let table = [
            ("Corp \"A\" 'B' \\ 100 %", "Corp \"A\" 'B' \\ 100 %"),
            ("Société e\u{301} 会社 प्रॉक्सी 🦀", "Société e\u{301} 会社 प्रॉक्सी 🦀"),
            ("a\u{1b}[2J\rb\u{9b}\n", "a\u{fffd}[2J\u{fffd}b\u{fffd}\u{fffd}"),
            ("\u{202e}\u{61c}\u{ad}\u{200b}\u{2066}", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
            ("\u{feff}\u{e0041}\u{2028}\u{a0}\u{e000}", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
            ("run `rm`", "run `rm`"),
        ];
        for (text, expected) in table {
            assert_eq!(printable(text), expected);
        }
        let table = [("abc", "abc"), ("abcd", "abc…"), ("`\n`", "'\u{fffd}'")];
        for (text, expected) in table {
            assert_eq!(quoted(text, 3), expected);
        }
    }
}
