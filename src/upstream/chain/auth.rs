//! Shows the chain who we are: not at all, with a fixed login, or with one that is asked for when it is needed.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use http::HeaderValue;
use zeroize::Zeroizing;

use crate::secret::Secret;

/// How the chain is shown who we are. A scheme with several rounds on one connection (Negotiate) is one more
/// implementation.
pub trait ProxyAuth: Send + Sync {
    /// What to send as `Proxy-Authorization` with the next CONNECT. `challenges` is empty for the first of a
    /// connection, else what the proxy's 407 asked for (RFC 9110 section 11.7.1). `None`: nothing, or nothing
    /// else.
    ///
    /// # Errors
    ///
    /// [`NoLogin`] when there should be something and it is not to be had.
    fn authorization<'a>(
        &'a self,
        challenges: &'a [String],
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>>;

    /// User and password for SOCKS5 (RFC 1929), as `user:password`; after the proxy has `refused` them, others.
    /// `None`: none, or no others.
    ///
    /// # Errors
    ///
    /// As [`ProxyAuth::authorization`].
    fn login(&self, refused: bool) -> BoxFuture<'_, Result<Option<Secret>, NoLogin>>;
}

/// Why there is nothing to show. Quotes no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoLogin(pub String);

/// No login at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAuth;

impl ProxyAuth for NoAuth {
    fn authorization<'a>(
        &'a self,
        _challenges: &'a [String],
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        ready(Ok(None)).boxed()
    }

    fn login(&self, _refused: bool) -> BoxFuture<'_, Result<Option<Secret>, NoLogin>> {
        ready(Ok(None)).boxed()
    }
}

/// `Basic` (RFC 7617) with the same login for ever, sent with the first CONNECT already.
pub struct BasicAuth {
    login: Secret,
    header: HeaderValue,
}

impl BasicAuth {
    /// `login` is `user:password`.
    ///
    /// # Errors
    ///
    /// [`NoLogin`] when it has no colon.
    pub fn new(login: Secret) -> Result<Self, NoLogin> {
        let header = header_of(&login)?;
        Ok(Self { login, header })
    }
}

impl ProxyAuth for BasicAuth {
    fn authorization<'a>(
        &'a self,
        challenges: &'a [String],
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        // It was sent, and will not become better.
        ready(Ok(challenges.is_empty().then(|| self.header.clone()))).boxed()
    }

    fn login(&self, refused: bool) -> BoxFuture<'_, Result<Option<Secret>, NoLogin>> {
        ready(Ok((!refused).then(|| self.login.clone()))).boxed()
    }
}

/// Asks for a login: `user:password`, or a scheme and a token as they stand in the field.
pub type Ask = Arc<dyn Fn() -> BoxFuture<'static, Result<Secret, String>> + Send + Sync>;

/// A login that is read from a file or told by a program, at its first use and again when the chain does not take
/// it any more.
pub struct AskedAuth {
    ask: Ask,
    last: Mutex<Option<Secret>>,
}

impl AskedAuth {
    /// Nobody is asked yet.
    pub fn new(ask: Ask) -> Self {
        Self { ask, last: Mutex::default() }
    }

    /// What was told last; after that was refused, what is told now. `None` where it is the same, which would
    /// be refused once more.
    async fn current(&self, refused: bool) -> Result<Option<Secret>, NoLogin> {
        let lock = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let last = lock().clone();
        if let (Some(last), false) = (&last, refused) {
            return Ok(Some(last.clone()));
        }
        let told = (self.ask)().await.map_err(NoLogin)?;
        *lock() = Some(told.clone());
        Ok(Some(told).filter(|told| last.is_none_or(|it| it.fingerprint() != told.fingerprint())))
    }

    async fn header(&self, refused: bool) -> Result<Option<HeaderValue>, NoLogin> {
        self.current(refused).await?.as_ref().map(header_of).transpose()
    }
}

impl ProxyAuth for AskedAuth {
    fn authorization<'a>(
        &'a self,
        challenges: &'a [String],
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        self.header(!challenges.is_empty()).boxed()
    }

    fn login(&self, refused: bool) -> BoxFuture<'_, Result<Option<Secret>, NoLogin>> {
        self.current(refused).boxed()
    }
}

/// `user:password` as `Basic`; a scheme and a token, which have no colon (RFC 9110 section 11.2), as they are.
fn header_of(login: &Secret) -> Result<HeaderValue, NoLogin> {
    let text = login.expose();
    let value = if text.contains(':') {
        // Large enough from the start: a buffer that grows leaves copies behind.
        let mut value = Zeroizing::new(String::with_capacity(BASIC.len() + text.len() / 3 * 4 + 4));
        value.push_str(BASIC);
        BASE64_STANDARD.encode_string(text, &mut value);
        value
    } else if text.split_once(' ').is_some_and(|(scheme, token)| is_scheme(scheme, token)) {
        Zeroizing::new(text.to_owned())
    } else {
        return Err(NoLogin("it is neither user:password nor a scheme and a token".to_owned()));
    };
    let mut value = HeaderValue::from_str(&value)
        .map_err(|_| NoLogin("it holds what cannot stand in a header".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

const BASIC: &str = "Basic ";

fn is_scheme(scheme: &str, token: &str) -> bool {
    let fits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    fits(token) && !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(login: &str) -> Option<String> {
        header_of(&Secret::new(login)).ok().map(|header| {
            assert!(header.is_sensitive());
            header.to_str().unwrap().to_owned()
        })
    }

    #[test]
    fn forms_of_a_login() {
        let table = [
            ("user:p@ss", Some("Basic dXNlcjpwQHNz")),
            ("DOMAIN\\user:a:b", Some("Basic RE9NQUlOXHVzZXI6YTpi")),
            ("gr\u{fc}n:x", Some("Basic Z3LDvG46eA==")),
            (":", Some("Basic Og==")),
            ("Negotiate YIIabc+/==", Some("Negotiate YIIabc+/==")),
            ("user", None),
            ("", None),
            ("Bearer a b", None),
            ("Negotiate ", None),
        ];
        for (login, expected) in table {
            assert_eq!(shown(login).as_deref(), expected, "{login}");
        }
    }

    #[tokio::test]
    async fn a_login_is_asked_for_again_when_it_is_refused() {
        let told = Arc::new(Mutex::new(vec!["u:3", "u:2", "u:2", "u:1"]));
        let ask = {
            let told = told.clone();
            move || {
                let next = told.lock().unwrap().pop().map(Secret::new);
                ready(next.ok_or_else(|| "no more".to_owned())).boxed()
            }
        };
        let auth = AskedAuth::new(Arc::new(ask));
        let refused = ["Basic".to_owned()];
        let header = |login| Some(header_of(&Secret::new(login)).unwrap());
        assert_eq!(auth.authorization(&[]).await.unwrap(), header("u:1"));
        assert_eq!(auth.authorization(&[]).await.unwrap(), header("u:1"), "nobody was asked");
        assert_eq!(auth.authorization(&refused).await.unwrap(), header("u:2"));
        assert_eq!(auth.authorization(&refused).await.unwrap(), None, "the same is not sent twice");
        assert_eq!(auth.authorization(&refused).await.unwrap(), header("u:3"));
        assert_eq!(auth.authorization(&refused).await, Err(NoLogin("no more".to_owned())));
        let fixed = BasicAuth::new(Secret::new("u:p")).unwrap();
        assert_eq!(fixed.authorization(&[]).await.unwrap(), header("u:p"));
        assert_eq!(fixed.authorization(&refused).await.unwrap(), None);
    }
}
