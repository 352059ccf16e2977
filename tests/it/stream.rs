//! Bytes flow: bodies both ways, in every pair of protocols, neither held back nor changed.

use http::Method;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Visit, gather};

use super::support::{EXAMPLE, Options, Scene, within};

#[tokio::test(flavor = "multi_thread")]
async fn heads_without_a_body() {
    let scene = Scene::usual().await;
    let straight = Client::straight_to(scene.world.resolve()[0].1, scene.world.ca_file()).unwrap();
    for client in [&straight, &scene.client] {
        for alpn in [HTTP1, HTTP2] {
            let mut request = client::get("/v1/bytes/12345");
            *request.method_mut() = Method::HEAD;
            let answer = within(client.send(Visit::to(EXAMPLE, alpn), request)).await.unwrap();
            println!("{:?}", answer);
            let answer = within(gather(answer)).await.unwrap();
            assert_eq!(answer.status(), 200);
            assert!(answer.body().is_empty());
        }
    }
}
