//! Says who may use the proxy: the user whose socket it is, as the kernel has it, and who shows a pass.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{HeaderMap, PROXY_AUTHORIZATION};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::guesses::Caller;
use super::listener::Client;
use super::places::Waiting;
use super::reject::Rejection;
use super::{Place, Shared};
use crate::access::{Pass, Refused};
use crate::clock::Clock;
use crate::origin::{Host, Target};
use crate::peer;
use crate::rules::{Action, Decision, Rule, Rules};
use crate::secret::Secret;
use crate::upstream::dial::Scope;

/// Who is let in at a listener, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Door {
    /// Users let in without a pass, beside our own.
    pub allow_uids: Vec<u32>,
    /// Whether nobody is let in without a pass, our own user neither.
    pub require_pass: bool,
    /// Clients speak TLS to it, and get a certificate for this name if they greet none.
    pub tls: Option<Host>,
}

impl Door {
    /// Whether the client's end of the connection belongs to one of the users that are let in. A client whose
    /// owner the kernel does not tell is a stranger, and so is everybody from another machine.
    pub(super) fn admit(&self, client: Client) -> Admission {
        let uid = match client {
            Client::Unix { uid } => uid,
            Client::Tcp { peer, .. } if !peer.ip().to_canonical().is_loopback() => None,
            Client::Tcp { peer, own } => peer::uid_of(peer, own).unwrap_or_else(|error| {
                tracing::warn!(%error, "cannot read the kernel's socket table");
                None
            }),
        };
        match uid {
            Some(uid) if !self.require_pass && self.knows(uid) => Admission::User { uid },
            uid => Admission::Stranger { uid, is_enough: !self.require_pass },
        }
    }

    fn knows(&self, uid: u32) -> bool {
        uid == rustix::process::geteuid().as_raw() || self.allow_uids.contains(&uid)
    }
}

/// What the kernel says of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Somebody who needs a pass.
    Stranger {
        /// The user, where the kernel tells it.
        uid: Option<u32>,
        /// Whether at this listener it would be enough to be the right one.
        is_enough: bool,
    },
    /// One of the users that are let in.
    User {
        /// Which one.
        uid: u32,
    },
}

/// A client at the door, and its place behind it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) client: Client,
    admission: Admission,
    place: Arc<Place>,
    /// While it is a stranger who has shown no pass.
    waiting: Option<Waiting>,
}

impl Guest {
    pub(super) fn at(door: &Door, client: Client, place: Place, shared: &Shared) -> Self {
        let admission = door.admit(client);
        let is_stranger = matches!(admission, Admission::Stranger { .. });
        let waiting = is_stranger.then(|| shared.strangers.enter(shared.limits.load().strangers));
        Self { client, admission, place: Arc::new(place), waiting }
    }

    /// Cancelled when it has to make room for another stranger; never for a user.
    pub(super) fn given_up(&self) -> CancellationToken {
        self.waiting.as_ref().map(|waiting| waiting.given_up().clone()).unwrap_or_default()
    }

    /// Lets the client in, if it may come in with this request.
    ///
    /// # Errors
    ///
    /// [`Rejection::PassRequired`] for a stranger who shows no pass that counts, and [`Rejection::WrongPasses`] for one
    /// that has shown too many of those.
    pub(super) async fn admit(
        &self,
        headers: &HeaderMap,
        shared: &Shared,
    ) -> Result<Admitted, Rejection> {
        let (uid, pass) = match self.admission {
            Admission::User { uid } => (Some(uid), None),
            Admission::Stranger { uid, is_enough } => {
                let required =
                    |why| Rejection::PassRequired { uid: uid.filter(|_| is_enough), why };
                let shown = shown(headers).ok_or_else(|| required(None))?;
                let caller = Caller::of(self.client, uid);
                let pass = find(&shown, caller, shared).await?;
                (uid, Some(pass.map_err(|why| required(Some(why)))?))
            }
        };
        if let Some(waiting) = &self.waiting {
            waiting.end();
        }
        Ok(Admitted { pass, uid, _place: self.place.clone() })
    }

    /// The user, where the kernel tells it.
    pub(super) fn uid(&self) -> Option<u32> {
        match self.admission {
            Admission::User { uid } => Some(uid),
            Admission::Stranger { uid, .. } => uid,
        }
    }
}

