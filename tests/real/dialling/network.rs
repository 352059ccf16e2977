//! A network of a test's own: addresses that live, refuse or swallow everything, and the server that knows the names.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::process::Command;
use tokio::sync::watch;
use valetkey::tasks::Tasks;

use super::super::support::{done, option_env_now, program};

const fn v4(last: u8) -> IpAddr {
    // TEST-NET-1 (RFC 5737).
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, last))
}

const fn v6(net: u16, last: u16) -> IpAddr {
    // 2001:db8::/32 is for documentation (RFC 3849).
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, last))
}

/// The world stands here.
pub(super) const ALIVE4: IpAddr = v4(1);
pub(super) const ALIVE6: IpAddr = v6(1, 1);
/// Here too; the system calls the address deprecated, so that it names every other one before it (RFC 6724 rule 3).
pub(super) const LAST6: IpAddr = v6(2, 1);
/// Here as well, and nothing else comes here.
pub(super) const QUIET4: IpAddr = v4(4);
/// Takes connections and says nothing.
pub(super) const SILENT4: IpAddr = v4(3);
/// Takes connections, speaks no TLS, and ends them.
pub(super) const RUDE4: IpAddr = v4(5);
/// Nobody listens, and the kernel says so.
pub(super) const REFUSING4: IpAddr = v4(2);
pub(super) const REFUSING6: IpAddr = v6(1, 2);
/// Every packet is swallowed.
pub(super) const DEAD4: IpAddr = v4(66);
pub(super) const DEAD6: [IpAddr; 3] = [v6(1, 0x66), v6(1, 0x67), v6(1, 0x68)];
/// No way leads there, as to every address of a family that a network does not have.
pub(super) const NOWHERE4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
pub(super) const NOWHERE6: IpAddr = v6(9, 1);

/// Makes the network, in which no neighbour is ever asked for, and gives it names of its own.
const SETUP: &str = r#"set -e
folder=$1; shift
ip=$1; shift
"$ip" link set lo up
"$ip" link add near type veth peer name far
"$ip" link set near arp off up
"$ip" link set far arp off up
for last in 1 2 3 4 5; do "$ip" addr add 192.0.2.$last/24 dev near; done
for last in 1 2; do "$ip" addr add 2001:db8:1::$last/64 dev near nodad; done
"$ip" addr add 2001:db8:2::1/64 dev near nodad preferred_lft 0
for file in resolv.conf nsswitch.conf gai.conf; do
    [ ! -e /etc/$file ] || mount --bind "$folder/$file" /etc/$file
done
exec "$@""#;

/// The resolver asks once and waits for longer than we do.
const RESOLV_CONF: &str = "nameserver 127.0.0.1\noptions timeout:40 attempts:1\n";

const INSIDE: &str = "VALETKEY_TEST_INSIDE";

/// Whether this is the copy of the test that runs in a network of its own. Elsewhere that copy is started, must
/// succeed, and says what it says; or it is said why there is none.
pub(crate) async fn is_inside(test: &str) -> bool {
    if option_env_now(INSIDE).is_some() {
        return true;
    }
    let (Some(unshare), Some(ip)) = (program("unshare"), program("ip")) else { return false };
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in
        [("resolv.conf", RESOLV_CONF), ("nsswitch.conf", "hosts: files dns\n"), ("gai.conf", "")]
    {
        fs::write(folder.path().join(file), text).unwrap();
    }
    let inside = |how: &str, program: &Path| {
        let mut command = Command::new(&unshare);
        command.args([how, "--", "sh", "-c", SETUP, "sh"]).arg(folder.path()).arg(&ip).arg(program);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped()).kill_on_drop(true);
        command
    };
    // Who is not root is it in a namespace of users.
    let mut refused = String::new();
    for how in ["-nm", "-rnm"] {
        let probe = done(inside(how, Path::new("true")).spawn().unwrap()).await;
        if probe.status != 0 {
            refused = probe.err;
            continue;
        }
        let mut copy = inside(how, &std::env::current_exe().unwrap());
        copy.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
        let copy = done(copy.spawn().unwrap()).await;
        assert_eq!(copy.status, 0, "{}\n{}", copy.out, copy.err);
        assert!(copy.out.contains("1 passed"), "there is no such test: {test}");
        println!("{}", copy.out);
        return false;
    }
    println!("skipped: this user may not make a network of its own: {}", refused.trim());
    false
}

/// Opens a door to the world; what it tells is how many connections are open.
pub(super) async fn door(address: IpAddr, world: SocketAddr) -> watch::Receiver<usize> {
    let (count, open) = watch::channel(0);
    listen(address, move |stream| {
        let count = count.clone();
        count.send_modify(|open| *open += 1);
        async move {
            forward(stream, world).await;
            count.send_modify(|open| *open -= 1);
        }
    })
    .await;
    open
}

/// Listens where nobody is answered.
pub(super) async fn silence(address: IpAddr) {
    listen(address, |stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    })
    .await;
}

/// Listens where everybody is told something that is no TLS, and nothing else.
pub(super) async fn rudeness(address: IpAddr) {
    listen(address, |mut stream| async move {
        stream.write_all(b"SSH-2.0-vk\r\n").await.ok();
    })
    .await;
}

/// Takes connections at port 443 as long as the process lives.
async fn listen<F>(address: IpAddr, serve: impl Fn(TcpStream) -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((address, 443)).await.unwrap();
    let tasks = Tasks::new();
    tasks.clone().spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tasks.spawn(serve(stream));
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "what stands here is no part of the program")]
async fn forward(mut stream: TcpStream, world: SocketAddr) {
    let Ok(mut there) = TcpStream::connect(world).await else { return };
    // Whoever goes away first ends it.
    tokio::io::copy_bidirectional(&mut stream, &mut there).await.ok();
}

/// Waits for a program of the test's to listen.
#[expect(clippy::disallowed_methods, reason = "it only asks whether somebody listens")]
pub(super) async fn listening(address: &str) {
    while TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Answers for every name by its first label: `None` says that there is no such name, and for `silent` there is no
/// answer at all.
pub(super) async fn names(addresses: fn(&str) -> Option<&'static [IpAddr]>) {
    let socket = UdpSocket::bind("127.0.0.1:53").await.unwrap();
    Tasks::new().spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            if let Some(answer) = answer(&query[..length], addresses) {
                socket.send_to(&answer, from).await.ok();
            }
        }
    });
}

/// The answer to a query (RFC 1035 section 4.1).
fn answer(query: &[u8], addresses: fn(&str) -> Option<&'static [IpAddr]>) -> Option<Vec<u8>> {
    let label = std::str::from_utf8(&query[13..13 + usize::from(query[12])]).ok()?;
    if label == "silent" {
        return None;
    }
    let name = query[12..].iter().position(|byte| *byte == 0)?;
    let question = &query[12..12 + name + 5];
    let wants_v6 = question[name + 2] == 28;
    let known = addresses(label);
    let asked = known.unwrap_or_default().iter().filter(|address| address.is_ipv6() == wants_v6);
    let code = if known.is_some() { 0 } else { 3 };
    let count = asked.clone().count() as u8;
    let mut answer = [&query[..2], &[0x81, 0x80 | code, 0, 1, 0, count, 0, 0, 0, 0]].concat();
    answer.extend(question);
    for address in asked {
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        // The name of the question, the type, class IN, and a life of a minute.
        answer.extend([0xc0, 12, 0, question[name + 2], 0, 1, 0, 0, 0, 60, 0]);
        answer.push(octets.len() as u8);
        answer.extend(octets);
    }
    Some(answer)
}
