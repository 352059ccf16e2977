//! The file of the audit: lines are only ever added, by one process at a time, and old files are kept for a while.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, OFlags};
use time::OffsetDateTime;

use super::line::{Chain, FILE, TORN};
use super::{Entry, What};
use crate::lock;
use crate::secret::Fingerprint;
use crate::sink::Writer;

/// A file that lines are added to. Any number of processes may have the same one: each locks it for a moment, and goes
/// on where the last one has ended, so that there is one chain for all.
#[derive(Debug)]
pub struct AuditFile {
    path: PathBuf,
    /// A file of this size is put aside, and another one begun.
    most: u64,
    /// How many that were put aside are kept.
    keep: u32,
    /// Locked while something is written, and never replaced.
    lock: File,
    open: Option<Open>,
    /// The last line that this process has written: a file that says less has lost some.
    last: Chain,
    failed: Option<Instant>,
}

/// The file as this process has left it.
#[derive(Debug)]
struct Open {
    file: File,
    /// Device and number, by which a file is known that was put aside.
    id: (u64, u64),
    len: u64,
    chain: Chain,
}

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The system does not let us.
    #[error("{}: {error}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it says.
        error: io::Error,
    },
    /// It is none that we may write.
    #[error("{}: {why}", .path.display())]
    Unfit {
        /// Which file.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
}

impl AuditError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Io { error, .. } if error.kind() == io::ErrorKind::IsADirectory => {
                "name a file in it: [audit] file = \"…\"".to_owned()
            }
            Self::Io { error, .. } if is_of_a_link(error) => {
                "name the file itself and no link to it: [audit] file = \"…\"".to_owned()
            }
            Self::Io { path, .. } => match path.parent() {
                Some(folder) if folder.as_os_str().is_empty() => {
                    "is there room, and is it yours? ls -ld .".to_owned()
                }
                Some(folder) => {
                    format!("is there room, and is it yours? ls -ld {}", folder.display())
                }
                None => "name a file that can be written".to_owned(),
            },
            Self::Unfit { .. } => "name another file: [audit] file = \"…\"".to_owned(),
        }
    }
}

/// Whether the system does not follow a link there.
fn is_of_a_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

