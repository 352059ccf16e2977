//! Sets logging up, and holds the rule of what may be logged: what valetkey says of itself.

use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

use crate::sink::{Sink, Writer};

/// Starts logging to standard error, for the messages that `filter` names (`debug`,
/// `valetkey::proxy=debug`).
///
/// Whatever the filter says, libraries are heard at `info` and above only: below that some of them print
/// header fields and handshakes, which may hold secrets.
///
/// Nobody waits for it to be written: a standard error that is full, closed or not read costs lines, which are counted,
/// and no request.
///
/// # Errors
///
/// The filter's own mistake, as a sentence.
pub fn start(filter: &str) -> Result<(), String> {
    let filter = parse(filter)?;
    let ours = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target(env!("CARGO_CRATE_NAME"), LevelFilter::DEBUG);
    let lines = fmt::layer()
        .with_writer(|| Lines)
        // It would say so on standard error, and wait there.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_filter(ours);
    let sink = Sink::start("log", MOST_WAITING, Stderr).map_err(|error| error.to_string())?;
    SINK.get_or_init(|| sink);
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|e| e.to_string())
}

/// From now on [`say`] waits for nobody, like the log: for a program that serves.
pub fn never_wait() {
    NEVER_WAITS.store(true, Ordering::Relaxed);
}

/// Says something on standard error, behind what was logged before it. What cannot be said is nobody's error.
pub fn say(text: Vec<u8>) {
    if NEVER_WAITS.load(Ordering::Relaxed) && SINK.get().is_some() {
        let _closed_or_full = Lines.write_all(&text);
        return;
    }
    flush();
    let _closed_or_full = io::stderr().write_all(&text);
}

/// Waits until what was logged is written, but not for ever.
pub fn flush() {
    if let Some(sink) = SINK.get() {
        // Where nobody reads it there is nobody to tell.
        let _is_written = sink.flush(FLUSH_LIMIT);
    }
}

/// Standard error behind its queue: each write is one line or more, whole, and fails when it is lost.
#[derive(Clone, Copy, Debug)]
pub struct Lines;

impl Write for Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let size = lines.len().saturating_add(size_of::<Vec<u8>>());
        match SINK.get() {
            Some(sink) if !sink.offer(lines.to_vec(), size) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => Ok(lines.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Stderr;

impl Writer<Vec<u8>> for Stderr {
    fn write(&mut self, entries: Vec<Vec<u8>>, lost: u64) -> u64 {
        let mut stderr = io::stderr();
        if lost > 0 && writeln!(stderr, "({lost} lines of the log were lost here)").is_err() {
            return lost + entries.len() as u64;
        }
        let failed = entries.iter().filter(|lines| stderr.write_all(lines).is_err()).count();
        failed as u64
    }
}

static SINK: OnceLock<Sink<Vec<u8>>> = OnceLock::new();
static NEVER_WAITS: AtomicBool = AtomicBool::new(false);

/// What of the log may wait to be written: some ten thousand lines.
const MOST_WAITING: usize = 2 * 1024 * 1024;

/// How long the end of the program waits for its last words: a reader that lives takes far less.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Errors of every part are heard, unless the filter says otherwise.
///
/// A word that is no level is not taken for the name of a part: nothing would be logged.
fn parse(filter: &str) -> Result<Targets, String> {
    let mut targets = Targets::new().with_default(LevelFilter::ERROR);
    for directive in filter.split(',').map(str::trim).filter(|it| !it.is_empty()) {
        let (part, level) = directive.split_once('=').unwrap_or(("", directive));
        // An empty one would be taken for `error`.
        let level = Some(level.trim()).filter(|it| !it.is_empty());
        let level = level.and_then(|it| it.parse::<LevelFilter>().ok());
        let level = level.ok_or_else(|| format!("`{directive}` is no level"))?;
        targets = match part.trim() {
            "" => targets.with_default(level),
            part => targets.with_target(part, level),
        };
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_filter() {
        let table = [
            ("", "error"),
            ("debug", "debug"),
            ("INFO", "info"),
            ("off", "off"),
            ("valetkey::proxy=debug", "valetkey::proxy=debug,error"),
            (" warn , valetkey::proxy = off,", "valetkey::proxy=off,warn"),
            ("warn,debug", "debug"),
        ];
        for (filter, meaning) in table {
            assert_eq!(parse(filter).map(|it| it.to_string()), Ok(meaning.to_owned()), "{filter}");
        }
        let wrong = ["verbose", "valetkey", "debu", "valetkey=", "a=b=c", "[connection]"];
        for filter in wrong {
            let mistake = parse(filter).expect_err(filter);
            assert!(mistake.ends_with("` is no level"), "{filter}: {mistake}");
        }
    }
}
