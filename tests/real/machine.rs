//! What the owner of the machine says in `/etc`, by its real path, obeyed by us and by the real Codex in the same words.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use tokio::process::Command;
use valetkey::sandbox::Person;

use super::support::{Done, Scene, codex, done, program};

const CHATGPT: &str = "https://chatgpt.com/backend-api/codex/models";
const API_KEY: &str = r#"{"auth_mode":"apikey","OPENAI_API_KEY":"sk-proj-vk-canary-of-a-policy"}"#;

/// A machine whose owner has said something: programs run in it see an `/etc` of its own.
struct Machine {
    scene: Scene,
    /// How a namespace of one's own is had here.
    unshare: &'static str,
}

impl Machine {
    /// A user with a ChatGPT login and no other credential. `None` where `/etc` cannot be exchanged.
    async fn new() -> Option<Self> {
        program("unshare")?;
        let scene = Scene::usual().await;
        // Without `[credentials.example]`: there is nothing else to go on with.
        let upstream = scene.world.upstream_toml();
        fs::write(scene.path(".config/valetkey/config.toml"), upstream).unwrap();
        for folder in ["before", "codex", "valetkey"] {
            fs::create_dir_all(scene.path("etc").join(folder)).unwrap();
        }
        let mut machine = Self { scene, unshare: "-m" };
        // Who is not root is it in a namespace of users.
        for how in ["-m", "-rm"] {
            machine.unshare = how;
            let mut probe = Command::new("true");
            probe.env_clear().env("PATH", std::env!("PATH"));
            if machine.run(probe).await.status == 0 {
                return Some(machine);
            }
        }
        println!("skipped: this user may not make a namespace in which /etc is another folder");
        None
    }

    /// Writes a file below `/etc`.
    fn say(&self, path: &str, text: &str) {
        fs::write(self.scene.path("etc").join(path), text).unwrap();
    }

    /// Runs a program to its end where `/etc/codex` and `/etc/valetkey` are ours, and all else is as it was.
    async fn run(&self, command: Command) -> Done {
        use std::process::Stdio;
        let inner = command.as_std();
        let mut outer = Command::new("unshare");
        outer.args([self.unshare, "--", "sh", "-c", EXCHANGE, "sh"]);
        outer.arg(self.scene.path("etc")).arg(inner.get_program()).args(inner.get_args());
        outer.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        outer.current_dir(self.scene.home.path()).kill_on_drop(true);
        outer.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        done(outer.spawn().unwrap()).await
    }

    async fn valetkey(&self, arguments: &[&str]) -> Done {
        self.run(self.scene.valetkey(arguments)).await
    }

    async fn codex(&self, program: &str, arguments: &[&str]) -> Done {
        self.run(self.scene.codex_inside(program, arguments)).await
    }

    /// Signs this person in.
    fn sign_in(&self, person: Person) {
        self.scene.world.issuer().person(person);
        let (home, hour) = (self.scene.path(".codex"), time::Duration::hours(1));
        self.scene.world.issuer().write_auth_json(&home, hour).unwrap();
    }

    fn is_signed_in(&self) -> bool {
        self.scene.path(".codex/auth.json").exists()
    }
}

/// What Codex says, without its warning that a home should not be below the folder for temporary files.
fn said_by_codex(done: &Done) -> String {
    done.err.lines().filter(|line| !line.starts_with("WARNING")).collect::<Vec<_>>().join("\n")
}

