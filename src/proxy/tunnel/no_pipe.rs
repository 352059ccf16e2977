//! Without splice(2) there are no pipes, and all is copied.

use std::io;
use std::task::{Context, Poll};

use tokio::net::TcpStream;

/// None.
#[derive(Debug)]
pub(in crate::proxy) struct Pipes;

impl Pipes {
    pub(in crate::proxy) fn new(_most: usize) -> Self {
        Self
    }

    pub(super) fn take(&self) -> Option<Pipe> {
        None
    }

    pub(super) fn give_back(&self, pipe: Pipe) {
        match pipe {}
    }
}

#[cfg(test)]
impl Pipes {
    pub(super) fn idle(&self) -> usize {
        0
    }
}

/// There is none.
#[derive(Debug)]
pub(super) enum Pipe {}

/// As where there are pipes.
pub(super) enum Filled {
    #[expect(dead_code, reason = "nothing is filled")]
    With(usize),
    #[expect(dead_code, reason = "nothing is filled")]
    Nothing,
    #[expect(dead_code, reason = "nothing is filled")]
    NotPossible,
}

#[expect(clippy::needless_pass_by_ref_mut, reason = "as where there are pipes")]
impl Pipe {
    pub(super) fn poll_fill(
        &mut self,
        _: &mut Context<'_>,
        _: &TcpStream,
    ) -> Poll<io::Result<Filled>> {
        match *self {}
    }

    pub(super) fn poll_empty(
        &mut self,
        _: &mut Context<'_>,
        _: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        match *self {}
    }

    pub(super) fn is_empty(&self) -> bool {
        match *self {}
    }
}
