//! Signs in with a code that is typed into a browser elsewhere.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use tokio::time::{Instant, interval};

use super::browser::why_no_browser;
use super::{Arguments, Fresh, browser, save};
use crate::cli::Typed;
use crate::cli::credentials::SignIn;
use crate::cli::output::{self, Failure};
use crate::credential::Account;
use crate::oauth::device::DeviceCode;
use crate::oauth::{Answer, LoginError};

pub(super) async fn sign_in(
    arguments: &Arguments,
    typed: &Typed,
    cache: &SignIn,
) -> Result<Account, Failure> {
    let code = match DeviceCode::ask(&cache.provider).await {
        Err(LoginError::NoDeviceCodes(sentence)) if why_no_browser(&typed.env).is_none() => {
            output::hinted(LoginError::NoDeviceCodes(sentence)).report();
            output::words("Signing in with the browser of this machine instead.");
            return browser::sign_in(arguments, typed, cache).await;
        }
        asked => asked.map_err(output::hinted)?,
    };
    let minutes = code.lives.as_secs().div_ceil(60);
    output::words(format_args!("Open this page in any browser, and sign in:\n\n  {}\n", code.page));
    output::words(format_args!(
        "Enter this one-time code (it expires in {minutes} minutes):\n\n  {}\n",
        code.user_code
    ));
    output::words(
        "Enter only a code that you asked for: whoever sends you one wants to be signed in as you.",
    );
    if arguments.qr || io::stderr().is_terminal() {
        output::qr(code.page_with_code.as_deref().unwrap_or(&code.page));
    }
    let answer = counting_down(&code, cache).await.map_err(output::hinted)?;
    save(cache, Fresh::received(cache, answer)).await
}

/// Waits for the person, and shows on a terminal how long there is yet.
async fn counting_down(code: &DeviceCode, cache: &SignIn) -> Result<Answer, LoginError> {
    let shows = io::stderr().is_terminal();
    let end = Instant::now() + code.lives;
    let mut seconds = interval(Duration::from_secs(1));
    let mut signed_in = std::pin::pin!(code.wait(&cache.provider));
    let answer = loop {
        tokio::select! {
            answer = signed_in.as_mut() => break answer,
            _ = seconds.tick(), if shows => {
                let left = end.saturating_duration_since(Instant::now()).as_secs();
                output::progress(format_args!("waiting, {:02}:{:02} left", left / 60, left % 60));
            }
        }
    };
    if shows {
        output::progress("");
    }
    answer
}
