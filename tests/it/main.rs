//! The promises of the data path, on the sandbox world: real sockets on loopback, the real proxy in process.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test may fail by panicking, and says what it skipped or counted"
)]

mod chain;
mod decoy;
mod forms;
mod framing;
mod http2;
mod leak;
mod limits;
mod login;
mod names;
mod pass;
mod peer;
mod refresh;
mod refuse;
mod scrub;
mod stream;
mod support;
mod websocket;
#[expect(dead_code, reason = "the tests with real programs use the rest")]
mod wire;
