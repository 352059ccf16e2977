//! Language runtimes and package managers under `valetkey run`: each is signed in, and none holds a credential.

use std::fs;

use super::support::{Scene, program};

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
import java.net.*;
import java.net.http.*;
import java.nio.charset.StandardCharsets;

class Fetch {
    public static void main(String[] arguments) throws Exception {
        URI uri = URI.create(arguments[0]);
        HttpRequest request = HttpRequest.newBuilder(uri).build();
        HttpResponse<String> answer =
            HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.version() + " " + answer.body());
        HttpURLConnection connection = (HttpURLConnection) uri.toURL().openConnection();
        System.out.println(new String(connection.getInputStream().readAllBytes(), StandardCharsets.UTF_8));
        System.out.println(System.getProperty("theirs"));
    }
}
"#;
    fs::write(scene.path("Fetch.java"), source).unwrap();
    let done = scene.run_ok(&[&java, "Fetch.java", THINGS]).await;
    assert_eq!(done.out.matches("present and current").count(), 2, "{done:?}");
    assert!(done.out.contains("HTTP_2 ") && done.out.ends_with("still here\n"), "{done:?}");
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
