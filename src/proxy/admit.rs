//! Says who may use the proxy: the user whose socket it is, as the kernel has it.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};

use super::Client;
use super::reject::Rejection;

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
        let uid = owner_of(client).unwrap_or_else(|error| {
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

/// Who owns the client's socket. `None` when it is not on this machine, or gone already.
#[cfg(target_os = "linux")]
fn owner_of(client: Client) -> io::Result<Option<u32>> {
    let Some(own) = client.own else { return Ok(None) };
    let table = match client.peer.ip() {
        IpAddr::V4(_) => "/proc/self/net/tcp",
        IpAddr::V6(_) => "/proc/self/net/tcp6",
    };
    Ok(find(&fs::read_to_string(table)?, client.peer, SocketAddr::new(own.ip(), own.port())))
}

/// Elsewhere the kernel is not asked yet: a loopback client is taken for ours.
#[cfg(not(target_os = "linux"))]
fn owner_of(client: Client) -> io::Result<Option<u32>> {
    Ok(client.peer.ip().is_loopback().then(|| rustix::process::geteuid().as_raw()))
}

/// The uid in the line of a socket table (proc(5), `/proc/net/tcp`) that goes from `local` to `remote`.
fn find(table: &str, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    let (local, remote) = (in_table(local), in_table(remote));
    table.lines().find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        (columns.next()? == local && columns.next()? == remote)
            .then(|| columns.nth(4)?.parse().ok())
            .flatten()
    })
}

/// An address as the table writes it: 32-bit words in the machine's byte order, then the port.
fn in_table(address: SocketAddr) -> String {
    let word = |bytes: &[u8]| {
        let mut word = [0; 4];
        word.copy_from_slice(bytes);
        format!("{:08X}", u32::from_ne_bytes(word))
    };
    let words: String = match address.ip() {
        IpAddr::V4(ip) => word(&ip.octets()),
        IpAddr::V6(ip) => ip.octets().chunks_exact(4).map(word).collect(),
    };
    format!("{words}:{:04X}", address.port())
}

#[cfg(all(test, target_os = "linux", target_endian = "little"))]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
           0: 0100007F:20B9 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1\n\
           1: 0100007F:D431 0100007F:20B9 01 00000000:00000000 00:00000000 00000000  1001        0 2 1\n\
           2: 0100007F:20B9 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 3 1\n";

    #[test]
    fn finds_the_clients_end() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(find(TABLE, address(0xD431), address(0x20B9)), Some(1001));
        assert_eq!(find(TABLE, address(0xD432), address(0x20B9)), None);
        assert_eq!(find("", address(1), address(2)), None);
    }

    #[test]
    fn a_real_connection_is_ours() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(bind) else { continue };
            let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, stream.local_addr().unwrap());
            let client = Client { peer, own: listener.local_addr().ok() };
            let own = rustix::process::geteuid().as_raw();
            assert_eq!(owner_of(client).unwrap(), Some(own));
            assert_eq!(Uids::new(vec![]).admit(client), Admission::User);
            let another = Uids { own: own + 1, allowed: vec![] };
            assert_eq!(another.admit(client), Admission::Stranger(Some(own)));
            let allowing = Uids { own: own + 1, allowed: vec![own] };
            assert_eq!(allowing.admit(client), Admission::User);
        }
    }
}
