//! Checks that every line of an audit follows on the one before it.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use super::file::{Locked, number_of, numbered};
use super::line::{Chain, FILE, NOTHING, Read, TORN};
use crate::secret::Fingerprint;

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// The files that are sound, the oldest first; of one that is broken, the lines before that.
    pub sound: Vec<Sound>,
    /// The first line that is not, after which nothing was looked at.
    pub broken: Option<Broken>,
    /// How many lines say that they are missing, because they could not be written.
    pub lost: u64,
    /// Number and SHA-256 of the last line.
    pub head: Option<(u64, String)>,
    /// Number and SHA-256 of the line before the first, where that is not the beginning of all.
    pub follows: Option<(u64, String)>,
    /// Whether the first line is one that a file, or a chain, begins with.
    pub begins_a_file: bool,
    /// Whether the head that was asked for is there; `None` where none was.
    pub has_kept_head: Option<bool>,
}

/// A file, or the sound part of it.
#[derive(Debug)]
pub struct Sound {
    /// Which one.
    pub path: PathBuf,
    /// The numbers of its first and its last line; `None` for an empty one.
    pub lines: Option<(u64, u64)>,
    /// How often a process has ended in it while it wrote a line.
    pub torn: u64,
}

/// Where an audit is not as it was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken {
    /// In which file.
    pub path: PathBuf,
    /// In which of its lines, from 1.
    pub line: u64,
    /// What is wrong.
    pub why: String,
}

/// The files of an audit that are there, open, the oldest first. None of them is moved meanwhile.
///
/// # Errors
///
/// Those of opening one.
pub fn files_of(path: &Path) -> io::Result<Vec<(PathBuf, File)>> {
    let _locked = Locked::to_read(path);
    let mut aside = Vec::new();
    // All that are there: one that is missing between two others must show.
    for found in fs::read_dir(folder_of(path))? {
        aside.extend(number_of(path, &found?.file_name()));
    }
    aside.sort_unstable_by(|one, other| other.cmp(one));
    let aside = aside.into_iter().map(|number| numbered(path, number));
    let open = |path: PathBuf| Ok((path.clone(), File::open(path)?));
    aside.chain([path.to_owned()]).map(open).collect()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Checks these files, of which each must go on where the one before it ends. `kept` is the SHA-256 of a line that was
/// its last one once.
///
/// # Errors
///
/// Those of reading, with the file.
pub fn verify(
    files: Vec<(PathBuf, File)>,
    kept: Option<&str>,
) -> Result<Report, (PathBuf, io::Error)> {
    let mut walk = Walk { kept, report: Report::default(), chain: None };
    walk.report.has_kept_head = kept.map(|_| false);
    for (path, file) in files {
        let is_sound = walk.file(path.clone(), BufReader::new(file));
        if !is_sound.map_err(|error| (path, error))? {
            break;
        }
    }
    walk.report.head = walk.chain.map(|chain| (chain.seq, chain.hash));
    Ok(walk.report)
}

struct Walk<'a> {
    kept: Option<&'a str>,
    report: Report,
    /// After the last line; `None` before the first.
    chain: Option<Chain>,
}

impl Walk<'_> {
    /// Whether it is sound.
    fn file(&mut self, path: PathBuf, mut lines: impl io::BufRead) -> io::Result<bool> {
        let mut sound = Sound { path, lines: None, torn: 0 };
        let (mut torn, mut torn_at) = (Vec::new(), 0);
        for number in 1.. {
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let is_whole = line.pop_if(|last| *last == b'\n').is_some();
            let found = Read::of(&line).filter(|_| is_whole);
            let Some(found) = found else {
                torn_at = if torn.is_empty() { number } else { torn_at };
                torn.extend(line);
                torn.extend(is_whole.then_some(b'\n'));
                continue;
            };
            if let Err(why) = self.follow(&found, &torn) {
                self.report.broken = Some(Broken { path: sound.path.clone(), line: number, why });
                self.report.sound.push(sound);
                return Ok(false);
            }
            sound.torn += u64::from(!std::mem::take(&mut torn).is_empty());
            self.take(&found, &line);
            let first = sound.lines.map_or(found.seq, |(first, _)| first);
            sound.lines = Some((first, found.seq));
        }
        if torn.contains(&b'\n') {
            // Whoever finds a torn line says so in the next one; nobody leaves a whole one that is none.
            let why = "this is no line of an audit".to_owned();
            self.report.broken = Some(Broken { path: sound.path.clone(), line: torn_at, why });
        }
        sound.torn += u64::from(!torn.is_empty() && self.report.broken.is_none());
        self.report.sound.push(sound);
        Ok(self.report.broken.is_none())
    }

    /// Whether a line follows on those before; `torn` is what stands between.
    fn follow(&self, found: &Read, torn: &[u8]) -> Result<(), String> {
        let told = found.torn.as_deref();
        match (torn.is_empty(), found.event == TORN) {
            (false, false) => return Err("what stands before it is no line of an audit".to_owned()),
            (is_empty, true) if is_empty || told != Some(&Fingerprint::of(torn).to_hex()) => {
                return Err("the torn line that it speaks of is not there as it was".to_owned());
            }
            _ => {}
        }
        let Some(chain) = &self.chain else { return Ok(()) };
        let expected = chain.seq.saturating_add(1);
        if found.seq > expected {
            let (first, last) = (expected, found.seq - 1);
            return Err(match first == last {
                true => format!("line {first} of the chain is missing before it"),
                false => format!("lines {first} to {last} of the chain are missing before it"),
            });
        }
        if found.seq < expected {
            let (is, before) = (found.seq, chain.seq);
            return Err(format!("it is line {is} of the chain and stands behind line {before}"));
        }
        if found.prev != chain.hash {
            return Err(
                "it does not follow on the line before it: one of the two was changed".to_owned()
            );
        }
        Ok(())
    }

    fn take(&mut self, found: &Read, line: &[u8]) {
        if self.chain.is_none() {
            let begins_a_chain = found.prev == NOTHING;
            self.report.begins_a_file = begins_a_chain || [FILE, TORN].contains(&&*found.event);
            let before = (found.seq.saturating_sub(1), found.prev.clone());
            self.report.follows = Some(before).filter(|_| !begins_a_chain);
        }
        let hash = Fingerprint::of(line).to_hex();
        if self.kept == Some(hash.as_str()) {
            self.report.has_kept_head = Some(true);
        }
        self.report.lost += found.lost;
        self.chain = Some(Chain { seq: found.seq, hash });
    }
}
