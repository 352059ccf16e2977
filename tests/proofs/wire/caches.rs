//! The cache that Codex owns: what is read of it, what stays of it, and what an error says of it.

use serde_json::{Map, Value};
use time::OffsetDateTime;
use valetkey::credential::{Login, TokenSet};
use valetkey::secret::Secret;
use valetkey::store::codex::auth_json::AuthJson;

use super::attack::{Attack, Verdict};
use crate::rounds;

#[test]
fn a_cache_keeps_what_we_do_not_know() {
    let attack = Attack { name: "auth_json", rounds: rounds(1_000_000, 30_000_000), words: WORDS };
    attack.run(|input, _| judge(input));
}

fn judge(input: &[u8]) -> Verdict {
    let before: Result<Value, _> = serde_json::from_slice(input);
    let cache = match (AuthJson::parse(input), before.as_ref().map(Value::as_object)) {
        (Ok(cache), Ok(Some(_))) => cache,
        (Err(says), Ok(None) | Err(_)) => return says_nothing(&says),
        (Ok(_), _) => return Err("what is no object was taken".to_owned()),
        (Err(says), _) => return Err(format!("an object was not taken: {says}")),
    };
    let login = cache.login();
    if let Err(says) = &login {
        says_nothing(says)?;
    }
    let last_refresh = OffsetDateTime::from_unix_timestamp(1_800_000_000).ok();
    let secret = |text: &str| Some(Secret::new(text));
    let set = TokenSet {
        access: Secret::new("new-access"),
        refresh: secret("new-refresh"),
        id: secret("new-id"),
        account_id: None,
        last_refresh,
    };
    let newer = cache.with_tokens(&set);
    let (pretty, compact) = (newer.to_bytes().unwrap(), newer.to_compact_bytes().unwrap());
    let after: Value = serde_json::from_slice(&pretty).map_err(|error| error.to_string())?;
    if serde_json::from_slice::<Value>(&compact).ok().as_ref() != Some(&after) {
        return Err("the file and the entry differ".to_owned());
    }
    let (before, after) = (before.unwrap(), after);
    let (before, after) = (before.as_object().unwrap(), after.as_object().unwrap());
    survives(before, after, &["tokens", "last_refresh"])?;
    match (before.get("tokens"), &after["tokens"]) {
        (Some(Value::Object(before)), Value::Object(after)) => {
            survives(before, after, &["id_token", "access_token", "refresh_token"])?;
        }
        (None, Value::Object(after)) => assert_eq!(after.len(), 3, "{after:?}"),
        (Some(other), after) => assert_eq!(other, after, "its member is no object"),
        (None, other) => return Err(format!("the tokens have become {other}")),
    }
    if matches!(login, Ok(Some(Login::ChatGpt(_)))) {
        let again = AuthJson::parse(&pretty)?.login();
        let Ok(Some(Login::ChatGpt(got))) = again else {
            return Err(format!("the login has become {again:?}"));
        };
        assert_eq!(got.access.expose(), "new-access");
        assert_eq!(got.refresh.unwrap().expose(), "new-refresh");
        assert_eq!(got.last_refresh, last_refresh);
    }
    Ok(true)
}

/// The members but for these are what they were, in their order.
fn survives(
    before: &Map<String, Value>,
    after: &Map<String, Value>,
    ours: &[&str],
) -> Result<(), String> {
    let others = |members: &Map<String, Value>| -> Vec<(String, Value)> {
        let others = members.iter().filter(|(name, _)| !ours.contains(&name.as_str()));
        others.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    let (old, new) = (others(before), others(after));
    if old != new {
        return Err(format!("{old:?} has become {new:?}"));
    }
    let order = |members: &Map<String, Value>| -> Vec<String> { members.keys().cloned().collect() };
    if order(after).starts_with(&order(before)) {
        return Ok(());
    }
    Err(format!("{:?} are now in the order {:?}", order(before), order(after)))
}

/// A message is one of ours, with numbers in it: no byte of the contents.
fn says_nothing(says: &str) -> Verdict {
    let mut plain: String = says.chars().filter(|c| !c.is_ascii_digit()).collect();
    for member in [
        "OPENAI_API_KEY",
        "access_token",
        "account_id",
        "auth_mode",
        "id_token",
        "last_refresh",
        "personal_access_token",
        "refresh_token",
    ] {
        plain = plain.replace(&format!("`{member}`"), "MEMBER");
    }
    const OURS: [&str; 5] = [
        "it is not a JSON object",
        "it is not JSON (line , column )",
        "it ends too early (line , column )",
        "its member `tokens` is not an object",
        "its member MEMBER is not a string",
    ];
    if OURS.contains(&plain.as_str()) { Ok(false) } else { Err(format!("it says: {says}")) }
}

const WORDS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    "[]",
    "{}",
    ":",
    ",",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "\\u00e9",
    "null",
    "true",
    "1e999",
    "-0",
    "0.1",
    "1.7976931348623157e308",
    "5e-324",
    "123456789012345678901234567890",
    "\"tokens\":",
    "\"\":1,",
    "\"auth_mode\":",
    "\"chatgpt\"",
    "\"apikey\"",
    "\"OPENAI_API_KEY\":",
    "\"personal_access_token\":\"at-1\",",
    "\"agent_identity\":{},",
    "\"last_refresh\":",
    "\u{feff}",
    "\u{2028}",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    "0.30000000000000004",
    "8.41e21",
    "2.2250738585072014e-308",
    "9007199254740993",
];
