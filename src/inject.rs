//! Puts a credential into a request's header fields, after taking the client's own values out.

use std::fmt;
use std::str::FromStr;

use arc_swap::ArcSwapOption;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::credential::{Credential, Field};
use crate::headers::may_be_injected;
pub use crate::secret::UnfitSecret;

/// What a rule does to the header fields of a request.
///
/// Invariants: every name may be injected ([`may_be_injected`]) and is set at most once. Header values
/// are made once per value of the credential, not per request.
#[derive(Debug)]
pub struct Injection {
    set: Vec<(HeaderName, Template)>,
    remove: Vec<HeaderName>,
    rendered: ArcSwapOption<Rendered>,
}

#[derive(Debug)]
struct Rendered {
    serial: u64,
    values: Vec<(HeaderName, HeaderValue)>,
}

impl Injection {
    /// An injection that sets `set` and takes out `remove`.
    ///
    /// # Errors
    ///
    /// [`BadInjection`] for a field that a rule must not touch and for one that is set twice.
    pub fn new(
        set: Vec<(HeaderName, Template)>,
        remove: Vec<HeaderName>,
    ) -> Result<Self, BadInjection> {
        for (at, (name, _)) in set.iter().enumerate() {
            if set[..at].iter().any(|(earlier, _)| earlier == name) {
                return Err(BadInjection::Twice(name.clone()));
            }
        }
        for name in set.iter().map(|(name, _)| name).chain(&remove) {
            if !may_be_injected(name) {
                return Err(BadInjection::Forbidden(name.clone()));
            }
        }
        Ok(Self { set, remove, rendered: ArcSwapOption::empty() })
    }

    /// Takes the client's values of every field that this sets or removes out of the request, any
    /// number of them, then sets ours. A field whose template has an empty field is not set.
    ///
    /// # Errors
    ///
    /// [`UnfitSecret`] when a value cannot stand in a header; the client's values are out by then.
    pub fn apply(
        &self,
        headers: &mut HeaderMap,
        credential: &Credential,
    ) -> Result<(), UnfitSecret> {
        self.strip(headers);
        let rendered = self.rendered.load();
        if let Some(rendered) =
            rendered.as_ref().filter(|ready| ready.serial == credential.serial())
        {
            insert_all(headers, &rendered.values);
            return Ok(());
        }
        let values = self.render(credential)?;
        insert_all(headers, &values);
        self.rendered.store(Some(Rendered { serial: credential.serial(), values }.into()));
        Ok(())
    }

    /// Takes the client's values out and sets nothing: for the trailers of a request.
    pub fn strip(&self, headers: &mut HeaderMap) {
        for name in self.set.iter().map(|(name, _)| name).chain(&self.remove) {
            headers.remove(name);
        }
    }

    /// Whether no value of the client's own in this field goes on.
    pub fn touches(&self, name: &HeaderName) -> bool {
        self.set.iter().any(|(set, _)| set == name) || self.remove.contains(name)
    }

    /// Whether the client names another account than the credential's, in a field that is set to the account.
    pub fn contradicts(&self, headers: &HeaderMap, credential: &Credential) -> bool {
        let account = credential.account().field(Field::AccountId).map(str::as_bytes);
        let is_account = |template: &Template| template.0 == [Part::Field(Field::AccountId)];
        let named = self.set.iter().filter(|(_, template)| is_account(template));
        named.flat_map(|(name, _)| headers.get_all(name)).any(|it| Some(it.as_bytes()) != account)
    }

    /// The fields that are set, with their templates, for people to read.
    pub fn templates(&self) -> impl Iterator<Item = (&HeaderName, &Template)> {
        self.set.iter().map(|(name, template)| (name, template))
    }

    /// The fields that are taken out and not set.
    pub fn removed(&self) -> &[HeaderName] {
        &self.remove
    }

    fn render(
        &self,
        credential: &Credential,
    ) -> Result<Vec<(HeaderName, HeaderValue)>, UnfitSecret> {
        self.set
            .iter()
            .filter_map(|(name, template)| match template.render(credential) {
                Ok(Some(value)) => Some(Ok((name.clone(), value))),
                Ok(None) => None,
                Err(unfit) => Some(Err(unfit)),
            })
            .collect()
    }
}

