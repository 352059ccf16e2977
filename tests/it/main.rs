//! The promises of the data path, on the sandbox world: real sockets on loopback, the real proxy in process.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail by panicking")]

mod names;
mod refresh;
mod stream;
mod support;
