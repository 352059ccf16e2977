//! Makes decoys, the worthless stand-ins that a client may hold in the place of a credential, and recognises them.
//!
//! A decoy has the form of the real thing, so that a client that looks at the form starts. Its secret part is a
//! mark, which says that it is a decoy and of which credential; nothing about it is secret, so that everybody may
//! make one and recognises every one.

use std::fmt;
use std::sync::LazyLock;

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE_NO_PAD};
use memchr::memmem::Finder;
use serde_json::{Map, Value, json};
use time::{Duration, OffsetDateTime};

use crate::credential::{Account, CredentialName, Login, PersonalToken, TokenSet};
use crate::secret::{Fingerprint, Secret};

/// What every decoy holds, before its tag. Letters alone, which stand in every form of a token as they are.
const MARK: &str = "valetkeyDecoy";

/// Digits of a tag: that of two of the few credentials of one machine are the same never by chance.
const TAG_DIGITS: usize = 16;

/// The shortest text that has a decoy in it. Most header fields are shorter, and not looked at.
const SHORTEST: usize = MARK.len() + TAG_DIGITS;

/// How long a decoy is good for by its own account: longer than any client lives, and before 2038 for a while.
const LIFETIME: Duration = Duration::days(3650);

/// Which credential a decoy stands for: the beginning of the fingerprint of its name, in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag([u8; TAG_DIGITS]);

impl Tag {
    /// The tag of all decoys of a credential.
    pub fn of(name: &CredentialName) -> Self {
        let mut tag = [b'0'; TAG_DIGITS];
        let digits = Fingerprint::of(name.as_str().as_bytes()).to_hex();
        tag.iter_mut().zip(digits.bytes()).for_each(|(to, from)| *to = from);
        Self(tag)
    }

    /// The tag that these bytes begin with, if they do.
    fn at_start(bytes: &[u8]) -> Option<Self> {
        let tag: [u8; TAG_DIGITS] = bytes.first_chunk().copied()?;
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        tag.iter().all(is_digit).then_some(Self(tag))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|digit| write!(f, "{}", char::from(*digit)))
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({self})")
    }
}

/// Whose keys a decoy looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// An API key of Anthropic's.
    Anthropic,
    /// A personal access token of GitHub's.
    GitHub,
    /// An API key of OpenAI's.
    OpenAi,
}

/// A decoy of one string.
pub fn key(tag: Tag, shape: Shape) -> String {
    match shape {
        Shape::Anthropic => format!("sk-ant-api03-{}AA", marked(tag, 93)),
        Shape::GitHub => format!("ghp_{}", marked(tag, 36)),
        Shape::OpenAi => format!("sk-{}", marked(tag, 48)),
    }
}

/// Decoys of all the tokens of one login. No two sets are the same.
pub struct DecoySet {
    /// A JWT that says whom the login speaks for.
    pub id: String,
    /// The same, as the API would get it.
    pub access: String,
    /// What a client asks for the next set with.
    pub refresh: String,
    account_id: Option<String>,
    made: OffsetDateTime,
}

impl DecoySet {
    /// Decoys that name this account and are good for ten years from `now`.
    pub fn new(tag: Tag, account: &Account, now: OffsetDateTime) -> Self {
        let claims = claims(tag, account, now);
        Self {
            id: jwt(tag, &claims),
            access: jwt(tag, &claims),
            refresh: format!("rt_{}", marked(tag, 86)),
            account_id: account.id.clone(),
            made: now,
        }
    }

    /// The login that a client takes them for.
    pub fn into_login(self) -> Login {
        Login::ChatGpt(TokenSet {
            access: Secret::new(self.access),
            refresh: Some(Secret::new(self.refresh)),
            id: Some(Secret::new(self.id)),
            account_id: self.account_id,
            last_refresh: Some(self.made),
        })
    }

    /// How long they are good for, in seconds.
    pub fn expires_in() -> i64 {
        LIFETIME.whole_seconds()
    }
}

/// Whether every secret of a login is a decoy: no harm is done where it is lost. One without a secret is not.
pub fn is_decoy(login: &Login) -> bool {
    let is_one = |secret: &Secret| !tags_in_secret(secret).is_empty();
    match login {
        Login::ApiKey(key) => is_one(key),
        Login::Personal(PersonalToken { token, .. }) => is_one(token),
        Login::ChatGpt(set) | Login::OAuth(set) => {
            [Some(&set.access), set.refresh.as_ref(), set.id.as_ref()]
                .into_iter()
                .flatten()
                .all(is_one)
        }
        Login::Unsupported(_) => false,
    }
}

