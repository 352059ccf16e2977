//! The only writer of standard output and standard error.
//!
//! Data goes to stdout, words to stderr. An error is one lower-case line, `error: …`, with its causes
//! behind colons and no period, and then `hint:` lines that say what to type. Colour only on a terminal,
//! and never when `NO_COLOR` is set.

use std::fmt::Display;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::OnceLock;

use anstream::{AutoStream, stdout};

use super::mistyped;
use crate::config::{Config, ConfigErrors};
use crate::credential::CredentialName;
use crate::oauth::LoginError;
pub(super) use crate::quote::printable;
use crate::source::SourceError;
use crate::store::StoreError;
use crate::telemetry;
use crate::tls::ca::CaError;
use crate::tls::trust::TrustError;

/// Why a command did not succeed, as its user sees it.
#[derive(Debug)]
pub(super) struct Failure {
    status: u8,
    message: String,
    hints: Vec<String>,
}

/// Exit status for a command that was typed wrongly.
pub(super) const WRONG_USE: u8 = 2;

/// Exit status where somebody has to sign in first.
pub(super) const SIGN_IN_NEEDED: u8 = 4;

/// Width of the report of a configuration's mistakes, in columns: that of the smallest terminal.
const WIDTH: usize = 80;

impl Failure {
    /// A failure with exit status 1.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { status: 1, message: message.into(), hints: Vec::new() }
    }

    /// The same with another exit status.
    #[must_use]
    pub(super) fn status(mut self, status: u8) -> Self {
        self.status = status;
        self
    }

    /// The same with one more line of what to type.
    #[must_use]
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// A failure that concerns a file.
    pub(super) fn at(file: &Path, error: impl Display) -> Self {
        Self::new(format!("{}: {error}", file.display()))
    }

    /// The same failure, about what a setting or a variable names.
    #[must_use]
    pub(super) fn about(mut self, named_by: &str) -> Self {
        self.message = format!("{named_by}: {}", self.message);
        self
    }

    /// The sentence.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The first line of what to type.
    pub(super) fn first_hint(&self) -> Option<&str> {
        self.hints.first().map(String::as_str)
    }

    /// Prints the failure and gives its exit status. A message of several lines is printed as it is.
    pub(super) fn report(&self) -> u8 {
        if self.message.contains('\n') {
            words(self.message.trim_end());
        } else {
            words(format_args!("\u{1b}[1;31merror:\u{1b}[0m {}", self.message));
        }
        self.hints.iter().for_each(hint);
        self.status
    }
}

/// An error that knows what to type next.
pub(super) trait Hinted: std::error::Error {
    /// What to type, where there is something.
    fn hint(&self) -> Option<String>;
}

impl Hinted for CaError {
    fn hint(&self) -> Option<String> {
        self.hint()
    }
}

impl Hinted for TrustError {
    fn hint(&self) -> Option<String> {
        self.hint().map(str::to_owned)
    }
}

impl Hinted for SourceError {
    fn hint(&self) -> Option<String> {
        Some(self.hint())
    }
}

impl Hinted for LoginError {
    fn hint(&self) -> Option<String> {
        self.hint()
    }
}

impl Hinted for StoreError {
    fn hint(&self) -> Option<String> {
        Some(self.hint())
    }
}

/// The failure that an error with a hint is.
pub(super) fn hinted<E: Hinted>(error: E) -> Failure {
    let hint = error.hint();
    let failure = Failure::from(error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// The failure that a credential is which the configuration does not have.
pub(super) fn no_credential(config: &Config, name: &CredentialName) -> Failure {
    if mistyped::holds_key(name.as_str()) {
        return mistyped::a_key_was_typed();
    }
    let known: Vec<&str> = config.credentials.keys().map(CredentialName::as_str).collect();
    Failure::new(format!("there is no credential `{name}`"))
        .status(WRONG_USE)
        .hint(format!("the configuration has: {}", known.join(", ")))
}

/// So many of something, which has an `s` where they are more or fewer than one.
pub(super) fn counted<N: Display + PartialEq + From<u8>>(count: N, what: &str) -> String {
    let end = if count == N::from(1) { "" } else { "s" };
    format!("{count} {what}{end}")
}

/// The failure that a configuration with mistakes is: every mistake, with its line.
pub(super) fn mistakes(errors: ConfigErrors) -> Failure {
    let colour = AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never;
    Failure::new(errors.render(colour, WIDTH)).status(WRONG_USE)
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(chain_of(&error))
    }
}

/// An error and its causes, behind colons.
pub(super) fn chain_of(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(": ");
        message.push_str(&error.to_string());
        cause = error.source();
    }
    message
}

