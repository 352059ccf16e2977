//! `valetkey init github`: a workflow whose steps use an API without holding its key.

use std::path::Path;

use super::InFolder;
use super::place::{self, Plan, Wanted};
use crate::cli::output::{self, Failure};

const COMMAND: &str = "valetkey init github";
const WORKFLOW: &str = include_str!("../../../config/init/github/valetkey.yml");
const CONFIG: &str = include_str!("../../../config/init/github/valetkey.toml");

pub(super) fn run(arguments: &InFolder) -> Result<(), Failure> {
    let dir = place::existing(&arguments.dir)?;
    if plan(&dir).carry_out(arguments.place)? {
        output::words(
            "then: gh secret set OPENAI_API_KEY && gh variable set VALETKEY_REPOSITORY && gh workflow run valetkey.yml",
        );
    }
    Ok(())
}

fn plan(dir: &Path) -> Plan {
    let github = dir.join(".github");
    Plan {
        command: COMMAND,
        files: vec![
            Wanted::new(github.join("workflows/valetkey.yml"), WORKFLOW.to_owned()),
            Wanted::new(github.join("valetkey.toml"), CONFIG.to_owned()),
        ],
        folders: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::place::tests::assert_golden;
    use crate::cli::init::service::tests::configured;
    use crate::config::env::Environment;

    #[test]
    fn files_of_a_workflow() {
        let dir = Path::new("/project/.github");
        for file in plan(Path::new("/project")).files {
            let inside = file.path.strip_prefix(dir).unwrap();
            assert_golden(&format!("github/{}", inside.display()), &file.content);
        }
    }

    #[test]
    fn its_configuration_is_one() {
        let env = Environment::from_pairs([("HOME", "/home/me")]);
        let config = configured(CONFIG, &env);
        assert_eq!(config.credentials.len(), 1);
        assert_eq!(config.rules.iter().count(), 1);
    }
}
