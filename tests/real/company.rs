//! Behind a company's TLS-inspecting proxy, with its own CA.

use valetkey::sandbox::Settings;
use valetkey::secret::Secret;

use super::support::{Scene, node_modules, program, python};

const TUNNELLED: &str = "https://other.example.com/v1/things";
const INJECTED: &str = "https://chatgpt.com/backend-api/codex/models";

/// A home in which the company's proxy is the only way out, and its CA is named by `variable`.
async fn inside(login: Option<&str>, variable: &str, lifetime: time::Duration) -> Scene {
    let company_login = login.map(|login| Secret::new(login.replace("%40", "@")));
    let scene = Scene::in_world(Settings { company_login, ..Settings::default() }, lifetime).await;
    let at = login.map(|login| format!("{login}@")).unwrap_or_default();
    let proxy = format!("http://{at}{}", scene.world.company().address());
    let ca = scene.world.company().ca_file().to_owned();
    scene.world.api().require_login(false);
    let scene = scene.with("HTTPS_PROXY", proxy);
    if variable == "upstream.ca_bundle" {
        scene.configure(&format!("[upstream]\nca_bundle = \"{}\"\n", ca.display()));
        return scene;
    }
    scene.with(variable, ca)
}

fn assert_went_through(scene: &Scene) {
    let connects = scene.world.company().connects();
    assert!(connects.iter().any(|it| it == "other.example.com:443"), "{connects:?}");
    assert!(connects.iter().any(|it| it == "chatgpt.com:443"), "{connects:?}");
    assert_eq!(scene.world.connections(), 0, "somebody went past the company's proxy");
    for seen in scene.world.api().seen() {
        let signed_in = seen.headers.contains_key("authorization");
        assert_eq!(signed_in, seen.host == "chatgpt.com", "{seen:?}");
        assert!(!seen.headers.contains_key("proxy-authorization"), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_reaches_a_tunnelled_and_an_injected_host() {
    let Some(curl) = program("curl") else { return };
    for variable in ["upstream.ca_bundle", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"] {
        for login in [None, Some("user:p%40ss")] {
            let scene = inside(login, variable, time::Duration::hours(1)).await;
            for url in [TUNNELLED, INJECTED] {
                let done = scene.run_ok(&[&curl, "-sS", "--fail", url]).await;
                assert!(done.out.contains("\"path\""), "{variable}: {done:?}");
            }
            assert_went_through(&scene);
            // The password of the company's proxy stays out of the child's environment.
            let done = scene.run_ok(&["env"]).await;
            assert!(!done.out.contains("p%40ss") && !done.out.contains("p@ss"), "{}", done.out);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn python_and_node_do_too() {
    let scene = inside(None, "CODEX_CA_CERTIFICATE", time::Duration::hours(1)).await;
    if let Some(python) = python() {
        let script = format!(
            "import requests\nfor url in ['{TUNNELLED}', '{INJECTED}']:\n  requests.get(url).raise_for_status()"
        );
        scene.run_ok(&[&python, "-c", &script]).await;
        assert_went_through(&scene);
    }
    scene.world.api().clear();
    if let (Some(node), Some(modules)) = (program("node"), node_modules()) {
        let script = format!(
            "const {{ EnvHttpProxyAgent, fetch, setGlobalDispatcher }} = require('{modules}/undici');\n\
             setGlobalDispatcher(new EnvHttpProxyAgent());\n\
             (async () => {{ for (const url of ['{TUNNELLED}', '{INJECTED}']) {{\n\
             const answer = await fetch(url); if (!answer.ok) process.exit(2); await answer.text(); }}\n\
             process.exit(0); }})().catch((error) => {{ console.error(error); process.exit(1); }});"
        );
        scene.run_ok(&[&node, "-e", &script]).await;
        assert_went_through(&scene);
        assert_eq!(scene.world.api().seen().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_goes_through_it_and_so_does_a_valetkey_in_a_valetkey() {
    let Some(curl) = program("curl") else { return };
    let scene = inside(None, "SSL_CERT_FILE", time::Duration::minutes(-1)).await;
    scene.world.api().require_login(true);
    let valetkey = env!("CARGO_BIN_EXE_valetkey");
    let inner = [valetkey, "run", "--", &curl, "-sS", "--fail", INJECTED];
    let done = scene.run_ok(&inner).await;
    assert!(done.out.contains("present and current"), "{done:?}");
    let issuer = scene.world.issuer();
    assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 0));
    let connects = scene.world.company().connects();
    assert!(connects.iter().any(|it| it == "auth.openai.com:443"), "{connects:?}");
    assert_eq!(scene.world.connections(), 0, "somebody went past the company's proxy");
    // One credential, whichever of the two has put it in.
    scene.seen_signed_in();
}
