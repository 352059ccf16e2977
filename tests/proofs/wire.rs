//! Whatever reads the bytes of somebody else: millions of malformed ones, and what becomes of each.

mod attack;
mod caches;
mod chunks;
mod claims;
#[path = "../it/wire.rs"]
#[allow(dead_code, reason = "the tests of the data path use the rest")]
mod frames;
mod heads;
mod hosts;
mod hpack;
mod http1;
mod http2;
mod recorder;
mod roots;
mod rules;
mod settings;
mod strict;
#[path = "../it/support.rs"]
#[allow(dead_code, reason = "the tests of the data path use the rest")]
mod support;

use frames as wire;
