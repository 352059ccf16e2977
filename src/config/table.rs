//! Reads a TOML document value by value, so that a wrong one is noted and the next one still read.

use std::fmt::Display;
use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistakes::{Mistakes, Place, closest};

/// Something that was read, and where it is written.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

impl<T: AsRef<str>> At<T> {
    /// What the text means; a text that means nothing is noted as a mistake.
    pub(super) fn parse<U, E: Display>(
        &self,
        mistakes: &Mistakes,
        parse: impl FnOnce(&str) -> Result<U, E>,
    ) -> Option<At<U>> {
        match parse(self.value.as_ref()) {
            Ok(value) => Some(At { value, place: self.place.clone() }),
            Err(error) => {
                mistakes.add(&self.place, error);
                None
            }
        }
    }
}

/// A table whose keys are all known.
#[derive(Clone)]
pub(super) struct Table<'a> {
    entries: &'a DeTable<'a>,
    place: Place,
    mistakes: &'a Mistakes,
}

impl<'a> Table<'a> {
    /// A whole document. What `known` does not name is noted as a mistake, here and in the tables below.
    pub(super) fn document(
        entries: &'a DeTable<'a>,
        place: Place,
        known: &[&str],
        mistakes: &'a Mistakes,
    ) -> Self {
        Self { entries, place, mistakes }.with_keys(known)
    }

    /// A whole document of another program: keys that we do not know are none of our business.
    pub(super) fn foreign(entries: &'a DeTable<'a>, place: Place, mistakes: &'a Mistakes) -> Self {
        Self { entries, place, mistakes }
    }

    fn with_keys(self, known: &[&str]) -> Self {
        for (key, value) in
            self.entries.iter().filter(|(key, _)| !known.contains(&key.get_ref().as_ref()))
        {
            let meant = closest(key.get_ref(), known.iter().copied());
            let hint = match (self.host_with(key.get_ref(), known), meant) {
                (Some(host), _) => format!("the port is part of the host: host = \"{host}\""),
                (None, Some(meant)) => format!("did you mean `{meant}`?"),
                (None, None) => format!("known here: {}", known.join(", ")),
            };
            // Whatever it is, it may be a key that somebody put here.
            self.mistakes.hide(&self.place.at(value.span()));
            let place = self.place.at(key.span());
            self.mistakes.add_with_hint(
                &place,
                format_args!("unknown key `{}`", key.get_ref()),
                Some(hint),
            );
        }
        self
    }

    /// The host of this table with its `port`, where that is the key and there could be a host.
    fn host_with(&self, key: &str, known: &[&str]) -> Option<String> {
        if key != "port" || !known.contains(&"host") {
            return None;
        }
        let host = self.entries.get("host").and_then(|host| host.get_ref().as_str());
        let is_of_host = |byte: u8| byte.is_ascii_alphanumeric() || b"*-.".contains(&byte);
        let host = host.filter(|host| host.bytes().all(is_of_host)).unwrap_or("HOST");
        let port = self.get(key).and_then(|port| port.number::<u16>());
        let port = port.map_or_else(|| "PORT".to_owned(), |port| port.to_string());
        Some(format!("{host}:{port}"))
    }

    /// Where its head is.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Where mistakes go.
    pub(super) fn mistakes(&self) -> &'a Mistakes {
        self.mistakes
    }

    /// Where a key is written.
    pub(super) fn key(&self, key: &str) -> Option<Place> {
        self.entries.get_key_value(key).map(|(key, _)| self.place.at(key.span()))
    }

    /// All keys and values, of a table in which every key is a name.
    pub(super) fn entries(&self) -> impl Iterator<Item = (At<&'a str>, Value<'a>)> {
        self.entries.iter().map(|(key, value)| {
            let key = At { value: &**key.get_ref(), place: self.place.at(key.span()) };
            (key, self.value(value))
        })
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<Value<'a>> {
        self.entries.get(key).map(|value| self.value(value))
    }

    /// What the text of a key means.
    pub(super) fn parsed<T, E: Display>(
        &self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<At<T>> {
        self.get(key)?.text()?.parse(self.mistakes, parse)
    }

    /// What each text of a list means; no such key is an empty list.
    pub(super) fn parsed_list<T, E: Display>(
        &self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Vec<At<T>> {
        let items = self.get(key).map(|list| list.items()).unwrap_or_default();
        items.iter().filter_map(|item| item.text()?.parse(self.mistakes, &parse)).collect()
    }

    fn value(&self, value: &'a Spanned<DeValue<'a>>) -> Value<'a> {
        Value {
            value: value.get_ref(),
            place: self.place.at(value.span()),
            mistakes: self.mistakes,
        }
    }
}

