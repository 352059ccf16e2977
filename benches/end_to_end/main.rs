//! Measures what the proxy costs: the same work straight to the pretend API, through `valetkey serve` and, if asked, through
//! haproxy, in turns, printed as ratios. The load and the API share this process; each proxy is a process of its own, on a
//! core of its own. `benches/README.md` says how to read it.
//!
//! `cargo bench --bench end_to_end [-- --quick]`

#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and may fail by panicking"
)]

mod figures;
mod form;
mod machine;
mod standing;
mod ways;
mod works;

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustls::HandshakeKind;
use valetkey::sandbox::client::{HTTP1, HTTP2, Visit};
use valetkey::sandbox::{Settings, World};
use valetkey::secret::Secret;

use figures::{Figure, Ratio, Table};
use form::Form;
use machine::{Cores, Cpu};
use ways::{KEY, Proxy, Running, TARGET, Way};
use works::{Done, Load, Show, WORKS, Work};

fn main() -> ExitCode {
    let form = match Form::read(std::env::args().skip(1)) {
        Ok(form) => form,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::from(2);
        }
    };
    let mut names: Vec<&str> = WORKS.iter().map(|work| work.name).chain(standing::NAMES).collect();
    // It compares valetkey with itself, so that haproxy has no part in it.
    names.retain(|name| !form.has_haproxy || !name.starts_with("growth"));
    if let Some(unknown) = form.unknown(&names) {
        let names = names.join(", ");
        eprintln!("error: --only {unknown}: nothing here is called so\nhint: there are {names}");
        return ExitCode::from(2);
    }
    if form.has_haproxy && !has_haproxy() {
        eprintln!("error: haproxy is not installed\nhint: apt-get install haproxy");
        return ExitCode::FAILURE;
    }
    machine::raise_descriptors();
    let cores = Cores::split();
    machine::pin(cores.map(|cores| cores.load));
    // One thread: it has one core.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(&form, cores));
    ExitCode::SUCCESS
}

async fn run(form: &Form, cores: Option<Cores>) {
    let world = World::start(Settings { record: false, ..Settings::default() }).await.unwrap();
    // Whoever does not show it gets 401, and every answer is counted only if 200.
    world.api().accept(Secret::new(KEY));
    world.api().require_login(true);
    let straight = Way::straight(&world);
    let haproxy = form.has_haproxy.then(|| Proxy::haproxy(&world).on(cores));
    let unseen = (form.rounds + 1) * form.unseen;
    let valetkey = Proxy::valetkey(&world, &form.binary, 0, unseen).on(cores);
    let proxies: Vec<&Proxy> = haproxy.iter().chain([&valetkey]).collect();
    let columns = if form.has_haproxy { vec!["haproxy", "valetkey"] } else { vec!["valetkey"] };
    println!("measured: {}", form.binary.display());
    if cores.is_none() {
        println!("no two cores to tell apart: load and proxy run where they may");
    }

    let mut table = Table::new(form.compares);
    let works: Vec<&Work> = WORKS.iter().filter(|work| form.wants(work.name)).collect();
    if !works.is_empty() {
        table.begin("work", &[&["direct"], &columns[..]].concat());
        let running = start_all(&proxies, &straight).await;
        let ways: Vec<&Way> =
            [&straight].into_iter().chain(running.iter().map(|it| &it.way)).collect();
        let mut rates = Vec::new();
        for work in works {
            let rounds = rounds(form, work, &ways, cores).await;
            for show in work.shows {
                table.add(&Figure::of_work(work, *show, &rounds));
            }
            rates.push((work.name, Figure::of_work(work, Show::Rate, &rounds)));
        }
        if let Some(figure) = resumed_against_full(&rates) {
            table.add(&figure);
        }
        for proxy in running {
            proxy.end().await;
        }
    }
    if ["memory", "cold", "size"].iter().any(|name| form.wants(name)) {
        table.begin("standing", &columns);
        standing::measure(form, &mut table, &proxies).await;
    }
    if !form.has_haproxy {
        standing::growth(form, &mut table, (&world, &straight), cores).await;
    }
    if form.saves {
        table.save();
    }
}

