//! The data path: accepts clients, and gives each connection the road that the rules decide.

mod admit;
mod bare;
mod closing;
mod connection;
mod decoys;
mod exchange;
mod explained;
mod flow;
mod frames;
mod guesses;
mod intercept;
mod issuer;
mod listener;
mod note;
mod places;
mod reject;
mod replay;
mod resting;
mod scrubbed;
mod ticket;
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
use crate::audit::Audit;
use crate::clock::Clock;
use crate::fault;
use crate::limits::Limits;
use crate::rules::Rules;
use crate::tasks::Tasks;
use crate::tls::leaf::Leaves;
use crate::tokens::Tokens;
use crate::upstream::Upstream;
pub use admit::Door;
use closing::Closing;
use decoys::Decoys;
use guesses::Guesses;
pub use listener::Socket;
use places::{Place, Places, Strangers};

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
    /// What clients may take.
    pub limits: Limits,
    /// Where it is written down who asked for what.
    pub audit: Audit,
}

/// Looks at a place, and puts what is found there in force.
pub type Look = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// A running forward proxy. Clones are the same proxy.
#[derive(Clone)]
pub struct Proxy(Arc<Shared>);

/// How long somebody waits for a place before a stranger gives its own up: a holder of a pass has shown it by then, and
/// nobody gives up for that.
const PATIENCE_WITH_STRANGERS: Duration = Duration::from_secs(1);

/// What every connection shares. Nothing here changes but the snapshot of what is in force.
struct Shared {
    now: ArcSwap<Now>,
    /// Moves when another configuration is in force.
    changes: watch::Sender<u64>,
    upstream: Upstream,
    passes: Arc<Passes>,
    look: Look,
    clock: Clock,
    limits: ArcSwap<Limits>,
    places: Arc<Places>,
    strangers: Arc<Strangers>,
    guesses: Guesses,
    audit: Audit,
    replay: replay::Budget,
    /// For bulk in tunnels.
    pipes: Arc<tunnel::Pipes>,
    /// Connections, tunnels and WebSockets.
    connections: Tasks,
    closing: Closing,
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
        parts.upstream.limit(&parts.limits);
        Self(Arc::new(Shared {
            pipes: Arc::new(tunnel::Pipes::new(parts.limits.pipes())),
            now: ArcSwap::from_pointee(now),
            changes: watch::Sender::new(0),
            upstream: parts.upstream,
            passes: parts.passes,
            look: parts.look,
            clock: parts.clock,
            limits: ArcSwap::from_pointee(parts.limits),
            places: Arc::default(),
            strangers: Arc::default(),
            guesses: Guesses::default(),
            audit: parts.audit,
            replay: replay::Budget::default(),
            connections: Tasks::new(),
            closing: Closing::default(),
        }))
    }

    /// Goes by these rules and credentials from now on, and by these leaves where there are others. Nobody is cut
    /// off: an exchange that has begun ends by what was in force, a tunnel stays what it is.
    pub fn replace(&self, rules: Rules, tokens: Arc<Tokens>, leaves: Option<Leaves>) {
        let leaves = leaves.map_or_else(|| self.0.now.load().leaves.clone(), Arc::new);
        self.0.now.store(Arc::new(Now::new(rules, tokens, leaves)));
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Holds clients to these limits, from the next connection on. Who is in stays in, be it more than there may be.
    pub fn limit(&self, limits: Limits) {
        self.0.upstream.limit(&limits);
        self.0.limits.store(Arc::new(limits));
        self.0.places.look_again();
    }

    /// Serves clients on a listener from now on until [`Proxy::shut_down`], or until the entrance is closed. Several
    /// listeners may be served at once.
    pub fn serve(&self, socket: Socket, door: Door) -> Entrance {
        if let Some(own) = socket.address() {
            self.0.upstream.avoid(own);
        }
        let entrance = Entrance {
            door: Arc::new(ArcSwap::from_pointee(door)),
            closed: self.0.closing.draining.child_token(),
        };
        let (shared, socket, kept) = (self.0.clone(), Arc::new(socket), entrance.clone());
        let accepting = move || shared.clone().accept(socket.clone(), kept.clone());
        self.0.connections.keep("accepting", accepting);
        entrance
    }

    /// Ends serving: no new clients, WebSockets are closed (1001), exchanges may end until `deadline` from
    /// now, then all is cut.
    pub async fn shut_down(&self, deadline: Duration) {
        self.0.closing.draining.cancel();
        if tokio::time::timeout(deadline, self.0.connections.finished()).await.is_err() {
            tracing::info!(left = self.0.connections.count(), "cutting connections");
        }
        self.0.closing.cut.cancel();
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
    async fn accept(self: Arc<Self>, socket: Arc<Socket>, entrance: Entrance) {
        let mut changes = self.changes.subscribe();
        let mut kinds = self.now.load().tokens.kind_changes();
        // One may have changed before anybody listened.
        self.follow_logins();
        // At most one has come for whom there is no place yet.
        let mut next = None;
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
                accepted = socket.accept(), if next.is_none() => next = Some(accepted),
                place = self.place(), if next.is_some() => {
                    if let Some((stream, client)) = next.take() {
                        fault::point("accepting");
                        let door = entrance.door.load_full();
                        let serving = connection::serve(self.clone(), door, (client, place), stream);
                        self.connections.spawn(serving);
                    }
                }
            }
        }
    }

    /// Waits until there is room for one more client: accepting pauses meanwhile, and clients wait in the system's queue.
    /// A stranger holds no place for long that somebody else waits for.
    async fn place(&self) -> Place {
        let most = || self.limits.load().connections;
        if let Some(place) = self.places.try_take(most()) {
            return place;
        }
        tracing::debug!(clients = most(), "as many clients as there may be: the next one waits");
        loop {
            match tokio::time::timeout(PATIENCE_WITH_STRANGERS, self.places.take(most)).await {
                Ok(place) => return place,
                Err(_late) => self.strangers.make_room(),
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
