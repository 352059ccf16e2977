//! The URL under which clients find the proxy.

use std::net::SocketAddr;

use url::{Host, Url};

/// `http://HOST:PORT` with nothing behind it; before the host there may be a login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrl {
    text: String,
    host: String,
    port: u16,
    is_loopback: bool,
}

impl ProxyUrl {
    /// Reads one that was typed; `None` for what is no URL of an HTTP proxy.
    pub fn parse(text: &str) -> Option<Self> {
        // Parsing passes over a line's end, and programs would not.
        let url = Url::parse(text).ok().filter(|_| !text.contains(char::is_control))?;
        let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        if url.scheme() != "http" || !is_bare {
            return None;
        }
        let (host, is_loopback) = match url.host()? {
            Host::Domain(name) => (name.to_owned(), name == "localhost"),
            Host::Ipv4(address) => (address.to_string(), address.is_loopback()),
            Host::Ipv6(address) => (address.to_string(), address.is_loopback()),
        };
        let port = url.port_or_known_default()?;
        Some(Self { text: text.trim().trim_end_matches('/').to_owned(), host, port, is_loopback })
    }

    /// As it is written into variables.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether only this machine reaches it.
    pub fn is_loopback(&self) -> bool {
        self.is_loopback
    }
}

impl From<SocketAddr> for ProxyUrl {
    fn from(address: SocketAddr) -> Self {
        let (host, port) = (address.ip().to_string(), address.port());
        let is_loopback = address.ip().is_loopback();
        Self { text: format!("http://{address}"), host, port, is_loopback }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let table = [
            ("http://127.0.0.1:8377", Some(("http://127.0.0.1:8377", "127.0.0.1", 8377, true))),
            ("http://[::1]:8377/", Some(("http://[::1]:8377", "::1", 8377, true))),
            ("http://me:vk@proxy:80", Some(("http://me:vk@proxy:80", "proxy", 80, false))),
            ("http://proxy", Some(("http://proxy", "proxy", 80, false))),
            ("socks5h://proxy:1080", None),
            ("http://proxy/path", None),
            ("http://proxy/?query", None),
            ("proxy:8377", None),
            ("http://pro\nxy:8377", None),
            ("", None),
        ];
        for (text, expected) in table {
            let found = ProxyUrl::parse(text);
            let parts =
                found.as_ref().map(|it| (it.as_str(), it.host(), it.port(), it.is_loopback()));
            assert_eq!(parts, expected, "{text}");
        }
        let address = SocketAddr::from(([127, 0, 0, 1], 8377));
        assert_eq!(Some(ProxyUrl::from(address)), ProxyUrl::parse(&format!("http://{address}")));
    }
}
