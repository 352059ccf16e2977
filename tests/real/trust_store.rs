//! `ca install`, `uninstall` and `rotate` with Debian's own `update-ca-certificates` and `certutil`: programs that are told
//! nothing trust our CA after it, and not before it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use valetkey::clock::Clock;
use valetkey::origin::Host;
use valetkey::tls::ca::LocalCa;

use super::support::{Done, Scene, chromium, done, program};

const THINGS: &str = "https://api.example.com/v1/things";
const HOST: &str = "api.example.com";

/// A machine with a store of its own: programs run in it see its `/etc/ssl/certs`.
struct Machine {
    scene: Scene,
    /// How a namespace of one's own is had here.
    unshare: &'static str,
    /// Who runs the programs.
    user: Option<u32>,
}

impl Machine {
    /// A machine that knows what this one knows, but for what its owner has put in. `None` where it cannot be had.
    async fn new() -> Option<Self> {
        let needed = ["unshare", "update-ca-certificates", "certutil", "curl", "openssl"];
        needed.iter().try_for_each(|name| program(name).map(drop))?;
        let mut machine = Self { scene: Scene::usual().await, unshare: "-m", user: None };
        for empty in ["local", "hooks", "sudoers"] {
            fs::create_dir_all(machine.own(empty)).unwrap();
        }
        let mut copy = Command::new("cp");
        let copied = copy.args(["-r", "--preserve=links", "-P", "/etc/ssl/certs"]);
        assert!(copied.arg(machine.own("certs")).status().await.unwrap().success());
        // Who is not root is it in a namespace of users.
        for how in ["-m", "-rm"] {
            machine.unshare = how;
            if machine.run(&["true"]).await.status == 0 {
                // Without what the owner of the real machine has put in.
                machine.run_ok(&["update-ca-certificates", "--fresh"]).await;
                return Some(machine);
            }
        }
        println!("skipped: this user may not make a namespace in which /etc/ssl is another folder");
        None
    }

    /// The same with NSS databases, as Chromium and Firefox have them.
    async fn with_databases() -> Option<Self> {
        let machine = Self::new().await?;
        for dir in DATABASES {
            let dir = machine.scene.path(dir);
            fs::create_dir_all(&dir).unwrap();
            let database = format!("sql:{}", dir.display());
            machine.run_ok(&["certutil", "-d", &database, "-N", "--empty-password"]).await;
        }
        Some(machine)
    }

    /// The same for the user that every Debian has, who may not ask sudo. `None` where the real sudo cannot be asked.
    async fn of_nobody() -> Option<Self> {
        let mut machine = Self::with_databases().await?;
        if machine.unshare != "-m"
            || ["sudo", "setpriv", "script"].iter().any(|name| program(name).is_none())
        {
            println!("skipped: only root can become another user who asks the real sudo");
            return None;
        }
        machine.user = Some(NOBODY);
        let home = machine.scene.home.path().to_owned();
        let given =
            Command::new("chown").args(["-R", "-h", "65534:65534"]).arg(&home).status().await;
        assert!(given.unwrap().success());
        for theirs in ["machine/certs", "machine/local", "machine/hooks", "machine/sudoers"] {
            let taken =
                Command::new("chown").args(["-R", "-h", "0:0"]).arg(home.join(theirs)).status();
            assert!(taken.await.unwrap().success());
        }
        Some(machine)
    }

    fn allow_sudo(&self) {
        let allowed = self.own("sudoers/nobody");
        fs::write(&allowed, "nobody ALL=(ALL) NOPASSWD: ALL\n").unwrap();
        fs::set_permissions(&allowed, fs::Permissions::from_mode(0o440)).unwrap();
    }

    fn own(&self, name: &str) -> PathBuf {
        self.scene.path("machine").join(name)
    }

