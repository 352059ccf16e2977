//! Signs in with a browser on this machine, or with one elsewhere whose last address is pasted here.

use std::io::{self, BufRead as _};
use std::path::Path;

use super::{Arguments, Fresh, save};
use crate::cli::Typed;
use crate::cli::credentials::SignIn;
use crate::cli::output::{self, Failure};
use crate::config::env::Environment;
use crate::credential::Account;
use crate::oauth::authorize::Attempt;
use crate::oauth::callback::{Browser, Callback};
use crate::oauth::provider::Dialect;
use crate::oauth::{LoginError, page};
use crate::secret::Secret;
use crate::tasks;

pub(super) async fn sign_in(
    arguments: &Arguments,
    typed: &Typed,
    cache: &SignIn,
) -> Result<Account, Failure> {
    let callback = Callback::open(cache.provider.dialect()).await.map_err(output::hinted)?;
    let port = callback.port();
    let workspaces = cache.policy.workspaces();
    let redirect_uri = callback.redirect_uri();
    let attempt = Attempt::new(&cache.provider, redirect_uri, workspaces.as_deref()).await;
    let attempt = attempt.map_err(output::hinted)?;

    let reason = if arguments.no_browser { Some("") } else { why_no_browser(&typed.env) };
    match reason {
        None => say_opening(&attempt, port, cache),
        Some(reason) => say_url(&attempt, port, reason),
    }
    if arguments.qr {
        output::qr(attempt.url());
    }
    let (code, browser) = tokio::select! {
        arrival = callback.redirected(&attempt) => {
            let arrival = arrival.map_err(output::hinted)?;
            (arrival.code, Some(arrival.browser))
        }
        code = pasted(&attempt), if reason.is_some() => (code, None),
    };
    let outcome = finish(cache, &attempt, code).await;
    if let Some(browser) = browser {
        show(browser, cache, &outcome).await;
    }
    outcome
}

async fn finish(
    cache: &SignIn,
    attempt: &Attempt,
    code: Result<Secret, LoginError>,
) -> Result<Account, Failure> {
    let code = code.map_err(output::hinted)?;
    let answer = attempt.redeem(&cache.provider, &code).await.map_err(output::hinted)?;
    save(cache, Fresh::received(cache, answer)).await
}

/// The page says what the terminal says.
async fn show(browser: Browser, cache: &SignIn, outcome: &Result<Account, Failure>) {
    let page = match outcome {
        Ok(account) => {
            let what = if cache.is_codex { "ChatGPT" } else { cache.name.as_str() };
            page::signed_in(what, account)
        }
        Err(failure) => page::refused(failure.message(), failure.first_hint()),
    };
    browser.show(page).await;
}

fn say_opening(attempt: &Attempt, port: u16, cache: &SignIn) {
    output::words(format_args!("Starting local login server on http://localhost:{port}."));
    let url = attempt.url().to_owned();
    // It may wait for the browser to end.
    let opened = tasks::detached("browser", move || {
        let mut quiet = webbrowser::BrowserOptions::new();
        quiet.with_suppress_output(true);
        let opened =
            webbrowser::open_browser_with_options(webbrowser::Browser::Default, &url, &quiet);
        tracing::debug!(ok = opened.is_ok(), "browser opened");
    });
    drop(opened);
    output::words("If your browser did not open, go to this URL to sign in:\n");
    output::words(format_args!("{}\n", attempt.url()));
    if cache.provider.dialect() == Dialect::Codex {
        output::words(
            "On a remote or headless machine? Use `valetkey login --device-auth` instead.",
        );
    }
}

fn say_url(attempt: &Attempt, port: u16, reason: &str) {
    if !reason.is_empty() {
        output::words(format_args!("No browser is opened: {reason}."));
    }
    output::words("Open this URL in a browser, and sign in:\n");
    output::words(format_args!("{}\n", attempt.url()));
    output::words(format_args!(
        "The browser then ends on an address that starts with http://127.0.0.1:{port}/\n\
         and may say that it cannot be reached. Paste that address here, and press Enter.\n"
    ));
    output::words(format_args!(
        "Or let it be reached: before you sign in, type on the machine with the browser\n\n  \
         ssh -N -L {port}:127.0.0.1:{port} USER@THIS-MACHINE\n"
    ));
}

/// The code in the address that a person pastes. What is no such address is said, and asked again.
async fn pasted(attempt: &Attempt) -> Result<Secret, LoginError> {
    loop {
        // Nobody waits for that thread: it may read until the program ends.
        let line = match tasks::detached("stdin", read_line) {
            Ok(line) => line.await.ok().flatten(),
            Err(_) => None,
        };
        let Some(line) = line else {
            // Nobody will paste anything; the browser may still come.
            std::future::pending::<()>().await;
            continue;
        };
        match attempt.read_pasted(&line) {
            Err(error @ LoginError::NotTheRedirect(_)) => {
                output::hinted(error).report();
            }
            read => return read,
        }
    }
}

fn read_line() -> Option<String> {
    let mut line = String::new();
    match io::stdin().lock().read_line(&mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(line),
    }
}

/// Why a browser that this machine opened would be of no use; `None` where it would.
pub(super) fn why_no_browser(env: &Environment) -> Option<&'static str> {
    let is_set = |name: &&str| env.get(name).is_some();
    if env.get("BROWSER").is_some() {
        // Somebody has said which.
        return None;
    }
    if ["SSH_CONNECTION", "SSH_TTY", "SSH_CLIENT"].iter().any(is_set) {
        return Some("this terminal came over SSH");
    }
    let is_container =
        ["/.dockerenv", "/run/.containerenv"].iter().any(|file| Path::new(file).exists());
    if is_container || env.get("container").is_some() {
        return Some("this is a container");
    }
    let has_display = ["DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"].iter().any(is_set);
    (cfg!(target_os = "linux") && !has_display).then_some("this machine has no display")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_browser_is_of_use() {
        let table: [(&[(&str, &str)], bool); 6] = [
            (&[("BROWSER", "lynx"), ("SSH_TTY", "/dev/pts/0")], true),
            (&[("SSH_CONNECTION", "a b c d"), ("DISPLAY", ":10")], false),
            (&[("container", "podman"), ("DISPLAY", ":0")], false),
            (&[], !cfg!(target_os = "linux")),
            (&[("SSH_TTY", "")], !cfg!(target_os = "linux")),
            (&[("BROWSER", "")], !cfg!(target_os = "linux")),
        ];
        for (variables, is_of_use) in table {
            let env = Environment::from_pairs(variables.iter().copied());
            assert_eq!(why_no_browser(&env).is_none(), is_of_use, "{variables:?}");
        }
    }
}
