//! Signs in with an authorization code and PKCE (RFC 6749 section 4.1, RFC 7636, RFC 8252).

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use super::provider::{Dialect, ORIGINATOR, Provider};
use super::refresh::judge;
use super::wire::LONGEST_SHOWN;
use super::{Answer, LoginError, RefreshError};
use crate::origin::Endpoint;
use crate::quote::quoted;
use crate::secret::Secret;

/// One attempt to sign in: what the person's browser is sent to, and what it must come back with.
pub struct Attempt {
    url: String,
    redirect_uri: String,
    state: Secret,
    verifier: Secret,
    /// The issuer, which an answer that names one must name (RFC 9207 section 2.4).
    issuer: String,
}

impl Attempt {
    /// An attempt with a state and a verifier of its own. `workspaces` are the only ones that will do.
    ///
    /// # Errors
    ///
    /// [`LoginError`] when the issuer has no such sign-in, or cannot be asked.
    pub async fn new(
        provider: &Provider,
        redirect_uri: String,
        workspaces: Option<&[&str]>,
    ) -> Result<Self, LoginError> {
        let no_browser =
            || LoginError::Unfit("the issuer offers no sign-in in a browser".to_owned());
        let endpoint = provider.endpoints().await?.authorize.as_ref().ok_or_else(no_browser)?;
        // As long as Codex makes them; RFC 7636 section 4.1 wants a verifier of 43 to 128 characters.
        let (verifier, state) = (random::<64>()?, random::<32>()?);
        let challenge = challenge(&verifier);
        let registration = &provider.registration;
        let scope = registration.scopes.join(" ");
        let mut query: Vec<(&str, &str)> = vec![
            ("response_type", "code"),
            ("client_id", &registration.client_id),
            ("redirect_uri", &redirect_uri),
        ];
        query.extend((!scope.is_empty()).then_some(("scope", scope.as_str())));
        query.extend([("code_challenge", challenge.as_str()), ("code_challenge_method", "S256")]);
        let workspaces = workspaces.map(|list| list.join(","));
        match registration.dialect {
            Dialect::Codex => {
                query.extend([
                    ("id_token_add_organizations", "true"),
                    ("codex_cli_simplified_flow", "true"),
                    ("originator", ORIGINATOR),
                ]);
                query.extend(workspaces.as_deref().map(|ids| ("allowed_workspace_id", ids)));
            }
            Dialect::Standard => {
                query.extend(registration.audience.as_deref().map(|it| ("audience", it)));
            }
        }
        query.push(("state", state.expose()));
        let url = with_query(endpoint, &query);
        let issuer = registration.issuer.url();
        Ok(Self { url, redirect_uri, state, verifier, issuer })
    }

    /// Where the person's browser goes.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What the browser came back with. `None` when it is not the answer to this attempt: its state is
    /// another one, or it has none.
    pub fn read(&self, query: &str) -> Option<Result<Secret, LoginError>> {
        let field = |wanted: &str| {
            url::form_urlencoded::parse(query.as_bytes())
                .find(|(name, _)| name == wanted)
                .map(|(_, value)| Zeroizing::new(value.into_owned()))
        };
        let state = field("state")?;
        // By fingerprint, so that how long it takes says nothing.
        if Secret::new(state.as_str()).fingerprint() != self.state.fingerprint() {
            return None;
        }
        if field("iss")
            .is_some_and(|iss| iss.trim_end_matches('/') != self.issuer.trim_end_matches('/'))
        {
            return Some(Err(LoginError::Nonsense("it is from another issuer".to_owned())));
        }
        if let Some(code) = field("error") {
            return Some(Err(denied(
                &code,
                field("error_description").as_deref().map(String::as_str),
            )));
        }
        let no_code = || LoginError::Nonsense("missing_authorization_code".to_owned());
        let code = field("code").filter(|code| !code.is_empty());
        Some(code.map(|code| Secret::new(code.as_str())).ok_or_else(no_code))
    }

    /// As [`Attempt::read`], for the address that a person pasted: all of it, or what is behind its `?`.
    ///
    /// # Errors
    ///
    /// [`LoginError`] for a text that is not the answer to this attempt, too.
    pub fn read_pasted(&self, text: &str) -> Result<Secret, LoginError> {
        let text = text.trim();
        let query = text.split_once('?').map_or(text, |(_, query)| query);
        let query = query.split('#').next().unwrap_or_default();
        if !query.contains("state=") {
            return Err(LoginError::NotTheRedirect("it has no state"));
        }
        let other = LoginError::NotTheRedirect("it belongs to another attempt");
        self.read(query).unwrap_or(Err(other))
    }

    /// Redeems the code for the tokens of the login, once.
    ///
    /// # Errors
    ///
    /// [`LoginError`]; the code is worth nothing any more, then.
    pub async fn redeem(&self, provider: &Provider, code: &Secret) -> Result<Answer, LoginError> {
        redeem(provider, code, &self.redirect_uri, &self.verifier).await
    }
}

