//! Reads `NO_PROXY`: which targets are reached without the chain.
//!
//! Entries are separated by commas or spaces; letters count in either case, and a dot at the end of a name
//! does not count.
//!
//! | entry | targets |
//! | --- | --- |
//! | `*` | all |
//! | `example.com`, `.example.com` | that name and all names below it |
//! | `*.example.com` | all names below it |
//! | `<local>` | names without a dot |
//! | `10.0.0.1`, `::1`, `[::1]` | that address |
//! | `10.0.0.0/8`, `fd00::/8` | addresses in that range |
//! | any of these with `:8443` behind (an IPv6 address in brackets) | only at that port |
//!
//! Names are not resolved: an address or a range covers only targets that are written as addresses. Programs
//! differ in the details. As in curl and Codex, `.example.com` covers `example.com` itself, which Go and
//! Python leave out; ports count as in Go, where curl knows none; `<local>` and `*.` are from Windows.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use crate::origin::{Host, Target};

/// The targets that are reached without the chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoProxy(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    hosts: Hosts,
    /// `None` is every port.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hosts {
    All,
    /// Names without a dot.
    Local,
    Name {
        name: Box<str>,
        and_itself: bool,
    },
    Range(IpNet),
}

impl NoProxy {
    /// Reads a list; gives also each entry that means nothing, for somebody to be told of.
    pub fn parse(list: &str) -> (Self, Vec<String>) {
        let (mut entries, mut odd) = (Vec::new(), Vec::new());
        for text in list.split(|c: char| c == ',' || c.is_whitespace()).filter(|it| !it.is_empty())
        {
            match Entry::parse(text) {
                Some(entry) => entries.push(entry),
                None => odd.push(text.to_owned()),
            }
        }
        (Self(entries), odd)
    }

    /// Whether the target is reached without the chain.
    pub fn covers(&self, target: &Target) -> bool {
        self.0.iter().any(|entry| entry.covers(target))
    }
}

impl Entry {
    fn parse(text: &str) -> Option<Self> {
        if let Some(hosts) = Hosts::parse(text) {
            return Some(Self { hosts, port: None });
        }
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        Some(Self { hosts: Hosts::parse(host)?, port: Some(port) })
    }

    fn covers(&self, target: &Target) -> bool {
        self.port.is_none_or(|port| port == target.port) && self.hosts.cover(&target.host)
    }
}

impl Hosts {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "*" => return Some(Self::All),
            "<local>" => return Some(Self::Local),
            _ => {}
        }
        let bare = text.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(text);
        if let Ok(range) = bare.parse::<IpNet>() {
            return Some(Self::Range(canonical(range)));
        }
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(Self::Range(address.to_canonical().into()));
        }
        let (name, and_itself) = match text.strip_prefix("*.") {
            Some(name) => (name, false),
            None => (text.strip_prefix('.').unwrap_or(text), true),
        };
        match Host::parse_typed(name).ok()? {
            Host::Name(name) => Some(Self::Name { name: (*name).into(), and_itself }),
            Host::Ip(_) => None,
        }
    }

    fn cover(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::All, _) => true,
            (Self::Local, Host::Name(host)) => !host.contains('.'),
            (Self::Name { name, and_itself }, Host::Name(host)) => {
                match host.strip_suffix(&**name) {
                    Some("") => *and_itself,
                    Some(below) => below.ends_with('.'),
                    None => false,
                }
            }
            (Self::Range(range), Host::Ip(address)) => range.contains(&address.to_canonical()),
            _ => false,
        }
    }
}

