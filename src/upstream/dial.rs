//! Connects: TCP, the chain, TLS, each with its deadline; the only caller of connect.

mod race;

use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::net::sockopt::set_tcp_keepidle;
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use self::race::{in_turns, race};
use super::chain::{Chain, Conversation, Hop, Opened, open_socks, open_tunnel};
use super::early::Early;
use super::{Stage, Step, UpstreamError};
use crate::origin::{Host, Origin, ProxyScheme, Scheme, Target};
use crate::secret::Secret;
use crate::tasks::detached;
use crate::tls::trust::{Alpn, Distrust, UpstreamTrust, describe_failure};

/// The first leg of the way out: TCP, or TLS with a proxy of the chain.
pub type Leg = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Bytes to and from a target before any TLS of ours: a leg to the target itself, or a tunnel through the chain.
pub type Transport = Early<Leg>;

/// A connection to an origin on which HTTP is spoken: plain text for absolute-form requests, else
/// verified TLS.
pub type Stream = Either<Transport, Box<TlsStream<Transport>>>;

/// Which addresses may be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All.
    Anywhere,
    /// None of this machine, of a private network, or of a link.
    Public,
}

impl Scope {
    /// Judges the very address that is connected to, after every lookup, so that no name leads around it.
    fn has(self, address: SocketAddr) -> bool {
        self == Self::Anywhere || (is_public(address.ip()) && !is_of_this_machine(address))
    }

    /// Whether a host may be asked of a proxy that looks names up itself.
    fn has_host(self, host: &Host) -> bool {
        match host {
            _ if self == Self::Anywhere => true,
            Host::Ip(ip) => is_public(*ip),
            Host::Name(_) => !host.is_loopback(),
        }
    }
}

/// Whether an address has one meaning in the whole Internet, by the registries of special ones (RFC 6890, RFC 4193,
/// RFC 4291, RFC 6598), and leads to one host. One of IPv6 that carries one of IPv4 is as that one.
fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            let is_special = match (a, b, c) {
                // This network, loopback, documentation, benchmarks, protocol assignments, 6to4 relays.
                (0 | 127, _, _) | (192, 0, 0 | 2) | (192, 88, 99) | (198, 18 | 19, _) => true,
                (198, 51, 100) | (203, 0, 113) => true,
                // Shared by a provider's customers.
                (100, 64..=127, _) => true,
                // Multicast, reserved, broadcast.
                (224.., _, _) => true,
                _ => false,
            };
            !(is_special || ip.is_private() || ip.is_link_local())
        }
        IpAddr::V6(ip) => {
            let [first, second, ..] = ip.segments();
            let embedded = |high: u16, low: u16| {
                let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
                is_public(IpAddr::from([a, b, c, d]))
            };
            match (first, second) {
                // Translated (RFC 6052), but for a network's own (RFC 8215), which may embed another one; 6to4 (RFC 3056).
                (0x64, 0xff9b) if ip.segments()[2..6] == [0; 4] => {
                    embedded(ip.segments()[6], ip.segments()[7])
                }
                (0x2002, high) => embedded(high, ip.segments()[2]),
                // Teredo and other protocols, documentation.
                (0x2001, 0..=0x1ff | 0xdb8) | (0x3fff, 0..=0xfff) => false,
                // All that is assigned to hosts (RFC 4291 section 2.4).
                _ => first & 0xe000 == 0x2000,
            }
        }
    }
}

/// Whether an address is one of this machine's own: it is then also where a packet to it would come from. Nothing is
/// sent.
fn is_of_this_machine(address: SocketAddr) -> bool {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Without a socket nothing is known, and the next one may be had again.
    let Ok(socket) = UdpSocket::bind((any, 0)) else { return true };
    let source = || {
        socket.connect(address)?;
        io::Result::Ok(socket.local_addr()?.ip())
    };
    source().is_ok_and(|source| source == address.ip())
}

/// Opens connections to targets and origins.
pub struct Dialer {
    trust: Arc<UpstreamTrust>,
    chain: Chain,
    resolve: BTreeMap<Target, Target>,
    lookups: Arc<Semaphore>,
    /// Where this very proxy listens.
    own: ArcSwap<Vec<SocketAddr>>,
    /// What this very proxy is called in [`crate::headers::VALETKEY_VIA`]: at random, and by nobody known.
    mark: String,
    /// Versions of the roots that earlier dialers have had in its place.
    versions_before: u64,
}

