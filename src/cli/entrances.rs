//! Opens the listeners of a configuration, and keeps to it while it changes.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use super::activation::Inherited;
use super::output::{self, Failure};
use super::running::ServerInfo;
use super::start;
use crate::config::{ListenAddress, Listener};
use crate::origin::Host;
use crate::proxy::{Door, Entrance, Proxy, Socket};

/// The listeners that are open.
pub(super) struct Entrances {
    open: Vec<Open>,
    /// Sockets that were open before us.
    inherited: Inherited,
    /// Listeners for those of them that the configuration did not speak of.
    others: Vec<Listener>,
}

struct Open {
    listener: Listener,
    /// The address, with the port that was taken; `None` for a Unix socket.
    address: Option<SocketAddr>,
    entrance: Entrance,
    /// Whether it was opened by us, and is ours to remove.
    is_ours: bool,
    /// Whether it was said that it is open.
    is_known: bool,
}

/// Listeners that are wanted, with what is bound for them; dropped, it changes nothing.
pub(super) struct Prepared {
    listeners: Vec<Listener>,
    bound: Vec<Bound>,
}

/// What is bound and serves nobody yet.
struct Bound {
    listener: Listener,
    socket: Socket,
    is_ours: bool,
}

impl Entrances {
    /// None is open but those that were inherited, which serve nobody yet.
    ///
    /// # Errors
    ///
    /// [`Failure`] for an inherited one of which nobody says who may come.
    pub(super) fn new(inherited: Inherited, listeners: &[Listener]) -> Result<Self, Failure> {
        let others = inherited.others(listeners)?;
        Ok(Self { open: Vec::new(), inherited, others })
    }

    /// Binds what these listeners want and is not open. Nobody is let in there before [`Entrances::open`].
    ///
    /// # Errors
    ///
    /// [`Failure`] when one cannot be bound; then nothing is changed.
    pub(super) async fn prepare(
        &mut self,
        listeners: &[Listener],
        has_passes: bool,
    ) -> Result<Prepared, Failure> {
        let listeners = [listeners, &self.others].concat();
        listeners.iter().try_for_each(|listener| check(listener, has_passes))?;
        let mut bound = Vec::new();
        for listener in &listeners {
            if self.is_open(listener) {
                continue;
            }
            let (listener, inherited) = (listener.clone(), self.inherited.take(&listener.address)?);
            let is_ours = inherited.is_none();
            let socket = match inherited {
                Some(socket) => socket,
                None => bind(&listener.address).await?,
            };
            bound.push(Bound { listener, socket, is_ours });
        }
        Ok(Prepared { listeners, bound })
    }

    /// Opens what was bound, lets in at all of them whom they say, and closes the others. Who is in stays in.
    pub(super) fn open(&mut self, Prepared { listeners, bound }: Prepared, proxy: &Proxy) {
        self.open.retain(|open| {
            let is_wanted = listeners.iter().any(|wanted| open.is_at(wanted));
            if !is_wanted {
                output::words(format_args!("no longer listening on {}", open.place()));
                open.close();
            }
            is_wanted
        });
        for open in &mut self.open {
            let wanted = listeners.iter().find(|wanted| open.is_at(wanted));
            if let Some(wanted) = wanted.filter(|wanted| open.listener != **wanted) {
                open.entrance.change(door(wanted));
                open.listener = wanted.clone();
            }
        }
        for Bound { listener, socket, is_ours } in bound {
            let address = socket.address();
            let entrance = proxy.serve(socket, door(&listener));
            self.open.push(Open { listener, address, entrance, is_ours, is_known: false });
        }
    }

    fn is_open(&self, wanted: &Listener) -> bool {
        self.open.iter().any(|open| open.is_at(wanted))
    }

    /// Says which are open, those that were not said before.
    pub(super) fn announce(&mut self) {
        for open in self.open.iter_mut().filter(|open| !open.is_known) {
            output::words(format_args!("listening on {}", open.place()));
            open.warn();
            open.is_known = true;
        }
    }

    /// What other commands are told, with the roots in `ca`: where clients on this machine find the proxy best,
    /// without TLS and a pass if there is a choice, at an address if there is one.
    ///
    /// # Errors
    ///
    /// [`Failure`] when nothing is open.
    pub(super) fn server_info(&self, ca: PathBuf) -> Result<ServerInfo, Failure> {
        let rank = |open: &&Open| {
            let Listener { require_pass, tls_names, .. } = &open.listener;
            (open.address.is_none(), *require_pass, !tls_names.is_empty())
        };
        let best = self.open.iter().min_by_key(rank).ok_or_else(|| {
            Failure::new("there is no address to listen on")
                .hint("in the configuration: listen = \"127.0.0.1:8377\"")
        })?;
        let mut info = ServerInfo::of_this_process(best.url(), ca);
        info.tls_name = best.listener.tls_names.first().map(Host::to_string);
        info.needs_pass = best.listener.require_pass;
        Ok(info)
    }

    /// Removes what outlives a process.
    pub(super) fn tidy(&self) {
        self.open.iter().for_each(Open::remove_file);
    }
}

impl Open {
    fn is_at(&self, wanted: &Listener) -> bool {
        self.listener.address == wanted.address
    }

    /// As clients on this machine name it.
    fn url(&self) -> String {
        self.at(self.address.map(ListenAddress::from_here))
    }

    /// As it is: at all addresses, if that is so.
    fn place(&self) -> String {
        self.at(self.address)
    }

    fn at(&self, address: Option<SocketAddr>) -> String {
        let scheme = if self.listener.tls_names.is_empty() { "http" } else { "https" };
        match address {
            Some(address) => format!("{scheme}://{address}"),
            None => self.listener.address.to_string(),
        }
    }

