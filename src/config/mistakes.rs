//! Collects the mistakes of all settings, each with its place, and shows them together.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use miette::{GraphicalReportHandler, GraphicalTheme, SourceSpan};

use super::text::{Text, masked};

/// Everything that is wrong with the configuration, in the order of the texts it was read from.
///
/// Never empty. What could be a secret is shown as stars, in `Debug` too.
#[derive(Debug)]
pub struct ConfigErrors(Vec<Mistake>);

impl ConfigErrors {
    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "there is always at least one")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// One by one.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.0
    }

    /// All of them for people to read, each under the line it stands in. `width` is in columns.
    pub fn render(&self, color: bool, width: usize) -> String {
        let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::none() };
        let report = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(width);
        let mut out = String::new();
        for mistake in &self.0 {
            if report.render_report(&mut out, mistake).is_err() {
                out.push_str(&mistake.message);
                out.push('\n');
            }
        }
        out
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.len() {
            1 => f.write_str("the configuration has a mistake"),
            count => write!(f, "the configuration has {count} mistakes"),
        }
    }
}

impl std::error::Error for ConfigErrors {}

/// One thing that is wrong.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[error("{message}")]
pub struct Mistake {
    message: String,
    #[help]
    hint: Option<String>,
    #[source_code]
    text: Option<Text>,
    #[label]
    span: Option<SourceSpan>,
}

impl Mistake {
    /// The file, the variable or the flag it stands in; `None` when it stands nowhere.
    pub fn file(&self) -> Option<&str> {
        self.text.as_ref().map(Text::name)
    }

    /// Line and column of its first character, both from 1.
    pub fn position(&self) -> Option<(usize, usize)> {
        let (line, column) = self.text.as_ref()?.position(self.span?.offset());
        Some((line + 1, column + 1))
    }

    /// The text that is underlined.
    pub fn underlined(&self) -> Option<&str> {
        let span = self.span?;
        self.text.as_ref()?.get(span.offset()..span.offset() + span.len())
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// Where something is written: a piece of one of the texts that were read.
#[derive(Clone, Debug)]
pub(super) struct Place {
    text: usize,
    span: Range<usize>,
}

impl Place {
    /// Another piece of the same text.
    pub(super) fn at(&self, span: Range<usize>) -> Self {
        Self { text: self.text, span }
    }

    /// Whether it is in a text that was opened earlier, which is a higher layer.
    pub(super) fn is_above(&self, other: &Self) -> bool {
        self.text < other.text
    }
}

/// The mistakes found so far. Shared by all that read, so that no reading stops at the first one.
#[derive(Default)]
pub(super) struct Mistakes(RefCell<Found>);

#[derive(Default)]
struct Found {
    texts: Vec<Text>,
    list: Vec<(Option<Place>, String, Option<String>)>,
}

impl Mistakes {
    /// Takes in a text that settings are read from; the place is all of it.
    pub(super) fn open(&self, name: &str, text: &str) -> Place {
        let mut found = self.0.borrow_mut();
        found.texts.push(Text::new(name, text));
        Place { text: found.texts.len() - 1, span: 0..text.len() }
    }

    /// Notes a mistake.
    pub(super) fn add(&self, place: &Place, message: impl fmt::Display) {
        self.note(Some(place.clone()), &message, None);
    }

    /// Notes a mistake with something to do about it.
    pub(super) fn add_with_hint(
        &self,
        place: &Place,
        message: impl fmt::Display,
        hint: Option<String>,
    ) {
        self.note(Some(place.clone()), &message, hint);
    }

    /// Notes a mistake that stands in no text.
    pub(super) fn add_nowhere(&self, message: impl fmt::Display, hint: &str) {
        self.note(None, &message, Some(hint.to_owned()));
    }

    /// Lets nobody see what is written there.
    pub(super) fn hide(&self, place: &Place) {
        self.0.borrow_mut().texts[place.text].hide(&place.span);
    }

    /// Lets nobody see what is written there before the last `@`.
    pub(super) fn hide_user_information(&self, place: &Place) {
        let mut found = self.0.borrow_mut();
        let text = &mut found.texts[place.text];
        if let Some(length) = text.get(place.span.clone()).and_then(|piece| piece.rfind('@')) {
            text.hide(&(place.span.start..place.span.start + length));
        }
    }

    /// The line that a place is in, from 1.
    pub(super) fn line(&self, place: &Place) -> usize {
        self.0.borrow().texts[place.text].position(place.span.start).0 + 1
    }

    /// How many there are up to now.
    pub(super) fn count(&self) -> usize {
        self.0.borrow().list.len()
    }

    /// All of them as an error, if there are any.
    pub(super) fn finish(&self) -> Result<(), ConfigErrors> {
        if self.count() == 0 { Ok(()) } else { Err(self.take_errors()) }
    }

    /// All of them, in the order of the texts. There must be one.
    pub(super) fn take_errors(&self) -> ConfigErrors {
        let Found { texts, mut list } = self.0.take();
        list.sort_by_key(|(place, ..)| {
            place.as_ref().map(|place| (place.text, place.span.start, place.span.end))
        });
        let mistake = |(place, message, hint): (Option<Place>, String, Option<String>)| Mistake {
            message,
            hint,
            text: place.as_ref().map(|place| texts[place.text].clone()),
            span: place.map(|place| place.span.into()),
        };
        ConfigErrors(list.into_iter().map(mistake).collect())
    }

    fn note(&self, place: Option<Place>, message: &dyn fmt::Display, hint: Option<String>) {
        self.0.borrow_mut().list.push((place, masked(&message.to_string()), hint));
    }
}

/// The word of a list that was probably meant: at most two letters away, and no more than half of them.
pub(super) fn closest<'a>(
    typed: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    known
        .into_iter()
        .map(|word| (distance(typed, word), word))
        .filter(|(distance, word)| *distance <= 2 && distance * 2 <= word.len())
        .min()
        .map(|(_, word)| word)
}

/// Levenshtein's distance, in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_word_that_was_meant() {
        let known = ["host", "paths", "headers", "header"];
        let table = [
            ("hosts", Some("host")),
            ("hots", Some("host")),
            ("hedaers", Some("headers")),
            ("heeder", Some("header")),
            ("headerss", Some("headers")),
            ("zzz", None),
        ];
        for (typed, meant) in table {
            assert_eq!(closest(typed, known), meant, "{typed}");
        }
    }

    #[test]
    fn counts_lines_and_columns_in_characters() {
        let mistakes = Mistakes::default();
        let all = mistakes.open("a.toml", "x = 1\n\u{e9} = \"secret\"\n");
        let value = all.at(11..19);
        mistakes.hide(&value);
        mistakes.add(&value, "no");
        mistakes.add_nowhere("first", "do this");
        let errors = mistakes.finish().unwrap_err();
        let [nowhere, here] = errors.mistakes() else { panic!("two") };
        assert_eq!((nowhere.file(), nowhere.hint()), (None, Some("do this")));
        assert_eq!((here.file(), here.position()), (Some("a.toml"), Some((2, 5))));
        assert_eq!(here.underlined(), Some("********"));
        let shown = errors.render(false, 80);
        assert!(shown.contains("a.toml:2:5") && shown.contains("do this"), "{shown}");
        assert!(!shown.contains("secret") && !format!("{errors:?}").contains("secret"));
    }
}
