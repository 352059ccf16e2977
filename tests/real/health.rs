//! `valetkey health`, of proxies and of others at their address.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::served::Serving;
use super::support::{Done, Scene};

async fn health(scene: &Scene, arguments: &[&str]) -> Done {
    scene.typed(&[&["health"], arguments].concat()).await
}

async fn health_of(scene: &Scene, info: &Path) -> Done {
    health(scene, &["--server-info", info.to_str().unwrap()]).await
}

#[expect(clippy::disallowed_methods, reason = "the test plays another program")]
#[tokio::test(flavor = "multi_thread")]
async fn is_asked_of_whoever_listens() {
    let scene = Scene::usual().await;
    let info = scene.path("info.json");
    let none = health(&scene, &[]).await;
    assert_eq!(none.status, 1, "{none:#?}");
    assert!(none.err.contains("error: no proxy is running\nhint: start one"), "{none:#?}");

    let serving = Serving::start(&scene).await;
    let well = health(&scene, &[]).await;
    assert_eq!(well.status, 0, "{well:#?}");
    assert!(well.out.starts_with(&format!("http://{} answers", serving.address)), "{well:#?}");
    let named = health_of(&scene, &scene.path("serving.json")).await;
    assert_eq!(named.status, 0, "{named:#?}");
    // An edit that has a mistake makes nobody ill who runs.
    scene.configure("mistake");
    assert_eq!(health(&scene, &[]).await.status, 0);

    // Others at a port that a proxy has had: one that answers, one that does not, and nobody.
    for (answer, reason) in [
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), "not valetkey's: 200 OK"),
        (None, "did not answer within"),
    ] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = other.local_addr().unwrap().port();
        let proxy = format!("http://127.0.0.1:{port}");
        let pid = std::process::id();
        let text = json!({ "port": port, "pid": pid, "ca": "ca.pem", "proxy": proxy }).to_string();
        fs::write(&info, text).unwrap();
        let answering = std::thread::spawn(move || {
            let (mut stream, _) = other.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0, "nothing was asked");
            if let Some(answer) = answer {
                stream.write_all(answer.as_bytes()).unwrap();
            }
            // Until the other side has closed.
            let _reset = stream.read_to_end(&mut Vec::new());
        });
        let ill = health_of(&scene, &info).await;
        assert_eq!(ill.status, 1, "{ill:#?}");
        assert!(ill.err.contains(reason) && ill.err.contains("hint: "), "{ill:#?}");
        answering.join().unwrap();
    }
    let ill = health_of(&scene, &info).await;
    assert!(ill.status == 1 && ill.err.contains("does not answer"), "{ill:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn is_asked_in_tls_where_clients_speak_it() {
    let scene = Scene::usual().await;
    // The second is called by its address, as usual.
    for names in ["tls_names = [\"localhost\"]\n", ""] {
        let listener = "[[listeners]]\naddress = \"127.0.0.1:0\"\ntls = true\n";
        scene.configure(&[listener, names, &scene.world.upstream_toml()].concat());
        let mut serving = Serving::start_with(&scene, &[]).await;
        let well = health(&scene, &[]).await;
        assert_eq!(well.status, 0, "{well:#?}");
        assert!(well.out.starts_with(&format!("https://{} answers", serving.address)), "{well:#?}");
        if !names.is_empty() {
            // While it runs, the next one is not the one that is found.
            serving.signal(Signal::TERM);
            serving.ended().await;
            continue;
        }
        // Whoever is there is believed only with a certificate that the proxy's own roots vouch for.
        let text = fs::read_to_string(scene.path("serving.json")).unwrap();
        let mut info: Value = serde_json::from_str(&text).unwrap();
        info["ca"] = scene.world.ca_file().to_str().unwrap().into();
        let path = scene.path("info.json");
        fs::write(&path, info.to_string()).unwrap();
        let ill = health_of(&scene, &path).await;
        assert_eq!(ill.status, 1, "{ill:#?}");
        assert!(ill.err.contains("does not answer: invalid peer certificate"), "{ill:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_enough_at_a_unix_socket() {
    let scene = Scene::usual().await;
    let socket = scene.path("sockets/proxy.sock");
    let listener = format!("[[listeners]]\naddress = \"unix:{}\"\n", socket.display());
    scene.configure(&(listener + &scene.world.upstream_toml()));
    let info = scene.path("run/valetkey/serve.json");
    let serving = scene.valetkey(&["serve"]).spawn().unwrap();
    // It waits for one that has just been started.
    let well = health(&scene, &[]).await;
    assert_eq!(well.status, 0, "{well:#?}");
    assert!(well.out.starts_with(&format!("unix:{} answers", socket.display())), "{well:#?}");

    fs::remove_file(&socket).unwrap();
    let ill = health_of(&scene, &info).await;
    assert_eq!(ill.status, 1, "{ill:#?}");
    assert!(ill.err.contains("does not answer: No such file"), "{ill:#?}");
    drop(serving);
}
