//! The claims of a token: read from its payload alone, which is never checked and never shown.

use serde_json::Value;
use valetkey::credential::claims::Claims;
use valetkey::secret::Secret;

use super::attack::{Attack, Verdict};
use crate::rounds;

#[test]
fn claims_are_what_the_payload_says() {
    let attack = Attack { name: "claims", rounds: rounds(1_000_000, 50_000_000), words: WORDS };
    attack.run(|input, _| judge(&String::from_utf8_lossy(input)));
}

/// What stands between bars in an input is encoded first, so that mutations change what a payload says too.
fn judge(input: &str) -> Verdict {
    let token = match input.split('|').collect::<Vec<_>>()[..] {
        [head, payload, signature] => format!("{head}{}{signature}", encoded(payload.as_bytes())),
        _ => input.to_owned(),
    };
    let claims = Claims::of(&Secret::new(token.clone()));
    let parts: Vec<&str> = token.split('.').collect();
    let payload = match parts[..] {
        [head, payload, signature] if !head.is_empty() && !signature.is_empty() => decoded(payload),
        _ => None,
    };
    let payload = payload.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let (claims, payload) = match (claims, payload.filter(Value::is_object)) {
        (None, None) => return Ok(false),
        (Some(claims), Some(payload)) => (claims, payload),
        (claims, payload) => return Err(format!("{claims:?} are read of {payload:?}")),
    };
    let again = |token: String| Claims::of(&Secret::new(token)) == Some(claims.clone());
    if !again(format!("x.{}.y", parts[1])) {
        return Err("the head or the signature matters".to_owned());
    }
    if again(format!("{token}.x")) || again(format!(".{token}")) {
        return Err("a fourth part is taken".to_owned());
    }
    let instant = |name: &str| {
        let seconds = payload
            .get(name)
            .and_then(|it| it.as_i64().map_or_else(|| it.as_f64(), |it| Some(it as f64)));
        // The years of four digits, which `time` has.
        seconds
            .map(f64::trunc)
            .filter(|it| (-377_705_116_800.0..253_402_300_800.0).contains(it))
            .map(|it| it as i64)
    };
    for (name, read) in [("exp", claims.expires_at), ("iat", claims.issued_at)] {
        let read = read.map(|moment| moment.unix_timestamp());
        if read != instant(name) {
            return Err(format!("{name} is {read:?} and not {:?}", instant(name)));
        }
    }
    let said = |place: &str, name: &str| {
        let place = if place.is_empty() { Some(&payload) } else { payload.get(place) };
        let text = place.and_then(|place| place.get(name)).and_then(Value::as_str);
        text.filter(|text| !text.is_empty()).map(str::to_owned)
    };
    let (auth, profile) = ("https://api.openai.com/auth", "https://api.openai.com/profile");
    assert_eq!(claims.email, said("", "email").or_else(|| said(profile, "email")));
    assert_eq!(claims.account_id, said(auth, "chatgpt_account_id"));
    assert_eq!(claims.plan, said(auth, "chatgpt_plan_type"));
    let methods = payload.get("amr").and_then(Value::as_array);
    assert_eq!(claims.mfa, methods.map(|them| them.contains(&Value::from("mfa"))));
    Ok(true)
}

/// Base64 for URLs (RFC 4648 section 5), bit by bit; whatever is behind it may be `=`.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for byte in text.bytes() {
        let value = ALPHABET.iter().position(|letter| *letter == byte)?;
        bits = (bits << 6) | u32::try_from(value).unwrap();
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held).unwrap());
            bits &= (1 << held) - 1;
        }
    }
    // A letter that holds no byte, or bits that no byte has, are nothing.
    (held < 6 && bits == 0).then_some(bytes)
}

fn encoded(bytes: &[u8]) -> String {
    let mut text = String::new();
    for piece in bytes.chunks(3) {
        let bits = piece.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        let bits = bits << (8 * (3 - piece.len()));
        let letters = (0..=piece.len()).map(|at| char::from(ALPHABET[bits >> (18 - 6 * at) & 63]));
        text.extend(letters);
    }
    text
}

const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

const WORDS: &[&str] = &[
    ".",
    "..",
    "=",
    "==",
    "|",
    "-",
    "_",
    "+",
    "/",
    "e30",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "\"exp\":",
    "\"iat\":",
    "\"amr\":[\"mfa\"],",
    "\"email\":\"a@b\",",
    "\"https://api.openai.com/auth\":",
    "\"chatgpt_plan_type\":\"x\"",
    "1800000000",
    "253402300799",
    "253402300800",
    "-377705116800",
    "1e300",
    "-1e300",
    "1.5",
    "9223372036854775807",
    "18446744073709551616",
    "null",
    "true",
    "\\u0000",
];
