//! Tests of the scrubber: every encoding, every split, and an oracle that tries every place.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// With every character that an encoding treats in its own way.
const SECRET: &str = "sk-Ab/9+\"~\\%41=>?_zz";

fn scrubber(secret: &str) -> Arc<Scrubber> {
    Arc::new(Scrubber::new(&Secret::new(secret)).unwrap())
}

fn each(secret: &str, write: impl Fn(u8) -> String) -> String {
    secret.bytes().map(write).collect()
}

/// A secret as upstreams repeat it, behind and before something else; and where in it the secret is.
fn encodings(secret: &str) -> Vec<(&'static str, String)> {
    let form: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
    let mixed = |byte: u8| match byte % 3 {
        0 => format!("%{byte:02x}"),
        1 => format!("\\u00{byte:02X}"),
        _ => char::from(byte).to_string(),
    };
    let needs = |byte: u8| !byte.is_ascii_alphanumeric() && !b"-._~".contains(&byte);
    let some = |upper: bool| {
        each(secret, |byte| match (needs(byte), upper) {
            (false, _) => char::from(byte).to_string(),
            (true, true) => format!("%{byte:02X}"),
            (true, false) => format!("%{byte:02x}"),
        })
    };
    let json = serde_json::Value::from(secret).to_string().trim_matches('"').to_owned();
    let mut all = vec![
        ("plain", secret.to_owned()),
        ("JSON", json.clone()),
        ("JSON with its slashes escaped", json.replace('/', "\\/")),
        ("JSON, every character", each(secret, |byte| format!("\\u{byte:04x}"))),
        ("JSON, every character, upper case", each(secret, |byte| format!("\\u{byte:04X}"))),
        ("JavaScript", each(secret, |byte| format!("\\x{byte:02x}"))),
        ("a form", form),
        ("percent-encoded", some(true)),
        ("percent-encoded, lower case", some(false)),
        ("percent-encoded, every character", each(secret, |byte| format!("%{byte:02X}"))),
        (
            "percent-encoded, every character, lower case",
            each(secret, |byte| format!("%{byte:02x}")),
        ),
        ("hexadecimal", each(secret, |byte| format!("{byte:02x}"))),
        ("hexadecimal, upper case", each(secret, |byte| format!("{byte:02X}"))),
        ("of all kinds", each(secret, mixed)),
    ];
    for behind in ["", "a", "ab"] {
        let text = format!("{behind}{secret}: and more");
        all.push(("Base64", STANDARD.encode(&text)));
        all.push(("Base64 of the other alphabet", URL_SAFE.encode(&text)));
        let text = format!("{behind}{secret}");
        all.push(("Base64 to its end", STANDARD_NO_PAD.encode(&text)));
        all.push(("Base64 of the other alphabet to its end", URL_SAFE_NO_PAD.encode(&text)));
        all.push((
            "Base64, percent-encoded",
            STANDARD.encode(&text).replace('+', "%2B").replace('/', "%2f"),
        ));
    }
    all
}

fn in_pieces<'a>(scrubber: &Arc<Scrubber>, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut scrubbing = Scrubbing::new(scrubber.clone());
    let mut passed = Vec::new();
    for piece in pieces {
        passed.extend(scrubbing.pass(Bytes::copy_from_slice(piece)));
    }
    passed.extend(scrubbing.end());
    passed
}

fn whole(scrubber: &Arc<Scrubber>, text: &[u8]) -> Vec<u8> {
    in_pieces(scrubber, [text])
}

fn readable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// What of `text` is neither filler nor the same in `scrubbed`; nothing for a text that was scrubbed as it should be.
fn changed(text: &[u8], scrubbed: &[u8]) -> Vec<usize> {
    assert_eq!(text.len(), scrubbed.len());
    (0..text.len()).filter(|at| scrubbed[*at] != FILLER && scrubbed[*at] != text[*at]).collect()
}

