//! Finds what speaks of a host among any number of patterns, at the cost of two looks into a table.

use std::collections::HashMap;
use std::sync::Arc;

use super::pattern::{HostMatch, HostPattern, parent};
use crate::origin::Host;

/// Patterns by the hosts that they speak of, each known by its place in the list that they were in.
///
/// A star stands for exactly one label, so of all wildcards only those with the one suffix can speak of a host.
/// The names are clients' to choose: the hash is the keyed one of the standard library.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    exact: HashMap<Host, Vec<usize>>,
    wildcard: HashMap<Arc<str>, Vec<usize>>,
}

impl Hosts {
    /// The patterns of a list, in its order.
    pub(super) fn of<'a>(patterns: impl Iterator<Item = &'a HostPattern>) -> Self {
        let mut hosts = Self::default();
        for (place, pattern) in patterns.enumerate() {
            let places = match pattern.host() {
                HostMatch::Exact(host) => hosts.exact.entry(host.clone()).or_default(),
                HostMatch::Wildcard(suffix) => hosts.wildcard.entry(suffix.clone()).or_default(),
            };
            places.push(place);
        }
        hosts
    }

    /// The places of those that speak of the host, at whatever port, the lowest first.
    pub(super) fn places(&self, host: &Host) -> Places<'_> {
        let exact = self.exact.get(host);
        let wildcard = parent(host).and_then(|suffix| self.wildcard.get(suffix));
        Places {
            exact: exact.map(Vec::as_slice).unwrap_or_default(),
            wildcard: wildcard.map(Vec::as_slice).unwrap_or_default(),
        }
    }
}

/// Two rising lists as one.
pub(super) struct Places<'a> {
    exact: &'a [usize],
    wildcard: &'a [usize],
}

impl Iterator for Places<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let is_exact = match (self.exact.first(), self.wildcard.first()) {
            (Some(exact), Some(wildcard)) => exact < wildcard,
            (exact, _) => exact.is_some(),
        };
        let list = if is_exact { &mut self.exact } else { &mut self.wildcard };
        list.split_off_first().copied()
    }
}
