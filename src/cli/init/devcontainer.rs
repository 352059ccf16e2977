//! `valetkey init devcontainer`: a Feature that trusts the local CA, and the settings that lead to the host's proxy.

use std::fs;
use std::path::{Path, PathBuf};

use super::place::{self, Plan, Wanted, filled};
use super::{InFolder, port};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};

const COMMAND: &str = "valetkey init devcontainer";
const FEATURE: &str = include_str!("../../../config/init/devcontainer/devcontainer-feature.json");
const INSTALL: &str = include_str!("../../../config/init/devcontainer/install.sh");
const SETTINGS: &str = include_str!("../../../config/init/devcontainer/settings.jsonc");
const WHOLE: &str = include_str!("../../../config/init/devcontainer/devcontainer.json");

/// What a person's settings have in them once ours are taken over.
const TAKEN_OVER: &str = "VALETKEY_PASS";

pub(super) fn run(arguments: &InFolder, typed: &Typed) -> Result<(), Failure> {
    let (dir, port) = (place::existing(&arguments.dir)?, port(&typed.config()?));
    let theirs = theirs(&dir);
    let is_done = plan(&dir, theirs.as_deref(), port).carry_out(arguments.place)?;
    if let Some(file) = theirs {
        show_settings(&dir, &file, port)?;
    }
    if is_done {
        output::words(format_args!(
            "then, on the host: VALETKEY_PASS=\"$(valetkey pass new devcontainer --ttl 8h)\" && export VALETKEY_PASS, \
             and open the folder from that shell"
        ));
        output::words(
            "containers must reach the host's proxy: docs/devcontainer.md says which listener that takes",
        );
    }
    Ok(())
}

/// The settings that are there; a file of comments and JSON that only a person can change well.
fn theirs(dir: &Path) -> Option<PathBuf> {
    [usual(dir), dir.join(".devcontainer.json")].into_iter().find(|file| file.exists())
}

fn usual(dir: &Path) -> PathBuf {
    dir.join(".devcontainer/devcontainer.json")
}

fn plan(dir: &Path, theirs: Option<&Path>, port: u16) -> Plan {
    let feature = dir.join(".devcontainer/valetkey");
    let mut files = vec![
        Wanted::new(feature.join("devcontainer-feature.json"), FEATURE.to_owned()),
        Wanted::script(feature.join("install.sh"), INSTALL.to_owned()),
    ];
    if theirs.is_none() {
        let settings = settings(dir, &usual(dir), port);
        files.push(Wanted::new(usual(dir), filled(WHOLE, &[("SETTINGS", &settings)])));
    }
    Plan { command: COMMAND, files, folders: Vec::new() }
}

/// Our part of the settings in `file`.
fn settings(dir: &Path, file: &Path, port: u16) -> String {
    // A Feature of one's own is named from where the settings are, and must lie in .devcontainer.
    let feature = if file == usual(dir) { "./valetkey" } else { "./.devcontainer/valetkey" };
    filled(SETTINGS, &[("FEATURE", feature), ("PORT", &port.to_string())])
}

/// Shows what to take over into settings that are there, until it is.
fn show_settings(dir: &Path, file: &Path, port: u16) -> Result<(), Failure> {
    let text = fs::read_to_string(file).map_err(|error| Failure::at(file, error))?;
    if text.contains(TAKEN_OVER) {
        output::words(format_args!("unchanged {}", file.display()));
    } else {
        output::words(format_args!("take this over into {}, which is yours:", file.display()));
        output::raw(&settings(dir, file, port));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::place::tests::assert_golden;

    #[test]
    fn a_project_without_settings_gets_some() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path(), theirs(dir.path()).as_deref(), 8377);
        for file in &plan.files {
            let inside = file.path.strip_prefix(dir.path().join(".devcontainer")).unwrap();
            assert_golden(&format!("devcontainer/{}", inside.display()), &file.content);
        }
        assert_eq!(plan.files.iter().map(|it| it.mode).collect::<Vec<_>>(), [0o644, 0o755, 0o644]);
    }

    #[test]
    fn settings_that_are_there_are_left_to_their_owner() {
        for (name, feature) in [
            (".devcontainer/devcontainer.json", "\"./valetkey\""),
            (".devcontainer.json", "\"./.devcontainer/valetkey\""),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join(".devcontainer")).unwrap();
            let file = dir.path().join(name);
            fs::write(&file, "{}").unwrap();
            assert_eq!(theirs(dir.path()).as_deref(), Some(&*file));
            assert_eq!(plan(dir.path(), Some(&file), 8377).files.len(), 2);
            let settings = settings(dir.path(), &file, 9000);
            assert!(settings.contains(feature) && settings.contains("internal:9000"), "{settings}");
            assert!(settings.contains(TAKEN_OVER));
        }
    }
}