impl AuditFile {
    /// Opens the file, or makes it and its folder. `most` is in bytes; at least one old file is kept.
    ///
    /// # Errors
    ///
    /// [`AuditError`] for a file that cannot be written, belongs to another user, or holds something else.
    pub fn open(path: &Path, most: u64, keep: u32) -> Result<Self, AuditError> {
        let at = |error| AuditError::Io { path: path.to_owned(), error };
        // Before a lock is made beside it.
        if path.is_dir() {
            return Err(at(io::ErrorKind::IsADirectory.into()));
        }
        if let Some(folder) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at)?;
        }
        let lock = open(&lock_of(path))?;
        let (path, keep) = (path.to_owned(), keep.max(1));
        let mut file =
            Self { path, most, keep, lock, open: None, last: Chain::default(), failed: None };
        // Whoever is served meanwhile waits, and whoever holds it may stand still.
        let _locked = Locked::wait_at_most(LOCK_LIMIT, file.lock.try_clone().map_err(at)?)
            .map_err(|error| AuditError::Io { path: lock_of(&file.path), error })?;
        file.look()?;
        Ok(file)
    }

    /// Looks whether [`AuditFile::open`] could do what it does, and makes nothing.
    ///
    /// # Errors
    ///
    /// As that of [`AuditFile::open`].
    pub fn look_ahead(path: &Path) -> Result<(), AuditError> {
        let at = |error| AuditError::Io { path: path.to_owned(), error };
        let is_there = |path: &Path| fs::symlink_metadata(path).is_ok();
        if is_there(path) {
            let end = End::of(&mut open(path)?).map_err(at)?;
            if end.chain.is_none() && end.len > 0 && end.torn.is_none() {
                return Err(AuditError::Unfit { path: path.to_owned(), why: NO_AUDIT });
            }
        }
        let lock = lock_of(path);
        if is_there(&lock) {
            open(&lock)?;
        }
        if is_there(path) && is_there(&lock) {
            return Ok(());
        }
        let Some(folder) = path.ancestors().skip(1).find(|folder| is_there(folder)) else {
            return Ok(());
        };
        if !folder.is_dir() {
            return Err(at(io::ErrorKind::NotADirectory.into()));
        }
        let to_add = Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::access(folder, to_add).map_err(|error| at(error.into()))
    }

    /// Adds these, after a line that says how many were lost, if any were.
    ///
    /// # Errors
    ///
    /// How many of all these lines are written, and what was in the way of the others.
    fn append(&mut self, entries: &[Entry], lost: u64) -> Result<(), (usize, AuditError)> {
        let at = |error| (0, AuditError::Io { path: self.path.clone(), error });
        let _locked = Locked::wait(self.lock.try_clone().map_err(at)?).map_err(at)?;
        self.look().map_err(|error| (0, error))?;
        let now = entries.first().map(|entry| entry.time);
        let gap = now.filter(|_| lost > 0).map(|time| Entry::lost(lost, time));
        let mut written = 0;
        let mut lines = Lines::default();
        for entry in gap.iter().chain(entries) {
            let failed = |(more, error)| (written + more, error);
            let (mut line, mut chain) = lines.end().unwrap_or_else(|| self.chain()).line(entry);
            if self.is_full(&lines, line.len()) {
                written += self.put(std::mem::take(&mut lines)).map_err(failed)?;
                self.turn(entry.time).map_err(|error| (written, error))?;
                (line, chain) = self.chain().line(entry);
            }
            lines.add(&line, chain);
        }
        self.put(lines).map(drop).map_err(|(more, error)| (written + more, error))
    }

    /// The file as it is now, whoever has written to it meanwhile; locked.
    fn look(&mut self) -> Result<(), AuditError> {
        let now = fs::symlink_metadata(&self.path).ok();
        if let (Some(open), Some(now)) = (&self.open, &now)
            && open.id == (now.dev(), now.ino())
            && open.len == now.len()
        {
            return Ok(());
        }
        let mut file = open(&self.path)?;
        let found = End::of(&mut file).map_err(|error| self.trouble(error))?;
        let before = match (&found.chain, found.len) {
            (Some(chain), _) => chain.clone(),
            (None, len) if len == 0 || found.torn.is_some() => self.chain_of_the_file_before(),
            (None, _) => return Err(self.unfit(NO_AUDIT)),
        };
        // One that says less than was written was cut: the next line will not follow on it, and shows that.
        let chain = if before.seq < self.last.seq { self.last.clone() } else { before };
        let id = id_of(&file).map_err(|error| self.trouble(error))?;
        self.open = Some(Open { file, id, len: found.len, chain });
        // A moment is all that these lines have to say of when.
        let time = self.changed();
        if found.len == 0 {
            self.begin(time)
        } else if let Some(torn) = found.torn {
            self.go_on_after(torn, time)
        } else {
            Ok(())
        }
    }

    /// When the file was last changed, by the system.
    fn changed(&self) -> OffsetDateTime {
        let changed =
            self.open.as_ref().and_then(|open| open.file.metadata().ok()?.modified().ok());
        changed.map_or(OffsetDateTime::UNIX_EPOCH, OffsetDateTime::from)
    }

    /// The first line of a file, which names the last one of the file before.
    fn begin(&mut self, time: OffsetDateTime) -> Result<(), AuditError> {
        let what = What::File { version: env!("CARGO_PKG_VERSION") };
        self.put_behind(Vec::new(), &Entry { time, event: FILE, what })
    }

    /// What a process has left unfinished stays, and the next line says so.
    fn go_on_after(&mut self, mut torn: Vec<u8>, time: OffsetDateTime) -> Result<(), AuditError> {
        let mut start = Vec::new();
        if torn.last() != Some(&b'\n') {
            torn.push(b'\n');
            start.push(b'\n');
        }
        let what = What::Torn { torn: Fingerprint::of(&torn).to_hex() };
        self.put_behind(start, &Entry { time, event: TORN, what })
    }

    /// Writes one line behind these bytes, which are the end of another.
    fn put_behind(&mut self, bytes: Vec<u8>, entry: &Entry) -> Result<(), AuditError> {
        let mut lines = Lines { bytes, ..Lines::default() };
        let (line, chain) = self.chain().line(entry);
        lines.add(&line, chain);
        self.put(lines).map(drop).map_err(|(_, error)| error)
    }

    /// Writes lines that follow on what is there, and answers how many they are.
    ///
    /// # Errors
    ///
    /// How many of them are whole, and why the rest is not.
    fn put(&mut self, lines: Lines) -> Result<usize, (usize, AuditError)> {
        let Some(open) = &mut self.open else {
            return Err((0, self.trouble(io::ErrorKind::NotFound.into())));
        };
        let Err((len, error)) = write_all(&mut open.file, &lines.bytes) else {
            open.len += lines.bytes.len() as u64;
            if let Some((_, chain)) = lines.ends.last() {
                open.chain = chain.clone();
                self.last = chain.clone();
            }
            return Ok(lines.ends.len());
        };
        let whole = lines.ends.iter().take_while(|(end, _)| *end <= len);
        let (count, end) = whole.clone().fold((0, 0), |(count, _), (end, _)| (count + 1, *end));
        if let Some((_, chain)) = whole.last() {
            self.last = chain.clone();
        }
        // The half of a line that is our own goes; where it cannot, it is told of when the file is opened again.
        let _cut = open.file.set_len(open.len + end as u64);
        self.open = None;
        Err((count, self.trouble(error)))
    }

    /// Whether another line of this length is for another file.
    fn is_full(&self, lines: &Lines, length: usize) -> bool {
        let held = self.open.as_ref().map_or(0, |open| open.len);
        held > 0 && held + (lines.bytes.len() + length) as u64 > self.most
    }

    /// Puts the file aside, and begins another one.
    fn turn(&mut self, time: OffsetDateTime) -> Result<(), AuditError> {
        if let Some(open) = self.open.take() {
            self.last = open.chain;
            open.file.sync_data().map_err(|error| self.trouble(error))?;
        }
        self.delete_what_is_kept_no_more()?;
        for number in (1..=self.keep).rev() {
            let from = match number {
                1 => self.path.clone(),
                _ => numbered(&self.path, number - 1),
            };
            match fs::rename(&from, numbered(&self.path, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(AuditError::Io { path: from, error });
                }
                _ => {}
            }
        }
        let file = open(&self.path)?;
        let id = id_of(&file).map_err(|error| self.trouble(error))?;
        self.open = Some(Open { file, id, len: 0, chain: self.last.clone() });
        self.begin(time)
    }

    /// Deletes what was put aside while more were kept: the one after which it stands is about to go. The oldest first,
    /// so that there is no gap at any time.
    fn delete_what_is_kept_no_more(&self) -> Result<(), AuditError> {
        let beyond = (self.keep.saturating_add(1)..).map(|number| numbered(&self.path, number));
        let is_file = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|it| it.is_file());
        let there: Vec<_> = beyond.take_while(is_file).collect();
        for path in there.into_iter().rev() {
            fs::remove_file(&path).map_err(|error| AuditError::Io { path, error })?;
        }
        Ok(())
    }

    fn chain_of_the_file_before(&self) -> Chain {
        let before = numbered(&self.path, 1);
        let read = || End::of(&mut File::open(before).ok()?).ok()?.chain;
        if self.last.seq > 0 { self.last.clone() } else { read().unwrap_or_default() }
    }

    /// The chain after all that is written.
    fn chain(&self) -> &Chain {
        self.open.as_ref().map_or(&self.last, |open| &open.chain)
    }

    fn trouble(&self, error: io::Error) -> AuditError {
        AuditError::Io { path: self.path.clone(), error }
    }

    fn unfit(&self, why: &'static str) -> AuditError {
        AuditError::Unfit { path: self.path.clone(), why }
    }
}

