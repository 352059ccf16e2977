//! Follows the passes for as long as a proxy runs: new and revoked ones, those whose time is over, and how often each
//! was used.

use std::sync::Arc;
use std::time::Duration;

use super::changes::Changes;
use super::output;
use crate::access::{Passes, Record};
use crate::clock::Clock;
use crate::config::Config;
use crate::secret::Fingerprint;
use crate::store::StoreError;
use crate::store::passes::PassFile;
use crate::tasks::Tasks;

/// Where the passes are kept.
pub(super) fn file(config: &Config) -> PassFile {
    PassFile::new(config.paths.data_dir.join("passes"))
}

/// The passes that a proxy goes by, and their file.
pub(super) struct Followed {
    pub(super) passes: Arc<Passes>,
    file: PassFile,
    clock: Clock,
    jobs: Tasks,
}

impl Followed {
    /// The passes as they are now. Nothing is followed yet.
    ///
    /// # Errors
    ///
    /// [`StoreError`] for a file that cannot be read: nobody is let in by half of it.
    pub(super) fn read(file: PassFile, clock: Clock, jobs: Tasks) -> Result<Self, StoreError> {
        file.make_folder()?;
        let passes = Arc::new(Passes::default());
        passes.replace(file.read()?, &[]);
        Ok(Self { passes, file, clock, jobs })
    }

    /// Follows them to the end of the runtime.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut changes = Changes::of(vec![self.file.path()], self.jobs.clone());
        let mut complaint = None;
        loop {
            let next = self.passes.end_expired(self.clock.now());
            let until_next = next.map_or(LONGEST, |at| {
                Duration::try_from(at - self.clock.now()).unwrap_or_default().min(LONGEST)
            });
            let said = tokio::select! {
                () = changes.next() => self.look().await.err(),
                () = tokio::time::sleep(until_next.max(SHORTEST)) => continue,
                () = tokio::time::sleep(SAVED_EVERY) => self.save().await.err(),
            };
            let said = said.map(|error| {
                format!("{}; the passes from before stay in force", output::chain_of(&error))
            });
            // A file that stays broken is complained of once.
            if let Some(said) = said.as_ref().filter(|said| complaint.as_ref() != Some(*said)) {
                output::warning(said);
            }
            complaint = said;
        }
    }

    /// Reads them again.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then those from before stay in force.
    pub(super) async fn look(&self) -> Result<(), StoreError> {
        let file = self.file.clone();
        self.now_in_force(move || file.read(), &[]).await
    }

    /// Saves how often they were used, where that has changed.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then it is tried again.
    pub(super) async fn save(&self) -> Result<(), StoreError> {
        let counted = self.passes.unsaved();
        if counted.is_empty() {
            return Ok(());
        }
        let (file, used) = (self.file.clone(), counted.clone());
        self.now_in_force(move || file.count(&used), &counted).await
    }

    async fn now_in_force(
        &self,
        read: impl FnOnce() -> Result<Vec<Record>, StoreError> + Send + 'static,
        counted: &[(Fingerprint, u64)],
    ) -> Result<(), StoreError> {
        // A panic in there changes nothing.
        if let Ok(records) = self.jobs.spawn_blocking(read).await {
            self.passes.replace(records?, counted);
        }
        Ok(())
    }
}

/// How often uses are saved: a crash loses what was counted since.
const SAVED_EVERY: Duration = Duration::from_secs(1);

/// How long the next end of a pass is waited for at most, because clocks are set.
const LONGEST: Duration = Duration::from_secs(60);

/// And at least, so that a clock that stands still costs nothing.
const SHORTEST: Duration = Duration::from_millis(10);