/// Starts the proxies, and sees that each does what is to be measured.
async fn start_all(proxies: &[&Proxy], straight: &Way) -> Vec<Running> {
    assert_eq!(answers(straight).await, [401, 401], "the API wants the key");
    let mut all = Vec::new();
    for proxy in proxies {
        let running = proxy.start().await;
        assert_eq!(answers(&running.way).await, [200, 200], "the proxy sets the key");
        all.push(running);
    }
    for way in all.iter().map(|running| &running.way).chain([straight]) {
        let client = way.client.resuming();
        client.get(Visit::to(TARGET, HTTP1), "/v1/bytes/200").await.unwrap();
        let again = client.greet(Visit::to(TARGET, HTTP1)).await.unwrap();
        assert_eq!(again.get_ref().1.handshake_kind(), Some(HandshakeKind::Resumed));
    }
    all
}

/// What a client without the key is told over HTTP/1.1 and HTTP/2.
async fn answers(way: &Way) -> [u16; 2] {
    let status = async |alpn| {
        way.client.get(Visit::to(TARGET, alpn), "/v1/bytes/200").await.unwrap().status().as_u16()
    };
    [status(HTTP1).await, status(HTTP2).await]
}

/// Does a work on each way in turns: A, B, then B, A, so that what drifts hits both alike. Nothing for a way that cannot do
/// it.
async fn rounds(
    form: &Form,
    work: &Work,
    ways: &[&Way],
    cores: Option<Cores>,
) -> Vec<Vec<Option<Done>>> {
    if work.on_one_core {
        machine::pin(cores.map(|cores| cores.proxy));
    }
    let others = Others::begin(ways);
    let mut rounds = Vec::new();
    for round in 0..=form.rounds {
        let mut dones: Vec<Option<Done>> = ways.iter().map(|_| None).collect();
        let mut order: Vec<usize> = (0..ways.len()).collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for at in order {
            if work.name.starts_with(works::TUNNEL) && ways[at].plain.is_none() {
                continue;
            }
            let load = Load {
                way: ways[at].clone(),
                straight: ways[0].clone(),
                // The first round warms up.
                time: if round == 0 { form.time / 4 } else { form.time },
                bulk: form.bulk,
                unseen: round * form.unseen..(round + 1) * form.unseen,
            };
            let turn = tokio::time::timeout(form.time * 10 + TURN, (work.run)(load));
            dones[at] = Some(turn.await.expect("the work ends"));
        }
        rounds.push(dones);
    }
    others.tell();
    machine::pin(cores.map(|cores| cores.load));
    rounds.split_off(1)
}

/// How many resumed connections there are for each full one.
fn resumed_against_full(rates: &[(&str, Figure)]) -> Option<Figure> {
    let values = |name| rates.iter().find(|(work, _)| *work == name).map(|(_, rate)| &rate.values);
    let (full, resumed) = (values("connect")?, values("resume")?);
    let each = full.iter().zip(resumed).map(|(full, resumed)| Some((*resumed)? / (*full)?));
    let each: Vec<Option<f64>> = each.collect();
    let last = (each[each.len() - 2]?, each[each.len() - 1]?);
    let ratio = Ratio::of(&[last]);
    Some(Figure {
        ratio,
        ..Figure::plain("resume.full", "resumed for each full one", "times", each)
    })
}

/// How much CPU programs take that are not part of this.
struct Others {
    at: Instant,
    busy: f64,
    own: f64,
    proxies: Vec<(u32, Cpu)>,
}

impl Others {
    fn begin(ways: &[&Way]) -> Self {
        let processes = ways.iter().filter_map(|way| way.proxy);
        let proxies = processes.map(|process| (process, Cpu::of(process))).collect();
        Self { at: Instant::now(), busy: machine::busy(), own: machine::own_cpu(), proxies }
    }

    /// Warns where it was so much that the figures below suffer.
    fn tell(&self) {
        let of_proxies = self.proxies.iter().map(|(process, cpu)| Cpu::of(*process).since(cpu));
        let ours = machine::own_cpu() - self.own + of_proxies.sum::<f64>();
        let others = (machine::busy() - self.busy - ours) / self.at.elapsed().as_secs_f64();
        if others > CALM {
            println!("(other programs took {others:.1} cores meanwhile)");
        }
    }
}

fn has_haproxy() -> bool {
    let mut asked = Command::new("haproxy");
    asked.arg("-v").stdout(Stdio::null()).stderr(Stdio::null());
    asked.status().is_ok_and(|status| status.success())
}

/// Beyond what a turn is given: for connecting, and on a busy machine.
const TURN: Duration = Duration::from_secs(60);

/// What a desktop does by itself; more than that moves rates, and less so CPU for each unit.
const CALM: f64 = 0.25;
