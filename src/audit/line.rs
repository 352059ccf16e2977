//! One line of the audit, which says what the line before it was.

use serde::Serialize;
use serde_json::Value;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::{Entry, What};
use crate::secret::Fingerprint;

/// The end of a chain of lines: the last one's number, and the SHA-256 of its bytes without the line's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) seq: u64,
    pub(super) hash: String,
}

impl Default for Chain {
    /// Before the first line.
    fn default() -> Self {
        Self { seq: 0, hash: NOTHING.to_owned() }
    }
}

/// What stands for the line before the first one.
pub(super) const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What every line begins with.
const START: &[u8] = b"{\"seq\":";

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    prev: &'a str,
    time: String,
    pid: u32,
    event: &'static str,
    #[serde(flatten)]
    what: &'a What,
}

impl Chain {
    /// The next line, with its end, and the chain as it is with that.
    pub(super) fn line(&self, entry: &Entry) -> (Vec<u8>, Self) {
        let seq = self.seq.saturating_add(1);
        let time = entry.time.to_offset(time::UtcOffset::UTC).format(TIME).unwrap_or_default();
        let line = Line {
            seq,
            prev: &self.hash,
            time,
            pid: std::process::id(),
            event: entry.event,
            what: &entry.what,
        };
        // Texts and numbers always have a form in JSON.
        let mut line = serde_json::to_vec(&line).unwrap_or_default();
        let chain = Self { seq, hash: Fingerprint::of(&line).to_hex() };
        line.push(b'\n');
        (line, chain)
    }

    /// Whether this may be what is left of the first line of a file: what a line begins with, or the room for it, of
    /// which the disk has got nothing more.
    pub(super) fn may_begin_with(torn: &[u8]) -> bool {
        let is_room = torn.iter().all(|byte| *byte == 0);
        is_room || (torn.starts_with(START) && !torn.contains(&b'\n'))
    }

    /// The chain after this line, which is whole; `None` for what is no line of the audit.
    pub(super) fn after(line: &[u8]) -> Option<Self> {
        let read = Read::of(line)?;
        Some(Self { seq: read.seq, hash: Fingerprint::of(line).to_hex() })
    }
}

/// What is read of a line.
pub(super) struct Read {
    pub(super) seq: u64,
    pub(super) prev: String,
    pub(super) event: String,
    /// What `torn` or `lost` say beside.
    pub(super) torn: Option<String>,
    pub(super) lost: u64,
}

impl Read {
    /// Reads a line without its end; `None` for what is none of the audit.
    pub(super) fn of(line: &[u8]) -> Option<Self> {
        let value: Value = serde_json::from_slice(line).ok()?;
        let text = |name: &str| Some(value.get(name)?.as_str()?.to_owned());
        let event = text("event")?;
        let lost = value.get("lines").and_then(Value::as_u64).filter(|_| event == LOST);
        Some(Self {
            seq: value.get("seq")?.as_u64()?,
            prev: text("prev").filter(|prev| Fingerprint::from_hex(prev).is_some())?,
            torn: text("torn").filter(|_| event == TORN),
            lost: lost.unwrap_or_default(),
            event,
        })
    }
}

/// The event of the line that a file begins with.
pub(super) const FILE: &str = "file";

/// The event of a line that follows what a process did not finish.
pub(super) const TORN: &str = "torn";

/// The event of a line that says how many are lost.
pub(super) const LOST: &str = "lost";

/// RFC 3339 with milliseconds.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
