//! The page of `docs/` for an agent's sandbox, from its first command to its last, with a program in the agent's place
//! that looks around.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use tokio::process::Command;

use super::dialling::network::is_inside;
use super::support::{Scene, done, program};

const PAGE: &str = include_str!("../../docs/agent-sandbox.md");

/// What the agent is on the page, and here.
const AGENT: &str = "exec codex";
const IN_ITS_PLACE: &str = "exec sh ./look-around";

/// Each answer on a line of its own, behind its name.
const LOOK_AROUND: &str = r#"
env | sed 's/=.*//; s/^/variable /'
find /run /var/run/ -type s | sed 's/^/socket /'
ls -A "$HOME" | sed 's/^/at home: /'
ask() { curl --silent --cacert "$CODEX_CA_CERTIFICATE" --output /dev/null "$@"; }
ask --retry 5 --retry-connrefused --write-out 'answer %{http_code}\n' https://chatgpt.com/backend-api/wham/accounts/check
ask --write-out 'elsewhere %{http_connect}\n' https://other.example.com/
ask --proxy http://127.0.0.1:8377 --write-out 'without a pass %{http_connect}\n' https://chatgpt.com/
ask --noproxy '*' https://chatgpt.com/ || echo "past the proxy: curl says $?"
"#;

/// What the page sets, and what shells do by themselves.
const VARIABLES: [&str; 12] = [
    "CODEX_CA_CERTIFICATE",
    "CODEX_HOME",
    "HOME",
    "HTTPS_PROXY",
    "NODE_EXTRA_CA_CERTS",
    "NODE_USE_ENV_PROXY",
    "OLDPWD",
    "PATH",
    "PWD",
    "SHLVL",
    "TERM",
    "_",
];

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_has_a_pass_and_nothing_of_the_hosts() {
    let (Some(bash), Some(bwrap)) = (program("bash"), program("bwrap")) else { return };
    let (Some(_), Some(_)) = (program("socat"), program("curl")) else { return };
    if !is_inside("agent_sandbox::an_agent_has_a_pass_and_nothing_of_the_hosts").await {
        return;
    }
    let probe = ["--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"];
    let probe = Command::new(bwrap).args(probe).output().await.unwrap();
    if !probe.status.success() {
        println!("skipped: no sandbox is to be had: {}", String::from_utf8_lossy(&probe.stderr));
        return;
    }
    // A session bus, as a desktop has one; the mount is this test's alone.
    let mounted = Command::new("mount").args(["-t", "tmpfs", "none", "/run"]).status().await;
    assert!(mounted.unwrap().success());
    let _bus = UnixListener::bind("/run/bus").unwrap();

    let scene = Scene::usual().await;
    let home = scene.home.path().to_str().unwrap();
    let listeners = fenced("toml")[0].replace("/home/me", home);
    scene.configure(&format!("{listeners}{}", scene.world.upstream_toml()));
    let project = scene.path("project");
    fs::create_dir(&project).unwrap();
    fs::write(project.join("look-around"), LOOK_AROUND).unwrap();
    let typed = fenced("sh").concat();
    assert_eq!(typed.matches(AGENT).count(), 1, "{typed}");
    let typed = typed.replace(AGENT, IN_ITS_PLACE);
    let starting = "valetkey serve &\n";
    assert!(typed.starts_with(starting), "{typed}");
    // A person types more slowly than it starts.
    let typed = typed.replace(starting, "valetkey serve 2>/dev/null &\nvaletkey health >&2\n");

    let valetkey = std::path::Path::new(env!("CARGO_BIN_EXE_valetkey"));
    let path = format!("{}:{}", valetkey.parent().unwrap().display(), env!("PATH"));
    let mut shell = Command::new(bash);
    shell.args(["-euc", &format!("trap 'kill $!' EXIT\n{typed}")]).current_dir(&project);
    shell.env_clear().envs(&scene.env).env("PATH", path).env("TERM", "dumb");
    shell.env("OPENAI_API_KEY", "sk-a-key-of-the-shell");
    shell.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/run/bus");
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let done = done(shell.spawn().unwrap()).await;
    assert_eq!(done.status, 0, "{done:#?}");
    let said = |name: &str| -> Vec<&str> {
        done.out.lines().filter_map(|line| line.strip_prefix(name)).collect()
    };
    let variables = said("variable ");
    assert!(variables.contains(&"HTTPS_PROXY"), "{done:#?}");
    let strange: Vec<_> = variables.iter().filter(|it| !VARIABLES.contains(it)).collect();
    assert!(strange.is_empty(), "{strange:?}");
    assert!(said("socket ").is_empty(), "{done:#?}");
    assert_eq!(said("at home: "), ["project"]);
    assert_eq!(said("answer "), ["200"], "{done:#?}");
    assert_eq!(said("elsewhere "), ["403"]);
    assert_eq!(said("without a pass "), ["407"]);
    // "Could not resolve host" (curl(1)).
    assert_eq!(said("past the proxy: "), ["curl says 6"]);
    assert_eq!(scene.seen_signed_in().len(), 1);
    scene.assert_no_secret("what the agent sees", &done.out);
}

/// The page's blocks in this language, in their order.
fn fenced(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    PAGE.split(&fence).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}