/// Whether it is a decoy of this credential for the account.
pub fn is_decoy_of(login: &Login, tag: Tag, account: &Account) -> bool {
    let Login::ChatGpt(set) = login else { return false };
    is_decoy(login)
        && tags_in_secret(&set.access) == [tag]
        && set.refresh.as_ref().is_some_and(|it| tags_in_secret(it) == [tag])
        && set.account() == *account
}

/// The tags of the decoys that these bytes hold as they are; no bytes of a URL, of JSON or of a form can
/// hold a decoy otherwise unless they escape letters.
pub fn tags_in(bytes: &[u8]) -> Vec<Tag> {
    if bytes.len() < SHORTEST {
        return Vec::new();
    }
    static FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(MARK));
    // No allocation where there is none.
    let after = FINDER.find_iter(bytes).map(|at| &bytes[at + MARK.len()..]);
    after.filter_map(Tag::at_start).collect()
}

/// The tags of the decoys that a token holds.
pub fn tags_in_secret(secret: &Secret) -> Vec<Tag> {
    tags_in(secret.expose().as_bytes())
}

/// The tags of the decoys in the value of a header field, inside the Base64 of a `Basic` login too.
pub fn tags_in_field(value: &[u8]) -> Vec<Tag> {
    const BASIC: &[u8] = b"basic ";
    if value.len() < SHORTEST {
        return Vec::new();
    }
    let mut tags = tags_in(value);
    if let Some((scheme, login)) = value.split_at_checked(BASIC.len())
        && scheme.eq_ignore_ascii_case(BASIC)
        && let Ok(login) = LENIENT.decode(login.trim_ascii())
    {
        tags.extend(tags_in(&login));
    }
    tags
}

/// Base64 as servers take it: with its padding or without.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The mark, the tag, and letters and digits up to this length.
fn marked(tag: Tag, length: usize) -> String {
    const DIGITS: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut text = format!("{MARK}{tag}");
    let mut bytes = vec![0; length.saturating_sub(text.len())];
    // Nothing rests on it but that two sets differ.
    let _all_the_same = rand::fill(&mut bytes);
    text.extend(bytes.iter().map(|byte| char::from(DIGITS[usize::from(*byte) % DIGITS.len()])));
    text
}

/// A JWT of three parts, the last as long as a SHA-256 is in Base64.
fn jwt(tag: Tag, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = part(&json!({ "alg": "HS256", "typ": "JWT" }));
    // The last digit of 43 has two bits too many, which must be zero: `A`.
    format!("{head}.{}.{}A", part(claims), marked(tag, 42))
}

