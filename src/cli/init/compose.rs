//! `valetkey init compose`: a sidecar that signs the other services in, and one of them as an example.

use std::path::Path;

use super::InFolder;
use super::place::{self, Plan, Wanted};
use crate::cli::output::{self, Failure};

const COMMAND: &str = "valetkey init compose";
const COMPOSE: &str = include_str!("../../../config/init/compose/compose.valetkey.yaml");
const CONFIG: &str = include_str!("../../../config/init/compose/config.toml");
const GITIGNORE: &str = include_str!("../../../config/init/compose/gitignore");

/// What a person types next, once.
const NEXT: &str = "\
then, once (and keep .env out of version control):
  echo \"VALETKEY_USER=$(id -u):$(id -g)\" >>.env
  docker compose -f compose.valetkey.yaml run --rm -T valetkey ca print >valetkey/ca.pem
  docker compose -f compose.valetkey.yaml run --rm -T valetkey init codex --dir /decoy
  p=$(docker compose -f compose.valetkey.yaml run --rm -T valetkey pass new app) && echo \"VALETKEY_PASS=$p\" >>.env
and: docker compose -f compose.valetkey.yaml up";

pub(super) fn run(arguments: &InFolder) -> Result<(), Failure> {
    let dir = place::existing(&arguments.dir)?;
    if plan(&dir).carry_out(arguments.place)? {
        output::words(NEXT);
    }
    Ok(())
}

fn plan(dir: &Path) -> Plan {
    let ours = dir.join("valetkey");
    Plan {
        command: COMMAND,
        files: vec![
            Wanted::new(dir.join("compose.valetkey.yaml"), COMPOSE.to_owned()),
            Wanted::new(ours.join("config.toml"), CONFIG.to_owned()),
            Wanted::new(ours.join(".gitignore"), GITIGNORE.to_owned()),
        ],
        // Docker would make them root's.
        folders: vec![ours.join("data"), ours.join("decoy")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::place::tests::assert_golden;

    #[test]
    fn files_of_a_sidecar() {
        let dir = Path::new("/project");
        for file in plan(dir).files {
            let inside = file.path.strip_prefix(dir).unwrap();
            assert_golden(&format!("compose/{}", inside.display()), &file.content);
        }
    }
}
