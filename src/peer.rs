//! Says whose the other end of a connection on this machine is, as the kernel has it.

#[cfg(target_os = "linux")]
mod sock_diag;

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(target_os = "linux")]
use self::sock_diag::Owner;

/// The user whose the socket at the other end is; `own` is our end. `None` when it is not on this machine, or gone
/// already: closed by its user, it has none, and reads as root's.
///
/// # Errors
///
/// Those of reading the kernel's table.
#[cfg(target_os = "linux")]
pub fn uid_of(peer: SocketAddr, own: SocketAddr) -> io::Result<Option<u32>> {
    /// Whether it has told of a socket, and therefore can: a stranger who comes and goes costs no reading of the table.
    static CAN_TELL: AtomicBool = AtomicBool::new(false);
    let owner = sock_diag::uid_of(peer, own);
    CAN_TELL.fetch_or(matches!(owner, Ok(Owner::Nobody | Owner::User(_))), Ordering::Relaxed);
    match owner {
        Ok(Owner::User(uid)) => Ok(Some(uid)),
        Ok(Owner::Nobody) => Ok(None),
        Ok(Owner::Unknown) if CAN_TELL.load(Ordering::Relaxed) => Ok(None),
        // It may not be asked in this sandbox, or not have the module for it, which reads as nothing found.
        Ok(Owner::Unknown) | Err(_) => uid_in_table(peer, own),
    }
}

/// The same by reading the whole table, which grows with all connections of this machine.
#[cfg(target_os = "linux")]
fn uid_in_table(peer: SocketAddr, own: SocketAddr) -> io::Result<Option<u32>> {
    if peer.is_ipv4() {
        let uid = find(&fs::read_to_string("/proc/self/net/tcp")?, peer, own);
        if uid.is_some() {
            return Ok(uid);
        }
    }
    Ok(find(&fs::read_to_string("/proc/self/net/tcp6")?, mapped(peer), mapped(own)))
}

/// Elsewhere the kernel is not asked yet: a loopback client is taken for ours.
#[cfg(not(target_os = "linux"))]
pub fn uid_of(peer: SocketAddr, _own: SocketAddr) -> io::Result<Option<u32>> {
    Ok(peer.ip().is_loopback().then(|| rustix::process::geteuid().as_raw()))
}

/// The address as an IPv6 socket has it: gRPC and Java reach IPv4 addresses from such sockets too (RFC 4291 section
/// 2.5.5.2), and the kernel lists them with the others of IPv6.
#[cfg(target_os = "linux")]
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// The uid in the line of a socket table (proc(5), `/proc/net/tcp`) that goes from `local` to `remote`.
fn find(table: &str, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    let (local, remote) = (in_table(local), in_table(remote));
    table.lines().find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let is_it = columns.next()? == local && columns.next()? == remote;
        let (uid, inode) = (columns.nth(4)?, columns.nth(1)?);
        if is_it && inode != "0" { uid.parse().ok() } else { None }
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
           2: 0100007F:20B9 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 3 1\n\
           3: 0100007F:D433 0100007F:20B9 05 00000000:00000000 00:00000000 00000000     0        0 0 1\n";

    #[test]
    fn finds_the_clients_end() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(find(TABLE, address(0xD431), address(0x20B9)), Some(1001));
        assert_eq!(find(TABLE, address(0xD432), address(0x20B9)), None);
        assert_eq!(find(TABLE, address(0xD433), address(0x20B9)), None, "nobody holds it");
        assert_eq!(find("", address(1), address(2)), None);
    }

    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    #[test]
    fn finds_an_ipv6_socket_that_reaches_an_ipv4_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap();
        let Ok(_client) = std::net::TcpStream::connect(mapped(own)) else {
            println!("skipped: this machine has no IPv6");
            return;
        };
        let (_, peer) = listener.accept().unwrap();
        assert!(peer.is_ipv4());
        assert_both(peer, own, Some(rustix::process::geteuid().as_raw()));
    }

    /// The kernel says the same in both ways.
    #[expect(clippy::print_stdout, reason = "what is skipped says so")]
    fn assert_both(peer: SocketAddr, own: SocketAddr, expected: Option<u32>) {
        match sock_diag::uid_of(peer, own) {
            Ok(Owner::User(uid)) => assert_eq!(Some(uid), expected, "{peer}"),
            Ok(_) => assert_eq!(None, expected, "{peer}"),
            Err(error) => println!("skipped: this kernel may not be asked for a socket: {error}"),
        }
        assert_eq!(uid_in_table(peer, own).ok(), Some(expected), "{peer}");
        assert_eq!(uid_of(peer, own).ok(), Some(expected), "{peer}");
    }

    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    #[test]
    fn a_socket_that_was_closed_is_nobodys() {
        let uid = rustix::process::geteuid().as_raw();
        for ip in ["127.0.0.1", "::1"] {
            let Ok(listener) = std::net::TcpListener::bind((ip, 0)) else {
                println!("skipped: this machine has no {ip}");
                continue;
            };
            let own = listener.local_addr().unwrap();
            let client = std::net::TcpStream::connect(own).unwrap();
            let (_held, peer) = listener.accept().unwrap();
            assert_both(peer, own, Some(uid));
            assert_both(own, peer, Some(uid));
            drop(client);
            assert_both(peer, own, None);
            assert_both(SocketAddr::new(peer.ip(), 1), own, None);
        }
    }
}
