//! What lies on this machine: configuration, limits, logins, the local CA, the company's roots.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};

use time::OffsetDateTime;

use super::report::{Check, Report};
use super::roots_in;
use crate::cli::output::counted;
use crate::cli::status::{Shown, in_words};
use crate::cli::{Typed, audit, health, running};
use crate::clock::Clock;
use crate::config::{AuditConfig, BundleSetting, Config, ConfigErrors, Mistake, ProxyUrl, Trust};
use crate::origin::Host;
use crate::store;
use crate::tls::ca::Root;
use crate::tls::trust::{UpstreamTrust, Weakness, weakness};
use crate::tokens::State;

pub(super) fn configuration(config: &Config) -> Check {
    let rules: BTreeSet<&str> = config.rules.iter().map(|rule| rule.name.as_str()).collect();
    let file = &config.paths.config_file;
    let read = if file.exists() { file.display().to_string() } else { "the defaults".to_owned() };
    let (rules, credentials) = (rules.len(), config.credentials.len());
    let counts = [counted(rules, "rule"), counted(credentials, "credential")].join(", ");
    Check::ok("configuration", format!("{read}: {counts}"))
}

/// Every mistake with its place.
pub(super) fn mistakes(errors: &ConfigErrors) -> Check {
    let line = |mistake: &Mistake| {
        let place = mistake.position().map(|(line, column)| format!(":{line}:{column}"));
        let (file, place) = (mistake.file().unwrap_or("settings"), place.unwrap_or_default());
        let hint = mistake.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
        format!("{file}{place}: {mistake}{hint}")
    };
    let lines: Vec<String> = errors.mistakes().iter().map(line).collect();
    Check::failed("configuration", lines.join("; "), "see each under its line: valetkey check")
}

pub(super) fn managed(config: &Config) -> Check {
    match config.managed() {
        Ok(settings) if settings.is_empty() => Check::ok("managed", "nothing is managed"),
        Ok(settings) => Check::ok(
            "managed",
            format!("{}: valetkey check --managed", counted(settings.len(), "setting")),
        ),
        Err(errors) => Check::failed(
            "managed",
            errors.render(false, 100),
            "mend the file, or ask its owner to",
        ),
    }
}

/// Whether the audit can be written, where there is one.
pub(super) fn audit(config: &Config) -> Option<Check> {
    if let Err(failure) = audit::look_ahead(config) {
        return Some(Check::of_failure("audit", &failure));
    }
    match &config.audit {
        AuditConfig::Off => None,
        AuditConfig::Stderr => Some(Check::ok("audit", "between the lines of the log")),
        AuditConfig::File { path, .. } => Some(Check::ok("audit", path.display().to_string())),
    }
}

/// Whether a proxy runs, which nothing here needs but a shell that was put behind it.
pub(super) async fn running(config: &Config, typed: &Typed) -> Check {
    let proxy = running::find(&config.paths.runtime_dir, &typed.env);
    let runs = proxy.map(|proxy| format!("runs at {} (pid {})", proxy.proxy, proxy.pid));
    if let Some((variable, address)) = deserted(typed).await {
        let fix = match runs {
            Some(_) => "eval \"$(valetkey env)\"",
            None => "valetkey serve; or take the variables back: eval \"$(valetkey env --unset)\"",
        };
        let runs = runs.as_deref().unwrap_or("not running");
        let sentence =
            format!("{runs}, but {variable} of this shell names {address}, where nothing listens");
        return Check::warning("serve", sentence, fix);
    }
    let runs = runs
        .unwrap_or_else(|| "not running, which neither this nor `valetkey run` needs".to_owned());
    Check::ok("serve", runs)
}

/// The variable that leads programs of this shell to a port of this machine at which nothing listens.
async fn deserted(typed: &Typed) -> Option<(&'static str, SocketAddr)> {
    let set = |name: &'static str| Some((name, typed.env.text(name)?));
    let (variable, proxy) = ["HTTPS_PROXY", "https_proxy"].into_iter().find_map(set)?;
    let proxy = ProxyUrl::parse(&proxy).ok()?;
    let target = proxy.target();
    let address = match &target.host {
        Host::Ip(address) if target.host.is_loopback() => *address,
        Host::Name(name) if &**name == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Host::Ip(_) | Host::Name(_) => return None,
    };
    let address = SocketAddr::new(address, target.port);
    health::is_deserted(address).await.then_some((variable, address))
}

/// The roots that clients are to trust; none where there is no CA yet, or one that cannot be used.
pub(super) fn local_ca(config: &Config, report: &mut Report) -> Vec<Root> {
    let roots = match roots_in(config) {
        Ok(roots) => roots,
        Err(failure) => {
            report.add(Check::of_failure("ca", &failure));
            return Vec::new();
        }
    };
    report.add(match roots.last() {
        None => Check::ok("ca", "there is none yet: it is made at the first start"),
        Some(newest) => of_newest(newest, roots.len()),
    });
    roots
}

