//! A secret is found however a text that holds it is split: a million splits, three ways to write each text.

use std::sync::Arc;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use valetkey::scrub::{Scrubber, Scrubbing};
use valetkey::secret::Secret;

use super::rounds;

/// How a piece of a text is written.
fn written(secret: &str, way: u8) -> String {
    match way {
        0 => secret.to_owned(),
        1 => secret.bytes().map(|byte| format!("%{byte:02X}")).collect(),
        2 => secret.bytes().map(|byte| format!("\\u00{byte:02x}")).collect(),
        3 => secret.bytes().map(|byte| format!("{byte:02x}")).collect(),
        _ => secret.replace('/', "\\/").replace('+', "%2b"),
    }
}

fn scrubbed<'a>(scrubber: &Arc<Scrubber>, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut scrubbing = Scrubbing::new(scrubber.clone());
    let mut passed = Vec::new();
    for piece in pieces {
        passed.extend_from_slice(&scrubbing.pass(Bytes::copy_from_slice(piece)));
    }
    passed.extend_from_slice(&scrubbing.end());
    passed
}

/// A secret, and a text of secrets in some way of writing, of beginnings of one, and of something else.
fn secret_and_text() -> impl Strategy<Value = (String, String)> {
    let secret = prop_oneof![3 => "[a-z0-9+/_.-]{8,14}", 1 => "[ab%]{8,9}", 1 => "[\\\\/%u0]{8,9}"];
    secret.prop_flat_map(|secret| {
        let kept = secret.clone();
        let part = (0..5_u8, 0..3_u8, any::<prop::sample::Index>(), "[ -~]{0,3}");
        let part = part.prop_map(move |(way, kind, end, noise)| {
            let written = written(&kept, way);
            match kind {
                0 => written,
                1 => written[..end.index(written.len())].to_owned() + &noise,
                _ => noise,
            }
        });
        (Just(secret), vec(part, 1..4).prop_map(|parts| parts.concat()))
    })
}

#[test]
fn a_million_splits_come_to_the_same() {
    let most = rounds(1_000_000, 50_000_000);
    let (mut runner, strategy) = (TestRunner::default(), secret_and_text());
    let (mut splits, mut found, mut texts) = (0, 0, 0);
    while splits < most {
        let (secret, text) = strategy.new_tree(&mut runner).unwrap().current();
        let scrubber = Arc::new(Scrubber::new(&Secret::new(secret.as_str())).unwrap());
        let text = text.as_bytes();
        let whole = scrubbed(&scrubber, [text]);
        let shown = String::from_utf8_lossy(&whole);
        for way in 0..5 {
            assert!(!shown.contains(&written(&secret, way)), "{secret}: {shown}");
        }
        for at in 0..text.len() {
            let (first, second) = text.split_at(at);
            assert_eq!(scrubbed(&scrubber, [first, second]), whole, "{secret} {at}: {shown}");
        }
        assert_eq!(scrubbed(&scrubber, text.chunks(1)), whole, "{secret} byte by byte: {shown}");
        splits += text.len() + 1;
        found += usize::from(whole != text);
        texts += 1;
    }
    assert!(found > texts / 4, "the texts are to hold secrets: {found} of {texts}");
    println!("{splits} splits of {texts} texts, {found} of them with a secret");
}
