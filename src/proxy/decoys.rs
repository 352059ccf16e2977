//! Judges the decoys in a request: each must stand where a rule puts the credential that it stands for.

use std::collections::BTreeMap;

use http::header::{HeaderMap, HeaderName};
use http::{Request, Uri};

use crate::credential::CredentialName;
use crate::decoy::{self, Tag};
use crate::inject::Injection;
use crate::rules::{Action, Rule};
use crate::tokens::Tokens;

/// The credentials of this proxy by the tags of their decoys.
pub(super) struct Decoys(BTreeMap<Tag, CredentialName>);

/// A decoy where nothing would put a credential in its place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Misplaced {
    /// The rule that covers the request speaks of `used`.
    #[error(
        "the request holds a decoy of credential `{held}`, and the rule for it speaks of `{used}`"
    )]
    Another { held: CredentialName, used: CredentialName },
    /// The rule signs the request in with that credential, and leaves this part of it as it is.
    #[error("a decoy of credential `{held}` stands in {place}, which the rule does not replace")]
    Elsewhere { held: CredentialName, place: Place, fields: String },
    /// The login is another account's by now.
    #[error(
        "the decoys of credential `{0}` that the client holds are of another account than the login"
    )]
    Moved(CredentialName),
    /// The credential does not exist here.
    #[error("the request holds a decoy of a credential that this proxy does not have")]
    Nobodys,
    /// No rule signs the request in.
    #[error("the request holds a decoy of credential `{0}`, and no rule signs this request in")]
    Unruled(CredentialName),
}

/// A part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// What it brings along.
    Body,
    /// A header field.
    Field(HeaderName),
    /// Its path and query.
    Uri,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Body => f.write_str("the body"),
            Self::Field(name) => write!(f, "the field `{name}`"),
            Self::Uri => f.write_str("the URL"),
        }
    }
}

impl Misplaced {
    /// What to do about it.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::Another { used, .. } => {
                format!("give the client a decoy of that one: valetkey init decoy {used}")
            }
            Self::Elsewhere { fields, .. } if !fields.is_empty() => {
                format!("have the client send it in: {fields}")
            }
            Self::Elsewhere { .. } | Self::Unruled(_) => "see: valetkey explain URL".to_owned(),
            Self::Moved(held) => {
                format!("make them anew: valetkey init codex --credential {held}")
            }
            Self::Nobodys => {
                "give the client a decoy of one that is in: valetkey status".to_owned()
            }
        }
    }
}

impl Decoys {
    /// Those of these credentials.
    pub(super) fn of(tokens: &Tokens) -> Self {
        Self(tokens.iter().map(|(name, _)| (Tag::of(name), name.clone())).collect())
    }

    /// Looks at the head of a request that is covered by `rule`, or by none; says whether it holds a decoy.
    ///
    /// # Errors
    ///
    /// [`Misplaced`] for the first decoy that the rule does not replace.
    pub(super) fn check<B>(
        &self,
        request: &Request<B>,
        rule: Option<&Rule>,
    ) -> Result<bool, Misplaced> {
        let mut holds_one = false;
        for tag in tags_in_uri(request.uri()) {
            self.judge(tag, rule, Place::Uri)?;
        }
        for (name, value) in request.headers() {
            for tag in decoy::tags_in_field(value.as_bytes()) {
                self.judge(tag, rule, Place::Field(name.clone()))?;
                holds_one = true;
            }
        }
        Ok(holds_one)
    }

    /// Looks at the body of a token request of `credential`: the token that it shows must be a decoy of that
    /// one if any other part is a decoy. `all` are the tags in the body, `shown` those in that token.
    ///
    /// # Errors
    ///
    /// [`Misplaced`] for the first decoy of another one, and for one elsewhere in the body.
    pub(super) fn check_body(
        &self,
        all: &[Tag],
        shown: &[Tag],
        credential: &CredentialName,
    ) -> Result<(), Misplaced> {
        for tag in all.iter().chain(shown) {
            let held = self.0.get(tag).ok_or(Misplaced::Nobodys)?.clone();
            if held != *credential {
                return Err(Misplaced::Another { held, used: credential.clone() });
            }
        }
        if shown.is_empty() && !all.is_empty() {
            let (held, fields) = (credential.clone(), String::new());
            return Err(Misplaced::Elsewhere { held, place: Place::Body, fields });
        }
        Ok(())
    }

    fn judge(&self, tag: Tag, rule: Option<&Rule>, place: Place) -> Result<(), Misplaced> {
        let held = self.0.get(&tag).ok_or(Misplaced::Nobodys)?.clone();
        let Some(Action::Inject { uses, injection }) = rule.map(|rule| &rule.action) else {
            return Err(Misplaced::Unruled(held));
        };
        if held != uses.credential {
            return Err(Misplaced::Another { held, used: uses.credential.clone() });
        }
        match &place {
            Place::Field(name) if injection.touches(name) => Ok(()),
            _ => Err(Misplaced::Elsewhere { held, place, fields: fields_of(injection) }),
        }
    }
}

/// Takes every trailer out that holds a decoy: what was ahead of it is under way and cannot be refused any more.
pub(super) fn strip_trailers(trailers: &mut HeaderMap) {
    let holds_one = |name: &&HeaderName| {
        trailers.get_all(*name).iter().any(|it| !decoy::tags_in_field(it.as_bytes()).is_empty())
    };
    let found: Vec<HeaderName> = trailers.keys().filter(holds_one).cloned().collect();
    for name in found {
        trailers.remove(name);
    }
}

fn tags_in_uri(uri: &Uri) -> Vec<Tag> {
    uri.path_and_query().map(|it| decoy::tags_in(it.as_str().as_bytes())).unwrap_or_default()
}

/// The fields that an injection puts the credential into.
fn fields_of(injection: &Injection) -> String {
    let names: Vec<&str> = injection.templates().map(|(name, _)| name.as_str()).collect();
    names.join(", ")
}
