//! What the service manager hands over, sockets that listen already, and what it is told: ready, reloading, stopping.

use super::output::Failure;
use crate::config::{ListenAddress, Listener};
use crate::proxy::Socket;

/// Sockets that listen already, each with its address; none where nothing was handed over.
#[derive(Debug)]
pub(super) struct Inherited(Vec<(ListenAddress, Passed)>);

#[derive(Debug)]
enum Passed {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// Takes the sockets that the service manager has opened for this process (sd_listen_fds(3)), and the variables
/// that speak of them out of the environment: call it once, while there is one thread.
///
/// # Errors
///
/// [`Failure`] for one that is no TCP and no Unix socket.
pub(super) fn inherited() -> Result<Inherited, Failure> {
    let mut passed = listenfd::ListenFd::from_env();
    let sockets = (0..passed.len()).map(|at| {
        let socket = match passed.take_tcp_listener(at) {
            Ok(socket) => socket.map(Passed::Tcp),
            Err(_) => passed.take_unix_listener(at).map_err(unfit)?.map(Passed::Unix),
        };
        let socket = socket.ok_or_else(|| Failure::new("a socket was handed over twice"))?;
        Ok((socket.address()?, socket))
    });
    sockets.collect::<Result<_, Failure>>().map(Inherited)
}

fn unfit(error: std::io::Error) -> Failure {
    Failure::new(format!("a socket was handed over that no client can connect to: {error}"))
        .hint("write ListenStream= into the unit, as `valetkey init systemd` does")
}

impl Passed {
    fn address(&self) -> Result<ListenAddress, Failure> {
        match self {
            Self::Tcp(socket) => Ok(ListenAddress::Tcp(socket.local_addr()?)),
            Self::Unix(socket) => {
                let address = socket.local_addr()?;
                let path = address.as_pathname().map(Into::into);
                path.map(ListenAddress::Unix).ok_or_else(|| {
                    Failure::new("a Unix socket without a path was handed over")
                        .hint("write ListenStream=/path or an address and a port into the unit")
                })
            }
        }
    }
}

impl Inherited {
    /// The socket of the listener at this address, which then need not be bound; its rules hold for it.
    ///
    /// # Errors
    ///
    /// [`Failure`] of the system.
    pub(super) fn take(&mut self, address: &ListenAddress) -> Result<Option<Socket>, Failure> {
        let Some(found) = self.0.iter().position(|(at, _)| at == address) else { return Ok(None) };
        Ok(Some(match self.0.remove(found).1 {
            Passed::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                Socket::Tcp(socket.try_into()?)
            }
            Passed::Unix(socket) => {
                socket.set_nonblocking(true)?;
                Socket::Unix(socket.try_into()?)
            }
        }))
    }

    /// Listeners for the sockets that none of these speaks of: at loopback alone, for our own user.
    ///
    /// # Errors
    ///
    /// [`Failure`] for one that others than this machine can reach, or whose rules nobody has settled.
    pub(super) fn others(&self, configured: &[Listener]) -> Result<Vec<Listener>, Failure> {
        let is_known = |at: &ListenAddress| configured.iter().any(|known| known.address == *at);
        let others = self.0.iter().map(|(at, _)| at).filter(|at| !is_known(at));
        let others = others.map(|at| match at {
            ListenAddress::Tcp(address) if address.ip().is_loopback() => {
                Ok(Listener::on(at.clone()))
            }
            _ => Err(without_listener(&at.to_string())),
        });
        others.collect()
    }
}

fn without_listener(address: &str) -> Failure {
    Failure::new(format!(
        "a socket at {address} was handed over, and the configuration has no listener there"
    ))
    .hint(format!("say who may come: [[listeners]] with address = \"{address}\""))
    .hint("or let the socket unit have ListenStream=127.0.0.1:8377")
}

/// Tells the service manager, where there is one, that clients are served.
pub(super) fn ready(status: &str) {
    #[cfg(target_os = "linux")]
    tell(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(status)]);
    #[cfg(not(target_os = "linux"))]
    let _nobody_asks = status;
}

/// Tells it that the configuration is being read again; [`ready`] says when that is done.
pub(super) fn reloading() {
    #[cfg(target_os = "linux")]
    match sd_notify::NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[sd_notify::NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the service manager could not be told"),
    }
}

/// Tells it that no client is accepted any more.
pub(super) fn stopping() {
    #[cfg(target_os = "linux")]
    tell(&[sd_notify::NotifyState::Stopping]);
}

#[cfg(target_os = "linux")]
fn tell(what: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_over(address: &str) -> (ListenAddress, Inherited) {
        let socket = std::net::TcpListener::bind(address).unwrap();
        let at = ListenAddress::Tcp(socket.local_addr().unwrap());
        (at.clone(), Inherited(vec![(at, Passed::Tcp(socket))]))
    }

    #[tokio::test]
    async fn a_socket_goes_to_the_listener_of_its_address() {
        let (at, mut inherited) = handed_over("127.0.0.1:0");
        assert!(inherited.take(&"127.0.0.1:1".parse().unwrap()).unwrap().is_none());
        assert!(inherited.others(&[Listener::on(at.clone())]).unwrap().is_empty());
        let taken = inherited.take(&at).unwrap().unwrap();
        assert_eq!(taken.address().map(ListenAddress::Tcp), Some(at.clone()));
        assert!(inherited.take(&at).unwrap().is_none());
    }

    #[test]
    fn one_without_a_listener_is_for_this_machine_alone() {
        let (at, inherited) = handed_over("127.0.0.1:0");
        assert_eq!(inherited.others(&[]).unwrap(), [Listener::on(at)]);

        let (at, inherited) = handed_over("0.0.0.0:0");
        let failure = inherited.others(&[]).unwrap_err();
        assert!(failure.message().contains(&format!("a socket at {at} was handed over")));
        assert!(failure.first_hint().unwrap().contains(&format!("address = \"{at}\"")));

        let dir = tempfile::tempdir().unwrap();
        let socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let socket = Passed::Unix(socket);
        let inherited = Inherited(vec![(socket.address().unwrap(), socket)]);
        assert!(inherited.others(&[]).unwrap_err().message().contains("unix:/"));
    }
}
