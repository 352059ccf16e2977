//! What lies between this machine and the ruled origins, asked step by step without a credential.

use std::collections::BTreeSet;
use std::error::Error as _;

use futures_util::future::join_all;
use http::header::USER_AGENT;
use http::{HeaderValue, Method, Request};

use super::Scene;
use super::origin::{self, Met};
use super::report::{Check, Report};
use crate::cli::credentials::Credentials;
use crate::cli::{Failure, Typed};
use crate::config::CredentialKind;
use crate::origin::Origin;
use crate::rules::{Action, Found, Rule};
use crate::tasks::Tasks;
use crate::upstream::body::Body;
use crate::upstream::{Stage, UpstreamError};

/// Every origin that a rule signs in, and every issuer.
pub(super) async fn examine(scene: &Scene, report: &mut Report) {
    let asked = origins(scene);
    let met = join_all(asked.iter().map(|origin| origin::meet(scene, origin))).await;
    let chain_works = chain(scene, &met, report);
    for met in met.iter().filter(|met| chain_works || !met.goes_through_the_chain) {
        met.report(scene, report);
    }
    clock(&met, report);
}

/// What the chain did with the tunnels. `false` when it opened none for a reason of its own, which is then said
/// once and not for each origin.
fn chain(scene: &Scene, met: &[Met<'_>], report: &mut Report) -> bool {
    let Some(proxy) = scene.config.upstream.proxies.first() else {
        let note = match scene.names_http_proxy {
            true => " (HTTP_PROXY is for plain HTTP, and not read)",
            false => "",
        };
        report.add(Check::ok("chain", format!("none: upstreams are reached directly{note}")));
        return true;
    };
    let (url, named_by) = (&proxy.url, proxy.named_by);
    let through: Vec<&Met<'_>> = met.iter().filter(|met| met.goes_through_the_chain).collect();
    if through.is_empty() {
        report.add(Check::ok("chain", format!("{url} ({named_by}), for none of the ruled hosts")));
        return true;
    }
    let failures = through.iter().filter_map(|met| met.failure());
    let failures: Vec<&UpstreamError> =
        failures.filter(|error| error.stage().is_of_the_chain()).collect();
    match failures.first() {
        Some(error) if failures.len() == through.len() => {
            let sentence = format!("{url} ({named_by}): {}", in_words(error));
            report.add(Check::failed("chain", sentence, error.hint()));
            false
        }
        _ if !through.iter().any(|met| met.has_met_the_chain()) => {
            let sentence = format!("{url} ({named_by}) was not asked: no name was resolved here");
            let fix = "write socks5h:// in the place of socks5://";
            report.add(Check::warning("chain", sentence, fix));
            true
        }
        _ => {
            let login = if scene.config.upstream.proxy_login.is_some() || url.login().is_some() {
                ", with a login"
            } else {
                ""
            };
            report.add(Check::ok("chain", format!("{url} ({named_by}) answers{login}")));
            true
        }
    }
}

/// The step that failed, and what the system said, which is the last of the causes.
pub(super) fn in_words(error: &UpstreamError) -> String {
    let stage = error.stage();
    let mut cause = error.source();
    while let Some(deeper) = cause.and_then(|it| it.source()) {
        cause = Some(deeper);
    }
    match (stage, cause) {
        (Stage::Untrusted(_) | Stage::ChainUntrusted(_), _) | (_, None) => stage.to_string(),
        (_, Some(cause)) => format!("{stage}: {cause}"),
    }
}

/// This machine's clock against those of the upstreams.
fn clock(met: &[Met<'_>], report: &mut Report) {
    let Some(skew) = met.iter().filter_map(|met| met.skew).min_by_key(|skew| skew.abs()) else {
        return;
    };
    let seconds = skew.whole_seconds();
    if skew.abs() <= MOST_SKEW {
        return report
            .add(Check::ok("clock", format!("within {} s of the upstreams'", seconds.abs() + 1)));
    }
    let side = if seconds > 0 { "behind" } else { "ahead of" };
    let sentence = format!("this machine's clock is {} s {side} the upstreams'", seconds.abs());
    let fix = "set it: timedatectl set-ntp true (in a virtual machine: on its host)";
    report.add(Check::failed("clock", sentence, fix));
}

/// The origins by their names. A wildcard names none.
fn origins(scene: &Scene) -> Vec<Asked> {
    let mut asked: Vec<Asked> = Vec::new();
    let in_force = scene.rules.iter().filter(|rule| scene.rules.is_in_force(rule));
    for rule in in_force {
        let is_issuer = match rule.action {
            Action::Inject { .. } => false,
            Action::Issuer { .. } => true,
            Action::Refuse | Action::Tunnel => continue,
        };
        let Some(target) = rule.host.target() else { continue };
        let origin = Origin::https(target);
        let websocket = rule.websocket_fallback.then(|| websocket_path(scene, rule)).flatten();
        match asked.iter_mut().find(|it| it.origin == origin) {
            Some(known) => known.websocket = known.websocket.take().or(websocket),
            None => asked.push(Asked { origin, is_issuer, websocket }),
        }
    }
    for kind in scene.config.credentials.values() {
        let CredentialKind::OAuth(oauth) = kind else { continue };
        let origin = oauth.issuer.origin.clone();
        if !asked.iter().any(|it| it.origin == origin) {
            asked.push(Asked { origin, is_issuer: true, websocket: None });
        }
    }
    asked
}

/// An origin to ask.
pub(super) struct Asked {
    pub(super) origin: Origin,
    pub(super) is_issuer: bool,
    /// Where a rule expects WebSockets.
    pub(super) websocket: Option<String>,
}

/// A path at which a WebSocket may be asked for: the rule's first, or Codex's own below that.
fn websocket_path(scene: &Scene, rule: &Rule) -> Option<String> {
    let first = rule.paths.first()?.to_string();
    let bare = first.trim_end_matches('/').to_owned();
    let credential = rule.action.uses().map(|uses| &uses.credential)?;
    let is_codex =
        matches!(scene.config.credentials.get(credential), Some(CredentialKind::Codex { .. }));
    Some(if is_codex && !bare.ends_with("/responses") { bare + "/responses" } else { bare })
}

/// Sends a GET to each ruled host with each credential that rules have for it, as the rules would sign it in,
/// and says what came of it.
///
/// # Errors
///
/// [`Failure`] for a policy that cannot be read.
pub(super) async fn sign_in(
    scene: &Scene,
    typed: &Typed,
    report: &mut Report,
) -> Result<(), Failure> {
    let jobs = Tasks::new();
    let credentials =
        Credentials::new(&scene.config, &typed.env, scene.upstream.clone(), jobs.clone());
    let tokens = credentials.tokens().await?;
    let mut asked = BTreeSet::new();
    for rule in scene.rules.iter().filter(|rule| scene.rules.is_in_force(rule)) {
        let Some(target) = rule.host.target() else { continue };
        let path = rule.paths.first().map_or_else(|| "/".to_owned(), ToString::to_string);
        let origin = Origin::https(target);
        // Another rule may cover that request, or forbid it.
        let Found::Rule(rule) = scene.rules.find(&origin, &Method::GET, &path) else { continue };
        let Action::Inject { uses, injection } = &rule.action else { continue };
        let Some(source) = tokens.source(&uses.credential) else { continue };
        if !asked.insert((origin.clone(), uses.credential.clone())) {
            continue;
        }
        let subject = format!("{} as {}", origin.target, uses.credential);
        let credential = match source.current().await {
            Ok(credential) => credential,
            Err(error) => {
                let check = Check::failed("sign-in", error.to_string(), error.hint());
                report.add(check.about(subject));
                continue;
            }
        };
        let mut request = request(&path);
        if let Err(error) = injection.apply(request.headers_mut(), &credential) {
            let check = Check::failed("sign-in", error.to_string(), "see: valetkey status");
            report.add(check.about(subject));
            continue;
        }
        let fields = request.headers().clone();
        report.add(signed_in(scene, &origin, request).await.about(&subject));
        if let Some(path) = rule.websocket_fallback.then(|| websocket_path(scene, rule)).flatten() {
            let opened = origin::websocket(scene, &origin, &path, &fields).await;
            report.add(origin::websocket_check(&opened, true).about(subject));
        }
    }
    // A refresh that has begun is saved.
    jobs.finished().await;
    Ok(())
}

async fn signed_in(scene: &Scene, origin: &Origin, request: Request<Body>) -> Check {
    let answered = origin::send(scene, origin, request).await;
    if let Some(page) = answered.as_ref().ok().and_then(origin::page_of_a_proxy) {
        let sentence = format!("not known: the proxy in between answered itself ({page})");
        return Check::warning("sign-in", sentence, "ask whoever runs it to allow this host");
    }
    match answered {
        Ok(answer) if matches!(answer.status().as_u16(), 401 | 403) => Check::failed(
            "sign-in",
            format!("the credential was refused with {}", answer.status()),
            "sign in again, or ask what the account may use",
        ),
        Ok(answer) => Check::ok("sign-in", format!("answered {}", answer.status())),
        Err(error) => Check::failed("sign-in", in_words(&error), error.hint()),
    }
}

/// A GET without a credential.
pub(super) fn request(path: &str) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = path.parse().unwrap_or_default();
    let agent = HeaderValue::from_static(concat!("valetkey-doctor/", env!("CARGO_PKG_VERSION")));
    request.headers_mut().insert(USER_AGENT, agent);
    request
}

/// What clocks may differ by before a token looks expired that is not; RFC 7519 section 4.1.4 speaks of "a few
/// minutes, no more", and a refresh comes at least five seconds before the expiry.
const MOST_SKEW: time::Duration = time::Duration::seconds(60);

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::*;
    use crate::config::env::Environment;
    use crate::config::{Config, Overrides};
    use crate::origin::Target;
    use crate::sandbox::{Settings, World};
    use crate::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
    use crate::upstream::chain::Chain;
    use crate::upstream::dial::Dialer;
    use crate::upstream::{Step, Upstream};

    /// A scene whose one origin ends TLS and then says nothing.
    async fn silent(world: &World, target: &Target) -> Scene {
        let acceptor = world.acceptor(&[b"http/1.1"]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        Tasks::new().spawn(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                held.push(acceptor.accept(stream).await);
            }
        });
        let env = Environment::from_pairs([("HOME", world.dir())]);
        let config = Config::load(&Overrides::default(), &env).unwrap();
        let bundle = Some(world.ca_file().to_owned());
        let settings = TrustSettings { mode: TrustMode::Bundle, bundle, own: Vec::new() };
        let trust = Arc::new(UpstreamTrust::load(settings).unwrap());
        let resolve = [(target.clone(), Target::parse(&address).unwrap())].into();
        let upstream = Upstream::new(Dialer::new(trust.clone(), Chain::none(), resolve));
        let limit = Duration::from_millis(100);
        let rules = config.rules.clone();
        Scene { config, rules, trust, upstream, names_http_proxy: false, limit }
    }

    #[tokio::test]
    async fn an_upstream_that_says_nothing_is_given_up() {
        let world = World::start(Settings::default()).await.unwrap();
        let target = Target::parse("api.example.com:443").unwrap();
        let scene = silent(&world, &target).await;
        let origin = Origin::https(target);
        let asked = Asked { origin: origin.clone(), is_issuer: false, websocket: None };
        let asking = async {
            let met = origin::meet(&scene, &asked).await;
            assert_eq!(met.failure().unwrap().stage(), &Stage::Timeout(Step::Head));
            let check = signed_in(&scene, &origin, request("/")).await;
            assert!(format!("{check:?}").contains("the upstream sent no response in time"));
        };
        tokio::time::timeout(super::super::LIMIT, asking).await.unwrap();
    }
}
