//! The page of `docs/` for dev containers, command by command: a host, and a container in a network of its own that
//! reaches nothing but the proxy.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::dialling::network::is_inside;
use super::support::{LIMIT, LoginPorts, Scene, codex, program};

const PAGE: &str = include_str!("../../docs/devcontainer.md");

/// What the page has the reader type, and where: each line of its shell blocks, in order.
const HOST: usize = 4 + 3;

#[tokio::test(flavor = "multi_thread")]
async fn the_page_holds_command_by_command() {
    let (Some(codex), Some(_), Some(bash)) = (codex(), program("curl"), program("bash")) else {
        return;
    };
    if program("update-ca-certificates").is_none() {
        return;
    }
    if !is_inside("devcontainer::the_page_holds_command_by_command").await {
        return;
    }
    let commands = commands();
    assert_eq!(commands.len(), HOST + 2 + 2, "the page has other commands: {commands:#?}");
    let (host_commands, rest) = commands.split_at(HOST);
    let (container_commands, last_commands) = rest.split_at(2);

    let scene = Scene::usual().await;
    fs::remove_file(scene.path(".codex/auth.json")).unwrap();
    // Beside what the page says, a listener beyond loopback that would take a user.
    let other = "[[listeners]]\naddress = \"172.17.0.1:8378\"\n";
    scene.configure(&format!("{}{other}{}", block("toml"), scene.world.upstream_toml()));
    fs::create_dir(scene.path("your-project")).unwrap();
    let mut host = Shell::on_the_host(&bash, &scene).await;
    let _ports = LoginPorts::hold();
    for command in host_commands {
        match command.as_str() {
            // What the editor does: the container below is it.
            "code ." => host.type_ok(&initialize(&scene)).await,
            "valetkey serve &" => {
                host.type_ok("valetkey serve 2>serve.log &").await;
                host.type_ok("valetkey health").await
            }
            command => host.type_ok(command).await,
        };
    }
    assert!(scene.path(".codex/auth.json").exists(), "the host is signed in");
    let pass = host.type_ok("echo \"$VALETKEY_PASS\"").await;
    assert!(pass.starts_with("vkp_"), "{pass}");

    // Who comes from beyond loopback may be anybody, whatever the kernel says.
    let knock =
        "curl --silent --output /dev/null --write-out '%{http_connect}' https://chatgpt.com/";
    let (said, _) = host.type_line(&format!("{knock} --proxy http://172.17.0.1:8378")).await;
    assert_eq!(said.trim(), "407");

    let mut container = Shell::in_a_container(&bash, &scene, (pass.trim(), &codex)).await;
    for command in container_commands {
        container.type_ok(command).await;
    }
    let seen = scene.seen_signed_in();
    assert!(seen.iter().any(|seen| seen.path.ends_with("/responses")), "{seen:?}");
    // Nothing in there is worth anything: not its files, not its variables.
    let variables = container.type_ok("env").await;
    assert!(variables.contains("HTTPS_PROXY=http://valetkey:vkp_"), "{variables}");
    scene.assert_no_secret("the container's variables", &variables);
    let mounted = files(&scene.path(".local/share/valetkey/devcontainer"));
    assert!(mounted.iter().any(|(path, _)| path.ends_with("codex/auth.json")));
    for (path, content) in mounted {
        scene.assert_no_secret(&path.display().to_string(), &String::from_utf8_lossy(&content));
    }
    let home = scene.home.path().display();
    let (said, _) = container.type_line(&format!("ls -A {home}")).await;
    assert_eq!(said.trim(), "", "the host's home is not in there");
    let elsewhere =
        container.type_line("curl --silent https://other.example.com/; echo $?").await.0;
    // "Failure in receiving network data" or a refused CONNECT (curl(1)).
    assert!(["56", "7"].contains(&elsewhere.trim()), "{elsewhere}");

    for command in last_commands {
        host.type_ok(command).await;
    }
    let (said, status) = container.type_line(&container_commands[0]).await;
    assert_ne!(status, 0, "{said}");
    assert_eq!(container.type_line(knock).await.0.trim(), "407");
    assert!(scene.path(".codex/auth.json").exists(), "the host's login has nothing to do with it");
    host.type_ok("kill $!").await;
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| match path.is_dir() {
        true => files(&path),
        false => vec![(path.clone(), fs::read(&path).unwrap())],
    };
    entries.flat_map(below).collect()
}

/// The lines of the page's shell blocks, without what explains them.
fn commands() -> Vec<String> {
    let blocks = PAGE.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).map(|line| line.split("  #").next().unwrap().trim());
    lines.filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// The page's block in this language.
fn block(language: &str) -> &'static str {
    PAGE.split(&format!("```{language}\n")).nth(1).unwrap().split("```").next().unwrap()
}

/// A file of JSON with comments that has them on lines of their own.
fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    serde_json::from_str(&lines.collect::<Vec<_>>().join("\n")).unwrap()
}

fn settings(scene: &Scene) -> Value {
    json(&scene.path("your-project/.devcontainer/devcontainer.json"))
}

/// What the editor runs on the host before the container starts.
fn initialize(scene: &Scene) -> String {
    settings(scene)["initializeCommand"].as_str().unwrap().to_owned()
}

/// A shell that somebody sits at.
struct Shell {
    _child: Child,
    keys: ChildStdin,
    screen: Lines<BufReader<ChildStdout>>,
}

const PROMPT: &str = "the prompt, after status";

impl Shell {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (keys, screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { _child: child, keys, screen: BufReader::new(screen).lines() }
    }