    fn close(&self) {
        self.entrance.close();
        self.remove_file();
    }

    fn remove_file(&self) {
        if let (ListenAddress::Unix(path), true) = (&self.listener.address, self.is_ours) {
            let removed = fs::remove_file(path);
            tracing::debug!(ok = removed.is_ok(), "the file of a socket was removed");
        }
    }

    /// Says what its owner may not have thought of.
    fn warn(&self) {
        let Listener { address, tls_names, .. } = &self.listener;
        if self.listener.is_beyond_loopback() && tls_names.is_empty() {
            output::warning(format_args!(
                "passes go over the network in the clear to {address}: keep it to a network of this machine, or set tls = true"
            ));
        }
        if !tls_names.is_empty() {
            output::words(
                "clients must take an https:// proxy, as curl does; Codex does not: give it a listener without TLS",
            );
        }
    }
}

/// Whom a listener lets in.
fn door(listener: &Listener) -> Door {
    Door {
        allow_uids: listener.allow_uids.clone(),
        require_pass: listener.require_pass,
        tls: listener.tls_names.first().cloned(),
    }
}

/// Refuses a listener that everybody could reach and nobody could use.
fn check(listener: &Listener, has_passes: bool) -> Result<(), Failure> {
    if has_passes || !listener.is_beyond_loopback() {
        return Ok(());
    }
    let message = format!("other machines can reach {}, and there is no pass", listener.address);
    Err(Failure::new(message)
        .hint("make one, which clients show: valetkey pass new NAME")
        .hint("or keep it to this machine: valetkey serve --listen 127.0.0.1:8377"))
}

/// What keeps these listeners from being opened, as far as that can be seen without opening them.
pub(super) fn obstacles(listeners: &[Listener], has_passes: bool) -> Vec<Failure> {
    let obstacle = |listener: &Listener| {
        check(listener, has_passes)?;
        match &listener.address {
            ListenAddress::Unix(path) => private_folder(path),
            ListenAddress::Tcp(_) => Ok(()),
        }
    };
    listeners.iter().filter_map(|listener| obstacle(listener).err()).collect()
}

async fn bind(address: &ListenAddress) -> Result<Socket, Failure> {
    match address {
        ListenAddress::Tcp(address) => start::bind(*address).await.map(Socket::Tcp),
        ListenAddress::Unix(path) => bind_file(path),
    }
}

/// A socket for its user alone: 0600, in a folder that is 0700.
fn bind_file(path: &Path) -> Result<Socket, Failure> {
    let at =
        |error: io::Error| Failure::new(format!("cannot listen on {}: {error}", path.display()));
    let folder: PathBuf = path.parent().map(Path::to_owned).unwrap_or_default();
    DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(at)?;
    private_folder(path)?;
    make_room(path)?;
    let listener = UnixListener::bind(path).map_err(at)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(at)?;
    Ok(Socket::Unix(listener))
}

/// Refuses a socket in a folder that others may enter. One that is not there is made.
fn private_folder(path: &Path) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(path);
    let Ok(about) = fs::metadata(folder) else { return Ok(()) };
    if about.uid() != rustix::process::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        // It may be somebody's home or /tmp: not for us to change.
        let message = format!("others may enter {}, where the socket should be", folder.display());
        return Err(Failure::new(message).hint(format!(
            "name a folder of its own, which is then made: unix:{}",
            folder.join("valetkey/proxy.sock").display()
        )));
    }
    Ok(())
}

/// Removes the file of a socket at which nobody listens any more.
#[expect(clippy::disallowed_methods, reason = "it only asks whether another program listens")]
fn make_room(path: &Path) -> Result<(), Failure> {
    let Ok(about) = fs::symlink_metadata(path) else { return Ok(()) };
    if !about.file_type().is_socket() {
        let message = format!("cannot listen on {}: there is something else", path.display());
        return Err(Failure::new(message).hint("name another path, or move it away"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| Failure::at(path, error))
        }
        _ => {
            Err(Failure::new(format!("cannot listen on {}: another program does", path.display()))
                .hint("is it a valetkey? valetkey status"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_its_users_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own/proxy.sock");
        drop(bind_file(&path).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!([mode(&path), mode(path.parent().unwrap())], [0o600, 0o700]);
        // What a crash has left is no obstacle, what is in use is one.
        let _held = bind_file(&path).unwrap();
        let taken = bind_file(&path).err().unwrap();
        assert!(taken.message().ends_with("another program does"), "{taken:?}");

        let file = folder.path().join("own/file");
        fs::write(&file, "kept").unwrap();
        let refused = bind_file(&file).err().unwrap();
        assert!(refused.message().ends_with("there is something else"), "{refused:?}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    }

    #[tokio::test]
    async fn a_folder_of_others_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let refused = bind_file(&folder.path().join("proxy.sock")).err().unwrap();
        assert!(refused.message().starts_with("others may enter"), "{refused:?}");
        assert_eq!(fs::metadata(folder.path()).unwrap().mode() & 0o777, 0o755);
    }

    #[test]
    fn beyond_loopback_only_with_passes() {
        for (address, is_far) in [
            ("127.0.0.1:0", false),
            ("[::1]:0", false),
            ("unix:/s", false),
            ("0.0.0.0:0", true),
            ("192.0.2.1:1", true),
            ("[::]:0", true),
        ] {
            let listener = Listener::on(address.parse().unwrap());
            assert_eq!(check(&listener, false).is_err(), is_far, "{address}");
            assert!(check(&listener, true).is_ok(), "{address}");
        }
    }
}
