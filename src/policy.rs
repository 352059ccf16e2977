//! Says which logins the owner of the machine allows, in Codex's words where it has some.

use std::fmt;

use crate::credential::claims::Claims;
use crate::credential::{Login, LoginKind, PersonalToken};

/// What the owner of the machine allows: every limit at once, so that one more can only narrow. The
/// default allows everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    limits: Vec<Limit>,
}

/// One thing that somebody asks of logins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What is asked.
    pub demand: Demand,
    /// What becomes of a stored login that does not meet it.
    pub level: Level,
    /// Where it is said, as people know the place: the path of a file.
    pub place: String,
}

/// What can be asked of a login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// It is of one of these kinds; empty allows none.
    Methods(Vec<LoginKind>),
    /// A ChatGPT login is for one of these workspaces; empty allows none. API keys pass.
    Workspaces(Vec<String>),
    /// A ChatGPT login says that it was made with a second factor. API keys pass.
    SecondFactor,
}

/// How a limit is enforced. The lower one is enforced first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A stored login that does not meet it is deleted: `forced_*` in Codex's words.
    Forced,
    /// A stored login that does not meet it is ignored and kept: `allowed_*` in Codex's words.
    Required,
}

/// A way to sign in, before anything has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Saving an API key.
    ApiKey,
    /// Signing in to ChatGPT, in a browser or with a device code.
    ChatGpt,
    /// Saving a personal access token.
    AccessToken,
}

/// Why a stored login must not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Violation {
    /// One sentence, Codex's own where it has one.
    pub sentence: String,
    /// Whether the stored login is to be deleted; else it is ignored and kept.
    pub deletes: bool,
}

impl Policy {
    /// A policy of all these limits.
    pub fn new(limits: Vec<Limit>) -> Self {
        Self { limits }
    }

    /// A policy that allows nothing, for when nobody knows what is allowed; no login is deleted for it.
    /// `place` is what could not be read.
    pub fn unknown(place: &str) -> Self {
        let place = format!("{place}, which cannot be read");
        let demand = Demand::Methods(Vec::new());
        Self { limits: vec![Limit { demand, level: Level::Required, place }] }
    }

    /// Every limit, as it was given.
    pub fn limits(&self) -> &[Limit] {
        &self.limits
    }

    /// Whether a stored login may be used. One that Codex has no words for may.
    ///
    /// # Errors
    ///
    /// [`Violation`], the one that deletes first.
    pub fn judge(&self, login: &Login) -> Result<(), Violation> {
        let Some(facts) = Facts::of(login) else { return Ok(()) };
        let Some(limit) = self.first_broken(&facts) else { return Ok(()) };
        // Limits that no login can meet are a mistake in somebody's file, which must not cost a login.
        let deletes = limit.level == Level::Forced && !self.allows_nothing(limit);
        let logging_out = if deletes { " Logging out." } else { "" };
        let sentence = self.sentence_of_stored(limit, &facts);
        Err(Violation { sentence: format!("{sentence}{logging_out}"), deletes })
    }

    /// Whether somebody may begin to sign in this way.
    ///
    /// # Errors
    ///
    /// The sentence that says why not.
    pub fn judge_method(&self, method: Method) -> Result<(), String> {
        let kind = method.kind();
        if self.methods().any(|(allowed, _)| !allowed.contains(&kind)) {
            return Err(self.no_method().unwrap_or_else(|| method.is_disabled().to_owned()));
        }
        match self.no_workspace() {
            Some(sentence) if kind == LoginKind::ChatGpt => Err(sentence),
            _ => Ok(()),
        }
    }

    /// Whether what came of signing in may be saved.
    ///
    /// # Errors
    ///
    /// The sentence that says why not.
    pub fn judge_new(&self, login: &Login) -> Result<(), String> {
        let Some(facts) = Facts::of(login) else { return Ok(()) };
        self.judge_method(facts.method)?;
        match self.first_broken(&facts) {
            Some(limit) => Err(self.sentence_of_new(limit, &facts)),
            None => Ok(()),
        }
    }

    /// The workspaces that a login must be for; `None` where any will do.
    pub fn workspaces(&self) -> Option<Vec<&str>> {
        let mut sets = self.workspace_sets().map(|(ids, _)| ids);
        let mut common: Vec<&str> = sets.next()?.iter().map(String::as_str).collect();
        for set in sets {
            common.retain(|id| set.iter().any(|other| other == id));
        }
        Some(common)
    }

    /// The limit that is enforced first among those that are not met.
    fn first_broken(&self, facts: &Facts) -> Option<&Limit> {
        let broken = self.limits.iter().filter(|limit| !facts.meet(&limit.demand));
        broken.min_by_key(|limit| (limit.level, limit.demand.rank()))
    }

