//! Reads and changes the cache that Codex owns, `auth.json`, and keeps what it does not know.

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use zeroize::{Zeroize as _, Zeroizing};

use crate::credential::{CODEX_CLIENT_ID, CODEX_ISSUER, Login, PersonalToken, TokenSet};
use crate::secret::Secret;

/// The members of a cache, in their order. Wiped on drop.
pub struct AuthJson(Map<String, Value>);

impl AuthJson {
    /// The members of a cache's bytes.
    ///
    /// # Errors
    ///
    /// What is wrong and where, without a byte of the contents.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(members)) => Ok(Self(members)),
            Ok(mut other) => {
                wipe(&mut other);
                Err("it is not a JSON object".to_owned())
            }
            Err(error) => {
                let (line, column) = (error.line(), error.column());
                let what = if error.is_eof() { "it ends too early" } else { "it is not JSON" };
                Err(format!("{what} (line {line}, column {column})"))
            }
        }
    }

    /// The login that the cache holds, by the same rule as Codex: `auth_mode` alone decides; without
    /// it an API key, else the ChatGPT tokens. `None` when the member that is decided for is missing.
    ///
    /// # Errors
    ///
    /// Which member is not what it should be.
    pub fn login(&self) -> Result<Option<Login>, String> {
        let mode = match text(&self.0, "auth_mode")? {
            Some(mode) => mode,
            None if self.has("personal_access_token") => "personalAccessToken",
            None if self.has("agent_identity") => "agentIdentity",
            None if self.has("OPENAI_API_KEY") => API_KEY,
            None => CHATGPT,
        };
        match mode {
            API_KEY => Ok(secret(&self.0, "OPENAI_API_KEY")?.map(Login::ApiKey)),
            CHATGPT | "chatgptAuthTokens" => Ok(self.tokens()?.map(Login::ChatGpt)),
            "personalAccessToken" => {
                let personal = |token| Login::Personal(PersonalToken { token, account: None });
                Ok(secret(&self.0, "personal_access_token")?.map(personal))
            }
            "agentIdentity" => Ok(unsupported("an agent identity")),
            "bedrockApiKey" | "bedrockAccessKeys" => Ok(unsupported("an Amazon Bedrock key")),
            _ => Ok(unsupported("a login of an unknown kind")),
        }
    }

    fn tokens(&self) -> Result<Option<TokenSet>, String> {
        let tokens = match self.0.get("tokens") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(tokens)) => tokens,
            Some(_) => return Err("its member `tokens` is not an object".to_owned()),
        };
        let Some(access) = secret(tokens, "access_token")? else { return Ok(None) };
        Ok(Some(TokenSet {
            access,
            refresh: secret(tokens, "refresh_token")?,
            id: secret(tokens, "id_token")?,
            account_id: text(tokens, "account_id")?.map(str::to_owned),
            last_refresh: text(&self.0, "last_refresh")?
                .and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok()),
        }))
    }

    fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// This cache with a newer token set of the login that it holds. Everything else stays.
    pub fn with_tokens(&self, set: &TokenSet) -> Self {
        let mut members = self.0.clone();
        let tokens = members.entry("tokens").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(tokens) = tokens {
            fill(tokens, set);
        }
        put(&mut members, "last_refresh", written(set.last_refresh));
        Self(members)
    }

    /// A cache with another login, as Codex writes it: nothing of an earlier one stays. `None` for a
    /// login that is not ours to write.
    pub fn of(login: &Login) -> Option<Self> {
        let mut members = Map::new();
        match login {
            Login::ApiKey(key) => {
                put(&mut members, "auth_mode", Some(API_KEY.into()));
                put(&mut members, "OPENAI_API_KEY", Some(key.expose().into()));
            }
            Login::ChatGpt(set) => {
                put(&mut members, "auth_mode", Some(CHATGPT.into()));
                put(&mut members, "OPENAI_API_KEY", Some(Value::Null));
                let mut tokens = Map::new();
                fill(&mut tokens, set);
                put(&mut tokens, "oauth_provenance", Some(provenance()));
                put(&mut members, "tokens", Some(Value::Object(tokens)));
                put(&mut members, "last_refresh", written(set.last_refresh));
            }
            // Without a mode, as Codex has it.
            Login::Personal(PersonalToken { token, .. }) => {
                put(&mut members, "OPENAI_API_KEY", Some(Value::Null));
                put(&mut members, "personal_access_token", Some(token.expose().into()));
            }
            Login::OAuth(_) | Login::Unsupported(_) => return None,
        }
        Some(Self(members))
    }

    /// The bytes of the cache as Codex writes them into the keyring: without a space.
    ///
    /// # Errors
    ///
    /// Those of [`serde_json::to_writer`].
    pub fn to_compact_bytes(&self) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(ROOM));
        serde_json::to_writer(&mut *bytes, &self.0)?;
        Ok(bytes)
    }

    /// The bytes of the cache as Codex writes them into the file: two spaces of indent, no newline at the end.
    ///
    /// # Errors
    ///
    /// Those of [`serde_json::to_writer_pretty`].
    pub fn to_bytes(&self) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(ROOM));
        serde_json::to_writer_pretty(&mut *bytes, &self.0)?;
        Ok(bytes)
    }
}

