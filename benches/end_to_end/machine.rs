//! What is asked of the machine: cores to run on, CPU time, memory, descriptors.
//!
//! Where the system does not tell (all but Linux), times and sizes are 0 and print as `-`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// The core of the load and the API, and the core of the proxy; none where there is but one, or where programs cannot
/// be held to a core.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    pub(crate) load: usize,
    pub(crate) proxy: usize,
}

impl Cores {
    /// To be asked before this thread is held to a core: later it has but one.
    #[cfg(target_os = "linux")]
    pub(crate) fn split() -> Option<Self> {
        use rustix::thread::{CpuSet, sched_getaffinity};
        let ours = sched_getaffinity(None).ok()?;
        let mut all = (0..CpuSet::MAX_CPU).filter(|core| ours.is_set(*core));
        let load = all.next()?;
        Some(Self { load, proxy: all.next_back()? })
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn split() -> Option<Self> {
        None
    }
}

/// Holds this thread to a core, and with it whatever it starts from now on.
#[cfg(target_os = "linux")]
pub(crate) fn pin(core: Option<usize>) {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if let Some(core) = core {
        let mut only = CpuSet::new();
        only.set(core);
        sched_setaffinity(None, &only).expect("a core that was ours");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_: Option<usize>) {}

/// Seconds of CPU that this process has had.
pub(crate) fn own_cpu() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default().as_secs_f64()
}

/// The CPU that each thread of a process has had, in seconds. A thread that has ended is not in it, so that two of these
/// are compared thread by thread.
#[derive(Debug, Default)]
pub(crate) struct Cpu(BTreeMap<OsString, f64>);

impl Cpu {
    /// Of its threads as they are now.
    pub(crate) fn of(process: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        Self(threads.map(|thread| (thread.file_name(), cpu_of_thread(&thread.path()))).collect())
    }

    /// What there was since another look at the same process.
    pub(crate) fn since(&self, earlier: &Self) -> f64 {
        let before = |thread: &OsString| earlier.0.get(thread).copied().unwrap_or(0.0);
        self.0.iter().map(|(thread, cpu)| cpu - before(thread)).sum()
    }
}

/// `schedstat` counts nanoseconds; a kernel without it has hundredths of a second in fields 14 and 15 of `stat`.
fn cpu_of_thread(thread: &Path) -> f64 {
    if let Ok(stat) = fs::read_to_string(thread.join("schedstat")) {
        return sum(stat.split_whitespace().take(1)) / 1e9;
    }
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    sum(fields.skip(11).take(2)) / TICKS
}

/// Seconds of CPU that all programs of the machine have had.
pub(crate) fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let all: Vec<&str> = stat.lines().next().unwrap_or("").split_whitespace().skip(1).collect();
    // Of user, nice, system, idle, iowait, irq, softirq and steal all but the two that wait.
    let waits = [3, 4].map(|at| all.get(at).copied().unwrap_or("0"));
    (sum(all.iter().take(8).copied()) - sum(waits.into_iter())) / TICKS
}

/// The memory that a process has for itself, with its share of what it has in common with others, in KiB.
pub(crate) fn memory_of(process: u32) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    sum(line.unwrap_or("").split_whitespace().take(1))
}

/// Takes as many descriptors as this process may have; how many those are.
pub(crate) fn raise_descriptors() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where there is no limit, as many as the kernel gives one process (`fs.nr_open`).
    let most = maximum.unwrap_or(1 << 20);
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum }).ok();
    getrlimit(Resource::Nofile).current.unwrap_or(most)
}

/// The processor, as it calls itself, and how many cores of it there are.
pub(crate) fn name() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let all = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = all.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    format!("{cores} x {}", model.map_or("unknown", |(_, model)| model))
}

fn sum<'a>(fields: impl Iterator<Item = &'a str>) -> f64 {
    fields.map(|field| field.parse::<f64>().unwrap_or(0.0)).sum()
}

/// In which `/proc` counts CPU time: `USER_HZ`, which is 100 on every Linux that this runs on.
const TICKS: f64 = 100.0;
