//! The data path: accepts clients, and gives each connection the road that the rules decide.

mod admit;
mod connection;
mod decoys;
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

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::access::Passes;
use crate::clock::Clock;
use crate::rules::Rules;
use crate::tasks::Tasks;
use crate::tls::leaf::Leaves;
use crate::tokens::Tokens;
use crate::upstream::Upstream;
pub use admit::Door;
use decoys::Decoys;
pub use listener::Socket;

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
    /// Who is let in beside the users that a listener knows.
    pub passes: Arc<Passes>,
    /// Has the passes be what they are in their place; asked before somebody is let in by one.
    pub look: Look,
    /// Tells how long a pass counts.
    pub clock: Clock,
}

/// Looks at a place, and puts what is found there in force.
pub type Look = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// A running forward proxy. Clones are the same proxy.
#[derive(Clone)]
pub struct Proxy(Arc<Shared>);

/// What every connection shares. Nothing here changes but the snapshot of what is in force.
struct Shared {
    now: ArcSwap<Now>,
    /// Moves when another configuration is in force.
    changes: watch::Sender<u64>,
    upstream: Upstream,
    passes: Arc<Passes>,
    look: Look,
    clock: Clock,
    replay: replay::Budget,
    /// Connections, tunnels and WebSockets.
    connections: Tasks,
    /// Asks connections to end after the exchange that they are in, and closes WebSockets.
    draining: CancellationToken,
    /// Ends what has not ended by itself.
    cut: CancellationToken,
}

/// What is in force at one moment; an exchange goes by one of these to its end.
struct Now {
    /// Those of the configuration, with the kinds of login filled in.
    rules: Rules,
    tokens: Arc<Tokens>,
    decoys: Decoys,
    leaves: Arc<Leaves>,
}

impl Proxy {
    /// A proxy that serves nobody yet.
    pub fn new(parts: Parts) -> Self {
        let now = Now::new(parts.rules, parts.tokens, Arc::new(parts.leaves));
        Self(Arc::new(Shared {
            now: ArcSwap::from_pointee(now),
            changes: watch::Sender::new(0),
            upstream: parts.upstream,
            passes: parts.passes,
            look: parts.look,
            clock: parts.clock,
            replay: replay::Budget::default(),
            connections: Tasks::new(),
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        }))
    }

    /// Goes by these rules and credentials from now on, and by these leaves where there are others. Nobody is cut
    /// off: an exchange that has begun ends by what was in force, a tunnel stays what it is.
    pub fn replace(&self, rules: Rules, tokens: Arc<Tokens>, leaves: Option<Leaves>) {
        let leaves = leaves.map_or_else(|| self.0.now.load().leaves.clone(), Arc::new);
        self.0.now.store(Arc::new(Now::new(rules, tokens, leaves)));
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Serves clients on a listener from now on until [`Proxy::shut_down`], or until the entrance is closed. Several
    /// listeners may be served at once.
    pub fn serve(&self, socket: Socket, door: Door) -> Entrance {
        if let Some(own) = socket.address() {
            self.0.upstream.avoid(own);
        }
        let entrance = Entrance {
            door: Arc::new(ArcSwap::from_pointee(door)),
            closed: self.0.draining.child_token(),
        };
        self.0.connections.spawn(self.0.clone().accept(socket, entrance.clone()));
        entrance
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

/// A listener that is served. Dropping it changes nothing.
#[derive(Clone, Debug)]
pub struct Entrance {
    door: Arc<ArcSwap<Door>>,
    closed: CancellationToken,
}

impl Entrance {
    /// Lets in whom this says, from the next connection on.
    pub fn change(&self, door: Door) {
        self.door.store(Arc::new(door));
    }

    /// Ends listening; who is in stays in.
    pub fn close(&self) {
        self.closed.cancel();
    }
}

impl Now {
    fn new(rules: Rules, tokens: Arc<Tokens>, leaves: Arc<Leaves>) -> Self {
        let (rules, decoys) = (rules.with_kinds(tokens.kinds()), Decoys::of(&tokens));
        Self { rules, tokens, decoys, leaves }
    }
}

impl Shared {
    /// Accepts clients, and follows the kinds of login meanwhile, so that the rules in force are always
    /// those of the logins.
    async fn accept(self: Arc<Self>, socket: Socket, entrance: Entrance) {
        let mut changes = self.changes.subscribe();
        let mut kinds = self.now.load().tokens.kind_changes();
        // One may have changed before anybody listened.
        self.follow_logins();
        loop {
            tokio::select! {
                () = entrance.closed.cancelled() => {
                    // Before the socket is closed: another program may have the address next.
                    if let Some(own) = socket.address() {
                        self.upstream.no_longer_avoid(own);
                    }
                    return;
                }
                Ok(()) = changes.changed() => {
                    kinds = self.now.load().tokens.kind_changes();
                    self.follow_logins();
                }
                () = kinds.next() => self.follow_logins(),
                (stream, client) = socket.accept() => {
                    let door = entrance.door.load_full();
                    let serving = connection::serve(self.clone(), door, client, stream);
                    self.connections.spawn(serving);
                }
            }
        }
    }

    fn follow_logins(&self) {
        self.now.rcu(|now| {
            let (tokens, leaves) = (now.tokens.clone(), now.leaves.clone());
            Now::new(now.rules.clone(), tokens, leaves)
        });
    }
}