    fn sentence_of_stored(&self, limit: &Limit, facts: &Facts) -> String {
        match (&limit.demand, facts.kind()) {
            (Demand::Methods(_), kind) => self.no_method().unwrap_or_else(|| match kind {
                LoginKind::ApiKey => {
                    "ChatGPT login is required, but an API key is currently being used.".to_owned()
                }
                LoginKind::ChatGpt | LoginKind::OAuth => {
                    "API key login is required, but ChatGPT is currently being used.".to_owned()
                }
            }),
            (Demand::Workspaces(_), _) => self.no_workspace().unwrap_or_else(|| {
                let ids = self.workspaces().unwrap_or_default().join(", ");
                let whose = match &facts.workspace {
                    Workspace::Is(id) => match &facts.named {
                        Some(named) => format!("belong to {id} and name {named}"),
                        None => format!("belong to {id}"),
                    },
                    Workspace::Missing | Workspace::Unasked => {
                        "lack a workspace identifier".to_owned()
                    }
                };
                format!(
                    "Login is restricted to workspace(s) {ids}, but current credentials {whose}."
                )
            }),
            (Demand::SecondFactor, _) => facts.second_factor_missing(&limit.place),
        }
    }

    fn sentence_of_new(&self, limit: &Limit, facts: &Facts) -> String {
        match &limit.demand {
            Demand::Methods(_) => facts.method.is_disabled().to_owned(),
            Demand::Workspaces(_) => {
                let ids = self.workspaces().unwrap_or_default().join(", ");
                let restricted = format!("Login is restricted to workspace id(s) {ids}");
                match facts.workspace {
                    Workspace::Is(_) => format!("{restricted}."),
                    // Codex's own words, its grammar too.
                    Workspace::Missing | Workspace::Unasked => format!(
                        "{restricted}, but the token did not include an chatgpt_account_id claim."
                    ),
                }
            }
            Demand::SecondFactor => facts.second_factor_missing(&limit.place),
        }
    }

    fn methods(&self) -> impl Iterator<Item = (&[LoginKind], &str)> {
        self.limits.iter().filter_map(|limit| match &limit.demand {
            Demand::Methods(kinds) => Some((kinds.as_slice(), limit.place.as_str())),
            Demand::Workspaces(_) | Demand::SecondFactor => None,
        })
    }

    fn workspace_sets(&self) -> impl Iterator<Item = (&[String], &str)> {
        self.limits.iter().filter_map(|limit| match &limit.demand {
            Demand::Workspaces(ids) => Some((ids.as_slice(), limit.place.as_str())),
            Demand::Methods(_) | Demand::SecondFactor => None,
        })
    }

    fn allows_nothing(&self, limit: &Limit) -> bool {
        match limit.demand {
            Demand::Methods(_) => self.no_method().is_some(),
            Demand::Workspaces(_) => self.no_workspace().is_some(),
            Demand::SecondFactor => false,
        }
    }

    /// The sentence for limits that allow no method together.
    fn no_method(&self) -> Option<String> {
        Some(nothing_left("login method", &clash(&self.methods().collect::<Vec<_>>())?))
    }

    /// The sentence for limits that allow no workspace together.
    fn no_workspace(&self) -> Option<String> {
        Some(nothing_left("workspace", &clash(&self.workspace_sets().collect::<Vec<_>>())?))
    }
}

impl Method {
    fn kind(self) -> LoginKind {
        match self {
            Self::ApiKey => LoginKind::ApiKey,
            Self::ChatGpt | Self::AccessToken => LoginKind::ChatGpt,
        }
    }

    fn is_disabled(self) -> &'static str {
        match self {
            Self::ApiKey => "API key login is disabled. Use ChatGPT login instead.",
            Self::ChatGpt => "ChatGPT login is disabled. Use API key login instead.",
            Self::AccessToken => "Access token login is disabled. Use API key login instead.",
        }
    }
}

impl Demand {
    /// Which is spoken of first.
    fn rank(&self) -> u8 {
        match self {
            Self::Methods(_) => 0,
            Self::Workspaces(_) => 1,
            Self::SecondFactor => 2,
        }
    }
}

/// The limit as a file says it, without the file.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let forced = self.level == Level::Forced;
        match &self.demand {
            Demand::Methods(kinds) => {
                let key = if forced { "forced_login_method" } else { "allowed_login_methods" };
                let words: Vec<&str> = kinds.iter().map(|kind| word_of(*kind)).collect();
                write!(f, "{key} = ")?;
                write_texts(f, &words, !forced)
            }
            Demand::Workspaces(ids) => {
                let key = match forced {
                    true => "forced_chatgpt_workspace_id",
                    false => "allowed_chatgpt_workspaces",
                };
                let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                write!(f, "{key} = ")?;
                write_texts(f, &ids, !forced)
            }
            Demand::SecondFactor => f.write_str("require_mfa = true"),
        }
    }
}

/// A text, or a list where it must be one or there is more than one.
fn write_texts(f: &mut fmt::Formatter<'_>, texts: &[&str], is_list: bool) -> fmt::Result {
    match texts {
        [text] if !is_list => write!(f, "{text:?}"),
        texts => write!(f, "{texts:?}"),
    }
}