/// A value. One of another type than the asked one is noted as a mistake.
pub(super) struct Value<'a> {
    value: &'a DeValue<'a>,
    place: Place,
    mistakes: &'a Mistakes,
}

impl<'a> Value<'a> {
    /// Where it is written.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// A string.
    pub(super) fn text(&self) -> Option<At<&'a str>> {
        let text = self.value.as_str().or_else(|| self.is_no("a string", None))?;
        Some(At { value: text, place: self.place.clone() })
    }

    /// `true` or `false`.
    pub(super) fn flag(&self) -> Option<bool> {
        self.value.as_bool().or_else(|| self.is_no("`true` or `false`", None))
    }

    /// The number of a user.
    pub(super) fn uid(&self) -> Option<u32> {
        let name = self.value.as_str().filter(|name| is_user(name)).unwrap_or("NAME");
        let hint = || Some(format!("the number: id -u {name}"));
        // (uid_t) -1 is nobody: chown(2) has it for "as it is".
        let number = self.number().filter(|number| *number != u32::MAX);
        number.or_else(|| self.is_no("the number of a user", hint()))
    }

    /// A number, if it is one that fits. Nothing is noted.
    pub(super) fn number<N: TryFrom<u64>>(&self) -> Option<N> {
        let digits = self.value.as_integer()?;
        let number = u64::from_str_radix(digits.as_str(), digits.radix()).ok()?;
        number.try_into().ok()
    }

    /// A number within these bounds.
    pub(super) fn number_in(&self, bounds: &RangeInclusive<u32>) -> Option<u32> {
        let number = self.number().filter(|number| bounds.contains(number));
        if number.is_none() {
            let (least, most) = (bounds.start(), bounds.end());
            let message = format_args!("expected a number from {least} to {most}");
            self.mistakes.add(&self.place, message);
        }
        number
    }

    /// The values of a list.
    pub(super) fn items(&self) -> Vec<Self> {
        let item = |value: &'a Spanned<DeValue<'a>>| Self {
            value: value.get_ref(),
            place: self.place.at(value.span()),
            mistakes: self.mistakes,
        };
        let list = self.value.as_array().or_else(|| self.is_no("a list", None));
        list.map(|list| list.iter().map(item).collect()).unwrap_or_default()
    }

    /// A string, or the strings of a list.
    pub(super) fn texts(&self) -> Vec<At<&'a str>> {
        match self.value {
            DeValue::Array(_) => self.items().iter().filter_map(Self::text).collect(),
            DeValue::String(_) => self.text().into_iter().collect(),
            _ => self.is_no("a string or a list of strings", None).unwrap_or_default(),
        }
    }

    /// A table with these keys.
    pub(super) fn table(&self, known: &[&str]) -> Option<Table<'a>> {
        self.names().map(|table| table.with_keys(known))
    }

    /// A table in which every key is a name.
    pub(super) fn names(&self) -> Option<Table<'a>> {
        let entries = self.value.as_table().or_else(|| self.is_no("a table", None))?;
        Some(Table { entries, place: self.place.clone(), mistakes: self.mistakes })
    }

    /// Notes that it is of another type, with something to do about it.
    pub(super) fn is_no<T>(&self, wanted: &str, hint: Option<String>) -> Option<T> {
        let found = self.value.type_str();
        let article = if found.starts_with(['a', 'i']) { "an" } else { "a" };
        let message = format_args!("expected {wanted}, found {article} {found}");
        self.mistakes.add_with_hint(&self.place, message, hint);
        None
    }
}

/// Whether a text can be the name of a user (useradd(8)), and is no secret that stands in the wrong place.
fn is_user(text: &str) -> bool {
    let is_of_name = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-'
    };
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.len() <= 32
        && text.bytes().all(is_of_name)
}

/// Reads one of a few words.
pub(super) fn one_of<T: Copy>(words: &[(&str, T)]) -> impl Fn(&str) -> Result<T, String> {
    |text| {
        let known = words.iter().find(|(word, _)| *word == text);
        known.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let meant = closest(text, words.iter().map(|(word, _)| *word));
            let meant = meant.map(|word| format!("; did you mean `{word}`?")).unwrap_or_default();
            let words: Vec<String> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
            format!("expected {}{meant}", words.join(" or "))
        })
    }
}
