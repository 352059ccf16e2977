//! A running proxy goes by what is written now, and cuts nobody off for it.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;

use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use rustix::process::Signal;
use tokio_tungstenite::tungstenite::Message;
use valetkey::sandbox::client::{self, HTTP1, HTTP2, Visit, gather};
use valetkey::sandbox::{OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET};
use valetkey::secret::Secret;

use super::served::Serving;
use super::support::{KEY, LIMIT, Scene, done};

const EXAMPLE: &str = "api.example.com:443";
const OTHER: &str = "other.example.com:443";
const CHATGPT: &str = "chatgpt.com:443";

/// A rule that signs in on a host that had none.
const OTHER_RULE: &str = "[[rules]]\nhost = \"other.example.com\"\ncredential = \"example\"\n";

const READ: &str = "was read again and is in force";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_counts_and_who_is_in_stays_in() {
    // Its token has expired, so that a second source of the same login would be seen at the issuer.
    let scene = Scene::new(time::Duration::minutes(-1)).await;
    scene.world.api().require_login(false);
    let mut serving = Serving::start(&scene).await;
    let client = serving.client_in(&scene);
    let get = async |target: &str, path: &str| client.get(Visit::to(target, HTTP1), path).await;
    assert_eq!(get(CHATGPT, "/backend-api/codex/models").await.unwrap().status(), 200);

    // An API that rejects every token causes one refresh, and then none for a while.
    let rejected = "/backend-api/codex/always-401";
    for _ in 0..2 {
        assert_eq!(get(CHATGPT, rejected).await.unwrap().status(), 401);
        assert_eq!(scene.world.issuer().refreshes(), 2);
    }

    // One of each that is under way.
    let tls = client.greet(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let url = "wss://chatgpt.com/backend-api/codex/ws";
    let (mut socket, _) = Box::pin(tokio_tungstenite::client_async(url, tls)).await.unwrap();
    let mut stream = client.open(Visit::to(CHATGPT, HTTP2)).await.unwrap();
    let events = stream.send(client::get("/backend-api/codex/sse?n=2")).await.unwrap();
    let mut tunnel = client.open(Visit::to(OTHER, HTTP1)).await.unwrap();
    assert_eq!(tunnel.get("/v1/x").await.unwrap().status(), 200);
    scene.world.api().clear();

    scene.configure(&format!("{OTHER_RULE}{}", scene.world.upstream_toml()));
    serving.hear("there is a new root").await;
    serving.hear(READ).await;
    let client = serving.client_in(&scene);
    let get = async |target: &str, path: &str| client.get(Visit::to(target, HTTP1), path).await;
    assert_eq!(get(OTHER, "/v1/x").await.unwrap().status(), 200);
    let seen = scene.world.api().seen();
    assert_eq!(seen[0].headers["authorization"], format!("Bearer {KEY}"), "the new rule signs in");

    // All goes on, and the login was taken over.
    socket.send(Message::text("still here")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("still here"));
    scene.world.api().release_event();
    assert!(!events.into_body().collect().await.unwrap().to_bytes().is_empty());
    let old = tunnel.get("/v1/x").await.unwrap();
    assert_eq!(old.status(), 200, "a tunnel stays one");
    assert!(!scene.world.api().seen().last().unwrap().headers.contains_key("authorization"));
    assert_eq!(get(CHATGPT, "/backend-api/codex/models").await.unwrap().status(), 200);
    assert_eq!(stream.get("/backend-api/codex/models").await.unwrap().status(), 200);
    assert_eq!(get(CHATGPT, rejected).await.unwrap().status(), 401);
    assert_eq!(scene.world.issuer().refreshes(), 2, "what was learned is not forgotten");

    // What is wrong is refused with its line, and what was in force stays so.
    scene.configure("[[rules]]\nhost = 7\n");
    serving.hear("expected a string, found an integer").await;
    serving.hear("from before stays in force").await;
    assert_eq!(get(OTHER, "/v1/x").await.unwrap().status(), 200);
    assert_eq!(get(CHATGPT, "/backend-api/codex/models").await.unwrap().status(), 200);

    // A rule that is gone counts no more, in connections that were opened under it too.
    let mut ruled = client.open(Visit::to(OTHER, HTTP2)).await.unwrap();
    scene.configure(&scene.world.upstream_toml());
    serving.hear(READ).await;
    scene.world.api().clear();
    assert_eq!(ruled.get("/v1/x").await.unwrap().status(), 200);
    assert!(!scene.world.api().seen()[0].headers.contains_key("authorization"));

    // Nor does a host that is refused now, for who is in.
    let mut ruled = client.open(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
    assert_eq!(ruled.get("/v1/x").await.unwrap().status(), 200);
    let refusing = format!("default = \"refuse\"\n{}", scene.world.upstream_toml());
    fs::write(scene.path(".config/valetkey/config.toml"), refusing).unwrap();
    serving.hear(READ).await;
    scene.world.api().clear();
    assert_eq!(ruled.get("/v1/x").await.unwrap().status(), 403);
    assert!(scene.world.api().seen().is_empty());
    socket.close(None).await.unwrap();
    serving.signal(Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
}

/// What is kept in memory alone is taken over, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_nobody_keeps_is_not_made_again() {
    let scene = Scene::usual().await;
    fs::write(scene.path("client.secret"), OAUTH_CLIENT_SECRET).unwrap();
    let machine = format!(
        "[credentials.machine]\nkind = \"oauth\"\nissuer = \"https://login.example.com\"\n\
         client_id = \"{OAUTH_CLIENT_ID}\"\nclient_secret = \"file:{}\"\ngrant = \"client_credentials\"\n\
         [[rules]]\nhost = \"other.example.com\"\ncredential = \"machine\"\n",
        scene.path("client.secret").display()
    );
    scene.configure(&format!("{machine}{}", scene.world.upstream_toml()));
    let mut serving = Serving::start(&scene).await;
    let client = serving.client();
    let get = async || client.get(Visit::to(OTHER, HTTP1), "/v1/x").await.unwrap().status();
    assert_eq!(get().await, 200);
    let narrower = format!("{machine}methods = [\"GET\"]\n{}", scene.world.upstream_toml());
    scene.configure(&narrower);
    serving.hear(READ).await;
    assert_eq!(get().await, 200);
    assert_eq!(scene.world.issuer().grants("client_credentials"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reads_keys_and_roots_again() {
    let scene = Scene::usual().await;
    let key = scene.path("key");
    fs::write(&key, KEY).unwrap();
    let rule = format!(
        "[credentials.kept]\nkind = \"api_key\"\nsource = \"file:{}\"\n[[rules]]\n\
         host = \"other.example.com\"\ncredential = \"kept\"\n{}",
        key.display(),
        scene.world.upstream_toml()
    );
    scene.configure(&rule);
    let mut serving = Serving::start(&scene).await;
    let client = serving.client();
    assert_eq!(client.get(Visit::to(OTHER, HTTP1), "/v1/x").await.unwrap().status(), 200);
    let newer = "vk-canary-another-key";
    scene.world.api().accept(Secret::new(newer));
    fs::write(&key, newer).unwrap();
    serving.signal(Signal::HUP);
    serving.hear(READ).await;
    scene.world.api().clear();
    assert_eq!(client.get(Visit::to(OTHER, HTTP1), "/v1/x").await.unwrap().status(), 200);
    let seen = scene.world.api().seen();
    assert_eq!(seen.len(), 1, "without a 401 before");
    assert_eq!(seen[0].headers["authorization"], format!("Bearer {newer}"));

    // A bundle that cannot be used: nothing is reached by half of a configuration.
    let bundle = scene.path("bundle.pem");
    fs::write(&bundle, "no certificate").unwrap();
    let (before, broken) = (scene.world.upstream_toml(), scene.world.ca_file().to_str().unwrap());
    scene.configure(&rule.replace(broken, bundle.to_str().unwrap()));
    serving.hear("from before stays in force").await;
    assert_eq!(client.get(Visit::to(OTHER, HTTP1), "/v1/x").await.unwrap().status(), 200);
    // And one that can: with it, connections of before are not used any more.
    fs::copy(scene.world.ca_file(), &bundle).unwrap();
    serving.signal(Signal::HUP);
    serving.hear(READ).await;
    let connections = scene.world.connections();
    assert_eq!(client.get(Visit::to(OTHER, HTTP1), "/v1/x").await.unwrap().status(), 200);
    assert!(scene.world.connections() > connections, "{before}");
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_come_and_go() {
    let scene = Scene::usual().await;
    let upstream = scene.world.upstream_toml();
    let socket = scene.path("sockets/proxy.sock");
    let tcp = "[[listeners]]\naddress = \"127.0.0.1:0\"\n";
    let unix = format!("[[listeners]]\naddress = \"unix:{}\"\n", socket.display());
    scene.configure(&format!("{tcp}{upstream}"));
    let mut serving = Serving::start_with(&scene, &[]).await;
    let client = serving.client();
    let mut kept = client.open(Visit::to(EXAMPLE, HTTP2)).await.unwrap();
    assert_eq!(kept.get("/v1/x").await.unwrap().status(), 200);

    scene.configure(&format!("{tcp}{unix}{upstream}"));
    serving.hear(socket.to_str().unwrap()).await;
    serving.hear(READ).await;
    assert!(socket.exists());
    assert_eq!(client.get(Visit::to(EXAMPLE, HTTP1), "/v1/x").await.unwrap().status(), 200);

    // Its conditions change without it being closed.
    scene.configure(&format!("{tcp}require_pass = true\n{unix}{upstream}"));
    serving.hear(READ).await;
    let refused = client.tunnel(EXAMPLE).await.unwrap_err();
    assert!(refused.to_string().contains("407"), "{refused}");
    assert_eq!(kept.get("/v1/x").await.unwrap().status(), 200, "who is in stays in");

    scene.configure(&format!("{unix}{upstream}"));
    serving.hear("no longer listening on http://127.0.0.1").await;
    serving.hear(READ).await;
    assert!(client.tunnel(EXAMPLE).await.is_err());
    assert_eq!(kept.get("/v1/x").await.unwrap().status(), 200, "who is in stays in");
    let status = done(scene.valetkey(&["status", "--json"]).spawn().unwrap()).await;
    assert!(status.out.contains(&format!("unix:{}", socket.display())), "{status:?}");

    // One that cannot be had leaves all as it is.
    scene.configure(&format!("[[listeners]]\naddress = \"0.0.0.0:0\"\n{upstream}"));
    serving.hear("from before stays in force").await;
    assert!(socket.exists());
    serving.signal(Signal::TERM);
    assert_eq!(serving.ended().await, Some(0));
    assert!(!socket.exists());
}

/// The first signal lets what is under way end, the second one ends it.
#[tokio::test(flavor = "multi_thread")]
async fn it_drains_and_a_second_signal_ends_it() {
    for is_impatient in [false, true] {
        let scene = Scene::usual().await;
        let mut serving = Serving::start(&scene).await;
        let mut connection = serving.client().open(Visit::to(CHATGPT, HTTP1)).await.unwrap();
        let events = connection.send(client::get("/backend-api/codex/sse?n=2")).await.unwrap();
        serving.signal(Signal::TERM);
        serving.hear("a second signal ends it at once").await;
        // It says so and then does so.
        let nobody_new = async {
            while serving.client().tunnel(CHATGPT).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, nobody_new).await.expect("nobody new is let in");
        if is_impatient {
            serving.signal(Signal::TERM);
            assert_eq!(serving.ended().await, Some(0));
            assert!(gather(events).await.is_err(), "the stream breaks off");
        } else {
            scene.world.api().release_event();
            let events = gather(events).await.unwrap();
            assert!(!events.body().is_empty());
            assert_eq!(serving.ended().await, Some(0));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_one_does_not_hide_the_first() {
    let scene = Scene::usual().await;
    let found = async || {
        let status = done(scene.valetkey(&["status", "--json"]).spawn().unwrap()).await;
        let status: serde_json::Value = serde_json::from_str(&status.out).unwrap();
        status["proxy"]["url"].as_str().map(str::to_owned)
    };
    let first = Serving::start(&scene).await;
    let url = |serving: &Serving| Some(format!("http://{}", serving.address));
    assert_eq!(found().await, url(&first));
    let mut second = Serving::start(&scene).await;
    second.signal(Signal::TERM);
    assert_eq!(second.ended().await, Some(0));
    assert_eq!(found().await, url(&first));
}

/// One that leaves word in a file of its own, too, where the usual one is taken.
async fn second(scene: &Scene) -> Serving {
    let info = scene.path("second.json");
    let to = ["--server-info", info.to_str().unwrap()];
    let arguments = [&["serve", "--listen", "127.0.0.1:0"], &to[..]].concat();
    Serving::started(scene.valetkey(&arguments), info).await
}

/// Whoever reads the roots meanwhile finds them, and not the half of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_file_of_roots_is_replaced_whole_and_only_when_it_changes() {
    let scene = Scene::usual().await;
    let first = Serving::start(&scene).await;
    let inode = || fs::metadata(&first.ca).unwrap().ino();
    let (was, roots) = (inode(), fs::read(&first.ca).unwrap());
    drop(second(&scene).await);
    assert_eq!(inode(), was);
    fs::write(&first.ca, "of another time").unwrap();
    let mut open = fs::File::open(&first.ca).unwrap();
    drop(second(&scene).await);
    let mut read = String::new();
    open.read_to_string(&mut read).unwrap();
    assert_eq!(read, "of another time");
    assert!(inode() != was && fs::read(&first.ca).unwrap() == roots);
}

/// What is not heard of is looked for each fifteen seconds, and that there is another keeps nobody from looking.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_one_follows_its_configuration_too() {
    let scene = Scene::usual().await;
    let _first = Serving::start(&scene).await;
    let (place, away) = (scene.path(".config/valetkey"), scene.path("away"));
    fs::rename(&place, &away).unwrap();
    let mut second = second(&scene).await;
    fs::rename(&away, &place).unwrap();
    second.hear("is in force").await;
}

/// While it lets what is under way end, nobody is led to it.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_ends_gives_its_place_up_at_once() {
    let scene = Scene::usual().await;
    let mut first = Serving::start(&scene).await;
    let mut connection = first.client().open(Visit::to(CHATGPT, HTTP1)).await.unwrap();
    let events = connection.send(client::get("/backend-api/codex/sse?n=2")).await.unwrap();
    let mut second = second(&scene).await;
    first.signal(Signal::TERM);
    second.hear("find this one now").await;
    scene.world.api().release_event();
    assert!(!gather(events).await.expect("it still runs").body().is_empty());
    assert_eq!(first.ended().await, Some(0));
}

/// The folder of a session may be tidied away under it.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_folder_that_is_gone_is_made_again() {
    let scene = Scene::usual().await;
    let mut serving = Serving::start(&scene).await;
    fs::remove_dir_all(serving.ca.parent().unwrap()).unwrap();
    scene.configure(&format!("{OTHER_RULE}{}", scene.world.upstream_toml()));
    serving.hear(READ).await;
    let env = done(scene.valetkey(&["env"]).spawn().unwrap()).await;
    assert!(env.out.contains(&format!("http://{}", serving.address)), "{env:?}");
}

/// However the first ends: here it has no time to tidy up.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_one_is_found_once_the_first_has_ended() {
    let scene = Scene::usual().await;
    let mut first = Serving::start(&scene).await;
    let mut second = second(&scene).await;
    let roots = fs::read(&second.ca).unwrap();
    fs::write(&second.ca, "those of the first, which was reloaded").unwrap();
    first.signal(Signal::KILL);
    first.ended().await;
    second.hear("find this one now").await;
    assert_eq!(fs::read(&second.ca).unwrap(), roots);
    let env = done(scene.valetkey(&["env"]).spawn().unwrap()).await;
    assert!(env.out.contains(&format!("http://{}", second.address)), "{env:?}");
}
