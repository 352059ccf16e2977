//! What holds a secret does not show it, however it is printed.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use valetkey::config::ProxyUrl;
use valetkey::config::env::Environment;
use valetkey::credential::{Account, Credential, Login, LoginKind};
use valetkey::inject::{Injection, Template};
use valetkey::origin::{ProxyScheme, Target};
use valetkey::secret::Secret;
use valetkey::upstream::chain::auth::BasicAuth;
use valetkey::upstream::chain::no_proxy::NoProxy;
use valetkey::upstream::chain::{Chain, Hop};

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

/// The first secret that a text holds in any of the forms in which one may be written.
pub(crate) fn leak<'a>(secrets: &'a [String], text: &str) -> Option<&'a String> {
    secrets.iter().find(|secret| forms(secret).iter().any(|form| text.contains(form.as_str())))
}

fn forms(secret: &str) -> Vec<String> {
    let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    let percent: String = secret.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let json = serde_json::Value::from(secret).to_string().trim_matches('"').to_owned();
    // What stands before a secret shifts its Base64 by a byte or two, and spoils both ends.
    let middle = |text: String| text[4..text.len() - 4].to_owned();
    let shifted = (0..3).flat_map(|skip| {
        let rest = &secret.as_bytes()[skip..];
        [middle(STANDARD.encode(rest)), middle(URL_SAFE_NO_PAD.encode(rest))]
    });
    let plain = [secret.to_owned(), json, hex.to_uppercase(), hex, percent];
    shifted.chain(plain).collect()
}

#[test]
fn the_scan_finds_what_is_planted() {
    let secrets = ["vk-canary-planted-on-purpose/+".to_owned()];
    assert_eq!(leak(&secrets, "nothing here"), None);
    for form in forms(&secrets[0]) {
        assert!(leak(&secrets, &format!("before {form} after")).is_some(), "{form}");
    }
    for before in ["", "a", "ab"] {
        let basic = STANDARD.encode(format!("{before}{} and more", secrets[0]));
        assert!(leak(&secrets, &basic).is_some(), "{before}");
    }
}
