//! What the pretend issuer knows: who signed in, which tokens descend from that, and what each is worth.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Instant;

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

use super::authorize::Desk as AuthorizeDesk;
use super::device::Devices;
use super::form::Form;
use super::{Dialect, Fault, Person, PretendLogin, Revocation};
use crate::secret::{Fingerprint, Secret};

/// What a bearer token is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sandbox) enum Standing {
    Absent,
    Current,
    Expired,
    Revoked,
    Unknown,
}

/// What a client was granted; every token says it.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// Empty where the client named none.
    pub(super) audience: String,
    pub(super) dialect: Dialect,
    /// `None` when the client speaks for itself.
    pub(super) person: Option<Person>,
    pub(super) scope: String,
}

impl Grant {
    /// A login with Codex, which names neither.
    pub(super) fn codex(person: Person) -> Self {
        let (audience, scope) = (String::new(), String::new());
        Self { audience, dialect: Dialect::Codex, person: Some(person), scope }
    }

    /// A login at the other host, made to order: no client has named anything.
    pub(super) fn unasked(person: Person) -> Self {
        Self { dialect: Dialect::Standard, ..Self::codex(person) }
    }

    /// What the form asks for, on behalf of a person or of the client itself.
    pub(super) fn standard(person: Option<Person>, form: &Form) -> Self {
        let (audience, scope) = (form.audience().to_owned(), form.get("scope").to_owned());
        Self { audience, dialect: Dialect::Standard, person, scope }
    }
}

/// Everything the issuer knows.
#[derive(Default)]
pub(super) struct Ledger {
    /// The family of each, and when it ends; a personal token does not.
    access: HashMap<Fingerprint, (usize, Option<OffsetDateTime>)>,
    pub(super) authorize: AuthorizeDesk,
    pub(super) devices: Devices,
    families: Vec<Family>,
    /// Whether a login outlives that a refresh token of it is shown twice.
    pub(super) forgives: bool,
    pub(super) grants: HashMap<String, usize>,
    /// What was asked last, by path, without secrets.
    pub(super) last: HashMap<String, BTreeMap<String, String>>,
    /// Members that the metadata has in place of the proper ones.
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) person: Option<Person>,
    pub(super) posts: usize,
    pub(super) redeemed_at: Vec<Instant>,
    refresh: HashMap<Fingerprint, usize>,
    pub(super) refreshes: usize,
    pub(super) reuses: usize,
    pub(super) revocations: Vec<Revocation>,
    pub(super) script: VecDeque<Fault>,
    secrets: Vec<String>,
    spent: HashSet<Fingerprint>,
    /// What goes wrong where the script says nothing.
    pub(super) standing_fault: Option<Fault>,
    /// How long the token endpoint takes before it redeems.
    pub(super) takes: std::time::Duration,
    pub(super) whoamis: usize,
    /// The workspace that coming logins are for, whatever was asked.
    pub(super) workspace: Option<String>,
}

/// All the tokens that descend from one login.
struct Family {
    grant: Grant,
    revoked: bool,
}

impl Ledger {
    pub(super) fn secrets(&self) -> Vec<String> {
        self.secrets.clone()
    }

    /// A new secret that begins like this and is found wherever it should not be.
    pub(super) fn mint(&mut self, prefix: &str) -> Secret {
        self.keep(format!("{prefix}{}", canary()))
    }

    /// Whoever signs in next, into this workspace or their own.
    pub(super) fn person_in(&self, account_id: Option<&str>) -> Person {
        match (&self.person, account_id) {
            (None, None) => Person::default(),
            (None, Some(account_id)) => Person::of(account_id),
            (Some(person), None) => person.clone(),
            (Some(person), Some(account_id)) => {
                Person { account_id: account_id.to_owned(), ..person.clone() }
            }
        }
    }

    /// Whoever signs in next by themselves, having been asked for one of these workspaces.
    pub(super) fn signing_in(&self, allowed: &str) -> Person {
        let first = allowed.split(',').map(str::trim).find(|account_id| !account_id.is_empty());
        self.person_in(self.workspace.as_deref().or(first))
    }

    /// A new family, from which tokens may descend.
    pub(super) fn found(&mut self, grant: Grant) -> usize {
        self.families.push(Family { grant, revoked: false });
        self.families.len() - 1
    }

    pub(super) fn grant(&self, family: usize) -> &Grant {
        &self.families[family].grant
    }

    pub(super) fn end(&mut self, family: usize) {
        self.families[family].revoked = true;
    }

    pub(super) fn issue(
        &mut self,
        family: usize,
        issued_at: OffsetDateTime,
        expires_at: OffsetDateTime,
    ) -> PretendLogin {
        let access = self.issue_access(family, issued_at, expires_at);
        let grant = self.grant(family);
        let id = jwt(&claims(grant, grant.dialect.client_id(), issued_at, expires_at));
        let account_id = grant.person.as_ref().map(|person| person.account_id.clone());
        let (id, refresh) = (self.keep(id), self.mint("rt_"));
        self.refresh.insert(refresh.fingerprint(), family);
        let account_id = account_id.unwrap_or_default();
        PretendLogin { access, refresh, id, account_id, issued_at, expires_at }
    }