#[test]
fn every_encoding_is_found_wherever_it_is_split() {
    let scrubber = scrubber(SECRET);
    for (name, encoded) in encodings(SECRET) {
        let text = format!("{{\"before\": \"{encoded}\", \"behind\": 1}}");
        let (start, end) = (12, 12 + encoded.len());
        let scrubbed = whole(&scrubber, text.as_bytes());
        assert_eq!(changed(text.as_bytes(), &scrubbed), Vec::<usize>::new(), "{name}");
        assert_eq!(&scrubbed[..start], &text.as_bytes()[..start], "{name}");
        assert_eq!(&scrubbed[end..], &text.as_bytes()[end..], "{name}");
        let filler = scrubbed.iter().filter(|byte| **byte == FILLER).count();
        // In Base64 up to three characters at either end are also somebody else's.
        let least =
            if name.starts_with("Base64") { SECRET.len() * 4 / 3 - 2 } else { encoded.len() };
        assert!(filler >= least, "{name}: {}", String::from_utf8_lossy(&scrubbed));
        for at in 0..=text.len() {
            let (first, second) = text.as_bytes().split_at(at);
            assert_eq!(in_pieces(&scrubber, [first, second]), scrubbed, "{name} at {at}");
        }
        let bytes = text.as_bytes().chunks(1);
        assert_eq!(in_pieces(&scrubber, bytes), scrubbed, "{name} byte by byte");
    }
}

#[test]
fn what_is_no_beginning_of_a_secret_goes_on_at_once() {
    let scrubber = scrubber(SECRET);
    // The text, and how much of its end is held.
    let table = [
        ("data: {\"delta\": \"hello\"}\n\n", 0),
        ("", 0),
        ("s", 1),
        ("sk", 2),
        ("sk-Ab/9 sk", 2),
        ("sk-A!", 0),
        ("ss", 1),
        ("100%", 1),
        ("100%7", 2),
        ("100%!", 0),
        ("100%73%", 4),
        ("a\\", 1),
        ("a\\u00", 4),
        ("a\\n", 0),
        ("a \\\\", 1),
        ("736b2d4", 7),
        ("736b2d!", 0),
        // Base64 of the secret begins with these.
        ("c2stQ", 5),
        ("c2stQW", 6),
    ];
    for (text, held) in table {
        let mut scrubbing = Scrubbing::new(scrubber.clone());
        let passed = scrubbing.pass(Bytes::copy_from_slice(text.as_bytes()));
        let expected = &text[..text.len() - held];
        assert_eq!(String::from_utf8_lossy(&passed), expected, "{text:?}");
        assert_eq!(scrubbing.held(), held, "{text:?}");
        let all = [passed, scrubbing.end()].concat();
        assert_eq!(all, text.as_bytes(), "{text:?} comes whole");
        assert_eq!(scrubbing.held(), 0);
    }
}

#[test]
fn a_text_that_holds_no_secret_is_not_copied() {
    let mut scrubbing = Scrubbing::new(scrubber(SECRET));
    let piece = Bytes::from("nothing of it here".repeat(100));
    let place = piece.as_ptr();
    let passed = scrubbing.pass(piece);
    assert_eq!((passed.as_ptr(), passed.len()), (place, 1800));
}

#[test]
fn a_secret_that_is_cut_off_at_the_end_is_one_too() {
    let scrubber = scrubber(SECRET);
    for len in 0..SECRET.len() {
        let text = format!("cut: {}", &SECRET[..len]);
        let hides = if len >= SHORTEST { "*".repeat(len) } else { SECRET[..len].to_owned() };
        assert_eq!(whole(&scrubber, text.as_bytes()), format!("cut: {hides}").into_bytes());
    }
}

#[test]
fn secrets_that_touch_or_overlap_are_all_filled() {
    let scrubber = scrubber("abcdabcd");
    let table = [
        ("abcdabcdabcd", "************"),
        ("abcdabcdabcdab", "************ab"),
        ("xabcdabcabcdabcdx", "xabcdabc********x"),
        ("abcdabcdabcdabcd.", "****************."),
        ("abcdabc.", "abcdabc."),
    ];
    for (text, expected) in table {
        let scrubbed = String::from_utf8(whole(&scrubber, text.as_bytes())).unwrap();
        assert_eq!(scrubbed, expected, "{text}");
    }
}

#[test]
fn a_text_of_many_readings_is_read_once() {
    let secret = "\\".repeat(40);
    let mut scrubbing = Scrubbing::new(scrubber(&secret));
    for len in 1..200 {
        scrubbing.pass(Bytes::from_static(b"\\"));
        // For each place in the secret one reading that is between characters, and one that is behind an escape.
        let plain = scrubbing.traces.iter().filter(|trace| trace.form == 0).count();
        assert!(plain <= 2 * secret.len(), "{plain} readings of {len} backslashes");
        assert!(scrubbing.held() < 2 * secret.len());
    }
}

