//! Holds a text that settings were read from as people may see it: without secrets, line by line.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use miette::{MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents};

/// A text that settings were read from.
#[derive(Clone)]
pub(super) struct Text {
    name: Arc<str>,
    /// As it may be shown: as long as the original, byte for byte.
    shown: Arc<str>,
}

impl Text {
    /// A text, and what people know it by.
    pub(super) fn new(name: &str, text: &str) -> Self {
        Self { name: name.into(), shown: masked(text).into() }
    }

    /// What people know it by.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A piece of it.
    pub(super) fn get(&self, span: Range<usize>) -> Option<&str> {
        self.shown.get(span)
    }

    /// Lets nobody see what is written there.
    pub(super) fn hide(&mut self, span: &Range<usize>) {
        self.shown = starred(&self.shown, std::slice::from_ref(span)).into();
    }

    /// Line and column, from 0, in characters.
    pub(super) fn position(&self, offset: usize) -> (usize, usize) {
        let before = &self.shown[..offset];
        (before.matches('\n').count(), before[line_start(before)..].chars().count())
    }
}

impl SourceCode for Text {
    /// The lines that the span touches and no other: what is around may be nobody's business.
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        _lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let (start, end) = (span.offset(), span.offset() + span.len());
        let tail = self.shown.get(end..).ok_or(MietteError::OutOfBounds)?;
        let whole = line_start(&self.shown[..start])
            ..tail.find('\n').map_or(self.shown.len(), |length| end + length);
        let (line, column) = self.position(start);
        // Without lines before it, it is the position that is asked for.
        let column = if lines_before == 0 { column } else { 0 };
        let lines = &self.shown[whole.clone()];
        let contents = MietteSpanContents::new_named(
            self.name.to_string(),
            lines.as_bytes(),
            whole.into(),
            line,
            column,
            lines.lines().count(),
        );
        Ok(Box::new(contents))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Text({})", self.name)
    }
}

/// Where the last line starts.
fn line_start(before: &str) -> usize {
    before.rfind('\n').map_or(0, |newline| newline + 1)
}

/// What people may see of a text: user information of URLs, and words that could be keys, as stars.
pub(super) fn masked(text: &str) -> String {
    let user_information = text.match_indices("://").filter_map(|(at, mark)| {
        let start = at + mark.len();
        let ends = |c: char| c.is_whitespace() || matches!(c, '/' | '"' | '\'' | '?' | '#');
        let end = text[start..].find(ends).map_or(text.len(), |length| start + length);
        text[start..end].rfind('@').map(|length| start..start + length)
    });
    let hidden: Vec<Range<usize>> =
        user_information.chain(keys(text)).chain(values(text)).collect();
    starred(text, &hidden)
}

/// What stands behind `=` of a setting that is for a secret, or for where one is, unless it says where; and of a proxy
/// with a login, which may be no URL yet.
fn values(text: &str) -> impl Iterator<Item = Range<usize>> {
    let lines = text.split_inclusive('\n').scan(0, |start, line| {
        *start += line.len();
        Some((*start - line.len(), line))
    });
    lines.flat_map(|(start, line)| {
        let line = line.trim_end();
        let settings = line.match_indices('=').map(|(at, _)| {
            let name = line[..at].trim_end().trim_end_matches(['"', '\'']);
            let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            (name.rsplit(|c| !is_of_name(c)).next().unwrap_or_default(), at + 1)
        });
        let spans = settings.filter_map(|(name, at)| {
            let value = line[at..].trim_start().trim_start_matches(['"', '\'']);
            let says_where = value.starts_with("file:") || value.starts_with("env:");
            if SECRETS.contains(&name.to_ascii_lowercase().as_str()) && !says_where {
                return Some(at..line.len());
            }
            let login = value.rfind('@').filter(|_| name == "proxy")?;
            let scheme = value.find("://").map_or(0, |mark| mark + "://".len()).min(login);
            let value_at = line.len() - value.len();
            Some(value_at + scheme..value_at + login)
        });
        spans.map(|span| start + span.start..start + span.end).collect::<Vec<_>>()
    })
}

/// Names of settings whose values are secrets, or become so by a mistake.
const SECRETS: [&str; 9] = [
    "api_key",
    "client_secret",
    "key",
    "pass",
    "password",
    "proxy_login",
    "secret",
    "source",
    "token",
];

/// Words that could be keys: long, with a digit in them.
fn keys(text: &str) -> impl Iterator<Item = Range<usize>> {
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.split(move |c| !is_of_key(c))
        .filter(|word| word.len() >= KEY_LEN && word.bytes().any(|byte| byte.is_ascii_digit()))
        .map(|word| {
            let start = word.as_ptr().addr() - text.as_ptr().addr();
            start..start + word.len()
        })
}

/// Keeps the length in bytes, and the lines, so that every span stays where it is.
fn starred(text: &str, hidden: &[Range<usize>]) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if c != '\n' && hidden.iter().any(|span| span.contains(&at)) {
            (0..c.len_utf8()).for_each(|_| out.push('*'));
        } else {
            out.push(c);
        }
    }
    out
}

/// Words of this many characters may be keys. Those of the large services have 32 and more; the longest
/// name of a setting or a header in the presets has 24, without a digit.
const KEY_LEN: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_no_secret() {
        let table = [
            ("http://me:pa55@proxy:3128/", "http://*******@proxy:3128/"),
            ("http://m\u{e9}:p@ss@proxy", "http://********@proxy"),
            ("http://proxy/a@b", "http://proxy/a@b"),
            ("Bearer sk-proj-0123456789abcdefgh", "Bearer **************************"),
            ("x-openai-agent-assertion", "x-openai-agent-assertion"),
            ("short-1", "short-1"),
            ("a = 1\nproxy_login = me:pa55\nb = 2", "a = 1\nproxy_login =********\nb = 2"),
            ("proxy_login = { user = \"me\", x = 1 }", "proxy_login =***********************"),
            ("x = { \"password\" = pa55 }", "x = { \"password\" =*******"),
            ("x = { source = 'env:A', token = 1 }\r\n", "x = { source = 'env:A', token =****\r\n"),
            ("proxy = me:pa55@proxy.corp:3128", "proxy = *******@proxy.corp:3128"),
            ("proxy = \"http://me:pa#ss@proxy", "proxy = \"http://********@proxy"),
            ("proxy = http://proxy.corp", "proxy = http://proxy.corp"),
            ("source = pa55", "source =*****"),
            ("source = \"env:NAME\"", "source = \"env:NAME\""),
            ("proxy_login = 'file:a'", "proxy_login = 'file:a'"),
        ];
        for (text, shown) in table {
            assert_eq!(masked(text), shown);
        }
    }
}