fn insert_all(headers: &mut HeaderMap, values: &[(HeaderName, HeaderValue)]) {
    for (name, value) in values {
        headers.insert(name, value.clone());
    }
}

/// The value of a header field with places for a credential's fields: `Bearer {token}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Field(Field),
    Literal(String),
}

impl Template {
    /// The template that is nothing but the token.
    pub fn token() -> Self {
        Self(vec![Part::Field(Field::Token)])
    }

    /// The fields that it has places for.
    pub fn fields(&self) -> impl Iterator<Item = Field> {
        self.0.iter().filter_map(|part| match part {
            Part::Field(field) => Some(*field),
            Part::Literal(_) => None,
        })
    }

    /// `None` when one of its fields is empty.
    fn render(&self, credential: &Credential) -> Result<Option<HeaderValue>, UnfitSecret> {
        // Wiped on drop: the header value keeps the only copy that stays.
        let mut text = zeroize::Zeroizing::new(String::new());
        for part in &self.0 {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Field(Field::Token) => {
                    credential.token().check_field_value()?;
                    text.push_str(credential.token().expose());
                }
                Part::Field(field) => match credential.account().field(*field) {
                    Some(value) => text.push_str(value),
                    None => return Ok(None),
                },
            }
        }
        let mut value = HeaderValue::from_str(&text).map_err(|_| UnfitSecret::Octet { at: 0 })?;
        // Keeps it out of `Debug` and out of the HPACK table.
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl FromStr for Template {
    type Err = BadTemplate;

    /// Reads literal text with `{field}` in it; `{}` means `{token}`.
    fn from_str(text: &str) -> Result<Self, BadTemplate> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find(['{', '}']) {
            let (literal, tail) = rest.split_at(open);
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.to_owned()));
            }
            let tail = tail.strip_prefix('{').ok_or(BadTemplate::Brace)?;
            let (name, tail) = tail.split_once('}').ok_or(BadTemplate::Brace)?;
            let field = if name.is_empty() { Some(Field::Token) } else { Field::named(name) };
            parts.push(Part::Field(field.ok_or_else(|| BadTemplate::Field(name.to_owned()))?));
            rest = tail;
        }
        if !rest.is_empty() {
            parts.push(Part::Literal(rest.to_owned()));
        }
        if parts.is_empty() {
            return Err(BadTemplate::Empty);
        }
        if HeaderValue::from_str(text).is_err() {
            return Err(BadTemplate::Octet);
        }
        Ok(Self(parts))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.0 {
            match part {
                Part::Literal(literal) => f.write_str(literal)?,
                Part::Field(field) => {
                    let name = Field::ALL
                        .iter()
                        .find(|(_, known)| known == field)
                        .map_or("", |(name, _)| name);
                    write!(f, "{{{name}}}")?;
                }
            }
        }
        Ok(())
    }
}

/// A list of header fields that no rule may have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadInjection {
    /// The field frames the message or belongs to the connection.
    #[error("`{0}` is not for rules to set or remove")]
    Forbidden(HeaderName),
    /// The field is set twice.
    #[error("`{0}` is set twice")]
    Twice(HeaderName),
}

