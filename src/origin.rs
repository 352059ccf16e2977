//! Names of places on the network, parsed and normalised once: host, target, origin.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

/// A host as it is compared everywhere: a lower-case DNS name without trailing dot, or an IP address.
///
/// Two spellings of one host are equal after parsing; no code later asks again "which host is this?".
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// An IP address; an IPv6 one is written in brackets.
    Ip(IpAddr),
    /// A DNS name in A-label form, at most 253 octets in labels of 1 to 63.
    Name(Arc<str>),
}

impl Host {
    /// Parses a host as it stands on the wire (RFC 3986 section 3.2.2): DNS name, IPv4, or IPv6 in
    /// brackets. Only ASCII is taken: names in other scripts arrive as A-labels.
    ///
    /// # Errors
    ///
    /// [`BadHost`] with the reason. Percent-encoding, user information, zone identifiers and numbers
    /// that some resolvers read as addresses (`127.1`, `0x7f.1`) are refused.
    pub fn parse(text: &str) -> Result<Self, BadHost> {
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(BadHost::Address)?;
            let address: Ipv6Addr = inner.parse().map_err(|_| BadHost::Address)?;
            return Ok(Self::Ip(address.into()));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.is_empty() {
            return Err(BadHost::Empty);
        }
        // RFC 1035 section 2.3.4.
        if name.len() > 253 {
            return Err(BadHost::TooLong);
        }
        if !name.split('.').all(is_label) {
            return Err(BadHost::Label);
        }
        if ends_in_a_number(name) {
            let address: Ipv4Addr = name.parse().map_err(|_| BadHost::Address)?;
            return Ok(Self::Ip(address.into()));
        }
        Ok(Self::Name(name.to_ascii_lowercase().into()))
    }

    /// Parses a host as a person writes it: like [`Host::parse`], and names in other scripts become
    /// A-labels (UTS 46), and IPv6 needs no brackets.
    ///
    /// # Errors
    ///
    /// As [`Host::parse`].
    pub fn parse_typed(text: &str) -> Result<Self, BadHost> {
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Ok(Self::Ip(address.into()));
        }
        if text.is_ascii() {
            return Self::parse(text);
        }
        match url::Host::parse(text) {
            Ok(url::Host::Domain(ascii)) => Self::parse(&ascii),
            Ok(_) | Err(_) => Err(BadHost::Label),
        }
    }

    /// The host as a TLS server name; `None` for a name that TLS cannot carry (an underscore).
    pub fn server_name(&self) -> Option<rustls_pki_types::ServerName<'static>> {
        match self {
            Self::Ip(address) => Some((*address).into()),
            Self::Name(name) => name.to_string().try_into().ok(),
        }
    }

    /// Whether the host is this machine's loopback, by address (the unspecified one leads there too) or by the
    /// name `localhost`.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Ip(address) => {
                let address = address.to_canonical();
                address.is_loopback() || address.is_unspecified()
            }
            Self::Name(name) => &**name == "localhost" || name.ends_with(".localhost"),
        }
    }
}

fn is_label(label: &str) -> bool {
    // RFC 1123 section 2.1 plus the underscore, which real service names carry.
    let in_alphabet = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=63).contains(&label.len())
        && label.bytes().all(in_alphabet)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// WHATWG URL, "ends in a number": what resolvers may take for an IPv4 address.
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    last.bytes().all(|byte| byte.is_ascii_digit())
        || hex.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Where a client asks a CONNECT to go: host and port, the port always given.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The host, normalised.
    pub host: Host,
    /// The TCP port, never 0.
    pub port: u16,
}

impl Target {
    /// Parses `host:port` (RFC 9110 section 9.3.6: a CONNECT target always has a port).
    ///
    /// # Errors
    ///
    /// [`BadHost`] with the reason; [`BadHost::Port`] for a missing, zero or oversize port.
    pub fn parse(text: &str) -> Result<Self, BadHost> {
        let (host, port) = split_port(text).ok_or(BadHost::Port)?;
        Ok(Self { host: Host::parse(host)?, port: parse_port(port)? })
    }

    /// Parses an authority in which the port may be left out.
    ///
    /// # Errors
    ///
    /// [`BadHost`] with the reason.
    pub fn parse_with_default(text: &str, default_port: u16) -> Result<Self, BadHost> {
        match split_port(text) {
            Some((host, "")) => Ok(Self { host: Host::parse(host)?, port: default_port }),
            Some((host, port)) => Ok(Self { host: Host::parse(host)?, port: parse_port(port)? }),
            None => Ok(Self { host: Host::parse(text)?, port: default_port }),
        }
    }
}

/// Splits at the colon before the port; `None` when there is none (an IPv6 literal's own do not count).
fn split_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    (!port.ends_with(']')).then_some((host, port))
}

