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
    let following =
        Following { sources: sources.clone(), home: home.to_owned(), jobs: tasks.clone() };
    tasks.spawn(following.until_nobody_listens(sender));
    Ok(receiver)
}

struct Following {
    sources: PolicySources,
    home: PathBuf,
    jobs: Tasks,
}

impl Following {
    async fn until_nobody_listens(self, policy: watch::Sender<Arc<Policy>>) {
        let changed = watch::Sender::new(());
        let mut changes = changed.subscribe();
        let _watcher = watcher(&folders(&self.sources.files(&self.home)), changed);
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                // Without a watcher nothing is heard, and everything is seen at the next look.
                Ok(()) = changes.changed() => {}
                () = policy.closed() => return,
            }
            let (sources, home) = (self.sources.clone(), self.home.clone());
            match self.jobs.spawn_blocking(move || sources.read(&home)).await {
                Ok(Ok(now)) => {
                    policy.send_if_modified(|known| {
                        let is_new = **known != now;
                        *known = Arc::new(now);
                        is_new
                    });
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "what is allowed cannot be read: it stays as it was");
                }
                Err(_) => tracing::error!("what is allowed was not read to the end"),
            }
        }
    }
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
