//! The company's roots change under a running proxy.

use std::fs;

use valetkey::sandbox::client::{HTTP2, Visit};

use super::served::Serving;
use super::support::Scene;

const THINGS: (&str, &str) = ("api.example.com:443", "/v1/things");

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_bundle_counts_for_the_next_request() {
    let scene = Scene::usual().await;
    let (bundle, aside) = (scene.path("corp.pem"), scene.path("aside.pem"));
    let ca = scene.world.ca_file().display().to_string();
    scene.configure(&scene.world.upstream_toml().replace(&ca, bundle.to_str().unwrap()));
    // As an editor or a package does it: written aside, then renamed.
    let write = |text: &str| {
        fs::write(&aside, text).unwrap();
        fs::rename(&aside, &bundle).unwrap();
    };
    let another = fs::read_to_string(scene.world.company().ca_file()).unwrap();
    write(&another);
    let mut serving = Serving::start(&scene).await;
    let client = serving.client();
    let status = async || {
        let (target, path) = THINGS;
        let answer = client.get(Visit::to(target, HTTP2), path).await.unwrap();
        (answer.status().as_u16(), answer.headers().get("x-valetkey-error").cloned())
    };
    let untrusted = (502, Some("upstream_tls_untrusted".parse().unwrap()));
    assert_eq!(status().await, untrusted);

    write(scene.world.ca_pem());
    serving.hear("the roots have changed").await;
    assert_eq!(status().await, (200, None));

    // What cannot be used is said, with the block, and changes nothing.
    write(&scene.world.ca_pem().replace("-----END", "!-----END"));
    let said = serving.hear("stay in force").await;
    assert!(said.contains("corp.pem: block 1"), "{said}");
    assert_eq!(status().await, (200, None));

    // A connection that was verified under roots that are gone is not used again.
    write(&another);
    serving.hear("the roots have changed").await;
    assert_eq!(status().await, untrusted);
    assert_eq!(scene.world.api().seen().len(), 2);
}