impl Writer<Entry> for AuditFile {
    fn write(&mut self, entries: Vec<Entry>, lost: u64) -> u64 {
        let all = lost + entries.len() as u64;
        if self.failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return all;
        }
        if entries.is_empty() {
            // They are told with the next line, which says when.
            return lost;
        }
        match self.append(&entries, lost) {
            Ok(()) => {
                if self.failed.take().is_some() {
                    tracing::info!("the audit is written again");
                }
                0
            }
            Err((written, error)) => {
                if self.failed.is_none() {
                    tracing::error!(%error, "the audit cannot be written: lines are lost, and will be counted");
                }
                self.failed = Some(Instant::now());
                match (written, lost) {
                    (0, _) => all,
                    (written, 0) => entries.len().saturating_sub(written) as u64,
                    (written, _) => (entries.len() + 1).saturating_sub(written) as u64,
                }
            }
        }
    }

    fn flush(&mut self) {
        if let Some(open) = &self.open
            && let Err(error) = open.file.sync_data()
        {
            tracing::warn!(%error, "the audit may not last");
        }
    }
}

/// Lines that follow on one another, not written yet.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Where each ends, and the chain there.
    ends: Vec<(usize, Chain)>,
}

impl Lines {
    /// The chain after the last one.
    fn end(&self) -> Option<&Chain> {
        self.ends.last().map(|(_, chain)| chain)
    }

    /// Adds a line, with the chain as it is after it.
    fn add(&mut self, line: &[u8], chain: Chain) {
        self.bytes.extend(line);
        self.ends.push((self.bytes.len(), chain));
    }
}

