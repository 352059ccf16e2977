//! Finds an issuer's endpoints: known for Codex's, asked for at every other (RFC 8414).

use http::StatusCode;
use serde::Deserialize;

use super::LoginError;
use super::provider::Provider;
use super::wire::is_json;
use crate::origin::Endpoint;

/// Where an issuer takes what. One that is absent is not offered.
#[derive(Clone, Debug)]
pub(super) struct Endpoints {
    pub(super) authorize: Option<Endpoint>,
    pub(super) token: Endpoint,
    pub(super) revoke: Option<Endpoint>,
    pub(super) device: Option<Endpoint>,
}

impl Endpoints {
    /// Those of Codex's issuer (observed, Codex 0.169.0).
    pub(super) fn codex(issuer: &Endpoint) -> Self {
        Self {
            authorize: Some(issuer.at("/oauth/authorize")),
            token: issuer.at("/oauth/token"),
            revoke: Some(issuer.at("/oauth/revoke")),
            device: Some(issuer.at("/api/accounts/deviceauth/usercode")),
        }
    }

    /// Asks the issuer: where RFC 8414 section 3.1 has it, else where OpenID Connect Discovery 1.0 section 4
    /// has it (RFC 8414 section 5).
    pub(super) async fn discover(provider: &Provider) -> Result<Self, LoginError> {
        let issuer = &provider.registration.issuer;
        let path = issuer.path.trim_end_matches('/');
        let places = [
            format!("/.well-known/oauth-authorization-server{path}"),
            format!("{path}/.well-known/openid-configuration"),
        ];
        for place in places {
            let reply = provider.get(&issuer.at(&place), None).await?;
            if reply.status == StatusCode::NOT_FOUND {
                continue;
            }
            if reply.status != StatusCode::OK || !is_json(&reply.headers) {
                return Err(LoginError::Nonsense(format!(
                    "status {} for its metadata",
                    reply.status.as_u16()
                )));
            }
            return Self::read(&issuer.url(), &reply.body).map_err(LoginError::Nonsense);
        }
        Err(LoginError::Unfit(format!("{} publishes no metadata (RFC 8414)", issuer.url())))
    }

    /// Reads a metadata document, which must be that issuer's (RFC 8414 section 3.3).
    fn read(issuer: &str, body: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Document {
            issuer: String,
            authorization_endpoint: Option<String>,
            token_endpoint: String,
            revocation_endpoint: Option<String>,
            device_authorization_endpoint: Option<String>,
        }
        let document: Document = serde_json::from_slice(body)
            .map_err(|_| "its metadata has no issuer or no token endpoint".to_owned())?;
        // Compared as the texts that they are, but for the slash that a URL without a path may end in.
        if document.issuer.trim_end_matches('/') != issuer.trim_end_matches('/') {
            return Err("its metadata is that of another issuer".to_owned());
        }
        let endpoint = |name: &str, url: &str| {
            Endpoint::parse(url).map_err(|error| format!("its {name} endpoint: {error}"))
        };
        let optional =
            |name: &str, url: Option<String>| url.map(|url| endpoint(name, &url)).transpose();
        Ok(Self {
            authorize: optional("authorization", document.authorization_endpoint)?,
            token: endpoint("token", &document.token_endpoint)?,
            revoke: optional("revocation", document.revocation_endpoint)?,
            device: optional("device", document.device_authorization_endpoint)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents() {
        let table = [
            (r#"{"issuer":"https://i.example","token_endpoint":"https://i.example/t"}"#, Ok(())),
            (r#"{"issuer":"https://i.example/","token_endpoint":"https://t.example/t"}"#, Ok(())),
            (
                r#"{"issuer":"https://evil.example","token_endpoint":"https://i.example/t"}"#,
                Err("its metadata is that of another issuer"),
            ),
            (
                r#"{"issuer":"https://i.example","token_endpoint":"http://i.example/t"}"#,
                Err("its token endpoint: an issuer is only spoken to over https"),
            ),
            (
                r#"{"issuer":"https://i.example","token_endpoint":"https://i.example/t","device_authorization_endpoint":"x"}"#,
                Err("its device endpoint: expected a URL, as in `https://login.example.com`"),
            ),
            (
                r#"{"issuer":"https://i.example"}"#,
                Err("its metadata has no issuer or no token endpoint"),
            ),
            ("<html>", Err("its metadata has no issuer or no token endpoint")),
        ];
        for (body, expected) in table {
            let read = Endpoints::read("https://i.example", body.as_bytes());
            assert_eq!(read.map(drop), expected.map_err(str::to_owned), "{body}");
        }
    }
}