/// The sentence of our error.
fn error_of(done: &Done) -> &str {
    let error = done.err.lines().find_map(|line| line.strip_prefix("error: "));
    error.unwrap_or_else(|| panic!("{done:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forced_ends_a_login_in_both_programs_with_the_same_words() {
    let Some(codex) = codex() else { return };
    let Some(machine) = Machine::new().await else { return };
    let auth_json = machine.scene.path(".codex/auth.json");
    let chatgpt = fs::read_to_string(&auth_json).unwrap();
    for (forced, stored) in [
        ("forced_login_method = \"api\"", chatgpt.as_str()),
        ("forced_login_method = \"chatgpt\"", API_KEY),
        ("forced_chatgpt_workspace_id = \"acct-other\"", chatgpt.as_str()),
        ("forced_chatgpt_workspace_id = [\"acct-2\", \"acct-1\"]", chatgpt.as_str()),
    ] {
        machine.say("codex/managed_config.toml", forced);
        fs::write(&auth_json, stored).unwrap();
        let turn = ["exec", "--skip-git-repo-check", "say hi"];
        let theirs = machine.codex(&codex, &turn).await;
        assert_eq!(theirs.status, 1, "{forced}: {theirs:?}");
        assert!(!machine.is_signed_in(), "{forced}");
        for ours in [&["serve", "--listen", "127.0.0.1:0"][..], &["run", "--", "true"]] {
            fs::write(&auth_json, stored).unwrap();
            let ours = machine.valetkey(ours).await;
            assert_eq!(ours.status, 1, "{forced}: {ours:?}");
            assert_eq!(error_of(&ours), said_by_codex(&theirs), "{forced}");
            assert!(!machine.is_signed_in(), "{forced}");
        }
    }
    assert_eq!(machine.scene.world.issuer().revokes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forced_leaves_other_credentials_to_go_on_with() {
    let Some(curl) = program("curl") else { return };
    let Some(machine) = Machine::new().await else { return };
    machine.say("codex/managed_config.toml", "forced_login_method = \"api\"");
    machine.scene.configure(&machine.scene.world.upstream_toml());
    let fetch = ["run", "--", &curl, "-sS", "--fail", "https://api.example.com/v1/things"];
    let ours = machine.valetkey(&fetch).await;
    assert_eq!(ours.status, 0, "{ours:?}");
    assert!(ours.err.contains("API key login is required, but ChatGPT is"), "{ours:?}");
    assert!(!machine.is_signed_in());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_required_hides_a_login_in_both_programs_and_keeps_it() {
    let Some(codex) = codex() else { return };
    let Some(machine) = Machine::new().await else { return };
    for required in
        ["allowed_login_methods = [\"api\"]", "allowed_chatgpt_workspaces = [\"acct-other\"]"]
    {
        machine.say("codex/requirements.toml", required);
        let theirs = machine.codex(&codex, &["login", "status"]).await;
        assert_eq!((theirs.status, said_by_codex(&theirs).as_str()), (1, "Not logged in"));
        let ours = machine.valetkey(&["login", "status"]).await;
        assert_eq!((ours.status, ours.out.lines().next()), (1, Some("Not logged in")), "{ours:?}");
        let run = machine.valetkey(&["run", "--", "true"]).await;
        assert_eq!(run.status, 0, "{run:?}");
        assert!(machine.is_signed_in(), "{required}");
    }
    machine.say("codex/requirements.toml", "allowed_login_methods = [\"api\"]");
    let login = ["login", "--device-auth"];
    let (theirs, ours) = (machine.codex(&codex, &login).await, machine.valetkey(&login).await);
    assert_eq!((theirs.status, ours.status), (1, 1), "{theirs:?} {ours:?}");
    assert_eq!(error_of(&ours), said_by_codex(&theirs));
    assert!(
        machine.scene.world.issuer().last_request("/api/accounts/deviceauth/usercode").is_empty()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_than_root_may_write_is_not_the_owners_word() {
    let Some(machine) = Machine::new().await else { return };
    let path = machine.scene.path("etc/valetkey/managed.toml");
    machine.say("valetkey/managed.toml", "default = \"tunnel\"\n");
    assert_eq!(machine.valetkey(&["run", "--", "true"]).await.status, 0);
    let refused = async |why: &str| {
        for command in [&["run", "--", "true"][..], &["check", "--managed"], &["status"]] {
            let ours = machine.valetkey(command).await;
            assert_ne!(ours.status, 0, "{why}: {ours:?}");
            let sentence = format!("/etc/valetkey/managed.toml is not to be trusted: {why}");
            // Mistakes of the configuration are printed in lines of a paragraph.
            let said = ours.err.replace(" |", "").split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(said.contains(&sentence) && said.contains("chown root"), "{ours:?}");
        }
    };
    fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
    refused("its group or others may write it").await;
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    if machine.unshare == "-m" {
        std::os::unix::fs::chown(&path, Some(1000), None).unwrap();
        refused("it does not belong to root").await;
    } else {
        println!("skipped: only root can give a file away");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_factor_is_required_of_what_says_whether_there_was_one() {
    let Some(curl) = program("curl") else { return };
    let Some(machine) = Machine::new().await else { return };
    let place = "A second factor is required by /etc/valetkey/managed.toml";
    for (amr, factor, sentence) in [
        (Some(&["pwd", "mfa"][..]), "yes", ""),
        (Some(&["pwd"][..]), "no", "but this account was signed in without a second factor."),
        (None, "not stated", "but the id token does not say whether a second factor was used."),
    ] {
        let amr = amr.map(|methods| methods.iter().map(|it| (*it).to_owned()).collect());
        machine.sign_in(Person { amr, ..Person::default() });
        machine.say("valetkey/managed.toml", "");
        let ours = machine.valetkey(&["login", "status"]).await;
        assert_eq!(ours.status, 0, "{ours:?}");
        assert!(ours.out.contains(&format!("second factor {factor}\n")), "{ours:?}");
        machine.say("valetkey/managed.toml", "require_mfa = true\n");
        let ours = machine.valetkey(&["login", "status"]).await;
        let refused = !sentence.is_empty();
        assert_eq!(ours.status, i32::from(refused), "{ours:?}");
        assert_eq!(ours.out.contains(&format!("{place}, {sentence}\n")), refused, "{ours:?}");
        let fetch = ["run", "--", &curl, "-sS", "-o", "/dev/null", "-w", "%{http_code}", CHATGPT];
        let sent = machine.valetkey(&fetch).await.out;
        assert_eq!(sent, if refused { "403" } else { "200" }, "{factor}");
        assert!(machine.is_signed_in(), "{factor}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_flag_nor_variable_goes_round_what_is_managed() {
    let Some(curl) = program("curl") else { return };
    let Some(machine) = Machine::new().await else { return };
    let company = machine.scene.world.company();
    let (address, ca) = (company.address(), company.ca_file().display().to_string());
    let managed = format!(
        "default = \"refuse\"\n[upstream]\nproxy = \"http://{address}\"\nca_bundle = {ca:?}\n"
    );
    machine.say("valetkey/managed.toml", &managed);
    let attempts = |mut command: Command| {
        let bypass = [
            ("VALETKEY_UPSTREAM_PROXY", "none"),
            ("VALETKEY_UPSTREAM_CA_BUNDLE", "/nonexistent"),
            ("HTTPS_PROXY", "http://127.0.0.1:9"),
            ("SSL_CERT_FILE", "/nonexistent"),
            ("NO_PROXY", "*"),
        ];
        command.envs(bypass);
        machine.run(command)
    };
    let check = attempts(machine.scene.valetkey(&["check", "--managed"])).await;
    let file = "/etc/valetkey/managed.toml";
    for line in [
        "default = \"refuse\"".to_owned(),
        format!("upstream.proxy = \"http://{address}\""),
        format!("upstream.ca_bundle = {ca:?}"),
    ] {
        assert!(check.out.lines().any(|it| it == format!("{line}  ({file})")), "{check:?}");
    }
    let fetch = ["run", "--", &curl, "-sS", "--fail", CHATGPT];
    let fetched = attempts(machine.scene.valetkey(&fetch)).await;
    assert_eq!(fetched.status, 0, "{fetched:?}");
    assert_eq!(company.connects(), ["chatgpt.com:443"]);
    assert_eq!(machine.scene.world.connections(), 0, "somebody went past the company's proxy");
}

/// Puts a folder over `/etc` that leads to what was there, and ours into it; then becomes the program.
const EXCHANGE: &str = r#"set -e
own=$1; shift
mount --rbind /etc "$own/before"
mount -t tmpfs none /etc
for entry in "$own"/before/*; do ln -s "$entry" /etc/; done
for name in codex valetkey; do
    rm -f "/etc/$name"
    mkdir "/etc/$name"
    mount --bind "$own/$name" "/etc/$name"
done
exec "$@""#;
