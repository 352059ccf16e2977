//! `valetkey health`: whether the running proxy answers, for container engines and scripts that wait for it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, response};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::output::{self, Failure};
use super::running::{self, ServerInfo};
use super::{Typed, process};
use crate::config::paths::Paths;
use crate::headers::VALETKEY_ERROR;
use crate::origin::{Host, Origin, Scheme, Target};
use crate::sandbox::client::{self, Client, HTTP1, Visit};
use crate::tls::trust::{TrustError, TrustMode, TrustSettings, UpstreamTrust};
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

/// The refusals that a request meant for ourselves can get: from a proxy that lets the client in, and from one that
/// wants a pass. Both say that clients are served.
const SERVES: [&str; 2] = ["target_forbidden", "pass_required"];

/// Exits 0 when the proxy answers, else 1. Looks at no configuration: a mistake in an edit makes no proxy ill.
pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let info = match &arguments.server_info {
        Some(file) if !file.exists() => {
            let file = file.display();
            let message = format!("there is no {file}: no proxy has written where it runs");
            return Err(Failure::new(message)
                .hint(format!("have one write it: valetkey serve --server-info {file}")));
        }
        Some(file) => ServerInfo::read(file),
        None => running::find_soon(&Paths::find(&typed.env, None)?.runtime_dir, &typed.env),
    };
    let info =
        info.ok_or_else(|| Failure::new("no proxy is running").hint("start one: valetkey serve"))?;
    let asked = process::runtime()?.block_on(async { timeout(LIMIT, ask(&info)).await });
    let late = |_| Err(format!("did not answer within {} s", LIMIT.as_secs()));
    asked.unwrap_or_else(late).map_err(|reason| {
        Failure::new(format!("the proxy at {} {reason}", info.proxy))
            .hint("see what it logs; then start it again: valetkey serve")
    })?;
    output::data(format_args!("{} answers (pid {})", info.proxy, info.pid));
    Ok(ExitCode::SUCCESS)
}

/// Sends a request that a proxy answers by itself: in origin-form, which names no target. At a Unix socket a
/// connection is answer enough.
///
/// # Errors
///
/// Why it is ill, as what it does.
#[expect(clippy::disallowed_methods, reason = "a proxy of this user, never an upstream")]
async fn ask(info: &ServerInfo) -> Result<(), String> {
    let answer = if let Some(path) = info.proxy.strip_prefix("unix:") {
        return UnixStream::connect(path).await.map(drop).map_err(does_not_answer);
    } else {
        let address = info.address().ok_or("has an odd address")?;
        match &info.tls_name {
            Some(name) => ask_in_tls(address, name, info).await?,
            None => ask_in_the_clear(address).await?,
        }
    };
    match serves(&answer) {
        true => Ok(()),
        false => Err(format!("gave an answer that is not valetkey's: {}", answer.status)),
    }
}

/// By a client as tools are: the way out trusts no certificate that a valetkey made.
async fn ask_in_tls(
    address: SocketAddr,
    name: &str,
    info: &ServerInfo,
) -> Result<response::Parts, String> {
    let unread = |error| format!("says that its roots are in {}: {error}", info.ca.display());
    let client = Client::straight_to(address, &info.ca).map_err(unread)?;
    let visit = Visit { target: name, name: Some(name), alpn: HTTP1 };
    let answer = client.send(visit, client::get("/")).await.map_err(does_not_answer)?;
    Ok(answer.into_parts().0)
}

async fn ask_in_the_clear(address: SocketAddr) -> Result<response::Parts, String> {
    let upstream = straight().map_err(does_not_answer)?;
    let answer = upstream.send_once(&in_the_clear(address), Request::new(Body::empty())).await;
    Ok(answer.map_err(does_not_answer)?.into_parts().0)
}

/// A way out that leads straight to what is asked without TLS.
fn straight() -> Result<Upstream, TrustError> {
    // No roots are needed; Mozilla's are always there.
    let settings =
        TrustSettings { mode: TrustMode::MozillaAndBundle, bundle: None, own: Vec::new() };
    let trust = Arc::new(UpstreamTrust::load(settings)?);
    Ok(Upstream::new(Dialer::new(trust, Chain::none(), [].into())))
}

fn in_the_clear(address: SocketAddr) -> Origin {
    let target = Target { host: Host::Ip(address.ip()), port: address.port() };
    Origin { scheme: Scheme::Http, target }
}

/// Whether an address is one at which nothing listens: whoever connects to it is refused by the system.
pub(super) async fn is_deserted(address: SocketAddr) -> bool {
    let Ok(upstream) = straight() else { return false };
    let Err(error) = upstream.open(&in_the_clear(address)).await else { return false };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        let refusal = error.downcast_ref::<io::Error>();
        if refusal.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn does_not_answer(error: impl std::error::Error) -> String {
    format!("does not answer: {}", output::chain_of(&error))
}

fn serves(answer: &response::Parts) -> bool {
    let code = answer.headers.get(VALETKEY_ERROR).and_then(|code| code.to_str().ok());
    code.is_some_and(|code| SERVES.contains(&code))
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    #[test]
    fn answers_of_a_proxy_that_serves() {
        for (code, expected) in [
            (Some("target_forbidden"), true),
            (Some("pass_required"), true),
            (Some("overloaded"), false),
            (None, false),
        ] {
            let mut answer = Response::new(());
            if let Some(code) = code {
                answer.headers_mut().insert(VALETKEY_ERROR, code.parse().unwrap());
            }
            assert_eq!(serves(&answer.into_parts().0), expected, "{code:?}");
        }
    }
}
