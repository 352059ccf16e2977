//! One request inside an intercepted tunnel: rule, secret, injection, upstream, response.

use std::sync::Arc;

use futures_util::future::{Either, TryFutureExt as _};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tracing::Instrument as _;

use super::decoys::{self, Misplaced};
use super::intercept::Intercepted;
use super::note::{Count, Note};
use super::reject::Rejection;
use super::replay::{self, Replay};
use super::upgrade::Upgrade;
use super::{issuer, scrubbed};
use crate::credential::Credential;
use crate::fault;
use crate::headers::{VALETKEY_ERROR, strip_hop_by_hop, trim_values};
use crate::origin::Origin;
use crate::rules::{Action, Decision, Found, Rule, Rules, Unmatched};
use crate::scrub::Scrubber;
use crate::tokens::{TokenError, TokenSource, Tokens};
use crate::upstream::body::{Body, Inbound};
use crate::upstream::dial::Scope;

/// Answers one request: with the upstream's response, or with a refusal that explains itself.
pub(super) async fn exchange(
    connection: Arc<Intercepted>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let is_http1 = request.version() < Version::HTTP_2;
    let is_head = request.method() == Method::HEAD;
    let asks_to_upgrade =
        request.headers().contains_key(UPGRADE) || request.method() == Method::CONNECT;
    let span = tracing::debug_span!("exchange", method = %request.method(), host = %connection.origin.target.host);
    let note = Note::of_exchange(&connection, &mut request);
    let outcome = answer(&connection, request, &note).instrument(span.clone()).await;
    let _entered = span.entered();
    if let Err(rejection) = &outcome {
        note.refused(rejection);
    }
    let response = match outcome {
        Ok(response) => {
            tracing::debug!(status = response.status().as_u16(), "answered");
            response
        }
        Err(rejection) => {
            // What came behind a handshake or a CONNECT that is refused is not for HTTP to read.
            let ends = asks_to_upgrade || rejection.ends_the_connection();
            let mut response = rejection.into_response();
            let headers = response.headers_mut();
            // RFC 9110 section 7.8 has `Connection` list `Upgrade`; HTTP/2 knows neither.
            let has_upgrade = headers.contains_key(UPGRADE);
            if !is_http1 {
                headers.remove(UPGRADE);
            } else if ends {
                let options = if has_upgrade { "close, upgrade" } else { "close" };
                headers.insert(CONNECTION, HeaderValue::from_static(options));
            }
            response
        }
    };
    // hyper's HTTP/2 server would send the body of a refusal, or what an upstream wrongly sends, after the
    // head, and the client would take that for a broken stream (RFC 9113 section 8.1.1).
    note.follow(if is_head { response.map(|_| Body::empty()) } else { response })
}

async fn answer(
    connection: &Arc<Intercepted>,
    mut request: Request<Incoming>,
    note: &Note,
) -> Result<Response<Body>, Rejection> {
    fault::point("exchange");
    if request.version() == Version::HTTP_2 {
        trim_values(request.headers_mut());
    }
    check_framing(&request)?;
    check_target(&request)?;
    connection.check_names(&request)?;
    connection.admitted.count(&connection.shared.clock)?;
    let mut upgrade = Upgrade::take(&mut request)?;
    if let Some(upgrade) = &mut upgrade {
        upgrade.noted_in(note.clone());
    }
    // The snapshot is held for the exchange, so that the rule cannot change under it.
    let now = connection.shared.now.load_full();
    connection.still_reaches(&now.rules)?;
    let found = now.rules.find(&connection.origin, request.method(), request.uri().path());
    let covering = match found {
        Found::Rule(rule) => Some(&**rule),
        Found::Unmatched(_) => None,
    };
    let holds_decoy = now.decoys.check(&request, covering)?;
    let rule = match found {
        Found::Rule(rule) => rule,
        Found::Unmatched(Unmatched::Forward) => {
            return Box::pin(forward(connection, request, upgrade)).await;
        }
        Found::Unmatched(Unmatched::Refuse) => {
            return Err(Rejection::Target("no rule allows this request on this host"));
        }
    };
    tracing::debug!(rule = rule.name, "ruled");
    note.ruled(rule);
    if !connection.admitted.may_use(&now.rules, rule) {
        return Err(Rejection::OutOfReach(
            "this pass is not for the rule that covers this request",
        ));
    }
    match &rule.action {
        // A server that reads methods in any case would show it as well.
        Action::Inject { .. } if request.method().as_str().eq_ignore_ascii_case("TRACE") => {
            Err(Rejection::Target("a TRACE would show the credential"))
        }
        Action::Inject { .. } => {
            let signed = Signed::new(connection, &now.tokens, (rule, holds_decoy))?;
            signed.send(request, upgrade).await
        }
        // Boxed here and above, because every exchange has room for each of its ways.
        Action::Issuer { uses } => Box::pin(issuer::answer(connection, &now, uses, request)).await,
        Action::Refuse => Err(Rejection::Target("a rule refuses this path")),
        Action::Tunnel => Box::pin(forward(connection, request, upgrade)).await,
    }
}

