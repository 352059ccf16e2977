//! Shows the chain who we are: not at all, with a fixed login, or with one that is asked for when it is needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use http::HeaderValue;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::secret::Secret;

/// How the chain is shown who we are. A scheme with several rounds on one connection (Negotiate) is one more
/// implementation.
pub trait ProxyAuth: Send + Sync {
    /// What to send as `Proxy-Authorization` with the next CONNECT; `after` is what came of the one before.
    /// `None`: nothing, or nothing else.
    ///
    /// # Errors
    ///
    /// [`NoLogin`] when there should be something and it is not to be had.
    fn authorization<'a>(
        &'a self,
        after: Option<Refused<'a>>,
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>>;

    /// User and password for SOCKS5 (RFC 1929), as `user:password`; others than the ones that were `refused`.
    /// `None`: none, or no others.
    ///
    /// # Errors
    ///
    /// As [`ProxyAuth::authorization`].
    fn login<'a>(
        &'a self,
        refused: Option<&'a Secret>,
    ) -> BoxFuture<'a, Result<Option<Secret>, NoLogin>>;
}

/// A CONNECT that the proxy has answered with a 407.
#[derive(Clone, Copy)]
pub struct Refused<'a> {
    /// What was shown with it.
    pub shown: Option<&'a HeaderValue>,
    /// What the answer asks for (RFC 9110 section 11.7.1).
    pub challenges: &'a [String],
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
        _after: Option<Refused<'a>>,
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        ready(Ok(None)).boxed()
    }

    fn login<'a>(
        &'a self,
        _refused: Option<&'a Secret>,
    ) -> BoxFuture<'a, Result<Option<Secret>, NoLogin>> {
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
        after: Option<Refused<'a>>,
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        // It was sent, and will not become better.
        ready(Ok(after.is_none().then(|| self.header.clone()))).boxed()
    }

    fn login<'a>(
        &'a self,
        refused: Option<&'a Secret>,
    ) -> BoxFuture<'a, Result<Option<Secret>, NoLogin>> {
        ready(Ok(refused.is_none().then(|| self.login.clone()))).boxed()
    }
}

/// Asks for a login: `user:password`, or a scheme and a token as they stand in the field.
pub type Ask = Arc<dyn Fn() -> BoxFuture<'static, Result<Secret, String>> + Send + Sync>;

/// A login that is read from a file or told by a program, at its first use and again when the chain does not take
/// it any more.
pub struct AskedAuth {
    ask: Ask,
    /// What came of asking last, and which time that was.
    last: Mutex<Option<(u64, Result<Secret, NoLogin>)>>,
    /// How often asking has begun.
    begun: AtomicU64,
}

impl AskedAuth {
    /// Nobody is asked yet.
    pub fn new(ask: Ask) -> Self {
        Self { ask, last: Mutex::default(), begun: AtomicU64::default() }
    }

    /// What was told last, unless it was refused; then what is told now. `None` where that was refused too.
    ///
    /// One asks for all that come before it begins, whatever comes of it. What had begun before may be too old.
    async fn other_than(
        &self,
        is_refused: impl Fn(&Secret) -> bool,
    ) -> Result<Option<Secret>, NoLogin> {
        let begun = self.begun.load(Ordering::SeqCst);
        let mut last = self.last.lock().await;
        if let Some((time, outcome)) = &*last {
            let is_good = outcome.as_ref().is_ok_and(|told| !is_refused(told));
            if is_good || *time > begun {
                let told = outcome.clone()?;
                return Ok(Some(told).filter(|told| !is_refused(told)));
            }
        }
        let time = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = (self.ask)().await.map_err(NoLogin);
        *last = Some((time, outcome.clone()));
        Ok(Some(outcome?).filter(|told| !is_refused(told)))
    }

    async fn header(&self, after: Option<Refused<'_>>) -> Result<Option<HeaderValue>, NoLogin> {
        let is_refused = |login: &Secret| {
            let shown = after.and_then(|after| after.shown);
            shown.is_some_and(|shown| header_of(login).is_ok_and(|header| header == *shown))
        };
        self.other_than(is_refused).await?.as_ref().map(header_of).transpose()
    }
}

