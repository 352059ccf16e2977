//! Signing in with a code that is typed into a browser elsewhere.

use std::time::Duration;

use valetkey::sandbox::DeviceSetting;

use super::web::Gate;
use super::{Home, Running};

const LOGIN: &[&str] = &["login", "--device-auth"];

impl Running<'_> {
    /// The code that the person shall type.
    async fn code(&mut self) -> String {
        self.line(|line| line.starts_with("  ") && line.trim().len() == 9 && line.contains('-'))
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_signs_in_through_the_companys_proxy() {
    let home = Home::new().await;
    home.issuer().device_interval(2);
    let mut login = home.start(LOGIN);
    let code = login.code().await;
    home.issuer().wait_for_polls(2).await;
    home.issuer().approve_device();
    let done = login.end().await.succeeded();
    let words = done.words();
    for text in [
        "https://auth.openai.com/codex/device\n",
        code.trim(),
        "it expires in 15 minutes",
        "Enter only a code that you asked for",
        "Successfully logged in\n",
        "as acct-sandbox@example.com, workspace acct-sandbox\n",
    ] {
        assert!(words.contains(text), "{text}: {words}");
    }
    assert_no_faster_than(&home, Duration::from_secs(2));
    assert_eq!(home.cached().unwrap()["tokens"]["account_id"], "acct-sandbox");
    assert_eq!((home.issuer().posts(), home.world.connections()), (1, 0));
    let status = home.run(&["login", "status"]).await.succeeded();
    assert!(status.out.starts_with("Logged in using ChatGPT\n"), "{}", status.out);
}

fn assert_no_faster_than(home: &Home, interval: Duration) {
    let polls = home.issuer().polls();
    assert!(polls.len() > 1);
    for pair in polls.windows(2) {
        // As the issuer sees it: the way there takes its time, and not always the same.
        let apart = pair[1] - pair[0] + Duration::from_millis(200);
        assert!(apart >= interval, "{apart:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_that_brings_nothing() {
    let denied = "device auth failed with status";
    type Row = (DeviceSetting, bool, &'static str, &'static str);
    let table: [Row; 7] = [
        (DeviceSetting::Off, false, "device code login is not enabled", "Settings, Security"),
        (DeviceSetting::Refused(403), false, "device code request failed with status 403", "again"),
        (DeviceSetting::Refused(429), false, "device code request failed with status 429", "again"),
        (DeviceSetting::Refused(503), false, "device code request failed with status 503", "again"),
        (DeviceSetting::Denied(401), false, denied, "try again"),
        (DeviceSetting::Denied(500), false, denied, "try again"),
        (DeviceSetting::On, true, denied, "try again"),
    ];
    for (setting, is_denied, sentence, hint) in table {
        let home = Home::new().await;
        home.issuer().device_login(setting);
        let mut login = home.start(LOGIN);
        if is_denied {
            login.code().await;
            home.issuer().deny_device();
        }
        login.end().await.failed(1, sentence, hint);
        assert_eq!((home.cache(), home.issuer().posts()), (None, 0), "{setting:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_workspace_is_not_saved() {
    let home = Home::new().await;
    home.configure("forced_chatgpt_workspace_id = \"ws-9\"\n");
    home.signed_in();
    let before = home.cache();
    home.issuer().approve_device();
    let done = home.run(LOGIN).await;
    assert_eq!(done.status, 1);
    let sentence = "error: Login is restricted to workspace id(s) ws-9.\n";
    assert!(done.words().contains(sentence), "{}", done.words());
    assert_eq!((home.cache(), home.issuer().revokes()), (before, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_away_for_a_moment_is_waited_for() {
    let mut home = Home::new().await;
    let gate = Gate::open(home.world.company().address()).await;
    home.set("HTTPS_PROXY", format!("http://{}", gate.address));
    let mut login = home.start(LOGIN);
    login.code().await;
    home.issuer().wait_for_polls(1).await;
    let address = gate.shut().await;
    login.line(|line| line.contains("a question went unanswered")).await;
    home.issuer().approve_device();
    let _gate = Gate::open_at(address, home.world.company().address()).await;
    login.end().await.succeeded();
    assert_eq!(home.issuer().posts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_the_wrong_ca_there_is_no_code() {
    let home = Home::new().await.distrusting();
    home.signed_in();
    let before = home.cache();
    let done = home.run(LOGIN).await;
    done.failed(1, "the upstream's certificate was not accepted", "append its certificate as PEM");
    assert_eq!(home.cache(), before);
    assert!(home.issuer().seen().is_empty() && home.issuer().polls().is_empty());
}