/// A text that is no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTemplate {
    /// A brace without its partner.
    #[error("a `{{` or `}}` has no partner")]
    Brace,
    /// Nothing to send.
    #[error("the value is empty")]
    Empty,
    /// No credential has such a field.
    #[error("unknown field `{0}`: one of account_id, email, fedramp, plan, token")]
    Field(String),
    /// A character that cannot stand in a header field.
    #[error("the value has a character that no header field may have")]
    Octet,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::{Account, LoginKind};
    use crate::secret::Secret;

    fn injection() -> Injection {
        Injection::new(
            vec![
                (http::header::AUTHORIZATION, "Bearer {token}".parse().unwrap()),
                (HeaderName::from_static("chatgpt-account-id"), "{account_id}".parse().unwrap()),
            ],
            vec![HeaderName::from_static("openai-organization")],
        )
        .unwrap()
    }

    fn credential(token: &str, account: Option<&str>) -> Credential {
        let account = Account { id: account.map(str::to_owned), ..Account::default() };
        Credential::new(LoginKind::ChatGpt, Secret::new(token), account)
    }

    #[test]
    fn the_clients_own_values_never_mix_in() {
        for copies in [0, 1, 2, 100] {
            let mut headers = HeaderMap::new();
            for copy in 0..copies {
                for name in ["Authorization", "ChatGPT-Account-ID", "OpenAI-Organization", "x-kept"]
                {
                    let name: HeaderName = name.parse().unwrap();
                    headers.append(name, format!("client-{copy}").parse().unwrap());
                }
            }
            injection().apply(&mut headers, &credential("tok", None)).unwrap();
            let values: Vec<_> = headers.get_all("authorization").iter().collect();
            assert_eq!(values, ["Bearer tok"]);
            assert!(!headers.contains_key("chatgpt-account-id"), "its field is empty");
            assert!(!headers.contains_key("openai-organization"));
            assert_eq!(headers.get_all("x-kept").iter().count(), copies);
        }
    }

    #[test]
    fn an_account_is_contradicted_by_another_one_alone() {
        let table: [(&[&str], Option<&str>, bool); 6] = [
            (&[], Some("acct-1"), false),
            (&["acct-1"], Some("acct-1"), false),
            (&["acct-2"], Some("acct-1"), true),
            (&["acct-1", "acct-2"], Some("acct-1"), true),
            (&[], None, false),
            (&["acct-1"], None, true),
        ];
        for (named, account, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", HeaderValue::from_static("anything"));
            for value in named {
                headers.append("chatgpt-account-id", value.parse().unwrap());
            }
            let credential = credential("tok", account);
            assert_eq!(injection().contradicts(&headers, &credential), expected, "{named:?}");
        }
    }

    #[test]
    fn a_new_value_is_rendered_anew() {
        let injection = injection();
        let mut headers = HeaderMap::new();
        injection.apply(&mut headers, &credential("one", Some("acct-1"))).unwrap();
        injection.apply(&mut headers, &credential("two", Some("acct-2"))).unwrap();
        assert_eq!(headers["authorization"], "Bearer two");
        assert_eq!(headers["chatgpt-account-id"], "acct-2");
        assert!(headers["authorization"].is_sensitive());
    }

    #[test]
    fn an_unfit_secret_is_not_sent_nor_is_the_clients() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static("client"));
        let outcome = injection().apply(&mut headers, &credential("a\r\nb", None));
        assert_eq!(outcome, Err(UnfitSecret::Octet { at: 1 }));
        assert!(!headers.contains_key("authorization"));
    }

    #[test]
    fn templates() {
        let table = [
            ("Bearer {token}", Ok("Bearer {token}")),
            ("Basic {}", Ok("Basic {token}")),
            ("{account_id}/{plan}", Ok("{account_id}/{plan}")),
            ("plain", Ok("plain")),
            ("", Err(BadTemplate::Empty)),
            ("{token", Err(BadTemplate::Brace)),
            ("token}", Err(BadTemplate::Brace)),
            ("{secret}", Err(BadTemplate::Field("secret".into()))),
            ("a\nb", Err(BadTemplate::Octet)),
        ];
        for (text, expected) in table {
            let got = text.parse::<Template>().map(|template| template.to_string());
            assert_eq!(got, expected.map(str::to_owned), "{text:?}");
        }
    }

    #[test]
    fn some_fields_are_not_for_rules() {
        let twice = vec![
            (http::header::COOKIE, Template::token()),
            (http::header::COOKIE, Template::token()),
        ];
        assert_eq!(
            Injection::new(twice, vec![]).unwrap_err(),
            BadInjection::Twice(http::header::COOKIE)
        );
        let host = vec![http::header::HOST];
        assert_eq!(
            Injection::new(vec![], host).unwrap_err(),
            BadInjection::Forbidden(http::header::HOST)
        );
    }
}