fn parse_port(text: &str) -> Result<u16, BadHost> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port != 0 => Ok(port),
        _ => Err(BadHost::Port),
    }
}

impl FromStr for Target {
    type Err = BadHost;

    fn from_str(text: &str) -> Result<Self, BadHost> {
        Self::parse(text)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The two schemes that a forward proxy carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Plain text; never gets a credential.
    Http,
    /// TLS.
    Https,
}

impl Scheme {
    /// The port that is meant when none is written (RFC 9110 sections 4.2.1 and 4.2.2).
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    /// As it stands in a URI.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// How a proxy in front of us is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyScheme {
    /// CONNECT, in plain text.
    Http,
    /// CONNECT, over TLS to the proxy.
    Https,
    /// SOCKS5 (RFC 1928) with addresses: names are resolved here.
    Socks5,
    /// SOCKS5 with names, which the proxy resolves.
    Socks5h,
}

impl ProxyScheme {
    /// All of them, as they stand in a URL, with the port that is meant when none is written (1080 by
    /// RFC 1928 section 3).
    const ALL: [(&str, Self, u16); 4] = [
        ("http", Self::Http, 80),
        ("https", Self::Https, 443),
        ("socks5", Self::Socks5, 1080),
        ("socks5h", Self::Socks5h, 1080),
    ];

    /// The scheme of a URL and its default port.
    pub fn of(scheme: &str) -> Option<(Self, u16)> {
        Self::ALL.into_iter().find(|(word, ..)| *word == scheme).map(|(_, it, port)| (it, port))
    }

    /// As it stands in a URL.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, scheme, _)| *scheme == self).map_or("", |(word, ..)| word)
    }
}

/// Scheme, host and port (RFC 6454): what a rule speaks of and what a connection is pooled by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Plain text or TLS.
    pub scheme: Scheme,
    /// Where.
    pub target: Target,
}

impl Origin {
    /// The TLS origin behind a CONNECT target.
    pub fn https(target: Target) -> Self {
        Self { scheme: Scheme::Https, target }
    }

    /// Whether an authority (a `Host` field or `:authority`) names this origin after normalisation.
    /// A missing port means the scheme's own. What does not parse names nothing.
    pub fn is_named_by(&self, authority: &str) -> bool {
        // The common spelling costs no allocation.
        if let (Host::Name(name), true) = (&self.target.host, self.has_default_port())
            && **name == *authority
        {
            return true;
        }
        Target::parse_with_default(authority, self.scheme.default_port())
            .is_ok_and(|target| target == self.target)
    }

    /// The authority as it stands in a request: the port only where it is not the scheme's own.
    pub fn authority(&self) -> String {
        if self.has_default_port() { self.target.host.to_string() } else { self.target.to_string() }
    }

    fn has_default_port(&self) -> bool {
        self.target.port == self.scheme.default_port()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

/// Why a text is not a host or a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHost {
    /// Looks like an IP address and is none.
    #[error("not a valid IP address")]
    Address,
    /// Nothing there.
    #[error("the host is empty")]
    Empty,
    /// A label is empty, too long, or has a character that no host name has.
    #[error("not a valid host name")]
    Label,
    /// No port, port 0, or above 65535.
    #[error("needs a port from 1 to 65535")]
    Port,
    /// Longer than 253 octets.
    #[error("the host name is longer than 253 octets")]
    TooLong,
}

/// An `https` URL: an origin, and a path with its query. Without user information.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Whose it is.
    pub origin: Origin,
    /// Path and query.
    pub path: String,
}

impl Endpoint {
    /// Reads an `https` URL.
    ///
    /// # Errors
    ///
    /// [`BadEndpoint`] for every other text.
    pub fn parse(text: &str) -> Result<Self, BadEndpoint> {
        let url = url::Url::parse(text).map_err(|_| BadEndpoint::NoUrl)?;
        if url.scheme() != "https" {
            return Err(BadEndpoint::NotHttps);
        }
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(BadEndpoint::NoUrl);
        }
        let host = Host::parse_typed(url.host_str().unwrap_or_default())?;
        let port = url.port().unwrap_or(443);
        let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
        let path = format!("{}{query}", url.path());
        Ok(Self { origin: Origin::https(Target { host, port }), path })
    }

    /// Another path at the same origin.
    #[must_use]
    pub fn at(&self, path: &str) -> Self {
        Self { origin: self.origin.clone(), path: path.to_owned() }
    }

    /// As people and browsers read it.
    pub fn url(&self) -> String {
        format!("{}://{}{}", self.origin.scheme.as_str(), self.origin.authority(), self.path)
    }
}

