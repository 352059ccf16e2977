//! Every policy with every login, through the built binary and the real paths in `/etc`.
//!
//! The machine's own `/etc` is not touched: the commands run in a mount namespace with a copy of it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::{StreamExt as _, stream};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::support::{Done, done, program};

/// What is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    ApiKey,
    /// A ChatGPT login for that workspace, or one that names none.
    ChatGpt(Option<&'static str>),
    Personal,
}

const LOGINS: [Stored; 5] = [
    Stored::ApiKey,
    Stored::ChatGpt(Some("acct-right")),
    Stored::ChatGpt(Some("acct-wrong")),
    Stored::ChatGpt(None),
    Stored::Personal,
];

impl Stored {
    fn auth_json(self) -> String {
        match self {
            Self::ApiKey => {
                r#"{"auth_mode":"apikey","OPENAI_API_KEY":"sk-test-abcdefghij"}"#.into()
            }
            Self::Personal => r#"{"personal_access_token":"at-1234567890abcdef"}"#.into(),
            Self::ChatGpt(workspace) => {
                let auth = match workspace {
                    Some(id) => format!(r#"{{"chatgpt_account_id":"{id}"}}"#),
                    None => "{}".to_owned(),
                };
                let claims =
                    format!(r#"{{"exp":4000000000,"https://api.openai.com/auth":{auth}}}"#);
                let jwt = format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims));
                format!(
                    r#"{{"auth_mode":"chatgpt","tokens":{{"id_token":"{jwt}","access_token":"{jwt}","refresh_token":"r"}},"last_refresh":"2026-11-23T00:00:00Z"}}"#
                )
            }
        }
    }

    /// The first line of `login status`.
    fn status(self) -> &'static str {
        match self {
            Self::ApiKey => "API key configured - sk-test-***fghij",
            Self::ChatGpt(_) => "Logged in using ChatGPT",
            Self::Personal => "Logged in using personal access token - at-12345***bcdef",
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    ChatGptOnly,
    ApiOnly,
    Workspace,
}

const LIMITS: [Limit; 3] = [Limit::ChatGptOnly, Limit::ApiOnly, Limit::Workspace];

impl Limit {
    fn forced(self) -> &'static str {
        match self {
            Self::ChatGptOnly => "forced_login_method = \"chatgpt\"\n",
            Self::ApiOnly => "forced_login_method = \"api\"\n",
            Self::Workspace => "forced_chatgpt_workspace_id = [\"acct-right\", \"acct-other\"]\n",
        }
    }

    fn allowed(self) -> &'static str {
        match self {
            Self::ChatGptOnly => "allowed_login_methods = [\"chatgpt\"]\n",
            Self::ApiOnly => "allowed_login_methods = [\"api\"]\n",
            Self::Workspace => "allowed_chatgpt_workspaces = [\"acct-right\", \"acct-other\"]\n",
        }
    }

    /// Codex's sentence for a stored login that does not meet this; `None` for one that does.
    fn verdict(self, stored: Stored) -> Option<&'static str> {
        match (self, stored) {
            (Self::ChatGptOnly, Stored::ApiKey) => {
                Some("ChatGPT login is required, but an API key is currently being used.")
            }
            (Self::ApiOnly, Stored::ChatGpt(_) | Stored::Personal) => {
                Some("API key login is required, but ChatGPT is currently being used.")
            }
            (Self::Workspace, Stored::ChatGpt(Some("acct-wrong"))) => Some(
                "Login is restricted to workspace(s) acct-right, acct-other, but current credentials belong to acct-wrong.",
            ),
            (Self::Workspace, Stored::ChatGpt(None)) => Some(
                "Login is restricted to workspace(s) acct-right, acct-other, but current credentials lack a workspace identifier.",
            ),
            _ => None,
        }
    }
}

/// Where it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Ours,
    Codex,
    CodexManaged,
    CodexRequirements,
    CodexSystem,
    ManagedForced,
    ManagedAllowed,
    Nowhere,
}

