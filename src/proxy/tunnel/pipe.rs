//! Pipes through which the kernel moves bytes from one socket to another: Linux, splice(2).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Room asked for in a pipe, and moved at a time.
const ROOM: usize = 256 * 1024;

/// Most that are kept for the next one who needs one: as many as threads are at it at one time.
const MOST_IDLE: usize = 4;

/// The pipes of a proxy.
#[derive(Debug)]
pub(in crate::proxy) struct Pipes {
    /// All of them empty.
    idle: Mutex<Vec<Pipe>>,
    places: Arc<Semaphore>,
}

impl Pipes {
    /// At most so many at one time.
    pub(in crate::proxy) fn new(most: usize) -> Self {
        Self { idle: Mutex::default(), places: Arc::new(Semaphore::new(most)) }
    }

    /// An empty pipe, unless there are too many or the system gives none.
    pub(super) fn take(&self) -> Option<Pipe> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.or_else(|| Pipe::open(self.places.clone().try_acquire_owned().ok()?).ok())
    }

    /// Takes a pipe back, to be used again if it is empty.
    pub(super) fn give_back(&self, pipe: Pipe) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if pipe.held == 0 && idle.len() < MOST_IDLE {
            idle.push(pipe);
        }
    }
}

#[cfg(test)]
impl Pipes {
    pub(super) fn idle(&self) -> usize {
        self.idle.lock().unwrap().len()
    }
}

/// One pipe. What is in it is lost with it.
#[derive(Debug)]
pub(super) struct Pipe {
    way_out: OwnedFd,
    way_in: OwnedFd,
    held: usize,
    _place: OwnedSemaphorePermit,
}

/// What came of filling a pipe.
pub(super) enum Filled {
    /// With something, or with nothing at the end.
    With(usize),
    /// With nothing yet, or with nothing that can be moved so: behind the mark of an urgent byte splice(2) sees no data, and
    /// only reading steps over it (tcp(7)).
    Nothing,
    /// These sockets cannot be joined so, and nothing was taken from them.
    NotPossible,
}

impl Pipe {
    fn open(place: OwnedSemaphorePermit) -> io::Result<Self> {
        let (way_out, way_in) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if let Err(error) = fcntl_setpipe_size(&way_in, ROOM) {
            // A user may have only so much in all; a smaller one does, too.
            tracing::debug!(%error, "a pipe stays small");
        }
        Ok(Self { way_out, way_in, held: 0, _place: place })
    }

    /// Moves what there is from a socket into this pipe, which must be empty: so it is the socket that is waited for.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
    ) -> Poll<io::Result<Filled>> {
        loop {
            ready!(from.poll_read_ready(cx))?;
            // Whether there really is nothing is left for who reads to find: until then the socket counts as readable.
            let filling =
                || match retry_on_intr(|| splice(from, None, &self.way_in, None, ROOM, HOW)) {
                    Ok(len) => Ok(Filled::With(len)),
                    Err(Errno::AGAIN) => Ok(Filled::Nothing),
                    Err(errno) if is_refused(errno) => Ok(Filled::NotPossible),
                    Err(errno) => Err(errno.into()),
                };
            match from.try_io(Interest::READABLE, filling) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                filled => {
                    if let Ok(Filled::With(len)) = filled {
                        self.held = len;
                    }
                    return Poll::Ready(filled);
                }
            }
        }
    }

    /// Moves what there is in this pipe, which must be something, to a socket, as far as that has room. How much it was.
    pub(super) fn poll_empty(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(to.poll_write_ready(cx))?;
            let emptying =
                || Ok(retry_on_intr(|| splice(&self.way_out, None, to, None, self.held, HOW))?);
            match to.try_io(Interest::WRITABLE, emptying) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(len) => {
                    self.held -= len;
                    return Poll::Ready(Ok(len));
                }
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }
}

/// Neither a full pipe nor a full socket is waited for in the kernel.
const HOW: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

/// Whether it is the call that the system does not have or does not allow, and not the socket that has failed.
fn is_refused(errno: Errno) -> bool {
    [Errno::NOSYS, Errno::INVAL, Errno::PERM].contains(&errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_bounded_and_used_again_when_they_are_empty() {
        let pipes = Pipes::new(2);
        let (first, mut second) = (pipes.take().unwrap(), pipes.take().unwrap());
        assert!(pipes.take().is_none());
        pipes.give_back(first);
        assert_eq!(pipes.idle(), 1);
        // As after an error: nobody may get what is in it.
        rustix::io::write(&second.way_in, b"of somebody").unwrap();
        second.held = 11;
        pipes.give_back(second);
        assert_eq!(pipes.idle(), 1);
        let (_again, _new) = (pipes.take().unwrap(), pipes.take().unwrap());
        assert!(pipes.take().is_none());
        let crowd = Pipes::new(10);
        let taken: Vec<_> = std::iter::from_fn(|| crowd.take()).collect();
        assert_eq!(taken.len(), 10);
        taken.into_iter().for_each(|pipe| crowd.give_back(pipe));
        assert_eq!(crowd.idle(), MOST_IDLE);
    }
}