/// A range of IPv4-mapped addresses as the IPv4 range that it is: targets are compared in that form.
fn canonical(range: IpNet) -> IpNet {
    let mapped = || {
        let length = range.prefix_len().checked_sub(96)?;
        match range.network().to_canonical() {
            IpAddr::V4(address) if matches!(range, IpNet::V6(_)) => {
                Ipv4Net::new(address, length).ok().map(IpNet::V4)
            }
            _ => None,
        }
    };
    mapped().unwrap_or(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        // Entry, targets that it covers, targets that it does not.
        type Row = (&'static str, &'static [&'static str], &'static [&'static str]);
        let table: &[Row] = &[
            ("", &[], &["a.example:443"]),
            ("*", &["a.example:443", "10.1.2.3:80", "[::1]:443"], &[]),
            ("a.example", &["a.example:443", "b.a.example:80"], &["xa.example:443", "example:443"]),
            (".a.example", &["b.a.example:443", "a.example:443"], &["xa.example:443"]),
            ("*.a.example", &["b.a.example:443", "c.b.a.example:1"], &["a.example:443"]),
            ("A.Example.", &["a.example:443", "b.a.example:443"], &["b.example:443"]),
            (" a.example , b.example", &["a.example:443", "b.example:443"], &["c.example:443"]),
            ("a.example b.example", &["a.example:443", "b.example:443"], &["c.example:443"]),
            (",,a.example,", &["a.example:443"], &["b.example:443"]),
            ("a.example:8443", &["a.example:8443", "b.a.example:8443"], &["a.example:443"]),
            ("*:8443", &["a.example:8443"], &["a.example:443"]),
            ("10.1.2.3", &["10.1.2.3:443"], &["10.1.2.4:443", "a.example:443"]),
            ("10.1.2.3:80", &["10.1.2.3:80"], &["10.1.2.3:443"]),
            ("10.0.0.0/8", &["10.1.2.3:443"], &["11.0.0.1:443", "a.example:443"]),
            ("10.0.0.0/8:80", &["10.1.2.3:80"], &["10.1.2.3:443"]),
            ("::1", &["[::1]:443"], &["[::2]:443"]),
            ("[::1]", &["[::1]:443"], &["[::2]:443"]),
            ("[::1]:80", &["[::1]:80"], &["[::1]:443"]),
            ("fd00::/8", &["[fd12::1]:443"], &["[fe80::1]:443"]),
            ("::ffff:10.1.2.3", &["10.1.2.3:443"], &["10.1.2.4:443"]),
            ("10.1.2.3", &["[::ffff:10.1.2.3]:443"], &[]),
            ("::ffff:10.0.0.0/104", &["10.1.2.3:443"], &["11.0.0.1:443", "[fd12::1]:443"]),
            ("::ffff:0:0/96", &["10.1.2.3:443", "[::ffff:11.0.0.1]:1"], &["[fd12::1]:443"]),
            ("<local>", &["intranet:443"], &["a.example:443", "10.1.2.3:443"]),
            ("b\u{fc}cher.example", &["xn--bcher-kva.example:443"], &["bcher.example:443"]),
        ];
        for (list, covered, others) in table {
            let (no_proxy, odd) = NoProxy::parse(list);
            assert!(odd.is_empty(), "{list}: {odd:?}");
            let covers = |target: &&str| no_proxy.covers(&Target::parse(target).unwrap());
            for target in *covered {
                assert!(covers(target), "{list} covers {target}");
            }
            for target in *others {
                assert!(!covers(target), "{list} does not cover {target}");
            }
        }
    }

    #[test]
    fn what_means_nothing_is_told_and_the_rest_counts() {
        let (no_proxy, odd) =
            NoProxy::parse("10.0.0.0/99, a_b!, a.example:0, http://x, ok.example");
        assert_eq!(odd, ["10.0.0.0/99", "a_b!", "a.example:0", "http://x"]);
        assert!(no_proxy.covers(&Target::parse("ok.example:443").unwrap()));
    }

    proptest::proptest! {
        #[test]
        fn no_list_panics(list in ".{0,60}") {
            let (no_proxy, _) = NoProxy::parse(&list);
            no_proxy.covers(&Target::parse("a.example:443").unwrap());
        }
    }
}
