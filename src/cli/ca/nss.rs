//! NSS databases of the user, in which Chromium and Firefox keep roots, read and changed by `certutil`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::step::Step;
use super::stores::{self, Entry, Found, PREFIX, Store};
use crate::cli::output::{Failure, printable};
use crate::tls::ca::Root;

/// One database.
#[derive(Debug)]
pub(super) struct Nss {
    certutil: OsString,
    dir: PathBuf,
}

impl Nss {
    pub(super) fn new(certutil: OsString, dir: PathBuf) -> Self {
        Self { certutil, dir }
    }

    /// `certutil` on this database, with these arguments.
    fn line(&self, arguments: &[&str]) -> Vec<OsString> {
        let mut database = OsString::from("sql:");
        database.push(&self.dir);
        let mut line = vec![self.certutil.clone(), "-d".into(), database];
        line.extend(arguments.iter().map(OsString::from));
        line
    }

    fn read(&self, arguments: &[&str]) -> Result<Vec<u8>, Failure> {
        let line = self.line(arguments);
        let mut command = Command::new(&line[0]);
        let done = command.args(&line[1..]).stdin(Stdio::null()).output();
        let done = done.map_err(|error| Failure::at(Path::new(&line[0]), error))?;
        if done.status.success() {
            return Ok(done.stdout);
        }
        let said = String::from_utf8_lossy(&done.stderr);
        Err(Failure::at(&self.dir, printable(said.trim_end().lines().last().unwrap_or_default())))
    }
}

impl Store for Nss {
    fn name(&self) -> String {
        format!("the NSS database {}", self.dir.display())
    }

    fn look(&self) -> Result<Found, Failure> {
        let listed = self.read(&["-L"])?;
        let mut found = Found::default();
        for line in String::from_utf8_lossy(&listed).lines() {
            let Some((name, trust)) = ours(line) else { continue };
            let roots = Root::among(&self.read(&["-L", "-n", name, "-a"])?);
            let name = name.to_owned();
            match stores::named(&name[PREFIX.len()..], roots) {
                Some(root) => found.entries.push(Entry { counts: trusts(trust), name, root }),
                None => found.notices.push(format!(
                    "{}: `{}` is named like one of ours, and is not: left alone",
                    self.dir.display(),
                    printable(&name)
                )),
            }
        }
        Ok(found)
    }

    fn changing(&self, add: &[Root], remove: &[Entry]) -> Vec<Step> {
        let added = add.iter().filter_map(|root| {
            let name = stores::short_name(root);
            let mut line = self.line(&["-A", "-t", TRUSTED, "-n", &name, "-i"]);
            line.push(root.path()?.into());
            Some(Step::new(line))
        });
        let removed = remove.iter().map(|entry| Step::new(self.line(&["-D", "-n", &entry.name])));
        added.chain(removed).collect()
    }
}

/// The databases of browsers in a home: the shared one of Chromium and Chrome, and Firefox's profiles, each also
/// where snap and flatpak put them, and on macOS.
pub(super) fn databases(home: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = PLACES.iter().flat_map(|place| matching(home, place)).collect();
    found.retain(|dir| dir.join(DATABASE).is_file());
    // Firefox keeps links to profiles, snap one to the current version.
    let mut known = Vec::new();
    found.retain(|dir| match fs::canonicalize(dir) {
        Ok(dir) if !known.contains(&dir) => {
            known.push(dir);
            true
        }
        _ => false,
    });
    found
}

/// The folders that a path leads to whose parts may be `*`, in order of their names.
fn matching(home: &Path, place: &str) -> Vec<PathBuf> {
    place.split('/').fold(vec![home.to_owned()], |folders, part| {
        let below = |folder: PathBuf| -> Vec<PathBuf> {
            if part != "*" {
                return vec![folder.join(part)];
            }
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let mut below: Vec<_> = entries.map(|entry| entry.path()).collect();
            below.sort();
            below
        };
        folders.into_iter().flat_map(below).collect()
    })
}