impl ProxyAuth for AskedAuth {
    fn authorization<'a>(
        &'a self,
        after: Option<Refused<'a>>,
    ) -> BoxFuture<'a, Result<Option<HeaderValue>, NoLogin>> {
        self.header(after).boxed()
    }

    fn login<'a>(
        &'a self,
        refused: Option<&'a Secret>,
    ) -> BoxFuture<'a, Result<Option<Secret>, NoLogin>> {
        let refused = refused.map(Secret::fingerprint);
        let is_refused = move |login: &Secret| refused == Some(login.fingerprint());
        async move { self.other_than(is_refused).await }.boxed()
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
                let told = told.clone();
                let next = async move { told.lock().await.pop().map(Secret::new) };
                next.map(|next| next.ok_or_else(|| "no more".to_owned())).boxed()
            }
        };
        let auth = AskedAuth::new(Arc::new(ask));
        let header = |login: &str| header_of(&Secret::new(login)).unwrap();
        let challenges = ["Basic".to_owned()];
        let after = async |shown: &str| {
            let shown = header(shown);
            let refused = Refused { shown: Some(&shown), challenges: &challenges };
            auth.authorization(Some(refused)).await
        };
        assert_eq!(auth.authorization(None).await.unwrap(), Some(header("u:1")));
        assert_eq!(
            auth.authorization(None).await.unwrap(),
            Some(header("u:1")),
            "nobody was asked"
        );
        assert_eq!(after("u:1").await.unwrap(), Some(header("u:2")));
        assert_eq!(after("u:1").await.unwrap(), Some(header("u:2")), "who comes late asks nobody");
        assert_eq!(after("u:2").await.unwrap(), None, "the same is not sent twice");
        assert_eq!(after("u:2").await.unwrap(), Some(header("u:3")));
        assert_eq!(after("u:3").await, Err(NoLogin("no more".to_owned())));
        let fixed = BasicAuth::new(Secret::new("u:p")).unwrap();
        assert_eq!(fixed.authorization(None).await.unwrap(), Some(header("u:p")));
        let refused = Refused { shown: None, challenges: &challenges };
        assert_eq!(fixed.authorization(Some(refused)).await.unwrap(), None);
    }

    #[tokio::test]
    async fn one_asks_for_all() {
        // The first asks at once. For those who came meanwhile it may be too old, and one of them asks again.
        let told = [
            (Ok("u:new"), Ok(Some("u:new")), 1),
            (Ok("u:old"), Ok(None), 2),
            (Err("gone"), Err(NoLogin("gone".to_owned())), 2),
        ];
        for (told, expected, times) in told {
            let asked = Arc::new(AtomicU64::new(0));
            let count = asked.clone();
            let ask = move || {
                count.fetch_add(1, Ordering::SeqCst);
                let told = told.map(Secret::new).map_err(str::to_owned);
                tokio::task::yield_now().map(|()| told).boxed()
            };
            let auth = AskedAuth::new(Arc::new(ask));
            let old = Secret::new("u:old");
            let all = futures_util::future::join_all((0..20).map(|_| auth.login(Some(&old)))).await;
            for one in all {
                let one = one.map(|login| login.map(|login| login.expose().to_owned()));
                assert_eq!(one, expected.clone().map(|login| login.map(str::to_owned)));
            }
            assert_eq!(asked.load(Ordering::SeqCst), times, "{told:?}");
        }
    }

    #[tokio::test]
    async fn who_goes_away_while_it_asks_leaves_the_next_to_ask() {
        let asked = Arc::new(AtomicU64::new(0));
        let count = asked.clone();
        let ask = move || match count.fetch_add(1, Ordering::SeqCst) {
            0 => futures_util::future::pending().boxed(),
            _ => ready(Ok(Secret::new("u:new"))).boxed(),
        };
        let auth = AskedAuth::new(Arc::new(ask));
        let mut first = auth.login(None);
        assert!((&mut first).now_or_never().is_none());
        let mut second = auth.login(None);
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        assert_eq!(second.await.unwrap().unwrap().expose(), "u:new");
    }
}
