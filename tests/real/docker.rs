//! What `env --shell docker` and `docker-build` print, as a shell reads it and as a container would see it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::served::Serving;
use super::support::{Done, Scene, done, program};

const THINGS: &str = "https://api.example.com/v1/things";

/// The words that a shell makes of what is printed, and what is said beside it.
async fn words(scene: &Scene, arguments: &[&str]) -> (Vec<String>, String) {
    let printed = scene.typed(&[&["env"], arguments].concat()).await;
    assert_eq!(printed.status, 0, "{printed:?}");
    let mut shell = Command::new("sh");
    let script = format!("eval \"set -- {}\"; printf '%s\\0' \"$@\"", "$PRINTED");
    shell.args(["-c", &script]).env("PRINTED", printed.out.trim_end());
    let read = done(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await;
    let words = read.out.split_terminator('\0').map(str::to_owned).collect();
    (words, printed.err)
}

/// The values of one option.
fn values<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
    let pairs = words.chunks(2).filter(|pair| pair[0] == option);
    pairs.map(|pair| pair[1].as_str()).collect()
}

/// A program that sees of this machine no more than a container would: the folder that is mounted, and the variables.
async fn contained(unshare: &str, words: &[String], program: &[&str]) -> Option<Done> {
    let mount = values(words, "-v")[0].strip_suffix(":/run/valetkey:ro").unwrap().to_owned();
    let script = "mount --bind \"$0\" /mnt && mount -t tmpfs none /run && mkdir /run/valetkey && \
                  mount --bind /mnt /run/valetkey && mount -o remount,ro,bind /run/valetkey || exit 99; exec \"$@\"";
    let mut command = Command::new(unshare);
    command.args(["-m", "sh", "-c", script, &mount]).args(program).env_clear();
    for variable in values(words, "-e") {
        let (name, value) = variable.split_once('=').unwrap();
        command.env(name, value);
    }
    command.env("PATH", env!("PATH")).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let done = done(command.spawn().unwrap()).await;
    if done.status == 99 || done.err.contains("unshare failed") {
        println!("skipped: nothing may be mounted here: {}", done.err);
        return None;
    }
    Some(done)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_has_what_it_needs_and_nothing_else() {
    let (Some(curl), Some(wget)) = (program("curl"), program("wget")) else { return };
    let Some(unshare) = program("unshare") else { return };
    let scene = Scene::usual().await.with("JAVA_TOOL_OPTIONS", "-Dpassword=pa55");
    fs::write(scene.path(".wgetrc"), "http_password = pa55").unwrap();
    let own = scene.path("it's my own.pem");
    fs::write(&own, fs::read(scene.world.company().ca_file()).unwrap()).unwrap();
    let scene = scene.with("REQUESTS_CA_BUNDLE", &own);
    let serving = Serving::start(&scene).await;
    let (words, said) = words(&scene, &["--shell", "docker"]).await;
    assert!(said.contains("--network host") && said.contains("--proxy-url"), "{said}");
    assert_eq!(values(&words, "--add-host"), ["host.docker.internal:host-gateway"]);
    let proxy = format!("HTTPS_PROXY=http://{}", serving.address);
    assert!(values(&words, "-e").contains(&&*proxy), "{words:?}");
    let home = scene.home.path().to_str().unwrap();
    let variables = values(&words, "-e").join("\n");
    assert!(!variables.contains(home) && !variables.contains("pa55"), "{variables}");
    assert!(variables.contains("JAVA_TOOL_OPTIONS=-Dhttps.proxyHost="), "{variables}");

    let folder = scene.path("run/valetkey/docker");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(folder.parent().unwrap())), (0o755, 0o700));
    for file in fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path), 0o644, "{}", path.display());
        assert!(!String::from_utf8_lossy(&fs::read(&path).unwrap()).contains("pa55"));
    }
    let of_company =
        "for file in $REQUESTS_CA_BUNDLE $SSL_CERT_FILE; do grep -c BEGIN \"$file\"; done";
    let Some(counted) = contained(&unshare, &words, &["sh", "-c", of_company]).await else {
        return;
    };
    let counts: Vec<u32> = counted.out.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(counts[0], counts[1] + 1, "{counted:?}");
    for program in [&[&*curl, "-sS", "--fail", THINGS][..], &[&wget, "-qO-", THINGS]] {
        let done = contained(&unshare, &words, program).await.unwrap();
        assert!(done.out.contains("present and current"), "{program:?}: {done:?}");
    }
    assert_eq!(scene.seen_signed_in().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_gets_the_proxy_as_arguments_and_the_roots_as_a_secret() {
    let scene = Scene::usual().await.with("NO_PROXY", "corp.example");
    let serving = Serving::start(&scene).await;
    let proxy = "http://x:vk_pass'$(id)@proxy.example:3128";
    // `docker build` has no --user.
    let (_, said) = words(&scene, &["--shell", "docker-build"]).await;
    assert!(said.contains("allow_uids = [0]") && !said.contains("--user"), "{said}");
    let (words, said) = words(&scene, &["--shell", "docker-build", "--proxy-url", proxy]).await;
    assert_eq!(said, "", "this proxy is not on loopback");
    let no_proxy = "corp.example,localhost,127.0.0.1,::1";
    let proxies = ["HTTPS_PROXY", "https_proxy"].map(|name| format!("{name}={proxy}"));
    let past = ["NO_PROXY", "no_proxy"].map(|name| format!("{name}={no_proxy}"));
    let expected = [&proxies[0], &past[0], &proxies[1], &past[1]];
    assert_eq!(values(&words, "--build-arg"), expected);
    let secret = values(&words, "--secret")[0].strip_prefix("id=valetkey-ca,src=").unwrap();
    let own = fs::read_to_string(&serving.ca).unwrap();
    assert!(fs::read_to_string(secret).unwrap().contains(own.trim_end()));
}