/// What Codex reads of a token, and nothing else.
fn claims(tag: Tag, account: &Account, now: OffsetDateTime) -> Value {
    let mut auth = Map::new();
    let known = [("chatgpt_account_id", &account.id), ("chatgpt_plan_type", &account.plan)];
    for (name, value) in known {
        if let Some(value) = value {
            auth.insert(name.to_owned(), value.as_str().into());
        }
    }
    auth.insert("chatgpt_user_id".to_owned(), format!("user-{tag}").into());
    auth.insert("chatgpt_account_is_fedramp".to_owned(), account.fedramp.into());
    let mut claims = json!({
        "iat": now.unix_timestamp(),
        "exp": (now + LIFETIME).unix_timestamp(),
        "https://api.openai.com/auth": auth,
    });
    if let Some(email) = &account.email {
        claims["email"] = email.as_str().into();
        claims["https://api.openai.com/profile"] = json!({ "email": email });
    }
    claims
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::credential::claims::Claims;

    fn tag(name: &str) -> Tag {
        Tag::of(&name.parse().unwrap())
    }

    fn account() -> Account {
        Account {
            id: Some("acct-1".into()),
            email: Some("a@b.example".into()),
            plan: Some("plus".into()),
            fedramp: true,
        }
    }

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_795_402_057).unwrap()
    }

    #[test]
    fn keys_have_the_form_of_the_real_ones() {
        let table = [
            (Shape::Anthropic, "sk-ant-api03-", 95),
            (Shape::GitHub, "ghp_", 36),
            (Shape::OpenAi, "sk-", 48),
        ];
        for (shape, prefix, length) in table {
            let (one, other) = (key(tag("a"), shape), key(tag("a"), shape));
            assert_ne!(one, other);
            let rest = one.strip_prefix(prefix).unwrap();
            assert_eq!(rest.len(), length, "{one}");
            assert!(rest.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{one}");
            assert_eq!(tags_in(one.as_bytes()), [tag("a")]);
        }
    }

    #[test]
    fn a_set_says_whom_it_speaks_for() {
        let set = DecoySet::new(tag("openai"), &account(), now());
        for token in [&set.id, &set.access] {
            let claims = Claims::of(&Secret::new(token)).unwrap();
            assert_eq!(claims.email.as_deref(), Some("a@b.example"));
            assert_eq!(claims.account_id.as_deref(), Some("acct-1"));
            assert_eq!(claims.plan.as_deref(), Some("plus"));
            assert!(claims.fedramp);
            assert_eq!(claims.expires_at, Some(now() + LIFETIME));
            let signature = token.rsplit('.').next().unwrap();
            assert_eq!(URL_SAFE_NO_PAD.decode(signature).unwrap().len(), 32);
            assert_eq!(tags_in(token.as_bytes()), [tag("openai")], "once, in the signature");
        }
        assert!(set.refresh.starts_with("rt_"));
        let again = DecoySet::new(tag("openai"), &account(), now());
        assert!(set.refresh != again.refresh && set.access != again.access);
        let login = set.into_login();
        assert!(is_decoy_of(&login, tag("openai"), &account()));
        assert!(!is_decoy_of(&login, tag("other"), &account()));
        let moved = Account { plan: Some("pro".into()), ..account() };
        assert!(!is_decoy_of(&login, tag("openai"), &moved));
        let nobody = DecoySet::new(tag("openai"), &Account::default(), now()).into_login();
        assert!(is_decoy_of(&nobody, tag("openai"), &Account::default()));
    }

    #[test]
    fn one_real_secret_makes_a_login_real() {
        let decoys = || match DecoySet::new(tag("x"), &account(), now()).into_login() {
            Login::ChatGpt(set) => set,
            _ => unreachable!(),
        };
        let real = || Some(Secret::new("real"));
        let table = [
            (Login::ChatGpt(decoys()), true),
            (Login::ChatGpt(TokenSet { refresh: None, id: None, ..decoys() }), true),
            (Login::ChatGpt(TokenSet { refresh: real(), ..decoys() }), false),
            (Login::ChatGpt(TokenSet { id: real(), ..decoys() }), false),
            (Login::ChatGpt(TokenSet { access: Secret::new("real"), ..decoys() }), false),
            (Login::ApiKey(Secret::new(key(tag("x"), Shape::OpenAi))), true),
            (Login::ApiKey(Secret::new("sk-real")), false),
            (Login::Unsupported("x".into()), false),
        ];
        for (login, expected) in table {
            assert_eq!(is_decoy(&login), expected, "{login:?}");
        }
    }

    #[test]
    fn decoys_are_found_wherever_they_stand() {
        let (one, other) = (key(tag("one"), Shape::OpenAi), key(tag("other"), Shape::GitHub));
        let both = vec![tag("one"), tag("other")];
        let basic = |text: &str| format!("bAsIc {}", STANDARD.encode(text));
        let table = [
            (String::new(), vec![]),
            ("Bearer sk-real".into(), vec![]),
            (one.clone(), vec![tag("one")]),
            (format!("Bearer {one}"), vec![tag("one")]),
            (format!("a={one}; b={other}"), both.clone()),
            (basic(&format!("user:{one}")), vec![tag("one")]),
            (basic(&format!("{one}:{other}")), both),
            (basic(&format!("user:{one}")).trim_end_matches('=').into(), vec![tag("one")]),
            (basic("user:real"), vec![]),
            ("Basic ".into(), vec![]),
            ("Basic \u{1}".into(), vec![]),
            (MARK.into(), vec![]),
            (format!("{MARK}{}", tag("one")), vec![tag("one")]),
            (format!("{MARK}{}", &tag("one").to_string()[1..]), vec![]),
            (format!("{MARK}{}", tag("one").to_string().to_uppercase() + "G"), vec![]),
            (format!("{MARK}{MARK}{}", tag("one")), vec![tag("one")]),
        ];
        for (value, expected) in table {
            assert_eq!(tags_in_field(value.as_bytes()), expected, "{value}");
        }
    }
}
