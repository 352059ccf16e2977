//! Answers docker as its credential helper (the protocol of docker-credential-helpers).

use std::process::ExitCode;

use serde_json::json;
use zeroize::Zeroizing;

use super::{USER, host_of, question, secret_for};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::credential::CredentialName;
use crate::origin::Target;

/// What docker compares with to know that there is nothing, and no trouble.
const NOT_FOUND: &str = "credentials not found in native keychain";

/// Errors go to standard output, where docker looks for them.
pub(super) fn answer(
    operation: &str,
    name: Option<&CredentialName>,
    typed: &Typed,
) -> Result<ExitCode, Failure> {
    match operation {
        "get" => get(name, typed),
        "list" => {
            output::data("{}");
            Ok(ExitCode::SUCCESS)
        }
        "erase" => {
            // Read to its end, so that docker can write it.
            question()?;
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            question()?;
            Ok(refused(
                "valetkey stores no login of docker's: add a credential and a rule for the registry",
            ))
        }
    }
}

fn get(name: Option<&CredentialName>, typed: &Typed) -> Result<ExitCode, Failure> {
    let asked = question()?;
    let server = asked.trim();
    let found = match registry(server) {
        Some(target) => secret_for(&target, name, typed)?,
        None => None,
    };
    let Some(found) = found else { return Ok(refused(NOT_FOUND)) };
    let answer = json!({ "ServerURL": server, "Username": USER, "Secret": found.text.as_str() });
    let text = Zeroizing::new(format!("{answer}\n"));
    output::raw(&text);
    Ok(ExitCode::SUCCESS)
}

fn refused(why: &str) -> ExitCode {
    output::data(why);
    ExitCode::FAILURE
}

/// The registry's host: docker names it with or without a scheme and a path.
fn registry(server: &str) -> Option<Target> {
    let rest = match server.split_once("://") {
        Some(("https", rest)) => rest,
        Some(_) => return None,
        None => server,
    };
    host_of(rest.split('/').next().unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries() {
        let table = [
            ("ghcr.io", Some("ghcr.io:443")),
            ("https://index.docker.io/v1/", Some("index.docker.io:443")),
            ("registry.example:5000", Some("registry.example:5000")),
            ("http://registry.example", None),
            ("", None),
        ];
        for (server, expected) in table {
            let found = registry(server).map(|target| target.to_string());
            assert_eq!(found.as_deref(), expected, "{server}");
        }
    }
}
