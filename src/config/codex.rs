//! Reads what Codex's own files say of its logins; everything else in them is Codex's business.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::CredentialKind;
use super::file::{Kind, Layer, Written};
use super::machine::MachineFiles;
use super::merge::Credentials;
use super::mistakes::Mistakes;
use super::table::{At, Table};
use super::terms::{self, Forced};
use crate::credential::Keep;
use crate::policy::Limit;

/// What Codex's files say, for some of its homes.
#[derive(Debug, Default)]
pub(super) struct CodexFiles {
    managed: Said,
    system: Said,
    required: Vec<Limit>,
    homes: BTreeMap<PathBuf, Said>,
}

/// What one of Codex's files says.
#[derive(Debug, Default)]
struct Said {
    forced: Forced,
    keep: Option<Keep>,
}

impl CodexFiles {
    /// Reads each file once; none where there is no home.
    pub(super) fn read(
        machine: &MachineFiles,
        homes: BTreeSet<PathBuf>,
        mistakes: &Mistakes,
    ) -> Self {
        if homes.is_empty() {
            return Self::default();
        }
        let said = |path: &Path| Said::read(path, mistakes);
        let requirements = Written::open(&machine.codex_requirements, false, mistakes);
        Self {
            managed: said(&machine.codex_managed),
            homes: homes.into_iter().map(|home| (home.clone(), said(&config_of(&home)))).collect(),
            system: said(&machine.codex_system),
            required: requirements
                .map(|text| of_foreign(&text, mistakes, terms::required))
                .unwrap_or_default(),
        }
    }

    /// What is asked of the login of a home that was read.
    pub(super) fn limits(&self, home: &Path) -> Vec<Limit> {
        let mut limits = Forced::first(self.layers(home).map(|said| &said.forced));
        limits.extend(self.required.clone());
        limits
    }

    /// Where Codex keeps the login of a home that was read; `None` where it is not told.
    fn keep(&self, home: &Path) -> Option<Keep> {
        self.layers(home).find_map(|said| said.keep)
    }

    /// The highest first. Each key is taken from the first that has it.
    fn layers(&self, home: &Path) -> impl Iterator<Item = &Said> {
        [Some(&self.managed), self.homes.get(home), Some(&self.system)].into_iter().flatten()
    }
}

impl Said {
    fn read(path: &Path, mistakes: &Mistakes) -> Self {
        let text = Written::open(path, false, mistakes);
        let said = |table: &Table<'_>, place: &str| Self {
            forced: Forced::read(table, place),
            keep: terms::keep(table, terms::CODEX_KEEP).map(|keep| keep.value),
        };
        text.map(|text| of_foreign(&text, mistakes, said)).unwrap_or_default()
    }
}

/// Codex's settings in a home.
pub(super) fn config_of(home: &Path) -> PathBuf {
    home.join("config.toml")
}

/// Reads a text in which not every key is ours. One that is no TOML is a mistake and says nothing.
pub(super) fn of_foreign<T: Default>(
    written: &Written,
    mistakes: &Mistakes,
    read: impl FnOnce(&Table<'_>, &str) -> T,
) -> T {
    let place = mistakes.open(&written.name, &written.text);
    let (document, errors) = DeTable::parse_recoverable(&written.text);
    if errors.is_empty() {
        return read(&Table::foreign(document.get_ref(), place, mistakes), &written.name);
    }
    // Codex's settings may hold keys of other services, in whatever line is wrong.
    mistakes.hide(&place);
    for error in errors {
        mistakes.add(&place.at(error.span().unwrap_or_default()), error.message());
    }
    T::default()
}

/// The homes of all Codex logins.
pub(super) fn homes(credentials: &Credentials) -> BTreeSet<PathBuf> {
    let home = |kind: &Option<CredentialKind>| match kind {
        Some(CredentialKind::Codex { home, .. }) => Some(home.clone()),
        _ => None,
    };
    credentials.values().filter_map(home).collect()
}

/// Settles where each login is kept: what we are told of it, of all logins; else, for one of Codex, what Codex
/// is told, and for others the keyring where there is one.
pub(super) fn settle_keep(credentials: &mut Credentials, layers: &[Layer], codex: &CodexFiles) {
    let of_all = layers.iter().find_map(|layer| layer.keep);
    for (name, kind) in credentials {
        let own = |kind: Kind| {
            let forms = layers.iter().filter_map(|layer| layer.credentials.get(name));
            let of_kind = |stated: &At<Kind>| stated.value == kind;
            let mut forms = forms.filter(|form| form.kind.as_ref().is_none_or(of_kind));
            forms.find_map(|form| form.keep.as_ref())
        };
        match kind {
            Some(CredentialKind::Codex { home, keep }) => {
                let told = own(Kind::Codex).map(|own| own.value).or(of_all);
                *keep = told.or_else(|| codex.keep(home)).unwrap_or_default();
            }
            Some(CredentialKind::OAuth(oauth)) => {
                let told = own(Kind::OAuth).map(|own| own.value).or(of_all);
                oauth.keep = told.unwrap_or(Keep::Auto);
            }
            Some(CredentialKind::ApiKey { .. }) | None => {}
        }
    }
}
