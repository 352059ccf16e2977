//! A loopback address of a test's own, at whose port 443 every host of the world stands.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use valetkey::sandbox::World;
use valetkey::tasks::Tasks;

use super::super::support::own_loopback;

/// Whoever knows the file of hosts finds the world here, and nobody else does.
pub(super) struct Place {
    pub(super) address: Ipv4Addr,
    passed: Arc<AtomicUsize>,
    _stop: DropGuard,
}

impl Place {
    /// Takes an address on which no other test is. `None` after saying why there is none.
    pub(super) async fn take(world: SocketAddr) -> Option<Self> {
        let mut refused = None;
        for attempt in 0..64 {
            let address = own_loopback(attempt);
            match TcpListener::bind((address, 443)).await {
                Ok(listener) => return Some(Self::open(address, listener, world)),
                Err(error) => refused = Some(error),
            }
        }
        println!("skipped: no port 443 on a loopback address of its own: {}", refused?);
        None
    }

    fn open(address: Ipv4Addr, listener: TcpListener, world: SocketAddr) -> Self {
        let (stop, passed) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let (tasks, count) = (Tasks::new(), Arc::clone(&passed));
        let forwarding = {
            let (tasks, stop) = (tasks.clone(), stop.clone());
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    count.fetch_add(1, Ordering::SeqCst);
                    tasks.spawn(stop.clone().run_until_cancelled_owned(forward(stream, world)));
                }
            }
        };
        tasks.spawn(stop.clone().run_until_cancelled_owned(forwarding));
        Self { address, passed, _stop: stop.drop_guard() }
    }

    /// How many connections have come here, which only a proxy can make.
    pub(super) fn passed(&self) -> usize {
        self.passed.load(Ordering::SeqCst)
    }

    /// Writes the file of hosts by which the world is found.
    pub(super) fn write_hosts(&self, world: &World, folder: &Path) -> PathBuf {
        let line = |(target, _): (String, _)| {
            format!("{} {}\n", self.address, target.trim_end_matches(":443"))
        };
        let file = folder.join("hosts");
        fs::write(&file, world.resolve().into_iter().map(line).collect::<String>()).unwrap();
        file
    }
}

#[expect(clippy::disallowed_methods, reason = "what stands here is no part of the program")]
async fn forward(mut stream: TcpStream, world: SocketAddr) {
    let Ok(mut there) = TcpStream::connect(world).await else { return };
    // Whoever goes away first ends it.
    tokio::io::copy_bidirectional(&mut stream, &mut there).await.ok();
}