#[test]
fn two_secrets_are_found_by_one() {
    let (old, new) = (scrubber("the-old-token"), scrubber("token-that-is-new"));
    let both = Arc::new(old.and(&new));
    let text = b"the-old-token-that-is-new, token-that-is-new, the-old-token";
    let expected = b"*************************, *****************, *************";
    assert_eq!(whole(&both, text), expected);
    assert_eq!(both.clean(b"neither"), None);
    assert_eq!(both.clean(b"=the-old-token=").unwrap(), b"=*************=");
}

#[test]
fn a_short_secret_is_refused_and_none_is_shown() {
    for (len, is_enough) in [(0, false), (1, false), (7, false), (8, true), (16 * 1024, true)] {
        let made = Scrubber::new(&Secret::new("x".repeat(len)));
        assert_eq!(made.is_ok(), is_enough, "{len}");
    }
    let mut scrubbing = Scrubbing::new(scrubber(SECRET));
    scrubbing.pass(Bytes::from_static(b"nothing"));
    assert!(!format!("{scrubbing:?}").contains("sk-"));
    assert_eq!(format!("{:?}", scrubber(SECRET)), "Scrubber(..)");
}

/// Says where secrets are by trying every place and every way of reading, one character after the other.
struct Oracle {
    /// What may stand at each place, form by form.
    forms: Vec<Vec<Vec<u8>>>,
}

impl Oracle {
    fn new(secret: &str) -> Self {
        let same = |text: &[u8]| text.iter().map(|byte| vec![*byte]).collect::<Vec<_>>();
        let mut forms = vec![same(secret.as_bytes())];
        let hex = each(secret, |byte| format!("{byte:02x}"));
        let any_case = |byte: u8| vec![byte, byte.to_ascii_uppercase()];
        forms.push(hex.bytes().map(any_case).collect());
        for behind in 0..3 {
            // The characters that stay the same whatever stands before and behind.
            let write = |before: u8, after: u8| {
                let text = [&vec![before; behind][..], secret.as_bytes(), &[after; 3]].concat();
                (STANDARD.encode(&text), URL_SAFE.encode(text))
            };
            let ((one, other), all) =
                (write(0, 0), [write(0xff, 0), write(0, 0xff), write(0xff, 0xff)]);
            let stays =
                |at: &usize| all.iter().all(|it| it.0.as_bytes()[*at] == one.as_bytes()[*at]);
            let places = (0..(behind + secret.len()) * 8 / 6).filter(stays);
            forms.push(places.map(|at| vec![one.as_bytes()[at], other.as_bytes()[at]]).collect());
        }
        Self { forms }
    }

    fn scrub(&self, text: &[u8]) -> Vec<u8> {
        let mut scrubbed = text.to_vec();
        for form in &self.forms {
            for start in 0..text.len() {
                let mut reached = BTreeSet::from([start]);
                for (place, allowed) in form.iter().enumerate() {
                    if reached.contains(&text.len()) && place >= SHORTEST {
                        scrubbed[start..].fill(FILLER);
                    }
                    let cut = reached.iter().any(|at| is_cut(&text[*at..], allowed));
                    if cut && place >= SHORTEST {
                        scrubbed[start..].fill(FILLER);
                    }
                    let next = |at: &usize| ends(text, *at, allowed);
                    reached = reached.iter().flat_map(next).collect();
                }
                for end in reached {
                    scrubbed[start..end].fill(FILLER);
                }
            }
        }
        scrubbed
    }
}

fn spellings(character: u8) -> Vec<String> {
    let mut all = vec![char::from(character).to_string()];
    if character.is_ascii_punctuation() {
        all.push(format!("\\{}", char::from(character)));
    }
    for (upper, lower) in [(true, true), (true, false), (false, true), (false, false)] {
        let digit = |half: u8, is_upper: bool| match is_upper {
            true => format!("{half:X}"),
            false => format!("{half:x}"),
        };
        let code = digit(character >> 4, upper) + &digit(character & 0xf, lower);
        all.extend(["%", "\\x", "\\u00"].map(|mark| format!("{mark}{code}")));
    }
    all
}