/// The pass that a caller shows. For one that has shown many that do not count no file is looked at any more: what is
/// known without is enough for who has a pass, and costs nothing for who has none.
///
/// # Errors
///
/// [`Rejection::WrongPasses`].
async fn find(
    shown: &Secret,
    caller: Caller,
    shared: &Shared,
) -> Result<Result<Arc<Pass>, Refused>, Rejection> {
    let known = || shared.passes.find(shown, shared.clock.now());
    let most = shared.limits.load().wrong_passes;
    if shared.guesses.are_too_many(caller, most) && known().is_err() {
        return Err(Rejection::WrongPasses);
    }
    (shared.look)().await;
    let found = known();
    if found.is_err() {
        shared.guesses.add(caller);
    }
    Ok(found)
}

/// The pass that a client shows: the password of Basic (RFC 7617), with any user, or the token of Bearer (RFC 6750).
fn shown(headers: &HeaderMap) -> Option<Secret> {
    let (scheme, shown) =
        headers.get(PROXY_AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let shown = shown.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Secret::new(shown));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = Zeroizing::new(STANDARD.decode(shown).ok()?);
    let (_user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some(Secret::new(password))
}

/// A client that was let in.
#[derive(Clone, Debug)]
pub(super) struct Admitted {
    /// With this; `None` for a user, who may go anywhere: it could go there by itself.
    pass: Option<Arc<Pass>>,
    /// Its user, where the kernel tells it.
    uid: Option<u32>,
    /// As long as anything goes on for it.
    _place: Arc<Place>,
}

impl Admitted {
    /// Counts one request or tunnel.
    ///
    /// # Errors
    ///
    /// [`Rejection::PassRequired`] when the pass counts no more.
    pub(super) fn count(&self, clock: &Clock) -> Result<(), Rejection> {
        let Some(pass) = &self.pass else { return Ok(()) };
        pass.take(clock.now()).map_err(|why| Rejection::PassRequired { uid: None, why: Some(why) })
    }

    /// Its user, where the kernel tells it.
    pub(super) fn uid(&self) -> Option<u32> {
        self.uid
    }

    /// The pass that let it in, if one did.
    pub(super) fn pass(&self) -> Option<&Pass> {
        self.pass.as_deref()
    }

    /// Whether it was a pass that let it in.
    pub(super) fn is_by_pass(&self) -> bool {
        self.pass.is_some()
    }

    /// Cancelled when the pass counts no more; never for a user.
    pub(super) fn ended(&self) -> CancellationToken {
        self.pass.as_ref().map(|pass| pass.ended().clone()).unwrap_or_default()
    }

    /// What a client is told whose pass has ended meanwhile.
    pub(super) fn why_ended(&self, clock: &Clock) -> Refused {
        self.pass.as_ref().map_or(Refused::Unknown, |pass| pass.why_ended(clock.now()))
    }

    /// What is done with a target that this client asks for, and where a tunnel to it may lead.
    ///
    /// # Errors
    ///
    /// [`Rejection::OutOfReach`] for what the pass does not reach.
    pub(super) fn decide(
        &self,
        rules: &Rules,
        target: &Target,
    ) -> Result<(Decision, Scope), Rejection> {
        let decision = rules.decide(target);
        let is_own = |rule: &Arc<Rule>| self.may_use(rules, rule);
        if self.pass.is_none() || rules.on_host(target).any(is_own) {
            return Ok((decision, Scope::Anywhere));
        }
        match (decision, self.elsewhere()?) {
            (Decision::Refuse, scope) => Ok((Decision::Refuse, scope)),
            // What is not for this pass is not signed in.
            (_, scope) => Ok((Decision::Tunnel, scope)),
        }
    }

    /// Where this client may go beyond the hosts of its rules.
    ///
    /// # Errors
    ///
    /// [`Rejection::OutOfReach`] for nowhere.
    pub(super) fn elsewhere(&self) -> Result<Scope, Rejection> {
        match self.pass.as_ref().map(|pass| pass.reach()) {
            None => Ok(Scope::Anywhere),
            Some(reach) if !reach.tunnel => {
                Err(Rejection::OutOfReach("this pass reaches the hosts of its rules and no others"))
            }
            Some(reach) if reach.allow_private => Ok(Scope::Anywhere),
            Some(_) => Ok(Scope::Public),
        }
    }

    /// Whether a rule is for this client. With a rule that signs in comes the one that looks after its login's
    /// endpoints.
    pub(super) fn may_use(&self, rules: &Rules, rule: &Rule) -> bool {
        let Some(pass) = &self.pass else { return true };
        let reach = pass.reach();
        if reach.has_rule(&rule.name) {
            return true;
        }
        let Action::Issuer { uses } = &rule.action else { return false };
        rules.iter().any(|other| {
            let signs_in = other.action.uses().is_some_and(|it| it.credential == uses.credential);
            signs_in && reach.has_rule(&other.name)
        })
    }
}

/// Why a stranger is not let in, as people read it.
pub(super) fn describe(uid: Option<u32>, why: Option<Refused>) -> String {
    match (why, uid) {
        (Some(why), _) => why.to_string(),
        (None, Some(uid)) => {
            format!("only the user who runs valetkey needs no pass, and this is uid {uid}")
        }
        (None, None) => "a pass is needed to use this valetkey".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_pass_is_a_password_or_a_token() {
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let table = [
            (basic("any:vkp_1"), Some("vkp_1")),
            (basic(":vkp_1"), Some("vkp_1")),
            (basic("any:vkp:1"), Some("vkp:1")),
            (basic("vkp_1"), None),
            (basic("any:vkp_1").replace("Basic", "basic"), Some("vkp_1")),
            ("Bearer vkp_1".to_owned(), Some("vkp_1")),
            ("BEARER  vkp_1 ".to_owned(), Some("vkp_1")),
            ("Bearer".to_owned(), None),
            ("Basic !".to_owned(), None),
            ("Digest username=\"vkp_1\"".to_owned(), None),
            ("vkp_1".to_owned(), None),
            (String::new(), None),
        ];
        for (value, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert(PROXY_AUTHORIZATION, HeaderValue::from_str(&value).unwrap());
            let found = shown(&headers).map(|secret| secret.fingerprint());
            let expected = expected.map(|text| Secret::new(text).fingerprint());
            assert_eq!(found, expected, "{value}");
        }
        assert!(shown(&HeaderMap::new()).is_none());
    }

    #[expect(clippy::disallowed_methods, reason = "the test plays a client")]
    #[cfg(target_os = "linux")]
    #[test]
    fn a_real_connection_is_ours() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(bind) else { continue };
            let own = listener.local_addr().unwrap();
            let stream = std::net::TcpStream::connect(own).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, stream.local_addr().unwrap());
            let client = Client::Tcp { peer, own };
            let uid = rustix::process::geteuid().as_raw();
            assert_eq!(Door::default().admit(client), Admission::User { uid });
            let strict = Door { require_pass: true, ..Door::default() };
            let uid = Some(rustix::process::geteuid().as_raw());
            let expected = Admission::Stranger { uid, is_enough: false };
            assert_eq!(strict.admit(client), expected);
        }
    }

    #[test]
    fn who_is_let_in() {
        let own = rustix::process::geteuid().as_raw();
        let elsewhere =
            Client::Tcp { peer: ([192, 0, 2, 1], 4000).into(), own: ([192, 0, 2, 2], 8377).into() };
        let allowing = Door { allow_uids: vec![own + 1], ..Door::default() };
        let unix = |uid| Client::Unix { uid };
        for (door, client, is_let_in) in [
            (&Door::default(), unix(Some(own)), true),
            (&Door::default(), unix(Some(own + 1)), false),
            (&Door::default(), unix(None), false),
            (&Door::default(), elsewhere, false),
            (&allowing, unix(Some(own + 1)), true),
            (&allowing, unix(Some(own + 2)), false),
            (&allowing, elsewhere, false),
            (&Door { require_pass: true, ..allowing.clone() }, unix(Some(own + 1)), false),
        ] {
            let admission = door.admit(client);
            let is_user = matches!(admission, Admission::User { .. });
            assert_eq!(is_user, is_let_in, "{door:?} {client:?}");
        }
    }
}
