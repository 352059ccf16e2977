//! Says who may use the proxy: the user whose socket it is, as the kernel has it.

use super::Client;
use super::reject::Rejection;
use crate::peer;

/// The users that are let in without a pass.
#[derive(Debug)]
pub(super) struct Uids {
    own: u32,
    allowed: Vec<u32>,
}

impl Uids {
    /// Ours, and those in `allowed`.
    pub(super) fn new(allowed: Vec<u32>) -> Self {
        Self { own: rustix::process::geteuid().as_raw(), allowed }
    }

    /// Whether the client's end of the connection belongs to one of these users. A client whose owner
    /// the kernel does not tell is a stranger.
    pub(super) fn admit(&self, client: Client) -> Admission {
        let uid = client.own.map_or(Ok(None), |own| peer::uid_of(client.peer, own));
        let uid = uid.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the kernel's socket table");
            None
        });
        match uid {
            Some(uid) if uid == self.own || self.allowed.contains(&uid) => Admission::User,
            uid => Admission::Stranger(uid),
        }
    }
}

/// Whether a client may use the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Somebody else; holds the uid where the kernel tells it.
    Stranger(Option<u32>),
    /// One of the users that are let in.
    User,
}

impl Admission {
    /// # Errors
    ///
    /// [`Rejection::PassRequired`] for a stranger.
    pub(super) fn check(self) -> Result<(), Rejection> {
        match self {
            Self::Stranger(uid) => Err(Rejection::PassRequired(uid)),
            Self::User => Ok(()),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_real_connection_is_ours() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(bind) else { continue };
            let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, stream.local_addr().unwrap());
            let client = Client { peer, own: listener.local_addr().ok() };
            let own = rustix::process::geteuid().as_raw();
            assert_eq!(Uids::new(vec![]).admit(client), Admission::User);
            let another = Uids { own: own + 1, allowed: vec![] };
            assert_eq!(another.admit(client), Admission::Stranger(Some(own)));
            let allowing = Uids { own: own + 1, allowed: vec![own] };
            assert_eq!(allowing.admit(client), Admission::User);
        }
    }
}