/// The nickname and the trust in a line of `certutil -L`, if the name is like ours.
fn ours(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_whitespace();
    let (name, trust) = (words.next()?, words.next()?);
    (name.starts_with(PREFIX) && words.next().is_none()).then_some((name, trust))
}

/// Whether it may issue certificates of servers: `C` in the first of the three fields (certutil(1), `-t`).
fn trusts(trust: &str) -> bool {
    trust.split(',').next().is_some_and(|servers| servers.contains('C'))
}

/// Servers' certificates, and neither mail nor code.
const TRUSTED: &str = "C,,";

/// The file of a database in the form that all browsers of today have.
const DATABASE: &str = "cert9.db";

const PLACES: [&str; 9] = [
    ".pki/nssdb",
    "snap/*/current/.pki/nssdb",
    ".var/app/*/.pki/nssdb",
    ".mozilla/firefox/*",
    // Firefox 147 and newer, where there is no older profile.
    ".config/mozilla/firefox/*",
    "snap/*/common/.mozilla/firefox/*",
    ".var/app/*/.mozilla/firefox/*",
    ".var/app/*/config/mozilla/firefox/*",
    "Library/Application Support/Firefox/Profiles/*",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::origin::Host;
    use crate::tls::ca::LocalCa;

    #[test]
    fn databases_are_where_browsers_have_them() {
        let home = tempfile::tempdir().unwrap();
        let with = [
            ".pki/nssdb",
            "snap/chromium/current/.pki/nssdb",
            ".var/app/com.google.Chrome/.pki/nssdb",
            ".mozilla/firefox/abc.default-release",
            ".mozilla/firefox/xyz.work",
            ".config/mozilla/firefox/abc.default",
            "snap/firefox/common/.mozilla/firefox/abc.default",
            ".var/app/org.mozilla.firefox/.mozilla/firefox/abc.default",
            "Library/Application Support/Firefox/Profiles/abc.default",
        ];
        for dir in with {
            fs::create_dir_all(home.path().join(dir)).unwrap();
            fs::write(home.path().join(dir).join(DATABASE), "").unwrap();
        }
        for without in [".mozilla/firefox/Crash Reports", ".thunderbird/abc.default"] {
            fs::create_dir_all(home.path().join(without)).unwrap();
        }
        let link = home.path().join("snap/chromium/7");
        std::os::unix::fs::symlink(home.path().join("snap/chromium/current"), link).unwrap();
        let found = databases(home.path());
        assert_eq!(found, with.map(|dir| home.path().join(dir)));
    }

    #[test]
    fn lines_of_certutil_are_read() {
        let table = [
            ("valetkey-0011223344556677                          C,,  ", Some(true)),
            ("valetkey-0011223344556677                          CT,C,C", Some(true)),
            ("valetkey-0011223344556677                          ,,   ", Some(false)),
            ("valetkey-0011223344556677                          p,C,", Some(false)),
            ("my valetkey-0011223344556677                       C,,", None),
            ("Certificate Nickname                               Trust Attributes", None),
            ("", None),
        ];
        for (line, expected) in table {
            assert_eq!(ours(line).map(|(_, trust)| trusts(trust)), expected, "{line}");
        }
    }

    #[test]
    fn a_database_has_its_steps() {
        let dir = tempfile::tempdir().unwrap();
        let names = [Host::parse("a.example").unwrap()];
        let ca = LocalCa::open(&dir.path().join("ca"), &names, Clock::system()).unwrap();
        let root = ca.roots()[0].clone();
        let name = stores::short_name(&root);
        let entry = Entry { name: name.clone(), root: root.clone(), counts: true };
        let store = Nss::new("certutil".into(), "/home/u/.pki/nssdb".into());
        let steps = store.changing(std::slice::from_ref(&root), &[entry]);
        let shown: Vec<_> = steps.iter().map(|step| step.shown(false)).collect();
        let file = root.path().unwrap().display();
        assert_eq!(
            shown,
            [
                format!("certutil -d sql:/home/u/.pki/nssdb -A -t C,, -n {name} -i {file}"),
                format!("certutil -d sql:/home/u/.pki/nssdb -D -n {name}"),
            ]
        );
    }
}
