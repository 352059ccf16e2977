//! `valetkey ca rotate`: a new root beside the old ones, then the end of the old ones; or both at once.

use std::path::Path;

use super::stores::{self, Store, Stores};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::cli::running;
use crate::cli::start::ca_dir;
use crate::clock::Clock;
use crate::origin::Host;
use crate::tls::ca::{Begun, LocalCa, Root, superseded};

/// What `rotate` takes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Arguments {
    /// End the old roots: delete their keys and sign under the new root. For when every client has learned it. All but the
    /// newest root end, whether a `rotate` came before or not
    #[arg(long)]
    finish: bool,

    /// End all roots at once and make a new one: a key may be in the wrong hands. Clients refuse until they
    /// have learned the new root
    #[arg(long, conflicts_with = "finish")]
    now: bool,
}

pub(super) fn run(arguments: Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    let rotation = Rotation { dir: &ca_dir(&config.paths), names: &config.ca_names() };
    if !arguments.finish && !arguments.now {
        return rotation.begin();
    }
    let roots = LocalCa::load_roots(rotation.dir).map_err(output::hinted)?;
    // Where there is no store, none has to learn anything.
    let stores = Stores::present(None, typed).unwrap_or_default().all;
    if arguments.now {
        rotation.retire(&roots)?;
        // Without names there is nothing to sign, and no root is needed.
        if !rotation.names.is_empty() {
            rotation.begin()?;
        }
    } else {
        let old = superseded(&roots, rotation.names, &Clock::system());
        if old.is_empty() {
            output::words("no old root is left; begin with: valetkey ca rotate");
            return Ok(());
        }
        let is_new = |root: &&Root| old.iter().all(|old| old.fingerprint() != root.fingerprint());
        if let Some(closed) = stores::closed(typed) {
            return Err(closed);
        }
        expect_learned(&stores, &old, &roots.iter().filter(is_new).collect::<Vec<_>>())?;
        rotation.retire(&old)?;
    }
    rotation.say_what_is_left(&stores, &config.paths.runtime_dir);
    Ok(())
}

struct Rotation<'a> {
    dir: &'a Path,
    names: &'a [Host],
}

impl Rotation<'_> {
    fn begin(&self) -> Result<(), Failure> {
        let begun = LocalCa::begin_rotation(self.dir, self.names, Clock::system());
        let (verb, root) = match begun.map_err(output::hinted)? {
            Begun::NoNames => {
                return Err(Failure::new(
                    "no rule names a host: there is nothing to make a root for",
                ));
            }
            Begun::Made(root) => ("made", root),
            Begun::Waits(root) => ("waits already:", root),
        };
        let Some(path) = root.path() else { return Ok(()) };
        output::words(format_args!(
            "{verb} {}, SHA-256 {}",
            path.display(),
            root.fingerprint().with_colons()
        ));
        output::data(path.display());
        if LocalCa::load_roots(self.dir).map_err(output::hinted)?.len() > 1 {
            output::words(
                "the old root signs on, so nothing breaks. Now let clients learn the new one:\n  \
                 valetkey ca install           for programs that go by the system's store or a browser's\n  \
                 valetkey serve, valetkey env  started again, for shells behind a running proxy\n\
                 and then: valetkey ca rotate --finish",
            );
        }
        Ok(())
    }

    fn retire(&self, roots: &[Root]) -> Result<(), Failure> {
        for root in roots {
            let aside = LocalCa::retire(self.dir, root).map_err(output::hinted)?;
            output::words(format_args!(
                "ended {}: its key is deleted, its certificate is {} now",
                stores::short_name(root),
                aside.display()
            ));
        }
        Ok(())
    }

    /// What retiring alone does not reach: stores, and proxies that hold a certificate of the old root.
    fn say_what_is_left(&self, stores: &[Box<dyn Store>], runtime_dir: &Path) {
        let retired = LocalCa::load_retired(self.dir).unwrap_or_default();
        let mut to_change = false;
        for store in stores {
            let found = store.look().unwrap_or_default();
            if retired.iter().any(|root| found.counts(root)) {
                output::warning(format_args!("{} still trusts an ended root", store.name()));
                to_change = true;
            }
        }
        if to_change {
            output::hint("valetkey ca install puts the new one in and takes the old one out");
        }
        for proxy in running::all(runtime_dir) {
            output::warning(format_args!(
                "{} (process {}) signs under the old root until it is started again",
                proxy.proxy, proxy.pid
            ));
        }
    }
}

/// Refuses to end an old root that a store has, or may have, whose place no new root has taken there.
fn expect_learned(stores: &[Box<dyn Store>], old: &[Root], new: &[&Root]) -> Result<(), Failure> {
    for store in stores {
        match store.look() {
            Ok(found) => {
                let has_old = old.iter().any(|root| found.counts(root));
                if has_old && new.iter().any(|root| !found.counts(root)) {
                    let name = store.name();
                    let message = format!("{name} has an old root and not yet the new one");
                    return Err(Failure::new(message).hint("valetkey ca install"));
                }
            }
            // What cannot be looked at may be one of them.
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}
