//! Finds the running proxy, and leaves word where this one runs.

use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::env::{Environment, SERVER_INFO};
use crate::origin::Target;
use crate::tls::file;

/// What a proxy writes down about itself.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct ServerInfo {
    /// The TCP port; 0 where there is none.
    pub(super) port: u16,
    /// The process.
    pub(super) pid: u32,
    /// PEM file with the roots that clients must trust.
    pub(super) ca: PathBuf,
    /// The proxy's URL: `http://`, `https://`, or `unix:` and the path of a socket.
    pub(super) proxy: String,
    /// Whether everybody shows a pass there, our own user too.
    #[serde(default)]
    pub(super) needs_pass: bool,
    /// What its certificate is for, where clients speak TLS to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tls_name: Option<String>,
    /// How many mistakes of its own it has survived.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) panics: u64,
    /// When the process started, in the kernel's own count: tells it from a later one with its pid.
    #[serde(default)]
    started: Option<u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn address(proxy: &str) -> Option<SocketAddr> {
    proxy.split_once("://")?.1.parse().ok()
}

/// The name that `serve`'s file has in the runtime folder; the files of `run` have it in theirs.
pub(super) const FILE: &str = "serve.json";

/// How the folders of `run` are named in the runtime folder.
pub(super) const RUN_PREFIX: &str = "run-";

impl ServerInfo {
    /// What this process says of its proxy, to which clients speak without TLS.
    pub(super) fn of_this_process(proxy: String, ca: PathBuf) -> Self {
        let pid = std::process::id();
        let port = address(&proxy).map_or(0, |address| address.port());
        Self {
            port,
            pid,
            ca,
            proxy,
            needs_pass: false,
            tls_name: None,
            panics: 0,
            started: started(pid),
        }
    }

    /// Where the proxy listens; `None` for one at a Unix socket only.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        address(&self.proxy)
    }

    /// Writes it to a file in one step, for its user alone.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or_else(|| Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.persist(path)?;
        Ok(())
    }

    /// Reads it; `None` when there is none, or its process is not the one that wrote it.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let info: Self = serde_json::from_slice(&file::read(path).ok()?).ok()?;
        info.is_alive().then_some(info)
    }

    fn is_alive(&self) -> bool {
        match started(self.pid) {
            Some(started) => self.started.is_none_or(|ours| ours == started),
            None => cfg!(not(target_os = "linux")) && self.started.is_none(),
        }
    }

    fn is_at(&self, target: &Target) -> bool {
        target.port == self.port && target.host.is_loopback()
    }
}

/// All running proxies of this user, `serve`'s first.
pub(super) fn all(runtime_dir: &Path) -> Vec<ServerInfo> {
    let runs = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    let of_runs = runs.map(|entry| entry.path().join(FILE));
    [runtime_dir.join(FILE)]
        .into_iter()
        .chain(of_runs)
        .filter_map(|path| ServerInfo::read(&path))
        .collect()
}

/// Whether a proxy at this target is one of ours.
pub(super) fn is_ours(runtime_dir: &Path, target: &Target) -> bool {
    all(runtime_dir).iter().any(|info| info.is_at(target))
}

/// The proxy that a command speaks of: the one that `VALETKEY_SERVER_INFO` names, else the one in whose
/// environment the command runs, else `serve`'s.
pub(super) fn find(runtime_dir: &Path, env: &Environment) -> Option<ServerInfo> {
    if let Some(path) = env.get(SERVER_INFO) {
        return ServerInfo::read(Path::new(path));
    }
    let proxy = env.text("HTTPS_PROXY").or_else(|| env.text("https_proxy"));
    let around =
        proxy.and_then(|proxy| all(runtime_dir).into_iter().find(|info| info.proxy == proxy));
    around.or_else(|| ServerInfo::read(&runtime_dir.join(FILE)))
}

/// As [`find`], for a proxy that may have been started in the same breath (`serve &`, then `env`).
pub(super) fn find_soon(runtime_dir: &Path, env: &Environment) -> Option<ServerInfo> {
    let patience = Instant::now() + PATIENCE;
    loop {
        match find(runtime_dir, env) {
            None if Instant::now() < patience => std::thread::sleep(PAUSE),
            found => return found,
        }
    }
}

/// How long a proxy may take to start before it counts as not running, and how often it is looked for: it
/// is another process, which tells of itself by a file.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// Removes the folders of `run`s that are gone without having tidied up.
pub(super) fn sweep(runtime_dir: &Path) {
    let entries = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    for dir in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(RUN_PREFIX)) {
        let info = dir.path().join(FILE);
        // One without a file is just being made.
        if info.exists() && ServerInfo::read(&info).is_none() {
            let outcome = fs::remove_dir_all(dir.path());
            tracing::debug!(dir = %dir.path().display(), ok = outcome.is_ok(), "swept");
        }
    }
}

/// When a process started: field 22 of `/proc/PID/stat` (proc(5)), in clock ticks since boot. `None` for one that has
/// ended, also while nobody has asked how: in a container without an init that may be for ever.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command's name in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(pid: u32) -> ServerInfo {
        let proxy = "http://127.0.0.1:4242".to_owned();
        ServerInfo {
            pid,
            started: started(pid),
            ..ServerInfo::of_this_process(proxy, "ca.pem".into())
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn one_that_has_ended_and_was_not_waited_for_does_not_count() {
        use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        info(pid).write(&path).unwrap();
        assert!(ServerInfo::read(&path).is_some());
        drop(child.stdin.take());
        let ended = WaitId::Pid(Pid::from_raw(pid.cast_signed()).unwrap());
        waitid(ended, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        assert!(ServerInfo::read(&path).is_none());
        child.wait().unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn only_a_living_process_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        info(std::process::id()).write(&path).unwrap();
        assert_eq!(ServerInfo::read(&path).map(|info| info.port), Some(4242));
        assert!(is_ours(dir.path(), &Target::parse("127.0.0.1:4242").unwrap()));
        assert!(!is_ours(dir.path(), &Target::parse("127.0.0.1:4243").unwrap()));
        assert!(!is_ours(dir.path(), &Target::parse("a.example:4242").unwrap()));

        let reused = ServerInfo { started: Some(1), ..info(std::process::id()) };
        reused.write(&path).unwrap();
        assert!(ServerInfo::read(&path).is_none(), "another process has its pid now");
        fs::write(&path, "{").unwrap();
        assert!(ServerInfo::read(&path).is_none());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn leftovers_are_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, info: Option<ServerInfo>| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).unwrap();
            if let Some(info) = info {
                info.write(&folder.join(FILE)).unwrap();
            }
            folder
        };
        let dead = ServerInfo { started: Some(1), ..info(std::process::id()) };
        let gone = make("run-1", Some(dead.clone()));
        let kept = [
            make("run-2", Some(info(std::process::id()))),
            make("run-3", None),
            make("other", Some(dead)),
        ];
        sweep(dir.path());
        assert!(!gone.exists());
        assert!(kept.iter().all(|folder| folder.exists()));
    }
}