/// Writes data to stdout. A reader that has gone is not an error: it has seen enough.
pub(super) fn data(text: impl Display) {
    // `write!` and not `println!`, which would panic on a closed pipe.
    note_lost(writeln!(stdout().lock(), "{text}"));
}

/// Writes data of which somebody must have seen all.
///
/// # Errors
///
/// Those of writing, also that its reader has gone.
pub(super) fn shown(text: impl Display) -> std::io::Result<()> {
    let mut stdout = stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Data that could not be written, for another reason than a reader that has gone.
static LOST: OnceLock<std::io::Error> = OnceLock::new();

fn note_lost(written: std::io::Result<()>) {
    if let Err(error) = written
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        LOST.get_or_init(|| error);
    }
}

/// The failure that data is which could not be written.
pub(super) fn lost() -> Option<Failure> {
    LOST.get().map(|error| Failure::new(format!("standard output: {error}")))
}

/// Breaks a text at spaces into lines of at most so many columns, where its words allow that.
pub(super) fn wrapped(text: &str, columns: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > columns {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out
}

/// The columns of the terminal that stdout is; `None` for a file or a pipe, in which nothing is broken.
pub(super) fn columns() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok())??;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Writes data to stdout as it is, without a line's end. It is out before the next word on stderr is.
pub(super) fn raw(text: &str) {
    let mut stdout = stdout().lock();
    note_lost(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

/// A text as one word of a POSIX shell's, in quotes where it needs them.
pub(super) fn shell_word(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"%+,-./:=@_".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Says something to the person at the terminal.
pub(super) fn words(text: impl Display) {
    say(format_args!("{text}\n"));
}

fn say(text: impl Display) {
    let choice = AutoStream::choice(&std::io::stderr());
    let mut coloured = AutoStream::new(Vec::new(), choice);
    let _never_fails = write!(coloured, "{text}");
    telemetry::say(coloured.into_inner());
}

/// Says on a terminal how something goes on, in the place of what was said so before.
pub(super) fn progress(text: impl Display) {
    say(format_args!("\r\u{1b}[K{text}"));
}

/// Shows a URL as a QR code, two rows of it in a line; one that is too long for a code is not shown.
pub(super) fn qr(url: &str) {
    use qrcode::render::unicode::Dense1x2;
    let Ok(code) = qrcode::QrCode::with_error_correction_level(url, qrcode::EcLevel::L) else {
        return;
    };
    // Dark on light, whatever the terminal's colours are.
    let mut picture = code.render::<Dense1x2>();
    let picture = picture.dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build();
    words(format_args!("{picture}\n"));
}

/// Says that something is not as it should be, and goes on.
pub(super) fn warning(text: impl Display) {
    words(format_args!("\u{1b}[1;33mwarning:\u{1b}[0m {text}"));
}

/// Says what to do about the warning before it.
pub(super) fn hint(text: impl Display) {
    words(format_args!("\u{1b}[1mhint:\u{1b}[0m {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_at_spaces() {
        let table = [
            ("", ""),
            ("a bc def", "a bc def"),
            ("aaaa bbbb cccc", "aaaa bbbb\ncccc"),
            ("a-word-that-is-too-long b", "a-word-that-is-too-long\nb"),
            ("gr\u{fc}n gelb ab", "gr\u{fc}n gelb\nab"),
        ];
        for (text, expected) in table {
            assert_eq!(wrapped(text, 10), expected);
        }
    }

    #[test]
    fn words_of_a_shell() {
        let table = [
            ("C,,", "C,,"),
            ("sql:/home/u/.pki", "sql:/home/u/.pki"),
            ("N=a@b", "N=a@b"),
            ("", "''"),
            ("/a b/c", "'/a b/c'"),
            ("~", "'~'"),
            ("it's $(id);", r"'it'\''s $(id);'"),
            ("gr\u{fc}n", "'gr\u{fc}n'"),
        ];
        for (text, expected) in table {
            assert_eq!(shell_word(text), expected);
        }
    }

    #[test]
    fn causes_stand_behind_colons() {
        let inner = std::io::Error::other("disk full");
        let outer = crate::secret::UnfitSecret::Empty;
        assert_eq!(Failure::from(inner).message, "disk full");
        assert_eq!(Failure::from(outer).status(4).status, 4);
    }
}
