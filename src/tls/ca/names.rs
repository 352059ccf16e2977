//! The names that a certificate authority may speak for, as X.509 name constraints.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rcgen::{CidrSubnet, GeneralSubtree, NameConstraints};
use x509_parser::extensions::{self, GeneralName};

use crate::origin::Host;

/// A set of hosts. A DNS name stands for itself and every name below it, because name constraints
/// (RFC 5280 section 4.2.1.10) know no other way; an address stands for itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(Vec<Host>);

impl Names {
    pub(super) fn new(hosts: &[Host]) -> Self {
        let mut hosts = hosts.to_vec();
        hosts.sort();
        hosts.dedup();
        Self(hosts)
    }

    pub(super) fn hosts(&self) -> &[Host] {
        &self.0
    }

    /// Whether the host, and with it all names below, are in the set.
    pub(super) fn permit(&self, host: &Host) -> bool {
        self.0.iter().any(|within| match (within, host) {
            (Host::Name(within), Host::Name(name)) => name
                .strip_suffix(&**within)
                .is_some_and(|labels| labels.is_empty() || labels.ends_with('.')),
            _ => within == host,
        })
    }

    /// What is in both sets.
    pub(super) fn intersection(&self, other: &Self) -> Self {
        let ours = self.0.iter().filter(|host| other.permit(host));
        let theirs = other.0.iter().filter(|host| self.permit(host));
        Self::new(&ours.chain(theirs).cloned().collect::<Vec<_>>())
    }

    /// Constraints that permit these names and nothing else that a TLS server can be called by. A kind
    /// of name that nobody permits would be free: it is excluded whole. With an address permitted no
    /// range is excluded: validators take IPv4 and IPv6 for one kind, and Java 17 takes a range that
    /// excludes one family whole to exclude the other too.
    pub(super) fn to_constraints(&self) -> NameConstraints {
        let permitted_subtrees = self.0.iter().map(subtree).collect();
        let mut excluded_subtrees = Vec::new();
        if !self.0.iter().any(|host| matches!(host, Host::Name(_))) {
            excluded_subtrees.push(GeneralSubtree::DnsName(String::new()));
        }
        if !self.0.iter().any(|host| matches!(host, Host::Ip(_))) {
            let all: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
            let all =
                all.map(|any| GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(any, 0)));
            excluded_subtrees.extend(all);
        }
        NameConstraints { permitted_subtrees, excluded_subtrees }
    }

    /// Reads what [`Names::to_constraints`] wrote; `None` for anything else.
    pub(super) fn of_constraints(constraints: &extensions::NameConstraints<'_>) -> Option<Self> {
        let permitted = constraints.permitted_subtrees.as_deref().unwrap_or_default();
        let hosts = permitted.iter().map(|subtree| match subtree.base {
            GeneralName::DNSName(name) => Host::parse(name).ok(),
            GeneralName::IPAddress(range) => single_address(range).map(Host::Ip),
            _ => None,
        });
        hosts.collect::<Option<Vec<_>>>().map(Self)
    }
}

fn subtree(host: &Host) -> GeneralSubtree {
    match host {
        Host::Name(name) => GeneralSubtree::DnsName(name.to_string()),
        Host::Ip(ip) => {
            let bits = if ip.is_ipv4() { 32 } else { 128 };
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(*ip, bits))
        }
    }
}

/// The address of a range that has only one.
fn single_address(range: &[u8]) -> Option<IpAddr> {
    let (address, mask) = range.split_at(range.len() / 2);
    if mask.iter().any(|byte| *byte != 0xff) {
        return None;
    }
    let v4 = <[u8; 4]>::try_from(address).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(address).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hosts: &[&str]) -> Names {
        let hosts: Vec<_> = hosts.iter().map(|host| Host::parse(host).unwrap()).collect();
        Names::new(&hosts)
    }

    #[test]
    fn a_name_stands_for_all_below() {
        let set = names(&["example.com", "api.other.example", "127.0.0.1"]);
        let table = [
            ("example.com", true),
            ("api.example.com", true),
            ("a.b.example.com", true),
            ("notexample.com", false),
            ("example.com.evil", false),
            ("com", false),
            ("other.example", false),
            ("127.0.0.1", true),
            ("127.0.0.2", false),
            ("[::1]", false),
        ];
        for (host, expected) in table {
            assert_eq!(set.permit(&Host::parse(host).unwrap()), expected, "{host}");
        }
        assert!(!Names::default().permit(&Host::parse("a.example").unwrap()));
    }

    #[test]
    fn intersections_take_the_narrower_name() {
        let table: [(&[&str], &[&str], &[&str]); 4] = [
            (&["a.example", "b.example"], &["b.example", "c.example"], &["b.example"]),
            (&["example.com"], &["api.example.com"], &["api.example.com"]),
            (&["api.example.com"], &["example.com"], &["api.example.com"]),
            (&["[::1]", "a.example"], &["[::1]"], &["[::1]"]),
        ];
        for (one, two, expected) in table {
            assert_eq!(names(one).intersection(&names(two)).hosts(), names(expected).hosts());
        }
    }

    #[test]
    fn kinds_of_names_without_a_rule_are_excluded_whole() {
        let table: [(&[&str], usize, usize); 4] = [
            (&["a.example"], 1, 2),
            (&["127.0.0.1"], 1, 1),
            (&["[::1]", "a.example"], 2, 0),
            (&["[::1]", "127.0.0.1", "a.example"], 3, 0),
        ];
        for (hosts, permitted, excluded) in table {
            let constraints = names(hosts).to_constraints();
            assert_eq!(constraints.permitted_subtrees.len(), permitted, "{hosts:?}");
            assert_eq!(constraints.excluded_subtrees.len(), excluded, "{hosts:?}");
        }
    }
}
