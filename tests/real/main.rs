//! Real programs, unmodified and without a credential, through the built binary.
//!
//! `tests/run` installs them and sets `VALETKEY_TEST_TOOLS`; then a program that is missing fails its test.
//! Without it such a test says what it skipped.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test may fail by panicking, and says what it skipped or counted"
)]

#[cfg(target_os = "linux")]
mod admission;
#[cfg(target_os = "linux")]
mod agent_sandbox;
mod audit;
#[cfg(target_os = "linux")]
mod authority;
mod browser;
mod certificates;
mod chromium;
mod clients;
mod codex;
mod codex_behind;
mod company;
#[cfg(target_os = "linux")]
mod corporate;
mod decoys;
#[cfg(target_os = "linux")]
mod desktop;
#[cfg(target_os = "linux")]
mod devcontainer;
#[cfg(target_os = "linux")]
mod dialling;
#[cfg(target_os = "linux")]
mod docker;
mod doctor;
#[cfg(target_os = "linux")]
mod early;
#[path = "../it/forms.rs"]
mod forms;
mod generated;
mod health;
#[cfg(target_os = "linux")]
mod http2_peers;
#[cfg(target_os = "linux")]
mod keyring;
mod legs;
mod login;
#[cfg(target_os = "linux")]
mod machine;
#[cfg(target_os = "linux")]
mod memory;
mod policies;
mod process;
mod reload;
mod roots;
mod runs;
#[cfg(target_os = "linux")]
mod runtimes;
#[cfg(target_os = "linux")]
mod sdks;
mod served;
mod silence;
mod support;
#[cfg(target_os = "linux")]
mod trust_store;
#[cfg(target_os = "linux")]
#[path = "../it/wire.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod wire;
mod words;