fn word_of(kind: LoginKind) -> &'static str {
    let word = METHODS.iter().find(|(_, known)| *known == kind);
    word.map_or(kind.as_str(), |(word, _)| word)
}

/// The words for methods in files, Codex's and ours.
pub const METHODS: [(&str, LoginKind); 2] =
    [("chatgpt", LoginKind::ChatGpt), ("api", LoginKind::ApiKey)];

/// What a policy looks at in a login.
struct Facts {
    method: Method,
    workspace: Workspace,
    /// The workspace that requests name, or that the access token is for, where that is another one.
    named: Option<String>,
    /// Whether there was a second factor; `None` where nothing says.
    mfa: Option<bool>,
}

/// Which workspace a login is for.
enum Workspace {
    /// This one.
    Is(String),
    /// It should say, and does not.
    Missing,
    /// It need not say: an API key, or a token that the issuer was not asked about yet.
    Unasked,
}

impl Facts {
    /// `None` for a login that Codex knows nothing of.
    fn of(login: &Login) -> Option<Self> {
        match login {
            Login::ApiKey(_) => Some(Self {
                method: Method::ApiKey,
                workspace: Workspace::Unasked,
                named: None,
                mfa: None,
            }),
            Login::ChatGpt(set) => {
                let claims = set.id_claims();
                // The id token is not shown to anybody, so it alone proves little.
                let access = Claims::of(&set.access).unwrap_or_default();
                let is_other = |id: &String| Some(id) != claims.account_id.as_ref();
                let named = [set.account_id.clone(), access.account_id];
                let named = named.into_iter().flatten().find(is_other);
                let workspace = Workspace::stated(claims.account_id);
                Some(Self {
                    method: Method::ChatGpt,
                    workspace,
                    named,
                    mfa: access.mfa.or(claims.mfa),
                })
            }
            Login::Personal(PersonalToken { account, .. }) => {
                let workspace = match account {
                    Some(account) => Workspace::stated(account.id.clone()),
                    None => Workspace::Unasked,
                };
                Some(Self { method: Method::AccessToken, workspace, named: None, mfa: None })
            }
            Login::OAuth(_) | Login::Unsupported(_) => None,
        }
    }

    fn kind(&self) -> LoginKind {
        self.method.kind()
    }

    fn meet(&self, demand: &Demand) -> bool {
        match (demand, &self.workspace) {
            (Demand::Methods(kinds), _) => kinds.contains(&self.kind()),
            (Demand::Workspaces(ids), Workspace::Is(id)) => {
                ids.contains(id) && self.named.as_ref().is_none_or(|named| ids.contains(named))
            }
            (Demand::Workspaces(_), Workspace::Missing) => false,
            (Demand::Workspaces(_), Workspace::Unasked) => true,
            // Nobody signs in to have an API key: who does not want those forbids the method.
            (Demand::SecondFactor, _) => self.kind() == LoginKind::ApiKey || self.mfa == Some(true),
        }
    }

    fn second_factor_missing(&self, place: &str) -> String {
        let why = match (self.mfa, self.method) {
            (Some(_), _) => "this account was signed in without a second factor",
            (None, Method::AccessToken) => {
                "an access token does not say whether a second factor was used"
            }
            (None, _) => "the id token does not say whether a second factor was used",
        };
        format!("A second factor is required by {place}, but {why}.")
    }
}

impl Workspace {
    fn stated(id: Option<String>) -> Self {
        id.filter(|id| !id.is_empty()).map_or(Self::Missing, Self::Is)
    }
}

/// The places of sets that have nothing in common, as few as it takes; `None` where something is left.
fn clash<'a, T: PartialEq>(sets: &[(&'a [T], &'a str)]) -> Option<Vec<&'a str>> {
    let (first, rest) = sets.split_first()?;
    if first.0.iter().any(|it| rest.iter().all(|(other, _)| other.contains(it))) {
        return None;
    }
    if let Some((_, place)) = sets.iter().find(|(set, _)| set.is_empty()) {
        return Some(vec![place]);
    }
    let pairs = sets
        .iter()
        .enumerate()
        .flat_map(|(at, one)| sets.iter().skip(at + 1).map(move |other| (one, other)));
    let mut apart = pairs.filter(|(one, other)| !one.0.iter().any(|it| other.0.contains(it)));
    let mut places: Vec<&str> = match apart.next() {
        Some((one, other)) => vec![one.1, other.1],
        // Each two of them have something in common, all have nothing.
        None => sets.iter().map(|(_, place)| *place).collect(),
    };
    places.dedup();
    Some(places)
}

fn nothing_left(what: &str, places: &[&str]) -> String {
    match places {
        [place] => format!("No {what} is allowed by {place}."),
        places => {
            format!("No {what} is allowed: {} have none in common.", places.join(" and "))
        }
    }
}

#[cfg(test)]
mod tests;
