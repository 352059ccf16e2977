//! Starts a program in a process group of its own, so that nothing that it starts outlives its use.

use std::io;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

/// A program's process group. What is left of it when this is dropped is killed, whether the program itself has
/// ended or not: the number of one that has ended and left nobody is given to another only when the system has given
/// out all others. What moves to a group of its own, as a daemon does, stays; and when a signal ends us before this is
/// dropped, so does everything.
#[derive(Debug)]
#[must_use]
pub struct Group(Option<Pid>);

impl Group {
    /// Starts a program as the first of its group. It is not of the terminal's foreground group then: it may not
    /// read from there.
    ///
    /// # Errors
    ///
    /// Those of starting it.
    pub fn start(command: &mut Command) -> io::Result<(Child, Self)> {
        let child = command.process_group(0).spawn()?;
        let first = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        Ok((child, Self(first)))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(first) = self.0 else { return };
        let killed = kill_process_group(first, Signal::KILL);
        tracing::debug!(ok = killed.is_ok(), "what a program had started was ended");
    }
}
