//! A machine with files of its owner, of Codex and of a user: what they come to, and what is said of every
//! mistake in them.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::super::env::{self, Environment};
use super::super::{MachineFiles, Overrides};
use super::*;
use crate::credential::{CredentialName, Keep, LoginKind};
use crate::origin::{Origin, Target};
use crate::policy::{Demand, Level, Limit, Policy};
use crate::rules::{Decision, Found};

/// A folder that stands for the root of a machine.
struct Machine(tempfile::TempDir);

const USER: &str = "home/.config/valetkey/config.toml";
const SYSTEM: &str = "etc/valetkey/config.toml";
const MANAGED: &str = "etc/valetkey/managed.toml";
const CODEX_USER: &str = "home/.codex/config.toml";
const CODEX_SYSTEM: &str = "etc/codex/config.toml";
const CODEX_MANAGED: &str = "etc/codex/managed_config.toml";
const REQUIREMENTS: &str = "etc/codex/requirements.toml";

impl Machine {
    fn with(files: &[(&str, &str)]) -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for (file, text) in files {
            machine.write(file, text);
        }
        machine
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn files(&self) -> MachineFiles {
        MachineFiles::below(self.0.path(), rustix::process::getuid().as_raw())
    }

    fn load_with(
        &self,
        variables: &[(&str, &str)],
        overrides: &Overrides,
    ) -> Result<Config, ConfigErrors> {
        let home = self.path("home");
        let home = [("HOME", home.to_str().unwrap())];
        let env = Environment::from_pairs(home.into_iter().chain(variables.iter().copied()));
        Config::load_on(&self.files(), overrides, &env)
    }

    fn load(&self) -> Config {
        self.load_with(&[], &Overrides::default())
            .unwrap_or_else(|errors| panic!("{}", errors.render(false, 100)))
    }

    fn policy(&self) -> Policy {
        let home = self.path("home/.codex");
        self.load().policies.read(&home).unwrap()
    }

    /// Each limit as `file: key = value`.
    fn limits(&self) -> Vec<String> {
        self.policy().limits().iter().map(|limit| self.shown(&limit.place, limit)).collect()
    }

    fn shown(&self, place: &str, what: impl fmt::Display) -> String {
        let place = Path::new(place).strip_prefix(self.0.path()).unwrap();
        format!("{}: {what}", place.display())
    }

    /// Every mistake as `file:line:column underlined | message`.
    fn mistakes(&self) -> Vec<String> {
        let errors = self.load_with(&[], &Overrides::default()).map(|_| ()).unwrap_err();
        let root = format!("{}/", self.0.path().display());
        let shown = |mistake: &super::super::Mistake| match (mistake.file(), mistake.position()) {
            (Some(file), Some((line, column))) => {
                let text = mistake.underlined().unwrap();
                format!("{file}:{line}:{column} {text} | {mistake}").replace(&root, "")
            }
            _ => mistake.to_string().replace(&root, ""),
        };
        errors.mistakes().iter().map(shown).collect()
    }
}

