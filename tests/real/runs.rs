//! Programs that run at the same time, each behind a proxy of its own, and with `--ephemeral-ca` behind a local CA of
//! its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use valetkey::secret::Fingerprint;
use valetkey::tls::ca::Root;

use super::support::{Done, Scene, done, program};

/// A `valetkey run` whose program fetches a page for every line that it reads.
struct Running {
    child: Child,
    stdin: ChildStdin,
    out: Lines<BufReader<ChildStdout>>,
    proxy: String,
    /// What the program adds to its roots.
    added: PathBuf,
}

impl Running {
    async fn start(scene: &Scene, curl: &str, options: &[&str]) -> Self {
        let script = format!(
            "echo \"$HTTPS_PROXY\"; echo \"$NODE_EXTRA_CA_CERTS\"; while read -r path; do \
             '{curl}' -sS --fail -o /dev/null \"https://api.example.com$path\" && echo fetched; done"
        );
        let run = [&["run"], options, &["--", "sh", "-c", &script]].concat();
        let mut child = scene.valetkey(&run).stdin(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let proxy = out.next_line().await.unwrap().unwrap();
        let added = out.next_line().await.unwrap().unwrap().into();
        Self { child, stdin, out, proxy, added }
    }

    fn folder(&self) -> &Path {
        self.added.parent().unwrap()
    }

    fn roots(&self) -> Vec<Fingerprint> {
        let roots = Root::among(&fs::read(&self.added).unwrap());
        roots.iter().map(Root::fingerprint).collect()
    }

    async fn fetch(&mut self) {
        self.stdin.write_all(b"/v1/things\n").await.unwrap();
        assert_eq!(self.out.next_line().await.unwrap().as_deref(), Some("fetched"));
    }

    async fn end(self) -> Done {
        drop(self.stdin);
        done(self.child).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_ends_takes_nothing_of_another() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let start = || Running::start(&scene, &curl, &[]);
    let (first, mut second, mut third) = tokio::join!(start(), start(), start());
    let mut proxies = [&first.proxy, &second.proxy, &third.proxy];
    proxies.sort();
    assert!(proxies.windows(2).all(|pair| pair[0] != pair[1]), "{proxies:?}");
    assert_eq!(first.roots(), second.roots(), "one local CA is kept for all");

    let of_first = first.folder().to_owned();
    assert_eq!(first.end().await.status, 0);
    assert!(!of_first.exists());
    second.fetch().await;
    third.fetch().await;

    let of_second = second.folder().to_owned();
    second.child.start_kill().unwrap();
    second.end().await;
    assert!(of_second.exists(), "nobody has tidied up yet");
    let mut fourth = Running::start(&scene, &curl, &[]).await;
    assert!(!of_second.exists(), "the next one does");
    third.fetch().await;
    fourth.fetch().await;
    assert_eq!((third.end().await.status, fourth.end().await.status), (0, 0));
    assert_eq!(scene.seen_signed_in().len(), 4);
    assert_eq!(fs::read_dir(scene.path("run/valetkey")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_an_ephemeral_ca_are_written_nowhere() {
    let Some(curl) = program("curl") else { return };
    let scene = Scene::usual().await;
    let scene = scene.with("TMPDIR", "tmp");
    fs::create_dir(scene.path("tmp")).unwrap();
    let ca = scene.path(".local/share/valetkey/ca");
    let start = || Running::start(&scene, &curl, &["--ephemeral-ca"]);
    let (mut one, mut other) = tokio::join!(start(), start());
    one.fetch().await;
    other.fetch().await;
    let (roots, others) = (one.roots(), other.roots());
    assert_eq!((roots.len(), others.len()), (1, 1));
    assert_ne!(roots, others);
    assert_eq!(private_keys_below(scene.home.path()), [] as [PathBuf; 0]);
    assert!(!ca.exists());
    assert_eq!((one.end().await.status, other.end().await.status), (0, 0));
    assert_eq!(private_keys_below(scene.home.path()), [] as [PathBuf; 0]);
    assert_eq!(fs::read_dir(scene.path("run/valetkey")).unwrap().count(), 0);

    // What is kept is not even read: a folder that would be refused does not matter.
    scene.run_ok(&["true"]).await;
    let kept = private_keys_below(scene.home.path());
    assert!(
        kept.len() == 1 && kept[0].starts_with(&ca),
        "the search finds what is there: {kept:?}"
    );
    fs::write(ca.join("root-1.pem"), "nonsense").unwrap();
    assert_eq!(scene.run(&["true"]).await.status, 1);
    let mut again = Running::start(&scene, &curl, &["--ephemeral-ca"]).await;
    again.fetch().await;
    assert_eq!(again.end().await.status, 0);
}

/// The files that hold a private key, in PEM form or as its bytes.
fn private_keys_below(dir: &Path) -> Vec<PathBuf> {
    /// How the bytes of an EC key in PKCS #8 form begin, behind the length (RFC 5208): version 0, then the algorithm.
    const PKCS8: &[u8] = b"\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01";
    let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|it| it == part);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(private_keys_below(&path));
        } else if let Ok(bytes) = fs::read(&path)
            && (holds(&bytes, b"PRIVATE KEY") || holds(&bytes, PKCS8))
        {
            found.push(path);
        }
    }
    found
}
