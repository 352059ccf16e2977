//! What holds a secret does not show it, however it is printed.

use std::sync::Arc;

use valetkey::config::ProxyUrl;
use valetkey::config::env::Environment;
use valetkey::credential::{Account, Credential, Login, LoginKind};
use valetkey::inject::{Injection, Template};
use valetkey::origin::{ProxyScheme, Target};
use valetkey::secret::Secret;
use valetkey::upstream::chain::auth::BasicAuth;
use valetkey::upstream::chain::no_proxy::NoProxy;
use valetkey::upstream::chain::{Chain, Hop};

pub(crate) use super::forms::leak;
use super::support::{KEY, Options, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_holds_a_secret_prints_it() {
    let scene = Scene::start(Options::default()).await;
    let login = scene.login.as_ref().unwrap();
    let token = login.access.clone();
    let secrets = [scene.world.secrets(), vec![KEY.to_owned()]].concat();
    let credential = Credential::new(LoginKind::ChatGpt, token.clone(), Account::default());
    let set = vec![(http::header::AUTHORIZATION, Template::token())];
    let injection = Injection::new(set, vec![]).unwrap();
    let mut headers = http::HeaderMap::new();
    injection.apply(&mut headers, &credential).unwrap();
    let env = Environment::from_pairs([("EXAMPLE_TOKEN", KEY)]);
    let chain = Chain::via(Hop {
        scheme: ProxyScheme::Http,
        proxy: Target::parse("proxy.example:3128").unwrap(),
        auth: Arc::new(BasicAuth::new(Secret::new(format!("user:{KEY}"))).unwrap()),
        direct: NoProxy::default(),
    });
    let url = ProxyUrl::parse(&format!("http://user:{KEY}@proxy.example:3128")).unwrap();
    let stored = valetkey::credential::TokenSet {
        access: token.clone(),
        refresh: Some(login.refresh.clone()),
        id: Some(login.id.clone()),
        account_id: None,
        last_refresh: None,
    };
    let shown = [
        format!("{token:?} {credential:?} {:#?}", Login::ChatGpt(stored)),
        format!("{:?} {:#?}", Login::ApiKey(Secret::new(KEY)), login),
        format!("{injection:?} {headers:?} {env:?} {chain:?} {url:?} {url}"),
    ]
    .concat();
    assert_eq!(leak(&secrets, &shown), None, "{shown}");
    // The same look finds one that is there.
    assert!(leak(&secrets, &(shown + &secrets[0])).is_some());
}
