//! Language runtimes and package managers under `valetkey run`: each is signed in, and none holds a credential.

use std::fs;
use std::path::PathBuf;

use super::support::{Scene, option_env_now, packaged, program, python, python_with};

const THINGS: &str = "https://api.example.com/v1/things";

/// Both of Java's clients. There is a space in the path of its trust store.
#[tokio::test(flavor = "multi_thread")]
async fn java() {
    let Some(java) = program("java") else { return };
    let mut scene = Scene::usual().await;
    let spaced = scene.path("run time");
    scene.env.insert("XDG_RUNTIME_DIR".to_owned(), spaced.to_str().unwrap().to_owned());
    // A password for a store of one's own, and a property: both stay.
    let theirs = "-Djavax.net.ssl.trustStorePassword=changeit -Dtheirs='still here'";
    scene.env.insert("JAVA_TOOL_OPTIONS".to_owned(), theirs.to_owned());
    let source = r#"
import java.io.File;
import java.net.*;
import java.net.http.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.security.KeyStore;

class Fetch {
    public static void main(String[] arguments) throws Exception {
        URI uri = URI.create(arguments[0]);
        HttpRequest request = HttpRequest.newBuilder(uri).build();
        HttpResponse<String> answer =
            HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.version() + " " + answer.body());
        HttpURLConnection connection = (HttpURLConnection) uri.toURL().openConnection();
        System.out.println(new String(connection.getInputStream().readAllBytes(), StandardCharsets.UTF_8));
        File trusted = new File(System.getProperty("javax.net.ssl.trustStore"));
        String roots = Files.readString(Path.of(System.getenv("SSL_CERT_FILE")));
        int count = roots.split("BEGIN CERTIFICATE").length - 1;
        int size = KeyStore.getInstance(trusted, (char[]) null).size();
        System.out.println(size == count ? "the same roots" : size + " of " + count + " roots");
        System.out.println(System.getProperty("theirs"));
    }
}
"#;
    fs::write(scene.path("Fetch.java"), source).unwrap();
    let done = scene.run_ok(&[&java, "Fetch.java", THINGS]).await;
    assert_eq!(done.out.matches("present and current").count(), 2, "{done:?}");
    assert!(
        done.out.contains("HTTP_2 ") && done.out.ends_with("the same roots\nstill here\n"),
        "{done:?}"
    );
    assert_eq!(scene.seen_signed_in().len(), 2);
}

/// Hosts of `NO_PROXY` are reached past the proxy, which Java is told in words of its own.
#[tokio::test(flavor = "multi_thread")]
async fn java_goes_past_the_proxy_where_everybody_does() {
    let Some(java) = program("java") else { return };
    let scene = Scene::usual().await.with("NO_PROXY", "api.example.com,10.0.0.0/8");
    let source = r#"
import java.net.*;

class Past {
    public static void main(String[] arguments) throws Exception {
        for (String url : arguments) {
            System.out.println(ProxySelector.getDefault().select(URI.create(url)).get(0).type());
        }
    }
}
"#;
    fs::write(scene.path("Past.java"), source).unwrap();
    let past = ["https://api.example.com/", "https://a.api.example.com/", "https://10.1.2.3/"];
    let through = ["https://other.example.com/", "https://11.1.2.3/"];
    let local = ["https://localhost/", "https://[::1]/", "https://127.0.0.1/"];
    let done = scene.run_ok(&[&[&*java, "Past.java"][..], &past, &through, &local].concat()).await;
    let direct = "DIRECT\n".repeat(3);
    assert_eq!(done.out, format!("{direct}HTTP\nHTTP\n{direct}"));
}

/// As Python verifies since 3.13, which wants more of every certificate than RFC 5280 was taken at its word for before.
#[tokio::test(flavor = "multi_thread")]
async fn python_with_strict_checks() {
    let Some(python) = python_since_3_13().or_else(python) else { return };
    let scene = Scene::usual().await;
    let script = r#"
import ssl, sys, urllib.request
strict = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
context = ssl.create_default_context()
if sys.version_info < (3, 13):
    context.verify_flags |= strict
assert context.verify_flags & strict == strict
print(urllib.request.urlopen(sys.argv[1], context=context).read().decode())
"#;
    let done = scene.run_ok(&[&python, "-c", script, THINGS]).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    scene.seen_signed_in();
}

/// Python 3.13 or newer, if there is one: a distribution has one Python, which may be older.
fn python_since_3_13() -> Option<String> {
    let home = option_env_now("HOME").unwrap_or_default();
    let pyenv = fs::read_dir(format!("{home}/.pyenv/versions")).into_iter().flatten().flatten();
    let of_pyenv = pyenv.map(|entry| entry.path().join("bin/python3"));
    let of_system = std::env::split_paths(env!("PATH")).map(|dir| dir.join("python3"));
    let is_new = |python: &PathBuf| {
        let mut command = std::process::Command::new(python);
        command.args(["-c", "import sys; sys.exit(sys.version_info < (3, 13))"]);
        command.status().is_ok_and(|status| status.success())
    };
    let found = of_pyenv.chain(of_system).filter(|path| path.exists()).find(is_new);
    if found.is_none() {
        println!("no Python 3.13 is here: an older one with the same checks switched on");
    }
    Some(found?.to_str().unwrap().to_owned())
}

