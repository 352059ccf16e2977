//! Whatever reads the bytes of somebody else: millions of malformed ones, and what becomes of each.

mod attack;
#[path = "../../src/store/codex/auth_json.rs"]
#[allow(dead_code, unused_imports, reason = "the store uses the rest")]
mod auth_json;
mod caches;
mod claims;
mod hosts;
mod roots;
mod rules;
mod settings;