    /// A program that is told nothing but where it is at home.
    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args([self.unshare, "--", "sh", "-c", EXCHANGE, "sh"]).arg(self.own(""));
        command.arg(env!("CARGO_BIN_EXE_valetkey"));
        if let Some(user) = self.user.map(|user| user.to_string()) {
            command.args(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--"]);
        }
        command.args(line).env_clear().envs(&self.scene.env);
        command.env("PATH", format!("{}:/usr/sbin", std::env!("PATH")));
        command.current_dir(self.scene.home.path()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn run(&self, line: &[&str]) -> Done {
        done(self.command(line).spawn().unwrap()).await
    }

    async fn run_ok(&self, line: &[&str]) -> Done {
        let done = self.run(line).await;
        assert_eq!(done.status, 0, "{line:?}: {done:#?}");
        done
    }

    /// `valetkey ca …`, which must succeed.
    async fn ca(&self, arguments: &[&str]) -> Done {
        self.run_ok(&self.ca_line(arguments)).await
    }

    async fn ca_fails(&self, arguments: &[&str]) -> Done {
        let done = self.run(&self.ca_line(arguments)).await;
        assert_eq!(done.status, 1, "{arguments:?}: {done:#?}");
        done
    }

    fn ca_line<'a>(&self, arguments: &[&'a str]) -> Vec<&'a str> {
        // Where `EXCHANGE` puts the binary, so that every user can reach it.
        [&["/usr/local/share/ca-certificates/../valetkey-under-test", "ca"], arguments].concat()
    }

    async fn serve(&self) -> Serving {
        let line = ["serve", "--listen", "127.0.0.1:0"];
        let mut child = self.scene.valetkey(&line).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        loop {
            let line = said.next_line().await.unwrap().expect("serve ended at once");
            if let Some(url) = line.split_once("listening on ").map(|(_, url)| url.to_owned()) {
                return Serving { child, _said: said, url };
            }
        }
    }

    /// What each program says of the proxy's certificate: whether it has got through.
    async fn verdicts(&self, proxy: &str) -> Vec<(&'static str, bool, String)> {
        let at = proxy.strip_prefix("http://").unwrap();
        let python = PYTHON.replace("PROXY", proxy);
        let target = format!("{HOST}:443");
        let lines: [(&str, &[&str]); 3] = [
            ("curl", &["curl", "-sS", "--fail", "-x", proxy, THINGS]),
            ("python", &["python3", "-c", &python]),
            (
                "openssl",
                &[
                    "openssl",
                    "s_client",
                    "-proxy",
                    at,
                    "-connect",
                    &target,
                    "-servername",
                    HOST,
                    "-verify_hostname",
                    HOST,
                    "-verify_return_error",
                    "-brief",
                ],
            ),
        ];
        let mut verdicts = Vec::new();
        for (name, line) in lines {
            if program(line[0]).is_some() {
                let done = self.run(line).await;
                verdicts.push((name, done.status == 0, format!("{done:?}")));
            }
        }
        assert!(!verdicts.is_empty());
        verdicts
    }

    async fn expect_trust(&self, proxy: &str, expected: bool) {
        for (name, trusts, said) in self.verdicts(proxy).await {
            assert_eq!(trusts, expected, "{name}: {said}");
            // Refused for the one reason that counts here.
            let refused = said.to_lowercase();
            assert!(
                trusts || refused.contains("local issuer") || refused.contains("verif"),
                "{said}"
            );
            println!("{name}: {}", if trusts { "trusted" } else { "refused" });
        }
    }

    /// All files of the home and of the machine, each with what it holds.
    fn everything(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let (mut found, mut folders) = (BTreeMap::new(), vec![self.scene.home.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                // Folders count by their names; links, of which some lead nowhere here, too.
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                let content = kind.is_file().then(|| fs::read(&path).unwrap());
                found.insert(path.clone(), content.unwrap_or_default());
                folders.extend(kind.is_dir().then_some(path));
            }
        }
        found
    }

    /// The files that its owner has put in.
    fn local(&self) -> Vec<String> {
        let files = fs::read_dir(self.own("local")).unwrap();
        let mut names: Vec<_> =
            files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn root(&self, number: u32) -> PathBuf {
        self.scene.path(".local/share/valetkey/ca").join(format!("root-{number}.pem"))
    }

    /// The `PATH` of a machine on which this script comes before the program of its name.
    fn with_first(&self, program: &str, script: &str) -> String {
        let bin = self.scene.path("bin");
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join(program), script).unwrap();
        fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755)).unwrap();
        format!("PATH={}:{}:/usr/sbin", bin.display(), std::env!("PATH"))
    }

    fn keys(&self) -> Vec<String> {
        let files = fs::read_dir(self.root(1).parent().unwrap()).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".key")).collect()
    }

    /// Whether programs see the certificate of this PEM file.
    fn bundle_has(&self, pem: &str) -> bool {
        fs::read_to_string(self.own("certs/ca-certificates.crt")).unwrap().contains(pem)
    }
}

struct Serving {
    child: Child,
    /// Kept open, so that it can say more.
    _said: Lines<BufReader<ChildStderr>>,
    url: String,
}

impl Serving {
    async fn end(self) {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        assert_eq!(done(self.child).await.status, 0);
    }
}