/// A package from behind a sign-in, which is fetched by its URL.
#[tokio::test(flavor = "multi_thread")]
async fn pip_and_uv() {
    let (Some(python), Some(uv)) = (python(), packaged("uv")) else { return };
    let scene = Scene::usual().await;
    fs::create_dir_all(scene.path(".config/pip")).unwrap();
    fs::write(scene.path(".config/pip/pip.conf"), "[global]\nproxy = http://127.0.0.1:9\n")
        .unwrap();
    let wheel = "hello-1.0-py3-none-any.whl";
    let make = r#"
import sys, zipfile
about = "hello-1.0.dist-info/"
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    wheel.writestr("hello.py", "print('hello')\n")
    wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: hello\nVersion: 1.0\n")
    wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(about + "RECORD", "".join(name + ",,\n" for name in wheel.namelist()))
"#;
    fs::create_dir(scene.path("served")).unwrap();
    scene.prepare(&python, &["-c", make, &format!("served/{wheel}")]).await;
    scene.world.api().serve_dir("/v1/wheels/", scene.path("served"));
    let url = format!("https://api.example.com/v1/wheels/{wheel}");
    let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", "by-pip", &url];
    scene.run_ok(&[&[&*python][..], &pip].concat()).await;
    let by_uv = ["pip", "install", "--quiet", "--no-deps", "--python", &python];
    scene.run_ok(&[&[&*uv][..], &by_uv, &["--target", "by-uv", &url]].concat()).await;
    for target in ["by-pip", "by-uv"] {
        let installed = fs::read_to_string(scene.path(target).join("hello.py")).unwrap();
        assert_eq!(installed, "print('hello')\n", "{target}");
    }
    scene.seen_signed_in();
}

