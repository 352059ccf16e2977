//! Asks the kernel for one TCP socket of this machine (sock_diag(7)), which costs the same however many there are.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// Whose a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is no such socket; or this kernel cannot say, for want of its module.
    Unknown,
    /// Nobody holds it any more.
    Nobody,
    /// A user's.
    User(u32),
}

/// The user whose the socket from `local` to `remote` is.
///
/// # Errors
///
/// Those of the kernel, which may not be asked everywhere.
pub(super) fn uid_of(local: SocketAddr, remote: SocketAddr) -> io::Result<Owner> {
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
    let kernel = socket_with(AddressFamily::NETLINK, kind, flags, Some(SOCK_DIAG))?;
    sendto(&kernel, &request(local, remote), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 512];
    // The answer is there when the request has been taken.
    let (length, _) = recv(&kernel, &mut answer, RecvFlags::DONTWAIT)?;
    read(&answer[..length], (local, remote))
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2` (linux/netlink.h, linux/inet_diag.h).
fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let is_ipv4 = [local, remote].iter().all(|end| end.ip().to_canonical().is_ipv4());
    let family = if is_ipv4 { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut message = Vec::with_capacity(LENGTH);
    message.extend((LENGTH as u32).to_ne_bytes());
    message.extend(BY_FAMILY.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    // Sequence and sender: one answer is expected, and the kernel knows where.
    message.extend([0; 8]);
    message.extend([family.as_raw() as u8, TCP, 0, 0]);
    // In whatever state.
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    for end in [local, remote] {
        match end.ip().to_canonical() {
            IpAddr::V4(ip) if is_ipv4 => {
                message.extend(ip.octets());
                message.extend([0; 12]);
            }
            IpAddr::V4(ip) => message.extend(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => message.extend(ip.octets()),
        }
    }
    // On whatever interface, and with no cookie.
    message.extend(0_u32.to_ne_bytes());
    message.extend([0xff; 8]);
    message
}

/// Reads `struct inet_diag_msg`, or the error in its place.
fn read(answer: &[u8], ends: (SocketAddr, SocketAddr)) -> io::Result<Owner> {
    let bad = || io::Error::other("the kernel's answer about a socket makes no sense");
    let u16_at = |at| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    match u16_at(4).ok_or_else(bad)? {
        ERROR => match u32_at(16).ok_or_else(bad)?.cast_signed() {
            error if error == -Errno::NOENT.raw_os_error() => Ok(Owner::Unknown),
            error => Err(io::Error::from_raw_os_error(-error)),
        },
        BY_FAMILY => {
            // Where there is no such connection the kernel may name a listener, or one of before.
            let is_it = found(answer).ok_or_else(bad)? == canonical(ends);
            let (uid, inode) = (u32_at(80).ok_or_else(bad)?, u32_at(84).ok_or_else(bad)?);
            Ok(match (is_it, inode) {
                (false, _) => Owner::Unknown,
                (true, 0) => Owner::Nobody,
                (true, _) => Owner::User(uid),
            })
        }
        _ => Err(bad()),
    }
}

/// The ends of the socket in an answer.
fn found(answer: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let is_ipv4 = u16::from(*answer.get(16)?) == AddressFamily::INET.as_raw();
    let end = |port_at: usize, ip_at: usize| {
        let port = u16::from_be_bytes(answer.get(port_at..port_at + 2)?.try_into().ok()?);
        let ip: [u8; 16] = answer.get(ip_at..ip_at + 16)?.try_into().ok()?;
        let ip = if is_ipv4 {
            IpAddr::V4(Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3]))
        } else {
            IpAddr::V6(Ipv6Addr::from(ip))
        };
        Some(SocketAddr::new(ip, port))
    };
    Some(canonical((end(20, 24)?, end(22, 40)?)))
}

/// Without scopes, and IPv4 as such though the socket is one of IPv6 (RFC 4291 section 2.5.5.2).
fn canonical((one, other): (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    let plain = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
    (plain(one), plain(other))
}

/// Both structures: 16 and 56 octets.
const LENGTH: usize = 72;

/// `SOCK_DIAG_BY_FAMILY`, of requests and answers.
const BY_FAMILY: u16 = 20;

/// `NLM_F_REQUEST`: one socket, and not a list.
const REQUEST: u16 = 1;

/// `NLMSG_ERROR`.
const ERROR: u16 = 2;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// An answer of the kernel: family, ends, uid, inode.
    fn answer((family, local, remote): (u8, &str, &str), uid: u32, inode: u32) -> Vec<u8> {
        let (local, remote) = (end(local), end(remote));
        let mut answer = vec![0; 20];
        answer[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer[16] = family;
        answer.extend(local.port().to_be_bytes());
        answer.extend(remote.port().to_be_bytes());
        for end in [local, remote] {
            let mut ip = match end.ip() {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            ip.resize(16, 0);
            answer.extend(ip);
        }
        answer.extend([0; 24]);
        answer.extend(uid.to_ne_bytes());
        answer.extend(inode.to_ne_bytes());
        answer
    }

    #[test]
    fn what_the_kernel_may_answer() {
        let ends = (end("127.0.0.1:40000"), end("127.0.0.1:8377"));
        let table = [
            (answer((2, "127.0.0.1:40000", "127.0.0.1:8377"), 1001, 7), Owner::User(1001)),
            (
                answer((10, "[::ffff:127.0.0.1]:40000", "[::ffff:127.0.0.1]:8377"), 9, 7),
                Owner::User(9),
            ),
            // Nobody holds it: the kernel has no uid for it, which reads as root's.
            (answer((2, "127.0.0.1:40000", "127.0.0.1:8377"), 0, 0), Owner::Nobody),
            (answer((2, "127.0.0.1:40000", "0.0.0.0:0"), 1001, 7), Owner::Unknown),
            (answer((2, "127.0.0.1:40001", "127.0.0.1:8377"), 1001, 7), Owner::Unknown),
        ];
        for (answer, expected) in table {
            assert_eq!(answer.len(), 88);
            assert_eq!(read(&answer, ends).unwrap(), expected);
            assert!(read(&answer[..80], ends).is_err(), "cut off");
        }
        let error = |errno: i32| {
            let mut answer = vec![0; 36];
            answer[4..6].copy_from_slice(&ERROR.to_ne_bytes());
            answer[16..20].copy_from_slice(&errno.to_ne_bytes());
            read(&answer, ends)
        };
        assert_eq!(error(-2).unwrap(), Owner::Unknown);
        assert_eq!(error(-1).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(read(&[], ends).is_err());
    }
}