/// Redeems an authorization code. In both dialects this is a form (observed, Codex 0.169.0).
pub(super) async fn redeem(
    provider: &Provider,
    code: &Secret,
    redirect_uri: &str,
    verifier: &Secret,
) -> Result<Answer, LoginError> {
    let fields = [
        ("grant_type", "authorization_code"),
        ("code", code.expose()),
        ("redirect_uri", redirect_uri),
        ("code_verifier", verifier.expose()),
    ];
    let token = &provider.endpoints().await?.token;
    let reply = provider.post_form(token, &fields).await?;
    let refused = |error| match error {
        RefreshError::Rejected { .. } | RefreshError::Limited { .. } => reply.refusal(),
        RefreshError::Unknown(_) if !reply.status.is_success() => reply.refusal(),
        RefreshError::Unknown(what) => LoginError::Nonsense(what),
        RefreshError::NotSent(trouble) => LoginError::Nonsense(trouble.why),
    };
    let answer = judge(reply.status, &reply.headers, &reply.body).map_err(refused)?;
    match (provider.dialect(), &answer.id) {
        // Codex cannot load a cache without one.
        (Dialect::Codex, None) => Err(LoginError::Nonsense("it has no id token".to_owned())),
        _ => Ok(answer),
    }
}

/// Why the issuer sent the person back without a code.
fn denied(code: &str, description: Option<&str>) -> LoginError {
    if code == "access_denied"
        && description.is_some_and(|it| it.contains("missing_codex_entitlement"))
    {
        return LoginError::NotEntitled;
    }
    LoginError::Refused {
        code: quoted(code, LONGEST_SHOWN),
        description: description.map(|it| quoted(it, LONGEST_SHOWN)),
    }
}

fn with_query(endpoint: &Endpoint, query: &[(&str, &str)]) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(query);
    let between = if endpoint.path.contains('?') { '&' } else { '?' };
    // A space as `%20`, which both a form and a URL read.
    format!("{}{between}{}", endpoint.url(), form.finish().replace('+', "%20"))
}

/// Base64url of so many random bytes.
fn random<const BYTES: usize>() -> Result<Secret, LoginError> {
    let mut bytes = Zeroizing::new([0; BYTES]);
    rand::fill(bytes.as_mut())
        .map_err(|_| LoginError::Machine("the system gives no random bytes".to_owned()))?;
    Ok(Secret::new(URL_SAFE_NO_PAD.encode(bytes.as_ref())))
}

/// RFC 7636 section 4.2, method `S256`.
fn challenge(verifier: &Secret) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.expose().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> Attempt {
        Attempt {
            url: String::new(),
            redirect_uri: String::new(),
            state: Secret::new("right-state"),
            verifier: Secret::new("v"),
            issuer: "https://auth.example/".to_owned(),
        }
    }

    fn brief(read: Option<Result<Secret, LoginError>>) -> String {
        match read {
            None => "not ours".to_owned(),
            Some(Ok(code)) => format!("code {}", code.expose()),
            Some(Err(error)) => error.to_string(),
        }
    }

    #[test]
    fn what_a_browser_comes_back_with() {
        let table = [
            ("code=c%2F1&state=right-state", "code c/1"),
            ("code=c1&state=right-state&iss=https%3A%2F%2Fauth.example", "code c1"),
            (
                "code=c1&state=right-state&iss=https%3A%2F%2Fevil.example",
                "the issuer's answer cannot be used: it is from another issuer",
            ),
            ("code=c1&state=wrong", "not ours"),
            ("code=c1&state=", "not ours"),
            ("code=c1", "not ours"),
            ("", "not ours"),
            ("state=right-state", "the issuer's answer cannot be used: missing_authorization_code"),
            (
                "code=&state=right-state",
                "the issuer's answer cannot be used: missing_authorization_code",
            ),
            (
                "error=access_denied&error_description=the+user+said%0Ano&state=right-state",
                "the issuer refused: access_denied (the user said\u{fffd}no)",
            ),
            (
                "error=access_denied&error_description=missing_codex_entitlement&state=right-state",
                "Codex is not enabled for your workspace",
            ),
            ("error=access_denied&state=wrong", "not ours"),
        ];
        for (query, expected) in table {
            assert_eq!(brief(attempt().read(query)), expected, "{query}");
        }
    }

    #[test]
    fn what_a_person_pastes() {
        let other =
            "this is not the address that the browser ended on: it belongs to another attempt";
        let none = "this is not the address that the browser ended on: it has no state";
        let table = [
            (" http://127.0.0.1:1455/auth/callback?code=c1&state=right-state \n", "code c1"),
            ("http://127.0.0.1:1455/auth/callback?code=c1&state=right-state#_=_", "code c1"),
            ("code=c1&state=right-state", "code c1"),
            ("http://127.0.0.1:1455/auth/callback?code=c1&state=old", other),
            ("https://auth.example/oauth/authorize?code_challenge=x", none),
            ("c1", none),
            ("", none),
        ];
        for (text, expected) in table {
            assert_eq!(brief(Some(attempt().read_pasted(text))), expected, "{text}");
        }
    }

    #[test]
    fn the_challenge_of_the_rfc() {
        // RFC 7636 appendix B.
        let verifier = Secret::new("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        assert_eq!(challenge(&verifier), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
        let (one, two) = (random::<64>().unwrap(), random::<64>().unwrap());
        assert_eq!(one.expose().len(), 86);
        assert_ne!(one.fingerprint(), two.fingerprint());
    }
}