impl Drop for AuthJson {
    fn drop(&mut self) {
        self.0.values_mut().for_each(wipe);
    }
}

fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(values) => values.iter_mut().for_each(wipe),
        Value::Object(members) => members.values_mut().for_each(wipe),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn unsupported(what: &str) -> Option<Login> {
    Some(Login::Unsupported(what.to_owned()))
}

/// Sets the members that a token set has; one that it lacks stays as it is.
fn fill(tokens: &mut Map<String, Value>, set: &TokenSet) {
    let secret = |secret: &Secret| Value::from(secret.expose());
    put(tokens, "id_token", set.id.as_ref().map(secret));
    put(tokens, "access_token", Some(secret(&set.access)));
    put(tokens, "refresh_token", set.refresh.as_ref().map(secret));
    put(tokens, "account_id", set.account_id.clone().map(Value::from));
}

/// Sets a member in its old place, or at the end; the old value is wiped.
fn put(members: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    if let Some(value) = value
        && let Some(mut old) = members.insert(name.to_owned(), value)
    {
        wipe(&mut old);
    }
}

fn written(moment: Option<OffsetDateTime>) -> Option<Value> {
    let utc = moment?.to_offset(time::UtcOffset::UTC);
    utc.format(NANOSECONDS).ok().map(Value::from)
}

/// A text member; absent, null and empty are the same.
fn text<'a>(members: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, String> {
    match members.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(format!("its member `{name}` is not a string")),
    }
}

fn secret(members: &Map<String, Value>, name: &str) -> Result<Option<Secret>, String> {
    Ok(text(members, name)?.map(Secret::new))
}

/// Where a ChatGPT login comes from, as Codex 0.169 notes it.
fn provenance() -> Value {
    json!({ "issuer": CODEX_ISSUER, "client_id": CODEX_CLIENT_ID })
}

const API_KEY: &str = "apikey";
const CHATGPT: &str = "chatgpt";

/// Room for any cache seen, so that the buffer does not grow and leave copies behind.
const ROOM: usize = 64 * 1024;