/// Where the character ends that begins at `at`, in each way of reading it as one of these.
fn ends(text: &[u8], at: usize, allowed: &[u8]) -> Vec<usize> {
    let all = allowed.iter().flat_map(|character| spellings(*character));
    let read = all.filter(|spelling| text[at..].starts_with(spelling.as_bytes()));
    read.map(|spelling| at + spelling.len()).collect()
}

/// Whether the text ends within one of these.
fn is_cut(text: &[u8], allowed: &[u8]) -> bool {
    let mut all = allowed.iter().flat_map(|character| spellings(*character));
    !text.is_empty() && all.any(|it| it.len() > text.len() && it.as_bytes().starts_with(text))
}

/// Texts that are made of parts of the secret in all encodings, and of what looks like them.
fn texts(secret: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let encoded: Vec<String> = encodings(secret).into_iter().map(|(_, text)| text).collect();
    let part = (0..encoded.len(), any::<prop::sample::Index>(), any::<prop::sample::Index>());
    let part = part.prop_map(move |(which, one, other)| {
        let text = encoded[which].as_bytes();
        let (one, other) = (one.index(text.len() + 1), other.index(text.len() + 1));
        text[one.min(other)..one.max(other)].to_vec()
    });
    let all: Vec<String> = encodings(secret).into_iter().map(|(_, text)| text).collect();
    let entire = (0..all.len()).prop_map(move |which| all[which].clone().into_bytes());
    let noise = prop::sample::select(vec![
        "%", "\\", "\\u00", "\\\\", "s", "a", " ", "*", "%4", "7", "%5c",
    ]);
    let noise = noise.prop_map(|text| text.as_bytes().to_vec());
    vec(prop_oneof![3 => part, 3 => entire, 2 => noise], 0..8).prop_map(|parts| parts.concat())
}

/// Secrets that look like themselves a little further on, and like their own encodings.
const AWKWARD: [&str; 6] =
    [SECRET, "aaaaaaaa", "abababab", "\\\\\\\\\\\\\\\\\\", "%25%25%25", "7373737373"];

proptest! {
    #[test]
    fn any_split_comes_to_what_every_place_and_reading_says(
        (secret, text) in prop::sample::select(&AWKWARD[..])
            .prop_flat_map(|secret| (Just(secret), texts(secret))),
        lens in vec(1_usize..12, 1..20),
    ) {
        let scrubber = scrubber(secret);
        let expected = Oracle::new(secret).scrub(&text);
        prop_assert_eq!(
            readable(&whole(&scrubber, &text)),
            readable(&expected)
        );
        let (mut pieces, mut rest) = (Vec::new(), &text[..]);
        let mut lens = lens.into_iter().cycle();
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(lens.next().unwrap().min(rest.len()));
            pieces.push(piece);
            rest = behind;
        }
        prop_assert_eq!(
            readable(&in_pieces(&scrubber, pieces)),
            readable(&expected)
        );
    }

    #[test]
    fn what_is_held_is_the_longest_end_that_more_text_makes_a_secret(text in texts(SECRET)) {
        let scrubber = scrubber(SECRET);
        let mut scrubbing = Scrubbing::new(scrubber);
        let oracle = Oracle::new(SECRET);
        scrubbing.pass(Bytes::from(text.clone()));
        let may_begin = |start: usize| oracle.forms.iter().any(|form| {
            let mut reached = BTreeSet::from([start]);
            form.iter().any(|allowed| {
                let goes_on = reached.contains(&text.len())
                    || reached.iter().any(|at| is_cut(&text[*at..], allowed));
                let next = |at: &usize| ends(&text, *at, allowed);
                reached = reached.iter().flat_map(next).collect();
                goes_on
            })
        });
        let first = (0..text.len()).find(|start| may_begin(*start)).unwrap_or(text.len());
        prop_assert_eq!(scrubbing.held(), text.len() - first);
    }

    #[test]
    fn nothing_else_is_touched(text in vec(any::<u8>(), 0..3000), lens in vec(1_usize..500, 1..9)) {
        static KEPT: LazyLock<Arc<Scrubber>> = LazyLock::new(|| scrubber(SECRET));
        let scrubber = KEPT.clone();
        let mut lens = lens.into_iter().cycle();
        let (mut pieces, mut rest) = (Vec::new(), &text[..]);
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(lens.next().unwrap().min(rest.len()));
            pieces.push(piece);
            rest = behind;
        }
        prop_assert_eq!(in_pieces(&scrubber, pieces), text);
    }
}
