//! The rotation of roots: a new one beside the old ones, and the end of the old ones.

use std::path::{Path, PathBuf};

use super::names::Names;
use super::{CaError, LocalCa, ROOT_REPLACED, Root, root};
use crate::clock::Clock;
use crate::origin::Host;

/// Where a rotation stands that was begun.
#[derive(Debug)]
pub enum Begun {
    /// A root was made. Where there was one before, that one goes on signing.
    Made(Root),
    /// A root that signs for nothing yet was there already.
    Waits(Root),
    /// No name is ruled: there is nothing to make a root for.
    NoNames,
}

impl LocalCa {
    /// Sees to it that there is a root for all these names under which nothing is signed yet, so that clients can
    /// learn it. What they trust goes on signing. The very first root signs at once.
    ///
    /// # Errors
    ///
    /// As [`LocalCa::open`].
    pub fn begin_rotation(dir: &Path, names: &[Host], clock: Clock) -> Result<Begun, CaError> {
        let before = root::load(dir)?.len();
        let mut ca = Self::open(dir, names, clock)?;
        let Some(newest) = ca.roots.last() else { return Ok(Begun::NoNames) };
        if ca.roots.len() > before {
            return Ok(Begun::Made(newest.clone()));
        }
        if ca.names.hosts().is_empty() {
            return Ok(Begun::NoNames);
        }
        if ca.waits(newest) {
            return Ok(Begun::Waits(newest.clone()));
        }
        loop {
            let number = root::next_number(&ca.roots);
            match root::make(dir, number, &ca.names, ca.clock.now())? {
                Some(made) => return Ok(Begun::Made(made)),
                // Another process has made one at this moment.
                None => ca.roots = root::load(dir)?,
            }
        }
    }

    /// Whether the newest root could sign for every name and signs for none.
    fn waits(&self, newest: &Root) -> bool {
        let now = self.clock.now();
        let last = self.roots.len() - 1;
        self.names.hosts().iter().all(|name| {
            newest.can_sign(name, now, now + ROOT_REPLACED) && self.signing_root(name) != Some(last)
        })
    }

    /// Ends a root of this folder at once: its certificate is put aside, its key deleted, and then it is not handed
    /// out any more. Gives the certificate's new place. A proxy that runs signs under it until it is started again.
    ///
    /// # Errors
    ///
    /// [`CaError::Io`], [`CaError::Unsafe`]. Doing it again finishes what was broken off.
    pub fn retire(dir: &Path, root: &Root) -> Result<PathBuf, CaError> {
        root::retire(dir, root)
    }

    /// The certificates of the roots that were retired from a folder, in no order.
    ///
    /// # Errors
    ///
    /// [`CaError::Io`].
    pub fn load_retired(dir: &Path) -> Result<Vec<Root>, CaError> {
        root::load_retired(dir)
    }
}

/// The roots that can be retired while every one of these names still has a newer root that signs for it; and those
/// whose retiring was broken off. One whose key is not here was put beside ours by somebody, and stays.
pub fn superseded(roots: &[Root], names: &[Host], clock: &Clock) -> Vec<Root> {
    let (names, now) = (Names::new(names), clock.now());
    let (mut kept, mut old): (Vec<&Root>, Vec<Root>) = (Vec::new(), Vec::new());
    for root in roots.iter().rev() {
        let is_needed = |name: &Host| {
            let newer = kept.iter().any(|newer| newer.can_sign(name, now, now + ROOT_REPLACED));
            root.can_sign(name, now, now) && !newer
        };
        let stays = kept.is_empty() || !root.signs() || names.hosts().iter().any(is_needed);
        if stays && !root.is_ending() {
            kept.push(root);
        } else {
            old.push(root.clone());
        }
    }
    old.reverse();
    old
}
