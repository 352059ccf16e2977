//! Many processes want one expired token, some of them stopped, some of them Codex, and the issuer down: one refresh.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Command;
use valetkey::clock::Clock;
use valetkey::fault;
use valetkey::sandbox::client::{Connection, HTTP2, Visit};
use valetkey::sandbox::{Fault, SAID, Settings};
use valetkey::tasks::Tasks;

use super::place::{DUE, EXPIRED, Kept, Place};
use super::rounds;
use super::served::{Serving, told};
use super::support::{Done, LIMIT, Scene, codex, done};

#[tokio::test(flavor = "multi_thread")]
async fn eight_proxies_refresh_a_token_in_a_file_once() {
    eight_proxies_refresh_once(Kept::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_proxies_refresh_a_token_in_a_keyring_once() {
    eight_proxies_refresh_once(Kept::Entry).await;
}

/// Each round a login appears whose token has expired, and eight proxies with a hundred requests each want it.
async fn eight_proxies_refresh_once(kept: Kept) {
    let Some(place) = Place::new(kept).await else { return };
    let (rounds, issuer) = (rounds(5, 100), place.issuer());
    let (refreshes, posts) = (issuer.refreshes(), issuer.posts());
    let (mut proxies, mut waited) = (Vec::<Serving>::new(), 0);
    for round in 0..rounds {
        // Every other round they have run for long, and hear of the new login; a keyring tells nobody of a change.
        let are_new = round % 2 == 0 || kept == Kept::Entry;
        if are_new {
            // Before there is a token to refresh: a kill in the course of that is for the proof of crashes.
            for mut proxy in proxies.drain(..) {
                proxy.signal(Signal::KILL);
                proxy.ended().await;
            }
        }
        place.expired_login().await;
        if are_new {
            for number in 0..PROXIES {
                let info = format!("proxy-{number}.json");
                proxies.push(Serving::start_beside(place.scene(), &info, &[]).await);
            }
        }
        let refused: usize = join_all(proxies.iter().map(hundred_requests)).await.iter().sum();
        // A keyring has two seconds to answer eight who ask at once, and here it shares two cores with them.
        assert!(refused == 0 || kept == Kept::Entry, "round {round}: {refused} refused");
        waited += refused;
        // One that has not heard of it yet has answered with the token from before, which is as good.
        let once = issuer.wait_for_refreshes(refreshes + round + 1);
        tokio::time::timeout(LIMIT, once).await.expect("nobody has refreshed it");
        let token = place.token().await;
        assert!(token.status == 0 && place.accepts(&token), "round {round}: {token:?}");
        assert_eq!(issuer.refreshes() - refreshes, round + 1, "one refresh a round");
        place.scene().world.api().clear();
    }
    assert_eq!((issuer.posts() - posts, issuer.reuses()), (rounds, 0));
    println!(
        "{rounds} rounds of {PROXIES} proxies with {REQUESTS} requests each: {rounds} refreshes; {waited} requests were \
         sent again because the store had not answered in time"
    );
}

/// All at once, on a few connections, until each is answered with 200; how many were refused before because the store
/// did not answer.
async fn hundred_requests(proxy: &Serving) -> usize {
    let client = proxy.client();
    let connections = (0..CONNECTIONS).map(|_| async {
        let visit = Visit::to("chatgpt.com:443", HTTP2);
        let connection = client.open(visit).await.unwrap();
        let requests = (0..REQUESTS / CONNECTIONS).map(|_| answered(&connection));
        join_all(requests).await.iter().sum::<usize>()
    });
    join_all(connections).await.iter().sum()
}

/// Sends one request until it is answered, and counts how often it was refused before.
async fn answered(connection: &Connection) -> usize {
    let (mut connection, begun) = (connection.share().unwrap(), Instant::now());
    for refused in 0.. {
        let answer = connection.get("/backend-api/codex/models").await.unwrap();
        if answer.status() == 200 {
            return refused;
        }
        let (status, code, said, _) = told(&answer);
        assert_eq!((status, code.as_str()), (503, "store_unavailable"), "{said}");
        assert!(begun.elapsed() < LIMIT, "{said}");
        // As the refusal says.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    unreachable!("it is answered or the proof fails")
}

/// Whoever holds the claim or the request is stopped for longer than others wait for it, and goes on then.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_past_its_lease_nobody_sends_a_token_twice() {
    let cases = [
        ("claimed", EXPIRED),
        ("claimed", DUE),
        ("noted", EXPIRED),
        ("posting", EXPIRED),
        ("posting", DUE),
        // It has the answer; as long as the old token lives, nobody asks again.
        ("answered", DUE),
        ("journaled", EXPIRED),
        ("journaled", DUE),
        ("published", EXPIRED),
    ];
    let in_file = cases.map(|(step, age)| stopped_at(Kept::File, step, age));
    let stopped: usize = join_all(in_file).await.into_iter().sum();
    let in_keyring = [("claimed", DUE), ("posting", EXPIRED), ("answered", DUE)];
    let in_keyring = in_keyring.map(|(step, age)| stopped_at(Kept::Entry, step, age));
    let with_keyring: usize = join_all(in_keyring).await.into_iter().sum();
    println!(
        "{stopped} holders stopped, {with_keyring} with a keyring: none of their tokens was sent twice"
    );
}

/// How many were stopped: none where a program is missing.
async fn stopped_at(kept: Kept, step: &'static str, age: time::Duration) -> usize {
    let Some(place) = Place::new(kept).await else { return 0 };
    place.grow_old(age).await;
    let (issuer, case) = (place.issuer(), format!("{kept:?} stopped when {step}, {age:?}"));
    let (refreshes, posts) = (issuer.refreshes(), issuer.posts());
    let stop = format!("{step}#1=stop");
    let armed = [(fault::VARIABLE, stop.as_str())];
    let mut holder = Serving::start_beside(place.scene(), "holder.json", &armed).await;
    let asking = Tasks::new();
    let asked = asking.spawn(place.asked_of(&holder));
    stands_still(&holder).await;

    let others = join_all((0..3).map(|_| place.token())).await;
    for other in others {
        assert!(other.status == 0 && place.accepts(&other), "{case}: {other:?}");
    }
    holder.signal(Signal::CONT);
    let answer = tokio::time::timeout(LIMIT, asked).await.expect("no answer").unwrap();
    // What it had begun to dial before it was stopped has run out of time.
    assert!(matches!(answer, Some(200 | 504)), "{case}: {answer:?}");
    holder.signal(Signal::TERM);
    assert_eq!(holder.ended().await, Some(0), "{case}");

    assert!(issuer.posts() - posts <= 1, "{case}: {} requests", issuer.posts() - posts);
    place.grow_old(EXPIRED).await;
    assert_signed_in_soon(&place, &case).await;
    assert_eq!(issuer.posts() - posts, issuer.refreshes() - refreshes, "{case}");
    assert_eq!(issuer.reuses(), 0, "{case}");
    1
}

/// Waits until the process is stopped (proc_pid_stat(5)), which keeps it from saying so.
async fn stands_still(serving: &Serving) {
    let stat = format!("/proc/{}/stat", serving.pid());
    let stopped = async {
        while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, stopped).await.expect("it was not stopped");
}

/// The token has been redeemed, and who waits for the answer is stopped until others have given it up: it is heard all the
/// same.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_heard_however_long_its_owner_was_stopped() {
    let place = Place::new(Kept::File).await.unwrap();
    place.grow_old(DUE).await;
    let issuer = place.issuer();
    let (refreshes, posts) = (issuer.refreshes(), issuer.posts());
    let holder = Serving::start_beside(place.scene(), "holder.json", &[]).await;
    issuer.script(Fault::Hold);
    assert_eq!(place.ask(&holder).await.unwrap().status(), 200);
    tokio::time::timeout(LIMIT, issuer.wait_for_refreshes(refreshes + 1)).await.unwrap();
    holder.signal(Signal::STOP);
    issuer.release();
    // Others see its request stand for longer than one can take.
    let other = Serving::start_beside(place.scene(), "other.json", &[]).await;
    assert_eq!(place.ask(&other).await.unwrap().status(), 200);
    tokio::time::sleep(GIVEN_UP).await;
    holder.signal(Signal::CONT);
    let begun = Instant::now();
    loop {
        let token = place.token().await;
        assert!(token.status == 0 && begun.elapsed() < LIMIT, "{token:?}");
        if place.accepts(&token) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    place.grow_old(EXPIRED).await;
    assert_signed_in_soon(&place, "stopped while it waited").await;
    assert_eq!((issuer.reuses(), issuer.refreshes() - refreshes), (0, 2));
    assert_eq!(issuer.posts() - posts, 2);
}

/// A request that was given up on counts as a failure, after which all wait for a moment.
async fn assert_signed_in_soon(place: &Place, case: &str) {
    let begun = Instant::now();
    loop {
        let token = place.token().await;
        if token.status == 0 {
            return assert!(place.accepts(&token), "{case}: {token:?}");
        }
        let is_later = token.err.contains("cannot be asked for a new one now");
        assert!(is_later && begun.elapsed() < LIMIT, "{case}: {token:?}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// While the issuer is down, all processes of a machine together ask it once per step of the back-off.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_issuer_is_no_storm() {
    let place = Place::new(Kept::File).await.unwrap();
    let issuer = place.issuer();
    place.expired_login().await;
    issuer.always(Some(Fault::Status(503)));
    let (posts, begun) = (issuer.posts(), Instant::now());
    let mut proxies = Vec::new();
    for number in 0..3 {
        let info = format!("proxy-{number}.json");
        proxies.push(Serving::start_beside(place.scene(), &info, &[]).await);
    }
    let lasts = Duration::from_secs(rounds(20, 600) as u64);
    let (mut asked, mut refused) = (0, 0);
    while begun.elapsed() < lasts {
        for answer in join_all(proxies.iter().map(|proxy| place.ask(proxy))).await {
            let (status, code, ..) = told(&answer.unwrap());
            assert_eq!((status, code.as_str()), (503, "issuer_unavailable"));
            refused += 1;
        }
        asked += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let sent = issuer.posts() - posts;
    let most = most_attempts(begun.elapsed()).min(MOST_IN_TEN_MINUTES);
    println!("{refused} refusals in {:?}: the issuer was asked {sent} times", begun.elapsed());
    assert!((1..=most).contains(&sent), "{sent} requests, {most} are allowed; {asked} rounds");
    issuer.always(None);
    // It comes back, and with the next step of the back-off so does the login.
    let begun = Instant::now();
    loop {
        let answer = place.ask(&proxies[0]).await.unwrap();
        if answer.status() == 200 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(75), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(issuer.reuses(), 0);
}

/// How many attempts fit into a time: 1 s, 2 s, 4 s and so on to 60 s apart, each up to a quarter less.
fn most_attempts(lasted: Duration) -> usize {
    let (mut at, mut step, mut attempts) = (0.0, 1.0_f64, 1);
    while at + step * 0.75 <= lasted.as_secs_f64() {
        at += step * 0.75;
        step = (step * 2.0).min(60.0);
        attempts += 1;
    }
    attempts
}

/// A real Codex, behind a proxy with decoys or beside one on the same login.
struct Beside {
    scene: Scene,
    codex: String,
}

impl Beside {
    /// With a login that was issued so long ago. `None` where Codex is missing.
    async fn new(age: time::Duration, lifetime: time::Duration) -> Option<Self> {
        let codex = codex()?;
        let clock = Clock::system();
        clock.advance(-age);
        let settings = Settings { clock: clock.clone(), ..Settings::default() };
        let scene = Scene::in_world(settings, lifetime).await;
        clock.advance(age);
        // What Codex asks of others while it works.
        let others =
            "\"github.com:443\" = \"127.0.0.1:9\"\n\"api.github.com:443\" = \"127.0.0.1:9\"\n";
        scene.configure(&(scene.world.upstream_toml() + others));
        Some(Self { scene, codex })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.codex);
        command.args(["exec", "--skip-git-repo-check", "say hi"]);
        command.env_clear().env("PATH", std::env!("PATH")).kill_on_drop(true);
        command.current_dir(self.scene.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// One turn on the very login that we share, past us.
    async fn says_hi_itself(&self) -> Done {
        let (company, mut command) = (self.scene.world.company(), self.command());
        command.envs(&self.scene.env).env("CODEX_CA_CERTIFICATE", company.ca_file());
        command.env("HTTPS_PROXY", format!("http://{}", company.address()));
        done(command.spawn().unwrap()).await
    }

    /// One turn behind a proxy, in a home of decoys.
    async fn says_hi_behind(&self, told: &Value, home: &str) -> Done {
        let mut command = self.command();
        for (name, value) in told.as_object().unwrap() {
            command.env(name, value.as_str().unwrap());
        }
        command.env("HOME", self.scene.path("client")).env("CODEX_HOME", home);
        done(command.spawn().unwrap()).await
    }

    fn home(&self) -> PathBuf {
        self.scene.path(".codex")
    }

    async fn token(&self) -> Done {
        self.scene.typed(&["token"]).await
    }

    /// Codex and we send the same refresh token: the first is answered only when the second was refused.
    async fn collide(&self, codex_first: bool) -> (Done, Done) {
        let issuer = self.scene.world.issuer();
        issuer.script(Fault::Hold);
        let refused = async {
            issuer.wait_for_posts(2).await;
            issuer.release();
        };
        let codex = async {
            if !codex_first {
                issuer.wait_for_refreshes(1).await;
            }
            self.says_hi_itself().await
        };
        let ours = async {
            if codex_first {
                issuer.wait_for_refreshes(1).await;
            }
            self.token().await
        };
        let (codex, ours, ()) = tokio::join!(codex, ours, refused);
        (codex, ours)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_behind_the_proxy_redeems_nothing() {
    let Some(beside) = Beside::new(time::Duration::ZERO, -time::Duration::MINUTE).await else {
        return;
    };
    let (scene, issuer) = (&beside.scene, beside.scene.world.issuer());
    let serving = Serving::start(scene).await;
    let told = scene.typed(&["env", "--shell", "json"]).await;
    let told: Value = serde_json::from_str(&told.out).unwrap_or_else(|_| panic!("{told:?}"));
    std::fs::create_dir(scene.path("client")).unwrap();
    let home = scene.path("client/codex").to_str().unwrap().to_owned();
    let made = scene.typed(&["init", "codex", "--dir", &home]).await;
    assert_eq!(made.status, 0, "{made:?}");
    let rounds = rounds(2, 30);
    for round in 1..=rounds {
        let all = join_all((0..4).map(|_| beside.says_hi_behind(&told, &home))).await;
        assert!(all.iter().all(|done| done.status == 0 && done.out.contains(SAID)), "{all:?}");
        assert_eq!((issuer.posts(), issuer.refreshes(), issuer.reuses()), (round, round, 0));
        issuer.write_auth_json(&beside.home(), -time::Duration::MINUTE).unwrap();
    }
    println!("{rounds} rounds of 4 Codexes behind {}: {rounds} refreshes", serving.address);
}

/// Our margin is ten minutes and Codex's five: while we look after a login, Codex never comes to refresh it.
#[tokio::test(flavor = "multi_thread")]
async fn outside_the_proxy_we_refresh_before_codex_would() {
    // How old a token of an hour is, whether Codex refreshes it, and whether we do.
    let table = [(40, false, false), (52, false, true), (57, true, true)];
    for (age, by_codex, by_us) in table {
        for (codexs_turn, expected) in [(true, by_codex), (false, by_us)] {
            let old = time::Duration::minutes(age);
            let Some(beside) = Beside::new(old, time::Duration::HOUR).await else { return };
            let done = match codexs_turn {
                true => beside.says_hi_itself().await,
                false => beside.token().await,
            };
            assert_eq!(done.status, 0, "{age} {codexs_turn} {done:?}");
            let issuer = beside.scene.world.issuer();
            assert_eq!(issuer.posts(), usize::from(expected), "{age} minutes, {codexs_turn}");
            assert_eq!((issuer.refreshes(), issuer.reuses()), (usize::from(expected), 0));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_reuse_is_forgiven_a_collision_signs_nobody_out() {
    for codex_first in [true, false] {
        let expired = -time::Duration::MINUTE;
        let Some(beside) = Beside::new(time::Duration::ZERO, expired).await else { return };
        let issuer = beside.scene.world.issuer();
        issuer.forgive_reuse();
        let (theirs, ours) = beside.collide(codex_first).await;
        assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 1), "{theirs:?} {ours:?}");
        assert_eq!(ours.status, 0, "{codex_first}: {ours:?}");
        // Whatever became of the turn that collided, the next one works, and so do we.
        let next = beside.says_hi_itself().await;
        assert!(next.status == 0 && next.out.contains(SAID), "{codex_first}: {next:?} {theirs:?}");
        let token = beside.token().await;
        assert_eq!((token.status, &token.out), (0, &ours.out), "one login, one token");
        assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_reuse_ends_the_login_a_collision_is_told_in_one_sentence() {
    for codex_first in [true, false] {
        let expired = -time::Duration::MINUTE;
        let Some(beside) = Beside::new(time::Duration::ZERO, expired).await else { return };
        let issuer = beside.scene.world.issuer();
        let (theirs, ours) = beside.collide(codex_first).await;
        assert_eq!((issuer.refreshes(), issuer.reuses()), (1, 1), "{theirs:?} {ours:?}");
        // Whoever was first holds a token that the API refuses, which shows with the first request.
        let serving = Serving::start(&beside.scene).await;
        let answer = serving
            .client()
            .get(Visit::to("chatgpt.com:443", HTTP2), "/backend-api/codex/models")
            .await
            .unwrap();
        let (status, code, said, hint) = told(&answer);
        assert_eq!((status, code.as_str()), (403, "login_required"), "{said}");
        assert!(said.contains("could not be refreshed because"), "{said}");
        assert!(hint.contains("sign in: valetkey login"), "{hint}");
        println!("codex first {codex_first}: {said}; {hint}");
    }
}

/// However long such an outage lasts, of those that a proof waits for.
const MOST_IN_TEN_MINUTES: usize = 20;

/// Processes of each round, and what each is asked.
const PROXIES: usize = 8;
const REQUESTS: usize = 100;
const CONNECTIONS: usize = 4;

/// Longer than others wait for the end of a request.
const GIVEN_UP: Duration = Duration::from_secs(33);
