//! Kills at every step of a rotation, at random moments and while saving: no login is lost, no file is torn.

use std::future::pending;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::Semaphore;
use valetkey::credential::{Keep, Login, TokenSet};
use valetkey::fault;
use valetkey::secret::Secret;
use valetkey::store::codex::CodexStore;
use valetkey::store::keyring::Keyring;
use valetkey::store::sealed::SealedStore;
use valetkey::store::{Cas, Record, RecordStore};
use valetkey::tasks::Tasks;

use super::dice::Dice;
use super::place::{DUE, EXPIRED, Kept, Place};
use super::rounds;
use super::served::Serving;
use super::support::{done, option_env_now};

/// The steps of a rotation in the order in which they are come to, and whether a login outlives a kill there. Whoever
/// saves comes to some of them more than once.
const STEPS: [(&str, Outlives); 9] = [
    ("claimed", Outlives::Always),
    ("noted", Outlives::Always),
    ("posting", Outlives::Always),
    // The issuer has redeemed the token, and what it answered is nowhere but in memory.
    ("answered", Outlives::WhileItsTokenLives),
    ("journaled", Outlives::Always),
    ("saving", Outlives::Always),
    ("renamed", Outlives::Always),
    ("published", Outlives::Always),
    ("forgotten", Outlives::Always),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outlives {
    Always,
    WhileItsTokenLives,
}

/// Which program refreshes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refreshes {
    Serve,
    Token,
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_it_loses_no_login() {
    let whole = [(Kept::File, Refreshes::Token), (Kept::File, Refreshes::Serve)];
    let ages = |(kept, who)| [(kept, who, EXPIRED), (kept, who, DUE)];
    let cases = whole
        .into_iter()
        .flat_map(ages)
        .chain([(Kept::Plain, Refreshes::Token, EXPIRED), (Kept::Plain, Refreshes::Serve, DUE)]);
    let struck = all_steps(cases.collect(), &STEPS, AT_ONCE).await;
    println!("{struck} kills, each at another step or another time that it was come to");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_with_a_keyring_it_loses_no_login() {
    let entry = vec![(Kept::Entry, Refreshes::Token, EXPIRED)];
    let sealed = vec![(Kept::Sealed, Refreshes::Serve, EXPIRED)];
    let few: Vec<_> = STEPS.into_iter().filter(|(step, _)| WITH_A_SEAL.contains(step)).collect();
    // Each on a desktop of its own.
    let struck = all_steps(entry, &STEPS, DESKTOPS).await + all_steps(sealed, &few, DESKTOPS).await;
    println!("{struck} kills with a real keyring");
}

/// Strikes at each step in each case, and counts the kills.
async fn all_steps(
    cases: Vec<(Kept, Refreshes, time::Duration)>,
    steps: &[(&'static str, Outlives)],
    at_once: usize,
) -> usize {
    let turns = Arc::new(Semaphore::new(at_once));
    let each = cases.iter().flat_map(|case| steps.iter().map(move |step| (case, step)));
    let each = each.map(|(&(kept, who, age), &(step, outlives))| {
        let turns = Arc::clone(&turns);
        async move {
            let _turn = turns.acquire().await.unwrap();
            let attack = Attack { who, age, step, outlives };
            attack.strike_each_time(kept).await
        }
    });
    join_all(each).await.into_iter().sum()
}

/// Kills at one step.
struct Attack {
    who: Refreshes,
    age: time::Duration,
    step: &'static str,
    outlives: Outlives,
}

impl Attack {
    /// Strikes when the step is come to first, then when it is come to for the second time, and so on while it is.
    async fn strike_each_time(&self, kept: Kept) -> usize {
        let Some(place) = Place::new(kept).await else { return 0 };
        for time in 1.. {
            let case = format!("{kept:?} {:?} {} {}#{time}", self.who, self.age, self.step);
            place.grow_old(self.age).await;
            let before = Redeemed::now(&place);
            if !self.dies(&place, time).await {
                assert!(time > 1, "{case}: the step was not come to");
                return time - 1;
            }
            place.assert_whole().await;
            self.assert_outlived(&place, before, &case).await;
            if self.outlives == Outlives::WhileItsTokenLives {
                place.signs_in().await;
            }
        }
        unreachable!("a rotation ends")
    }

    /// Whether the program was killed there.
    async fn dies(&self, place: &Place, time: usize) -> bool {
        let fault = format!("{}#{time}=kill", self.step);
        match self.who {
            Refreshes::Token => {
                let mut command = place.scene().valetkey(&place.asks_for_token());
                let done = done(command.env(fault::VARIABLE, fault).spawn().unwrap()).await;
                assert!([0, KILLED].contains(&done.status), "{done:?}");
                done.status == KILLED
            }
            Refreshes::Serve => {
                let armed = [(fault::VARIABLE, fault.as_str())];
                let mut serving = Serving::start_beside(place.scene(), "struck.json", &armed).await;
                // Whether there is an answer depends on the step.
                drop(place.ask(&serving).await);
                // A shutdown waits for the refresh to end, or to die.
                serving.signal(Signal::TERM);
                serving.ended().await.is_none()
            }
        }
    }

    /// A fresh program without faults goes on with the login, or says in one sentence that it has ended.
    async fn assert_outlived(&self, place: &Place, before: Redeemed, case: &str) {
        if self.age == DUE {
            let token = place.token().await;
            assert_eq!(token.status, 0, "{case}: its token lives: {token:?}");
            assert!(place.accepts(&token), "{case}: {token:?}");
            place.grow_old(EXPIRED).await;
        }
        if self.outlives == Outlives::WhileItsTokenLives {
            return assert_says_that_it_ended(place, case).await;
        }
        self.assert_signed_in(place, case).await;
        let (refreshes, reuses) = before.since(place);
        // What was due may have been refreshed, and then once more for being old.
        let most = if self.age == DUE || place.kept == Kept::Sealed { 2 } else { 1 };
        assert!((1..=most).contains(&refreshes) && reuses == 0, "{case}: {refreshes} {reuses}");
        place.assert_goes_on(case).await;
        place.assert_whole().await;
        place.assert_tidy(case);
    }

    /// A fresh one of the programs that refresh does.
    async fn assert_signed_in(&self, place: &Place, case: &str) {
        match self.who {
            Refreshes::Token => {
                let token = place.token().await;
                assert!(token.status == 0 && place.accepts(&token), "{case}: {token:?}");
            }
            Refreshes::Serve => {
                let mut serving = Serving::start(place.scene()).await;
                let answer = place.ask(&serving).await.unwrap();
                assert_eq!(answer.status(), 200, "{case}: {answer:?}");
                serving.signal(Signal::TERM);
                assert_eq!(serving.ended().await, Some(0), "{case}");
            }
        }
    }
}

impl Place {
    /// Nothing is left of what was being written, and no journal of what is saved.
    fn assert_tidy(&self, case: &str) {
        let left: Vec<_> = self.files().into_iter().filter(|name| !is_expected(name)).collect();
        assert!(left.is_empty(), "{case}: {left:?} is left over");
    }

    /// Whether an answer of the issuer is in a journal.
    fn holds_answer(&self) -> bool {
        let mut journals = self.files().into_iter().filter(|name| name.ends_with(".journal"));
        journals.any(|name| {
            let page = std::fs::read(self.folder().join(name)).unwrap();
            // One that was just made has no note yet.
            let answer = page.get(JOURNAL_NOTE..).unwrap_or_default();
            answer.iter().any(|byte| !byte.is_ascii_whitespace() && *byte != 0)
        })
    }
}

/// Files that belong there while no refresh runs: caches, records, locks, and the key of the journal.
fn is_expected(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or_default();
    !last.starts_with('.') && !last.ends_with(".journal")
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_it_loses_nothing_that_could_be_kept() {
    let kills = rounds(60, 1000);
    let each = (0..LANES).map(|lane| {
        let kills = kills / LANES + usize::from(lane < kills % LANES);
        async move {
            // Places of two kinds; what a round does follows from this number alone.
            let kept = if lane % 2 == 0 { Kept::File } else { Kept::Plain };
            let place = Place::new(kept).await.unwrap();
            Lane { place, dice: Dice::new(lane as u64 + 1), count: Count::default() }
                .run(kills)
                .await
        }
    });
    let all = join_all(each).await;
    let sum = |of: fn(&Count) -> usize| all.iter().map(of).sum::<usize>();
    let (unavoidable, late) = (sum(|count| count.unavoidable), sum(|count| count.late));
    println!(
        "{} kills: {} before a POST had an effect, {} after the issuer had redeemed, of which {} with the successor in \
         the store and {} in the journal alone; {unavoidable} logins lost with an answer that was nowhere, {late} of them \
         redeemed when the program was dead already",
        sum(|count| count.kills),
        sum(|count| count.kills - count.redeemed),
        sum(|count| count.redeemed),
        sum(|count| count.stored),
        sum(|count| count.journaled),
    );
    let avoidable: Vec<_> = all.iter().flat_map(|count| &count.avoidable).collect();
    assert!(avoidable.is_empty(), "{avoidable:#?}");
    assert_eq!(sum(|count| count.kills), kills);
    // Sixty kills cannot tell of a hundredth, least of all on a machine that does other things too.
    let most = if kills < 1000 { kills / 10 } else { kills / 100 };
    // What was on its way when the program died, and was redeemed after that, nobody can help: how often it happens is a
    // matter of how long the issuer takes.
    let in_the_window = unavoidable - late;
    assert!(in_the_window <= most, "{in_the_window} of {kills}");
}

/// One place that is attacked again and again.
struct Lane {
    place: Place,
    dice: Dice,
    count: Count,
}

#[derive(Default)]
struct Count {
    kills: usize,
    /// Kills after the issuer had redeemed the refresh token.
    redeemed: usize,
    /// Of those, with the successor in the store.
    stored: usize,
    /// Of those, with the answer in the journal, and not in the store.
    journaled: usize,
    /// Logins lost where neither had it.
    unavoidable: usize,
    /// Of those, redeemed after the kill: the request was on its way.
    late: usize,
    /// What must not happen.
    avoidable: Vec<String>,
}

impl Lane {
    async fn run(mut self, kills: usize) -> Count {
        let begun = Instant::now();
        self.place.grow_old(EXPIRED).await;
        assert_eq!(self.place.token().await.status, 0);
        let usual = begun.elapsed();
        while self.count.kills < kills {
            self.round(usual).await;
        }
        self.count
    }

    /// One kill, unless the program ends before it comes to that.
    async fn round(&mut self, usual: Duration) {
        let Self { place, dice, count } = self;
        let age = if dice.below(4) == 0 { DUE } else { EXPIRED };
        let takes = Duration::from_millis(dice.below(ISSUER_TAKES) as u64);
        let moment = (usual + takes).mul_f64(dice.below(1200) as f64 / 1000.0);
        place.grow_old(age).await;
        place.issuer().take(takes);
        let (before, old) = (Redeemed::now(place), place.refresh_token().await);
        let killed = match dice.below(2) {
            0 => token_killed_after(place, moment).await,
            _ => serve_killed_after(place, moment).await,
        };
        place.issuer().take(Duration::ZERO);
        let Some(killed) = killed else { return };
        let redeemed = before.since(place).0 > 0;
        place.assert_whole().await;
        let stored = place.refresh_token().await != old;
        let journaled = !stored && place.holds_answer();
        count.kills += 1;
        count.redeemed += usize::from(redeemed);
        count.stored += usize::from(redeemed && stored);
        count.journaled += usize::from(redeemed && journaled);

        // A fresh program first mends what there is to mend, and later needs the login for a refresh.
        let mut first = place.token().await;
        let mended = first.status == 0 && place.accepts(&first);
        if mended && age == DUE {
            place.grow_old(EXPIRED).await;
            first = place.token().await;
        }
        let redeemed_at = place.issuer().redeemed_at().get(before.0).copied();
        let gap = redeemed_at.map(|at| killed.saturating_duration_since(at));
        let what = format!(
            "{:?} {age} killed after {moment:?}, {gap:?} after the issuer had redeemed: stored {stored}, journaled \
             {journaled}: {first:?}",
            place.kept
        );
        if first.status == 0 && place.accepts(&first) && before.since(place).1 == 0 {
            place.assert_goes_on(&what).await;
            return place.assert_tidy(&what);
        }
        if redeemed && !stored && !journaled && (mended || age == EXPIRED) {
            count.unavoidable += 1;
            count.late += usize::from(redeemed_at.is_some_and(|at| at > killed));
            println!("an answer was lost: {what}");
            assert_says_that_it_ended(place, &what).await;
        } else {
            count.avoidable.push(what);
        }
        place.signs_in().await;
    }
}

/// Kills a `valetkey token` so long after it was typed: when, unless it had ended before.
async fn token_killed_after(place: &Place, moment: Duration) -> Option<Instant> {
    let mut child = place.scene().valetkey(&place.asks_for_token()).spawn().unwrap();
    // A moment is what the proof is about.
    tokio::time::sleep(moment).await;
    child.start_kill().unwrap();
    let killed = Instant::now();
    (done(child).await.status == KILLED).then_some(killed)
}

/// Kills a `valetkey serve` so long after it was asked for something: when.
async fn serve_killed_after(place: &Place, moment: Duration) -> Option<Instant> {
    let mut serving = Serving::start(place.scene()).await;
    let asked = async {
        drop(place.ask(&serving).await);
        pending::<()>().await;
    };
    drop(tokio::time::timeout(moment, asked).await);
    serving.signal(Signal::KILL);
    let killed = Instant::now();
    serving.ended().await.is_none().then_some(killed)
}

/// How long an answer of the issuer is nowhere but in memory: from when it has redeemed the token to when the journal
/// is on the disk, and to when a reader of our log has been told so, which is later.
#[tokio::test(flavor = "multi_thread")]
async fn the_window_is_measured() {
    let place = Place::new(Kept::File).await.unwrap();
    let mut widths = Vec::new();
    for _ in 0..rounds(20, 500) {
        place.grow_old(EXPIRED).await;
        let mut command = place.scene().valetkey(&place.asks_for_token());
        command.args(["--log", "warn"]);
        let mut child = command.env(fault::VARIABLE, "journaled=say").spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut journaled = None;
        while let Some(line) = said.next_line().await.unwrap() {
            if line.contains("journaled") {
                journaled = Some(Instant::now());
            }
        }
        assert_eq!(done(child).await.status, 0);
        let redeemed = *place.issuer().redeemed_at().last().unwrap();
        let width = journaled.expect("nothing was journaled").checked_duration_since(redeemed);
        widths.push(width.expect("it was journaled before it was redeemed"));
    }
    widths.sort_unstable();
    println!(
        "from redeemed to journaled, in {} runs: {:?} at least, {:?} in the middle, {:?} at most",
        widths.len(),
        widths[0],
        widths[widths.len() / 2],
        widths[widths.len() - 1],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_saving_it_tears_no_file() {
    let kills = rounds(300, 10_000);
    let each = [Saved::Codex, Saved::Sealed].map(|kind| kind.is_killed(kills / 2));
    let saves: u64 = join_all(each).await.into_iter().sum();
    println!("{kills} kills in the course of {saves} saves, no torn file");
}

/// Which store saves.
#[derive(Clone, Copy, Debug)]
enum Saved {
    Codex,
    Sealed,
}

impl Saved {
    fn store(self, folder: &Path) -> Box<dyn RecordStore> {
        let (folder, tasks, keyring) = (folder.to_owned(), Tasks::new(), Keyring::system());
        match self {
            Self::Codex => Box::new(CodexStore::new(folder, Keep::File, keyring, tasks)),
            Self::Sealed => {
                let name = "example".parse().unwrap();
                Box::new(SealedStore::new(folder, &name, Keep::File, keyring, tasks))
            }
        }
    }

    /// The login that is saved as the so-manieth: each of another length, up to 60 KB.
    fn login(self, number: u64) -> Login {
        let set = TokenSet {
            access: Secret::new(format!("a{number}")),
            refresh: Some(Secret::new(format!("r{number}"))),
            id: Some(Secret::new("i".repeat((1 + number * 7919 % 60_000) as usize))),
            account_id: Some("x".to_owned()),
            last_refresh: None,
        };
        match self {
            Self::Codex => Login::ChatGpt(set),
            Self::Sealed => Login::OAuth(set),
        }
    }

    /// Which login a record holds, to the last byte.
    fn number(self, record: &Record) -> u64 {
        let set = record.login.as_ref().and_then(Login::tokens).expect("a login is gone");
        let refresh = set.refresh.as_ref().unwrap().expose();
        let number = refresh.strip_prefix('r').unwrap().parse().unwrap();
        let expected = self.login(number);
        let all =
            |set: &TokenSet| [&set.refresh, &set.id].map(|it| it.as_ref().map(Secret::fingerprint));
        let same = set.access.fingerprint() == expected.tokens().unwrap().access.fingerprint()
            && all(set) == all(expected.tokens().unwrap());
        assert!(same, "login {number} is a mixture");
        number
    }

    /// Kills a process that saves so often, and counts its saves.
    async fn is_killed(self, kills: usize) -> u64 {
        let folder = tempfile::tempdir().unwrap();
        let (store, mut dice) = (self.store(folder.path()), Dice::new(7));
        store.put(Some(self.login(0)), None).await.unwrap();
        let mut last = 0;
        for _ in 0..kills {
            let program = std::env::current_exe().unwrap();
            let mut child = Command::new(program);
            child.args(["--exact", "crash::saves_until_it_is_killed", "--nocapture"]);
            child.env(SAVES, format!("{self:?} {}", folder.path().display()));
            let mut child = child.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
            let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut saved = None;
            while saved.is_none() {
                saved = saved_in(&said.next_line().await.unwrap().expect("it ended by itself"));
            }
            tokio::time::sleep(Duration::from_micros(dice.below(20_000) as u64)).await;
            child.start_kill().unwrap();
            while let Some(line) = said.next_line().await.unwrap() {
                saved = saved_in(&line).or(saved);
            }
            drop(child.wait().await);
            let found = self.number(&store.get().await.unwrap().1);
            let told = saved.unwrap();
            assert!((told..=told + 1).contains(&found), "{found} is kept, {told} was saved");
            last = found;
        }
        let left = left_over(folder.path());
        assert!(left.len() <= MOST_LEFT, "{} files are left over: {left:?}", left.len());
        last
    }
}

/// The files that were being written when their writers died.
fn left_over(folder: &Path) -> Vec<String> {
    let dirs = [folder.to_owned(), folder.join(".valetkey")];
    let entries = dirs.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten());
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with('.') && name != ".valetkey").collect()
}

/// The number in what the other process says of a save.
fn saved_in(line: &str) -> Option<u64> {
    line.strip_prefix("saved ")?.parse().ok()
}

/// The other process of [`killed_while_saving_it_tears_no_file`]: by itself it does nothing.
#[tokio::test]
async fn saves_until_it_is_killed() {
    let Some(told) = option_env_now(SAVES) else {
        println!("skipped: it is started by the proof that kills it");
        return;
    };
    let (kind, folder) = told.split_once(' ').unwrap();
    let kind = if kind == "Codex" { Saved::Codex } else { Saved::Sealed };
    let store = kind.store(Path::new(folder));
    loop {
        let (version, record) = store.get().await.unwrap();
        let number = kind.number(&record) + 1;
        let login = kind.login(number);
        let next = Record { header: record.header.next_generation(&login), login: Some(login) };
        let done = store.cas(version, next).await.unwrap();
        assert!(matches!(done, Cas::Done(_)), "{done:?}");
        println!("saved {number}");
    }
}

/// What one reads of a login that ended, and how to go on.
async fn assert_says_that_it_ended(place: &Place, case: &str) {
    let token = place.token().await;
    assert_eq!(token.status, SIGN_IN_NEEDED, "{case}: {token:?}");
    let said: Vec<_> = token.err.lines().filter(|line| !line.contains(" WARN ")).collect();
    assert!(
        said.len() == 2 && said[0].starts_with("error: ") && said[1].starts_with("hint: sign in: "),
        "{case}: one sentence, and what to type: {said:#?}"
    );
}

/// How many refresh tokens the issuer had redeemed, and how many it was shown again.
#[derive(Clone, Copy)]
struct Redeemed(usize, usize);

impl Redeemed {
    fn now(place: &Place) -> Self {
        Self(place.issuer().refreshes(), place.issuer().reuses())
    }

    fn since(self, place: &Place) -> (usize, usize) {
        let now = Self::now(place);
        (now.0 - self.0, now.1 - self.1)
    }
}

/// How many places are attacked at once: most of the time is waiting for a lease to end.
const AT_ONCE: usize = 16;

/// The same with a desktop for each.
const DESKTOPS: usize = 5;

/// The steps in which it matters where the key of a journal is; the others are as with any other store.
const WITH_A_SEAL: [&str; 4] = ["noted", "answered", "journaled", "published"];

/// Places attacked at random moments at once: few, so that the processes wait for the issuer and not for each other.
const LANES: usize = 4;

/// Longest time that the issuer takes to redeem a token, in milliseconds.
const ISSUER_TAKES: usize = 1500;

/// Tells the process that saves which store, and where.
const SAVES: &str = "VALETKEY_PROOF_SAVES";

/// Files that dead writers may leave behind, however many have died.
const MOST_LEFT: usize = 4;

/// Where in a journal an answer stands, behind the note of who has asked.
const JOURNAL_NOTE: usize = 4096;

/// How a program ends that SIGKILL ended, as [`Done`] has it.
const KILLED: i32 = -9;

/// How a program ends when somebody has to sign in.
const SIGN_IN_NEEDED: i32 = 4;
