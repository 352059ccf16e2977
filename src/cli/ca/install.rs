//! Puts our roots into the stores of this system, and takes them out again.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::step::{Hands, Step};
use super::stores::{self, Entry, Found, Kind, Store, Stores};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::cli::start::ca_dir;
use crate::clock::Clock;
use crate::config::Config;
use crate::config::env::Environment;
use crate::tls::ca::{LocalCa, Root};

/// What `install` and `uninstall` take.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only these stores; usually both kinds, as far as they are here
    #[arg(long, value_enum)]
    store: Option<Kind>,

    /// Show the steps, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// After this each store that was meant has every root that is in use, and none that was retired or has expired.
pub(super) fn install(arguments: Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    say_whose(&typed.env);
    let dir = ca_dir(&config.paths);
    let mut roots = roots_in_use(&config, &dir, arguments.dry_run)?;
    let now = Clock::system().now();
    let retired = LocalCa::load_retired(&dir).map_err(output::hinted)?;
    // One is among both while its end is broken off.
    let is_retired = |root: &Root| retired.iter().any(|it| it.fingerprint() == root.fingerprint());
    roots.retain(|root| is_alive(root, now) && !is_retired(root));
    let mut hands = Hands::new(arguments.dry_run, stores::search(typed));
    let changed = each(arguments.store, typed, |store| {
        let found = looked(store)?;
        for root in &roots {
            if let Some(entry) =
                found.entries.iter().find(|entry| is_of(entry, root) && entry.counts)
            {
                say(&entry.name, "is there already");
            }
        }
        let missing = roots.iter().filter(|root| !found.counts(root)).cloned();
        let (missing, mut kept) = free(store, missing, |root| root);
        let is_old = |entry: &&Entry| !is_alive(&entry.root, now) || is_retired(&entry.root);
        let old = found.entries.iter().filter(is_old).cloned();
        let (old, old_kept) = free(store, old, |entry| &entry.root);
        kept.extend(old_kept);
        let to_change = !missing.is_empty() || !old.is_empty();
        if to_change {
            hands.carry_out(&store.changing(&missing, &old))?;
        }
        if to_change && !hands.are_tied() {
            let after = looked(store)?;
            missing.iter().try_for_each(|root| expect_in(store, &after, root))?;
            old.iter().try_for_each(|entry| expect_out(&after, entry))?;
        }
        say_kept(&kept, &hands)?;
        Ok(to_change && !hands.are_tied())
    })?;
    if changed {
        output::words("programs that are running see it when they are started again");
    }
    Ok(())
}

/// After this no store that was meant has a root of ours, whether we still have its file or not.
pub(super) fn uninstall(arguments: Arguments, typed: &Typed) -> Result<(), Failure> {
    say_whose(&typed.env);
    let mut hands = Hands::new(arguments.dry_run, stores::search(typed));
    each(arguments.store, typed, |store| {
        let found = looked(store)?;
        let (entries, kept) = free(store, found.entries.into_iter(), |entry| &entry.root);
        let to_change = !entries.is_empty() || !found.stale.is_empty();
        if to_change {
            hands.carry_out(&store.changing(&[], &entries))?;
        } else if kept.is_empty() {
            output::words("  nothing of ours is there");
        }
        if to_change && !hands.are_tied() {
            let after = looked(store)?;
            entries.iter().try_for_each(|entry| expect_out(&after, entry))?;
            if after.stale.is_empty() {
                found.stale.iter().for_each(|root| say(&stores::short_name(root), GONE));
            }
        }
        say_kept(&kept, &hands)?;
        Ok(to_change && !hands.are_tied())
    })?;
    Ok(())
}

/// The roots that clients are to trust; one is made where there is none for a name that is ruled, except for show.
fn roots_in_use(config: &Config, dir: &Path, dry_run: bool) -> Result<Vec<Root>, Failure> {
    let (names, clock) = (config.ca_names(), Clock::system());
    let opened = if dry_run {
        LocalCa::open_unchanged(dir, &names, clock)
    } else {
        LocalCa::open(dir, &names, clock).map(Some)
    };
    let Some(ca) = opened.map_err(output::hinted)? else {
        output::words(format_args!(
            "a root would be made first, in {}; its steps are shown when it is there",
            dir.display()
        ));
        output::hint("valetkey ca path makes it, and installs nothing");
        return LocalCa::load_roots(dir).map_err(output::hinted);
    };
    if ca.roots().is_empty() {
        return Err(Failure::new("there is no root to install: no rule names a host"));
    }
    Ok(ca.roots().to_vec())
}