/// The commands that were shown.
fn steps(done: &Done) -> Vec<&str> {
    done.err.lines().filter_map(|line| line.trim_start().strip_prefix("$ ")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_that_are_told_nothing_trust_the_ca_while_it_is_installed() {
    let Some(machine) = Machine::with_databases().await else { return };
    let serving = machine.serve().await;
    machine.expect_trust(&serving.url, false).await;

    let dry = machine.ca(&["install", "--dry-run"]).await;
    assert_eq!((steps(&dry).len(), machine.local().len()), (4, 0), "{dry:?}");
    machine.expect_trust(&serving.url, false).await;

    let installed = machine.ca(&["install"]).await;
    println!("{}", installed.err);
    assert_eq!(steps(&installed), steps(&dry), "what was shown is what is done");
    assert_eq!(installed.out, "");
    let file = machine.local().pop().unwrap();
    assert!(file.starts_with("valetkey-0-"), "{file}");
    let pem = fs::read_to_string(machine.root(1)).unwrap();
    let path = machine.own("local").join(&file);
    assert_eq!(fs::read_to_string(&path).unwrap(), pem, "the certificate and nothing else");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(installed.err.matches("is trusted there now").count(), 3, "{installed:?}");
    machine.expect_trust(&serving.url, true).await;
    let verify = machine.run_ok(&["openssl", "verify", machine.root(1).to_str().unwrap()]).await;
    assert!(verify.out.ends_with(": OK\n"), "{verify:?}");
    for database in DATABASES {
        let (database, name) = (format!("sql:{database}"), file.replace("-0-", "-"));
        let name = name.trim_end_matches(".crt");
        // As a CA of servers.
        let valid = ["certutil", "-d", &database, "-V", "-u", "L", "-n", name];
        assert!(machine.run_ok(&valid).await.out.contains("certificate is valid"));
    }

    let again = machine.ca(&["install"]).await;
    assert_eq!(steps(&again), [""; 0]);
    assert_eq!(again.err.matches("is there already").count(), 3, "{again:?}");

    // Its files are gone, and it is found all the same.
    fs::remove_dir_all(machine.scene.path(".local/share/valetkey")).unwrap();
    let dry = machine.ca(&["uninstall", "--dry-run"]).await;
    machine.expect_trust(&serving.url, true).await;
    let uninstalled = machine.ca(&["uninstall"]).await;
    println!("{}", uninstalled.err);
    assert_eq!(steps(&uninstalled), steps(&dry));
    assert_eq!(uninstalled.err.matches("is no longer there").count(), 3, "{uninstalled:?}");
    machine.expect_trust(&serving.url, false).await;
    assert!(machine.local().is_empty() && !machine.bundle_has(&pem));
    for link in fs::read_dir(machine.own("certs")).unwrap() {
        let target = fs::read_link(link.unwrap().path()).unwrap_or_default();
        assert!(!target.to_str().unwrap().contains("valetkey"), "a link is left: {target:?}");
    }
    let again = machine.ca(&["uninstall"]).await;
    assert_eq!(steps(&again), [""; 0]);
    assert_eq!(again.err.matches("nothing of ours is there").count(), 3, "{again:?}");
    assert!(!machine.root(1).exists(), "no root is made to be taken out");
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_changes_nothing_and_says_so_where_a_root_is_missing() {
    let Some(machine) = Machine::with_databases().await else { return };
    let first = "a root would be made first, in ";
    let hint = "hint: valetkey ca path makes it, and installs nothing\n";
    let dry = async |command: &[&str]| {
        let before = machine.everything();
        let done = machine.run(&machine.ca_line(command)).await;
        println!("{}", done.err);
        assert_eq!(machine.everything(), before, "{done:?}");
        done
    };
    let missing = dry(&["install", "--dry-run"]).await;
    assert_eq!((missing.status, steps(&missing).len()), (0, 0), "{missing:?}");
    assert!(missing.err.starts_with(first) && missing.err.contains(hint), "{missing:?}");
    let nothing = dry(&["uninstall", "--dry-run"]).await;
    assert_eq!(nothing.err.matches("nothing of ours is there").count(), 3, "{nothing:?}");

    machine.ca(&["path"]).await;
    let shown = dry(&["install", "--dry-run"]).await;
    assert_eq!((shown.status, steps(&shown).len()), (0, 4), "{shown:?}");
    assert!(!shown.err.contains(first), "{shown:?}");
    // No root permits the name of a new rule.
    machine.scene.configure("[[rules]]\nhost = \"new.example.com\"\ncredential = \"example\"\n");
    let grown = dry(&["install", "--dry-run"]).await;
    assert_eq!((grown.status, steps(&grown)), (0, steps(&shown)), "{grown:?}");
    assert!(grown.err.starts_with(first) && grown.err.contains(hint), "{grown:?}");

    // Without a rule there is none to be made, dry or not.
    fs::remove_dir_all(machine.root(1).parent().unwrap()).unwrap();
    fs::write(machine.scene.path(".config/valetkey/config.toml"), "use = []\n").unwrap();
    for command in [&["install", "--dry-run"][..], &["install"]] {
        let done = dry(command).await;
        assert_eq!(done.status, 1);
        assert_eq!(done.err, "error: there is no root to install: no rule names a host\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_our_own_root_is_not_trusted_though_the_system_trusts_it() {
    let Some(machine) = Machine::new().await else { return };
    let serving = machine.serve().await;
    machine.ca(&["install"]).await;
    machine.expect_trust(&serving.url, true).await;
    // Another valetkey of the same user goes out through the first one, and is shown its certificates.
    let upstream = format!("[upstream]\nproxy = \"{}\"\n", serving.url);
    let config = machine.scene.path("second.toml");
    let usual = fs::read_to_string(machine.scene.path(".config/valetkey/config.toml")).unwrap();
    let rules = usual.split("[upstream").next().unwrap();
    fs::write(&config, format!("{rules}{upstream}")).unwrap();
    // In a folder of its own it does not know that the first one is a valetkey.
    let elsewhere = format!("XDG_RUNTIME_DIR={}", machine.scene.path("elsewhere").display());
    let second = async || {
        let valetkey = machine.ca_line(&[])[0];
        let run = [valetkey, "--config", config.to_str().unwrap(), "run", "--"];
        let fetch = ["curl", "-sS", "-w", "%{http_code}", THINGS];
        machine.run_ok(&[&["env", &elsewhere][..], &run, &fetch].concat()).await
    };
    let refused = second().await;
    assert!(refused.out.ends_with("502"), "{refused:?}");
    assert!(refused.out.contains("\"upstream_tls"), "{refused:?}");
    assert!(refused.out.contains("valetkey"), "{refused:?}");
    println!("{}", refused.out);
    // Nor is one that was ended, and that the store has still.
    machine.ca(&["rotate", "--now"]).await;
    let refused = second().await;
    assert!(refused.out.ends_with("502"), "{refused:?}");
    assert!(machine.scene.world.api().seen().iter().all(|seen| seen.host == HOST));
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_rotation_breaks_nothing() {
    let Some(machine) = Machine::with_databases().await else { return };
    let serving = machine.serve().await;
    machine.ca(&["install"]).await;
    let old = fs::read_to_string(machine.root(1)).unwrap();
    assert_eq!(
        machine.ca(&["rotate", "--finish"]).await.err,
        "no old root is left; begin with: valetkey ca rotate\n"
    );

    let begun = machine.ca(&["rotate"]).await;
    assert_eq!(begun.out, format!("{}\n", machine.root(2).display()));
    let again = machine.ca(&["rotate"]).await;
    assert!(again.err.starts_with("waits already:") && again.out == begun.out, "{again:?}");
    serving.end().await;
    let serving = machine.serve().await;
    machine.expect_trust(&serving.url, true).await;

    let early = machine.ca_fails(&["rotate", "--finish"]).await;
    assert!(early.err.contains("has an old root and not yet the new one"), "{early:?}");
    assert!(early.err.contains("hint: valetkey ca install"), "{early:?}");
    assert!(machine.root(1).exists());
    // The databases of browsers still have not, and cannot be asked.
    machine.ca(&["install", "--store", "system"]).await;
    let without = machine.own("without-certutil");
    fs::create_dir(&without).unwrap();
    std::os::unix::fs::symlink("/usr/bin/env", without.join("env")).unwrap();
    let path = format!("PATH={}", without.display());
    let line = machine.ca_line(&["rotate", "--finish"]);
    let unseen = machine.run(&[&["env", &path], &*line].concat()).await;
    assert!(unseen.status == 1 && unseen.err.contains("certutil is not installed"), "{unseen:?}");
    let failing = without.join("certutil");
    fs::write(&failing, "#!/bin/sh\necho locked >&2\nexit 255\n").unwrap();
    fs::set_permissions(&failing, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{path}:/usr/bin:/bin:/usr/sbin");
    let unseen = machine.run(&[&["env", &path], &*line].concat()).await;
    assert!(unseen.status == 1 && unseen.err.contains("locked"), "{unseen:?}");
    assert!(machine.root(1).exists());
    machine.ca(&["install"]).await;
    assert_eq!(machine.local().len(), 2);

    let finished = machine.ca(&["rotate", "--finish"]).await;
    println!("{}", finished.err);
    assert!(!machine.root(1).exists());
    assert!(finished.err.contains("until it is started again"), "{finished:?}");
    assert!(finished.err.contains("still trusts an ended root"), "{finished:?}");
    // Both the proxy that runs on and the one that is started again.
    machine.expect_trust(&serving.url, true).await;
    serving.end().await;
    let serving = machine.serve().await;
    machine.expect_trust(&serving.url, true).await;
    assert!(machine.bundle_has(&old));
    machine.ca(&["install"]).await;
    machine.expect_trust(&serving.url, true).await;
    assert!(!machine.bundle_has(&old), "the old one is taken out");
    assert_eq!(machine.local().len(), 1);
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_whose_end_was_broken_off_is_not_installed_and_its_end_is_finished() {
    let Some(machine) = Machine::new().await else { return };
    machine.ca(&["rotate"]).await;
    let (old, ca) = (fs::read_to_string(machine.root(1)).unwrap(), machine.root(1));
    let ca = ca.parent().unwrap();
    let key = machine.keys().pop().unwrap();
    machine.ca(&["rotate"]).await;
    machine.ca(&["install"]).await;
    fs::create_dir(ca.join("retired")).unwrap();
    let aside = ca.join("retired").join(key.replace(".key", ".pem"));
    fs::copy(machine.root(1), &aside).unwrap();
    fs::remove_file(ca.join(&key)).unwrap();

    machine.ca(&["install"]).await;
    assert!(!machine.bundle_has(&old));
    let again = machine.ca(&["install"]).await;
    assert_eq!(steps(&again), [""; 0], "it is not put in again");
    let finished = machine.ca(&["rotate", "--finish"]).await;
    assert!(finished.err.starts_with("ended valetkey-"), "{finished:?}");
    assert!(!machine.root(1).exists() && aside.exists() && machine.keys().len() == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_key_is_worth_nothing_after_rotate_now_and_install() {
    let Some(machine) = Machine::with_databases().await else { return };
    let serving = machine.serve().await;
    machine.ca(&["install"]).await;
    let stolen = fs::read_to_string(machine.root(1)).unwrap();
    let before = machine.keys();
    let now = machine.ca(&["rotate", "--now"]).await;
    println!("{}", now.err);
    assert!(now.err.contains(&serving.url), "the proxy that runs is named: {now:?}");
    let after = machine.keys();
    assert!(after.len() == 1 && after != before, "{after:?}");
    assert!(!machine.ca(&["print"]).await.out.contains(&stolen));
    // Who has the key could still sign: until the store is told.
    machine.expect_trust(&serving.url, true).await;
    let installed = machine.ca(&["install"]).await;
    println!("{}", installed.err);
    assert!(!machine.bundle_has(&stolen));
    machine.expect_trust(&serving.url, false).await;
    serving.end().await;
    let serving = machine.serve().await;
    machine.expect_trust(&serving.url, true).await;

    // Uninstalling takes out what was ended too.
    machine.ca(&["rotate", "--now"]).await;
    let uninstalled = machine.ca(&["uninstall"]).await;
    assert!(machine.local().is_empty(), "{uninstalled:?}");
    machine.expect_trust(&serving.url, false).await;
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_stays_and_what_was_broken_off_is_finished() {
    let Some(machine) = Machine::with_databases().await else { return };
    machine.ca(&["install"]).await;
    let ours = machine.local().pop().unwrap();
    let local = |name: &str| machine.own("local").join(name);
    let pem = fs::read_to_string(local(&ours)).unwrap();
    // Another user's root, one that only bears the name of one of ours, and one of the owner's own.
    let names = [Host::parse(HOST).unwrap()];
    let stranger = LocalCa::ephemeral(&names, Clock::system()).unwrap().roots()[0].pem();
    let company = machine.scene.world.company().ca_file().to_owned();
    fs::write(local(&ours.replace("-0-", "-4242-")), &pem).unwrap();
    fs::write(local("valetkey-0-0011223344556677.crt"), &stranger).unwrap();
    fs::copy(company, local("company.crt")).unwrap();
    let database = format!("sql:{}", DATABASES[0]);
    fs::write(machine.scene.path("stranger.pem"), &stranger).unwrap();
    let add = ["-A", "-t", "C,,", "-n", "valetkey-0011223344556677", "-i", "stranger.pem"];
    machine.run_ok(&[&["certutil", "-d", &database][..], &add].concat()).await;

    // The bundle was not put together again after the file came, or went.
    fs::write(machine.own("certs/ca-certificates.crt"), "").unwrap();
    let repaired = machine.ca(&["install", "--store", "system"]).await;
    assert_eq!(steps(&repaired).len(), 2, "{repaired:?}");
    assert!(machine.bundle_has(&pem));
    // What has expired is of no use to anybody.
    let long_ago = Clock::system();
    long_ago.advance(-time::Duration::days(400));
    let expired = LocalCa::ephemeral(&names, long_ago).unwrap().roots()[0].clone();
    let expired_file = format!("valetkey-0-{}.crt", &expired.fingerprint().to_hex()[..16]);
    fs::write(local(&expired_file), expired.pem()).unwrap();
    let tidied = machine.ca(&["install", "--store", "system"]).await;
    assert_eq!(steps(&tidied).len(), 2, "{tidied:?}");
    assert!(!local(&expired_file).exists());
    // The certificate is there, and somebody has taken its trust.
    let name = ours.replace("-0-", "-").replace(".crt", "");
    machine.run_ok(&["certutil", "-d", &database, "-M", "-t", ",,", "-n", &name]).await;
    let repaired = machine.ca(&["install", "--store", "nss"]).await;
    assert_eq!(steps(&repaired).len(), 1, "{repaired:?}");

    let uninstalled = machine.ca(&["uninstall"]).await;
    assert_eq!(
        uninstalled.err.matches("and is not: left alone").count()
            + uninstalled.err.matches("is one of ours, and it is not\n").count(),
        4,
        "before and after: {uninstalled:?}"
    );
    let left = ["company.crt", "valetkey-0-0011223344556677.crt"].map(str::to_owned);
    assert_eq!(machine.local()[..2], left);
    assert_eq!(machine.local().len(), 3, "the other user's root is theirs");
    let listed = machine.run_ok(&["certutil", "-d", &database, "-L"]).await.out;
    assert!(listed.contains("valetkey-0011223344556677") && !listed.contains(&name), "{listed}");

    fs::remove_file(local(&machine.local()[2])).unwrap();
    let broken_off = machine.ca(&["uninstall", "--store", "system"]).await;
    assert_eq!(steps(&broken_off), ["update-ca-certificates --fresh"], "{broken_off:?}");
    assert!(!machine.bundle_has(&pem));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_ours_that_holds_anothers_root_is_neither_removed_nor_written_over() {
    let Some(machine) = Machine::new().await else { return };
    machine.ca(&["install"]).await;
    let ours = machine.local().pop().unwrap();
    let place = machine.own("local").join(&ours);
    let pem = fs::read_to_string(&place).unwrap();
    let company = fs::read_to_string(machine.scene.world.company().ca_file()).unwrap();
    let both = format!("{pem}{company}");
    let left_alone = async |command: &[&str], content: &str, steps_done: &[&str]| {
        let done = machine.ca_fails(command).await;
        println!("{}", done.err);
        assert_eq!(fs::read_to_string(&place).unwrap(), content, "{done:?}");
        assert_eq!(steps(&done), steps_done);
        let file = format!("/usr/local/share/ca-certificates/{ours}");
        let said = format!("{file}: left alone, for it holds what is not ours\n");
        let hint = format!("hint: copy that into a file of another name, then type: rm {file}\n");
        assert!(done.err.contains(&(said + &hint)), "{done:?}");
    };

    fs::write(&place, &both).unwrap();
    left_alone(&["uninstall", "--dry-run"], &both, &[]).await;
    left_alone(&["uninstall"], &both, &[]).await;
    assert_eq!(steps(&machine.ca(&["install"]).await), [""; 0], "ours is there already");
    // Programs see neither, because the bundle was not put together again.
    let bundle = machine.own("certs/ca-certificates.crt");
    fs::write(&bundle, "").unwrap();
    left_alone(&["install"], &both, &[]).await;
    // Ours is gone from it, and programs see ours alone.
    fs::write(&place, &company).unwrap();
    fs::write(&bundle, &pem).unwrap();
    left_alone(&["install"], &company, &[]).await;
    // One that is to be taken out, and one beside it that is ours alone.
    machine.ca(&["rotate", "--now"]).await;
    fs::write(&place, &both).unwrap();
    machine.run_ok(&["update-ca-certificates", "--fresh"]).await;
    let new = fs::read_to_string(machine.root(1)).unwrap();
    let installed = machine.ca_fails(&["install"]).await;
    assert_eq!(steps(&installed).len(), 2, "the new one goes in all the same: {installed:?}");
    assert!(machine.bundle_has(&new) && machine.bundle_has(&pem));
    left_alone(&["install"], &both, &[]).await;

    // As the hint says.
    fs::write(machine.own("local/company.crt"), &company).unwrap();
    fs::remove_file(&place).unwrap();
    machine.ca(&["uninstall"]).await;
    assert_eq!(machine.local(), ["company.crt"]);
    assert!(machine.bundle_has(&company) && !machine.bundle_has(&pem));
    // What holds nothing is in nobody's way.
    machine.ca(&["install"]).await;
    let place = machine.own("local").join(&machine.local()[1]);
    fs::write(&place, "").unwrap();
    machine.ca(&["install"]).await;
    assert_eq!(fs::read_to_string(&place).unwrap(), new);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_has_a_hint() {
    let Some(machine) = Machine::with_databases().await else { return };
    let nothing = format!("PATH={}", machine.own("hooks").display());
    let install = async |more: &[&str]| {
        let line = machine.ca_line(&[&["install", "--dry-run"], more].concat());
        machine.run(&[&["env", &nothing], &*line].concat()).await
    };
    machine.ca(&["path"]).await;
    let nss = install(&["--store", "nss"]).await;
    assert_eq!(nss.status, 1);
    assert_eq!(
        nss.err,
        "error: the databases of your browsers cannot be changed: certutil is not installed\n\
         hint: sudo apt-get install libnss3-tools\n"
    );
    let both = install(&[]).await;
    assert_eq!(both.status, 0, "{both:?}");
    let hint = "certutil is not installed\nhint: sudo apt-get install libnss3-tools\n";
    assert!(both.err.starts_with("warning: ") && both.err.contains(hint), "{both:?}");
    assert!(both.err.contains("$ /usr/sbin/update-ca-certificates"), "{both:?}");
    for database in DATABASES {
        fs::remove_dir_all(machine.scene.path(database)).unwrap();
    }
    let none = machine.ca_fails(&["install", "--store", "nss"]).await;
    assert!(none.err.contains("no NSS database") && none.err.contains("hint:"), "{none:?}");
    let nobody = machine.run(&machine.ca_line(&["install", "--store", "other"])).await;
    assert_eq!(nobody.status, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_root_goes_through_sudo_or_is_shown_what_to_type() {
    let Some(machine) = Machine::of_nobody().await else { return };
    let shown = machine.ca_fails(&["install"]).await;
    println!("{}", shown.err);
    let file = format!("valetkey-{NOBODY}-");
    assert!(steps(&shown)[0].starts_with("sudo install -m 644 -T -- /dev/stdin "), "{shown:?}");
    assert!(steps(&shown)[0].contains(&file), "{shown:?}");
    assert_eq!(steps(&shown)[1], "sudo update-ca-certificates");
    let line = steps(&shown)[..2].join(" && ");
    assert!(shown.err.contains(&format!("hint: type: {line}\n")), "{shown:?}");
    assert!(machine.local().is_empty());
    // What needs no root was done all the same.
    assert_eq!(shown.err.matches("is trusted there now").count(), 2, "{shown:?}");

    machine.allow_sudo();
    let installed = machine.ca(&["install"]).await;
    println!("{}", installed.err);
    assert!(installed.err.contains("these lines need root: sudo gives it without asking"));
    assert_eq!(steps(&installed), steps(&shown)[..2]);
    let path = machine.own("local").join(&machine.local()[0]);
    assert_eq!(fs::metadata(&path).unwrap().uid(), 0);
    // At a terminal, where sudo could ask.
    let typed = machine.ca_line(&["uninstall"]).join(" ");
    let at_terminal = machine.run_ok(&["script", "-qefc", &typed, "/dev/null"]).await;
    assert!(at_terminal.out.contains("sudo may ask for your password"), "{at_terminal:?}");
    assert!(machine.local().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_puts_in_the_place_of_the_root_is_not_read_by_root() {
    let Some(machine) = Machine::of_nobody().await else { return };
    machine.allow_sudo();
    machine.ca(&["path"]).await;
    let (root, secret) = (machine.root(1), machine.own("sudoers/secret"));
    let pem = fs::read_to_string(&root).unwrap();
    fs::write(&secret, "# root's alone\n").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o440)).unwrap();
    // At the last moment before there is a root: a link to a file of root's.
    let swap = format!(
        "#!/bin/sh\ncase \"$*\" in *install*) ln -sf '{}' '{}';; esac\nexec /usr/bin/sudo \"$@\"\n",
        secret.display(),
        root.display()
    );
    let path = machine.with_first("sudo", &swap);
    let line = machine.ca_line(&["install", "--store", "system"]);
    let installed = machine.run(&[&["env", &path], &*line].concat()).await;
    assert!(fs::symlink_metadata(&root).unwrap().is_symlink(), "nothing was tried: {installed:?}");
    let lies = fs::read_to_string(machine.own("local").join(&machine.local()[0])).unwrap();
    assert_eq!(lies, pem, "{installed:?}");
    assert_eq!(installed.status, 0, "{installed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_store_is_compared_with_what_was_put_in() {
    let Some(machine) = Machine::new().await else { return };
    let company = machine.scene.world.company().ca_file().to_owned();
    // Puts in what it is told to, and more.
    let more = format!(
        "#!/bin/sh\n/usr/bin/install \"$@\" || exit\nfor place; do :; done\ncat '{}' >> \"$place\"\n",
        company.display()
    );
    let path = machine.with_first("install", &more);
    let line = machine.ca_line(&["install", "--store", "system"]);
    let installed = machine.run(&[&["env", &path], &*line].concat()).await;
    let place = machine.own("local").join(&machine.local()[0]);
    let both = [machine.root(1), company].map(|file| fs::read_to_string(file).unwrap()).concat();
    assert_eq!(fs::read_to_string(place).unwrap(), both, "nothing was tried: {installed:?}");
    assert!(machine.bundle_has(&both), "programs see it: {installed:?}");
    assert_eq!(installed.status, 1, "{installed:?}");
    assert!(installed.err.contains("what lies there is not what was put in"), "{installed:?}");
    assert!(installed.err.contains("hint: see what another program"), "{installed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_place_of_a_root_is_replaced() {
    let Some(machine) = Machine::new().await else { return };
    machine.ca(&["install", "--store", "system"]).await;
    let place = machine.own("local").join(&machine.local()[0]);
    let elsewhere = machine.own("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::remove_file(&place).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &place).unwrap();
    machine.ca(&["install", "--store", "system"]).await;
    assert!(fs::symlink_metadata(&place).unwrap().is_file());
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_in_the_store_holds_up_nobody() {
    let Some(machine) = Machine::new().await else { return };
    let pipe = machine.own("local").join("pipe.crt");
    assert!(Command::new("mkfifo").arg(&pipe).status().await.unwrap().success());
    let commands: [&[&str]; 5] =
        [&["install"], &["rotate"], &["install"], &["rotate", "--finish"], &["uninstall"]];
    for command in commands {
        machine.ca(command).await;
    }
    assert_eq!(machine.local(), ["pipe.crt"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn chromium_trusts_what_is_in_its_database() {
    let Some(program) = chromium() else { return };
    let Some(machine) = Machine::with_databases().await else { return };
    let serving = machine.serve().await;
    let page = async |number: u32| {
        let profile =
            format!("--user-data-dir={}", machine.own(&format!("profile-{number}")).display());
        let proxy = format!("--proxy-server={}", serving.url);
        machine.run(&[&[&*program, &*profile, &*proxy][..], &CHROMIUM, &[THINGS]].concat()).await
    };
    let before = page(1).await;
    assert!(!before.out.contains("present and current"), "{before:?}");
    machine.ca(&["install", "--store", "nss"]).await;
    let after = page(2).await;
    assert!(after.out.contains("present and current"), "{after:?}");
    machine.ca(&["uninstall", "--store", "nss"]).await;
    let gone = page(3).await;
    assert!(!gone.out.contains("present and current"), "{gone:?}");
    serving.end().await;
}

/// Puts the machine's own folders over the real ones, and the binary where everybody can run it; then becomes the
/// program.
const EXCHANGE: &str = r#"set -e
own=$1; shift
valetkey=$1; shift
mount -t tmpfs none /usr/local/share
mkdir /usr/local/share/ca-certificates
touch /usr/local/share/valetkey-under-test
mount --bind "$valetkey" /usr/local/share/valetkey-under-test
mount --bind "$own/local" /usr/local/share/ca-certificates
mount --bind "$own/certs" /etc/ssl/certs
mount --bind "$own/hooks" /etc/ca-certificates
if [ -d /etc/sudoers.d ]; then mount --bind "$own/sudoers" /etc/sudoers.d; fi
exec "$@""#;

const PYTHON: &str = "
import urllib.request
proxies = urllib.request.ProxyHandler({'https': 'PROXY'})
answer = urllib.request.build_opener(proxies).open('https://api.example.com/v1/things')
assert b'present and current' in answer.read()
";

/// As Chromium and Firefox have them.
const DATABASES: [&str; 2] = [".pki/nssdb", ".mozilla/firefox/abc.default"];

/// The user that every Debian has.
const NOBODY: u32 = 65534;

const CHROMIUM: [&str; 8] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--password-store=basic",
    "--dump-dom",
];
