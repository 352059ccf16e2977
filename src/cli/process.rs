//! What a command does to its own process: hardening, signals, private folders, the runtime.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::process::Signal;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

use super::output::Failure;

/// Starts the threads that a proxy runs on: one for each core that this process may use. Where that is one alone, it is the
/// main thread, which nobody has to be woken for. From then on a file that may not grow is an error, and no end.
///
/// # Errors
///
/// [`Failure`] when the system gives no threads.
pub(super) fn runtime() -> Result<Runtime, Failure> {
    let has_one_core = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
    let mut threads = match has_one_core {
        true => tokio::runtime::Builder::new_current_thread(),
        false => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = threads.enable_all().build()?;
    let inside = runtime.enter();
    outlive_file_limits()?;
    drop(inside);
    Ok(runtime)
}

/// Keeps this process's memory from other programs of its user: no core dump, no debugger. A child
/// started after this gets its own back when it runs its program (prctl(2), `PR_SET_DUMPABLE`).
pub(super) fn harden() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
            tracing::warn!(%error, "the process could not be made undumpable");
        }
    }
}

/// Forbids core files for this process and all that it starts.
pub(super) fn forbid_core_files() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "core files could not be forbidden");
    }
}

/// Takes as many descriptors as this process may have, up to [`MOST_DESCRIPTORS`]: a client costs two, and the usual
/// soft limit, 1024, is for programs that use select(2).
pub(super) fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = maximum.map_or(MOST_DESCRIPTORS, |maximum| maximum.min(MOST_DESCRIPTORS));
    if current.is_some_and(|current| current < most)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum })
    {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
}

/// How many descriptors this process may still open. What clients hold by now counts as free, so that the answer is the
/// same whenever it is asked: only the lowest ones, which were there first, are in use.
pub(super) fn free_descriptors() -> u64 {
    use rustix::process::{Resource, getrlimit};
    let most = getrlimit(Resource::Nofile).current.unwrap_or(MOST_DESCRIPTORS);
    most.saturating_sub(DESCRIPTORS_OF_OUR_OWN)
}

/// Refuses to serve where a client would find that nothing can be opened for it.
///
/// # Errors
///
/// [`Failure`] with how to get more.
pub(super) fn require_descriptors() -> Result<(), Failure> {
    use rustix::process::{Resource, getrlimit};
    match getrlimit(Resource::Nofile).current {
        Some(most) if most < LEAST_DESCRIPTORS => Err(Failure::new(format!(
            "{most} open files are too few to serve anybody: {LEAST_DESCRIPTORS} are the least"
        ))
        .hint(MORE_DESCRIPTORS)),
        _ => Ok(()),
    }
}

/// How a program gets more of them.
pub(super) const MORE_DESCRIPTORS: &str =
    "before it is started: ulimit -n 65536; for a service of systemd: LimitNOFILE=65536";

/// [`DESCRIPTORS_OF_OUR_OWN`], what clients leave of the others (`limits.rs`), and two clients.
const LEAST_DESCRIPTORS: u64 = 64;

/// What a proxy holds for itself when it serves nobody: standard streams, the runtime, listeners, and three for each set
/// of files that is followed.
const DESCRIPTORS_OF_OUR_OWN: u64 = 28;

/// Room for thirty thousand clients; programs that close all descriptors that they may have, one by one, still start.
const MOST_DESCRIPTORS: u64 = 65_536;

/// Survives a write beyond the limit of a file's size, which otherwise ends the process (setrlimit(2)). A child gets
/// the signal back when it runs its program.
fn outlive_file_limits() -> io::Result<()> {
    // Caught from now on, also when nobody listens.
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}

/// Makes a folder that only its user can enter, or checks one that is there.
///
/// # Errors
///
/// [`Failure`] for a folder that belongs to another user, or cannot be made.
pub(super) fn private_dir(dir: &Path) -> Result<(), Failure> {
    let place = |error: io::Error| {
        let failure = Failure::new(format!("{}: {error}", dir.display()));
        let is_this = |folder: &&Path| folder.as_os_str().is_empty();
        let found = dir.ancestors().find(|folder| is_this(folder) || folder.exists());
        match found.map(|folder| if is_this(&folder) { Path::new(".") } else { folder }) {
            Some(folder) => failure.hint(format!("is {0} yours? ls -ld {0}", folder.display())),
            None => failure,
        }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(place)?;
    let found = fs::metadata(dir).map_err(place)?;
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(Failure::new(format!("{} belongs to another user", dir.display()))
            .hint("set XDG_RUNTIME_DIR to a folder of your own"));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(place)?;
    }
    Ok(())
}

/// Whether this process has a terminal that it may be asked from.
pub(super) fn has_terminal() -> bool {
    fs::File::open("/dev/tty").is_ok()
}

/// The signals that ask a program to end, or that it may have a use for.
pub(super) struct Signals(Vec<(Signal, Stream)>);

impl Signals {
    /// Catches `SIGTERM`, `SIGINT`, `SIGHUP` and `SIGQUIT` from now on.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(super) fn ending() -> io::Result<Self> {
        Self::of(&[Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT])
    }

    /// Catches every signal that `run` passes on.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(super) fn passed_on() -> io::Result<Self> {
        use Signal as S;
        Self::of(&[S::TERM, S::INT, S::HUP, S::QUIT, S::USR1, S::USR2, S::WINCH, S::CONT])
    }

    fn of(signals: &[Signal]) -> io::Result<Self> {
        let stream = |of: &Signal| Ok((*of, signal(SignalKind::from_raw(of.as_raw()))?));
        signals.iter().map(stream).collect::<io::Result<_>>().map(Self)
    }

    /// The next one to come.
    pub(super) async fn next(&mut self) -> Signal {
        let each = self.0.iter_mut().map(|(signal, stream)| {
            Box::pin(async {
                // `None` would mean that the runtime is going down, when nobody waits here any more.
                stream.recv().await;
                *signal
            })
        });
        futures_util::future::select_all(each).await.0
    }
}
