//! Hosts with dead addresses, without names and without words: reached where there is a way, told by the step where
//! there is none.

pub(crate) mod network;

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{join, join_all};
use futures_util::stream::{self, FuturesUnordered};
use http::{Method, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;
use valetkey::sandbox::client::{self, Client, HTTP1, HTTP2, Refused, Visit};
use valetkey::sandbox::{End, Settings};

use self::network::{
    ALIVE4, ALIVE6, DEAD4, DEAD6, LAST6, NOWHERE4, NOWHERE6, QUIET4, REFUSING4, REFUSING6, RUDE4,
    SILENT4, door, is_inside, listening, names, rudeness, silence,
};
use super::served::{Serving, told};
use super::support::{Scene, done, program};

/// Below this domain every host is signed in, below the other one it is tunnelled.
const SIGNED_IN: &str = "example.com";
const TUNNELLED: &str = "example.org";

/// The addresses of a host, in the order in which the system names them.
const HOSTS: [(&str, &[IpAddr]); 16] = [
    ("v4-only", &[ALIVE4]),
    ("v6-only", &[ALIVE6]),
    ("v6-dead", &[DEAD6[0], ALIVE4]),
    ("v4-dead", &[DEAD4, LAST6]),
    ("most-v6-dead", &[DEAD6[0], DEAD6[1], DEAD6[2], LAST6]),
    ("most-dead", &[DEAD6[0], DEAD6[1], DEAD6[2], DEAD4, LAST6]),
    ("v6-refused", &[REFUSING6, ALIVE4]),
    // What the system cannot reach it names last.
    ("no-way-v6", &[ALIVE4, NOWHERE6]),
    ("no-way-v4", &[ALIVE6, NOWHERE4]),
    ("refused", &[REFUSING6, REFUSING4]),
    ("no-way", &[NOWHERE6, NOWHERE4]),
    ("rude", &[RUDE4]),
    ("dead", &[DEAD6[0], DEAD6[1], DEAD4]),
    ("half-dead", &[DEAD6[0], REFUSING4]),
    ("no-tls", &[SILENT4]),
    ("quiet", &[QUIET4]),
];

/// Those that are reached.
const REACHED: usize = 9;

fn addresses(label: &str) -> Option<&'static [IpAddr]> {
    HOSTS.iter().find(|(host, _)| *host == label).map(|(_, addresses)| *addresses)
}

/// A user of the network, with a `valetkey serve`.
struct Desk {
    scene: Scene,
    client: Client,
    /// Ends with this.
    _serving: Serving,
}

impl Desk {
    async fn new(settings: Settings, upstream_proxy: &str) -> Self {
        let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
        scene.world.api().require_login(false);
        let labels = HOSTS.iter().map(|(label, _)| *label).chain(["silent", "no-such"]);
        let rules: String = labels
            .map(|label| {
                format!("[[rules]]\nhost = \"{label}.{SIGNED_IN}\"\ncredential = \"example\"\n")
            })
            .collect();
        let ca = scene.world.ca_file().display();
        scene.configure(&format!(
            "{rules}[upstream]\nca_bundle = \"{ca}\"\nproxy = \"{upstream_proxy}\"\n"
        ));
        let serving = Serving::start(&scene).await;
        let client = serving.client_in(&scene);
        Self { scene, client, _serving: serving }
    }

    /// One from which the world is reached directly, with every door.
    async fn usual() -> Self {
        names(addresses).await;
        let desk = Self::new(Settings::default(), "none").await;
        for address in [ALIVE4, ALIVE6, LAST6] {
            desk.door(address).await;
        }
        silence(SILENT4).await;
        rudeness(RUDE4).await;
        desk
    }

    async fn door(&self, address: IpAddr) -> watch::Receiver<usize> {
        door(address, self.scene.world.resolve()[0].1).await
    }

    /// What a host answers, or what is said in its place.
    async fn get(&self, host: &str, path: &str) -> Response<Bytes> {
        match self.client.get(Visit::to(&format!("{host}:443"), HTTP1), path).await {
            Ok(answer) => answer,
            Err(error) => *error.downcast::<Refused>().unwrap().0,
        }
    }

