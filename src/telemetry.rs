//! Sets logging up, and holds the rule of what may be logged: what valetkey says of itself.

use std::io::IsTerminal as _;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

/// Starts logging to standard error, for the messages that `filter` names (`debug`,
/// `valetkey::proxy=trace`).
///
/// Whatever the filter says, libraries are heard at `info` and above only: below that some of them print
/// header fields and handshakes, which may hold secrets.
///
/// # Errors
///
/// The filter's own mistake, as a sentence.
pub fn start(filter: &str) -> Result<(), String> {
    filter.split(',').try_for_each(check)?;
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let ours = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target(env!("CARGO_CRATE_NAME"), LevelFilter::TRACE);
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter(ours);
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|e| e.to_string())
}

/// A word that is no level would be the name of a part that there is not, and nothing would be logged.
fn check(directive: &str) -> Result<(), String> {
    let directive = directive.trim();
    let is_level = || directive.parse::<LevelFilter>().is_ok();
    match directive.is_empty() || directive.contains(['=', '[']) || is_level() {
        true => Ok(()),
        false => Err(format!("`{directive}` is no level")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_filter() {
        let table = [
            ("", true),
            ("debug", true),
            ("INFO", true),
            ("off", true),
            ("valetkey::proxy=trace", true),
            ("[connection]", true),
            (" warn ", true),
            ("verbose", false),
            ("valetkey", false),
            ("debu", false),
        ];
        for (directive, is_good) in table {
            assert_eq!(check(directive).is_ok(), is_good, "{directive}");
        }
    }
}
