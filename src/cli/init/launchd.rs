//! `valetkey init launchd`: an agent that macOS starts with its user's login and keeps running.

use std::path::Path;

use super::place::{Arguments, Plan, Wanted, filled};
use super::service::{self, Service, text};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};

const COMMAND: &str = "valetkey init launchd";
const AGENT: &str = include_str!("../../../config/init/launchd/valetkey.plist");

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    let exe = std::env::current_exe()?;
    let home = typed.env.text("HOME").ok_or_else(|| {
        Failure::new("HOME is not set").hint("run it as the user whose agent it is to be")
    })?;
    let plan = plan(&Service::of(typed, &config, &exe)?, Path::new(&home))?;
    let is_done = plan.carry_out(*arguments)?;
    service::warn(&config, &exe, None);
    if is_done {
        output::words(
            "then: launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/valetkey.plist; after a change first: \
             launchctl bootout gui/$(id -u)/valetkey",
        );
    }
    Ok(())
}

fn plan(service: &Service<'_>, home: &Path) -> Result<Plan, Failure> {
    let path = home.join("Library/LaunchAgents/valetkey.plist");
    let files = vec![Wanted::new(path, agent(service)?)];
    // The log's folder must be there before launchd opens it.
    Ok(Plan { command: COMMAND, files, folders: service.folders() })
}

fn agent(service: &Service<'_>) -> Result<String, Failure> {
    let mut arguments = vec![text(service.exe)?, "serve"];
    if let Some(file) = &service.config_file {
        arguments.extend(["--config", text(file)?]);
    }
    let argument = |it: &&str| format!("\t\t<string>{}</string>\n", escaped(it));
    let variable = |(name, value): &(&str, String)| {
        format!("\t\t<key>{name}</key>\n\t\t<string>{}</string>\n", escaped(value))
    };
    let arguments: String = arguments.iter().map(argument).collect();
    let environment: String = service.environment.iter().map(variable).collect();
    let log = service.config.paths.state_dir.join("serve.log");
    let values = [
        ("ARGUMENTS", arguments.as_str()),
        ("ENVIRONMENT", &environment),
        ("LOG", &escaped(text(&log)?)),
    ];
    Ok(filled(AGENT, &values))
}

/// Text as XML has it between two tags.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::place::tests::assert_golden;
    use crate::cli::init::service::tests::{configured, service};
    use crate::config::env::Environment;

    #[test]
    fn agents() {
        let env = Environment::from_pairs([("HOME", "/Users/me")]);
        let config = configured("", &env);
        assert_golden("launchd/valetkey.plist", &agent(&service(&config, &env)).unwrap());

        let env = Environment::from_pairs([("HOME", "/Users/me"), ("CODEX_HOME", "/a <b> & 'c'")]);
        let config = configured("", &env);
        let config_file = Some("/Users/me/mine.toml".into());
        let unusual = Service { config_file, ..service(&config, &env) };
        assert_golden("launchd/unusual.plist", &agent(&unusual).unwrap());
        let plan = plan(&unusual, Path::new("/Users/me")).unwrap();
        assert!(plan.folders.contains(&"/a <b> & 'c'".into()), "{plan:?}");
    }
}
