//! Names of hosts: one canonical form, the same for every spelling, and none for what is no host.

use std::net::{Ipv4Addr, Ipv6Addr};

use valetkey::origin::{Host, Origin, Target};

use super::attack::{Attack, Verdict};
use crate::dice::Dice;
use crate::rounds;

#[test]
fn a_host_has_one_canonical_form() {
    let attack = Attack { name: "hosts", rounds: rounds(1_000_000, 30_000_000), words: WORDS };
    attack.run(|input, dice| judge(&String::from_utf8_lossy(input), dice));
}

fn judge(text: &str, dice: &mut Dice) -> Verdict {
    let expect = |what: &str, holds: bool| {
        if holds { Ok(()) } else { Err(format!("{what}: {text:?}")) }
    };
    let host = Host::parse(text);
    let expected = canonical(text);
    let got = host.as_ref().ok().map(Host::to_string);
    expect(&format!("{got:?} is not {expected:?}"), got == expected)?;
    let typed = Host::parse_typed(text).map(|typed| typed.to_string());
    if let Ok(typed) = &typed {
        expect(
            "what was typed is canonical",
            Host::parse(typed).is_ok_and(|it| it.to_string() == *typed),
        )?;
    }
    let target = Target::parse(text);
    let parts = text.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
    let port = parts.and_then(|(_, port)| number(port));
    let expected = parts.and_then(|(host, _)| canonical(host)).zip(port);
    let expected = expected.map(|(host, port)| format!("{host}:{port}"));
    let got = target.as_ref().ok().map(Target::to_string);
    expect(&format!("{got:?} is not {expected:?}"), got == expected)?;
    if let Ok(target) = target {
        expect(
            "the target is canonical",
            Target::parse(&target.to_string()) == Ok(target.clone()),
        )?;
        let origin = Origin::https(target);
        expect("the origin is named by its authority", origin.is_named_by(&origin.authority()))?;
        expect("the origin is named by its spelling", origin.is_named_by(text))?;
    }
    let Ok(host) = host else { return Ok(got.is_some()) };
    expect("it is idempotent", Host::parse(&host.to_string()).as_ref() == Ok(&host))?;
    expect("it is typed as it is spelled", typed == Ok(host.to_string()))?;
    expect(
        "another spelling is another host",
        Host::parse(&respelled(text, dice)) == Ok(host.clone()),
    )?;
    let origin = Origin::https(Target { host, port: 443 });
    for spelling in [text.to_owned(), respelled(text, dice), format!("{text}:443")] {
        expect("a spelling does not name its origin", origin.is_named_by(&spelling))?;
    }
    for other in
        [format!("{text}:8443"), format!("x.{text}"), format!("{text}x"), format!("{text}.x")]
    {
        // `example.` and an `x` behind it are one name without the dot, too: never this one.
        expect("another name names the origin", !origin.is_named_by(&other))?;
    }
    Ok(true)
}

/// Upper and lower case at random; a dot behind a name where there is none.
fn respelled(text: &str, dice: &mut Dice) -> String {
    let flip =
        |c: char| if dice.one_in(2) { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
    let mut spelled: String = text.chars().map(flip).collect();
    if !spelled.ends_with(['.', ']']) && dice.one_in(2) {
        spelled.push('.');
    }
    spelled
}

/// What a host is, written a second time and character by character (RFC 952, RFC 1123, RFC 3986).
pub(super) fn canonical(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    if bytes.first() == Some(&b'[') {
        let inner =
            text.get(1..text.len() - 1).filter(|_| bytes.len() > 2 && bytes.ends_with(b"]"))?;
        return inner.parse::<Ipv6Addr>().ok().map(|address| format!("[{address}]"));
    }
    let bytes = if bytes.ends_with(b".") { &bytes[..bytes.len() - 1] } else { bytes };
    if bytes.is_empty() || bytes.len() > 253 {
        return None;
    }
    let mut label_len = 0;
    for (at, byte) in bytes.iter().enumerate() {
        let before_a_dot = bytes.get(at + 1).is_none_or(|next| *next == b'.');
        match byte {
            b'.' if label_len > 0 => label_len = 0,
            b'-' if label_len == 0 || before_a_dot => return None,
            b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' if label_len < 63 => {
                label_len += 1
            }
            _ => return None,
        }
    }
    if label_len == 0 {
        return None;
    }
    let name = String::from_utf8(bytes.to_ascii_lowercase()).unwrap();
    let last = &name[name.rfind('.').map_or(0, |at| at + 1)..];
    let is_hex = last.starts_with("0x") && last[2..].chars().all(|c| c.is_ascii_hexdigit());
    if is_hex || last.chars().all(|c| c.is_ascii_digit()) {
        return name.parse::<Ipv4Addr>().ok().map(|address| address.to_string());
    }
    Some(name)
}

/// A port in digits.
pub(super) fn number(text: &str) -> Option<u32> {
    let mut port: u32 = 0;
    for c in text.chars() {
        port = port.checked_mul(10)?.checked_add(c.to_digit(10)?)?;
    }
    (1..=65535).contains(&port).then_some(port)
}

const WORDS: &[&str] = &[
    ".",
    "..",
    ":",
    ":443",
    ":0",
    ":65536",
    ":+1",
    "-",
    "_",
    "[",
    "]",
    "[::1]",
    "::",
    "127.0.0.1",
    "0x",
    "0X7f",
    "017",
    "xn--",
    "%2e",
    "%00",
    "@",
    "user@",
    "\u{3002}",
    "\u{ff0e}",
    "\u{ad}",
    "\u{130}",
    "\u{df}",
    "\u{212a}",
    "\u{200d}",
    "/",
    "\\",
    "?",
    "#",
    " ",
    "\t",
    "localhost",
    "*.",
    ".evil.example",
    "evil",
    "255",
    "256",
    "1.1",
];