/// RFC 3339 as Codex writes it.
const NANOSECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:9]Z");

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<Login>, String> {
        AuthJson::parse(text.as_bytes())?.login()
    }

    /// A login in a few words.
    fn brief(login: Option<Login>) -> String {
        match login {
            None => "none".to_owned(),
            Some(Login::ApiKey(key)) => format!("key {}", key.expose()),
            Some(Login::Unsupported(what)) => what,
            Some(Login::Personal(personal)) => format!("personal {}", personal.token.expose()),
            Some(Login::OAuth(_)) => unreachable!("no cache of Codex holds one"),
            Some(Login::ChatGpt(set)) => {
                let or = |secret: &Option<Secret>| {
                    secret.as_ref().map_or("-", Secret::expose).to_owned()
                };
                let seconds = set.last_refresh.map_or(0, OffsetDateTime::unix_timestamp);
                let account = set.account_id.unwrap_or_default();
                let (refresh, id) = (or(&set.refresh), or(&set.id));
                format!("{} {refresh} {id} {account} {seconds}", set.access.expose())
            }
        }
    }

    #[test]
    fn the_mode_alone_decides() {
        const SET: &str = r#""tokens":{"id_token":"i","access_token":"a","refresh_token":"r","account_id":"x"},"last_refresh":"2026-11-23T02:47:37.420169446Z""#;
        const READ: &str = "a r i x 1795402057";
        let table = [
            ("{}", "none"),
            (r#"{"OPENAI_API_KEY":null}"#, "none"),
            (r#"{"OPENAI_API_KEY":""}"#, "none"),
            (r#"{"OPENAI_API_KEY":"k"}"#, "key k"),
            (r#"{"auth_mode":"apikey","OPENAI_API_KEY":"k"}"#, "key k"),
            (r#"{"auth_mode":"apikey","OPENAI_API_KEY":null}"#, "none"),
            (r#"{"auth_mode":"chatgpt","OPENAI_API_KEY":"k"}"#, "none"),
            (r#"{"auth_mode":"chatgpt","tokens":null}"#, "none"),
            (r#"{"auth_mode":"chatgpt","tokens":{}}"#, "none"),
            (r#"{"auth_mode":"chatgpt","OPENAI_API_KEY":"k",SET}"#, READ),
            (r#"{"auth_mode":"apikey","OPENAI_API_KEY":"k",SET}"#, "key k"),
            (r#"{"OPENAI_API_KEY":"k",SET}"#, "key k"),
            (r#"{"OPENAI_API_KEY":null,SET}"#, READ),
            (r#"{SET}"#, READ),
            (r#"{"auth_mode":"chatgptAuthTokens",SET}"#, READ),
            (r#"{"tokens":{"access_token":"a","refresh_token":""}}"#, "a - -  0"),
            (r#"{"tokens":{"access_token":"a"},"last_refresh":"soon"}"#, "a - -  0"),
            (r#"{"personal_access_token":"at-1",SET}"#, "personal at-1"),
            (r#"{"auth_mode":"personalAccessToken"}"#, "none"),
            (r#"{"agent_identity":{"x":1}}"#, "an agent identity"),
            (r#"{"auth_mode":"agentIdentity"}"#, "an agent identity"),
            (r#"{"auth_mode":"bedrockApiKey"}"#, "an Amazon Bedrock key"),
            (r#"{"auth_mode":"headers",SET}"#, "a login of an unknown kind"),
        ];
        for (text, expected) in table {
            let text = text.replace("SET", SET);
            assert_eq!(brief(parsed(&text).unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn says_where_it_is_broken_and_not_what_it_says() {
        let table = [
            ("", "it ends too early (line 1, column 0)"),
            ("{\n  \"OPENAI_API_KEY\": \"sk-se", "it ends too early (line 2, column 26)"),
            ("{\n  sk-secret }", "it is not JSON (line 2, column 3)"),
            ("[\"sk-secret\"]", "it is not a JSON object"),
            (r#"{"OPENAI_API_KEY":17}"#, "its member `OPENAI_API_KEY` is not a string"),
            (r#"{"tokens":"sk-secret"}"#, "its member `tokens` is not an object"),
            (r#"{"tokens":{"access_token":[]}}"#, "its member `access_token` is not a string"),
            (r#"{"auth_mode":1}"#, "its member `auth_mode` is not a string"),
        ];
        for (text, expected) in table {
            assert_eq!(parsed(text).err().as_deref(), Some(expected), "{text}");
        }
    }

    fn set(access: &str, refresh: Option<&str>, id: Option<&str>) -> TokenSet {
        TokenSet {
            access: Secret::new(access),
            refresh: refresh.map(Secret::new),
            id: id.map(Secret::new),
            account_id: None,
            last_refresh: OffsetDateTime::from_unix_timestamp_nanos(1_795_402_057_120_000_000).ok(),
        }
    }

    #[test]
    fn keeps_what_it_does_not_know_in_its_place() {
        let old = r#"{
  "auth_mode": "chatgpt",
  "OPENAI_API_KEY": null,
  "zeta": [
    1,
    "two",
    {
      "three": 3.5
    }
  ],
  "tokens": {
    "login_owner_id": "o",
    "id_token": "i1",
    "access_token": "a1",
    "refresh_token": "r1",
    "oauth_provenance": {
      "issuer": "https://auth.example"
    },
    "account_id": "x"
  },
  "last_refresh": "2026-11-23T02:47:37.420169446Z",
  "alpha": "caf\u00e9 \/ /"
}"#;
        let parse = || AuthJson::parse(old.as_bytes()).unwrap();
        let new = parse().with_tokens(&set("a2", Some("r2"), None)).to_bytes().unwrap();
        let expected = old
            .replace("a1", "a2")
            .replace("r1", "r2")
            .replace("2026-11-23T02:47:37.420169446Z", "2026-11-23T02:47:37.120000000Z")
            .replace("caf\\u00e9 \\/", "caf\u{e9} /");
        assert_eq!(std::str::from_utf8(&new).unwrap(), expected);
        let new = parse().with_tokens(&set("a2", None, Some("i2"))).to_bytes().unwrap();
        let expected = expected.replace("r2", "r1").replace("i1", "i2");
        assert_eq!(std::str::from_utf8(&new).unwrap(), expected);
    }

    /// Each save reads what the one before has written: a number must not wander.
    #[test]
    fn numbers_of_others_stay_what_they_are() {
        for number in ["1.2345678901234122e58", "1233456789012345678901234567890", "0.1", "5e-324"]
        {
            let text = format!("{{\"theirs\":{number}}}");
            let saved = |text: &str| {
                let cache = AuthJson::parse(text.as_bytes()).unwrap();
                let bytes = cache.with_tokens(&set("a", None, None)).to_bytes().unwrap();
                std::str::from_utf8(&bytes).unwrap().to_owned()
            };
            let theirs = |text: &str| {
                let cache = AuthJson::parse(text.as_bytes()).unwrap();
                cache.0["theirs"].as_f64().unwrap().to_bits()
            };
            let expected: f64 = number.parse().unwrap();
            let once = saved(&text);
            for text in [&text, &once, &saved(&once)] {
                assert_eq!(theirs(text), expected.to_bits(), "{text}");
            }
        }
    }

    #[test]
    fn writes_new_logins_as_codex_does() {
        let written = |login: Login| {
            let bytes = AuthJson::of(&login).unwrap().to_bytes().unwrap();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        assert_eq!(
            written(Login::ApiKey(Secret::new("sk-1"))),
            "{\n  \"auth_mode\": \"apikey\",\n  \"OPENAI_API_KEY\": \"sk-1\"\n}"
        );
        let chatgpt = set("a", Some("r"), Some("i"));
        let text = written(Login::ChatGpt(TokenSet { account_id: Some("x".into()), ..chatgpt }));
        let order = [
            "auth_mode",
            "OPENAI_API_KEY",
            "tokens",
            "id_token",
            "access_token",
            "refresh_token",
            "account_id",
            "last_refresh",
        ];
        let places: Vec<_> = order.iter().map(|name| text.find(name).unwrap()).collect();
        assert!(places.is_sorted(), "{text}");
        assert_eq!(brief(parsed(&text).unwrap()), "a r i x 1795402057");
        assert!(AuthJson::of(&Login::Unsupported("x".into())).is_none());
    }
}