/// Sends a request on as it is: nothing of ours is in it.
pub(super) async fn forward(
    connection: &Arc<Intercepted>,
    request: Request<Incoming>,
    upgrade: Option<Upgrade>,
) -> Result<Response<Body>, Rejection> {
    let (mut head, body) = Head::of(connection, request);
    strip_hop_by_hop(&mut head.headers);
    let (body, replay) = replay::keep(body, &connection.shared.replay, replay::MOST_OTHER);
    let body = body.map_trailers(decoys::strip_trailers);
    let response = connection.send(head, body, upgrade.as_ref()).await?;
    replay.give_up();
    connection.finish(response, upgrade, None)
}

/// What of a request's head goes on: everything but its version and what hyper hangs on it.
#[derive(Clone)]
pub(super) struct Head {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
}

impl Head {
    /// Takes a request apart.
    pub(super) fn of(connection: &Intercepted, request: Request<Incoming>) -> (Self, Inbound) {
        let (mut parts, body) = request.into_parts();
        let count = parts.extensions.remove::<Count>().map(|count| count.0);
        let body = Inbound::new(body, parts.version).counted_in(count);
        let body = body.holding(connection.activity.part());
        (Self { method: parts.method, uri: parts.uri, headers: parts.headers }, body)
    }
}

/// A request that a rule signs in.
struct Signed<'a> {
    connection: &'a Arc<Intercepted>,
    rule: &'a Arc<Rule>,
    source: &'a Arc<TokenSource>,
    /// Whether the client stands behind a decoy, which speaks for the login's own account alone.
    holds_decoy: bool,
}

/// A request that was refused with a 401, and what it takes to send it once more.
struct Unauthorized {
    head: Head,
    replay: Replay,
    response: Response<Body>,
    scrubber: Option<Arc<Scrubber>>,
}