    /// An access token alone.
    pub(super) fn issue_access(
        &mut self,
        family: usize,
        issued_at: OffsetDateTime,
        expires_at: OffsetDateTime,
    ) -> Secret {
        let grant = self.grant(family);
        let audience = match grant.audience.as_str() {
            "" => grant.dialect.client_id(),
            audience => audience,
        };
        let access = jwt(&claims(grant, audience, issued_at, expires_at));
        let access = self.keep(access);
        self.access.insert(access.fingerprint(), (family, Some(expires_at)));
        access
    }

    /// A token that a person made for a program of their own.
    pub(super) fn issue_personal(&mut self, account_id: &str) -> Secret {
        let grant = Grant::codex(self.person_in(Some(account_id)));
        let (family, token) = (self.found(grant), self.mint(PERSONAL));
        self.access.insert(token.fingerprint(), (family, None));
        token
    }

    /// Whose personal token this is, while it is good.
    pub(super) fn owner(&self, token: &Secret) -> Option<&Person> {
        let (family, _) = self.access.get(&token.fingerprint())?;
        let family = &self.families[*family];
        let is_good = token.expose().starts_with(PERSONAL) && !family.revoked;
        family.grant.person.as_ref().filter(|_| is_good)
    }

    /// The next tokens, or the error code. A refresh token that was used before revokes its family, unless that is
    /// forgiven.
    pub(super) fn refresh(
        &mut self,
        dialect: Dialect,
        refresh: &Secret,
        now: OffsetDateTime,
        lifetime: Duration,
    ) -> Result<(usize, PretendLogin), &'static str> {
        let token = refresh.fingerprint();
        let family = self.refresh.get(&token).filter(|family| self.is_of(**family, dialect));
        let family = *family.ok_or("refresh_token_invalidated")?;
        if !self.spent.insert(token) {
            self.reuses += 1;
            if !self.forgives {
                self.end(family);
            }
            return Err("refresh_token_reused");
        }
        if self.families[family].revoked {
            return Err("refresh_token_invalidated");
        }
        self.refreshes += 1;
        self.redeemed_at.push(Instant::now());
        Ok((family, self.issue(family, now, now + lifetime)))
    }

    pub(super) fn revoke(&mut self, dialect: Dialect, token: &Secret) {
        let token = token.fingerprint();
        let of_access = || self.access.get(&token).map(|(family, _)| family);
        let family = self.refresh.get(&token).or_else(of_access).copied();
        if let Some(family) = family.filter(|family| self.is_of(*family, dialect)) {
            self.end(family);
        }
    }

    pub(super) fn standing(&self, token: &Secret, now: OffsetDateTime) -> Standing {
        match self.access.get(&token.fingerprint()) {
            None => Standing::Unknown,
            Some((family, _)) if self.families[*family].revoked => Standing::Revoked,
            Some((_, Some(expires_at))) if *expires_at <= now => Standing::Expired,
            Some(_) => Standing::Current,
        }
    }

    fn is_of(&self, family: usize, dialect: Dialect) -> bool {
        self.grant(family).dialect == dialect
    }

    fn keep(&mut self, text: String) -> Secret {
        self.secrets.push(text.clone());
        Secret::new(text)
    }
}

/// How the personal tokens of the Codex issuer begin.
const PERSONAL: &str = "at-";

fn claims(
    grant: &Grant,
    audience: &str,
    issued_at: OffsetDateTime,
    expires_at: OffsetDateTime,
) -> Value {
    let mut claims = json!({
        "iss": grant.dialect.issuer(),
        "aud": [audience],
        "iat": issued_at.unix_timestamp(),
        "exp": expires_at.unix_timestamp(),
    });
    if grant.dialect == Dialect::Standard {
        let person = grant.person.as_ref().map(|person| person.user_id.as_str());
        claims["sub"] = person.unwrap_or_else(|| grant.dialect.client_id()).into();
        claims["client_id"] = grant.dialect.client_id().into();
        claims["scope"] = grant.scope.as_str().into();
    }
    let Some(person) = &grant.person else { return claims };
    claims["email"] = person.email.as_str().into();
    if let Some(amr) = &person.amr {
        claims["amr"] = amr.as_slice().into();
    }
    if grant.dialect == Dialect::Codex {
        claims["https://api.openai.com/profile"] = json!({"email": person.email});
        claims["https://api.openai.com/auth"] = openai_claims(person);
    }
    claims
}

fn openai_claims(person: &Person) -> Value {
    let mut claims = json!({"chatgpt_user_id": person.user_id});
    for (name, value) in
        [("chatgpt_account_id", &person.account_id), ("chatgpt_plan_type", &person.plan)]
    {
        if !value.is_empty() {
            claims[name] = value.as_str().into();
        }
    }
    if person.fedramp {
        claims["chatgpt_account_is_fedramp"] = true.into();
    }
    claims
}

/// A JWT that says it is unsigned (RFC 7519 section 6); the canary stands where the signature would.
fn jwt(claims: &Value) -> String {
    let head = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
    format!("{head}.{}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()), canary())
}

/// A text that is found wherever it should not be, and that no other token has.
fn canary() -> String {
    random::<16>().iter().fold("vk-canary-".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

#[expect(clippy::expect_used, reason = "a machine without randomness has no TLS either")]
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut random = [0; N];
    rand::fill(&mut random).expect("the system gives random bytes");
    random
}