impl Dialer {
    /// A dialer with this trust and chain. `resolve` says where to connect instead of to a target,
    /// like curl's `--connect-to`; names in TLS and HTTP stay, and the chain is not used for those.
    pub fn new(trust: Arc<UpstreamTrust>, chain: Chain, resolve: BTreeMap<Target, Target>) -> Self {
        let lookups = Arc::new(Semaphore::new(MOST_LOOKUPS));
        let mark = format!("{:016x}", RandomState::new().hash_one(()));
        let (own, versions_before) = (ArcSwap::default(), 0);
        Self { trust, chain, resolve, lookups, own, mark, versions_before }
    }

    /// The same for the proxy of an earlier one, whose connections then count as verified under older roots.
    pub(super) fn in_the_place_of(self, earlier: &Self) -> Self {
        Self {
            own: ArcSwap::new(earlier.own.load_full()),
            mark: earlier.mark.clone(),
            versions_before: earlier.trust_version() + 1,
            ..self
        }
    }

    /// Refuses connections to this address from now on: a listener of our own, and a loop.
    pub(super) fn avoid(&self, own: SocketAddr) {
        self.own.rcu(|known| known.iter().copied().chain([own]).collect::<Vec<_>>());
    }

    /// Connects to this address again: there is no listener of our own any more.
    pub(super) fn no_longer_avoid(&self, own: SocketAddr) {
        self.own.rcu(|known| known.iter().copied().filter(|it| *it != own).collect::<Vec<_>>());
    }

    /// The version of the roots that a dial from now on verifies with, or an earlier one.
    pub(super) fn trust_version(&self) -> u64 {
        self.versions_before + self.trust.version()
    }

    /// A connection on which HTTP/2 or HTTP/1.1 is spoken, as the upstream chose.
    pub(super) async fn dial(&self, origin: &Origin) -> Result<Stream, UpstreamError> {
        self.dial_with(origin, (Alpn::Any, Scope::Anywhere)).await
    }

    /// A connection on which only HTTP/1.1 was offered.
    pub(super) async fn dial_http1(
        &self,
        origin: &Origin,
        scope: Scope,
    ) -> Result<Stream, UpstreamError> {
        self.dial_with(origin, (Alpn::Http1, scope)).await
    }

    /// Whether the target is reached through the chain.
    pub(super) fn goes_through_the_chain(&self, target: &Target) -> bool {
        !self.resolve.contains_key(target) && self.chain.hop(target).is_some()
    }

    async fn dial_with(
        &self,
        origin: &Origin,
        (alpn, scope): (Alpn, Scope),
    ) -> Result<Stream, UpstreamError> {
        let transport = self.connect(&origin.target, scope, None).await?;
        if origin.scheme == Scheme::Http {
            return Ok(Either::Left(transport));
        }
        let config = self.trust.now().client_config(alpn);
        let tls = handshake(config, &origin.target, transport.reading_ahead()).await?;
        Ok(Either::Right(Box::new(tls)))
    }

    /// Refuses a CONNECT that has come through this very proxy before.
    pub(super) fn refuse_loop(
        &self,
        target: &Target,
        via: Option<&str>,
    ) -> Result<(), UpstreamError> {
        match via.is_some_and(|via| via.split(',').any(|one| one.trim() == self.mark)) {
            true => Err(UpstreamError::new(Stage::Ourselves, target)),
            false => Ok(()),
        }
    }

    /// TCP to the target, through the chain where there is one, which is told who has passed this on. A name that the
    /// proxy in front of us looks up is in whatever scope that proxy has.
    pub(super) async fn connect(
        &self,
        target: &Target,
        scope: Scope,
        via: Option<&str>,
    ) -> Result<Transport, UpstreamError> {
        if let Some(place) = self.resolve.get(target) {
            return Ok(direct(self.tcp(place, scope).await?));
        }
        match self.chain.hop(target) {
            None => Ok(direct(self.tcp(target, scope).await?)),
            Some(_) if !scope.has_host(&target.host) => {
                Err(UpstreamError::new(Stage::OutOfReach, target))
            }
            Some(hop) => {
                // Boxed, because whoever has no chain would keep room for it too.
                let via = via.into_iter().chain([&*self.mark]).collect::<Vec<_>>().join(", ");
                let tunnel = Box::pin(self.through(hop, (target, scope), via));
                limited(CHAIN_LIMIT, (&hop.proxy, Step::Chain), tunnel).await
            }
        }
    }