impl<'a> Signed<'a> {
    fn new(
        connection: &'a Arc<Intercepted>,
        tokens: &'a Tokens,
        (rule, holds_decoy): (&'a Arc<Rule>, bool),
    ) -> Result<Self, Rejection> {
        let source = rule.action.uses().and_then(|uses| tokens.source(&uses.credential));
        let source = source.ok_or(Rejection::Target("the rule's credential does not exist"))?;
        Ok(Self { connection, rule, source, holds_decoy })
    }

    async fn send(
        &self,
        request: Request<Incoming>,
        mut upgrade: Option<Upgrade>,
    ) -> Result<Response<Body>, Rejection> {
        let (mut head, body) = Head::of(self.connection, request);
        // Before injection, so that `Connection: authorization` cannot drop what we set.
        strip_hop_by_hop(&mut head.headers);
        if let (Some(upgrade), true) = (&mut upgrade, self.rule.websocket_fallback) {
            upgrade.falls_back();
        }
        self.watch(upgrade.as_mut());
        let credential = self.source.current().await?;
        // The login may have changed its kind a moment ago, before the rules have followed.
        let login = self.rule.action.uses().and_then(|uses| uses.login);
        if login.is_some_and(|login| login != credential.kind()) {
            return Err(Rejection::Target("the login has just changed its kind: send it again"));
        }
        if let Action::Inject { uses, injection } = &self.rule.action
            && self.holds_decoy
            && injection.contradicts(&head.headers, &credential)
        {
            return Err(Misplaced::Moved(uses.credential.clone()).into());
        }
        let scrubber = self.scrubber(&credential)?;
        let (body, replay) =
            replay::keep(body, &self.connection.shared.replay, replay::MOST_SIGNED);
        let kept = self.source.can_refresh().then(|| head.clone());
        let (head, body) = self.sign(head, body, &credential)?;
        let response = self.connection.send(head, body, upgrade.as_ref()).await?;
        match kept {
            Some(head) if response.status() == StatusCode::UNAUTHORIZED => {
                let refused = Unauthorized { head, replay, response, scrubber };
                // Boxed, as few come here.
                Box::pin(self.refused(&credential, refused, upgrade)).await
            }
            _ => {
                replay.give_up();
                self.connection.finish(response, upgrade, scrubber)
            }
        }
    }

    /// Goes on after a 401: with a newer value, once, where there is one and the body can be had again.
    async fn refused(
        &self,
        credential: &Credential,
        Unauthorized { head, replay, mut response, mut scrubber }: Unauthorized,
        mut upgrade: Option<Upgrade>,
    ) -> Result<Response<Body>, Rejection> {
        self.watch(upgrade.as_mut());
        let newer = match self.source.after_401(&self.rule.name, credential).await {
            Ok(newer) => newer,
            Err(error @ (TokenError::LoginRequired { .. } | TokenError::Forbidden { .. })) => {
                return Err(error.into());
            }
            // The token may be good elsewhere: the upstream's own word is the better answer.
            Err(_) => None,
        };
        if let Some(newer) = newer
            && let Some(body) = replay.again()
        {
            let both = |newer: Arc<Scrubber>| scrubber.map(|older| newer.and(&older).into());
            scrubber = self.scrubber(&newer)?.and_then(both);
            let (head, body) = self.sign(head, body, &newer)?;
            response = self.connection.send(head, body, upgrade.as_ref()).await?;
            if response.status() == StatusCode::UNAUTHORIZED {
                self.source.refused_again(&self.rule.name, &newer);
            }
        }
        self.connection.finish(response, upgrade, scrubber)
    }

    /// Knows the credential where the rule has answers scrubbed.
    fn scrubber(&self, credential: &Credential) -> Result<Option<Arc<Scrubber>>, Rejection> {
        Ok(self.rule.scrub.then(|| credential.scrubber()).transpose()?)
    }

    /// Has a WebSocket closed when the login of the next value is forbidden. Called before that value is
    /// asked for: in between it may be forbidden already, and the token a new one.
    fn watch(&self, upgrade: Option<&mut Upgrade>) {
        if let Some(upgrade) = upgrade {
            upgrade.ends_with(self.source.forbidden());
        }
    }

    /// Puts the credential into a request.
    fn sign(
        &self,
        mut head: Head,
        body: Body,
        credential: &Credential,
    ) -> Result<(Head, Body), Rejection> {
        let Action::Inject { injection, .. } = &self.rule.action else {
            return Err(Rejection::Target("the rule injects nothing"));
        };
        injection.apply(&mut head.headers, credential)?;
        if self.rule.scrub {
            scrubbed::ask(&mut head.headers);
        }
        let rule = self.rule.clone();
        let body = body.map_trailers(move |trailers| {
            if let Action::Inject { injection, .. } = &rule.action {
                injection.strip(trailers);
            }
            decoys::strip_trailers(trailers);
        });
        Ok((head, body))
    }
}

impl Intercepted {
    /// The last step of every request. No async function, which would have room for the request twice.
    pub(super) fn send<'a>(
        &'a self,
        mut head: Head,
        body: Body,
        upgrade: Option<&'a Upgrade>,
    ) -> impl Future<Output = Result<Response<Body>, Rejection>> + 'a {
        if let Some(upgrade) = upgrade {
            upgrade.dress(&mut head.headers);
        }
        let mut request = Request::new(body);
        *request.method_mut() = head.method;
        *request.uri_mut() = head.uri;
        *request.headers_mut() = head.headers;
        let upstream = &self.shared.upstream;
        match upgrade {
            // Boxed, as what no warm request takes.
            Some(upgrade) => Either::Left(Box::pin(async move {
                let answered = upstream.upgrade(&self.origin, request).await;
                answered.map_err(|error| upgrade.unanswered(error))
            })),
            None => Either::Right(upstream.send(&self.origin, request).map_err(Rejection::from)),
        }
    }

    fn finish(
        &self,
        mut response: Response<Body>,
        upgrade: Option<Upgrade>,
        scrubber: Option<Arc<Scrubber>>,
    ) -> Result<Response<Body>, Rejection> {
        // What an upstream says of itself must not look like a refusal of ours.
        response.headers_mut().remove(VALETKEY_ERROR);
        if let Some(scrubber) = &scrubber {
            response = scrubbed::answer(response, scrubber)?;
        }
        if let Some(mut upgrade) = upgrade {
            upgrade.scrubber = scrubber;
            return upgrade.answer(&self.shared, &self.admitted, response);
        }
        strip_hop_by_hop(response.headers_mut());
        Ok(response)
    }

    /// The rules may be others than when the tunnel opened. One that is as if tunnelled since was dialled in no scope.
    fn still_reaches(&self, rules: &Rules) -> Result<(), Rejection> {
        match self.admitted.decide(rules, &self.origin.target)? {
            (Decision::Refuse, _) => Err(Rejection::Target("no rule allows this host")),
            (_, Scope::Anywhere) => Ok(()),
            (_, Scope::Public) => {
                Err(Rejection::OutOfReach("this pass has no rule for this host any more"))
            }
        }
    }

    /// The origin was fixed when the tunnel opened; a greeting or a request that names another one is
    /// misdirected (RFC 9110 section 7.4).
    fn check_names(&self, request: &Request<Incoming>) -> Result<(), Rejection> {
        if self.greeted_another {
            return Err(Rejection::WrongOrigin(self.origin.to_string()));
        }
        check_host(request, &self.origin)
    }
}