fn of_newest(newest: &Root, count: usize) -> Check {
    let until = in_words(newest.not_after());
    if newest.not_after() <= Clock::system().now() {
        let fix = "start valetkey again, which makes a new one; then: valetkey ca install";
        return Check::failed("ca", format!("the newest root has expired: {until}"), fix);
    }
    if let Err(error) = newest.check_key() {
        let fix = error.hint().unwrap_or_else(|| "see: valetkey ca path".to_owned());
        return Check::failed("ca", error.to_string(), fix);
    }
    Check::ok("ca", format!("{}; the newest until {until}", counted(count, "root")))
}

/// What is trusted beside the system's roots, and what of it is trusted in vain.
pub(super) fn bundle(config: &Config, trust: &UpstreamTrust, report: &mut Report) {
    let roots = trust.now();
    let (bundle, system) = (roots.bundle().len(), roots.system().len());
    let setting =
        config.upstream.ca_bundles.iter().find(|it| Some(&*it.path) == trust.bundle_path());
    let beside = match config.upstream.trust {
        Trust::Bundle => "and no others (trust = \"bundle\")".to_owned(),
        Trust::MozillaAndBundle => "beside Mozilla's list".to_owned(),
        Trust::System | Trust::SystemAndBundle => {
            format!("beside {} of the system", counted(system, "root"))
        }
    };
    report.add(match setting {
        None => Check::ok("bundle", format!("none; {}", beside.trim_start_matches("beside "))),
        Some(BundleSetting { path, named_by }) if config.upstream.trust == Trust::System => {
            let sentence = format!("{} ({named_by}) is not used", path.display());
            let fix = "upstream.trust says \"system\": set it to \"system+bundle\"";
            Check::warning("bundle", sentence, fix)
        }
        Some(BundleSetting { path, named_by }) => {
            let roots = counted(bundle, "root");
            Check::ok("bundle", format!("{} ({named_by}): {roots}, {beside}", path.display()))
        }
    });
    for notice in roots.notices() {
        report.add(Check::warning("bundle", notice, "leave it out of the file, or make it right"));
    }
    // The list of public CAs has old roots whose owners sign with newer ones.
    let own = roots.bundle().iter().filter(|root| !roots.system().contains(root));
    let weak = own.filter_map(weakness);
    let useless = roots.system().iter().filter_map(weakness).filter(Weakness::is_certain);
    for weakness in weak.chain(useless) {
        let fix =
            "ask your company for a root with a newer key (RSA of 2048 bits or more, SHA-256)";
        report.add(Check::warning("bundle", weakness.to_string(), fix));
    }
}

/// A login or a key: whether it can be used, how old it is, who else may read it.
pub(super) fn credential(shown: &Shown, report: &mut Report) {
    let fix = || match shown.status.state {
        State::NoLogin => shown.name.how_to_sign_in(),
        State::Dead(_) | State::Unsupported(_) => {
            format!("sign in again: {}", shown.name.how_to_sign_in())
        }
        State::Forbidden(_) => "see: valetkey check --managed".to_owned(),
        State::Unreadable(_) => shown.hint().unwrap_or_else(|| "see: valetkey check".to_owned()),
        State::Ok => "see: valetkey status".to_owned(),
    };
    let because = shown.reason().map(|reason| format!(": {reason}")).unwrap_or_default();
    let sentence = format!("{}{because} ({})", shown.sentence(), shown.place);
    let check = match shown.status.state {
        State::Ok => Check::ok("store", sentence),
        State::NoLogin => Check::warning("store", sentence, fix()),
        _ => Check::failed("store", sentence, fix()),
    };
    report.add(check.about(&shown.name));
    for warning in shown.file.iter().flat_map(|file| store::warnings(file)) {
        let fix = "make the file yours alone, outside of shared and synced folders";
        report.add(Check::warning("permissions", warning, fix).about(&shown.name));
    }
    if let (State::Ok, Some(expires_at)) = (&shown.status.state, shown.status.expires_at) {
        report.add(token(shown, expires_at).about(&shown.name));
    }
}

fn token(shown: &Shown, expires_at: OffsetDateTime) -> Check {
    let refreshed = shown.status.last_refresh.map(|at| format!("; refreshed {}", in_words(at)));
    let sentence = format!("expires {}{}", in_words(expires_at), refreshed.unwrap_or_default());
    if expires_at > Clock::system().now() {
        return Check::ok("token", sentence);
    }
    // Not a failure: the next request refreshes it.
    let sentence = format!("{sentence}; the next request refreshes it");
    let fix = "nothing to do if the issuer can be reached (below); else sign in again";
    Check::warning("token", sentence, fix)
}
