//! `valetkey health`: whether the running proxy answers, for container engines and scripts that wait for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use tokio::time::timeout;

use super::output::{self, Failure};
use super::running::{self, ServerInfo};
use super::{Typed, process};
use crate::config::paths::Paths;
use crate::origin::{Host, Origin, Scheme, Target};
use crate::tls::trust::{TrustMode, TrustSettings, UpstreamTrust};
use crate::upstream::Upstream;
use crate::upstream::body::Body;
use crate::upstream::chain::Chain;
use crate::upstream::dial::Dialer;

/// What `health` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The file that the proxy's `--server-info` names [default: where `status` looks]
    #[arg(long, value_name = "FILE")]
    server_info: Option<PathBuf>,
}

/// Longest wait for the answer, which takes no thought. With the two seconds in which a proxy may still be starting
/// it makes five.
const LIMIT: Duration = Duration::from_secs(3);

/// The header of our refusals, and the two that a request meant for ourselves can get: from somebody who is let in,
/// and from somebody without a pass. Both say that clients are served.
const REFUSAL: &str = "x-valetkey-error";
const SERVES: [&str; 2] = ["target_forbidden", "pass_required"];

/// Exits 0 when the proxy answers, else 1. Looks at no configuration: a mistake in an edit makes no proxy ill.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let info = match &arguments.server_info {
        Some(file) => ServerInfo::read(file),
        None => running::find_soon(&Paths::find(&typed.env, None)?.runtime_dir, &typed.env),
    };
    let info =
        info.ok_or_else(|| Failure::new("no proxy is running").hint("start one: valetkey serve"))?;
    let address =
        info.address().ok_or_else(|| Failure::new("the running proxy's address is odd"))?;
    process::runtime()?.block_on(ask(reachable(address)))?;
    output::data(format_args!("{} answers (pid {})", info.proxy, info.pid));
    Ok(ExitCode::SUCCESS)
}

/// Where a listener on all addresses is reached from here.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Sends a request that a proxy answers by itself: in origin-form, which names no target.
async fn ask(address: SocketAddr) -> Result<(), Failure> {
    // Plain HTTP to this machine: no roots are needed, and no file is read for them.
    let settings =
        TrustSettings { mode: TrustMode::MozillaAndBundle, bundle: None, own: Vec::new() };
    let trust = Arc::new(UpstreamTrust::load(settings).map_err(output::hinted)?);
    let upstream = Upstream::new(Dialer::new(trust, Chain::none(), [].into()));
    let target = Target { host: Host::Ip(address.ip()), port: address.port() };
    let origin = Origin { scheme: Scheme::Http, target };
    let ill = |reason: String| {
        Failure::new(format!("the proxy at http://{address} {reason}"))
            .hint("see what it logs; then start it again: valetkey serve")
    };
    match timeout(LIMIT, upstream.send_once(&origin, Request::new(Body::empty()))).await {
        Ok(Ok(answer)) if serves(&answer) => Ok(()),
        Ok(Ok(answer)) => {
            Err(ill(format!("gave an answer that is not valetkey's: {}", answer.status())))
        }
        Ok(Err(error)) => Err(ill(format!("does not answer: {}", output::chain_of(&error)))),
        Err(_late) => Err(ill(format!("did not answer within {} s", LIMIT.as_secs()))),
    }
}

fn serves(answer: &Response<Body>) -> bool {
    let code = answer.headers().get(REFUSAL).and_then(|code| code.to_str().ok());
    code.is_some_and(|code| SERVES.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_asked_on_loopback() {
        for (listens, asked) in [
            ("0.0.0.0:8377", "127.0.0.1:8377"),
            ("[::]:8377", "[::1]:8377"),
            ("127.0.0.2:1", "127.0.0.2:1"),
        ] {
            assert_eq!(reachable(listens.parse().unwrap()), asked.parse().unwrap());
        }
    }

    #[test]
    fn answers_of_a_proxy_that_serves() {
        let answer = |code: Option<&str>| {
            let mut answer = Response::new(Body::empty());
            if let Some(code) = code {
                answer.headers_mut().insert(REFUSAL, code.parse().unwrap());
            }
            answer
        };
        assert!(
            serves(&answer(Some("target_forbidden"))) && serves(&answer(Some("pass_required")))
        );
        assert!(!serves(&answer(Some("overloaded"))) && !serves(&answer(None)));
    }
}
