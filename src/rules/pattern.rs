//! Patterns of hosts and paths: parse, match, display.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use crate::origin::{BadHost, Host, Target};

/// Hosts that a rule speaks of, with their port: `api.example.com`, `*.example.com`, `[::1]:8443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    host: HostMatch,
    port: u16,
}

/// Hosts, at whatever port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HostMatch {
    /// This one.
    Exact(Host),
    /// The part behind `*.`; the star stands for exactly one label.
    Wildcard(Arc<str>),
}

impl HostPattern {
    /// Parses a pattern as the configuration has it; the port is 443 unless written.
    ///
    /// # Errors
    ///
    /// [`BadHost`] as for a host. A star is allowed only as the whole left-most label of a name that
    /// has at least two more.
    pub fn parse(text: &str) -> Result<Self, BadHost> {
        let bare_ipv6 = text.parse::<std::net::Ipv6Addr>().is_ok();
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !bare_ipv6 && !port.ends_with(']') => {
                (host, Target::parse(&format!("a:{port}"))?.port)
            }
            _ => (text, 443),
        };
        let Some(suffix) = host.strip_prefix("*.") else {
            return Ok(Self { host: HostMatch::Exact(Host::parse_typed(host)?), port });
        };
        match Host::parse_typed(suffix)? {
            Host::Name(suffix) if suffix.contains('.') => {
                Ok(Self { host: HostMatch::Wildcard(suffix), port })
            }
            _ => Err(BadHost::Label),
        }
    }

    /// Whether the target is one of these.
    pub fn matches(&self, target: &Target) -> bool {
        self.port == target.port && self.matches_host(&target.host)
    }

    /// Whether the host is one of these, at whatever port.
    pub fn matches_host(&self, wanted: &Host) -> bool {
        match &self.host {
            HostMatch::Exact(host) => host == wanted,
            HostMatch::Wildcard(suffix) => parent(wanted) == Some(&**suffix),
        }
    }

    /// The hosts without their port.
    pub(super) fn host(&self) -> &HostMatch {
        &self.host
    }

    /// Whether the hosts are meant at this port.
    pub(super) fn is_at(&self, port: u16) -> bool {
        self.port == port
    }

    /// The one host of the pattern; `None` for a wildcard.
    pub fn exact(&self) -> Option<&Host> {
        match &self.host {
            HostMatch::Exact(host) => Some(host),
            HostMatch::Wildcard(_) => None,
        }
    }

    /// The one target of the pattern; `None` for a wildcard.
    pub fn target(&self) -> Option<Target> {
        Some(Target { host: self.exact()?.clone(), port: self.port })
    }

    /// What the local CA must be allowed to sign: the host itself, or the name below which a
    /// wildcard's hosts are.
    pub fn constraint(&self) -> Host {
        match &self.host {
            HostMatch::Exact(host) => host.clone(),
            HostMatch::Wildcard(suffix) => Host::Name(suffix.clone()),
        }
    }

    /// Which pattern is looked at first: an exact host, then the longer wildcard.
    pub(super) fn by_precedence(&self, other: &Self) -> Ordering {
        let rank = |pattern: &Self| match &pattern.host {
            HostMatch::Exact(_) => usize::MAX,
            HostMatch::Wildcard(suffix) => suffix.len(),
        };
        rank(other).cmp(&rank(self))
    }
}

/// What stands behind the first label of a name: the suffix of the one wildcard that speaks of it.
pub(super) fn parent(host: &Host) -> Option<&str> {
    let Host::Name(name) = host else { return None };
    let (label, rest) = name.split_once('.')?;
    (!label.is_empty()).then_some(rest)
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostMatch::Exact(host) => write!(f, "{host}")?,
            HostMatch::Wildcard(suffix) => write!(f, "*.{suffix}")?,
        }
        if self.port == 443 { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// A literal path and everything below it: `/v1/` and `/v1` both mean `/v1`, `/v1/` and `/v1/x`,
/// never `/v1x`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPrefix(Box<str>);

impl PathPrefix {
    /// Parses a prefix; it starts with `/` and is plain text without query or escapes.
    ///
    /// # Errors
    ///
    /// [`BadPath`] for anything that could be read in two ways.
    pub fn parse(text: &str) -> Result<Self, BadPath> {
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"%?#\\\"<>".contains(&byte);
        if !text.starts_with('/') || !text.bytes().all(plain) || CanonicalPath::of(text).is_none() {
            return Err(BadPath);
        }
        Ok(Self(text.strip_suffix('/').unwrap_or(text).into()))
    }

    /// Whether the path is this one or below it.
    pub fn covers(&self, path: &CanonicalPath<'_>) -> bool {
        path.0.strip_prefix(&*self.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The length that decides between two rules.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Display for PathPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.0)
    }
}

/// A request's path in the one form in which it is compared: escapes of unreserved characters undone
/// (RFC 3986 section 6.2.2.2).
#[derive(Debug)]
pub struct CanonicalPath<'a>(Cow<'a, str>);