/// Does this for every store that is meant, also after one has failed; gives whether any was changed.
fn each(
    kind: Option<Kind>,
    typed: &Typed,
    mut change: impl FnMut(&dyn Store) -> Result<bool, Failure>,
) -> Result<bool, Failure> {
    let (mut changed, mut failed) = (false, None);
    let stores = Stores::present(kind, typed)?;
    for missing in &stores.missing {
        output::warning(missing.message());
        missing.first_hint().into_iter().for_each(output::hint);
    }
    for store in stores.all {
        output::words(store.name());
        match change(&*store) {
            Ok(it) => changed |= it,
            Err(failure) => {
                let failure = failure.about(&store.name());
                // All are shown, the last one by the program's end.
                if let Some(earlier) = failed.replace(failure) {
                    earlier.report();
                }
            }
        }
    }
    failed.map_or(Ok(changed), Err)
}

/// Those whose places can be written and removed, and the files that are in the places of the others.
fn free<T>(
    store: &dyn Store,
    all: impl Iterator<Item = T>,
    root: impl Fn(&T) -> &Root,
) -> (Vec<T>, Vec<PathBuf>) {
    let (mut free, mut kept) = (Vec::new(), Vec::new());
    for it in all {
        match store.in_the_way(root(&it)) {
            None => free.push(it),
            Some(file) => kept.push(file),
        }
    }
    (free, kept)
}

/// Fails for files that are named like ours and hold what is another's.
fn say_kept(kept: &[PathBuf], hands: &Hands) -> Result<(), Failure> {
    if kept.is_empty() {
        return Ok(());
    }
    let files: Vec<_> = kept.iter().map(|file| file.display().to_string()).collect();
    let rm = Step::as_root(["rm".into()].into_iter().chain(kept.iter().map(OsString::from)));
    Err(Failure::new(format!("{}: left alone, for it holds what is not ours", files.join(", ")))
        .hint(format!("copy that into a file of another name, then type: {}", hands.typed(&rm)))
        .hint("then the same command again"))
}

fn looked(store: &dyn Store) -> Result<Found, Failure> {
    let found = store.look()?;
    found.notices.iter().for_each(output::warning);
    Ok(found)
}

fn expect_in(store: &dyn Store, found: &Found, root: &Root) -> Result<(), Failure> {
    if let Some(file) = store.in_the_way(root) {
        let ours = root.path().map(OsString::from);
        let diff = Step::new([OsString::from("diff"), file.clone().into()].into_iter().chain(ours));
        return Err(Failure::at(&file, "what lies there is not what was put in")
            .hint(format!("see what another program has made of it: {}", diff.shown(false))));
    }
    let is_it = |entry: &&Entry| entry.counts && is_of(entry, root);
    let Some(entry) = found.entries.iter().find(is_it) else {
        let name = stores::short_name(root);
        return Err(Failure::new(format!("{name} was put in, and programs do not see it there")));
    };
    say(&entry.name, "is trusted there now: looked up and found");
    Ok(())
}

fn expect_out(found: &Found, old: &Entry) -> Result<(), Failure> {
    let is_seen = found.stale.iter().any(|root| is_of(old, root));
    if is_seen || found.entries.iter().any(|entry| is_of(entry, &old.root)) {
        return Err(Failure::new(format!("{} was taken out, and is still there", old.name)));
    }
    say(&old.name, GONE);
    Ok(())
}

fn say(name: &str, what: impl Display) {
    output::words(format_args!("  {name} {what}"));
}

fn is_of(entry: &Entry, root: &Root) -> bool {
    entry.root.fingerprint() == root.fingerprint()
}

fn is_alive(root: &Root, now: OffsetDateTime) -> bool {
    now < root.not_after()
}

/// Roots are a user's own. Who types `sudo` before this gets those of root, and probably wants none.
fn say_whose(env: &Environment) {
    let by = env.text("SUDO_USER").filter(|user| user != "root");
    if let Some(user) = by.filter(|_| rustix::process::geteuid().is_root()) {
        output::warning(format_args!(
            "these are the roots of root; for those of {user} type it without sudo: it calls sudo itself"
        ));
    }
}

const GONE: &str = "is no longer there: looked up and not found";
