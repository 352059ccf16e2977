//! Notices that something changed in the folders of a store.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;

/// A number that moves with the files of a store, once somebody wants to hear of it.
pub(super) struct Watch {
    changes: watch::Sender<u64>,
    concerns: fn(&Path) -> bool,
    watched: Mutex<Watched>,
}

/// Which folders are watched, as they were then.
#[derive(Default)]
struct Watched {
    wanted: bool,
    watcher: Option<RecommendedWatcher>,
    folders: Vec<(PathBuf, u64)>,
}

impl Watch {
    /// Nothing is watched yet. A change counts when its path is one that `concerns` us.
    pub(super) fn new(concerns: fn(&Path) -> bool) -> Self {
        Self { changes: watch::Sender::new(0), concerns, watched: Mutex::default() }
    }

    /// The number, which moves from the next [`Watch::update`] on.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.watched().wanted = true;
        self.changes.subscribe()
    }

    /// Watches those of the folders that exist. Called at every read: folders come and go.
    pub(super) fn update(&self, folders: &[PathBuf]) {
        let mut watched = self.watched();
        if !watched.wanted {
            return;
        }
        if let Err(error) = self.follow(&mut watched, folders) {
            tracing::debug!(%error, "changes of a store are looked for, not heard of");
            watched.wanted = false;
        }
    }

    fn follow(&self, watched: &mut Watched, folders: &[PathBuf]) -> notify::Result<()> {
        for folder in folders {
            let Ok(about) = std::fs::metadata(folder) else { continue };
            let now = (folder.clone(), about.ino());
            if watched.folders.contains(&now) {
                continue;
            }
            let watcher = match &mut watched.watcher {
                Some(watcher) => watcher,
                none => none.insert(watcher(self.changes.clone(), self.concerns)?),
            };
            // The watch of a folder that was there before under the same name, if any.
            drop(watcher.unwatch(folder));
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
            watched.folders.retain(|(known, _)| known != folder);
            watched.folders.push(now);
        }
        Ok(())
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watcher(
    changes: watch::Sender<u64>,
    concerns: fn(&Path) -> bool,
) -> notify::Result<RecommendedWatcher> {
    notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Our own reading of it is no change.
        let moved = |event: &Event| {
            event.need_rescan()
                || (!event.kind.is_access() && event.paths.iter().any(|path| concerns(path)))
        };
        if event.is_ok_and(|event| moved(&event)) {
            changes.send_modify(|count| *count += 1);
        }
    })
}
