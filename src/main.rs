//! The program: everything is in the library.

use std::process::ExitCode;

/// Gives back what idle connections no longer need: with glibc's allocator the holes that they leave stay ours. On macOS it has no
/// thread for that, says so at each start, and never ends its initialisation.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    valetkey::cli::main()
}
