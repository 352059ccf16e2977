//! Reads where it is to be written down who asked for what.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::paths::{BadPath, Paths};
use super::table::{Table, one_of};

/// Where the audit is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AuditConfig {
    /// Nowhere.
    #[default]
    Off,
    /// To standard error, between the lines of the log.
    Stderr,
    /// Into a file.
    File {
        /// Which one.
        path: PathBuf,
        /// How large it grows before it is put aside, in bytes.
        most: u64,
        /// How many are kept that were put aside; at least one.
        keep: u32,
    },
}

/// What one text says of it.
#[derive(Clone, Debug, Default)]
pub(super) struct AuditForm {
    to: Option<To>,
    file: Option<PathBuf>,
    max_mib: Option<u32>,
    keep: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Off,
    Stderr,
    File,
}

impl AuditForm {
    /// Reads the table; `None` where there is none.
    pub(super) fn read(
        document: &Table<'_>,
        path: &impl Fn(&str) -> Result<PathBuf, BadPath>,
    ) -> Option<Self> {
        let table = document.get("audit")?.table(KEYS)?;
        let to = table.parsed("to", one_of(TO));
        if table.key("to").is_none() {
            table
                .mistakes()
                .add(table.place(), "the audit needs a `to`: `off`, `stderr` or `file`");
        }
        let is_file = to.as_ref().is_some_and(|to| to.value == To::File);
        for key in KEYS.iter().filter(|key| **key != "to" && to.is_some() && !is_file) {
            if let Some(place) = table.key(key) {
                let message = format_args!("`{key}` has no meaning without `to = \"file\"`");
                table.mistakes().add(&place, message);
            }
        }
        Some(Self {
            to: to.map(|to| to.value),
            file: table.parsed("file", path).map(|file| file.value),
            max_mib: table.get("max_mib").and_then(|value| value.number_in(&MIB)),
            keep: table.get("keep").and_then(|value| value.number_in(&KEPT)),
        })
    }

    /// What it comes to.
    pub(super) fn settle(self, paths: &Paths) -> AuditConfig {
        match self.to {
            None | Some(To::Off) => AuditConfig::Off,
            Some(To::Stderr) => AuditConfig::Stderr,
            Some(To::File) => AuditConfig::File {
                path: self.file.unwrap_or_else(|| usual_file(paths)),
                most: u64::from(self.max_mib.unwrap_or(USUAL_MIB)) * 1024 * 1024,
                keep: self.keep.unwrap_or(USUAL_KEPT),
            },
        }
    }

    /// As people read it, for what the owner of a machine settles.
    pub(super) fn in_words(&self) -> Option<String> {
        let word = TO.iter().find(|(_, to)| Some(*to) == self.to)?.0;
        let file = self.file.as_ref().map(|file| format!(", in {}", file.display()));
        Some(format!("{word}{}", file.unwrap_or_default()))
    }
}

/// Where the audit is when nobody says otherwise.
fn usual_file(paths: &Paths) -> PathBuf {
    paths.state_dir.join("audit.jsonl")
}

pub(super) const KEYS: &[&str] = &["to", "file", "max_mib", "keep"];

const TO: &[(&str, To)] = &[("off", To::Off), ("stderr", To::Stderr), ("file", To::File)];

/// Some 40,000 exchanges.
const USUAL_MIB: u32 = 16;

/// With the usual size, some 360,000 exchanges in all.
const USUAL_KEPT: u32 = 8;

/// Above it no file can be looked at any more.
const MIB: RangeInclusive<u32> = 1..=64 * 1024;

/// So many names are looked for when a file is put aside.
const KEPT: RangeInclusive<u32> = 1..=1000;
