//! Says what a managed file may settle, and shows what it does.

use std::fmt;

use super::audit::AuditForm;
use super::file::{DEFAULTS, Layer};
use super::machine::MachineFiles;
use super::rule::RuleForm;
use super::terms::OnViolation;
use super::upstream::{ProxyChoice, Trust};
use super::{Config, ConfigErrors, CredentialKind};

/// A setting that is in force, and where it is said. `Display` shows both and no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The setting, as a file says it.
    pub text: String,
    /// The file.
    pub place: String,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  ({})", self.text, self.place)
    }
}

impl Config {
    /// What the user cannot change: all that the managed file settles, and every limit on the logins of
    /// this configuration, wherever it is said.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] for files that were changed since and can no longer be read.
    pub fn managed(&self) -> Result<Vec<Setting>, ConfigErrors> {
        let mut settings = self.managed.clone();
        for kind in self.credentials.values() {
            let CredentialKind::Codex { home, .. } = kind else { continue };
            for limit in self.policies.read(home)?.limits() {
                let setting = Setting { text: limit.to_string(), place: limit.place.clone() };
                // Two logins have most limits in common.
                if !settings.contains(&setting) {
                    settings.push(setting);
                }
            }
        }
        Ok(settings)
    }
}

/// What the managed file among the layers settles, but for limits on logins.
pub(super) fn settings(layers: &[Layer], machine: &MachineFiles) -> Vec<Setting> {
    let Some(layer) = layers.first().filter(|layer| layer.is_managed) else { return Vec::new() };
    let mut texts = Vec::new();
    let mut say = |key: &str, value: Option<String>| {
        texts.extend(value.map(|value| format!("{key} = {value:?}")));
    };
    say("default", layer.default.and_then(|it| word(DEFAULTS, it)));
    say("on_policy_violation", layer.on_violation.and_then(|it| word(&OnViolation::WORDS, it)));
    say("audit.to", layer.audit.as_ref().and_then(AuditForm::in_words));
    say("upstream.trust", layer.trust.as_ref().and_then(|it| word(&Trust::WORDS, it.value)));
    say("upstream.proxy", layer.proxy.as_ref().map(ProxyChoice::to_string));
    say("upstream.proxy_login", layer.proxy_login.as_ref().map(ToString::to_string));
    say("upstream.ca_bundle", layer.ca_bundle.as_ref().map(|path| path.display().to_string()));
    texts.extend(layer.credentials.keys().map(|name| format!("[credentials.{name}]")));
    let rules = layer.rules.iter().filter_map(|form| form.rule.as_ref());
    texts.extend(rules.map(|rule| format!("[[rules]] {:?} on {}", rule.name, rule.host)));
    let place = machine.managed.display().to_string();
    texts.into_iter().map(|text| Setting { text, place: place.clone() }).collect()
}

fn word<T: Copy + PartialEq>(words: &[(&str, T)], meaning: T) -> Option<String> {
    words.iter().find(|(_, known)| *known == meaning).map(|(word, _)| (*word).to_owned())
}

/// Marks the rules of a managed file, which are looked at before all others.
pub(super) fn pin(mut rules: Vec<RuleForm>, is_managed: bool) -> Vec<RuleForm> {
    for rule in rules.iter_mut().filter_map(|form| form.rule.as_mut()) {
        rule.pinned = is_managed;
    }
    rules
}

pub(super) const DOCUMENT: &[&str] = &[
    "default",
    "forced_login_method",
    "forced_chatgpt_workspace_id",
    "allowed_login_methods",
    "allowed_chatgpt_workspaces",
    "require_mfa",
    "on_policy_violation",
    "audit",
    "upstream",
    "credentials",
    "rules",
];
pub(super) const UPSTREAM: &[&str] = &["ca_bundle", "trust", "proxy", "proxy_login"];

#[cfg(test)]
mod tests;
