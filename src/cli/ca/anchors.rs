//! The system's store on Linux: a folder of certificates, and a program that puts them together for everybody.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::step::Step;
use super::stores::{self, Entry, Found, PREFIX, Store};
use crate::cli::output::Failure;
use crate::cli::programs::Search;
use crate::tls::ca::Root;
use crate::tls::file;

/// How distributions keep their store.
#[derive(Debug)]
struct Layout {
    /// The first of its kind; those made from it are the same.
    distribution: &'static str,
    /// Where the owner of the machine puts certificates.
    folder: &'static str,
    /// What puts them together.
    refresh: &'static [&'static str],
    /// The same after one was taken out.
    refresh_after_removal: &'static [&'static str],
    /// What comes of it, and programs read.
    bundle: &'static str,
    /// How `certutil` is had there.
    certutil: &'static str,
}

/// The store of this system.
#[derive(Clone, Debug)]
pub(super) struct Anchors {
    layout: &'static Layout,
    /// The program as it is called here.
    refresher: OsString,
    /// Whose roots these are: others may have theirs beside them.
    uid: u32,
}

impl Anchors {
    /// The layout whose folder and program are both here.
    pub(super) fn find(search: &Search) -> Option<Self> {
        let uid = rustix::process::geteuid().as_raw();
        Self::of(&|folder| Path::new(folder).is_dir(), &|program| search.find(program), uid)
    }

    fn of(
        has: &dyn Fn(&str) -> bool,
        find: &dyn Fn(&str) -> Option<OsString>,
        uid: u32,
    ) -> Option<Self> {
        LAYOUTS.iter().filter(|layout| has(layout.folder)).find_map(|layout| {
            let refresher = find(layout.refresh[0])?;
            Some(Self { layout, refresher, uid })
        })
    }

    /// What to type for `certutil`.
    pub(super) fn certutil_package(&self) -> &'static str {
        self.layout.certutil
    }

    /// The file of a root: of this user, because a machine may have several.
    fn file_name(&self, root: &Root) -> String {
        let digits = stores::short_name(root).split_off(PREFIX.len());
        format!("{PREFIX}{}-{digits}.crt", self.uid)
    }

    fn path(&self, name: &str) -> OsString {
        Path::new(self.layout.folder).join(name).into()
    }

    /// The digits in the name of a file, if it is like ours.
    fn digits_in<'a>(&self, name: &'a str) -> Option<&'a str> {
        name.strip_suffix(".crt")?.strip_prefix(PREFIX)?.strip_prefix(&format!("{}-", self.uid))
    }
}

impl Store for Anchors {
    fn name(&self) -> String {
        format!("the system's store ({}, {})", self.layout.distribution, self.layout.folder)
    }

    fn look(&self) -> Result<Found, Failure> {
        let among = |path: &Path| Root::among(&file::read(path).unwrap_or_default());
        let seen = among(Path::new(self.layout.bundle));
        let holds = |roots: &[Root], root: &Root| {
            roots.iter().any(|it| it.fingerprint() == root.fingerprint())
        };
        let folder = Path::new(self.layout.folder);
        let (mut found, mut all) = (Found::default(), Vec::new());
        for file in fs::read_dir(folder).map_err(|error| Failure::at(folder, error))? {
            let name = file?.file_name().to_string_lossy().into_owned();
            // Others may put in what we cannot read, or what is no file: a folder, a pipe.
            let roots = among(&folder.join(&name));
            all.extend(roots.iter().cloned());
            let Some(digits) = self.digits_in(&name) else { continue };
            match stores::named(digits, roots) {
                Some(root) => {
                    found.entries.push(Entry { counts: holds(&seen, &root), name, root });
                }
                None => found.notices.push(format!(
                    "{}: its name says that it is one of ours, and it is not",
                    folder.join(&name).display()
                )),
            }
        }
        found.entries.sort_by(|one, two| one.name.cmp(&two.name));
        found.stale = seen.into_iter().filter(|root| !holds(&all, root)).collect();
        Ok(found)
    }

    fn in_the_way(&self, root: &Root) -> Option<PathBuf> {
        let path = PathBuf::from(self.path(&self.file_name(root)));
        let found = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        // An empty one is left by a copy that was broken off, and then only root may read it.
        let is_ours = || file::read(&path).is_ok_and(|text| text == root.pem().as_bytes());
        (found.len() > 0 && !is_ours()).then_some(path)
    }