    /// The user's own, with the built binary in its path, and a browser that agrees to everything.
    async fn on_the_host(bash: &str, scene: &Scene) -> Self {
        let browser = scene.path("browser");
        let to = format!("auth.openai.com:443:{}", scene.world.resolve()[0].1);
        let script = format!(
            "#!/bin/sh\nexec curl -sSL --fail --output /dev/null --connect-to {to} --cacert '{}' \"$1\"\n",
            scene.world.ca_file().display()
        );
        fs::write(&browser, script).unwrap();
        fs::set_permissions(&browser, Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(bash);
        command
            .env_clear()
            .envs(&scene.env)
            .env("BROWSER", &browser)
            .current_dir(scene.home.path());
        command.env("PATH", path_with(Path::new(env!("CARGO_BIN_EXE_valetkey"))));
        let mut shell = Self::start(command);
        shell.type_ok("ip link add docker0 type veth peer name inside").await;
        shell.type_ok("ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up").await;
        shell
    }

    /// What a container engine makes of the Feature and the settings: a network and a file system of its own, in which
    /// the host's home is not.
    async fn in_a_container(bash: &str, scene: &Scene, (pass, codex): (&str, &str)) -> Self {
        let feature = scene.path("your-project/.devcontainer/valetkey");
        let settings = settings(scene);
        let of_feature = &json(&feature.join("devcontainer-feature.json"))["containerEnv"];
        let variables: BTreeMap<String, String> = [of_feature, &settings["remoteEnv"]]
            .into_iter()
            .flat_map(|all| all.as_object().unwrap())
            .map(|(name, value)| {
                let value = value.as_str().unwrap().replace("${localEnv:VALETKEY_PASS}", pass);
                (name.clone(), value)
            })
            .collect();
        assert!(settings["runArgs"][0].as_str().unwrap().contains("host.docker.internal"));

        let work = scene.path("container");
        fs::create_dir_all(work.join("feature")).unwrap();
        fs::copy(feature.join("install.sh"), work.join("feature/install.sh")).unwrap();
        fs::copy(codex, work.join("codex")).unwrap();
        fs::write(work.join("hosts"), "127.0.0.1 localhost\n172.17.0.1 host.docker.internal\n")
            .unwrap();
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--", bash]).env_clear().envs(variables);
        command.env("PATH", std::env!("PATH")).env("HOME", "/root").current_dir("/");
        let mut shell = Self::start(command);
        let pid = shell.type_ok("echo $$").await;
        let moved =
            Command::new("ip").args(["link", "set", "inside", "netns", pid.trim()]).status();
        assert!(moved.await.unwrap().success());
        for command in [
            "ip link set lo up && ip addr add 172.17.0.2/16 dev inside && ip link set inside up"
                .to_owned(),
            format!("mount --bind {}/hosts /etc/hosts", work.display()),
            format!("cp -a /etc/ssl {0}/ssl && mount --bind {0}/ssl /etc/ssl", work.display()),
            "mount -t tmpfs none /opt && mkdir -p /opt/image /opt/valetkey".to_owned(),
            "mount -t tmpfs none /usr/local/share && mkdir /usr/local/share/ca-certificates"
                .to_owned(),
            format!("cp -a {}/feature {}/codex /opt/image", work.display(), work.display()),
            // While the image is built nothing is mounted.
            "sh /opt/image/feature/install.sh".to_owned(),
        ] {
            shell.type_ok(&command).await;
        }
        for mount in settings["mounts"].as_array().unwrap() {
            let fields: BTreeMap<&str, &str> = mount
                .as_str()
                .unwrap()
                .split(',')
                .filter_map(|field| field.split_once('='))
                .collect();
            let home = scene.home.path().to_str().unwrap();
            let source = PathBuf::from(fields["source"].replace("${localEnv:HOME}", home));
            let (source, target) = (source.display(), fields["target"]);
            shell.type_ok(&format!("mkdir -p {target} && mount --bind {source} {target}")).await;
        }
        shell.type_ok(&format!("mount -t tmpfs none {}", scene.home.path().display())).await;
        shell.type_ok("mount -t tmpfs none /root && cd /root && PATH=/opt/image:$PATH").await;
        shell.type_ok("/usr/local/share/valetkey/trust true").await;
        shell
    }

    /// Types a line; what is shown until the next prompt, and the status.
    async fn type_line(&mut self, line: &str) -> (String, i32) {
        // Nobody else reads what the shell reads.
        let typed =
            format!("{{ {line}\n}} </dev/null 2>&1; status=$?; echo; echo '{PROMPT}' $status\n");
        self.keys.write_all(typed.as_bytes()).await.unwrap();
        let mut shown = String::new();
        let reading = async {
            while let Some(line) = self.screen.next_line().await.unwrap() {
                if let Some(status) = line.strip_prefix(PROMPT) {
                    return status.trim().parse().unwrap();
                }
                shown.push_str(&line);
                shown.push('\n');
            }
            panic!("the shell has ended: {shown}");
        };
        let status =
            tokio::time::timeout(LIMIT, reading).await.expect("it took more than a minute");
        (shown, status)
    }

    /// Types a line that must succeed.
    async fn type_ok(&mut self, line: &str) -> String {
        let (shown, status) = self.type_line(line).await;
        assert_eq!(status, 0, "{line}\n{shown}");
        shown
    }
}

/// The path in which a program is found first.
fn path_with(program: &Path) -> String {
    format!("{}:{}", program.parent().unwrap().display(), std::env!("PATH"))
}
