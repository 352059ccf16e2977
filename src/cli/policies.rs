//! Follows the files that say which logins are allowed, for as long as a proxy runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use super::changes::Changes;
use crate::config::{ConfigErrors, PolicyFiles};
use crate::policy::Policy;
use crate::tasks::Tasks;

/// The policy for the login of a Codex home, as it is now and as it will be. While a file of it cannot be
/// read, nothing is allowed.
///
/// # Errors
///
/// [`ConfigErrors`] when it cannot be read now.
pub(super) fn follow(
    files: &PolicyFiles,
    home: &Path,
    tasks: &Tasks,
) -> Result<watch::Receiver<Arc<Policy>>, ConfigErrors> {
    let (sender, receiver) = watch::channel(Arc::new(files.read(home)?));
    let following = Following { files: files.clone(), home: home.to_owned(), jobs: tasks.clone() };
    tasks.keep("following the policy", move || {
        following.clone().until_nobody_listens(sender.clone())
    });
    Ok(receiver)
}

#[derive(Clone)]
struct Following {
    files: PolicyFiles,
    home: PathBuf,
    jobs: Tasks,
}

impl Following {
    async fn until_nobody_listens(self, policy: watch::Sender<Arc<Policy>>) {
        let mut changes = Changes::of(self.files.files(&self.home), self.jobs.clone());
        loop {
            tokio::select! {
                () = changes.next_settled() => {}
                () = policy.closed() => return,
            }
            let reading = self.clone();
            let read = self.jobs.spawn_blocking(move || reading.read()).await;
            let now = match read {
                Ok(Some(now)) => now,
                // The user's own mistake takes nothing back that was said before.
                Ok(None) => continue,
                Err(_panicked) => Policy::unknown("what is allowed"),
            };
            policy.send_if_modified(|known| {
                let is_new = **known != now;
                *known = Arc::new(now);
                is_new
            });
        }
    }

    /// The policy as it is now; `None` while nothing but the user's own configuration makes no sense: what it said before
    /// stays in force, as all else that it said. The files stand still when they are read.
    fn read(&self) -> Option<Policy> {
        match self.files.read(&self.home) {
            Ok(policy) => Some(policy),
            Err(errors) if self.files.are_of_the_user(&errors) => None,
            Err(errors) => {
                for mistake in errors.mistakes() {
                    let file = mistake.file().unwrap_or_default();
                    let line = mistake.position().map(|(line, _)| line);
                    tracing::error!(file, line, %mistake, "what is allowed cannot be read");
                }
                let file = errors.mistakes().iter().find_map(|mistake| mistake.file());
                Some(Policy::unknown(file.unwrap_or("a file of the company's rules")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::env::Environment;
    use crate::config::{Config, MachineFiles, Overrides};

    #[test]
    fn a_users_own_mistake_takes_nothing_back_and_others_allow_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (user, etc) = (folder.path().join("config.toml"), folder.path().join("etc/valetkey"));
        std::fs::create_dir_all(&etc).unwrap();
        std::fs::write(&user, "").unwrap();
        let machine = MachineFiles::below(folder.path(), rustix::process::geteuid().as_raw());
        let overrides = Overrides { config: Some(user.clone()), ..Overrides::default() };
        let env = Environment::from_pairs([("HOME", folder.path())]);
        let files = Config::load_on(&machine, &overrides, &env).unwrap().policies;
        let home = folder.path().to_owned();
        let following = Following { files, home, jobs: Tasks::new() };
        assert_eq!(following.read(), Some(Policy::default()));
        std::fs::write(&user, "x = \"").unwrap();
        assert_eq!(following.read(), None);
        std::fs::write(etc.join("managed.toml"), "x = \"").unwrap();
        let read = following.read().expect("who owns the machine is always heard");
        assert_ne!(read, Policy::default(), "nothing is known of what is allowed");
    }
}