    async fn through(
        &self,
        hop: &Hop,
        (target, scope): (&Target, Scope),
        via: String,
    ) -> Result<Transport, UpstreamError> {
        match hop.scheme {
            ProxyScheme::Http | ProxyScheme::Https => self.http_tunnel(hop, target, via).await,
            ProxyScheme::Socks5 => self.socks_tunnel_to_an_address(hop, target, scope).await,
            ProxyScheme::Socks5h => self.socks_tunnel(hop, target, CHAIN_LIMIT).await,
        }
    }

    async fn http_tunnel(
        &self,
        hop: &Hop,
        target: &Target,
        via: String,
    ) -> Result<Transport, UpstreamError> {
        let mut said = Conversation::begin(hop, via).await?;
        loop {
            let leg = self.leg_to(hop).await.map_err(UpstreamError::of_the_chain)?;
            let opened = open_tunnel(leg, (hop, target), &mut said).await?;
            if let Opened::Tunnel(leg, early) = opened {
                return Ok(Early::new(early, leg));
            }
        }
    }

    async fn leg_to(&self, hop: &Hop) -> Result<Leg, UpstreamError> {
        let tcp = self.tcp(&hop.proxy, Scope::Anywhere).await?;
        if hop.scheme != ProxyScheme::Https {
            return Ok(Either::Left(tcp));
        }
        let config = self.trust.now().client_config(Alpn::Http1);
        let tls = handshake(config, &hop.proxy, tcp).await?;
        Ok(Either::Right(Box::new(tls)))
    }

    /// The server has until `limit` to connect to the target.
    async fn socks_tunnel(
        &self,
        hop: &Hop,
        target: &Target,
        limit: Duration,
    ) -> Result<Transport, UpstreamError> {
        let shown = hop.auth.login(None).await.map_err(|error| hop.no_login(error))?;
        let failed = match self.open_socks(hop, (target, limit), shown.as_ref()).await {
            Err(error) if matches!(error.stage, Stage::ChainAuth { was_shown: true, .. }) => error,
            outcome => return outcome,
        };
        // Once: what is new may be right.
        match hop.auth.login(shown.as_ref()).await.map_err(|error| hop.no_login(error))? {
            Some(new) => self.open_socks(hop, (target, limit), Some(&new)).await,
            None => Err(failed),
        }
    }

    async fn open_socks(
        &self,
        hop: &Hop,
        (target, limit): (&Target, Duration),
        login: Option<&Secret>,
    ) -> Result<Transport, UpstreamError> {
        let mut tcp =
            self.tcp(&hop.proxy, Scope::Anywhere).await.map_err(UpstreamError::of_the_chain)?;
        let opening = async {
            open_socks(&mut tcp, target, login).await.map_err(|(stage, cause)| {
                let failed = UpstreamError::new(stage, &hop.proxy);
                cause.into_iter().fold(failed, UpstreamError::because)
            })
        };
        limited(limit, (&hop.proxy, Step::Chain), opening).await?;
        Ok(direct(tcp))
    }

    /// By the first address of the target's that the proxy connects to, which is not to resolve names. One that is
    /// silent costs what a connection of our own may take, while there are others.
    async fn socks_tunnel_to_an_address(
        &self,
        hop: &Hop,
        target: &Target,
        scope: Scope,
    ) -> Result<Transport, UpstreamError> {
        let mut failed = None;
        let mut addresses = in_turns(self.addresses_within(target, scope).await?).into_iter();
        while let Some(address) = addresses.next() {
            let place = Target { host: Host::Ip(address.ip()), port: target.port };
            let limit = if addresses.len() > 0 { CONNECT_LIMIT } else { CHAIN_LIMIT };
            match self.socks_tunnel(hop, &place, limit).await {
                Err(error)
                    if matches!(
                        error.stage,
                        Stage::ChainRefused(_) | Stage::Timeout(Step::Chain)
                    ) =>
                {
                    failed = failed.or(Some(error));
                }
                outcome => return outcome,
            }
        }
        Err(failed.unwrap_or_else(|| UpstreamError::new(Stage::Dns, target)))
    }