const LAYERS: [Layer; 8] = [
    Layer::Ours,
    Layer::Codex,
    Layer::CodexManaged,
    Layer::CodexRequirements,
    Layer::CodexSystem,
    Layer::ManagedForced,
    Layer::ManagedAllowed,
    Layer::Nowhere,
];

impl Layer {
    fn is_forced(self) -> bool {
        !matches!(self, Self::CodexRequirements | Self::ManagedAllowed | Self::Nowhere)
    }

    /// The file in `/etc`, where it is one.
    fn in_etc(self) -> Option<&'static str> {
        match self {
            Self::CodexManaged => Some("codex/managed_config.toml"),
            Self::CodexRequirements => Some("codex/requirements.toml"),
            Self::CodexSystem => Some("codex/config.toml"),
            Self::ManagedForced | Self::ManagedAllowed => Some("valetkey/managed.toml"),
            Self::Ours | Self::Codex | Self::Nowhere => None,
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy)]
struct Row {
    layer: Layer,
    limit: Limit,
    stored: Stored,
    /// Whether there is a credential besides.
    has_another: bool,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, limit, stored, has_another } = self;
        write!(f, "{layer:?} {limit:?} {stored:?} another: {has_another}")
    }
}

/// A copy of `/etc` with one file more, if a mount namespace is to be had.
struct Etc {
    folder: TempDir,
    flags: &'static str,
}

impl Etc {
    async fn new(unshare: &str, file: &str, text: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut copy = Command::new("cp");
        copy.args(["-a", "/etc"]).arg(folder.path()).stderr(Stdio::null());
        // What this user may not read it need not copy.
        copy.status().await.unwrap();
        let path = folder.path().join("etc").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-rm" };
        let etc = Self { folder, flags };
        let works = etc.command(unshare, Path::new("true")).status().await.unwrap().success();
        works.then_some(etc)
    }

    fn command(&self, unshare: &str, program: &Path) -> Command {
        let mut command = Command::new(unshare);
        let script = "mount --bind \"$1\" /etc && shift && exec \"$@\"";
        command.args([self.flags, "sh", "-c", script, "sh"]).arg(self.folder.path().join("etc"));
        command.arg(program).kill_on_drop(true);
        command
    }
}

/// A home with a login and the files of a row.
struct Home {
    folder: TempDir,
}

