//! `valetkey doctor`: looks at everything that a request depends on, and names what is in its way.

mod listeners;
mod local;
mod network;
mod origin;
mod report;
mod runtimes;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::output;
use super::process::{self, Signals};
use super::start::ca_dir;
use super::status;
use super::way_out;
use super::{Typed, chain};
use crate::config::Config;
use crate::rules::Rules;
use crate::tls::ca::{LocalCa, Root};
use crate::tls::trust::UpstreamTrust;
use crate::upstream::Upstream;
use crate::upstream::dial::Dialer;
use report::{Check, Report};

/// What `doctor` takes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "It needs no running proxy, and changes nothing. Exit code: 0 all is well, 1 there are warnings, \
                        2 something has failed."
)]
pub(super) struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Also send a signed-in GET to each ruled host, and judge its answer; else no credential leaves
    #[arg(long)]
    sign_in: bool,
}

/// Exits 0 when all is well, 1 with warnings, 2 when something has failed. The proxy need not run.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, super::Failure> {
    let mut report = Report::new(!arguments.json);
    process::harden();
    let examining = async {
        // Programs that it tries end with it, and hear no signal themselves.
        let mut signals = Signals::ending()?;
        tokio::select! {
            examined = examine(arguments, typed, &mut report) => examined,
            signal = signals.next() => {
                let status = 128 + signal.as_raw() as u8;
                Err(super::Failure::new("stopped by a signal").status(status))
            }
        }
    };
    process::runtime()?.block_on(examining)?;
    if arguments.json {
        output::data(format_args!("{:#}", report.to_json()));
    } else {
        output::data(report.summary());
    }
    Ok(ExitCode::from(report.exit_status()))
}

/// One check after the other; what depends on one that has failed is left out.
async fn examine(
    arguments: &Arguments,
    typed: &Typed,
    report: &mut Report,
) -> Result<(), super::Failure> {
    if let Err(errors) = Config::load(&typed.overrides, &typed.env) {
        report.add(local::mistakes(&errors));
        report.leaves_out("logins, bundle, proxy and hosts");
        return Ok(());
    }
    let config = match typed.config() {
        Ok(config) => config,
        Err(failure) => {
            report.add(Check::of_failure("configuration", &failure));
            report.leaves_out("logins, bundle, proxy and hosts");
            return Ok(());
        }
    };
    report.add(local::configuration(&config));
    report.add(local::managed(&config));
    report.add(local::running(&config, typed).await);
    listeners::examine(&config, report);
    if let Some(check) = local::audit(&config) {
        report.add(check);
    }
    let roots = local::local_ca(&config, report);
    let Some(trust) = bundle(&config, &roots, report) else {
        report.leaves_out("logins, proxy and hosts");
        return Ok(());
    };
    let Some(upstream) = way_out(&config, typed, &trust, report) else {
        report.leaves_out("logins and hosts");
        return Ok(());
    };

    let shown = match status::read_through(typed, &config, upstream.clone()).await {
        Ok(shown) => shown,
        Err(failure) => {
            report.add(Check::of_failure("store", &failure));
            report.leaves_out("the proxy and hosts");
            return Ok(());
        }
    };
    shown.iter().for_each(|shown| local::credential(shown, report));
    if !report.has_failed("ca") {
        runtimes::examine(&config, &trust, typed, report).await;
    }
    let kinds = shown.iter().filter_map(|it| Some((it.name.clone(), it.status.kind?))).collect();
    let names_http_proxy =
        ["http_proxy", "HTTP_PROXY"].iter().any(|name| typed.env.get(name).is_some());
    let rules = config.rules.with_kinds(kinds);
    let scene = Scene { rules, config, trust, upstream, names_http_proxy, limit: LIMIT };
    network::examine(&scene, report).await;
    if arguments.sign_in {
        network::sign_in(&scene, typed, report).await?;
    }
    Ok(())
}

/// What the checks of the network look at.
struct Scene {
    config: Config,
    /// With the kinds of the logins that are there.
    rules: Rules,
    trust: Arc<UpstreamTrust>,
    upstream: Upstream,
    /// Whether there is an `HTTP_PROXY`, which people take for one that counts here.
    names_http_proxy: bool,
    /// Longest wait for an answer.
    limit: Duration,
}

/// Longest wait for an answer. A request may wait for half an hour, since an API may think for long; nothing that the
/// doctor asks takes thought, and a person waits for it.
const LIMIT: Duration = Duration::from_secs(30);

/// The roots that are trusted upstream.
fn bundle(config: &Config, roots: &[Root], report: &mut Report) -> Option<Arc<UpstreamTrust>> {
    match way_out::trust(&config.upstream, roots.iter().map(Root::spki).collect()) {
        Ok(trust) => {
            local::bundle(config, &trust, report);
            Some(Arc::new(trust))
        }
        Err(failure) => {
            report.add(Check::of_failure("bundle", &failure));
            None
        }
    }
}

fn way_out(
    config: &Config,
    typed: &Typed,
    trust: &Arc<UpstreamTrust>,
    report: &mut Report,
) -> Option<Upstream> {
    match chain::chain(config, &typed.env) {
        Ok(chain) => {
            let resolve = config.upstream.resolve.clone();
            Some(Upstream::new(Dialer::new(trust.clone(), chain, resolve)))
        }
        Err(failure) => {
            report.add(Check::of_failure("chain", &failure));
            None
        }
    }
}

/// The roots of the local CA, if there is one that can be read.
fn roots_in(config: &Config) -> Result<Vec<Root>, super::Failure> {
    LocalCa::load_roots(&ca_dir(&config.paths)).map_err(output::hinted)
}
