//! A clock that jumps while the proxy runs: serving goes on, and no jump is a storm of refreshes.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use valetkey::sandbox::client::{HTTP1, HTTP2, Visit};

use super::served::Serving;
use super::support::{Scene, done, program};

const CHATGPT: &str = "chatgpt.com:443";
const MODELS: &str = "/backend-api/codex/models";

/// A wall clock that a file turns, for programs that are started with its variables. The monotonic clock stays what it is,
/// as where a person or a time server sets the time.
struct Turned {
    file: PathBuf,
    variables: Vec<(&'static str, String)>,
}

impl Turned {
    /// Not turned yet; `None` where there is no faketime, or no curl to go by the same clock.
    fn in_scene(scene: &Scene) -> Option<Self> {
        let (faketime, _curl) = (program("faketime")?, program("curl")?);
        let shown =
            std::process::Command::new(faketime).args(["-f", "+0", "env"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let library = shown.lines().find_map(|line| line.strip_prefix("LD_PRELOAD=")).unwrap();
        let file = scene.path("clock");
        let on = || "1".to_owned();
        let variables = vec![
            ("LD_PRELOAD", library.to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap().to_owned()),
            ("FAKETIME_NO_CACHE", on()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", on()),
            ("DONT_FAKE_MONOTONIC", on()),
        ];
        let turned = Self { file, variables };
        turned.by("+0");
        Some(turned)
    }

    /// Turns it in one step.
    fn by(&self, how_far: &str) {
        let next = self.file.with_extension("next");
        fs::write(&next, how_far).unwrap();
        fs::rename(&next, &self.file).unwrap();
    }
}

/// A request by a program whose clock is turned as the proxy's is, as all are on one machine: its status.
async fn by_curl(serving: &Serving, turned: &Turned) -> String {
    let mut curl = tokio::process::Command::new(program("curl").unwrap());
    curl.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30"]);
    curl.arg("--cacert").arg(&serving.ca).args(["-x", &format!("http://{}", serving.address)]);
    curl.arg(format!("https://chatgpt.com{MODELS}")).env_clear().kill_on_drop(true);
    curl.envs(turned.variables.iter().map(|(name, value)| (name, value)));
    curl.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let done = done(curl.spawn().unwrap()).await;
    format!("{}{}", done.out, done.err)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_jumps_and_serving_goes_on() {
    let mut scene = Scene::usual().await;
    let Some(turned) = Turned::in_scene(&scene) else { return };
    let variables =
        turned.variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    scene.env.extend(variables);
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    let issuer = scene.world.issuer();
    // How far, and whether a client whose clock stands right can take a leaf of then.
    let jumps = [
        ("+0", true),
        ("-1h", true),
        ("+1h", true),
        ("-1h", true),
        ("+300d", false),
        ("+0", true),
        ("+300d", false),
        ("-1h", true),
        ("+0", true),
    ];
    let mut said = Vec::new();
    for (how_far, is_near) in jumps {
        turned.by(how_far);
        let before = issuer.posts();
        for alpn in [HTTP1, HTTP2].iter().cycle().take(10) {
            if is_near {
                let answer = client.get(Visit::to(CHATGPT, alpn), MODELS).await;
                assert_eq!(answer.expect(how_far).status(), 200, "{how_far}");
            }
        }
        assert_eq!(by_curl(&serving, &turned).await, "200", "{how_far}");
        // What goes on in the background has looked at the clock, too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let posts = issuer.posts() - before;
        assert!(posts <= 1, "{posts} posts after a jump to {how_far}");
        said.push(format!("{how_far}: {posts}"));
    }
    println!("refreshes after each jump: {}", said.join(", "));
    assert_eq!(issuer.reuses(), 0);
}

/// Everything has expired by then, our own root and the upstream's certificate too: that is said, to nobody's harm.
#[tokio::test(flavor = "multi_thread")]
async fn a_year_ahead_and_back() {
    let mut scene = Scene::usual().await;
    let Some(turned) = Turned::in_scene(&scene) else { return };
    let variables =
        turned.variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    scene.env.extend(variables);
    let serving = Serving::start(&scene).await;
    let client = serving.client();
    assert_eq!(client.get(Visit::to(CHATGPT, HTTP1), MODELS).await.unwrap().status(), 200);
    turned.by("+366d");
    for _ in 0..5 {
        let failed = by_curl(&serving, &turned).await;
        assert!(!failed.starts_with("200"), "{failed}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    turned.by("+0");
    for alpn in [HTTP1, HTTP2] {
        let answer = client.get(Visit::to(CHATGPT, alpn), MODELS).await;
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert_eq!(by_curl(&serving, &turned).await, "200");
    let issuer = scene.world.issuer();
    println!("{} posts in all", issuer.posts());
    assert!(issuer.posts() <= 2 && issuer.reuses() == 0, "{}", issuer.posts());
}
