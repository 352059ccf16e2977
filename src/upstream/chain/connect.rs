//! Asks an HTTP proxy for a tunnel (RFC 9110 section 9.3.6).

use bytes::Bytes;
use http::header::{HOST, HeaderMap, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Hop;
use super::auth::Refused;
use crate::origin::Target;
use crate::tasks::Tasks;
use crate::upstream::body::Body;
use crate::upstream::{Stage, UpstreamError};

/// What has been said to the proxy about who we are. Outlives a connection that the proxy closes in between.
#[derive(Default)]
pub(in crate::upstream) struct Conversation {
    authorization: Option<HeaderValue>,
    rounds: u32,
}

/// What came of asking.
pub(in crate::upstream) enum Opened<S> {
    /// The tunnel, and the bytes that followed the head.
    Tunnel(S, Bytes),
    /// There is something else to say, and the proxy has closed the connection.
    AskAgain,
}

impl Conversation {
    /// What is said before the proxy has asked for anything.
    pub(in crate::upstream) async fn begin(hop: &Hop) -> Result<Self, UpstreamError> {
        let authorization =
            hop.auth.authorization(None).await.map_err(|error| hop.no_login(error))?;
        Ok(Self { authorization, rounds: 0 })
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
            let asks = shown(&challenges);
            return Err(UpstreamError::new(Stage::ChainAuth { asks, was_shown }, &hop.proxy));
        };
        self.authorization = Some(next);
        self.rounds += 1;
        Ok(())
    }
}

/// Asks the proxy at the other end of `stream` for a tunnel. Any 2xx opens it, and bytes that follow the
/// head are kept.
pub(in crate::upstream) async fn open_tunnel<S>(
    stream: S,
    (hop, target): (&Hop, &Target),
    said: &mut Conversation,
    tasks: &Tasks,
) -> Result<Opened<S>, UpstreamError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let garbage = |error| UpstreamError::new(Stage::ChainGarbage, &hop.proxy).because(error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(garbage)?;
    tasks.spawn(connection.with_upgrades());
    loop {
        let request = request(hop, target, said.authorization.as_ref())?;
        let response = sender.send_request(request).await.map_err(garbage)?;
        match response.status() {
            status if status.is_success() => {
                let upgraded = hyper::upgrade::on(response).await.map_err(garbage)?;
                let parts = upgraded
                    .downcast::<TokioIo<S>>()
                    .map_err(|_| UpstreamError::new(Stage::ChainGarbage, &hop.proxy))?;
                return Ok(Opened::Tunnel(parts.io.into_inner(), parts.read_buf));
            }
            // Tinyproxy says 401 to a login that it does not take, which to a CONNECT can mean nothing else.
            StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
                said.go_on(hop, response.headers()).await?;
                if !is_used_again(&mut sender, response.into_body()).await {
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

/// Whether the connection takes one more request, once the page that came with a 407 is read.
async fn is_used_again(sender: &mut SendRequest<Body>, page: hyper::body::Incoming) -> bool {
    Limited::new(page, LONGEST_PAGE).collect().await.is_ok() && sender.ready().await.is_ok()
}

fn request(
    hop: &Hop,
    target: &Target,
    authorization: Option<&HeaderValue>,
) -> Result<Request<Body>, UpstreamError> {
    let authority = target.to_string();
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority.as_str())
        .header(HOST, authority.as_str());
    if let Some(authorization) = authorization {
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

/// Challenges as people may see them: each scheme, and the realm where there is one.
fn shown(challenges: &[String]) -> String {
    let of_one = |challenge: &String| {
        let scheme = challenge.split_whitespace().next().unwrap_or_default();
        let realm = challenge.split_once("realm=\"").and_then(|(_, rest)| rest.split('"').next());
        let realm = realm.map(|realm| format!(" realm=\"{realm}\"")).unwrap_or_default();
        let shown = format!("{scheme}{realm}");
        shown.chars().filter(|c| !c.is_control()).take(LONGEST_SHOWN).collect::<String>()
    };
    let all: Vec<String> = challenges.iter().map(of_one).collect();
    if all.is_empty() { "a login of no kind".to_owned() } else { all.join(" or ") }
}

/// How often something else is said after a 407: Negotiate takes two rounds (RFC 4559 section 6), and one
/// more is for a login that has just changed.
const MOST_ROUNDS: u32 = 3;

/// Longest page of a 407 that is read for the sake of the connection; Squid's have about 4 KiB.
const LONGEST_PAGE: usize = 64 * 1024;

/// Characters of a challenge that are shown.
const LONGEST_SHOWN: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_shown_without_tokens() {
        let table: [(&[&str], &str); 4] = [
            (&["Basic realm=\"Corp proxy\""], "Basic realm=\"Corp proxy\""),
            (&["Negotiate YIIsecret", "NTLM"], "Negotiate or NTLM"),
            (&[], "a login of no kind"),
            (&["Digest qop=\"auth\", realm=\"a\u{7}b\""], "Digest realm=\"ab\""),
        ];
        for (challenges, expected) in table {
            let challenges: Vec<String> = challenges.iter().map(|it| (*it).to_owned()).collect();
            assert_eq!(shown(&challenges), expected);
        }
    }
}
