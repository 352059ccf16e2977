//! The data path: accepts clients, and gives each connection the road that the rules decide.

mod admit;
mod connection;
mod exchange;
mod explained;
mod frames;
mod intercept;
mod issuer;
mod listener;
mod reject;
mod replay;
mod tunnel;
mod upgrade;
mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::rules::Rules;
use crate::tasks::Tasks;
use crate::tls::leaf::Leaves;
use crate::tokens::Tokens;
use crate::upstream::Upstream;

/// What a proxy is made of, all of it ready to use.
pub struct Parts {
    /// The rules of the configuration; the kinds of login are filled in here.
    pub rules: Rules,
    /// Where credentials come from.
    pub tokens: Arc<Tokens>,
    /// The way out.
    pub upstream: Upstream,
    /// Certificates for intercepted hosts.
    pub leaves: Leaves,
}

/// A running forward proxy. Clones are the same proxy.
#[derive(Clone)]
pub struct Proxy(Arc<Shared>);

/// What every connection shares. Nothing here changes but the snapshot of the rules.
struct Shared {
    rules: ArcSwap<Rules>,
    tokens: Arc<Tokens>,
    upstream: Upstream,
    leaves: Leaves,
    replay: replay::Budget,
    /// Connections, tunnels and WebSockets.
    connections: Tasks,
    /// Asks connections to end after the exchange that they are in, and closes WebSockets.
    draining: CancellationToken,
    /// Ends what has not ended by itself.
    cut: CancellationToken,
}

impl Proxy {
    /// A proxy that serves nobody yet.
    pub fn new(parts: Parts) -> Self {
        let rules = parts.rules.with_kinds(parts.tokens.kinds());
        Self(Arc::new(Shared {
            rules: ArcSwap::from_pointee(rules),
            tokens: parts.tokens,
            upstream: parts.upstream,
            leaves: parts.leaves,
            replay: replay::Budget::default(),
            connections: Tasks::new(),
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        }))
    }

    /// Serves clients on a listener from now on until [`Proxy::shut_down`]. Several listeners may be
    /// served at once. On this one the users in `allow_uids` are let in besides our own.
    pub fn serve(&self, listener: TcpListener, allow_uids: Vec<u32>) {
        let (shared, uids) = (self.0.clone(), admit::Uids::new(allow_uids));
        if let Ok(own) = listener.local_addr() {
            shared.upstream.avoid(own);
        }
        self.0.connections.spawn(async move { shared.accept(listener, uids).await });
    }

    /// Ends serving: no new clients, WebSockets are closed (1001), exchanges may end until `deadline` from
    /// now, then all is cut.
    pub async fn shut_down(&self, deadline: Duration) {
        self.0.draining.cancel();
        if tokio::time::timeout(deadline, self.0.connections.finished()).await.is_err() {
            tracing::info!(left = self.0.connections.count(), "cutting connections");
        }
        self.0.cut.cancel();
        self.0.connections.finished().await;
    }
}

impl Shared {
    /// Accepts clients, and follows the kinds of login meanwhile, so that the rules in force are always
    /// those of the logins.
    async fn accept(self: Arc<Self>, listener: TcpListener, uids: admit::Uids) {
        let own = listener.local_addr().ok();
        let mut kinds = self.tokens.kind_changes();
        // One may have changed before anybody listened.
        self.follow_logins();
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = kinds.next() => self.follow_logins(),
                (stream, peer) = listener::accept(&listener) => {
                    let client = Client { peer, own };
                    let admission = uids.admit(client);
                    let serving = connection::serve(self.clone(), client, admission, stream);
                    self.connections.spawn(serving);
                }
            }
        }
    }

    fn follow_logins(&self) {
        let kinds = self.tokens.kinds();
        self.rules.rcu(|rules| rules.with_kinds(kinds.clone()));
    }
}

/// Who is at the other end of a connection, and at which of our addresses.
#[derive(Clone, Copy, Debug)]
struct Client {
    peer: SocketAddr,
    own: Option<SocketAddr>,
}
