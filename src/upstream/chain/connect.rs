//! Asks an HTTP proxy for a tunnel (RFC 9110 section 9.3.6).

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{HOST, HeaderMap, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use zeroize::Zeroizing;

use super::Hop;
use super::auth::Refused;
use crate::headers::VALETKEY_VIA;
use crate::limits::INTERIM_RESPONSES;
use crate::origin::Target;
use crate::quote::quoted;
use crate::upstream::body::{Body, BodyError};
use crate::upstream::dial::Leg;
use crate::upstream::interim::{self, MostInterim, Unanswered};
use crate::upstream::{Stage, UpstreamError};

/// What has been said to the proxy about who we are. Outlives a connection that the proxy closes in between.
pub(in crate::upstream) struct Conversation {
    authorization: Option<HeaderValue>,
    rounds: u32,
    /// Who of us has passed this on.
    via: String,
}

/// What came of asking.
pub(in crate::upstream) enum Opened {
    /// The tunnel, and the bytes that followed the head.
    Tunnel(Leg, Bytes),
    /// There is something else to say, and the proxy has closed the connection.
    AskAgain,
}

impl Conversation {
    /// What is said before the proxy has asked for anything.
    pub(in crate::upstream) async fn begin(hop: &Hop, via: String) -> Result<Self, UpstreamError> {
        let authorization =
            hop.auth.authorization(None).await.map_err(|error| hop.no_login(error))?;
        Ok(Self { authorization, rounds: 0, via })
    }

    /// Finds something else to say after a 407.
    async fn go_on(&mut self, hop: &Hop, headers: &HeaderMap) -> Result<(), UpstreamError> {
        let challenges = challenges(headers);
        let refused = Refused { shown: self.authorization.as_ref(), challenges: &challenges };
        let next = match self.rounds {
            MOST_ROUNDS.. => None,
            _ => hop.auth.authorization(Some(refused)).await.map_err(|it| hop.no_login(it))?,
        };
        let Some(next) = next else {
            let was_shown = self.authorization.is_some();
            let asks = shown(&challenges, self.authorization.as_ref());
            return Err(UpstreamError::new(Stage::ChainAuth { asks, was_shown }, &hop.proxy));
        };
        self.authorization = Some(next);
        self.rounds += 1;
        Ok(())
    }
}

/// Asks the proxy at the other end of `leg` for a tunnel. Any 2xx opens it, and bytes that follow the
/// head are kept.
pub(in crate::upstream) async fn open_tunnel(
    leg: Leg,
    (hop, target): (&Hop, &Target),
    said: &mut Conversation,
) -> Result<Opened, UpstreamError> {
    let garbage = |error| UpstreamError::new(Stage::ChainGarbage, &hop.proxy).because(error);
    let mut asking = Asking::on(leg).await.map_err(|error| garbage(BodyError::from(error)))?;
    loop {
        let request = request(hop, target, said)?;
        let Some(response) = asking.send(request).await else {
            return Err(UpstreamError::new(Stage::ChainGarbage, &hop.proxy));
        };
        let response = response.map_err(|failed| garbage(failed.error))?;
        match response.status() {
            status if status.is_success() => {
                let parts = asking.connection.into_parts();
                return Ok(Opened::Tunnel(parts.io.into_inner(), parts.read_buf));
            }
            // Tinyproxy says 401 to a login that it does not take, which to a CONNECT can mean nothing else.
            StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
                said.go_on(hop, response.headers()).await?;
                if !asking.is_used_again(response.into_body()).await {
                    return Ok(Opened::AskAgain);
                }
            }
            status => {
                let refused = Stage::ChainRefused(status.to_string());
                return Err(UpstreamError::new(refused, &hop.proxy));
            }
        }
    }
}

/// A connection to a proxy that is asked. It moves only while somebody waits for an answer, and so nothing
/// that follows one is read as HTTP; hyper by itself would do so behind a 204, which may open a tunnel too.
struct Asking {
    sender: SendRequest<Body>,
    connection: Connection<TokioIo<Leg>, Body>,
    is_over: bool,
}

impl Asking {
    async fn on(leg: Leg) -> hyper::Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(leg)).await?;
        Ok(Self { sender, connection, is_over: false })
    }

    async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Option<Result<Response<Incoming>, Unanswered>> {
        let answer = interim::send(&mut self.sender, request, MostInterim(INTERIM_RESPONSES));
        along(&mut self.connection, &mut self.is_over, answer).await
    }

    /// Whether it takes one more request, once the page that came with a 407 is read.
    async fn is_used_again(&mut self, page: Incoming) -> bool {
        let ready = async {
            let page = Limited::new(page, LONGEST_PAGE).collect().await;
            page.is_ok() && self.sender.ready().await.is_ok()
        };
        along(&mut self.connection, &mut self.is_over, ready).await == Some(true)
    }
}

/// Moves a connection on until something has come of it; `None` when it is over before.
async fn along<T>(
    connection: &mut Connection<TokioIo<Leg>, Body>,
    is_over: &mut bool,
    what: impl Future<Output = T>,
) -> Option<T> {
    let mut what = pin!(what);
    poll_fn(|cx| {
        // Why it has ended is told to whoever waits.
        *is_over = *is_over || connection.poll_without_shutdown(cx).is_ready();
        match what.as_mut().poll(cx) {
            Poll::Pending if *is_over => Poll::Ready(None),
            polled => polled.map(Some),
        }
    })
    .await
}

