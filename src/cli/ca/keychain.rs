//! The system's store on macOS: the login keychain of the user, whom alone the roots concern.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::step::Step;
use super::stores::{self, Entry, Found, Store};
use crate::cli::output::Failure;
use crate::tls::ca::Root;

/// The login keychain.
#[derive(Debug)]
pub(super) struct Keychain(PathBuf);

impl Keychain {
    pub(super) fn of(home: &Path) -> Self {
        Self(home.join("Library/Keychains/login.keychain-db"))
    }
}

impl Store for Keychain {
    fn name(&self) -> String {
        format!("your keychain ({})", self.0.display())
    }

    fn look(&self) -> Result<Found, Failure> {
        let mut security = Command::new("security");
        // The common name is a part of the names of all our roots, and of nobody else's.
        security.args(["find-certificate", "-a", "-c", "valetkey local CA", "-p"]).arg(&self.0);
        // That there is none is an error to it.
        let listed = security.stdin(Stdio::null()).output()?;
        let entry = |root| Entry { name: stores::short_name(&root), root, counts: true };
        let entries = Root::among(&listed.stdout).into_iter().map(entry).collect();
        Ok(Found { entries, ..Found::default() })
    }

    fn changing(&self, add: &[Root], remove: &[Entry]) -> Vec<Step> {
        let keychain = OsString::from(&self.0);
        let added = add.iter().filter_map(|root| {
            let line =
                ["security", "add-trusted-cert", "-r", "trustRoot", "-k"].map(OsString::from);
            let files = [keychain.clone(), root.path()?.into()];
            Some(Step::new(line.into_iter().chain(files)))
        });
        let removed = remove.iter().map(|entry| {
            let hash = entry.root.fingerprint().to_hex().to_uppercase();
            // `-t`: the setting that it is trusted goes with it.
            let line = ["security", "delete-certificate", "-Z", &hash, "-t"].map(OsString::from);
            Step::new(line.into_iter().chain([keychain.clone()]))
        });
        added.chain(removed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::origin::Host;
    use crate::tls::ca::LocalCa;

    #[test]
    fn the_keychain_has_its_steps() {
        let dir = tempfile::tempdir().unwrap();
        let names = [Host::parse("a.example").unwrap()];
        let ca = LocalCa::open(&dir.path().join("ca"), &names, Clock::system()).unwrap();
        let root = ca.roots()[0].clone();
        let entry = Entry { name: String::new(), root: root.clone(), counts: true };
        let keychain = "'/Users/some one/Library/Keychains/login.keychain-db'";
        let steps = Keychain::of(Path::new("/Users/some one"))
            .changing(std::slice::from_ref(&root), &[entry]);
        let shown: Vec<_> = steps.iter().map(|step| step.shown(false)).collect();
        let (file, hash) = (root.path().unwrap().display(), root.fingerprint().to_hex());
        assert_eq!(
            shown,
            [
                format!("security add-trusted-cert -r trustRoot -k {keychain} {file}"),
                format!("security delete-certificate -Z {} -t {keychain}", hash.to_uppercase()),
            ]
        );
    }
}
