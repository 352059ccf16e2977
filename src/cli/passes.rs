//! Follows the passes for as long as a proxy runs: new and revoked ones, those whose time is over, and how often each
//! was used.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::Mutex;

use super::changes::{Changes, Complaint, Outside};
use super::output;
use crate::access::Passes;
use crate::clock::Clock;
use crate::config::paths::Paths;
use crate::fault;
use crate::proxy::Look;
use crate::store::StoreError;
use crate::store::passes::PassFile;
use crate::tasks::Tasks;

/// Where the passes are kept.
pub(super) fn file(paths: &Paths) -> PassFile {
    PassFile::new(paths.data_dir.join("passes"))
}

/// The passes that a proxy goes by, and their file.
pub(super) struct Followed {
    pub(super) passes: Arc<Passes>,
    file: PassFile,
    clock: Clock,
    jobs: Tasks,
    /// The file that they were read from: it is replaced with each change, never written.
    read_from: Mutex<Option<Outside>>,
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
        let read_from = Mutex::new(Outside::of(&file.path()));
        passes.replace(file.read()?, &[]);
        Ok(Self { passes, file, clock, jobs, read_from })
    }

    /// What the proxy asks before it lets somebody in by a pass: with it a pass counts from the moment that it was
    /// made, and no longer than until it was revoked, whatever is heard of the file.
    pub(super) fn looking(self: &Arc<Self>) -> Look {
        let followed = self.clone();
        Arc::new(move || {
            let followed = followed.clone();
            async move {
                if let Err(error) = followed.look().await {
                    tracing::warn!(%error, "cannot read the passes");
                }
            }
            .boxed()
        })
    }

    /// Follows them to the end of the runtime.
    pub(super) async fn follow(self: Arc<Self>) {
        tokio::join!(self.follow_file(), self.save_uses());
    }

    async fn follow_file(&self) {
        let mut changes = Changes::at_once(vec![self.file.path()], self.jobs.clone());
        let mut complaint = Complaint::default();
        fault::point("following");
        loop {
            let next = self.passes.end_expired(self.clock.now());
            let until_next = next.map_or(LONGEST, |at| {
                Duration::try_from(at - self.clock.now()).unwrap_or_default().min(LONGEST)
            });
            let error = tokio::select! {
                () = changes.next() => self.look().await.err(),
                () = tokio::time::sleep(until_next.max(SHORTEST)) => continue,
            };
            complaint.now(error.map(in_vain));
        }
    }

    /// Saves what is counted, some time after it was: much of it comes at once.
    async fn save_uses(&self) {
        let mut complaint = Complaint::default();
        loop {
            self.passes.counted().await;
            loop {
                tokio::time::sleep(SAVED_AFTER).await;
                let error = self.save().await.err();
                let is_saved = error.is_none();
                complaint.now(error.map(in_vain));
                if is_saved {
                    break;
                }
            }
        }
    }

    /// Reads them again, if they have changed.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then those from before stay in force.
    pub(super) async fn look(&self) -> Result<(), StoreError> {
        let mut read_from = self.read_from.lock().await;
        let (file, known) = (self.file.clone(), *read_from);
        let read = move || {
            // Before it is read: one that is put there meanwhile is looked at next time.
            let now = Outside::of(&file.path());
            if now == known { Ok(None) } else { Ok(Some((now, file.read()?))) }
        };
        // A panic in there changes nothing.
        if let Some((now, records)) = self.jobs.spawn_blocking(read).await.unwrap_or(Ok(None))? {
            self.passes.replace(records, &[]);
            *read_from = now;
        }
        Ok(())
    }

    /// Saves how often they were used, where that has changed.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then it is tried again.
    pub(super) async fn save(&self) -> Result<(), StoreError> {
        let mut read_from = self.read_from.lock().await;
        let counted = self.passes.unsaved();
        if counted.is_empty() {
            return Ok(());
        }
        let (file, used) = (self.file.clone(), counted.clone());
        let save =
            move || file.count(&used).map(|records| Some((Outside::of(&file.path()), records)));
        if let Some((now, records)) = self.jobs.spawn_blocking(save).await.unwrap_or(Ok(None))? {
            self.passes.replace(records, &counted);
            *read_from = now;
        }
        Ok(())
    }
}

fn in_vain(error: StoreError) -> String {
    format!("{}; the passes from before stay in force", output::chain_of(&error))
}

/// How long after a use it is saved, with those that came meanwhile: a crash loses so much.
const SAVED_AFTER: Duration = Duration::from_secs(1);

/// How long the next end of a pass is waited for at most, because clocks are set.
const LONGEST: Duration = Duration::from_secs(60);

/// And at least, so that a clock that stands still costs nothing.
const SHORTEST: Duration = Duration::from_millis(10);
