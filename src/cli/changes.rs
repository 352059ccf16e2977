//! Hears of changes of files that a running proxy goes by.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;

/// Tells when it is worth reading some files again.
pub(super) struct Changes {
    changed: watch::Receiver<()>,
    _watcher: Option<RecommendedWatcher>,
}

impl Changes {
    /// Changes of these files, and of what is in those of them that are folders, from now on.
    pub(super) fn of(places: Vec<PathBuf>) -> Self {
        let (sender, changed) = watch::channel(());
        Self { changed, _watcher: watcher(places, sender) }
    }

    /// Returns when something may have changed: when it was heard of, else at the next look.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            // Without a watcher nothing is heard, and everything is seen at the next look.
            Ok(()) = self.changed.changed() => {}
        }
    }
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

/// How often the files are looked at although no change was heard of: folders come to be, links are turned.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);
