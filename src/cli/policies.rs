//! Follows the files that say which logins are allowed, for as long as a proxy runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;

use crate::config::{ConfigErrors, PolicySources};
use crate::policy::Policy;
use crate::tasks::Tasks;

/// The policy for the login of a Codex home, as it is now and as it will be. One that cannot be read later
/// leaves the last one in force.
///
/// # Errors
///
/// [`ConfigErrors`] when it cannot be read now.
pub(super) fn follow(
    sources: &PolicySources,
    home: &Path,
    tasks: &Tasks,
) -> Result<watch::Receiver<Arc<Policy>>, ConfigErrors> {
    let (sender, receiver) = watch::channel(Arc::new(sources.read(home)?));
    let (sources, home) = (sources.clone(), home.to_owned());
    tasks.spawn(async move {
        let changed = watch::Sender::new(());
        let mut changes = changed.subscribe();
        let _watcher = watcher(&folders(&sources.files(&home)), changed);
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                // Without a watcher nothing is heard, and everything is seen at the next look.
                Ok(()) = changes.changed() => {}
                () = sender.closed() => return,
            }
            match sources.read(&home) {
                Ok(policy) => {
                    let is_new = |known: &mut Arc<Policy>| **known != policy;
                    sender.send_if_modified(|known| {
                        is_new(known) && {
                            *known = Arc::new(policy.clone());
                            true
                        }
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "what is allowed cannot be read: it stays as it was")
                }
            }
        }
    });
    Ok(receiver)
}

fn folders(files: &[PathBuf]) -> BTreeSet<&Path> {
    files.iter().filter_map(|file| file.parent()).filter(|folder| folder.is_dir()).collect()
}

fn watcher(folders: &BTreeSet<&Path>, changed: watch::Sender<()>) -> Option<RecommendedWatcher> {
    let heard = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            changed.send_replace(());
        }
    };
    let mut watcher = notify::recommended_watcher(heard).ok()?;
    for folder in folders {
        if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
            tracing::debug!(%error, "a policy's folder is looked at, not heard of");
        }
    }
    Some(watcher)
}

/// How often the files are looked at although no change was heard of: folders come to be, too.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);