/// How a file ends.
struct End {
    len: u64,
    /// After its last whole line; `None` where there is none.
    chain: Option<Chain>,
    /// What stands behind that; where there is none, what of the first line there is.
    torn: Option<Vec<u8>>,
}

impl End {
    fn of(file: &mut File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        for tail in [TAIL, len] {
            let from = len.saturating_sub(tail);
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.take(len - from).read_to_end(&mut bytes)?;
            if let Some((chain, end)) = last_line(&bytes, from == 0) {
                let torn = Some(bytes.split_off(end)).filter(|torn| !torn.is_empty());
                return Ok(Self { len, chain: Some(chain), torn });
            }
        }
        // No line is as long as what is read at once.
        let mut start = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.take(TAIL).read_to_end(&mut start)?;
        let is_torn = len > 0 && len < TAIL && Chain::may_begin_with(&start);
        Ok(Self { len, chain: None, torn: is_torn.then_some(start) })
    }
}

/// The last whole line, and where it ends; the first one only where the bytes begin with a line.
fn last_line(bytes: &[u8], is_whole: bool) -> Option<(Chain, usize)> {
    let mut end = bytes.len();
    while let Some(newline) = bytes[..end].iter().rposition(|byte| *byte == b'\n') {
        let before = bytes[..newline].iter().rposition(|byte| *byte == b'\n');
        let start = match before {
            Some(before) => before + 1,
            None if is_whole => 0,
            None => return None,
        };
        if let Some(chain) = Chain::after(&bytes[start..newline]) {
            return Some((chain, newline + 1));
        }
        end = newline;
    }
    None
}

/// How much was written, and why not all.
fn write_all(file: &mut File, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut len = 0;
    while len < bytes.len() {
        match file.write(&bytes[len..]) {
            Ok(0) => return Err((len, io::ErrorKind::WriteZero.into())),
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((len, error)),
        }
    }
    Ok(())
}

/// Opens a file of ours to add to; links, pipes and files of other users are refused.
fn open(path: &Path) -> Result<File, AuditError> {
    let at = |error| AuditError::Io { path: path.to_owned(), error };
    let unfit = |why| AuditError::Unfit { path: path.to_owned(), why };
    // A pipe would hold whoever opens it.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600).custom_flags(flags);
    let file = options.open(path).map_err(at)?;
    let found = file.metadata().map_err(at)?;
    if !found.is_file() {
        return Err(unfit("it is no file"));
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(unfit("it belongs to another user"));
    }
    if found.mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600)).map_err(at)?;
    }
    Ok(file)
}

fn id_of(file: &File) -> io::Result<(u64, u64)> {
    let found = file.metadata()?;
    Ok((found.dev(), found.ino()))
}

/// A lock that is held until this is dropped.
pub(super) struct Locked(File);

impl Locked {
    fn wait(lock: File) -> io::Result<Self> {
        lock.lock()?;
        Ok(Self(lock))
    }

    fn wait_at_most(limit: Duration, lock: File) -> io::Result<Self> {
        match lock::wait(&lock, limit)? {
            true => Ok(Self(lock)),
            false => Err(io::Error::other("another process holds it and does not let go")),
        }
    }

    /// That of an audit which is only read; `None` where nobody has written one.
    pub(super) fn to_read(path: &Path) -> Option<Self> {
        let lock = File::open(lock_of(path)).ok()?;
        lock.lock_shared().ok()?;
        Some(Self(lock))
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // A lock that is gone is given back, too.
        let _given_back = self.0.unlock();
    }
}

fn lock_of(path: &Path) -> PathBuf {
    with(path, ".lock")
}

/// The file that was put aside so many files ago.
pub(super) fn numbered(path: &Path, number: u32) -> PathBuf {
    with(path, &format!(".{number}"))
}

/// The number of a file that was put aside, of which this is the name.
pub(super) fn number_of(path: &Path, name: &OsStr) -> Option<u32> {
    let rest = name.to_str()?.strip_prefix(path.file_name()?.to_str()?)?.strip_prefix('.')?;
    let number = rest.parse().ok()?;
    // `+1` and `01` are names of something else.
    (number > 0 && numbered(path, number).file_name() == Some(name)).then_some(number)
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

/// What is wrong with a file of somebody else's.
const NO_AUDIT: &str = "it is there already, and is no audit";

/// What of a file is read to find its last line: far more than a line has.
const TAIL: u64 = 64 * 1024;

/// How long whoever begins waits for the lock: others hold it for a moment.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// How long a file that cannot be written is left alone.
const PAUSE: Duration = Duration::from_secs(1);
