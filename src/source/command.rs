//! Has a program tell a value.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use zeroize::Zeroizing;

use super::SourceError;
use crate::secret::{Secret, UnfitSecret};

/// Runs a line in the shell, with these variables besides our own, and takes what it prints, without one
/// newline at its end. What it says on standard error goes to ours.
///
/// # Errors
///
/// [`SourceError`] for one that fails, takes too long or prints no text. None quotes what it printed.
pub async fn tell(line: &str, variables: &[(&str, String)]) -> Result<Secret, SourceError> {
    let place = || "the output of the command".to_owned();
    let unreadable = |reason| SourceError::Unreadable { place: place(), reason };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", line]).envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    // What it says itself is for whoever started us.
    let child = command.stderr(Stdio::inherit()).spawn().map_err(unreadable)?;
    let output = tokio::time::timeout(LIMIT, child.wait_with_output());
    let output = output.await.map_err(|_late| unreadable(late()))?.map_err(unreadable)?;
    let told = Zeroizing::new(output.stdout);
    if !output.status.success() {
        return Err(unreadable(std::io::Error::other(format!("{}", output.status))));
    }
    let unfit = |reason| SourceError::Unfit { place: place(), reason };
    let text = std::str::from_utf8(&told)
        .map_err(|error| unfit(UnfitSecret::Octet { at: error.valid_up_to() }))?;
    let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    super::check_text(text).map_err(unfit)?;
    Ok(Secret::new(text))
}

fn late() -> std::io::Error {
    std::io::Error::other(format!("it took more than {} s", LIMIT.as_secs()))
}

/// Longest time for the program. A request waits for it, and a program that asks a server has time enough.
const LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_commands_tell() {
        let table = [
            ("printf 'user:pass word'", Ok("user:pass word")),
            ("echo user:password", Ok("user:password")),
            ("echo \"$WHO:x\"", Ok("me:x")),
            ("printf 'a\\nb\\n'", Err("cannot be used")),
            ("printf 'a\\377'", Err("cannot be used")),
            ("true", Err("cannot be used")),
            ("echo secret; exit 3", Err("cannot be read")),
            ("no-such-program-here 2>/dev/null", Err("cannot be read")),
        ];
        for (line, expected) in table {
            let told = tell(line, &[("WHO", "me".to_owned())]).await;
            match (told, expected) {
                (Ok(told), Ok(expected)) => assert_eq!(told.expose(), expected, "{line}"),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().contains(expected), "{line}: {error}");
                    assert!(!format!("{error:?}").contains("secret"), "{line}");
                }
                (told, expected) => panic!("{line}: {told:?}, not {expected:?}"),
            }
        }
    }
}