/// Every name that a request gives its host must be the origin's: `Host`, and the authority in its URI
/// (absolute form, or `:authority`). One of them there must be, and `Host` at most once.
pub(super) fn check_host(request: &Request<Incoming>, origin: &Origin) -> Result<(), Rejection> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let (host, another) = (hosts.next(), hosts.next());
    if another.is_some() {
        return Err(Rejection::BadRequest("the request has two Host fields".into()));
    }
    let authority = request.uri().authority().map(|authority| authority.as_str());
    if host.is_none() && (authority.is_none() || request.version() < Version::HTTP_2) {
        return Err(Rejection::BadRequest("the request has no Host field".into()));
    }
    let named = |authority: &str| origin.is_named_by(authority);
    let host_agrees = host.is_none_or(|host| host.to_str().is_ok_and(named));
    let scheme = request.uri().scheme_str();
    let scheme_agrees = scheme.is_none_or(|scheme| scheme == origin.scheme.as_str());
    if host_agrees && scheme_agrees && authority.is_none_or(named) {
        return Ok(());
    }
    Err(Rejection::WrongOrigin(origin.to_string()))
}

/// Refuses what hyper lets pass and another parser might read differently: any transfer coding but exactly `chunked`
/// (RFC 9112 section 6.1), any length but one number (RFC 9110 section 8.6), a name that is no token (section 5.1).
pub(super) fn check_framing(request: &Request<Incoming>) -> Result<(), Rejection> {
    let headers = request.headers();
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if !codings.next().is_none_or(is_chunked) || codings.next().is_some() {
        return Err(Rejection::BadRequest("the only transfer coding is one `chunked`".into()));
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter().map(HeaderValue::as_bytes);
    let is_number = |length: &[u8]| !length.is_empty() && length.iter().all(u8::is_ascii_digit);
    if !lengths.next().is_none_or(is_number) || lengths.next().is_some() {
        return Err(Rejection::BadRequest("a length is one number".into()));
    }
    // The one octet that `http` takes and a token has not.
    if headers.keys().any(|name| name.as_str().contains('"')) {
        return Err(Rejection::BadRequest("the name of a field has a quote in it".into()));
    }
    Ok(())
}

/// Refuses the forms that only a CONNECT (a host alone) and an OPTIONS (`*`) have (RFC 9112 section 3.2): hyper reads
/// no path in them, and what goes on would be another request.
pub(super) fn check_target(request: &Request<Incoming>) -> Result<(), Rejection> {
    let path = request.uri().path();
    let is_fit = match *request.method() {
        Method::CONNECT => true,
        Method::OPTIONS => path == "*" || path.starts_with('/'),
        _ => path.starts_with('/'),
    };
    if is_fit { Ok(()) } else { Err(Rejection::BadRequest("the request names no path".into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_is_small() {
        fn size<A, F>(_: impl FnOnce(A) -> F) -> usize {
            size_of::<F>()
        }
        // It is moved when it is boxed, for every request: what is rare is boxed by itself.
        let exchange = size(|(connection, request)| exchange(connection, request));
        assert!(exchange <= 5 * 1024, "{exchange} bytes");
    }
}