    /// The addresses of a place that are in a scope, in the system's order.
    async fn addresses_within(
        &self,
        place: &Target,
        scope: Scope,
    ) -> Result<Vec<SocketAddr>, UpstreamError> {
        let mut addresses = self.addresses(place).await?;
        let is_known = !addresses.is_empty();
        addresses.retain(|address| scope.has(*address));
        match addresses.is_empty() && is_known {
            true => Err(UpstreamError::new(Stage::OutOfReach, place)),
            false => Ok(addresses),
        }
    }

    /// All addresses of a place, in the system's order. Looked up on a thread that nobody waits for: the system's
    /// resolver cannot be told to stop.
    async fn addresses(&self, place: &Target) -> Result<Vec<SocketAddr>, UpstreamError> {
        let (name, port) = match &place.host {
            Host::Ip(address) => return Ok(vec![SocketAddr::new(*address, place.port)]),
            Host::Name(name) => (name.clone(), place.port),
        };
        let looking_up = async {
            let turn = Arc::clone(&self.lookups).acquire_owned().await.map_err(io::Error::other)?;
            let found = detached("lookup", move || {
                let _turn = turn;
                (&*name, port).to_socket_addrs().map(Vec::from_iter)
            })?;
            found.await.map_err(io::Error::other)?
        };
        let unresolved = |error: io::Error| UpstreamError::new(Stage::Dns, place).because(error);
        limited(DNS_LIMIT, (place, Step::Dns), async { looking_up.await.map_err(unresolved) }).await
    }

    async fn tcp(&self, place: &Target, scope: Scope) -> Result<TcpStream, UpstreamError> {
        let addresses = in_turns(self.addresses_within(place, scope).await?);
        let failed = |error: io::Error| {
            let stage = match error.kind() {
                io::ErrorKind::TimedOut => Stage::Timeout(Step::Tcp),
                _ => Stage::Tcp,
            };
            UpstreamError::new(stage, place).because(error)
        };
        let connecting = async { race(addresses, open).await.map_err(failed) };
        let stream = limited(CONNECT_LIMIT, (place, Step::Tcp), connecting).await?;
        if self.leads_back(&stream) {
            return Err(UpstreamError::new(Stage::Ourselves, place));
        }
        Ok(stream)
    }

    /// Whether at the other end is a listener of our own.
    fn leads_back(&self, stream: &TcpStream) -> bool {
        let own = self.own.load();
        if own.is_empty() {
            return false;
        }
        let (Ok(peer), Ok(here)) = (stream.peer_addr(), stream.local_addr()) else { return false };
        // An IPv4 address may be written as one of IPv6 (RFC 4291 section 2.5.5.2).
        let (there, here) = (peer.ip().to_canonical(), here.ip().to_canonical());
        own.iter().any(|own| {
            let listens = own.ip().to_canonical();
            // To all of 127.0.0.0/8 the way is from 127.0.0.1.
            let is_here = there == here || there.is_loopback();
            let is_there = listens == there || (listens.is_unspecified() && is_here);
            own.port() == peer.port() && is_there
        })
    }
}

/// Longest time for a name: two servers that are each asked twice for 5 s, as resolv.conf(5) has it.
const DNS_LIMIT: Duration = Duration::from_secs(20);

/// Most names that are looked up at a time, each on a thread that may hang: as many as the runtime would give to
/// such work. Waiting for one's turn counts as looking up.
const MOST_LOOKUPS: usize = 512;

/// Longest time for one TCP connection: two retransmissions of the first packet (1 s and 2 s after it,
/// RFC 6298 section 2) and room for two dozen addresses, which begin one soon after the other.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest time for the TLS handshake, the same as for the client's.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Longest time for everything that leads through the chain: its TCP, its TLS and its answer, which
/// waits for its own connection to the target.
const CHAIN_LIMIT: Duration = Duration::from_secs(30);

/// When a silent TCP connection is probed: below the five minutes after which common NAT and company
/// firewalls forget it.
const KEEPALIVE: Duration = Duration::from_secs(60);