/// A package from a registry that wants a sign-in, past the proxy that `.npmrc` names.
#[tokio::test(flavor = "multi_thread")]
async fn npm_and_pnpm() {
    let (Some(npm), Some(pnpm), Some(python)) = (program("npm"), packaged("pnpm"), python()) else {
        return;
    };
    let scene = Scene::usual().await;
    fs::write(
        scene.path(".npmrc"),
        "https-proxy=http://127.0.0.1:9/\naudit=false\nupdate-notifier=false\n",
    )
    .unwrap();
    let make = r#"
import io, json, os, tarfile
os.mkdir("served")
manifest = {"name": "hello", "version": "1.0.0"}
with tarfile.open("served/hello.tgz", "w:gz") as archive:
    content = json.dumps(manifest).encode()
    entry = tarfile.TarInfo("package/package.json")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
manifest["dist"] = {"tarball": "https://api.example.com/v1/npm/hello.tgz"}
packument = {"name": "hello", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": manifest}}
open("served/hello", "w").write(json.dumps(packument))
"#;
    scene.prepare(&python, &["-c", make]).await;
    scene.world.api().serve_dir("/v1/npm/", scene.path("served"));
    for (program, add, folder) in [(npm, "install", "by-npm"), (pnpm, "add", "by-pnpm")] {
        fs::create_dir(scene.path(folder)).unwrap();
        fs::write(scene.path(folder).join("package.json"), "{}").unwrap();
        let script = "cd \"$0\" && exec \"$@\" --registry=https://api.example.com/v1/npm/ hello";
        let done = scene.run_ok(&["sh", "-c", script, folder, &program, add]).await;
        let installed = scene.path(folder).join("node_modules/hello/package.json");
        assert!(installed.exists(), "{done:?}");
        assert!(scene.seen_signed_in().len() >= 2);
        scene.world.api().clear();
    }
}

/// The index of a registry that wants a sign-in, past the proxy that cargo's configuration names.
#[tokio::test(flavor = "multi_thread")]
async fn cargo() {
    let scene = Scene::usual().await;
    let served = scene.path("served/he/ll");
    fs::create_dir_all(&served).unwrap();
    let index = "https://api.example.com/v1/index/";
    fs::write(scene.path("served/config.json"), format!(r#"{{"dl":"{index}dl"}}"#)).unwrap();
    let checksum = "0".repeat(64);
    let line = format!(
        r#"{{"name":"hello","vers":"1.2.3","deps":[],"features":{{}},"yanked":false,"cksum":"{checksum}"}}"#
    );
    fs::write(served.join("hello"), line + "\n").unwrap();
    scene.world.api().serve_dir("/v1/index/", scene.path("served"));
    let files = [
        (
            ".cargo/config.toml",
            format!(
                "[http]\nproxy = \"http://127.0.0.1:9\"\n[registries.sandbox]\nindex = \"sparse+{index}\"\n"
            ),
        ),
        (
            "Cargo.toml",
            "[package]\nname = \"it\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\
            [dependencies]\nhello = { version = \"1\", registry = \"sandbox\" }\n"
                .to_owned(),
        ),
        ("src/lib.rs", String::new()),
    ];
    for (name, content) in files {
        fs::create_dir_all(scene.path(name).parent().unwrap()).unwrap();
        fs::write(scene.path(name), content).unwrap();
    }
    scene.run_ok(&[env!("CARGO"), "generate-lockfile"]).await;
    assert!(fs::read_to_string(scene.path("Cargo.lock")).unwrap().contains("1.2.3"));
    scene.seen_signed_in();
}

/// The `go` tool itself fetches as Go programs do.
#[tokio::test(flavor = "multi_thread")]
async fn go() {
    let Some(go) = program("go") else { return };
    let scene = Scene::usual().await.with("GOPROXY", "https://api.example.com/v1/go");
    let scene = scene.with("GOSUMDB", "off");
    let served = scene.path("served/example.org/hello/@v");
    fs::create_dir_all(&served).unwrap();
    let files = [
        ("list", "v1.2.3\n"),
        ("v1.2.3.info", r#"{"Version":"v1.2.3","Time":"2024-01-01T00:00:00Z"}"#),
        ("v1.2.3.mod", "module example.org/hello\n"),
    ];
    for (name, content) in files {
        fs::write(served.join(name), content).unwrap();
    }
    scene.world.api().serve_dir("/v1/go/", scene.path("served"));
    let done = scene.run_ok(&[&go, "list", "-m", "-versions", "example.org/hello"]).await;
    assert_eq!(done.out, "example.org/hello v1.2.3\n");
    scene.seen_signed_in();
}

/// `Net::HTTP` by itself looks for a proxy in the variable of plain HTTP alone, whatever it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn ruby() {
    let Some(ruby) = program("ruby") else { return };
    let scene = Scene::usual().await;
    let script = "require 'open-uri'; puts URI(ARGV[0]).read";
    let done = scene.run_ok(&[&ruby, "-e", script, THINGS]).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    let script = "http_proxy=\"$https_proxy\" exec \"$0\" -rnet/http -e 'puts Net::HTTP.get(URI(ARGV[0]))' \"$1\"";
    let done = scene.run_ok(&["sh", "-c", script, &ruby, THINGS]).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    assert_eq!(scene.seen_signed_in().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn deno() {
    let Some(deno) = packaged("deno") else { return };
    let scene = Scene::usual().await.with("DENO_NO_UPDATE_CHECK", "1");
    let script = r#"
const base = "https://chatgpt.com/backend-api/codex";
console.log(await (await fetch(base + "/models")).text());
const events = await (await fetch(base + "/sse?n=3&every_ms=10")).text();
console.log(events.split("event: tick").length - 1);
"#;
    let done = scene.run_ok(&[&deno, "eval", script]).await;
    assert!(done.out.contains("present and current") && done.out.ends_with("\n3\n"), "{done:?}");
    scene.seen_signed_in();
}

/// What the `aws` command is made of. Its own signature, by a key that is worth nothing, does not get out.
#[tokio::test(flavor = "multi_thread")]
async fn botocore() {
    let Some(python) = python_with("botocore") else { return };
    let scene = Scene::usual().await.with("AWS_ACCESS_KEY_ID", "worthless");
    let scene = scene.with("AWS_SECRET_ACCESS_KEY", "worthless too");
    let script = r#"
from botocore.session import get_session
client = get_session().create_client("s3", "eu-west-1", endpoint_url="https://api.example.com/v1")
print(client.get_object(Bucket="bucket", Key="thing")["Body"].read().decode())
"#;
    let done = scene.run_ok(&[&python, "-c", script]).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    scene.seen_signed_in();
}

/// Node's own clients, without a package: of a version that reads `NODE_USE_ENV_PROXY`.
#[tokio::test(flavor = "multi_thread")]
async fn node_without_undici() {
    let Some(node) = packaged("node") else { return };
    let scene = Scene::usual().await;
    let script = r#"
const base = "https://chatgpt.com/backend-api/codex";
const get = (url) => new Promise((resolve, reject) => require("https").get(url, (answer) => {
  let text = "";
  answer.on("data", (part) => { text += part; }).on("end", () => resolve(text));
}).on("error", reject));
const echo = (text) => new Promise((resolve, reject) => {
  const socket = new WebSocket(base.replace("https", "wss") + "/ws");
  socket.onopen = () => socket.send(text);
  socket.onmessage = (message) => { resolve(message.data); socket.close(); };
  socket.onerror = reject;
});
(async () => {
  console.log(await (await fetch(base + "/models")).text());
  console.log(await get(base + "/models"));
  console.log(await echo("echoed"));
})().catch((error) => { console.error(error); process.exit(1); });
"#;
    let done = scene.run_ok(&[&node, "-e", script]).await;
    assert_eq!(done.out.matches("present and current").count(), 2, "{done:?}");
    assert!(done.out.ends_with("\nechoed\n"), "{done:?}");
    assert_eq!(scene.seen_signed_in().len(), 3);
}