#[test]
fn limits_come_from_every_file() {
    type Row<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let api = "forced_login_method = 'api'\n";
    let chatgpt = "forced_login_method = 'chatgpt'\n";
    let one = "forced_chatgpt_workspace_id = ' ws-1 '\n";
    let two = "forced_chatgpt_workspace_id = ['ws-1', ' ', 'ws-2']\n";
    let blank = "forced_chatgpt_workspace_id = ' '\n";
    let (said_api, said_chatgpt) =
        (r#"forced_login_method = "api""#, r#"forced_login_method = "chatgpt""#);
    let said_one = r#"forced_chatgpt_workspace_id = "ws-1""#;
    let said_two = r#"forced_chatgpt_workspace_id = ["ws-1", "ws-2"]"#;
    let table: &[Row<'_>] = &[
        (&[], &[]),
        (&[(USER, api)], &[&format!("{USER}: {said_api}")]),
        (&[(SYSTEM, api)], &[&format!("{SYSTEM}: {said_api}")]),
        // within ours each key counts in the highest file
        (
            &[(USER, chatgpt), (SYSTEM, &format!("{api}{two}"))],
            &[&format!("{USER}: {said_chatgpt}"), &format!("{SYSTEM}: {said_two}")],
        ),
        // within Codex's too
        (&[(CODEX_SYSTEM, api)], &[&format!("{CODEX_SYSTEM}: {said_api}")]),
        (
            &[(CODEX_USER, chatgpt), (CODEX_SYSTEM, &format!("{api}{one}"))],
            &[&format!("{CODEX_USER}: {said_chatgpt}"), &format!("{CODEX_SYSTEM}: {said_one}")],
        ),
        (
            &[(CODEX_MANAGED, api), (CODEX_USER, &format!("{chatgpt}{two}")), (CODEX_SYSTEM, one)],
            &[&format!("{CODEX_MANAGED}: {said_api}"), &format!("{CODEX_USER}: {said_two}")],
        ),
        (&[(CODEX_USER, blank), (CODEX_SYSTEM, one)], &[]),
        // what the owner of the machine says stands beside all that
        (
            &[(USER, chatgpt), (CODEX_USER, one), (MANAGED, &format!("{api}{two}"))],
            &[
                &format!("{MANAGED}: {said_api}"),
                &format!("{MANAGED}: {said_two}"),
                &format!("{USER}: {said_chatgpt}"),
                &format!("{CODEX_USER}: {said_one}"),
            ],
        ),
        (
            &[(MANAGED, "require_mfa = true\nallowed_login_methods = ['chatgpt', 'api']")],
            &[
                &format!(r#"{MANAGED}: allowed_login_methods = ["chatgpt", "api"]"#),
                &format!("{MANAGED}: require_mfa = true"),
            ],
        ),
        (&[(MANAGED, "require_mfa = false")], &[]),
        // requirements, in which what is forced means nothing
        (
            &[(
                REQUIREMENTS,
                "forced_login_method = 3\nallowed_login_methods = ['api']\n\
                 allowed_chatgpt_workspaces = []\n[features]\nx = true",
            )],
            &[
                &format!(r#"{REQUIREMENTS}: allowed_login_methods = ["api"]"#),
                &format!("{REQUIREMENTS}: allowed_chatgpt_workspaces = []"),
            ],
        ),
        // other keys of Codex's are its business
        (&[(CODEX_USER, "model = 3\n[allowed_login_methods]\nx = 1\n[require_mfa]")], &[]),
    ];
    for (files, expected) in table {
        assert_eq!(Machine::with(files).limits(), *expected, "{files:?}");
    }
}

#[test]
fn a_limit_has_the_level_of_its_key() {
    let text = "forced_login_method = 'chatgpt'\nallowed_chatgpt_workspaces = ['a']\n";
    let machine = Machine::with(&[(MANAGED, text)]);
    let place = machine.path(MANAGED).display().to_string();
    let forced = Demand::Methods(vec![LoginKind::ChatGpt]);
    let required = Demand::Workspaces(vec!["a".to_owned()]);
    let expected = [
        Limit { demand: forced, level: Level::Forced, place: place.clone() },
        Limit { demand: required, level: Level::Required, place },
    ];
    assert_eq!(machine.policy().limits(), expected);
}

#[test]
fn a_policy_is_read_again_when_it_is_asked_for() {
    let machine = Machine::with(&[]);
    let config = machine.load();
    let (home, work) = (machine.path("home/.codex"), machine.path("work"));
    assert_eq!(config.policies.read(&home).unwrap(), Policy::default());
    let files = config.policies.files(&home);
    for (at, file) in [MANAGED, USER, SYSTEM, CODEX_MANAGED, CODEX_USER, CODEX_SYSTEM, REQUIREMENTS]
        .into_iter()
        .enumerate()
    {
        assert_eq!(files[at], machine.path(file));
    }
    machine.write(CODEX_USER, "forced_login_method = 'api'");
    assert_eq!(config.policies.read(&home).unwrap().limits().len(), 1);
    assert_eq!(config.policies.read(&work).unwrap(), Policy::default(), "each home has its own");
    machine.write(MANAGED, "require_mfa = true");
    assert_eq!(config.policies.read(&home).unwrap().limits().len(), 2);
    for broken in ["forced_login_method = 'apo'", "forced_login_method = "] {
        machine.write(CODEX_USER, broken);
        assert!(config.policies.read(&home).is_err(), "{broken}");
    }
    machine.write(CODEX_USER, "");
    // A mistake that is none of a policy's can wait for the next start.
    machine.write(USER, "lisen = 'x'\ndefault = 3");
    assert!(config.policies.read(&home).is_ok());
    machine.write(USER, "lisen = ");
    assert!(config.policies.read(&home).is_err());
}

#[test]
fn every_mistake_is_pointed_at() {
    let table: &[(&str, &str, &[&str])] = &[
        (USER, "forced_login_method = 'key'", &["1:23 'key' | expected `chatgpt` or `api`"]),
        (
            USER,
            "forced_login_method = ['api']",
            &["1:23 ['api'] | expected a string, found an array"],
        ),
        (
            USER,
            "forced_chatgpt_workspace_id = 3",
            &["1:31 3 | expected a string or a list of strings, found an integer"],
        ),
        (
            USER,
            "forced_chatgpt_workspace_id = ['a', 3]",
            &["1:37 3 | expected a string, found an integer"],
        ),
        (USER, "forced_chatgpt_workspace_id = ''", &["1:31 '' | names no workspace"]),
        (MANAGED, "forced_chatgpt_workspace_id = [' ']", &["1:31 [' '] | names no workspace"]),
        (USER, "on_policy_violation = 'stop'", &["1:23 'stop' | expected `continue` or `exit`"]),
        (
            USER,
            "credentials_store = 'disk'",
            &["1:21 'disk' | expected `file` or `keyring` or `auto` or `ephemeral`"],
        ),
        (
            USER,
            "[credentials.openai]\ncredentials_store = true",
            &["2:21 true | expected a string, found a boolean"],
        ),
        (
            USER,
            "[credentials.a]\nkind = 'api_key'\nsource = 'env:A'\ncredentials_store = 'file'",
            &["4:1 credentials_store | `credentials_store` has no meaning with kind `api_key`"],
        ),
        // only the owner of the machine requires
        (USER, "require_mfa = true", &["1:1 require_mfa | unknown key `require_mfa`"]),
        (
            SYSTEM,
            "allowed_login_methods = ['api']",
            &["1:1 allowed_login_methods | unknown key `allowed_login_methods`"],
        ),
        (
            MANAGED,
            "require_mfa = 'yes'",
            &["1:15 'yes' | expected `true` or `false`, found a string"],
        ),
        (
            MANAGED,
            "allowed_login_methods = 'api'",
            &["1:25 'api' | expected a list, found a string"],
        ),
        (MANAGED, "allowed_login_methods = ['key']", &["1:26 'key' | expected `chatgpt` or `api`"]),
        (
            MANAGED,
            "allowed_chatgpt_workspaces = 'a'",
            &["1:30 'a' | expected a list, found a string"],
        ),
        (MANAGED, "listen = '127.0.0.1:1'", &["1:1 listen | unknown key `listen`"]),
        (
            MANAGED,
            "[upstream]\nresolve = { 'a.example:443' = '127.0.0.1:1' }",
            &["2:1 resolve | unknown key `resolve`"],
        ),
        (MANAGED, "default = ", &["1:11  | string values must be quoted, expected literal string"]),
        // Codex's files
        (
            CODEX_MANAGED,
            "forced_login_method = true",
            &["1:23 true | expected a string, found a boolean"],
        ),
        (CODEX_USER, "forced_login_method = 'x'", &["1:23 'x' | expected `chatgpt` or `api`"]),
        (
            CODEX_SYSTEM,
            "cli_auth_credentials_store = 'x'",
            &["1:30 'x' | expected `file` or `keyring` or `auto` or `ephemeral`"],
        ),
        (
            CODEX_USER,
            "model = 'x'\ntoken = \"hunter2\n",
            &["2:17  | invalid basic string, expected `\"`"],
        ),
        (
            REQUIREMENTS,
            "allowed_login_methods = 3",
            &["1:25 3 | expected a list, found an integer"],
        ),
    ];
    for (file, text, expected) in table {
        let expected: Vec<String> = expected.iter().map(|it| format!("{file}:{it}")).collect();
        assert_eq!(Machine::with(&[(file, text)]).mistakes(), expected, "{file}: {text}");
    }
}

#[test]
fn files_shared_by_two_logins_are_reported_once() {
    let user = "[credentials.work]\nkind = 'codex'\nhome = '~/work'\n";
    let machine = Machine::with(&[(USER, user), (CODEX_SYSTEM, "forced_login_method = 1")]);
    assert_eq!(machine.mistakes().len(), 1);
}

#[test]
fn codex_is_not_read_where_no_login_is_its() {
    let machine = Machine::with(&[(USER, "use = []"), (CODEX_SYSTEM, "no TOML")]);
    machine.load();
}

#[test]
fn a_managed_file_that_others_may_write_is_not_believed() {
    let machine = Machine::with(&[(MANAGED, "default = 'refuse'")]);
    let file = machine.path(MANAGED);
    for (mode, is_fine) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        match machine.load_with(&[], &Overrides::default()) {
            Ok(_) => assert!(is_fine, "{mode:o}"),
            Err(_) => {
                assert!(!is_fine, "{mode:o}");
                let why = "is not to be trusted: its group or others may write it";
                assert_eq!(machine.mistakes(), [format!("{MANAGED} {why}")]);
            }
        }
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let files = MachineFiles { owner: machine.files().owner + 1, ..machine.files() };
    let env = Environment::from_pairs([("HOME", machine.path("home"))]);
    let errors = Config::load_on(&files, &Overrides::default(), &env).unwrap_err();
    assert!(errors.mistakes()[0].to_string().ends_with("it does not belong to root"));
    assert!(errors.mistakes()[0].hint().unwrap().contains("chown root"));

    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let found = machine.mistakes();
    assert!(found[0].ends_with("it is not a file"), "{found:?}");
    fs::remove_dir(&file).unwrap();
    fs::write(&file, b"default = '\xff'").unwrap();
    let found = machine.mistakes();
    assert!(found[0].starts_with(&format!("cannot read {MANAGED}")), "{found:?}");
    fs::remove_file(&file).unwrap();
    machine.load();
}

#[test]
fn real_files_are_roots() {
    let files = MachineFiles::default();
    assert_eq!(
        (files.managed.as_path(), files.owner),
        (Path::new("/etc/valetkey/managed.toml"), 0)
    );
    assert_eq!(files.codex_requirements, Path::new("/etc/codex/requirements.toml"));
}

#[test]
fn managed_settings_win_over_everything() {
    let user = "default = 'tunnel'\non_policy_violation = 'continue'\n\
                [upstream]\ntrust = 'system'\nproxy = 'http://user:1'\nca_bundle = 'user.pem'\n\
                [upstream.resolve]\n'api.example.com:443' = '127.0.0.1:9443'\n\
                [credentials.openai]\nhome = '~/mine'\n";
    let managed = "default = 'refuse'\non_policy_violation = 'exit'\n\
                   [upstream]\ntrust = 'bundle'\nproxy = 'http://corp:3128'\nca_bundle = 'corp.pem'\n\
                   [credentials.openai]\nhome = '/srv/codex'\n";
    let variables = [
        (env::UPSTREAM_PROXY, "http://variable:1"),
        (env::UPSTREAM_CA_BUNDLE, "/variable.pem"),
        ("HTTPS_PROXY", "http://other:1"),
        ("NO_PROXY", "*"),
        ("SSL_CERT_FILE", "/other.pem"),
    ];
    let machine = Machine::with(&[(USER, user), (MANAGED, managed)]);
    let config = machine.load_with(&variables, &Overrides::default()).unwrap();
    assert_eq!(config.rules.decide(&target("unruled.example")), Decision::Refuse);
    assert_eq!(config.on_policy_violation, OnViolation::Exit);
    assert_eq!(config.upstream.trust, Trust::Bundle);
    let proxies: Vec<String> =
        config.upstream.proxies.iter().map(|proxy| proxy.url.to_string()).collect();
    assert_eq!((proxies, config.upstream.no_proxy.as_str()), (vec!["http://corp:3128".into()], ""));
    assert!(config.upstream.resolve.is_empty(), "the user's own leads around the proxy");
    let bundles: Vec<&Path> =
        config.upstream.ca_bundles.iter().map(|bundle| bundle.path.as_path()).collect();
    assert_eq!(bundles, [machine.path("etc/valetkey/corp.pem")]);
    let home = PathBuf::from("/srv/codex");
    let openai = CredentialKind::Codex { home, keep: Keep::File };
    assert_eq!(config.credentials.values().collect::<Vec<_>>(), [&openai]);

    let table = [("none", 0, "*"), ("env", 1, "*")];
    for (word, count, no_proxy) in table {
        machine.write(MANAGED, &format!("[upstream]\nproxy = '{word}'"));
        let upstream = machine.load_with(&variables, &Overrides::default()).unwrap().upstream;
        assert_eq!((upstream.proxies.len(), upstream.no_proxy.as_str()), (count, no_proxy));
        assert!(upstream.proxies.iter().all(|proxy| proxy.named_by == "HTTPS_PROXY"));
        assert_eq!(upstream.ca_bundles[0].path, Path::new("/variable.pem"), "not managed");
    }
}

#[test]
fn managed_rules_count_before_all_others() {
    let user = "[credentials.key]\nkind = 'api_key'\nsource = 'env:KEY'\n\
                [[rules]]\nname = 'mine'\nhost = 'api.example.com'\npaths = ['/v1/chat/']\n\
                credential = 'key'\n\
                [[rules]]\nname = 'both'\nhost = 'both.example'\ncredential = 'key'\n";
    let managed = "[credentials.corp]\nkind = 'api_key'\nsource = 'file:/srv/key'\n\
                   [[rules]]\nname = 'corp'\nhost = '*.example.com'\npaths = ['/v1/']\n\
                   credential = 'corp'\n\
                   [[rules]]\nname = 'both'\nhost = 'corp.example'\ncredential = 'corp'\n\
                   [[rules]]\nhost = 'chatgpt.com'\naction = 'tunnel'\n\
                   [[rules]]\nname = 'guard'\nhost = 'later.example'\naction = 'refuse'\n";
    let config = Machine::with(&[(USER, user), (MANAGED, managed)]).load();
    let origin = Origin::https(target("api.example.com"));
    let found = config.rules.find(&origin, &http::Method::POST, "/v1/chat/completions");
    assert!(matches!(found, Found::Rule(rule) if rule.name == "corp" && rule.pinned));
    let table = [
        ("corp.example", Decision::Intercept),
        ("both.example", Decision::Tunnel),
        ("chatgpt.com", Decision::Tunnel),
        ("api.openai.com", Decision::Intercept),
    ];
    for (host, expected) in table {
        assert_eq!(config.rules.decide(&target(host)), expected, "{host}");
    }
    assert_eq!(config.rules.iter().filter(|rule| rule.pinned).count(), 4);

    let managed = "[[rules]]\nname = 'a'\nhost = 'x.example'\naction = 'tunnel'\n\
                   [[rules]]\nname = 'b'\nhost = 'x.example'\ncredential = 'openai'\n";
    let found = Machine::with(&[(MANAGED, managed)]).mistakes();
    assert!(found[0].contains("rule `a` tunnels a host that rule `b` intercepts"), "{found:?}");
}

#[test]
fn where_logins_are_kept() {
    let of_all = "credentials_store = 'auto'\n";
    let own =
        "[credentials.work]\nkind = 'codex'\nhome = '~/work'\ncredentials_store = 'ephemeral'\n";
    let work = "[credentials.work]\nkind = 'codex'\nhome = '~/work'\n";
    let codex = "cli_auth_credentials_store = 'keyring'\n";
    type Row<'a> = (&'a [(&'a str, &'a str)], Keep, Option<Keep>);
    let table: &[Row<'_>] = &[
        (&[], Keep::File, None),
        (&[(CODEX_SYSTEM, codex)], Keep::Keyring, None),
        (&[(CODEX_USER, codex), (USER, work)], Keep::Keyring, Some(Keep::File)),
        (
            &[(CODEX_MANAGED, codex), (CODEX_USER, "cli_auth_credentials_store = 'auto'")],
            Keep::Keyring,
            None,
        ),
        (&[(CODEX_MANAGED, codex), (USER, of_all)], Keep::Auto, None),
        (&[(CODEX_USER, codex), (SYSTEM, of_all)], Keep::Auto, None),
        (&[(SYSTEM, of_all), (USER, own)], Keep::Auto, Some(Keep::Ephemeral)),
        (&[(SYSTEM, own), (USER, of_all)], Keep::Auto, Some(Keep::Ephemeral)),
        (
            &[(USER, own), (MANAGED, "[credentials.work]\ncredentials_store = 'keyring'")],
            Keep::File,
            Some(Keep::Keyring),
        ),
    ];
    for (files, openai, work) in table {
        let config = Machine::with(files).load();
        let keep =
            |name: &str| match config.credentials.get(&name.parse::<CredentialName>().unwrap()) {
                Some(CredentialKind::Codex { keep, .. }) => Some(*keep),
                _ => None,
            };
        assert_eq!((keep("openai"), keep("work")), (Some(*openai), *work), "{files:?}");
    }
}

#[test]
fn what_is_in_force_is_shown_with_its_file() {
    let machine = Machine::with(&[]);
    assert_eq!(machine.load().managed().unwrap(), []);
    machine.write(
        MANAGED,
        "default = 'refuse'\non_policy_violation = 'exit'\nrequire_mfa = true\n\
         [upstream]\ntrust = 'bundle'\nca_bundle = '/srv/corp.pem'\n\
         proxy = 'http://me:pa55word@corp:3128'\n\
         [credentials.key]\nkind = 'api_key'\nsource = 'env:KEY'\n\
         [[rules]]\nname = 'corp'\nhost = '*.corp.example'\ncredential = 'key'\n",
    );
    machine.write(CODEX_MANAGED, "forced_login_method = 'chatgpt'");
    machine.write(USER, "[credentials.work]\nkind = 'codex'\nhome = '~/work'\n");
    machine.write("home/work/config.toml", "forced_chatgpt_workspace_id = 'ws-1'");
    let config = machine.load();
    let settings = config.managed().unwrap();
    let shown: Vec<String> =
        settings.iter().map(|setting| machine.shown(&setting.place, &setting.text)).collect();
    let expected = [
        format!(r#"{MANAGED}: default = "refuse""#),
        format!(r#"{MANAGED}: on_policy_violation = "exit""#),
        format!(r#"{MANAGED}: upstream.trust = "bundle""#),
        format!(r#"{MANAGED}: upstream.proxy = "http://corp:3128""#),
        format!(r#"{MANAGED}: upstream.ca_bundle = "/srv/corp.pem""#),
        format!("{MANAGED}: [credentials.key]"),
        format!(r#"{MANAGED}: [[rules]] "corp" on *.corp.example"#),
        format!("{MANAGED}: require_mfa = true"),
        format!(r#"{CODEX_MANAGED}: forced_login_method = "chatgpt""#),
        r#"home/work/config.toml: forced_chatgpt_workspace_id = "ws-1""#.to_owned(),
    ];
    assert_eq!(shown, expected);
    let place = machine.path(MANAGED);
    assert_eq!(settings[0].to_string(), format!(r#"default = "refuse"  ({})"#, place.display()));
}

#[test]
fn the_example_has_every_managed_key() {
    let example = include_str!("../../../config/example.toml");
    let (_, section) = example.split_once("# /etc/valetkey/managed.toml\n").unwrap();
    let text: String = section
        .lines()
        .filter_map(|line| line.strip_prefix("#   "))
        .flat_map(|line| [line, "\n"])
        .collect();
    for key in [DOCUMENT, UPSTREAM].concat() {
        let heads = [format!("{key} ="), format!("[{key}"), format!("[[{key}")];
        let is_there = text.lines().any(|line| heads.iter().any(|head| line.starts_with(head)));
        assert!(is_there, "{key}");
    }
    let machine = Machine::with(&[(MANAGED, &text)]);
    let settings = machine.load().managed().unwrap();
    assert!(settings.iter().any(|setting| setting.text == "require_mfa = true"), "{settings:?}");
}

#[test]
fn a_report_shows_nothing_else_of_a_file_of_codex() {
    let machine = Machine::with(&[(CODEX_USER, "[mcp.env]\nTOKEN = \"hunter2\nx = 1\n")]);
    let errors = machine.load_with(&[], &Overrides::default()).unwrap_err();
    let shown = format!("{}{errors:?}", errors.render(false, 100));
    assert!(shown.contains("config.toml:2:") && !shown.contains("hunter2"), "{shown}");
}

fn target(host: &str) -> Target {
    Target::parse(&format!("{host}:443")).unwrap()
}

#[test]
fn the_highest_that_speaks_of_the_audit_decides_alone() {
    use super::super::AuditConfig;

    let on = "[audit]\nto = \"file\"\n";
    let off = "[audit]\nto = \"off\"\n";
    let mine = "[audit]\nto = \"file\"\nfile = \"mine.jsonl\"\nmax_mib = 1\nkeep = 2\n";
    let usual = |machine: &Machine| AuditConfig::File {
        path: machine.path("home/.local/state/valetkey/audit.jsonl"),
        most: 16 << 20,
        keep: 8,
    };
    let of = |files: &[(&str, &str)]| {
        let machine = Machine::with(files);
        (machine.load().audit, machine)
    };
    assert_eq!(of(&[]).0, AuditConfig::Off);
    assert_eq!(of(&[(USER, "[audit]\nto = \"stderr\"\n")]).0, AuditConfig::Stderr);
    let (audit, machine) = of(&[(USER, mine), (SYSTEM, on)]);
    let path = machine.path("home/.config/valetkey/mine.jsonl");
    assert_eq!(audit, AuditConfig::File { path, most: 1 << 20, keep: 2 });
    for theirs in [off, mine] {
        let (audit, machine) = of(&[(MANAGED, on), (USER, theirs)]);
        assert_eq!(audit, usual(&machine), "nobody takes half of it back");
    }
    let (_, machine) = of(&[(MANAGED, on)]);
    let settings = machine.load().managed().unwrap();
    assert!(settings.iter().any(|it| it.text == "audit.to = \"file\""), "{settings:?}");

    for (text, mistake) in [
        ("[audit]\n", "the audit needs a `to`"),
        ("[audit]\nto = \"disk\"\n", "expected `off` or `stderr` or `file`"),
        ("[audit]\nto = \"stderr\"\nkeep = 2\n", "`keep` has no meaning without `to = \"file\"`"),
        ("[audit]\nto = \"file\"\nkeep = 0\n", "expected a number from 1 to 1000"),
        ("[audit]\nto = \"file\"\nmax_mib = -1\n", "expected a number from 1 to 65536"),
        ("[audit]\nto = \"file\"\nfolder = \"x\"\n", "folder"),
    ] {
        let machine = Machine::with(&[(USER, text)]);
        let errors = machine.load_with(&[], &Overrides::default()).unwrap_err();
        let shown = errors.render(false, 200);
        assert!(shown.contains(mistake), "{shown}");
    }
}