/// A text that names no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEndpoint {
    /// No URL, or one with a user or a fragment.
    #[error("expected a URL, as in `https://login.example.com`")]
    NoUrl,
    /// Tokens are never sent in plain text.
    #[error("an issuer is only spoken to over https")]
    NotHttps,
    /// A host that there cannot be.
    #[error(transparent)]
    Host(#[from] BadHost),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_on_the_wire() {
        let long = format!("{}.example", "a".repeat(64));
        let table: &[(&str, Result<&str, BadHost>)] = &[
            ("API.OpenAI.com", Ok("api.openai.com")),
            ("api.openai.com.", Ok("api.openai.com")),
            ("api.openai.com..", Err(BadHost::Label)),
            ("xn--bcher-kva.example", Ok("xn--bcher-kva.example")),
            ("127.0.0.1", Ok("127.0.0.1")),
            ("127.1", Err(BadHost::Address)),
            ("0x7f.1", Err(BadHost::Address)),
            ("1.2.3.0x4", Err(BadHost::Address)),
            ("2130706433", Err(BadHost::Address)),
            ("[::1]", Ok("[::1]")),
            ("[0:0:0:0:0:0:0:1]", Ok("[::1]")),
            ("[fe80::1%25eth0]", Err(BadHost::Address)),
            ("::1", Err(BadHost::Label)),
            ("exa%6dple.com", Err(BadHost::Label)),
            ("user@example.com", Err(BadHost::Label)),
            ("example\u{3002}com", Err(BadHost::Label)),
            ("b\u{fc}cher.example", Err(BadHost::Label)),
            ("-a.example", Err(BadHost::Label)),
            ("a..b", Err(BadHost::Label)),
            (".example", Err(BadHost::Label)),
            ("", Err(BadHost::Empty)),
            (".", Err(BadHost::Empty)),
            (long.as_str(), Err(BadHost::Label)),
        ];
        for (text, expected) in table {
            let got = Host::parse(text).map(|host| host.to_string());
            assert_eq!(got, expected.map(str::to_owned), "{text}");
        }
        assert_eq!(Host::parse(&"a.".repeat(127)).map(|_| ()), Ok(()));
        assert_eq!(Host::parse(&"a.".repeat(128)), Err(BadHost::TooLong));
    }

    #[test]
    fn hosts_as_people_write_them() {
        let table = [
            ("b\u{fc}cher.example", "xn--bcher-kva.example"),
            ("::1", "[::1]"),
            ("LOCALHOST", "localhost"),
        ];
        for (text, expected) in table {
            assert_eq!(Host::parse_typed(text).map(|host| host.to_string()), Ok(expected.into()));
        }
    }

    #[test]
    fn targets() {
        let table = [
            ("a.example:443", Ok("a.example:443")),
            ("[::1]:8443", Ok("[::1]:8443")),
            ("a.example", Err(BadHost::Port)),
            ("[::1]", Err(BadHost::Port)),
            ("a.example:", Err(BadHost::Port)),
            ("a.example:0", Err(BadHost::Port)),
            ("a.example:65536", Err(BadHost::Port)),
            ("a.example:+443", Err(BadHost::Port)),
            ("u@a.example:443", Err(BadHost::Label)),
        ];
        for (text, expected) in table {
            let got = Target::parse(text).map(|target| target.to_string());
            assert_eq!(got, expected.map(str::to_owned), "{text}");
        }
    }

    #[test]
    fn an_authority_names_an_origin_or_not() {
        let origin = Origin::https(Target::parse("api.example.com:443").unwrap());
        for same in
            ["api.example.com", "API.example.com", "api.example.com.", "api.example.com:443"]
        {
            assert!(origin.is_named_by(same), "{same}");
        }
        let others =
            ["", "example.com", "api.example.com:80", "api.example.com.evil", "x@api.example.com"];
        for other in others {
            assert!(!origin.is_named_by(other), "{other}");
        }
        assert_eq!(origin.to_string(), "https://api.example.com");
    }

    #[test]
    fn endpoints() {
        let table = [
            ("https://login.example.com", Ok("https://login.example.com/")),
            ("https://LOGIN.example.com:8443/t?a=b", Ok("https://login.example.com:8443/t?a=b")),
            ("http://login.example.com", Err(BadEndpoint::NotHttps)),
            ("login.example.com", Err(BadEndpoint::NoUrl)),
            ("https://me:pw@login.example.com", Err(BadEndpoint::NoUrl)),
            ("https://login.example.com/#x", Err(BadEndpoint::NoUrl)),
            ("", Err(BadEndpoint::NoUrl)),
        ];
        for (text, expected) in table {
            let got = Endpoint::parse(text).map(|endpoint| endpoint.url());
            assert_eq!(got, expected.map(str::to_owned), "{text}");
        }
    }
}