impl<'a> CanonicalPath<'a> {
    /// `None` for a path that an upstream could read as another one: dot segments, empty segments,
    /// back slashes, or an escaped `/`, `\`, `%` or control character. No rule with paths covers those.
    pub fn of(path: &'a str) -> Option<Self> {
        let path =
            if path.contains('%') { Cow::Owned(undo_escapes(path)?) } else { Cow::Borrowed(path) };
        let inner = path.strip_prefix('/')?;
        let segments = inner.strip_suffix('/').unwrap_or(inner);
        let odd =
            |segment: &str| matches!(segment, "" | "." | "..") || segment.contains(['\\', ';']);
        if !segments.is_empty() && segments.split('/').any(odd) || inner == "/" {
            return None;
        }
        Some(Self(path))
    }
}

fn undo_escapes(path: &str) -> Option<String> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((plain, tail)) = rest.split_once('%') {
        out.push_str(plain);
        let byte = u8::from_str_radix(tail.get(..2)?, 16).ok()?;
        match byte {
            b'/' | b'\\' | b'%' | 0..=0x1f | 0x7f => return None,
            b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        rest = &tail[2..];
    }
    out.push_str(rest);
    Some(out)
}

/// A text that is no path prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a path starts with `/` and has no query, escape, empty or dot segment")]
pub struct BadPath;

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        Target::parse(text).unwrap()
    }

    #[test]
    fn hosts() {
        let table = [
            ("api.example.com", "api.example.com:443", true),
            ("API.example.com.", "api.example.com:443", true),
            ("api.example.com", "api.example.com:8443", false),
            ("api.example.com:8443", "api.example.com:8443", true),
            ("api.example.com", "api.example.com.evil:443", false),
            ("api.example.com", "xapi.example.com:443", false),
            ("*.example.com", "a.example.com:443", true),
            ("*.example.com", "a.b.example.com:443", false),
            ("*.example.com", "example.com:443", false),
            ("*.example.com", "evilexample.com:443", false),
            ("[::1]:8443", "[::1]:8443", true),
            ("::1", "[::1]:443", true),
            ("127.0.0.1", "127.0.0.1:443", true),
            ("b\u{fc}cher.example", "xn--bcher-kva.example:443", true),
        ];
        for (pattern, wanted, expected) in table {
            let got = HostPattern::parse(pattern).unwrap().matches(&target(wanted));
            assert_eq!(got, expected, "{pattern} against {wanted}");
        }
        for bad in
            ["*", "*.com", "a.*.com", "*a.example.com", "**.example.com", "", "a:0", "https://a.b"]
        {
            assert!(HostPattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_end_on_segments() {
        let table = [
            ("/v1/", "/v1", true),
            ("/v1", "/v1/", true),
            ("/v1/", "/v1/chat", true),
            ("/v1/", "/v1x", false),
            ("/v1/", "/", false),
            ("/", "/anything", true),
            ("/v1/", "/%76%31/chat", true),
            ("/v1/a", "/v1/a%20b", false),
        ];
        for (prefix, path, expected) in table {
            let covers =
                PathPrefix::parse(prefix).unwrap().covers(&CanonicalPath::of(path).expect(path));
            assert_eq!(covers, expected, "{prefix} against {path}");
        }
    }

    #[test]
    fn paths_with_two_readings_are_none() {
        let odd = [
            "",
            "v1",
            "*",
            "//",
            "/v1//a",
            "/v1/../a",
            "/v1/%2e%2e/a",
            "/v1/.",
            "/v1%2fa",
            "/v1\\a",
            "/v1/%5c",
            "/%00",
            "/%zz",
            "/%",
            "/%e",
            "/v1/..;/a",
            "/%252e",
        ];
        for path in odd {
            assert!(CanonicalPath::of(path).is_none(), "{path}");
        }
        for path in ["/", "/a", "/a/", "/a/b.c/", "/...", "/caf%C3%A9"] {
            assert!(CanonicalPath::of(path).is_some(), "{path}");
        }
    }

    proptest::proptest! {
        /// Against the plainest oracle there is: equal labels, or one star for one label.
        #[test]
        fn hosts_agree_with_an_oracle(
            pattern in "(\\*\\.)?[ab]{1,2}(\\.[ab]{1,2}){1,3}", wanted in "[ab]{1,2}(\\.[ab]{1,2}){0,4}"
        ) {
            let labels: Vec<_> = pattern.split('.').collect();
            let wanted_labels: Vec<_> = wanted.split('.').collect();
            let expected = labels.len() == wanted_labels.len()
                && labels.iter().zip(&wanted_labels).all(|(p, w)| *p == "*" || p == w);
            let got = HostPattern::parse(&pattern).unwrap().matches(&target(&format!("{wanted}:443")));
            proptest::prop_assert_eq!(got, expected);
        }
    }
}
