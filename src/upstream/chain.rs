//! The chain: our own upstream proxy, and the tunnel through it.

use std::fmt;

use http::header::{HOST, PROXY_AUTHORIZATION};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::body::Body;
use super::{BadChain, Stage, UpstreamError};
use crate::origin::{Host, Target};
use crate::tasks::Tasks;

/// Which proxy, if any, stands between us and a target.
#[derive(Debug, Default)]
pub struct Chain(Option<Matcher>);

impl Chain {
    /// No proxy for any target.
    pub fn none() -> Self {
        Self::default()
    }

    /// One proxy for every target but those of `no_proxy` (comma-separated: names with everything
    /// below them, addresses, CIDR ranges, `*`). User information in the URL is percent-decoded.
    ///
    /// # Errors
    ///
    /// [`BadChain`] for a URL that is none of ours; it never quotes the URL, which may hold a password.
    pub fn via(url: &str, no_proxy: &str) -> Result<Self, BadChain> {
        let matcher = Matcher::builder().all(url.to_owned()).no(no_proxy.to_owned()).build();
        // The matcher ignores what it cannot read; a company's proxy must not be ignored silently.
        let unruled = Matcher::builder().all(url.to_owned()).build();
        let probe = Uri::from_static("https://valetkey.invalid");
        Hop::new(&unruled.intercept(&probe).ok_or(BadChain::Scheme)?)?;
        Ok(Self(Some(matcher)))
    }

    /// The proxy to go through for a target.
    pub(super) fn hop(&self, target: &Target) -> Option<Hop> {
        // Addresses match without brackets and ports play no part.
        let uri = Uri::builder()
            .scheme("https")
            .authority(target.to_string())
            .path_and_query("/")
            .build()
            .ok()?;
        Hop::new(&self.0.as_ref()?.intercept(&uri)?).ok()
    }
}

/// One proxy to go through.
pub(super) struct Hop {
    pub(super) proxy: Target,
    pub(super) scheme: HopScheme,
    /// `Proxy-Authorization`, ready to send.
    basic: Option<HeaderValue>,
    /// User and password for SOCKS.
    pub(super) raw: Option<(String, String)>,
}

/// How a proxy is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HopScheme {
    Http,
    Https,
    /// `remote_dns` is the `h` of `socks5h`: the proxy resolves names.
    Socks5 {
        remote_dns: bool,
    },
}

impl Hop {
    fn new(intercept: &Intercept) -> Result<Self, BadChain> {
        let uri = intercept.uri();
        let (scheme, default_port) = match uri.scheme_str() {
            Some("http") => (HopScheme::Http, 80),
            Some("https") => (HopScheme::Https, 443),
            Some("socks5") => (HopScheme::Socks5 { remote_dns: false }, 1080),
            Some("socks5h") => (HopScheme::Socks5 { remote_dns: true }, 1080),
            _ => return Err(BadChain::Scheme),
        };
        let host = Host::parse(uri.host().unwrap_or_default())?;
        let proxy = Target { host, port: uri.port_u16().unwrap_or(default_port) };
        let raw = intercept.raw_auth().map(|(user, password)| (user.into(), password.into()));
        Ok(Self { proxy, scheme, basic: intercept.basic_auth().cloned(), raw })
    }

    /// Asks the proxy at the other end of `stream` for a tunnel. Any 2xx opens it, and bytes that
    /// follow the head are kept.
    pub(super) async fn open_tunnel<S>(
        &self,
        stream: S,
        target: &Target,
        tasks: &Tasks,
    ) -> Result<(S, bytes::Bytes), UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let garbage = |error| UpstreamError::new(Stage::ChainGarbage, &self.proxy).because(error);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(garbage)?;
        tasks.spawn(connection.with_upgrades());
        let response = sender.send_request(self.connect_request(target)?).await.map_err(garbage)?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                return Err(UpstreamError::new(Stage::ChainAuth, &self.proxy));
            }
            status => return Err(UpstreamError::new(Stage::ChainRefused(status), &self.proxy)),
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(garbage)?;
        let parts = upgraded
            .downcast::<TokioIo<S>>()
            .map_err(|_| UpstreamError::new(Stage::ChainGarbage, &self.proxy))?;
        Ok((parts.io.into_inner(), parts.read_buf))
    }

    fn connect_request(&self, target: &Target) -> Result<Request<Body>, UpstreamError> {
        let authority = target.to_string();
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(authority.as_str())
            .header(HOST, authority.as_str());
        if let Some(basic) = &self.basic {
            request = request.header(PROXY_AUTHORIZATION, basic);
        }
        request
            .body(Body::empty())
            .map_err(|error| UpstreamError::new(Stage::ChainGarbage, &self.proxy).because(error))
    }
}

impl fmt::Debug for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hop").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(url: &str, no_proxy: &str, target: &str) -> Option<String> {
        let chain = Chain::via(url, no_proxy).unwrap();
        let hop = chain.hop(&Target::parse(target).unwrap())?;
        Some(format!("{:?} {}", hop.scheme, hop.proxy))
    }

    #[test]
    fn which_targets_go_through() {
        let url = "http://proxy.example:3128";
        let table = [
            ("", "a.example:443", true),
            ("a.example", "a.example:443", false),
            ("a.example", "b.a.example:443", false),
            (".a.example", "b.a.example:443", false),
            ("a.example", "xa.example:443", true),
            ("10.0.0.0/8, localhost", "10.1.2.3:443", false),
            ("::1", "[::1]:443", false),
            ("*", "a.example:443", false),
        ];
        for (no_proxy, target, through) in table {
            assert_eq!(hop(url, no_proxy, target).is_some(), through, "{no_proxy} {target}");
        }
    }

    #[test]
    fn schemes() {
        let table = [
            ("proxy.example:3128", Some("Http proxy.example:3128")),
            ("http://proxy.example", Some("Http proxy.example:80")),
            ("https://proxy.example", Some("Https proxy.example:443")),
            ("socks5h://proxy.example", Some("Socks5 { remote_dns: true } proxy.example:1080")),
            ("ftp://proxy.example", None),
            ("http://", None),
        ];
        for (url, expected) in table {
            let got = Chain::via(url, "").ok().map(|_| hop(url, "", "a.example:443").unwrap());
            assert_eq!(got.as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn a_password_is_decoded_and_never_shown() {
        let chain = Chain::via("http://user:p%40ss@proxy.example:3128", "").unwrap();
        let hop = chain.hop(&Target::parse("a.example:443").unwrap()).unwrap();
        assert_eq!(hop.basic.as_ref().unwrap(), "Basic dXNlcjpwQHNz");
        assert!(!format!("{chain:?}{hop:?}").contains("p@ss"));
        assert!(!format!("{chain:?}{hop:?}").contains("p%40ss"));
    }
}