impl Home {
    fn new(row: Row) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = Self { folder };
        for dir in [".codex", ".config/valetkey"] {
            fs::create_dir_all(home.path(dir)).unwrap();
        }
        fs::write(home.auth_json(), row.stored.auth_json()).unwrap();
        let ours = if row.layer == Layer::Ours { row.limit.forced() } else { "" };
        let another = if row.has_another {
            "[credentials.other]\nkind = \"api_key\"\nsource = \"env:OTHER\"\n"
        } else {
            ""
        };
        fs::write(home.path(".config/valetkey/config.toml"), format!("{ours}{another}")).unwrap();
        if row.layer == Layer::Codex {
            fs::write(home.path(".codex/config.toml"), row.limit.forced()).unwrap();
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn auth_json(&self) -> PathBuf {
        self.path(".codex/auth.json")
    }

    async fn valetkey(&self, place: Option<(&str, &Etc)>, arguments: &[&str]) -> Done {
        let program = Path::new(env!("CARGO_BIN_EXE_valetkey"));
        let mut command = match place {
            Some((unshare, etc)) => etc.command(unshare, program),
            None => Command::new(program),
        };
        command.args(arguments).env_clear().env("PATH", std::env!("PATH"));
        command.env("HOME", self.folder.path()).env("XDG_RUNTIME_DIR", self.path("run"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A command that does not read it may have ended.
        drop(stdin.write_all(b"sk-test-0123456789\n").await);
        drop(stdin);
        done(child).await
    }
}

async fn check(row: Row, place: Option<(&str, &Etc)>) {
    let verdict = row.limit.verdict(row.stored).filter(|_| row.layer != Layer::Nowhere);
    let deletes = verdict.is_some() && row.layer.is_forced();

    let home = Home::new(row);
    let status = home.valetkey(place, &["login", "status"]).await;
    let first = status.out.lines().next().unwrap_or_default();
    let expected = if verdict.is_some() { (1, "Not logged in") } else { (0, row.stored.status()) };
    assert_eq!((status.status, first), expected, "{row}: {status:?}");
    if let Some(sentence) = verdict {
        assert!(status.out.contains(sentence), "{row}: {status:?}");
    }
    assert!(home.auth_json().exists(), "{row}: whoever only looks deletes nothing");

    let run = home.valetkey(place, &["run", "--", "true"]).await;
    let ends = deletes && !row.has_another;
    assert_eq!(run.status, i32::from(ends), "{row}: {run:?}");
    match verdict {
        None => assert!(!run.err.contains("login"), "{row}: {run:?}"),
        Some(sentence) if deletes => {
            assert!(run.err.contains(&format!("{sentence} Logging out.")), "{row}: {run:?}");
        }
        Some(sentence) => {
            assert!(run.err.contains(sentence), "{row}: {run:?}");
            assert!(!run.err.contains("Logging out"), "{row}: {run:?}");
        }
    }
    assert_eq!(home.auth_json().exists(), !deletes, "{row}: {run:?}");
}

/// What somebody gets who signs in: a command, and the sentence with which each limit refuses it.
const ATTEMPTS: [(&[&str], Limit, &str); 3] = [
    (
        &["login", "--with-api-key"],
        Limit::ChatGptOnly,
        "error: API key login is disabled. Use ChatGPT login instead.\n",
    ),
    (
        &["login", "--with-access-token"],
        Limit::ApiOnly,
        "error: Access token login is disabled. Use API key login instead.\n",
    ),
    (
        &["login", "--no-browser"],
        Limit::ApiOnly,
        "error: ChatGPT login is disabled. Use API key login instead.\n",
    ),
];

async fn check_attempts(layer: Layer, limit: Limit, place: Option<(&str, &Etc)>) {
    let row = Row { layer, limit, stored: Stored::ApiKey, has_another: true };
    for (arguments, refused_by, sentence) in ATTEMPTS {
        // The others would go to the real issuer.
        if limit == refused_by && layer != Layer::Nowhere {
            let home = Home::new(row);
            let login = home.valetkey(place, arguments).await;
            assert_eq!(login.status, 1, "{row}: {login:?}");
            assert!(
                login.err.starts_with(sentence) && login.err.contains("hint:"),
                "{row}: {login:?}"
            );
            let kept = fs::read_to_string(home.auth_json()).unwrap();
            assert_eq!(kept, row.stored.auth_json(), "{row}: {arguments:?}");
        }
    }
    if limit != Limit::ChatGptOnly || layer == Layer::Nowhere {
        let home = Home::new(row);
        let login = home.valetkey(place, &["login", "--with-api-key"]).await;
        assert_eq!(login.status, 0, "{row}: {login:?}");
        assert!(fs::read_to_string(home.auth_json()).unwrap().contains("sk-test-0123456789"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_combination_of_limit_layer_login_and_credential() {
    let Some(unshare) = program("unshare") else { return };
    let mut count = 0;
    for layer in LAYERS {
        for limit in LIMITS {
            let text = if layer.is_forced() { limit.forced() } else { limit.allowed() };
            let etc = match layer.in_etc() {
                None => None,
                Some(file) => match Etc::new(&unshare, file, text).await {
                    Some(etc) => Some(etc),
                    None => {
                        println!("skipped: {layer:?}: this user may make no mount namespace");
                        continue;
                    }
                },
            };
            let place = etc.as_ref().map(|etc| (unshare.as_str(), etc));
            let rows = LOGINS.into_iter().flat_map(|stored| {
                [true, false].map(|has_another| Row { layer, limit, stored, has_another })
            });
            let rows: Vec<Row> = rows.collect();
            count += rows.len();
            stream::iter(rows).for_each_concurrent(4, |row| check(row, place)).await;
            check_attempts(layer, limit, place).await;
        }
    }
    println!("{count} combinations");
    assert!(count >= 90, "only {count}");
}