    /// Status, code, sentence and hint of the refusal for a host.
    async fn refusal(&self, host: &str, path: &str) -> (u16, String, String, String) {
        let (status, code, sentence, hint) = told(&self.get(host, path).await);
        println!("{status} {code}: {sentence}; {hint}");
        (status, code, sentence, hint)
    }
}

/// A catcher of hangs. Far below the limit for a connection it tells as well that nobody waited for one.
async fn within<T>(seconds: u64, what: &str, doing: impl Future<Output = T>) -> T {
    let doing = tokio::time::timeout(Duration::from_secs(seconds), Box::pin(doing));
    doing.await.unwrap_or_else(|_| panic!("{what}: not within {seconds} s"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_of_a_host_has_its_chance() {
    if !is_inside("dialling::every_address_of_a_host_has_its_chance").await {
        return;
    }
    let desk = Desk::usual().await;
    for (label, addresses) in &HOSTS[..REACHED] {
        let host = format!("{label}.{SIGNED_IN}:443");
        let named = tokio::net::lookup_host(host).await.unwrap().map(|address| address.ip());
        assert_eq!(named.collect::<Vec<_>>(), *addresses, "{label}: the test shows something else");
    }
    let desk = &desk;
    let reached = HOSTS[..REACHED].iter().flat_map(|(label, _)| {
        [(SIGNED_IN, "present and current"), (TUNNELLED, "absent")].map(
            |(domain, login)| async move {
                let host = format!("{label}.{domain}");
                // Four addresses that are dead one after the other would have 7.5 s of our 10.
                let answer = within(5, &host, desk.get(&host, "/v1/things")).await;
                assert_eq!(answer.status(), StatusCode::OK, "{host}: {answer:?}");
                let body: Value = serde_json::from_slice(answer.body()).unwrap();
                assert_eq!(body["authorization"], login, "{host}");
            },
        )
    });
    join_all(reached).await;

    for literal in [ALIVE4, ALIVE6].map(|address| SocketAddr::new(address, 443).to_string()) {
        within(5, &literal, desk.client.tunnel(&literal)).await.unwrap();
    }

    let unreachable = "the upstream could not be reached";
    let both = &[SIGNED_IN, TUNNELLED][..];
    let ruled = &both[..1];
    for (label, path, domains, (code, sentence)) in [
        ("refused", "/v1/x", both, ("upstream_unreachable", unreachable)),
        ("no-way", "/v1/x", both, ("upstream_unreachable", unreachable)),
        ("no-such", "/v1/x", both, ("upstream_dns", "the host name could not be resolved")),
        ("rude", "/v1/x", ruled, ("upstream_tls", "the TLS handshake with the upstream failed")),
        (
            "v4-only",
            "/v1/close-before-head",
            ruled,
            ("upstream_closed", "the upstream gave no HTTP response"),
        ),
    ] {
        for domain in domains {
            let host = format!("{label}.{domain}");
            let told = within(5, &host, desk.refusal(&host, path)).await;
            let sentence = format!("{sentence} ({host}:443)");
            assert_eq!((told.0, told.1, told.2), (502, code.to_owned(), sentence), "{host}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socks_server_that_resolves_no_names_is_told_every_address() {
    if !is_inside("dialling::a_socks_server_that_resolves_no_names_is_told_every_address").await {
        return;
    }
    let Some(microsocks) = program("microsocks") else { return };
    names(addresses).await;
    let mut socks = tokio::process::Command::new(microsocks);
    let _socks = socks.args(["-i", "127.0.0.1", "-p", "1080"]).kill_on_drop(true).spawn().unwrap();
    within(5, "microsocks", listening("127.0.0.1:1080")).await;
    let desk = Desk::new(Settings::default(), "socks5://127.0.0.1:1080").await;
    for address in [ALIVE4, ALIVE6] {
        desk.door(address).await;
    }
    for label in ["v4-only", "v6-only", "v6-refused"] {
        let host = format!("{label}.{SIGNED_IN}");
        let answer = within(5, &host, desk.get(&host, "/v1/things")).await;
        assert_eq!(answer.status(), StatusCode::OK, "{host}: {answer:?}");
    }
    // Its own patience with a dead address is longer than ours.
    let host = format!("v6-dead.{SIGNED_IN}");
    let answer = within(15, &host, desk.get(&host, "/v1/things")).await;
    assert_eq!(answer.status(), StatusCode::OK, "{host}: {answer:?}");
    let host = format!("refused.{SIGNED_IN}");
    let (status, code, ..) = within(5, &host, desk.refusal(&host, "/v1/x")).await;
    assert_eq!((status, &*code), (502, "chain_refused"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_answers_is_told_by_its_step() {
    if !is_inside("dialling::what_never_answers_is_told_by_its_step").await {
        return;
    }
    let desk = Desk::usual().await;
    let behind = async |scheme: &str, label: &str| {
        let proxy = format!("{scheme}://{label}.{SIGNED_IN}:443");
        Desk::new(Settings::default(), &proxy).await
    };
    let (http, https) = (behind("http", "no-tls").await, behind("https", "no-tls").await);
    let socks = behind("socks5h", "no-tls").await;
    let (dead, nameless) = (behind("http", "dead").await, behind("http", "silent").await);

    let late = |sentence: &str, hint| (504, "deadline", sentence.to_owned(), hint);
    let (both, ruled) = (&[SIGNED_IN, TUNNELLED][..], &[SIGNED_IN][..]);
    let no_tcp =
        late("the upstream took no connection in time", "set upstream.proxy or HTTPS_PROXY");
    let no_name =
        late("the host name was not resolved in time", "check the host name and this network");
    let no_tls = late("the upstream did not end the TLS handshake in time", "try again");
    let no_tunnel = late("the upstream proxy opened no tunnel in time", "check upstream.proxy");
    let unreachable = |step: &str| {
        let sentence = format!("the upstream proxy could not be reached: {step}");
        (502, "chain_unreachable", sentence, "check upstream.proxy")
    };
    let no_chain = unreachable("it took no connection in time");
    let no_chain_name = unreachable("the host name was not resolved in time");
    let no_chain_tls = unreachable("it did not end the TLS handshake in time");
    // From where, which host, within how many seconds; and the proxy that is to be blamed.
    let far = "v4-only";
    let table = [
        (&desk, "dead", both, 15, None, no_tcp.clone()),
        (&desk, "half-dead", both, 15, None, no_tcp),
        (&desk, "silent", both, 25, None, no_name),
        (&desk, "no-tls", ruled, 15, None, no_tls),
        (&http, far, both, 35, Some("no-tls"), no_tunnel.clone()),
        (&socks, far, both, 35, Some("no-tls"), no_tunnel),
        (&https, far, both, 15, Some("no-tls"), no_chain_tls),
        (&dead, far, both, 15, Some("dead"), no_chain),
        (&nameless, far, both, 25, Some("silent"), no_chain_name),
    ];
    let rows = table.iter().flat_map(|(desk, label, domains, limit, place, refusal)| {
        domains.iter().map(move |domain| async move {
            let host = format!("{label}.{domain}");
            let place = place.map_or(host.clone(), |place| format!("{place}.{SIGNED_IN}"));
            let (status, code, sentence, hint) = refusal;
            let expected = (*status, (*code).to_owned(), format!("{sentence} ({place}:443)"));
            let told = within(*limit, &host, desk.refusal(&host, "/v1/x")).await;
            assert_eq!((told.0, told.1, told.2), expected, "{host}");
            assert!(told.3.contains(hint), "{host}: {}", told.3);
        })
    });
    let program = async {
        let Some(curl) = program("curl") else { return };
        let url = format!("https://silent.{SIGNED_IN}/v1/x");
        let fetch = ["run", "--", &curl, "-sS", "--max-time", "2", &url];
        let fetched = done(desk.scene.valetkey(&fetch).spawn().unwrap());
        // What it asked for is still looked up when it ends, and nobody waits for that.
        let fetched = within(15, "the end of a program", fetched).await;
        assert_eq!(fetched.status, 28, "curl should have lost patience: {fetched:?}");
    };
    join(join_all(rows), program).await;
    // In a tunnel it is for the client to lose patience.
    let silent = format!("no-tls.{TUNNELLED}:443");
    within(5, &silent, desk.client.tunnel(&silent)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_thinks_and_a_body_that_trickles_have_time() {
    if !is_inside("dialling::an_upstream_that_thinks_and_a_body_that_trickles_have_time").await {
        return;
    }
    let desk = Desk::usual().await;
    let api = desk.scene.world.api();
    let rows = [SIGNED_IN, TUNNELLED]
        .into_iter()
        .flat_map(|domain| [HTTP1, HTTP2].map(|alpn| (format!("v4-only.{domain}:443"), alpn)));
    let rows: Vec<_> = rows.collect();
    let thinking = async {
        let held =
            rows.iter().map(|(host, alpn)| desk.client.get(Visit::to(host, alpn), "/v1/hold"));
        let mut held: FuturesUnordered<_> = held.collect();
        let early = tokio::time::timeout(Duration::from_secs(15), held.next()).await;
        assert!(early.is_err(), "somebody lost patience: {early:?}");
        rows.iter().for_each(|_| api.release());
        while let Some(answer) = within(5, "what was held", held.next()).await {
            assert_eq!(answer.unwrap().status(), StatusCode::OK);
        }
    };
    // 32 s, longer than every limit of a step.
    let desk = &desk;
    let down = join_all(rows.iter().map(|(host, alpn)| async move {
        let answer =
            desk.client.get(Visit::to(host, alpn), "/v1/sse?n=64&every_ms=500").await.unwrap();
        let events = String::from_utf8(answer.into_body().to_vec()).unwrap();
        assert!(events.ends_with("data: {\"number\":63}\n\n"), "{host}: {events}");
    }));
    let up = join_all(rows.iter().map(|(host, alpn)| async move {
        let pieces = stream::unfold(0, |sent| async move {
            if sent == 64 {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            Some((Ok::<_, io::Error>(Frame::data(Bytes::from_static(b"x"))), sent + 1))
        });
        let mut request = client::get("/v1/upload").map(|_| StreamBody::new(pieces).boxed_unsync());
        *request.method_mut() = Method::POST;
        let answer = desk.client.send(Visit::to(host, alpn), request).await.unwrap();
        let facts = client::gather(answer).await.unwrap();
        assert_eq!(facts.status(), StatusCode::OK, "{host}: {facts:?}");
        let facts: Value = serde_json::from_slice(facts.body()).unwrap();
        assert_eq!(facts["bytes"], 64, "{host}");
    }));
    within(50, "what takes its time", join(thinking, join(down, up))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_the_upstream_thinks_frees_it() {
    if !is_inside("dialling::a_client_that_leaves_while_the_upstream_thinks_frees_it").await {
        return;
    }
    names(addresses).await;
    for (http1_only, address, label) in [(true, QUIET4, "quiet"), (false, ALIVE4, "v4-only")] {
        let settings = Settings { http1_only, ..Settings::default() };
        let desk = Desk::new(settings, "none").await;
        let mut open = desk.door(address).await;
        // HTTP/2 goes on with its connection.
        let kept = usize::from(!http1_only);
        for domain in [SIGNED_IN, TUNNELLED] {
            let (host, api) = (format!("{label}.{domain}"), desk.scene.world.api());
            api.clear();
            let target = format!("{host}:443");
            let mut tls = desk.client.greet(Visit::to(&target, HTTP1)).await.unwrap();
            let request = format!("GET /v1/hold HTTP/1.1\r\nHost: {host}\r\n\r\n");
            tls.write_all(request.as_bytes()).await.unwrap();
            within(5, &host, api.wait_for(1)).await;
            assert_eq!(*open.borrow(), if domain == SIGNED_IN { 1 } else { kept + 1 });
            drop(tls);
            let gone = |seen: &[valetkey::sandbox::Seen]| seen[0].response.end == End::Cut;
            within(5, &host, api.wait_until(gone)).await;
            within(5, &host, open.wait_for(|open| *open == kept)).await.unwrap();
        }
    }
}
