//! The arguments that put a container, or the build of an image, behind the proxy.

use std::fmt;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::{client_env, texts};
use crate::cli::output::{self, Failure};
use crate::cli::{Typed, process};
use crate::client_env::{ClientEnv, Folder, IN_CONTAINER, ProxyUrl};
use crate::config::Config;

/// Arguments of `docker run`, on one line: the variables, and the folder that they name files of.
pub(super) fn print_run(
    typed: &Typed,
    config: &Config,
    proxy: ProxyUrl,
) -> Result<String, Failure> {
    let user = rustix::process::geteuid().as_raw();
    warn_of_loopback(
        &proxy,
        format_args!(
            "add --network host,\n\
             and --user {user} where it does not run as you (or name its user in the listener's allow_uids)."
        ),
    );
    let (dir, client_env) = mounted(typed, config, proxy)?;
    let mount = format!("{}:{IN_CONTAINER}:ro", dir.display());
    let variables = texts(&client_env).map(|(name, value)| ("-e", format!("{name}={value}")));
    Ok(line([("-v", mount)].into_iter().chain(variables)))
}

/// Arguments of `docker build`, on one line: the proxy for as long as the build goes on, and the roots as a secret,
/// so that nothing of either is in the image.
pub(super) fn print_build(
    typed: &Typed,
    config: &Config,
    proxy: ProxyUrl,
) -> Result<String, Failure> {
    warn_of_loopback(
        &proxy,
        format_args!("add --network host;\nbuilds run as root: allow_uids = [0] in the listener."),
    );
    let (dir, client_env) = mounted(typed, config, proxy)?;
    let roots = client_env.get(ROOTS).map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let secret = format!("id={SECRET},src={}", dir.join(roots).display());
    let of_builds = texts(&client_env).filter(|(name, _)| KNOWN_TO_BUILDS.contains(name));
    let variables = of_builds.map(|(name, value)| ("--build-arg", format!("{name}={value}")));
    Ok(line(variables.chain([("--secret", secret)])))
}

/// The folder that a container sees, and the variables that name files in it.
fn mounted(
    typed: &Typed,
    config: &Config,
    proxy: ProxyUrl,
) -> Result<(PathBuf, ClientEnv), Failure> {
    let dir = folder(config)?;
    let client_env = client_env(typed, config, proxy, Folder::Mounted(&dir))?;
    Ok((dir, client_env))
}

/// Every container may enter it, and only those: it is in a folder that is the user's alone.
fn folder(config: &Config) -> Result<PathBuf, Failure> {
    process::private_dir(&config.paths.runtime_dir)?;
    let dir = config.paths.runtime_dir.join("docker");
    let made = fs::create_dir_all(&dir)
        .and_then(|()| fs::set_permissions(&dir, Permissions::from_mode(0o755)));
    made.map_err(|error| Failure::at(&dir, error))?;
    Ok(dir)
}

fn line(options: impl Iterator<Item = (&'static str, String)>) -> String {
    let all = [HOST].into_iter().map(|(option, value)| (option, value.to_owned())).chain(options);
    let words: Vec<_> =
        all.map(|(option, value)| format!("{option} {}", output::shell_word(&value))).collect();
    words.join(" ") + "\n"
}

fn warn_of_loopback(proxy: &ProxyUrl, what_it_takes: fmt::Arguments<'_>) {
    if !proxy.is_loopback() {
        return;
    }
    output::words(format_args!(
        "valetkey: {host} is the container itself, unless it shares this machine's network: {what_it_takes}\n\
         Else let valetkey listen where the container reaches it, and say where: --proxy-url http://x:PASS@host.docker.internal:{port}",
        host = proxy.host(),
        port = proxy.port(),
    ));
}

/// Docker's own name for this machine, which on Linux has to be asked for.
const HOST: (&str, &str) = ("--add-host", "host.docker.internal:host-gateway");

/// The variable whose file has all roots.
const ROOTS: &str = "SSL_CERT_FILE";

/// What a `Dockerfile` calls the roots: `RUN --mount=type=secret,id=valetkey-ca`.
const SECRET: &str = "valetkey-ca";

/// Arguments that every build has, without an `ARG`, and that are kept out of the image's history.
const KNOWN_TO_BUILDS: [&str; 4] = ["HTTPS_PROXY", "NO_PROXY", "https_proxy", "no_proxy"];
