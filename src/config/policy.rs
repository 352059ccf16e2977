//! Gathers which logins are allowed from every file that may say so, each time it is asked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::codex::{CodexFiles, config_of, of_foreign};
use super::file::Written;
use super::machine::MachineFiles;
use super::mistakes::{ConfigErrors, Mistakes};
use super::table::Table;
use super::terms::{self, Forced};
use crate::policy::{Limit, Policy};

/// The files that say which logins are allowed: ours, Codex's and those of the owner of the machine.
///
/// What they say together can only narrow. Within our own files, and within Codex's, a key counts in the
/// highest file that has it; the managed file and the requirements add theirs.
#[derive(Clone, Debug)]
pub struct PolicyFiles {
    machine: MachineFiles,
    user: PathBuf,
}

impl PolicyFiles {
    /// `user` is the user's configuration.
    pub(super) fn new(machine: MachineFiles, user: PathBuf) -> Self {
        Self { machine, user }
    }

    /// What is allowed now for the login of a Codex home. A file that is not there says nothing.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] for a file that cannot be read, that is no TOML or that says something that is no
    /// policy. The caller must then take nothing for allowed.
    pub fn read(&self, codex_home: &Path) -> Result<Policy, ConfigErrors> {
        let mistakes = Mistakes::default();
        let managed = self.machine.open_managed(&mistakes);
        let mut limits = of(managed.as_ref(), &mistakes, managed_limits);
        let ours = [&self.user, &self.machine.system].map(|path| {
            let text = Written::open(path, false, &mistakes);
            of(text.as_ref(), &mistakes, Forced::read)
        });
        limits.extend(Forced::first(&ours));
        let homes = BTreeSet::from([codex_home.to_owned()]);
        limits.extend(CodexFiles::read(&self.machine, homes, &mistakes).limits(codex_home));
        mistakes.finish()?;
        Ok(Policy::new(limits))
    }

    /// The files whose change may change [`PolicyFiles::read`], whether they exist or not.
    pub fn files(&self, codex_home: &Path) -> Vec<PathBuf> {
        let machine = &self.machine;
        let of_codex = [
            machine.codex_managed.clone(),
            config_of(codex_home),
            machine.codex_system.clone(),
            machine.codex_requirements.clone(),
        ];
        self.settings_files().into_iter().chain(of_codex).collect()
    }

    /// Whether all of these mistakes are in the user's own configuration.
    pub fn are_of_the_user(&self, errors: &ConfigErrors) -> bool {
        let user = self.user.display().to_string();
        errors.mistakes().iter().all(|mistake| mistake.file() == Some(&*user))
    }

    /// Those of them that are ours.
    pub(super) fn settings_files(&self) -> Vec<PathBuf> {
        vec![self.machine.managed.clone(), self.user.clone(), self.machine.system.clone()]
    }
}

fn of<T: Default>(
    text: Option<&Written>,
    mistakes: &Mistakes,
    read: impl FnOnce(&Table<'_>, &str) -> T,
) -> T {
    text.map(|text| of_foreign(text, mistakes, read)).unwrap_or_default()
}

fn managed_limits(table: &Table<'_>, place: &str) -> Vec<Limit> {
    let mut limits = Forced::first([&Forced::read(table, place)]);
    limits.extend(terms::required(table, place));
    limits.extend(terms::second_factor(table, place));
    limits
}