#[expect(clippy::disallowed_methods, reason = "the only way out")]
async fn open(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_nodelay(true)?;
    socket.set_keepalive(true)?;
    set_tcp_keepidle(&socket, KEEPALIVE)?;
    socket.connect(address).await
}

fn direct(tcp: TcpStream) -> Transport {
    Early::new([], Either::Left(tcp))
}

/// Whether the upstream chose HTTP/2.
pub(super) fn is_http2(stream: &Stream) -> bool {
    match stream {
        Either::Left(_) => false,
        Either::Right(tls) => tls.get_ref().1.alpn_protocol() == Some(b"h2"),
    }
}

/// What the upstream showed in its handshake; nothing without TLS.
pub(super) fn certificates(stream: &Stream) -> Vec<CertificateDer<'static>> {
    let shown = match stream {
        Either::Left(_) => None,
        Either::Right(tls) => tls.get_ref().1.peer_certificates(),
    };
    shown.map(<[_]>::to_vec).unwrap_or_default()
}

async fn handshake<S>(
    config: Arc<ClientConfig>,
    target: &Target,
    stream: S,
) -> Result<TlsStream<S>, UpstreamError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = (target.host.server_name()).ok_or_else(|| {
        UpstreamError::new(Stage::Untrusted(Box::new(Distrust::no_name())), target)
    })?;
    let connecting = tokio_rustls::TlsConnector::from(config).connect(name, stream);
    let failed = |error: io::Error| {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls.and_then(describe_failure) {
            // It says it all.
            Some(why) => UpstreamError::new(Stage::Untrusted(Box::new(why)), target),
            None => UpstreamError::new(Stage::Tls, target).because(error),
        }
    };
    limited(HANDSHAKE_LIMIT, (target, Step::Tls), async { connecting.await.map_err(failed) }).await
}

async fn limited<T>(
    limit: Duration,
    (place, step): (&Target, Step),
    doing: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    match tokio::time::timeout(limit, doing).await {
        Ok(outcome) => outcome,
        Err(late) => Err(UpstreamError::new(Stage::Timeout(step), place).because(late)),
    }
}

impl UpstreamError {
    /// The same failure, on the way to the proxy in front of us.
    fn of_the_chain(mut self) -> Self {
        self.stage = match self.stage {
            Stage::Untrusted(why) => Stage::ChainUntrusted(why),
            ours @ Stage::Ourselves => ours,
            Stage::Tcp => Stage::ChainUnreachable(None),
            other => Stage::ChainUnreachable(Some(other.to_string())),
        };
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses() {
        for (ip, expected) in [
            ("1.1.1.1", true),
            ("8.8.8.8", true),
            ("172.15.0.1", true),
            ("100.63.0.1", true),
            ("223.255.255.255", true),
            ("2606:4700::1111", true),
            ("::ffff:8.8.8.8", true),
            ("64:ff9b::808:808", true),
            ("2002:808:808::1", true),
            ("0.0.0.0", false),
            ("0.1.2.3", false),
            ("10.0.0.1", false),
            ("100.64.0.1", false),
            ("127.0.0.1", false),
            ("127.255.255.254", false),
            ("169.254.169.254", false),
            ("172.16.0.1", false),
            ("172.31.255.255", false),
            ("192.0.0.192", false),
            ("192.168.1.1", false),
            ("198.18.0.1", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("::", false),
            ("::1", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:169.254.169.254", false),
            ("::127.0.0.1", false),
            ("64:ff9b::7f00:1", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("64:ff9b:1::808:808", false),
            ("64:ff9b:1:a00:0:100:808:808", false),
            ("2002:7f00:1::", false),
            ("2002:a00:1::1", false),
            ("2001::1", false),
            ("2001:db8::1", false),
            ("fc00::1", false),
            ("fd00:ec2::254", false),
            ("fe80::1", false),
            ("fec0::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_public(ip.parse().unwrap()), expected, "{ip}");
        }
    }

    #[test]
    fn our_own_addresses() {
        assert!(is_of_this_machine(([127, 0, 0, 1], 80).into()));
        assert!(!is_of_this_machine(([192, 0, 2, 1], 80).into()));
    }
}
