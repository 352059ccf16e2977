//! Reads `[limits]`: each a number that makes sense, the highest file that has one deciding alone.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::file::Layer;
use super::table::Table;
use crate::limits::Limits;

/// What one text says of limits: the number of each key that it has.
pub(super) type Asked = BTreeMap<&'static str, u32>;

/// A key of the table.
struct Key {
    name: &'static str,
    /// What makes sense; anything else is more likely a mistake.
    range: RangeInclusive<u32>,
    set: fn(&mut Limits, u32),
}

/// Reads the table of one text.
pub(super) fn read(table: &Table<'_>) -> Asked {
    let Some(table) = table.get("limits").and_then(|it| it.table(&names())) else {
        return Asked::new();
    };
    let asked = |key: &Key| Some((key.name, table.get(key.name)?.number_in(&key.range)?));
    KEYS.iter().filter_map(asked).collect()
}

/// Makes one of what all layers say, the highest first.
pub(super) fn merge(layers: &[Layer]) -> Limits {
    let mut limits = Limits::USUAL;
    for key in &KEYS {
        if let Some(number) = layers.iter().find_map(|layer| layer.limits.get(key.name)) {
            (key.set)(&mut limits, *number);
        }
    }
    limits
}

fn seconds(number: u32) -> Duration {
    Duration::from_secs(number.into())
}

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The keys of the table.
pub(super) fn names() -> [&'static str; KEYS.len()] {
    KEYS.map(|key| key.name)
}

/// The least are what hyper, HTTP and real clients need, the most what could not be meant.
const KEYS: [Key; 9] = [
    Key { name: "head_size", range: 8192..=1_048_576, set: |it, n| it.head_size = n },
    Key { name: "head_time", range: 1..=3600, set: |it, n| it.head_time = seconds(n) },
    Key { name: "handshake_time", range: 1..=3600, set: |it, n| it.handshake_time = seconds(n) },
    Key { name: "connections", range: 1..=1_000_000, set: |it, n| it.connections = count(n) },
    Key { name: "strangers", range: 1..=1_000_000, set: |it, n| it.strangers = count(n) },
    Key { name: "streams", range: 1..=10_000, set: |it, n| it.streams = n },
    Key { name: "stream_window", range: 16_384..=16_777_216, set: |it, n| it.stream_window = n },
    Key { name: "interim_responses", range: 1..=1000, set: |it, n| it.interim_responses = n },
    Key { name: "wrong_passes", range: 1..=1_000_000, set: |it, n| it.wrong_passes = n },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_sets_a_limit_of_its_own() {
        let with = |key: &Key| {
            let mut limits = Limits::USUAL;
            (key.set)(&mut limits, 7);
            limits
        };
        for key in &KEYS {
            assert_ne!(with(key), Limits::USUAL, "{}", key.name);
            let same = KEYS.iter().filter(|other| with(other) == with(key)).count();
            assert_eq!(same, 1, "{}", key.name);
        }
    }
}
