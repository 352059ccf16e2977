//! Answers git as its credential helper (gitcredentials(7), git-credential(1)).

use std::process::ExitCode;

use zeroize::Zeroizing;

use super::{USER, host_of, question, secret_for};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::credential::CredentialName;

/// Says nothing where it has no answer, so that git goes on to its next helper; what git wants kept or forgotten
/// is not ours, and operations of a later git are none of ours either.
pub(super) fn answer(
    operation: &str,
    name: Option<&CredentialName>,
    typed: &Typed,
) -> Result<ExitCode, Failure> {
    let asked = question()?;
    if operation != "get" || attribute(&asked, "protocol") != Some("https") {
        return Ok(ExitCode::SUCCESS);
    }
    let Some(target) = attribute(&asked, "host").and_then(host_of) else {
        return Ok(ExitCode::SUCCESS);
    };
    if let Some(found) = secret_for(&target, name, typed)? {
        let user = attribute(&asked, "username").filter(|user| !user.is_empty()).unwrap_or(USER);
        let secret = found.text.as_str();
        let mut text = Zeroizing::new(format!("username={user}\npassword={secret}\n"));
        if let Some(at) = found.expires_at {
            text.push_str(&format!("password_expiry_utc={}\n", at.unix_timestamp()));
        }
        output::raw(&text);
    }
    Ok(ExitCode::SUCCESS)
}

/// An attribute of the question, which ends at an empty line; the last one of a name counts.
fn attribute<'a>(asked: &'a str, name: &str) -> Option<&'a str> {
    let lines = asked.lines().take_while(|line| !line.is_empty());
    let pairs = lines.filter_map(|line| line.split_once('='));
    pairs.filter(|(known, _)| *known == name).last().map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes() {
        let asked = "protocol=https\nhost=a.example:8443\nwwwauth[]=Basic realm=\"x\"\nhost=b.example\nodd\n\nhost=late\n";
        let table = [
            ("protocol", Some("https")),
            ("host", Some("b.example")),
            ("wwwauth[]", Some("Basic realm=\"x\"")),
            ("odd", None),
            ("username", None),
        ];
        for (name, expected) in table {
            assert_eq!(attribute(asked, name), expected, "{name}");
        }
    }
}
