//! Proofs by attack: many rounds of what must never happen. `tests/proofs/run --long` has more of them.
//!
//! Without `--long` each proof is as long as every run of the tests can bear.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test may fail by panicking, and says what it skipped or counted"
)]

#[cfg(target_os = "linux")]
mod clock;
#[cfg(target_os = "linux")]
mod crash;
#[cfg(target_os = "linux")]
#[path = "../real/desktop.rs"]
#[allow(dead_code, reason = "the tests with real programs use the rest")]
mod desktop;
mod dice;
#[cfg(target_os = "linux")]
mod disk;
#[path = "../it/forms.rs"]
mod forms;
#[cfg(target_os = "linux")]
mod leak;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod panics;
#[cfg(target_os = "linux")]
mod place;
#[cfg(target_os = "linux")]
mod race;
mod scrub;
#[path = "../real/served.rs"]
#[allow(dead_code, reason = "the tests with real programs use the rest")]
mod served;
#[cfg(target_os = "linux")]
mod sinks;
#[path = "../real/support.rs"]
#[allow(dead_code, reason = "the tests with real programs use the rest")]
mod support;
mod wire;

/// How many rounds: the first number in every run of the tests, the second with `--long`.
fn rounds(usual: usize, long: usize) -> usize {
    if is_long() { long } else { usual }
}

fn is_long() -> bool {
    support::option_env_now("VALETKEY_PROOFS").as_deref() == Some("long")
}