    fn changing(&self, add: &[Root], remove: &[Entry]) -> Vec<Step> {
        let copied = add.iter().filter_map(|root| {
            // `-T`: a link to a folder that has this name is replaced, and not gone into.
            let copy = ["install", "-m", "644", "-T", "--", "/dev/stdin"].map(OsString::from);
            let line = copy.into_iter().chain([self.path(&self.file_name(root))]);
            Some(Step::as_root(line).fed(root.pem(), root.path()?))
        });
        let mut steps: Vec<_> = copied.collect();
        if !remove.is_empty() {
            let files = remove.iter().map(|entry| self.path(&entry.name));
            let rm = [OsString::from("rm"), "-f".into()];
            steps.push(Step::as_root(rm.into_iter().chain(files)));
        }
        let only_copied = remove.is_empty() && !add.is_empty();
        let refresh =
            if only_copied { self.layout.refresh } else { self.layout.refresh_after_removal };
        let arguments = refresh.iter().skip(1).map(OsString::from);
        steps.push(Step::as_root([self.refresher.clone()].into_iter().chain(arguments)));
        steps
    }
}

/// From the manuals: update-ca-certificates(8) of Debian and of openSUSE, update-ca-trust(8) of Fedora and of Arch.
/// The first whose folder is there counts. Debian's is last, because its folder is one that people make elsewhere.
static LAYOUTS: [Layout; 4] = [
    Layout {
        distribution: "Fedora",
        folder: "/etc/pki/ca-trust/source/anchors",
        refresh: &["update-ca-trust", "extract"],
        refresh_after_removal: &["update-ca-trust", "extract"],
        bundle: "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        certutil: "sudo dnf install nss-tools",
    },
    Layout {
        distribution: "Arch",
        folder: "/etc/ca-certificates/trust-source/anchors",
        refresh: &["update-ca-trust"],
        refresh_after_removal: &["update-ca-trust"],
        bundle: "/etc/ca-certificates/extracted/tls-ca-bundle.pem",
        certutil: "sudo pacman -S nss",
    },
    Layout {
        distribution: "openSUSE",
        folder: "/etc/pki/trust/anchors",
        refresh: &["update-ca-certificates"],
        refresh_after_removal: &["update-ca-certificates"],
        bundle: "/var/lib/ca-certificates/ca-bundle.pem",
        certutil: "sudo zypper install mozilla-nss-tools",
    },
    Layout {
        distribution: "Debian",
        folder: "/usr/local/share/ca-certificates",
        refresh: &["update-ca-certificates"],
        // Without this it leaves the links in /etc/ssl/certs that lead to what is gone.
        refresh_after_removal: &["update-ca-certificates", "--fresh"],
        bundle: "/etc/ssl/certs/ca-certificates.crt",
        certutil: "sudo apt-get install libnss3-tools",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::origin::Host;
    use crate::tls::ca::LocalCa;

    fn of(folders: &[&str], programs: &[&str]) -> Option<Anchors> {
        let find = |program: &str| programs.contains(&program).then(|| program.into());
        Anchors::of(&|folder| folders.contains(&folder), &find, 1000)
    }

    #[test]
    fn each_distribution_has_its_steps() {
        let dir = tempfile::tempdir().unwrap();
        let names = [Host::parse("a.example").unwrap()];
        let ca = LocalCa::open(&dir.path().join("ca"), &names, Clock::system()).unwrap();
        let root = &ca.roots()[0];
        let (file, hex) = (root.path().unwrap().display(), root.fingerprint().to_hex());
        let ours = format!("valetkey-1000-{}.crt", &hex[..16]);
        let table = [
            (
                "Fedora",
                "/etc/pki/ca-trust/source/anchors",
                "update-ca-trust",
                " extract",
                " extract",
            ),
            ("Arch", "/etc/ca-certificates/trust-source/anchors", "update-ca-trust", "", ""),
            ("openSUSE", "/etc/pki/trust/anchors", "update-ca-certificates", "", ""),
            (
                "Debian",
                "/usr/local/share/ca-certificates",
                "update-ca-certificates",
                "",
                " --fresh",
            ),
        ];
        for (distribution, folder, program, added, removed) in table {
            let store = of(&[folder, "/usr/local/share/ca-certificates"], &[program]).unwrap();
            assert_eq!(store.layout.distribution, distribution);
            let shown = |add: &[Root], remove: &[Entry]| -> Vec<_> {
                store.changing(add, remove).iter().map(|step| step.shown(false)).collect()
            };
            let install = format!("sudo install -m 644 -T -- /dev/stdin {folder}/{ours} < {file}");
            assert_eq!(
                shown(std::slice::from_ref(root), &[]),
                [install, format!("sudo {program}{added}")]
            );
            let entry = |name: &str| Entry { name: name.into(), root: root.clone(), counts: true };
            let old = [entry(&ours), entry("valetkey-1000-0.crt")];
            let rm = format!("sudo rm -f {folder}/{ours} {folder}/valetkey-1000-0.crt");
            assert_eq!(shown(&[], &old), [rm, format!("sudo {program}{removed}")]);
            assert_eq!(shown(&[], &[]), [format!("sudo {program}{removed}")], "a stale bundle");
        }
    }

    #[test]
    fn a_folder_without_its_program_is_no_store() {
        assert!(of(&["/usr/local/share/ca-certificates"], &["update-ca-trust"]).is_none());
        assert!(of(&[], &["update-ca-certificates", "update-ca-trust"]).is_none());
    }
}