fn request(
    hop: &Hop,
    target: &Target,
    said: &Conversation,
) -> Result<Request<Body>, UpstreamError> {
    let authority = target.to_string();
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority.as_str())
        .header(HOST, authority.as_str())
        .header(VALETKEY_VIA, &said.via);
    if let Some(authorization) = &said.authorization {
        request = request.header(PROXY_AUTHORIZATION, authorization);
    }
    request
        .body(Body::empty())
        .map_err(|error| UpstreamError::new(Stage::ChainGarbage, &hop.proxy).because(error))
}

fn challenges(headers: &HeaderMap) -> Vec<String> {
    let proxys = headers.get_all(PROXY_AUTHENTICATE).iter();
    let values = proxys.chain(headers.get_all(WWW_AUTHENTICATE));
    values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
}

/// Challenges as people may see them: each scheme, and the realm where there is one and nothing of the login
/// that was `sent` is in it.
fn shown(challenges: &[String], sent: Option<&HeaderValue>) -> String {
    let parts = sent.map(secret_parts).unwrap_or_default();
    let tells = |text: &str| parts.iter().any(|part| text.contains(part.as_str()));
    let of_one = |challenge: &String| {
        let scheme = challenge.split_whitespace().next().unwrap_or_default();
        let realm = challenge.split_once("realm=\"").and_then(|(_, rest)| rest.split('"').next());
        let realm = realm.map(|realm| format!(" realm=\"{realm}\"")).unwrap_or_default();
        let [scheme, realm] = [scheme, &realm].map(|it| if tells(it) { "…" } else { it });
        quoted(&format!("{scheme}{realm}"), LONGEST_SHOWN)
    };
    let mut all: Vec<String> = challenges.iter().take(MOST_SHOWN).map(of_one).collect();
    if challenges.len() > MOST_SHOWN {
        all.push("others".to_owned());
    }
    if all.is_empty() { "a login of no kind".to_owned() } else { all.join(" or ") }
}

/// What of a login may stand in no message: the token, and for `Basic` the password in it. One of a few
/// characters is no secret, and in every other word.
fn secret_parts(sent: &HeaderValue) -> Vec<Zeroizing<String>> {
    let Some((_, token)) = sent.to_str().ok().and_then(|sent| sent.split_once(' ')) else {
        return Vec::new();
    };
    // An echo may leave the padding out.
    let mut parts = vec![Zeroizing::new(token.trim_end_matches('=').to_owned())];
    let login = BASE64_STANDARD.decode(token).map(Zeroizing::new).unwrap_or_default();
    if let Some((_, password)) = str::from_utf8(&login).ok().and_then(|it| it.split_once(':')) {
        parts.push(Zeroizing::new(password.to_owned()));
        let again = Zeroizing::new(BASE64_STANDARD.encode(password));
        parts.push(Zeroizing::new(again.trim_end_matches('=').to_owned()));
    }
    parts.retain(|part| part.len() >= 4);
    parts
}

/// How often something else is said after a 407: Negotiate takes two rounds (RFC 4559 section 6), and one
/// more is for a login that has just changed.
const MOST_ROUNDS: u32 = 3;

/// Longest page of a 407 that is read for the sake of the connection; Squid's have about 4 KiB.
const LONGEST_PAGE: usize = 64 * 1024;

/// Characters of a challenge that are shown, and how many challenges: there are no more schemes than that in use.
const LONGEST_SHOWN: usize = 80;
const MOST_SHOWN: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_shown_without_tokens() {
        let table: [(&[&str], &str); 9] = [
            (&["Basic realm=\"Corp proxy\""], "Basic realm=\"Corp proxy\""),
            (&["Negotiate YIIsecret", "NTLM"], "Negotiate or NTLM"),
            (&[], "a login of no kind"),
            (&["Digest qop=\"auth\", realm=\"a\u{7}b\""], "Digest realm=\"a\u{fffd}b\""),
            (&["Basic realm=\"you said Basic dXNlcjpwQHNzd29yZA==\""], "Basic…"),
            (&["Basic realm=\"user, p@ssword\"", "dXNlcjpwQHNzd29yZA=="], "Basic… or …"),
            (
                &["Basic realm=\"dXNlcjpwQHNzd29yZA\"", "Basic realm=\"cEBzc3dvcmQ=\""],
                "Basic… or Basic…",
            ),
            (&["Basic realm=\"user\""], "Basic realm=\"user\""),
            (&["A", "B", "C", "D", "E", "F", "G"], "A or B or C or D or E or F or others"),
        ];
        let sent = HeaderValue::from_static("Basic dXNlcjpwQHNzd29yZA==");
        for (challenges, expected) in table {
            let challenges: Vec<String> = challenges.iter().map(|it| (*it).to_owned()).collect();
            assert_eq!(shown(&challenges, Some(&sent)), expected);
        }
        let short = HeaderValue::from_static("Basic dTpiYQ==");
        assert_eq!(shown(&["Basic realm=\"bar\"".to_owned()], Some(&short)), "Basic realm=\"bar\"");
    }
}
