//! Hears of changes of files that a running proxy goes by.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;
use tokio::time::Instant;

use super::output;
use crate::tasks::Tasks;

/// Tells when it is worth reading some files again.
pub(super) struct Changes {
    places: Arc<[PathBuf]>,
    /// What could be seen of them from outside when they were last looked at.
    seen: Vec<Option<Outside>>,
    changed: watch::Receiver<()>,
    /// When the last change was told.
    told: Option<Instant>,
    /// How soon after it the next one is told.
    pause: Duration,
    /// Looks, which a file system may hold up.
    jobs: Tasks,
    _watcher: Option<RecommendedWatcher>,
}

/// What changes with a file, and can be seen without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outside {
    device: u64,
    /// Its number there, which is given to others again.
    number: u64,
    length: u64,
    /// When it was last changed: seconds, nanoseconds.
    changed: (i64, i64),
}

impl Outside {
    /// The file at a place; `None` for none.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        let (device, number, length) = (found.dev(), found.ino(), found.len());
        Some(Self { device, number, length, changed: (found.ctime(), found.ctime_nsec()) })
    }
}

/// What was last complained of, so that what stays wrong is said once.
#[derive(Default)]
pub(super) struct Complaint(Option<String>);

impl Complaint {
    /// Warns of what is wrong now, unless it was so before; `None` when nothing is.
    pub(super) fn now(&mut self, wrong: Option<String>) {
        if let Some(wrong) = wrong.as_ref().filter(|wrong| self.0.as_ref() != Some(*wrong)) {
            output::warning(wrong);
        }
        self.0 = wrong;
    }
}

impl Changes {
    /// Changes of these files, and of what is in those of them that are folders, from now on.
    pub(super) fn of(places: Vec<PathBuf>, jobs: Tasks) -> Self {
        let (sender, changed) = watch::channel(());
        let (seen, watcher) = (outsides(&places), watcher(places.clone(), sender));
        let (told, pause) = (None, PAUSE);
        Self { places: places.into(), seen, changed, told, pause, jobs, _watcher: watcher }
    }

    /// The same, each told at once: of a folder in which nobody else writes.
    pub(super) fn at_once(places: Vec<PathBuf>, jobs: Tasks) -> Self {
        Self { pause: Duration::ZERO, ..Self::of(places, jobs) }
    }

    /// Returns when something may have changed: when it was heard of, else at the next look, which reads
    /// nothing; and not again before a pause is over.
    pub(super) async fn next(&mut self) {
        if let Some(told) = self.told {
            tokio::time::sleep_until(told + self.pause).await;
        }
        loop {
            let was_heard = tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => false,
                // Without a watcher nothing is heard, and everything is seen at the next look.
                Ok(()) = self.changed.changed() => true,
            };
            if self.look().await || was_heard {
                self.told = Some(Instant::now());
                return;
            }
        }
    }

    /// As [`Changes::next`], and then not before the files have stood still for a moment: who writes one in place
    /// leaves half of it there meanwhile, which may make sense.
    pub(super) async fn next_settled(&mut self) {
        self.next().await;
        for _ in 0..MOST_LOOKS {
            tokio::time::sleep(STANDSTILL).await;
            // What was heard until here is seen by this look, and needs no telling of its own.
            self.changed.mark_unchanged();
            if !self.look().await {
                return;
            }
        }
    }

    /// Whether the files are others than at the last look.
    async fn look(&mut self) -> bool {
        let places = self.places.clone();
        let now = self.jobs.spawn_blocking(move || outsides(&places)).await;
        let before = std::mem::replace(&mut self.seen, now.unwrap_or_default());
        before != self.seen
    }
}

/// The files, and those in folders, from outside.
fn outsides(places: &[PathBuf]) -> Vec<Option<Outside>> {
    let inside = |place: &PathBuf| {
        let entries = std::fs::read_dir(place).into_iter().flatten();
        let mut paths: Vec<PathBuf> = entries.filter_map(|it| Some(it.ok()?.path())).collect();
        paths.sort();
        paths
    };
    let all = places.iter().flat_map(|place| [vec![place.clone()], inside(place)].concat());
    all.map(|path| Outside::of(&path)).collect()
}

/// Watches the folders that exist: the files in them are replaced, not written.
fn watcher(places: Vec<PathBuf>, changed: watch::Sender<()>) -> Option<RecommendedWatcher> {
    let itself = places.iter().filter(|place| place.is_dir()).cloned();
    let parents = places.iter().filter_map(|place| place.parent()).map(Path::to_owned);
    let folders: BTreeSet<PathBuf> = itself.chain(parents).collect();
    let is_one = move |path: &PathBuf| {
        places.iter().any(|place| path == place || path.parent() == Some(place))
    };
    let heard = move |event: notify::Result<notify::Event>| {
        let concerns = |event: notify::Event| {
            event.need_rescan() || (event.paths.iter().any(&is_one) && !event.kind.is_access())
        };
        if event.is_ok_and(concerns) {
            changed.send_replace(());
        }
    };
    let mut watcher = notify::recommended_watcher(heard).ok()?;
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
            tracing::debug!(%error, "a folder is looked at, not heard of");
        }
    }
    Some(watcher)
}

/// How soon after one change the next is told, so that a folder with a busy log in it costs two looks a second.
const PAUSE: Duration = Duration::from_millis(500);

/// How long files stand still that nobody is writing: longer than an editor needs between two writes of one file, and
/// no time for who has just saved it.
const STANDSTILL: Duration = Duration::from_millis(100);

/// How often they are looked at for that: a file that never stands still is read in the end, too.
const MOST_LOOKS: u32 = 20;

/// How often the files are looked at although no change was heard of: folders come to be, links are turned.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    /// Written in place, piece by piece: what is read in the end is whole.
    #[tokio::test(start_paused = true)]
    async fn a_file_is_told_when_it_stands_still() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        std::fs::write(&file, "").unwrap();
        let (sender, changed) = watch::channel(());
        let (places, jobs) = (vec![file.clone()], Tasks::new());
        let mut changes = Changes { changed, _watcher: None, ..Changes::of(places, jobs) };
        let writing = async {
            for length in 1..=10 {
                std::fs::write(&file, "x".repeat(length)).unwrap();
                sender.send_replace(());
                tokio::time::sleep(STANDSTILL / 2).await;
            }
        };
        let reading = async {
            changes.next_settled().await;
            std::fs::read(&file).unwrap().len()
        };
        let ((), read) = tokio::join!(writing, reading);
        assert_eq!(read, 10);
        assert!(!changes.changed.has_changed().unwrap(), "it is told once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_folder_is_looked_at_twice_a_second() {
        let (sender, changed) = watch::channel(());
        let (places, seen) = ([].into(), Vec::new());
        let jobs = Tasks::new();
        let (told, pause) = (None, PAUSE);
        let mut changes = Changes { places, seen, changed, told, pause, jobs, _watcher: None };
        let began = Instant::now();
        for told in 0..10 {
            sender.send_replace(());
            changes.next().await;
            assert_eq!(began.elapsed(), PAUSE * told);
        }
    }
}
